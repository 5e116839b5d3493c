"""Fills a store from a text source, goes on where it was interrupted, repairs what is damaged.

A shard is written under another name, reaches the disk, gets its name, and only then enters the manifest, which is
replaced in one step. If the process is killed between any two of these, the next run finds the shards of the manifest
whole and removes the rest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, final

import torch
import transformers
from safetensors.torch import save
from transformers import GenerationConfig, PreTrainedTokenizerBase

import dynamax
from dynamax.data.states import StateReader, StoreDtype, check_exits
from dynamax.data.store import NAME, Manifest, Shard, Store, StoredDocument, fingerprint
from dynamax.data.text import TextSource
from dynamax.decoding.sampling import Greedy
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.files import write_atomically
from dynamax.generation import generation_options
from dynamax.progress import Bar
from dynamax.types import Site, Spec

SHARD_BYTES = 32 << 20
LOCK = "lock"
logger = logging.getLogger(__name__)


def fill_store(
    folder: str | Path,
    engine: Engine,
    source: TextSource,
    exits: Sequence[int],
    *,
    k: int = 16,
    dtype: StoreDtype = "float16",
    precision: str | None = None,
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
        precision: How the engine was asked to hold its weights; None for as they were loaded.
        readout: The final norm and output matrix in float32, for a backbone in half precision or with packed weights.
        shard_bytes: Size from which a shard is closed; a kill loses at most one shard's work.
        progress: Show a bar with tokens a second and time left.

    Raises:
        UserError: For bad options, a source without documents, a folder another process is writing, or a store that
            was begun where ``auto`` held weights otherwise.
        OSError: If the disk is full; what was written stays usable.
    """
    assert engine.tokenizer is not None, "text is read through a tokenizer"
    held = None if engine.precision is None else engine.precision.precision
    if readout is None and held not in (None, "float32"):
        raise UserError(
            f"The engine holds its weights in {held}, and labels are made in float32. Give a readout in float32 "
            f"(Source.output_stage().site(depth)), or load the engine without a precision."
        )
    reader = StateReader(engine.backbone, exits, k=k, dtype=dtype, readout=readout)
    spec, compute = engine.backbone.spec, str(engine.dtype).removeprefix("torch.")
    inputs = store_inputs(
        spec,
        engine.tokenizer,
        engine.generation_config,
        source,
        exits,
        k=k,
        dtype=dtype,
        compute=compute,
        precision=precision,
    )
    versions = {"dynamax": dynamax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    if precision is not None:
        versions["weights"] = held or compute
    path, groups = store_folder(folder, inputs), source.count()
    layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    layout = layout if groups else None
    with locked(path), Bar(desc="store", total=groups, disable=not progress, bar_format=layout) as bar:
        writer = StoreWriter(path, Manifest(inputs, versions))
        check_weights(path, writer.manifest, versions.get("weights"))
        filler = Filler(reader, engine, source, writer, bar)
        source.tell = filler.tell
        try:
            filler.repair()
            if not writer.manifest.whole:
                filler.extend(shard_bytes)
        except (KeyboardInterrupt, SystemExit):  # a shard that is not full is dropped, since it would end elsewhere
            logger.warning("Stopped. %s", _kept(writer.manifest.next_group, groups))
            raise
    return Store(path)


def _kept(done: int, groups: int | None) -> str:
    if not done:
        return "No documents are kept yet, fewer than fill a shard; run the same command to begin anew."
    share = f"{done}" if groups is None else f"{done} of {groups}"
    return f"{share} groups of documents are kept; run the same command to go on."


def check_weights(path: Path, manifest: Manifest, weights: str | None) -> None:
    """Refuse (UserError) to go on with a store that was begun with other weights: ``auto`` may take others here."""
    begun = manifest.versions.get("weights")
    if begun != weights:
        raise UserError(
            f"The store {path} was begun with weights in {begun}, and here precision={manifest.inputs['precision']} "
            f"holds them in {weights}. Go on where it was begun; or remove the folder, and the next run fills it anew."
        )


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
    precision: str | None = None,
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
        precision: How its weights were asked to be held; None, which is not entered, for as they were loaded.
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
        **({} if precision is None else {"precision": precision}),
    }


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash over all that turns text into tokens: vocabulary, rules, special tokens, chat template."""
    facts = [
        *(sorted(tokenizer.get_vocab().items()), _rules(tokenizer)),
        *(tokenizer.special_tokens_map, tokenizer.chat_template),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How a text is taken apart, and what is put around it; not the state that calls leave behind."""
    known: Any = tokenizer
    rules = {"split_special_tokens": getattr(known, "split_special_tokens", False)}
    if hasattr(known, "backend_tokenizer"):
        own = json.loads(known.backend_tokenizer.to_str())
        return rules | {name: rule for name, rule in own.items() if name not in ("truncation", "padding")}
    return rules | {name: value for name, value in known.init_kwargs.items() if isinstance(value, bool)}


