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

# %% wrong="topological_order" because="a set of the nodes themselves: told apart by == and hash, not by identity"
def topological_order(root):
    order, visited, stack = [], [], [(root, False)]
    while stack:
        node, leaving = stack.pop()
        if leaving:
            order.append(node)
        elif node not in visited[-50:]:
            visited.append(node)
            stack.append((node, True))
            for parent in node.parents:
                if parent not in visited[-50:]:
                    stack.append((parent, False))
    return order

# %% wrong="topological_order" because="a set of nodes"
- order, seen = [], {id(root)}
+ order, seen = [], {root}

- parent = next((p for p in remaining if id(p) not in seen), None)
+ parent = next((p for p in remaining if p not in seen), None)

- seen.add(id(parent))
+ seen.add(parent)

# %% wrong="backward" because="adds gradients in place: two Values share one array"
- for node in order:
-     node.grad = np.zeros_like(node.data)
+ for node in order:
+     node.grad = None

- # A new array, not +=: the same array of gradients may have gone to two parents.
- parent.grad = parent.grad + grad
+ if parent.grad is None:
+     parent.grad = np.atleast_1d(grad).reshape(parent.shape)
+ else:
+     parent.grad += grad

# %% wrong="backward" because="keeps only the last gradient that arrived"
- parent.grad = parent.grad + grad
+ parent.grad = np.asarray(grad)

# %% wrong="backward" because="adds to what an earlier call left, as PyTorch does for leaves"
- node.grad = np.zeros_like(node.data)
+ node.grad = np.zeros_like(node.data) if node.grad is None else node.grad

# %% wrong="backward" because="forgets what an earlier call left in the inputs alone"
- node.grad = np.zeros_like(node.data)
+ if not node.parents or node.grad is None:
+     node.grad = np.zeros_like(node.data)

# %% wrong="backward" because="intermediate results keep no gradient, as in PyTorch"
- parent.grad = parent.grad + grad
+ parent.grad = parent.grad + grad
+ if node is not root and node.parents:
+     node.grad = None

# %% wrong="backward" because="takes any array for a scalar"
- if root.shape != ():
+ if root.data.size == 0:

# %% wrong="backward" because="takes a (1, 1) array for a scalar"
- if root.shape != ():
+ if root.data.size != 1:

# %% wrong="backward" because="walks every path"
def backward(root):
    if root.shape != ():
        raise ValueError("a scalar is asked for")
    for node in topological_order(root):
        node.grad = np.zeros_like(node.data)

    def walk(node, grad):
        node.grad = node.grad + grad
        for parent, share in zip(node.parents, node.vjp(grad) if node.parents else ()):
            walk(parent, share)

    walk(root, np.ones(()))

# %% right="backward" because="gradients in a dictionary by identity"
def backward(root):
    if root.data.ndim:
        raise ValueError("not a scalar")
    grads = {id(root): np.array(1.0)}
    for node in topological_order(root)[::-1]:
        node.grad = grads[id(node)]
        for parent, grad in zip(node.parents, node.vjp(node.grad) if node.parents else []):
            grads[id(parent)] = grads.get(id(parent), 0) + np.array(grad)

# %% wrong="tensor" because="no unbroadcast in the sum"
- lambda g: (unbroadcast(g, self.shape), unbroadcast(g, other.shape)),
+ lambda g: (g, g),

# %% wrong="tensor" because="the sum brings only its right operand back to shape"
- lambda g: (unbroadcast(g, self.shape), unbroadcast(g, other.shape)),
+ lambda g: (g, unbroadcast(g, other.shape)),

# %% wrong="tensor" because="the product brings only its right operand back to shape"
- unbroadcast(g * other.data, self.shape),
+ g * other.data,

# %% wrong="tensor" because="the product hands each factor its own share"
- unbroadcast(g * other.data, self.shape),
- unbroadcast(g * self.data, other.shape),
+ unbroadcast(g * self.data, self.shape),
+ unbroadcast(g * other.data, other.shape),

# %% wrong="tensor" because="derivative of relu at 0 is 1"
- return Tensor(np.maximum(self.data, 0), (self,), lambda g: (g * (self.data > 0),))
+ return Tensor(np.maximum(self.data, 0), (self,), lambda g: (g * (self.data >= 0),))

# %% wrong="tensor" because="matrix product without transposes for stacks"
- unbroadcast(g @ other.data.swapaxes(-1, -2), self.shape),
- unbroadcast(self.data.swapaxes(-1, -2) @ g, other.shape),
+ unbroadcast(g @ other.data.T, self.shape),
+ unbroadcast(self.data.T @ g, other.shape),

