import json

import pytest

from dynamax.generation import cut
from dynamax.tasks import Passages, Questions, shipped

QUESTIONS = [
    {"question": "Who wrote Emma?", "answers": ["Jane Austen", "Austen"], "topic": "books"},
    {"question": "Capital of Norway?", "answers": ["Oslo"], "topic": "places"},
    {"question": "Largest planet?", "answers": ["Jupiter"], "topic": "space"},
]
PASSAGES = [
    {
        "passage": "Ida keeps bees.",
        "turns": [{"question": "Who?", "answer": "Ida"}, {"question": "Keeps what?", "answer": "bees"}],
    },
    {"passage": "It rains.", "turns": [{"question": "Does it snow?", "answer": "no"}]},
]


@pytest.fixture
def prompts(monkeypatch, tmp_path):
    """Stands in for the package's own folder of prompts."""
    folder = tmp_path / "data" / "prompts"
    folder.mkdir(parents=True)
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "passages.jsonl").write_text("\n".join(map(json.dumps, PASSAGES)))
    monkeypatch.setattr(shipped, "files", lambda _: tmp_path)
    return folder


def test_questions(prompts):
    task = Questions()
    examples = task.examples()
    assert [e.prompt for e in examples][0] == "Question: Who wrote Emma?\nAnswer:"
    assert [e.references for e in examples] == [("Jane Austen", "Austen"), ("Oslo",), ("Jupiter",)]
    assert task.score(examples[0], " It was by Austen, in 1815.") == {"accuracy": 1.0, "f1": pytest.approx(2 / 7)}
    assert task.score(examples[0], "") == {"accuracy": 0.0, "f1": 0.0}
    assert cut(" Oslo.\nQuestion: next", examples[0].stop_strings) == " Oslo."


def test_question_shots_are_not_asked(prompts):
    first, second = Questions(shots=1).examples()
    assert first.prompt == "Question: Who wrote Emma?\nAnswer: Jane Austen\n\nQuestion: Capital of Norway?\nAnswer:"
    assert (first.id, second.id) == ("questions-2", "questions-3")
    assert Questions(shots=1, offset=1, limit=1).examples() == [second]


def test_passages_carry_the_conversation(prompts):
    task = Passages(max_new_tokens=9)
    first, second, third = task.examples()
    assert second.prompt == "Ida keeps bees.\n\nQ: Who?\n\nA: Ida\n\nQ: Keeps what?\n\nA:"
    assert third.prompt == "It rains.\n\nQ: Does it snow?\n\nA:"
    assert {first.max_new_tokens, second.max_new_tokens} == {9}
    assert task.score(second, " Bees.\n") == {"f1": 1.0, "em": 1.0}
    assert Passages(offset=1, limit=1, max_new_tokens=9).examples() == [second]


def test_broken_rows(prompts):
    (prompts / "questions.jsonl").write_text('{"question": "Who?", "answers": "me"}\n')
    (prompts / "passages.jsonl").write_text('{"passage": "P.", "turns": [{"question": "Q?"}]}\n')
    with pytest.raises(ValueError, match="Row 1 of questions.jsonl has text in 'answers', not a list"):
        Questions().examples()
    with pytest.raises(ValueError, match="Row 1 of 'turns' in row 1 of passages.jsonl has no 'answer'"):
        Passages().examples()


def test_options_out_of_range():
    with pytest.raises(ValueError, match="shots=-1 was given"):
        Questions(shots=-1)
    with pytest.raises(ValueError, match="max_new_tokens=0 was given"):
        Passages(max_new_tokens=0)


def test_every_row_that_ships_is_whole():
    questions, turns = Questions().examples(), Passages().examples()
    assert len({e.prompt for e in questions}) == len(questions) >= 200
    assert len(turns) >= 50
    assert all(Questions().score(e, e.references[0])["accuracy"] == 1.0 for e in questions)
    assert all(Passages().score(e, e.references[0])["em"] == 1.0 for e in turns)
