"""What a kernel may send: nothing of it ends the grader or fills its memory. A learner's code has the sockets too."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest
from box import LIMITS, SANDBOX, printed

from autograder.execute import Outcome, Step, execute

KERNEL = "kernel = get_ipython().kernel\n"
PUBLISH = (
    KERNEL
    + """
session, socket, parent = kernel.session, kernel.iopub_thread.socket, kernel.get_parent("shell")
import json
def raw(kind, content):
    packed = [json.dumps(part, default=str).encode() for part in (session.msg_header(kind), parent["header"], {})]
    socket.send_multipart([b"<IDS|MSG>", session.sign([*packed, content]), *packed, content])
"""
)
KINDS = ("stream", "display_data", "execute_result", "error", "clear_output", "update_display_data", "status")
STRANGE = {"name": [], "text": 1, "data": [], "metadata": 2, "traceback": {}, "ename": 3, "evalue": [], "transient": []}
STRANGE |= {"execution_count": {}, "execution_state": []}
NO_MESSAGES = {
    "no message": "socket.send_multipart([b'nothing that is a message'])",
    "too few parts": "socket.send_multipart([b'<IDS|MSG>', b'', b'{}'])",
    "no JSON": "raw('stream', b'[' * 100000)",
    "not UTF-8": "raw('stream', b'\\xff\\xfe')",
    "a list": "raw('stream', b'[1, 2]')",
    "a number of 5,000 digits": "raw('stream', b'9' * 5000)",
    "nothing in it": "[raw(kind, b'{}') for kind in KINDS]",
    "other types": "[raw(kind, json.dumps(STRANGE).encode()) for kind in KINDS]",
    "deep": "raw('display_data', b'{\"data\": {\"text/plain\": ' + b'[' * 400 + b']' * 400 + b'}, \"metadata\": {}}')",
    "a type that is none": "raw(['stream'], b'{}')",
}


@pytest.mark.parametrize("cell", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_what_is_no_message(cell):
    """It is left out; the cell and the next go on, and what came makes a notebook."""
    cell = f"{PUBLISH}KINDS, STRANGE = {KINDS}, {STRANGE}\n{cell}\nprint('here')"
    outcomes = execute([Step(cell), Step("print(1)")], LIMITS, managers=SANDBOX["forked"])
    assert [outcome.status for outcome in outcomes] == ["ok", "ok"]
    assert "here\n" in [output.get("text") for output in outcomes[0].outputs]
    assert printed(outcomes[1]) == "1\n"
    json.dumps([outcome.outputs for outcome in outcomes])


def around(cell: str, limits=LIMITS) -> list[Outcome]:
    """What became of a cell and of the one after it, which runs, in another kernel if need be."""
    *outcomes, after = execute([Step("x = 1"), Step(cell), Step("print(x)")], limits, managers=SANDBOX["forked"])
    assert printed(after) == "1\n"
    return outcomes


@pytest.mark.parametrize("packed", ["b'[' * 100000", "b'[]'", "b'\\xff'", "b'9' * 20_000_000"])
def test_a_reply_that_is_none_costs_the_kernel(packed):
    assert around(f"{KERNEL}kernel.session.pack = lambda value: {packed}", replace(LIMITS, cell=3))[1].status in (
        "died",
        "timeout",
    )


@contextmanager
def growth() -> Iterator[list[int]]:
    """By how many MB the memory of this process, the grader's, has grown: one figure after another."""
    me, ended, grown = psutil.Process(), threading.Event(), [0]
    before = me.memory_info().rss

    def look() -> None:
        while not ended.wait(0.02):
            grown.append((me.memory_info().rss - before) // 10**6)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield grown
    finally:
        ended.set()
        thread.join()


SOCKETS = """
import glob, os, socket, threading, time
def serve(path, answer):
    os.unlink(path)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(50)
    def go():
        while True:
            connection, _ = server.accept()
            try:
                answer(connection)
            except OSError:
                pass
    threading.Thread(target=go, daemon=True).start()
paths = [path for path in glob.glob("/tmp/llm40-*/s/*")]
ours = [os.path.realpath(path) for path in paths]
greeted = []
def greet(connection):  # as ZMTP 3.0 begins (https://rfc.zeromq.org/spec/23)
    connection.sendall(b"\\xff" + bytes(8) + b"\\x7f\\x03\\x00NULL" + bytes(16) + b"\\x00" + bytes(31))
    received = b""
    while b"Socket-Type" not in received:
        received += connection.recv(1000)
    kind = b"PUB" if b"SUB" in received else b"ROUTER"
    ready = b"\\x05READY\\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind
    connection.sendall(bytes([4, len(ready)]) + ready)
    greeted.append(kind)
"""
CUT = """
for number in range(3, 200):  # whoever was connected connects again, to whatever is there now
    try:
        old = socket.socket(fileno=os.dup(number))
        if old.getsockname() in ours and old.getpeername() is not None:  # an error where it only listens
            old.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
time.sleep(9)
"""
LOUD = {
    "noise": "connection.sendall(os.urandom(10**6))",
    "nothing": "connection.close()",
    "an old protocol": "connection.sendall(b'\\x01\\x00' * 1000)",
    "a frame of 2^62 bytes": "greet(connection); connection.sendall(b'\\x02' + b'\\x40' + bytes(7) + b'x' * 10**6)",
    "a frame of 8 GB, sent": "greet(connection); connection.sendall(b'\\x02' + (8 * 10**9).to_bytes(8, 'big'));"
    " [connection.sendall(bytes(10**7)) for _ in range(800)]",
    "a command that is none": "greet(connection); connection.sendall(b'\\x04\\x05\\xffREAD')",
}


@pytest.mark.parametrize("answer", LOUD.values(), ids=LOUD)
def test_another_server_in_the_place_of_the_sockets(answer):
    """What is not ZeroMQ's protocol, or promises a message without end. The next kernel has sockets of its own."""
    cell = f"{SOCKETS}def answer(connection):\n    {answer}\nfor path in paths: serve(path, answer)\n"
    with growth() as grown:
        assert around(cell + CUT, replace(LIMITS, cell=7))[1].status in ("died", "timeout", "ok")
    assert max(grown) < 200


# --- floods ---------------------------------------------------------------------------------------------------


def test_a_flood_of_pictures():
    """Published while a cell sleeps, and after it has ended: what nobody reads stays in the kernel's own memory."""
    flood = """
import threading, time
from IPython.display import display
def flood():
    for _ in range(100):
        display({"image/png": "A" * 4_000_000}, raw=True)
thread = threading.Thread(target=flood)
thread.start()
time.sleep(3)
"""
    with growth() as grown:
        steps, limits = [Step(flood), Step("thread.join()")], replace(LIMITS, cell=60)
        first, second = execute(steps, limits, managers=SANDBOX["forked"])
    assert (first.status, second.status) == ("ok", "ok")
    assert "output cut" in first.outputs[-1]["text"]
    assert max(grown) < 200


def test_messages_of_200_mb():
    """Too large for the socket: they are not taken, and it is said that something is missing."""
    steps = [Step("print('x' * 200_000_000)"), Step("import time; time.sleep(2)"), Step("print(1)")]
    with growth() as grown:
        first, _, third = execute(steps, replace(LIMITS, cell=60), managers=SANDBOX["forked"])
    assert first.status == "ok"
    assert "output cut" in first.outputs[-1]["text"]
    assert printed(third) == "1\n"
    assert max(grown) < 200
