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
#     module: lookup
#     public: [Lookup]
# ---

# %% [markdown]
# # Where did these words stand before?
#
# ## Question
#
# A tool has returned six orders, and the model tells of each in a sentence.
# Hardly any of its 108 words and signs is news: they stand in the tool's lines
# or in the sentence before. Whoever looks up where the last words stood, and
# says what followed there, is right 46 times and wrong 54 times, and in the
# big models a wrong guess is dear. How can a table of words know *when* it
# will be right?

# %% [markdown]
# ## Picture

# %% tags=["hide-input", "picture"]
# Figure: six sentences, a line each, a box for each word or sign: grey where
# nobody guessed, green where the guess was right, orange where it was wrong.
# The first sentence has the grey ones. In the others the words between are
# mostly green, and orange stands below orange: at the name, the city, the
# number and the things of an order, and just behind them.
import re

import matplotlib.pyplot as plt

from gptoss.kernels.lookup import Lookup as Finished

plt.style.use("../_static/book.mplstyle")
ORDERS = [("Ada Stone", "Oslo", 5512, "two lamps"),
          ("Ben Ruiz", "Lima", 5531, "one chair"),
          ("Cleo Marsh", "Cairo", 5540, "six plates"),
          ("Dora Lind", "Quito", 5548, "a desk"),
          ("Emil Okafor", "Lagos", 5563, "four hooks"),
          ("Fay Novak", "Delhi", 5570, "a mirror")]
TOOL = "".join(f"order {number}: {things} for {name}, {city}\n"
               for name, city, number, things in ORDERS)
SAID = [f"I wrote to {name} in {city} that order {number}, {things}, is late."
        for name, city, number, things in ORDERS]
words: dict[str, int] = {}


def cut(text: str) -> list[int]:
    """A word with the space before it, a sign, or blanks: an id each."""
    return [words.setdefault(piece, len(words)) for piece in re.findall(
        r" ?\w+| ?[^\w\s]+|\s+", text)]


finder = Finished()
finder.begin(cut(TOOL + "Tell me what you did.\n"))
fig, ax = plt.subplots(figsize=(7.4, 2.2))
for line, sentence in enumerate(SAID):
    x = 0.0
    for token in cut(sentence + "\n"):
        finder.add([token])
        word = [*words][token].strip(" ").replace("\n", "↵")
        width = 0.55 + 0.42 * len(word)
        ax.barh(-line, width - 0.12, 0.8, x, align="center", alpha=0.45,
                color=("0.6", "C2", "C1")[finder.met[-1]])
        ax.text(x + width / 2 - 0.06, -line, word, ha="center", va="center",
                fontsize=6.5)
        x += width
ax.set(xlim=(-0.1, 34), ylim=(-5.5, 0.5))
ax.axis("off")
plt.show()
own = finder.met[-sum(len(cut(sentence + "\n")) for sentence in SAID):]
print(f"{len(own)} words and signs: {own.count(1)} guessed right, "
      f"{own.count(2)} wrong, {own.count(0)} not at all")

# %% [markdown]
# What to see: grey where nobody guessed, green where the last words stood
# before and the same followed, orange where something else did. A sentence is
# a form with fields: "I wrote to ... in ... that order ...". From the second
# sentence on much of the form is green. Orange stands below orange: at the
# fields, and just behind them, where the tool's line went on otherwise ("Ada
# Stone, Oslo" there, "Ada Stone in Oslo" here) or the same comma stood last in
# another place. (This cell uses the finished class.)
#
# ## The naive version
#
# Take the last eight tokens and find where they stood before, the last time;
# guess what followed there. If they never stood there, take the last four,
# two, one. In words of Python:

# %%
def search(text, lengths=(8, 4, 2, 1), most=8):
    for n in lengths:
        for at in range(len(text) - 1, n - 1, -1):
            if text[at - n:at] == text[-n:]:
                return text[at:at + most]
    return []


