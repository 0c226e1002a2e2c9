"""What a configuration of `accelerate launch` asks of a run: FSDP version 2 is `--shard_model`, the rest is refused."""

import logging
import os
from collections.abc import MutableMapping
from dataclasses import replace

from library.errors import UserError
from library.flux.layers import DoubleStreamBlock, SingleStreamBlock
from library.training_args import TrainingArgs

log = logging.getLogger(__name__)

USE_FSDP = "ACCELERATE_USE_FSDP"  # what the launcher sets to "true" for `distributed_type: FSDP`
EXAMPLE = "scripts/accelerate/fsdp2.yaml"
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
_BLOCKS = ",".join(sorted(block.__name__ for block in (DoubleStreamBlock, SingleStreamBlock)))
# The settings of `fsdp_config`, what they may be, and why not otherwise. What isn't here has no meaning in version 2
# (sync_module_states), or none without a setting that is refused (min_num_params).
_SETTINGS = {
    "version": (("2",), "version 1 is another mechanism"),
    "reshard_after_forward": (("true", "false"), "version 2 knows no others"),
    "activation_checkpointing": (("true", "false"), "there are no others"),
    "activation_checkpointing_offload": (("false",), "activations stay on the device"),
    "offload_params": (("false",), "weights stay on the devices"),
    "cpu_ram_efficient_loading": (("false",), "every process reads the weights itself"),
    "state_dict_type": (("FULL_STATE_DICT",), "files hold whole tensors"),
    "auto_wrap_policy": (("TRANSFORMER_BASED_WRAP",), "the transformer's blocks are put together one at a time"),
    "transformer_layer_cls_to_wrap": ((_BLOCKS,), "these are the transformer's blocks"),
    "sharding_strategy": (("FULL_SHARD",), "it belongs to version 1; use fsdp_reshard_after_forward"),
    "backward_prefetch": (("BACKWARD_PRE",), "version 2 always does this"),
    "forward_prefetch": (("false",), "version 2 doesn't do it"),
    "use_orig_params": (("true",), "version 2 always does this"),
    "ignored_modules": ((), "every weight is shared"),
}


def as_launched(args: TrainingArgs, environment: MutableMapping[str, str] = os.environ) -> TrainingArgs:
    """Return the flags with what the launcher's configuration adds, and take its FSDP away from accelerate.

    Left in the `environment`, it would let accelerate share out the model once more, in its own way.

    Raises:
        UserError: the configuration asks for what isn't done here.
    """
    for variable, name in _REFUSED.items():
        if environment.get(variable, "false").lower() == "true":
            raise UserError(
                f"--config_file: accelerate's {name} saves and resumes in its own way; use FSDP version 2 ({EXAMPLE})"
            )
    if environment.get(USE_FSDP, "false").lower() != "true":
        return args
    given = {name: _setting(name, environment) for name in _SETTINGS}
    environment.pop(USE_FSDP)
    log.info("--config_file: FSDP version 2, which is --shard_model")
    return replace(
        args,
        shard_model=True,
        reshard_after_forward=args.reshard_after_forward and given["reshard_after_forward"] != "false",
        gradient_checkpointing=args.gradient_checkpointing or given["activation_checkpointing"] == "true",
    )


def _setting(name: str, environment: MutableMapping[str, str]) -> str:
    """Return a setting in the spelling of the table, or nothing if it isn't given (version 1 then)."""
    allowed, reason = _SETTINGS[name]
    # The launcher shortens this one name, and writes booleans in either case.
    value = environment.get(f"FSDP_{name.replace('_layer_', '_').upper()}", "1" if name == "version" else "")
    value = ",".join(sorted(word.strip() for word in value.split(",")))
    if value.lower() in ("", "none"):
        return ""
    for each in allowed:
        if value.lower() == each.lower():
            return each
    advice = f"set it to {' or '.join(allowed)}" if allowed else "leave it away"
    raise UserError(f"--config_file: fsdp_{name} {value}: {reason}; {advice}, as in {EXAMPLE}")
