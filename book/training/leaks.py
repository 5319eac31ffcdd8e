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
#     module: leaks
#     public: [LeakError, without_leaks]
# ---

# %% [markdown]
# # How do we know that no exam question was practised?
#
# ## Question
#
# An exam is worth something only if its questions were never practised. One
# fact in ten is kept back, and the last question of a lesson is drawn again
# if it is one of these. Is that enough? Of 300 conversations made by this
# rule, 63 hold a question of the exam all the same.
#
# ## Picture

# %% tags=["hide-input", "picture"]
# Figure: six texts on the left, a question, its reverse, two differences, a
# word problem and a line of working; arrows lead from all of them to one key,
# and from the key to the shelf that it lies on.
import matplotlib.pyplot as plt

from gptoss.training import leaks as finished

plt.style.use("../_static/book.mplstyle")
low = next(n for n in range(101, 250)
           if finished.shelf(f"{n} + 250") == "exam")
texts = (f"What is 250 + {low}?", f"Add 250 to {low}.",
         f"Take {low} from {250 + low}.", f"{250 + low} - 250",
         f"There were {250 + low} keys and {low} are gone. How many …",
         f"Check: {250 + low}-{low}: ones …")
(key,) = {key for text in texts for key in finished.sums_in(text)} - {""}
fig, ax = plt.subplots(figsize=(7.4, 2.4))
ax.axis("off")
ax.set_xlim(0, 10)
ax.set_ylim(-.6, 5.6)
for n, text in enumerate(reversed(texts)):
    ax.text(0, n, text, size=9, va="center")
    ax.annotate("", (7, 2.5), (5.6, n), arrowprops={
        "arrowstyle": "-", "color": "#0072b2", "lw": 1})
box = {"boxstyle": "round", "fc": "white", "ec": "#0072b2"}
ax.text(7.05, 2.5, key, size=11, va="center", bbox=box)
ax.annotate("", (9.1, 2.5), (8.4, 2.5), arrowprops={
    "arrowstyle": "->", "color": "#d55e00", "lw": 1.2})
ax.text(9.2, 2.5, finished.shelf(key) or "training", size=11, va="center",
        color="#d55e00")
ax.text(7.05, 4.2, "key", size=9, color="0.4")
ax.text(9.2, 4.2, "shelf", size=9, color="0.4")
plt.show()

# %% [markdown]
# What to see: six texts, one fact. Whoever has practised one of them has
# practised all. So each fact has one *key*, and a checksum of the key says on
# which shelf it lies: for training, for the milestones, or for the exam. This
# fact is kept back, and none of the six may occur in any text that is trained
# on.

# %% tags=["export"]
from gptoss.training.kits import KITS, LANGUAGES, MONEY, NOTES, ROOMS, tool_key
from gptoss.training.lessons import FACTS, SUMS, THINGS, Lesson, sum_key
from gptoss.training.stories import BEATS, WORDS, cast_key, line_pattern, shelf

# %%
import itertools

import gptoss.training.conversations as conversations
from gptoss.training.conversations import lesson_stream
from gptoss.training.leaks import leaks
from gptoss.training.stories import shelf

# %% [markdown]
# ## The naive version
#
# A flag on the last turn, and nothing else: we take away the rule for the
# turns before it and look for what should not be there, with the reader that
# this chapter makes.

# %%
def leaking(count: int = 300) -> int:
    """How many of `count` lessons hold what is kept for an exam."""
    return sum(any(leaks(message.content) for message in lesson.messages)
               for lesson in itertools.islice(
                   lesson_stream(5, mix={"far": 1}), count))


rule, conversations.unheld = conversations.unheld, lambda draw: draw()
without = leaking()
conversations.unheld = rule
print(f"a flag on the last turn: {without} of 300 far lessons leak")
print(f"on every turn:           {leaking()}")

# %% [markdown]
# The stories between a fact and its question are about casts that are kept
# back, and a check of a difference works a kept-back sum. So every turn before
# the last is drawn again until it is on no shelf, and what a question is
# about is written down in one way whatever its form: 5 + 40, 45 - 5 and 45 -
# 40 are one fact, and so is the weather in Oslo under any tool's name.
#
# That is the intention. The check of this chapter does not trust it: it knows
# nothing of flags and reads the words. It turns the templates around, finds in
# a text every cast, sum, fact and question for a tool that it holds, and asks
# for each on which shelf it lies. [The rows](rows.ipynb) send all that is ever
# trained on through it, so a run that ends has proved it for itself.
#
# ## Code
#
# The heart of it is five lines: some *readers*, functions from a text to the
# keys that occur in it, and the question where these lie. In small, with one
# reader for one form:

# %%
import re

