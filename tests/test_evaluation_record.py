"""assets/tiny/evaluation.json: its figures are of the weights beside it."""

import json

from library.fingerprint import fingerprints
from library.weight_paths import EMBEDDED, embedded_files


def test_the_figures_are_of_the_shipped_weights():
    told = json.loads((EMBEDDED / "evaluation.json").read_text(encoding="utf-8"))
    remedy = "run python scripts/evaluate_tiny.py --scenes 256 --json assets/tiny/evaluation.json"
    assert told.get("weights") == fingerprints(embedded_files()), remedy
