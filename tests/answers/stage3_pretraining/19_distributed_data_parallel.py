# %% [markdown]
# Answers to lesson 19. Each cell stands in for an exercise cell, whole, or changes one.

# %% wrong="ring_all_reduce" because="the library's own all-reduce"
def ring_all_reduce(tensor, group=None):
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total

# %% wrong="ring_all_reduce" because="whole tensors go round the ring"
def ring_all_reduce(tensor, group=None):
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    total = tensor.clone(memory_format=torch.contiguous_format)
    passing = total.clone()
    for _ in range(ranks - 1):
        sending = dist.isend(passing, group=group, group_dst=(rank + 1) % ranks)
        received = torch.empty_like(passing)
        dist.recv(received, group=group, group_src=(rank - 1) % ranks)
        sending.wait()
        total += received
        passing = received
    return total

# %% wrong="ring_all_reduce" because="only the reduce-scatter"
- for step in range(ranks - 1):
-     pass_on(rank + 1 - step, chunks[(rank - step) % ranks])

# %% wrong="ring_all_reduce" because="the input is the working copy"
- total = tensor.detach().clone(memory_format=torch.contiguous_format)
+ total = tensor.contiguous()

# %% wrong="ring_all_reduce" because="chunk in place of tensor_split"
- chunks = total.view(-1).tensor_split(ranks)
+ chunks = total.view(-1).chunk(ranks)

# %% wrong="ring_all_reduce" because="neighbors in the job instead of the group"
- sending = dist.isend(chunks[give % ranks], group=group, group_dst=(rank + 1) % ranks)
- dist.recv(into, group=group, group_src=(rank - 1) % ranks)
+ sending = dist.isend(chunks[give % ranks], (dist.get_rank() + 1) % ranks)
+ dist.recv(into, (dist.get_rank() - 1) % ranks)

# %% wrong="ring_all_reduce" because="the group is ignored"
- rank, ranks = dist.get_rank(group), dist.get_world_size(group)
+ group = None
+ rank, ranks = dist.get_rank(group), dist.get_world_size(group)

# %% wrong="ring_all_reduce" because="the mean"
- return total
+ return total / ranks

# %% wrong="ring_all_reduce" because="everything through float32"
- total = tensor.detach().clone(memory_format=torch.contiguous_format)
+ total = tensor.detach().float().clone(memory_format=torch.contiguous_format)

# %% wrong="ring_all_reduce" because="adds the chunk that it has just sent"
- chunk = chunks[(rank - step - 1) % ranks]
+ chunk = chunks[(rank - step) % ranks]

# %% wrong="ring_all_reduce" because="everybody sends before anybody receives"
- sending = dist.isend(chunks[give % ranks], group=group, group_dst=(rank + 1) % ranks)
- dist.recv(into, group=group, group_src=(rank - 1) % ranks)
- sending.wait()
+ dist.send(chunks[give % ranks], group=group, group_dst=(rank + 1) % ranks)
+ dist.recv(into, group=group, group_src=(rank - 1) % ranks)

# %% wrong="ring_all_reduce" because="each rank adds up in its own order"
def ring_all_reduce(tensor, group=None):
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    total = tensor.clone(memory_format=torch.contiguous_format)
    passing = total
    for _ in range(ranks - 1):
        sending = dist.isend(passing.clone(), group=group, group_dst=(rank + 1) % ranks)
        passing = torch.empty_like(total)
        dist.recv(passing, group=group, group_src=(rank - 1) % ranks)
        sending.wait()
        total = total + passing
    return total

# %% wrong="ring_all_reduce" because="returned flat"
- return total
+ return total.flatten()

# %% wrong="ring_all_reduce" because="the tensor's own strides in the result"
- return total
+ return torch.empty_like(tensor).copy_(total)

# %% wrong="ring_all_reduce" because="a single rank gets its tensor itself"
- rank, ranks = dist.get_rank(group), dist.get_world_size(group)
+ rank, ranks = dist.get_rank(group), dist.get_world_size(group)
+ if ranks == 1:
+     return tensor

# %% wrong="ring_all_reduce" because="a ring wants two ranks"
- rank, ranks = dist.get_rank(group), dist.get_world_size(group)
+ rank, ranks = dist.get_rank(group), dist.get_world_size(group)
+ if ranks < 2:
+     raise ValueError("a ring of one")

# %% right="ring_all_reduce" because="batched messages, chunk r complete on rank r"
def ring_all_reduce(tensor, group=None):
    me, p = dist.get_rank(group), dist.get_world_size(group)
    result = tensor.contiguous().clone()
    pieces = torch.tensor_split(result.reshape(-1), p)

    def exchange(out, into):
        work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, pieces[out % p], group=group, group_peer=(me + 1) % p),
                dist.P2POp(dist.irecv, into, group=group, group_peer=(me - 1) % p),
            ]
        )
        for each in work:
            each.wait()

    for s in range(1, p):
        box = torch.empty_like(pieces[(me - s - 1) % p])
        exchange(me - s, box)
        pieces[(me - s - 1) % p].add_(box)
    for s in range(p - 1):
        exchange(me - s, pieces[(me - s - 1) % p])
    return result

# %% right="ring_all_reduce" because="even ranks send first, odd ones receive first"
def ring_all_reduce(tensor, group=None):
    members = dist.get_process_group_ranks(group)
    me, p = dist.get_rank(group), len(members)
    result = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    pieces = list(result.view(-1).tensor_split(p))
    left, right = members[me - 1], members[(me + 1) % p]

    def exchange(out, into):
        if p > 1 and me == 0:
            dist.send(out, right, group=group)
            dist.recv(into, left, group=group)
        elif p > 1:
            dist.recv(into, left, group=group)
            dist.send(out, right, group=group)

    for s in range(p - 1):
        target = pieces[(me - s - 1) % p]
        box = torch.zeros_like(target)
        exchange(pieces[(me - s) % p], box)
        target.copy_(target + box)
    for s in range(p - 1):
        box = torch.zeros_like(pieces[(me - s) % p])
        exchange(pieces[(me - s + 1) % p], box)
        pieces[(me - s) % p].copy_(box)
    return result

# %% wrong="communication_time" because="the whole tensor in each step of the ring"
- return 2 * (ranks - 1) * (latency + size / ranks / bandwidth)
+ return 2 * (ranks - 1) * (latency + size / bandwidth)

# %% wrong="communication_time" because="one latency for the ring"
- return 2 * (ranks - 1) * (latency + size / ranks / bandwidth)
+ return latency + 2 * (ranks - 1) * size / ranks / bandwidth

# %% wrong="communication_time" because="half of the ring"
- return 2 * (ranks - 1) * (latency + size / ranks / bandwidth)
+ return (ranks - 1) * (latency + size / ranks / bandwidth)

# %% wrong="communication_time" because="a tree's rounds are not rounded up"
- messages = math.ceil(math.log2(ranks)) if algorithm == "tree" else ranks - 1
+ messages = math.log2(ranks) if algorithm == "tree" else ranks - 1

# %% wrong="communication_time" because="a tree's rounds are rounded down"
- messages = math.ceil(math.log2(ranks)) if algorithm == "tree" else ranks - 1
+ messages = ranks.bit_length() - 1 if algorithm == "tree" else ranks - 1

# %% wrong="communication_time" because="whatever is not ring or tree is a star"
- if algorithm not in ("tree", "star"):
-     raise ValueError(f"algorithm is ring, tree or star, not {algorithm!r}")

# %% wrong="communication_time" because="rank 0 sends to itself, too"
- messages = math.ceil(math.log2(ranks)) if algorithm == "tree" else ranks - 1
+ messages = math.ceil(math.log2(ranks)) if algorithm == "tree" else ranks

# %% wrong="communication_time" because="the algorithm is ignored"
- if algorithm == "ring":
+ if algorithm in ("ring", "tree", "star"):

# %% wrong="communication_time" because="an empty tensor costs nothing"
- if algorithm == "ring":
+ if not size:
+     return 0.0
+ if algorithm == "ring":

# %% right="communication_time" because="a table of (messages, bytes)"
def communication_time(size, ranks, latency, bandwidth, algorithm="ring"):
    plans = {
        "ring": (ranks - 1, size / ranks),
        "tree": ((ranks - 1).bit_length(), size),
        "star": (ranks - 1, size),
    }
    try:
        rounds, message = plans[algorithm]
    except KeyError:
        raise ValueError(algorithm) from None
    return 2.0 * rounds * latency + 2.0 * rounds * message / bandwidth

