"""What passes between the judge and a learner's process: values, gradients, modules, handles, callbacks, kernels."""

import copy
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from bench import judged
from torch import nn

from llm40 import checks, distributed

TORCH = "import torch\nfrom torch import nn\nimport torch.nn.functional as F\nimport numpy as np\n"
ECHO = TORCH + "def echo(value):\n    return value\n"

VALUES = [
    None,
    True,
    3,
    -(2**80),
    1.5,
    float("inf"),
    "text \ud800 文",
    b"\0\xff",
    (1, [2, {"a": (3,)}]),
    {1, 2},
    frozenset("ab"),
    {"k": [1], (1, 2): None},
    slice(1, None, 2),
    range(3, 9, 2),
    1 + 2j,
    ...,
    torch.float16,
    torch.device("cpu"),
    torch.Size([2, 3]),
    np.float32(1.5),
    bytearray(b"xy"),
]


def test_values_come_back_as_they_went():
    with judged(ECHO) as names:
        for value in VALUES:
            back = names["echo"](value)
            assert type(back) is type(value)
            assert back == value


DTYPES = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "uint8", "bool", "complex64"]


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in DTYPES])
def test_tensors_keep_dtype_shape_and_strides(dtype):
    describe = (
        TORCH + "def describe(t):\n    return str(t.dtype), tuple(t.shape), t.stride(), t.double().sum().item()\n"
    )
    base = torch.arange(24).reshape(2, 3, 4).to(dtype)
    if dtype == torch.complex64:
        describe = describe.replace("t.double()", "t.real")
    with judged(describe) as names:
        for t in (base, base.transpose(0, 2), base[:, :, 1:3], base[:, :1], base[0, 0, 0], base[:0], base[:, None, 0]):
            total = (t.real if t.is_complex() else t.double()).sum().item()
            assert names["describe"](t) == (str(dtype), tuple(t.shape), t.stride(), total)


def test_expanded_tensors_and_arrays():
    with judged(ECHO) as names:
        wide = torch.arange(3.0)[:, None].expand(3, 4)
        assert names["echo"](wide).stride() == (1, 0)
        array = np.asfortranarray(np.arange(6).reshape(2, 3))
        assert names["echo"](array).flags.f_contiguous


def test_an_array_that_stands_in_a_value_twice_is_one_array_at_the_other_end():
    learner = TORCH + (
        "from collections import namedtuple\nPair = namedtuple('Pair', 'a b')\n"
        "def add_(make):\n    first, second = make()\n    first += 1\n    return first is second, second\n"
        "def twice():\n    a = np.zeros(2)\n    return [a, Pair(np.ones(1), a), {'a': a}]\n"
        "def spoil_(x, rows):\n    x += 1\n    return len(rows)\n"
        "def keep(rows):\n    return rows[0] is rows[1]\n"
    )
    with judged(learner) as names:
        array = np.zeros(2)
        same, second = names["add_"](lambda: (array, array))
        assert same
        assert second.tolist() == [1, 1]
        assert names["add_"](lambda: (array, array.copy()))[0] is False
        one, pair, table = names["twice"]()
        assert one is pair.b is table["a"]
        assert one is not pair.a
        rows = [array]
        assert names["spoil_"](array, rows) == 1
        assert array.tolist() == [1, 1]
        rows = [array, array]
        assert names["keep"](rows)
        assert rows[0] is rows[1] is array


def test_changes_in_place_come_back():
    learner = TORCH + (
        "def spoil_(t, rows, table, array):\n"
        "    t.add_(1)\n    rows.append(4)\n    table['new'] = rows\n    array[0] = 9\n"
    )
    with judged(learner) as names:
        base = torch.zeros(2, 3)
        rows, table, array = [1], {}, np.zeros(2)
        names["spoil_"](base[:, 1], rows, table, array)
        assert base.tolist() == [[0, 1, 0], [0, 1, 0]]
        assert (rows, table, array.tolist()) == ([1, 4], {"new": [1, 4]}, [9, 0])


def test_a_change_of_the_judges_reaches_an_object_that_kept_the_tensor():
    learner = TORCH + (
        "class Rule:\n    def __init__(self, params):\n        self.params = list(params)\n"
        "    def step(self):\n        for p in self.params:\n            p.data -= p.grad\n"
    )
    with judged(learner) as names:
        weight = nn.Parameter(torch.ones(3))
        rule = names["Rule"]([weight])
        for _ in range(2):
            weight.grad = torch.full((3,), 0.25)
            rule.step()
        assert weight.tolist() == [0.5] * 3
        with torch.no_grad():
            weight.fill_(2.0)
        assert rule.params[0] is weight
        rule.step()
        assert weight.tolist() == [1.75] * 3


