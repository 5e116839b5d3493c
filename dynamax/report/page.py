"""The page: one HTML file that needs nothing else. Styles and script lie beside this module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any

from dynamax.report.charts import Axis, Series, plot
from dynamax.report.frontiers import COSTS, cost, curves, frontier, heading, policies, quality
from dynamax.report.markup import legend, made, missing, panel, panels, table, text
from dynamax.report.parts import answers, gates, histograms, promises, reliability
from dynamax.report.read import Run

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""What the page may load: nothing. Browsers hold it to that."""
PARTS: dict[str, Callable[[Run], str]] = {
    "What was kept, and what it cost": frontier,
    "Where tokens left": histograms,
    "Promises": promises,
    "Are scores probabilities?": reliability,
    "Lenses and gates by exit": gates,
}


def page(runs: Sequence[Run], command: str) -> str:
    """The whole page.

    Args:
        runs: What the page is about, at least one.
        command: What makes the page.
    """
    style, script = ((files("dynamax.report") / name).read_text("utf-8") for name in ("page.css", "page.js"))
    title = f"Early exits: {', '.join(run.name for run in runs)}"
    sections = [(f"run-{index}", run.name, section(run, index)) for index, run in enumerate(runs)]
    if len(runs) > 1:
        sections.insert(0, ("comparison", "Comparison", comparison(runs)))
    sections.append(("environment", "Environment", environment(runs)))
    links = "".join(f'<li><a href="#{place}">{text(name)}</a></li>' for place, name, _ in sections)
    body = "".join(
        f'<section id="{place}" aria-labelledby="{place}-name"><h2 id="{place}-name">{text(name)}</h2>\n'
        f"{content}</section>\n"
        for place, name, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">To the content</a>
<header><h1>{text(title)}</h1>
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main id="main" tabindex="-1">
{body}</main>
<footer>{made(command, "This page was made by")}</footer>
<script>
{script}</script>
</body>
</html>
"""


def section(run: Run, number: int) -> str:
    """All of one run."""
    report = run.report
    backbone, task, decoding = report["backbone"], report["task"], report["decoding"]
    sampler = (decoding.get("sampler") or {}).get("name", "none")
    options = ", ".join(f"{name} {value}" for name, value in decoding["options"].items())
    facts = {
        "model": f"{backbone['family']}, {backbone['depth']} blocks of width {backbone['width']}, fingerprint "
        f"{backbone['fingerprint']}",
        "task": f"{task['name']}, {task['examples']} examples, score {task['headline']}",
        "decoder": f"{decoding['decoder']}{f' ({options})' if options else ''}, sampler {sampler}"
        + (", lossless" if decoding["lossless"] else ""),
        "heads": decoding["heads"] or "untrained exits",
        "schema version": str(run.version),
    }
    out = '<dl class="facts">' + "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in facts.items()) + "</dl>\n"
    for title, part in PARTS.items():
        out += f"<h3>{text(title)}</h3>\n{part(run)}"
    return out + f"<h3>Answers, coloured by depth</h3>\n{answers(run, number)}"


def comparison(runs: Sequence[Run]) -> str:
    """All runs in the same pictures, a colour each."""
    out = ""
    tasks = {(run.report["task"]["name"], run.report["task"]["headline"]) for run in runs}
    kept, kept_name = quality(runs)
    wanted = [(kept, kept_name, True)]
    if len(tasks) == 1:
        wanted.append(("score", f"Task score ({runs[0].report['task']['headline']})", False))
    else:
        named = ", ".join(f"{run.name}: {run.report['task']['name']}" for run in runs)
        out += missing("a comparison of task scores", f"The runs had other tasks ({named}).")
    fingerprints = {run.report["backbone"]["fingerprint"] for run in runs}
    if len(fingerprints) > 1:
        out += "<p>The runs are of different models. Each cost is a share of what its own full model costs, so "
        out += "that curves compare what exits save, not how fast the models are.</p>\n"
    drawn, signs = [], []
    for y, label, is_share in wanted:
        for x, axis in COSTS.items():
            series: list[Series] = []
            for index, run in enumerate(runs):
                if any(cost(row, x) is not None and row[y] is not None for row in run.report["frontier"][1:]):
                    series += curves(run, x, y, policies(runs), colour=index)
            if series:
                signs += series
                title = f"All runs: {label} against {axis}. The numbers are in the tables of the runs."
                picture = plot(series, Axis(axis, marked=(1.0,)), Axis(label, share=is_share), title=title)
                drawn.append(panel(heading(label, axis), picture))
    if not drawn:
        return out + missing("pictures over FLOPs, bytes and time", "Nothing was timed or charged in any run.")
    return out + panels(drawn) + legend(signs) + "".join(made(run.report["command"], f"{run.name} by") for run in runs)


def environment(runs: Sequence[Run]) -> str:
    """Machines and versions, side by side."""
    known: list[dict[str, Any]] = [run.report["environment"] for run in runs]
    names = list(dict.fromkeys(name for each in known for name in each))
    lines = []
    for name in names:
        values = ["–" if each.get(name) is None else str(each[name]) for each in known]
        lines.append([f"{name} (not the same)" if len(set(values)) > 1 else name, *values])
    heads = ["", *(run.name for run in runs)]
    out = table("Machine, device, versions of each run", heads, lines, words=len(heads))
    return out + "".join(made(run.report["command"], f"{run.name} by") for run in runs)
