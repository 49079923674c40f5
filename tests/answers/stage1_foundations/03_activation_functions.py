# %% wrong="gelu" because="erf of x, not of x over root 2"
def gelu(x, approximate="none"):
    if approximate == "none":
        return 0.5 * x * (1 + torch.erf(x))
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise ValueError(approximate)

# %% wrong="gelu" because="the tanh form whatever was asked for"
def gelu(x, approximate="none"):
    if approximate not in ("none", "tanh"):
        raise ValueError(approximate)
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

# %% wrong="gelu" because="2 over pi without the root, and the sigmoid form for everything else"
def gelu(x, approximate="none"):
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(2 / math.pi * (x + 0.044715 * x**3)))
    return x * torch.sigmoid(1.702 * x)

# %% wrong="gelu" because="asks PyTorch"
def gelu(x, approximate="none"):
    if approximate not in ("none", "tanh"):
        raise ValueError(approximate)
    return F.gelu(x, approximate=approximate)

# %% wrong="gelu" because="accepts any word"
def gelu(x, approximate="none"):
    if approximate == "none":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

# %% right="gelu" because="erfc, and the tanh form as a sigmoid of twice its argument"
def gelu(x, approximate="none"):
    if approximate not in ("none", "tanh"):
        raise ValueError("none or tanh")
    if approximate == "tanh":
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * x * (1 + 0.044715 * x * x))
    return x * torch.special.erfc(-x * math.sqrt(0.5)) / 2

# %% wrong="silu" because="written with exp: NaN far out"
def silu(x):
    return x * torch.exp(x) / (1 + torch.exp(x))


def silu_backward(x, grad):
    s = torch.exp(x) / (1 + torch.exp(x))
    return grad * s * (1 + x * (1 - s))

# %% wrong="silu" because="a plain quotient: right in value, NaN in the gradient on the far left"
def silu(x):
    return x / (1 + torch.exp(-x))


def silu_backward(x, grad):
    s = torch.sigmoid(x)
    return grad * s * (1 + x * (1 - s))

# %% wrong="silu" because="the derivative without the product rule's second term"
def silu(x):
    return x * torch.sigmoid(x)


def silu_backward(x, grad):
    return grad * torch.sigmoid(x)

# %% wrong="silu" because="forgets the gradient that arrives"
def silu(x):
    return x * torch.sigmoid(x)


def silu_backward(x, grad):
    s = torch.sigmoid(x)
    return s + x * s * (1 - s)

# %% wrong="silu" because="in place on the input"
def silu(x):
    return x.mul_(torch.sigmoid(x))


def silu_backward(x, grad):
    s = torch.sigmoid(x)
    return grad.mul_(s * (1 + x * (1 - s)))

# %% wrong="silu" because="asks PyTorch"
def silu(x):
    return F.silu(x)


def silu_backward(x, grad):
    s = torch.sigmoid(x)
    return grad * (s + x * s * (1 - s))

# %% right="silu" because="the sigmoid through tanh, the derivative through the value"
def silu(x):
    return 0.5 * x * (1 + torch.tanh(x / 2))


def silu_backward(x, grad):
    s = 0.5 * (1 + torch.tanh(x / 2))
    y = x * s
    return grad * (y + s * (1 - y))

# %% wrong="dropout" because="what is kept is not scaled up"
def dropout(x, p=0.5, training=True, generator=None):
    if not 0 <= p <= 1:
        raise ValueError(p)
    if not training:
        return x
    return x * (torch.rand(x.shape, generator=generator) >= p)

# %% wrong="dropout" because="p is taken for the probability of keeping"
def dropout(x, p=0.5, training=True, generator=None):
    if not 0 <= p <= 1:
        raise ValueError(p)
    if not training or p == 0:
        return x
    return x * (torch.rand(x.shape, generator=generator) < p) / p

