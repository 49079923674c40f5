# Right and wrong answers to the exercises of lesson 24: see CONTRIBUTING.md.

# %% wrong="sequence_logprob" because="no shift: logits i are compared with label i"
- targets = labels[:, 1:]
+ targets = labels

- log_p = logits[:, :-1].to(wide).log_softmax(-1)
+ log_p = logits.to(wide).log_softmax(-1)

# %% wrong="sequence_logprob" because="the end token, whose id is 0, is taken for padding"
- counted = targets != IGNORE
+ counted = targets > 0

# %% wrong="sequence_logprob" because="padding counts as token 0"
- total = each.masked_fill(~counted, 0.0).sum(-1)  # 0 · −inf would be NaN
+ total = each.sum(-1)

# %% wrong="sequence_logprob" because="a mask that multiplies: 0 times infinity"
- total = each.masked_fill(~counted, 0.0).sum(-1)  # 0 · −inf would be NaN
+ total = (each * counted).sum(-1)

# %% wrong="sequence_logprob" because="the average is over all positions"
- return total / counted.sum(-1).clamp(min=1) if average else total
+ return total / counted.shape[-1] if average else total

# %% wrong="sequence_logprob" because="the label at position 0 is counted below the line"
- return total / counted.sum(-1).clamp(min=1) if average else total
+ return total / (labels != IGNORE).sum(-1).clamp(min=1) if average else total

# %% wrong="sequence_logprob" because="NaN where nothing counts"
- return total / counted.sum(-1).clamp(min=1) if average else total
+ return total / counted.sum(-1) if average else total

# %% wrong="sequence_logprob" because="always the average"
- return total / counted.sum(-1).clamp(min=1) if average else total
+ return total / counted.sum(-1).clamp(min=1)

# %% wrong="sequence_logprob" because="the log of the softmax, which underflows"
- log_p = logits[:, :-1].to(wide).log_softmax(-1)
+ log_p = logits[:, :-1].to(wide).softmax(-1).log()

# %% wrong="sequence_logprob" because="the softmax is taken in half precision"
- log_p = logits[:, :-1].to(wide).log_softmax(-1)
+ log_p = logits[:, :-1].log_softmax(-1).to(wide)

# %% wrong="sequence_logprob" because="float64 goes through float32"
- wide = torch.promote_types(logits.dtype, torch.float32)
+ wide = torch.float32

