"""`launch`: ranks that really run, and what is left of them however it ends."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llm40 import distributed
from llm40.distributed import RankError, launch

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="launch needs fork")


def processes_of_group(leader: int) -> list[int]:
    """The processes of this machine whose process group is `leader`'s."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()}


@pytest.fixture(autouse=True)
def nothing_is_left():
    """After each test: no child more than before, alive or dead, and no file descriptor or folder more."""
    before, open_before = children(), len(os.listdir("/proc/self/fd"))
    yield
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) <= open_before  # one of an earlier test may be closed by now


# --- what ranks do


def test_results_come_in_the_order_of_ranks():
    def work(rank):
        time.sleep(0.05 * (3 - rank))  # the last rank ends first
        return rank * 10

    assert launch(work, 4) == [0, 10, 20, 30]


def test_one_rank():
    assert launch(lambda rank: (rank, dist.get_world_size()), 1) == [(0, 1)]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_reduce_and_send(ranks):
    def work(rank):
        total = torch.full((5,), float(rank + 1))
        dist.all_reduce(total)
        got = torch.empty(2, dtype=torch.int64)
        sending = dist.isend(torch.tensor([rank, rank]), (rank + 1) % ranks)
        dist.recv(got, (rank - 1) % ranks)
        sending.wait()
        return dist.get_backend(), total, got

    for rank, (backend, total, got) in enumerate(launch(work, ranks)):
        assert backend == "gloo"
        assert torch.equal(total, torch.full((5,), float(sum(range(1, ranks + 1)))))
        assert got.tolist() == [(rank - 1) % ranks] * 2


def test_arguments_and_results_of_every_plain_kind():
    weight = torch.randn(3, 4, requires_grad=True)
    model = torch.nn.Linear(4, 2)

    def work(rank, scale, add=lambda x: x + 1):
        return {
            "tensor": weight * scale,
            "view": torch.arange(10)[3:7],
            "half": torch.ones(2, dtype=torch.bfloat16),
            "list": [rank, None, "中文", b"\0"],
            "state": model.state_dict(),
            "sum": add(rank),
        }

    for rank, out in enumerate(launch(work, 2, 3.0)):
        torch.testing.assert_close(out["tensor"], weight * 3)
        assert out["view"].tolist() == [3, 4, 5, 6]
        assert out["half"].dtype == torch.bfloat16
        assert out["list"] == [rank, None, "中文", b"\0"]
        assert torch.equal(out["state"]["weight"], model.weight)
        assert out["sum"] == rank + 1


def test_a_large_result_passes_the_pipe():
    one, two = launch(lambda rank: torch.full((3_000_000,), rank), 2)
    assert one.sum() == 0
    assert two.sum() == 3_000_000


def test_backward_in_ranks_after_threads_and_backward_here():
    """A copy of a process that has used its pool of threads hangs where it waits for one of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        weight = torch.randn(600, 600, requires_grad=True)
        (weight @ weight).relu().sum().backward()  # starts this process's threads
        expected = weight.grad.clone()

        def work(rank):
            weight.grad = None
            (weight @ weight).relu().sum().backward()
            dist.all_reduce(weight.grad, op=dist.ReduceOp.SUM)
            return torch.get_num_threads(), weight.grad

        for threads, gradient in launch(work, 4):
            assert threads == 1
            torch.testing.assert_close(gradient, 4 * expected, rtol=1e-3, atol=1e-2)
        assert torch.get_num_threads() == 2
        torch.testing.assert_close(weight.grad, expected)  # what a rank changes, stays in it
    finally:
        torch.set_num_threads(before)


def test_while_other_threads_run_here():
    stop = threading.Event()
    a = torch.ones(60, 60)
    thread = threading.Thread(target=lambda: [a @ a for _ in iter(stop.is_set, True)])
    thread.start()
    try:
        assert launch(lambda rank: float((a @ a).sum()), 2) == [216000.0] * 2
    finally:
        stop.set()
        thread.join()


def test_launch_from_a_thread_of_its_own():
    """As the grader's checks run."""
    results = []
    thread = threading.Thread(target=lambda: results.extend(launch(lambda rank: rank, 2)))
    thread.start()
    thread.join()
    assert results == [0, 1]


