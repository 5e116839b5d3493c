"""Counted costs against torch's FLOP counter, over the modules that really run, and against bytes summed by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.mixers import ShortConvMixer, SSDMixer
from dynamax.backbones.skipped_state import Propagate
from dynamax.decoding.cost import FREE, CostModel
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.base import Gate, Lens
from dynamax.heads.gates import AttentionGate, LinearGate, MambaGate
from dynamax.heads.lenses import BridgeLens, LastBlockLens, TunedLens
from dynamax.policies.base import TerminationPolicy
from dynamax.policies.confidence import GateConfidence, MaxProb
from dynamax.policies.schedule import AtDepth
from dynamax.testing import toy_evidence
from dynamax.types import Evidence, Memory, Site, Span, Step
from tests.tiny import RECURRENT, tiny

EAGER = ["llama-eager", "mistral-eager", "gemma2"]


COUNTED = [family for family in RECURRENT if family != "qwen3_next"]
"""Those whose products are of Mamba's kind; the delta rule's are counted in tests/contracts/test_blind_spots.py."""


@pytest.mark.parametrize("family", EAGER)
def test_full_flops_are_those_of_torchs_counter(family: str) -> None:
    """Eager attention, since the counter knows no fused attention on a CPU; one position after 20 others."""
    backbone = HFBackbone(tiny(family, dtype=torch.float32))
    cache = backbone.new_cache()
    backbone.run(backbone.embed(torch.arange(20)[None], cache), Span(0, 6), cache)
    with FlopCounterMode(display=False) as counter:
        h_BTD = backbone.run(backbone.embed(torch.tensor([[3]]), cache), Span(0, 6), cache)
        backbone.unembed(h_BTD)
    assert CostModel(backbone).full(20).flops == pytest.approx(counter.get_total_flops(), rel=1e-9)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "phi3", "gpt_neox", "gpt2", "olmo2", "starcoder2-nowindow"]
)
def test_flops_without_attention_scores(family: str) -> None:
    """Fused attention is not counted by torch, so its scores are taken off."""
    backbone = HFBackbone(tiny(family, dtype=torch.float32))
    with FlopCounterMode(display=False) as counter:
        backbone.unembed(backbone.run(backbone.embed(torch.tensor([[3]])), Span(0, 6)))
    scores = sum(2 * backbone.block_cost(index).scores for index in range(6))
    assert CostModel(backbone).full(0).flops - scores == pytest.approx(counter.get_total_flops(), rel=1e-9)


def elementwise(backbone: HFBackbone, index: int) -> int:
    """Multiply-adds of one position that torch's counter does not see: taps, and what is written to the state."""
    mixer = backbone._mixers[index]
    if mixer is None:
        return 0
    module = mixer.module
    if isinstance(mixer, ShortConvMixer):
        return module.conv.weight.numel()
    passes = 1 if isinstance(mixer, SSDMixer) else 2  # Mamba-1 decays each entry of its state by a rate of its own
    return module.conv1d.weight.numel() + passes * module.intermediate_size * module.ssm_state_size


@pytest.mark.parametrize("family", COUNTED)
def test_recurrent_flops_are_those_of_torchs_counter(family: str) -> None:
    """One step after 20 others; fused attention and what is not a matrix product are added by hand."""
    backbone = HFBackbone(tiny(family, dtype=torch.float32))
    cache = backbone.new_cache()
    backbone.run(backbone.embed(torch.arange(20)[None], cache), Span(0, 6), cache)
    with FlopCounterMode(display=False) as counter:
        backbone.unembed(backbone.run(backbone.embed(torch.tensor([[3]]), cache), Span(0, 6), cache))
    shapes = [backbone.block_cost(index) for index in range(6)]
    unseen = sum(2 * (shape.scores * 21 + elementwise(backbone, index)) for index, shape in enumerate(shapes))
    assert CostModel(backbone).full(20).flops == pytest.approx(counter.get_total_flops() + unseen, rel=1e-9)


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_state_is_what_the_cache_holds(family: str) -> None:
    backbone = HFBackbone(tiny(family, dtype=torch.float32))
    cache = backbone.new_cache()
    backbone.run(backbone.embed(torch.arange(9)[None], cache), Span(0, 6), cache)
    for index, cell in enumerate(cache.states):
        past = () if cell.recurrent is None else cell.recurrent.tensors or ()
        assert backbone.block_cost(index).state == sum(tensor.numel() for tensor in past)


