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
#     module: lessons
#     public: [Lesson, Exchange]
# ---

# %% [markdown]
# # What must a very small model be taught?
#
# ## Question
#
# What does a conversation have to look like that teaches a model to think
# before it answers? The trained model of this book is right in more than nine
# sums of ten when it may think. With its analysis cut off, it gets hardly any
# right. Its lessons made the difference, and a program wrote them.
#
# ## Picture

# %% tags=["hide-input", "picture"]
# Figure: 347 + 285 in columns with the two carries, each column in the colour
# of the words that the model writes for it beside the sum, and below the text
# in one line. The ones come first, the leading digit last.
import matplotlib.pyplot as plt

from gptoss.training import lessons as finished

plt.style.use("../_static/book.mplstyle")
fig, ax = plt.subplots(figsize=(7, 2.5))
ax.axis("off")
ax.set_xlim(0, 10)
ax.set_ylim(-.9, 4.2)
mono = {"family": "monospace", "va": "center"}
tints = ("#0072b2", "#d55e00", "#009e73")   # ones, tens, hundreds
for row, digits in ((3, "347"), (2, "285"), (.8, "632")):
    for place, digit in enumerate(reversed(digits)):
        ax.text(2.3 - .6 * place, row, digit, size=17, ha="center",
                color=tints[place], **mono)
ax.text(.45, 2, "+", size=17, ha="center", **mono)
ax.plot([.3, 2.6], [1.4, 1.4], color="k", lw=1)
for place in (1, 2):
    ax.text(2.3 - .6 * place, 3.75, "1", size=11, ha="center",
            color=tints[place], **mono)
ax.text(2.1, 3.75, "carries", size=10, va="center", color="0.35")
named = zip(finished.COLUMNS, finished.columns(347, 285, "+"), strict=False)
for place, (name, line) in enumerate(named):
    ax.text(4.2, 3.4 - 1.15 * place, f"{place + 1}.  {name} {line}", size=13,
            color=tints[place], **mono)
ax.text(.3, -.5, finished.worked(347, 285, "+"), size=11, **mono)
plt.show()

# %% [markdown]
# What to see: on paper we begin with the ones and carry to the left. The
# model can only write from left to right, and an answer starts with its
# *leading* digit, the one that depends on all the others. So it does what we
# do on scrap paper: it writes the columns down first, ones to hundreds, and
# copies the answer from there. (The cell above uses the finished package.)
#
# ## The naive version
#
# Why think at all? Here is the trained model with its analysis cut off: the
# prompt already ends in the header of the final channel, so the first thing
# it may write is the answer. What it makes of sums when it may think stands
# in the log of its training.

# %% tags=["export"]
from gptoss.training.stories import WORDS, cast_key, draw_cast, shelf, tell

# %%
import json
import random
from importlib.resources import files

import torch

from gptoss.chat.turn import STOPS
from gptoss.model.transformer import GptOss
from gptoss.text.generate import generate_batch
from gptoss.text.harmony import Message, render, system_message
from gptoss.text.sampling import Sampler
from gptoss.text.tokenizer import Tokenizer
from gptoss.training.lessons import sum_turn

torch.set_num_threads(1)
POCKET = files("gptoss") / "pocket"
pocket = GptOss.from_pretrained(POCKET, dtype=torch.float32)
reader = Tokenizer.from_pretrained(POCKET)
rng, sums = random.Random(1), []
while len(sums) < 40:
    turn = sum_turn(rng)
    if turn.held == "exam":     # never seen in training
        sums.append(turn)
header = [reader.special["<|channel|>"], *reader.encode("final"),
          reader.special["<|message|>"]]
at_once = [render(reader, [system_message("medium", "2026-01-31"),
                           Message("user", turn.ask)]) + header
           for turn in sums]
said = generate_batch(pocket, at_once, max_new_tokens=30,
                      stop=[reader.special[name] for name in STOPS],
                      sampler=Sampler(temperature=0.0))
