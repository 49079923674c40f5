"""The guard's thread: it answers the grader, and only the grader."""

import os
import socket
from _thread import allocate_lock, start_new_thread
from ctypes import c_ulong, py_object, pythonapi
from marshal import loads

from autograder.kernels.inside.desk import Desk, Surroundings
from autograder.kernels.inside.seal import SEAL, framed, opened, received, sealed

interrupt = pythonapi.PyThreadState_SetAsyncExc


def open_door(path: str, names: dict, surroundings: Surroundings) -> None:
    """Waits in a thread for the grader, at a socket of this path; `names` are the notebook's."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, 0o777)
    listener.listen(1)
    start_new_thread(keep_door, (listener, path, Desk(names, surroundings)))


def keep_door(listener: socket.socket, path: str, desk: Desk) -> None:
    """Answers requests until the grader goes. The connection and its key are in this frame and nowhere else."""
    connection, _ = listener.accept()
    listener.close()
    os.unlink(path)
    receive, send = connection.recv, connection.sendall  # C code, whatever becomes of the class
    key = received(receive, SEAL)
    number = 0
    while True:
        try:
            size = int.from_bytes(received(receive, 8), "big")
            request = loads(opened(key, number, received(receive, size)))
        except (EOFError, OSError, ValueError):
            return
        send(framed(sealed(key, number + 1, repr(answer(desk, request)).encode())))
        number += 2


def answer(desk: Desk, request: dict) -> tuple:
    """What came of a request, as plain values: how it ended, with which exception, message, places, and reports."""
    box, ended = [], allocate_lock()
    ended.acquire()
    thread = start_new_thread(desk.serve, (request, box, ended))
    if not ended.acquire(timeout=request["seconds"]):
        interrupt(c_ulong(thread), py_object(KeyboardInterrupt))
        if not ended.acquire(timeout=request["grace"]):
            return ("stuck", "", "", (), desk.reports())
        return ("timeout", "", "", (), desk.reports())
    return (*box[0], desk.reports())