@final
class Filler:
    """Brings documents from source to shards, with a progress bar over the source's groups."""

    def __init__(self, reader: StateReader, engine: Engine, source: TextSource, writer: StoreWriter, bar: Bar) -> None:
        self.reader, self.engine, self.source, self.writer, self.bar = reader, engine, source, writer, bar
        self.tokens, self.begun = 0, perf_counter()

    def tell(self, text: str) -> None:
        """Show behind the bar what is being done."""
        self.bar.say(", ".join(filter(None, [self._rate(), text])))

    def _rate(self) -> str:
        return f"{self.tokens / (perf_counter() - self.begun):,.0f} tokens/s" if self.tokens else ""

    def repair(self) -> None:
        """Make damaged shards again, from the groups they held."""
        manifest = self.writer.manifest
        for number, problem in manifest.damaged(self.writer.folder, checksums=True).items():
            shard = manifest.shards[number]
            logger.warning("%s %s. It is made again.", self.writer.folder / shard.file, problem)
            groups = islice(self._groups(shard.first_group), shard.stop_group - shard.first_group)
            documents = [document for group in groups for document in group]
            self.writer.write(documents, (shard.first_group, shard.stop_group), number=number)

    def extend(self, shard_bytes: int) -> None:
        """Continue after the last whole shard, to the end of the source.

        Raises:
            UserError: If the source has no documents.
        """
        manifest = self.writer.manifest
        first = stop = manifest.next_group
        self.bar.initial = self.bar.n = first
        self.bar.refresh()
        pending: list[StoredDocument] = []
        for stop, documents in enumerate(self._groups(first), first + 1):
            pending += documents
            if sum(document.nbytes for document in pending) >= shard_bytes:
                self.writer.write(pending, (manifest.next_group, stop))
                pending = []
        if pending:
            self.writer.write(pending, (manifest.next_group, stop))
        if not manifest.shards:
            raise UserError(
                f"{type(self.source).__name__} gave no documents: {json.dumps(self.source.identity())}. "
                f"Give it data with at least one row of text."
            )
        self.writer.finish()

    def _groups(self, first: int) -> Iterator[list[StoredDocument]]:
        depths = sorted({*self.reader.exits, self.engine.backbone.spec.depth})
        for group in self.source.groups_with_states(self.engine, depths, skip=first):
            self.tell("making labels" if group and group[0].hidden else "reading documents")
            yield self.reader.read(group)
            self.tokens += sum(len(document.tokens) for document in group)
            self.bar.set_postfix_str(self._rate(), refresh=False)
            self.bar.update()


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

    def write(self, documents: Sequence[StoredDocument], groups: tuple[int, int], *, number: int | None = None) -> None:
        """Write one shard and enter it in the manifest.

        Args:
            documents: What goes in; see ``dynamax.data.store`` for the layout.
            groups: First group of the source that is in it, and the group after its last.
            number: Number of the shard that it replaces; None for a new one.
        """
        columns = {
            "tokens": torch.cat([document.tokens_T for document in documents]),
            "top_tokens": torch.cat([document.top_tokens_TK for document in documents]),
            "top_probs": torch.cat([document.top_probs_TK for document in documents]),
            "logsumexp": torch.cat([document.logsumexp_T for document in documents]),
            "stops": torch.tensor([len(document.tokens_T) for document in documents]).cumsum(0),
            "prompts": torch.tensor([document.prompt for document in documents], dtype=torch.int32),
            "origins": torch.tensor([document.origin for document in documents]),
        }
        for depth in documents[0].hidden:
            columns[f"hidden.{depth}"] = torch.cat([document.hidden[depth] for document in documents])
        content, tokens, shards = save(columns), len(columns["tokens"]), self.manifest.shards
        name = f"shard-{len(shards) if number is None else number:05d}.safetensors"
        shard = Shard(name, len(content), f"{zlib.crc32(content):08x}", *groups, len(documents), tokens)
        with self._full_disk_explained():
            write_atomically(self.folder / name, content)
            if number is None:
                shards.append(shard)
            else:
                shards[number] = shard
            self.manifest.save(self.folder)

    def finish(self) -> None:
        """Enter in the manifest that the source has come to its end."""
        self.manifest.whole = True
        with self._full_disk_explained():
            self.manifest.save(self.folder)

    @contextlib.contextmanager
    def _full_disk_explained(self) -> Iterator[None]:
        shards, documents = len(self.manifest.shards), self.manifest.documents
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"No space left for the store {self.folder}. {shards} shards with {documents} documents are whole and "
                f"stay. Free some space and run again, and it goes on from there; or name a folder on another disk",
            ) from error


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
