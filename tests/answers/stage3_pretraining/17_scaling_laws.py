# %% [markdown]
# Answers to lesson 17. A change is made to the reference unless a cell holds a whole answer.

# %% wrong="count_parameters" because="keys and values as wide as queries"
- block = 2 * width * (queries + keys) + 3 * width * config.mlp_size + 2 * width
+ block = 4 * width * queries + 3 * width * config.mlp_size + 2 * width

# %% wrong="count_parameters" because="two matrices in the MLP"
- block = 2 * width * (queries + keys) + 3 * width * config.mlp_size + 2 * width
+ block = 2 * width * (queries + keys) + 2 * width * config.mlp_size + 2 * width

# %% wrong="count_parameters" because="no gains"
- block = 2 * width * (queries + keys) + 3 * width * config.mlp_size + 2 * width
+ block = 2 * width * (queries + keys) + 3 * width * config.mlp_size

# %% wrong="count_parameters" because="the last gain counts with the blocks"
- return config.layers * block, config.vocab_size * width
+ return config.layers * block + width, config.vocab_size * width

# %% wrong="count_parameters" because="a head of its own"
- return config.layers * block, config.vocab_size * width
+ return config.layers * block, 2 * config.vocab_size * width

# %% wrong="count_parameters" because="12·L·d², the rule of thumb"
def count_parameters(config):
    return 12 * config.layers * config.hidden_size**2, config.vocab_size * config.hidden_size

# %% wrong="count_parameters" because="a mean over layers, as a float"
- return config.layers * block, config.vocab_size * width
+ return config.layers * block / 1, config.vocab_size * width

# %% right="count_parameters" because="asks a model without memory"
def count_parameters(config):
    with torch.device("meta"):
        model = models.Llama(config)
    return sum(p.numel() for p in model.layers.parameters()), model.embed_tokens.weight.numel()

# %% right="count_parameters" because="matrix by matrix"
def count_parameters(config):
    d, k = config.hidden_size, config.kv_heads * config.head_dim
    q = config.heads * config.head_dim
    shapes = [(q, d), (k, d), (k, d), (d, q), (config.mlp_size, d), (config.mlp_size, d)]
    shapes += [(d, config.mlp_size), (1, d), (1, d)]
    return config.layers * sum(a * b for a, b in shapes), d * config.vocab_size

# %% wrong="training_flops" because="6N with the gains"
- weights = config.layers * width * (2 * queries + 2 * keys + 3 * config.mlp_size)
+ weights = config.layers * width * (2 * queries + 2 * keys + 3 * config.mlp_size + 2)

# %% wrong="training_flops" because="the forward pass only"
- "blocks": 6 * tokens * weights,
+ "blocks": 2 * tokens * weights,

- "attention": 3 * tokens * config.layers * 2 * 2 * context * queries,
- "head": 6 * tokens * config.vocab_size * width,
+ "attention": tokens * config.layers * 2 * 2 * context * queries,
+ "head": 2 * tokens * config.vocab_size * width,

# %% wrong="training_flops" because="a multiply-add is one"
- "blocks": 6 * tokens * weights,
+ "blocks": 3 * tokens * weights,

# %% wrong="training_flops" because="the causal half of attention"
- "attention": 3 * tokens * config.layers * 2 * 2 * context * queries,
+ "attention": 3 * tokens * config.layers * 2 * context * queries,

# %% wrong="training_flops" because="config.context for the sequences' length"
- "attention": 3 * tokens * config.layers * 2 * 2 * context * queries,
+ "attention": 3 * tokens * config.layers * 2 * 2 * config.context * queries,

# %% wrong="training_flops" because="attention over all tokens"
- "attention": 3 * tokens * config.layers * 2 * 2 * context * queries,
+ "attention": 3 * tokens * config.layers * 2 * 2 * tokens * queries,

# %% wrong="training_flops" because="only the heads of the keys"
- "attention": 3 * tokens * config.layers * 2 * 2 * context * queries,
+ "attention": 3 * tokens * config.layers * 2 * 2 * context * keys,

# %% wrong="training_flops" because="attention of one layer"
- "attention": 3 * tokens * config.layers * 2 * 2 * context * queries,
+ "attention": 3 * tokens * 2 * 2 * context * queries,

# %% wrong="training_flops" because="the embedding's lookup counted as a product"
- "head": 6 * tokens * config.vocab_size * width,
+ "head": 12 * tokens * config.vocab_size * width,

# %% wrong="training_flops" because="attention backward once"
- "attention": 3 * tokens * config.layers * 2 * 2 * context * queries,
+ "attention": 2 * tokens * config.layers * 2 * 2 * context * queries,

# %% right="training_flops" because="product by product, sequence by sequence"
def training_flops(config, tokens, context):
    def product(a, b, c):
        return 2 * a * b * c

    d, size, sequences = config.hidden_size, config.head_dim, tokens // context
    linear = 2 * product(tokens, d, config.heads * size) + 2 * product(
        tokens, d, config.kv_heads * size
    )
    linear += 3 * product(tokens, d, config.mlp_size)
    scores = product(context, size, context) + product(context, context, size)
    return {
        "blocks": 3 * config.layers * linear,
        "attention": 3 * config.layers * sequences * config.heads * scores,
        "head": 3 * product(tokens, d, config.vocab_size),
    }

# %% right="training_flops" because="weights from a model without memory"
def training_flops(config, tokens, context):
    with torch.device("meta"):
        model = models.Llama(config)
    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim > 1)
    table = model.embed_tokens.weight.numel()
    attention = 12 * context * config.layers * config.heads * config.head_dim
    return {"blocks": 6 * matrices * tokens, "attention": attention * tokens, "head": 6 * table * tokens}

