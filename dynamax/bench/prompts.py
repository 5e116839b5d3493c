"""The prompts of a measurement: the user's, or a few of the questions that come with the project."""

from __future__ import annotations

import json
import random
from importlib.resources import files
from pathlib import Path

from dynamax.errors import UserError

DEFAULT = 4
"""Questions that are asked where no file is given."""


def prompts(file: Path | None, seed: int) -> list[str]:
    """The prompts.

    Args:
        file: Text with a prompt on each line; None for some of the project's own questions.
        seed: Chooses the questions.

    Raises:
        UserError: If the file cannot be read or has no prompts.
    """
    if file is None:
        lines = files("dynamax").joinpath("data", "prompts", "questions.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line)["question"] for line in random.Random(seed).sample(lines, DEFAULT)]
    try:
        found = [line.strip() for line in file.expanduser().read_text("utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(
            f"The prompts {file} cannot be read: {error.strerror}. Wanted: a text file with a prompt on each line. "
            f"Correct the path."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"The prompts {file} are not UTF-8: {error.reason}. Save the file as UTF-8.") from error
    if not found:
        raise UserError(f"{file} has no prompts. Write one on each line.")
    return found
