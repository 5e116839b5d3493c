"""The files of a model folder: its tensors, read one at a time, and messages about damaged files. Knows no models."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import logging

from dynamax.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@final
class Checkpoint(Mapping[str, Tensor]):
    """Tensors by the names they have on disk; only what is asked for is read.

    Which files count is transformers' rule: the single file if there is one, else all tensors of all files that the
    index names; of two tensors of one name, that of the later file.

    Args:
        folder: A folder in transformers' layout.

    Raises:
        UserError: If it has no safetensors, a file that its index names is missing, or there is an adapter.
    """

    def __init__(self, folder: Path) -> None:
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder} holds an adapter (adapter_config.json), which is not applied here. Merge it into the model "
                f"with PEFT's merge_and_unload, and save that with save_pretrained."
            )
        if (folder / SINGLE).is_file():
            files = [SINGLE]
        elif (folder / INDEX).is_file():
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        else:
            raise UserError(
                f"{folder} has neither {SINGLE} nor {INDEX}. Give a folder with safetensors; older weights become "
                f"some when transformers loads them and save_pretrained writes them again."
            )
        self._files: dict[str, Any] = {}  # the open file of each tensor
        for file in files:
            if not (folder / file).is_file():
                raise UserError(f"{folder / file} is missing, but the index names it. Fetch the folder again.")
            opened: Any = safe_open(folder / file, framework="pt")
            self._files |= dict.fromkeys(opened.keys(), opened)

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def slices(self) -> dict[str, Any]:
        """All tensors, unread, as transformers takes them: ``slices()[name][...]`` reads one."""
        return {name: file.get_slice(name) for name, file in self._files.items()}


@contextmanager
def reading(folder: Path, *patterns: str) -> Iterator[None]:
    """Around libraries that read files of a folder: whatever they raise becomes a message about the file at fault.

    transformers' own reports are kept quiet: what matters of them is in the message.

    Args:
        folder: The folder.
        patterns: Names of the files that are read, as ``Path.glob`` takes them.

    Raises:
        UserError: Naming the file, what is wrong with it, and the remedy.
    """
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        words = str(error).strip().splitlines()[0]
        raise UserError(f"{folder} needs a package that is not installed: {words:.300} Install it.") from error
    except Exception as error:
        fault = fault_in(folder, patterns)
        if fault is None:
            files = [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]
            words = (str(error).strip() or type(error).__name__).splitlines()[0]
            fault = f"{folder} cannot be read ({', '.join(files[:4]) or patterns[0]}): {words:.300}"
        raise UserError(f"{fault.rstrip('.')}. Fetch the file again, or write the folder anew.") from error
    finally:
        logging.set_verbosity(level)


def fault_in(folder: Path, patterns: Collection[str]) -> str | None:
    """What is wrong with the first damaged file of a folder; None if each is what its name says.

    Args:
        folder: The folder.
        patterns: Names of the files to look at, as ``Path.glob`` takes them.
    """
    for path in [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]:
        with path.open("rb") as file:
            head = file.read(64)
        if not head:
            return f"{path} is empty"
        if head.startswith(b"version https://git-lfs"):
            return f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull` where it was cloned"
        try:
            if path.suffix == ".safetensors":
                safe_open(path, framework="pt")
            elif path.suffix == ".json":
                content = json.loads(path.read_bytes())
                if not isinstance(content, dict):
                    return f"{path} holds a {type(content).__name__}; an object of names and values is wanted"
                if path.name == "config.json" and not isinstance(content.get("model_type"), str):
                    return f"{path} names no model_type, so it is no model's configuration"
        except SafetensorError as error:
            return f"{path} is damaged or was not fetched to its end ({error})"
        except ValueError as error:
            return f"{path} is not valid JSON ({error})"
    return None
