"""Draft sources, alone: what they remember, suggest and refuse; and sampled decoding with their drafts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dynamax.decoding.drafting import Speculative
from dynamax.decoding.drafts import DraftSource, NGrams, PromptLookup, Suggestion, TokenTable
from dynamax.decoding.sampling import Sampled
from dynamax.errors import UserError
from dynamax.policies.base import TerminationPolicy
from dynamax.policies.schedule import Never
from dynamax.types import Evidence
from tests.float64 import upcast64
from tests.laws.house import check_first_two_tokens, exits, prompt
from tests.laws.house import fresh_pair as pair


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
    for source, found in ((PromptLookup(), None), (TokenTable(), Suggestion(4, 4))):  # 0.5 + 0.25 + 0.125
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


def shares(seen: list[list[int]], text: list[int], longest: int) -> dict[int, Fraction]:
    """By search: the share of every token after ``text``, mixed over the lengths of its contexts."""
    mixed: dict[int, Fraction] = {}
    rest = Fraction(1)
    for count in range(min(longest, len(text)), 0, -1):
        context = text[-count:]
        after = [row[i + count] for row in seen for i in range(len(row) - count) if row[i : i + count] == context]
        for token in after:
            mixed[token] = mixed.get(token, Fraction(0)) + rest / (len(after) + 1)
        rest /= len(after) + 1
    return mixed


def test_the_table_suggests_a_token_with_its_share() -> None:
    """Beside a search; the token is one of those that followed a context most often."""
    dice = random.Random(0)
    seen = [[min(dice.randrange(6), dice.randrange(6)) for _ in range(40)] for _ in range(6)]
    table, surenesses = TokenTable(longest=3), set()
    for row in seen:
        table.learn(row)
    for _ in range(200):
        text = [dice.randrange(6) for _ in range(dice.randrange(1, 6))]
        found, wanted = table.suggest(0, text), shares(seen, text, 3)
        assert found is not None
        assert found.match == sum(
            wanted[found.token] >= Fraction(edge) for edge in ("1/5", "2/5", "3/5", "4/5", "19/20")
        )
        assert wanted[found.token] >= max(wanted.values()) / 2
        surenesses.add(found.match)
    assert len(surenesses) >= 3
    assert TokenTable().suggest(0, [1, 2]) is None


def test_the_newest_of_the_most_frequent_is_suggested_and_the_oldest_contexts_go() -> None:
    table = TokenTable(longest=1, entries=2)
    for text in ([1, 5], [1, 6], [2, 7], [1, 5], [1, 6]):
        table.add(0, text)
    assert table.suggest(0, [1]) == Suggestion(6, 2)  # 2 of 4 + 1
    table.add(0, [3, 8])
    assert table.suggest(0, [1]) is None
    assert [found and found.token for found in (table.suggest(0, [token]) for token in (2, 3))] == [7, 8]


def texts_file(file: Path, documents: list[tuple[list[int], int]], **others: torch.Tensor) -> Path:
    tokens = torch.tensor([token for row, _ in documents for token in row], dtype=torch.int32)
    stops = torch.tensor(list(itertools.accumulate(len(row) for row, _ in documents)))
    prompts = torch.tensor([prompt for _, prompt in documents], dtype=torch.int32)
    save_file({"tokens": tokens, "stops": stops, "prompts": prompts, **others}, file)
    return file


def test_the_table_knows_the_texts_of_a_store_and_how_often_they_would_have_borne_it_out(tmp_path: Path) -> None:
    """Answers alone; and a share of what was right there makes the beginning of the pace."""
    texts_file(tmp_path / "shard-00000.safetensors", [([9, 9, 1, 2, 3], 3), ([1, 2, 3], 1)])
    texts_file(tmp_path / "shard-00001.safetensors", [([1, 2, 4], 0)], top_tokens=torch.zeros(3, 2))
    table, alone = TokenTable(tmp_path), TokenTable(tmp_path / "shard-00001.safetensors")
    found = table.suggest(0, [1, 2])
    assert found is not None
    assert found.token == 3
    assert table.suggest(0, [9]) is None  # no part of an answer
    assert alone.suggest(0, [1, 2]) == Suggestion(4, 3)
    tried = table.tried()
    assert sum(right for right, _ in tried.values()) == 3  # 2 after 1 twice, and 3 after 2 once
    assert sum(wrong for _, wrong in tried.values()) == 1
    decoder = Speculative(pair("llama")[1], sources=[PromptLookup(), table])
    for match, (right, wrong) in tried.items():
        assert decoder.pace._tries[1, match].share == pytest.approx((1 + right) / (2 + right + wrong))


def test_texts_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no texts in .*nowhere; wanted: a store's folder"):
        TokenTable(tmp_path / "nowhere")
    (tmp_path / "cut").mkdir()
    save_file({"tokens": torch.arange(90)}, tmp_path / "cut" / "whole.safetensors")
    for size in (0, 5, 60, 200):  # cut at every part of the file
        cut = tmp_path / "cut" / "whole.safetensors"
        cut.write_bytes(cut.read_bytes()[:size] if size < 200 else b"text" * 50)
        with pytest.raises(UserError, match="holds no texts"):
            TokenTable(tmp_path / "cut")
    save_file({"weight": torch.zeros(2)}, tmp_path / "heads.safetensors")
    with pytest.raises(UserError, match=r"heads.safetensors holds no texts .* as dynamax cache writes it"):
        TokenTable(tmp_path)


@pytest.mark.parametrize(("longest", "entries"), [(0, 9), (4, 0)])
def test_a_table_that_makes_no_sense_is_refused(longest: int, entries: int) -> None:
    with pytest.raises(UserError, match="must be at least 1|at most longest"):
        TokenTable(longest=longest, entries=entries)


@pytest.mark.parametrize("options", [{"shortest": 0}, {"shortest": 3, "longest": 2}, {"longest": 0}])
def test_a_lookup_that_makes_no_sense_is_refused(options: dict[str, int]) -> None:
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


@pytest.mark.slow
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
