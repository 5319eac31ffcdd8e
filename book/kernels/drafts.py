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
#     module: drafts
#     public: [Drafter, ModelDrafter]
# ---

# %% [markdown]
# # Can a token be guessed and then checked?
#
# ## Question
#
# The shipped model is asked for a story that stands in its prompt already. It
# writes 200 tokens, and runs 49 times instead of 200: somebody guessed 151 of
# them right, by looking up what stood there before. The text is the same to
# the last token. Who may guess, what is a guess worth where every token has
# its own experts, and why does the check leave no trace in what is drawn?
#
# ## Picture

# %% tags=["hide-input", "picture"]
# Figure: an answer of the shipped model in three lines, a box a token. Blue
# ones were drawn one by one, green ones were guessed and right, orange ones
# drawn in a check; below some of these stands in red the guess that was wrong.
from importlib.resources import files

import matplotlib.pyplot as plt
import torch

from gptoss.kernels.lookup import Lookup
from gptoss.model.transformer import GptOss
from gptoss.text.generate import generate, one_by_one
from gptoss.text.sampling import Sampler
from gptoss.text.stops import stop_ids
from gptoss.text.tokenizer import Tokenizer

plt.style.use("../_static/book.mplstyle")
POCKET = files("gptoss") / "pocket"
tokenizer, stop = Tokenizer.from_pretrained(POCKET), stop_ids(POCKET)
model = GptOss.from_pretrained(POCKET, dtype=torch.float32)
question = tokenizer.apply_chat_template([
    {"role": "user", "content": "My cat is called Zorali."},
    {"role": "assistant", "content": "I will not forget it."},
    {"role": "user", "content": "What is my cat called?"}], date="")
answer = list(generate(model, question, stop=stop, sampler=Sampler(0)))
finder, boxes = Lookup(), [(answer[0], "C0", "")]
finder.begin(question + answer[:1])
while len(boxes) < len(answer):
    rest, right = answer[len(boxes):], 0
    guesses, _ = finder.propose(3, None, None)
    while [*rest[right:right + 1]] == guesses[right:right + 1] != []:
        right += 1
    finder.add(rest[:right + 1])
    for n, token in enumerate(rest[:right + 1]):
        boxes.append((token, "C2" if n < right else "C1" if guesses else "C0",
                      tokenizer.decode(guesses[n:n + 1] * (n == right))))
fig, ax = plt.subplots(figsize=(7.4, 2.4))
x = y = 0.0
for token, colour, wrong in boxes:
    text = tokenizer.decode([token]).replace(" ", "␣")
    width = 0.3 + 0.14 * len(text)
    if x + width > 15:
        x, y = 0.0, y - 1.2
    ax.barh(y, width - 0.06, 0.5, x, align="edge", color=colour, alpha=0.4)
    ax.text(x + width / 2, y + 0.24, text, ha="center", va="center",
            fontsize=7)
    ax.text(x + width / 2, y - 0.2, wrong.replace(" ", "␣"), ha="center",
            va="center", fontsize=7, color="C5")
    x += width
ax.set(xlim=(-0.1, 15.1), ylim=(y - 0.6, 0.6))
ax.axis("off")
plt.show()
print(len(boxes), "tokens,", sum(colour != "C2" for _, colour, _ in boxes),
      "forwards")

# %% [markdown]
# What to see: where the last tokens stood before, the next ones, here three
# at most, are guessed to be those that followed there, and one forward checks
# all. Green ones were right and cost no forward of their own. Each check also
# gives a token of the model's own, orange; red is what was guessed in its
# place. Where nothing is found the model goes on as always, blue.
#
# ## The naive version
#
# Let the model run over the guess, and keep it if it is the token that the
# model finds likeliest. With temperature 0 that is right. But tokens are
# *drawn*. Say there are three, of probabilities 0.5, 0.3 and 0.2, and the
# guess is always the first. Two ways that look right, 10,000 times each:

# %%
from gptoss.text.sampling import draw

p, guess = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64), 0
generator = torch.Generator().manual_seed(0)


def likeliest():  # keep the guess if it is the likeliest token
    return guess if int(p.argmax()) == guess else int(draw(p, None, generator))


def twice():  # keep it as often as it is likely, or else draw
    uniform = torch.rand((), generator=generator)
    return guess if uniform < p[0, guess] else int(draw(p, None, generator))


for rule in (likeliest, twice):
    drawn = torch.tensor([rule() for _ in range(10_000)]).bincount()
    print(f"{rule.__name__:10}", *(f"{n / 10_000:.2f}" for n in drawn))

