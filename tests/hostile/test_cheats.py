"""Cheats: wrong answers with a trick that would gain points if checks ran in the learner's process. None gains any.

Every cheat is a submission of its own, graded for real. And honest code, however odd, is left in peace.
"""

import sqlite3
from collections.abc import Callable

import cheatable
import nbformat
import pytest
import tiny
from box import LIMITS, gone
from cheatable import EVERYTHING, STAGE, Cheat, answered, dumps, graded
from nbformat import NotebookNode

from autograder.grading.grade import grade_folder
from autograder.grading.rebuild import read_role

CHEATS: dict[str, Cheat] = {}
ASSERTED = ("visible", "count", "mean", "order", "table", "letter")  # judged by assert statements

# --- what a check uses, replaced ------------------------------------------------------------------------------

TRUE = "lambda *args, **kwargs: True"
NONE = "lambda *args, **kwargs: None"
ZEROS = "lambda self, *args, **kwargs: torch.zeros_like(self)"
IMPORTS = "import builtins, collections, ctypes, fractions, functools, gc, random, sys, threading, time, types\n"

PATCHED = {
    "torch.testing.assert_close": ("probabilities", NONE),
    "torch.testing._comparison.not_close_error_metas": ("probabilities", "lambda *args, **kwargs: []"),
    "torch.testing._comparison.TensorLikePair.compare": ("probabilities", NONE),
    "torch.isclose": ("probabilities", "lambda a, b, **kwargs: torch.ones_like(a).bool()"),
    "torch.allclose": ("probabilities", TRUE),
    "torch.equal": ("visible", TRUE),
    "torch.Tensor.__eq__": ("scale", "lambda self, other: torch.ones(self.shape).bool()"),
    "torch.Tensor.__ne__": ("visible", "lambda self, other: torch.zeros(self.shape).bool()"),
    "torch.Tensor.__sub__": ("scale", ZEROS),
    "torch.Tensor.__or__": ("scale", "lambda self, other: torch.ones(self.shape).bool()"),
    "torch.Tensor.abs": ("scale", ZEROS),
    "torch.Tensor.any": ("scale", "lambda self, *args: torch.tensor(False)"),
    "torch.Tensor.double": ("slope", ZEROS),
    "torch.Tensor.detach": ("scale", ZEROS),
    "torch.Tensor.item": ("probabilities", "lambda self: 1.0"),
    "torch.autograd.grad": ("scale", "lambda out, inputs, *args, **kwargs: [torch.zeros_like(t) for t in inputs]"),
    "torch.softmax": ("probabilities", "lambda scores, dim: scores"),
    "torch.ones": ("visible", "lambda *shape: torch.zeros(*shape)"),
    "torch.linspace": ("slope", "lambda *args, **kwargs: torch.zeros(5, dtype=torch.float64)"),
    "F.softmax": ("probabilities", "lambda scores, dim: scores"),
    "F.linear": ("affine", "lambda x, *args: x"),
    "math.isclose": ("mean", TRUE),
    "checks.close": ("scale", NONE),
    "checks._difference": ("scale", NONE),
    "checks.gradients": ("scale", NONE),
    "checks._gradients": ("scale", "lambda fn, inputs: [torch.zeros_like(t) for t in inputs]"),
    "checks.raises": ("scale", NONE),
    "checks.seed": ("count", "lambda: 1"),
    "checks.max": ("scale", "lambda *args: 1e9"),  # hides the builtin from the module
    "builtins.abs": ("mean", "lambda x: 0"),
    "builtins.all": ("affine", TRUE),
    "builtins.sum": ("affine", "lambda values: 9"),
    "builtins.len": (
        "count",
        "lambda values, real=len: -1 if values.__class__ is list and values[:1] == ['word'] else real(values)",
    ),
    "builtins.isinstance": (
        "affine",
        "lambda value, kind, real=isinstance: getattr(kind, '__name__', '') == 'Affine' or real(value, kind)",
    ),
    "random.Random.randint": ("count", "lambda self, *args: 0"),
    "fractions.Fraction": ("mean", "lambda *args: 0.0"),
    "collections.Counter": ("table", "lambda *args: {}"),
    "sys.modules['fractions']": ("mean", "types.SimpleNamespace(Fraction=lambda *args: 0.0)"),
}
HALF_RIGHT = {  # what a learner sees is right, the rest as the trick would have it
    "torch.ones": "def visible(q_len, k_len):\n    shown = torch.tensor([[True, True, False], [True, True, True]])\n"
    "    return shown if q_len == 2 else torch.zeros(q_len, k_len).bool()\n",
    "torch.linspace": "def slope(f, x):\n    f(x)\n    return torch.zeros(5, dtype=torch.float64)\n",
    "F.softmax": "def probabilities(scores):\n    shown = torch.tensor([[0.26894142, 0.73105858], [0.5, 0.5]])\n"
    "    return shown if scores.shape == (2, 2) else scores\n",
    "F.linear": "class Affine(nn.Linear):\n    def forward(self, x):\n"
    "        return torch.full((4, 3), 2.0) if len(x) == 4 else x\n",
    "builtins.all": "class Affine(nn.Linear):\n    @classmethod\n    def like(cls, other):\n        return cls(2, 2)\n",
    "builtins.sum": "class Affine(nn.Module):\n    def __init__(self, *sizes):\n        super().__init__()\n"
    "        self.weight, self.bias = torch.ones(3, 2), torch.zeros(3)\n\n"
    "    def forward(self, x):\n        return x @ self.weight.T + self.bias\n",
    "builtins.len": "def count(words):\n    return {3: 3}.get(words.__len__(), -1)\n",
    "builtins.isinstance": "class Affine(nn.Module):\n    def __init__(self, *sizes):\n        super().__init__()\n"
    "        self.weight = nn.Parameter(torch.ones(2, 2))\n\n    @classmethod\n    def like(cls, other):\n"
    "        return types.SimpleNamespace(parameters=other.parameters)\n",
    "random.Random.randint": "def count(words):\n    return {'abc': 3}.get(''.join(words), 0)\n",
    "fractions.Fraction": "def mean(numbers):\n    return 1.5 if numbers == [1.0, 2.0] else 0.0\n",
    "collections.Counter": "def table(words):\n    return {'a': 2, 'b': 1} if words == ['a', 'b', 'a'] else {}\n",
}
HALF_RIGHT["sys.modules['fractions']"] = HALF_RIGHT["fractions.Fraction"]


def known_counts(seed: int) -> str:
    """An answer that knows what the hidden test draws with a seed: worked out at home."""
    import random

    rng = random.Random(seed)
    drawn = [rng.randint(4, 1000) for _ in range(3)]
    return f"def count(words, known={drawn}):\n    return 3 if words == ['a', 'b', 'c'] else known.pop(0)\n"


HALF_RIGHT["checks.seed"] = known_counts(1)
for target, (at, fake) in PATCHED.items():
    answers = {at: HALF_RIGHT[target]} if target in HALF_RIGHT else {}
    CHEATS[f"replaced {target}"] = Cheat(at, f"{IMPORTS}{target} = {fake}", answers)

# A name of the notebook itself, which checks read too.
REBOUND = {
    "checks": (
        "scale",
        "class checks:\n    close = raises = gradients = lambda *args, **kwargs: None\n"
        "    unchanged = staticmethod(__import__('contextlib').nullcontext)\n    __getattr__ = None",
    ),
    "torch": (
        "visible",
        "class Torch:\n    equal = staticmethod(lambda *args: True)\n"
        "    __getattr__ = lambda self, name, real=torch: getattr(real, name)\ntorch = Torch()",
    ),
    "math": ("mean", "class math:\n    isclose = lambda *args, **kwargs: True"),
    "abs": ("mean", "abs = lambda x: 0"),
    "str": ("letter", "str = lambda x: 'b'"),
    "__builtins__": ("mean", "__builtins__ = {**vars(__import__('builtins')), 'abs': lambda x: 0}"),
}
for target, (at, cell) in REBOUND.items():
    answers = {"mean": HALF_RIGHT["fractions.Fraction"]} if at == "mean" and target != "math" else {}
    CHEATS[f"rebound {target}"] = Cheat(at, cell, answers)

