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
#     module: stories
#     public: [read_story, story_stream, tell]
# ---

# %% [markdown]
# # How does a program mark a story?
#
# ## Question
#
# How can a program tell whether a story holds together? The one of this
# chapter knows 38 billion plots about 354 million casts, and it takes a text
# for a story if and only if it could have told that text itself.
#
# This part of the book makes the model that the package ships: eight chapters
# write the texts that it learns from, train it over lunch, and let programs
# mark what it has learnt. Stories come first, since they are the longest
# things that it says: whoever is called Mira at the beginning, and whatever
# was red, must be so at the end.
#
# ## Picture

# %% tags=["hide-input", "picture"]
# Figure: a matrix of dots, sixteen beats from left to right, eight words of
# one story from top to bottom. A dot is a mention, a line joins the mentions
# of one word; hero and friend are named again and again, the places twice or
# three times.
import random
import re

import matplotlib.pyplot as plt

from gptoss.training import stories as finished

plt.style.use("../_static/book.mplstyle")
rng = random.Random(1)
cast = finished.draw_cast(rng)
told = [finished.tell(random.Random(4), cast, beats=n + 1)
        for n in range(len(finished.BEATS))]
parts = [told[0], *(b[len(a):] for a, b in zip(told, told[1:],
                                               strict=False))]
fig, ax = plt.subplots(figsize=(7, 2.9))
for y, slot in enumerate(finished.CAST_SLOTS):
    at = [x for x, part in enumerate(parts)
          if re.search(rf"\b{cast[slot]}\b", part)]
    colour = "#0072b2" if slot in ("hero", "kind", "friend", "fkind") else (
        "#d55e00" if slot in ("colour", "thing") else "#009e73")
    ax.plot(at, [y] * len(at), "o-", color=colour, lw=1.2)
ax.set_yticks(range(len(finished.CAST_SLOTS)),
              [cast[slot] for slot in finished.CAST_SLOTS])
ax.set_xticks(range(len(finished.BEATS)),
              [name for name, _ in finished.BEATS], rotation=55, ha="right")
ax.set_xlim(-.5, len(finished.BEATS) - .5)
ax.invert_yaxis()
ax.grid(axis="x", alpha=.3)
plt.show()

# %% [markdown]
# One story of sixteen steps, and where it mentions each of its eight words.
# (This cell uses the finished package, as the first picture of a chapter may;
# everything below is built here.)
# What to see: nearly every word occurs more than once, often far apart. The
# first dot of a line *binds* the word. Each later dot is a chance to go wrong,
# and so a place where a checker can catch a model that has forgotten.
#
# ## The naive version
#
# Could the loss be the judge? It rewards a story in which the kite changes
# colour nearly as much as one in which it doesn't: one token of two hundred
# is wrong. Looking for words that should occur fares no better. Here are two
# stories; in the second the kite turns into a hat, and Mira into Tom.

# %%
def naive_mark(text: str, words: list[str]) -> bool:
    return all(word in text for word in words)


straight = ("Mira the fox had a red kite. She lost the red kite at the lake. "
            "At last she found the red kite.")
crooked = ("Mira the fox had a red kite. She lost the red hat at the lake. "
           "At last Tom found the blue kite.")
for name, text in (("straight", straight), ("crooked", crooked)):
    found = naive_mark(text, ["Mira", "fox", "red", "kite", "lake"])
    print(f"{name}: {'good' if found else 'bad'}")

# %% [markdown]
# Both pass. What has to be checked is that each *mention* agrees with the
# first, and that needs the plot.
#
# ## Derivation
#
# The way out is to write the stories ourselves, by a generator so simple that
# it can be run backwards. Three sentences show it whole. Words in braces are
# slots. Those of the cast are drawn once and then stay; telling is filling
# in, and reading is a regular expression in which the first mention captures
# the word (`(?P<hero>…)`) and each later one asks for the same
# (`(?P=hero)`).

