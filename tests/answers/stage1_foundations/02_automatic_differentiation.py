# %% wrong="numerical_gradient" because="a forward difference"
def numerical_gradient(f, x, eps=1e-5):
    x = x.detach().double()
    gradient = torch.zeros(x.shape, dtype=torch.float64)
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=torch.float64)
        step[i] = eps
        gradient.view(-1)[i] = (f(x + step.view(x.shape)) - f(x)) / eps
    return gradient

# %% wrong="numerical_gradient" because="computes in the format of x"
def numerical_gradient(f, x, eps=1e-5):
    gradient = torch.zeros(x.shape, dtype=x.dtype)
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=x.dtype)
        step[i] = eps
        step = step.view(x.shape)
        gradient.view(-1)[i] = (f(x + step) - f(x - step)) / (2 * eps)
    return gradient.double()

# %% wrong="numerical_gradient" because="nudges x in place and does not put it back"
def numerical_gradient(f, x, eps=1e-5):
    gradient = torch.zeros(x.shape, dtype=torch.float64)
    flat = x.reshape(-1)
    for i in range(x.numel()):
        flat[i] += eps
        above = f(flat.view(x.shape).double())
        flat[i] -= 2 * eps
        below = f(flat.view(x.shape).double())
        gradient.view(-1)[i] = (above - below) / (2 * eps)
    return gradient

# %% wrong="numerical_gradient" because="asks autograd instead"
def numerical_gradient(f, x, eps=1e-5):
    leaf = x.detach().double().requires_grad_()
    return torch.autograd.grad(f(leaf), leaf)[0]

# %% right="numerical_gradient" because="one matrix of all nudges"
def numerical_gradient(f, x, eps=1e-5):
    x = x.detach().double()
    nudges = eps * torch.eye(x.numel(), dtype=torch.float64).view(x.numel(), *x.shape)
    differences = [f(x + nudge) - f(x - nudge) for nudge in nudges]
    return (torch.stack(differences) / (2 * eps)).view(x.shape)

# %% wrong="unbroadcast" because="only the axes added on the left"
def unbroadcast(grad, shape):
    while grad.ndim > len(shape):
        grad = grad.sum(axis=0)
    return grad

# %% wrong="unbroadcast" because="summed axes of size 1 disappear"
def unbroadcast(grad, shape):
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    return grad.sum(axis=tuple(i for i, size in enumerate(shape) if size == 1))

# %% wrong="unbroadcast" because="takes the mean over repeated axes"
def unbroadcast(grad, shape):
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    return grad.mean(axis=tuple(i for i, size in enumerate(shape) if size == 1), keepdims=True)

# %% wrong="unbroadcast" because="reshapes what is left, whatever it means"
def unbroadcast(grad, shape):
    size = int(np.prod(shape))
    return grad.reshape(-1, size).sum(axis=0).reshape(shape)

# %% right="unbroadcast" because="one sum, then a reshape"
def unbroadcast(grad, shape):
    padded = (1,) * (grad.ndim - len(shape)) + tuple(shape)
    return grad.sum(axis=tuple(i for i, size in enumerate(padded) if size == 1)).reshape(shape)

# %% wrong="topological_order" because="recursive: ends at a thousand nested calls"
def topological_order(root):
    order, seen = [], set()

    def visit(node):
        if id(node) not in seen:
            seen.add(id(node))
            for parent in node.parents:
                visit(parent)
            order.append(node)
    visit(root)
    return order

# %% wrong="topological_order" because="breadth first, reversed: an edge that skips a level comes too early"
def topological_order(root):
    order, seen, queue = [], {id(root)}, [root]
    while queue:
        node = queue.pop(0)
        order.append(node)
        for parent in node.parents:
            if id(parent) not in seen:
                seen.add(id(parent))
                queue.append(parent)
    return order[::-1]

