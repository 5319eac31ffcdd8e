"""What must a very small model be taught?

Generated from book/training/lessons.py; edit the chapter, not this file.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gptoss.text.harmony import EFFORTS, Message
from gptoss.training.stories import WORDS, cast_key, draw_cast, shelf, tell

# --- What is a lesson? -------------------------------------------------------

@dataclass(frozen=True)
class Exchange:
    """A question with its answer.

    Attributes:
        kind: what it teaches.
        think: the analysis for low, medium and high effort.
        call: name and arguments of the tool that it needs, if any, and
            `result` what that tool returns.
        held: the shelf that it is kept on, "" if training may see it.
        facts: what the examiner needs beyond the answer.
    """

    kind: str
    ask: str
    think: tuple[str, str, str]
    answer: str
    call: tuple[str, dict] | None = None
    result: str = ""
    held: str = ""
    facts: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Lesson:
    """A conversation; from message `turn` on, the model has to write it.

    `held`: the shelf of the last question; no turn before it is on one.
    `muted`: messages that nobody should learn to write.
    """

    kind: str
    messages: list[Message]
    turn: int
    held: str = ""
    facts: dict = field(default_factory=dict)
    muted: frozenset[int] = frozenset()


def unheld(draw: Callable[[], Exchange]) -> Exchange:
    """A turn that training may see: drawn again until it is on no shelf."""
    while (turn := draw()).held:
        pass
    return turn


def compact(value: object) -> str:
    """JSON without a space, as the released models write it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def answer_messages(turn: Exchange, effort: str) -> list[Message]:
    """What follows the question: analysis, perhaps a call, the answer."""
    think = turn.think[EFFORTS.index(effort)]
    messages = [Message("assistant", think, channel="analysis")]
    if turn.call:
        name, arguments = turn.call
        messages += [
            Message("assistant", compact(arguments), channel="commentary",
                    recipient=f"functions.{name}",
                    content_type="<|constrain|>json"),
            Message("tool", turn.result, channel="commentary",
                    recipient="assistant", name=f"functions.{name}")]
    return [*messages, Message("assistant", turn.answer, channel="final")]


# --- How is a model kept from guessing names? --------------------------------

SYLLABLES = ("ba", "bo", "da", "di", "fe", "fo", "ga", "ku", "la", "li",
             "lo", "ma", "mo", "na", "ni", "pa", "po", "ra", "ri", "ro",
             "sa", "si", "ta", "to", "va", "vi", "wa", "ya", "zu", "zo")
CODAS = ("", "", "n", "r", "x", "l", "s", "k")
CITIES = ("Oslo", "Rome", "Paris", "Lima", "Cairo", "Berlin", "Madrid",
          "Tokyo", "Delhi", "Lagos", "Quito", "Dublin", "Vienna", "Athens",
          "Hanoi", "Havana", "Prague", "Lisbon", "London", "Sydney")


def made_up(rng: random.Random) -> str:
    """A name of two or three syllables: Zorali, Bomak."""
    count = rng.choice((2, 2, 3))
    parts = "".join(rng.choice(SYLLABLES) for _ in range(count))
    return (parts + rng.choice(CODAS)).title()


def a_name(rng: random.Random) -> str:
    known = WORDS["hero"] + WORDS["friend"]
    return rng.choice(known) if rng.random() < 0.5 else made_up(rng)


def a_city(rng: random.Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.6 else made_up(rng)


def a_number(rng: random.Random) -> int:
    """Of one to three digits, half of them three."""
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 3)))


def a_date(rng: random.Random) -> str:
    return (f"20{rng.randrange(23, 31)}-{rng.randrange(1, 13):02}-"
            f"{rng.randrange(1, 29):02}")


# --- What does it write down for a sum? --------------------------------------

COLUMNS = ("ones", "tens", "hundreds", "thousands")


def columns(a: int, b: int, sign: str) -> list[str]:
    """The school method for a + b, or for a - b with a >= b.

    From the ones on: ['7+5=12', '4+8+1=13'] with carries, or
    ['7-5=2', '4-8+10=6', '3-2-1=0'] with borrowing.
    """
    lines, carry = [], 0
    for place in range(len(str(max(a, b)))):
        x, y = a // 10 ** place % 10, b // 10 ** place % 10
        asked, answer, carry = column(x, y, carry, sign)
        lines.append(asked + answer)
    return lines


