from __future__ import annotations

from collections import Counter

from dynamax.data.generated import Prompt, converse, passages, questions, shipped


def test_there_are_a_few_hundred_different_questions():
    asked = questions()
    assert len(asked) >= 300
    assert max(Counter(question.question.lower() for question in asked).values()) == 1
    assert len({question.topic for question in asked}) >= 20


def test_questions_are_well_formed():
    for question in questions():
        assert question.question.endswith("?")
        assert question.question[0].isupper()
        assert question.answers
        assert all(answer == answer.strip() != "" for answer in question.answers)
        assert len(set(question.answers)) == len(question.answers)


def test_any_stretch_of_questions_has_many_topics():
    asked = questions()
    for start in range(0, len(asked) - 50, 50):
        assert len({question.topic for question in asked[start : start + 50]}) >= 15


def test_passages_are_short_and_have_a_few_turns():
    told = passages()
    assert len(told) >= 30
    assert len({passage.passage for passage in told}) == len(told)
    for passage in told:
        assert 60 <= len(passage.passage.split()) <= 120
        assert 4 <= len(passage.turns) <= 6
        assert len({turn.question for turn in passage.turns}) == len(passage.turns)
        assert all(turn.question.endswith("?") and turn.answer.strip() for turn in passage.turns)


def test_a_conversation_carries_the_right_answers_along():
    passage = passages()[0]
    first, second, *_, last = converse(passage)
    assert first.turns == (f"{passage.passage}\n\n{passage.turns[0].question}",)
    assert second.turns[1:] == (passage.turns[0].answer, passage.turns[1].question)
    assert second.plain == (
        f"{passage.passage}\n\nQ: {passage.turns[0].question}\nA: {passage.turns[0].answer}"
        f"\nQ: {passage.turns[1].question}\nA:"
    )
    assert len(last.turns) == 2 * len(passage.turns) - 1
    assert {prompt.origin for prompt in converse(passage)} == {passage.passage}


def test_the_first_of_either_can_be_chosen():
    assert shipped(first_questions=3, first_passages=0) == [
        Prompt((asked.question,), f"Question: {asked.question}\nAnswer:", asked.question) for asked in questions()[:3]
    ]
    assert shipped(first_questions=0, first_passages=1) == converse(passages()[0])
    turns = sum(len(passage.turns) for passage in passages())
    assert len(shipped()) == len(questions()) + turns
