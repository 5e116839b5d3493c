from __future__ import annotations

from collections.abc import Iterable

import jsonargparse
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from dynamax.backbones.sources import Folder, Source
from dynamax.data.batch import HiddenBatch, LengthBuckets, collate
from dynamax.data.fill import fill_store, find_store, store_folder
from dynamax.data.hidden import HiddenStates
from dynamax.data.store import Manifest
from dynamax.data.text import TextSource, held_out
from dynamax.errors import UserError
from tests.data.small import VOCAB, RandomText
from tests.tiny import tiny


class Counted(RandomText):
    """Tells how often text was asked for."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", dtype=torch.float32, vocab=VOCAB).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(model_folder, tmp_path):
    def make(**options):
        options = {"k": 4, "batch_size": 4, "validation": 0.3, "folder": str(tmp_path), **options}
        return HiddenStates(Folder(model_folder), options.pop("text", RandomText(groups=8)), [5, 2], **options)

    return make


def ready(module: HiddenStates) -> HiddenStates:
    module.prepare_data()
    module.setup("fit")
    return module


def numbers(loader: Iterable[HiddenBatch]) -> list[int]:
    return [number for batch in loader for number in batch.documents_B.tolist()]


# -- batches ------------------------------------------------------------------------------------


def test_padding_and_answers_are_marked(tmp_path, engine):
    source = RandomText(groups=2)
    store = fill_store(tmp_path, engine, source, [2, 5], k=4, progress=False)
    documents = source.documents()
    batch = collate([store[number] for number in range(10)], list(range(10)))
    longest = max(len(document.tokens) for document in documents)
    assert batch.tokens_BT.shape == batch.live_BT.shape == batch.answer_BT.shape == (10, longest)
    assert batch.top_tokens_BTK.shape == batch.top_probs_BTK.shape == (10, longest, 4)
    assert batch.hidden[5].shape == (10, longest, 32)
    assert len(batch) == 10
    assert torch.equal(batch.origins_B, store.origins()[:10])
    for row, document in enumerate(documents):
        length, stored = len(document.tokens), store[row]
        assert batch.live_BT[row].tolist() == [t < length for t in range(longest)]
        generated = range(document.prompt, length)  # tokens that were not given
        assert batch.answer_BT[row].nonzero()[:, 0].tolist() == [t - 1 for t in generated if t > 0]
        assert batch.tokens_BT[row, :length].tolist() == document.tokens
        assert torch.equal(batch.hidden[5][row, :length], stored.hidden[5].float())
        assert torch.equal(batch.top_tokens_BTK[row, :length].int(), stored.top_tokens_TK)
        assert not batch.hidden[5][row, length:].any()
    assert batch.hidden[2].dtype == batch.top_probs_BTK.dtype == torch.float32
    assert batch.tokens_BT.dtype == batch.top_tokens_BTK.dtype == torch.int64


def test_one_document_of_one_token(tmp_path, engine):
    store = fill_store(tmp_path, engine, RandomText(1, 1, 1), [2], k=1, progress=False)
    batch = collate([store[0]], [0])
    assert batch.live_BT.tolist() == [[True]]
    assert batch.answer_BT.tolist() == [[False]]


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize(("count", "size"), [(1, 4), (8, 4), (301, 4), (5, 1), (3, 100)])
def test_buckets_hold_every_document_once(count, size, seed):
    lengths = torch.randint(1, 90, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    buckets = LengthBuckets(lengths, batch_size=size, seed=seed)
    batches = list(buckets)
    assert sorted(sum(batches, [])) == list(range(count))
    assert len(batches) == len(buckets)
    assert sum(len(batch) < size for batch in batches) <= 1 + count // (32 * size)


def test_buckets_pad_little_and_change_with_the_epoch():
    lengths = torch.randint(1, 200, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    buckets = LengthBuckets(lengths, batch_size=8, seed=3)
    first = list(buckets)
    padded = sum(len(batch) * max(lengths[number] for number in batch) for batch in first)
    assert padded < 1.1 * sum(lengths)
    assert list(buckets) == first
    buckets.set_epoch(1)
    assert list(buckets) != first
    buckets.set_epoch(0)
    assert list(buckets) == first
    assert first != list(LengthBuckets(lengths, batch_size=8, seed=4))


# -- the module ---------------------------------------------------------------------------------


def test_both_sides_together_hold_every_document_once(data):
    module = ready(data())
    train, held = numbers(module.train_dataloader()), numbers(module.val_dataloader())
    assert sorted(train + held) == list(range(40))
    assert train
    assert held
    assert numbers(module.val_dataloader()) == held


def test_no_origin_stands_on_both_sides(data):
    text = RandomText(groups=8)
    module = ready(data(text=text))
    origins = [document.origin for document in text.documents()]
    train, held = numbers(module.train_dataloader()), numbers(module.val_dataloader())
    assert origins.count("shared") == 16
    assert not {origins[number] for number in train} & {origins[number] for number in held}


def test_the_split_has_the_part_asked_for_and_only_grows():
    origins_N = torch.randint(-(2**63), 2**63 - 1, (20000,), generator=torch.Generator().manual_seed(0))
    tenth, third = held_out(origins_N, 0.1), held_out(origins_N, 0.3)
    assert tenth.double().mean() == pytest.approx(0.1, abs=0.01)
    assert third.double().mean() == pytest.approx(0.3, abs=0.01)
    assert (third | ~tenth).all()
    assert held_out(torch.tensor([-(2**63), 2**63 - 1]), 0.5).tolist() == [True, False]


def test_the_backbone_is_loaded_only_while_something_is_missing(data, monkeypatch):
    loads = []
    load = Folder.load
    monkeypatch.setattr(Folder, "load", lambda *args, **options: loads.append(1) or load(*args, **options))
    ready(data())
    assert loads == [1]
    ready(data())
    assert loads == [1]
    ready(data(text=RandomText(groups=8, seed=1)))
    assert loads == [1, 1]


def test_a_half_precision_backbone_is_read_out_in_float32(data):
    half, whole = ready(data(compute="bfloat16")), ready(data())
    (batch,) = [next(iter(module.val_dataloader())) for module in (half,)]
    exact = next(iter(whole.val_dataloader()))
    assert torch.equal(batch.tokens_BT, exact.tokens_BT)
    assert not torch.equal(batch.hidden[2], exact.hidden[2])
    torch.testing.assert_close(batch.hidden[2], exact.hidden[2], rtol=0.1, atol=0.2)
    probs_N = batch.top_probs_BTK[batch.answer_BT].flatten()
    assert len(probs_N.unique()) > 0.95 * len(probs_N)  # bfloat16 logits would tie


@pytest.mark.slow
@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="FBGEMM is on x86 alone")
def test_a_precision_fills_a_store_of_its_own_with_labels_in_float32(data):
    packed, whole = ready(data(precision="float16", device="cpu")), ready(data(device="cpu"))
    with pytest.raises(UserError, match=r"computes in bfloat16.*float32"):
        ready(data(precision="int8", compute="bfloat16", device="cpu"))
    found, exact = (next(iter(module.val_dataloader())) for module in (packed, whole))
    assert torch.equal(found.tokens_BT, exact.tokens_BT)
    assert not torch.equal(found.hidden[2], exact.hidden[2])
    torch.testing.assert_close(found.hidden[2], exact.hidden[2], rtol=1e-2, atol=2e-2)
    assert found.top_probs_BTK.dtype == found.hidden[2].dtype == torch.float32
    folders = {store_folder(module.folder, module._inputs) for module in (packed, whole)}
    manifests = {Manifest.load(folder).inputs.get("precision"): Manifest.load(folder) for folder in folders}
    assert set(manifests) == {None, "float16"}
    assert manifests["float16"].versions["weights"] == "float16"
    assert "weights" not in manifests[None].versions
    assert find_store(packed.folder, packed._inputs) is not None
    assert find_store(packed.folder, data(precision="auto")._inputs) is None


def test_max_length_cuts_documents(data):
    module = ready(data(max_length=5))
    batches = [*module.train_dataloader(), *module.val_dataloader()]
    assert max(batch.tokens_BT.shape[1] for batch in batches) == 5
    assert sorted(number for batch in batches for number in batch.documents_B.tolist()) == list(range(40))


def test_worker_processes_read_the_same(data):
    module, alone = ready(data(workers=1)), ready(data())
    for found, wanted in zip(module.val_dataloader(), alone.val_dataloader(), strict=True):
        assert torch.equal(found.hidden[2], wanted.hidden[2])


def test_an_empty_side_is_refused(data):
    with pytest.raises(ValueError, match="leaves no documents for validation: the store has 40 documents of"):
        ready(data(validation=1e-9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 0.0}, "validation=0.0"),
        ({"validation": 1.0}, "validation=1.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 0}, "max_length=0"),
        ({"workers": -1}, "workers=-1"),
        ({"precision": "float8"}, "precision 'float8' was given; one of auto, float32, float16, .* is wanted"),
    ],
)
def test_bad_options_are_refused_at_once(data, options, message):
    with pytest.raises(ValueError, match=message):
        data(**options)


def test_an_exit_outside_the_model_is_refused_before_the_backbone_is_loaded(model_folder, tmp_path, monkeypatch):
    monkeypatch.delattr(HiddenStates, "fill")
    with pytest.raises(ValueError, match=r"\[7\] of \[2, 7\].*6 blocks"):
        HiddenStates(Folder(model_folder), RandomText(), [2, 7], folder=str(tmp_path)).prepare_data()


class Watcher(LightningModule):
    """Remembers the batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.epochs: list[list[int]] = []

    def on_train_epoch_start(self) -> None:
        self.epochs.append([])

    def training_step(self, batch: HiddenBatch, index: int) -> torch.Tensor:
        assert isinstance(batch, HiddenBatch)
        self.epochs[-1] += batch.documents_B.tolist()
        return self.weight * batch.hidden[2].sum()

    def validation_step(self, batch: HiddenBatch, index: int) -> None:
        assert isinstance(batch, HiddenBatch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_lightning_trains_on_it_in_another_order_each_epoch(data, tmp_path):
    watcher = Watcher()
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(watcher, datamodule=data())
    first, second = watcher.epochs
    assert sorted(first) == sorted(second)
    assert first != second


def test_batches_move(data):
    batch = next(iter(ready(data()).val_dataloader())).to("meta")
    assert {tensor.device.type for tensor in (batch.tokens_BT, batch.hidden[2], batch.live_BT)} == {"meta"}


def test_yaml_composes_it(model_folder, tmp_path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(HiddenStates, "data")
    config = {
        "backbone": {"class_path": "dynamax.backbones.sources.Folder", "init_args": {"path": model_folder}},
        "text": {"class_path": "dynamax.data.generated.SelfGenerated", "init_args": {"documents": 3, "chat": False}},
        "exits": [2],
        "folder": str(tmp_path),
    }
    module = parser.instantiate(parser.parse_object({"data": config})).data
    assert isinstance(module.backbone, Source)
    assert isinstance(module.text, TextSource)
    assert (module.text.documents, module.text.chat, module.exits) == (3, False, [2])
    local = {"class_path": "dynamax.data.corpora.LocalText", "init_args": {"path": "a.txt", "sample_by": "line"}}
    assert parser.instantiate(parser.parse_object({"data": {**config, "text": local}})).data.text.sample_by == "line"


@pytest.mark.parametrize("given", [1, 3])
def test_a_loader_goes_on_in_the_middle_of_its_epoch_and_only_there(data, given):
    loader, again = (ready(data(batch_size=4)).train_dataloader() for _ in range(2))
    loader.sampler.set_epoch(5)
    assert len(loader) > 3
    whole = [batch.documents_B.tolist() for batch in loader]
    batches = iter(loader)
    for _ in range(given):
        next(batches)
    again.load_state_dict(loader.state_dict())
    again.sampler.set_epoch(5)
    assert [batch.documents_B.tolist() for batch in again] == whole[given:]
    assert [batch.documents_B.tolist() for batch in again] == whole, "once only"
    again.load_state_dict(loader.state_dict())
    again.sampler.set_epoch(6)
    assert len(numbers(again)) == sum(map(len, whole)), "another epoch is whole"
