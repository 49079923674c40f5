# Right and wrong answers to the exercises of lesson 33: see CONTRIBUTING.md.

# %% wrong="distillation_loss" because="no τ²"
- return alpha * temperature**2 * soft + (1 - alpha) * hard
+ return alpha * soft + (1 - alpha) * hard

# %% wrong="distillation_loss" because="τ in place of τ²"
- return alpha * temperature**2 * soft + (1 - alpha) * hard
+ return alpha * temperature * soft + (1 - alpha) * hard

# %% wrong="distillation_loss" because="the weights are exchanged"
- return alpha * temperature**2 * soft + (1 - alpha) * hard
+ return (1 - alpha) * temperature**2 * soft + alpha * hard

# %% wrong="distillation_loss" because="the hard part has the temperature too"
- hard = F.cross_entropy(z, labels[counts], reduction="sum") / n
+ hard = F.cross_entropy(z / temperature, labels[counts], reduction="sum") / n

# %% wrong="distillation_loss" because="KL(student‖teacher)"
- soft = (log_p.exp() * (log_p - log_q)).sum() / n
+ soft = (log_q.exp() * (log_q - log_p)).sum() / n

# %% wrong="distillation_loss" because="cross-entropy with the teacher instead of the KL"
- soft = (log_p.exp() * (log_p - log_q)).sum() / n
+ soft = -(log_p.exp() * log_q).sum() / n

# %% wrong="distillation_loss" because="the temperature is the student's only"
- log_p = (z_teacher / temperature).log_softmax(-1)
+ log_p = z_teacher.log_softmax(-1)

# %% wrong="distillation_loss" because="a gradient to the teacher"
- z, z_teacher = wide(student[counts]), wide(teacher[counts]).detach()
+ z, z_teacher = wide(student[counts]), wide(teacher[counts])

# %% wrong="distillation_loss" because="the soft part also counts ignored tokens"
def distillation_loss(student, teacher, labels, temperature=1.0, alpha=0.5):
    log_q = (wide(student) / temperature).log_softmax(-1)
    log_p = (wide(teacher).detach() / temperature).log_softmax(-1)
    soft = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    hard = F.cross_entropy(wide(student).flatten(0, 1), labels.flatten())
    return alpha * temperature**2 * soft + (1 - alpha) * hard

# %% wrong="distillation_loss" because="NaN without tokens"
- n = counts.sum().clamp(min=1)
+ n = counts.sum()

# %% wrong="distillation_loss" because="batchmean: divided by rows"
- n = counts.sum().clamp(min=1)
+ n = len(labels)

# %% wrong="distillation_loss" because="logarithm of a softmax"
- log_q = (z / temperature).log_softmax(-1)
+ log_q = (z / temperature).softmax(-1).log()

# %% wrong="distillation_loss" because="bfloat16 all the way"
- z, z_teacher = wide(student[counts]), wide(teacher[counts]).detach()
+ z, z_teacher = student[counts], teacher[counts].detach()

# %% wrong="distillation_loss" because="hidden after the softmax: NaN in the gradient"
- log_q = (z / temperature).log_softmax(-1)
+ log_q = (wide(student) / temperature).log_softmax(-1)[counts]

# %% wrong="distillation_loss" because="both parts hidden at the end: NaN in the gradient"
def distillation_loss(student, teacher, labels, temperature=1.0, alpha=0.5):
    counts = labels != IGNORE
    z, z_teacher = wide(student), wide(teacher).detach()
    log_q = F.log_softmax(z / temperature, dim=-1)
    log_p = F.log_softmax(z_teacher / temperature, dim=-1)
    soft = (log_p.exp() * (log_p - log_q)).sum(-1)
    target = labels.masked_fill(~counts, 0)
    hard = -F.log_softmax(z, dim=-1).gather(-1, target[..., None])[..., 0]
    each = alpha * temperature**2 * soft + (1 - alpha) * hard
    return torch.where(counts, each, torch.zeros_like(each)).sum() / counts.sum().clamp(min=1)

