"""The benchmarks of gates and of candidates, on a tiny model."""

from __future__ import annotations

import torch

from benchmarks import candidates, gates
from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.packed import pack
from dynamax.decoding.teacher_forced import TeacherForcedPass
from dynamax.kernels.products import Rows
from dynamax.policies import CandidateMargin, CandidateProb
from tests.tiny import tiny


def backbone(monkeypatch):
    made = HFBackbone(tiny("llama", dtype=torch.float32))
    pack(made, Rows)
    monkeypatch.setattr(candidates, "DEPTHS", (2, 4))
    monkeypatch.setattr(gates, "depths_of", lambda _: [2, 4])
    return made


def test_every_gate_is_timed_at_every_exit(monkeypatch):
    rows = gates.measure(backbone(monkeypatch), torch.tensor([[3, 4, 5]]), tokens=8, rounds=1)
    assert {row["n"] for name, row in rows.items() if name != "block"} == {2 * 7 - 4 * 2}
    assert all(row["median"] > 0 for row in rows.values())
    assert "MambaGate" in gates.table(rows)


def test_candidates_are_scored_beside_the_whole_matrix(monkeypatch):
    model = backbone(monkeypatch)
    texts = [(torch.randint(60, (1, 20), generator=torch.Generator().manual_seed(i)), 5) for i in range(6)]
    bank = candidates.fitted(model, texts)
    scores = {depth: candidates.Scores() for depth in bank.depths}
    with torch.inference_mode():
        for tokens_1T, start in texts:
            known = TeacherForcedPass(model, bank, tokens_1T, start=start)
            top_T = known.logits_TV.argmax(-1)
            for evidence in known.exits:
                scores[evidence.depth].candidates(
                    evidence, top_T, (CandidateProb(0.5, frequent=9), CandidateMargin(0.5, frequent=9))
                )
                assert not evidence.logits_read
            for evidence in known.exits:
                scores[evidence.depth].matrix(evidence, top_T)
    for each in scores.values():
        row = each.summary()
        assert 0 < row["candidate right"] <= row["top among"] <= 1
        assert row["right"] > 0.2  # fitted to these very texts
    assert set(candidates.times(model, 8, rounds=2)) == {"matrix", "candidates"}