@pytest.mark.parametrize("family", COUNTED)
def test_writing_state_costs_the_products_that_run(family: str) -> None:
    """A rule that writes skipped state runs these products and no others."""
    backbone = HFBackbone(tiny(family, dtype=torch.float32))
    cache = backbone.new_cache()
    backbone.run(backbone.embed(torch.arange(20)[None], cache), Span(0, 6), cache)
    h_BTD = backbone.embed(torch.tensor([[3]]), cache)
    for index in range(6):
        with FlopCounterMode(display=False) as counter:
            backbone.write(h_BTD, index, cache)
        module = getattr(backbone._mixers[index], "module", None)
        readout = 0 if module is None else state_of(module)
        assert 2 * (backbone.block_cost(index).write + readout) == counter.get_total_flops()


def state_of(module: torch.nn.Module) -> int:
    """Entries of a scan's state; each is read once, as a matrix product."""
    return getattr(module, "intermediate_size", 0) * getattr(module, "ssm_state_size", 0)


def test_bytes_of_a_recurrent_block_are_its_weights_and_its_state_twice() -> None:
    backbone = HFBackbone(tiny("mamba2", dtype=torch.float32))
    config = backbone.model.config
    products = sum(p.numel() for name, p in backbone.model.named_parameters() if "_proj.weight" in name)
    inner, channels = config.expand * config.hidden_size, 64 + 2 * config.n_groups * config.state_size
    state = 6 * (inner * config.state_size + channels * (config.conv_kernel - 1))
    assert CostModel(backbone).full(20).bytes == 4 * (products + config.vocab_size * config.hidden_size + 2 * state)


def test_bytes_are_the_weights_and_keys_of_the_blocks_called() -> None:
    backbone = HFBackbone(tiny("llama", dtype=torch.float32))
    config = backbone.model.config
    products = sum(p.numel() for p in backbone.model.model.layers.parameters() if p.dim() > 1)
    size = config.hidden_size // config.num_attention_heads
    keys = 6 * 2 * config.num_key_value_heads * size * (20 + 1 + 1)  # seen, its own included, and its own written
    assert CostModel(backbone).full(20).bytes == 4 * (products + config.vocab_size * config.hidden_size + keys)


def steps_of(
    policy: object, gates: list, lens: object = None, **options: object
) -> tuple[list[Step], CostModel, ExitBank]:
    backbone = HFBackbone(tiny("llama", dtype=torch.float32))
    bank = ExitBank({2: Exit(lens, gates), 4: Exit(lens, gates)}, backbone.site)  # type: ignore[arg-type]
    decoder = EarlyExit(backbone, bank, policy, **options)  # type: ignore[arg-type]
    return list(decoder.decode(torch.arange(7)[None], max_new_tokens=4)), CostModel(backbone, bank), bank


def test_a_lens_is_charged_with_the_output_matrix_it_needs() -> None:
    steps, costs, bank = steps_of(AtDepth(4), [], TunedLens)
    backbone_part = 4 * 2 * (costs.blocks[0].active + costs.blocks[0].scores * 10)
    output = 2 * costs.spec.vocab * costs.spec.width
    assert costs.step(steps[1], 9).flops == backbone_part + output + bank.lens(4).flops()


