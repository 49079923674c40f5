"""Walls around learners' code: bubblewrap (https://github.com/containers/bubblewrap, Debian package `bubblewrap`).

Guaranteed for everything that runs in a `Sandbox`:

- It sees the system's programs (/usr and a few files of /etc), this Python and its environment, the package llm40 and
  the judge's agent, all read-only; nothing else of the disk: no solutions, no hidden test, no gradebook, no
  submission, no home folder.
- It writes to one private folder, /tmp, of limited size, which lies in memory and is gone at the end; no file of
  the grader's can be written from inside, and none is left behind.
- It has no network but its own loopback, sees and signals no process but its own, and knows of the grader's environment
  only the variables that KEPT names.
- It ends with the thread that started it: when that ends, even if it is killed, everything inside is killed.
- Each process's memory, the size of a file and the number of processes are limited (see Limits). Started by root it
  runs as a user of its own, one that owns nothing here: root itself is bound by no limit of processes.
- Where the machine's memory ends all the same, it is the first to be killed.

Not guaranteed: that all its processes together stay within `memory`; only a control group can limit that, and not every
machine allows one. And bubblewrap's walls are the Linux kernel's: a hole in the kernel is a hole in them.

The way out is the kernel's sockets. They lie in the private folder too; the grader reaches them through /proc.
"""

import json
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from glob import glob
from importlib.metadata import version
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired, run

from autograder.kernels import seccomp
from autograder.kernels.group import Group, make_control_group
from autograder.kernels.limits import Limits

ROOT = Path(__file__).resolve().parents[2]
VISIBLE = ("llm40", "autograder/judge")  # of the project: the library of lessons, and the judge's agent
PRIVATE = "/tmp"
HOME = "/tmp/home"
CONNECTION, SOCKETS = "connection.json", "s"  # names in a kernel's folder
SHARED_MEMORY = 64 * 2**20  # /dev/shm: for tensors that processes of torch.multiprocessing hand each other
USERS = 0x70000000  # the first of 2^27 user numbers that no distribution gives away

SYSTEM = ["/usr", "/bin", "/lib", "/lib32", "/lib64", "/libx32", "/sbin"]
SETTINGS = [
    "/etc/alternatives",
    "/etc/fonts",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
]
DRIVERS = ["/dev/nvidiactl", "/dev/kfd", "/dev/dxg"]  # NVIDIA's, AMD's, Windows' for its Linux
DEVICES = ["/dev/nvidia*", "/dev/nvidia-caps/*", "/dev/kfd", "/dev/dri", "/dev/dxg"]
KEPT = (
    "LANG",
    "LC_",
    "TZ",
    "OMP_",
    "OPENBLAS_",
    "MKL_",
    "LD_LIBRARY_PATH",
    "LLM40_",
    "TRITON_",
    "CUDA_",
    "NVIDIA_",
    "PYTHONHASHSEED",
    "PYTHONSAFEPATH",
    "PYTHONNOUSERSITE",
    "NBGRADER_EXECUTION",
)


class NoSandbox(RuntimeError):
    """The walls cannot be built on this machine; the message says why, and what to do."""


_trying = threading.Lock()


def find_sandbox_trouble() -> str:
    """Why there can be no sandbox on this machine, and what to do about it; empty where there can be one.

    It is tried once; a thread may try before the answer is needed.
    """
    with _trying:
        return _try_sandbox()


@cache
def _try_sandbox() -> str:
    if sys.platform != "linux":
        return "learners' code runs in a sandbox of bubblewrap, which runs on Linux only: grade on a Linux machine"
    missing = [name for name in ("bwrap", "choom", "prlimit", "setpriv") if not shutil.which(name)]
    if missing:
        package = "bubblewrap" if "bwrap" in missing else "util-linux"
        return (
            f"learners' code runs in a sandbox of bubblewrap, and {missing[0]} is not installed: apt install {package}"
        )
    found = run(["bwrap", "--version"], capture_output=True, text=True).stdout.split()[-1]
    if tuple(map(int, found.split(".")[:2])) < (0, 8):
        return f"learners' code runs in a sandbox of bubblewrap 0.8 or newer, and this one is {found}"
    try:
        with refused_calls(counted=True) as refused:
            tried = run(
                make_command([sys.executable, "-c", "import zmq"], Limits(), choose_user(), refused=refused),
                env=make_sandbox_environment(dict(os.environ), Limits()),
                stdin=DEVNULL,
                capture_output=True,
                text=True,
                timeout=60,
                pass_fds=[refused],
            )
        said, failed = tried.stderr.strip(), tried.returncode
    except (OSError, TimeoutExpired) as error:
        said, failed = str(error), True
    if not failed:
        return ""
    reason = said.splitlines()[-1] if said else f"exit code {failed}"
    return (
        f"learners' code runs in a sandbox of bubblewrap, which does not work here ({reason}). "
        "It needs user namespaces, or to be started by root. On Ubuntu: sysctl -w "
        "kernel.apparmor_restrict_unprivileged_userns=0; in a container: start it privileged"
    )


