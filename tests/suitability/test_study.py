"""What a study finds: the ridge lens against scikit-learn, prices by hand, a model whose exits are known exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dynamax
from dynamax.backbones.base import Backbone
from dynamax.backbones.plan import Plan
from dynamax.backbones.state import LayerView
from dynamax.data.text import Document
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.objectives.ridge import RidgeLens
from dynamax.suitability.plot import draw
from dynamax.suitability.prices import Price, counted, timed
from dynamax.suitability.study import Reading, Row, leaves, normed_states, oracle, said, study
from dynamax.types import BlockCost, Spec

DEPTH, WIDTH, VOCAB = 4, 8, 32


class Turning(Backbone):
    """Each block turns the state by a matrix of its own, so every depth is a linear map of the top; no state."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.words = nn.Parameter(torch.randn(VOCAB, WIDTH, generator=draw, dtype=torch.float64))
        turns = [
            torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw, dtype=torch.float64)).Q for _ in range(DEPTH)
        ]
        self.turns = nn.ParameterList(turns)
        self.spec = Spec(depth=DEPTH, width=WIDTH, vocab=VOCAB, context=64, fingerprint="turning", family="turning")

    def embed(self, tokens_BT: Tensor, cache: object = None) -> Tensor:
        return self.words[tokens_BT]

    def block(self, index: int, h_BTD: Tensor, plan: Plan, view: LayerView) -> Tensor:
        return h_BTD @ self.turns[index]

    def normalize(self, h_BTD: Tensor) -> Tensor:
        return h_BTD

    def project(self, u_BTD: Tensor, tokens_C: Tensor | None = None) -> Tensor:
        return (u_BTD @ self.words.T).float()

    def state_kinds(self, index: int) -> tuple[()]:
        return ()

    def block_cost(self, index: int) -> BlockCost:
        return BlockCost(weights=100, active=100, scores=0, keys=0, window=None, write=0)


