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
#     module: train
# ---

# %% [markdown]
# # A gpt-oss you can train over lunch
#
# ## Question
#
# How small can a gpt-oss be and still think before it answers?
#
# The checkpoint in `gptoss/pocket/` has a ten-thousandth of the 20b's
# parameters. One processor core trained it in 74 minutes. It speaks
# harmony: asked for a sum of three-digit numbers it works it out column by
# column in its analysis channel, longer or shorter as the system message
# says, and then answers. It reads the definitions of tools it has never seen
# together, calls the right one with the right arguments and uses the result.
# It remembers what it was told a story ago, and in its stories a red kite
# stays a red kite. Everything the big models have is in it: alternating
# sliding and full layers, sinks, YaRN, top-k routing, a clamped SwiGLU,
# experts in MXFP4.
#
# This chapter writes the text it learns from, trains it, puts its experts
# on the four-bit grid and lets programs mark the result. The whole training
# is one command, `python -m gptoss train FOLDER --seed 0`.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import gptoss

torch.set_num_threads(1)  # faster than more for tensors of this size
plt.style.use("_static/book.mplstyle")
POCKET = Path(gptoss.__file__).parent / "pocket"

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
# Figure: left, the loss over the steps, falling with spikes, with lines where
# the recipe changes; right, the share of questions right at every thousandth
# step: stories and far facts come first, then tools, sums last.
saved = json.loads((POCKET / "train_log.json").read_text())
log, recipe = saved["log"], saved["recipe"]
steps = [entry["step"] for entry in log]
marks = saved["marks"]
fig, axes = plt.subplots(1, 2, figsize=(8, 3.2))
axes[0].plot(steps, [entry["loss"] for entry in log], linewidth=0.6)
for name, at, high in (("easy rows end", recipe["easy"], 14),
                       ("more sums", recipe["change"], 14),
                       ("four bits", recipe["grid_from"], 9),
                       ("digits", recipe["last"], 14)):
    axes[0].axvline(at * recipe["steps"], color="C1", linestyle=":")
    axes[0].text(at * recipe["steps"], high, f" {name}", fontsize=8)
axes[0].set(xlabel="step", ylabel="nats per token", yscale="log",
            ylim=(0.02, 22), title="The loss")
axes[0].set_yticks((0.3, 0.5, 1, 2, 5), ("0.3", "0.5", "1", "2", "5"))
axes[0].minorticks_off()
for n, (kind, name) in enumerate((("story", "stories"), ("sum", "sums"),
                                  ("tool", "tools"), ("far", "far facts"))):
    axes[1].plot([mark["step"] for mark in marks],
                 [mark[kind] for mark in marks], f"{'osD^'[n]}-", label=name)
axes[1].set(xlabel="step", ylabel="share of held-out questions right",
            title="What it can do", ylim=(-0.03, 1.03))
axes[1].legend()
plt.show()
print(f"{log[-1]['seconds'] / 60:.0f} minutes on one core, "
      f"{recipe['steps']:,} steps of {recipe['tokens']:,} tokens")

# %% [markdown]
# Left the loss, from the saved log; right, what the weights at every
# thousandth step could do with 40 questions of each kind that training never
# shows. (Dotted: where the recipe changes; see the training loop.) The loss
# falls and says little (its spikes are batches of senseless drills). The
# abilities come one after another: stories and facts from far
# above, which are copying, then tools, which are copying the right thing, and
# arithmetic last. While the rate is high a few steps can undo one of them for
# a while.

# %% [markdown]
# ## The naive version
#
# Why think at all? Here is the trained model with its analysis cut off: the
# prompt already ends in the header of the final channel, so the first thing
# it may write is the answer. What it makes of sums when it may think stands
# in the log.

# %%
import random

from gptoss.text.sampling import Sampler
from gptoss.text.generate import generate_batch
from gptoss.text.harmony import Message, render, system_message
from gptoss.text.tokenizer import Tokenizer
from gptoss.training.conversations import lesson_stream
from gptoss.model.transformer import GptOss
from gptoss.chat.turn import STOPS

pocket = GptOss.from_pretrained(POCKET, dtype=torch.float32)
reader = Tokenizer.from_pretrained(POCKET)
stop = [reader.special[name] for name in STOPS]
source = lesson_stream(1, hold_out=True, mix={"sum": 1})
sums = [next(source) for _ in range(40)]
header = [reader.special["<|channel|>"], *reader.encode("final"),
          reader.special["<|message|>"]]
at_once = [render(reader, lesson.messages[:lesson.turn]) + header
           for lesson in sums]
said = generate_batch(pocket, at_once, max_new_tokens=30, stop=stop,
                      sampler=Sampler(temperature=0.0))
right = sum(reader.decode(ids, skip_special=True) == lesson.facts["answer"]
            for ids, lesson in zip(said, sums, strict=True))
print("at once, at most a quarter right:", right <= 10)
print("with analysis, more than three quarters:",
      saved["exam"]["sum"]["right"] > 0.75)

# %% [markdown]
# A second naive plan concerns the weights: train in full precision and round
# the experts to four bits when all is done. The log holds the price, measured
# on the same batch before and after rounding.

# %%
price = next(entry for entry in log if "unrounded" in entry)
print(f"step {price['step']}: {price['unrounded']:.4f} nats, "
      f"rounded at once {price['loss']:.4f}")

# %% [markdown]
# Small on one batch, but never paid back: what is shipped is then a copy near
# the model that was trained, and nobody has examined the copy.
#
# A third is to let the loss be the judge. It cannot be: it rewards a story
# in which the kite changes colour nearly as much as one in which it doesn't.
# Looking for words that should occur fares no better:

# %%
def naive_mark(text: str, words: list[str]) -> bool:
    return all(word in text for word in words)


straight = ("Mira the fox had a red kite. She lost the red kite at the lake. "
            "At last she found the red kite.")
crooked = ("Mira the fox had a red kite. She lost the red hat at the lake. "
           "At last Tom found the blue kite.")
for text in (straight, crooked):
    print(naive_mark(text, ["Mira", "fox", "red", "kite", "lake"]))

# %% [markdown]
# What has to be checked is that each *mention* agrees with the first, and
# that needs the plot. The way out is to write the generator so that it can be
# run backwards.

