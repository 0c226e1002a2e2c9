"""A start for the autoencoder that is already a linear code: the encoder is the PCA of 8 x 8 patches.

Every residual branch starts at zero, so the network is its skip path, and that path is set by hand. In the encoder the
strided convolutions see cells of 2 x 2 and keep their principal components, down to whitened latents. The decoder's
upsampling can't tell the four pixels of a cell apart by any linear map, so it starts as the best linear guess from the
neighbourhood, by least squares, and learns the rest. SiLU is passed by pairs (x, -x), since silu(x) - silu(-x) = x,
and the normalisation by a few constant channels so large that an image's own variance hardly matters.

From a random start, object hues are still wrong after minutes; from this one they are right from the first step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.flux.autoencoder import Autoencoder, ResnetBlock

CONSTANT = 12.0
RIDGE = 1e-3
LOG_VARIANCE = -5.0


@torch.no_grad()
def start_from_pca(model: Autoencoder, pixels_B3hw: Tensor) -> None:
    """Set the weights from example pictures in [-1, 1], about 64 of 128 x 128, colours and depth in equal parts."""
    for name, module in model.named_modules():
        if isinstance(module, ResnetBlock):
            _silence(module.conv2)
        if name.endswith("proj_out"):
            _silence(module)
    stages = _start_encoder(model, pixels_B3hw)
    _start_decoder(model, stages)


def _silence(layer: nn.Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _carry(layer: nn.Conv2d, rows: Tensor, *, bias: Tensor | None = None, corner: bool = False) -> None:
    """Let the first outputs of a convolution be `rows`, on its first inputs; its other outputs stay random.

    `rows` is (out, in) for the middle tap, or with `corner` (out, in, 2, 2) for the taps of a strided 2 x 2 cell, or
    (out, in, 3, 3).
    """
    outputs, inputs = rows.shape[:2]
    layer.weight[:outputs] = 0
    layer.bias[:outputs] = 0 if bias is None else bias
    if corner:
        layer.weight[:outputs, :inputs, :2, :2] = rows
    elif rows.ndim == 4:
        layer.weight[:outputs, :inputs] = rows
    else:
        middle = layer.kernel_size[0] // 2
        layer.weight[:outputs, :inputs, middle, middle] = rows


def _principal(cells_nd: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the first principal directions (count, d), largest first, and their standard deviations."""
    variance, directions = torch.linalg.eigh(torch.cov(cells_nd.T.double()))
    order = variance.argsort(descending=True)[:count]
    return directions[:, order].T.float(), variance[order].clamp_min(1e-12).sqrt().float()


def _pass_norm(norm: nn.GroupNorm, x_BChw: Tensor) -> None:
    """Set the gain so that the normalisation is close to doing nothing for these features."""
    norm.weight.fill_(float(x_BChw.flatten(1).std(dim=1).mean()))


