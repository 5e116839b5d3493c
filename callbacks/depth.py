"""How deep tokens went: a histogram of leaving depths and the mean number of blocks a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks import common
from dynamax.modules.results import PolicyRow

EIGHTHS = " ▏▎▍▌▋▊▉█"
WIDTH = 5


class ExitDepth(Callback):
    """Shows and logs, for each policy and threshold of a test, where tokens left.

    Logs ``depth/<policy>/share_at_<d>`` and ``depth/<policy>/blocks_per_token``; the logger's step counts
    the policy's thresholds.
    """

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the shares and print the histogram."""
        rows = common.results(pl_module, self).frontier
        for step, row in common.by_step(rows):
            figures: dict[str, float | None] = {
                f"depth/{row.policy}/share_at_{depth}": share for depth, share in shares(row.depth_counts).items()
            }
            figures[f"depth/{row.policy}/blocks_per_token"] = row.blocks_per_token
            common.log(trainer, figures, step=step)
        if trainer.is_global_zero:
            print(table(rows))


def shares(counts: Mapping[int, int]) -> dict[int, float]:
    """Share of tokens that left at each depth, shallowest first.

    >>> shares({30: 3, 15: 1})
    {15: 0.25, 30: 0.75}
    """
    total = sum(counts.values())
    return {depth: count / total for depth, count in sorted(counts.items())}


def table(rows: Sequence[PolicyRow]) -> str:
    """The histogram: a line for each policy and threshold, a column for each depth."""
    depths = sorted({depth for row in rows for depth in row.depth_counts})
    lines = []
    for row in rows:
        share = shares(row.depth_counts)
        blocks = row.blocks_per_token
        cells = [bar(share.get(depth, 0.0)) for depth in depths]
        lines.append((row.policy, common.threshold(row.threshold), [*cells, f"{blocks:.1f}" if blocks else ""]))
    heads = [f"{depth}{' ' * (WIDTH + 1)}" for depth in depths]
    return common.table("Share of tokens that leave at each depth", [*heads, "blocks\na token"], lines)


def bar(share: float) -> str:
    """A share in words and as a bar.

    >>> bar(0.5)
    ' 50% ██▌  '
    """
    if not share:
        return "  ·  " + " " * WIDTH
    whole, part = divmod(round(share * WIDTH * 8), 8)
    filled = "█" * whole + (EIGHTHS[part] if part else "")
    return f"{share:4.0%} {filled:<{WIDTH}}"
