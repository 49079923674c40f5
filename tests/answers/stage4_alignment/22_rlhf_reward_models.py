# Right and wrong answers to the exercises of lesson 22: see CONTRIBUTING.md.

# %% wrong="bradley_terry_loss" because="chosen and rejected are exchanged"
- ranking = -F.logsigmoid(chosen - rejected - margin)
+ ranking = -F.logsigmoid(rejected - chosen - margin)

# %% wrong="bradley_terry_loss" because="the margin is added"
- ranking = -F.logsigmoid(chosen - rejected - margin)
+ ranking = -F.logsigmoid(chosen - rejected + margin)

# %% wrong="bradley_terry_loss" because="the logarithm of a sigmoid that underflows"
- ranking = -F.logsigmoid(chosen - rejected - margin)
+ ranking = -torch.sigmoid(chosen - rejected - margin).log()

# %% wrong="bradley_terry_loss" because="log(1 + exp) that overflows"
- ranking = -F.logsigmoid(chosen - rejected - margin)
+ ranking = torch.log1p(torch.exp(margin + rejected - chosen))

# %% wrong="bradley_terry_loss" because="a small number inside the logarithm"
- ranking = -F.logsigmoid(chosen - rejected - margin)
+ ranking = -(torch.sigmoid(chosen - rejected - margin) + 1e-6).log()

# %% wrong="bradley_terry_loss" because="the sum"
- return (ranking + center * (chosen + rejected).square()).mean()
+ return (ranking + center * (chosen + rejected).square()).sum()

# %% wrong="bradley_terry_loss" because="the difference is centered"
- return (ranking + center * (chosen + rejected).square()).mean()
+ return (ranking + center * (chosen - rejected).square()).mean()

# %% wrong="bradley_terry_loss" because="each reward is centered by itself"
- return (ranking + center * (chosen + rejected).square()).mean()
+ return (ranking + center * (chosen.square() + rejected.square())).mean()

# %% wrong="bradley_terry_loss" because="the sum is not squared"
- return (ranking + center * (chosen + rejected).square()).mean()
+ return (ranking + center * (chosen + rejected)).mean()

# %% wrong="bradley_terry_loss" because="the mean of the sum is squared"
- return (ranking + center * (chosen + rejected).square()).mean()
+ return ranking.mean() + center * (chosen + rejected).mean().square()

# %% wrong="bradley_terry_loss" because="the centering is ignored"
- return (ranking + center * (chosen + rejected).square()).mean()
+ return ranking.mean()

# %% wrong="bradley_terry_loss" because="the margin is averaged"
- margin = margin.to(wide)
+ margin = margin.to(wide).mean()

# %% wrong="bradley_terry_loss" because="a float64 margin makes the loss float64"
- margin = margin.to(wide)
+ margin = margin * 1

# %% wrong="bradley_terry_loss" because="computed in the format of the rewards"
- wide = torch.promote_types(chosen.dtype, torch.float32)
+ wide = chosen.dtype

# %% wrong="bradley_terry_loss" because="always in float32"
- wide = torch.promote_types(chosen.dtype, torch.float32)
+ wide = torch.float32

# %% wrong="bradley_terry_loss" because="the difference is clamped, so that its gradient ends"
- ranking = -F.logsigmoid(chosen - rejected - margin)
+ ranking = -F.logsigmoid((chosen - rejected - margin).clamp(-50, 50))

# %% right="bradley_terry_loss" because="softplus of the opposite difference"
def bradley_terry_loss(chosen, rejected, margin=0.0, center=0.0):
    if chosen.dtype in (torch.float16, torch.bfloat16):
        chosen, rejected = chosen.float(), rejected.float()
    m = torch.as_tensor(margin, device=chosen.device).to(chosen.dtype)
    loss = F.softplus(m - (chosen - rejected)).mean()
    return loss + center * torch.mean((chosen + rejected) ** 2)

# %% right="bradley_terry_loss" because="logsumexp: cross-entropy of two classes"
def bradley_terry_loss(chosen, rejected, margin=0.0, center=0.0):
    wide = torch.float64 if chosen.dtype == torch.float64 else torch.float32
    both = torch.stack([chosen.to(wide) - margin, rejected.to(wide)], dim=1).to(wide)
    target = torch.zeros(len(both), dtype=torch.int64, device=both.device)
    total = chosen.to(wide) + rejected.to(wide)
    return F.cross_entropy(both, target) + center * (total * total).mean()