from gptoss.training.lessons import sum_key


def plus_only(text: str) -> list[str]:
    return [sum_key(int(a), "+", int(b))
            for a, b in re.findall(r"(\d+) \+ (\d+)", text)]


for text in ("What is 250 + 105?", "Take 105 from 355."):
    print(f"{text:20}", [(key, shelf(key)) for key in plus_only(text)])

# %% [markdown]
# The second text is the same fact, and this reader is blind to it. All the
# rest of the chapter is about missing no form.
#
# ### How is a sum found in every form?

# %% tags=["export"]
import re
from collections.abc import Iterator

from gptoss.weights.errors import Error


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

# %%
print(sorted({*sums_in("Add 5 to 40. 45-5: ones 5-5=0, tens 4=4.")} - {""}))

# %% [markdown]
# ### How are stories and facts found?
#
# A story's hero is any of the names that it holds, together with any "red
# kite" in it; that is more than the cast, never less. Facts and questions for
# tools are the templates read backwards.

# %% tags=["export"]
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

# %% [markdown]
# ### How are questions for tools found?
#
# A question says nothing of the tool's name, so it is found by its words, with
# a group for each value: the city of the weather, the minutes of a timer.

# %% tags=["export"]
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

# %% [markdown]
# ## It holds
#
# Two thousand lessons pass. A check that never fails proves nothing, so we
# plant what must be found: a question that is kept back, of each kind, told
# in another form than the exam asks it.

# %%
import itertools

for one in itertools.islice(lesson_stream(5), 2000):
    without_leaks(one)
kept = next(n for n in range(100, 999) if shelf(sum_key(n, "+", 250)))
for planted in (f"What is {kept} + 250?", f"Check: {kept + 250}-250: ones",
                f"Take {kept} from {kept + 250}.", "one of no sum"):
    print(f"{planted:30}", leaks(planted))

for name in ("exam", "milestone"):
    found = sum(any(leaks(message.content) for message in one.messages)
                for one in itertools.islice(lesson_stream(
                    9, hold_out=name, mix={"sum": 1, "tool": 1, "far": 1,
                                           "story": 1}), 200))
    print(f"{name}: {found} of 200 questions are found")
    assert found == 200

# %% [markdown]
# ## Takeaways
#
# - A strict line between what was seen and what was not is only as strict as
#   the check that reads every text.
# - One key for a question in all its forms: whoever has practised 45 - 5 has
#   practised 5 + 40.
# - A check must be seen to fail: it is tried on what it has to find.
#
# ## Exercises
#
# ### Exercise 1
#
# The check finds a cast in a story by all the names that the story holds. So
# it may cry wolf. Find out how often: how many plain stories of casts that
# training may see would be refused if a hero of another story were named in
# them?

# %% tags=["hide-cell"]
from gptoss.training.stories import WORDS, story_stream

refused = total = 0
for story in itertools.islice(story_stream(3), 100):
    for guest in WORDS["hero"]:
        total += 1
        refused += bool(leaks(f"{story} {guest} came too.", (casts_in,)))
print(f"{refused / total:.2f} of them; one cast in ten is kept back")
assert 0.05 < refused / total < 0.15

# %% [markdown]
# ### Exercise 2
#
# Why does a sum of numbers below twenty have no key? Count the columns of the
# school method that would be kept back if it had one.

# %% tags=["hide-cell"]
inside = {f"{x}+{y}" for x in range(10) for y in range(10)}
kept_back = [one for one in inside if shelf(one)]
print(f"{len(kept_back)} of the {len(inside)} columns would be kept back")
# and nearly every longer sum needs one of them: nobody could learn to add
assert sum_key(5, "+", 7) == "" and sum_key(5, "+", 40) == "5 + 40"

# %% [markdown]
# ### Exercise 3
#
# There are four readers. How many of 200 questions of each kind would slip
# through if one of them were missing?

# %% tags=["hide-cell"]
for kind in ("story", "sum", "far", "tool"):
    exam = list(itertools.islice(lesson_stream(
        4, hold_out="exam", mix={kind: 1}), 200))
    slipped = {}
    for blind in READERS:
        others = tuple(read for read in READERS if read is not blind)
        slipped[blind.__name__] = sum(
            not any(leaks(message.content, others)
                    for message in one.messages) for one in exam)
    print(f"{kind:5}", slipped)
    assert max(slipped.values()) > 100

# %% [markdown]
# Each kind hangs on one reader. (The calculator's questions are sums, which is
# why two readers matter for tools.)
#
# ## Sources
#
# - Exam questions in training data, and how they are looked for: T. Brown and
#   others, *Language models are few-shot learners*,
#   https://arxiv.org/abs/2005.14165, section 4.
