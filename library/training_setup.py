"""From flags to the parts of a training run: accelerator, and the model on its device."""

import logging
from collections.abc import Callable, Iterable, Mapping

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer

from library.checkpointing import checkpoint_blocks
from library.cli import processes_asked_for
from library.errors import UserError
from library.flux.attention import KERNELS
from library.fused_backward import WeightByWeight, steps_each_alone
from library.gradients import Gradients
from library.jointdit.addons import (
    AddonSettings,
    base_fingerprint,
    load_jointdit,
    new_jointdit,
    read_settings,
    trainable_parameters,
)
from library.jointdit.model import JointDiT, LoraRanks
from library.memory import clamp_swap, place
from library.quantize import quantize_base
from library.randomness import generator_for
from library.sharding import check_sharding, shard
from library.training_args import PRECISIONS, TrainingArgs
from library.weight_paths import find_addons, frozen_paths
from library.zero import ZeroGradients

log = logging.getLogger(__name__)

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_accelerator(args: TrainingArgs) -> Accelerator:
    """Start accelerate with the precision of the flags, or else of the launcher.

    Raises:
        UserError: fewer processes work together than were launched, or flags don't go together.
    """
    device = args.torch_device()
    precision = "bf16" if args.full_bf16 else args.mixed_precision
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # else every gradient is held twice
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu", kwargs_handlers=[views])
    if args.device not in ("auto", accelerator.device.type):
        raise UserError(
            f"--device {args.device}: accelerate's configuration computes on {accelerator.device.type}; change it, or "
            "leave the flag away"
        )
    if args.fused_backward_pass and accelerator.mixed_precision == "fp16":
        raise UserError("--fused_backward_pass: --mixed_precision fp16 scales all gradients together; use bf16")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16: computing on a CPU, where only bf16 and no are done; give one of them")
    asked = processes_asked_for()
    if accelerator.num_processes < asked:
        raise UserError(
            f"--num_processes {asked}: only {accelerator.num_processes} of them work together; on a CPU use "
            "ACCELERATE_USE_CPU=true python -m torch.distributed.run --nproc_per_node N train.py ..."
        )
    check_sharding(args, accelerator)
    return accelerator


def base_dtype(accelerator: Accelerator) -> torch.dtype:
    """Type of the frozen weights: that of the computation, since autocast would convert them anyway, at every use."""
    return _DTYPES[accelerator.mixed_precision]


def load_trainable(args: TrainingArgs, accelerator: Accelerator) -> tuple[JointDiT, AddonSettings]:
    """Load the frozen base with fresh or given add-ons, put it on the device, and say what its add-ons are.

    The trained weights are float32 unless --addons_precision says otherwise, whatever the precision of the computation.

    Raises:
        UserError: a file is missing or unfit, or given add-ons were trained in another way than the flags say.
    """
    flux = frozen_paths(args, "pretrained_model_name_or_path")
    base = flux["pretrained_model_name_or_path"]
    settings = AddonSettings(
        is_txt_ids_training=args.is_txt_ids_training,
        is_attnmask_training=args.is_attnmask_training,
        depth_transform=args.depth_transform,
        weighting=args.weighting,
        base=base_fingerprint(base),
    )
    if args.jointdit_addons_path is None:
        generator = generator_for(args.seed, "addons")
        model = new_jointdit(
            flux=base, ranks=args.ranks, weighting=args.weighting, dtype=base_dtype(accelerator), generator=generator
        )
    else:
        addons = find_addons(args.jointdit_addons_path)
        _check_settings(read_settings(addons), settings)
        model = load_jointdit(flux=base, addons=addons, dtype=base_dtype(accelerator))
        _check_ranks(args.ranks, model.ranks)
    fit(model, args, accelerator)
    return model, settings


