"""Connects a check to a learner's server: the two processes share no folder, so connections are handed over.

The learner's end (`connect_for`) is a process beside the learner's. Each time the judge asks, it connects to the
server's UNIX socket and hands the connection over. The judge's end (`relayed`) listens at a path of its own, for any
client that a check uses, and copies bytes.
"""

import os
import selectors
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ASKED, CONNECTED, REFUSED = b"c", b"y", b"n"
CHUNK = 1 << 16  # bytes
PATIENCE = 10.0  # seconds within which each read and write of a connection must end


def connect_for(control: socket.socket, path: str) -> None:
    """Connects to the server at `path` for each byte that the judge sends, until it hangs up."""
    while control.recv(1):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
            try:
                made.connect(path)
            except OSError:
                control.sendall(REFUSED)
            else:
                socket.send_fds(control, [CONNECTED], [made.fileno()])


@contextmanager
def relayed(control: socket.socket) -> Iterator[str]:
    """Gives the path of a UNIX socket at which the learner's server answers while the block runs."""
    with tempfile.TemporaryDirectory(prefix="llm40-server-") as folder:
        path = str(Path(folder, "server"))
        ending, end = socket.socketpair()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, control, ending, end:
            listener.bind(path)
            listener.listen()
            thread = threading.Thread(target=_relay, args=(listener, control, ending), daemon=True)
            thread.start()
            try:
                yield path
            finally:
                end.sendall(b"\0")
                thread.join()


def _relay(listener: socket.socket, control: socket.socket, ending: socket.socket) -> None:
    partner: dict[socket.socket, socket.socket] = {}
    with selectors.DefaultSelector() as ready:
        for each in (listener, ending):
            ready.register(each, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                source = key.fileobj
                if source is ending:
                    for each in partner:
                        each.close()
                    return
                if source is listener:
                    for one, other in _connect(listener, control):
                        partner[one] = other
                        ready.register(one, selectors.EVENT_READ)
                elif not _copy(source, partner[source]):
                    ready.unregister(source)


def _connect(listener: socket.socket, control: socket.socket) -> list[tuple[socket.socket, socket.socket]]:
    client, _ = listener.accept()
    try:
        control.sendall(ASKED)
        answer, files, _, _ = socket.recv_fds(control, 1, 1)
    except OSError:
        answer, files = REFUSED, []
    if answer != CONNECTED or not files:
        client.close()
        return []
    server = socket.socket(fileno=files[0])
    for each in (client, server):
        each.settimeout(PATIENCE)
    return [(client, server), (server, client)]


def _copy(source: socket.socket, target: socket.socket) -> bool:
    """Copies the bytes that have come; returns False once no more will come."""
    try:
        part = source.recv(CHUNK)
        if part:
            target.sendall(part)
            return True
    except OSError:
        part = b""
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
    return False


def fork_connector(path: str, own: socket.socket) -> tuple[int, socket.socket]:
    """Starts the learner's end in a process of its own, which closes `own`; returns its id and the judge's socket."""
    control, end = socket.socketpair()
    pid = os.fork()
    if pid:
        end.close()
        return pid, control
    try:
        control.close()
        own.close()
        connect_for(end, path)
    finally:
        os._exit(0)