def checks(prompt, follows, propose):
    """(guesses, how many of them were right) of each forward."""
    text, end = [*prompt, follows[0]], len(prompt) + len(follows)
    while len(text) < end:
        rest = follows[len(text) - len(prompt):]
        guesses, right = propose(text)[:len(rest) - 1], 0
        while right < len(guesses) and guesses[right] == rest[right]:
            right += 1
        yield len(guesses), right
        text += rest[:right + 1]


prompt = cut(TOOL + "Tell me what you did.\n")
follows = cut("\n".join(SAID) + "\n")
COST = (1, 1.30, 1.56, 1.79, 1.99, 2.17, 2.32, 2.46, 2.57)  # with n guesses


def show(propose):
    """Last: tokens for what a step without guesses costs."""
    made = list(checks(prompt, follows, propose))
    guesses, right = map(sum, zip(*made, strict=True))
    cost = sum(COST[n] for n, _ in made)
    print(f"{len(follows)} tokens in {len(made):3} forwards, {right:2} of "
          f"{guesses:3} guesses right, {(len(follows) - 1) / cost:.2f} tokens "
          "for one's cost")


for most in (1, 2, 4, 8):
    show(lambda text, most=most: search(text, most=most))

# %% [markdown]
# A forward over the last token and the guesses says how many of them are
# right, and gives one token more. In the 20b the first guess costs 0.3 of a
# step, since it brings experts of its own, and each further one less, since
# they share some ([drafts](drafts.ipynb) derives what is in `COST`). So the
# more the search guesses, the fewer forwards there are, and the *more* they
# cost: most of eight guesses run on across the next field.
#
# It also reads the whole text for each token. That is mended first.
#
# ## Derivation
#
# ### What must a table hold?
#
# For each run of eight, four, two and one tokens the place right after where
# it ended the last time (places count from 0). When a token is appended, the
# runs that end just before it get its place, each a later one in the place of
# an earlier:
#
# $$ \text{after}[x_{t-n}, \dots, x_{t-1}] = t . $$ (lookup-table)
#
# By hand, for single tokens and the text 7 1 2 8 3 1: appending the second 1
# has set after[3] = 5, and before that after[1] = 2. So after the last 1 the
# guess is what stands at place 2, a 2. That is one look per length, however
# long the text is.
#
# ### How likely is a guess right?
#
# It could be *counted*. While the model writes, each token that comes is
# compared with what would have been guessed for it alone, checked or not; that
# costs nothing. But one number for all guesses says little. Three things can
# be known of a guess before it is checked:
#
# - **how many tokens agree** before it, 8, 4, 2 or 1. The longer, the better;
# - **where it stands**: in what was given, or in what the model itself has
#   written since. In its own sentences the form is found, in the given lines
#   the fields;
# - **what happened there**: whether the token at that place was foreseen then,
#   was a *surprise*, or came where nobody guessed. Orange stands below orange:
#   what was a field last time is one again.
#
# So we count by these three, right ones $r$ of $n$, and believe
#
# $$ p = \frac{r + 4\,p_0}{n + 4} , $$ (lookup-chance)
#
# which begins at $p_0$ and goes over to $r/n$ as counts grow, as if four
# guesses had been seen before. With $p_0 = 0.5$, two right ones of two make
# $4/6 = 0.67$, two wrong ones $2/6 = 0.33$. We begin with 0.85, 0.7, 0.5 and
# 0.3 for 8, 4, 2 and 1 tokens that agree, and with half of that for what was a
# surprise.
#
# A guess further on is right only if those before it are. After one right
# guess one token more agrees; so the second of a match of 4 is believed as a
# match of 5, that is as one of 4, and the fifth as one of 8.
#
# ## Code

# %% tags=["export"]
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gptoss.text.sampling import reject

Proposal = tuple[Sequence[int], Tensor | None]

# tokens that agree -> how likely a guess is right, before any was seen
BELIEVED = {8: 0.85, 4: 0.7, 2: 0.5, 1: 0.3}
STRENGTH = 4  # guesses seen that this belief is worth
UNSEEN, FORESEEN, SURPRISE = range(3)  # what the lookup made of a token