# %% right="communication_time" because="rounds counted in a loop"
def communication_time(size, ranks, latency, bandwidth, algorithm="ring"):
    if algorithm == "tree":
        rounds = 0
        while 2**rounds < ranks:
            rounds += 1
        steps = [size] * (2 * rounds)
    elif algorithm == "star":
        steps = [size] * (2 * ranks - 2)
    elif algorithm == "ring":
        steps = [size / ranks] * (2 * ranks - 2)
    else:
        raise ValueError("no such algorithm")
    return sum(latency + step / bandwidth for step in steps)

# %% wrong="global_mean_loss" because="the rank's own mean"
def global_mean_loss(logits, targets, ignore_index=-100):
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index)

# %% wrong="global_mean_loss" because="forgets that gradients are averaged"
- return losses * dist.get_world_size() / labels.clamp(min=1)
+ return losses / labels.clamp(min=1)

# %% wrong="global_mean_loss" because="counts ignored positions"
- labels = (targets != ignore_index).sum()
+ labels = torch.tensor(targets.numel())

# %% wrong="global_mean_loss" because="ignores -100 whatever is asked for"
- logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="sum"
+ logits.flatten(0, -2), targets.flatten(), reduction="sum"

# %% wrong="global_mean_loss" because="0/0 where nobody has a label"
- return losses * dist.get_world_size() / labels.clamp(min=1)
+ return losses * dist.get_world_size() / labels

# %% wrong="global_mean_loss" because="the number of labels is not summed over ranks"
- dist.all_reduce(labels)

# %% wrong="global_mean_loss" because="a rank without labels leaves before the others count"
- labels = (targets != ignore_index).sum()
+ labels = (targets != ignore_index).sum()
+ if not labels:
+     return logits.sum() * 0

# %% wrong="global_mean_loss" because="a constant where there are no labels"
- return losses * dist.get_world_size() / labels.clamp(min=1)
+ if not (targets != ignore_index).any():
+     return torch.zeros((), dtype=logits.dtype)
+ return losses * dist.get_world_size() / labels.clamp(min=1)

# %% wrong="global_mean_loss" because="the factor in float32"
- return losses * dist.get_world_size() / labels.clamp(min=1)
+ return losses * (dist.get_world_size() / labels.clamp(min=1))

# %% wrong="global_mean_loss" because="the value is all-reduced, so its gradient is this rank's"
- return losses * dist.get_world_size() / labels.clamp(min=1)
+ total = losses.detach().clone()
+ dist.all_reduce(total)
+ return losses / labels.clamp(min=1) + (total - losses.detach()) / labels.clamp(min=1)

# %% wrong="global_mean_loss" because="a single rank is refused"
- labels = (targets != ignore_index).sum()
+ if dist.get_world_size() == 1:
+     raise ValueError("nothing to share")
+ labels = (targets != ignore_index).sum()

# %% right="global_mean_loss" because="own mean, weighted by the share of labels"
def global_mean_loss(logits, targets, ignore_index=-100):
    keep = targets != ignore_index
    counts = all_gather(keep.sum()[None])
    own = F.cross_entropy(logits[keep], targets[keep]) if keep.any() else logits.sum() * 0
    return own * int(keep.sum()) * len(counts) / max(int(counts.sum()), 1)

# %% right="global_mean_loss" because="log-softmax and a mask"
def global_mean_loss(logits, targets, ignore_index=-100):
    keep = targets.ne(ignore_index)
    number = keep.sum().double()
    dist.all_reduce(number)
    logp = logits.log_softmax(-1).gather(-1, targets.masked_fill(~keep, 0)[..., None])[..., 0]
    scale = dist.get_world_size() / max(number.item(), 1.0)
    return -torch.where(keep, logp, 0.0).sum() * scale

# %% wrong="make_buckets" because="from the first to the last"
- for i in reversed(range(len(parameters))):
+ for i in range(len(parameters)):

# %% wrong="make_buckets" because="counts elements"
- size = p.numel() * p.element_size()
+ size = p.numel()

# %% wrong="make_buckets" because="takes every number for four bytes"
- size = p.numel() * p.element_size()
+ size = p.numel() * 4

# %% wrong="make_buckets" because="ends a bucket once it is over the limit"
- if not buckets or size > room or p.dtype != dtype:
+ if not buckets or room < 0 or p.dtype != dtype:

# %% wrong="make_buckets" because="a bucket that is exactly full is one too many"
- if not buckets or size > room or p.dtype != dtype:
+ if not buckets or size >= room or p.dtype != dtype:

# %% wrong="make_buckets" because="frozen parameters, too"
- if not p.requires_grad:
-     continue

# %% wrong="make_buckets" because="mixes dtypes"
- if not buckets or size > room or p.dtype != dtype:
+ if not buckets or size > room:

# %% wrong="make_buckets" because="an empty bucket before a large parameter"
- buckets: list[list[int]] = []
- room, dtype = 0, None
+ buckets: list[list[int]] = [[]]
+ room, dtype = limit, parameters[-1].dtype if parameters else None

# %% wrong="make_buckets" because="indices among the trained parameters only"
- for i in reversed(range(len(parameters))):
+ parameters = [p for p in parameters if p.requires_grad]
+ for i in reversed(range(len(parameters))):

# %% right="make_buckets" because="a list that is closed and handed over"
def make_buckets(parameters, limit):
    done, now, used = [], [], 0
    for i, p in reversed(list(enumerate(parameters))):
        if p.requires_grad:
            if now and (used + p.nbytes > limit or parameters[now[0]].dtype != p.dtype):
                done.append(now)
                now, used = [], 0
            now.append(i)
            used += p.nbytes
    return done + [now] if now else done

# %% right="make_buckets" because="recursion over what is left"
def make_buckets(parameters, limit):
    left = [i for i, p in enumerate(parameters) if p.requires_grad]
    buckets = []
    while left:
        bucket = [left.pop()]
        size = parameters[bucket[0]].nbytes
        while left and parameters[left[-1]].dtype == parameters[bucket[0]].dtype:
            size += parameters[left[-1]].nbytes
            if size > limit:
                break
            bucket.append(left.pop())
        buckets.append(bucket)
    return buckets

# %% wrong="data_parallel" because="the sum of the gradients"
- p.grad = part.view_as(p) / dist.get_world_size()
+ p.grad = part.view_as(p)

# %% wrong="data_parallel" because="the mean over those ranks that have a gradient"
- p.grad = part.view_as(p) / dist.get_world_size()
+ p.grad = part.view_as(p) / count

# %% wrong="data_parallel" because="each rank begins with its own parameters"
- with torch.no_grad():
-     for tensor in [*module.parameters(), *module.buffers()]:
-         dist.broadcast(tensor, 0)

# %% wrong="data_parallel" because="buffers are forgotten"
- for tensor in [*module.parameters(), *module.buffers()]:
+ for tensor in module.parameters():

# %% wrong="data_parallel" because="only trained parameters are broadcast"
- for tensor in [*module.parameters(), *module.buffers()]:
+ for tensor in [*(p for p in module.parameters() if p.requires_grad), *module.buffers()]:

# %% wrong="data_parallel" because="every hook counts for the last bucket"
- p.register_post_accumulate_grad_hook(lambda p, number=number: self.ready(number))
+ p.register_post_accumulate_grad_hook(lambda p: self.ready(number))

# %% wrong="data_parallel" because="waits only for what was started"
- while len(self.started) < len(self.buckets):
-     self.start()
- for bucket, (flat, work) in zip(self.buckets, self.started, strict=True):
+ for bucket, (flat, work) in zip(self.buckets, self.started, strict=False):

# %% wrong="data_parallel" because="zeros where nobody has a gradient"
- if count:
-     p.grad = part.view_as(p) / dist.get_world_size()
+ p.grad = part.view_as(p) / dist.get_world_size()

# %% wrong="data_parallel" because="a missing gradient stays missing on its rank"
- if count:
+ if p.grad is not None:

# %% wrong="data_parallel" because="nothing is reset after a step"
- self.missing = [len(bucket) for bucket in self.buckets]
- self.started.clear()
+ self.started.clear()