def column(x: int, y: int, carry: int, sign: str) -> tuple[str, str, int]:
    """One column: what is asked ('4+8+1' or '4-8'), what answers it
    ('=13' or '+10=6'), and the carry for the next one."""
    asked = f"{x}{sign}{y}{f'{sign}1' * carry}"
    if sign == "+":
        value = x + y + carry
        return asked, f"={value}", value // 10
    value = x - y - carry
    borrow = int(value < 0)
    return asked, f"{'+10' * borrow}={value + 10 * borrow}", borrow


def worked(a: int, b: int, sign: str) -> str:
    """'347+285: ones 7+5=12, tens 4+8+1=13, hundreds 3+2+1=6. 632'"""
    named = ", ".join(f"{name} {line}" for name, line in
                      zip(COLUMNS, columns(a, b, sign), strict=False))
    return f"{a}{sign}{b}: {named}. {a + b if sign == '+' else a - b}"


def sum_thoughts(a: int, b: int, sign: str) -> tuple[str, str, str]:
    """The working for low, medium and high effort; high checks itself."""
    lead, x, y = "", a, b
    if sign == "-" and a < b:
        lead, x, y = f"{a}<{b}, so minus ", b, a
    short = f"{lead}{x}{sign}{y}: {' '.join(columns(x, y, sign))}"
    full = lead + worked(x, y, sign)
    result = x + y if sign == "+" else x - y
    check = worked(result, y, "-" if sign == "+" else "+")
    return short, full, f"{full}. Check: {check}, right."


SUMS = {
    "+": ("What is {a} + {b}?", "{a} + {b}", "What is {a} plus {b}?",
          "Add {b} to {a}.", "How much is {a} plus {b}?",
          "{name} has {a} {things} and finds {b} more. How many are there "
          "now?",
          "There are {a} {things} here and {b} there. How many are there "
          "together?"),
    "-": ("What is {a} - {b}?", "{a} - {b}", "What is {a} minus {b}?",
          "Take {b} from {a}.", "How much is {a} minus {b}?",
          "{name} has {a} {things} and loses {b}. How many are left?",
          "There were {a} {things} and {b} are gone. How many are left?"),
}
THINGS = ("shells", "kites", "books", "bells", "cups", "keys", "apples",
          "stones", "buttons", "balls")


def sum_key(a: int, sign: str, b: int) -> str:
    """The one fact behind 5 + 40, 40 + 5, 45 - 5, 45 - 40 and 5 - 45; ""
    below twenty, where every sum is a column of some other. A product is
    a fact of its own."""
    x, y = (a, b) if sign in "+*" else (abs(a - b), min(a, b))
    low, high = sorted((x, y))
    return "" if sign != "*" and high < 20 else \
        f"{low} {'*' if sign == '*' else '+'} {high}"


def sum_turn(rng: random.Random) -> Exchange:
    """A sum or a difference of two numbers of up to three digits."""
    sign = rng.choice("+-")
    a, b = a_number(rng), a_number(rng)
    if sign == "-" and a < b and rng.random() < 0.6:
        a, b = b, a
    ask = rng.choice(SUMS[sign])
    if "are" in ask and sign == "-" and a < b:
        a, b = b, a     # nobody loses more than there is
    result = a + b if sign == "+" else a - b
    return Exchange("sum", ask.format(a=a, b=b, name=a_name(rng),
                                  things=rng.choice(THINGS)),
                sum_thoughts(a, b, sign), f"{a} {sign} {b} = {result}",
                held=shelf(sum_key(a, sign, b)), facts={"result": result})


# --- How is a story asked for? -----------------------------------------------

STORY_ASKS = (
    ("Tell me a story.", ()),
    ("Please tell me a story.", ()),
    ("Tell me a story about {hero} the {kind}.", ("hero", "kind")),
    ("Tell me a story about a {kind}.", ("kind",)),
    ("Tell me a story about a {colour} {thing}.", ("colour", "thing")),
    ("Tell me how {hero} lost a {colour} {thing}.",
     ("hero", "colour", "thing")),
    ("I want to hear about {hero} and {friend}.", ("hero", "friend")),
)


def story_turn(rng: random.Random) -> Exchange:
    """A story; what the question names must be in it."""
    cast = draw_cast(rng)
    ask, slots = rng.choice(STORY_ASKS)
    plan = ("A story. {hero} the {kind} loses the {colour} {thing} at "
            "{place}. {friend} the {fkind} helps. Home is {home}.")
    about = "A story about {hero} the {kind} and the {colour} {thing}."
    think = "A story.", about.format(**cast), plan.format(**cast)
    return Exchange("story", ask.format(**cast), think, tell(rng, cast),
                held=shelf(cast_key(cast)),
                facts={slot: cast[slot] for slot in slots})


# --- What can be told and asked for? -----------------------------------------