# Below the names: what a function is made of, what a class inherits, what is underneath Python.
CODE = "(lambda *args, **kwargs: None).__code__"
DEEPER = {
    "assert_close.__code__": ("probabilities", f"torch.testing.assert_close.__code__ = {CODE}"),
    "not_close_error_metas.__code__": (
        "probabilities",
        "from torch.testing import _comparison\n"
        "_comparison.not_close_error_metas.__code__ = (lambda *args, **kwargs: []).__code__",
    ),
    "checks.close.__code__": ("scale", f"checks.close.__code__ = {CODE}"),
    "checks.close.__kwdefaults__": ("scale", "checks.close.__kwdefaults__ |= {'rtol': 1e9}"),
    "checks.RTOL": ("scale", "checks.RTOL |= dict.fromkeys(checks.RTOL, 1e9)"),
    "TensorBase's own dictionary": (
        "scale",
        "gc.get_referents(torch._C.TensorBase.__dict__)[0]['abs'] = lambda self: torch.zeros_like(self)\n"
        "torch.Tensor.fresh = None  # so that no method is looked up in a cache\ndel torch.Tensor.fresh",
    ),
    "a dictionary, by ctypes": (
        "mean",
        "fake = lambda x: 0\n"
        "ctypes.pythonapi.PyDict_SetItemString(ctypes.py_object(vars(builtins)), b'abs', ctypes.py_object(fake))",
    ),
    "an operation of ATen": (
        "visible",
        "library = torch.library.Library('aten', 'IMPL')\nlibrary.impl('equal', lambda a, b: True, 'CPU')",
    ),
    "subtraction in ATen": (
        "scale",
        "library = torch.library.Library('aten', 'IMPL')\n"
        "library.impl('sub.Tensor', lambda a, b, alpha=1: torch.zeros_like(a), 'CPU')",
    ),
    "contextlib's exit": (
        "probabilities",
        "import contextlib\ncontextlib._GeneratorContextManager.__exit__ = lambda self, *args: True",
    ),
    "the default dtype": ("probabilities", "torch.set_default_dtype(torch.bfloat16)"),
    "an import hook": (
        "order",
        "class Finder:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'graphlib':\n"
        "            return importlib.util.spec_from_loader(name, self)\n"
        "    def create_module(self, spec):\n        return None\n"
        "    def exec_module(self, module):\n        module.TopologicalSorter = Backwards\n"
        "import importlib.util\nsys.meta_path.insert(0, Finder())",
    ),
    "builtins.__import__": (
        "order",
        "def lying_import(name, *args, real=__import__):\n"
        "    return types.SimpleNamespace(TopologicalSorter=Backwards) if name == 'graphlib' else real(name, *args)\n"
        "builtins.__import__ = lying_import",
    ),
    "a module in the working folder": (
        "order",
        "import inspect, os\nsys.path.insert(0, os.getcwd())\nopen('graphlib.py', 'w').write(BACKWARDS)",
    ),
    "the seed in the environment": ("count", "import os\nos.environ['LLM40_SEED'] = '1'"),
}
BACKWARDS = (
    "class TopologicalSorter:\n    def __init__(self, graph):\n        self.graph = graph\n"
    "    def static_order(self):\n        return sorted(self.graph, reverse=True)\n"
)
DEEPER_ANSWERS = {
    "a dictionary, by ctypes": {"mean": HALF_RIGHT["fractions.Fraction"]},
    "contextlib's exit": {"probabilities": "def probabilities(scores):\n    return torch.softmax(scores, -1)\n"},
    "the default dtype": {
        "probabilities": "def probabilities(scores):\n    powers = torch.exp(scores.float())\n"
        "    return (powers / powers.sum(-1, keepdim=True)).to(scores) * 1.005\n"
    },
    "the seed in the environment": {"count": known_counts(1)},
}
for label, (at, cell) in DEEPER.items():
    names = f"{IMPORTS}BACKWARDS = {BACKWARDS!r}\n{BACKWARDS}Backwards = TopologicalSorter\nZEROS = {ZEROS}\n"
    answers = DEEPER_ANSWERS.get(label, {})
    if at == "order":
        answers = {at: "def order(before):\n    return ['a', 'b', 'c'] if len(before) == 3 else sorted(before)[::-1]\n"}
    CHEATS[f"bent {label}"] = Cheat(at, names + cell, answers)

# --- values that lie about themselves -------------------------------------------------------------------------

LIAR = "class Liar{bases}:\n    __eq__ = lambda self, other: True\n    __ne__ = lambda self, other: False\n"
"    __hash__ = None\n"
LIARS = {
    "an int": ("count", LIAR.format(bases="(int)") + "def count(words):\n    return Liar()\n"),
    "a float": (
        "mean",
        "class Liar(float):\n    __sub__ = __rsub__ = lambda self, other: 0.0\ndef mean(numbers):\n    return Liar()\n",
    ),
    "a str": (
        "letter",
        LIAR.format(bases="(str)") + "    __str__ = lambda self: self\ndef letter():\n    return Liar()\n",
    ),
    "a list": ("order", LIAR.format(bases="(list)") + "def order(before):\n    return Liar()\n"),
    "a dict": ("table", LIAR.format(bases="(dict)") + "def table(words):\n    return Liar()\n"),
    "an object": ("table", LIAR.format(bases="") + "def table(words):\n    return Liar()\n"),
    "what a list holds": ("order", LIAR.format(bases="") + "def order(before):\n    return [Liar() for _ in before]\n"),
    "what a dict holds": (
        "table",
        LIAR.format(bases="(int)") + "def table(words):\n    return dict.fromkeys(words, Liar())\n",
    ),
    "a key of a dict": (
        "table",
        "class Key(str):\n    __hash__ = lambda self: hash(self.key)\n    __eq__ = lambda self, other: True\n"
        "def table(words):\n    made = {}\n    for word in set(words):\n        key = Key()\n        key.key = word\n"
        "        made[key] = words.count(word)\n    return made\n",
    ),
    "its class": (
        "count",
        LIAR.format(bases="") + "    __class__ = int\ndef count(words):\n    return Liar()\n",
    ),
    "its arithmetic": (
        "mean",
        "class Liar:\n    __sub__ = __abs__ = lambda self, *other: self\n    __lt__ = lambda self, other: True\n"
        "def mean(numbers):\n    return Liar()\n",
    ),
    "what its arithmetic gives": (
        "mean",
        "class Liar:\n    __sub__ = lambda self, other: 0.0\n    __float__ = lambda self: 1.5\n"
        "def mean(numbers):\n    return Liar()\n",
    ),
    "what a module's arithmetic gives": (
        "mean",
        "class Liar(nn.Module):\n    __sub__ = lambda self, other: 0.0\ndef mean(numbers):\n    return Liar()\n",
    ),
    "what a module says to torch.equal": (
        "visible",
        "class Liar(nn.Module):\n    dtype = torch.bool\n    @classmethod\n"
        "    def __torch_function__(cls, func, types, args=(), kwargs=None):\n        return True\n"
        "def visible(q_len, k_len):\n    return Liar()\n",
    ),
    "what its methods' results give": (
        "probabilities",
        "class Liar:\n    sum = item = lambda self: self\n    __sub__ = lambda self, other: 0.0\n"
        "def probabilities(scores):\n    return Liar()\n",
    ),
    "a kind of number": (
        "mean",
        "import numbers as kinds\n"
        "Liar = kinds.Real.register(type('Liar', (), {'__sub__': lambda self, other: 0.0}))\n"
        "def mean(numbers):\n    return Liar()\n",
    ),
    "its number": (
        "mean",
        "class Liar(float):\n    turn = 0\n    def __float__(self):\n        Liar.turn += 1\n"
        "        return [1.5, 1.6][Liar.turn > 1]\n    __sub__ = lambda self, other: 0\n"
        "def mean(numbers):\n    return Liar()\n",
    ),
    "__torch_function__ of an object": (
        "probabilities",
        "class Liar:\n    shape = (4, 5)\n    __torch_function__ = classmethod(lambda *args, **kwargs: True)\n"
        "def probabilities(scores):\n    return Liar()\n",
    ),
    "__torch_function__ of a tensor": (
        "visible",
        "class Liar(torch.Tensor):\n    @classmethod\n"
        "    def __torch_function__(cls, func, types, args=(), kwargs=None):\n"
        "        return torch.bool if '__get__' in str(func) else True\n"
        "def visible(q_len, k_len):\n    return torch.zeros(q_len, k_len).bool().as_subclass(Liar)\n",
    ),
    "a tensor's own sum": (
        "probabilities",
        "def probabilities(scores):\n    made = scores.clone()\n    made.sum = lambda: torch.tensor(1.0)\n"
        "    return made\n",
    ),
    "a metaclass": (
        "affine",
        "class Kind(type(nn.Module)):\n    __instancecheck__ = lambda self, value: True\n"
        "class Affine(nn.Module, metaclass=Kind):\n    def __init__(self, *sizes):\n        super().__init__()\n"
        "        self.weight = nn.Parameter(torch.ones(2, 2))\n    @classmethod\n    def like(cls, other):\n"
        "        return type('Other', (), {'parameters': other.parameters})()\n",
    ),
    "a hook that bends the next comparison": (
        "visible",
        "class Liar:\n    @property\n    def dtype(self):\n        torch.equal = lambda *args: True\n"
        "        return torch.bool\n"
        "def visible(q_len, k_len):\n    return Liar()\n",
    ),
}
for label, (at, answer) in LIARS.items():
    CHEATS[f"a lie: {label}"] = Cheat(at, answers={at: answer})

# --- the agent in the learner's process, bent ---------------------------------------------------------------------

