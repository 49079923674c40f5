"""Runs one lesson's answers: a process that walks through the notebook once and forks one child per answer.

    python answers_worker.py JOB RESULTS

JOB is a JSON file: `cells` (role, name, source, points in notebook order), `answers` (id, exercise, source, fake) and
`limit`, the seconds one answer may take. RESULTS receives one JSON line per answer: {"id", "checks": [{"points",
"error"}], "fake_applied"}; `error` is empty where the check did not raise.

A child is forked where the exercise stands, so it has exactly the cells above. It runs the answer in the exercise's
place, then the cells that follow (reference answers; no experiments, no checks of other exercises) as far as the last
check of this exercise. Cells run in an IPython shell, so that inspect.getsource and @triton.jit find their text.
"""

import copy
import functools
import json
import os
import select
import signal
import sys
import time
from types import FunctionType

os.environ["MPLBACKEND"] = "agg"  # before any cell imports matplotlib


def main(job_file: str, results_file: str) -> None:
    with open(job_file, encoding="utf-8") as f:
        job = json.load(f)
    with open(results_file, "w", encoding="utf-8") as results:
        # What cells print goes nowhere; stderr stays, for what goes wrong in the harness itself.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        walk(job, results)


def new_shell():
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    import llm40  # noqa: F401  before triton: chooses the interpreter

    import torch  # isort: skip
    import torch._dynamo  # PyTorch loads it when a check first asks for it: seconds that every child would spend

    torch.set_num_threads(1)
    config = Config()
    config.HistoryManager.enabled = False  # it would own a thread and a database
    shell = InteractiveShell.instance(config=config, colors="nocolor")
    shell.showtraceback = lambda *_, **__: None
    shell.showsyntaxerror = lambda *_, **__: None
    return shell


def walk(job: dict, results) -> None:
    shell = new_shell()
    cells = job["cells"]
    for i, cell in enumerate(cells):
        if cell["role"] == "exercise":
            for answer in job["answers"]:
                if answer["exercise"] == cell["name"]:
                    results.write(json.dumps(in_child(shell, cells[i:], answer, job["limit"])) + "\n")
                    results.flush()
        if cell["role"] in ("plain", "exercise"):
            error = run(shell, cell["source"])
            if error:
                raise SystemExit(f'the reference itself fails, in the {cell["role"]} cell "{cell["name"]}": {error}')


def run(shell, source: str) -> str:
    """Run one cell; what it raised as one text, empty where it raised nothing."""
    outcome = shell.run_cell(source, store_history=False)
    error = outcome.error_before_exec or outcome.error_in_exec
    if error is None:
        return ""
    name = type(error).__name__
    return str(error) if isinstance(error, AssertionError) and str(error) else f"{name}: {error}"


def in_child(shell, cells: list[dict], answer: dict, limit: float) -> dict:
    """The outcome of one answer, from a forked process that may loop, crash or exit as it likes."""
    checks = [c for c in cells if c["role"] == "check" and c["name"] == answer["exercise"]]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            judge(shell, cells, answer, len(checks), writer)
        finally:
            os._exit(0)
    os.close(writer)
    text, ended = read_until(reader, time.monotonic() + limit)
    os.close(reader)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    lines = [json.loads(line) for line in text.decode().splitlines()]
    errors = [line["error"] for line in lines if "error" in line]
    why = "the process ended early"
    if not ended:
        why = f"took longer than {limit:g} s"
    elif os.WIFSIGNALED(status):
        why = f"the process died of {signal.Signals(os.WTERMSIG(status)).name}"
    errors += [why] * (len(checks) - len(errors))
    applied = next((line["fake_applied"] for line in lines if "fake_applied" in line), True)
    outcome = [{"points": c["points"], "error": e} for c, e in zip(checks, errors, strict=True)]
    return {"id": answer["id"], "checks": outcome, "fake_applied": applied}


