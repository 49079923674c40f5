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
    return (x / torch.where(x_length == 0, 1, x_length)) @ (y / torch.where(y_length == 0, 1, y_length)).T

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
    return torch.nn.functional.normalize(x, dim=1, eps=1e-30) @ torch.nn.functional.normalize(y, dim=1, eps=1e-30).mT

# %% wrong="score_statistics" because="divides by d, not its root"
def score_statistics(d: int, n: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    scores = (torch.randn(n, d, generator=generator) * torch.randn(n, d, generator=generator)).sum(1)
    scaled = scores / d
    return scores.mean().item(), scores.var().item(), scaled.mean().item(), scaled.var().item()

# %% wrong="score_statistics" because="standard deviation instead of variance"
def score_statistics(d: int, n: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    scores = (torch.randn(n, d, generator=generator) * torch.randn(n, d, generator=generator)).sum(1)
    scaled = scores / math.sqrt(d)
    return scores.mean().item(), scores.std().item(), scaled.mean().item(), scaled.std().item()

# %% wrong="score_statistics" because="returns the theory and draws nothing"
def score_statistics(d: int, n: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    return 0.0, float(d), 0.0, 1.0

# %% wrong="score_statistics" because="all queries with all keys: n² scores that are not independent"
def score_statistics(d: int, n: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    rows = min(n, 400)
    scores = torch.randn(rows, d, generator=generator) @ torch.randn(rows, d, generator=generator).T
    scaled = scores / math.sqrt(d)
    return scores.mean().item(), scores.var().item(), scaled.mean().item(), scaled.var().item()

# %% wrong="score_statistics" because="uses PyTorch's global generator"
def score_statistics(d: int, n: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    scores = (torch.randn(n, d) * torch.randn(n, d)).sum(1)
    scaled = scores / math.sqrt(d)
    return scores.mean().item(), scores.var().item(), scaled.mean().item(), scaled.var().item()

# %% wrong="score_statistics" because="divides by n, not n - 1"
def score_statistics(d: int, n: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    scores = (torch.randn(n, d, generator=generator) * torch.randn(n, d, generator=generator)).sum(1)
    variance = scores.var(correction=0).item()
    return scores.mean().item(), variance, scores.mean().item() / math.sqrt(d), variance / d

# %% wrong="score_statistics" because="q with itself"
def score_statistics(d: int, n: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    q = torch.randn(n, d, generator=generator)
    scores = (q * q).sum(1)
    scaled = scores / math.sqrt(d)
    return scores.mean().item(), scores.var().item(), scaled.mean().item(), scaled.var().item()

# %% right="score_statistics" because="float64, one draw for both, statistics by hand"
def score_statistics(d: int, n: int, generator: torch.Generator) -> tuple[float, float, float, float]:
    q, k = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    scores = torch.einsum("nd,nd->n", q, k)
    mean = scores.sum() / n
    variance = ((scores - mean) ** 2).sum() / (n - 1)
    return float(mean), float(variance), float(mean / d ** 0.5), float(variance / d)

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

# %% wrong="effective_rank" because="squares the singular values"
def effective_rank(w: Tensor) -> Tensor:
    sigma = torch.linalg.svdvals(w).square()
    if sigma.sum() == 0:
        return sigma.sum()
    return torch.special.entr(sigma / sigma.sum()).sum().exp()

# %% wrong="effective_rank" because="the entropy without the exponential"
def effective_rank(w: Tensor) -> Tensor:
    sigma = torch.linalg.svdvals(w)
    if sigma.sum() == 0:
        return sigma.sum()
    return torch.special.entr(sigma / sigma.sum()).sum()

# %% wrong="effective_rank" because="0 log 0 is NaN"
def effective_rank(w: Tensor) -> Tensor:
    sigma = torch.linalg.svdvals(w)
    share = sigma / sigma.sum()
    return torch.exp(-(share * share.log()).sum())

# %% wrong="effective_rank" because="an absolute threshold, which a small matrix falls under"
def effective_rank(w: Tensor) -> Tensor:
    sigma = torch.linalg.svdvals(w)
    sigma = sigma[sigma > 1e-4]
    if len(sigma) == 0:
        return torch.zeros((), dtype=w.dtype)
    share = sigma / sigma.sum()
    return torch.exp(-(share * share.log()).sum())

# %% wrong="effective_rank" because="the participation ratio"
def effective_rank(w: Tensor) -> Tensor:
    sigma = torch.linalg.svdvals(w)
    if sigma.sum() == 0:
        return sigma.sum()
    return sigma.sum() ** 2 / sigma.square().sum()

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

# %% wrong="johnson_lindenstrauss" because="directions not scaled"
def johnson_lindenstrauss(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    return x @ torch.randn(x.shape[1], k, generator=generator, dtype=x.dtype)

# %% wrong="johnson_lindenstrauss" because="scaled by the root of D"
def johnson_lindenstrauss(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    return x @ torch.randn(x.shape[1], k, generator=generator, dtype=x.dtype) / math.sqrt(x.shape[1])

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
    return (x @ torch.randn(x.shape[1], 1, generator=generator, dtype=x.dtype) / math.sqrt(k)).repeat(1, k)

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
    return x @ signs * k ** -0.5

# %% right="johnson_lindenstrauss" because="einsum, entries drawn transposed"
def johnson_lindenstrauss(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    r = torch.randn(k, x.shape[1], generator=generator, dtype=x.dtype)
    return torch.einsum("nd,kd->nk", x, r).div(math.sqrt(k))

# %% wrong="randomized_low_rank" because="the exact SVD of the whole matrix"
def randomized_low_rank(w: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, passes: int = 2
                        ) -> tuple[Tensor, Tensor]:
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    return u[:, :rank] * sigma[:rank], vh[:rank].clone()

# %% wrong="randomized_low_rank" because="no power iterations"
def randomized_low_rank(w: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, passes: int = 2
                        ) -> tuple[Tensor, Tensor]:
    directions = min(rank + oversample, *w.shape)
    q = torch.linalg.qr(w @ torch.randn(w.shape[1], directions, generator=generator, dtype=w.dtype)).Q
    u, sigma, vh = torch.linalg.svd(q.T @ w, full_matrices=False)
    return q @ (u[:, :rank] * sigma[:rank]), vh[:rank].clone()

# %% wrong="randomized_low_rank" because="no QR between the products"
def randomized_low_rank(w: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, passes: int = 2
                        ) -> tuple[Tensor, Tensor]:
    directions = min(rank + oversample, *w.shape)
    y = w @ torch.randn(w.shape[1], directions, generator=generator, dtype=w.dtype)
    for _ in range(passes):
        y = w @ (w.T @ y)
    q = torch.linalg.qr(y).Q
    u, sigma, vh = torch.linalg.svd(q.T @ w, full_matrices=False)
    return q @ (u[:, :rank] * sigma[:rank]), vh[:rank].clone()

# %% wrong="randomized_low_rank" because="projects onto the first rank columns of Q, oversampling wasted"
def randomized_low_rank(w: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, passes: int = 2
                        ) -> tuple[Tensor, Tensor]:
    directions = min(rank + oversample, *w.shape)
    q = torch.linalg.qr(w @ torch.randn(w.shape[1], directions, generator=generator, dtype=w.dtype)).Q
    for _ in range(passes):
        q = torch.linalg.qr(w @ torch.linalg.qr(w.T @ q).Q).Q
    return q[:, :rank].clone(), q[:, :rank].T @ w

# %% wrong="randomized_low_rank" because="the random matrix is not orthonormalized"
def randomized_low_rank(w: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, passes: int = 2
                        ) -> tuple[Tensor, Tensor]:
    directions = min(rank + oversample, *w.shape)
    y = w @ torch.randn(w.shape[1], directions, generator=generator, dtype=w.dtype)
    y = y / y.norm(dim=0)
    u, sigma, vh = torch.linalg.svd(y.T @ w, full_matrices=False)
    return y @ (u[:, :rank] * sigma[:rank]), vh[:rank].clone()

# %% wrong="randomized_low_rank" because="the small u is not multiplied by Q, but cut to shape"
def randomized_low_rank(w: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, passes: int = 2
                        ) -> tuple[Tensor, Tensor]:
    directions = min(rank + oversample, *w.shape)
    q = torch.linalg.qr(w @ torch.randn(w.shape[1], directions, generator=generator, dtype=w.dtype)).Q
    for _ in range(passes):
        q = torch.linalg.qr(w @ torch.linalg.qr(w.T @ q).Q).Q
    _, sigma, vh = torch.linalg.svd(q.T @ w, full_matrices=False)
    return q[:, :rank] * sigma[:rank], vh[:rank].clone()

# %% wrong="randomized_low_rank" because="forms w wᵀ, as large as the matrix"
def randomized_low_rank(w: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, passes: int = 2
                        ) -> tuple[Tensor, Tensor]:
    directions = min(rank + oversample, *w.shape)
    square = w @ w.T
    q = torch.linalg.qr(w @ torch.randn(w.shape[1], directions, generator=generator, dtype=w.dtype)).Q
    for _ in range(passes):
        q = torch.linalg.qr(square @ q).Q
    u, sigma, vh = torch.linalg.svd(q.T @ w, full_matrices=False)
    return q @ (u[:, :rank] * sigma[:rank]), vh[:rank].clone()

# %% right="randomized_low_rank" because="works from the right: eigenvectors of the small (l, l) Gram matrix of QᵀW, by its SVD"
def randomized_low_rank(w: Tensor, rank: int, generator: torch.Generator, oversample: int = 8, passes: int = 2
                        ) -> tuple[Tensor, Tensor]:
    l = min(rank + oversample, w.shape[0], w.shape[1])
    q, _ = torch.linalg.qr(w.matmul(torch.randn(w.shape[1], l, generator=generator, dtype=w.dtype)))
    for _ in range(passes):
        z, _ = torch.linalg.qr(w.mT.matmul(q))
        q, _ = torch.linalg.qr(w.matmul(z))
    small = q.mT @ w                                  # (l, n)
    u = torch.linalg.svd(small, full_matrices=False).U[:, :rank]
    return q @ u, u.mT @ small

# %% wrong="share_near_surface" because="the share of the inner part"
def share_near_surface(d: int, thickness: float) -> float:
    return (1 - thickness) ** d

# %% wrong="share_near_surface" because="a share of the radius"
def share_near_surface(d: int, thickness: float) -> float:
    return thickness

# %% wrong="share_near_surface" because="first order only"
def share_near_surface(d: int, thickness: float) -> float:
    return min(1.0, d * thickness)

# %% wrong="share_near_surface" because="surface instead of volume"
def share_near_surface(d: int, thickness: float) -> float:
    return 1 - (1 - thickness) ** (d - 1)

# %% right="share_near_surface" because="through logarithms"
def share_near_surface(d: int, thickness: float) -> float:
    return 1.0 if thickness == 1 else -math.expm1(d * math.log1p(-thickness))

# %% wrong="nearly_orthogonal_directions" because="counts vectors, not pairs"
def nearly_orthogonal_directions(d: int, epsilon: float) -> float:
    return float(max(d, math.exp(d * epsilon ** 2 / 2)))

# %% wrong="nearly_orthogonal_directions" because="less than the axes for small epsilon"
def nearly_orthogonal_directions(d: int, epsilon: float) -> float:
    return math.exp(d * epsilon ** 2 / 4)

# %% wrong="nearly_orthogonal_directions" because="forgets the square of epsilon"
def nearly_orthogonal_directions(d: int, epsilon: float) -> float:
    return max(float(d), math.exp(d * epsilon / 4))

# %% right="nearly_orthogonal_directions" because="root of the inverse chance"
def nearly_orthogonal_directions(d: int, epsilon: float) -> float:
    bad_pair = math.exp(-d * epsilon * epsilon / 2)
    return max(1.0 * d, bad_pair ** -0.5)

# %% wrong="largest_saving_rank" because="the rank at which both are equal counts"
def largest_saving_rank(m: int, n: int) -> int:
    return m * n // (m + n)

# %% wrong="largest_saving_rank" because="half of the smaller side, right for squares only"
def largest_saving_rank(m: int, n: int) -> int:
    return (min(m, n) - 1) // 2

# %% wrong="largest_saving_rank" because="the full rank"
def largest_saving_rank(m: int, n: int) -> int:
    return min(m, n)

# %% right="largest_saving_rank" because="counts up"
def largest_saving_rank(m: int, n: int) -> int:
    r = 0
    while (r + 1) * (m + n) < m * n:
        r += 1
    return r

# %% wrong="score_variance" because="the shift of the keys left out"
def score_variance(d: int, q_std: float, k_std: float, k_mean: float = 0.0) -> float:
    return d * q_std ** 2 * k_std ** 2

# %% wrong="score_variance" because="standard deviations not squared"
def score_variance(d: int, q_std: float, k_std: float, k_mean: float = 0.0) -> float:
    return d * q_std * (k_std + k_mean ** 2)

# %% wrong="score_variance" because="d squared, as for fully dependent terms"
def score_variance(d: int, q_std: float, k_std: float, k_mean: float = 0.0) -> float:
    return d ** 2 * q_std ** 2 * (k_std ** 2 + k_mean ** 2)

# %% wrong="score_variance" because="the square of the mean of k added outside"
def score_variance(d: int, q_std: float, k_std: float, k_mean: float = 0.0) -> float:
    return d * (q_std ** 2 * k_std ** 2 + k_mean ** 2)

# %% right="score_variance" because="variance of a product, by the textbook formula"
def score_variance(d: int, q_std: float, k_std: float, k_mean: float = 0.0) -> float:
    q_var, k_var, q_mean = q_std ** 2, k_std ** 2, 0.0
    return sum(q_var * k_var + q_var * k_mean ** 2 + k_var * q_mean ** 2 for _ in range(d))
