"""The error of a run that can't go on for a reason outside it."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run can't go on for a reason that is outside it: a full disk, a lost peer, a loss that stays NaN.

    The launch scripts print it in one line and end with status 1.
    """
