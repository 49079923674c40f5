"""What learners hand in, right, wrong, odd and broken: each costs nothing but itself.

The whole class is graded once, with real kernels, and each test looks at one student.
"""

import csv

import nbformat
import pytest
import tiny

from autograder.execute import Limits
from autograder.grading.grade import grade_folder

pytestmark = pytest.mark.xdist_group("grading")
LIMITS = Limits(cell=3, notebook=60, grace=1)

STUBBORN = """
def double(x):
    import time
    while True:
        try:
            time.sleep(0.05)
        except KeyboardInterrupt:
            x += 1
"""


def v3():
    return nbformat.writes(nbformat.convert(tiny.answered(), 3), version=3).encode()


def without(*labels):
    notebook = tiny.answered()
    for label in labels:
        del notebook.cells[tiny.find(notebook, label)]
    return notebook


def edited():
    notebook = tiny.answered(double="def double(x):\n    return 0\n")
    notebook.cells[tiny.find(notebook, "double-check-1")].source = "pass"
    notebook.cells[tiny.find(notebook, "code-imports")].source = "import math\nOFFSET = 99"
    return notebook


def duplicated():
    """The exercise copied with its metadata: first a wrong try, then the right one."""
    notebook = tiny.answered(half="def half(x):\n    return x // 2\nFIRST_TRY = True\n")
    place = tiny.find(notebook, "half")
    again = tiny.answered().cells[place]
    again.id = "another"
    again.source = tiny.HALF + "\nassert FIRST_TRY"
    notebook.cells.insert(place + 1, again)
    check = tiny.find(notebook, "half-check-1")
    notebook.cells.insert(check, notebook.cells[check])
    return notebook


def retyped():
    notebook = tiny.answered(answer_why="Halving is dividing by two.")
    for label, kind in (("double", "markdown"), ("half-check-1", "markdown"), ("answer-why", "code")):
        notebook.cells[tiny.find(notebook, label)].cell_type = kind
    return notebook


def own_cells():
    """The answer uses what an added cell above it defines; an added cell that fails harms nobody."""
    notebook = tiny.answered(half="def half(x):\n    return x * FACTOR\n")
    return tiny.with_cells(
        notebook,
        ("half", tiny.added("FACTOR = 1 / 2")),
        ("half", tiny.added("my own note", "markdown")),
        ("total", tiny.added("1 / 0")),
    )


FLOOD = "for i in range(60):\n    print('a' * 1_000_000)"
WARNS = """
import sys, warnings
def half(x):
    warnings.warn('old')
    print('!', file=sys.stderr)
    return x / 2
"""