def test_distributed_data_parallel_of_pytorch():
    torch.manual_seed(0)
    model, data = torch.nn.Linear(3, 1), torch.randn(8, 3)
    model(data).square().mean().backward()

    def work(rank):
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        wrapped.zero_grad()
        wrapped(data.chunk(2)[rank]).square().mean().backward()
        return model.weight.grad

    for gradient in launch(work, 2):
        torch.testing.assert_close(gradient, model.weight.grad)


def test_what_ranks_print_appears_here_line_by_line(capsys):
    def work(rank):
        print("one", rank)
        print("two", end="")
        print("three", file=sys.stderr)
        print("四", end="")

    launch(work, 2)
    lines = capsys.readouterr().out.splitlines()
    for rank in range(2):
        assert [line for line in lines if line.startswith(f"rank {rank}")] == [
            f"rank {rank}: one {rank}",
            f"rank {rank}: twothree",
            f"rank {rank}: 四",
        ]


def test_hooks_run_on_both_sides(monkeypatch):
    here, prepared = [], []
    monkeypatch.setattr(
        distributed,
        "at_fork",
        [
            lambda rank, ranks: here.append((rank, ranks)),
            lambda rank, ranks: lambda: prepared.append((rank, dist.is_initialized())),
        ],
    )
    assert launch(lambda rank: prepared, 2) == [[(0, False)], [(1, False)]]
    assert here == [(0, 2), (1, 2)]
    assert prepared == []


def test_starts_fast():
    launch(lambda rank: None, 4)
    times = []
    for _ in range(3):
        began = time.monotonic()
        launch(lambda rank: dist.barrier(), 4)
        times.append(time.monotonic() - began)
    assert min(times) < 2, times  # 0.2 s on a quiet machine; spawned instead of forked, over 6


# --- how it goes wrong


def test_a_rank_that_raises_ends_the_launch_with_its_own_traceback():
    def deep(rank):
        raise ValueError(f"rank {rank} met a shape that does not fit")

    def work(rank):
        if rank == 2:
            deep(rank)
        dist.barrier()  # would wait for ever

    began = time.monotonic()
    with pytest.raises(ValueError, match="rank 2 met a shape") as caught:
        launch(work, 4, timeout=60)
    assert time.monotonic() - began < 5  # under a second on a quiet machine, and never the time limit
    assert "in deep" in str(caught.value.__cause__)
    assert "(raised in rank 2)" in caught.value.__notes__
    assert "Connection" not in str(caught.value.__cause__)


def test_the_first_error_is_the_one_told():
    def work(rank):
        if rank == 1:
            raise KeyError("first")
        dist.all_reduce(torch.ones(1))

    for _ in range(5):
        with pytest.raises(KeyError, match="first"):
            launch(work, 3)