# %% wrong="tensor" because="the matrix product sums only what is broadcast on the right"
- unbroadcast(g @ other.data.swapaxes(-1, -2), self.shape),
+ g @ other.data.swapaxes(-1, -2),

# %% wrong="tensor" because="the sum's gradient is not put back at its axis"
- if axis is not None and not keepdims:
-     g = np.expand_dims(g, axis)

# %% wrong="tensor" because="exp hands on what arrives, scaled in place"
- return Tensor(result, (self,), lambda g: (g * result,))
+ return Tensor(result, (self,), lambda g: (np.multiply(g, result, out=np.asarray(g)),))

# %% wrong="tensor" because="log hands on what arrives times the number"
- return Tensor(np.log(self.data), (self,), lambda g: (g / self.data,))
+ return Tensor(np.log(self.data), (self,), lambda g: (g * self.data,))

# %% right="tensor" because="einsum for the matrix product, shares by a loop, masks by products"
class Tensor(Value):
    @staticmethod
    def lift(value):
        return value if isinstance(value, Tensor) else Tensor(value)

    def __add__(self, other):
        other = Tensor.lift(other)
        return Tensor(
            np.add(self.data, other.data),
            (self, other),
            lambda g: [unbroadcast(g.copy(), t.shape) for t in (self, other)],
        )

    def __mul__(self, other):
        other = Tensor.lift(other)
        return Tensor(
            np.multiply(self.data, other.data),
            (self, other),
            lambda g: [unbroadcast(g * b.data, a.shape) for a, b in ((self, other), (other, self))],
        )

    def __matmul__(self, other):
        other = Tensor.lift(other)
        return Tensor(
            np.matmul(self.data, other.data),
            (self, other),
            lambda g: [
                unbroadcast(np.einsum("...nm,...km->...nk", g, other.data), self.shape),
                unbroadcast(np.einsum("...nk,...nm->...km", self.data, g), other.shape),
            ],
        )

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
        return Tensor(
            self.data.sum(axis=axis, keepdims=keepdims),
            (self,),
            lambda g: [np.ones(self.shape) * np.reshape(g, kept)],
        )

    def backward(self):
        backward(self)

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
    return (logits.exp().sum(axis=1).log() - (logits * one_hot).sum(axis=1)).sum() * (
        1 / logits.shape[0]
    )

# %% wrong="cross_entropy" because="one maximum for all rows: small rows underflow"
def cross_entropy(logits, labels):
    shifted = logits - logits.data.max()
    one_hot = np.eye(logits.shape[1])[labels]
    return (shifted.exp().sum(axis=1).log() - (shifted * one_hot).sum(axis=1)).sum() * (
        1 / logits.shape[0]
    )

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
        loss = cross_entropy(
            (Tensor(images[start : start + 64]) @ w1).relu() @ w2, labels[start : start + 64]
        )
        loss.backward()
        for p in (w1, w2):
            p.data = p.data + 0.1 * p.grad
    return lambda x: ((Tensor(x) @ w1).relu() @ w2).data.argmax(axis=1)

# %% wrong="fit" because="all weights begin at zero, so nothing moves but a bias that is not there"
def fit(images, labels, seed=0):
    w1, w2 = Tensor(np.zeros((64, 32))), Tensor(np.zeros((32, 10)))
    for _ in range(3):
        for start in range(0, len(images), 64):
            loss = cross_entropy(
                (Tensor(images[start : start + 64]) @ w1).relu() @ w2, labels[start : start + 64]
            )
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
    parameters = [
        Tensor(rng.normal(0, 0.15, (64, 48))),
        Tensor(np.zeros((1, 48))),
        Tensor(rng.normal(0, 0.15, (48, 10))),
    ]
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

# %% wrong="softmax_function" because="the diagonal of the Jacobian alone" base="diagonal-jacobian"
class SoftmaxFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        e = torch.exp(x - x.amax(-1, keepdim=True))
        y = e / e.sum(-1, keepdim=True)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * y * (1 - y)

# %% wrong="softmax_function" because="forms the whole Jacobian" of="diagonal-jacobian"
- return grad * y * (1 - y)
+ jacobian = torch.diag_embed(y) - y.unsqueeze(-1) * y.unsqueeze(-2)
+ return (grad.unsqueeze(-2) @ jacobian).squeeze(-2)

# %% wrong="softmax_function" because="overflows: no maximum is subtracted" of="diagonal-jacobian"
- e = torch.exp(x - x.amax(-1, keepdim=True))
+ e = torch.exp(x)

- return grad * y * (1 - y)
+ return y * (grad - (grad * y).sum(-1, keepdim=True))

