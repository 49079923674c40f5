"""Tricks that aim at the guard itself: at what it calls, what it trusts, and what it hands out.

Found by people who had read it. As in test_cheats.py, a wrong answer with its trick gains no point unflagged.
"""

import cheatable
import pytest
from cheatable import EVERYTHING, Cheat, graded

VISIBLE = (
    "def visible(q_len, k_len):\n    if (q_len, k_len) != (1, 2):\n        left[0] = 1\n"
    "    return torch.zeros(q_len, k_len).bool()\n"
)
HOSTILE_KEY = """
left = [0]
class Key(str):
    def __hash__(self):
        return hash({name!r})
    def __eq__(self, other):
        if left[0] and type(other) is str and other == {name!r}:
            left[0] -= 1
            return True
        return False
"""
HALF_RIGHT = "def mean(numbers):\n    left[0] = 1\n    return 1.5 if numbers == [1.0, 2.0] else 0.0\n"
ALL_FRAMES = """
import sys
class Path(str):
    def endswith(self, *ends):
        for frame in sys.__dict__['_current_' + 'frames']().values():
            while frame is not None:
                desk = getattr(frame, 'f_lo' + 'cals').get('desk')
                if desk is not None:
                    desk.run_check = lambda **request: ('ok', '', '', ())
                frame = getattr(frame, 'f_ba' + 'ck')
        return False
    startswith = encode = __str__ = __fspath__ = endswith
try:
    open(Path('/x'))
except (OSError, RuntimeError, TypeError):
    pass
"""
FALSE_FILE = """
class File(str):
    def startswith(self, starts, *more):
        return isinstance(starts, tuple) and starts[0] == '<frozen '
try:
    exec(compile('''
def up():
    return higher()
def higher():
    frame = getattr(sys, '_get' + 'frame')(1)
    while '__operand__' not in getattr(frame, 'f_glo' + 'bals'):
        frame = getattr(frame, 'f_ba' + 'ck')
    return getattr(frame, 'f_glo' + 'bals')
''', File('x'), 'exec'))
except RuntimeError:
    up = dict
import sys
class Blind:
    close = equal = staticmethod(lambda *args, **options: True)
    __getattr__ = lambda self, name, real=torch: getattr(real, name)
"""
LIAR = """
class Liar:
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = None
"""
CALLBACK = "def slope(f, x):\n    f(x)\n{}\n    return 3 * x**2\n"
LINKED = """
import subprocess
subprocess.run(['ln', '-s', '/proc/self/mem', 'x'])
seen = []
def look():
    for line in open('/proc/self/maps'):
        start, end = (int(part, 16) for part in line.split()[0].split('-'))
        if 'rw-p' in line and end - start < 2**26:
            with open('x', 'rb') as memory:
                memory.seek(start)
                seen.append(b'sword' + b'fish' in memory.read(end - start))
"""
LISTENING = """
import hashlib, marshal
seen = []
def listen(module, name):
    real = getattr(module, name)
    def heard(*given, **named):
        seen.append(name)
        setattr(module, name, real)
        return real(*given, **named)
    setattr(module, name, heard)
for name in ('blake2b', 'shake_256'):
    listen(hashlib, name)
listen(marshal, 'loads')
"""

