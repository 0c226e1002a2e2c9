"""The training page: its commands are understood, its flags exist, its sums are those of the full-size model."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from library.args import parse
from library.flux.variants import FluxConfig
from library.jointdit.addons import trainable_parameters
from library.jointdit.attention import WEIGHTINGS
from library.jointdit.model import JointDiT, LoraRanks
from library.training_args import TrainingArgs

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
LINES = [shlex.split(line) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
TRAINING = [words[words.index("train.py") + 1 :] for words in LINES if "train.py" in words]


def test_the_page_has_the_three_recipes():
    assert len(TRAINING) == 5 and sum("--base_precision" in words for words in TRAINING) == 1


@pytest.mark.parametrize("words", TRAINING, ids=lambda words: " ".join(words[:2]))
def test_commands_are_understood(words):
    assert parse(words, TrainingArgs).max_train_steps


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`--(\w+)", PAGE))))
def test_flags_exist(name):
    known = {item.name for item in fields(TrainingArgs)} | {"cpu"}
    assert name in known or name.removeprefix("no_") in known


@pytest.mark.parametrize("path", sorted(set(re.findall(r"scripts/[\w/.]+|benchmarks/[\w/.]+|dataset/\w+\.\w+", PAGE))))
def test_files_exist(path):
    assert (ROOT / path).exists()


def test_all_weightings_are_explained():
    explained = PAGE[PAGE.index("## Ablations") :]
    assert all(f"{name}`" in explained for name in WEIGHTINGS)


def test_sums_of_memory():
    with torch.device("meta"):
        model = JointDiT(FluxConfig(), ranks=LoraRanks())
    trained = sum(parameter.numel() for _, parameter in trainable_parameters(model))
    largest = max(parameter.numel() for _, parameter in trainable_parameters(model))
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    adafactor = sum(4 * sum(parameter.shape) for _, parameter in trainable_parameters(model))
    sums = {
        "plain AdamW takes": 2 * frozen + 16 * trained,
        "recipe above": 2 * frozen + 2 * trained + 2 * largest + adafactor,
        "optimizer, schedule, running average. A state of FLUX.1-dev with AdamW takes": 12 * trained,
        "an add-ons file takes": 2 * trained,
    }
    plain = sums["plain AdamW takes"]
    sums |= {"AdamW holds": plain, "by DDP,": 2 * frozen + 4 * trained + 16 * trained / 4, "by ZeRO 2 and": plain / 4}
    text = " ".join(PAGE.split())
    for words, size in sums.items():
        assert f"{words} {size / 1e9:.1f} GB" in text


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_launcher_configurations_are_read(path):
    from accelerate.commands.config.config_args import ClusterConfig

    config = ClusterConfig.from_yaml_file(yaml_file=path)
    assert set(yaml.safe_load(path.read_text())) - set(vars(config)) == {"dynamo_backend"}  # read into dynamo_config
    assert not config.dynamo_config and not config.use_cpu