# %% right="sequence_logprob" because="cross_entropy with ignore_index"
def sequence_logprob(logits, labels, average=False):
    wide = logits if logits.dtype == torch.float64 else logits.float()
    each = -F.cross_entropy(
        wide[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORE, reduction="none"
    )
    total = each.sum(1)
    if average:
        total = total / (labels[:, 1:] != IGNORE).sum(1).clamp(min=1)
    return total

# %% wrong="optimal_policy" because="the reference is left out"
- reward = reward.masked_fill(ref == 0, -torch.inf)  # what ref excludes stays impossible
- reward = reward - reward.amax(-1, keepdim=True)
- return (ref.log() + reward / beta).softmax(-1)
+ return (reward / beta).softmax(-1)

# %% wrong="optimal_policy" because="the reward is multiplied by beta"
- return (ref.log() + reward / beta).softmax(-1)
+ return (ref.log() + reward * beta).softmax(-1)

# %% wrong="optimal_policy" because="exp overflows"
- reward = reward.masked_fill(ref == 0, -torch.inf)  # what ref excludes stays impossible
- reward = reward - reward.amax(-1, keepdim=True)
- return (ref.log() + reward / beta).softmax(-1)
+ weights = ref * (reward / beta).exp()
+ return weights / weights.sum(-1, keepdim=True)

# %% wrong="optimal_policy" because="normalized over the first axis"
- return (ref.log() + reward / beta).softmax(-1)
+ return (ref.log() + reward / beta).softmax(0)

# %% wrong="optimal_policy" because="an epsilon lets the impossible happen"
- reward = reward.masked_fill(ref == 0, -torch.inf)  # what ref excludes stays impossible
- reward = reward - reward.amax(-1, keepdim=True)
- return (ref.log() + reward / beta).softmax(-1)
+ return ((ref + 1e-8).log() + reward / beta).softmax(-1)

# %% wrong="optimal_policy" because="beta 0 is let through"
- if beta <= 0:
+ if beta < 0:

# %% right="optimal_policy" because="weights of the difference to the best possible answer"
def optimal_policy(ref, reward, beta):
    if not beta > 0:
        raise ValueError("beta must be positive")
    top = reward.masked_fill(ref == 0, -torch.inf).amax(-1, keepdim=True)
    exponent = ((reward - top) / beta).masked_fill(ref == 0, 0.0)
    weights = ref * exponent.exp()
    return weights / weights.sum(-1, keepdim=True)

# %% wrong="dpo_loss" because="chosen and rejected are exchanged"
- h = chosen - rejected
+ h = rejected - chosen

# %% wrong="dpo_loss" because="the reference is left out of the loss"
- h = chosen - rejected
+ h = beta * (policy_chosen - policy_rejected)

# %% wrong="dpo_loss" because="beta is left out of the rewards"
- return losses.mean(), chosen.detach(), rejected.detach()
+ return losses.mean(), chosen.detach() / beta, rejected.detach() / beta

# %% wrong="dpo_loss" because="the log of sigmoid, which underflows"
- losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
+ p = torch.sigmoid(h)
+ losses = -(1 - label_smoothing) * p.log() - label_smoothing * (1 - p).log()

# %% wrong="dpo_loss" because="robust DPO in place of cDPO"
- losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
+ losses = -(1 - label_smoothing) * F.logsigmoid(h) + label_smoothing * F.logsigmoid(-h)
+ losses = losses / (1 - 2 * label_smoothing)

# %% wrong="dpo_loss" because="smoothing is ignored"
- losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
+ losses = -F.logsigmoid(h)

# %% wrong="dpo_loss" because="the sum over the batch"
- return losses.mean(), chosen.detach(), rejected.detach()
+ return losses.sum(), chosen.detach(), rejected.detach()

# %% wrong="dpo_loss" because="the rewards carry a graph"
- return losses.mean(), chosen.detach(), rejected.detach()
+ return losses.mean(), chosen, rejected

# %% wrong="dpo_loss" because="a gradient goes to the reference"
- chosen = beta * (policy_chosen - ref_chosen.detach())
+ chosen = beta * (policy_chosen - ref_chosen)

# %% wrong="dpo_loss" because="beta is always 0.1"
- chosen = beta * (policy_chosen - ref_chosen.detach())
- rejected = beta * (policy_rejected - ref_rejected.detach())
+ chosen = 0.1 * (policy_chosen - ref_chosen.detach())
+ rejected = 0.1 * (policy_rejected - ref_rejected.detach())

# %% right="dpo_loss" because="cross-entropy with a soft label"
def dpo_loss(pc, pr, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0):
    with torch.no_grad():
        chosen, rejected = beta * (pc - ref_chosen), beta * (pr - ref_rejected)
    h = beta * ((pc - pr) - (ref_chosen - ref_rejected).detach())
    soft = torch.full_like(h, 1 - label_smoothing)
    return F.binary_cross_entropy_with_logits(h, soft), chosen, rejected

# %% wrong="logprob_rates" because="the mean is not subtracted: logits, not log-probabilities"
- return (weight * (along - log_p.exp() @ along)).detach()
+ return (weight * along).detach()

# %% wrong="logprob_rates" because="a plain mean over the answers, not under the policy"
- return (weight * (along - log_p.exp() @ along)).detach()
+ return (weight * (along - along.mean())).detach()

# %% wrong="logprob_rates" because="the weight lacks beta"
- weight = beta * torch.sigmoid(reward[rejected] - reward[chosen])
+ weight = torch.sigmoid(reward[rejected] - reward[chosen])

# %% wrong="logprob_rates" because="the weight is large for pairs that are right already"
- weight = beta * torch.sigmoid(reward[rejected] - reward[chosen])
+ weight = beta * torch.sigmoid(reward[chosen] - reward[rejected])

# %% wrong="logprob_rates" because="the rewards lack the reference"
- reward = beta * (log_p - ref_logp)
+ reward = beta * log_p

# %% wrong="logprob_rates" because="uphill"
- along = features @ (features[chosen] - features[rejected])
+ along = features @ (features[rejected] - features[chosen])

# %% wrong="logprob_rates" because="a graph is left on the result"
- return (weight * (along - log_p.exp() @ along)).detach()
+ return weight * (along - log_p.exp() @ along)

# %% right="logprob_rates" because="autograd, then a directional derivative"
def logprob_rates(features, theta, ref_logp, chosen, rejected, beta=0.1):
    theta = theta.detach().clone().requires_grad_()
    log_p = (features @ theta).log_softmax(0)
    gap = (log_p[chosen] - ref_logp[chosen]) - (log_p[rejected] - ref_logp[rejected])
    (slope,) = torch.autograd.grad(F.softplus(-beta * gap), theta)
    p = (features @ theta).softmax(0).detach()
    return -(features - p @ features) @ slope

# %% wrong="sample_preferences" because="the worse answer is chosen"
- wins = torch.sigmoid(reward[prompt, first] - reward[prompt, second])
+ wins = torch.sigmoid(reward[prompt, second] - reward[prompt, first])

# %% wrong="sample_preferences" because="a judge without noise"
- wins = torch.sigmoid(reward[prompt, first] - reward[prompt, second])
+ wins = (reward[prompt, first] > reward[prompt, second]).float()

# %% wrong="sample_preferences" because="an answer may meet itself"
- first, second = torch.multinomial(p, 2, generator=generator).unbind(1)  # no replacement
+ first, second = torch.multinomial(p, 2, True, generator=generator).unbind(1)

# %% wrong="sample_preferences" because="uniform pairs, whatever the policy"
- p = logp.detach().cpu().exp()[prompt]
+ p = torch.ones_like(logp)[prompt]

# %% wrong="sample_preferences" because="labels from a generator of its own"
- first_wins = torch.rand(count, generator=generator) < wins
+ first_wins = torch.rand(count, generator=torch.Generator().manual_seed(0)) < wins

# %% wrong="sample_preferences" because="always the first prompt"
- prompt = torch.randint(len(logp), (count,), generator=generator)
+ prompt = torch.zeros(count, dtype=torch.int64)

# %% wrong="sample_preferences" because="one prompt after the other"
- prompt = torch.randint(len(logp), (count,), generator=generator)
+ prompt = torch.arange(count) % len(logp)

# %% wrong="sample_preferences" because="log-probabilities taken for probabilities"
- p = logp.detach().cpu().exp()[prompt]
+ p = logp.detach().cpu().abs()[prompt]

# %% right="sample_preferences" because="one draw after the other"
def sample_preferences(logp, reward, count, generator):
    prompt = torch.randint(len(logp), (count,), generator=generator)
    if count == 0:
        return prompt, prompt, prompt
    p = logp.softmax(-1)[prompt]
    first = torch.multinomial(p, 1, generator=generator)
    second = torch.multinomial(p.scatter(1, first, 0.0), 1, generator=generator)
    first, second = first[:, 0], second[:, 0]
    gap = reward[prompt, first] - reward[prompt, second]
    keep = torch.bernoulli(torch.sigmoid(gap), generator=generator).bool()
    return prompt, torch.where(keep, first, second), torch.where(keep, second, first)

# %% wrong="train_dpo" because="the reference is the model itself"
- reference = copy.deepcopy(model)
+ reference = model

# %% wrong="train_dpo" because="a given reference is ignored"
- if reference is None:
+ if True:

# %% wrong="train_dpo" because="a stale gradient counts in the first step"
- optimizer.zero_grad()
- loss.backward()
- optimizer.step()
+ loss.backward()
+ optimizer.step()
+ optimizer.zero_grad()

# %% wrong="train_dpo" because="gradients add up over the steps"
- optimizer.zero_grad()
- loss.backward()
+ if not history[1:]:
+     optimizer.zero_grad()
+ loss.backward()

# %% wrong="train_dpo" because="AdamW with its default weight decay"
- optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
+ optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

# %% wrong="train_dpo" because="a new optimizer for each batch"
- optimizer.zero_grad()
- loss.backward()
+ optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
+ optimizer.zero_grad()
+ loss.backward()

# %% wrong="train_dpo" because="the objective is ignored"
- loss = objective(*policy, *ref, *lengths)
+ loss = dpo_loss(*policy, *ref, beta=beta)[0]

# %% wrong="train_dpo" because="beta is ignored"
- return dpo_loss(*given[:4], beta=beta)[0]
+ return dpo_loss(*given[:4])[0]

# %% wrong="train_dpo" because="average log-probabilities"
- policy = [
-     sequence_logprob(model(tokens), labels)
+ policy = [
+     sequence_logprob(model(tokens), labels, True)

# %% wrong="train_dpo" because="padded lengths"
- (labels[:, 1:] != IGNORE).sum(-1).to(policy[0].dtype) for labels in (labels_w, labels_l)
+ torch.full_like(policy[0], labels.shape[1] - 1) for labels in (labels_w, labels_l)

# %% wrong="train_dpo" because="the model is left in training mode"
- history = []
+ history = []
+ model.train()

# %% wrong="train_dpo" because="chosen and rejected are exchanged"
- for tokens_w, labels_w, tokens_l, labels_l in batches:
+ for tokens_l, labels_l, tokens_w, labels_w in batches:

# %% wrong="train_dpo" because="the gap is reported without the reference"
- gap = ((policy[0] - ref[0]) - (policy[1] - ref[1])).detach()
+ gap = (policy[0] - policy[1]).detach()

# %% wrong="train_dpo" because="the reference takes part in training mode and gets frozen for good"
- history = []
+ history = []
+ reference.train().requires_grad_(False)

# %% right="train_dpo" because="one forward pass for chosen and rejected together"
def train_dpo(model, batches, *, lr, beta=0.1, reference=None, objective=None):
    frozen = copy.deepcopy(model if reference is None else reference)
    for parameter in model.parameters():
        parameter.grad = None
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)
    history = []
    for batch in batches:
        width = max(batch[0].shape[1], batch[2].shape[1])
        rows = len(batch[0])

        def both(a, b, fill, width=width):
            parts = [F.pad(t, (0, width - t.shape[1]), value=fill) for t in (a, b)]
            return torch.cat(parts)

        tokens, labels = both(batch[0], batch[2], 0), both(batch[1], batch[3], IGNORE)
        policy = sequence_logprob(model(tokens), labels)
        with torch.no_grad():
            ref = sequence_logprob(frozen(tokens), labels)
        length = (labels[:, 1:] != IGNORE).sum(1).to(policy.dtype)
        six = [t for pair in (policy, ref, length) for t in (pair[:rows], pair[rows:])]
        loss = dpo_loss(*six[:4], beta)[0] if objective is None else objective(*six)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gap = (policy - ref).detach()
        gap = gap[:rows] - gap[rows:]
        history.append(
            {
                "loss": float(loss),
                "chosen": float(policy[:rows].mean()),
                "rejected": float(policy[rows:].mean()),
                "gap": float(gap.mean()),
                "accuracy": float((gap > 0).double().mean()),
            }
        )
    return history

# %% wrong="train_dpo" because="a gap of 0 counts as a pair ordered rightly"
- "accuracy": (gap > 0).double().mean().item(),
+ "accuracy": (gap >= 0).double().mean().item(),

# %% wrong="ipo_loss" because="a target of 1/tau"
- return (chosen - rejected - 1 / (2 * tau)).square().mean()
+ return (chosen - rejected - 1 / tau).square().mean()

# %% wrong="ipo_loss" because="the target as Python reads 1 / 2 * tau"
- return (chosen - rejected - 1 / (2 * tau)).square().mean()
+ return (chosen - rejected - 1 / 2 * tau).square().mean()

# %% wrong="ipo_loss" because="lengths are ignored"
- if chosen_length is not None:
+ if False:

# %% wrong="ipo_loss" because="the lengths are exchanged"
- chosen, rejected = chosen / chosen_length, rejected / rejected_length
+ chosen, rejected = chosen / rejected_length, rejected / chosen_length

# %% wrong="ipo_loss" because="the sum over the batch"
- return (chosen - rejected - 1 / (2 * tau)).square().mean()
+ return (chosen - rejected - 1 / (2 * tau)).square().sum()

# %% wrong="ipo_loss" because="the gap is divided by the mean length"
- chosen, rejected = chosen / chosen_length, rejected / rejected_length
+ chosen = 2 * chosen / (chosen_length + rejected_length)
+ rejected = 2 * rejected / (chosen_length + rejected_length)

# %% right="ipo_loss" because="the square written out"
def ipo_loss(pc, pr, rc, rr, chosen_length=None, rejected_length=None, tau=0.1):
    one = torch.ones_like(pc)
    n, m = (one, one) if chosen_length is None else (chosen_length, rejected_length)
    gap = pc / n - pr / m - (rc / n - rr / m).detach()
    return F.mse_loss(gap, torch.full_like(gap, 0.5 / tau))

# %% wrong="simpo_loss" because="the margin has the wrong sign"
- return -F.logsigmoid(beta * gap - gamma).mean()
+ return -F.logsigmoid(beta * gap + gamma).mean()

# %% wrong="simpo_loss" because="the margin is multiplied by beta"
- return -F.logsigmoid(beta * gap - gamma).mean()
+ return -F.logsigmoid(beta * (gap - gamma)).mean()

# %% wrong="simpo_loss" because="sums, not means"
- gap = policy_chosen / chosen_length - policy_rejected / rejected_length
+ gap = policy_chosen - policy_rejected

# %% wrong="simpo_loss" because="an NLL term"
- return -F.logsigmoid(beta * gap - gamma).mean()
+ return (-F.logsigmoid(beta * gap - gamma) - policy_chosen / chosen_length).mean()

# %% wrong="simpo_loss" because="the log of sigmoid"
- return -F.logsigmoid(beta * gap - gamma).mean()
+ return -torch.sigmoid(beta * gap - gamma).log().mean()

# %% right="simpo_loss" because="softplus"
def simpo_loss(pc, pr, chosen_length, rejected_length, beta=2.0, gamma=1.0):
    scores = [beta * t / n for t, n in ((pc, chosen_length), (pr, rejected_length))]
    return F.softplus(gamma + scores[1] - scores[0]).mean()

# %% wrong="orpo_loss" because="log(1 - exp(x)) as it is written"
- near = x > -math.log(2)
- # Each formula sees only what it is good for: else the gradient of the other could be NaN.
- small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
- large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
- return torch.where(near, small, large)
+ return torch.log(1 - torch.exp(x))

# %% wrong="orpo_loss" because="log1p alone, as library code has it"
- near = x > -math.log(2)
- # Each formula sees only what it is good for: else the gradient of the other could be NaN.
- small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
- large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
- return torch.where(near, small, large)
+ return torch.log1p(-torch.exp(x))

# %% wrong="orpo_loss" because="where without care: NaN gradients"
- small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
- large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
+ small = torch.log(-torch.expm1(x))
+ large = torch.log1p(-torch.exp(x))

# %% wrong="orpo_loss" because="the two formulas exchanged"
- return torch.where(near, small, large)
+ return torch.where(near, large, small)

# %% wrong="orpo_loss" because="ratio of probabilities, not of odds"
- log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
+ log_odds = chosen - rejected

# %% wrong="orpo_loss" because="the sign of log(1 - p)"
- log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
+ log_odds = (chosen + log1mexp(chosen)) - (rejected + log1mexp(rejected))

# %% wrong="orpo_loss" because="odds of the whole response"
- log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
+ a, b = policy_chosen, policy_rejected
+ log_odds = (a - log1mexp(a)) - (b - log1mexp(b))

# %% wrong="orpo_loss" because="no NLL"
- return (-chosen - weight * F.logsigmoid(log_odds)).mean()
+ return (-weight * F.logsigmoid(log_odds)).mean()

# %% wrong="orpo_loss" because="the NLL over the batch's tokens"
- return (-chosen - weight * F.logsigmoid(log_odds)).mean()
+ nll = -policy_chosen.sum() / chosen_length.sum()
+ return nll - weight * F.logsigmoid(log_odds).mean()

# %% wrong="orpo_loss" because="the penalty is added with the wrong sign"
- return (-chosen - weight * F.logsigmoid(log_odds)).mean()
+ return (-chosen + weight * F.logsigmoid(log_odds)).mean()

# %% right="orpo_loss" because="masked assignment, and softplus"
def log1mexp(x):
    near = x > -0.6931
    out = torch.empty_like(x)
    out = out.masked_scatter(near, torch.log(-torch.expm1(x[near])))
    return out.masked_scatter(~near, torch.log1p(-torch.exp(x[~near])))


def orpo_loss(policy_chosen, policy_rejected, chosen_length, rejected_length, weight=0.1):
    logits = []
    for logp, length in ((policy_chosen, chosen_length), (policy_rejected, rejected_length)):
        mean = logp / length
        logits.append(mean - log1mexp(mean))
    nll = -(policy_chosen / chosen_length).mean()
    return nll + weight * F.softplus(logits[1] - logits[0]).mean()

# %% wrong="kto_loss" because="the batch is reversed: the middle one of three keeps its own"
- return list(prompts), [responses[-1], *responses[:-1]]
+ return list(prompts), responses[::-1]

# %% wrong="kto_loss" because="cycled the other way"
- return list(prompts), [responses[-1], *responses[:-1]]
+ return list(prompts), [*responses[1:], responses[0]]

# %% wrong="kto_loss" because="the list of the caller is cycled"
- return list(prompts), [responses[-1], *responses[:-1]]
+ responses.insert(0, responses.pop())
+ return list(prompts), responses

# %% wrong="kto_loss" because="one prompt is paired with its own answer"
- if len(prompts) < 2 or len(prompts) != len(responses):
+ if not prompts or len(prompts) != len(responses):

# %% wrong="kto_loss" because="a gradient goes through z0"
- z0 = (policy_mismatched - ref_mismatched).detach().mean().clamp(min=0)
+ z0 = (policy_mismatched - ref_mismatched).mean().clamp(min=0)

# %% wrong="kto_loss" because="the maximum is taken for each pair"
- z0 = (policy_mismatched - ref_mismatched).detach().mean().clamp(min=0)
+ z0 = (policy_mismatched - ref_mismatched).detach().clamp(min=0).mean()

# %% wrong="kto_loss" because="z0 may be negative"
- z0 = (policy_mismatched - ref_mismatched).detach().mean().clamp(min=0)
+ z0 = (policy_mismatched - ref_mismatched).detach().mean()

# %% wrong="kto_loss" because="z0 from the matched answers"
- z0 = (policy_mismatched - ref_mismatched).detach().mean().clamp(min=0)
+ z0 = (policy - ref).detach().mean().clamp(min=0)

# %% wrong="kto_loss" because="the sign of z0 does not change for undesirable answers"
- undesirable_weight * torch.sigmoid(value),
+ undesirable_weight * torch.sigmoid(value + 2 * beta * z0),

# %% wrong="kto_loss" because="the value is minimized"
- desirable_weight * torch.sigmoid(-value),  # 1 − σ(v) = σ(−v)
- undesirable_weight * torch.sigmoid(value),
+ desirable_weight * torch.sigmoid(value),
+ undesirable_weight * torch.sigmoid(-value),

# %% wrong="kto_loss" because="minus log sigmoid, as in DPO"
- desirable_weight * torch.sigmoid(-value),  # 1 − σ(v) = σ(−v)
- undesirable_weight * torch.sigmoid(value),
+ -desirable_weight * F.logsigmoid(value),
+ -undesirable_weight * F.logsigmoid(-value),

# %% wrong="kto_loss" because="the weights are ignored"
- desirable_weight * torch.sigmoid(-value),  # 1 − σ(v) = σ(−v)
- undesirable_weight * torch.sigmoid(value),
+ torch.sigmoid(-value),
+ torch.sigmoid(value),

# %% right="kto_loss" because="a sign and a weight for each answer; roll by one"
def mismatched(prompts, responses):
    n = len(prompts)
    if n < 2 or n != len(responses):
        raise ValueError("two or more prompts, each with a response")
    return prompts[:], [responses[(i - 1) % n] for i in range(n)]


def kto_loss(
    policy,
    ref,
    desirable,
    policy_mismatched,
    ref_mismatched,
    beta=0.1,
    desirable_weight=1.0,
    undesirable_weight=1.0,
):
    with torch.no_grad():
        z0 = F.relu(policy_mismatched.mean() - ref_mismatched.mean())
        good = desirable.to(policy.dtype)
        sign = 2 * good - 1
        weight = desirable_weight * good + undesirable_weight * (1 - good)
        anchor = ref + z0
    value = weight * torch.sigmoid(beta * sign * (policy - anchor))
    return (weight - value).mean(), z0

# %% wrong="questions" because="the weight without beta"
- "weight": 0.2 / (1 + math.exp(-2.0)),
+ "weight": 1 / (1 + math.exp(-2.0)),

# %% wrong="questions" because="cDPO's number"
- "robust": (0.8 * up - 0.2 * down) / 0.6,
+ "robust": 0.8 * up + 0.2 * down,

# %% wrong="questions" because="the gap of rewards, not of log-ratios"
- "stop": math.log(0.8 / 0.2) / 0.5,
+ "stop": math.log(0.8 / 0.2),

# %% wrong="questions" because="gigabytes"
- "memory": 7e9 * 2 / 2**30,
+ "memory": 7e9 * 2 / 1e9,

# %% wrong="questions" because="Z is not the same for all prompts"
- "cancels": "prompt",
+ "cancels": "constant",

# %% right="questions" because="numbers by hand"
def questions():
    return {"weight": 0.17616, "robust": 0.37968, "stop": 2.7726, "memory": 13.04, "cancels": "prompt"}
