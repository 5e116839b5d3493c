from __future__ import annotations

import pytest
import torch

from dynamax.data import states as module
from dynamax.data.states import fast_topk, labels


@pytest.mark.parametrize("width", [16, 61, 8192, 8192 + 77, 49152, 20000])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_top_is_topk(width, k):
    logits_NV = torch.randn(7, width, generator=torch.Generator().manual_seed(width + k))
    values_NK, indices_NK = fast_topk(logits_NV, k)
    wanted = logits_NV.topk(k, -1)
    assert torch.equal(values_NK, wanted.values)
    assert torch.equal(indices_NK, wanted.indices)


def test_top_finds_what_stands_behind_the_last_whole_block():
    logits_NV = torch.zeros(1, 20000 + 3)
    logits_NV[0, [20002, 5, 20001]] = torch.tensor([3.0, 2.0, 1.0])
    assert fast_topk(logits_NV, 3)[1].tolist() == [[20002, 5, 20001]]


def test_top_finds_all_in_one_block():
    logits_NV = torch.zeros(2, 20000)
    logits_NV[:, 640:656] = torch.arange(1.0, 17.0)
    assert fast_topk(logits_NV, 16)[1].tolist() == [list(range(655, 639, -1))] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_are_those_of_the_whole_vocabulary(dtype):
    logits_NV = 4 * torch.randn(9, 9000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    before = logits_NV.clone()
    found = labels(logits_NV, 4)
    assert torch.equal(logits_NV, before)
    wanted_NV = logits_NV.double().softmax(-1)
    torch.testing.assert_close(found.probs_NK.double(), wanted_NV.gather(1, found.tokens_NK.long()), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.logsumexp_N.double(), logits_NV.double().logsumexp(-1), rtol=1e-6, atol=0)
    assert [column.dtype for column in found] == [torch.int32, torch.float32, torch.float32]


def test_huge_logits_stay_finite():
    found = labels(torch.tensor([[1e4, -1e4, 0.0]]), 2)
    assert found.probs_NK.tolist() == [[1.0, 0.0]]
    assert found.logsumexp_N.item() == pytest.approx(1e4)


def test_part_by_part_is_all_at_once(monkeypatch):
    logits_NV = torch.randn(23, 500)
    whole = labels(logits_NV, 3)
    monkeypatch.setattr(module, "CACHED", 4 * 4 * 500)
    for part, wanted in zip(labels(logits_NV, 3), whole, strict=True):
        assert torch.equal(part, wanted)
