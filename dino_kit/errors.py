"""The exceptions a user is meant to see."""

from __future__ import annotations


class UserError(Exception):
    """A fault of the input (a flag, a file, a folder), told in one sentence.

    The command line prints the sentence without a traceback and ends with status 2; from Python
    it is an ordinary exception.
    """


class NoSelfAttention(UserError, AttributeError):
    """Attention was asked of a backbone that has none among all of its tokens.

    For Python it is a missing attribute, as ``hasattr`` is to be false.
    """


class ToldByMain(UserError):
    """What the main process of several finds, on the others: it tells it, and they end as it does."""


class RunFailed(Exception):
    """A run that began well and had to stop, told in one sentence; the command ends with status 1."""


class Interrupted(Exception):
    """A signal ended a run, whose last step was saved; the command ends with 128 + its number."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that there is no more memory, of the host or of a GPU."""
    # PyTorch has a class of its own for a GPU's memory, and only messages for the host's; the last
    # two are oneDNN's.
    signs = ("MemoryError", "OutOfMemory", "can't allocate memory", "bad_alloc",
             "could not create a primitive", "could not create a memory", "can't start new thread")  # fmt: skip
    told = f"{type(error).__name__} {error}"
    return any(sign in told for sign in signs)


class BadImage(UserError):
    """One image cannot be used; a run may go on without it."""