CLASS = {
    "right": tiny.dumps(tiny.answered()),
    "stub": tiny.dumps(tiny.stub()),
    "wrong": tiny.dumps(tiny.answered(half="def half(x):\n    return x // 2\n")),
    "broken syntax": tiny.dumps(tiny.answered(half="def half(x)\n    return x / 2\n")),
    "corrupt": tiny.dumps(tiny.answered())[:700],
    "empty": b"",
    "nul": b"\0" * 300,
    "json": b'{"a": 1}',
    "list": b"[1, 2]",
    "picture": b"\x89PNG\r\n\x1a\n\xff\xfe\x00",
    "deep": b"[" * 100_000,
    "bom": b"\xef\xbb\xbf" + tiny.dumps(tiny.answered()),
    "utf16": tiny.dumps(tiny.answered()).decode().encode("utf-16"),
    "latin1": tiny.dumps(tiny.answered(half="# caf\xe9\n" + tiny.HALF))
    .decode()
    .replace("·", "-")
    .replace("●", "*")
    .replace("○", "o")
    .encode("latin-1"),
    "some nul": tiny.dumps(tiny.answered()).replace(b"A tiny", b"A\0tiny"),
    "crlf": tiny.dumps(tiny.answered()).replace(b"\\n", b"\\r\\n").replace(b"\n", b"\r\n"),
    "v3": v3(),
    "surrogate": tiny.dumps(tiny.answered()).replace(b"def half", b"S = '\\\\ud800'  # \\ud800\\ndef half"),
    "deleted": tiny.dumps(without("double-check-1", "half", "code-imports")),
    "edited": tiny.dumps(edited()),
    "duplicated": tiny.dumps(duplicated()),
    "retyped": tiny.dumps(retyped()),
    "own cells": tiny.dumps(own_cells()),
    "stripped": tiny.dumps(tiny.stripped(tiny.answered(half=tiny.HALF, answer_why="Half of it."))),
    "endless": tiny.dumps(tiny.answered(double="def double(x):\n    while True:\n        pass\n")),
    "stubborn": tiny.dumps(tiny.answered(double=STUBBORN, half=tiny.HALF)),
    "exit": tiny.dumps(tiny.answered(double="import os\ndef double(x):\n    os._exit(0)\n")),
    "exit at once": tiny.dumps(tiny.answered(double="import os\nos._exit(0)\n")),
    "segfault": tiny.dumps(tiny.answered(double="import faulthandler\ndef double(x):\n    faulthandler._sigsegv()\n")),
    "sigkill": tiny.dumps(
        tiny.answered(double="import os, signal\ndef double(x):\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    ),
    "sys.exit": tiny.dumps(tiny.answered(half="import sys\ndef half(x):\n    sys.exit(0)\n")),
    "quit": tiny.dumps(tiny.with_cells(tiny.answered(), ("half", tiny.added("exit()")))),
    "flood": tiny.dumps(tiny.with_cells(tiny.answered(), ("half", tiny.added(FLOOD)))),
    "one big line": tiny.dumps(tiny.answered(half=tiny.HALF + "print('b' * 60_000_000)\n")),
    "nan": tiny.dumps(tiny.answered(half="def half(x):\n    print(float('nan'))\n    return float('nan')\n")),
    "warning": tiny.dumps(tiny.answered(half=WARNS)),
    "shadow": tiny.dumps(
        tiny.with_cells(tiny.answered(), ("code-imports", tiny.added("open('math.py', 'w').write('raise SystemExit')")))
    ),
    "markup": tiny.dumps(tiny.answered(half="def half(x):\n    raise ValueError('<script>alert(1)</script>')\n")),
    "李雷 =1+2": tiny.dumps(tiny.answered()),
    "=cmd()": tiny.dumps(tiny.answered()),
}


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a class 班级")
    for student, data in CLASS.items():
        tiny.hand_in(folder / "handed in", student, data)
    lines = []
    results = grade_folder(
        folder / "handed in",
        folder / "out",
        tiny.build(folder),
        jobs=2,
        limits=LIMITS,
        show=lines.append,
        kernels=tiny.KERNELS,
    )
    return folder / "out", {result.student: result for result in results}, "\n".join(lines)


@pytest.fixture
def of(graded):
    """(result, scores by check, messages by check, flags in one text) of a student."""

    def look(student):
        result = graded[1][student]
        scores = {check.check: check.score for check in result.checks}
        messages = {check.check: check.message for check in result.checks}
        return result, scores, messages, "\n".join(result.flags)

    return look


FULL = {"double-check-1": 2, "double-check-2": 1, "half-check-1": 2, "total-check-1": 3, "answer-why": 0}
NONE = dict.fromkeys(FULL, 0)


def test_every_student_has_an_answer(graded):
    assert set(graded[1]) == set(CLASS)
    assert [r.student for r in graded[1].values() if r.status == "fault"] == []


def test_right(of):
    result, scores, messages, flags = of("right")
    assert (scores, flags, result.status, result.max_score) == (FULL, "", "graded", 10)
    assert not any(messages.values())


def test_stub(of):
    result, scores, messages, flags = of("stub")
    assert (scores, flags, result.status) == (NONE, "", "graded")
    assert messages["half-check-1"] == "not written yet"


def test_wrong_costs_only_its_check_and_says_why(of):
    _, scores, messages, _ = of("wrong")
    assert scores == FULL | {"half-check-1": 0}
    assert messages["half-check-1"] == "half(…) must be …: did you divide with //?"  # its hidden tests


def test_syntax_error_is_named(of):
    _, scores, messages, _ = of("broken syntax")
    assert scores == FULL | {"half-check-1": 0}
    assert messages["half-check-1"].startswith("the cell of the exercise itself failed: SyntaxError: expected ':'")


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ("corrupt", "not valid JSON"),
        ("empty", "the file is empty"),
        ("nul", "NUL"),
        ("json", "not a notebook"),
        ("list", "not a notebook"),
        ("picture", "not"),
        ("deep", "nested too deeply"),
    ],
)
def test_unreadable(of, student, words):
    result, scores, messages, flags = of(student)
    assert (result.status, scores, result.max_score) == ("unreadable", NONE, 10)
    assert words in flags
    assert words in messages["double-check-1"]


@pytest.mark.parametrize(
    ("student", "words"),
    [
        ("bom", "byte-order mark"),
        ("latin1", "latin-1"),
        ("some nul", "NUL bytes"),
        ("v3", "notebook format 3"),
        ("utf16", "utf-16"),
        ("crlf", ""),
        ("surrogate", ""),
    ],
)
def test_odd_files_are_read(of, student, words):
    result, scores, _, flags = of(student)
    assert (result.status, scores) == ("graded", FULL)
    assert words in flags
    assert bool(flags) == bool(words)


def test_deleted_cells(of):
    _, scores, messages, flags = of("deleted")
    assert scores == FULL | {"half-check-1": 0}
    assert messages["half-check-1"] == "not written yet"
    assert "double-check-1: deleted; the course's was used" in flags
    assert "half: deleted; the untouched stub was used" in flags
    assert "code-imports: deleted; the course's was used" in flags


def test_edited_check_is_ours_again(of):
    _, scores, _, flags = of("edited")
    assert scores == FULL | {"double-check-1": 0, "double-check-2": 0}
    assert "double-check-1: edited; the course's was used" in flags
    assert "code-imports: edited; the course's was used" in flags  # a given name stays what it was