def documents(count: int, length: int = 24) -> list[Document]:
    draw = torch.Generator().manual_seed(1)
    rows = torch.randint(VOCAB, (count, length), generator=draw).tolist()
    return [Document(row, prompt=4, origin=str(index // 2)) for index, row in enumerate(rows)]


def test_the_ridge_lens_is_least_squares_and_scikit_learns_ridge() -> None:
    from sklearn.linear_model import Ridge

    draw = np.random.default_rng(0)
    u_ND, top_ND = draw.normal(1.0, 2.0, (200, 6)), draw.normal(0.0, 1.0, (200, 6))
    top_ND += u_ND @ draw.normal(size=(6, 6))
    for penalty in (0.0, 0.3):
        lens = RidgeLens(6, penalty)
        for start in range(0, 200, 64):  # in parts, as documents come
            lens.add(torch.tensor(u_ND[start : start + 64]), torch.tensor(top_ND[start : start + 64]))
        a_DD, b_D = (each.numpy() for each in lens.solve())
        alpha = penalty * 200 * u_ND.var(0).mean()
        wanted = Ridge(alpha=alpha).fit(u_ND, top_ND - u_ND)
        np.testing.assert_allclose(a_DD, wanted.coef_.T, atol=1e-9)
        np.testing.assert_allclose(b_D, wanted.intercept_, atol=1e-9)
        if not penalty:
            least = np.linalg.lstsq(np.c_[u_ND, np.ones(200)], top_ND, rcond=None)[0]
            np.testing.assert_allclose(np.eye(6) + a_DD, least[:-1], atol=1e-9)
            np.testing.assert_allclose(b_D, least[-1], atol=1e-9)


def test_a_state_that_is_a_linear_map_of_the_tops_is_read_without_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamax.suitability.study.PENALTY", 1e-9)
    found = study(Engine(Turning()), documents(24), share=0.5)
    assert [row.depth for row in found.rows] == [1, 2, 3]
    assert [row.readings["ridge"] for row in found.rows] == [Reading(1.0, 1.0)] * 3
    assert all(row.readings["logit"].agreement < 0.5 for row in found.rows)
    assert found.oracle["ridge"].depth == 1.0
    assert found.oracle["logit"].depth > 2
    # Bytes of eight: four blocks of 100, a matrix of 256, a map of 72 in float32; leaving at 1 saves three blocks.
    assert found.oracle["ridge"].saves == pytest.approx((300 - 72 / 2) / 656)
    row, lens = found.threshold
    assert (row.depth, lens, found.verdict) == (1, "ridge", "yes")
    assert row.saves_by_threshold(lens) == pytest.approx((300 + 256 - 256 - 36) / 656)
    assert study(Engine(Turning()), documents(24), every=2).rows[0].depth == 2


def test_prices_and_break_even_by_hand() -> None:
    prices = counted(Turning(), [1, 2, 3])
    for depth, price in prices.items():
        assert price.read == pytest.approx(256 / 656)
        assert price.map == pytest.approx(72 / 2 / 656)
        assert price.blocks == pytest.approx(100 * (DEPTH - depth) / 656)
        assert price.break_even("logit") == pytest.approx(256 / (100 * (DEPTH - depth) + 256))
        assert price.break_even("ridge") == pytest.approx((256 + 36) / (100 * (DEPTH - depth) + 256))
    assert Price(read=0.5, map=0.1, blocks=0.05).break_even("ridge") is None
    assert Price(read=0.1, map=0.0, blocks=-0.2).break_even("logit") is None


def test_the_full_price_is_the_cost_models_and_a_debt_costs_keys() -> None:
    engine = dynamax.load("assets/llama")
    found = counted(engine.backbone, [4])[4]
    full = engine.costs.full(128).bytes
    spec, block = engine.backbone.spec, engine.backbone.block_cost(4)
    assert found.read == pytest.approx(4 * spec.vocab * spec.width / full)
    # Four blocks' weights and keys are not read; later one more position is seen, and two are written in place of one.
    once = block.weights + block.keys * 130
    assert found.blocks == pytest.approx(4 * 4 * (once - block.keys) / full)


@pytest.mark.slow
def test_times_are_shares_of_a_token() -> None:
    for price in timed(dynamax.load("assets/llama").backbone, [2, 6]).values():
        assert 0 < price.map < price.read < 1
        assert price.blocks < 1


def test_what_leaves_is_the_largest_share_that_keeps_enough() -> None:
    score_N = torch.tensor([0.9, 0.8, 0.7, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    right_N = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    assert leaves(right_N, score_N, 0.99) == 0.2  # the two equal scores leave together, and one of them is wrong
    assert leaves(right_N, score_N, 0.9) == 0.5
    assert leaves(right_N, score_N, 0.8) == 1.0
    assert leaves(torch.zeros(10), score_N, 0.95) == 0.0


def test_the_oracle_leaves_at_the_first_depth_that_is_right() -> None:
    price = Price(read=0.2, map=0.0, blocks=0.5), Price(read=0.2, map=0.0, blocks=0.3)
    rows = [Row(depth, {}, one, None) for depth, one in zip((2, 4), price, strict=True)]
    right_DN = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]])
    found = oracle(right_DN, rows, "logit", 8)
    assert found.depth == (2 + 4 + 8 + 2) / 4
    assert found.saves == pytest.approx((0.5 + 0.3 + 0.0 + 0.5) / 4)


def test_documents_of_one_origin_are_on_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: dict[str, list[Document]] = {}

    def told(parts, label: str):  # noqa: ANN001, ANN202
        sides[label] = list(parts)
        return sides[label]

    found = study(Engine(Turning()), documents(40), progress=told)
    fitted, read = ({each.origin for each in sides[label]} for label in ("fit", "read"))
    assert fitted
    assert read
    assert not fitted & read
    assert len(fitted | read) == 20
    assert found.documents == (len(sides["fit"]), len(sides["read"]))


def test_positions_are_those_that_an_exit_may_decide_and_the_top_is_the_models_own() -> None:
    engine = dynamax.load("assets/llama", exits=[2])
    document = Document(list(range(20, 40)), prompt=5)
    (states,) = normed_states(engine, [document, Document([1, 2, 3], prompt=2)], [2])
    text = engine.read(torch.tensor([document.tokens[:-1]]), start=4)
    assert said(engine, states[8])[0].equal(text.top_T[1:])
    assert said(engine, states[2])[0].equal(text.exits[0].token[1:])
    torch.testing.assert_close(said(engine, states[2])[1], text.exits[0].logits.softmax(-1).amax(-1)[1:])


@pytest.mark.parametrize(
    ("options", "named"),
    [({"keep": 1.0}, "keep 1.0"), ({"share": 0.0}, "share 0.0"), ({"every": 4}, "1 to 3"), ({"every": 0}, "1 to 3")],
)
def test_options_out_of_range_are_refused(options: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        study(Engine(Turning()), documents(8), **options)  # pyright: ignore[reportArgumentType]


def test_too_few_documents_are_refused() -> None:
    for few in ([], documents(2), documents(8, length=5)):
        with pytest.raises(UserError, match="Give more documents"):
            study(Engine(Turning()), few)


def test_the_picture_is_there_as_a_whole(tmp_path: Path) -> None:
    found = study(Engine(Turning()), documents(24))
    draw(found, title="A title", subtitle="one\ntwo", path=tmp_path / "picture.png")
    content = (tmp_path / "picture.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content.rstrip().endswith(b"IEND\xaeB`\x82")
    assert [each.name for each in tmp_path.iterdir()] == ["picture.png"]
