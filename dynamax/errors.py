"""The one error that is meant for users. Every other exception is a bug, and keeps its traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something that was asked for cannot be done.

    The message names what was given, what was wanted and the remedy. The command line prints it and exits with 2.
    """
