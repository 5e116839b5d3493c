"""The notebooks run from top to bottom, and what is committed with them is what they say.

Run as a script it writes their outputs anew: ``python tests/test_notebooks.py``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALLER = {
    "01_exits_on_smollm2": {
        "questions=96": "questions=24",
        "documents=96": "documents=24",
        "max_epochs=12": "max_epochs=8",
    },
    "02_write_your_own_head": {
        "questions=48": "questions=20",
        "documents=48": "documents=20",
        "max_epochs=12": "max_epochs=6",
    },
    "03_exits_in_mamba": {"questions=128": "questions=40", "documents=128": "documents=40"},
    "05_gates_and_heads_together": {
        "steps=1000": "steps=150",
        "run.warm(400)": "run.warm(60)",
        "run.warm(600)": "run.warm(90)",
        "steps=400": "steps=40",
        "apart, 200": "apart, 20",
        "warm, 400": "warm, 40",
        "questions=64": "questions=32",
        "documents=64": "documents=32",
        "max_epochs=20": "max_epochs=8",
    },
}
"""What the tests put in place of the sizes of the longest notebooks, so that they take less time."""
FACTS = {"kernelspec": {"display_name": "Python 3", "name": "python3"}, "language_info": {"name": "python"}}


def executed(path: Path, folder: Path, smaller: Mapping[str, str] = MappingProxyType({})) -> NotebookNode:
    """A notebook as it comes out of a kernel of this interpreter, run in the folder on one thread."""
    notebook = nbformat.read(path, as_version=4)
    for size, other in smaller.items():
        assert any(size in cell.source for cell in notebook.cells), size
        for cell in notebook.cells:
            cell.source = cell.source.replace(size, other)
    own_kernel = Config({"KernelSpecManager": {"kernel_dirs": []}})  # whatever else is installed on the machine
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        config=own_kernel,
        timeout=600,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment(folder))
    return cleaned(notebook)


def environment(folder: Path) -> dict[str, str]:
    """This process' environment, with the repository in the path and nothing of the user's own configuration."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder / ".ipython")}
    return {**os.environ, **ours}


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """The notebook without times, machine and progress bars."""
    notebook = nbformat.from_dict({**notebook, "metadata": FACTS})
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def kinds(notebook: NotebookNode) -> list[list[str]]:
    """What each code cell gave: names of streams, types of data."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[output.get("name") or "/".join(sorted(output.data)) for output in cell.outputs] for cell in cells]


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) == 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_committed_and_clean(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert notebook == cleaned(notebook)
    assert not any(place in path.read_text() for place in ("/tmp", "/home/", "/root/", "/Users/", str(ROOT)))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_gives_what_is_committed(path: Path, tmp_path: Path) -> None:
    notebook = executed(path, tmp_path, SMALLER.get(path.stem, {}))
    assert kinds(notebook) == kinds(nbformat.read(path, as_version=4))


if __name__ == "__main__":
    for path in NOTEBOOKS:
        with TemporaryDirectory() as folder:
            nbformat.write(executed(path, Path(folder)), path)
        sys.stdout.write(f"wrote {path.relative_to(ROOT)}\n")