# %% wrong="reward_model" because="the last column"
- last = (mask * places).argmax(dim=1)
+ last = torch.full((len(tokens),), tokens.shape[1] - 1, device=tokens.device)

# %% wrong="reward_model" because="the number of real tokens, less one"
- last = (mask * places).argmax(dim=1)
+ last = mask.sum(dim=1) - 1

# %% wrong="reward_model" because="looks for the first padding token"
- last = (mask * places).argmax(dim=1)
+ last = ((tokens == 0).int().argmax(dim=1) - 1) % tokens.shape[1]

# %% wrong="reward_model" because="the first real token"
- last = (mask * places).argmax(dim=1)
+ last = mask.int().argmax(dim=1)

# %% wrong="reward_model" because="padding is not hidden from the trunk"
- hidden = self.trunk.hidden(tokens, attention_mask=mask)
+ hidden = self.trunk.hidden(tokens)

# %% wrong="reward_model" because="the mean over real tokens"
- return self.head(hidden[rows, last]).squeeze(-1)
+ return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).squeeze(-1)

# %% wrong="reward_model" because="the same position in every row"
- return self.head(hidden[rows, last]).squeeze(-1)
+ return self.head(hidden[rows, last.max()]).squeeze(-1)

# %% wrong="reward_model" because="squeezes the batch away"
- return self.head(hidden[rows, last]).squeeze(-1)
+ return self.head(hidden[rows, last]).squeeze()

# %% wrong="reward_model" because="a column is returned"
- return self.head(hidden[rows, last]).squeeze(-1)
+ return self.head(hidden[rows, last])

# %% wrong="reward_model" because="the trunk is frozen"
- hidden = self.trunk.hidden(tokens, attention_mask=mask)
+ with torch.no_grad():
+     hidden = self.trunk.hidden(tokens, attention_mask=mask)

# %% wrong="reward_model" because="the trunk is copied"
- self.trunk = trunk
+ self.trunk = models.Llama(trunk.config)
+ self.trunk.load_state_dict(trunk.state_dict())

# %% wrong="reward_model" because="a head with a bias"
- self.head = nn.Linear(trunk.config.hidden_size, 1, bias=False)
+ self.head = nn.Linear(trunk.config.hidden_size, 1)

# %% wrong="reward_model" because="a squashed reward"
- return self.head(hidden[rows, last]).squeeze(-1)
+ return torch.tanh(self.head(hidden[rows, last])).squeeze(-1)

# %% right="reward_model" because="a head for every position, then a choice by a one-hot mask"
class RewardModel(nn.Module):
    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(trunk.config.hidden_size, 1, bias=False)

    def forward(self, tokens, mask):
        every = self.head(self.trunk.hidden(tokens, attention_mask=mask))[..., 0]
        last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
        return every.masked_fill(~last, 0).sum(1)

# %% right="reward_model" because="one sequence after another, without its padding"
class RewardModel(nn.Module):
    def __init__(self, trunk):
        super().__init__()
        self.head = nn.Linear(trunk.config.hidden_size, 1, bias=False)
        self.trunk = trunk

    def forward(self, tokens, mask):
        return torch.cat(
            [
                self.head(self.trunk.hidden(row[keep][None])[:, -1])[:, 0]
                for row, keep in zip(tokens, mask, strict=True)
            ]
        )

# %% wrong="expected_calibration_error" because="p = 1 falls out of the bins"
- gaps = gaps.index_add(0, bin_of, p - happened)
+ gaps = gaps.index_add(0, bin_of, (p - happened) * (p < 1))

# %% wrong="expected_calibration_error" because="p = 1 has a bin of its own"
- bin_of = (p * bins).long().clamp(max=bins - 1)
- # n_b/N · |mean p − mean y| = |Σ (p − y)| / N: the number of pairs cancels.
- gaps = torch.zeros(bins, dtype=p.dtype, device=p.device)
+ bin_of = (p * bins).long()
+ gaps = torch.zeros(bins + 1, dtype=p.dtype, device=p.device)

# %% wrong="expected_calibration_error" because="always ten bins"
- bin_of = (p * bins).long().clamp(max=bins - 1)
+ bins = 10
+ bin_of = (p * bins).long().clamp(max=bins - 1)

# %% wrong="expected_calibration_error" because="bins closed above"
- bin_of = (p * bins).long().clamp(max=bins - 1)
+ bin_of = ((p * bins).ceil().long() - 1).clamp(min=0)

