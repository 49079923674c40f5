# Right and wrong answers to the exercises of lesson 11: see CONTRIBUTING.md.

# %% wrong="feed_forward" because="no activation"
def feed_forward(x, keys, values, gates=None):
    coefficients = x @ keys.T if gates is None else (x @ gates.T) * (x @ keys.T)
    return coefficients @ values, coefficients

# %% wrong="feed_forward" because="softmax over the cells, as in attention"
def feed_forward(x, keys, values, gates=None):
    coefficients = (x @ keys.T).softmax(-1) if gates is None else F.silu(x @ gates.T) * (x @ keys.T)
    return coefficients @ values, coefficients

# %% wrong="feed_forward" because="the activation on the keys, not on the gates"
def feed_forward(x, keys, values, gates=None):
    coefficients = F.relu(x @ keys.T) if gates is None else F.silu(x @ keys.T) * (x @ gates.T)
    return coefficients @ values, coefficients

# %% wrong="feed_forward" because="gates ignored"
def feed_forward(x, keys, values, gates=None):
    coefficients = F.relu(x @ keys.T)
    return coefficients @ values, coefficients

# %% right="feed_forward" because="einsum over cells"
def feed_forward(x, keys, values, gates=None):
    match = torch.einsum("...d,hd->...h", x, keys)
    if gates is None:
        m = match.clamp(min=0)
    else:
        g = F.linear(x, gates)
        m = g * g.sigmoid() * match
    return F.linear(m, values.mT), m

# %% wrong="top_k_router" because="uniform weights"
def top_k_router(logits, k, renormalize=True, scoring="softmax", bias=None):
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scores = {"softmax": lambda z: z.softmax(-1), "sigmoid": lambda z: z.sigmoid()}.get(scoring)
    if scores is None or not 1 <= k <= logits.shape[-1]:
        raise ValueError(scoring)
    scores = scores(logits)
    indices = (
        (scores if bias is None else scores + bias)
        .sort(dim=-1, descending=True, stable=True)
        .indices[:, :k]
    )
    return torch.full_like(scores[:, :k], 1 / k), indices

# %% wrong="top_k_router" because="always the first experts"
def top_k_router(logits, k, renormalize=True, scoring="softmax", bias=None):
    indices = torch.arange(k).expand(len(logits), k)
    weights = logits.float().softmax(-1).gather(1, indices)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), indices

# %% wrong="top_k_router" because="softmax after top-k, whatever renormalize says" base="softmax-after"
def top_k_router(logits, k, renormalize=True, scoring="softmax", bias=None):
    if scoring not in ("softmax", "sigmoid") or not 1 <= k <= logits.shape[-1]:
        raise ValueError(scoring)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    indices = (
        (scores if bias is None else scores + bias)
        .sort(dim=-1, descending=True, stable=True)
        .indices[:, :k]
    )
    if scoring == "softmax":
        return logits.gather(-1, indices).softmax(-1), indices
    weights = scores.gather(-1, indices)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), indices

# %% wrong="top_k_router" because="not renormalized" of="softmax-after"
- if scoring == "softmax":
-     return logits.gather(-1, indices).softmax(-1), indices
- weights = scores.gather(-1, indices)
- return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), indices
+ return scores.gather(-1, indices), indices

# %% wrong="top_k_router" because="the gate value contains the bias"
def top_k_router(logits, k, renormalize=True, scoring="softmax", bias=None):
    if scoring not in ("softmax", "sigmoid") or not 1 <= k <= logits.shape[-1]:
        raise ValueError(scoring)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    if bias is not None:
        scores = scores + bias
    values, indices = scores.sort(dim=-1, descending=True, stable=True)
    weights = values[:, :k]
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), indices[:, :k]

# %% wrong="top_k_router" because="the bias is added to the logits"
def top_k_router(logits, k, renormalize=True, scoring="softmax", bias=None):
    if scoring not in ("softmax", "sigmoid") or not 1 <= k <= logits.shape[-1]:
        raise ValueError(scoring)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if bias is None else logits + bias
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    indices = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(-1, indices)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), indices

# %% wrong="top_k_router" because="ties broken toward the higher number" of="softmax-after"
- .sort(dim=-1, descending=True, stable=True)
- .indices[:, :k]
+ .sort(dim=-1, stable=True)
+ .indices.flip(-1)[:, :k]

- if scoring == "softmax":
-     return logits.gather(-1, indices).softmax(-1), indices

# %% wrong="top_k_router" because="sigmoid scores put through a softmax" of="softmax-after"
- if scoring == "softmax":
-     return logits.gather(-1, indices).softmax(-1), indices

- return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), indices
+ if renormalize:
+     weights = (
+         weights.softmax(-1) if scoring == "sigmoid" else weights / weights.sum(-1, keepdim=True)
+     )
+ return weights, indices

# %% wrong="top_k_router" because="the weights are detached, so the router never learns" of="softmax-after"
- logits = logits if logits.dtype == torch.float64 else logits.float()
+ logits = logits.detach() if logits.dtype == torch.float64 else logits.detach().float()

- if scoring == "softmax":
-     return logits.gather(-1, indices).softmax(-1), indices

# %% wrong="top_k_router" because="computed in the logits' own half precision" of="softmax-after"
- logits = logits if logits.dtype == torch.float64 else logits.float()

- if scoring == "softmax":
-     return logits.gather(-1, indices).softmax(-1), indices

# %% right="top_k_router" because="argsort of the negated scores, softmax of the chosen logarithms"
def top_k_router(logits, k, renormalize=True, scoring="softmax", bias=None):
    if k < 1 or k > logits.size(-1):
        raise ValueError(f"k = {k}")
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scoring == "softmax":
        log_scores = F.log_softmax(z, -1)
    elif scoring == "sigmoid":
        log_scores = F.logsigmoid(z)
    else:
        raise ValueError(scoring)
    with torch.no_grad():
        by = log_scores.exp() + (0 if bias is None else bias)
        indices = torch.argsort(-by, dim=-1, stable=True)[..., :k]
    chosen = log_scores.gather(-1, indices)
    return (F.softmax(chosen, -1) if renormalize else chosen.exp()), indices

