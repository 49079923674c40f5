"""The check helpers: each says what is wrong, accepts what is right, and cannot be fooled by the value it judges."""

import contextlib
import math
import subprocess
import sys
import threading
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llm40 import checks


def message(fn, *args, **kwargs) -> str:
    with pytest.raises(AssertionError) as raised:
        fn(*args, **kwargs)
    return str(raised.value)


@pytest.fixture
def x():
    return checks.randn(2, 3, 4, generator=checks.generator())


def test_generator_repeats_and_follows_the_seed_of_the_run(monkeypatch):
    first = torch.randn(5, generator=checks.generator())
    assert torch.equal(first, torch.randn(5, generator=checks.generator()))
    assert not torch.equal(first, torch.randn(5, generator=checks.generator(1)))
    monkeypatch.setenv("LLM40_SEED", "41")
    assert not torch.equal(first, torch.randn(5, generator=checks.generator()))


class TestClose:
    @pytest.mark.parametrize(
        ("dtype", "within", "beyond"),
        [
            (torch.float64, 1e-10, 1e-8),
            (torch.float32, 1e-6, 1e-4),
            (torch.float16, 0.0, 1e-2),
            (torch.bfloat16, 0.0, 0.1),
        ],
    )
    def test_tolerance_follows_the_format(self, x, dtype, within, beyond):
        expected = x.to(dtype)
        checks.close((expected.double() * (1 + within)).to(dtype), expected)
        message(checks.close, (expected.double() * (1 + beyond)).to(dtype), expected)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_rounding_an_answer_does_not_widen_what_is_allowed(self, x, dtype):
        rounded = (x * 1.001).to(dtype)
        assert "too coarse" in message(checks.close, rounded, x)
        assert "too coarse" in message(checks.close, rounded, x.double())
        checks.close(x.to(dtype), x, dtype=dtype)  # where it is asked for
        checks.close(x.to(dtype), x, rtol=0.05)

    @pytest.mark.parametrize("amplitude", [1e-12, 1.0, 1e12])
    def test_tolerance_is_below_the_quantity_judged(self, x, amplitude):
        message(checks.close, torch.zeros_like(x), x * amplitude)
        checks.close(x * amplitude, x * amplitude)

    def test_zero_is_not_approximately_something(self):
        checks.close(torch.zeros(3), torch.zeros(3))
        message(checks.close, torch.full((3,), 1e-7), torch.zeros(3))

    def test_names_the_first_place_and_the_mistake(self, x):
        wrong = x.clone()
        wrong[1, 2, 0] += 1
        text = message(
            checks.close,
            wrong,
            x,
            what="the weights",
            hint="Look at the mask.",
            mistakes={"nothing": x, "adding one there": wrong},
        )
        assert text.startswith("the weights: expected ")
        assert "at index (1, 2, 0)" in text
        assert "1 of 24 values differ" in text
        assert "This is what adding one there gives. Look at the mask." in text

    def test_a_mistake_of_another_shape_is_passed_over(self, x):
        assert "what" not in message(checks.close, x + 1, x, what="it", mistakes={"summing": x.sum()})

    def test_shape_and_dtype(self, x):
        assert "has shape (3, 4), not (2, 3, 4)" in message(checks.close, x[0], x)
        assert "has dtype float64, it should have float32" in message(checks.close, x.double(), x, dtype=torch.float32)

    def test_infinities_and_nan_must_be_where_they_are_expected(self):
        expected = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
        checks.close(expected.clone(), expected)
        for i, other in enumerate([-math.inf, math.inf, 0.0, math.nan]):
            wrong = expected.clone()
            wrong[i] = other
            assert f"at index ({i},)" in message(checks.close, wrong, expected)

    def test_numbers_and_integers(self):
        checks.close(3, 3)
        checks.close(0.5, 0.5)
        checks.close(torch.tensor([1, 2]), [1, 2])
        assert "expected 4, yours is 3" in message(checks.close, 3, 4)
        assert "expected True, yours is False" in message(checks.close, torch.tensor(False), True)
        message(checks.close, math.nan, 0.5)

    def test_what_is_no_tensor(self, x):
        assert "None (is there a return?)" in message(checks.close, None, x)
        assert "of type ndarray" in message(checks.close, x.numpy(), x)
        assert "should be a number" in message(checks.close, "3", 3)

    def test_a_subclass_that_redefines_equality_is_refused(self, x):
        class Agreeable(Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                return torch.ones(2, 3, 4, dtype=torch.bool)

        assert "of type Agreeable" in message(checks.close, torch.zeros_like(x).as_subclass(Agreeable), x)

    def test_a_graph_on_the_result_does_no_harm(self, x):
        checks.close((x.clone().requires_grad_() * 1), x)


def test_relative_l2(x):
    checks.relative_l2(x * (1 + 1e-7), x, 1e-6)
    with warnings.catch_warnings(action="error"):  # nbgrader takes a warning for a failure
        checks.relative_l2(x.clone().requires_grad_(), x.clone().requires_grad_() * 1, 1e-6)
    text = message(checks.relative_l2, x * 2, x, 1e-6, mistakes={"doubling": x * 2})
    assert "relative error 1.0e+00, allowed 1.0e-06. This is what doubling gives" in text
    broken = x.clone()
    broken[0, 1] = math.nan
    assert "4 values are not finite, first at (0, 1, 0)" in message(checks.relative_l2, broken, x, 1e-6)


def test_unchanged(x):
    nan = torch.full((2,), math.nan)
    with checks.unchanged(x, nan):
        x + 1

    def change():
        with checks.unchanged(keys=x):
            x[0, 0, 0] = 5

    assert message(change).startswith("keys was changed in place")


class TestGradients:
    def test_equal(self, x):
        checks.gradients(lambda a: a.sin(), lambda a: a.sin(), x)

    def test_names_input_and_mistake(self, x):
        text = message(
            checks.gradients,
            lambda a: 3 * a,
            lambda a: 2 * a,
            x,
            names=["query"],
            mistakes={"tripling": lambda a: 3 * a},
        )
        assert "the gradient of query" in text
        assert "This is what tripling gives" in text

    def test_detached(self, x):
        assert "carries no gradient" in message(checks.gradients, lambda a: a.detach() * 2, lambda a: 2 * a, x)
        assert "no gradient reaches input 1" in message(
            checks.gradients, lambda a, b: a * b.detach(), lambda a, b: a * b, x, x
        )

    def test_integers_take_none(self, x):
        index = torch.tensor([1, 0])
        checks.gradients(lambda a, i: a[i] * 2, lambda a, i: a[i] * 2, x, index)


def test_raises():
    assert checks.raises(ValueError, int, "x", mentions="literal") is None
    assert "does not mention the base" in message(checks.raises, ValueError, int, "x", mentions="the base")
    assert "ValueError should be raised here; the call returned a value of type int. Why" in message(
        checks.raises, ValueError, int, "1", because="Why"
    )

    def stub():
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        checks.raises(RuntimeError, stub)  # NotImplementedError is a RuntimeError, but an empty exercise is no answer


class TestCounting:
    def test_allocations_count_new_tensors_not_views(self, x):
        with checks.allocations() as made:
            x.transpose(0, 1)[0].unsqueeze(0).expand(5, 2, 4)
        assert made.total == 0
        with checks.allocations() as made:
            F.softmax(x, -1) @ x.transpose(-1, -2)
        assert made.largest == 24
        assert made.shapes[(2, 3, 3)] == 1

    def test_memory_that_an_argument_is_given_is_new(self, x):
        grown = torch.empty(0)
        with checks.allocations() as made:
            torch.mul(x, 2, out=grown)
        assert made.total == 24
        with checks.allocations() as made:
            torch.mul(x, 3, out=grown)
            grown.add_(1)
            torch.empty(0).set_(x.untyped_storage())
        assert made.total == 0
        with checks.allocations() as made:
            torch.empty(0).resize_(5, 5)
        assert made.largest == 25

    def test_a_materialized_repeat_shows(self):
        k = torch.randn(1, 2, 8, 4)
        with checks.allocations() as made:
            k.repeat_interleave(4, dim=1)
        assert made.largest >= 4 * k.numel()

    def test_calls_by_name_however_bound(self, x):
        bound = F.softmax
        with checks.calls("softmax", "matmul") as counted:
            bound(x, -1)
            x.softmax(-1)
            x @ x.mT
        assert counted == {"softmax": 2, "matmul": 1}

    @pytest.mark.parametrize(
        "call",
        [
            lambda x: F.scaled_dot_product_attention(x, x, x),
            lambda x: torch.ops.aten.scaled_dot_product_attention(x, x, x),
            lambda x: torch.compile(F.scaled_dot_product_attention, backend="eager")(x, x, x),
        ],
    )
    def test_forbidden(self, x, call):
        def attend():
            with checks.forbidden("scaled_dot_product_attention"):
                call(x)

        assert "is called, but this exercise builds it" in message(attend)

    def test_forbidden_by_its_path_under_another_name(self, x):
        from torch.utils.checkpoint import checkpoint as library

        names = {"__name__": "__main__", "library": library}
        exec("def act(x): return library(lambda t: t + 1, x, use_reentrant=False)", names)

        def act():
            with checks.forbidden("torch.utils.checkpoint.checkpoint"):
                names["act"](x)

        assert "checkpoint of PyTorch is called" in message(act)
        assert names["library"] is library

    def test_forbidden_cannot_be_swallowed(self, x):
        def attend():
            with checks.forbidden("softmax", because="write it with exp"), contextlib.suppress(BaseException):
                torch.softmax(x, -1)

        assert "write it with exp" in message(attend)

    def test_the_modes_do_not_load_the_compiler(self):
        code = (
            "import sys, torch; from llm40 import checks; x = torch.ones(2)\n"
            "with checks.allocations(), checks.flops(), checks.forbidden('softmax'): x + 1\n"
            "print('torch._dynamo' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "False", done.stderr

    def test_allowed(self, x):
        with checks.forbidden("scaled_dot_product_attention"):
            torch.softmax(x @ x.mT, -1) @ x


@dataclass(slots=True)
class Moments:
    m: Tensor
    v: Tensor


def test_held_elements_are_found_wherever_they_are_kept():
    optimizer = torch.nn.Module()
    optimizer.state = [Moments(torch.zeros(10), torch.zeros(20))]
    optimizer.waiting = deque([torch.zeros(40)])
    optimizer.weight = torch.nn.Parameter(torch.zeros(80))
    assert checks.held_elements(optimizer) == 150
    assert checks.held_elements(optimizer, besides=[optimizer.weight]) == 70


def test_moved_counts_what_operations_read_and_write():
    x = torch.ones(10, dtype=torch.float16)
    with checks.moved() as work:
        y = x.view(2, 5).float()  # 20 bytes read, 40 written
        y.add_(1)  # 40 read, 40 written
        y.T[0]
    assert work.steps == [("to_copy", 60), ("add", 80)]
    assert work.total == 140
    with checks.moved() as work:
        torch.mul(y, y, out=torch.empty(2, 5))  # 40 read twice, 40 written
    assert ("mul", 120) in work.steps


@pytest.mark.parametrize("recorded", [True, False])
def test_flops_are_those_of_pytorchs_counter(recorded):
    from torch.utils.flop_counter import FlopCounterMode

    layer = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True)
    convolution = torch.nn.Conv1d(16, 4, 3)

    def work():
        with torch.inference_mode(not recorded):
            x = layer(torch.ones(2, 5, 16))
            y = convolution(x.mT) @ torch.ones(3, 2)
            z = torch.einsum("bik,bjk->bij", x, x).sum() + y.sum()
        if recorded:
            z.backward()

    for _ in range(2):  # the second time in evaluation mode, which has a path of its own
        with checks.flops() as counted:
            work()
        with FlopCounterMode(display=False) as counter:
            work()
        assert counted.total == counter.get_total_flops() > 0
        layer.eval()


triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def double_kernel(x, y, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0) * 2
    if MASKED:
        tl.store(y + i, value, mask=i < n)
    else:
        tl.store(y + i, value)


@triton.jit
def double_some_kernel(x, y, n, programs, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (i < n) & (tl.program_id(0) < programs)
    tl.store(y + i, tl.load(x + i, mask=mask, other=0.0) * 2, mask=mask)


@triton.jit
def double_block_kernel(x, y, n, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    source = tl.make_block_ptr(x, (n,), (1,), (start,), (BLOCK,), (0,))
    target = tl.make_block_ptr(y, (n,), (1,), (start,), (BLOCK,), (0,))
    tl.store(target, 2 * tl.load(source, boundary_check=(0,), padding_option="zero"), boundary_check=(0,))


@triton.jit
def far_kernel(x, row, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    r = tl.program_id(0)
    if WIDE:
        r = r.to(tl.int64)
    tl.store(x + r * row + tl.arange(0, BLOCK), 1.0)


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr = 16):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


class TestKernels:
    def test_launches_are_counted(self):
        x, y = torch.randn(24), torch.empty(24)
        with checks.launches() as counted:
            double_kernel[(2,)](x, y, 24, BLOCK=16, MASKED=True)
            double_kernel[lambda meta: (triton.cdiv(24, meta["BLOCK"]),)](x, y, 24, BLOCK=8, MASKED=True)
        assert (counted.count, counted.programs, counted.kernels) == (2, 5, {"double_kernel": 2})
        with checks.launches() as counted:
            x * 2
        assert counted.count == 0

    def test_a_grid_that_asks_for_a_default(self):
        x, y = torch.randn(24), torch.empty(24)
        with checks.launches() as counted:
            copy_kernel[lambda meta: (triton.cdiv(24, meta["BLOCK"]),)](x, y, 24)
        assert counted.programs == 2
        checks.close(y, x)

    @pytest.mark.parametrize("masked", [True, False])
    def test_guarded_buffers_show_an_unmasked_store(self, masked):
        x = torch.randn(3, 7)
        out = checks.guarded(torch.zeros(21), what="out")
        double_kernel[(2,)](x, out.tensor, 21, BLOCK=16, MASKED=masked)
        checks.close(out.tensor, 2 * x.flatten())
        if masked:
            out.intact()
        else:
            assert "a kernel wrote outside out (21,): 11 elements" in message(out.intact)

    @pytest.mark.parametrize("masked", [True, False])
    def test_guarded_allocations_watch_the_outputs_a_launcher_makes(self, masked):
        def launch():
            with checks.guarded_allocations():
                y = torch.empty(21)
                assert bool(y.isnan().all())
                double_kernel[(2,)](torch.randn(21), y, 21, BLOCK=16, MASKED=masked)

        if masked:
            launch()
        else:
            assert "a kernel wrote outside an output" in message(launch)

    def test_traffic(self):
        x, y = torch.randn(24), torch.empty(24)
        with checks.traffic() as seen:
            double_kernel[(2,)](x, y, 21, BLOCK=16, MASKED=True)
        assert set(seen.read) == checks.addresses(x[:21])
        assert set(seen.written) == checks.addresses(y[:21])
        assert (seen.loaded, seen.stored, seen.within(x), seen.within(y)) == (21, 21, 21, 0)
        with checks.traffic(dry=True) as seen:
            double_kernel[(2,)](torch.zeros(1), y, 32, BLOCK=16, MASKED=True)
        assert seen.loaded == 32
        checks.close(y[:21], 2 * x[:21])
        with checks.traffic(only=x):
            double_kernel[(2,)](x, y[:1], 24, BLOCK=16, MASKED=True)

    def test_traffic_under_a_mask_that_a_scalar_takes_part_in(self):
        x, y = torch.randn(24), torch.full((24,), -1.0)
        with checks.traffic() as seen:
            double_some_kernel[(2,)](x, y, 21, 1, BLOCK=16)
        assert set(seen.read) == checks.addresses(x[:16])
        checks.close(y, torch.cat([2 * x[:16], torch.full((8,), -1.0)]))

    def test_traffic_of_block_pointers(self):
        x, y = torch.randn(24), torch.full((24,), -1.0)
        with checks.traffic() as seen:
            double_block_kernel[(2,)](x, y, 21, BLOCK=16)
        assert set(seen.read) == checks.addresses(x[:21])
        checks.close(y, torch.cat([2 * x[:21], torch.full((3,), -1.0)]))

    def test_traffic_of_rows_far_apart(self):
        x = torch.zeros(1)
        with checks.traffic(dry=True) as seen:
            far_kernel[(4,)](x, 2**30, BLOCK=8, WIDE=True)
        assert set(seen.written) == checks.addresses(x, (4, 8), (2**30, 1))
        with checks.traffic(dry=True) as seen:
            far_kernel[(4,)](x, 2**30, BLOCK=8, WIDE=False)
        assert set(seen.written) != checks.addresses(x, (4, 8), (2**30, 1))

    def test_rows_apart(self, x):
        rows = checks.guarded(x, row_pad=3)
        assert torch.equal(rows.tensor, x)
        assert rows.tensor.stride() == (21, 7, 1)
        rows.intact()
        rows.buffer.view(-1)[256 + 4] = 0  # the first element after the first row
        message(rows.intact)

    def test_integers_and_booleans_have_canaries_too(self):
        for values in (torch.arange(5), torch.tensor([True, False])):
            guard = checks.guarded(values)
            guard.intact()
            guard.buffer[0] = 0
            message(guard.intact)


@pytest.mark.parametrize("start", ["Thread", "pool"])
def test_forbidden_sees_other_threads(start):
    def in_thread(x):
        if start == "pool":
            with ThreadPoolExecutor() as pool:
                pool.submit(torch.softmax, x, -1).result()
        else:
            thread = threading.Thread(target=torch.softmax, args=(x, -1))
            thread.start()
            thread.join()

    with pytest.raises(AssertionError, match="softmax of PyTorch is called"), checks.forbidden("softmax"):
        in_thread(torch.ones(3))
    with checks.calls("softmax") as counted:
        in_thread(torch.ones(3))
    assert counted["softmax"] == 1
