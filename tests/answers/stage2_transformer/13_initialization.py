# Right and wrong answers to the exercises of lesson 13: see CONTRIBUTING.md.

# %% wrong="fan_init" because="a uniform bound without the square root of three" base="uniform-bound"
def xavier_uniform_(w, gain=1.0, generator=None):
    if w.dim() < 2:
        raise ValueError
    bound = gain * math.sqrt(2 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))
    with torch.no_grad():
        return w.uniform_(-bound, bound, generator=generator)


def kaiming_normal_(w, mode="fan_in", gain=math.sqrt(2), generator=None):
    if w.dim() < 2 or mode not in ("fan_in", "fan_out"):
        raise ValueError
    fan = (w.shape[1] if mode == "fan_in" else w.shape[0]) * math.prod(w.shape[2:])
    with torch.no_grad():
        return w.normal_(0, gain / math.sqrt(fan), generator=generator)

# %% wrong="fan_init" because="fan-in and fan-out exchanged" of="uniform-bound"
- bound = gain * math.sqrt(2 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))
+ bound = gain * math.sqrt(6 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))

- fan = (w.shape[1] if mode == "fan_in" else w.shape[0]) * math.prod(w.shape[2:])
+ fan = (w.shape[0] if mode == "fan_in" else w.shape[1]) * math.prod(w.shape[2:])

# %% wrong="fan_init" because="the variance taken for the standard deviation" of="uniform-bound"
- bound = gain * math.sqrt(2 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))
+ bound = math.sqrt(3) * gain**2 * 2 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:])

- return w.normal_(0, gain / math.sqrt(fan), generator=generator)
+ return w.normal_(0, gain**2 / fan, generator=generator)

# %% wrong="fan_init" because="the gain squared" of="uniform-bound"
- bound = gain * math.sqrt(2 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))
+ bound = gain**2 * math.sqrt(6 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))

- return w.normal_(0, gain / math.sqrt(fan), generator=generator)
+ return w.normal_(0, gain**2 / math.sqrt(fan), generator=generator)

# %% wrong="fan_init" because="Kaiming without the factor of two" of="uniform-bound"
- bound = gain * math.sqrt(2 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))
+ bound = gain * math.sqrt(6 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))

- def kaiming_normal_(w, mode="fan_in", gain=math.sqrt(2), generator=None):
+ def kaiming_normal_(w, mode="fan_in", gain=1.0, generator=None):

# %% wrong="fan_init" because="the factor of two on top of the gain" of="uniform-bound"
- bound = gain * math.sqrt(2 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))
+ bound = gain * math.sqrt(6 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))

- return w.normal_(0, gain / math.sqrt(fan), generator=generator)
+ return w.normal_(0, gain * math.sqrt(2 / fan), generator=generator)

# %% wrong="fan_init" because="the size of the kernel left out" of="uniform-bound"
- bound = gain * math.sqrt(2 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))
+ bound = gain * math.sqrt(6 / (w.shape[0] + w.shape[1]))

- fan = (w.shape[1] if mode == "fan_in" else w.shape[0]) * math.prod(w.shape[2:])
+ fan = w.shape[1] if mode == "fan_in" else w.shape[0]

# %% wrong="fan_init" because="uniform and normal exchanged"
def xavier_uniform_(w, gain=1.0, generator=None):
    if w.dim() < 2:
        raise ValueError
    std = gain * math.sqrt(2 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))
    with torch.no_grad():
        return w.normal_(0, std, generator=generator)


def kaiming_normal_(w, mode="fan_in", gain=math.sqrt(2), generator=None):
    if w.dim() < 2 or mode not in ("fan_in", "fan_out"):
        raise ValueError
    fan = (w.shape[1] if mode == "fan_in" else w.shape[0]) * math.prod(w.shape[2:])
    with torch.no_grad():
        return w.uniform_(
            -gain * math.sqrt(3 / fan), gain * math.sqrt(3 / fan), generator=generator
        )

# %% wrong="fan_init" because="draws between zero and the bound" of="uniform-bound"
- bound = gain * math.sqrt(2 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))
+ bound = gain * math.sqrt(6 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))

- return w.uniform_(-bound, bound, generator=generator)
+ return w.uniform_(0, bound, generator=generator)

- return w.normal_(0, gain / math.sqrt(fan), generator=generator)
+ return w.normal_(0, gain / math.sqrt(fan), generator=generator).abs_()

# %% wrong="fan_init" because="a new tensor, the given one stays as it was"
def xavier_uniform_(w, gain=1.0, generator=None):
    if w.dim() < 2:
        raise ValueError
    bound = gain * math.sqrt(6 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))
    return (2 * torch.rand(w.shape, generator=generator) - 1) * bound


def kaiming_normal_(w, mode="fan_in", gain=math.sqrt(2), generator=None):
    if w.dim() < 2 or mode not in ("fan_in", "fan_out"):
        raise ValueError
    fan = (w.shape[1] if mode == "fan_in" else w.shape[0]) * math.prod(w.shape[2:])
    return torch.randn(w.shape, generator=generator) * gain / math.sqrt(fan)

# %% wrong="fan_init" because="the generator is ignored and seeded at each call"
def xavier_uniform_(w, gain=1.0, generator=None):
    if w.dim() < 2:
        raise ValueError
    torch.manual_seed(0)
    bound = gain * math.sqrt(6 / (w.shape[0] + w.shape[1]) / math.prod(w.shape[2:]))
    with torch.no_grad():
        return w.uniform_(-bound, bound)


def kaiming_normal_(w, mode="fan_in", gain=math.sqrt(2), generator=None):
    if w.dim() < 2 or mode not in ("fan_in", "fan_out"):
        raise ValueError
    torch.manual_seed(0)
    fan = (w.shape[1] if mode == "fan_in" else w.shape[0]) * math.prod(w.shape[2:])
    with torch.no_grad():
        return w.normal_(0, gain / math.sqrt(fan))

# %% wrong="fan_init" because="PyTorch's own functions"
def xavier_uniform_(w, gain=1.0, generator=None):
    return nn.init.xavier_uniform_(w, gain=gain, generator=generator)


def kaiming_normal_(w, mode="fan_in", gain=math.sqrt(2), generator=None):
    nn.init.kaiming_normal_(w, mode=mode, generator=generator)
    with torch.no_grad():
        return w.mul_(gain / math.sqrt(2))

# %% right="fan_init" because="scaled copies of standard draws"
def _fans(w):
    if w.ndim < 2:
        raise ValueError("two axes at least")
    return w[0].numel(), w[:, 0].numel()


def xavier_uniform_(w, gain=1.0, generator=None):
    fan_in, fan_out = _fans(w)
    draws = torch.rand(w.shape, generator=generator, dtype=w.dtype) - 0.5
    w.data.copy_(draws * math.sqrt(12) * gain * (2 / (fan_in + fan_out)) ** 0.5)
    return w