def read_until(reader: int, deadline: float) -> tuple[bytes, bool]:
    """What came through the pipe, and whether the other end closed it before the deadline."""
    text = b""
    while (left := deadline - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            part = os.read(reader, 65536)
            if not part:
                return text, True
            text += part
    return text, False


def judge(shell, cells: list[dict], answer: dict, checks: int, writer: int) -> None:
    """In the child: run the answer and its checks, and report each as soon as it is known."""

    def report(**line) -> None:
        os.write(writer, (json.dumps(line) + "\n").encode())

    failed = run(shell, answer["source"])
    fake = None
    if answer["fake"] and not failed:
        fake = Fake(answer["fake"]["kind"])
        for target in answer["fake"]["targets"]:
            fake.install(shell.user_ns, target)
    for cell in cells[1:]:
        if cell["role"] == "plain" or cell["role"] == "exercise":
            run(shell, cell["source"])
        elif cell["role"] == "check" and cell["name"] == answer["exercise"]:
            error = run(shell, cell["source"])
            report(error=f"{error} (the answer's own cell: {failed})" if error and failed else error)
            checks -= 1
            if checks == 0:
                break
    if fake is not None:
        report(fake_applied=fake.applied)


class Fake:
    """Puts something worthless in the place of a function, a method, a kernel or a value.

    kind `none`: it returns nothing (and a kernel does nothing); `zeros`: zeros like what the reference returns;
    `first`: its first tensor argument, unchanged. `applied` says whether there was anything to fake.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.applied = False

    def install(self, namespace: dict, target: str) -> None:
        owner, _, method = target.partition(".")
        if method:
            cls = namespace[owner]
            raw = cls.__dict__.get(method)
            wrap = type(raw) if isinstance(raw, (staticmethod, classmethod)) else None
            real = raw.__func__ if wrap else raw
            if isinstance(real, FunctionType):
                fake = self.function(real, skip_self=wrap is not staticmethod)
                setattr(cls, method, wrap(fake) if wrap else fake)
            return
        value = namespace.get(owner)
        if isinstance(value, FunctionType):
            namespace[owner] = self.function(value)
        elif hasattr(value, "__getitem__") and hasattr(value, "fn"):  # a Triton kernel, maybe autotuned
            if self.kind == "none":
                self.applied = True
                namespace[owner] = IdleKernel(value)
        elif not callable(value):
            namespace[owner] = self.value(value)

    def function(self, real, skip_self: bool = False):
        @functools.wraps(real)
        def fake(*args, **kwargs):
            if self.kind == "none":
                self.applied = True
                return None
            if self.kind == "zeros":
                return self.zeros(real(*args, **kwargs))
            found = first_tensor([*args[1 if skip_self else 0 :], *kwargs.values()])
            if found is None:
                return real(*args, **kwargs)
            self.applied = True
            return found

        return fake

    def value(self, value):
        if self.kind == "none":
            self.applied = True
            return None
        return self.zeros(value) if self.kind == "zeros" else value

    def zeros(self, value):
        import numpy
        import torch

        if isinstance(value, torch.Tensor):
            self.applied = True
            return torch.zeros_like(value)
        if isinstance(value, (numpy.ndarray, numpy.generic)):
            self.applied = True
            return numpy.zeros_like(value)
        if isinstance(value, (bool, int, float)):
            self.applied = True
            return type(value)(0)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.zeros, value))
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.zeros, value))
        if isinstance(value, dict):
            return {k: self.zeros(v) for k, v in value.items()}
        return copy.copy(value)


class IdleKernel:
    """A kernel whose launch does nothing."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getattr__(self, name: str):
        return getattr(self.kernel, name)

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def first_tensor(arguments: list):
    import numpy
    import torch

    return next((a for a in arguments if isinstance(a, (torch.Tensor, numpy.ndarray))), None)


if __name__ == "__main__":
    main(*sys.argv[1:])
