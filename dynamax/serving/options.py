"""What can be chosen of an edge. Knows nothing that must be installed for serving."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from dynamax.errors import UserError
from dynamax.paths import InputPath


def check_installed(*packages: str) -> None:
    """Refuse (UserError) to serve without the packages for it; their names are those that are imported."""
    if missing := [name for name in ("grpc", "prometheus_client", *packages) if find_spec(name) is None]:
        raise UserError(
            f"An edge and a cloud need {' and '.join(missing)}, which is not installed. Install the extra: pip install "
            f"'dynamax-exits[serve]'."
        )


def check_replicas(count: int) -> None:
    """Refuse (UserError) fewer clouds than one, and several without the package that runs them."""
    if count < 1:
        raise UserError(f"replicas is {count}; it must be at least 1.")
    if count > 1 and find_spec("ray") is None:
        raise UserError(
            f"{count} replicas need ray, which is not installed. Install the extra: pip install 'dynamax-exits[ray]'; "
            f"or leave replicas out."
        )


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of ``HOST:PORT``; brackets around a host are taken off.

    Raises:
        UserError: If it is not of this form.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UserError(
            f"The address {address!r} was given; HOST:PORT is wanted, without http://, such as 127.0.0.1:7070."
        )
    return host.strip("[]"), int(port)


def check_pair(certificate: InputPath | None, key: InputPath | None) -> None:
    """Refuse (UserError) a certificate without its key, or the other way round, and files that are not there."""
    if (certificate is None) != (key is None):
        raise UserError("A certificate and its key belong together, and one of them was given. Give both, or neither.")
    for file in (certificate, key):
        try:
            if file is not None and b"-----BEGIN" not in Path(str(file)).read_bytes():
                raise UserError(f"{file} is no PEM file. Give a certificate and its key, as PEM.")
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error}. Give a certificate and its key, as PEM.") from error


def check_edge(policy: object, **beside: object) -> None:
    """Refuse (UserError) an edge without a policy, and what stood beside it and is said by its folder and mode.

    Args:
        policy: When to trust an exit; None for none.
        **beside: Options by name; None for one that was not given.
    """
    if policy is None:
        raise UserError("An edge needs a policy: when to trust an exit. Give one, such as --policy MaxProb.")
    if given := [name for name, value in beside.items() if value is not None]:
        raise UserError(f"{' and '.join(given)} stood beside edge, whose folder and mode say it. Leave it out.")


@dataclass(frozen=True)
class EdgeOptions:
    """An edge, and the cloud that it asks.

    Attributes:
        folder: The folder edge that dynamax split wrote.
        cloud: Address of the cloud, HOST:PORT; left out, the edge is alone.
        mode: collaborative: the cloud says what no exit is sure of. drafting: the edge drafts, the cloud verifies, and
            the tokens are the whole model's. standalone: the last exit says what no other does; nothing is sent.
        deadline: Seconds that a token of the cloud may take, in the mode collaborative; if it would take longer, the
            last exit says it. Left out, the cloud is waited for.
        timeout: Seconds after which a cloud that does not answer is an error.
        wire: How hidden states travel: float32, float16, bfloat16, int8 or int4.
        draft_limit: Most drafts of a round, in the mode drafting; 8 if left out.
        token_file: File with the bearer token; left out, the environment's DYNAMAX_TOKEN.
        root: Certificate that vouches for the cloud's, as a PEM file. Without one nothing is encrypted.
    """

    folder: InputPath
    cloud: str | None = None
    mode: Literal["collaborative", "drafting", "standalone"] = "collaborative"
    deadline: float | None = None
    timeout: float = 10.0
    wire: str = "float32"
    draft_limit: int | None = None
    token_file: InputPath | None = None
    root: InputPath | None = None
