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

# %% [markdown]
# ## Question
#
# How small can a gpt-oss be and still keep a story straight?
#
# The checkpoint in `gptoss/pocket/` has a ten-thousandth of the 20b's
# parameters. It was trained on two ordinary processor cores in less time
# than a lunch takes, and it tells stories about heroes, colours and objects
# that it never saw together, without once turning a red kite into a blue
# boat. Everything the big models have is in it: alternating sliding and full
# layers, sinks, YaRN, top-k routing, a clamped SwiGLU, experts in MXFP4.
#
# This chapter writes the text it learns from, trains it, puts its experts
# on the four-bit grid and lets a program mark the result. The whole training
# is one command, `python -m gptoss train FOLDER --seed 0`.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt

import gptoss.model

plt.style.use("_static/book.mplstyle")
POCKET = Path(gptoss.model.__file__).parent / "pocket"

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
saved = json.loads((POCKET / "train_log.json").read_text())
log, recipe = saved["log"], saved["recipe"]
floor = saved["floor"]
steps = [entry["step"] for entry in log]
switch = int(recipe["grid_from"] * recipe["steps"])
fig, axes = plt.subplots(1, 2, width_ratios=(3, 2))
axes[0].plot(steps, [entry["loss"] for entry in log], label="training loss")
axes[0].axhline(floor, color="black", linestyle="--", linewidth=1,
                label="entropy of the generator")
axes[0].axvline(switch, color="C1", linestyle=":", label="experts on grid")
axes[0].set(xlabel="step", ylabel="nats per token", yscale="log",
            title="Loss falls to what nobody can know")
axes[0].set_yticks((0.3, 0.5, 1, 2, 5), ("0.3", "0.5", "1", "2", "5"))
axes[0].minorticks_off()
axes[0].legend(frameon=True, framealpha=1, edgecolor="none")
axes[1].plot(steps, [entry["balance"] for entry in log], color="C2")
axes[1].axhline(1, color="black", linestyle="--", linewidth=1)
axes[1].set(xlabel="step", ylabel="load-balance loss",
            title="1 = every expert works equally")
plt.show()
print(f"{log[-1]['seconds'] / 60:.0f} minutes on two cores, "
      f"{recipe['steps'] * recipe['batch']:,} rows of stories")

# %% [markdown]
# The left panel is the whole run, from the saved log. The dashed line is not
# fitted: the stories come from a program, so the smallest loss that any model
# can reach is known in advance. The dotted line is where the experts'
# weights move onto the MXFP4 grid for good.
#
# The curve falls in steps. Each is a kind of mention that the model has
# learnt to copy, and copying comes suddenly. By the loss on repeated words,
# at step 500 of this run the object was copied and the colour still guessed;
# at step 1000 the colour was copied, while the place and the hero's kind were
# guessed as if never named; at step 1500 both were certain.

# %% [markdown]
# ## The naive version
#
# Who marks a story? The loss does not: a model that swaps a colour once in
# two hundred tokens loses next to nothing by it. The obvious marker looks
# for the words that should be there.

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
# Both pass, since every word occurs somewhere. Lists of forbidden words fare
# no better: Tom and blue are fine words in another story. What has to be
# checked is that each *mention* agrees with the first, and that needs the
# plot. The way out is to write the generator so that it can be run backwards.
#
# A second naive plan concerns the weights: train in full precision and round
# the experts to four bits at the end. The log measured, at the switch, one
# batch with full weights and the same batch with rounded ones.

# %%
at_switch = next(entry for entry in log if "unrounded" in entry)
cost = at_switch["loss"] - at_switch["unrounded"]
print(f"rounding at once: {1000 * cost:+.1f} thousandths of a nat per token")

# %% [markdown]
# For this model that is less than batches differ among themselves. The last
# part of the training computes with rounded weights all the same: then the
# model that was trained, the one that is examined and the one in the file are
# the same numbers, and there is nothing left to hope for.

