# %% [markdown]
# Answers to lesson 20. Each cell stands in for an exercise cell, whole, or changes one.

# %% wrong="conjugate_operators" because="the gradient of f stays this rank's own"
- return all_reduced(dy, ctx.group), None
+ return dy, None

# %% wrong="conjugate_operators" because="g sums its gradient, too"
- def backward(ctx, dy):
-     return dy, None
+ def backward(ctx, dy):
+     return all_reduced(dy, ctx.group), None

- return all_reduced(x, group)
+ ctx.group = group
+ return all_reduced(x, group)

# %% wrong="conjugate_operators" because="x itself is all-reduced"
- total = x.clone(memory_format=torch.contiguous_format)
+ total = x.contiguous()

# %% wrong="conjugate_operators" because="the job in place of the group"
- dist.all_reduce(total, group=group)
+ dist.all_reduce(total)

# %% wrong="conjugate_operators" because="means in place of sums"
- dist.all_reduce(total, group=group)
- return total
+ dist.all_reduce(total, group=group)
+ return total / dist.get_world_size(group)

# %% wrong="conjugate_operators" because="only rank 0 has the sum"
- dist.all_reduce(total, group=group)
+ dist.reduce(total, group=group, group_dst=0)

# %% wrong="conjugate_operators" because="everything through float32"
- total = x.clone(memory_format=torch.contiguous_format)
+ total = x.float().clone(memory_format=torch.contiguous_format)

# %% wrong="conjugate_operators" because="dist.all_reduce alone, without a gradient"
def copy_to_ranks(x, group=None):
    return x

def sum_over_ranks(x, group=None):
    total = x.clone()
    dist.all_reduce(total, group=group)
    return total

# %% right="conjugate_operators" because="a hook on the gradient, and x plus a constant"
def copy_to_ranks(x, group=None):
    def summed(dy):
        total = torch.empty(dy.shape, dtype=dy.dtype).copy_(dy)
        dist.all_reduce(total, group=group)
        return total

    y = x * 1
    y.register_hook(summed)
    return y

def sum_over_ranks(x, group=None):
    total = x.detach().contiguous().clone()
    dist.all_reduce(total, group=group)
    return x + (total - x.detach()) if x.dtype == torch.float64 else Kept.apply(x, total)

class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value):
        return value

    @staticmethod
    def backward(ctx, dy):
        return dy, None

# %% wrong="conjugate_operators" because="float64 is summed in float32"
- total = x.clone(memory_format=torch.contiguous_format)
- dist.all_reduce(total, group=group)
- return total
+ total = x.float().clone(memory_format=torch.contiguous_format)
+ dist.all_reduce(total, group=group)
+ return total.to(x.dtype)

# %% wrong="parallel_linears" because="the bias is added on every rank before the sum"
- y = sum_over_ranks(F.linear(x, self.weight), self.group)
- return y if self.bias is None else y + self.bias
+ return sum_over_ranks(F.linear(x, self.weight, self.bias), self.group)

# %% wrong="parallel_linears" because="no f: each rank's share of the gradient of x"
- return F.linear(copy_to_ranks(x, self.group), self.weight, self.bias)
+ return F.linear(x, self.weight, self.bias)

# %% wrong="parallel_linears" because="parts are views of the whole weight"
- self.weight = nn.Parameter(linear.weight.detach().tensor_split(ranks)[rank].clone())
+ self.weight = nn.Parameter(linear.weight.detach().tensor_split(ranks)[rank])

# %% wrong="parallel_linears" because="chunk in place of tensor_split"
- self.weight = nn.Parameter(linear.weight.detach().tensor_split(ranks)[rank].clone())
+ self.weight = nn.Parameter(linear.weight.detach().chunk(ranks)[rank].clone())

- self.bias = nn.Parameter(linear.bias.detach().tensor_split(ranks)[rank].clone())
+ self.bias = nn.Parameter(linear.bias.detach().chunk(ranks)[rank].clone())

- self.weight = nn.Parameter(linear.weight.detach().tensor_split(ranks, dim=1)[rank].clone())
+ self.weight = nn.Parameter(linear.weight.detach().chunk(ranks, dim=1)[rank].clone())

# %% wrong="parallel_linears" because="the wrong dimension is cut"
- self.weight = nn.Parameter(linear.weight.detach().tensor_split(ranks)[rank].clone())
+ self.weight = nn.Parameter(linear.weight.detach().tensor_split(ranks, dim=1)[rank].clone())

# %% wrong="parallel_linears" because="rank and ranks of the job"
- rank, ranks = dist.get_rank(group), dist.get_world_size(group)
- self.group = group
- self.weight = nn.Parameter(linear.weight.detach().tensor_split(ranks, dim=1)[rank].clone())
+ rank, ranks = dist.get_rank(), dist.get_world_size()
+ self.group = group
+ self.weight = nn.Parameter(linear.weight.detach().tensor_split(ranks, dim=1)[rank].clone())

# %% wrong="parallel_linears" because="f before the row-parallel layer, too"
- y = sum_over_ranks(F.linear(x, self.weight), self.group)
+ y = sum_over_ranks(F.linear(copy_to_ranks(x, self.group), self.weight), self.group)

# %% wrong="parallel_linears" because="column-parallel outputs are gathered"
- return F.linear(copy_to_ranks(x, self.group), self.weight, self.bias)
+ y = F.linear(copy_to_ranks(x, self.group), self.weight, self.bias)
+ parts = [torch.empty_like(y.detach()) for _ in range(dist.get_world_size(self.group))]
+ dist.all_gather(parts, y.detach(), group=self.group)
+ parts[dist.get_rank(self.group)] = y
+ return torch.cat(parts, -1)

# %% wrong="parallel_linears" because="a bias where there was none"
- self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
+ bias = torch.zeros(linear.out_features, dtype=linear.weight.dtype)
+ self.bias = nn.Parameter(bias if linear.bias is None else linear.bias.detach().clone())

# %% wrong="parallel_linears" because="the bias divided by the ranks, each adds its share"
- y = sum_over_ranks(F.linear(x, self.weight), self.group)
- return y if self.bias is None else y + self.bias
+ share = None if self.bias is None else self.bias / dist.get_world_size(self.group)
+ return sum_over_ranks(F.linear(x, self.weight, share), self.group)

# %% right="parallel_linears" because="nn.Linear inside, autograd functions of its own"
class Front(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        dy = dy.contiguous().clone()
        dist.all_reduce(dy, group=ctx.group)
        return dy, None

class Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, dy):
        return dy, None

def cut(t, group, dim):
    r, p = dist.get_rank(group), dist.get_world_size(group)
    size, more = divmod(t.shape[dim], p)
    start = r * size + min(r, more)
    return nn.Parameter(t.detach().narrow(dim, start, size + (r < more)).contiguous().clone())

class ColumnParallelLinear(nn.Module):
    def __init__(self, linear, group=None):
        super().__init__()
        self.where = [group]
        self.weight = cut(linear.weight, group, 0)
        self.register_parameter("bias", linear.bias if linear.bias is None else cut(linear.bias, group, 0))

    def forward(self, x):
        y = Front.apply(x, self.where[0]) @ self.weight.T
        return y if self.bias is None else y + self.bias

