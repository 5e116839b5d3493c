"""What decoders share: limits, stop tokens, forced tokens, errors, clocks; and sampled lossless decoding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dynamax.decoding.base import Decoder
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.probe import Together, WallClock
from dynamax.decoding.sampling import Sampled
from dynamax.decoding.session import Session
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.decoding.teacher_forced import TeacherForcedPass
from dynamax.errors import UserError
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.base import Gate
from dynamax.heads.gates import AttentionGate, LinearGate, MambaGate
from dynamax.policies.base import TerminationPolicy
from dynamax.policies.confidence import GateConfidence
from dynamax.policies.schedule import AtDepth, Never
from dynamax.types import Step
from tests.float64 import upcast64
from tests.laws.house import DEPTH, VOCAB, Dice, LyingLens, check_first_two_tokens, exits, prompt
from tests.laws.house import fresh_pair as pair


@pytest.fixture(scope="module")
def house():  # noqa: ANN201
    _, backbone = pair("llama")
    return backbone, exits(backbone)


def test_stop_tokens_end_rows_and_then_the_decoding(house) -> None:  # noqa: ANN001
    backbone, _ = house
    rows = prompt(6, batch=3)
    free = torch.stack([step.token_B for step in Full(backbone).decode(rows, max_new_tokens=12)], 1)
    stop = int(free[1, 4])
    got = torch.stack([step.token_B for step in Full(backbone).decode(rows, max_new_tokens=12, eos_token_id=[stop])], 1)
    for row_free, row in zip(free.tolist(), got.tolist(), strict=True):
        end = row_free.index(stop) if stop in row_free else len(row)
        assert row[: end + 1] == row_free[: len(row)][: end + 1]
        assert set(row[end:]) <= {stop}


@pytest.mark.parametrize("make", [Full, None, "lossless"])
def test_every_decoder_keeps_to_its_limit(house, make) -> None:  # noqa: ANN001
    backbone, bank = house
    for limit in (1, 2, 5, 9):
        if make is Full:
            decoder = Full(backbone)
        elif make is None:
            decoder = EarlyExit(backbone, bank, Dice(0.5))
        else:
            decoder = SelfSpeculative(backbone, bank, Dice(0.9), draft_limit=4)
        assert len(list(decoder.decode(prompt(6), max_new_tokens=limit))) == limit


def test_forced_tokens_are_fed_and_own_ones_told(house) -> None:  # noqa: ANN001
    backbone, _ = house
    target = prompt(8, seed=3)
    told = torch.stack([s.token_B for s in Full(backbone).decode(prompt(6), max_new_tokens=8, forced_BT=target)], 1)
    whole = torch.cat([prompt(6), target[:, :-1]], 1)
    assert told.equal(backbone.model(whole).logits[:, 5:].argmax(-1))


def test_forced_tokens_that_do_not_reach_the_last_step_are_refused(house) -> None:  # noqa: ANN001
    backbone, _ = house
    target = prompt(7, seed=3)
    enough = list(Full(backbone).decode(prompt(6), max_new_tokens=8, forced_BT=target))
    assert len(enough) == 8
    with pytest.raises(ValueError, match="7 forced tokens were given for 9 steps; wanted: at least 8"):
        list(Full(backbone).decode(prompt(6), max_new_tokens=9, forced_BT=target))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(house, limit: int) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match="must be at least 1"):
        list(Full(house[0]).decode(prompt(6), max_new_tokens=limit))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.tensor([1, 2, 3]), r"torch.int64 tensor of shape \[3\]; wanted: .* \[rows, tokens\].*tokens\[None\]"),
        (torch.ones(1, 1, 3, dtype=torch.long), r"shape \[1, 1, 3\]"),
        (torch.ones(1, 3), "torch.float32 tensor.*int64.*tokens.long"),
        (torch.ones(1, 3, dtype=torch.bool), "torch.bool tensor"),
        (torch.ones(1, 0, dtype=torch.long), "0 tokens .* must be at least 1"),
        (torch.ones(0, 3, dtype=torch.long), "no rows"),
        (torch.tensor([[1, 2], [VOCAB, 0]]), f"token {VOCAB}, .* vocabulary is 0 to {VOCAB - 1}. Encode"),
        (torch.tensor([[1, -1]]), "token -1, "),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused_by_every_decoder(house, given, wanted: str) -> None:  # noqa: ANN001
    backbone, bank = house
    assert backbone.spec.vocab == VOCAB
    for decoder in (Full(backbone), EarlyExit(backbone, bank, Never()), SelfSpeculative(backbone, bank, Never())):
        with pytest.raises(ValueError, match=wanted):
            list(decoder.decode(given, max_new_tokens=2))


def test_the_last_token_of_the_vocabulary_and_short_integers_are_read(house) -> None:  # noqa: ANN001
    start = torch.tensor([[0, VOCAB - 1]])
    one, other = (list(Full(house[0]).decode(given, max_new_tokens=2)) for given in (start, start.int()))
    assert [int(step.token_B) for step in one] == [int(step.token_B) for step in other]


def test_a_prompt_longer_than_the_context_is_refused(house) -> None:  # noqa: ANN001
    backbone, _ = house
    length = backbone.spec.context
    with pytest.raises(ValueError, match=rf"{length} tokens and 4 more .* holds {length}. Shorten the prompt"):
        list(Full(backbone).decode(prompt(length), max_new_tokens=4))


def test_a_depth_without_an_exit_is_refused(house) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match="depth 4"):
        EarlyExit(*house, AtDepth(4))


def test_lossless_refuses_forced_tokens_and_no_drafts(house) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match="at least 1"):
        SelfSpeculative(*house, Never(), draft_limit=0)
    with pytest.raises(ValueError, match="leave forced_BT out"):
        list(SelfSpeculative(*house, Never()).decode(prompt(6), max_new_tokens=2, forced_BT=prompt(2)))


@pytest.mark.slow
def test_sampled_lossless_decoding_has_full_decodings_distribution(house) -> None:  # noqa: ANN001
    """Two tokens after one prompt, 400 runs: shares of the first pair against the full model's exact ones."""
    backbone, _ = house
    bank = ExitBank({2: Exit(), 3: Exit(LyingLens)}, backbone.site).double()
    start, runs = prompt(6), 400
    with upcast64(), torch.inference_mode():
        sampler = Sampled(0.25, seed=11)
        decoder = SelfSpeculative(backbone, bank, Dice(0.9, seed=2), draft_limit=2, sampler=sampler)
        check_first_two_tokens(decoder, backbone, sampler, start, runs)