# %% wrong="fit_power_law" because="no floor: a line through logarithms"
def fit_power_law(x, y):
    u, v = x.double().log(), y.double().log()
    slope = ((u - u.mean()) * (v - v.mean())).sum() / (u - u.mean()).square().sum()
    return 0.0, float((v.mean() - slope * u.mean()).exp()), -float(slope)

# %% wrong="fit_power_law" because="alpha with its sign"
- return float(e), float(a * torch.exp(alpha * middle)), float(alpha)
+ return float(e), float(a * torch.exp(alpha * middle)), -float(alpha)

# %% wrong="fit_power_law" because="A relative to the middle of x"
- return float(e), float(a * torch.exp(alpha * middle)), float(alpha)
+ return float(e), float(a), float(alpha)

# %% wrong="fit_power_law" because="absolute errors"
- q = 1 / y
+ q = torch.ones_like(y)

- p = torch.exp(-alpha[:, None] * (log_x - middle)) / y
+ p = torch.exp(-alpha[:, None] * (log_x - middle))

- e = ((pp * q.sum() - qp * p.sum(-1)) / (qq * pp - qp * qp)).clamp(min=0)
- a = (p.sum(-1) - qp * e) / pp
- return e, a, (e[:, None] * q + a[:, None] * p - 1).square().sum(-1)
+ e = ((pp * y.sum() - qp * (p @ y)) / (qq * pp - qp * qp)).clamp(min=0)
+ a = (p @ y - qp * e) / pp
+ return e, a, (e[:, None] * q + a[:, None] * p - y).square().sum(-1)

# %% wrong="fit_power_law" because="a negative floor is let through"
- e = ((pp * q.sum() - qp * p.sum(-1)) / (qq * pp - qp * qp)).clamp(min=0)
+ e = (pp * q.sum() - qp * p.sum(-1)) / (qq * pp - qp * qp)

# %% wrong="fit_power_law" because="the floor is cut off after the fit"
- e = ((pp * q.sum() - qp * p.sum(-1)) / (qq * pp - qp * qp)).clamp(min=0)
+ e = (pp * q.sum() - qp * p.sum(-1)) / (qq * pp - qp * qp)

- return float(e), float(a * torch.exp(alpha * middle)), float(alpha)
+ return max(float(e), 0.0), float(a * torch.exp(alpha * middle)), float(alpha)

# %% wrong="fit_power_law" because="one coarse grid of alpha"
- for _ in range(8):  # each round looks between the neighbors of the best of 65
+ for _ in range(1):

# %% wrong="fit_power_law" because="the floor is the least y"
def fit_power_law(x, y):
    x, y = x.double(), y.double()
    e = 0.999 * y.min()
    u, v = x.log(), (y - e).log()
    slope = ((u - u.mean()) * (v - v.mean())).sum() / (u - u.mean()).square().sum()
    return float(e), float((v.mean() - slope * u.mean()).exp()), -float(slope)

# %% right="fit_power_law" because="golden section around the best of a grid, and QR"
def fit_power_law(x, y):
    x, y = x.detach().double(), y.detach().double()
    scale = float(x.log().mean().exp())

    def best(log_alpha):
        p = (x / scale) ** -math.exp(log_alpha) / y
        one = torch.ones(len(y), 1, dtype=torch.float64)
        e, a = torch.linalg.lstsq(torch.stack([1 / y, p], 1), one).solution[:, 0].tolist()
        if e < 0:
            e, a = 0.0, float(p.sum() / p.square().sum())
        return float((e / y + a * p - 1).square().sum()), e, a

    grid = [math.log(0.01) + i * (math.log(3) - math.log(0.01)) / 60 for i in range(61)]
    i = min(range(61), key=lambda i: best(grid[i])[0])
    low, high = grid[max(i - 1, 0)], grid[min(i + 1, 60)]
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(50):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if best(left)[0] < best(right)[0]:
            high = right
        else:
            low = left
    middle = (low + high) / 2
    _, e, a = best(middle)
    return e, a * scale ** math.exp(middle), math.exp(middle)

# %% right="fit_power_law" because="SciPy's bounded search, with non-negative least squares inside"
def fit_power_law(x, y):
    import numpy as np
    from scipy.optimize import minimize_scalar, nnls

    u, y = np.log(x.detach().double().numpy()), y.detach().double().numpy()
    u, middle = u - u.mean(), u.mean()

    def pair(log_alpha):
        return nnls(np.stack([1 / y, np.exp(-np.exp(log_alpha) * u) / y], 1), np.ones(len(y)))

    grid = np.linspace(np.log(0.01), np.log(3), 100)
    i = int(np.argmin([pair(t)[1] for t in grid]))
    bounds = grid[max(i - 1, 0)], grid[min(i + 1, 99)]
    found = minimize_scalar(
        lambda t: pair(t)[1] ** 2, bounds=bounds, method="bounded", options={"xatol": 1e-10}
    )
    alpha = float(np.exp(found.x))
    e, a = pair(found.x)[0]
    return float(e), float(a) * math.exp(alpha * middle), alpha

# %% wrong="isoflop_minimum" because="a parabola in N"
- u = n.double().log()
+ u = n.double()

- return math.exp(middle + width * vertex), c0 - c1 * c1 / (4 * c2)
+ return float(middle + width * vertex), c0 - c1 * c1 / (4 * c2)

# %% wrong="isoflop_minimum" because="the best run is the minimum"
def isoflop_minimum(n, loss):
    if len(n.unique()) < 3:
        raise ValueError("too few sizes")
    i = int(loss.argmin())
    return float(n[i]), float(loss[i])

# %% wrong="isoflop_minimum" because="the loss at the vertex is c0"
- return math.exp(middle + width * vertex), c0 - c1 * c1 / (4 * c2)
+ return math.exp(middle + width * vertex), c0

# %% wrong="isoflop_minimum" because="the vertex at -c1/c2"
- vertex = -c1 / (2 * c2)
+ vertex = -c1 / c2