# %% [markdown]
# The first never draws at all. The second gives the guess two chances, and
# 0.5 becomes 0.75: it is kept with 0.5, and drawn with 0.5 of the other 0.5.
# A model that writes so repeats what the guesses say, and no error tells.
#
# ## Derivation
#
# ### When is a guess kept?
#
# The second way is nearly right. Who keeps the guess with 0.5 must, when it is
# not kept, draw from what is left: 0.3 and 0.2, that is 0.6 and 0.4. Then the
# second token comes with $0.5 \cdot 0.6 = 0.3$, as it should. In general a
# guess $x$ is kept with $p(x)$, and else a token $y \ne x$ comes with
# $(1 - p(x)) \, p(y) / (1 - p(x)) = p(y)$.
#
# That rule has a much simpler form. *Draw a token from the model as ever, and
# look whether it is the guess.* It is, with $p(x)$. If it is not, what was
# drawn comes from $p$ without $x$. So the guess has no part in what is drawn.
# It says only where the next draw can be made without another forward. The
# same random numbers are used in the same order: a seed gives the same text
# with guesses as without.
#
# A small model draws its guess from probabilities $q$ of its own. If $q = p$,
# every guess should be kept, but two separate draws from (0.5, 0.3, 0.2) agree
# with $0.25 + 0.09 + 0.04 = 0.38$ only. *Speculative sampling*
# {cite}`leviathan2022,chen2023` uses $q$: keep $x$ with
#
# $$ \min\bigl(1,\; p(x) / q(x)\bigr), \qquad\text{else draw from}\quad
#    \max(0,\; p - q) \;\text{ made to sum to 1} . $$ (drafts-rule)
#
# By hand: $p = (0.5, 0.3, 0.2)$ and a small model with $q = (0.7, 0.1, 0.2)$.
# It guesses the first token with 0.7, which is kept with 5/7, together 0.5;
# its other guesses are always kept, 0.1 and 0.2. In what is left, 0.2, the
# model draws from $(0, 0.2, 0)$: the second token. It comes with $0.1 + 0.2 =
# 0.3$. Why always? A token $x$ is guessed and kept with $q(x) \min(1,
# p(x)/q(x)) = \min(p(x), q(x))$. What is missing to $p(x)$ is $\max(0, p(x) -
# q(x))$, and that is what the other draw is made of. Its probability, all that
# was not kept, is the sum of what is missing. Guesses are kept with
# $\sum_x \min(p(x), q(x))$, here 0.8.
#
# ### What does a step of n tokens read?
#
# Decoding waits for memory ([the speed limit](roofline.ipynb)), so the cost of
# a step is the bytes of weights that it reads. Dense matrices are read once
# however many tokens there are. Experts are not: every token brings its own.
# In the 20b a token chooses 4 of 32, so a given expert is left alone by it
# with 28/32, and by two tokens with $(28/32)^2 = 0.77$, if they choose
# independently. Two tokens then read $32 \cdot 0.23 = 7.5$ experts, not 8. In
# general $n$ tokens read
#
# $$ E \bigl(1 - (1 - K/E)^n\bigr) $$ (drafts-experts)
#
# experts in each layer. Text chooses less evenly, and neighbours share some,
# so a step may read less than that.

# %% tags=["export"]
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from gptoss.kernels.lookup import Lookup, Proposal
from gptoss.model.cache import Cache
from gptoss.model.transformer import GptOss
from gptoss.moe.routing import expected_hits
from gptoss.text.generate import Decoder, choose_step, one_by_one
from gptoss.text.sampling import Sampler, SamplingOptions, draw, reject
from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import bytes_read_per_token, expert_bytes


def step_bytes(config: GptOssConfig, tokens: int) -> float:
    """Bytes of weights that a forward of so many tokens reads."""
    E, K = config.num_local_experts, config.num_experts_per_tok
    more = expected_hits(E, K, tokens) - K  # more than one token reads
    return (bytes_read_per_token(config)
            + config.num_hidden_layers * more * expert_bytes(config))

# %% [markdown]
# ### How many tokens does a step bring?
#
# Say a guess is right with $a = 0.8$, whatever came before, and three are
# checked. The model's own token is there in any case; the first guess with
# 0.8, the second with $0.8^2$, as the first must be right, too: together
# $1 + 0.8 + 0.64 + 0.512 = 2.95$. In general, for $n$ guesses,
#
# $$ 1 + a + \dots + a^n = \frac{1 - a^{n+1}}{1 - a} $$ (drafts-tokens)
#
# tokens a step. Divided by the cost of the step, that is the gain:

# %%
def expected_tokens(share: float, guesses: int) -> float:
    """Tokens that a step brings which checks so many guesses, each right with
    the probability `share` if those before it are."""
    return sum(share ** n for n in range(guesses + 1))

