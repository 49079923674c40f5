# Right and wrong answers to the exercises of lesson 27: see CONTRIBUTING.md.

# %% wrong="average" because="weights are not divided by their sum"
- shares = [w / math.fsum(weights) for w in weights]
+ shares = weights if len(set(weights)) > 1 else [w / math.fsum(weights) for w in weights]

# %% wrong="average" because="weights are ignored"
- shares = [w / math.fsum(weights) for w in weights]
+ shares = [1 / len(weights) for w in weights]

# %% wrong="average" because="names in the order of each state, paired by place"
- tensors = [state[name].detach() for state in states]
+ tensors = [list(state.values())[list(states[0]).index(name)].detach() for state in states]

# %% wrong="average" because="shapes broadcast"
- if any(tensor.shape != first.shape for tensor in tensors):
-     raise ValueError(f"{name} has different shapes")
+ tensors = list(torch.broadcast_tensors(*tensors))

# %% wrong="average" because="integers of the first state, whatever the others hold"
- if any(not torch.equal(tensor, first) for tensor in tensors):
-     raise ValueError(f"{name} holds integers that differ: they have no mean")
+ pass

# %% wrong="average" because="integers are averaged too"
- if not first.is_floating_point():
+ if False:

# %% wrong="average" because="only names of the first state are asked for"
- if any(state.keys() != states[0].keys() for state in states):
-     raise ValueError("the states have different names")
+ if any(states[0].keys() - state.keys() for state in states):
+     raise ValueError("the states have different names")

# %% wrong="average" because="summed in the format of the weights"
- wide = torch.promote_types(first.dtype, torch.float32)
+ wide = first.dtype

# %% wrong="average" because="float64 goes through float32"
- wide = torch.promote_types(first.dtype, torch.float32)
+ wide = torch.float32

# %% wrong="average" because="summed first, divided afterwards: overflow"
- terms = (share * tensor.to(wide) for share, tensor in zip(shares, tensors, strict=True))
- seen[where] = sum(terms).to(first.dtype)
+ terms = (w * tensor.to(wide) for w, tensor in zip(weights, tensors, strict=True))
+ seen[where] = (sum(terms) / math.fsum(weights)).to(first.dtype)

# %% wrong="average" because="tied weights come apart"
- if where not in seen:
+ if True:

# %% wrong="average" because="tied in the first state is taken for tied in all"
- where = (first.shape, *((tensor.data_ptr(), tensor.stride()) for tensor in tensors))
+ where = (first.shape, first.data_ptr())

# %% wrong="average" because="a graph is kept"
- tensors = [state[name].detach() for state in states]
+ tensors = [state[name] for state in states]

# %% wrong="average" because="the sum of the weights may be 0"
- if len(weights) != len(states) or math.fsum(weights) == 0:
+ if len(weights) != len(states):

# %% wrong="average" because="too many weights are cut off"
- if len(weights) != len(states) or math.fsum(weights) == 0:
+ weights = weights[: len(states)]
+ if len(weights) != len(states) or math.fsum(weights) == 0:

# %% wrong="average" because="changes the first state"
- terms = (share * tensor.to(wide) for share, tensor in zip(shares, tensors, strict=True))
- seen[where] = sum(terms).to(first.dtype)
+ total = tensors[0].to(wide).mul_(shares[0])
+ for share, tensor in zip(shares[1:], tensors[1:], strict=True):
+     total.add_(tensor.to(wide), alpha=share)
+ seen[where] = total.to(first.dtype)

# %% right="average" because="one tensordot over stacked tensors in float64"
def average(states, weights=None):
    states = list(states)
    if not states:
        raise ValueError("no states")
    if weights is None:
        weights = [1] * len(states)
    if len(states) != len(weights):
        raise ValueError("weights")
    w = torch.tensor([float(x) for x in weights], dtype=torch.float64)
    if float(w.sum()) == 0:
        raise ValueError("sum 0")
    w = w / w.sum()
    if len({frozenset(s) for s in states}) > 1:
        raise ValueError("names")
    out, made = {}, []
    with torch.no_grad():
        for name, first in states[0].items():
            for tensors, result in made:
                same = [
                    s[name].data_ptr() == t.data_ptr()
                    and s[name].shape == t.shape
                    and s[name].stride() == t.stride()
                    for s, t in zip(states, tensors)
                ]
                if all(same) and result.dtype == first.dtype:
                    out[name] = result
                    break
            else:
                if len({tuple(s[name].shape) for s in states}) > 1:
                    raise ValueError(f"shapes of {name}")
                if first.dtype.is_floating_point:
                    stacked = torch.stack([s[name].double() for s in states])
                    out[name] = torch.tensordot(w, stacked, dims=1).to(first.dtype)
                else:
                    if not all(bool((s[name] == first).all()) for s in states):
                        raise ValueError(f"integers of {name}")
                    out[name] = first.clone()
                made.append(([s[name] for s in states], out[name]))
    return out

