"""Folders and exit codes, the engine, repeatability."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import nbformat
import pytest
import tiny
from typer.testing import CliRunner

from autograder.cli import app
from autograder.execute import Limits
from autograder.grading import grade as module
from autograder.grading.engine import run_tasks
from autograder.grading.grade import CannotGrade, find_class, grade_class
from autograder.grading.masters import make_sent_master, read_masters
from autograder.grading.pages import UNSAFE
from autograder.grading.task import Result, Task, grade_task
from autograder.kernels.limits import MB
from autograder.kernels.manager import Kernels

pytestmark = pytest.mark.xdist_group("grading")


@pytest.fixture
def lessons(tmp_path):
    return read_masters(tiny.build(tmp_path))


def task(notebook, student="mei", kernels=tiny.KERNELS) -> Task:
    master = nbformat.writes(make_sent_master(tiny.master())).encode()
    limits = Limits(cell=5, notebook=30)
    return Task(student, tiny.STAGE, tiny.LESSON, tiny.dumps(notebook), master, limits, kernels=kernels)


# --- what is found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.write_text("x"), "a file, not a folder or a zip archive"),
        (lambda path: path.mkdir(), "found nothing"),
        (lambda path: tiny.hand_in(path, "", tiny.dumps(tiny.stub())), "found stage9_tiny/99_tiny.ipynb"),
    ],
)
def test_wrong_usage_says_what_was_expected_and_found(tmp_path, lessons, make, words):
    make(tmp_path / "class")
    with pytest.raises(CannotGrade, match=f"expected SUBMITTED/<student>/<stage>/<lesson>.ipynb.*{words}|{words}"):
        find_class(tmp_path / "class", lessons, None, None)


def test_no_notebook_of_the_course(tmp_path, lessons):
    tiny.hand_in(tmp_path / "class", "mei", b"{}", lesson="homework")
    with pytest.raises(CannotGrade, match=r"found mei/stage9_tiny/homework.ipynb → mei: not placed \(the file is JSON"):
        find_class(tmp_path / "class", lessons, None, None)


def test_one_lesson_one_student(tmp_path, lessons):
    folder = tmp_path / "class"
    tiny.hand_in(folder, "ann", b"1")
    tiny.hand_in(folder, "bob", b"2")
    for lesson in ("99", "99_tiny", None):
        handed, _ = find_class(folder, lessons, lesson, "bob")
        assert [h.student for h in handed] == ["bob"]
    with pytest.raises(CannotGrade, match='no lesson "7"'):
        find_class(folder, lessons, "7", None)
    with pytest.raises(CannotGrade, match='no student "eve"'):
        find_class(folder, lessons, None, "eve")


# --- exit codes -----------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The project's folder, with the tiny lesson as its only one."""
    tiny.build(tmp_path / "build")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def test_exit_0_when_everyone_has_an_answer(project):
    tiny.hand_in(project / "class", "broken", b"{")
    assert grade_class(project / "class", project / "out", jobs=1, unsafe=tiny.UNSAFE) == 0


def test_exit_2_for_wrong_usage(project, capsys):
    assert grade_class(project / "nowhere", project / "out") == 2
    assert "there is no such folder; expected SUBMITTED/<student>/<stage>/<lesson>.ipynb" in capsys.readouterr().err
    assert not (project / "out").exists()


def no_kernel(limits):
    raise OSError("no kernels today")


