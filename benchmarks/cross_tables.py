"""The cross table as text: plain for a terminal, Markdown for a document. Knows figures alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Part = Mapping[str, Any]
Row = Mapping[str, Any]

KINDS = {
    "equal_thresholds": ("threshold", "Equal thresholds, all held-out documents"),
    "equal_consistency": ("wanted", "Equal consistency wanted, thresholds chosen on other documents"),
}
ORACLE = "oracle"


def short(gate: str) -> str:
    """A gate's name in a table.

    >>> short("LinearGate")
    'Linear'
    """
    return gate.removesuffix("Gate")


def lines(part: Part, kind: str) -> dict[str, Sequence[Row]]:
    """The rows of each gate, and the oracle's, where it was measured."""
    found = {short(gate): known[kind] for gate, known in part["gates"].items()}
    return found | ({ORACLE: part["oracle"]} if kind == "equal_consistency" else {})


# -- plain text ------------------------------------------------------------------------------------


def text(part: Part) -> str:
    """All tables of one backbone, at most 100 columns wide."""
    return "\n".join([heading(part), "", *_exits(part), *(line for kind in KINDS for line in _section(part, kind))])


def heading(part: Part) -> str:
    """What was measured on what."""
    positions = part["positions"]
    return (
        f"{part['title']}: {part['depth']} blocks, {part['options']['lens']}, {part['documents']} held-out documents, "
        f"{positions['all']} positions"
    )


def _exits(part: Part) -> list[str]:
    def line(name: str, parameters: str, ms: str, values: Sequence[float | None], form: str) -> str:
        cells = "".join(f"{'-' if value is None else form.format(value):>9}" for value in values)
        return f"{name:<26}{parameters:>12}{ms:>8}{cells}"

    exits = part["exits"]
    found = [
        line("", "parameters", "ms", exits, "exit {}"),
        line("lens agrees, %", "", "", [100 * share for share in part["lens_agreement"]], "{:.1f}"),
        line("bytes, always leaving, %", "", "", [100 * row["bytes"] for row in part["always"][:-1]], "{:.1f}"),
    ]
    for gate, known in part["gates"].items():
        name = f"{short(gate)}, AUROC"
        found.append(line(name, f"{known['parameters']:,}", f"{known['ms']:.3f}", known["auroc"], "{:.3f}"))
    return found


def _section(part: Part, kind: str) -> list[str]:
    key, title = KINDS[kind]
    rows = lines(part, kind)
    heads = "".join(f"{row[key]:>22g}" for row in next(iter(rows.values())))
    return [
        "",
        f"{title}; % of the full model's:",
        "tokens kept, those kept by always leaving at that mean depth, blocks, FLOPs, bytes",
        f"{'':<10}{heads}",
        *(f"{name:<10}{''.join(map(_cell, values))}" for name, values in rows.items()),
    ]


def _cell(row: Row) -> str:
    control = f"{100 * row['same_depth']['agreement']:>4.0f}" if "same_depth" in row else "   -"
    costs = "".join(f"{100 * row[name]:>4.0f}" for name in ("blocks", "flops", "bytes"))
    return f"{100 * row['agreement']:>6.1f}{control}{costs}"


# -- Markdown --------------------------------------------------------------------------------------


def markdown(parts: Sequence[Part], notes: Sequence[str]) -> str:
    """The tables of all backbones."""
    return "\n".join([_heads(parts), *(_compared(parts, kind) for kind in KINDS), "\n".join(notes), ""])


def _heads(parts: Sequence[Part]) -> str:
    found = [_row("backbone", "gate", "parameters", "ms", "AUROC by exit"), _row(*["---"] * 5)]
    for part in parts:
        title = part["title"]
        exits = " / ".join(map(str, part["exits"]))
        agrees = " / ".join(f"{100 * share:.1f}" for share in part["lens_agreement"])
        held = " / ".join(f"{100 * row['bytes']:.0f}" for row in part["always"][:-1])
        lens = f"{part['options']['lens']} at {exits}: keeps {agrees} % of the tokens at {held} % of the bytes"
        found.append(_row(title, lens, "", "", ""))
        for gate, known in part["gates"].items():
            areas = " / ".join("-" if area is None else f"{area:.3f}".lstrip("0") for area in known["auroc"])
            found.append(_row("", gate, f"{known['parameters']:,}", f"{known['ms']:.3f}", areas))
    return "\n".join([*found, ""])


def _compared(parts: Sequence[Part], kind: str) -> str:
    key, title = KINDS[kind]
    columns = [f"{row[key]:g}" for row in next(iter(lines(parts[0], kind).values()))]
    found = [
        f"{title}. Tokens kept, in brackets those kept by always leaving at the same mean depth; "
        f"then blocks / FLOPs / bytes; all in % of the full model's.",
        "",
        _row("backbone", "gate", *columns),
        _row(*["---"] * (2 + len(columns))),
    ]
    for part in parts:
        for place, (name, rows) in enumerate(lines(part, kind).items()):
            found.append(_row("" if place else part["title"], name, *map(_marked, rows)))
    return "\n".join([*found, ""])


def _marked(row: Row) -> str:
    control = f" ({100 * row['same_depth']['agreement']:.1f})" if "same_depth" in row else ""
    costs = " / ".join(f"{100 * row[name]:.0f}" for name in ("blocks", "flops", "bytes"))
    return f"{100 * row['agreement']:.1f}{control}: {costs}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
