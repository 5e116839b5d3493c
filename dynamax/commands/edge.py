"""The part of ``dynamax generate`` that answers with an edge and a cloud."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dynamax.commands.colors import DepthColors, coloured, head
from dynamax.engine import Engine
from dynamax.errors import UserError
from dynamax.generation import SAMPLING
from dynamax.policies.base import TerminationPolicy
from dynamax.serving.edge import ALONE, CLOUD, EXIT
from dynamax.serving.link import Link
from dynamax.serving.opening import open_edge
from dynamax.serving.options import EdgeOptions
from dynamax.stream import Stream

ORIGINS = {EXIT: "an exit was sure", CLOUD: "the cloud said it", ALONE: "the last exit said it, unsure"}


def show_edge(
    given: EdgeOptions,
    prompts: Sequence[str],
    policy: TerminationPolicy | None,
    *,
    precision: str | None,
    chat: bool | None,
    as_json: bool,
    **options: Any,  # noqa: ANN401 - those of generation
) -> None:
    """Print an answer as it comes, each token coloured by the depth it left at; then where the tokens came from."""
    engine, factory, link = open_edge(given, precision)
    assert engine.exits is not None and engine.tokenizer is not None, "an edge's folder has both"  # noqa: PT018
    try:
        if link is not None:
            options["do_sample"] = greedy(options)
        for number, prompt in enumerate(prompts):
            said = engine.options(**options)
            decoder: Any = engine.decoder(policy, factory, sampler=said.sampler)
            stream = Stream(decoder, engine.tokenizer, engine.encode(prompt, chat=chat), said)
            if as_json:
                print(_as_json(prompt, stream, decoder, link), flush=True)
            else:
                head(prompts, number)
                _show(engine, stream, decoder, link)
    finally:
        if link is not None:
            link.close()


def _show(engine: Engine, stream: Stream, decoder: Any, link: Link | None) -> None:  # noqa: ANN401 - of an edge
    assert engine.exits is not None, "an edge's folder has exits"
    palette = DepthColors(engine.exits.depths, engine.backbone.spec.depth, on=coloured(sys.stdout))
    counts: Counter[int] = Counter()
    for token in stream:
        print(palette.paint(token.text, token.depth), end="", flush=True)
        counts[token.depth] += token.token is not None
    print("\n")
    print(palette.legend(counts))
    print(origins(decoder.origins[: counts.total()], link))


def _as_json(prompt: str, stream: Stream, decoder: Any, link: Link | None) -> str:  # noqa: ANN401 - of an edge
    answer = stream.answer()
    found = {
        "prompt": prompt,
        "text": answer.text,
        "tokens": answer.tokens,
        "depths": answer.depths,
        "origins": decoder.origins[: len(answer.tokens)],
        "seconds": round(answer.seconds, 4),
        "traffic": None if link is None else asdict(link.traffic),
    }
    return json.dumps(found, ensure_ascii=False)


def greedy(options: Mapping[str, Any]) -> bool:
    """That tokens are not drawn: the cloud says the most likely one.

    Raises:
        UserError: If they should be.
    """
    asked = [name for name in SAMPLING if options.get(name) is not None]
    asked += ["do_sample"] if options.get("do_sample") else []
    if asked:
        raise UserError(
            f"{' and '.join(asked)} was given, but a cloud says the most likely token. Leave it out, or sample on the "
            f"edge alone: --edge.mode standalone, without --edge.cloud."
        )
    return False


def origins(found: list[str], link: Link | None) -> str:
    """Two lines: where tokens came from, and what went over the wire."""
    counts = Counter(found)
    shares = [f"{what}: {counts[name] / len(found):.0%}" for name, what in ORIGINS.items() if counts[name]]
    told = f"{len(found)} tokens. {'; '.join(shares)}."
    if link is None:
        return told
    traffic = link.traffic
    return (
        f"{told}\nSent {traffic.positions} positions, {traffic.sent / 1000:,.0f} kB of hidden states; asked the cloud "
        f"{traffic.asked} times, and waited {traffic.waited:.2f} s for it."
    )