def test_another_storage_at_one_end_is_another_storage_at_the_other():
    learner = TORCH + (
        "def move_(t):\n    t.data = t.data + 1\n"
        "def add_(t):\n    t.data += 1\n"
        "def keep(t):\n    global view\n    view = t.detach()\n"
        "def seen():\n    return view.tolist()\n"
    )
    with judged(learner) as names:
        weight = nn.Parameter(torch.zeros(2))
        view, place = weight.detach(), weight.data_ptr()
        for value in (1.0, 2.0):
            names["add_"](weight)
            assert (weight.data_ptr(), view.tolist()) == (place, [value] * 2)
        names["move_"](weight)
        assert weight.data_ptr() != place
        assert (weight.tolist(), view.tolist()) == ([3.0] * 2, [2.0] * 2)
        names["add_"](weight)
        assert weight.tolist() == [4.0] * 2
        names["keep"](weight)
        weight.data.fill_(5.0)
        assert names["seen"]() == [5.0] * 2
        weight.data = torch.full((2,), 6.0)
        assert names["seen"]() == [5.0] * 2


def test_gradients_of_every_order():
    learner = TORCH + "def f(x, w):\n    return (x @ w).sin(), (x * 2).detach()\n"
    with judged(learner) as names:
        x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        w = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, w: names["f"](x, w)[0], (x, w))
        assert torch.autograd.gradgradcheck(lambda x, w: names["f"](x, w)[0], (x, w))
        assert not names["f"](x, w)[1].requires_grad
        y = names["f"]((x * 3).tanh(), w)[0]  # behind and before it, graphs of the judge's own
        y.exp().sum().backward()
        ours = torch.autograd.grad(((x * 3).tanh() @ w).sin().exp().sum(), (x, w))
        for t, grad in zip((x, w), ours, strict=True):
            checks.close(t.grad, grad)


