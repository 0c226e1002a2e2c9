"""Add-ons files and states of a training run: what is written, and how a run goes on from it."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from library.errors import UserError
from library.experiment import STEP_ADDONS, how_to_go_on, newest_state, writing
from library.flags import flag_values
from library.jointdit.addons import AddonSettings, save_addons
from library.jointdit.model import JointDiT
from library.sharding import gathered, whole
from library.training_args import PRECISIONS, DataArgs, RecipeArgs, TrainingArgs
from library.training_state import LATEST, Progress, resume_state, save_state, set_aside_later, state_path

log = logging.getLogger(__name__)

# Flags of data and recipe that may change when a run is resumed: none of them moves a weight.
_FREE = {
    "image_folder",  # its samples' names and what made its cache count, wherever they lie
    "max_data_loader_n_workers",
    "max_bad_samples",
    "trust_cache",
    "max_loss_factor",
    "prompt_folder",
    "evaluation_prompts",
    "max_train_epochs",
    "max_train_steps",
    "gradient_checkpointing",
    "checkpoint_every",
}
_ENDLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")  # the others depend on the number of steps
# Switches of the method, told in the add-ons' header beside weighting, ranks and the released settings.
SWITCHES = (
    "timestep_sampling",
    "discrete_flow_shift",
    "clean_flow_shift",
    "unbalanced_sampling",
    "text_dropout",
    "guidance_scale",
)


def make_recipe(
    args: TrainingArgs,
    *,
    names: Sequence[str],
    processes: int,
    total: int,
    precision: str,
    base: str | None,
    encodes_text: bool = False,
    text_precision: torch.dtype | None = None,
    encoders: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What must be the same when a run is resumed, by the name of the flag that decides it.

    With `encodes_text` the flags of the text encoders count too; otherwise the cache has been compared with them. Of
    the device they are on only the precision that comes with it counts, as of `--device`: bfloat16 and float32 move the
    weights apart, where the same numbers are added up in another order moves last bits. `encoders` are fingerprints of
    what made, or makes, latents and text features, and of their cache.
    """
    deciding = {item.name for group in (DataArgs, RecipeArgs) for item in fields(group)} - _FREE
    deciding |= {"base_precision", "shard_model", "shard_optimizer"}
    if encodes_text:
        deciding |= {"clip_activation", "t5xxl_max_token_length"}
    recipe = {name: value for name, value in flag_values(args).items() if name in deciding}
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:8]
    recipe |= {
        "image_folder": f"({len(names)} pairs, names {digest})",
        "num_processes": processes,
        "mixed_precision": precision,
        "pretrained_model_name_or_path": f"(fingerprint {base})",
    }
    recipe |= {name: f"(fingerprint {value})" for name, value in (encoders or {}).items()}
    if text_precision is not None:
        recipe["text_encoder_device"] = f"(text encoded in {text_precision})".replace("torch.", "")
    return recipe if args.lr_scheduler in _ENDLESS_SCHEDULES else recipe | {"max_train_steps": total}


class Checkpoints:
    """Writes from the main process, while the others wait; reads on all."""

    def __init__(
        self,
        args: TrainingArgs,
        *,
        accelerator: Accelerator,
        model: JointDiT,
        settings: AddonSettings,
        progress: Progress,
        recipe: Mapping[str, Any],
        weights_to_show: Callable[[], AbstractContextManager],
    ) -> None:
        """Keep what is saved; within `weights_to_show()` the model has the weights of add-ons files."""
        self.args = args
        self.folder = args.experiment
        self.accelerator = accelerator
        self.model = model
        self.settings = settings
        self.progress = progress
        self.recipe = recipe
        self.weights_to_show = weights_to_show

    def resume(self, *, total: int) -> int:
        """Go on from `--resume`, if it is given and there is a state; return the step, of `total`.

        Raises:
            UserError: no state is whole or of this recipe, the processes see different ones, or it is past the end.
        """
        if self.args.resume is None:
            return 0
        step = resume_state(self.args.resume, self.progress, experiment=self.folder, recipe=self.recipe)
        steps = self.accelerator.gather(torch.tensor([step], device=self.accelerator.device))
        if int(steps.min()) != int(steps.max()):
            raise UserError(
                f"--resume {self.args.resume}: the processes found states of steps {steps.tolist()}; "
                f"--output_dir {self.args.output_dir} must be one folder that all machines share"
            )
        if step > total:
            name = "max_train_epochs" if self.args.max_train_steps is None else "max_train_steps"
            raise UserError(
                f"--{name} {getattr(self.args, name)}: ends at step {total}, and --resume {self.args.resume} is at "
                f"step {step} already; ask for as many or more"
            )
        if self.accelerator.is_main_process:
            own = self.args.resume == LATEST or Path(self.args.resume).resolve().parent == self.folder.resolve()
            set_aside_later(self.folder, step if own else -1)
        return step

    def save_state(self, step: int) -> Path:
        """Write what resuming at `step` needs."""
        path = state_path(self.folder, step)
        self.require_finite(step)
        if self.accelerator.is_main_process or self.args.shard_model or self.args.shard_optimizer:
            with writing(path, experiment=self.folder):
                save_state(
                    self.folder,
                    self.progress,
                    step=step,
                    recipe=self.recipe,
                    keep=self.args.save_last_n,
                    writes=self.accelerator.is_main_process,
                )
        self.accelerator.wait_for_everyone()
        return path

    def save_addons(self, name: str, step: int) -> Path:
        """Write an add-ons file of this name, with its JSON."""
        path = self.folder / f"{name}.safetensors"
        self.require_finite(step)
        main = self.accelerator.is_main_process
        with self.weights_to_show():
            tensors = gathered(self.progress.parameters, keep=main)
            if main:
                with writing(path, experiment=self.folder):
                    save_addons(
                        path,
                        self.model,
                        settings=self.settings,
                        dtype=PRECISIONS[self.args.save_precision],
                        extra={"recipe": {name: getattr(self.args, name) for name in SWITCHES}},
                        tensors=tensors,
                    )
        self.accelerator.wait_for_everyone()
        return path

    def save_step_addons(self, step: int) -> None:
        """Write the add-ons of a step, and delete those of earlier steps that `--save_last_n_addons` doesn't keep."""
        self.save_addons(f"{STEP_ADDONS}{step:06d}", step)
        if self.accelerator.is_main_process and self.args.save_last_n_addons is not None:
            files = {
                int(path.stem.removeprefix(STEP_ADDONS)): path for path in self.folder.glob(f"{STEP_ADDONS}*.json")
            }
            for _, side_car in sorted(item for item in files.items() if item[0] <= step)[
                : -self.args.save_last_n_addons
            ]:
                side_car.with_suffix(".safetensors").unlink(missing_ok=True)
                side_car.unlink()

    def require_finite(self, step: int) -> None:
        """Refuse to save weights that are broken: the newest state shall be a good one."""
        for name, parameter in self.progress.parameters.items():
            if not whole(torch.isfinite(parameter).all()):
                raise UserError(
                    f"--learning_rate {self.args.learning_rate}: after step {step} {name} isn't finite any more; "
                    f"{newest_state(self.folder)}; lower the rate, and {how_to_go_on(self.folder)}"
                )