# %%
from gptoss.weights.config import GptOssConfig

BIG = {"20b": GptOssConfig.gpt_oss_20b(), "120b": GptOssConfig.gpt_oss_120b()}


def cost(config, guesses):
    return step_bytes(config, guesses + 1) / step_bytes(config, 1)


for name, config in BIG.items():
    E, K = config.num_local_experts, config.num_experts_per_tok
    print(f"{name}: tokens  experts     GB  cost  gain at 0.6, 0.7, 0.8, 0.9")
    for n in (1, 2, 3, 4, 6, 8, 16):
        gains = [expected_tokens(share, n - 1) / cost(config, n - 1)
                 for share in (0.6, 0.7, 0.8, 0.9)]
        print(f"{n:12} {expected_hits(E, K, n):8.1f} "
              f"{step_bytes(config, n) / 1e9:6.2f} {cost(config, n - 1):5.2f}"
              + " " * 9 + " ".join(f"{gain:5.2f}" for gain in gains))

# %% tags=["hide-input"]
# Figure: two panels, 20b and 120b: gain over the share of guesses that are
# right, a curve for 1, 3 and 7 guesses. All rise; with more guesses they begin
# lower, below 1, and end higher, and the 120b's curves lie lower.
fig, axes = plt.subplots(1, 2, figsize=(7.4, 2.6), sharey=True)
across = [0.4 + 0.01 * n for n in range(61)]
for ax, (name, config) in zip(axes, BIG.items(), strict=True):
    for n in (1, 3, 7):
        ax.plot(across, [expected_tokens(a, n) / cost(config, n)
                         for a in across], label=f"guesses: {n}")
    ax.axhline(1, color="0.4", linewidth=0.8)
    ax.set(title=name, xlabel="share of guesses that are right",
           xlim=(0.4, 1), ylim=(0.4, 3.4))
axes[0].set_ylabel("tokens for one's bytes")
axes[0].legend()
plt.show()
for name, config in BIG.items():
    even = next(a / 1000 for a in range(1000)
                if expected_tokens(a / 1000, 3) > cost(config, 3))
    print(f"{name}: three guesses gain if more than {even:.2f} are right")

# %% [markdown]
# What to see: who is right in less than a half gains little. A dense model
# would gain: four tokens would cost it little more than one. Three guesses
# must be right in 0.47 of the cases in the 20b, and in 0.57 in the 120b, whose
# experts are shared by fewer tokens; more guesses in more. If 0.7 are right,
# three guesses are about best; if 0.9 are, more would be. So it must be known
# how many are right, and it must stop when they are too few.
#
# ## Code
#
# ### Who guesses?
#
# Whoever can say how a text may go on. It is told where a text begins and what
# comes, and is asked. Two attributes go with it: how many guesses it makes
# at once at most, and what bytes one of them reads. A third may: how likely
# its guesses are right.

# %% tags=["export"]
class Drafter(Protocol):
    """Who guesses how a text goes on.

    most: guesses at once, and no more are asked for. reads: bytes of weights
    that a guess reads, 0 if that is nothing beside the model. One that reads
    nothing may have `chances`, too: how likely each guess of its last proposal
    is right if those before it are. Of others that is counted. Who draws its
    guesses may tell no chances: whether a guess is checked must not depend on
    what was drawn.
    """

    most: int
    reads: int

    def begin(self, text: Sequence[int]) -> None:
        """A new text, of which this is known."""
        ...

    def add(self, tokens: Sequence[int]) -> None:
        """The text goes on."""
        ...

    def propose(self, most: int, draws: Any, generator: Any) -> Proposal:
        """At most so many tokens that may follow, perhaps none; and None, or
        the probabilities (n, V) that they were drawn from by `generator`.
        draws: the sampler of the text."""
        ...

# %% [markdown]
# The cheapest looks up where the last tokens stood before
# ([lookup](lookup.ipynb)) {cite}`saxena2023`. It says also how likely each of
# its guesses is right, by counting what became of such guesses; here, where
# none was seen yet, what it believes at first:

# %%
from gptoss.kernels.lookup import Lookup

finder = Lookup()
for text in ([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], [1, 2, 1, 2, 1], [1, 2, 3]):
    finder.begin(text)
    guesses = finder.propose(3, None, None)[0]
    print(guesses, [round(chance, 2) for chance in finder.chances])

