"""The tensors of a model folder, read from its safetensors files one at a time. Knows no models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

from safetensors import safe_open
from torch import Tensor

from dynamax.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@final
class Checkpoint(Mapping[str, Tensor]):
    """Tensors by the names they have on disk; only what is asked for is read.

    Args:
        folder: A folder in transformers' layout.

    Raises:
        UserError: If it has no safetensors, or a file that its index names is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        if (folder / INDEX).is_file():
            self._places: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
            self._check()
        elif (folder / SINGLE).is_file():
            self._places = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise UserError(
                f"{folder} has neither {SINGLE} nor {INDEX}. Give a folder with safetensors; older weights become "
                f"some when transformers loads them and save_pretrained writes them again."
            )

    def _check(self) -> None:
        for file in sorted(set(self._places.values())):
            if not (self._folder / file).is_file():
                raise UserError(f"{self._folder / file} is missing, but the index names it. Fetch the folder again.")

    def _open(self, file: str) -> Any:  # noqa: ANN401  (safetensors exports no type)
        if file not in self._files:
            self._files[file] = safe_open(self._folder / file, framework="pt")
        return self._files[file]

    def __getitem__(self, name: str) -> Tensor:
        return self._open(self._places[name]).get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._open(self._places[name]).get_slice(name).get_shape())