# %% wrong="topological_order" because="does not remember what it has visited: every path is walked"
def topological_order(root):
    order, stack = [], [(root, False)]
    while stack:
        node, finished = stack.pop()
        if finished:
            if all(node is not other for other in order[-500:]):
                order.append(node)
            continue
        stack.append((node, True))
        stack.extend((parent, False) for parent in node.parents)
    return order

# %% right="topological_order" because="two visits on one stack: enter, then leave"
def topological_order(root):
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        node, leaving = stack.pop()
        if leaving:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((parent, False) for parent in node.parents)
    return order

# %% right="topological_order" because="counts the edges that lead into each node (Kahn)"
def topological_order(root):
    uses, found, parents, queue = {id(root): 0}, {}, {}, [root]
    while queue:
        node = queue.pop()
        if id(node) in found:
            continue
        found[id(node)], parents[id(node)] = node, tuple(node.parents)
        for parent in parents[id(node)]:
            uses[id(parent)] = uses.get(id(parent), 0) + 1
            queue.append(parent)
    order, ready = [], [root]
    while ready:
        node = ready.pop()
        order.append(node)
        for parent in parents[id(node)]:
            uses[id(parent)] -= 1
            if uses[id(parent)] == 0:
                ready.append(parent)
    return order[::-1]

# %% wrong="tensor" because="adds gradients in place: two Tensors share one array"
class Tensor:
    def __init__(self, data, parents=(), vjp=None):
        self.data = np.asarray(data, dtype=np.float64)
        self.parents, self.vjp, self.grad = parents, vjp, None

    @property
    def shape(self):
        return self.data.shape

    @staticmethod
    def lift(value):
        return value if isinstance(value, Tensor) else Tensor(value)

    def __add__(self, other):
        other = Tensor.lift(other)
        return Tensor(self.data + other.data, (self, other), lambda g: tuple(g if p.shape == g.shape else unbroadcast(g, p.shape) for p in (self, other)))

    def __mul__(self, other):
        other = Tensor.lift(other)
        return Tensor(self.data * other.data, (self, other),
                      lambda g: (unbroadcast(g * other.data, self.shape), unbroadcast(g * self.data, other.shape)))

    def __matmul__(self, other):
        other = Tensor.lift(other)
        return Tensor(self.data @ other.data, (self, other),
                      lambda g: (unbroadcast(g @ other.data.swapaxes(-1, -2), self.shape),
                                 unbroadcast(self.data.swapaxes(-1, -2) @ g, other.shape)))

    def relu(self):
        return Tensor(np.maximum(self.data, 0), (self,), lambda g: (g * (self.data > 0),))

    def exp(self):
        return Tensor(np.exp(self.data), (self,), lambda g: (g * np.exp(self.data),))

    def log(self):
        return Tensor(np.log(self.data), (self,), lambda g: (g / self.data,))

    def sum(self, axis=None, keepdims=False):
        def vjp(g):
            if axis is not None and not keepdims:
                g = np.expand_dims(g, axis)
            return (np.array(np.broadcast_to(g, self.shape)),)
        return Tensor(self.data.sum(axis=axis, keepdims=keepdims), (self,), vjp)

    def backward(self):
        if self.shape != ():
            raise ValueError("a scalar")
        order = topological_order(self)
        for node in order:
            node.grad = None
        self.grad = np.ones_like(self.data)
        for node in reversed(order):
            if node.parents:
                for parent, grad in zip(node.parents, node.vjp(node.grad)):
                    if parent.grad is None:
                        parent.grad = np.atleast_1d(grad) if parent.shape == () else grad
                        parent.grad = parent.grad.reshape(parent.shape)
                    else:
                        parent.grad += grad

    def __radd__(self, other): return self + other
    def __rmul__(self, other): return self * other
    def __neg__(self): return self * -1.0
    def __sub__(self, other): return self + -Tensor.lift(other)
    def __rsub__(self, other): return Tensor.lift(other) + -self