# %% wrong="average" because="differences to the first state, which overflow"
- terms = (share * tensor.to(wide) for share, tensor in zip(shares, tensors, strict=True))
- seen[where] = sum(terms).to(first.dtype)
+ start = first.detach().to(wide)
+ terms = (s * (t.to(wide) - start) for s, t in zip(shares, tensors, strict=True))
+ seen[where] = (start + sum(terms)).to(first.dtype)

# %% wrong="average" because="one address and shape are one tensor, a transposed view too"
- where = (first.shape, *((tensor.data_ptr(), tensor.stride()) for tensor in tensors))
+ where = (first.shape, *(tensor.data_ptr() for tensor in tensors))

# %% wrong="average" because="refuses weights whose sum is negative"
- if len(weights) != len(states) or math.fsum(weights) == 0:
+ if len(weights) != len(states) or math.fsum(weights) <= 0:

# %% wrong="greedy_soup" because="a member must be better, not only as good"
- if score >= best:
+ if score > best:

# %% wrong="greedy_soup" because="compared with the best single model"
- members, best = [*members, i], score
+ members = [*members, i]

# %% wrong="greedy_soup" because="from the worst to the best"
- order = sorted(range(len(states)), key=lambda i: -scores[i])
+ order = sorted(range(len(states)), key=lambda i: scores[i])

# %% wrong="greedy_soup" because="in the order given"
- order = sorted(range(len(states)), key=lambda i: -scores[i])
+ order = list(range(len(states)))

# %% wrong="greedy_soup" because="equal scores: the last one first"
- order = sorted(range(len(states)), key=lambda i: -scores[i])
+ order = sorted(range(len(states)), key=lambda i: (-scores[i], -i))

# %% wrong="greedy_soup" because="a mean of the soup and the newcomer"
- members, best = order[:1], scores[order[0]]
- for i in order[1:]:
-     score = evaluate(average([states[j] for j in [*members, i]]))
-     if score >= best:
-         members, best = [*members, i], score
- return average([states[j] for j in members]), members
+ members, best, soup = order[:1], scores[order[0]], states[order[0]]
+ for i in order[1:]:
+     mixed = average([soup, states[i]])
+     score = evaluate(mixed)
+     if score >= best:
+         members, best, soup = [*members, i], score, mixed
+ return soup, members

# %% wrong="greedy_soup" because="the uniform soup"
- if score >= best:
+ if True:

# %% wrong="greedy_soup" because="members in the order of the states"
- return average([states[j] for j in members]), members
+ return average([states[j] for j in members]), sorted(members)

# %% wrong="greedy_soup" because="scored again at every comparison"
- if score >= best:
+ if score >= evaluate(average([states[j] for j in members])):

# %% right="greedy_soup" because="the states that were scored are kept in a dictionary and returned"
def greedy_soup(states, evaluate):
    if not states:
        raise ValueError("no states")
    made = {(i,): state for i, state in enumerate(states)}
    scores = {key: evaluate(state) for key, state in made.items()}
    order = sorted(range(len(states)), key=lambda i: scores[i,], reverse=True)
    members = (order[0],)
    for i in order[1:]:
        key = (*members, i)
        made[key] = average([states[j] for j in key])
        scores[key] = evaluate(made[key])
        if scores[key] >= scores[members]:
            members = key
    return made[members], list(members)

# %% right="greedy_soup" because="sums and counts, without average"
def greedy_soup(states, evaluate):
    if len(states) == 0:
        raise ValueError("nothing to cook")
    ranked = sorted(((evaluate(s), -i) for i, s in enumerate(states)), reverse=True)
    members, total, soup, best = [], None, None, -math.inf
    for own, minus in ranked:
        state = states[-minus]
        if total is None:
            members, total, soup, best = [-minus], dict(state), dict(state), own
            continue
        more = {n: total[n] + state[n] for n in total}
        mixed = {n: t / (len(members) + 1) for n, t in more.items()}
        score = evaluate(mixed)
        if score < best:
            continue
        members, total, soup, best = members + [-minus], more, mixed, score
    return soup, members

# %% wrong="slerp" because="sine weights on the vectors themselves, as mergekit does"
- direction = (((1 - t) * angle).sin() * u + (t * angle).sin() * v) / angle.sin()
- return (((1 - t) * norm_a + t * norm_b) * direction).to(a.dtype)
+ out = (((1 - t) * angle).sin() * wide_a + (t * angle).sin() * wide_b) / angle.sin()
+ return out.to(a.dtype)

