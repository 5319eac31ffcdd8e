"""Who marks the examiner?

Generated from book/training/examining.py; edit the chapter, not this file.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from gptoss.chat.turn import STOPS
from gptoss.model.transformer import GptOss
from gptoss.text.generate import generate_batch
from gptoss.text.harmony import CHANNELS, EFFORTS, Message, render
from gptoss.text.parser import StreamParser
from gptoss.text.sampling import Sampler
from gptoss.text.tokenizer import Tokenizer
from gptoss.training.conversations import TALK, lesson_stream
from gptoss.training.lessons import NOTED, Lesson
from gptoss.training.stories import CAST_SLOTS, read_story

# --- How does a program examine? ---------------------------------------------

@dataclass
class Mark:
    """How one lesson was answered.

    Attributes:
        called: whether the tool call was right; None if none was due.
        right: whether the final text was.
        said: (channel or recipient, text) of each message of the model.
        thought: tokens of analysis.
    """

    lesson: Lesson
    called: bool | None = None
    right: bool = False
    said: list[tuple[str, str]] = field(default_factory=list)
    thought: int = 0


def right_story(text: str, lesson: Lesson) -> bool:
    """Coherent, and about whom and what the question asked for."""
    reading = read_story(text)
    return reading.coherent and all(
        reading.cast[slot] == lesson.facts[slot]
        for slot in CAST_SLOTS if slot in lesson.facts)


def right_answer(text: str, lesson: Lesson) -> bool:
    """Whether `text` answers the lesson's last question."""
    if lesson.kind == "story":
        return right_story(text, lesson)
    if lesson.kind == "telling":
        return text in NOTED
    if lesson.kind == "talk":
        return any(text in answers for _, _, answers in TALK)
    return text == lesson.facts["answer"]


def right_call(message: Message, lesson: Lesson) -> bool:
    """The right tool with the right arguments, as JSON."""
    name, arguments = lesson.facts["call"]
    try:
        found = json.loads(message.content)
    except ValueError:
        return False
    return (message.recipient == f"functions.{name}" and found == arguments
            and message.content_type == "<|constrain|>json")


def answers(model: GptOss, tokenizer: Tokenizer, prompts: list[list[int]],
            most: int) -> list[tuple[list[int], list[Message]]]:
    """The greedy continuation of each prompt, as ids and as messages."""
    stop, found = [tokenizer.special[name] for name in STOPS], []
    for ids in generate_batch(model, prompts, max_new_tokens=most, stop=stop,
                              sampler=Sampler(temperature=0.0)):
        parser = StreamParser(tokenizer)
        for token in ids:
            parser.feed(token)
        parser.close()
        found.append((ids, parser.messages))
    return found


def take(mark: Mark, tokenizer: Tokenizer, messages: list[Message]) -> None:
    """Enter what the model wrote into its mark."""
    for message in messages:
        mark.said.append((message.recipient or message.channel or "",
                          message.content))
        if message.channel == CHANNELS[0]:
            mark.thought += len(tokenizer.encode(message.content))
    last = messages[-1] if messages else Message("assistant")
    if last.recipient and mark.lesson.facts["call"]:
        mark.called = right_call(last, mark.lesson)
    elif last.channel == "final":
        mark.right = right_answer(last.content, mark.lesson)


EXAM, MILESTONE = ("exam", 40_000), ("milestone", 10_000)   # shelf, seed


@torch.inference_mode()
def examine(model: GptOss, tokenizer: Tokenizer, kind: str, count: int,
            seed: int = EXAM[1], most: int = 420, held: str = EXAM[0]
            ) -> list[Mark]:
    """Let the model answer `count` held-out lessons of one kind, greedily,
    with questions from the shelf `held`.

    A question for a tool counts as right only if the call was right and
    the final text, after the tool's result, is too.
    """
    source = lesson_stream(seed, hold_out=held, mix={kind: 1})
    marks = [Mark(next(source)) for _ in range(count)]
    prompts = [render(tokenizer, mark.lesson.messages[:mark.lesson.turn],
                      drop="none") for mark in marks]
    wrote = answers(model, tokenizer, prompts, most)
    again = []
    for mark, prompt, (ids, messages) in zip(marks, prompts, wrote,
                                             strict=True):
        if mark.lesson.facts["call"]:
            mark.called = False
        take(mark, tokenizer, messages)
        if mark.called:
            result = mark.lesson.messages[-2]
            assert result.role == "tool"
            more = render(tokenizer, [result], drop="none")
            again.append((mark, [*prompt, *ids, *more]))
    later = answers(model, tokenizer, [ids for _, ids in again], 120)
    for (mark, _), (_, messages) in zip(again, later, strict=True):
        take(mark, tokenizer, messages)
    for mark in marks:
        mark.right &= mark.called is not False
    return marks


def grade(marks: Sequence[Mark]) -> float:
    """The share that was right."""
    return sum(mark.right for mark in marks) / len(marks)


def error_bar(right: int, count: int, z: float = 1.96) -> list[float]:
    """Wilson's 95 % interval for a share of `right` in `count`: from where
    to where the share over all such questions may well lie."""
    share, more = right / count, z * z / count
    middle = (share + more / 2) / (1 + more)
    half = z / (1 + more) * math.sqrt(
        share * (1 - share) / count + more / count / 4)
    return [round(max(0.0, middle - half), 4),
            round(min(1.0, middle + half), 4)]


def report_card(model: GptOss, tokenizer: Tokenizer, kinds: Sequence[str],
                count: int, seed: int = EXAM[1], held: str = EXAM[0]
                ) -> dict[str, dict]:
    """For each kind: how many were asked, the share that was right with its
    error bar, and the mean number of tokens of analysis for each effort."""
    card = {}
    for kind in kinds:
        marks = examine(model, tokenizer, kind, count, seed, held=held)
        right = sum(mark.right for mark in marks)
        card[kind] = {"count": count, "right": round(right / count, 4),
                      "between": error_bar(right, count)}
        for effort in EFFORTS:
            found = [mark.thought for mark in marks
                     if mark.lesson.facts["effort"] == effort]
            card[kind][effort] = round(sum(found) / max(1, len(found)), 1)
    return card


__all__ = [
    "EXAM",
    "MILESTONE",
    "Mark",
    "answers",
    "error_bar",
    "examine",
    "grade",
    "report_card",
    "right_answer",
    "right_call",
    "right_story",
    "take",
]
