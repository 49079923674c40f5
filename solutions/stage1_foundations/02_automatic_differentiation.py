# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   llm40:
#     builds: >-
#       A reverse-mode engine of about eighty lines that trains a network on handwritten digits,
#       then the three tools that PyTorch adds: a hand-written backward, forward mode, and
#       checkpointing.
#     gpu: "Nothing more: every cell takes seconds on a CPU."
# ---

# %% [markdown]
# ## Core ideas
#
# Training asks one question over and over: if I change this parameter a little, how does the loss
# change? A language model has billions of parameters and one loss, so the answer is a vector of
# billions of partial derivatives, the **gradient**, and it is needed at every step.
#
# Two ways of getting it come to mind first, and both fail. **Trying it out** — nudge one parameter,
# evaluate the model again — takes one evaluation per parameter. **Writing the formula down**, by
# hand or with a computer algebra system, gives an expression that repeats the same sub-expressions
# so often that it grows faster than the model.
#
# **Automatic differentiation** is the third way. A program, however long, is a sequence of small
# steps: a sum, a product, an exponential. Each step's derivative is one line of school calculus.
# Write down which step used which result — the **computation graph** — and the chain rule puts the
# small derivatives together, exactly, at a cost of a few evaluations of the program, *whatever the
# number of parameters*. Nothing else made deep learning as practical as that.
#
# You will first build the slow way, because it is what everything else is tested against. Then the
# graph, an engine that walks it backwards, and a network trained with nothing but your own engine.
# Then you go to PyTorch, whose engine is the same idea, and write the three things that it lets you
# take into your own hands.

# %%
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from llm40 import checks, data, plot

# %% [markdown]
# ## The slow way, which everything is tested against
#
# The derivative is a limit of difference quotients. A computer cannot take the limit, but it can
# take a small $\varepsilon$. Taylor's formula says how wrong that is, here in one dimension:
#
# $$f(x \pm \varepsilon) = f(x) \pm \varepsilon f'(x) + \tfrac{\varepsilon^2}{2} f''(x) \pm \tfrac{\varepsilon^3}{6} f'''(x) + \dots$$
#
# The **forward difference** $\bigl(f(x+\varepsilon) - f(x)\bigr)/\varepsilon$ is wrong by
# $\tfrac{\varepsilon}{2} f''$. Subtract the two expansions instead, and all even terms cancel: the
# **central difference**
#
# $$\frac{f(x+\varepsilon) - f(x-\varepsilon)}{2\varepsilon} = f'(x) + \tfrac{\varepsilon^2}{6} f'''(x) + \dots$$
#
# is wrong only by the square of $\varepsilon$. Then why not take $\varepsilon = 10^{-15}$? Because
# $f(x\pm\varepsilon)$ are rounded, each to a relative $u \approx 10^{-16}$ in float64, and the
# difference of two nearly equal numbers keeps the rounding and loses the rest: an error of about
# $u\,|f|/\varepsilon$, which *grows* as $\varepsilon$ shrinks. The best $\varepsilon$ balances the
# two: $\varepsilon^2 \approx u/\varepsilon$, about $10^{-5}$, for ten digits. In float32, where
# $u \approx 10^{-7}$, the best is about $10^{-2}$ and the result is good to four digits or so:
# gradients are always checked in float64.