# %% wrong="data_parallel" because="everything is reduced at the end"
- self.missing[number] -= 1
- while len(self.started) < len(self.buckets) and not self.missing[len(self.started)]:
-     self.start()
+ self.missing[number] -= 1

# %% wrong="data_parallel" because="waits in the hook"
- self.started.append((flat, dist.all_reduce(flat, async_op=True)))
+ dist.all_reduce(flat)
+ done = torch.futures.Future()
+ done.set_result(None)
+ self.started.append((flat, done))

# %% wrong="data_parallel" because="one bucket whatever the limit"
- [parameters[i] for i in bucket] for bucket in make_buckets(parameters, bucket_bytes)
+ [parameters[i] for i in bucket] for bucket in make_buckets(parameters, 2**40)

# %% wrong="data_parallel" because="a message for each parameter"
- [parameters[i] for i in bucket] for bucket in make_buckets(parameters, bucket_bytes)
+ [parameters[i] for i in bucket] for bucket in make_buckets(parameters, 1)

# %% wrong="data_parallel" because="buckets leave when they are full, in any order" base="any-order"
class DataParallel(nn.Module):
    def __init__(self, module, bucket_bytes=25 * 2**20):
        super().__init__()
        self.module = module
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, 0)
        parameters = [*module.parameters()]
        self.buckets = [
            [parameters[i] for i in bucket] for bucket in make_buckets(parameters, bucket_bytes)
        ]
        self.missing = [len(bucket) for bucket in self.buckets]
        self.flying = {}
        for number, bucket in enumerate(self.buckets):
            for p in bucket:
                p.register_post_accumulate_grad_hook(lambda p, number=number: self.ready(number))

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def ready(self, number):
        self.missing[number] -= 1
        if not self.missing[number]:
            self.start(number)

    def start(self, number):
        bucket = self.buckets[number]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([part.flatten() for part in parts])
        self.flying[number] = flat, dist.all_reduce(flat, async_op=True)

    @torch.no_grad()
    def finish(self):
        used = torch.tensor([p.grad is not None for b in self.buckets for p in b]).float()
        for number in range(len(self.buckets)):
            if number not in self.flying:
                self.start(number)
        dist.all_reduce(used)
        used = iter(used.tolist())
        for number, bucket in enumerate(self.buckets):
            flat, work = self.flying.pop(number)
            work.wait()
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                if next(used):
                    p.grad = part.view_as(p) / dist.get_world_size()
        self.missing = [len(bucket) for bucket in self.buckets]

# %% right="data_parallel" because="buckets in order, and one more all-reduce says who is used" of="any-order"
  def ready(self, number):
      self.missing[number] -= 1
-     if not self.missing[number]:
-         self.start(number)
+     while len(self.flying) < len(self.buckets) and not self.missing[len(self.flying)]:
+         self.start(len(self.flying))

# %% right="data_parallel" because="gradients are written into flat buffers, by closures"
class DataParallel(nn.Module):
    def __init__(self, module, bucket_bytes=25 * 2**20):
        super().__init__()
        self.module = module
        for t in module.state_dict().values():
            dist.broadcast(t, 0)
        every = [*module.parameters()]
        self.plan = []
        for bucket in make_buckets(every, bucket_bytes):
            chosen = [every[i] for i in bucket]
            flat = chosen[0].new_zeros(sum(p.numel() for p in chosen) + len(chosen)).detach()
            self.plan.append({"parameters": chosen, "flat": flat, "left": set(bucket)})
            for i in bucket:
                every[i].register_post_accumulate_grad_hook(self.hook(i, len(self.plan) - 1))
        self.whole = [set(entry["left"]) for entry in self.plan]
        self.handles = []

    def hook(self, i, place):
        def arrived(_):
            self.plan[place]["left"].discard(i)
            self.launch_ready(False)

        return arrived

    def launch_ready(self, all_of_them):
        while len(self.handles) < len(self.plan):
            entry = self.plan[len(self.handles)]
            if entry["left"] and not all_of_them:
                return
            flat, at = entry["flat"].zero_(), 0
            for k, p in enumerate(entry["parameters"]):
                if p.grad is not None:
                    flat[at : at + p.numel()] = p.grad.reshape(-1)
                    flat[len(flat) - len(entry["parameters"]) + k] = 1
                at += p.numel()
            self.handles.append(dist.all_reduce(flat, async_op=True))

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def finish(self):
        self.launch_ready(True)
        for handle, entry, whole in zip(self.handles, self.plan, self.whole, strict=True):
            handle.wait()
            at, used = 0, entry["flat"][-len(entry["parameters"]) :]
            for k, p in enumerate(entry["parameters"]):
                if used[k] > 0:
                    mean = entry["flat"][at : at + p.numel()] / dist.get_world_size()
                    p.grad = mean.reshape(p.shape)
                at += p.numel()
            entry["left"] = set(whole)
        self.handles = []

# %% wrong="data_parallel" because="a single rank is refused"
- self.module = module
- with torch.no_grad():
+ self.module = module
+ if dist.get_world_size() == 1:
+     raise ValueError("nothing to share")
+ with torch.no_grad():

# %% wrong="data_parallel" because="a mean that is zero is taken for a missing one"
- if count:
+ if part.any():

# %% wrong="data_parallel" because="a gradient of zeros counts as missing"
- there = parts[0].new_tensor([p.grad is not None for p in bucket])
+ there = parts[0].new_tensor([bool(part.any()) for part in parts])

# %% wrong="data_parallel" because="asks for each parameter by itself whether anybody has its gradient" of="any-order"
  def ready(self, number):
      self.missing[number] -= 1
-     if not self.missing[number]:
-         self.start(number)
+     while len(self.flying) < len(self.buckets) and not self.missing[len(self.flying)]:
+         self.start(len(self.flying))

- dist.all_reduce(used)
- used = iter(used.tolist())
+ for one in used:
+     dist.all_reduce(one)
+ used = iter(used.tolist())

# %% wrong="zero_memory" because="no master weights"
- for first_stage, size in ((3, 2), (2, 2), (1, 12)):  # weights, gradients, optimizer state
+ for first_stage, size in ((3, 2), (2, 2), (1, 8)):

# %% wrong="zero_memory" because="float32 gradients"
- for first_stage, size in ((3, 2), (2, 2), (1, 12)):  # weights, gradients, optimizer state
+ for first_stage, size in ((3, 2), (2, 4), (1, 12)):

# %% wrong="zero_memory" because="weights before gradients"
- for first_stage, size in ((3, 2), (2, 2), (1, 12)):  # weights, gradients, optimizer state
+ for first_stage, size in ((2, 2), (2, 2), (1, 12)):

# %% wrong="zero_memory" because="GiB"
- return parameters * per_parameter
+ return parameters * per_parameter / 2**30

# %% wrong="zero_memory" because="stage 4 is as stage 3"
- if stage not in (0, 1, 2, 3):
-     raise ValueError(f"stage is 0, 1, 2 or 3, not {stage!r}")

# %% right="zero_memory" because="four formulas"
def zero_memory(parameters, ranks, stage):
    if not 0 <= stage <= 3:
        raise ValueError("no such stage")
    return parameters * [16, 4 + 12 / ranks, 2 + 14 / ranks, 16 / ranks][stage]

# %% right="zero_memory" because="shared minus saved"
def zero_memory(parameters, ranks, stage):
    cut = {0: 0, 1: 12, 2: 14, 3: 16}
    if stage not in cut:
        raise ValueError(stage)
    return parameters * (16 - cut[stage]) + parameters * cut[stage] / ranks

# %% wrong="zero_optimizer" because="the sum of the gradients"
- gradient = reduce_scatter(flatten(gradients)) / dist.get_world_size()
+ gradient = reduce_scatter(flatten(gradients))

# %% wrong="zero_optimizer" because="each rank's own gradient for its shard"
- gradient = reduce_scatter(flatten(gradients)) / dist.get_world_size()
+ gradient = own_part(flatten(gradients))

# %% wrong="zero_optimizer" because="an all-reduce, of which a part is used"
- gradient = reduce_scatter(flatten(gradients)) / dist.get_world_size()
+ whole = flatten(gradients)
+ dist.all_reduce(whole)
+ gradient = own_part(whole) / dist.get_world_size()