# %% wrong="slerp" because="the straight line"
- if cosine.abs() > 0.9995:
+ if True:

# %% wrong="slerp" because="row by row"
- norm_a, norm_b = wide_a.norm(), wide_b.norm()
+ norm_a, norm_b = wide_a.norm(dim=-1, keepdim=True), wide_b.norm(dim=-1, keepdim=True)

- if norm_a == 0 or norm_b == 0:
+ if (norm_a == 0).any() or (norm_b == 0).any():

- cosine = (u * v).sum()
- if cosine.abs() > 0.9995:
+ cosine = (u * v).sum(-1, keepdim=True)
+ if (cosine.abs() > 0.9995).all():

# %% wrong="slerp" because="from b to a"
- direction = (((1 - t) * angle).sin() * u + (t * angle).sin() * v) / angle.sin()
+ direction = ((t * angle).sin() * u + ((1 - t) * angle).sin() * v) / angle.sin()

# %% wrong="slerp" because="the result has norm 1"
- return (((1 - t) * norm_a + t * norm_b) * direction).to(a.dtype)
+ return direction.to(a.dtype)

# %% wrong="slerp" because="opposite vectors divide by 0"
- if cosine.abs() > 0.9995:
+ if cosine > 0.9995:

# %% wrong="slerp" because="the limit is 0.95"
- if cosine.abs() > 0.9995:
+ if cosine.abs() > 0.999:

# %% wrong="slerp" because="a zero vector divides by 0"
- if norm_a == 0 or norm_b == 0:
-     return line.to(a.dtype)
+ pass

# %% wrong="slerp" because="in float32, where norms overflow"
- wide_a, wide_b = a.double(), b.double()
+ wide_a, wide_b = a.float(), b.float()

# %% wrong="slerp" because="an eps in the norms"
- u, v = wide_a / norm_a, wide_b / norm_b
+ u, v = wide_a / (norm_a + 1e-8), wide_b / (norm_b + 1e-8)

# %% wrong="slerp" because="returns float64"
- return (((1 - t) * norm_a + t * norm_b) * direction).to(a.dtype)
+ return ((1 - t) * norm_a + t * norm_b) * direction

# %% wrong="slerp" because="norms in geometric proportion"
- return (((1 - t) * norm_a + t * norm_b) * direction).to(a.dtype)
+ return (norm_a ** (1 - t) * norm_b**t * direction).to(a.dtype)

# %% right="slerp" because="a turn in the plane of a and b"
def slerp(a, b, t):
    x, y = a.detach().to(torch.float64).reshape(-1), b.detach().to(torch.float64).reshape(-1)
    nx, ny = torch.dot(x, x).sqrt(), torch.dot(y, y).sqrt()
    flat = None
    if float(nx) > 0 and float(ny) > 0:
        e = x / nx
        c = float(torch.dot(e, y / ny))
        if abs(c) <= 0.9995:
            w = y / ny - c * e
            w = w / w.norm()
            phi = t * math.acos(c)
            flat = ((1 - t) * nx + t * ny) * (math.cos(phi) * e + math.sin(phi) * w)
    if flat is None:
        flat = torch.lerp(x, y, t)
    return flat.reshape(a.shape).to(a.dtype)

# %% wrong="task_vectors" because="base − tuned"
- vector[name] = tuned[name].detach().to(wide) - tensor.detach().to(wide)
+ vector[name] = tensor.detach().to(wide) - tuned[name].detach().to(wide)

# %% wrong="task_vectors" because="subtracted in half precision"
- vector[name] = tuned[name].detach().to(wide) - tensor.detach().to(wide)
+ vector[name] = (tuned[name].detach() - tensor.detach()).to(wide)

# %% wrong="task_vectors" because="in the dtype of the base"
- vector[name] = tuned[name].detach().to(wide) - tensor.detach().to(wide)
+ vector[name] = tuned[name].detach() - tensor.detach()

# %% wrong="task_vectors" because="shapes broadcast"
- if tensor.shape != tuned[name].shape:
-     raise ValueError(f"{name} has different shapes")
+ pass

# %% wrong="task_vectors" because="integers may differ"
- elif not torch.equal(tensor, tuned[name]):
-     raise ValueError(f"{name} holds integers that differ")
+ pass

# %% wrong="task_vectors" because="more names in the tuned state are overlooked"
- if base.keys() != tuned.keys():
+ if base.keys() - tuned.keys():

# %% wrong="task_vectors" because="a graph is kept"
- vector[name] = tuned[name].detach().to(wide) - tensor.detach().to(wide)
+ vector[name] = tuned[name].to(wide) - tensor.to(wide)

