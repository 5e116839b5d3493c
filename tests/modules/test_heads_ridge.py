"""Lenses that begin in closed form: against scikit-learn, once a run, and on a store that keeps the top."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import Ridge
from torch.utils.data import DataLoader

from dynamax.backbones.sources import Folder
from dynamax.data import HiddenStates
from dynamax.data.batch import HiddenBatch
from dynamax.data.text import Document, TextSource
from dynamax.heads import Exit, LinearGate, LowRankLens, TunedLens
from dynamax.modules.heads import HeadsModule
from tests.folders import model_folder
from tests.modules import fitting
from tests.modules.fitting import DEPTHS, batches, gates, lenses, module, trainer, weights
from tests.tiny import tiny

pytestmark = fitting.WARNINGS
PENALTY, TOP = 0.05, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tiny("llama", dtype=torch.float32).save_pretrained(place)
    return place


def topped(heads: HeadsModule, number: int = 3) -> list[HiddenBatch]:
    """Batches that hold the states at the top, some way from those of the last exit."""
    found = []
    for batch in batches(heads, number):
        turn_DD = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3))).Q
        found.append(replace(batch, hidden={**batch.hidden, TOP: batch.hidden[4] @ turn_DD + 0.3}))
    return found


def test_lenses_begin_at_the_ridge(folder: Path, tmp_path: Path) -> None:
    still = {**lenses(epochs=1, learning_rate=1e-12, prompts=(0.0, 1.0)), **gates()}
    heads = module(folder, ridge=PENALTY, phases=still, weight_decay=0.0)
    given = topped(heads)
    trainer(tmp_path, epochs=2).fit(heads, DataLoader(given, batch_size=None))
    site = heads._top[0].site(2)
    for depth in DEPTHS:
        u_ND, rest_ND = (
            torch.cat(
                [part[batch.answer_BT & batch.live_BT] for batch, part in zip(given, parts, strict=True)]
            ).double()
            for parts in (
                [site.normalize(batch.hidden[depth]) for batch in given],
                [site.normalize(batch.hidden[TOP]) - site.normalize(batch.hidden[depth]) for batch in given],
            )
        )
        centered_ND = u_ND - u_ND.mean(0)
        alpha = PENALTY * float((centered_ND**2).sum(0).mean())
        wanted = Ridge(alpha=alpha).fit(u_ND.numpy(), rest_ND.numpy())
        shift = heads.bank.lens(depth).shift
        torch.testing.assert_close(shift.weight.double(), torch.from_numpy(wanted.coef_), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(shift.bias.double(), torch.from_numpy(wanted.intercept_), rtol=1e-4, atol=1e-5)
        assert shift.weight.abs().max() > 0.01


def test_a_resumed_run_keeps_its_lenses(folder: Path, tmp_path: Path) -> None:
    whole = module(folder, ridge=PENALTY)
    trainer(tmp_path, epochs=4).fit(whole, DataLoader(topped(whole), batch_size=None))
    first = module(folder, ridge=PENALTY)
    stopped = trainer(tmp_path, epochs=4, limit_train_batches=3)
    stopped.fit_loop.max_epochs = 4
    stopped.fit(first, DataLoader(topped(first), batch_size=None))
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    resumed = module(folder, ridge=PENALTY)
    resumed._regress = lambda penalty: pytest.fail("it began anew")  # type: ignore[method-assign]
    loader = DataLoader(topped(resumed), batch_size=None)
    trainer(tmp_path, epochs=4).fit(resumed, loader, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], tensor, rtol=0, atol=0)


def test_what_ridge_cannot_do_is_refused(folder: Path, tmp_path: Path) -> None:
    for options in ({"ridge": 0.0}, {"ridge": float("nan")}, {"ridge": 0.1, "heads": "somewhere"}):
        with pytest.raises(ValueError, match="ridge is a penalty greater than 0, and sets lenses anew"):
            module(folder, **options)
    low = dict.fromkeys(DEPTHS, Exit(partial(LowRankLens, rank=4), [LinearGate]))
    with pytest.raises(ValueError, match="no exit has a TunedLens"):
        module(folder, ridge=0.1, exits=low)
    heads = module(folder, ridge=PENALTY)
    with pytest.raises(ValueError, match=r"states at the depths \[2, 4\], but exits are to be trained at \[2, 4, 6\]"):
        trainer(tmp_path).fit(heads, DataLoader(batches(heads), batch_size=None))


class Counting(TextSource):
    """Twenty documents of counted tokens."""

    def identity(self) -> dict[str, object]:
        return {"name": "counting"}

    def count(self) -> int:
        return 20

    def groups(self, engine, *, skip: int = 0):  # noqa: ANN001, ANN202
        every = [Document([(7 * n + i) % 60 for i in range(12)], 3, origin=str(n)) for n in range(20)]
        yield from ([document] for document in every[skip:])


def test_a_store_that_keeps_the_top_serves(tmp_path: Path) -> None:
    source = Folder(str(model_folder(tmp_path / "model")))
    heads = HeadsModule(source, dict.fromkeys(DEPTHS, Exit(TunedLens)), lenses(epochs=None), ridge=PENALTY)
    assert heads.stored_depths() == [2, 4, TOP]
    data = HiddenStates(source, Counting(), heads.stored_depths(), folder=str(tmp_path / "store"), k=4, validation=0.3)
    heads.check_data(data)
    trainer(tmp_path, epochs=1).fit(heads, datamodule=data)
    (batch, *_) = data.val_dataloader()
    backbone = source.load()
    rows = zip(batch.hidden[TOP], batch.top_tokens_BTK, batch.live_BT & batch.answer_BT, strict=True)
    for h_TD, top_TK, asked_T in rows:  # the states at the top are those that say the labels
        said_T = backbone.unembed(h_TD[None])[0].argmax(-1)
        assert said_T[asked_T].equal(top_TK[asked_T][:, 0])
        assert asked_T.any()