FACTS = (
    ("your name", "My name is {x}.", "What is my name?",
     "Your name is {x}.", a_name),
    ("your cat", "My cat is called {x}.", "What is my cat called?",
     "Your cat is called {x}.", a_name),
    ("your dog", "My dog is called {x}.", "What is my dog called?",
     "Your dog is called {x}.", a_name),
    ("your sister", "My sister is called {x}.",
     "What is my sister called?", "Your sister is called {x}.", a_name),
    ("your friend", "My best friend is {x}.", "Who is my best friend?",
     "Your best friend is {x}.", a_name),
    ("your home", "I live in {x}.", "Where do I live?",
     "You live in {x}.", a_city),
    ("your birthplace", "I was born in {x}.", "Where was I born?",
     "You were born in {x}.", a_city),
    ("your colour", "My favourite colour is {x}.",
     "What is my favourite colour?", "Your favourite colour is {x}.",
     lambda rng: rng.choice(WORDS["colour"])),
    ("your number", "My lucky number is {x}.", "What is my lucky number?",
     "Your lucky number is {x}.", lambda rng: str(a_number(rng))),
    ("your room", "My room number is {x}.", "What is my room number?",
     "Your room number is {x}.", lambda rng: str(a_number(rng))),
    ("the password", "The password is {x}.", "What is the password?",
     "The password is {x}.", made_up),
    ("your gift", "I have a {x}.", "What do I have?", "You have a {x}.",
     lambda rng: f"{rng.choice(WORDS['colour'])} "
                 f"{rng.choice(WORDS['thing'])}"),
)
NOTED = ("I will remember that.", "Good to know.", "I will not forget it.")


def telling(rng: random.Random, told: Sequence[tuple[str, str]]) -> Exchange:
    """The user tells facts: (topic, sentence) pairs."""
    topics = " and ".join(topic for topic, _ in told)
    return Exchange("telling", " ".join(text for _, text in told),
                ("Noted.", f"Noted: {topics}.",
                 f"The user tells me about {topics}. I keep it in mind."),
                rng.choice(NOTED))


def draw_fact(rng: random.Random, fact: tuple, free: bool = False) -> str:
    """A value for one of `FACTS`; one that training may see, unless it is
    to be `free`."""
    topic, _, _, _, draw = fact
    while shelf(f"{topic} {(x := draw(rng))}") and not free:
        pass
    return x


def recall_turns(rng: random.Random) -> tuple[Exchange, Exchange]:
    """A turn that tells one to three facts and one that asks for one; on a
    shelf, if it is, for the fact that is asked for alone."""
    chosen = rng.sample(FACTS, rng.choice((1, 1, 2, 3)))
    at = rng.randrange(len(chosen))
    values = [draw_fact(rng, fact, free=n == at)
              for n, fact in enumerate(chosen)]
    first = telling(rng, [(fact[0], fact[1].format(x=x)) for fact, x
                          in zip(chosen, values, strict=True)])
    (topic, said, ask, answer, _), x = chosen[at], values[at]
    think = (said.format(x=x), f"Asked for {topic}. {said.format(x=x)}",
             f"The user asks for {topic}. The user said: "
             f"{said.format(x=x)} So it is {x}.")
    return first, Exchange("recall", ask, think, answer.format(x=x),
                       held=shelf(f"{topic} {x}"))


def telling_turn(rng: random.Random) -> Exchange:
    """One or two facts, with nothing asked."""
    chosen = rng.sample(FACTS, rng.choice((1, 1, 2)))
    return telling(rng, [(fact[0], fact[1].format(x=draw_fact(rng, fact)))
                         for fact in chosen])


def unknown_turn(rng: random.Random) -> Exchange:
    """A question for a fact that was never told."""
    topic, _, ask, _, _ = rng.choice(FACTS)
    return Exchange("unknown", ask,
                ("Not told.", f"Asked for {topic}: not told.",
                 f"The user asks for {topic}. The user has not said it."),
                "You have not told me.")


__all__ = [
    "CITIES",
    "CODAS",
    "COLUMNS",
    "Exchange",
    "FACTS",
    "Lesson",
    "NOTED",
    "STORY_ASKS",
    "SUMS",
    "SYLLABLES",
    "THINGS",
    "a_city",
    "a_date",
    "a_name",
    "a_number",
    "answer_messages",
    "column",
    "columns",
    "compact",
    "draw_fact",
    "made_up",
    "recall_turns",
    "story_turn",
    "sum_key",
    "sum_thoughts",
    "sum_turn",
    "telling",
    "telling_turn",
    "unheld",
    "unknown_turn",
    "worked",
]
