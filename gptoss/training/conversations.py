"""Why must tools wear disguises?

Generated from book/training/disguises.py; edit the chapter, not this file.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from gptoss.text.harmony import (
    EFFORTS,
    Message,
    developer_message,
    system_message,
)
from gptoss.text.typescript import Tool
from gptoss.training.kits import KITS, TROUBLE, disguise, tool_key
from gptoss.training.lessons import (
    FACTS,
    Exchange,
    Lesson,
    a_city,
    a_date,
    a_number,
    answer_messages,
    draw_fact,
    recall_turns,
    story_turn,
    sum_turn,
    telling,
    telling_turn,
    unheld,
    unknown_turn,
)
from gptoss.training.stories import shelf

# --- How does a conversation see it? -----------------------------------------

def tool_turn(rng: random.Random, key: str, tool: Tool,
              names: Sequence[str]) -> Exchange:
    """A question that `tool`, the kit `key` in disguise, can answer."""
    kit = KITS[key]
    values, result = kit.draw(rng)
    if rng.random() < 0.04:
        result = rng.choice(TROUBLE)
    words = {"r": result, "s": "on" if values[-1:] == [True] else "off"}
    ask = rng.choice(kit.asks).format(*values, **words)
    if key == "calculator":
        ask = rng.choice((ask, ask.replace(" * ", " times ")))
    answer = (f"That did not work: {result[7:]}."
              if result.startswith("error") else
              kit.answer.format(*values, **words))
    need = kit.need.format(*values, **words)
    arguments = dict(zip(names, values, strict=True))
    where = ", ".join(f"{n} is {v}" for n, v in arguments.items())
    use = f"{tool.description} Use {tool.name}"
    think = (f"{use}.", f"Asked for {need}. {use}.",
             f"The user asks for {need}. {use}"
             + (f": {where}." if where else "."))
    return Exchange("tool", ask, think, answer, (tool.name, arguments), result,
                held=shelf(tool_key(key, values)))


def missing_turn(rng: random.Random, given: Sequence[str]) -> Exchange:
    """A question for which a tool would be needed that is not given."""
    keys = [key for key in KITS if key not in (*given, "date")]
    key = rng.choice(keys)
    values, _ = KITS[key].draw(rng)
    if key == "calculator":     # sums it can do by itself
        values = [f"{a_number(rng)} * {a_number(rng)}"]
    words = {"s": "on" if values[-1:] == [True] else "off"}
    ask = rng.choice(KITS[key].asks).format(*values, **words)
    need = KITS[key].need.format(*values, **words)
    return Exchange("missing", ask,
                ("No tool.", f"No tool for {need}.",
                 f"The user asks for {need}. No tool that I have does it."),
                "I have no tool for that.",
                held=shelf(tool_key(key, values)))


def date_turn(rng: random.Random, date: str | None) -> Exchange:
    """The date, which the system message may give."""
    answer = f"Today is {date}." if date else "I do not know the date."
    found = date or "not given"
    return Exchange("date", rng.choice(KITS["date"].asks),
                (f"{found}.", f"Asked for the date: {found}.",
                 f"The user asks for the date. The system message says: "
                 f"{found}."), answer)


# --- What is said that needs no tool at all? ---------------------------------

TALK = (
    (("Hello!", "Hi", "Good morning!", "Hello there."), "A greeting.",
     ("Hello! What can I do for you?", "Hello! Shall I tell you a story?")),
    (("Who are you?", "What are you?"), "Asked who I am.",
     ("I am a very small gpt-oss, trained by the book that explains me.",)),
    (("What can you do?", "Help", "How can you help me?"),
     "Asked what I can do.",
     ("I tell stories, add and subtract, remember what you tell me and use "
      "the tools you give me.",)),
    (("Thank you!", "Thanks", "Well done!", "Good answer."), "Thanks.",
     ("You are welcome.",)),
    (("Goodbye", "See you!", "Bye"), "A farewell.", ("Goodbye!",)),
    (("How are you?", "How do you do?"), "Asked how I am.",
     ("I am well, thank you.",)),
)
BEYOND = (
    "What is the capital of {x}?", "Who wrote {x}?", "Why is the sky blue?",
    "Write a program that sorts a list.", "What is the meaning of life?",
    "Explain how a computer works.", "Who won the game?", "Sing a song.",
    "How far is the moon?", "What should I cook?", "Who is the king of {x}?",
    "Write a poem about {x}.", "How old is {x}?", "Do you like {x}?",
    "When was {x} built?", "What is love?", "How do birds fly?",
    "Give me advice.", "What is the news?", "How many people live in {x}?",
)


def talk_turn(rng: random.Random) -> Exchange:
    """A greeting and its like."""
    asks, what, answers = rng.choice(TALK)
    high = f"{what} Nothing is asked of me. I answer in one line."
    return Exchange("talk", rng.choice(asks), (what, what, high),
                rng.choice(answers))


def beyond_turn(rng: random.Random) -> Exchange:
    """A question that a model of this size should not try to answer."""
    return Exchange("beyond", rng.choice(BEYOND).format(x=a_city(rng)),
                ("Beyond me.", "This is beyond me.",
                 "The user asks for something that I have not learnt. "
                 "This is beyond me."),
                "I am too small to know that.")


# --- How do turns become a conversation? -------------------------------------

SIMPLE = {"sum": sum_turn, "story": story_turn, "talk": talk_turn,
          "beyond": beyond_turn, "unknown": unknown_turn,
          "telling": telling_turn}
INSTRUCTIONS = ("You are a helpful assistant.", "Answer in one line.",
                "Be kind.", "You work for {x}.", "Never tell a lie.",
                "Think before you answer.", "The user lives in {x}.")
FAR = (("story",), ("story",), ("sum", "story"), ("story", "talk"),
       ("story", "story"), ("sum", "talk", "sum", "beyond", "sum", "sum"),
       ("story", "sum", "story"))
VERY_FAR = ("story", "sum", "story", "story", "talk", "story", "story")


@dataclass(frozen=True)
class Given:
    """What a conversation starts from: tools (keys into KITS, and each in
    its disguise) and perhaps a date."""

    kits: tuple[str, ...]
    tools: tuple[tuple[Tool, list[str]], ...]
    date: str | None


def turn_of(rng: random.Random, kind: str, given: Given) -> Exchange:
    """A turn of `kind`, with the tools at hand used where they serve."""
    if kind == "sum" and "calculator" in given.kits:
        kind = "calculator"
    if kind in given.kits:
        at = given.kits.index(kind)
        return tool_turn(rng, kind, *given.tools[at])
    if kind == "missing":
        return missing_turn(rng, given.kits)
    return date_turn(rng, given.date) if kind == "date" else SIMPLE[kind](rng)


def fillers(rng: random.Random, far: bool, given: Given) -> list[Exchange]:
    """Turns to stand between a fact and the question for it."""
    kinds: Sequence[str]
    if far:
        kinds = rng.choice(FAR) if rng.random() < 0.93 else VERY_FAR
    else:
        kinds = rng.choices(("sum", "talk", "beyond", *given.kits),
                            k=rng.choice((0, 0, 1, 2)))
    return [unheld(partial(turn_of, rng, kind, given)) for kind in kinds]


def turns_for(rng: random.Random, kind: str, given: Given) -> list[Exchange]:
    """The turns of a conversation whose last one is of `kind`."""
    if kind in ("recall", "far"):
        told, asked = recall_turns(rng)
        turns = [told, *fillers(rng, kind == "far", given), asked]
        first = fillers(rng, False, given) if rng.random() < 0.3 else []
        return first + turns
    first = fillers(rng, rng.random() < 0.1, given)
    first *= rng.random() < 0.4
    if kind == "after":
        first, kind = [*first, *recalled(rng)], "sum"
    elif rng.random() < 0.08:
        first += recalled(rng)
    last = turn_of(rng, rng.choice(given.kits) if kind == "tool" else kind,
                   given)
    if kind == "unknown" and rng.random() < 0.7:
        fact = topic, said, ask, _, _ = rng.choice(FACTS)
        x = draw_fact(rng, fact)
        first = [] if ask == last.ask else [
            telling(rng, [(topic, said.format(x=x))])]
    return [*first, last]


def recalled(rng: random.Random) -> tuple[Exchange, Exchange]:
    """A fact told and asked for, as something that came before."""
    while (turns := recall_turns(rng))[1].held:
        pass
    return turns


def given_for(rng: random.Random, kind: str) -> Given:
    """Tools for most questions that need one, and for some that don't."""
    kits = []
    share = {"tool": 1.0, "missing": 0.7}.get(kind, 0.25)
    if rng.random() < share:
        kits = (["calculator", "date"] if rng.random() < 0.25 else
                rng.sample(list(KITS), rng.choice((1, 2, 2, 3, 4))))
    if kind in ("sum", "after", "date"):    # to be done without them
        kits = [key for key in kits if key not in ("calculator", "date")]
    return Given(tuple(kits), tuple(disguise(rng, key) for key in kits),
                 a_date(rng) if rng.random() < 0.8 else None)


