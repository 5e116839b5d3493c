"""The one error that is meant for users, and failures around us. Every other exception is a bug."""

from __future__ import annotations

import errno

OURS = ("dynamax", "callbacks")
"""Our packages: if one of them is not found, that is our fault."""
PATH_FAULTS = frozenset(
    (
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG),
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENXIO, errno.ENODEV, errno.EXDEV, errno.EBUSY, errno.ETXTBSY),
    )
)
"""What is wrong with a path, in the system's numbers."""
NO_PATH = ("Symlink loop from", "embedded null byte", "embedded null character", "Could not determine home")
"""What Python says of a path that the system is not even asked about."""
LONGEST = 160
"""Characters of a value that is shown in a message."""


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


def shown(value: object, longest: int = LONGEST) -> str:
    """A value as a message has it: on one line, and not longer than ``longest``; the middle is left out."""
    text = " ".join(str(value).split()) or repr(value)
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


def around_us(error: BaseException) -> tuple[int, str] | None:
    """Exit code and message of a failure that lies neither in us nor in what was asked; None of any other.

    It is known by its kind, whichever library raised it: a full disk, no memory, a file or folder that cannot be used,
    a package that is not installed.
    """
    reason = str(error).strip()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 1, f"The disk is full: {error}. Free some room and run the same command again."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "not enough memory" in reason:
        return 1, f"There is not enough memory: {shown(reason)}. Ask for less at a time, or give a smaller model."
    if isinstance(error, OSError) and error.errno in PATH_FAULTS and error.filename is not None:
        names = " and ".join(str(each) for each in (error.filename, error.filename2) if each is not None)
        return 2, f"{names} cannot be used: {error.strerror}. Correct the path, or move away what lies there."
    if type(error) in (RuntimeError, ValueError) and reason.startswith(NO_PATH):  # of pathlib and open
        return 2, f"A path cannot be used: {shown(reason).rstrip('.')}. Correct it."
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in OURS:
        return 2, f"A package is not installed: {shown(reason)} Install it, or do without what needs it."
    return None