# %%
TOY = ("{hero} had a {colour} kite.", "{hero} lost the {colour} kite.",
       "At last {hero} found the kite.")
TOY_WORDS = {"hero": ("Mira", "Tom"), "colour": ("red", "blue", "green")}


def tell_toy(rng: random.Random) -> str:
    cast = {slot: rng.choice(words) for slot, words in TOY_WORDS.items()}
    return " ".join(TOY).format(**cast)


def read_toy(text: str) -> dict[str, str] | None:
    pattern, seen = "", set()
    for part in re.split(r"(\{\w+\})", " ".join(TOY)):
        slot = part.strip("{}")
        if slot not in TOY_WORDS:
            pattern += re.escape(part)
        elif slot in seen:
            pattern += f"(?P={slot})"
        else:
            pattern += f"(?P<{slot}>{'|'.join(TOY_WORDS[slot])})"
            seen.add(slot)
    found = re.fullmatch(pattern, text)
    return found and found.groupdict()


story = tell_toy(random.Random(2))
print(story, "->", read_toy(story))
hero = read_toy(story)["hero"]
other = "Tom" if hero == "Mira" else "Mira"
for broken in (story.replace("kite", "hat"),
               other.join(story.rsplit(hero, 1))):
    print(broken, "->", read_toy(broken))

# %% [markdown]
# `None` is "I could not have told this". A text passes exactly if the
# generator can produce it. That is much stricter than a list of mistakes: no
# mistake has to be thought of in advance.
#
# The toy also tells how good a model can become. It makes two choices, a hero
# of 2 and a colour of 3, all equally likely, so there are 6 stories and each
# has the probability 1/6. A model that knows everything about the generator
# still cannot guess which of them comes next. On average it pays at least
# $\log 6 = 1.79$ nats a story, however long it was trained.

# %%
import math

print(f"log 2 + log 3 = {math.log(2) + math.log(3):.2f} nats a story")

# %% [markdown]
# In general choices follow one another, and some only arise in one sentence of
# several: a sentence may have a slot of its own that others lack. A story is
# then a cast (hero, friend, their kinds, colour, thing, home, place), one
# sentence for each step of the plot, and one word for each slot of that
# sentence that is free to vary. If a choice has $n$ equally likely outcomes,
# no model can predict a story with fewer than
#
# $$ \mathcal{L}_{\min} = \sum_{\text{fixed slots}} \log n
#      + \sum_{\text{beats}} \Big( \log m + \frac1m \sum_{j=1}^{m}
#        \sum_{\text{free slots of } j} \log n \Big) $$ (train-floor)
#
# nats on average, where $m$ is the number of sentences that a beat (a step of
# the plot) can choose from. We shall hold the trained model to this number.
#
# ## Code
#
# ### Which words can a story be about?

# %% tags=["export"]
import math

GIRLS = ("Mira", "Lily", "Nora", "Anna", "Ruby", "Zoe", "Ella", "Maya",
         "Tess", "Wren")
BOYS = ("Tom", "Max", "Leo", "Sam", "Finn", "Hugo", "Otto", "Ben", "Jack",
        "Milo")
