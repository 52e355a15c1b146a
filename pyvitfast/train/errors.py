"""What a run raises when the user, not the program, has to act."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in settings, data or files; the message says what was wrong and how to mend it."""


class Interrupted(Exception):
    """A signal ended the run after its state was saved.

    Args:
        signum: the signal; by convention the process exits with ``128 + signum``.
        message: what was saved and how to go on.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def nearest(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` with the known words next to ``word``, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
