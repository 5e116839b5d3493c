"""What ``dynamax bench`` does: read options, measure, show a table, write the report and the picture."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.utils.logging import set_verbosity_error

from dynamax.backbones.sources import FolderSource, Source
from dynamax.bench.base import Subject
from dynamax.bench.contenders import CONTENDERS, REFERENCE, chosen
from dynamax.bench.outline import Outline, outline
from dynamax.bench.prompts import prompts as read_prompts
from dynamax.bench.report import facts, model_facts, title, where
from dynamax.bench.results import Row, as_json, rows
from dynamax.bench.runner import Findings, Runner
from dynamax.bench.tables import notes, table
from dynamax.commands.parsing import Parser, prepare
from dynamax.decoding.base import DecoderFactory
from dynamax.engine import find_source
from dynamax.errors import UserError
from dynamax.files import write_atomically
from dynamax.generation import encode, generation_options
from dynamax.heads.bank import Exit
from dynamax.heads.saved import read, read_record
from dynamax.paths import InputPath, output_file
from dynamax.policies.base import TerminationPolicy
from dynamax.policies.confidence import GateConfidence

SHORT = {"--threshold": "--policy.threshold"}


def main(arguments: Sequence[str]) -> None:
    """Parse and measure."""
    prepare()
    set_verbosity_error()  # of transformers, which remarks on drafts and missing kernels
    parser = Parser(prog="dynamax bench", description="Measure how fast a model decodes here, beside others.")
    parser.add_argument("-c", "--config", action="config", help="Options from a YAML file.")
    parser.add_argument("model", type=str, help="Which model, as dynamax.load takes it.")
    parser.add_function_arguments(bench, skip={"model", "command"}, sub_configs=True)
    given = parser.read_arguments([_named(each) for each in arguments[1:]])
    built = parser.instantiate(given).as_dict()
    built.pop("config")
    bench(**built, command=shlex.join(["dynamax", *arguments]))


def _named(argument: str) -> str:
    """An option under its full name, with underscores."""
    name, equals, value = argument.partition("=")
    if name.startswith("--"):
        name = SHORT.get(name, name.replace("-", "_").replace("__", "--", 1))
    return name + equals + value


def bench(
    model: str,
    policy: TerminationPolicy | None = None,
    *,
    heads: InputPath | None = None,
    exits: dict[int, Exit] | None = None,
    decoder: DecoderFactory | None = None,
    prompts: InputPath | None = None,
    max_new_tokens: int = 48,
    rounds: int = 2,
    contenders: list[str] | None = None,
    threads: int | None = None,
    chat: bool | None = None,
    seed: int = 0,
    out: str | None = None,
    plot: str | None = None,
    command: str = "",
) -> None:
    """Print a table of all contenders; write what was asked for.

    Args:
        model: Which model: a folder, a name on the Hub, a GGUF file, a folder of trained heads, or a source, such as
            SmolLM2.
        policy: When to leave early; --threshold is short for --policy.threshold. Left out where there are trained
            heads, GateConfidence of the MambaGate at 0.8, as generate has it.
        heads: Folder of trained heads; left out, those that MODEL names, if it is a folder of heads.
        exits: Untrained exits in place of heads, such as '{2: {}, 4: {}}', for a model that was trained with exits.
        decoder: One more contender, dynamax-decoder, with options of its own, such as SelfSpeculative.
        prompts: Text file with a prompt on each line; left out, four of the questions that come with the project.
        max_new_tokens: Most tokens of an answer; an end token ends it before.
        rounds: How often every prompt is answered by every contender, after a warm-up.
        contenders: Names, with commas between; all are those that can run, but for those that take minutes to begin.
        threads: Threads for every contender; left out, as many as PyTorch takes.
        chat: Wrap prompts as a user's turn in the chat template; left out, where the model has one.
        seed: Chooses the questions, and seeds PyTorch.
        out: Write the report here, as JSON.
        plot: Write the picture here, as PNG.
        command: The command line, for the report.
    """
    wanted = chosen(contenders)
    _check(max_new_tokens=(max_new_tokens, 2), rounds=(rounds, 1), threads=(threads, 1))
    report, picture = output_file(out, ".json"), output_file(plot, ".png")
    texts = read_prompts(None if prompts is None else Path(prompts), seed)
    torch.manual_seed(seed)
    torch.set_num_threads(threads or torch.get_num_threads())
    source, own_heads = find_source(model)
    folder_of_heads = Path(heads) if heads is not None else own_heads if exits is None else None
    policy = _checked(policy, folder_of_heads, exits)
    if folder_of_heads is not None:
        read(folder_of_heads, source.output_stage().spec)  # those of another model are refused before the measuring
    folder = source.folder() if isinstance(source, FolderSource) else None
    sizes = None if folder is None else outline(folder)
    tokens = [encode(source.tokenizer(), text, chat=chat)[0].tolist() for text in texts]
    subject = Subject(
        source=source,
        folder=folder,
        ends=_ends(source),
        max_new_tokens=max_new_tokens,
        context=_context(max(map(len, tokens)), max_new_tokens, sizes),
        threads=torch.get_num_threads(),
        heads=folder_of_heads,
        exits=exits,
        policy=policy,
        decoder=decoder,
    )
    made = {CONTENDERS[name](name, subject): asked for name, asked in wanted.items()}
    found = Runner(made, tokens, rounds=rounds, sizes=sizes).run()
    figures = rows(found, REFERENCE)
    _show(figures, found)
    options = {"prompts": texts, "max_new_tokens": max_new_tokens, "rounds": rounds, "seed": seed, "chat": chat}
    if report is not None:
        about = {"command": command, **facts(), "model": model_facts(model, subject, sizes), "options": options}
        content = {**about, **as_json(found, figures, REFERENCE)}
        write_atomically(report, f"{json.dumps(content, indent=2, allow_nan=False)}\n".encode())
        print(f"Wrote {report}")
    if picture is not None:
        from dynamax.bench.plot import draw  # matplotlib is slow to import

        draw(figures, title=title(model, sizes), subtitle=where(options, found.loading), path=picture)
        print(f"Wrote {picture}")


def _check(**counts: tuple[int | None, int]) -> None:
    for name, (given, least) in counts.items():
        if given is not None and given < least:
            raise UserError(f"bench was given {name}={given}; wanted: {least} or more. Raise it.")


def _checked(
    policy: TerminationPolicy | None, heads: Path | None, exits: dict[int, Exit] | None
) -> TerminationPolicy | None:
    """The policy; where there are trained heads and none is given, that of ``generate``."""
    if heads is None:
        return policy
    if exits is not None:
        raise UserError(f"bench was given heads: {heads} and exits: {sorted(exits)}; give one of the two.")
    read_record(heads)  # before the model, which takes longer
    return policy or GateConfidence(0.8, gate="MambaGate")


def _context(longest: int, max_new_tokens: int, sizes: Outline | None) -> int:
    """Tokens of the longest prompt and its answer together."""
    context = longest + max_new_tokens
    if sizes is not None and context > sizes.context:
        raise UserError(
            f"A prompt and max_new_tokens={max_new_tokens} are {context} tokens together, and the model's context "
            f"holds {sizes.context}. Shorten the prompts, or lower max_new_tokens."
        )
    return context


def _ends(source: Source) -> tuple[int, ...]:
    """End tokens as the model's rules name them; of those rules, nothing else is followed."""
    ends = GenerationConfig(eos_token_id=source.generation_config().eos_token_id)
    return generation_options(source.tokenizer(), ends).eos_token_id


def _show(figures: Sequence[Row], found: Findings) -> None:
    floors = {floor.weights: float(np.median(floor.ms)) for floor in found.floors}
    print(f"\n{table(figures)}\n\n{notes(figures, floors, found.absent, REFERENCE)}")