# %% wrong="zero_optimizer" because="moments of everything"
- self.exp_avg = torch.zeros_like(own_part(flatten(self.parameters)))
- self.exp_avg_sq = torch.zeros_like(self.exp_avg)
+ self.all_avg, self.all_sq = (torch.zeros_like(flatten(self.parameters)) for _ in range(2))
+ self.exp_avg, self.exp_avg_sq = own_part(self.all_avg), own_part(self.all_sq)

# %% wrong="zero_optimizer" because="a flat copy of the parameters is kept"
- full = all_gather(shard)
+ full = self.full = all_gather(shard)

# %% wrong="zero_optimizer" because="no bias correction"
- mean = self.exp_avg / (1 - beta1**self.steps)
- root = (self.exp_avg_sq / (1 - beta2**self.steps)).sqrt() + self.eps
+ mean = self.exp_avg
+ root = self.exp_avg_sq.sqrt() + self.eps

# %% wrong="zero_optimizer" because="steps counted from zero"
- self.steps += 1
- beta1, beta2 = self.betas
+ beta1, beta2 = self.betas

- mean = self.exp_avg / (1 - beta1**self.steps)
- root = (self.exp_avg_sq / (1 - beta2**self.steps)).sqrt() + self.eps
+ mean = self.exp_avg / (1 - beta1 ** (self.steps + 1))
+ root = (self.exp_avg_sq / (1 - beta2 ** (self.steps + 1))).sqrt() + self.eps

# %% wrong="zero_optimizer" because="decay through the gradient"
- shard = own_part(flatten(self.parameters))
+ shard = own_part(flatten(self.parameters))
+ gradient = gradient + self.weight_decay * shard

- shard.mul_(1 - self.lr * self.weight_decay).sub_(self.lr * mean / root)
+ shard.sub_(self.lr * mean / root)

# %% wrong="zero_optimizer" because="decay without the learning rate"
- shard.mul_(1 - self.lr * self.weight_decay).sub_(self.lr * mean / root)
+ shard.mul_(1 - self.weight_decay).sub_(self.lr * mean / root)

# %% wrong="zero_optimizer" because="the first learning rate for ever"
- self.parameters = list(parameters)
+ self.parameters = list(parameters)
+ self.rate = lr

- shard.mul_(1 - self.lr * self.weight_decay).sub_(self.lr * mean / root)
+ shard.mul_(1 - self.rate * self.weight_decay).sub_(self.rate * mean / root)

# %% wrong="zero_optimizer" because="eps under the root"
- root = (self.exp_avg_sq / (1 - beta2**self.steps)).sqrt() + self.eps
+ root = (self.exp_avg_sq / (1 - beta2**self.steps) + self.eps).sqrt()

# %% wrong="zero_optimizer" because="parameters without a gradient are left out, so shards shift"
- gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
+ gradients = [p.grad for p in self.parameters if p.grad is not None]

# %% wrong="zero_optimizer" because="no rank hears of the others' shards"
- full = all_gather(shard)
+ full = flatten(self.parameters)
+ own_part(full).copy_(shard)

# %% wrong="zero_optimizer" because="the betas are fixed"
- beta1, beta2 = self.betas
+ beta1, beta2 = 0.9, 0.999

# %% wrong="zero_optimizer" because="a single rank is refused"
- self.parameters = list(parameters)
+ if dist.get_world_size() == 1:
+     raise ValueError("nothing to share")
+ self.parameters = list(parameters)

# %% wrong="zero_optimizer" because="walks through the parameters twice"
- self.parameters = list(parameters)
- self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
- self.exp_avg = torch.zeros_like(own_part(flatten(self.parameters)))
+ self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
+ self.exp_avg = torch.zeros_like(own_part(flatten(parameters)))
+ self.parameters = list(parameters)

# %% right="zero_optimizer" because="PyTorch's AdamW on a shard"
class ZeroOptimizer:
    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        self.everything = [*parameters]
        self.lr = lr
        self.shard = nn.Parameter(own_part(flatten(self.everything)).clone())
        self.inner = torch.optim.AdamW([self.shard], lr, betas, eps, weight_decay)

    def step(self):
        grads = flatten(torch.zeros_like(p) if p.grad is None else p.grad for p in self.everything)
        self.shard.grad = reduce_scatter(grads).div_(dist.get_world_size())
        self.inner.param_groups[0]["lr"] = self.lr
        self.inner.step()
        self.shard.grad = None
        with torch.no_grad():
            full, at = all_gather(self.shard.detach()), 0
            for p in self.everything:
                p.copy_(full[at : at + p.numel()].reshape(p.shape))
                at += p.numel()

# %% right="zero_optimizer" because="the parameters are views of one flat vector"
class ZeroOptimizer:
    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        self.ps, self.lr, self.options = list(parameters), lr, (betas, eps, weight_decay)
        self.flat, at = flatten(self.ps), 0
        for p in self.ps:
            p.data = self.flat[at : at + p.numel()].view(p.shape)
            at += p.numel()
        self.m = torch.zeros(len(self.flat) // dist.get_world_size())
        self.v, self.t = self.m.clone(), 0

    def step(self):
        (b1, b2), eps, decay = self.options
        self.t += 1
        grads = torch.zeros_like(self.flat)
        at = 0
        for p in self.ps:
            if p.grad is not None:
                grads[at : at + p.numel()] = p.grad.reshape(-1)
            at += p.numel()
        g = reduce_scatter(grads) / dist.get_world_size()
        mine = own_part(self.flat)
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        rate = self.lr * (1 - b2**self.t) ** 0.5 / (1 - b1**self.t)
        new = mine * (1 - self.lr * decay)
        new -= rate * self.m / (self.v.sqrt() + eps * (1 - b2**self.t) ** 0.5)
        self.flat.copy_(all_gather(new))

# %% wrong="assign_owners" because="round and round"
def assign_owners(sizes, ranks):
    return [i % ranks for i in range(len(sizes))]

# %% wrong="assign_owners" because="in the order of the list"
- for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
+ for i in range(len(sizes)):

# %% wrong="assign_owners" because="smallest first"
- for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
+ for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):

# %% wrong="assign_owners" because="equal ones from the end"
- for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
+ for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], -i)):

# %% wrong="assign_owners" because="the rank with the fewest matrices"
- load[owners[i]] += sizes[i]
+ load[owners[i]] += 1

# %% wrong="assign_owners" because="the highest of several ranks"
- owners[i] = load.index(min(load))
+ owners[i] = max(r for r in range(ranks) if load[r] == min(load))

# %% wrong="assign_owners" because="of equal loads the one after the last"
- for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
-     owners[i] = load.index(min(load))
+ last = -1
+ for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
+     last = owners[i] = min(range(ranks), key=lambda r: (load[r], (r - last - 1) % ranks))

# %% wrong="assign_owners" because="of equal loads the one with fewer matrices, by a heap"
def assign_owners(sizes, ranks):
    import heapq

    heap = [(0, 0, r) for r in range(ranks)]
    owners = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, count, owners[i] = heapq.heappop(heap)
        heapq.heappush(heap, (load + sizes[i], count + 1, owners[i]))
    return owners

# %% right="assign_owners" because="a heap"
def assign_owners(sizes, ranks):
    import heapq

    heap = [(0, r) for r in range(ranks)]
    owners = {}
    for size, i in sorted((-size, i) for i, size in enumerate(sizes)):
        load, r = heapq.heappop(heap)
        owners[i] = r
        heapq.heappush(heap, (load - size, r))
    return [owners[i] for i in range(len(sizes))]

# %% right="assign_owners" because="argsort and argmin"
def assign_owners(sizes, ranks):
    load = torch.zeros(ranks, dtype=torch.long)
    owners = [None] * len(sizes)
    order = torch.tensor(sizes, dtype=torch.long).argsort(descending=True, stable=True).tolist()
    for i in order:
        r = min(range(ranks), key=lambda r: (int(load[r]), r))
        owners[i] = r
        load[r] += sizes[i]
    return owners

# %% wrong="zero_muon" because="each owner uses its own gradient"
- dist.reduce(g, owner)
- if i in self.buffers:
-     g /= dist.get_world_size()
+ if i in self.buffers:

# %% right="zero_muon" because="the sum of the gradients: a direction has no length"
- g /= dist.get_world_size()
- self.buffers[i].lerp_(g, 1 - self.momentum)
+ self.buffers[i].lerp_(g, 1 - self.momentum)

