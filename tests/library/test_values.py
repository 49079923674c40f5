"""checks.close and its like: one stated tolerance, values of the kind asked for, and sentences that say something."""

import math

import numpy as np
import pytest
import torch

from llm40 import checks


def message(fn, *args, **kwargs) -> str:
    with pytest.raises(AssertionError) as raised:
        fn(*args, **kwargs)
    return str(raised.value)


class TestOneTolerance:
    @pytest.mark.parametrize("expected", [1.0, -7.0, 1e-12, 3e9])
    def test_one_percent_is_one_percent(self, expected):
        for share in (0.99, 1.0, 1.01):
            checks.close(share * expected, expected, rtol=0.01)
        for share in (0.989, 1.011, 1.019):
            message(checks.close, share * expected, expected, rtol=0.01)

    def test_the_larger_limit_holds_and_not_the_sum(self):
        checks.close(1.009, 1.0, rtol=0.01, atol=0.009)
        message(checks.close, 1.015, 1.0, rtol=0.01, atol=0.009)
        checks.close(1.5, 1.0, rtol=0.01, atol=0.5)
        message(checks.close, 1.505, 1.0, rtol=0.01, atol=0.5)

    def test_an_array_is_judged_relative_to_its_largest_element(self):
        expected = torch.tensor([100.0, 0.0, 1.0], dtype=torch.float64)
        checks.close(expected + torch.tensor([1.0, 1.0, -1.0]), expected, rtol=0.01)
        message(checks.close, expected + torch.tensor([0.0, 1.1, 0.0]), expected, rtol=0.01)
        message(checks.close, expected + torch.tensor([1.1, 0.0, 0.0]), expected, rtol=0.01)

    def test_without_atol_each_element_can_be_asked_for(self):
        expected = torch.tensor([100.0, 1.0], dtype=torch.float64)
        checks.close(expected * 1.01, expected, rtol=0.01, atol=0)
        assert "at index (1,)" in message(
            checks.close, expected + torch.tensor([0.0, 0.5], dtype=torch.float64), expected, rtol=0.01, atol=0
        )

    def test_half_of_what_was_allowed_once(self):
        message(checks.close, torch.tensor(1.0 + 1.9e-5), torch.tensor(1.0))
        checks.close(torch.tensor(1.0 + 0.9e-5), torch.tensor(1.0))

    def test_whole_numbers_beyond_the_digits_of_a_float(self):
        message(checks.close, 2**60 + 1, 2**60)
        message(checks.close, torch.tensor([2**60 + 1]), torch.tensor([2**60]))


class TestMistakes:
    def test_a_mistake_never_passes(self):
        text = message(checks.close, math.sqrt(48), 7.0, rtol=0.02, mistakes={"the root of 48": math.sqrt(48)})
        assert "This is what the root of 48 gives" in text
        checks.close(7.05, 7.0, rtol=0.02, mistakes={"the root of 48": math.sqrt(48)})

    def test_in_an_array_too(self):
        expected = torch.tensor([1.0, 2.0])
        wrong = torch.tensor([1.0, 2.01])
        message(checks.close, wrong, expected, rtol=0.01, mistakes={"a hundredth more": wrong})
        checks.close(expected, expected, rtol=0.01, mistakes={"a hundredth more": wrong})

    def test_what_the_format_cannot_tell_apart_is_no_mistake(self):
        expected = torch.tensor([1.0, 2.0])
        wrong = expected * (1 + 1e-6)
        checks.close(wrong, expected, mistakes={"rounding": wrong})
        checks.close(wrong, expected, rtol=0.01, mistakes={"rounding": wrong})

    def test_nor_what_lies_within_an_absolute_tolerance_that_is_given(self):
        near_zero, halved = torch.tensor(2e-7), torch.tensor(1e-7)  # of terms near 1, whose rounding is 1e-7
        checks.close(halved, near_zero, rtol=1e-5, atol=1e-6, mistakes={"half of it": halved})
        message(checks.close, torch.tensor(0.5), torch.tensor(1.0), atol=1e-6, mistakes={"half": torch.tensor(0.5)})

    def test_the_mistake_that_is_nearest_is_named(self):
        mistakes = {"far": 1.3, "near": 1.2, "farther": 1.29}
        assert "This is what near gives" in message(checks.close, 1.19, 1.0, rtol=0.1, mistakes=mistakes)

    def test_a_mistake_is_named_only_within_the_tolerance(self):
        expected = math.log(100) + 0.5**2 / 2
        text = message(checks.close, expected + 0.4, expected, rtol=0.05, mistakes={"bits": expected / math.log(2)})
        assert "This is what" not in text

    def test_and_only_if_it_is_nearer_than_what_is_expected(self):
        text = message(checks.close, 1.021, 1.0, rtol=0.02, mistakes={"the other": 1.0411})
        assert "This is what the other gives" in text or "This is what" not in text
        assert "This is what" not in message(checks.close, 1.0205, 1.0, rtol=0.02, mistakes={"the other": 1.042})

    def test_in_the_norm(self):
        expected = torch.ones(100)
        wrong = expected * 1.004
        assert "This is what scaling gives" in message(
            checks.relative_l2, wrong, expected, 0.005, mistakes={"scaling": wrong}
        )
        checks.relative_l2(expected * 1.0001, expected, 0.005, mistakes={"scaling": wrong})
        checks.relative_l2(expected, expected, 1e-6, mistakes={"the same": expected.clone()})


