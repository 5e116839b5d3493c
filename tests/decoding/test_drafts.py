"""Draft sources, alone: what they remember, suggest and refuse; and sampled decoding with their drafts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from dynamax.decoding.drafting import Speculative
from dynamax.decoding.drafts import DraftSource, NGrams, PromptLookup, Suggestion, TokenTable
from dynamax.decoding.sampling import Sampled
from dynamax.errors import UserError
from dynamax.policies.base import TerminationPolicy
from dynamax.policies.schedule import Never
from dynamax.types import Evidence
from tests.float64 import upcast64
from tests.laws.house import check_first_two_tokens, exits, pair, prompt


def longest_match(text: Sequence[int], shortest: int, longest: int) -> Suggestion | None:
    """By search: the newest earlier place where as many last tokens as possible stand."""
    for count in range(min(longest, len(text)), shortest - 1, -1):
        for place in range(len(text) - count - 1, -1, -1):
            if list(text[place : place + count]) == list(text[-count:]):
                return Suggestion(text[place + count], count)
    return None


@pytest.mark.parametrize(("shortest", "longest"), [(1, 1), (1, 3), (2, 4)])
def test_lookup_finds_what_a_search_finds(shortest: int, longest: int) -> None:
    tokens = torch.randint(0, 5, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    source = PromptLookup(shortest, longest)
    source.begin([tokens[:9], tokens[:20]])
    for end in range(9, 120):
        assert source.suggest(0, tokens[:end]) == longest_match(tokens[:end], shortest, longest)
        source.add(0, tokens[: end + 1])
    assert source.suggest(1, tokens[:20]) == longest_match(tokens[:20], shortest, longest)  # rows are apart


def test_a_new_text_forgets_the_old_one_in_lookup_and_not_in_the_table() -> None:
    text = [1, 2, 3, 4]
    for source, found in ((PromptLookup(), None), (TokenTable(), Suggestion(4, 3))):
        source.begin([[]])
        for end in range(1, 5):
            source.add(0, text[:end])
        source.begin([[9, 9]])
        assert source.suggest(0, [9, 9, 1, 2, 3]) == found


def test_the_newest_successor_counts_and_the_oldest_go() -> None:
    grams = NGrams(1, 1, entries=2)
    for text in ([1, 5], [1, 6], [2, 7]):
        grams.put(text)
    assert grams.get([1]) == Suggestion(6, 1)
    grams.put([3, 8])
    assert grams.get([1]) is None
    assert [grams.get([token]) for token in (2, 3)] == [Suggestion(7, 1), Suggestion(8, 1)]


@pytest.mark.parametrize("options", [{"shortest": 0}, {"shortest": 3, "longest": 2}, {"longest": 0}, {"entries": 0}])
def test_what_makes_no_sense_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be at least 1|at most longest"):
        TokenTable(**options)
    if "entries" not in options:
        with pytest.raises(UserError, match="at most longest"):
            PromptLookup(**options)


def test_a_decoder_with_nothing_to_draft_from_is_refused() -> None:
    _, backbone = pair("llama")
    with pytest.raises(UserError, match="no draft sources and no policy"):
        Speculative(backbone, sources=[])
    with pytest.raises(UserError, match="draft_limit is 0"):
        Speculative(backbone, draft_limit=0)
    with pytest.raises(UserError, match="given no exits"):
        Speculative(backbone, None, Never())
    assert Speculative(backbone, exits(backbone), Never(), sources=[]).options()["sources"] == []


class Repeats(DraftSource):
    """Suggests the last token again."""

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        pass

    def add(self, row: int, text: Sequence[int]) -> None:
        pass

    def suggest(self, row: int, text: Sequence[int]) -> Suggestion | None:
        return Suggestion(text[-1], 1)


def test_sampled_drafts_have_full_decodings_distribution() -> None:
    """Two tokens after one prompt, 400 runs: shares of each against the full model's exact ones."""
    _, backbone = pair("llama")
    start, runs = prompt(6), 400
    with upcast64(), torch.inference_mode():
        sampler = Sampled(0.5, seed=11)
        decoder = Speculative(backbone, sampler=sampler, sources=[Repeats()], draft_limit=2)
        decoder.pace.length = len  # type: ignore[method-assign,assignment]
        check_first_two_tokens(decoder, backbone, sampler, start, runs)


class Remembers(TerminationPolicy):
    """Never leaves, and keeps what it is told of the text."""

    recent = 1

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        assert evidence.past is not None
        self.texts.append(evidence.past.texts[0])
        return torch.zeros(1, dtype=torch.bool)


def test_policies_are_told_the_text_behind_rejected_drafts() -> None:
    """Rounds of both kinds in turn: what a policy is told is the text so far, with no rejected token in it."""
    _, backbone = pair("llama")
    policy = Remembers()
    decoder = Speculative(backbone, exits(backbone), policy, sources=[Repeats()], draft_limit=2)
    decoder.pace.length = len  # type: ignore[method-assign,assignment]
    turn = itertools.cycle(["sources", "exits"])
    decoder.pace.way = lambda ways: next(turn)  # type: ignore[method-assign]
    with upcast64():
        told = [int(step.token_B) for step in decoder.decode(prompt(6), max_new_tokens=12)]
    whole = prompt(6)[0].tolist() + told
    assert policy.texts
    assert all(text == whole[: len(text)] for text in policy.texts)
