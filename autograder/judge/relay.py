"""A learner's server, reached from the judge's process: two ends that share no folder, and pass connections on.

The learner's end (`connect_for`) is a process beside the learner's that connects to the server's UNIX socket each time
it is asked, and hands the connection over. The judge's end (`relayed`) listens at a path of its own, for whatever
client a check uses, and copies bytes.
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
PATIENCE = 10.0  # seconds that a connection is given to write on


def connect_for(control: socket.socket, path: str) -> None:
    """Until the judge hangs up: a connection to the server at `path` for each byte that comes."""
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
    """The path of a UNIX socket at which the other end's server answers while the block runs."""
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
    """Copies what has come; False once nothing more will."""
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
    """The learner's end, in a process of its own: (its id, the judge's socket). `own` is closed there."""
    theirs, control = socket.socketpair()
    pid = os.fork()
    if pid:
        control.close()
        return pid, theirs
    try:
        theirs.close()
        own.close()
        connect_for(control, path)
    finally:
        os._exit(0)
