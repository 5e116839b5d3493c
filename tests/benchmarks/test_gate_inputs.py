"""Which information helps a gate: the split, the training of one gate, the table."""

from __future__ import annotations

import torch

from benchmarks import gate_inputs
from benchmarks.gate_inputs import Document, Known
from dynamax.heads import LinearGate
from dynamax.testing import toy_site


def documents(count: int) -> list[Document]:
    """Two to a prompt; right where the first number of the input is positive."""
    dice = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        numbers_NF = torch.randn(12, 3, generator=dice)
        hidden_TD = torch.randn(15, 64, generator=dice)
        counted_T = torch.arange(15) >= 3
        found.append(Document(number // 2, hidden_TD, counted_T, {"told": numbers_NF}, numbers_NF[:, 0] > 0, 7.0))
    return found


def test_a_prompts_documents_stay_together_and_all_are_used() -> None:
    made = documents(36)
    parts = gate_inputs.split(made, seed=1)
    assert [len(part) for part in parts] == [20, 4, 12]
    origins = [{each.origin for each in part} for part in parts]
    assert not origins[0] & origins[1]
    assert not origins[2] & (origins[0] | origins[1])
    assert {each.origin for each in gate_inputs.split(made, seed=2)[2]} != origins[2]


def test_a_gate_over_known_numbers_is_trained_and_scored_on_other_documents() -> None:
    torch.manual_seed(0)
    site = toy_site()
    gate = LinearGate(site, inputs=[Known(0, 3)])
    parts = gate_inputs.split(documents(36), seed=0)
    batches = lambda part, rows: gate_inputs.flat(part, ["told"], site, rows)  # noqa: E731
    assert gate_inputs.trained(gate, parts, batches, 30, 0.1) > 0.97


def test_padding_of_whole_documents_counts_nowhere() -> None:
    some = documents(3)
    short = Document(9, some[0].hidden_TD[:8], some[0].counted_T[:8], {}, some[0].right_N[:5], 7.0)
    [(evidence, counted_BT, right_N)] = gate_inputs.sequences([*some, short], toy_site())
    assert evidence.hidden.shape == (4, 15, 64)
    assert counted_BT.sum() == len(right_N) == 3 * 12 + 5


def test_the_table_has_a_row_for_each_gate() -> None:
    row = {"2": {"hidden": {"auroc": 0.5, "weights": 10}, "lens": {"auroc": 0.9, "weights": 4_000_000}}}
    more = {"2": {"hidden": {"auroc": 0.7, "weights": 10}, "lens": {"auroc": 0.9, "weights": 4_000_000}}}
    lines = gate_inputs.table({"seeds": [row, more], "block": 1_000_000}).splitlines()
    assert lines[1].split() == ["hidden", "0.600", "±0.10", "0.600", "0.000M", "0.00"]
    assert lines[2].split() == ["lens", "0.900", "±0.00", "0.900", "4.000M", "4.00"]