class RowParallelLinear(nn.Module):
    def __init__(self, linear, group=None):
        super().__init__()
        self.where = [group]
        self.weight = cut(linear.weight, group, 1)
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach() + 0)

    def forward(self, x):
        y = Back.apply(x @ self.weight.mT, self.where[0])
        return y + self.bias if self.bias is not None else y

# %% wrong="parallel_cross_entropy" because="three all-reduces"
- total, at_target = sum_over_ranks(torch.stack([shifted.exp().sum(-1), at_target]), group)
+ total = sum_over_ranks(shifted.exp().sum(-1), group)
+ at_target = sum_over_ranks(at_target, group)

# %% wrong="parallel_cross_entropy" because="the maximum of the own part alone"
- dist.all_reduce(top, dist.ReduceOp.MAX, group=group)

# %% wrong="parallel_cross_entropy" because="no maximum at all"
- dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
+ top = torch.zeros_like(top)

# %% wrong="parallel_cross_entropy" because="the logits are gathered"
def parallel_cross_entropy(logits, targets, group=None, ignore_index=-100):
    parts = [torch.empty_like(logits.detach()).contiguous() for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, logits.detach().contiguous(), group=group)
    parts[dist.get_rank(group)] = logits
    whole = torch.cat(parts, -1)
    losses = F.cross_entropy(
        whole.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="none"
    )
    return losses.view(targets.shape)

# %% wrong="parallel_cross_entropy" because="the gradient is summed over the ranks"
- total, at_target = sum_over_ranks(torch.stack([shifted.exp().sum(-1), at_target]), group)
+ both = torch.stack([shifted.exp().sum(-1), at_target])
+ total, at_target = sum_over_ranks(copy_to_ranks(both, group), group)

# %% wrong="parallel_cross_entropy" because="ignored labels are not"
- return (total.log() - at_target).where(targets != ignore_index, 0.0)
+ return total.log() - at_target

# %% wrong="parallel_cross_entropy" because="ignores -100 whatever is asked for"
- own = logits.shape[-1]
+ own, ignore_index = logits.shape[-1], -100

# %% wrong="parallel_cross_entropy" because="every rank adds some logit for the target"
- at_target = shifted.gather(-1, local.where(here, 0)[..., None])[..., 0].where(here, 0.0)
+ at_target = shifted.gather(-1, local.where(here, 0)[..., None])[..., 0]

# %% wrong="parallel_cross_entropy" because="the rank in the job"
- local = targets - dist.get_rank(group) * own
+ local = targets - dist.get_rank() * own

# %% wrong="parallel_cross_entropy" because="the boundary belongs to both"
- here = (local >= 0) & (local < own) & (targets != ignore_index)
+ here = (local >= 0) & (local <= own) & (targets != ignore_index)

- at_target = shifted.gather(-1, local.where(here, 0)[..., None])[..., 0].where(here, 0.0)
+ local = local.clamp(max=own - 1)
+ at_target = shifted.gather(-1, local.where(here, 0)[..., None])[..., 0].where(here, 0.0)

# %% wrong="parallel_cross_entropy" because="logits are shifted in place"
- shifted = logits - top[..., None]
+ logits.data.sub_(top[..., None])
+ shifted = logits

# %% wrong="parallel_cross_entropy" because="the maximum is the sum's"
- dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
+ dist.all_reduce(top, group=group)

# %% right="parallel_cross_entropy" because="forward and backward written out"
class Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, t, group, ignored):
        v = z.shape[-1]
        flat = z.reshape(-1, v)
        rows = torch.arange(len(flat))
        top = flat.max(1).values
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        e = (flat - top[:, None]).exp()
        keep = t.reshape(-1) != ignored
        place = t.reshape(-1) - v * dist.get_rank(group)
        mine = keep & (place >= 0) & (place < v)
        numbers = torch.zeros(2 * len(flat), dtype=z.dtype)
        numbers[: len(flat)] = e.sum(1)
        numbers[len(flat) :][mine] = (flat - top[:, None])[rows[mine], place[mine]]
        dist.all_reduce(numbers, group=group)
        total, logit = numbers.chunk(2)
        p = e / total[:, None]
        p[rows[mine], place[mine]] -= 1
        p[~keep] = 0
        ctx.save_for_backward(p)
        ctx.shape = z.shape
        losses = total.log() - logit
        losses[~keep] = 0
        return losses.reshape(t.shape)

    @staticmethod
    def backward(ctx, dy):
        (p,) = ctx.saved_tensors
        return (p * dy.reshape(-1, 1)).reshape(ctx.shape), None, None, None

def parallel_cross_entropy(logits, targets, group=None, ignore_index=-100):
    return Loss.apply(logits, targets, group, ignore_index)

# %% wrong="sequence_operators" because="the backward of the gather is a cut"
- return summed_part(dy, ctx.dim, ctx.group), None, None
+ parts = dy.chunk(dist.get_world_size(ctx.group), ctx.dim)
+ return parts[dist.get_rank(ctx.group)].contiguous(), None, None

# %% wrong="sequence_operators" because="an all-reduce, then a cut"
- dist.reduce_scatter(mine, parts, group=group)
- return mine
+ total = torch.stack(parts)
+ dist.all_reduce(total, group=group)
+ return total[dist.get_rank(group)]

# %% wrong="sequence_operators" because="always the second axis"
- return torch.cat(parts, dim)
+ return torch.cat(parts, 1)

# %% wrong="sequence_operators" because="the job in place of the group"
- parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
- dist.all_gather(parts, x, group=group)
+ parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
+ dist.all_gather(parts, x)

# %% wrong="sequence_operators" because="the mean over ranks"
- dist.reduce_scatter(mine, parts, group=group)
- return mine
+ dist.reduce_scatter(mine, parts, group=group)
+ return mine / dist.get_world_size(group)

# %% wrong="sequence_operators" because="what is left over is dropped"
- if x.shape[dim] % dist.get_world_size(group):
-     raise ValueError(f"{x.shape[dim]} positions are not divisible by the number of ranks")

# %% wrong="sequence_operators" because="the backward of the scatter is padded with zeros"
- def backward(ctx, dy):
-     return gathered(dy, ctx.dim, ctx.group), None, None
+ def backward(ctx, dy):
+     parts = [torch.zeros_like(dy) for _ in range(dist.get_world_size(ctx.group))]
+     parts[dist.get_rank(ctx.group)] = dy
+     return torch.cat(parts, ctx.dim), None, None

# %% wrong="sequence_operators" because="everything through float32"
- return torch.cat(parts, dim)
+ return torch.cat(parts, dim).float()

# %% right="sequence_operators" because="axis moved to the front, one tensor"
class Along(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group, gather):
        ctx.how = dim, group, gather
        return (collect if gather else deal)(x, dim, group)

    @staticmethod
    def backward(ctx, dy):
        dim, group, gather = ctx.how
        return (deal if gather else collect)(dy, dim, group), None, None, None