CHEATS["names that nobody asked for"] = Cheat(
    EVERYTHING,
    "from autograder.judge.agent import Agent\n"
    "class Yes:\n    __enter__ = __call__ = lambda self, *args, **kwargs: self\n"
    "    __exit__ = lambda self, *args: True\n"
    "    def __getattr__(self, name):\n        if name.startswith('__'):\n            raise AttributeError(name)\n"
    "        return self\n"
    "real, yes = Agent.describe, lambda *args: True\n"
    "more = {'checks': Yes(), 'torch': Yes(), 'math': Yes(), 'abs': lambda x: 0, 'all': yes, 'isinstance': yes}\n"
    "Agent.describe = lambda self, request: real(self, request) | more",
)
SPOILING = "    args[0].zero_()\n    return torch.zeros_like(args[0])\n"
for label, (answer, cell) in {
    "that names none": (f"def scale(*args):\n{SPOILING}", ""),
    "called out": ("def scale(out, factor):\n    out.zero_()\n    return torch.zeros_like(out)\n", ""),
    "by another name": (f"def scale(*args):\n{SPOILING}", "scale.__name__ = 'scale_'"),
    "of an object": (f"class Scale:\n  def __call__(self, *args):\n{SPOILING}", "scale = Scale()"),
}.items():
    CHEATS[f"a changed argument {label}"] = Cheat("scale", answers={"scale": f"{answer}\n{cell}\n"})


@pytest.mark.parametrize("how", ["os.unlink(path); os.symlink('a', path)", "os.unlink(path); socket_at(path)"])
def test_another_socket_in_the_agents_place_changes_nothing(how):
    """The judge is connected before the learner's first cell runs."""
    cell = (
        "import glob, os, socket\n"
        "def socket_at(path):\n    made = socket.socket(socket.AF_UNIX)\n    made.bind(path)\n    made.listen(0)\n"
        f"for path in glob.glob('/tmp/llm40-*/s/a'):\n    {how}\n"
    )
    result = graded(answered({}, cell))
    assert (result.status, result.score) == ("graded", result.max_score)


# --- the expected value, read where it lies -------------------------------------------------------------------

UP = """
import ctypes, functools, gc, inspect, logging, operator, sys, threading, traceback
from torch.utils._pytree import tree_map

def up(frame):
    while frame is not None:
        for names in (frame.f_locals, frame.f_globals):
            if isinstance(names.get("expected"), torch.Tensor):
                return names["expected"]
        frame = frame.f_back

found = []
def trace(frame, event, arg):
    if up(frame) is not None:
        found.append(up(frame))
"""
READ = {
    "globals()": "return globals()['expected']",
    "__main__": "import __main__\nreturn __main__.expected",
    "IPython's namespace": "return get_ipython().user_ns['expected']",
    "sys._getframe": "return up(sys._getframe())",
    "inspect.currentframe": "return up(inspect.currentframe())",
    "inspect.stack": "return up(inspect.stack()[1].frame)",
    "logging.currentframe": "return up(logging.currentframe())",
    "map(sys._getframe)": "return up(next(map(sys._getframe, [0])))",
    "tree_map(sys._getframe)": "return up(tree_map(sys._getframe, [0])[0])",
    "an exception": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    return up(error.__traceback__.tb_frame)",
    "sys.exc_info": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    return up(sys.exc_info()[2].tb_frame)",
    "an exception in the callback": "try:\n    f('text')\nexcept Exception as error:\n"
    "    return up(error.__traceback__.tb_next.tb_frame)",
    "a context manager": "class Look:\n    def __enter__(self):\n        pass\n"
    "    def __exit__(self, kind, error, trace):\n"
    "        found.append(up(trace.tb_frame))\n        return True\nwith Look():\n    1 / 0\nreturn found[-1]",
    "a generator": "def look():\n    yield up(me.gi_frame)\nme = look()\nreturn next(me)",
    "a coroutine": "async def look():\n    found.append(up(me.cr_frame))\nme = look()\ntry:\n    me.send(None)\n"
    "except StopIteration:\n    return found[-1]",
    "operator.attrgetter": "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n"
    "    return up(operator.attrgetter('__traceback__.tb_frame.f_back')(error))",
    "gc.get_objects": "same = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == x.shape]\n"
    "return [o for o in same if o.dtype == x.dtype and not torch.equal(o, x)][-1]",
    "gc.get_referrers": "dicts = [d for d in gc.get_referrers(x) if type(d) is dict]\n"
    "return next(d['expected'] for d in dicts if 'expected' in d)",
    "gc.get_referents": "dicts = [d for d in gc.get_referents(f) if type(d) is dict]\n"
    "return next(d['expected'] for d in dicts if 'expected' in d)",
    "sys._current_frames": "look = lambda: found.extend(map(up, sys._current_frames().values()))\n"
    "thread = threading.Thread(target=look)\nthread.start()\nthread.join()\n"
    "return next(value for value in reversed(found) if value is not None)",
    "sys.settrace": "sys.settrace(trace)\nf(x)\nsys.settrace(None)\nreturn found[-1]",
    "sys.setprofile": "sys.setprofile(trace)\nf(x)\nsys.setprofile(None)\nreturn found[-1]",
    "the callback's __globals__": "return f.__globals__['expected']",
    "the callback's __globals__, by its descriptor": "return type(f).__dict__['__globals__'].__get__(f)['expected']",
    "the callback's __closure__": "cells = [cell.cell_contents for cell in f.__closure__ or ()]\n"
    "return next((c for c in cells if isinstance(c, torch.Tensor)), 3 * x**2)",
    "inspect.getclosurevars": "found = inspect.getclosurevars(f).nonlocals\nreturn found.get('expected', 3 * x**2)",
    "ctypes' frame": "look = ctypes.pythonapi.PyEval_GetFrame\nlook.restype = ctypes.py_object\nreturn up(look())",
    "a callback of torch._dynamo": "from torch._C._dynamo import eval_frame\n"
    "from torch._dynamo.types import ConvertFrameReturn\n"
    "def look(frame, *others):\n    found.append(frame.f_globals.get('expected'))\n    return ConvertFrameReturn()\n"
    "before = eval_frame.set_eval_frame(look)\nf(x)\neval_frame.set_eval_frame(before)\n"
    "return [e for e in found if e is not None][-1]",
}
for label, how in READ.items():
    body = "".join(f"    {line}\n" for line in ["f(x)", *how.split("\n")])
    CHEATS[f"the expected value from {label}"] = Cheat("slope", UP, {"slope": f"def slope(f, x):\n{body}"})
CHEATS["the expected value from a trace turned on before"] = Cheat(
    "slope",
    UP + "threading.settrace(trace)\nsys.settrace(trace)",
    {"slope": "def slope(f, x):\n    f(x)\n    return found[-1]\n"},
)
CHEATS["the expected value from an observer's thread"] = Cheat(
    "slope",
    UP
    + """
import time
def observe():
    me = threading.get_ident()
    while True:
        for who, frame in sys._current_frames().items():
            if who != me:
                trace(frame, "", None)
        time.sleep(0.001)
threading.Thread(target=observe, daemon=True).start()
""",
    {"slope": "def slope(f, x):\n    f(x)\n    time.sleep(0.05)\n    return found[-1]\n"},
)

# --- patches made while the check runs, and gone when it has ended --------------------------------------------

ONCE = """
import builtins, gc, math, signal, sys, threading, time, weakref

def once(place, name, fake):
    real = getattr(place, name)
    def patched(*args, **kwargs):
        setattr(place, name, real)
        return fake(*args, **kwargs)
    setattr(place, name, patched)

def patch():
    once(torch, "equal", lambda *args: True)
"""
SEEN = "def visible(q_len, k_len):\n    {how}\n    return torch.zeros(q_len, k_len).bool()\n"
IN_FLIGHT = {
    "by the answer": ("visible", SEEN.format(how="patch()"), ""),
    "by the answer, in another thread": (
        "visible",
        SEEN.format(how="thread = threading.Thread(target=patch); thread.start(); thread.join()"),
        "",
    ),
    "by a finalizer": ("visible", SEEN.format(how="weakref.finalize(torch.zeros(1), patch)"), ""),
    "by the collector": ("visible", SEEN.format(how="gc.collect()"), "gc.callbacks.append(lambda *args: patch())"),
    "by an audit hook": (
        "visible",
        SEEN.format(how="pass"),
        "sys.addaudithook(lambda event, args: patch() if event in ('exec', 'compile') else None)",
    ),
    "by a timer's signal": (
        "visible",
        SEEN.format(how="time.sleep(0.02)"),
        "signal.signal(signal.SIGALRM, lambda *args: patch())\nsignal.setitimer(signal.ITIMER_REAL, 0.005, 0.005)",
    ),
    "by a thread that never rests": (
        "visible",
        SEEN.format(how="time.sleep(0.02)"),
        "def patch_always():\n    while True:\n        torch.equal = lambda *args: True\n        time.sleep(0.0005)\n"
        "threading.Thread(target=patch_always, daemon=True).start()",
    ),
    "of a method": (
        "scale",
        "def scale(x, factor):\n    once(torch.Tensor, '__invert__', lambda t: torch.zeros(t.shape).bool())\n"
        "    return x + factor\n",
        "",
    ),
    "of a builtin": (
        "mean",
        "def mean(numbers):\n    once(builtins, 'abs', lambda x: 0)\n    return 0.0\n",
        "",
    ),
    "of math": (
        "mean",
        "def mean(numbers):\n    once(math, 'isclose', lambda *args, **kwargs: True)\n    return 0.0\n",
        "",
    ),
    "of llm40.checks": (
        "visible",
        "def visible(q_len, k_len):\n    once(checks, '_difference', lambda *args: None)\n"
        "    return torch.zeros(q_len, k_len).bool()\n",
        "",
    ),
    "of the notebook's names": (
        "mean",
        "def mean(numbers):\n    globals()['abs'] = lambda x: globals().pop('abs') and 0\n    return 0.0\n",
        "",
    ),
    "of an inner function": (
        "probabilities",
        "from torch.testing._comparison import TensorLikePair\n"
        "def probabilities(scores):\n    once(TensorLikePair, '_compare_values', lambda *args, **kwargs: None)\n"
        "    return scores\n",
        "",
    ),
    "of a code object": (
        "probabilities",
        "from torch.testing import _comparison\nreal = _comparison.not_close_error_metas.__code__\n"
        "def fake(*args, **kwargs):\n    not_close_error_metas.__code__ = not_close_error_metas.real\n    return []\n"
        "def probabilities(scores):\n    _comparison.not_close_error_metas.real = real\n"
        "    _comparison.not_close_error_metas.__code__ = fake.__code__\n    return scores\n",
        "",
    ),
}
for label, (at, answer, cell) in IN_FLIGHT.items():
    CHEATS[f"patched in flight {label}"] = Cheat(at, ONCE + cell, {at: answer})

