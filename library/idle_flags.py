"""Flags of `train.py` that were given but change nothing beside the others: each is warned about by name."""

from collections.abc import Callable
from dataclasses import dataclass

from library.flags import given
from library.training_args import TrainingArgs


@dataclass(frozen=True, kw_only=True, slots=True)
class Idle:
    """Flags that change nothing when `when` holds, and why."""

    names: tuple[str, ...]
    when: Callable[[TrainingArgs], bool]
    why: str


def _no_previews(args: TrainingArgs) -> bool:
    return not (args.sample_at_first or args.sample_every_n_steps or args.sample_every_n_epochs)


_IDLE = (
    Idle(
        names=("max_train_epochs",),
        when=lambda args: args.max_train_steps is not None,
        why="--max_train_steps says how long to train",
    ),
    Idle(
        names=("clean_flow_shift",),
        when=lambda args: not args.unbalanced_sampling,
        why="--no_unbalanced_sampling draws both noise levels from one density",
    ),
    Idle(
        names=("prompt_folder", "trust_cache"),
        when=lambda args: not args.is_latent_training,
        why="nothing cached is read without --is_latent_training",
    ),
    Idle(
        names=("save_last_n_addons",),
        when=lambda args: args.save_every_n_steps is None and args.save_every_n_epochs is None,
        why="no add-ons are saved between; give --save_every_n_steps",
    ),
    Idle(
        names=("val_samples",), when=lambda args: args.val_every_n_steps is None, why="give --val_every_n_steps with it"
    ),
    Idle(
        names=("validation_folder",),
        when=lambda args: args.val_every_n_steps is None and _no_previews(args),
        why="give --val_every_n_steps or --sample_every_n_steps with it",
    ),
    Idle(
        names=("evaluation_prompts", "output_resolution", "sample_steps", "sample_guidance_scale", "sample_pairs"),
        when=_no_previews,
        why="nothing is previewed; give --sample_every_n_steps",
    ),
)


def idle_flags(args: TrainingArgs, *, guided: bool) -> dict[str, str]:
    """Return why each flag that was given changes nothing; `guided`: whether the backbone has a guidance embedding."""
    idle = {name: row.why for row in _IDLE if row.when(args) for name in given(args, row.names)}
    if not guided:
        why = "this backbone has no guidance embedding"
        idle |= dict.fromkeys(given(args, ("guidance_scale", "sample_guidance_scale")), why)
    return idle