# %% wrong="tensor" because="keeps only the last gradient that arrived"
class Tensor:
    def __init__(self, data, parents=(), vjp=None):
        self.data = np.asarray(data, dtype=np.float64)
        self.parents, self.vjp, self.grad = parents, vjp, None

    @property
    def shape(self):
        return self.data.shape

    @staticmethod
    def lift(value):
        return value if isinstance(value, Tensor) else Tensor(value)

    def __add__(self, other):
        other = Tensor.lift(other)
        return Tensor(self.data + other.data, (self, other), lambda g: (unbroadcast(g, self.shape), unbroadcast(g, other.shape)))

    def __mul__(self, other):
        other = Tensor.lift(other)
        return Tensor(self.data * other.data, (self, other),
                      lambda g: (unbroadcast(g * other.data, self.shape), unbroadcast(g * self.data, other.shape)))

    def __matmul__(self, other):
        other = Tensor.lift(other)
        return Tensor(self.data @ other.data, (self, other),
                      lambda g: (unbroadcast(g @ other.data.swapaxes(-1, -2), self.shape),
                                 unbroadcast(self.data.swapaxes(-1, -2) @ g, other.shape)))

    def relu(self):
        return Tensor(np.maximum(self.data, 0), (self,), lambda g: (g * (self.data > 0),))

    def exp(self):
        return Tensor(np.exp(self.data), (self,), lambda g: (g * np.exp(self.data),))

    def log(self):
        return Tensor(np.log(self.data), (self,), lambda g: (g / self.data,))

    def sum(self, axis=None, keepdims=False):
        def vjp(g):
            if axis is not None and not keepdims:
                g = np.expand_dims(g, axis)
            return (np.broadcast_to(g, self.shape),)
        return Tensor(self.data.sum(axis=axis, keepdims=keepdims), (self,), vjp)

    def backward(self):
        if self.shape != ():
            raise ValueError("a scalar")
        self.grad = np.ones_like(self.data)
        for node in reversed(topological_order(self)):
            if node.parents:
                for parent, grad in zip(node.parents, node.vjp(node.grad)):
                    parent.grad = grad

    def __radd__(self, other): return self + other
    def __rmul__(self, other): return self * other
    def __neg__(self): return self * -1.0
    def __sub__(self, other): return self + -Tensor.lift(other)
    def __rsub__(self, other): return Tensor.lift(other) + -self

# %% wrong="tensor" because="adds to what an earlier backward() left, as PyTorch does for leaves"
class Tensor:
    def __init__(self, data, parents=(), vjp=None):
        self.data = np.asarray(data, dtype=np.float64)
        self.parents, self.vjp, self.grad = parents, vjp, None

    @property
    def shape(self):
        return self.data.shape

    @staticmethod
    def lift(value):
        return value if isinstance(value, Tensor) else Tensor(value)

    def __add__(self, other):
        other = Tensor.lift(other)
        return Tensor(self.data + other.data, (self, other), lambda g: (unbroadcast(g, self.shape), unbroadcast(g, other.shape)))

    def __mul__(self, other):
        other = Tensor.lift(other)
        return Tensor(self.data * other.data, (self, other),
                      lambda g: (unbroadcast(g * other.data, self.shape), unbroadcast(g * self.data, other.shape)))

    def __matmul__(self, other):
        other = Tensor.lift(other)
        return Tensor(self.data @ other.data, (self, other),
                      lambda g: (unbroadcast(g @ other.data.swapaxes(-1, -2), self.shape),
                                 unbroadcast(self.data.swapaxes(-1, -2) @ g, other.shape)))

    def relu(self):
        return Tensor(np.maximum(self.data, 0), (self,), lambda g: (g * (self.data > 0),))

    def exp(self):
        return Tensor(np.exp(self.data), (self,), lambda g: (g * np.exp(self.data),))

    def log(self):
        return Tensor(np.log(self.data), (self,), lambda g: (g / self.data,))

    def sum(self, axis=None, keepdims=False):
        def vjp(g):
            if axis is not None and not keepdims:
                g = np.expand_dims(g, axis)
            return (np.broadcast_to(g, self.shape),)
        return Tensor(self.data.sum(axis=axis, keepdims=keepdims), (self,), vjp)

    def backward(self):
        if self.shape != ():
            raise ValueError("a scalar")
        self.grad = np.ones_like(self.data)
        for node in reversed(topological_order(self)):
            if node.parents:
                for parent, grad in zip(node.parents, node.vjp(node.grad)):
                    parent.grad = grad if parent.grad is None else parent.grad + grad

    def __radd__(self, other): return self + other
    def __rmul__(self, other): return self * other
    def __neg__(self): return self * -1.0
    def __sub__(self, other): return self + -Tensor.lift(other)
    def __rsub__(self, other): return Tensor.lift(other) + -self

