"""Runs one lesson's answers: a process that walks through the notebook once and forks one child per answer.

    python answers_worker.py JOB RESULTS

JOB is a JSON file: `cells` (role, name, source, points in notebook order), `answers` and `limit`, the seconds one
answer may take. An answer: id, exercise, source, fake (its kind and targets, or null), `cells` (indices of the cells
below the exercise that it needs) and `stop` (whether it is done at its first failing check). RESULTS receives one JSON
line per answer: {"id", "checks": [{"points", "error"}], "applies", "note", "seconds"}. `error` is empty where the check
did not raise; `applies` is false for a fake that makes no difference, which is not run; `note` is what a fake that is
no answer found; `seconds` are those of one core since the answer before.

A child is forked where the exercise stands, so it has exactly the cells above. It runs the answer in the exercise's
place, then the cells that follow (reference answers; no experiments, no checks of other exercises) as far as the last
check of this exercise. Cells run in an IPython shell, so that inspect.getsource and @triton.jit find their text.
"""

import json
import os
import resource
import select
import signal
import sys
import time
import traceback

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
    spent = 0.0
    for i, cell in enumerate(cells):
        answers = [a for a in job["answers"] if cell["role"] == "exercise" and a["exercise"] == cell["name"]]
        recorded = record(shell, cells, i, answers, job["limit"])
        for answer in answers:
            outcome = judge(shell, cells, answer, recorded, job["limit"])
            before, spent = spent, seconds_of_one_core()
            results.write(json.dumps({"id": answer["id"], **outcome, "seconds": spent - before}) + "\n")
            results.flush()
        if cell["role"] not in ("check", "experiment"):
            error = run(shell, cell["source"])
            if error:
                raise SystemExit(f'the reference itself fails, in the {cell["role"]} cell "{cell["name"]}": {error}')


def seconds_of_one_core() -> float:
    """What this process and its children have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def run(shell, source: str) -> str:
    """Run one cell; what it raised as one text, empty where it raised nothing."""
    outcome = shell.run_cell(source, store_history=False)
    error = outcome.error_before_exec or outcome.error_in_exec
    if error is None:
        return ""
    name = type(error).__name__
    return str(error) if isinstance(error, AssertionError) and str(error) else f"{name}: {error}"


def record(shell, cells: list[dict], exercise: int, answers: list[dict], limit: float) -> dict:
    """What the fakes among the answers need to know: {"applies": {target: kinds}, "alike": sentences or null}."""
    fakes = [a for a in answers if a["fake"]]
    if not fakes:
        return {}
    strides = [a["fake"]["targets"] for a in fakes if a["fake"]["kind"] == "strides"]
    targets = {t for a in fakes if a["fake"]["kind"] != "strides" for t in a["fake"]["targets"]}

    def look(report) -> None:
        from answers_fakes import Recorder, Strides, replace_target

        run(shell, cells[exercise]["source"])
        recorders = {target: Recorder() for target in targets}
        for target, recorder in recorders.items():
            replace_target(shell.user_ns, target, recorder)
        launches = Strides(strides[0] if strides else [])
        launches.watch()
        for i in fakes[0]["cells"]:
            run(shell, cells[i]["source"])
        report(applies={t: sorted(r.kinds) for t, r in recorders.items()}, alike=launches.never_differ())

    lines, why = in_child(look, limit)
    if not lines:
        raise SystemExit(f'the fakes of exercise "{cells[exercise]["name"]}" cannot be told: {why}')
    return lines[0]


def judge(shell, cells: list[dict], answer: dict, recorded: dict, limit: float) -> dict:
    """An answer's `checks`, `applies` and `note`."""
    checks = [cells[i] for i in answer["cells"] if cells[i]["role"] == "check"]
    fake = answer["fake"]
    applies, note = True, ""
    if fake and fake["kind"] == "strides":
        applies, note = recorded["alike"] is not None, "; ".join(recorded["alike"] or [])
        errors = ["" if note else "no two tensors have the same strides in every launch"] * len(checks)
    elif fake and not any(fake["kind"] in recorded["applies"].get(t, ()) for t in fake["targets"]):
        applies, errors = False, [""] * len(checks)
    else:
        lines, why = in_child(lambda report: attempt(shell, cells, answer, report), limit)
        errors = [line["error"] for line in lines]
        errors += [why or "not run"] * (len(checks) - len(errors))
    outcomes = [{"points": c["points"], "error": e} for c, e in zip(checks, errors, strict=True)]
    return {"checks": outcomes, "applies": applies, "note": note}


def in_child(work, limit: float) -> tuple[list[dict], str]:
    """What a forked process reports while it does the work, and why it ended, where it did not end well.

    The process may loop, crash or exit as it likes. work: takes `report`, which sends its keywords at once.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            work(lambda **line: os.write(writer, (json.dumps(line) + "\n").encode()))
            os.write(writer, b"done")
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    text, ended = read_until(reader, time.monotonic() + limit)
    os.close(reader)
    if not ended:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    *lines, last = text.decode().split("\n")
    why = "" if last == "done" else "the process ended early"
    if not ended:
        why = f"took longer than {limit:g} s"
    elif os.WIFSIGNALED(status):
        why = f"the process died of {signal.Signals(os.WTERMSIG(status)).name}"
    return [json.loads(line) for line in lines], why


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


def attempt(shell, cells: list[dict], answer: dict, report) -> None:
    """In the child: run the answer and its checks, and report each as soon as it is known."""
    failed = run(shell, answer["source"])
    if answer["fake"] and not failed:
        from answers_fakes import Fake, replace_target

        fake = Fake(answer["fake"]["kind"])
        for target in answer["fake"]["targets"]:
            replace_target(shell.user_ns, target, fake)
    for i in answer["cells"]:
        error = run(shell, cells[i]["source"])
        if cells[i]["role"] == "check":
            report(error=f"{error} (the answer's own cell: {failed})" if error and failed else error)
            if error and answer["stop"]:
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
