"""Where tokens left, answers, scores, gates, promises: pictures, their numbers as tables, and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynamax.report.charts import SHAPES, Axis, Series, bullet, plot, stacked
from dynamax.report.markup import (
    OLDER,
    figure,
    legend,
    made,
    missing,
    panel,
    panels,
    point,
    share,
    table,
    text,
    threshold,
)
from dynamax.report.read import Run

PROMPT = 600
"""Characters of a prompt that are shown, from its end."""


# -- depths, answers ------------------------------------------------------------------------------------


def depths_of(run: Run) -> list[int]:
    """Depths of the exits below the top, and of the model."""
    total = run.report["backbone"]["depth"]
    return [row["depth"] for row in run.report["exits"] if row["depth"] < total] + [total]


def paint(run: Run, depth: int) -> str:
    """The colour of a depth, as the page's style makes it: the earliest exit is 100 %, the latest 0 %, the top bare."""
    *exits, total = depths_of(run)
    if depth >= total:
        return "--tone:var(--bare)"
    rank = sum(each < depth for each in exits) / max(1, len(exits) - 1)
    return f"--p:{100 * (1 - min(rank, 1)):.0f}%"


def depth_legend(run: Run) -> str:
    """What the colours of depths mean."""
    *exits, total = depths_of(run)
    named = [(depth, f"exit at {depth}") for depth in exits] + [(total, f"full depth, {total}")]
    items = "".join(
        f'<li><span class="depth" style="{paint(run, d)}">&nbsp;</span> {text(name)}</li>' for d, name in named
    )
    return f'<ul class="legend" aria-label="Colours of depths">{items}</ul>\n'


def histograms(run: Run) -> str:
    """Where tokens left."""
    depths = depths_of(run)
    lines, bars = [], ""
    for row in run.report["frontier"][1:]:
        counts = {int(depth): count for depth, count in row["depth_counts"].items()}
        total = sum(counts.values())
        if not total:
            continue
        name = point(row)
        told = [
            (counts.get(d, 0) / total, paint(run, d), f"depth {d}: {share(counts.get(d, 0) / total)}") for d in depths
        ]
        picture = stacked(told, f"{name}: " + "; ".join(each[2] for each in told))
        bars += f'<div class="bar"><span>{text(name)}</span>{picture}</div>\n'
        lines.append([row["policy"], threshold(row["threshold"]), *(share(each[0]) for each in told), str(total)])
    if not lines:
        return missing("where tokens left", "No policy decoded a token behind the first.")
    heads = ["policy", "threshold", *(f"depth {depth}" for depth in depths), "tokens"]
    numbers = table(f"{run.name}: share of tokens that left at each depth", heads, lines, words=2)
    shown = f"<details><summary>The numbers as a table</summary>{numbers}</details>\n"
    return depth_legend(run) + f'<div class="bars">{bars}</div>\n' + shown + made(run.report["command"])


def answers(run: Run, number: int) -> str:
    """Real answers, coloured by depth; a chooser of policies where there is JavaScript."""
    rows = run.report["answers"]
    if not rows:
        why = f"{run.report['task']['name']} scores likelihoods; nothing was generated."
        return missing("answers", OLDER if run.version == 2 else why)
    total = run.report["backbone"]["depth"]
    points = list(dict.fromkeys(point(given) for row in rows for given in row["given"][1:]))
    out = depth_legend(run)
    if points:
        options = "".join(f'<option value="{index}">{text(name)}</option>' for index, name in enumerate(points))
        chooser = f'<select data-answers="answers-{number}">{options}</select>'
        out += f'<p class="chooser" hidden><label>Answers of {chooser}</label></p>\n'
    out += f'<div id="answers-{number}">\n'
    for row in rows:
        prompt = row["prompt"] if len(row["prompt"]) <= PROMPT else f"… {row['prompt'][-PROMPT:]}"
        out += f'<article><h4>Prompt {text(row["id"])}</h4><p class="prompt">{text(prompt)}</p>\n'
        for given in row["given"]:
            name = point(given)
            place = "full" if given is row["given"][0] else points.index(name)
            pairs = list(zip(given["tokens"], given["depths"], strict=False))
            spans = "".join(
                f'<span class="depth" style="{paint(run, depth)}" title="depth {depth} of {total}">'
                f"{text(token) or '<i>·</i>'}</span>"
                for token, depth in pairs
            )
            said = " ".join(f"{token.strip() or '·'} ({depth})" for token, depth in pairs)
            out += f'<div class="answer" data-point="{place}"><h5>{text(name)}</h5><p class="tokens">{spans}</p>'
            out += f"<details><summary>Depth of each token as text</summary><p>{text(said)}</p></details></div>\n"
        out += "</article>\n"
    out += (
        "</div>\n<p>The first token comes from the prompt's own pass, at full depth. A dot is a token without text of "
    )
    return (
        out
        + "its own: it ends the answer, or begins a character that the next one completes.</p>\n"
        + made(run.report["command"])
    )