def test_a_gate_that_says_no_is_charged_and_no_logits_are() -> None:
    steps, costs, bank = steps_of(GateConfidence(1.0), [LinearGate])
    gates = sum(bank.gates(depth)["LinearGate"].flops() for depth in (2, 4))
    assert steps[1].logits_read == ((6, 1),)
    assert costs.step(steps[1], 9).flops == costs.full(9).flops + gates


def test_recurrent_gates_are_charged_for_debts_they_read() -> None:
    """A position that left below a recurrent gate is read by it later, and paid for then."""
    steps, costs, bank = steps_of(AtDepth(2), [MambaGate])
    head = bank.gates(2)["MambaGate"].flops()
    assert costs.step(steps[1], 9).flops == pytest.approx(
        2 * 2 * (costs.blocks[0].active + costs.blocks[0].scores * 10) + 2 * costs.spec.vocab * costs.spec.width + head
    )


@pytest.mark.parametrize("gate_class", [MambaGate, AttentionGate])
def test_a_gate_is_charged_for_its_memory(gate_class: type[Gate]) -> None:
    """Behind nine positions: FLOPs by torch's counter, and bytes of its weights and of what its memory holds."""
    steps, costs, bank = steps_of(GateConfidence(1.0), [gate_class])
    gate, memory = bank.gates(2)[gate_class.__name__], Memory()
    gate.score(toy_evidence(torch.randn(1, 9, costs.spec.width), recurrent=True), memory)
    before, memory.read = sum(kept.numel() for kept in memory.values.values()), 9
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gate.score(toy_evidence(torch.randn(1, 1, costs.spec.width), recurrent=True), memory)
    after = sum(kept.numel() for kept in memory.values.values())
    written = after if after == before else after - before  # a state is written whole, keys are added
    unseen = 2 * (gate.block.conv.weight.numel() + gate.block.d_inner * gate.block.d_state) if gate.state else 0
    spent, plain = costs.step(steps[1], 9), costs.full(9)
    assert spent.flops - plain.flops == 2 * (counter.get_total_flops() + unseen)
    weights = sum(p.numel() for p in gate.parameters())
    assert spent.bytes - plain.bytes == 2 * 4 * (weights + after + written)


def test_the_last_block_is_charged_where_the_lens_runs_it() -> None:
    steps, _, _ = steps_of(AtDepth(2), [], LastBlockLens, skipped_state=Propagate())
    assert steps[1].work.calls == (1, 1, 0, 0, 0, 1)
    assert steps[1].work.writes == (0, 0, 1, 1, 1, 1)


def test_full_decoding_costs_what_full_says() -> None:
    backbone = HFBackbone(tiny("llama", dtype=torch.float32))
    steps = list(Full(backbone).decode(torch.arange(7)[None], max_new_tokens=3))
    costs = CostModel(backbone)
    assert [costs.step(step, 7 + i) for i, step in enumerate(steps[1:])] == [costs.full(7), costs.full(8)]


def test_verification_is_charged_for_all_logits_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = HFBackbone(tiny("llama", dtype=torch.float32))
    bank = ExitBank({2: Exit(), 4: Exit()}, backbone.site)
    taken: list[int] = []
    unembed = HFBackbone.unembed

    def counted(self: HFBackbone, h_BTD: torch.Tensor) -> torch.Tensor:
        taken.append(h_BTD.shape[1])
        return unembed(self, h_BTD)

    monkeypatch.setattr(HFBackbone, "unembed", counted)
    steps = list(SelfSpeculative(backbone, bank, MaxProb(0.0)).decode(torch.arange(7)[None], max_new_tokens=12))
    assert max(taken) > 1
    assert sum(rows for step in steps for depth, rows in step.logits_read if depth == 6) == sum(taken)


def test_weights_are_charged_for_each_call() -> None:
    steps, costs, _ = steps_of(AtDepth(4), [])
    once, step = costs.step(steps[1], 9), steps[1]
    work = replace(step.work, calls=(3, 1, 1, 1, 0, 0), rows=(3, 1, 1, 1, 0, 0))
    thrice, block = costs.step(replace(step, work=work), 9), costs.blocks[0]
    assert thrice.flops - once.flops == 2 * (costs._block(block, 1, 9).flops)
    assert thrice.bytes - once.bytes == pytest.approx(2 * costs._block(block, 1, 9).bytes)


