"""``dynamax calibrate MODEL``: thresholds with a promise, tested on texts that the search did not see."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dynamax.calibration.calibrate import Calibrated, check
from dynamax.calibration.calibrate import calibrate as calibrated
from dynamax.calibration.promise import Level, as_yaml, described
from dynamax.calibration.reliability import TREATMENTS, ExitReliability, reliability
from dynamax.calibration.risk import Method
from dynamax.calibration.task import calibrate_task, parted, usable
from dynamax.commands.parsing import Parser, prepare
from dynamax.data.text import Document, TextSource
from dynamax.engine import Engine, load
from dynamax.errors import UserError
from dynamax.files import write_atomically
from dynamax.heads.bank import Exit
from dynamax.paths import InputPath, output_file
from dynamax.policies.base import ScorePolicy, TerminationPolicy
from dynamax.policies.schedule import Never
from dynamax.progress import Bar
from dynamax.tasks.base import Task

T = TypeVar("T")


def main(arguments: Sequence[str]) -> None:
    """Parse, calibrate, write."""
    calibrate(**options(arguments), command=shlex.join(["dynamax", *arguments]))


def options(arguments: Sequence[str]) -> dict[str, Any]:
    """What ``calibrate`` is to be called with, its parts built."""
    prepare()
    parser = Parser(prog="dynamax calibrate", description="Choose and test thresholds with a promise.")
    parser.add_argument("-c", "--config", action="config", help="Options from a YAML file.")
    parser.add_argument("model", type=str, help="Which model, as dynamax.load takes it.")
    parser.add_function_arguments(calibrate, skip={"model", "recipe", "command"}, sub_configs=True)
    given = parser.read_arguments(list(arguments[1:]))
    recipe = given.policy.as_dict()
    built = parser.instantiate(given).as_dict()
    built.pop("config")
    return {**built, "recipe": recipe}


def calibrate(
    model: str,
    policy: TerminationPolicy,
    text: TextSource | None = None,
    *,
    task: Task | None = None,
    epsilon: float,
    delta: float = 0.1,
    method: Method = "ltt",
    level: Level | None = None,
    chat: bool | None = None,
    share: float = 0.5,
    heads: InputPath | None = None,
    exits: dict[int, Exit] | None = None,
    dtype: str = "float32",
    precision: str | None = None,
    out: str = "calibrated.yaml",
    plot: str | None = None,
    recipe: dict[str, Any],
    command: str = "",
) -> None:
    """Print the promise and how reliable each exit's scores are, and write the policy with its promise.

    Args:
        model: Which model: usually a folder of trained heads; else a folder, a name on the Hub, or a source.
        policy: Whose score decides, such as MaxProb or GateConfidence. Its threshold is not read: one is found for
            each exit. A policy that must be fitted, such as BetaMixture without mixtures, is fitted first.
        text: The texts that thresholds are searched and tested on, drawn as those that the promise is about, and
            not among those that the heads were trained on.
        task: In place of text: a task whose score is not to be lower than the full model's. One loss is how much lower
            the score of one example is; answers are decoded, which takes long.
        epsilon: The mean loss is to be at most this.
        delta: Probability that it is not, over the draw of the texts.
        method: How the promise is tested. ltt and ucb: with probability 1 - delta; crc: on average over draws; naive:
            not at all, to compare.
        level: One loss is the share of a document's tokens that are not the full model's (document), whether any is
            (answer), or each token by itself (token), which promises less than it says, since tokens of one document
            depend on one another. Left out, document; not for a task.
        chat: Whether a task's prompts are wrapped in the chat template, as in dynamax test; left out, they are not.
        share: Part of the texts, or of a task's examples, that is searched; the rest tests.
        heads: Folder of trained heads, for a model that is none.
        exits: Untrained exits in place of heads, such as '{2: {}, 4: {}}'.
        dtype: Of the model, such as float32 or bfloat16.
        precision: How its weights are held; see dynamax generate.
        out: File that is written, YAML, which test and generate take.
        plot: Write a reliability diagram of each exit here, as PNG.
        recipe: The policy's class name and options.
        command: The command line, for the file.
    """
    if not isinstance(policy, ScorePolicy):
        raise UserError(
            f"calibrate was given the policy {policy.label}; wanted: one with a score, such as MaxProb, Margin, "
            f"Entropy, GateConfidence or JEIGate. Name one of these: combinations are searched by exit alone."
        )
    check_source(text, task, level=level, chat=chat)
    if task is not None:
        parted(usable(task), share)  # refuses before the model is loaded, which takes longer
    place = Path(out).expanduser()
    if not place.parent.is_dir() or place.is_dir():
        raise UserError(f"{out} cannot be written: it is a folder, or its folder does not exist. Change --out.")
    picture = output_file(plot, ".png")
    engine = load(model, heads=None if heads is None else str(heads), exits=exits, dtype=dtype, precision=precision)
    check(engine, policy, epsilon=epsilon, delta=delta, share=share)  # before texts are written, which takes long
    bounds: dict[str, Any] = {"epsilon": epsilon, "delta": delta, "method": method, "share": share, "progress": bar}
    if task is not None:
        found = calibrate_task(engine, policy, task, chat=bool(chat), **bounds)
    else:
        assert text is not None, "one of the two was given"
        found = calibrated(engine, policy, written(text, engine), level=level or "document", **bounds)
    assert engine.exits is not None, "or calibrate would have refused"
    rows = reliability(found.search, found.test, engine.exits.depths)
    print(told(found), "", table(rows), "", sep="\n")
    write_atomically(place, as_yaml(described(found.policy, recipe), found.promise, command).encode())
    print(f"Wrote {out}")
    if picture is not None:
        from dynamax.calibration.plot import draw  # matplotlib is slow to import

        title = f"{policy.label}: its scores as probabilities"
        draw(rows, title=title, path=picture)
        print(f"Wrote {picture}")


def check_source(text: TextSource | None, task: Task | None, *, level: Level | None, chat: bool | None) -> None:
    """Refuse both or neither of texts and a task, and what changes nothing with the one that was given (UserError)."""
    if (text is None) == (task is None):
        given = "neither text nor task" if text is None else "both text and task"
        raise UserError(
            f"calibrate was given {given}; wanted: one of the two. Name texts (--text SelfGenerated), whose tokens are "
            f"to be the full model's, or a task (--task Questions), whose score is to be as good."
        )
    idle = {"chat": chat} if task is None else {"level": level}
    for name, value in idle.items():
        if value is not None:
            raise UserError(
                f"calibrate was given {name}={value}, which changes nothing with "
                f"{'text: a source of texts has its own' if task is None else 'task: a loss is of its score'}. Leave "
                f"{name} out."
            )


def written(text: TextSource, engine: Engine) -> list[Document]:
    """All documents of a source."""
    with Bar(total=text.count(), desc="texts", unit="group") as shown:
        text.tell = shown.set_postfix_str
        documents: list[Document] = []
        for group in text.groups(engine):
            documents += group
            shown.update()
    return documents


def bar(items: Iterable[T], label: str) -> Iterator[T]:
    """Documents, or a task's examples, with a bar."""
    everything = list(items)
    with Bar(total=len(everything), desc=label, unit="document") as shown:
        for item in everything:
            yield item
            shown.update()


