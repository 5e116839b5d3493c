"""The cross table on tiny models; decoding step by step along the held-out documents is the reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cross
from benchmarks.cross_backbones import NAMES, Contender, Fitted, Training, contender, fit
from benchmarks.cross_figures import ACCOUNTING, NEVER, NOTES, choose, figures, fixed, measure, mixed
from benchmarks.cross_plot import draw
from benchmarks.cross_readings import Ledger, Readings, always, first, oracle, read
from dynamax.backbones.base import Backbone
from dynamax.backbones.sources import Folder
from dynamax.data.generated import SelfGenerated
from dynamax.decoding.cost import CostModel
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.policies.confidence import GateConfidence
from dynamax.policies.schedule import AtDepth
from tests.folders import model_folder
from tests.laws.house import loud

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")  # Lightning 2.6 beside torch 2.13
TRAINING = Training(lens_epochs=1, gate_epochs=1, validation=0.5)
GATES = ["LinearGate", "FFNGate", "MambaGate", "AttentionGate"]


def entrant(folder: Path, family: str, lens: str) -> Contender:
    text = SelfGenerated(questions=16, passages=0, chat=False, documents=16, max_new_tokens=12, batch=8)
    source = Folder(str(model_folder(folder / family, family, depth=6)))
    return Contender(family, family.title(), source, text, (2, 3, 5), lens)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=[("llama", "TunedLens"), ("mamba2", "LogitLens")], ids=lambda p: p[0])
def trained(request, tmp_path_factory) -> tuple[Backbone, Fitted, Readings]:
    folder = tmp_path_factory.mktemp("cross")
    given = entrant(folder, *request.param)
    fitted = fit(given, TRAINING, store=str(folder / "store"))
    loud(fitted.bank)
    return given.source.load(), fitted, read(fitted.bank, fitted.sites, fitted.held_out)


@torch.inference_mode()
def decoded(backbone: Backbone, fitted: Fitted, policy) -> dict[str, float]:
    """Agreement, mean depth and cost, from decoding along every held-out document."""
    gates = fitted.bank.select_gates(policy.gates)
    costs = CostModel(backbone, gates)
    agreed = depth = flops = bytes_ = full_flops = full_bytes = tokens = 0
    for batch in fitted.held_out:
        for row in range(len(batch)):
            text_T = batch.tokens_BT[row][batch.live_BT[row]]
            start = int(batch.answer_BT[row].int().argmax()) + 1
            forced_1T, limit = text_T[None, start:], len(text_T) - start
            along = {"max_new_tokens": limit, "forced_BT": forced_1T}
            full = list(Full(backbone).decode(text_T[None, :start], **along))
            steps = list(EarlyExit(backbone, fitted.bank, policy).decode(text_T[None, :start], **along))
            for index in range(1, limit):
                step, cost = steps[index], costs.step(steps[index], start + index - 1)
                whole = costs.full(start + index - 1)
                tokens, depth = tokens + 1, depth + step.depth
                agreed += int(step.logits_BV.argmax() == full[index].logits_BV.argmax())
                flops, bytes_ = flops + cost.flops, bytes_ + cost.bytes
                full_flops, full_bytes = full_flops + whole.flops, full_bytes + whole.bytes
    return {
        "tokens": tokens,
        "agreement": agreed / tokens,
        "mean_depth": depth / tokens,
        "flops": flops / full_flops,
        "bytes": bytes_ / full_bytes,
    }


def between(said_EN: torch.Tensor) -> float:
    """A threshold in the widest gap of the middle half: states are stored in half precision."""
    middle = said_EN.flatten().sort().values.chunk(4)
    inner = torch.cat([middle[1], middle[2]])
    place = int(inner.diff().argmax())
    return float(inner[place : place + 2].mean())


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES)
def test_a_gate_at_a_threshold_is_what_decoding_does(trained, gate):
    backbone, fitted, readings = trained
    level = between(readings.confidence[gate])
    stop_N = first(readings.confidence[gate] >= level)
    found = figures(readings, stop_N, Ledger(backbone, fitted.bank, gate))
    wanted = decoded(backbone, fitted, GateConfidence(level, gate=gate))
    assert len(stop_N.unique()) > 2
    assert len(readings.document_N) == wanted.pop("tokens")
    assert found == pytest.approx(found | wanted, rel=1e-9)


@pytest.mark.slow
def test_always_leaving_is_what_decoding_does(trained):
    backbone, fitted, readings = trained
    rows = fixed(readings, Ledger(backbone, fitted.bank, None))
    for row, depth in zip(rows, (2, 3, 5), strict=False):
        wanted = decoded(backbone, fitted, AtDepth(depth))
        assert row == pytest.approx(row | {name: wanted[name] for name in row.keys() & wanted.keys()}, rel=1e-9)
    assert rows[-1] == pytest.approx({"agreement": 1, "mean_depth": 6, "blocks": 1, "flops": 1, "bytes": 1})


def test_between_two_exits_some_documents_leave_at_either():
    low = {"mean_depth": 2.0, "agreement": 0.5, "blocks": 0.25, "flops": 0.4, "bytes": 0.6}
    high = {"mean_depth": 6.0, "agreement": 0.9, "blocks": 0.75, "flops": 0.8, "bytes": 1.0}
    assert mixed([low, high], 3.0) == pytest.approx({"agreement": 0.6, "blocks": 0.375, "flops": 0.5, "bytes": 0.7})
    assert mixed([low, high], 2.0)["agreement"] == 0.5
    assert mixed([low, high], 6.0)["agreement"] == 0.9


def made(right: list[list[int]], said: list[list[float]], origins: list[int] | None = None) -> Readings:
    """Two exits, at 2 and 4 of 6; every position a document of its own."""
    right_EN = torch.tensor(right, dtype=torch.bool)
    document_N = torch.arange(right_EN.shape[1])
    origin_N = document_N if origins is None else torch.tensor(origins)
    return Readings((2, 4), 6, right_EN, {"gate": torch.tensor(said)}, document_N, origin_N, document_N)


def test_a_position_stops_at_the_first_exit_that_wishes():
    readings = made([[1, 0, 1, 0], [1, 1, 0, 0]], [[0.9, 0.5, 0.1, 0.2], [0.1, 0.9, 0.8, 0.1]])
    stop_N = first(readings.confidence["gate"] >= 0.8)
    assert stop_N.tolist() == [0, 1, 1, 2]
    assert readings.depth(stop_N).tolist() == [2, 4, 4, 6]
    assert readings.agreed(stop_N).tolist() == [True, True, False, True]
    assert readings.agreed(always(readings, 0)).tolist() == [True, False, True, False]


def test_the_oracle_is_never_wrong_unless_it_may_be():
    readings = made([[1, 0, 1, 0], [1, 1, 0, 0]], [[0.0] * 4] * 2)
    assert oracle(readings, 1.0).tolist() == [0, 1, 0, 2]
    assert oracle(readings, 0.75).tolist() == [0, 1, 0, 0]
    assert oracle(readings, 0.5).tolist() == [0, 0, 0, 0]
    assert readings.agreed(oracle(readings, 0.75)).float().mean() == 0.75


def test_the_lowest_threshold_that_is_consistent_enough_is_chosen():
    readings = made([[1, 1, 0, 0], [1, 1, 1, 0]], [[0.9, 0.8, 0.4, 0.3], [0.1, 0.1, 0.5, 0.2]])
    assert choose(readings, "gate", 1.0) == pytest.approx(0.5)
    assert choose(readings, "gate", 0.75) == pytest.approx(0.4)
    hopeless = made([[0], [0]], [[1.0], [1.0]])
    never = choose(hopeless, "gate", 1.0)
    assert never == NEVER
    assert first(hopeless.confidence["gate"] >= never).tolist() == [2], "a confidence of 1 does not reach it"


def test_halves_share_no_prompt():
    readings = made([[1] * 6] * 2, [[0.5] * 6] * 2, origins=[7, 7, -3, 5, -3, 9])
    one, other = readings.halves()
    assert set(one.origin_N.tolist()) == {-3, 7}
    assert set(other.origin_N.tolist()) == {5, 9}
    with pytest.raises(ValueError, match="go back to 1 prompt.*Raise --validation"):
        made([[1, 1]] * 2, [[0.5, 0.5]] * 2, origins=[4, 4]).halves()


def test_figures_of_a_backbone_are_whole(trained):
    backbone, fitted, readings = trained
    part = measure(readings, backbone, fitted.bank)
    assert list(part["gates"]) == GATES
    for known in part["gates"].values():
        assert len(known["auroc"]) == 3
        assert known["ms"] > 0
        assert [row["wanted"] for row in known["equal_consistency"]] == [0.99, 0.98, 0.95, 0.9]
        assert [row["threshold"] for row in known["equal_thresholds"]] == [0.5, 0.7, 0.8, 0.9]
        depths = [row["mean_depth"] for row in known["curve"]]
        assert depths == sorted(depths)
    assert all(row["agreement"] >= row["wanted"] - 1e-9 for row in part["oracle"])
    assert part["positions"]["reporting"] < part["positions"]["all"]


@pytest.mark.slow
def test_the_command_measures_each_backbone_once(tmp_path, monkeypatch, capsys):
    known = {
        f"{place}{name}": entrant(tmp_path / f"{place}x", name, lens)
        for place, lens in (("", "LogitLens"), ("plain/", "TunedLens"))
        for name in ("llama", "mamba2")
    }
    monkeypatch.setattr(cross, "contender", lambda name, **_: known[name])
    counts: list[str] = []
    measured = cross.measured
    monkeypatch.setattr(cross, "measured", lambda given, *a, **k: counts.append(given.name) or measured(given, *a, **k))
    files = {name: tmp_path / name for name in ("cross.json", "cross.md", "cross.png")}
    asked = ["--out", str(files["cross.json"]), "--markdown", str(files["cross.md"]), "--plot", str(files["cross.png"])]
    asked += ["--store", str(tmp_path / "store"), "--validation", "0.5", "--gate-epochs", "1", "--lens-epochs", "1"]
    cross.main([*asked, "--threads", "1", "--backbones", "llama", "mamba2"])
    cross.main([*asked, "--threads", "1", "--backbones", "mamba2", "llama"])
    assert len(counts) == 2
    cross.main([*asked, "--threads", "1", "--backbones", "llama", "--fresh"])
    cross.main([*asked, "--threads", "1", "--backbones", "mamba2", "--seed", "1"])
    assert len(counts) == 4
    written = json.loads(files["cross.json"].read_text())
    assert set(written["backbones"]) == {"llama", "mamba2"}
    assert files["cross.png"].read_bytes().startswith(b"\x89PNG")
    assert "| Mamba2 |" in files["cross.md"].read_text()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    draw([*written["backbones"].values()] * 3, tmp_path / "six.png")
    assert (tmp_path / "six.png").stat().st_size > files["cross.png"].stat().st_size
    monkeypatch.setattr(cross, "ACCOUNTING", cross.ACCOUNTING + 1)
    cross.main([*asked, "--threads", "1", "--backbones", "llama"])
    assert len(counts) == 5


def test_the_figures_that_come_with_the_repository_hold() -> None:
    kept = json.loads((Path(cross.__file__).parent / "results" / "cross.json").read_text())
    assert kept["notes"] == list(NOTES)
    assert set(kept["backbones"]) == set(NAMES)
    assert {part["options"]["accounting"] for part in kept["backbones"].values()} == {ACCOUNTING}


def test_a_missing_folder_is_named(tmp_path, capsys):
    with pytest.raises(ValueError, match="plain/mamba2.*is not a folder.*siblings/mamba2.yaml"):
        contender("plain/mamba2", assets=tmp_path)
    with pytest.raises(SystemExit):
        cross.main(["--assets", str(tmp_path), "--backbones", "llama", "--out", str(tmp_path / "cross.json")])
    assert "The backbone llama is wanted" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "lens"), [("llama", "LogitLens"), ("plain/llama", "LowRankLens")])
def test_the_lens_goes_by_how_the_backbone_was_trained(tmp_path, name, lens):
    (tmp_path / name).mkdir(parents=True)
    assert contender(name, assets=tmp_path).lens == lens
    assert contender(name, assets=tmp_path, lens="TunedLens").lens == "TunedLens"
