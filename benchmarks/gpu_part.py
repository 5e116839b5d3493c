"""One part of ``benchmarks.gpu`` in a process of its own: its time box, and its report, written as findings come.

    python -m benchmarks.gpu_part PART --module MODULE --file FILE --seconds N [--rehearse] [--parts FOLDER]

A part is a module with ``run(box)``. Knows files and clocks; torch only for what machine it is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dynamax.errors import UserError
from dynamax.files import write_atomically

ROOT = Path(__file__).parents[1]
VERSIONS = ("torch", "transformers", "lightning", "triton", "mamba_ssm", "causal_conv1d")


class Box:
    """The time box of a part, and its report.

    Args:
        file: The report; written whole after every finding.
        part: Name of the part.
        seconds: Time that the part has.
        rehearse: Run in small on the CPU.
        parts: Folder of parts that hold models too large to ship; None without.

    Attributes:
        device: Where to measure.
        report: Status, reason, machine, findings, failures, what was left out, a table.
    """

    def __init__(
        self, file: Path, part: str, seconds: float, *, rehearse: bool = False, parts: Path | None = None
    ) -> None:
        self.file, self.part, self.rehearse, self.parts = file, part, rehearse, parts
        self.device = "cpu" if rehearse else "cuda"
        self._start, self._seconds = time.monotonic(), seconds
        self.report: dict[str, Any] = {
            "part": part,
            "status": "running",
            "reason": "",
            "rehearsal": rehearse,
            "seconds": 0.0,
            "time_box": seconds,
            "machine": {},
            "findings": {},
            "failures": {},
            "left_out": [],
            "table": "",
        }
        self.write()

    def left(self) -> float:
        """Seconds left."""
        return self._start + self._seconds - time.monotonic()

    def measure(self, name: str, run: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever is found
        """Run and keep what is found, unless time is up; if it fails, the reason is kept and the part goes on."""
        if self.left() <= 0:
            self.report["left_out"].append(name)
            return None
        try:
            found = run()
        except Exception as error:  # whatever a GPU comes up with: the next measurement may still work
            self.report["failures"][name] = reason(error)
            print(f"{self.part}: {name}: {reason(error)}", flush=True)
            self.write()
            return None
        self.put(name, found)
        return found

    def put(self, name: str, found: object) -> None:
        """Keep a finding; anything that JSON holds."""
        self.report["findings"][name] = found
        print(f"{self.part}: {name}, {self.left():.0f} s left", flush=True)
        self.write()

    def tabulate(self, text: str) -> None:
        """Add lines to the table."""
        self.report["table"] = f"{self.report['table']}\n{text}".removeprefix("\n")
        self.write()

    def end(self, error: Exception | None = None) -> None:
        """The part is over: say how it went."""
        failures, left_out = self.report["failures"], self.report["left_out"]
        if error is not None:
            self._tell("failed", reason(error))
        elif failures:
            name, said = next(iter(failures.items()))
            more = f" (and {len(failures) - 1} more, in the report)" if len(failures) > 1 else ""
            self._tell("failed", f"{name}: {said}{more}")
        elif left_out:
            self._tell("out of time", f"left out: {', '.join(left_out)}")
        else:
            self._tell("done", "")

    def _tell(self, status: str, reason: str) -> None:
        self.report |= {"status": status, "reason": reason}
        self.write()

    def write(self) -> None:
        """The report so far, whole."""
        self.report["seconds"] = round(time.monotonic() - self._start, 1)
        write_atomically(self.file, f"{json.dumps(self.report, indent=1)}\n".encode())


def reason(error: Exception) -> str:
    """What went wrong in one line; for a missing package, the remedy."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"{package} is not installed here; put it on PYTHONPATH, or pip install {package}"
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}"


def machine(device: str) -> dict[str, Any]:
    """Device, driver and versions: what every figure must come with; dtype and shapes stand beside the figures."""
    import torch  # what is missing is told by name, not by a traceback

    on_gpu = device == "cuda"
    facts = torch.cuda.get_device_properties(0) if on_gpu else None
    return {
        "device": platform.processor() or platform.machine() if facts is None else facts.name,
        "memory_gib": None if facts is None else round(facts.total_memory / 2**30, 1),
        "driver": driver() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "system": platform.platform(terse=True),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "python": platform.python_version(),
        **{name: installed(name) for name in VERSIONS},
    }


def driver() -> str | None:
    """Version of NVIDIA's driver, asked of nvidia-smi; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(given: Sequence[str] | None = None) -> None:
    """Run one part; its report tells how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part")
    parser.add_argument("--module", required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--parts", type=Path, default=None)
    args = parser.parse_args(given)
    box = Box(args.file, args.part, args.seconds, rehearse=args.rehearse, parts=args.parts)
    try:
        box.report["machine"] = machine(box.device)
        import_module(args.module).run(box)
    except Exception as error:
        box.end(error)
        if not isinstance(error, UserError | ModuleNotFoundError):
            raise  # a bug keeps its traceback, and the report its reason
    else:
        box.end()


if __name__ == "__main__":
    main()