# %% [markdown]
# ### Which guesses are kept?
#
# One forward over the last token and $n$ guesses gives $n + 1$ rows of logits:
# row 0 says what follows the last token, row 1 what follows the first guess,
# and so on. The first rule draws along them until a draw is not the guess. It
# is all that the lookup needs, and works with any sampler. The second is
# {eq}`drafts-rule` for guesses drawn from $q$, by the sampler's own
# probabilities, after temperature, top-k and top-p.

# %% tags=["export"]
def draw_along(logits: Tensor, guesses: Sequence[int], draws: Any,
               generator: torch.Generator | None) -> list[int]:
    """Tokens drawn from rows of logits (n + 1, V), up to the first that is
    not the guess: those that the model draws without n guesses, too."""
    tokens: list[int] = []
    for row, guess in zip(logits, [*guesses, None], strict=True):
        tokens.append(int(draws(row[None], generator)))
        if tokens[-1] != guess:
            break
    return tokens


def keep_or_redraw(logits: Tensor, guesses: Sequence[int], said: Tensor,
                   sampler: Sampler, generator: torch.Generator | None
                   ) -> list[int]:
    """Tokens distributed as drawn from logits (n + 1, V), for n guesses that
    were drawn from `said` (n, V): those kept, and one of the model's own."""
    Sampler(0.0)(logits)  # refuses NaN
    wanted, said = sampler.probabilities(logits), said.to(logits.device)
    for n, guess in enumerate(guesses):
        uniform = torch.rand((), dtype=torch.float64, generator=generator)
        if uniform.item() * said[n, guess] >= wanted[n, guess]:
            left = (wanted[n] - said[n]).clamp(min=0)
            return [*guesses[:n], int(draw(left[None], None, generator))]
    return [*guesses, int(draw(wanted[-1:], None, generator))]

# %% [markdown]
# ### How is a check taken back?
#
# A check of $n$ guesses puts $n + 1$ tokens into the cache, of which some must
# go. The ring of a sliding layer allows that without any replay if it has a
# `slack` of $n$ slots ([remembering](../model/remembering.ipynb)); with less,
# fewer are guessed, `slack + 1` at most.
#
# And who stops reading in the middle of a run of right guesses? `generate`
# promises that the cache then holds all but the last token it gave. So the
# rows after the check are kept, and before each token is given they are put
# back and rolled back to it. What lies in the slots is not touched by that.

# %% [markdown]
# ### How many are worth it?
#
# With chances $p_1, p_2, \dots$ a check of $n$ guesses brings $1 + p_1 + p_1
# p_2 + \dots$ tokens. `Pace` divides by the costs and takes the $n$ that
# brings most; 0 is one of the answers. The costs are those of the bytes, times
# 1.1 for what kernels lose in such steps.
#
# Who tells no chances, as a small model, is believed by one number, the share
# of its guesses that were right of late: each that was tested, right or wrong,
# moves it by 1/16 of the way. It begins where it does not matter, at
# break-even.
#
# When is it switched on again? A guess from the lookup costs nothing, and what
# became of it the next token shows, checked or not. So it is always asked. A
# small model's guess does cost something: while it is not worth a check, it is
# asked for every 16th token only.

# %% tags=["export"]
MARGIN = 1.1   # a step of several tokens beside what its bytes allow
MEMORY = 16    # tested guesses that the share of right ones goes back
AGAIN = 16     # tokens until a guess that costs something is tried again


def check_costs(config: GptOssConfig, drafter: Drafter) -> list[float]:
    """Of steps that check 0, 1, … guesses, in steps that check none."""
    one = step_bytes(config, 1)
    return [1.0] + [(MARGIN * step_bytes(config, n + 1) + n * drafter.reads)
                    / one for n in range(1, drafter.most + 1)]


class Pace:
    """How many guesses to check at once, by their chances or, where none are
    told, by how many were right.

    costs: as of `check_costs`. share: of guesses that are right.
    """

    def __init__(self, costs: Sequence[float]) -> None:
        self.costs = costs
        self.share = next((a / 100 for a in range(101)
                           if self._best(a / 100)), 1.0)

    def best(self, chances: Sequence[float]) -> int:
        """How many guesses to check of those with such chances, each if those
        before it are right; 0: it is not worth it."""
        tokens = accumulate(accumulate(chances, operator.mul), initial=1.0)
        gains = [some / cost for some, cost in zip(tokens, self.costs,
                                                   strict=False)]
        return gains.index(max(gains))

    def _best(self, share: float) -> int:
        return self.best([share] * (len(self.costs) - 1))

    @property
    def length(self) -> int:
        """Guesses to check in the next step, of somebody who tells no chances.
        """
        return self._best(self.share)

    def saw(self, right: int, wrong: int) -> None:
        """So many guesses were right, and then so many, 0 or 1, wrong."""
        for hit in [1] * right + [0] * wrong:
            self.share += (hit - self.share) / MEMORY

