"""Kernels: buffers that tell an unmasked access, the compiler behind the interpreter, and what stands in for Triton."""

import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from llm40 import checks, profile

HIDDEN = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else find(name, package)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=os.environ | {"LLM40_PROFILE": "cpu"} | environment,
    )


def message(fn, *args, **kwargs) -> str:
    with pytest.raises(AssertionError) as raised:
        fn(*args, **kwargs)
    return str(raised.value)


class TestWithoutTriton:
    def test_kernels_are_defined_and_a_launch_says_what_is_missing(self):
        done = python(
            HIDDEN
            + textwrap.dedent("""
            from llm40 import checks, profile, triton, tl
            assert not profile.has_triton
            LOG2E = tl.constexpr(1.4427)
            FORMATS = {"half": tl.float16}

            @triton.jit
            def kernel(x, BLOCK: tl.constexpr):
                tl.store(x, tl.sum(x))

            @triton.autotune([triton.Config({"BLOCK": 16}, num_warps=4)], key=["n"])
            @triton.jit(noinline=True)
            def tuned(x, BLOCK: tl.constexpr):
                pass

            assert (triton.cdiv(7, 4), triton.next_power_of_2(5), LOG2E.value) == (2, 8, 1.4427)
            for run in (lambda: kernel[(1,)](1, BLOCK=2), lambda: tuned[lambda meta: (1,)](1), lambda: tl.sum(3),
                        lambda: triton.testing.do_bench(None)):
                try:
                    with checks.launches() as counted, checks.compiled():
                        run()
                except RuntimeError as error:
                    print(error)
            print(kernel, hasattr(kernel, "_repr_html_"))
        """)
        )
        assert done.returncode == 0, done.stderr
        *told, shown = done.stdout.splitlines()
        assert len(told) == 4
        assert all(line.startswith("Triton exists for Linux only: ") for line in told)
        assert shown == "<kernel: not installed here> False"

    @pytest.mark.skipif(not profile.has_triton, reason="Triton exists for Linux only")
    def test_with_triton_it_is_triton(self):
        done = python("from llm40 import triton, tl; import triton as real; print(triton is real, tl is real.language)")
        assert done.stdout.split() == ["True", "True"], done.stderr

    def test_another_name_is_an_attribute_error(self):
        with pytest.raises(ImportError):
            from llm40 import nothing  # noqa: F401

    @pytest.mark.skipif(not profile.has_triton, reason="Triton exists for Linux only")
    @pytest.mark.parametrize("value", ["true", "True", "on", "1", "yes", "Y"])
    def test_every_yes_of_triton_is_one(self, value):
        done = python("import triton; from llm40 import profile; print(profile.interpret)", TRITON_INTERPRET=value)
        assert done.stdout.split() == ["True"], done.stderr


class TestBuffers:
    def test_values_are_kept_and_strides_differ(self):
        tensors = {n: torch.randn(2, 3, 4, 8, generator=checks.generator(i)) for i, n in enumerate("qkvo")}
        with checks.buffers(**tensors) as held:
            assert all(torch.equal(getattr(held, n), t) for n, t in tensors.items())
            assert len({t.stride()[:-1] for t in held}) == 4
            assert all(t.stride(-1) == 1 for t in held)
            assert held.k.stride(2) > held.k.stride(1)  # in memory the sequence comes before the heads
        assert [tuple(t.shape) for t in held] == [(2, 3, 4, 8)] * 4

    def test_what_is_contiguous_stays_so(self):
        with checks.buffers(contiguous=["w"], w=torch.ones(3, 5), r=torch.ones(7), n=torch.tensor(2.0)) as held:
            assert held.w.is_contiguous()
            assert held.r.is_contiguous()
            assert float(held.n) == 2
        with pytest.raises(ValueError, match="no tensor is called x"), checks.buffers(written=["x"], w=torch.ones(3)):
            pass
        with pytest.raises(AttributeError, match="no tensor is called 'x'"):
            held.x  # noqa: B018

    def test_writes(self):
        def write(act, **options):
            with checks.buffers(x=torch.ones(3, 5), mask=torch.ones(3, 5, dtype=torch.bool), **options) as held:
                act(held)

        write(lambda held: held.x.zero_(), written=["x"])
        assert "x was changed in place" in message(write, lambda held: held.x.zero_())
        assert "mask was changed in place" in message(write, lambda held: held.mask.zero_(), written=["x"])
        assert "a kernel wrote outside x (3, 5)" in message(
            write, lambda held: held.x.as_strided((1,), (1,), held.x.storage_offset() + 5).zero_(), written=["x"]
        )

    def test_another_tensors_strides_meet_nan(self):
        q, do = (torch.randn(2, 3, 4, 8, generator=checks.generator(i)) for i in range(2))
        with checks.buffers(q=q, do=do) as held:
            taken = held.do.as_strided(held.do.shape, held.q.stride(), held.do.storage_offset())
            assert not torch.equal(taken, do)
            assert bool(taken.isnan().any())

    def test_gradients_reach_them(self):
        with checks.buffers(x=torch.ones(3, 5)) as held:
            x = held.x.requires_grad_()
            (x * 2).sum().backward()
            checks.close(x.grad, torch.full((3, 5), 2.0))


