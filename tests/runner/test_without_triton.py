"""`make run` where there is no Triton, as on macOS and Windows: what can run passes, and what is left out is told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from built_course import CHECK, SOLUTION, STUB, code

from autograder.layout import ROOT

HIDE = """
import importlib.util, sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
sys.meta_path.insert(0, Hide())
"""
KERNEL = """
@triton.jit
def twice_kernel(x, BLOCK: tl.constexpr):
    tl.store(x, 2 * tl.load(x))

def twice(x):
    twice_kernel[(1,)](x, BLOCK=16)
    return x
"""
KERNEL_STUB = KERNEL.replace("tl.store(x, 2 * tl.load(x))", "raise NotImplementedError")
IMPORTS = "import torch\nfrom llm40 import checks\nfrom llm40.kernels import tl, triton"
KERNEL_CHECK = "with checks.launches() as launched:\n    result = twice(torch.ones(1))\nassert launched.programs == 1"


@pytest.fixture
def ran(course, tmp_path: Path):
    """Exit code, what was said, and the report of a run with these cells in the end."""

    def run(*more: str) -> tuple[int, str, dict]:
        built = course()
        cells = [code(IMPORTS), code(SOLUTION, exercise="double"), code(CHECK, check="double_1")]
        cells += [code(KERNEL, exercise="twice"), code(KERNEL_CHECK, check="twice_1", points=2)]
        cells += [code("drawn = twice(torch.ones(1))", experiment=True), code("print(drawn)", experiment=True)]
        stub = [code(IMPORTS), code(STUB, exercise="double"), code(CHECK, check="double_1")]
        stub += [code(KERNEL_STUB, exercise="twice"), code(KERNEL_CHECK, check="twice_1")]
        built.add("stage1_a/01_kernels", [*cells, *map(code, more)], stub)
        (tmp_path / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
        out = tmp_path / "build"
        call = f"run_course(profile='cpu', notebooks=Path({str(built.root)!r}), out=Path({str(out)!r}))"
        text = f"import sys\nfrom pathlib import Path\nfrom autograder.run import run_course\nsys.exit({call})"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
        done = subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, json.loads((out / "report.json").read_text(encoding="utf-8"))

    return run


def test_what_can_run_passes_and_the_rest_is_told(ran):
    exit_code, said, report = ran()
    (lesson,) = report["lessons"]
    assert (exit_code, lesson["status"], lesson["checks_passed"], lesson["checks"]) == (0, "ok", 1, 2), said
    assert [cell.split(" ")[0] for cell in lesson["left_out"]] == ["twice_1", "code", "code"]
    assert "left out: 01_kernels: 3 cells need Triton, which is not here" in said


def test_another_failure_is_one(ran):
    exit_code, said, report = ran("1 / 0")
    assert (exit_code, report["lessons"][0]["status"]) == (1, "failed")
    assert "ZeroDivisionError" in said
