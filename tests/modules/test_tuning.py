"""A tiny model is tuned: exits come closer to the top, the top stays near the original, a stopped run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import dynamax
from dynamax.backbones.sources import Folder, source_from
from dynamax.backbones.tuned import Tuned
from dynamax.data.generated import SelfGenerated
from dynamax.data.written import WrittenText
from dynamax.heads import Exit, ExitBank, TunedLens
from dynamax.modules.adapter import LowRank
from dynamax.modules.tuning import TuningModule
from dynamax.objectives.tuning import ExitTuning
from dynamax.testing import stir
from tests.folders import model_folder
from tests.modules.languages import WARNINGS, Start, Stop, StopAt, data, trainer, weights

pytestmark = WARNINGS
DEPTH, EXITS = 4, [1, 3]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Folder:
    return Folder(str(model_folder(tmp_path_factory.mktemp("base"), depth=DEPTH)))


@pytest.fixture(scope="module")
def folder(base: Folder, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("text")
    text(place, base).prepare_data()
    return place


def text(place: Path, base: Folder, **options) -> WrittenText:
    asked = [SelfGenerated(questions=20, passages=0, documents=16, max_new_tokens=6, batch=8, **options)]
    asked += [SelfGenerated(questions=12, passages=0, documents=8, max_new_tokens=4, batch=8, chat=False)]
    return WrittenText(base, asked, folder=str(place), precision=None, rows=4, validation=0.5, validation_documents=5)


def module(base: Folder, **options) -> TuningModule:
    seed_everything(0, verbose=False)
    given = {"adapter": LowRank(4, 8.0), "loss": ExitTuning(dropout=0.3), "warmup": 2, "learning_rate": 1e-2}
    return TuningModule(base, EXITS, **(given | options))


@pytest.fixture(scope="module")
def tuned(base: Folder, folder: Path, tmp_path_factory):
    """Tuned for a while, and exported."""
    place = tmp_path_factory.mktemp("tuned")
    built, start = module(base, loss=ExitTuning(dropout=0.0), export=str(place / "model")), Start()
    fitter = trainer(place, start, steps=30, val_check_interval=15)
    fitter.fit(built, datamodule=text(folder, base))
    return built, start, place / "model"


def tokens(built: TuningModule) -> torch.Tensor:
    return built.data.train_dataloader().batch(3).tokens_BT


@pytest.mark.slow
def test_exits_come_closer_to_the_top_and_the_report_says_by_how_much(tuned) -> None:
    built, _, place = tuned
    report = json.loads((place / "tuning.json").read_text())
    assert list(report["before"]) == list(report["after"]) == ["1", "3", "4"]
    for depth in ("1", "3"):
        assert report["after"][depth]["divergence"] < 0.8 * report["before"][depth]["divergence"]
    assert report["before"]["4"]["divergence"] == pytest.approx(0, abs=1e-6)
    assert report["before"]["4"]["fidelity"] == 1
    assert 0 < report["after"]["4"]["divergence"] < 0.5
    assert list(report["validation"]) == ["0", "15", "30"]
    assert report["measured"] == "these files"
    assert report["steps"] == 30
    assert report["tokens"] == sum(
        int(built.data.train_dataloader().batch(step).counted_BT.sum()) for step in range(30)
    )


@pytest.mark.slow
def test_scores_are_those_by_hand(tuned, base: Folder) -> None:
    """One document at a time, without padding, through transformers' own forward."""
    built, _, place = tuned
    written, original = (source.load().model for source in (Tuned(place), base))
    lost = agreed = same = divergence = count = 0.0
    for number in range(len(built.data.held_out)):
        for document in built.data.held_out.read(number):
            given = torch.tensor([document.tokens])
            answer = slice(document.prompt - 1, len(document.tokens) - 1)
            states = written(given, output_hidden_states=True).hidden_states
            top, wanted = written(given).logits[0, answer], original(given).logits[0, answer]
            exit_ = written.lm_head(written.model.norm(states[1]))[0, answer]
            next_N = given[0, document.prompt :]
            lost += F.cross_entropy(exit_, next_N, reduction="sum").item()
            agreed += (exit_.argmax(-1) == top.argmax(-1)).sum().item()
            same += (exit_.argmax(-1) == wanted.argmax(-1)).sum().item()
            pair = exit_.log_softmax(-1), wanted.log_softmax(-1)
            divergence += F.kl_div(*pair, log_target=True, reduction="sum").item()
            count += len(next_N)
    scores = json.loads((place / "tuning.json").read_text())["after"]["1"]
    assert scores["loss"] == pytest.approx(lost / count, rel=1e-4)
    assert scores["agreement"] == pytest.approx(agreed / count)
    assert scores["fidelity"] == pytest.approx(same / count)
    assert scores["divergence"] == pytest.approx(divergence / count, rel=1e-4)