# %% wrong="zero_muon" because="momentum of all matrices everywhere"
- i: torch.zeros_like(m) for i, m in enumerate(self.matrices) if self.owners[i] == rank
+ i: torch.zeros_like(m) for i, m in enumerate(self.matrices)

- if i in self.buffers:
+ if owner == dist.get_rank():

# %% wrong="zero_muon" because="owners by turns"
- self.owners = assign_owners([m.numel() for m in self.matrices], dist.get_world_size())
+ self.owners = [i % dist.get_world_size() for i in range(len(self.matrices))]

# %% wrong="zero_muon" because="no look ahead"
- direction = orthogonalize(g.lerp(self.buffers[i], self.momentum))
+ direction = orthogonalize(self.buffers[i])

# %% wrong="zero_muon" because="the momentum is not damped"
- self.buffers[i].lerp_(g, 1 - self.momentum)
+ self.buffers[i].mul_(self.momentum).add_(g)

# %% wrong="zero_muon" because="decay after the step"
- matrix.mul_(1 - self.lr * self.weight_decay)
- matrix.sub_(self.lr * 0.2 * math.sqrt(max(matrix.shape)) * direction)
+ matrix.sub_(self.lr * 0.2 * math.sqrt(max(matrix.shape)) * direction)
+ matrix.mul_(1 - self.lr * self.weight_decay)

# %% wrong="zero_muon" because="the root of the rows"
- matrix.sub_(self.lr * 0.2 * math.sqrt(max(matrix.shape)) * direction)
+ matrix.sub_(self.lr * 0.2 * math.sqrt(matrix.shape[0]) * direction)

# %% wrong="zero_muon" because="halves of matrices are orthogonalized"
def own_rows(matrix):
    return matrix.tensor_split(dist.get_world_size())[dist.get_rank()]


class ZeroMuon:
    def __init__(self, matrices, lr=0.02, momentum=0.95, weight_decay=0.0):
        self.matrices = list(matrices)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.buffers = [torch.zeros_like(own_rows(m)) for m in self.matrices]

    @torch.no_grad()
    def step(self):
        for matrix, buffer in zip(self.matrices, self.buffers, strict=True):
            g = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad.clone()
            dist.all_reduce(g)
            g = own_rows(g / dist.get_world_size())
            if len(g):
                buffer.lerp_(g, 1 - self.momentum)
                direction = orthogonalize(g.lerp(buffer, self.momentum))
                rows = own_rows(matrix)
                rows.mul_(1 - self.lr * self.weight_decay)
                rows.sub_(self.lr * 0.2 * math.sqrt(max(matrix.shape)) * direction)
            for rank, part in enumerate(matrix.tensor_split(dist.get_world_size())):
                whole = part.clone()
                dist.broadcast(whole, rank)
                part.copy_(whole)

# %% wrong="zero_muon" because="matrices without a gradient here are skipped"
- g = torch.zeros_like(matrix) if matrix.grad is None else matrix.grad.clone()
+ if matrix.grad is None:
+     continue
+ g = matrix.grad.clone()

# %% wrong="zero_muon" because="nobody gets the result"
- dist.broadcast(matrix, owner)

# %% right="zero_muon" because="all reductions first, then all broadcasts"
class ZeroMuon:
    def __init__(self, matrices, lr=0.02, momentum=0.95, weight_decay=0.0):
        self.matrices, self.lr = [*matrices], lr
        self.mu, self.decay = momentum, weight_decay
        self.owners = assign_owners([m.numel() for m in self.matrices], dist.get_world_size())
        self.state = {}

    def step(self):
        me, ranks = dist.get_rank(), dist.get_world_size()
        grads, work = [], []
        for m, owner in zip(self.matrices, self.owners, strict=True):
            grads.append(m.grad.detach().clone() if m.grad is not None else m.detach() * 0)
            work.append(dist.reduce(grads[-1], owner, async_op=True))
        for each in work:
            each.wait()
        with torch.no_grad():
            for i, m in enumerate(self.matrices):
                if self.owners[i] == me:
                    g = grads[i] / ranks
                    old = self.state.get(i, torch.zeros_like(g))
                    self.state[i] = self.mu * old + (1 - self.mu) * g
                    aim = orthogonalize((1 - self.mu) * g + self.mu * self.state[i])
                    size = 0.2 * max(m.shape) ** 0.5
                    m.copy_(m * (1 - self.lr * self.decay) - self.lr * size * aim)
            for m, owner in zip(self.matrices, self.owners, strict=True):
                dist.broadcast(m.data, owner)

# %% right="zero_muon" because="an all-reduce of all gradients in one vector"
class ZeroMuon:
    def __init__(self, matrices, lr=0.02, momentum=0.95, weight_decay=0.0):
        self.matrices = list(matrices)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        owners = assign_owners([m.numel() for m in self.matrices], dist.get_world_size())
        self.mine = [i for i, owner in enumerate(owners) if owner == dist.get_rank()]
        self.buffers = [torch.zeros_like(self.matrices[i]) for i in self.mine]

    @torch.no_grad()
    def step(self):
        sizes = [m.numel() for m in self.matrices]
        whole = flatten(torch.zeros_like(m) if m.grad is None else m.grad for m in self.matrices)
        dist.all_reduce(whole)
        whole /= dist.get_world_size()
        news = torch.zeros_like(whole)
        start = [sum(sizes[:i]) for i in range(len(sizes))]
        for i, buffer in zip(self.mine, self.buffers, strict=True):
            m = self.matrices[i]
            g = whole[start[i] : start[i] + sizes[i]].view(m.shape)
            buffer.add_((g - buffer) * (1 - self.momentum))
            aim = orthogonalize(g + self.momentum * (buffer - g))
            new = m - self.lr * self.weight_decay * m
            new -= 0.2 * self.lr * max(m.shape) ** 0.5 * aim
            news[start[i] : start[i] + sizes[i]] = new.flatten()
        for i, m in enumerate(self.matrices):
            part = news[start[i] : start[i] + sizes[i]].view(m.shape).clone()
            owners = assign_owners(sizes, dist.get_world_size())
            dist.broadcast(part, owners[i])
            m.copy_(part)

# %% wrong="zero_muon" because="a single rank is refused"
- self.matrices = list(matrices)
+ if dist.get_world_size() == 1:
+     raise ValueError("nothing to share")
+ self.matrices = list(matrices)

# %% wrong="zero_muon" because="walks through the matrices twice"
- self.matrices = list(matrices)
- self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
- self.owners = assign_owners([m.numel() for m in self.matrices], dist.get_world_size())
+ self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
+ self.owners = assign_owners([m.numel() for m in matrices], dist.get_world_size())
+ self.matrices = list(matrices)

# %% wrong="fully_sharded_linear" because="the sum over ranks"
- return dx, reduce_scatter(gradient) / dist.get_world_size(), None, None
+ return dx, reduce_scatter(gradient), None, None

# %% wrong="fully_sharded_linear" because="the gradient of x is averaged, too"
- return dx, reduce_scatter(gradient) / dist.get_world_size(), None, None
+ return dx / dist.get_world_size(), reduce_scatter(gradient) / dist.get_world_size(), None, None

# %% wrong="fully_sharded_linear" because="the bias gets no gradient"
- if ctx.has_bias:
-     gradient[size : size + ctx.shape[0]] = dy.sum(0)

# %% wrong="fully_sharded_linear" because="only this rank's gradient"
- return dx, reduce_scatter(gradient) / dist.get_world_size(), None, None
+ return dx, own_part(gradient).clone(), None, None

# %% wrong="fully_sharded_linear" because="the gathered weight is kept for the backward pass"
- ctx.save_for_backward(x, shard)
- ctx.shape, ctx.has_bias = shape, has_bias
- flat = all_gather(shard)
+ flat = ctx.flat = all_gather(shard)
+ ctx.save_for_backward(x, shard)
+ ctx.shape, ctx.has_bias = shape, has_bias

- dx = dy @ all_gather(shard)[:size].view(ctx.shape)
+ dx = dy @ ctx.flat[:size].view(ctx.shape)

# %% wrong="fully_sharded_linear" because="only the first axis is summed over"
- dy, x = dy.reshape(-1, ctx.shape[0]), x.reshape(-1, ctx.shape[1])
- torch.mm(dy.T, x, out=gradient[:size].view(ctx.shape))
+ dy, x = dy.flatten(1), x.flatten(1)
+ torch.mm(dy.T, x, out=gradient[:size].view(ctx.shape))

