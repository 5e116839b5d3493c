"""A network between two ports of this machine: bytes arrive late, and so many a second."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time

PIECE = 4096
"""Bytes that travel together."""


class SlowLink:
    """Listens on this machine and passes bytes to a port, each way with the same delay and rate.

    Args:
        port: Where to.
        rtt: Seconds there and back.
        mbit: Million bits a second, each way, all connections together.

    Attributes:
        port: Where it listens.
        passed: Bytes up and down so far.
    """

    def __init__(self, port: int, *, rtt: float, mbit: float) -> None:
        self._target, self._delay, self._rate = port, rtt / 2, mbit * 1e6 / 8
        self.passed = [0, 0]
        self._free = [0.0, 0.0]
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self._target))
            for each in (here, there):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for way, pair in enumerate(((here, there), (there, here))):
                due: queue.Queue[tuple[float, bytes] | None] = queue.Queue()
                threading.Thread(target=self._read, args=(way, pair[0], due), daemon=True).start()
                threading.Thread(target=self._write, args=(pair[1], due), daemon=True).start()

    def _read(self, way: int, source: socket.socket, due: queue.Queue[tuple[float, bytes] | None]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE):
                with self._lock:  # what came before takes the line first
                    begin = max(time.perf_counter(), self._free[way])
                    self._free[way] = begin + len(data) / self._rate
                    self.passed[way] += len(data)
                    due.put((self._free[way] + self._delay, data))
        due.put(None)

    def _write(self, target: socket.socket, due: queue.Queue[tuple[float, bytes] | None]) -> None:
        with contextlib.suppress(OSError):
            while (item := due.get()) is not None:
                time.sleep(max(0.0, item[0] - time.perf_counter()))
                target.sendall(item[1])
            target.shutdown(socket.SHUT_WR)
