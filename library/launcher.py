"""What a configuration of `accelerate launch` asks of a run: `--shard_model`, `--shard_optimizer`, or it is refused."""

import logging
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import replace

from library.errors import UserError
from library.flux.layers import DoubleStreamBlock, SingleStreamBlock
from library.training_args import TrainingArgs

log = logging.getLogger(__name__)

# What the launcher sets to "true" for `distributed_type: FSDP` and the others.
USE_FSDP = "ACCELERATE_USE_FSDP"
USE_DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
_REFUSED = {"ACCELERATE_USE_MEGATRON_LM": "Megatron-LM", "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config"}
_FOLDER = "scripts/accelerate"
_BLOCKS = ",".join(sorted(block.__name__ for block in (DoubleStreamBlock, SingleStreamBlock)))
# Settings by their names in `fsdp_config`: the launcher's variable, what it may be, and why not otherwise. What isn't
# here has no meaning in version 2 (sync_module_states), or none without a setting that is refused (min_num_params).
_FSDP = {
    "fsdp_version": ("FSDP_VERSION", ("2",), "version 1 is another mechanism"),
    "fsdp_reshard_after_forward": ("FSDP_RESHARD_AFTER_FORWARD", ("true", "false"), "version 2 knows no others"),
    "fsdp_activation_checkpointing": ("FSDP_ACTIVATION_CHECKPOINTING", ("true", "false"), "there are no others"),
    "fsdp_activation_checkpointing_offload": (
        "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD", ("false",), "activations stay on the device",
    ),
    "fsdp_offload_params": ("FSDP_OFFLOAD_PARAMS", ("false",), "weights stay on the devices"),
    "fsdp_cpu_ram_efficient_loading": (
        "FSDP_CPU_RAM_EFFICIENT_LOADING", ("false",), "every process reads the weights itself",
    ),
    "fsdp_state_dict_type": ("FSDP_STATE_DICT_TYPE", ("FULL_STATE_DICT",), "files hold whole tensors"),
    "fsdp_auto_wrap_policy": (
        "FSDP_AUTO_WRAP_POLICY", ("TRANSFORMER_BASED_WRAP",), "the transformer's blocks are put together one at a time",
    ),
    "fsdp_transformer_layer_cls_to_wrap": (
        "FSDP_TRANSFORMER_CLS_TO_WRAP", (_BLOCKS,), "these are the transformer's blocks",
    ),
    "fsdp_sharding_strategy": (
        "FSDP_SHARDING_STRATEGY", ("FULL_SHARD",), "it belongs to version 1; use fsdp_reshard_after_forward",
    ),
    "fsdp_backward_prefetch": ("FSDP_BACKWARD_PREFETCH", ("BACKWARD_PRE",), "version 2 always does this"),
    "fsdp_forward_prefetch": ("FSDP_FORWARD_PREFETCH", ("false",), "version 2 doesn't do it"),
    "fsdp_use_orig_params": ("FSDP_USE_ORIG_PARAMS", ("true",), "version 2 always does this"),
    "fsdp_ignored_modules": ("FSDP_IGNORED_MODULES", (), "every weight is shared"),
}  # fmt: skip
_DEEPSPEED = {
    "zero_stage": ("ACCELERATE_DEEPSPEED_ZERO_STAGE", ("2",), f"to share the weights too, use {_FOLDER}/fsdp2.yaml"),
    "offload_optimizer_device": (
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", ("none",), "the optimizer's state stays on the devices",
    ),
    "offload_param_device": (
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", ("none",), "weights stay on the devices",
    ),
    "zero3_init_flag": ("ACCELERATE_DEEPSPEED_ZERO3_INIT", ("false",), "it belongs to stage 3"),
    "zero3_save_16bit_model": ("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", ("false",), "it belongs to stage 3"),
    "deepspeed_config_file": ("ACCELERATE_DEEPSPEED_CONFIG_FILE", (), "train.py's flags say the rest"),
    "deepspeed_moe_layer_cls_names": ("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES", (), "there are no such layers"),
    "gradient_accumulation_steps": (
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", ("auto",), "--gradient_accumulation_steps of train.py says it",
    ),
    "gradient_clipping": ("ACCELERATE_GRADIENT_CLIPPING", ("auto",), "--max_grad_norm of train.py says it"),
}  # fmt: skip
_Settings = Mapping[str, tuple[str, tuple[str, ...], str]]


def as_launched(args: TrainingArgs, environment: MutableMapping[str, str] = os.environ) -> TrainingArgs:
    """Return the flags with what the launcher's configuration adds, and take FSDP and DeepSpeed away from accelerate.

    Left in the `environment`, they would let accelerate share things out once more, in its own way.

    Raises:
        UserError: the configuration asks for what isn't done here.
    """
    for variable, name in _REFUSED.items():
        if environment.get(variable, "false").lower() == "true":
            raise UserError(f"--config_file: {name} isn't done here; use FSDP version 2 ({_FOLDER}/fsdp2.yaml)")
    if environment.get(USE_FSDP, "false").lower() == "true":
        environment.setdefault("FSDP_VERSION", "1")  # as accelerate reads it
        given = _read(_FSDP, environment, example="fsdp2.yaml")
        environment.pop(USE_FSDP)
        log.info("--config_file: FSDP version 2, which is --shard_model")
        return replace(
            args,
            shard_model=True,
            reshard_after_forward=args.reshard_after_forward and given["fsdp_reshard_after_forward"] != "false",
            gradient_checkpointing=args.gradient_checkpointing or given["fsdp_activation_checkpointing"] == "true",
        )
    if environment.get(USE_DEEPSPEED, "false").lower() == "true":
        _read(_DEEPSPEED, environment, example="deepspeed_zero2.yaml")
        environment.pop(USE_DEEPSPEED)
        environment.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # accelerate reads "auto" as a number
        log.info("--config_file: DeepSpeed's ZeRO stage 2, which is --shard_optimizer")
        return replace(args, shard_optimizer=True)
    return args


def _read(settings: _Settings, environment: Mapping[str, str], *, example: str) -> dict[str, str]:
    """Return the settings in the spelling of their table, or nothing for those that aren't given."""
    given = {}
    for name, (variable, allowed, reason) in settings.items():
        value = ",".join(sorted(word.strip() for word in environment.get(variable, "").split(",")))
        found = [each for each in allowed if each.lower() == value.lower()]  # the launcher changes the case of some
        if not found and value.lower() not in ("", "none"):
            advice = f"set it to {' or '.join(allowed)}" if allowed else "leave it away"
            raise UserError(f"--config_file: {name} {value}: {reason}; {advice}, as in {_FOLDER}/{example}")
        given[name] = found[0] if found else ""
    return given
