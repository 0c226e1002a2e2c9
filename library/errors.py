"""The one exception for mistakes of the person at the keyboard."""


class UserError(Exception):
    """A mistake the user can mend: one line that begins with the flag, then the path, what was found and what to do.

    Entry files print the line and exit with status 2; every other exception keeps its traceback.
    """