def collect(x, dim, group):
    front = x.movedim(dim, 0).contiguous()
    out = front.new_empty(dist.get_world_size(group) * len(front), *front.shape[1:])
    dist.all_gather_single(out, front, group=group)
    return out.movedim(0, dim)

def deal(x, dim, group):
    front = x.movedim(dim, 0).contiguous()
    out = front.new_empty(len(front) // dist.get_world_size(group), *front.shape[1:])
    dist.reduce_scatter_single(out, front, group=group)
    return out.movedim(0, dim)

def gather_sequence(x, dim=1, group=None):
    return Along.apply(x, dim, group, True)

def scatter_sum(x, dim=1, group=None):
    if x.size(dim) % dist.get_world_size(group) != 0:
        raise ValueError("ranks do not divide the sequence")
    return Along.apply(x, dim, group, False)

# %% wrong="pipeline_schedule" because="GPipe under the name of 1F1B"
- if kind == "gpipe":
+ if kind in ("gpipe", "1f1b"):

# %% wrong="pipeline_schedule" because="1F1B under the name of GPipe"
- if kind == "gpipe":
-     return forward + backward

# %% wrong="pipeline_schedule" because="one micro-batch after the other"
- if kind == "gpipe":
-     return forward + backward
+ if kind == "gpipe":
+     return [step for pair in zip(forward, backward, strict=True) for step in pair]

# %% wrong="pipeline_schedule" because="one forward pass too few ahead"
- ahead = stages - 1 - rank
- if kind == "interleaved":
+ ahead = max(stages - 2 - rank, 0)
+ if kind == "interleaved":

# %% wrong="pipeline_schedule" because="one forward pass too many ahead"
- ahead = stages - 1 - rank
- if kind == "interleaved":
+ ahead = stages - rank
+ if kind == "interleaved":

# %% wrong="pipeline_schedule" because="ranks counted from the other end"
- ahead = stages - 1 - rank
- if kind == "interleaved":
+ ahead = rank
+ if kind == "interleaved":

# %% wrong="pipeline_schedule" because="all ranks work ahead alike"
- ahead = stages - 1 - rank
- if kind == "interleaved":
+ ahead = stages - 1
+ if kind == "interleaved":

# %% wrong="pipeline_schedule" because="all micro-batches through a chunk, then the next chunk"
- for begin in range(0, microbatches, stages):
-     of_round = range(begin, min(begin + stages, microbatches))
-     places += [(i, chunk) for chunk in range(chunks) for i in of_round]
+ places = [(i, chunk) for chunk in range(chunks) for i in range(microbatches)]

# %% wrong="pipeline_schedule" because="each micro-batch through all chunks, then the next"
- for begin in range(0, microbatches, stages):
-     of_round = range(begin, min(begin + stages, microbatches))
-     places += [(i, chunk) for chunk in range(chunks) for i in of_round]
+ places = [(i, chunk) for i in range(microbatches) for chunk in range(chunks)]

# %% wrong="pipeline_schedule" because="backward passes from the first chunk to the last"
- backward = [(name, i, chunks - 1 - chunk) for i, chunk in places]
+ backward = [(name, i, chunk) for i, chunk in places]

# %% wrong="pipeline_schedule" because="works ahead as if without chunks"
- if kind == "interleaved":
-     ahead = 2 * ahead + (chunks - 1) * stages

# %% wrong="pipeline_schedule" because="once the distance to the end, not twice"
- ahead = 2 * ahead + (chunks - 1) * stages
+ ahead = ahead + (chunks - 1) * stages

# %% wrong="pipeline_schedule" because="as if the ranks had all chunks ahead"
- ahead = 2 * ahead + (chunks - 1) * stages
+ ahead = 2 * ahead + chunks * stages

# %% wrong="pipeline_schedule" because="takes any number of micro-batches"
- elif microbatches % stages:
-     raise ValueError(f"{stages} stages do not divide {microbatches} micro-batches")

# %% wrong="pipeline_schedule" because="takes any kind for ZB-H1"
- if kind not in ("gpipe", "1f1b", "interleaved", "zb-h1"):
-     raise ValueError(f"kind is gpipe, 1f1b, interleaved or zb-h1, not {kind!r}")

# %% wrong="pipeline_schedule" because="each W right after its B"
-     if kind == "zb-h1" and i >= rank:
-         order.append(("W", i - rank, 0))
- if kind == "zb-h1":
-     order += [("W", i, 0) for i in range(max(microbatches - rank, 0), microbatches)]
+     if kind == "zb-h1":
+         order.append(("W", i, 0))

# %% wrong="pipeline_schedule" because="all Ws at the end"
-     if kind == "zb-h1" and i >= rank:
-         order.append(("W", i - rank, 0))
- if kind == "zb-h1":
-     order += [("W", i, 0) for i in range(max(microbatches - rank, 0), microbatches)]
+ if kind == "zb-h1":
+     order += [("W", i, 0) for i in range(microbatches)]

# %% wrong="pipeline_schedule" because="the Ws that are left are forgotten"
- if kind == "zb-h1":
-     order += [("W", i, 0) for i in range(max(microbatches - rank, 0), microbatches)]

# %% wrong="pipeline_schedule" because="the first rank puts off most"
-     if kind == "zb-h1" and i >= rank:
-         order.append(("W", i - rank, 0))
- if kind == "zb-h1":
-     order += [("W", i, 0) for i in range(max(microbatches - rank, 0), microbatches)]
+     if kind == "zb-h1" and i >= stages - 1 - rank:
+         order.append(("W", i - stages + 1 + rank, 0))
+ if kind == "zb-h1":
+     done = sum(step[0] == "W" for step in order)
+     order += [("W", i, 0) for i in range(done, microbatches)]

# %% right="pipeline_schedule" because="counters, pass by pass"
def pipeline_schedule(stages, microbatches, kind, chunks=2):
    if kind not in {"gpipe", "1f1b", "interleaved", "zb-h1"}:
        raise ValueError(kind)
    if kind == "interleaved" and microbatches % stages:
        raise ValueError("rounds are not full")
    result = []
    v = chunks if kind == "interleaved" else 1
    total = v * microbatches

    def place(k, last_first):
        if v == 1:
            return k, 0
        turn, within = divmod(k, stages * v)
        chunk, i = divmod(within, stages)
        return turn * stages + i, v - 1 - chunk if last_first else chunk

    for rank in range(stages):
        ahead = {
            "gpipe": total,
            "1f1b": stages - rank - 1,
            "zb-h1": stages - rank - 1,
            "interleaved": 2 * (stages - rank - 1) + (v - 1) * stages,
        }[kind]
        f = b = w = 0
        line = []
        while b < total:
            if f < total and f - b <= ahead:
                line.append(("F", *place(f, False)))
                f += 1
                continue
            line.append(("B" if kind == "zb-h1" else "BW", *place(b, True)))
            b += 1
            if kind == "zb-h1" and b - w > rank:
                line.append(("W", w, 0))
                w += 1
        while kind == "zb-h1" and w < total:
            line.append(("W", w, 0))
            w += 1
        result.append(line)
    return result

# %% right="pipeline_schedule" because="GPipe goes backward from the last micro-batch"
- return forward + backward
+ return forward + backward[::-1]

# %% right="pipeline_schedule" because="the last Ws as soon as no B can come"
def pipeline_schedule(stages, microbatches, kind, chunks=2):
    if kind not in ("gpipe", "1f1b", "interleaved", "zb-h1"):
        raise ValueError(f"no such kind: {kind}")
    many = range(microbatches)
    if kind == "gpipe":
        return [[(k, i, 0) for k in ("F", "BW") for i in many] for _ in range(stages)]
    if kind == "interleaved":
        if microbatches % stages:
            raise ValueError("a last round would not be full")
        forward = sorted(
            (("F", i, c) for i in many for c in range(chunks)),
            key=lambda step: (step[1] // stages, step[2], step[1]),
        )
        backward = sorted(
            (("BW", i, c) for i in many for c in range(chunks)),
            key=lambda step: (step[1] // stages, -step[2], step[1]),
        )
    else:
        forward = [("F", i, 0) for i in many]
        backward = [("B" if kind == "zb-h1" else "BW", i, 0) for i in many]
    lines = []
    for rank in range(stages):
        hops = stages - 1 - rank
        ahead = hops if kind != "interleaved" else 2 * hops + (chunks - 1) * stages
        ahead = min(ahead, len(forward))
        line = list(forward[:ahead])
        for f, b in zip(forward[ahead:], backward, strict=False):
            line += [f, b]
        line += backward[len(forward) - ahead :]
        if kind == "zb-h1":
            for i in many:
                after = ("B", min(i + rank, microbatches - 1), 0)
                behind = [k for k, step in enumerate(line) if step == after or step[0] == "W"]
                line.insert(max(line.index(after), behind[-1]) + 1, ("W", i, 0))
        lines.append(line)
    return lines

# %% wrong="run_pipeline" because="the sum over micro-batches"
- y = loss(y, targets[i]) / microbatches
+ y = loss(y, targets[i])

# %% wrong="run_pipeline" because="the loss is divided, its gradient is not"
- y = loss(y, targets[i]) / microbatches
- losses.append(y.detach())
+ y = loss(y, targets[i])
+ losses.append(y.detach() / microbatches)

# %% wrong="run_pipeline" because="divided by the ranks"
- y = loss(y, targets[i]) / microbatches
+ y = loss(y, targets[i]) / (last + 1)

# %% wrong="run_pipeline" because="the last micro-batch's loss"
- return torch.stack(losses).sum() if rank == last else None
+ return losses[-1] * microbatches if rank == last else None

# %% wrong="run_pipeline" because="a loss on every rank"
- return torch.stack(losses).sum() if rank == last else None
+ return torch.stack(losses).sum() if rank == last else torch.zeros(())

# %% wrong="run_pipeline" because="both neighbors send first"
- return dist.isend(tensor, group=group, group_dst=to), tensor  # it lives until it has left
+ dist.send(tensor, group=group, group_dst=to)
+ return dist.isend(tensor[:0], group=group, group_dst=to), tensor

# %% wrong="run_pipeline" because="neighbors in the job instead of the group"
- return dist.isend(tensor, group=group, group_dst=to), tensor  # it lives until it has left
+ return dist.isend(tensor, to), tensor

- dist.recv(tensor, group=group, group_src=source)
+ dist.recv(tensor, source)

# %% wrong="run_pipeline" because="the group is ignored"
- rank, last = dist.get_rank(group), dist.get_world_size(group) - 1
+ group = None
+ rank, last = dist.get_rank(group), dist.get_world_size(group) - 1

# %% wrong="run_pipeline" because="sends what is not contiguous"
- tensor = tensor.detach().contiguous()
+ tensor = tensor.detach()

# %% wrong="run_pipeline" because="receives into strides like the example's"
- tensor = torch.empty(shape, dtype=dtype)
+ tensor = torch.empty_like(received) if source < rank else torch.empty(shape, dtype=dtype)

# %% wrong="run_pipeline" because="receives float32"
- tensor = torch.empty(shape, dtype=dtype)
+ tensor = torch.empty(shape)

# %% wrong="run_pipeline" because="the order is GPipe's, whatever is asked for"
- for kind, i, _ in order:
-     forward(i) if kind == "F" else backward(i)
+ for i in range(microbatches):
+     forward(i)
+ for i in range(microbatches):
+     backward(i)

# %% wrong="run_pipeline" because="one micro-batch after the other"
- for kind, i, _ in order:
-     forward(i) if kind == "F" else backward(i)
+ for i in range(microbatches):
+     forward(i)
+     backward(i)

# %% wrong="run_pipeline" because="outputs are kept"
- x, y, message = live.pop(i)
+ x, y, message = live[i]

# %% wrong="run_pipeline" because="graphs are retained for good"
- x, y, message = live.pop(i)
+ x, y, message = live[i]

- if rank == last:
-     y.backward()
- else:
-     y.backward(receive(y.shape, y.dtype, rank + 1))
+ if rank == last:
+     y.backward(retain_graph=True)
+ else:
+     y.backward(receive(y.shape, y.dtype, rank + 1), retain_graph=True)

# %% wrong="run_pipeline" because="backward in the order of the forward passes"
- for kind, i, _ in order:
-     forward(i) if kind == "F" else backward(i)
+ done = 0
+ for kind, i, _ in order:
+     if kind == "F":
+         forward(i)
+     else:
+         backward(done)
+         done += 1

# %% wrong="run_pipeline" because="old gradients are thrown away"
- microbatches = sum(kind == "F" for kind, _, _ in order)
+ microbatches = sum(kind == "F" for kind, _, _ in order)
+ stage.zero_grad()

# %% wrong="run_pipeline" because="inputs get gradients"
- x = inputs[i].detach()
+ x = inputs[i]

# %% wrong="run_pipeline" because="what comes back is not used"
- y.backward(receive(y.shape, y.dtype, rank + 1))
+ y.backward(torch.ones_like(receive(y.shape, y.dtype, rank + 1)))

# %% wrong="run_pipeline" because="the mean loss with its graph"
- losses.append(y.detach())
+ losses.append(y)

# %% right="run_pipeline" because="all messages are kept, tags name micro-batches"
def run_pipeline(stage, order, inputs, targets, loss, received, group=None):
    me, ranks = dist.get_rank(group), dist.get_world_size(group)
    count = len({i for _, i, _ in order})
    graphs, works, total = {}, [], 0.0

    def post(t, to, i):
        t = t.detach().clone(memory_format=torch.contiguous_format)
        works.append((dist.isend(t, group=group, group_dst=to, tag=i), t))

    def fetch(like, source, i):
        t = like.new_empty(like.shape)
        dist.irecv(t, group=group, group_src=source, tag=i).wait()
        return t

    for kind, i, _ in order:
        if kind == "F":
            x = inputs[i].detach() if me == 0 else fetch(received, me - 1, i).requires_grad_(True)
            out = stage(x)
            if me < ranks - 1:
                post(out, me + 1, i)
            graphs[i] = x, out
            del out
        else:
            x, out = graphs.pop(i)
            if me == ranks - 1:
                value = loss(out, targets[i])
                total = total + value.detach() / count
                value.backward(torch.ones_like(value) / count)
                del value
            else:
                torch.autograd.backward(out, fetch(out, me + 1, i))
            if me > 0:
                post(x.grad, me - 1, i)
            del x, out
    for work, _ in works:
        work.wait()
    return total if me == ranks - 1 else None

# %% right="run_pipeline" because="gradients by torch.autograd.grad, added by hand"
def run_pipeline(stage, order, inputs, targets, loss, received, group=None):
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    parameters = [p for p in stage.parameters() if p.requires_grad]
    m = len(order) // 2
    kept, flying, mean = {}, [], None
    for kind, i, _ in order:
        if kind == "F":
            if rank:
                x = torch.zeros(*received.shape, dtype=received.dtype)
                dist.recv(x, group=group, group_src=rank - 1)
                x.requires_grad = True
            else:
                x = inputs[i].detach().clone()
            y = stage(x)
            if rank == ranks - 1:
                y = loss(y, targets[i])
                mean = y.detach() / m if mean is None else mean + y.detach() / m
            else:
                message = y.detach().contiguous()
                flying.append((message, dist.isend(message, group=group, group_dst=rank + 1)))
            kept[i] = x, y
        else:
            x, y = kept.pop(i)
            dy = torch.full_like(y, 1 / m) if rank == ranks - 1 else torch.zeros(y.shape, dtype=y.dtype)
            if rank < ranks - 1:
                dist.recv(dy, group=group, group_src=rank + 1)
            wanted = parameters + ([x] if rank else [])
            found = torch.autograd.grad(y, wanted, dy)
            for p, gradient in zip(parameters, found, strict=False):
                p.grad = gradient.clone() if p.grad is None else p.grad + gradient
            if rank:
                message = found[-1].contiguous()
                flying.append((message, dist.isend(message, group=group, group_dst=rank - 1)))
    for _, work in flying:
        work.wait()
    return mean

# %% wrong="exchange" because="everything is gathered on every rank"
def exchange(rows, counts, group=None):
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if len(counts) != ranks or sum(counts) != len(rows):
        raise ValueError("counts")
    sizes = torch.empty(ranks, ranks, dtype=torch.int64)
    dist.all_gather(list(sizes), torch.tensor(counts), group=group)
    most = int(sizes.sum(1).max())
    padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
    all_rows = gather_sequence(padded, 0, group).chunk(ranks)
    parts = []
    for s in range(ranks):
        start = int(sizes[s, :rank].sum())
        parts.append(all_rows[s][start : start + int(sizes[s, rank])])
    return torch.cat(parts), sizes[:, rank].tolist()

# %% wrong="exchange" because="even splits are assumed"
- received_counts = received_sizes.tolist()
+ received_counts = counts

# %% wrong="exchange" because="backward with the sizes of the forward pass"
- ctx.way = take, give, group
+ ctx.way = give, take, group

# %% wrong="exchange" because="no gradient"
- return _Exchange.apply(rows, counts, received_counts, group), received_counts
+ return moved(rows.detach(), counts, received_counts, group), received_counts

# %% wrong="exchange" because="the job in place of the group"
- dist.all_to_all_single(received, rows.contiguous(), take, give, group=group)
+ dist.all_to_all_single(received, rows.contiguous(), take, give)

# %% wrong="exchange" because="nothing is checked"
- if len(counts) != dist.get_world_size(group) or sum(counts) != len(rows):
-     raise ValueError(f"counts {counts} do not divide {len(rows)} rows among the ranks")

# %% wrong="exchange" because="returns the sizes that were sent"
- return _Exchange.apply(rows, counts, received_counts, group), received_counts
+ return _Exchange.apply(rows, counts, received_counts, group), counts

# %% right="exchange" because="messages between pairs"
def swap(rows, give, take, group):
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    out = [part.contiguous() for part in rows.detach().split(give)]
    into = [rows.detach().new_empty(n, *rows.shape[1:]) for n in take]
    into[rank] = out[rank].clone()
    work = []
    for other in range(ranks):
        if other != rank:
            work.append(dist.isend(out[other], group=group, group_dst=other))
            work.append(dist.irecv(into[other], group=group, group_src=other))
    for each in work:
        each.wait()
    return torch.cat(into)

class Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, give, take, group):
        ctx.how = give, take, group
        return swap(rows, give, take, group)

    @staticmethod
    def backward(ctx, dy):
        give, take, group = ctx.how
        return swap(dy, take, give, group), None, None, None

def exchange(rows, counts, group=None):
    ranks = dist.get_world_size(group)
    if ranks != len(counts) or rows.shape[0] != sum(counts):
        raise ValueError("these counts do not fit")
    table = [torch.empty(ranks, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(table, torch.tensor(counts), group=group)
    take = [int(line[dist.get_rank(group)]) for line in table]
    return Swap.apply(rows, list(counts), take, group), take

# %% wrong="exchange" because="an expanded gradient is sent as it lies"
- return moved(gradient, *ctx.way), None, None, None
+ give, take, group = ctx.way
+ received = gradient.new_empty(sum(take), *gradient.shape[1:])
+ dist.all_to_all_single(received, gradient, take, give, group=group)
+ return received, None, None, None

# %% wrong="ulysses_attention" because="keys and values are gathered"
def ulysses_attention(q, k, v, attend, group=None):
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if q.shape[1] % ranks:
        raise ValueError("heads")
    q, k, v = (gather_sequence(x, 2, group) for x in (q, k, v))
    out = attend(*(x.chunk(ranks, 1)[rank] for x in (q, k, v)))
    return gather_sequence(out, 1, group).chunk(ranks, 2)[rank]

# %% wrong="ulysses_attention" because="heads are dealt out in turn"
- rows = x.unflatten(1, (ranks, -1)).permute(1, 3, 0, 2, 4).flatten(0, 1)
+ rows = x.unflatten(1, (-1, ranks)).permute(2, 3, 0, 1, 4).flatten(0, 1)

# %% wrong="ulysses_attention" because="equal parts of the sequence are assumed"
- received, _ = exchange(rows, lengths, group)
+ received, _ = exchange(rows, [len(rows) // ranks] * ranks, group)

# %% wrong="ulysses_attention" because="KV heads must be divisible"
- if k.shape[1] % ranks:
-     k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))

# %% wrong="ulysses_attention" because="KV heads are repeated as a whole, not each"
- k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
+ k, v = (x.repeat(1, heads // k.shape[1], 1, 1) for x in (k, v))

# %% wrong="ulysses_attention" because="attention within the own part"
def ulysses_attention(q, k, v, attend, group=None):
    if q.shape[1] % dist.get_world_size(group):
        raise ValueError("heads")
    return attend(q, k, v)

# %% wrong="ulysses_attention" because="the ranks' parts of the heads come back as tokens"
- return received.unflatten(0, (ranks, own)).permute(2, 0, 3, 1, 4).flatten(1, 2)
+ return received.unflatten(0, (own, ranks)).permute(2, 1, 3, 0, 4).flatten(1, 2)

# %% wrong="ulysses_attention" because="no error for heads that cannot be divided"
- if heads % ranks:
-     raise ValueError(f"{heads} heads cannot be divided among {ranks} ranks")

# %% wrong="ulysses_attention" because="the ranks of the job"
- ranks, heads, own = dist.get_world_size(group), q.shape[1], q.shape[2]
+ ranks, heads, own = dist.get_world_size(), q.shape[1], q.shape[2]

# %% right="ulysses_attention" because="lists of rows, head group by head group"
def ulysses_attention(q, k, v, attend, group=None):
    p = dist.get_world_size(group)
    if q.size(1) % p != 0:
        raise ValueError("the number of ranks must divide the number of heads")
    if k.size(1) % p != 0:
        n = q.size(1) // k.size(1)
        k, v = torch.repeat_interleave(k, n, 1), torch.repeat_interleave(v, n, 1)
    b, h, own, d = q.shape

    def inward(x):
        rows = torch.cat([part.permute(2, 0, 1, 3).flatten(1) for part in x.chunk(p, 1)])
        got, sizes = exchange(rows, [own] * p, group)
        return got.view(-1, b, x.shape[1] // p, d).permute(1, 2, 0, 3), sizes

    parts = [inward(x) for x in (q, k, v)]
    out = attend(*(x for x, _ in parts))
    got, _ = exchange(out.permute(2, 0, 1, 3).reshape(out.shape[2], -1), parts[0][1], group)
    return torch.cat([x.view(own, b, h // p, d).permute(1, 2, 0, 3) for x in got.split([own] * p)], 1)

# %% wrong="ring_attention" because="keys and values are gathered"
def ring_attention(q, k, v, group=None, layout="contiguous"):
    rank, p = dist.get_rank(group), dist.get_world_size(group)
    own = chunks_of(rank, p, layout)
    if q.shape[2] % len(own):
        raise ValueError("odd")
    size = q.shape[2] // len(own)
    place = lambda r: torch.cat([torch.arange(i * size, (i + 1) * size) for i in chunks_of(r, p, layout)])
    k, v = (gather_sequence(x, 2, group) for x in (k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    where = torch.cat([place(r) for r in range(p)])
    mask = where <= place(rank)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

# %% wrong="ring_attention" because="all blocks are multiplied, and masked"
- if number > own:
-     continue
+ pass

- if number == own:
-     later = torch.ones_like(scores, dtype=torch.bool).triu(1)
-     scores = scores.masked_fill(later, -torch.inf)
+ if number == own:
+     later = torch.ones_like(scores, dtype=torch.bool).triu(1)
+     scores = scores.masked_fill(later, -torch.inf)
+ elif number > own:
+     scores = scores - 1e30

# %% wrong="ring_attention" because="no causal mask within a block"
- if number == own:
+ if False:

# %% wrong="ring_attention" because="the sum is not rescaled"
- total = total * shrink + weights.sum(-1, keepdim=True)
+ total = total + weights.sum(-1, keepdim=True)

# %% wrong="ring_attention" because="exponentials without a maximum"
- new = torch.maximum(top, scores.amax(-1, keepdim=True))
+ new = torch.zeros_like(top)

- x.new_full((*x.shape[:3], 1), -torch.inf),
+ x.new_zeros(*x.shape[:3], 1),

# %% wrong="ring_attention" because="blocks go the other way round"
- sending = dist.isend(block, group=group, group_dst=(rank + 1) % ranks)
- receiving = dist.irecv(coming, group=group, group_src=(rank - 1) % ranks)
+ sending = dist.isend(block, group=group, group_dst=(rank - 1) % ranks)
+ receiving = dist.irecv(coming, group=group, group_src=(rank + 1) % ranks)

# %% wrong="ring_attention" because="zigzag is taken for contiguous"
- theirs = chunks_of((rank - step) % ranks, ranks, layout)
+ if layout == "zigzag":
+     mine, queries, layout = [rank], (torch.cat(queries, 2),), "contiguous"
+     state = [[torch.cat([s[i] for s in state], 2) for i in range(3)]]
+ theirs = chunks_of((rank - step) % ranks, ranks, layout)

# %% wrong="ring_attention" because="repeated KV heads are sent"
- block = torch.stack([k, v])  # contiguous: it is sent as it is
+ k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
+ block = torch.stack([k, v])  # contiguous: it is sent as it is

# %% wrong="ring_attention" because="the scale is forgotten"
- queries = (q * q.shape[-1] ** -0.5).chunk(len(mine), dim=2)
+ queries = q.chunk(len(mine), dim=2)

# %% wrong="ring_attention" because="one turn too many"
- if step < ranks - 1:
-     coming = torch.empty_like(block)
+ if ranks > 1:
+     coming = torch.empty_like(block)

- if step < ranks - 1:
-     sending.wait(), receiving.wait()
+ if ranks > 1:
+     sending.wait(), receiving.wait()

# %% wrong="ring_attention" because="the last block is left out"
- for step in range(ranks):
+ for step in range(max(ranks - 1, 1)):

# %% wrong="ring_attention" because="rank and ranks of the job"
- rank, ranks = dist.get_rank(group), dist.get_world_size(group)
+ rank, ranks = dist.get_rank(), dist.get_world_size()

# %% right="ring_attention" because="log-sum-exp of each block, k and v sent apart"
def ring_attention(q, k, v, group=None, layout="contiguous"):
    rank, p = dist.get_rank(group), dist.get_world_size(group)
    own = chunks_of(rank, p, layout)
    if q.shape[2] % len(own) != 0:
        raise ValueError("an even number of tokens is needed")
    size, n = q.shape[2] // len(own), q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=q.dtype)[..., None]
    for step in range(p):
        theirs = chunks_of((rank - step) % p, p, layout)
        for i, a in enumerate(own):
            for j, b in enumerate(theirs):
                if b > a:
                    continue
                rows, columns = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
                scores = torch.einsum("bhqd,bhkd->bhqk", q[:, :, rows], k.repeat_interleave(n, 1)[:, :, columns])
                scores = scores / q.shape[-1] ** 0.5
                if a == b:
                    scores = scores + torch.full((size, size), -torch.inf).triu(1)
                now = scores.logsumexp(-1, keepdim=True)
                part = (scores - now).exp() @ v.repeat_interleave(n, 1)[:, :, columns]
                both = torch.logaddexp(lse[:, :, rows], now)
                out[:, :, rows] = out[:, :, rows] * (lse[:, :, rows] - both).exp() + part * (now - both).exp()
                lse[:, :, rows] = both
        if step + 1 < p:
            into = [torch.empty(x.shape, dtype=x.dtype) for x in (k, v)]
            ops = [dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=(rank + 1) % p) for x in (k, v)]
            ops += [dist.P2POp(dist.irecv, x, group=group, group_peer=(rank - 1) % p) for x in into]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            k, v = into
    return out

# %% wrong="expert_all_to_all" because="tokens of no expert go to expert 0"
- order = order[(assignment < 0).sum() :]  # tokens of no expert come first
+ assignment = assignment.clamp(min=0)

# %% wrong="expert_all_to_all" because="what arrives is not sorted by expert"
- by_expert = local.argsort(stable=True)
+ by_expert = torch.arange(len(local))

# %% wrong="expert_all_to_all" because="combine forgets the sort by expert"
- by_sender = torch.zeros_like(outputs).index_copy(0, by_expert, outputs)
+ by_sender = outputs

# %% wrong="expert_all_to_all" because="the permutation is applied again, not undone"
- by_sender = torch.zeros_like(outputs).index_copy(0, by_expert, outputs)
+ by_sender = outputs[by_expert]

# %% wrong="expert_all_to_all" because="rows come back in the order of experts"
- return back.new_zeros(len(tokens), *back.shape[1:]).index_copy(0, order, back)
+ return torch.cat([back, back.new_zeros(len(tokens) - len(back), *back.shape[1:])])

# %% wrong="expert_all_to_all" because="the outputs are taken to be as wide as the tokens"
- return back.new_zeros(len(tokens), *back.shape[1:]).index_copy(0, order, back)
+ return torch.zeros_like(tokens).index_copy(0, order, back)

# %% wrong="expert_all_to_all" because="counts only of this rank's own tokens"
- return arrived[by_expert], theirs.sum(0), combine
+ return arrived[by_expert], sizes[dist.get_rank(group)], combine

# %% wrong="expert_all_to_all" because="experts are dealt out in turn"
- sizes = chosen.long().view(ranks, -1)  # rank, its expert
+ sizes = chosen.long().view(-1, ranks).T.contiguous()  # rank, its expert

- order = assignment.argsort(stable=True)
+ order = torch.where(assignment < 0, -1, assignment % ranks * experts + assignment).argsort(stable=True)

# %% wrong="expert_all_to_all" because="the job in place of the group"
- ranks = dist.get_world_size(group)
+ group = None
+ ranks = dist.get_world_size(group)

# %% wrong="expert_all_to_all" because="an expert with nothing has no count"
- return arrived[by_expert], theirs.sum(0), combine
+ return arrived[by_expert], local.unique(return_counts=True)[1], combine

# %% wrong="expert_all_to_all" because="no gradient through combine"
- back, _ = exchange(by_sender, senders, group)
+ back, _ = exchange(by_sender.detach(), senders, group)

# %% wrong="expert_all_to_all" because="any number of experts"
- if experts % ranks:
-     raise ValueError(f"{experts} experts cannot be divided among {ranks} ranks")
+ experts += -experts % ranks

# %% right="expert_all_to_all" because="each expert's tokens collected by masks, numbers sent along"
def expert_all_to_all(tokens, assignment, experts, group=None):
    p = dist.get_world_size(group)
    if experts % p != 0:
        raise ValueError("experts")
    each = experts // p
    places = [(assignment == e).nonzero().flatten() for e in range(experts)]
    order = torch.cat(places)
    sizes = [sum(len(places[e]) for e in range(r * each, (r + 1) * each)) for r in range(p)]
    got, came = exchange(tokens.index_select(0, order), sizes, group)
    names, _ = exchange(assignment[order], sizes, group)
    sorting = sorted(range(len(names)), key=lambda i: int(names[i]))
    sorting = torch.tensor(sorting, dtype=torch.int64)
    inverse = torch.empty_like(sorting)
    inverse[sorting] = torch.arange(len(sorting))
    first = dist.get_rank(group) * each
    counts = torch.tensor([int((names == first + e).sum()) for e in range(each)])

    def combine(outputs):
        back, _ = exchange(outputs[inverse], came, group)
        result = torch.zeros(len(tokens), outputs.shape[1], dtype=outputs.dtype)
        return result.index_add(0, order, back)

    return got[sorting], counts, combine

# %% wrong="step_costs" because="two all-reduces a layer"
- "tp": micro * here * 4 * 2 * (tp - 1) / tp * 2 * numbers,
+ "tp": micro * here * 2 * 2 * (tp - 1) / tp * 2 * numbers,

# %% wrong="step_costs" because="all layers' all-reduces"
- "tp": micro * here * 4 * 2 * (tp - 1) / tp * 2 * numbers,
+ "tp": micro * job.layers * 4 * 2 * (tp - 1) / tp * 2 * numbers,

# %% wrong="step_costs" because="parameters are cut by tp alone"
- params = 12 * job.layers * job.width**2 / (tp * pp)
+ params = 12 * job.layers * job.width**2 / tp

# %% wrong="step_costs" because="all micro-batches are alive"
- "memory": 16 * params + min(micro, pp) * here * 34 * numbers / tp,
+ "memory": 16 * params + micro * here * 34 * numbers / tp,

# %% wrong="step_costs" because="one micro-batch is alive"
- "memory": 16 * params + min(micro, pp) * here * 34 * numbers / tp,
+ "memory": 16 * params + here * 34 * numbers / tp,

# %% wrong="step_costs" because="always pp micro-batches are alive"
- "memory": 16 * params + min(micro, pp) * here * 34 * numbers / tp,
+ "memory": 16 * params + pp * here * 34 * numbers / tp,

# %% wrong="step_costs" because="the bubble's share of the total"
- "bubble": (pp - 1) / micro,
+ "bubble": (pp - 1) / (micro + pp - 1),

# %% wrong="step_costs" because="a single stage sends, too"
- "pp": micro * 2 * 2 * numbers / tp if pp > 1 else 0.0,
+ "pp": micro * 2 * 2 * numbers / tp,

# %% wrong="step_costs" because="whole activations between stages"
- "pp": micro * 2 * 2 * numbers / tp if pp > 1 else 0.0,
+ "pp": micro * 2 * 2 * numbers if pp > 1 else 0.0,

# %% wrong="step_costs" because="gradients in float32"
- "dp": 2 * (dp - 1) / dp * 2 * params,
+ "dp": 2 * (dp - 1) / dp * 4 * params,

# %% wrong="step_costs" because="slow inside a node, too"
- slow = job.slow if dp * tp * pp > job.node else 1.0
+ slow = job.slow

# %% wrong="step_costs" because="slow from a full node on"
- slow = job.slow if dp * tp * pp > job.node else 1.0
+ slow = job.slow if dp * tp * pp >= job.node else 1.0

# %% wrong="step_costs" because="bytes are not weighted"
- slow = job.slow if dp * tp * pp > job.node else 1.0
+ slow = 1.0

# %% right="step_costs" because="step by step, in other units"
def step_costs(job, dp, tp, pp):
    activation = 2.0 * job.seq * job.width
    count = job.batch // dp
    layers = job.layers // pp
    weights = 12 * layers * job.width * job.width / tp

    def all_reduce(size, ranks):
        return 2 * size - 2 * size / ranks

    memory = 16 * weights + 17 * activation / tp * layers * (pp if pp < count else count)
    of_tp = 4 * layers * count * all_reduce(activation, tp)
    of_dp = all_reduce(2 * weights, dp)
    of_pp = 0
    if pp > 1:
        of_pp = 2 * count * activation / tp
    between = of_dp + of_pp
    if dp * tp * pp > job.node:
        between *= job.slow
    return {
        "memory": memory,
        "bubble": (pp - 1) / count,
        "tp": of_tp,
        "pp": of_pp,
        "dp": of_dp,
        "weighted": between + of_tp,
    }

# %% wrong="plan_parallelism" because="the first that fits"
- best, least = (dp, tp, pp), costs["weighted"]
+ return dp, tp, pp

# %% wrong="plan_parallelism" because="the most that is sent"
- best, least = None, float("inf")
+ best, least = None, -1.0

- if costs["weighted"] < least:
+ if costs["weighted"] > least:

# %% wrong="plan_parallelism" because="memory does not count"
- if costs["memory"] > memory or costs["bubble"] > config.bubble:
+ if costs["bubble"] > config.bubble:

# %% wrong="plan_parallelism" because="the bubble does not count"
- if costs["memory"] > memory or costs["bubble"] > config.bubble:
+ if costs["memory"] > memory:

# %% wrong="plan_parallelism" because="the bubble has to be smaller than allowed"
- if costs["memory"] > memory or costs["bubble"] > config.bubble:
+ if costs["memory"] > memory or costs["bubble"] >= config.bubble:

# %% wrong="plan_parallelism" because="fewer GPUs are fine"
- if rest or config.heads % tp or config.node % tp:
+ if config.heads % tp or config.node % tp:

# %% wrong="plan_parallelism" because="heads are not asked"
- if rest or config.heads % tp or config.node % tp:
+ if rest or config.node % tp:

# %% wrong="plan_parallelism" because="layers are not asked"
- if not dp or config.layers % pp or config.batch % dp:
+ if not dp or config.batch % dp:

# %% wrong="plan_parallelism" because="the batch is not asked"
- if not dp or config.layers % pp or config.batch % dp:
+ if not dp or config.layers % pp:

# %% wrong="plan_parallelism" because="across nodes"
- for tp in range(1, config.node + 1):
+ for tp in range(1, gpus + 1):

- if rest or config.heads % tp or config.node % tp:
+ if rest or config.heads % tp:

# %% wrong="plan_parallelism" because="bytes without their weight"
- if costs["weighted"] < least:
-     best, least = (dp, tp, pp), costs["weighted"]
+ sent = costs["tp"] + costs["pp"] + costs["dp"]
+ if sent < least:
+     best, least = (dp, tp, pp), sent

# %% wrong="plan_parallelism" because="None where nothing fits"
- if best is None:
-     raise ValueError(f"no dp · tp · pp = {gpus} fits into {memory:.3g} bytes a GPU")

# %% wrong="plan_parallelism" because="tp, pp, dp"
- best, least = (dp, tp, pp), costs["weighted"]
+ best, least = (tp, pp, dp), costs["weighted"]

# %% wrong="plan_parallelism" because="powers of two alone"
- if rest or config.heads % tp or config.node % tp:
+ if rest or config.heads % tp or config.node % tp or pp & (pp - 1):

# %% right="plan_parallelism" because="a list of all, then the least"
def plan_parallelism(config, gpus, memory):
    found = []
    for dp in range(1, min(gpus, config.batch) + 1):
        for tp in range(1, config.node + 1):
            pp = gpus // (dp * tp)
            if pp == 0 or dp * tp * pp != gpus:
                continue
            if config.batch % dp or config.heads % tp or config.node % tp or config.layers % pp:
                continue
            costs = step_costs(config, dp, tp, pp)
            if costs["memory"] <= memory and costs["bubble"] <= config.bubble:
                found.append((costs["weighted"], (dp, tp, pp)))
    if not found:
        raise ValueError("nothing fits")
    return min(found)[1]

# %% wrong="plan_parallelism" because="tp is at most node, and need not divide it"
def plan_parallelism(config: Job, gpus: int, memory: float) -> tuple[int, int, int]:
    best, least = None, float("inf")
    for tp in range(1, config.node + 1):
        if config.heads % tp or gpus % tp:
            continue
        for pp in range(1, config.layers + 1):
            if config.layers % pp or gpus % (tp * pp):
                continue
            dp = gpus // (tp * pp)
            if config.batch % dp:
                continue
            costs = step_costs(config, dp, tp, pp)
            if costs["memory"] > memory or costs["bubble"] > config.bubble:
                continue
            if costs["weighted"] < least:
                best, least = (dp, tp, pp), costs["weighted"]
    if best is None:
        raise ValueError("nothing fits")
    return best

# %% wrong="questions" because="half of it"
- "reduces": 4 * 32,
- "wire": 2 * 7 / 8 * 4096 * 8192 * 2 / 1e6,
+ "reduces": 2 * 32,
+ "wire": 7 / 8 * 4096 * 8192 * 2 / 1e6,

# %% wrong="questions" because="against half of the ranks; nothing for the norm"
- "zigzag": 8 / 4.5,
- "norm": "b",
+ "zigzag": 2.0,
+ "norm": "a",

# %% wrong="questions" because="the share of the ideal time"
- "bubble": 7 / (32 + 7),
+ "bubble": 7 / 32,

# %% wrong="questions" because="as without chunks"
- "chunks": 7 / (4 * 16),
+ "chunks": 7 / 16,

# %% wrong="questions" because="the one in turn is forgotten"
- "live": 6,
+ "live": 5,

# %% wrong="questions" because="gradients are most"
- "node": "tp",
+ "node": "dp",

# %% right="questions" because="rounded"
def questions():
    numbers = {"reduces": 128, "wire": 117.4, "zigzag": 1.78, "bubble": 0.179, "chunks": 0.109, "live": 6}
    return {**numbers, "norm": "b", "node": "tp"}

# %% wrong="parallel_cross_entropy" because="log-sum plus maximum minus the target's logit: large numbers cancel"
- at_target = shifted.gather(-1, local.where(here, 0)[..., None])[..., 0].where(here, 0.0)
+ at_target = logits.gather(-1, local.where(here, 0)[..., None])[..., 0].where(here, 0.0)

- return (total.log() - at_target).where(targets != ignore_index, 0.0)
+ return (total.log() + top - at_target).where(targets != ignore_index, 0.0)

# %% wrong="parallel_cross_entropy" because="what is not the target's is multiplied by 0, a logit of -inf too"
- at_target = shifted.gather(-1, local.where(here, 0)[..., None])[..., 0].where(here, 0.0)
+ at_target = shifted.gather(-1, local.where(here, 0)[..., None])[..., 0] * here

# %% wrong="parallel_linears" because="the row-parallel bias shares the dense layer's memory"
- self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
+ self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach())
