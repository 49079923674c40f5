"""The warm process: imports what lessons need, once, and is forked for every kernel.

A kernel costs a fork and IPython's own start, and shares the memory of the libraries with all others. This process runs
outside of every sandbox and no learner's code ever runs in it: a kernel walks into a sandbox of its own, which
bubblewrap has built around an idle process (setns(2)), and gives up all rights, before it reads its first message. So
a kernel can reach neither this process nor another kernel, and the walls are the same for a kernel that is not forked.

Before the fork: imports, a guard that knows how they are (kernels/inside), and nothing else. No CUDA query, no tensor
operation, no thread, no zmq context: their state does not survive a fork. After it a kernel has its own random numbers,
environment, directory, files and limits. One thing is the warm process's for good: PYTHONHASHSEED, which Python reads
when it starts.

For each kernel a process stays behind as its doorkeeper: it passes signals on, reports how the kernel ended, and kills
it when the connection that asked for it is closed.

    python -m autograder.kernels.warm SOCKET MODULE... [--later MODULE...]

imports the modules, those after --later when it has forked a few kernels: few cells use them.
It listens on a socket (an inherited descriptor) until its standard input ends, and then removes the socket's folder. A
request is one message: JSON, and the descriptors of standard output, standard error and, for a sandbox, of a process in
it; `groups` are the files by which a process enters its control group. The answers are {"pid": …} or {"error": …}, then
{"exit": …}; what may be sent besides is {"signal": …}.
"""

import ctypes
import gc
import importlib
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import sys
from contextlib import suppress

from autograder.kernels import seccomp

MESSAGE = 2**17  # bytes at most
LATER = "--later"
FEW = 4  # kernels for which nothing more is imported: those of two notebooks, with their judges
# Linux's numbers, from its headers sched.h, prctl.h and capability.h.
NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
SET_PDEATHSIG, SET_DUMPABLE, SET_NO_NEW_PRIVS, CAPABILITY_VERSION = 1, 4, 38, 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def check_result(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    address = listener.getsockname()
    sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]  # what `-m` adds
    gc.disable()  # until a kernel has been forked: while modules are imported it finds little, and takes its time
    first, _, later = " ".join(sys.argv[2:]).partition(LATER)
    waiting = later.split()
    load(first.split())
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # doorkeepers need no one to wait for them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who hold this process's standard input
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(0, select.POLLIN)
    served = 0
    while 0 not in dict(poll.poll(0 if waiting and served >= FEW else None)):
        if waiting and served >= FEW:
            load([waiting.pop(0)])
            continue
        connection = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            keep_door(connection)
        connection.close()
        served += 1
    shutil.rmtree(os.path.dirname(address), ignore_errors=True)


def load(names: list[str]) -> None:
    for name in names:
        with suppress(ImportError):  # seaborn is not everywhere
            importlib.import_module(name)
    gc.freeze()  # so that the collector does not copy every page into every kernel


def keep_door(connection: socket.socket) -> None:
    """Starts a kernel and stays until it has ended. Does not return."""
    parent = os.getppid()
    libc.prctl(SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        message, files, _, _ = socket.recv_fds(connection, MESSAGE, 3)
        groups = []
        request = json.loads(message)
        if request["box"]:
            groups = [os.open(path, os.O_WRONLY) for path in request["groups"]]  # inside they cannot be seen
            enter(files[2], request["box"]["user"] is None)
        door = os.getpid()
        kernel = os.fork()
    except BaseException as error:
        with suppress(OSError):
            connection.send(json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        os._exit(1)
    if kernel == 0:
        run_kernel(request, files, groups, door)
    for file in files + groups:
        os.close(file)
    try:
        watch(connection, kernel)
    finally:
        os._exit(0)


def enter(process: int, user_namespace: bool) -> None:
    """Goes where a process is: its files, network and semaphores; later children are among its processes."""
    check_result(
        libc.setns(process, NEW_NS | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET | (NEW_USER if user_namespace else 0))
    )


def watch(connection: socket.socket, kernel: int) -> None:
    """Passes signals on until the kernel ends. The kernel leads a group of its own, with what it starts."""
    connection.send(json.dumps({"pid": kernel}).encode())
    ended = os.pidfd_open(kernel)
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    poll.register(ended, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        if ended in ready:
            break
        message = connection.recv(MESSAGE)
        strike(kernel, json.loads(message)["signal"] if message else signal.SIGKILL)
        if not message:
            break
    strike(kernel, signal.SIGKILL)  # what it left behind
    _, status = os.waitpid(kernel, 0)
    connection.send(json.dumps({"exit": os.waitstatus_to_exitcode(status)}).encode())


def strike(kernel: int, number: int) -> None:
    """Sends a signal to a kernel's group. Nobody has waited for it yet, so its number is no other process's."""
    try:
        os.killpg(kernel, number)
    except ProcessLookupError:  # it has no group of its own yet
        os.kill(kernel, number)


def run_kernel(request: dict, files: list[int], groups: list[int], door: int) -> None:
    """Becomes the kernel. Does not return."""
    code = 1
    try:
        for group in groups:
            os.write(group, b"0")
        os.setsid()
        for target, source in enumerate([os.open(os.devnull, os.O_RDONLY), *files[:2]]):
            os.dup2(source, target)
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        triton = {name: value for name, value in os.environ.items() if name == "TRITON_INTERPRET"}  # it was imported so
        os.environ.clear()
        os.environ.update(triton | request["env"])
        os.chdir(request["cwd"])
        if request["box"]:
            bind(**request["box"])
        libc.prctl(SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which would clear it
        if os.getppid() not in (door, 0):  # 0 is a parent outside of the sandbox
            os._exit(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        gc.enable()
        random.seed()
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        become(request["arguments"])
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(Exception):
            sys.__stderr__.flush()
        os._exit(code)


def become(arguments: list[str]) -> None:
    """Runs a kernel, or the judge's process."""
    if "--court" in arguments:
        from autograder.judge import court

        court.main(arguments[-1])
        return
    from ipykernel.kernelapp import IPKernelApp

    sys.argv = ["ipykernel_launcher.py", *arguments]
    IPKernelApp.launch_instance()


def bind(user: int | None, limits: dict[str, int], counted: bool) -> None:
    """Sets the limits and gives up every right, for good."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (value, value))
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    no_capabilities = (ctypes.c_uint32 * 6)()
    check_result(libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), no_capabilities))
    check_result(libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    check_result(libc.prctl(SET_DUMPABLE, 1, 0, 0, 0))  # its own files in /proc are its own
    seccomp.install(seccomp.make_program(counted))


if __name__ == "__main__":
    main()
