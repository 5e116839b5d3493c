from __future__ import annotations

import json

import pytest
import torch

from dynamax.data.generated import SelfGenerated, until
from dynamax.data.prompts import Prompt, questions
from dynamax.engine import Engine
from tests.data.small import characters, small_backbone

SMALL = {"questions": 7, "passages": 0, "documents": 20, "max_new_tokens": 6, "batch": 8}


def answers(source, engine, skip=0):
    return list(source.groups(engine, skip=skip))


def test_groups_are_the_same_each_time_and_from_any_point_on(engine):
    whole = answers(SelfGenerated(**SMALL), engine)
    assert sorted(map(len, whole)) == [4, 8, 8]
    assert SelfGenerated(**SMALL).count() == 3
    for skip in range(4):
        assert answers(SelfGenerated(**SMALL), engine, skip) == whole[skip:]
    assert answers(SelfGenerated(**SMALL, seed=1), engine) != whole


def test_every_prompt_takes_its_turn(engine):
    documents = sum(answers(SelfGenerated(**SMALL), engine), [])
    asked = [question.question for question in questions()[:7]]
    counts = [[document.origin for document in documents].count(question) for question in asked]
    assert counts == [3, 3, 3, 3, 3, 3, 2]
    repeated = [document.tokens for document in documents if document.origin == asked[0]]
    assert len(set(map(tuple, repeated))) > 1


def test_answers_in_a_padded_batch_are_those_given_alone(tokenizer):
    backbone = small_backbone(torch.float64)
    greedy = SelfGenerated(**SMALL, top_k=1)
    for document in sum(answers(greedy, Engine(backbone, tokenizer)), []):
        tokens = document.tokens[: document.prompt]
        while len(tokens) < len(document.tokens):
            h_BTD = backbone.run(backbone.embed(torch.tensor([tokens])), (0, 6))
            tokens = [*tokens, int(backbone.unembed(h_BTD)[0, -1].argmax())]
        assert document.tokens == tokens


def test_an_answer_ends_with_the_first_end(tokenizer, engine):
    documents = sum(answers(SelfGenerated(**SMALL | {"max_new_tokens": 40}, temperature=3.0), engine), [])
    end = tokenizer.eos_token_id
    lengths = {len(document.tokens) - document.prompt for document in documents}
    assert min(lengths) < 40 == max(lengths)
    for document in documents:
        answer = document.tokens[document.prompt :]
        assert end not in answer[:-1]
        assert (len(answer) == 40) or answer[-1] == end


def test_until():
    assert until([1, 2, 3], [9]) == [1, 2, 3]
    assert until([9, 2], [9]) == [9]
    assert until([], [9]) == []


CONVERSATION = Prompt(("hi", "ho", "why?"), "Q: hi\nA: ho\nQ: why?\nA:", "hi")


def test_prompts_go_through_the_chat_template_or_plain(tokenizer, engine, monkeypatch):
    def asked(**options):
        ((document,),) = answers(SelfGenerated(documents=1, **options), engine)
        return document.tokens[: document.prompt]

    monkeypatch.setattr("dynamax.data.generated.shipped", lambda **_: [CONVERSATION])
    assert "".join(tokenizer.convert_ids_to_tokens(asked())) == "u:hi\na:ho\nu:why?\na:"
    plain = asked(chat=False)
    assert tokenizer.decode(plain).replace(" ", "") == tokenizer.decode(
        tokenizer(CONVERSATION.plain)["input_ids"]
    ).replace(" ", "")


def test_a_tokenizer_without_a_template_wants_plain_prompts(backbone):
    bare = Engine(backbone, characters(template=None))
    with pytest.raises(ValueError, match="no chat template.*Set chat to false"):
        answers(SelfGenerated(**SMALL), bare)
    assert answers(SelfGenerated(**SMALL, chat=False), bare)


def test_prompts_of_ones_own(tmp_path, engine):
    (tmp_path / "a.txt").write_text("who am I?\n\nwhere am I?\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "who am I?"}\n{"prompt": "where am I?"}')
    options = {"documents": 4, "max_new_tokens": 3, "chat": False}
    text = SelfGenerated(str(tmp_path / "a.txt"), field="text", **options)
    table = SelfGenerated(str(tmp_path / "a.jsonl"), **options)
    assert text.identity() == table.identity()
    (group,) = answers(table, engine)
    assert [document.origin for document in group] == ["who am I?"] * 2 + ["where am I?"] * 2


def test_blank_prompts_and_missing_fields_are_refused(tmp_path, engine):
    (tmp_path / "a.jsonl").write_text('{"prompt": " "}')
    with pytest.raises(ValueError, match="blank prompts alone"):
        answers(SelfGenerated(str(tmp_path / "a.jsonl")), engine)
    with pytest.raises(ValueError, match="Row 1 .*'ask'.*'prompt'"):
        answers(SelfGenerated(str(tmp_path / "a.jsonl"), field="ask"), engine)


def test_identity_changes_with_everything_that_matters(tmp_path):
    first = SelfGenerated(**SMALL).identity()
    json.dumps(first)
    changes = [
        {"questions": 8}, {"passages": 1}, {"documents": 21}, {"max_new_tokens": 7}, {"batch": 9}, {"seed": 1},
        {"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.9}, {"chat": False},
    ]  # fmt: skip
    identities = [SelfGenerated(**SMALL | change).identity() for change in changes]
    assert len({json.dumps(identity) for identity in [first, *identities]}) == len(changes) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": 0}, "documents=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"batch": 0}, "batch=0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"prompts": "a.txt", "questions": 3}, "together with questions=3"),
    ],
)
def test_bad_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        SelfGenerated(**options)


def test_no_prompts_at_all_are_refused(engine):
    with pytest.raises(ValueError, match="leave no prompts"):
        answers(SelfGenerated(questions=0, passages=0), engine)


def test_a_prompt_longer_than_the_context_is_named(engine):
    with pytest.raises(ValueError, match="answer of up to 500 do not fit the context of 512: 'Question: What is"):
        answers(SelfGenerated(**SMALL | {"max_new_tokens": 500}), engine)