# %% wrong="isoflop_minimum" because="log N is returned"
- return math.exp(middle + width * vertex), c0 - c1 * c1 / (4 * c2)
+ return float(middle + width * vertex), c0 - c1 * c1 / (4 * c2)

# %% wrong="isoflop_minimum" because="log 10 in, e out"
- u = n.double().log()
+ u = n.double().log10()

# %% wrong="isoflop_minimum" because="kept among the sizes that were trained"
- vertex = -c1 / (2 * c2)
+ vertex = min(max(-c1 / (2 * c2), float(t.min())), float(t.max()))

# %% wrong="isoflop_minimum" because="a maximum is returned too"
- if c2 <= 0:
-     raise ValueError("this parabola opens down: there is no minimum among these sizes")

# %% wrong="isoflop_minimum" because="float32, uncentered"
def isoflop_minimum(n, loss):
    if len(n.unique()) < 3:
        raise ValueError("too few sizes")
    u = n.float().log()
    v = torch.stack([u**0, u, u**2], -1)
    c0, c1, c2 = torch.linalg.lstsq(v, loss.float()[:, None]).solution[:, 0].tolist()
    if c2 <= 0:
        raise ValueError("no minimum")
    return math.exp(-c1 / (2 * c2)), c0 - c1 * c1 / (4 * c2)

# %% wrong="isoflop_minimum" because="equal sizes counted as different"
- if len(n.unique()) < 3:
-     raise ValueError(f"a parabola needs three different sizes; there are {len(n.unique())}")
+ if len(n) < 3:
+     raise ValueError("too few sizes")

# %% right="isoflop_minimum" because="NumPy's polyfit"
def isoflop_minimum(n, loss):
    import numpy as np

    if len(set(n.tolist())) < 3:
        raise ValueError("three different sizes are needed")
    u = np.log(n.detach().double().numpy())
    shift = u.mean()
    c2, c1, c0 = np.polyfit(u - shift, loss.detach().double().numpy(), 2)
    if not c2 > 0:
        raise ValueError("no minimum")
    t = -c1 / (2 * c2)
    return float(np.exp(shift + t)), float(c0 + c1 * t + c2 * t * t)

# %% right="isoflop_minimum" because="normal equations"
def isoflop_minimum(n, loss):
    if len(torch.unique(n)) < 3:
        raise ValueError("three different sizes are needed")
    u = torch.log(n.double())
    t = u - u.mean()
    v = torch.stack([torch.ones_like(t), t, t.square()])
    c = torch.linalg.solve(v @ v.T, v @ loss.double())
    if c[2] <= 0:
        raise ValueError("no minimum")
    t = -c[1] / c[2] / 2
    return (u.mean() + t).exp().item(), (c[0] + c[1] * t / 2).item()

# %% wrong="chinchilla_objective" because="the mean over runs"
- return huber.sum(-1)
+ return huber.mean(-1)

# %% wrong="chinchilla_objective" because="squares"
- huber = torch.where(size <= delta, size**2 / 2, delta * (size - delta / 2))
+ huber = size**2 / 2

# %% wrong="chinchilla_objective" because="the line does not meet the parabola"
- huber = torch.where(size <= delta, size**2 / 2, delta * (size - delta / 2))
+ huber = torch.where(size <= delta, size**2 / 2, delta * size)

# %% wrong="chinchilla_objective" because="no half"
- huber = torch.where(size <= delta, size**2 / 2, delta * (size - delta / 2))
+ huber = torch.where(size <= delta, size**2, delta * (2 * size - delta))

# %% wrong="chinchilla_objective" because="delta is always a permille"
- huber = torch.where(size <= delta, size**2 / 2, delta * (size - delta / 2))
+ huber = torch.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 1e-3 / 2))

# %% wrong="chinchilla_objective" because="residuals of the loss, not of its logarithm"
- residual = torch.stack(terms).logsumexp(0) - loss.log()
+ residual = torch.stack(terms).logsumexp(0).exp() - loss

# %% wrong="chinchilla_objective" because="exponentials that overflow"
- residual = torch.stack(terms).logsumexp(0) - loss.log()
- size = residual.abs()
+ law = e.exp() + a.exp() / n**alpha + b.exp() / d**beta
+ size = (law.log() - loss.log()).abs()

# %% wrong="chinchilla_objective" because="E instead of its logarithm"
- terms = torch.broadcast_tensors(a - alpha * n.log(), b - beta * d.log(), e)
+ terms = torch.broadcast_tensors(a - alpha * n.log(), b - beta * d.log(), e.clamp(min=1e-6).log())

# %% wrong="chinchilla_objective" because="the exponents exchanged"
- a, b, e, alpha, beta = theta[..., None].unbind(-2)  # each (..., 1), against (runs,)
+ a, b, e, beta, alpha = theta[..., None].unbind(-2)

# %% wrong="chinchilla_objective" because="one sum for all vectors"
- return huber.sum(-1)
+ return huber.sum()

# %% wrong="chinchilla_objective" because="detached"
- return huber.sum(-1)
+ return huber.sum(-1).detach()

# %% right="chinchilla_objective" because="F.huber_loss, and slices"
def chinchilla_objective(theta, n, d, loss, delta=1e-3):
    a, b, e, alpha, beta = (theta[..., i, None] for i in range(5))
    law = torch.logaddexp(
        torch.logaddexp(a - alpha * torch.log(n), b - beta * torch.log(d)), e.expand(*e.shape[:-1], len(n))
    )
    target = torch.log(loss).expand_as(law)
    return nn.functional.huber_loss(law, target, reduction="none", delta=delta).sum(-1)

