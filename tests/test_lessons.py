"""Chapter 14: conversations made by a program, and the one that marks."""

import itertools
import json
import os
import random
from pathlib import Path

import gptoss.exams as e
import gptoss.leaks as k
import gptoss.lessons as t
import gptoss.stories as st_
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.model.transformer import GptOss
from gptoss.text.harmony import Message
from gptoss.text.tokenizer import Tokenizer

POCKET = Path(e.__file__).parent / "pocket"
MANY = settings(deadline=None, max_examples=200)
KINDS = tuple(t.MIX)
MORE = int(os.environ.get("GPTOSS_FUZZ", "1"))


def some(kind, count=40, seed=0, **options):
    source = t.lesson_stream(seed, mix={kind: 1}, **options)
    return list(itertools.islice(source, count))


def read_sum(lines):
    """The number that worked columns spell, by their own last digits."""
    values = [int(line.rpartition("=")[2]) for line in lines]
    return sum((v if n == len(values) - 1 else v % 10) * 10 ** n
               for n, v in enumerate(values))


@MANY
@given(st.integers(0, 1998), st.integers(0, 999), st.sampled_from("+-"))
def test_every_column_is_true_and_the_columns_give_the_result(a, b, sign):
    a, b = max(a, b), min(a, b)
    lines = t.columns(a, b, sign)
    for line in lines:
        left, _, right = line.partition("=")
        assert eval(left) == int(right)  # digits, + and - only
    assert read_sum(lines) == (a + b if sign == "+" else a - b)


@MANY
@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from("+-"))
def test_low_thinks_less_than_medium_and_medium_than_high(a, b, sign):
    low, medium, high = t.sum_thoughts(a, b, sign)
    assert len(low) < len(medium) < len(high)
    assert str(abs(a + b if sign == "+" else a - b)) in medium
    assert high.startswith(medium) and high.endswith("right.")


@pytest.mark.parametrize("kind", KINDS)
def test_a_lesson_is_a_conversation_with_one_answer(kind):
    for lesson in some(kind):
        roles = [m.role for m in lesson.messages]
        assert roles[0] == "system" and roles[1] in ("developer", "user")
        assert roles[lesson.turn - 1] == "user"
        turn = lesson.messages[lesson.turn:]
        assert turn[0].channel == "analysis"
        assert turn[-1].channel == "final"
        assert turn[-1].content == lesson.facts["answer"]
        assert e.right_answer(turn[-1].content, lesson)
        assert all(m.channel != "analysis"
                   for m in lesson.messages[:lesson.turn])
        assert (kind == "tool") == (lesson.facts["call"] is not None)
        assert not any(c in m.content for m in lesson.messages
                       for c in "{}") or roles[1] == "developer"


def test_calls_are_calls_of_a_tool_that_is_given():
    for lesson in some("tool", 200):
        call, result = lesson.messages[-3:-1]
        name, arguments = lesson.facts["call"]
        assert f"type {name} = (" in lesson.messages[1].content
        for parameter in arguments:
            assert f"\n{parameter}: " in lesson.messages[1].content
        assert json.loads(call.content) == arguments
        assert e.right_call(call, lesson)
        assert result.name == call.recipient == f"functions.{name}"


@pytest.mark.parametrize("content,recipient,content_type", [
    ("{}", "functions.{}", "<|constrain|>json"),
    ("not json", "functions.{}", "<|constrain|>json"),
    (None, "functions.nobody", "<|constrain|>json"),
    (None, "functions.{}", None)])
def test_a_wrong_call_is_wrong(content, recipient, content_type):
    lesson = next(one for one in some("tool") if one.facts["call"][1])
    name, arguments = lesson.facts["call"]
    message = Message(
        "assistant", json.dumps(arguments) if content is None else content,
        channel="commentary", recipient=recipient.format(name),
        content_type=content_type)
    assert not e.right_call(message, lesson)


def test_missing_tools_are_missing_and_sums_need_none():
    for lesson in some("missing", 100):
        assert lesson.facts["answer"] == "I have no tool for that."
    for lesson in some("sum", 100):
        given = lesson.messages[1].content
        assert not any(f"// {says}\ntype" in given
                       for says in t.KITS["calculator"].says)


def test_far_facts_stand_beyond_two_windows():
    reader = Tokenizer.from_pretrained(POCKET)
    near = 0
    for lesson in some("far", 150):
        told = next(n for n, m in enumerate(lesson.messages)
                    if m.content in t.NOTED)
        between = lesson.messages[told + 1:lesson.turn - 1]
        near += sum(len(reader.encode(m.content)) + 4
                    for m in between) <= 128
    assert near <= 7


ASKED = ("story", "sum", "tool", "recall", "far", "missing", "after")


@pytest.mark.parametrize("kind", ASKED)
def test_the_shelves_do_not_mix(kind):
    assert all(one.held == "exam" for one in some(kind, hold_out=True))
    assert all(one.held == "milestone"
               for one in some(kind, hold_out="milestone"))
    assert not any(one.held for one in some(kind))


@pytest.mark.parametrize("kind", ASKED)
@pytest.mark.parametrize("held", ["exam", "milestone"])
def test_the_check_reads_every_question_of_an_exam(kind, held):
    for one in some(kind, 60, hold_out=held):
        texts = [m.content for m in one.messages]
        found = {key for text in texts for key in k.leaks(text)}
        assert found, texts[-3:]
        assert {st_.shelf(key) for key in found} == {held}
        with pytest.raises(k.LeakError, match=f"kind {kind}"):
            k.without_leaks(one)


