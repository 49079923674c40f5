"""What code in a sandbox can see and touch: its own folder and the libraries, and nothing else."""

import os
import platform
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from box import LIMITS, SANDBOX, gone, printed, running

from autograder.execute import Step, execute
from autograder.kernels import sandbox, seccomp
from autograder.layout import ROOT

EVERYTHING = """
import os
skipped = {{"/proc", "/sys", "/dev", "/usr", *{pythons}}}
for folder, folders, files in os.walk("/"):
    folders[:] = [name for name in folders if os.path.join(folder, name) not in skipped]
    for name in files:
        print(os.path.join(folder, name))
"""
TRY = """
import errno
def attempt(what):
    try:
        return what()
    except OSError as error:
        return errno.errorcode[error.errno]
"""


def test_nothing_of_the_disk_but_the_libraries_is_seen(run):
    """Neither solutions/ nor tests/, build/, a gradebook, a submission or a home folder: the list is the whole disk."""
    pythons = [str(path) for path in sandbox.find_pythons()]
    seen = printed(run(EVERYTHING.format(pythons=pythons))[0]).split("\n")
    shown = (f"{ROOT}/llm40/", f"{ROOT}/autograder/judge/", *sandbox.SETTINGS, "/tmp/")
    strange = [path for path in filter(None, seen) if not path.startswith(shown)]
    assert strange == []
    assert any(path.startswith(f"{ROOT}/llm40/") for path in seen)
    own = [path for path in seen if path.startswith("/tmp/") and not path.startswith((f"{ROOT}/", *pythons))]
    assert all(path.startswith(("/tmp/llm40-", "/tmp/home/")) for path in own)


@pytest.mark.parametrize("place", ["solutions", "tests", "build", "course", "autograder/grading", ".git"])
def test_no_other_folder_of_the_project(run, place):
    assert printed(run(f"import os; print(os.path.exists({str(ROOT / place)!r}))")[0]) == "False\n"


def test_no_file_of_ours_under_a_name_that_is_known(run, tmp_path):
    (tmp_path / "gradebook.db").write_text("grades")
    home = Path.home() / ".bashrc"
    paths = [str(path) for path in (tmp_path, home, "/etc/passwd", "/etc/shadow", "/var", "/home", "/run", "/mnt")]
    assert printed(run(f"import os; print([path for path in {paths} if os.path.exists(path)])")[0]) == "[]\n"