class Lookup:
    """Guesses what followed the last tokens where they stood before.

    lengths: of the n-grams that are looked for, each >= 1, in this order.
    most: guesses at once, >= 1. GenerateError for others.
    chances: of the guesses last proposed, how likely each is right if those
    before it are.
    met: of each token of the text, UNSEEN, FORESEEN or SURPRISE.
    """

    reads = 0

    def __init__(self, lengths: Sequence[int] = (8, 4, 2, 1), most: int = 8
                 ) -> None:
        for name, values in (("lengths", lengths), ("most", [most])):
            if not values or any(type(n) is not int or n < 1 for n in values):
                reject(name, "integers >= 1", values)
        self.lengths, self.most = tuple(lengths), most
        self._text: list[int] = []
        self.begin(())

    def begin(self, text: Sequence[int]) -> None:
        held = len(self._text)
        if not held or list(text[:held]) != self._text:  # not the same text
            held, self._text = 0, []
            self.met: list[int] = []
            self._after: dict[tuple[int, ...], int] = {}  # n-gram -> place
        self.chances: list[float] = []
        self._seen: dict[tuple[int, bool, int], tuple[int, int]] = {}
        self._own = len(text)  # from here on it is being written
        self.add(text[held:])

    def _ends(self) -> list[tuple[int, ...]]:
        """The n-grams at the end of the text."""
        return [tuple(self._text[-n:]) for n in self.lengths
                if len(self._text) >= n]

    def _known(self, ends: list[tuple[int, ...]]) -> tuple[int, ...] | None:
        """The first of them that stood before."""
        return next((end for end in ends if end in self._after), None)

    def _kind(self, at: int, agree: int) -> tuple[int, bool, int]:
        """By what guesses are counted."""
        least = max(n for n in BELIEVED if n <= agree)
        return least, at >= self._own, self.met[at]

    def _chance(self, kind: tuple[int, bool, int]) -> float:
        right, seen = self._seen.get(kind, (0, 0))
        believed = BELIEVED[kind[0]] * (0.5 if kind[2] == SURPRISE else 1)
        return (right + STRENGTH * believed) / (seen + STRENGTH)

    def add(self, tokens: Sequence[int]) -> None:
        text, after = self._text, self._after
        for token in tokens:
            ends, met = self._ends(), UNSEEN
            known = self._known(ends)
            if known:
                at = after[known]
                met = FORESEEN if text[at] == token else SURPRISE
                # what was given says little of what is written
                if len(text) >= self._own:
                    kind = self._kind(at, len(known))
                    right, seen = self._seen.get(kind, (0, 0))
                    self._seen[kind] = right + (met == FORESEEN), seen + 1
            after.update(dict.fromkeys(ends, len(text)))
            text.append(token)
            self.met.append(met)

    def propose(self, most: int, draws: Any, generator: Any) -> Proposal:
        self.chances = []
        known = self._known(self._ends())
        if known is None:
            return [], None
        at = self._after[known]
        period = len(self._text) - at  # a text that ends goes round
        places = [at + n % period for n in range(most)]
        self.chances = [self._chance(self._kind(place, len(known) + n))
                        for n, place in enumerate(places)]
        return [self._text[place] for place in places], None

# %% [markdown]
# A text that repeats itself with a period shorter than the guesses goes round:
# after "1 2 1 2 1" the token 1 was followed by "2 1", and then probably by 2
# again.

# %%
for text in ([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], [7, 1, 2, 8, 3, 1],
             [1, 2, 3], [1, 2, 1, 2, 1]):
    finder = Lookup()
    finder.begin(text)
    print(f"{str(text):30} {str(search(text, most=3)):10}",
          finder.propose(3, None, None)[0])

# %% [markdown]
# A text that goes on, as the next turn of a conversation does, is not entered
# again: `begin` adds what is new and counts anew.
#
# How many guesses are worth a check? With chances $p_1, p_2, \dots$ the first
# is right with $p_1$, the second with $p_1 p_2$. So $n$ of them bring $1 + p_1
# + p_1 p_2 + \dots$ tokens, and we take the $n$ that brings most for its cost.
# With two guesses of 0.5 that is one of them:

# %%
for n, tokens in enumerate((1, 1 + 0.5, 1 + 0.5 + 0.25)):
    print(f"{n} guesses: {tokens} tokens for {COST[n]}, that is "
          f"{tokens / COST[n]:.2f} for one's cost")

# %%
from itertools import accumulate
from operator import mul


def sure(finder):
    """The proposal, as far as it is worth its cost."""
    guesses = finder.propose(finder.most, None, None)[0]
    tokens = accumulate(accumulate(finder.chances, mul), initial=1.0)
    gains = [some / cost for some, cost in zip(tokens, COST, strict=False)]
    return guesses[:gains.index(max(gains))]


def with_table(prompt, **how):
    """`search` by a `Lookup`, which is told what is new."""
    finder, told = Lookup(**how), [*prompt]
    finder.begin(prompt)

    def propose(text):
        finder.add(text[len(told):])
        told.extend(text[len(told):])
        return sure(finder)

    return propose


show(search)
show(with_table(prompt))

# %% [markdown]
# ## It holds
#
# **The table finds what the search finds**, in any text:

# %%
import random

rng = random.Random(0)
for _ in range(2_000):
    text = rng.choices(range(4), k=rng.randrange(1, 40))
    finder = Lookup()
    finder.begin(text[:5])
    finder.add(text[5:])
    found = search(text, most=3)
    guesses = finder.propose(3, None, None)[0]
    assert guesses[:len(found)] == found and bool(found) == bool(guesses)
print("2,000 texts: the same guesses")

# %% [markdown]
# **The chances are true** of first guesses: of those that are said to be right
# in 0.6 to 0.8 of the cases, about so many are. We let it guess in this very
# chapter, for each token from the middle on, and sort what it guesses by what
# it said. (Guesses further on borrow these counts. Where little is said of
# them, somewhat more come true.)

# %% tags=["hide-input"]
# Figure: what was said against what was right, five points with the number of
# guesses beside them; all lie near the diagonal.
from pathlib import Path

text = cut(Path("lookup.py").read_text("utf-8"))
half = len(text) // 2
finder = Lookup()
finder.begin(text[:half])
bins: dict[int, list[tuple[float, bool]]] = {}
for token in text[half:]:
    guesses = finder.propose(1, None, None)[0]
    if guesses:
        said = finder.chances[0]
        bins.setdefault(min(int(5 * said), 4), []).append(
            (said, guesses[0] == token))
    finder.add([token])
fig, ax = plt.subplots(figsize=(3.4, 2.6))
ax.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
for _, pairs in sorted(bins.items()):
    said, right = (sum(column) / len(pairs)
                   for column in zip(*pairs, strict=True))
    ax.plot(said, right, "o", color="C0")
    ax.annotate(f"{len(pairs)}", (said, right), (5, -9), fontsize=7,
                textcoords="offset points")
    print(f"said {said:.2f}, right {right:.2f} of {len(pairs)}")
    assert abs(said - right) < 0.15 or len(pairs) < 30
ax.set(xlabel="chance that was said", ylabel="share that was right",
       xlim=(0, 1), ylim=(0, 1))
plt.show()

# %% [markdown]
# What to see: each point is a fifth of the scale, with the number of guesses
# beside it. They lie near the grey line, where what is said is what comes.
#
# ## Against the others
#
# llama.cpp, transformers (`prompt_lookup_num_tokens`) and vLLM (`ngram`) look
# n-grams up as well. The last two guess a fixed number. llama.cpp has several
# ways: its `lookup` drafts only what was seen often enough, and its
# `ngram-map` makes a draft no longer than what was accepted of it the last
# time. None of them weighs a chance against what a check costs.

