"""What a cloud counts, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from dynamax.errors import UserError


class Metrics:
    """Counters of one cloud, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        given = {"namespace": "dynamax", "subsystem": "cloud", "registry": self.registry}
        self.calls = Counter("calls", "Calls, by method and how they ended.", ["method", "code"], **given)
        self.sessions = Gauge("sessions", "Sessions that are open.", **given)
        self.tokens = Counter("tokens", "Tokens that were said.", **given)
        self.bytes = Counter("received_bytes", "Bytes of hidden states that came in.", **given)
        self.seconds = Histogram("pass_seconds", "Time of a pass over all sessions that wait.", **given)
        rows = (1, 2, 4, 8, 16, 32, 64)
        self.rows = Histogram("pass_rows", "Sessions that a pass took along.", buckets=rows, **given)

    def serve(self, host: str, port: int) -> None:
        """Answer at http://host:port/metrics, in a thread of its own.

        Raises:
            UserError: If it cannot listen there.
        """
        try:
            start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise UserError(f"Figures cannot be served at {host}:{port}: {error}. Choose another address.") from error
