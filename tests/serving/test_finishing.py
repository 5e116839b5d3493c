"""The cloud's work against the whole model's own forward: many sessions, drafts taken back, whatever the order."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dynamax.backbones.hf import HFBackbone
from dynamax.errors import UserError
from dynamax.serving.contexts import Context, Contexts, FullError, GoneError, Limits
from dynamax.serving.finishing import Ask, finish, passes
from dynamax.serving.wire import WireError
from dynamax.types import Span
from tests.float64 import upcast64
from tests.laws.house import DEPTH, prompt
from tests.laws.house import fresh_pair as pair
from tests.tiny import FAMILIES

CUT = 2
KINDS = [
    "llama",
    "gpt2",
    "mistral",
    "gemma3_text",
    "mamba",
    "mamba2",
    "falcon_h1",
    "jamba",
    "granitemoehybrid",
    "zamba2",
]


class Client:
    """An edge that knows the whole model: it sends states, and knows what the answer must be."""

    def __init__(self, backbone: HFBackbone, contexts: Contexts, length: int, seed: int) -> None:
        self.backbone, self.contexts = backbone, contexts
        self.context = contexts.open("me")
        self.text = prompt(length, seed=seed)[0].tolist()

    def states(self, first: int) -> Tensor:
        """States at the cut, from one pass over the whole text."""
        return self.backbone.run(self.backbone.embed(torch.tensor([self.text])), Span(0, CUT))[0, first:]

    def right(self) -> list[int]:
        """The whole model's next token after every position."""
        return self.backbone.reference(torch.tensor([self.text]))[0].argmax(-1).tolist()

    def send(self, order: random.Random) -> None:
        """What has not come yet, in pieces, out of order, some of them twice."""
        first = self.context.received
        h_TW = self.states(first)
        cuts = sorted({0, len(h_TW), *(order.randrange(len(h_TW) + 1) for _ in range(2))})
        pieces = [(first + a, h_TW[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        for place, piece in order.sample(pieces, len(pieces)) + pieces[:1]:
            self.context.receive(place, piece)


def contexts(backbone: HFBackbone, clock=lambda: 0.0, **limits: float) -> Contexts:
    return Contexts(backbone, Span(CUT, DEPTH), Limits(**limits), clock)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", KINDS)
@torch.inference_mode()
def test_tokens_are_the_whole_models(family: str) -> None:
    """Sessions take turns, alone and together; a third of the drafts is wrong."""
    assert family in FAMILIES
    order = random.Random(0)
    with upcast64():
        _, backbone = pair(family)
        held = contexts(backbone, sessions=4)
        clients = [Client(backbone, held, length, seed) for seed, length in enumerate((5, 9, 3))]
        for client in clients:
            client.send(order)
        for client in clients[:1]:
            assert finish(held, [Ask(client.context, len(client.text))])[0].token == client.right()[-1]
        new = [Ask(client.context, len(client.text)) for client in clients[1:]]
        assert passes(new) == [new]
        said = finish(held, new)
        assert [each.token for each in said] == [client.right()[-1] for client in clients[1:]]
        for client in clients:
            client.text.append(client.right()[-1])
        for _ in range(6):
            taken = order.sample(clients, order.randrange(1, 4))
            asks, wanted = [], []
            for client in taken:
                base, drafts = len(client.text), []
                for _ in range(order.randrange(0, 4)):
                    client.text.append(client.right()[-1])
                    drafts.append(client.text[-1])
                if drafts and order.random() < 0.6:
                    wrong = order.randrange(len(drafts))
                    client.text[base + wrong] = drafts[wrong] = (drafts[wrong] + 1) % backbone.spec.vocab
                client.send(order)
                right = client.right()[base - 1 :]
                kept = next((i for i, draft in enumerate(drafts) if draft != right[i]), len(drafts))
                wanted.append((right[kept], kept))
                asks.append(Ask(client.context, len(client.text), tuple(drafts)))
                client.text = [*client.text[: base + kept], right[kept]]
            found = finish(held, asks)
            assert [(each.token, each.kept) for each in found] == wanted
            for client in clients:
                assert client.context.received == client.context.cache.length == len(client.text) - 1


@torch.inference_mode()
def test_a_session_that_ends_leaves_the_others_alone() -> None:
    with upcast64():
        _, backbone = pair("granitemoehybrid")
        held = contexts(backbone, sessions=3)
        clients = [Client(backbone, held, 4 + seed, seed) for seed in range(3)]
        for client in clients:
            client.send(random.Random(0))
            finish(held, [Ask(client.context, len(client.text))])
        held.close(clients[0].context.key, "me")
        newcomer = Client(backbone, held, 6, 9)
        newcomer.send(random.Random(1))
        assert finish(held, [Ask(newcomer.context, 6)])[0].token == newcomer.right()[-1]
        for client in (clients[1], clients[2], newcomer):
            client.text.append(client.right()[-1])
            client.send(random.Random(2))
            assert finish(held, [Ask(client.context, len(client.text))])[0].token == client.right()[-1]


def test_a_thousand_sessions_leave_nothing_behind() -> None:
    _, backbone = pair("mamba2")
    held = contexts(backbone, sessions=2)
    sizes = set()
    for number in range(1000):
        context = held.open("me")
        if number % 100 == 0:
            context.receive(0, torch.zeros(3, backbone.spec.width, dtype=torch.float64))
            finish(held, [Ask(context, 3)])
            sizes.add(held.bytes)
        held.close(context.key, "me")
    assert len(held) == 0
    assert held.bytes == 0
    assert len(sizes) == 1


def test_room_is_made_and_what_is_gone_is_said_to_be() -> None:
    _, backbone = pair("llama")
    now = [0.0]
    held = contexts(backbone, lambda: now[0], sessions=2, idle=5, expire=60)
    first, second = held.open("a"), held.open("b")
    with pytest.raises(FullError, match="all sessions are in use"):
        held.open("c")
    now[0] = 4.0
    assert held.find(second.key, "b") is second
    now[0] = 6.0
    third = held.open("c")  # the first was idle for longest
    assert held.evicted == 1
    for key, owner in [(first.key, "a"), (second.key, "c"), ("no such", "a"), (third.key, "b")]:
        with pytest.raises(GoneError):
            held.find(key, owner)
    held.close(second.key, "c")  # not its own: nothing happens
    assert held.find(second.key, "b") is second
    now[0] = 70.0
    held.drop_expired()
    assert len(held) == 0


def test_positions_are_taken_once_and_in_order() -> None:
    _, backbone = pair("llama")
    context: Context = contexts(backbone, positions=8).open("me")
    rows = torch.arange(8.0)[:, None]
    context.receive(4, rows[4:6])
    assert context.received == 0
    context.receive(0, rows[:3])
    context.receive(1, rows[1:5])
    assert context.received == 6
    context.receive(2, rows[2:4])
    assert context.received == 6
    assert context.take(6)[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    context.receive(7, rows[:4])
    context.receive(8, rows[:4])
    with pytest.raises(WireError, match="too many positions"):
        context.receive(9, rows[:4])
    context.receive(8, rows[:1])  # a shorter one takes nothing away
    context.receive(6, rows[6:7])  # what closes the gap is always taken
    assert context.received == 12


@pytest.mark.parametrize("family", ["llama", "granitemoehybrid"])
@torch.inference_mode()
def test_long_prompts_are_read_in_pieces_by_themselves(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamax.serving.finishing.ALONE", 4)
    with upcast64():
        _, backbone = pair(family)
        held = contexts(backbone, sessions=4)
        clients = [Client(backbone, held, length, seed) for seed, length in enumerate((3, 15, 2, 11))]
        for client in clients:
            client.send(random.Random(0))
        asks = [Ask(client.context, len(client.text)) for client in clients]
        groups = passes(asks)
        assert groups == [[asks[0], asks[2]], [asks[1]], [asks[3]]]
        said = {ask: each.token for group in groups for ask, each in zip(group, finish(held, group), strict=True)}
        assert [said[ask] for ask in asks] == [client.right()[-1] for client in clients]


@torch.inference_mode()
def test_states_without_numbers_reach_no_other_session() -> None:
    """gpt2's norm makes NaN of huge states; whoever has the slot next reads zeros behind its own keys."""
    with upcast64():
        _, backbone = pair("gpt2")
        held = contexts(backbone, sessions=2)
        long = Client(backbone, held, 12, 0)
        odd = held.open("other")
        odd.receive(0, torch.full((9, backbone.spec.width), 1.7e308, dtype=torch.float64))
        long.send(random.Random(0))
        said = finish(held, [Ask(long.context, 12), Ask(odd, 9)])
        assert said[0].token == long.right()[-1]
        assert said[1].likely == []
        held.close(odd.key, "other")
        short = Client(backbone, held, 3, 1)
        short.send(random.Random(0))
        assert finish(held, [Ask(short.context, 3)])[0].token == short.right()[-1]
        for client in (short, long):
            client.text.append(client.right()[-1])
            client.send(random.Random(0))
        both = finish(held, [Ask(client.context, len(client.text)) for client in (short, long)])
        assert [each.token for each in both] == [client.right()[-1] for client in (short, long)]


@torch.inference_mode()
def test_a_row_that_moves_finds_no_leftovers_behind_it() -> None:
    with upcast64():
        _, backbone = pair("llama")
        held = contexts(backbone, sessions=2)
        clients = [Client(backbone, held, length, length) for length in (9, 3)]
        for client in clients:
            client.send(random.Random(0))
            finish(held, [Ask(client.context, len(client.text))])
        held.close(clients[0].context.key, "me")  # the shorter one moves to its slot
        for state in held.slots.states:
            for buffer in state.keys:
                assert not buffer[0, 3:].any()
                assert not buffer[1].any()


def test_a_session_that_waits_for_a_token_makes_no_room() -> None:
    _, backbone = pair("llama")
    now = [0.0]
    held = contexts(backbone, lambda: now[0], sessions=1, idle=5, expire=60)
    first = held.open("a")
    first.working = True
    now[0] = 100.0
    with pytest.raises(FullError):
        held.open("b")
    first.working = False
    assert held.open("b").key != first.key


def test_limits_that_say_nothing_are_refused() -> None:
    for wrong in ({"sessions": 0}, {"positions": -1}, {"idle": 9, "expire": 3}, {"idle": -1}):
        with pytest.raises(UserError, match="wanted: at least one session"):
            Limits(**wrong)  # type: ignore[arg-type]
