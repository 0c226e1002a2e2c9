"""The model in equal shares on several devices (FSDP2, Zhao et al., arXiv 2304.11277): `--shard_model`.

accelerate's configuration for FSDP version 2 means the same (`library.launcher`).

Every process holds a part of each weight, of its gradient and of the optimizer's state; a block's weights are put
together for as long as the block computes. The results are those of several processes with whole models.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from library.errors import UserError
from library.training_args import TrainingArgs


def check_sharding(args: TrainingArgs, accelerator: Accelerator) -> None:
    """Refuse by name what has no meaning for a model or an optimizer in parts, or isn't known to work.

    Raises:
        UserError: naming the flag.
    """
    if not args.shard_model and not args.reshard_after_forward:
        raise UserError("--no_reshard_after_forward: has no effect without --shard_model; give it too, or neither")
    if not args.shard_model and not args.shard_optimizer:
        return
    asking = "--shard_model" if args.shard_model else "--shard_optimizer"
    if accelerator.num_processes == 1:
        raise UserError(f"{asking}: there is only one process to share it with; start several, or leave it away")
    compiler = accelerator.state.dynamo_plugin.backend
    others = {
        f"--blocks_to_swap {args.blocks_to_swap}": args.blocks_to_swap > 0,
        f"--base_precision {args.base_precision}": args.base_precision is not None,
        f"--addons_precision {args.addons_precision}": args.addons_precision == "bf16",
        "--fused_backward_pass": args.fused_backward_pass,
        "--compile": args.compile,
        "--shard_optimizer": args.shard_model and args.shard_optimizer,
        "--mixed_precision fp16": accelerator.mixed_precision == "fp16",
        f"dynamo_backend {compiler.value}": compiler != DynamoBackend.NO,
        f"--optimizer_type {args.optimizer_type}": args.optimizer_type.lower() not in ("adamw", "adam", "sgd"),
    }
    for flag, given in others.items():
        if given:
            raise UserError(f"{flag}: doesn't go together with {asking}; leave one of them away")


def shard(
    model: nn.Module, *, blocks: Sequence[nn.Module], device: torch.device, reshard_after_forward: bool = True
) -> None:
    """Leave each process its share of the model, on `device`; blocks are put together one at a time.

    Without `reshard_after_forward` they stay whole until their backward pass, which then needs no second exchange.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # The velocities are a view; nothing changes them in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
        if not reshard_after_forward:
            block.register_forward_hook(_part_without_backward)
    # Resharding the rest too: a copy left whole would not see the running average being put in its place.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _part_without_backward(block: Any, *_: object) -> None:
    """After a forward pass that no backward pass follows (previews, validation) a block stays whole no longer.

    It would be the running average's otherwise, and train on.
    """
    if not torch.is_grad_enabled():
        block.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Put a shared tensor together, which all processes must do at the same time; others are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Put shared tensors together one by one, in CPU memory; a process that doesn't `keep` them only takes part."""
    together = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if keep:
            together[name] = value.cpu() if isinstance(tensor, DTensor) else value
    return together


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a shared tensor; others are returned as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_like(tensor: Tensor, live: Tensor) -> Tensor:
    """Share out a whole tensor as `live` is, if it is and has the same shape."""
    if not isinstance(live, DTensor) or tensor.shape != live.shape:
        return tensor
    return distribute_tensor(tensor.to(live.device), live.device_mesh, live.placements)
