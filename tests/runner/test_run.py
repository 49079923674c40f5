"""The runner on tiny notebooks: what counts as executed, what a failure shows, what a stub must do."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from built_course import CHECK, SOLUTION, STUB, code

from autograder import report, run
from autograder.run import run_course

NAMES = ("01_ok", "02_exit", "03_dead", "04_slow", "05_error", "06_easy_check", "07_broken_stub", "08_dead_stub")

FIGURE = "from IPython.display import SVG, display\ndisplay(SVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>'))"
ENVIRONMENT = """
import os, sys
assert os.environ["LLM40_PROFILE"] == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == ""
assert int(os.environ["OMP_NUM_THREADS"]) >= 1
assert os.path.isdir(os.path.dirname(os.environ["TRITON_CACHE_DIR"]))
assert "ipc" in open(get_ipython().config["IPKernelApp"]["connection_file"]).read()
torch = sys.modules.get("torch")  # from the warm process
assert torch is None or not torch.cuda.is_initialized()
"""


def run_quietly(**options) -> tuple[int, str]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        exit_code = run_course(profile="cpu", **options)
    return exit_code, output.getvalue()


@pytest.fixture(scope="module")
def ran(course, tmp_path_factory):
    """One run, four at once, of a lesson of every kind."""
    built = course()
    built.add(
        "stage1_a/01_ok",
        [
            code(ENVIRONMENT),
            code(""),
            code(SOLUTION, exercise="double"),
            code(CHECK, check="double_1", points=2),
            code("assert double(-1) == -2", check="double_2", points=1),
            code("# drawn at last\nimport time; time.sleep(0.5)\n" + FIGURE, experiment=True),
        ],
        [code(STUB, exercise="double"), code(CHECK, check="double_1"), code("1 / 0", experiment=True)],
    )
    built.add(
        "stage1_a/02_exit",
        [code("x = 1"), code("import sys\nsys.exit(0)"), code("never = 1"), code("never = 2")],
    )
    built.add("stage1_a/03_dead", [code("x = 1"), code("import os\nos._exit(3)", check="fatal"), code("never = 1")])
    built.add(
        "stage2_b/04_slow",
        [code("import time\nwhile True:\n    time.sleep(0.1)", check="slow"), code("never = 1")],
    )
    built.add(
        "stage2_b/05_error",
        [code("def f():\n    raise ValueError('<script>é</script>')"), code("f()"), code("x")],
    )
    built.add(
        "stage2_b/06_easy_check",
        [code("x = 1")],
        [code("def double(x):\n    return 6", exercise="double"), code(CHECK, check="double_easy")],
    )
    built.add(
        "stage2_b/07_broken_stub",
        [code("x = 1")],
        [
            code("import no_such_module"),
            code("rate = None\nraise NotImplementedError", exercise="rate"),
            code("assert rate == 2", check="rate_1"),
            code("double(", exercise="double"),
            code(CHECK, check="double_1"),
        ],
    )
    built.add("stage2_b/08_dead_stub", [code("x = 1")], [code("import os\nos._exit(4)"), code(CHECK, check="double_1")])
    out = tmp_path_factory.mktemp("输出 out")
    with pytest.MonkeyPatch.context() as patch:
        for name in run.BUDGETS:  # what is asked here is another matter, whatever else the machine does
            patch.setitem(run.BUDGETS, name, float("inf"))
        exit_code, output = run_quietly(notebooks=built.root, jobs=4, timeout=4, out=out)
    result = json.loads((out / "report.json").read_text(encoding="utf-8"))
    lessons = {lesson["name"]: lesson for lesson in result["lessons"]}
    return SimpleNamespace(exit_code=exit_code, output=output, result=result, lessons=lessons, out=out)


def test_a_failure_is_exit_code_1_and_the_other_lessons_go_on(ran):
    assert ran.exit_code == 1
    assert ran.result["status"] == "failed"
    assert tuple(ran.lessons) == NAMES
    sound = {name for name, lesson in ran.lessons.items() if lesson["status"] == "ok"}
    assert sound == {"01_ok", "06_easy_check", "07_broken_stub", "08_dead_stub"}
    assert {name for name, lesson in ran.lessons.items() if report.find_state(lesson) == "ok"} == {"01_ok"}


def test_a_lesson_that_ran(ran):
    lesson = ran.lessons["01_ok"]
    assert lesson["failures"] == []
    assert (lesson["checks_passed"], lesson["checks"]) == (2, 2)
    assert (lesson["points"], lesson["max_points"]) == (3, 3)
    assert lesson["figures"] == 1
    assert lesson["slowest"]["line"] == "import time; time.sleep(0.5)"
    assert 0.5 <= lesson["slowest"]["seconds"] < lesson["seconds"]
    assert lesson["grading_seconds"] <= lesson["seconds"] - 0.5
    assert 20e6 < lesson["peak_bytes"] < 500e6
    assert lesson["gpu_bytes"] == 0
    notebook = nbformat.read(ran.out / "executed/stage1_a/01_ok.ipynb", as_version=4)
    assert [cell.execution_count for cell in notebook.cells] == [1, None, 2, 3, 4, 5]  # a blank cell has nothing to run
    assert not {"input_path", "output_path"} & notebook.metadata.papermill.keys()  # paths of this machine


@pytest.mark.parametrize(
    ("name", "kind", "cell", "message"),
    [
        ("02_exit", "error", "code cell 2 of 4", "sys.exit ended the run here; cells that never ran after it: 2"),
        ("03_dead", "dead kernel", "fatal (code cell 2 of 3)", "exit code 3"),
        ("04_slow", "timeout", "slow (code cell 1 of 2)", "ran longer than 4 s"),
        ("05_error", "error", "code cell 2 of 3", "ValueError: <script>é</script>"),
    ],
)
def test_a_lesson_that_did_not_run_to_its_end(ran, name, kind, cell, message):
    lesson = ran.lessons[name]
    [failure] = lesson["failures"]
    assert (failure["kind"], failure["cell"]) == (kind, cell)
    assert message in failure["message"]
    assert lesson["checks_passed"] == 0
    assert lesson["stub"]["status"] == "ok"
    assert f"FAILED {name}: {cell}" in ran.output


def test_the_failing_cell_is_shown_with_its_traceback_and_nothing_else(ran):
    assert "raise ValueError('<script>é</script>')" in ran.output
    assert "----> 1 f()" in ran.output
    assert "never = " not in ran.output
    assert "\x1b[" not in ran.output


def test_colors_are_kept_for_a_terminal(ran):
    lesson = ran.lessons["05_error"]
    assert "\x1b[" in report.format_failure(lesson, lesson["failures"][0], color=True)


def test_a_stub_whose_checks_all_fail_is_sound_and_skips_its_experiments(ran):
    stub = ran.lessons["01_ok"]["stub"]
    assert (stub["status"], stub["checks"], stub["checks_failing"]) == ("ok", 1, 1)


def test_a_check_that_passes_on_the_stub_is_a_failure_with_its_name(ran):
    [failure] = ran.lessons["06_easy_check"]["stub"]["failures"]
    assert failure["kind"] == "check passes"
    assert failure["cell"].startswith("double_easy ")
    assert "FAILED 06_easy_check (stub): double_easy" in ran.output


def test_other_cells_of_a_stub_must_not_break_and_all_of_them_run(ran):
    stub = ran.lessons["07_broken_stub"]["stub"]
    assert [failure["message"].split(":")[0] for failure in stub["failures"]] == ["ModuleNotFoundError", "SyntaxError"]
    assert (stub["checks"], stub["checks_failing"]) == (2, 2)


def test_a_stub_that_kills_its_kernel(ran):
    [failure] = ran.lessons["08_dead_stub"]["stub"]["failures"]
    assert failure["kind"] == "dead kernel"
    assert failure["source"] == "import os\nos._exit(4)"


def test_reports(ran):
    versions = ran.result["versions"]
    assert versions["python"].startswith("3.")
    assert {"torch", "triton", "device"} <= versions.keys()
    page = (ran.out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg ") == 2
    assert page.count("<script>") == 0
    assert "&lt;script&gt;é" in page
    assert 'href="executed/stage1_a/01_ok.ipynb"' in page
    markdown = (ran.out / "report.md").read_text(encoding="utf-8")
    rows = [line for line in markdown.splitlines() if line.startswith("| 0")]
    assert len(rows) == len(NAMES)
    assert len({line.count("|") for line in rows}) == 1
    assert "## 02_exit: code cell 2 of 4" in markdown


def test_budgets_warn_and_fail_only_when_strict(course, tmp_path, monkeypatch):
    built = course()
    built.add("stage1_a/01_ok", [code("import time; time.sleep(0.3)")])
    monkeypatch.setitem(run.BUDGETS, "seconds", 0.2)
    exit_code, output = run_quietly(notebooks=built.root, out=tmp_path)
    assert exit_code == 0
    assert "warning: 01_ok: the whole notebook takes" in output
    assert "over the budget of 0.2 s" in output
    assert "over budget" in (tmp_path / "report.html").read_text(encoding="utf-8")
    exit_code, _ = run_quietly(notebooks=built.root, out=tmp_path, strict_budgets=True)
    assert exit_code == 1


def test_a_missing_stub_is_a_failure(course, tmp_path):
    built = course()
    built.add("stage1_a/01_ok", [code("x = 1")])
    built.add("stage1_a/02_no_stub", [code("x = 1")])
    (built.root / "course/stage1_a/02_no_stub.ipynb").unlink()
    exit_code, output = run_quietly(notebooks=built.root, out=tmp_path, lesson="02")
    assert exit_code == 1
    assert "make course" in output


@pytest.mark.parametrize("word", ["import warnings; warnings.warn('watch out')", "0.5"])
def test_a_check_that_passes_and_is_not_silent(course, tmp_path, word):
    """nbgrader's own autograde and its Validate button would give it nothing, or half a point."""
    built = course()
    built.add("stage1_a/01_loud", [code(SOLUTION, exercise="double"), code(f"{CHECK}\n{word}", check="double_1")])
    exit_code, output = run_quietly(notebooks=built.root, out=tmp_path)
    assert exit_code == 1
    assert "nbgrader takes what this check writes" in output
    assert ("watch out" in output) or ("0.5" in output)