# %% wrong="softmax_function" because="over the first axis" of="diagonal-jacobian"
- e = torch.exp(x - x.amax(-1, keepdim=True))
- y = e / e.sum(-1, keepdim=True)
+ e = torch.exp(x - x.amax(0, keepdim=True))
+ y = e / e.sum(0, keepdim=True)

- return grad * y * (1 - y)
+ return y * (grad - (grad * y).sum(0, keepdim=True))

# %% wrong="softmax_function" because="PyTorch's softmax, inside" of="diagonal-jacobian"
- e = torch.exp(x - x.amax(-1, keepdim=True))
- y = e / e.sum(-1, keepdim=True)
+ y = torch.softmax(x, -1)

- return grad * y * (1 - y)
+ return y * (grad - (grad * y).sum(-1, keepdim=True))

# %% right="softmax_function" because="through the log-sum-exp of shifted rows, einsum for the row sums" of="diagonal-jacobian"
- e = torch.exp(x - x.amax(-1, keepdim=True))
- y = e / e.sum(-1, keepdim=True)
+ shifted = x - x.amax(-1, keepdim=True)
+ y = torch.exp(shifted - torch.logsumexp(shifted, dim=-1, keepdim=True))

- return grad * y * (1 - y)
+ row = torch.einsum("...n,...n->...", grad, y)
+ return grad * y - row.unsqueeze(-1) * y

# %% wrong="jvp_forward" because="one half of the product rule" base="half-product"
class Dual:
    def __init__(self, value, tangent):
        self.value, self.tangent = value, tangent

    @staticmethod
    def lift(value):
        if isinstance(value, Dual):
            return value
        return Dual(value, torch.zeros_like(value) if isinstance(value, torch.Tensor) else 0.0)

    def __add__(self, other):
        other = Dual.lift(other)
        return Dual(self.value + other.value, self.tangent + other.tangent)

    def __mul__(self, other):
        other = Dual.lift(other)
        return Dual(self.value * other.value, self.tangent * other.value)

    def __matmul__(self, other):
        other = Dual.lift(other)
        return Dual(self.value @ other.value, self.tangent @ other.value)

    def exp(self):
        return Dual(self.value.exp(), self.value.exp() * self.tangent)

    def log(self):
        return Dual(self.value.log(), self.tangent / self.value)

    def tanh(self):
        return Dual(self.value.tanh(), (1 - self.value.tanh() ** 2) * self.tangent)

    def sum(self, dim=None):
        return Dual(self.value.sum(dim), self.tangent.sum(dim))

    def __radd__(self, other):
        return self + other

    def __rmul__(self, other):
        return self * other

    def __rmatmul__(self, other):
        return Dual.lift(other) @ self

    def __sub__(self, other):
        return self + Dual.lift(other) * -1.0

    def __rsub__(self, other):
        return Dual.lift(other) + self * -1.0


def jvp_forward(f, x, v):
    out = f(Dual(x, v))
    return out.value, out.tangent

# %% wrong="jvp_forward" because="differences along v, two runs"
class Dual:
    pass


def jvp_forward(f, x, v):
    eps = 1e-5
    return f(x), (f(x + eps * v) - f(x - eps * v)) / (2 * eps)

# %% wrong="jvp_forward" because="the inner derivative is forgotten in exp, log and tanh" of="half-product"
- return Dual(self.value * other.value, self.tangent * other.value)
+ return Dual(
+     self.value * other.value, self.tangent * other.value + self.value * other.tangent
+ )

- return Dual(self.value @ other.value, self.tangent @ other.value)
+ return Dual(
+     self.value @ other.value, self.tangent @ other.value + self.value @ other.tangent
+ )

- return Dual(self.value.exp(), self.value.exp() * self.tangent)
+ return Dual(self.value.exp(), self.value.exp())

- return Dual(self.value.log(), self.tangent / self.value)
+ return Dual(self.value.log(), 1 / self.value)

- return Dual(self.value.tanh(), (1 - self.value.tanh() ** 2) * self.tangent)
+ return Dual(self.value.tanh(), 1 - self.value.tanh() ** 2)

# %% right="jvp_forward" because="sum rule by a loop over the pairs, tanh through exponentials"
class Dual:
    def __init__(self, value, tangent):
        self.value, self.tangent = value, tangent

    @staticmethod
    def lift(value):
        return value if isinstance(value, Dual) else Dual(value, 0.0)

    def __add__(self, other):
        other = Dual.lift(other)
        total = self.value + other.value
        return Dual(total, torch.zeros_like(total) + self.tangent + other.tangent)

    def __mul__(self, other):
        other = Dual.lift(other)
        return Dual(
            self.value * other.value, other.value * self.tangent + other.tangent * self.value
        )

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