# %% wrong="dropout" because="0/0 at p = 1"
def dropout(x, p=0.5, training=True, generator=None):
    if not 0 <= p <= 1:
        raise ValueError(p)
    if not training:
        return x
    keep = torch.rand(x.shape, generator=generator) >= p
    return x * keep / torch.tensor(1 - p)

# %% wrong="dropout" because="one mask for all rows"
def dropout(x, p=0.5, training=True, generator=None):
    if not 0 <= p <= 1:
        raise ValueError(p)
    if not training or p == 0:
        return x
    keep = torch.rand(x.shape[-1:], generator=generator) >= p
    return x * keep * (0.0 if p == 1 else 1 / (1 - p))

# %% wrong="dropout" because="the generator is ignored"
def dropout(x, p=0.5, training=True, generator=None):
    if not 0 <= p <= 1:
        raise ValueError(p)
    if not training or p == 0:
        return x
    return x * (torch.rand(x.shape) >= p) * (0.0 if p == 1 else 1 / (1 - p))

# %% wrong="dropout" because="scales at evaluation, as the paper of 2014 did"
def dropout(x, p=0.5, training=True, generator=None):
    if not 0 <= p <= 1:
        raise ValueError(p)
    if not training:
        return x * (1 - p)
    return x * (torch.rand(x.shape, generator=generator) >= p)

# %% wrong="dropout" because="no error for a p that is no probability"
def dropout(x, p=0.5, training=True, generator=None):
    if not training or p == 0:
        return x
    if p >= 1:
        return x * 0
    return x * (torch.rand(x.shape, generator=generator) >= p) / (1 - p)

# %% wrong="dropout" because="noise instead of a mask: same mean and variance"
def dropout(x, p=0.5, training=True, generator=None):
    if not 0 <= p <= 1:
        raise ValueError(p)
    if not training or p == 0:
        return x
    if p == 1:
        return x * 0
    return x * (1 + math.sqrt(p / (1 - p)) * torch.randn(x.shape, generator=generator))

# %% right="dropout" because="a Bernoulli mask"
def dropout(x, p=0.5, training=True, generator=None):
    if not 0.0 <= p <= 1.0:
        raise ValueError("p must be a probability")
    if not training:
        return x
    if p == 1:
        return 0 * x
    mask = torch.empty(x.shape, device=x.device).bernoulli_(1 - p, generator=generator)
    return x * mask.to(x.dtype) / (1 - p)

# %% wrong="mlp_classifier" because="gradients are never set back"
class MLPClassifier(nn.Module):
    def __init__(self, hidden=256, activation=F.relu, p=0.3):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 10)])
        self.activation, self.p = activation, p

    def forward(self, images):
        x = images.flatten(1)
        for layer in self.layers[:-1]:
            x = F.dropout(self.activation(layer(x)), self.p, self.training)
        return self.layers[-1](x)


def train(model, images, labels, epochs=15, batch=64, lr=3e-3, seed=0, after_step=None):
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    losses = []
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=order).split(batch):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if after_step is not None:
                after_step(model)
    model.eval()
    return losses

# %% wrong="mlp_classifier" because="softmax before cross_entropy"
class MLPClassifier(nn.Module):
    def __init__(self, hidden=256, activation=F.relu, p=0.3):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 10)])
        self.activation, self.p = activation, p

    def forward(self, images):
        x = images.flatten(1)
        for layer in self.layers[:-1]:
            x = F.dropout(self.activation(layer(x)), self.p, self.training)
        return self.layers[-1](x).softmax(1)


def train(model, images, labels, epochs=15, batch=64, lr=3e-3, seed=0, after_step=None):
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    losses = []
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=order).split(batch):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if after_step is not None:
                after_step(model)
    model.eval()
    return losses

# %% wrong="mlp_classifier" because="dropout stays on in evaluation"
class MLPClassifier(nn.Module):
    def __init__(self, hidden=256, activation=F.relu, p=0.3):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 10)])
        self.activation, self.p = activation, p

    def forward(self, images):
        x = images.flatten(1)
        for layer in self.layers[:-1]:
            x = F.dropout(self.activation(layer(x)), self.p)
        return self.layers[-1](x)


