"""Hidden states on disk, for reading. Knows shards and documents; knows no backbone.

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

Entry ``t`` is the state *after* token ``t``: ``top_tokens[t]`` are candidates for token ``t + 1``.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import final

import torch
from safetensors import safe_open
from torch import Tensor

from dynamax.data.manifest import Manifest
from dynamax.errors import UserError


@dataclass(frozen=True)
class StoredDocument:
    """One document with the model's states and labels, T entries.

    Attributes:
        tokens_T: Token ids, int32.
        prompt: Tokens at the start that were given and not generated.
        origin: Hash of what the document goes back to; splits go by it.
        hidden: Residual stream ``h_TD`` by depth, in the store's dtype.
        top_tokens_TK: The full model's most likely next tokens, surest first, int32.
        top_probs_TK: Their probabilities, float32; they sum to less than one.
        logsumexp_T: Of the full model's logits, float32.
    """

    tokens_T: Tensor
    prompt: int
    origin: int
    hidden: dict[int, Tensor]
    top_tokens_TK: Tensor
    top_probs_TK: Tensor
    logsumexp_T: Tensor


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
        self._refuse(checksums=False)
        self._stops = list(accumulate(shard.documents for shard in self.manifest.shards))
        self._shards: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.manifest.documents

    def __getitem__(self, index: int) -> StoredDocument:
        return self.read(index)

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return Store, (self.folder,)  # a worker process maps the shards anew

    @property
    def whole(self) -> bool:
        """Whether all text of the source is in."""
        return self.manifest.whole

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return self.manifest.tokens

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

    def verify(self) -> None:
        """Compare every shard with its checksum.

        Raises:
            UserError: If one is damaged; all of them are named.
        """
        self._refuse(checksums=True)

    def _refuse(self, *, checksums: bool) -> None:
        damaged = self.manifest.damaged(self.folder, checksums=checksums)
        if damaged:
            listed = "; ".join(f"{self.manifest.shards[number].file} {what}" for number, what in damaged.items())
            raise UserError(
                f"The store {self.folder} is damaged: {listed}. Run `dynamax cache` or `fit` with the same options: "
                f"it makes the damaged shards again and leaves the others."
            )

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            self._shards[number] = read_shard(self.folder / self.manifest.shards[number].file)
        return self._shards[number]


def read_shard(file: Path) -> dict[str, Tensor]:
    """Map a shard: its tensors are read from disk page by page, as they are used."""
    with safe_open(file, "pt") as shard:
        return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 - not a mapping
