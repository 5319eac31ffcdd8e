"""A gpt-oss you can train over lunch

Generated from book/14_train.py; edit the chapter, not this file.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from gptoss.harmony import (
    EFFORTS,
    Message,
    Tool,
    developer_message,
    system_message,
)
from gptoss.stories import WORDS, cast_key, draw_cast, shelf, tell

# --- A turn of conversation --------------------------------------------------

@dataclass(frozen=True)
class Turn:
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


def unheld(draw: Callable[[], Turn]) -> Turn:
    """A turn that training may see: drawn again until it is on no shelf."""
    while (turn := draw()).held:
        pass
    return turn


def compact(value: object) -> str:
    """JSON without a space, as the released models write it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def answer_messages(turn: Turn, effort: str) -> list[Message]:
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


# --- Names that nobody has seen ----------------------------------------------

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


# --- Sums, column by column --------------------------------------------------

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


def sum_turn(rng: random.Random) -> Turn:
    """A sum or a difference of two numbers of up to three digits."""
    sign = rng.choice("+-")
    a, b = a_number(rng), a_number(rng)
    if sign == "-" and a < b and rng.random() < 0.6:
        a, b = b, a
    ask = rng.choice(SUMS[sign])
    if "are" in ask and sign == "-" and a < b:
        a, b = b, a     # nobody loses more than there is
    result = a + b if sign == "+" else a - b
    return Turn("sum", ask.format(a=a, b=b, name=a_name(rng),
                                  things=rng.choice(THINGS)),
                sum_thoughts(a, b, sign), f"{a} {sign} {b} = {result}",
                held=shelf(sum_key(a, sign, b)), facts={"result": result})


# --- Stories on request ------------------------------------------------------

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


def story_turn(rng: random.Random) -> Turn:
    """A story; what the question names must be in it."""
    cast = draw_cast(rng)
    ask, slots = rng.choice(STORY_ASKS)
    plan = ("A story. {hero} the {kind} loses the {colour} {thing} at "
            "{place}. {friend} the {fkind} helps. Home is {home}.")
    about = "A story about {hero} the {kind} and the {colour} {thing}."
    think = "A story.", about.format(**cast), plan.format(**cast)
    return Turn("story", ask.format(**cast), think, tell(rng, cast),
                held=shelf(cast_key(cast)),
                facts={slot: cast[slot] for slot in slots})


# --- Facts to remember -------------------------------------------------------

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


def telling(rng: random.Random, told: Sequence[tuple[str, str]]) -> Turn:
    """The user tells facts: (topic, sentence) pairs."""
    topics = " and ".join(topic for topic, _ in told)
    return Turn("telling", " ".join(text for _, text in told),
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


def recall_turns(rng: random.Random) -> tuple[Turn, Turn]:
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
    return first, Turn("recall", ask, think, answer.format(x=x),
                       held=shelf(f"{topic} {x}"))


def telling_turn(rng: random.Random) -> Turn:
    """One or two facts, with nothing asked."""
    chosen = rng.sample(FACTS, rng.choice((1, 1, 2)))
    return telling(rng, [(fact[0], fact[1].format(x=draw_fact(rng, fact)))
                         for fact in chosen])


def unknown_turn(rng: random.Random) -> Turn:
    """A question for a fact that was never told."""
    topic, _, ask, _, _ = rng.choice(FACTS)
    return Turn("unknown", ask,
                ("Not told.", f"Asked for {topic}: not told.",
                 f"The user asks for {topic}. The user has not said it."),
                "You have not told me.")


# --- Tools in disguise -------------------------------------------------------

@dataclass(frozen=True)
class Kit:
    """A tool in all its guises.

    Attributes:
        names, says: possible names and descriptions.
        parameters: for each, its possible names, its JSON schema and what
            may be said of it.
        asks: questions for it; `need`: the need in words; `answer`: the
            final text. All see the arguments as {0}, {1}, …, and the last
            one the result as {r}.
        draw: random arguments, and the result for them.
    """

    names: tuple[str, ...]
    says: tuple[str, ...]
    parameters: tuple[tuple[tuple[str, ...], dict, str], ...]
    asks: tuple[str, ...]
    need: str
    answer: str
    draw: Callable[[random.Random], tuple[list, str]]


TEXT, NUMBER, FLAG = ({"type": kind} for kind in
                      ("string", "number", "boolean"))
VERBS = ("get", "do", "run", "call", "use", "new", "my", "try", "ask", "the")
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "snowy")
LANGUAGES = ("French", "German", "Spanish")
MONEY = ("dollars", "euros", "pounds", "yen")
ROOMS = ("kitchen", "garden", "hall", "bedroom", "cellar")
NOTES = ("I am late", "dinner is ready", "the kite is here",
         "we meet at the lake", "the bell is broken", "all is well")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday",
        "Saturday", "Sunday")
