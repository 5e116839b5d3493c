"""The way of one token through the package: few stops, none of them twice; and what is written once is written once."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import dynamax
from dynamax import AtDepth, Engine

PACKAGE = Path(dynamax.__file__).parent


def stop_of(frame: FrameType) -> str | None:
    """``module.Class.function`` of a public function of the package; None for all others."""
    module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_qualname.replace(".__call__", "")
    if not module.startswith("dynamax.") or "<" in name or any(part.startswith("_") for part in name.split(".")):
        return None
    return f"{module.removeprefix('dynamax.')}.{name}"


def walk_of_a_token(engine: Engine) -> tuple[list[str], list[str]]:
    """Stops on the way down to the first block of the second token, and those on the way back from its last block.

    The way down is the stack at the block: what has been entered and not left. The way back is what these functions
    call afterwards, up to the text of the token.
    """
    down: list[FrameType] = []
    back: list[str] = []
    embedded, done = 0, False

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal embedded, done
        stop = stop_of(frame)
        if event != "call" or stop is None or done:
            return
        embedded += stop.endswith("Session.embed")
        if embedded == 1 and stop.endswith("HFBackbone.block"):
            below, stack = frame.f_back, []
            while below is not None:
                stack.append(below)
                below = below.f_back
            down[:] = stack[::-1]
            back.clear()
        elif down and frame.f_back in down and frame not in down:  # else it goes on, or was called by one of these
            if back[-1:] != [stop]:  # `commit` is called for each block
                back.append(stop)
            done = stop.endswith("TextStream.add")

    sys.setprofile(watch)
    try:
        engine.generate("Hi", AtDepth(3), max_new_tokens=2, eos_token_id=[])
    finally:
        sys.setprofile(None)
    return [stop for frame in down if (stop := stop_of(frame))], back


DOWN = [
    "engine.Engine.generate",
    "stream.Stream.answer",
    "decoding.base.Decoder.decode",
    "decoding.early_exit.EarlyExit.steps",
    "decoding.session.Session.run_to_exit",
    "backbones.base.Backbone.walk",
    "backbones.base.Backbone.run",
    "backbones.base.Backbone.run_blocks",
]
BACK = [
    "backbones.state.CacheView.commit",
    "heads.bank.ExitBank.catch_up",
    "heads.bank.ExitBank.evidence",
    "policies.schedule.AtDepth",
    "decoding.probe.Probe.mark",
    "decoding.session.Session.leave",
    "decoding.sampling.Greedy",
    "decoding.session.Session.step",
    "decoding.session.Session.told",
    "stream.Transcript.add",
]


def test_the_walk_of_one_token_has_eight_stops_and_none_twice(tiny_folder: Path) -> None:
    down, back = walk_of_a_token(dynamax.load(tiny_folder, exits=[3], device="cpu"))
    print("\n".join(["down", *down, "a block", "and back", *back]))
    assert down[0] == "engine.Engine.generate"
    assert len(down) <= 8
    assert len({*down, *back}) == len(down) + len(back)
    assert down == DOWN
    assert [stop for stop in back if stop in BACK] == BACK


# -- what is written once -------------------------------------------------------------------------------


def functions() -> dict[str, ast.AST]:
    """All functions of the package, by ``module.Class.function``."""
    found: dict[str, ast.AST] = {}

    def collect(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                collect(child, f"{name}.{child.name}")
            elif isinstance(child, ast.FunctionDef):
                found[f"{name}.{child.name}"] = child
            else:
                collect(child, name)

    for file in PACKAGE.rglob("*.py"):
        if file.stem in ("check", "testing"):
            continue  # contracts, which call things in every way there is
        module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        collect(ast.parse(file.read_text("utf-8")), module)
    return found


FUNCTIONS = functions()


def calls(node: ast.AST, name: str) -> list[ast.Call]:
    """Calls of a function or a method of this name."""
    found = [each for each in ast.walk(node) if isinstance(each, ast.Call)]
    return [each for each in found if getattr(each.func, "attr", getattr(each.func, "id", None)) == name]


def where(matches: Callable[[ast.AST], bool]) -> set[str]:
    return {name for name, node in FUNCTIONS.items() if matches(node)}


def test_prompts_of_decoders_are_checked_in_one_place() -> None:
    assert where(lambda node: bool(calls(node, "check_prompt"))) == {"decoding.base.Decoder.begin"}
    assert where(lambda node: bool(calls(node, "Session"))) == {"decoding.base.Decoder.begin"}


def loops_over_depths(function: ast.AST) -> bool:
    """Whether a loop runs one span of blocks after another."""
    loops = [each for each in ast.walk(function) if isinstance(each, ast.For | ast.While | ast.comprehension)]
    runs = [call for loop in loops for call in calls(loop, "run")]
    return any(calls(argument, "Span") for call in runs for argument in call.args)


def test_there_is_one_loop_over_depths() -> None:
    checks = {"backbones.check_state.entering"}  # what enters each block, when a model is loaded
    assert where(loops_over_depths) - checks == {"backbones.base.Backbone.walk"}
    stretches = {"backbones.base.Backbone.run"}  # between the depths at which debts join
    assert where(lambda node: bool(calls(node, "pairwise"))) == stretches


def test_evidence_is_made_in_one_place() -> None:
    assert {name.rpartition(".")[0] for name in where(lambda node: bool(calls(node, "Evidence")))} == {
        "heads.bank.ExitBank",
        "types.Evidence",  # some rows of another
    }


def reads_end_token(function: ast.AST) -> bool:
    """Whether it reads ``eos_token_id`` of a tokenizer."""
    found = [each for each in ast.walk(function) if isinstance(each, ast.Attribute) and each.attr == "eos_token_id"]
    return any(ast.unparse(each.value).endswith("tokenizer") for each in found)


def test_what_ends_a_text_is_known_in_one_place() -> None:
    assert where(reads_end_token) == {
        "generation.generation_options",
        "engine.Engine.with_start_token",  # as what a text begins behind, where there is no BOS
        "data.streams.encode",  # between the documents that a language model is trained on
        "modules.pretraining.PretrainingModule.build",  # of a model that is made here
    }
    assert len(where(lambda node: bool(calls(node, "apply_chat_template")))) == 1
