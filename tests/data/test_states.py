from __future__ import annotations

import dataclasses

import pytest
import torch

from dynamax.data.states import StateReader, batches, check_exits
from dynamax.data.text import Document, origin_hash
from dynamax.types import Site
from tests.data.small import VOCAB, RandomText, small_backbone
from tests.devices import DEVICE, missing
from tests.tiny import tiny

EXITS = (2, 5)


def reader(backbone, **options):
    return StateReader(backbone, EXITS, **{"k": 8, "dtype": "float32", **options})


@pytest.mark.parametrize("positions", [1, 64, 4096])
def test_states_and_labels_are_those_of_transformers_document_by_document(monkeypatch, positions):
    monkeypatch.setattr("dynamax.data.states.POSITIONS", positions)
    model = tiny("llama", dtype=torch.float64, vocab=VOCAB)
    documents = RandomText().documents()
    found = reader(small_backbone(torch.float64)).read(documents)
    for document, stored in zip(documents, found, strict=True):
        seen = model(torch.tensor([document.tokens]), output_hidden_states=True)
        probs_TV = seen.logits[0].double().softmax(-1)
        assert stored.tokens_T.tolist() == document.tokens
        assert (stored.prompt, stored.origin) == (document.prompt, origin_hash(document.origin))
        for depth in EXITS:
            torch.testing.assert_close(stored.hidden[depth], seen.hidden_states[depth][0].float())
        given = max(0, document.prompt - 1)  # the token after each of these was given: nobody asks for labels
        for labels in (stored.top_tokens_TK, stored.top_probs_TK, stored.logsumexp_T):
            assert not labels[:given].any()
        probs_TV, logits_TV = probs_TV[given:], seen.logits[0, given:]
        stored = dataclasses.replace(
            stored,
            top_tokens_TK=stored.top_tokens_TK[given:],
            top_probs_TK=stored.top_probs_TK[given:],
            logsumexp_T=stored.logsumexp_T[given:],
        )
        assert torch.equal(stored.top_tokens_TK[:, 0].long(), probs_TV.argmax(-1))
        wanted_TK = probs_TV.gather(1, stored.top_tokens_TK.long())
        torch.testing.assert_close(stored.top_probs_TK, wanted_TK.float())
        torch.testing.assert_close(wanted_TK, probs_TV.topk(8).values)
        torch.testing.assert_close(stored.logsumexp_T, logits_TV.logsumexp(-1).float())


def test_states_that_are_given_are_taken_and_the_model_is_not_run(monkeypatch):
    backbone = small_backbone()
    documents = RandomText().documents()[:4]
    known = []
    for document in documents:
        walked = backbone.walk(backbone.embed(torch.tensor([document.tokens])), [*EXITS, 6])
        known.append(dataclasses.replace(document, hidden={depth: h_1TD[0] for depth, h_1TD in walked}))
    wanted = reader(backbone).read(documents)
    monkeypatch.setattr(type(backbone), "embed", None)
    for found, stored in zip(reader(backbone).read(known), wanted, strict=True):
        torch.testing.assert_close(vars(found), vars(stored))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_states_are_kept_in_the_dtype_asked_for(backbone, dtype):
    documents = RandomText().documents()[:3]
    for kept, exact in zip(
        reader(backbone, dtype=dtype).read(documents), reader(backbone).read(documents), strict=True
    ):
        wanted = getattr(torch, dtype)
        assert all(torch.equal(kept.hidden[depth], exact.hidden[depth].to(wanted)) for depth in EXITS)
        assert torch.equal(kept.top_probs_TK, exact.top_probs_TK)


def test_a_state_beyond_float16_is_refused_and_the_remedy_works():
    backbone = small_backbone()
    with torch.no_grad():
        backbone.model.get_input_embeddings().weight[7, 3] = 1e5
    documents = [Document([5, 7, 6])]
    with pytest.raises(ValueError, match=r"after 2 blocks reaches 1e\+05, and float16 ends at 6\.55e\+04.*bfloat16"):
        reader(backbone, dtype="float16").read(documents)
    assert reader(backbone, dtype="bfloat16").read(documents)[0].hidden[2].isfinite().all()