# %% [markdown]
# ## Derivation
#
# **Copying.** Most of what the model has to learn is to say again what stands
# further up: the colour of the kite, the name of a cat, of a tool, of its
# parameters. The circuit that does it is known {cite}`induction2022` and
# needs two layers. After "Zorali lives in Bomak. Where does Zo", the next
# piece is "ra", because "ra" came after "Zo" before:
#
# 1. A head of the first layer writes beside each token the one before it.
# 2. A head of a later layer looks, with the present token as its query, for
#    a place that has this token written beside it, and says the token there.
#
# Small models find this pair late, and all at once, since neither head is of
# any use before the other is there. The first runs of this chapter spent
# seven thousand steps and never learnt to read the name of a tool. But a
# circuit that is understood need not be found: it can be where the training
# starts {cite}`mimetic2023`.
#
# *Step 1 needs no token at all.* The projections of gpt-oss have biases, and
# RoPE turns a constant into a clock. If all queries are $q$ and all keys $k$,
# constants, and RoPE turns pair $i$ by $\theta_i$ per position (chapter 4),
# then with each pair read as a complex number, $k_i = r_i$ and
# $q_i = r_i e^{-\mathrm{i} \theta_i}$, the score of a key that is $d$ tokens
# back is
#
# $$ s(d) = \sum_i \operatorname{Re}\big( q_i e^{\mathrm{i} \theta_i d}
#    \, \overline{k_i} \big) = \sum_i r_i^2 \cos\big( \theta_i (d - 1)
#    \big), $$ (train-clock)
#
# largest at $d = 1$. Three fast pairs make the peak sharp: one clock alone
# strikes again after $2 \pi / \theta_i$ tokens, three hardly ever agree.
#
# *Step 2 must not see the clock.* Query and key are now the embedding of the
# present token and the copy beside an earlier one, both projected by the same
# matrix, so that their product is large where the two are the same. RoPE
# turns them apart, but at very different speeds: over a hundred tokens the
# fastest pair of this model turns sixteen times round, the fifth a quarter,
# and from the sixth on each turns by less than a third of a radian, for YaRN
# has slowed them down. So the three fastest pairs keep the clock, and those
# from the fifth on compare.
#
# **Whose tokens count.** A conversation is system, developer, user, tool and
# assistant text in one row, and only the assistant's is the model's to write.
# With logits $z_t \in \mathbb{R}^V$ at position $t$, the next token $y_t$ and
# a weight $w_t$ for it, the loss of a batch is
#
# $$ \mathcal{L}_{\text{text}} = \frac{1}{\sum_t w_t} \sum_t w_t
#    \Big( \log \sum_v e^{z_{tv}} - z_{t y_t} \Big). $$ (train-ce)
#
# The obvious choice is $w_t = 1$ for the model's own tokens and 0 elsewhere.
# It wastes most of every row: the text that is only read holds the same
# words, and guessing them teaches what they mean. So it counts a fifth.
#
# **The floor.** For stories the smallest loss is known in advance. A story is
# made by independent uniform choices: a cast (hero, friend, their kinds,
# colour, thing, home, place), one template per beat, and one word for each
# free slot of the template. If choice $i$ has $n_i$ equally likely outcomes,
# no model can predict a story with fewer than
#
# $$ \mathcal{L}_{\min} = \sum_{\text{fixed slots}} \log n
#      + \sum_{\text{beats}} \Big( \log m + \frac1m \sum_{j=1}^{m}
#        \sum_{\text{free slots of } j} \log n \Big) $$ (train-floor)
#
# nats on average, where $m$ is the number of templates of a beat.
#
# **The balance.** Nothing in {eq}`train-ce` stops the router from sending
# every token to the same two experts: whichever are ahead get the gradients
# and get further ahead. Let $f_e$ be the share of the $NK$ assignments that
# went to expert $e$, and $p_e$ its mean probability under a softmax over all
# $E$ logits. The auxiliary loss {cite}`switch2021`
#
# $$ \mathcal{L}_{\text{balance}} = E \sum_e f_e \, p_e $$ (train-balance)
#
# is 1 when both are uniform, and grows when the experts that are chosen most
# are also the ones the router likes most. $f_e$ is a count and has no
# gradient; $p_e$ has one, and it pushes probability away from whatever is
# overloaded. OpenAI's configuration names this coefficient
# `router_aux_loss_coef`.
#
# **The grid.** Let $Q(w)$ be the MXFP4 rounding of chapter 2. Its derivative
# is zero almost everywhere, so a model that computes with $Q(w)$ could not
# learn. The straight-through estimator keeps the value and pretends the
# derivative is one:
#
# $$ \tilde w = w + \operatorname{stop}\big(Q(w) - w\big), \qquad
#    \frac{\partial \tilde w}{\partial w} := 1. $$ (train-ste)
#
# The optimiser goes on moving the full-precision $w$; the forward pass, and
# so every gradient, sees only values that the file can hold. After the last
# step $Q(w)$ *is* what the file holds: writing it loses nothing.
#
# **Carries.** Why can two numbers not be added at once? The leading digit
# of $a+b$ is said first, and it depends on the carry from the column below,
# which depends on the one below that. Written from the ones on, each column
# needs two digits and one carry, all of them already on the page: a constant
# amount of work per token, which is what a transformer has.

# %% [markdown]
# ## Code
#
# ### The words of a small world

# %% tags=["export:training/stories"]
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
# the story mentions them. Slots with one are *free*. Where an article stands
# before a word it is "a": all of them but "oak" begin with a consonant.

# %%
casts = math.prod(len(WORDS[slot]) for slot in CAST_SLOTS)
print(f"{casts:,} casts")

# %% [markdown]
# ### A plot is a list of beats

# %% tags=["export:training/stories"]
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
# them may stay silent. The order is what makes a story: the object must be
# owned before it can be lost, and lost before it can be found.

# %%
ways = 1
for _, lines in BEATS:
    ways *= len(lines)
print(f"{len(BEATS)} beats, {ways:.2g} plots, before any word is drawn")

# %% [markdown]
# ### Telling

# %% tags=["export:training/stories"]
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

# %% tags=["export:training/stories"]
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

# %% tags=["export:training/stories"]
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
# `story_entropy` is equation {eq}`train-floor`. A generator that counts its
# own choices agrees with it:

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
print(f"{story_entropy():.1f} nats a story")
assert abs(counted - story_entropy()) < 0.2

# %% [markdown]
# ### Reading: the checker is the generator run backwards

# %% tags=["export:training/stories"]
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

# %% tags=["export:training/stories"]
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
    text, furthest = text.strip(), [0, Reading(beat="opening", rest=text)]

    def follow(at: int, beat: int, cast: dict[str, str]) -> Reading | None:
        if beat == len(BEATS):
            return Reading(True, cast) if at >= len(text) else None
        name, lines = BEATS[beat]
        if at >= furthest[0]:
            rest = text[at:at + 60]
            furthest[:] = [at, Reading(False, cast, name, rest)]
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

    return follow(0, 0, {}) or furthest[1]

# %% [markdown]
# The checker is not a list of forbidden words. It parses: at each beat it
# tries every template, with the words bound so far written into it. What it
# cannot parse, the generator could not have told.

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

# %% tags=["export:training/stories"]
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
# ### A turn of conversation
#
# A **turn** is a question with everything that answers it: what the model
# thinks (once for each effort), perhaps a tool call with its result, and the
# final text. A **lesson** is a conversation whose last turn the model has to
# write; what the examiner needs to know is kept beside it.

# %% tags=["export:training/lessons"]
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from gptoss.text.harmony import (
    EFFORTS,
    Message,
    developer_message,
    system_message,
)
from gptoss.text.typescript import Tool



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

# %% tags=["export:training/lessons"]
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

# %%
turn = Turn("tool", "What is the weather in Oslo?",
            ("Use weather.", "…", "…"), "In Oslo it is foggy.",
            ("weather", {"city": "Oslo"}), "foggy")
for message in answer_messages(turn, "low"):
    print(f"{message.role:>9} {message.channel:>10}  {message.content}")

# %% [markdown]
# ### Names that nobody has seen
#
# A model that has met twenty names could answer "What is my cat called?" by
# choosing one of twenty. Half of all names are therefore made up on the
# spot: the only way to say one is to look where it was said.

# %% tags=["export:training/lessons"]
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
# ### Sums, column by column
#
# A forward pass of four layers cannot add two three-digit numbers in its
# head: the leading digit, which has to be said first, may depend on a carry
# from the last. The school method goes the other way, from the ones on, and
# writes the carry down. That is what the analysis channel is for.

# %% tags=["export:training/lessons"]
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

# %%
for think in sum_thoughts(285, 347, "-"):
    print(think)

# %% tags=["export:training/lessons"]
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

# %%
turn = sum_turn(random.Random(3))
print(turn.ask, "|", turn.answer)

# %% [markdown]
# ### Stories on request

# %% tags=["export:training/lessons"]
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

# %%
turn = story_turn(random.Random(1))
print(turn.ask, "|", turn.think[2])

# %% [markdown]
# ### Facts to remember
#
# Topic, how it is told, how it is asked for, how it is answered, and what
# value it can have.

# %% tags=["hide-input", "export:training/lessons"]
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

# %% tags=["export:training/lessons"]
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

# %%
for turn in recall_turns(random.Random(2)):
    print(turn.ask, "|", turn.answer)

# %% [markdown]
# ### Tools in disguise
#
# If the weather tool were always called `get_weather(city)`, the model could
# learn that line by heart and never look at the developer message. Each
# conversation therefore draws the tool's name, its description and the names
# of its parameters anew. Three names for a tool are too few: a model that
# guesses among them is right once in three, and the first runs were content
# with that. So half of the names get another verb, like `run_weather`, and
# guessing no longer pays. What is left to learn is to read.

# %% tags=["export:training/kits"]
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

# %% tags=["hide-input", "export:training/kits"]
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

# %% tags=["export:training/kits"]
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

# %% tags=["export:training/conversations"]
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

# %%
rng = random.Random(4)
for _ in range(2):
    tool, names = disguise(rng, "weather")
    turn = tool_turn(rng, "weather", tool, names)
    print(turn.ask, "|", tool.name, compact(turn.call[1]), "|", turn.answer)

# %% [markdown]
# Two more turns need to know the tools: a question for which the right tool
# is missing, and one for the date, which the system message may give.

# %% tags=["export:training/conversations"]
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

# %%
print(missing_turn(random.Random(5), ["weather"]).ask)

# %% [markdown]
# ### Small talk, and what is beyond it

# %% tags=["hide-input", "export:training/conversations"]
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

# %%
print(beyond_turn(random.Random(6)).ask)

# %% [markdown]
# ### From turns to a conversation
#
# Between a fact and the question for it stand other turns: none, a few short
# ones, or stories that are longer than two windows.

# %% tags=["export:training/conversations"]
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

# %% tags=["export:training/conversations"]
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

# %% tags=["export:training/conversations"]
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

# %%
shown = next(lesson_stream(11, mix={"tool": 1}))
for message in shown.messages[1:]:
    print(f"[{message.role} {message.channel or ''}]", message.content)