# %% wrong="fully_sharded_linear" because="the layer itself is kept"
- self.shape, self.has_bias = linear.weight.shape, linear.bias is not None
+ self.linear = (linear,)
+ self.shape, self.has_bias = linear.weight.shape, linear.bias is not None

# %% wrong="fully_sharded_linear" because="the shard is a view that keeps everything alive"
- self.shard = nn.Parameter(own_part(flatten(parts)).clone())
+ self.shard = nn.Parameter(own_part(flatten(parts)))

# %% wrong="fully_sharded_linear" because="the bias comes first"
- parts = [p for p in (linear.weight, linear.bias) if p is not None]
+ parts = [p for p in (linear.bias, linear.weight) if p is not None]

# %% wrong="fully_sharded_linear" because="one gather for all, in sight of autograd" base="in-sight"
class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shard):
        return all_gather(shard)

    @staticmethod
    def backward(ctx, dy):
        return reduce_scatter(dy) / dist.get_world_size()


class FullyShardedLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        parts = [linear.weight] + ([] if linear.bias is None else [linear.bias])
        self.shape, self.has_bias = linear.weight.shape, linear.bias is not None
        self.shard = nn.Parameter(own_part(flatten(parts)).clone())

    def product(self, x, shard):
        flat = Gather.apply(shard)
        size = self.shape.numel()
        bias = flat[size : size + self.shape[0]] if self.has_bias else None
        return F.linear(x, flat[:size].view(self.shape), bias)

    def forward(self, x):
        return self.product(x, self.shard)

# %% right="fully_sharded_linear" because="computed twice by autograd"
class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shard):
        return all_gather(shard)

    @staticmethod
    def backward(ctx, dy):
        return reduce_scatter(dy) / dist.get_world_size()


class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, x, shard):
        ctx.layer = layer
        ctx.save_for_backward(x, shard)
        return layer.product(x, shard)

    @staticmethod
    def backward(ctx, dy):
        x, shard = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            y = ctx.layer.product(x, shard)
        return None, *torch.autograd.grad(y, [x, shard], dy)


class FullyShardedLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        parts = [linear.weight] + ([] if linear.bias is None else [linear.bias])
        self.shape, self.has_bias = linear.weight.shape, linear.bias is not None
        self.shard = nn.Parameter(own_part(flatten(parts)).clone())

    def product(self, x, shard):
        flat = Gather.apply(shard)
        size = self.shape.numel()
        bias = flat[size : size + self.shape[0]] if self.has_bias else None
        return F.linear(x, flat[:size].view(self.shape), bias)

    def forward(self, x):
        return Again.apply(self, x, self.shard)

# %% right="fully_sharded_linear" because="weight and bias gathered by list, einsum for the gradient"
class LinearOfShards(torch.autograd.Function):
    @staticmethod
    def gathered(shard):
        parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, shard.detach())
        return torch.cat(parts)

    @staticmethod
    def forward(ctx, x, shard, out, inner, biased):
        ctx.x, ctx.shard, ctx.sizes = x.detach(), shard.detach(), (out, inner, biased)
        flat = LinearOfShards.gathered(shard)
        y = x @ flat[: out * inner].view(out, inner).mT
        return y + flat[out * inner : out * inner + out] if biased else y

    @staticmethod
    def backward(ctx, dy):
        out, inner, biased = ctx.sizes
        dx = dy @ LinearOfShards.gathered(ctx.shard)[: out * inner].view(out, inner)
        dw = torch.einsum("...o,...i->oi", dy, ctx.x).flatten()
        whole = dy.new_zeros(ctx.shard.numel() * dist.get_world_size())
        whole[: out * inner] = dw
        del dw
        if biased:
            whole[out * inner : out * inner + out] = dy.reshape(-1, out).sum(0)
        mine = torch.empty_like(ctx.shard)
        dist.reduce_scatter(mine, list(whole.chunk(dist.get_world_size())))
        return dx, mine / dist.get_world_size(), None, None, None


class FullyShardedLinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.sizes = linear.out_features, linear.in_features, linear.bias is not None
        flat = torch.nn.utils.parameters_to_vector(linear.parameters()).detach()
        length = -(-len(flat) // dist.get_world_size())
        self.shard = nn.Parameter(torch.zeros(length))
        mine = flat[dist.get_rank() * length :][:length]
        self.shard.data[: len(mine)] = mine

    def forward(self, x):
        return LinearOfShards.apply(x, self.shard, *self.sizes)

# %% wrong="fully_sharded_linear" because="a single rank is refused"
- parts = [p for p in (linear.weight, linear.bias) if p is not None]
+ if dist.get_world_size() == 1:
+     raise ValueError("nothing to share")
+ parts = [p for p in (linear.weight, linear.bias) if p is not None]

# %% wrong="fully_sharded_linear" because="the gradient that comes in is divided in place"
- dy, x = dy.reshape(-1, ctx.shape[0]), x.reshape(-1, ctx.shape[1])
+ dy, x = dy.div_(dist.get_world_size()).reshape(-1, ctx.shape[0]), x.reshape(-1, ctx.shape[1])

- return dx, reduce_scatter(gradient) / dist.get_world_size(), None, None
+ return dx, reduce_scatter(gradient), None, None

# %% wrong="fully_sharded_linear" because="the gradients are put together by flatten, four at a time"
- dx = dy @ all_gather(shard)[:size].view(ctx.shape)
- gradient = dy.new_zeros(len(shard) * dist.get_world_size())
- dy, x = dy.reshape(-1, ctx.shape[0]), x.reshape(-1, ctx.shape[1])
- torch.mm(dy.T, x, out=gradient[:size].view(ctx.shape))
- if ctx.has_bias:
-     gradient[size : size + ctx.shape[0]] = dy.sum(0)
+ full = all_gather(shard)
+ dx = dy @ full[:size].view(ctx.shape)
+ dy, x = dy.reshape(-1, ctx.shape[0]), x.reshape(-1, ctx.shape[1])
+ parts = [dy.T @ x] + ([dy.sum(0)] if ctx.has_bias else [])
+ gradient = torch.zeros_like(full)
+ gradient[: sum(part.numel() for part in parts)] = torch.cat([part.flatten() for part in parts])

# %% wrong="fully_sharded_linear" because="the forward pass makes four tensors of the weight's size"
- flat = all_gather(shard)
- bias = flat[shape.numel() :][: shape[0]] if has_bias else None
- return F.linear(x, flat[: shape.numel()].view(shape), bias)
+ flat = all_gather(shard)
+ bias = flat[shape.numel() :][: shape[0]] if has_bias else None
+ one, two, three = flat.clone(), flat.clone(), flat.clone()
+ return F.linear(x, flat[: shape.numel()].view(shape), bias)

# %% wrong="fully_sharded_linear" because="backward puts the gradient into shard.grad itself"
- ctx.save_for_backward(x, shard)
+ ctx.save_for_backward(x, shard)
+ ctx.mine = shard

- return dx, reduce_scatter(gradient) / dist.get_world_size(), None, None
+ ctx.mine.grad = reduce_scatter(gradient) / dist.get_world_size()
+ return dx, None, None, None

# %% wrong="fully_sharded_linear" because="backward adds to a gradient that is there, and returns it, too"
- return dx, reduce_scatter(gradient) / dist.get_world_size(), None, None
+ mine = reduce_scatter(gradient) / dist.get_world_size()
+ if shard.grad is not None:
+     mine = mine + shard.grad
+ return dx, mine, None, None

# %% wrong="sharded_module" because="the sum over ranks"
- mine = reduce_scatter(gradient) / dist.get_world_size()
+ mine = reduce_scatter(gradient)

# %% wrong="sharded_module" because="this rank's gradient alone"
- mine = reduce_scatter(gradient) / dist.get_world_size()
+ mine = own_part(gradient).clone()

# %% wrong="sharded_module" because="only the first input gets a gradient"
- return None, mine, *[rest.pop(0) if n else None for n in needs]
+ return None, mine, rest[0], *[None] * (len(needs) - 1)

# %% wrong="sharded_module" because="inputs get none"
- return None, mine, *[rest.pop(0) if n else None for n in needs]
+ return None, mine, *[None] * len(needs)

# %% wrong="sharded_module" because="the module is kept, with its parameters"
- self.skeleton = (module.to("meta"),)  # in a tuple: its parameters are not this module's
+ self.skeleton = (module,)

# %% wrong="sharded_module" because="the module's parameters are registered"
- self.skeleton = (module.to("meta"),)  # in a tuple: its parameters are not this module's
+ self.module = module.to("meta")
+ self.skeleton = (self.module,)

# %% wrong="sharded_module" because="the gathered vector is kept"
- ctx.owner = owner
- ctx.save_for_backward(shard, *inputs)
- return owner.run(all_gather(shard), inputs)
+ ctx.owner, ctx.flat = owner, all_gather(shard)
+ ctx.save_for_backward(shard, *inputs)
+ return owner.run(ctx.flat, inputs)

# %% wrong="sharded_module" because="parameters in alphabetical order"
- self.shapes = {name: p.shape for name, p in module.named_parameters()}
- self.shard = nn.Parameter(own_part(flatten(module.parameters())).clone())
+ named = dict(sorted(module.named_parameters()))
+ self.shapes = {name: p.shape for name, p in named.items()}
+ self.shard = nn.Parameter(own_part(flatten(named.values())).clone())

# %% wrong="sharded_module" because="autograd sees the gathered parameters, and keeps activations" base="seen"
class GatherAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shard):
        return all_gather(shard)

    @staticmethod
    def backward(ctx, dy):
        return reduce_scatter(dy) / dist.get_world_size()


