"""Chapter 14: stories and their reader."""

import math
import random

import gptoss.stories as t
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

MANY = settings(deadline=None, max_examples=60)


@MANY
@given(st.integers(0, 2**32))
def test_what_is_told_can_be_read(seed):
    rng = random.Random(seed)
    cast = t.draw_cast(rng)
    reading = t.read_story(t.tell(rng, cast))
    assert reading.coherent and reading.beat == ""
    assert reading.cast.items() <= cast.items()


@MANY
@given(st.integers(0, 2**32), st.sampled_from(t.CAST_SLOTS))
def test_no_mention_may_differ_from_the_first(seed, slot):
    rng = random.Random(seed)
    cast = t.draw_cast(rng)
    story = t.tell(rng, cast)
    other = rng.choice([w for w in t.WORDS[slot] if w != cast[slot]])
    parts = story.split(cast[slot])
    if len(parts) < 3:
        return
    cut = rng.randrange(1, len(parts))
    left, right = cast[slot].join(parts[:cut]), cast[slot].join(parts[cut:])
    assert not t.read_story(left + other + right).coherent


@MANY
@given(st.integers(0, 2**32), st.integers(1, 15))
def test_a_story_cut_short_names_the_beat(seed, beats):
    story = t.tell(random.Random(seed), beats=beats)
    reading = t.read_story(story)
    names = [name for name, _ in t.BEATS]
    assert not reading.coherent and reading.rest == ""
    assert names.index(reading.beat) >= beats - 2


@pytest.mark.parametrize("text", ["", " ", "Hello", "Once upon a time",
                                  "(((", "\n" * 9, "{hero}"])
def test_anything_can_be_read(text):
    assert t.read_story(text).coherent is False


def test_held_out_casts_never_train():
    training, exam = t.story_stream(3), t.story_stream(3, hold_out=True)
    for source, kept in ((training, False), (exam, True)):
        for _ in range(50):
            cast = t.read_story(next(source)).cast
            assert t.held_out(cast) is kept
    rng = random.Random(0)
    share = sum(t.held_out(t.draw_cast(rng)) for _ in range(4000)) / 4000
    assert 0.08 < share < 0.12


def test_entropy_is_what_the_generator_draws():
    class Counting(random.Random):
        nats = 0.0

        def choice(self, seq):
            self.nats += math.log(len(seq))
            return super().choice(seq)

    rng = Counting(0)
    for _ in range(1500):
        t.tell(rng)
    assert rng.nats / 1500 == pytest.approx(t.story_entropy(), abs=0.15)