def test_a_checks_function_inside_the_transforms_of_torch_func():
    learner = TORCH + (
        "def jacobian(f, x):\n    return torch.func.jacrev(f)(x)\n"
        "def slopes(f, x):\n    return torch.func.vmap(torch.func.grad(lambda t: f(t).sum()))(x)\n"
        "def curvature(f, x):\n    return torch.func.jacrev(torch.func.jacrev(lambda t: f(t).sum()))(x)\n"
        "def rows(f, x, i):\n    return torch.func.vmap(f, in_dims=(1, 0))(x, i)\n"
        "def table(f, x):\n    return torch.func.vjp(f, x)[1]({'a': torch.ones_like(x), 'n': torch.ones_like(x[0])})\n"
        "def first(f, x):\n    return torch.func.jacrev(lambda t: f(t)[1])(x)\n"
    )
    x, w = torch.randn(3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    with judged(learner) as names:
        calls = []

        def f(t):
            calls.append(t.shape)
            return (w @ t.exp()) * t.sum()

        checks.close(names["jacobian"](f, x), torch.func.jacrev(f)(x))
        assert len(calls) == 2  # once there, once here
        checks.close(names["curvature"](f, x), torch.func.hessian(lambda t: f(t).sum())(x))
        many = torch.randn(5, 3, dtype=torch.float64)
        checks.close(names["slopes"](f, many), torch.func.vmap(torch.func.grad(lambda t: f(t).sum()))(many))
        checks.close(names["rows"](lambda t, i: t[0] * i, many, torch.arange(3)), many[0] * torch.arange(3))
        assert names["jacobian"](lambda t: torch.ones(2), x).tolist() == [[0.0] * 3] * 2
        (grad,) = names["table"](lambda t: {"a": t * 3, "n": t.sum()}, x)
        checks.close(grad, torch.full((3,), 4.0, dtype=torch.float64))
        checks.close(names["first"](lambda t: (None, t * 2, None), x), 2 * torch.eye(3, dtype=torch.float64))


def test_results_of_one_call_in_another():
    learner = TORCH + "def logits(x, w):\n    return x @ w\ndef loss(z):\n    return z.square().sum()\n"
    with judged(learner) as names:
        x, w = torch.randn(3, 2), torch.randn(2, 4, requires_grad=True)
        names["loss"](names["logits"](x, w)).backward()
        checks.close(w.grad, 2 * x.T @ (x @ w.detach()))


def test_gradients_stay_as_a_call_leaves_them_and_the_default_dtype_does_not():
    learner = TORCH + (
        "def off(fails=False):\n    torch.set_grad_enabled(False)\n    if fails:\n        raise KeyError\n"
        "def wide():\n    torch.set_default_dtype(torch.float64)\n"
        "def back():\n    torch.set_grad_enabled(True)\n    torch.set_default_dtype(torch.float32)\n"
        "def call(f):\n    with torch.no_grad():\n        f()\n    return torch.is_grad_enabled()\n"
    )
    with judged(learner) as names:
        for left in (lambda: names["off"](), lambda: checks.raises(KeyError, names["off"], True)):
            assert torch.is_grad_enabled()
            left()
            assert not torch.is_grad_enabled()
            names["back"]()
        with pytest.raises(AssertionError, match="the default dtype of PyTorch is another one after the call"):
            names["wide"]()
        assert torch.get_default_dtype() == torch.float32  # or what a check makes next would be of it
        with torch.no_grad():
            names["back"]()
            assert torch.is_grad_enabled()
            torch.set_grad_enabled(False)
        assert names["call"](lambda: None)
        assert torch.is_grad_enabled()
        with pytest.raises(AssertionError, match="is_grad_enabled"), checks.kept():
            names["off"]()
        names["back"]()


def test_modes_and_random_numbers_go_along():
    learner = TORCH + (
        "def modes():\n"
        "    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()\n"
        "def draw(generator):\n    return torch.rand(2, generator=generator), torch.rand(2)\n"
    )
    with judged(learner) as names:
        assert names["modes"]() == (True, False, torch.float32)
        with torch.no_grad():
            assert names["modes"]()[0] is False
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(7)
        first, second = names["draw"](generator)
        rest = torch.rand(1, generator=generator), torch.rand(1)
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(7)
        assert torch.equal(first, torch.rand(2, generator=generator))
        assert torch.equal(second, torch.rand(2))
        assert rest == (torch.rand(1, generator=generator), torch.rand(1))


MODEL = TORCH + (
    "class Model(nn.Module):\n"
    "    def __init__(self, width):\n"
    "        super().__init__()\n"
    "        self.first = nn.Linear(2, width)\n"
    "        self.register_buffer('seen', torch.zeros(()))\n"
    "        self.scale = 2.0\n"
    "    def forward(self, x):\n"
    "        self.seen += 1\n"
    "        return self.scale * self.first(x) if self.training else self.first(x)\n"
    "    def parameters(self, recurse=True):\n"
    "        return iter([p.detach().clone() for p in super().parameters()])\n"
)


def test_modules_parameters_are_the_judges():
    with judged(MODEL) as names:
        model = names["Model"](3)
        assert isinstance(model, nn.Module)
        assert type(model.first) is nn.Linear
        assert set(model.state_dict()) == {"first.weight", "first.bias", "seen"}
        with torch.no_grad():
            for p in model.parameters():  # nn.Module's own, whatever the learner's class overrides
                p.fill_(0.5)
        x = torch.ones(1, 2, requires_grad=True)
        checks.close(model(x), torch.full((1, 3), 3.0))
        checks.close(model.eval()(x), torch.full((1, 3), 1.5))
        assert model.seen == 2
        model(x).sum().backward()
        assert model.first.weight.grad.tolist() == [[1.0, 1.0]] * 3
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.first.bias.zero_()
        assert not torch.equal(twin(x), model(x))
        assert model.double()(x.double()).dtype == torch.float64
        model.scale = 10.0
        checks.close(model.train()(x.double()), torch.full((1, 3), 15.0, dtype=torch.float64))


def test_hooks_of_the_judge_run_and_go():
    with judged(MODEL) as names:
        model, seen = names["Model"](3), []
        handle = model.first.register_forward_hook(lambda module, inputs, output: seen.append((module, output)))
        out = model.eval()(torch.ones(4, 2))
        ((module, output),) = seen
        assert module is model.first
        checks.close(output, out.detach())
        handle.remove()
        model(torch.ones(4, 2))
        assert len(seen) == 1


def test_modules_of_the_judge_are_built_at_the_other_end():
    learner = TORCH + (
        "def init(model):\n"
        "    for m in model.modules():\n"
        "        if isinstance(m, nn.Linear):\n"
        "            nn.init.ones_(m.weight)\n"
        "    model.alpha = 3.0\n"
        "    return model\n"
    )
    with judged(learner) as names:
        model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        assert names["init"](model) is model
        assert model[0].weight.unique().tolist() == [1.0]
        assert model.alpha == 3.0


def test_hooks_on_modules_of_the_judge_are_at_both_ends():
    learner = TORCH + (
        "def count(model):\n    return [len(m._forward_hooks) for m in model]\n"
        "def clear(model):\n    for m in model:\n        m._forward_hooks.clear()\n"
        "def norms(model, loss):\n"
        "    found, handles = [], []\n"
        "    for m in model:\n"
        "        hook = lambda module, into, out: found.append((module is model[0], out[0].tolist()))\n"
        "        handles.append(m.register_full_backward_hook(hook))\n"
        "    loss().backward()\n"
        "    for handle in handles:\n        handle.remove()\n"
        "    return found\n"
        "def add(model, run):\n"
        "    handles = [model[0].register_forward_hook(lambda m, i, out: out + 1) for _ in range(40)]\n"
        "    out = run()\n"
        "    for handle in handles:\n        handle.remove()\n"
        "    return out\n"
    )
    with judged(learner) as names:
        model, seen = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)), []
        model[1].weight.data.fill_(3.0)
        x = torch.ones(1, 1, requires_grad=True)
        handles = [model[0].register_forward_hook(lambda *_: seen.append(1)) for _ in range(40)]  # numbered as there
        assert names["norms"](model, lambda: model(x).sum()) == [(False, [[1.0]]), (True, [[3.0]])]
        assert not any(m._backward_hooks for m in model)
        seen.clear()
        checks.close(names["add"](model, lambda: model(x)), 3 * (model(x) / 3 + 40))
        assert len(seen) == 80  # the judge's own stay, each once
        assert names["count"](model) == [40, 0]
        handles.pop().remove()
        assert names["count"](model) == [39, 0]
        names["clear"](model)
        assert len(model[0]._forward_hooks) == 0