# %% wrong="tensor" because="no unbroadcast, derivative of relu at 0 is 1, matrix product without transposes for stacks"
class Tensor:
    def __init__(self, data, parents=(), vjp=None):
        self.data = np.asarray(data, dtype=np.float64)
        self.parents, self.vjp, self.grad = parents, vjp, None

    @property
    def shape(self):
        return self.data.shape

    @staticmethod
    def lift(value):
        return value if isinstance(value, Tensor) else Tensor(value)

    def __add__(self, other):
        other = Tensor.lift(other)
        return Tensor(self.data + other.data, (self, other), lambda g: (g, g))

    def __mul__(self, other):
        other = Tensor.lift(other)
        return Tensor(self.data * other.data, (self, other), lambda g: (g * other.data, g * self.data))

    def __matmul__(self, other):
        other = Tensor.lift(other)
        return Tensor(self.data @ other.data, (self, other), lambda g: (g @ other.data.T, self.data.T @ g))

    def relu(self):
        return Tensor(np.maximum(self.data, 0), (self,), lambda g: (g * (self.data >= 0),))

    def exp(self):
        return Tensor(np.exp(self.data), (self,), lambda g: (g * np.exp(self.data),))

    def log(self):
        return Tensor(np.log(self.data), (self,), lambda g: (g / self.data,))

    def sum(self, axis=None, keepdims=False):
        return Tensor(self.data.sum(axis=axis, keepdims=keepdims), (self,), lambda g: (g * np.ones_like(self.data),))

    def backward(self):
        order = topological_order(self)
        for node in order:
            node.grad = np.zeros_like(node.data)
        self.grad = np.ones_like(self.data)
        for node in reversed(order):
            if node.parents:
                for parent, grad in zip(node.parents, node.vjp(node.grad)):
                    parent.grad = parent.grad + grad

    def __radd__(self, other): return self + other
    def __rmul__(self, other): return self * other
    def __neg__(self): return self * -1.0
    def __sub__(self, other): return self + -Tensor.lift(other)
    def __rsub__(self, other): return Tensor.lift(other) + -self

# %% right="tensor" because="gradients in a dictionary by identity, einsum for the matrix product"
class Tensor:
    def __init__(self, data, parents=(), vjp=None):
        self.data = np.array(data, dtype=float)
        self.parents, self.vjp, self.grad = parents, vjp, None

    shape = property(lambda self: self.data.shape)

    @staticmethod
    def lift(value):
        return value if isinstance(value, Tensor) else Tensor(value)

    def __add__(self, other):
        other = Tensor.lift(other)
        return Tensor(np.add(self.data, other.data), (self, other),
                      lambda g: [unbroadcast(g.copy(), t.shape) for t in (self, other)])

    def __mul__(self, other):
        other = Tensor.lift(other)
        return Tensor(np.multiply(self.data, other.data), (self, other),
                      lambda g: [unbroadcast(g * b.data, a.shape) for a, b in ((self, other), (other, self))])

    def __matmul__(self, other):
        other = Tensor.lift(other)
        return Tensor(np.matmul(self.data, other.data), (self, other),
                      lambda g: [unbroadcast(np.einsum("...nm,...km->...nk", g, other.data), self.shape),
                                 unbroadcast(np.einsum("...nk,...nm->...km", self.data, g), other.shape)])

    def relu(self):
        positive = (self.data > 0).astype(float)
        return Tensor(self.data * positive, (self,), lambda g: [g * positive])

    def exp(self):
        out = Tensor(np.exp(self.data), (self,))
        out.vjp = lambda g: [g * out.data]
        return out

    def log(self):
        return Tensor(np.log(self.data), (self,), lambda g: [g * (1 / self.data)])

    def sum(self, axis=None, keepdims=False):
        kept = self.data.sum(axis=axis, keepdims=True).shape
        return Tensor(self.data.sum(axis=axis, keepdims=keepdims), (self,),
                      lambda g: [np.ones(self.shape) * np.reshape(g, kept)])

    def backward(self):
        if self.data.ndim:
            raise ValueError("not a scalar")
        grads = {id(self): np.array(1.0)}
        for node in topological_order(self)[::-1]:
            node.grad = grads[id(node)]
            for parent, grad in zip(node.parents, node.vjp(node.grad) if node.parents else []):
                grads[id(parent)] = grads.get(id(parent), 0) + np.array(grad)

    __array_priority__ = 1
    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self):
        return -1.0 * self

    def __sub__(self, other):
        return self + -Tensor.lift(other)

    def __rsub__(self, other):
        return -self + other