def told(found: Calibrated) -> str:
    """What was found, in words."""
    promise = found.promise
    if isinstance(found.policy, Never):
        return f"Nothing can be promised: {promise.reason}. The policy is Never."
    levels = found.policy.policy.threshold  # pyright: ignore[reportAttributeAccessIssue] - OnlyAt
    shown = ", ".join(f"{level:.4f} at {depth}" for depth, level in levels.items())
    return (
        f"{promise.text}.\n{found.policy.label}: {shown}\nOn the test documents it lost {promise.loss:.2%}, at "
        f"{promise.blocks:.1f} blocks a token."
    )


def table(rows: Sequence[ExitReliability]) -> str:
    """A line for each exit: how far its scores are from probabilities, as they are and mended."""
    lines = [
        "How far the scores are from probabilities, on the test documents; temperature and isotonic regression were "
        "fitted on the search documents:",
        f"{'':36}" + "".join(f"{name:^18}" for name in TREATMENTS),
        f"{'exit':>4}{'positions':>11}{'right':>8}{'mean score':>12} " + f"{'ECE':>9}{'Brier':>9}" * 3 + f"{'T':>8}",
    ]
    for row in rows:
        errors = "".join(f"{row.errors[name].ece:>9.3f}{row.errors[name].brier:>9.3f}" for name in TREATMENTS)
        lines.append(
            f"{row.depth:>4}{row.positions:>11,}{row.right:>8.1%}{row.score:>12.3f} {errors}{row.temperature:>8.3g}"
        )
    return "\n".join(lines)
