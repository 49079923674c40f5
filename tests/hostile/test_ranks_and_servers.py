"""Ranks and servers where learners' code is graded: no network but loopback, few processes, a time limit."""

import cheatable
import pytest
from box import gone, printed

from autograder.execute import Limits, Outcome, Step, execute

RANKS = """
import time, torch
import torch.distributed as dist
from llm40.distributed import launch
"""
LIMITS = Limits(cell=30, notebook=180, grace=1)


@pytest.fixture
def run():
    """Runs cells in one sandboxed kernel of the grader's own, after RANKS."""

    def run(*sources: str) -> list[Outcome]:
        imported, *done = execute([Step(source) for source in (RANKS, *sources)], LIMITS, managers=cheatable.KERNELS)
        assert imported.status == "ok", imported
        return done

    return run


def test_four_ranks_reduce_and_run_backward(run):
    (done,) = run(
        """
weight = torch.ones(3, 3, requires_grad=True)
def work(rank):
    (weight * (rank + 1)).sum().backward()
    dist.all_reduce(weight.grad)
    return weight.grad[0, 0].item()
print(launch(work, 4))
""",
    )
    assert printed(done) == "[10.0, 10.0, 10.0, 10.0]\n"


def test_what_ranks_print_comes_out(run):
    (done,) = run("launch(lambda rank: print('hello', rank), 2)")
    assert sorted(printed(done).splitlines()) == ["rank 0: hello 0", "rank 1: hello 1"]


def test_a_rank_that_raises_or_hangs_ends_the_launch(run):
    raised, hung, after = run(
        """
def work(rank):
    if rank == 1:
        raise ValueError("a shape that does not fit")
    dist.barrier()
began = time.monotonic()
try:
    launch(work, 3)
finally:
    assert time.monotonic() - began < 5
""",
        "launch(lambda rank: dist.barrier() if rank else None, 2, timeout=1)",
        "print(launch(lambda rank: rank, 2))",
    )
    assert (raised.status, raised.ename, raised.evalue) == ("error", "ValueError", "a shape that does not fit")
    assert hung.ename == "TimeoutError"
    assert "rank 1 of 2 had not ended (the other 1 had)" in hung.evalue
    assert printed(after) == "[0, 1]\n"


def test_a_launch_that_outlasts_its_cell_leaves_nothing(run):
    """The cell's own time limit comes first: the kernel is interrupted, and the ranks go with the launch."""
    word = "llm40 rank beyond its cell"
    late, after = run(
        f"""
import subprocess, sys
def work(rank):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", {word!r}])
    time.sleep(600)
launch(work, 2, timeout=600)
""",
        "print(launch(lambda rank: rank, 2))",
    )
    assert late.status == "timeout"
    assert printed(after) == "[0, 1]\n"
    assert gone(word)


LESSON = """
# %%
import torch
import torch.distributed as dist

from llm40 import checks
from llm40.distributed import launch

# %% exercise="total" minutes=5 difficulty=1
def total(tensor):
    ### BEGIN SOLUTION
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor
    ### END SOLUTION

# %% check="total" points=2
results = launch(lambda rank: total(torch.tensor([1.0, float(rank)])), 2, timeout=5)
for rank, result in enumerate(results):
    checks.close(result, torch.tensor([2.0, 1.0]), what=f"the total on rank {rank}")
### BEGIN HIDDEN TESTS
g = checks.generator(1)
shards = torch.randn(3, 5, generator=g)
for result in launch(lambda rank: total(shards[rank].clone()), 3, timeout=5):
    checks.close(result, shards.sum(0), what="the total of three ranks")
### END HIDDEN TESTS
"""


def test_a_check_launches_ranks(monkeypatch):
    """Graded as a class is: each of the judge's ranks meets a twin of the learner's process."""
    monkeypatch.setattr(cheatable, "TEXT", LESSON)
    cheatable.full_marks(cheatable.graded(cheatable.answered()))

    def told(answer: str) -> str:
        result = cheatable.graded(cheatable.answered({"total": f"def total(tensor):\n{answer}"}))
        cheatable.nothing_gained(result, ["total"])
        assert not result.flags
        return result.checks[0].message

    assert "the total on rank" in told("    return tensor")
    assert "no such thing" in told("    raise ValueError('no such thing')")
    assert "had not ended" in told("    dist.all_reduce(tensor) if dist.get_rank() else None\n    return tensor")


SERVE = """
    class Sum(BaseHTTPRequestHandler):
        def log_message(self, *about):
            pass

        def do_POST(self):
            numbers = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(sum(numbers)).encode())

    path = os.path.join(tempfile.mkdtemp(), "server")
    threading.Thread(target=UnixStreamServer(path, Sum).serve_forever, daemon=True).start()
    return path
"""
SERVER = f"""
# %%
import json
import os
import tempfile
import threading
from http.server import BaseHTTPRequestHandler
from socketserver import UnixStreamServer

import httpx

from llm40 import checks

# %% exercise="serve" minutes=5 difficulty=1
def serve() -> str:
    ### BEGIN SOLUTION
{SERVE}
    ### END SOLUTION

# %% check="serve" points=2
with checks.reachable(serve()) as path, httpx.Client(transport=httpx.HTTPTransport(uds=path)) as client:
    checks.number(client.post("http://lesson/", json=[1, 2, 3], timeout=5).json(), 6, what="the sum of 1, 2 and 3")
### BEGIN HIDDEN TESTS
    checks.number(client.post("http://lesson/", json=[7] * 50_000, timeout=5).json(), 350_000, what="a long sum")
### END HIDDEN TESTS
"""


def test_a_check_talks_to_a_server(monkeypatch):
    """The server runs in the learner's process, the client in the judge's."""
    monkeypatch.setattr(cheatable, "TEXT", SERVER)
    cheatable.full_marks(cheatable.graded(cheatable.answered()))
    for old, new in (("sum(numbers)", "len(numbers)"), ("target=UnixStreamServer(path, Sum).serve_forever", "")):
        result = cheatable.graded(cheatable.answered({"serve": f"def serve():\n{SERVE.replace(old, new)}"}))
        cheatable.nothing_gained(result, ["serve"])