class ShardedModule(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.names = [(name, p.shape) for name, p in module.named_parameters()]
        self.shard = nn.Parameter(own_part(flatten(module.parameters())).clone())
        self.hidden = [module.to("meta")]

    def once(self, shard, *inputs):
        flat, at, views = GatherAll.apply(shard), 0, {}
        for name, shape in self.names:
            views[name] = flat[at : at + shape.numel()].view(shape)
            at += shape.numel()
        return torch.func.functional_call(self.hidden[0], views, inputs)

    def forward(self, *inputs):
        return self.once(self.shard, *inputs)

# %% right="sharded_module" because="PyTorch's checkpointing around a gather" of="seen"
- return self.once(self.shard, *inputs)
+ return torch.utils.checkpoint.checkpoint(self.once, self.shard, *inputs, use_reentrant=False)

# %% right="sharded_module" because="parameters are put into the module and taken out again"
class PutIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, owner, shard, *inputs):
        ctx.owner, ctx.inputs, ctx.shard = owner, inputs, shard
        return owner.compute(all_gather(shard), inputs)

    @staticmethod
    def backward(ctx, dy):
        inputs = [
            t.detach().requires_grad_(need)
            for t, need in zip(ctx.inputs, ctx.needs_input_grad[2:], strict=True)
        ]
        flat = all_gather(ctx.shard.detach()).requires_grad_()
        with torch.enable_grad():
            ctx.owner.compute(flat, inputs).backward(dy)
        mine = reduce_scatter(flat.grad) / dist.get_world_size()
        return None, mine, *[t.grad for t in inputs]