# %% [markdown]
# ## Derivation
#
# **The floor.** A story is made by independent uniform choices: a cast
# (hero, friend, their kinds, colour, thing, home, place), one template per
# beat, and one word for each free slot of the template. If choice $i$ has
# $n_i$ equally likely outcomes, a story has probability
# $\prod_i 1/n_i$, and no model can predict it with fewer than
#
# $$ H = \sum_{\text{fixed slots}} \log n
#      + \sum_{\text{beats}} \Big( \log m + \frac1m \sum_{j=1}^{m}
#        \sum_{\text{free slots of } j} \log n \Big) $$ (train-floor)
#
# nats on average, where $m$ is the number of templates of a beat. Divided by
# the mean number of tokens of a story this is the dashed line. (A row's first
# token is given, not predicted, so the true floor lies a hair lower.)
#
# **The loss.** With logits $z_t \in \mathbb{R}^V$ at position $t$ and the
# next token $y_t$, the cross-entropy of a row of $T$ tokens is
#
# $$ \mathcal{L}_{\text{text}} = \frac1T \sum_t
#    \Big( \log \sum_v e^{z_{tv}} - z_{t y_t} \Big). $$ (train-ce)
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

# %% [markdown]
# ## Code
#
# ### The words of a small world

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
# the story mentions them. Slots with one are *free*. All words begin with a
# consonant where an article stands before them, so the grammar needs no
# exception.

# %%
casts = math.prod(len(WORDS[slot]) for slot in CAST_SLOTS)
print(f"{casts:,} casts")

# %% [markdown]
# ### A plot is a list of beats

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
# them may stay silent. The order is what makes a story: the object must be
# owned before it can be lost, and lost before it can be found.

# %%
ways = 1
for _, lines in BEATS:
    ways *= len(lines)
print(f"{len(BEATS)} beats, {ways:.2g} plots, before any word is drawn")

# %% [markdown]
# ### Telling

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


def held_out(cast: dict[str, str]) -> bool:
    """Whether a cast is kept from training: one in ten, by a checksum of
    hero, colour and thing, so that the pair was never seen together."""
    key = f"{cast['hero']} {cast['colour']} {cast['thing']}"
    return zlib.crc32(key.encode()) % 10 == 0


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

# %% [markdown]
# ### A tokenizer of a thousand tokens