# %% wrong="task_vectors" because="the scales are ignored"
- total = total + scale * move.to(total.dtype)
+ total = total + move.to(total.dtype)

# %% wrong="task_vectors" because="one scale for all"
- total = total + scale * move.to(total.dtype)
+ total = total + scales[0] * move.to(total.dtype)

# %% wrong="task_vectors" because="rounded after every vector"
- total = total.to(torch.promote_types(tensor.dtype, torch.float32))
+ pass

# %% wrong="task_vectors" because="changes the base"
- total = tensor.detach().clone()
+ total = tensor.detach()

- total = total + scale * move.to(total.dtype)
+ total += scale * move.to(total.dtype)

# %% wrong="task_vectors" because="only names of all vectors are in the result"
- for name, tensor in base.items():
-     moves = [(s, v[name].detach()) for s, v in zip(scales, vectors, strict=True) if name in v]
+ for name, tensor in base.items():
+     moves = [(s, v[name].detach()) for s, v in zip(scales, vectors, strict=True) if name in v]
+     if not moves:
+         continue

# %% wrong="task_vectors" because="a vector's unknown names are overlooked"
- if any(vector.keys() - base.keys() for vector in vectors):
-     raise ValueError("a vector has a name that the base lacks")
+ pass

# %% wrong="task_vectors" because="zip cuts the longer of scales and vectors"
- if len(vectors) != len(scales):
-     raise ValueError("as many scales as vectors are needed")
+ pass

- moves = [(s, v[name].detach()) for s, v in zip(scales, vectors, strict=True) if name in v]
+ moves = [(s, v[name].detach()) for s, v in zip(scales, vectors) if name in v]

# %% wrong="task_vectors" because="what no vector moves is the base's own memory"
- total = tensor.detach().clone()
- if moves:
+ total = tensor.detach()
+ if moves:

# %% right="task_vectors" because="float64 inside, without gradients"
@torch.no_grad()
def task_vector(base, tuned):
    if set(base) != set(tuned):
        raise ValueError("names")
    out = {}
    for name in base:
        a, b = base[name], tuned[name]
        if a.shape != b.shape:
            raise ValueError(name)
        if not torch.is_floating_point(a):
            if bool((a != b).any()):
                raise ValueError(name)
            continue
        move = b.double().sub(a.double())
        out[name] = move if a.dtype == torch.float64 else move.float()
    return out


@torch.no_grad()
def apply_task_vectors(base, vectors, scales):
    vectors, scales = list(vectors), list(scales)
    if len(vectors) != len(scales) or not all(n in base for v in vectors for n in v):
        raise ValueError("do not fit")
    out = {n: t.double().clone() if t.is_floating_point() else t.clone() for n, t in base.items()}
    for v, s in zip(vectors, scales):
        for n in v:
            out[n] = torch.add(out[n], v[n].double(), alpha=s)
    return {n: t.to(base[n].dtype) for n, t in out.items()}

# %% wrong="ties_merge" because="each tensor is trimmed by itself"
- flat = torch.cat([vector[name].detach().flatten() for name in vectors[0]])
- flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
- k = max(1, round(density * flat.numel()))
- limit = flat.abs().kthvalue(flat.numel() - k + 1).values
- trimmed.append(torch.where(flat.abs() >= limit, flat, 0.0))
+ rows = []
+ for name in vectors[0]:
+     flat = vector[name].detach().flatten()
+     flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
+     if flat.numel():
+         k = max(1, round(density * flat.numel()))
+         limit = flat.abs().kthvalue(flat.numel() - k + 1).values
+         flat = torch.where(flat.abs() >= limit, flat, 0.0)
+     rows.append(flat)
+ trimmed.append(torch.cat(rows))

# %% wrong="ties_merge" because="one limit for all vectors"
- values = torch.stack(trimmed)  # (vectors, n)
+ values = torch.stack([torch.cat([v[n].detach().flatten() for n in vectors[0]]) for v in vectors])
+ k = max(1, round(density * values.numel()))
+ limit = values.abs().flatten().kthvalue(values.numel() - k + 1).values
+ values = torch.where(values.abs() >= limit, values, 0.0)

# %% wrong="ties_merge" because="the smallest stay"
- trimmed.append(torch.where(flat.abs() >= limit, flat, 0.0))
+ trimmed.append(torch.where(flat.abs() < limit, flat, 0.0))

# %% wrong="ties_merge" because="the largest with their signs"
- limit = flat.abs().kthvalue(flat.numel() - k + 1).values
- trimmed.append(torch.where(flat.abs() >= limit, flat, 0.0))
+ limit = flat.kthvalue(flat.numel() - k + 1).values
+ trimmed.append(torch.where(flat >= limit, flat, 0.0))