def test_a_gradient_is_put_back_after_an_error():
    learner = TORCH + (
        "def run(model, loss):\n"
        "    old = model.weight.grad\n    model.weight.grad = None\n"
        "    try:\n        loss()\n    finally:\n        model.weight.grad = old\n"
    )
    with judged(learner) as names:
        model = nn.Linear(1, 1)
        model.weight.grad = torch.full((1, 1), 7.0)

        def loss():
            assert model.weight.grad is None
            raise KeyError("no loss")

        names["run"](model, lambda: None)  # both ends know the gradient
        with pytest.raises(KeyError, match="no loss"):
            names["run"](model, loss)
        assert model.weight.grad.item() == 7.0


HANDLES = TORCH + (
    "class Vector:\n"
    "    def __init__(self, *values):\n"
    "        self.values = list(values)\n"
    "    def __add__(self, other):\n"
    "        return Vector(*(a + b for a, b in zip(self.values, other.values)))\n"
    "    def __getitem__(self, i):\n"
    "        return self.values[i]\n"
    "    def __len__(self):\n"
    "        return len(self.values)\n"
    "    def __iter__(self):\n"
    "        return iter(self.values)\n"
    "    def __eq__(self, other):\n"
    "        return True\n"
    "    def __hash__(self):\n"
    "        return 1\n"
    "    @property\n"
    "    def size(self):\n"
    "        raise KeyError('no size')\n"
    "    @classmethod\n"
    "    def zeros(cls, n):\n"
    "        return cls(*[0] * n)\n"
    "def numbers():\n"
    "    yield from (1, 2, 3)\n"
    "def counter():\n"
    "    count = 0\n"
    "    def up():\n"
    "        nonlocal count\n"
    "        count += 1\n"
    "        return count\n"
    "    return up\n"
)


def test_handles():
    with judged(HANDLES) as names:
        a = names["Vector"](1, 2)
        both = a + names["Vector"](3, 4)
        assert (list(both), both[1], len(both), both.values) == ([4, 6], 6, 2, [4, 6])
        assert isinstance(both, names["Vector"])
        assert not isinstance(3, names["Vector"])
        assert len(names["Vector"].zeros(5)) == 5
        with pytest.raises(KeyError, match="no size"):
            a.size  # noqa: B018
        with pytest.raises(AttributeError):
            a.missing  # noqa: B018
        a.values = [7]
        assert a[0] == 7
        assert list(names["numbers"]()) == [1, 2, 3]
        up = names["counter"]()
        assert (up(), up()) == (1, 2)


def test_a_learners_patch_of_a_class_is_seen_by_both():
    with judged(HANDLES) as names:
        calls, plain = [], names["Vector"].__add__
        names["Vector"].__add__ = lambda self, other: (calls.append(1), plain(self, other))[1]
        assert list(names["Vector"](1) + names["Vector"](2)) == [3]
        assert calls == [1]


def test_what_cannot_be_hashed_cannot_be_hashed_at_the_other_end():
    learner = TORCH + (
        "class Alike:\n    __hash__ = None\n    def __eq__(self, other):\n        return True\n"
        "class Own:\n    def __len__(self):\n        return 1\n"
        "def distinct(*nodes):\n    return len(set(nodes))\n"
    )

    class Node:
        def __len__(self):
            return 1

    class Same(Node):
        __hash__ = None

        def __eq__(self, other):
            return True

    with judged(learner) as names:
        node = Node()
        assert names["distinct"](node, node, Node()) == 2
        with pytest.raises(TypeError, match="unhashable"):
            names["distinct"](Same(), Same())
        assert len({names["Own"](), names["Own"]()}) == 2
        with pytest.raises(TypeError, match="unhashable"):
            hash(names["Alike"]())


def test_callbacks_and_their_gradients():
    learner = TORCH + "def twice(f, x):\n    return f(f(x)) + f.__name__.count('z')\n"
    with judged(learner) as names:
        x = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
        calls = []

        def square(t):
            calls.append(t)
            return t * t

        assert torch.autograd.gradcheck(lambda x: names["twice"](square, x), (x,))
        assert len(calls) >= 2


def test_a_module_with_a_list_beside_a_list_that_is_changed():
    learner = TORCH + (
        "def extend(values, *, model=None, notes=()):\n"
        "    values.append(model.in_features)\n    notes.append(len(model.seen))\n"
    )
    with judged(learner) as names:
        for order in ("values first", "model first"):
            model, values, notes = nn.Linear(3, 2), [1], [7]
            model.seen = [[4], [5]]
            if order == "values first":
                names["extend"](values, model=model, notes=notes)
            else:
                names["extend"](model=model, notes=notes, values=values)
            assert (values, notes, model.seen) == ([1, 3], [7, 2], [[4], [5]])