def choose_user() -> int | None:
    """The user that a sandbox runs as: one that owns nothing and that no other sandbox has; None without root's rights.

    Only root can become another user; else the sandbox's own user namespace makes its count of processes its own.
    """
    return USERS + secrets.randbelow(2**27) if os.geteuid() == 0 else None


def make_sandbox_environment(env: dict[str, str], limits: Limits) -> dict[str, str]:
    """The environment inside: the variables of `env` that are kept, and the places that are there."""
    kept = {name: value for name, value in env.items() if name.startswith(KEPT)}
    if find_gpus(env) and limits.gpu < 1 and _knows_shares():
        kept["PYTORCH_CUDA_ALLOC_CONF"] = f"per_process_memory_fraction:{limits.gpu:.3f}"
    return kept | {
        "PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),  # of which only llm40 is there
        "HOME": HOME,
        "USER": "learner",
        "TMPDIR": PRIVATE,
        "IPYTHONDIR": f"{HOME}/.ipython",
        "TRITON_CACHE_DIR": f"{HOME}/.triton",
        # The headers that torch.compile would precompile once are larger than a kernel's files may be.
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
    }


def find_gpus(env: dict[str, str]) -> list[str]:
    """The GPUs' devices, if the kernel is to have them. (Written from the documentation, not tried on a GPU.)"""
    if env.get("LLM40_PROFILE") == "cpu" or env.get("CUDA_VISIBLE_DEVICES") == "" or not any(map(glob, DRIVERS)):
        return []
    return sorted(path for pattern in DEVICES for path in glob(pattern))


def _knows_shares() -> bool:
    """Whether this PyTorch takes per_process_memory_fraction from the environment; an older one stops at the word."""
    major, minor = version("torch").split(".")[:2]
    return (int(major), int(minor)) >= (2, 13)


def make_command(
    program: Sequence[str],
    limits: Limits,
    user: int | None,
    folder: Path | None = None,
    gpu: Sequence[str] = (),
    refused: int | None = None,
) -> list[str]:
    """The command line that runs a program inside, as `user` if there is one.

    `folder` is a kernel's: inside there are its connection file, and a place for its sockets. `refused` is a descriptor
    from which bubblewrap reads what system calls to refuse (see refused_calls).
    """
    walls = [
        shutil.which("bwrap") or "bwrap",  # by the grader's own PATH
        "--die-with-parent",
        "--new-session",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
    ]
    if user is None:
        walls += ["--unshare-user", "--disable-userns"]
    if refused is not None:
        walls += ["--seccomp", str(refused)]
    # The private folder comes first: this Python, or the project, may lie in the machine's own /tmp.
    walls += ["--perms", "1777", "--size", str(limits.folder), "--tmpfs", PRIVATE, "--perms", "0777", "--dir", HOME]
    walls += _list_read_only()
    if folder:
        walls += ["--perms", "0755", "--dir", str(folder), "--perms", "0777", "--dir", str(folder / SOCKETS)]
        walls += ["--ro-bind", str(folder / CONNECTION), str(folder / CONNECTION)]
    walls += ["--proc", "/proc", "--dev", "/dev"]
    for device in gpu:
        walls += ["--dev-bind", device, device]
    walls += ["--perms", "1777", "--size", str(min(SHARED_MEMORY, limits.folder)), "--tmpfs", "/dev/shm"]
    walls += ["--ro-bind", "/sys", "/sys"] if gpu else ["--ro-bind-try", "/sys/devices/system", "/sys/devices/system"]
    walls += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", HOME, "--"]
    walls += ["choom", "--adjust", "1000", "--"]  # where memory ends after all, the kernel is the first to go
    if user is not None:
        walls += ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--inh-caps=-all"]
        walls += ["--bounding-set=-all", "--no-new-privs"]
    bounds = [f"--{name}={value}" for name, value in list_resource_limits(limits, bool(gpu)).items()]
    return [*walls, "prlimit", *bounds, *program]


@contextmanager
def refused_calls(counted: bool) -> Iterator[int]:
    """A descriptor from which one bubblewrap reads the filter of system calls."""
    reader, writer = os.pipe()
    try:
        os.write(writer, seccomp.make_program(counted))  # some hundred bytes: a pipe holds them
        os.close(writer)
        yield reader
    finally:
        os.close(reader)


def list_resource_limits(limits: Limits, gpu: bool) -> dict[str, int]:
    """The limits that a process carries (setrlimit(2))."""
    memory = "data" if gpu else "as"
    return {memory: limits.memory, "nproc": limits.processes, "fsize": limits.file, "core": 0}


