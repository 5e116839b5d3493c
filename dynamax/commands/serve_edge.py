"""``dynamax serve edge``: an endpoint for OpenAI's clients, and a page to chat on, over an edge or a whole model."""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dynamax.commands.parsing import Parser, prepare
from dynamax.decoding.base import DecoderFactory
from dynamax.engine import load
from dynamax.errors import UserError
from dynamax.heads.bank import Exit
from dynamax.paths import InputPath
from dynamax.policies.base import TerminationPolicy
from dynamax.serving.options import EdgeOptions, check_edge, check_installed, check_pair, host_and_port


def main(arguments: Sequence[str]) -> None:
    """Parse, load, listen."""
    serve_edge(**options(arguments))


def options(arguments: Sequence[str]) -> dict[str, Any]:
    """What the command line and its files say, built."""
    prepare()
    parser = Parser(prog="dynamax serve edge", description="Answer OpenAI's clients with an edge or a whole model.")
    parser.add_argument("-c", "--config", action="config", help="Options from a YAML file.")
    parser.add_function_arguments(serve_edge, sub_configs=True)
    built = parser.instantiate(parser.read_arguments(list(arguments[2:]))).as_dict()
    built.pop("config")
    return built


def serve_edge(
    *,
    edge: EdgeOptions | None = None,
    backbone: str | None = None,
    heads: InputPath | None = None,
    exits: dict[int, Exit] | None = None,
    policy: TerminationPolicy | None = None,
    decoder: DecoderFactory | None = None,
    precision: str | None = "auto",
    compile: bool = False,
    address: str = "127.0.0.1:8000",
    name: str | None = None,
    waiting: int = 8,
    token_file: InputPath | None = None,
    certificate: InputPath | None = None,
    key: InputPath | None = None,
) -> None:
    """Listen until stopped.

    Args:
        edge: An edge's folder and its cloud: --edge.folder runs/split/edge --edge.cloud HOST:PORT.
        backbone: In place of an edge, a whole model as dynamax.load takes it; then no cloud is needed.
        heads: Folder of heads for the whole model.
        exits: Untrained exits of the whole model in place of heads.
        policy: When to leave. An edge needs one; a whole model without decodes at full depth.
        decoder: How the whole model decodes; left out, EarlyExit where there is a policy.
        precision: How weights are held: float32, float16, bfloat16, int8 or int4; auto takes the faster of the first
            two here, null runs transformers' modules as they are.
        compile: Make the steps of a whole model faster, for some seconds at first.
        address: Where to listen, HOST:PORT. Other hosts than this one need bearer tokens.
        name: What callers know the model as; left out, the name of its folder.
        waiting: Most answers that wait for their turn, up to 30.
        token_file: File with the bearer tokens that callers may show, one a line. The edge's own token, for the cloud,
            is edge.token_file.
        certificate: Certificate for TLS, as a PEM file.
        key: Its private key, as a PEM file.
    """
    check_installed("fastapi", "uvicorn")
    import uvicorn

    from dynamax.serving.answers import Answerer
    from dynamax.serving.endpoint import endpoint
    from dynamax.serving.opening import open_edge, tokens_in

    if (edge is None) == (backbone is None):
        raise UserError("Give an edge (--edge.folder) or a whole model (--backbone): one of the two.")
    if edge is not None:
        check_edge(policy, heads=heads, exits=exits, decoder=decoder, compile=compile or None)
    check_pair(certificate, key)
    host, port = host_and_port(address)
    known = [] if token_file is None else tokens_in(token_file)
    if not known and host not in ("127.0.0.1", "localhost", "::1"):
        raise UserError(
            f"The endpoint was to listen at {address}, where others can reach it, and wants no token. Give a "
            f"token_file, or listen at 127.0.0.1."
        )
    with listener(host, port) as listening:
        if edge is not None:
            engine, factory, link = open_edge(edge, precision)
            called = name or Path(str(edge.folder)).resolve().parent.name
        else:
            assert backbone is not None
            trained = None if heads is None else str(heads)
            engine = load(backbone, heads=trained, exits=exits, precision=precision, compile=compile)
            factory, link = decoder, None
            called = name or Path(backbone).name
        answerer = Answerer(engine, called, policy, factory, waiting=waiting, greedy=link is not None)
        app = endpoint(answerer, known, link)
        if link is not None and (fault := link.fault()):
            print(f"dynamax: {fault}", file=sys.stderr)
        scheme = "http" if certificate is None else "https"
        print(f"{called} answers at {scheme}://{address}/v1, a page to chat on is at /", flush=True)
        tls: dict[str, Any] = {} if certificate is None else {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
        with suppress(KeyboardInterrupt):  # the way to end it
            uvicorn.Server(uvicorn.Config(app, log_level="warning", **tls)).run([listening])


def listener(host: str, port: int) -> socket.socket:
    """A socket at an address, taken before any work.

    Raises:
        UserError: If the address is taken, or none of this machine's.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise UserError(
            f"The endpoint cannot listen at {host}:{port}: {error.strerror or error}. Choose another --address, or "
            f"free this one."
        ) from error
    return found
