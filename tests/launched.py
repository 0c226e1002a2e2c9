"""What `accelerate launch` tells the processes it starts, by its own code."""

from pathlib import Path

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

CONFIGURATIONS = Path(__file__).parents[1] / "scripts" / "accelerate"


def launched(config: Path, *more: str) -> dict[str, str]:
    """Return the variables that `accelerate launch --config_file config MORE train.py` sets."""
    args = launch_command_parser().parse_args(["--config_file", str(config), *more, "train.py"])
    args = _validate_launch_command(args)[0]
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        _, environment = prepare_deepspeed_cmd_env(args)
    else:
        environment = prepare_multi_gpu_env(args)
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
