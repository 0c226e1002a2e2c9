"""requirements.txt pins one tested version of everything pyproject.toml asks for, and nothing else."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
LINES = [line.strip() for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()]
PINS = [Requirement(line) for line in LINES if line and not line.startswith(("#", "-e"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
# `gpu` is pinned with the rest so that a flag that wants it finds it; the file's markers keep it to where it installs.
RANGES = {item.name: item for item in [*map(Requirement, PROJECT["dependencies"]), *EXTRAS["gpu"]]}


def test_requirements_and_pyproject_name_the_same_packages():
    assert {pin.name for pin in PINS} == set(RANGES)


@pytest.mark.parametrize("pin", PINS, ids=lambda pin: pin.name)
def test_each_requirement_is_pinned_inside_its_range(pin):
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    assert RANGES[pin.name].specifier.contains(specifier.version)
    assert str(pin.marker) == str(RANGES[pin.name].marker)


def test_requirements_end_with_this_project():
    # so that `python dataset/x.py` and `python scripts/x.py` find the packages
    assert [line for line in LINES if line][-1] == "-e ."


def test_extras():
    assert set(EXTRAS) == {"gpu", "exr", "vision", "eval", "app", "train", "deepspeed", "dev"}
    assert all(specifier.operator == "==" for item in EXTRAS["dev"] for specifier in item.specifier)


def test_the_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"]["text"] == "Apache-2.0"
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "APPENDIX" in text


def test_both_packages_are_installed_from_here():
    assert PROJECT["requires-python"] == ">=3.11"
    include = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"][
        "find"
    ]["include"]
    assert include == ["library*", "dataset*"]


@pytest.mark.parametrize(
    "script", sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"]), ids=lambda path: path.name
)
def test_shell_scripts_stop_at_the_first_error_and_run_from_anywhere(script):
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert re.search(r"^set -euo pipefail$", text, re.MULTILINE)
    assert re.search(r'^cd "\$\(dirname "\$\{BASH_SOURCE\[0\]\}"\)/\.\."$', text, re.MULTILINE)