# %% wrong="checkpoint" because="the second run draws other random numbers" base="second-run"
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

# %% wrong="checkpoint" because="leaves the generator where the second run began" of="second-run"
- ctx.fn = fn
+ ctx.fn, ctx.state = fn, torch.get_rng_state()

  inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
+ torch.set_rng_state(ctx.state)

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

# %% wrong="key_questions" because="counts a forward difference"
- "evaluations": 2 * 1_000_000,
+ "evaluations": 1_000_001,

# %% wrong="key_questions" because="always forward mode"
- "mode": "reverse",
- "runs": 200,
+ "mode": "forward",
+ "runs": 300,

# %% wrong="key_questions" because="forgets the segment itself"
- "kept": 96 // 32 + 32,
+ "kept": 96 // 32,

# %% wrong="key_questions" because="what is kept at best, not the segment"
- "best_segment": 8,
+ "best_segment": 16,

# %% right="key_questions" because="written another way"
def key_questions():
    mode, runs = min(("forward", 300), ("reverse", 200), key=lambda pair: pair[1])
    least = min(range(1, 65), key=lambda s: 64 / s + s)
    return dict(evaluations=int(2e6), mode=mode, runs=runs, kept=35, best_segment=least)

# %% wrong="numerical_gradient" because="a float64 x is nudged in place: double() of it is no copy, and += and −= round"
def numerical_gradient(f, x, eps=1e-5):
    x = x.detach().double().contiguous()
    flat = x.view(-1)
    gradient = torch.zeros(x.shape, dtype=torch.float64)
    for i in range(flat.numel()):
        flat[i] += eps
        above = f(x)
        flat[i] -= 2 * eps
        below = f(x)
        flat[i] += eps
        gradient.view(-1)[i] = (above - below) / (2 * eps)
    return gradient

# %% wrong="unbroadcast" because="a (1,) result where () is asked for"
- return grad.sum(axis=stretched, keepdims=True)
+ return np.atleast_1d(grad.sum(axis=stretched, keepdims=True))

# %% wrong="fit" because="the seed is not used: another network every time"
- rng = np.random.default_rng(seed)
+ rng = np.random.default_rng()

# %% wrong="fit" because="one seed for all: always the same network"
- rng = np.random.default_rng(seed)
+ rng = np.random.default_rng(0)

# %% wrong="fit" because="the global generator, seeded"
- rng = np.random.default_rng(seed)
+ np.random.seed(seed)
+ rng = np.random

# %% wrong="softmax_function" because="backward asks autograd"
- ctx.save_for_backward(y)
+ ctx.save_for_backward(x)

- (y,) = ctx.saved_tensors
- return y * (grad - (grad * y).sum(dim=-1, keepdim=True))
+ (x,) = ctx.saved_tensors
+ with torch.enable_grad():
+     x = x.detach().requires_grad_()
+     e = torch.exp(x - x.amax(dim=-1, keepdim=True).detach())
+     return torch.autograd.grad(e / e.sum(dim=-1, keepdim=True), x, grad)[0]

# %% wrong="softmax_function" because="backward works in place on what arrives"
- return y * (grad - (grad * y).sum(dim=-1, keepdim=True))
+ return grad.sub_((grad * y).sum(dim=-1, keepdim=True)).mul_(y)

# %% wrong="softmax_function" because="x minus its logsumexp is rounded at the size of x"
- exponentials = torch.exp(x - x.amax(dim=-1, keepdim=True))
- y = exponentials / exponentials.sum(dim=-1, keepdim=True)
+ y = torch.exp(x - torch.logsumexp(x, dim=-1, keepdim=True))

# %% right="softmax_function" because="keeps x, computes the probabilities again, and takes the sum as a row times a column"
class SoftmaxFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return SoftmaxFunction.probabilities(x)

    @staticmethod
    def probabilities(x: torch.Tensor) -> torch.Tensor:
        e = torch.exp(x - x.max(dim=-1, keepdim=True).values)
        return e / e.sum(dim=-1, keepdim=True)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        y = SoftmaxFunction.probabilities(x)
        dot = (y.unsqueeze(-2) @ grad.unsqueeze(-1)).squeeze(-1)
        return torch.addcmul(y * grad, y, dot, value=-1)

# %% wrong="jvp_forward" because="adding a constant of a larger shape leaves the tangent as it was"
- other = Dual.lift(other)
- return Dual(self.value + other.value, self.tangent + other.tangent)
+ if not isinstance(other, Dual):
+     return Dual(self.value + other, self.tangent)
+ return Dual(self.value + other.value, self.tangent + other.tangent)