def test_the_original_is_what_it_was_bit_for_bit(tuned, base: Folder) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    built, start, _ = tuned
    theirs = base.load()
    assert built.original.reference(tokens(built)).equal(theirs.reference(tokens(built)))
    moved = {name for name, each in weights(built).items() if not each.equal(start.weights[name])}
    assert moved == set(built.trained())
    assert all(".lora_" in name for name in moved)
    peft_layers = [each for each in built.backbone.modules() if isinstance(each, BaseTunerLayer)]
    assert len(peft_layers) == 7 * DEPTH
    on = built.backbone.reference(tokens(built))
    for layer in peft_layers:
        layer._disable_adapters = True
    off = built.backbone.reference(tokens(built))
    for layer in peft_layers:
        layer._disable_adapters = False
    assert off.equal(theirs.reference(tokens(built)))
    assert not on.equal(off)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT beside transformers 5.23
def test_merged_is_unmerged_and_peft_reads_the_folder(tuned, base: Folder) -> None:
    from peft import PeftModel

    built, _, place = tuned
    merged, at = Tuned(place).load(), tokens(built)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), place)
    with torch.no_grad():
        torch.testing.assert_close(merged.reference(at), theirs(at).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(merged.reference(at), built.backbone.reference(at), atol=2e-2, rtol=2e-2)
    assert merged.spec.fingerprint != base.load().spec.fingerprint
    assert merged.spec.fingerprint == json.loads((place / "tuning.json").read_text())["fingerprint"]
    half = Tuned(place).load(dtype="bfloat16")
    assert (half.model.dtype, half.spec) == (torch.bfloat16, merged.spec)
    wanted = merged.model.model.layers[1].mlp.up_proj.weight
    assert half.model.model.layers[1].mlp.up_proj.weight.equal(wanted.bfloat16())


def test_everything_else_takes_the_folder(tuned, base: Folder) -> None:
    _, _, place = tuned
    engine = dynamax.load(place, exits=EXITS)
    answer = engine.generate("What is it?", policy=dynamax.MaxProb(0.0), max_new_tokens=4, do_sample=False)
    assert answer.depths[1:] == [1] * (len(answer.depths) - 1)
    for source in (Tuned(place), Tuned(place, base)):
        again = source_from(json.loads(json.dumps(source.recipe)))
        assert again.load().spec == engine.backbone.spec
        assert again.recipe == source.recipe


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("adapter", [LowRank(4, 8.0), None])
@pytest.mark.parametrize("stop", [5, 7])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    base: Folder, folder: Path, tmp_path: Path, adapter: LowRank | None, stop: int
) -> None:
    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_last=True)

    whole = module(base, adapter=adapter)
    trainer(tmp_path, steps=10, val_check_interval=5).fit(whole, datamodule=text(folder, base))
    with pytest.raises(Stop):
        trainer(tmp_path, saving(), StopAt(stop), steps=10, val_check_interval=5).fit(
            module(base, adapter=adapter), datamodule=text(folder, base)
        )
    kept = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert set(kept["state_dict"]) >= set(whole.trained())
    if adapter is not None:
        assert set(kept["state_dict"]) == set(whole.trained()), "an adapter's checkpoint holds nothing else"
    seed_everything(99, verbose=False)
    resumed = module(base, adapter=adapter)
    trainer(tmp_path, saving(), steps=10, val_check_interval=5).fit(
        resumed, datamodule=text(folder, base), ckpt_path=str(tmp_path / "last.ckpt")
    )
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, resumed.state_dict()[name], rtol=0, atol=0)
    assert resumed.record.tokens == whole.record.tokens
    assert resumed.record.scores == whole.record.scores
    assert resumed.record.curve() == whole.record.curve()