def test_exit_3_when_the_grader_fails(project, capsys):
    """What is our trouble costs the learner no points: there is no score, and the exit code says so."""
    tiny.hand_in(project / "class", "ann", b"{")
    tiny.hand_in(project / "class", "bob", tiny.dumps(tiny.answered()))

    def engine(tasks, jobs):
        return run_tasks((replace(t, kernels=no_kernel) for t in tasks), jobs)

    assert grade_class(project / "class", project / "out", jobs=1, engine=engine, unsafe=tiny.UNSAFE) == 3
    rows = (project / "out" / "grades.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[6] for row in rows[1:]] == ["unreadable", "fault"]
    assert "The grader failed on bob 99_tiny" in capsys.readouterr().err


# --- the sandbox ----------------------------------------------------------------------------------------------


def test_without_a_sandbox_nothing_is_graded(project, capsys, monkeypatch):
    monkeypatch.setattr(module, "find_sandbox_trouble", lambda: "bwrap is not installed: apt install bubblewrap")
    tiny.hand_in(project / "class", "ann", tiny.dumps(tiny.answered()))
    assert grade_class(project / "class", project / "out", jobs=1) == 2
    said = capsys.readouterr().err
    assert "Nothing graded: bwrap is not installed: apt install bubblewrap" in said
    assert "--unsafe" in said
    assert not (project / "out").exists()


def test_unsafe_is_said_everywhere(project, capsys, monkeypatch):
    monkeypatch.setattr(module, "find_sandbox_trouble", lambda: "bwrap is not installed: apt install bubblewrap")
    tiny.hand_in(project / "class", "ann", tiny.dumps(tiny.answered()))
    assert grade_class(project / "class", project / "out", jobs=1, unsafe=True) == 0
    assert capsys.readouterr().out.count(UNSAFE) == 2
    for page in ("report.html", f"feedback/ann/{tiny.STAGE}/{tiny.LESSON}.html"):
        assert UNSAFE in (project / "out" / page).read_text(encoding="utf-8")


def test_limits_of_the_command_line(monkeypatch):
    given = {}
    monkeypatch.setattr(module, "grade_class", lambda **options: given.update(options) or 0)
    options = "--cell-seconds 5 --notebook-seconds 50 --memory 2000 --processes 99 --file-size 7 --folder-size 8"
    assert CliRunner().invoke(app, ["grade", *options.split(), "--unsafe"]).exit_code == 0
    limits = Limits(cell=5, notebook=50, memory=2000 * MB, processes=99, file=7 * MB, folder=8 * MB)
    assert (given["limits"], given["unsafe"]) == (limits, True)
    assert CliRunner().invoke(app, ["grade"]).exit_code == 0
    assert (given["limits"], given["unsafe"]) == (Limits(), False)


# --- the engine -----------------------------------------------------------------------------------------------


def lose_the_worker(limits):
    os.kill(os.getpid(), signal.SIGKILL)


def lose_the_worker_once(marker: Path, limits):
    if not marker.exists():
        marker.touch()
        lose_the_worker(limits)
    return tiny.KERNELS(limits)


def test_a_fault_of_ours_is_a_result():
    result = grade_task(task(tiny.stub(), kernels=no_kernel))
    assert result.status == "fault"
    assert "no kernels today" in result.flags[0]
    assert "Traceback" in result.traceback


def test_lost_workers(tmp_path):
    """One that is lost once is repeated; one that is lost again has its own answer; the others never notice."""
    tasks = [
        task(tiny.stub(), "once", kernels=partial(lose_the_worker_once, tmp_path / "marker")),
        task(tiny.stub(), "always", kernels=lose_the_worker),
        task(tiny.stub(), "never"),
    ]
    results = {result.student: result for result in run_tasks(iter(tasks), 2)}
    assert {who: r.status for who, r in results.items()} == {"once": "graded", "always": "fault", "never": "graded"}
    assert "lost again and again" in results["always"].flags[0]


OUTSIDE = Kernels(sandbox=False, libraries=())  # it writes down where it is


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interrupt_ends_the_workers(tmp_path):
    """What Ctrl-C does: the endless kernels are gone in seconds, and their folders too."""
    began = time.monotonic()
    endless = f"open({str(tmp_path / 'started')!r}, 'w').write(os.getcwd() + ' ' + str(os.getpid()))\nwhile True: pass"
    slow = task(tiny.with_cells(tiny.answered(), ("double", tiny.added(f"import os\n{endless}"))), kernels=OUTSIDE)
    running = run_tasks(iter([replace(slow, limits=Limits(cell=60))]), 1)

    def interrupt():
        while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
            time.sleep(0.05)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            next(running)
    finally:
        signal.signal(signal.SIGUSR1, before)
    folder, process = (tmp_path / "started").read_text().split()
    while alive(int(process)) or Path(folder).exists():
        assert time.monotonic() < began + 40, "the kernel is still there"
        time.sleep(0.1)


# --- repeatability --------------------------------------------------------------------------------------------

DRAWS = """
import os
def half(x):
    return {"seed": os.environ["LLM40_SEED"], "hash": hash("a word")}
"""


def drawn(result: Result) -> str:
    """What the last cell of the executed notebook printed."""
    cells = nbformat.reads(result.notebook.decode(), as_version=4).cells
    return next(cell for cell in cells if cell.source == "print(half(0))").outputs[0].text


def test_a_learner_sees_nothing_of_the_seed():
    notebook = tiny.answered(half=DRAWS)
    notebook.cells.append(tiny.added("print(half(0))"))
    first, again, other = (drawn(grade_task(replace(task(notebook), seed=seed))) for seed in (1, 1, 2))
    assert "'seed': '40'" in first
    assert first == again == other


def test_a_seed_reaches_the_checks():
    master = make_sent_master(tiny.master())
    check = master.cells[tiny.find(master, "half-check-1")]
    check.source = "from llm40 import checks\nraise AssertionError(f'seed {checks.seed()}')"
    given = replace(task(tiny.answered()), master=nbformat.writes(master).encode())
    said = [[c.message for c in grade_task(replace(given, seed=seed)).checks if c.message] for seed in (1, 1, 2)]
    assert said[0] == said[1] == ["seed 1"] != said[2]


def test_the_reference_never_leaves_the_master():
    """Neither the task that travels to a kernel nor a notebook rebuilt from an empty one holds an answer."""
    sent = task(tiny.stub()).master.decode()
    assert "return x / 2" not in sent
    assert "Because." not in sent
    empty = nbformat.v4.new_notebook()
    assert b"return x / 2" not in grade_task(task(empty)).notebook


# --- where it runs --------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs is Linux's")
@pytest.mark.parametrize("filled", [0, 500_000, 900_000, 1_048_576])
def test_a_full_disk_is_a_sentence_and_loses_nothing(project, small_disk, capsys, filled):
    """Wherever the room ends: in the gradebook, in the notebooks or in the tables."""
    for number in range(8):
        notebook = tiny.answered(half=f"{tiny.HALF}print('{'long ' * 20_000}')\n")
        tiny.hand_in(project / "class", f"s{number}", tiny.dumps(notebook))
    (small_disk / "filler").write_bytes(b"x" * filled)

    def in_this_process(tasks, jobs):
        return map(grade_task, tasks)

    given = {"engine": in_this_process, "unsafe": tiny.UNSAFE}
    assert grade_class(project / "class", small_disk / "out", **given) == 3
    said = capsys.readouterr().err
    assert "Stopped, the disk is full" in said
    assert "Traceback" not in said
    assert not list(small_disk.rglob(".tmp-*"))
    for page in small_disk.rglob("*.html"):
        assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert grade_class(project / "class", small_disk / "out", **given) == 0
    rows = (small_disk / "out" / "grades.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[3] for row in rows[1:]] == ["8"] * 8


def test_names_on_a_terminal_that_is_not_utf8(project):
    """Whatever the terminal's encoding, the class is graded and the files are UTF-8."""
    tiny.hand_in(project / "class", "李雷", b"{")
    code = (
        "import sys; from autograder.grading import grade; grade.ROOT = grade.Path(sys.argv.pop(1)); "
        "from autograder.cli import app; app()"
    )
    command = [
        sys.executable,
        "-c",
        code,
        str(project),
        "grade",
        "--submitted",
        str(project / "class"),
        "--out",
        str(project / "out"),
        "--jobs",
        "1",
        "--verbose",
        *(["--unsafe"] if tiny.UNSAFE else []),
    ]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"\\u674e\\u96f7" in done.stdout
    assert "李雷" in (project / "out" / "grades.csv").read_text(encoding="utf-8")
    assert b"handed in as \\u674e\\u96f7/stage9_tiny/99_tiny.ipynb" in done.stderr  # the log


def test_a_home_folder_in_quotes(project, monkeypatch):
    """`make grade SUBMITTED=~/class` puts quotes around it, and the shell then leaves it as it is."""
    given = {}
    monkeypatch.setattr(module, "grade_class", lambda **options: given.update(options) or 0)
    options = "--submitted ~/class --out ~/grades --late ~/late.py"
    assert CliRunner().invoke(app, ["grade", *options.split()]).exit_code == 0
    assert [given[name] for name in ("submitted", "out", "late")] == [
        Path.home() / name for name in ("class", "grades", "late.py")
    ]


def test_the_log_has_a_line_for_each_step(project, caplog):
    tiny.hand_in(project / "class", "mei", tiny.dumps(tiny.answered(half="def half(x):\n    return x // 2\n")))
    with caplog.at_level("INFO", "autograder.grading"):
        grade_class(
            project / "class",
            project / "out",
            jobs=1,
            engine=lambda tasks, jobs: map(grade_task, tasks),
            unsafe=tiny.UNSAFE,
        )
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "mei 99_tiny: handed in as mei/stage9_tiny/99_tiny.ipynb"
    assert "mei 99_tiny half-check-1: failed, 0 of 2: half(…) must be …: did you divide with //?" in said
    assert said[-1] == "mei 99_tiny: graded, 6 of 10"
