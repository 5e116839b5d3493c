"""Candidates by hand, and their scores against a softmax over the same columns."""

from __future__ import annotations

import pytest
import torch

from dynamax.errors import UserError
from dynamax.past import followers, suggested, together
from dynamax.policies import CandidateMargin, CandidateProb
from dynamax.types import Evidence, Past

LOGITS_BV = torch.tensor([[3.0, 1.0, 0.0, 2.0, -1.0, 9.0], [0.0, 4.0, 1.0, 5.0, 2.0, -3.0]])
TEXTS = [[1, 2, 3, 1], [0, 4, 4]]


def past(texts=TEXTS, likely=((), ())):
    return Past(lambda: [list(text) for text in texts], lambda steps, count: [list(row) for row in likely])


def evidence(logits_BV=LOGITS_BV, *, past=None, trail=(), asked=None):
    def candidates(tokens_C):
        if asked is not None:
            asked.append(tokens_C if isinstance(tokens_C, slice) else tokens_C.tolist())
        return logits_BV[:, tokens_C]

    hidden = torch.zeros(len(logits_BV), 2)
    return Evidence(
        4,
        12,
        0,
        hidden,
        logits=lambda: logits_BV,
        trail=trail,
        past=past,
        candidates=candidates,
        vocab=logits_BV.shape[1],
    )


def test_order_of_candidates():
    assert followers([1, 2, 1, 3, 1]) == [3, 2]
    assert suggested(past(likely=([0, 2], [5])), 9, 2, 2) == [[2, 0, 1, 3], [4, 5, 0]]
    assert suggested(past(likely=([0, 2], [5])), 2, 2, 2) == [[2, 0], [4, 5]]
    assert suggested(past(), 9, 1, 2) == [[2, 1, 3], [4, 0]]
    tokens_C, own_BC = together([[2, 1, 3], [4, 1]], torch.device("cpu"))
    assert tokens_C.tolist() == [2, 1, 3, 4]
    assert own_BC is not None
    assert own_BC.tolist() == [[True, True, True, False], [False, True, False, True]]
    assert together([[2, 1]], torch.device("cpu"))[1] is None


def test_scores_are_those_of_each_rows_own_candidates():
    own = [LOGITS_BV[0, [2, 1, 3]].softmax(0), LOGITS_BV[1, [4, 0]].softmax(0)]
    seen = evidence(past=past())
    torch.testing.assert_close(CandidateProb(0.5, frequent=0).score(seen), torch.stack([p.max() for p in own]))
    assert seen.rows_read == 5
    assert not seen.logits_read
    margins = torch.stack([p.topk(2).values.diff().abs()[0] for p in own])
    torch.testing.assert_close(CandidateMargin(0.5, frequent=0).score(evidence(past=past())), margins)


def test_frequent_tokens_are_the_first_ids_and_every_rows():
    asked = []
    seen = evidence(past=past(), asked=asked)
    own = [LOGITS_BV[0, [0, 1, 2, 3]].softmax(0), LOGITS_BV[1, [0, 1, 4]].softmax(0)]
    torch.testing.assert_close(CandidateProb(0.5, frequent=2).score(seen), torch.stack([p.max() for p in own]))
    assert asked == [slice(2), [2, 3, 4]]  # none twice
    assert seen.rows_read == 5
    assert seen.answer.argmax(-1).tolist() == [0, 1]
    assert seen.answer.isfinite().sum(-1).tolist() == [4, 3]


@pytest.mark.parametrize("frequent", [6, 2048])
def test_a_vocabulary_of_frequent_tokens_is_read_whole(frequent):
    asked = []
    seen = evidence(past=past(), asked=asked)
    assert torch.equal(CandidateProb(0.5, frequent=frequent).score(seen), LOGITS_BV.softmax(-1).amax(-1))
    assert seen.logits_read
    assert not asked


def test_the_answer_is_the_best_candidate():
    seen = evidence(past=past())
    CandidateProb(0.5, frequent=0)(seen)
    assert seen.answer.argmax(-1).tolist() == [3, 4]  # the whole matrix would say 5 and 3
    assert seen.answer.isfinite().sum(-1).tolist() == [3, 2]
    assert evidence(past=past()).answer is LOGITS_BV
    assert seen.logits is LOGITS_BV
    assert seen.answer is LOGITS_BV  # once they are read, all tokens count


def test_an_earlier_exit_that_somebody_read_changes_nothing():
    """It may have been read for another row of the batch, or by another policy along the same text."""
    first = evidence(past=past())
    assert first.token.tolist() == [5, 3]
    asked = []
    CandidateProb(0.5, likely=1, frequent=0)(evidence(past=past(), trail=[first], asked=asked))
    CandidateProb(0.5, likely=1, frequent=0)(evidence(past=past(), asked=asked))
    assert asked == [[2, 1, 3, 4, 0]] * 2


def test_without_anything_to_go_by_the_whole_matrix_is_read():
    seen = evidence()
    torch.testing.assert_close(CandidateProb(0.5, frequent=0).score(seen), LOGITS_BV.softmax(-1).amax(-1))
    assert seen.logits_read
    assert not seen.rows_read


def test_logits_that_are_known_are_not_read_again():
    seen = evidence(past=past())
    assert seen.token.tolist() == [5, 3]
    CandidateProb(0.5, frequent=0)(seen)
    assert seen.rows_read == 0


def test_one_candidate_is_certain():
    seen = evidence(LOGITS_BV[:1], past=past([[3]], [[]]))
    assert CandidateMargin(0.5, frequent=0).score(seen).tolist() == [1.0]


@pytest.mark.parametrize("options", [{"limit": 1}, {"recent": -1}, {"likely": 0}, {"frequent": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(UserError, match="CandidateProb was given limit"):
        CandidateProb(0.5, **options)