# %% right="chinchilla_objective" because="the largest term taken out by hand, Huber by clamps"
def chinchilla_objective(theta, n, d, loss, delta=1e-3):
    shape = theta.shape[:-1]
    rows = theta.reshape(-1, 5)
    first = rows[:, 0:1] - rows[:, 3:4] * n.log()
    second = rows[:, 1:2] - rows[:, 4:5] * d.log()
    third = rows[:, 2:3] + torch.zeros_like(first)
    top = torch.maximum(torch.maximum(first, second), third).detach()
    law = top + ((first - top).exp() + (second - top).exp() + (third - top).exp()).log()
    r = (law - loss.log()).abs()
    inner = r.clamp(max=delta)
    return (inner * (r - inner / 2)).sum(-1).reshape(shape)

# %% wrong="fit_chinchilla" because="one start"
- for floor in (-1.0, 0.0, 0.5, 1.0):  # an E that has sunk to 0 stays there: start from several
-     starts = grid.new_full((len(grid), 5), floor)
-     starts[:, [0, 1, 3, 4]] = grid
-     theta = starts[chinchilla_objective(starts, n, d, loss, delta).argmin()].requires_grad_()
+ for start in ([0.0, 0.0, 0.0, 0.3, 0.3],):
+     theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)

# %% wrong="fit_chinchilla" because="one start, of ones"
- for floor in (-1.0, 0.0, 0.5, 1.0):  # an E that has sunk to 0 stays there: start from several
-     starts = grid.new_full((len(grid), 5), floor)
-     starts[:, [0, 1, 3, 4]] = grid
-     theta = starts[chinchilla_objective(starts, n, d, loss, delta).argmin()].requires_grad_()
+ for _ in range(1):
+     theta = torch.ones(5, dtype=torch.float64, requires_grad=True)

# %% wrong="fit_chinchilla" because="the optimizer's own tolerances"
- max_iter=400,
- tolerance_grad=1e-10,
- tolerance_change=1e-13,
- history_size=20,
- line_search_fn="strong_wolfe",
+ line_search_fn="strong_wolfe",

# %% wrong="fit_chinchilla" because="the best of the grid, without a search"
- search.step(evaluate)

# %% wrong="fit_chinchilla" because="least squares"
- value = chinchilla_objective(theta, n, d, loss, delta)
+ value = chinchilla_objective(theta, n, d, loss, 10.0)

- ends.append((float(chinchilla_objective(theta, n, d, loss, delta)), theta.tolist()))
+ ends.append((float(chinchilla_objective(theta, n, d, loss, 10.0)), theta.tolist()))

# %% wrong="fit_chinchilla" because="delta is not handed on"
- value = chinchilla_objective(theta, n, d, loss, delta)
+ value = chinchilla_objective(theta, n, d, loss)

- ends.append((float(chinchilla_objective(theta, n, d, loss, delta)), theta.tolist()))
+ ends.append((float(chinchilla_objective(theta, n, d, loss)), theta.tolist()))

# %% wrong="fit_chinchilla" because="logarithms are returned"
- return math.exp(log_e), math.exp(log_a), math.exp(log_b), alpha, beta
+ return log_e, log_a, log_b, alpha, beta

# %% wrong="fit_chinchilla" because="A and B exchanged"
- return math.exp(log_e), math.exp(log_a), math.exp(log_b), alpha, beta
+ return math.exp(log_e), math.exp(log_b), math.exp(log_a), beta, alpha

# %% wrong="fit_chinchilla" because="no floor"
- return math.exp(log_e), math.exp(log_a), math.exp(log_b), alpha, beta
+ return 0.0, math.exp(log_a), math.exp(log_b), alpha, beta

# %% wrong="fit_chinchilla" because="the worst end instead of the best"
- log_a, log_b, log_e, alpha, beta = min(ends)[1]
+ log_a, log_b, log_e, alpha, beta = max(ends)[1]

# %% wrong="fit_chinchilla" because="alpha and beta are one"
def fit_chinchilla(n, d, loss, delta=1e-3):
    n, d, loss = n.double(), d.double(), loss.double()
    theta = torch.tensor([6.0, 7.0, 0.5, 0.35], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [theta], max_iter=400, tolerance_grad=1e-10, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )

    def evaluate():
        search.zero_grad()
        value = chinchilla_objective(theta[[0, 1, 2, 3, 3]], n, d, loss, delta)
        value.backward()
        return value

    search.step(evaluate)
    a, b, e, alpha = theta.detach().tolist()
    return math.exp(e), math.exp(a), math.exp(b), alpha, alpha

# %% right="fit_chinchilla" because="damped, reweighted least squares from the best starts of a grid"
def fit_chinchilla(n, d, loss, delta=1e-3):
    n, d, loss = n.double(), d.double(), loss.double()

    def residuals(theta):
        a, b, e, alpha, beta = theta[..., None].unbind(-2)
        terms = torch.stack(
            torch.broadcast_tensors(a - alpha * n.log(), b - beta * d.log(), e)
        )
        return terms.logsumexp(0) - loss.log(), terms.softmax(0)

    def price(theta):
        size = residuals(theta)[0].abs()
        inner = size.clamp(max=delta)
        return (inner * (size - inner / 2)).sum(-1)

    steps = torch.tensor([0.1, 0.3, 0.5, 0.8], dtype=torch.float64)
    scales = torch.arange(0, 24, 3, dtype=torch.float64)
    best = None
    for floor in (-1.5, -0.5, 0.3, 0.7, 1.1):
        one = torch.tensor([floor], dtype=torch.float64)
        grid = torch.cartesian_prod(scales, scales, one, steps, steps)
        theta = grid[price(grid).argmin()]
        least, damping = price(theta), 1e-3
        for _ in range(150):
            r, share = residuals(theta)
            slopes = torch.stack([*share, -share[0] * n.log(), -share[1] * d.log()], -1)
            weight = (delta / r.abs().clamp(min=1e-12)).clamp(max=1)
            square = slopes.T @ (weight[:, None] * slopes)
            square = square + damping * square.diag().clamp(min=1e-14).diag()
            move = torch.linalg.solve(square, slopes.T @ (weight * r))
            after = price(theta - move)
            if after < least:
                theta, least, damping = theta - move, after, damping / 4
            else:
                damping = min(10 * damping, 1e8)
        if best is None or least < best[0]:
            best = least, theta.tolist()
    log_a, log_b, log_e, alpha, beta = best[1]
    return math.exp(log_e), math.exp(log_a), math.exp(log_b), alpha, beta

