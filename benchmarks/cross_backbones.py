"""The backbones of the cross table, and the heads they get: all gates in one fit, on the same labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch import Trainer, seed_everything

from dynamax.backbones.sources import Folder, SmolLM2, Source
from dynamax.data.batch import HiddenBatch
from dynamax.data.generated import SelfGenerated
from dynamax.data.hidden import HiddenStates
from dynamax.data.text import TextSource
from dynamax.heads import (
    AttentionGate,
    Exit,
    ExitBank,
    FFNGate,
    Lens,
    LinearGate,
    LogitLens,
    LowRankLens,
    MambaGate,
    TunedLens,
)
from dynamax.modules.heads import HeadsModule
from dynamax.modules.phases import Phase
from dynamax.objectives import GateObjective, LensDistillation
from dynamax.types import Site, Spec

LensName = Literal["LogitLens", "LowRankLens", "TunedLens"]
LENSES: dict[LensName, type[Lens]] = {"LogitLens": LogitLens, "LowRankLens": LowRankLens, "TunedLens": TunedLens}
GATES = (LinearGate, FFNGate, MambaGate, AttentionGate)
SMOLLM2 = "smollm2"
SIBLINGS = {"llama": "Transformer", "mamba2": "Mamba-2", "granite": "Hybrid"}
PLAIN = "plain"
NAMES = [*SIBLINGS, SMOLLM2, *(f"{PLAIN}/{name}" for name in SIBLINGS)]


@dataclass(frozen=True)
class Contender:
    """A backbone of the table.

    Attributes:
        name: What options and the JSON file call it.
        title: What tables call it.
        source: Where it comes from.
        text: What its exits are trained and measured on.
        exits: Their depths.
        lens: Reads its exits out.
    """

    name: str
    title: str
    source: Source
    text: TextSource
    exits: tuple[int, ...]
    lens: LensName


@dataclass(frozen=True)
class Training:
    """How heads are trained.

    Attributes:
        lens_epochs: For lenses that have something to learn.
        gate_epochs: For the gates.
        validation: Part of the prompts whose documents are held out.
        seed: Of the heads' weights.
    """

    lens_epochs: int = 4
    gate_epochs: int = 6
    validation: float = 0.2
    seed: int = 0


class Fitted(NamedTuple):
    """Trained heads, their places, and the documents they have not seen."""

    bank: ExitBank
    sites: dict[int, Site]
    spec: Spec
    held_out: Iterable[HiddenBatch]


def contender(name: str, *, assets: Path, lens: LensName | None = None) -> Contender:
    """A backbone by name.

    Args:
        name: One of ``NAMES``; a sibling's is its folder in ``assets``.
        assets: Where the siblings lie.
        lens: In place of the usual one: the logit lens for siblings trained with exits, low rank for the others.

    Raises:
        ValueError: If its folder is missing.
    """
    if name == SMOLLM2:  # the demo's text and exits, so that its store serves
        text = SelfGenerated(questions=240, documents=480, max_new_tokens=64)
        return Contender(name, "SmolLM2-135M", SmolLM2(), text, (15, 19, 23, 27), lens or "LowRankLens")
    folder, family, plain = assets / name, name.split("/")[-1], name.startswith(PLAIN)
    if not folder.is_dir():
        raise ValueError(
            f"The backbone {name} is wanted, but {folder} is not a folder. Train it (dynamax train -c "
            f"configs/siblings/{family}.yaml --model.export {folder}), name another --assets, or leave it out of "
            f"--backbones."
        )
    text = SelfGenerated(questions=240, passages=0, chat=False, documents=960, max_new_tokens=64)
    title = f"{SIBLINGS[family]}, {'plain' if plain else 'trained with exits'}"
    return Contender(
        name, title, Folder(str(folder)), text, (2, 4, 6), lens or ("LowRankLens" if plain else "LogitLens")
    )


def options(given: Contender, training: Training) -> dict[str, Any]:
    """Everything the figures of a backbone depend on but the machine, as JSON values."""
    return {
        "fingerprint": given.source.output_stage().spec.fingerprint,
        "text": given.text.identity(),
        "exits": list(given.exits),
        "lens": given.lens,
        "gates": [gate.__name__ for gate in GATES],
        **asdict(training),
    }


def fit(given: Contender, training: Training, *, store: str) -> Fitted:
    """Train the heads of a backbone on a CPU; the store is filled if need be.

    Args:
        given: The backbone.
        training: How.
        store: Folder where stores lie.
    """
    learns = given.lens != "LogitLens"
    data = HiddenStates(
        given.source, given.text, list(given.exits), folder=store, device="cpu", validation=training.validation
    )
    phases = {"lenses": Phase(LensDistillation(), epochs=training.lens_epochs)} if learns else {}
    module = HeadsModule(
        given.source,
        {depth: Exit(LENSES[given.lens], list(GATES)) for depth in given.exits},
        {**phases, "gates": Phase(GateObjective())},
    )
    seed_everything(training.seed, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=training.gate_epochs + (training.lens_epochs if learns else 0),
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, datamodule=data)
    return Fitted(module.bank.eval().requires_grad_(False), module.sites, module.spec, data.val_dataloader())
