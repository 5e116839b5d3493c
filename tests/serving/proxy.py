"""A link that can be slow, cut, or half open: bytes go through it as it is told."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Proxy:
    """Listens on this machine and passes bytes to a port.

    Args:
        port: Where to.

    Attributes:
        port: Where it listens.
        delay: Seconds that each piece of bytes waits.
        silent: Whether bytes vanish while connections stay open; one that has lost some passes none any more, as TCP.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self.delay, self.silent = 0.0, False
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections now; new ones can be made."""
        sockets, self._sockets = self._sockets, []
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def close(self) -> None:
        """End."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:
                return
            try:
                there = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                here.close()
                continue
            self._sockets += [here, there]
            for pair in ((here, there), (there, here)):
                threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        holed = False
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.delay:
                    time.sleep(self.delay)
                holed = holed or self.silent
                if not holed:
                    target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
