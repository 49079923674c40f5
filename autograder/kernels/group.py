"""All processes of a kernel, taken together: their memory, their number, their time on a processor.

Where the machine allows control groups (cgroups(7), version 2 or 1) every sandbox has one: Linux itself counts and
limits, whatever the processes do, and a busy sandbox has no more of a processor than another, with however many
processes. Elsewhere a thread of the grader's looks a few times in a second, and stops the sandbox that is over: it does
not see memory that is taken between two looks, nor the system's own (sockets' buffers, say).

A sandbox has a list of its own processes and of no others, its /proc. It is read here from outside, through a
descriptor that stays good whatever the processes inside do.

When a machine's memory ends, Linux kills the process that has the most; so a student with many small processes would
cost another the kernel. oom_score_adj (proc(5)) corrects that: each process has its sandbox's, and the sandbox's memory
in all counts more than the process's.
"""

import os
import secrets
import shlex
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

from autograder.kernels.limits import MB, Limits

SELF = Path("/proc/self")
PREFIX = "llm40-"
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
PAGE = os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else 4096
UTIME, THREADS = 11, 17  # in /proc/PID/stat after the name: utime, stime, and both of children that were waited for
BESIDE = 8  # processes in a sandbox that are not the learner's: bubblewrap's own, and the one that waits
PERIOD = 0.1  # seconds between two looks
FIRST_TO_GO, LAST_TO_GO = 1000, 300  # oom_score_adj; all else on the machine has 0
# The names of a control group's files, in version 1 and 2.
NAMES = {
    1: {"limit": "memory.limit_in_bytes", "usage": "memory.usage_in_bytes", "killed": "memory.oom_control"},
    2: {"limit": "memory.max", "usage": "memory.current", "killed": "memory.events"},
}


def count_tree_seconds(pid: int) -> float:
    """CPU time of a process that is in no sandbox, and of what it has started; 0 once it has ended."""
    total = 0.0
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.Error):
                total += sum(process.cpu_times()[:4])  # its own, and that of children that were waited for
    return total


# --- control groups -------------------------------------------------------------------------------------------


@cache
def find_places() -> dict[str, Path]:
    """Controller → the folder in which this process can make control groups that have it; empty where it cannot.

    "unified" stands for all controllers of version 2.
    """
    try:
        found = _find_version_1() or _find_version_2()
        if found:
            for folder in set(found.values()):
                _sweep(folder)
            tried = ControlGroup(found, Limits())
            try:
                subprocess.run(["/bin/sh", "-c", f"{tried.enter} true"], check=True, stderr=subprocess.DEVNULL)
            finally:
                tried.close()
        return found
    except (OSError, subprocess.CalledProcessError):
        return {}


def _read_mounts(kind: str) -> list[tuple[str, Path, list[str]]]:
    """(what of the hierarchy is mounted, where, options) of each mount of a kind (/proc/PID/mountinfo, proc(5))."""
    mounts = []
    for line in (SELF / "mountinfo").read_text().splitlines():
        before, after = (part.split() for part in line.split(" - ", 1))
        if after[0] == kind:
            mounts.append((before[3], Path(before[4]), after[2].split(",")))
    return mounts


def _read_own_groups() -> dict[str, str]:
    """Controller → this process's own group in its hierarchy; "" stands for version 2."""
    lines = [line.split(":", 2) for line in (SELF / "cgroup").read_text().splitlines()]
    return {name: path for _, names, path in lines for name in names.split(",")}


def _find_folder(root: str, mount: Path, path: str) -> Path:
    return mount / os.path.relpath(path, root) if path.startswith(root) else mount


def _find_version_1() -> dict[str, Path]:
    own = _read_own_groups()
    found = {}
    for root, mount, options in _read_mounts("cgroup"):
        for name in ("memory", "pids", "cpu", "cpuacct"):
            if name in options and name in own:
                found[name] = _find_folder(root, mount, own[name])
    return found if found.keys() >= {"memory", "pids"} else {}


def _find_version_2() -> dict[str, Path]:
    """A group whose processes are counted may have no groups below it, so the new ones are beside this process's."""
    for root, mount, _ in _read_mounts("cgroup2"):
        folder = _find_folder(root, mount, _read_own_groups().get("", "/"))
        for above in [folder, *folder.parents]:
            if above.is_relative_to(mount):
                with suppress(OSError):
                    if {"memory", "pids"} <= set((above / "cgroup.subtree_control").read_text().split()):
                        return {"unified": above}
    return {}