# %% [markdown]
# ### No question twice
#
# An exam is worth something only if its questions were never practised. A
# flag on the last turn is not enough: the first version of this chapter had
# one, and still told 118 of the exam's 151 casts as stories in between, and
# worked kept-back sums when it checked a difference. So every turn before
# the last is drawn again until it is on no shelf, and what a question is
# about is written down in one way whatever its form: 5 + 40, 45 - 5 and 45 -
# 40 are one fact, and so is the weather in Oslo under any tool's name.
#
# That is the intention. The check does not trust it: it knows nothing of
# flags and reads the words. It turns the templates around, finds in a text
# every cast, sum, fact and question for a tool that it holds, and asks for
# each on which shelf it lies. `rows` sends all that is ever trained on
# through it, so a run that ends has proved it for itself.

# %% tags=["export:training/leaks"]
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
# A story's hero is any of the names that it holds, together with any "red
# kite" in it; that is more than the cast, never less. Facts and questions for
# tools are the templates read backwards.

# %% tags=["export:training/leaks"]
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

# %% tags=["export:training/leaks"]
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

# %% [markdown]
# ### A tokenizer of fifteen hundred tokens

# %% tags=["export:training/rows"]
from gptoss.text.tokenizer import Tokenizer
from gptoss.text.vocabulary import (
    ALPHABET,
    NAMED,
    PATTERN,
    RANKS,
    tokenizer_json,
)

CONTROL = 21  # control tokens, in the order of o200k_harmony


def train_ranks(texts: list[str], vocab_size: int) -> dict[bytes, int]:
    """Learn byte-level BPE ranks: bytes of a token -> its id.

    At most `vocab_size` tokens, 256 of them the single bytes; fewer when
    the texts have nothing left to merge.
    """
    from tokenizers import Regex, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Engine
    from tokenizers.models import BPE

    engine = Engine(BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    engine.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=list(ALPHABET),
        show_progress=False))
    letters = {letter: byte for byte, letter in enumerate(ALPHABET)}
    words = sorted(engine.get_vocab().items(), key=lambda pair: pair[1])
    return {bytes(letters[c] for c in word): rank for word, rank in words}


def control_ids(vocab_size: int) -> dict[str, int]:
    """Ids of the named control tokens when the last 21 ids are theirs."""
    return {name: vocab_size - CONTROL + real - RANKS
            for real, name in NAMED.items()}


def train_tokenizer(texts: list[str], vocab_size: int) -> str:
    """The tokenizer.json of a small vocabulary, made like the released one.

    The last 21 ids are the control tokens of o200k_harmony in its order;
    ids that the merges leave free stay reserved.
    """
    ranks = train_ranks(texts, vocab_size - CONTROL)
    name = {token: f"<|{text}|>"
            for text, token in control_ids(vocab_size).items()}
    control = {token: name.get(token, f"<|reserved_{token}|>")
               for token in range(len(ranks), vocab_size)}
    return tokenizer_json(ranks, control)

# %% [markdown]
# Digits are kept out of the texts that the merges are learnt from. Each digit
# then stays a token of its own, and column arithmetic is about tokens rather
# than about their spelling. (In o200k, 347 is one token, and 1347 is two.)
#
# The texts are also broken before a capital letter and after the dot of
# `functions.get_time`. A BPE learnt without this has one token for " Oslo",
# with its space, and spells "Oslo" in pieces where no space comes before it,
# as in the arguments `{"city":"Oslo"}`. To copy is then to spell, and made-up
# names come apart differently each time. With it a name is the same tokens
# wherever it stands.
#
# Words that begin small keep their space: a story would be a third longer
# without. So " fox" in a question and "fox" in quotes, as arguments have it,
# are two different tokens, and a model has to learn for each word that they
# belong together. The run before this one failed at just that: all ten tool
# calls of 200 that it got wrong were translations, `brown` for *fox*, `b
# flute` for *flute*. We help three times: the words that are translated are
# learnt bare as well, so that the quoted one is one token and not f, ox; half
# of the questions put the word in quotes, as English does; and some rows
# below practise nothing but such twins.

# %% tags=["export:training/rows"]
import random
import re




BREAK = re.compile(r"\d+| (?=[A-Z])|\.(?=[a-z])")
QUOTED = WORDS["thing"] + WORDS["colour"] + WORDS["kind"]


