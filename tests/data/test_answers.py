from __future__ import annotations

from pathlib import Path

import pytest

from dynamax.backbones.sources import Folder
from dynamax.data.answers import Answers, opening
from dynamax.data.generated import SelfGenerated
from dynamax.data.prompts import Prompt, converse, passages
from tests.folders import model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("writer"), depth=2)


def answers(folder: Path, place: Path, **options) -> Answers:
    (place.parent / "prompts.txt").write_text("Tell a story.\nWho is it?\nWhy?\n")
    given = {"documents": 5, "max_new_tokens": 6, "batch": 2, "chat": False} | options
    text = SelfGenerated(str(place.parent / "prompts.txt"), field="text", **given)
    return Answers(Folder(str(folder)), text, folder=str(place), device="cpu")


def test_texts_are_questions_with_what_the_writer_says(folder: Path, tmp_path: Path) -> None:
    corpus = answers(folder, tmp_path / "answers")
    texts = list(corpus.texts())
    assert len(texts) == 5
    assert {origin for _, origin in texts} == {"Tell a story.", "Who is it?", "Why?"}
    assert all(text.startswith(f"Question: {origin}\nAnswer: ") for text, origin in texts)


def test_they_are_written_once_and_a_stopped_run_goes_on(folder: Path, tmp_path: Path, monkeypatch) -> None:
    whole = list(answers(folder, tmp_path / "answers").texts())
    (place,) = (tmp_path / "answers").iterdir()
    written = sorted(place.glob("batch-*.json"))
    assert len(written) == 3
    for file in written[1:]:
        file.unlink()
    assert list(answers(folder, tmp_path / "answers").texts()) == whole
    monkeypatch.setattr(Folder, "load", lambda *_, **__: pytest.fail("all is written"))
    assert list(answers(folder, tmp_path / "answers").texts()) == whole


def test_identity_tells_writer_and_way_of_asking(folder: Path, tmp_path: Path) -> None:
    other = model_folder(tmp_path / "other", depth=2, seed=1)
    place = tmp_path / "answers"
    identities = [
        answers(folder, place).identity(),
        answers(folder, place, max_new_tokens=7).identity(),
        answers(other, place).identity(),
    ]
    assert identities[0] == answers(folder, place).identity()
    assert all(first != second for first, second in zip(identities, identities[1:], strict=False))


def test_a_shipped_prompt_opens_as_it_is() -> None:
    prompt = converse(passages()[0])[1]
    assert opening(prompt) == prompt.plain
    assert opening(Prompt(("Say A:",), "Say A:", "Say A:")) == "Say A:"
