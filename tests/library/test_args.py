"""Flags: types, checks, TOML files, unknown and ineffective flags."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from library.args import Flags, ModelArgs, NoEffect, flag, flag_values, parse
from library.errors import UserError
from library.flags import command_words


@dataclass(frozen=True, kw_only=True)
class Sample(ModelArgs):
    """Flags for the tests."""

    no_effect: ClassVar = {
        "highvram": NoEffect(values=0, reason="memory is handled by itself"),
        "optimizer_args": NoEffect(values="*", reason="there is no optimizer"),
    }

    steps: int | None = flag(None, help="steps", minimum=1)
    rate: float = flag(0.5, help="a share of 100 %", minimum=0, below=1)
    free: float | None = flag(None, help="a number without ends")
    seed: tuple[int, ...] = flag((0,), help="seeds")
    output_resolution: tuple[int, int] | None = flag(
        None, help="size", metavar=("W", "H"), minimum=1, aliases=("size",)
    )
    kind: str = flag("disparity", help="kind", choices=("disparity", "depth"))
    output: Path = flag(Path("outputs"), help="where")
    name: str | None = flag(None, help="a name")
    keep: bool = flag(True, help="keep")


@dataclass(frozen=True, kw_only=True)
class Needy(Flags):
    """One flag that must be given."""

    name: str = flag(help="a name")


def test_types_and_defaults() -> None:
    args = parse(
        "--steps 3 --rate 0.25 --seed 1 -2 3 --size 10 20 --output a/b --no_keep --ae x.safetensors --sdpa".split(),
        Sample,
    )
    assert (args.steps, args.rate, args.seed, args.output_resolution) == (3, 0.25, (1, -2, 3), (10, 20))
    assert args.output == Path("a/b") and args.ae == Path("x.safetensors") and not args.keep and args.sdpa
    assert parse([], Sample) == Sample()
    assert flag_values(args)["output"] == "a/b" and flag_values(args)["seed"] == [1, -2, 3]


def test_recorded_values_become_the_command_line_again() -> None:
    line = "--rate 0.25 --seed 1 -2 3 --size 10 20 --output a/b --no_keep --ae x.safetensors --sdpa --steps 3".split()
    args = parse([*line, "--name=--odd name"], Sample)
    words = command_words({**flag_values(args), "of_an_older_version": 1}, Sample)
    assert parse(words, Sample) == args
    assert "--xformers" not in words and command_words(flag_values(Sample()), Sample) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--steps x", "--steps: 'x' is not a whole number"),
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--rate 1", "--rate 1.0: must be below 1"),
        ("--rate nan", "--rate nan: must be a finite number"),
        ("--free inf", "--free inf: must be a finite number"),
        ("--kind disparty", "--kind disparty: must be one of disparity, depth"),
        ("--size 0 5", "--output_resolution 0: must be at least 1"),
        ("--step 3", "--step: no such flag; did you mean --steps?; --help lists them"),
        ("--steps 3 4", "'4': belongs to no flag; put texts with spaces in quotes"),
        ("--sdpa --xformers", "--xformers: --sdpa is given too; choose one kind of attention"),
        ("--steps", "--steps: expected one argument"),
        ("--output b\udcff", r"--output: 'b\udcff' is not UTF-8; type the text anew or rename the file"),
        ("--name=ä\udcff", r"--name: 'ä\udcff' is not UTF-8; type the text anew or rename the file"),
    ],
)
def test_wrong_values_are_named(line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(line.split(), Sample)
    assert str(caught.value) == message


def test_a_flag_that_must_be_given() -> None:
    with pytest.raises(UserError, match="^--name: must be given$"):
        parse([], Needy)
    assert parse(["--name", "a"], Needy).name == "a"


def test_flags_without_effect_are_warned_about_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        args = parse(
            ["--save_precision", "bf16", "--highvram", "--optimizer_args", "a=1", "b=2", "--steps", "4", "--highvram"],
            Sample,
        )
    assert args.steps == 4
    assert [record.message for record in caplog.records] == [
        "--save_precision has no effect here: nothing is saved in a precision of its own",
        "--highvram has no effect here: memory is handled by itself",
        "--optimizer_args has no effect here: there is no optimizer",
    ]


def test_config_file_and_command_line(tmp_path: Path) -> None:
    path = tmp_path / "flags.toml"
    path.write_text('steps = 7\nkeep = false\nsdpa = true\n[more]\nseed = [4, 5]\nrate = 0.75\noutput = "-odd"\n')
    args = parse(["--config_file", str(path), "--rate", "0.1", "--keep"], Sample)
    assert (args.steps, args.keep, args.sdpa, args.seed, args.rate, args.output) == (
        7,
        True,
        True,
        (4, 5),
        0.1,
        Path("-odd"),
    )


def test_a_config_file_can_turn_switches_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "flags.toml"
    for text, kept in (("keep = true", True), ("keep = false", False), ("no_keep = true", False),
                       ("no_keep = false", True)):  # fmt: skip
        path.write_text(text)
        assert parse(["--config_file", str(path)], Sample).keep is kept


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("step = 3", "step is not a flag; did you mean --steps?"),
        ("steps = ", "is not valid TOML"),
        ('steps = "x"', "--steps: 'x' is not a whole number (in --config_file"),
        ("steps = false", "steps isn't a switch; give it a value, not false"),
        ("steps = [3, 4]", "steps takes one value, not a list of 2"),
        ("sdpa = 1", "sdpa is a switch; write true or false, not 1"),
        ("steps = 3\n[more]\nsteps = 4", "steps is there twice; take it out"),
        ('config_file = "other.toml"', "config_file belongs to the command line; take it out"),
        ("note = '\udcff'", "is not valid TOML: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_config_file_errors(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "flags.toml"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError) as caught:
        parse(["--config_file", str(path)], Sample)
    assert message in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(UserError, match="^--config_file nowhere.toml: No such file"):
        parse(["--config_file", "nowhere.toml"], Sample)
    with pytest.raises(UserError, match=r"^--config_file: 'no\\udcff' is not UTF-8"):
        parse(["--config_file", "no\udcff"], Sample)


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], Sample, program="x.py")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert (
        "--output_resolution W H" in text and "100 %" in text and "(default: 0.5)" in text and "--highvram" not in text
    )


def test_precision_rules() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    released = Sample(mixed_precision="bf16", full_bf16=True)
    assert released.torch_dtype(cuda) is torch.bfloat16 and released.torch_dtype(cpu) is torch.float32
    assert Sample(device="cpu", full_bf16=True).torch_dtype(cpu) is torch.bfloat16
    assert Sample(mixed_precision="fp16").torch_dtype(cuda) is torch.float16
    assert Sample(mixed_precision="fp16", device="cpu").torch_dtype(cpu) is torch.float32
    assert Sample().torch_dtype(cuda) is torch.float32
    assert Sample(device="cpu").torch_device() == cpu