def test_a_result_that_a_callback_saw_in_a_dictionary():
    """The best of several states, as a soup of models is chosen: the learner keeps what it has just had scored."""
    choose = TORCH + (
        "def choose(states, score):\n"
        "    best, best_score = None, float('-inf')\n"
        "    for state in states:\n"
        "        mixed = {name: t * 2 for name, t in state.items()}\n"
        "        if (found := score(mixed)) > best_score:\n"
        "            best, best_score = mixed, found\n"
        "    return best\n"
    )
    with judged(choose) as names:
        best = names["choose"]([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}], lambda s: s["w"].sum().item())
        assert best["w"].tolist() == [6.0]


def test_a_callback_that_raises():
    learner = TORCH + (
        "def call(f):\n    try:\n        f()\n    except LookupError as error:\n        return str(error)\n"
    )
    with judged(learner) as names:

        def fail():
            raise LookupError("not here")

        assert names["call"](fail) == "not here"


GIVEN = TORCH + (
    "from dataclasses import dataclass\nfrom typing import NamedTuple\n"
    "@dataclass\nclass Config:\n    width: int\n    parts: list\n"
    "class Pair(NamedTuple):\n    left: int\n    right: int\n"
    "class Wrong(ValueError):\n    pass\n"
    "def helper(x):\n    return x + 1\n"
)


def test_what_given_cells_define_is_at_both_ends():
    learner = (
        "def widen(config):\n    config.width *= 2\n    config.parts.append(1)\n"
        "    return Config(1, []), Pair(1, 2), helper\n"
        "def fail():\n    raise Wrong('no')\n"
    )
    with judged(learner, GIVEN) as names:
        config = names["Config"](2, [])
        made, pair, helper = names["widen"](config)
        assert (config.width, config.parts) == (4, [1])
        assert made == names["Config"](1, [])
        assert pair == names["Pair"](1, 2)
        assert type(pair) is names["Pair"]
        assert helper is names["helper"]
        with pytest.raises(names["Wrong"], match="no"):
            names["fail"]()


def test_a_long_chain_of_plain_objects():
    learner = (
        "def length(node):\n    n = 0\n    while node is not None:\n        node, n = node.next, n + 1\n    return n\n"
    )

    class Node:
        def __init__(self, next):
            self.next = next

    Node.__module__ = "__main__"
    with judged(learner) as names:
        node = None
        for _ in range(5000):
            node = Node(node)
        assert names["length"](node) == 5000


def test_exceptions_keep_their_class_and_text():
    learner = TORCH + (
        "class Mine(KeyError):\n    pass\n"
        "def fail(kind):\n"
        "    if kind == 'mine':\n        raise Mine('a', 1)\n"
        "    if kind == 'exit':\n        raise SystemExit(3)\n"
        "    if kind == 'torch':\n        torch.ones(2) @ torch.ones(3)\n"
        "    raise NotImplementedError\n"
    )
    with judged(learner) as names:
        with pytest.raises(KeyError) as caught:
            names["fail"]("mine")
        assert type(caught.value).__name__ == "Mine"
        assert caught.value.args == ("a", 1)
        with pytest.raises(RuntimeError, match="3") as caught:
            names["fail"]("exit")
        assert type(caught.value).__name__ == "SystemExit"
        with pytest.raises(RuntimeError, match=r"size|dimension"):
            names["fail"]("torch")
        with pytest.raises(NotImplementedError):
            names["fail"]("")


def test_measurements_are_taken_where_the_learners_code_runs():
    learner = TORCH + "def f(x):\n    return F.softmax(x @ x.T, -1)\n"
    x = torch.ones(10, 3)
    with judged(learner) as names:
        with checks.allocations() as made:
            names["f"](x)
        assert made.largest == 100
        with checks.calls("softmax") as counted:
            names["f"](x)
        assert counted["softmax"] == 1
        with pytest.raises(AssertionError, match="softmax of PyTorch is called"), checks.forbidden("softmax"):
            names["f"](x)


# --- what the learner's end may not do ---------------------------------------------------------------------------


def test_a_callback_gives_nothing_away():
    learner = (
        "def spy(f):\n"
        "    found = []\n"
        "    for name in ('__globals__', '__code__', '__closure__', '__self__', '__class__'):\n"
        "        try:\n"
        "            found.append((name, str(getattr(f, name))))\n"
        "        except AttributeError:\n"
        "            pass\n"
        "    return found\n"
    )
    secret = "the expected value"
    with judged(learner) as names:
        found = names["spy"](lambda: secret)
        assert "expected value" not in str(found)
        assert all("test_link" not in text for _, text in found)


def test_attributes_of_a_checks_object_are_public_ones_only():
    learner = "def read(thing, name):\n    return getattr(thing, name)\n"

    class Thing:
        def __init__(self):
            self.open, self._closed = 1, 2

        def method(self):
            return 3

    with judged(learner) as names:
        thing = Thing()
        assert names["read"](thing, "open") == 1
        assert names["read"](thing, "method")() == 3
        with pytest.raises(Exception, match="may not ask"):
            names["read"](thing, "_closed")