# %% wrong="moe_forward" because="writes where it should add" base="writes-where"
def moe_forward(x, router, experts):
    tokens = x.reshape(-1, x.shape[-1])
    weights, indices = router(tokens)
    out = torch.zeros_like(tokens)
    for e, expert in enumerate(experts):
        token, choice = torch.where(indices == e)
        if len(token):
            out[token] = (expert(tokens[token]) * weights[token, choice, None]).to(out.dtype)
    return out.view(x.shape)

# %% wrong="moe_forward" because="gate values applied twice" of="writes-where"
- out[token] = (expert(tokens[token]) * weights[token, choice, None]).to(out.dtype)
+ gate = weights[token, choice, None]
+ out = out.index_add(0, token, (expert(tokens[token]) * gate * gate).to(out.dtype))

# %% wrong="moe_forward" because="gate values ignored" of="writes-where"
- token, choice = torch.where(indices == e)
+ token, _ = torch.where(indices == e)

- out[token] = (expert(tokens[token]) * weights[token, choice, None]).to(out.dtype)
+ out = out.index_add(0, token, expert(tokens[token]))

# %% wrong="moe_forward" because="the assignment taken for the token, tok for tok // k" base="assignment-taken"
def moe_forward(x, router, experts):
    tokens = x.reshape(-1, x.shape[-1])
    weights, indices = router(tokens)
    k = indices.shape[1]
    chosen = indices.reshape(-1)
    order = chosen.argsort(stable=True)
    dropped, *sizes = torch.bincount(chosen + 1, minlength=len(experts) + 1).tolist()
    order = order[dropped:]
    token = order % len(tokens)
    results = [
        expert(group) for expert, group in zip(experts, tokens[token].split(sizes)) if len(group)
    ]
    out = torch.zeros_like(tokens)
    if results:
        out = out.index_add(
            0, token, (torch.cat(results) * weights.reshape(-1)[order, None]).to(out.dtype)
        )
    return out.view(x.shape)

# %% wrong="moe_forward" because="gate values left in the unsorted order" of="assignment-taken"
- token = order % len(tokens)
+ token = order // k

- 0, token, (torch.cat(results) * weights.reshape(-1)[order, None]).to(out.dtype)
+ 0, token, (torch.cat(results) * weights.reshape(-1)[dropped:, None]).to(out.dtype)

# %% wrong="moe_forward" because="an expert without tokens shifts the ones after it"
def moe_forward(x, router, experts):
    tokens = x.reshape(-1, x.shape[-1])
    weights, indices = router(tokens)
    k = indices.shape[1]
    chosen = indices.reshape(-1)
    order = chosen.argsort(stable=True)
    order = order[int((chosen < 0).sum()) :]
    sizes = chosen[chosen >= 0].unique(return_counts=True)[1].tolist()
    token = order // k
    results = [expert(group) for expert, group in zip(experts, tokens[token].split(sizes))]
    out = torch.zeros_like(tokens)
    if results:
        out = out.index_add(
            0, token, (torch.cat(results) * weights.reshape(-1)[order, None]).to(out.dtype)
        )
    return out.view(x.shape)

# %% wrong="moe_forward" because="a loop over tokens"
def moe_forward(x, router, experts):
    tokens = x.reshape(-1, x.shape[-1])
    weights, indices = router(tokens)
    rows = []
    for t, chosen in enumerate(indices.tolist()):
        row = torch.zeros_like(tokens[t])
        for j, e in enumerate(chosen):
            if e >= 0:
                row = row + (weights[t, j] * experts[e](tokens[t : t + 1])[0]).to(row.dtype)
        rows.append(row)
    return torch.stack(rows).view(x.shape)

# %% wrong="moe_forward" because="lists of tokens made in Python"
def moe_forward(x, router, experts):
    tokens = x.reshape(-1, x.shape[-1])
    weights, indices = router(tokens)
    lists = [([], []) for _ in experts]
    for t, chosen in enumerate(indices.tolist()):
        for j, e in enumerate(chosen):
            if e >= 0:
                lists[e][0].append(t)
                lists[e][1].append(j)
    out = torch.zeros_like(tokens)
    for expert, (token, choice) in zip(experts, lists):
        if token:
            token, choice = torch.tensor(token), torch.tensor(choice)
            out = out.index_add(
                0, token, (expert(tokens[token]) * weights[token, choice, None]).to(out.dtype)
            )
    return out.view(x.shape)

# %% wrong="moe_forward" because="every expert computes every token"
def moe_forward(x, router, experts):
    tokens = x.reshape(-1, x.shape[-1])
    weights, indices = router(tokens)
    out = torch.zeros_like(tokens)
    for e, expert in enumerate(experts):
        gate = (weights * (indices == e)).sum(-1, keepdim=True)
        out = out + (expert(tokens) * gate).to(out.dtype)
    return out.view(x.shape)

# %% wrong="moe_forward" because="a dropped choice goes to the last expert"
def moe_forward(x, router, experts):
    tokens = x.reshape(-1, x.shape[-1])
    weights, indices = router(tokens)
    k = indices.shape[1]
    chosen = indices.reshape(-1) % len(experts)
    order = chosen.argsort(stable=True)
    sizes = torch.bincount(chosen, minlength=len(experts)).tolist()
    token = order // k
    results = [
        expert(group) for expert, group in zip(experts, tokens[token].split(sizes)) if len(group)
    ]
    gated = torch.cat(results) * weights.reshape(-1)[order, None]
    return torch.zeros_like(tokens).index_add(0, token, gated.to(x.dtype)).view(x.shape)

# %% wrong="moe_forward" because="what is left of a token's weights is renormalized after dropping"
def moe_forward(x, router, experts):
    tokens = x.reshape(-1, x.shape[-1])
    weights, indices = router(tokens)
    total = weights.sum(-1, keepdim=True)
    weights = weights * (indices >= 0)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9) * total
    out = torch.zeros_like(tokens)
    for e, expert in enumerate(experts):
        token, choice = torch.where(indices == e)
        if len(token):
            out = out.index_add(
                0, token, (expert(tokens[token]) * weights[token, choice, None]).to(out.dtype)
            )
    return out.view(x.shape)

