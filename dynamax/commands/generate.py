"""``dynamax generate "..."``: one answer, each token coloured by the depth it left at."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from dynamax.backbones.skipped_state import SkippedState
from dynamax.backbones.sources import Source
from dynamax.commands.colors import DepthColors, coloured
from dynamax.commands.parsing import Parser, prepare
from dynamax.decoding.sampling import Greedy, Sampled, Sampler
from dynamax.device import chosen
from dynamax.errors import UserError
from dynamax.heads.bank import Exit
from dynamax.heads.saved import RECORD
from dynamax.metrics.cost import CostModel
from dynamax.modules.answers import encode
from dynamax.modules.decoding import DecodingModule, Sweep
from dynamax.paths import InputPath
from dynamax.policies.base import TerminationPolicy
from dynamax.types import Step

DEMO = "runs/demo/heads"
WITHOUT_HEADS = "--exits '{2: {}, 4: {}}' --policy MaxProb --policy.threshold 0.5"
SHORT = {"--threshold": "--policy.threshold"}
DEFAULTS = {
    "backbone": {"class_path": "SmolLM2"},
    "policy": {"class_path": "GateConfidence", "init_args": {"threshold": 0.8, "gate": "MambaGate"}},
}


def main(arguments: Sequence[str]) -> None:
    """Parse, load, answer."""
    prepare()
    parser = Parser(prog="dynamax generate", description="Answer a prompt and show the depth each token left at.")
    parser.add_argument("-c", "--config", action="config", help="Options from a YAML file.")
    parser.add_argument("prompt", type=str, help="What to answer.")
    parser.add_function_arguments(generate, skip={"prompt"}, sub_configs=True)
    parser.set_defaults(DEFAULTS)
    options = list(arguments[1:])
    for place in range(options.index("--") if "--" in options else len(options)):
        name, equals, value = options[place].partition("=")
        options[place] = SHORT.get(name, name) + equals + value
    given = parser.read_arguments(options)
    if not given.prompt:
        raise UserError('The prompt is empty. Write what to answer: dynamax generate "What is the capital of France?"')
    try:
        given.prompt.encode()
    except UnicodeEncodeError as error:  # bytes of another encoding than the terminal's
        raise UserError("The prompt holds bytes that are not UTF-8. Write it in UTF-8.") from error
    built = parser.instantiate(given).as_dict()
    built.pop("config")
    generate(**built)


def generate(
    prompt: str,
    backbone: Source,
    policy: TerminationPolicy,
    *,
    heads: InputPath | None = None,
    exits: dict[int, Exit] | None = None,
    rule: SkippedState | None = None,
    mode: Literal["early-exit", "lossless"] = "early-exit",
    draft_limit: int = 4,
    limit: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    chat: bool = True,
    dtype: str = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Print the answer, a legend, and what was saved.

    Args:
        prompt: What to answer.
        backbone: Where the model comes from.
        policy: When to leave; --threshold is short for --policy.threshold.
        heads: Folder of trained heads, as fit leaves it; where neither these nor exits are given, runs/demo/heads.
        exits: Untrained exits in place of heads, such as '{20: {lens: LogitLens}}'.
        rule: What becomes of the state of skipped blocks; Exact by default.
        mode: early-exit says what exits say; lossless verifies every draft at the top.
        draft_limit: Lossless only: most drafted tokens before a verification.
        limit: Most tokens to generate.
        temperature: Sample at this temperature; left out, the most likely token is taken.
        top_k: Sampling: keep only the k most likely tokens.
        top_p: Sampling: keep the fewest most likely tokens whose mass reaches this.
        seed: Sampling: of the generator; 0 if left out.
        chat: Wrap the prompt as a user's turn in the chat template.
        dtype: Of the backbone, such as float32 or bfloat16.
        device: Where to run; auto takes a GPU where there is one.
    """
    module = DecodingModule(
        backbone,
        [Sweep(policy)],
        heads=_folder(heads) if exits is None else heads,
        exits=exits,
        rule=rule,
        sampler=_sampler(temperature, top_k, top_p, seed),
        mode=mode,
        draft_limit=draft_limit,
        chat=chat,
        dtype=dtype,
    )
    module.configure_model()
    module.to(torch.device(chosen(device)))
    speak(module, prompt, limit=limit)