def _signs(count: int) -> Tensor:
    return CONSTANT * torch.tensor([1.0, -1.0]).repeat(count // 2)


def _start_encoder(model: Autoencoder, pixels_B3hw: Tensor) -> list[Tensor]:
    """Set the encoder; return the components it carries at each resolution, finest first, whitened latents last."""
    encoder, latents = model.encoder, model.config.z_channels
    _carry(encoder.conv_in, torch.eye(3))
    x_BChw, stages = encoder.conv_in(pixels_B3hw), [pixels_B3hw]
    for level in encoder.down[:-1]:
        carried, strided = stages[-1].shape[1], level.downsample.conv
        _carry_shortcuts(level.block, carried)
        cells_nd = F.unfold(stages[-1], 2, stride=2).mT.flatten(0, 1)
        if level is encoder.down[-2]:
            rows, bias = _whitening(cells_nd, latents, width=strided.out_channels)
        else:
            rows, bias = _principal(cells_nd, min(4 * carried, strided.out_channels))[0], None
        _carry(strided, rows.view(len(rows), carried, 2, 2), bias=bias, corner=True)
        x_BChw = level(x_BChw)
        stages.append(x_BChw[:, : len(rows)])
    for block in (*encoder.down[-1].block, encoder.mid.block_1, encoder.mid.block_2):
        _pass_norm(block.norm1, x_BChw)
    _pass_norm(encoder.mid.attn_1.norm, x_BChw)
    _pass_norm(encoder.norm_out, x_BChw)
    pair = torch.cat([torch.eye(latents), -torch.eye(latents)], dim=1)
    _carry(encoder.conv_out, torch.cat([pair, torch.zeros_like(pair)]))
    encoder.conv_out.bias[latents:] = LOG_VARIANCE
    return [*stages[:-1], stages[-1][:, :latents]]


def _whitening(cells_nd: Tensor, latents: int, *, width: int) -> tuple[Tensor, Tensor]:
    """Return rows and bias for the whitened latents as pairs of signs, then for the constants."""
    directions, deviations = _principal(cells_nd, latents)
    whitened = directions / deviations[:, None]
    shift = -(whitened @ cells_nd.mean(dim=0))
    constants = (width - 2 * latents) // 8 * 2
    rows = torch.cat([whitened, -whitened, torch.zeros(constants, whitened.shape[1])])
    return rows, torch.cat([shift, -shift, _signs(constants)])


def _start_decoder(model: Autoencoder, stages: list[Tensor]) -> None:
    """Set the decoder to guess each resolution's components from the coarser ones, and at last the pixels."""
    decoder = model.decoder
    *targets, guess = stages
    _carry(decoder.conv_in, torch.eye(guess.shape[1]))
    x_BChw = decoder.conv_in(guess)
    for level, target in zip(reversed(decoder.up[1:]), reversed(targets), strict=True):
        _carry_shortcuts(level.block, guess.shape[1])
        kernel, bias = _least_squares(F.interpolate(guess, scale_factor=2.0, mode="nearest"), target)
        _carry(level.upsample.conv, kernel, bias=bias)
        x_BChw = level(x_BChw)
        guess = x_BChw[:, : target.shape[1]]
    _start_finest(decoder, x_BChw)


def _carry_shortcuts(blocks: nn.ModuleList, carried: int) -> None:
    for block in blocks:
        if hasattr(block, "nin_shortcut"):
            _carry(block.nin_shortcut, torch.eye(carried))


def _least_squares(x_BChw: Tensor, target_BChw: Tensor) -> tuple[Tensor, Tensor]:
    """Return the 3 x 3 kernel (out, in, 3, 3) and the bias that best map the one to the other."""
    inputs_nd = F.pad(F.unfold(x_BChw, 3, padding=1).mT.flatten(0, 1), (0, 1), value=1.0)
    outputs_nd = target_BChw.flatten(2).mT.flatten(0, 1)
    gram = (inputs_nd.T @ inputs_nd).double() / len(inputs_nd)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, (inputs_nd.T @ outputs_nd).double() / len(inputs_nd)).T.float()
    return solution[:, :-1].reshape(len(solution), -1, 3, 3), solution[:, -1]


def _start_finest(decoder: nn.Module, x_BChw: Tensor) -> None:
    """Carry the guessed pixels as pairs of signs beside constants through the finest level and out."""
    blocks = decoder.up[0].block
    shortcut = blocks[0].nin_shortcut
    constants = (shortcut.out_channels - 6) // 4 * 2
    rows = torch.cat([torch.eye(3), -torch.eye(3), torch.zeros(constants, 3)])
    _carry(shortcut, rows, bias=torch.cat([torch.zeros(6), _signs(constants)]))
    full = shortcut(x_BChw)
    for block in blocks[1:]:
        _pass_norm(block.norm1, full)
    _pass_norm(decoder.norm_out, full)
    _carry(decoder.conv_out, torch.cat([torch.eye(3), -torch.eye(3)], dim=1))
