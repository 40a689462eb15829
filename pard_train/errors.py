"""Exceptions: bad input, bad rows of data, and results below their threshold; and an error in one line."""

HUNG = 124  # exit status of a rank of a run in which a rank hangs, as `timeout` has it
RESUMABLE = 75  # exit status of a training run that a signal ended, with a checkpoint (EX_TEMPFAIL of sysexits.h)


class UserError(ValueError):
    """Bad input. The message names the field or file:line, the value, what is allowed and what to do.

    Recipes print it as one line and exit with status 2; a traceback is left for our own mistakes.
    """


class RowError(UserError):
    """One bad row of data. Programs stop at it, or set the row aside and count it, as the user chooses.

    Attributes:
        origin: where the row stands, such as `chats.jsonl:17`.
        reason: what is wrong with it.
    """

    def __init__(self, origin: str, reason: str):
        super().__init__(origin, reason)
        self.origin, self.reason = origin, reason

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


class Interrupted(Exception):
    """A run that a signal ended after a step, with a checkpoint. Recipes print it and exit with status 75."""


class ThresholdError(Exception):
    """A result below what was asked of it. Recipes print one line for each miss and exit with status 3.

    Attributes:
        misses: one line each.
    """

    def __init__(self, misses: list[str]):
        super().__init__("; ".join(misses))
        self.misses = misses


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