def assemble(rng: random.Random, kind: str, turns: Sequence[Exchange],
             given: Given) -> Lesson:
    """System and developer message, the turns, and the last one's answer
    with its analysis; the analysis of earlier turns has been dropped."""
    effort = rng.choice(EFFORTS)
    tools = [tool for tool, _ in given.tools]
    messages = [system_message(effort, given.date, functions=bool(tools))]
    home = next(fact for fact in FACTS if fact[0] == "your home")
    instructions = (rng.choice(INSTRUCTIONS).format(x=draw_fact(rng, home))
                    if rng.random() < 0.15 else "")
    if tools or instructions:
        messages.append(developer_message(instructions, tools))
    muted = set()
    for turn in turns:
        messages.append(Message("user", turn.ask))
        start = len(messages)
        messages += answer_messages(turn, effort)
        if turn is not turns[-1]:
            messages = [m for m in messages if m.channel != "analysis"]
            if turn.kind == "sum":  # its working is gone
                muted.add(len(messages) - 1)
    last = turns[-1]
    return Lesson(kind, messages, start, last.held,
                  last.facts | {"answer": last.answer, "effort": effort,
                                "call": last.call}, frozenset(muted))


MIX = {"story": 12, "sum": 26, "tool": 31, "recall": 8, "far": 13,
       "unknown": 3, "telling": 1, "talk": 1, "beyond": 2, "missing": 5,
       "date": 1, "after": 1}
