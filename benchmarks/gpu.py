"""What a GPU shows, in one script of parts by worth, each in its time box.

    python -m benchmarks.gpu [--only PART] [--minutes N] [--parts FOLDER] [--out FOLDER] [--rehearse]

    laws      the laws and kernels: all tests marked gpu
    shapes    Mistral-7B and Codestral-Mamba-7B with random weights, every exit, eager and captured
    frontier  SmolLM2: policies beside the full model, latency of every exit by CUDA events
    siblings  the small models in assets/
    tune      early-exit tuning of SmolLM2 on text that it writes itself, in eight minutes; runs when it is named

Each part runs in a process of its own and writes ``gpu-PART.json`` as findings come. One that fails or runs out of time
says why there, and the next one goes on. ``--rehearse`` runs everything in small on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dynamax.errors import UserError
from dynamax.files import write_atomically

PARTS = {"laws": 3.2, "shapes": 5.0, "frontier": 2.0, "siblings": 2.3}
"""Minutes of each part, most worth first; the last has what the others leave, too."""
REHEARSAL = {"laws": 1.6, "shapes": 0.8, "frontier": 0.7, "siblings": 0.7}
NAMED = {"tune": 8.0}
"""Minutes of parts that run only if they are named: each fills a short loan by itself."""
NEEDS = {
    "laws": ("torch", "transformers", "pytest"),
    "shapes": ("torch", "transformers"),
    "frontier": ("torch", "transformers", "lightning", "torchmetrics", "jsonargparse", "datasets"),
    "siblings": ("torch", "transformers"),
    "tune": ("torch", "transformers", "lightning", "torchmetrics", "jsonargparse", "datasets", "peft"),
}
"""Packages without which a part cannot run at all."""
MODULE = "benchmarks.gpu_{}"
"""Where a part is."""
GRACE = 0.93
"""Share of its time after which a part begins nothing new."""
RESULTS = Path("benchmarks/results")
REHEARSED = Path("runs/rehearsal")

Report = dict[str, Any]


def boxes(chosen: Sequence[str], minutes: float | None, *, rehearse: bool) -> dict[str, float]:
    """Seconds of each chosen part, in order of worth; in proportion if other minutes are given."""
    usual = {**PARTS, **NAMED, **(REHEARSAL if rehearse else {})}
    known = {part: 60 * usual[part] for part in usual if part in chosen}
    scale = 1.0 if minutes is None else 60 * minutes / sum(known.values())
    return {part: seconds * scale for part, seconds in known.items()}


def run_all(args: argparse.Namespace) -> list[Report]:
    """Run the parts in turn; their reports."""
    args.out.mkdir(parents=True, exist_ok=True)
    planned = boxes(args.only or list(PARTS), args.minutes, rehearse=args.rehearse)
    end = time.monotonic() + sum(planned.values())
    reports = []
    for part, seconds in planned.items():
        if part == list(planned)[-1]:
            seconds = end - time.monotonic()
        print(f"-- {part}: {seconds:.0f} s", flush=True)
        reports.append(run_part(part, seconds, args))
        print(f"-- {part}: {reports[-1]['status']}. {reports[-1]['reason']}", flush=True)
    return reports


def run_part(part: str, seconds: float, args: argparse.Namespace) -> Report:
    """Run one part in a process; its report, however it ended."""
    file = args.out / f"gpu-{part}.json"
    file.unlink(missing_ok=True)  # an older report must not pass for this one
    if absent := missing(NEEDS[part]):
        named = " ".join(absent)
        return told(
            file, part, "failed", f"not installed here: {named}; put them on PYTHONPATH, or pip install {named}"
        )
    command = [sys.executable, "-m", "benchmarks.gpu_part", part, "--module", MODULE.format(part)]
    command += ["--file", str(file), "--seconds", str(seconds * GRACE)]
    command += ["--rehearse"] if args.rehearse else []
    command += ["--parts", str(args.parts)] if args.parts is not None else []
    start = time.monotonic()
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            end(process)
            return told(file, part, "out of time", f"ended after {seconds:.0f} s, in the middle of a measurement")
        except BaseException:
            end(process)
            told(file, part, "failed", f"interrupted after {time.monotonic() - start:.0f} s")
            raise
    if process.returncode < 0:
        return told(file, part, "failed", f"ended by {signal.Signals(-process.returncode).name}")
    if not file.is_file():
        return told(file, part, "failed", f"its process ended with {process.returncode} before it wrote anything")
    return json.loads(file.read_text())


def missing(packages: Sequence[str]) -> list[str]:
    """Those that are not installed."""
    return [package for package in packages if find_spec(package) is None]


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part's process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def told(file: Path, part: str, status: str, reason: str) -> Report:
    """Write how a part ended that could not say so itself, beside what it had found."""
    known = json.loads(file.read_text()) if file.is_file() else {"part": part, "seconds": 0.0, "findings": {}}
    if known.get("status") in ("running", None):
        known |= {"status": status, "reason": reason}
    write_atomically(file, f"{json.dumps(known, indent=1)}\n".encode())
    return known


def summary(reports: Sequence[Report]) -> str:
    """A line for each part, and each part's own table."""
    lines = [f"{'part':10}{'status':13}{'seconds':>8}  reason"]
    lines += [f"{r['part']:10}{r['status']:13}{r['seconds']:>8.0f}  {r['reason']}" for r in reports]
    tables = [f"{report['part']}\n{report['table']}" for report in reports if report.get("table")]
    if any(report.get("rehearsal") for report in reports):
        tables.append(
            "A rehearsal on the CPU: tiny shapes, repeated operations instead of captured graphs. No figure counts."
        )
    return "\n\n".join(["\n".join(lines), *tables])


def check(args: argparse.Namespace) -> None:
    """Refuse (UserError) what cannot be measured here, before anything runs."""
    if args.minutes is not None and not args.minutes > 0:
        raise UserError(f"--minutes was given {args.minutes}; it must be above 0.")
    if args.parts is not None and not args.parts.is_dir():
        raise UserError(
            f"--parts was given {args.parts}, which is not a folder. `python -m benchmarks.parts` makes one."
        )
    if absent := missing(("torch", "transformers")):
        raise UserError(f"Not installed here: {', '.join(absent)}. Name an interpreter that has them: make gpu PY=...")
    if args.rehearse:
        return
    import torch  # takes seconds, so not before it is known to be there

    if not torch.cuda.is_available():
        raise UserError("No CUDA device was found. `make gpu REHEARSE=1` runs every part in small on the CPU.")


def main(given: Sequence[str] | None = None) -> int:
    """Run the parts, print a summary; 0 if all are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*PARTS, *NAMED], action="append", help="a part; may be given again")
    parser.add_argument("--minutes", type=float, default=None, help="for all parts together")
    parser.add_argument("--parts", type=Path, default=None, help="folder of benchmarks.parts with SmolLM2's wheel")
    parser.add_argument("--out", type=Path, default=None, help=f"folder; {RESULTS}, rehearsed {REHEARSED}")
    parser.add_argument("--rehearse", action="store_true", help="every part in small on the CPU")
    args = parser.parse_args(given)
    args.out = args.out or (REHEARSED if args.rehearse else RESULTS)
    try:
        check(args)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    reports = run_all(args)
    print(f"\n{summary(reports)}\n\nReports: {args.out}")
    return 0 if all(report["status"] == "done" for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
