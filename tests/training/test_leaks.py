"""What is kept for an exam is in no text of training."""

import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.training import conversations, leaks, lessons, stories

MANY = settings(deadline=None, max_examples=200)

MORE = int(os.environ.get("GPTOSS_FUZZ", "1"))


def some(kind, count=40, seed=0, **options):
    source = conversations.lesson_stream(seed, mix={kind: 1}, **options)
    return list(itertools.islice(source, count))

ASKED = ("story", "sum", "tool", "recall", "far", "missing", "after")


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("held", ["exam", "milestone"])
def test_the_check_reads_every_question_of_an_exam(kind, held):
    for one in some(kind, 60, hold_out=held):
        texts = [m.content for m in one.messages]
        found = {key for text in texts for key in leaks.leaks(text)}
        assert found, texts[-3:]
        assert {stories.shelf(key) for key in found} == {held}
        with pytest.raises(leaks.LeakError, match=f"kind {kind}"):
            leaks.without_leaks(one)


@pytest.mark.parametrize("mix", [
    conversations.MIX, conversations.SECOND, conversations.THIRD])
def test_no_lesson_of_training_holds_a_question_of_the_exam(mix):
    source = conversations.lesson_stream(31, mix=mix)
    for one in itertools.islice(source, 500 * MORE):
        leaks.without_leaks(one)
    for text in itertools.islice(stories.story_stream(31), 300 * MORE):
        leaks.story_without_leaks(text)


def test_lessons_without_the_rule_are_caught(monkeypatch):
    monkeypatch.setattr(conversations, "unheld", lambda draw: draw())
    caught = sum(bool(leaks.leaks(m.content)) for one in some("far", 60)
                 for m in one.messages)
    assert caught > 5
    monkeypatch.undo()
    for module in (lessons, conversations):
        monkeypatch.setattr(module, "draw_fact",
                            lambda rng, fact, free=False: fact[4](rng))
    assert any(leaks.leaks(m.content) for one in some("telling", 80)
               for m in one.messages)


@MANY
@given(st.integers(0, 999), st.integers(0, 999), st.randoms())
def test_every_form_of_a_sum_is_read_as_one_fact(a, b, rng):
    key = lessons.sum_key(a, "+", b)
    assert key == lessons.sum_key(b, "+", a) == lessons.sum_key(a + b, "-", b)
    assert key == lessons.sum_key(b, "-", a + b)
    assert (key == "") == (max(a, b) < 20)
    for sign, x, y in (("+", a, b), ("-", a + b, b), ("-", a + b, a)):
        ask = rng.choice(lessons.SUMS[sign]).format(a=x, b=y, name="Bomak",
                                              things="bells")
        for text in (ask, *lessons.sum_thoughts(x, y, sign),
                     f"It is {x}{sign}{y}=?", f"so {x} {sign} {y}"):
            assert {*leaks.sums_in(text)} - {""} == {key} - {""}, text


def test_a_column_has_no_key_of_its_own():
    for a in range(10):
        for b in range(10):
            for sign in "+-":
                for carry in (0, 1):
                    asked, answer, _ = lessons.column(a, b, carry, sign)
                    assert not {*leaks.sums_in(asked + answer)} - {""}


def test_dates_are_no_differences():
    assert not [*leaks.sums_in("Today is 2026-11-02 (Monday). 2024-01-28")]
