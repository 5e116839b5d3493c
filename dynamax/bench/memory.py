"""How much memory this process takes and how much there is; from Linux's /proc, elsewhere unknown."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from pathlib import Path

STATUS, MEMORY, RESET = Path("/proc/self/status"), Path("/proc/meminfo"), Path("/proc/self/clear_refs")
LIMIT, USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
METHOD = (
    "peak resident set of this process (VmHWM of /proc/self/status, set back before) over loading and the warm-up "
    "answer, less the resident set before; pages of mapped files count once they are read, "
    "and the contender that is loaded first bears what libraries take once"
)


class Growth:
    """Growth of the resident set since this object was made."""

    def __init__(self) -> None:
        release()
        self._known = False
        with contextlib.suppress(OSError):
            RESET.write_text("5")  # the peak starts again at what is resident now
            self._known = True
        self._before = _kilobytes(STATUS, "VmRSS")

    def peak(self) -> int | None:
        """Bytes by which the peak lies above what was resident; None where that is unknown."""
        now = _kilobytes(STATUS, "VmHWM")
        if not self._known or now is None or self._before is None:
            return None
        return 1024 * max(0, now - self._before)


def release() -> None:
    """Give freed memory back to the system, where the C library can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available() -> int | None:
    """Bytes that can be taken without swapping, within the limit of a container; None where that is unknown."""
    free = _kilobytes(MEMORY, "MemAvailable")
    if free is None:
        return None
    with contextlib.suppress(OSError, ValueError):  # without a limit, the file says "max"
        return min(1024 * free, int(LIMIT.read_text()) - int(USED.read_text()))
    return 1024 * free


def _kilobytes(file: Path, name: str) -> int | None:
    with contextlib.suppress(OSError):
        found = re.search(rf"^{name}:\s+(\d+) kB$", file.read_text(), re.MULTILINE)
        return None if found is None else int(found[1])
    return None