# %% wrong="cross_entropy" because="the sum over the rows, not the mean"
def cross_entropy(logits, labels):
    shifted = logits - logits.data.max(axis=1, keepdims=True)
    one_hot = np.eye(logits.shape[1])[labels]
    return (shifted.exp().sum(axis=1).log() - (shifted * one_hot).sum(axis=1)).sum()

# %% wrong="cross_entropy" because="overflows: the maximum is not subtracted"
def cross_entropy(logits, labels):
    one_hot = np.eye(logits.shape[1])[labels]
    return (logits.exp().sum(axis=1).log() - (logits * one_hot).sum(axis=1)).sum() * (1 / logits.shape[0])

# %% wrong="cross_entropy" because="one maximum for all rows: small rows underflow"
def cross_entropy(logits, labels):
    shifted = logits - logits.data.max()
    one_hot = np.eye(logits.shape[1])[labels]
    return (shifted.exp().sum(axis=1).log() - (shifted * one_hot).sum(axis=1)).sum() * (1 / logits.shape[0])

# %% wrong="cross_entropy" because="right value, no graph"
def cross_entropy(logits, labels):
    z = logits.data - logits.data.max(axis=1, keepdims=True)
    return Tensor(np.mean(np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), labels]))

# %% right="cross_entropy" because="the loss of each row weighted in one product with a matrix"
def cross_entropy(logits, labels):
    n, c = logits.shape
    shifted = logits + (-logits.data.max(axis=1, keepdims=True))
    log_probability = shifted - shifted.exp().sum(axis=-1, keepdims=True).log()
    picked = np.zeros((n, c))
    picked[np.arange(n), labels] = -1.0 / n
    return (log_probability * picked).sum()

# %% wrong="fit" because="steps along the gradient, not against it"
def fit(images, labels, seed=0):
    rng = np.random.default_rng(seed)
    w1, w2 = Tensor(rng.normal(0, 0.2, (64, 32))), Tensor(rng.normal(0, 0.2, (32, 10)))
    for start in range(0, len(images), 64):
        loss = cross_entropy((Tensor(images[start:start + 64]) @ w1).relu() @ w2, labels[start:start + 64])
        loss.backward()
        for p in (w1, w2):
            p.data = p.data + 0.1 * p.grad
    return lambda x: ((Tensor(x) @ w1).relu() @ w2).data.argmax(axis=1)

# %% wrong="fit" because="all weights begin at zero, so nothing moves but a bias that is not there"
def fit(images, labels, seed=0):
    w1, w2 = Tensor(np.zeros((64, 32))), Tensor(np.zeros((32, 10)))
    for _ in range(3):
        for start in range(0, len(images), 64):
            loss = cross_entropy((Tensor(images[start:start + 64]) @ w1).relu() @ w2, labels[start:start + 64])
            loss.backward()
            for p in (w1, w2):
                p.data = p.data - 0.5 * p.grad
    return lambda x: ((Tensor(x) @ w1).relu() @ w2).data.argmax(axis=1)

