"""Which weights a command uses: all flags, none, or an error that names what is missing."""

import logging
from pathlib import Path

import pytest

from library import weight_paths
from library.args import ModelArgs
from library.errors import UserError

FILES = {
    "pretrained_model_name_or_path": "flux1-tiny.safetensors",
    "clip_l": "clip_l.safetensors",
    "t5xxl": "t5xxl_fp16.safetensors",
    "ae": "ae.safetensors",
    "jointdit_addons_path": "jointdit_addons.safetensors",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES.values():
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def _flags(folder: Path) -> dict[str, Path]:
    return {flag: folder / name for flag, name in FILES.items()}


def test_no_weight_flag_means_the_embedded_model_and_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weight_paths, "EMBEDDED", folder)
    with caplog.at_level(logging.INFO):
        paths = weight_paths.weight_paths(ModelArgs())
    assert {name: getattr(paths, name) for name in FILES} == _flags(folder)
    assert [record.message for record in caplog.records] == [f"No weight flags: using the embedded model in {folder}"]
    (folder / "ae.safetensors").unlink()
    with pytest.raises(UserError, match="ae.safetensors missing"):
        weight_paths.weight_paths(ModelArgs())


def test_add_ons_alone_go_with_the_embedded_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weight_paths, "EMBEDDED", folder)
    (folder / "mine.safetensors").write_bytes(b"y")
    with caplog.at_level(logging.INFO):
        paths = weight_paths.weight_paths(ModelArgs(jointdit_addons_path=folder / "mine.safetensors"))
    expected = _flags(folder) | {"jointdit_addons_path": folder / "mine.safetensors"}
    assert {name: getattr(paths, name) for name in FILES} == expected
    assert caplog.messages == [f"No other weight flags: using the embedded model in {folder}"]


def test_a_set_with_holes_names_what_is_missing(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        weight_paths.weight_paths(ModelArgs(clip_l=folder / "clip_l.safetensors", ae=folder / "ae.safetensors"))
    assert str(caught.value).startswith(
        "--pretrained_model_name_or_path, --t5xxl, --jointdit_addons_path: must be given too, since --clip_l is"
    )
    with pytest.raises(UserError, match="^--t5_tokenizer x: goes with weights of its own"):
        weight_paths.weight_paths(ModelArgs(t5_tokenizer=Path("x")))


@pytest.mark.parametrize("flag", [flag for flag in FILES if flag != "jointdit_addons_path"])
def test_missing_files_are_named(folder: Path, flag: str) -> None:
    with pytest.raises(UserError, match=f"^--{flag} nowhere: no such file or folder"):
        weight_paths.weight_paths(ModelArgs(**{**_flags(folder), flag: Path("nowhere")}))


def test_add_ons_are_found_under_both_names_and_in_a_folder(folder: Path) -> None:
    there, other = folder / "jointdit_addons.safetensors", folder / "jointdit.safetensors"
    assert (
        weight_paths.find_addons(there) == weight_paths.find_addons(other) == weight_paths.find_addons(folder) == there
    )
    there.rename(other)
    assert weight_paths.find_addons(there) == weight_paths.find_addons(folder) == other
    with pytest.raises(UserError, match=r"^--jointdit_addons_path .*mine.safetensors: no such file \(looked for mine"):
        weight_paths.find_addons(folder / "mine.safetensors")


def test_a_folder_or_add_ons_of_another_flag_are_told_by_it(folder: Path) -> None:
    assert weight_paths.embedded_files(("ae",), folder=folder) == {"ae": folder / "ae.safetensors"}
    with pytest.raises(UserError, match="^--base nowhere: ae.safetensors missing; it must hold a model"):
        weight_paths.embedded_files(("ae",), folder=Path("nowhere"), flag="base")
    with pytest.raises(UserError, match="^--judge nowhere: no such file"):
        weight_paths.find_addons(Path("nowhere"), flag="judge")