TROUBLE = ("error: not available", "error: no connection",
           "error: try again later")


def an_expression(rng: random.Random) -> tuple[list, str]:
    a, b = a_number(rng), a_number(rng)
    sign = rng.choice("**+-")
    value = {"*": a * b, "+": a + b, "-": a - b}[sign]
    return [f"{a} {sign} {b}"], str(value)


def a_translation(rng: random.Random) -> tuple[list, str]:
    word = rng.choice(WORDS["thing"] + WORDS["colour"] + WORDS["kind"])
    return [word, rng.choice(LANGUAGES)], made_up(rng)


def a_throw(rng: random.Random) -> tuple[list, str]:
    sides = rng.randrange(4, 101)
    return [sides], str(rng.randrange(1, sides + 1))


KITS = {
    "calculator": Kit(
        ("calculator", "calculate", "compute"),
        ("Work out an arithmetic expression.", "Does arithmetic."),
        ((("expression", "formula", "input"), TEXT, "what to work out"),),
        ("What is {0}?", "{0}", "Calculate {0}.", "How much is {0}?"),
        "{0}", "{0} = {r}", an_expression),
    "date": Kit(
        ("today", "get_date", "current_date"),
        ("The date of today.", "Tells the date."), (),
        ("What day is it?", "What is the date?", "What is the date today?",
         "Which day is today?"),
        "the date", "Today is {r}.",
        lambda rng: ([], rng.choice((
            a_date(rng), f"{rng.choice(DAYS)}, {a_date(rng)}",
            f"{a_date(rng)} ({rng.choice(DAYS)})")))),
    "weather": Kit(
        ("get_weather", "weather", "weather_report"),
        ("The weather in a city.", "Tells how the weather is."),
        ((("city", "place", "location"), TEXT, "name of the city"),),
        ("What is the weather in {0}?", "How is the weather in {0}?",
         "Is it raining in {0}?"),
        "the weather in {0}", "In {0} it is {r}.",
        lambda rng: ([a_city(rng)], f"{rng.choice(SKIES)}, "
                     f"{rng.randrange(35)} degrees")),
    "time": Kit(
        ("get_time", "clock", "local_time"),
        ("The time in a city.", "Tells what time it is."),
        ((("city", "place", "location"), TEXT, "name of the city"),),
        ("What time is it in {0}?", "How late is it in {0}?"),
        "the time in {0}", "In {0} it is {r}.",
        lambda rng: ([a_city(rng)], f"{rng.randrange(24):02}:"
                     f"{rng.randrange(60):02}")),
    "translate": Kit(
        ("translate", "translator", "dictionary"),
        ("Translate a word.", "Puts a word into another language."),
        ((("word", "text"), TEXT, "the word to translate"),
         (("language", "to"), TEXT | {"enum": list(LANGUAGES)},
          "the language to use")),
        ('What is "{0}" in {1}?', "How do you say {0} in {1}?",
         'Translate "{0}" into {1}.', "Translate {0} into {1}."),
        '"{0}" in {1}', '"{0}" in {1} is {r}.', a_translation),
    "timer": Kit(
        ("set_timer", "timer", "start_timer"),
        ("Start a timer.", "Rings after some minutes."),
        ((("minutes", "duration"), NUMBER, "how many minutes"),),
        ("Set a timer for {0} minutes.", "Wake me in {0} minutes.",
         "Ring in {0} minutes."),
        "a timer for {0} minutes", "The timer is set for {0} minutes.",
        lambda rng: ([rng.randrange(2, 100)], "ok")),
    "message": Kit(
        ("send_message", "message", "text_message"),
        ("Send a message to somebody.", "Writes to a person."),
        ((("to", "name", "person"), TEXT, "who gets it"),
         (("text", "message"), TEXT, "what to say")),
        ("Tell {0} that {1}.", "Write to {0} that {1}.",
         "Let {0} know that {1}."),
        "a message to {0}", "I told {0} that {1}.",
        lambda rng: ([a_name(rng), rng.choice(NOTES)], "sent")),
    "dice": Kit(
        ("roll_dice", "dice", "random_number"),
        ("Roll a die.", "Draws a random number."),
        ((("sides", "faces"), NUMBER, "how many sides"),),
        ("Roll a die with {0} sides.", "Throw a die with {0} sides."),
        "a die with {0} sides", "It shows {r}.",
        a_throw),
    "money": Kit(
        ("convert_money", "exchange", "currency"),
        ("Change money.", "Turns one currency into another."),
        ((("amount", "value"), NUMBER, "how much money"),
         (("from", "source"), TEXT, "the currency it is in"),
         (("to", "target"), TEXT, "the currency to get")),
        ("How much are {0} {1} in {2}?", "Change {0} {1} into {2}.",
         "What are {0} {1} in {2}?"),
        "{0} {1} in {2}", "{0} {1} are {r} {2}.",
        lambda rng: ([rng.randrange(2, 1000), *rng.sample(MONEY, 2)],
                     str(a_number(rng)))),
    "light": Kit(
        ("set_light", "light", "switch_light"),
        ("Switch a light.", "Turns a light on or off."),
        ((("room", "where"), TEXT, "which room"),
         (("on", "lit"), FLAG, "on or off")),
        ("Turn {s} the light in the {0}.", "Switch {s} the light in the "
         "{0}.", "Turn the light in the {0} {s}."),
        "the light in the {0}", "The light in the {0} is {s}.",
        lambda rng: ([rng.choice(ROOMS), rng.random() < 0.5], "ok")),
    "list": Kit(
        ("add_item", "shopping_list", "add_to_list"),
        ("Put something on the shopping list.", "Keeps a shopping list."),
        ((("item", "thing"), TEXT, "what to buy"),
         (("count", "number"), NUMBER, "how many")),
        ("Put {1} {0} on the list.", "I need {1} {0}. Put it on the list.",
         "Add {1} {0} to my list."),
        "{1} {0} on the list", "I put {1} {0} on the list.",
        lambda rng: ([rng.choice(THINGS), rng.randrange(2, 100)], "ok")),
    "meaning": Kit(
        ("look_up", "search", "encyclopedia"),
        ("Look up what a word means.", "Explains a word."),
        ((("word", "query", "term"), TEXT, "the word to explain"),),
        ("What does {0} mean?", "What is a {0}?", "Explain {0}."),
        "what {0} means", "{0}: {r}",
        lambda rng: ([made_up(rng)],
                     f"a {rng.choice(WORDS['_size'])} "
                     f"{rng.choice(WORDS['colour'])} "
                     f"{rng.choice(WORDS['thing'])}")),
}