# -- scores and gates -----------------------------------------------------------------------------------


def reliability(run: Run) -> str:
    """Scores against the share that was right."""
    rows = run.report["reliability"]
    if not rows:
        why = "No policy of the run has a score that one pass over a text can tell."
        return missing("reliability of scores", OLDER if run.version == 2 else why)
    drawn, lines = [], []
    for index, name in enumerate(dict.fromkeys(row["policy"] for row in rows)):
        mine = [row for row in rows if row["policy"] == name]
        bins = [together(parts) for parts in zip(*(row["bins"] for row in mine), strict=False)]
        tokens = sum(count for count, _, _ in bins)
        if not tokens:
            continue
        ece = sum(count * abs(score - right) for count, score, right in bins) / tokens
        brier = sum(row["brier"] * row["tokens"] for row in mine) / tokens
        points = [(s, r, f"{count} tokens, score {s:.3f}, right {share(r)}") for count, s, r in bins if count]
        series = [Series(name, points, index, SHAPES[index % len(SHAPES)])]
        title = (
            f"{run.name}, {name}: score against the share that was right, all exits. ECE {ece:.3f}, Brier {brier:.3f}."
        )
        axes = Axis("Score", False, 0.0, 1.0), Axis("Share that was right", True, 0.0, 1.0)
        picture = plot(series, *axes, title=title, diagonal=True, counts=[count for count, _, _ in bins])
        drawn.append(panel(f"{name}: ECE {ece:.3f}, Brier {brier:.3f}", picture))
        lines.append([name, "all", str(tokens), figure(ece, 3), figure(brier, 3)])
        lines += [
            [name, str(row["depth"]), str(row["tokens"]), figure(row["ece"], 3), figure(row["brier"], 3)]
            for row in mine
        ]
    out = (
        panels(drawn) + "<p>A score that is a probability lies on the diagonal. Grey bars: how many tokens have such a "
    )
    out += "score, the tallest being the most. All exits together, at every position of the full model's answers.</p>\n"
    heads = ["policy", "exit", "tokens", "ECE", "Brier"]
    return (
        out
        + table(f"{run.name}: how far scores are probabilities", heads, lines, words=2)
        + made(run.report["command"])
    )


def together(bins: Sequence[dict[str, Any]]) -> tuple[int, float, float]:
    """One bin of several exits: tokens, mean score, share that was right."""
    count = sum(each["tokens"] for each in bins)
    mean = [sum(each["tokens"] * (each[name] or 0.0) for each in bins) / max(1, count) for name in ("score", "right")]
    return count, mean[0], mean[1]


