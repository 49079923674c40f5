"""What a call may do to what it is given: each helper sees the fault that it is for, and lets honest code pass."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from llm40 import checks


def message(fn, *args, **kwargs) -> str:
    with pytest.raises(AssertionError) as raised:
        fn(*args, **kwargs)
    return str(raised.value)


class TestKept:
    @pytest.fixture
    def model(self):
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

    def within(self, model, act, **options):
        with checks.kept(model, **options):
            act(model)

    def test_honest(self, model):
        def evaluate(model):
            was = model.training
            model.eval()
            with torch.no_grad():
                model(torch.ones(2, 3))
            model.train(was)

        self.within(model, evaluate)

    @pytest.mark.parametrize(
        ("act", "said"),
        [
            (lambda m: m.eval(), "the module.training was True before the call and is False after it"),
            (lambda m: m[2].eval(), "2.training was True"),
            (lambda m: m.requires_grad_(False), "requires_grad of 0.weight was True"),
            (lambda m: m[0].register_forward_hook(lambda *a: None), "the number of hooks on 0 was 0"),
            (lambda m: m[0].register_forward_pre_hook(lambda *a: None), "the number of hooks on 0"),
            (lambda m: m(torch.ones(2, 3)).sum().backward(), ".grad of 0.weight was None"),
            (lambda m: m(torch.ones(2, 3)), "its values of 1.running_mean changed"),
            (lambda m: m[0].register_buffer("extra", torch.ones(1)), "the names of its parameters and buffers"),
            (lambda m: m[0].weight.data.add_(1), "its values of 0.weight changed"),
        ],
    )
    def test_what_was_left_changed(self, model, act, said):
        assert said in message(self.within, model, act)

    def test_switches_are_put_back_after_they_were_told(self, model):
        assert "is_grad_enabled() is False" in message(self.within, model, lambda m: torch.set_grad_enabled(False))
        assert torch.is_grad_enabled()
        assert "default dtype" in message(self.within, model, lambda m: torch.set_default_dtype(torch.float64))
        assert torch.get_default_dtype() == torch.float32

    def test_values_may_change(self, model):
        self.within(model, lambda m: m(torch.ones(2, 3)), values=False)
        assert "training" in message(self.within, model, lambda m: m.eval(), values=False)

    def test_a_tensor(self):
        x = torch.ones(3, requires_grad=True)
        assert "x: .grad was None before the call" in message(self.tensor, x, lambda: x.sum().backward())
        x.grad = None
        assert "x: requires_grad was True" in message(self.tensor, x, lambda: x.requires_grad_(False))
        assert "x: its values changed" in message(self.tensor, x, lambda: x.data.zero_())
        self.tensor(x, lambda: x * 2)

    @pytest.mark.filterwarnings("error")  # nbgrader takes what a check writes for a failure
    def test_a_tensor_that_is_no_leaf(self):
        self.tensor(2 * torch.ones(3, requires_grad=True), lambda: None)

    def tensor(self, x, act):
        with checks.kept(x=x):
            act()

    def test_switches(self, model):
        try:
            assert "is_grad_enabled() is False" in message(self.within, model, lambda m: torch.set_grad_enabled(False))
        finally:
            torch.set_grad_enabled(True)
        try:
            assert "the default dtype is float64" in message(
                self.within, model, lambda m: torch.set_default_dtype(torch.float64)
            )
        finally:
            torch.set_default_dtype(torch.float32)


class TestKeepsDtype:
    def test_honest(self):
        x = torch.randn(40, generator=checks.generator())
        checks.keeps_dtype(lambda t: t.softmax(-1), x, reference=lambda t: t.softmax(-1))
        checks.keeps_dtype(lambda t, w: {"a": [t * w], "n": t.argmax()}, x, x)

    @pytest.mark.parametrize(
        "fn",
        [
            lambda t: t.float(),
            lambda t: t.float().softmax(-1) if t.dtype == torch.float16 else t.softmax(-1).float(),
            lambda t: t * torch.ones(40),
        ],
    )
    def test_another_format(self, fn):
        assert "it should have the format of the inputs" in message(
            checks.keeps_dtype, fn, torch.randn(40, generator=checks.generator())
        )

    def test_float64_through_float32(self):
        x = torch.randn(40, generator=checks.generator())
        assert "for inputs of float64" in message(
            checks.keeps_dtype, lambda t: t.float().exp().to(t.dtype), x, reference=torch.exp
        )

    def test_sums_in_half_precision(self):
        def rounded(t):
            total = torch.zeros((), dtype=t.dtype)
            for value in t:
                total = total + value
            return total

        x = torch.rand(4000, generator=checks.generator())
        assert "for inputs of float16" in message(
            checks.keeps_dtype, rounded, x, reference=torch.sum, dtypes=[torch.float16]
        )
        checks.keeps_dtype(lambda t: t.float().sum().to(t.dtype), x, reference=torch.sum, dtypes=[torch.float16])


class TestUsesGenerator:
    def test_honest(self):
        checks.uses_generator(lambda g: torch.randn(10, generator=g))
        checks.uses_generator(lambda g: [torch.multinomial(torch.ones(100), 20, generator=g), 3])
        checks.uses_generator(lambda g: torch.randint(0, 2, (60,), generator=g).tolist())

    @pytest.mark.parametrize(
        ("draw", "said"),
        [
            (lambda g: torch.randn(10), "a generator that everybody shares"),
            (lambda g: torch.randn(10, generator=g) + torch.rand(10), "everybody shares"),
            (lambda g: torch.randn(10, generator=g) + np.random.rand(), "everybody shares"),
            (lambda g: torch.randn(10, generator=g) + random.random(), "everybody shares"),
            (lambda g: torch.randn(10, generator=g.manual_seed(3)), "same draws again"),
            (
                lambda g: torch.randn(10, generator=torch.Generator().manual_seed(g.initial_seed())),
                "leaves its generator",
            ),
            (lambda g: torch.randn(10, generator=torch.Generator().manual_seed(0)), "leaves its generator"),
            (lambda g: torch.randn(10, generator=g.manual_seed(g.initial_seed())), "starts another one from its seed"),
            (
                lambda g: (torch.randn(10, generator=g), torch.randn(10, generator=torch.Generator().manual_seed(1)))[
                    1
                ],
                "the same draws again",
            ),
            (lambda g: torch.zeros(10), "leaves its generator"),
        ],
    )
    def test_every_other_source(self, draw, said):
        assert said in message(checks.uses_generator, draw)

    def test_a_fresh_seed_of_the_system(self):
        def draw(g):
            torch.rand(1, generator=g)
            fresh = torch.Generator()
            fresh.seed()
            return torch.randn(10, generator=fresh)

        assert "is everything drawn from `generator`?" in message(checks.uses_generator, draw)

    def test_global_state_is_put_back_by_a_seed(self):
        def draw(g):
            torch.manual_seed(g.initial_seed())
            return torch.randn(10)

        assert "everybody shares" in message(checks.uses_generator, draw)
