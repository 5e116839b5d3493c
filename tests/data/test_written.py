"""Text that is written as it is needed: whatever was there before, the same batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dynamax.backbones.sources import Folder
from dynamax.data import written
from dynamax.data.generated import SelfGenerated
from dynamax.data.text import Document, held_out, origin_hash
from dynamax.data.written import WrittenText, batch_of
from tests.folders import model_folder


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> Folder:
    return Folder(str(model_folder(tmp_path_factory.mktemp("writer"), depth=2)))


def text(writer: Folder, folder: Path, **options) -> WrittenText:
    given = {"precision": None, "rows": 3, "validation": 0.4, "validation_documents": 6} | options
    asked = [SelfGenerated(questions=12, passages=0, documents=14, max_new_tokens=5, batch=4)]
    asked += [SelfGenerated(questions=12, passages=0, documents=4, max_new_tokens=3, batch=4, chat=False)]
    return WrittenText(writer, asked, folder=str(folder), **given)


def batches(data: WrittenText, numbers: range) -> list[list]:
    loader = data.train_dataloader()
    return [[part.tolist() for part in loader.batch(number)] for number in numbers]


def test_sets_take_turns_and_documents_fill_whole_batches(writer: Folder, tmp_path: Path) -> None:
    data = text(writer, tmp_path)
    assert data.train.plan == [(0, 0), (1, 0), (0, 1), (0, 2), (0, 3)]
    loader = data.train_dataloader()
    assert len(loader) == 5 * 2
    rows = [len(loader.batch(number).tokens_BT) for number in range(len(loader))]
    assert rows == [3, 1] * 5, "16 and 4 documents"
    assert batches(data, range(10, 20)) == batches(data, range(10)), "a second pass"


def test_batches_do_not_depend_on_what_was_written_before(writer: Folder, tmp_path: Path) -> None:
    whole, needed = text(writer, tmp_path / "whole"), text(writer, tmp_path / "needed")
    whole.write_all()
    wanted = batches(whole, range(10))
    assert batches(needed, range(7, 3, -1)) == wanted[7:3:-1]
    files = {path.name: path.read_bytes() for path in (tmp_path / "needed").rglob("*.npz")}
    assert len(files) == 2, "only what was read is there: one piece of each set has number 0"
    assert batches(text(writer, tmp_path / "needed"), range(10)) == wanted
    loader = whole.train_dataloader()
    drawn = [next(iter(loader)).tokens_BT.tolist() for _ in range(3)]
    again = whole.train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert [each[0] for each in wanted[:3]] == drawn
    assert [each.tokens_BT.tolist() for each in again] == [each[0] for each in wanted[3:]]


def test_pieces_are_the_answers_that_the_model_gives(writer: Folder, tmp_path: Path) -> None:
    data = text(writer, tmp_path)
    source = data.train.texts[0]
    found = sorted(data.train.read(2), key=lambda each: each.tokens)
    wanted = sorted(list(source.groups(data.train.engine))[1], key=lambda each: each.tokens)
    assert [(each.tokens, each.prompt) for each in found] == [(each.tokens, each.prompt) for each in wanted]


def test_no_prompt_is_trained_on_and_held_out(writer: Folder, tmp_path: Path) -> None:
    data = text(writer, tmp_path)
    everyone = SelfGenerated(questions=12, passages=0)._prompts
    trained, kept = ({prompt.origin for prompt in part.texts[0]._prompts} for part in (data.train, data.held_out))
    held_N = held_out(torch.tensor([origin_hash(prompt.origin) for prompt in everyone]), 0.4)
    assert kept == {prompt.origin for prompt, held in zip(everyone, held_N.tolist(), strict=True) if held}
    assert trained == {prompt.origin for prompt in everyone} - kept
    loaded = list(data.val_dataloader())
    assert sum(len(batch.tokens_BT) for batch in loaded) == 2 * 6


def test_counted_positions_are_those_whose_next_token_is_of_the_answer() -> None:
    given = [Document([1, 2, 3, 4, 5], prompt=2), Document([6, 7], prompt=1), Document([8], prompt=1)]
    batch = batch_of(given)
    wanted = [token for document in given for token in document.tokens[document.prompt :]]
    assert batch.next_N.tolist() == wanted
    assert batch.tokens_BT.shape == (3, 5)


def test_text_is_small_and_the_writer_is_loaded_only_to_write(
    writer: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text(writer, tmp_path).write_all()
    for file in tmp_path.rglob("*.npz"):
        with np.load(file) as held:
            assert held["tokens"].dtype == np.uint16
    monkeypatch.setattr(written, "load", None)
    assert len(batches(text(writer, tmp_path), range(10))) == 10


def test_several_processes_only_read_and_each_has_a_document_of_every_batch(writer: Folder, tmp_path: Path) -> None:
    data = text(writer, tmp_path, rows=2)
    with pytest.raises(ValueError, match="of 9 pieces of text are not in .* dynamax cache"):
        data.check_processes(2)
    data.write_all()
    data.check_processes(2)
    with pytest.raises(ValueError, match="A batch of 2 documents cannot be shared by 3 processes"):
        data.check_processes(3)
    with pytest.raises(ValueError, match="A batch of 1 documents"):
        text(writer, tmp_path, rows=3).check_processes(2)


def test_a_damaged_piece_is_told(writer: Folder, tmp_path: Path) -> None:
    data = text(writer, tmp_path)
    data.train.write(0)
    data.train.file(0).write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="is damaged.* Remove it, and it is written anew"):
        data.train.read(0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"validation": 1.0}, "validation=1.0"),
        ({"rows": 0}, "rows=0"),
        ({"validation_documents": 0}, "validation_documents=0"),
        ({"validation": 1e-9}, "leaves none of 12 prompts"),
    ],
)
def test_what_makes_no_sense_is_refused(writer: Folder, tmp_path: Path, options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        text(writer, tmp_path, **options).prepare_data()


def test_parts_are_refused_where_validation_decides(writer: Folder) -> None:
    with pytest.raises(ValueError, match="no texts"):
        WrittenText(writer, [])
    with pytest.raises(ValueError, match="Leave part out"):
        WrittenText(writer, [SelfGenerated(part=(0.0, 0.5))])
    with pytest.raises(ValueError, match=r"part=\(0.5, 0.5\)"):
        SelfGenerated(part=(0.5, 0.5))
