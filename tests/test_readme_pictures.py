"""scripts/readme_pictures.py: the README's contact sheet is of the shipped weights, and one command makes it."""

import json
import sys
from pathlib import Path

from PIL import Image
from tiny_model import tiny_model

from dataset.synthetic import GENERATOR_VERSION
from library.fingerprint import fingerprints
from library.weight_paths import embedded_files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import readme_pictures  # noqa: E402

SHEET = ROOT / "assets" / "readme" / "contact_sheet.webp"


def test_the_sheet_is_of_the_shipped_weights_and_shows_the_first_eight_scenes():
    told = json.loads(SHEET.with_suffix(".json").read_text(encoding="utf-8"))
    now = fingerprints(embedded_files())
    assert told["weights"] == now, "run python scripts/readme_pictures.py"
    assert (told["scenes"], told["generator_version"]) == (8, GENERATOR_VERSION)
    assert SHEET.stat().st_size < 400_000
    assert SHEET.relative_to(ROOT).as_posix() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_one_command_makes_picture_and_facts(tmp_path, monkeypatch):
    folder = tiny_model()["ae"].parent
    output = tmp_path / "sheet.webp"
    words = ["--model_folder", folder, "--output", output, "--scenes", 1, "--steps", 1, "--num_threads", 1]
    monkeypatch.setattr(sys, "argv", ["readme_pictures.py", *map(str, words)])
    readme_pictures.main()
    with Image.open(output) as picture:
        assert picture.format == "WEBP" and picture.width > 900
    told = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert told["scenes"] == 1 and len(told["weights"]) == 5