# %% right="fit_chinchilla" because="SciPy's L-BFGS-B with the gradient by hand"
def fit_chinchilla(n, d, loss, delta=1e-3):
    import numpy as np
    from scipy.optimize import minimize

    u, v, y = (np.log(t.detach().double().numpy()) for t in (n, d, loss))

    def objective(theta):
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * u, b - beta * v, e + 0 * u])
        top = terms.max(0)
        share = np.exp(terms - top)
        law = top + np.log(share.sum(0))
        share /= share.sum(0)
        r = law - y
        slope = np.clip(r, -delta, delta)
        value = (np.abs(slope) * (np.abs(r) - np.abs(slope) / 2)).sum()
        first, second = slope * share[0], slope * share[1]
        return 1e3 * value, 1e3 * np.array(
            [first.sum(), second.sum(), (slope * share[2]).sum(), -first @ u, -second @ v]
        )

    best = None
    for e in (-1.2, -0.3, 0.2, 0.6, 1.1):
        starts = [
            np.array([a, b, e, alpha, beta])
            for a in range(0, 18, 3)
            for b in range(0, 18, 3)
            for alpha in (0.1, 0.3, 0.6, 0.9)
            for beta in (0.1, 0.3, 0.6, 0.9)
        ]
        for start in sorted(starts, key=lambda s: objective(s)[0])[:4]:
            found = minimize(
                objective,
                start,
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": 3000, "maxfun": 6000, "ftol": 1e-16, "gtol": 1e-11},
            )
            if best is None or found.fun < best.fun:
                best = found
    a, b, e, alpha, beta = (float(value) for value in best.x)
    return math.exp(e), math.exp(a), math.exp(b), alpha, beta

# %% wrong="compute_optimal" because="the exponents exchanged"
- n = g * (flops / 6) ** (beta / (alpha + beta))
+ n = g * (flops / 6) ** (alpha / (alpha + beta))

# %% wrong="compute_optimal" because="G upside down"
- g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
+ g = (beta * b / (alpha * a)) ** (1 / (alpha + beta))

# %% wrong="compute_optimal" because="the terms are equal, not in the ratio of the exponents"
- g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
+ g = (a / b) ** (1 / (alpha + beta))

# %% wrong="compute_optimal" because="no 6"
- n = g * (flops / 6) ** (beta / (alpha + beta))
- return n, flops / 6 / n
+ n = g * flops ** (beta / (alpha + beta))
+ return n, flops / n

# %% wrong="compute_optimal" because="tokens first"
- return n, flops / 6 / n
+ return flops / 6 / n, n

# %% wrong="compute_optimal" because="20 tokens per parameter"
def compute_optimal(surface, flops):
    n = (flops / 120) ** 0.5
    return n, 20 * n

# %% wrong="compute_optimal" because="rounded"
- return n, flops / 6 / n
+ return float(round(n)), float(round(flops / 6 / n))

# %% right="compute_optimal" because="D first"
def compute_optimal(surface, flops):
    e, a, b, alpha, beta = surface
    product = flops / 6
    d = (beta * b / (alpha * a)) ** (1 / (alpha + beta)) * product ** (alpha / (alpha + beta))
    return product / d, d

# %% right="compute_optimal" because="logarithms"
def compute_optimal(surface, flops):
    _, a, b, alpha, beta = surface
    log_n = math.log(alpha * a) - math.log(beta * b) + beta * math.log(flops / 6)
    log_n /= alpha + beta
    return math.exp(log_n), math.exp(math.log(flops / 6) - log_n)

# %% wrong="inference_aware_optimum" because="inference is ignored"
- if alpha * odds / beta > 1 + inference_tokens / 3 * math.exp(-log_d):
+ if alpha * odds / beta > 1:

# %% wrong="inference_aware_optimum" because="inference costs 6N per token"
- if alpha * odds / beta > 1 + inference_tokens / 3 * math.exp(-log_d):
+ if alpha * odds / beta > 1 + inference_tokens * math.exp(-log_d):

# %% wrong="inference_aware_optimum" because="inference costs N per token"
- if alpha * odds / beta > 1 + inference_tokens / 3 * math.exp(-log_d):
+ if alpha * odds / beta > 1 + inference_tokens / 6 * math.exp(-log_d):

# %% wrong="inference_aware_optimum" because="bisection to the wrong side"
- if alpha * odds / beta > 1 + inference_tokens / 3 * math.exp(-log_d):
+ if alpha * odds / beta < 1 + inference_tokens / 3 * math.exp(-log_d):

# %% wrong="inference_aware_optimum" because="twenty halvings"
- for _ in range(100):
+ for _ in range(20):

# %% wrong="inference_aware_optimum" because="the target is not checked"
- if gap <= 0:
-     raise ValueError(f"no model reaches {target}: the surface ends at {e}")
+ gap = abs(gap) + 1e-9

# %% wrong="inference_aware_optimum" because="tokens first"
- return (a * (1 + 1 / odds) / gap) ** (1 / alpha), math.exp(log_d)
+ return math.exp(log_d), (a * (1 + 1 / odds) / gap) ** (1 / alpha)

# %% wrong="inference_aware_optimum" because="the floor is left out of the gap"
- gap = target - e
- if gap <= 0:
+ gap = target
+ if target <= e:

