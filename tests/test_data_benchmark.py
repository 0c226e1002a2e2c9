"""The data benchmark runs and measures what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/data.py", "--pictures", "0", "--originals", "2", "--batch_size", "1", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_reading_is_compared_with_plain_reading(tmp_path):
    flags = ("--samples", "10", "--rounds", "1", "--workers", "0", "2", "--folder", str(tmp_path))
    done = run(*flags, "--json", str(tmp_path / "figures.json"), "--markdown", str(tmp_path / "table.md"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert all(rate > 0 for rate in figures["pictures_taken_in_per_second"].values())
    rows = figures["reading"]
    ways = {(row["files"], row["source"], row["way"]) for row in rows}
    assert len(ways) == len(rows) == 2 * 2 * 3
    assert all(row["share"] == 1 for row in rows if row["way"] == "plain")
    assert all(row["megabytes"] == pytest.approx(4.46 * row["samples"], rel=0.02) for row in rows)
    assert (tmp_path / "table.md").read_text() in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "table.md"]


@pytest.mark.slow
def test_too_few_samples_are_refused():
    done = run("--samples", "8", "--workers", "4")
    assert done.returncode == 2
    assert "error: --samples 8: with these workers and batches at least 10 are needed" in done.stderr