# %% wrong="distillation_loss" because="bfloat16 is divided by the temperature before it is widened"
- log_q = (z / temperature).log_softmax(-1)
- log_p = (z_teacher / temperature).log_softmax(-1)
+ log_q = wide(student[counts] / temperature).log_softmax(-1)
+ log_p = wide(teacher[counts] / temperature).detach().log_softmax(-1)

# %% right="distillation_loss" because="masked_fill and PyTorch's kl_div"
def distillation_loss(student, teacher, labels, temperature=1.0, alpha=0.5):
    out = (labels == IGNORE)[..., None]
    s, t = wide(student).masked_fill(out, 0), wide(teacher).detach().masked_fill(out, 0)
    n = max(int((~out).sum()), 1)
    each = F.kl_div(
        F.log_softmax(s / temperature, -1),
        F.log_softmax(t / temperature, -1),
        reduction="none",
        log_target=True,
    ).masked_fill(out, 0)
    hard = F.cross_entropy(
        s.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return (alpha * temperature**2 * each.sum() + (1 - alpha) * hard) / n

# %% wrong="token_kl" because="the directions are exchanged"
- if reverse:
+ if not reverse:

# %% wrong="token_kl" because="reverse is ignored"
- if reverse:
-     log_p, log_q = log_q, log_p

# %% wrong="token_kl" because="batchmean: divided by rows"
- return (log_p.exp() * (log_p - log_q)).sum() / mask.sum().clamp(min=1)
+ return (log_p.exp() * (log_p - log_q)).sum() / len(mask)

# %% wrong="token_kl" because="a mean over the vocabulary too"
- return (log_p.exp() * (log_p - log_q)).sum() / mask.sum().clamp(min=1)
+ return (log_p.exp() * (log_p - log_q)).mean() if mask.any() else log_q.sum()

# %% wrong="token_kl" because="a mean over rows of means"
def token_kl(student, teacher, mask, reverse=False):
    out = ~mask[..., None]
    log_q = wide(student).masked_fill(out, 0).log_softmax(-1)
    log_p = wide(teacher).detach().masked_fill(out, 0).log_softmax(-1)
    if reverse:
        log_p, log_q = log_q, log_p
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    return ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()

# %% wrong="token_kl" because="masked by a product: NaN stays"
def token_kl(student, teacher, mask, reverse=False):
    log_q = wide(student).log_softmax(-1)
    log_p = wide(teacher).detach().log_softmax(-1)
    if reverse:
        log_p, log_q = log_q, log_p
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (each * mask).sum() / mask.sum().clamp(min=1)

# %% wrong="token_kl" because="a gradient to the teacher"
- log_p = wide(teacher[mask]).detach().log_softmax(-1)
+ log_p = wide(teacher[mask]).log_softmax(-1)

# %% wrong="token_kl" because="the expectation is detached"
- return (log_p.exp() * (log_p - log_q)).sum() / mask.sum().clamp(min=1)
+ return (log_p.exp().detach() * (log_p - log_q)).sum() / mask.sum().clamp(min=1)

# %% wrong="token_kl" because="logarithm of a softmax"
- log_q = wide(student[mask]).log_softmax(-1)
+ log_q = wide(student[mask]).softmax(-1).log()

# %% wrong="token_kl" because="in bits"
- return (log_p.exp() * (log_p - log_q)).sum() / mask.sum().clamp(min=1)
+ return (log_p.exp() * (log_p - log_q)).sum() / mask.sum().clamp(min=1) / math.log(2)

# %% wrong="token_kl" because="NaN without tokens"
- return (log_p.exp() * (log_p - log_q)).sum() / mask.sum().clamp(min=1)
+ return (log_p.exp() * (log_p - log_q)).sum() / mask.sum()

# %% wrong="token_kl" because="hidden after the softmax: NaN in the gradient"
- log_q = wide(student[mask]).log_softmax(-1)
+ log_q = wide(student).log_softmax(-1)[mask]

# %% right="token_kl" because="PyTorch's kl_div"
def token_kl(student, teacher, mask, reverse=False):
    s, t = (F.log_softmax(wide(x[mask]), dim=-1) for x in (student, teacher.detach()))
    target, given = (s, t) if reverse else (t, s)
    total = F.kl_div(given, target, reduction="sum", log_target=True)
    return total / max(int(mask.sum()), 1)

# %% wrong="generalized_jsd" because="no special cases: 0 at both ends"
- if beta == 0:
-     return kl(log_p, log_q)
- if beta == 1:
-     return kl(log_q, log_p)
- log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
+ log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()

# %% wrong="generalized_jsd" because="student and teacher exchanged"
- log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
- return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
+ log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
+ return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)

