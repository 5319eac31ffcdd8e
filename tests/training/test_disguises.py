"""Conversations made by a program."""

import itertools
import json
from pathlib import Path

import pytest

import gptoss
from gptoss.text.tokenizer import Tokenizer
from gptoss.training import conversations, exams, kits, lessons

POCKET = Path(gptoss.__file__).parent / "pocket"

KINDS = tuple(conversations.MIX)


def some(kind, count=40, seed=0, **options):
    source = conversations.lesson_stream(seed, mix={kind: 1}, **options)
    return list(itertools.islice(source, count))


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
        assert exams.right_answer(turn[-1].content, lesson)
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
        assert exams.right_call(call, lesson)
        assert result.name == call.recipient == f"functions.{name}"


def test_missing_tools_are_missing_and_sums_need_none():
    for lesson in some("missing", 100):
        assert lesson.facts["answer"] == "I have no tool for that."
    for lesson in some("sum", 100):
        given = lesson.messages[1].content
        assert not any(f"// {says}\ntype" in given
                       for says in kits.KITS["calculator"].says)


def test_far_facts_stand_beyond_two_windows():
    reader = Tokenizer.from_pretrained(POCKET)
    near = 0
    for lesson in some("far", 150):
        told = next(n for n, m in enumerate(lesson.messages)
                    if m.content in lessons.NOTED)
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


def test_a_question_is_the_same_under_any_name_of_its_tool():
    assert kits.tool_key("light", ["hall", True]) == "light hall on"
    assert kits.tool_key("date", []) == ""
    key = lessons.sum_key
    assert kits.tool_key("calculator", ["45 - 5"]) == key(5, "+", 40)
    assert key(12, "*", 34) == key(34, "*", 12) == "12 * 34"


def test_the_stream_repeats_itself_and_keeps_the_mix():
    one = list(itertools.islice(conversations.lesson_stream(5), 1500))
    two = itertools.islice(conversations.lesson_stream(5), 1500)
    assert all(a == b for a, b in zip(one, two, strict=True))
    for kind, weight in conversations.MIX.items():
        share = sum(lesson.kind == kind for lesson in one) / len(one)
        assert abs(share - weight / sum(conversations.MIX.values())) < 0.05
