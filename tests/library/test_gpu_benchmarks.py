"""`make gpu` where no GPU is: its units, how it goes on after a cut, what it compiles and rehearses, its wheels."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch

from benchmarks import gpu, kernels, rows, wheels
from llm40 import profile

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(not profile.has_triton, reason="Triton exists for Linux only")
no_gpu = pytest.mark.skipif(profile.name == "gpu", reason="says what a machine without a GPU does")
pytestmark = pytest.mark.xdist_group("gpu-benchmarks")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"LLM40_PROFILE": "cpu", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=ROOT)


def unit(found, name="speed/99", sources=()) -> gpu.Unit:
    return gpu.Unit(name, "a test", found, sources)


class TestUnits:
    def test_the_order_is_kernels_speed_course_training(self):
        groups = list(dict.fromkeys(u.name.partition("/")[0] for u in gpu.units()))
        assert groups == ["compile", "sweep", "speed", "course", "llama"]

    def test_every_written_lesson_is_run(self):
        lessons = {u.name for u in gpu.units() if u.name.startswith("course/")}
        assert lessons == {f"course/{path.name[:2]}" for path in ROOT.glob("solutions/stage*/*.py")}

    def test_every_lesson_with_kernels_is_swept_and_timed(self):
        with_kernels = {p.name[:2] for p in ROOT.glob("solutions/stage*/*.py") if "@triton.jit" in p.read_text("utf-8")}
        for part in ("sweep", "speed"):
            assert {u.name for u in gpu.units() if u.name.startswith(part)} == {f"{part}/{n}" for n in with_kernels}

    def test_sources_exist(self):
        for each in gpu.units():
            assert all(any(ROOT.glob(pattern)) for pattern in each.sources), each.name

    def test_only(self):
        everything = gpu.units()
        assert [u.name for u in gpu.choose(everything, ["llama", "speed/29"])] == ["speed/29", "llama"]
        assert {u.name.partition("/")[0] for u in gpu.choose(everything, ["sweep"])} == {"sweep"}
        assert gpu.choose(everything, []) == everything
        with pytest.raises(SystemExit, match="nothing is called sped: there is compile, sweep, speed, course, llama"):
            gpu.choose(everything, ["sped"])


class TestRows:
    """What `run_all` writes, and when."""

    @pytest.fixture
    def result(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gpu, "LOGS", gpu.ROOT / "build" / "test-gpu")
        return tmp_path / "gpu.json"

    def read(self, result: Path, name: str = "speed/99") -> dict:
        return json.loads(result.read_text(encoding="utf-8"))["units"][name]

    def test_a_row_is_written_as_soon_as_it_is_known(self, result):
        def found(known):
            yield {"key": "a", "rehearsed": [], "missing": {}}
            time.sleep(300)
            yield {"key": "b", "rehearsed": [], "missing": {}}

        began = time.monotonic()
        assert gpu.run_all([unit(found)], result, 10 / 60, False) == 0
        assert time.monotonic() - began < 200
        entry = self.read(result)
        assert (entry["state"], [row["key"] for row in entry["rows"]]) == ("cut short", ["a"])

    def test_the_next_run_goes_on_there(self, result, capsys):
        def found(known):
            for key in "abc":
                if key not in known:
                    yield {"key": key, "rehearsed": [], "missing": {}}
                if key == "b" and "b" not in known:
                    os._exit(7)

        assert gpu.run_all([unit(found)], result, 1, False) == 1
        assert "its process ended with exit code 7" in capsys.readouterr().out
        assert self.read(result)["state"] == "crash"
        assert gpu.run_all([unit(found)], result, 1, False) == 0
        assert [row["key"] for row in self.read(result)["rows"]] == ["a", "b", "c"]
        assert gpu.run_all([unit(found)], result, 1, False) == 0
        assert "speed/99: known" in capsys.readouterr().out

    def test_errors_are_told_and_tried_again(self, result, capsys):
        def wrong(known):
            yield {"key": "a", "error": "2 of 3 results are off"}

        def right(known):
            assert not known
            yield {"key": "a", "rehearsed": [], "missing": {}}

        assert gpu.run_all([unit(wrong)], result, 1, False) == 1
        assert "speed/99: a: 2 of 3 results are off" in capsys.readouterr().out
        assert gpu.run_all([unit(right)], result, 1, False) == 0
        assert [row.get("error") for row in self.read(result)["rows"]] == [None]

    def test_a_crash_ends_alone(self, result):
        def raises(known):
            raise ValueError("no such device")
            yield

        def right(known):
            yield {"key": "a", "rehearsed": [], "missing": {}}

        assert gpu.run_all([unit(raises), unit(right, "speed/98")], result, 1, False) == 1
        assert self.read(result)["error"] == "ValueError: no such device"
        assert self.read(result, "speed/98")["state"] == "done"

    def test_rows_of_other_sources_are_measured_again(self, result, tmp_path, monkeypatch):
        def found(known):
            yield {"key": "a", "rehearsed": [], "missing": {}}

        monkeypatch.setattr(gpu, "ROOT", tmp_path)
        source = tmp_path / "lesson.py"
        source.write_text("x = 1\n")
        measured = unit(found, sources=("lesson.py",))
        first = gpu.stamp(measured, {"device": "H200"})
        assert gpu.stamp(measured, {"device": "H100"}) != first
        source.write_text("x = 2\n")
        assert gpu.stamp(measured, {"device": "H200"}) != first
        assert not gpu.is_done({"units": {"speed/99": {"stamp": first, "state": "done", "rows": []}}}, measured, "now")

    def test_what_there_was_no_time_for_is_listed(self, result, capsys):
        assert gpu.run_all([unit(lambda known: iter(()))], result, 0, False) == 0
        assert "no time was left for speed/99" in capsys.readouterr().out

    def test_the_file_is_whole_or_as_it_was(self, result):
        rows.write(result, {"a": 1})
        with pytest.raises(TypeError):
            rows.write(result, {"a": object()})
        assert json.loads(result.read_text()) == {"a": 1}


class TestFigures:
    def test_goals(self):
        goal = kernels.Goal("forward", "copy", 0.9, stretch=0.95)
        assert kernels.judge(goal, {"copy": 0.91}) == {
            "peer": "copy", "at_least": 0.9, "ratio": 0.91, "met": True, "stretch": 0.95
        }  # fmt: skip
        assert not kernels.judge(goal, {"copy": 0.89})["met"]
        assert not kernels.judge(goal, {})["met"]

    def test_every_goal_has_a_case_and_a_lesson_of_its_own(self):
        for number in gpu.WITH_KERNELS:
            module = kernels.benchmark(number)
            assert f"lesson {number}" == module.OURS
            assert module.GOALS
            assert torch.bfloat16 == module.DTYPE

    def test_a_gradient_takes_the_outputs_layout(self):
        output = torch.zeros(2, 5, 3, 4).transpose(1, 2)
        gradient = torch.randn(2, 3, 5, 4)
        found = kernels.layout_of(output, gradient)
        assert found.stride() == output.stride()
        assert torch.equal(found, gradient)

    def test_a_peer_that_is_wrong_stops_the_case(self):
        x = torch.randn(5)
        case = kernels.Case("a", "ours", {"ours": lambda: x, "theirs": lambda: x + 1}, {"": 1}, "TB/s")
        with pytest.raises(AssertionError, match=r"a: results differ from ours by \{'theirs'"):
            kernels.attempt(case)

    def test_a_peer_that_is_not_there_is_noted_and_ours_must_run(self):
        def absent():
            raise RuntimeError("no kernel found\nand more")

        case = kernels.Case("a", "ours", {"ours": lambda: torch.ones(2), "theirs": absent}, {"": 1}, "TB/s")
        assert kernels.attempt(case) == ({}, {"theirs": "RuntimeError: no kernel found"})
        case.functions["ours"] = absent
        with pytest.raises(RuntimeError, match="no kernel found"):
            kernels.attempt(case)

    def test_the_compiler_is_not_slower_in_silence(self):
        """The ninth shape of one function is an error, where Dynamo would go on uncompiled."""
        done = python("-c", NINE_SHAPES)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split() == ["8", "FailOnRecompileLimitHit"]


NINE_SHAPES = """
import torch
from benchmarks.kernels import strict_compiler