# %% wrong="generalized_jsd" because="the mixture has exchanged weights"
- log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
+ log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))

# %% wrong="generalized_jsd" because="a mixture of logarithms"
- log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
+ log_m = beta * log_p + (1 - beta) * log_q

# %% wrong="generalized_jsd" because="a beta of NaN passes"
- if not 0 <= beta <= 1:
+ if beta < 0 or beta > 1:

# %% right="generalized_jsd" because="the mixture is detached, whose gradient is 0 anyway"
- return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
+ return beta * kl(log_p, log_m.detach()) + (1 - beta) * kl(log_q, log_m.detach())

# %% wrong="generalized_jsd" because="KL from the mixture instead of to it"
- return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
+ return beta * kl(log_m, log_p) + (1 - beta) * kl(log_m, log_q)

# %% wrong="generalized_jsd" because="the KL divergences themselves are mixed"
- return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
+ return (1 - beta) * kl(log_p, log_q) + beta * kl(log_q, log_p)

# %% wrong="generalized_jsd" because="the ends are exchanged"
- if beta == 0:
-     return kl(log_p, log_q)
- if beta == 1:
-     return kl(log_q, log_p)
+ if beta == 1:
+     return kl(log_p, log_q)
+ if beta == 0:
+     return kl(log_q, log_p)

# %% wrong="generalized_jsd" because="a mixture of probabilities: its logarithm overflows"
- log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
+ log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()

# %% wrong="generalized_jsd" because="a gradient to the teacher"
- log_p = wide(teacher[mask]).detach().log_softmax(-1)
+ log_p = wide(teacher[mask]).log_softmax(-1)

# %% wrong="generalized_jsd" because="any beta is taken"
- if not 0 <= beta <= 1:
-     raise ValueError(f"beta is from 0 to 1, not {beta}")
+ beta = min(max(beta, 0), 1)

# %% wrong="generalized_jsd" because="batchmean: divided by rows"
- return (a.exp() * (a - b)).sum() / mask.sum().clamp(min=1)
+ return (a.exp() * (a - b)).sum() / len(mask)

# %% wrong="generalized_jsd" because="hidden after the softmax: NaN in the gradient"
- log_q = wide(student[mask]).log_softmax(-1)
+ log_q = wide(student).log_softmax(-1)[mask]

# %% right="generalized_jsd" because="a mixture of probabilities, kept off 0 and detached"
- log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
+ m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).detach()
+ log_m = m.clamp(min=torch.finfo(m.dtype).tiny).log()

# %% right="generalized_jsd" because="logsumexp of a stack, hidden by masked_fill"
def generalized_jsd(student, teacher, mask, beta):
    if not (0 <= beta and beta <= 1):
        raise ValueError("beta is a weight")
    out = ~mask[..., None]
    s = F.log_softmax(wide(student).masked_fill(out, 0), -1)
    t = F.log_softmax(wide(teacher).detach().masked_fill(out, 0), -1)
    if beta in (0, 1):
        a, b = (t, s) if beta == 0 else (s, t)
        each = F.kl_div(b, a, reduction="none", log_target=True)
    else:
        weights = torch.tensor([beta, 1 - beta], dtype=s.dtype).log()[:, None, None, None]
        m = torch.logsumexp(torch.stack([t, s]) + weights, dim=0)
        each = beta * F.kl_div(m, t, reduction="none", log_target=True)
        each = each + (1 - beta) * F.kl_div(m, s, reduction="none", log_target=True)
    return each.masked_fill(out, 0).sum() / max(int(mask.sum()), 1)