# %% wrong="expected_calibration_error" because="the absolute value of each pair"
- gaps = gaps.index_add(0, bin_of, p - happened)
+ gaps = gaps.index_add(0, bin_of, (p - happened).abs())

# %% wrong="expected_calibration_error" because="the absolute value after the sum"
- return right.mean(), gaps.abs().sum() / len(p)
+ return right.mean(), gaps.sum().abs() / len(p)

# %% wrong="expected_calibration_error" because="bins weigh the same"
- return right.mean(), gaps.abs().sum() / len(p)
+ count = torch.bincount(bin_of, minlength=bins)
+ return right.mean(), (gaps.abs() / count.clamp(min=1)).sum() / (count > 0).sum()

# %% wrong="expected_calibration_error" because="the middle of the bin, not its mean prediction"
- gaps = gaps.index_add(0, bin_of, p - happened)
+ gaps = gaps.index_add(0, bin_of, (bin_of + 0.5) / bins - happened)

# %% wrong="expected_calibration_error" because="the squared gap"
- return right.mean(), gaps.abs().sum() / len(p)
+ return right.mean(), (gaps / len(p)).square().sum().sqrt()

# %% wrong="expected_calibration_error" because="a tie counts as a preference of the second"
- right = torch.where(p == 0.5, 0.5, ((p > 0.5) == preferred).to(p.dtype))
+ right = ((p > 0.5) == preferred).to(p.dtype)

# %% wrong="expected_calibration_error" because="a tie counts as right"
- right = torch.where(p == 0.5, 0.5, ((p > 0.5) == preferred).to(p.dtype))
+ right = torch.where(p == 0.5, 1.0, ((p > 0.5) == preferred).to(p.dtype))

# %% wrong="expected_calibration_error" because="the mean of p as accuracy"
- right = torch.where(p == 0.5, 0.5, ((p > 0.5) == preferred).to(p.dtype))
+ right = torch.where(preferred, p, 1 - p)

# %% wrong="expected_calibration_error" because="error before accuracy"
- return right.mean(), gaps.abs().sum() / len(p)
+ return gaps.abs().sum() / len(p), right.mean()

# %% wrong="expected_calibration_error" because="always float32"
- p = p.to(torch.promote_types(p.dtype, torch.float32))
+ p = p.float()

# %% wrong="expected_calibration_error" because="sums in half precision"
- p = p.to(torch.promote_types(p.dtype, torch.float32))
+ p = p.clone()

# %% right="expected_calibration_error" because="a loop over the bins"
def expected_calibration_error(p, preferred, bins=10):
    p = p.float() if p.dtype in (torch.float16, torch.bfloat16) else p
    y = preferred.to(p.dtype)
    error = torch.zeros((), dtype=p.dtype)
    for k in range(bins):
        inside = (p >= k / bins) & ((p < (k + 1) / bins) | (k == bins - 1))
        if inside.any():
            error = error + inside.sum() / len(p) * (p[inside].mean() - y[inside].mean()).abs()
    said = (torch.sign(p - 0.5) + 1) / 2
    return (1 - (said - y).abs()).mean(), error

# %% wrong="remove_length" because="the line is added"
- return rewards - slope * centered
+ return rewards + slope * centered

# %% wrong="remove_length" because="slope times length, not centered"
- return rewards - slope * centered
+ return rewards - slope * lengths.to(rewards.dtype)

# %% wrong="remove_length" because="the residual, without the mean"
- return rewards - slope * centered
+ return rewards - rewards.mean() - slope * centered

# %% wrong="remove_length" because="divided by the length"
- slope = (centered * (rewards - rewards.mean())).sum() / square
- return rewards - slope * centered
+ return rewards * lengths.mean() / lengths.clamp(min=1)

# %% wrong="remove_length" because="a line through the origin"
- slope = (centered * (rewards - rewards.mean())).sum() / square
+ slope = (lengths * rewards).sum() / lengths.square().sum()

# %% wrong="remove_length" because="a correlation, not a slope"
- slope = (centered * (rewards - rewards.mean())).sum() / square
+ slope = (centered * (rewards - rewards.mean())).sum() / square.sqrt()

# %% wrong="remove_length" because="divided by N − 1 in one of the two"
- slope = (centered * (rewards - rewards.mean())).sum() / square
+ slope = (centered * (rewards - rewards.mean())).mean() / centered.var()

# %% wrong="remove_length" because="NaN where all lengths are equal"
- if square == 0:
-     return rewards.clone()
+ pass