def disguise(rng: random.Random, key: str) -> tuple[Tool, list[str]]:
    """A tool as one conversation sees it, and its parameters' names."""
    kit, properties = KITS[key], {}
    described = rng.random() < 0.3
    for names, schema, note in kit.parameters:
        extra = {"description": note} if described else {}
        properties[rng.choice(names)] = schema | extra
    schema = {"type": "object", "properties": properties,
              "required": list(properties)} if properties else None
    says = rng.choice(kit.says)
    name = rng.choice(kit.names)
    if rng.random() < 0.5:
        name = f"{rng.choice(VERBS)}_{name.split('_')[-1]}"
    return Tool(name, says, schema), list(properties)


def tool_key(key: str, values: Sequence) -> str:
    """What a question for the kit `key` is about, whatever the tool and its
    parameters are called; "" for the date, which is asked in one way."""
    if key == "calculator":
        a, sign, b = values[0].split()
        return sum_key(int(a), sign, int(b))
    said = [("off", "on")[v] if isinstance(v, bool) else str(v)
            for v in values]
    return " ".join([key, *said]) if said else ""


def tool_turn(rng: random.Random, key: str, tool: Tool,
              names: Sequence[str]) -> Turn:
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
    return Turn("tool", ask, think, answer, (tool.name, arguments), result,
                held=shelf(tool_key(key, values)))


def missing_turn(rng: random.Random, given: Sequence[str]) -> Turn:
    """A question for which a tool would be needed that is not given."""
    keys = [key for key in KITS if key not in (*given, "date")]
    key = rng.choice(keys)
    values, _ = KITS[key].draw(rng)
    if key == "calculator":     # sums it can do by itself
        values = [f"{a_number(rng)} * {a_number(rng)}"]
    words = {"s": "on" if values[-1:] == [True] else "off"}
    ask = rng.choice(KITS[key].asks).format(*values, **words)
    need = KITS[key].need.format(*values, **words)
    return Turn("missing", ask,
                ("No tool.", f"Asked for {need}: no tool.",
                 f"The user asks for {need}. No tool that I have does it."),
                "I have no tool for that.",
                held=shelf(tool_key(key, values)))


def date_turn(rng: random.Random, date: str | None) -> Turn:
    """The date, which the system message may give."""
    answer = f"Today is {date}." if date else "I do not know the date."
    found = date or "not given"
    return Turn("date", rng.choice(KITS["date"].asks),
                (f"{found}.", f"Asked for the date: {found}.",
                 f"The user asks for the date. The system message says: "
                 f"{found}."), answer)


