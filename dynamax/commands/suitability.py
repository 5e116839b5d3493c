"""``dynamax suitability MODEL``: whether early exits will pay, before anything is trained."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dynamax.commands.calibrate import bar, written
from dynamax.commands.parsing import Parser, prepare
from dynamax.data.generated import SelfGenerated
from dynamax.data.text import TextSource
from dynamax.engine import load
from dynamax.files import write_atomically
from dynamax.metrics.environment import environment
from dynamax.paths import output_file
from dynamax.suitability.prices import CONTEXT, LENSES, Price
from dynamax.suitability.study import PENALTY, WORTH, Study, study


def main(arguments: Sequence[str]) -> None:
    """Parse, read the model, say what was found."""
    prepare()
    parser = Parser(prog="dynamax suitability", description="Whether early exits will pay on a model.")
    parser.add_argument("-c", "--config", action="config", help="Options from a YAML file.")
    parser.add_argument("model", type=str, help="Which model, as dynamax.load takes it.")
    parser.add_function_arguments(suitability, skip={"model", "command"}, sub_configs=True)
    given = parser.read_arguments(list(arguments[1:]))
    built = parser.instantiate(given).as_dict()
    built.pop("config")
    suitability(**built, command=shlex.join(["dynamax", *arguments]))


def suitability(
    model: str,
    text: TextSource | None = None,
    *,
    documents: int = 128,
    keep: float = 0.98,
    every: int = 1,
    share: float = 0.5,
    measure: bool = False,
    dtype: str = "float32",
    precision: str | None = "auto",
    out: str | None = None,
    plot: str | None = None,
    command: str = "",
) -> None:
    """Print a table and a verdict; write what was asked for.

    Args:
        model: Which model: a folder, a name on the Hub, a GGUF file, or a source, such as SmolLM2. Heads are not read.
        text: The texts that the model is read on; left out, its own answers to questions that come with the project.
        documents: How many answers it writes, of up to 64 tokens, where no text is given.
        keep: Share of tokens that are to stay the full model's.
        every: Read every so many blocks only, which takes less time and memory.
        share: Part of the texts that the ridge lens is fitted on; the rest is read.
        measure: Time blocks and output matrix here, too. Do nothing else on the machine meanwhile.
        dtype: Of the model, such as float32 or bfloat16.
        precision: How its weights are held; see dynamax generate.
        out: Write the figures here, as JSON.
        plot: Write the picture here, as PNG.
        command: The command line, for the figures.
    """
    report, picture = output_file(out, ".json"), output_file(plot, ".png")
    engine = load(model, dtype=dtype, precision=precision)
    if text is None:
        chat = engine.tokenizer is not None and bool(engine.tokenizer.chat_template)
        text = SelfGenerated(documents=documents, max_new_tokens=64, chat=chat)
    texts = written(text, engine)
    found = study(engine, texts, keep=keep, every=every, share=share, measure=measure, progress=bar)
    said = f"Do early exits pay on {model}? {found.verdict.capitalize()}."
    print(table(found), "", said, *reasons(found), sep="\n")
    if report is not None:
        place = environment(engine.device, dtype=dtype, batch=1, precision=engine.precision)
        about = {"command": command, "model": model, "text": text.identity(), "penalty": PENALTY, "context": CONTEXT}
        content = {**about, "environment": place, **as_json(found)}
        write_atomically(report, f"{json.dumps(content, indent=2, allow_nan=False)}\n".encode())
        print(f"Wrote {report}")
    if picture is not None:
        from dynamax.suitability.plot import draw  # matplotlib is slow to import

        draw(found, title=said, subtitle="\n".join(reasons(found)), path=picture)
        print(f"Wrote {picture}")


def table(found: Study) -> str:
    """A line for each depth."""
    where = ("bytes", "time") if found.rows[0].time else ("bytes",)
    heads = [f"{what}, {lens}" for what in ("right", "could leave") for lens in LENSES]
    heads += [f"must leave, {name}" for name in where]
    lines = ["depth  " + "  ".join(heads)]
    for row in found.rows:
        shares: list[float | None] = [row.readings[lens].agreement for lens in LENSES]
        shares += [row.readings[lens].leaves for lens in LENSES]
        shares += [price.break_even("logit") for price in (row.bytes, row.time) if price is not None]
        cells = ["never pays" if each is None else f"{each:.1%}" for each in shares]
        lines.append(
            f"{row.depth:5}  " + "  ".join(cell.rjust(len(head)) for cell, head in zip(cells, heads, strict=True))
        )
    return "\n".join(lines)


def reasons(found: Study) -> list[str]:
    """The figures that the verdict rests on, in words."""
    what = "time here" if found.rows[0].time else "bytes"
    (row, lens), (gated, read) = found.threshold, found.gate
    saved = row.saves_by_threshold(lens)
    costs = f"saves {saved:.1%}" if saved > 0 else f"costs {-saved:.1%} more"
    sure = max(LENSES, key=lambda lens: found.oracle[lens].saves)
    perfect = found.oracle[sure]
    return [
        f"At {found.keep:.0%} same tokens, a gate that is as sure as MaxProb and costs nothing saves "
        f"{gated.saves_by_gate(read):.1%} of the {what} (exit {gated.depth} of {found.blocks}, {read} lens); "
        f"{WORTH:.0%} would be worth it.",
        f"A threshold on MaxProb, which reads the output matrix at every token, {costs} (exit {row.depth}, {lens} "
        f"lens).",
        f"A perfect gate at every depth saves {perfect.saves:.1%}: the {sure} lens is first right after "
        f"{perfect.depth:.1f} blocks in the mean.",
    ]


def as_json(found: Study) -> dict[str, Any]:
    """The study as JSON values; shares of a token at full depth, rounded."""

    def rounded(values: dict[str, float]) -> dict[str, float]:
        return {name: round(value, 4) for name, value in values.items()}

    def priced(price: Price) -> dict[str, Any]:
        even = {lens: price.break_even(lens) for lens in LENSES}
        return {
            **rounded(asdict(price)),
            "break_even": {k: None if v is None else round(v, 4) for k, v in even.items()},
        }

    (row, lens), (gated, read) = found.threshold, found.gate
    return {
        "blocks": found.blocks,
        "documents": dict(zip(("fit", "read"), found.documents, strict=True)),
        "positions": dict(zip(("fit", "read"), found.positions, strict=True)),
        "keep": found.keep,
        "verdict": found.verdict,
        "threshold": {"depth": row.depth, "lens": lens, "saves": round(row.saves_by_threshold(lens), 4)},
        "gate": {"depth": gated.depth, "lens": read, "saves": round(gated.saves_by_gate(read), 4)},
        "oracle": {lens: rounded(asdict(each)) for lens, each in found.oracle.items()},
        "rows": [
            {
                "depth": row.depth,
                **{lens: rounded(asdict(each)) for lens, each in row.readings.items()},
                "bytes": priced(row.bytes),
                "time": None if row.time is None else priced(row.time),
            }
            for row in found.rows
        ],
    }