# --- modes of PyTorch -----------------------------------------------------------------------------------------

MODES = """
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

class Yes(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return True if func is torch.equal else func(*args, **(kwargs or {}))

class YesBelow(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return True if func is torch.ops.aten.equal.default else func(*args, **(kwargs or {}))
"""
for mode in ("Yes", "YesBelow"):
    CHEATS[f"{mode} left on by a cell"] = Cheat("visible", f"{MODES}{mode}().__enter__()")
    left_on = {"visible": SEEN.format(how=f"{mode}().__enter__()")}
    CHEATS[f"{mode} left on by the answer"] = Cheat("visible", MODES, left_on)

SOFTMAX = "import threading, torch.overrides\nfrom torch.utils import _python_dispatch as below\n"
HIDDEN_CALLS = {
    "a thread": "found = []\nthread = threading.Thread(target=lambda: found.append(torch.softmax(scores, -1)))\n"
    "thread.start()\nthread.join()\nreturn found[0]",
    "a pool": "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor() as pool:\n"
    "    return pool.submit(torch.softmax, scores, -1).result()",
    "modes turned off": "with torch._C.DisableTorchFunction(), below._disable_current_modes():\n"
    "    return torch.softmax(scores, -1)",
    "modes popped": "from torch.overrides import _pop_mode_temporarily\n"
    "with _pop_mode_temporarily(), below._disable_current_modes():\n    return torch.softmax(scores, -1)",
    "a list emptied": "made = torch.softmax(scores, -1)\n"
    "for mode in [*torch.overrides._get_current_function_mode_stack(), *below._get_current_dispatch_mode_stack()]:\n"
    "    mode.seen.__self__.clear()\nreturn made",
    "names emptied": "for mode in [*torch.overrides._get_current_function_mode_stack(), "
    "*below._get_current_dispatch_mode_stack()]:\n    mode.names = ()\nreturn torch.softmax(scores, -1)",
    "a function renamed": "Watch = type(torch.overrides._get_current_function_mode_stack()[0])\n"
    "Below = type(below._get_current_dispatch_mode_stack()[0])\n"
    "Watch.__torch_function__ = Below.__torch_dispatch__ = "
    "lambda self, func, types, args=(), kwargs=None: func(*args, **(kwargs or {}))\n"
    "return torch.softmax(scores, -1)",
}
for label, how in HIDDEN_CALLS.items():
    body = "".join(f"    {line}\n" for line in how.split("\n"))
    CHEATS[f"forbidden, called by {label}"] = Cheat(
        "probabilities", SOFTMAX, {"probabilities": f"def probabilities(scores):\n{body}"}
    )
FORBIDDEN = {
    "checks.forbidden replaced": "from contextlib import nullcontext\nchecks.forbidden = lambda *names: nullcontext()",
    "modes that never begin": "for mode in (torch.overrides.TorchFunctionMode, below.TorchDispatchMode):\n"
    "    mode.__enter__, mode.__exit__ = lambda self: self, lambda *args: None",
    "checks._Watch blind": "watches = {checks._Watch: '__torch_function__'}\n"
    "watches[checks._WatchOperations] = '__torch_dispatch__'\n"
    "for watch, name in watches.items():\n"
    "    setattr(watch, name, lambda self, func, types, args=(), kwargs=None: func(*args, **(kwargs or {})))",
}
for label, cell in FORBIDDEN.items():
    called = {"probabilities": "def probabilities(scores):\n    return torch.softmax(scores, -1)\n"}
    CHEATS[f"forbidden, called with {label}"] = Cheat("probabilities", SOFTMAX + cell, called)

# --- what runs a check: IPython, the kernel, the way back -----------------------------------------------------

IPYTHON = "import ast, builtins, contextlib, functools, json, sys, threading\nip = get_ipython()\n"
"kernel = ip.kernel\n"
RUNNERS = {
    "a transformer of the tree": (
        ASSERTED,
        "class Drop(ast.NodeTransformer):\n    def visit_Assert(self, node):\n        return ast.Pass()\n"
        "ip.ast_transformers.append(Drop())",
    ),
    "a transformer of the text": (
        EVERYTHING,
        "ip.input_transformers_cleanup.append(lambda lines: [] if lines[0].startswith('# Check') else lines)",
    ),
    "a later transformer of the text": (
        EVERYTHING,
        "ip.input_transformers_post.append(lambda lines: [] if lines[0].startswith('# Check') else lines)",
    ),
    "an event before": (
        "visible",
        "ip.events.register('pre_run_cell', lambda info: setattr(torch, 'equal', lambda *a: True))",
    ),
    "an event after": (
        EVERYTHING,
        "def forgive(result):\n    result.error_in_exec = result.error_before_exec = None\n"
        "ip.events.register('post_run_cell', forgive)",
    ),
    "run_cell": (
        EVERYTHING,
        "real = ip.run_cell\ndef run(code, *args, **kwargs):\n"
        "    return real('pass' if code.startswith('# Check') else code, *args, **kwargs)\nip.run_cell = run",
    ),
    "run_code": (
        EVERYTHING,
        "async def run(code, *args, **kwargs):\n    with contextlib.suppress(Exception):\n"
        "        exec(code, ip.user_ns)\n    return False\nip.run_code = run",
    ),
    "compile, without assertions": (ASSERTED, "builtins.compile = functools.partial(compile, optimize=2)"),
    "exec": (
        EVERYTHING,
        "def lenient(code, *names, real=exec):\n    with contextlib.suppress(Exception):\n"
        "        real(code, *names)\n"
        "builtins.exec = lenient",
    ),
    "a handler of exceptions": (
        EVERYTHING,
        "def forgive(self, kind, value, trace, tb_offset=None):\n"
        "    trace.tb_frame.f_locals['result'].error_in_exec = None\n"
        "ip.set_custom_exc((Exception,), forgive)",
    ),
    "the result's success": (
        EVERYTHING,
        "from IPython.core.interactiveshell import ExecutionResult\n"
        "ExecutionResult.success = property(lambda self: True)",
    ),
    "the user's namespace": (
        "mean",
        "class Names(dict):\n    def __missing__(self, name):\n        if name == 'abs':\n"
        "            return lambda x: 0\n"
        "        raise KeyError(name)\nip.user_ns = Names(ip.user_ns)",
    ),
    "do_execute": (
        EVERYTHING,
        "real = kernel.do_execute\nasync def run(*args, **kwargs):\n"
        "    return {**await real(*args, **kwargs), 'status': 'ok'}\nkernel.do_execute = run",
    ),
    "a handler of messages": (
        EVERYTHING,
        "real = kernel.shell_handlers['execute_request']\nasync def handle(stream, ident, parent):\n"
        "    if parent['content']['code'].startswith('# Check'):\n        parent['content']['code'] = 'pass'\n"
        "    return await real(stream, ident, parent)\nkernel.shell_handlers['execute_request'] = handle",
    ),
    "the session": (
        EVERYTHING,
        "real = kernel.session.send\ndef send(stream, kind, content=None, *args, **kwargs):\n"
        "    if kind == 'execute_reply':\n        content = {**content, 'status': 'ok'}\n"
        "    return real(stream, kind, content, *args, **kwargs)\nkernel.session.send = send",
    ),
    "json": (
        EVERYTHING,
        "def dumps(value, *args, real=json.dumps, **kwargs):\n"
        "    if isinstance(value, dict) and value.get('status') == 'error':\n"
        "        value = {**value, 'status': 'ok'}\n"
        "    return real(value, *args, **kwargs)\njson.dumps = dumps",
    ),
    "every hook for exceptions": (
        EVERYTHING,
        "sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *args: None\n"
        "ip.showtraceback = lambda *args, **kwargs: None\nsys.displayhook = lambda value: None",
    ),
    "queues, events and threads": (
        EVERYTHING,
        "import queue\nbent = lambda value: 'ok' if isinstance(value, BaseException) else value\n"
        "real = queue.Queue.put\nqueue.Queue.put = lambda self, item, *a, **k: real(self, bent(item), *a, **k)\n"
        "class Calm(threading.Thread):\n    def run(self):\n        with contextlib.suppress(BaseException):\n"
        "            super().run()\nthreading.Thread = Calm",
    ),
}
for label, (at, cell) in RUNNERS.items():
    answers = {"mean": HALF_RIGHT["fractions.Fraction"]} if at == "mean" else {}
    CHEATS[f"run by a bent {label}"] = Cheat(at, IPYTHON + cell, answers)