def kaiming_normal_(w, mode="fan_in", gain=2**0.5, generator=None):
    fans = dict(zip(("fan_in", "fan_out"), _fans(w)))
    if mode not in fans:
        raise ValueError(mode)
    w.data.copy_(
        torch.randn(w.shape, generator=generator, dtype=w.dtype) * gain * fans[mode] ** -0.5
    )
    return w

# %% wrong="forward_variance" because="std where the variance belongs" base="std-where"
def forward_variance(depth, width, std, kind, x, generator=None):
    a = width * std
    step = {
        "linear": lambda q: a * q,
        "relu": lambda q: a * q / 2,
        "residual": lambda q: (1 + a) * q,
        "prenorm": lambda q: q + a,
    }
    if kind not in step:
        raise ValueError
    m = [x.double().square().mean().item()]
    p = m[:]
    for _ in range(depth):
        w = std * torch.randn(width, width, generator=generator, dtype=x.dtype)
        z = (x / x.square().mean(-1, keepdim=True).sqrt() if kind == "prenorm" else x) @ w.T
        x = z if kind == "linear" else z.relu() if kind == "relu" else x + z
        m.append(x.double().square().mean().item())
        p.append(step[kind](p[-1]))
    return torch.tensor(p, dtype=torch.float64), torch.tensor(m, dtype=torch.float64)

# %% wrong="forward_variance" because="a ReLU that costs nothing" of="std-where"
- a = width * std
+ a = width * std**2

- "relu": lambda q: a * q / 2,
+ "relu": lambda q: a * q,

# %% wrong="forward_variance" because="pre-norm predicted to grow like a plain residual network" of="std-where"
- a = width * std
+ a = width * std**2

- "prenorm": lambda q: q + a,
+ "prenorm": lambda q: (1 + a) * q,

# %% wrong="forward_variance" because="one matrix for all layers" of="std-where"
- a = width * std
+ a = width * std**2

  p = m[:]
+ w = std * torch.randn(width, width, generator=generator, dtype=x.dtype)

- w = std * torch.randn(width, width, generator=generator, dtype=x.dtype)

# %% wrong="forward_variance" because="the variance is measured, with the mean taken away" of="std-where"
- a = width * std
+ a = width * std**2

- m = [x.double().square().mean().item()]
- p = m[:]
+ m = [x.double().var(correction=0).item()]
+ p = [x.double().square().mean().item()]

- m.append(x.double().square().mean().item())
+ m.append(x.double().var(correction=0).item())

# %% wrong="forward_variance" because="x W instead of W x" of="std-where"
- a = width * std
+ a = width * std**2

- z = (x / x.square().mean(-1, keepdim=True).sqrt() if kind == "prenorm" else x) @ w.T
+ z = (x / x.square().mean(-1, keepdim=True).sqrt() if kind == "prenorm" else x) @ w

# %% wrong="forward_variance" because="the norm over the whole batch" of="std-where"
- a = width * std
+ a = width * std**2

- z = (x / x.square().mean(-1, keepdim=True).sqrt() if kind == "prenorm" else x) @ w.T
+ z = (x / x.square().mean().sqrt() if kind == "prenorm" else x) @ w.T

# %% right="forward_variance" because="powers, and column vectors"
def forward_variance(depth, width, std, kind, x, generator=None):
    layers = torch.arange(depth + 1, dtype=torch.float64)
    q0 = x.double().pow(2).mean()
    v = width * std * std
    if kind == "linear":
        predicted = q0 * v**layers
    elif kind == "relu":
        predicted = q0 * (v / 2) ** layers
    elif kind == "residual":
        predicted = q0 * (1 + v) ** layers
    elif kind == "prenorm":
        predicted = q0 + v * layers
    else:
        raise ValueError(kind)
    columns, measured = x.mT, [q0]
    for _ in range(depth):
        w = torch.randn(width, width, generator=generator, dtype=x.dtype) * std
        inside = columns * columns.pow(2).mean(0).rsqrt() if kind == "prenorm" else columns
        out = torch.einsum("ij,js->is", w, inside)
        columns = {"linear": out, "relu": out.clamp(min=0)}.get(kind, columns + out)
        measured.append(columns.double().pow(2).mean())
    return predicted, torch.stack(measured)

# %% wrong="gpt2_init" because="residual projections by one over the root of L" base="residual-projections"
def gpt2_init(model, std=0.02, generator=None):
    for name, m in model.named_modules():
        if isinstance(m, nn.LayerNorm):
            m.reset_parameters()
        elif isinstance(m, (nn.Linear, nn.Embedding)):
            s = std / math.sqrt(len(model.blocks)) if name.endswith(("out_proj", "fc_out")) else std
            nn.init.normal_(m.weight, 0, s, generator=generator)
            if getattr(m, "bias", None) is not None:
                nn.init.zeros_(m.bias)

# %% wrong="gpt2_init" because="every linear layer scaled" of="residual-projections"
- s = std / math.sqrt(len(model.blocks)) if name.endswith(("out_proj", "fc_out")) else std
+ s = std / math.sqrt(2 * len(model.blocks)) if isinstance(m, nn.Linear) else std

# %% wrong="gpt2_init" because="no residual scaling"
def gpt2_init(model, std=0.02, generator=None):
    for m in model.modules():
        if isinstance(m, nn.LayerNorm):
            m.reset_parameters()
        elif isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, 0, std, generator=generator)
            if getattr(m, "bias", None) is not None:
                nn.init.zeros_(m.bias)

# %% wrong="gpt2_init" because="one over 2L without the root" of="residual-projections"
- s = std / math.sqrt(len(model.blocks)) if name.endswith(("out_proj", "fc_out")) else std
+ s = std / (2 * len(model.blocks)) if name.endswith(("out_proj", "fc_out")) else std

# %% wrong="gpt2_init" because="only attention's projection scaled" of="residual-projections"
- s = std / math.sqrt(len(model.blocks)) if name.endswith(("out_proj", "fc_out")) else std
+ s = std / math.sqrt(2 * len(model.blocks)) if name.endswith("out_proj") else std

# %% wrong="gpt2_init" because="the norms drawn like the rest" base="norms-drawn"
def gpt2_init(model, std=0.02, generator=None):
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(p)
        else:
            s = (
                std / math.sqrt(2 * len(model.blocks))
                if "out_proj" in name or "fc_out" in name
                else std
            )
            nn.init.normal_(p, 0, s, generator=generator)

# %% wrong="gpt2_init" because="every vector set to zero, the norms' weights too" of="norms-drawn"
- if name.endswith("bias"):
+ if p.dim() == 1:

# %% wrong="gpt2_init" because="the biases left as they were" base="biases-left"
def gpt2_init(model, std=0.02, generator=None):
    for name, m in model.named_modules():
        if isinstance(m, nn.LayerNorm):
            m.reset_parameters()
        elif isinstance(m, (nn.Linear, nn.Embedding)):
            s = (
                std / math.sqrt(2 * len(model.blocks))
                if name.endswith(("out_proj", "fc_out"))
                else std
            )
            nn.init.normal_(m.weight, 0, s, generator=generator)

