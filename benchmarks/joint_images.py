"""JEI-DNN's own setting in small: images, a frozen vision transformer, a linear head and a gate behind every block.

    python -m benchmarks.joint_images [--seeds 3] [--out FILE]

The images are scikit-learn's handwritten digits, 1,797 of 8 x 8 pixels. Of these 30 % train the backbone, 30 % heads
and gates, 15 % calibrate, 25 % test; training images are moved by up to a pixel. Contenders share the backbone:

- fixed: heads trained alone; leave where the greatest probability reaches a threshold.
- gates: the same heads; then JEI-DNN's gates are trained on them and the heads rest.
- joint: JEI-DNN, heads and gates in turns, behind the same warm-up.
- joint, rho not detached: as the paper's code has it; the heads' loss is then the plain one whatever the gates say.

``fixed`` is swept over its threshold, the others over lambda, at the rule's threshold of 0.5. Costs are multiply-adds
of blocks, heads and gates, over the full model's. Accuracies are read off each contender's curve at equal costs.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from dynamax.calibration.reliability import calibration_error
from dynamax.heads.inputs import uncertainty
from dynamax.metrics.environment import environment
from dynamax.objectives.joint import best_places, rescaled
from dynamax.policies.joint import exit_distribution

BLOCKS, WIDTH, CLASSES = 7, 64, 10
PATCHES = 17  # with the class token
TRADEOFFS = (0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.5, 4.0, 7.0)
THRESHOLDS = tuple(1 - 0.75 * 0.72**k for k in range(24))
COSTS = (0.16, 0.2, 0.25, 0.3)
MISS = 0.05
CONTENDERS = ("fixed", "gates", "joint", "joint, rho not detached")


class Backbone(nn.Module):
    """A small vision transformer; the class token after each block is what heads read."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=BLOCKS,
            num_attention_heads=4,
            intermediate_size=4 * WIDTH,
            image_size=8,
            patch_size=2,
            num_channels=1,
        )
        self.vit = ViTModel(config, add_pooling_layer=False)
        self.top = nn.Linear(WIDTH, CLASSES)

    def forward(self, images_NHW: Tensor) -> list[Tensor]:
        """States of the class token after each block, the last one normed, ``h_ND``."""
        states = self.vit(images_NHW[:, None], output_hidden_states=True)
        return [h_NTD[:, 0] for h_NTD in states.hidden_states[1:-1]] + [states.last_hidden_state[:, 0]]


class Heads(nn.Module):
    """A linear head and a gate at each exit."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)) for _ in range(BLOCKS - 1)
        )
        self.gates = nn.ModuleList(nn.Linear(4, 1) for _ in range(BLOCKS - 1))

    def logits(self, states: Sequence[Tensor]) -> Tensor:
        """``logits_END`` of the exits."""
        return torch.stack([head(h_ND) for head, h_ND in zip(self.heads, states, strict=False)])

    def scores(self, logits_ENC: Tensor) -> Tensor:
        """Log-odds ``s_EN`` of the gates; no gradient reaches the heads."""
        seen = uncertainty(logits_ENC.detach().softmax(-1), logits_ENC.shape[-1])
        return torch.stack([gate(each)[:, 0] for gate, each in zip(self.gates, seen, strict=True)])


def exit_costs(gated: bool) -> list[float]:
    """Multiply-adds up to each exit and to the top, over those of the plain model."""
    block = PATCHES * 12 * WIDTH**2 + 2 * PATCHES**2 * WIDTH
    enter, head = 16 * 4 * WIDTH, WIDTH * CLASSES
    exit_ = head + (9 * CLASSES + 6 if gated else CLASSES)
    full = enter + BLOCKS * block + head
    spent = [enter + (index + 1) * (block + exit_) for index in range(BLOCKS - 1)]
    return [each / full for each in [*spent, spent[-1] + block + head]]


def moved(images_NHW: Tensor) -> Tensor:
    """Images moved by up to a pixel each way."""
    padded = F.pad(images_NHW, (1, 1, 1, 1))
    shifts_N2 = torch.randint(0, 3, (len(images_NHW), 2))
    return torch.stack([image[y : y + 8, x : x + 8] for image, (y, x) in zip(padded, shifts_N2.tolist(), strict=True)])


@dataclass
class Data:
    """One split of the digits: images and classes of each part."""

    parts: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def split(cls) -> Data:
        """A random split, by torch's seed."""
        digits = cast(Any, load_digits())
        images, classes = torch.tensor(digits.images / 16).float(), torch.tensor(digits.target)
        sizes = {"backbone": 540, "heads": 540, "calibration": 270, "test": 447}
        places = torch.randperm(len(images)).split(list(sizes.values()))
        return cls({name: (images[place], classes[place]) for name, place in zip(sizes, places, strict=True)})


