"""The record of a store: what went in, which shards are whole. Knows files and JSON, no tensors."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dynamax.errors import UserError
from dynamax.files import write_atomically

FORMAT = 1
NAME = "manifest.json"


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

    @property
    def tokens(self) -> int:
        """Tokens in whole shards."""
        return sum(shard.tokens for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Replace the folder's manifest at one stroke."""
        content = {"format": FORMAT, "fingerprint": fingerprint(self.inputs), **asdict(self)}
        write_atomically(folder / NAME, json.dumps(content, indent=1).encode())

    def damaged(self, folder: Path, *, checksums: bool) -> dict[int, str]:
        """Number of each shard that is not as it was written, and what is wrong with it.

        Args:
            folder: The store.
            checksums: Read every shard through, and do not go by sizes alone.
        """
        found = {number: damage(folder, shard, checksum=checksums) for number, shard in enumerate(self.shards)}
        return {number: problem for number, problem in found.items() if problem is not None}

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
            content = json.loads(file.read_text("utf-8"))
            shards = [Shard(**shard) for shard in content["shards"]]
            known = content["format"]
            manifest = Manifest(content["inputs"], content["versions"], shards, content["whole"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is damaged ({error!r}). Remove the folder {folder}; the next run fills it again."
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


def damage(folder: Path, shard: Shard, *, checksum: bool) -> str | None:
    """What is wrong with a shard's file, in words; None if nothing is.

    Args:
        folder: The store.
        shard: What the manifest says of it.
        checksum: Read the whole file too, and not its size alone.
    """
    file = folder / shard.file
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    if size != shard.bytes:
        return f"has {size} bytes where {shard.bytes} were written"
    if checksum and checksum_of_file(file) != shard.crc32:
        return f"does not match its checksum {shard.crc32}"
    return None


def checksum_of(content: bytes, start: int = 0) -> int:
    """CRC-32, continued from ``start``."""
    return zlib.crc32(content, start)


def checksum_of_file(file: Path) -> str:
    """CRC-32 of a file, hexadecimal, read piece by piece."""
    value = 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            value = checksum_of(piece, value)
    return f"{value:08x}"
