# Right and wrong answers to the exercises of lesson 23: see CONTRIBUTING.md.

# %% wrong="gae" because="no bootstrap at a truncation"
- future = torch.where(terminated, torch.zeros_like(next_values), next_values)
+ future = torch.where(terminated | truncated, torch.zeros_like(next_values), next_values)

# %% wrong="gae" because="the sum goes on over a truncation"
- goes_on = ~(terminated | truncated)
+ goes_on = ~terminated

# %% wrong="gae" because="bootstraps from the next value in the row, which is another episode's"
- future = torch.where(terminated, torch.zeros_like(next_values), next_values)
+ future = torch.cat([values[:, 1:], next_values[:, -1:]], dim=1)
+ future = torch.where(terminated, torch.zeros_like(future), future)

# %% wrong="gae" because="a product with the flag: NaN stays NaN"
- future = torch.where(terminated, torch.zeros_like(next_values), next_values)
+ future = next_values * (~terminated)

# %% wrong="gae" because="the decay has no gamma"
- running = delta[:, t] + gamma * lam * carried
+ running = delta[:, t] + lam * carried

# %% wrong="gae" because="the decay is a product with a bool, and so of float32"
- running = delta[:, t] + gamma * lam * carried
+ running = delta[:, t] + gamma * lam * goes_on[:, t] * running

# %% wrong="gae" because="targets from the next values"
- return advantages, advantages + values
+ return advantages, advantages + next_values.nan_to_num()

# %% wrong="gae" because="a step that is both is taken for truncated"
- future = torch.where(terminated, torch.zeros_like(next_values), next_values)
+ over = terminated & ~truncated
+ future = torch.where(over, torch.zeros_like(next_values), next_values)

# %% wrong="gae" because="the graph stays"
def gae(rewards, values, next_values, terminated, truncated, gamma, lam):
    delta = rewards + gamma * next_values.masked_fill(terminated, 0) - values
    rows, running = [], torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        running = delta[:, t] + gamma * lam * running.masked_fill((terminated | truncated)[:, t], 0)
        rows.append(running)
    advantages = torch.stack(rows[::-1], dim=1)
    return advantages, advantages + values

# %% wrong="gae" because="only NaN is taken for no future"
- future = torch.where(terminated, torch.zeros_like(next_values), next_values)
+ future = next_values.nan_to_num(0.0)

# %% right="gae" because="a triangular matrix of decays, without a loop"
def gae(rewards, values, next_values, terminated, truncated, gamma, lam):
    rewards, values, next_values = rewards.detach(), values.detach(), next_values.detach()
    delta = rewards + gamma * next_values.masked_fill(terminated, 0) - values
    time = delta.shape[1]
    steps = torch.arange(time)
    distance = steps[None, :] - steps[:, None]
    episode = (terminated | truncated).cumsum(1) - (terminated | truncated).long()
    same = (episode[:, :, None] == episode[:, None, :]) & (distance >= 0)
    decay = torch.pow(torch.tensor(gamma * lam, dtype=delta.dtype), distance.clamp(min=0)) * same
    advantages = torch.einsum("bts,bs->bt", decay.to(delta.dtype), delta)
    return advantages, advantages + values

# %% wrong="ppo_losses" because="the sign of the objective"
- return -surrogate.sum() / count, 0.5 * error.sum() / count, share
+ return surrogate.sum() / count, 0.5 * error.sum() / count, share

# %% wrong="ppo_losses" because="clipped without the minimum"
- surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
+ surrogate = ratio.clamp(1 - clip, 1 + clip) * advantages

# %% wrong="ppo_losses" because="maximum instead of minimum"
- surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
+ surrogate = torch.maximum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)

# %% wrong="ppo_losses" because="padding is in the divisor"
- count = mask.sum().clamp(min=1)
+ count = mask.numel()

# %% wrong="ppo_losses" because="mean over rows of means over tokens"
- return -surrogate.sum() / count, 0.5 * error.sum() / count, share
+ rows = -(surrogate.sum(1) / mask.sum(1).clamp(min=1)).mean()
+ return rows, 0.5 * error.sum() / count, share

# %% wrong="ppo_losses" because="clipped counts every ratio beyond the fence"
- stopped = ((advantages > 0) & (ratio > 1 + clip)) | ((advantages < 0) & (ratio < 1 - clip))
+ stopped = (ratio - 1).abs() > clip

