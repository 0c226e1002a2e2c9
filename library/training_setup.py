"""From flags to the parts of a training run: accelerator, and the model on its device."""

import logging

import torch
from accelerate import Accelerator

from library.checkpointing import checkpoint_blocks
from library.cli import process_count
from library.errors import UserError
from library.flux.attention import KERNELS
from library.jointdit.addons import (
    AddonSettings,
    base_fingerprint,
    load_jointdit,
    new_jointdit,
    read_settings,
    trainable_parameters,
)
from library.jointdit.model import JointDiT
from library.memory import clamp_swap, place
from library.randomness import generator_for
from library.training_args import TrainingArgs
from library.weight_paths import find_addons, frozen_paths

log = logging.getLogger(__name__)

_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_accelerator(args: TrainingArgs) -> Accelerator:
    """Start accelerate with the precision of the flags, or else of the launcher.

    Raises:
        UserError: fewer processes work together than were launched.
    """
    device = args.torch_device()
    precision = "bf16" if args.full_bf16 else args.mixed_precision
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
    if accelerator.num_processes < process_count():
        raise UserError(
            f"--num_processes {process_count()}: only {accelerator.num_processes} of them work together; on a CPU use "
            "ACCELERATE_USE_CPU=true python -m torch.distributed.run --nproc_per_node N train.py ..."
        )
    return accelerator


def base_dtype(accelerator: Accelerator) -> torch.dtype:
    """Type of the frozen weights: that of the computation, since autocast would convert them anyway, at every use."""
    return _DTYPES[accelerator.mixed_precision]


def load_trainable(args: TrainingArgs, accelerator: Accelerator) -> tuple[JointDiT, AddonSettings]:
    """Load the frozen base with fresh or given add-ons, put it on the device, and say what its add-ons are.

    The trained weights are float32 whatever the precision of the computation: bfloat16 would lose most small steps.

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
    for _, parameter in trainable_parameters(model):
        parameter.data = parameter.data.float()
    _place(model, args, accelerator)
    return model, settings


def _place(model: JointDiT, args: TrainingArgs, accelerator: Accelerator) -> None:
    """Choose the attention, move the model to the device, wrap its blocks."""
    device = accelerator.device
    fast_on_cpu = device.type == "cpu" and accelerator.mixed_precision == "bf16"
    model.kernel = KERNELS["xformers" if args.xformers else "matmul" if fast_on_cpu else "sdpa"]
    blocks = [*model.double_blocks, *model.single_blocks]
    place(
        model,
        blocks=blocks,
        device=device,
        swap=clamp_swap(args.blocks_to_swap, available=len(blocks), device=device),
    )
    if args.compile:
        for block in blocks:
            block.compile(dynamic=False)  # in place: names and the list of blocks stay as they are
    if args.gradient_checkpointing:
        checkpoint_blocks(blocks)


def _check_settings(found: AddonSettings, wanted: AddonSettings) -> None:
    for name in ("depth_transform", "is_txt_ids_training", "is_attnmask_training", "weighting"):
        if getattr(found, name) != getattr(wanted, name):
            raise UserError(
                f"--{name} {getattr(wanted, name)}: the add-ons of --jointdit_addons_path were trained with "
                f"{getattr(found, name)}; use the same"
            )