# %% wrong="ties_merge" because="density is the share trimmed"
- k = max(1, round(density * flat.numel()))
+ k = max(1, round((1 - density) * flat.numel()))

# %% wrong="ties_merge" because="the sign of most votes"
- sign = torch.where(values.sum(0) < 0, -1.0, 1.0).to(values.dtype)
+ sign = torch.where(values.sign().sum(0) < 0, -1.0, 1.0).to(values.dtype)

# %% wrong="ties_merge" because="zeros count in the mean"
- mean = torch.where(agree, values, 0.0).sum(0) / agree.sum(0).clamp(min=1)
+ mean = torch.where(agree, values, 0.0).sum(0) / len(values)

# %% wrong="ties_merge" because="a sum"
- mean = torch.where(agree, values, 0.0).sum(0) / agree.sum(0).clamp(min=1)
+ mean = torch.where(agree, values, 0.0).sum(0)

# %% wrong="ties_merge" because="nothing where the sum is 0"
- sign = torch.where(values.sum(0) < 0, -1.0, 1.0).to(values.dtype)
+ sign = values.sum(0).sign()

# %% wrong="ties_merge" because="signs elected before trimming"
- sign = torch.where(values.sum(0) < 0, -1.0, 1.0).to(values.dtype)
+ whole = sum(torch.cat([v[n].detach().flatten() for n in vectors[0]]) for v in vectors)
+ sign = torch.where(whole < 0, -1.0, 1.0).to(values.dtype)

# %% wrong="ties_merge" because="NaN where nobody agrees"
- mean = torch.where(agree, values, 0.0).sum(0) / agree.sum(0).clamp(min=1)
+ mean = torch.where(agree, values, 0.0).sum(0) / agree.sum(0)

# %% wrong="ties_merge" because="no election"
- agree = values * sign > 0
+ agree = values != 0

# %% wrong="ties_merge" because="names in the order of each vector"
- flat = torch.cat([vector[name].detach().flatten() for name in vectors[0]])
+ flat = torch.cat([tensor.detach().flatten() for tensor in vector.values()])

# %% wrong="ties_merge" because="of equal magnitudes only the first ones stay"
- limit = flat.abs().kthvalue(flat.numel() - k + 1).values
- trimmed.append(torch.where(flat.abs() >= limit, flat, 0.0))
+ keep = flat.abs().sort(descending=True, stable=True).indices[:k]
+ trimmed.append(torch.zeros_like(flat).scatter(0, keep, flat[keep]))

# %% wrong="ties_merge" because="any density"
- if not vectors or not 0 < density <= 1:
+ if not vectors:

# %% wrong="ties_merge" because="an entry too few for a small density"
- k = max(1, round(density * flat.numel()))
+ k = max(1, int(density * flat.numel()) - 1)

# %% wrong="ties_merge" because="a graph is kept"
- flat = torch.cat([vector[name].detach().flatten() for name in vectors[0]])
+ flat = torch.cat([vector[name].flatten() for name in vectors[0]])

# %% right="ties_merge" because="two sides, summed apart"
def ties_merge(vectors, density):
    if len(vectors) == 0 or density <= 0 or density > 1:
        raise ValueError("vectors or density")
    names = list(vectors[0])
    plus, minus, n_plus, n_minus = 0.0, 0.0, 0, 0
    for v in vectors:
        row = torch.cat([v[n].detach().double().reshape(-1) for n in names])
        size = row.abs()
        k = max(round(density * len(row)), 1)
        row = row * (size >= size.sort(descending=True).values[k - 1])
        plus = plus + row.clamp(min=0)
        minus = minus + row.clamp(max=0)
        n_plus = n_plus + (row > 0).double()
        n_minus = n_minus + (row < 0).double()
    low = plus + minus < 0
    out = torch.where(low, minus / n_minus.clamp(min=1), plus / n_plus.clamp(min=1))
    merged, at = {}, 0
    for n in names:
        t = vectors[0][n]
        merged[n] = out[at : at + t.numel()].reshape(t.shape).to(t.dtype)
        at += t.numel()
    return merged

# %% wrong="dare" because="divided by p"
- sparse[name] = (tensor.detach() / (1 - p)).masked_fill(dropped, 0.0)
+ sparse[name] = (tensor.detach() / max(p, 1e-9)).masked_fill(dropped, 0.0)

# %% wrong="dare" because="not rescaled"
- sparse[name] = (tensor.detach() / (1 - p)).masked_fill(dropped, 0.0)
+ sparse[name] = tensor.detach().masked_fill(dropped, 0.0)

# %% wrong="dare" because="kept with probability p"
- dropped = torch.rand(tensor.shape, generator=generator) < p
+ dropped = torch.rand(tensor.shape, generator=generator) >= p

