"""The flags of `inference.py`: those of the released task commands, and ours."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.args import ModelArgs, NoEffect, flag
from library.errors import UserError
from library.images import DEPTH_KINDS
from library.tasks import TASKS

INPUT_FLAGS = {"rgb": "input_image", "depth": "input_depth"}
"""Which flag brings a given modality."""


@dataclass(frozen=True, kw_only=True)
class TaskArgs(ModelArgs):
    """Task and inputs."""

    gen_type: str = flag(help="what to make of what", choices=tuple(TASKS))
    text_prompt: str | None = flag(None, help="what the picture shows; depth estimation works without", metavar="TEXT")
    input_image: Path | None = flag(None, help="picture whose depth is estimated: any mode and size", metavar="FILE")
    input_depth: Path | None = flag(
        None, help="depth map a picture is made for: .npy, 8- or 16-bit grey picture, float TIFF, .exr", metavar="FILE"
    )
    depth_kind: str = flag(
        "disparity", help="what --input_depth holds: disparity (near = large) or depth (distances)", choices=DEPTH_KINDS
    )
    condition_noise: float = flag(
        0.0, help="noise level the given picture or map is held at: 0 is followed exactly, nearer 1 more loosely",
        minimum=0, below=1,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SamplingArgs(ModelArgs):
    """Sampling."""

    output_resolution: tuple[int, int] | None = flag(
        None, help="width and height of the results (default: the input's; without input the model's own size)",
        metavar=("W", "H"), minimum=1,
    )  # fmt: skip
    processing_resolution: int | None = flag(
        None, help="short side in pixels the model works at for a given input, results are resized back; 0 is the "
        "input's own size (default: the size the model was trained at, or --output_resolution)", minimum=0,
    )  # fmt: skip
    seed: tuple[int, ...] = flag((42,), help="one result for each; the same seed gives the same result", minimum=0)
    steps: int | None = flag(None, help="denoising steps (default: 20; 4 for schnell)", minimum=1)
    guidance_scale: float | None = flag(
        None, help="guidance embedding, for models that have one (default: 3.5)", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class OutputArgs(ModelArgs):
    """Results."""

    output_dir: Path = flag(Path("outputs"), help="results go to its subfolder named after the task", metavar="FOLDER")
    output_name: str | None = flag(
        None, help="what the files' names begin with (default: the input's name or the prompt)"
    )


@dataclass(frozen=True, kw_only=True)
class InferenceArgs(OutputArgs, SamplingArgs, TaskArgs):
    """All flags of `inference.py`."""

    no_effect: ClassVar = {
        "save_precision": NoEffect(reason="inference saves no weights"),
        "highvram": NoEffect(reason="what is needed stays on the device anyway", values=0),
        "lowvram": NoEffect(reason="use --blocks_to_swap to save GPU memory", values=0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_inputs()
        self._check_seeds()
        if self.output_name is not None and (not self.output_name or Path(self.output_name).name != self.output_name):
            raise UserError(f"--output_name {self.output_name!r}: must be a plain name; folders go to --output_dir")

    def _check_inputs(self) -> None:
        """Check that the task has what it needs, and nothing that it would leave unread."""
        task = TASKS[self.gen_type]
        for modality, name in INPUT_FLAGS.items():
            path = getattr(self, name)
            if modality == task.given and path is None:
                raise UserError(f"--{name}: must be given for --gen_type {task.name}")
            if modality != task.given and path is not None:
                raise UserError(f"--{name} {path}: --gen_type {task.name} doesn't use it; leave it away")
        if task.prompt_needed and not (self.text_prompt or "").strip():
            raise UserError(f"--text_prompt: must be given for --gen_type {task.name}, as a text in quotes")
        if task.given is None and self.condition_noise:
            raise UserError(
                f"--condition_noise {self.condition_noise}: --gen_type {task.name} is given nothing to hold"
            )
        if self.depth_kind != "disparity" and self.input_depth is None:
            raise UserError(f"--depth_kind {self.depth_kind}: says what --input_depth holds; leave it away")
        if task.given is None and self.processing_resolution is not None:
            raise UserError(
                f"--processing_resolution {self.processing_resolution}: --gen_type {task.name} has no input; "
                "--output_resolution sets the size"
            )

    def _check_seeds(self) -> None:
        twice = next((seed for seed in self.seed if self.seed.count(seed) > 1), None)
        if twice is not None:
            raise UserError(
                f"--seed {' '.join(map(str, self.seed))}: {twice} is there twice and would give the same again"
            )
        if max(self.seed) >= 2**63:
            raise UserError(f"--seed {max(self.seed)}: must be below 2^63")

    @property
    def given_path(self) -> Path | None:
        """The file of the given modality, if the task has one."""
        given = TASKS[self.gen_type].given
        return None if given is None else getattr(self, INPUT_FLAGS[given])