right = sum(reader.decode(ids, skip_special=True) == turn.answer
            for ids, turn in zip(said, sums, strict=True))
exam = json.loads((POCKET / "train_log.json").read_text())["exam"]["sum"]
for turn, ids in list(zip(sums, said, strict=True))[:3]:
    print(f"{turn.ask:26} {reader.decode(ids, skip_special=True)}")
print(f"at once:       {right} of {len(sums)} right")
print(f"with analysis: {exam['right'] * exam['count']:.0f} "
      f"of {exam['count']}")
assert right <= 10 and exam["right"] > 0.75

# %% [markdown]
# Why can two numbers not be added at once? Look at 347 + 285. The leading
# digit 6 is said first. It is 3 + 2, and 1 more if the tens overflow; whether
# they do depends on whether the ones do. A model does a fixed amount of work
# for each token, four layers here, and would have to settle all of that
# before its first word. Written from the ones on, each column needs two
# digits and one carry, and all three already stand on the page.
#
# ## Code
#
# ### What is a lesson?
#
# A **turn** is a question with everything that answers it: what the model
# thinks (once for each effort), perhaps a tool call with its result, and the
# final text. A **lesson** is a conversation whose last turn the model has to
# write; what the examiner needs to know is kept beside it. A turn that an
# exam may ask is *held*: it stands on one of the
# [shelves](stories.ipynb) that training never sees.

# %% tags=["export"]
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gptoss.text.harmony import EFFORTS, Message


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

# %% tags=["export"]
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

# %%
turn = Exchange("tool", "What is the weather in Oslo?",
            ("Use weather.", "…", "…"), "In Oslo it is foggy.",
            ("weather", {"city": "Oslo"}), "foggy")
for message in answer_messages(turn, "low"):
    print(f"{message.role:>9} {message.channel:>10}  {message.content}")

# %% [markdown]
# ### How is a model kept from guessing names?
#
# A model that has met twenty names could answer "What is my cat called?" by
# choosing one of twenty. Half of all names are therefore made up on the
# spot: the only way to say one is to look where it was said.

# %% tags=["export"]
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

# %%
rng = random.Random(0)
print([made_up(rng) for _ in range(6)], a_date(rng))

# %% [markdown]
# ### What does it write down for a sum?
#
# One line for each column, in the order of the picture. A difference borrows
# where a sum carries: 5 - 7 cannot be, so 10 are added, `5-7+10=8`, and 1 is
# taken off the next column.

# %% tags=["export"]
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

# %% [markdown]
# Low effort writes the bare columns, medium names them, high adds a check in
# the other direction. Here the smaller number stands first, so the answer is
# negative:

# %%
for effort, think in zip(EFFORTS, sum_thoughts(285, 347, "-"), strict=True):
    print(f"{effort:>6}: {think}")

# %% [markdown]
# One sum can be asked in fourteen ways here, and 5 + 40, 40 + 5 and 45 - 40
# are one fact to whoever has learnt one of them. `sum_key` writes down that
# fact, so that a sum which is kept for the exam is kept in every form.

# %% tags=["export"]
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

# %%
turn = sum_turn(random.Random(3))
print(turn.ask, "|", turn.answer)
print({sum_key(5, "+", 40), sum_key(40, "+", 5), sum_key(45, "-", 40)})

# %% [markdown]
# ### How is a story asked for?
#
# The question names some words of the cast, and the story that follows must
# hold them. At high effort the analysis writes the whole cast down first; it
# is a plan that the story then only has to follow.

# %% tags=["export"]
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

# %%
turn = story_turn(random.Random(1))
print(turn.ask, "|", turn.think[2])

# %% [markdown]
# ### What can be told and asked for?
#
# Each entry: the topic, how it is told, how it is asked for, how it is
# answered, and how a value is drawn.

# %% tags=["hide-input", "export"]
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

# %% [markdown]
# From these entries come three kinds of turns: facts that are told and need
# no more than a nod, a fact that was told and is asked for, and one that is
# asked for but was never told. Without the last kind a model learns to answer
# with *some* name whenever a name is wanted.

