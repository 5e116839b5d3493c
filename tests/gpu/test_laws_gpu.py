"""The laws on a GPU: exact in float32 up to the order of sums, and within bfloat16's own noise in bfloat16."""

from __future__ import annotations

import pytest
import torch

from dynamax.backbones.hf import HFBackbone
from dynamax.backbones.mixers import SSDMixer
from dynamax.decoding.early_exit import EarlyExit
from dynamax.decoding.full import Full
from dynamax.decoding.speculative import SelfSpeculative
from dynamax.heads.bank import Exit, ExitBank
from dynamax.heads.gates import LinearGate, MambaGate
from dynamax.kernels import backend
from dynamax.policies.base import TerminationPolicy
from dynamax.policies.schedule import AtDepth, Never
from dynamax.types import Evidence, Span
from tests.devices import DEVICE, missing
from tests.states import state
from tests.tiny import FAMILIES, RECURRENT, tiny

pytestmark = [pytest.mark.gpu, missing]
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 1e-1}
TRITON = 5e-3  # Mamba-2's kernel multiplies float32 in TF32


class EveryThird(TerminationPolicy):
    """Leaves at a depth that changes from step to step, the same in every run."""

    def __call__(self, evidence: Evidence) -> torch.Tensor:
        leave = (evidence.step + evidence.depth) % 3 == 0
        return torch.full(evidence.hidden.shape[:1], bool(leave), device=evidence.hidden.device)


def bound(backbone: HFBackbone, dtype: torch.dtype) -> float:
    scans = any(isinstance(mixer, SSDMixer) for mixer in backbone._mixers)
    kernel = scans and backend("mamba_ssm", DEVICE) != "torch"
    return max(TOLERANCE[dtype], TRITON if kernel else 0.0)


def same_tokens(backbone: HFBackbone, start_1T: torch.Tensor, got: list[int], wanted: list[int]) -> None:
    """The same, or up to a first difference that was a tie."""
    differs = next((i for i, pair in enumerate(zip(got, wanted, strict=True)) if pair[0] != pair[1]), None)
    if differs is not None:
        text_1T = torch.cat([start_1T, torch.tensor([wanted[:differs]], dtype=torch.long, device=DEVICE)], 1)
        with torch.inference_mode():
            logits_V = backbone.reference(text_1T)[0, -1].float()
        gap = logits_V[wanted[differs]] - logits_V[got[differs]]
        assert float(gap / logits_V.abs().max()) < bound(backbone, torch.float32), f"token {differs}"


def backbone_of(family: str, dtype: torch.dtype) -> HFBackbone:
    return HFBackbone(tiny(family, dtype=dtype).to(DEVICE))


def bank_of(backbone: HFBackbone) -> ExitBank:
    exit_ = Exit(gates=[LinearGate, MambaGate])
    return ExitBank({2: exit_, 3: exit_, 5: exit_}, backbone.site).to(DEVICE)


def text(length: int) -> torch.Tensor:
    return torch.randint(0, 61, (1, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("family", FAMILIES)
def test_never_leaving_is_generate(family: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    backbone = backbone_of(family, torch.float32)
    start = text(9)
    wanted = backbone.model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=24, do_sample=False)
    for decoder in (EarlyExit(backbone, bank_of(backbone), Never()), Full(backbone)):
        got = [int(step.token_B) for step in decoder.decode(start, max_new_tokens=24)]
        same_tokens(backbone, start, got, wanted[0, 9:].tolist())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt2", *RECURRENT])
def test_lossless_is_full_decoding(family: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    backbone = backbone_of(family, torch.float32)
    full = [int(step.token_B) for step in Full(backbone).decode(text(9), max_new_tokens=24)]
    lossless = SelfSpeculative(backbone, bank_of(backbone), EveryThird(), draft_limit=3)
    same_tokens(backbone, text(9), [int(step.token_B) for step in lossless.decode(text(9), max_new_tokens=24)], full)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_settled_state_is_that_of_one_full_pass(family: str, dtype: torch.dtype) -> None:
    backbone = backbone_of(family, dtype)
    tokens = text(30)
    cache, whole = backbone.new_cache(), backbone.new_cache()
    with torch.inference_mode():
        for at in range(30):
            depth = 1 + (at * 5) % 6
            h_BTD = backbone.run(backbone.embed(tokens[:, at : at + 1], cache), Span(0, depth), cache)
            if depth < 6:
                cache.group.owe(depth, h_BTD)
        backbone.settle(cache)
        backbone.run(backbone.embed(tokens, whole), Span(0, 6), whole)
    for mine, theirs in zip(cache.states, whole.states, strict=True):
        for got, wanted in zip(state(mine, 30).values(), state(theirs, 30).values(), strict=True):
            assert float((got - wanted).norm() / wanted.norm()) < bound(backbone, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_step_that_leaves_at_d_calls_d_blocks(dtype: torch.dtype) -> None:
    backbone = backbone_of("llama", dtype)
    bank = bank_of(backbone)
    for depth in bank.depths:
        steps = list(EarlyExit(backbone, bank, AtDepth(depth)).decode(text(9), max_new_tokens=6))[1:]
        assert all(step.work.calls == (1,) * depth + (0,) * (6 - depth) for step in steps)