# %% [markdown] tags=["measured"]
# What is it worth? `bench/guesses.py` counts, for four kinds of text that
# somebody wrote in this project, and for lists made by six patterns from what
# a search finds there. Tokens over the cost of the forwards in the 20b, the
# mean of forty texts of each kind (of JSON there are 17), and the least:
#
# | chances, lengths | edits | JSON | lists | tests | prose | least |
# |---|---|---|---|---|---|---|
# | alike; 8, 4, 2 | 1.95 | 1.60 | 1.30 | 1.02 | 1.00 | 0.99 |
# | by three things; 8, 4, 2 | 2.12 | 1.72 | 1.45 | 1.04 | 1.00 | 0.99 |
# | by three things; 8, 4, 2, 1 | 2.11 | 1.75 | 1.43 | 1.06 | 1.00 | 0.99 |
#
# Tests follow their module, and prose the cell whose output it tells of.
# "Alike" is by one number, the share of guesses that were right of late. The
# lengths and what is believed at first were chosen by these texts. On four
# others (those of `bench/drafts.py`: an edited program, JSON echoed, a tool's
# results quoted, prose) the first row brings 2.35, 2.07, 1.18 and 1.00 and the
# last 2.62, 2.20, 1.36 and 1.00. Even who knows how many guesses will be right
# gains 2.78, 2.62, 1.65 and 1.02 there. What of it the clock sees is told in
# [what each step brought](measured.ipynb).

# %% [markdown]
# ## Cost
#
# For each token up to four looks, four entries and as many runs to keep; a
# proposal is four looks and eight divisions. A text in which nothing repeats
# has most entries:

# %%
finder = Lookup()
finder.begin([rng.randrange(200_000) for _ in range(131_072)])
print(f"{len(finder._after):,} entries for {len(finder.met):,} tokens")

# %% [markdown] tags=["measured"]
# That takes 0.5 to 0.8 seconds and 61 MB, once a conversation; then a token
# takes 2 to 5 microseconds to enter and a proposal 2 to 17.

# %% [markdown]
# ## Takeaways
#
# - A table from the last tokens to where they ended last answers at once, in
#   a text of any length.
# - Counting costs nothing: each guess is compared with the token that came
#   anyway. The counts say how many guesses are worth a check, and when none
#   is.
# - A text is a form with fields. Where it surprised last time it will surprise
#   again, and a guess should end there.
#
# ## Exercises
#
# ### Exercise 1
#
# What do the three things bring in this text? Leave one out each time: all
# agreeing lengths alike, all places alike, nothing known of surprises.

# %% tags=["hide-cell"]
class Without(Lookup):
    """All that has one of these three, taken for the same."""

    def _kind(self, at, agree):
        kind = list(super()._kind(at, agree))
        kind[self.left_out] = (2, False, FORESEEN)[self.left_out]
        return tuple(kind)


finished = Lookup
for n, name in enumerate(("lengths", "places", "surprises")):
    Without.left_out, Lookup = n, Without
    print(f"without {name:10}", end=" ")
    show(with_table(prompt))
Lookup = finished
# Surprises bring most. The other two bring nothing in a text so short.

# %% [markdown]
# ### Exercise 2
#
# Why not guess by a single token alone, and why not by eight alone?

# %% tags=["hide-cell"]
for lengths in ((1,), (8,), (8, 4, 2, 1)):
    print(f"{lengths!s:13}", end=" ")
    show(with_table(prompt, lengths=lengths))
# One token alone finds as much, but all that it finds looks alike, so nothing
# tells the good ones; eight stand nowhere before in this text.

# %% [markdown]
# ### Exercise 3
#
# With {eq}`lookup-chance`, how many right guesses in a row make a surprise in
# a match of one token (it begins at 0.15) worth a check that costs 0.3, and
# how many wrong ones make a match of eight not worth it?

# %% tags=["hide-cell"]
need = next(n for n in range(99) if (n + 4 * 0.15) / (n + 4) >= 0.3)
lose = next(n for n in range(99) if 4 * 0.85 / (n + 4) < 0.3)
print(need, "right ones;", lose, "wrong ones")

# %% [markdown]
# ## Sources
#
# - {cite}`saxena2023`: prompt lookup; huggingface/transformers#27775.
# - The estimate {eq}`lookup-chance` is the mean of a Beta distribution after
#   so many observations (Laplace's rule has 2 and 0.5 for our 4 and $p_0$).
# - ggml-org/llama.cpp, `common/ngram-cache.cpp` and `common/ngram-map.cpp`;
#   vllm-project/vllm, `ngram_proposer.py`.