@pytest.mark.slow
def test_every_weight_is_tuned_if_asked_and_a_whole_model_written(base: Folder, folder: Path, tmp_path: Path) -> None:
    built, start = module(base, adapter=None, export=str(tmp_path / "model")), Start()
    trainer(tmp_path, start, steps=4, val_check_interval=4).fit(built, datamodule=text(folder, base))
    assert not [name for name, each in weights(built).items() if each.equal(start.weights[name])]
    assert built.original.reference(tokens(built)).equal(base.load().reference(tokens(built)))
    written = dynamax.load(tmp_path / "model").backbone
    torch.testing.assert_close(
        written.reference(tokens(built)), built.backbone.reference(tokens(built)), atol=2e-2, rtol=2e-2
    )
    report = json.loads((tmp_path / "model" / "tuning.json").read_text())
    assert report["adapter"] is None
    assert report["fingerprint"] == written.spec.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba2", "gpt2", "granitemoehybrid-dense"])
def test_other_families_are_tuned_merged_and_loaded(family: str, tmp_path: Path) -> None:
    source = Folder(str(model_folder(tmp_path / "base", family, depth=DEPTH)))
    built = module(source, export=str(tmp_path / "model"))
    trainer(tmp_path, steps=3, val_check_interval=3).fit(built, datamodule=text(tmp_path / "text", source))
    written = dynamax.load(tmp_path / "model").backbone
    torch.testing.assert_close(
        written.reference(tokens(built)), built.backbone.reference(tokens(built)), atol=3e-2, rtol=3e-2
    )
    assert not written.reference(tokens(built)).equal(built.original.reference(tokens(built)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"adapter": LowRank(modules=["q_proj", "wq"])}, r"\['wq'\]; the linear layers .* down_proj, gate_proj"),
        ({"adapter": LowRank(modules=[])}, "names no modules"),
        ({"adapter": LowRank(rank=0)}, "rank=0"),
        ({"adapter": LowRank(alpha=float("nan"))}, "alpha nan"),
        ({"learning_rate": 0.0}, "learning_rate 0.0"),
    ],
)
def test_what_the_model_has_not_is_refused(
    base: Folder, folder: Path, tmp_path: Path, options: dict, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path).fit(module(base, **options), datamodule=text(folder, base))


def test_text_of_another_model_or_kind_is_refused(base: Folder, tmp_path: Path) -> None:
    other = Folder(str(model_folder(tmp_path / "other", depth=2)))
    with pytest.raises(ValueError, match=r"Set data.writer to what"):
        trainer(tmp_path).fit(module(base), datamodule=text(tmp_path / "text", other))
    with pytest.raises(ValueError, match="give it WrittenText"):
        trainer(tmp_path).fit(module(base), datamodule=data(tmp_path / "data"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"adapter": LowRank(8, 8.0)}, "another adapter"),
        ({"loss": ExitTuning(hold=2.0)}, "another objective"),
        ({"learning_rate": 1e-3}, "another optimiser"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    base: Folder, folder: Path, tmp_path: Path, options: dict, told: str
) -> None:
    saving = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_last=True)
    trainer(tmp_path, saving, steps=1, limit_val_batches=0).fit(module(base), datamodule=text(folder, base))
    with pytest.raises(ValueError, match=told):
        trainer(tmp_path).fit(
            module(base, **options), datamodule=text(folder, base), ckpt_path=str(tmp_path / "last.ckpt")
        )


