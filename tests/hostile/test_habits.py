"""Honest habits: what people leave in their notebooks. None costs a point, none raises suspicion.

Each is a cell of its own above the first exercise, or an answer that works in an unusual way. They are packed several
to a notebook; when a pack loses points, each of its habits is graded alone, and the test names those that did it.
"""

from collections.abc import Mapping

import cheatable
import pytest
from cheatable import Result, answered, find, full_marks, graded
from nbformat import reads
from nbformat.v4 import new_code_cell

from autograder.grading.rebuild import read_role

PACK = 20  # habits in a notebook

CELLS = {
    # --- looking for a mistake ---
    "anomaly detection left on": "torch.autograd.set_detect_anomaly(True)",
    "anomaly detection around a step": "with torch.autograd.detect_anomaly(check_nan=False):\n"
    "    torch.ones(1, requires_grad=True).sum().backward()",
    "a stack looked at": "import inspect\nprint(inspect.stack()[0].function)",
    "the current frame": "import inspect\nprint(inspect.currentframe().f_lineno)",
    "a stack extracted": "import traceback\nprint(len(traceback.extract_stack()))",
    "a stack printed": "import traceback\ntraceback.print_stack()",
    "an exception's frames walked": "import traceback\ntry:\n    1 / 0\nexcept ZeroDivisionError as error:\n"
    "    print([frame.name for frame in traceback.extract_tb(error.__traceback__)])",
    "a trace set and taken back": "import sys\nsys.settrace(lambda *args: None)\nsys.settrace(None)",
    "a profile": "import cProfile, pstats\nprofile = cProfile.Profile()\nprofile.enable()\nsum(range(99))\n"
    "profile.disable()\npstats.Stats(profile).print_stats(3)",
    "a profile of PyTorch": "with torch.profiler.profile() as prof:\n    torch.ones(9).sum()\n"
    "print(len(prof.key_averages()))",
    "memory traced": "import tracemalloc\ntracemalloc.start()\nx = [0] * 999\n"
    "print(tracemalloc.get_traced_memory())\ntracemalloc.stop()",
    "memory traced and left on": "import tracemalloc\ntracemalloc.start(5)",
    "faulthandler": "import faulthandler\nfaulthandler.enable()",
    "garbage counted": "import gc\ngc.collect()\nprint(sum(torch.is_tensor(o) for o in gc.get_objects()) >= 0)",
    "the collector switched off": "import gc\ngc.disable()",
    "references counted": "import sys\nprint(sys.getrefcount(torch))",
    "sizes": "import sys\nprint(sys.getsizeof([1, 2, 3]))",
    "bytecode": "import dis\ndis.dis(lambda x: x + 1)",
    "a source read": "import inspect\nprint(inspect.getsource(checks.close)[:40])",
    "an excepthook": "import sys\nsys.excepthook = lambda *args: print(args)",
    "a display hook": "from IPython.core.displayhook import DisplayHook\n"
    "get_ipython().display_formatter.formatters['text/plain'].for_type(float, lambda f, p, c: p.text(f'{f:.3f}'))\n1.5",
    "xmode": "%xmode Minimal",
    "nan checked by a hook": "layer = nn.Linear(2, 2)\nlayer.register_forward_hook(lambda m, i, o: None)\n"
    "layer(torch.ones(1, 2))",
    "a global forward hook": "handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: None)",
    "a global hook removed": "h = nn.modules.module.register_module_full_backward_hook(lambda *a: None)\nh.remove()",
    "gradients printed by a hook": "x = torch.ones(1, requires_grad=True)\nx.register_hook(print)\n(2 * x).backward()",
    "gradcheck": "torch.autograd.gradcheck(torch.sin, torch.ones(2, dtype=torch.float64, requires_grad=True))",
    "warnings as errors": "import warnings\nwarnings.simplefilter('error')",
    "warnings shown always": "import warnings\nwarnings.simplefilter('always')",
    "deterministic algorithms": "torch.use_deterministic_algorithms(True, warn_only=True)",
    "logging switched on": "import logging\nlogging.basicConfig(level=logging.DEBUG)\nlogging.debug('here')",
    "TORCH_LOGS": "import os\nos.environ['TORCH_SHOW_CPP_STACKTRACES'] = '1'",
    "flops counted": "from torch.utils.flop_counter import FlopCounterMode\n"
    "with FlopCounterMode(display=False) as counter:\n    torch.ones(2, 2) @ torch.ones(2, 2)\n"
    "print(counter.get_total_flops())",
    "a dispatch mode of their own": "from torch.utils._python_dispatch import TorchDispatchMode\n\n"
    "class Seen(TorchDispatchMode):\n    def __torch_dispatch__(self, f, types, args=(), kwargs=None):\n"
    "        print(f)\n        return f(*args, **(kwargs or {}))\n\nwith Seen():\n    torch.ones(2) + 1",
    "what autograd saves": "with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):\n"
    "    torch.ones(2, requires_grad=True).exp().sum().backward()",
    # --- several things at once ---
    "a thread pool left open": "from concurrent.futures import ThreadPoolExecutor\npool = ThreadPoolExecutor(2)\n"
    "print(list(pool.map(abs, [-1, 2])))",
    "a process pool left open": "import multiprocessing as mp\nprocesses = mp.get_context('fork').Pool(2)\n"
    "print(processes.map(abs, [-1, 2]))",
    "a process pool closed": "import multiprocessing as mp\nwith mp.get_context('fork').Pool(2) as p:\n"
    "    print(p.map(abs, [-1, 2]))",
    "an executor of processes": "import multiprocessing as mp\nfrom concurrent.futures import ProcessPoolExecutor\n"
    "workers = ProcessPoolExecutor(1, mp.get_context('fork'))\nprint(workers.submit(abs, -1).result())",
    "a timer that is still to come": "import threading\ntimer = threading.Timer(600, print)\ntimer.daemon = True\n"
    "timer.start()",
    "a timer that comes": "import threading\nthreading.Timer(0.2, lambda: None).start()",
    "a heartbeat in the background": "import threading, time\n\ndef beat():\n"
    "    while True:\n        time.sleep(0.05)\n\n"
    "threading.Thread(target=beat, daemon=True).start()",
    "a monitor that samples memory": "import threading, time, resource\nseen = []\n\ndef sample():\n    while True:\n"
    "        seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n        time.sleep(0.1)\n\n"
    "threading.Thread(target=sample, daemon=True).start()",
    "a loader with workers that stay": "from torch.utils.data import DataLoader\n"
    "loader = DataLoader(range(8), batch_size=2, num_workers=1, persistent_workers=True,\n"
    "                    multiprocessing_context='fork')\nprint(len(list(loader)))",
    "a loader": "from torch.utils.data import DataLoader\nprint(next(iter(DataLoader(range(8), batch_size=4))))",
    "a queue and its thread": "import queue, threading\nq_ = queue.Queue()\n"
    "threading.Thread(target=q_.get, daemon=True).start()",
    "a child process": "import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', 'print(1)'],"
    " capture_output=True, text=True).stdout)",
    "a child left running": "import subprocess\nsleeper = subprocess.Popen(['sleep', '600'])",
    "asyncio tasks left over": "import asyncio\n\nasync def later():\n    await asyncio.sleep(600)\n\n"
    "left = asyncio.ensure_future(later())",
    "asyncio in a thread": "import asyncio, threading\nloop_ = asyncio.new_event_loop()\n"
    "threading.Thread(target=loop_.run_forever, daemon=True).start()",
    "one thread for PyTorch": "torch.set_num_threads(1)",
    "a signal handler": "import signal\nsignal.signal(signal.SIGALRM, lambda *args: None)\nsignal.alarm(0)",
    "an exit handler": "import atexit\natexit.register(print, 'bye')",
    # --- settings ---
    "double by default": "torch.set_default_dtype(torch.float64)\ntorch.set_default_dtype(torch.float32)",
    "a default device": "torch.set_default_device('cpu')",
    "seeds everywhere": "import random\nimport numpy as np\nrandom.seed(0)\nnp.random.seed(0)\ntorch.manual_seed(0)",
    "gradients switched off": "torch.set_grad_enabled(False)\ntorch.set_grad_enabled(True)",
    "inference mode": "with torch.inference_mode():\n    torch.ones(2) + 1",
    "print options": "torch.set_printoptions(precision=2, sci_mode=False)\nimport numpy as np\n"
    "np.set_printoptions(suppress=True)",
    "flush denormals": "torch.set_flush_denormal(False)",
    "matmul precision": "torch.set_float32_matmul_precision('high')",
    "errstate": "import numpy as np\nnp.seterr(all='warn')",
    "plots": "import matplotlib.pyplot as plt\nplt.style.use('ggplot')\nplt.rcParams['figure.dpi'] = 50\n"
    "plt.plot([1, 2])\nplt.show()",
    "a figure left open": "import matplotlib.pyplot as plt\nfig, axes = plt.subplots(2)",
    "pandas-like magics": "%config InlineBackend.figure_format = 'svg'\n%matplotlib inline",
    "autoreload": "%load_ext autoreload\n%autoreload 2",
    "timings": "%timeit -n1 -r1 sum(range(9))\n%time sum(range(9))",
    "a timed cell": "%%time\ntotal = sum(range(9))",
    "a captured cell": "%%capture said\nprint('quiet')",
    "names listed": "%who\n%whos",
    "the shell": "!ls\n!echo $HOME",
    "a bash cell": "%%bash\necho hello",
    "a file written by a magic": "%%writefile kept.py\nKEPT = 1",
    "a module of their own": "open('mine.py', 'w').write('def twice(x):\\n    return 2 * x\\n')\nimport mine\n"
    "assert mine.twice(2) == 4",
    "a module reloaded": "open('again.py', 'w').write('A = 1\\n')\nimport importlib\nimport again\n"
    "importlib.reload(again)",
    "another folder": "import os\nos.makedirs('deeper', exist_ok=True)\nos.chdir('deeper')\nos.chdir('..')",
    "the path of modules": "import sys\nsys.path.append('..')",
    "environment variables": "import os\nos.environ['OMP_NUM_THREADS'] = '1'\nos.environ['CUDA_LAUNCH_BLOCKING'] = '1'",
    "a deep recursion allowed": "import sys\nsys.setrecursionlimit(10_000)",
    "a locale": "import locale\nlocale.setlocale(locale.LC_ALL, 'C')",
    "outputs cleared": "from IPython.display import clear_output\nprint('a')\nclear_output()",
    "HTML shown": "from IPython.display import HTML, Markdown, display\ndisplay(HTML('<b>b</b>'), Markdown('*m*'))",
    "a progress bar": "from tqdm.auto import tqdm\nfor _ in tqdm(range(3)):\n    pass",
    "a stored history": "%history -l 1\nprint(len(In), type(Out))",
    "a pickle": "import pickle\npickle.dump({'a': torch.ones(2)}, open('a.pkl', 'wb'))\n"
    "pickle.load(open('a.pkl', 'rb'))",
    "a checkpoint": "torch.save(nn.Linear(2, 2).state_dict(), 'net.pt')\ntorch.load('net.pt')",
    # --- names and code of their own ---
    "names of the checks": "x = y = result = expected = answer = scores = g = layer = other = mask = 1",
    "one-letter names": "a, b, c, d, e, f, h, i, j, k, l, m, n = range(13)",
    "a helper called close": "def close(a, b):\n    return abs(a - b) < 1e-6",
    "input shadowed": "input = torch.ones(2)\nsum_ = input.sum()",
    "a builtin shadowed and given back": "list = [1, 2]\ndel list",
    "dir and globals": "print(len(dir()), len(globals()) > 3, 'torch' in globals())",
    "vars of a module": "print(len(vars(math)))",
    "globals filled in a loop": "for name_ in ('p', 'q'):\n    globals()[name_ + '_size'] = 1",
    "exec and eval": "exec('made = 1 + 1')\nprint(eval('made'))",
    "a function patched for a test": "from unittest import mock\nwith mock.patch('math.sqrt', return_value=2):\n"
    "    assert math.sqrt(9) == 2",
    "a method of torch wrapped for a look": "kept = torch.Tensor.__repr__\n"
    "torch.Tensor.__repr__ = lambda self, **k: 't'\n"
    "print(torch.ones(2))\ntorch.Tensor.__repr__ = kept",
    "a method added to tensors": "torch.Tensor.mean_of_squares = lambda self: self.square().mean()",
    "a class registered": "from torch.utils import _pytree\nclass Box:\n    pass\n"
    "_pytree.register_pytree_node(Box, lambda b: ([], None), lambda c, x: Box())",
    "an operator registered": "@torch.library.custom_op('mine::twice', mutates_args=())\n"
    "def twice(x: torch.Tensor) -> torch.Tensor:\n    return 2 * x\n\nprint(twice(torch.ones(1)))",
    "doctests": "import doctest\n\ndef one():\n    '''\n    >>> one()\n    1\n    '''\n    return 1\n\n"
    "doctest.run_docstring_examples(one, globals())",
    "something compiled eagerly": "double_ = torch.compile(lambda x: x * 2, backend='eager')\n"
    "print(double_(torch.ones(1)))",
    "something scripted": "traced = torch.jit.trace(lambda x: x * 2, torch.ones(1))\nprint(traced(torch.ones(1)))",
    "vmap and grad": "from torch.func import grad, vmap\nprint(vmap(grad(torch.sin))(torch.ones(2)))",
    "NumPy beside": "import numpy as np\nprint(np.linalg.norm(np.ones(3)), torch.from_numpy(np.ones(2)).sum())",
    "random state kept": "state = torch.get_rng_state()\ntorch.randn(3)\ntorch.set_rng_state(state)",
    "a walrus and a match": "if (n_ := 3) > 2:\n    match n_:\n        case 3:\n            print('three')",
    "unicode names": "α, β = 1, 2\nprint(α + β)",
    "an unused lambda": "_ = lambda *args: None",
    "deleted names": "temporary = 1\ndel temporary",
    "type checking": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas",
    "an optional package": "try:\n    import not_there_at_all\nexcept ImportError:\n    not_there_at_all = None",
    "annotations": "from __future__ import annotations\nlater: int = 3",
}
# What fails where nobody types an answer, or has the package: the cell alone.
FAILING = {
    "pdb.set_trace() left in": "import pdb\npdb.set_trace()",
    "breakpoint() left in": "breakpoint()",
    "a question to whoever sits there": "name = input('your name? ')",
    "a debugger's magic": "%debug",
    "a package that is not there": "import a_package_that_is_not_there",
    "a scratch cell that fails": "undefined_name + 1",
    "a pip install": "%pip install -q no-such-package-of-ours",
}
ANSWERS = {
    "anomaly detection in the answer": {
        "slope": "def slope(f, x):\n    with torch.autograd.detect_anomaly(check_nan=False):\n"
        "        at = x.clone().requires_grad_()\n        return torch.autograd.grad(f(at).sum(), at)[0]\n"
    },
    "a stack in the answer": {
        "count": "import inspect, traceback\n\ndef count(words):\n    inspect.stack()\n    traceback.extract_stack()\n"
        "    return len(words)\n"
    },
    "a pool in the answer": {
        "mean": "from concurrent.futures import ThreadPoolExecutor\nhelpers = ThreadPoolExecutor(2)\n\n"
        "def mean(numbers):\n    return helpers.submit(sum, numbers).result() / len(numbers)\n"
    },
    "a timer in the answer": {
        "letter": "import threading\n\ndef letter():\n"
        "    timer = threading.Timer(0.01, lambda: None)\n    timer.start()\n"
        "    timer.join()\n    return 'b'\n"
    },
    "asserts and prints": {
        "table": "def table(words):\n    assert isinstance(words, list), type(words)\n    print(len(words), 'words')\n"
        "    return {word: words.count(word) for word in words}\n"
    },
    "a cache": {
        "visible": "import functools\n\n@functools.cache\ndef visible(q_len, k_len):\n"
        "    return torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len)\n"
    },
    "compiled eagerly": {
        "scale": "@torch.compile(backend='eager')\ndef product(x, factor):\n    return x * factor\n\n"
        "def scale(x, factor):\n    if factor <= 0:\n        raise ValueError(f'not {factor}')\n"
        "    return product(x, factor)\n"
    },
    "timed": {
        "order": "import time\n\ndef order(before):\n    began = time.perf_counter()\n    done = []\n"
        "    while len(done) < len(before):\n        done += [t for t in before if t not in done"
        " and set(before[t]) <= set(done)][:1]\n    print(f'{time.perf_counter() - began:.3f} s')\n    return done\n"
    },
}


