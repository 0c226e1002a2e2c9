"""The README's commands: each is read by the real program's own parser, each script and link exists."""

import argparse
import ast
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from library import flags
from library.evaluation.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LAUNCHER_OPTIONS = {"--config_file": 1, "--mixed_precision": 1, "--num_processes": 1, "--main_process_port": 1,
                    "--num_cpu_threads_per_process": 1, "--cpu": 0}  # fmt: skip


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands_of(text):
    """Return the commands of a shell text as lists of words, comments and continuations undone."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def program_and_arguments(words):
    """Return (program, arguments) of a `python X.py ...` or `accelerate launch ... X.py ...` command, else None."""
    if words[0] == "python":
        return words[1], words[2:]
    if words[:2] != ["accelerate", "launch"]:
        return None
    rest = words[2:]
    while rest[0] in LAUNCHER_OPTIONS:
        rest = rest[1 + LAUNCHER_OPTIONS[rest[0]] :]
    return rest[0], rest[1:]


COMMANDS = [words for block in blocks("bash") for words in commands_of(block)]
PROGRAMS = [found for words in COMMANDS if (found := program_and_arguments(words))]


def launched_by(script):
    """Return the launch commands of a shell script, without what only the shell can fill in."""
    path = ROOT / "scripts" / script
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    text = re.sub(r'\$\{(\w+)\[@\]\+"\$\{\1\[@\]\}"\}|"\$@"', "", text)
    return commands_of("".join(re.findall(r"^accelerate launch (?:[^\n]*\\\n)*[^\n]*\n", text, re.MULTILINE)))


SCRIPTS = ("joint_generation.sh", "depth_estimation.sh", "depth_to_image.sh", "train.sh")
LAUNCHED = [program_and_arguments(words) for script in SCRIPTS for words in launched_by(script)]


class Parsed(Exception):
    """Carries the arguments out of a program that has just read its command line."""


def parse_with(program, arguments, monkeypatch):
    """Run a program up to where its command line is read, and return what it read."""
    path = ROOT / program
    assert path.exists(), f"{program} does not exist"
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"readme_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    real = flags.parse

    def parse_and_stop(*args, **keywords):
        raise Parsed(real(*args, **keywords))

    for each in [module, *sys.modules.values()]:
        if vars(each).get("parse") is real:  # getattr would make lazy packages import
            monkeypatch.setattr(each, "parse", parse_and_stop)
    real_argparse = argparse.ArgumentParser.parse_args

    def parse_args_and_stop(*args, **keywords):
        raise Parsed(real_argparse(*args, **keywords))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args_and_stop)  # for programs without Flags
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(Parsed) as caught:
        module.main()
    return caught.value.args[0]


@pytest.mark.parametrize(
    "program, arguments", [*PROGRAMS, *LAUNCHED], ids=lambda value: value if isinstance(value, str) else ""
)
def test_commands_are_understood(program, arguments, monkeypatch):
    assert isinstance(parse_with(program, arguments, monkeypatch), flags.Flags | argparse.Namespace)


def test_each_task_script_launches_one_program():
    assert [program for program, _ in LAUNCHED] == ["inference.py", "inference.py", "inference.py", "train.py"]


def test_there_are_commands_for_all_tasks():
    given = {arguments[arguments.index("--gen_type") + 1] for _, arguments in PROGRAMS if "--gen_type" in arguments}
    assert given == {"joint_generation", "depth_estimation", "depth_to_image"}
    assert ["bash", "scripts/demo.sh"] in COMMANDS and ["bash", "scripts/test.sh"] in COMMANDS


@pytest.mark.parametrize("words", [words for words in COMMANDS if "bash" in words], ids=" ".join)
def test_shell_scripts_exist(words):
    assert (ROOT / words[words.index("bash") + 1]).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:\]\(|src=\")((?!http)[^)\"#]+)", README))))
def test_links_and_pictures_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:library|dataset|scripts|tests|docs)/[\w/.]*)`", README))))
def test_files_named_in_the_text_exist(path):
    assert (ROOT / path).exists()


def test_input_files_of_the_commands_exist():
    named = {word for _, arguments in PROGRAMS for word in arguments if word.startswith("assets/")}
    assert named and all((ROOT / path).exists() for path in named)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_imports_work(block):
    for node in ast.parse(block).body:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_figures_are_those_measured():
    measured = json.loads((ROOT / "assets" / "tiny" / "evaluation.json").read_text(encoding="utf-8"))
    assert markdown_table(measured) in README, "run python scripts/readme_figures.py"


def test_nothing_is_left_to_fill_in():
    assert "TODO" not in README
