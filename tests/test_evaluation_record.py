"""assets/tiny/evaluation.json, docs/curves.md and docs/ablation.md: their figures are of the shipped weights."""

import json
from pathlib import Path

import pytest

from dataset.synthetic import GENERATOR_VERSION
from library.evaluation.embedded import GROUPS
from library.fingerprint import fingerprints, in_words
from library.weight_paths import EMBEDDED, embedded_files

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_figures_are_of_the_shipped_weights_and_of_the_whole_evaluation():
    told = json.loads((EMBEDDED / "evaluation.json").read_text(encoding="utf-8"))
    remedy = "run python scripts/evaluate_tiny.py --scenes 256 --json assets/tiny/evaluation.json"
    assert told["weights"] == fingerprints(embedded_files()), remedy
    whole = {"scenes": 256, "measures": list(GROUPS), "generator_version": GENERATOR_VERSION, "held_out_seed": 1000001}
    assert {name: told[name] for name in whole} == whole, remedy


@pytest.mark.parametrize("name", ["curves", "ablation"])
def test_curves_and_ablation_are_of_the_shipped_weights(name):
    remedy = f"run scripts/{name}.py as docs/embedded-model.md says, and copy its table"
    assert in_words(fingerprints(embedded_files())) in (DOCS / f"{name}.md").read_text(encoding="utf-8"), remedy
