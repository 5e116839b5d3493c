"""``dynamax generate "..."``: one answer, each token coloured by the depth it left at."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any, Literal

from dynamax.backbones.sources import SmolLM2, Source
from dynamax.calibration.promise import Promise
from dynamax.commands.colors import DepthColors, coloured, head
from dynamax.commands.parsing import Parser, prepare
from dynamax.decoding.base import DecoderFactory
from dynamax.engine import Engine, load
from dynamax.errors import UserError
from dynamax.heads.bank import Exit
from dynamax.heads.saved import RECORD
from dynamax.paths import InputPath
from dynamax.policies.base import TerminationPolicy
from dynamax.serving.options import EdgeOptions, check_edge, check_installed
from dynamax.stream import Answer, Stream

DEMO = "runs/demo/heads"
STDIN = "-"
"""The prompt that stands for standard input."""
WITHOUT_HEADS = "--exits '{2: {}, 4: {}}' --policy MaxProb --policy.threshold 0.5"
SHORT = {"--threshold": "--policy.threshold"}
TRUTHS = ("true", "false")
DEFAULTS = {"policy": {"class_path": "GateConfidence", "init_args": {"threshold": 0.8, "gate": "MambaGate"}}}


def main(arguments: Sequence[str]) -> None:
    """Parse, load, answer."""
    prepare()
    parser = Parser(prog="dynamax generate", description="Answer a prompt and show the depth each token left at.")
    parser.add_argument("-c", "--config", action="config", help="Options from a YAML file.")
    parser.add_argument("prompts", type=str, nargs="+", help="What to answer.")
    parser.add_function_arguments(generate, skip={"prompts"}, sub_configs=True)
    parser.set_defaults(DEFAULTS)
    options = list(arguments[1:])
    for place in range(options.index("--") if "--" in options else len(options)):
        name, equals, value = options[place].partition("=")
        options[place] = SHORT.get(name, name) + equals + value
        if options[place] == "--json" and options[place + 1 : place + 2] not in ([truth] for truth in TRUTHS):
            options[place] = "--json=true"
    given = parser.read_arguments(options)
    given.prompts = prompts_in(given.prompts)
    built = parser.instantiate(given).as_dict()
    built.pop("config")
    generate(**built)


def prompts_in(given: Sequence[str]) -> list[str]:
    """The prompts: those that were written, and for ``-`` all that standard input holds.

    Raises:
        UserError: If one is empty, or not UTF-8; if standard input was asked for twice.
    """
    if list(given).count(STDIN) > 1:
        raise UserError(f"{STDIN} stands for standard input, which can be read once. Leave out one of them.")
    found = []
    for prompt in given:
        text = _standard_input() if prompt == STDIN else prompt
        if not text:
            where = "Standard input" if prompt == STDIN else "The prompt"
            raise UserError(
                f'{where} is empty. Write what to answer: dynamax generate "What is the capital of France?"'
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of another encoding than the terminal's
            raise UserError("The prompt holds bytes that are not UTF-8. Write it in UTF-8.") from error
        found.append(text)
    return found


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    except ValueError as error:  # other bytes, or it is closed
        raise UserError("Standard input is closed, or not UTF-8. Give the prompt in UTF-8.") from error


def generate(
    prompts: Sequence[str],
    policy: TerminationPolicy | None,
    *,
    backbone: Source | None = None,
    heads: InputPath | None = None,
    exits: dict[int, Exit] | None = None,
    decoder: DecoderFactory | None = None,
    max_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_strings: list[str] | None = None,
    chat: bool | None = None,
    dtype: str = "float32",
    precision: str | None = "auto",
    compile: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    promise: Promise | None = None,
    edge: EdgeOptions | None = None,
    json: bool = False,
) -> None:
    """Print each answer, a legend, and what was saved.

    Args:
        prompts: What to answer, one after the other.
        policy: When to leave; --threshold is short for --policy.threshold. Full decodes without: null.
        backbone: Where the model comes from; left out, the model that the heads were trained for.
        heads: Folder of trained heads, as fit leaves it; where neither these nor exits are given, runs/demo/heads.
        exits: Untrained exits in place of heads, such as '{20: {lens: LogitLens}}'; of SmolLM2 where no backbone is
            named.
        decoder: EarlyExit, by default, says what exits say; SelfSpeculative verifies every draft at the top.
        max_new_tokens: Most tokens to generate; left out, as the model's generation_config says, else 64.
        do_sample: Draw tokens by chance; left out, as the model's generation_config says.
        temperature: Sampling: divides the logits. Giving it, top_k or top_p means sampling.
        top_k: Sampling: keep only the k most likely tokens.
        top_p: Sampling: keep the fewest most likely tokens whose mass reaches this.
        seed: Sampling: of the generator; 0 if left out.
        stop_strings: Strings that end the answer.
        chat: Wrap the prompt as a user's turn in the chat template; left out, where the model has one.
        dtype: Of the backbone, such as float32 or bfloat16.
        precision: How its weights are held: float32, float16, bfloat16, int8 or int4; auto takes the faster of the
            first two here, null runs transformers' modules as they are, and so does a dtype other than float32.
        compile: Make the steps faster, for some seconds at first: on a CPU inductor compiles them, which needs a C++
            compiler; on a GPU they are captured in CUDA graphs.
        device: Where to run; auto takes a GPU where there is one.
        promise: What dynamax calibrate promised of the policy; its file has both, and the promise is shown.
        edge: Answer with the blocks of an edge, and ask a cloud: --edge.folder runs/split/edge --edge.cloud HOST:PORT.
            Its folder has model and heads.
        json: Print a line of JSON for each prompt: text, tokens, the depth each token left at, costs.
    """
    print("dynamax generate: loading the model", file=sys.stderr, flush=True)
    numbers: dict[str, Any] = {"dtype": dtype, "precision": precision, "compile": compile, "device": device}
    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop_strings": stop_strings,
    }
    if edge is not None:
        check_edge(
            policy,
            backbone=backbone,
            heads=heads,
            exits=exits,
            decoder=decoder,
            promise=promise,
            compile=compile or None,
            dtype=None if dtype == "float32" else dtype,
            device=None if device in ("auto", "cpu") else device,
        )
        check_installed()
        from dynamax.commands.edge import show_edge  # gRPC is wanted here alone

        show_edge(edge, prompts, policy, precision=precision, chat=chat, as_json=json, **options)
        return
    engine = load_asked(backbone, None if heads is None else str(heads), exits, policy, **numbers)
    if promise is not None:
        promise.check_model(engine.backbone.spec.fingerprint)
    for number, prompt in enumerate(prompts):
        stream = engine.stream(prompt, policy, decoder=decoder, chat=chat, **options)
        if json:
            print(as_json(prompt, stream.answer()), flush=True)
        else:
            head(prompts, number)
            show(engine, stream)
    if promise is not None and not json:
        print(f"Promised: {promise.text}.")


def load_asked(
    backbone: Source | None,
    heads: str | None,
    exits: dict[int, Exit] | None,
    policy: TerminationPolicy | None,
    **numbers: Any,  # noqa: ANN401 - of load
) -> Engine:
    """The model with its exits; without, if no policy asks for them.

    Raises:
        UserError: If there are neither heads nor exits, and a policy.
    """
    if exits is not None:
        return load(backbone or SmolLM2(), heads=heads, exits=exits, **numbers)
    folder = heads or DEMO
    found = (Path(folder) / RECORD).is_file()
    if policy is None and heads is None and not (found and backbone is None):
        return load(backbone or SmolLM2(), **numbers)
    if not found or (backbone is not None and heads is None):
        lacks = "The backbone has no heads here" if backbone and not heads else f"There are no saved heads in {folder}"
        raise UserError(
            f"{lacks}. Wanted: a folder that fit wrote, --heads FOLDER. A model that was trained with exits needs no "
            f"heads: {WITHOUT_HEADS}. To run all blocks for each token: --policy null"
        )
    return load(backbone or folder, heads=folder, **numbers)


def as_json(prompt: str, answer: Answer) -> str:
    """An answer as one line of JSON; costs are those behind the prompt's own pass, and null if there are none."""
    cost = answer.cost
    found = {
        "prompt": prompt,
        "text": answer.text,
        "tokens": answer.tokens,
        "depths": answer.depths,
        "seconds": round(answer.seconds, 4),
        "blocks": cost.total,
        "blocks_per_token": cost.blocks_per_token if cost.tokens else None,
        "flops_share": cost.cost.flops / cost.full.flops if cost.tokens else None,
    }
    return dumps(found, ensure_ascii=False)


