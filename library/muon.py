"""Muon: momentum whose matrix updates are made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

PyTorch's own takes 2-D weights only. These also take convolutions, read as matrices (out, in * height * width), and
`MuonAdam` takes every weight of a model.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# The quintic of the Newton-Schulz iteration (same source): steep at 0 and, for singular values below 1, ends near 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices_Nij: Tensor, *, steps: int = 5) -> Tensor:
    """Move the singular values of each matrix (N, rows, columns) towards 1, to about 0.7 ... 1.2."""
    tall = matrices_Nij.shape[-2] > matrices_Nij.shape[-1]
    x = matrices_Nij.mT if tall else matrices_Nij
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised per weight and scaled by sqrt(max(1, rows / columns)).

    For weights of two or more dimensions; biases, gains, embeddings and a network's first and last layers belong to
    AdamW. `weight_decay` is decoupled; `dtype` (bfloat16 say) is what orthogonalisation is
    computed in. Weights of one shape are orthogonalised together.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float = 0.01,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps})
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim < 2:
                    raise ValueError(f"Muon takes weights of two or more dimensions, not {tuple(weight.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[len(weight), weight[0].numel()].append(weight)
            for (rows, columns), weights in by_shape.items():
                update = torch.stack([self._momentum(weight, group["momentum"]).flatten(1) for weight in weights])
                update = orthogonalize(update.to(self.dtype), steps=group["steps"]).to(weights[0])
                for weight, step in zip(weights, update, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(step.reshape(weight.shape), alpha=group["lr"] * max(1, rows / columns) ** 0.5)

    def _momentum(self, weight: Tensor, momentum: float) -> Tensor:
        """Update the running average of the weight's gradient and return Nesterov's look-ahead of it."""
        state = self.state[weight]
        if "average" not in state:
            state["average"] = torch.zeros_like(weight)
        gradient = weight.grad
        assert gradient is not None
        average = state["average"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


class MuonAdam(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions and AdamW for the rest (biases, gains): one optimizer for all.

    `lr` is Muon's; `adam_lr` is AdamW's. Both follow the same schedule.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float = 0.01,
        adam_lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        weights = list(params)
        self.parts: list[torch.optim.Optimizer] = []
        matrices = [weight for weight in weights if weight.ndim >= 2]
        vectors = [weight for weight in weights if weight.ndim < 2]
        if matrices:
            self.parts.append(Muon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay))
        if vectors:
            self.parts.append(torch.optim.AdamW(vectors, lr=adam_lr, betas=betas, weight_decay=weight_decay))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state  # loading a saved state replaces both
            part.step()
