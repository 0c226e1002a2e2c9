from dataclasses import dataclass, field

import pytest
import torch

from library.evaluation.embedded import OWN_DEPTH
from library.evaluation.judged import Judge, JudgedModel

DEVICE = torch.device("cpu")


@dataclass
class Plain:
    """Answers with a number of its own, and counts how often it is asked for depth."""

    value: float
    asked: list[str] = field(default_factory=list)
    device: torch.device = DEVICE
    precision: list[bool] = field(default_factory=list)

    @property
    def model(self):
        return self

    def estimate_depth(self, rgb_N3hw, *, steps, purpose):
        self.asked.append(f"{purpose} {steps}")
        self.precision.append(torch.is_autocast_enabled("cpu"))
        return torch.full((len(rgb_N3hw), 4, 4), self.value)


def test_generated_pictures_are_looked_at_by_the_judge_and_depth_estimated_by_the_model():
    own, other = Plain(1.0), Plain(2.0)
    judged = JudgedModel(model=own, judge=Judge(model=other, steps=3))
    rgb = torch.rand(2, 3, 4, 4)
    assert judged.estimate_depth(rgb, steps=5, purpose=OWN_DEPTH).unique() == 1
    assert judged.estimate_depth(rgb, steps=5, purpose="joint again").unique() == 2
    assert own.asked == [f"{OWN_DEPTH} 5"] and other.asked == ["joint again 3"]


def test_the_judge_looks_at_the_same_pictures_once_for_each_purpose():
    other = Plain(2.0)
    judge = Judge(model=other, steps=3)
    rgb = torch.rand(2, 3, 4, 4)
    for pictures in (rgb, rgb.clone(), rgb + 1):
        judge.estimate_depth(pictures, purpose="joint true")
    judge.estimate_depth(rgb + 1, purpose="joint again")
    assert other.asked == ["joint true 3", "joint true 3", "joint again 3"]


@pytest.mark.parametrize(("precision", "lowered"), [("bf16", True), ("no", False)])
def test_all_is_computed_in_the_judges_precision(precision, lowered):
    own, other = Plain(1.0), Plain(2.0)
    judged = JudgedModel(model=own, judge=Judge(model=other, steps=3, precision=precision))
    judged.estimate_depth(torch.rand(1, 3, 4, 4), steps=1, purpose=OWN_DEPTH)
    judged.estimate_depth(torch.rand(1, 3, 4, 4), steps=1, purpose="again")
    assert own.precision == other.precision == [lowered]
