"""What ends every process of a run when one of them dies, also where the others wait for it in vain.

On CPUs a lost process is an error of the next exchange at once. On GPUs the others may wait for minutes in a kernel,
and those of another node have no launcher who sees it. So each process holds a connection to the first one: the system
closes it with the process, however that dies, and a machine that is gone stops answering.
"""

import contextlib
import os
import selectors
import socket
import sys
import threading
from collections.abc import Callable

from neon.errors import one_line

GRACE_SECONDS = 10.0
"""in which a process that has lost another may end in its own way, and say more"""
LOST = "another process of this run ended early; its own message says why"
_BYE = b"."
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2}
"""seconds, seconds and questions without an answer after which a machine is gone"""
_TIMEOUT = 60.0


class Lifeline:
    """The connections of one process: to all others in the first one, else to that."""

    def __init__(self, peers: list[socket.socket]) -> None:
        self._peers, self._ended = peers, threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._watch = threading.Thread(target=self._run, name="lifeline", daemon=True)
        self._watch.start()

    def close(self, *, well: bool) -> None:
        """Let go of the others, which go on if it ended `well` and else end, too."""
        self._ended.set()
        for peer in self._peers:
            with contextlib.suppress(OSError):
                if well:
                    peer.sendall(_BYE)
                peer.shutdown(socket.SHUT_RDWR)
        self._wake.close()
        self._watch.join()
        for one in (*self._peers, self._woken):
            one.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for one in (*self._peers, self._woken):
                selector.register(one, selectors.EVENT_READ)
            while len(selector.get_map()) > 1:
                for key, _ in selector.select():
                    if key.fileobj is self._woken:
                        return
                    selector.unregister(key.fileobj)
                    if not _says_goodbye(key.fileobj):
                        return self._end()

    def _end(self) -> None:
        """End this process unless it ends by itself, after the others were told."""
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        if self._ended.wait(GRACE_SECONDS):
            return
        sys.stderr.write(f"\n{one_line(LOST)}\n")
        sys.stderr.flush()
        os._exit(1)


def connected(rank: int, world_size: int, tell_port: Callable[[int], int]) -> Lifeline:
    """The lifeline of process `rank`, to be called by all of them.

    `tell_port` gives all of them what the first one calls it with.

    Raises:
        OSError: a process does not connect, or the first one cannot be reached.
    """
    if rank == 0:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=world_size) as listener:
            listener.settimeout(_TIMEOUT)
            tell_port(listener.getsockname()[1])
            return Lifeline([_kept_alive(listener.accept()[0]) for _ in range(world_size - 1)])
    first = (os.environ["MASTER_ADDR"], tell_port(0))
    return Lifeline([_kept_alive(socket.create_connection(first, _TIMEOUT))])


def ends_well(error: BaseException | None) -> bool:
    """Whether a process that ends by `error` leaves the others to end in their own way: they know of it."""
    return error is None or bool(getattr(error, "shared", isinstance(error, SystemExit)))


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # macOS calls the first one otherwise
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _says_goodbye(peer: object) -> bool:
    assert isinstance(peer, socket.socket)
    try:
        return peer.recv(1) == _BYE
    except OSError:
        return False
