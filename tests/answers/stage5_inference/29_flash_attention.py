# %% [markdown]
# Answers to lesson 29. Each cell stands in for an exercise cell, whole. The wrong kernels are the lesson's own with one mistake made.

# %% wrong="online_softmax" because="keeps the old sum when the maximum rises" base="keeps-old"
def online_softmax(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    m = x.new_full(x.shape[:-1], -math.inf)
    l = x.new_zeros(x.shape[:-1])
    for start in range(0, x.shape[-1], block):
        part = x[..., start : start + block]
        m_new = torch.maximum(m, part.amax(dim=-1))
        shift = m_new.masked_fill(m_new == -math.inf, 0)
        l = l + torch.exp(part - shift[..., None]).sum(dim=-1)
        m = m_new
    return m, l

# %% wrong="online_softmax" because="rescales by exp(m' - m), upside down" of="keeps-old"
- l = l + torch.exp(part - shift[..., None]).sum(dim=-1)
+ l = l * torch.exp(shift - m) + torch.exp(part - shift[..., None]).sum(dim=-1)

# %% wrong="online_softmax" because="subtracts -inf from -inf" of="keeps-old"
- shift = m_new.masked_fill(m_new == -math.inf, 0)
- l = l + torch.exp(part - shift[..., None]).sum(dim=-1)
+ shift = m_new
+ l = l * torch.exp(m - shift) + torch.exp(part - shift[..., None]).sum(dim=-1)

# %% wrong="online_softmax" because="the block's maximum, not the running one" of="keeps-old"
- m_new = torch.maximum(m, part.amax(dim=-1))
+ m_new = part.amax(dim=-1)

- l = l + torch.exp(part - shift[..., None]).sum(dim=-1)
+ l = l * torch.exp(m - shift) + torch.exp(part - shift[..., None]).sum(dim=-1)

# %% wrong="online_softmax" because="two passes, with the whole row exponentiated"
def online_softmax(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    m = x.amax(dim=-1)
    shift = m.masked_fill(m == -math.inf, 0)
    return m, torch.exp(x - shift[..., None]).sum(dim=-1)

# %% wrong="online_softmax" because="drops the last, shorter block" of="keeps-old"
- for start in range(0, x.shape[-1], block):
+ for start in range(0, x.shape[-1] - block + 1, block):

- l = l + torch.exp(part - shift[..., None]).sum(dim=-1)
+ l = l * torch.exp(m - shift) + torch.exp(part - shift[..., None]).sum(dim=-1)

# %% wrong="online_softmax" because="starts from -10,000 in place of minus infinity"
- m = x.new_full(x.shape[:-1], -math.inf)
+ m = x.new_full(x.shape[:-1], -1e4)
- return m, l
+ return m.masked_fill(l == 0, -math.inf), l

# %% wrong="online_softmax" because="keeps the logarithm of the sum, by logaddexp: no digits where |m| is large"
def online_softmax(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    m, log_sum = x[..., 0], x[..., 0]
    for start in range(1, x.shape[-1], block):
        part = x[..., start : start + block]
        m = torch.maximum(m, part.amax(dim=-1))
        log_sum = torch.logaddexp(log_sum, part.logsumexp(dim=-1))
    return m, torch.where(
        m == -math.inf, 0.0, torch.exp(log_sum - m.masked_fill(m == -math.inf, 0))
    )

# %% wrong="online_softmax" because="the statistics are kept and returned in float64"
- m = x.new_full(x.shape[:-1], -math.inf)
- l = x.new_zeros(x.shape[:-1])
+ m = torch.full(x.shape[:-1], -math.inf, dtype=torch.float64, device=x.device)
+ l = torch.zeros_like(m)

- part = x[..., start : start + block]
+ part = x[..., start : start + block].double()

# %% wrong="merge_partials" because="adds the sums without a common maximum" base="adds-sums"
def merge_partials(
    a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    (m_a, l_a, o_a), (m_b, l_b, o_b) = a, b
    m = torch.maximum(m_a, m_b)
    shift = m.masked_fill(m == -math.inf, 0)
    w_a, w_b = torch.exp(m_a - shift), torch.exp(m_b - shift)
    return m, l_a + l_b, o_a + o_b

# %% wrong="merge_partials" because="rescales l and forgets o" of="adds-sums"
- return m, l_a + l_b, o_a + o_b
+ return m, l_a * w_a + l_b * w_b, o_a + o_b

# %% wrong="merge_partials" because="two empty parts give NaN"
def merge_partials(
    a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    (m_a, l_a, o_a), (m_b, l_b, o_b) = a, b
    m = torch.maximum(m_a, m_b)
    shift = m
    w_a, w_b = torch.exp(m_a - shift), torch.exp(m_b - shift)
    return m, l_a * w_a + l_b * w_b, o_a * w_a[..., None] + o_b * w_b[..., None]

# %% wrong="merge_partials" because="takes the first part's maximum for both"
def merge_partials(
    a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    (m_a, l_a, o_a), (m_b, l_b, o_b) = a, b
    m = m_a
    shift = m.masked_fill(m == -math.inf, 0)
    w_a, w_b = torch.exp(m_a - shift), torch.exp(m_b - shift)
    return m, l_a * w_a + l_b * w_b, o_a * w_a[..., None] + o_b * w_b[..., None]

# %% wrong="merge_partials" because="weights by the other part's factor" of="adds-sums"
- return m, l_a + l_b, o_a + o_b
+ return m, l_a * w_b + l_b * w_a, o_a * w_b[..., None] + o_b * w_a[..., None]

# %% wrong="merge_partials" because="works in place on the first part" of="adds-sums"
- return m, l_a + l_b, o_a + o_b
+ return m, l_a.mul_(w_a).add_(l_b * w_b), o_a.mul_(w_a[..., None]).add_(o_b * w_b[..., None])

# %% right="merge_partials" because="stacks both parts and sums over the new axis"
def merge_partials(a, b):
    ms, ls, os = (torch.stack(pair) for pair in zip(a, b, strict=True))
    m = ms.amax(dim=0)
    weights = torch.where(ms == -math.inf, 0.0, torch.exp(ms - torch.where(m == -math.inf, 0.0, m)))
    return m, (weights * ls).sum(dim=0), (weights[..., None] * os).sum(dim=0)

# %% wrong="merge_partials" because="merged and returned in float64"
- (m_a, l_a, o_a), (m_b, l_b, o_b) = a, b
+ (m_a, l_a, o_a), (m_b, l_b, o_b) = ([t.double() for t in part] for part in (a, b))

# %% wrong="tiled_attention" because="no scale"
- q_tile = q[:, :, i : i + block_q].to(work) / math.sqrt(head_dim)
+ q_tile = q[:, :, i : i + block_q].to(work)

# %% wrong="tiled_attention" because="divides by head_dim, not its root"
- q_tile = q[:, :, i : i + block_q].to(work) / math.sqrt(head_dim)
+ q_tile = q[:, :, i : i + block_q].to(work) / head_dim

# %% wrong="tiled_attention" because="aligns the causal mask to the start"
- shift = k_len - q_len
+ shift = 0

# %% wrong="tiled_attention" because="as many key tiles as its own index + 1"
- end = min(k_len, i + q_tile.shape[2] + shift) if causal else k_len
+ end = min(k_len, (i // block_q + 1) * block_k + shift) if causal else k_len

# %% wrong="tiled_attention" because="visits the tiles above the diagonal"
- end = min(k_len, i + q_tile.shape[2] + shift) if causal else k_len
+ end = k_len

# %% wrong="tiled_attention" because="the tile's maximum, not the running one"
- m_new = torch.maximum(m, s.amax(dim=-1))
+ m_new = s.amax(dim=-1)

# %% wrong="tiled_attention" because="the accumulator is not rescaled"
- acc = alpha[..., None] * acc + p @ v_tile
+ acc = acc + p @ v_tile

# %% wrong="tiled_attention" because="lse in base 2"
- lse[:, :, i : i + block_q] = m + torch.log(l)
+ lse[:, :, i : i + block_q] = (m + torch.log(l)) / math.log(2)

# %% wrong="tiled_attention" because="rows that see nothing give NaN"
- base = m_new.masked_fill(m_new == -math.inf, 0)
+ base = m_new

# %% wrong="tiled_attention" because="lse without the maximum"
- lse[:, :, i : i + block_q] = m + torch.log(l)
+ lse[:, :, i : i + block_q] = torch.log(l)

# %% wrong="tiled_attention" because="float16 stays float16"
- work = torch.promote_types(q.dtype, torch.float32)
+ work = q.dtype

# %% wrong="tiled_attention" because="forms the whole matrix of scores"
def tiled_attention(q, k, v, block_q, block_k, causal=False):
    s = q.float() @ k.float().mT / math.sqrt(q.shape[-1])
    if causal:
        s = s.masked_fill(
            ~torch.ones(s.shape[-2:], dtype=torch.bool).tril(k.shape[-2] - q.shape[-2]), -math.inf
        )
    lse = s.logsumexp(dim=-1)
    return (torch.nan_to_num(torch.softmax(s, dim=-1)) @ v.float()).to(q.dtype), lse

# %% wrong="tiled_attention" because="PyTorch's own attention"
def tiled_attention(q, k, v, block_q, block_k, causal=False):
    o = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    lse = torch.logsumexp(q.float() @ k.float().mT / math.sqrt(q.shape[-1]), dim=-1)
    return o, lse

# %% right="tiled_attention" because="merges normalized parts by their lse, keys from right to left"
def tiled_attention(q, k, v, block_q, block_k, causal=False):
    q_len, k_len, scale = q.shape[2], k.shape[2], q.shape[3] ** -0.5
    outputs, sums = [], []
    for i in range(0, q_len, block_q):
        tile = q[:, :, i : i + block_q].to(torch.promote_types(q.dtype, torch.float32))
        stop = i + tile.shape[2]
        o = torch.zeros_like(tile)
        lse = torch.full_like(tile[..., 0], -math.inf)
        starts = [
            j for j in range(0, k_len, block_k) if not causal or j <= stop - 1 + k_len - q_len
        ]
        for j in reversed(starts):
            s = (
                torch.einsum("bhid,bhjd->bhij", tile, k[:, :, j : j + block_k].to(tile.dtype))
                * scale
            )
            if causal:
                hidden = (
                    torch.arange(j, j + s.shape[3])[None] - torch.arange(i, stop)[:, None]
                    > k_len - q_len
                )
                s = torch.where(hidden.to(s.device), -math.inf, s)
            part = s.logsumexp(dim=-1)
            new = torch.logaddexp(lse, part)
            safe = torch.where(new == -math.inf, 0.0, new)
            weights = torch.exp(s - safe[..., None])
            o = o * torch.exp(lse - safe)[..., None] + torch.einsum(
                "bhij,bhjd->bhid", weights, v[:, :, j : j + block_k].to(tile.dtype)
            )
            lse = new
        outputs.append(o.to(q.dtype))
        sums.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)

# %% wrong="tiled_attention" because="bfloat16 stays bfloat16"
- work = torch.promote_types(q.dtype, torch.float32)
+ work = torch.float32 if q.dtype == torch.float16 else q.dtype

# %% wrong="tiled_attention" because="the maximum counts hidden keys, whose weights are set to 0 afterwards"
- s = s.masked_fill(keys > rows[:, None] + shift, -math.inf)
+ hidden = keys > rows[:, None] + shift

- p = torch.exp(s - base[..., None])
+ p = torch.exp(s - base[..., None])
+ p = p.masked_fill(hidden, 0) if causal else p

# %% wrong="hbm_bytes" because="counts numbers, not bytes" base="counts-numbers"
def hbm_bytes(S: int, D: int, M: int, kind: str) -> int:
    if kind == "standard":
        return 4 * S * D + 4 * S * S
    if kind == "flash":
        tile = min(S, M // (2 * 4 * D))
        if tile < 1:
            raise ValueError(f"{M} bytes cannot hold four tiles of one row of {D} numbers")
        query_tiles = -(-S // tile)
        return 2 * (2 * S * D + 2 * S * D * query_tiles) + 4 * S
    raise ValueError(f"kind is {kind!r}: it can be 'standard' or 'flash'")

# %% wrong="hbm_bytes" because="takes M for a number of elements" of="counts-numbers"
- return 4 * S * D + 4 * S * S
+ return 2 * (4 * S * D + 4 * S * S)

- tile = min(S, M // (2 * 4 * D))
+ tile = min(S, M // (4 * D))

# %% wrong="hbm_bytes" because="reads K and V once" of="counts-numbers"
- return 4 * S * D + 4 * S * S
+ return 2 * (4 * S * D + 4 * S * S)

- return 2 * (2 * S * D + 2 * S * D * query_tiles) + 4 * S
+ return 2 * (2 * S * D + 2 * S * D) + 4 * S

# %% wrong="hbm_bytes" because="rounds the number of query tiles down" of="counts-numbers"
- return 4 * S * D + 4 * S * S
+ return 2 * (4 * S * D + 4 * S * S)

- query_tiles = -(-S // tile)
+ query_tiles = S // tile

# %% wrong="hbm_bytes" because="forgets that the softmax reads and writes" of="counts-numbers"
- return 4 * S * D + 4 * S * S
+ return 2 * (4 * S * D + 2 * S * S)

# %% wrong="hbm_bytes" because="tiles of no rows are not refused"
def hbm_bytes(S: int, D: int, M: int, kind: str) -> int:
    if kind == "standard":
        return 2 * (4 * S * D + 4 * S * S)
    if kind == "flash":
        tile = min(S, M // (2 * 4 * D))
        tile = max(tile, 1)
        query_tiles = -(-S // tile)
        return 2 * (2 * S * D + 2 * S * D * query_tiles) + 4 * S
    raise ValueError(f"kind is {kind!r}: it can be 'standard' or 'flash'")

# %% wrong="hbm_bytes" because="the standard way is refused too where no tile fits"
- if kind == "standard":
-     return 2 * (4 * S * D + 4 * S * S)
+ if M < 2 * 4 * D:
+     raise ValueError(f"{M} bytes cannot hold four tiles")
+ if kind == "standard":
+     return 2 * (4 * S * D + 4 * S * S)

# %% right="hbm_bytes" because="adds up tile by tile"
def hbm_bytes(S, D, M, kind):
    if kind not in ("standard", "flash"):
        raise ValueError(kind)
    matrix = 2 * S * D
    if kind == "standard":
        scores = 2 * S * S
        return (2 * matrix + scores) + (scores + scores) + (scores + matrix + matrix)
    rows = 0
    while rows < S and 4 * (rows + 1) * D * 2 <= M:
        rows += 1
    if rows == 0:
        raise ValueError(M)
    total = 0
    for start in range(0, S, rows):
        here = min(rows, S - start)
        total += 2 * (2 * here * D) + 2 * matrix + 4 * here
    return total

# %% wrong="flash_forward_kernel" because="loop bound (tile + 1) * BLOCK_N" base="loop-bound"
@triton.jit
def flash_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    o_batch,
    o_head,
    o_row,
    group,
    q_len,
    k_len,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if CAUSAL:
        tile = tl.num_programs(1) - 1 - tile
    start_m = tile * BLOCK_M
    rows = start_m + tl.arange(0, BLOCK_M)
    q = load_tile(
        q_ptr + batch * q_batch + head * q_head,
        start_m,
        q_len,
        q_row,
        BLOCK_M,
        HEAD_DIM,
        BLOCK_D,
        True,
    )

    k_ptr += batch * k_batch + (head // group) * k_head
    v_ptr += batch * v_batch + (head // group) * v_head

    shift = k_len - q_len
    full, end = k_len, k_len
    if CAUSAL:
        full = 0
        end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
    full = full // BLOCK_N * BLOCK_N

    scale_log2 = scale * 1.4426950408889634
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for EDGE in tl.static_range(2):
        if EDGE:
            lo, hi = full, end
        else:
            lo, hi = 0, full
        for start_n in range(lo, hi, BLOCK_N):
            k = load_tile(k_ptr, start_n, k_len, k_row, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE)
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
            v = load_tile(v_ptr, start_n, k_len, v_row, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
            m = m_new

    some = l > 0
    l = tl.where(some, l, 1.0)
    o = (acc / l[:, None]).to(o_ptr.dtype.element_ty)
    lse = tl.where(some, m + tl.log2(l), float("-inf"))
    cols = tl.arange(0, BLOCK_D)
    o_ptrs = (
        o_ptr + batch * o_batch + head * o_head + rows[:, None].to(tl.int64) * o_row + cols[None, :]
    )
    tl.store(o_ptrs, o, mask=(rows[:, None] < q_len) & (cols[None, :] < HEAD_DIM))
    lse_ptr += (batch * tl.num_programs(0) + head) * q_len
    tl.store(lse_ptr + rows, lse, mask=rows < q_len)

# %% wrong="flash_forward_kernel" because="no mask at the last key" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- seen = keys[None, :] < k_len

-     seen = seen & (keys[None, :] <= rows[:, None] + shift)
- s = tl.where(seen, s, float("-inf"))
+     s = tl.where(keys[None, :] <= rows[:, None] + shift, s, float("-inf"))

# %% wrong="flash_forward_kernel" because="key-value heads interleaved: h % kv_heads" of="loop-bound"
- k_ptr += batch * k_batch + (head // group) * k_head
- v_ptr += batch * v_batch + (head // group) * v_head
+ k_ptr += batch * k_batch + (head % (tl.num_programs(0) // group)) * k_head
+ v_ptr += batch * v_batch + (head % (tl.num_programs(0) // group)) * v_head

- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

# %% wrong="flash_forward_kernel" because="the tile's maximum, not the running one" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- m_new = tl.maximum(m, tl.max(s, axis=1) * scale_log2)
+ m_new = tl.max(s, axis=1) * scale_log2

# %% wrong="flash_forward_kernel" because="the maximum starts at 0: rows near -200 underflow" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
+ m = tl.zeros((BLOCK_M,), tl.float32)

# %% wrong="flash_forward_kernel" because="masked scores are 0, not -inf" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- s = tl.where(seen, s, float("-inf"))
+ s = tl.where(seen, s, 0.0)

# %% wrong="flash_forward_kernel" because="half-precision accumulator" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
+ acc = (
+     tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
+     .to(tl.float16)
+     .to(tl.float32)
+ )

# %% wrong="flash_forward_kernel" because="stores all rows of the tile" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- tl.store(o_ptrs, o, mask=(rows[:, None] < q_len) & (cols[None, :] < HEAD_DIM))
+ tl.store(o_ptrs, o, mask=cols[None, :] < HEAD_DIM)

# %% wrong="flash_forward_kernel" because="stores all columns of the tile" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- tl.store(o_ptrs, o, mask=(rows[:, None] < q_len) & (cols[None, :] < HEAD_DIM))
+ tl.store(o_ptrs, o, mask=rows[:, None] < q_len)

# %% wrong="flash_forward_kernel" because="lse stored without a mask" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- tl.store(lse_ptr + rows, lse, mask=rows < q_len)
+ tl.store(lse_ptr + rows, lse)

# %% wrong="flash_forward_kernel" because="rows are BLOCK_D apart" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- o_ptr + batch * o_batch + head * o_head + rows[:, None].to(tl.int64) * o_row + cols[None, :]
+ o_ptr
+ + batch * o_batch
+ + head * o_head
+ + rows[:, None].to(tl.int64) * BLOCK_D
+ + cols[None, :]

# %% wrong="flash_forward_kernel" because="rows are HEAD_DIM apart" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- o_ptr + batch * o_batch + head * o_head + rows[:, None].to(tl.int64) * o_row + cols[None, :]
+ o_ptr
+ + batch * o_batch
+ + head * o_head
+ + rows[:, None].to(tl.int64) * HEAD_DIM
+ + cols[None, :]

# %% wrong="flash_forward_kernel" because="the accumulator is not rescaled" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
+ acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")

# %% wrong="flash_forward_kernel" because="no log2(e) in the scale" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- scale_log2 = scale * 1.4426950408889634
+ scale_log2 = scale

# %% wrong="flash_forward_kernel" because="lse mixes base 2 with base e" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- lse = tl.where(some, m + tl.log2(l), float("-inf"))
+ lse = tl.where(some, m + tl.log(l), float("-inf"))

# %% wrong="flash_forward_kernel" because="aligns the causal mask to the start" of="loop-bound"
- shift = k_len - q_len
+ shift = 0

- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

# %% wrong="flash_forward_kernel" because="loads the tiles above the diagonal" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)

# %% wrong="flash_forward_kernel" because="rows that see nothing give NaN" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- base = tl.where(m_new == float("-inf"), 0.0, m_new)
+ base = m_new

# %% wrong="flash_forward_kernel" because="the diagonal tile counts as full" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

# %% wrong="flash_forward_kernel" because="all batch elements write to the first" of="loop-bound"
- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- o_ptrs = (
-     o_ptr + batch * o_batch + head * o_head + rows[:, None].to(tl.int64) * o_row + cols[None, :]
- )
+ o_ptrs = o_ptr + head * o_head + rows[:, None].to(tl.int64) * o_row + cols[None, :]

# %% right="flash_forward_kernel" because="one loop, always masked, in base e" of="loop-bound"
-     full = 0
-     end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
- full = full // BLOCK_N * BLOCK_N
+     full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+     end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)
+ full = 0

- scale_log2 = scale * 1.4426950408889634
+ scale_log2 = scale

- p = tl.exp2(s * scale_log2 - base[:, None])
- alpha = tl.exp2(m - base)
+ p = tl.exp(s * scale_log2 - base[:, None])
+ alpha = tl.exp(m - base)

- lse = tl.where(some, m + tl.log2(l), float("-inf"))
+ lse = tl.where(some, (m + tl.log(l)) * 1.4426950408889634, float("-inf"))

# %% right="flash_forward_kernel" because="scores scaled first, product added outside the dot" of="loop-bound"
- tile = tl.num_programs(1) - 1 - tile
+ tile = tile + 0

- full = 0
- end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)
+ full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

- s = tl.dot(q, tl.trans(k), input_precision="ieee")
+ s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2

- m_new = tl.maximum(m, tl.max(s, axis=1) * scale_log2)
+ m_new = tl.maximum(m, tl.max(s, axis=1))

- p = tl.exp2(s * scale_log2 - base[:, None])
+ p = tl.exp2(s - base[:, None])

- acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
+ acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")

# %% wrong="flash_forward_kernel" because="v is read with the strides of k"
- v_ptr += batch * v_batch + (head // group) * v_head
+ v_ptr += batch * k_batch + (head // group) * k_head

- v = load_tile(v_ptr, start_n, k_len, v_row, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE)
+ v = load_tile(v_ptr, start_n, k_len, k_row, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE)

# %% wrong="flash_forward_kernel" because="the output has the strides of q"
- o_ptr += batch * o_batch + head * o_head
- o_ptrs = o_ptr + rows[:, None].to(tl.int64) * o_row + cols[None, :]
+ o_ptr += batch * q_batch + head * q_head
+ o_ptrs = o_ptr + rows[:, None].to(tl.int64) * q_row + cols[None, :]

# %% wrong="flash_forward_kernel" because="a global that is no constexpr, which no GPU compiles"
- @triton.jit
- def flash_forward_kernel(
+ LOG2_E = 1.4426950408889634
+
+
+ @triton.jit
+ def flash_forward_kernel(

- scale_log2 = scale * 1.4426950408889634  # log2(e): exp2 is the instruction, exp is not
+ scale_log2 = scale * LOG2_E

# %% wrong="flash_forward_kernel" because="the loop ends with a break, which no GPU compiles"
- for start_n in range(lo, hi, BLOCK_N):
+ for start_n in range(lo, k_len, BLOCK_N):
+     if start_n >= hi:
+         break

# %% wrong="flash_forward_kernel" because="the maximum counts hidden keys, whose weights are set to 0 afterwards"
- s = tl.where(seen, s, float("-inf"))

- p = tl.exp2(s * scale_log2 - base[:, None])  # one fused multiply-add, one exp2
+ p = tl.exp2(s * scale_log2 - base[:, None])
+ if EDGE:
+     p = tl.where(seen, p, 0.0)

# %% wrong="flash_forward_kernel" because="the accumulator is of the inputs' format"
- acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
+ acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
+ acc = acc.to(v.dtype).to(tl.float32)

# %% wrong="attention_backward_tiled" because="leaves out delta"
- ds = p * (dp - delta[:, :, queries, None]) * scale
+ ds = p * dp * scale

# %% wrong="attention_backward_tiled" because="the scale twice"
- dq[:, :, queries] += ds @ k[:, :, keys]
+ dq[:, :, queries] += scale * ds @ k[:, :, keys]

# %% wrong="attention_backward_tiled" because="leaves out the scale"
- ds = p * (dp - delta[:, :, queries, None]) * scale
+ ds = p * (dp - delta[:, :, queries, None])

# %% wrong="attention_backward_tiled" because="lse taken for base 2"
- p = torch.exp(s - rows.masked_fill(rows == -math.inf, 0)[..., None])
+ p = torch.exp2(s - rows.masked_fill(rows == -math.inf, 0)[..., None])

# %% wrong="attention_backward_tiled" because="delta from one tile only"
- ds = p * (dp - delta[:, :, queries, None]) * scale
+ ds = p * (dp - (p * dp).sum(dim=-1, keepdim=True)) * scale

# %% wrong="attention_backward_tiled" because="rows that see nothing give NaN"
- p = torch.exp(s - rows.masked_fill(rows == -math.inf, 0)[..., None])
+ p = torch.exp(s - rows[..., None])

# %% wrong="attention_backward_tiled" because="aligns the causal mask to the start"
- shift, scale = k_len - q_len, 1 / math.sqrt(q.shape[-1])
+ shift, scale = 0, 1 / math.sqrt(q.shape[-1])

# %% wrong="attention_backward_tiled" because="visits the tiles above the diagonal"
- end = min(k_len, queries.stop + shift) if causal else k_len
+ end = k_len

# %% wrong="attention_backward_tiled" because="overwrites dv with the last query tile"
- dv[:, :, keys] += p.mT @ do[:, :, queries]
+ dv[:, :, keys] = p.mT @ do[:, :, queries]

# %% wrong="attention_backward_tiled" because="forms the whole matrix of weights"
def attention_backward_tiled(q, k, v, o, lse, do, block_q, block_k, causal=False):
    scale = q.shape[-1] ** -0.5
    s = q @ k.mT * scale
    if causal:
        s = s.masked_fill(
            ~torch.ones(s.shape[-2:], dtype=torch.bool).tril(k.shape[-2] - q.shape[-2]), -math.inf
        )
    p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0)[..., None])
    ds = p * (do @ v.mT - (o * do).sum(dim=-1, keepdim=True)) * scale
    return ds @ k, ds.mT @ q, p.mT @ do

# %% right="attention_backward_tiled" because="keys outside, queries inside, einsum"
def attention_backward_tiled(q, k, v, o, lse, do, block_q, block_k, causal=False):
    scale, shift = q.shape[-1] ** -0.5, k.shape[2] - q.shape[2]
    delta = torch.einsum("bhid,bhid->bhi", o, do)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for j in range(0, k.shape[2], block_k):
        k_tile, v_tile = k[:, :, j : j + block_k], v[:, :, j : j + block_k]
        for i in range(0, q.shape[2], block_q):
            q_tile, do_tile = q[:, :, i : i + block_q], do[:, :, i : i + block_q]
            row = torch.arange(i, i + q_tile.shape[2], device=q.device)[:, None]
            key = torch.arange(j, j + k_tile.shape[2], device=q.device)
            seen = key <= row + shift if causal else torch.ones_like(key <= row)
            if not seen.any():
                continue
            s = torch.einsum("bhid,bhjd->bhij", q_tile, k_tile) * scale
            p = torch.where(seen, torch.exp(s - lse[:, :, i : i + block_q, None]), 0.0)
            ds = p * (
                torch.einsum("bhid,bhjd->bhij", do_tile, v_tile)
                - delta[:, :, i : i + block_q, None]
            )
            dv[:, :, j : j + block_k] += torch.einsum("bhij,bhid->bhjd", p, do_tile)
            dk[:, :, j : j + block_k] += torch.einsum("bhij,bhid->bhjd", ds, q_tile) * scale
            dq[:, :, i : i + block_q] += torch.einsum("bhij,bhjd->bhid", ds, k_tile) * scale
    return dq, dk, dv

# %% wrong="attention_backward_tiled" because="hidden weights are multiplied by zero, also where they are infinite"
- s = s.masked_fill(key > row[:, None] + shift, -math.inf)
+ hidden = key > row[:, None] + shift

- p = torch.exp(s - rows.masked_fill(rows == -math.inf, 0)[..., None])
+ p = torch.exp(s - rows.masked_fill(rows == -math.inf, 0)[..., None])
+ if causal:
+     p = p * ~hidden

# %% wrong="flash_dq_kernel" because="leaves out delta"
- ds = p * (dp - delta[:, None])
+ ds = p * dp

# %% wrong="flash_dq_kernel" because="the scale twice"
- ds = p * (dp - delta[:, None])
+ ds = p * (dp - delta[:, None]) * scale

# %% wrong="flash_dq_kernel" because="leaves out the scale"
- dq = (dq * scale).to(dq_ptr.dtype.element_ty)
+ dq = dq.to(dq_ptr.dtype.element_ty)

# %% wrong="flash_dq_kernel" because="lse in base 2 used with base e"
- scale_log2 = scale * 1.4426950408889634
+ scale_log2 = scale

- p = tl.exp2(s)
+ p = tl.exp(s)

# %% wrong="flash_dq_kernel" because="scores in base e used with an lse in base 2"
- scale_log2 = scale * 1.4426950408889634
+ scale_log2 = scale

# %% wrong="flash_dq_kernel" because="key-value heads interleaved: h % kv_heads"
- k_ptr += batch * k_batch + (head // group) * k_head
- v_ptr += batch * v_batch + (head // group) * v_head
+ k_ptr += batch * k_batch + (head % (tl.num_programs(0) // group)) * k_head
+ v_ptr += batch * v_batch + (head % (tl.num_programs(0) // group)) * v_head

# %% wrong="flash_dq_kernel" because="trusts a padded key's zero"
- seen = keys[None, :] < k_len

-     seen = seen & (keys[None, :] <= rows[:, None] + shift)
- s = tl.where(seen, s, float("-inf"))
+     s = tl.where(keys[None, :] <= rows[:, None] + shift, s, float("-inf"))

# %% wrong="flash_dq_kernel" because="loop bound (tile + 1) * BLOCK_N"
- full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
- end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)
+ full = 0
+ end = tl.minimum(k_len, (tile + 1) * BLOCK_N + shift)

# %% wrong="flash_dq_kernel" because="stores all rows of the tile"
- tl.store(dq_ptrs, dq, mask=(rows[:, None] < q_len) & (cols[None, :] < HEAD_DIM))
+ tl.store(dq_ptrs, dq, mask=cols[None, :] < HEAD_DIM)

# %% wrong="flash_dq_kernel" because="rows are BLOCK_D apart"
- dq_ptrs = dq_ptr + rows[:, None].to(tl.int64) * dq_row + cols[None, :]
+ dq_ptrs = dq_ptr + rows[:, None].to(tl.int64) * BLOCK_D + cols[None, :]

# %% wrong="flash_dq_kernel" because="loads the tiles above the diagonal"
- end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)

# %% wrong="flash_dq_kernel" because="half-precision accumulator"
- dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
+ dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee").to(tl.float16).to(tl.float32)

# %% wrong="flash_dq_kernel" because="the last row's last key is lost where it begins a tile"
- end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)
+ end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M - 1 + shift), 0)

# %% right="flash_dq_kernel" because="one loop, always masked, scale on every tile"
@triton.jit
def flash_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    do_batch,
    do_head,
    do_row,
    dq_batch,
    dq_head,
    dq_row,
    group,
    q_len,
    k_len,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if CAUSAL:
        tile = tl.num_programs(1) - 1 - tile
    start_m = tile * BLOCK_M
    rows = start_m + tl.arange(0, BLOCK_M)
    q = load_tile(
        q_ptr + batch * q_batch + head * q_head,
        start_m,
        q_len,
        q_row,
        BLOCK_M,
        HEAD_DIM,
        BLOCK_D,
        True,
    )
    do = load_tile(
        do_ptr + batch * do_batch + head * do_head,
        start_m,
        q_len,
        do_row,
        BLOCK_M,
        HEAD_DIM,
        BLOCK_D,
        True,
    )
    row_offset = (batch * tl.num_programs(0) + head) * q_len
    lse = tl.load(lse_ptr + row_offset + rows, mask=rows < q_len, other=0.0)
    delta = tl.load(delta_ptr + row_offset + rows, mask=rows < q_len, other=0.0)
    k_ptr += batch * k_batch + (head // group) * k_head
    v_ptr += batch * v_batch + (head // group) * v_head

    shift = k_len - q_len
    full, end = k_len, k_len
    if CAUSAL:
        full = tl.maximum(tl.minimum(k_len, start_m + shift + 1), 0)
        end = tl.maximum(tl.minimum(k_len, start_m + BLOCK_M + shift), 0)
    full = 0

    scale_log2 = scale * 1.4426950408889634
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for EDGE in tl.static_range(2):
        if EDGE:
            lo, hi = full, end
        else:
            lo, hi = 0, full
        for start_n in range(lo, hi, BLOCK_N):
            k = load_tile(k_ptr, start_n, k_len, k_row, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE)
            v = load_tile(v_ptr, start_n, k_len, v_row, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None]
            p = tl.exp2(s)
            if EDGE:
                keys = start_n + tl.arange(0, BLOCK_N)
                seen = keys[None, :] < k_len
                if CAUSAL:
                    seen = seen & (keys[None, :] <= rows[:, None] + shift)
                p = tl.where(seen, tl.exp2(tl.where(seen, s, 0.0)), 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            ds = p * (dp - delta[:, None]) * scale
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    cols = tl.arange(0, BLOCK_D)
    dq_ptrs = (
        dq_ptr
        + batch * dq_batch
        + head * dq_head
        + rows[:, None].to(tl.int64) * dq_row
        + cols[None, :]
    )

    tl.store(
        dq_ptrs,
        dq.to(dq_ptr.dtype.element_ty),
        mask=(rows[:, None] < q_len) & (cols[None, :] < HEAD_DIM),
    )

# %% wrong="flash_dq_kernel" because="v is read with the strides of k"
- v_ptr += batch * v_batch + (head // group) * v_head
+ v_ptr += batch * k_batch + (head // group) * k_head

- v = load_tile(v_ptr, start_n, k_len, v_row, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE)
+ v = load_tile(v_ptr, start_n, k_len, k_row, BLOCK_N, HEAD_DIM, BLOCK_D, EDGE)

# %% wrong="flash_dq_kernel" because="do is read with the strides of q"
- do_ptr += batch * do_batch + head * do_head
- do = load_tile(do_ptr, start_m, q_len, do_row, BLOCK_M, HEAD_DIM, BLOCK_D, True)
+ do_ptr += batch * q_batch + head * q_head
+ do = load_tile(do_ptr, start_m, q_len, q_row, BLOCK_M, HEAD_DIM, BLOCK_D, True)

# %% wrong="flash_dq_kernel" because="lse and delta are read beyond the last row"
- lse = tl.load(lse_ptr + row_offset + rows, mask=rows < q_len, other=0.0)
- delta = tl.load(delta_ptr + row_offset + rows, mask=rows < q_len, other=0.0)
+ lse = tl.load(lse_ptr + row_offset + rows)
+ delta = tl.load(delta_ptr + row_offset + rows)

# %% wrong="flash_dq_kernel" because="hidden weights are multiplied by zero, also where they are infinite"
- s = tl.where(seen, s, float("-inf"))
+ s = tl.where(keys[None, :] < k_len, s, float("-inf"))

- p = tl.exp2(s)
+ p = tl.exp2(s)
+ if EDGE:
+     p = p * seen.to(tl.float32)

# %% wrong="flash_dq_kernel" because="sums in the inputs' format"
- dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
+ dq += tl.dot(ds.to(k.dtype), k, input_precision="ieee")
+ dq = dq.to(k.dtype).to(tl.float32)

# %% wrong="flash_dq_kernel" because="a chained comparison, which no GPU compiles"
- p = tl.exp2(s)
+ p = tl.exp2(s)
+ if 0 <= start_n < k_len:
+     p = p * 1.0

# %% wrong="flash_dkdv_kernel" because="leaves out delta"
- dst = pt * (dpt - delta[None, :])
+ dst = pt * dpt

# %% wrong="flash_dkdv_kernel" because="the scale twice"
- dst = pt * (dpt - delta[None, :])
+ dst = pt * (dpt - delta[None, :]) * scale

# %% wrong="flash_dkdv_kernel" because="leaves out the scale"
- dk = (dk * scale).to(dk_ptr.dtype.element_ty)
+ dk = dk.to(dk_ptr.dtype.element_ty)

# %% wrong="flash_dkdv_kernel" because="lse in base 2 used with base e" base="lse-base"
@triton.jit
def flash_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    do_batch,
    do_head,
    do_row,
    dk_batch,
    dk_head,
    dk_row,
    dv_batch,
    dv_head,
    dv_row,
    group,
    q_len,
    k_len,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    kv_head, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    start_n = tile * BLOCK_N
    keys = start_n + tl.arange(0, BLOCK_N)
    k = load_tile(
        k_ptr + batch * k_batch + kv_head * k_head,
        start_n,
        k_len,
        k_row,
        BLOCK_N,
        HEAD_DIM,
        BLOCK_D,
        True,
    )
    v = load_tile(
        v_ptr + batch * v_batch + kv_head * v_head,
        start_n,
        k_len,
        v_row,
        BLOCK_N,
        HEAD_DIM,
        BLOCK_D,
        True,
    )

    shift = k_len - q_len
    first, full = 0, 0
    if CAUSAL:
        first = tl.minimum(tl.maximum(start_n - shift, 0), q_len) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - shift, 0), BLOCK_M) * BLOCK_M
        full = tl.minimum(full, tl.cdiv(q_len, BLOCK_M) * BLOCK_M)

    scale_log2 = scale
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for head in range(kv_head * group, kv_head * group + group):
        head_q = q_ptr + batch * q_batch + head * q_head
        head_do = do_ptr + batch * do_batch + head * do_head
        row_offset = (batch * tl.num_programs(0) * group + head) * q_len
        for FULL in tl.static_range(2):
            if FULL:
                lo, hi = full, q_len
            else:
                lo, hi = first, full
            for start_m in range(lo, hi, BLOCK_M):
                rows = start_m + tl.arange(0, BLOCK_M)
                q = load_tile(head_q, start_m, q_len, q_row, BLOCK_M, HEAD_DIM, BLOCK_D, True)
                do = load_tile(head_do, start_m, q_len, do_row, BLOCK_M, HEAD_DIM, BLOCK_D, True)
                lse = tl.load(lse_ptr + row_offset + rows, mask=rows < q_len, other=0.0)
                delta = tl.load(delta_ptr + row_offset + rows, mask=rows < q_len, other=0.0)
                st = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse[None, :]
                if not FULL:
                    st = tl.where(keys[:, None] <= rows[None, :] + shift, st, float("-inf"))
                pt = tl.exp(st)
                dv = tl.dot(pt.to(do.dtype), do, dv, input_precision="ieee")
                dpt = tl.dot(v, tl.trans(do), input_precision="ieee")
                dst = pt * (dpt - delta[None, :])
                dk = tl.dot(dst.to(q.dtype), q, dk, input_precision="ieee")

    cols = tl.arange(0, BLOCK_D)
    inside = (keys[:, None] < k_len) & (cols[None, :] < HEAD_DIM)
    dk_ptrs = (
        dk_ptr
        + batch * dk_batch
        + kv_head * dk_head
        + keys[:, None].to(tl.int64) * dk_row
        + cols[None, :]
    )
    dv_ptrs = (
        dv_ptr
        + batch * dv_batch
        + kv_head * dv_head
        + keys[:, None].to(tl.int64) * dv_row
        + cols[None, :]
    )
    tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=inside)

# %% wrong="flash_dkdv_kernel" because="the first head of the group only" of="lse-base"
- scale_log2 = scale
+ scale_log2 = scale * 1.4426950408889634

- for head in range(kv_head * group, kv_head * group + group):
+ for head in range(kv_head * group, kv_head * group + 1):

- pt = tl.exp(st)
+ pt = tl.exp2(st)

# %% wrong="flash_dkdv_kernel" because="query heads interleaved: kv_head, kv_head + kv_heads, …" of="lse-base"
- scale_log2 = scale
+ scale_log2 = scale * 1.4426950408889634

- for head in range(kv_head * group, kv_head * group + group):
+ for head in range(kv_head, tl.num_programs(0) * group, tl.num_programs(0)):

- pt = tl.exp(st)
+ pt = tl.exp2(st)

# %% wrong="flash_dkdv_kernel" because="starts at query tile number tile, not at the diagonal" of="lse-base"
- first = tl.minimum(tl.maximum(start_n - shift, 0), q_len) // BLOCK_M * BLOCK_M
+ first = tile * BLOCK_M

- scale_log2 = scale
+ scale_log2 = scale * 1.4426950408889634

- pt = tl.exp(st)
+ pt = tl.exp2(st)

# %% wrong="flash_dkdv_kernel" because="no causal mask on the diagonal" of="lse-base"
- scale_log2 = scale
+ scale_log2 = scale * 1.4426950408889634

-     st = tl.where(keys[:, None] <= rows[None, :] + shift, st, float("-inf"))
- pt = tl.exp(st)
+     st = st + 0.0
+ pt = tl.exp2(st)

# %% wrong="flash_dkdv_kernel" because="stores all rows of the tile" of="lse-base"
- scale_log2 = scale
+ scale_log2 = scale * 1.4426950408889634

- pt = tl.exp(st)
+ pt = tl.exp2(st)

- inside = (keys[:, None] < k_len) & (cols[None, :] < HEAD_DIM)
+ inside = cols[None, :] < HEAD_DIM

# %% wrong="flash_dkdv_kernel" because="rows are BLOCK_D apart" of="lse-base"
- scale_log2 = scale
+ scale_log2 = scale * 1.4426950408889634

- pt = tl.exp(st)
+ pt = tl.exp2(st)

- + keys[:, None].to(tl.int64) * dk_row
+ + keys[:, None].to(tl.int64) * BLOCK_D

# %% wrong="flash_dkdv_kernel" because="visits every query tile" of="lse-base"
- first = tl.minimum(tl.maximum(start_n - shift, 0), q_len) // BLOCK_M * BLOCK_M
+ first = 0

- scale_log2 = scale
+ scale_log2 = scale * 1.4426950408889634

- pt = tl.exp(st)
+ pt = tl.exp2(st)

# %% wrong="flash_dkdv_kernel" because="aligns the causal mask to the start" of="lse-base"
- shift = k_len - q_len
+ shift = 0

- scale_log2 = scale
+ scale_log2 = scale * 1.4426950408889634

- pt = tl.exp(st)
+ pt = tl.exp2(st)

# %% right="flash_dkdv_kernel" because="tiles not transposed, one loop, always masked" of="lse-base"
- scale_log2 = scale
+ scale_log2 = scale * 1.4426950408889634

- st = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse[None, :]
- if not FULL:
-     st = tl.where(keys[:, None] <= rows[None, :] + shift, st, float("-inf"))
- pt = tl.exp(st)
- dv = tl.dot(pt.to(do.dtype), do, dv, input_precision="ieee")
- dpt = tl.dot(v, tl.trans(do), input_precision="ieee")
- dst = pt * (dpt - delta[None, :])
- dk = tl.dot(dst.to(q.dtype), q, dk, input_precision="ieee")
+ s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None]
+ if CAUSAL:
+     s = tl.where(keys[None, :] <= rows[:, None] + shift, s, float("-inf"))
+ p = tl.exp2(s)
+ dv = tl.dot(tl.trans(p).to(do.dtype), do, dv, input_precision="ieee")
+ dp = tl.dot(do, tl.trans(v), input_precision="ieee")
+ ds = p * (dp - delta[:, None])
+ dk = tl.dot(tl.trans(ds).to(q.dtype), q, dk, input_precision="ieee")

# %% wrong="flash_dkdv_kernel" because="do is read with the strides of q"
- do_ptr += batch * do_batch
+ do_ptr += batch * q_batch

- head_q, head_do = q_ptr + head * q_head, do_ptr + head * do_head
+ head_q, head_do = q_ptr + head * q_head, do_ptr + head * q_head

- head_do, start_m, q_len, do_row, BLOCK_M, HEAD_DIM, BLOCK_D, PART != 1
+ head_do, start_m, q_len, q_row, BLOCK_M, HEAD_DIM, BLOCK_D, PART != 1

# %% wrong="flash_dkdv_kernel" because="v is read with the strides of k"
- v_ptr += batch * v_batch + kv_head * v_head
- v = load_tile(v_ptr, start_n, k_len, v_row, BLOCK_N, HEAD_DIM, BLOCK_D, True)
+ v_ptr += batch * k_batch + kv_head * k_head
+ v = load_tile(v_ptr, start_n, k_len, k_row, BLOCK_N, HEAD_DIM, BLOCK_D, True)

# %% wrong="flash_dkdv_kernel" because="dv has the strides of dk"
- dv_ptr += batch * dv_batch + kv_head * dv_head
+ dv_ptr += batch * dk_batch + kv_head * dk_head

- tl.store(dv_ptr + wide * dv_row + cols[None, :], dv, mask=inside)
+ tl.store(dv_ptr + wide * dk_row + cols[None, :], dv, mask=inside)

# %% wrong="flash_dkdv_kernel" because="lse and delta are read beyond the last row"
- lse = load_row_numbers(head_lse, start_m, q_len, BLOCK_M, PART != 1)
- delta = load_row_numbers(head_delta, start_m, q_len, BLOCK_M, PART != 1)
+ lse = load_row_numbers(head_lse, start_m, q_len, BLOCK_M, False)
+ delta = load_row_numbers(head_delta, start_m, q_len, BLOCK_M, False)

# %% wrong="flash_dkdv_kernel" because="sums in the inputs' format"
- dk = tl.dot(dst.to(q.dtype), q, dk, input_precision="ieee")
+ dk += tl.dot(dst.to(q.dtype), q, input_precision="ieee")
+ dk = dk.to(q.dtype).to(tl.float32)

# %% wrong="flash_dkdv_kernel" because="a chained comparison, which no GPU compiles"
- if PART == 0:  # also hides rows that see nothing, whose lse is -inf
+ if PART == 0 and 0 <= start_m <= q_len:

# %% wrong="flash_attention" because="gradients in another order" base="gradients-another"
class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal):
        o, lse = flash_forward(q, k, v, causal)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.causal = causal
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv = flash_backward(q, k, v, o, lse, do, ctx.causal)
        return dk, dq, dv, None

# %% wrong="flash_attention" because="no gradient for the fourth argument" of="gradients-another"
- dq, dk, dv = flash_backward(q, k, v, o, lse, do, ctx.causal)
- return dk, dq, dv, None
+ return flash_backward(q, k, v, o, lse, do, ctx.causal)

# %% wrong="flash_attention" because="backward forgets the causal mask" of="gradients-another"
- dq, dk, dv = flash_backward(q, k, v, o, lse, do, ctx.causal)
- return dk, dq, dv, None
+ return *flash_backward(q, k, v, o, lse, do), None

# %% wrong="flash_attention" because="PyTorch's own attention in both passes"
class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal):
        ctx.save_for_backward(q, k, v)
        ctx.causal = causal
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    @staticmethod
    def backward(ctx, do):
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            o = F.scaled_dot_product_attention(*leaves, is_causal=ctx.causal, enable_gqa=True)
        return *torch.autograd.grad(o, leaves, do), None

# %% wrong="flash_attention" because="saves the weights for the backward pass"
class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal):
        o, lse = flash_forward(q, k, v, causal)
        weights = torch.softmax(q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT, dim=-1)
        ctx.save_for_backward(q, k, v, o, lse, weights)
        ctx.causal = causal
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse, _ = ctx.saved_tensors
        return *flash_backward(q, k, v, o, lse, do, ctx.causal), None

# %% wrong="flash_attention" because="the flag is kept on the class: the last call's serves every backward pass"
- ctx.causal = causal
+ FlashAttention.causal = causal
- return *flash_backward(q, k, v, o, lse, do, ctx.causal), None
+ return *flash_backward(q, k, v, o, lse, do, FlashAttention.causal), None

# %% wrong="flash_attention" because="o and lse are attributes of ctx, not saved tensors"
- ctx.save_for_backward(q, k, v, o, lse)
+ ctx.save_for_backward(q, k, v)
+ ctx.o, ctx.lse = o, lse
- q, k, v, o, lse = ctx.saved_tensors
+ (q, k, v), o, lse = ctx.saved_tensors, ctx.o, ctx.lse

# %% right="flash_attention" because="calls the three kernels itself" of="gradients-another"
- dq, dk, dv = flash_backward(q, k, v, o, lse, do, ctx.causal)
- return dk, dq, dv, None
+ do = do.contiguous()
+ delta = flash_delta(o, do)
+ dk, dv = flash_dkdv(q, k, v, do, lse, delta, causal=ctx.causal)
+ return flash_dq(q, k, v, do, lse, delta, causal=ctx.causal), dk, dv, None

# %% wrong="version_numbers" because="version 1's grid with query tiles"
- "v1_busy": 2 * 16 / 132,
+ "v1_busy": min(1.0, 2 * 16 * 64 / 132),

# %% wrong="version_numbers" because="one program a query"
- "v2_programs": 2 * 16 * 8192 // 128,
+ "v2_programs": 2 * 16 * 8192,

# %% wrong="version_numbers" because="the ratio upside down"
- "non_matmul": 312 / 19.5,
+ "non_matmul": 19.5 / 312,

# %% wrong="version_numbers" because="one division for each key"
- "divisions": 8192 // 128,
+ "divisions": 8192,

# %% wrong="version_numbers" because="the share of the products, not of the exponentials"
- "exp_share_128": (1 / exponentials) / (4 * 128 / matmul),
+ "exp_share_128": (4 * 128 / matmul) / (1 / exponentials),

# %% wrong="version_numbers" because="two FLOPs for each score and dimension"
- "limit_64": 4 * 64 / (4 * 64 / matmul + 1 / exponentials) / 1e12,
+ "limit_64": 2 * 64 / (2 * 64 / matmul + 1 / exponentials) / 1e12,

# %% wrong="version_numbers" because="in FLOP/s"
- "limit_64": 4 * 64 / (4 * 64 / matmul + 1 / exponentials) / 1e12,
+ "limit_64": 4 * 64 / (4 * 64 / matmul + 1 / exponentials),

# %% wrong="version_numbers" because="splits the keys among the warps"
- "warps_split": "queries",
+ "warps_split": "keys",

# %% right="version_numbers" because="written out"
def version_numbers():
    return {
        "v1_busy": 0.2424,
        "v2_programs": 2048,
        "non_matmul": 16,
        "divisions": 64.0,
        "warps_split": "queries",
        "exp_share_128": 0.495,
        "limit_64": 496.8,
    }

# %% wrong="flash_dkdv_kernel" because="the ragged tail is loaded as a whole tile"
- tail = tl.maximum(full, q_len // BLOCK_M * BLOCK_M)
+ tail = tl.maximum(full, q_len)

# %% wrong="flash_dkdv_kernel" because="the ragged tail is left out"
- lo, hi = tail, q_len
+ lo, hi = tail, tail

# %% wrong="flash_dkdv_kernel" because="the tail begins inside the diagonal, which counts twice"
- tail = tl.maximum(full, q_len // BLOCK_M * BLOCK_M)
+ tail = q_len // BLOCK_M * BLOCK_M

# %% right="online_softmax" because="torch.where for a maximum that is -inf, no shift by 0"
def online_softmax(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    m, l = x.new_full(x.shape[:-1], -math.inf), x.new_zeros(x.shape[:-1])
    for part in x.split(block, dim=-1):
        new = torch.maximum(m, part.max(dim=-1).values)
        old = torch.where(m == -math.inf, 0, l * torch.exp(m - new))
        share = torch.exp((part - new[..., None]).masked_fill(part == -math.inf, -math.inf))
        m, l = new, old + share.sum(dim=-1)
    return m, l

# %% wrong="online_softmax" because="reshape copies all of x where no view exists"
- m = x.new_full(x.shape[:-1], -math.inf)
+ shape, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
+ m = x.new_full(x.shape[:-1], -math.inf)
- return m, l
+ return m.view(shape), l.view(shape)

# %% wrong="merge_partials" because="the shift is clamped at a finite number"
- shift = m.masked_fill(m == -math.inf, 0)
+ shift = m.clamp(min=-1e5)

# %% wrong="merge_partials" because="l and o go through m + log(l)"
- w_a, w_b = torch.exp(m_a - shift), torch.exp(m_b - shift)
- return m, l_a * w_a + l_b * w_b, o_a * w_a[..., None] + o_b * w_b[..., None]
+ w_a, w_b = torch.exp(m_a + l_a.log() - shift), torch.exp(m_b + l_b.log() - shift)
+ o_a = o_a / l_a.masked_fill(l_a == 0, 1)[..., None]
+ o_b = o_b / l_b.masked_fill(l_b == 0, 1)[..., None]
+ return m, w_a + w_b, o_a * w_a[..., None] + o_b * w_b[..., None]

# %% wrong="tiled_attention" because="the product of each tile is rounded to half precision"
- acc = alpha[..., None] * acc + p @ v_tile
+ acc = alpha[..., None] * acc + p.to(v.dtype) @ v_tile.to(v.dtype)

# %% right="tiled_attention" because="weights rounded to half precision as in the kernel, the product in float32"
- acc = alpha[..., None] * acc + p @ v_tile
+ acc = alpha[..., None] * acc + p.to(v.dtype).to(work) @ v_tile

# %% wrong="flash_forward_kernel" because="a padded key has a finite score, which counts where all others are lower"
- s = tl.where(seen, s, float("-inf"))
+ s = tl.where(keys[None, :] < k_len, s, -1e9)
+ if CAUSAL:
+     s = tl.where(keys[None, :] <= rows[:, None] + shift, s, float("-inf"))

# %% wrong="flash_forward_kernel" because="float32 scores by TF32, tl.dot's default"
- s = tl.dot(q, tl.trans(k), input_precision="ieee")
+ s = tl.dot(q, tl.trans(k))

# %% wrong="attention_backward_tiled" because="a mask of -10,000 is added, and a hidden score may be higher"
- s = s.masked_fill(key > row[:, None] + shift, -math.inf)
+ s = s - 1e4 * (key > row[:, None] + shift)

# %% wrong="attention_backward_tiled" because="the loop ends one key too far, which is a tile at a corner of the diagonal"
- end = min(k_len, queries.stop + shift) if causal else k_len
+ end = min(k_len, queries.stop + shift + 1) if causal else k_len

# %% right="flash_dq_kernel" because="a row that sees no key is left to the mask"
- s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None]
+ p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None])

-         s = tl.where(seen, s, float("-inf"))
-     p = tl.exp2(s)
+         p = tl.where(seen, p, 0.0)

# %% wrong="flash_dq_kernel" because="q is scaled first and rounded to half precision again"
- dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
+ dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
+ q = (q * (scale * 1.4426950408889634)).to(q.dtype)

- s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - lse[:, None]
+ s = tl.dot(q, tl.trans(k), input_precision="ieee") - lse[:, None]

# %% wrong="flash_dkdv_kernel" because="k is scaled first and rounded to half precision again"
- scale_log2 = scale * 1.4426950408889634
+ k = (k * (scale * 1.4426950408889634)).to(k.dtype)

- st = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2 - lse[None, :]
+ st = tl.dot(k, tl.trans(q), input_precision="ieee") - lse[None, :]

# %% wrong="flash_dkdv_kernel" because="dk is summed by TF32, tl.dot's default"
- dk = tl.dot(dst.to(q.dtype), q, dk, input_precision="ieee")
+ dk = tl.dot(dst.to(q.dtype), q, dk)

# %% wrong="flash_attention" because="k and v get no gradient where q needs none"
- q, k, v, o, lse = ctx.saved_tensors
+ if not ctx.needs_input_grad[0]:
+     return None, None, None, None
+ q, k, v, o, lse = ctx.saved_tensors

# %% right="flash_attention" because="a gradient only for the arguments that need one"
- return *flash_backward(q, k, v, o, lse, do, ctx.causal), None
+ found = flash_backward(q, k, v, o, lse, do, ctx.causal)
+ return *(g if n else None for g, n in zip(found, ctx.needs_input_grad, strict=False)), None