def _sweep(folder: Path) -> None:
    """Removes what a grader that was killed has left here: groups named by it, and empty."""
    for group in folder.glob(f"{PREFIX}*"):
        if not Path(f"/proc/{group.name.split('-')[1]}").exists():
            with suppress(OSError):
                group.rmdir()


class ControlGroup:
    """A control group, in each hierarchy there is. `enter` is the shell's text that puts the shell into it."""

    def __init__(self, places: dict[str, Path], limits: Limits):
        name = f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        self.folders = {controller: place / name for controller, place in places.items()}
        self.unified = self.folders.get("unified")
        self.made = sorted(set(self.folders.values()))
        self.limit = limits.memory + limits.folder  # its files lie in memory too
        memory, pids = (self.unified or self.folders[controller] for controller in ("memory", "pids"))
        self.files = {use: memory / name for use, name in NAMES[2 if self.unified else 1].items()}
        # With swap, where it is counted; and in version 2 the whole of it is killed, not a part.
        more = {"memory.memsw.limit_in_bytes": self.limit, "memory.swap.max": 0, "memory.oom.group": 1}
        try:
            for folder in self.made:
                folder.mkdir()
            self.files["limit"].write_text(str(self.limit))
            for name, value in more.items():
                if (memory / name).exists():
                    (memory / name).write_text(str(value))
            (pids / "pids.max").write_text(str(limits.processes + BESIDE))
        except BaseException:
            self.close()
            raise

    @property
    def entrances(self) -> list[str]:
        """The files into which a process writes 0 to be in the group."""
        return [str(folder / "cgroup.procs") for folder in self.made]

    @property
    def enter(self) -> str:
        return " ".join(f"echo 0 >{shlex.quote(entrance)} &&" for entrance in self.entrances)

    def count_memory(self) -> int:
        return int(self.files["usage"].read_text())

    def count_cpu_seconds(self) -> float | None:
        if self.unified:
            return _read_numbers(self.unified / "cpu.stat")["usage_usec"] / 1e6
        if "cpuacct" in self.folders:
            return int((self.folders["cpuacct"] / "cpuacct.usage").read_text()) / 1e9
        return None

    def was_killed(self) -> bool:
        """Whether a process was killed as memory had ended, the group's or the machine's."""
        return _read_numbers(self.files["killed"]).get("oom_kill", 0) > 0

    def was_full(self) -> bool:
        """Whether the group has had all the memory that it may have."""
        if self.unified:
            return _read_numbers(self.files["killed"]).get("oom", 0) > 0
        return int((self.folders["memory"] / "memory.max_usage_in_bytes").read_text()) > 0.98 * self.limit

    def close(self) -> None:
        """Removes the group, whose processes have ended; the kernel of the system may need a moment to see that."""
        for folder in self.made:
            for _ in range(100):
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.01)
                else:
                    break


def _read_numbers(path: Path) -> dict[str, int]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return {name: int(value) for name, value in lines}


def make_control_group(limits: Limits) -> ControlGroup | None:
    """A new control group, where there can be one."""
    if find_places():
        with suppress(OSError):
            return ControlGroup(find_places(), limits)
    return None


# --- a sandbox's processes ------------------------------------------------------------------------------------


@cache
def find_machine_memory() -> int:
    """Bytes that all kernels share with everything else: the machine's, or this process's control group's."""
    least = psutil.virtual_memory().total
    folder = find_places().get("memory") or find_places().get("unified")
    for above in [folder, *folder.parents] if folder else []:
        for name in ("memory.limit_in_bytes", "memory.max"):
            with suppress(OSError, ValueError):
                least = min(least, int((above / name).read_text()))
    return least


