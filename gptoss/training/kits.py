"""Why must tools wear disguises?

Generated from book/training/disguises.py; edit the chapter, not this file.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gptoss.text.typescript import Tool
from gptoss.training.lessons import (
    THINGS,
    a_city,
    a_date,
    a_name,
    a_number,
    made_up,
    sum_key,
)
from gptoss.training.stories import WORDS

# --- What is a tool in all its guises? ---------------------------------------

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


# --- How does a conversation see it? -----------------------------------------

def disguise(rng: random.Random, key: str) -> tuple[Tool, list[str]]:
    """A tool as one conversation sees it, and its parameters' names."""
    kit, properties = KITS[key], {}
    described = rng.random() < 0.3
    for names, schema, note in kit.parameters:
        extra = {"description": note} if described else {}
        properties[rng.choice(names)] = schema | extra
    takes = {"type": "object", "properties": properties,
             "required": list(properties)} if properties else None
    says = rng.choice(kit.says)
    name = rng.choice(kit.names)
    if rng.random() < 0.5:
        name = f"{rng.choice(VERBS)}_{name.split('_')[-1]}"
    return Tool(name, says, takes), list(properties)


def tool_key(key: str, values: Sequence) -> str:
    """What a question for the kit `key` is about, whatever the tool and its
    parameters are called; "" for the date, which is asked in one way."""
    if key == "calculator":
        a, sign, b = values[0].split()
        return sum_key(int(a), sign, int(b))
    said = [("off", "on")[v] if isinstance(v, bool) else str(v)
            for v in values]
    return " ".join([key, *said]) if said else ""


__all__ = [
    "DAYS",
    "FLAG",
    "KITS",
    "Kit",
    "LANGUAGES",
    "MONEY",
    "NOTES",
    "NUMBER",
    "ROOMS",
    "SKIES",
    "TEXT",
    "TROUBLE",
    "VERBS",
    "a_throw",
    "a_translation",
    "an_expression",
    "disguise",
    "tool_key",
]