# %% wrong="top_k_kl" because="the rest is left out"
- loss = loss + (torch.xlogy(p_rest, p_rest) - p_rest * log_q_rest).sum()
+ loss = loss + 0 * p_rest.sum()

# %% wrong="top_k_kl" because="both are renormalized"
def top_k_kl(student, top_logp, top_index, mask):
    log_q = student[mask].gather(-1, top_index[mask]).log_softmax(-1)
    log_p = top_logp[mask].detach().to(student.dtype).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum() / mask.sum().clamp(min=1)

# %% wrong="top_k_kl" because="the teacher's k are renormalized"
- log_p = top_logp[mask].detach().to(student.dtype)
+ log_p = top_logp[mask].detach().to(student.dtype).log_softmax(-1)

# %% wrong="top_k_kl" because="the student's tail by subtraction"
- log_q_rest = log_q.scatter(-1, index, -math.inf).logsumexp(-1)
+ log_q_rest = (1 - log_q.gather(-1, index).exp().sum(-1)).log()

# %% wrong="top_k_kl" because="the rest is spread evenly over the other tokens"
- loss = loss + (torch.xlogy(p_rest, p_rest) - p_rest * log_q_rest).sum()
+ n = log_q.shape[-1] - index.shape[-1]
+ others = log_q.scatter(-1, index, 0.0).sum(-1) / n
+ loss = loss + (torch.xlogy(p_rest, p_rest / n) - p_rest * others).sum()

# %% wrong="top_k_kl" because="a negative rest where the sum is above 1"
- p_rest = (1 - log_p.exp().sum(-1)).clamp(min=0)
+ p_rest = 1 - log_p.exp().sum(-1)

# %% wrong="top_k_kl" because="0 times −∞ without a rest"
- if index.shape[-1] < log_q.shape[-1]:
+ if True:

# %% wrong="top_k_kl" because="ids are ignored: the first k tokens"
- loss = (log_p.exp() * (log_p - log_q.gather(-1, index))).sum()
+ index = torch.arange(index.shape[-1]).expand_as(index)
+ loss = (log_p.exp() * (log_p - log_q.gather(-1, index))).sum()

# %% wrong="top_k_kl" because="divided by all tokens"
- return loss / mask.sum().clamp(min=1)
+ return loss / mask.numel()

# %% wrong="top_k_kl" because="a gradient to the teacher"
- log_p = top_logp[mask].detach().to(student.dtype)
+ log_p = top_logp[mask].to(student.dtype)

# %% wrong="top_k_kl" because="computed in the format of storage"
- log_p = top_logp[mask].detach().to(student.dtype)
+ log_p = top_logp[mask].detach()
- p_rest = (1 - log_p.exp().sum(-1)).clamp(min=0)
+ p_rest = (1 - log_p.exp().sum(-1)).clamp(min=0).to(student.dtype)

# %% wrong="top_k_kl" because="an excess over 1 is taken as a rest"
- p_rest = (1 - log_p.exp().sum(-1)).clamp(min=0)
+ p_rest = (1 - log_p.exp().sum(-1)).abs()

# %% wrong="top_k_kl" because="hidden after the softmax: NaN in the gradient"
- log_q = student[mask].log_softmax(-1)
+ log_q = student.log_softmax(-1)[mask]

# %% wrong="top_k_kl" because="the k tokens are hidden with -10,000, above a tail far below"
- log_q_rest = log_q.scatter(-1, index, -math.inf).logsumexp(-1)
+ log_q_rest = log_q.scatter(-1, index, -1e4).logsumexp(-1)

# %% right="top_k_kl" because="k + 1 outcomes as one vector"
def top_k_kl(student, top_logp, top_index, mask):
    losses = [student[mask].sum() * 0]
    for z, p_log, kept in zip(student[mask], top_logp[mask].detach(), top_index[mask], strict=True):
        q, p_log = z.log_softmax(0), p_log.to(z.dtype)
        other = torch.ones(len(z), dtype=torch.bool)
        other[kept] = False
        a, b = p_log, q[kept]
        rest = 1 - p_log.double().exp().sum()
        if other.any() and rest > 0:
            a = torch.cat([a, rest.log()[None].to(z.dtype)])
            b = torch.cat([b, q[other].logsumexp(0)[None]])
        losses.append((a.exp() * (a - b)).sum())
    return torch.stack(losses).sum() / max(len(losses) - 1, 1)