# %% wrong="unbroadcast" because="sums an axis of size 1 only where it grew: one that became empty stays so"
- stretched = tuple(i for i, size in enumerate(shape) if size == 1)
+ stretched = tuple(i for i, size in enumerate(shape) if size == 1 and grad.shape[i] > 1)

# %% wrong="topological_order" because="longest ways by relaxation: exponential where edges skip"
def topological_order(root):
    depth, nodes, stack = {id(root): 0}, {id(root): root}, [root]
    while stack:
        node = stack.pop()
        below = depth[id(node)] + 1
        for parent in node.parents:
            if depth.get(id(parent), -1) < below:
                depth[id(parent)], nodes[id(parent)] = below, parent
                stack.append(parent)
    return sorted(nodes.values(), key=lambda node: -depth[id(node)])

# %% wrong="topological_order" because="reads the parents again at every visit, once for each of them"
def topological_order(root) -> list:
    order, seen, stack = [], {id(root)}, [root]
    while stack:
        node = stack[-1]
        todo = [parent for parent in node.parents if id(parent) not in seen]
        if todo:
            seen.add(id(todo[0]))
            stack.append(todo[0])
        else:
            order.append(node)
            stack.pop()
    return order

# %% wrong="tensor" because="the axes of a tuple are put back one by one, as they come"
- g = np.expand_dims(g, axis)
+ for one in axis if isinstance(axis, tuple) else (axis,):
+     g = np.expand_dims(g, one)

# %% wrong="fit" because="no ReLU: two layers that are one linear map"
- return (Tensor.lift(x) @ w1 + b1).relu() @ w2 + b2
+ return (Tensor.lift(x) @ w1 + b1) @ w2 + b2

# %% wrong="fit" because="pictures are standardized by the statistics of the call"
def fit(images: np.ndarray, labels: np.ndarray, seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden = 32
    w1 = Tensor(rng.normal(0, (2 / 64) ** 0.5, (64, hidden)))
    b1 = Tensor(np.zeros(hidden))
    w2 = Tensor(rng.normal(0, (2 / hidden) ** 0.5, (hidden, 10)))
    b2 = Tensor(np.zeros(10))
    parameters = [w1, b1, w2, b2]

    def logits(batch):
        batch = (batch - batch.mean(axis=0)) / (batch.std(axis=0) + 0.1)
        return (Tensor(batch) @ w1 + b1).relu() @ w2 + b2

    for _ in range(20):
        order = rng.permutation(len(images))
        for start in range(0, len(images), 64):
            rows = order[start : start + 64]
            cross_entropy(logits(images[rows]), labels[rows]).backward()
            for p in parameters:
                p.data = p.data - 0.1 * p.grad

    def predict(unseen):
        return logits(unseen).data.argmax(axis=1)

    return predict

# %% wrong="jvp_forward" because="the axis 0 counts as none given"
- return Dual(self.value.sum(dim), self.tangent.sum(dim))
+ dim = dim or None
+ return Dual(self.value.sum(dim), self.tangent.sum(dim))

# %% wrong="jvp_forward" because="tanh from exponentials: inf / inf for large values"
- result = self.value.tanh()
+ up, down = self.value.exp(), (-self.value).exp()
+ result = (up - down) / (up + down)

# %% wrong="checkpoint" because="asks every input for a gradient, indices and masks too"
- inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
+ inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]

# %% wrong="checkpoint" because="finds the parameters only where fn is a module itself"
def checkpoint(fn, *inputs):
    parameters = tuple(fn.parameters()) if isinstance(fn, torch.nn.Module) else ()
    count = len(inputs)

    class Segment(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.state = torch.get_rng_state()
            ctx.save_for_backward(*tensors[:count])
            return fn(*tensors[:count])

        @staticmethod
        def backward(ctx, grad):
            leaves = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
            now = torch.get_rng_state()
            torch.set_rng_state(ctx.state)
            with torch.enable_grad():
                output = fn(*leaves)
            torch.set_rng_state(now)
            wanted = [t for t in (*leaves, *parameters) if t.requires_grad]
            found = iter(torch.autograd.grad(output, wanted, grad))
            return tuple(next(found) if t.requires_grad else None for t in (*leaves, *parameters))

    return Segment.apply(*inputs, *parameters)

# %% wrong="checkpoint" because="PyTorch's own, imported at the top of the cell"
from torch.utils.checkpoint import checkpoint as library


def checkpoint(fn, *inputs):
    return library(fn, *inputs, use_reentrant=False)