# %% wrong="ppo_losses" because="the smaller value error"
- error = torch.maximum(
+ error = torch.minimum(

# %% wrong="ppo_losses" because="no clipping of the value"
- near = old_values + (values - old_values).clamp(-value_clip, value_clip)
+ near = values

# %% wrong="ppo_losses" because="value clipped around the target"
- near = old_values + (values - old_values).clamp(-value_clip, value_clip)
+ near = targets + (values - targets).clamp(-value_clip, value_clip)

# %% wrong="ppo_losses" because="the padding is hidden after the exponential: NaN in the gradient"
- ratio = (logp - old_logp).masked_fill(out, 0).exp()
+ ratio = (logp - old_logp).exp().masked_fill(out, 0)

# %% wrong="ppo_losses" because="a gradient to old_logp, advantages and targets"
- old_logp, advantages, old_values, targets = (
-     t.detach() for t in (old_logp, advantages, old_values, targets)
- )
+ old_values = old_values.detach()

# %% wrong="ppo_losses" because="value_clip is ignored"
- near = old_values + (values - old_values).clamp(-value_clip, value_clip)
+ near = old_values + (values - old_values).clamp(-0.2, 0.2)

# %% wrong="ppo_losses" because="NaN without tokens"
- count = mask.sum().clamp(min=1)
+ count = mask.sum()

# %% wrong="ppo_losses" because="a ratio of probabilities: 0/0 where both underflow"
- ratio = (logp - old_logp).masked_fill(out, 0).exp()
+ ratio = logp.masked_fill(out, 0).exp() / old_logp.masked_fill(out, 0).exp()

# %% wrong="ppo_losses" because="NaN is taken for the mask: other padding counts"
- advantages = advantages.masked_fill(out, 0)
- ratio = (logp - old_logp).masked_fill(out, 0).exp()
+ advantages = advantages.nan_to_num(0.0)
+ ratio = (logp - old_logp).nan_to_num(0.0).exp()

# %% right="ppo_losses" because="only the tokens that count are looked at, cases by torch.where"
def ppo_losses(
    logp, old_logp, advantages, values, old_values, targets, mask, clip=0.2, value_clip=0.2
):
    if not bool(mask.any()):
        zero = torch.zeros((), dtype=logp.dtype)
        return zero, zero, zero
    lp, v = logp[mask], values[mask]
    old, a, ov, r = (t[mask].detach() for t in (old_logp, advantages, old_values, targets))
    rho = torch.exp(lp - old)
    fenced = torch.where(a > 0, rho > 1 + clip, rho < 1 - clip) & (a != 0)
    bound = 1 + clip * a.sign()
    policy = -torch.where(fenced, bound * a, rho * a).mean()
    held = torch.minimum(torch.maximum(v, ov - value_clip), ov + value_clip)
    value = torch.maximum((v - r) ** 2, (held - r) ** 2).mean() / 2
    return policy, value, fenced.to(logp.dtype).mean()

# %% wrong="group_advantages" because="the population deviation always"
- correction = 1 if scale == "sample" else 0
+ correction = 0

# %% wrong="group_advantages" because="mean over the whole batch"
- advantages = r - r.mean(dim=1, keepdim=True)
+ advantages = r - r.mean()

# %% wrong="group_advantages" because="eps inside the root"
- advantages = advantages / (r.std(dim=1, correction=correction, keepdim=True) + eps)
+ advantages = advantages / (r.var(dim=1, correction=correction, keepdim=True) + eps**2).sqrt()

# %% wrong="group_advantages" because="deviation of the whole batch"
- advantages = advantages / (r.std(dim=1, correction=correction, keepdim=True) + eps)
+ advantages = advantages / (r.std(correction=correction) + eps)

# %% wrong="group_advantages" because="equal rewards give rounding errors over eps"
- equal = (r == r[:, :1]).all(dim=1, keepdim=True)
- return advantages.masked_fill(equal, 0)
+ return advantages

# %% wrong="group_advantages" because="near-equal rewards count as equal"
- equal = (r == r[:, :1]).all(dim=1, keepdim=True)
+ equal = ((r - r[:, :1]).abs() < 1e-5).all(dim=1, keepdim=True)

# %% wrong="group_advantages" because="a group of one gives NaN"
- if rewards.shape[1] < 2:
-     raise ValueError("a group of one has nothing to compare itself with")
+ pass

# %% wrong="group_advantages" because="everything in float32"
- r = rewards.detach() if rewards.is_floating_point() else rewards.float()
+ r = rewards.detach().float()

# %% wrong="group_advantages" because="the leave-one-out baseline"
- advantages = r - r.mean(dim=1, keepdim=True)
+ advantages = (r - r.mean(dim=1, keepdim=True)) * r.shape[1] / (r.shape[1] - 1)

# %% wrong="group_advantages" because="equal rewards by a standard deviation of 0"
- equal = (r == r[:, :1]).all(dim=1, keepdim=True)
+ equal = r.std(dim=1, keepdim=True) == 0

# %% right="group_advantages" because="row by row, from sums of squares"
def group_advantages(rewards, scale="sample", eps=1e-4):
    n = rewards.shape[1]
    if n < 2 or scale not in ("sample", "population", None):
        raise ValueError("two answers at least, and a known scale")
    rewards = rewards.detach() if rewards.is_floating_point() else rewards.to(torch.float32)
    out = torch.zeros_like(rewards)
    for i, row in enumerate(rewards):
        if row.max() == row.min():
            continue
        gap = row - row.sum() / n
        divisor = 1.0
        if scale is not None:
            divisor = (gap.square().sum() / (n - (scale == "sample"))).sqrt() + eps
        out[i] = gap / divisor
    return out

# %% wrong="kl_penalty" because="k3 with the policies exchanged"
- k3 = torch.expm1(-d) + d
+ k3 = torch.expm1(d) - d

# %% wrong="kl_penalty" because="the opposite sign"
- d = logp - ref_logp.detach()
+ d = ref_logp.detach() - logp

# %% wrong="kl_penalty" because="k2 without the half"
- return 0.5 * d.square()
+ return d.square()

# %% wrong="kl_penalty" because="no gradient through the ratio"
- return (logp - old_logp.detach()).exp() * k3
+ return (logp - old_logp).exp().detach() * k3

# %% wrong="kl_penalty" because="the ratio upside down"
- return (logp - old_logp.detach()).exp() * k3
+ return (old_logp.detach() - logp).exp() * k3

# %% wrong="kl_penalty" because="a gradient to the reference"
- d = logp - ref_logp.detach()
+ d = logp - ref_logp

# %% wrong="kl_penalty" because="a gradient to the old policy"
- return (logp - old_logp.detach()).exp() * k3
+ return (logp - old_logp).exp() * k3

# %% wrong="kl_penalty" because="no error without old_logp"
- if old_logp is None:
-     raise ValueError("'k3_corrected' needs old_logp")
+ if old_logp is None:
+     return k3

# %% wrong="kl_penalty" because="the missing -1 of k3"
- k3 = torch.expm1(-d) + d
+ k3 = torch.exp(-d) + d

# %% wrong="kl_penalty" because="a ratio of probabilities: 0/0 where both underflow"
- k3 = torch.expm1(-d) + d
+ k3 = ref_logp.detach().exp() / logp.exp() + d - 1

# %% right="kl_penalty" because="a table of formulas, from probabilities' ratios"
def kl_penalty(logp, ref_logp, kind="k3", old_logp=None):
    log_u = ref_logp.detach() - logp
    known = {
        "k1": lambda: -log_u,
        "k2": lambda: log_u**2 / 2,
        "k3": lambda: log_u.exp() - log_u - 1,
        "k3_corrected": lambda: torch.exp(logp - old_logp.detach()) * (log_u.exp() - log_u - 1),
    }
    if kind not in known or (kind == "k3_corrected" and old_logp is None):
        raise ValueError(f"{kind}")
    return known[kind]()

# %% wrong="kl_by_enumeration" because="the weights are differentiated, too"
- old_logp = (logits if old_logits is None else old_logits).detach().log_softmax(-1)
+ old_logp = logp if old_logits is None else old_logits.detach().log_softmax(-1)

# %% wrong="kl_by_enumeration" because="the sampler is ignored"
- old_logp = (logits if old_logits is None else old_logits).detach().log_softmax(-1)
+ old_logp = logits.detach().log_softmax(-1)

# %% wrong="kl_by_enumeration" because="all actions weigh alike"
- average = (old_logp.exp() * kl_penalty(logp, ref_logits.log_softmax(-1), kind, old_logp)).sum()
+ average = kl_penalty(logp, ref_logits.log_softmax(-1), kind, old_logp).mean()

# %% wrong="kl_by_enumeration" because="backward into the caller's .grad"
- leaf = logits.detach().clone().requires_grad_()
+ leaf = logits.requires_grad_() if logits.is_leaf else logits.detach().requires_grad_()
- (gradient,) = torch.autograd.grad(average, leaf)
- return average.detach(), gradient
+ average.backward()
+ return average.detach(), leaf.grad

# %% wrong="kl_by_enumeration" because="the gradient by log-probabilities, not by logits"
- leaf = logits.detach().clone().requires_grad_()
- logp = leaf.log_softmax(-1)
+ leaf = logits.detach().log_softmax(-1).requires_grad_()
+ logp = leaf

# %% wrong="kl_by_enumeration" because="a softmax without a shift: large logits overflow"
- logp = leaf.log_softmax(-1)
+ logp = (leaf.exp() / leaf.exp().sum()).log()

# %% right="kl_by_enumeration" because="the softmax's derivative written out"
def kl_by_enumeration(logits, ref_logits, kind, old_logits=None):
    logp = logits.detach().log_softmax(0).requires_grad_()
    weight = (logits if old_logits is None else old_logits).detach().softmax(0)
    each = kl_penalty(logp, ref_logits.detach().log_softmax(0), kind, weight.log())
    (slope,) = torch.autograd.grad(each, logp, torch.ones_like(each))
    pull = weight * slope
    return (weight * each).sum().detach(), pull - logp.detach().exp() * pull.sum()

# %% wrong="kl_by_enumeration" because="switches the caller’s logits to requires_grad"
def kl_by_enumeration(
    logits: Tensor, ref_logits: Tensor, kind: str, old_logits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    logits.requires_grad_(True)
    logp = torch.log_softmax(logits, -1)
    ref_logp = torch.log_softmax(ref_logits, -1).detach()
    old = logits if old_logits is None else old_logits
    old_logp = torch.log_softmax(old, -1).detach()
    value = (old_logp.exp() * kl_penalty(logp, ref_logp, kind, old_logp)).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient.detach()

# %% wrong="grpo_loss" because="the sign of the objective"
- loss = -torch.minimum(rho * a, rho.clamp(1 - clip[0], 1 + clip[1]) * a)
+ loss = torch.minimum(rho * a, rho.clamp(1 - clip[0], 1 + clip[1]) * a)

# %% wrong="grpo_loss" because="no pessimistic minimum"
- loss = -torch.minimum(rho * a, rho.clamp(1 - clip[0], 1 + clip[1]) * a)
+ loss = -rho.clamp(1 - clip[0], 1 + clip[1]) * a

# %% wrong="grpo_loss" because="low and high exchanged"
- loss = -torch.minimum(rho * a, rho.clamp(1 - clip[0], 1 + clip[1]) * a)
+ loss = -torch.minimum(rho * a, rho.clamp(1 - clip[1], 1 + clip[0]) * a)

# %% wrong="grpo_loss" because="the upper fence is ignored: clip[0] on both sides"
- loss = -torch.minimum(rho * a, rho.clamp(1 - clip[0], 1 + clip[1]) * a)
+ loss = -torch.minimum(rho * a, rho.clamp(1 - clip[0], 1 + clip[0]) * a)

# %% wrong="grpo_loss" because="the sequence's ratio is a product"
- log_ratio = (log_ratio.sum(dim=1) / lengths.clamp(min=1))[:, None].expand_as(logp)
+ log_ratio = log_ratio.sum(dim=1)[:, None].expand_as(logp)

# %% wrong="grpo_loss" because="the sequence's ratio divides by the padded length"
- log_ratio = (log_ratio.sum(dim=1) / lengths.clamp(min=1))[:, None].expand_as(logp)
+ log_ratio = log_ratio.mean(dim=1)[:, None].expand_as(logp)

# %% wrong="grpo_loss" because="no gradient through the sequence's ratio but the token's own"
- log_ratio = (log_ratio.sum(dim=1) / lengths.clamp(min=1))[:, None].expand_as(logp)
+ whole = (log_ratio.sum(dim=1) / lengths.clamp(min=1))[:, None].detach()
+ log_ratio = whole + logp[:, :1] - logp[:, :1].detach()

# %% wrong="grpo_loss" because="an average over the padded length"
- return (loss.sum(dim=1) / lengths.clamp(min=1)).mean()
+ return loss.mean()

# %% wrong="grpo_loss" because="empty answers are not counted"
- return (loss.sum(dim=1) / lengths.clamp(min=1)).mean()
+ return loss.sum(dim=1).div(lengths.clamp(min=1)).sum() / (lengths > 0).sum().clamp(min=1)

# %% wrong="grpo_loss" because="the constant is the batch's own width"
- return loss.sum() / (loss.shape[0] * max_length)
+ return loss.sum() / loss.numel()

# %% wrong="grpo_loss" because="the constant forgets the batch"
- return loss.sum() / (loss.shape[0] * max_length)
+ return loss.sum() / max_length

# %% wrong="grpo_loss" because="the KL is subtracted"
- loss = loss + beta * kl_penalty(logp, ref_logp.masked_fill(out, 0), kl, old_logp)
+ loss = loss - beta * kl_penalty(logp, ref_logp.masked_fill(out, 0), kl, old_logp)

# %% wrong="grpo_loss" because="kl is ignored"
- loss = loss + beta * kl_penalty(logp, ref_logp.masked_fill(out, 0), kl, old_logp)
+ loss = loss + beta * kl_penalty(logp, ref_logp.masked_fill(out, 0))

# %% wrong="grpo_loss" because="weights act on the KL, too"
- if weights is not None:
-     loss = loss * weights.detach().masked_fill(out, 0)
- if beta != 0:
-     loss = loss + beta * kl_penalty(logp, ref_logp.masked_fill(out, 0), kl, old_logp)
+ if beta != 0:
+     loss = loss + beta * kl_penalty(logp, ref_logp.masked_fill(out, 0), kl, old_logp)
+ if weights is not None:
+     loss = loss * weights.detach().masked_fill(out, 0)

# %% wrong="grpo_loss" because="the KL's correction is that of the sequence"
- log_ratio = logp - old_logp
+ log_ratio = logp - old_logp
+ given_logp = logp
- loss = loss + beta * kl_penalty(logp, ref_logp.masked_fill(out, 0), kl, old_logp)
+ k = kl_penalty(logp, ref_logp.masked_fill(out, 0), "k3" if kl == "k3_corrected" else kl)
+ loss = loss + beta * (k * rho if kl == "k3_corrected" else k)

# %% wrong="grpo_loss" because="NaN from the padding"
- logp = logp.masked_fill(out, 0)
- old_logp = old_logp.detach().masked_fill(out, 0)
- log_ratio = logp - old_logp
+ old_logp = old_logp.detach()
+ log_ratio = (logp - old_logp) * mask

# %% wrong="grpo_loss" because="a gradient to old_logp"
- old_logp = old_logp.detach().masked_fill(out, 0)
+ old_logp = old_logp.masked_fill(out, 0)

# %% wrong="grpo_loss" because="a gradient to the weights"
- loss = loss * weights.detach().masked_fill(out, 0)
+ loss = loss * weights.masked_fill(out, 0)

# %% wrong="grpo_loss" because="the loss is detached"
- return (loss.sum(dim=1) / lengths.clamp(min=1)).mean()
+ return (loss.sum(dim=1) / lengths.clamp(min=1)).mean().detach()

# %% wrong="grpo_loss" because="no error without a reference"
- if beta != 0 and ref_logp is None:
-     raise ValueError("a KL needs ref_logp")
+ beta = 0.0 if ref_logp is None else beta

# %% wrong="grpo_loss" because="a ratio of probabilities: 0/0 where both underflow"
- rho, a = log_ratio.exp(), advantages.detach()[:, None]
+ a = advantages.detach()[:, None]
+ rho = log_ratio.exp() if ratio == "sequence" else logp.exp() / old_logp.exp()

# %% wrong="grpo_loss" because="an answer's ratio from its probabilities, which underflow"
- log_ratio = (log_ratio.sum(dim=1) / lengths.clamp(min=1))[:, None].expand_as(logp)
+ whole = logp.sum(dim=1).exp() / old_logp.sum(dim=1).exp()
+ log_ratio = (whole.log() / lengths.clamp(min=1))[:, None].expand_as(logp)

# %% wrong="grpo_loss" because="NaN is taken for the mask: other padding is in the answer's ratio"
- logp = logp.masked_fill(out, 0)
- old_logp = old_logp.detach().masked_fill(out, 0)
+ logp = torch.where(logp.isnan(), 0.0, logp)
+ old_logp = torch.where(old_logp.isnan(), 0.0, old_logp.detach())

# %% right="grpo_loss" because="row by row, only over the tokens that were written"
def grpo_loss(
    logp,
    old_logp,
    advantages,
    mask,
    *,
    ratio="token",
    clip=(0.2, 0.2),
    average="sequence",
    max_length=None,
    ref_logp=None,
    beta=0.0,
    kl="k3",
    weights=None,
):
    if ratio not in ("token", "sequence"):
        raise ValueError("ratio")
    if average not in ("sequence", "token", "constant"):
        raise ValueError("average")
    if (average == "constant" and max_length is None) or (beta and ref_logp is None):
        raise ValueError("something is missing")
    sums = []
    for b, row in enumerate(mask):
        new, old, a = logp[b][row], old_logp[b][row].detach(), advantages[b].detach()
        if len(new) == 0:
            sums.append(logp[b][row].sum())
            continue
        gap = new - old
        rho = gap.mean().exp() if ratio == "sequence" else gap.exp()
        held = rho.clamp(1 - clip[0], 1 + clip[1])
        gain = torch.where(rho * a < held * a, rho * a, held * a)
        gain = gain.expand(len(new))
        loss = -gain if weights is None else -gain * weights[b][row].detach()
        if beta:
            loss = loss + beta * kl_penalty(new, ref_logp[b][row], kl, old)
        sums.append(loss.mean() if average == "sequence" else loss.sum())
    total = torch.stack(sums).sum()
    if average == "token":
        return total / max(int(mask.sum()), 1)
    return total / (len(sums) * (1 if average == "sequence" else max_length))

# %% wrong="response_logps" because="no shift"
- wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
+ wide = logits[:, 1:].to(torch.promote_types(logits.dtype, torch.float32))

# %% wrong="response_logps" because="the temperature is ignored"
- return (wide / temperature).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
+ return wide.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]

# %% wrong="response_logps" because="the temperature divides log-probabilities"
- return (wide / temperature).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
+ return wide.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0] / temperature

# %% wrong="response_logps" because="in the format of the logits"
- wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
+ wide = logits[:, :-1]

# %% wrong="response_logps" because="log of softmax: −inf"
- return (wide / temperature).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
+ return (wide / temperature).softmax(-1).log().gather(-1, tokens[:, 1:, None])[..., 0]

# %% right="response_logps" because="cross-entropy"
def response_logps(logits, tokens, temperature=1.0):
    if not temperature > 0:
        raise ValueError("temperature")
    x = logits if logits.dtype == torch.float64 else logits.float()
    x = x[:, :-1].transpose(1, 2) / temperature
    return -F.cross_entropy(x, tokens[:, 1:], reduction="none")

# %% wrong="sampler_weights" because="the ratio upside down"
- log_ratio = (old_logp.detach() - sampler_logp.detach()).masked_fill(~mask, 0)
+ log_ratio = (sampler_logp.detach() - old_logp.detach()).masked_fill(~mask, 0)

# %% wrong="sampler_weights" because="no truncation"
- return log_ratio.exp().clamp(max=cap).masked_fill(~mask, 0)
+ return log_ratio.exp().masked_fill(~mask, 0)

# %% wrong="sampler_weights" because="clipped from below, too"
- return log_ratio.exp().clamp(max=cap).masked_fill(~mask, 0)
+ return log_ratio.exp().clamp(1 / cap, cap).masked_fill(~mask, 0)

# %% wrong="sampler_weights" because="the geometric mean"
- log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
+ log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
+ log_ratio = log_ratio.expand_as(mask)

# %% wrong="sampler_weights" because="a product of truncated ratios"
- log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
+ log_ratio = log_ratio.clamp(max=math.log(cap)).sum(dim=1, keepdim=True).expand_as(log_ratio)

# %% wrong="sampler_weights" because="a gradient"
- log_ratio = (old_logp.detach() - sampler_logp.detach()).masked_fill(~mask, 0)
+ log_ratio = (old_logp - sampler_logp).masked_fill(~mask, 0)

# %% wrong="sampler_weights" because="1 at padding"
- return log_ratio.exp().clamp(max=cap).masked_fill(~mask, 0)
+ return log_ratio.exp().clamp(max=cap).masked_fill(~mask, 1)

# %% wrong="sampler_weights" because="NaN from the padding"
- log_ratio = (old_logp.detach() - sampler_logp.detach()).masked_fill(~mask, 0)
+ log_ratio = (old_logp.detach() - sampler_logp.detach()) * mask

# %% wrong="sampler_weights" because="a ratio of probabilities: 0/0 where both underflow"
- return log_ratio.exp().clamp(max=cap).masked_fill(~mask, 0)
+ pair = [x.detach().masked_fill(~mask, 0) for x in (old_logp, sampler_logp)]
+ if level == "sequence":
+     pair = [x.sum(dim=1, keepdim=True).expand_as(x) for x in pair]
+ return (pair[0].exp() / pair[1].exp()).clamp(max=cap).masked_fill(~mask, 0)

# %% wrong="sampler_weights" because="the product takes padding along where it is not NaN"
- log_ratio = (old_logp.detach() - sampler_logp.detach()).masked_fill(~mask, 0)
+ log_ratio = (old_logp.detach() - sampler_logp.detach()).nan_to_num(0.0)

# %% right="sampler_weights" because="truncated in the logarithm"
def sampler_weights(old_logp, sampler_logp, mask, cap=2.0, level="token"):
    with torch.no_grad():
        gap = torch.where(mask, old_logp - sampler_logp, torch.zeros_like(old_logp))
        if level == "sequence":
            gap = gap + (gap.sum(1, keepdim=True) - gap)
        elif level != "token":
            raise ValueError(level)
        weight = torch.minimum(gap, torch.full_like(gap, math.log(cap))).exp()
        return torch.where(mask, weight, torch.zeros_like(weight))

# %% wrong="dynamic_sampling" because="draws the whole batch again each round"
- rewards = draw(wanted - found)
+ rewards = draw(wanted)
- kept.append(rewards[(rewards != rewards[:, :1]).any(dim=1)])
+ kept.append(rewards[(rewards != rewards[:, :1]).any(dim=1)][: wanted - found])

# %% wrong="dynamic_sampling" because="a standard deviation above 0"
- kept.append(rewards[(rewards != rewards[:, :1]).any(dim=1)])
+ kept.append(rewards[(rewards - rewards.mean(dim=1, keepdim=True)).abs().sum(dim=1) > 0])

# %% wrong="dynamic_sampling" because="torch.std above 0"
- kept.append(rewards[(rewards != rewards[:, :1]).any(dim=1)])
+ kept.append(rewards[rewards.std(dim=1) > 0])

# %% wrong="dynamic_sampling" because="only the neighbor is compared"
- kept.append(rewards[(rewards != rewards[:, :1]).any(dim=1)])
+ kept.append(rewards[rewards[:, 0] != rewards[:, 1]])

# %% wrong="dynamic_sampling" because="no limit to the rounds"
- for _ in range(max_rounds):
+ while True:

# %% wrong="dynamic_sampling" because="one round too many"
- for _ in range(max_rounds):
+ for _ in range(max_rounds + 1):

# %% wrong="dynamic_sampling" because="counts the groups kept"
- drawn += len(rewards)
- kept.append(rewards[(rewards != rewards[:, :1]).any(dim=1)])
+ kept.append(rewards[(rewards != rewards[:, :1]).any(dim=1)])
+ drawn += len(kept[-1])

# %% wrong="dynamic_sampling" because="counts rounds"
- drawn += len(rewards)
+ drawn += 1

# %% wrong="dynamic_sampling" because="keeps groups that are neither all right nor all wrong by 0 and 1 only"
- kept.append(rewards[(rewards != rewards[:, :1]).any(dim=1)])
+ kept.append(rewards[(rewards.sum(1) != 0) & (rewards.sum(1) != rewards.shape[1])])

# %% right="dynamic_sampling" because="a recursion on what is missing"
def dynamic_sampling(draw, wanted, max_rounds):
    batch = draw(wanted)
    alive = batch.amax(1) > batch.amin(1)
    rows, drawn = batch[alive], batch.shape[0]
    if rows.shape[0] == wanted or max_rounds == 1:
        return rows, drawn
    more, again = dynamic_sampling(draw, wanted - rows.shape[0], max_rounds - 1)
    return torch.cat([rows, more]), drawn + again

# %% wrong="rl_memory" because="the critic is frozen"
- return (16 * (policy + critic) + 2 * (reference + reward)) / devices
+ return (16 * policy + 2 * (critic + reference + reward)) / devices

# %% wrong="rl_memory" because="no devices"
- return (16 * (policy + critic) + 2 * (reference + reward)) / devices
+ return 16 * (policy + critic) + 2 * (reference + reward)

# %% wrong="rl_memory" because="no float32 copy: 12 bytes"
- return (16 * (policy + critic) + 2 * (reference + reward)) / devices
+ return (12 * (policy + critic) + 2 * (reference + reward)) / devices

# %% wrong="rl_memory" because="all four of the policy's size"
- return (16 * (policy + critic) + 2 * (reference + reward)) / devices
+ return 36 * policy / devices

# %% wrong="rl_memory" because="whole-number division"
- return (16 * (policy + critic) + 2 * (reference + reward)) / devices
+ return float((16 * (policy + critic) + 2 * (reference + reward)) // devices)

# %% wrong="rl_memory" because="shares rounded up to whole parameters"
- return (16 * (policy + critic) + 2 * (reference + reward)) / devices
+ trained = math.ceil(policy / devices) + math.ceil(critic / devices)
+ return float(16 * trained + 2 * (math.ceil(reference / devices) + math.ceil(reward / devices)))

# %% right="rl_memory" because="each part by name"
def rl_memory(policy, critic=0, reference=0, reward=0, devices=1):
    trained = {"weights": 2, "gradient": 2, "copy": 4, "moments": 8}
    total = sum(size * part for size in (policy, critic) for part in trained.values())
    return (total + (reference + reward) * trained["weights"]) / devices

# %% wrong="grpo_train" because="rewards of other prompts: number within the batch"
- scores = [reward(picks[n // group], answer) for n, answer in enumerate(rolled.answers)]
+ scores = [reward(n // group, answer) for n, answer in enumerate(rolled.answers)]

# %% wrong="grpo_train" because="groups mixed up: answers taken as one of each prompt in turn"
- rewards = torch.tensor(scores, dtype=torch.float32).reshape(len(picks), group)
- advantages = group_advantages(rewards).flatten()
+ rewards = torch.tensor(scores, dtype=torch.float32).reshape(group, len(picks)).T
+ advantages = group_advantages(rewards).T.flatten()

# %% wrong="grpo_train" because="baseline over the whole batch"
- advantages = group_advantages(rewards).flatten()
+ advantages = group_advantages(rewards.reshape(1, -1)).flatten()

# %% wrong="grpo_train" because="the sign"
- loss.backward()
+ (-loss).backward()

# %% wrong="grpo_train" because="gradients pile up"
- optimizer.zero_grad()
+ pass

# %% wrong="grpo_train" because="log-probabilities at temperature 1"
- logp = response_logps(model(tokens), tokens, temperature)
+ logp = response_logps(model(tokens), tokens)

# %% wrong="grpo_train" because="the old policy, and so the entropy, at temperature 1"
- old_logp = response_logps(model(tokens), tokens, temperature)
+ old_logp = response_logps(model(tokens), tokens)

# %% wrong="grpo_train" because="samples at temperature 1"
- rolled = rollout(model, chosen, group, max_new_tokens, temperature, generator, stop)
+ rolled = rollout(model, chosen, group, max_new_tokens, 1.0, generator, stop)

# %% wrong="grpo_train" because="one seed for all samples of a group"
- rolled = rollout(model, chosen, group, max_new_tokens, temperature, generator, stop)
+ one = rollout(model, chosen, 1, max_new_tokens, temperature, generator, stop)
+ rolled = Rollout(
+     one.tokens.repeat_interleave(group, 0),
+     one.mask.repeat_interleave(group, 0),
+     [a for a in one.answers for _ in range(group)],
+ )

# %% wrong="grpo_train" because="beta is ignored"
- loss = grpo_loss(logp, old_logp, advantages, mask, ref_logp=ref_logp, beta=beta)
+ loss = grpo_loss(logp, old_logp, advantages, mask)

# %% wrong="grpo_train" because="the prompt is trained, too"
- loss = grpo_loss(logp, old_logp, advantages, mask, ref_logp=ref_logp, beta=beta)
+ every = torch.ones_like(mask)
+ loss = grpo_loss(logp, old_logp, advantages, every, ref_logp=ref_logp, beta=beta)

# %% wrong="grpo_train" because="one update, whatever is asked for"
- for _ in range(updates):
+ for _ in range(1):

# %% wrong="grpo_train" because="the optimizer is made anew in each step"
- records = []
- for _ in range(steps):
+ records = []
+ for _ in range(steps):
+     optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)

# %% wrong="grpo_train" because="the model is left in evaluation mode"
- records = []
+ records = []
+ model.eval()

# %% wrong="grpo_train" because="prompts from PyTorch's own generator"
- picks = torch.randperm(len(prompts), generator=generator)[:batch].tolist()
+ picks = torch.randperm(len(prompts))[:batch].tolist()

# %% wrong="grpo_train" because="always the first prompts"
- picks = torch.randperm(len(prompts), generator=generator)[:batch].tolist()
+ picks = list(range(len(prompts)))[:batch]

# %% wrong="grpo_train" because="entropy with the sign of a log-probability"
- "entropy": -float(old_logp[mask].mean()),
+ "entropy": float(old_logp[mask].mean()),

# %% wrong="grpo_train" because="length with the prompt"
- "length": float(mask.sum(dim=1).float().mean()),
+ "length": float(tokens.shape[1]),

# %% wrong="grpo_train" because="the reference gets gradients"
- with torch.no_grad():
-     old_logp = response_logps(model(tokens), tokens, temperature)
-     ref_logp = None
-     if reference is not None:
-         ref_logp = response_logps(reference(tokens), tokens, temperature)
+ old_logp = response_logps(model(tokens), tokens, temperature).detach()
+ ref_logp = None
+ if reference is not None:
+     ref_logp = response_logps(reference(tokens), tokens, temperature)
+     ref_logp.mean().backward(retain_graph=True)

# %% wrong="grpo_train" because="the ratio is taken to the last update"
- loss = grpo_loss(logp, old_logp, advantages, mask, ref_logp=ref_logp, beta=beta)
+ loss = grpo_loss(logp, logp, advantages, mask, ref_logp=ref_logp, beta=beta)

# %% wrong="grpo_train" because="no clipping of the gradient's norm"
- nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
+ pass

# %% right="grpo_train" because="gradients by autograd.grad, the loss written out"
def grpo_train(
    model,
    reference,
    prompts,
    reward,
    *,
    steps,
    batch,
    group,
    max_new_tokens,
    lr,
    generator,
    beta=0.0,
    temperature=1.0,
    updates=1,
    stop=0,
):
    if beta and reference is None:
        raise ValueError("reference")
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    history = []

    def logps(m, tokens):
        x = m(tokens)[:, :-1].float() / temperature
        return -F.cross_entropy(x.transpose(1, 2), tokens[:, 1:], reduction="none")

    for _ in range(steps):
        numbers = torch.randperm(len(prompts), generator=generator)[:batch].tolist()
        rolled = rollout(
            model,
            [prompts[i] for i in numbers],
            group,
            max_new_tokens,
            temperature,
            generator,
            stop,
        )
        m, n = rolled.mask, rolled.mask.sum(1)
        owners = [i for i in numbers for _ in range(group)]
        r = torch.tensor(
            [float(reward(i, a)) for i, a in zip(owners, rolled.answers, strict=True)]
        ).view(-1, group)
        gap = r - r.mean(1, keepdim=True)
        differs = r.amax(1, keepdim=True) > r.amin(1, keepdim=True)
        a = torch.where(differs, gap / (r.std(1, keepdim=True) + 1e-4), 0.0).view(-1, 1)
        old = logps(model, rolled.tokens).detach()
        ref = old if reference is None else logps(reference, rolled.tokens).detach()
        k3 = ((ref - old).exp() - (ref - old) - 1)[m].mean()
        history.append(
            {
                "reward": r.mean().item(),
                "informative": differs.float().mean().item(),
                "entropy": -old[m].mean().item(),
                "length": n.float().mean().item(),
                "kl": k3.item() if reference is not None else 0.0,
            }
        )
        for _ in range(updates):
            new = logps(model, rolled.tokens)
            rho = (new - old).exp()
            each = torch.max(-rho * a, -rho.clamp(0.8, 1.2) * a)
            if beta:
                each = each + beta * ((ref - new).exp() - (ref - new) - 1)
            loss = ((each * m).sum(1) / n).mean()
            kept = [p.grad for p in parameters]
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = g
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            for p, g in zip(parameters, kept, strict=True):
                p.grad = p.grad if g is None else g
    return history

# %% right="grpo_train" because="rewards in float64; the first pass, detached, is old_logp" base="pass"
def grpo_train(
    model,
    reference,
    prompts,
    reward,
    *,
    steps,
    batch,
    group,
    max_new_tokens,
    lr,
    generator,
    beta=0.0,
    temperature=1.0,
    updates=1,
    stop=0,
):
    if beta != 0 and reference is None:
        raise ValueError("beta without a reference")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    records = []
    for _ in range(steps):
        picks = torch.randperm(len(prompts), generator=generator)[:batch].tolist()
        chosen = [prompts[i] for i in picks]
        rolled = rollout(model, chosen, group, max_new_tokens, temperature, generator, stop)
        m = rolled.mask
        scores = [float(reward(picks[n // group], a)) for n, a in enumerate(rolled.answers)]
        rewards = torch.tensor(scores, dtype=torch.float64).view(len(picks), group)
        old_logp, ref_logp = None, None
        if reference is not None:
            with torch.no_grad():
                ref_logp = response_logps(reference(rolled.tokens), rolled.tokens, temperature)
        for _ in range(updates):
            logp = response_logps(model(rolled.tokens), rolled.tokens, temperature)
            if old_logp is None:
                old_logp = logp.detach()
            advantages = group_advantages(rewards).flatten().to(logp.dtype)
            optimizer.zero_grad()
            grpo_loss(logp, old_logp, advantages, m, ref_logp=ref_logp, beta=beta).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
            optimizer.step()
        kl = 0.0 if ref_logp is None else kl_penalty(old_logp, ref_logp)[m].mean().item()
        records.append(
            {
                "reward": rewards.mean().item(),
                "informative": (rewards != rewards[:, :1]).any(1).double().mean().item(),
                "entropy": -old_logp[m].mean().item(),
                "length": m.sum(1).float().mean().item(),
                "kl": kl,
            }
        )
    return records

# %% wrong="grpo_train" of="pass" because="old_logp is taken anew in each update"
- if old_logp is None:
-     old_logp = logp.detach()
+ old_logp = logp.detach()

# %% wrong="questions" because="the population deviation, and a clipped gradient"
- "stretch": (7 / 8) / math.sqrt(1 / 8),
- "fence": 1.4,
+ "stretch": (7 / 8) / math.sqrt(7 / 64),
+ "fence": 0.0,

# %% wrong="questions" because="upside down, and only all-right groups"
- "length": 0.1,
- "draws": 1 / (1 - 0.9**8 - 0.1**8),
+ "length": 10.0,
+ "draws": 1 - 0.9**8,

# %% wrong="questions" because="the value that is unbiased, and a termination"
- "estimate": "k3",
- "cut": 0.6,
+ "estimate": "k2",
+ "cut": 0.0,

# %% right="questions" because="by enumeration"
def questions():
    r = torch.tensor([1.0] + [0.0] * 7)
    q = sum(math.comb(8, k) * 0.9**k * 0.1 ** (8 - k) for k in range(1, 8))
    return {
        "stretch": float((r[0] - r.mean()) / r.std()),
        "fence": 7 / 5,
        "length": 100 / 1000,
        "draws": 1 / q,
        "estimate": "k3",
        "cut": 3 / 5,
    }

# %% wrong="ppo_losses" because="tokens with an advantage of 0 count as clipped"
def ppo_losses(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    targets: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    value_clip: float = 0.2,
) -> tuple[Tensor, Tensor, Tensor]:
    padding = ~mask
    logp, values = logp.masked_fill(padding, 0.0), values.masked_fill(padding, 0.0)
    old_logp = old_logp.detach().masked_fill(padding, 0.0)
    advantages = advantages.detach().masked_fill(padding, 0.0)
    old_values = old_values.detach().masked_fill(padding, 0.0)
    targets = targets.detach().masked_fill(padding, 0.0)
    count = mask.sum().clamp(min=1)

    rho = torch.exp(logp - old_logp)
    clipped_rho = rho.clamp(1 - clip, 1 + clip)
    surrogate = torch.minimum(rho * advantages, clipped_rho * advantages)
    held = torch.clamp(values, old_values - value_clip, old_values + value_clip)
    worse = torch.maximum((values - targets) ** 2, (held - targets) ** 2)
    beyond = torch.where(advantages >= 0, rho > 1 + clip, rho < 1 - clip) & mask
    share = beyond.sum().to(logp.dtype) / count
    return -surrogate.sum() / count, 0.5 * worse.sum() / count, share.detach()

# %% wrong="sampler_weights" because="a product of ratios, inf times 0"
def sampler_weights(
    old_logp: Tensor, sampler_logp: Tensor, mask: Tensor, cap: float = 2.0, level: str = "token"
) -> Tensor:
    if level not in ("token", "sequence"):
        raise ValueError(f"unknown level {level!r}")
    gap = (old_logp.detach() - sampler_logp.detach()).masked_fill(~mask, 0.0)
    ratio = gap.exp()
    if level == "sequence":
        ratio = ratio.prod(dim=1, keepdim=True).expand_as(gap)
    return torch.where(mask, ratio.clamp(max=cap), torch.zeros_like(gap))