if profile.has_triton:
    from llm40 import tl, triton

    LIMIT = 3.0
    TWO = tl.constexpr(2.0)

    def plain(v):
        return v * 2

    @triton.jit
    def total(v):
        return tl.sum(v, 0) * TWO

    @triton.jit
    def uses_much(x, y, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        v = tl.load(x + i, mask=i < n, other=0.0).to(tl.float32)
        for _ in range(0, n):
            v += 1
        tl.store(y + i, tl.exp(v) + total(v) + tl.cdiv(n, 3) + v.max(0), mask=i < n)

    @triton.jit
    def calls_often(y, n):
        v = tl.zeros((8,), tl.float32)
        for _ in range(0, n):
            v += total(v + 1)
        tl.store(y + tl.arange(0, 8), v)

    @triton.jit
    def uses_a_global(x, y, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0) * LIMIT, mask=i < n)

    @triton.jit
    def asks_a_block(x, y, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        v = tl.load(x + i, mask=i < n, other=0.0)
        if v > 0:
            v = v * 2
        tl.store(y + i, v, mask=i < n)

    @triton.jit
    def calls_python(x, y, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(y + i, plain(tl.load(x + i, mask=i < n, other=0.0)), mask=i < n)

    @triton.jit
    def calls_what_calls_python(x, y, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(y + i, doubled(tl.load(x + i, mask=i < n, other=0.0)), mask=i < n)

    @triton.jit
    def doubled(v):
        return plain(v)

    @triton.jit
    def compares_in_a_chain(x, y, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0), mask=0 <= i < n)

    @triton.jit
    def breaks(x, y, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        v = tl.load(x + i, mask=i < n, other=0.0)
        for k in range(4):
            if k > 2:
                break
            v += 1
        tl.store(y + i, v, mask=i < n)

    @triton.jit
    def has_a_lambda(x, y, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        f = lambda v: v * 2
        tl.store(y + i, f(tl.load(x + i, mask=i < n, other=0.0)), mask=i < n)

    @triton.jit
    def tries(x, y, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        try:
            v = tl.load(x + i, mask=i < n, other=0.0)
        except ValueError:
            v = 0.0
        tl.store(y + i, v, mask=i < n)

    @triton.jit
    def collects_in_a_list(x, y, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        found = []
        found.append(tl.load(x + i, mask=i < n, other=0.0))
        tl.store(y + i, found[0], mask=i < n)

    @triton.jit
    def prints_a_format(x, y, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        print(f"{n} elements")
        tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)

    @triton.jit
    def changes_a_type(x, y, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        v = 0
        for _ in range(0, n):
            v = tl.load(x + i, mask=i < n, other=0.0)
        tl.store(y + i, v, mask=i < n)

    @triton.jit
    def has_a_wrong_branch(x, y, n, DOUBLE: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        v = tl.load(x + i, mask=i < n, other=0.0)
        if DOUBLE:
            v = v * LIMIT
        tl.store(y + i, v, mask=i < n)

    @triton.jit
    def squares(x, y, PRECISE: tl.constexpr):
        i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        a = tl.load(x + i)
        tl.store(y + i, tl.dot(a, a, input_precision="ieee") if PRECISE else tl.dot(a, a))

    @triton.autotune([triton.Config({"BLOCK": 8}, num_warps=2)], key=["n"])
    @triton.jit
    def is_tuned(x, y, n, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0) * LIMIT, mask=i < n)


@pytest.mark.skipif(not (profile.has_triton and profile.interpret), reason="needs Triton's interpreter")
def test_calls_of_helpers_do_not_patch_the_language_again(monkeypatch):
    from triton.runtime import interpreter

    patched = []
    patch = interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *args: patched.append(args) or patch(*args))
    y = torch.empty(8)
    counts = []
    for n in (1, 1, 3):  # the first may have to patch what stays patched
        patched.clear()
        calls_often[(1,)](y, n)
        counts.append(len(patched))
    assert counts[1] == counts[2] > 0
    assert tl.core.is_builtin(tl.load)  # restored behind the launch
    assert torch.equal(y, torch.full((8,), 16.0 + 16 * 17 + 16 * 17 * 17))  # v → 17 v + 16


@pytest.mark.skipif(not (profile.has_triton and profile.interpret), reason="needs Triton's interpreter")
class TestCompiled:
    def launch(self, kernel, dtype=torch.float32, **options):
        x, y = torch.randn(7, generator=checks.generator()).to(dtype), torch.empty(7, dtype=dtype)
        with checks.compiled():
            kernel[(1,)](x, y, 7, **({"BLOCK": 8} | options))

    def test_this_machine_compiles(self):
        from llm40.checks import compiler

        assert compiler._works()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_what_a_gpu_runs_passes_before_and_after_other_launches(self, dtype):
        for _ in range(2):
            self.launch(uses_much, dtype)

    @pytest.mark.parametrize(
        ("kernel", "said"),
        [
            ("uses_a_global", "Cannot access global variable LIMIT from within @jit'ed function"),
            ("asks_a_block", "Boolean value of Tensor with more than one value is ambiguous, in the line `if v > 0:`"),
            ("calls_python", "Cannot access global variable plain"),
            ("calls_what_calls_python", "Cannot access global variable plain"),
            ("compares_in_a_chain", "simultaneous multiple comparison is not supported"),
            ("breaks", "unsupported AST node type: Break"),
            ("has_a_lambda", "unsupported AST node type: Lambda"),
            ("tries", "unsupported AST node type: Try"),
            ("collects_in_a_list", "has no attribute append"),
            ("prints_a_format", "Cannot evaluate f-string"),
            ("changes_a_type", "Loop-carried variable v has initial type int32"),
        ],
    )
    def test_what_only_the_interpreter_takes(self, kernel, said):
        for _ in range(2):  # told from the cache too
            text = message(self.launch, globals()[kernel])
            assert text.startswith(f"{kernel} runs in Triton's interpreter and does not compile for a GPU: ")
            assert said in text

    def test_each_constant_is_compiled(self):
        self.launch(has_a_wrong_branch, DOUBLE=False)
        assert "Cannot access global variable LIMIT" in message(self.launch, has_a_wrong_branch, DOUBLE=True)

    def test_a_global_with_the_name_of_an_argument_is_no_part_of_a_kernel(self, monkeypatch):
        from llm40.checks import compiler

        before = compiler.sources(uses_much)
        monkeypatch.setitem(uses_much.fn.__globals__, "n", 3)
        assert compiler.sources(uses_much) == before  # or each check of a notebook compiles it anew

    def test_products_of_float32_are_not_rounded_to_tf32(self):
        def launch(dtype, precise):
            x = torch.eye(16, dtype=dtype)
            with checks.compiled():
                squares[(1,)](x, torch.empty(16, 16), PRECISE=precise)

        launch(torch.float32, True)
        launch(torch.float16, False)
        assert message(launch, torch.float32, False).startswith("squares rounds float32 to TF32")

    def test_an_autotuned_kernel(self):
        x, y = torch.randn(7), torch.empty(7)

        def launch():
            with checks.compiled():
                is_tuned[lambda meta: (1,)](x, y, 7)

        assert "Cannot access global variable LIMIT" in message(launch)

    def test_autotuned_takes_the_first_in_the_interpreter(self):
        from llm40.kernels import autotuned

        configs = (triton.Config({"BLOCK": 8}, num_warps=2), triton.Config({"BLOCK": 4}))
        tuned = autotuned(uses_much, configs, ("n",))
        assert tuned is autotuned(uses_much, configs, ("n",))
        x, y, blocks = torch.randn(7), torch.empty(7), []
        tuned[lambda meta: blocks.append(meta["BLOCK"]) or (1,)](x, y, 7)
        assert set(blocks) == {8}

    def test_of_a_cell_in_ipython(self, monkeypatch):
        from IPython.core.interactiveshell import InteractiveShell
        from traitlets.config import Config

        monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # a shell puts its own there
        shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
        done = shell.run_cell(
            textwrap.dedent("""
            from llm40 import checks, tl, triton
            import torch
            SIZE = 2

            @triton.jit
            def kernel(x, BLOCK: tl.constexpr = SIZE):
                i = tl.arange(0, BLOCK)
                tl.store(x + i, SIZE * tl.load(x + i))

            with checks.compiled():
                kernel[(1,)](torch.ones(2))
        """)
        )
        assert isinstance(done.error_in_exec, AssertionError)
        assert "Cannot access global variable SIZE" in str(done.error_in_exec)
        shell.run_cell("SIZE = tl.constexpr(2)\nwith checks.compiled():\n    kernel[(1,)](torch.ones(2), BLOCK=2)")

    def test_triton_is_as_it_was(self):
        self.launch(uses_much)
        import triton as now
        from triton.runtime.interpreter import InterpretedFunction

        assert now is triton
        assert isinstance(tl.zeros, InterpretedFunction)
        assert isinstance(triton.jit(plain), InterpretedFunction)

    def test_it_takes_under_half_a_second(self):
        self.launch(uses_much)  # the second Triton is loaded
        begun = time.process_time()
        self.launch(has_a_wrong_branch, DOUBLE=False, dtype=torch.float16)
        assert time.process_time() - begun < 0.5