# %% tags=["export"]
from gptoss.harmony import (
    ALPHABET,
    NAMED,
    PATTERN,
    RANKS,
    Tokenizer,
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


# %%
texts = [tell(random.Random(n)) for n in range(500)]
vocabulary = Tokenizer(train_tokenizer(texts, 1024))
tokens = vocabulary.encode(texts[0])
print(len(texts[0].encode()), "bytes,", len(tokens), "tokens")
print([vocabulary.decode([t]) for t in tokens[:12]])
assert all(vocabulary.decode(vocabulary.encode(t)) == t for t in texts)

# %% [markdown]
# ### Rows of stories

# %% tags=["export"]
from collections.abc import Iterator

import torch
from torch import Tensor

NOTHING = -100  # what cross_entropy ignores


def stories(seed: int, hold_out: bool = False) -> Iterator[str]:
    """Endless stories; of held-out casts only, or of all the others."""
    rng = random.Random(seed)
    while True:
        cast = draw_cast(rng)
        if held_out(cast) == hold_out:
            yield tell(rng, cast)


def story_rows(tokenizer: Tokenizer, seed: int, batch: int,
               length: int) -> Iterator[Tensor]:
    """Endless (batch, length + 1) int64 rows of whole stories end to end.

    Each row starts with the first word of a story and each story ends
    with <|endoftext|>; what is left of a row is `NOTHING`.
    """
    source, end = stories(seed), tokenizer.special["<|endoftext|>"]
    story = [*tokenizer.encode(next(source)), end]
    while True:
        rows = torch.full((batch, length + 1), NOTHING)
        for row in rows:
            at = 0
            while at + len(story) <= length + 1:
                row[at:at + len(story)] = torch.tensor(story)
                at += len(story)
                story = [*tokenizer.encode(next(source)), end]
        yield rows


# %%
rows = next(story_rows(vocabulary, seed=0, batch=2, length=256))
filled = (rows[0] != NOTHING).sum()
print(tuple(rows.shape), rows.dtype, int(filled))
print(vocabulary.decode(rows[0, filled - 40:filled].tolist()))

# %% [markdown]
# ### The loss: the next token, and a fair share for every expert

# %% tags=["export"]
import torch.nn.functional as F
from torch import nn

from gptoss.model import GptOss
from gptoss.routing import expert_load, top_logits


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
# ### Weights that live on the grid

# %% tags=["export"]
from torch.nn.utils import parametrize

from gptoss import mxfp4


class OnGrid(nn.Module):
    """Replace a weight by its MXFP4 rounding; gradients pass unchanged."""

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            grid = mxfp4.decode(*mxfp4.encode(weight), weight.dtype)
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
again = mxfp4.decode(*mxfp4.encode(rounded.detach()), torch.float32)
print(torch.equal(again, rounded.detach()))
print(torch.equal(weight.grad, torch.arange(64.0).expand(4, 64)))

# %% [markdown]
# ### The training loop

# %% tags=["export"]
import time
from collections.abc import Callable

from gptoss.config import GptOssConfig


def pocket_config(vocab_size: int = 1024) -> GptOssConfig:
    """The shipped model: every feature of the 20b, a ten-thousandth of it."""
    special = control_ids(vocab_size)
    return GptOssConfig(
        num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2,
        vocab_size=vocab_size, hidden_size=128, intermediate_size=128,
        head_dim=32, num_attention_heads=8, num_key_value_heads=2,
        sliding_window=64, initial_context_length=256, rope_factor=8.0,
        max_position_embeddings=2048,
        eos_token_id=special["return"], pad_token_id=special["endoftext"])


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run; the same recipe and seed on
    the same machine give the same file."""

    seed: int = 0
    steps: int = 2600
    batch: int = 8
    length: int = 224
    learning_rate: float = 3e-3
    warmup: int = 60
    weight_decay: float = 0.05
    balance: float = 0.01
    grid_from: float = 0.7
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a hundredth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        floor = 0.01
        cosine = (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * (floor + (1 - floor) * cosine)


# %% tags=["export"]
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


def optimizer_for(model: GptOss, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; biases, sinks and norms are not decayed towards zero."""
    vectors = ("bias", "sinks", "norm.weight")
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (free if name.endswith(vectors) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay},
              {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate,
                             betas=(0.9, 0.95))


def next_token_loss(model: GptOss, rows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of rows (B, T + 1): each token but the
    first is predicted from those before it, and `NOTHING` never is."""
    logits = model(rows[:, :-1].clamp_min(0))
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def train(model: GptOss, rows: Iterator[Tensor], recipe: Recipe,
          report: Callable[[dict], None] = lambda entry: None) -> None:
    """Train in place; `report` gets one dict per step (loss in nats)."""
    optimizer, tap = optimizer_for(model, recipe), RouterTap(model)
    k, begin = model.config.num_experts_per_tok, time.perf_counter()
    for step in range(recipe.steps):
        row, extra = next(rows), {}
        if step == int(recipe.grid_from * recipe.steps):
            with torch.no_grad():
                extra = {"unrounded": next_token_loss(model, row).item()}
            put_on_grid(model)
            tap.take()
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = next_token_loss(model, row)
        routed = [load_balance(each, k) for each in tap.take()]
        balance = torch.stack(routed).mean()
        (loss + recipe.balance * balance).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report({"step": step, "loss": loss.item(),
                "balance": balance.item(), "norm": norm.item(),
                "seconds": time.perf_counter() - begin} | extra)
    tap.close()


# %% [markdown]
# Thirty steps of a very small model, to see every part at work. The switch
# to the grid comes at step 21.

# %%
from dataclasses import replace

small = replace(pocket_config(), num_hidden_layers=2, layer_types=None,
                hidden_size=32, intermediate_size=32, head_dim=8)
model, entries = GptOss(small, dtype=torch.float32, packed=False), []
start_at_random(model, seed=0)
rows = story_rows(vocabulary, seed=0, batch=1, length=220)
train(model, rows, Recipe(steps=30, warmup=3), entries.append)
print([entry["step"] for entry in entries if "unrounded" in entry])
print(f"{entries[0]['loss']:.1f} -> {entries[-1]['loss']:.1f} nats")
assert entries[-1]["loss"] < entries[0]["loss"] - 1

# %% [markdown]
# ### From parameters to a file

# %% tags=["export"]
def released_tensors(model: GptOss) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as the released layout stores them: experts in
    MXFP4 blocks and scales, everything else in bf16."""
    outside = ("lm_head",)
    for name, value in plain_state(model).items():
        value = value.detach()
        name = name if name.startswith(outside) else f"model.{name}"
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks, scales = mxfp4.encode(value.float())
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
# ### Examination by a program

# %% tags=["export"]
from gptoss.generate import Sampler, generate_batch


@dataclass
class Exam:
    """Outcome of an examination: how many stories were coherent, and for
    the others the first beat that could not be read."""

    stories: int = 0
    coherent: int = 0
    failures: list[Reading] = field(default_factory=list)


@torch.inference_mode()
def examine(model: GptOss, tokenizer: Tokenizer, count: int, seed: int = 1,
            beats: int = 3, sampler: Sampler | None = None) -> Exam:
    """Let the model finish `count` stories whose cast it never saw.

    Each prompt is the first `beats` beats of a held-out story; the rest
    is the model's, greedy unless a sampler is given.
    """
    rng, exam = random.Random(seed), Exam(stories=count)
    casts = (draw_cast(rng) for _ in iter(int, 1))
    chosen = (cast for cast in casts if held_out(cast))
    openings = [tell(rng, next(chosen), beats) for _ in range(count)]
    stop = (tokenizer.special["<|endoftext|>"],)
    prompts = [tokenizer.encode(text) for text in openings]
    answers = generate_batch(
        model, prompts, max_new_tokens=400, stop=stop, seed=seed,
        sampler=sampler or Sampler(temperature=0.0))
    for prompt, answer in zip(prompts, answers, strict=True):
        story = [token for token in prompt + answer if token not in stop]
        reading = read_story(tokenizer.decode(story))
        exam.coherent += reading.coherent
        exam.failures += [] if reading.coherent else [reading]
    return exam


# %% [markdown]
# ### One command

# %% tags=["export"]
import json
from pathlib import Path

from gptoss.checkpoint import write_checkpoint


def make_pocket(out: Path, recipe: Recipe,
                report: Callable[[dict], None] = lambda entry: None) -> None:
    """Train the shipped checkpoint and write it to the new folder `out`.

    Writes model.safetensors, config.json, generation_config.json,
    tokenizer.json and train_log.json (one entry per step).
    """
    source, log = stories(recipe.seed + 1), []
    texts = [next(source) for _ in range(2000)]
    config = pocket_config()
    vocabulary = train_tokenizer(texts, config.vocab_size)
    tokenizer = Tokenizer(vocabulary)
    model = GptOss(config, dtype=torch.float32, packed=False)
    start_at_random(model, recipe.seed)
    rows = story_rows(tokenizer, recipe.seed, recipe.batch, recipe.length)
    train(model, rows, recipe, lambda e: (log.append(e), report(e)))
    write_checkpoint(out, config, released_tensors(model))
    (out / "tokenizer.json").write_text(vocabulary, "utf-8")
    write_json(out / "generation_config.json", generation_config(config), 2)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    write_json(out / "train_log.json", {
        "recipe": vars(recipe), "log": thinned(log),
        "floor": round(story_entropy() / (tokens / len(texts)), 4)})


def generation_config(config: GptOssConfig) -> dict:
    """What generation_config.json says of a released model."""
    special = control_ids(config.vocab_size)
    stop = ("return", "endoftext", "call")
    return {"bos_token_id": special["startoftext"], "do_sample": True,
            "eos_token_id": [special[name] for name in stop],
            "pad_token_id": special["endoftext"]}


def thinned(log: list[dict], every: int = 4) -> list[dict]:
    """Each fourth entry, the switch to the grid and the last; 4 digits."""
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
# The checker and the generator are each other's inverse on a thousand
# stories, and replacing a single fixed word anywhere is always noticed.

# %%
rng = random.Random(7)
for _ in range(300):
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
# Now the shipped file. It is read as any gpt-oss is, in the released layout,
# with its experts packed. Forty openings with casts that training never
# showed; the model finishes each, greedily, and the checker reads the whole.

# %%
pocket = GptOss.from_pretrained(POCKET, dtype=torch.float32)
reader = Tokenizer.from_pretrained(POCKET)
exam = examine(pocket, reader, count=40, seed=3)
print("at least 39 of 40:", exam.coherent >= 39)
assert exam.coherent >= 39, exam.failures

# %% tags=["nbval-ignore-output"]
opening = tell(random.Random(20), beats=3)
prompts = [reader.encode(opening)]
stop = (reader.special["<|endoftext|>"],)
answer = generate_batch(pocket, prompts, max_new_tokens=400, stop=stop,
                        sampler=Sampler(temperature=0.0))[0]
print(opening, "|", reader.decode(answer).replace("<|endoftext|>", ""))

# %% [markdown]
# The bar marks where the prompt ends. The home is named before the bar and
# comes back at the end, more than a hundred tokens later and beyond the
# window of 64: only the full layers can have carried it.
#
# The file is on the grid: encoding what it decodes to gives the same
# values, and the model computes the same with packed and with dense experts.

# %%
dense = GptOss.from_pretrained(POCKET, dtype=torch.float32, packed=False)
for layer in dense.layers:
    for weight in (layer.mlp.experts.gate_up_proj,
                   layer.mlp.experts.down_proj):
        again = mxfp4.decode(*mxfp4.encode(weight), torch.float32)
        assert torch.equal(again, weight)
ids = torch.tensor([reader.encode(texts[0])])
with torch.inference_mode():
    gap = (dense(ids) - pocket(ids)).abs().max().item()
print("packed = dense within 1e-4:", gap < 1e-4)

# %% [markdown]
# And every expert works. Below, the share of assignments per layer and
# expert over fifty held-out stories.

# %% tags=["hide-input"]
fresh = stories(seed=5, hold_out=True)
tokens = [reader.encode(next(fresh)) for _ in range(50)]
tap, shares = RouterTap(pocket), torch.zeros(pocket.config.num_hidden_layers,
                                             8)
with torch.inference_mode():
    for row in tokens:
        pocket(torch.tensor([row]))
        for n, logits in enumerate(tap.take()):
            shares[n] += expert_load(top_logits(logits, 2)[1], 8)
tap.close()
shares /= shares.sum(1, keepdim=True)
fig, ax = plt.subplots(figsize=(7, 2.4))
image = ax.imshow(shares, vmin=0, vmax=0.5, aspect="auto")
for n in range(shares.shape[0]):
    for e in range(8):
        ax.text(e, n, f"{shares[n, e]:.2f}", ha="center", va="center",
                color="white" if shares[n, e] < 0.3 else "black", fontsize=8)
ax.set(xlabel="expert", ylabel="layer", xticks=range(8),
       yticks=range(shares.shape[0]),
       title="Share of assignments (even = 0.125)")
ax.grid(False)
fig.colorbar(image, ax=ax)
plt.show()
print("every expert is used in every layer:", bool((shares > 0.01).all()))

# %% [markdown]
# ## Against the others
#
# Transformers has the same auxiliary loss, `load_balancing_loss_func` in
# `models/gpt_oss/modeling_gpt_oss.py`. It counts each of the K choices as a
# full token, so its value is K times ours, and it lumps all layers together
# before multiplying; for one layer the two agree.

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
from gptoss.config import active_parameters, total_parameters  # noqa: E402

for name, config in (("pocket", pocket.config),
                     ("20b", GptOssConfig.gpt_oss_20b()),
                     ("120b", GptOssConfig.gpt_oss_120b())):
    total, active = total_parameters(config), active_parameters(config)
    print(f"{name:>6}: {total:>15,} parameters, "
          f"{16 * total / 1e9:>8,.3g} GB to train, "
          f"{6 * active / 1e9:>7,.3g} GFLOP a token")

# %% [markdown]
# ## Cost
#
# A token of training costs about $6 N$ floating-point operations, $N$ the
# active parameters: two for each weight forwards, four backwards. Attention
# over T keys has no weights and comes on top:
#
# $$ C_{\text{step}} = B T \, \Big( 6 N + 12 \, L H C \, T \Big).
#    $$ (train-flops)
#
# Sliding layers count in full, because the plain implementation computes
# all T keys and masks them. PyTorch's counter sees the products with
# weights, the first term, and asserts it below; the attention kernel works
# outside of its sight.

# %%
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

B, T = 2, 256
config = replace(pocket_config())
model = GptOss(config, dtype=torch.float32, packed=False)
rows = next(story_rows(vocabulary, seed=0, batch=B, length=T))
rows[rows == NOTHING] = 0
with FlopCounterMode(display=False) as counter:
    next_token_loss(model, rows).backward()
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
# - A procedural corpus gives two things that no collected one has: the
#   smallest possible loss, and a program that marks every answer.
# - Without a balance loss routers collapse, since whoever is chosen learns;
#   $E \sum_e f_e p_e$ is 1 when nobody is preferred.
# - Train the last part on the MXFP4 grid and the four-bit file *is* the
#   model that was trained and examined, not a copy near it.
#
# ## Exercises
#
# ### Exercise 1
#
# What loss does a model reach that knows only how often each token occurs?
# Compare it with the floor. (The unigram entropy.)

# %% tags=["hide-cell"]
fresh = stories(seed=9)
sample = [t for _ in range(300) for t in vocabulary.encode(next(fresh))]
counts = torch.bincount(torch.tensor(sample)).double()
p = counts[counts > 0] / counts.sum()
unigram = -(p * p.log()).sum().item()
print(f"{unigram:.1f} nats, floor {floor:.2f}")
assert unigram > 10 * floor

# %% [markdown]
# ### Exercise 2
#
# Which value of {eq}`train-balance` do K chosen experts out of E reach when
# they take everything? Show it for E = 32, K = 4.

# %% tags=["hide-cell"]
logits = torch.full((100, 32), -30.0)
logits[:, :4] = 0.0
collapsed = load_balance(logits, 4).item()
print(f"{collapsed:.1f}")
assert abs(collapsed - 32 / 4) < 1e-3

# %% [markdown]
# ### Exercise 3
#
# Why is the embedding's gradient not affected by `OnGrid`, and what would it
# cost in bytes to leave the experts in bf16?

# %% tags=["hide-cell"]
experts = sum(p.numel() for name, p in dense.named_parameters()
              if name.endswith(("gate_up_proj", "down_proj")))
packed_bytes = experts * 17 // 32
print(f"{2 * experts / packed_bytes:.2f} times the bytes of the experts")
assert packed_bytes == sum(
    b.numel() for name, b in pocket.named_buffers()
    if name.endswith(("_blocks", "_scales")))

# %% [markdown]
# Only the experts are parametrised, so the embedding sees the ordinary
# gradient of a loss that was computed with rounded experts.
#
# ### Exercise 4
#
# Ask the model for something that it never read. What does the checker say?

# %% tags=["hide-cell", "nbval-ignore-output"]
strange = "Once upon a time there was a little robot named Zed."
answer = generate_batch(pocket, [reader.encode(strange)], stop=stop,
                        max_new_tokens=300, sampler=Sampler(temperature=0.0))
text = strange + reader.decode(answer[0]).replace("<|endoftext|>", "")
print(text)
reading = read_story(text)
print(reading.coherent, "| stuck at:", reading.beat)
assert not reading.coherent

# %% [markdown]
# It goes on, fluently, about somebody that it knows. Two million parameters
# hold a small world, and nothing outside of it.
#
# ## Sources
#
# - Load balancing: {cite}`switch2021`, section 2.2, after {cite}`moe2017`;
#   transformers `modeling_gpt_oss.py`, `load_balancing_loss_func`.
# - AdamW: {cite}`adamw2019`. Byte-level BPE: {cite}`bpe2016`.
# - MXFP4: {cite}`ocpmx2023`. Configuration and tokenizer layout:
#   {cite}`gptoss2025`.
