"""Edge and cloud over a socket against one process that has the whole model."""

from __future__ import annotations

import pytest

from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.sampling import Sampled
from dynamax.errors import UserError
from dynamax.policies import CandidateProb, MaxProb, Never, OnlyAt
from dynamax.serving.edge import ALONE, CLOUD, EXIT, Collaborative, Drafting, Standalone
from dynamax.serving.link import CloudDown
from tests.serving.house import CUT, KINDS, cloud, edge_part, link, prompt, tokens, whole

QUESTIONS = ["What is the capital of France?", "Who wrote Hamlet?", "Name a fruit."]
PARTED = pytest.mark.parametrize(
    ("kind", "start"), [("llama", 2), ("llama", 4), ("mamba2", 2), ("granite", 4)], ids=str
)
"""Models, and after how many blocks each is split."""


@pytest.mark.slow
@PARTED
def test_never_leaving_gives_the_whole_models_tokens(kind: str, start: int) -> None:
    backbone, exits, _ = edge_part(kind, start)
    with cloud(kind, start) as server, link(kind, server.port, start) as connection:
        edge = Collaborative(backbone, exits, Never(), link=connection)
        for question in QUESTIONS:
            wanted, _ = tokens(Full(whole(kind).backbone), prompt(kind, question))
            assert tokens(edge, prompt(kind, question))[0] == wanted
            assert edge.origins == [CLOUD] * len(wanted)
            sent = prompt(kind, question).shape[1] + len(wanted) - 1
            assert connection.traffic.positions == sent  # each once
            assert connection.traffic.sent == 4 * sent * backbone.spec.width
            assert connection.traffic.asked == len(wanted)


@pytest.mark.slow
@PARTED
@pytest.mark.parametrize("policy", [MaxProb(0.5), MaxProb(0.9), CandidateProb(0.5)], ids=lambda each: each.label)
def test_collaborating_gives_the_tokens_of_early_exit(kind: str, start: int, policy: MaxProb) -> None:
    backbone, exits, _ = edge_part(kind, start)
    alone = EarlyExit(whole(kind).backbone, whole(kind).exits, policy)
    with cloud(kind, start) as server, link(kind, server.port, start) as connection:
        edge = Collaborative(backbone, exits, policy, link=connection)
        for question in QUESTIONS:
            wanted, depths = tokens(alone, prompt(kind, question))
            assert tokens(edge, prompt(kind, question)) == (wanted, depths)
            assert edge.origins == [CLOUD if depth == 8 else EXIT for depth in depths]


@pytest.mark.slow
@PARTED
@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_drafting_gives_the_whole_models_tokens(kind: str, start: int, threshold: float) -> None:
    backbone, exits, _ = edge_part(kind, start)
    with cloud(kind, start) as server, link(kind, server.port, start) as connection:
        edge = Drafting(backbone, exits, MaxProb(threshold), link=connection, draft_limit=4)
        for question in QUESTIONS:
            wanted, _ = tokens(Full(whole(kind).backbone), prompt(kind, question), 48)
            assert tokens(edge, prompt(kind, question), 48)[0] == wanted
            assert len(edge.origins) == len(wanted)
            assert connection.traffic.asked == edge.origins.count(CLOUD) < len(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_alone_nothing_is_sent_and_the_last_exit_says_what_no_other_does(kind: str) -> None:
    backbone, exits, _ = edge_part(kind)
    engine = whole(kind)
    for policy in (Never(), MaxProb(0.7)):
        edge = Standalone(backbone, exits, policy)
        said, depths = tokens(edge, prompt(kind))
        assert set(depths) <= {2, CUT}
        if isinstance(policy, Never):
            assert (set(depths), set(edge.origins)) == ({CUT}, {ALONE})
        else:  # unsure tokens are the last exit's alone
            assert set(edge.origins) == {EXIT, ALONE}
            assert all(depth == CUT for depth, origin in zip(depths, edge.origins, strict=True) if origin == ALONE)
        h_1T = prompt(kind)
        for token, depth in zip(said, depths, strict=True):  # what the exit says of the whole text so far
            evidence = next(each for each in engine.read(h_1T).exits if each.depth == depth)
            assert int(evidence.token[-1]) == token
            h_1T = h_1T.new_tensor([[*h_1T[0].tolist(), token]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["float16", "bfloat16", "int8", "int4"])
def test_shorter_formats_send_less(kind: str, format: str) -> None:  # noqa: A002
    backbone, exits, _ = edge_part(kind)
    with cloud(kind) as server, link(kind, server.port, format=format) as connection:
        edge = Collaborative(backbone, exits, Never(), link=connection)
        tokens(edge, prompt(kind))
        share = connection.traffic.sent / (4 * connection.traffic.positions * backbone.spec.width)
        assert share < {"float16": 0.51, "bfloat16": 0.51, "int8": 0.26, "int4": 0.15}[format]


def test_a_cloud_that_would_be_late_is_not_waited_for() -> None:
    backbone, exits, _ = edge_part("llama")
    with link("llama", 1, timeout=0.3) as connection:  # nobody listens there
        edge = Collaborative(backbone, exits, Never(), link=connection, deadline=0.1)
        said, depths = tokens(edge, prompt("llama"), 12)
        assert (set(depths), set(edge.origins)) == ({CUT}, {ALONE})
        assert said == tokens(Standalone(backbone, exits, Never()), prompt("llama"), 12)[0]
        assert connection.traffic.asked < 6  # the wait between two tries grows
        patient = Collaborative(backbone, exits, Never(), link=connection)
        with pytest.raises(CloudDown, match="did not answer within"):
            tokens(patient, prompt("llama"), 4)


@pytest.mark.parametrize("policy", [MaxProb(0.0), OnlyAt(MaxProb(0.9), [2])], ids=["leaves at once", "asks one exit"])
@pytest.mark.parametrize("kind", KINDS)
def test_alone_below_the_edges_end_nothing_is_read_twice(kind: str, policy: MaxProb | OnlyAt) -> None:
    """The cloud is late where the policy would leave, or asks no deeper exit: the positions have gone on anyway."""
    backbone, exits, _ = edge_part(kind)
    with link(kind, 1, timeout=0.2) as connection:
        edge = Collaborative(backbone, exits, policy, link=connection, deadline=0.05)
        said, _ = tokens(edge, prompt(kind), 12)
        assert len(said) == 12
        if isinstance(policy, MaxProb):
            assert said == tokens(Standalone(backbone, exits, policy), prompt(kind), 12)[0]


def test_drafts_are_not_verified_by_states_that_lost_something() -> None:
    backbone, exits, _ = edge_part("llama")
    with link("llama", 1, format="float16") as connection, pytest.raises(UserError, match="wire float32"):
        Drafting(backbone, exits, Never(), link=connection)


def test_chance_is_refused_where_the_cloud_says_the_most_likely() -> None:
    backbone, exits, _ = edge_part("llama")
    with link("llama", 1) as connection:
        for kind in (Collaborative, Drafting):
            with pytest.raises(UserError, match="the cloud says the most likely token"):
                kind(backbone, exits, Never(), Sampled(), link=connection)
        with pytest.raises(UserError, match="deadline is 0"):
            Collaborative(backbone, exits, Never(), link=connection, deadline=0)
        with pytest.raises(UserError, match="draft_limit is 0"):
            Drafting(backbone, exits, Never(), link=connection, draft_limit=0)