# %% wrong="moe_forward" because="the residual connection is added inside"
def moe_forward(x, router, experts):
    tokens = x.reshape(-1, x.shape[-1])
    weights, indices = router(tokens)
    out = tokens.clone()
    for e, expert in enumerate(experts):
        token, choice = torch.where(indices == e)
        if len(token):
            out = out.index_add(
                0, token, (expert(tokens[token]) * weights[token, choice, None]).to(out.dtype)
            )
    return out.view(x.shape)

# %% right="moe_forward" because="torch.where for each expert" of="writes-where"
- out[token] = (expert(tokens[token]) * weights[token, choice, None]).to(out.dtype)
+ out = out.index_add(
+     0, token, (expert(tokens[token]) * weights[token, choice, None]).to(out.dtype)
+ )

# %% right="moe_forward" because="results put back in the order of the assignments, then summed over the choices"
def moe_forward(x, router, experts):
    tokens = x.flatten(0, -2) if x.dim() > 1 else x[None]
    weights, indices = router(tokens)
    count, k = indices.shape
    chosen, order = torch.sort(indices.flatten(), stable=True)
    edges = torch.searchsorted(chosen, torch.arange(len(experts) + 1, device=x.device)).tolist()
    results = torch.zeros(
        count * k, x.shape[-1], dtype=torch.promote_types(x.dtype, weights.dtype), device=x.device
    )
    parts = [(order[a:b], expert) for a, b, expert in zip(edges, edges[1:], experts) if b > a]
    if parts:
        where = torch.cat([p for p, _ in parts])
        done = torch.cat([expert(tokens[p // k]) for p, expert in parts])
        results = results.index_copy(0, where, done.to(results.dtype))
    return (results.view(count, k, -1) * weights[..., None]).sum(1).to(x.dtype).view(x.shape)

# %% wrong="balance_losses" because="no factor N" base="no-factor"
def load_balancing_loss(probs, indices, alpha=1.0):
    f = torch.bincount(indices.reshape(-1), minlength=probs.shape[-1]).to(probs) / indices.numel()
    return alpha * (f * probs.mean(0)).sum()


def router_z_loss(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1).square().mean()

# %% wrong="balance_losses" because="loads taken from the probabilities" of="no-factor"
- f = torch.bincount(indices.reshape(-1), minlength=probs.shape[-1]).to(probs) / indices.numel()
- return alpha * (f * probs.mean(0)).sum()
+ p = probs.mean(0)
+ return alpha * probs.shape[-1] * (p * p).sum()

# %% wrong="balance_losses" because="P is detached with f" of="no-factor"
- return alpha * (f * probs.mean(0)).sum()
+ return alpha * probs.shape[-1] * (f * probs.detach().mean(0)).sum()

# %% wrong="balance_losses" because="the gradient flows through a soft f, straight-through" of="no-factor"
- return alpha * (f * probs.mean(0)).sum()
+ f = f + probs.mean(0) - probs.mean(0).detach()
+ return alpha * probs.shape[-1] * (f * probs.mean(0)).sum()

# %% wrong="balance_losses" because="divides by tokens, not by assignments" of="no-factor"
- f = torch.bincount(indices.reshape(-1), minlength=probs.shape[-1]).to(probs) / indices.numel()
- return alpha * (f * probs.mean(0)).sum()
+ f = torch.bincount(indices.reshape(-1), minlength=probs.shape[-1]).to(probs) / len(indices)
+ return alpha * probs.shape[-1] * (f * probs.mean(0)).sum()

# %% wrong="balance_losses" because="only the first choice is counted" of="no-factor"
- f = torch.bincount(indices.reshape(-1), minlength=probs.shape[-1]).to(probs) / indices.numel()
- return alpha * (f * probs.mean(0)).sum()
+ f = torch.bincount(indices[:, 0], minlength=probs.shape[-1]).to(probs) / len(indices)
+ return alpha * probs.shape[-1] * (f * probs.mean(0)).sum()

# %% wrong="balance_losses" because="the z-loss is not squared" base="z-loss"
def load_balancing_loss(probs, indices, alpha=1.0):
    f = torch.bincount(indices.reshape(-1), minlength=probs.shape[-1]).to(probs) / indices.numel()
    return alpha * probs.shape[-1] * (f * probs.mean(0)).sum()


def router_z_loss(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1).mean()

# %% wrong="balance_losses" because="the z-loss overflows"
def load_balancing_loss(probs, indices, alpha=1.0):
    f = torch.bincount(indices.reshape(-1), minlength=probs.shape[-1]).to(probs) / indices.numel()
    return alpha * probs.shape[-1] * (f * probs.mean(0)).sum()


def router_z_loss(logits):
    return (
        logits.to(torch.promote_types(logits.dtype, torch.float32))
        .exp()
        .sum(-1)
        .log()
        .square()
        .mean()
    )

# %% wrong="balance_losses" because="the z-loss in half precision" of="z-loss"
- return logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1).mean()
+ return logits.logsumexp(-1).square().mean()

# %% right="balance_losses" because="one-hot means, and the maximum taken out by hand"
def load_balancing_loss(probs, indices, alpha=1.0):
    count = probs.size(-1)
    f = F.one_hot(indices, count).to(probs.dtype).mean((0, 1))
    return alpha * count * torch.dot(f, probs.mean(0))


def router_z_loss(logits):
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = z.amax(-1, keepdim=True).detach()
    return ((z - top).exp().sum(-1).log() + top[..., 0]).pow(2).mean()

# %% wrong="apply_capacity" because="serves token by token, both choices at once"
def apply_capacity(indices, capacity):
    queue = indices.reshape(-1)
    ordered, order = queue.sort(stable=True)
    place = torch.arange(len(queue)) - torch.searchsorted(ordered, ordered)
    kept = torch.empty_like(queue)
    kept[order] = ordered.masked_fill(place >= capacity, -1)
    return kept.view(indices.shape)

# %% wrong="apply_capacity" because="all of a token's choices are dropped with one" base="all-token"
def apply_capacity(indices, capacity):
    tokens, k = indices.shape
    queue = indices.T.reshape(-1)
    ordered, order = queue.sort(stable=True)
    place = torch.arange(len(queue)) - torch.searchsorted(ordered, ordered)
    kept = torch.empty_like(queue)
    kept[order] = ordered.masked_fill(place >= capacity, -1)
    kept = kept.view(k, tokens).T
    return torch.where((kept == indices).all(1, keepdim=True), kept, -1)

# %% wrong="apply_capacity" because="drops by the order of the experts: later experts get what room is left in all"
def apply_capacity(indices, capacity):
    tokens, k = indices.shape
    chosen = indices.reshape(-1)
    order = chosen.argsort(stable=True)
    room = capacity * (int(indices.max()) + 1 if indices.numel() else 0)
    kept = torch.full_like(chosen, -1)
    kept[order[:room]] = chosen[order[:room]]
    return kept.view(tokens, k)

# %% wrong="apply_capacity" because="the last come are served first"
def apply_capacity(indices, capacity):
    tokens, k = indices.shape
    queue = indices.flip(0).T.reshape(-1)
    ordered, order = queue.sort(stable=True)
    place = torch.arange(len(queue)) - torch.searchsorted(ordered, ordered)
    kept = torch.empty_like(queue)
    kept[order] = ordered.masked_fill(place >= capacity, -1)
    return kept.view(k, tokens).T.flip(0)

# %% wrong="apply_capacity" because="room for one more"
def apply_capacity(indices, capacity):
    tokens, k = indices.shape
    queue = indices.T.reshape(-1)
    ordered, order = queue.sort(stable=True)
    place = torch.arange(len(queue)) - torch.searchsorted(ordered, ordered)
    kept = torch.empty_like(queue)
    kept[order] = ordered.masked_fill(place > capacity, -1)
    return kept.view(k, tokens).T

# %% wrong="apply_capacity" because="each choice has the whole capacity to itself"
def apply_capacity(indices, capacity):
    columns = []
    for queue in indices.T:
        ordered, order = queue.sort(stable=True)
        place = torch.arange(len(queue)) - torch.searchsorted(ordered, ordered)
        kept = torch.empty_like(queue)
        kept[order] = ordered.masked_fill(place >= capacity, -1)
        columns.append(kept)
    return torch.stack(columns, 1)

# %% wrong="apply_capacity" because="an unstable order among the tokens: the busiest rows by number of the expert, not by place"
def apply_capacity(indices, capacity):
    tokens, k = indices.shape
    queue = indices.T.reshape(-1)
    order = (queue * 2 * len(queue) - torch.arange(len(queue))).argsort()
    ordered = queue[order]
    place = torch.arange(len(queue)) - torch.searchsorted(ordered, ordered)
    kept = torch.empty_like(queue)
    kept[order] = ordered.masked_fill(place >= capacity, -1)
    return kept.view(k, tokens).T

# %% wrong="apply_capacity" because="in place" of="all-token"
- kept = kept.view(k, tokens).T
- return torch.where((kept == indices).all(1, keepdim=True), kept, -1)
+ return indices.copy_(kept.view(k, tokens).T)

# %% wrong="apply_capacity" because="a loop over the tokens"
def apply_capacity(indices, capacity):
    out = torch.full_like(indices, -1)
    used = {}
    for j in range(indices.shape[1]):
        for t, e in enumerate(indices[:, j].tolist()):
            if e >= 0 and used.get(e, 0) < capacity:
                used[e] = used.get(e, 0) + 1
                out[t, j] = e
    return out

# %% right="apply_capacity" because="one-hot rows and a cumulative sum"
def apply_capacity(indices, capacity):
    tokens, k = indices.shape
    queue = indices.T.reshape(-1)
    if not len(queue):
        return indices.clone()
    experts, compact = queue.unique(return_inverse=True)
    came = F.one_hot(compact, len(experts)).cumsum(0).gather(1, compact[:, None])[:, 0]
    return torch.where(came <= capacity, queue, -1).view(k, tokens).T

# %% wrong="deepseek_moe" because="the shared expert has a gate value" base="shared-expert"
class DeepSeekMoE(nn.Module):
    def __init__(self, dim, hidden, num_experts, k, shared=1, scoring="softmax", renormalize=True):
        super().__init__()
        self.k, self.scoring, self.renormalize = k, scoring, renormalize
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(dim, hidden) for _ in range(num_experts))
        self.shared = Expert(dim, shared * hidden) if shared else None
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, x):
        logits = self.router(x.reshape(-1, x.shape[-1]))
        weights, indices = top_k_router(logits, self.k, self.renormalize, self.scoring, self.bias)
        out = moe_forward(x, lambda tokens: (weights, indices), self.experts)
        if self.shared is not None:
            out = out + self.shared(x) * weights[:, :1].view(*x.shape[:-1], 1)
        return out, logits, indices

    def parameter_counts(self):
        total = sum(p.numel() for p in self.parameters())
        return total, total - (len(self.experts) - self.k) * sum(
            p.numel() for p in self.experts[0].parameters()
        )

# %% wrong="deepseek_moe" because="the shared experts are routed like the others" of="shared-expert"
- self.k, self.scoring, self.renormalize = k, scoring, renormalize
+ self.k, self.scoring, self.renormalize, self.n_shared = k, scoring, renormalize, shared

- if self.shared is not None:
-     out = out + self.shared(x) * weights[:, :1].view(*x.shape[:-1], 1)

# %% wrong="deepseek_moe" because="the bias is a parameter" of="shared-expert"
- self.register_buffer("bias", torch.zeros(num_experts))
+ self.bias = nn.Parameter(torch.zeros(num_experts))

- if self.shared is not None:
-     out = out + self.shared(x) * weights[:, :1].view(*x.shape[:-1], 1)
- return out, logits, indices
+ return (out if self.shared is None else out + self.shared(x)), logits, indices

# %% wrong="deepseek_moe" because="the bias is kept and never used" of="shared-expert"
- weights, indices = top_k_router(logits, self.k, self.renormalize, self.scoring, self.bias)
+ weights, indices = top_k_router(logits, self.k, self.renormalize, self.scoring)

- if self.shared is not None:
-     out = out + self.shared(x) * weights[:, :1].view(*x.shape[:-1], 1)
- return out, logits, indices
+ return (out if self.shared is None else out + self.shared(x)), logits, indices

# %% wrong="deepseek_moe" because="active parameters without the shared experts"
class DeepSeekMoE(nn.Module):
    def __init__(self, dim, hidden, num_experts, k, shared=1, scoring="softmax", renormalize=True):
        super().__init__()
        self.k, self.scoring, self.renormalize = k, scoring, renormalize
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(dim, hidden) for _ in range(num_experts))
        self.shared = Expert(dim, shared * hidden) if shared else None
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, x):
        logits = self.router(x.reshape(-1, x.shape[-1]))
        weights, indices = top_k_router(logits, self.k, self.renormalize, self.scoring, self.bias)
        out = moe_forward(x, lambda tokens: (weights, indices), self.experts)
        return (out if self.shared is None else out + self.shared(x)), logits, indices

    def parameter_counts(self):
        one = sum(p.numel() for p in self.experts[0].parameters())
        return sum(p.numel() for p in self.parameters()), self.k * one + self.router.weight.numel()

