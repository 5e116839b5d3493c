"""Heads on disk: the round trip, and everything that must be refused."""

import copy
import json
import os
import pickle
from functools import partial

import pytest
import torch

from dynamax.errors import UserError
from dynamax.heads import AttentionGate, Exit, ExitBank, LinearGate, LowRankLens, MambaGate, TunedLens, saved
from dynamax.heads.base import Gate
from dynamax.testing import stir, toy_evidence, toy_site
from dynamax.types import Memory

SPEC = toy_site().spec
EXITS = {
    1: Exit(TunedLens, [LinearGate]),
    2: Exit(TunedLens, [LinearGate, partial(MambaGate, width=16, d_state=4)]),
    3: Exit(partial(LowRankLens, rank=3), [LinearGate, partial(AttentionGate, heads=2)]),
}


def site(depth, fingerprint="toy"):
    return toy_site(depth=depth, fingerprint=fingerprint)


def trained(exits=EXITS):
    bank = ExitBank(exits, site)
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.01)
    for _ in range(2):
        for depth in bank.depths:
            h_BTD = torch.randn(2, 4, SPEC.width)
            loss = sum(
                gate.score(toy_evidence(h_BTD)).sub(depth).square().mean() for gate in bank.gates(depth).values()
            )
            (loss + bank.lens(depth).translate(h_BTD, site(depth)).sub(h_BTD).square().mean()).backward()
        optimizer.step()
    return bank


def test_saved_and_loaded_every_head_gives_the_same(tmp_path):
    bank = trained()
    bank.save(tmp_path, SPEC)
    loaded = ExitBank.load(tmp_path, site)
    h_BTD = torch.randn(2, 4, SPEC.width)
    assert loaded.depths == bank.depths
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for depth in bank.depths:
        assert list(loaded.gates(depth)) == list(bank.gates(depth))
        before, after = (each.lens(depth).translate(h_BTD, site(depth)) for each in (bank, loaded))
        torch.testing.assert_close(before, after)
        for name, gate in bank.gates(depth).items():
            seen = toy_evidence(h_BTD)
            torch.testing.assert_close(loaded.gates(depth)[name].score(seen, Memory()), gate.score(seen, Memory()))
            assert loaded.gates(depth)[name].recipe == gate.recipe


def test_heads_of_different_exits_differ_on_disk(tmp_path):
    trained().save(tmp_path, SPEC)
    loaded = ExitBank.load(tmp_path, site)
    for first, second in ((1, 2), (1, 3), (2, 3)):
        gates = [loaded.gates(depth)["LinearGate"].out.weight for depth in (first, second)]
        assert not torch.equal(*gates)
    lenses = [loaded.lens(depth).shift.weight for depth in (1, 2)]
    assert not torch.equal(*lenses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_precision_is_kept(tmp_path, dtype):
    bank = trained().to(dtype)
    bank.save(tmp_path, SPEC)
    for name, tensor in ExitBank.load(tmp_path, site).state_dict().items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, bank.state_dict()[name])


def test_a_bank_without_weights_is_saved_too(tmp_path):
    ExitBank({2: Exit()}, site).save(tmp_path, SPEC)
    assert ExitBank.load(tmp_path, site).depths == (2,)


def test_the_record_can_be_read_by_people(tmp_path):
    trained().save(tmp_path / "new" / "folder", SPEC)
    record = json.loads((tmp_path / "new" / "folder" / "heads.json").read_text())
    assert record["format"] == 1
    assert record["fingerprint"] == SPEC.fingerprint
    assert record["backbone"]["depth"] == 4
    assert record["exits"]["3"]["lens"] == {"class": "LowRankLens", "options": {"rank": 3}}
    options = {"d_state": 4, "expand": 2, "d_conv": 4, "headdim": 32, "width": 16}
    assert record["exits"]["2"]["gates"][1] == {"class": "MambaGate", "options": options}
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["heads.json", "heads.safetensors"]


def test_another_backbone_is_refused_with_both_fingerprints(tmp_path):
    trained().save(tmp_path, SPEC)
    with pytest.raises(ValueError, match=r"another backbone.*fingerprint toy,.*fingerprint other"):
        ExitBank.load(tmp_path, partial(site, fingerprint="other"))


def test_an_edited_record_is_refused(tmp_path):
    trained().save(tmp_path, SPEC)
    path = tmp_path / "heads.json"
    path.write_text(path.read_text().replace('"fingerprint": "toy"', '"fingerprint": "other"'))
    with pytest.raises(ValueError, match=r"do not belong together \(fingerprints toy and other\)"):
        ExitBank.load(tmp_path, partial(site, fingerprint="other"))


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "FORMAT", 99)
    trained().save(tmp_path, SPEC)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="of format 99; this version reads format 1"):
        ExitBank.load(tmp_path, site)


@pytest.mark.parametrize("missing", ["heads.json", "heads.safetensors"])
def test_a_missing_file_is_named(tmp_path, missing):
    trained().save(tmp_path, SPEC)
    (tmp_path / missing).unlink()
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        ExitBank.load(tmp_path, site)


@pytest.mark.parametrize("damaged", ["heads.json", "heads.safetensors"])
def test_a_damaged_file_is_refused(tmp_path, damaged):
    trained().save(tmp_path, SPEC)
    content = (tmp_path / damaged).read_bytes()
    (tmp_path / damaged).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="are damaged"):
        ExitBank.load(tmp_path, site)