# %%
for name, config in BIG.items():
    pace = Pace(check_costs(config, Lookup()))
    print(f"{name}: of eight guesses with chances 0.3, 0.5, 0.7, 0.9 check",
          *(pace.best([chance] * 8) for chance in (0.3, 0.5, 0.7, 0.9)))
    print(f"{name}: a share begins at {pace.share:.2f};", end=" ")
    for right, wrong in ((0, 1), (6, 0), (0, 5)):
        pace.saw(right, wrong)
        print(f"{right} right, {wrong} wrong: {pace.length}", end="; ")
    print()

# %% [markdown]
# ### The loop
#
# The prompt and the first token are `one_by_one`'s. Then each round either
# checks guesses or takes a single step: the recorded one, if there is one,
# which notices that another has changed the cache, and copies its state
# ([step](step.ipynb)). The last token of a text needs no guess after it, and
# so there is always room: with $r$ tokens still to be written, $r - 1$ are
# guessed at most, and $r$ are fed.

# %% tags=["export"]
def _cleaned(proposal: Proposal, most: int, vocabulary: int
             ) -> tuple[list[int], Tensor | None]:
    """The first guesses, up to one that is no token."""
    guesses, said = proposal
    ids = [operator.index(guess) for guess in guesses]
    if said is not None and said.shape != (len(ids), vocabulary):
        reject("draft", f"probabilities {(len(ids), vocabulary)}",
               tuple(said.shape))
    good = next((n for n, guess in enumerate(ids[:most])
                 if not 0 <= guess < vocabulary), most)
    return ids[:good], None if said is None else said[:good]


@torch.inference_mode()
def check_guesses(model: GptOss, cache: Cache, token: int,
                  guesses: Sequence[int], said: Tensor | None, draws: Any,
                  generator: torch.Generator) -> list[int]:
    """The 1 to n + 1 tokens that follow `token`, by one forward, after which
    the cache holds `token` and all guesses."""
    fed = torch.tensor([[token, *guesses]], device=model.device)
    logits = model(fed, cache=cache, logits_to_keep=fed.shape[1])[0]
    if said is None:
        return draw_along(logits, guesses, draws, generator)
    return keep_or_redraw(logits, guesses, said, draws, generator)

# %% tags=["export"]
def _drafted(drafter: Drafter, before: Sequence[int], model: GptOss,
             prompt: list[int], count: int, options: SamplingOptions,
             generator: torch.Generator, cache: Cache | None,
             decode: Decoder | str, pauses: bool) -> Iterator[int | None]:
    """`one_by_one` with guesses; `before`: what the cache holds of it."""
    cache = cache or model.new_cache(slack=drafter.most)
    token, draws = 0, options.draws
    for first in one_by_one(model, prompt, 1, options, generator, cache,
                            decode, pauses):
        yield first
        token = first or 0
    drafter.begin([*before, *prompt, token])
    pace = Pace(check_costs(model.config, drafter))
    step, made, ever = None, 1, AGAIN if drafter.reads else 1
    tells = not drafter.reads and hasattr(drafter, "chances")
    while token not in options.stop and made < count:
        length = drafter.most if tells else pace.length
        guesses: list[int] = []
        said = None
        room = min(length or int(made % ever == 0), count - made - 1,
                   cache.slack + 1)
        if room > 0:
            guesses, said = _cleaned(drafter.propose(room, draws, generator),
                                     room, model.config.vocab_size)
        if tells:
            if said is not None:
                reject("draft", "chances or probabilities", "both")
            chances = getattr(drafter, "chances", None)
            length = pace.best(() if chances is None
                               else chances[:len(guesses)])
            guesses = guesses[:length]
        whole, start = None, cache.length
        if length and guesses:
            tokens = check_guesses(model, cache, token, guesses, said, draws,
                                   generator)
            whole = cache.rows
        else:
            step = step or choose_step(model, cache, decode)
            with torch.inference_mode():
                fed = torch.tensor([[token]], device=model.device)
                tokens = draws(step(fed)[:, -1], generator).tolist()
        right = int(tokens == guesses) if whole is None else len(tokens) - 1
        pace.saw(right, right < len(guesses))
        drafter.add(tokens)
        for n, token in enumerate(tokens, 1):
            if whole is not None:  # nothing behind this one is there yet
                cache.rows = whole
                cache.rollback(start + n)
            made += 1
            yield token
            if token in options.stop:
                break

# %% [markdown]
# ### A small model that guesses
#
# It has a cache of its own, which holds the text as far as it has read it and
# its guesses. What of these was wrong is forgotten with the next `propose`. If
# tokens are drawn, it draws with the same sampler, and says from what.