# %% wrong="gpt2_init" because="the embeddings left as they were" of="biases-left"
- elif isinstance(m, (nn.Linear, nn.Embedding)):
+ elif isinstance(m, nn.Linear):

  nn.init.normal_(m.weight, 0, s, generator=generator)
+ if m.bias is not None:
+     nn.init.zeros_(m.bias)

# %% wrong="gpt2_init" because="0.02 taken for the variance" of="residual-projections"
- s = std / math.sqrt(len(model.blocks)) if name.endswith(("out_proj", "fc_out")) else std
- nn.init.normal_(m.weight, 0, s, generator=generator)
+ v = std / (2 * len(model.blocks)) if name.endswith(("out_proj", "fc_out")) else std
+ nn.init.normal_(m.weight, 0, math.sqrt(v), generator=generator)

# %% right="gpt2_init" because="by the parameters' names, scaled afterwards"
def gpt2_init(model, std=0.02, generator=None):
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    mine = {
        id(p)
        for m in model.modules()
        if isinstance(m, (nn.Linear, nn.Embedding))
        for p in m.parameters()
    }
    with torch.no_grad():
        for name, p in model.named_parameters():
            if id(p) in norms:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
            elif id(p) in mine and p.dim() == 1:
                p.zero_()
            elif id(p) in mine:
                p.copy_(torch.randn(p.shape, generator=generator)).mul_(std)
        for block in model.blocks:
            for layer in (block.attention.out_proj, block.mlp.fc_out):
                layer.weight.mul_((2 * len(model.blocks)) ** -0.5)

# %% wrong="gradient_norms" because="hooks are left behind" base="hooks-are"
def gradient_norms(model, loss, kinds=(nn.Linear,)):
    outputs = {name: [] for name, m in model.named_modules() if isinstance(m, kinds)}
    for name in outputs:
        model.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: outputs[name].append(o)
        )
    value = loss()
    result = {}
    for name, ys in outputs.items():
        grads = torch.autograd.grad(value, ys, allow_unused=True, retain_graph=True) if ys else []
        result[name] = math.sqrt(
            sum(float(g.double().square().sum()) for g in grads if g is not None)
        )
    return result

# %% wrong="gradient_norms" because="hooks stay when the loss fails" of="hooks-are"
- for name in outputs:
+ handles = [

      )
+     for name in outputs
+ ]
  value = loss()
+ for handle in handles:
+     handle.remove()

# %% wrong="gradient_norms" because="removes the model's own hooks too"
def gradient_norms(model, loss, kinds=(nn.Linear,)):
    outputs = {name: [] for name, m in model.named_modules() if isinstance(m, kinds)}
    try:
        for name in outputs:
            model.get_submodule(name).register_forward_hook(
                lambda m, i, o, name=name: outputs[name].append(o)
            )
        value = loss()
    finally:
        for m in model.modules():
            m._forward_hooks.clear()
    result = {}
    for name, ys in outputs.items():
        grads = torch.autograd.grad(value, ys, allow_unused=True, retain_graph=True) if ys else []
        result[name] = math.sqrt(
            sum(float(g.double().square().sum()) for g in grads if g is not None)
        )
    return result

# %% wrong="gradient_norms" because="the gradient at the input of the layer"
def gradient_norms(model, loss, kinds=(nn.Linear,)):
    inputs = {name: [] for name, m in model.named_modules() if isinstance(m, kinds)}
    handles = []

    def keep(module, args, name):
        x = (
            args[0]
            if args[0].requires_grad or not args[0].is_floating_point()
            else args[0].clone().requires_grad_()
        )
        inputs[name].append(x)
        return (x, *args[1:])

    try:
        for name in inputs:
            handles.append(
                model.get_submodule(name).register_forward_pre_hook(
                    lambda m, a, name=name: keep(m, a, name)
                )
            )
        value = loss()
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for name, xs in inputs.items():
        xs = [x for x in xs if x.requires_grad]
        grads = torch.autograd.grad(value, xs, allow_unused=True, retain_graph=True) if xs else []
        result[name] = math.sqrt(
            sum(float(g.double().square().sum()) for g in grads if g is not None)
        )
    return result

# %% wrong="gradient_norms" because="the gradient of the layer's weight"
def gradient_norms(model, loss, kinds=(nn.Linear,)):
    names = [name for name, m in model.named_modules() if isinstance(m, kinds)]
    value = loss()
    result = {}
    for name in names:
        grad = torch.autograd.grad(
            value, model.get_submodule(name).weight, allow_unused=True, retain_graph=True
        )[0]
        result[name] = 0.0 if grad is None else float(grad.norm())
    return result

# %% wrong="gradient_norms" because="every hook has the last name" base="every-hook"
def gradient_norms(model, loss, kinds=(nn.Linear,)):
    outputs = {name: [] for name, m in model.named_modules() if isinstance(m, kinds)}
    handles = []
    try:
        for name in outputs:
            handles.append(
                model.get_submodule(name).register_forward_hook(
                    lambda m, i, o: outputs[name].append(o)
                )
            )
        value = loss()
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for name, ys in outputs.items():
        grads = torch.autograd.grad(value, ys, allow_unused=True, retain_graph=True) if ys else []
        result[name] = math.sqrt(
            sum(float(g.double().square().sum()) for g in grads if g is not None)
        )
    return result

# %% wrong="gradient_norms" because="fills the parameters' grad"
def gradient_norms(model, loss, kinds=(nn.Linear,)):
    outputs = {name: [] for name, m in model.named_modules() if isinstance(m, kinds)}

    def keep(m, i, o, name):
        o.retain_grad()
        outputs[name].append(o)

    handles = []
    try:
        for name in outputs:
            handles.append(
                model.get_submodule(name).register_forward_hook(
                    lambda m, i, o, name=name: keep(m, i, o, name)
                )
            )
        loss().backward()
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: math.sqrt(
            sum(float(y.grad.double().square().sum()) for y in ys if y.grad is not None)
        )
        for name, ys in outputs.items()
    }

# %% wrong="gradient_norms" because="only the last call of a module"
def gradient_norms(model, loss, kinds=(nn.Linear,)):
    outputs, handles = {}, []
    names = [name for name, m in model.named_modules() if isinstance(m, kinds)]
    try:
        for name in names:
            handles.append(
                model.get_submodule(name).register_forward_hook(
                    lambda m, i, o, name=name: outputs.update({name: o})
                )
            )
        value = loss()
    finally:
        for handle in handles:
            handle.remove()
    result = dict.fromkeys(names, 0.0)
    for name, y in outputs.items():
        grad = torch.autograd.grad(value, y, allow_unused=True, retain_graph=True)[0]
        result[name] = 0.0 if grad is None else float(grad.norm())
    return result