class TwoArguments(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def test_tensors_of_different_sizes_are_told():
    def reduce(rank):
        dist.all_reduce(torch.ones(20_000 - 10_000 * rank))

    with pytest.raises(
        RankError, match=r"rank 1 was killed by SIGABRT \(gloo ends a rank that is sent more than it exp"
    ):
        launch(reduce, 2)


def test_a_lost_connection_is_told_without_a_port():
    def lose(rank):
        if rank == 0:
            raise RuntimeError("Read error [127.0.0.1]:12708: Connection reset by peer. GLHF!")
        dist.recv(torch.ones(1), 0)

    begun = time.monotonic()
    with pytest.raises(RankError, match=r"^rank 0 lost its connection within a collective") as caught:
        launch(lose, 2)
    assert "12708" in str(caught.value.__cause__)
    assert time.monotonic() - begun < 10


def test_an_exception_that_cannot_be_handed_over_is_told():
    class Local(Exception):
        pass

    def raises(error):
        def work(rank):
            raise error

        return work

    with pytest.raises(RankError, match=r"rank 0 raised .*Local: lost"):
        launch(raises(Local("lost")), 1)
    with pytest.raises(RankError, match=r"rank 0 raised .*TwoArguments: a and b"):
        launch(raises(TwoArguments("a", "b")), 1)
    with pytest.raises(RankError, match="rank 0 raised SystemExit: 3"):
        launch(lambda rank: sys.exit(3), 1)
    with pytest.raises(AssertionError, match="weights must sum to 1"):
        launch(raises(AssertionError("weights must sum to 1")), 2)


def test_a_result_that_cannot_be_handed_back_is_told():
    with pytest.raises(TypeError, match=r"rank 0 returns a function that cannot be handed back .* numbers, strings"):
        launch(lambda rank: lambda: rank, 1)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "rank 1 was killed by SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "rank 1 was killed by SIGSEGV"),
        (lambda: os._exit(3), "rank 1 left with exit code 3"),
    ],
)
def test_a_rank_that_dies_is_told(end, said):
    def work(rank):
        if rank == 1:
            end()
        dist.barrier()

    began = time.monotonic()
    with pytest.raises(RankError, match=f"{said} before its function returned") as caught:
        launch(work, 3, timeout=60)
    assert time.monotonic() - began < 5
    assert ("in work" in str(caught.value)) == ("SIGSEGV" in said)  # where it crashed


def waits_for_a_barrier_that_nobody_else_calls():
    dist.barrier()


def test_a_rank_that_hangs_is_told_with_the_place():
    def work(rank):
        if rank != 1:
            waits_for_a_barrier_that_nobody_else_calls()

    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"after 1\.5 s ranks 0, 2 of 3 had not ended \(the other 1 had\)") as caught:
        launch(work, 3, timeout=1.5)
    assert time.monotonic() - began < 5
    assert str(caught.value).count("in waits_for_a_barrier_that_nobody_else_calls") == 2


def test_a_rank_that_computes_for_ever_or_ignores_signals_is_ended():
    def work(rank):
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)
        while True:
            pass

    with pytest.raises(TimeoutError, match=r"ranks 0, 1 of 2 had not ended \(none had\)"):
        launch(work, 2, timeout=0.5)


def test_what_a_rank_has_started_goes_with_it():
    before = set(processes_with("llm40_left_behind"))

    def work(rank):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "llm40_left_behind"])
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()

    launch(work, 2)
    deadline = time.monotonic() + 5
    while (left := set(processes_with("llm40_left_behind")) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def processes_with(word: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            pass
    return found


LAUNCHING = """
    import os, signal, sys, time
    from llm40.distributed import launch
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background was started without it
    def work(rank):
        print("running", os.getpid(), flush=True)
        while True:
            time.sleep(0.01) if rank else None
    try:
        launch(work, 3, timeout=60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        time.sleep(60)
"""


def started() -> tuple[subprocess.Popen, list[int]]:
    """A process that launches three ranks, and the ranks' numbers. It leads a process group, as in a terminal."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LAUNCHING)], stdout=subprocess.PIPE, text=True, process_group=0
    )
    ranks = [int(process.stdout.readline().split()[-1]) for _ in range(3)]
    return process, ranks


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_nothing_runs_on_after_ctrl_c():
    process, ranks = started()
    try:
        assert all(map(alive, ranks))
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        assert process.stdout.readline() == "interrupted\n"
        assert not any(map(alive, ranks))
        assert processes_of_group(process.pid) == [process.pid]  # it lives on, alone
    finally:
        process.kill()
        process.communicate()


def test_nothing_runs_on_after_the_launching_process_is_killed():
    process, ranks = started()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 5
    while any(map(alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, ranks))


@pytest.mark.parametrize("ranks", [0, -1, 2.0, "2"])
def test_a_number_of_ranks_that_is_none(ranks):
    with pytest.raises(ValueError, match="number of processes, 1 or more"):
        launch(lambda rank: None, ranks)


def test_a_folder_with_spaces_and_chinese(tmp_path, monkeypatch):
    folder = tmp_path / "临时 files"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    assert launch(lambda rank: rank, 2) == [0, 1]
    assert not list(folder.iterdir())