# %% tags=["export"]
class ModelDrafter:
    """A model of the same vocabulary guesses; it keeps a cache of its own.

    most: guesses at once. It guesses nothing for texts that are longer than
    it has positions.
    """

    def __init__(self, model: GptOss, most: int = 3) -> None:
        if type(most) is not int or most < 1:
            reject("most", "an integer >= 1", most)
        self.model, self.most = model, most
        self.reads = bytes_read_per_token(model.config)
        self._cache = model.new_cache(slack=most)
        self._step: Callable[[Tensor], Tensor] | None = None
        self._text: list[int] = []
        self._held: list[int] = []  # what the cache holds

    def begin(self, text: Sequence[int]) -> None:
        self._text = []
        self.add(text)

    def add(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            at = len(self._text)
            if self._held[at:at + 1] not in ([], [token]):
                del self._held[at:]
            self._text.append(token)

    def _read(self) -> Tensor:
        """Feed what is not held; logits (1, V) after the text."""
        known = min(len(self._held), len(self._text) - 1)
        start = self._cache.rollback(known)
        del self._held[start:]
        for at in range(start, len(self._text), 512):
            part = self._text[at:at + 512]
            logits = self.model(torch.tensor([part], device=self.model.device),
                                cache=self._cache, logits_to_keep=1)
            self._held += part
        return logits[:, -1]

    @torch.inference_mode()
    def propose(self, most: int, draws: Any, generator: Any) -> Proposal:
        room = self.model.config.max_position_embeddings - len(self._text)
        most = min(most, self.most, room + 1)
        if most < 1:
            return [], None
        drawn = isinstance(draws, Sampler) and draws.temperature > 0
        logits, guesses, said = self._read(), [], []
        while True:
            said.append(draws.probabilities(logits) if drawn else logits)
            guesses.append(int(draw(said[-1], None, generator) if drawn
                               else logits.argmax(-1)))
            if len(guesses) == most:
                return guesses, torch.cat(said) if drawn else None
            self._step = self._step or choose_step(self.model, self._cache)
            fed = torch.tensor([[guesses[-1]]], device=self.model.device)
            logits = self._step(fed)[:, -1].clone()
            self._held.append(guesses[-1])

# %% [markdown]
# ### Who may be given, and what is refused?
#
# `generate(model, prompt, draft="lookup")` finds `with_drafts` by the table of
# what answers, as it finds the recorded step. What cannot guess for this model
# is refused at the call.

# %% tags=["export"]
def drafter_for(draft: Any, model: GptOss) -> Drafter:
    """What `draft` means: "lookup", a GptOss, or a `Drafter` itself.

    GenerateError for anything else, a model of another vocabulary, or one
    beside a model spread over processes, which must all guess the same.
    """
    if isinstance(draft, str) and draft == "lookup":
        return Lookup()
    if isinstance(draft, GptOss):
        draft = ModelDrafter(draft)
    if isinstance(draft, ModelDrafter):
        own, V = draft.model.config.vocab_size, model.config.vocab_size
        if own != V:
            reject("draft", f"a model with the vocabulary of {V} tokens", own)
        if getattr(model, "group", None) is not None:
            reject("draft", "lookup, for a model that is spread over "
                   "processes", "a model")
    missing = [name for name in ("most", "reads", "begin", "add", "propose")
               if not hasattr(draft, name)]
    if missing:
        reject("draft", "lookup, a GptOss or a Drafter", draft)
    found: Drafter = draft
    return found


def with_drafts(draft: Any, before: Sequence[int], model: GptOss
                ) -> partial[Iterator[int | None]]:
    """`one_by_one` with guesses, for text/generate's `generate`; `draft` as
    in `drafter_for`, `before` the tokens that the cache holds."""
    return partial(_drafted, drafter_for(draft, model), list(before))

# %% [markdown]
# ## It holds
#
# **The text is the same**, greedy and drawn, whoever guesses: the lookup,
# somebody who is always wrong, somebody who knows the text, and the model
# itself. This is in fp32 and plain torch. In bf16 a forward of four tokens
# rounds otherwise than four of one, and texts can part where two tokens are
# nearly equal, as they do if a prompt is cut into other chunks.

# %%
from types import SimpleNamespace

from gptoss.text.sampling import SamplingOptions

opening = tokenizer.encode(
    "Once upon a time there was a little fox named Mira.")
fed = []
hook = model.register_forward_pre_hook(
    lambda module, inputs: fed.append(inputs[0].numel()))


def written(prompt, draft=None, **changes):
    """The tokens of a text; `fed` then has how many each forward ran."""
    options = SamplingOptions(**{"stop": stop, "temperature": 0.0,
                                 "max_new_tokens": 300} | changes)
    run = one_by_one if draft is None else with_drafts(draft, (), model)
    fed.clear()
    return list(run(model, prompt, options.max_new_tokens, options,
                    torch.Generator().manual_seed(7), None, "eager", False))


def told(prompt, follows, off=0):
    """Somebody who knows what follows, and says what is `off` beside it."""
    text: list[int] = []
    return SimpleNamespace(
        most=3, reads=0, begin=text.extend, add=text.extend,
        propose=lambda most, *_: ([(token + off) % 1536 for token in follows[
            len(text) - len(prompt):][:most]], None))


story = written(opening)
again = [*opening, *story, *opening]
texts = {"a story": opening, "the story again": again, "a name": question}
print("text at temperature: forwards by lookup, always wrong, always right")
for name, prompt in texts.items():
    for temperature in (0.0, 0.7):
        how, needed = {"temperature": temperature, "max_new_tokens": 80}, []
        alone = written(prompt, **how)
        for draft in (Lookup(), told(prompt, alone, 1), told(prompt, alone)):
            assert written(prompt, draft, **how) == alone
            needed.append(len(fed))
        print(f"{name} at {temperature}: {len(alone)} tokens in", *needed)
assert written(question, ModelDrafter(model)) == answer

# %% [markdown]
# Who is always wrong is left alone after the first check; who is always right
# saves three forwards of four.
#
# **The distribution is the same.** Three thousand draws by each rule, with
# temperature, top-k and top-p; the counts against what the sampler's
# probabilities say, by the sum of $(o - e)^2/e$ over the tokens, $o$ counted
# and $e$ expected. By chance it is about the number of tokens less one, and
# hardly ever above 30. A rule that keeps every guess is found out.

# %%
def by_lookup(sampler):
    return draw_along(logits.repeat(2, 1), [3], sampler, generator)[0]


def by_small_model(sampler):
    said = sampler.probabilities(small_logits)
    guesses = draw(said, None, generator).tolist()
    return keep_or_redraw(logits.repeat(2, 1), guesses, said, sampler,
                          generator)[0]


def keeping_all(sampler):
    return int(draw(sampler.probabilities(small_logits), None, generator))


torch.manual_seed(1)
logits = torch.randn(1, 8)
small_logits = logits + 0.5 * torch.randn(1, 8)  # nearly right
for sampler in (Sampler(), Sampler(0.7, top_k=5), Sampler(1.2, top_p=0.9)):
    wanted, found = 3_000 * sampler.probabilities(logits)[0], []
    for rule in (by_lookup, by_small_model, keeping_all):
        counts = torch.tensor([rule(sampler) for _ in range(3_000)]
                              ).bincount(minlength=8)
        found.append(((counts - wanted) ** 2 / wanted.clamp(min=1e-9)).sum())
    print(f"{int((wanted > 0).sum())} tokens: lookup {found[0]:.1f}, small "
          f"model {found[1]:.1f}, keeping all {found[2]:.0e}")
    assert max(found[:2]) < 30 < 100 < found[2]

# %% [markdown]
# **The cache is as promised** at every token, wherever one stops: it holds all
# but the last token that was given, and what follows is what follows.

# %%
cache, taken = model.new_cache(slack=3), []
follows = written(again, Lookup())
for token in generate(model, again, cache=cache, draft="lookup", stop=stop,
                      sampler=Sampler(0.0)):
    taken.append(token)
    assert cache.length == len(again) + len(taken) - 1
    if len(taken) == 50:
        break
rest = list(generate(model, taken[-1:], cache=cache, sampler=Sampler(0.0),
                     stop=stop))
print(len(taken), "and", len(rest), "tokens, the text of", len(follows))
assert taken + rest == follows

# %% [markdown]
# ## Against the others
#
# llama.cpp (`lookup`), transformers (`prompt_lookup_num_tokens`) and vLLM
# (`ngram`) guess in the same way, and part in what they do when it does not
# help. One engine gave it up for mixtures of experts, since a check left the
# recorded step ([imp#781](https://github.com/kekzl/imp/pull/781)). Here that
# step goes on wherever nothing is found, and a small model that is not small
# ([mlx-lm#1132](https://github.com/ml-explore/mlx-lm/issues/1132)) is left
# alone: what it reads is in the costs.
#
# ## In the 20b and the 120b
#
# Which share is right can be counted on the small model only: it writes what
# it was taught. What a forward of so many tokens costs in the big ones is
# known by their bytes. Together they tell what these texts would gain there.
# In the last three the model quotes: a fact that it was told, the arguments of
# a call in JSON, the result of a tool.

# %%
tools = [{"type": "function", "function": {
    "name": "calculator", "description": "Work out an arithmetic expression.",
    "parameters": {"type": "object", "properties": {"expression": {
        "type": "string"}}, "required": ["expression"]}}}]
asked = [{"role": "user", "content": "What is 1234 * 567?"}]
called = {"name": "calculator", "arguments": '{"expression":"1234 * 567"}'}
result = [{"role": "assistant", "tool_calls": [
    {"id": "1", "type": "function", "function": called}]},
    {"role": "tool", "tool_call_id": "1", "name": "calculator",
     "content": "699678"}]
for name, more in (("a call in JSON", []), ("a result", result)):
    texts[name] = tokenizer.apply_chat_template(asked + more, tools, date="")
print(f"{'':16} tokens forwards guesses right   20b  120b")
for name, prompt in texts.items():
    ids = written(prompt, Lookup())
    steps = fed[1:]  # the first is the prompt's
    spent = [1 + sum(cost(config, n - 1) for n in steps)
             for config in BIG.values()]
    print(f"{name:16} {len(ids):6} {len(steps) + 1:8} "
          f"{sum(steps) - len(steps):7} {len(ids) - len(steps) - 1:5}",
          *(f"{len(ids) / price:5.2f}" for price in spent))

# %% [markdown]
# A story costs what it cost without guesses, the same story again gains most,
# quotes are between. (How many to check was decided by the small model's own
# costs. Where a check costs more, as in the large ones, less of what is
# doubtful is checked, so they would gain a little more.)
#
# ## Cost
#
# A token costs some looks into a table, guessed or not; a check the experts of
# {eq}`drafts-experts`, a forward outside of the recorded step, and $n$ slots
# in each ring. In a model
# as small as ours that forward, called from Python, takes longer than all it
# saves; `bench/drafts.py` measures it for any checkpoint.
#
# ## Takeaways
#
# - Draw as ever, and look whether it was the guess: then a guess changes what
#   a text costs and nothing else, not even the text of a seed.
# - In a mixture of experts every token brings weights of its own, so a check
#   is dear: with our margin, a guess must be right in 0.43 of the cases in the
#   20b and in 0.51 in the 120b.
# - A guess that costs nothing can be judged without being checked. That tells
#   when to begin again.
# - A check can be undone because the cache can go back exactly.
#
# ## Exercises
#
# ### Exercise 1
#
# Where a step of several tokens costs more than its bytes, fewer guesses are
# worth it. How many are checked, and how many right, in the story again with
# a margin of 1, of 1.5 and of 2?

# %% tags=["hide-cell"]
for MARGIN in (1.0, 1.5, 2.0):
    ids = written(again, Lookup())
    checked = sum(fed) - len(again) - len(fed) + 1
    print(f"margin {MARGIN}: {len(fed) - 1} forwards, "
          f"{len(ids) - len(fed)} of {checked} guesses right")
MARGIN = 1.1

# %% [markdown]
# ### Exercise 2
#
# Both models have the same probabilities, those of the toy above or all three
# equal. How often is a guess kept if it is the likeliest and we draw along, if
# it is drawn and {eq}`drafts-rule` decides, or drawn and we draw along?

# %% tags=["hide-cell"]
for p in ((0.5, 0.3, 0.2), (1 / 3, 1 / 3, 1 / 3)):
    print(f"likeliest {max(p):.2f}, by the rule {sum(map(min, p, p)):.2f}, "
          f"two draws {sum(x * x for x in p):.2f}")

# %% [markdown]
# ### Exercise 3
#
# A small model reads a tenth of the bytes of the big one for each guess. What
# share of its guesses must be right, for 1, 2, 3, 4 of them, in the 20b and
# the 120b, without the margin of `check_costs`?

# %% tags=["hide-cell"]
for name, config in BIG.items():
    shares_needed = [next((f"{a / 100:.2f}" for a in range(101)
                           if expected_tokens(a / 100, n)
                           > cost(config, n) + 0.1 * n), "never")
                     for n in (1, 2, 3, 4)]
    print(name, *shares_needed)
hook.remove()
# The lookup needs less, but finds nothing in a text that does not repeat.

# %% [markdown]
# ## Sources
#
# - {cite}`leviathan2022`, {cite}`chen2023`: the rule and its proof.
# - {cite}`saxena2023`: prompt lookup; huggingface/transformers#27775.
# - {cite}`stern2018`: guessing a block and checking it, greedily.
# - Mixtures of experts: kekzl/imp#781, ml-explore/mlx-lm#1132.