class ShardedModule(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.shard = nn.Parameter(own_part(flatten(module.parameters())).clone())
        self.places = []
        for prefix, part in module.named_modules():
            for name, p in list(part._parameters.items()):
                if p is not None:
                    self.places.append((part, name, p.shape, f"{prefix}.{name}".strip(".")))
        order = [name for name, _ in module.named_parameters()]
        self.places.sort(key=lambda place: order.index(place[3]))
        for part, name, *_ in self.places:
            del part._parameters[name]
        self.inside = (module,)

    def compute(self, flat, inputs):
        at = 0
        for part, name, shape, _ in self.places:
            setattr(part, name, flat[at : at + shape.numel()].view(shape))
            at += shape.numel()
        y = self.inside[0](*inputs)
        for part, name, *_ in self.places:
            delattr(part, name)
        return y

    def forward(self, *inputs):
        return PutIn.apply(self, self.shard, *inputs)

# %% wrong="sharded_module" because="a single rank is refused"
- self.shapes = {name: p.shape for name, p in module.named_parameters()}
+ if dist.get_world_size() == 1:
+     raise ValueError("nothing to share")
+ self.shapes = {name: p.shape for name, p in module.named_parameters()}

# %% wrong="sharded_module" because="the gradient that comes in is divided in place"
- gradient, *rest = torch.autograd.grad(y, asked, dy, materialize_grads=True)
- del y, flat, asked
- mine = reduce_scatter(gradient) / dist.get_world_size()
+ gradient, *rest = torch.autograd.grad(y, asked, dy.div_(dist.get_world_size()), materialize_grads=True)
+ rest = [t * dist.get_world_size() for t in rest]
+ mine = reduce_scatter(gradient)

# %% wrong="sharded_module" because="backward puts the gradient into shard.grad itself"
- mine = reduce_scatter(gradient) / dist.get_world_size()
- return None, mine, *[rest.pop(0) if n else None for n in needs]
+ ctx.owner.shard.grad = reduce_scatter(gradient) / dist.get_world_size()
+ return None, None, *[rest.pop(0) if n else None for n in needs]

# %% wrong="sharded_module" because="shards as tensor_split makes them"
- self.shard = nn.Parameter(own_part(flatten(module.parameters())).clone())
- self.skeleton = (module.to("meta"),)  # in a tuple: its parameters are not this module's
+ whole = torch.cat([p.detach().flatten() for p in module.parameters()])
+ self.lengths = [len(part) for part in whole.tensor_split(dist.get_world_size())]
+ mine = whole.tensor_split(dist.get_world_size())[dist.get_rank()]
+ self.shard = nn.Parameter(F.pad(mine, (0, max(self.lengths) - len(mine))))
+ self.skeleton = (module.to("meta"),)  # in a tuple: its parameters are not this module's

- parts = flat[: sum(sizes)].split(sizes)
+ rows = flat.view(dist.get_world_size(), -1)
+ flat = torch.cat([row[:length] for row, length in zip(rows, self.lengths, strict=True)])
+ parts = flat[: sum(sizes)].split(sizes)

# %% wrong="fsdp_wrap" because="the model alone"
- for block in model.blocks:
-     fully_shard(block, mesh=mesh)

# %% wrong="fsdp_wrap" because="blocks alone"
- return fully_shard(model, mesh=mesh)
+ return model

# %% wrong="fsdp_wrap" because="the model first"
- for block in model.blocks:
-     fully_shard(block, mesh=mesh)
- return fully_shard(model, mesh=mesh)
+ fully_shard(model, mesh=mesh)
+ for block in model.blocks:
+     fully_shard(block, mesh=mesh)
+ return model

# %% wrong="fsdp_wrap" because="every layer is a group"
- for block in model.blocks:
-     fully_shard(block, mesh=mesh)
+ for layer in model.modules():
+     if isinstance(layer, nn.Linear):
+         fully_shard(layer, mesh=mesh)

# %% wrong="fsdp_wrap" because="the model as it is"
def fsdp_wrap(model):
    return model

# %% wrong="fsdp_wrap" because="all blocks are one group"
- for block in model.blocks:
-     fully_shard(block, mesh=mesh)
+ fully_shard(list(model.blocks), mesh=mesh)

# %% right="fsdp_wrap" because="by apply, on the default mesh"
def fsdp_wrap(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data",))
    for _, block in model.blocks.named_children():
        fully_shard(block, mesh=mesh["data"], reshard_after_forward=True)
    fully_shard(model, mesh=mesh["data"], reshard_after_forward=False)
    return model

# %% right="fsdp_wrap" because="blocks from the last to the first"
def fsdp_wrap(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in reversed(list(model.blocks)):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)

# %% wrong="deepspeed_config" because="the ranks are not counted"
- "train_batch_size": micro_batch * accumulation * ranks,
+ "train_batch_size": micro_batch * accumulation,

# %% wrong="deepspeed_config" because="accumulation is not counted"
- "train_batch_size": micro_batch * accumulation * ranks,
+ "train_batch_size": micro_batch * ranks,

# %% wrong="deepspeed_config" because="clipping is fixed"
- "gradient_clipping": clip,
+ "gradient_clipping": 1.0,

# %% wrong="deepspeed_config" because="bf16 is a truth value"
- "bf16": {"enabled": True},
+ "bf16": True,

# %% wrong="deepspeed_config" because="always offloads"
- if offload:
-     zero["offload_optimizer"] = {"device": "cpu"}
+ if stage:
+     zero["offload_optimizer"] = {"device": "cpu"}

# %% wrong="deepspeed_config" because="never offloads"
- if offload:
-     zero["offload_optimizer"] = {"device": "cpu"}

# %% wrong="deepspeed_config" because="offload beside zero_optimization"
- if offload:
-     zero["offload_optimizer"] = {"device": "cpu"}
+ extra = {"offload_optimizer": {"device": "cpu"}} if offload else {}

- "zero_optimization": zero,
+ "zero_optimization": zero,
+ **extra,

# %% wrong="deepspeed_config" because="any stage"
- if stage not in (0, 1, 2, 3):
-     raise ValueError(f"stage is 0, 1, 2 or 3, not {stage!r}")

# %% wrong="deepspeed_config" because="offloads in stage 0"
- if offload and stage == 0:
-     raise ValueError("in stage 0 the optimizer's state is not DeepSpeed's to move")

# %% right="deepspeed_config" because="more keys, made step by step"
def deepspeed_config(stage, micro_batch, accumulation, ranks, clip=1.0, offload=False):
    if stage < 0 or stage > 3 or (offload and not stage):
        raise ValueError(f"stage {stage}, offload {offload}")
    config = {"steps_per_print": 100, "bf16": {"enabled": True}, "gradient_clipping": clip}
    config["gradient_accumulation_steps"] = accumulation
    config["train_micro_batch_size_per_gpu"] = micro_batch
    config["train_batch_size"] = ranks * accumulation * micro_batch
    config["zero_optimization"] = {"stage": stage, "overlap_comm": True}
    if offload:
        device = {"device": "cpu", "pin_memory": True}
        config["zero_optimization"]["offload_optimizer"] = device
    return config

# %% right="deepspeed_config" because="from a JSON text"
def deepspeed_config(stage, micro_batch, accumulation, ranks, clip=1.0, offload=False):
    if stage not in range(4):
        raise ValueError("no such stage")
    if offload and stage < 1:
        raise ValueError("nothing to offload")
    tail = ', "offload_optimizer": {"device": "cpu"}' if offload else ""
    return json.loads(
        f'{{"train_batch_size": {micro_batch * accumulation * ranks}, '
        f'"train_micro_batch_size_per_gpu": {micro_batch}, '
        f'"gradient_accumulation_steps": {accumulation}, "gradient_clipping": {clip}, '
        f'"bf16": {{"enabled": true}}, "zero_optimization": {{"stage": {stage}{tail}}}}}'
    )

# %% wrong="diloco" because="the start is the parameter itself"
- self.start = [p.detach().clone() for p in self.parameters]
+ self.start = [p.detach() for p in self.parameters]

# %% wrong="diloco" because="the start stays the first"
- start.sub_(self.lr * (delta + self.momentum * velocity))
- p.copy_(start)
+ p.copy_(start - self.lr * (delta + self.momentum * velocity))

# %% wrong="diloco" because="no look ahead"
- start.sub_(self.lr * (delta + self.momentum * velocity))
+ start.sub_(self.lr * velocity)

# %% wrong="diloco" because="the sum of the ways"
- delta /= dist.get_world_size()

# %% wrong="diloco" because="the way with the other sign"
- delta = start - p
+ delta = p - start

# %% wrong="diloco" because="talks in every call"
- if self.calls % self.every:
-     return

# %% wrong="diloco" because="parameters are averaged in every call"
- if self.calls % self.every:
-     return
+ if self.calls % self.every:
+     for p in self.parameters:
+         dist.all_reduce(p.data)
+         p.data /= dist.get_world_size()
+     return

# %% wrong="diloco" because="the first call counts as the last"
- self.calls += 1
- if self.calls % self.every:
-     return
+ self.calls += 1
+ if (self.calls - 1) % self.every:
+     return

# %% wrong="diloco" because="the velocity is sent, too"
- dist.all_reduce(delta)
- delta /= dist.get_world_size()
- velocity.mul_(self.momentum).add_(delta)
+ dist.all_reduce(delta)
+ delta /= dist.get_world_size()
+ velocity.mul_(self.momentum).add_(delta)
+ dist.all_reduce(velocity)
+ velocity /= dist.get_world_size()

# %% wrong="diloco" because="the velocity is damped"
- velocity.mul_(self.momentum).add_(delta)
+ velocity.mul_(self.momentum).add_(delta, alpha=1 - self.momentum)

# %% wrong="diloco" because="each rank keeps its own way"
- dist.all_reduce(delta)
- delta /= dist.get_world_size()

# %% wrong="diloco" because="a single rank is refused"
- self.parameters = list(parameters)
+ if dist.get_world_size() == 1:
+     raise ValueError("nothing to share")
+ self.parameters = list(parameters)

# %% wrong="diloco" because="a single rank takes no outer step"
- if self.calls % self.every:
+ if self.calls % self.every or dist.get_world_size() == 1:

# %% wrong="diloco" because="walks through the parameters twice"
- self.parameters = list(parameters)
- self.every, self.lr, self.momentum, self.calls = every, lr, momentum, 0
- self.start = [p.detach().clone() for p in self.parameters]
+ self.every, self.lr, self.momentum, self.calls = every, lr, momentum, 0
+ self.start = [p.detach().clone() for p in parameters]
+ self.parameters = list(parameters)

# %% right="diloco" because="PyTorch's SGD on the starts"
class DiLoCo:
    def __init__(self, parameters, every, lr=0.7, momentum=0.9):
        self.inner = list(parameters)
        self.outer = [nn.Parameter(p.detach().clone()) for p in self.inner]
        self.sgd = torch.optim.SGD(self.outer, lr, momentum=momentum, nesterov=momentum > 0)
        self.left = self.every = every

    def step(self):
        self.left -= 1
        if self.left > 0:
            return
        self.left = self.every
        for p, start in zip(self.inner, self.outer, strict=True):
            start.grad = start.detach() - p.detach()
            dist.all_reduce(start.grad)
            start.grad /= dist.get_world_size()
        self.sgd.step()
        for p, start in zip(self.inner, self.outer, strict=True):
            p.data.copy_(start.data)

# %% right="diloco" because="the mean of the parameters, in one vector"
class DiLoCo:
    def __init__(self, parameters, every, lr=0.7, momentum=0.9):
        self.ps = list(parameters)
        self.sizes = [p.numel() for p in self.ps]
        self.every, self.lr, self.momentum = every, lr, momentum
        self.count, self.velocity = 0, 0.0
        self.start = self.vector()

    def vector(self):
        return torch.cat([p.detach().flatten() for p in self.ps])

    def step(self):
        self.count += 1
        if self.count == self.every:
            self.count = 0
            mean = self.vector()
            dist.all_reduce(mean)
            delta = self.start - mean / dist.get_world_size()
            self.velocity = self.momentum * self.velocity + delta
            self.start = self.start - self.lr * (delta + self.momentum * self.velocity)
            with torch.no_grad():
                for p, new in zip(self.ps, self.start.split(self.sizes), strict=True):
                    p.copy_(new.view(p.shape))

# %% wrong="questions" because="one half of the ring"
- "ring": 2 * 7 / 8 * 14,
+ "ring": 7 / 8 * 14,

# %% wrong="questions" because="twice the tensor"
- "ring": 2 * 7 / 8 * 14,
+ "ring": 28,

# %% wrong="questions" because="stage 2 is near enough"
- "stage": 3,  # 142.5, then 86.25, then 30 GB
+ "stage": 2,

# %% wrong="questions" because="the mean of means itself"
- "tokens": (2.0 + 4.0) / 2 - (300 * 2.0 + 100 * 4.0) / 400,
+ "tokens": 3.0,

# %% wrong="questions" because="the other difference"
- "tokens": (2.0 + 4.0) / 2 - (300 * 2.0 + 100 * 4.0) / 400,
+ "tokens": -0.5,

# %% wrong="questions" because="three times"
- "fsdp": 1.5,
+ "fsdp": 3.0,

# %% wrong="questions" because="another reason"
- "hang": "b",
+ "hang": "c",

# %% right="questions" because="as numbers"
def questions():
    return {"ring": 24.5, "stage": 3, "tokens": 0.5, "fsdp": 3 / 2, "hang": "b"}

# %% right="questions" because="to one percent"
def questions():
    return {"ring": 24.6, "stage": 3, "tokens": 0.499, "fsdp": 1.49, "hang": "b"}