def train(model, images, labels, epochs=15, batch=64, lr=3e-3, seed=0, after_step=None):
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    losses = []
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=order).split(batch):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if after_step is not None:
                after_step(model)
    model.eval()
    return losses

# %% wrong="mlp_classifier" because="every epoch in the same order, drawn with replacement, and no evaluation mode"
class MLPClassifier(nn.Module):
    def __init__(self, hidden=256, activation=F.relu, p=0.3):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 10)])
        self.activation, self.p = activation, p

    def forward(self, images):
        x = images.flatten(1)
        for layer in self.layers[:-1]:
            x = F.dropout(self.activation(layer(x)), self.p, self.training)
        return self.layers[-1](x)


def train(model, images, labels, epochs=15, batch=64, lr=3e-3, seed=0, after_step=None):
    order = torch.randint(len(images), (len(images),), generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.Adam(model.parameters(), lr)
    losses = []
    for _ in range(epochs):
        for chosen in order.split(batch):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if after_step is not None:
                after_step(model)
    return losses

# %% wrong="mlp_classifier" because="the activation is always ReLU, and comes after the last layer too"
class MLPClassifier(nn.Module):
    def __init__(self, hidden=256, activation=F.relu, p=0.3):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 10)])
        self.p = p

    def forward(self, images):
        x = images.flatten(1)
        for layer in self.layers:
            x = F.dropout(F.relu(layer(x)), self.p, self.training)
        return x


def train(model, images, labels, epochs=15, batch=64, lr=3e-3, seed=0, after_step=None):
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    losses = []
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=order).split(batch):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if after_step is not None:
                after_step(model)
    model.eval()
    return losses

# %% right="mlp_classifier" because="dropout modules, and a loader over a TensorDataset"
class MLPClassifier(nn.Module):
    def __init__(self, hidden=256, activation=F.relu, p=0.3):
        super().__init__()
        sizes = [64, hidden, hidden, 10]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:]))
        self.act = activation
        self.drop = nn.Dropout(p)

    def forward(self, images):
        x = images.reshape(len(images), 64)
        x = self.drop(self.act(self.layers[0](x)))
        x = self.drop(self.act(self.layers[1](x)))
        return self.layers[2](x)


def train(model, images, labels, epochs=15, batch=64, lr=3e-3, seed=0, after_step=None):
    g = torch.Generator()
    g.manual_seed(seed)
    pairs = torch.utils.data.TensorDataset(images, labels)
    loader = torch.utils.data.DataLoader(pairs, batch_size=batch, shuffle=True, generator=g)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    losses = []
    for _ in range(epochs):
        for x, y in loader:
            model.zero_grad()
            loss = nn.CrossEntropyLoss()(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if after_step:
                after_step(model)
    model.eval()
    return losses

# %% wrong="gated_units" because="the activation on w3, the gate left as it is"
def gated_hidden_size(dim, multiple_of=256):
    hidden = 8 * dim // 3
    return (hidden + multiple_of - 1) // multiple_of * multiple_of


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden=None, multiple_of=256):
        super().__init__()
        hidden = gated_hidden_size(dim, multiple_of) if hidden is None else hidden
        self.w1, self.w2, self.w3 = (nn.Linear(a, b, bias=False) for a, b in ((dim, hidden), (hidden, dim), (dim, hidden)))

    def forward(self, x):
        return self.w2(self.w1(x) * F.silu(self.w3(x)))


class GeGLU(SwiGLU):
    def forward(self, x):
        return self.w2(self.w1(x) * F.gelu(self.w3(x)))