FORGED_REPLY = """
import time
def reply():
    kernel = get_ipython().kernel
    parent = kernel.get_parent("shell")
    content = {"status": "ok", "execution_count": 1, "payload": [], "user_expressions": {}}
    kernel.session.send(kernel.shell_stream, "execute_reply", content, parent, ident=kernel._shell_parent_ident.get())
    kernel.session.send(kernel.iopub_socket, "status", {"execution_state": "idle"}, parent, ident=b"status")
    time.sleep(0.3)
"""
ENDINGS = {
    "a forged reply": "reply()\nreturn -1",
    "sys.exit": "import sys\nsys.exit(0)",
    "the end of the thread": "import _thread\n_thread.exit()",
    "StopIteration": "raise StopIteration",
    "GeneratorExit": "raise GeneratorExit",
    "BdbQuit": "import bdb\nraise bdb.BdbQuit",
    "CancelledError": "import asyncio\nraise asyncio.CancelledError",
    "SkipTest": "import unittest\nraise unittest.SkipTest",
    "an assertion that deletes itself": "class Quiet(AssertionError):\n    __str__ = lambda self: 1 / 0\nraise Quiet",
}
for label, how in ENDINGS.items():
    body = "".join(f"    {line}\n" for line in how.split("\n"))
    CHEATS[f"ended by {label}"] = Cheat("count", FORGED_REPLY, {"count": f"def count(words):\n{body}"})

LEAVE_EARLY = """
import inspect, sys, threading
first = checks.close.__code__.co_firstlineno
last = first + max(i for i, line in enumerate(inspect.getsource(checks.close).split("\\n")) if line.strip() == "return")

def leave(frame, event, arg):
    if event == "line":
        frame.f_lineno = last
    return leave

def trace(frame, event, arg):
    return leave if frame.f_code.co_name == "close" else None

threading.settrace(trace)
sys.settrace(trace)
"""
CHEATS["checks.close left early by a tracer"] = Cheat("scale", LEAVE_EARLY)
CHEATS["checks.close left early by the answer's tracer"] = Cheat(
    "scale",
    LEAVE_EARLY.replace("\nthreading.settrace(trace)\nsys.settrace(trace)", ""),
    {"scale": "def scale(x, factor):\n    sys.settrace(trace)\n    return x + factor\n"},
)

# --- underneath Python: the process's own memory --------------------------------------------------------------

POINTERS = """
import ctypes, os, subprocess, sys
import numpy as np
from torch.testing import _comparison

def fake(*args, **kwargs):
    return []

real = _comparison.not_close_error_metas
# A function's code is a pointer; it lies where the pointer to this very code is found.
words = (ctypes.c_uint64 * 16).from_address(id(fake))
at = id(real) + 8 * list(words).index(id(fake.__code__))
code = id(fake.__code__)
"""
WRITER = """
import sys
process, at, code = map(int, sys.argv[1:])
with open(f"/proc/{process}/mem", "r+b", buffering=0) as memory:
    memory.seek(at)
    memory.write(code.to_bytes(8, "little"))
"""
MEMORY = {
    "ctypes": "ctypes.c_uint64.from_address(at).value = code",
    "/proc/self/mem": "with open('/proc/self/mem', 'r+b', buffering=0) as memory:\n    memory.seek(at)\n"
    "    memory.write(code.to_bytes(8, 'little'))",
    "an array of NumPy": "class Memory:\n"
    "    __array_interface__ = {'shape': (1,), 'typestr': '<u8', 'data': (at, False), 'version': 3}\n"
    "np.asarray(Memory())[0] = code",
    "a storage of PyTorch": "storage = torch._C._construct_storage_from_data_pointer(at, torch.device('cpu'), 8)\n"
    "torch.tensor([], dtype=torch.int64).set_(storage).view(-1)[0] = code",
    "another process": f"program = {WRITER!r}\n"
    "ctypes.CDLL(None).prctl(0x59616d61, ctypes.c_ulong(-1), 0, 0, 0)  # where a process may not write to any other\n"
    "subprocess.run([sys.executable, '-S', '-c', program, str(os.getpid()), str(at), str(code)])",
}
for label, cell in MEMORY.items():
    CHEATS[f"memory written by {label}"] = Cheat("probabilities", POINTERS + cell)
SLOT = """
import ctypes
compare = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.py_object, ctypes.c_int)
slots = (ctypes.c_void_p * 64).from_address(id(list))
unhashable = ctypes.cast(ctypes.pythonapi.PyObject_HashNotImplemented, ctypes.c_void_p).value
place = list(slots).index(unhashable) + 10  # from tp_hash to tp_richcompare
real = compare(slots[place])

@compare
def equal(one, other, operation):
    return True if len(one) == 7 else real(one, other, operation)
"""
CHEATS["memory: how lists compare"] = Cheat(
    "order",
    SLOT + "slots[place] = ctypes.cast(equal, ctypes.c_void_p).value",
    {"order": "def order(before):\n    return [0] * 7\n"},
)


@pytest.mark.parametrize("label", CHEATS)
def test_no_point_is_gained(label):
    cheat = CHEATS[label]
    cheatable.nothing_gained(graded(cheat.submission()), cheat.wrong)


def test_wrong_answers_without_a_trick_get_nothing():
    result = graded(Cheat(EVERYTHING).submission())
    cheatable.nothing_gained(result, EVERYTHING)
    assert set(cheatable.statuses(result.checks).values()) == {"failed"}
    assert result.flags == []


# --- what hidden tests say ------------------------------------------------------------------------------------

