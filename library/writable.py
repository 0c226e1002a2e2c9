"""Writing to a place that a flag names: tried before the long work, and told in one line when it fails."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from library.errors import UserError

REMEDY = "make room, or choose another place"


def require_writable(path: Path, *, told: str, remedy: str = REMEDY) -> None:
    """Find out before long work that a file can't be written; its folder is made, the file isn't touched.

    `told` is the flag with its value, such as `--output FOLDER`. Raises `UserError`.
    """
    with writing(told, remedy=remedy):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.stem}.", suffix=f".tmp{path.suffix}"):
            pass


@contextmanager
def writing(told: str, *, remedy: str = REMEDY) -> Iterator[None]:
    """Turn a failed write (disk full, no permission, a name that is too long) into one line beginning with `told`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{told}: can't be written to ({error.strerror or error}); {remedy}") from None
