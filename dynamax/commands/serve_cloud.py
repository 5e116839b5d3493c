"""``dynamax serve cloud``: the upper part of a model finishes tokens for edges."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynamax.commands.parsing import Parser, prepare
from dynamax.paths import InputPath
from dynamax.serving.options import check_installed, check_pair, check_replicas, host_and_port

if TYPE_CHECKING:
    from dynamax.serving.contexts import Limits
    from dynamax.serving.replicas import Replicas
    from dynamax.serving.service import Cloud


def main(arguments: Sequence[str]) -> None:
    """Parse, load, listen."""
    serve_cloud(**options(arguments))


def options(arguments: Sequence[str]) -> dict[str, Any]:
    """What the command line and its files say, built."""
    prepare()
    parser = Parser(prog="dynamax serve cloud", description="Finish tokens for edges.")
    parser.add_argument("-c", "--config", action="config", help="Options from a YAML file.")
    parser.add_function_arguments(serve_cloud, sub_configs=True)
    built = parser.instantiate(parser.read_arguments(list(arguments[2:]))).as_dict()
    built.pop("config")
    return built


def serve_cloud(
    part: InputPath = "runs/split/cloud",
    *,
    address: str = "127.0.0.1:7070",
    replicas: int = 1,
    precision: str | None = "auto",
    sessions: int = 16,
    positions: int = 0,
    idle: float = 10.0,
    expire: float = 600.0,
    rate: float = 0.0,
    token_file: InputPath | None = None,
    certificate: InputPath | None = None,
    key: InputPath | None = None,
    metrics: str | None = None,
    log: bool = True,
) -> None:
    """Listen until stopped.

    Args:
        part: The folder cloud that dynamax split wrote.
        address: Where to listen, HOST:PORT. Other hosts than this one need a certificate.
        replicas: How many processes hold the weights and share the answers; more than one run behind Ray Serve, on this
            machine or in the cluster that the environment's RAY_ADDRESS names.
        precision: How weights are held: float32, float16, bfloat16, int8 or int4; auto takes the faster of the first
            two here, null runs transformers' modules as they are.
        sessions: Most answers at a time, of each replica.
        positions: Most tokens of a prompt and its answer; 0 for the model's context, or 131,072 if that is longer.
        idle: Seconds after which an answer that nobody goes on with makes room for another.
        expire: Seconds after which it is dropped.
        rate: Calls a second that one token may make; 0 for any number.
        token_file: File with bearer tokens, one a line; left out, the environment's DYNAMAX_TOKEN. Without any,
            whoever reaches the address may ask.
        certificate: Certificate for TLS, as a PEM file.
        key: Its private key, as a PEM file.
        metrics: Where Prometheus finds figures, HOST:PORT; left out, nowhere.
        log: Write a line of JSON to stderr for each call.
    """
    check_installed()
    check_replicas(replicas)
    from dynamax.serving.cloud import Certificate, Server, log_to_stderr
    from dynamax.serving.contexts import Limits
    from dynamax.serving.opening import tokens_in

    check_pair(certificate, key)
    host, _ = host_and_port(address)
    watched = None if metrics is None else host_and_port(metrics)
    limits, tokens = Limits(sessions, positions, idle, expire), tokens_in(token_file)
    folder = Path(str(part)).expanduser()
    cloud = (_one if replicas == 1 else partial(_several, replicas))(folder, precision, limits, tokens, rate)
    pair = None if certificate is None else Certificate(Path(str(certificate)), Path(str(key)))
    try:
        server = Server(cloud, address, pair, threads=replicas * (2 * sessions + 8))
        if watched is not None:
            cloud.metrics.serve(*watched)
        if log:
            log_to_stderr()
        server.start()
        span = cloud.part.span
        print(
            f"Blocks {span.start} to {span.stop}{f' in {replicas} replicas' if replicas > 1 else ''} listen at "
            f"{host}:{server.port}, {'TLS' if pair else 'without TLS'}; "
            f"{f'bearer tokens: {len(tokens)}' if tokens else 'no token is needed'}",
            flush=True,
        )
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()
        print("dynamax serve cloud: finishing the calls under way", file=sys.stderr)
        server.stop(5.0)
    finally:
        cloud.stop()


def _one(folder: Path, precision: str | None, limits: Limits, tokens: list[str], rate: float) -> Cloud | Replicas:
    """A cloud in this process."""
    from dynamax.serving.opening import open_part
    from dynamax.serving.service import Cloud

    opened = open_part(folder, precision)
    return Cloud(opened.backbone, opened.part, limits, tokens=tokens, rate=rate)


def _several(
    count: int, folder: Path, precision: str | None, limits: Limits, tokens: list[str], rate: float
) -> Cloud | Replicas:
    """Clouds in processes of their own, behind a front."""
    from dynamax.serving.replicas import start

    return start(folder, count, precision=precision, limits=limits, tokens=tokens, rate=rate)
