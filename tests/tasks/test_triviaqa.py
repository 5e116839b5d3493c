import json

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from dynamax.tasks import TriviaQA


def row(name, question, value, *aliases):
    answer = {"value": value, "aliases": list(aliases), "normalized_value": value.lower()}
    return {"question_id": name, "question": question, "answer": {**answer, "normalized_aliases": list(aliases)}}


ROWS = [
    row("q1", "Who wrote Emma?", "Jane Austen", "jane austen", "austen"),
    row("q2", "Capital of Norway", "Oslo", "oslo", "christiania"),
    row("q3", "Largest planet?", "Jupiter", "jupiter"),
    row("q4", "Quelle ville est « la Ville lumière » ?", "Paris", "paris"),
]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "trivia.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS), encoding="utf-8")
    return str(path)


def test_prompt_and_shots(jsonl):
    third, fourth = TriviaQA(jsonl).examples()
    assert third.prompt == (
        "Question: Who wrote Emma??\nAnswer: Jane Austen\n\n"
        "Question: Capital of Norway?\nAnswer: Oslo\n\n"
        "Question: Largest planet??\nAnswer:"
    )
    assert (third.id, fourth.id) == ("q3", "q4")
    assert third.stop_strings == ("\n", ".", ",")
    bare = TriviaQA(jsonl, shots=0, offset=1, limit=1).examples()
    assert [e.prompt for e in bare] == ["Question: Capital of Norway?\nAnswer:"]


def test_shots_are_never_asked(jsonl):
    assert [e.id for e in TriviaQA(jsonl, shots=1, offset=1).examples()] == ["q3", "q4"]
    with pytest.raises(ValueError, match=r"leaves out its first 4 examples \(offset, and shots.*there are 4"):
        TriviaQA(jsonl, shots=4).examples()


def test_scores(jsonl):
    task = TriviaQA(jsonl, shots=0)
    example = task.examples()[0]
    assert task.score(example, " Jane Austen") == {"em": 1.0, "f1": 1.0}
    assert task.score(example, " The Austen!") == {"em": 1.0, "f1": 1.0}
    assert task.score(example, "Miss Jane Austen") == {"em": 0.0, "f1": pytest.approx(0.8)}
    assert task.score(example, "") == {"em": 0.0, "f1": 0.0}


def test_layouts_agree(jsonl, tmp_path, hub):
    expected = TriviaQA(jsonl).examples()
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "trivia.parquet")
    assert TriviaQA(str(tmp_path / "trivia.parquet")).examples() == expected
    hub["mandarjoshi/trivia_qa", "rc.nocontext", "validation"] = Dataset.from_list(ROWS)
    assert TriviaQA().examples() == expected
    release = [
        {
            "QuestionId": r["question_id"],
            "Question": r["question"],
            "Answer": {"Value": r["answer"]["value"], "NormalizedAliases": r["answer"]["normalized_aliases"]},
        }
        for r in ROWS
    ]
    (tmp_path / "trivia.json").write_text(json.dumps({"Data": release, "Version": 1.0}))
    assert TriviaQA(str(tmp_path / "trivia.json")).examples() == expected


def test_what_people_answered_counts_as_in_the_official_script(tmp_path):
    """Its ground truths are the normalised aliases, and ``HumanAnswers``, which it normalises."""

    def scored(answer: dict, said: str) -> dict[str, float]:
        path = tmp_path / "release.json"
        row = {"QuestionId": "q", "Question": "Where?", "Answer": {"Value": "Montreal", **answer}}
        path.write_text(json.dumps({"Data": [row]}))
        task = TriviaQA(str(path), shots=0)
        (example,) = task.examples()
        return task.score(example, said)

    aliases = {"NormalizedAliases": ["montreal"]}
    assert scored(aliases | {"HumanAnswers": ["Mtl", "The City!"]}, "Mtl") == {"em": 1.0, "f1": 1.0}
    assert scored(aliases | {"HumanAnswers": ["Mtl", "The City!"]}, "a city") == {"em": 1.0, "f1": 1.0}
    for nobody in ({}, {"HumanAnswers": []}, {"HumanAnswers": None}):
        assert scored(aliases | nobody, "Mtl") == {"em": 0.0, "f1": 0.0}
        assert scored(aliases | nobody, "Montreal") == {"em": 1.0, "f1": 1.0}
    with pytest.raises(ValueError, match=r"needs a list of at least one text in 'Answer.HumanAnswers', and has \[3\]"):
        scored(aliases | {"HumanAnswers": [3]}, "Mtl")


def test_missing_fields(tmp_path):
    path = tmp_path / "trivia.jsonl"
    broken = {**ROWS[1], "answer": {"value": "Oslo", "aliases": ["Oslo"]}}
    path.write_text("\n".join(map(json.dumps, [ROWS[0], broken])))
    with pytest.raises(ValueError, match="Row 2 .* has no 'answer.normalized_aliases'.*among: value, aliases"):
        TriviaQA(str(path), shots=0).examples()
    path.write_text(json.dumps({**ROWS[0], "answer": "Jane Austen"}))
    with pytest.raises(ValueError, match="Row 1 .* has no 'answer.normalized_aliases'.*among: 'Jane Austen'"):
        TriviaQA(str(path), shots=0).examples()
    path.write_text(json.dumps({**ROWS[0], "question": 7}))
    with pytest.raises(ValueError, match="has a whole number in 'question', not text"):
        TriviaQA(str(path), shots=0).examples()
    path.write_text(json.dumps(row("q", "Who?", "x")))
    with pytest.raises(ValueError, match="needs a list of at least one text in 'answer.normalized_aliases'"):
        TriviaQA(str(path), shots=0).examples()


def test_real_file(shared_data):
    task = TriviaQA(str(shared_data / "triviaqa.jsonl"))
    examples = task.examples()
    assert len(examples) == 498
    assert task.aggregate([task.score(e, e.references[-1]) for e in examples]) == {"em": 1.0, "f1": 1.0}