def trained_backbone(data: Data, steps: int) -> Backbone:
    """The backbone, trained and frozen."""
    model, (images, classes) = Backbone(), data.parts["backbone"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (64,))
        loss = F.cross_entropy(model.top(model(moved(images[chosen]))[-1]), classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


class Run:
    """States of a frozen backbone, and training on them.

    Args:
        data: The images.
        backbone: Frozen.
        views: How often each training image is moved.
    """

    def __init__(self, data: Data, backbone: Backbone, views: int = 8) -> None:
        images, classes = data.parts["heads"]
        self.states = [torch.cat(each) for each in zip(*(backbone(moved(images)) for _ in range(views)), strict=True)]
        self.classes = classes.repeat(views)
        self.top_N = F.cross_entropy(backbone.top(self.states[-1]), self.classes, reduction="none")
        self.held = {name: (backbone(data.parts[name][0]), data.parts[name][1]) for name in ("calibration", "test")}
        self.top = backbone.top

    def batch(self) -> Tensor:
        """Numbers of 64 images."""
        return torch.randint(len(self.classes), (64,))

    def losses(self, heads: Heads, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and cross-entropies of the exits."""
        logits_ENC = heads.logits([h_ND[chosen] for h_ND in self.states])
        classes_N = self.classes[chosen]
        return logits_ENC, torch.stack([F.cross_entropy(each, classes_N, reduction="none") for each in logits_ENC])

    def warm(self, steps: int) -> Heads:
        """Heads trained alone; earlier ones weigh more, as the paper has it."""
        heads = Heads()
        optimizer = torch.optim.AdamW(heads.heads.parameters(), lr=2e-3)
        weights_E1 = torch.arange(BLOCKS - 1, 0, -1.0)[:, None]
        for _ in range(steps):
            _, loss_EN = self.losses(heads, self.batch())
            optimizer.zero_grad()
            (weights_E1 * loss_EN).mean().backward()
            optimizer.step()
        return heads

    def alternate(self, warm: Heads, tradeoff: float, steps: int, *, kind: str, turn: int = 100) -> Heads:
        """Gates and heads in turns, gates first; for ``gates`` the heads rest."""
        heads, costs = copy.deepcopy(warm), exit_costs(gated=True)
        gates = torch.optim.AdamW(heads.gates.parameters(), lr=2e-2)
        lenses = torch.optim.AdamW(heads.heads.parameters(), lr=1e-3)
        for step in range(steps):
            chosen = self.batch()
            logits_ENC, loss_EN = self.losses(heads, chosen)
            score_EN = heads.scores(logits_ENC)
            if kind == "gates" or step // turn % 2 == 0:
                place_N = best_places([*loss_EN.detach(), self.top_N[chosen]], costs, tradeoff)
                target_EN = (place_N <= torch.arange(BLOCKS - 1)[:, None]).float()
                ones_E1 = target_EN.sum(1, keepdim=True)
                weight_E1 = ((target_EN.shape[1] - ones_E1) / ones_E1.clamp_min(1)).clamp(1.0, 5.0)
                loss, optimizer = F.binary_cross_entropy_with_logits(score_EN, target_EN, pos_weight=weight_E1), gates
            else:
                leave_EN, _ = exit_distribution(score_EN.detach().sigmoid())
                known_EN = loss_EN if kind == "joint, rho not detached" else loss_EN.detach()
                loss, optimizer = (rescaled(known_EN, leave_EN) * loss_EN).mean(), lenses
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for each, rate in ((gates, 2e-2), (lenses, 1e-3)):
                each.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        return heads

    @torch.no_grad()
    def figures(self, heads: Heads, threshold: float, *, gated: bool) -> dict[str, float]:
        """Accuracy, cost, calibration error and conformal sets where each test image leaves."""
        said = {name: self._leave(heads, states, threshold, gated=gated) for name, (states, _) in self.held.items()}
        probs_NC, place_N = said["test"]
        classes_N = self.held["test"][1]
        right_N = probs_NC.argmax(-1) == classes_N
        costs = torch.tensor(exit_costs(gated))
        known_NC, known_place_N = said["calibration"]
        missing_N = 1 - known_NC.gather(1, self.held["calibration"][1][:, None])[:, 0]
        sizes, missed = [], 0.0
        for place in range(BLOCKS):
            here_N = place_N == place
            of_place = missing_N[known_place_N == place]
            level = quantile(of_place if len(of_place) > 20 else missing_N)  # the paper's rule of 20
            inside_NC = probs_NC[here_N] >= 1 - level
            sizes.append(inside_NC.sum(-1))
            missed += float((~inside_NC.gather(1, classes_N[here_N][:, None])).sum())
        return {
            "cost": float(costs[place_N].mean()),
            "accuracy": float(right_N.float().mean()),
            "ece": calibration_error(probs_NC.amax(-1).numpy(), right_N.numpy()),
            "set size": float(torch.cat(sizes).float().mean()),
            "missed": missed / len(classes_N),
        }

    def _leave(self, heads: Heads, states: list[Tensor], threshold: float, *, gated: bool) -> tuple[Tensor, Tensor]:
        """Probabilities of the exit taken, and which it is; the top is the last."""
        logits_ENC = torch.cat([heads.logits(states), self.top(states[-1])[None]])
        probs_ENC = logits_ENC.softmax(-1)
        sure_EN = exit_distribution(heads.scores(logits_ENC[:-1]).sigmoid())[1] if gated else probs_ENC[:-1].amax(-1)
        leaves_EN = torch.cat([sure_EN >= threshold, torch.ones(1, sure_EN.shape[1], dtype=torch.bool)])
        place_N = leaves_EN.int().argmax(0)
        return probs_ENC[place_N, torch.arange(len(place_N))], place_N


def quantile(missing_N: Tensor) -> float:
    """The conformal level: the ``ceil((n + 1)(1 - MISS))``-th smallest score; 1 where there are too few."""
    rank = int(np.ceil((len(missing_N) + 1) * (1 - MISS)))
    return float(missing_N.sort().values[rank - 1]) if 0 < rank <= len(missing_N) else 1.0


def at_costs(curve: list[dict[str, float]], costs: Sequence[float]) -> list[dict[str, float]]:
    """A contender's figures at given costs, between the nearest points of its curve; nan where it has none so dear."""
    ordered = sorted(curve, key=lambda row: row["cost"])
    known = [row["cost"] for row in ordered]
    outside = {"left": math.nan, "right": math.nan}
    return [
        {key: float(np.interp(cost, known, [row[key] for row in ordered], **outside)) for key in ordered[0]}
        for cost in costs
    ]


def contend(seed: int, steps: int) -> dict[str, Any]:
    """All contenders on one split."""
    torch.manual_seed(seed)
    data = Data.split()
    with torch.enable_grad():
        backbone = trained_backbone(data, steps)
    run = Run(data, backbone)
    warm = run.warm(steps)
    plain = run.warm(2 * steps)  # as many steps as the others' heads have in all
    curves = {"fixed": [run.figures(plain, threshold, gated=False) for threshold in THRESHOLDS]}
    for kind in CONTENDERS[1:]:
        begin = plain if kind == "gates" else warm
        count = steps if kind == "gates" else 2 * steps  # half of the turns are the gates'
        curves[kind] = [
            run.figures(run.alternate(begin, tradeoff, count, kind=kind), 0.5, gated=True) for tradeoff in TRADEOFFS
        ]
    states, classes = run.held["test"]
    top = float((run.top(states[-1]).argmax(-1) == classes).float().mean())
    return {"full": top, "curves": curves, "at": {name: at_costs(curve, COSTS) for name, curve in curves.items()}}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation between seeds; nan if a seed has no figure."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def table(runs: list[dict[str, Any]]) -> str:
    """Figures of all contenders at equal costs, mean and spread over the seeds."""
    mean, deviation = spread([run["full"] for run in runs])
    lines = [f"full model: accuracy {100 * mean:.1f} +- {100 * deviation:.1f} %, {len(runs)} seeds"]
    lines.append(f"{'cost':>5}  {'contender':26}{'accuracy, %':>15}{'ECE, %':>14}{'set size':>15}{'missed, %':>14}")
    for place, cost in enumerate(COSTS):
        for name in CONTENDERS:
            cells = []
            for key, scale in (("accuracy", 100), ("ece", 100), ("set size", 1), ("missed", 100)):
                mean, deviation = spread([scale * run["at"][name][place][key] for run in runs])
                cells.append("-" if math.isnan(mean) else f"{mean:.2f} +- {deviation:.2f}")
            lines.append(f"{cost:>5.2f}  {name:26}{cells[0]:>15}{cells[1]:>14}{cells[2]:>15}{cells[3]:>14}")
    return "\n".join(lines)


def main() -> None:
    """Train, print the table, write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    runs = [contend(seed, args.steps) for seed in range(args.seeds)]
    print(table(runs))
    if args.out is not None:
        report = {"environment": environment("cpu", dtype="float32", batch=1), "runs": runs, "costs": COSTS}
        report["options"] = {"seeds": args.seeds, "steps": args.steps}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