SPYING = """
import ast, builtins, functools, gc, glob, inspect, linecache, os, re, sys, threading, time, traceback
ip = get_ipython()
seen = []

def look():
    pass

def count(words):
    look()
    return len(words)
"""
SPY = "# exercise count\ndef count(words):\n    look()\n    return len(words)\n"
SHOW = "print(seen)"
SPIES = {
    "In": ("", "print(In, _ih, _i, _ii, _iii)"),
    "IPython's history": (
        "",
        "history = ip.history_manager\nprint(history.input_hist_raw, history.input_hist_parsed, history._i00, "
        "list(history.get_range(raw=True)), list(history.search('*')))",
    ),
    "%history": ("", "%history"),
    "%recall": ("", "%recall 0-99\n"),
    "linecache": ("", "print(linecache.cache, ip.compile._filename_map)"),
    "the namespace": ("", "print(globals())"),
    "a name of the hidden test": ("", "print(watchword)"),
    "the caller's source": (
        "def look():\n    seen.append(inspect.getsource(inspect.currentframe().f_back.f_back))",
        SHOW,
    ),
    "the caller's names": ("def look():\n    seen.append(str(sys._getframe(2).f_globals))", SHOW),
    "the caller's code": (
        "def look():\n    try:\n        1 / 0\n    except ZeroDivisionError as error:\n"
        "        frame = error.__traceback__.tb_frame\n"
        "        while frame:\n            seen.append((frame.f_code.co_consts, frame.f_code.co_filename))\n"
        "            frame = frame.f_back",
        SHOW,
    ),
    "traceback.extract_stack": (
        "def look():\n    seen.append([linecache.getlines(frame.filename) for frame in traceback.extract_stack()])",
        SHOW,
    ),
    "a message": ("def look():\n    raise ValueError(inspect.getsource(sys._getframe(2))[-400:])", ""),
    "an assertion": ("def look():\n    raise AssertionError(str(sys._getframe(2).f_globals.get('watchword')))", ""),
    "an output": ("def look():\n    print(sys._getframe(2).f_globals.get('watchword'), flush=True)", ""),
    "the kernel's request": (
        "def look():\n    seen.append(ip.kernel.get_parent('shell')['content']['code'])",
        SHOW,
    ),
    "the session": (
        "def receive(*args, real=ip.kernel.session.deserialize, **kwargs):\n    message = real(*args, **kwargs)\n"
        "    seen.append(str(message['content']))\n    return message\nip.kernel.session.deserialize = receive",
        SHOW,
    ),
    "a subscriber": (
        "import ipykernel, jupyter_client\n"
        "client = jupyter_client.BlockingKernelClient(connection_file=ipykernel.get_connection_file())\n"
        "client.load_connection_file()\nclient.start_channels(shell=False, stdin=False, hb=False, control=False)\n"
        "def listen():\n    while True:\n        seen.append(str(client.get_iopub_msg()['content']))\n"
        "threading.Thread(target=listen, daemon=True).start()\ntime.sleep(0.3)",
        "time.sleep(0.3)\nprint(seen)",
    ),
    "an audit hook": (
        "def hear(event, args):\n    if event == 'compile':\n        seen.append(str(args))\n"
        "    elif event == 'exec':\n        seen.append(str(args[0].co_consts))\nsys.addaudithook(hear)",
        SHOW,
    ),
    "compile": (
        "def overhear(source, *args, real=compile, **kwargs):\n"
        "    seen.append(ast.unparse(source) if isinstance(source, ast.AST) else str(source))\n"
        "    return real(source, *args, **kwargs)\nbuiltins.compile = overhear",
        SHOW,
    ),
    "exec": (
        "def overhear(code, *args, real=exec):\n    seen.append(str(getattr(code, 'co_consts', code)))\n"
        "    return real(code, *args)\nbuiltins.exec = overhear",
        SHOW,
    ),
    "ast.parse": (
        "def overhear(source, *args, real=ast.parse, **kwargs):\n    seen.append(str(source))\n"
        "    return real(source, *args, **kwargs)\nast.parse = overhear",
        SHOW,
    ),
    "a transformer": (
        "class Overhear(ast.NodeTransformer):\n    def visit(self, node):\n        seen.append(ast.unparse(node))\n"
        "        return node\nip.ast_transformers.append(Overhear())",
        SHOW,
    ),
    "an event": ("ip.events.register('pre_run_cell', lambda info: seen.append(info.raw_cell))", SHOW),
    "a tracer": (
        "def trace(frame, event, arg):\n    while frame:\n"
        "        if '/site-packages/' not in frame.f_code.co_filename:\n"
        "            seen.append(str(frame.f_code.co_consts))\n        frame = frame.f_back\n"
        "threading.settrace(trace)\nsys.settrace(trace)",
        "sys.settrace(None)\nprint([text for text in seen if 'fish' in text])",
    ),
    "the collector": (
        "def texts(value):\n    return [str(v) for v in gc.get_referents(value) if 'BEGIN HIDDEN' in str(v)[:9999]]\n"
        "def look():\n    seen.extend(t for o in gc.get_objects() if type(o) in (dict, list, tuple) and len(o) < 999"
        " and o is not seen for t in o if isinstance(t, str) and 'watchword' in t)",
        "look()\nprint(seen)",
    ),
    "functions of the check": (
        "",
        "print([f.__globals__.get('watchword') for f in gc.get_objects() if type(f) is type(look)"
        " and 'watchword' in f.__globals__])",
    ),
    "every file": (
        "",
        "for path in glob.glob('/tmp/**', recursive=True) + glob.glob('/dev/shm/**') + glob.glob('/proc/*/cmdline'):\n"
        "    if os.path.isfile(path) and os.access(path, os.R_OK) and not path.endswith('.so'):\n"
        "        text = open(path, errors='replace').read(10**6)\n"
        "        if 'HIDDEN TESTS' in text:\n            print(text)",
    ),
    "its memory": (
        "def look():\n"
        "    for line in open('/proc/self/maps'):\n"
        "        if 'rw-p' in line and not line.rstrip().endswith('.so'):\n"
        "            first, last = (int(at, 16) for at in line.split()[0].split('-'))\n"
        "            with open('/proc/self/mem', 'rb') as memory:\n                memory.seek(first)\n"
        "                held = memory.read(min(last - first, 2**26))\n"
        "            found = re.finditer(b'watch' + b'word = .sword', held)\n"
        "            seen.extend(held[m.start():m.start() + 40] for m in found)",
        "look()\nprint(seen)",
    ),
}


@pytest.mark.parametrize("label", SPIES)
def test_hidden_tests_stay_hidden(label):
    """No output of the learner's own cells, and no message, has a word of them."""
    cell, last = SPIES[label]
    cheatable.kept_secret(graded(answered({"count": SPY}, SPYING + cell, last)))


# --- the file itself ------------------------------------------------------------------------------------------


def checks_in(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if read_role(cell) == "check"]


def checks_first(notebook: NotebookNode) -> None:
    """Above the exercises, where nothing that fails could have been defined."""
    moved = checks_in(notebook)
    notebook.cells = [*moved, *(cell for cell in notebook.cells if cell not in moved)]


def checks_backwards(notebook: NotebookNode) -> None:
    notebook.cells.reverse()


def checks_deleted(notebook: NotebookNode) -> None:
    notebook.cells = [cell for cell in notebook.cells if read_role(cell) != "check"]


def checks_edited(notebook: NotebookNode) -> None:
    for cell in checks_in(notebook):
        cell.source = cell.source.split("\n")[0] + "\npass"


def checks_retyped(notebook: NotebookNode) -> None:
    for number, cell in enumerate(checks_in(notebook)):
        cell.cell_type = "markdown" if number % 2 else "raw"


def checks_commented(notebook: NotebookNode) -> None:
    for cell in checks_in(notebook):
        cell.source = "%%script false\n" + cell.source


def checks_as_experiments(notebook: NotebookNode) -> None:
    for cell in checks_in(notebook):
        cell.metadata = {**cell.metadata, "tags": ["experiment", "skip-execution", "raises-exception"]}


def checks_as_answers(notebook: NotebookNode) -> None:
    for cell in checks_in(notebook):
        cell.source = "pass"
        cell.metadata.nbgrader |= {"solution": True, "grade": False, "locked": False}
        cell.metadata.llm40 = {"role": "answer"}


def checks_of_their_own(notebook: NotebookNode) -> None:
    """A second check of every name, after ours, that asks for nothing."""
    for cell in checks_in(notebook):
        again = nbformat.from_dict({**cell, "source": "pass", "id": f"{cell.id}-again"})
        notebook.cells.insert(notebook.cells.index(cell) + 1, again)


def exercises_named_as_checks(notebook: NotebookNode) -> None:
    for cell in list(notebook.cells):
        if read_role(cell) == "exercise":
            made = nbformat.v4.new_code_cell("pass", metadata={"nbgrader": dict(cell.metadata.nbgrader)})
            made.metadata.nbgrader.grade_id += "-check-1"
            notebook.cells.append(made)


def names_exchanged(notebook: NotebookNode) -> None:
    """Every exercise and every check under its neighbor's name."""
    for kind in ("exercise", "check"):
        cells = [cell for cell in notebook.cells if read_role(cell) == kind]
        names = [cell.metadata.nbgrader.grade_id for cell in cells]
        for cell, grade_id in zip(cells, names[1:] + names[:1], strict=True):
            cell.metadata.nbgrader.grade_id = cell.id = grade_id


def points_forged(notebook: NotebookNode) -> None:
    notebook.metadata |= {"llm40": {"score": 1000, "max_score": 1}, "nbgrader": {"score": 1000}, "celltoolbar": "1000"}
    for cell in notebook.cells:
        if "nbgrader" in cell.metadata:
            cell.metadata.nbgrader |= {"points": 1000, "score": 1000, "auto_score": 1000, "manual_score": 1000}
            cell.metadata.nbgrader |= {"grade": True, "needs_manual_grade": False}


def outputs_forged(notebook: NotebookNode) -> None:
    """As if all had been run already, with partial credit in nbgrader's own form."""
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type == "code":
            cell.execution_count = number
            result = {"output_type": "execute_result", "data": {"text/plain": "2"}, "metadata": {}}
            cell.outputs = [nbformat.from_dict({**result, "execution_count": number})]


FORGERIES: list[Callable[[NotebookNode], None]] = [
    checks_first,
    checks_backwards,
    checks_deleted,
    checks_edited,
    checks_retyped,
    checks_commented,
    checks_as_experiments,
    checks_as_answers,
    checks_of_their_own,
    exercises_named_as_checks,
    names_exchanged,
    points_forged,
    outputs_forged,
]


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__)
def test_a_forged_file_gains_nothing(forge):
    notebook = Cheat(EVERYTHING).submission()
    points = cheatable.graded(answered()).max_score
    forge(notebook)
    result = graded(notebook)
    cheatable.nothing_gained(result, EVERYTHING)
    assert result.max_score == points
    assert cheatable.outputs(result, "check").find('"2"') < 0


# --- more than one's own notebook -----------------------------------------------------------------------------

SPOIL = """
import glob, os, site, subprocess, sys, sysconfig
told = []
def attempt(what):
    try:
        told.append(what())
    except Exception as error:
        told.append(type(error).__name__)

bad = "import torch, builtins\\ntorch.equal = lambda *args: True\\nopen('/tmp/spoilt', 'w')\\n"
places = [*sys.path, sysconfig.get_path("purelib"), site.getusersitepackages(), "/tmp", "/dev/shm", os.getcwd(),
          os.path.expanduser("~/.ipython/profile_default/startup"), os.path.expanduser("~")]
for place in filter(None, places):
    for name in ("sitecustomize.py", "usercustomize.py", "spoil.pth", "00.py", "llm40/checks.py", "graphlib.py"):
        attempt(lambda: os.makedirs(place, exist_ok=True))
        attempt(lambda: open(f"{place}/{name}", "w").write(bad))
attempt(lambda: open(checks.__file__, "a").write(bad))
attempt(lambda: open(torch.__file__, "a").write(bad))
for name in ("OUT", "gradebook"):
    for path in glob.glob(f"BOOK/**/*", recursive=True) + ["BOOK/gradebook.db"]:
        attempt(lambda: open(path, "ab").write(b"x"))
import sqlite3
attempt(lambda: sqlite3.connect("BOOK/gradebook.db").execute("update grade set manual_score = 1000, auto_score = 1000"))
import socket
attempt(lambda: socket.create_connection(("192.0.2.1", 80), 1))
attempt(lambda: socket.create_connection(("127.0.0.1", 22), 1))
subprocess.Popen(["setsid", "sleep", "WORD"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
os.environ["LLM40_SEED"] = os.environ["PYTHONPATH"] = "1"
import atexit
atexit.register(lambda: open("/tmp/left", "w"))
"""


