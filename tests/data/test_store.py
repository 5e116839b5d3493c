from __future__ import annotations

import pickle
import shutil

import pytest
import torch
from safetensors import safe_open

from dynamax.data.fill import fill_store
from dynamax.data.manifest import Manifest, Shard, damage, fingerprint
from dynamax.data.states import StateReader
from dynamax.data.store import Store
from tests.data.small import RandomText

SOURCE = RandomText()


@pytest.fixture(scope="module")
def filled(tmp_path_factory, engine):
    folder = tmp_path_factory.mktemp("store")
    return fill_store(folder, engine, SOURCE, [2, 5], k=4, shard_bytes=6000, progress=False)


@pytest.fixture
def copied(filled, tmp_path):
    return shutil.copytree(filled.folder, tmp_path / "copy")


def same(left, right):
    assert (left.prompt, left.origin, list(left.hidden)) == (right.prompt, right.origin, list(right.hidden))
    for depth, states in left.hidden.items():
        assert torch.equal(states, right.hidden[depth])
    for name in ("tokens_T", "top_tokens_TK", "top_probs_TK", "logsumexp_T"):
        assert torch.equal(getattr(left, name), getattr(right, name))


def test_every_document_comes_back_in_the_source_order(filled, backbone):
    reader = StateReader(backbone, [2, 5], k=4, dtype="float16")
    wanted = [stored for group in SOURCE.groups(None) for stored in reader.read(group)]
    assert len(filled.manifest.shards) > 2
    assert len(filled) == len(wanted) == 30
    for index, document in enumerate(wanted):
        same(filled[index], document)


def test_sizes_are_told(filled):
    documents = SOURCE.documents()
    assert filled.whole
    assert filled.tokens == sum(len(document.tokens) for document in documents)
    assert filled.lengths().tolist() == [len(document.tokens) for document in documents]
    assert filled.bytes == sum(file.stat().st_size for file in filled.folder.glob("shard-*"))
    assert filled.origins().tolist() == [filled[index].origin for index in range(30)]
    assert (filled.exits, filled.k, filled.width) == ((2, 5), 4, 32)


def test_a_shard_is_a_file_others_can_read(filled):
    with safe_open(filled.folder / "shard-00000.safetensors", "pt") as shard:
        assert torch.equal(shard.get_slice("hidden.5")[: len(filled[0].tokens_T)], filled[0].hidden[5])


@pytest.mark.parametrize("limit", [1, 3, 1000])
def test_a_limit_cuts_documents(filled, limit):
    for index in (0, 7, 29):
        short, whole = filled.read(index, limit=limit), filled[index]
        assert torch.equal(short.hidden[2], whole.hidden[2][:limit])
        assert torch.equal(short.logsumexp_T, whole.logsumexp_T[:limit])


@pytest.mark.parametrize("index", [-1, 30])
def test_there_are_no_other_documents(filled, index):
    with pytest.raises(IndexError, match=f"document {index} of a store of 30"):
        filled[index]


def test_a_worker_process_gets_the_folder_and_no_states(filled):
    filled[29]
    content = pickle.dumps(filled)
    assert len(content) < 500
    same(pickle.loads(content)[29], filled[29])


def test_no_store_is_told(tmp_path):
    with pytest.raises(ValueError, match="holds no manifest.json.*dynamax cache"):
        Store(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', "\x00\xff"])
def test_a_damaged_manifest_is_told(copied, content):
    (copied / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="manifest.json is damaged.*Remove the folder"):
        Store(copied)


def test_another_format_is_refused(copied):
    file = copied / "manifest.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(ValueError, match="store format 7; this version reads format 1"):
        Store(copied)


def test_missing_and_shortened_shards_are_named_at_once(copied):
    (copied / "shard-00000.safetensors").unlink()
    with (copied / "shard-00002.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match=r"shard-00000\S+ is missing; shard-00002\S+ has 100 bytes where \d+ were"):
        Store(copied)


def test_a_flipped_bit_is_found_by_verify(copied):
    file = copied / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    store = Store(copied)
    with pytest.raises(ValueError, match="shard-00001.safetensors does not match its checksum"):
        store.verify()


def test_a_whole_store_verifies(filled):
    filled.verify()


def test_damage_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"123456789")
    shard = Shard("a", 9, "cbf43926", 0, 1, 1, 1)  # the check value of CRC-32
    assert damage(tmp_path, shard, checksum=True) is None


def test_an_empty_store_can_be_opened(tmp_path):
    Manifest({"exits": [1], "k": 2, "width": 3}).save(tmp_path)
    store = Store(tmp_path)
    assert (len(store), store.tokens, store.bytes, store.whole) == (0, 0, 0, False)
    assert store.lengths().tolist() == store.origins().tolist() == []


def test_fingerprints_do_not_depend_on_order():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1}) != fingerprint({"a": 1, "b": [3]})