# %% tags=["export"]
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

# %%
for turn in recall_turns(random.Random(2)):
    print(turn.ask, "|", turn.answer)

# %% [markdown]
# ## It holds
#
# Read the last digit of every column and you have the result. We try it for
# every seventh number plus, and minus, every eleventh, up to three digits.

# %%
pairs = [(a, b) for a in range(0, 1000, 7) for b in range(0, 1000, 11)]
for a, b in pairs:
    digits = [line.rpartition("=")[2] for line in columns(a, b, "+")]
    assert int("".join([digits[-1], *(d[-1] for d in digits[-2::-1])])) \
        == a + b
    if a >= b:
        digits = [line.rpartition("=")[2] for line in columns(a, b, "-")]
        assert int("".join(digits[::-1])) == a - b
print(f"{len(pairs):,} pairs, every sum and difference as it should be")

# %% [markdown]
# ## Takeaways
#
# - What cannot be said in one step is written down in many: the analysis
#   channel makes a constant amount of work per token enough.
# - Names that are made up on the spot cannot be learnt by heart; they teach
#   to look where something was said.
# - Every question carries what the examiner needs, and a key that says what
#   it is about in whatever form it is asked.
#
# ## Exercises
#
# ### Exercise 1
#
# How many names can `made_up` make? How many different ones are among the
# first ten thousand?

# %% tags=["hide-cell"]
count = sum(len(SYLLABLES) ** n for n in (2, 3)) * len({*CODAS})
rng = random.Random(0)
some = {made_up(rng) for _ in range(10_000)}
print(f"{count:,} names; {len(some):,} of the first 10,000 are different")
assert {len(part) for part in SYLLABLES} == {2}     # so no two fall together

# %% [markdown]
# ### Exercise 2
#
# Write the working of a product, a number of three digits times one digit,
# column by column. What is the largest carry?

# %% tags=["hide-cell"]
def product_columns(a: int, d: int) -> tuple[list[str], int]:
    """The columns of a * d, and the largest carry."""
    lines, carry, most = [], 0, 0
    for x in map(int, reversed(str(a))):
        value = x * d + carry
        lines.append(f"{x}*{d}{f'+{carry}' * (carry > 0)}={value}")
        carry = value // 10
        most = max(most, carry)
    return lines, most


print(", ".join(product_columns(347, 8)[0]))
largest = 0
for a in range(1000):
    for d in range(10):
        lines, carry = product_columns(a, d)
        ends = [line.rpartition("=")[2] for line in lines]
        assert int(ends[-1] + "".join(e[-1] for e in ends[-2::-1])) == a * d
        largest = max(largest, carry)
print("largest carry:", largest)

# %% [markdown]
# ### Exercise 3
#
# How often does the leading column of a sum of two three-digit numbers depend
# on more than its own two digits and the tens? Count the pairs in which a
# carry from the *ones* decides the hundreds: the tens add up to exactly 9.

# %% tags=["hide-cell"]
deep = top = 0
for a in range(100, 1000):
    for b in range(100, 1000, 7):
        tens, ones = a // 10 % 10 + b // 10 % 10, a % 10 + b % 10
        top += tens + (ones > 9) > 9
        deep += tens == 9
total = 900 * len(range(100, 1000, 7))
print(f"a carry reaches the hundreds in {top / total:.0%} of the sums; "
      f"the ones decide whether it does in {deep / total:.0%}")

# %% [markdown]
# So a model that looks at two columns at once would be right in nine sums of
# ten. The trained one, without its scrap paper, does not even learn that:
# nothing in its lessons asked it to.
#
# ## Sources
#
# - Writing intermediate steps: M. Nye and others, *Show your work:
#   scratchpads for intermediate computation with language models*,
#   https://arxiv.org/abs/2112.00114.
# - Harmony, its channels and efforts: {cite}`gptoss2025`.
