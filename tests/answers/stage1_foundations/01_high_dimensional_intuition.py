# %% wrong="share_near_surface" because="the share of the inner part"
-     return 1 - (1 - thickness) ** d
+     return (1 - thickness) ** d

# %% wrong="share_near_surface" because="surface instead of volume"
-     return 1 - (1 - thickness) ** d
+     return 1 - (1 - thickness) ** (d - 1)

# %% wrong="share_near_surface" because="first order only"
-     return 1 - (1 - thickness) ** d
+     return min(1.0, d * thickness)

# %% wrong="share_near_surface" because="the power of the peel"
-     return 1 - (1 - thickness) ** d
+     return 1 - thickness**d

# %% right="share_near_surface" because="through logarithms"
def share_near_surface(d, thickness):
    return 1.0 if thickness == 1 else -math.expm1(d * math.log1p(-thickness))


# %% [markdown]
# Answers to lesson 01. Each cell stands in for an exercise cell, whole.

# %% wrong="cosine_similarity_matrix" because="dot products without dividing by the lengths"
def cosine_similarity_matrix(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.T

# %% wrong="cosine_similarity_matrix" because="0/0 for rows of zeros"
def cosine_similarity_matrix(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.T / (x.norm(dim=1)[:, None] * y.norm(dim=1))

# %% wrong="cosine_similarity_matrix" because="a small eps in the denominator bends the angles of short rows"
def cosine_similarity_matrix(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.T / (x.norm(dim=1)[:, None] * y.norm(dim=1) + 1e-8)

# %% wrong="cosine_similarity_matrix" because="normalizes the columns, not the rows"
def cosine_similarity_matrix(x: Tensor, y: Tensor) -> Tensor:
    x_length, y_length = x.norm(dim=0, keepdim=True), y.norm(dim=0, keepdim=True)
    return (x / torch.where(x_length == 0, 1, x_length)) @ (
        y / torch.where(y_length == 0, 1, y_length)
    ).T

# %% wrong="cosine_similarity_matrix" because="normalizes x in place"
def cosine_similarity_matrix(x: Tensor, y: Tensor) -> Tensor:
    x_length, y_length = x.norm(dim=1, keepdim=True), y.norm(dim=1, keepdim=True)
    x /= torch.where(x_length == 0, 1, x_length)
    return x @ (y / torch.where(y_length == 0, 1, y_length)).T

# %% wrong="cosine_similarity_matrix" because="broadcasts to (N, M, D)"
def cosine_similarity_matrix(x: Tensor, y: Tensor) -> Tensor:
    dots = (x[:, None, :] * y[None, :, :]).sum(-1)
    lengths = x.norm(dim=1)[:, None] * y.norm(dim=1)
    return torch.where(lengths == 0, 0, dots / torch.where(lengths == 0, 1, lengths))

# %% wrong="cosine_similarity_matrix" because="PyTorch's own, with its clamp at 1e-8"
def cosine_similarity_matrix(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=-1)

# %% wrong="cosine_similarity_matrix" because="goes through NumPy, so no gradient flows"
def cosine_similarity_matrix(x: Tensor, y: Tensor) -> Tensor:
    a, b = x.detach().numpy(), y.detach().numpy()
    a_length, b_length = (a * a).sum(1, keepdims=True) ** 0.5, (b * b).sum(1, keepdims=True) ** 0.5
    a_length[a_length == 0] = 1
    b_length[b_length == 0] = 1
    return torch.from_numpy((a / a_length) @ (b / b_length).T)

# %% right="cosine_similarity_matrix" because="divides the dot products, then sets the zero rows"
def cosine_similarity_matrix(x: Tensor, y: Tensor) -> Tensor:
    x_length, y_length = x.pow(2).sum(1).sqrt(), y.pow(2).sum(1).sqrt()
    zero = (x_length == 0)[:, None] | (y_length == 0)[None, :]
    lengths = torch.outer(x_length, y_length)
    return torch.einsum("nd,md->nm", x, y).div(lengths.masked_fill(zero, 1)).masked_fill(zero, 0)

# %% right="cosine_similarity_matrix" because="F.normalize with a tiny eps"
def cosine_similarity_matrix(x: Tensor, y: Tensor) -> Tensor:
    return (
        torch.nn.functional.normalize(x, dim=1, eps=1e-30)
        @ torch.nn.functional.normalize(y, dim=1, eps=1e-30).mT
    )

# %% wrong="score_statistics" because="divides by d, not its root" base="divides-d"
def score_statistics(
    d: int, n: int, generator: torch.Generator
) -> tuple[float, float, float, float]:
    scores = (torch.randn(n, d, generator=generator) * torch.randn(n, d, generator=generator)).sum(
        1
    )
    scaled = scores / d
    return scores.mean().item(), scores.var().item(), scaled.mean().item(), scaled.var().item()

# %% wrong="score_statistics" because="standard deviation instead of variance" of="divides-d"
- scaled = scores / d
- return scores.mean().item(), scores.var().item(), scaled.mean().item(), scaled.var().item()
+ scaled = scores / math.sqrt(d)
+ return scores.mean().item(), scores.std().item(), scaled.mean().item(), scaled.std().item()

# %% wrong="score_statistics" because="returns the theory and draws nothing"
def score_statistics(
    d: int, n: int, generator: torch.Generator
) -> tuple[float, float, float, float]:
    return 0.0, float(d), 0.0, 1.0

# %% wrong="score_statistics" because="all queries with all keys: n² scores that are not independent" base="all-queries"
def score_statistics(
    d: int, n: int, generator: torch.Generator
) -> tuple[float, float, float, float]:
    rows = min(n, 400)
    scores = torch.randn(rows, d, generator=generator) @ torch.randn(rows, d, generator=generator).T
    scaled = scores / math.sqrt(d)
    return scores.mean().item(), scores.var().item(), scaled.mean().item(), scaled.var().item()

# %% wrong="score_statistics" because="uses PyTorch's global generator" of="all-queries"
- rows = min(n, 400)
- scores = torch.randn(rows, d, generator=generator) @ torch.randn(rows, d, generator=generator).T
+ scores = (torch.randn(n, d) * torch.randn(n, d)).sum(1)

# %% wrong="score_statistics" because="divides by n, not n - 1" of="divides-d"
- scaled = scores / d
- return scores.mean().item(), scores.var().item(), scaled.mean().item(), scaled.var().item()
+ variance = scores.var(correction=0).item()
+ return scores.mean().item(), variance, scores.mean().item() / math.sqrt(d), variance / d

# %% wrong="score_statistics" because="q with itself" of="all-queries"
- rows = min(n, 400)
- scores = torch.randn(rows, d, generator=generator) @ torch.randn(rows, d, generator=generator).T
+ q = torch.randn(n, d, generator=generator)
+ scores = (q * q).sum(1)

# %% right="score_statistics" because="float64, one draw for both, statistics by hand"
def score_statistics(
    d: int, n: int, generator: torch.Generator
) -> tuple[float, float, float, float]:
    q, k = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    scores = torch.einsum("nd,nd->n", q, k)
    mean = scores.sum() / n
    variance = ((scores - mean) ** 2).sum() / (n - 1)
    return float(mean), float(variance), float(mean / d**0.5), float(variance / d)

# %% wrong="power_iteration" because="the length of Av, which has no sign"
def power_iteration(a: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    v = torch.randn(a.shape[0], generator=generator, dtype=a.dtype)
    for _ in range(steps):
        v = a @ v
        v = v / v.norm().clamp_min(1e-30)
    return (a @ v).norm(), v

# %% wrong="power_iteration" because="normalizes only at the end"
def power_iteration(a: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    v = torch.randn(a.shape[0], generator=generator, dtype=a.dtype)
    start = v / v.norm()
    for _ in range(steps):
        v = a @ v
    v = v / v.norm() if v.norm() > 0 else start
    return v @ a @ v, v

# %% wrong="power_iteration" because="NaN for the zero matrix"
def power_iteration(a: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    v = torch.randn(a.shape[0], generator=generator, dtype=a.dtype)
    for _ in range(steps):
        v = a @ v
        v = v / v.norm()
    return v @ a @ v, v

# %% wrong="power_iteration" because="starts from ones"
def power_iteration(a: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    v = torch.ones(a.shape[0], dtype=a.dtype) / a.shape[0] ** 0.5
    for _ in range(steps):
        w = a @ v
        v = w / w.norm() if w.norm() > 0 else v
    return v @ a @ v, v

# %% wrong="power_iteration" because="one step too many"
def power_iteration(a: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    v = torch.randn(a.shape[0], generator=generator, dtype=a.dtype)
    v = v / v.norm()
    for _ in range(steps + 1):
        w = a @ v
        v = w / w.norm() if w.norm() > 0 else v
    return v @ a @ v, v

# %% wrong="power_iteration" because="the quotient of the vector before the last step"
def power_iteration(a: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    v = torch.randn(a.shape[0], generator=generator, dtype=a.dtype)
    v = v / v.norm()
    for _ in range(steps):
        w = a @ v
        value = v @ w
        v = w / w.norm() if w.norm() > 0 else v
    return value, v

# %% wrong="power_iteration" because="the largest eigenvalue, not the largest in absolute value, from the library"
def power_iteration(a: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(a)
    return values[-1], vectors[:, -1]

# %% wrong="power_iteration" because="divides by the largest entry, so that the length is not 1"
def power_iteration(a: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    v = torch.randn(a.shape[0], generator=generator, dtype=a.dtype)
    for _ in range(steps):
        v = a @ v
        v = v / v.abs().max().clamp_min(1e-30)
    return v @ a @ v / (v @ v).clamp_min(1e-30), v

# %% right="power_iteration" because="scales by the largest entry inside, normalizes at the end"
def power_iteration(a: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    v = torch.randn(a.shape[0], generator=generator, dtype=a.dtype).unsqueeze(1)
    for _ in range(steps):
        product = torch.mm(a, v)
        if not product.any():
            break
        v = product / product.abs().max()
    v = torch.nn.functional.normalize(v, dim=0)
    return (v.mT @ a @ v).squeeze(), v.squeeze(1)

# %% wrong="low_rank_approximation" because="transposes vh, which is transposed already"
def low_rank_approximation(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if not 1 <= rank <= min(w.shape):
        raise ValueError("rank")
    u, sigma, v = torch.linalg.svd(w, full_matrices=False)
    return u[:, :rank] * sigma[:rank], v[:, :rank].T.clone()

# %% wrong="low_rank_approximation" because="keeps the smallest singular values"
def low_rank_approximation(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if not 1 <= rank <= min(w.shape):
        raise ValueError("rank")
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    return u[:, -rank:] * sigma[-rank:], vh[-rank:].clone()

# %% wrong="low_rank_approximation" because="sigma in both factors"
def low_rank_approximation(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if not 1 <= rank <= min(w.shape):
        raise ValueError("rank")
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    return u[:, :rank] * sigma[:rank], sigma[:rank, None] * vh[:rank]

# %% wrong="low_rank_approximation" because="b is a view of all of vh"
def low_rank_approximation(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if not 1 <= rank <= min(w.shape):
        raise ValueError("rank")
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    return u[:, :rank] * sigma[:rank], vh[:rank]

# %% wrong="low_rank_approximation" because="no error for an impossible rank"
def low_rank_approximation(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    return u[:, :rank] * sigma[:rank], vh[:rank].clone()

# %% wrong="low_rank_approximation" because="a projection onto the first rows, not the best ones"
def low_rank_approximation(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if not 1 <= rank <= min(w.shape):
        raise ValueError("rank")
    basis = torch.linalg.qr(w[:rank].T).Q
    return w @ basis, basis.T.clone()

# %% wrong="low_rank_approximation" because="eigenvectors of wᵀw, which squares small singular values away"
def low_rank_approximation(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if not 1 <= rank <= min(w.shape):
        raise ValueError("rank")
    v = torch.linalg.eigh(w.T @ w).eigenvectors[:, -rank:].clone()
    return w @ v, v.T.clone()

# %% right="low_rank_approximation" because="roots of sigma in both factors, from the full SVD"
def low_rank_approximation(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if rank < 1 or rank > w.shape[0] or rank > w.shape[1]:
        raise ValueError(f"no rank {rank} for {tuple(w.shape)}")
    u, sigma, vh = torch.linalg.svd(w)
    root = sigma[:rank].sqrt()
    return u[:, :rank] @ torch.diag(root), root[:, None] * vh[:rank, :]

# %% right="low_rank_approximation" because="sigma in b"
def low_rank_approximation(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if not 0 < rank <= min(w.shape):
        raise ValueError("impossible rank")
    u, sigma, vh = torch.svd(w)
    return u[:, :rank].clone(), (vh[:, :rank] * sigma[:rank]).T

# %% wrong="low_rank_approximation" because="a randomized decomposition, which is nearly the best"
def low_rank_approximation(w, rank):
    if not 1 <= rank <= min(w.shape):
        raise ValueError(f"rank must be between 1 and {min(w.shape)}, not {rank}")
    u, sigma, v = torch.svd_lowrank(w, q=min(rank + 6, *w.shape))
    return u[:, :rank] * sigma[:rank], v[:, :rank].T.clone()

# %% wrong="effective_rank" because="squares the singular values"
def effective_rank(w: Tensor) -> Tensor:
    sigma = torch.linalg.svdvals(w).square()
    if sigma.sum() == 0:
        return sigma.sum()
    return torch.special.entr(sigma / sigma.sum()).sum().exp()

# %% wrong="effective_rank" because="the entropy without the exponential" base="entropy-without"
def effective_rank(w: Tensor) -> Tensor:
    sigma = torch.linalg.svdvals(w)
    if sigma.sum() == 0:
        return sigma.sum()
    return torch.special.entr(sigma / sigma.sum()).sum()

# %% wrong="effective_rank" because="0 log 0 is NaN" base="log-nan"
def effective_rank(w: Tensor) -> Tensor:
    sigma = torch.linalg.svdvals(w)
    share = sigma / sigma.sum()
    return torch.exp(-(share * share.log()).sum())

# %% wrong="effective_rank" because="an absolute threshold, which a small matrix falls under" of="log-nan"
  sigma = torch.linalg.svdvals(w)
+ sigma = sigma[sigma > 1e-4]
+ if len(sigma) == 0:
+     return torch.zeros((), dtype=w.dtype)

# %% wrong="effective_rank" because="the participation ratio" of="entropy-without"
- return torch.special.entr(sigma / sigma.sum()).sum()
+ return sigma.sum() ** 2 / sigma.square().sum()

# %% wrong="effective_rank" because="the rank"
def effective_rank(w: Tensor) -> Tensor:
    return torch.linalg.matrix_rank(w).to(w.dtype)

# %% right="effective_rank" because="special.entr of a NaN-free share"
def effective_rank(w: Tensor) -> Tensor:
    sigma = torch.linalg.svd(w).S
    if not w.any():
        return torch.zeros((), dtype=w.dtype)
    return torch.special.entr(sigma / sigma.sum()).sum().exp()

# %% right="effective_rank" because="log of the sum minus the mean log, weighted"
def effective_rank(w: Tensor) -> Tensor:
    sigma = torch.linalg.svdvals(w)
    sigma = sigma[sigma > 0]
    if sigma.numel() == 0:
        return w.new_zeros(())
    total = sigma.sum()
    return total * torch.exp(-(sigma @ sigma.log()) / total)

# %% wrong="effective_rank" because="singular values below a thousandth are dropped"
def effective_rank(w):
    sigma = torch.linalg.svdvals(w)
    sigma = sigma[sigma > 1e-3 * sigma.max()]
    if len(sigma) == 0:
        return w.new_zeros(())
    share = sigma / sigma.sum()
    return (-(share * share.log()).sum()).exp()

# %% wrong="johnson_lindenstrauss" because="directions not scaled"
def johnson_lindenstrauss(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    return x @ torch.randn(x.shape[1], k, generator=generator, dtype=x.dtype)

# %% wrong="johnson_lindenstrauss" because="scaled by the root of D"
def johnson_lindenstrauss(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    return (
        x @ torch.randn(x.shape[1], k, generator=generator, dtype=x.dtype) / math.sqrt(x.shape[1])
    )

# %% wrong="johnson_lindenstrauss" because="scaled by k"
def johnson_lindenstrauss(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    return x @ torch.randn(x.shape[1], k, generator=generator, dtype=x.dtype) / k

# %% wrong="johnson_lindenstrauss" because="another matrix for every row"
def johnson_lindenstrauss(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    rows = [row @ torch.randn(x.shape[1], k, generator=generator, dtype=x.dtype) for row in x]
    return torch.stack(rows) / math.sqrt(k)

# %% wrong="johnson_lindenstrauss" because="picks k random coordinates"
def johnson_lindenstrauss(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randint(x.shape[1], (k,), generator=generator)
    return x[:, chosen] * math.sqrt(x.shape[1] / k)

# %% wrong="johnson_lindenstrauss" because="one direction, repeated"
def johnson_lindenstrauss(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    return (
        x @ torch.randn(x.shape[1], 1, generator=generator, dtype=x.dtype) / math.sqrt(k)
    ).repeat(1, k)

# %% wrong="johnson_lindenstrauss" because="rescales every row to its exact length, which is not linear"
def johnson_lindenstrauss(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    y = x @ torch.randn(x.shape[1], k, generator=generator, dtype=x.dtype)
    return y * (x.norm(dim=1, keepdim=True) / y.norm(dim=1, keepdim=True))

# %% wrong="johnson_lindenstrauss" because="an SVD that looks at the data, and pads with zeros"
def johnson_lindenstrauss(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    y = x @ torch.linalg.svd(x).Vh.T[:, :k]
    return torch.nn.functional.pad(y, (0, k - y.shape[1]))

# %% wrong="johnson_lindenstrauss" because="uniform numbers, whose mean is not 0"
def johnson_lindenstrauss(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    return x @ torch.rand(x.shape[1], k, generator=generator, dtype=x.dtype) * math.sqrt(3 / k)

# %% right="johnson_lindenstrauss" because="random signs"
def johnson_lindenstrauss(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    signs = 2 * torch.randint(2, (x.shape[1], k), generator=generator).to(x.dtype) - 1
    return x @ signs * k**-0.5

# %% right="johnson_lindenstrauss" because="einsum, entries drawn transposed"
def johnson_lindenstrauss(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    r = torch.randn(k, x.shape[1], generator=generator, dtype=x.dtype)
    return torch.einsum("nd,kd->nk", x, r).div(math.sqrt(k))

# %% wrong="randomized_low_rank" because="the exact SVD of the whole matrix"
def randomized_low_rank(
    w: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, passes: int = 2
) -> tuple[Tensor, Tensor]:
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    return u[:, :rank] * sigma[:rank], vh[:rank].clone()

# %% wrong="randomized_low_rank" because="no power iterations" base="no-power"
def randomized_low_rank(
    w: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, passes: int = 2
) -> tuple[Tensor, Tensor]:
    directions = min(rank + oversample, *w.shape)
    q = torch.linalg.qr(
        w @ torch.randn(w.shape[1], directions, generator=generator, dtype=w.dtype)
    ).Q
    u, sigma, vh = torch.linalg.svd(q.T @ w, full_matrices=False)
    return q @ (u[:, :rank] * sigma[:rank]), vh[:rank].clone()

# %% wrong="randomized_low_rank" because="no QR between the products"
def randomized_low_rank(
    w: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, passes: int = 2
) -> tuple[Tensor, Tensor]:
    directions = min(rank + oversample, *w.shape)
    y = w @ torch.randn(w.shape[1], directions, generator=generator, dtype=w.dtype)
    for _ in range(passes):
        y = w @ (w.T @ y)
    q = torch.linalg.qr(y).Q
    u, sigma, vh = torch.linalg.svd(q.T @ w, full_matrices=False)
    return q @ (u[:, :rank] * sigma[:rank]), vh[:rank].clone()

# %% wrong="randomized_low_rank" because="projects onto the first rank columns of Q, oversampling wasted" of="no-power"
- u, sigma, vh = torch.linalg.svd(q.T @ w, full_matrices=False)
- return q @ (u[:, :rank] * sigma[:rank]), vh[:rank].clone()
+ for _ in range(passes):
+     q = torch.linalg.qr(w @ torch.linalg.qr(w.T @ q).Q).Q
+ return q[:, :rank].clone(), q[:, :rank].T @ w

# %% wrong="randomized_low_rank" because="the random matrix is not orthonormalized"
def randomized_low_rank(
    w: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, passes: int = 2
) -> tuple[Tensor, Tensor]:
    directions = min(rank + oversample, *w.shape)
    y = w @ torch.randn(w.shape[1], directions, generator=generator, dtype=w.dtype)
    y = y / y.norm(dim=0)
    u, sigma, vh = torch.linalg.svd(y.T @ w, full_matrices=False)
    return y @ (u[:, :rank] * sigma[:rank]), vh[:rank].clone()

# %% wrong="randomized_low_rank" because="the small u is not multiplied by Q, but cut to shape" of="no-power"
- u, sigma, vh = torch.linalg.svd(q.T @ w, full_matrices=False)
- return q @ (u[:, :rank] * sigma[:rank]), vh[:rank].clone()
+ for _ in range(passes):
+     q = torch.linalg.qr(w @ torch.linalg.qr(w.T @ q).Q).Q
+ _, sigma, vh = torch.linalg.svd(q.T @ w, full_matrices=False)
+ return q[:, :rank] * sigma[:rank], vh[:rank].clone()

# %% wrong="randomized_low_rank" because="forms w wᵀ, as large as the matrix" of="no-power"
  directions = min(rank + oversample, *w.shape)
+ square = w @ w.T

  ).Q
+ for _ in range(passes):
+     q = torch.linalg.qr(square @ q).Q

# %% right="randomized_low_rank" because="works from the right: eigenvectors of the small (l, l) Gram matrix of QᵀW, by its SVD"
def randomized_low_rank(
    w: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, passes: int = 2
) -> tuple[Tensor, Tensor]:
    l = min(rank + oversample, w.shape[0], w.shape[1])
    q, _ = torch.linalg.qr(w.matmul(torch.randn(w.shape[1], l, generator=generator, dtype=w.dtype)))
    for _ in range(passes):
        z, _ = torch.linalg.qr(w.mT.matmul(q))
        q, _ = torch.linalg.qr(w.matmul(z))
    small = q.mT @ w  # (l, n)
    u = torch.linalg.svd(small, full_matrices=False).U[:, :rank]
    return q @ u, u.mT @ small

# %% wrong="key_questions" because="counts vectors, not pairs"
- "directions": math.exp(4096 * 0.1**2 / 4),
+ "directions": math.exp(4096 * 0.1**2 / 2),

# %% wrong="key_questions" because="forgets the square of epsilon"
- "directions": math.exp(4096 * 0.1**2 / 4),
+ "directions": math.exp(4096 * 0.1 / 4),

# %% wrong="key_questions" because="less than the axes for small epsilon"
- "few_directions": 64,  # exp(64 · 0.1² / 4) is 1.17: the axes are more
+ "few_directions": math.exp(64 * 0.1**2 / 4),

# %% wrong="key_questions" because="the rank at which both are equal counts"
- "saving_rank": (4096 * 4096 - 1) // (4096 + 4096),
+ "saving_rank": 4096 * 4096 // (4096 + 4096),

# %% wrong="key_questions" because="half of the smaller side, right for squares only"
- "wide_rank": (100 * 3 - 1) // (100 + 3),
+ "wide_rank": (min(100, 3) - 1) // 2,

# %% wrong="key_questions" because="a rank that is no whole number"
- "saving_rank": (4096 * 4096 - 1) // (4096 + 4096),
+ "saving_rank": 2047.999,

# %% wrong="key_questions" because="the shift of the keys left out"
- "score_variance": 64 * 0.5**2 * (3**2 + 4**2),
+ "score_variance": 64 * 0.5**2 * 3**2,

# %% wrong="key_questions" because="standard deviations not squared"
- "score_variance": 64 * 0.5**2 * (3**2 + 4**2),
+ "score_variance": 64 * 0.5 * (3 + 4**2),

# %% wrong="key_questions" because="d squared, as for fully dependent terms"
- "score_variance": 64 * 0.5**2 * (3**2 + 4**2),
+ "score_variance": 64**2 * 0.5**2 * (3**2 + 4**2),

# %% right="key_questions" because="by hand, to half a percent, and through logarithms"
def key_questions():
    return {
        "directions": 28_000,
        "few_directions": 64.0,
        "saving_rank": 2047,
        "wide_rank": 2,
        "score_variance": 400,
    }

# %% wrong="cosine_similarity_matrix" because="float64 goes through float32"
- return x_unit @ y_unit.T
+ return (x_unit.float() @ y_unit.float().T).to(x.dtype)

# %% wrong="score_statistics" because="uniform coordinates of variance 1"
- q = torch.randn(n, d, generator=generator)
- k = torch.randn(n, d, generator=generator)
+ q = (torch.rand(n, d, generator=generator) - 0.5) * math.sqrt(12)
+ k = (torch.rand(n, d, generator=generator) - 0.5) * math.sqrt(12)

# %% wrong="score_statistics" because="the generator's seed in a new generator"
- q = torch.randn(n, d, generator=generator)
+ generator = torch.Generator().manual_seed(generator.initial_seed())
+ q = torch.randn(n, d, generator=generator)

# %% wrong="power_iteration" because="an absolute threshold takes a small matrix for the zero matrix"
- if length == 0:  # v is mapped to zero: it is an eigenvector, of eigenvalue 0
+ if length < 1e-8:

# %% wrong="power_iteration" because="the start is drawn in float32 and converted"
- v = torch.randn(a.shape[0], generator=generator, dtype=a.dtype)
+ v = torch.randn(a.shape[0], generator=generator).to(a.dtype)

# %% wrong="randomized_low_rank" because="one pass too many"
- for _ in range(passes):
+ for _ in range(passes + 1):

# %% wrong="randomized_low_rank" because="the number of directions is not bounded by the sides of w"
- directions = min(rank + oversample, m, n)
+ directions = rank + oversample

# %% wrong="randomized_low_rank" because="oversample is not used"
- directions = min(rank + oversample, m, n)
+ directions = min(rank + 8, m, n)
