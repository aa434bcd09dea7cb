"""What is wrong with the user's data."""

from thinwire.errors import UserError


class DataError(UserError):
    """The user's data cannot be used; the message is one line, with the file and the line where it can."""


class NoRowsLeft(DataError):
    """All rows of a set were left out: none fits. `group`: which set it is, of several."""

    group: int = 0