# %% wrong="remove_length" because="a small number in the denominator"
- if square == 0:
-     return rewards.clone()
- slope = (centered * (rewards - rewards.mean())).sum() / square
+ slope = (centered * (rewards - rewards.mean())).sum() / (square + 1.0)

# %% wrong="remove_length" because="the mean square less the squared mean, in float32"
- lengths = lengths.double()
- centered = (lengths - lengths.mean()).to(rewards.dtype)
- square = centered.square().sum()
+ lengths = lengths.to(rewards.dtype)
+ centered = lengths - lengths.mean()
+ square = len(lengths) * (lengths.square().mean() - lengths.mean().square())

# %% wrong="remove_length" because="computed in half precision"
- rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
+ rewards = rewards * 1

# %% wrong="remove_length" because="lengths are cut to whole numbers"
- lengths = lengths.double()
+ lengths = lengths.long().double()

# %% right="remove_length" because="least squares"
def remove_length(rewards, lengths):
    r = rewards.double()
    x = lengths.double() - lengths.double().mean()
    design = torch.stack([torch.ones_like(x), x], dim=1)
    line = torch.linalg.pinv(design) @ r
    out = r - line[1] * x
    return out.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)

# %% wrong="kl_penalized_reward" because="the penalty is a bonus"
- rewards = -beta * (logp.to(wide) - ref_logp.to(wide))
+ rewards = beta * (logp.to(wide) - ref_logp.to(wide))

# %% wrong="kl_penalized_reward" because="no logarithms: the ratio of probabilities"
- rewards = -beta * (logp.to(wide) - ref_logp.to(wide))
+ rewards = -beta * ((logp.to(wide) - ref_logp.to(wide)).exp() - 1)

# %% wrong="kl_penalized_reward" because="the nonnegative estimate k3"
- rewards = -beta * (logp.to(wide) - ref_logp.to(wide))
+ d = ref_logp.to(wide) - logp.to(wide)
+ rewards = -beta * (d.exp() - 1 - d)

# %% wrong="kl_penalized_reward" because="beta is left out"
- rewards = -beta * (logp.to(wide) - ref_logp.to(wide))
+ rewards = ref_logp.to(wide) - logp.to(wide)

# %% wrong="kl_penalized_reward" because="the reward in the last column"
- is_last = (places == last[:, None]) & mask
+ is_last = (places == mask.shape[1] - 1).expand_as(mask)

# %% wrong="kl_penalized_reward" because="the last token by counting the mask"
- last = (mask * places).argmax(dim=1)
+ last = mask.sum(dim=1) - 1

# %% wrong="kl_penalized_reward" because="the reward on every token"
- is_last = (places == last[:, None]) & mask
+ is_last = mask

# %% wrong="kl_penalized_reward" because="an answer of nothing gets the reward"
- is_last = (places == last[:, None]) & mask
+ is_last = places == last[:, None]

# %% wrong="kl_penalized_reward" because="a product with the mask keeps NaN"
- rewards = rewards.masked_fill(~mask, 0.0)
+ rewards = rewards * mask

# %% wrong="kl_penalized_reward" because="prompt and padding are penalized"
- rewards = rewards.masked_fill(~mask, 0.0)
+ rewards = rewards.nan_to_num(0.0)

# %% wrong="kl_penalized_reward" because="the reward replaces the last token's penalty"
- return rewards + is_last * reward.to(wide)[:, None]
+ return torch.where(is_last, reward.to(wide)[:, None], rewards)

# %% wrong="kl_penalized_reward" because="a gradient goes through"
- with torch.no_grad():
+ if True:

# %% wrong="kl_penalized_reward" because="half precision throughout"
- wide = torch.promote_types(logp.dtype, torch.float32)
+ wide = logp.dtype

# %% wrong="kl_penalized_reward" because="the format of the reward"
- wide = torch.promote_types(logp.dtype, torch.float32)
+ wide = torch.promote_types(reward.dtype, torch.float32)

# %% right="kl_penalized_reward" because="row by row"
def kl_penalized_reward(reward, logp, ref_logp, mask, beta):
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    out = torch.zeros(logp.shape, dtype=dtype, device=logp.device)
    for row in range(len(logp)):
        places = mask[row].nonzero()[:, 0]
        if len(places) == 0:
            continue
        ratio = logp[row, places].detach().to(dtype) - ref_logp[row, places].detach().to(dtype)
        out[row, places] = -beta * ratio
        out[row, places[-1]] += reward[row].detach().to(dtype)
    return out

