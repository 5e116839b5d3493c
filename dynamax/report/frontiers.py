"""What was kept against what it cost: curves of one run, to be drawn alone or together with others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamax.report.charts import RING, SHAPES, STAR, TICK, Axis, Series, plot
from dynamax.report.markup import OLDER, figure, legend, made, missing, panel, panels, share, table, text, threshold
from dynamax.report.read import Run

COSTS = {
    "flops_fraction": "FLOPs, share of full decoding",
    "bytes_fraction": "Bytes, share of full decoding",
    "time": "Time, share of full decoding",
}


def cost(row: dict[str, Any], name: str) -> float | None:
    """What a row cost, beside full decoding."""
    if name == "time":
        return 1 / row["speed_up"] if row["speed_up"] else None
    return row[name]


def quality(runs: Sequence[Run]) -> tuple[str, str]:
    """What is kept: agreement, or drafts where decoding is lossless in all runs; and its name."""
    drafted = all(any(row["drafts_kept"] is not None for row in run.report["frontier"]) for run in runs)
    return ("drafts_kept", "Drafts kept") if drafted else ("agreement", "Same tokens")


def policies(runs: Sequence[Run]) -> list[str]:
    """Names of all policies, each once."""
    return list(dict.fromkeys(row["policy"] for run in runs for row in run.report["frontier"][1:]))


def curves(run: Run, x: str, y: str, names: Sequence[str], *, colour: int | None = None) -> list[Series]:
    """Policies, bounds and the full model over two figures; a row without one of them is left out.

    Args:
        run: The run.
        x: Figure from left to right.
        y: Figure from bottom to top.
        names: Policies; the place in it gives each its mark.
        colour: Of all curves, which are then named by the run too; left out, each policy has its own.
    """
    found: list[Series] = []
    prefix = "" if colour is None else f"{run.name}: "
    for index, name in enumerate(names):
        rows = [row for row in run.report["frontier"][1:] if row["policy"] == name]
        rows.sort(key=lambda row: row["threshold"] if isinstance(row["threshold"], int | float) else 0)
        shown = [(cost(row, x), row[y], threshold(row["threshold"])) for row in rows]
        points = [
            (a, b, f"threshold {level}" if level else "") for a, b, level in shown if a is not None and b is not None
        ]
        mark = SHAPES[index % len(SHAPES)]
        found.append(Series(prefix + name, points, index if colour is None else colour, mark))
    full = run.full
    whole = (1.0, full[y], "") if full[y] is not None else None
    other = -1 if colour is None else colour
    fixed = [row for row in run.report["bounds"] if row["policy"] == "AtDepth" and None not in (cost(row, x), row[y])]
    line = [(cost(row, x) or 0.0, row[y], f"depth {row['threshold']}") for row in fixed]
    found.append(Series(f"{prefix}always at the same depth", line, other, TICK, "dashed"))
    best = [row for row in run.report["bounds"] if row["policy"] == "Oracle" and None not in (cost(row, x), row[y])]
    found.append(Series(f"{prefix}oracle", [(cost(row, x) or 0.0, row[y], "") for row in best], other, RING, "none"))
    found.append(Series(f"{prefix}full model", [whole] if whole else [], other, STAR, "none"))
    return [each for each in found if each.points]


def heading(label: str, axis: str) -> str:
    """Over a picture: both axes in short, "Same tokens and bytes"."""
    name = axis.partition(",")[0]
    return f"{label.partition(' (')[0]} and {name if name == 'FLOPs' else name.lower()}"


def frontier(run: Run) -> str:
    """What was kept against what it cost."""
    kept, kept_name = quality([run])
    headline = run.report["task"]["headline"]
    rows, score = run.report["frontier"][1:], f"Task score ({headline})"
    out, drawn, signs = "", [], []
    for y, label, is_share in ((kept, kept_name, True), ("score", score, False)):
        for x, axis in COSTS.items():
            series = curves(run, x, y, policies([run]))
            if any(row[y] is not None and cost(row, x) is not None for row in rows):
                signs += series
                title = f"{run.name}: {label} against {axis}. The numbers are in the table below."
                picture = plot(series, Axis(axis, marked=(1.0,)), Axis(label, share=is_share), title=title)
                drawn.append(panel(heading(label, axis), picture))
    if drawn:
        out += panels(drawn) + legend(signs)
        out += "<p>Same tokens: share of tokens that are the full model's own. Up is better, left is cheaper; the "
        out += "vertical line is full decoding. Bytes are those moved; time was measured in turn with it.</p>\n"
    else:
        why = "Nothing was timed or charged, as for tasks that score likelihoods, or with timed: 0."
        out += missing("pictures over FLOPs, bytes and time", why if rows else "The run has no policy.")
    if run.report["bounds"]:
        oracle, *_ = [row for row in run.report["bounds"] if row["policy"] == "Oracle"] or [None]
        out += (
            "<p>The oracle leaves at the first exit that is right; what choosing it costs is not counted. No gate on "
        )
        out += "these exits keeps all tokens with fewer blocks."
        if oracle is not None:
            total = run.report["backbone"]["depth"]
            out += f" It needs {text(figure(oracle['blocks_per_token'], 1))} of {total} blocks a token."
        out += " It was not timed. Neither it nor a fixed depth answered on its own, so they have no task score.</p>\n"
    elif run.version == 2:
        out += missing("the oracle and leaving always at the same depth", OLDER)
    else:
        out += missing("the oracle and leaving always at the same depth", "A lens of this run runs the last block.")
    heads = ["policy", "threshold", "same tokens", "same answers", "blocks a token", "FLOPs", "bytes", "ms a token"]
    heads += ["speed-up", headline, "tokens", "tokens timed"]
    if kept == "drafts_kept":
        heads[2:3] = ["same tokens", "drafts kept"]
    lines = []
    for row in (*run.report["frontier"], *run.report["bounds"]):
        cells = [row["policy"], threshold(row["threshold"]), share(row["agreement"])]
        cells += [share(row["drafts_kept"])] if kept == "drafts_kept" else []
        cells += [share(row["answer_agreement"], 0), figure(row["blocks_per_token"])]
        cells += [share(row["flops_fraction"]), share(row["bytes_fraction"]), figure(row["ms_per_token"])]
        cells += [figure(row["speed_up"]), figure(row["score"], 3), str(row["tokens"]), str(row["timed_tokens"])]
        lines.append(cells)
    return out + table(f"{run.name}: policies, thresholds, bounds", heads, lines, words=2) + made(run.report["command"])
