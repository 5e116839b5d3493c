"""Hidden states on disk: what a store's folder holds, and how it is read. Knows no backbone.

A store is a folder of ``.safetensors`` shards and a manifest. A shard holds whole documents, one
behind the other, in these tensors (N tokens, D width, K labels)::

    tokens      N     int32     token ids
    hidden.15   N D   half      residual stream after 15 blocks, one tensor an exit
    top_tokens  N K   int32     the full model's most likely next tokens
    top_probs   N K   float32   their probabilities
    logsumexp   N     float32   of the full model's logits: log p + logsumexp is a logit again
    stops       n     int64     where each document ends
    prompts     n     int32     how many tokens of each were given and not generated
    origins     n     int64     hash of what each document goes back to

Entry ``t`` is the state *after* token ``t``: ``top_tokens[t]`` are candidates for token ``t + 1``. Where that token was
given with the prompt, nobody asks what the model would have said: there the labels are zeros.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from torch import Tensor

from dynamax.errors import UserError, shown
from dynamax.files import read_mapping, write_atomically

FORMAT = 1
NAME = "manifest.json"


@dataclass(frozen=True)
class StoredDocument:
    """One document with the model's states and labels, T entries.

    Attributes:
        tokens_T: Token ids, int32.
        prompt: Tokens at the start that were given and not generated.
        origin: Hash of what the document goes back to; splits go by it.
        hidden: Residual stream ``h_TD`` by depth, in the store's dtype.
        top_tokens_TK: The full model's most likely next tokens, surest first, int32; 0 where the next was given.
        top_probs_TK: Their probabilities, float32; they sum to less than one; 0 where the next token was given.
        logsumexp_T: Of the full model's logits, float32; 0 where the next token was given.
    """

    tokens_T: Tensor
    prompt: int
    origin: int
    hidden: dict[int, Tensor]
    top_tokens_TK: Tensor
    top_probs_TK: Tensor
    logsumexp_T: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take in a shard."""
        labels = (self.top_tokens_TK, self.top_probs_TK, self.logsumexp_T)
        return sum(tensor.nbytes for tensor in (self.tokens_T, *self.hidden.values(), *labels))


@dataclass(frozen=True)
class Shard:
    """One file of the store.

    Attributes:
        file: Name in the store's folder.
        bytes: Size.
        crc32: Checksum of the whole file, hexadecimal.
        first_group: First group of the text source that is in it.
        stop_group: The group after its last.
        documents: Number of documents.
        tokens: Number of tokens.
    """

    file: str
    bytes: int
    crc32: str
    first_group: int
    stop_group: int
    documents: int
    tokens: int


