"""Appends to a store, a shard at a time, and survives being killed. Knows files; knows no backbone.

A shard is written under another name, reaches the disk, gets its name, and only then enters the
manifest, which is replaced at one stroke. Killed between any two of these, the next run finds the
shards of the manifest whole and clears away the rest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import final

import torch
from safetensors.torch import save
from torch import Tensor

from dynamax.data.manifest import NAME, Manifest, Shard, checksum_of
from dynamax.data.store import StoredDocument
from dynamax.errors import UserError
from dynamax.files import write_atomically

LOCK = "lock"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@final
class StoreWriter:
    """Writes shards into one folder; the caller holds its lock, see ``locked``.

    Args:
        folder: The store's own folder, which exists.
        manifest: What goes in. Where the folder has a manifest already, it is continued instead.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = Manifest.load(folder) if (folder / NAME).exists() else manifest
        known = {NAME, LOCK, *(shard.file for shard in self.manifest.shards)}
        for file in folder.iterdir():
            if file.name not in known:
                file.unlink()  # begun and never entered in the manifest

    def append(self, documents: Sequence[StoredDocument], *, stop_group: int) -> None:
        """Write the next shard: the documents of the groups up to, not including, ``stop_group``."""
        groups = (self.manifest.next_group, stop_group)
        with self._told_of_full_disk():
            shard = self._write(f"shard-{len(self.manifest.shards):05d}.safetensors", documents, groups)
            self.manifest.shards.append(shard)
            self.manifest.save(self.folder)

    def replace(self, number: int, documents: Sequence[StoredDocument]) -> None:
        """Write a shard again, with the documents of the same groups."""
        old = self.manifest.shards[number]
        with self._told_of_full_disk():
            self.manifest.shards[number] = self._write(old.file, documents, (old.first_group, old.stop_group))
            self.manifest.save(self.folder)

    def finish(self) -> None:
        """The source has come to its end."""
        self.manifest.whole = True
        with self._told_of_full_disk():
            self.manifest.save(self.folder)

    def _write(self, name: str, documents: Sequence[StoredDocument], groups: tuple[int, int]) -> Shard:
        content = save(columns(documents))
        write_atomically(self.folder / name, content)
        tokens = sum(len(document.tokens_T) for document in documents)
        return Shard(name, len(content), f"{checksum_of(content):08x}", *groups, len(documents), tokens)

    @contextlib.contextmanager
    def _told_of_full_disk(self) -> Iterator[None]:
        shards, documents = len(self.manifest.shards), self.manifest.documents
        try:
            yield
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            raise OSError(
                error.errno,
                f"No space left for the store {self.folder}. {shards} shards with {documents} documents are whole and "
                f"stay. Free some space and run again, and it goes on from there; or name a folder on another disk",
            ) from error


def columns(documents: Sequence[StoredDocument]) -> dict[str, Tensor]:
    """The tensors of a shard; see ``dynamax.data.store`` for the layout."""
    lengths = torch.tensor([len(document.tokens_T) for document in documents])
    tensors = {
        "tokens": torch.cat([document.tokens_T for document in documents]),
        "top_tokens": torch.cat([document.top_tokens_TK for document in documents]),
        "top_probs": torch.cat([document.top_probs_TK for document in documents]),
        "logsumexp": torch.cat([document.logsumexp_T for document in documents]),
        "stops": lengths.cumsum(0),
        "prompts": torch.tensor([document.prompt for document in documents], dtype=torch.int32),
        "origins": torch.tensor([document.origin for document in documents]),
    }
    for depth in documents[0].hidden:
        tensors[f"hidden.{depth}"] = torch.cat([document.hidden[depth] for document in documents])
    return tensors


def origin_hash(text: str) -> int:
    """A document's origin as a number that fits int64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for writing. The lock of a process that died is free at once.

    Raises:
        UserError: If another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UserError(
                f"The store {folder} is being written by another process (pid {file.read().strip() or 'unknown'}). "
                f"Wait for it, or stop it, and run again."
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