WORDS = {
    "hero": GIRLS + BOYS,
    "friend": ("Pip", "Bruno", "Daisy", "Oscar", "Hazel", "Toby", "Clara",
               "Felix", "Ivy", "Rufus", "Nina", "Walter"),
    "kind": ("fox", "rabbit", "mouse", "cat", "duck", "hedgehog", "kitten",
             "lamb"),
    "fkind": ("bear", "goose", "dog", "frog", "squirrel", "mole", "badger",
              "horse"),
    "colour": ("red", "blue", "green", "yellow", "white", "black", "purple",
               "pink", "brown", "silver", "golden", "grey"),
    "thing": ("kite", "ball", "hat", "boat", "drum", "lamp", "scarf",
              "book", "bell", "shell", "cup", "basket", "key", "box",
              "flute", "button"),
    "home": ("the forest", "the small house", "the hollow tree", "the valley",
             "the quiet village", "the cave", "the old barn",
             "the garden", "the tower", "the cottage"),
    "place": ("the river", "the lake", "the beach", "the market",
              "the meadow", "the bridge", "the hill", "the park",
              "the mill", "the pond", "the harbour", "the orchard"),
    # words that may differ from one sentence to the next
    "_day": ("morning", "day", "afternoon", "evening"),
    "_spot": ("bench", "bush", "stone", "wall", "log", "gate", "fence",
              "wagon", "oak", "stairs"),
    "_size": ("little", "small", "young", "tiny"),
    "_loud": ("said", "cried", "called", "whispered"),
}
CAST_SLOTS = tuple(slot for slot in WORDS if not slot.startswith("_"))
PRONOUNS = {name: ("she", "her") for name in GIRLS}
PRONOUNS |= {name: ("he", "his") for name in BOYS}

# %% [markdown]
# Slots without an underscore are *fixed*: drawn once, and the same wherever
# the story mentions them. Slots with one are *free*: each mention draws anew.
# No two lists of fixed words share a word, so hero and friend differ and a
# word tells which slot it fills. Before a word that follows an article we
# write "a", since all words that can stand there begin with a consonant.

# %%
casts = math.prod(len(WORDS[slot]) for slot in CAST_SLOTS)
print(f"{casts:,} casts")

# %% [markdown]
# ### What happens, and in which order?
#
# A plot is a list of *beats*: a name, and the sentences that can say it.