# %% wrong="gradient_norms" because="layers that were not reached are missing"
def gradient_norms(model, loss, kinds=(nn.Linear,)):
    outputs, handles = {}, []
    names = [name for name, m in model.named_modules() if isinstance(m, kinds)]
    try:
        for name in names:
            handles.append(
                model.get_submodule(name).register_forward_hook(
                    lambda m, i, o, name=name: outputs.setdefault(name, []).append(o)
                )
            )
        value = loss()
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for name, ys in outputs.items():
        grads = [
            g
            for g in torch.autograd.grad(value, ys, allow_unused=True, retain_graph=True)
            if g is not None
        ]
        if grads:
            result[name] = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    return result

# %% wrong="gradient_norms" because="linear layers whatever is asked for" of="every-hook"
- outputs = {name: [] for name, m in model.named_modules() if isinstance(m, kinds)}
+ outputs = {name: [] for name, m in model.named_modules() if isinstance(m, nn.Linear)}

- lambda m, i, o: outputs[name].append(o)
+ lambda m, i, o, name=name: outputs[name].append(o)

# %% right="gradient_norms" because="something is added to each output, and gradients flow to it"
def gradient_norms(model, loss, kinds=(nn.Linear,)):
    from contextlib import ExitStack

    added = {}

    def hook_for(name):
        added[name] = []

        def hook(module, args, output):
            extra = torch.zeros_like(output).requires_grad_()
            added[name].append(extra)
            return output + extra

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, kinds):
                stack.callback(module.register_forward_hook(hook_for(name)).remove)
        value = loss()
    result = {}
    for name, extras in added.items():
        total = 0.0
        for extra in extras:
            grad = torch.autograd.grad(value, extra, allow_unused=True, retain_graph=True)[0]
            total += 0.0 if grad is None else float((grad.double() ** 2).sum())
        result[name] = total**0.5
    return result

# %% right="gradient_norms" because="backward hooks, with the old gradients put back"
def gradient_norms(model, loss, kinds=(nn.Linear,)):
    squares, handles = {}, []
    old = [(p, p.grad) for p in model.parameters()]
    for p, _ in old:
        p.grad = None

    def hook_for(name):
        def hook(module, grad_input, grad_output):
            if grad_output[0] is not None:
                squares[name] += float(grad_output[0].double().square().sum())

        return hook

    try:
        for name, module in model.named_modules():
            if isinstance(module, kinds):
                squares[name] = 0.0
                handles.append(module.register_full_backward_hook(hook_for(name)))
        loss().backward()
    finally:
        for handle in handles:
            handle.remove()
        for p, grad in old:
            p.grad = grad
    return {name: math.sqrt(value) for name, value in squares.items()}

# %% wrong="deepnorm" because="square roots where fourth roots belong" base="square-roots"
def deepnorm_constants(layers):
    return (2 * layers) ** 0.5, (8 * layers) ** -0.5


def deepnorm_init(model, generator=None):
    alpha, beta = deepnorm_constants(len(model.blocks))
    for block in model.blocks:
        block.alpha = alpha
        for name, m in block.named_modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_normal_(
                    m.weight,
                    1.0 if name.endswith(("q_proj", "k_proj")) else beta,
                    generator=generator,
                )
                nn.init.zeros_(m.bias)

# %% wrong="deepnorm" because="beta grows with depth" of="square-roots"
- return (2 * layers) ** 0.5, (8 * layers) ** -0.5
+ return (2 * layers) ** 0.25, (8 * layers) ** 0.25

# %% wrong="deepnorm" because="queries and keys scaled too" base="queries-keys"
def deepnorm_constants(layers):
    return (2 * layers) ** 0.25, (8 * layers) ** -0.25


def deepnorm_init(model, generator=None):
    alpha, beta = deepnorm_constants(len(model.blocks))
    for block in model.blocks:
        block.alpha = alpha
        for m in block.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_normal_(m.weight, beta, generator=generator)
                nn.init.zeros_(m.bias)

# %% wrong="deepnorm" because="alpha is not set" of="square-roots"
- return (2 * layers) ** 0.5, (8 * layers) ** -0.5
+ return (2 * layers) ** 0.25, (8 * layers) ** -0.25

- block.alpha = alpha

# %% wrong="deepnorm" because="the head is initialized as well" of="queries-keys"
-     for m in block.modules():
-         if isinstance(m, nn.Linear):
-             nn.init.xavier_normal_(m.weight, beta, generator=generator)
+ for name, m in model.named_modules():
+     if isinstance(m, nn.Linear):
+         nn.init.xavier_normal_(
+             m.weight, 1.0 if name.endswith(("q_proj", "k_proj")) else beta, generator=generator
+         )
+         if m.bias is not None:

# %% wrong="deepnorm" because="Xavier's uniform distribution, and biases left" of="square-roots"
- return (2 * layers) ** 0.5, (8 * layers) ** -0.5
+ return (2 * layers) ** 0.25, (8 * layers) ** -0.25

