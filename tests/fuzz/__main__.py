"""``make fuzz``: cases for FUZZ_MINUTES, or the one that FUZZ_CASE names (KIND:SEED); each fault is printed.

FUZZ_START is the first seed of each kind, 1000 if left out; FUZZ_KINDS are the kinds, with commas between.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.fuzz.cases import CASES, make
from tests.fuzz.runner import run_case


def main() -> int:
    """Run cases; 1 if any had a fault."""
    minutes, start = float(os.environ.get("FUZZ_MINUTES", "10")), int(os.environ.get("FUZZ_START", "1000"))
    kinds = os.environ.get("FUZZ_KINDS", ",".join(CASES)).split(",")
    ran: Counter[str] = Counter()
    faulty: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        whole, place = Path(scratch) / "whole", Path(scratch) / "place"
        whole.mkdir()
        os.chdir(whole)
        make(whole)
        os.chdir(scratch)
        kind, _, seed = os.environ.get("FUZZ_CASE", "").partition(":")
        if seed:
            found = run_case(kind, int(seed), whole, place)
            print("\n".join(found) or "No fault.")
            return int(bool(found))
        end, step = time.monotonic() + 60 * minutes, 0
        while time.monotonic() < end:
            kind, seed_of = kinds[step % len(kinds)], start + step // len(kinds)
            step += 1
            found = run_case(kind, seed_of, whole, place)
            ran[kind] += 1
            faulty[kind] += bool(found)
            if found:
                print("\n".join(found), flush=True)
        os.chdir("/")
    for kind in kinds:
        print(f"{kind}: {ran[kind]} cases, {faulty[kind]} with faults")
    print(f"{ran.total()} cases, {faulty.total()} with faults. One again: make fuzz FUZZ_CASE=KIND:SEED")
    return int(bool(faulty.total()))


if __name__ == "__main__":
    sys.exit(main())