class Passing(Gate):
    """Stands for a plug-in's gate; it needs nothing but a constructor and two methods."""

    def __init__(self, site, *, size=2, names=("a", "b"), **more):
        super().__init__()
        self.own = torch.nn.Parameter(torch.zeros(size))

    def score(self, evidence, memory=None):
        return evidence.hidden[..., 0] * self.own.sum()

    def flops(self):
        return 2


def test_a_class_of_ones_own_is_recorded_without_its_help(tmp_path):
    bank = trained({2: Exit(gates=[lambda site: Passing(site, size=5, colour="red")])})
    assert bank.gates(2)["Passing"].recipe == {"size": 5, "names": ("a", "b"), "colour": "red"}
    bank.save(tmp_path, SPEC)
    loaded = ExitBank.load(tmp_path, site).gates(2)["Passing"]
    assert torch.equal(loaded.own, bank.gates(2)["Passing"].own)


def edited(folder, edit):
    """Change both records alike."""
    record, tensors = saved.read(folder, SPEC)
    edit(record)
    saved.write(folder, record, tensors)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda record: record.pop("fingerprint"), "lacks 'fingerprint'"),
        (lambda record: record.pop("backbone"), "lacks 'backbone'"),
        (lambda record: record["backbone"].pop("family"), "lacks 'family'"),
        (lambda record: record.pop("exits"), "lacks 'exits'"),
        (lambda record: record.update(exits=[]), "heads.json is not as fit writes it"),
        (lambda record: record["exits"].update(two=record["exits"].pop("2")), "int.* 'two'"),
        (lambda record: record["exits"]["2"].pop("lens"), "lacks 'lens'"),
        (lambda record: record["exits"]["2"].update(gates=None), "heads.json is not as fit writes it"),
        (lambda record: record["exits"]["2"]["lens"].pop("class"), "lacks 'class'"),
        (lambda record: record["exits"]["2"]["lens"].update({"class": 5}), "has 5 where a name is wanted"),
        (lambda record: record["exits"]["2"]["lens"].update(options=5), "heads.json is not as fit writes it"),
    ],
)
def test_a_record_that_lacks_something_in_both_files_is_refused(tmp_path, edit, told):
    trained().save(tmp_path, SPEC)
    edited(tmp_path, edit)
    with pytest.raises(UserError, match=rf"The heads in .* are damaged: .*{told}.*run fit again"):
        ExitBank.load(tmp_path, site)


def test_a_class_that_is_not_installed_is_the_registrys_error(tmp_path):
    trained().save(tmp_path, SPEC)
    edited(tmp_path, lambda record: record["exits"]["1"]["gates"][0].update({"class": "LinaerGate"}))
    with pytest.raises(ValueError, match="no exit head named 'LinaerGate'"):
        ExitBank.load(tmp_path, site)


def test_a_class_that_lost_an_option_is_named(tmp_path):
    trained().save(tmp_path, SPEC)
    edited(tmp_path, lambda record: record["exits"]["3"]["lens"]["options"].update({"colour": "red"}))
    with pytest.raises(ValueError, match=r"A saved LowRankLens at depth 3 cannot be built .*colour"):
        ExitBank.load(tmp_path, site)


def test_a_mistake_inside_a_constructor_keeps_its_traceback(tmp_path, monkeypatch):
    def mistaken(*_, **__):
        raise TypeError("a mistake of its own")

    trained().save(tmp_path, SPEC)
    monkeypatch.setattr(torch.nn, "Linear", mistaken)
    with pytest.raises(TypeError, match="a mistake of its own"):
        ExitBank.load(tmp_path, site)


def test_a_class_whose_weights_changed_shape_is_named(tmp_path):
    trained().save(tmp_path, SPEC)
    edited(tmp_path, lambda record: record["exits"]["3"]["lens"]["options"].update({"rank": 4}))
    with pytest.raises(ValueError, match=r"do not fit their classes: (?s:.)*exits.3.lens"):
        ExitBank.load(tmp_path, site)


def test_an_option_that_json_cannot_hold_is_refused_before_training():
    with pytest.raises(ValueError, match=r"Passing was given size=tensor.* of type Tensor"):
        ExitBank({2: Exit(gates=[lambda site: Passing(site, size=torch.tensor(2))])}, site)


def test_a_save_that_fails_leaves_the_old_heads(tmp_path, monkeypatch):
    old = trained()
    old.save(tmp_path, SPEC)

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        trained().save(tmp_path, SPEC)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.json", "heads.safetensors"]
    for name, tensor in ExitBank.load(tmp_path, site).state_dict().items():
        assert torch.equal(tensor, old.state_dict()[name])


def test_heads_can_be_copied_and_pickled_with_their_recipes():
    head = MambaGate(site(2), width=16, d_state=4)
    stir(head)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert twin.recipe == head.recipe
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), head.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["exits.1.lens.shift.weight", "exits.2.gates.MambaGate.out.bias"])
def test_numbers_that_are_not_finite_are_refused(tmp_path, name, value, dtype):
    bank = trained().to(dtype)
    bank.state_dict()[name].view(-1)[-1] = value
    bank.save(tmp_path, SPEC)
    with pytest.raises(UserError, match=rf"NaN or infinite, in 1 of \d+ tensors, such as {name}.*Run fit again"):
        ExitBank.load(tmp_path, site)