SECOND = {"story": 8, "sum": 42, "tool": 26, "recall": 6, "far": 7,
          "unknown": 3, "telling": 1, "talk": 1, "beyond": 1, "missing": 4,
          "date": 1, "after": 2}    # when sums are what is left to learn
THIRD = {"story": 6, "sum": 36, "tool": 43, "recall": 7, "far": 16,
         "unknown": 3, "telling": 1, "talk": 1, "beyond": 1, "missing": 6,
         "date": 2, "after": 2}     # beside columns, which are sums too
NEVER_HELD = ("telling", "talk", "beyond", "unknown", "date")


def lesson(rng: random.Random, kind: str) -> Lesson:
    """A conversation that ends in a turn of `kind`, one of `MIX`: 'far' is
    a recall over two windows or more, 'after' a sum after a recall."""
    given = given_for(rng, kind)
    return assemble(rng, kind, turns_for(rng, kind, given), given)


def lesson_stream(seed: int, hold_out: bool | str = False,
                  mix: dict[str, int] | None = None) -> Iterator[Lesson]:
    """Endless lessons in the proportions of `mix` (default `MIX`): those
    that training may see, or those whose last question is on the shelf
    `hold_out`, "exam" (or True) or "milestone"."""
    rng, mix = random.Random(seed), mix or MIX
    wanted = "exam" if hold_out is True else hold_out or ""
    while True:
        kind = rng.choices(list(mix), list(mix.values()))[0]
        one = lesson(rng, kind)
        while one.held != wanted and kind not in NEVER_HELD:
            one = lesson(rng, kind)
        yield one


__all__ = [
    "BEYOND",
    "FAR",
    "Given",
    "INSTRUCTIONS",
    "MIX",
    "NEVER_HELD",
    "SECOND",
    "SIMPLE",
    "TALK",
    "THIRD",
    "VERY_FAR",
    "assemble",
    "beyond_turn",
    "date_turn",
    "fillers",
    "given_for",
    "lesson",
    "lesson_stream",
    "missing_turn",
    "recalled",
    "talk_turn",
    "tool_turn",
    "turn_of",
    "turns_for",
]
