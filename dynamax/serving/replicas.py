"""Several clouds behind one address: replicas of a Ray Serve deployment, and a front that looks like one ``Cloud``.

A session lives in the memory of the replica that opened it, so every call of it must go there. Its name begins with
that replica's, the front hands it to Ray Serve as the call's ``session_id``, and a request router of our own sends the
call there or, if that replica is gone, to any other, which knows no such session and says so. Ray Serve's own means
are not strict: its consistent hashing moves sessions of living replicas when another one joins, multiplexed models
move to other replicas when theirs is slow, and neither opens a session where the fewest are.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

from dynamax.serving.alone import ADDRESS, TOLD  # before Ray is imported

# isort: split

import ray
import torch
from ray import serve
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from ray.serve.schema import LoggingConfig

from dynamax.backbones.parts import Part
from dynamax.backbones.precision import AUTO, check_precision
from dynamax.errors import UserError
from dynamax.serving.cloud import CODES
from dynamax.serving.contexts import FullError, GoneError, Limits
from dynamax.serving.metrics import Metrics
from dynamax.serving.opening import open_part
from dynamax.serving.options import host_and_port
from dynamax.serving.service import BusyError, Cloud, Owners, check_cloud
from dynamax.serving.split import read_part
from dynamax.serving.wire import VERSION, Message, value

LATE = 3.0
"""Seconds after which a call that has not ended asks whether its replica lives; if not, its session is gone."""

ALIVE = 2.0
"""Seconds in which a replica must say that it lives."""

FAULTS = {kind.__name__: kind for kind in CODES}
"""What a replica may say of a call, by name: an error would come back wrapped in one of Ray's."""

KNOCK = 5.0
"""Seconds in which a cluster that is to be joined must answer."""

STORE = 512 << 20
"""Bytes that states on their way to a replica may take, on a machine where Ray is started here."""


class SessionRouter(RequestRouter):
    """Sends a call to the replica that it names; if that is gone, or none is named, to any."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The only one that may have the session; Ray Serve asks again while its queue is full."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        wanted = pending_request.metadata.session_id
        return [[each for each in candidate_replicas if each.replica_id.unique_id == wanted] or candidate_replicas]

    @property
    def max_num_routing_tasks(self) -> int:
        """Calls that are routed at a time: those that wait for one replica must not hold up those for another."""
        return self.max_num_routing_tasks_cap


class Replica:
    """One cloud, in a process of its own and with weights of its own.

    Args:
        folder: The folder cloud that ``dynamax split`` wrote.
        precision: How weights are held.
        limits: What it takes.
        threads: Threads that compute.
        calls: Calls at a time.
    """

    def __init__(self, folder: str, precision: str | None, limits: Limits, threads: int, calls: int) -> None:
        torch.set_num_threads(threads)
        opened = open_part(Path(folder), precision)
        self._cloud = Cloud(opened.backbone, opened.part, limits)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._calls = ThreadPoolExecutor(calls)

    async def call(self, method: str, header: dict[str, Any], body: bytes, owner: str) -> dict[str, Any]:
        """A call of the wire, in a thread; its reply, or what was wrong with it."""
        work = partial(self._answer, method, Message(header, memoryview(body)), owner)
        return await asyncio.get_running_loop().run_in_executor(self._calls, work)

    async def health(self) -> dict[str, Any]:
        """Who it is and whether it works; never behind calls that wait for a thread."""
        found = self._cloud.health(Message({}), "")
        return found | {"replica": self._name, "process": os.getpid()}

    def _answer(self, method: str, message: Message, owner: str) -> dict[str, Any]:
        try:
            if method == "open":
                reply = self._cloud.open(message, owner)
                return reply | {"session": f"{self._name}.{reply['session']}"}
            return getattr(self._cloud, method)(self._named_here(message), owner)
        except tuple(CODES) as error:
            return {"fault": type(error).__name__, "told": str(error)}

    def _named_here(self, message: Message) -> Message:
        """The message with the session's name in this cloud."""
        name, _, key = value(message.header, "session", str).partition(".")
        if name != self._name:
            raise GoneError
        return Message(message.header | {"session": key}, message.body)