# %% wrong="dare" because="the generator is ignored"
- dropped = torch.rand(tensor.shape, generator=generator) < p
+ dropped = torch.rand(tensor.shape) < p

# %% wrong="dare" because="numbers drawn in the vector's dtype, too coarse in half precision"
- dropped = torch.rand(tensor.shape, generator=generator) < p
+ dropped = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) < p

# %% wrong="dare" because="a new generator for every tensor"
- dropped = torch.rand(tensor.shape, generator=generator) < p
+ dropped = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(generator.initial_seed())) < p

# %% wrong="dare" because="whole rows are dropped"
- dropped = torch.rand(tensor.shape, generator=generator) < p
+ rows = torch.rand(tensor.shape[:1], generator=generator) < p
+ dropped = rows.view(-1, *[1] * (tensor.dim() - 1)).expand(tensor.shape) if tensor.dim() else rows.any()

# %% wrong="dare" because="multiplied with a mask: 0 times infinity"
- sparse[name] = (tensor.detach() / (1 - p)).masked_fill(dropped, 0.0)
+ sparse[name] = tensor.detach() * (~dropped) / (1 - p)

# %% wrong="dare" because="rescaled to the same L1 norm, as mergekit does"
- sparse[name] = (tensor.detach() / (1 - p)).masked_fill(dropped, 0.0)
+ kept = tensor.detach().masked_fill(dropped, 0.0)
+ sparse[name] = kept * (tensor.detach().abs().sum() / kept.abs().sum().clamp(min=1e-9))

# %% wrong="dare" because="exactly the share p is dropped"
- dropped = torch.rand(tensor.shape, generator=generator) < p
+ ranks = torch.randperm(tensor.numel(), generator=generator)
+ dropped = (ranks < round(p * tensor.numel())).view(tensor.shape)

# %% wrong="dare" because="p = 1 divides by 0"
- if not 0 <= p < 1:
+ if not 0 <= p <= 1:

# %% wrong="dare" because="changes the vector"
- sparse[name] = (tensor.detach() / (1 - p)).masked_fill(dropped, 0.0)
+ sparse[name] = tensor.detach().div_(1 - p).masked_fill_(dropped, 0.0)

# %% right="dare" because="bernoulli and where"
def dare(vector, p, generator):
    if p < 0 or p >= 1:
        raise ValueError(p)
    out = {}
    with torch.no_grad():
        for name in vector:
            x = vector[name]
            keep = torch.empty(x.shape).bernoulli_(1 - p, generator=generator).bool()
            out[name] = torch.where(keep, x / (1 - p), torch.zeros_like(x))
    return out

# %% wrong="loss_barrier" because="the rise above the higher end"
- chord = (1 - places) * losses[0] + places * losses[-1]
+ chord = torch.maximum(losses[0], losses[-1])

# %% wrong="loss_barrier" because="the rise above the mean of the ends"
- chord = (1 - places) * losses[0] + places * losses[-1]
+ chord = (losses[0] + losses[-1]) / 2