# %% wrong="gated_units" because="rounds to the nearest multiple, and adds biases"
def gated_hidden_size(dim, multiple_of=256):
    return round(8 * dim / 3 / multiple_of) * multiple_of


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden=None, multiple_of=256):
        super().__init__()
        hidden = gated_hidden_size(dim, multiple_of) if hidden is None else hidden
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.Linear(dim, hidden)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class GeGLU(SwiGLU):
    def forward(self, x):
        return self.w2(F.gelu(self.w1(x)) * self.w3(x))

# %% wrong="gated_units" because="rounds 8/3 dim up before the multiple"
def gated_hidden_size(dim, multiple_of=256):
    return math.ceil(math.ceil(8 * dim / 3) / multiple_of) * multiple_of


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden=None, multiple_of=256):
        super().__init__()
        hidden = gated_hidden_size(dim, multiple_of) if hidden is None else hidden
        self.w1, self.w2, self.w3 = (nn.Linear(a, b, bias=False) for a, b in ((dim, hidden), (hidden, dim), (dim, hidden)))

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class GeGLU(SwiGLU):
    def forward(self, x):
        return self.w2(F.gelu(self.w1(x)) * self.w3(x))

# %% wrong="gated_units" because="GeGLU with the tanh form"
def gated_hidden_size(dim, multiple_of=256):
    hidden = 8 * dim // 3
    return (hidden + multiple_of - 1) // multiple_of * multiple_of


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden=None, multiple_of=256):
        super().__init__()
        hidden = gated_hidden_size(dim, multiple_of) if hidden is None else hidden
        self.w1, self.w2, self.w3 = (nn.Linear(a, b, bias=False) for a, b in ((dim, hidden), (hidden, dim), (dim, hidden)))

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class GeGLU(SwiGLU):
    def forward(self, x):
        return self.w2(F.gelu(self.w1(x), approximate="tanh") * self.w3(x))

# %% wrong="gated_units" because="GeGLU inherits SwiGLU's forward"
def gated_hidden_size(dim, multiple_of=256):
    hidden = 8 * dim // 3
    return (hidden + multiple_of - 1) // multiple_of * multiple_of


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden=None, multiple_of=256):
        super().__init__()
        hidden = gated_hidden_size(dim, multiple_of) if hidden is None else hidden
        self.w1, self.w2, self.w3 = (nn.Linear(a, b, bias=False) for a, b in ((dim, hidden), (hidden, dim), (dim, hidden)))

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class GeGLU(SwiGLU):
    pass

# %% right="gated_units" because="one stacked product for gate and up"
def gated_hidden_size(dim, multiple_of=256):
    return -(-int(2 * 4 * dim / 3) // multiple_of) * multiple_of


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden=None, multiple_of=256):
        super().__init__()
        if hidden is None:
            hidden = gated_hidden_size(dim, multiple_of)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x):
        gate, up = (x @ torch.cat([self.w1.weight, self.w3.weight]).T).chunk(2, dim=-1)
        return (up * gate * gate.sigmoid()) @ self.w2.weight.T


class GeGLU(SwiGLU):
    def forward(self, x):
        gate, up = (x @ torch.cat([self.w1.weight, self.w3.weight]).T).chunk(2, dim=-1)
        return (up * gate * 0.5 * torch.special.erfc(-gate / 2**0.5)) @ self.w2.weight.T

# %% wrong="swiglu_forward_kernel" because="the store has no mask"
@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, gate_row, up_row, out_row, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row + cols, gate * tl.sigmoid(gate) * up)

# %% wrong="swiglu_forward_kernel" because="rows taken to be n_cols apart"
@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, gate_row, up_row, out_row, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    gate = tl.load(gate_ptr + row * n_cols + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * n_cols + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n_cols + cols, gate * tl.sigmoid(gate) * up, mask=inside)

# %% wrong="swiglu_forward_kernel" because="one row stride for all three tensors"
@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, gate_row, up_row, out_row, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row + cols, gate * tl.sigmoid(gate) * up, mask=inside)

# %% wrong="swiglu_forward_kernel" because="only the first block of each row"
@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, gate_row, up_row, out_row, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < n_cols
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row + cols, gate * tl.sigmoid(gate) * up, mask=inside)