- nn.init.xavier_normal_(
+ nn.init.xavier_uniform_(

- nn.init.zeros_(m.bias)

# %% right="deepnorm" because="draws scaled by hand, beta from alpha"
def deepnorm_constants(layers):
    alpha = math.sqrt(math.sqrt(2.0 * layers))
    return alpha, alpha / math.sqrt(4.0 * layers)


def deepnorm_init(model, generator=None):
    alpha, beta = deepnorm_constants(len(model.blocks))
    with torch.no_grad():
        for block in model.blocks:
            block.alpha = alpha
            a, f = block.attention, block.mlp
            for layer, gain in (
                (a.q_proj, 1),
                (a.k_proj, 1),
                (a.v_proj, beta),
                (a.out_proj, beta),
                (f.fc_in, beta),
                (f.fc_out, beta),
            ):
                draws = torch.randn(layer.weight.shape, generator=generator)
                layer.weight.copy_(gain * math.sqrt(2 / sum(draws.shape)) * draws)
                layer.bias.fill_(0.0)

# %% wrong="mup_scale" because="the learning rate of vectors and embeddings scaled too"
def mup_scale(width, base):
    r = width / base
    return {
        "input": Multipliers(1.0, 1 / r, 1.0),
        "vector": Multipliers(1.0, 1 / r, 1.0),
        "hidden": Multipliers(r**-0.5, 1 / r, 1.0),
        "output": Multipliers(1.0, 1.0, 1 / r),
        "attention": Multipliers(1.0, 1.0, r**-0.5),
    }

# %% wrong="mup_scale" because="no output multiplier" base="no-output"
def mup_scale(width, base):
    r = width / base
    return {
        "input": Multipliers(1.0, 1.0, 1.0),
        "vector": Multipliers(1.0, 1.0, 1.0),
        "hidden": Multipliers(r**-0.5, 1 / r, 1.0),
        "output": Multipliers(1.0, 1.0, 1.0),
        "attention": Multipliers(1.0, 1.0, r**-0.5),
    }

# %% wrong="mup_scale" because="attention left at one over the root of the head dimension" of="no-output"
- "output": Multipliers(1.0, 1.0, 1.0),
- "attention": Multipliers(1.0, 1.0, r**-0.5),
+ "output": Multipliers(1.0, 1.0, 1 / r),
+ "attention": Multipliers(1.0, 1.0, 1.0),

# %% wrong="mup_scale" because="attention divided by r on top of the root" of="no-output"
- "output": Multipliers(1.0, 1.0, 1.0),
- "attention": Multipliers(1.0, 1.0, r**-0.5),
+ "output": Multipliers(1.0, 1.0, 1 / r),
+ "attention": Multipliers(1.0, 1.0, 1 / r),

# %% wrong="mup_scale" because="base and width exchanged" base="base-width"
def mup_scale(width, base):
    r = base / width
    return {
        "input": Multipliers(1.0, 1.0, 1.0),
        "vector": Multipliers(1.0, 1.0, 1.0),
        "hidden": Multipliers(r**-0.5, 1 / r, 1.0),
        "output": Multipliers(1.0, 1.0, 1 / r),
        "attention": Multipliers(1.0, 1.0, r**-0.5),
    }

# %% wrong="mup_scale" because="the base ignored"
def mup_scale(width, base):
    return {
        "input": Multipliers(1.0, 1.0, 1.0),
        "vector": Multipliers(1.0, 1.0, 1.0),
        "hidden": Multipliers(width**-0.5, 1 / width, 1.0),
        "output": Multipliers(1.0, 1.0, 1 / width),
        "attention": Multipliers(1.0, 1.0, width**-0.5),
    }

# %% wrong="mup_scale" because="the learning rate falls with the root only"
def mup_scale(width, base):
    r = width / base
    return {
        "input": Multipliers(1.0, 1.0, 1.0),
        "vector": Multipliers(1.0, 1.0, 1.0),
        "hidden": Multipliers(r**-0.5, r**-0.5, 1.0),
        "output": Multipliers(1.0, 1.0, 1 / r),
        "attention": Multipliers(1.0, 1.0, r**-0.5),
    }

# %% wrong="mup_scale" because="SGD's table: the rates of vectors grow and those of matrices stay"
def mup_scale(width, base):
    r = width / base
    return {
        "input": Multipliers(1.0, r, 1.0),
        "vector": Multipliers(1.0, r, 1.0),
        "hidden": Multipliers(r**-0.5, 1.0, 1.0),
        "output": Multipliers(1.0, r, 1 / r),
        "attention": Multipliers(1.0, 1.0, r**-0.5),
    }

# %% wrong="mup_scale" because="whole-number division" of="base-width"
- r = base / width
+ r = max(width // base, 1)

# %% right="mup_scale" because="from how many of a parameter's axes grow"
def mup_scale(width, base):
    shrink = base / width
    one = Multipliers(1.0, 1.0, 1.0)
    table = dict.fromkeys(("input", "vector", "output", "attention"), one)
    table["hidden"] = one._replace(init=math.sqrt(shrink), lr=shrink)
    table["output"] = table["output"]._replace(forward=shrink)
    table["attention"] = table["attention"]._replace(forward=math.sqrt(shrink))
    return table

# %% wrong="mup_setup" because="the embedding taken for an output matrix, the head for an input"
def mup_setup(model, base, lr, std=0.02, generator=None):
    width = model.embed.embedding_dim
    r = width / base
    groups = {"same": [], "hidden": []}
    for name, p in model.named_parameters():
        hidden = p.dim() == 2 and p.shape[0] >= width and p.shape[1] >= width
        if p.dim() == 2:
            nn.init.normal_(p, std=std * (r**-0.5 if hidden else 1), generator=generator)
        elif "norm" in name and name.endswith("weight"):
            nn.init.ones_(p)
        else:
            nn.init.zeros_(p)
        groups["hidden" if hidden or name == "embed.weight" else "same"].append(p)
    for block in model.blocks:
        block.attention.score_scale = (width // block.attention.heads) ** -0.5 * r**-0.5
    model.logit_scale = 1 / r
    return [{"params": groups["same"], "lr": lr}, {"params": groups["hidden"], "lr": lr / r}]

# %% wrong="mup_setup" because="all learning rates divided by r" base="all-learning"
def mup_setup(model, base, lr, std=0.02, generator=None):
    width = model.embed.embedding_dim
    r = width / base
    for name, m in model.named_modules():
        if isinstance(m, nn.LayerNorm):
            m.reset_parameters()
        elif isinstance(m, (nn.Linear, nn.Embedding)):
            inside = name.startswith("blocks.")
            nn.init.normal_(m.weight, std=std * (r**-0.5 if inside else 1), generator=generator)
            if getattr(m, "bias", None) is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, Attention):
            m.score_scale = (width // m.heads) ** -0.5 * r**-0.5
    model.logit_scale = 1 / r
    return [{"params": list(model.parameters()), "lr": lr / r}]

# %% wrong="mup_setup" because="biases inside the blocks get the matrices' rate" of="all-learning"
- return [{"params": list(model.parameters()), "lr": lr / r}]
+ hidden = list(model.blocks.parameters())
+ rest = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
+ return [{"params": hidden, "lr": lr / r}, {"params": rest, "lr": lr}]

# %% wrong="mup_setup" because="the score scale multiplied at every call" of="all-learning"
- m.score_scale = (width // m.heads) ** -0.5 * r**-0.5
+ m.score_scale *= r**-0.5

- return [{"params": list(model.parameters()), "lr": lr / r}]
+ hidden = [p for p in model.blocks.parameters() if p.dim() == 2]
+ ids_ = {id(p) for p in hidden}
+ return [
+     {"params": hidden, "lr": lr / r},
+     {"params": [p for p in model.parameters() if id(p) not in ids_], "lr": lr},
+ ]

# %% wrong="mup_setup" because="logits and scores left as they are" of="all-learning"
-     elif isinstance(m, Attention):
-         m.score_scale = (width // m.heads) ** -0.5 * r**-0.5
- model.logit_scale = 1 / r
- return [{"params": list(model.parameters()), "lr": lr / r}]
+ hidden = [p for p in model.blocks.parameters() if p.dim() == 2]
+ ids_ = {id(p) for p in hidden}
+ return [
+     {"params": hidden, "lr": lr / r},
+     {"params": [p for p in model.parameters() if id(p) not in ids_], "lr": lr},
+ ]

# %% wrong="mup_setup" because="the norms are in no group"
def mup_setup(model, base, lr, std=0.02, generator=None):
    width = model.embed.embedding_dim
    r = width / base
    hidden, rest = [], []
    for name, m in model.named_modules():
        if isinstance(m, nn.LayerNorm):
            m.reset_parameters()
        elif isinstance(m, (nn.Linear, nn.Embedding)):
            inside = name.startswith("blocks.")
            nn.init.normal_(m.weight, std=std * (r**-0.5 if inside else 1), generator=generator)
            (hidden if inside else rest).append(m.weight)
            if getattr(m, "bias", None) is not None:
                nn.init.zeros_(m.bias)
                rest.append(m.bias)
        elif isinstance(m, Attention):
            m.score_scale = (width // m.heads) ** -0.5 * r**-0.5
    model.logit_scale = 1 / r
    return [{"params": hidden, "lr": lr / r}, {"params": rest, "lr": lr}]

# %% wrong="mup_setup" because="the same initialization at every width" of="all-learning"
- inside = name.startswith("blocks.")
- nn.init.normal_(m.weight, std=std * (r**-0.5 if inside else 1), generator=generator)
+ nn.init.normal_(m.weight, std=std, generator=generator)

- return [{"params": list(model.parameters()), "lr": lr / r}]
+ hidden = [p for p in model.blocks.parameters() if p.dim() == 2]
+ ids_ = {id(p) for p in hidden}
+ return [
+     {"params": hidden, "lr": lr / r},
+     {"params": [p for p in model.parameters() if id(p) not in ids_], "lr": lr},
+ ]

# %% right="mup_setup" because="one group a parameter, by name"
def mup_setup(model, base, lr, std=0.02, generator=None):
    width = model.embed.embedding_dim
    r = width / base
    groups = []
    with torch.no_grad():
        for name, p in model.named_parameters():
            matrix_inside = name.startswith("blocks.") and p.ndim == 2
            if p.ndim == 2:
                p.copy_(
                    torch.randn(p.shape, generator=generator)
                    * std
                    / (math.sqrt(r) if matrix_inside else 1.0)
                )
            else:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            groups.append({"params": [p], "lr": lr / r if matrix_inside else lr})
    for block in model.blocks:
        head_dim = width // block.attention.heads
        block.attention.score_scale = math.sqrt(base // block.attention.heads) / head_dim
    model.logit_scale = base / width
    return groups

# %% wrong="token_rank" because="the largest singular value not squared" base="largest-singular"
def token_rank(x):
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    s = torch.linalg.svdvals(x)
    return (s.square().sum(-1) / s[..., 0]).nan_to_num(0)


def token_spread(x):
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return torch.linalg.matrix_norm(x - x.mean(-2, keepdim=True)) / torch.linalg.matrix_norm(
        x
    ).clamp(min=1e-30)


def attention_entropy(weights):
    return torch.special.entr(
        weights.float() if weights.dtype in (torch.float16, torch.bfloat16) else weights
    ).sum(-1)

# %% wrong="token_rank" because="matrix_rank" of="largest-singular"
- s = torch.linalg.svdvals(x)
- return (s.square().sum(-1) / s[..., 0]).nan_to_num(0)
+ return torch.linalg.matrix_rank(x).to(x.dtype)

# %% wrong="token_rank" because="squares that underflow" of="largest-singular"
- return (s.square().sum(-1) / s[..., 0]).nan_to_num(0)
+ return (s.square().sum(-1) / s[..., 0].square()).nan_to_num(0)

# %% wrong="token_rank" because="the mean over the features, not over the tokens" of="largest-singular"
- return (s.square().sum(-1) / s[..., 0]).nan_to_num(0)
+ return (s / s[..., :1]).nan_to_num(0).square().sum(-1)

- return torch.linalg.matrix_norm(x - x.mean(-2, keepdim=True)) / torch.linalg.matrix_norm(
+ return torch.linalg.matrix_norm(x - x.mean(-1, keepdim=True)) / torch.linalg.matrix_norm(

# %% wrong="token_rank" because="entropy in bits" of="largest-singular"
- return (s.square().sum(-1) / s[..., 0]).nan_to_num(0)
+ return (s / s[..., :1]).nan_to_num(0).square().sum(-1)

- ).sum(-1)
+ ).sum(-1) / math.log(2)

# %% wrong="token_rank" because="NaN where a weight is zero" of="largest-singular"
- return (s.square().sum(-1) / s[..., 0]).nan_to_num(0)
+ return (s / s[..., :1]).nan_to_num(0).square().sum(-1)

- return torch.special.entr(
-     weights.float() if weights.dtype in (torch.float16, torch.bfloat16) else weights
- ).sum(-1)
+ weights = weights.float() if weights.dtype in (torch.float16, torch.bfloat16) else weights
+ return -(weights * weights.log()).sum(-1)

# %% wrong="token_rank" because="an epsilon inside the logarithm" of="largest-singular"
- return (s.square().sum(-1) / s[..., 0]).nan_to_num(0)
+ return (s / s[..., :1]).nan_to_num(0).square().sum(-1)

- return torch.special.entr(
-     weights.float() if weights.dtype in (torch.float16, torch.bfloat16) else weights
- ).sum(-1)
+ weights = weights.float() if weights.dtype in (torch.float16, torch.bfloat16) else weights
+ return -(weights * (weights + 1e-6).log()).sum(-1)

# %% wrong="token_rank" because="entropy over the queries" of="largest-singular"
- return (s.square().sum(-1) / s[..., 0]).nan_to_num(0)
+ return (s / s[..., :1]).nan_to_num(0).square().sum(-1)

- ).sum(-1)
+ ).sum(-2)

# %% right="token_rank" because="norms instead of singular values, xlogy instead of entr"
def _wide(x):
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    top = x.abs().amax((-2, -1), keepdim=True)
    return x / top.masked_fill(top == 0, 1)


def token_rank(x):
    x = _wide(x)
    spectral = torch.linalg.matrix_norm(x, 2)
    return torch.where(
        spectral > 0, x.square().sum((-2, -1)) / spectral.square().clamp(min=1e-30), 0.0
    )


def token_spread(x):
    x = _wide(x)
    total, mean = x.square().sum((-2, -1)), x.mean(-2, keepdim=True)
    return ((x - mean).square().sum((-2, -1)) / total.masked_fill(total == 0, 1)).sqrt()


def attention_entropy(weights):
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    return -torch.xlogy(weights, weights).sum(-1)

# %% wrong="token_rank" because="the spread as a difference of squares, which cancels"
- apart = torch.linalg.matrix_norm(x - x.mean(-2, keepdim=True))
- whole = torch.linalg.matrix_norm(x)
+ whole = torch.linalg.matrix_norm(x)
+ common = x.shape[-2] * x.mean(-2).square().sum(-1)
+ apart = (whole.square() - common).clamp(min=0).sqrt()

# %% wrong="sigma_reparam" because="sigma detached" base="sigma-detached"
class SigmaReparamLinear(nn.Module):
    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        plain = nn.Linear(in_features, out_features, bias)
        self.weight, self.bias, self.gamma = plain.weight, plain.bias, nn.Parameter(torch.ones(()))
        self.register_buffer("u", F.normalize(torch.randn(out_features), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(in_features), dim=0))

    @torch.no_grad()
    def power_iteration(self):
        self.u = F.normalize(self.weight @ self.v, dim=0)
        self.v = F.normalize(self.weight.T @ self.u, dim=0)

    def forward(self, x):
        if self.training:
            self.power_iteration()
        sigma = (self.u @ self.weight @ self.v).detach()
        return F.linear(x, self.gamma / sigma * self.weight, self.bias)

# %% wrong="sigma_reparam" because="gamma detached" of="sigma-detached"
- sigma = (self.u @ self.weight @ self.v).detach()
- return F.linear(x, self.gamma / sigma * self.weight, self.bias)
+ sigma = self.u @ self.weight @ self.v
+ return F.linear(x, self.gamma.detach() / sigma * self.weight, self.bias)

# %% wrong="sigma_reparam" because="a gradient through the power iteration"
class SigmaReparamLinear(nn.Module):
    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        plain = nn.Linear(in_features, out_features, bias)
        self.weight, self.bias, self.gamma = plain.weight, plain.bias, nn.Parameter(torch.ones(()))
        self.register_buffer("u", F.normalize(torch.randn(out_features), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(in_features), dim=0))

    def power_iteration(self):
        pass

    def forward(self, x):
        u, v = self.u, self.v
        if self.training:
            u = F.normalize(self.weight @ v, dim=0)
            v = F.normalize(self.weight.T @ u, dim=0)
            self.u, self.v = u.detach(), v.detach()
        return F.linear(x, self.gamma / (u @ self.weight @ v) * self.weight, self.bias)

# %% wrong="sigma_reparam" because="u and v keep the graph of all steps" of="sigma-detached"
- @torch.no_grad()

- sigma = (self.u @ self.weight @ self.v).detach()
- return F.linear(x, self.gamma / sigma * self.weight, self.bias)
+ return F.linear(x, self.gamma / (self.u @ self.weight @ self.v) * self.weight, self.bias)

# %% wrong="sigma_reparam" because="u and v not normalized" of="sigma-detached"
- self.u = F.normalize(self.weight @ self.v, dim=0)
- self.v = F.normalize(self.weight.T @ self.u, dim=0)
+ self.u = self.weight @ self.v
+ self.v = self.weight.T @ self.u

- sigma = (self.u @ self.weight @ self.v).detach()
- return F.linear(x, self.gamma / sigma * self.weight, self.bias)
+ return F.linear(x, self.gamma / (self.u @ self.weight @ self.v) * self.weight, self.bias)

# %% wrong="sigma_reparam" because="divided by the Frobenius norm" of="sigma-detached"
- sigma = (self.u @ self.weight @ self.v).detach()
- return F.linear(x, self.gamma / sigma * self.weight, self.bias)
+ return F.linear(x, self.gamma / self.weight.norm() * self.weight, self.bias)

# %% wrong="sigma_reparam" because="the buffers move in evaluation mode" of="sigma-detached"
- if self.training:
-     self.power_iteration()
- sigma = (self.u @ self.weight @ self.v).detach()
- return F.linear(x, self.gamma / sigma * self.weight, self.bias)
+ self.power_iteration()
+ return F.linear(x, self.gamma / (self.u @ self.weight @ self.v) * self.weight, self.bias)

# %% wrong="sigma_reparam" because="v from the old u" of="sigma-detached"
- self.u = F.normalize(self.weight @ self.v, dim=0)
- self.v = F.normalize(self.weight.T @ self.u, dim=0)
+ self.u, self.v = (
+     F.normalize(self.weight @ self.v, dim=0),
+     F.normalize(self.weight.T @ self.u, dim=0),
+ )

- sigma = (self.u @ self.weight @ self.v).detach()
- return F.linear(x, self.gamma / sigma * self.weight, self.bias)
+ return F.linear(x, self.gamma / (self.u @ self.weight @ self.v) * self.weight, self.bias)

# %% wrong="sigma_reparam" because="buffers changed in place, so two passes fail" of="sigma-detached"
- self.u = F.normalize(self.weight @ self.v, dim=0)
- self.v = F.normalize(self.weight.T @ self.u, dim=0)
+ self.u.copy_(F.normalize(self.weight @ self.v, dim=0))
+ self.v.copy_(F.normalize(self.weight.T @ self.u, dim=0))

- sigma = (self.u @ self.weight @ self.v).detach()
- return F.linear(x, self.gamma / sigma * self.weight, self.bias)
+ return F.linear(x, self.gamma / (self.u @ self.weight @ self.v) * self.weight, self.bias)

# %% wrong="sigma_reparam" because="the weight itself is rescaled" of="sigma-detached"
- sigma = (self.u @ self.weight @ self.v).detach()
- return F.linear(x, self.gamma / sigma * self.weight, self.bias)
+     self.weight.data.div_(self.u @ self.weight.data @ self.v)
+ return F.linear(x, self.gamma * self.weight, self.bias)

# %% wrong="sigma_reparam" because="u and v are parameters"
class SigmaReparamLinear(nn.Module):
    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        plain = nn.Linear(in_features, out_features, bias)
        self.weight, self.bias, self.gamma = plain.weight, plain.bias, nn.Parameter(torch.ones(()))
        self.u = nn.Parameter(F.normalize(torch.randn(out_features), dim=0))
        self.v = nn.Parameter(F.normalize(torch.randn(in_features), dim=0))

    @torch.no_grad()
    def power_iteration(self):
        self.u.data = F.normalize(self.weight @ self.v, dim=0)
        self.v.data = F.normalize(self.weight.T @ self.u, dim=0)

    def forward(self, x):
        if self.training:
            self.power_iteration()
        return F.linear(x, self.gamma / (self.u @ self.weight @ self.v) * self.weight, self.bias)

# %% wrong="sigma_reparam" because="plain spectral normalization, without gamma" of="sigma-detached"
- sigma = (self.u @ self.weight @ self.v).detach()
- return F.linear(x, self.gamma / sigma * self.weight, self.bias)
+ return F.linear(x, self.weight / (self.u @ self.weight @ self.v), self.bias)

# %% right="sigma_reparam" because="the output is scaled, not the weight; clones protect the graph"
class SigmaReparamLinear(nn.Module):
    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.gamma = nn.Parameter(torch.tensor(1.0))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if bias:
            nn.init.uniform_(self.bias, -(in_features**-0.5), in_features**-0.5)
        u, _, vh = torch.linalg.svd(self.weight.detach(), full_matrices=False)
        self.register_buffer("u", u[:, 0].clone())
        self.register_buffer("v", vh[0].clone())

    def power_iteration(self):
        w = self.weight.detach()
        u = w @ self.v
        self.u = u / u.norm()
        v = self.u @ w
        self.v = v / v.norm()

    def forward(self, x):
        if self.training:
            self.power_iteration()
        sigma = torch.einsum("o,oi,i->", self.u.clone(), self.weight, self.v.clone())
        out = (x @ self.weight.mT) * (self.gamma / sigma)
        return out if self.bias is None else out + self.bias

# %% wrong="init_numbers" because="the gain of ReLU"
- "leaky": math.sqrt(2 / (1 + 0.5**2)),
+ "leaky": math.sqrt(2),

# %% wrong="init_numbers" because="the slope not squared"
- "leaky": math.sqrt(2 / (1 + 0.5**2)),
+ "leaky": math.sqrt(2 / 1.5),

# %% wrong="init_numbers" because="the square of the gain"
- "leaky": math.sqrt(2 / (1 + 0.5**2)),
+ "leaky": 1.6,

# %% wrong="init_numbers" because="the root mean square"
- "depth": 0.5**40,
+ "depth": 2.0**-20,

# %% wrong="init_numbers" because="the reciprocal"
- "depth": 0.5**40,
+ "depth": 2.0**40,

# %% wrong="init_numbers" because="Xavier taken for right with ReLU"
- "depth": 0.5**40,
+ "depth": 1.0,

# %% wrong="init_numbers" because="one over the root for the rate"
- "mup_lr": 0.004 / 16,
+ "mup_lr": 0.001,

# %% wrong="init_numbers" because="the rate unchanged"
- "mup_lr": 0.004 / 16,
+ "mup_lr": 0.004,

# %% wrong="init_numbers" because="one over r for the deviation"
- "mup_std": 0.06 / 4,
+ "mup_std": 0.00375,

# %% wrong="init_numbers" because="evenly spread weights"
- "entropy": math.log(1024) - 1.5**2 / 2,
+ "entropy": math.log(1024),

# %% wrong="init_numbers" because="the whole variance"
- "entropy": math.log(1024) - 1.5**2 / 2,
+ "entropy": math.log(1024) - 2.25,

# %% wrong="init_numbers" because="bits"
- "entropy": math.log(1024) - 1.5**2 / 2,
+ "entropy": (math.log(1024) - 1.125) / math.log(2),

# %% wrong="init_numbers" because="the other collapse"
- "diagnosis": "b",
+ "diagnosis": "a",

# %% wrong="init_numbers" because="vanishing gradients suspected"
- "diagnosis": "b",
+ "diagnosis": "c",

# %% right="init_numbers" because="halves added up, a loop, the table, a simulation"
def init_numbers():
    q = 1.0
    for _ in range(40):
        q /= 2
    r = 4096 / 256
    s = 1.5 * torch.randn(500, 1024, generator=torch.Generator().manual_seed(1))
    return {
        "leaky": (0.5 * 1 + 0.5 * 0.25) ** -0.5,
        "depth": q,
        "mup_lr": 0.004 / r,
        "mup_std": 0.06 / math.sqrt(r),
        "entropy": float(torch.special.entr(s.softmax(-1)).sum(-1).mean()),
        "diagnosis": "b" * 1,
    }

# %% wrong="fan_init" because="requires_grad is switched off to fill, and stays off"
- with torch.no_grad():
-     return w.uniform_(-bound, bound, generator=generator)
+ w.requires_grad_(False)
+ return w.uniform_(-bound, bound, generator=generator)

# %% wrong="fan_init" because="Kaiming's filling leaves requires_grad switched off"
- with torch.no_grad():
-     return w.normal_(0.0, gain / math.sqrt(fan), generator=generator)
+ w.requires_grad_(False)
+ return w.normal_(0.0, gain / math.sqrt(fan), generator=generator)

# %% wrong="fan_init" because="requires_grad is switched on for everything"
- return w.uniform_(-bound, bound, generator=generator)
+ return w.uniform_(-bound, bound, generator=generator).requires_grad_()

# %% wrong="fan_init" because="the normal draws do not come from the generator"
- return w.normal_(0.0, gain / math.sqrt(fan), generator=generator)
+ return w.normal_(0.0, gain / math.sqrt(fan))

# %% wrong="gpt2_init" because="the norms are listed by hand, those of queries and keys forgotten"
- if isinstance(module, nn.LayerNorm):
+ if name == "norm" or name.endswith(("norm1", "norm2")):

# %% wrong="gpt2_init" because="the draws do not come from the generator"
- nn.init.normal_(module.weight, std=smaller if writes else std, generator=generator)
+ nn.init.normal_(module.weight, std=smaller if writes else std)

# %% wrong="deepnorm" because="the draws do not come from the generator"
- nn.init.xavier_normal_(module.weight, gain=gain, generator=generator)
+ nn.init.xavier_normal_(module.weight, gain=gain)

# %% wrong="mup_setup" because="four heads, whatever the model has"
- module.score_scale = (width // module.heads) ** -0.5 * table["attention"].forward
+ module.score_scale = (width // 4) ** -0.5 * table["attention"].forward

# %% wrong="mup_setup" because="the draws do not come from the generator"
- nn.init.normal_(module.weight, std=std * table[kind].init, generator=generator)
+ nn.init.normal_(module.weight, std=std * table[kind].init)

# %% wrong="sigma_reparam" because="the exact norm in evaluation mode"
- sigma = self.u @ self.weight @ self.v
+ exact = torch.linalg.matrix_norm(self.weight, 2)
+ sigma = self.u @ self.weight @ self.v if self.training else exact

# %% wrong="sigma_reparam" because="the bias starts at 0"
- self.weight, self.bias = plain.weight, plain.bias
+ self.weight, self.bias = plain.weight, nn.Parameter(torch.zeros(out_features)) if bias else None

# %% wrong="sigma_reparam" because="power_iteration does nothing, forward has a step of its own"
- for _ in range(15):
-     self.power_iteration()
+ self.step()

- self.u = F.normalize(self.weight @ self.v, dim=0)
- self.v = F.normalize(self.weight.mT @ self.u, dim=0)
+ pass
+
+ @torch.no_grad()
+ def step(self):
+     self.u = F.normalize(self.weight @ self.v, dim=0)
+     self.v = F.normalize(self.weight.mT @ self.u, dim=0)

  if self.training:
-     self.power_iteration()
+     self.step()

# %% wrong="sigma_reparam" because="u and v are missing from the state_dict"
- self.register_buffer("u", F.normalize(torch.randn(out_features), dim=0))
- self.register_buffer("v", F.normalize(torch.randn(in_features), dim=0))
+ self.register_buffer("u", F.normalize(torch.randn(out_features), dim=0), persistent=False)
+ self.register_buffer("v", F.normalize(torch.randn(in_features), dim=0), persistent=False)

# %% wrong="gradient_norms" because="the model itself is left out"
- added = {name: [] for name, module in model.named_modules() if isinstance(module, kinds)}
+ added = {
+     name: [] for name, module in model.named_modules() if name and isinstance(module, kinds)
+ }

# %% right="gradient_norms" because="the outputs themselves are kept"
- zeros.append(torch.zeros_like(output, requires_grad=True))
- return output + zeros[-1]
+ zeros.append(output)
+ return output

- leaves = [(name, zero) for name, zeros in added.items() for zero in zeros]
+ leaves = [(name, zero) for name, zeros in added.items() for zero in zeros if zero.requires_grad]
