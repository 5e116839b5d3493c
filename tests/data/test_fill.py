from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import GenerationConfig

from dynamax.backbones.precision import Choice
from dynamax.data import fill as module
from dynamax.data.fill import fill_store, find_store, locked, store_folder, store_inputs, tokenizer_hash
from dynamax.data.generated import SelfGenerated
from dynamax.data.store import Manifest, Store
from dynamax.data.text import TextSource
from dynamax.engine import Engine
from dynamax.errors import UserError
from tests.data.filling import fill as fill_slowly
from tests.data.small import TEMPLATE, RandomText, characters, small_backbone

ROOT = Path(__file__).parents[2]


def fill(folder, engine, source=None, exits=(2, 5), **options):
    options = {"k": 4, "shard_bytes": 6000, "progress": False, **options}
    return fill_store(folder, engine, source or RandomText(), exits, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "lock"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, engine):
    return contents(fill(tmp_path_factory.mktemp("whole"), engine).folder)


def test_a_second_run_finds_all_there(tmp_path, engine, uninterrupted):
    fill(tmp_path, engine)
    again = RandomText()
    store = fill(tmp_path, engine, again)
    assert again.asked == []
    assert contents(store.folder) == uninterrupted


CHANGES = {
    "backbone": {"engine": Engine(small_backbone(seed=1), characters())},
    "tokenizer": {"engine": Engine(small_backbone(), characters(TEMPLATE + "!"))},
    "end tokens": {"engine": Engine(small_backbone(), characters(), None, GenerationConfig(eos_token_id=[1, 5]))},
    "text": {"source": RandomText(seed=1)},
    "exits": {"exits": (2, 4)},
    "k": {"k": 5},
    "dtype": {"dtype": "bfloat16"},
    "precision": {"precision": "float32"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_input_is_a_new_folder(tmp_path, engine, change):
    one = RandomText(groups=1)
    options = {"engine": engine, "source": one}
    first, second = fill(tmp_path, **options), fill(tmp_path, **{**options, **change})
    assert first.folder != second.folder
    assert first.folder.parent == second.folder.parent == tmp_path
    assert first.folder.name.startswith("llama-")
    assert fill(tmp_path, **options).folder == first.folder


def test_the_order_of_exits_is_no_change(tmp_path, engine):
    one = RandomText(groups=1)
    assert fill(tmp_path, engine, one, (5, 2)).folder == fill(tmp_path, engine, one).folder


def test_the_manifest_tells_what_went_in(uninterrupted, engine):
    manifest = json.loads(uninterrupted["manifest.json"])
    assert manifest["inputs"]["backbone"] == engine.backbone.spec.fingerprint
    assert manifest["inputs"]["tokenizer"] == tokenizer_hash(engine.tokenizer)
    assert manifest["inputs"]["text"] == RandomText().identity()
    assert (manifest["inputs"]["exits"], manifest["inputs"]["k"], manifest["inputs"]["dtype"]) == ([2, 5], 4, "float16")
    assert manifest["inputs"]["compute"] == "float32"
    assert set(manifest["versions"]) == {"dynamax", "torch", "transformers"}


def held_in(precision: str) -> Engine:
    """The small model as ``auto`` would give it on a machine where this precision is the fastest."""
    return Engine(small_backbone(), characters(), precision=Choice(precision, "Rows", {}))


def test_what_auto_took_is_noted_and_a_store_goes_on_with_nothing_else(tmp_path):
    readout = small_backbone().site(6)
    options = {"precision": "auto", "readout": readout}
    source = RandomText()
    with patch.object(module.StoreWriter, "finish", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        fill(tmp_path, held_in("float16"), source, **options)
    with pytest.raises(
        UserError, match=r"begun with weights in float16, and here precision=auto holds them in float32"
    ):
        fill(tmp_path, held_in("float32"), source, **options)
    store = fill(tmp_path, held_in("float16"), source, **options)
    assert (store.manifest.inputs["precision"], store.manifest.versions["weights"]) == ("auto", "float16")


def test_coarser_weights_need_a_readout_in_float32(tmp_path):
    with pytest.raises(UserError, match=r"holds its weights in int8, and labels are made in float32. Give a readout"):
        fill(tmp_path, held_in("int8"), precision="int8")


def test_answers_bring_their_states_along(tmp_path, engine):
    """The store of answers that were just written is that of the same answers read anew."""
    source = SelfGenerated(questions=7, passages=0, documents=20, max_new_tokens=6, batch=8, temperature=3.0)
    with patch.object(type(engine.backbone), "embed", autospec=True, side_effect=type(engine.backbone).embed) as embed:
        written = fill(tmp_path / "written", engine, source)
        alone = sum(call.args[1].numel() for call in embed.call_args_list)
    length = sum(len(document.tokens) for group in source.groups(engine) for document in group)
    with patch.object(SelfGenerated, "groups_with_states", TextSource.groups_with_states):
        read = fill(tmp_path / "read", engine, source)
    assert (
        length <= alone < 1.1 * length
    )  # each token once, the last one too; and padding where prompts are read together
    for found, wanted in zip(written, read, strict=True):
        torch.testing.assert_close(vars(found), vars(wanted), rtol=2e-3, atol=2e-3)


# -- interruptions ------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours may clean up after it."""


def crash_points(run) -> int:
    """How often a run asks the system for something."""
    return Crash(10**9).during(run)


class Crash:
    """Lets the n-th fsync or rename of a run fail, before or after it is done; by default as a kill would."""

    def __init__(self, at: int, *, after: bool = False, error: BaseException | None = None) -> None:
        self.at, self.after, self.error, self.seen = at, after, error or Killed(), 0

    def during(self, run) -> int:
        fsync, replace = os.fsync, Path.replace
        with (
            patch.object(os, "fsync", lambda handle: self._call(fsync, handle)),
            patch.object(Path, "replace", lambda path, target: self._call(replace, path, target)),
        ):
            run()
        return self.seen

    def _call(self, real, *args):
        self.seen += 1
        if self.seen == self.at and not self.after:
            raise self.error
        real(*args)
        if self.seen == self.at:
            raise self.error


@pytest.mark.slow
def test_a_run_that_dies_at_any_point_is_continued_to_the_same_bytes(tmp_path, engine, uninterrupted):
    points = crash_points(lambda: fill(tmp_path / "count", engine))
    assert points > 20
    for point in range(1, points + 1):
        folder = tmp_path / str(point)
        for after in (False, True):
            with pytest.raises(Killed):
                Crash(1 if after else point, after=after).during(lambda: fill(folder, engine))  # noqa: B023
            if point == points:
                break  # with the last point done nothing is left to crash
        assert contents(fill(folder, engine).folder) == uninterrupted, f"crash at point {point}"


def test_a_resumed_run_makes_no_group_twice(tmp_path, engine):
    with pytest.raises(Killed):
        Crash(12).during(lambda: fill(tmp_path, engine))
    (folder,) = tmp_path.iterdir()
    done = Manifest.load(folder).next_group
    assert done > 0
    rest = RandomText()
    fill(tmp_path, engine, rest)
    assert rest.asked == list(range(done, 6))


def test_what_an_interrupted_run_left_can_be_read(tmp_path, engine):
    with pytest.raises(Killed):
        Crash(12).during(lambda: fill(tmp_path, engine))
    store = Store(next(tmp_path.iterdir()))
    assert not store.manifest.whole
    assert 0 < len(store) < 30
    store.verify()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_run_that_is_stopped_before_a_shard_is_full_says_that_nothing_is_kept(tmp_path, engine, caplog, error):
    with pytest.raises(type(error)):
        Crash(1, error=error).during(lambda: fill(tmp_path, engine))
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("Stopped. No documents are kept yet")


def test_an_interrupted_run_tells_what_is_kept_and_goes_on(tmp_path, engine, uninterrupted, caplog):
    with pytest.raises(KeyboardInterrupt):
        Crash(12, error=KeyboardInterrupt()).during(lambda: fill(tmp_path, engine))
    (folder,) = tmp_path.iterdir()
    done = Manifest.load(folder).next_group
    assert 0 < done < 6
    told = f"Stopped. {done} of 6 groups of documents are kept; run the same command to go on."
    assert [record.getMessage() for record in caplog.records] == [told]
    assert contents(fill(tmp_path, engine).folder) == uninterrupted


@pytest.mark.slow
def test_kill_9_and_the_lock_of_a_dead_process(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-m", "tests.data.filling", tmp_path], cwd=ROOT, env=environment)
    wait_for(lambda: len(list(tmp_path.glob("*/shard-*.safetensors"))) >= 3, child)
    with pytest.raises(ValueError, match=f"pid {child.pid}"):
        fill_slowly(str(tmp_path), 0)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    (folder,) = tmp_path.iterdir()
    assert (folder / "lock").read_text() == str(child.pid)  # left behind, and in nobody's way
    assert not Manifest.load(folder).whole
    resumed = fill_slowly(str(tmp_path), 0)
    assert contents(resumed.folder) == contents(fill_slowly(str(tmp_path / "fresh"), 0).folder)


def wait_for(condition, child: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, "the child ended of its own accord"
        assert time.monotonic() < end, "nothing was written in time"
        time.sleep(0.01)


# -- damage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_damaged_shards_are_named_and_made_again(tmp_path, engine, uninterrupted, caplog, how):
    folder = fill(tmp_path, engine).folder
    file = folder / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content if how == "flip" else content[:50])
    if how == "remove":
        file.unlink()
    inputs = Manifest.load(folder).inputs
    assert find_store(tmp_path, inputs) is None
    source = RandomText()
    with caplog.at_level(logging.WARNING):
        fill(tmp_path, engine, source)
    assert "shard-00001.safetensors" in caplog.text
    assert "made again" in caplog.text
    assert 0 < len(source.asked) < 6
    assert contents(folder) == uninterrupted
    assert find_store(tmp_path, inputs) is not None


def test_an_unfinished_store_is_mended_before_it_goes_on(tmp_path, engine, uninterrupted):
    with pytest.raises(Killed):
        Crash(16).during(lambda: fill(tmp_path, engine))
    (folder,) = tmp_path.iterdir()
    (folder / "shard-00000.safetensors").write_bytes(b"not a shard")
    assert contents(fill(tmp_path, engine).folder) == uninterrupted


def test_find_store_wants_it_whole(tmp_path, engine):
    spec, options = engine.backbone.spec, {"k": 4, "dtype": "float16", "compute": "float32"}
    inputs = store_inputs(spec, engine.tokenizer, None, RandomText(), [2, 5], **options)
    assert find_store(tmp_path, inputs) is None
    with pytest.raises(Killed):
        Crash(12).during(lambda: fill(tmp_path, engine))
    assert store_folder(tmp_path, inputs).is_dir()
    assert find_store(tmp_path, inputs) is None
    fill(tmp_path, engine)
    assert len(find_store(tmp_path, inputs)) == 30


# -- full disk, lock, empty source --------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("point", [13, 16], ids=["shard", "manifest"])
def test_a_full_disk_is_told_and_what_was_written_stays(tmp_path, engine, uninterrupted, code, point):
    full = Crash(point, error=OSError(code, "No space left on device"))
    with pytest.raises(OSError, match="Free some space") as caught:
        full.during(lambda: fill(tmp_path, engine))
    assert caught.value.errno == code
    (folder,) = tmp_path.iterdir()
    assert not list(folder.glob("*.part"))
    store = Store(folder)
    assert f"{len(store.manifest.shards)} shards with {len(store)} documents" in str(caught.value)
    assert len(store) > 0
    store.verify()
    assert contents(fill(tmp_path, engine).folder) == uninterrupted


def test_a_really_full_disk(tmp_path, engine, uninterrupted):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a small file system could not be mounted: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(OSError, match="shards with .* documents are whole and stay"):
            fill(tmp_path, engine)
        (folder,) = tmp_path.iterdir()
        assert not list(folder.glob("*.part"))
        store = Store(folder)
        assert len(store) > 0
        store.verify()
        subprocess.run(["mount", "-o", "remount,size=10m", tmp_path], check=True)
        assert contents(fill(tmp_path, engine).folder) == uninterrupted
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_other_errors_of_the_disk_are_passed_on(tmp_path, engine):
    def fails(file, content):
        raise OSError(errno.EIO, "the disk broke")

    with patch.object(module, "write_atomically", fails), pytest.raises(OSError, match="the disk broke"):
        fill(tmp_path, engine)


def test_two_writers_of_one_folder_are_refused(tmp_path, engine):
    folder = fill(tmp_path, engine, RandomText(groups=1)).folder
    with locked(folder), pytest.raises(ValueError, match=rf"written by another process \(pid {os.getpid()}\).*Wait"):
        fill(tmp_path, engine, RandomText(groups=1))


def test_a_source_without_documents_is_refused(tmp_path, engine):
    with pytest.raises(ValueError, match="RandomText gave no documents"):
        fill(tmp_path, engine, RandomText(groups=0))