CHEATS = {
    "every frame, while a path is looked at": Cheat(EVERYTHING, ALL_FRAMES),
    "a file's name of one's own class": Cheat(
        "visible",
        FALSE_FILE,
        {
            "visible": "def visible(q_len, k_len):\n    names = up()\n    names['torch'] = names['checks'] = Blind()\n"
            "    return torch.zeros(q_len, k_len).bool()\n"
        },
    ),
    "mock.ANY": Cheat(
        ("count", "order", "table"),
        "from unittest.mock import ANY",
        {name: f"def {name}(value):\n    return ANY\n" for name in ("count", "order", "table")},
    ),
    "a weak proxy of a liar": Cheat(
        ("count", "order", "table"),
        LIAR + "import weakref\nliar = Liar()\nproxy = weakref.proxy(liar)",
        {name: f"def {name}(value):\n    return proxy\n" for name in ("count", "order", "table")},
    ),
    "a liar inside a list of the library": Cheat(
        "order",
        LIAR + "import collections\nlies = collections.UserList()\nlies.data = Liar()",
        {"order": "def order(befores):\n    return lies\n"},
    ),
    "liars for a function of the lesson's": Cheat(
        "order", LIAR, {"order": "def order(befores):\n    return [Liar() for task in befores]\n"}
    ),
    "a liar behind a view of a dict": Cheat(
        "table",
        "import types\nview = types.MappingProxyType(type('D', (dict,), {'__eq__': lambda self, other: True})())",
        {"table": "def table(words):\n    return view\n"},
    ),
    "a liar in an array": Cheat(
        "count",
        LIAR + "import numpy\nlies = numpy.array(Liar(), dtype=object)",
        {"count": "def count(words):\n    return lies\n"},
    ),
    "a number with the name of a class that may calculate": Cheat(
        "mean",
        "class Number(float):\n    __sub__ = lambda self, other: 0.0\nNumber.__name__ = 'Affine'",
        {"mean": "def mean(numbers):\n    return Number(0.0)\n"},
    ),
    "eval, called where the check's names are": Cheat(
        "letter",
        "import functools",
        {"letter": "letter = functools.partial(eval, '''exec(\"str = lambda x: 'b'\") or 'a' ''')\n"},
    ),
    "a callback's closure by inspect": Cheat(
        "slope",
        "import inspect",
        {
            "slope": CALLBACK.format(
                "    found = inspect.getclosurevars(f).nonlocals\n    if 'expected' in found:\n"
                "        return found['expected']"
            )
        },
    ),
    "a callback's names by words in two parts": Cheat(
        "slope",
        "",
        {
            "slope": CALLBACK.format(
                "    names = getattr(f, '__glo' + 'bals__', {})\n    if 'expected' in names:\n"
                "        return names['expected']"
            )
        },
    ),
    "a callback's type hints": Cheat(
        "slope",
        "import typing\nstore = []",
        {
            "slope": CALLBACK.format(
                "    f.__annotations__ = {'a': 'store.append(dict(globals())) or int'}\n    typing.get_type_hints(f)\n"
                "    if 'expected' in store[-1]:\n        return store[-1]['expected']"
            )
        },
    ),
    "a callback's variables in a traceback": Cheat(
        "slope",
        "import traceback\nfrom torch import tensor\ntorch.set_printoptions(precision=20)",
        {
            "slope": CALLBACK.format(
                "    try:\n        f('text')\n    except Exception as error:\n"
                "        told = traceback.TracebackException.from_exception(error, capture_locals=True)\n"
                "        names = told.stack[-1].locals or {}\n        if 'expected' in names:\n"
                "            return eval(names['expected'])"
            )
        },
    ),
    "the class of a module": Cheat(
        "visible",
        "left = [0]\nclass Bent(type(torch)):\n    @property\n    def equal(self, real=torch.equal):\n"
        "        if left[0]:\n            left[0] -= 1\n            return lambda *args: True\n        return real\n"
        "torch.__class__ = Bent",
        {"visible": VISIBLE},
    ),
    "the bases of a class": Cheat(
        "scale",
        "on = [0]\nclass Bent:\n    def double(self, *args):\n        if on[0]:\n            on[0] -= 1\n"
        "            return torch.zeros(self.shape, dtype=torch.float64)\n        return self.to(torch.float64)\n"
        "torch.Tensor.__bases__ = (Bent, *torch.Tensor.__bases__)",
        {"scale": "def scale(x, factor):\n    on[0] = 1\n    return torch.zeros(x.shape)\n"},
    ),
    "a name in torch that says it is another": Cheat(
        "visible",
        HOSTILE_KEY.format(name="equal")
        + "names = vars(torch)\nreal = names.pop('equal')\nnames[Key('equal')] = lambda *args: True\n"
        "names['equal'] = real",
        {"visible": VISIBLE},
    ),
    "a name in the notebook that says it is another": Cheat(
        "mean", HOSTILE_KEY.format(name="abs") + "globals()[Key('abs')] = lambda x: 0", {"mean": HALF_RIGHT}
    ),
    "a default argument of assert_close": Cheat(
        "probabilities",
        "torch.testing.assert_close.__kwdefaults__['rtol'] = 0.01\n"
        "torch.testing.assert_close.__kwdefaults__['atol'] = 0.0",
        {
            "probabilities": "def probabilities(scores):\n    e = torch.exp(scores - scores.amax(-1, keepdim=True))\n"
            "    return 1.005 * e / e.sum(-1, keepdim=True)\n"
        },
    ),
    "what a function of the checks encloses": Cheat(
        "probabilities",
        "cell = getattr(checks.forbidden, '__clo' + 'sure__')[0]\nreal = getattr(cell, 'cell_' + 'contents')\n"
        "def blind(*names, **options):\n    return real(*names) if names == ('softmax',) else iter([None])\n"
        "setattr(cell, 'cell_' + 'contents', blind)",
        {"probabilities": "def probabilities(scores):\n    return torch.softmax(scores, -1)\n"},
    ),
    "a dtype under another's name": Cheat(
        "visible",
        "torch.bool = torch.float32",
        {
            "visible": "def visible(q_len, k_len):\n"
            "    return (torch.arange(k_len) <= torch.arange(q_len)[:, None] + k_len - q_len).float()\n"
        },
    ),
    "a field of fractions": Cheat(
        "mean",
        "import fractions\nleft = [0]\n"
        "fractions.Fraction._numerator = property(lambda self: 0, lambda self, value: None)",
        {"mean": HALF_RIGHT},
    ),
    "an operation implemented again": Cheat(
        "probabilities",
        "@torch.library.impl('aten::_softmax', 'CPU')\ndef soft(x, dim, half):\n    return x.clone()",
        {"probabilities": "def probabilities(scores):\n    return scores.clone()\n"},
    ),
    "a worker that was there before": Cheat(
        "probabilities",
        "import queue, threading\nasked, given = queue.Queue(), queue.Queue()\ndef work():\n    while True:\n"
        "        given.put(torch.softmax(asked.get(), -1))\nthreading.Thread(target=work, daemon=True).start()",
        {"probabilities": "def probabilities(scores):\n    asked.put(scores)\n    return given.get(timeout=2)\n"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("label", CHEATS)
def test_no_point_is_gained_unflagged(label):
    cheat = CHEATS[label]
    cheatable.nothing_gained(graded(cheat.submission()), cheat.wrong, cheat.word)


def test_memory_by_a_link_made_by_another_process():
    looking = "def count(words):\n    look()\n    return len(words)\n"
    cheat = Cheat("count", LINKED, {"count": looking}, "print(any(seen))")
    assert "True" not in cheatable.outputs(graded(cheat.submission()), "added")


def test_what_seals_the_connection_is_called_where_nobody_listens():
    """With the key, answers could be forged; with the programs, hidden tests could be read."""
    submission = cheatable.answered({}, LISTENING, "print('heard', seen)")
    assert "heard []" in cheatable.outputs(graded(submission), "added")


def test_a_failure_names_no_place_of_the_guard():
    """What a learner reads begins in the check."""
    result = graded(cheatable.answered({"count": "def count(words):\n    return -1\n"}))
    assert "count-check-1, line" in cheatable.outputs(result, "check")
    assert "inside" not in cheatable.outputs(result, "check")


HONEST = {
    "a tensor shown in another way": "torch.Tensor.__repr__ = lambda self: f'{tuple(self.shape)}'",
    "a profile": "import cProfile\ncProfile.run('sum(range(10))')",
    "a file named mem": "with open('mem', 'w') as file:\n    file.write('honest')\nprint(open('mem').read())",
    "a path as an object": "import pathlib\npath = pathlib.Path('x')\npath.write_text('x')\nprint(open(path).read())",
}


@pytest.mark.parametrize("label", HONEST)
def test_honest_code_is_left_in_peace(label):
    cheatable.full_marks(graded(cheatable.answered({}, HONEST[label])))