# %% wrong="on_policy_loss" because="one position too late"
- log_q = wide(student(tokens)[:, prompts.shape[1] - 1 : -1]).log_softmax(-1)
+ log_q = wide(student(tokens)[:, prompts.shape[1] :]).log_softmax(-1)
- z_teacher = teacher(tokens)[:, prompts.shape[1] - 1 : -1]
+ z_teacher = teacher(tokens)[:, prompts.shape[1] :]

# %% wrong="on_policy_loss" because="the prompt counts too"
- log_q = wide(student(tokens)[:, prompts.shape[1] - 1 : -1]).log_softmax(-1)
+ log_q = wide(student(tokens)[:, :-1]).log_softmax(-1)
- z_teacher = teacher(tokens)[:, prompts.shape[1] - 1 : -1]
+ z_teacher = teacher(tokens)[:, :-1]

# %% wrong="on_policy_loss" because="the teacher writes"
- probabilities = wide(student(tokens)[:, -1]).softmax(-1)
+ probabilities = wide(teacher(tokens)[:, -1]).softmax(-1)

# %% wrong="on_policy_loss" because="forward KL"
- each = (log_q.exp() * (log_q - log_p)).sum(-1)
+ each = (log_p.exp() * (log_p - log_q)).sum(-1)

# %% wrong="on_policy_loss" because="the likeliest token instead of a draw"
- drawn = torch.multinomial(probabilities, 1, generator=generator)
+ drawn = probabilities.argmax(-1, keepdim=True)

# %% wrong="on_policy_loss" because="the generator is not handed on"
- drawn = torch.multinomial(probabilities, 1, generator=generator)
+ drawn = torch.multinomial(probabilities, 1)

# %% wrong="on_policy_loss" because="a gradient to the teacher"
-     z_teacher = teacher(tokens)[:, prompts.shape[1] - 1 : -1]
- log_q = wide(student(tokens)[:, prompts.shape[1] - 1 : -1]).log_softmax(-1)
+ z_teacher = teacher(tokens)[:, prompts.shape[1] - 1 : -1]
+ log_q = wide(student(tokens)[:, prompts.shape[1] - 1 : -1]).log_softmax(-1)

# %% wrong="on_policy_loss" because="the weight q is detached"
- each = (log_q.exp() * (log_q - log_p)).sum(-1)
+ each = (log_q.exp().detach() * (log_q - log_p)).sum(-1)

# %% wrong="on_policy_loss" because="the KL of the sampled tokens only"
- each = (log_q.exp() * (log_q - log_p)).sum(-1)
+ each = (log_q - log_p).gather(-1, tokens[:, prompts.shape[1] :, None])[..., 0]

# %% wrong="on_policy_loss" because="NaN without new tokens"
- return each.sum() / max(each.numel(), 1), tokens.clone()
+ return each.mean(), tokens.clone()

# %% wrong="on_policy_loss" because="a sum over the tokens of a row"
- return each.sum() / max(each.numel(), 1), tokens.clone()
+ return each.sum() / len(each), tokens.clone()

# %% wrong="on_policy_loss" because="it calls backward itself"
- return each.sum() / max(each.numel(), 1), tokens.clone()
+ loss = each.sum() / max(each.numel(), 1)
+ loss.backward(retain_graph=True)
+ return loss, tokens.clone()

# %% wrong="on_policy_loss" because="the student is left in training mode, the teacher frozen"
- tokens = prompts
+ tokens = prompts
+ teacher.requires_grad_(False)

# %% wrong="on_policy_loss" because="eval for sampling, then train, whatever it was"
- tokens = prompts
+ tokens = prompts
+ student.eval()