# %% wrong="leave_one_out_baseline" because="the mean of all"
- return (returns.sum(dim=1, keepdim=True) - returns) / (samples - 1)
+ return returns.mean(dim=1, keepdim=True).expand_as(returns)

# %% wrong="leave_one_out_baseline" because="divided by all samples"
- return (returns.sum(dim=1, keepdim=True) - returns) / (samples - 1)
+ return (returns.sum(dim=1, keepdim=True) - returns) / samples

# %% wrong="leave_one_out_baseline" because="the others of the whole batch"
- return (returns.sum(dim=1, keepdim=True) - returns) / (samples - 1)
+ return (returns.sum() - returns) / (returns.numel() - 1)

# %% wrong="leave_one_out_baseline" because="over prompts, not samples"
- return (returns.sum(dim=1, keepdim=True) - returns) / (samples - 1)
+ return (returns.sum(dim=0, keepdim=True) - returns) / max(len(returns) - 1, 1)

# %% wrong="leave_one_out_baseline" because="the advantage, not the baseline"
- return (returns.sum(dim=1, keepdim=True) - returns) / (samples - 1)
+ return returns - (returns.sum(dim=1, keepdim=True) - returns) / (samples - 1)

# %% wrong="leave_one_out_baseline" because="one sample is let through"
- if samples < 2:
-     raise ValueError(f"{samples} samples a prompt: leaving one out takes at least 2")
+ samples = max(samples, 2)

# %% wrong="leave_one_out_baseline" because="half precision"
- returns = returns.to(torch.promote_types(returns.dtype, torch.float32))
+ returns = returns * 1

# %% right="leave_one_out_baseline" because="a matrix of ones without its diagonal"
def leave_one_out_baseline(returns):
    k = returns.shape[1]
    if k < 2:
        raise ValueError("at least two samples")
    r = returns.float() if returns.dtype in (torch.float16, torch.bfloat16) else returns
    others = (1 - torch.eye(k, dtype=r.dtype, device=r.device)) / (k - 1)
    return r @ others

# %% wrong="reinforce_loss" because="an objective to be maximized"
- return -(advantage.detach().to(wide) * answer).mean()
+ return (advantage.detach().to(wide) * answer).mean()

# %% wrong="reinforce_loss" because="the mean over each answer's tokens"
- answer = logp.to(wide).masked_fill(~mask, 0.0).sum(dim=-1)
+ answer = logp.to(wide).masked_fill(~mask, 0.0).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)

# %% wrong="reinforce_loss" because="the mean over all tokens"
- return -(advantage.detach().to(wide) * answer).mean()
+ return -(advantage.detach().to(wide) * answer).sum() / mask.sum().clamp(min=1)

# %% wrong="reinforce_loss" because="the sum over answers"
- return -(advantage.detach().to(wide) * answer).mean()
+ return -(advantage.detach().to(wide) * answer).sum()

# %% wrong="reinforce_loss" because="padding counts"
- answer = logp.to(wide).masked_fill(~mask, 0.0).sum(dim=-1)
+ answer = logp.to(wide).sum(dim=-1)

# %% wrong="reinforce_loss" because="a product with the mask: 0 · −inf"
- answer = logp.to(wide).masked_fill(~mask, 0.0).sum(dim=-1)
+ answer = (logp.to(wide) * mask).sum(dim=-1)

# %% wrong="reinforce_loss" because="the baseline is added"
- advantage = returns if baseline is None else returns - baseline
+ advantage = returns if baseline is None else returns + baseline

# %% wrong="reinforce_loss" because="the baseline is ignored"
- advantage = returns if baseline is None else returns - baseline
+ advantage = returns

# %% wrong="reinforce_loss" because="a baseline of its own: the mean of the batch"
- advantage = returns if baseline is None else returns - baseline
+ advantage = returns - (returns.mean() if baseline is None else baseline)

# %% wrong="reinforce_loss" because="a gradient goes to returns and baseline"
- return -(advantage.detach().to(wide) * answer).mean()
+ return -(advantage.to(wide) * answer).mean()

# %% wrong="reinforce_loss" because="only the baseline is detached"
- return -(advantage.detach().to(wide) * answer).mean()
+ fixed = 0.0 if baseline is None else baseline.detach()
+ return -((returns - fixed).to(wide) * answer).mean()

# %% wrong="reinforce_loss" because="probability, not its logarithm"
- return -(advantage.detach().to(wide) * answer).mean()
+ return -(advantage.detach().to(wide) * answer.exp()).mean()