# %% wrong="deepseek_moe" because="one shared expert, however many are asked for, and renormalize forgotten"
class DeepSeekMoE(nn.Module):
    def __init__(self, dim, hidden, num_experts, k, shared=1, scoring="softmax", renormalize=True):
        super().__init__()
        self.k, self.scoring = k, scoring
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(dim, hidden) for _ in range(num_experts))
        self.shared = Expert(dim, hidden) if shared else None
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, x):
        logits = self.router(x.reshape(-1, x.shape[-1]))
        weights, indices = top_k_router(logits, self.k, True, self.scoring, self.bias)
        out = moe_forward(x, lambda tokens: (weights, indices), self.experts)
        return (out if self.shared is None else out + self.shared(x)), logits, indices

    def parameter_counts(self):
        total = sum(p.numel() for p in self.parameters())
        return total, total - (len(self.experts) - self.k) * sum(
            p.numel() for p in self.experts[0].parameters()
        )

# %% right="deepseek_moe" because="torch.where for each expert, counts by formula"
class DeepSeekMoE(nn.Module):
    def __init__(self, dim, hidden, num_experts, k, shared=1, scoring="softmax", renormalize=True):
        super().__init__()
        self.sizes = dim, hidden, num_experts, shared
        self.k, self.how = k, (renormalize, scoring)
        self.experts = nn.ModuleList([Expert(dim, hidden) for _ in range(num_experts)])
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.shared = Expert(dim, shared * hidden) if shared > 0 else None
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, x):
        tokens = x.reshape(-1, self.sizes[0])
        logits = tokens @ self.router.weight.T
        weights, indices = top_k_router(logits, self.k, *self.how, self.bias)
        out = torch.zeros_like(tokens) if self.shared is None else self.shared(tokens)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(indices == e)
            if len(token):
                out = out.index_add(0, token, expert(tokens[token]) * weights[token, choice, None])
        return out.view_as(x), logits, indices

    def parameter_counts(self):
        d, h, n, s = self.sizes
        return n * d + 3 * d * h * (n + s), n * d + 3 * d * h * (self.k + s)