@dataclass
class Manifest:
    """What a store was made from, and what is whole of it.

    Attributes:
        inputs: Everything the contents depend on; see ``dynamax.data.fill.store_inputs``.
        versions: Libraries that wrote it, for the record.
        shards: Whole shards, in order.
        whole: True once the text source has come to its end.
    """

    inputs: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)
    whole: bool = False

    @property
    def next_group(self) -> int:
        """First group that is in no shard yet."""
        return self.shards[-1].stop_group if self.shards else 0

    @property
    def documents(self) -> int:
        """Documents in whole shards."""
        return sum(shard.documents for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Replace the folder's manifest in one step."""
        content = {"format": FORMAT, "fingerprint": fingerprint(self.inputs), **asdict(self)}
        write_atomically(folder / NAME, json.dumps(content, indent=1).encode())

    def damaged(self, folder: Path, *, checksums: bool) -> dict[int, str]:
        """Number of each shard that is not as it was written, and what is wrong with it.

        Args:
            folder: The store.
            checksums: Read every shard through, and do not go by sizes alone.
        """
        found: dict[int, str] = {}
        for number, shard in enumerate(self.shards):
            file = folder / shard.file
            if not file.is_file():
                found[number] = "is missing"
            elif (size := file.stat().st_size) != shard.bytes:
                found[number] = f"has {size} bytes where {shard.bytes} were written"
            elif checksums:
                value = 0
                with file.open("rb") as stream:
                    while piece := stream.read(1 << 22):
                        value = zlib.crc32(piece, value)
                if f"{value:08x}" != shard.crc32:
                    found[number] = f"does not match its checksum {shard.crc32}"
        return found

    @staticmethod
    def load(folder: Path) -> Manifest:
        """Read the folder's manifest.

        Raises:
            UserError: If there is none, or it is not of this format.
        """
        file = folder / NAME
        if not file.is_file():
            raise UserError(f"{folder} holds no {NAME}, so it is no store. Fill one with `dynamax cache` or `fit`.")
        try:
            content = read_mapping(file)
            shards = [Shard(**shard) for shard in content["shards"]]
            known = content["format"]
            manifest = Manifest(content["inputs"], content["versions"], shards, content["whole"])
        except (ValueError, KeyError, TypeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else shown(error, 80)
            if isinstance(error, TypeError):
                reason = "it is not as it was written"
            raise UserError(
                f"{file} is damaged ({reason}). Remove the folder {folder}; the next run fills it again."
            ) from error
        if known != FORMAT:
            raise UserError(
                f"{file} is of store format {known}; this version reads format {FORMAT}. Remove the folder "
                f"{folder}; the next run fills it again."
            )
        return manifest


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Hash of a store's inputs, 16 hexadecimal digits."""
    canonical = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@final
class Store:
    """Reads a store. Shards are mapped into memory; what is not asked for is not read.

    Args:
        folder: The store's own folder, with ``manifest.json`` in it.

    Attributes:
        manifest: What went in.
        exits: Depths whose states are held, ascending.
        k: Labels a position.
        width: D.

    Raises:
        UserError: If there is no store, or a shard is missing or has another size than when written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        inputs = self.manifest.inputs
        self.exits: tuple[int, ...] = tuple(inputs["exits"])
        self.k: int = inputs["k"]
        self.width: int = inputs["width"]
        self.verify(checksums=False)
        self._stops = list(accumulate(shard.documents for shard in self.manifest.shards))
        self._shards: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.manifest.documents

    def __getitem__(self, index: int) -> StoredDocument:
        return self.read(index)

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return Store, (self.folder,)  # a worker process maps the shards anew

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return sum(shard.tokens for shard in self.manifest.shards)

    @property
    def bytes(self) -> int:
        """Size of all shards on disk."""
        return sum(shard.bytes for shard in self.manifest.shards)

    def lengths(self) -> Tensor:
        """Tokens of each document, int64."""
        stops = [self._shard(number)["stops"] for number in range(len(self._stops))]
        return torch.cat([stop.diff(prepend=stop.new_zeros(1)) for stop in stops] or [torch.empty(0).long()])

    def origins(self) -> Tensor:
        """Hash of each document's origin, int64."""
        origins = [self._shard(number)["origins"] for number in range(len(self._stops))]
        return torch.cat(origins or [torch.empty(0).long()])

    def read(self, index: int, *, limit: int | None = None) -> StoredDocument:
        """One document; views of the mapped file, to be copied before they are written to.

        Args:
            index: Documents stand in the order of the source.
            limit: Read only so many of its tokens, from the first on.

        Raises:
            IndexError: If there is no such document.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of a store of {len(self)}")
        number = bisect_right(self._stops, index)
        shard = self._shard(number)
        at = index - (self._stops[number - 1] if number else 0)
        start, stop = (int(shard["stops"][at - 1]) if at else 0), int(shard["stops"][at])
        entries = slice(start, stop if limit is None else min(stop, start + limit))
        return StoredDocument(
            shard["tokens"][entries],
            int(shard["prompts"][at]),
            int(shard["origins"][at]),
            {depth: shard[f"hidden.{depth}"][entries] for depth in self.exits},
            shard["top_tokens"][entries],
            shard["top_probs"][entries],
            shard["logsumexp"][entries],
        )

    def verify(self, *, checksums: bool = True) -> None:
        """Compare every shard's size, and its checksum if asked, with what was written.

        Raises:
            UserError: If one is damaged; all of them are named.
        """
        damaged = self.manifest.damaged(self.folder, checksums=checksums)
        if damaged:
            listed = "; ".join(f"{self.manifest.shards[number].file} {what}" for number, what in damaged.items())
            raise UserError(
                f"The store {self.folder} is damaged: {listed}. Run `dynamax cache` or `fit` with the same options: "
                f"it makes the damaged shards again and leaves the others."
            )

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            with safe_open(self.folder / self.manifest.shards[number].file, "pt") as shard:
                # Tensors are mapped: they are read from disk page by page, as they are used.
                self._shards[number] = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        return self._shards[number]
