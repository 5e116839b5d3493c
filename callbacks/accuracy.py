"""How right each exit is: agreement of its lens with the full model, and AUROC of its gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks import common
from dynamax.modules.heads import HeadsModule


@dataclass(frozen=True)
class Accuracy:
    """One exit's.

    Attributes:
        depth: The exit.
        agreement: Share of positions at which its lens says the full model's token; None if unknown.
        aurocs: For each gate, how well its confidence ranks those positions; None if unknown.
    """

    depth: int
    agreement: float | None
    aurocs: Mapping[str, float | None]


class ExitAccuracy(Callback):
    """Shows and logs the exits' accuracies at the end of ``fit``, ``validate`` and ``test``.

    Training scores are those of the last validation. Logs ``exits/agreement`` and ``exits/auroc_<gate>``
    with the depth as the logger's step.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what the last validation found."""
        _tell(trainer, validated(common.heads(pl_module, self), trainer.callback_metrics), "held-out documents")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what was found, if validation stands alone."""
        if trainer.state.fn == "validate":
            _tell(trainer, validated(common.heads(pl_module, self), trainer.callback_metrics), "held-out documents")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what was found along the full model's answers."""
        exits = common.results(pl_module, self).exits
        found = [Accuracy(each.depth, each.agreement, each.gate_auroc) for each in exits]
        _tell(trainer, found, "the full model's own answers")


def validated(module: HeadsModule, figures: Mapping[str, Tensor]) -> list[Accuracy]:
    """The exits' accuracies among logged figures."""

    def known(name: str) -> float | None:
        return float(figures[name]) if name in figures else None

    return [
        Accuracy(
            depth,
            known(f"val/agreement/{depth}"),
            {gate: known(f"val/auroc/{depth}/{gate}") for gate in module.bank.gates(depth)},
        )
        for depth in module.bank.depths
    ]


def _tell(trainer: Trainer, found: Sequence[Accuracy], over: str) -> None:
    for exit_ in found:
        aurocs = {f"exits/auroc_{gate}": auroc for gate, auroc in exit_.aurocs.items()}
        common.log(trainer, {"exits/agreement": exit_.agreement, **aurocs}, step=exit_.depth)
    if trainer.is_global_zero:
        print(table(found, over))


def table(found: Sequence[Accuracy], over: str) -> str:
    """The accuracies, a line for each exit."""
    gates = sorted({gate for exit_ in found for gate in exit_.aurocs})
    lines = []
    for exit_ in found:
        aurocs = [exit_.aurocs.get(gate) for gate in gates]
        cells = ["" if auroc is None else f"{auroc:.3f}" for auroc in aurocs]
        agreement = "" if exit_.agreement is None else f"{exit_.agreement:.1%}"
        lines.append(("", f"exit {exit_.depth}", [agreement, *cells]))
    return common.table(f"Exits over {over}", ["lens\nagrees", *(f"{gate}\nAUROC" for gate in gates)], lines)
