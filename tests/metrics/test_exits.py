import math
import pickle

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from dynamax.metrics.exits import AnswerAgreement, BlocksPerToken, ExitAgreement, GateAUROC, auroc
from tests.devices import DEVICE, missing


def computed(metric, *batch) -> float:
    """Of one batch."""
    metric.update(*batch)
    return metric.compute().item()


@pytest.fixture
def batches():
    torch.manual_seed(0)
    sizes = [(1, 1), (2, 5), (3, 4)]
    return [(torch.randint(3, s), torch.randint(3, s), torch.rand(s), torch.rand(s) < 0.7) for s in sizes]


def flat(batches, index):
    return torch.cat([batch[index].flatten() for batch in batches])


# -- exits ----------------------------------------------------------------------------------------


def test_agreement_by_hand():
    token_BT = torch.tensor([[1, 2, 3], [4, 5, 6]])
    reference_BT = torch.tensor([[1, 9, 3], [4, 5, 9]])
    live_BT = torch.tensor([[True, True, False], [True, False, False]])
    assert computed(ExitAgreement(), token_BT, reference_BT) == pytest.approx(4 / 6)
    assert computed(ExitAgreement(), token_BT, reference_BT, live_BT) == pytest.approx(2 / 3)
    assert computed(ExitAgreement(), token_BT[:1, :1], reference_BT[:1, :1]) == 1.0
    assert math.isnan(computed(ExitAgreement(), token_BT, reference_BT, torch.zeros(2, 3, dtype=torch.bool)))


def test_agreement_wants_one_shape():
    tokens = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"tokens \(2, 3\), reference \(2, 1\)\."):
        ExitAgreement().update(tokens, torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"live positions \(3,\)"):
        ExitAgreement().update(tokens, tokens, torch.ones(3))


def test_agreement_adds_up(batches):
    metric = ExitAgreement()
    for token_BT, reference_BT, _, live_BT in batches:
        metric.update(token_BT, reference_BT, live_BT)
    counted = [
        said == wanted
        for said, wanted, live in zip(*(flat(batches, index).tolist() for index in (0, 1, 3)), strict=True)
        if live
    ]
    assert metric.compute() == sum(counted) / len(counted)


# -- gates ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 10, 10_000])  # many ties, some, hardly any
def test_auroc_is_torchmetrics(levels):
    generator = torch.Generator().manual_seed(levels)
    score_N = torch.randint(levels, (500,), generator=generator) / levels
    label_N = torch.rand(500, generator=generator) < 0.2 + 0.6 * score_N
    assert auroc(score_N, label_N).item() == pytest.approx(binary_auroc(score_N, label_N.int()).item(), abs=1e-6)


def test_auroc_edges():
    yes, no = torch.tensor([1]), torch.tensor([0])
    assert auroc(torch.tensor([0.2, 0.9]), torch.cat([no, yes])) == 1.0
    assert auroc(torch.tensor([0.2, 0.9]), torch.cat([yes, no])) == 0.0
    assert auroc(torch.tensor([0.5, 0.5]), torch.cat([yes, no])) == 0.5
    assert auroc(torch.tensor([[-40.0], [30.0]]), torch.tensor([[False], [True]])) == 1.0  # log-odds, two dimensions
    assert math.isnan(auroc(torch.tensor([0.5]), yes))
    assert math.isnan(auroc(torch.tensor([0.5]), no))
    with pytest.raises(ValueError, match=r"given \(2,\) and \(1,\)"):
        auroc(torch.zeros(2), yes)


def test_auroc_does_not_change_under_monotone_maps():
    torch.manual_seed(0)
    score_N, label_N = torch.randn(200, dtype=torch.float64), torch.rand(200) < 0.3
    assert auroc(score_N, label_N) == auroc(score_N.sigmoid(), label_N)


def test_gate_auroc_adds_up(batches):
    metric = GateAUROC()
    for token_BT, reference_BT, score_BT, live_BT in batches:
        metric.update(score_BT, token_BT == reference_BT, live_BT)
    live_N = flat(batches, 3)
    label_N = (flat(batches, 0) == flat(batches, 1))[live_N]
    wanted = binary_auroc(flat(batches, 2)[live_N], label_N.int()).item()
    assert metric.compute().item() == pytest.approx(wanted, abs=1e-6)


def test_gate_auroc_without_a_class_is_nan():
    metric = GateAUROC()
    metric.update(torch.tensor([[0.2, 0.3]]), torch.tensor([[True, True]]))
    assert math.isnan(metric.compute())
    with pytest.raises(ValueError, match="Wanted a label a score"):
        metric.update(torch.zeros(2), torch.zeros(3))


# -- answers and blocks -----------------------------------------------------------------------------


def test_answer_agreement():
    answers, references = [" Paris.\n", "ÉCOLE", "", "two  words"], ["paris.", "école", "x", "two words"]
    assert computed(AnswerAgreement(), answers, references) == 0.75
    metric = AnswerAgreement()
    metric.update(answers[:1], references[:1])
    metric.update(answers[1:], references[1:])
    assert metric.compute() == 0.75
    with pytest.raises(ValueError, match="given 1 answers, 0 references"):
        metric.update(["x"], [])


def test_blocks_per_token():
    metric = BlocksPerToken()
    for blocks in (10, 20, 30):
        metric.update(blocks)
    metric.update(30, tokens=3)
    assert metric.compute() == 90 / 6


# -- what torchmetrics promises -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ExitAgreement, AnswerAgreement, BlocksPerToken])
def test_copies_and_resets(kind):
    metric = kind()
    arguments = {
        ExitAgreement: (torch.tensor([1]), torch.tensor([1])),
        AnswerAgreement: (["x"], ["x"]),
        BlocksPerToken: (1,),
    }[kind]
    metric.update(*arguments)
    copy = pickle.loads(pickle.dumps(metric))
    assert copy.compute() == metric.compute() == 1.0
    metric.reset()
    assert metric.update_count == 0
    assert metric(*arguments) == 1.0


@pytest.mark.gpu
@missing
def test_on_a_gpu(batches):
    agreed, area = ExitAgreement(), GateAUROC()
    agreed_there, area_there = ExitAgreement().to(DEVICE), GateAUROC().to(DEVICE)
    for token_BT, reference_BT, score_BT, live_BT in batches:
        agreed.update(token_BT, reference_BT, live_BT)
        area.update(score_BT, token_BT == reference_BT, live_BT)
        agreed_there.update(token_BT.to(DEVICE), reference_BT.to(DEVICE), live_BT.to(DEVICE))
        area_there.update(score_BT.to(DEVICE), (token_BT == reference_BT).to(DEVICE), live_BT.to(DEVICE))
    assert agreed_there.compute().cpu() == agreed.compute()
    assert area_there.compute().item() == pytest.approx(area.compute().item())
