# %% [markdown]
# Answers to lesson 06. Each cell stands in for an exercise cell, whole.

# %% wrong="sgd_momentum_step" because="averages gradients instead of summing them"
def sgd_momentum_step(param, grad, state, lr, momentum=0.9, weight_decay=0.0, nesterov=False):
    grad = grad + weight_decay * param
    buffer = (
        momentum * state.get("momentum_buffer", torch.zeros_like(param)) + (1 - momentum) * grad
    )
    direction = grad + momentum * buffer if nesterov else buffer
    return param - lr * direction, {"momentum_buffer": buffer}

# %% wrong="sgd_momentum_step" because="Nesterov uses the buffer from before this update"
def sgd_momentum_step(param, grad, state, lr, momentum=0.9, weight_decay=0.0, nesterov=False):
    grad = grad + weight_decay * param
    old = state.get("momentum_buffer", torch.zeros_like(param))
    buffer = momentum * old + grad
    direction = grad + momentum * old if nesterov else buffer
    return param - lr * direction, {"momentum_buffer": buffer}

# %% wrong="sgd_momentum_step" because="updates the buffer in place"
def sgd_momentum_step(param, grad, state, lr, momentum=0.9, weight_decay=0.0, nesterov=False):
    grad = grad + weight_decay * param
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(param)
    buffer = state["momentum_buffer"]
    buffer.mul_(momentum).add_(grad)
    direction = grad + momentum * buffer if nesterov else buffer
    return param - lr * direction, state

# %% wrong="sgd_momentum_step" because="weight decay outside the momentum"
def sgd_momentum_step(param, grad, state, lr, momentum=0.9, weight_decay=0.0, nesterov=False):
    buffer = momentum * state.get("momentum_buffer", torch.zeros_like(param)) + grad
    direction = grad + momentum * buffer if nesterov else buffer
    return param - lr * (direction + weight_decay * param), {"momentum_buffer": buffer}

# %% wrong="sgd_momentum_step" because="the learning rate is in the buffer, so that a schedule acts late"
- buffer = momentum * state.get("momentum_buffer", torch.zeros_like(param)) + grad
- direction = grad + momentum * buffer if nesterov else buffer
- return param - lr * direction, {"momentum_buffer": buffer}
+ buffer = momentum * state.get("momentum_buffer", torch.zeros_like(param)) + lr * grad
+ direction = lr * grad + momentum * buffer if nesterov else buffer
+ return param - direction, {"momentum_buffer": buffer}

# %% right="sgd_momentum_step" because="a velocity that already points downhill"
def sgd_momentum_step(param, grad, state, lr, momentum=0.9, weight_decay=0.0, nesterov=False):
    g = torch.add(grad, param, alpha=weight_decay)
    velocity = state["momentum_buffer"].mul(-momentum).sub(g) if state else -g
    step = torch.sub(momentum * velocity, g) if nesterov else velocity
    return torch.add(param, step, alpha=lr), {"momentum_buffer": -velocity}

