"""The one error that is meant for users. Every other exception is a bug, and keeps its traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something that was asked for cannot be done.

    The message names what was given, what was wanted and the remedy. The command line prints it and exits with 2.
    """


def at_least(owner: object, least: int, **options: int | None) -> None:
    """Check counts that an object was built with; None passes.

    Raises:
        UserError: If one is below ``least``.
    """
    for name, value in options.items():
        if value is not None and value < least:
            raise UserError(f"{type(owner).__name__} was given {name}={value}; wanted {least} or more.")