def show(engine: Engine, stream: Stream) -> None:
    """Print an answer as it comes; then what each colour means, and what was saved."""
    exits = () if engine.exits is None else engine.exits.depths
    palette = DepthColors(exits, engine.backbone.spec.depth, on=coloured(sys.stdout))
    for token in stream:
        print(palette.paint(token.text, token.depth), end="", flush=True)
    answer = stream.answer()
    print("\n")
    if depths := Counter(answer.depths[1:]):
        print(palette.legend(depths))
    print(balance(answer))


def balance(answer: Answer) -> str:
    """One line: what was saved beside full decoding of the same tokens, the prompt's own pass left out."""
    cost = answer.cost
    if not cost.tokens:
        return "The first token comes from the prompt's own pass, and there was no other: nothing could be saved."
    return (
        f"{len(answer.tokens)} tokens in {answer.seconds:.1f} s: {len(answer.tokens) - cost.tokens} from the prompt's "
        f"own pass, at full depth, and {cost.tokens} as shared out above. Of these, blocks a token: "
        f"{cost.blocks_per_token:.1f} of {cost.total}, {_saved(cost.blocks_per_token / cost.total)}; FLOPs: "
        f"{_saved(cost.cost.flops / cost.full.flops)}."
    )


def _saved(share: float) -> str:
    return f"{1 - share:.0%} saved" if share <= 1 else f"{share - 1:.0%} more"