# %% wrong="reinforce_loss" because="advantages are normalized"
- advantage = returns if baseline is None else returns - baseline
+ advantage = returns if baseline is None else returns - baseline
+ if advantage.numel() > 1:
+     advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-6)

# %% wrong="reinforce_loss" because="the format of the returns"
- return -(advantage.detach().to(wide) * answer).mean()
+ return -(advantage.detach() * answer).mean()

# %% wrong="reinforce_loss" because="half precision"
- wide = torch.promote_types(logp.dtype, torch.float32)
+ wide = logp.dtype

# %% wrong="reinforce_loss" because="answers of nothing are left out of the mean"
- return -(advantage.detach().to(wide) * answer).mean()
+ return -(advantage.detach().to(wide) * answer).sum() / mask.any(dim=-1).sum().clamp(min=1)

# %% right="reinforce_loss" because="each token gets its answer's advantage"
def reinforce_loss(logp, mask, returns, baseline=None):
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        weight = returns.double() - (0 if baseline is None else baseline.double())
        weight = weight[..., None].expand(mask.shape).to(dtype)
    kept = torch.where(mask, logp, torch.zeros_like(logp)).to(dtype)
    return -(weight * kept).sum() / returns.numel()

# %% wrong="best_of_n" because="the worst of n"
- at_most = ((rewards[None, :] <= rewards[:, None]) * p.double()).sum(1)[:, None]
- less = ((rewards[None, :] < rewards[:, None]) * p.double()).sum(1)[:, None]
+ at_most = ((rewards[None, :] >= rewards[:, None]) * p.double()).sum(1)[:, None]
+ less = ((rewards[None, :] > rewards[:, None]) * p.double()).sum(1)[:, None]

# %% wrong="best_of_n" because="the smooth case: n F to the n − 1, normalized"
- k = torch.arange(n, device=p.device)
- # (Fⁿ − F⁻ⁿ) / (F − F⁻) as a sum of products: no difference of nearly equal numbers.
- return (p.double() * (at_most**k * less ** (n - 1 - k)).sum(1)).to(p.dtype)
+ kept = p.double() * at_most[:, 0] ** (n - 1)
+ return (kept / kept.sum()).to(p.dtype)

# %% wrong="best_of_n" because="ties: all of the group's probability to each"
- k = torch.arange(n, device=p.device)
- # (Fⁿ − F⁻ⁿ) / (F − F⁻) as a sum of products: no difference of nearly equal numbers.
- return (p.double() * (at_most**k * less ** (n - 1 - k)).sum(1)).to(p.dtype)
+ return (at_most**n - less**n)[:, 0].to(p.dtype)

# %% wrong="best_of_n" because="ties are broken by position"
- at_most = ((rewards[None, :] <= rewards[:, None]) * p.double()).sum(1)[:, None]
- less = ((rewards[None, :] < rewards[:, None]) * p.double()).sum(1)[:, None]
- k = torch.arange(n, device=p.device)
- # (Fⁿ − F⁻ⁿ) / (F − F⁻) as a sum of products: no difference of nearly equal numbers.
- return (p.double() * (at_most**k * less ** (n - 1 - k)).sum(1)).to(p.dtype)
+ order = rewards.argsort(stable=True)
+ top = p.double()[order].cumsum(0)
+ kept = torch.zeros(len(p), dtype=torch.float64)
+ kept[order] = top**n - torch.cat([torch.zeros(1).double(), top[:-1]]) ** n
+ return kept.to(p.dtype)

# %% wrong="best_of_n" because="a difference of powers, divided"
- k = torch.arange(n, device=p.device)
- # (Fⁿ − F⁻ⁿ) / (F − F⁻) as a sum of products: no difference of nearly equal numbers.
- return (p.double() * (at_most**k * less ** (n - 1 - k)).sum(1)).to(p.dtype)
+ ratio = (at_most**n - less**n) / (at_most - less).clamp(min=1e-300)
+ return (p.double() * ratio[:, 0]).to(p.dtype)

# %% wrong="best_of_n" because="one draw too few"
- k = torch.arange(n, device=p.device)
- # (Fⁿ − F⁻ⁿ) / (F − F⁻) as a sum of products: no difference of nearly equal numbers.
- return (p.double() * (at_most**k * less ** (n - 1 - k)).sum(1)).to(p.dtype)
+ m = max(n - 1, 1)
+ k = torch.arange(m, device=p.device)
+ return (p.double() * (at_most**k * less ** (m - 1 - k)).sum(1)).to(p.dtype)