# %% wrong="fit" because="not the engine: scikit-learn's nearest neighbors"
def fit(images, labels, seed=0):
    from sklearn.neighbors import KNeighborsClassifier
    return KNeighborsClassifier(3).fit(images, labels).predict

# %% right="fit" because="momentum, another width, whole epochs in order"
def fit(images, labels, seed=0):
    rng = np.random.default_rng(seed + 100)
    parameters = [Tensor(rng.normal(0, 0.15, (64, 48))), Tensor(np.zeros((1, 48))), Tensor(rng.normal(0, 0.15, (48, 10)))]
    speed = [np.zeros(p.shape) for p in parameters]

    def network(x):
        return (Tensor.lift(x) @ parameters[0] + parameters[1]).relu() @ parameters[2]
    order = rng.permutation(len(images))
    for _ in range(15):
        for batch in np.array_split(order, len(images) // 50):
            cross_entropy(network(images[batch]), labels[batch]).backward()
            for i, p in enumerate(parameters):
                speed[i] = 0.9 * speed[i] + p.grad
                p.data = p.data - 0.05 * speed[i]
    return lambda x: np.argmax(network(x).data, axis=-1)

# %% wrong="softmax_function" because="the diagonal of the Jacobian alone"
class SoftmaxFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        e = torch.exp(x - x.amax(-1, keepdim=True))
        y = e / e.sum(-1, keepdim=True)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, = ctx.saved_tensors
        return grad * y * (1 - y)

# %% wrong="softmax_function" because="forms the whole Jacobian"
class SoftmaxFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        e = torch.exp(x - x.amax(-1, keepdim=True))
        y = e / e.sum(-1, keepdim=True)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, = ctx.saved_tensors
        jacobian = torch.diag_embed(y) - y.unsqueeze(-1) * y.unsqueeze(-2)
        return (grad.unsqueeze(-2) @ jacobian).squeeze(-2)

# %% wrong="softmax_function" because="overflows: no maximum is subtracted"
class SoftmaxFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        e = torch.exp(x)
        y = e / e.sum(-1, keepdim=True)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, = ctx.saved_tensors
        return y * (grad - (grad * y).sum(-1, keepdim=True))

# %% wrong="softmax_function" because="over the first axis"
class SoftmaxFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        e = torch.exp(x - x.amax(0, keepdim=True))
        y = e / e.sum(0, keepdim=True)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, = ctx.saved_tensors
        return y * (grad - (grad * y).sum(0, keepdim=True))

# %% wrong="softmax_function" because="PyTorch's softmax, inside"
class SoftmaxFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.softmax(x, -1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, = ctx.saved_tensors
        return y * (grad - (grad * y).sum(-1, keepdim=True))

# %% right="softmax_function" because="through the log-sum-exp, einsum for the row sums"
class SoftmaxFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.exp(x - torch.logsumexp(x, dim=-1, keepdim=True))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, = ctx.saved_tensors
        row = torch.einsum("...n,...n->...", grad, y)
        return grad * y - row.unsqueeze(-1) * y

# %% wrong="jvp_forward" because="one half of the product rule"
class Dual:
    def __init__(self, value, tangent):
        self.value, self.tangent = value, tangent

    @staticmethod
    def lift(value):
        if isinstance(value, Dual):
            return value
        value = torch.as_tensor(value, dtype=torch.float64)
        return Dual(value, torch.zeros_like(value))

    def __add__(self, other):
        other = Dual.lift(other)
        return Dual(self.value + other.value, self.tangent + other.tangent)

    def __mul__(self, other):
        other = Dual.lift(other)
        return Dual(self.value * other.value, self.tangent * other.value)

    def __matmul__(self, other):
        other = Dual.lift(other)
        return Dual(self.value @ other.value, self.tangent @ other.value)

    def exp(self): return Dual(self.value.exp(), self.value.exp() * self.tangent)
    def log(self): return Dual(self.value.log(), self.tangent / self.value)
    def tanh(self): return Dual(self.value.tanh(), (1 - self.value.tanh() ** 2) * self.tangent)
    def sum(self, dim=None): return Dual(self.value.sum(dim), self.tangent.sum(dim))
    def __radd__(self, other): return self + other
    def __rmul__(self, other): return self * other
    def __rmatmul__(self, other): return Dual.lift(other) @ self
    def __sub__(self, other): return self + Dual.lift(other) * -1.0
    def __rsub__(self, other): return Dual.lift(other) + self * -1.0


def jvp_forward(f, x, v):
    out = f(Dual(x, v))
    return out.value, out.tangent

# %% wrong="jvp_forward" because="differences along v, two runs"
class Dual:
    pass


def jvp_forward(f, x, v):
    eps = 1e-5
    return f(x), (f(x + eps * v) - f(x - eps * v)) / (2 * eps)

# %% wrong="jvp_forward" because="the inner derivative is forgotten in exp, log and tanh"
class Dual:
    def __init__(self, value, tangent):
        self.value, self.tangent = value, tangent

    @staticmethod
    def lift(value):
        if isinstance(value, Dual):
            return value
        value = torch.as_tensor(value, dtype=torch.float64)
        return Dual(value, torch.zeros_like(value))

    def __add__(self, other):
        other = Dual.lift(other)
        return Dual(self.value + other.value, self.tangent + other.tangent)

    def __mul__(self, other):
        other = Dual.lift(other)
        return Dual(self.value * other.value, self.tangent * other.value + self.value * other.tangent)

    def __matmul__(self, other):
        other = Dual.lift(other)
        return Dual(self.value @ other.value, self.tangent @ other.value + self.value @ other.tangent)

    def exp(self): return Dual(self.value.exp(), self.value.exp())
    def log(self): return Dual(self.value.log(), 1 / self.value)
    def tanh(self): return Dual(self.value.tanh(), 1 - self.value.tanh() ** 2)
    def sum(self, dim=None): return Dual(self.value.sum(dim), self.tangent.sum(dim))
    def __radd__(self, other): return self + other
    def __rmul__(self, other): return self * other
    def __rmatmul__(self, other): return Dual.lift(other) @ self
    def __sub__(self, other): return self + Dual.lift(other) * -1.0
    def __rsub__(self, other): return Dual.lift(other) + self * -1.0


def jvp_forward(f, x, v):
    out = f(Dual(x, v))
    return out.value, out.tangent

# %% right="jvp_forward" because="sum rule by a loop over the pairs, tanh through exponentials"
class Dual:
    def __init__(self, value, tangent):
        self.value, self.tangent = value, tangent

    @staticmethod
    def lift(value):
        return value if isinstance(value, Dual) else Dual(torch.as_tensor(value, dtype=torch.float64), 0.0)

    def __add__(self, other):
        other = Dual.lift(other)
        total = self.value + other.value
        return Dual(total, torch.zeros_like(total) + self.tangent + other.tangent)

    def __mul__(self, other):
        other = Dual.lift(other)
        return Dual(self.value * other.value, other.value * self.tangent + other.tangent * self.value)

    def __matmul__(self, other):
        other = Dual.lift(other)
        left = self.tangent @ other.value if torch.is_tensor(self.tangent) else 0.0
        right = self.value @ other.tangent if torch.is_tensor(other.tangent) else 0.0
        return Dual(self.value @ other.value, left + right)

    def exp(self):
        return Dual(torch.exp(self.value), self.tangent * torch.exp(self.value))

    def log(self):
        return Dual(torch.log(self.value), self.tangent * self.value.reciprocal())

    def tanh(self):
        return Dual(torch.tanh(self.value), self.tangent / torch.cosh(self.value) ** 2)

    def sum(self, dim=None):
        return Dual(torch.sum(self.value, dim), torch.sum(self.tangent, dim))

    __radd__, __rmul__ = __add__, __mul__

    def __rmatmul__(self, other):
        return Dual.lift(other) @ self

    def __sub__(self, other):
        return self + Dual.lift(other) * -1.0

    def __rsub__(self, other):
        return self * -1.0 + other


def jvp_forward(f, x, v):
    out = f(Dual(x, v))
    return out.value, out.tangent

# %% wrong="checkpoint" because="only calls fn: everything is kept"
def checkpoint(fn, *inputs):
    return fn(*inputs)

# %% wrong="checkpoint" because="the parameters of fn get no gradient"
def checkpoint(fn, *inputs):
    return Again.apply(fn, *inputs)


class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fn, *inputs):
        ctx.fn, ctx.state = fn, torch.get_rng_state()
        ctx.save_for_backward(*inputs)
        return fn(*inputs)

    @staticmethod
    def backward(ctx, grad):
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            out = ctx.fn(*inputs)
        torch.set_rng_state(now)
        wanted = [t for t in inputs if t.requires_grad]
        grads = iter(torch.autograd.grad(out, wanted, grad))
        return (None, *(next(grads) if t.requires_grad else None for t in inputs))

# %% wrong="checkpoint" because="the second run draws other random numbers"
def checkpoint(fn, *inputs):
    return Again.apply(fn, *inputs)


class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fn, *inputs):
        ctx.fn = fn
        ctx.save_for_backward(*inputs)
        return fn(*inputs)

    @staticmethod
    def backward(ctx, grad):
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.fn(*inputs)
        torch.autograd.backward(out, grad)
        return (None, *(t.grad for t in inputs))

