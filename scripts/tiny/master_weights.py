"""bfloat16 weights to compute with, float32 weights to train: half the memory traffic, nothing lost to rounding."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from training_stage import load_optimizers, optimizer_tensors

from library.muon import Muon


class MasterWeights:
    """Float32 copies of a module's parameters, their running average, and the optimizers that move them."""

    def __init__(
        self,
        module: nn.Module,
        *,
        for_muon: Callable[[str, Tensor], bool],
        muon_lr: float,
        adam_lr: float,
        weight_decay: float,
    ) -> None:
        self.working = dict(module.named_parameters())
        self.masters = {name: weight.detach().float().clone() for name, weight in self.working.items()}
        self.average = {name: weight.clone() for name, weight in self.masters.items()}
        self.gradients = {name: torch.zeros_like(weight) for name, weight in self.masters.items()}
        for name, master in self.masters.items():
            master.grad = self.gradients[name]
        module.to(torch.bfloat16)
        inner = [name for name, weight in self.masters.items() if muon_lr > 0 and for_muon(name, weight)]
        outer = [name for name in self.masters if name not in set(inner)]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "adam": torch.optim.AdamW(
                [self.masters[name] for name in outer], lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
            )
        }
        if inner:
            self.optimizers["muon"] = Muon(
                [self.masters[name] for name in inner],
                lr=muon_lr,
                weight_decay=weight_decay,
                dtype=torch.bfloat16,
            )
        self.peaks = {"adam": adam_lr, "muon": muon_lr}

    def step(self, *, rate: float, clip: float, decay: float) -> None:
        """Clip the gradient, move the masters at `rate` times the peak learning rates, renew module and average."""
        working = list(self.working.values())
        torch._foreach_copy_(list(self.gradients.values()), [weight.grad for weight in working])
        nn.utils.clip_grad_norm_(self.masters.values(), clip)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * self.peaks[name]
            optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(working, list(self.masters.values()))
        torch._foreach_lerp_(list(self.average.values()), list(self.masters.values()), 1 - decay)
        for weight in working:
            weight.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return everything needed to go on."""
        tensors = {f"master.{name}": weight for name, weight in self.masters.items()}
        tensors |= {f"average.{name}": weight for name, weight in self.average.items()}
        return tensors | optimizer_tensors(self.optimizers)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `tensors()`."""
        for name, working in self.working.items():
            self.masters[name].copy_(tensors[f"master.{name}"])
            self.average[name].copy_(tensors[f"average.{name}"])
            working.copy_(tensors[f"master.{name}"])
        load_optimizers(self.optimizers, tensors)