def test_nothing_of_our_environment(run, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    everywhere = """
    import glob, os
    found = [str(dict(os.environ))]
    for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline"):
        try:
            found.append(open(path).read())
        except PermissionError:
            pass
    print(len(found) > 2, "hunter2" in "".join(found), sorted(os.environ))
    """
    told = printed(run(everywhere.replace("\n    ", "\n"))[0])
    assert told.startswith("True False")
    assert "AWS" not in told
    assert "'HOME'" in told


def test_nothing_of_us_is_open(run):
    """The file descriptors that a kernel has: its own sockets, and /dev/null."""
    links = printed(
        run(
            "import os\nfor n in os.listdir('/proc/self/fd'):\n    try:\n        "
            "print(os.readlink(f'/proc/self/fd/{n}'))\n    except OSError:\n        pass"
        )[0]
    )
    kinds = {link for link in links.split() if not link.startswith(("socket:", "anon_inode:", "pipe:", "/proc/"))}
    assert kinds <= {"/dev/null"}


def test_no_process_but_its_own(run):
    told = printed(
        run(f"""{TRY}
import os
print(len([name for name in os.listdir("/proc") if name.isdigit()]))
print(attempt(lambda: os.kill({os.getpid()}, 0)))
""")[0]
    ).split()
    assert int(told[0]) <= 3  # bubblewrap's, the idle one, the kernel
    assert told[1] == "ESRCH"


def test_what_is_shown_of_the_system_can_be_read(run):
    """By the sandbox's user too, who is not the one that made the folders above."""
    shown = [path for path in [*sandbox.SETTINGS, "/sys/devices/system"] if os.path.exists(path)]
    assert printed(run(f"import os; print([p for p in {shown} if not os.access(p, os.R_OK)])")[0]) == "[]\n"
    lists = f"import os; print([p for p in {shown} if os.path.isdir(p) and not os.listdir(p)], os.cpu_count())"
    assert printed(run(lists)[0]) == f"[] {os.cpu_count()}\n"


@pytest.mark.parametrize("call", ["clone", "clone3", "unshare"])
def test_no_user_namespace(run, call):
    """In one of its own a learner would be root, and could mount a folder of any size; nor by a program's help."""
    number = seccomp.MACHINES[platform.machine()][1][call]
    flags = seccomp.NEW_USER | (17 if call == "clone" else 0)  # 17 is SIGCHLD
    arguments = "ctypes.byref(wanted), 88" if call == "clone3" else f"{flags}, 0"
    told = printed(
        run(f"""
import ctypes, errno, os, subprocess, threading
libc = ctypes.CDLL(None, use_errno=True)
wanted = (ctypes.c_uint64 * 11)({seccomp.NEW_USER}, 0, 0, 0, 17)
made = libc.syscall({number}, {arguments}, 0, 0, 0)
if made == 0 and {call!r} != "unshare":
    os._exit(0)
print(made, errno.errorcode[ctypes.get_errno()])
print(subprocess.run(["unshare", "-Ur", "true"], stderr=-3).returncode != 0)
thread = threading.Thread(target=subprocess.run, args=(["true"],))  # what is no namespace goes on
thread.start(); thread.join()
""")[0]
    ).split()
    assert told == ["-1", "ENOSYS" if call == "clone3" else "EPERM", "True"]


def test_every_place_that_can_be_written_is_limited(run):
    """Each mount in which a learner can make a file lies in memory, and has the folder's size at most."""
    places = printed(
        run(
            f"""{TRY}
import os
for line in open("/proc/self/mountinfo"):
    place, kind = line.split()[4], line.split(" - ")[1].split()[0]
    for folder, _, _ in os.walk(place) if kind not in ("proc", "sysfs") else ():
        if folder == place or os.stat(folder).st_dev == os.stat(place).st_dev:
            if isinstance(attempt(lambda: open(folder + "/written", "w")), str):
                continue
            size = os.statvfs(folder)
            print(kind, size.f_blocks * size.f_frsize, folder)
            break
""",
            limits=replace(LIMITS, cell=60, folder=30 * 2**20),
        )[0]
    )
    told = [place.split(maxsplit=2) for place in places.splitlines()]
    assert {place for _, _, place in told} >= {"/tmp", "/dev/shm"}
    assert [place for kind, size, place in told if kind != "tmpfs" or int(size) > 30 * 2**20] == []


def test_no_rights(run):
    told = printed(
        run(f"""{TRY}
import ctypes, os
print([line for line in open("/proc/self/status") if line.startswith(("CapPrm", "CapEff", "CapBnd", "NoNewPrivs"))])
print(attempt(lambda: os.setuid(0)), attempt(lambda: os.chroot("/tmp")), attempt(lambda: os.mknod("/tmp/a", 8576, 5)))
libc = ctypes.CDLL(None)
print(libc.mount(b"none", b"/usr", None, 32 | 4096, None), libc.umount2(b"/usr", 2), libc.setns(0, 0))
""")[0]
    )
    rights, calls, mounts, _ = told.split("\n")
    assert "CapPrm:\\t0000000000000000" in rights
    assert "CapEff:\\t0000000000000000" in rights
    assert "NoNewPrivs:\\t1" in rights
    assert set(calls.split()) <= {"EPERM", "EINVAL"}
    assert mounts == "-1 -1 -1"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become another user")
def test_a_user_of_its_own(run):
    ask = "import os; print(os.getuid(), os.getgid(), os.getgroups())"
    first, second = printed(run(ask)[0]), printed(run(ask)[0])
    assert int(first.split()[0]) >= sandbox.USERS
    assert first.split()[2] == "[]"
    assert first != second


def test_no_network(run):
    """Not even this machine: neither its loopback, nor an abstract socket; and no name is resolved."""
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0llm40-test-{os.getpid()}")
        abstract.listen()
        socket.create_connection(tcp.getsockname()).close()  # from here it can be reached
        told = printed(
            run(f"""{TRY}
import socket
print(attempt(lambda: socket.create_connection({tcp.getsockname()!r}, 2)))
print(attempt(lambda: socket.socket(socket.AF_UNIX).connect({abstract.getsockname().decode()!r})))
print(attempt(lambda: socket.create_connection(("192.0.2.1", 80), 2)))
try:
    print(socket.getaddrinfo("pypi.org", 443))
except socket.gaierror:
    print("no such name")
""")[0]
        )
    assert told.split("\n")[:4] == ["ECONNREFUSED", "ECONNREFUSED", "ENETUNREACH", "no such name"]


def test_its_own_loopback_is_there(run):
    """torch.distributed needs one."""
    assert (
        printed(
            run("""
import socket
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname())
print("ok")
""")[0]
        )
        == "ok\n"
    )


def test_the_environment_cannot_be_written(run):
    """Neither this Python nor llm40: the next learner's kernel reads them too."""
    import numpy

    ours = [sys.prefix, sys.base_prefix, str(Path(numpy.__file__).parent), str(ROOT / "llm40"), str(ROOT)]
    places = [*ours, "/", "/usr", "/etc", "/dev", "/proc/sys/kernel", "/proc/1", "/root", "/home", "/var"]
    told = printed(
        run(f"""{TRY}
import os, sys
for place in {places}:
    print(attempt(lambda: open(place + "/written", "w")))
print(attempt(lambda: open(os.path.realpath(sys.executable), "ab")), attempt(lambda: open("/proc/self/exe", "ab")))
print(attempt(lambda: os.chmod({str(ROOT / "llm40")!r}, 0o777)), attempt(lambda: os.rename("/usr/bin", "/usr/x")))
""")[0]
    )
    assert set(told.split()) <= {"EROFS", "EACCES", "EPERM", "ENOENT", "ETXTBSY", "EXDEV"}, told
    assert not (ROOT / "llm40" / "written").exists()


def test_a_warm_process_gives_nothing_on():
    """What one kernel did, in its modules, its folder or its environment, is not in the next."""
    spoil = Step("import os, calendar; calendar.x = 1; os.environ['SPOILT'] = '1'; open('/tmp/left', 'w').close()")
    look = Step("import os, calendar; print(hasattr(calendar, 'x'), os.environ.get('SPOILT'), os.listdir('/tmp'))")
    execute([spoil], LIMITS, managers=SANDBOX["forked"])
    told = printed(execute([look], LIMITS, managers=SANDBOX["forked"])[0])
    assert told.startswith("False None")
    assert "left" not in told


def test_kernels_at_work_side_by_side_cannot_touch_each_other():
    """One kills all that it can; the other, forked from the same process, goes on."""
    other = []
    patient = [Step("import time; open('/tmp/mine', 'w').close(); time.sleep(3); print('here')")]
    thread = threading.Thread(target=lambda: other.extend(execute(patient, LIMITS, managers=SANDBOX["forked"])))
    thread.start()
    killer = Step("import os, time; time.sleep(1); print(os.path.exists('/tmp/mine')); os.kill(-1, 9); time.sleep(9)")
    killed = execute([killer], LIMITS, managers=SANDBOX["forked"])[0]
    thread.join()
    assert printed(other[0]) == "here\n"
    assert killed.status == "died"


def test_what_runs_in_the_background_ends_with_the_kernel(run):
    """However well it hides: in a session of its own, its parent gone."""
    word = f"86{os.getpid()}.5"
    hide = f"import os; os.system('(setsid nohup sleep {word} >/dev/null 2>&1 &)')"
    count = f"import os, time; time.sleep(0.3); print(os.popen('ps ax').read().count('sleep {word}'))"
    assert printed(run(hide, count)[1]) == "1\n"
    assert gone(word)


def test_a_killed_grader_takes_everything_along():
    """SIGKILL, so that no code of ours can clean up."""
    word = f"87{os.getpid()}.5"
    program = (
        "from autograder.execute import Step, execute\n"
        "from autograder.kernels.manager import Kernels\n"
        f'execute([Step(\'import subprocess; subprocess.run(["sleep", "{word}"])\')], managers=Kernels(libraries=()))'
    )
    with subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}) as grader:
        while not [pid for pid in running(word) if int(pid) != grader.pid]:
            assert grader.poll() is None
        grader.kill()
    assert gone(word)


def test_limits_are_settable(run):
    ask = """
import resource, os
print([resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1] for name in ("NPROC", "FSIZE", "CORE")])
print(max(resource.getrlimit(resource.RLIMIT_AS)[1], resource.getrlimit(resource.RLIMIT_DATA)[1]))
folder = os.statvfs("/tmp")
print(folder.f_blocks * folder.f_frsize)
"""
    limits = replace(LIMITS, processes=77, file=12345, memory=3 * 10**9, folder=4096 * 1000)
    told = printed(run(ask, limits=limits)[0]).split("\n")
    assert told[0] == "[77, 12345, 0]"
    assert told[2] == "4096000"
    if not sandbox.find_gpus(dict(os.environ)):
        assert told[1] in ("3000000000", "-1")
