"""What the checks of a lesson are made of.

Every helper raises AssertionError with a sentence for the learner: what is wrong, where, and — where the check knows
it — which mistake gives exactly this. A helper never believes the value it is given: results must be plain tensors,
arrays or numbers, expected values are computed by the check, inputs are compared with copies taken before.

A helper meets what a learner wrote only by calling it, by reading its attributes and items, through nn.Module's public
surface, and by launching kernels. `allocations`, `calls`, `forbidden`, `launches`, `moved`, `traffic`, `saved`, `flops`
and `compiled` also watch what happens inside such a call; what they measured are plain numbers and texts. `measured`
marks a lesson's own.

| question | helper |
|---|---|
| Is it this value? | `close`, `relative_l2`, `number`, `drawn`, `gradients` |
| Is it this kind of thing? | `kind`, `parts`, `raises` |
| What did the call do to what it was given? | `unchanged`, `kept`, `keeps_dtype`, `uses_generator` |
| How much work was it? | `allocations`, `calls`, `forbidden`, `launches`, `saved`, `flops`, `moved`, `traffic` |
| Does a kernel keep to its buffers, and would a GPU run it? | `buffers`, `guarded`, `guarded_allocations`, `compiled` |
| What do processes send, and hold? | `on_ranks`, `communication`, `held_elements` |
| Does a server of theirs answer? | `reachable` |
| Random inputs | `seed`, `generator`, `randn` |
"""

from llm40.checks.behavior import gradients, keeps_dtype, kept, raises, unchanged, uses_generator
from llm40.checks.buffers import Buffers, Guarded, buffers, guarded, guarded_allocations
from llm40.checks.compiler import compiled
from llm40.checks.inputs import generator, randn, seed
from llm40.checks.ranks import PATIENCE, communication, held_elements, on_ranks
from llm40.checks.server import reachable
from llm40.checks.values import HALF, RTOL, close, drawn, kind, number, parts, relative_l2
from llm40.checks.work import (
    Allocations,
    Flops,
    Launches,
    Moved,
    Saved,
    Traffic,
    addresses,
    allocations,
    calls,
    flops,
    forbidden,
    launches,
    measured,
    moved,
    saved,
    traffic,
)

__all__ = [
    "HALF",
    "PATIENCE",
    "RTOL",
    "Allocations",
    "Buffers",
    "Flops",
    "Guarded",
    "Launches",
    "Moved",
    "Saved",
    "Traffic",
    "addresses",
    "allocations",
    "buffers",
    "calls",
    "close",
    "communication",
    "compiled",
    "drawn",
    "flops",
    "forbidden",
    "generator",
    "gradients",
    "guarded",
    "guarded_allocations",
    "held_elements",
    "keeps_dtype",
    "kept",
    "kind",
    "launches",
    "measured",
    "moved",
    "number",
    "on_ranks",
    "parts",
    "raises",
    "randn",
    "reachable",
    "relative_l2",
    "saved",
    "seed",
    "traffic",
    "unchanged",
    "uses_generator",
]