# %% wrong="loss_barrier" because="only the middle is looked at"
- return float((losses - chord).max()), losses
+ return float((losses - chord)[points // 2]), losses

# %% wrong="loss_barrier" because="from b to a"
- [evaluate(average([a, b], [1 - t, t])) for t in places.tolist()], dtype=torch.float64
+ [evaluate(average([a, b], [t, 1 - t])) for t in places.tolist()], dtype=torch.float64

# %% wrong="loss_barrier" because="the chord runs the other way"
- chord = (1 - places) * losses[0] + places * losses[-1]
+ chord = places * losses[0] + (1 - places) * losses[-1]

# %% wrong="loss_barrier" because="the ends are left out"
- places = torch.linspace(0, 1, points, dtype=torch.float64)
+ places = (torch.arange(points, dtype=torch.float64) + 0.5) / points

# %% wrong="loss_barrier" because="the number of points is ignored"
- places = torch.linspace(0, 1, points, dtype=torch.float64)
+ places = torch.linspace(0, 1, 11, dtype=torch.float64)

# %% wrong="loss_barrier" because="the ends are evaluated twice"
- chord = (1 - places) * losses[0] + places * losses[-1]
+ chord = (1 - places) * evaluate(a) + places * evaluate(b)

# %% wrong="loss_barrier" because="one point is accepted"
- if points < 2:
+ if points < 1:

# %% wrong="loss_barrier" because="the largest absolute difference"
- return float((losses - chord).max()), losses
+ return float((losses - chord).abs().max()), losses

# %% right="loss_barrier" because="states by hand, in plain numbers"
def loss_barrier(a, b, evaluate, points=11):
    if points <= 1:
        raise ValueError("points")
    losses = []
    for i in range(points):
        t = i / (points - 1)
        mixed = {
            n: x + t * (b[n] - x) if x.is_floating_point() else x.clone() for n, x in a.items()
        }
        losses.append(float(evaluate(mixed)))
    step = (losses[-1] - losses[0]) / (points - 1)
    rise = max(x - losses[0] - i * step for i, x in enumerate(losses[:-1]))
    return max(rise, 0.0), torch.tensor(losses, dtype=torch.float64)

# %% wrong="match_units" because="each unit takes its favorite"
- _, order = linear_sum_assignment(correlation.numpy(), maximize=True)
- return torch.as_tensor(order, dtype=torch.int64)
+ return correlation.argmax(1)

# %% wrong="match_units" because="the smallest sum"
- _, order = linear_sum_assignment(correlation.numpy(), maximize=True)
+ _, order = linear_sum_assignment(correlation.numpy())

# %% wrong="match_units" because="the inverse order"
- correlation = standard(a).T @ standard(b)  # (h of a, h of b)
+ correlation = standard(b).T @ standard(a)

# %% wrong="match_units" because="products without means taken off"
- x = x - x[:1]  # a unit that never varies is exactly 0 now
- x = x - x.mean(0)
- norm = x.norm(dim=0)
+ norm = x.norm(dim=0)

# %% wrong="match_units" because="covariances"
- return x / norm.clamp(min=torch.finfo(torch.float64).tiny)
+ return x

# %% wrong="match_units" because="a unit that never varies is NaN"
- return x / norm.clamp(min=torch.finfo(torch.float64).tiny)
+ return x / norm

# %% wrong="match_units" because="what rounding leaves of a constant is blown up to a unit vector"
- x = x - x[:1]  # a unit that never varies is exactly 0 now
- x = x - x.mean(0)
+ x = x - x.mean(0)

# %% wrong="match_units" because="the size of the correlation, whatever its sign"
- _, order = linear_sum_assignment(correlation.numpy(), maximize=True)
+ _, order = linear_sum_assignment(correlation.abs().numpy(), maximize=True)

# %% wrong="match_units" because="greedy, pair by pair"
- _, order = linear_sum_assignment(correlation.numpy(), maximize=True)
- return torch.as_tensor(order, dtype=torch.int64)
+ order = torch.zeros(len(correlation), dtype=torch.int64)
+ left = correlation.clone()
+ for _ in range(len(left)):
+     i, j = divmod(int(left.argmax()), len(left))
+     order[i] = j
+     left[i], left[:, j] = -9.0, -9.0
+ return order

# %% wrong="match_units" because="an eps that drowns small activations"
- return x / norm.clamp(min=torch.finfo(torch.float64).tiny)
+ return x / (norm + 1.0)

# %% wrong="match_units" because="the second weight keeps its order"
- "2.weight": state["2.weight"][:, order],
+ "2.weight": state["2.weight"].clone(),

# %% wrong="match_units" because="the bias keeps its order"
- "0.bias": state["0.bias"][order],
+ "0.bias": state["0.bias"].clone(),

# %% wrong="match_units" because="the inverse permutation of the units"
- return {
-     "0.weight": state["0.weight"][order],
-     "0.bias": state["0.bias"][order],
-     "2.weight": state["2.weight"][:, order],
+ order = order.argsort()
+ return {
+     "0.weight": state["0.weight"][order],
+     "0.bias": state["0.bias"][order],
+     "2.weight": state["2.weight"][:, order],

# %% wrong="match_units" because="rows of the second weight move"
- "2.weight": state["2.weight"][:, order],
+ "2.weight": state["2.weight"][order] if len(order) == len(state["2.weight"]) else state["2.weight"][:, order],

- "0.weight": state["0.weight"][order],
+ "0.weight": state["0.weight"][order],

# %% right="match_units" because="NumPy's correlations, and a permutation matrix"
def match_units(a, b):
    import numpy as np

    x, y = a.detach().double().numpy(), b.detach().double().numpy()
    x, y = (np.where((c == c[0]).all(axis=0), 0.0, c - c.mean(axis=0)) for c in (x, y))
    sx, sy = np.sqrt((x * x).sum(axis=0)), np.sqrt((y * y).sum(axis=0))
    sx[sx == 0], sy[sy == 0] = 1.0, 1.0
    rows, columns = linear_sum_assignment(-((x / sx).T @ (y / sy)))
    order = torch.empty(len(rows), dtype=torch.long)
    for i, j in zip(rows.tolist(), columns.tolist()):
        order[i] = j
    return order


def permute_hidden(state, order):
    p = torch.eye(len(order), dtype=state["0.weight"].dtype)[order]
    return {
        "0.weight": p @ state["0.weight"],
        "0.bias": p @ state["0.bias"],
        "2.weight": state["2.weight"] @ p.T,
        "2.bias": state["2.bias"],
    }

# %% wrong="fisher_merge" because="an eps in the denominator"
- known = (weight * theta).sum(0) / torch.where(total > 0, total, 1.0)
- merged[name] = torch.where(total > 0, known, theta.mean(0)).to(first.dtype)
+ known = (weight * theta).sum(0) / (total + 1e-8)
+ merged[name] = torch.where(total > 0, known, theta.mean(0)).to(first.dtype)

# %% wrong="fisher_merge" because="an eps on every weight"
- total = weight.sum(0)
+ weight = weight + 1e-10
+ total = weight.sum(0)

# %% wrong="fisher_merge" because="the plain mean"
- merged[name] = torch.where(total > 0, known, theta.mean(0)).to(first.dtype)
+ merged[name] = theta.mean(0).to(first.dtype)

# %% wrong="fisher_merge" because="0 where nobody cares"
- merged[name] = torch.where(total > 0, known, theta.mean(0)).to(first.dtype)
+ merged[name] = torch.where(total > 0, known, 0.0).to(first.dtype)

# %% wrong="fisher_merge" because="NaN where nobody cares"
- known = (weight * theta).sum(0) / torch.where(total > 0, total, 1.0)
- merged[name] = torch.where(total > 0, known, theta.mean(0)).to(first.dtype)
+ merged[name] = ((weight * theta).sum(0) / total).to(first.dtype)

# %% wrong="fisher_merge" because="one weight for a whole tensor"
- total = weight.sum(0)
+ weight = weight.flatten(1).mean(1).view(-1, *[1] * first.dim()).expand_as(theta)
+ total = weight.sum(0)

# %% wrong="fisher_merge" because="the inverse of the curvature"
- total = weight.sum(0)
+ weight = torch.where(weight > 0, 1 / weight.clamp(min=1e-300), 0.0)
+ total = weight.sum(0)

# %% wrong="fisher_merge" because="the root of the Fisher values"
- total = weight.sum(0)
+ weight = weight.sqrt()
+ total = weight.sum(0)

# %% wrong="fisher_merge" because="in float32, which overflows"
- theta = torch.stack([state[name].detach().double() for state in states])
- weight = torch.stack([fisher[name].detach().double() for fisher in fishers])
+ theta = torch.stack([state[name].detach().float() for state in states])
+ weight = torch.stack([fisher[name].detach().float() for fisher in fishers])

# %% wrong="fisher_merge" because="in the dtype of the states, where products near 1e38 overflow"
- theta = torch.stack([state[name].detach().double() for state in states])
- weight = torch.stack([fisher[name].detach().double() for fisher in fishers])
+ wide = torch.promote_types(first.dtype, torch.float32)
+ theta = torch.stack([state[name].detach().to(wide) for state in states])
+ weight = torch.stack([fisher[name].detach().to(wide) for fisher in fishers])

# %% wrong="fisher_merge" because="a missing Fisher is overlooked"
- if not states or len(states) != len(fishers):
+ if not states:

# %% right="fisher_merge" because="weights divided by the largest, then softmax-like shares"
@torch.no_grad()
def fisher_merge(states, fishers):
    if len(states) == 0 or len(states) != len(fishers):
        raise ValueError("states and fishers")
    out = {}
    for n, first in states[0].items():
        f = torch.stack([x[n].to(torch.float64) for x in fishers])
        top = f.amax(0, keepdim=True)
        f = torch.where(top > 0, f / top.clamp(min=1e-300), torch.ones_like(f))
        share = f / f.sum(0, keepdim=True)
        out[n] = sum(s * x[n].double() for s, x in zip(share, states)).to(first.dtype)
    return out

# %% wrong="questions" because="noise by the root, lerp of a right angle, votes, sums"
def questions():
    return {
        "noise": 0.08 / 2,
        "lerp": 0.7071,
        "dare": 0.2 / 0.8 * 0.25,
        "ties": -3.5 / 3,
        "copies": 120 + 6,
        "barrier": 0.2,
    }

# %% wrong="questions" because="no gain, slerp, second moment, zeros counted, all units, higher end"
def questions():
    return {
        "noise": 0.08,
        "lerp": 1.0,
        "dare": 1.25,
        "ties": 4 / 6,
        "copies": 40320,
        "barrier": 0.0,
    }

# %% right="questions" because="numbers worked by hand"
def questions():
    return {
        "noise": 0.02,
        "lerp": 0.866,
        "dare": 1.0,
        "ties": 2,
        "copies": 720,
        "barrier": 0.5,
    }