# %% exercise="numerical_gradient" minutes=12 difficulty=1
def numerical_gradient(f, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """The gradient of f at x by central differences, one element of x after another.

    f: takes a float64 tensor of x's shape, returns a scalar tensor. x: any shape, () included, with
    at least one element, any floating format. Returns a float64 tensor of x's shape.

    - Everything is computed in float64, also when x is float32: f is given float64 tensors.
    - f is called exactly twice for every element of x. x is not changed, not even meanwhile.
    """
    ### BEGIN SOLUTION
    x = x.detach().double()
    gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
    step = torch.zeros(x.numel(), dtype=torch.float64)
    for i in range(x.numel()):
        step[i] = eps
        nudge = step.view(x.shape)
        gradient.view(-1)[i] = (f(x + nudge) - f(x - nudge)) / (2 * eps)
        step[i] = 0.0
    return gradient
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: elements of a tensor of any shape</summary>
#
# A tensor of $n$ zeros with one element set to `eps`, seen through `.view(x.shape)`, is the nudge
# for that element. Adding it makes a new tensor, so that x stays as it was.
# </details>

# %% check="numerical_gradient" points=2
x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
checks.close(
    numerical_gradient(lambda t: (t**3).sum(), x, eps=0.1),
    3 * x**2 + 0.01,
    rtol=1e-9,
    what="the central difference of the sum of x³ with eps = 0.1",
    hint="For x³ it is 3x² + eps² exactly: the error of second order is part of it.",
    mistakes={
        "a forward difference": 3 * x**2 + 0.3 * x + 0.01,
        "a backward difference": 3 * x**2 - 0.3 * x + 0.01,
        "dividing by eps, not by 2 eps,": 2 * (3 * x**2 + 0.01),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(1)
weights = torch.randn(4, 3, generator=g, dtype=torch.float64)
for point, f in [
    (torch.randn(4, 3, generator=g, dtype=torch.float64), lambda t: (weights * t.sin()).sum()),
    (torch.randn(4, 3, generator=g).half(), lambda t: (weights * t.exp()).sum()),
    (torch.randn(4, 3, generator=g), lambda t: (weights * t.sin()).sum()),
    (torch.randn(3, 4, generator=g).T, lambda t: (weights * t).exp().sum().log()),
    (torch.randn((), generator=g), lambda t: t.exp() * t),
    (torch.randn(1, 1, 5, generator=g), lambda t: (t[0, 0, 1:] * t[0, 0, :-1]).sum()),
]:
    exact = point.double().clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(exact), exact)
    before, changed = point.clone(), []

    def watched(t, f=f, point=point, before=before, changed=changed):
        changed.append(not torch.equal(point, before))
        return f(t)

    with checks.unchanged(x=point):
        result = numerical_gradient(watched, point)
    assert not any(changed), "x was changed while f was called: nudge a copy."
    checks.close(
        result,
        expected,
        rtol=1e-7,
        dtype=torch.float64,
        what="the numerical gradient",
        hint="Is f evaluated in float64?",
    )
### END HIDDEN TESTS

# %% check="numerical_gradient" points=1
seen = []
numerical_gradient(lambda t: (seen.append(t.dtype), t.sum())[1], torch.ones(2, 3))
checks.close(
    len(seen), 12, what="the number of evaluations for 6 elements", hint="Two for each element."
)
assert set(seen) == {torch.float64}, (
    f"f was called with {set(seen)}; it should be given float64 tensors only."
)
### BEGIN HIDDEN TESTS
for shape in [(), (1,), (5, 1, 3)]:
    seen = []
    numerical_gradient(
        lambda t, seen=seen: (seen.append(t.shape), (t * t).sum())[1], torch.ones(shape)
    )
    checks.close(
        len(seen),
        2 * torch.ones(shape).numel(),
        what=f"the number of evaluations for the shape {shape}",
    )
    assert set(seen) == {torch.Size(shape)}, f"f was called with shapes {set(seen)}, not {shape}."
### END HIDDEN TESTS


# %% tags=["experiment"]
def smooth(t):
    return (t.sin().exp() * t).sum()


at = torch.linspace(0.3, 2.0, 8, dtype=torch.float64)
leaf = at.clone().requires_grad_()
(exact,) = torch.autograd.grad(smooth(leaf), leaf)
epsilons = np.geomspace(1e-13, 1, 53)


def worst(difference) -> list[float]:
    return [max(float((difference(eps) - exact).abs().max()), 1e-16) for eps in epsilons]


def forward_difference(eps):
    steps = torch.eye(len(at), dtype=torch.float64) * eps
    return torch.stack([(smooth(at + step) - smooth(at)) / eps for step in steps])


# %% tags=["experiment", "figure"]
# Figure: too large a step truncates, too small a step rounds
fig, ax = plt.subplots(figsize=(6.6, 3.8))
ax.loglog(
    epsilons,
    worst(lambda eps: numerical_gradient(smooth, at, eps)),
    label="central difference (yours)",
)
ax.loglog(epsilons, worst(forward_difference), label="forward difference")
ax.loglog(
    epsilons,
    worst(lambda eps: numerical_gradient(lambda t: smooth(t.float()).double(), at, eps)),
    label="central difference, f in float32",
)
ax.set(
    xlabel="step ε",
    ylabel="largest error of the gradient",
    ylim=(1e-13, 1e3),
    title="Too large a step truncates, too small a step rounds",
)
ax.annotate("rounding: u/ε", (1e-11, 1e-4), fontsize=9, rotation=-33)
ax.annotate("truncation: ε²", (6e-4, 3e-8), fontsize=9, rotation=52)
ax.legend()
plot.caption(
    fig,
    "The error of a numerical gradient against its step. From the right, the central difference "
    "falls twice as fast as the forward difference; further left, rounding takes over. In float32 "
    "no step gives more than about four digits; below 10⁻⁹ x + ε rounds to x, the estimate is 0, "
    "and the error is the gradient itself.",
)
plt.show()

# %% [markdown]
# ## The chain rule, from which end?
#
# A program that maps $n$ numbers to $m$ numbers in $k$ steps is a composition
# $f = f_k \circ \dots \circ f_1$. Each step has a **Jacobian** $J_i$, the matrix of its partial
# derivatives, of shape (outputs, inputs), and the chain rule says that they are multiplied:
#
# $$J = J_k\, J_{k-1} \cdots J_2\, J_1 .$$
#
# A matrix product may be bracketed from either end. Start at the right with one direction $v$ in
# the space of inputs, shape $(n,)$: $J v = J_k(\cdots(J_2(J_1 v)))$ is always a matrix times a
# vector. This **Jacobian–vector product** (JVP) says how all outputs move when the inputs move
# along $v$; it can be computed along with the program, and is called **forward mode**. To have all
# of $J$, it is run once for each of the $n$ inputs.
#
# Start at the left with one weight per output, $u$ of shape $(m,)$:
# $u^\top J = (((u^\top J_k) J_{k-1}) \cdots) J_1$ is always a vector times a matrix. This
# **vector–Jacobian product** (VJP) says how one weighted sum of the outputs depends on every input.
# It runs through the program backwards — **reverse mode**, or **back-propagation** — and must
# therefore remember what the program computed on its way. All of $J$ takes one run for each of the
# $m$ outputs. A loss has $m = 1$: one run, and the gradient in all $n$ parameters is there.
#
# No Jacobian is ever formed. The step "exponential of a million numbers" has a Jacobian of
# $10^{12}$ entries, all but a million of them zero; its VJP is one elementwise product of two
# vectors. **An engine needs, for each kind of step, only a function that multiplies a vector by
# that step's Jacobian from the left.**
#
# ### When shapes were stretched
#
# NumPy and PyTorch let arrays of different shapes meet: an axis of size 1, or one that is missing
# on the left, is repeated until it fits. This **broadcasting** is a step of its own: a bias `b` of
# shape `(D,)` added to `x` of shape `(N, D)` is used $N$ times, once in each row. A value that is
# used in several places gets the *sum* of what flows back from each of them (that is what the total
# derivative $\frac{dL}{db} = \sum_i \frac{\partial L}{\partial y_i}\frac{\partial y_i}{\partial b}$
# says). So: wherever an axis was repeated on the way forward, sum over it on the way back.


# %% exercise="unbroadcast" minutes=10 difficulty=1
def unbroadcast(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sum the gradient of a broadcast result back to the shape of one operand.

    grad: an array whose shape is `shape` broadcast with something else. Returns an array of exactly
    `shape` (for the shape (), a number of NumPy's will do). Axes that broadcasting added on the
    left are summed away; axes that had size 1 are summed and stay, with size 1, also where they
    were broadcast to size 0: a sum of nothing is 0.
    """
    ### BEGIN SOLUTION
    grad = grad.sum(axis=tuple(range(grad.ndim - len(shape))))
    stretched = tuple(i for i, size in enumerate(shape) if size == 1)
    return grad.sum(axis=stretched, keepdims=True)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: two kinds of repetition</summary>
#
# First remove the axes that `shape` does not have: as many as the lengths of the two shapes differ,
# always on the left. Then the number of axes agrees, and those where `shape` says 1 are summed with
# `keepdims=True`.
# </details>

# %% check="unbroadcast" points=2
grad = np.arange(6.0).reshape(2, 3)
checks.close(
    unbroadcast(grad, (3,)),
    np.array([3.0, 5.0, 7.0]),
    what="a gradient of shape (2, 3), back to (3,)",
)
checks.close(
    unbroadcast(grad, (2, 1)),
    np.array([[3.0], [12.0]]),
    what="a gradient of shape (2, 3), back to (2, 1)",
    hint="An axis of size 1 is summed, but stays.",
)
### BEGIN HIDDEN TESTS
g = checks.generator(2)
for shape, other in [
    ((3,), (2, 3)),
    ((1,), (4, 5)),
    ((), (2, 3)),
    ((2, 1, 4), (2, 3, 1)),
    ((1, 1), (7, 6, 5)),
    ((4, 3), (4, 3)),
    ((1, 3), (1, 3)),
    ((5, 1), (2, 5, 1)),
    ((1, 4), (1, 1, 4)),
    ((2, 1, 1, 3), (2, 5, 1, 3)),
    ((1, 3), (0, 3)),
    ((3,), (0, 3)),
]:
    a = torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
    out = a * torch.ones(other, dtype=torch.float64)
    cotangent = torch.randn(out.shape, generator=g, dtype=torch.float64)
    (expected,) = torch.autograd.grad(out, a, cotangent)
    before = cotangent.clone()
    result = unbroadcast(cotangent.numpy(), shape)
    checks.close(
        result,
        expected.numpy(),
        what=f"a gradient of shape {tuple(out.shape)}, back to {shape}",
    )
    checks.close(cotangent, before, what="the gradient handed in, afterwards,")
### END HIDDEN TESTS

# %% [markdown]
# ## An order in which to go back
#
# Every result remembers its **parents**, the values it was made from. That is the whole graph.
# Going back, a value hands its gradient on once, when the gradients from *all* the places that used
# it have arrived. An order in which this always holds is a **topological order**: parents before
# children on the way forward, and so children before parents in reverse.
#
# The picture to keep in mind is a diamond: `a` is used by `b` and by `c`, and both are used by `d`.
# From `d`, a walk that follows the first edge it sees to the end reaches `a` before `c` has spoken.
#
# A walk in depth gives the order for free: *write a node down when all its parents have been
# written down*. Two traps. Without remembering which nodes were visited, a chain of $k$ diamonds is
# walked $2^k$ times. And Python allows about a thousand nested calls, while a recurrent network
# over a long text is a chain of many thousand steps: the walk has to keep its own stack.


# %% exercise="topological_order" minutes=20 difficulty=2
def topological_order(root) -> list:
    """All nodes that `root` depends on, itself included, each once: every node after all of its
    parents.

    A node is any object with an attribute `parents`, a tuple of nodes (empty for an input); a node
    may stand in it twice. Nodes are told apart by identity (`id`). Graphs of 30,000 nodes in one
    chain work, and `parents` is read at most four times from each node, however many paths lead to
    it.
    """
    ### BEGIN SOLUTION
    order, seen = [], {id(root)}
    stack = [(root, iter(root.parents))]
    while stack:
        node, remaining = stack[-1]
        parent = next((p for p in remaining if id(p) not in seen), None)
        if parent is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(id(parent))
            stack.append((parent, iter(parent.parents)))
    return order
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: depth first without recursion</summary>
#
# Keep a list as a stack. Each entry is a node and an iterator over its parents. Look at the top: if
# its iterator gives a parent not yet seen, mark it and push it; if it gives none, the node is
# finished: append it to the order and pop it.
# </details>
#
# <details><summary>Hint: another way</summary>
#
# Count for each node how many edges lead into it from below; start at the root and take a node only
# when all its edges have been taken. That gives children before parents: reverse it.
# </details>


# %% check="topological_order" points=1
class Node:
    def __init__(self, *parents):
        self.parents = parents


a = Node()
b, c = Node(a), Node(a, a)
d = Node(b, c)
names = {id(a): "a", id(b): "b", id(c): "c", id(d): "d"}
order = [names[id(node)] for node in topological_order(d)]
assert sorted(order) == ["a", "b", "c", "d"], (
    f"each of the four nodes of the diamond once; yours gives {order}"
)
assert order[0] == "a", (
    f"a has no parents and everything needs it, so it is first; yours is {order}"
)
assert order[-1] == "d", f"d needs everything, so it is last; yours is {order}"
### BEGIN HIDDEN TESTS
import random

rng = random.Random(checks.seed())
for size in (1, 2, 17, 200):
    nodes = [Node()]
    for _ in range(size - 1):
        nodes.append(Node(*rng.choices(nodes[-6:], k=rng.randint(0, 3))))
    root = Node(*rng.sample(nodes, min(3, size)), nodes[0])
    reachable, queue = {id(root)}, [root]
    while queue:
        for parent in queue.pop().parents:
            if id(parent) not in reachable:
                reachable.add(id(parent))
                queue.append(parent)
    order = list(topological_order(root))
    place = {id(node): i for i, node in enumerate(order)}
    assert len(place) == len(order), "a node stands in the order twice."
    assert set(place) == reachable, (
        "the order holds exactly the nodes that the root depends on, and the root."
    )
    for node in order:
        assert all(place[id(parent)] < place[id(node)] for parent in node.parents), (
            "a node stands before one of its parents."
        )
### END HIDDEN TESTS


# %% check="topological_order" points=1
class Node:
    def __init__(self, *parents):
        self.parents = parents


node = Node()
for _ in range(2000):
    node = Node(node)
assert len(topological_order(node)) == 2001, "a chain of 2,001 nodes"


### BEGIN HIDDEN TESTS
class Counted:
    def __init__(self, *parents):
        self._parents, self.reads = parents, 0

    @property
    def parents(self):
        self.reads += 1
        assert self.reads <= 4, (
            "`parents` of one node was read a fifth time, four are allowed: is every path walked?"
        )
        return self._parents


node = Counted()
for _ in range(60):
    node = Counted(Counted(node), Counted(node))
assert len(topological_order(node)) == 181, "a chain of 60 diamonds has 181 nodes."
node = Counted(*(Counted() for _ in range(8)))
assert len(topological_order(node)) == 9, "a node of eight parents, and they."
for near_first in (True, False):  # each node uses the two before it: ways of different lengths
    before, node = Counted(), Counted()
    for _ in range(60):
        pair = (node, before) if near_first else (before, node)
        before, node = node, Counted(*pair)
    assert len(topological_order(node)) == 62, "a chain of 62 nodes that skips has 62 nodes."
node = Node()
for _ in range(30_000):
    node = Node(node)
assert len(topological_order(node)) == 30_001, "a chain of 30,001 nodes"


class Alike(Node):  # equal to everything, as arrays may be: only `id` tells two of them apart
    __hash__ = None

    def __eq__(self, other):
        return True


node = Alike(Alike(), Alike(Alike()))
found = [id(n) for n in topological_order(node)]
assert len(found) == len(set(found)) == 4, (
    f"four nodes that compare equal are in the graph; yours gives {len(found)}: tell nodes apart "
    "by `id`, not by == or a set of the nodes."
)
### END HIDDEN TESTS

# %% [markdown]
# ### Going back
#
# A value holds an array, the parents it was made from, and `vjp`: a function that takes the
# gradient of the value and returns the gradients of its parents, in their order. With these three,
# going back needs to know nothing of any operation: `backward` starts with $\partial L/\partial L =
# 1$ and goes through the order in reverse. What arrives at a parent is **added** to what is there,
# since a value used twice gets both shares.


# %%
class Value:
    """An array that knows how it was made. Arrays are float64.

    data: the array. parents: the Values it was made from. vjp: (gradient of this) → a gradient for
    each parent, of the parent's shape; it does not change what it is given. grad: None until
    `backward` of a result is called, then an array of the shape of `data` (for the shape (), a
    number of NumPy's will do).
    """

    def __init__(self, data, parents: tuple = (), vjp=None):
        self.data = np.asarray(data, dtype=np.float64)
        self.parents = parents
        self.vjp = vjp
        self.grad = None

    @property
    def shape(self):
        return self.data.shape


# %% exercise="backward" minutes=20 difficulty=2
def backward(root: Value) -> None:
    """Sets `.grad` of every Value that `root`, a scalar, was made from, and its own (1), to its
    derivative.

    Called twice it gives the same, not the double: it forgets what an earlier call left. (PyTorch
    adds to what is there until `zero_grad()`.) Each `vjp` is called once, and what it returns is
    not changed: it may give the same array to two parents. Raises ValueError if `root` is not a
    scalar, of shape ().
    """
    ### BEGIN SOLUTION
    if root.shape != ():
        raise ValueError(
            f"backward starts at a scalar, this Value has shape {root.shape}: sum it first"
        )
    order = topological_order(root)
    for node in order:
        node.grad = np.zeros_like(node.data)
    root.grad = np.ones_like(root.data)
    for node in reversed(order):
        if node.parents:
            for parent, grad in zip(node.parents, node.vjp(node.grad), strict=True):
                # A new array, not +=: the same array of gradients may have gone to two parents.
                parent.grad = parent.grad + grad
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: right on small graphs, wrong when a value is used twice</summary>
#
# Is `parent.grad = grad` an assignment where a sum is needed? Or does `+=` change an array that is
# also another Value's gradient?
# </details>

# %% check="backward" points=2
x, w = Value(3.0), Value([1.0, 2.0])
square = Value(9.0, (x, x), lambda g: (3.0 * g, 3.0 * g))  # x · x: one share for each place
scaled = Value([9.0, 18.0], (square, w), lambda g: ((g * [1.0, 2.0]).sum(), 9.0 * g))
total = Value(27.0, (scaled,), lambda g: (np.array([g, g]),))
backward(total)
checks.close(total.grad, 1.0, what="the gradient of the root in itself")
checks.close(scaled.grad, np.array([1.0, 1.0]), what="the gradient of x² w")
checks.close(w.grad, np.array([9.0, 9.0]), what="the gradient of w")
checks.close(square.grad, 3.0, what="the gradient of x²")
checks.close(
    x.grad,
    18.0,
    what="the gradient of x",
    hint="x is used twice in x · x: 9 + 9.",
    mistakes={"keeping only the last share that arrived": 9.0},
)
### BEGIN HIDDEN TESTS
# Random graphs, their shares counted path by path: from the root on, each value hands on its whole
# gradient times the edge's factor.
import random

rng = random.Random(checks.seed())
for size in (2, 5, 12):
    values, edges, called = [Value(np.zeros(2))], [[]], []
    for n in range(1, size):
        used = [(rng.randrange(n), rng.choice([-2.0, 0.5, 3.0])) for _ in range(rng.randint(1, 3))]

        def vjp(g, used=used, n=n, called=called):
            called.append(n)
            shared = {factor: g * factor for _, factor in used}  # one array for equal factors
            return tuple(shared[factor] for _, factor in used)

        values.append(Value(np.zeros(2), tuple(values[i] for i, _ in used), vjp))
        edges.append(used)
    root = Value(0.0, (values[-1],), lambda g: (g * np.array([1.0, -0.5]),))
    for turn in ("", " after a second call"):
        called.clear()
        backward(root)
        factors = [0.0] * size
        factors[-1] = 1.0
        for n in reversed(range(size)):
            for i, factor in edges[n]:
                factors[i] += factor * factors[n]
        needed = {n for n in range(size) if values[n] in topological_order(root)}
        for n in needed:
            checks.close(
                values[n].grad,
                factors[n] * np.array([1.0, -0.5]),
                atol=1e-9,
                what=f"the gradient of value {n} of {size}{turn}",
            )
        assert sorted(called) == sorted(n for n in needed if n), (
            f"each vjp is called once{turn}; those of {len(set(called))} values were called "
            f"{len(called)} times."
        )
### END HIDDEN TESTS

# %% check="backward" points=2
x = Value(2.0)
y = Value(4.0, (x,), lambda g: (4.0 * g,))
backward(y)
backward(y)
checks.close(
    x.grad,
    4.0,
    what="the derivative of x² after calling backward twice",
    mistakes={"adding to what the first call left": 8.0},
)
checks.raises(
    ValueError,
    backward,
    Value([1.0, 2.0]),
    because="backward of two numbers has no single meaning.",
)
### BEGIN HIDDEN TESTS
checks.raises(ValueError, backward, Value([[1.0]]), because="A (1, 1) array is not a scalar.")
# What an earlier call left, on another way through the same values; values that are not asked.
x, aside = Value(3.0), Value(1.0)
aside.grad = np.array(5.0)
first = Value(9.0, (x, x), lambda g: (3.0 * g, 3.0 * g))
backward(first)
second = Value(27.0, (first, x), lambda g: (3.0 * g, 9.0 * g))
backward(second)
checks.close(x.grad, 27.0, what="the derivative of x³ after one of x² was taken")
checks.close(first.grad, 3.0, what="the gradient of an intermediate value")
checks.close(aside.grad, 5.0, what="the .grad of a value that the root does not depend on")
# An array that two parents get, and that the vjp keeps: it stays as it is.
shared = np.array([1.0, 2.0])
a, b = Value([0.0, 0.0]), Value([0.0, 0.0])
s = Value([0.0, 0.0], (a, b), lambda g: (shared, shared))
root = Value(0.0, (s, a), lambda g: (np.ones(2) * g, np.array([10.0, 10.0]) * g))
backward(root)
checks.close(a.grad, np.array([11.0, 12.0]), what="the gradient of a value used in two places")
checks.close(
    b.grad,
    np.array([1.0, 2.0]),
    what="the gradient of a value that shares an array with it",
    hint="Do a and b share one array of gradients that is changed in place?",
)
checks.close(shared, np.array([1.0, 2.0]), what="the array that a vjp returned, afterwards,")
y = x = Value(0.5)
for _ in range(3_000):
    y = Value(0.0, (y,), lambda g: (g * 0.9999,))
backward(y)
checks.close(x.grad, 0.9999**3_000, rtol=1e-8, what="the derivative through a chain of 3,000 steps")
### END HIDDEN TESTS

# %% [markdown]
# ## The engine
#
# What is left are the operations. A `Tensor` is a `Value` whose operators make new Tensors, and
# write down `parents` and `vjp` with each. Every operation below is two lines: the forward result,
# and its `vjp`. With $g$ for the gradient that arrives (always of the result's shape):
#
# | operation | result | to the parents |
# |---|---|---|
# | sum | $a + b$ | $g$ and $g$ |
# | product, elementwise | $a \odot b$ | $g \odot b$ and $g \odot a$ |
# | matrix product | $A B$ | $g B^\top$ and $A^\top g$ |
# | ReLU | $\max(a, 0)$ | $g$ where $a > 0$, else 0 |
# | exponential | $e^a$ | $g \odot e^a$ |
# | logarithm | $\ln a$ | $g / a$ |
# | sum over axes | $\sum_i a_i$ | $g$, repeated along those axes |
#
# The matrix product is the one to derive once. $C_{ij} = \sum_k A_{ik} B_{kj}$, so $A_{ik}$ enters
# every $C_{ij}$ of its row with the factor $B_{kj}$:
# $\partial L/\partial A_{ik} = \sum_j g_{ij} B_{kj}$, which is row $i$ of $g$ times row $k$ of $B$,
# that is $g B^\top$. Shapes tell the rest: `(N, M) @ (M, K)` is the only product of $g$ and $B$
# that has the shape of $A$, `(N, K)`.


# %% exercise="tensor" minutes=30 difficulty=2
class Tensor(Value):
    """A Value with operations. `a + b`, `a * b`, `a @ b`, `a.relu()`, … make new Tensors; numbers
    and arrays may stand in for Tensors.
    """

    @staticmethod
    def lift(value) -> "Tensor":
        """Numbers and arrays as Tensors; Tensors as they are."""
        return value if isinstance(value, Tensor) else Tensor(value)

    def __add__(self, other) -> "Tensor":
        """Elementwise, with broadcasting."""
        other = Tensor.lift(other)
        ### BEGIN SOLUTION
        return Tensor(
            self.data + other.data,
            (self, other),
            lambda g: (unbroadcast(g, self.shape), unbroadcast(g, other.shape)),
        )
        ### END SOLUTION

    def __mul__(self, other) -> "Tensor":
        """Elementwise, with broadcasting."""
        other = Tensor.lift(other)
        ### BEGIN SOLUTION
        return Tensor(
            self.data * other.data,
            (self, other),
            lambda g: (
                unbroadcast(g * other.data, self.shape),
                unbroadcast(g * self.data, other.shape),
            ),
        )
        ### END SOLUTION

    def __matmul__(self, other) -> "Tensor":
        """(…, N, K) @ (…, K, M) → (…, N, M); both have two axes or more, leading axes broadcast."""
        other = Tensor.lift(other)
        ### BEGIN SOLUTION
        return Tensor(
            self.data @ other.data,
            (self, other),
            lambda g: (
                unbroadcast(g @ other.data.swapaxes(-1, -2), self.shape),
                unbroadcast(self.data.swapaxes(-1, -2) @ g, other.shape),
            ),
        )
        ### END SOLUTION

    def relu(self) -> "Tensor":
        """max(x, 0); its derivative at 0 is taken to be 0, as in PyTorch."""
        ### BEGIN SOLUTION
        return Tensor(np.maximum(self.data, 0), (self,), lambda g: (g * (self.data > 0),))
        ### END SOLUTION

    def exp(self) -> "Tensor":
        ### BEGIN SOLUTION
        result = np.exp(self.data)
        return Tensor(result, (self,), lambda g: (g * result,))
        ### END SOLUTION

    def log(self) -> "Tensor":
        ### BEGIN SOLUTION
        return Tensor(np.log(self.data), (self,), lambda g: (g / self.data,))
        ### END SOLUTION

    def sum(self, axis=None, keepdims: bool = False) -> "Tensor":
        """Over all axes (None), one axis (an int, negative ones count from the right) or several (a
        tuple).
        """

        ### BEGIN SOLUTION
        def vjp(g):
            if axis is not None and not keepdims:
                g = np.expand_dims(g, axis)
            return (np.broadcast_to(g, self.shape),)

        return Tensor(self.data.sum(axis=axis, keepdims=keepdims), (self,), vjp)
        ### END SOLUTION

    def backward(self) -> None:
        """Sets `.grad` of this Tensor, a scalar, and of all it was made from."""
        backward(self)

    # The rest follows from these.
    __array_priority__ = 1  # array * Tensor comes here, not to NumPy

    def __radd__(self, other):
        return self + other

    def __rmul__(self, other):
        return self * other

    def __neg__(self):
        return self * -1.0

    def __sub__(self, other):
        return self + -Tensor.lift(other)

    def __rsub__(self, other):
        return Tensor.lift(other) + -self

    def __repr__(self):
        return f"Tensor({self.data})"


# %% [markdown]
# <details><summary>Hint: what an operation looks like</summary>
#
# `return Tensor(result, (self, other), lambda g: (gradient of self, gradient of other))`. A single
# parent's tuple is `(value,)`, with a comma.
# </details>
#
# <details><summary>Hint: the gradients have the wrong shape after + and *</summary>
#
# Each parent's gradient goes through `unbroadcast(…, parent.shape)`.
# </details>
#
# <details><summary>Hint: sum over some axes</summary>
#
# The gradient that arrives has lost the summed axes (unless `keepdims`). `np.expand_dims(g, axis)`
# puts them back with size 1, and `np.broadcast_to(g, self.shape)` repeats.
# </details>

# %% tags=["support"]
# Support: gradients along every path of a graph, from each value's vjp; NumPy's own generator


@checks.measured
def global_generator() -> bytes:
    """The state of NumPy's generator that everybody shares."""
    return np.random.get_state()[1].tobytes()


def gradients_along_paths(root, inputs, gradient) -> list[np.ndarray]:
    """The gradients of `inputs` when `gradient` arrives at `root`: a walk over all paths."""
    totals = [np.zeros(t.shape) for t in inputs]

    def walk(node, arrived):
        assert np.shape(arrived) == node.shape, (
            f"a gradient of shape {np.shape(arrived)} was handed to a Tensor of shape {node.shape}."
        )
        for i, t in enumerate(inputs):
            if t is node:
                totals[i] = totals[i] + arrived
        if node.parents:
            for parent, share in zip(node.parents, node.vjp(arrived), strict=True):
                walk(parent, share)

    walk(root, gradient)
    return totals


def compare_with_torch(f, shapes, generator, what, positive=False) -> None:
    """An operation on Tensors against the same on PyTorch's: the value, and every gradient."""
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    values = [v.abs() + 0.1 for v in values] if positive else values
    mine = [Tensor(v.numpy().copy()) for v in values]
    theirs = [v.clone().requires_grad_() for v in values]
    result, expected = f(*mine), f(*theirs)
    checks.close(result.data, expected.detach().numpy(), what=f"the value of {what}")
    arrived = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    before = arrived.clone()
    grads = gradients_along_paths(result, mine, arrived.numpy())
    wanted = torch.autograd.grad(expected, theirs, before)
    for i, (grad, target) in enumerate(zip(grads, wanted, strict=True)):
        checks.close(grad, target.numpy(), what=f"the gradient of {what} in input {i}")
        checks.close(mine[i].data, values[i].numpy(), what=f"input {i} of {what}, afterwards,")
    checks.close(arrived, before, what=f"the gradient handed to {what}, afterwards,")


# %% check="tensor" points=3
a, b = Tensor([2.0, -1.0, 3.0]), Tensor(4.0)
product = a * b
checks.close(product.data, np.array([8.0, -4.0, 12.0]), what="(2, −1, 3) · 4")
to_a, to_b = product.vjp(np.array([1.0, 10.0, 100.0]))
checks.close(
    to_a,
    np.array([4.0, 40.0, 400.0]),
    what="what the product hands to (2, −1, 3) from (1, 10, 100)",
)
checks.close(
    to_b,
    292.0,
    what="what the product hands to 4 from (1, 10, 100)",
    hint="4 is used in three places: 2 − 10 + 300.",
)
### BEGIN HIDDEN TESTS
g = checks.generator(3)
for what, f, *shapes in [
    ("a + b", lambda a, b: a + b, (3, 4), (3, 4)),
    ("a + b, b broadcast,", lambda a, b: a + b, (3, 4), (4,)),
    ("a + b, a broadcast,", lambda a, b: a + b, (1, 4), (2, 3, 4)),
    ("a * b", lambda a, b: a * b, (3, 4), (3, 4)),
    ("a * b, b broadcast,", lambda a, b: a * b, (5, 2), (2,)),
    ("a * b, a broadcast,", lambda a, b: a * b, (4,), (3, 4)),
    ("a * b, both broadcast,", lambda a, b: a * b, (3, 1, 2), (1, 4, 1)),
    ("2 a − 3 b", lambda a, b: 2.0 * a - 3.0 * b, (5,), (1,)),
    ("1 − a", lambda a: 1.0 - a, (2, 3)),
    ("a · a", lambda a: a * a, (2, 3)),
    ("relu", lambda a: a.relu(), (4, 5)),
    ("exp", lambda a: a.exp(), (2, 3)),
    ("a * b, stretched to nothing,", lambda a, b: a * b, (1, 3), (0, 3)),
]:
    compare_with_torch(f, shapes, g, what)
compare_with_torch(lambda a: a.log(), [(6,)], g, "log", positive=True)
zero = Tensor([0.0, -0.0, 1.0])
(share,) = zero.relu().vjp(np.ones(3))
checks.close(share, np.array([0.0, 0.0, 1.0]), what="the gradient of relu at 0, −0, 1")
for what, f in (
    ("an array of a larger shape plus a", lambda a: np.ones((2, 3)) + a),
    ("a times an array of a larger shape", lambda a: a * np.ones((2, 3))),
):
    a = Tensor([1.0, 2.0, 3.0])
    result = f(a)
    checks.close(result.data.shape, (2, 3), what=f"the shape of {what}")
    (grad,) = gradients_along_paths(result, [a], np.ones((2, 3)))
    checks.close(grad, np.array([2.0, 2.0, 2.0]), what=f"the gradient of {what}")
### END HIDDEN TESTS

# %% check="tensor" points=2
a, b = Tensor(np.arange(6.0).reshape(2, 3)), Tensor(np.ones((3, 1)))
to_a, to_b = (a @ b).vjp(np.array([[1.0], [10.0]]))
checks.close(
    to_a,
    np.array([[1.0, 1.0, 1.0], [10.0, 10.0, 10.0]]),
    what="what a @ b hands to a",
)
checks.close(to_b, np.array([[30.0], [41.0], [52.0]]), what="what a @ b hands to b")
### BEGIN HIDDEN TESTS
g = checks.generator(4)
for left, right in [
    ((3, 5), (5, 2)),
    ((4, 3, 5), (4, 5, 1)),
    ((4, 3, 5), (5, 2)),
    ((3, 5), (4, 5, 2)),
    ((2, 1, 3, 5), (6, 5, 2)),
]:
    compare_with_torch(lambda a, b: a @ b, [left, right], g, f"{left} @ {right}")
for axis, keep in [
    (0, False),
    (1, True),
    (-1, False),
    ((0, 2), False),
    ((0, -1), True),
    ((-2, -1), False),
    ((1, 0), False),
    ((2, -3), False),
    (None, False),
    (None, True),
]:

    def total(a, axis=axis, keep=keep):
        if isinstance(a, Tensor):
            return a.sum(axis, keep)
        return a.sum(dim=tuple(range(3)) if axis is None else axis, keepdim=keep)

    compare_with_torch(total, [(2, 3, 4)], g, f"sum over axis {axis}, keepdims={keep},")
### END HIDDEN TESTS

# %% check="tensor" points=1
x = Tensor(3.0)
square = x * x
y = square + x  # x is used three times
y.backward()
checks.close(square.grad, 1.0, what="the derivative of x² + x in x²")
checks.close(
    x.grad,
    7.0,
    what="the derivative of x² + x at 3",
    mistakes={
        "keeping only the last share that arrived": 1.0,
        "forgetting one factor of x · x": 4.0,
    },
)
### BEGIN HIDDEN TESTS
# Random graphs on the whole engine: every node uses some of those before it.
import random

rng, g = random.Random(checks.seed()), checks.generator(5)
operations = [
    lambda p, q: p + q,
    lambda p, q: p * q * 0.5,
    lambda p, q: p.relu() - q,
    lambda p, q: (p * 0.1).exp() + q * 0.3,
    lambda p, q: (p * p + 1.0).log() * q,
]
for _ in range(10):
    values = torch.randn(3, 2, 3, generator=g, dtype=torch.float64)
    mine, theirs = [Tensor(v.numpy()) for v in values], [v.clone().requires_grad_() for v in values]
    inputs, leaves = list(mine), list(theirs)
    for _ in range(12):
        i, j, kind = rng.randrange(len(mine)), rng.randrange(len(mine)), rng.randrange(5)
        for pool in (mine, theirs):
            pool.append(operations[kind](pool[i], pool[j]))
    result, expected = mine[-1].sum() + mine[-2].sum(), theirs[-1].sum() + theirs[-2].sum()
    result.backward()
    for t, e in zip(inputs, torch.autograd.grad(expected, leaves, allow_unused=True), strict=True):
        checks.close(
            np.zeros((2, 3)) if t.grad is None else np.array(t.grad),
            np.zeros((2, 3)) if e is None else e.numpy(),
            rtol=1e-8,
            what="a gradient in a random graph",
        )
### END HIDDEN TESTS

# %% [markdown]
# Here is your graph for $L = \operatorname{relu}(w \cdot x + b) \cdot w$, drawn from the `parents`
# that your engine wrote down. `w` is used twice: follow its two edges back and add.


# %% tags=["experiment"]
w, x, b = Tensor(3.0), Tensor(-0.5), Tensor(2.0)
product = w * x
affine = product + b
active = affine.relu()
out = active * w
out.backward()


# %% tags=["experiment", "figure"]
# Figure: the graph of L, with each value and its gradient
def draw_graph(root, names: dict[int, str]) -> plt.Figure:
    """The nodes in columns by the longest way from an input; value above, gradient below."""
    order = topological_order(root)
    column, rows = {}, {}
    for node in order:
        column[id(node)] = 1 + max((column[id(p)] for p in node.parents), default=-1)
    for node in order:
        rows.setdefault(column[id(node)], []).append(id(node))
    place = {
        key: (2.6 * x, 1.5 * ((len(keys) - 1) / 2 - i))
        for x, keys in rows.items()
        for i, key in enumerate(keys)
    }
    fig, ax = plt.subplots(figsize=(8.6, 3.9), layout="none")
    boxes = {}
    for node in order:
        x, y = place[id(node)]
        boxes[id(node)] = ax.text(
            x,
            y,
            f"{names[id(node)]}\n{node.data:.4g}\ngrad {node.grad:.4g}",
            ha="center",
            va="center",
            fontsize=10,
            bbox={
                "boxstyle": "round,pad=0.5",
                "facecolor": "#e8f1f8" if not node.parents else "white",
                "edgecolor": "#0072B2",
            },
        )
    fig.canvas.draw()  # only now do the boxes have a size, at which the arrows end
    for node in order:
        for parent in node.parents:
            far = column[id(node)] - column[id(parent)] > 1
            bend = 0.0 if not far else -0.28 if place[id(parent)][1] > 0 else 0.2
            ax.annotate(
                "",
                place[id(node)],
                place[id(parent)],
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": "#777777",
                    "connectionstyle": f"arc3,rad={bend}",
                    "shrinkA": 3,
                    "shrinkB": 3,
                    "patchA": boxes[id(parent)].get_bbox_patch(),
                    "patchB": boxes[id(node)].get_bbox_patch(),
                },
            )
    ax.set(xlim=(-1, 2.6 * max(rows) + 1), ylim=(-2.4, 2.4))
    ax.axis("off")
    return fig


labels = {
    id(w): "w",
    id(x): "x",
    id(b): "b",
    id(product): "w · x",
    id(affine): "w · x + b",
    id(active): "relu",
    id(out): "L = relu · w",
}
fig = draw_graph(out, labels)
plot.caption(
    fig,
    "Values flow to the right, gradients to the left. The gradient of w is the sum of two shares: "
    "x · 3 = −1.5 through the product on the left, and relu = 0.5 from the product on the right.",
)
plt.show()

# %% [markdown]
# ## A network trained by your own engine
#
# The digits are 1,797 pictures of 8 × 8 pixels, written by people and scanned. A network with one
# hidden layer turns the 64 numbers of a picture into ten **logits**, one for each digit; softmax
# makes probabilities of them; and the loss is the **cross-entropy**, minus the logarithm of the
# probability given to the right digit. For one picture with logits $z$ and label $c$
#
# $$-\ln \frac{e^{z_c}}{\sum_j e^{z_j}} = \ln \sum_j e^{z_j} - z_c .$$
#
# $e^{1000}$ overflows. Subtracting the largest logit $m$ from all of them changes neither side of
# the formula, since $\ln\sum_j e^{z_j} = m + \ln \sum_j e^{z_j - m}$, and keeps every exponential
# at most 1. The maximum can be treated as a constant, not as part of the graph: it cancels, so
# whatever derivative it had cancels too.


# %% exercise="cross_entropy" minutes=15 difficulty=2
def cross_entropy(logits: Tensor, labels: np.ndarray) -> Tensor:
    """The mean over the rows of −ln softmax(logits)[label], as a scalar Tensor with a graph.

    logits: a Tensor (N, C). labels: integers (N,), 0 … C − 1. Finite for logits of ±10,000.
    """
    ### BEGIN SOLUTION
    rows, classes = logits.shape
    shifted = logits - logits.data.max(axis=1, keepdims=True)
    one_hot = np.eye(classes)[labels]
    log_sum = shifted.exp().sum(axis=1).log()
    return (log_sum - (shifted * one_hot).sum(axis=1)).sum() * (1 / rows)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: picking one logit per row with the operations there are</summary>
#
# `np.eye(C)[labels]` has a 1 in each row at the label's place: multiply and sum over the row.
# </details>

# %% check="cross_entropy" points=2
logits = Tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
loss = cross_entropy(logits, np.array([0, 2]))
checks.close(
    loss.data,
    0.6690785274,
    rtol=1e-8,
    what="the mean cross-entropy of two rows",
    mistakes={
        "the sum over the rows": 1.3381570549,
        "log to the base 2": 0.9652762735,
        "leaving out the logarithm of the sum": -1.0,
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(6)
for rows, classes, scale in [(1, 2, 1.0), (7, 10, 3.0), (5, 3, 1e4), (4, 1, 1.0)]:
    z = torch.randn(rows, classes, generator=g, dtype=torch.float64) * scale
    y = torch.randint(classes, (rows,), generator=g)
    theirs = z.clone().requires_grad_()
    expected = F.cross_entropy(theirs, y)
    (gradient,) = torch.autograd.grad(expected, theirs)
    mine = Tensor(z.numpy().copy())
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        loss = cross_entropy(mine, labels := y.numpy().copy())
        assert np.array_equal(mine.data, z.numpy()), "cross_entropy changed the logits"
        assert np.array_equal(labels, y.numpy()), "cross_entropy changed the labels"
        loss.backward()
    what = f"for {rows} rows of {classes} logits of size {scale:g}"
    checks.close(
        loss.data,
        expected.item(),
        rtol=1e-8,
        atol=1e-12,
        what=f"the loss {what}",
    )
    checks.close(
        mine.grad,
        gradient.numpy(),
        rtol=1e-8,
        atol=1e-12,
        what=f"its gradient {what}",
        mistakes={"the gradient of the sum": gradient.numpy() * rows},
    )
### END HIDDEN TESTS

# %% [markdown]
# The data: a fifth of the pictures is held out.

# %%
pictures, digits = data.digits()
pictures, digits = pictures.flatten(1).double().numpy(), digits.numpy()
held_out = np.arange(len(digits)) % 5 == 0

# %% [markdown]
# Now the loop, with nothing from a library but arrays: draw small random weights, take a batch,
# compute the loss, `backward()`, and move every parameter a step against its gradient. Choose the
# numbers yourself; a hidden layer of 32, batches of 64, a step of 0.2 and thirty passes over the
# data are a place to start. It takes about a second.


# %% exercise="fit" minutes=25 difficulty=2
def fit(images: np.ndarray, labels: np.ndarray, seed: int = 0):
    """Train a network with one hidden ReLU layer on digits, with your Tensor, and return its
    prediction.

    images: (N, 64), pixels from 0 to 1. labels: (N,), digits. Returns a function from images
    (M, 64) to digits (M,). All chance comes from np.random.default_rng(seed): the same seed gives
    the same predictions, another seed others. At least 95 % of unseen digits are typical; 90 % are
    asked for.
    """
    ### BEGIN SOLUTION
    rng = np.random.default_rng(seed)
    hidden, rate, batch = 32, 0.2, 64
    w1 = Tensor(rng.normal(0, np.sqrt(2 / 64), (64, hidden)))
    b1 = Tensor(np.zeros(hidden))
    w2 = Tensor(rng.normal(0, np.sqrt(2 / hidden), (hidden, 10)))
    b2 = Tensor(np.zeros(10))

    def network(x) -> Tensor:
        return (Tensor.lift(x) @ w1 + b1).relu() @ w2 + b2

    for _ in range(30):
        order = rng.permutation(len(images))
        for start in range(0, len(images), batch):
            chosen = order[start : start + batch]
            loss = cross_entropy(network(images[chosen]), labels[chosen])
            loss.backward()
            for parameter in (w1, b1, w2, b2):
                parameter.data = parameter.data - rate * parameter.grad

    return lambda x: network(x).data.argmax(axis=1)
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the loss does not fall</summary>
#
# Weights of variance 2 / (number of inputs) keep the signal's size through a ReLU layer (lesson 13
# says why); weights that are all zero never move, because the gradient of each layer has the other
# layer's zeros as a factor. Is the step subtracted, and does it change the `data` of the very
# Tensors that the network uses, rather than make new Tensors?
# </details>

# %% check="fit" points=3
steps = []
plain_backward = Tensor.backward
try:
    Tensor.backward = lambda self: (steps.append(1), plain_backward(self))[1]
    predict = fit(pictures[~held_out], digits[~held_out], seed=0)
finally:
    Tensor.backward = plain_backward
assert len(steps) >= 20, (
    f"backward() of your Tensor was called {len(steps)} times: the network is trained with your "
    f"engine."
)
accuracy = float((predict(pictures[held_out]) == digits[held_out]).mean())
assert accuracy >= 0.90, (
    f"{accuracy:.1%} of the unseen digits are right; at least 90 % are asked for."
)
### BEGIN HIDDEN TESTS
# Other labels for the same pictures: the answer must follow the data, and the seed.
turn = (digits + 3) % 10
for seed, names in [(checks.seed(), digits), (checks.seed() + 1, turn)]:
    predict = fit(pictures[~held_out], names[~held_out], seed=seed)
    guess = np.asarray(predict(pictures[held_out]))
    assert guess.shape == (held_out.sum(),), (
        f"the prediction has shape {guess.shape}, it should be one digit for each picture."
    )
    accuracy = float((guess == names[held_out]).mean())
    assert accuracy >= 0.90, (
        f"seed {seed}: {accuracy:.1%} of the unseen digits are right; at least 90 % are asked for."
    )
    assert len(predict(pictures[:1])) == 1, "one picture alone gets one digit."
    alone = np.concatenate([predict(pictures[held_out][i : i + 1]) for i in range(40)])
    assert (alone == guess[:40]).all(), "a picture's digit depends on the others in the call."
# Law: the pictures that a linear map takes for one digit form a convex set; ReLU bends it.
corners = np.random.default_rng(checks.seed()).integers(0, 2, (10_000, 64)).astype(float)
guess = np.asarray(predict(corners))
order = guess.argsort(kind="stable")
left, right = order[:-1], order[1:]
alike = guess[left] == guess[right]
middle = np.asarray(predict((corners[left] + corners[right])[alike] / 2))
assert (middle != guess[left][alike]).any(), (
    f"{alike.sum():,} pairs of pictures that are taken for the same digit: halfway between the two "
    "always lies that digit again, as in a linear map. Is there a ReLU between the two layers?"
)
noise, state = np.random.default_rng(checks.seed()).random((2000, 64)), global_generator()
first, again, other = (fit(pictures[:200], digits[:200], seed=seed)(noise) for seed in (5, 5, 6))
assert (first == again).all(), (
    f"two networks trained with the same seed disagree about {(first != again).mean():.0%} of "
    "2,000 pictures: does all chance come from np.random.default_rng(seed)?"
)
assert (first != other).any(), "two networks trained with different seeds are the same."
assert global_generator() == state, (
    "NumPy's global random state was changed: draw from np.random.default_rng(seed)."
)
### END HIDDEN TESTS

# %% tags=["experiment"]
predict = fit(pictures[~held_out], digits[~held_out])
guesses = predict(pictures[held_out])
wrong = np.flatnonzero(guesses != digits[held_out])

# %% tags=["experiment", "figure"]
# Figure: the unseen digits that your network misreads, and some others
fig, axes = plt.subplots(2, 8, figsize=(9, 2.9))
shown = np.concatenate(
    [wrong[:8], np.flatnonzero(guesses == digits[held_out])[: 16 - len(wrong[:8])]]
)
for ax, i in zip(axes.flat, shown, strict=False):
    ax.imshow(pictures[held_out][i].reshape(8, 8), cmap="Greys")
    ax.set_title(
        f"{guesses[i]}" + (f", not {digits[held_out][i]}" if i in wrong else ""), fontsize=9
    )
    ax.axis("off")
plot.caption(
    fig,
    f"{len(wrong)} of {held_out.sum()} unseen digits are misread by the network that your engine "
    f"trained ({np.mean(guesses == digits[held_out]):.1%} right). First {len(wrong[:8])} of the "
    "misread ones, then some of the others.",
)
plt.show()

# %% [markdown]
# ## In PyTorch: a backward of your own
#
# PyTorch's engine works like yours, with many more operations and on tensors that may live on a
# GPU. Where its derivative of a composed function wastes memory, or where you wrote the forward
# pass as a kernel of your own (lessons 03 to 05 and 29 do), you hand it the VJP yourself: a
# `torch.autograd.Function`.
#
# Softmax is the one to have derived once in your life. $y_i = e^{x_i}/\sum_k e^{x_k}$, so
# $\ln y_i = x_i - \ln\sum_k e^{x_k}$ and
#
# $$\frac{\partial \ln y_i}{\partial x_j} = \delta_{ij} - y_j \quad\Longrightarrow\quad
# \frac{\partial y_i}{\partial x_j} = y_i\,(\delta_{ij} - y_j) .$$
#
# That is a Jacobian of $n \times n$ for $n$ logits. Multiply by the arriving gradient $g$ from the
# left before anything is formed:
#
# $$\sum_i g_i\, y_i (\delta_{ij} - y_j) = y_j g_j - y_j \sum_i g_i y_i = y_j\Bigl(g_j - \sum_i g_i y_i\Bigr).$$
#
# A row of $n$ numbers in, a row out: the whole Jacobian is a diagonal minus a product of two
# vectors, and never has to exist. In lesson 29 the same sum reappears under the name δ.


# %% exercise="softmax_function" minutes=20 difficulty=2
class SoftmaxFunction(torch.autograd.Function):
    """Softmax over the last axis, with its vector–Jacobian product written by hand. Use:
    `SoftmaxFunction.apply(x)`.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        """x: (…, n), float32 or float64 → (…, n). Rows sum to 1, as exactly as the format can, and
        are finite, also for inputs of ±10,000. Saves one tensor for backward, of x's size; which
        one is left to you. PyTorch's own softmax is not called, here or in `backward`.
        """
        ### BEGIN SOLUTION
        exponentials = torch.exp(x - x.amax(dim=-1, keepdim=True))
        y = exponentials / exponentials.sum(dim=-1, keepdim=True)
        ctx.save_for_backward(y)
        return y
        ### END SOLUTION

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        """grad: the gradient of the result, (…, n) → the gradient of x, (…, n). No tensor is larger
        than x; grad is not changed. Second derivatives are not asked for.
        """
        ### BEGIN SOLUTION
        (y,) = ctx.saved_tensors
        return y * (grad - (grad * y).sum(dim=-1, keepdim=True))
        ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: what backward may use</summary>
#
# The formula needs $y$ and the gradient that arrives, not $x$: `ctx.save_for_backward(y)` in
# `forward`, `(y,) = ctx.saved_tensors` in `backward`. The sum over $i$ runs over the last axis and
# keeps it with size 1.
# </details>

# %% check="softmax_function" points=2
x = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
y = SoftmaxFunction.apply(x)
checks.close(y, torch.softmax(x, -1), what="softmax of (0, 1, 2)")
weight = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
(gradient,) = torch.autograd.grad(y, x, weight)
checks.close(
    gradient,
    torch.tensor([[0.0819250691, -0.0220330457, -0.0598920234]], dtype=torch.float64),
    rtol=1e-6,
    what="the gradient of the first probability",
    mistakes={
        "the diagonal alone": torch.tensor([[0.0819250691, 0, 0]], dtype=torch.float64),
        "the probabilities times what arrives": torch.tensor(
            [[0.0900305732, 0, 0]], dtype=torch.float64
        ),
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(7)
for shape in [(5,), (1, 1), (2, 3, 7), (4, 1)]:
    x = torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SoftmaxFunction.apply, (x,)), (
        "the gradient differs from the numerical one."
    )
    checks.gradients(SoftmaxFunction.apply, lambda t: torch.softmax(t, -1), x.detach(), names=["x"])
x = torch.randn(3, 9, generator=g).mul(1e4).T[::2]  # not contiguous, and large
with (
    checks.unchanged(x=x),
    checks.forbidden("softmax", "log_softmax", because="this exercise builds it"),
):
    y = SoftmaxFunction.apply(x)
checks.close(
    y,
    torch.softmax(x, -1),
    what="softmax of large numbers",
    hint="Subtract the maximum of each row first.",
)
x = 10_000 + torch.randn(4, 6, generator=g)
checks.close(
    SoftmaxFunction.apply(x).sum(-1),
    torch.ones(4),
    what="the sums of rows near 10,000, in float32",
    rtol=1e-6,
    hint="A difference of two numbers near 10,000 has 1/1,000 of rounding, unless it is exact.",
)
x = torch.randn(4, 6, generator=g).requires_grad_()
arrives = torch.randn(4, 6, generator=g)
y = SoftmaxFunction.apply(x)
with checks.unchanged(grad=arrives):
    y.backward(arrives)
with checks.forbidden(
    "softmax",
    "log_softmax",
    "_softmax_backward_data",
    "torch.autograd.grad",
    "torch.enable_grad",
    because="its backward is what is asked for",
):
    SoftmaxFunction.apply(x).square().sum().backward()
### END HIDDEN TESTS

# %% check="softmax_function" points=1
x = torch.randn(2, 500, generator=checks.generator(8)).requires_grad_()
y = SoftmaxFunction.apply(x)
with checks.allocations() as made:
    torch.autograd.grad(y, x, torch.ones_like(y))
assert made.largest <= 1000, (
    f"backward made a tensor of {made.largest} elements; x has 1,000. "
    "The Jacobian need not be formed."
)
### BEGIN HIDDEN TESTS
with checks.saved() as kept:
    y = SoftmaxFunction.apply(x)
assert kept.elements <= 1000, (
    f"{kept.elements} elements are kept for backward; the result alone, 1,000, is enough."
)
(expected,) = torch.autograd.grad(torch.softmax(x, -1), x, x.detach())
(actual,) = torch.autograd.grad(y, x, x.detach())
checks.close(actual, expected, what="the gradient for rows of 500")
### END HIDDEN TESTS

# %% [markdown]
# ## Forward mode
#
# Some questions have one input and many outputs: how does the whole trajectory move if I change the
# starting point along *this* direction? Reverse mode would need one run per output. Forward mode
# answers in one, with no graph and nothing remembered, by a trick of algebra. Calculate with **dual
# numbers** $a + b\,\epsilon$, where $\epsilon^2 = 0$:
#
# $$(a + b\epsilon)(c + d\epsilon) = ac + (ad + bc)\,\epsilon, \qquad f(a + b\epsilon) = f(a) + f'(a)\,b\,\epsilon .$$
#
# The first part is the value, and the second obeys the product rule and the chain rule by itself:
# it is the derivative along the direction you put in. So run the program on $x + v\epsilon$, and
# the second part of the result is $Jv$.


# %% exercise="jvp_forward" minutes=25 difficulty=2 path="more"
class Dual:
    """value + tangent · ε with ε² = 0. Both are tensors of one shape and format, in what your
    methods return too. Tensors of that format, and numbers, may stand in for Duals: `lift` gives
    them the tangent 0 (a number's parts stay numbers). Shapes broadcast.
    """

    def __init__(self, value: torch.Tensor, tangent: torch.Tensor):
        self.value, self.tangent = value, tangent

    @staticmethod
    def lift(value) -> "Dual":
        if isinstance(value, Dual):
            return value
        # A number stays one, so that it takes on the format of the tensors that it meets.
        return Dual(value, torch.zeros_like(value) if isinstance(value, torch.Tensor) else 0.0)

    def __add__(self, other) -> "Dual":
        other = Dual.lift(other)
        ### BEGIN SOLUTION
        return Dual(self.value + other.value, self.tangent + other.tangent)
        ### END SOLUTION

    def __mul__(self, other) -> "Dual":
        """Elementwise, with broadcasting."""
        other = Dual.lift(other)
        ### BEGIN SOLUTION
        return Dual(
            self.value * other.value, self.tangent * other.value + self.value * other.tangent
        )
        ### END SOLUTION

    def __matmul__(self, other) -> "Dual":
        other = Dual.lift(other)
        ### BEGIN SOLUTION
        return Dual(
            self.value @ other.value, self.tangent @ other.value + self.value @ other.tangent
        )
        ### END SOLUTION

    def exp(self) -> "Dual":
        ### BEGIN SOLUTION
        result = self.value.exp()
        return Dual(result, result * self.tangent)
        ### END SOLUTION

    def log(self) -> "Dual":
        ### BEGIN SOLUTION
        return Dual(self.value.log(), self.tangent / self.value)
        ### END SOLUTION

    def tanh(self) -> "Dual":
        """The derivative of tanh is 1 − tanh². Both parts are finite for values of any size."""
        ### BEGIN SOLUTION
        result = self.value.tanh()
        return Dual(result, (1 - result * result) * self.tangent)
        ### END SOLUTION

    def sum(self, dim=None) -> "Dual":
        """Over all axes (None), one axis (an int, negative ones count from the right) or several (a
        tuple), as in PyTorch.
        """
        ### BEGIN SOLUTION
        return Dual(self.value.sum(dim), self.tangent.sum(dim))
        ### END SOLUTION

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


def jvp_forward(f, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(f(x), J v): the value of f at x, and its derivative in the direction v, from one run of f on
    a Dual.

    f is written with +, −, *, @ and the methods exp, log, tanh and sum. x and v: tensors of one
    shape.
    """
    ### BEGIN SOLUTION
    result = f(Dual(x, v))
    return result.value, result.tangent
    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: where to begin</summary>
#
# Each method returns a Dual of two things: what PyTorch gives for the values, and the rule of
# school calculus with `self.tangent` in the place of dx.
# </details>

# %% check="jvp_forward" points=2
x, v = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
value, tangent = jvp_forward(lambda t: t * t * 3.0, x, v)
checks.close(value, torch.tensor([3.0, 12.0]), what="3x² at (1, 2)")
checks.close(
    tangent,
    torch.tensor([3.0, -12.0]),
    what="its derivative along (0.5, −1)",
    mistakes={
        "only one half of the product rule": torch.tensor([1.5, -6.0]),
        "the gradient, without the direction,": torch.tensor([6.0, 12.0]),
        "multiplying the two tangents": 3 * v * v,
    },
)
### BEGIN HIDDEN TESTS
g = checks.generator(9)
weight = torch.randn(4, 3, generator=g, dtype=torch.float64)
for what, f, shape in [
    ("sums and differences", lambda t: 2.0 - (t + 1.0) - t * 0.5, (3, 2)),
    ("products", lambda t: t * t * (t - 3.0), (5,)),
    ("exp", lambda t: (t * 0.3).exp() * t, (2, 1, 3)),
    ("log", lambda t: (t * t + 0.5).log(), (4,)),
    ("tanh", lambda t: (t * 2.0).tanh(), (3,)),
    ("a constant matrix on the left", lambda t: weight @ t, (3, 2)),
    ("a matrix product with itself", lambda t: t @ (t * 2.0), (3, 3)),
    ("a layer", lambda t: (t @ weight.T).tanh().sum(1), (2, 3)),
    ("softmax", lambda t: t - t.exp().sum().log(), (6,)),
    ("a constant of a larger shape", lambda t: t + weight, (3,)),
    ("a constant of a larger shape, added,", lambda t: (t + weight) * (weight + t), (3,)),
    ("a constant of a larger shape, taken from,", lambda t: (weight - t) - (t - weight), (1, 3)),
    ("a constant of a larger shape, multiplied,", lambda t: (t * weight) + (weight * t), (3,)),
    ("Duals of different shapes", lambda t: (t + t.sum()) * t.sum(1), (2, 2)),
    ("a sum over the axis 0", lambda t: (t * t).sum(0), (3, 2)),
    ("a sum over the axis −2", lambda t: (t * t).sum(-2), (3, 2, 2)),
    ("a sum over the axes 0 and −1", lambda t: (t * t).sum((0, -1)), (3, 2, 2)),
    ("tanh of large numbers", lambda t: (t * 1e4).tanh() + t, (5,)),
]:
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    v = torch.randn(shape, generator=g, dtype=torch.float64)
    # by two backward passes: another way to the same number
    expected = torch.autograd.functional.jvp(f, x, v)
    value, tangent = jvp_forward(f, x, v)
    checks.close(value, expected[0], what=f"the value of {what}")
    checks.close(tangent, expected[1], what=f"the tangent of {what}")
scalar = torch.tensor(0.7)
for x in (scalar, scalar.expand(2), scalar.half()):
    for part in jvp_forward(lambda t: (0.1 + t * 2.0 - 1.5).tanh(), x, x):
        assert part.dtype == x.dtype, (
            f"numbers among tensors of {x.dtype} gave {part.dtype}: the format should stay."
        )
### END HIDDEN TESTS

# %% check="jvp_forward" points=1
runs = []
jvp_forward(lambda t: (runs.append(type(t).__name__), t * t)[1], torch.ones(3), torch.ones(3))
assert runs == ["Dual"], (
    f"f was run on {runs}; one run on one Dual is enough, whatever the number of inputs."
)
### BEGIN HIDDEN TESTS
g = checks.generator(10)
x, v = torch.randn(2, 7, generator=g, dtype=torch.float64)
with checks.unchanged(x=x, v=v):
    for scale in (0.0, 1.0, -2.5):  # linear in the direction
        _, tangent = jvp_forward(lambda t: (t * t).exp().sum(), x, scale * v)
        checks.close(
            tangent,
            scale * (2 * x * v * (x * x).exp()).sum(),
            atol=1e-12,
            what=f"the tangent along {scale} v",
        )
### END HIDDEN TESTS

# %% [markdown]
# ## Forgetting on purpose
#
# Reverse mode has one price: until the backward pass has used them, all intermediate results — the
# **activations** — are kept. For a network of $n$ equal layers that is $n$ layers' worth of memory,
# and it is what fills a GPU in training.
#
# **Checkpointing** trades it for time. Cut the network into segments of $s$ layers. On the way
# forward keep only the input of each segment (and the state of the random numbers, if it draws
# any), $n/s$ of them. On the way back, run a segment forward once more, now keeping its $s$
# activations, go back through it, and forget them. At most
#
# $$\frac{n}{s} + s \qquad\text{is kept, which is smallest at } s = \sqrt n:\ 2\sqrt n ,$$
#
# for one more forward pass in all. 100 layers: 20 kept instead of 100, for about a third more time
# (a backward pass costs two forward passes: $4/3$).
#
# The tool for one segment is a Function whose forward computes *without* a graph and keeps the
# inputs, and whose backward computes once more *with* a graph and goes back through that. One
# detail: if the segment draws random numbers (dropout), the second run must draw the same ones, or
# the gradient belongs to another function than the one that was computed.


# %% exercise="checkpoint" minutes=40 difficulty=3 path="more"
def checkpoint(fn, *inputs: torch.Tensor) -> torch.Tensor:
    """fn(*inputs), keeping nothing for backward but the inputs and the state of the random numbers;
    backward calls fn a second time.

    fn: takes the tensors and returns one tensor. It may also use parameters, those of a module
    that it is or only calls, which get their gradients in `.grad` when `.backward()` is called on a
    loss. At least one input requires a gradient; those that do not get none, and may hold integers
    or booleans (indices, a mask). One backward pass is asked for, no second with retain_graph.

    - The gradients are those of fn(*inputs) itself. fn is called once in the forward pass and once
        in the backward pass.
    - If fn draws from PyTorch's generator (dropout), its second call draws the same numbers, and
      afterwards the generator goes on as if fn had been called only once.
    - torch.utils.checkpoint is what you build here: it is not used.
    """
    ### BEGIN SOLUTION
    return _Checkpoint.apply(fn, *inputs)


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fn, *inputs):  # PyTorch runs this without recording a graph
        ctx.fn = fn
        ctx.generator_before = torch.get_rng_state()
        ctx.save_for_backward(*inputs)
        return fn(*inputs)

    @staticmethod
    def backward(ctx, grad):
        # Copies of the inputs that are leaves: the graph of the second run ends at them.
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors]
        generator_now = torch.get_rng_state()
        torch.set_rng_state(ctx.generator_before)
        with torch.enable_grad():
            output = ctx.fn(*inputs)
        torch.set_rng_state(generator_now)
        torch.autograd.backward(output, grad)  # also reaches the parameters that fn uses
        return None, *(t.grad for t in inputs)

    ### END SOLUTION


# %% [markdown]
# <details><summary>Hint: the parts</summary>
#
# Inside `forward` of a `torch.autograd.Function` no graph is recorded. In `backward`,
# `with torch.enable_grad():` records one again. Detached copies of the saved inputs, with
# `requires_grad_()` where the originals had it, are the leaves at which it ends;
# `torch.autograd.backward(output, grad)` fills their `.grad`, and the parameters' too.
# </details>
#
# <details><summary>Hint: what backward returns</summary>
#
# One value for every argument of `forward`: None for `fn`, then a gradient (or None) for each
# input.
# </details>
#
# <details><summary>Hint: the same random numbers</summary>
#
# `torch.get_rng_state()` and `torch.set_rng_state(state)`.
# </details>

# %% check="checkpoint" points=2
x = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
y = checkpoint(lambda t: (t.sin() * t).exp(), x)
(gradient,) = torch.autograd.grad(y.sum(), x)
(expected,) = torch.autograd.grad((x.sin() * x).exp().sum(), x)
checks.close(y, (x.sin() * x).exp(), what="the result of a checkpointed function")
checks.close(gradient, expected, what="the gradient of a checkpointed function")
### BEGIN HIDDEN TESTS
g = checks.generator(11)


def segment(a, b, c):
    return (a @ b).tanh() * c.exp() + a.sum()


values = [torch.randn(s, generator=g, dtype=torch.float64) for s in [(3, 4), (4, 2), (1, 2)]]
checks.gradients(lambda *t: checkpoint(segment, *t), segment, *values, names=["a", "b", "c"])
a, b, c = (t.clone() for t in values)
a.requires_grad_()
out = checkpoint(segment, a, b, c)  # b and c ask for no gradient
out.square().sum().backward()
other = values[0].clone().requires_grad_()
segment(other, b, c).square().sum().backward()
checks.close(a.grad, other.grad, what="the gradient of the one input that asks for one")
assert b.grad is None, "an input that asks for no gradient got one."
arriving = torch.randn(3, 2, generator=g, dtype=torch.float64)
with checks.unchanged(a=a.detach(), b=b, c=c, gradient=arriving):
    checkpoint(segment, a, b, c).backward(arriving)

torch.manual_seed(checks.seed())
layers = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5)).double()
grads = []
for run in (
    lambda t: layers(t),
    lambda t: checkpoint(layers, t),
    lambda t: checkpoint(lambda u: layers(u), t),
    lambda t: checkpoint(layers, checkpoint(torch.sin, t)),
):
    layers.zero_grad()
    t = torch.linspace(-1, 1, 10, dtype=torch.float64).view(2, 5).requires_grad_()
    run(t).pow(2).sum().backward()
    grads.append(
        [t.grad.clone()]
        + [
            p.grad.clone() if p.grad is not None else torch.zeros_like(p)
            for p in layers.parameters()
        ]
    )
for fn, found in (("a module", grads[1]), ("a lambda that calls a module", grads[2])):
    for name, mine, theirs in zip(
        ["input", "weight", "bias", "weight", "bias"], found, grads[0], strict=True
    ):
        checks.close(
            mine,
            theirs,
            what=f"the gradient of the {name}, checkpointing {fn},",
            hint="torch.autograd.backward reaches the parameters that fn uses; "
            "torch.autograd.grad(output, inputs) does not.",
        )
layers.zero_grad()
t = torch.linspace(-1, 1, 10, dtype=torch.float64).view(2, 5).requires_grad_()
layers(torch.sin(t)).pow(2).sum().backward()
checks.close(grads[3][0], t.grad, what="the gradient through two checkpointed functions")
rows, mask = torch.tensor([2, 0, 2]), torch.tensor([[True], [False], [True]])
picked = torch.randn(4, 3, generator=g, dtype=torch.float64)
leaves = [picked.clone().requires_grad_() for _ in range(2)]
for t, run in zip(leaves, (checkpoint, lambda f, *a: f(*a)), strict=True):
    run(lambda t, i, m: (t[i] * m).exp(), t, rows, mask).square().sum().backward()
checks.close(leaves[0].grad, leaves[1].grad, what="the gradient beside indices and a mask")
### END HIDDEN TESTS

# %% check="checkpoint" points=2
calls = []


def segment(t):
    calls.append(1)
    for _ in range(6):
        t = (t * 1.1).sin()
    return t


x = torch.randn(4, 5, generator=checks.generator(12)).requires_grad_()
with checks.saved() as kept:
    y = checkpoint(segment, x)
in_forward = kept.elements
y.sum().backward()
assert in_forward <= x.numel(), (
    f"{in_forward} elements were kept in the forward pass; the inputs have {x.numel()}. "
    "Does forward record a graph?"
)
assert len(calls) == 2, (
    f"fn was called {len(calls)} times; once in the forward and once in the backward pass is "
    f"asked for."
)
### BEGIN HIDDEN TESTS
with checks.forbidden("torch.utils.checkpoint.checkpoint"):
    x = torch.randn(8, generator=checks.generator(13), dtype=torch.float64).requires_grad_()
    with checks.saved() as kept:
        y = x
        for _ in range(5):
            y = checkpoint(segment, y)
    assert kept.elements <= 5 * 8, (
        f"five segments of 8 numbers: {kept.elements} elements kept in the forward pass, "
        "40 allowed."
    )
    (gradient,) = torch.autograd.grad(y.sum(), x)
y = x
for _ in range(5):
    y = segment(y)
(expected,) = torch.autograd.grad(y.sum(), x)
checks.close(gradient, expected, what="the gradient through five checkpointed segments")
### END HIDDEN TESTS

# %% check="checkpoint" points=1
torch.manual_seed(3)
x = torch.ones(1000, requires_grad=True)
y = checkpoint(lambda t: F.dropout(t, 0.5), x)
(gradient,) = torch.autograd.grad(y.sum(), x)
checks.close(
    gradient,
    y.detach(),
    what="the gradient of dropout, 2 where the forward pass kept a number and 0 elsewhere,",
    hint="The second run must draw the same random numbers as the first.",
)


### BEGIN HIDDEN TESTS
def noisy(t):
    return t * torch.randn(t.shape)


for seed in (checks.seed(), checks.seed() + 1):
    torch.manual_seed(seed)
    x = torch.ones(7, requires_grad=True)
    y = checkpoint(noisy, x)
    between = torch.randn(3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    after = torch.randn(3)
    torch.manual_seed(seed)
    expected = noisy(torch.ones(7))
    checks.close(between, torch.randn(3), what="the random numbers after the forward pass")
    checks.close(
        after,
        torch.randn(3),
        what="the random numbers after the backward pass",
        hint="Put the generator back to where it was before the second run.",
    )
    checks.close(gradient, expected, what="the gradient of a function that draws random numbers")
### END HIDDEN TESTS


# %% tags=["experiment"]
def peak_kept(layers: int, segment_length: int, width: int = 16) -> int:
    """Activations of one layer (counted in layers) alive at once at most, in a chain of tanh layers
    cut into segments.
    """
    alive, peak = 0, 0

    class Kept:
        """A saved tensor, counted for as long as the graph holds it."""

        def __init__(self, tensor):
            nonlocal alive, peak
            self.tensor = tensor
            alive += 1
            peak = max(peak, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    def run(t):
        for _ in range(segment_length):
            t = t.tanh()  # keeps its result for backward: one activation a layer
        return t

    x = torch.randn(width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        y = x
        for _ in range(layers // segment_length):
            y = checkpoint(run, y) if segment_length < layers else run(y)
        y.sum().backward()
    return peak


layers = 144
lengths = [1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 36, 48, 72]
measured = [peak_kept(layers, s) for s in lengths]
without = peak_kept(layers, layers)
print(
    f"kept at once: {without} without checkpointing, {min(measured)} with segments of "
    f"{lengths[int(np.argmin(measured))]}"
)

# %% tags=["experiment", "figure"]
# Figure: activations alive at once, by the length of a segment
fig, ax = plt.subplots(figsize=(6.6, 3.6))
ax.plot(lengths, [layers / s + s for s in lengths], label="n/s + s")
ax.plot(lengths, measured, "o", linestyle="none", label="counted, with your checkpoint")
ax.axhline(without, color="#555555", linestyle=":")
ax.annotate(
    "without checkpointing", (24, without), textcoords="offset points", xytext=(0, 5), fontsize=9
)
ax.axvline(layers**0.5, color="#bbbbbb", linestyle="-", linewidth=1)
ax.annotate("√n", (layers**0.5, 125), textcoords="offset points", xytext=(4, 0), fontsize=10)
ax.set(
    xscale="log",
    xlabel="segment length s (layers)",
    ylabel="activations alive at once",
    ylim=(0, 165),
    title=f"Memory of a chain of {layers} layers",
)
ax.set_xticks([1, 2, 4, 8, 16, 32, 72], labels=["1", "2", "4", "8", "16", "32", "72"])
ax.legend(loc="center right", bbox_to_anchor=(1, 0.6), fontsize=8)
plot.caption(
    fig,
    "Short segments keep many inputs, long ones keep many activations while they are being gone "
    "through. The least is at s = √n, where 24 stand in for 144.",
)
plt.show()

# %% [markdown]
# ## Experiment: what does a gradient cost?
#
# **Question.** Your network has 64 · h + h + 10 · h + 10 parameters. How much longer does it take
# to compute the loss *and its gradient* than the loss alone — and how does that change as h grows
# from 4 to 256?
#
# **Predict first.** Count: a matrix product forward, two of the same size backward. Write your
# factor down, and what you expect for the numerical gradient at h = 256 (work the number of
# parameters out first) before you run the cell.


# %% tags=["experiment"]
def seconds(action, repeats: int = 9) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


widths = [4, 8, 16, 32, 64, 128, 256]
rng = np.random.default_rng(0)
ratios, counts = [], []
for h in widths:
    parameters = tuple(
        Tensor(rng.normal(0, 0.1, shape)) for shape in [(64, h), (h,), (h, 10), (10,)]
    )

    def loss_of_batch(w1, b1, w2, b2):
        return cross_entropy((Tensor(pictures[:128]) @ w1 + b1).relu() @ w2 + b2, digits[:128])

    forward = seconds(lambda p=parameters: loss_of_batch(*p))
    ratios.append(seconds(lambda p=parameters: loss_of_batch(*p).backward()) / forward)
    counts.append(sum(p.data.size for p in parameters))

print(
    "loss and gradient, in evaluations of the loss: "
    + ", ".join(f"{n:,}: {r:.1f}" for n, r in zip(counts, ratios, strict=True))
)

# %% tags=["experiment", "figure"]
# Figure: what a gradient costs in each of the three ways
fig, ax = plt.subplots(figsize=(6.6, 3.8))
ax.loglog(counts, [2 * n for n in counts], label="numerical gradient: 2 evaluations a parameter")
ax.loglog(counts, counts, label="forward mode: 1 run a parameter")
ax.loglog(counts, ratios, "o-", label="reverse mode, measured on your engine")
ax.set(
    xlabel="parameters",
    ylabel="cost of a gradient (evaluations of the loss)",
    ylim=(1, 1e5),
    title="The cheap gradient",
)
ax.legend(loc="center right")
plot.caption(
    fig,
    f"From {counts[0]} to {counts[-1]:,} parameters the gradient costs {min(ratios):.1f} to "
    f"{max(ratios):.1f} evaluations of the loss in reverse mode. The two other ways grow with the "
    "number of parameters.",
)
plt.show()

# %% [markdown]
# **What came out.** The factor stays at a small constant while the number of parameters grows
# sixtyfold: this is the *cheap gradient principle*. For any program, in a count of its operations,
# the factor is at most 5 (Griewank 1989). Counting the multiplications of a layer alone gives 3.
# What you measure is of that size, with noise, and may be above 5: for the smallest widths it is
# Python's own bookkeeping, not arithmetic, that you see, and for the widest the memory that the
# gradients need.
# The numerical gradient of the widest network would take some 38,000 evaluations for a single step.

# %% [markdown]
# ## Key questions


# %% exercise="key_questions" minutes=10 difficulty=1 kind="questions"
def key_questions() -> dict[str, int | str]:
    """Short answers: whole numbers, and a choice.

    "evaluations":   how many evaluations of the loss a gradient by central differences takes, with
                     1,000,000 parameters.
    "mode":          the mode that takes fewer runs for the whole Jacobian of f: R^300 → R^200:
                     "forward" or "reverse".
    "runs":          how many runs that mode takes.
    "kept":          activations alive at once at most, counted as n/s + s: n = 96 equal layers, cut
                     into segments of s = 32.
    "best_segment":  the s that makes n/s + s smallest for n = 64 layers.
    """
    ### BEGIN SOLUTION
    return {
        "evaluations": 2 * 1_000_000,
        "mode": "reverse",
        "runs": 200,
        "kept": 96 // 32 + 32,
        "best_segment": 8,
    }
    ### END SOLUTION


# %% check="key_questions" points=1
answer = key_questions()["evaluations"]
### BEGIN HIDDEN TESTS
checks.number(
    answer,
    2_000_000,
    to=0,
    what="evaluations",
    mistakes={"forward differences": 1_000_001, "one evaluation a parameter": 1_000_000},
)
### END HIDDEN TESTS

# %% check="key_questions" points=1
mode, runs = (key_questions()[key] for key in ("mode", "runs"))
### BEGIN HIDDEN TESTS
checks.kind(mode, str, what="mode")
assert mode == "reverse", "mode: one run for each output or for each input, which are fewer?"
checks.number(runs, 200, to=0, what="runs", mistakes={"a run for each input": 300})
### END HIDDEN TESTS

# %% check="key_questions" points=1
kept, best = (key_questions()[key] for key in ("kept", "best_segment"))
### BEGIN HIDDEN TESTS
checks.number(kept, 35, to=0, what="kept", mistakes={"the inputs of the segments alone": 3})
checks.number(
    best,
    min(range(1, 65), key=lambda s: 64 / s + s),
    to=0,
    what="best_segment",
    mistakes={"the least number kept, not the segment": 16},
)
### END HIDDEN TESTS

# %% [markdown]
# **In your own words.** Why does PyTorch add to `.grad` rather than set it, and when is that
# useful? What must be remembered for the backward pass of `exp`, of `relu`, of a matrix product —
# and which of them could be computed in place?

# %% [markdown] answer="accumulate"
# A parameter used in several places of one graph needs the sum anyway; adding across calls extends
# the same rule to several graphs, so that the gradients of micro-batches add up to that of a large
# batch without holding all their activations at once (lesson 06). The price is that somebody has to
# say when to forget: `zero_grad()`.
#
# `exp` needs its result, `relu` the sign of its input or, equally, of its result, a matrix product
# both of its inputs. `exp` and `relu` can therefore overwrite their input: what backward needs is
# in the result. The inputs of a matrix product must stay as they were until backward has used them,
# which is what PyTorch's version counter watches over.

# %% [markdown]
# ## References
#
# - **Baydin, Pearlmutter, Radul & Siskind 2018**, Automatic differentiation in machine learning: a
#   survey, arXiv:1502.05767. Sections 2 and 3: what automatic differentiation is not, and the two
#   modes on one example.
# - **Griewank 1989**, On automatic differentiation, in Iri & Tanabe (eds.), Mathematical
#   Programming: Recent Developments and Applications. Reverse mode, and the bound of five
#   evaluations for a gradient.
# - **Griewank & Walther 2008**, Evaluating Derivatives, SIAM. The textbook.
# - **Chen, Xu, Zhang & Guestrin 2016**, Training deep nets with sublinear memory cost,
#   arXiv:1604.06174. Section 4: the √n schedule and its recursion.
# - **Paszke et al. 2017**, Automatic differentiation in PyTorch, NIPS Autodiff workshop. What a
#   define-by-run engine keeps, and the version counter.
# - In production: PyTorch's `torch/csrc/autograd/engine.cpp` (the reverse walk: it counts each
#   node's dependencies instead of sorting first), `tools/autograd/derivatives.yaml` (a VJP for each
#   operation), `torch/utils/checkpoint.py`; JAX's `jax/_src/interpreters/ad.py` (both modes from
#   one table of rules).