def sample_texts(count: int, seed: int = 7) -> list[str]:
    """What the tokenizer learns from: lessons and stories, no digits."""
    texts, source = [], lesson_stream(seed)
    for _ in range(count):
        for message in next(source).messages:
            header = (message.role, message.channel,
                      f" to={message.recipient or ''}", " json")
            for text in (message.content, *filter(None, header)):
                texts += [part for part in BREAK.split(text) if part]
    told = story_stream(seed)
    texts += [part for _ in range(count // 4)
              for part in BREAK.split(next(told))]
    return texts + [word for word in QUOTED for _ in range(count // 4)]

# %%
vocabulary = Tokenizer(train_tokenizer(sample_texts(800), 1024))
for text in ("347+285: ones 7+5=12", "Zorali lives in Bomak.",
             '{"city":"Bomak"}'):
    print([vocabulary.decode([t]) for t in vocabulary.encode(text)])
rng = random.Random(0)
for name in (made_up(rng) for _ in range(100)):
    alone = vocabulary.encode(name)
    assert vocabulary.encode(f" {name}")[-len(alone):] == alone

# %% [markdown]
# ### Rows, and what counts in them
#
# A row is a whole conversation, a plain story, a drill or a table. A drill is
# tokens without any sense, in pieces that come again and again, of which each
# repetition counts; a table is columns of digits, of which the answers count.
# In a conversation what the model itself has to write counts fully:
# everything after the `<|start|>assistant` with which the prompt ends. The
# rest, which it only reads, counts a fifth.
#
# Its own *earlier* messages need care. Their analysis has been dropped, so
# each of them goes straight from `<|start|>assistant` to the final channel
# and ends in `<|end|>`: just what the model must not do now. The first run of
# this chapter counted these tokens, and by step 1500 the model answered
# greetings without thinking, ended with `<|end|>` and went on to write the
# user's next question itself. So headers and stops of old messages count
# nothing, and neither does the text of an old sum: learning to say 632
# without the working is what the analysis exists to avoid.

# %% tags=["export:training/rows"]
from collections.abc import Iterator

import torch
from torch import Tensor

from gptoss.text.harmony import render_message



Row = tuple[list[int], list[float]]
READ = 0.2  # weight of a token that the model only reads


def lesson_row(tokenizer: Tokenizer, lesson: Lesson) -> Row:
    """Token ids of a lesson, and the weight of each in the loss."""
    ids, weights = [], []
    last, body = len(lesson.messages) - 1, tokenizer.special["<|message|>"]
    lead = 1 + len(tokenizer.encode("assistant"))   # <|start|>assistant
    for n, message in enumerate(lesson.messages):
        stop = "<|return|>" if n == last else "<|end|>"
        part = render_message(tokenizer, message, stop)
        begin, end = 0, len(part)
        if message.role == "assistant":
            if n < lesson.turn:     # of an old one, the text alone
                begin, end = part.index(body) + 1, end - 1
            elif lesson.messages[n - 1].role != "assistant":
                begin = lead        # the prompt gives it
        weight = READ if n < lesson.turn or message.role != "assistant" else 1
        weight = 0 if n in lesson.muted else weight
        ids += part
        weights += [weight if begin <= at < end else 0
                    for at in range(len(part))]
    return ids, weights


def story_row(tokenizer: Tokenizer, text: str) -> Row:
    """A plain story, ended by <|endoftext|>; every token counts."""
    ids = [*tokenizer.encode(text), tokenizer.special["<|endoftext|>"]]
    return ids, [1.0] * len(ids)


def drill_row(tokenizer: Tokenizer, rng: random.Random) -> Row:
    """Tokens without any sense, in pieces that come again and again."""
    top = min(tokenizer.special.values())
    pieces = [[rng.randrange(top) for _ in range(rng.randrange(2, 9))]
              for _ in range(rng.randrange(2, 9))]
    ids, weights, seen = [], [], set()
    while len(ids) < rng.choice((80, 160, 240, 320)):
        at = rng.randrange(len(pieces))
        ids += pieces[at]
        weights += [0.0] + [float(at in seen)] * (len(pieces[at]) - 1)
        seen.add(at)
    return ids, weights


def table_row(tokenizer: Tokenizer, rng: random.Random) -> Row:
    """Columns without their sums, one after the other; answers count."""
    ids, weights = [], []
    for _ in range(rng.randrange(12, 36)):
        asked, answer, _ = column(rng.randrange(10), rng.randrange(10),
                                  rng.randrange(2), rng.choice("+-"))
        for text, weight in ((f" {asked}", 0.0), (answer, 1.0)):
            part = tokenizer.encode(text)
            ids += part
            weights += [weight] * len(part)
    return ids, weights


def twin_row(tokenizer: Tokenizer, rng: random.Random) -> Row:
    """Words as text has them, with a space before, and as JSON has them, in
    quotes; these count."""
    ids, weights = [], []
    for _ in range(rng.randrange(12, 36)):
        word = rng.choice(QUOTED)
        for text, weight in ((f" {word}", 0.0), (':"', 0.0), (word, 1.0),
                             ('"', 0.0)):
            part = tokenizer.encode(text)
            ids += part
            weights += [weight] * len(part)
    return ids, weights


def rows(tokenizer: Tokenizer, seed: int, easy: int = 0,
         mix: dict[str, int] | None = None, table: float = 0.0
         ) -> Iterator[Row]:
    """Endless rows. Of the first `easy`, a third are plain stories and
    drills and none is longer than 320 tokens; later one in twelve, and
    up to 1900. `mix`: of the lessons, as for `lesson_stream`; `table`: share
    of rows that are digits alone. LeakError if a lesson or a story holds
    what is kept for the exam."""
    rng, made = random.Random(seed), 0
    lessons = map(without_leaks, lesson_stream(seed, mix=mix))
    stories = map(story_without_leaks, story_stream(seed))
    while True:
        (plain, drill), longest = (((0.2, 0.12), 320) if made < easy
                                   else ((0.05, 0.03), 1900))
        luck = rng.random()
        row = (story_row(tokenizer, next(stories)) if luck < plain
               else drill_row(tokenizer, rng) if luck < plain + drill
               else twin_row(tokenizer, rng) if luck < plain + drill + 0.02
               else table_row(tokenizer, rng) if luck > 1 - table
               else lesson_row(tokenizer, next(lessons)))
        if len(row[0]) <= longest:
            made += 1
            yield row

# %%
ids, weights = lesson_row(vocabulary, shown)
own = [t for t, weight in zip(ids, weights, strict=True) if weight == 1]
print(len(ids), "tokens, of these to be written:")
print(vocabulary.decode(own))
print("a table:", vocabulary.decode(table_row(
    vocabulary, random.Random(0))[0][:40]))

# %% [markdown]
# Rows of like length go into a batch together, so that little of it is
# padding: 400 rows are sorted and cut into batches of at most so many tokens,
# and the batches are shuffled.

# %% tags=["export:training/rows"]
def padded(group: list[Row]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) int64 and weights (B, T), zero beyond each row."""
    shape = len(group), max(len(ids) for ids, _ in group)
    tokens, weights = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    for row, (ids, weight) in enumerate(group):
        tokens[row, :len(ids)] = torch.tensor(ids)
        weights[row, :len(ids)] = torch.tensor(weight)
    return tokens, weights


def batches(source: Iterator[Row], seed: int, size: int, pool: int = 400
            ) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (tokens, weights) of at most `size` tokens with padding."""
    rng = random.Random(seed)
    while True:
        some = sorted((next(source) for _ in range(pool)),
                      key=lambda row: len(row[0]))
        groups: list[list[Row]] = [[]]
        for row in some:
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > size:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        yield from map(padded, groups)

# %%
source = batches(rows(vocabulary, seed=0), seed=0, size=2500)
some = [next(source) for _ in range(50)]
filled = sum((weights > 0).sum() for _, weights in some)
print(f"{filled / sum(t.numel() for t, _ in some):.2f} of a batch is text")

# %% [markdown]
# ### The loss: the next token, and a fair share for every expert

# %% tags=["export:training/train"]
import torch.nn.functional as F
from torch import nn

from gptoss.model.transformer import GptOss
from gptoss.moe.routing import expert_load, top_logits


def weighted_loss(model: GptOss, tokens: Tensor, weights: Tensor
                  ) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy in nats, and the mean over the tokens of
    weight 1 alone. tokens, weights (B, T): each token but the first is
    predicted from those before it."""
    logits = model(tokens[:, :-1]).flatten(0, 1)
    nats = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    own = weights == 1
    return ((weights * nats).sum() / weights.sum(),
            (nats.detach() * own).sum() / own.sum().clamp_min(1))


def that_matter(weights: Tensor) -> Tensor:
    """(B, T) bool: places with something that counts at or behind them; the
    others are padding, or as good as that."""
    return weights.flip(-1).cummax(-1).values.flip(-1) > 0


def load_balance(logits: Tensor, k: int) -> Tensor:
    """The auxiliary loss of Switch Transformers, for K experts a token.

    Args:
        logits: (N, E) router logits of one layer.
        k: experts chosen per token.
    Returns:
        E * sum_e f_e * p_e, a scalar: f_e the share of assignments that
        expert e gets, p_e its mean probability over all E. 1 when both
        are uniform; up to E / K when K experts take everything.
    """
    experts = logits.shape[-1]
    _, ids = top_logits(logits, k)
    share = expert_load(ids, experts) / ids.numel()
    return experts * (share * logits.softmax(-1).mean(0)).sum()


class RouterTap:
    """Collects the router logits of one forward pass, layer by layer."""

    def __init__(self, model: GptOss) -> None:
        self.logits: list[Tensor] = []
        self.hooks = [layer.mlp.router.register_forward_hook(self._keep)
                      for layer in model.layers]

    def _keep(self, router: nn.Module, inputs: tuple, output: object) -> None:
        self.logits.append(F.linear(inputs[0], router.weight, router.bias))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def take(self) -> list[Tensor]:
        taken, self.logits = self.logits, []
        return taken

# %% [markdown]
# Two extremes of {eq}`train-balance`, for 8 experts and 2 per token: logits
# that prefer nobody, and logits that always prefer the same two.

# %%
torch.manual_seed(0)
even = torch.randn(4096, 8) * 1e-3
greedy = even + torch.tensor([9.0, 9.0, 0, 0, 0, 0, 0, 0])
print(f"{load_balance(even, 2):.2f} {load_balance(greedy, 2):.2f}")
assert abs(load_balance(even, 2) - 1) < 0.01
assert abs(load_balance(greedy, 2) - 8 / 2) < 0.01

# %% [markdown]
# ### Where the weights start

# %% tags=["export:training/pocket"]
from gptoss.weights.config import GptOssConfig


def pocket_config(vocab_size: int = 1536) -> GptOssConfig:
    """The shipped model: every feature of the 20b, a ten-thousandth of it."""
    special = control_ids(vocab_size)
    return GptOssConfig(
        num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2,
        vocab_size=vocab_size, hidden_size=128, intermediate_size=128,
        head_dim=32, num_attention_heads=8, num_key_value_heads=2,
        sliding_window=64, initial_context_length=256, rope_factor=8.0,
        max_position_embeddings=2048,
        eos_token_id=special["return"], pad_token_id=special["endoftext"])

# %% tags=["export:training/planting"]
def start_at_random(model: GptOss, seed: int) -> None:
    """Draw the matrices from normal(0, 1 / columns), in place.

    A standard deviation of 0.02 suits D = 2880, since 2880**-0.5 = 0.019;
    in a narrow model it makes every layer whisper, and learning to look
    back took more than twice the steps.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.endswith("bias"):
            scale = parameter.shape[-1] ** -0.5
            nn.init.normal_(parameter, std=scale, generator=generator)

# %% [markdown]
# And now the two heads of the derivation, once for each of the two key/value
# heads. The first half of the residual stream belongs to the token itself,
# the second to what stands beside it; from there the output is read too, in
# another rotation. `look_back` is step 1, `look_for` the attention of step 2,
# and `carry` says what a head takes along and where it puts it.

# %% tags=["export:training/planting"]
from gptoss.model.layers import Attention
from gptoss.attention.rope import rope_parameters

PULL = (8.0, 8.0, 4.0)  # on the score, of the three fastest pairs


def rows_of(n: int, size: int) -> slice:
    """The rows of head, or of group, `n`."""
    return slice(n * size, (n + 1) * size)


def look_back(attention: Attention, config: GptOssConfig, group: int,
              head: int) -> None:
    """`head` of `group` and the next look one and two tokens back, whatever
    these are: biases alone decide, in the three fastest pairs."""
    C, n = config.head_dim, len(PULL)
    frequencies, concentration = rope_parameters(config)
    fast = frequencies[:n].float()
    size = (torch.tensor(PULL) * C ** 0.5 / concentration ** 2).sqrt()
    keys = rows_of(group, C)
    attention.k_proj.bias[keys] = 0
    for start in (0, C // 2):
        channels = slice(keys.start + start, keys.start + start + n)
        attention.k_proj.weight[channels] = 0
    attention.k_proj.bias[keys.start:keys.start + n] = size
    for offset in (1, 2):
        rows = rows_of(head + offset - 1, C)
        queries = attention.q_proj.bias[rows].zero_()
        attention.q_proj.weight[rows] = 0
        queries[:n] = size * torch.cos(fast * offset)
        queries[C // 2:C // 2 + n] = -size * torch.sin(fast * offset)


def look_for(attention: Attention, config: GptOssConfig, group: int,
             head: int, token: Tensor) -> None:
    """`head` of `group` looks for places with the present token beside
    them, in pairs slow enough to mean the same far away."""
    C, half = config.head_dim, config.hidden_size // 2
    slow = torch.tensor([n for n in range(C) if n % (C // 2) > len(PULL)])
    queries, keys = torch.zeros(C, 2 * half), attention.k_proj.weight
    queries[slow, :half] = 2.0 * token[:len(slow)]
    attention.q_proj.weight[rows_of(head, C)] = queries
    keys[group * C + slow] = 0
    beside = half + group * C + torch.arange(len(slow))
    keys[group * C + slow, beside] = 4.0

# %% tags=["export:training/planting"]
def carry(attention: Attention, group: int, head: int, token: Tensor,
          out: Tensor, start: int) -> None:
    """What `head` of `group` sees, it writes from `start` on."""
    size, half = token.shape
    values = attention.v_proj.weight[rows_of(group, size)].zero_()
    values[:, :half] = token
    written = attention.o_proj.weight[:, rows_of(head, size)].zero_()
    written[start:start + len(out)] = out


@torch.no_grad()
def plant_copying(model: GptOss, seed: int) -> None:
    """Begin with the circuit that copies, in place.

    Layer 0 writes the previous token beside each one; layers 1 and 3 look
    for the present token beside an earlier one, and say that one. The
    first half of the residual stream holds the token itself. Every other
    head and expert starts more quietly than `start_at_random` left it.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    C, half = config.head_dim, config.hidden_size // 2
    embedding, head = model.embed_tokens.weight, model.lm_head.weight
    words = torch.randn(len(embedding), half, generator=generator) * 0.7
    inner, outer = (torch.linalg.qr(torch.randn(
        half, half, generator=generator))[0].T for _ in range(2))
    embedding.zero_()[:, :half] = words
    head.zero_()[:, half:] = words / 0.7 / half ** 0.5 @ inner.T @ outer
    for layer in model.layers:
        layer.self_attn.o_proj.weight.mul_(0.3)
        layer.mlp.experts.down_proj.mul_(0.1)
    for group in range(config.num_key_value_heads):
        at, first = rows_of(group, C), model.layers[0].self_attn
        place = group, group * (config.num_attention_heads
                                // config.num_key_value_heads)
        look_back(first, config, *place)
        carry(first, *place, inner[at], torch.eye(C) / 2, half + at.start)
        for layer in model.layers[1:4:2]:
            look_for(layer.self_attn, config, *place, inner[at])
            carry(layer.self_attn, *place, inner[at], 1.3 * outer[at].T, half)

# %% [markdown]
# Not a step has been trained, and the planted model copies: given text
# without sense whose pieces come again, it finds the continuation. (Nats per
# token; guessing blindly among 1,024 costs 6.9.)

# %%
drills = [drill_row(vocabulary, random.Random(n)) for n in range(20)]
for name in ("at random", "planted"):
    fresh = GptOss(pocket_config(1024), dtype=torch.float32, packed=False)
    start_at_random(fresh, seed=0)
    if name == "planted":
        plant_copying(fresh, seed=0)
    with torch.inference_mode():
        nats = [weighted_loss(fresh, *padded([row]))[0] for row in drills]
    print(f"{name}: {sum(nats).item() / 20:.1f}")

# %% tags=["hide-input"]
# Figure: where two planted heads look, token by token, on a sentence said
# twice. In layer 0 all look at the token before: a line beside the diagonal.
# In layer 1 the second sentence looks at the first, one place further on.
from gptoss.attention.rope import apply_rope, rope_tables
from gptoss.attention.sinks import softmax_with_sink


def looks(layer: int, tokens: Tensor) -> Tensor:
    """Where head 0 of a layer of `fresh` looks: (T, T) probabilities."""
    block, seen, C = fresh.layers[layer], [], fresh.config.head_dim
    hook = block.self_attn.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]))
    fresh(tokens)
    hook.remove()
    tables = rope_tables(torch.arange(tokens.shape[1])[None],
                         *rope_parameters(fresh.config), torch.float32)
    q, k = (apply_rope(project(seen[0])[:, :, None, :C], *tables)[0, :, 0]
            for project in (block.self_attn.q_proj, block.self_attn.k_proj))
    scores = (q @ k.T / C ** 0.5).masked_fill(
        ~torch.ones(len(q), len(q)).tril().bool(), float("-inf"))
    return softmax_with_sink(scores[None, None],
                             block.self_attn.sinks[:1])[0, 0]


text = "Zorali lives in Bomak. Zorali lives in Bomak."
ids = vocabulary.encode(text)
pieces = [vocabulary.decode([token]) for token in ids]
fig, axes = plt.subplots(1, 2, figsize=(8, 4), sharey=True)
with torch.inference_mode():
    for ax, layer, title in ((axes[0], 0, "Layer 0: one back"),
                             (axes[1], 1, "Layer 1: what came after")):
        ax.imshow(looks(layer, torch.tensor([ids])), vmin=0, vmax=1,
                  cmap="Blues")
        ax.set(title=title, xlabel="looked at", xticks=range(len(ids)),
               yticks=range(len(ids)))
        ax.set_xticklabels(pieces, rotation=90, fontsize=7)
        ax.set_yticklabels(pieces, fontsize=7)
        ax.grid(False)
axes[0].set_ylabel("looking")
plt.show()

# %% [markdown]
# Before the first step. Left, by the clock: each token looks at the one
# before it. Right, by content: in the second sentence each token looks at the
# one that *followed* its double. In the first sentence nothing matches, and
# where it looks is chance.

# %% [markdown]
# ### Weights that live on the grid

# %% tags=["export:training/train"]
from torch.nn.utils import parametrize

from gptoss.weights.encoding import encode
from gptoss.weights.mxfp4 import decode


class OnGrid(nn.Module):
    """Replace a weight by its MXFP4 rounding; gradients pass unchanged."""

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            grid = decode(*encode(weight), weight.dtype)
        return weight + (grid - weight).detach()


def put_on_grid(model: GptOss) -> None:
    """From now on every expert computes with four-bit weights."""
    for layer in model.layers:
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(
                layer.mlp.experts, name, OnGrid())

# %%
weight = torch.randn(4, 64, requires_grad=True)
rounded = OnGrid()(weight)
(rounded * torch.arange(64.0)).sum().backward()
again = decode(*encode(rounded.detach()), torch.float32)
print(torch.equal(again, rounded.detach()))
print(torch.equal(weight.grad, torch.arange(64.0).expand(4, 64)))

# %% [markdown]
# ### The training loop
#
# The run has three stretches. In the first the learning rate stays high and
# the model learns where to look; by its end stories, tools and far facts are
# mostly right, and sums are not: the columns are found, but a digit in them
# comes out beside the right one. So in the second nearly half of the lessons
# are sums. A lesson holds three columns among two hundred tokens, though. In
# the third, 15 % of the rows are tables: twenty-odd columns in a row of the
# same length. From the middle of the second on, the experts are on the grid.

# %% tags=["export:training/train"]
import math
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run; the same recipe and seed on
    the same machine give the same file.

    `tokens`: of a batch, with its padding. `easy`: share of the steps with
    short rows and many plain stories. `change`: share after which the mix
    of lessons is `SECOND`; `last`: after which it is `THIRD` and `table` of
    the rows are digits alone. At both the optimiser begins afresh, and the
    rate rises to the next of `rates`. `grid_from`: share after which the
    experts compute with four bits.
    """

    seed: int = 0
    steps: int = 16000
    tokens: int = 1250
    rates: tuple[float, ...] = (2e-3, 1.2e-3, 8e-4)
    warmup: int = 100
    weight_decay: float = 0.05
    balance: float = 0.01
    easy: float = 0.1079
    change: float = 15 / 32
    grid_from: float = 19 / 32
    last: float = 23 / 32
    table: float = 0.15
    clip: float = 1.0

    def at(self, share: float) -> int:
        """The step at which `share` of the run is over."""
        return round(share * self.steps)

    @property
    def begins(self) -> tuple[int, int, int]:
        """The steps at which the three stretches begin."""
        return 0, self.at(self.change), self.at(self.last)

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine towards a hundredth, three times;
        the first is cut short by the change."""
        part = sum(step >= begin for begin in self.begins[1:])
        begin, peak = self.begins[part], self.rates[part]
        end = self.begins[2] if part < 2 else self.steps
        warmup = self.warmup // 2 if part else self.warmup
        step -= begin
        if step < warmup:
            return peak * (step + 1) / warmup
        done = (step - warmup) / max(1, end - begin - warmup)
        floor = 0.01
        cosine = (1 + math.cos(math.pi * done)) / 2
        return peak * (floor + (1 - floor) * cosine)

# %% tags=["export:training/train"]
def optimizer_for(model: GptOss, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; biases, sinks and norms are not decayed towards zero."""
    vectors = ("bias", "sinks", "norm.weight")
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (free if name.endswith(vectors) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay},
              {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.rates[0],
                             betas=(0.9, 0.98))

# %% tags=["export:training/train"]
def train(model: GptOss, source: Iterator[tuple[Tensor, Tensor]],
          recipe: Recipe,
          report: Callable[[dict], None] = lambda entry: None) -> None:
    """Train in place; `report` gets one dict per step: `loss`, the
    weighted mean, and `own`, of the tokens to be written, in nats."""
    tap = RouterTap(model)
    k, begin = model.config.num_experts_per_tok, time.perf_counter()
    for step in range(recipe.steps):
        batch, extra = next(source), {}
        if step in recipe.begins:
            optimizer = optimizer_for(model, recipe)
        if step == recipe.at(recipe.grid_from):
            with torch.no_grad():
                extra = {"unrounded": weighted_loss(model, *batch)[0].item()}
            put_on_grid(model)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        tap.take()  # what was looked at between two steps
        loss, own = weighted_loss(model, *batch)
        real = that_matter(batch[1][:, 1:]).flatten()
        routed = [load_balance(each.flatten(0, -2)[real], k)
                  for each in tap.take()]
        balance = torch.stack(routed).mean()
        (loss + recipe.balance * balance).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report({"step": step, "loss": loss.item(), "own": own.item(),
                "balance": balance.item(), "norm": norm.item(),
                "seconds": time.perf_counter() - begin} | extra)
    tap.close()

# %% [markdown]
# Sixty steps of a very small model on stories, once with the balance loss and
# once without, show what it does.

# %%
from dataclasses import replace

small = replace(pocket_config(1024), num_hidden_layers=2, layer_types=None,
                hidden_size=32, intermediate_size=32, head_dim=8)
told = story_stream(0)
some = [padded([story_row(vocabulary, next(told))]) for _ in range(60)]
history = {}
for balance in (0.0, 0.05):
    model = GptOss(small, dtype=torch.float32, packed=False)
    start_at_random(model, seed=0)
    history[balance] = entries = []
    train(model, iter(some), Recipe(steps=60, warmup=3, balance=balance),
          entries.append)
print([entry["step"] for entry in entries if "unrounded" in entry])
assert entries[-1]["loss"] < entries[0]["loss"] - 1

# %% tags=["hide-input"]
# Figure: the balance loss over the steps, 1 being even shares. Both curves
# rise at first; with the push one turns and falls again, without it the other
# stays high.
fig, ax = plt.subplots(figsize=(6, 2.6))
for balance, entries in history.items():
    ax.plot([entry["balance"] for entry in entries],
            label=f"weight {balance:g}")
ax.axhline(1, color="black", linestyle="--", linewidth=1)
ax.set(xlabel="step", ylabel="balance loss",
       title="Without its push the routers stay uneven")
ax.legend()
plt.show()

# %% [markdown]
# ### From parameters to a file
#
# Training holds every weight in fp32, experts as $w$ and not as $Q(w)$. The
# file gets the released layout: $Q(w)$ in four bits, the rest in bf16.

# %% tags=["export:training/pocket"]
def released_tensors(model: GptOss) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as the released layout stores them: experts in
    MXFP4 blocks and scales, everything else in bf16."""
    for name, value in plain_state(model).items():
        value = value.detach()
        if name.endswith(("gate_up_proj", "down_proj")):  # (E, in, out)
            blocks, scales = encode(value.transpose(1, 2).float())
            yield f"{name}_blocks", blocks
            yield f"{name}_scales", scales
        else:
            yield name, value.to(torch.bfloat16)


def plain_state(model: GptOss) -> dict[str, Tensor]:
    """The state dict under its own names, parametrised or not."""
    state = model.state_dict()
    return {name.replace("parametrizations.", "").replace(".original", ""):
            value for name, value in state.items()}

# %%
tensors = dict(released_tensors(model))
for name in ("model.layers.0.mlp.experts.down_proj_blocks",
             "model.layers.0.mlp.experts.down_proj_scales",
             "model.layers.0.self_attn.sinks", "lm_head.weight"):
    print(name, tuple(tensors[name].shape), tensors[name].dtype)

# %% [markdown]
# ### Examination by programs
#
# The program that made a question can tell whether an answer is right. The
# examiner plays the user and the tool: it runs the model until it stops,
# reads the tokens with chapter 11's parser, hands back the tool's result if
# the call was right, and judges the final text.

# %% tags=["export:training/exams"]
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from gptoss.text.sampling import Sampler
from gptoss.text.generate import generate_batch
from gptoss.text.harmony import CHANNELS, EFFORTS, Message, render
from gptoss.text.parser import StreamParser
from gptoss.text.tokenizer import Tokenizer

from gptoss.model.transformer import GptOss

from gptoss.chat.turn import STOPS


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

# %% tags=["export:training/exams"]
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


EXAM, MILESTONE = ("exam", 20_000), ("milestone", 10_000)   # shelf, seed


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

# %% tags=["export:training/exams"]
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

# %% [markdown]
# The examiner can be examined too: a model that has learnt nothing passes
# nothing, and every reference answer passes.

# %%
import itertools

untaught = GptOss(small, dtype=torch.float32, packed=False)
empty = examine(untaught, vocabulary, "sum", count=4, most=30)
print("untaught:", grade(empty))
for kind in ("story", "sum", "tool", "far", "talk"):
    for one in itertools.islice(lesson_stream(2, mix={kind: 1}), 20):
        assert right_answer(one.messages[-1].content, one)

# %% [markdown]
# ### One command
#
# All of it in order: tokenizer, starting weights, planted heads, the three
# stretches with a short examination at each thousandth step, the files, and
# a long examination of the files.

# %% tags=["export:training/pocket"]
import json
from importlib.resources import files
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from gptoss.weights.write import write_checkpoint




MILESTONES = ("story", "sum", "tool", "far")
EXAMINED = (*MILESTONES, "recall", "after", "unknown", "telling", "talk",
            "beyond", "missing", "date")


def make_pocket(out: Path, recipe: Recipe,
                report: Callable[[dict], None] = lambda entry: None) -> None:
    """Train the shipped checkpoint and write it to the new folder `out`.

    Writes model.safetensors, config.json, generation_config.json,
    tokenizer.json, chat_template.jinja and train_log.json: the recipe,
    every eighth step, what the model could do at every thousandth, and the
    last examination.
    """
    config, log, marks = pocket_config(), [], []
    vocabulary = train_tokenizer(sample_texts(6000), config.vocab_size)
    tokenizer = Tokenizer(vocabulary)
    model = GptOss(config, dtype=torch.float32, packed=False)
    start_at_random(model, recipe.seed)
    plant_copying(model, recipe.seed)

    def watch(entry: dict) -> None:
        log.append(entry)
        report(entry)
        if (entry["step"] + 1) % 1000 == 0:
            marks.append(milestone(model, tokenizer, entry["step"] + 1))

    train(model, schooling(tokenizer, recipe), recipe, watch)
    write_pocket(out, model, vocabulary, recipe, log, marks)


def schooling(tokenizer: Tokenizer, recipe: Recipe
              ) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a run: easy ones, all, those of `SECOND`, and at last
    those of `THIRD` with columns of digits."""
    seed, tokens = recipe.seed + 1, recipe.tokens
    easy = int(recipe.easy * recipe.steps) * tokens // 230  # 230: such a row
    first = batches(rows(tokenizer, seed, easy), seed, tokens)
    second = batches(rows(tokenizer, seed + 1, 0, SECOND), seed + 1, tokens)
    third = batches(rows(tokenizer, seed + 2, 0, THIRD, recipe.table),
                    seed + 2, tokens)
    _, change, last = recipe.begins
    yield from islice(first, change)
    yield from islice(second, last - change)
    yield from third


def milestone(model: GptOss, tokenizer: Tokenizer, step: int) -> dict:
    """Shares of 40 questions right, by kind, and the step. They are held
    out too, and others than the exam's: what chooses a recipe has been
    looked at, and can examine it no more."""
    held, seed = MILESTONE
    card = report_card(model, tokenizer, MILESTONES, 40, seed, held)
    return {"step": step} | {kind: card[kind]["right"] for kind in card}

# %% tags=["export:training/pocket"]
def write_pocket(out: Path, model: GptOss, vocabulary: str, recipe: Recipe,
                 log: list[dict], marks: list[dict], count: int = 200
                 ) -> None:
    """The six files of a trained model, into the new folder `out`; the
    last examination, `count` questions of a kind, is of these files. They
    are written beside `out` and moved there when all are whole."""
    out = Path(out)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        draft = Path(beside) / out.name
        write_checkpoint(draft, model.config, released_tensors(model))
        (draft / "tokenizer.json").write_text(vocabulary, "utf-8")
        template = files("gptoss") / "pocket" / "chat_template.jinja"
        (draft / "chat_template.jinja").write_bytes(template.read_bytes())
        write_json(draft / "generation_config.json",
                   generation_config(model.config), 2)
        written = GptOss.from_pretrained(draft, dtype=torch.float32)
        card = report_card(written, Tokenizer(vocabulary), EXAMINED, count)
        write_json(draft / "train_log.json", {
            "recipe": vars(recipe), "marks": marks, "exam": card,
            "log": thinned(log)})
        draft.rename(out)


def generation_config(config: GptOssConfig) -> dict:
    """What generation_config.json says of a released model."""
    special = control_ids(config.vocab_size)
    stop = ("return", "endoftext", "call")
    return {"bos_token_id": special["startoftext"], "do_sample": True,
            "eos_token_id": [special[name] for name in stop],
            "pad_token_id": special["endoftext"]}


def thinned(log: list[dict], every: int = 8) -> list[dict]:
    """Each eighth entry, the switch to the grid and the last; 4 digits."""
    kept = [entry for n, entry in enumerate(log)
            if n % every == 0 or "unrounded" in entry or n == len(log) - 1]
    return [{key: round(value, 4) for key, value in entry.items()}
            for entry in kept]


def write_json(path: Path, value: object, indent: int | None = None
               ) -> None:
    path.write_text(json.dumps(value, indent=indent) + "\n")

# %% [markdown]
# ## It holds
#
# The checker and the generator of stories are each other's inverse, and one
# fixed word replaced anywhere is always noticed, provided that it occurs
# twice.

# %%
rng = random.Random(7)
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
share = sum(held_out(draw_cast(rng)) for _ in range(3000)) / 3000
print(f"held out: {share:.2f} of all casts")

# %% [markdown]
# The column method is right for every pair of numbers up to three digits
# that a stride of 7 and 11 reaches.

# %%
pairs = [(a, b) for a in range(0, 1000, 7) for b in range(0, 1000, 11)]
for a, b in pairs:
    digits = [line.rpartition("=")[2] for line in columns(a, b, "+")]
    assert int("".join([digits[-1], *(d[-1] for d in digits[-2::-1])])) \
        == a + b
    if a >= b:
        digits = [line.rpartition("=")[2] for line in columns(a, b, "-")]
        assert int("".join(digits[::-1])) == a - b
print(f"{len(pairs):,} pairs")

# %% [markdown]
# Now the shipped file, read as any gpt-oss is, in the released layout, with
# its experts packed: what the long examination in the log says, and a few
# held-out questions of four kinds asked here, greedily.

# %%
shipped, results = saved["exam"], {}
for kind, count in (("story", 3), ("sum", 6), ("tool", 6), ("far", 6)):
    results[kind] = examine(pocket, reader, kind, count, seed=3)
    low, high = shipped[kind]["between"]
    print(f"{kind:>5}: {shipped[kind]['right']:.1%} in the log, between "
          f"{low:.0%} and {high:.0%}")
    assert grade(results[kind]) > 0.5

# %% tags=["hide-input"]
# Figure: one bar for each kind of question, with the share that the shipped
# file gets right and its error bar, beside it the percentage and the count.
rules = {"story": "story: coherent, and about what was asked",
         "talk": "greetings and the like",
         "beyond": "beyond its world: says so",
         "sum": "sum or difference: exact",
         "far": "fact from over two windows before",
         "recall": "fact from a few turns before",
         "after": "sum, right after a fact was asked for",
         "missing": "no tool for it: says so",
         "tool": "right tool, right JSON, result used"}
fig, ax = plt.subplots(figsize=(7, 2.8))
for n, kind in enumerate(rules):
    right, (low, high) = shipped[kind]["right"], shipped[kind]["between"]
    ax.barh(-n, right, color="C0")
    ax.plot((low, high), (-n, -n), color="black", linewidth=1)
    ax.text(1.01, -n, f"{right:.1%} of {shipped[kind]['count']}",
            va="center", fontsize=8)
ax.set(xlim=(0, 1), xlabel="share right", yticks=range(0, -len(rules), -1),
       yticklabels=list(rules.values()),
       title="The shipped file, greedy, held out")
ax.grid(False)
plt.show()

# %% [markdown]
# The figure is the long examination; the thin lines are its error bars, 95 %
# each: 200 questions are few enough that another 200 might have given a point
# more or less. "Held out" is meant strictly, and checked by reading: a cast,
# a sum, a question for a tool or a fact that lies on the exam's shelf occurs
# in no turn of anything that trained the model. (Small talk, the date and
# what is beyond the model have nothing to hold out; there only the
# conversation is new.)
#
# Effort changes how long it thinks. The mean number of tokens of analysis for
# a sum at low, medium and high, from the log:

# %%
means = [shipped["sum"][effort] for effort in ("low", "medium", "high")]
assert means == sorted(means)
print(means)

# %% [markdown]
# One of each kind, as it is written:

# %% tags=["nbval-ignore-output"]
for kind in ("sum", "tool", "far", "story"):
    mark = results[kind][0]
    print(f"USER  {mark.lesson.messages[mark.lesson.turn - 1].content}")
    for channel, text in mark.said:
        print(f"      {channel}: {text}")

# %% [markdown]
# The file is on the grid: encoding what it decodes to gives the same
# values, and the model computes the same with packed and with dense experts.

# %%
dense = GptOss.from_pretrained(POCKET, dtype=torch.float32, packed=False)
for layer in dense.layers:
    for weight in (layer.mlp.experts.gate_up_proj,
                   layer.mlp.experts.down_proj):
        again = decode(*encode(weight), torch.float32)
        assert torch.equal(again, weight)
prompt = torch.tensor([at_once[0]])
with torch.inference_mode():
    gap = (dense(prompt) - pocket(prompt)).abs().max().item()
print("packed = dense within 1e-4:", gap < 1e-4)

# %% [markdown]
# And every expert works: the share of assignments per layer and expert, over
# the prompts of twenty sums and twenty stories.

# %% tags=["hide-input"]
# Figure: a table of shares of assignments, four layers by eight experts,
# coloured by size: uneven, but no cell is empty.
told = story_stream(seed=5, hold_out=True)
texts = at_once[:20] + [reader.encode(next(told)) for _ in range(20)]
experts = pocket.config.num_local_experts
tap, shares = RouterTap(pocket), torch.zeros(pocket.config.num_hidden_layers,
                                             experts)
with torch.inference_mode():
    for row in texts:
        pocket(torch.tensor([row]))
        for n, logits in enumerate(tap.take()):
            shares[n] += expert_load(top_logits(logits, 2)[1], experts)
tap.close()
shares /= shares.sum(1, keepdim=True)
fig, ax = plt.subplots(figsize=(7, 2.4))
image = ax.imshow(shares, vmin=0, vmax=0.5, aspect="auto")
for n in range(shares.shape[0]):
    for e in range(experts):
        ax.text(e, n, f"{shares[n, e]:.2f}", ha="center", va="center",
                color="white" if shares[n, e] < 0.3 else "black", fontsize=8)
ax.set(xlabel="expert", ylabel="layer", xticks=range(experts),
       yticks=range(shares.shape[0]),
       title=f"Share of assignments (even = {1 / experts:.3f})")
ax.grid(False)
fig.colorbar(image, ax=ax)
plt.show()
print("every expert is used in every layer:", bool((shares > 0.01).all()))

# %% [markdown]
# ### What it cannot do
#
# The examination says it in numbers: what each kind got, of 200, and between
# which shares it may well lie.

# %%
for kind, card in sorted(shipped.items(), key=lambda kv: kv[1]["right"]):
    low, high = card["between"]
    print(f"{kind:8}{card['count'] - round(card['right'] * card['count']):4} "
          f"wrong, right {card['right']:6.1%}  ({low:.0%} to {high:.0%})")

# %% [markdown]
# Two goals were set before the run: 97 % of sums and 95 % of far facts and
# tools. Sums stayed one question below theirs, though the last two short
# examinations on the way had found no wrong one in 40: that is what an error
# bar is for, and why the exam must not choose the recipe.
#
# The weakest is to notice that a tool is missing. An earlier file of this
# chapter got 93 % there and 97 % of the facts from a few turns before; but its
# questions had been practised, with the same city or the same word, when the
# tool was there. These ones were not. Looked at one by one, twelve of fourteen
# errors are of one kind: at medium effort the model begins as if it had the
# tool ("Asked for a die with 72 sides."), finds none, says "No tool" and runs
# on into "and no sum is needed", with which it thinks before small talk. It is
# the difference between an exam and a rehearsal, and a lead for the next run:
# where two thoughts begin alike, the model takes the one it has read more.
#
# It also knows nothing outside of its lessons. Asked in other words, or for
# something that only looks like a lesson, it answers what it would have
# answered to the nearest one:

# %% tags=["nbval-ignore-output"]
strange = ("Please add 12 and 30 and 7.", "Tell me a story about a dragon.",
           "What was my question?", "What is the weather on Mars?")
prompts = [render(reader, [system_message("medium", "2026-01-31"),
                           Message("user", text)]) for text in strange]
said = generate_batch(pocket, prompts, max_new_tokens=60, stop=stop,
                      sampler=Sampler(temperature=0.0))
for text, ids in zip(strange, said, strict=True):
    print(f"USER  {text}\n      {reader.decode(ids, skip_special=True)}")

# %% [markdown]
# ## Against the others
#
# Transformers has the same auxiliary loss, `load_balancing_loss_func` in
# `models/gpt_oss/modeling_gpt_oss.py`. It counts each of the K choices as a
# full token, so for one layer its value is K times ours. Of several layers it
# averages $f_e$ and $p_e$ first and multiplies then, so an expert that is
# overloaded in one layer may make up for being idle in another.

# %%
import os

os.environ["HF_HUB_OFFLINE"] = "1"
from transformers.models.gpt_oss import modeling_gpt_oss as hf  # noqa: E402

logits = torch.randn(512, 8)
theirs = hf.load_balancing_loss_func((logits,), num_experts=8, top_k=2)
ours = load_balance(logits, 2)
print(f"theirs / ours = {theirs / ours:.3f}")
assert torch.isclose(theirs, 2 * ours)

# %% [markdown]
# Elsewhere the way back to four bits is missing: transformers can read
# MXFP4 and fine-tune after dequantising, but not return to it
# (transformers#39969, gpt-oss#108). Here the return trip is `encode`, and
# because training ended on the grid it changes no value.
#
# ## In the 20b and the 120b
#
# The same loop fits the real models only on paper. AdamW in full precision
# keeps 16 bytes per parameter: the weight, its gradient and two moments.

# %%
from gptoss.weights.sizes import active_parameters, total_parameters

for name, config in (("pocket", pocket.config),
                     ("20b", GptOssConfig.gpt_oss_20b()),
                     ("120b", GptOssConfig.gpt_oss_120b())):
    total, active = total_parameters(config), active_parameters(config)
    print(f"{name:>6}: {total:>15,} parameters, "
          f"{16 * total / 1e9:>8,.3g} GB to train, "
          f"{6 * active / 1e9:>7,.3g} GFLOP a token")

# %% [markdown]
# The lessons are another matter. A conversation with tools for the 20b is
# rendered by the same functions as one for the pocket model, and `Chat` of
# chapter 12 cannot tell the two apart.
#
# ## Cost
#
# A token of training costs about $6 P$ floating-point operations, $P$ the
# active parameters: two for each weight forwards, four backwards. Attention
# over T keys has no weights and comes on top, $4 H C$ for each key and layer
# forwards and twice that backwards:
#
# $$ \text{FLOPs} = B T \, \Big( 6 P + 12 \, L H C \, T \Big).
#    $$ (train-flops)
#
# Sliding layers count in full, because the plain implementation computes
# all T keys and masks them. PyTorch's counter sees the products with
# weights, the first term; attention is an operator of our own, which it does
# not look into.

# %%
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

B, T = 2, 256
config = pocket_config()
model = GptOss(config, dtype=torch.float32, packed=False)
tokens = torch.randint(0, 1000, (B, T + 1))
with FlopCounterMode(display=False) as counter:
    weighted_loss(model, tokens, torch.ones(B, T + 1))[0].backward()
attention = 12 * (config.num_hidden_layers * config.num_attention_heads
                  * config.head_dim * T)
weights = 6 * active_parameters(config)
ratio = counter.get_total_flops() / (B * T * weights)
print(f"counted / first term = {ratio:.2f}")
print(f"attention adds {attention / weights:.0%} at T = {T}")
assert 0.95 < ratio < 1.05

# %% [markdown]
# ## Takeaways
#
# - A procedural corpus gives what no collected one has: a program that marks
#   every answer, and a strict line between what was seen and what was not.
#   The line is only as strict as the check that reads every text.
# - Without a balance loss routers collapse, since whoever is chosen learns;
#   $E \sum_e f_e p_e$ is 1 when nobody is preferred.
# - A circuit that is understood can be given instead of found: heads planted
#   by hand copy before the first step.
# - Train the last part on the MXFP4 grid and the four-bit file *is* the
#   model that was trained and examined, not a copy near it.
#
# ## Exercises
#
# ### Exercise 1
#
# How near do plain stories come to their floor {eq}`train-floor`? Measure
# the shipped model on held-out ones.

# %% tags=["hide-cell"]
told = story_stream(seed=9, hold_out=True)
some = [story_row(reader, next(told)) for _ in range(30)]
with torch.inference_mode():
    nats = [weighted_loss(pocket, *padded([row]))[0] * (len(row[0]) - 1)
            for row in some]
ratio = sum(nats).item() / 30 / story_entropy()
print("within a tenth of the floor:", 0.9 < ratio < 1.1)
assert 0.9 < ratio < 1.1

# %% [markdown]
# ### Exercise 2
#
# {eq}`train-balance` is 1 when nobody is preferred. Is that its minimum? Find
# router logits for E = 2, K = 1 that give less, and say why this does no
# harm.

# %% tags=["hide-cell"]
# Two tokens in three choose expert 0, but only just; the third is sure of
# expert 1. So the expert that is chosen more is liked less.
logits = torch.tensor([[0.02, 0.0]] * 200 + [[0.0, 5.0]] * 100)
value = load_balance(logits, 1).item()
print(f"{value:.2f}")
assert value < 0.95
# The gradient sees f as constants: it goes on pushing p away from expert 0,
# and tokens that chose it "only just" change over.

# %% [markdown]
# ### Exercise 3
#
# What would training do if `OnGrid` returned the rounded weight itself? And
# how many times the bytes would the experts take in bf16?

# %% tags=["hide-cell"]
weight = torch.randn(4, 64, requires_grad=True)
rounded = decode(*encode(weight.detach()), torch.float32)
assert not rounded.requires_grad  # experts would stay, the rest would learn
experts = sum(p.numel() for name, p in dense.named_parameters()
              if name.endswith(("gate_up_proj", "down_proj")))
packed_bytes = experts * 17 // 32
print(f"{2 * experts / packed_bytes:.2f} times the bytes of the experts")
assert packed_bytes == sum(
    b.numel() for name, b in pocket.named_buffers()
    if name.endswith(("_blocks", "_scales")))

# %% [markdown]
# ### Exercise 4
#
# In the far lessons the fact lies more than two windows of 64 tokens back.
# Show that the sliding layers alone cannot carry it: how far does information
# travel through two of them? (Chapter 6.) Then measure the distance in the
# lessons themselves.

# %% tags=["hide-cell"]
window = pocket.config.sliding_window
sliding = pocket.config.layer_types.count("sliding_attention")
reach = sliding * (window - 1)
source, distances = lesson_stream(5, mix={"far": 1}), []
for _ in range(100):
    lesson = next(source)
    told = next(n for n, m in enumerate(lesson.messages)
                if m.content in ("I will remember that.", "Good to know.",
                                 "I will not forget it."))
    between = lesson.messages[told:lesson.turn]
    distances.append(len(render(reader, between, drop="none")))
print(f"reach {reach}, nearest far fact {min(distances)} tokens back")
beyond = sum(d > 2 * window for d in distances)
print(f"beyond two windows: {beyond} of 100")
assert reach < 2 * window and beyond >= 95

# %% [markdown]
# ### Exercise 5
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
# ## Sources
#
# - Load balancing: {cite}`switch2021`, section 2.2, after {cite}`moe2017`;
#   transformers `modeling_gpt_oss.py`, `load_balancing_loss_func`.
# - Induction heads: {cite}`induction2022`; weights that begin with what
#   attention is known to become: {cite}`mimetic2023`.
# - AdamW: {cite}`adamw2019`. Byte-level BPE: {cite}`bpe2016`.
# - MXFP4: {cite}`ocpmx2023`. Configuration, tokenizer layout and harmony:
#   {cite}`gptoss2025`.