class Replicas:
    """The front: does what a ``Cloud`` does by asking the replica that has the session.

    Args:
        handle: Of the replicas.
        part: Which part of a model they have.
        owners: Who may use them.
        end: Ends the replicas.

    Attributes:
        part: Which part of a model the replicas have.
        owners: Who may use them.
        metrics: Counts what passes here. Passes over the blocks are not seen here.
    """

    def __init__(
        self, handle: DeploymentHandle, part: Part, owners: Owners, end: Callable[[], None] = lambda: None
    ) -> None:
        self.metrics = Metrics()
        self.metrics.sessions.set_function(lambda: _total(self.living(), "sessions"))
        self._handle, self.part, self.owners, self._end = handle, part, owners, end
        self._opening: Counter[str] = Counter()
        self._lock = threading.Lock()

    def living(self) -> list[dict[str, Any]]:
        """What each replica says that answers now: its health, its name and its process."""
        try:
            asked = self._handle.options(method_name="health").broadcast("health")
            said = asked.results(timeout_s=ALIVE, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):
            return []
        return [each for each in said if isinstance(each, dict)]

    # -- calls ------------------------------------------------------------------------------------------

    def open(self, message: Message, owner: str) -> dict[str, Any]:
        """A new session, on the replica that has the fewest; if it has no room, on another."""
        full: set[str] = set()
        while (place := self._place(full)) is not None:
            try:
                return self._call("open", place, message, owner)
            except FullError:
                full.add(place)
            finally:
                with self._lock:
                    self._opening[place] -= 1
        raise FullError("all sessions are in use")

    def send(self, message: Message, owner: str) -> dict[str, Any]:
        """States of a session come in."""
        return self._forward("send", message, owner)

    def next(self, message: Message, owner: str) -> dict[str, Any]:
        """The token after some positions; or, if not all of them have come in time, how many have.

        States may come with it.
        """
        reply = self._forward("next", message, owner)
        if "likely" in reply:
            self.metrics.tokens.inc()
        return reply

    def close(self, message: Message, owner: str) -> dict[str, Any]:
        """A session is done; one that is gone already is no fault."""
        try:
            return self._forward("close", message, owner)
        except GoneError:
            return {}

    def health(self, message: Message, owner: str) -> dict[str, Any]:
        """Whether any works, for which model, and how much all have together."""
        living = self.living()
        return {
            "version": VERSION,
            "fingerprint": self.part.fingerprint,
            "sessions": _total(living, "sessions"),
            "limit": _total(living, "limit"),
            "working": any(each["working"] for each in living),
            "replicas": len(living),
        }

    def stop(self) -> None:
        """End the replicas."""
        end, self._end = self._end, lambda: None
        end()

    # -- where ------------------------------------------------------------------------------------------

    def _place(self, full: Collection[str]) -> str | None:
        """The replica that has the fewest sessions, those included that are being opened; None if all are full."""
        with self._lock:
            living = {each["replica"]: each["sessions"] + self._opening[each["replica"]] for each in self.living()}
            if not living:
                raise BusyError("no replica runs now; another is being started")
            left = {name: sessions for name, sessions in living.items() if name not in full}
            if not left:
                return None
            place = random.choice([name for name, sessions in left.items() if sessions == min(left.values())])
            self._opening[place] += 1
            return place

    def _forward(self, method: str, message: Message, owner: str) -> dict[str, Any]:
        """A call of a session, to the replica that the session's name begins with."""
        place, _, _ = value(message.header, "session", str).partition(".")
        reply = self._call(method, place, message, owner)
        self.metrics.bytes.inc(len(message.body))
        return reply

    def _call(self, method: str, place: str, message: Message, owner: str) -> dict[str, Any]:
        handle = self._handle.options(method_name="call", session_id=place)
        response = handle.remote(method, message.header, bytes(message.body), owner)
        reply = self._awaited(cast(DeploymentResponse, response), place)
        if "fault" in reply:
            raise FAULTS[reply["fault"]](reply["told"])
        return reply

    def _awaited(self, response: DeploymentResponse, place: str) -> dict[str, Any]:
        """A reply, however long it takes, as long as the replica lives."""
        while True:
            try:
                return response.result(timeout_s=LATE)
            except TimeoutError:
                if place not in [each["replica"] for each in self.living()]:
                    response.cancel()
                    raise GoneError from None
            except (RayActorError, ObjectLostError):
                raise GoneError from None