class TestKinds:
    def test_a_complex_number_is_no_real_one(self):
        x = torch.randn(3)
        for compare in (checks.close, lambda a, e: checks.relative_l2(a, e, 1e-6)):
            assert "take `.real`" in message(compare, torch.complex(x, 100 + x), x)
        assert "take `.real`" in message(checks.close, np.array([1 + 5j]), np.array([1.0]))
        with pytest.raises(TypeError, match="view_as_real"):
            checks.close(x, torch.complex(x, x))

    def test_whole_numbers_of_any_width(self):
        checks.close(np.array([1, 2], dtype=np.uint16), [1, 2])
        checks.close(6 * 70_000_000_000 * 1_400_000_000_000, 5.88e23)
        assert "expected 10, yours is 1e+20" in message(checks.number, 10**20, 10, to=0)

    def test_what_is_wrong_with_a_list_is_told(self):
        assert "holds what is of type Tensor" in message(checks.close, [torch.tensor(1.0)], [1.0])
        assert "has shape (0,), not (3,)" in message(checks.close, [], [1, 2, 3])

    @pytest.mark.parametrize(
        ("actual", "expected"),
        [
            (4.0, 4),
            (True, 1),
            (1, True),
            (1.0, True),
            (True, 1.0),
            ([1.0, 2.0], [1, 2]),
            ([1, True], [1, 1]),
            (torch.tensor([1.0]), torch.tensor([1])),
            (torch.tensor([True]), torch.tensor([1.0])),
            (torch.tensor([1]), torch.tensor([True])),
            (np.array([1.0]), np.array([1])),
            (np.float64(4), 4),
        ],
    )
    def test_another_kind_of_number_is_refused(self, actual, expected):
        assert "asked for" in message(checks.close, actual, expected)

    @pytest.mark.parametrize(
        ("actual", "expected"),
        [
            (4, 4.0),
            (np.float64(0.5), 0.5),
            (np.float32(0.5), 0.5),
            (np.int64(3), 3),
            (torch.tensor(0.5), 0.5),
            (np.array(0.5), 0.5),
            ([1, 2.5], [1.0, 2.5]),
            ((1, 2), [1, 2]),
            (torch.tensor([1, 2]), [1, 2]),
            (np.array([1.0, 2.0]), [1.0, 2.0]),
            (np.array([1.0, 2.0]), np.array([1.0, 2.0])),
            ([[1], [2]], [[1], [2]]),
            (np.float64(3.0), np.array(3.0)),
            (torch.tensor([1, 2]), torch.tensor([1.0, 2.0])),
        ],
    )
    def test_what_counts_as_the_same_kind(self, actual, expected):
        checks.close(actual, expected)

    @pytest.mark.parametrize(
        ("actual", "expected", "asked"),
        [
            (np.array([1.0]), torch.tensor([1.0]), "a torch.Tensor"),
            (torch.tensor([1.0]), np.array([1.0]), "NumPy array"),
            ([1.0], torch.tensor([1.0]), "a torch.Tensor"),
            ([1.0], np.array([1.0]), "a NumPy array"),
            ([1.0, "2"], [1.0, 2.0], "a list of numbers"),
            ("3", 3, "a number"),
            (None, 3.0, "a number"),
            ([3], 3, "a number"),
            (1.0, np.array(1.0), "a NumPy array"),
        ],
    )
    def test_what_does_not(self, actual, expected, asked):
        assert asked in message(checks.close, actual, expected)

    def test_a_list_is_no_tensor_of_a_dtype(self):
        assert "it should be a torch.Tensor" in message(checks.close, [1.0], [1.0], dtype=torch.float32)

    def test_rows_of_unequal_length(self):
        assert "can't be read as numbers" in message(checks.close, [[1.0], [1.0, 2.0]], [[1.0], [2.0]])
        assert "has shape (2,), not (3,)" in message(checks.close, [1.0, 2.0], [1.0, 2.0, 3.0])