def test_clocks_time_the_depth_left_at_and_drop_the_warmup(house) -> None:  # noqa: ANN001
    backbone, bank = house
    clock, other = WallClock(warmup=2), WallClock(warmup=0)
    list(EarlyExit(backbone, bank, AtDepth(3)).decode(prompt(6), max_new_tokens=10, probe=Together([clock, other])))
    times, all_times = clock.read(), other.read()
    assert {kind: sorted(by_depth) for kind, by_depth in times.items()} == {
        "prefill": [DEPTH],
        "mark": [2, 3],
        "end": [3],
    }
    assert len(times["end"][3]) == 7
    assert len(all_times["end"][3]) == 9
    assert all(mark < end for mark, end in zip(times["mark"][2], times["end"][3], strict=True))


def test_recurrent_gates_that_a_policy_never_asks_are_not_run(house, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, bank = house
    read: list[str] = []

    def score(self, evidence, memory=None):
        read.append(type(self).__name__)
        return evidence.hidden[..., 0]

    for gate in (MambaGate, AttentionGate):
        monkeypatch.setattr(gate, "score", score)
    list(EarlyExit(backbone, bank, AtDepth(3)).decode(prompt(6), max_new_tokens=4))
    assert read == []
    list(EarlyExit(backbone, bank, GateConfidence(1.0, gate="MambaGate")).decode(prompt(6), max_new_tokens=4))
    assert set(read) == {"MambaGate"}


class Sure(Gate):
    """Reads the lens, and the exit before where there is one."""

    def __init__(self, site):
        super().__init__()

    def score(self, evidence, memory=None):
        before = evidence.trail[-1].probs.amax(-1) if evidence.trail else 0.0
        return evidence.probs.amax(-1) + before

    def flops(self):
        return 1


def test_what_a_gate_reads_is_charged_and_what_nobody_reads_is_not(house) -> None:  # noqa: ANN001
    """The policy reads no logits itself; the gates of the exits do, those of the exit before included."""
    backbone, _ = house
    never = GateConfidence(1.0, gate="Sure")
    bank = ExitBank({2: Exit(), 3: Exit(gates=[Sure]), 5: Exit(gates=[Sure])}, backbone.site).double()
    with pytest.raises(ValueError, match="asks exit 2 for the gate Sure"):
        list(EarlyExit(backbone, bank, never).decode(prompt(6), max_new_tokens=2))
    bank = ExitBank({2: Exit(gates=[Sure]), 3: Exit(gates=[Sure])}, backbone.site).double()
    steps = list(EarlyExit(backbone, bank, never).decode(prompt(6), max_new_tokens=3))
    assert [step.logits_read for step in steps[1:]] == [((2, 1), (3, 1), (DEPTH, 1))] * 2
    plain = ExitBank({2: Exit(gates=[LinearGate]), 3: Exit(gates=[LinearGate])}, backbone.site).double()
    steps = list(EarlyExit(backbone, plain, GateConfidence(1.0)).decode(prompt(6), max_new_tokens=3))
    assert [step.logits_read for step in steps[1:]] == [((DEPTH, 1),)] * 2


class Remembering(Gate):
    """A recurrent gate that reads the lens at every position, those that left below it too."""

    recurrent = True

    def __init__(self, site):
        super().__init__()

    def score(self, evidence, memory=None):
        return evidence.probs.amax(-1)

    def flops(self):
        return 1


def test_a_recurrent_gate_reads_the_lens_of_debts_too_and_is_charged(house) -> None:  # noqa: ANN001
    backbone, _ = house
    exits = {2: Exit(), 4: Exit(gates=[Remembering])}
    decoder = EarlyExit(backbone, ExitBank(exits, backbone.site).double(), Alternating())
    steps = list(decoder.decode(prompt(6), max_new_tokens=5))
    assert steps[0].logits_read == ((4, 6), (DEPTH, 1)), "the prompt goes by the gate"
    assert [step.depth for step in steps[1:]] == [2, DEPTH, 2, DEPTH]
    assert [step.logits_read for step in steps[1:]] == [((2, 1),), ((4, 2), (DEPTH, 1))] * 2


class Alternating(TerminationPolicy):
    """Leaves at the first exit in every other step."""

    def __call__(self, evidence):
        return torch.full(evidence.hidden.shape[:1], evidence.depth == 2 and evidence.step % 2 == 1)


class Unasked(Decoder):
    """Every other step runs to the top without asking at the exits."""

    def __init__(self, *parts, asked: list[float]) -> None:
        super().__init__(*parts)
        self.asked = asked

    def steps(self, session: Session) -> Iterator[Step]:
        yield session.prefill()
        while True:
            arrival = session.embed() if session.steps % 2 else session.run_to_exit(Never())
            self.asked += [float(evidence.score("MambaGate")) for evidence in arrival.trail]
            logits_BV = session.run_to_top(arrival)
            yield session.step(arrival, logits_BV, self.sampler(logits_BV))


def test_recurrent_gates_read_steps_that_pass_them_unasked(house) -> None:  # noqa: ANN001
    backbone, bank = house
    with upcast64():
        asked: list[float] = []
        decoder = Unasked(backbone, bank.select_gates({"MambaGate"}), asked=asked)
        tokens = [int(step.token_B) for step in decoder.decode(prompt(6), max_new_tokens=8)]
        text = torch.cat([prompt(6), torch.tensor([tokens[:-1]])], 1)
        read = TeacherForcedPass(backbone, decoder.exits, text, start=5)
        wanted = [float(each.score("MambaGate")[step]) for step in (2, 4, 6) for each in read.exits]
    assert asked == pytest.approx(wanted)


@pytest.mark.parametrize("pad", [[6], [-1], [1, 1], [[1]]])
def test_padding_that_cannot_be_is_refused(house, pad: list) -> None:  # noqa: ANN001
    with pytest.raises(UserError, match="how many of its 6 tokens are padding"):
        list(Full(house[0]).decode(prompt(6), max_new_tokens=2, pad_B=torch.tensor(pad)))


@pytest.mark.parametrize(
    ("forced", "told"),
    [
        (torch.ones(2, 4, dtype=torch.long), "for 2 rows, but the prompt has 1"),
        (torch.full((1, 4), VOCAB), "The forced text has the token"),
        (torch.ones(1, 4), "token ids, int64"),
    ],
)
def test_forced_tokens_that_are_none_are_refused(house, forced: torch.Tensor, told: str) -> None:  # noqa: ANN001
    with pytest.raises(UserError, match=told):
        list(Full(house[0]).decode(prompt(6), max_new_tokens=4, forced_BT=forced))