# %% wrong="group_limit" because="a group judged by its best score alone" base="group-judged"
def group_limit(scores, groups, keep):
    if scores.shape[-1] % groups:
        raise ValueError(groups)
    size = scores.shape[-1] // groups
    worth = scores.unflatten(-1, (groups, size)).amax(-1)
    return (
        torch.zeros_like(worth, dtype=torch.bool)
        .scatter(-1, worth.topk(keep).indices, True)
        .repeat_interleave(size, -1)
    )

# %% wrong="group_limit" because="a group judged by its sum" of="group-judged"
- worth = scores.unflatten(-1, (groups, size)).amax(-1)
+ worth = scores.unflatten(-1, (groups, size)).sum(-1)

# %% wrong="group_limit" because="groups dealt out in turn, e mod groups" of="group-judged"
- worth = scores.unflatten(-1, (groups, size)).amax(-1)
+ worth = scores.unflatten(-1, (size, groups)).topk(2, dim=-2).values.sum(-2)

- .repeat_interleave(size, -1)
+ .repeat(1, size)

# %% right="group_limit" because="a threshold on the sorted worth"
def group_limit(scores, groups, keep):
    tokens, experts = scores.shape
    if experts % groups != 0:
        raise ValueError(f"{experts} experts, {groups} groups")
    best = scores.view(tokens, groups, -1).sort(dim=-1, descending=True).values[..., :2].sum(-1)
    allowed = best >= best.sort(dim=-1, descending=True).values[:, keep - 1 : keep]
    return allowed[..., None].expand(-1, -1, experts // groups).reshape(tokens, experts)

# %% wrong="update_bias" because="the wrong sign"
def update_bias(bias, load, rate):
    load = load.double()
    return bias.detach() + rate * (load - load.mean()).sign().to(bias.dtype)

# %% wrong="update_bias" because="in proportion to the excess"
def update_bias(bias, load, rate):
    load = load.double()
    return bias.detach() + rate * (load.mean() - load).to(bias.dtype)

# %% wrong="update_bias" because="the old bias is forgotten"
def update_bias(bias, load, rate):
    load = load.double()
    return rate * (load.mean() - load).sign().to(bias.dtype)

# %% wrong="update_bias" because="compares with the median"
def update_bias(bias, load, rate):
    load = load.double()
    return bias.detach() + rate * (load.median() - load).sign().to(bias.dtype)

# %% wrong="update_bias" because="in place"
def update_bias(bias, load, rate):
    load = load.double()
    with torch.no_grad():
        bias += rate * (load.mean() - load).sign().to(bias.dtype)
    return bias

# %% wrong="update_bias" because="only lowers"
def update_bias(bias, load, rate):
    load = load.double()
    return bias.detach() - rate * (load > load.mean()).to(bias.dtype)

# %% right="update_bias" because="two comparisons with the total"
def update_bias(bias, load, rate):
    scaled, total = load.double() * len(load), load.double().sum()
    step = (scaled < total - 1e-9).to(bias.dtype) - (scaled > total + 1e-9).to(bias.dtype)
    return torch.add(bias.detach(), step, alpha=rate)

# %% wrong="grouped_gemm" because="rows beyond the group are stored too: padding not masked" base="rows-beyond"
@triton.jit
def grouped_gemm_kernel(
    x_ptr,
    w_ptr,
    sizes_ptr,
    out_ptr,
    n_rows,
    n_groups,
    n_cols,
    n_inner,
    x_row,
    w_group,
    w_col,
    out_row,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    col_tiles = tl.cdiv(n_cols, BLOCK_N)
    tile, col_tile = tl.program_id(0) // col_tiles, tl.program_id(0) % col_tiles

    # Which group: the number of groups whose tiles end at or before this one.
    lanes = tl.arange(0, GROUPS)
    sizes = tl.load(sizes_ptr + lanes, mask=lanes < n_groups, other=0)
    tiles = tl.cdiv(sizes, BLOCK_M)
    ends = tl.cumsum(tiles, 0)
    group = tl.sum((ends <= tile).to(tl.int32), 0)
    if group >= n_groups:  # a surplus program
        return
    before = lanes < group
    size = tl.sum(tl.where(lanes == group, sizes, 0), 0)
    within = (tile - tl.sum(tl.where(before, tiles, 0), 0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = (tl.sum(tl.where(before, sizes, 0), 0) + within).to(tl.int64)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)

    # Rows and columns beyond the edge read the last valid one, so that the loop needs no mask for them; they are not stored.
    safe_rows = tl.minimum(rows, n_rows - 1)
    safe_cols = tl.minimum(cols, n_cols - 1)
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + safe_rows[:, None] * x_row + inner[None, :]
    w_ptrs = (
        w_ptr
        + group.to(tl.int64) * w_group
        + safe_cols[None, :].to(tl.int64) * w_col
        + inner[:, None]
    )
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    full = n_inner // BLOCK_K * BLOCK_K
    for _ in range(0, full, BLOCK_K):  # whole blocks of K need no mask
        acc = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs), acc, input_precision="ieee")
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    if full < n_inner:  # the rest of K: zeros beyond the edge add nothing
        x = tl.load(x_ptrs, mask=inner[None, :] < n_inner - full, other=0.0)
        w = tl.load(w_ptrs, mask=inner[:, None] < n_inner - full, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    tl.store(
        out_ptr + rows[:, None] * out_row + cols[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=inside,
    )

# %% wrong="grouped_gemm" because="no mask at the end of the rows" of="rows-beyond"
- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+ inside = (within < size)[:, None] & (cols >= 0)[None, :]

# %% wrong="grouped_gemm" because="an empty group counts as a tile and shifts the offsets" of="rows-beyond"
- tiles = tl.cdiv(sizes, BLOCK_M)
+ tiles = tl.maximum(tl.cdiv(sizes, BLOCK_M), (lanes < n_groups).to(tl.int32))

- before = lanes < group
+ before = lanes < group - 1

- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+ inside = (within < size)[:, None] & (cols < n_cols)[None, :]

# %% wrong="grouped_gemm" because="group boundaries taken at multiples of the block" of="rows-beyond"
- rows = (tl.sum(tl.where(before, sizes, 0), 0) + within).to(tl.int64)
+ rows = (tl.sum(tl.where(before, tiles, 0), 0) * BLOCK_M + within).to(tl.int64)

- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+ inside = ((within < size) & (rows < n_rows))[:, None] & (cols < n_cols)[None, :]

# %% wrong="grouped_gemm" because="the first tile of each group only" of="rows-beyond"
- tiles = tl.cdiv(sizes, BLOCK_M)
+ tiles = (sizes > 0).to(tl.int32)

- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+ inside = (within < size)[:, None] & (cols < n_cols)[None, :]

# %% wrong="grouped_gemm" because="the weights of the group before" of="rows-beyond"
- + group.to(tl.int64) * w_group
+ + tl.maximum(group - 1, 0).to(tl.int64) * w_group

- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+ inside = (within < size)[:, None] & (cols < n_cols)[None, :]

# %% wrong="grouped_gemm" because="the first group's weights for all" of="rows-beyond"
- w_ptrs = (
-     w_ptr
-     + group.to(tl.int64) * w_group
-     + safe_cols[None, :].to(tl.int64) * w_col
-     + inner[:, None]
- )
+ w_ptrs = w_ptr + safe_cols[None, :].to(tl.int64) * w_col + inner[:, None]

- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+ inside = (within < size)[:, None] & (cols < n_cols)[None, :]

# %% wrong="grouped_gemm" because="a group ends after its tile, not at it" of="rows-beyond"
- group = tl.sum((ends <= tile).to(tl.int32), 0)
+ group = tl.sum((ends < tile).to(tl.int32), 0)

- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+ inside = (within < size)[:, None] & (cols < n_cols)[None, :]

# %% wrong="grouped_gemm" because="the weights not transposed" of="rows-beyond"
- + safe_cols[None, :].to(tl.int64) * w_col
- + inner[:, None]
+ + safe_cols[None, :]
+ + inner[:, None].to(tl.int64) * w_col

- w_ptrs += BLOCK_K
+ w_ptrs += BLOCK_K * w_col

- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+ inside = (within < size)[:, None] & (cols < n_cols)[None, :]

# %% wrong="grouped_gemm" because="the rest of K is left out" of="rows-beyond"
- if full < n_inner:  # the rest of K: zeros beyond the edge add nothing
+ if full > n_inner:  # the rest of K: zeros beyond the edge add nothing

- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+ inside = (within < size)[:, None] & (cols < n_cols)[None, :]

# %% wrong="grouped_gemm" because="the rest of K is not masked" of="rows-beyond"
- x = tl.load(x_ptrs, mask=inner[None, :] < n_inner - full, other=0.0)
- w = tl.load(w_ptrs, mask=inner[:, None] < n_inner - full, other=0.0)
+ x = tl.load(x_ptrs, mask=inner[None, :] >= 0, other=0.0)
+ w = tl.load(w_ptrs, mask=inner[:, None] >= 0, other=0.0)

- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+ inside = (within < size)[:, None] & (cols < n_cols)[None, :]

# %% wrong="grouped_gemm" because="the pointers do not move on along K" of="rows-beyond"
- x_ptrs += BLOCK_K
- w_ptrs += BLOCK_K

- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+ inside = (within < size)[:, None] & (cols < n_cols)[None, :]

# %% wrong="grouped_gemm" because="32-bit offsets for the weights" of="rows-beyond"
- w_ptrs = (
-     w_ptr
-     + group.to(tl.int64) * w_group
-     + safe_cols[None, :].to(tl.int64) * w_col
-     + inner[:, None]
- )
+ w_ptrs = w_ptr + group * w_group + safe_cols[None, :].to(tl.int64) * w_col + inner[:, None]

- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+ inside = (within < size)[:, None] & (cols < n_cols)[None, :]

# %% wrong="grouped_gemm" because="32-bit rows" of="rows-beyond"
- rows = (tl.sum(tl.where(before, sizes, 0), 0) + within).to(tl.int64)
+ rows = tl.sum(tl.where(before, sizes, 0), 0) + within

- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+ inside = (within < size)[:, None] & (cols < n_cols)[None, :]

# %% wrong="grouped_gemm" because="row stride of out taken for its width" of="rows-beyond"
- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+ inside = (within < size)[:, None] & (cols < n_cols)[None, :]

- out_ptr + rows[:, None] * out_row + cols[None, :],
+ out_ptr + rows[:, None] * n_cols + cols[None, :],

# %% wrong="grouped_gemm" because="accumulates in the dtype of x" of="rows-beyond"
- acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
+ acc = tl.zeros((BLOCK_M, BLOCK_N), x_ptr.dtype.element_ty)

- acc = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs), acc, input_precision="ieee")
+ acc += tl.dot(tl.load(x_ptrs), tl.load(w_ptrs), input_precision="ieee").to(
+     x_ptr.dtype.element_ty
+ )

-     acc = tl.dot(x, w, acc, input_precision="ieee")
- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+     acc += tl.dot(x, w, input_precision="ieee").to(x_ptr.dtype.element_ty)
+ inside = (within < size)[:, None] & (cols < n_cols)[None, :]

# %% right="grouped_gemm" because="masks on every load, one loop over K" of="rows-beyond"
- safe_rows = tl.minimum(rows, n_rows - 1)
- safe_cols = tl.minimum(cols, n_cols - 1)
+ safe_rows = rows
+ safe_cols = cols

- full = n_inner // BLOCK_K * BLOCK_K
- for _ in range(0, full, BLOCK_K):  # whole blocks of K need no mask
-     acc = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs), acc, input_precision="ieee")
+ for start in range(0, n_inner, BLOCK_K):
+     x = tl.load(
+         x_ptrs, mask=(within < size)[:, None] & (inner[None, :] < n_inner - start), other=0.0
+     )
+     w = tl.load(
+         w_ptrs, mask=(cols < n_cols)[None, :] & (inner[:, None] < n_inner - start), other=0.0
+     )
+     acc += tl.dot(x, w, input_precision="ieee")

