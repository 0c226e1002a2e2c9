"""Places that can't be written to are told by their flag, before anything is made there."""

import errno
from pathlib import Path

import pytest

from library.errors import UserError
from library.writable import require_writable, writing


def test_a_place_to_write_is_left_as_it_was_but_for_its_folder(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "a.json", told="--json")
    assert list(tmp_path.rglob("*")) == [tmp_path / "new"]
    (tmp_path / "new" / "a.json").write_text("kept")
    require_writable(tmp_path / "new" / "a.json", told="--json")
    assert (tmp_path / "new" / "a.json").read_text() == "kept"


@pytest.mark.parametrize("name", ["", "file/a.json", f"{'long' * 64}.json"])
def test_what_cannot_be_written_is_told_by_its_flag(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--json FILE: can't be written to \([A-Z].*\); make room, or choose"):
        require_writable(tmp_path / name, told="--json FILE")


def test_a_write_that_fails_is_one_line() -> None:
    with (
        pytest.raises(UserError, match="^--json FILE: can't be written to .No space left on device.; hurry$"),
        writing("--json FILE", remedy="hurry"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