def test_files_that_do_not_belong_together_are_refused(tuned, base: Folder, tmp_path: Path) -> None:
    _, _, place = tuned

    def copied(name: str) -> Path:
        target = tmp_path / name
        target.mkdir()
        for file in place.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    cut = copied("cut")
    (cut / "adapter_model.safetensors").write_bytes((place / "adapter_model.safetensors").read_bytes()[:-4])
    with pytest.raises(ValueError, match="is not the file that tuning.json describes"):
        Tuned(cut).load()
    with pytest.raises(ValueError, match="was made for a base with fingerprint"):
        Tuned(place, Folder(str(model_folder(tmp_path / "other", depth=DEPTH, seed=1)))).load()
    odd = copied("odd")
    config = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match=r"\{'use_dora': True\}, which is not merged here"):
        Tuned(odd).load()
    (odd / "tuning.json").write_text("{}")
    with pytest.raises(ValueError, match="it does not say what the adapter belongs to"):
        Tuned(odd).load()
    with pytest.raises(ValueError, match=r"has no tuning.json"):
        Tuned(tmp_path).load()
    assert all(each.dtype == torch.float16 for each in load_file(place / "adapter_model.safetensors").values())


@pytest.mark.slow
def test_lenses_train_along_and_are_written_for_the_tuned_model(base: Folder, folder: Path, tmp_path: Path) -> None:
    loaded = base.load()
    bank = ExitBank({depth: Exit(TunedLens) for depth in (1, 2, 3)}, loaded.site)
    stir(bank)
    bank.save(tmp_path / "before", loaded.spec, base.recipe)
    place = tmp_path / "model"
    built = module(base, loss=ExitTuning(dropout=0.0), export=str(place), heads=str(tmp_path / "before"))
    start = Start()
    trainer(tmp_path, start, steps=20).fit(built, datamodule=text(folder, base))

    moved = {name for name, each in weights(built).items() if not each.equal(start.weights[name])}
    assert {f"lenses.{depth}.shift.weight" for depth in EXITS} <= moved
    assert "lenses.2.shift.weight" not in moved
    report = json.loads((place / "tuning.json").read_text())
    assert report["after"]["1"]["divergence"] < 0.8 * report["before"]["1"]["divergence"]

    engine = dynamax.load(place / "heads", device="cpu")
    assert engine.exits is not None
    assert list(engine.exits.depths) == EXITS
    agreed = count = 0
    for number in range(len(built.data.held_out)):
        for document in built.data.held_out.read(number):
            read = engine.read(torch.tensor([document.tokens[:-1]]), start=document.prompt - 1)
            agreed += int((read.exits[0].token == read.logits_TV.argmax(-1)).sum())
            count += len(read.logits_TV)
    assert report["after"]["1"]["agreement"] == pytest.approx(agreed / count)


@pytest.mark.slow
def test_lenses_are_part_of_what_a_checkpoint_is_of(base: Folder, folder: Path, tmp_path: Path) -> None:
    loaded = base.load()
    bank = ExitBank({depth: Exit(TunedLens) for depth in EXITS}, loaded.site)
    stir(bank)
    bank.save(tmp_path / "before", loaded.spec, base.recipe)
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True, every_n_train_steps=2)
    trainer(tmp_path, keep, steps=4).fit(module(base, heads=str(tmp_path / "before")), datamodule=text(folder, base))
    with pytest.raises(ValueError, match="made with another lenses"):
        trainer(tmp_path, steps=6).fit(
            module(base), datamodule=text(folder, base), ckpt_path=tmp_path / "kept/last.ckpt"
        )


def test_heads_without_a_tuned_exit_are_refused(base: Folder, folder: Path, tmp_path: Path) -> None:
    loaded = base.load()
    ExitBank({1: Exit(TunedLens)}, loaded.site).save(tmp_path / "before", loaded.spec, base.recipe)
    built = module(base, heads=str(tmp_path / "before"))
    with pytest.raises(ValueError, match=r"Exits at \[1, 3\] are to be tuned, but the heads in .* stand at \[1\]"):
        trainer(tmp_path, steps=2).fit(built, datamodule=text(folder, base))