# %% wrong="adam_step" because="no bias correction"
def adam_step(param, grad, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    grad = grad + weight_decay * param
    m = betas[0] * state.get("exp_avg", torch.zeros_like(param)) + (1 - betas[0]) * grad
    v = betas[1] * state.get("exp_avg_sq", torch.zeros_like(param)) + (1 - betas[1]) * grad**2
    return param - lr * m / (v.sqrt() + eps), {"exp_avg": m, "exp_avg_sq": v}

# %% wrong="adam_step" because="eps inside the root"
def adam_step(param, grad, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    t = state.get("step", 0) + 1
    grad = grad + weight_decay * param
    m = betas[0] * state.get("exp_avg", torch.zeros_like(param)) + (1 - betas[0]) * grad
    v = betas[1] * state.get("exp_avg_sq", torch.zeros_like(param)) + (1 - betas[1]) * grad**2
    size = (v / (1 - betas[1] ** t) + eps).sqrt()
    return param - lr * m / (1 - betas[0] ** t) / size, {"step": t, "exp_avg": m, "exp_avg_sq": v}

# %% wrong="adam_step" because="keeps the corrected averages"
def adam_step(param, grad, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    t = state.get("step", 0) + 1
    grad = grad + weight_decay * param
    m = betas[0] * state.get("exp_avg", torch.zeros_like(param)) + (1 - betas[0]) * grad
    v = betas[1] * state.get("exp_avg_sq", torch.zeros_like(param)) + (1 - betas[1]) * grad**2
    m, v = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return param - lr * m / (v.sqrt() + eps), {"step": t, "exp_avg": m, "exp_avg_sq": v}

# %% wrong="adam_step" because="decouples the decay, as AdamW does"
def adam_step(param, grad, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    t = state.get("step", 0) + 1
    m = betas[0] * state.get("exp_avg", torch.zeros_like(param)) + (1 - betas[0]) * grad
    v = betas[1] * state.get("exp_avg_sq", torch.zeros_like(param)) + (1 - betas[1]) * grad**2
    step = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return param * (1 - lr * weight_decay) - lr * step, {"step": t, "exp_avg": m, "exp_avg_sq": v}

# %% wrong="adam_step" because="the step counter never moves"
def adam_step(param, grad, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    t = state.get("step", 1)
    grad = grad + weight_decay * param
    m = betas[0] * state.get("exp_avg", torch.zeros_like(param)) + (1 - betas[0]) * grad
    v = betas[1] * state.get("exp_avg_sq", torch.zeros_like(param)) + (1 - betas[1]) * grad**2
    step = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return param - lr * step, {"step": t, "exp_avg": m, "exp_avg_sq": v}

# %% right="adam_step" because="the correction folded into the learning rate and eps"
def adam_step(param, grad, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    if not state:
        zeros = torch.zeros_like(param)
        state = {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros}
    t = state["step"] + 1
    grad = torch.add(grad, param, alpha=weight_decay)
    m = torch.lerp(state["exp_avg"], grad, 1 - betas[0])
    v = state["exp_avg_sq"].mul(betas[1]).addcmul(grad, grad, value=1 - betas[1])
    root = math.sqrt(1 - betas[1] ** t)
    rate = lr * root / (1 - betas[0] ** t)
    new = torch.addcdiv(param, m, v.sqrt() + eps * root, value=-rate)
    return new, {"step": t, "exp_avg": m, "exp_avg_sq": v}

# %% wrong="adam_step" because="other names in the state"
- return param - lr * mean / (size + eps), {
-     "step": t,
-     "exp_avg": exp_avg,
-     "exp_avg_sq": exp_avg_sq,
- }
+ return param - lr * mean / (size + eps), {"step": t, "m": exp_avg, "v": exp_avg_sq}

- exp_avg = beta1 * state.get("exp_avg", torch.zeros_like(param)) + (1 - beta1) * grad
- exp_avg_sq = beta2 * state.get("exp_avg_sq", torch.zeros_like(param)) + (1 - beta2) * grad**2
+ exp_avg = beta1 * state.get("m", torch.zeros_like(param)) + (1 - beta1) * grad
+ exp_avg_sq = beta2 * state.get("v", torch.zeros_like(param)) + (1 - beta2) * grad**2

# %% wrong="adam_step" because="counts updates in a tensor that broadcasts over the parameter"
- t = state.get("step", 0) + 1
+ t = state.get("step", torch.zeros_like(param)) + 1

# %% wrong="adam_step" because="averages in float32 whatever the parameter's format"
- exp_avg = beta1 * state.get("exp_avg", torch.zeros_like(param)) + (1 - beta1) * grad
+ exp_avg = beta1 * state.get("exp_avg", torch.zeros(param.shape)) + (1 - beta1) * grad.float()

# %% wrong="adamw_step" because="L2 through the gradient"
def adamw_step(param, grad, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    return adam_step(param, grad, state, lr, betas, eps, weight_decay)

# %% wrong="adamw_step" because="decay without the learning rate"
def adamw_step(param, grad, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    new, state = adam_step(param, grad, state, lr, betas, eps)
    return new - weight_decay * param, state

# %% wrong="adamw_step" because="decays what Adam has already moved"
def adamw_step(param, grad, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    new, state = adam_step(param, grad, state, lr, betas, eps)
    return (1 - lr * weight_decay) * new, state

# %% right="adamw_step" because="Adam, started from the shrunken parameter"
def adamw_step(param, grad, state, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    return adam_step(param * (1 - lr * weight_decay), grad, state, lr, betas, eps)

# %% wrong="lion_step" because="the two betas exchanged"
def lion_step(param, grad, state, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    m = state.get("exp_avg", torch.zeros_like(param))
    direction = (betas[1] * m + (1 - betas[1]) * grad).sign()
    return param - lr * (direction + weight_decay * param), {
        "exp_avg": betas[0] * m + (1 - betas[0]) * grad
    }

# %% wrong="lion_step" because="the sign of the updated average"
def lion_step(param, grad, state, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    m = betas[1] * state.get("exp_avg", torch.zeros_like(param)) + (1 - betas[1]) * grad
    return param - lr * (m.sign() + weight_decay * param), {"exp_avg": m}

# %% wrong="lion_step" because="remembers the step's own average"
def lion_step(param, grad, state, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    c = betas[0] * state.get("exp_avg", torch.zeros_like(param)) + (1 - betas[0]) * grad
    return param - lr * (c.sign() + weight_decay * param), {"exp_avg": c}

# %% wrong="lion_step" because="weight decay goes into the sign"
def lion_step(param, grad, state, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    m = state.get("exp_avg", torch.zeros_like(param))
    c = betas[0] * m + (1 - betas[0]) * grad + weight_decay * param
    return param - lr * c.sign(), {"exp_avg": betas[1] * m + (1 - betas[1]) * grad}

# %% right="lion_step" because="decay first, lerp, comparisons in place of sign"
def lion_step(param, grad, state, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    m = state["exp_avg"] if state else torch.zeros_like(grad)
    c = torch.lerp(grad, m, betas[0])
    direction = (c > 0).to(c.dtype) - (c < 0).to(c.dtype)
    new = param * (1 - lr * weight_decay) - lr * direction
    return new, {"exp_avg": torch.lerp(grad, m, betas[1])}

# %% wrong="newton_schulz" because="always multiplies out the rows" base="always-multiplies"
def newton_schulz(g, steps=5, eps=1e-7):
    x = g / (g.norm() + eps)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x

# %% wrong="newton_schulz" because="not divided by its norm"
def newton_schulz(g, steps=5, eps=1e-7):
    x = g.T if g.shape[0] > g.shape[1] else g
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x

# %% wrong="newton_schulz" because="the exact quintic, which is too slow for five rounds"
def newton_schulz(g, steps=5, eps=1e-7):
    x = g / (g.norm() + eps)
    tall = g.shape[0] > g.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = 15 / 8 * x + (-10 / 8 * gram + 3 / 8 * gram @ gram) @ x
    return x.T if tall else x

# %% wrong="newton_schulz" because="a singular value decomposition"
def newton_schulz(g, steps=5, eps=1e-7):
    u, s, vt = torch.linalg.svd(g / (g.norm() + eps), full_matrices=False)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ vt

# %% wrong="newton_schulz" because="0 / 0 for a matrix of zeros"
def newton_schulz(g, steps=5, eps=1e-7):
    x = g / g.norm()
    tall = g.shape[0] > g.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x

# %% wrong="newton_schulz" because="forgets to transpose back" of="always-multiplies"
  x = g / (g.norm() + eps)
+ x = x.T if g.shape[0] > g.shape[1] else x

# %% right="newton_schulz" because="multiplies from the right by the smaller square"
def newton_schulz(g, steps=5, eps=1e-7):
    rows, cols = g.shape
    x = g / torch.linalg.matrix_norm(g).clamp(min=eps)
    for _ in range(steps):
        if rows <= cols:
            a = x @ x.mT
            x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
        else:
            a = x.mT @ x
            x = torch.addmm(x, x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), beta=3.4445)
    return x

# %% wrong="muon_step" because="the scale is cols / rows" base="scale-cols"
def muon_step(
    param,
    grad,
    state,
    lr=0.02,
    momentum=0.95,
    weight_decay=0.0,
    nesterov=True,
    adjust_lr_fn="original",
    orthogonalize=newton_schulz,
):
    if param.dim() != 2:
        raise ValueError(f"no matrix: {tuple(param.shape)}")
    rows, cols = param.shape
    scales = {
        "original": max(1, cols / rows) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, cols) ** 0.5,
    }
    if adjust_lr_fn not in scales:
        raise ValueError(adjust_lr_fn)
    buffer = (
        momentum * state.get("momentum_buffer", torch.zeros_like(param)) + (1 - momentum) * grad
    )
    direction = momentum * buffer + (1 - momentum) * grad if nesterov else buffer
    return (
        (1 - lr * weight_decay) * param - lr * scales[adjust_lr_fn] * orthogonalize(direction),
        {"momentum_buffer": buffer},
    )

# %% wrong="muon_step" because="decays with the scaled learning rate" of="scale-cols"
- "original": max(1, cols / rows) ** 0.5,
+ "original": max(1, rows / cols) ** 0.5,

      raise ValueError(adjust_lr_fn)
+ rate = lr * scales[adjust_lr_fn]

- return (
-     (1 - lr * weight_decay) * param - lr * scales[adjust_lr_fn] * orthogonalize(direction),
-     {"momentum_buffer": buffer},
- )
+ return (1 - rate * weight_decay) * param - rate * orthogonalize(direction), {
+     "momentum_buffer": buffer
+ }

# %% wrong="muon_step" because="momentum after orthogonalization"
def muon_step(
    param,
    grad,
    state,
    lr=0.02,
    momentum=0.95,
    weight_decay=0.0,
    nesterov=True,
    adjust_lr_fn="original",
    orthogonalize=newton_schulz,
):
    if param.dim() != 2:
        raise ValueError(f"no matrix: {tuple(param.shape)}")
    rows, cols = param.shape
    scales = {
        "original": max(1, rows / cols) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, cols) ** 0.5,
    }
    if adjust_lr_fn not in scales:
        raise ValueError(adjust_lr_fn)
    flat = orthogonalize(grad)
    buffer = (
        momentum * state.get("momentum_buffer", torch.zeros_like(param)) + (1 - momentum) * flat
    )
    direction = momentum * buffer + (1 - momentum) * flat if nesterov else buffer
    return (1 - lr * weight_decay) * param - lr * scales[adjust_lr_fn] * direction, {
        "momentum_buffer": buffer
    }

# %% wrong="muon_step" because="the first axis of any tensor taken for rows"
def muon_step(
    param,
    grad,
    state,
    lr=0.02,
    momentum=0.95,
    weight_decay=0.0,
    nesterov=True,
    adjust_lr_fn="original",
    orthogonalize=newton_schulz,
):
    rows, cols = param.shape[0], param.shape[-1]
    scale = (
        0.2 * max(rows, cols) ** 0.5
        if adjust_lr_fn == "match_rms_adamw"
        else max(1, rows / cols) ** 0.5
    )
    buffer = (
        momentum * state.get("momentum_buffer", torch.zeros_like(param)) + (1 - momentum) * grad
    )
    direction = momentum * buffer + (1 - momentum) * grad if nesterov else buffer
    return (1 - lr * weight_decay) * param - lr * scale * orthogonalize(direction), {
        "momentum_buffer": buffer
    }

# %% wrong="muon_step" because="ignores nesterov" of="scale-cols"
- "original": max(1, cols / rows) ** 0.5,
+ "original": max(1, rows / cols) ** 0.5,

- direction = momentum * buffer + (1 - momentum) * grad if nesterov else buffer

- (1 - lr * weight_decay) * param - lr * scales[adjust_lr_fn] * orthogonalize(direction),
+ (1 - lr * weight_decay) * param - lr * scales[adjust_lr_fn] * orthogonalize(buffer),

# %% right="muon_step" because="lerp, as PyTorch writes it"
def muon_step(
    param,
    grad,
    state,
    lr=0.02,
    momentum=0.95,
    weight_decay=0.0,
    nesterov=True,
    adjust_lr_fn="original",
    orthogonalize=newton_schulz,
):
    if param.ndim != 2:
        raise ValueError(f"expected a matrix, got shape {list(param.shape)}")
    rows, cols = param.shape
    match adjust_lr_fn:
        case "original":
            rate = lr * (rows / cols) ** 0.5 if rows > cols else lr
        case "match_rms_adamw":
            rate = lr * (0.04 * max(rows, cols)) ** 0.5
        case other:
            raise ValueError(f"unknown adjust_lr_fn {other}")
    old = state["momentum_buffer"] if state else torch.zeros_like(grad)
    buf = torch.lerp(old, grad, 1 - momentum)
    update = orthogonalize(torch.lerp(grad, buf, momentum) if nesterov else buf)
    return param.mul(1 - lr * weight_decay).sub(update, alpha=rate), {"momentum_buffer": buf}

# %% wrong="clip_grad_norm" because="clips each tensor by its own norm"
def clip_grad_norm(params, max_norm):
    grads = [p.grad for p in params if p.grad is not None]
    total = math.sqrt(sum(float(g.float().norm()) ** 2 for g in grads))
    if not math.isfinite(total):
        raise RuntimeError(f"the norm is {total}")
    for g in grads:
        if g.float().norm() > max_norm:
            g.mul_(max_norm / g.float().norm())
    return torch.tensor(total)

# %% wrong="clip_grad_norm" because="walks through a generator twice"
def clip_grad_norm(params, max_norm):
    total = torch.tensor(
        sum(float(p.grad.double().square().sum()) for p in params if p.grad is not None) ** 0.5
    )
    if not torch.isfinite(total):
        raise RuntimeError(f"the norm is {total}")
    for p in params:
        if p.grad is not None and total > max_norm:
            p.grad.mul_(max_norm / total)
    return total

# %% wrong="clip_grad_norm" because="a NaN passes in silence" base="nan-passes"
def clip_grad_norm(params, max_norm):
    grads = [p.grad for p in params if p.grad is not None]
    total = torch.tensor(sum(float(g.float().square().sum()) for g in grads) ** 0.5)
    for g in grads:
        g.mul_(torch.clamp(max_norm / (total + 1e-6), max=1.0))
    return total

# %% wrong="clip_grad_norm" because="scales short gradients up"
def clip_grad_norm(params, max_norm):
    grads = [p.grad for p in params if p.grad is not None]
    total = torch.tensor(sum(float(g.float().square().sum()) for g in grads) ** 0.5)
    if not torch.isfinite(total):
        raise RuntimeError(f"the norm is {total}")
    for g in grads:
        g.mul_(max_norm / total)
    return total

# %% wrong="clip_grad_norm" because="squares half-precision gradients in half precision" of="nan-passes"
- total = torch.tensor(sum(float(g.float().square().sum()) for g in grads) ** 0.5)
+ total = sum([(g**2).sum() for g in grads], torch.tensor(0.0)).sqrt()
+ if not torch.isfinite(total):
+     raise RuntimeError(f"the norm is {total}")

# %% wrong="clip_grad_norm" because="returns the norm after clipping"
def clip_grad_norm(params, max_norm):
    grads = [p.grad for p in params if p.grad is not None]
    total = torch.tensor(sum(float(g.float().square().sum()) for g in grads) ** 0.5)
    if not torch.isfinite(total):
        raise RuntimeError(f"the norm is {total}")
    if total > max_norm:
        for g in grads:
            g.mul_(max_norm / total)
    return total.clamp(max=max_norm)

# %% right="clip_grad_norm" because="in float64, whatever the gradients' formats"
- norms = [
-     torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
-     for grad in grads
- ]
+ norms = [grad.double().norm() for grad in grads]

# %% right="clip_grad_norm" because="a clamped factor, as PyTorch has it, and a sum of squares"
def clip_grad_norm(params, max_norm):
    params = [p for p in params if p.grad is not None]
    squares = [
        p.grad.float().square().sum() if p.grad.dtype != torch.float64 else p.grad.square().sum()
        for p in params
    ]
    total = torch.sqrt(torch.stack(squares).sum()) if squares else torch.zeros(())
    if total.isnan() or total.isinf():
        raise RuntimeError("the gradient is not finite")
    factor = min(1.0, max_norm / (float(total) + 1e-6)) if total > max_norm else 1.0
    for p in params:
        p.grad *= factor
    return total

# %% wrong="schedules" because="counts the warm-up from one"
def warmup_cosine(step, lr, warmup_steps, total_steps, min_lr=0.0):
    if warmup_steps > total_steps:
        raise ValueError("warm-up does not fit")
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if step >= total_steps:
        return min_lr
    return min_lr + 0.5 * (lr - min_lr) * (
        1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))
    )


def warmup_stable_decay(step, lr, warmup_steps, decay_steps, total_steps, min_lr=0.0):
    if warmup_steps + decay_steps > total_steps:
        raise ValueError("warm-up and decay do not fit")
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if step >= total_steps:
        return min_lr
    if step <= total_steps - decay_steps:
        return lr
    return min_lr + (lr - min_lr) * (total_steps - step) / decay_steps

# %% wrong="schedules" because="the cosine rises again after the end, and the decay falls below min_lr"
def warmup_cosine(step, lr, warmup_steps, total_steps, min_lr=0.0):
    if warmup_steps > total_steps:
        raise ValueError("warm-up does not fit")
    if step < warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(step, lr, warmup_steps, decay_steps, total_steps, min_lr=0.0):
    if warmup_steps + decay_steps > total_steps:
        raise ValueError("warm-up and decay do not fit")
    if step < warmup_steps:
        return lr * step / warmup_steps
    if step < total_steps - decay_steps or decay_steps == 0:
        return lr
    return min_lr + (lr - min_lr) * (total_steps - step) / decay_steps

# %% wrong="schedules" because="divides by zero without a warm-up, and forgets min_lr"
def warmup_cosine(step, lr, warmup_steps, total_steps, min_lr=0.0):
    if warmup_steps > total_steps:
        raise ValueError("warm-up does not fit")
    if step <= warmup_steps:
        return lr * (step / warmup_steps)
    progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return 0.5 * lr * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(step, lr, warmup_steps, decay_steps, total_steps, min_lr=0.0):
    if warmup_steps + decay_steps > total_steps:
        raise ValueError("warm-up and decay do not fit")
    return lr * min(step / warmup_steps, 1.0, max(0.0, (total_steps - step) / decay_steps))

# %% right="schedules" because="joined from pieces, the cosine through its half angle"
def warmup_cosine(step, lr, warmup_steps, total_steps, min_lr=0.0):
    if total_steps < warmup_steps:
        raise ValueError("the warm-up is longer than the run")
    if step < warmup_steps:
        return step / warmup_steps * lr
    if step == warmup_steps < total_steps:
        return lr
    left = max(0, total_steps - step) / max(1, total_steps - warmup_steps)
    return min_lr + (lr - min_lr) * (math.sin(math.pi / 2 * left) ** 2)


def warmup_stable_decay(step, lr, warmup_steps, decay_steps, total_steps, min_lr=0.0):
    stable_end = total_steps - decay_steps
    if stable_end < warmup_steps:
        raise ValueError("the run is too short for warm-up and decay")
    if step < warmup_steps:
        return step / warmup_steps * lr
    if step >= total_steps:
        return min_lr
    if step <= stable_end:
        return lr
    share = (step - stable_end) / decay_steps
    return (1 - share) * lr + share * min_lr

# %% wrong="accumulate_gradients" because="the mean of the micro-batches' means"
def accumulate_gradients(model, micro_batches):
    model.zero_grad()
    total = 0.0
    for inputs, targets in micro_batches:
        if not (targets != -100).any():
            continue
        loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten()) / len(micro_batches)
        loss.backward()
        total += loss.item()
    if total == 0.0:
        raise ValueError("no target")
    return total

# %% wrong="accumulate_gradients" because="padding counts as tokens" base="padding-counts"
def accumulate_gradients(model, micro_batches):
    tokens = sum(targets.numel() for _, targets in micro_batches)
    if not any((targets != -100).any() for _, targets in micro_batches):
        raise ValueError("no target")
    model.zero_grad()
    total = 0.0
    for inputs, targets in micro_batches:
        loss = (
            F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), reduction="sum")
            / tokens
        )
        loss.backward()
        total += loss.item()
    return total

# %% wrong="accumulate_gradients" because="one backward for the whole batch, which holds every graph"
def accumulate_gradients(model, micro_batches):
    tokens = sum(int((targets != -100).sum()) for _, targets in micro_batches)
    if tokens == 0:
        raise ValueError("no target")
    model.zero_grad()
    loss = (
        sum(
            F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), reduction="sum")
            for inputs, targets in micro_batches
        )
        / tokens
    )
    loss.backward()
    return loss.item()

# %% wrong="accumulate_gradients" because="adds to the gradients of the last update" of="padding-counts"
- tokens = sum(targets.numel() for _, targets in micro_batches)
- if not any((targets != -100).any() for _, targets in micro_batches):
+ tokens = sum(int((targets != -100).sum()) for _, targets in micro_batches)
+ if tokens == 0:

- model.zero_grad()

# %% wrong="accumulate_gradients" because="keeps the gradient of the last micro-batch only"
def accumulate_gradients(model, micro_batches):
    tokens = sum(int((targets != -100).sum()) for _, targets in micro_batches)
    if tokens == 0:
        raise ValueError("no target")
    total = 0.0
    for inputs, targets in micro_batches:
        model.zero_grad()
        loss = (
            F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), reduction="sum")
            / tokens
        )
        loss.backward()
        total += loss.item()
    return total

# %% right="accumulate_gradients" because="sums first, divides at the end" base="sums-first"
def accumulate_gradients(model, micro_batches):
    params, count, total = [p for p in model.parameters() if p.requires_grad], 0, 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for inputs, targets in micro_batches:
        log_p = model(inputs).log_softmax(-1)
        keep = targets != -100
        loss = (
            -log_p.gather(-1, targets.masked_fill(~keep, 0).unsqueeze(-1)).squeeze(-1)[keep].sum()
        )
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        for p, grad in zip(params, grads, strict=True):
            if grad is not None:
                p.grad += grad
        count += int(keep.sum())
        total += float(loss.detach())
        del log_p, loss
    if count == 0:
        raise ValueError("there is nothing to predict")
    for p in params:
        p.grad /= count
    return total / count

# %% wrong="accumulate_gradients" of="sums-first" because="a parameter that no loss depends on raises"
- grads = torch.autograd.grad(loss, params, allow_unused=True)
+ grads = torch.autograd.grad(loss, params)

# %% wrong="accumulate_gradients" of="sums-first" because="the old gradient of a frozen parameter stays"
- for p in model.parameters():
-     p.grad = torch.zeros_like(p)
+ for p in params:
+     p.grad = torch.zeros_like(p)

# %% wrong="accumulate_gradients" because="puts the model into training mode"
- model.zero_grad(set_to_none=True)
+ model.train()
+ model.zero_grad(set_to_none=True)

# %% wrong="accumulate_gradients" because="a tensor for the mean loss"
- total += loss.item()
+ total += loss.detach()

# %% wrong="clip_grad_norm" because="PyTorch's clamped factor, which shortens a norm of exactly max_norm"
- if total > max_norm:
-     for grad in grads:
-         grad.mul_(max_norm / total)
+ factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
+ for grad in grads:
+     grad.mul_(factor)

# %% wrong="clip_grad_norm" because="widens float16 only"
- torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
+ torch.linalg.vector_norm(grad.float() if grad.dtype == torch.float16 else grad)

# %% wrong="newton_schulz" because="an eps of its own"
- x = g / (g.norm() + eps)
+ x = g / (g.norm() + 1e-7)

# %% wrong="newton_schulz" because="float32 throughout"
- x = g / (g.norm() + eps)
+ x = g.float() / (g.float().norm() + eps)

# %% right="newton_schulz" because="the norm clamped, the square of the smaller side by addmm"
def newton_schulz(g, steps=5, eps=1e-7):
    rows, cols = g.shape
    x = (g.mT if rows > cols else g) / torch.clamp(torch.linalg.matrix_norm(g), min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        inner = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, inner, x, beta=3.4445)
    return x.mT if rows > cols else x

# %% wrong="sgd_momentum_step" because="the buffer under a name of its own"
- buffer = momentum * state.get("momentum_buffer", torch.zeros_like(param)) + grad
+ buffer = momentum * state.get("velocity", torch.zeros_like(param)) + grad

- return param - lr * direction, {"momentum_buffer": buffer}
+ return param - lr * direction, {"velocity": buffer}

# %% wrong="train" because="decays matrices only, not what has more axes"
- {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
- {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
+ {"params": [p for p in params if p.dim() == 2], "weight_decay": weight_decay},
+ {"params": [p for p in params if p.dim() != 2], "weight_decay": 0.0},

# %% wrong="train" because="tensors in the history"
- history["grad_norm"].append(norm.item())
+ history["grad_norm"].append(norm)

# %% wrong="train" because="counts updates from zero" base="counts-updates"
def train(model, batches, lr, warmup_steps=0, weight_decay=0.1, max_norm=1.0):
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    history = {"loss": [], "grad_norm": [], "lr": []}
    for t, micro_batches in enumerate(batches):
        rate = warmup_cosine(t, lr, warmup_steps, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = rate
        history["loss"].append(accumulate_gradients(model, micro_batches))
        history["grad_norm"].append(
            nn.utils.clip_grad_norm_(params, max_norm, error_if_nonfinite=True).item()
        )
        history["lr"].append(rate)
        optimizer.step()
    return history

# %% wrong="train" because="decays biases and gains too"
def train(model, batches, lr, warmup_steps=0, weight_decay=0.1, max_norm=1.0):
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=weight_decay)
    history = {"loss": [], "grad_norm": [], "lr": []}
    for t, micro_batches in enumerate(batches, 1):
        optimizer.param_groups[0]["lr"] = warmup_cosine(t, lr, warmup_steps, len(batches))
        history["loss"].append(accumulate_gradients(model, micro_batches))
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm, error_if_nonfinite=True)
        history["grad_norm"].append(norm.item())
        history["lr"].append(optimizer.param_groups[0]["lr"])
        optimizer.step()
    return history

# %% wrong="train" because="clips after the update" of="counts-updates"
- for t, micro_batches in enumerate(batches):
+ for t, micro_batches in enumerate(batches, 1):

  history["loss"].append(accumulate_gradients(model, micro_batches))
+ optimizer.step()

- optimizer.step()

# %% wrong="train" because="an update for every micro-batch"
def train(model, batches, lr, warmup_steps=0, weight_decay=0.1, max_norm=1.0):
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    history = {"loss": [], "grad_norm": [], "lr": []}
    for t, micro_batches in enumerate(batches, 1):
        rate = warmup_cosine(t, lr, warmup_steps, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = []
        for micro_batch in micro_batches:
            losses.append(accumulate_gradients(model, [micro_batch]))
            norm = nn.utils.clip_grad_norm_(params, max_norm, error_if_nonfinite=True).item()
            optimizer.step()
        history["loss"].append(sum(losses) / len(losses))
        history["grad_norm"].append(norm)
        history["lr"].append(rate)
    return history

# %% right="train" because="the lesson's own parts, without torch.optim"
def train(model, batches, lr, warmup_steps=0, weight_decay=0.1, max_norm=1.0):
    states, history = {}, {"loss": [], "grad_norm": [], "lr": []}
    for t, micro_batches in enumerate(batches, start=1):
        rate = warmup_cosine(t, lr, warmup_steps, len(batches))
        history["loss"].append(accumulate_gradients(model, micro_batches))
        history["grad_norm"].append(float(clip_grad_norm(model.parameters(), max_norm)))
        history["lr"].append(rate)
        with torch.no_grad():
            for name, param in model.named_parameters():
                decay = weight_decay if param.dim() > 1 else 0.0
                new, states[name] = adamw_step(
                    param, param.grad, states.get(name, {}), rate, (0.9, 0.95), 1e-8, decay
                )
                param.copy_(new)
    return history

# %% right="train" because="LambdaLR, set one update ahead"
def train(model, batches, lr, warmup_steps=0, weight_decay=0.1, max_norm=1.0):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0)],
        lr=lr,
        betas=(0.9, 0.95),
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: warmup_cosine(t + 1, 1.0, warmup_steps, len(batches))
    )
    losses, norms, rates = [], [], []
    for micro_batches in batches:
        losses.append(accumulate_gradients(model, micro_batches))
        norms.append(float(clip_grad_norm(model.parameters(), max_norm)))
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return dict(loss=losses, grad_norm=norms, lr=rates)

# %% wrong="key_questions" because="the limit of plain gradient descent"
- return 2 * (1 + momentum) / curvature
+ return 2 / curvature

# %% wrong="key_questions" because="thinks momentum only speeds up, so the limit shrinks"
- return 2 * (1 + momentum) / curvature
+ return 2 * (1 - momentum) / curvature

# %% wrong="key_questions" because="counts numbers"
- return 4 * parameters * {"sgd": 0, "momentum": 1, "adamw": 2, "lion": 1, "muon": 1}[optimizer]
+ return parameters * {"sgd": 0, "momentum": 1, "adamw": 2, "lion": 1, "muon": 1}[optimizer]

# %% wrong="key_questions" because="gives Lion and Muon two buffers"
- return 4 * parameters * {"sgd": 0, "momentum": 1, "adamw": 2, "lion": 1, "muon": 1}[optimizer]
+ return 4 * parameters * {"sgd": 0, "momentum": 1, "adamw": 2, "lion": 2, "muon": 2}[optimizer]

# %% wrong="key_questions" because="Adam with L2 too"
- return {"clipped_sgd", "adam", "adamw", "muon"}
+ return {"clipped_sgd", "adam", "adam_l2", "adamw", "muon"}

# %% wrong="key_questions" because="forgets that clipping normalizes"
- return {"clipped_sgd", "adam", "adamw", "muon"}
+ return {"adam", "adamw", "muon"}

# %% wrong="key_questions" because="the inverse ratio"
- return lr * math.sqrt(max(1, rows / cols)) / (0.2 * math.sqrt(max(rows, cols)))
+ return lr * (0.2 * math.sqrt(max(rows, cols))) / math.sqrt(max(1, rows / cols))

# %% wrong="key_questions" because="right for square weights only"
- return lr * math.sqrt(max(1, rows / cols)) / (0.2 * math.sqrt(max(rows, cols)))
+ return lr / (0.2 * math.sqrt(max(rows, cols)))

# %% right="key_questions" because="sums, cases, the complement, and only the columns left"
def largest_stable_lr(curvature, momentum):
    return 2.0 / curvature + 2.0 * momentum / curvature


def state_bytes(parameters, optimizer):
    if optimizer == "sgd":
        return 0
    return parameters * (8 if optimizer == "adamw" else 4)


def unchanged_by_loss_scale():
    rules = {"sgd", "momentum", "clipped_sgd", "adam", "adam_l2", "adamw", "muon"}
    return rules - {"sgd", "momentum", "adam_l2"}


def equivalent_lr(lr, rows, cols):
    return 5 * lr / math.sqrt(cols)
