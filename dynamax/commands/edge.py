"""The part of ``dynamax generate`` that answers with an edge and a cloud."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from dynamax.commands.colors import DepthColors, coloured
from dynamax.errors import UserError
from dynamax.policies.base import TerminationPolicy
from dynamax.serving.edge import ALONE, CLOUD, EXIT
from dynamax.serving.link import Link
from dynamax.serving.opening import open_edge
from dynamax.serving.options import EdgeOptions
from dynamax.stream import Stream

ORIGINS = {EXIT: "an exit was sure", CLOUD: "the cloud said it", ALONE: "the last exit said it, unsure"}


def show_edge(
    given: EdgeOptions,
    prompt: str,
    policy: TerminationPolicy | None,
    *,
    precision: str | None,
    chat: bool | None,
    **options: Any,  # noqa: ANN401 - those of generation
) -> None:
    """Print an answer as it comes, each token coloured by the depth it left at; then where the tokens came from."""
    if policy is None:
        raise UserError("An edge needs a policy: when to trust an exit. Give one, such as --policy MaxProb.")
    engine, factory, link = open_edge(given, precision)
    assert engine.exits is not None and engine.tokenizer is not None, "an edge's folder has both"  # noqa: PT018
    try:
        if link is not None and options.get("do_sample") is None:
            options["do_sample"] = False  # the cloud says the most likely token
        said = engine.options(**options)
        decoder: Any = engine.decoder(policy, factory, sampler=said.sampler)
        palette = DepthColors(engine.exits.depths, engine.backbone.spec.depth, on=coloured(sys.stdout))
        counts: Counter[int] = Counter()
        for token in Stream(decoder, engine.tokenizer, engine.encode(prompt, chat=chat), said):
            print(palette.paint(token.text, token.depth), end="", flush=True)
            counts[token.depth] += token.token is not None
        print("\n")
        print(palette.legend(counts))
        print(origins(decoder.origins[: counts.total()], link))
    finally:
        if link is not None:
            link.close()


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