# %% tags=["export"]
BEATS = (
    ("opening", (
        "Once upon a time there was a {_size} {kind} named {hero}.",
        "Once upon a time, a {_size} {kind} called {hero} woke up early.",
        "Once upon a time there lived a {_size} {kind} by the name of "
        "{hero}.",
        "There once was a {_size} {kind} whose name was {hero}.",
        "This is the story of {hero}, a {_size} {kind}.",
        "Long ago there was a {_size} {kind} named {hero}.")),
    ("home", (
        "{hero} lived in {home}.",
        "{She} lived in {home} with {her} mother.",
        "{Her} home was {home}.",
        "{hero} and {her} family lived in {home}.",
        "It was warm in {home}, where {hero} lived.")),
    ("love", (
        "More than anything, {she} loved {her} {colour} {thing}.",
        "{hero} had a {colour} {thing} and took it everywhere.",
        "For {her} birthday {she} got a {colour} {thing}.",
        "{Her} father gave {hero} a {colour} {thing}.",
        "The best thing {she} had was a {colour} {thing}.")),
    ("journey", (
        "One {_day} {she} went to {place} with the {thing}.",
        "One {_day} {hero} took the {colour} {thing} to {place}.",
        "\"Let us go to {place},\" {she} {_loud} one {_day}.",
        "The next {_day} {hero} walked all the way to {place}.",
        "One {_day} the sun was shining, and {hero} ran to {place}.")),
    ("play", (
        "",
        "There {she} played with the {thing} until {she} was tired.",
        "{hero} the {kind} sang a song and danced with the {thing}.",
        "What a lovely {_day} it was at {place}!",
        "{She} showed the {thing} to the birds.")),
    ("loss", (
        "But a strong wind came, and the {colour} {thing} was gone.",
        "Then {hero} fell asleep. When {she} woke up, "
        "the {thing} was gone.",
        "{She} put the {thing} down for a moment, and then "
        "{she} could not find it.",
        "Suddenly the {kind} saw that the {colour} {thing} was missing.",
        "But on the way from {home} {she} lost the {thing}.")),
    ("sorrow", (
        "",
        "The {_size} {kind} sat down and cried.",
        "\"Oh no!\" {_loud} {hero}. \"Where is my {thing}?\"",
        "{She} was very sad, for there was no other {thing} like it.",
        "{hero} looked all over {place}, but it was not there.")),
    ("friend", (
        "A {fkind} named {friend} came by.",
        "Just then a {fkind} came along. It was {friend}.",
        "{friend} the {fkind} heard {whom}.",
        "Near the {_spot} {she} met a {fkind} called {friend}.",
        "Then {she} saw {friend}, a {fkind} with kind eyes.")),
    ("question", (
        "\"What is wrong, little {kind}?\" asked {friend}.",
        "\"Why are you sad, {hero}?\" asked {friend}.",
        "\"Can I help you?\" asked the {fkind}.",
        "\"What are you looking for?\" asked {friend}.")),
    ("answer", (
        "\"I came from {home} and lost my {colour} {thing},\" "
        "said {hero}.",
        "\"My {thing} is gone,\" said the {kind}. \"It is {colour}.\"",
        "{hero} told {friend} about the {colour} {thing}.",
        "\"Have you seen a {colour} {thing}?\" asked {hero}.")),
    ("offer", (
        "\"Do not worry,\" said {friend}. \"I will help you.\"",
        "\"Let us look for it at {place} together,\" said {friend}.",
        "{friend} thought for a while. \"I know what to do,\" "
        "said the {fkind}.",
        "\"We will find it, {hero},\" said the {fkind}.")),
    ("search", (
        "So the {kind} and the {fkind} looked under a {_spot} at {place}.",
        "They searched all around {place}.",
        "{friend} looked on one side of {place}, and {hero} on "
        "the other.",
        "The {kind} and the {fkind} asked everybody at {place}.")),
    ("finding", (
        "At last the {fkind} saw something {colour} at {place}. "
        "It was the {thing}!",
        "And there, behind the {_spot}, was the {colour} {thing}!",
        "Then the {kind} shouted, \"Here is my {thing}!\" It was under "
        "the {_spot}.",
        "In the end {friend} found the {colour} {thing} near the "
        "{_spot} at {place}.")),
    ("thanks", (
        "\"Thank you, {friend}!\" said {hero}, and the {fkind} smiled.",
        "{hero} hugged {friend} and thanked the {fkind}.",
        "\"You are a good friend,\" said {hero} to the {fkind}.",
        "\"Thank you, {friend},\" said the {kind} to the {fkind}.")),
    ("return", (
        "That {_day} the {kind} carried the {colour} {thing} from {place} "
        "back to {home}.",
        "{hero} left {place} and took the {thing} home to {home}.",
        "Then they went to {home} and played with the {colour} {thing}.",
        "Soon the {kind} was back in {home} with the {colour} {thing}.")),
    ("ending", (
        "From that day on, {hero} and {friend} were best friends.",
        "{hero} the {kind} never lost the {thing} again.",
        "And {hero} and {friend} lived happily ever after.",
        "The {kind} and the {fkind} were friends for ever.",
        "That night {hero} dreamed of {friend} and the {colour} {thing}.")),
)

# %% [markdown]
# Sixteen beats, in this order, each with several ways to be said; two of
# them may stay silent (an empty sentence). The order is what makes a story:
# the object must be owned before it can be lost, and lost before it can be
# found.

# %%
ways = 1
for _, lines in BEATS:
    ways *= len(lines)
print(f"{len(BEATS)} beats, {ways:.2g} plots, before any word is drawn")

# %% [markdown]
# ### How is a story told, and which casts are kept back?
#
# Telling is what it was in the toy. Beside it stands a *shelf*: an exam must
# ask for what was never read, so one cast in ten is kept from training, by a
# checksum of hero, colour and thing. The same three words always land on the
# same shelf, in every run and on every machine, and nobody has to store a
# list. Two thirds of what is kept back is for the exam; the rest is for the
# milestones on the way there, by which we choose how to train.

# %% tags=["export"]
import math
import random
import re
import zlib