def gates(run: Run) -> str:
    """AUROC of gates and agreement of lenses, by exit."""
    exits, fit = run.report["exits"], run.fit
    names = list(dict.fromkeys([name for row in exits for name in row["gate_auroc"]] + list(fit.auroc if fit else ())))
    ranked, said = [], []
    for index, name in enumerate(names):
        found = [(row["depth"], row["gate_auroc"].get(name)) for row in exits]
        points = [(float(depth), value, f"depth {depth}: {value:.3f}") for depth, value in found if value is not None]
        ranked.append(Series(f"{name}, test", points, index, SHAPES[index % len(SHAPES)]))
        held = sorted(fit.auroc.get(name, {}).items()) if fit else []
        points = [(float(depth), value, f"depth {depth}: {value:.3f}") for depth, value in held]
        ranked.append(Series(f"{name}, held out by fit", points, index, SHAPES[index % len(SHAPES)], "dashed"))
    points = [(float(row["depth"]), row["agreement"], "") for row in exits if row["agreement"] is not None]
    said.append(Series("lens, test", points, -1, SHAPES[0]))
    held = sorted(fit.agreement.items()) if fit else []
    said.append(Series("lens, held out by fit", [(float(d), value, "") for d, value in held], -1, SHAPES[1], "dashed"))
    depth = Axis("Depth of the exit, blocks", share=False)
    ranked, said = [each for each in ranked if each.points], [each for each in said if each.points]
    drawn = []
    for heading, series, y in (
        ("Gates: AUROC", ranked, Axis("AUROC", share=False, marked=(0.5,))),
        ("Lenses: same tokens as the full model", said, Axis("Same tokens")),
    ):
        if series:
            title = f"{run.name}, {heading} by exit. The numbers are in the table below."
            drawn.append(panel(heading, plot(series, depth, y, title=title)))
    out = panels(drawn) + legend([*ranked, *said]) if drawn else ""
    if not ranked:
        out += missing("AUROC of gates", "The run has no gates, or their lenses are always right or never.")
    heads = ["exit", "lens", "lens agrees, test", "lens agrees, fit"]
    heads += [f"{name}, {where}" for name in names for where in ("test", "fit")]
    lines = []
    for row in exits:
        cells = [str(row["depth"]), row["lens"]["name"], share(row["agreement"])]
        cells.append(share(fit.agreement.get(row["depth"]) if fit else None))
        for name in names:
            cells += [figure(row["gate_auroc"].get(name), 3)]
            cells += [figure(fit.auroc.get(name, {}).get(row["depth"]) if fit else None, 3)]
        lines.append(cells)
    out += table(f"{run.name}: lenses, and AUROC of gates, by exit", heads, lines, words=2)
    out += made(run.report["command"], "Test by")
    if fit is None:
        return out + missing("figures of training", "There is no metrics.csv of fit with gates below the run's folder.")
    out += "<p>Those of fit are of the last validation of training; the heads that were saved may be earlier ones. "
    return out + f"They stand in {text(fit.file)}.</p>\n" + made(fit.command, "Fit by")


def promises(run: Run) -> str:
    """What was promised beside what happened."""
    rows = [row for row in run.report["frontier"] if row.get("promise") is not None]
    out, lines, bars = "", [], ""
    for row in rows:
        facts = row["promise"]
        if facts["loss"] is not None:
            told = f"{point(row)}: promised at most {share(facts['epsilon'])}, here {share(facts['loss'])}"
            colour = "c2" if facts["loss"] <= facts["epsilon"] else "c1"
            picture = bullet(facts["loss"], facts["epsilon"], colour, told)
            bars += f'<div class="bar"><span>{text(told)}</span>{picture}</div>\n'
        known = next((each for each in run.calibrations if each.text == facts["promise"]), None)
        before = f"{share(known.promise['loss'])} of {known.promise['documents']}" if known else "–"
        cells = [row["policy"], verdict(facts), facts["promise"], share(facts["epsilon"]), share(facts["loss"])]
        lines.append([*cells, str(facts["documents"]), before])
    if lines:
        heads = ["policy", "verdict", "promise", "at most", "here", "examples here", "when calibrated"]
        out += (
            f'<div class="bars">{bars}</div>\n<p>Bar: what happened. Line: what was promised at most.</p>\n'
            if bars
            else ""
        )
        out += table(f"{run.name}: promises beside what happened", heads, lines, words=3) + made(run.report["command"])
        out += (
            "<p>A promise is about the mean over texts drawn as those of the calibration. Few examples, or examples of "
        )
        out += "another kind, may lie above it by chance or by right.</p>\n"
    else:
        out += missing("promises that were tested", "No policy of the run was calibrated.")
    tested = [row["promise"]["promise"] for row in rows]
    for each in run.calibrations:
        if each.text not in tested:
            kind = each.promise["reason"] or "It was not tested in this run."
            out += f"<p>{text(each.file)} holds: {text(each.text)}. {text(kind)}</p>\n"
        out += made(each.command, f"{each.file} by")
    return out


def verdict(facts: dict[str, Any]) -> str:
    """Whether a promise was kept here."""
    if facts["promise"].endswith("nothing is promised"):
        return "nothing promised"
    if facts["loss"] is None:
        return "nothing counted"
    return "✓ kept" if facts["loss"] <= facts["epsilon"] else "✗ broken here"
