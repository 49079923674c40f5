"""Speed of lesson 30's paged decoding kernels on this GPU, beside a copy, gathering for SDPA, and paged flex attention.

    python -m benchmarks.30_paged_attention

bfloat16, batch 32, 32 query heads on 8 key-value heads of 128, blocks of 16 and 64, 1k to 32k tokens a sequence, and
one sequence alone. TB/s count keys and values once for every way to decode, and both directions for the copy.

flex attention has pages of 128, its smallest block: PyTorch's own PagedAttention converts the mask beforehand, which is
not timed.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import Case, Goal, main
from llm40 import profile

DTYPE = torch.bfloat16
BATCH, HEADS, KV_HEADS, WIDTH = 32, 32, 8, 128
PAGES, LENGTHS = (16, 64), (1024, 4096, 16384, 32768)
FLEX_PAGE = 128
SMALL = {"BATCH": 2, "HEADS": 4, "KV_HEADS": 2, "WIDTH": 16, "PAGES": (4, 16), "LENGTHS": (40, 70), "FLEX_PAGE": 16}
OURS = "lesson 30"
GOALS = [Goal("batch", "copy", 0.80), Goal("batch", "gather + SDPA", 1.5), Goal("batch", "flex, paged", 1.2)]
Decode = Callable[[], Tensor]


def gathered(q: Tensor, k: Tensor, v: Tensor, tables: Tensor) -> Tensor:
    """Every sequence fills its table: no mask, which is the best that SDPA can get."""
    keys, values = (pool[tables.long()].transpose(1, 2).flatten(2, 3) for pool in (k, v))
    return F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)[:, :, 0]


def flex(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor) -> Decode:
    """The same keys and values in PyTorch's own pages, (1, kv_heads, slots, head_dim)."""
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch, length, device = len(q), int(lengths[0]), q.device
    columns = -(-length // FLEX_PAGE)
    pages = PagedAttention(batch * columns, FLEX_PAGE, batch, device=str(device))
    room = (1, k.shape[1], batch * columns * FLEX_PAGE, k.shape[3])
    own_k, own_v = (torch.zeros(room, dtype=k.dtype, device=device) for _ in range(2))
    places = torch.arange(length, device=device)[None]
    for row in range(batch):
        index = torch.tensor([row], device=device)
        pages.reserve(index[0], torch.tensor(length, device=device))
        found = (pool[tables[row].long()].transpose(0, 1).flatten(1, 2)[None, :, :length] for pool in (k, v))
        pages.assign(index, places, *found, own_k, own_v)

    def seen(b: Tensor, h: Tensor, q_index: Tensor, kv_index: Tensor) -> Tensor:
        return kv_index < length

    mask = create_block_mask(seen, batch, None, 1, columns * FLEX_PAGE, device=device, BLOCK_SIZE=FLEX_PAGE)
    mask = pages.convert_logical_block_mask(mask)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q[:, :, None], own_k, own_v, block_mask=mask, enable_gqa=True)[:, :, 0]


def tensors(batch: int, length: int, page: int) -> tuple[Tensor, ...]:
    """(q, k, v, tables, lengths): sequences of one length, their blocks in a random order."""
    generator = torch.Generator(profile.device).manual_seed(30)
    columns = -(-length // page)
    shape = (batch * columns, KV_HEADS, page, WIDTH)
    options = {"device": profile.device, "generator": generator}
    k, v = (torch.randn(shape, dtype=DTYPE, **options) for _ in range(2))
    q = torch.randn(batch, HEADS, WIDTH, dtype=DTYPE, **options)
    tables = torch.randperm(batch * columns, **options).view(batch, columns).to(torch.int32)
    return q, k, v, tables, torch.full((batch,), length, dtype=torch.int32, device=profile.device)


def cases(lesson: SimpleNamespace, published: bool) -> Iterator[Case]:
    lengths = (LENGTHS[1], LENGTHS[-1]) if published else LENGTHS
    for batch, page, length in [*((BATCH, p, n) for p in PAGES for n in lengths), (1, PAGES[0], LENGTHS[-1])]:
        length = -(-length // page) * page  # SDPA has no mask
        q, k, v, tables, lens = tensors(batch, length, page)
        targets = torch.empty_like(k), torch.empty_like(v)
        size = k.nbytes + v.nbytes
        functions: dict[str, Callable] = {
            OURS: lambda a=(q, k, v, tables, lens): lesson.paged_decode(*a),
            "gather + SDPA": lambda a=(q, k, v, tables): gathered(*a),
            "copy": lambda t=targets, k=k, v=v: (t[0].copy_(k), t[1].copy_(v)),
        }
        settings = {"batch": batch, "heads": f"{HEADS}/{KV_HEADS}"}
        try:
            functions["flex, paged"] = flex(q, k, v, tables, lens)
        except Exception as error:  # an experimental module: it may be another in this PyTorch
            settings["no flex"] = f"{type(error).__name__}: {error}"
        name = f"{'batch' if batch > 1 else 'one sequence,'} {batch}, blocks of {page}, {length} tokens"
        yield Case(name, OURS, functions, {"": size, "copy": 2 * size}, "TB/s", settings=settings)


if __name__ == "__main__":
    main("30", __doc__.splitlines()[0])
