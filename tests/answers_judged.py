"""Runs one lesson's answers as answers_worker.py does, but as a class is graded: the checks run in a judge's process.

    python answers_judged.py JOB RESULTS

Each code cell of JOB has a `step` too: null for an experiment, else what the grader makes of the cell (kind, name,
judged, asked, hidden, defined). Fakes are not run: they replace functions where they stand.
"""

import json
import os
import socket
import sys
from contextlib import contextmanager

import answers_worker as worker

from autograder.judge.agent import Agent
from autograder.judge.court import Court
from autograder.lesson import python_of
from llm40 import checks, distributed

SEED = "40"


def main(job_file: str, results_file: str) -> None:
    with open(job_file, encoding="utf-8") as f:
        job = json.load(f)
    with open(results_file, "w", encoding="utf-8") as results:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        Walk(job, results)


class Walk:
    """One process walks through the notebook for both: the learner's names in a shell, the judge's in a court."""

    def __init__(self, job: dict, results):
        self.shell = worker.new_shell()
        self.learners = names_of_checks()
        self.court = Court()
        self.courts = names_of_checks()
        self.steps = {cell["source"]: cell["step"] for cell in job["cells"]}
        self.run_for_learner = worker.run
        vars(worker).update(run=self.run, attempt=self.attempt, new_shell=lambda: self.shell)
        worker.walk(job, results)

    @contextmanager
    def judging(self):
        """Inside the block, llm40.checks measures in both processes."""
        set_names(self.courts)
        try:
            yield
        finally:
            set_names(self.learners)

    def run(self, shell, source: str) -> str:
        self.give(self.steps.get(source))
        set_names(self.learners)
        return self.run_for_learner(shell, source)

    def give(self, step: dict | None) -> None:
        if step and step["kind"] == "given":
            with self.judging():
                self.court.run_given(step["name"], step["judged"])

    def attempt(self, shell, cells: list[dict], answer: dict, report) -> None:
        """In the child: fork the learner's process, which runs the answer, and judge it."""
        here, there = socket.socketpair()
        learner = os.fork()
        if learner == 0:
            here.close()
            set_names(self.learners)
            distributed.at_fork.clear()
            self.serve(cells, answer, there)
            os._exit(0)
        there.close()
        self.court.attach(here)
        for i in answer["cells"]:
            step = cells[i]["step"]
            self.give(step)
            if step["kind"] != "check":
                continue
            written = [python_of(answer["source"])]
            with self.judging():
                outcome = self.court.run_check(
                    step["name"], step["judged"], step["asked"], SEED, step["hidden"], written, step["defined"]
                )
            error = "" if outcome["status"] == "ok" else f"{outcome.get('ename')}: {outcome.get('evalue')}"
            report(error=error)
            if error and answer["stop"]:
                break
        here.close()
        os.kill(learner, 9)
        os.waitpid(learner, 0)

    def serve(self, cells: list[dict], answer: dict, connection: socket.socket) -> None:
        self.run_for_learner(self.shell, answer["source"])
        agent = Agent(connection, self.shell.user_ns)
        try:
            for i in answer["cells"]:
                if cells[i]["step"]["kind"] == "check":
                    agent.serve_check()
                else:
                    self.run_for_learner(self.shell, cells[i]["source"])
        except Exception:  # the judge has seen enough
            return


def names_of_checks() -> list[tuple[dict, dict]]:
    """The names of the modules whose functions a court redirects."""
    return [(vars(module), dict(vars(module))) for module in (checks, sys.modules["llm40.checks.buffers"])]


def set_names(names: list[tuple[dict, dict]]) -> None:
    for module, values in names:
        module.update(values)


if __name__ == "__main__":
    main(*sys.argv[1:])