def test_states_that_are_not_finite_are_refused():
    backbone = small_backbone()
    with torch.no_grad():
        backbone.model.get_input_embeddings().weight[7, 3] = torch.nan
    with pytest.raises(ValueError, match="after 2 blocks are not finite"):
        reader(backbone).read([Document([7])])


def test_labels_of_a_half_precision_backbone_need_a_float32_readout():
    half, whole = small_backbone(torch.bfloat16), small_backbone()
    with pytest.raises(ValueError, match=r"computes in torch.bfloat16.*readout"):
        reader(half)
    seen: list[torch.dtype] = []

    def normalize(h_BTD):
        seen.append(h_BTD.dtype)
        return whole.normalize(h_BTD)

    site = whole.site(6)
    readout = Site(6, site.spec, normalize, site.project, site.last_blocks)
    stored = reader(half, readout=readout).read([Document([3, 4, 5])])[0]
    assert seen == [torch.float32]
    h_TD = half.run(half.embed(torch.tensor([[3, 4, 5]])), (0, 6))[0].float()
    assert torch.equal(stored.top_tokens_TK[:, 0].long(), whole.unembed(h_TD[None])[0].argmax(-1))


def test_what_names_no_origin_goes_by_what_it_was_given(backbone):
    documents = [Document([1, 2, 3], 2), Document([1, 2, 9, 9], 2), Document([1, 2], 0), Document([1, 2, 3], 0)]
    origins = [stored.origin for stored in reader(backbone).read(documents)]
    assert origins[0] == origins[1] == origins[2] != origins[3]


@pytest.mark.parametrize(
    ("document", "given"),
    [
        (Document([]), "0 tokens with a prompt of 0"),
        (Document([1] * 513), "513 tokens"),
        (Document([1, 2], 3), "2 tokens with a prompt of 3"),
        (Document([1, 2], -1), "a prompt of -1"),
    ],
)
def test_documents_a_backbone_cannot_read_are_refused(backbone, document, given):
    with pytest.raises(ValueError, match=rf"{given}.*1 to 512 tokens"):
        reader(backbone).read([document])


def test_the_longest_document_is_read(backbone):
    assert len(reader(backbone).read([Document([1] * 512)])[0].logsumexp_T) == 512


@pytest.mark.parametrize(
    ("exits", "given"),
    [([], "No exits"), ([2, 2], "repeat a depth"), ([0, 2], r"\[0\] of"), ([2, 7], r"\[7\] of"), ([-1], r"\[-1\]")],
)
def test_exits_are_checked(exits, given):
    with pytest.raises(ValueError, match=rf"{given}.*depths from 1 to 6"):
        check_exits(exits, depth=6)
    assert check_exits([6, 5, 1], depth=6) == (1, 5, 6)


@pytest.mark.parametrize("k", [0, VOCAB + 1])
def test_k_is_checked(backbone, k):
    with pytest.raises(ValueError, match=f"k={k}.*1 to {VOCAB}"):
        reader(backbone, k=k)
    assert reader(backbone, k=VOCAB)


def test_batches_hold_each_document_once_and_stay_small():
    lengths = [5, 1, 30, 7, 7, 2, 19]
    found = list(batches(lengths, positions=21))
    assert sorted(sum(found, [])) == list(range(7))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 21 for batch in found)
    assert list(batches([], positions=21)) == []


@pytest.mark.gpu
@missing
def test_states_on_a_gpu_are_those_of_the_cpu(backbone):
    documents = RandomText().documents()
    on_gpu = reader(small_backbone().to(DEVICE)).read(documents)
    for found, wanted in zip(on_gpu, reader(backbone).read(documents), strict=True):
        assert found.top_probs_TK.device.type == "cpu"
        torch.testing.assert_close(found.hidden[5], wanted.hidden[5], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found.logsumexp_T, wanted.logsumexp_T, rtol=1e-3, atol=1e-3)