# %% wrong="best_of_n" because="tilted by the reward"
- k = torch.arange(n, device=p.device)
- # (Fⁿ − F⁻ⁿ) / (F − F⁻) as a sum of products: no difference of nearly equal numbers.
- return (p.double() * (at_most**k * less ** (n - 1 - k)).sum(1)).to(p.dtype)
+ return (p.double().log() + math.log(n) * rewards.double()).softmax(0).to(p.dtype)

# %% wrong="best_of_n" because="float64 whatever came in"
- return (p.double() * (at_most**k * less ** (n - 1 - k)).sum(1)).to(p.dtype)
+ return p.double() * (at_most**k * less ** (n - 1 - k)).sum(1)

# %% wrong="best_of_n" because="the bound is log n"
- return math.log(n) - (n - 1) / n
+ return math.log(n)

# %% wrong="best_of_n" because="the bound is its limit, log n − 1"
- return math.log(n) - (n - 1) / n
+ return max(math.log(n) - 1, 0.0)

# %% wrong="best_of_n" because="the bound in bits"
- return math.log(n) - (n - 1) / n
+ return math.log2(n) - (n - 1) / n / math.log(2)

# %% wrong="best_of_n" because="n/(n + 1) in place of (n − 1)/n"
- return math.log(n) - (n - 1) / n
+ return math.log(n) - n / (n + 1)

# %% right="best_of_n" because="draw after draw: the distribution of the best so far"
def best_of_n(p, rewards, n):
    q = p.double()
    worse = rewards[:, None] < rewards[None, :]  # [a, b]: a is worse than b
    stays = ((rewards[:, None] <= rewards[None, :]) * q[:, None]).sum(0)
    best = q.clone()
    for _ in range(n - 1):
        # The best stays unless the new draw is better; the new draw b replaces all that are worse.
        under = (best[:, None] * worse).sum(0)
        best = best * stays + q * under
    return best.to(p.dtype)


def kl_best_of_n_bound(n):
    return math.log(n) - 1 + 1 / n

# %% wrong="best_of_n_estimate" because="drawing with repetition"
- weights = [math.comb(i, n - 1) / math.comb(size, n) for i in range(size)]
+ weights = [((i + 1) / size) ** n - (i / size) ** n for i in range(size)]

# %% wrong="best_of_n_estimate" because="one too many below"
- weights = [math.comb(i, n - 1) / math.comb(size, n) for i in range(size)]
+ weights = [math.comb(i + 1, n) / math.comb(size + 1, n + 1) for i in range(size)]

# %% wrong="best_of_n_estimate" because="the lowest of each subset"
- ranked = value.double().gather(1, proxy.argsort(dim=1))
+ ranked = value.double().gather(1, proxy.argsort(dim=1, descending=True))

# %% wrong="best_of_n_estimate" because="chosen by value"
- ranked = value.double().gather(1, proxy.argsort(dim=1))
+ ranked = value.double().sort(dim=1).values

# %% wrong="best_of_n_estimate" because="the first n only"
- weights = [math.comb(i, n - 1) / math.comb(size, n) for i in range(size)]
- ranked = value.double().gather(1, proxy.argsort(dim=1))
- return (ranked @ torch.tensor(weights, dtype=torch.float64).to(value.device)).to(value.dtype)
+ best = proxy[:, :n].argmax(dim=1, keepdim=True)
+ return value.gather(1, best)[:, 0]

# %% wrong="best_of_n_estimate" because="binomials as floats, which overflow"
- weights = [math.comb(i, n - 1) / math.comb(size, n) for i in range(size)]
+ top = torch.arange(size, dtype=torch.float64)
+ def comb(a, b):
+     return ((a + 1).lgamma() - torch.tensor(b + 1.0).lgamma() - (a - b + 1).lgamma()).float().exp()
+ weights = [float(comb(t, n - 1)) / float(comb(torch.tensor(float(size)), n)) if t >= n - 1 else 0.0 for t in top]

# %% wrong="best_of_n_estimate" because="n of nothing is let through"
- if not 1 <= n <= size:
-     raise ValueError(f"the best of {n} cannot be estimated from a pool of {size}")
+ n = min(max(n, 1), size)

# %% wrong="best_of_n_estimate" because="the mean over prompts"
- return (ranked @ torch.tensor(weights, dtype=torch.float64).to(value.device)).to(value.dtype)
+ return (ranked @ torch.tensor(weights, dtype=torch.float64)).mean().expand(len(value)).to(value.dtype)