with strict_compiler():
    double = torch.compile(lambda x: x * 2, dynamic=False, backend="eager")
    try:
        for n in range(2, 11):
            double(torch.ones(n))
    except Exception as error:
        print(n - 2, type(error).__name__)
"""


class TestCourse:
    def test_a_notebook_is_executed_by_papermill(self, tmp_path, monkeypatch):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(6 * 7)")])
        notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
        nbformat.write(notebook, tmp_path / "tiny.ipynb")
        monkeypatch.setattr(gpu, "notebook", lambda key: tmp_path / "tiny.ipynb")
        monkeypatch.setattr(gpu, "LOGS", tmp_path)
        for name in ("LLM40_PROFILE", "PYTHONPATH"):  # which the unit sets in a process of its own
            monkeypatch.setenv(name, os.environ.get(name, ""))
        [row] = gpu.course_rows("01")(set())
        assert row["key"] == "01_high_dimensional_intuition"
        assert row["seconds"] > 0
        assert "error" not in row

    def test_without_the_builder_the_notebook_comes_along(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "nbgrader", None)
        monkeypatch.setattr(gpu, "BUILT", tmp_path)
        with pytest.raises(FileNotFoundError, match="run `make gpu-wheels` on a machine that has them"):
            gpu.notebook("stage1_foundations/01_x")
        path = tmp_path / "stage1_foundations" / "01_x.ipynb"
        path.parent.mkdir()
        path.touch()
        assert gpu.notebook("stage1_foundations/01_x") == path


@needs_triton
@no_gpu
class TestWithoutGPU:
    def test_list(self):
        done = python("-m", "benchmarks.gpu", "--list")
        assert done.returncode == 0, done.stderr
        assert "on no GPU, PyTorch" in done.stdout
        for name in ("compile", "sweep/29", "speed/03", "course/01", "llama"):
            assert f"  {name} " in done.stdout
        assert "llama       LLaMA-160M in bfloat16                        needs a GPU" in done.stdout

    def test_it_says_so_rehearses_and_writes_nothing(self, tmp_path):
        out = tmp_path / "gpu.json"
        done = python("-m", "benchmarks.gpu", "--only", "sweep/03", "speed/03", "llama", "--out", str(out))
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith("PyTorch sees no GPU here: nothing is measured and nothing written.")
        assert "sweep/03: SwiGLU, float32: 6 results of 2 shapes" in done.stdout
        assert "rehearsed lesson 03, torch.compile, eager, copy; not here: nothing" in done.stdout
        assert "left for a machine with a GPU: llama" in done.stdout
        assert not out.exists()

    def test_a_lessons_benchmark_says_what_is_missing(self):
        done = python("-m", "benchmarks.29_flash_attention")
        assert done.returncode == 1
        assert "This measures a GPU and PyTorch sees none here" in done.stderr

    def test_every_kernel_of_the_course_is_compiled(self):
        """Each @triton.jit function is launched by the compile list, or called by one that is."""
        done = python("-m", "benchmarks.compile", "--list")
        assert done.returncode == 0, done.stderr[-2000:]
        reached = {line.split(":")[0] for line in done.stdout.splitlines()}
        for path in sorted(ROOT.glob("solutions/stage*/*.py")):
            functions = {f.name: f for f in ast.walk(ast.parse(path.read_text("utf-8"))) if is_kernel(f)}
            for name, function in functions.items():
                if f"{path.name[:2]} {name}" in reached:
                    called = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
                    reached |= {f"{path.name[:2]} {other}" for other in called & functions.keys()}
            missing = {f"{path.name[:2]} {name}" for name in functions} - reached
            assert not missing, "benchmarks/sweep.py launches them nowhere"

    def test_a_kernel_compiles_for_hopper(self, tmp_path):
        done = python("-m", "benchmarks.compile", "05", TRITON_CACHE_DIR=str(tmp_path))
        assert done.returncode == 0, done.stdout + done.stderr[-2000:]
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert {row["key"] for row in rows} == {f"lesson 05, {dtype}" for dtype in ("float32", "float16", "bfloat16")}
        assert all(row["target"] == "sm_90" and row["kernels"]["loss_kernel"]["variants"] >= 1 for row in rows)


def is_kernel(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)


class TestWheels:
    def test_what_is_gathered(self):
        found = wheels.closure()
        assert {"papermill", "ipykernel", "jupytext", "pooch", "babel", "nbclient", "pyzmq", "traitlets"} <= set(found)
        assert not {"torch", "triton", "numpy", "nbgrader"} & set(found)

    def test_for_which_python(self):
        command = wheels.command(["pooch==1.9.0"], Path("wheels"))
        assert command[command.index("--python-version") + 1] == "3.12"
        assert "manylinux_2_28_x86_64" in command
        assert command[-1] == "pooch==1.9.0"