- log_q = wide(student(tokens)[:, prompts.shape[1] - 1 : -1]).log_softmax(-1)
+ student.train()
+ log_q = wide(student(tokens)[:, prompts.shape[1] - 1 : -1]).log_softmax(-1)

# %% wrong="on_policy_loss" because="the mode of the whole is given to its parts"
- tokens = prompts
+ tokens, mode = prompts, student.training
+ student.eval()

- log_q = wide(student(tokens)[:, prompts.shape[1] - 1 : -1]).log_softmax(-1)
+ student.train(mode)
+ log_q = wide(student(tokens)[:, prompts.shape[1] - 1 : -1]).log_softmax(-1)

# %% right="on_policy_loss" because="keeps the logits of each draw, which is a race of exponential times"
def on_policy_loss(student, teacher, prompts, new_tokens, generator):
    length, tokens = prompts.shape[1], prompts.clone()
    kept = [F.log_softmax(wide(student(tokens)), dim=-1)[:, :0]]
    for _ in range(new_tokens):
        kept.append(F.log_softmax(wide(student(tokens)[:, -1:]), dim=-1))
        log_q = kept[-1][:, 0].detach()
        times = torch.empty_like(log_q).exponential_(generator=generator)
        tokens = torch.cat([tokens, (log_q - times.log()).argmax(-1, keepdim=True)], dim=1)
    log_q = torch.cat(kept, dim=1)
    with torch.no_grad():
        log_p = F.log_softmax(wide(teacher(tokens)[:, length - 1 : -1]), dim=-1)
    return (log_q.exp() * (log_q - log_p)).sum() / max(len(prompts) * new_tokens, 1), tokens

# %% right="on_policy_loss" because="draws by the Gumbel trick, one long tensor written into"
def on_policy_loss(student, teacher, prompts, new_tokens, generator):
    rows, length = prompts.shape
    tokens = torch.zeros(rows, length + new_tokens, dtype=torch.int64)
    tokens[:, :length] = prompts
    for i in range(length, length + new_tokens):
        with torch.no_grad():
            logits = student(tokens[:, :i])[:, -1]
            noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
            tokens[:, i] = (logits.double() - torch.log(-torch.log(noise))).argmax(-1)
    s, t = student(tokens), teacher(tokens).detach()
    here = slice(length - 1, length + new_tokens - 1)
    s, t = F.log_softmax(wide(s[:, here]), -1), F.log_softmax(wide(t[:, here]), -1)
    total = F.kl_div(t, s, reduction="sum", log_target=True)
    return total / max(rows * new_tokens, 1), tokens

# %% wrong="dense_reward_loss" because="the sign of the reward"
- reward = (teacher_logp - old_logp).masked_fill(~mask, 0)
+ reward = (old_logp - teacher_logp).masked_fill(~mask, 0)

# %% wrong="dense_reward_loss" because="an objective, not a loss"
- return -(ratio * advantages).sum() / mask.sum().clamp(min=1), advantages
+ return (ratio * advantages).sum() / mask.sum().clamp(min=1), advantages

# %% wrong="dense_reward_loss" because="the reward takes the newer student"
- reward = (teacher_logp - old_logp).masked_fill(~mask, 0)
+ reward = (teacher_logp - logp.detach()).masked_fill(~mask, 0)

# %% wrong="dense_reward_loss" because="the discount is ignored"
- running = reward[:, t] + discount * running
+ running = reward[:, t] + 0 * running

# %% wrong="dense_reward_loss" because="a sum over the past"
- for t in reversed(range(reward.shape[1])):
+ for t in range(reward.shape[1]):
- advantages = torch.stack(columns[::-1], dim=1).masked_fill(~mask, 0)
+ advantages = torch.stack(columns, dim=1).masked_fill(~mask, 0)

# %% wrong="dense_reward_loss" because="advantages run into the prompt"
- advantages = torch.stack(columns[::-1], dim=1).masked_fill(~mask, 0)
+ advantages = torch.stack(columns[::-1], dim=1)

