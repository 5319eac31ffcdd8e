"""How do we know that no exam question was practised?

Generated from book/training/leaks.py; edit the chapter, not this file.
"""

import re
from collections.abc import Iterator

from gptoss.training.kits import KITS, LANGUAGES, MONEY, NOTES, ROOMS, tool_key
from gptoss.training.lessons import FACTS, SUMS, THINGS, Lesson, sum_key
from gptoss.training.stories import BEATS, WORDS, cast_key, line_pattern, shelf
from gptoss.weights.errors import Error

# --- How is a sum found in every form? ---------------------------------------

class LeakError(Error):
    """A text for training holds a question that is kept for the exam."""


def literal(line: str) -> str:
    """The longest part of a template without a slot: where it is missing,
    no regular expression need look."""
    return max(re.split(r"\{\w+\}", line), key=len)


DIGIT = re.compile(r"\d")
DATE = re.compile(r"\d{4}-\d\d-\d\d")
SUM = re.compile(r"(?<![\d+*-])(?=(\d+) ?([-+*]|plus|minus|times) ?(\d+))")
SIGNS = {"plus": "+", "minus": "-", "times": "*"}
PLACES = {"a": r"(?P<a>\d+)", "b": r"(?P<b>\d+)", "x": "([^.]+)",
          "name": r"\w+", "things": r"\w+"}


def backwards(line: str) -> re.Pattern:
    """What a template can become, with a group for each number or value."""
    pattern = re.escape(line)
    for slot, place in PLACES.items():
        pattern = pattern.replace(rf"\{{{slot}\}}", place)
    return re.compile(pattern)


TOLD = [(literal(line), sign, backwards(line))
        for sign, lines in SUMS.items() for line in lines]


def sums_in(text: str) -> Iterator[str]:
    """The sums, differences and products in a text, with signs or words;
    columns are below twenty and have no key."""
    text = DATE.sub("", text)
    for a, sign, b in SUM.findall(text) if DIGIT.search(text) else ():
        yield sum_key(int(a), SIGNS.get(sign, sign), int(b))
    for part, sign, line in TOLD:
        for found in line.finditer(text) if part in text else ():
            yield sum_key(int(found["a"]), sign, int(found["b"]))


# --- How are stories and facts found? ----------------------------------------

OPENINGS = [line_pattern(line, {}) for line in BEATS[0][1]]
PLANS = [line_pattern(line, {}) for line in (
    "{hero} lost a {colour} {thing}", "{hero} the {kind} loses the {colour} "
    "{thing}", "{hero} the {kind} and the {colour} {thing}")]
HERO = re.compile(rf"\b({'|'.join(WORDS['hero'])})\b")
PAIR = re.compile(rf"\b({'|'.join(WORDS['colour'])}) "
                  rf"({'|'.join(WORDS['thing'])})\b")
FACT = [(literal(line), topic, backwards(line))
        for topic, said, _, answer, _ in (*FACTS, (
            "your home", "The user lives in {x}.", "", "", None))
        for line in (said, answer) if line]
SPOKEN = {("message", 1): NOTES, ("translate", 1): LANGUAGES,
          ("money", 1): MONEY, ("money", 2): MONEY, ("light", 0): ROOMS,
          ("list", 0): THINGS}


def casts_in(text: str) -> Iterator[str]:
    """The casts of a story, or of a question or plan for one."""
    if any(line.match(text) for line in OPENINGS):
        for hero in {*HERO.findall(text)}:
            for colour, thing in {*PAIR.findall(text)}:
                yield cast_key({"hero": hero, "colour": colour,
                                "thing": thing})
    for line in PLANS:
        for found in line.finditer(text):
            yield cast_key(found.groupdict())


def facts_in(text: str) -> Iterator[str]:
    """What the user tells of themselves, or is told again."""
    for part, topic, line in FACT:
        for x in line.findall(text) if part in text else ():
            yield f"{topic} {x}"


# --- How are questions for tools found? --------------------------------------

def question_pattern(key: str, line: str) -> re.Pattern:
    """A question for the kit `key`, with a named group for each value."""
    kinds = [schema["type"] for _, schema, _ in KITS[key].parameters]
    pattern = re.escape(line)
    for n, kind in enumerate(kinds):
        words = SPOKEN.get((key, n))
        one = "|".join(words) if words else \
            r"\d+" if kind == "number" else r"\w+"
        slot = r"\{s\}" if kind == "boolean" else rf"\{{{n}\}}"
        pattern = pattern.replace(
            slot, f"(?P<v{n}>{'on|off' if kind == 'boolean' else one})")
    return re.compile(rf"(?<!\w){pattern}")


ASKED = [(literal(line), key, question_pattern(key, line))
         for key, kit in KITS.items()
         if key != "calculator" and kit.parameters
         for line in (*kit.asks, f"for {kit.need}")]


def questions_in(text: str) -> Iterator[str]:
    """Questions for tools, asked of the model or thought over by it."""
    for part, key, line in ASKED:
        for found in line.finditer(text) if part in text else ():
            values = [found.groupdict().get(f"v{n}", "") for n in
                      range(len(KITS[key].parameters))]
            if all(values):
                yield tool_key(key, values)


READERS = (casts_in, sums_in, facts_in, questions_in)


def leaks(text: str, readers: tuple = READERS) -> list[str]:
    """What is kept back and stands in `text` all the same."""
    found = {key for read in readers for key in read(text) if key}
    return sorted(key for key in found if shelf(key))


def without_leaks(lesson: Lesson) -> Lesson:
    """The lesson, if no message of it leaks; else LeakError."""
    for message in lesson.messages:
        if found := leaks(message.content):
            raise LeakError(f"a lesson of kind {lesson.kind}, {message.role}"
                            f": {found} in {message.content[:200]!r}")
    return lesson


def story_without_leaks(text: str) -> str:
    """The plain story, if its cast is not kept back; else LeakError."""
    if found := leaks(text, (casts_in,)):
        raise LeakError(f"a plain story: {found}")
    return text


__all__ = [
    "ASKED",
    "DATE",
    "DIGIT",
    "FACT",
    "HERO",
    "LeakError",
    "OPENINGS",
    "PAIR",
    "PLACES",
    "PLANS",
    "READERS",
    "SIGNS",
    "SPOKEN",
    "SUM",
    "TOLD",
    "backwards",
    "casts_in",
    "facts_in",
    "leaks",
    "literal",
    "question_pattern",
    "questions_in",
    "story_without_leaks",
    "sums_in",
    "without_leaks",
]
