// Fused elementwise parts of a Flux block for bfloat16 on CPUs, forward and backward. The matrix products stay torch's.
//
// Plain loops over rows that the compiler vectorises: each row is widened to float, worked on, and rounded back.
// Letters: B batch, L tokens, D width, H heads, K head width, F hidden width of the feed-forward.

#include <cmath>
#include <cstdint>
#include <cstring>

#include <omp.h>

namespace {

using bf16 = uint16_t;
constexpr int WIDEST = 4096;  // widest row that is handled
constexpr float NORM_EPSILON = 1e-6f;

inline float widen(bf16 value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline bf16 narrow(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// 1 / (1 + e^-x) by a polynomial for 2^fraction; relative error below 1e-6, far under bfloat16's 4e-3.
inline float sigmoid(float x) {
    float power = x * -1.44269504f;
    power = power < -120.f ? -120.f : power > 120.f ? 120.f : power;
    float whole = std::floor(power + 0.5f);
    float part = power - whole;
    float two = 1.f + part * (0.693147182f + part * (0.240226462f + part * (0.0555033982f +
                part * (0.00961817f + part * 0.00133335f))));
    uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return 1.f / (1.f + two * scale);
}

// tanh-GELU is x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float GELU_LINEAR = 2.f * 0.7978845608f, GELU_CUBIC = GELU_LINEAR * 0.044715f;

void gelu_row(const bf16* in, const bf16* bias, bf16* out, long n) {
    for (long i = 0; i < n; ++i) {
        float x = widen(in[i]) + widen(bias[i]);
        out[i] = narrow(x * sigmoid(x * (GELU_LINEAR + GELU_CUBIC * x * x)));
    }
}

void gelu_row_backward(const bf16* in, const bf16* bias, const bf16* gradient, bf16* out, long n) {
    for (long i = 0; i < n; ++i) {
        float x = widen(in[i]) + widen(bias[i]);
        float s = sigmoid(x * (GELU_LINEAR + GELU_CUBIC * x * x));
        float slope = s + x * s * (1.f - s) * (GELU_LINEAR + 3.f * GELU_CUBIC * x * x);
        out[i] = narrow(widen(gradient[i]) * slope);
    }
}

// One head's row: RMS norm, scale, rotation of neighbouring pairs.
template <int K>
void head_forward(const bf16* in, const float* bias, const float* scale, const float* cosine, const float* sine, bf16* out) {
    float x[K];
    float square = 0.f;
    for (int i = 0; i < K; ++i) {
        x[i] = widen(in[i]) + bias[i];
        square += x[i] * x[i];
    }
    float inverse = 1.f / std::sqrt(square / K + NORM_EPSILON);
    for (int i = 0; i < K; ++i) x[i] *= inverse * scale[i];
    for (int i = 0; i < K / 2; ++i) {
        out[2 * i] = narrow(x[2 * i] * cosine[i] - x[2 * i + 1] * sine[i]);
        out[2 * i + 1] = narrow(x[2 * i] * sine[i] + x[2 * i + 1] * cosine[i]);
    }
}

template <int K>
void head_backward(const bf16* in, const float* bias, const float* scale, const float* cosine, const float* sine,
                   const bf16* gradient, bf16* out, float* scale_gradient) {
    float x[K], g[K];
    float square = 0.f, dot = 0.f;
    for (int i = 0; i < K; ++i) {
        x[i] = widen(in[i]) + bias[i];
        square += x[i] * x[i];
    }
    float inverse = 1.f / std::sqrt(square / K + NORM_EPSILON);
    for (int i = 0; i < K / 2; ++i) {
        float a = widen(gradient[2 * i]), b = widen(gradient[2 * i + 1]);
        g[2 * i] = a * cosine[i] + b * sine[i];
        g[2 * i + 1] = b * cosine[i] - a * sine[i];
    }
    for (int i = 0; i < K; ++i) {
        x[i] *= inverse;
        scale_gradient[i] += g[i] * x[i];
        g[i] *= scale[i];
        dot += g[i] * x[i];
    }
    dot /= K;
    for (int i = 0; i < K; ++i) out[i] = narrow(inverse * (g[i] - x[i] * dot));
}

constexpr int K = 64;

}  // namespace

extern "C" {

void use_threads(long count) { omp_set_num_threads(static_cast<int>(count)); }

// y = (1 + scale) LayerNorm(x) + shift; shift and scale are rows of `stride` apart. Keeps mean and 1 / deviation.
void norm_modulate(const bf16* x, const bf16* shift, const bf16* scale, long stride, bf16* y, float* kept, long B,
                   long L, long D) {
#pragma omp parallel for
    for (long b = 0; b < B; ++b) {
        float row[WIDEST], add[WIDEST], times[WIDEST];
        for (long i = 0; i < D; ++i) {
            add[i] = widen(shift[b * stride + i]);
            times[i] = 1.f + widen(scale[b * stride + i]);
        }
        for (long l = 0; l < L; ++l) {
            const bf16* in = x + (b * L + l) * D;
            bf16* out = y + (b * L + l) * D;
            float mean = 0.f, square = 0.f;
            for (long i = 0; i < D; ++i) {
                row[i] = widen(in[i]);
                mean += row[i];
            }
            mean /= D;
            for (long i = 0; i < D; ++i) square += (row[i] - mean) * (row[i] - mean);
            float inverse = 1.f / std::sqrt(square / D + NORM_EPSILON);
            for (long i = 0; i < D; ++i) out[i] = narrow((row[i] - mean) * inverse * times[i] + add[i]);
            kept[2 * (b * L + l)] = mean;
            kept[2 * (b * L + l) + 1] = inverse;
        }
    }
}

void norm_modulate_backward(const bf16* gradient, const bf16* x, const bf16* scale, long stride, const float* kept,
                            bf16* dx, bf16* dshift, bf16* dscale, long B, long L, long D) {
#pragma omp parallel for
    for (long b = 0; b < B; ++b) {
        float row[WIDEST], g[WIDEST], add[WIDEST], times[WIDEST], slope[WIDEST];
        for (long i = 0; i < D; ++i) {
            add[i] = slope[i] = 0.f;
            times[i] = 1.f + widen(scale[b * stride + i]);
        }
        for (long l = 0; l < L; ++l) {
            long at = (b * L + l) * D;
            float mean = kept[2 * (b * L + l)], inverse = kept[2 * (b * L + l) + 1];
            float sum = 0.f, dot = 0.f;
            for (long i = 0; i < D; ++i) {
                float incoming = widen(gradient[at + i]);
                row[i] = (widen(x[at + i]) - mean) * inverse;
                add[i] += incoming;
                slope[i] += incoming * row[i];
                g[i] = incoming * times[i];
                sum += g[i];
                dot += g[i] * row[i];
            }
            sum /= D;
            dot /= D;
            for (long i = 0; i < D; ++i) dx[at + i] = narrow(inverse * (g[i] - sum - row[i] * dot));
        }
        for (long i = 0; i < D; ++i) {
            dshift[b * D + i] = narrow(add[i]);
            dscale[b * D + i] = narrow(slope[i]);
        }
    }
}

// out = x + gate (y + bias)
void gate_add(const bf16* x, const bf16* y, const bf16* bias, const bf16* gate, long stride, bf16* out, long B, long L, long D) {
#pragma omp parallel for
    for (long b = 0; b < B; ++b)
        for (long l = 0; l < L; ++l) {
            long at = (b * L + l) * D;
            for (long i = 0; i < D; ++i)
                out[at + i] = narrow(widen(x[at + i]) + widen(gate[b * stride + i]) * (widen(y[at + i]) + widen(bias[i])));
        }
}

void gate_add_backward(const bf16* gradient, const bf16* y, const bf16* bias, const bf16* gate, long stride, bf16* dy,
                       bf16* dgate, long B, long L, long D) {
#pragma omp parallel for
    for (long b = 0; b < B; ++b) {
        float sum[WIDEST] = {0.f};
        for (long l = 0; l < L; ++l) {
            long at = (b * L + l) * D;
            for (long i = 0; i < D; ++i) {
                float incoming = widen(gradient[at + i]);
                sum[i] += incoming * (widen(y[at + i]) + widen(bias[i]));
                dy[at + i] = narrow(incoming * widen(gate[b * stride + i]));
            }
        }
        for (long i = 0; i < D; ++i) dgate[b * D + i] = narrow(sum[i]);
    }
}

// The first 3 H K columns of `in` (rows of `stride`), plus the bias, become q, k, v of (B, H, L, K): q and k normalised and rotated.
void split_heads(const bf16* in, long stride, const float* bias, const float* q_scale, const float* k_scale, const float* cosine,
                 const float* sine, bf16* q, bf16* k, bf16* v, long B, long L, long H) {
#pragma omp parallel for
    for (long b = 0; b < B; ++b)
        for (long l = 0; l < L; ++l) {
            const bf16* row = in + (b * L + l) * stride;
            const float *c = cosine + l * K / 2, *s = sine + l * K / 2;
            for (long h = 0; h < H; ++h) {
                long to = ((b * H + h) * L + l) * K;
                head_forward<K>(row + h * K, bias + h * K, q_scale, c, s, q + to);
                head_forward<K>(row + (H + h) * K, bias + (H + h) * K, k_scale, c, s, k + to);
                const bf16* value = row + (2 * H + h) * K;
                const float* more = bias + (2 * H + h) * K;
                for (long i = 0; i < K; ++i) v[to + i] = narrow(widen(value[i]) + more[i]);
            }
        }
}

// `scale_gradients` is (B, 2, K): each sample's own sums for q and k.
void split_heads_backward(const bf16* in, long stride, const float* bias, const float* q_scale, const float* k_scale, const float* cosine,
                          const float* sine, const bf16* dq, const bf16* dk, const bf16* dv, bf16* out,
                          float* scale_gradients, long B, long L, long H) {
#pragma omp parallel for
    for (long b = 0; b < B; ++b) {
        float* sums = scale_gradients + b * 2 * K;
        for (long l = 0; l < L; ++l) {
            const bf16* row = in + (b * L + l) * stride;
            bf16* to = out + (b * L + l) * stride;
            const float *c = cosine + l * K / 2, *s = sine + l * K / 2;
            for (long h = 0; h < H; ++h) {
                long from = ((b * H + h) * L + l) * K;
                head_backward<K>(row + h * K, bias + h * K, q_scale, c, s, dq + from, to + h * K, sums);
                head_backward<K>(row + (H + h) * K, bias + (H + h) * K, k_scale, c, s, dk + from, to + (H + h) * K, sums + K);
                std::memcpy(to + (2 * H + h) * K, dv + from, K * sizeof(bf16));
            }
        }
    }
}

// out (rows of `out_stride`) = GELU of F columns of `in` (rows of `in_stride`) plus the bias
void gelu(const bf16* in, long in_stride, const bf16* bias, bf16* out, long out_stride, long rows, long F) {
#pragma omp parallel for
    for (long r = 0; r < rows; ++r) gelu_row(in + r * in_stride, bias, out + r * out_stride, F);
}

void gelu_backward(const bf16* in, long in_stride, const bf16* bias, const bf16* gradient, long gradient_stride,
                   bf16* out, long out_stride, long rows, long F) {
#pragma omp parallel for
    for (long r = 0; r < rows; ++r)
        gelu_row_backward(in + r * in_stride, bias, gradient + r * gradient_stride, out + r * out_stride, F);
}

// Copy heads (B, H, L, K) to rows of `stride` (join) or back.
void join_heads(const bf16* in, bf16* out, long stride, long B, long L, long H) {
#pragma omp parallel for
    for (long b = 0; b < B; ++b)
        for (long h = 0; h < H; ++h)
            for (long l = 0; l < L; ++l)
                std::memcpy(out + (b * L + l) * stride + h * K, in + ((b * H + h) * L + l) * K, K * sizeof(bf16));
}

void join_heads_backward(const bf16* in, long stride, bf16* out, long B, long L, long H) {
#pragma omp parallel for
    for (long b = 0; b < B; ++b)
        for (long h = 0; h < H; ++h)
            for (long l = 0; l < L; ++l)
                std::memcpy(out + ((b * H + h) * L + l) * K, in + (b * L + l) * stride + h * K, K * sizeof(bf16));
}

}  // extern "C"