# %% wrong="inference_aware_optimum" because="the compute-optimal model, trained longer by the tokens served"
def inference_aware_optimum(surface, target, inference_tokens):
    e, a, b, alpha, beta = surface
    if target <= e:
        raise ValueError("out of reach")
    gap = target - e
    n = (a * (alpha + beta) / (beta * gap)) ** (1 / alpha)
    return n, (b * (alpha + beta) / (alpha * gap)) ** (1 / beta) + inference_tokens / 3

# %% wrong="inference_aware_optimum" because="log N is bisected to 1e-9"
def inference_aware_optimum(surface, target, inference_tokens):
    e, a, b, alpha, beta = surface
    gap = target - e
    if gap <= 0:
        raise ValueError("no model reaches it")
    low = math.log(a / gap) / alpha
    high = low + 200
    while high - low > 1e-9:
        u = (low + high) / 2
        left = gap - a * math.exp(-alpha * u)
        d = (b / left) ** (1 / beta) if left > 0 else math.inf
        if left <= 0 or alpha * (gap - left) / (beta * left) > 1 + inference_tokens / (3 * d):
            low = u
        else:
            high = u
    n = math.exp(high)
    return n, (b / (gap - a * math.exp(-alpha * high))) ** (1 / beta)

# %% wrong="inference_aware_optimum" because="twenty-six halvings"
- for _ in range(100):
+ for _ in range(26):

# %% wrong="inference_aware_optimum" because="bisection of log N that stops at 1e-5"
def inference_aware_optimum(surface, target, inference_tokens):
    e, a, b, alpha, beta = surface
    gap = target - e
    if gap <= 0:
        raise ValueError("no model reaches it")
    low = math.log(a / gap) / alpha
    high = low + 200
    while high - low > 1e-5:
        u = (low + high) / 2
        left = gap - a * math.exp(-alpha * u)
        d = (b / left) ** (1 / beta) if left > 0 else math.inf
        if left <= 0 or alpha * (gap - left) / (beta * left) > 1 + inference_tokens / (3 * d):
            low = u
        else:
            high = u
    n = math.exp(high)
    return n, (b / (gap - a * math.exp(-alpha * high))) ** (1 / beta)

# %% right="inference_aware_optimum" because="thirty halvings, which are enough for what is asked"
- for _ in range(100):
+ for _ in range(30):

# %% right="inference_aware_optimum" because="bisection of log N on the slope"
def inference_aware_optimum(surface, target, inference_tokens):
    e, a, b, alpha, beta = surface
    gap = target - e
    if not gap > 0:
        raise ValueError("the target is below the floor")

    def tokens(log_n):
        rest = -math.expm1(math.log(a / gap) - alpha * log_n)  # share of the gap for the data
        return (b / gap / rest) ** (1 / beta) if rest > 1e-60 else math.inf

    low = math.log(a / gap) / alpha
    high = low + 200
    for _ in range(300):
        u = (low + high) / 2
        d = tokens(u)
        if d == math.inf:
            low = u
            continue
        ratio = alpha * a * math.exp(-alpha * u) / (beta * b * d**-beta)
        if ratio > 1 + inference_tokens / (3 * d):
            low = u
        else:
            high = u
    return math.exp(high), tokens(high)

# %% right="inference_aware_optimum" because="ternary search of the total over the share of the gap"
def inference_aware_optimum(surface, target, inference_tokens):
    e, a, b, alpha, beta = surface
    if target <= e:
        raise ValueError("out of reach")
    gap = target - e

    def split(x):
        share, rest = 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(x))
        return (a / (share * gap)) ** (1 / alpha), (b / (rest * gap)) ** (1 / beta)

    def slope(x):
        n, d = split(x)
        rest = 1 / (1 + math.exp(x))
        # d log N/dx = −rest/alpha, d log D/dx = share/beta
        return 6 * d * (-rest / alpha + (1 - rest) / beta) - 2 * inference_tokens * rest / alpha

    low, high = -60.0, 60.0
    for _ in range(200):
        x = (low + high) / 2
        if slope(x) > 0:
            high = x
        else:
            low = x
    return split(x)

# %% wrong="gradient_noise_scale" because="the sign of the trace"
- trace = (g1 - g2) / (1 / small_batch - 1 / big_batch)
+ trace = (g2 - g1) / (1 / small_batch - 1 / big_batch)

# %% wrong="gradient_noise_scale" because="the big batch's norm taken for the true gradient"
- signal = (big_batch * g2 - small_batch * g1) / (big_batch - small_batch)
+ signal = g2

# %% wrong="gradient_noise_scale" because="batches exchanged"
- signal = (big_batch * g2 - small_batch * g1) / (big_batch - small_batch)
+ signal = (big_batch * g1 - small_batch * g2) / (big_batch - small_batch)

# %% wrong="gradient_noise_scale" because="the trace per batch, not per example"
- trace = (g1 - g2) / (1 / small_batch - 1 / big_batch)
+ trace = g1 - g2

# %% wrong="gradient_noise_scale" because="the inverse"
- return signal, trace, trace / signal if signal > 0 else math.inf
+ return signal, trace, signal / trace if signal > 0 else math.inf

# %% wrong="gradient_noise_scale" because="negative where there is no signal"
- return signal, trace, trace / signal if signal > 0 else math.inf
+ return signal, trace, trace / signal

# %% wrong="gradient_noise_scale" because="the mean of ratios"
def gradient_noise_scale(small, big, small_batch, big_batch):
    if small_batch >= big_batch:
        raise ValueError("small < big")
    g1, g2 = small.double(), big.double().mean()
    signal = (big_batch * g2 - small_batch * g1) / (big_batch - small_batch)
    trace = (g1 - g2) / (1 / small_batch - 1 / big_batch)
    scale = float((trace / signal).mean()) if signal.mean() > 0 else math.inf
    return float(signal.mean()), float(trace.mean()), scale