# %% wrong="swiglu_forward_kernel" because="32-bit row offsets"
@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, gate_row, up_row, out_row, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row + cols, gate * tl.sigmoid(gate) * up, mask=inside)

# %% wrong="swiglu_forward_kernel" because="64 bits only after the product"
@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, gate_row, up_row, out_row, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    gate = tl.load(gate_ptr + (row * gate_row).to(tl.int64) + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + (row * up_row).to(tl.int64) + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + (row * out_row).to(tl.int64) + cols, gate * tl.sigmoid(gate) * up, mask=inside)

# %% wrong="swiglu_forward_kernel" because="the activation on up"
@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, gate_row, up_row, out_row, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row + cols, gate * up * tl.sigmoid(up), mask=inside)

# %% wrong="swiglu_forward_kernel" because="e^x / (1 + e^x): NaN far out"
@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, gate_row, up_row, out_row, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    e = tl.exp(gate)
    tl.store(out_ptr + row * out_row + cols, gate * e / (1 + e) * up, mask=inside)

# %% wrong="swiglu_forward_kernel" because="gate is loaded twice, once for the sigmoid"
@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, gate_row, up_row, out_row, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    s = tl.sigmoid(tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32))
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row + cols, gate * s * up, mask=inside)

# %% right="swiglu_forward_kernel" because="pointers moved to the row first, a quotient for the sigmoid"
@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, gate_row, up_row, out_row, n_cols, BLOCK: tl.constexpr):
    row = tl.cast(tl.program_id(0), tl.int64)
    gate_ptr += row * gate_row
    up_ptr += row * up_row
    out_ptr += row * out_row
    lanes = tl.arange(0, BLOCK) + BLOCK * tl.program_id(1)
    g = tl.load(gate_ptr + lanes, mask=lanes < n_cols).to(tl.float32)
    u = tl.load(up_ptr + lanes, mask=lanes < n_cols).to(tl.float32)
    y = u * (g / (1.0 + tl.exp(-g)))
    tl.store(out_ptr + lanes, y.to(out_ptr.dtype.element_ty), mask=lanes < n_cols)

