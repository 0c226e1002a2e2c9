"""The one exception for mistakes of the person at the keyboard, and what a line says of others."""


class UserError(Exception):
    """A mistake the user can mend: one line that begins with the flag, then the path, what was found and what to do.

    Entry files print the line and exit with status 2; every other exception keeps its traceback.
    """


def first_line(error: Exception) -> str:
    """Return the first line of an error's text that says something, else the error's name."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
