"""Stories and their reader."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.training import stories

MANY = settings(deadline=None, max_examples=60)


@MANY
@given(st.integers(0, 2**32))
def test_what_is_told_can_be_read(seed):
    rng = random.Random(seed)
    cast = stories.draw_cast(rng)
    reading = stories.read_story(stories.tell(rng, cast))
    assert reading.coherent and reading.beat == ""
    assert reading.cast.items() <= cast.items()


@MANY
@given(st.integers(0, 2**32), st.sampled_from(stories.CAST_SLOTS))
def test_no_mention_may_differ_from_the_first(seed, slot):
    rng = random.Random(seed)
    cast = stories.draw_cast(rng)
    story = stories.tell(rng, cast)
    other = rng.choice([w for w in stories.WORDS[slot] if w != cast[slot]])
    parts = story.split(cast[slot])
    if len(parts) < 3:
        return
    cut = rng.randrange(1, len(parts))
    left, right = cast[slot].join(parts[:cut]), cast[slot].join(parts[cut:])
    assert not stories.read_story(left + other + right).coherent


@MANY
@given(st.integers(0, 2**32), st.integers(1, 15))
def test_a_story_cut_short_names_the_beat(seed, beats):
    story = stories.tell(random.Random(seed), beats=beats)
    reading = stories.read_story(story)
    names = [name for name, _ in stories.BEATS]
    assert not reading.coherent and reading.rest == ""
    assert names.index(reading.beat) >= beats - 2


@pytest.mark.parametrize("text", ["", " ", "Hello", "Once upon a time",
                                  "(((", "\n" * 9, "{hero}"])
def test_anything_can_be_read(text):
    assert stories.read_story(text).coherent is False


def test_held_out_casts_never_train():
    training = stories.story_stream(3)
    exam = stories.story_stream(3, hold_out=True)
    for source, kept in ((training, False), (exam, True)):
        for _ in range(50):
            cast = stories.read_story(next(source)).cast
            assert stories.held_out(cast) is kept
    rng = random.Random(0)
    kept = sum(stories.held_out(stories.draw_cast(rng)) for _ in range(4000))
    share = kept / 4000
    assert 0.08 < share < 0.12


def test_entropy_is_what_the_generator_draws():
    class Counting(random.Random):
        nats = 0.0

        def choice(self, seq):
            self.nats += math.log(len(seq))
            return super().choice(seq)

    rng = Counting(0)
    for _ in range(1500):
        stories.tell(rng)
    assert rng.nats / 1500 == pytest.approx(stories.story_entropy(), abs=0.15)


def test_a_shelf_is_one_in_ten_and_nothing_has_none():
    found = [stories.shelf(f"key {n}") for n in range(6000)]
    assert abs(found.count("") / 6000 - 0.9) < 0.02
    assert abs(found.count("exam") / found.count("milestone") - 2) < 0.4
    assert stories.shelf("") == ""