def _list_read_only() -> list[str]:
    """Arguments that show the system, this Python with its environment, and VISIBLE; nothing else of the project."""
    arguments = []
    for path in map(Path, SYSTEM):
        if path.is_symlink():  # /bin is usr/bin
            arguments += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    # Folders that bubblewrap makes by itself, started by root, are closed to others.
    for path in ("/etc", "/sys", "/sys/devices"):
        arguments += ["--perms", "0755", "--dir", path]
    for path in SETTINGS:
        arguments += ["--ro-bind-try", path, path]
    around = [path for path in find_pythons() if not path.is_relative_to(ROOT)]
    within = [path for path in find_pythons() if path.is_relative_to(ROOT)]
    shown = [Path("/usr"), *around]
    # A project that lies inside of what is shown, such as /usr/src/app, is covered up again.
    covered = (ROOT / "solutions").exists() and any(ROOT.is_relative_to(path) for path in shown)
    for path in around:
        arguments += _show_folder(path)
    if covered:
        arguments += ["--perms", "0755", "--tmpfs", str(ROOT)]
    for path in [*within, *(ROOT / name for name in VISIBLE)]:
        arguments += _show_folder(path)
    return [*arguments, "--remount-ro", str(ROOT)] if covered else arguments


def find_pythons() -> list[Path]:
    """The folders that this Python needs: its environment, the installation behind it, and what links between them."""
    folders = {Path(sys.prefix), Path(sys.base_prefix)}
    program = Path(sys.executable)
    while program.is_symlink():
        program = program.parent / os.readlink(program)
        folders |= {Path(os.path.normpath(program)).parent.parent, program.resolve().parent.parent}
    return sorted(path for path in folders if not path.is_relative_to("/usr"))


def _show_folder(path: Path) -> list[str]:
    """A folder, read-only, at its own place; the folders above it are empty, and open to the sandbox's user."""
    above = [
        argument for parent in reversed(path.parents[:-1]) for argument in ("--perms", "0755", "--dir", str(parent))
    ]
    return [*above, "--ro-bind", str(path), str(path)]


class Sandbox:
    """A program in a running sandbox. Closing it ends all that runs inside, and returns when it has ended."""

    def __init__(
        self, program: Sequence[str], limits: Limits, folder: Path, env: dict[str, str], stdout=DEVNULL, stderr=DEVNULL
    ):
        gpu = find_gpus(env)
        self.user = choose_user()
        self.env = make_sandbox_environment(env, limits)
        self.resources = list_resource_limits(limits, bool(gpu))
        self.bwrap = self.init = self.program = self.group = None
        self.control = make_control_group(limits)
        try:
            init = self._start(make_command(program, limits, self.user, folder, gpu), stdout, stderr)
            # By descriptors, not by numbers: a number may be another process's as soon as its own has ended.
            self.init = os.pidfd_open(init)
            self.pid = self._find_first(init)
            self.program = os.pidfd_open(self.pid)
            self.group = Group(self.pid, limits, self.control, self._end)
            self._open(folder)
        except BaseException:
            self.close()
            raise

    def _start(self, walls: list[str], stdout, stderr) -> int:
        """Starts bubblewrap, in the control group if there is one; returns the first process inside."""
        reader, writer = os.pipe()
        try:
            with refused_calls(self.control is not None) as refused:
                told = ["--info-fd", str(writer), "--seccomp", str(refused)]
                into = ["/bin/sh", "-c", f'{self.control.enter} exec "$@"', "sh"] if self.control else []
                self.bwrap = Popen(
                    [*into, walls[0], *told, *walls[1:]],
                    env=self.env,
                    cwd="/",
                    stdin=DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    pass_fds=[writer, refused],
                )
        finally:
            os.close(writer)
        with os.fdopen(reader) as info:
            answer = info.read()
        if not answer:
            raise NoSandbox(f"bubblewrap ended at once, with exit code {self.bwrap.wait()}")
        return json.loads(answer)["child-pid"]

    def _find_first(self, init: int, patience: float = 10.0) -> int:
        """The program's process, by its number outside. bubblewrap starts it when all walls stand."""
        children = Path(f"/proc/{init}/task/{init}/children")
        ends = time.monotonic() + patience
        while time.monotonic() < ends and self.bwrap.poll() is None:
            with suppress(OSError):
                found = children.read_text().split()
                if found:
                    return int(found[0])
            time.sleep(0.001)
        raise NoSandbox("bubblewrap did not start its program")

    def _open(self, folder: Path) -> None:
        """Makes a link outside, of the same name, to the place of the sockets inside."""
        link = folder / SOCKETS
        link.unlink(missing_ok=True)
        link.symlink_to(f"/proc/{self.pid}/root{link}")

    def send_signal(self, number: int) -> None:
        """Sends a signal to the program."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.program, number)

    def count_cpu_seconds(self) -> float:
        """CPU time that all processes inside have used so far; once it is closed, the last figure."""
        return self.group.count_cpu_seconds()

    @property
    def over(self) -> str:
        """The limit for which all processes inside were stopped; empty if they were not."""
        return self.group.over

    def _end(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.init, signal.SIGKILL)  # the first process inside: the others go with it

    def close(self) -> None:
        if self.init is not None:
            self._end()
        if self.bwrap:
            self.bwrap.wait()
        if self.group:
            self.group.close()
        elif self.control:
            self.control.close()
        for descriptor in (self.init, self.program):
            if descriptor is not None:
                os.close(descriptor)
        self.init = self.program = None
