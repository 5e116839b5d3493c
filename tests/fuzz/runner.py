"""One case by its kind and its seed, in a fresh copy of the folder; so every fault can be had again."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from pathlib import Path
from random import Random

from tests.fuzz.cases import CASES
from tests.fuzz.outcome import faults, outcome


def run_case(kind: str, seed: int, whole: Path, place: Path) -> list[str]:
    """The faults of one case, each with the command line; none if all is well.

    Args:
        kind: Key of ``CASES``.
        seed: Of all that is drawn.
        whole: Folder that ``make`` made.
        place: Folder for the copy, which is made anew.
    """
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place, symlinks=True)
    before = Path.cwd()
    os.chdir(place)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arguments = CASES[kind](Random(f"{kind} {seed}"), place)
            found = faults(outcome(arguments), arguments, place)
    finally:
        logging.disable(logging.NOTSET)
        os.chdir(before)
    return [f"{kind}:{seed}: dynamax {arguments!r}: {fault}" for fault in found]