@pytest.mark.parametrize("mix", [t.MIX, t.SECOND, t.THIRD])
def test_no_lesson_of_training_holds_a_question_of_the_exam(mix):
    source = t.lesson_stream(31, mix=mix)
    for one in itertools.islice(source, 500 * MORE):
        k.without_leaks(one)
    for text in itertools.islice(st_.story_stream(31), 300 * MORE):
        k.story_without_leaks(text)


def test_lessons_without_the_rule_are_caught(monkeypatch):
    monkeypatch.setattr(t, "unheld", lambda draw: draw())
    caught = sum(bool(k.leaks(m.content)) for one in some("far", 60)
                 for m in one.messages)
    assert caught > 5
    monkeypatch.undo()
    monkeypatch.setattr(t, "draw_fact",
                        lambda rng, fact, free=False: fact[4](rng))
    assert any(k.leaks(m.content) for one in some("telling", 80)
               for m in one.messages)


@MANY
@given(st.integers(0, 999), st.integers(0, 999), st.randoms())
def test_every_form_of_a_sum_is_read_as_one_fact(a, b, rng):
    key = t.sum_key(a, "+", b)
    assert key == t.sum_key(b, "+", a) == t.sum_key(a + b, "-", b)
    assert key == t.sum_key(b, "-", a + b)
    assert (key == "") == (max(a, b) < 20)
    for sign, x, y in (("+", a, b), ("-", a + b, b), ("-", a + b, a)):
        ask = rng.choice(t.SUMS[sign]).format(a=x, b=y, name="Bomak",
                                              things="bells")
        for text in (ask, *t.sum_thoughts(x, y, sign),
                     f"It is {x}{sign}{y}=?", f"so {x} {sign} {y}"):
            assert {*k.sums_in(text)} - {""} == {key} - {""}, text


def test_a_column_has_no_key_of_its_own():
    for a in range(10):
        for b in range(10):
            for sign in "+-":
                for carry in (0, 1):
                    asked, answer, _ = t.column(a, b, carry, sign)
                    assert not {*k.sums_in(asked + answer)} - {""}


def test_dates_are_no_differences():
    assert not [*k.sums_in("Today is 2026-11-02 (Monday). 2024-01-28")]


def test_a_shelf_is_one_in_ten_and_nothing_has_none():
    found = [st_.shelf(f"key {n}") for n in range(6000)]
    assert abs(found.count("") / 6000 - 0.9) < 0.02
    assert abs(found.count("exam") / found.count("milestone") - 2) < 0.4
    assert st_.shelf("") == ""


def test_a_question_is_the_same_under_any_name_of_its_tool():
    assert t.tool_key("light", ["hall", True]) == "light hall on"
    assert t.tool_key("date", []) == ""
    assert t.tool_key("calculator", ["45 - 5"]) == t.sum_key(5, "+", 40)
    assert t.sum_key(12, "*", 34) == t.sum_key(34, "*", 12) == "12 * 34"


def test_error_bars_hold_the_share_and_narrow():
    for right, count in ((0, 40), (20, 40), (40, 40), (195, 200)):
        low, high = e.error_bar(right, count)
        assert 0 <= low <= right / count <= high <= 1
    few, many = e.error_bar(38, 40), e.error_bar(190, 200)
    assert few[1] - few[0] > many[1] - many[0]
    # by hand: middle 0.941519, half 0.031098
    assert many == [0.9104, 0.9726]


def test_the_stream_repeats_itself_and_keeps_the_mix():
    one = list(itertools.islice(t.lesson_stream(5), 1500))
    two = itertools.islice(t.lesson_stream(5), 1500)
    assert all(a == b for a, b in zip(one, two, strict=True))
    for kind, weight in t.MIX.items():
        share = sum(lesson.kind == kind for lesson in one) / len(one)
        assert abs(share - weight / sum(t.MIX.values())) < 0.05


def test_made_up_names_are_many():
    rng = random.Random(0)
    assert len({t.made_up(rng) for _ in range(2000)}) > 1500


@pytest.fixture(scope="module")
def pocket():
    return (GptOss.from_pretrained(POCKET, dtype=torch.float32),
            Tokenizer.from_pretrained(POCKET))


@pytest.mark.parametrize("kind,least", [
    ("story", 28), ("sum", 27), ("tool", 26), ("recall", 26), ("far", 26),
    ("missing", 23), ("talk", 29), ("beyond", 29)])
def test_pocket_answers_what_it_never_saw(pocket, kind, least):
    marks = e.examine(*pocket, kind, count=30, seed=77)
    wrong = [(m.lesson.messages[m.lesson.turn - 1].content, m.said)
             for m in marks if not m.right]
    assert len(marks) - len(wrong) >= least, wrong


def test_pocket_thinks_longer_when_told_to(pocket):
    card = e.report_card(*pocket, ["sum"], count=30, seed=5)["sum"]
    assert card["low"] < card["medium"] < card["high"]


def test_an_untaught_model_passes_nothing():
    model, reader = GptOss.from_pretrained(POCKET), None
    reader = Tokenizer.from_pretrained(POCKET)
    torch.manual_seed(0)
    blank = GptOss(model.config, dtype=torch.float32, packed=False)
    assert e.grade(e.examine(blank, reader, "sum", 4, most=20)) == 0