def test_nothing_of_the_class_is_needed_to_run_built_notebooks(course, tmp_path):
    """A GPU machine may have no nbgrader, Jupytext or JupyterLab: here importing one is an error."""
    blocked = tmp_path / "blocked"
    for package in ("nbgrader", "jupytext", "jupyterlab"):
        (blocked / package).mkdir(parents=True)
        (blocked / package / "__init__.py").write_text("raise ImportError('not on this machine')")
    built = course()
    built.add("stage1_a/01_ok", [code(SOLUTION, exercise="double"), code(CHECK, check="double_1")])
    program = (
        f"import sys; sys.path[:0] = [{str(blocked)!r}, {str(run.ROOT)!r}]\n"
        "from pathlib import Path\n"
        "from autograder.run import run_course\n"
        f"sys.exit(run_course(profile='cpu', notebooks=Path({str(built.root)!r}), out=Path({str(tmp_path)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wrong_usage_is_exit_code_2(course, tmp_path):
    built = course()
    built.add("stage1_a/01_ok", [code("x = 1")])
    assert run_quietly(notebooks=built.root, lesson="99", out=tmp_path)[0] == 2
    assert run_quietly(notebooks=tmp_path / "missing", out=tmp_path)[0] == 2
    assert run_quietly(notebooks=tmp_path, out=tmp_path)[0] == 2
    assert run_course(notebooks=built.root, profile="tpu", out=tmp_path) == 2
    command = [sys.executable, "-m", "autograder", "run", "--notebooks", str(built.root), "--lesson", "99"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=run.ROOT)
    assert done.returncode == 2
    assert "stage1_a/01_ok" in done.stderr
    assert not list(Path(tmp_path).glob("report.*"))