def test_there_are_a_hundred():
    assert len(CELLS) + len(FAILING) + len(ANSWERS) >= 120


def with_habits(cells: Mapping[str, str], answers: Mapping[str, str] | None = None) -> Result:
    notebook = answered(dict(answers or {}))
    at = find(notebook, "scale")
    notebook.cells[at:at] = [new_code_cell(source, id=f"habit-{i}") for i, source in enumerate(cells.values())]
    return graded(notebook)


def what_failed(result: Result) -> list[str]:
    """The learner's own cells that raised something, with what they raised."""
    cells = [cell for cell in reads(result.notebook.decode(), as_version=4).cells if read_role(cell) == "added"]
    errors = [(cell, output) for cell in cells for output in cell.outputs if output.output_type == "error"]
    return [f"{cell.source!r}: {output.ename}: {output.evalue}" for cell, output in errors]


def packs(cells: Mapping[str, str]) -> list[dict[str, str]]:
    names = list(cells)
    return [{name: cells[name] for name in names[i : i + PACK]} for i in range(0, len(names), PACK)]


def trouble(cells: Mapping[str, str]) -> str:
    result = with_habits(cells)
    try:
        full_marks(result)
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("pack", packs(CELLS), ids=lambda pack: next(iter(pack)))
def test_habits_cost_nothing(pack):
    result = with_habits(pack)
    assert what_failed(result) == []
    lost = result.score < result.max_score or result.flags or result.status != "graded"
    assert not lost, {name: said for name, cell in pack.items() if (said := trouble({name: cell}))} or result.flags


def test_habits_that_fail_cost_only_their_cell():
    result = with_habits(FAILING)
    lost = result.score < result.max_score or result.flags or result.status != "graded"
    assert not lost, {name: said for name, cell in FAILING.items() if (said := trouble({name: cell}))} or result.flags


def test_habits_in_answers():
    """All in one notebook: no two are of the same exercise."""
    answers = {exercise: source for habit in ANSWERS.values() for exercise, source in habit.items()}
    assert len(answers) == len(ANSWERS)
    cheatable.full_marks(with_habits({}, answers))