def draw_cast(rng: random.Random) -> dict[str, str]:
    """Draw who and what a story is about: one word for each fixed slot.

    Hero and friend differ, and so do their kinds: their lists have no word
    in common.
    """
    return {slot: rng.choice(WORDS[slot]) for slot in CAST_SLOTS}


def with_pronouns(cast: dict[str, str]) -> dict[str, str]:
    """Add the slots that follow from the hero: she, her, She, Her …"""
    she, her = PRONOUNS[cast["hero"]]
    whom = "her" if she == "she" else "him"
    return cast | {"she": she, "her": her, "She": she.title(),
                   "Her": her.title(), "whom": whom}


def shelf(key: str) -> str:
    """Where a question is kept, by a checksum of what it is about: nine in
    ten for training (""); of the tenth, two thirds for the "exam" and a
    third for the "milestone"s on the way. No key, no shelf."""
    n = zlib.crc32(key.encode())
    return ("" if not key or n % 10
            else ("milestone", "exam", "exam")[n // 10 % 3])


def cast_key(cast: dict[str, str]) -> str:
    """What makes a cast new: hero, colour and thing."""
    return f"cast {cast['hero']} {cast['colour']} {cast['thing']}"


def held_out(cast: dict[str, str]) -> bool:
    """Whether a cast is kept from training: one in ten, by a checksum of
    hero, colour and thing, so that the pair was never seen together."""
    return bool(shelf(cast_key(cast)))

# %% tags=["export"]
SLOT = re.compile(r"\{(\w+)\}")


def tell(rng: random.Random, cast: dict[str, str] | None = None,
         beats: int | None = None) -> str:
    """Tell a story (or its first `beats` beats) about `cast`."""
    words = with_pronouns(cast or draw_cast(rng))

    def fill(match: re.Match) -> str:
        slot = match[1]
        return words[slot] if slot in words else rng.choice(WORDS[slot])

    told = (SLOT.sub(fill, rng.choice(lines)) for _, lines in BEATS[:beats])
    return " ".join(line for line in told if line)

# %%
print(tell(random.Random(1)))

# %% [markdown]
# ### How low can the loss of a story go?
#
# This is equation {eq}`train-floor`, term by term:

# %% tags=["export"]
def story_entropy() -> float:
    """Nats of choice in one story of `tell`: the floor of any loss.

    Equation (train-floor).
    """
    size = {slot: len(words) for slot, words in WORDS.items()}
    nats = sum(math.log(size[slot]) for slot in CAST_SLOTS)
    for _, lines in BEATS:
        free = [slot for line in lines for slot in SLOT.findall(line)
                if slot.startswith("_")]
        nats += math.log(len(lines))
        nats += sum(math.log(size[slot]) for slot in free) / len(lines)
    return nats

# %% [markdown]
# We can check it without any model. A random generator that adds up the
# logarithm of each choice while it tells 2,000 stories must find the same:

# %%
class CountingRandom(random.Random):
    nats = 0.0

    def choice(self, seq):
        self.nats += math.log(len(seq))
        return super().choice(seq)


counting, cast = CountingRandom(0), draw_cast(random.Random(0))
for _ in range(2000):
    tell(counting, cast)
counted = counting.nats / 2000 + math.log(casts)
print(f"derived {story_entropy():.1f}, counted {counted:.1f} nats a story")
assert abs(counted - story_entropy()) < 0.2

# %% [markdown]
# ### How is a story read?
#
# The generator runs backwards. At each beat we try every sentence, with the
# words that are bound so far written into it; a word that is not yet bound is
# captured. If a sentence fits, we go on behind it; if later nothing fits, we
# come back and try the next one, since two sentences can begin alike. Where
# no way leads to the end, the furthest point that was reached says what went
# wrong.

# %% tags=["export"]
def line_pattern(line: str, cast: dict[str, str]) -> re.Pattern:
    """The regular expression of a template under what is known so far.

    A fixed slot that `cast` knows is that word and no other; one that it
    doesn't know is a named group; a free slot is any of its words.
    """
    known = with_pronouns(cast) if "hero" in cast else cast
    seen, parts, end = set(), [], 0
    for match in SLOT.finditer(line):
        slot = match[1]
        parts.append(re.escape(line[end:match.start()]))
        end = match.end()
        if slot in known:
            parts.append(re.escape(known[slot]))
        elif slot in seen:
            parts.append(f"(?P={slot})")
        elif slot in WORDS and not slot.startswith("_"):
            parts.append(f"(?P<{slot}>{'|'.join(WORDS[slot])})")
            seen.add(slot)
        else:
            parts.append(f"(?:{'|'.join(WORDS[slot])})")
    return re.compile("".join(parts) + re.escape(line[end:]))

# %% tags=["export"]
from dataclasses import dataclass, field


@dataclass
class Reading:
    """What `read_story` found.

    Attributes:
        coherent: the whole text is one story with one cast.
        cast: the words bound so far.
        beat: name of the first beat that could not be read ("" if none).
        rest: the text from there on, at most 60 characters of it.
    """

    coherent: bool = False
    cast: dict[str, str] = field(default_factory=dict)
    beat: str = ""
    rest: str = ""


def read_story(text: str) -> Reading:
    """Read a story against the plot; never fails, reports how far it got.

    A text is coherent if and only if `tell` could have told it: every
    beat in order, and hero, kind, friend, colour, thing, home and place
    the same wherever they are mentioned.
    """
    text, reached = text.strip(), 0
    furthest = Reading(beat="opening", rest=text)

    def follow(at: int, beat: int, cast: dict[str, str]) -> Reading | None:
        if beat == len(BEATS):
            return Reading(True, cast) if at >= len(text) else None
        nonlocal reached, furthest
        name, lines = BEATS[beat]
        if at >= reached:
            reached = at
            furthest = Reading(False, cast, name, text[at:at + 60])
        for line in lines:
            found = line_pattern(line, cast).match(text, at)
            if not found:
                continue
            bound = cast | found.groupdict()
            step = found.end() + (text[found.end():found.end() + 1] == " ")
            done = follow(step if line else at, beat + 1, bound)
            if done:
                return done
        return None

    return follow(0, 0, {}) or furthest

# %% [markdown]
# One word replaced near the end is enough to be noticed, and the reading says
# at which beat it got stuck:

# %%
rng = random.Random(1)
cast = draw_cast(rng)
story = tell(rng, cast)
print("as told:", read_story(story).coherent)
for slot, other in (("colour", "violet"), ("friend", "Zoe"),
                    ("home", "the moon")):
    broken = other.join(story.rsplit(cast[slot], 1))
    reading = read_story(broken)
    print(f"{slot} changed at the end: {reading.coherent}, "
          f"stuck at the {reading.beat!r} beat")
    assert not reading.coherent

# %% [markdown]
# Training needs endless stories, none about a cast that was kept back; the
# exam needs the others.

# %% tags=["export"]
from collections.abc import Iterator


def story_stream(seed: int, hold_out: bool = False) -> Iterator[str]:
    """Endless stories; of held-out casts only, or of all the others."""
    rng = random.Random(seed)
    while True:
        cast = draw_cast(rng)
        if held_out(cast) == hold_out:
            yield tell(rng, cast)

# %%
print(next(story_stream(3))[:150])

# %% [markdown]
# ## It holds
#
# The checker and the generator of stories are each other's inverse, and one
# fixed word replaced anywhere is always noticed, provided that it occurs
# twice.

# %%
rng, noticed = random.Random(7), 0
for _ in range(200):
    cast = draw_cast(rng)
    story = tell(rng, cast)
    reading = read_story(story)
    assert reading.coherent and reading.cast.items() <= cast.items()
    slot = rng.choice(("colour", "thing", "place", "home", "friend"))
    word = rng.choice([w for w in WORDS[slot]
                       if w not in (cast[slot], cast.get("hero"))])
    spots = [m.start() for m in re.finditer(cast[slot], story)]
    if len(spots) > 1:
        at = rng.choice(spots)
        broken = story[:at] + word + story[at + len(cast[slot]):]
        assert not read_story(broken).coherent, broken
        noticed += 1
print(f"200 stories read back; {noticed} changed words, all noticed")
share = sum(held_out(draw_cast(rng)) for _ in range(3000)) / 3000
print(f"held out: {share:.2f} of all casts")

# %% [markdown]
# ## Takeaways
#
# - A generator that can be run backwards is a checker: what it cannot parse,
#   it could not have told.
# - Fixed slots are drawn once and bind every later mention; free slots may
#   differ from sentence to sentence.
# - The entropy of the choices is a floor that no loss can pass, known before
#   anything is trained.
# - One cast in ten is kept back by a checksum, so that an exam can ask for
#   what was never read.
#
# ## Exercises
#
# ### Exercise 1
#
# How near do plain stories come to their floor {eq}`train-floor`? Measure
# the shipped model on held-out ones.

# %% tags=["hide-cell"]
from importlib.resources import files

import torch

from gptoss.model.transformer import GptOss
from gptoss.text.tokenizer import Tokenizer

torch.set_num_threads(1)
POCKET = files("gptoss") / "pocket"
pocket = GptOss.from_pretrained(POCKET, dtype=torch.float32)
reader = Tokenizer.from_pretrained(POCKET)
told, nats = story_stream(seed=9, hold_out=True), 0.0
for _ in range(30):
    ids = torch.tensor([*reader.encode(next(told)),
                        reader.special["<|endoftext|>"]])
    with torch.inference_mode():
        logits = pocket(ids[None, :-1])[0]
    nats += torch.nn.functional.cross_entropy(
        logits, ids[1:], reduction="sum").item() / 30
print(f"{nats:.0f} nats a story, the floor is {story_entropy():.0f}")
assert 0.9 < nats / story_entropy() < 1.1

# %% [markdown]
# ### Exercise 2
#
# What makes a cast new is its hero, colour and thing. How many of these
# triples are there, and how many are kept back, on which shelf?

# %% tags=["hide-cell"]
from collections import Counter
from itertools import product

triples = product(*(WORDS[slot] for slot in ("hero", "colour", "thing")))
shelves = Counter(
    shelf(cast_key(dict(zip(("hero", "colour", "thing"), triple,
                            strict=True)))) for triple in triples)
print({name or "training": count for name, count in shelves.items()})
assert sum(shelves.values()) == 20 * 12 * 16

# %% [markdown]
# ### Exercise 3
#
# A reader that gives up at the first sentence that fits, without coming back,
# would be simpler. How many of 200 stories does it lose? Find one beat where
# the first fit is the wrong one.

# %% tags=["hide-cell"]
def read_greedily(text: str) -> str:
    """The beat at which a reader that never comes back gets stuck, or ""."""
    at, cast = 0, {}
    for name, lines in BEATS:
        for line in lines:
            found = line_pattern(line, cast).match(text, at)
            if found:
                cast |= found.groupdict()
                end = found.end()
                at = end + (text[end:end + 1] == " ") if line else at
                break
        else:
            return name
    return ""


lost = Counter(read_greedily(tell(random.Random(n))) for n in range(200))
print({name or "read": count for name, count in sorted(lost.items())})
assert lost[""] < 200

# %% [markdown]
# An empty sentence fits everywhere. Where it stands first, the reader takes
# it, and then finds the sentence that was really told where the next beat
# should be.
#
# ## Sources
#
# - Stories for very small models: R. Eldan and Y. Li, *TinyStories*,
#   https://arxiv.org/abs/2305.07759. Their stories are written, and marked,
#   by a large model; these are written and marked by one program.
