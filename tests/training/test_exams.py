"""The one that marks."""

import itertools
import json
from pathlib import Path

import pytest
import torch

import gptoss
from gptoss.model.transformer import GptOss
from gptoss.text.harmony import Message
from gptoss.text.tokenizer import Tokenizer
from gptoss.training import conversations, exams

POCKET = Path(gptoss.__file__).parent / "pocket"


def some(kind, count=40, seed=0, **options):
    source = conversations.lesson_stream(seed, mix={kind: 1}, **options)
    return list(itertools.islice(source, count))


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
    assert not exams.right_call(message, lesson)


def test_error_bars_hold_the_share_and_narrow():
    for right, count in ((0, 40), (20, 40), (40, 40), (195, 200)):
        low, high = exams.error_bar(right, count)
        assert 0 <= low <= right / count <= high <= 1
    few, many = exams.error_bar(38, 40), exams.error_bar(190, 200)
    assert few[1] - few[0] > many[1] - many[0]
    # by hand: middle 0.941519, half 0.031098
    assert many == [0.9104, 0.9726]


@pytest.fixture(scope="module")
def pocket():
    return (GptOss.from_pretrained(POCKET, dtype=torch.float32),
            Tokenizer.from_pretrained(POCKET))


@pytest.mark.parametrize("kind,least", [
    ("story", 28), ("sum", 27), ("tool", 26), ("recall", 26), ("far", 26),
    ("missing", 27), ("talk", 28), ("beyond", 29)])
def test_pocket_answers_what_it_never_saw(pocket, kind, least):
    marks = exams.examine(*pocket, kind, count=30, seed=77)
    wrong = [(m.lesson.messages[m.lesson.turn - 1].content, m.said)
             for m in marks if not m.right]
    assert len(marks) - len(wrong) >= least, wrong


def test_pocket_thinks_longer_when_told_to(pocket):
    card = exams.report_card(*pocket, ["sum"], count=30, seed=5)["sum"]
    assert card["low"] < card["medium"] < card["high"]


def test_an_untaught_model_passes_nothing():
    model, reader = GptOss.from_pretrained(POCKET), None
    reader = Tokenizer.from_pretrained(POCKET)
    torch.manual_seed(0)
    blank = GptOss(model.config, dtype=torch.float32, packed=False)
    assert exams.grade(exams.examine(blank, reader, "sum", 4, most=20)) == 0