def test_garbage_on_the_socket_is_told_apart_from_an_answer():
    learner = (
        "import gc, os\n"
        "def answer(x):\n"
        "    for file in os.listdir('/proc/self/fd'):\n"
        "        try:\n"
        "            if 'socket' in os.readlink(f'/proc/self/fd/{file}'):\n"
        "                os.write(int(file), b'\\xff' * 64)\n"
        "        except OSError:\n"
        "            pass\n"
    )
    with judged(learner) as names, pytest.raises(Exception, match=r"message|closed|reset"):
        names["answer"](1)


REACHING = """
import gc
from autograder.judge.agent import Agent

def link():
    return next(o for o in gc.get_objects() if type(o) is Agent)

def number(model):
    return link().built_numbers[id(model)]
"""


@pytest.mark.parametrize(
    "act",
    [
        "return link().call(['method', number(model), 'parameters'], (), {}).gi_frame",
        "return link().request_attribute(['object', number(model)], 'compile')",
        "return model.generator().gi_frame",
    ],
    ids=["parameters", "compile", "a check's own generator"],
)
def test_nothing_leads_from_what_a_check_hands_over_into_its_process(act):
    """From a frame one would reach all names, and from them everything."""
    learner = TORCH + REACHING + f"def reach(model):\n    {act}\n"

    class Holder(nn.Linear):
        def generator(self):
            secret = 4711
            yield secret

    model = Holder(2, 2) if "generator" in act else nn.Linear(2, 2)
    told = r"handed over|a check's own|no attribute"
    with judged(learner, asked=["reach"]) as names, pytest.raises(Exception, match=told):
        names["reach"](model)


def test_a_copy_that_the_learners_end_asks_for_is_of_a_checks_object():
    """What it writes down itself may have a `__reduce_ex__` that `copy.copy` would call in the judge's process."""
    learner = REACHING + (
        "def reduce(protocol):\n    return (dict, (), {'close': print})\n"
        "class Own:\n    pass\n"
        "def copied(x):\n    own = Own()\n    own.__reduce_ex__ = reduce\n"
        "    return link().call(['library', 'copy:copy'], (own,), {})\n"
    )
    close = checks.close
    with (
        judged(learner, asked=["copied"]) as names,
        pytest.raises(Exception, match="a copy of what is no check's object"),
    ):
        names["copied"](torch.ones(2))
    assert checks.close is close


def test_a_module_of_the_learners_does_not_decide_what_it_equals():
    learner = TORCH + (
        "seen = []\n"
        "class Liar(nn.Module):\n"
        "    @classmethod\n    def __torch_function__(cls, func, types, args=(), kwargs=None):\n"
        "        seen.append(args)\n        return True\n"
        "    __contains__ = lambda self, other: True\n"
        "def lie():\n    return Liar()\n"
        "def count():\n    return len(seen)\n"
    )
    with judged(learner, asked=["lie", "count"]) as names:
        lie = names["lie"]()
        for judge in (lambda: torch.equal(lie, torch.ones(3)), lambda: 4711 in lie):
            with pytest.raises((TypeError, AssertionError)):
                assert judge()
        assert names["count"]() == 0


SPOILING = {
    "in the backward pass": (
        "class Double(torch.autograd.Function):\n"
        "    @staticmethod\n    def forward(ctx, x):\n        ctx.x = x\n        return x * 2\n"
        "    @staticmethod\n    def backward(ctx, g):\n        ctx.x.data.zero_()\n        return torch.zeros_like(g)\n"
        "def f(x):\n    return Double.apply(x)\n",
        "x.requires_grad_()\nf(x).sum().backward()",
    ),
    "in a property": (
        "class f:\n    def __init__(self, x):\n        self.x = x\n"
        "    @property\n    def value(self):\n        self.x.zero_()\n        return torch.zeros(4)\n",
        "f(x).value",
    ),
    "by a view of it": (
        "kept = []\ndef f(x):\n    kept.append(x)\n    if len(kept) == 2:\n        kept[0].zero_()\n    return x\n",
        "rows = x.view(2, 2)\nf(rows)\nf(x)",
    ),
}


@pytest.mark.parametrize("how", SPOILING)
def test_what_a_check_handed_over_stays_as_it_is(how):
    learner, check = SPOILING[how]
    with judged(TORCH + learner, asked=["f", "g"]) as names, pytest.raises(AssertionError, match="must stay as it is"):
        exec(check, {**names, "x": torch.arange(4.0) + 1})


def test_an_argument_may_be_nudged_and_put_back():
    learner = (
        "def slope(f, x):\n    old = x[0].item()\n    x[0] = old + 1e-3\n    above = f(x)\n    x[0] = old\n"
        "    return (above - f(x)) / 1e-3\n"
    )
    with judged(learner) as names:
        x = torch.ones(2, dtype=torch.float64)
        assert abs(float(names["slope"](lambda t: t.square().sum(), x)) - 2.001) < 1e-6