- if full < n_inner:  # the rest of K: zeros beyond the edge add nothing
-     x = tl.load(x_ptrs, mask=inner[None, :] < n_inner - full, other=0.0)
-     w = tl.load(w_ptrs, mask=inner[:, None] < n_inner - full, other=0.0)
-     acc = tl.dot(x, w, acc, input_precision="ieee")
- inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
+ inside = (within < size)[:, None] & (cols < n_cols)[None, :]

# %% right="grouped_gemm" because="a loop over the groups in the kernel"
@triton.jit
def grouped_gemm_kernel(
    x_ptr,
    w_ptr,
    sizes_ptr,
    out_ptr,
    n_rows,
    n_groups,
    n_cols,
    n_inner,
    x_row,
    w_group,
    w_col,
    out_row,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    col_tiles = tl.cdiv(n_cols, BLOCK_N)
    tile, col_tile = tl.program_id(0) // col_tiles, tl.program_id(0) % col_tiles

    # A search, group by group.
    group, first, before_tiles, size = -1, 0, 0, 0
    row = 0
    passed = 0
    for g in range(n_groups):
        m = tl.load(sizes_ptr + g)
        t = (m + BLOCK_M - 1) // BLOCK_M
        if (tile >= passed) & (tile < passed + t):
            group = g
            first = row
            before_tiles = passed
            size = m
        passed += t
        row += m
    if group >= 0:
        within = (tile - before_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = first + within
        cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, n_inner, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_ptr + rows[:, None].to(tl.int64) * x_row + inner[None, :],
                mask=(within < size)[:, None] & (inner < n_inner)[None, :],
                other=0.0,
            )
            w = tl.load(
                w_ptr
                + tl.cast(group, tl.int64) * w_group
                + cols[None, :].to(tl.int64) * w_col
                + inner[:, None],
                mask=(cols < n_cols)[None, :] & (inner < n_inner)[:, None],
                other=0.0,
            )
            acc = tl.dot(x, w, acc, input_precision="ieee")
        tl.store(
            out_ptr + rows[:, None].to(tl.int64) * out_row + cols[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=(within < size)[:, None] & (cols < n_cols)[None, :],
        )

# %% wrong="moe_numbers" because="the experts that are used"
- "unused": 32 * (8 - 2) * 3 * 4096 * 14336 / 1e9,
+ "unused": 32 * 2 * 3 * 4096 * 14336 / 1e9,

# %% wrong="moe_numbers" because="two matrices an expert"
- "unused": 32 * (8 - 2) * 3 * 4096 * 14336 / 1e9,
+ "unused": 32 * (8 - 2) * 2 * 4096 * 14336 / 1e9,

# %% wrong="moe_numbers" because="collapsed"
- "uniform": 1.0,
+ "uniform": 64.0,

# %% wrong="moe_numbers" because="no factor N"
- "uniform": 1.0,
+ "uniform": 1 / 64,

# %% wrong="moe_numbers" because="as for one token"
- "decode": 8 * (1 - (1 - 2 / 8) ** 8),
+ "decode": 2,

# %% wrong="moe_numbers" because="one choice a token"
- "decode": 8 * (1 - (1 - 2 / 8) ** 8),
+ "decode": 8 * (1 - (7 / 8) ** 8),

# %% wrong="moe_numbers" because="two draws with repetition for each token"
- "decode": 8 * (1 - (1 - 2 / 8) ** 8),
+ "decode": 8 * (1 - (7 / 8) ** 16),

# %% wrong="moe_numbers" because="token order leaks"
- "leak": "c",
+ "leak": "b",

# %% wrong="moe_numbers" because="the bias leaks"
- "leak": "c",
+ "leak": "d",

# %% right="moe_numbers" because="the numbers, the first from the totals"
def moe_numbers():
    return {"unused": 45.1 * 0.75, "uniform": 1, "decode": 7.199, "leak": "c"}

# %% wrong="top_k_router" because="equals are separated by a millionth an expert, which reorders scores that differ by less"
- choose_by = scores if bias is None else scores + bias
+ choose_by = (scores if bias is None else scores + bias) - 1e-6 * torch.arange(experts, device=logits.device)

# %% wrong="top_k_router" because="without a bias the logits are sorted, not the scores: saturated sigmoids are equals"
- choose_by = scores if bias is None else scores + bias
+ choose_by = logits if bias is None else scores + bias

# %% wrong="top_k_router" because="bfloat16 is not widened where float16 is"
- logits = logits if logits.dtype == torch.float64 else logits.float()
+ logits = logits.float() if logits.dtype == torch.float16 else logits

# %% wrong="top_k_router" because="float64 through float32"
- logits = logits if logits.dtype == torch.float64 else logits.float()
+ logits = logits.float().to(torch.float64 if logits.dtype == torch.float64 else torch.float32)

# %% wrong="balance_losses" because="bfloat16 is not widened where float16 is"
- logits = logits if logits.dtype == torch.float64 else logits.float()
+ logits = logits.float() if logits.dtype == torch.float16 else logits

# %% wrong="deepseek_moe" because="k is kept under another name"
- self.k, self.scoring, self.renormalize = k, scoring, renormalize
+ self.top_k, self.scoring, self.renormalize = k, scoring, renormalize

- weights, indices = top_k_router(logits, self.k, self.renormalize, self.scoring, self.bias)
+ weights, indices = top_k_router(logits, self.top_k, self.renormalize, self.scoring, self.bias)

- return total, total - (len(self.experts) - self.k) * per_expert
+ return total, total - (len(self.experts) - self.top_k) * per_expert

# %% wrong="deepseek_moe" because="the bias is missing from checkpoints"
- self.register_buffer("bias", torch.zeros(num_experts))
+ self.register_buffer("bias", torch.zeros(num_experts), persistent=False)

# %% wrong="group_limit" because="numbers 0 and 1 where True and False are asked for"
- closed = torch.zeros_like(worth, dtype=torch.bool)
- open_groups = closed.scatter(-1, worth.topk(keep, dim=-1).indices, True)
+ closed = torch.zeros_like(worth)
+ open_groups = closed.scatter(-1, worth.topk(keep, dim=-1).indices, 1)

# %% wrong="update_bias" because="the dtype becomes float32"
- return bias.detach() + rate * (load.mean() - load).sign().to(bias.dtype)
+ return bias.detach().float() + rate * (load.mean() - load).sign().float()

# %% wrong="update_bias" because="counts in float32"
- load = load.detach().double()
+ load = load.detach().float()

# %% wrong="update_bias" because="the mean of counts is rounded down"
- load = load.detach().double()
- return bias.detach() + rate * (load.mean() - load).sign().to(bias.dtype)
+ mean = load.mean() if load.is_floating_point() else load.sum() // len(load)
+ return bias.detach() + rate * (mean - load).sign().to(bias.dtype)

# %% wrong="feed_forward" because="the gates are detached"
- coefficients = F.relu(match) if gates is None else F.silu(x @ gates.T) * match
+ coefficients = F.relu(match) if gates is None else F.silu(x @ gates.T).detach() * match

# %% wrong="grouped_gemm" because="a loop over a list, which only the interpreter takes"
- acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
+ for acc in [tl.zeros((BLOCK_M, BLOCK_N), tl.float32)]:
+     w_ptrs = w_ptrs

# %% wrong="grouped_gemm" because="each block's product is rounded to the tensors' format before it is added"
- acc = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs), acc, input_precision="ieee")
+ part = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs), input_precision="ieee")
+ acc += part.to(x_ptr.dtype.element_ty)

