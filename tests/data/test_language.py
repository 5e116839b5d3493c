from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dynamax.backbones.sources import Folder
from dynamax.data import streams as module
from dynamax.data.fill import tokenizer_hash
from dynamax.data.language import Batches, LanguageData, Portion
from dynamax.data.streams import END, Streams, train_tokenizer
from dynamax.data.text import Corpus, Text
from tests.folders import byte_tokenizer


class Lines(Corpus):
    """Made-up sentences, two to an origin."""

    def __init__(self, name: str, count: int = 120) -> None:
        self.name, self.count = name, count

    def identity(self) -> dict[str, Any]:
        return {"source": "Lines", "name": self.name, "count": self.count}

    def texts(self) -> Iterator[Text]:
        for number in range(self.count):
            yield Text(
                f"{self.name} {number}: the sum of {number} and {number + 1} is {2 * number + 1}.", f"{number // 2}"
            )


def data(folder: Path, **options) -> LanguageData:
    given = {"vocab": 300, "length": 16, "validation": 0.2, "validation_blocks": 6} | options
    portions = given.pop("portions", [Portion(Lines("first")), Portion(Lines("second", 200), 2)])
    made = LanguageData(portions, folder=str(folder), **given)
    made.prepare_data()
    made.setup("fit")
    return made


def drawn(made: LanguageData, count: int) -> list[torch.Tensor]:
    batches = made.train_dataloader()
    return [batches.batch(number) for number in range(count)]


# -- the tokenizer ------------------------------------------------------------------------------------


def test_a_tokenizer_gives_text_back_and_is_the_same_twice() -> None:
    texts = [text for text, _ in Lines("some").texts()]
    first, second = (train_tokenizer(texts, vocab=300) for _ in range(2))
    assert len(first) == 300
    assert first.get_vocab() == second.get_vocab()
    for text in (*texts[:3], "  Größe\n\t42 ½ 🙂", ""):
        assert first.decode(first(text)["input_ids"]) == text
    assert len(first(texts[0])["input_ids"]) < len(texts[0].encode()) / 1.5
    assert first.eos_token == END
    assert first.apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False) == "Question: Who?\nAnswer:"


@pytest.mark.parametrize(("vocab", "told"), [(256, "bytes"), (4096, "tokens only")])
def test_a_vocabulary_that_does_not_fit(vocab: int, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        train_tokenizer(["one text"], vocab=vocab)


# -- streams ------------------------------------------------------------------------------------------


def test_streams_hold_every_text_once_and_origins_stay_together(tmp_path: Path) -> None:
    made = data(tmp_path).streams
    found: dict[str, set[str]] = {}
    for part in ("train", "validation"):
        tokens = made.window(part, 0, 0, made.lengths(part)[0])
        texts = made.tokenizer.decode(tokens).split(END)
        assert texts.pop() == ""
        found[part] = {text.split()[1].rstrip(":") for text in texts}
        assert len(found[part]) == len(texts)
    assert found["train"] | found["validation"] == {str(number) for number in range(120)}
    assert not {int(n) // 2 for n in found["train"]} & {int(n) // 2 for n in found["validation"]}
    assert 0.05 < len(found["validation"]) / 120 < 0.4


def test_the_same_inputs_are_not_read_twice_and_others_are(tmp_path: Path, monkeypatch) -> None:
    data(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    monkeypatch.setattr(Lines, "texts", lambda self: pytest.fail("texts are on disk"))
    data(tmp_path, seed=5, length=8)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    with pytest.raises(pytest.fail.Exception):
        data(tmp_path, vocab=310)


def test_a_run_elsewhere_writes_the_same_bytes(tmp_path: Path) -> None:
    first, second = (data(tmp_path / name).streams.folder for name in "ab")
    assert first.name == second.name
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_interrupted_work_leaves_no_folder(tmp_path: Path, monkeypatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.np, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        data(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert isinstance(data(tmp_path).streams, Streams)


def test_another_models_tokenizer_is_taken_as_it_is(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "model")
    made = data(tmp_path / "text", vocab=None, tokenizer=Folder(str(tmp_path / "model"))).streams
    assert len(made.tokenizer) == 257
    assert made.inputs["tokenizer"] == tokenizer_hash(byte_tokenizer())
    assert "vocab" not in made.inputs
    text = made.tokenizer.decode(made.window("train", 0, 0, 40))
    assert text.startswith("first ")
    assert made.lengths("train") != data(tmp_path / "text").streams.lengths("train")


def test_a_large_vocabulary_takes_four_bytes_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    assert module.encode(["ab"], tokenizer).dtype == np.uint16
    monkeypatch.setattr(module, "SMALL", 256)
    assert module.encode(["ab"], tokenizer).dtype == np.uint32


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="no end of text"):
        data(tmp_path / "text", vocab=None, tokenizer=Folder(str(tmp_path / "model")))


# -- batches ------------------------------------------------------------------------------------------


def test_a_batch_has_the_mixture_and_consecutive_tokens(tmp_path: Path) -> None:
    made = data(tmp_path)
    batch = made.train_dataloader().batch(3)
    assert batch.shape == (3, 16)
    assert batch.dtype == torch.int64
    for row, corpus in zip(batch, (0, 1, 1), strict=True):
        stream = made.streams.window("train", corpus, 0, made.streams.lengths("train")[corpus]).numpy()
        windows = np.lib.stride_tricks.sliding_window_view(stream, 16)
        assert (windows == row.numpy()).all(1).any()


def test_a_pass_takes_every_block_once_and_the_next_cuts_elsewhere(tmp_path: Path) -> None:
    batches = data(tmp_path).train_dataloader()
    blocks = batches.blocks[0]
    rows = [tuple(batches.batch(number)[0].tolist()) for number in range(2 * blocks)]
    starts = Counter(rows[:blocks])
    assert max(starts.values()) == 1
    assert set(rows[:blocks]) != set(rows[blocks:])
    assert len(set(rows[blocks:])) == blocks


def test_order_follows_the_seed(tmp_path: Path) -> None:
    first, again, other = (torch.stack(drawn(data(tmp_path, seed=seed), 5)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batches_go_on_where_they_stopped(tmp_path: Path) -> None:
    made = data(tmp_path)
    batches = made.train_dataloader()
    size = len(batches)
    whole = [batch for _ in range(2) for batch in batches]
    assert len(whole) == 2 * size == batches.drawn
    for stop in (1, size - 1, size, size + 2):
        resumed = Batches(made.streams, made.rows, length=16, seed=0)
        resumed.load_state_dict({"drawn": stop})
        rest = list(resumed)
        assert len(rest) == size - stop % size
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[stop:], strict=False))


def test_validation_is_the_same_each_time_in_the_mixture(tmp_path: Path) -> None:
    made = data(tmp_path)
    first, second = (list(made.val_dataloader()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert sum(map(len, first)) == 6
    assert all(batch.shape[1] == 16 for batch in first)


# -- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"portions": []}, "no portions"),
        ({"portions": [Portion(Lines("x"), 0)]}, "rows=0"),
        ({"validation": 0.0}, "validation=0.0"),
        ({"length": 1}, "length=1"),
        ({"validation_blocks": 0}, "validation_blocks=0"),
        ({"vocab": 70_000}, "vocabulary of 70000"),
        ({"tokenizer": Folder("nowhere")}, "vocab=300 was given beside a tokenizer"),
        ({"length": 5000}, "too few for blocks of 5000"),
        ({"portions": [Portion(Lines("x", 1))]}, "leaves no text of Lines"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path: Path, options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        data(tmp_path, **options)