class TestSentences:
    def test_different_numbers_look_different(self):
        text = message(checks.close, -0.9162907, -0.9162912)
        assert "expected -0.9162912, yours is -0.9162907" in text
        text = message(checks.close, torch.tensor([1.0, 2.0000002]), torch.tensor([1.0, 2.0]), rtol=1e-9)
        assert "expected 2 at index (1,), yours is 2.0000002" in text

    def test_says_what_is_allowed(self):
        assert "(off by 0.03, allowed is 0.01)" in message(checks.close, 1.03, 1.0, rtol=0.01)

    def test_infinities_are_words(self):
        assert "expected inf, yours is 709.5" in message(checks.close, 709.5, math.inf)


class TestNumber:
    def test_within_the_share(self):
        checks.number(1.01, 1.0, to=0.01)
        checks.number(3, 3.0)
        checks.number(np.float32(0.5), 0.5)
        message(checks.number, 1.011, 1.0, to=0.01)
        checks.number(0.01, 0.0, atol=0.01)
        message(checks.number, 0.011, 0.0, atol=0.01)

    def test_whole_numbers(self):
        checks.number(12, 12, to=0)
        assert "a whole number is asked for; yours is 12.0" in message(checks.number, 12.0, 12, to=0)
        message(checks.number, 13, 12, to=0)
        message(checks.number, True, 1, to=0)

    @pytest.mark.parametrize("value", ["7", None, True, torch.tensor(7.0), [7.0], 7j])
    def test_only_a_plain_number(self, value):
        assert "a number is asked for" in message(checks.number, value, 7.0)

    def test_a_mistake(self):
        assert "This is what √48 gives" in message(checks.number, 6.93, 7, to=0.01, mistakes={"√48": math.sqrt(48)})


class TestDrawn:
    def test_right_samples_pass_in_a_thousand_runs(self):
        generator = checks.generator()
        for _ in range(1000):
            checks.drawn(0.3 + 2 * torch.randn(400, generator=generator), mean=0.3, std=2)
            checks.drawn(torch.rand(400, generator=generator), mean=0.5, std=12**-0.5, kurtosis=1.8)
            checks.drawn((torch.rand(2000, generator=generator) < 0.1).float(), mean=0.1)

    def test_wrong_ones_are_refused(self):
        draws = torch.randn(10_000, generator=checks.generator())
        assert "the mean of 10000 draws is" in message(checks.drawn, draws + 0.1, mean=0.0, std=1.0)
        assert "the standard deviation of 10000 draws is" in message(checks.drawn, 1.06 * draws, mean=0.0, std=1.0)
        text = message(checks.drawn, draws / 4, std=0.5, mistakes={"dividing twice": 0.25})
        assert "This is what dividing twice gives" in text
        broken = draws.clone()
        broken[3] = math.nan
        assert "not finite" in message(checks.drawn, broken, mean=0.0)

    def test_takes_lists_and_refuses_few(self):
        checks.drawn([0.0, 1.0] * 500, mean=0.5)
        with pytest.raises(ValueError, match="too few"):
            checks.drawn(torch.zeros(99), mean=0.0)


class TestKindAndParts:
    @pytest.mark.parametrize(
        ("value", "wanted"),
        [
            (1, int),
            (np.int64(1), int),
            (1.5, float),
            (1, float),
            (True, bool),
            ("a", str),
            ([], list),
            ({}, dict),
            ((), tuple),
            (torch.ones(1), torch.Tensor),
            (np.ones(1), np.ndarray),
        ],
    )
    def test_of_the_kind(self, value, wanted):
        checks.kind(value, wanted)

    @pytest.mark.parametrize(
        ("value", "wanted", "said"),
        [
            (1.0, int, "a whole number is asked for; yours is 1.0"),
            (True, int, "yours is True"),
            (True, float, "a number"),
            ("1", float, "yours is '1'"),
            (1, bool, "True or False"),
            ((), list, "a list is asked for"),
            (None, dict, "None"),
            (np.ones(1), torch.Tensor, "of type ndarray"),
        ],
    )
    def test_not_of_the_kind(self, value, wanted, said):
        assert said in message(checks.kind, value, wanted)

    def test_parts(self):
        out, weights = checks.parts((1, 2), "out", "weights")
        assert (out, weights) == (1, 2)
        assert message(checks.parts, torch.ones(2), "out", "weights", what="forward") == (
            "forward: a pair (out, weights) is asked for; yours is of type Tensor."
        )
        assert "three values (a, b, c) are asked for; yours are 2" in message(checks.parts, (1, 2), "a", "b", "c")
        message(checks.parts, [1, 2], "out", "weights")
