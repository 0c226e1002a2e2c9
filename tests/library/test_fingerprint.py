"""Telling models apart quickly."""

from pathlib import Path

import pytest

from library import fingerprint as module
from library.fingerprint import fingerprint


@pytest.mark.parametrize("small_file", [1 << 26, 10])
def test_equal_files_and_folders_are_told_from_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_file: int
) -> None:
    monkeypatch.setattr(module, "_SMALL_FILE", small_file)
    monkeypatch.setattr(module, "_PIECE", 10)
    contents = {"a": b"1" * 100, "same": b"1" * 100, "other": b"1" * 99 + b"2", "longer": b"1" * 101}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    for path in (Path(), Path("model.safetensors")):
        found = {name: fingerprint(tmp_path / name / path) for name in contents}
        assert found["a"] == found["same"] and len(set(found.values())) == 3
