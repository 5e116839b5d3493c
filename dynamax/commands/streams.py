"""What a command does with stdin, stdout and stderr, whatever they are. Knows nothing of commands."""

from __future__ import annotations

import os
import sys
from typing import TextIO

STREAMS = ("stdin", "stdout", "stderr")
"""In the order of their descriptors."""


def prepare_streams() -> None:
    """Make every stream one that can be used.

    A closed one (``>&-``) becomes ``/dev/null``: otherwise the next file that is opened would take its place. What an
    encoding such as ASCII has no room for is written with backslashes.
    """
    for descriptor, name in enumerate(STREAMS):
        if getattr(sys, name) is None:
            setattr(sys, name, _nothing(descriptor))
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and getattr(stream, "errors", "") != "backslashreplace":
            reconfigure(errors="backslashreplace")


def tell(message: str) -> None:
    """Write a line to stderr; if that cannot be written to, the exit code alone tells."""
    try:
        print(message, file=sys.stderr, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        abandon("stderr")


def abandon(*names: str) -> None:
    """Write to a stream no more: what Python still holds would raise as it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for name in names:
        try:
            os.dup2(nowhere, getattr(sys, name).fileno())
        except (AttributeError, OSError, ValueError):  # a stream without a descriptor, such as a test's
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - as long as the process


def _nothing(descriptor: int) -> TextIO:
    mode = os.O_RDONLY if descriptor == 0 else os.O_WRONLY
    found = os.open(os.devnull, mode)
    if found != descriptor:
        os.dup2(found, descriptor)
        os.close(found)
    return open(descriptor, "r" if descriptor == 0 else "w", closefd=False)