def _folder(heads: InputPath | None) -> str:
    folder = DEMO if heads is None else str(heads)
    if not (Path(folder) / RECORD).is_file():
        raise UserError(
            f"There are no saved heads in {folder}. Wanted: a folder that fit wrote, --heads FOLDER. A model that was "
            f"trained with exits needs no heads: {WITHOUT_HEADS}"
        )
    return folder


def _sampler(temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None) -> Sampler:
    if temperature is not None:
        return Sampled(temperature, top_k=top_k, top_p=1.0 if top_p is None else top_p, seed=seed or 0)
    given = {"top_k": top_k, "top_p": top_p, "seed": seed}
    idle = [name for name, value in given.items() if value is not None]
    if idle:
        raise UserError(
            f"{' and '.join(idle)} without a temperature would change nothing: the most likely token is taken. "
            f"Add --temperature 1.0 to sample, or leave them out."
        )
    return Greedy()


def speak(module: DecodingModule, prompt: str, *, limit: int) -> None:
    """Decode with the module's first policy, printing as it goes; then the legend and the balance."""
    bench = module.bench
    palette = DepthColors(bench.bank.depths, bench.backbone.spec.depth, on=coloured(sys.stdout))
    prompt_1T = encode(bench.tokenizer, prompt, chat=module.chat, device=bench.device)
    end = bench.tokenizer.eos_token_id
    stop = [end] if isinstance(end, int) else []
    steps: list[Step] = []
    began = time.perf_counter()
    decoded = bench.points[0].decoder.decode(prompt_1T, limit=limit, stop=stop)
    for piece, depth in pieces(_kept(decoded, steps), bench.tokenizer, stop):
        print(palette.paint(piece, depth), end="", flush=True)
    seconds = time.perf_counter() - began
    print("\n")
    if depths := Counter(step.depth for step in steps if not step.prefill):
        print(palette.legend(depths))
    print(balance(bench.points[0].costs, steps, prompt_1T.shape[1], seconds))


def _kept(steps: Iterator[Step], kept: list[Step]) -> Iterator[Step]:
    for step in steps:
        kept.append(step)
        yield step


def pieces(steps: Iterator[Step], tokenizer: PreTrainedTokenizerBase, stop: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Printable text as it becomes whole, with the depth of the token that completed it."""
    tokens: list[int] = []
    shown = text = ""
    depth = 0
    for step in steps:
        token = int(step.token_B[0])
        if token in stop:
            continue  # the end; the decoder stops by itself
        tokens.append(token)
        depth = step.depth
        text = str(tokenizer.decode(tokens))
        if not text.endswith("\ufffd"):  # half a character; the next token completes it
            yield text[len(commonprefix([shown, text])) :], depth
            shown = text
    if text != shown:  # it ended within a character
        yield text[len(commonprefix([shown, text])) :], depth


def balance(costs: CostModel, steps: Sequence[Step], prompt: int, seconds: float) -> str:
    """One line: what was saved beside full decoding of the same tokens, the prompt's own pass left out."""
    decoded = [step for step in steps if not step.prefill]
    first = len(steps) - len(decoded)
    if not decoded:
        return "The first token comes from the prompt's own pass, and there was no other: nothing could be saved."
    flops = sum(costs.step(step, prompt + index).flops for index, step in enumerate(decoded))
    whole = sum(costs.full(prompt + index).flops for index in range(len(decoded)))
    blocks, total = sum(sum(step.work.calls) for step in decoded) / len(decoded), costs.spec.depth
    return (
        f"{len(steps)} tokens in {seconds:.1f} s: {first} from the prompt's own pass, at full depth, and "
        f"{len(decoded)} as shared out above. Of these, blocks a token: {blocks:.1f} of {total}, "
        f"{_saved(blocks / total)}; FLOPs: {_saved(flops / whole)}."
    )


def _saved(share: float) -> str:
    return f"{1 - share:.0%} saved" if share <= 1 else f"{share - 1:.0%} more"
