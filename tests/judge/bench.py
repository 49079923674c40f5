"""A judge and an agent in two processes, without kernels and walls: what a learner defines, seen through the link."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from autograder.judge import sources
from autograder.judge.agent import Agent
from autograder.judge.court import Court
from autograder.judge.messages import Describe
from llm40 import checks, distributed

BUFFERS = sys.modules["llm40.checks.buffers"]


@contextmanager
def judged(learner: str, given: str = "", asked: list[str] | None = None) -> Iterator[dict]:
    """The judge's names, with proxies for what the learner's cell defines: `asked`, or all that it says to define."""
    here, there = socket.socketpair()
    child = os.fork()
    if child == 0:
        try:
            here.close()
            torch.set_num_threads(1)  # OpenMP's threads are not forked, and the child would wait for them
            names = {"__name__": "__main__"}
            exec(given, names)
            exec(learner, names)
            Agent(there, names).serve_check()
        finally:
            os._exit(0)
    there.close()
    kept = dict(vars(checks)), dict(vars(BUFFERS))  # a court's process is its own; here it is the tests' too
    court = Court()
    assert court.run_given("given", given) == {"status": "ok"}
    try:
        court.attach(here)
        with court.link.asking():
            asked = asked or [
                line.split()[1].split("(")[0].rstrip(":")
                for line in learner.splitlines()
                if line.startswith(("def ", "class "))
            ]
            answer = court.link.request(Describe(asked, sorted(court.given)))
            defined = sources.find_definitions([learner])
            court.link.outs = defined["outs"]
            court.link.operators = {  # as those of an exercise's class; comparisons are tested where they are refused
                name: [each for each in own if each in sources.COMPUTING] for name, own in defined["operators"].items()
            }
            court.take_asked(asked, court.link.decode(answer.value))
        yield court.names
    finally:
        here.close()
        os.waitpid(child, 0)
        vars(checks).update(kept[0])
        vars(BUFFERS).update(kept[1])
        distributed.at_fork.remove(court.fork_twin)