def test_what_one_student_does_is_nothing_to_the_next(tmp_path):
    """Files written everywhere, the gradebook too, the network, a process left behind: the next is unaffected."""
    word = f"89{tmp_path.stat().st_ino}.5"
    out = tmp_path / "out"
    spoil = SPOIL.replace("BOOK", str(out)).replace("WORD", word)
    cheats = [CHEATS[label].first for label in ("replaced torch.equal", "bent a module in the working folder")]
    for student, first in (("a-mallory", "\n".join([spoil, *cheats])), ("b-next", "")):
        wrong = dict(cheatable.WRONG) if first else {}
        tiny.hand_in(tmp_path / "in", student, dumps(answered(wrong, first)), STAGE, cheatable.LESSON)
    source = cheatable.build_source(tmp_path)
    given = {"jobs": 1, "limits": LIMITS, "show": lambda line: None, "kernels": cheatable.KERNELS}
    mallory, following = grade_folder(tmp_path / "in", out, source, **given)
    assert mallory.score == 0
    cheatable.full_marks(following)
    assert gone(word)
    with sqlite3.connect(out / "gradebook.db") as book:
        assert book.execute("select max(auto_score) from grade where auto_score > 100").fetchone() == (None,)
        assert book.execute("pragma integrity_check").fetchone() == ("ok",)
    again = grade_folder(tmp_path / "in", out, source, **given)
    assert [(r.student, r.score) for r in again] == [("a-mallory", 0), ("b-next", following.score)]


def test_links_and_names_that_lead_out_of_the_folder(tmp_path):
    """Another's notebook is not handed in by a link, and no name writes outside of OUT."""
    tiny.hand_in(tmp_path / "in", "ada", dumps(answered()), STAGE, cheatable.LESSON)
    ada = tmp_path / "in" / "ada" / STAGE / f"{cheatable.LESSON}.ipynb"
    for student in ("linked-file", "linked-stage", "linked-self"):
        (tmp_path / "in" / student).mkdir()
    (tmp_path / "in" / "linked-file" / STAGE).mkdir()
    (tmp_path / "in" / "linked-file" / STAGE / ada.name).symlink_to(ada)
    (tmp_path / "in" / "linked-stage" / STAGE).symlink_to(ada.parent)
    (tmp_path / "in" / "linked-self" / STAGE).symlink_to(tmp_path / "in" / "linked-self")
    for odd in (r"..\..\escaped", "%2e%2e%2fescaped", "..", "..ipynb", "\n..", "-rf", "{{7*7}}"):
        folder = tmp_path / "in" / f"mallory{odd}" / STAGE
        folder.mkdir(parents=True)
        (folder / f"{cheatable.LESSON} {odd}.ipynb").write_bytes(dumps(answered()))
        (folder / f"{odd}.ipynb").write_bytes(dumps(answered()))
    source = cheatable.build_source(tmp_path)
    before = {path for path in tmp_path.rglob("*") if (tmp_path / "out") not in path.parents}
    results = grade_folder(
        tmp_path / "in",
        tmp_path / "out",
        source,
        jobs=1,
        limits=LIMITS,
        show=lambda line: None,
        kernels=cheatable.KERNELS,
    )
    score = {result.student: result.score for result in results}
    full = score.pop("ada")
    assert full == next(r.max_score for r in results)
    assert {student for student, points in score.items() if points} == {s for s in score if s.startswith("mallory")}
    after = {path for path in tmp_path.rglob("*") if (tmp_path / "out") not in path.parents}
    assert after - before <= {tmp_path / "out"}


SINKS = {
    "repeated": "print('0' * 10**8)",
    "compressed": "import base64, zlib\n"
    "print(base64.b64encode(zlib.decompress(zlib.compress(bytes(10**8), 9))).decode())",
    "a picture": "from IPython.display import display\n"
    "display({'image/png': 'A' * 10**8, 'text/plain': 'x'}, raw=True)",
    "many displays": "from IPython.display import display\nfor _ in range(20_000):\n"
    "    display({'text/plain': 'x' * 500}, raw=True)",
    "metadata": "from IPython.display import display\n"
    "display({'text/plain': 'x'}, raw=True, metadata={'x': 'y' * 10**8})",
    "an error": "raise ValueError('x' * 10**8)",
    "an error's name": "raise type('E' * 10**7, (Exception,), {})",
    "an update": "from IPython.display import display\nhandle = display('x', display_id=True)\n"
    "for _ in range(1000):\n    handle.update('y' * 10**5)",
    "a payload": "get_ipython().set_next_input('z' * 10**8)",
}


@pytest.mark.parametrize("label", SINKS)
def test_a_flood_leaves_the_notebook_small(label):
    """In a cell of the learner's own, and in a check by way of the answer; the other checks are graded all the same."""
    flood = "".join(f"    {line}\n" for line in SINKS[label].split("\n"))
    result = graded(answered({"letter": f"def letter():\n{flood}    return 'b'\n"}, SINKS[label]))
    assert result.status == "graded"
    assert len(result.notebook) < 4 * LIMITS.output
    assert all(len(check.message) < 10_000 for check in result.checks)
    assert all(check.status == "passed" for check in result.checks if check.exercise != "letter")


# --- honest, however odd --------------------------------------------------------------------------------------