def fit(model: JointDiT, args: TrainingArgs, accelerator: Accelerator) -> None:
    """Choose precisions and attention, move the model to the device, wrap its blocks."""
    device = accelerator.device
    for _, parameter in trainable_parameters(model):
        parameter.data = parameter.data.to(PRECISIONS[args.addons_precision])
    quantize_base(model, args.base_precision, device=device)
    fast_on_cpu = device.type == "cpu" and accelerator.mixed_precision == "bf16"
    model.kernel = KERNELS["xformers" if args.xformers else "matmul" if fast_on_cpu and not args.sdpa else "sdpa"]
    blocks = [*model.double_blocks, *model.single_blocks]
    if args.shard_model:
        shard(model, blocks=blocks, device=device, reshard_after_forward=args.reshard_after_forward)
    else:
        swap = clamp_swap(args.blocks_to_swap, available=len(blocks), device=device)
        place(model, blocks=blocks, device=device, swap=swap)
    if args.compile:
        for block in blocks:
            block.compile(dynamic=False)  # in place: names and the list of blocks stay as they are
    if args.gradient_checkpointing:
        checkpoint_blocks(blocks, every=args.checkpoint_every)


def make_weight_by_weight(
    args: TrainingArgs,
    accelerator: Accelerator,
    optimizer: Optimizer,
    weights: Mapping[str, nn.Parameter],
    *,
    new_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
) -> WeightByWeight | None:
    """Let `optimizer` step weight by weight, if `--fused_backward_pass` or `--addons_precision` ask for it.

    `new_optimizer` makes one of the same kind and arguments, to try out whether that changes anything.

    Raises:
        UserError: something else needs all gradients at once, or the computation has another precision.
    """
    narrow = args.addons_precision == "bf16"
    if not narrow and not args.fused_backward_pass:
        return None
    asking = "--fused_backward_pass" if args.fused_backward_pass else "--addons_precision bf16"
    if narrow and accelerator.mixed_precision != "bf16":
        raise UserError("--addons_precision bf16: the computation isn't in bf16; give --mixed_precision bf16 too")
    if args.fused_backward_pass and accelerator.num_processes > 1:
        raise UserError(
            f"--fused_backward_pass: {accelerator.num_processes} processes exchange gradients before the step; "
            "leave it away"
        )
    if not steps_each_alone(new_optimizer, device=accelerator.device):
        raise UserError(
            f"{asking}: --optimizer_type {args.optimizer_type} scales its steps by all weights together; "
            "leave it away, or use adamw or adafactor"
        )
    return WeightByWeight(optimizer, weights, seed=args.seed, in_backward=args.fused_backward_pass)


def make_gradients(
    args: TrainingArgs,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    weights: Mapping[str, nn.Parameter],
) -> Gradients:
    """Choose what becomes of gradients; model and optimizer are what accelerate has prepared."""
    if not args.shard_optimizer:
        return Gradients(model, accelerator=accelerator, optimizer=optimizer, weights=weights)
    return ZeroGradients(
        model,
        accelerator=accelerator,
        optimizer=optimizer,
        weights=weights,
        accumulation=args.gradient_accumulation_steps,
        max_norm=args.max_grad_norm,
    )


def _check_settings(found: AddonSettings, wanted: AddonSettings) -> None:
    for name in ("depth_transform", "is_txt_ids_training", "is_attnmask_training", "weighting"):
        if getattr(found, name) != getattr(wanted, name):
            raise UserError(
                f"--{name} {getattr(wanted, name)}: the add-ons of --jointdit_addons_path were trained with "
                f"{getattr(found, name)}; use the same"
            )


def _check_ranks(asked: LoraRanks, found: LoraRanks) -> None:
    """Refuse ranks other than those of given add-ons; the defaults may be left unsaid."""
    if asked not in (found, LoraRanks()):
        raise UserError(
            f"--lora_rank {asked.blocks} --vector_in_ranks {asked.vector_in} {asked.vector_out} --txt_in_rank "
            f"{asked.text_in}: the add-ons of --jointdit_addons_path have {found.blocks}, {found.vector_in} "
            f"{found.vector_out} and {found.text_in}; leave these flags away, or give the same"
        )