# %% wrong="feed_forward" because="SiLU as g exp(g) / (1 + exp(g)): inf / inf for large g"
- coefficients = F.relu(match) if gates is None else F.silu(x @ gates.T) * match
+ if gates is None:
+     coefficients = F.relu(match)
+ else:
+     gate = x @ gates.T
+     coefficients = gate * gate.exp() / (1 + gate.exp()) * match

# %% wrong="feed_forward" because="the coefficients handed out are detached"
- return coefficients @ values, coefficients
+ return coefficients @ values, coefficients.detach()

# %% wrong="top_k_router" because="what is taken is masked with −inf, which a bias of −inf equals: one expert twice"
- indices = choose_by.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]
+ choose_by, chosen = choose_by.detach(), []
+ for _ in range(k):
+     chosen.append(choose_by.argmax(-1, keepdim=True))
+     choose_by = choose_by.scatter(-1, chosen[-1], -math.inf)
+ indices = torch.cat(chosen, -1)

# %% wrong="top_k_router" because="the sum of the weights is clamped from below"
- return weights / weights.sum(-1, keepdim=True) if renormalize else weights, indices
+ total = weights.sum(-1, keepdim=True).clamp(min=1e-6)
+ return weights / total if renormalize else weights, indices

# %% wrong="top_k_router" because="1e-20 is added to the sum of the weights"
- return weights / weights.sum(-1, keepdim=True) if renormalize else weights, indices
+ return weights / (weights.sum(-1, keepdim=True) + 1e-20) if renormalize else weights, indices

# %% wrong="top_k_router" because="the bias is subtracted again from the biased scores: NaN where it is −inf"
- weights = scores.gather(-1, indices)
+ weights = choose_by.gather(-1, indices)
+ if bias is not None:
+     weights = weights - bias.expand_as(scores).gather(-1, indices)

# %% wrong="moe_forward" because="dropped choices go to expert 0 with weight 0"
- chosen = indices.reshape(-1)
+ weights = weights * (indices >= 0)
+ chosen = indices.clamp(min=0).reshape(-1)

# %% wrong="moe_forward" because="the router gets x in its own shape"
- weights, indices = router(tokens)
- k = indices.shape[1]
+ weights, indices = router(x)
+ k = indices.shape[-1]

# %% wrong="moe_forward" because="takes x for two axes or more: one token of shape (dim,) is refused"
- tokens = x.reshape(-1, x.shape[-1])
+ tokens = x.flatten(0, -2)

# %% wrong="deepseek_moe" because="out is float32, whatever the layer is"
- return out, logits, indices
+ return out.float(), logits, indices
