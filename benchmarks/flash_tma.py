"""Lesson 29's forward kernel with tensor descriptors: tiles are fetched by Hopper's copy engine (TMA), not by threads.

A second version, measured beside the lesson's in `benchmarks.29_flash_attention`. A descriptor knows a matrix's
address, shape and strides; a load names a corner and gets a tile, 0 outside the matrix, without a pointer or a mask in
any thread. It asks for a base at a multiple of 16 bytes and row strides that are multiples of 16 bytes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from llm40 import profile, tl, triton
from llm40.kernels import autotuned

SIZES = ((128, 64, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 4))
CONFIGS = tuple(
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages) for m, n, warps, stages in SIZES
)


@triton.jit
def flash_tma_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row,
    v_batch, v_head, v_row, o_batch, o_head, o_row, group, q_len, k_len, scale,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As flash_forward_kernel of lesson 29, with HEAD_DIM a power of two, from 16 up."""
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if CAUSAL:
        tile = tl.num_programs(1) - 1 - tile
    start_m = tile * BLOCK_M
    rows = start_m + tl.arange(0, BLOCK_M)
    kv_head = head // group
    qs = tl.make_tensor_descriptor(
        q_ptr + batch * q_batch + head * q_head, [q_len, HEAD_DIM], [q_row, 1], [BLOCK_M, HEAD_DIM]
    )
    ks = tl.make_tensor_descriptor(
        k_ptr + batch * k_batch + kv_head * k_head, [k_len, HEAD_DIM], [k_row, 1], [BLOCK_N, HEAD_DIM]
    )
    vs = tl.make_tensor_descriptor(
        v_ptr + batch * v_batch + kv_head * v_head, [k_len, HEAD_DIM], [v_row, 1], [BLOCK_N, HEAD_DIM]
    )
    os = tl.make_tensor_descriptor(
        o_ptr + batch * o_batch + head * o_head, [q_len, HEAD_DIM], [o_row, 1], [BLOCK_M, HEAD_DIM]
    )
    q = qs.load([start_m, 0])
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    shift = k_len - q_len
    full, end = k_len, k_len
    if CAUSAL:
        full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
        end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)
    full = full // BLOCK_N * BLOCK_N
    scale_log2 = scale * 1.4426950408889634
    for EDGE in tl.static_range(2):
        if EDGE:
            lo, hi = full, end
        else:
            lo, hi = 0, full
        for start_n in range(lo, hi, BLOCK_N):
            k = ks.load([start_n, 0])
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            if EDGE:
                keys = start_n + tl.arange(0, BLOCK_N)
                seen = keys[None, :] < k_len
                if CAUSAL:
                    seen = seen & (keys[None, :] <= rows[:, None] + shift)
                s = tl.where(seen, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, axis=1) * scale_log2)
            base = m_new
            if EDGE:
                base = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s * scale_log2 - base[:, None])
            alpha = tl.exp2(m - base)
            l = l * alpha + tl.sum(p, axis=1)
            v = vs.load([start_n, 0])
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            m = m_new
    some = l > 0
    l = tl.where(some, l, 1.0)
    os.store([start_m, 0], (acc / l[:, None]).to(o_ptr.dtype.element_ty))
    lse_ptr += (batch * tl.num_programs(0) + head) * q_len
    tl.store(lse_ptr + rows, tl.where(some, m + tl.log2(l), float("-inf")), mask=rows < q_len)


def scratch(size: int, alignment: int, stream: Any) -> Tensor:
    """Where descriptors that a kernel makes lie; PyTorch's memory is aligned to 512 bytes."""
    return torch.empty(size, dtype=torch.int8, device=profile.device)


def fits(*tensors: Tensor) -> bool:
    """Whether the copy engine can fetch tiles of these (batch, heads, length, head_dim)."""
    width = tensors[0].shape[-1]
    return width >= 16 and width & (width - 1) == 0 and all(
        t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
        for t in tensors
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, blocks: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """(o, lse) as lesson 29's flash_forward; bfloat16 or float16."""
    if not fits(q, k, v):
        raise ValueError("the tensors' strides are no multiples of 16 bytes, or the head dimension no power of two")
    triton.set_allocator(scratch)
    batch, heads, q_len, width = q.shape
    o = torch.empty_like(q)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    strides = [stride for t in (q, k, v, o) for stride in t.stride()[:3]]
    sizes = heads // k.shape[1], q_len, k.shape[2], 1 / math.sqrt(width)

    def grid(meta):
        return heads, triton.cdiv(q_len, meta["BLOCK_M"]), batch

    constants = {"HEAD_DIM": width, "CAUSAL": causal}
    if blocks:
        flash_tma_kernel[grid](q, k, v, o, lse, *strides, *sizes, **constants, BLOCK_M=blocks[0], BLOCK_N=blocks[1])
    else:
        lengths = tuple(triton.next_power_of_2(t.shape[2]) for t in (q, k))
        tuned = autotuned(flash_tma_kernel, CONFIGS, ("HEAD_DIM", "CAUSAL"), bucket=lengths)
        tuned[grid](q, k, v, o, lse, *strides, *sizes, **constants)
    return o, lse


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with torch.no_grad():
        return forward(q.detach(), k.detach(), v.detach(), causal)[0]
