"""The table of a measurement, for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dynamax.bench.results import Row

HEADS = (
    ("", "contender"),
    ("ms a", "p10"),
    ("token", "p50"),
    ("", "p95"),
    ("tokens", "a s"),
    ("first", "ms"),
    ("memory", "MB"),
    ("", "tokens"),
    ("tokens", "equal"),
    ("texts", "equal"),
    ("over", "floor"),
)


def table(found: Sequence[Row]) -> str:
    """A line for each contender, the fastest first; what has no figure stands as -."""
    ordered = sorted(found, key=lambda row: row.ms_per_token["p50"] if row.ms_per_token else float("inf"))
    lines = [tuple(head[level] for head in HEADS) for level in (0, 1)] + [_cells(row) for row in ordered]
    widths = [max(len(line[place]) for line in lines) for place in range(len(HEADS))]
    return "\n".join(
        f"{line[0]:<{widths[0]}}  "
        + "  ".join(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    ms = row.ms_per_token
    return (
        row.name,
        *(("-", "-", "-") if ms is None else (f"{ms[part]:.1f}" for part in ("p10", "p50", "p95"))),
        f"{row.tokens_per_second:.1f}",
        f"{row.first_token_ms['p50']:.0f}",
        "-" if row.memory_bytes is None else f"{row.memory_bytes / 1e6:.0f}",
        str(row.tokens),
        "-" if row.equal_share is None else f"{row.equal_share:.1%}",
        "-" if row.identical is None else f"{row.identical}/{row.answers}",
        "-" if ms is None or row.floor_ms is None else f"{ms['p50'] / row.floor_ms:.2f}x",
    )


def notes(found: Sequence[Row], floors: Mapping[str, float], absent: Mapping[str, str], reference: str) -> str:
    """What stands below the table: the floors, what the figures are, and who is absent and why.

    Args:
        found: The figures.
        floors: Median milliseconds by format.
        absent: Reasons by name.
        reference: Name of the contender that answers are compared with.
    """
    lines = []
    if floors:
        times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in floors.items())
        lines.append(f"Floor, the bare products of one token by torch: {times}")
    if any(row.name == reference for row in found):
        lines.append(f"Tokens equal: those until the first difference from {reference}, in float32")
    else:
        lines.append(f"Nothing to compare answers with: name {reference} among the contenders")
    if absent:
        reasons = dict.fromkeys(absent.values())
        named = {why: ", ".join(name for name, reason in absent.items() if reason == why) for why in reasons}
        lines += ["", "Absent:", *(f"  {names}: {reason}" for reason, names in named.items())]
    return "\n".join(lines)