# %% wrong="gradient_noise_scale" because="means in the format of the norms"
- g1, g2 = float(small.double().mean()), float(big.double().mean())
+ g1, g2 = float(small.mean()), float(big.mean())

# %% wrong="gradient_noise_scale" because="sums for means"
- g1, g2 = float(small.double().mean()), float(big.double().mean())
+ g1, g2 = float(small.double().sum()), float(big.double().sum())

# %% wrong="gradient_noise_scale" because="only equal batches are refused"
- if small_batch >= big_batch:
+ if small_batch == big_batch:

# %% right="gradient_noise_scale" because="a system of two equations"
def gradient_noise_scale(small, big, small_batch, big_batch):
    if not small_batch < big_batch:
        raise ValueError("small < big")
    system = torch.tensor([[1.0, 1 / small_batch], [1.0, 1 / big_batch]], dtype=torch.float64)
    means = torch.stack([small.double().mean(), big.double().mean()]).cpu()
    signal, trace = torch.linalg.solve(system, means).tolist()
    return signal, trace, math.inf if signal <= 0 else trace / signal

# %% right="gradient_noise_scale" because="the trace first, the signal by what is left"
def gradient_noise_scale(small, big, small_batch, big_batch):
    if big_batch <= small_batch:
        raise ValueError("small < big")
    g1, g2 = small.to(torch.float64).mean().item(), big.to(torch.float64).mean().item()
    trace = (g1 - g2) * small_batch * big_batch / (big_batch - small_batch)
    signal = g2 - trace / big_batch
    return signal, trace, trace / signal if signal > 0 else float("inf")

# %% wrong="measure_gradient_noise" because="norms, not squared"
- small.append(gradient.square().sum())
+ small.append(gradient.norm())

# %% wrong="measure_gradient_noise" because="the sum of gradients, not their mean"
- return torch.stack(small), (total / len(small)).square().sum()
+ return torch.stack(small), total.square().sum()

# %% wrong="measure_gradient_noise" because="the mean of the squared norms"
- return torch.stack(small), (total / len(small)).square().sum()
+ return torch.stack(small), torch.stack(small).mean()

# %% wrong="measure_gradient_noise" because="backward, into a .grad that stays" base="backward"
def measure_gradient_noise(model, windows, micro):
    parameters = [p for p in model.parameters() if p.requires_grad]
    small, total = [], 0
    for part in windows.split(micro):
        model.zero_grad()
        toys.next_byte_loss(model, part).backward()
        flat = torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])
        small.append(flat.square().sum())
        total = total + flat
    return torch.stack(small), (total / len(small)).square().sum()

# %% wrong="measure_gradient_noise" because="a stale .grad counts" of="backward"
- model.zero_grad()
- toys.next_byte_loss(model, part).backward()
+ toys.next_byte_loss(model, part).backward()

# %% wrong="measure_gradient_noise" because="an unused parameter is an error"
- pieces = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
+ pieces = torch.autograd.grad(loss, parameters)

# %% wrong="measure_gradient_noise" because="frozen parameters are thawed"
- parameters = [p for p in model.parameters() if p.requires_grad]
+ parameters = [p.requires_grad_() for p in model.parameters()]

# %% wrong="measure_gradient_noise" because="switches to training mode"
- small, total = [], 0
+ model.train()
+ small, total = [], 0

# %% wrong="measure_gradient_noise" because="micro is the number of parts"
- for part in windows.split(micro):
+ for part in windows.chunk(micro):

# %% wrong="measure_gradient_noise" because="the matrices only"
- parameters = [p for p in model.parameters() if p.requires_grad]
+ parameters = [p for p in model.parameters() if p.requires_grad and p.dim() == 2][:1]

# %% right="measure_gradient_noise" because="dictionaries of gradients, parameter by parameter"
def measure_gradient_noise(model, windows, micro):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
    small = []
    parts = windows.unflatten(0, (-1, micro))
    for part in parts:
        grads = torch.autograd.grad(
            toys.next_byte_loss(model, part), list(named.values()), allow_unused=True
        )
        squared = torch.zeros((), dtype=torch.float64, device=windows.device)
        for name, grad in zip(named, grads, strict=True):
            if grad is not None:
                sums[name] += grad.double()
                squared += grad.double().square().sum()
        small.append(squared)
    big = sum((total / len(parts)).square().sum() for total in sums.values())
    return torch.stack(small), big

# %% right="measure_gradient_noise" because="backward, with the old .grad put back"
def measure_gradient_noise(model, windows, micro):
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.grad for p in parameters]
    small, mean = [], None
    count = len(windows) // micro
    for i in range(count):
        for p in parameters:
            p.grad = None
        toys.next_byte_loss(model, windows[i * micro : (i + 1) * micro]).backward()
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters]
        ).double()
        small.append(flat @ flat)
        mean = flat / count if mean is None else mean + flat / count
    for p, grad in zip(parameters, before, strict=True):
        p.grad = grad
    return torch.stack(small), mean @ mean

# %% wrong="questions" because="the whole pass, tokens, D's growth, three runs, linear speed-up, straight"
def questions():
    return {
        "backward": 6,
        "budget": 2e11,
        "growth": 10.0,
        "trunk": 70_000,
        "steps": 12_500,
        "floor": "b",
    }

# %% wrong="questions" because="forward, no 6, a square root, the longest run, the fewest, a tie"
def questions():
    return {
        "backward": 2,
        "budget": math.sqrt(1.2e22 / 20),
        "growth": math.sqrt(1000),
        "trunk": 40_000,
        "steps": 10_000,
        "floor": "c",
    }

# %% wrong="questions" because="a float for a whole number, and a trunk to the end"
- "backward": 4,
+ "backward": 4.5,