# %% wrong="dense_reward_loss" because="divided by powers of the discount, which round to 0"
- columns, running = [], torch.zeros_like(reward[:, 0])
- for t in reversed(range(reward.shape[1])):
-     running = reward[:, t] + discount * running
-     columns.append(running)
- advantages = torch.stack(columns[::-1], dim=1).masked_fill(~mask, 0)
+ weight = discount ** torch.arange(reward.shape[1], dtype=reward.dtype)
+ advantages = (reward * weight).flip(1).cumsum(1).flip(1) / weight
+ advantages = (reward if discount == 0 else advantages).masked_fill(~mask, 0)

# %% wrong="dense_reward_loss" because="no ratio"
- ratio = (logp - old_logp).masked_fill(~mask, 0).exp()
+ ratio = logp.masked_fill(~mask, 0)

# %% wrong="dense_reward_loss" because="the ratio is clipped"
- ratio = (logp - old_logp).masked_fill(~mask, 0).exp()
+ ratio = (logp - old_logp).masked_fill(~mask, 0).exp().clamp(0.8, 1.2)

# %% wrong="dense_reward_loss" because="masked after the exponential: NaN in the gradient"
- ratio = (logp - old_logp).masked_fill(~mask, 0).exp()
+ ratio = (logp - old_logp).exp().masked_fill(~mask, 0)

# %% wrong="dense_reward_loss" because="a gradient to old_logp and the teacher"
- old_logp, teacher_logp = old_logp.detach(), teacher_logp.detach()
+ old_logp = old_logp * 1

# %% wrong="dense_reward_loss" because="divided by the whole array"
- return -(ratio * advantages).sum() / mask.sum().clamp(min=1), advantages
+ return -(ratio * advantages).mean(), advantages

# %% wrong="dense_reward_loss" because="discount 1 by default"
def dense_reward_loss(logp, old_logp, teacher_logp, mask, discount=1.0):
    reward = (teacher_logp - old_logp).detach().masked_fill(~mask, 0)
    steps = torch.arange(mask.shape[1])
    decay = discount ** (steps[None] - steps[:, None]).clamp(min=0).to(logp.dtype)
    decay = decay * (steps[None] >= steps[:, None])
    advantages = (reward @ decay.T).masked_fill(~mask, 0)
    ratio = (logp - old_logp.detach()).masked_fill(~mask, 0).exp()
    return -(ratio * advantages).sum() / max(int(mask.sum()), 1), advantages

# %% right="dense_reward_loss" because="a triangular matrix of discounts"
def dense_reward_loss(logp, old_logp, teacher_logp, mask, discount=0.0):
    reward = (teacher_logp - old_logp).detach().masked_fill(~mask, 0)
    steps = torch.arange(mask.shape[1])
    ahead = steps[None] - steps[:, None]
    decay = torch.where(ahead >= 0, float(discount) ** ahead.clamp(min=0).double(), 0.0)
    advantages = (reward.double() @ decay.T).masked_fill(~mask, 0).to(logp.dtype)
    surrogate = torch.exp((logp - old_logp.detach())[mask]) * advantages[mask]
    return -surrogate.sum() / max(int(mask.sum()), 1), advantages

# %% wrong="enumerated_gradients" because="the true gradient without the gradient of q"
- exact = exact + chance * (mine.sum() - theirs.sum())
+ exact = exact + chance.detach() * (mine.sum() - theirs.sum())

# %% wrong="enumerated_gradients" because="the wrong direction: Σ p log(p/q)"
- exact = exact + chance * (mine.sum() - theirs.sum())
+ exact = exact + theirs.sum().exp() * (theirs.sum() - mine.sum())

# %% wrong="enumerated_gradients" because="the policy's sign"
- surrogate = surrogate - chance.detach() * (advantage * mine).sum()
+ surrogate = surrogate + chance.detach() * (advantage * mine).sum()

# %% wrong="enumerated_gradients" because="the weight q(x) has a graph"
- surrogate = surrogate - chance.detach() * (advantage * mine).sum()
+ surrogate = surrogate - chance * (advantage * mine).sum()

