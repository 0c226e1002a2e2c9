"""The benchmark of a training step, on its smallest size."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from library.args import parse
from library.errors import UserError

PATH = Path(__file__).parents[1] / "benchmarks" / "train_step.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("train_step", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_step"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_step"]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(True)


def arguments(benchmark, *more: str):
    return parse(["--size", "small", "--device", "cpu", "--num_threads", "1", "--steps", "1", *more],
                 benchmark.BenchmarkArgs)  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "selective", "fused", "checkpointed+fused", "int8", "sampling"])
def test_rows_are_measured(benchmark, name):
    AcceleratorState._reset_state(True)
    row = benchmark.measure(arguments(benchmark), benchmark.ROWS[name])
    assert row["seconds"] > 0 and row["device"] == "cpu" and row["cpu_seconds"] > 0
    assert isinstance(row["bytes"], int)


def test_the_table_compares_with_the_first_row_that_ran(benchmark):
    common = {"where": "2 threads", "torch": "1", "device": "cpu"}
    results = {
        "plain": {"failed": "out of memory"},
        "fused": {"seconds": 2.0, "cpu_seconds": 4.0, "bytes": 2**30, **common},
        "int8": {"seconds": 9.0, "cpu_seconds": 2.0, "bytes": 2**29, **common},
        "checkpointed+swap": {"failed": "needs a GPU"},
    }
    text = benchmark.table(arguments(benchmark), results)
    assert "ratios to fused" in text and "| plain | - | out of memory |" in text
    assert "| int8 | `--base_precision int8` | 9.000 | 2.000 | 0.50 | 512 | 0.50 |" in text
    assert benchmark.table(arguments(benchmark), {"plain": {"failed": "x"}}) == "Nothing could be measured: plain: x"


def test_rows_for_a_gpu_say_so_without_one(benchmark):
    assert benchmark.in_fresh_process(arguments(benchmark), "checkpointed+swap") == {"failed": "needs a GPU"}


def test_a_size_that_makes_no_tokens_is_named(benchmark):
    with pytest.raises(UserError, match="--resolution 100: must be a multiple of 16"):
        arguments(benchmark, "--resolution", "100")


@pytest.mark.slow
def test_the_command(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(PATH.parents[1]))
    written = ["--json", str(tmp_path / "x.json"), "--markdown", str(tmp_path / "x.md")]
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--size", "small", "--device", "cpu", "--steps", "1",
                                      "--rows", "plain", "nf4", "checkpointed+swap", *written])  # fmt: skip
    benchmark.main()
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert rows["plain"]["seconds"] > 0 and rows["checkpointed+swap"] == {"failed": "needs a GPU"}
    assert (tmp_path / "x.md").read_text() == capsys.readouterr().out
