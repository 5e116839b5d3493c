"""The two phases of training heads, and which documents belong to which. Knows batches, no heads."""

from __future__ import annotations

from dataclasses import replace

import torch

from dynamax.data.batch import HiddenBatch
from dynamax.objectives.base import Phase

PARTS = 1 << 16
"""Parts of the prompts that shares are counted in: by the low bits of their hash, as validation goes by the high."""


def resting(phase: Phase) -> Phase:
    """The phase that is not this one."""
    return "gates" if phase == "lenses" else "lenses"


def share(batch: HiddenBatch, phase: Phase, gate_share: float) -> HiddenBatch:
    """The documents of a batch that a phase trains on, all of a prompt or none.

    Args:
        batch: At least one document.
        phase: Whose documents.
        gate_share: Part of the prompts that belongs to the gates.

    Returns:
        These documents; where there are none, one of number -1 with no position counted, which teaches nothing.
    """
    gates_B = batch.origins_B % PARTS < gate_share * PARTS
    chosen_B = (gates_B == (phase == "gates")).nonzero()[:, 0]
    if len(chosen_B):
        return batch.rows(chosen_B)
    first = batch.rows(torch.tensor([0], device=batch.origins_B.device))
    nobody_1 = torch.full_like(first.documents_B, -1)
    return replace(first, answer_BT=torch.zeros_like(first.answer_BT), documents_B=nobody_1)