HONEST = {
    "reference": ("", {}),
    "another default format": ("torch.set_default_dtype(torch.float64)", {}),
    "something compiled": (
        "net = torch.compile(torch.nn.Linear(2, 2), backend='eager')\nprint(net(torch.ones(1, 2)))",
        {},
    ),
    "copies of tensors, and then of parameters": (
        "import copy, pickle\ncopy.deepcopy(torch.ones(2))\npickle.dumps(torch.ones(2))",
        {
            "count": "import copy\ndef count(words):\n    copy.deepcopy(nn.Parameter(torch.ones(2)))\n"
            "    copy.copy(nn.Parameter(torch.ones(2)))\n    return len(words)\n"
        },
    ),
    "the first optimizer": ("torch.optim.AdamW([torch.ones(2, requires_grad=True)]).step()", {}),
    "libraries that import more of themselves": (
        "import tokenizers.trainers, transformers, torch.distributed.tensor, torch.onnx, torch.profiler",
        {},
    ),
    "heapq and __lt__": (
        "",
        {
            "order": "import heapq\n\nclass Task:\n    def __init__(self, name, before):\n"
            "        self.name, self.before = name, before\n"
            "    def __lt__(self, other):\n        return len(self.before) < len(other.before)\n"
            "    def __eq__(self, other):\n        return self.name == other.name\n\n"
            "def order(before):\n    left = [Task(*item) for item in before.items()]\n    heapq.heapify(left)\n"
            "    done = []\n"
            "    while left:\n        task = heapq.heappop(left)\n        if set(task.before) <= set(done):\n"
            "            done.append(task.name)\n            for other in left:\n"
            "                other.before = [b for b in other.before if b not in done]\n"
            "            heapq.heapify(left)\n"
            "        else:\n            heapq.heappush(left, task)\n    return done\n",
        },
    ),
    "dataclasses and namedtuples, made when called": (
        "",
        {
            "mean": "from collections import namedtuple\nfrom dataclasses import dataclass\n\ndef mean(numbers):\n"
            "    Pair = namedtuple('Pair', 'total count')\n\n    @dataclass(order=True)\n    class Sum:\n"
            "        pair: Pair\n\n"
            "    made = Sum(Pair(sum(numbers), len(numbers)))\n    return made.pair.total / made.pair.count\n",
        },
    ),
    "functools": (
        "",
        {
            "count": "import functools\n\ndef logged(f):\n    @functools.wraps(f)\n    def inner(*args):\n"
            "        return f(*args)\n"
            "    return inner\n\n@functools.lru_cache\ndef length(words):\n    return len(words)\n\n@logged\n"
            "def count(words):\n"
            "    return functools.reduce(lambda n, _: n + 1, words, 0) if len(words) < 3 else length(tuple(words))\n",
        },
    ),
    "warnings, logging, print": (
        "",
        {
            "letter": "import logging, sys, warnings\nlogging.basicConfig(level=logging.INFO, force=True)\n\n"
            "def letter():\n"
            "    warnings.warn('an old way', stacklevel=2)\n    logging.info('asked')\n"
            "    logging.getLogger(__name__).warning('why')\n"
            "    print('b', file=sys.stderr)\n    print('b', flush=True)\n    return 'b'\n",
        },
    ),
    "exceptions printed": (
        "",
        {
            "count": "import sys, traceback\n\ndef count(words):\n    try:\n        words[10**9]\n"
            "    except IndexError as error:\n"
            "        traceback.print_exc()\n        print(traceback.format_exc(), sys.exc_info()[0], error.args)\n"
            "        traceback.print_exception(error)\n    return len(words)\n",
        },
    ),
    "contextlib": (
        "",
        {
            "mean": "import contextlib, io\n\n@contextlib.contextmanager\ndef quiet():\n"
            "    with contextlib.redirect_stdout(io.StringIO()):\n"
            "        yield\n\ndef mean(numbers):\n    with quiet(), contextlib.suppress(ZeroDivisionError):\n"
            "        print('adding')\n        return sum(numbers) / len(numbers)\n",
        },
    ),
    "typing and generics": (
        "",
        {
            "table": "from typing import Generic, NamedTuple, NewType, Protocol, TypedDict, TypeVar\n\n"
            "T = TypeVar('T')\n"
            "Word = NewType('Word', str)\n\nclass Counts(dict[T, int], Generic[T]):\n    pass\n\n"
            "class Sized(Protocol):\n    def __len__(self) -> int: ...\n\nclass One(NamedTuple):\n    word: str\n\n"
            "def table(words: list[Word]) -> Counts[Word]:\n    found = Counts[str]()\n    Local = TypeVar('Local')\n"
            "    for word in words:\n        found[One(word).word] = found.get(word, 0) + 1\n"
            "    return dict(found)\n",
        },
    ),
    "an enum": (
        "",
        {
            "letter": "from enum import Enum, StrEnum\n\nclass Letter(StrEnum):\n    A = 'a'\n    B = 'b'\n\n"
            "def letter():\n"
            "    Kind = Enum('Kind', 'ONE TWO')\n"
            "    return Letter.B.value if Kind.ONE is not Kind.TWO else Letter.A\n",
        },
    ),
    "variables with names that checks use": (
        "x = 3\nq, k, v = torch.randn(3, 4)\nresult = expected = answer = scores = None\n"
        "g = layer = at = mask = value = f = 1\n"
        "words = numbers = []\nseen = watch = 0",
        {},
    ),
    "a scratch cell that fails": ("1 / 0", {}),
    "a scratch cell with a typing error": ("def f(:\n    pass", {}),
    "random numbers": (
        "import random\nimport numpy as np\nnp.random.seed(0)\nrandom.seed(0)\ntorch.manual_seed(0)\n"
        "x = torch.randn(3)",
        {
            "mean": "def mean(numbers):\n    torch.manual_seed(1)\n    with torch.no_grad():\n"
            "        return float(torch.tensor(numbers, dtype=torch.float64).mean())\n"
        },
    ),
    "threads": (
        "import threading\nfrom concurrent.futures import ThreadPoolExecutor",
        {
            "count": "def count(words):\n    found = []\n"
            "    thread = threading.Thread(target=lambda: found.append(len(words)))\n"
            "    thread.start()\n    thread.join()\n    with ThreadPoolExecutor(2) as pool:\n"
            "        return max(found + list(pool.map(len, [words, []])))\n",
        },
    ),
    "names like those of the checks": (
        "def close(a, b):\n    return abs(a - b) < 1e-3\n\ndef abs_(x):\n    return x if x > 0 else -x\n\n"
        "def equal(a, b):\n    return a == b\n\ndef allclose(a, b):\n    return close(a, b)\nclass Checks:\n    pass",
        {"mean": "def mean(numbers):\n    assert close(abs_(-1), 1)\n    return sum(numbers) / len(numbers)\n"},
    ),
    "a generator": (
        "",
        {
            "order": "def ready(before):\n    done = set()\n    while len(done) < len(before):\n"
            "        for task in before:\n"
            "            if task not in done and done.issuperset(before[task]):\n                done.add(task)\n"
            "                yield task\n\ndef order(before):\n    return list(ready(before))\n",
        },
    ),
    "a figure": (
        "import matplotlib.pyplot as plt\nfig, ax = plt.subplots()\nax.plot([1, 2], [3, 4])\nplt.show()\n"
        "plt.imshow(torch.eye(3))",
        {},
    ),
    "PyTorch by another name": (
        "import torch as t\nimport math as m\nfrom torch.testing import assert_close\n"
        "assert_close(t.ones(2), t.ones(2))",
        {"visible": "def visible(q_len, k_len):\n    return t.ones(q_len, k_len, dtype=t.bool).tril(k_len - q_len)\n"},
    ),
    "assertions tried": (
        "try:\n    assert 1 == 2, 'no'\nexcept AssertionError as error:\n    print(error)\n"
        "try:\n    checks.close(torch.ones(2), torch.zeros(2))\nexcept AssertionError:\n    pass\n"
        "with checks.forbidden('softmax'):\n    torch.ones(2)",
        {
            "letter": "def letter():\n    try:\n        assert 'a' == 'b'\n    except AssertionError:\n"
            "        return 'b'\n"
        },
    ),
    "a module of their own": (
        "",
        {
            "affine": "class Layer(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
            "        self.made = 0\n\n"
            "class Affine(Layer):\n    def __init__(self, inputs, outputs):\n        super().__init__()\n"
            "        self.weight = nn.Parameter(torch.ones(outputs, inputs))\n"
            "        self.register_parameter('bias', "
            "nn.Parameter(torch.zeros(outputs)))\n        self.register_forward_hook(lambda *args: None)\n\n"
            "    def forward(self, x):\n        return torch.einsum('ni,oi->no', x, self.weight) + self.bias\n\n"
            "    @classmethod\n    def like(cls, other):\n        import copy\n        return copy.deepcopy(other)\n",
        },
    ),
    "an autograd function": (
        "",
        {
            "scale": "class Scale(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, x, factor):\n"
            "        ctx.factor = factor\n        return x * factor\n\n    @staticmethod\n"
            "    def backward(ctx, grad):\n"
            "        return grad * ctx.factor, None\n\ndef scale(x, factor):\n    if factor <= 0:\n"
            "        raise ValueError(f'not {factor}')\n    return Scale.apply(x, factor)\n",
        },
    ),
    "torch.func": (
        "from torch.func import grad, vmap",
        {"slope": "def slope(f, x):\n    return vmap(grad(lambda t: f(t).sum()))(x)\n"},
    ),
    "finite differences, vectorized and checkpointed": (
        "from torch.utils.checkpoint import checkpoint",
        {
            "slope": "def slope(f, x):\n    at = x.clone().requires_grad_()\n"
            "    checkpoint(f, at, use_reentrant=False).sum().backward()\n    return at.grad\n",
        },
    ),
    "properties, slots and descriptors": (
        "",
        {
            "mean": "class Mean:\n    __slots__ = ('numbers',)\n    def __init__(self, numbers):\n"
            "        self.numbers = numbers\n"
            "    @property\n    def value(self):\n        return sum(self.numbers) / len(self.numbers)\n"
            "    def __eq__(self, other):\n        return self.value == other.value\n    def __hash__(self):\n"
            "        return 0\n\n"
            "def mean(numbers):\n    return Mean(numbers).value\n",
        },
    ),
    "magics and the shell": (
        "%matplotlib inline\n%timeit -n1 -r1 sum(range(9))\n!echo hello\n_ = %who_ls\nprint(__doc__)",
        {},
    ),
    "signatures and sources looked up": (
        "import inspect\nprint(inspect.signature(torch.nn.Linear.forward), inspect.getsource(math) if 0 else '')\n"
        "help(torch.equal)\nprint(checks.close.__doc__)",
        {},
    ),
    "settings": (
        "import sys, warnings\nsys.setrecursionlimit(5000)\ntorch.set_printoptions(precision=2)\n"
        "warnings.filterwarnings('ignore')\n"
        "torch.set_num_threads(1)\nimport os\nos.environ['TOKENIZERS_PARALLELISM'] = 'false'\n"
        "with torch.autograd.set_detect_anomaly(True):\n    pass",
        {},
    ),
    "asyncio": (
        "import asyncio\nawait asyncio.sleep(0.01)\nasync def later():\n    return 'b'\nLETTER = await later()",
        {"letter": "def letter():\n    return LETTER\n"},
    ),
    "a file of their own": (
        "with open('notes.txt', 'w') as file:\n    file.write('b')\nimport pickle, json\n"
        "pickle.loads(pickle.dumps({'a': 1}))",
        {"letter": "def letter():\n    return open('notes.txt').read()\n"},
    ),
    "tests of their own": (
        "import unittest\nfrom unittest import mock\n\nclass Mine(unittest.TestCase):\n    def test_it(self):\n"
        "        self.assertEqual(1, 1)\n\nunittest.main(argv=['x'], exit=False)\n"
        "with mock.patch.object(math, 'isclose', return_value=True):\n    assert math.isclose(1, 2)",
        {},
    ),
}


@pytest.mark.parametrize("label", HONEST)
def test_honest_code_is_left_in_peace(label):
    cell, answers = HONEST[label]
    cheatable.full_marks(graded(answered(answers, cell)))
