"""What a run says before its first step: what is trained on what, how, and what memory that takes."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from library.errors import UserError
from library.jointdit.addons import AddonSettings
from library.jointdit.model import LoraRanks
from library.sharding import own_part
from library.training_args import TrainingArgs

GIGABYTE = 1e9


def describe_method(settings: AddonSettings, ranks: LoraRanks, args: TrainingArgs) -> str:
    """Name the switches of the method; all of them are in the add-ons' header too."""
    shift = f" {args.discrete_flow_shift:g}" if args.timestep_sampling == "shift" else ""
    clean = f"clean side {args.clean_flow_shift:g}, unbalanced"
    shared = clean if args.unbalanced_sampling else "both drawn freely (unbalanced sampling off)"
    return (
        f"noise levels {args.timestep_sampling}{shift}, {shared}; "
        f"weights of the joint connection: {settings.weighting}; text dropout {args.text_dropout:g}; "
        f"guidance {args.guidance_scale:g}; "
        f"ranks {ranks.blocks} (vector_in {ranks.vector_in} {ranks.vector_out}, txt_in {ranks.text_in})"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes a training step holds on the device throughout; activations come on top and depend on batch and size."""

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    average: int
    encoders: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.frozen + self.trained + self.gradients + self.optimizer + self.average + self.encoders

    def __str__(self) -> str:
        parts = {
            "frozen weights": self.frozen,
            "trained weights": self.trained,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "running average": self.average,
            "encoders": self.encoders,
        }
        sums = " + ".join(f"{size / GIGABYTE:.2f} {name}" for name, size in parts.items() if size)
        return f"{self.total / GIGABYTE:.2f} GB = {sums}"


def estimate_memory(
    model: nn.Module,
    *,
    trained: Collection[Tensor],
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    device: torch.device,
    average: bool = False,
    one_gradient_at_a_time: bool = False,
    encoders: Iterable[nn.Module] = (),
    parts: int = 1,
) -> MemoryEstimate:
    """Estimate what training holds on `device`.

    Frozen weights as they lie there (blocks swapped to the CPU don't count), trained weights, as many bytes again for
    their gradients (`one_gradient_at_a_time`: only the largest), the optimizer's bytes per weight as tried out on a
    small one, 4 bytes a weight for the running average, and those of the `encoders` that lie there. Where gradients and
    the optimizer's state are in several `parts` (ZeRO), this process has one, with a copy of its part of the weights.
    """
    own = {id(tensor) for tensor in trained}
    trained = [own_part(tensor) for tensor in trained]
    sizes = [tensor.numel() * tensor.element_size() for tensor in trained]
    weights = sum(tensor.numel() for tensor in trained)
    copy = sum(sizes) if parts > 1 else 0
    return MemoryEstimate(
        frozen=_bytes_on(device, (tensor for tensor in _tensors_of(model) if id(tensor) not in own)),
        trained=sum(sizes),
        gradients=max(sizes) if one_gradient_at_a_time else sum(sizes) // parts,
        optimizer=round((weights * optimizer_bytes_per_weight(make_optimizer, device=device) + copy) / parts),
        average=4 * weights if average else 0,
        encoders=_bytes_on(device, (tensor for network in encoders for tensor in _tensors_of(network))),
    )


def _tensors_of(network: nn.Module) -> Iterator[Tensor]:
    yield from network.parameters()
    yield from network.buffers()


def _bytes_on(device: torch.device, tensors: Iterable[Tensor]) -> int:
    place = torch.empty(0, device=device).device  # "cuda" alone doesn't say which
    own = [part for part in map(own_part, tensors) if part.device == place]
    return sum(part.numel() * part.element_size() for part in own)


def optimizer_bytes_per_weight(
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer], *, device: torch.device
) -> float:
    """Bytes an optimizer keeps for each weight: tried out on a float32 matrix of 512 x 512.

    Raises:
        UserError: it wants more than gradients for a step, or others than there are.
    """
    weight = nn.Parameter(torch.zeros(512, 512, device=device))
    weight.grad = torch.full_like(weight, 1e-3)
    optimizer = make_optimizer([weight])
    try:
        optimizer.step()
    except (TypeError, RuntimeError) as error:
        raise UserError(
            f"--optimizer_type: {type(optimizer).__name__} can't make a plain step ({error}); choose another"
        ) from error
    kept = [value for value in _tensors(optimizer.state.get(weight, {})) if value.numel() > 1]
    return sum(value.numel() * value.element_size() for value in kept) / weight.numel()


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for each in value.values() for tensor in _tensors(each)] if isinstance(value, dict) else []
