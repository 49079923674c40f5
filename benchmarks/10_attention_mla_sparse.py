"""Speed of lesson 10's absorbed MLA decoding kernel on this GPU, beside a plain copy, PyTorch's products and SDPA.

    python -m benchmarks.10_attention_mla_sparse

bfloat16, batch 32, latent 512 + 64, 16 and 128 heads, 4k to 32k tokens of cache. TB/s count the cache once for every
way to decode, and both directions for the copy; TFLOP/s, where the tensor cores are the limit, 2·(576 + 512) a head and
token.
"""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import Case, Goal, main
from llm40 import profile

DTYPE = torch.bfloat16
BATCH, RANK, ROPE, SCALE = 32, 512, 64, 192**-0.5
HEADS, LENGTHS = (16, 128), (4096, 8192, 16384, 32768)
SMALL = {"BATCH": 2, "RANK": 32, "ROPE": 16, "HEADS": (3,), "LENGTHS": (40, 70)}
OURS = "lesson 10"
GOALS = [Goal("16 heads", "copy", 0.55), Goal("16 heads", "bmm", 2.0), Goal("128 heads", "bmm", 2.0)]
Decode = Callable[[Tensor, Tensor, Tensor], Tensor]


def products(q: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """Two batched products in the latent space, and what lies between them."""
    behind = torch.arange(cache.shape[1], device=q.device) >= lengths[:, None]
    scores = (torch.bmm(q, cache.transpose(1, 2)) * SCALE).masked_fill(behind[:, None], -math.inf)
    return torch.bmm(scores.float().softmax(-1).to(q.dtype), cache[..., :RANK])


def gathered(q: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
    """SDPA over the latent as one key-value head of 576; the values have the keys' width, as its kernels want."""
    seen = torch.arange(cache.shape[1], device=q.device) < lengths[:, None]
    kv = cache[:, None]
    out = F.scaled_dot_product_attention(q[:, :, None], kv, kv, seen[:, None, None], scale=SCALE, enable_gqa=True)
    return out[:, :, 0, :RANK]


def ways(lesson: SimpleNamespace) -> dict[str, Decode]:
    def ours(q: Tensor, cache: Tensor, lengths: Tensor) -> Tensor:
        return lesson.mla_decode(q, cache, lengths, RANK, SCALE)

    compiled = torch.compile(products, dynamic=False)
    return {OURS: ours, "bmm": products, "torch.compile of bmm": compiled, "SDPA, gathered": gathered}


def tensors(heads: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(profile.device).manual_seed(10)
    shapes = ((BATCH, heads, RANK + ROPE), (BATCH, length, RANK + ROPE))
    q, cache = (torch.randn(*s, device=profile.device, dtype=DTYPE, generator=generator) for s in shapes)
    return q, cache


def cases(lesson: SimpleNamespace, published: bool) -> Iterator[Case]:
    for heads in HEADS:
        for length in (LENGTHS[0], LENGTHS[-1]) if published else LENGTHS:
            q, cache = tensors(heads, length)
            lengths = torch.full((BATCH,), length, dtype=torch.int32, device=profile.device)
            target, size = torch.empty_like(cache), cache.numel() * cache.element_size()
            functions: dict[str, Callable] = {
                name: lambda way=way, q=q, cache=cache, lengths=lengths: way(q, cache, lengths)
                for name, way in ways(lesson).items()
            }
            functions["copy"] = lambda target=target, cache=cache: target.copy_(cache)
            flops = 2 * BATCH * heads * length * (2 * RANK + ROPE)
            work = {"": size, "copy": 2 * size}
            name = f"{heads} heads, {length} tokens"
            yield Case(name, OURS, functions, work, "TB/s", settings={"flops": flops, "batch": BATCH})


if __name__ == "__main__":
    main("10", __doc__.splitlines()[0])
