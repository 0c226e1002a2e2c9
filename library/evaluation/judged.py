"""Several models compared: each makes its results, one judge for all of them looks at the generated pictures.

Were the depth of a generated picture estimated by the model that made it, a model that is bad at depth would look
bad at generation too. The judge also answers only once what is asked again and again: the depth of the true pictures.

Shapes: N samples, h w pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from library.evaluation.embedded import OWN_DEPTH
from library.evaluation.generation import BatchedModel
from library.flux.attention import KERNELS
from library.jointdit.addons import load_jointdit, read_settings

PRECISIONS = ("bf16", "no")  # of the transformer and the autoencoder, as in training


@dataclass(kw_only=True, slots=True)
class Judge:
    """Estimates the depth of generated pictures in `steps` steps, and remembers its last answer for each purpose."""

    model: BatchedModel
    steps: int
    precision: str = "bf16"
    _known: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.precision == "bf16" and self.model.device.type == "cpu":
            self.model.model.kernel = KERNELS["matmul"]  # the fastest there, as in training

    def estimate_depth(self, rgb_N3hw: Tensor, *, purpose: str) -> Tensor:
        """Return the disparity (N, h, w) of pictures; the noise is that of the purpose."""
        seen = self._known.get(purpose)
        if seen is None or not torch.equal(seen[0], rgb_N3hw):
            with autocast(self.model, self.precision):
                seen = rgb_N3hw, self.model.estimate_depth(rgb_N3hw, steps=self.steps, purpose=purpose)
            self._known[purpose] = seen
        return seen[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedModel:
    """What `embedded.Setting` wants of a model: the tasks by `model`, the depth of generated pictures by `judge`.

    Everything is computed in the judge's precision; results are float32.
    """

    model: BatchedModel
    judge: Judge

    def reconstruct_rgb(self, rgb_N3hw: Tensor, *, noise: float = 0.0) -> Tensor:
        """Return pictures through the autoencoder."""
        with autocast(self.model, self.judge.precision):
            return self.model.reconstruct_rgb(rgb_N3hw, noise=noise)

    def reconstruct_disparity(self, disparity_Nhw: Tensor, *, noise: float = 0.0) -> Tensor:
        """Return disparity maps through the autoencoder."""
        with autocast(self.model, self.judge.precision):
            return self.model.reconstruct_disparity(disparity_Nhw, noise=noise)

    def estimate_depth(self, rgb_N3hw: Tensor, *, steps: int, purpose: str) -> Tensor:
        """Return the disparity of pictures: the model's own only where that is what is measured."""
        if purpose != OWN_DEPTH:
            return self.judge.estimate_depth(rgb_N3hw, purpose=purpose)
        with autocast(self.model, self.judge.precision):
            return self.model.estimate_depth(rgb_N3hw, steps=steps, purpose=purpose)

    def depth_to_image(self, disparity_Nhw: Tensor, prompts: Sequence[str], *, steps: int) -> Tensor:
        """Return pictures for disparity maps and prompts."""
        with autocast(self.model, self.judge.precision):
            return self.model.depth_to_image(disparity_Nhw, prompts, steps=steps)

    def generate_jointly(self, prompts: Sequence[str], *, steps: int) -> tuple[Tensor, Tensor]:
        """Return pictures and disparity maps for prompts."""
        with autocast(self.model, self.judge.precision):
            return self.model.generate_jointly(prompts, steps=steps)


def autocast(model: BatchedModel, precision: str) -> torch.autocast:
    """Return the context that computes in bf16 ("bf16") or as the weights are ("no")."""
    return torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def with_addons(model: BatchedModel, paths: Mapping[str, Path], addons: Path) -> BatchedModel:
    """Return the model with other add-ons on the same base; all else is shared."""
    jointdit = load_jointdit(flux=paths["pretrained_model_name_or_path"], addons=addons, device=model.device)
    jointdit.kernel = model.model.kernel
    return replace(model, model=jointdit, settings=read_settings(addons))