# %% wrong="enumerated_gradients" because="the advantage has a graph"
- advantage = (theirs - mine).detach()
- for i in reversed(range(steps - 1)):
-     advantage[i] += discount * advantage[i + 1]
+ rest, parts = 0.0, []
+ for i in reversed(range(steps)):
+     rest = theirs[i] - mine[i] + discount * rest
+     parts.insert(0, rest)
+ advantage = torch.stack(parts)

# %% wrong="enumerated_gradients" because="continuations are weighted alike"
- surrogate = surrogate - chance.detach() * (advantage * mine).sum()
+ surrogate = surrogate - (advantage * mine).sum() / vocab**steps

# %% wrong="enumerated_gradients" because="the discount is ignored"
- advantage[i] += discount * advantage[i + 1]
+ advantage[i] += advantage[i + 1]

# %% wrong="enumerated_gradients" because="the whole discounted return for every step"
- for i in reversed(range(steps - 1)):
-     advantage[i] += discount * advantage[i + 1]
+ weights = discount ** torch.arange(steps, dtype=z.dtype)
+ advantage = (weights * advantage).sum().expand(steps)

# %% wrong="enumerated_gradients" because="all of the future is discounted once"
- for i in reversed(range(steps - 1)):
-     advantage[i] += discount * advantage[i + 1]
+ later = advantage.flip(0).cumsum(0).flip(0) - advantage
+ advantage = advantage + discount * later

# %% wrong="enumerated_gradients" because="no gradient under no_grad"
- with torch.enable_grad():
+ if True:

# %% wrong="enumerated_gradients" because="a mean over steps"
- surrogate = surrogate - chance.detach() * (advantage * mine).sum()
+ surrogate = surrogate - chance.detach() * (advantage * mine).mean()

# %% wrong="enumerated_gradients" because="the word before is forgotten"
- t, before = list(range(steps)), [0, *words[:-1]]
+ t, before = list(range(steps)), [0] * steps

# %% wrong="enumerated_gradients" because="backward into .grad"
- z = student.detach().clone().requires_grad_()
+ z = student.requires_grad_()
+ z.grad = None

# %% right="enumerated_gradients" because="scores by hand: the gradient of log q is one-hot minus q"
def enumerated_gradients(student, teacher, discount):
    s, t = student.detach().double(), teacher.detach().double()
    q, p = s.softmax(-1), t.softmax(-1)
    steps, vocab = s.shape[:2]
    true, policy = torch.zeros_like(s), torch.zeros_like(s)
    for x in itertools.product(range(vocab), repeat=steps):
        before = (0, *x)
        chance, rewards = 1.0, []
        for i in range(steps):
            chance = chance * q[i, before[i], x[i]]
            rewards.append((p[i, before[i], x[i]] / q[i, before[i], x[i]]).log())
        for i in range(steps):
            score = -q[i, before[i]].clone()
            score[x[i]] += 1
            ahead = sum(discount ** (k - i) * rewards[k] for k in range(i, steps))
            true[i, before[i]] -= chance * sum(rewards) * score
            policy[i, before[i]] -= chance * ahead * score
    return true.to(student.dtype), policy.to(student.dtype)

# %% wrong="questions" because="one factor of τ, and the formula's end taken for a KL"
- "temperature": 16.0,
+ "temperature": 4.0,

# %% wrong="questions" because="without the rest"
- "tail": 0.6 * math.log(2) + 0.4 * math.log(4 / 7),
+ "tail": 0.6 * math.log(2),

# %% wrong="questions" because="the ids take no place"
- "storage": 65536 * 2 / (32 * 4),
+ "storage": 65536 * 2 / (32 * 2),

# %% wrong="questions" because="directions and discounts exchanged"
- "valley": "forward",
- "partial": 0.0,
+ "valley": "reverse",
+ "partial": 1.0,

# %% wrong="questions" because="the end is not 0"
- "end": 0.0,
+ "end": math.log(2),

# %% right="questions" because="worked out by hand"
def questions():
    return {
        "temperature": 16,
        "end": 0.0,
        "tail": 0.192,
        "storage": 1024,
        "valley": "forward",
        "partial": 0.0,
    }