def test_only_names_that_were_asked_for_come():
    learner = (
        "from autograder.judge.agent import Agent\nreal = Agent.describe\n"
        "Agent.describe = lambda self, request: real(self, request) | {'checks': 3, 'abs': lambda x: 0}\n"
        "def f():\n    return 1\n"
    )
    with judged(learner) as names:
        assert names["f"]() == 1
        assert "abs" not in names
        assert names.get("checks") != 3


def test_a_copy_of_a_checks_module_is_a_module():
    learner = TORCH + "import copy\ndef twin(model):\n    return copy.deepcopy(model)(torch.ones(2))\n"

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x):
            return x * self.weight

    with judged(learner) as names:
        assert names["twin"](Tiny()).tolist() == [1, 1]


def test_launches_are_counted_by_the_check():
    pytest.importorskip("triton")
    learner = (
        "from llm40 import tl, triton\n"
        "@triton.jit\ndef copy(x, y, n, BLOCK: tl.constexpr):\n"
        "    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\n"
        "    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)\n"
    )
    with judged(learner, asked=["copy"]) as names, checks.launches() as counted:
        x, y = torch.randn(64), torch.empty(64)
        names["copy"][lambda meta: (-(-64 // meta["BLOCK"]),)](x, y, 64, BLOCK=16)
        assert torch.equal(x, y)
    assert (counted.count, counted.programs) == (1, 4)


def test_a_function_that_changes_its_argument_is_told():
    learner = TORCH + (
        "def zeroed(x, out):\n    out.fill_(1)\n    x.zero_()\n    return x\n"
        "def zero_(x):\n    return x.zero_()\n"
        "def kept(x, out):\n    out.copy_(x)\n    return out\n"
    )
    with judged(learner) as names:
        with pytest.raises(AssertionError, match="zeroed changes its argument number 1"):
            names["zeroed"](torch.ones(3), torch.ones(3))
        assert names["zero_"](torch.ones(3)).tolist() == [0, 0, 0]
        assert names["kept"](torch.ones(3), torch.zeros(3)).tolist() == [1, 1, 1]


def test_the_default_device_holds_at_the_other_end():
    with judged(TORCH + "def layer(n):\n    return nn.Linear(n, n)\n") as names:
        with torch.device("meta"):
            assert {str(p.device) for p in names["layer"](100_000).parameters()} == {"meta"}
        assert {str(p.device) for p in names["layer"](3).parameters()} == {"cpu"}


def test_gradients_at_what_hooks_put_in_reach_every_layer():
    learner = TORCH + (
        "def at_outputs(model, loss):\n"
        "    zeros = []\n"
        "    def add(module, inputs, output):\n"
        "        zeros.append(torch.zeros_like(output, requires_grad=True))\n"
        "        return output + zeros[-1]\n"
        "    handles = [layer.register_forward_hook(add) for layer in model]\n"
        "    value = loss()\n"
        "    for handle in handles:\n        handle.remove()\n"
        "    return [g.tolist() for g in torch.autograd.grad(value, zeros)]\n"
    )
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer, weight in zip(model, (7.0, 2.0, 3.0), strict=True):
        nn.init.constant_(layer.weight, weight)
    x = torch.ones(1, 1)
    with judged(learner) as names:
        assert names["at_outputs"](model, lambda: model(x).sum()) == [[[6.0]], [[3.0]], [[1.0]]]


def test_an_object_may_go_before_numpy():
    learner = TORCH + (
        "class Sum:\n    __array_priority__ = 1\n    def __init__(self, data):\n        self.data = data\n"
        "    def __radd__(self, other):\n        return Sum(other + self.data)\n"
    )
    with judged(learner) as names:
        assert (np.ones((2, 3)) + names["Sum"](np.arange(3.0))).data.tolist() == [[1, 2, 3]] * 2


def test_the_links_own_calls_are_not_counted():
    learner = TORCH + "def apply(f, x):\n    return f(x) * 2\n"
    with judged(learner) as names:
        x = torch.ones(3, requires_grad=True)
        with checks.forbidden("torch.enable_grad", "torch.autograd.grad", "torch.set_grad_enabled"):
            names["apply"](lambda t: t.square(), x).sum().backward()
        assert x.grad.tolist() == [4, 4, 4]


# --- ranks ------------------------------------------------------------------------------------------------------------

RANKS = TORCH + (
    "import torch.distributed as dist\n"
    "def ring_sum(t):\n"
    "    t = t.clone()\n"
    "    dist.all_reduce(t)\n"
    "    return t, dist.get_rank(), dist.get_world_size()\n"
    "def hang(t):\n"
    "    if dist.get_rank() == 0:\n"
    "        dist.barrier()\n"
    "    return t\n"
    "def fail(t):\n"
    "    if dist.get_rank() == 1:\n"
    "        raise ValueError('rank one does not like it')\n"
    "    return t\n"
)


def test_each_rank_of_a_check_has_a_twin_of_the_learners_process():
    with judged(RANKS) as names:
        results = distributed.launch(lambda rank: names["ring_sum"](torch.full((3,), float(rank + 1))), 3)
        assert [(t.tolist(), rank, ranks) for t, rank, ranks in results] == [([6.0] * 3, r, 3) for r in range(3)]
        assert distributed.launch(lambda rank: names["ring_sum"](torch.ones(1))[0].item(), 2) == [2.0, 2.0]


def test_a_rank_that_raises_or_hangs_ends_the_launch():
    with judged(RANKS) as names:
        with pytest.raises(ValueError, match="rank one"):
            distributed.launch(lambda rank: names["fail"](torch.ones(1)), 2)
        with pytest.raises(TimeoutError, match="rank"):
            distributed.launch(lambda rank: names["hang"](torch.ones(1)), 2, timeout=3)
        assert distributed.launch(lambda rank: names["ring_sum"](torch.ones(1))[1], 2) == [0, 1]


# --- servers ----------------------------------------------------------------------------------------------------------

SERVER = (
    "import http.server, os, socketserver, tempfile, threading\n"
    "class Answers(http.server.BaseHTTPRequestHandler):\n"
    "    protocol_version = 'HTTP/1.1'\n"
    "    def address_string(self):\n"
    "        return 'client'\n"
    "    def log_message(self, *about):\n"
    "        pass\n"
    "    def do_POST(self):\n"
    "        said = self.rfile.read(int(self.headers['Content-Length']))\n"
    "        self.send_response(200)\n"
    "        self.send_header('Transfer-Encoding', 'chunked')\n"
    "        self.end_headers()\n"
    "        for word in said.split():\n"
    "            self.wfile.write(b'%x\\r\\n%s\\r\\n' % (len(word), word[::-1]))\n"
    "        self.wfile.write(b'0\\r\\n\\r\\n')\n"
    "class Threads(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):\n"
    "    daemon_threads = True\n"
    "def start():\n"
    "    path = os.path.join(tempfile.mkdtemp(), 'server')\n"
    "    threading.Thread(target=Threads(path, Answers).serve_forever, daemon=True).start()\n"
    "    return path\n"
    "def nowhere():\n"
    "    return '/nowhere/server'\n"
)


def test_a_learners_server_is_reached_from_the_judges_process():
    with judged(SERVER) as names, checks.reachable(names["start"]()) as path:
        with httpx.Client(transport=httpx.HTTPTransport(uds=path)) as client:
            for text in ("one two three", "x" * 300_000):
                assert client.post("http://lesson/", content=text).text == "".join(w[::-1] for w in text.split())
        with ThreadPoolExecutor(4) as pool, httpx.Client(transport=httpx.HTTPTransport(uds=path)) as client:
            answers = pool.map(lambda i: client.post("http://lesson/", content=f"request{i}").text, range(12))
            assert list(answers) == [f"request{i}"[::-1] for i in range(12)]


def test_a_server_that_is_not_there_refuses():
    with judged(SERVER) as names, checks.reachable(names["nowhere"]()) as path, pytest.raises(httpx.TransportError):
        httpx.Client(transport=httpx.HTTPTransport(uds=path)).post("http://lesson/", content="hello")


KERNEL = """
from llm40 import tl, triton

@triton.jit
def copy_rows(x, y, x_row, y_row, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)ROW
    i = tl.arange(0, BLOCK)
    tl.store(y + row * y_row + i, tl.load(x + row * x_row + i, mask=i < n), mask=i < n)
"""


@pytest.mark.parametrize("wide", [True, False])
def test_where_kernels_read_and_write_is_told_in_the_judges_addresses(wide, tmp_path):
    source = KERNEL.replace("ROW", ".to(tl.int64)" if wide else "")
    file = tmp_path / "learner.py"  # Triton reads a kernel's text
    file.write_text(source, encoding="utf-8")
    learner = f"import runpy\ncopy_rows = runpy.run_path({str(file)!r})['copy_rows']\n"
    x, y = torch.arange(12.0).view(3, 4), torch.zeros(3, 6)
    with judged(learner, asked=["copy_rows"]) as names:
        with checks.traffic() as seen:
            names["copy_rows"][3,](x, y, 4, 6, 3, BLOCK=4)
        assert set(seen.read) == checks.addresses(x[:, :3])
        assert set(seen.written) == checks.addresses(y[:, :3])
        assert torch.equal(y[:, :3], x[:, :3])
        with checks.traffic(dry=True) as seen:
            names["copy_rows"][4,](x, y, 2**30, 2**30, 3, BLOCK=4)
        assert (set(seen.read) == checks.addresses(x, (4, 3), (2**30, 1))) is wide
        assert (set(seen.written) == checks.addresses(y, (4, 3), (2**30, 1))) is wide
        with checks.traffic(only=x) as seen:
            names["copy_rows"][3,](x, y, 4, 2**30, 3, BLOCK=4)
        assert set(seen.read) == checks.addresses(x[:, :3])