def _total(living: Sequence[dict[str, Any]], name: str) -> int:
    return sum(each[name] for each in living)


# -- from folders to replicas -----------------------------------------------------------------------------


def start(
    folder: Path,
    count: int,
    *,
    precision: str | None = None,
    limits: Limits | None = None,
    tokens: Collection[str] = (),
    rate: float = 0.0,
) -> Replicas:
    """Start replicas, here or in the cluster that the environment's ``RAY_ADDRESS`` names, and wait until all run.

    Args:
        folder: The folder cloud that ``dynamax split`` wrote; at the same place on every machine.
        count: How many replicas.
        precision: How weights are held; ``auto`` is chosen once, here, so that all say the same tokens.
        limits: What each takes.
        tokens: Whoever shows one of these may use them; none lets everybody.
        rate: Calls a second that one token may make; 0 for any number.

    Raises:
        UserError: If the folder holds no cloud, Ray cannot be reached, or the replicas do not start.
    """
    part, owners, limits = read_part(folder), Owners(tokens, rate), limits or Limits()
    check_cloud(part)
    check_precision(precision)
    if precision == AUTO:
        chosen = open_part(folder, precision).choice
        precision = None if chosen is None else chosen.precision
    _init()
    name = f"dynamax-{secrets.token_hex(4)}"  # others may have their own in the same cluster
    try:
        handle = _run(name, folder, count, precision, limits)
    except RuntimeError as error:
        told = serve.status().applications[name].deployments["cloud"].message.strip().split("\n")[-1]
        _stop(name)
        raise UserError(
            f"{count} replicas of {folder} did not start. The folder and this version of dynamax must be on every "
            f"machine of the cluster, with room for the weights. Ray says: {told}"
        ) from error
    except BaseException:
        _stop(name)
        raise
    return Replicas(handle, part, owners, partial(_stop, name))


def _init() -> None:
    """Start Ray for this machine alone, or join a cluster.

    Raises:
        UserError: If the cluster cannot be joined, or Ray would listen to other machines.
    """
    if not TOLD:
        raise UserError("Ray was imported already, and would listen to others. Import dynamax.serving.replicas first.")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING"}
    if ADDRESS == "local":
        ray.init(ADDRESS, include_dashboard=False, object_store_memory=STORE, **quiet)
        return
    try:
        if ADDRESS != "auto":
            socket.create_connection(host_and_port(ADDRESS), KNOCK).close()  # Ray itself would try for minutes
        ray.init(ADDRESS, **quiet)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"RAY_ADDRESS is {ADDRESS!r}, where no Ray cluster can be joined: {error}. Correct it, or unset it to run "
            f"all replicas on this machine."
        ) from error


def _run(name: str, folder: Path, count: int, precision: str | None, limits: Limits) -> DeploymentHandle:
    cores = share([node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]], count)
    calls = 2 * limits.sessions + 8
    deployment = serve.deployment(
        name="cloud",
        num_replicas=count,
        ray_actor_options={"num_cpus": cores},
        max_ongoing_requests=calls,
        request_router_config={"request_router_class": SessionRouter},
        health_check_period_s=1.0,
        health_check_timeout_s=5.0,
        graceful_shutdown_timeout_s=2.0,
        max_constructor_retry_count=1,
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled", logging_config=LoggingConfig(log_level="WARNING"))
    bound = deployment(Replica).bind(str(folder.absolute()), precision, limits, max(1, int(cores)), calls)
    return serve.run(bound, name=name, route_prefix=None)


def share(nodes: Sequence[float], count: int) -> float:
    """The most cores that each of so many replicas can have, each on one machine.

    Args:
        nodes: Cores of each machine.
        count: How many replicas.
    """
    shares = sorted({cores / among for cores in nodes for among in range(1, count + 1)}, reverse=True)
    fits = (each for each in shares if each and sum(int(cores / each + 1e-6) for cores in nodes) >= count)
    return int(1000 * next(fits, 0.0)) / 1000  # Ray knows no smaller parts; rounded down, so that they fit


def _stop(name: str) -> None:
    """End the replicas; where Ray was started here, all of Ray."""
    if ADDRESS != "local":
        serve.delete(name)
    ray.shutdown()