# %% wrong="swiglu_backward_kernel" because="the second store has no mask"
@triton.jit
def swiglu_backward_kernel(grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
                           grad_row, gate_row, up_row, dgate_row, dup_row, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    grad = tl.load(grad_ptr + row * grad_row + cols, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(dgate_ptr + row * dgate_row + cols, grad * up * s * (1 + gate * (1 - s)), mask=inside)
    tl.store(dup_ptr + row * dup_row + cols, grad * gate * s)

# %% wrong="swiglu_backward_kernel" because="the sigmoid's derivative for SiLU's"
@triton.jit
def swiglu_backward_kernel(grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
                           grad_row, gate_row, up_row, dgate_row, dup_row, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    grad = tl.load(grad_ptr + row * grad_row + cols, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(dgate_ptr + row * dgate_row + cols, grad * up * s * (1 - s), mask=inside)
    tl.store(dup_ptr + row * dup_row + cols, grad * gate * s, mask=inside)

# %% wrong="swiglu_backward_kernel" because="the two results swapped"
@triton.jit
def swiglu_backward_kernel(grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
                           grad_row, gate_row, up_row, dgate_row, dup_row, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    grad = tl.load(grad_ptr + row * grad_row + cols, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(dup_ptr + row * dup_row + cols, grad * up * s * (1 + gate * (1 - s)), mask=inside)
    tl.store(dgate_ptr + row * dgate_row + cols, grad * gate * s, mask=inside)

# %% wrong="swiglu_backward_kernel" because="dgate stored with dup's row stride"
@triton.jit
def swiglu_backward_kernel(grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
                           grad_row, gate_row, up_row, dgate_row, dup_row, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    grad = tl.load(grad_ptr + row * grad_row + cols, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(dgate_ptr + row * dup_row + cols, grad * up * s * (1 + gate * (1 - s)), mask=inside)
    tl.store(dup_ptr + row * dup_row + cols, grad * gate * s, mask=inside)

# %% wrong="swiglu_backward_kernel" because="64 bits for the loads, 32 for the stores"
@triton.jit
def swiglu_backward_kernel(grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
                           grad_row, gate_row, up_row, dgate_row, dup_row, n_cols, BLOCK: tl.constexpr):
    short = tl.program_id(0)
    row = short.to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    grad = tl.load(grad_ptr + row * grad_row + cols, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + cols, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(dgate_ptr + short * dgate_row + cols, grad * up * s * (1 + gate * (1 - s)), mask=inside)
    tl.store(dup_ptr + short * dup_row + cols, grad * gate * s, mask=inside)

# %% wrong="swiglu_backward_kernel" because="up and grad left out of dgate"
@triton.jit
def swiglu_backward_kernel(grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
                           grad_row, gate_row, up_row, dgate_row, dup_row, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < n_cols
    grad = tl.load(grad_ptr + row * grad_row + cols, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_row + cols, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(dgate_ptr + row * dgate_row + cols, grad * s * (1 + gate * (1 - s)), mask=inside)
    tl.store(dup_ptr + row * dup_row + cols, grad * gate * s, mask=inside)

# %% right="swiglu_backward_kernel" because="through the value of SiLU, dup first"
@triton.jit
def swiglu_backward_kernel(grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
                           grad_row, gate_row, up_row, dgate_row, dup_row, n_cols, BLOCK: tl.constexpr):
    row = tl.cast(tl.program_id(0), tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < n_cols
    g = tl.load(gate_ptr + row * gate_row + lanes, mask=mask).to(tl.float32)
    u = tl.load(up_ptr + row * up_row + lanes, mask=mask).to(tl.float32)
    do = tl.load(grad_ptr + row * grad_row + lanes, mask=mask).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    y = g * s
    tl.store(dup_ptr + row * dup_row + lanes, do * y, mask=mask)
    tl.store(dgate_ptr + row * dgate_row + lanes, do * u * (y + s * (1.0 - y)), mask=mask)

# %% wrong="key_questions" because="a gated layer counted as two matrices, traffic of the fused kernel everywhere"
def ffn_parameters(dim, hidden, gated):
    return 2 * dim * hidden


def tensors_moved(fused, backward):
    return 5 if backward else 3


def most_gradient(layers):
    return 0.25**layers


def programs(rows, n_cols, block):
    return rows * -(-n_cols // block)

# %% wrong="key_questions" because="a slope of a half, and the last block forgotten"
def ffn_parameters(dim, hidden, gated):
    return (3 if gated else 2) * dim * hidden


def tensors_moved(fused, backward):
    if fused:
        return 5 if backward else 3
    return 9 if backward else 5


def most_gradient(layers):
    return 0.5**layers


def programs(rows, n_cols, block):
    return rows * (n_cols // block)

# %% wrong="key_questions" because="autograd's backward counted as two kernels"
def ffn_parameters(dim, hidden, gated):
    return (3 if gated else 2) * dim * hidden


def tensors_moved(fused, backward):
    if fused:
        return 5 if backward else 3
    return 6 if backward else 5


def most_gradient(layers):
    return 0.25 * layers


def programs(rows, n_cols, block):
    return rows * math.ceil(n_cols / block)

# %% right="key_questions" because="a table, and rounding up by adding block - 1"
def ffn_parameters(dim, hidden, gated):
    return dim * hidden * (2 + int(gated))


def tensors_moved(fused, backward):
    return {(True, False): 3, (True, True): 5, (False, False): 5, (False, True): 9}[bool(fused), bool(backward)]


def most_gradient(layers):
    return 1 / 4**layers


def programs(rows, n_cols, block):
    return rows * ((n_cols + block - 1) // block)
