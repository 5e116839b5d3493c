"""Fills a store from a text source, goes on where it was interrupted, mends what is damaged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, final

import torch
import transformers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

import dynamax
from dynamax.data.manifest import NAME, Manifest, Shard, fingerprint
from dynamax.data.states import StateReader, StoreDtype, check_exits
from dynamax.data.store import Store, StoredDocument
from dynamax.data.text import TextSource
from dynamax.data.writer import StoreWriter, locked
from dynamax.decoding.sampling import Greedy
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.generation import generation_options
from dynamax.types import Site, Spec

SHARD_BYTES = 32 << 20
logger = logging.getLogger(__name__)


def fill_store(
    folder: str | Path,
    engine: Engine,
    source: TextSource,
    exits: Sequence[int],
    *,
    k: int = 16,
    dtype: StoreDtype = "float16",
    readout: Site | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Store:
    """Write what is not yet written of a store, and open it.

    The store's own folder lies inside ``folder`` and is named after everything its contents depend
    on: a changed input is a new folder. Shards that are whole are kept, damaged ones made again.

    Args:
        folder: Where stores lie.
        engine: The model whose states are kept, with its tokenizer.
        source: Where the text comes from.
        exits: Depths to keep states at.
        k: Labels a position: the full model's most likely tokens.
        dtype: What states are kept in.
        readout: The final norm and output matrix in float32, for a backbone in half precision.
        shard_bytes: Size from which a shard is closed; a kill loses at most one shard's work.
        progress: Show a bar with tokens a second and time left.

    Raises:
        UserError: For bad options, a source without documents, or a folder another process is writing.
        OSError: If the disk is full; what was written stays usable.
    """
    assert engine.tokenizer is not None, "text is read through a tokenizer"
    reader = StateReader(engine.backbone, exits, k=k, dtype=dtype, readout=readout)
    compute = str(engine.dtype).removeprefix("torch.")
    inputs = store_inputs(
        engine.backbone.spec,
        engine.tokenizer,
        engine.generation_config,
        source,
        exits,
        k=k,
        dtype=dtype,
        compute=compute,
    )
    path = store_folder(folder, inputs)
    with locked(path):
        writer = StoreWriter(path, Manifest(inputs, versions()))
        with told_when_stopped(writer, source.count()), Progress(source.count(), shown=progress) as bar:
            filler = Filler(reader, engine, source, writer, bar)
            filler.mend()
            if not writer.manifest.whole:
                filler.extend(shard_bytes)
    return Store(path)


@contextlib.contextmanager
def told_when_stopped(writer: StoreWriter, groups: int | None) -> Iterator[None]:
    """Say what is kept when the user interrupts; a shard that is not full is dropped, since it would end elsewhere.

    Args:
        writer: Of the store.
        groups: How many there are; None if unknown.
    """
    try:
        yield
    except KeyboardInterrupt:
        kept = f"{writer.manifest.next_group}" + (f" of {groups}" if groups is not None else "")
        logger.warning("Stopped. %s groups of documents are kept; run the same command to go on.", kept)
        raise


def find_store(folder: str | Path, inputs: dict[str, Any]) -> Store | None:
    """The store made from these inputs if it is whole and undamaged, checksums included; else None."""
    path = store_folder(folder, inputs)
    if not (path / NAME).is_file():
        return None
    manifest = Manifest.load(path)
    return Store(path) if manifest.whole and not manifest.damaged(path, checksums=True) else None


def store_folder(folder: str | Path, inputs: dict[str, Any]) -> Path:
    """Where the store made from these inputs lies."""
    return Path(folder) / f"{inputs['family']}-{fingerprint(inputs)}"


def store_inputs(
    spec: Spec,
    tokenizer: PreTrainedTokenizerBase,
    generation_config: GenerationConfig | None,
    source: TextSource,
    exits: Sequence[int],
    *,
    k: int,
    dtype: StoreDtype,
    compute: str,
) -> dict[str, Any]:
    """Everything a store's contents depend on, as JSON values.

    Args:
        spec: Of the backbone.
        tokenizer: Its tokenizer.
        generation_config: Its rules of generation; end tokens shape text that it writes.
        source: Where the text comes from.
        exits: Depths.
        k: Labels a position.
        dtype: What states are kept in.
        compute: What the backbone computes in, such as ``bfloat16``.
    """
    return {
        "backbone": spec.fingerprint,
        "family": spec.family,
        "width": spec.width,
        "compute": compute,
        "tokenizer": tokenizer_hash(tokenizer),
        "end_tokens": list(generation_options(tokenizer, generation_config, sampler=Greedy()).eos_token_id),
        "text": source.identity(),
        "exits": list(check_exits(exits, depth=spec.depth)),
        "k": k,
        "dtype": dtype,
    }


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash over vocabulary, special tokens and chat template."""
    facts = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Libraries that have a say in the contents."""
    return {"dynamax": dynamax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


@final
class Progress:
    """A bar over groups of documents, with tokens a second and time left.

    Args:
        groups: How many there are; None if unknown.
        shown: Draw it at all.
    """

    def __init__(self, groups: int | None, *, shown: bool) -> None:
        layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self._bar = tqdm(desc="store", total=groups, disable=not shown, bar_format=layout if groups else None)
        self._tokens = 0
        self._begun = perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def skip(self, groups: int) -> None:
        """So many groups were there before."""
        self._bar.initial = self._bar.n = groups
        self._bar.refresh()

    def advance(self, tokens: int) -> None:
        """One more group is through."""
        self._tokens += tokens
        rate = self._tokens / (perf_counter() - self._begun)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update()


@final
class Filler:
    """Brings documents from source to shards."""

    def __init__(
        self,
        reader: StateReader,
        engine: Engine,
        source: TextSource,
        writer: StoreWriter,
        bar: Progress,
    ) -> None:
        self.reader, self.engine, self.source, self.writer, self.bar = reader, engine, source, writer, bar

    def mend(self) -> None:
        """Make damaged shards again, from the groups they held."""
        for number, problem in self.writer.manifest.damaged(self.writer.folder, checksums=True).items():
            shard = self.writer.manifest.shards[number]
            logger.warning("%s %s. It is made again.", self.writer.folder / shard.file, problem)
            self.writer.replace(number, list(self._documents_of(shard)))

    def extend(self, shard_bytes: int) -> None:
        """Go on behind the last whole shard, to the end of the source."""
        first = self.writer.manifest.next_group
        self.bar.skip(first)
        pending: list[StoredDocument] = []
        group = first - 1
        for group, documents in enumerate(self._groups(first), first):
            pending += documents
            if sum(map(size, pending)) >= shard_bytes:
                self.writer.append(pending, stop_group=group + 1)
                pending = []
        if pending:
            self.writer.append(pending, stop_group=group + 1)
        if not self.writer.manifest.shards:
            raise UserError(
                f"{type(self.source).__name__} gave no documents: {json.dumps(self.source.identity())}. "
                f"Give it data with at least one row of text."
            )
        self.writer.finish()

    def _documents_of(self, shard: Shard) -> Iterable[StoredDocument]:
        for documents in islice(self._groups(shard.first_group), shard.stop_group - shard.first_group):
            yield from documents

    def _groups(self, first: int) -> Iterable[list[StoredDocument]]:
        for group in self.source.groups(self.engine, skip=first):
            documents = self.reader.read(group)
            yield documents
            self.bar.advance(sum(len(document.tokens) for document in group))


def size(document: StoredDocument) -> int:
    """Bytes a document takes in a shard, but for a few."""
    labels = (document.top_tokens_TK, document.top_probs_TK, document.logsumexp_T)
    return sum(tensor.nbytes for tensor in (document.tokens_T, *document.hidden.values(), *labels))