class Group:
    """The processes of a sandbox, of which `pid` is one. `end` stops them all.

    A thread looks after them until the group is closed. `over` is the limit for which they were stopped; empty if they
    were not.
    """

    def __init__(self, pid: int, limits: Limits, control: ControlGroup | None, end: Callable[[], None]):
        self.limits = limits
        self.control = control
        self.end = end
        self.over = ""
        self.used = 0.0
        self.proc: int | None = os.open(f"/proc/{pid}/root/proc", os.O_RDONLY | os.O_DIRECTORY)
        self.reading = threading.RLock()  # it may be closed by one thread and asked by another
        WATCH.add(self)

    def close(self) -> None:
        """Closes the group, whose processes have all ended."""
        WATCH.drop(self)
        with self.reading:
            if self.proc is None:
                return
            self.count_cpu_seconds()
            self._find_why()
            os.close(self.proc)
            self.proc = None
            if self.control:
                self.control.close()

    def count_cpu_seconds(self) -> float:
        """CPU time that all processes have used so far. It never falls.

        Without a control group, of a process that has ended only as much as somebody has waited for.
        """
        with self.reading, suppress(OSError):
            if self.proc is not None:
                used = self.control.count_cpu_seconds() if self.control else None
                self.used = max(self.used, used if used is not None else self._count_ticks() / TICKS)
        return self.used

    def count_memory(self) -> int:
        """Bytes that all processes have; without a control group, of memory that they share each its part."""
        if self.control:
            return self.control.count_memory()
        processes = self._list_processes()
        resident = {process: self._read_resident(process) for process in processes}
        if sum(resident.values()) <= self.limits.memory:
            return sum(resident.values())
        return sum(self._read_share(process) or resident[process] for process in processes)

    def look(self) -> None:
        """Ends the processes if they are over a limit; else sets how soon they go when the machine's memory ends."""
        with self.reading:
            if self.proc is None or self.over:
                return
            memory = self.count_memory()
            if not self.control:
                self._count(memory)
            self._find_why()
            if self.over:
                self.end()
                return
            share = min(1.0, 2 * memory / find_machine_memory())
            score = str(round(LAST_TO_GO + share * (FIRST_TO_GO - LAST_TO_GO))).encode()
            for process in self._list_processes():
                self._write(process, "oom_score_adj", score)

    def _find_why(self) -> None:
        if self.control and not self.over:
            with suppress(OSError):
                if self.control.was_killed():
                    self.over = self._tell_too_much() if self.control.was_full() else "the machine had no memory left"

    def _count(self, memory: int) -> None:
        threads = sum(
            int(fields[THREADS]) for fields in map(self._read_stat, self._list_processes()) if len(fields) > THREADS
        )
        if memory > self.limits.memory:
            self.over = self._tell_too_much()
        elif threads > self.limits.processes + BESIDE:
            self.over = f"more than {self.limits.processes} processes and threads"

    def _tell_too_much(self) -> str:
        return f"more than {self.limits.memory // MB} MB of memory in all its processes"

    def _count_ticks(self) -> int:
        return sum(sum(map(int, self._read_stat(process)[UTIME : UTIME + 4])) for process in self._list_processes())

    def _read_stat(self, process: str) -> list[bytes]:
        """The fields after the process's name in its stat."""
        return self._read(process, "stat").rpartition(b")")[2].split()

    def _read_resident(self, process: str) -> int:
        return int((self._read(process, "statm").split() or [b"0", b"0"])[1]) * PAGE

    def _read_share(self, process: str) -> int:
        """Its memory, of what it shares its part; 0 where it does not show that."""
        for line in self._read(process, "smaps_rollup").splitlines():
            if line.startswith(b"Pss:"):
                return int(line.split()[1]) * 1024
        return 0

    def _list_processes(self) -> list[str]:
        return [name for name in os.listdir(self.proc) if name.isdigit()]

    def _read(self, process: str, name: str) -> bytes:
        """A file of a process's in /proc; nothing where the process has ended, or does not show it."""
        with suppress(OSError), open(os.open(f"{process}/{name}", os.O_RDONLY, dir_fd=self.proc), "rb") as file:
            return file.read()
        return b""

    def _write(self, process: str, name: str, value: bytes) -> None:
        with suppress(OSError), open(os.open(f"{process}/{name}", os.O_WRONLY, dir_fd=self.proc), "wb") as file:
            file.write(value)


class Watch:
    """A thread that looks after groups while there are any."""

    def __init__(self):
        self.groups: set[Group] = set()
        self.changing = threading.Lock()
        self.thread: threading.Thread | None = None

    def add(self, group: Group) -> None:
        with self.changing:
            self.groups.add(group)
            if self.thread is None or not self.thread.is_alive():  # a forked process has not its parent's threads
                self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
                self.thread.start()

    def drop(self, group: Group) -> None:
        with self.changing:
            self.groups.discard(group)

    def _run(self) -> None:
        while True:
            with self.changing:
                groups = list(self.groups)
                if not groups:
                    self.thread = None
                    return
            for group in groups:
                with suppress(OSError):
                    group.look()
            time.sleep(PERIOD)


WATCH = Watch()