# %% wrong="checkpoint" because="leaves the generator where the second run began"
def checkpoint(fn, *inputs):
    return Again.apply(fn, *inputs)


class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fn, *inputs):
        ctx.fn, ctx.state = fn, torch.get_rng_state()
        ctx.save_for_backward(*inputs)
        return fn(*inputs)

    @staticmethod
    def backward(ctx, grad):
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            out = ctx.fn(*inputs)
        torch.autograd.backward(out, grad)
        return (None, *(t.grad for t in inputs))

# %% wrong="checkpoint" because="PyTorch's own"
def checkpoint(fn, *inputs):
    import torch.utils.checkpoint
    return torch.utils.checkpoint.checkpoint(fn, *inputs, use_reentrant=False)

# %% right="checkpoint" because="fork_rng around the second run, inputs kept on the context"
def checkpoint(fn, *inputs):
    return Again.apply(fn, *inputs)


class Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fn, *inputs):
        ctx.fn = fn
        ctx.state = torch.random.get_rng_state()
        ctx.save_for_backward(*inputs)
        with torch.no_grad():
            return fn(*inputs)

    @staticmethod
    def backward(ctx, grad):
        leaves = []
        for t in ctx.saved_tensors:
            leaf = t.detach()
            leaf.requires_grad = t.requires_grad
            leaves.append(leaf)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.random.set_rng_state(ctx.state)
            out = ctx.fn(*leaves)
            (out * grad).sum().backward()
        return (None, *[leaf.grad for leaf in leaves])

# %% wrong="key_questions" because="counts a forward difference, inputs for either mode, and forgets the segment itself"
def evaluations(parameters):
    return parameters + 1


def runs_for_jacobian(inputs, outputs):
    return ("reverse", inputs)


def kept_with_checkpoints(layers, segment):
    return layers / segment

# %% wrong="key_questions" because="always reverse mode"
def evaluations(parameters):
    return 2 * parameters


def runs_for_jacobian(inputs, outputs):
    return ("reverse", outputs)


def kept_with_checkpoints(layers, segment):
    return layers / segment + segment

# %% right="key_questions" because="written another way"
def evaluations(parameters):
    return parameters << 1


def runs_for_jacobian(inputs, outputs):
    runs, mode = min((inputs, "forward"), (outputs, "reverse"))
    return mode, runs


def kept_with_checkpoints(layers, segment):
    return (layers + segment * segment) / segment