# %% wrong="best_of_n_estimate" because="ranks become values"
- ranked = value.double().gather(1, proxy.argsort(dim=1))
+ ranked = value.double().gather(1, proxy.argsort(dim=1).argsort(dim=1))

# %% right="best_of_n_estimate" because="weights by their ratio, from the top"
def best_of_n_estimate(proxy, value, n):
    prompts, size = proxy.shape
    if n < 1 or n > size:
        raise ValueError("no such subset")
    # The top one is in n of N subsets; each next lower one is (i − n)/(i − 1) times as likely.
    weight, total = n / size, torch.zeros(prompts, dtype=torch.float64)
    order = proxy.argsort(dim=1, descending=True)
    for j in range(size - n + 1):
        total = total + weight * value.gather(1, order[:, j : j + 1])[:, 0].double()
        i = size - j
        weight = weight * (i - n) / (i - 1) if i > 1 else 0.0
    return total.to(value.dtype)

# %% wrong="questions" because="probabilities of the other, rates of best-of-n as 1 − 1/n"
- "preferred": 1 / (1 + math.exp(1.0)),
+ "preferred": 1 / (1 + math.exp(-1.0)),

# %% wrong="questions" because="the margin shifts with the rewards"
- "shift": 0.0,
+ "shift": 7.0,

# %% wrong="questions" because="1 − 1/n"
- "draws": 19.0,
+ "draws": 20.0,

# %% wrong="questions" because="divided by beta"
- "leash": 0.2 * math.log(20),
+ "leash": math.log(20) / 0.2,

# %% wrong="questions" because="the inverse factor"
- "scale": 0.75,
+ "scale": 4 / 3,

# %% wrong="questions" because="old held-out pairs would tell"
- "hacking": "fresh labels",
+ "hacking": "accuracy",

# %% right="questions" because="plain numbers"
def questions():
    return {
        "preferred": 0.26894,
        "shift": 0,
        "draws": 19,
        "leash": 0.59915,
        "scale": 3 / 4,
        "hacking": "fresh labels",
    }

# %% wrong="best_of_n" because="rewards are rounded to the format of p, and tie"
def best_of_n(p: Tensor, rewards: Tensor, n: int) -> Tensor:
    rewards = rewards.to(p.dtype)
    at_most = (rewards[None, :] <= rewards[:, None]).to(p.dtype) @ p
    less = (rewards[None, :] < rewards[:, None]).to(p.dtype) @ p
    total = sum(at_most**k * less ** (n - 1 - k) for k in range(n))
    return p * total


def kl_best_of_n_bound(n: int) -> float:
    return math.log(n) - (n - 1) / n

# %% wrong="best_of_n_estimate" because="logarithms of binomials in float32"
def best_of_n_estimate(proxy: Tensor, value: Tensor, n: int) -> Tensor:
    size = proxy.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"n must be between 1 and {size}")

    def log_comb(a: Tensor, b: int) -> Tensor:
        return torch.lgamma(a + 1) - math.lgamma(b + 1) - torch.lgamma(a - b + 1)

    ordered = value.gather(1, proxy.argsort(dim=1))[:, n - 1 :]
    rank = torch.arange(n, size + 1, dtype=value.dtype, device=value.device)
    whole = torch.tensor(float(size), dtype=value.dtype, device=value.device)
    weight = (log_comb(rank - 1, n - 1) - log_comb(whole, n)).exp()
    return ordered @ weight

# %% wrong="remove_length" because="lengths in half precision"
def remove_length(rewards: Tensor, lengths: Tensor) -> Tensor:
    lengths = lengths.to(rewards.dtype)
    if rewards.dtype in (torch.float16, torch.bfloat16):
        rewards, lengths = rewards.float(), lengths.float()
    lengths = lengths - lengths[0]
    offset = lengths - lengths.mean()
    if not offset.any():
        return rewards
    slope = (offset * (rewards - rewards.mean())).sum() / offset.square().sum()
    return rewards - slope * offset

# %% wrong="remove_length" because="half precision stays where all lengths are equal"
def remove_length(rewards: Tensor, lengths: Tensor) -> Tensor:
    if (lengths == lengths[0]).all():
        return rewards.clone()
    r = rewards.float() if rewards.dtype in (torch.float16, torch.bfloat16) else rewards
    x = lengths.double()
    x = (x - x.mean()).to(r.dtype)
    slope = (x * (r - r.mean())).sum() / x.square().sum()
    return r - slope * x