def test_gates_above_an_exit_are_charged_where_a_rule_lets_them_read() -> None:
    steps, costs, bank = steps_of(AtDepth(2), [MambaGate], skipped_state=Propagate())
    exact, _, _ = steps_of(AtDepth(2), [MambaGate])
    head = bank.gates(4)["MambaGate"].flops()
    assert [step.work.writes[3] for step in steps[1:]] == [1, 1, 1]
    without = costs.step(replace(steps[1], work=replace(steps[1].work, writes=(0,) * 6)), 9).flops
    written = sum(costs._write(costs.blocks[index], 1).flops for index in range(2, 6))
    assert costs.step(steps[1], 9).flops == pytest.approx(without + written + head)
    assert all(not any(step.work.writes) for step in exact)


@pytest.mark.parametrize("family", ["llama", "mamba2"])
def test_a_bridge_runs_the_late_blocks_and_is_charged(family: str) -> None:
    """At the depth where its blocks begin, with a map of zero, it says what the top says; the state stays as it was."""
    backbone = HFBackbone(tiny(family, dtype=torch.float64))
    bank = ExitBank({4: Exit(partial(BridgeLens, blocks=2))}, backbone.site)
    prompt_BT = torch.arange(7)[None]
    plain = list(Full(backbone).decode(prompt_BT, max_new_tokens=2))
    steps = list(EarlyExit(backbone, bank, AtDepth(4)).decode(prompt_BT, max_new_tokens=3))
    torch.testing.assert_close(steps[1].logits_BV, plain[1].logits_BV, rtol=1e-9, atol=1e-9)
    assert steps[1].work.calls == (1, 1, 1, 1, 1, 1)
    assert [step.depth for step in steps] == [6, 4, 4]
    lossless = list(SelfSpeculative(backbone, bank, AtDepth(4)).decode(prompt_BT, max_new_tokens=6))
    top = list(Full(backbone).decode(prompt_BT, max_new_tokens=6))
    assert [int(step.token_B) for step in lossless] == [int(step.token_B) for step in top]


class Given(TerminationPolicy):
    """Leaves at depths that are given, one a step."""

    gates = ()

    def __init__(self, depths: list[int]) -> None:
        self.wanted = depths

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        return torch.tensor([self.wanted[evidence.step - 1] == evidence.depth])


@pytest.mark.parametrize("family", ["llama", "mamba2"])
@pytest.mark.parametrize("lens", [TunedLens, LastBlockLens, partial(BridgeLens, blocks=2)])
@pytest.mark.parametrize("depths", [[2] * 8, [6] * 8, [2, 4, 2, 6, 6, 2, 2, 4], [4, 2, 2, 6, 2, 4, 6, 2]])
def test_a_path_costs_what_decoding_along_it_costs(
    family: str, lens: Callable[[Site], Lens], depths: list[int]
) -> None:
    backbone = HFBackbone(tiny(family, dtype=torch.float32))
    bank = ExitBank({2: Exit(lens, [MambaGate]), 4: Exit(lens, [MambaGate])}, backbone.site)
    decoder = EarlyExit(backbone, bank, Given(depths))
    steps = list(decoder.decode(torch.arange(7)[None], max_new_tokens=len(depths) + 1))[1:]
    assert [step.depth for step in steps] == depths
    costs = CostModel(backbone, decoder.exits)
    decoded = sum((costs.step(step, place) for place, step in enumerate(steps, 7)), FREE)
    path = CostModel(backbone, bank.select_gates(())).path(depths, 7)
    assert (path.flops, path.bytes) == pytest.approx((decoded.flops, decoded.bytes), rel=1e-12)