# --- Small talk, and what is beyond it ---------------------------------------

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


def talk_turn(rng: random.Random) -> Turn:
    """A greeting and its like."""
    asks, what, answers = rng.choice(TALK)
    high = f"{what} No tool and no sum is needed. I answer in one line."
    return Turn("talk", rng.choice(asks), (what, what, high),
                rng.choice(answers))


def beyond_turn(rng: random.Random) -> Turn:
    """A question that a model of this size should not try to answer."""
    return Turn("beyond", rng.choice(BEYOND).format(x=a_city(rng)),
                ("Beyond me.", "This is beyond me.",
                 "The user asks for something that I have not learnt. "
                 "This is beyond me."),
                "I am too small to know that.")


# --- From turns to a conversation --------------------------------------------

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


def turn_of(rng: random.Random, kind: str, given: Given) -> Turn:
    """A turn of `kind`, with the tools at hand used where they serve."""
    if kind == "sum" and "calculator" in given.kits:
        kind = "calculator"
    if kind in given.kits:
        at = given.kits.index(kind)
        return tool_turn(rng, kind, *given.tools[at])
    if kind == "missing":
        return missing_turn(rng, given.kits)
    return date_turn(rng, given.date) if kind == "date" else SIMPLE[kind](rng)


def fillers(rng: random.Random, far: bool, given: Given) -> list[Turn]:
    """Turns to stand between a fact and the question for it."""
    if far:
        kinds = rng.choice(FAR) if rng.random() < 0.93 else VERY_FAR
    else:
        kinds = rng.choices(("sum", "talk", "beyond", *given.kits),
                            k=rng.choice((0, 0, 1, 2)))
    return [unheld(lambda kind=kind: turn_of(rng, kind, given))
            for kind in kinds]


def turns_for(rng: random.Random, kind: str, given: Given) -> list[Turn]:
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


def recalled(rng: random.Random) -> tuple[Turn, Turn]:
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


def assemble(rng: random.Random, kind: str, turns: Sequence[Turn],
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


MIX = {"story": 12, "sum": 26, "tool": 29, "recall": 8, "far": 13,
       "unknown": 2, "telling": 1, "talk": 1, "beyond": 2, "missing": 4,
       "date": 1, "after": 1}
SECOND = {"story": 8, "sum": 42, "tool": 26, "recall": 6, "far": 7,
          "unknown": 2, "telling": 1, "talk": 1, "beyond": 1, "missing": 3,
          "date": 1, "after": 2}    # when sums are what is left to learn
THIRD = {"story": 6, "sum": 30, "tool": 34, "recall": 5, "far": 13,
         "unknown": 1, "telling": 1, "talk": 1, "beyond": 1, "missing": 4,
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
    wanted = {False: "", True: "exam"}.get(hold_out, hold_out)
    while True:
        kind = rng.choices(list(mix), list(mix.values()))[0]
        one = lesson(rng, kind)
        while one.held != wanted and kind not in NEVER_HELD:
            one = lesson(rng, kind)
        yield one


__all__ = [
    "BEYOND",
    "CITIES",
    "CODAS",
    "COLUMNS",
    "DAYS",
    "FACTS",
    "FAR",
    "FLAG",
    "Given",
    "INSTRUCTIONS",
    "KITS",
    "Kit",
    "LANGUAGES",
    "Lesson",
    "MIX",
    "MONEY",
    "NEVER_HELD",
    "NOTED",
    "NOTES",
    "NUMBER",
    "ROOMS",
    "SECOND",
    "SIMPLE",
    "SKIES",
    "STORY_ASKS",
    "SUMS",
    "SYLLABLES",
    "TALK",
    "TEXT",
    "THINGS",
    "THIRD",
    "TROUBLE",
    "Turn",
    "VERBS",
    "VERY_FAR",
    "a_city",
    "a_date",
    "a_name",
    "a_number",
    "a_throw",
    "a_translation",
    "an_expression",
    "answer_messages",
    "assemble",
    "beyond_turn",
    "column",
    "columns",
    "compact",
    "date_turn",
    "disguise",
    "draw_fact",
    "fillers",
    "given_for",
    "lesson",
    "lesson_stream",
    "made_up",
    "missing_turn",
    "recall_turns",
    "recalled",
    "story_turn",
    "sum_key",
    "sum_thoughts",
    "sum_turn",
    "talk_turn",
    "telling",
    "telling_turn",
    "tool_key",
    "tool_turn",
    "turn_of",
    "turns_for",
    "unheld",
    "unknown_turn",
    "worked",
]
