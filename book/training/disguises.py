# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   gptoss:
#     module: kits
#     public: [KITS, Kit, lesson_stream]
# ---

# %% [markdown]
# # Why must tools wear disguises?
#
# ## Question
#
# How does a model of two million parameters learn to read what a tool is
# called, instead of guessing? Each of the twelve tools of its lessons comes
# under up to 33 names, with other descriptions and parameters each time, so
# that the best guess is right once in five and reading is the shorter way.
#
# ## Picture

# %% tags=["hide-input", "picture"]
# Figure: three definitions of the weather tool as three conversations show
# them, in TypeScript; name, description and parameter differ each time, and
# below each stands the call that answers the same question about Oslo.
import json
import random

import matplotlib.pyplot as plt

from gptoss.training import kits as finished

plt.style.use("../_static/book.mplstyle")
fig, ax = plt.subplots(figsize=(7.4, 2.6))
ax.axis("off")
ax.set_xlim(0, 3)
ax.set_ylim(0, 1)
ax.text(1.5, .95, '"How is the weather in Oslo?"', size=12, ha="center")
mono = {"family": "monospace", "size": 8.5, "va": "top"}
for n, seed in enumerate((5, 1, 17)):
    tool, (place,) = finished.disguise(random.Random(seed), "weather")
    ax.text(n + .02, .76, f"// {tool.description}", color="0.4", **mono)
    ax.text(n + .02, .65, f"type {tool.name} = (_: {{", color="#0072b2",
            **mono)
    ax.text(n + .02, .54, f"  {place}: string", color="#d55e00", **mono)
    ax.text(n + .02, .43, "}) => any;", color="#0072b2", **mono)
    ax.text(n + .02, .22, f"to=functions.{tool.name}", color="#0072b2",
            **mono)
    ax.text(n + .02, .11, json.dumps({place: "Oslo"}), color="#d55e00",
            **mono)
ax.plot([0, 3], [.29, .29], color="0.6", lw=.8)
plt.show()

# %% [markdown]
# What to see: above the line what the model reads, three times the same tool
# for the same question; below it what the model has to write each time. No
# word of the call can be known beforehand. Name and parameter must be found in
# the definition, the city in the question. (The cell above uses the finished
# package; here it is built.)

# %%
import random
import re
from dataclasses import replace
from itertools import islice
from importlib.resources import files

import torch

from gptoss.chat.turn import STOPS
from gptoss.model.transformer import GptOss
from gptoss.text.generate import generate_batch
from gptoss.text.harmony import render
from gptoss.text.sampling import Sampler
from gptoss.text.tokenizer import Tokenizer
from gptoss.training.lessons import compact

torch.set_num_threads(1)
POCKET = files("gptoss") / "pocket"

# %% [markdown]
# ## The naive version
#
# Write one definition for each tool, and lessons that call it. If the weather
# tool is always called `get_weather(city)`, a model can learn that line by
# heart and never look at the developer message; it then calls `get_weather`
# in a program that has none. Each conversation therefore draws the tool's
# name, its description and the names of its parameters anew.
#
# Three names for a tool are still too few: a model that guesses among them is
# right once in three, and training is content with that for a long time. So
# half of the names get another verb, like `run_weather`, and guessing no
# longer pays (exercise 3 counts it). What is left to learn is to read.
#
# ## Code
#
# ### What is a tool in all its guises?
#
# A **kit** is the data of one tool: what it may be called, how it may be
# described, which parameters it has under which names, how users ask for it
# and how it is answered. The twelve kits are a table; the code knows nothing
# of weather or timers.

# %% tags=["export"]
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

# %% tags=["hide-input", "export"]
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

# %% [markdown]
# ### How does a conversation see it?
#
# A disguise is drawn for each conversation. It is a `Tool`, the same class
# that [the developer message](../text/conversation.ipynb) is made from.

# %% tags=["export"]
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

# %% [markdown]
# So many definitions can the weather have, and so often would the best guess
# at its name be right:

# %%
rng = random.Random(0)
seen = [disguise(rng, "weather") for _ in range(20_000)]
names = [tool.name for tool, _ in seen]
likely = max({*names}, key=names.count)
print(len({repr(one) for one in seen}), "definitions,", len({*names}),
      f"names; always guessing {likely} is right in "
      f"{names.count(likely) / len(names):.0%}")

# %% [markdown]
# What a question for a tool is about, it is about under every name: that is
# what `tool_key` writes down, so that a question kept for the exam stays kept
# when the tool is called otherwise.

# %% tags=["export:conversations"]
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
from gptoss.training.lessons import (
    FACTS,
    Lesson,
    Exchange,
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

# %%
rng = random.Random(4)
for _ in range(2):
    tool, names = disguise(rng, "weather")
    turn = tool_turn(rng, "weather", tool, names)
    print(turn.ask, "|", tool.name, compact(turn.call[1]), "|", turn.answer)

# %% [markdown]
# Two more turns need to know the tools: a question for which the right tool
# is missing, and one for the date, which the system message may give.

# %% tags=["export:conversations"]
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

# %%
print(missing_turn(random.Random(5), ["weather"]).ask)

# %% [markdown]
# ### What is said that needs no tool at all?
#
# A model whose lessons are all sums and tools answers "Hello!" with a sum.
# Small talk is a short table. So are questions beyond a model of this size:
# the only right answer is to say so.

# %% tags=["hide-input", "export:conversations"]
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

# %%
print(beyond_turn(random.Random(6)).ask)

# %% [markdown]
# ### How do turns become a conversation?
#
# Between a fact and the question for it stand other turns: none, a few short
# ones, or stories that are longer than two windows. The shares in the code
# below (a fact in three conversations of ten is preceded by something else, a
# calculator comes with the date in one set of tools of four, and so on) are
# choices, not derivations: they decide how often a situation is practised, and
# were set where a milestone showed that it was too rare.

# %% tags=["export:conversations"]
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

# %% tags=["export:conversations"]
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

# %% tags=["export:conversations"]
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

# %%
shown = next(lesson_stream(11, mix={"tool": 1}))
for message in shown.messages[1:]:
    print(f"[{message.role} {message.channel or ''}]", message.content)

# %% [markdown]
# ## It holds
#
# Whatever a tool is called, its definition stands in the developer message:
# the name of every call, and each of its parameters.

# %%
calls = 0
for one in islice(lesson_stream(2, mix={"tool": 1}), 300):
    name, arguments = one.facts["call"]
    given = one.messages[1].content
    assert f"type {name} = (" in given
    assert all(re.search(rf"^{parameter}: ", given, re.MULTILINE)
               for parameter in arguments)
    calls += 1
print(calls, "calls, each of a tool that is given")

# %% [markdown]
# How far does the reading of the trained model go? We take questions that were
# kept back and ask them twice: with the names that the lessons drew, and with
# the right tool under a name that is in no lesson, made up on the spot.

# %%
pocket = GptOss.from_pretrained(POCKET, dtype=torch.float32)
reader = Tokenizer.from_pretrained(POCKET)
kept = lesson_stream(8, hold_out=True, mix={"tool": 1})
alone = list(islice((one for one in kept if one.turn == 3), 16))


def called(news: list[str]) -> int:
    """How many of `alone` are answered by a call of the tool's new name."""
    prompts = []
    for one, new in zip(alone, news, strict=True):
        old = f"type {one.facts['call'][0]} = ("
        prompts.append(render(reader, [
            replace(message, content=message.content.replace(
                old, f"type {new} = (")) for message in one.messages[:3]]))
    said = generate_batch(pocket, prompts, max_new_tokens=80,
                          stop=[reader.special[name] for name in STOPS],
                          sampler=Sampler(temperature=0.0))
    return sum(f" to=functions.{new}<" in reader.decode(ids)
               for new, ids in zip(news, said, strict=True))


rng = random.Random(3)
known = called([one.facts["call"][0] for one in alone])
names = [made_up(rng).lower() for _ in alone]
print(f"{known} of {len(alone)} under a name of the lessons;",
      f"{called(names)} under names like {', '.join(names[:3])}")
assert known > 0.75 * len(alone)

# %% [markdown]
# What varies in the lessons is what is read, and no more. Of the names that
# its lessons know, joined in whatever way, the model says the one that stands
# there; one that is nobody's it begins to say and then leaves for one that it
# knows. To read any name it would have to meet names that mean nothing.

# %% [markdown]
# ## Takeaways
#
# - What stays the same in every lesson is learnt by heart; what a model shall
#   read has to change from lesson to lesson, and it learns no more than that.
# - A kit is data: names, descriptions, parameters, questions, an answer and a
#   way to draw arguments. A new tool is a new entry.
# - Between a fact and the question for it stand turns of every other kind,
#   some longer than two windows: the distance is taught, too.
# - No turn before the last may be one that an exam asks; it is drawn again.
#
# ## Exercises
#
# ### Exercise 1
#
# In the far lessons the fact lies more than two windows of 64 tokens back.
# Show that [the sliding layers](../attention/masks.ipynb) alone cannot carry
# it: how far does information travel through two of them? Then measure the
# distance in the lessons themselves.

# %% tags=["hide-cell"]
window = pocket.config.sliding_window
sliding = pocket.config.layer_types.count("sliding_attention")
reach = sliding * (window - 1)
source, distances = lesson_stream(5, mix={"far": 1}), []
for _ in range(100):
    one = next(source)
    told = next(n for n, m in enumerate(one.messages)
                if m.content in ("I will remember that.", "Good to know.",
                                 "I will not forget it."))
    between = one.messages[told:one.turn]
    distances.append(len(render(reader, between, drop="none")))
print(f"reach {reach}, nearest far fact {min(distances)} tokens back")
beyond = sum(d > 2 * window for d in distances)
print(f"beyond two windows: {beyond} of 100")
assert reach < 2 * window and beyond >= 95

# %% [markdown]
# ### Exercise 2
#
# Write a kit for a tool of your own, add it to `KITS`, and read a lesson
# that uses it.

# %% tags=["hide-cell"]
KITS["tea"] = Kit(
    ("brew_tea", "make_tea"), ("Make a cup of tea.",),
    ((("kind", "leaves"), TEXT, "what tea"),),
    ("Make a cup of {0} tea.",), "a cup of {0} tea",
    "Your {0} tea is ready.",
    lambda rng: ([rng.choice(WORDS["colour"])], "ok"))
tool, names = disguise(random.Random(1), "tea")
turn = tool_turn(random.Random(2), "tea", tool, names)
print(turn.ask, "|", turn.call[0], compact(turn.call[1]), "|", turn.answer)
del KITS["tea"]
assert "tea" not in KITS and turn.call[0].endswith("_tea")

# %% [markdown]
# ### Exercise 3
#
# Take the verbs away: each kit then has the names of its table alone. How
# often is the best guess at a name right then, on average over the twelve
# tools, and how often with the verbs?

# %% tags=["hide-cell"]
def best_guess(names: list[str]) -> float:
    return max(map(names.count, {*names})) / len(names)


rng = random.Random(0)
verbs = sum(best_guess([disguise(rng, key)[0].name for _ in range(2000)])
            for key in KITS) / len(KITS)
plain = sum(best_guess([rng.choice(kit.names) for _ in range(2000)])
            for kit in KITS.values()) / len(KITS)
print(f"without verbs {plain:.0%}, with them {verbs:.0%}")
assert verbs < plain

# %% [markdown]
# ## Sources
#
# - The forms of definitions and calls: {cite}`gptoss2025`, and
#   [a conversation in tokens](../text/conversation.ipynb).
# - Tools that a model has learnt to call by its own practice: T. Schick and
#   others, *Toolformer*, https://arxiv.org/abs/2302.04761.