- "trunk": 32_000 + 2_000 + 4_000 + 8_000,
+ "trunk": 40_000 + 2_000 + 4_000 + 8_000,

# %% wrong="questions" because="in billions, in thousands, capital letters"
def questions():
    return {
        "backward": 4,
        "budget": 10,
        "growth": 100,
        "trunk": 46,
        "steps": 20,
        "floor": "A",
    }

# %% right="questions" because="worked by hand"
def questions():
    return {
        "backward": 4,
        "budget": 10_000_000_000,
        "growth": 100,
        "trunk": 46_000,
        "steps": 20_000,
        "floor": "a",
    }

# %% right="questions" because="to one percent"
def questions():
    return {
        "backward": 4,
        "budget": 1.005e10,
        "growth": 99.5,
        "trunk": 46_000,
        "steps": 20_100.0,
        "floor": "a",
    }

# %% wrong="count_parameters" because="query and output matrices taken as hidden_size squared, not heads times head_dim wide"
def count_parameters(config: models.Config) -> tuple[int, int]:
    hidden = config.hidden_size
    kv = config.kv_heads * config.head_dim
    attention = 2 * hidden * hidden + 2 * hidden * kv
    mlp = 3 * hidden * config.mlp_size
    return config.layers * (attention + mlp + 2 * hidden), config.vocab_size * hidden

# %% wrong="count_parameters" because="summed in float32, so counts above 2^24 are rounded"
def count_parameters(config: models.Config) -> tuple[int, int]:
    h, q, kv = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = torch.tensor(
        [[h, q], [h, kv], [h, kv], [q, h]] + 3 * [[h, config.mlp_size]] + 2 * [[h, 1]],
        dtype=torch.float32,
    )
    body = config.layers * shapes.prod(dim=-1).sum()
    return int(body), config.vocab_size * h

# %% wrong="fit_power_law" because="lstsq on raw x: for huge x the column of powers is dropped as rank deficient"
def fit_power_law(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    x, y = x.detach().double(), y.detach().double()
    low, high = math.log(0.01), math.log(3.0)
    best = (0.0, 0.0, 1.0)
    for _ in range(8):
        grid = torch.linspace(low, high, 50, dtype=torch.float64)
        tried = []
        for alpha in grid.exp().tolist():
            q, p = 1 / y, x**-alpha / y
            one = torch.ones_like(y)[:, None]
            e, a = torch.linalg.lstsq(torch.stack([q, p], dim=-1), one).solution[:, 0].tolist()
            if e < 0:
                e, a = 0.0, float(p.sum() / (p * p).sum())
            tried.append((float(((e * q + a * p - 1) ** 2).sum()), e, a, alpha))
        i = min(range(50), key=lambda k: tried[k][0])
        best = tried[i][1:]
        low, high = float(grid[max(i - 1, 0)]), float(grid[min(i + 1, 49)])
    return best

# %% wrong="isoflop_minimum" because="computed in the format of the inputs, not in float64"
def isoflop_minimum(n: Tensor, loss: Tensor) -> tuple[float, float]:
    if n.unique().numel() < 3:
        raise ValueError("a parabola needs three different sizes")
    u = n.log()
    middle = u.mean()
    v = u - middle
    c = torch.linalg.lstsq(torch.stack([v**0, v, v**2], -1), loss[:, None]).solution[:, 0]
    if c[2] <= 0:
        raise ValueError("the parabola opens down")
    best = -c[1] / (2 * c[2]) + middle
    return float(best.exp()), float(c[0] - c[1] ** 2 / (4 * c[2]))

# %% wrong="isoflop_minimum" because="counts different sizes among neighbors only, so unsorted repeats slip through"
def isoflop_minimum(n: Tensor, loss: Tensor) -> tuple[float, float]:
    n, loss = n.detach().double(), loss.detach().double()
    if len(torch.unique_consecutive(n)) < 3:
        raise ValueError("a parabola needs three different sizes")
    u = n.log()
    middle = u.mean()
    v = u - middle
    c = torch.linalg.lstsq(torch.stack([v**0, v, v**2], -1), loss[:, None]).solution[:, 0]
    if c[2] <= 0:
        raise ValueError("the parabola opens down")
    best = -c[1] / (2 * c[2]) + middle
    return float(best.exp()), float(c[0] - c[1] ** 2 / (4 * c[2]))

# %% wrong="measure_gradient_noise" because="model.train(was) at the end puts parts that were in eval mode into training"
def measure_gradient_noise(model: nn.Module, windows: Tensor, micro: int) -> tuple[Tensor, Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    was = model.training

    def square(part: Tensor) -> Tensor:
        loss = toys.next_byte_loss(model, part)
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return sum(g.detach().double().square().sum() for g in grads)

    small = torch.stack([square(part) for part in windows.split(micro)])
    big = square(windows)
    model.train(was)
    return small, big

# %% wrong="training_flops" because="attention width is hidden_size, which is not heads times head_dim in every config"
def training_flops(config: models.Config, tokens: int, context: int) -> dict[str, int]:
    body, embedding = count_parameters(config)
    matrices = body - 2 * config.hidden_size * config.layers
    return {
        "blocks": 6 * matrices * tokens,
        "attention": 12 * config.layers * context * config.hidden_size * tokens,
        "head": 6 * embedding * tokens,
    }

# %% wrong="training_flops" because="multiplied as int64 tensors, which overflow beyond 9.2e18 FLOPs"
def training_flops(config: models.Config, tokens: int, context: int) -> dict[str, int]:
    body, embedding = count_parameters(config)
    matrices = body - 2 * config.hidden_size * config.layers
    width = config.heads * config.head_dim
    per_token = torch.tensor([matrices, 2 * config.layers * context * width, embedding])
    blocks, attention, head = (6 * per_token * tokens).tolist()
    return {"blocks": blocks, "attention": attention, "head": head}
