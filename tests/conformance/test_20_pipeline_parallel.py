"""Lesson 20's pipelines against torch.distributed.pipelining: the orders of its schedules, and gradients in real
processes, with one process beside them."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from llm40.distributed import launch  # before PyTorch's pipelines, which import Triton

PATIENCE = 60.0  # seconds: these tests share their machine
KINDS = {"F": "F", "B": "BW", "I": "B", "W": "W"}  # PyTorch's letters for a pass, and the lesson's


@pytest.fixture
def lesson(reference):
    return reference("20")


@pytest.fixture
def pipelining():
    from torch.distributed import pipelining  # once, here, and not in each rank

    return pipelining


def passes_of(actions, ranks: int) -> list[tuple]:
    """PyTorch's actions of a rank as the lesson's triples, without waiting and bookkeeping."""
    return [
        (KINDS[action.computation_type.value], action.microbatch_index, action.stage_index // ranks)
        for action in actions
        if action is not None and action.computation_type.value in KINDS
    ]


def theirs(rank: int, pipelining, ranks: int, chunks: int, schedule: str, microbatches: int) -> dict[int, list[tuple]]:
    stages = [
        pipelining.PipelineStage(nn.Linear(2, 2), chunk * ranks + rank, chunks * ranks, torch.device("cpu"))
        for chunk in range(chunks)
    ]
    given = stages if "Interleaved" in schedule else stages[0]
    made = getattr(pipelining, schedule)(given, microbatches, loss_fn=nn.functional.mse_loss)
    return {at: passes_of(actions, ranks) for at, actions in made.pipeline_order.items()}


@pytest.mark.parametrize(
    ("kind", "schedule", "ranks", "microbatches", "chunks"),
    [
        ("gpipe", "ScheduleGPipe", 3, 4, 1),
        ("1f1b", "Schedule1F1B", 3, 3, 1),
        ("1f1b", "Schedule1F1B", 4, 8, 1),
        ("interleaved", "ScheduleInterleaved1F1B", 2, 4, 2),
        ("interleaved", "ScheduleInterleaved1F1B", 3, 6, 3),
        ("interleaved", "ScheduleInterleaved1F1B", 4, 4, 2),
        ("zb-h1", "ScheduleInterleavedZeroBubble", 3, 6, 1),
        ("zb-h1", "ScheduleInterleavedZeroBubble", 4, 8, 1),
    ],
)
def test_orders(lesson, pipelining, kind, schedule, ranks, microbatches, chunks):
    orders = launch(theirs, ranks, pipelining, ranks, chunks, schedule, microbatches, timeout=PATIENCE)[0]
    ours = lesson.pipeline_schedule(ranks, microbatches, kind, chunks)
    for rank in range(ranks):
        due = orders[rank]
        if schedule == "Schedule1F1B" and rank == ranks - 1:
            # torch 2.13 writes its forward passes as 1 … m, not 0 … m − 1; it does not run by this list.
            due = [(name, i - (name == "F"), chunk) for name, i, chunk in due]
        assert ours[rank] == due, f"rank {rank}"


def make_stages(ranks: int) -> list[nn.Module]:
    torch.manual_seed(3)
    widths = [5, 7, 4, 6][: ranks + 1]
    return [nn.Sequential(nn.Linear(k, n), nn.Tanh(), nn.LayerNorm(n)).double() for k, n in pairwise(widths)]


@pytest.mark.parametrize(("kind", "schedule"), [("gpipe", "ScheduleGPipe"), ("1f1b", "Schedule1F1B")])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 5), (3, 4)])
def test_gradients(lesson, pipelining, agrees, kind, schedule, ranks, microbatches):
    """PyTorch's pipelines send contiguous tensors only, so the stages here make no others."""
    g = torch.Generator().manual_seed(1)
    inputs = torch.randn(microbatches, 2, 5, generator=g).double()
    targets = torch.randn(microbatches, 2, [0, 0, 4, 6][ranks], generator=g).double()
    order = lesson.pipeline_schedule(ranks, microbatches, kind)
    loss = nn.functional.mse_loss

    def both(rank):
        last = rank == ranks - 1
        ours, theirs = make_stages(ranks)[rank], make_stages(ranks)[rank]
        received = torch.empty(2, ours[0].in_features).double() if rank else None
        given = (None if rank else inputs, targets if last else None)
        value = lesson.run_pipeline(ours, order[rank], *given, loss, received)
        stage = pipelining.PipelineStage(theirs, rank, ranks, torch.device("cpu"))
        made = getattr(pipelining, schedule)(stage, microbatches, loss_fn=loss)
        losses: list[torch.Tensor] = []
        at_the_end = {"target": targets.flatten(0, 1), "losses": losses} if last else {}
        made.step(*[] if rank else [inputs.flatten(0, 1)], **at_the_end)
        gradients = [[p.grad for p in module.parameters()] for module in (ours, theirs)]
        return gradients, value, torch.stack(losses).mean().detach() if last else None

    whole = nn.Sequential(*make_stages(ranks))
    due = loss(whole(inputs.flatten(0, 1)), targets.flatten(0, 1))
    due.backward()
    results = launch(both, ranks, timeout=PATIENCE)
    for stage, ((ours, theirs), _, _) in zip(whole, results, strict=True):
        for mine, other, p in zip(ours, theirs, stage.parameters(), strict=True):
            agrees("run_pipeline, gradients", schedule, mine, other, 1e-12)
            agrees("run_pipeline, gradients", "one process", mine, p.grad, 1e-12)
    _, mine, other = results[-1]
    agrees("run_pipeline, loss", schedule, mine, other, 1e-12)
    agrees("run_pipeline, loss", "one process", mine, due, 1e-12)


@pytest.mark.parametrize(("p", "m"), [(4, 8), (2, 6), (8, 8), (8, 64)])
def test_closed_forms(lesson, agrees, p, m):
    """The papers' bubbles, with F = B = W = 1, and what their memory tables say."""
    idle = {"gpipe": 3 * (p - 1), "1f1b": 3 * (p - 1), "interleaved": 3 * (p - 1), "zb-h1": p - 1}
    live = {"gpipe": [m] * p, "1f1b": [p - rank for rank in range(p)], "zb-h1": [p] * p}
    for kind, due in idle.items():
        order = lesson.pipeline_schedule(p, m, kind)
        total = max(line[-1][2] for line in lesson.timeline(order))
        busy = 3 * m * (2 if kind == "interleaved" else 1)
        agrees(f"bubble of {kind}", "closed form", torch.tensor(total - busy), torch.tensor(float(due)), 0)
        assert kind not in live or list(map(lesson.most_live, order)) == live[kind]
