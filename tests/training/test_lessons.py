"""Sums and names."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.training import lessons

MANY = settings(deadline=None, max_examples=200)


def read_sum(lines):
    """The number that worked columns spell, by their own last digits."""
    values = [int(line.rpartition("=")[2]) for line in lines]
    return sum((v if n == len(values) - 1 else v % 10) * 10 ** n
               for n, v in enumerate(values))


@MANY
@given(st.integers(0, 1998), st.integers(0, 999), st.sampled_from("+-"))
def test_every_column_is_true_and_the_columns_give_the_result(a, b, sign):
    a, b = max(a, b), min(a, b)
    lines = lessons.columns(a, b, sign)
    for line in lines:
        left, _, right = line.partition("=")
        assert eval(left) == int(right)  # digits, + and - only
    assert read_sum(lines) == (a + b if sign == "+" else a - b)


@MANY
@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from("+-"))
def test_low_thinks_less_than_medium_and_medium_than_high(a, b, sign):
    low, medium, high = lessons.sum_thoughts(a, b, sign)
    assert len(low) < len(medium) < len(high)
    assert str(abs(a + b if sign == "+" else a - b)) in medium
    assert high.startswith(medium) and high.endswith("right.")


def test_made_up_names_are_many():
    rng = random.Random(0)
    assert len({lessons.made_up(rng) for _ in range(2000)}) > 1500
