"""Reading and writing files: lines of text."""

import pytest

from library.files import read_lines


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_lines_are_those_that_say_something(tmp_path, encoding):
    path = tmp_path / "lines.txt"
    path.write_bytes("größe\r\n\n \t\n  two words \nlast".encode(encoding))
    assert read_lines(path) == ("größe", "two words", "last")
    path.write_bytes("\n \n".encode(encoding))
    assert read_lines(path) == ()