def test_duplicated_cell(of):
    _, scores, _, flags = of("duplicated")
    assert scores == FULL
    assert "half: 2 copies; the last counts" in flags
    assert "half-check-1: 2 copies; the course's was used, once" in flags


def test_retyped_cells(of):
    result, scores, _, flags = of("retyped")
    assert scores == FULL
    assert "double: turned into a markdown cell; read as code" in flags
    assert "half-check-1: turned into a markdown cell; the course's was used" in flags
    assert "answer-why: turned into a code cell; read as markdown" in flags
    assert {c.check: c.status for c in result.checks}["answer-why"] == "to grade"


def test_own_cells_run_where_they_stood(of):
    assert of("own cells")[1] == FULL


def test_stripped_metadata(of):
    result, scores, _, flags = of("stripped")
    assert scores == FULL
    assert "recognized by their text" in flags
    assert {c.check: c.status for c in result.checks}["answer-why"] == "to grade"


@pytest.mark.parametrize(
    ("student", "status"),
    [
        ("endless", "timeout"),
        ("stubborn", "timeout"),
        ("exit", "crashed"),
        ("segfault", "crashed"),
        ("sigkill", "crashed"),
    ],
)
def test_kernel_killers_cost_only_their_exercise(of, student, status):
    result, scores, _, flags = of(student)
    assert scores == FULL | {"double-check-1": 0, "double-check-2": 0}
    assert {c.status for c in result.checks if c.exercise == "double"} == {status}
    assert result.status == "graded"
    assert "double-check-1: " + ("stopped after" if status == "timeout" else "ended the kernel") in flags


def test_exit_in_the_exercise_cell(of):
    _, scores, messages, flags = of("exit at once")
    assert scores == FULL | {"double-check-1": 0, "double-check-2": 0}
    assert "double: ended the kernel" in flags
    assert messages["double-check-1"].startswith("the cell of the exercise itself failed: ended the kernel")


def test_sys_exit(of):
    _, scores, messages, _ = of("sys.exit")
    assert scores == FULL | {"half-check-1": 0}
    assert messages["half-check-1"] == "SystemExit: 0"


def test_quit_takes_only_its_own_cell(of):
    assert of("quit")[1] == FULL
    assert "added-1: ended the kernel" in of("quit")[3]


@pytest.mark.parametrize("student", ["flood", "one big line"])
def test_a_flood_of_output_is_cut(graded, of, student):
    assert of(student)[1] == FULL
    executed = graded[0] / "autograded" / student / tiny.STAGE / f"{tiny.LESSON}.ipynb"
    assert executed.stat().st_size < 2_000_000
    assert "output cut" in executed.read_text(encoding="utf-8")


def test_nan_is_not_full_marks(of):
    assert of("nan")[1] == FULL | {"half-check-1": 0}


def test_a_warning_costs_nothing(of):
    assert of("warning")[1] == FULL


def test_a_file_beside_the_notebook_shadows_no_module(of):
    assert of("shadow")[1] == FULL


def test_tables(graded):
    out, results, lines = graded
    raw = (out / "grades.csv").read_bytes()
    assert not raw.startswith(b"\xef\xbb\xbf")
    rows = {row["student"]: row for row in csv.DictReader(raw.decode().splitlines())}
    assert list(next(iter(rows.values()))) == [
        "student",
        "stage",
        "lesson",
        "score",
        "max_score",
        "late_penalty",
        "status",
        "seconds",
        "flags",
    ]
    assert rows["李雷 =1+2"]["score"] == "8"
    assert "'=cmd()" in rows  # a spreadsheet must not evaluate it
    assert "=cmd()" not in rows
    checks = list(csv.DictReader((out / "checks.csv").read_text(encoding="utf-8").splitlines()))
    columns = ["student", "lesson", "exercise", "check", "points", "score", "status", "counted", "message"]
    assert list(checks[0]) == columns
    assert sum(float(row["score"]) for row in checks) == sum(r.score for r in results.values())
    assert ("without a sandbox" in lines) == tiny.UNSAFE
    assert "李雷" in lines


def test_pages_escape_and_show_no_hidden_test(graded):
    out = graded[0]
    pages = {p.parts[-3]: p.read_text(encoding="utf-8") for p in out.glob("feedback/*/*/*.html")}
    assert set(pages) == set(CLASS)
    assert not any(str(tiny.SECRET) in page or "HIDDEN" in page for page in pages.values())
    assert "&lt;script&gt;alert(1)" in pages["markup"]
    report = (out / "report.html").read_text(encoding="utf-8")
    for page in [*pages.values(), report]:
        assert "<script>alert" not in page
    (lesson,) = out.glob("report/lessons/*.html")
    assert "did you divide with //?" in lesson.read_text(encoding="utf-8")
    assert ("without a sandbox" in report) == tiny.UNSAFE
    assert "not valid JSON" in pages["corrupt"]
    assert "8 of 10 points" in pages["李雷 =1+2"]
