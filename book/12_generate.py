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
#     module: generate
# ---

# %% [markdown]
# # Choosing the next token

# %% [markdown]
# ## Question
#
# The model of chapter 10 returns 201,088 numbers. How does one of them
# become the next word, and when is the text over? Rounded to bf16, so many
# random logits take only about 3,000 different values, and "the 50 largest"
# are mostly not 50: the rule that most code uses keeps more.
#
# And when the model has answered, how much of the conversation must it read
# again for the next question? Its old reasoning leaves the prompt, from the
# middle. Common programs then start from nothing; the 20b has to look again
# at what follows the reasoning and at no more than 1,524 tokens before it,
# however long the conversation is.

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
# Figure: four bar charts of the eight likeliest next tokens, and of all
# others together. At temperature 1.3 the bars are flatter and the others
# gain. Top-k leaves four bars and no others; top-p leaves likely ones and
# only a part of the others.
import collections
import contextlib
from importlib.resources import files

import matplotlib.pyplot as plt
import torch

from gptoss.text.tokenizer import Tokenizer
from gptoss.model.transformer import GptOss

plt.style.use("_static/book.mplstyle")
torch.manual_seed(0)
POCKET = files("gptoss") / "pocket"
model = GptOss.from_pretrained(POCKET, dtype=torch.float32)
tokenizer = Tokenizer.from_pretrained(POCKET)
opening = "Once upon a time there was a little fox named Mira."
lost = (" For her birthday she got a white lamp. One morning she went to the "
        "park with the lamp. But on the way from the cave she lost the lamp. ")
with torch.no_grad():
    logits = model(torch.tensor([tokenizer.encode(opening + lost)]))[0, -1]

order = logits.sort(descending=True, stable=True).indices
hot = (logits / 1.3).softmax(-1)[order]
four = torch.where(torch.arange(len(hot)) < 4, hot, 0)
few = torch.where(hot.cumsum(0) - hot < 0.8, hot, 0)
panels = {"as it is": logits.softmax(-1)[order], "temperature 1.3": hot,
          "temperature 1.3, top-k 4": four / four.sum(),
          "temperature 1.3, top-p 0.8": few / few.sum()}
words = [repr(tokenizer.decode([n]))[1:-1] for n in order[:8].tolist()]
fig, axes = plt.subplots(1, 4, figsize=(7.4, 2.6), sharey=True)
for ax, (title, probs) in zip(axes, panels.items(), strict=True):
    bars = [*probs[:8].tolist(), probs[8:].sum().item()]
    ax.bar(range(9), bars, color=["C0"] * 8 + ["C1"])
    ax.set_title(title, fontsize=8)
    ax.set_xticks(range(9), [*words, "all others"], rotation=90, fontsize=7)
    ax.grid(axis="x", visible=False)
axes[0].set_ylabel("probability")
plt.show()

# %% [markdown]
# How the shipped model may begin the sentence after "…she lost the lamp.":
# its eight likeliest tokens, and all the others together (orange). At
# temperature 1.3 the others gain what the likely ones lose. Top-k cuts that
# tail after a fixed number of tokens, here four, good ones too; top-p after a
# share of the probability, here 80 %:

# %%
others = {name: probs[8:].sum().item() for name, probs in panels.items()}
for name, share in others.items():
    print(f"{name:27}{share:5.0%} in the {len(hot) - 8:,} others")
print(f"top-p keeps {(few[:8] > 0).sum().item()} of the eight, and of the "
      f"others' share {few[8:].sum() / hot[8:].sum():.0%}")
assert others["as it is"] < others["temperature 1.3"]

# %% tags=["hide-input"]
# Figure: three turns as bars of tokens. In the second and third most is kept
# in the cache; only the last answer and the new question are fed anew, then
# come the analysis and the answer.
import os

from gptoss.text.harmony import (
    Message,
    render,
    render_training,
    system_message,
)

asked = ["Tell me a story about a fox.", "What is its name?", "Thank you!"]
thoughts = ["The user wants a story. A fox, a hill, a lost hat; three "
            "sentences will do. " * 2, "They ask for the name, Mira. " * 3,
            "Only thanks: a short answer."]
answers = ["A fox named Mira lived on a hill. One day she lost her hat. A "
           "bear had found it. ", "Its name is Mira.", "You are welcome."]
colours = {"kept in the cache": "C0", "fed anew": "C1",
           "analysis, dropped next turn": "0.75", "answer": "C2"}


def model_writes(said: list[Message]) -> list[int]:
    """What the model adds to a prompt: all since the last user message,
    less the `<|start|>assistant` with which the prompt ends."""
    since = max(n for n, m in enumerate(said) if m.role == "user") + 1
    return render_training(tokenizer, said[since:], "none")[
        1 + len(tokenizer.encode("assistant")):]


fig, ax = plt.subplots(figsize=(7.4, 2.2))
said, held = [system_message(date="2025-06-28")], []
for n, (question, thought, answer) in enumerate(
        zip(asked, thoughts, answers, strict=True), 1):
    said.append(Message("user", question))
    prompt = render(tokenizer, said, drop="turns")
    kept = len(os.path.commonprefix([prompt, held]))
    said.append(Message("assistant", thought, "analysis"))
    thinking = len(prompt) + len(model_writes(said))
    said.append(Message("assistant", answer, "final"))
    held = prompt + model_writes(said)
    edges = [0, kept, len(prompt), thinking, len(held)]
    for left, right, colour in zip(edges, edges[1:], colours.values(),
                                   strict=False):
        ax.barh(n, right - left, left=left, color=colour, height=0.6)
for name, colour in colours.items():
    ax.barh(0, 0, color=colour, label=name)
ax.set(xlabel="position (tokens)", ylabel="turn", yticks=(1, 2, 3),
       ylim=(3.5, 0.5))
ax.legend(ncols=4, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()

# %% [markdown]
# Three turns of a conversation. After each, the model's analysis (grey) is
# taken out, so all that follows it moves to the left and must be fed again
# (orange): the last answer without its analysis, and the new question. All
# before it (blue) is still in the cache.

# %% [markdown]
# ## The naive version
#
# Run the model on the text so far, draw, append, repeat; show each token as
# it comes.

# %%
def naive(prompt: list[int], count: int, temperature: float = 1.0):
    ids = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([ids]))[0, -1] / temperature
        token = torch.multinomial(logits.softmax(-1), 1).item()
        yield tokenizer.decode([token])
        ids.append(token)


fed = []
hook = model.register_forward_pre_hook(
    lambda module, inputs: fed.append(inputs[0].numel()))
story = "".join(naive(tokenizer.encode(opening), 210))
hook.remove()
print(f"{sum(fed):,} tokens went through the model for 210 new ones")
print("went on after the end:", "<|endoftext|>" in story[:-20])
print([tokenizer.decode([n]) for n in tokenizer.encode("né")])
try:
    next(naive([1, 2, 3], 1, temperature=0))
except RuntimeError as error:
    print("temperature 0:", str(error)[:40])

# %% [markdown]
# Four faults: the work grows with the square of the length; nothing stops at
# the end of the story; a letter of two bytes becomes two replacement
# characters; temperature 0, which everybody types for "the likeliest",
# divides by zero and leaves no probabilities.

# %% [markdown]
# ## Derivation
#
# **Temperature.** With logits $z_1 \dots z_V$ and temperature $\tau > 0$,
#
# $$ p_i = \frac{e^{(z_i - \max z)/\tau}}
#               {\sum_j e^{(z_j - \max z)/\tau}} . $$ (generate-temperature)
#
# As $\tau \to 0$ every exponent but the maximum's goes to $-\infty$: all
# probability on the largest logit, greedy decoding. Subtracting the maximum
# *before* dividing keeps this true in floating point down to the smallest
# $\tau$ there is: $z_i/\tau$ alone would overflow, and $\infty - \infty$ is no
# number.
#
# **Top-k.** Sort so that $z_{(1)} \ge z_{(2)} \ge \dots$, equal logits by id;
# keep $(1) \dots (k)$ and renormalise. The order among equals is what makes
# the set well defined.
#
# **Top-p** {cite}`nucleus2019`. Keep $(1) \dots (m)$ with the smallest $m$ for
# which
#
# $$ \sum_{j=1}^{m} p_{(j)} \ge \texttt{top\_p} , $$ (generate-nucleus)
#
# that is: a token goes if the tokens before it already reach top_p. At least
# one stays for every top_p above 0. It acts on the probabilities that top-k
# left, renormalised.
#
# **Drawing.** With $c_j = p_1 + \dots + p_j$ and one uniform $u \in (0, 1]$,
#
# $$ i = \min \{ j : c_j \ge u \}, \qquad
#    \Pr(i = j) = c_j - c_{j-1} = p_j . $$ (generate-cdf)
#
# With $u > 0$ a token of probability 0 is never the first to reach $u$.
# `torch.rand` gives $[0, 1)$, so $u$ is one minus that. One number a token
# from a CPU generator makes a seed mean the same on every device.
#
# **How many tokens.** Of $M$ positions, a prompt of $P$ tokens after $n$
# cached ones uses $n + P$. The last new token needs none, since nothing is
# fed after it, so $M - n - P + 1$ can be produced.
#
# **UTF-8.** The first byte of a character says how many follow: `0…` none,
# `110…` one, `1110…` two, `11110…` three; those that follow begin with `10`.
# So after any number of bytes at most three wait for the rest of their
# character, and everything before them is final. A decoder with that state
# needs no look at earlier text.
#
# **Batches.** Pad on the left: then all rows end in the last column, whose
# logits are the only ones needed. Padding has position $-1$, sees nothing,
# is seen by nothing and never enters the cache (chapters 6 and 9), so row
# $r$ counts its positions from 0 as it would alone.
#
# **Turns.** Let the cache hold $n$ tokens, let the next prompt have $P$, and
# let the two agree in their first $m$. At least one token must be fed, since
# the answer begins with the logits of the last one. So feeding starts at
# $f = \min(m, P - 1)$, if the cache can be rolled back to there. Full layers
# always can. A sliding layer whose ring has $W + s$ slots holds positions
# $n - W - s \dots n - 1$; the query at $f$ looks at itself and at
# $f - W + 1 \dots f - 1$, so nothing is missing if
#
# $$ n - W - s \le f - W + 1, \quad\text{that is}\quad
#    n - f \le s + 1 . $$ (generate-slack)
#
# Otherwise the $J$ sliding layers are filled again by a replay of
# {eq}`eq-cache-replay`, and the tokens to feed are
#
# $$ P - f + \begin{cases} 0 & n - f \le s + 1 \\
#    \min(f, J (W - 1)) & \text{else.} \end{cases} $$ (generate-turn)
#
# The next prompt begins with the prompt of the turn before, so of the $a$
# tokens that a turn has added fewer than $a$ are taken back, and with slack
# for the longest turn a replay never happens. What follows the analysis
# cannot be kept: its keys were computed at other positions, by layers that
# had seen the analysis. After a *call* nothing is dropped, and the tool's
# answer is all that must be read: the tokens that the model wrote stay as
# they are, even where a renderer would spell them in another way.

# %% [markdown]
# ## Code
#
# ### Refusing by name

# %% tags=["export:text/sampling"]
import codecs
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoss.model.cache import Cache
from gptoss.weights.files import config_folder
from gptoss.weights.convert import home_file
from gptoss.weights.config import GptOssConfig
from gptoss.weights.config_file import read_json
from gptoss.weights.errors import Error, is_count, is_number, refuse
from gptoss.text.tokenizer import Tokenizer
from gptoss.model.transformer import GptOss


class GenerateError(Error):
    """An option, a prompt or logits that generation cannot use."""


reject = partial(refuse, GenerateError)

# %%
try:
    reject("top_p", "a number > 0 and <= 1", 0)
except GenerateError as error:
    print(error)

# %% [markdown]
# ### The k best
#
# `torch.topk` promises nothing about which of equal values it returns, so it
# serves only to find the k-th largest *value*.

# %% tags=["export:text/sampling"]
def best(logits: Tensor, k: int) -> Tensor:
    """Ids (B, k) of the k largest of (B, V), largest first.

    Of equals the lower id comes first; torch.topk breaks ties at will, so
    only its k-th value is used. A full stable sort gives the same and
    takes several times as long for V = 201088.
    """
    if k < logits.shape[-1]:
        edge = logits.topk(k).values[..., -1:]
        above, at = logits > edge, logits == edge
        room = k - above.sum(-1, keepdim=True)
        kept = above | (at & (at.cumsum(-1) <= room))
        ids = kept.nonzero()[:, 1].view(-1, k)  # ascending in each row
    else:
        ids = torch.arange(k, device=logits.device).expand_as(logits)
    order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return ids.gather(-1, order.indices)

# %%
print(best(torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]]), 3))

# %% [markdown]
# ### Temperature, top-k, top-p

# %% tags=["export:text/sampling"]
def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """`probs` (B, n), largest first, cut to the fewest that reach top_p."""
    mass = probs.cumsum(-1)
    probs = probs.clone()  # a token goes if those before it suffice
    probs[..., 1:].masked_fill_(mass[..., :-1] >= top_p, 0.0)
    return probs / probs.sum(-1, keepdim=True)

# %%
print(nucleus(torch.tensor([[0.5, 0.3, 0.1, 0.1]]), 0.8))

# %% tags=["export:text/sampling"]
NUCLEUS = 1024  # top-p looks at so many tokens before it sorts all of them


def ranked(logits: Tensor, temperature: float, top_k: int,
           top_p: float) -> tuple[Tensor, Tensor | None]:
    """What `Sampler` draws from: probabilities (B, n) and ids (B, n).

    Probabilities in float64, likeliest first; ids None: n = V, in order of
    id. `temperature` > 0. What top-k drops is absent, what top-p drops has
    probability 0.
    """
    V = logits.shape[-1]
    scores = logits.double()
    # the maximum first: then a tiny temperature gives -inf, never inf - inf
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    if top_k and top_k < V:
        ids = best(logits, top_k)
        probs = scores.gather(-1, ids).softmax(-1)
    elif top_p < 1:
        probs = scores.softmax(-1)
        ids = best(logits, min(NUCLEUS, V))
        if bool((probs.gather(-1, ids).cumsum(-1)[..., -1] < top_p).any()):
            ids = best(logits, V)
        probs = probs.gather(-1, ids)
    else:
        return scores.softmax(-1), None
    return (nucleus(probs, top_p) if top_p < 1 else probs), ids

# %%
probs, ids = ranked(logits[None], 1.3, 0, 0.8)
kept = int((probs > 0).sum())
print("kept by top-p 0.8 at temperature 1.3:", kept)
assert ids[0, :8].tolist() == order[:8].tolist()

# %% [markdown]
# ### Drawing with one uniform number

# %% tags=["export:text/sampling"]
def draw(probs: Tensor, ids: Tensor | None = None,
         generator: torch.Generator | None = None) -> Tensor:
    """One token a row (B,) from `probs` (B, n), by inverting the CDF.

    `ids` (B, n) names the columns (None: the column is the id). A token
    of probability 0 is never drawn.
    """
    # 1 - u lies in (0, 1]: the first column whose running sum reaches it has
    # a probability above 0
    uniform = 1.0 - torch.rand((probs.shape[0], 1), dtype=torch.float64,
                               generator=generator)
    running = probs.cumsum(-1)
    target = uniform.to(probs.device) * running[..., -1:]
    column = torch.searchsorted(running, target)
    if ids is not None:
        column = ids.gather(-1, column)
    return column[..., 0]

# %%
quarter = torch.tensor([[0.0, 0.25, 0.75]], dtype=torch.float64)
drawn = draw(quarter.expand(4000, -1), generator=torch.Generator())
print(drawn.bincount(minlength=3).tolist())

# %% [markdown]
# ### The sampler
#
# Logits that are not finite must not give a token. The activations of
# gpt-oss can exceed 65,504, the largest number of float16, and what comes
# out then is NaN (unsloth#3152): the error names the dtype.

# %% tags=["export:text/sampling"]
def _likeliest(logits: Tensor) -> Tensor:
    """Ids (B,) of the largest of each row (B, V), the first if several are.

    Raises unless it is finite: NaN anywhere, +inf, or nothing but -inf would
    otherwise give a token all the same.
    """
    peak, ids = logits.max(-1)  # in bf16 argmax takes longer
    if not bool(torch.isfinite(peak).all()):
        raise GenerateError(
            f"logits: expected finite numbers, found {peak.tolist()} as the "
            f"largest of a row; the model runs in {logits.dtype}"
            + (" (float16 ends at 65504: use bfloat16 or float32)"
               if logits.dtype == torch.float16 else ""))
    return ids

# %% tags=["export:text/sampling"]
@dataclass(frozen=True)
class Sampler:
    """Draws the next token: temperature, then top-k, then top-p.

    `temperature` 0 is greedy; `top_k` keeps exactly that many tokens
    (0: all; of equal logits the lower id wins); `top_p` the smallest set
    of likeliest tokens whose probability reaches it (1: all).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (is_number(self.temperature)
                and math.isfinite(self.temperature)
                and self.temperature >= 0):
            reject("temperature", "a finite number >= 0", self.temperature)
        if not (is_count(self.top_k) and self.top_k >= 0):
            reject("top_k", "an integer >= 0", self.top_k)
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            reject("top_p", "a number > 0 and <= 1", self.top_p)

    def __call__(self, logits: Tensor,
                 generator: torch.Generator | None = None) -> Tensor:
        """Next tokens (B,) int64 from `logits` (B, V).

        Takes one uniform number a row from `generator` (a CPU one,
        whatever the device) unless greedy, so that a seed gives the same
        text on every device that gives the same logits.
        """
        likeliest = _likeliest(logits)
        if self.temperature == 0:
            return likeliest
        return draw(*ranked(logits, self.temperature, self.top_k,
                            self.top_p), generator)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is drawn from: (B, V) float64, in order of id."""
        if self.temperature == 0:
            return torch.nn.functional.one_hot(
                logits.argmax(-1), logits.shape[-1]).double()
        probs, ids = ranked(logits, self.temperature, self.top_k, self.top_p)
        if ids is None:
            return probs
        full = torch.zeros_like(logits, dtype=probs.dtype)
        return full.scatter_(-1, ids, probs)

# %%
print(Sampler(temperature=0)(logits[None]).tolist() == [order[0].item()])
for wrong in ({"temperature": -1}, {"top_k": 2.5}, {"top_p": 0}):
    try:
        Sampler(**wrong)
    except GenerateError as error:
        print(error)
try:
    Sampler()(torch.tensor([[1.0, torch.nan]], dtype=torch.float16))
except GenerateError as error:
    print(str(error).partition("; ")[2])

# %% [markdown]
# ### One object for all options
#
# Whoever has a text written chooses the same things: how a token is drawn,
# how long the text may be, what ends it. `generate`, a whole batch, a chat
# and the command line therefore share one object, and an option is named and
# checked here alone. A caller may hand over the object, or single options
# that change it, or both.

# %% tags=["export:text/sampling"]
@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a text is drawn, how long it may be and what ends it.

    temperature, top_k, top_p: as in `Sampler`. seed: from 0 to 2**63 - 1;
    None: drawn from torch's own numbers. max_new_tokens: None for as many
    as there are positions. stop: ids that end a text. prefill_chunk: tokens
    of a prompt that are fed at once. sampler: what draws instead of those
    three, a function of logits (B, V) and a generator that gives ids (B,).
    Raises GenerateError, which names the option.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_new_tokens: int | None = 256
    stop: Iterable[int] = ()
    prefill_chunk: int = 512
    sampler: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        own = Sampler(self.temperature, self.top_k, self.top_p)
        if self.sampler is not None and own != Sampler():
            reject("sampler", "none beside temperature, top_k or top_p",
                    self.sampler)
        for name, least, most, words in (
                ("seed", 0, 2 ** 63 - 1, "from 0 to 2**63 - 1"),
                ("max_new_tokens", 1, math.inf, ">= 1"),
                ("prefill_chunk", 1, math.inf, ">= 1")):
            value = getattr(self, name)
            if value is None and name != "prefill_chunk":
                continue
            if not (is_count(value) and least <= value <= most):
                reject(name, f"an integer {words}", value)
        try:
            ids = frozenset(map(operator.index, self.stop))
        except TypeError:
            reject("stop", "token ids", self.stop)
        object.__setattr__(self, "stop", ids)

    def with_changes(self, **changes: Any) -> "SamplingOptions":
        """These options but for `changes`; TypeError for an unknown one."""
        return replace(self, **changes)

    @property
    def draws(self) -> Callable[..., Tensor]:
        """What draws a token: `sampler`, or a Sampler of the three."""
        return self.sampler or Sampler(self.temperature, self.top_k,
                                       self.top_p)

    def room(self, positions: int) -> int:
        """How many tokens may be made where there are `positions` for them.

        The last one needs none of its own: nothing is fed after it.
        """
        most = self.max_new_tokens
        return positions + 1 if most is None else min(most, positions + 1)

# %%
usual = SamplingOptions(temperature=0.8, max_new_tokens=40)
print(usual.with_changes(seed=7))
for wrong in ({"seed": -1}, {"max_new_tokens": 0}, {"top_n": 5},
              {"sampler": Sampler(0)}):
    try:
        usual.with_changes(**wrong)
    except (GenerateError, TypeError) as error:
        print(error)

# %% [markdown]
# ### When to stop
#
# `generation_config.json` has the ids. But people put only a temperature
# there, and `transformers` itself writes files without ids. Where it says
# nothing, `config.json` may; and if that says nothing either, a gpt-oss still
# ends its turns as harmony does (chapter 11), with the tokens of those names
# in its tokenizer. A list of no ids says nothing, too: a text that nothing
# can end is not what anybody meant.

# %% tags=["export:text/generate"]
HARMONY_STOPS = {"<|return|>": 200002, "<|endoftext|>": 199999,
                 "<|call|>": 200012}


def _said_stops(file: Path) -> tuple[int, ...]:
    """eos_token_id of a JSON file; () if it says nothing of it."""
    said = read_json(file)
    if not isinstance(said, dict):
        reject(str(file), "a JSON object", type(said).__name__)
    found = said.get("eos_token_id")
    if found is None:
        return ()
    ids = found if isinstance(found, list) else [found]
    if not all(is_count(n) and 0 <= n < 2 ** 31 for n in ids):
        raise GenerateError(f"{file}: eos_token_id: expected a token id or a"
                            f" list of them, found {found!r:.200}")
    return tuple(dict.fromkeys(ids))


def stop_ids(source: str | Path | GptOssConfig) -> tuple[int, ...]:
    """The ids that end a text, from `source`.

    A folder: `eos_token_id` (a number or a list) of generation_config.json,
    there or, for `original/`, in the folder above; if it says nothing, of
    config.json; else harmony's, as the tokenizer there has them. A config:
    its own. GenerateError or ConfigError names the file.
    """
    if isinstance(source, GptOssConfig):
        return (source.eos_token_id,)
    folder = Path(source)
    file = home_file(folder, "generation_config.json")
    ids = _said_stops(file) if file else ()
    ids = ids or _said_stops(config_folder(folder) / "config.json")
    if ids:
        return ids
    known = (Tokenizer.from_pretrained(folder).special
             if home_file(folder, "tokenizer.json") else HARMONY_STOPS)
    ids = tuple(known[name] for name in HARMONY_STOPS if name in known)
    if not ids:
        reject(f"{folder}: eos_token_id", "some in generation_config.json or"
                " config.json", None)
    return ids

# %%
import json
import shutil
import tempfile

stop = stop_ids(POCKET)
print([tokenizer.decode([n]) for n in stop])
with tempfile.TemporaryDirectory() as folder:
    said = Path(folder, "generation_config.json")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(POCKET / name, folder)
    for text in ('{"temperature": 0.7}', '{"eos_token_id": []}',
                 '{"eos_token_id": [273, null]}'):
        said.write_text(text)
        try:
            print(text, stop_ids(folder))
        except GenerateError as error:
            print(str(error).removeprefix(f"{folder}/"))
    whole = json.loads(Path(folder, "config.json").read_text())
    for stop in (None, []):
        Path(folder, "config.json").write_text(json.dumps(
            whole | {"eos_token_id": stop}))
        said.unlink(missing_ok=True)
        print(f"config.json with {stop}:", stop_ids(folder))
stop = stop_ids(POCKET)

# %% [markdown]
# ### What is checked before any work

# %% tags=["export:text/generate"]
def _check_prompt(config: GptOssConfig, prompt: Sequence[int], held: int,
                  limit: int) -> None:
    """Raises GenerateError, naming the token, before any work is done."""
    if len(prompt) == 0:
        reject("prompt", "at least one token", list(prompt))
    for at, token in enumerate(prompt):
        if not 0 <= token < config.vocab_size:
            reject(f"prompt, token {at}",
                    f"an id from 0 to {config.vocab_size - 1}", token)
    if held + len(prompt) > limit:
        before = f" after the {held} in the cache" if held else ""
        what = ("max_position_embeddings"
                if limit == config.max_position_embeddings
                else "the cache's max_tokens")
        raise GenerateError(
            f"prompt: expected at most {limit - held} tokens{before} "
            f"({what} is {limit}), found {len(prompt)}")

# %%
try:
    _check_prompt(model.config, [3, 5000], 0, 2048)
except GenerateError as error:
    print(error)

# %% [markdown]
# ### One text
#
# `generate` checks and returns an iterator. Its body is a function of its
# own because a Python generator runs nothing, not even a check, before its
# first item is asked for. After the prompt the same model takes one token at
# a time, always the same work; chapter 13 does it with less ado. It gets its
# place here: a *decoder* makes of model and cache a step, something that takes
# a token (1, 1) and gives logits (1, 1, V). Which step runs is an argument,
# and one function decides: it asks for chapter 13's where nobody asked for
# another.

# %% tags=["export:text/generate"]
import logging

from gptoss.model.answers import find_answer

_log = logging.getLogger("gptoss")
Decoder = Callable[[GptOss, Cache], Callable[[Tensor], Tensor]]


def forward_step(model: GptOss, cache: Cache) -> Callable[[Tensor], Tensor]:
    """Single tokens (and longer pieces) by the model's own forward."""
    return partial(model, cache=cache, logits_to_keep=1)


def choose_step(model: GptOss, cache: Cache, decode: Decoder | str = "auto"
                ) -> Callable[[Tensor], Tensor]:
    """What runs single tokens of the model, by `decode`.

    "eager": the model's own forward. "auto": a quicker step, where chapter
    13 has one for this model and cache, else the same. A decoder: what it
    makes. One line on the logger "gptoss" (INFO) says which, and why.
    """
    step, why = None, "asked for"
    if not isinstance(decode, str):
        step = decode(model, cache)
    elif decode == "auto":
        step, why = find_answer("step")(model, cache)
    step = step or forward_step(model, cache)
    _log.info("gptoss: single tokens are run by %s: %s", "the model's forward"
              if isinstance(step, partial) else type(step).__name__, why)
    return step


def _check_decode(decode: Decoder | str) -> None:
    if decode not in ("auto", "eager") and not callable(decode):
        reject("decode", "auto, eager or a function of model and cache",
                decode)

# %% tags=["export:text/generate"]
def _limit(config: GptOssConfig, cache: Cache | None) -> int:
    """How many positions there are: the model's, or the cache's if fewer."""
    most = None if cache is None else cache.max_tokens
    return most or config.max_position_embeddings


def _generators(model: GptOss, seed: int | None, rows: int
                ) -> list[torch.Generator]:
    """A generator for each row; row 0 of a seed is the seed itself."""
    if seed is None:
        drawn = seed = torch.randint(2 ** 48, ()).item()
        if (group := getattr(model, "group", None)) is not None:
            seed = group.same(lambda: drawn)  # one for all its processes
    return [torch.Generator().manual_seed(seed + row) for row in range(rows)]


def _generate(model: GptOss, prompt: list[int], count: int,
              options: SamplingOptions, generator: torch.Generator,
              cache: Cache, decode: Decoder | str, pauses: bool
              ) -> Iterator[int | None]:
    draws, stop, chunk = options.draws, options.stop, options.prefill_chunk
    feed = torch.tensor([prompt], device=model.embed_tokens.weight.device)
    run = forward_step(model, cache)
    for produced in range(1, count + 1):
        *parts, last = feed.split(chunk, dim=1)
        for part in parts:  # of the prompt; then `feed` is a single token
            with torch.inference_mode():
                run(part)
            if pauses:
                yield None
        with torch.inference_mode():
            chosen = draws(run(last)[:, -1], generator)
        token = chosen.item()
        yield token
        if token in stop or produced == count:
            return
        if produced == 1:
            run = choose_step(model, cache, decode)
        feed = chosen[:, None]

# %% tags=["export:text/generate"]
def generate(model: GptOss, prompt: Sequence[int],
             options: SamplingOptions | None = None, *,
             cache: Cache | None = None, decode: Decoder | str = "auto",
             pauses: bool = False, **changes: Any) -> Iterator[int | None]:
    """Yields the token ids that follow `prompt`, a list of ids.

    `options`, but for `changes`: single fields of `SamplingOptions`. Ends
    after `max_new_tokens`, after a token in `stop` (which is yielded,
    last), or when the positions are used up. `cache`: a cache of batch 1
    whose tokens precede the prompt; afterwards it holds all but the
    last token yielded, so the next prompt begins with that one. `decode`:
    how to run single tokens, as in `choose_step`: "auto", "eager" or a
    function of model and cache such as `DecodeStep`. `pauses`: yield None
    after each chunk of the prompt but the last, so that a long prompt can
    be left: the cache then holds the chunks that were fed.
    Raises GenerateError at the call, not at the first token.
    """
    options = (options or SamplingOptions()).with_changes(**changes)
    _check_decode(decode)
    prompt = [operator.index(token) for token in prompt]
    if cache is not None and cache.batch_size != 1:
        reject("cache", "a batch of 1", cache.batch_size)
    held = 0 if cache is None else cache.length
    limit = _limit(model.config, cache)
    _check_prompt(model.config, prompt, held, limit)
    return _generate(model, prompt, options.room(limit - held - len(prompt)),
                     options, _generators(model, options.seed, 1)[0],
                     cache or model.new_cache(), decode, pauses)

# %%
ids = list(generate(model, tokenizer.encode(opening), stop=stop,
                    sampler=Sampler(0)))
print(len(ids), "tokens, ended by", tokenizer.decode(ids[-1:]))
print(tokenizer.decode(ids[:40]), "...")

# %% [markdown]
# A long prompt takes its time before the first token: the 20b needs minutes
# for 10,000 tokens on a CPU. Whoever asks for `pauses` has the control back
# after every chunk, may show how far the model has read, or stop. What was
# fed is in the cache, and the rest of the prompt can be fed later:

# %%
cache, long = model.new_cache(), tokenizer.encode(opening + lost) * 2
for token in generate(model, long, cache=cache, prefill_chunk=20,
                      sampler=Sampler(0), pauses=True):
    print(f"{cache.length} of {len(long)} fed, then {token}")
    if cache.length >= 60:
        break
rest = generate(model, long[cache.length:], cache=cache, sampler=Sampler(0))
assert next(rest) == next(generate(model, long, sampler=Sampler(0)))

# %% [markdown]
# ### Many texts at once

# %% tags=["export:text/generate"]
def _pad_left(rows: list[list[int]],
              device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens (B, T) and mask (B, T): all rows end in the last column."""
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for r, row in enumerate(rows):
        tokens[r, longest - len(row):] = torch.tensor(row)
        mask[r, longest - len(row):] = True
    return tokens.to(device), mask.to(device)


@torch.inference_mode()
def _feed(model: GptOss, tokens: Tensor, mask: Tensor, cache: Cache,
          chunk: int) -> Tensor:
    """Logits (B, V) after the last column of `tokens` (B, T)."""
    for part, real in zip(tokens.split(chunk, dim=1),
                          mask.split(chunk, dim=1), strict=True):
        logits = model(part, cache=cache, attention_mask=real,
                       logits_to_keep=1)
    return logits[:, -1]

# %%
tokens, mask = _pad_left([[7], [1, 2, 3]], torch.device("cpu"))
print(tokens.tolist(), mask.tolist())

# %% tags=["export:text/generate"]
def generate_batch(model: GptOss, prompts: Sequence[Sequence[int]],
                   options: SamplingOptions | None = None,
                   **changes: Any) -> list[list[int]]:
    """The continuations of `prompts` (lists of ids of any lengths).

    `options`, `changes`: as for `generate`. Row r is what `generate` gives
    for prompt r and the seed `seed` + r, up to the rounding of larger
    matrix products.
    """
    options = (options or SamplingOptions()).with_changes(**changes)
    draws, stop = options.draws, options.stop
    rows = [[operator.index(token) for token in row] for row in prompts]
    limit = _limit(model.config, None)
    for number, row in enumerate(rows):
        try:
            _check_prompt(model.config, row, 0, limit)
        except GenerateError as error:
            raise GenerateError(f"row {number}: {error}") from None
    if not rows:
        return []
    generators = _generators(model, options.seed, len(rows))
    room = [options.room(limit - len(row)) for row in rows]
    cache = model.new_cache(batch_size=len(rows))
    out: list[list[int]] = [[] for _ in rows]
    tokens, mask = _pad_left(rows, model.embed_tokens.weight.device)
    while True:
        logits = _feed(model, tokens, mask, cache, options.prefill_chunk)
        chosen = torch.cat([draws(row[None], generator) for row, generator
                            in zip(logits, generators, strict=True)])
        alive = mask[:, -1].tolist()
        for r, token in enumerate(chosen.tolist()):
            if alive[r]:
                out[r].append(token)
                alive[r] = token not in stop and len(out[r]) < room[r]
        if not any(alive):
            return out
        # a finished row goes on as padding: it never enters the cache
        mask = torch.tensor(alive, device=tokens.device)[:, None]
        tokens = torch.where(mask, chosen[:, None], 0)

# %%
prompts = [tokenizer.encode(text) for text in (
    opening, "Once", "This is the story of Tom, a tiny frog. His home was")]
for row in generate_batch(model, prompts, max_new_tokens=12,
                          sampler=Sampler(0)):
    print(tokenizer.decode(row))

# %% [markdown]
# ### As a method of the model
#
# Whoever comes from `transformers` writes `model.generate(**inputs)`: a
# tensor goes in, padded on the left, and one comes out that holds prompts and
# continuations, with the padding id behind a row that ended early. That is
# the same loop behind another door. Chapter 10's method calls this function;
# an option that it does not know is a TypeError, never ignored.

# %% tags=["export:text/generate"]
def _unpadded(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The rows of `ids` (B, T) without the padding on their left."""
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex():
        reject("input_ids", "integers (B, T) or a list of ids",
                f"{ids.dtype} {tuple(ids.shape)}")
    if mask is None:
        return ids.tolist()
    mask = torch.as_tensor(mask, device=ids.device).bool()
    if mask.shape != ids.shape:
        reject("attention_mask", f"shape {tuple(ids.shape)}",
                tuple(mask.shape))
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        reject("attention_mask", "rows padded on the left", mask.tolist())
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


def continue_ids(model: GptOss, input_ids: Tensor | Sequence[int], *,
                 attention_mask: Tensor | None = None, do_sample: bool = True,
                 eos_token_id: int | Iterable[int] | None = None,
                 pad_token_id: int | None = None,
                 **options: Any) -> Tensor | list[int]:
    """Prompts with their continuations, as transformers' `generate`.

    input_ids: (B, T) integers give (B, T + new) int64 on the same device;
    a list of ids gives a list. attention_mask (B, T): 0 is padding, on the
    left. do_sample: False takes the likeliest token. eos_token_id: what
    ends a row (None: what the checkpoint says); pad_token_id: what stands
    behind its end (None: the configuration's). options: fields of
    `SamplingOptions`, None for a default, TypeError for any other.
    """
    given = {key: value for key, value in options.items()
             if value is not None or key == "max_new_tokens"}
    if not do_sample:
        given["temperature"] = 0
    if eos_token_id is None:
        eos_token_id = stop_ids(model.source or model.config)
    elif isinstance(eos_token_id, int):
        eos_token_id = [eos_token_id]
    run = SamplingOptions(**{"stop": eos_token_id} | given)
    if not isinstance(input_ids, Tensor):
        return [*input_ids, *generate(model, input_ids, run)]
    rows = _unpadded(input_ids, attention_mask)
    new = ([list(generate(model, rows[0], run))] if len(rows) == 1
           else generate_batch(model, rows, run))
    pad = model.config.pad_token_id if pad_token_id is None else pad_token_id
    made = torch.full((len(new), max(map(len, new), default=0)), pad)
    for row, tokens in zip(made, new, strict=True):
        row[:len(tokens)] = torch.tensor(tokens)
    return torch.cat([input_ids.long(), made.to(input_ids.device)], 1)

# %%
both = torch.tensor([tokenizer.encode(opening)] * 2)
mask = torch.ones_like(both)
mask[1, :7] = 0  # the second row is only the end of the first
out = model.generate(both, attention_mask=mask, do_sample=False,
                     max_new_tokens=6)
print(tuple(both.shape), "->", tuple(out.shape))
print([tokenizer.decode(row[both.shape[1]:]) for row in out.tolist()])
try:
    model.generate(both, num_beams=4)
except TypeError as error:
    print(error)

# %% [markdown]
# ### Text as it comes

# %% tags=["export:text/generate"]
class TextStream:
    """Turns tokens into text one at a time, never half a character.

    `feed` returns the characters that token completes (perhaps none), and
    holds back the bytes of one that is not whole; `flush` returns what is
    left. All pieces together are `tokenizer.decode(ids, skip_special)`.
    """

    def __init__(self, tokenizer: Tokenizer,
                 skip_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        data = self._tokenizer.token_bytes(token)
        if not self._tokenizer.is_special(token):
            return self._decoder.decode(data)
        # no character goes across a control token: end what was begun
        return self.flush() + ("" if self._skip else data.decode())

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text

# %%
stream = TextStream(tokenizer)
print([stream.feed(n) for n in tokenizer.encode("né!")], [stream.flush()])

# %% [markdown]
# ### A whole completion

# %% tags=["export:text/generate"]
@dataclass
class Completion:
    """What `complete` returns.

    `tokens` includes the stop token, `text` does not; `seconds` is wall
    time from the first token fed.
    """

    prompt_tokens: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"  # "stop" or "length"
    seconds: float = 0.0

# %% tags=["export:text/generate"]
def complete(model: GptOss, tokenizer: Tokenizer, prompt: str | list[int],
             options: SamplingOptions | None = None, *,
             on_text: Callable[[str], object] | None = None,
             cache: Cache | None = None, decode: Decoder | str = "auto",
             **changes: Any) -> Completion:
    """Runs `generate`, with its options, on a text or on token ids.

    `on_text` is called with each piece of text as it comes.
    """
    options = (options or SamplingOptions()).with_changes(**changes)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    done, stream = Completion(list(ids)), TextStream(tokenizer)

    def add(text: str) -> None:
        done.text += text
        if on_text and text:
            on_text(text)

    began = time.perf_counter()
    for token in generate(model, ids, options, cache=cache, decode=decode):
        done.tokens.append(token)
        if token in options.stop:
            done.finish_reason = "stop"
            break
        add(stream.feed(token))
    add(stream.flush())
    done.seconds = time.perf_counter() - began
    return done

# %%
pieces = []
done = complete(model, tokenizer, "Once upon a time", stop=stop, seed=1,
                max_new_tokens=12, on_text=pieces.append)
print(pieces)
print(done.finish_reason, len(done.tokens), done.text)

# %% [markdown]
# ### A conversation: what a message may look like
#
# From here on the chapter writes the modules of a chat, one after another.
# The first, `gptoss.messages`, reads what was said so far. Messages come as
# the plain dicts of OpenAI's chat interface, as its clients' objects, or as
# items of its Responses interface. All these were made before gpt-oss was,
# and everybody has added a key of their own. So we read every key that
# says something to the model, and refuse by its place and name any other
# that holds something: a text that is left out without a word changes the
# conversation, and nobody learns why the answer is odd.

# %% tags=["export:chat/messages"]
import dataclasses
import re
import reprlib
from collections.abc import Mapping, Sequence

from gptoss.weights.errors import Error, mismatch
from gptoss.text.harmony import Message, developer_message

# %% tags=["export:chat/messages"]
class ChatError(Error):
    """A message, a tool or an option that a chat cannot use."""


def expect(fits: bool, where: str, expected: str, found: object) -> None:
    """Raises ChatError at `where` unless what was `found` fits."""
    if not fits:
        said = "nothing" if found is None else reprlib.repr(found)
        raise mismatch(ChatError, where, expected, said)


# keys of clients that tell a model nothing
_IDLE = frozenset({
    "id", "object", "created", "created_at", "timestamp", "index", "status",
    "model", "finish_reason", "stop_reason", "usage", "logprobs",
    "cache_control"})


def as_dict(value: object, where: str) -> Mapping:
    """`value`, a dict or an object that makes one by `model_dump()`."""
    dump = getattr(value, "model_dump", None)
    if callable(dump) and not isinstance(value, Mapping | type):
        value = dump()
    expect(isinstance(value, Mapping), where, "a dict", value)
    return value


def only_keys(given: Mapping, keys: Sequence[str], where: str) -> None:
    """Refuse a key that holds something and would not be read."""
    for key, value in given.items():
        empty = value is None or value is False or (
            isinstance(value, str | list | tuple | Mapping) and not value)
        expect(empty or key in keys or key in _IDLE, f"{where}.{key}",
               f"no keys but {', '.join(keys)}", value)

# %% [markdown]
# A text is a string or a list of parts, and three interfaces call their
# parts by four names:

# %% tags=["export:chat/messages"]
# type of a part -> the key with its text
_PARTS = {"text": "text", "input_text": "text", "output_text": "text",
          "refusal": "refusal"}


def _part(part: object, where: str) -> str:
    """The text of one part of a content."""
    part = as_dict(part, where)
    kind = part.get("type")
    key = _PARTS.get(kind) if isinstance(kind, str) else None
    expect(key is not None and isinstance(part.get(key), str), where,
           "{'type': 'text', 'text': ...}", part)
    only_keys(part, ("type", key), where)
    return part[key]


def content_text(content: object, where: str) -> str:
    """The text of `content`, a string or a list of text parts."""
    if isinstance(content, list | tuple):
        content = "".join(_part(part, f"{where}[{n}]")
                          for n, part in enumerate(content))
    expect(isinstance(content, str), where,
           "a string or a list of text parts", content)
    expect(not re.search("[\ud800-\udfff]", content), where,
           "Unicode characters without lone surrogates", content)
    return content

# %%
print(content_text([{"type": "text", "text": "two "},
                    {"type": "input_text", "text": "parts"}],
                   "messages[0].content"))
for wrong in ([{"type": "image_url"}],
              [{"type": "text", "text": "a", "bold": True}]):
    try:
        content_text(wrong, "messages[0].content")
    except ChatError as error:
        print(error)

# %% [markdown]
# What the model thought has many names: `reasoning` here and in vLLM,
# `reasoning_content` in llama.cpp, `thinking` in ollama and in the released
# chat template, lists of pieces in OpenRouter (`reasoning_details`) and
# LiteLLM (`thinking_blocks`). A client may send the same thought under two
# of them. It counts once; two different ones are a contradiction.

# %% tags=["export:chat/messages"]
# type of a piece of reasoning -> the key with its text
_PIECES = {"reasoning.text": "text", "reasoning.summary": "summary",
           "thinking": "thinking", "reasoning_text": "text",
           "summary_text": "text"}
_THOUGHTS = ("reasoning", "reasoning_content", "thinking",
             "reasoning_details", "thinking_blocks")


def _piece(piece: object, where: str) -> str:
    """The text of one entry of a list of reasoning."""
    piece = as_dict(piece, where)
    kind = piece.get("type")
    if isinstance(kind, str) and kind in _PARTS:
        return _part(piece, where)
    key = _PIECES.get(kind) if isinstance(kind, str) else None
    expect(key is not None, f"{where}.type",
           f"one of {', '.join(_PIECES)} (what is encrypted cannot be "
           "read)", kind)
    only_keys(piece, ("type", key, "signature", "format"), where)
    return content_text(piece.get(key) or "", f"{where}.{key}")


def _thought(message: Mapping, where: str) -> str:
    """What the assistant thought, under whichever keys."""
    first, thought = "", ""
    for key in _THOUGHTS:
        found, at = message.get(key), f"{where}.{key}"
        if isinstance(found, list | tuple):
            found = "".join(_piece(piece, f"{at}[{n}]")
                            for n, piece in enumerate(found))
        found = content_text("" if found is None else found, at)
        expect(not (found and thought) or found.strip() == thought.strip(),
               at, f"the same as {first}, or only one of them", found)
        if found and not thought:
            first, thought = key, found
    return thought

# %%
for message in ({"reasoning": "Add.", "reasoning_content": "Add."},
                {"reasoning_details": [{"type": "reasoning.text",
                                        "text": "Add.", "index": 0}]},
                {"reasoning": "Add.", "thinking": "Subtract."},
                {"reasoning_details": [{"type": "reasoning.encrypted"}]}):
    try:
        print(_thought(message, "messages[1]"))
    except ChatError as error:
        print(error)

# %% tags=["export:chat/messages"]
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OTHER = re.compile(r"[^A-Za-z0-9_.-]")


def checked_name(name: object, where: str) -> str:
    """`name` of a function or an author, if it may be one."""
    expect(isinstance(name, str) and bool(_NAME.fullmatch(name)), where,
           "1 to 64 letters, digits, _ . -", name)
    return name


def possible_name(name: str) -> str:
    """What a model called, made a name that `checked_name` takes."""
    return _OTHER.sub("_", name)[:64] or "none"


def _call(call: object, where: str) -> tuple[str, Message]:
    """One entry of `tool_calls`: its id, and a message to the function."""
    call = as_dict(call, where)
    expect(isinstance(call.get("id"), str), f"{where}.id", "a string",
           call.get("id"))
    expect(call.get("type", "function") == "function", f"{where}.type",
           "'function'", call.get("type"))
    only_keys(call, ("id", "type", "function"), where)
    function = as_dict(call.get("function"), f"{where}.function")
    name = checked_name(function.get("name"), f"{where}.function.name")
    arguments = function.get("arguments")
    expect(isinstance(arguments, str), f"{where}.function.arguments",
           "a string of JSON", arguments)
    only_keys(function, ("name", "arguments"), f"{where}.function")
    return call["id"], Message(
        "assistant", content_text(arguments, f"{where}.arguments"),
        "commentary", f"functions.{name}", "<|constrain|>json")

# %% [markdown]
# One dict holds what was thought, then what was said, then what was called,
# and it has one place for what was said. But harmony's assistant can speak on
# two channels: before a call, or between two thoughts, it may tell the user
# on `commentary` what it is about to do. That is called a *preamble*. The
# content of a dict with calls is one; any other is marked, as in OpenAI's
# Responses, by `phase: "commentary"`. Without a mark a content is the answer.
# And a dict without content is no answer: somebody who was cut off while
# thinking has not answered with nothing.

# %% tags=["export:chat/messages"]
_PHASES = {"commentary": "commentary", "final_answer": "final"}
_ASSISTANT = ("role", "content", "refusal", "phase", "name", "tool_calls",
              *_THOUGHTS)


def _assistant(message: Mapping, where: str
               ) -> tuple[list[Message], dict[str, str]]:
    """What the assistant thought, said and called, in this order; and the
    calls, id -> function."""
    only_keys(message, _ASSISTANT, where)
    calls, phase = message.get("tool_calls") or [], message.get("phase")
    expect(isinstance(calls, list | tuple), f"{where}.tool_calls", "a list",
           calls)
    expect(phase is None or phase in tuple(_PHASES), f"{where}.phase",
           f"one of {', '.join(_PHASES)}", phase)
    made = [_call(call, f"{where}.tool_calls[{n}]")
            for n, call in enumerate(calls)]
    known = {id_: call.recipient for id_, call in made}
    expect(len(known) == len(made), f"{where}.tool_calls",
           "ids that differ", [id_ for id_, _ in made])
    said = "\n\n".join(filter(None, (
        content_text(message[key], f"{where}.{key}")
        for key in ("content", "refusal") if message.get(key) is not None)))
    channel = (_PHASES[phase] if phase else
               "commentary" if calls else "final")
    out = [Message("assistant", text, channel) for text, channel in (
        (_thought(message, where), "analysis"), (said, channel)) if text]
    return _named(out + [call for _, call in made], message, where), known


def _named(out: list[Message], message: Mapping, where: str
           ) -> list[Message]:
    """The messages with the `name` of their author, if there is one."""
    if not message.get("name"):
        return out
    name = checked_name(message["name"], f"{where}.name")
    return [dataclasses.replace(each, name=name) for each in out]

# %%
calling = {"role": "assistant", "reasoning": "Multiply.", "tool_calls": [
    {"id": "call_1", "type": "function", "function": {
        "name": "calculator", "arguments": '{"expression": "6*7"}'}}]}
plan = {"role": "assistant", "content": "Let me see.", "phase": "commentary"}
cut = {"role": "assistant", "content": None, "thinking": "Perhaps"}
for given in (calling, plan, cut):
    for message in _assistant(given, "messages[1]")[0]:
        print(message.channel, message.recipient, message.content)

# %% [markdown]
# Harmony has no ids: the model knows a result by its place behind the calls
# and by its function's name. With two calls of one function, results that
# arrive in another order would be swapped. So they wait until all are there,
# and are rendered in the order of the calls.

# %% tags=["export:chat/messages"]
class _OpenCalls:
    """Calls that wait for their answers, id -> function."""

    def __init__(self) -> None:
        self.to: dict[str, str] = {}
        self.answers: dict[str, Message] = {}

    @property
    def open(self) -> list[str]:
        return [id_ for id_ in self.to if id_ not in self.answers]

    def answer(self, message: Mapping, where: str) -> list[Message]:
        """Takes a tool's message; all answers once none is missing."""
        only_keys(message, ("role", "content", "tool_call_id", "name"), where)
        known, found = ", ".join(self.open), message.get("tool_call_id")
        expect(isinstance(found, str) and found in self.open,
               f"{where}.tool_call_id",
               f"the id of an open call ({known or 'there is none'})", found)
        to, name = self.to[found], message.get("name")
        expect(name in (None, "", to, to.removeprefix("functions.")),
               f"{where}.name", f"{to}, which was called", name)
        self.answers[found] = Message(
            "tool", content_text(message.get("content"), f"{where}.content"),
            "commentary", "assistant", name=to)
        if self.open:
            return []
        answers = [self.answers[id_] for id_ in self.to]
        self.to, self.answers = {}, {}
        return answers

# %% [markdown]
# The items of the Responses interface say the same in smaller pieces, one for
# each thought and each call:

# %% tags=["export:chat/messages"]
def _item(item: Mapping, where: str) -> Mapping:
    """A message, or an item of OpenAI's Responses interface as one."""
    kind = item.get("type") or "message"
    if kind == "message":
        return {key: item[key] for key in item if key != "type"}
    if kind == "reasoning":
        only_keys(item, ("type", "summary", "content"), where)
        pieces = [item.get(key) or [] for key in ("summary", "content")]
        expect(all(isinstance(each, list) for each in pieces), where,
               "lists as summary and content", pieces)
        return {"role": "assistant", "reasoning_details": sum(pieces, [])}
    if kind == "function_call":
        only_keys(item, ("type", "call_id", "name", "arguments"), where)
        return {"role": "assistant", "tool_calls": [
            {"id": item.get("call_id"), "function": {
                key: item.get(key) for key in ("name", "arguments")}}]}
    expect(kind == "function_call_output", f"{where}.type", "one of message,"
           " reasoning, function_call, function_call_output", kind)
    only_keys(item, ("type", "call_id", "output"), where)
    return {"role": "tool", "tool_call_id": item.get("call_id"),
            "content": item.get("output")}

# %% tags=["export:chat/messages"]
_SPEAKERS = ("system", "developer", "user", "assistant", "tool")


def _told(message: Mapping, where: str) -> Message:
    """What a system, developer or user message says."""
    role = message["role"]
    only_keys(message, ("role", "content") + ("name",) * (role == "user"),
              where)
    text = content_text(message.get("content"), f"{where}.content")
    return _named([Message(role, text)], message, where)[0]


def _next(item: Mapping, where: str, calls: _OpenCalls) -> list[Message]:
    """What a message adds to the conversation, in which `calls` wait."""
    message = _item(item, where)
    role = message.get("role")
    expect(role in _SPEAKERS, f"{where}.role",
           f"one of {', '.join(_SPEAKERS)}", role)
    if role == "tool":
        return calls.answer(message, where)
    more = item.get("type") == "function_call" and not calls.answers
    expect(more or not calls.open, f"{where}.role",
           f"'tool', to answer {', '.join(calls.open)}", role)
    if role != "assistant":
        return [_told(message, where)]
    out, made = _assistant(message, where)
    expect(not made.keys() & calls.to.keys(), f"{where}.call_id",
           "an id of its own", [*made])
    calls.to |= made
    return out

# %% tags=["export:chat/messages"]
def read_messages(messages: Sequence[object]) -> tuple[str, list[Message]]:
    """OpenAI's dicts as (instructions, harmony messages).

    Also objects that have `model_dump()`, and items of the Responses
    interface. Instructions: the text of the system and developer messages
    at the head; a later one stays where it is. Every call must be answered
    before anybody else speaks, and the user or a tool must have the last
    word. Raises ChatError naming the message's index and the key.
    """
    expect(isinstance(messages, list | tuple) and len(messages) > 0,
           "messages", "a list of at least one dict", messages)
    head, out, calls, heading = [], [], _OpenCalls(), True
    for n, item in enumerate(messages):
        item = as_dict(item, where := f"messages[{n}]")
        for message in _next(item, where, calls):
            told = message.role in ("system", "developer")
            heading = heading and told
            if heading:
                head.append(message.content)
            else:
                out.append(developer_message(message.content) if told
                           else message)
    last = _item(item, where).get("role")
    expect(last in ("user", "tool") and not calls.open, f"{where}.role",
           "the user or a tool to speak last" + (
                f" (not answered: {', '.join(calls.open)})"
                if calls.open else ""), last)
    return "\n\n".join(filter(None, head)), out



def call_ids(messages: Sequence[object]) -> list[str]:
    """The ids of all calls in `messages`, which are right."""
    dicts = [as_dict(each, "messages") for each in messages]
    return [as_dict(call, "tool_calls")["id"] for each in dicts
            for call in _item(each, "messages").get("tool_calls") or ()]

# %%
talk = [{"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Six times seven?"}, calling,
        {"role": "tool", "tool_call_id": "call_1", "content": "42"}]
print(read_messages(talk)[0], [m.role for m in read_messages(talk)[1]])
for wrong in ([*talk[:3], talk[1]], [*talk[:2], talk[3]], talk[:1],
              [{"role": "user", "text": "Hello"}],
              [*talk[:2], {"role": "assistant", "content": "It is"}]):
    try:
        read_messages(wrong)
    except ChatError as error:
        print(error)

# %% [markdown]
# The last refusal is a decision. Some interfaces take a final message of the
# assistant as a beginning that the model shall go on with. Rendered, that
# message has ended, and its author's next one would begin: the model would
# answer itself. We say so instead of guessing.
#
# Two results in the wrong order come out in the right one:

# %%
def ask(id_: str, city: str) -> dict:
    return {"type": "function_call", "call_id": id_, "name": "weather",
            "arguments": json.dumps({"city": city})}


both = [talk[1], ask("a", "Oslo"), ask("b", "Rome"),
        *({"type": "function_call_output", "call_id": id_, "output": text}
          for id_, text in (("b", "30 in Rome"), ("a", "3 in Oslo")))]
print([message.content for message in read_messages(both)[1][1:]])

# %% [markdown]
# ### A function's type hints as a schema
#
# The model is told the arguments of a function as TypeScript, made from a
# JSON schema (chapter 11), and writes them as JSON. Both directions follow
# the type hints: `json_schema` out, `fit` back in. Both are work that has
# been done: [pydantic](https://docs.pydantic.dev) knows every type that
# people put into hints. What is left to us is what it cannot know: how
# harmony shows a schema, and how a language model is told its mistake.
#
# First the way in. An object with fixed keys, which is what the arguments of
# a function are, becomes a `TypedDict` that takes no other keys and is
# *strict*: "3" is no number. Dataclasses go the same way, for they say what
# their keys are, and are made from them at the end.

# %% tags=["export:chat/schema"]
import dataclasses
import functools
import json
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence



_UNIONS = (typing.Union, types.UnionType)
_WRAPPERS = (typing.Required, typing.NotRequired)


def type_hints(owner: object, where: str) -> dict[str, object]:
    """The hints of a function or class; ChatError for one that fails."""
    try:
        return typing.get_type_hints(owner, include_extras=True)
    except RecursionError:
        raise
    except Exception as error:  # hints may be any text
        raise ChatError(f"{where}: {error}") from error


def _typed_keys(hint: object) -> tuple[dict[str, object], set[str]] | None:
    """Hints and required keys of a dataclass or TypedDict, else None."""
    from typing_extensions import is_typeddict

    if is_typeddict(hint):
        return type_hints(hint, hint.__name__), set(hint.__required_keys__)
    if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)
            ) or hasattr(hint, "__pydantic_core_schema__"):
        return None
    hints = type_hints(hint, hint.__name__)
    made = [field for field in dataclasses.fields(hint) if field.init]
    return ({field.name: hints[field.name] for field in made},
            {field.name for field in made
             if field.default is field.default_factory is
             dataclasses.MISSING})

# %%
@dataclasses.dataclass
class Place:
    city: str
    country: str | None = None


print(_typed_keys(Place), _typed_keys(int))

# %% tags=["export:chat/schema"]
def _record(name: str, hints: Mapping[str, object],
            required: Iterable[str]) -> type:
    """The type of a strict object with these keys, for pydantic."""
    from pydantic import ConfigDict
    from typing_extensions import NotRequired, TypedDict  # noqa: UP035

    made = TypedDict(name, {
        key: _strict(hint) if key in required else NotRequired[_strict(hint)]
        for key, hint in hints.items()})
    made.__pydantic_config__ = ConfigDict(strict=True, extra="forbid")
    return made


def _strict(hint: object) -> object:
    """`hint` with strict records for its dataclasses and TypedDicts, and
    the text in an Annotated as its description."""
    from pydantic import AfterValidator, Field

    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in _WRAPPERS:
        return _strict(inside[0])
    if (fields := _typed_keys(hint)) is not None:
        record = _record(hint.__name__, *fields)
        return (typing.Annotated[record, AfterValidator(
            lambda values: hint(**values))]
            if dataclasses.is_dataclass(hint) else record)
    if origin is typing.Annotated:
        first, *notes = inside
        return typing.Annotated[(_strict(first), *(
            Field(description=note) if isinstance(note, str) else note
            for note in notes))]
    changed = tuple(map(_strict, inside))
    if origin is typing.Literal or changed == inside:
        return hint
    return (typing.Union if origin in _UNIONS else origin)[changed]

# %% [markdown]
# Then the way out. pydantic's schema names every class once, under `$defs`,
# and refers to it; a choice is an `anyOf`, and an argument that may be left
# out with None has one with `null`. Harmony's TypeScript knows none of this
# (it writes `any`), but can say the same in other words: the class in its
# place, `oneOf` or a list of types, `nullable`. A pair becomes an array of
# what may stand in it. Only a type that contains itself cannot be said.

# %% tags=["export:chat/schema"]
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}
_FORMATS = {"date": "YYYY-MM-DD", "time": "HH:MM:SS", "duration":
            "ISO 8601, as PT1H30M", "date-time": "YYYY-MM-DDTHH:MM:SS"}


def _either(variants: Sequence[dict]) -> dict:
    """The schema of a choice; null among `variants` makes it nullable."""
    some = [each for each in variants if each != {"type": "null"}]
    some = [each for n, each in enumerate(some) if each not in some[:n]]
    if len(some) == 1:
        schema = some[0]
    elif some and all(list(each) == ["type"] for each in some):
        schema = {"type": [each["type"] for each in some]}
    else:
        schema = {"oneOf": some}
    nullable = {"type": "null"} in variants
    return schema | ({"nullable": True} if nullable else {})


def spelt(schema: dict, about: str | None = None) -> dict:
    """`schema` of an argument; the way to write a date in its description,
    which is `about` if it has none."""
    told, how = schema.get("description"), _FORMATS.get(schema.get("format"))
    told = (None if told == how else told) or about
    if how and not (told or "").endswith(f"({how})"):
        told = f"{told} ({how})" if told else how
    return schema | ({"description": told} if told else {})

# %% tags=["export:chat/schema"]
def _flat(schema: dict, defs: Mapping[str, dict], inside: tuple = ()
          ) -> dict:
    """pydantic's `schema` as harmony can show it; `inside`: the classes
    that it is a part of. RecursionError if it contains itself."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name in inside:
            raise RecursionError(name)
        own = {key: defs[name][key] for key in defs[name] if key != "title"}
        return _flat(own | {key: schema[key] for key in schema
                            if key != "$ref"}, defs, (*inside, name))
    flat = functools.partial(_flat, defs=defs, inside=inside)
    schema = {key: value for key, value in schema.items()
              if key != "discriminator" and (key, value) not in (
                  ("items", {}), ("additionalProperties", True))}
    for key in ("anyOf", "oneOf"):
        if key in schema:
            choice = _either([flat(each) for each in schema.pop(key)])
            schema = choice | schema
    if "prefixItems" in schema:
        schema["items"] = _either([flat(each) for each in
                                   schema.pop("prefixItems")])
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            schema[key] = flat(schema[key])
    if "properties" in schema:
        schema["properties"] = {
            key: spelt(_bare(flat(each)))
            for key, each in schema["properties"].items()}
    return _listed(schema)


def _bare(schema: dict) -> dict:
    """Without a default of None: that it may be left out says as much."""
    return {key: value for key, value in schema.items()
            if (key, value) != ("default", None)}


def _listed(schema: dict) -> dict:
    """A constant as an enum of one; the type of an enum's values."""
    if "const" in schema:
        schema = schema | {"enum": [schema.pop("const")]}
    if "enum" in schema and "type" not in schema:
        names = [_PLAIN.get(type(value)) for value in schema["enum"]]
        names = list(dict.fromkeys(filter(None, names)))
        schema["type"] = names[0] if len(names) == 1 else names
    return schema

# %% tags=["export:chat/schema"]
@functools.cache
def _schema_maker() -> type:
    """pydantic's maker of schemas, without what nobody has written."""
    from pydantic.json_schema import GenerateJsonSchema

    class Maker(GenerateJsonSchema):
        ignored_warning_kinds = {"skipped-choice",
                                 "non-serializable-default"}

        def field_title_should_be_set(self, schema) -> bool:
            return False

        def typed_dict_schema(self, schema) -> dict:
            made = super().typed_dict_schema(schema)
            made.pop("description", None)  # as of a dataclass
            return made
    return Maker


class ArgumentTypes:
    """JSON values of an object with the keys of `hints`."""

    def __init__(self, hints: Mapping[str, object], required: Iterable[str],
                 where: str) -> None:
        from pydantic import TypeAdapter

        try:
            self.adapter = TypeAdapter(_record("values", hints, required))
            schema = self.adapter.json_schema(
                schema_generator=_schema_maker())
            self.schema = _flat(schema, schema.get("$defs", {}))
        except ChatError:
            raise
        except RecursionError:
            raise ChatError(f"{where}: expected type hints that end, found "
                            "one that contains itself") from None
        except Exception as error:  # pydantic has many
            raise ChatError(f"{where}: expected type hints that JSON can "
                            f"hold, found {[*hints.values()]}") from error
        for key in ("title", "$defs"):
            self.schema.pop(key, None)
        self.schema.setdefault("properties", {})
        self.schema.setdefault("required", [])

# %% [markdown]
# `TypeAdapter` is pydantic's door for any type. On top of it the two
# directions for a single hint:

# %% tags=["export:chat/schema"]
def json_schema(hint: object, where: str = "hint") -> dict:
    """The JSON schema of a type hint, as harmony can show it.

    Whatever pydantic takes: plain types, Any, Literal, enums, Optional and
    unions, lists, tuples, sets, dicts, dates, dataclasses, TypedDict,
    models, and Annotated[hint, "what it is"]. Raises ChatError at `where`
    for anything else, and for a type that contains itself.
    """
    schema = ArgumentTypes({"value": hint}, ["value"], where).schema
    return schema["properties"]["value"]

# %%
import datetime
import enum
import typing


class Unit(enum.Enum):
    CELSIUS = "celsius"
    KELVIN = "kelvin"


for hint in (Unit | None, list[int | str], tuple[datetime.date, int], Place):
    print(json_schema(hint))
try:
    json_schema(list[typing.Iterator], "weather.places")
except ChatError as error:
    print(str(error)[:64])

# %% [markdown]
# Back again: a value that the model wrote becomes what the hint says, or the
# model is told in one line which argument is wrong, what was expected there
# and what was found. pydantic reports every branch of a choice by itself, at
# a place with names that the model has never seen; we walk the value along
# that place, so that only keys that were written remain.

# %% tags=["export:chat/schema"]
_WANTED = {
    "missing": "a value", "none_required": "null", "bool_type": "a boolean",
    **dict.fromkeys(("int_type", "int_from_float"), "an integer"),
    "float_type": "a number", "string_type": "a string",
    **dict.fromkeys(("list_type", "tuple_type", "set_type",
                     "frozen_set_type"), "an array"),
    **dict.fromkeys(("dict_type", "model_type", "mapping_type"),
                    "an object"),
    **dict.fromkeys(("extra_forbidden", "unexpected_keyword_argument"),
                    "no keys but")}


def _place(value: object, way: Sequence[object], missing: bool
           ) -> tuple[str, Sequence[object]]:
    """Where `way` leads in `value`, written behind its name; the keys."""
    place, keys = "", []
    for n, step in enumerate(way):
        if isinstance(value, dict) and step in value:
            place, value = f"{place}.{step}", value[step]
        elif (isinstance(value, list) and isinstance(step, int)
              and step < len(value)):
            place, value = f"{place}[{step}]", value[step]
        elif missing and n == len(way) - 1:
            place += f".{step}"
        else:
            continue  # the name of a branch
        keys.append(step)
    return place, keys


def _known_keys(schema: dict, keys: Sequence[object]) -> str:
    """The keys of the object at the end of `keys`, if that is certain."""
    for key in keys:
        schema = (schema.get("properties", {}).get(key) or schema.get("items")
                  or schema.get("additionalProperties") or {})
    return ", ".join(schema.get("properties", ())) or "those of its type"

# %% tags=["export:chat/schema"]
def _fault(fault: Mapping, value: object, schema: dict
           ) -> tuple[str, str, object]:
    """Place, what was expected there, what was found."""
    kind, way, found = fault["type"], fault["loc"], fault["input"]
    wanted = _WANTED.get(kind)
    if wanted == "no keys but":
        place, keys = _place(value, way[:-1], False)
        known = _known_keys(schema, keys) if schema["properties"] else "none"
        return place, f"{wanted} {known}", way[-1]
    if kind == "missing":
        found = None
    message = fault["msg"].removeprefix("Input should be ")
    if message == fault["msg"]:  # of a validator of the type's own
        message = f"a value that fits ({message})"
    return _place(value, way, kind == "missing")[0], wanted or message, found


def fit_values(types_: ArgumentTypes, value: object, where: str,
               skip: str = "") -> dict:
    """JSON `value` as the types say; ChatError names what does not fit,
    `where` and its place there without `skip`."""
    from pydantic import ValidationError

    try:
        return types_.adapter.validate_json(json.dumps(_whole(value)))
    except ValidationError as error:
        faults: dict[tuple[str, str], list[str]] = {}
        for each in error.errors(include_url=False):
            place, wanted, found = _fault(each, value, types_.schema)
            shown = "nothing" if found is None else reprlib.repr(found)
            faults.setdefault((place, shown), []).append(wanted)
    raise ChatError("; ".join(
        f"{where}{place.removeprefix(skip)}: expected "
        f"{' or '.join(dict.fromkeys(wanted))}, found {shown}"
        for (place, shown), wanted in list(faults.items())[:3]))

# %% tags=["export:chat/schema"]
def _whole(value: object) -> object:
    """`value` with 3.0 as 3: to JSON both are integers."""
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_whole, value))
    whole = isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def fit(value: object, hint: object, where: str = "arguments") -> object:
    """JSON `value` as `hint` says: dataclasses made, 3.0 an int.

    The inverse of what `json_schema` allows. Raises ChatError at `where`.
    """
    types_ = ArgumentTypes({"value": hint}, ["value"], where)
    return fit_values(types_, {"value": value}, where, ".value")["value"]

# %%
print(fit([1, 2.0], list[int]), fit(3, float | None), fit(None, str | None))
print(fit({"city": "Oslo"}, Place), fit("kelvin", Unit))
for value, hint in ((True, int), (["a", 1], list[str]), ("x", int | Place),
                    ("hot", Unit), ("June", datetime.date)):
    try:
        fit(value, hint)
    except ChatError as error:
        print(error)

# %% [markdown]
# ### Tools
#
# A Python function is described by its name, docstring and hints, and called
# when the model asks for it. Whatever goes wrong in a call is told to the
# model in words: it wrote the call, and may write a better one.

# %% tags=["export:chat/tools"]
import dataclasses
import functools
import inspect
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from gptoss.text.typescript import Tool



_log = logging.getLogger("gptoss")
_SECTION = re.compile(r"^(Args|Arguments|Returns|Raises|Yields|Examples?):"
                      r"[ \t]*$", re.MULTILINE)
_ARGUMENT = re.compile(r"^[ \t]+(\w+)(?: *\([^)]*\))?: *"
                       r"(.+(?:\n[ \t]{6,}\S.*)*)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class FunctionTool:
    """A tool, and how it is run; run None: the caller of the chat does."""

    spec: Tool
    run: Callable[[str], str] | None = None


def _docs(function: Callable) -> tuple[str, dict[str, str]]:
    """What a docstring says of the function and, under Args, of each."""
    about, *rest = _SECTION.split(inspect.getdoc(function) or "")
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    listed = sections.get("Args") or sections.get("Arguments") or ""
    return about.strip(), {name: " ".join(text.split()) for name, text
                           in _ARGUMENT.findall(listed)}

# %% [markdown]
# Name, docstring and hints of a `functools.partial` are those of the function
# inside, and those of an object that can be called are its `__call__`'s. The
# arguments that a partial has filled in are hidden: one of them may be a
# password.

# %% tags=["export:chat/tools"]
def _inner(function: Callable) -> Callable:
    """What has the hints and the docstring of `function`."""
    while isinstance(function, functools.partial):
        function = function.func
    return (function if inspect.isroutine(function)
            else type(function).__call__)


def _tool_name(function: object, name: str | None) -> str:
    """`name`, or the function's; ChatError says why there is none."""
    expect(callable(function), "tools", "a function or a dict", function)
    expect(not isinstance(function, type), "tools", "a function, not a "
           "class", function)
    while isinstance(function, functools.partial):
        function = function.func
    own = getattr(function, "__name__", type(function).__name__)
    expect(name is not None or own != "<lambda>", "tools", "a function with "
           "a name, which a lambda has not: use def", own)
    return checked_name(own if name is None else name,
                        "tools, name of a function")


def _hints(function: Callable, name: str
           ) -> tuple[dict[str, object], dict[str, object]]:
    """The hint of each argument, and the defaults; ChatError without."""
    hints, given = type_hints(_inner(function), f"tool {name}"), function
    filled: set[str] = set()
    while isinstance(given, functools.partial):
        filled |= given.keywords.keys()
        given = given.func
    try:
        asked = inspect.signature(function).parameters
    except ValueError as error:  # as of many that are written in C
        raise ChatError(f"tool {name}: {error}") from error
    asked = {key: asked[key] for key in asked if key not in filled}
    for key, argument in asked.items():
        expect(argument.kind in (argument.POSITIONAL_OR_KEYWORD,
                                 argument.KEYWORD_ONLY),
               f"tool {name}, {key}",
               "an argument that can be given by name", str(argument))
        expect(key in hints, f"tool {name}, {key}", "a type hint", None)
    return {key: hints[key] for key in asked}, {
        key: argument.default for key, argument in asked.items()
        if argument.default is not argument.empty}

# %%
def weather(city: str, unit: typing.Literal["celsius", "kelvin"] = "celsius"
            ) -> dict:
    """The weather in a city now.

    Args:
        city: its name, in English
    """
    return {"city": city, "temperature": 21 if unit == "celsius" else 294}


print(_docs(weather), list(_hints(weather, "weather")[0]))
warm = functools.partial(weather, unit="kelvin")
print(_tool_name(warm, None), list(_hints(warm, "weather")[0]))

# %% tags=["export:chat/tools"]
def _jsonable(value: object, unknown: Callable | None = None) -> object:
    """`value` in terms of JSON; `unknown` is for what has none."""
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value, fallback=unknown)


def result_text(value: object) -> str:
    """What a function returned, for the model: text, or else JSON."""
    if isinstance(value, Iterator):
        value = list(value)
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError):
            try:
                value = json.dumps(_jsonable(value, str), ensure_ascii=False)
            except (TypeError, ValueError):  # as a list that holds itself
                value = str(value)
    return value.encode("utf-8", "replace").decode("utf-8")


def _why(error: BaseException) -> str:
    """An exception in a line for the model; its str() may fail."""
    try:
        text = str(error)
    except Exception:
        text = ""
    kind = "" if isinstance(error, ChatError) else type(error).__name__
    return "error: " + ": ".join(filter(None, (kind, text)))

# %%
print(result_text({"when": datetime.date(2025, 6, 28), "unit": Unit.KELVIN}))
print(_why(KeyError("no such city")))

# %% [markdown]
# A function that is `async` gives something to be awaited, and so may a
# partial of one, which nobody can see beforehand. So we call, look, and await
# what must be awaited on an event loop of its own. If a loop is already
# running here, as in a server or a notebook, a second one cannot, in this
# thread: then it runs in another.
#
# A tool that hangs would hang the turn. `tool_timeout` limits it, at a price
# that should be known. Python can cancel a coroutine where it awaits, but it
# cannot end a thread: a plain function that is late is *left alone*. It goes
# on in its thread until it returns, whatever it still does is done, and its
# result is dropped. So it should have time limits of its own, too.

# %% tags=["export:chat/tools"]
class ToolTimeout(Exception):
    """A tool has not answered in time."""


def _in_thread(work: Callable[[], object], timeout: float | None) -> object:
    """work(), in a thread that is left alone after `timeout` seconds."""
    import contextvars
    from queue import Empty, SimpleQueue
    from threading import Thread

    done: SimpleQueue = SimpleQueue()

    def run() -> None:
        try:
            done.put((work(), None))
        except BaseException as error:
            done.put((None, error))

    Thread(target=contextvars.copy_context().run, args=(run,), daemon=True,
           name="gptoss tool").start()
    try:
        value, error = done.get(timeout=timeout)
    except Empty:
        raise ToolTimeout(f"timed out after {timeout:g} s") from None
    if error is not None:
        raise error
    return value


async def _awaited(value: object, timeout: float | None) -> object:
    """What `value` comes to; cancelled after `timeout` seconds."""
    import asyncio

    task = asyncio.ensure_future(value)
    await asyncio.wait({task}, timeout=timeout)
    if not task.done():  # it is cancelled when its loop ends
        raise ToolTimeout(f"timed out after {timeout:g} s")
    return task.result()

# %% tags=["export:chat/tools"]
def perform(function: Callable, values: Mapping[str, object],
            timeout: float | None = None) -> object:
    """function(**values), awaited if need be.

    In a thread if there is a `timeout`, else here. Raises ToolTimeout, and
    whatever the function raises.
    """
    import asyncio

    def work() -> object:
        value = function(**values)
        if not inspect.isawaitable(value):
            return value

        def wait() -> object:
            return asyncio.run(_awaited(value, timeout))

        return _in_thread(wait, timeout) if _loop_runs() else wait()
    return work() if timeout is None else _in_thread(work, timeout)


def _loop_runs() -> bool:
    """Whether this thread is inside an event loop."""
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True

# %%
import asyncio


async def slow(seconds: float) -> str:
    """Sleeps."""
    await asyncio.sleep(seconds)
    return "awake"


print(perform(slow, {"seconds": 0}))  # although a notebook has its own loop
try:
    perform(slow, {"seconds": 60}, timeout=0.1)
except ToolTimeout as error:
    print(error)

# %% tags=["export:chat/tools"]
def _not_json(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _describe(function: Callable, name: str, types_: ArgumentTypes,
              defaults: Mapping[str, object]) -> Tool:
    """A function as it is told to the model."""
    about, told = _docs(function if inspect.isroutine(function)
                        else _inner(function))
    schema = dict(types_.schema)
    schema["properties"] = {
        key: spelt(entry, told.get(key))
        for key, entry in schema["properties"].items()}
    for key, default in defaults.items():
        entry = schema["properties"][key]
        try:
            default = _jsonable(default)
        except Exception:  # no JSON has it: the model need not know
            continue
        if isinstance(default, str | int) or (
                isinstance(default, float) and math.isfinite(default)):
            entry.setdefault("default", default)
    return Tool(name, about, schema if schema["properties"] else None)

# %% tags=["export:chat/tools"]
def function_tool(function: Callable, *, name: str | None = None,
                  timeout: float | None = None) -> FunctionTool:
    """A Python function with type hints as a tool; see `json_schema`.

    Also an async one, a partial, a bound method, an object that can be
    called. name: instead of its own. timeout: seconds that it may take; one
    that is late goes on in its thread, and its result is dropped. What it
    raises is told to the model, and logged with a traceback as "gptoss".
    """
    name = _tool_name(function, name)
    hints, defaults = _hints(function, name)
    for key, hint in hints.items():  # so that an error names the argument
        json_schema(hint, f"tool {name}, {key}")
    types_ = ArgumentTypes(hints, hints.keys() - defaults.keys(),
                           f"tool {name}")

    def run(arguments: str) -> str:
        try:
            values = fit_values(types_, json.loads(
                arguments.strip() or "{}", parse_constant=_not_json),
                "arguments")
        except Exception as error:  # the model's own mistake
            return result_text(_why(error))
        try:
            return result_text(perform(function, values, timeout))
        except ToolTimeout as error:
            _log.warning("gptoss: tool %s %s; its thread goes on", name,
                         error)
            return f"error: {error}"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: it is the tool's
            _log.error("gptoss: tool %s failed", name, exc_info=error)
            return result_text(_why(error))
    return FunctionTool(_describe(function, name, types_, defaults), run)

# %%
tool = function_tool(weather)
print(developer_message(tools=[tool.spec]).content)
for arguments in ('{"city": "Oslo"}', '{"city": 7}', '{"town": "Oslo"}',
                  "Oslo"):
    print(tool.run(arguments))

# %% [markdown]
# Richer hints are shown as a reader of TypeScript expects them:

# %%
def trip(places: list[Place], start: datetime.date, unit: Unit = Unit.KELVIN,
         days: tuple[int, int] | None = None) -> str:
    """Plans a trip.

    Args:
        start: when it begins
    """
    return f"{places[0].city}, {start:%d.%m.}, {unit.name}"


tool = function_tool(trip)
print(developer_message(tools=[tool.spec]).content.split("\n\n", 2)[2])
print(tool.run('{"places": [{"city": "Oslo"}], "start": "2025-06-28"}'))
print(tool.run('{"places": [{"town": "Oslo"}], "start": "today"}'))

# %% tags=["export:chat/tools"]
def _dict_tool(given: object, where: str) -> Tool:
    """A tool that a dict describes, in either of OpenAI's shapes."""
    given = as_dict(given, where)
    expect(given.get("type", "function") == "function", f"{where}.type",
           "'function' (built-in tools are not run here)",
           given.get("type"))
    if "name" not in given or "function" in given:  # not the flat one
        only_keys(given, ("type", "function"), where)
        where = f"{where}.function"
        given = as_dict(given.get("function"), where)
    only_keys(given, ("type", "name", "description", "parameters", "strict"),
              where)
    name, schema = given.get("name"), given.get("parameters")
    checked_name(name, f"{where}.name")
    expect(isinstance(schema, Mapping | None), f"{where}.parameters",
           "a JSON schema", schema)
    try:
        json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatError(f"{where}.parameters: expected JSON, found "
                        f"{error}") from None
    return Tool(name, content_text(given.get("description") or "",
                                   f"{where}.description"), schema)


def read_tools(tools: Iterable[object], timeout: float | None = None
               ) -> dict[str, FunctionTool]:
    """Functions, tools and dicts by their name.

    A dict is {"type": "function", "function": {"name", "description",
    "parameters"}}, or flat: {"type": "function", "name", ...}. timeout: of
    the functions. Raises ChatError for another shape, a built-in tool, or a
    name used twice.
    """
    read: dict[str, FunctionTool] = {}
    for n, given in enumerate(tools):
        if isinstance(given, FunctionTool):
            tool = given
        elif isinstance(given, Mapping) or (hasattr(given, "model_dump")
                                            and not callable(given)):
            tool = FunctionTool(_dict_tool(given, f"tools[{n}]"))
        else:
            tool = function_tool(given, timeout=timeout)
        expect(tool.spec.name not in read, f"tools[{n}]",
               "a name of its own", tool.spec.name)
        read[tool.spec.name] = tool
    return read

# %%
clock = {"type": "function", "function": {"name": "clock"}}
flat = {"type": "function", "name": "flat_clock"}
print({name: tool.run is None
       for name, tool in read_tools([weather, clock, flat]).items()})
for wrong in ({"type": "web_search"}, lambda: 1, int):
    try:
        read_tools([wrong])
    except ChatError as error:
        print(error)

# %% [markdown]
# ### Two tools that can do no harm
#
# A calculator must not be `eval`. This one reads the syntax tree, knows
# numbers and seven operators, computes in exact fractions, and refuses what
# would take long.

# %% tags=["export:chat/calculator"]
import ast
import datetime
import warnings
from decimal import Context, Decimal, Inexact
from fractions import Fraction

_BITS = 1024  # of numerator and denominator: about 300 digits
_BINARY = {ast.Add: Fraction.__add__, ast.Sub: Fraction.__sub__,
           ast.Mult: Fraction.__mul__, ast.Div: Fraction.__truediv__,
           ast.FloorDiv: Fraction.__floordiv__, ast.Mod: Fraction.__mod__}


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(),
           value.denominator.bit_length()) > _BITS:
        raise ValueError("a number of more than 300 digits")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("** takes whole exponents only")
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if (size - 1) * abs(exponent.numerator) > _BITS:
        raise ValueError("a number of more than 300 digits")
    return base ** exponent.numerator

# %% tags=["export:chat/calculator"]
def _evaluate(node: ast.expr, source: str) -> Fraction:
    """The exact value of a syntax tree of numbers and operators."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        text = ast.get_source_segment(source, node)
        number = (Decimal(node.value) if type(node.value) is int
                  else Decimal(text))  # as written: 0.1 is a tenth
        if abs(number.adjusted()) > 300:
            raise ValueError("a number of more than 300 digits")
        return Fraction(number)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op,
                                                    ast.USub | ast.UAdd):
        value = _evaluate(node.operand, source)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in {*_BINARY, ast.Pow}:
        run = _BINARY.get(type(node.op), _power)
        return _bounded(Fraction(run(_evaluate(node.left, source),
                                     _evaluate(node.right, source))))
    raise ValueError("expected numbers, + - * / // % ** and parentheses, "
                     f"found {ast.unparse(node)[:40]!r}")

# %%
print(_evaluate(ast.parse("0.1 + 0.2", mode="eval").body, "0.1 + 0.2"))

# %% tags=["export:chat/calculator"]
def _decimal(value: Fraction) -> str:
    """Exact if that ends within 300 digits, else 15 digits and "..."."""
    context = Context(prec=700)  # 309 digits before the point, 300 behind
    exact = context.divide(Decimal(value.numerator),
                           Decimal(value.denominator))
    if context.flags[Inexact] or exact.as_tuple().exponent < -300:
        return f"{float(value):.15g}..."
    return f"{exact:f}"

# %% tags=["export:chat/calculator"]
def calculator(expression: str) -> str:
    """Work out an arithmetic expression.

    Args:
        expression: what to work out
    """
    text = expression.strip()  # + - * / // % ** and parentheses
    try:
        if len(text) > 300:
            raise ValueError("more than 300 characters")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, about spelling
            tree = ast.parse(text, mode="eval")
        return _decimal(_evaluate(tree.body, text))
    except ZeroDivisionError:
        return "error: division by zero"
    except SyntaxError as error:
        return f"error: {error.msg}"
    except (ValueError, ArithmeticError, MemoryError,
            RecursionError) as error:
        return f"error: {error or 'too deeply nested'}"


def today() -> str:
    """The date of today."""
    return datetime.date.today().isoformat()


TOOLS = {"calculator": calculator, "today": today}

# %%
for text in ("347 * 285", "0.1 + 0.2", "-7 // 2", "2 ** -3", "10 / 3",
             "9 ** 9 ** 9", "1 / 0", "__import__('os')", "2 +"):
    print(f"{text:16}  {calculator(text)}")

# %% [markdown]
# ### The cache and the tokens in it
#
# `PrefixCache` joins a cache to the list of tokens that went into it, and
# does what the derivation says: keep the common beginning, roll back, feed
# the rest. It stays right if it is left at any point, because the list is
# extended before a token is fed, and the cache knows how far it came.

# %% tags=["export:chat/memory"]
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch


from gptoss.model.transformer import GptOss

SLACK = 1024  # ring slots beyond the window; no longer turn needs a replay


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at the beginning of `a` and `b` are the same."""
    for n, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return n
    return min(len(a), len(b))

# %% tags=["export:chat/memory"]
class PrefixCache:
    """A cache of batch 1 and the tokens whose keys and values it holds.

    `slack`: slots of the rings beyond the window; so many tokens plus one
    can be taken back without feeding older ones again.
    """

    def __init__(self, model: GptOss, slack: int = 0) -> None:
        self.model = model
        self.cache = model.new_cache(slack=slack)
        self.tokens: list[int] = []  # fed, or to be fed next
        self.fed = 0  # tokens fed so far that were not written here
        self.left = 0  # tokens of the prompt that are still to be fed
        self._full = 0  # tokens that the full layers hold, if that is more

    def resume(self, prompt: Sequence[int]) -> int:
        """Keep what the cache shares with `prompt`; return where to feed
        from. At least the last token is fed: its logits are needed."""
        held = max(self.cache.length, self._full)
        shared = min(common_prefix(prompt, self.tokens[:held]),
                     len(prompt) - 1)
        start = self.cache.rollback(shared)
        self.tokens, self._full = list(prompt), shared
        return start

    def __repr__(self) -> str:
        return f"PrefixCache({len(self.tokens):,} tokens)"

    def write(self, prompt: Sequence[int],
              options: SamplingOptions | None = None, **changes: Any
              ) -> Iterator[int | None]:
        """`generate` after `prompt`, feeding only what must be fed; with
        its pauses, after which `self.left` tokens are still to be fed."""
        start = self.resume(prompt)
        self.left = len(prompt) - start
        for token in generate(self.model, prompt[start:], options,
                              cache=self.cache, pauses=True, **changes):
            left = len(prompt) - self.cache.length if token is None else 0
            self.fed, self.left = self.fed + self.left - left, left
            if token is not None:
                self.tokens.append(token)
            yield token

# %%
prefix, prompt = PrefixCache(model), tokenizer.encode(opening)
first = list(prefix.write(prompt, max_new_tokens=30, temperature=0))
for written in (first, first[:9]):  # nothing is new; only the end is gone
    print(prefix.resume(prompt + written), "of", len(prompt + written), "kept")

# %% [markdown]
# ### What belongs to one conversation
#
# A model that weighs 13.8 GB should serve many conversations. So what one
# conversation remembers stands apart from what all of them share: a
# `Session` has the tokens in its cache, the state of its random numbers, and
# its last turn. Model, tokenizer, tools and options are none of its business.

# %% tags=["export:chat/memory"]
class Session:
    """What one conversation remembers.

    prefix: its cache, and the tokens in it. turn: its last `Turn`, or None.
    seed: of the seeds of its rounds; None: they come from torch's numbers.
    """

    def __init__(self, model: GptOss, slack: int = SLACK,
                 seed: int | None = None) -> None:
        self.prefix = PrefixCache(model, slack)
        self.turn: Any = None
        self._random = None if seed is None else random.Random(seed)

    def __repr__(self) -> str:
        return f"Session({len(self.prefix.tokens):,} tokens)"

    def next_seed(self) -> int:
        """Of the next round. Of several processes all draw one, so that
        torch's numbers stay alike."""
        return (torch.randint(2 ** 48, ()).item() if self._random is None
                else self._random.getrandbits(48))

# %%
print([Session(model, seed=7).next_seed() % 1000 for _ in range(2)])

# %% [markdown]
# ### What all conversations share
#
# The other half: how hard the model shall think, its tools, what it is told
# before everything else, and how its words are drawn. They make the messages
# at the head of a prompt. Settings do not change; `with_changes` makes new
# ones, checked like the first.

# %% tags=["export:chat/settings"]
import dataclasses
from collections.abc import Mapping
from typing import Any


from gptoss.text.harmony import (
    EFFORTS,
    Message,
    developer_message,
    system_message,
)





@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a chat is asked, whoever speaks to it.

    tools: by name. date: "" or None for none. sampling: of a whole turn;
    what stands in its `stop` is not read. rounds: calls run in one turn.
    slack: see `PrefixCache`. Raises ChatError, which names the option.
    """

    effort: str = "medium"
    tools: Mapping[str, FunctionTool] = dataclasses.field(
        default_factory=dict)
    instructions: str = ""
    date: str | None = None
    sampling: SamplingOptions = SamplingOptions(max_new_tokens=None)
    rounds: int = 8
    slack: int = SLACK

    def __post_init__(self) -> None:
        for name in ("rounds", "slack"):
            value = getattr(self, name)
            expect(type(value) is int and value >= 0, name,
                   "an integer >= 0", value)
        expect(self.effort in EFFORTS, "effort",
               f"one of {', '.join(EFFORTS)}", self.effort)
        for name, text in (("instructions", self.instructions),
                           ("date", "" if self.date is None else self.date)):
            object.__setattr__(self, name, content_text(text, name))

    def with_changes(self, **changes: Any) -> "Settings":
        """These settings but for `changes`; those of `sampling` by their
        own names. TypeError for an unknown one."""
        own = {field.name for field in dataclasses.fields(self)}
        inner = {name: changes.pop(name) for name in [*changes]
                 if name not in own}
        sampling = changes.pop("sampling", self.sampling)
        return dataclasses.replace(
            self, sampling=sampling.with_changes(**inner), **changes)

    def head(self, instructions: str = "") -> list[Message]:
        """The system message and, if it says anything, the developer's."""
        tools = [tool.spec for tool in self.tools.values()]
        text = "\n\n".join(filter(None, (self.instructions, instructions)))
        both = (system_message(self.effort, self.date or None, bool(tools)),
                developer_message(text, tools))
        return [message for message in both if message.content]

# %%
usual = Settings(date="2025-06-28", tools=read_tools([weather]))
changed = usual.with_changes(effort="high", temperature=0)
print(usual.effort, usual.sampling.temperature, "->",
      changed.effort, changed.sampling.temperature)
print(changed.head()[0].content)
try:
    usual.with_changes(effort="utmost")
except ChatError as error:
    print(error)

# %% [markdown]
# ### Several processes, one decision
#
# A large model may be spread over several processes, each of which runs the
# whole program with its part of the weights (chapter 15). Then they must do
# the same forwards, in the same order, with the same tokens. Arithmetic sees
# to it that all have the same logits. Nothing sees to the rest: a tool that
# sends a mail would send one from each process; its answer may differ, as the
# clock does; one process may be left by its user while the others wait for
# its part of a sum, for ever.
#
# So whatever is not arithmetic is found out by the first process, and told to
# the others: the date, the prompt, the seed of a round, the answer of a tool,
# and before every forward whether the turn goes on. The model's `group` says
# how. A model in one process has none, and every question is its own answer.

# %% tags=["export:chat/agreement"]
from collections.abc import Callable


class SingleProcess:
    """The group of a process by itself; see chapter 15 for another."""

    first = True

    def same(self, make: Callable[[], object]) -> object:
        """make() of the first process, as JSON has it, for all."""
        return make()


class Stopped(Exception):
    """The first process goes no further with this turn."""


class Agreement:
    """What the processes of a model ask the first while a turn lasts."""

    def __init__(self, group: SingleProcess) -> None:
        self._group, self.open = group, True

    def ask(self, make: Callable[[], object]) -> object:
        """make() of the first process. What it raises ends the turn: that
        is raised there, and Stopped by the others."""
        failed: list[BaseException] = []

        def word() -> list:
            try:
                return [make()]
            except BaseException as error:
                failed.append(error)
                return []

        told = self._group.same(word)
        self.open = bool(told)
        if failed:
            raise failed[0]
        if not told:
            raise Stopped
        return told[0]

    def leave(self) -> None:
        """The first process leaves, and the others at their next question;
        they cannot leave first."""
        if self.open and self._group.first:
            self.open = False
            self._group.same(list)

# %% [markdown]
# Two threads for two processes, each with its own idea; the second one learns
# what the first has found, and that it has left:

# %%
import queue
import threading


class Told:
    """A group of two threads."""

    def __init__(self, first: bool, wire: queue.SimpleQueue) -> None:
        self.first, self.wire = first, wire

    def same(self, make):
        if not self.first:
            return self.wire.get()
        self.wire.put(word := make())
        return word


def decide(first: bool, idea: str) -> None:
    agreement = Agreement(Told(first, wire))
    told[idea] = agreement.ask(lambda: idea)
    try:
        agreement.leave()
        told[idea] += ", " + agreement.ask(lambda: "more")
    except Stopped:
        told[idea] += ", stopped"


wire, told = queue.SimpleQueue(), {}
other = threading.Thread(target=decide, args=(False, "stay"))
other.start()
agreement = Agreement(Told(True, wire))
told["go"] = agreement.ask(lambda: "go")
agreement.leave()
other.join()
print(told)

# %% [markdown]
# ### What happened
#
# A chat tells what happens as a stream of events; a user interface maps
# each kind to something it draws.

# %% tags=["export:chat/turn"]
import dataclasses
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator

from gptoss.text.harmony import CHANNELS, Message, render
from gptoss.text.parser import (
    Delta,
    Event,
    Malformed,
    Opened,
    StreamParser,
    ToolCall,
)
from gptoss.text.tokenizer import Tokenizer







@dataclasses.dataclass(frozen=True)
class Usage:
    """What a turn took.

    finish_reason: "stop", "length" or "tool_calls"; "stopped" if it was
    left before its end. prompt_tokens: of the conversation before it.
    prefilled_tokens: how many of these, and of the answers of tools, had to
    be fed. generated_tokens: written by the model. seconds: wall time.
    """

    finish_reason: str
    prompt_tokens: int
    prefilled_tokens: int
    generated_tokens: int
    seconds: float

# %% tags=["export:chat/turn"]
@dataclasses.dataclass(frozen=True)
class ChatEvent:
    """One thing that happened in a turn.

    kind "analysis", "commentary", "final": `text` is the next piece of what
    the model writes there. "call": it calls tool `name` with the JSON in
    `text`; "result": what that gave. "notice": something was wrong with
    its output. "done": the end; `usage` is set, `text` the finish reason.
    "progress", for who asks: a part of the prompt was read, `text` is how
    many tokens are left to read.
    """

    kind: str
    text: str = ""
    name: str = ""
    usage: Usage | None = None

# %% [markdown]
# ### A round
#
# A turn with a call has two rounds of writing, before and after its result.
# A round ends with a call, with the answer, or where the tokens do. If the
# model begins to write the user's next message, that is not part of it.
#
# What it writes is kept message by message, in order. A message on a channel
# that does not exist (a mistyped `analyis`, say) is taken for analysis: a
# reader may miss something then, but never sees reasoning as the answer.

# %% tags=["export:chat/turn"]
class Round:
    """What the model writes after a prompt, up to a call or its answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._parser = StreamParser(tokenizer, role="assistant")
        self.said: list[list[str]] = []  # messages to no tool: channel, text
        self._to: str | None = None  # recipient of the message in progress
        self.call: ToolCall | None = None
        self.kept: list[dict] = []  # the call and its answer, for the history
        self.over = False  # what follows is not part of the round

    def feed(self, token: int) -> list[ChatEvent]:
        """The events that `token` causes."""
        return list(self._read(self._parser.feed(token)))

    def close(self) -> list[ChatEvent]:
        """The events that the end of the tokens causes."""
        return list(self._read(self._parser.close()))

    def text(self, channel: str) -> str:
        """All that was written in `channel` so far."""
        return "\n\n".join(text for where, text in self.said
                           if where == channel and text)

    def _read(self, events: Iterable[Event]) -> Iterator[ChatEvent]:
        for event in events:
            if isinstance(event, Opened):
                yield from self._opened(event.message)
            elif isinstance(event, Malformed):
                about = f": {event.text[:60]!r}" if event.text else ""
                yield ChatEvent("notice", event.reason + about)
            elif isinstance(event, ToolCall) and self.call is None:
                self.call, self.over = event, True
            elif isinstance(event, Delta) and self._to is None:
                self.said[-1][1] += event.text
                yield ChatEvent(self.said[-1][0], event.text)

    def _opened(self, message: Message) -> Iterator[ChatEvent]:
        self._to = message.recipient
        if message.role != "assistant":
            self._to, self.over = "nobody", True
            yield ChatEvent("notice", f"a message of {message.role!r}, "
                                      "written by the model")
        if self._to is None:
            kind = ("final" if message.channel is None else message.channel
                    if message.channel in CHANNELS else "analysis")
            if self.text(kind):  # a second one
                yield ChatEvent(kind, "\n\n")
            self.said.append([kind, ""])

# %%
wrote = [Message("assistant", "Six sevens.", "analysis"),
         Message("assistant", "Multiplied:", "commentary"),
         Message("assistant", "Check.", "analyis"),
         Message("assistant", "42", "final")]
reply = Round(tokenizer)
for n in render(tokenizer, wrote, reply=False, drop="none")[2:]:
    for event in reply.feed(n):
        print(event.kind, repr(event.text), end="; ")
print(reply.text("final"))

# %% [markdown]
# For the history a round becomes dicts as `read_messages` takes them, in the
# same order and with the same borders between messages. So the next prompt
# has the tokens that are in the cache, except for what it drops. A round
# without an answer gives no content: what came of the thinking stays, and an
# empty answer is not made up.

# %% tags=["export:chat/turn"]
def round_messages(round_: Round) -> list[dict]:
    """A round as OpenAI's dicts: what the assistant thought, said (marked
    `phase: "commentary"` if that was not the answer) and called, and the
    tool's answer if there is one. [] if nothing was written."""
    calls, answers, out = round_.kept[:1], round_.kept[1:], []
    open_ = None  # the dict that may still get a content, or calls
    for channel, text in round_.said:
        if not text:
            continue
        if channel == "analysis" or open_ is None or open_["content"]:
            open_ = {"role": "assistant", "content": None}
            out.append(open_)
        if channel == "analysis":
            open_["reasoning"] = text
        else:
            open_["content"] = text
        if channel == "commentary":
            open_["phase"] = channel
    if calls and (open_ is None or (open_["content"]
                                    and "phase" not in open_)):
        open_ = {"role": "assistant", "content": None}
        out.append(open_)
    if calls:
        open_.pop("phase", None)  # before a call it goes without saying
        open_["tool_calls"] = calls
    return out + answers

# %%
for message in round_messages(reply):
    print(message)

# %% [markdown]
# ### A turn
#
# Write a round; if it ended with a call, run it, append the answer and go
# on; else the turn is over. The three stop tokens are found by name.
#
# A turn can be left between any two events: whoever reads them stops reading.
# It can also be stopped where no event comes, while a long prompt is read: a
# function `stop` is asked before every forward. In the processes that are not
# the first, a turn that is left must go on unseen until the first one ends
# it, or the others would wait for its part.

# %% tags=["export:chat/turn"]
STOPS = ("<|return|>", "<|call|>", "<|endoftext|>")


def stop_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids of STOPS; ChatError for a tokenizer without them."""
    missing = [name for name in STOPS if name not in tokenizer.special]
    expect(not missing, "tokenizer", f"the control tokens {STOPS}",
           f"none for {missing}")
    return frozenset(tokenizer.special[name] for name in STOPS)


def _followed(turn: Iterator[ChatEvent]) -> Iterator[ChatEvent]:
    """`turn`, and all the rest of it when its reader leaves."""
    try:
        for event in turn:  # noqa: UP028  `yield from` would close it
            yield event
    finally:
        for _ in turn:
            pass

# %%
assert stop_tokens(tokenizer) == set(stop_ids(POCKET))

# %% tags=["export:chat/turn"]
class Turn:
    """One turn of the model: rounds of writing, and calls between them.

    prompt: the tokens before it. ids: of its calls. rounds: what was
    written so far. usage: what it took; None while it lasts. stop,
    progress: see `Chat.events`.
    """

    def __init__(self, tokenizer: Tokenizer, settings: Settings,
                 session: Session, prompt: list[int], ids: Iterator[str], *,
                 stop: Callable[[], object] | None = None,
                 progress: bool = False) -> None:
        self.rounds: list[Round] = []
        self.usage: Usage | None = None
        self._tokenizer, self._settings = tokenizer, settings
        self._session, self._prefix = session, session.prefix
        self._prompt, self._ids = prompt, ids
        self._stop_asked, self._progress = stop, progress
        self._stop = stop_tokens(tokenizer)
        model = session.prefix.model
        self._most = model.config.max_position_embeddings
        self._group = getattr(model, "group", None) or SingleProcess()
        self._agreement = Agreement(self._group)
        self._events: Callable[[], object] = lambda: None
        self._behind: Iterable[ChatEvent] = ()

    def events(self) -> Iterator[ChatEvent]:
        """What happens, as it happens; to be asked for once."""
        run = self._run()
        events = run if self._group.first else _followed(run)
        self._events = weakref.ref(events)
        self._behind = () if self._group.first else run
        return events

    def leave(self) -> None:
        """End the turn here, if it is still under way."""
        try:
            if (running := self._events()) is not None:
                running.close()
        except ValueError as error:  # the generator is running right now
            raise ChatError("chat: in the middle of a turn") from error
        self._agreement.leave()
        for _ in self._behind:
            pass
        self._events, self._behind = lambda: None, ()

    def messages(self) -> list[dict]:
        """What the turn has added to the conversation."""
        return [message for round_ in self.rounds
                for message in round_messages(round_)]

    def _run(self) -> Iterator[ChatEvent]:
        prefix, agreement = self._prefix, self._agreement
        began, fed, made = time.perf_counter(), prefix.fed, 0
        prompt, reason = self._prompt, ""

        def used() -> Usage:
            return Usage(reason or "stopped", len(self._prompt),
                         prefix.fed - fed, made, time.perf_counter() - began)

        try:
            while not reason:
                round_, token = Round(self._tokenizer), None
                self.rounds.append(round_)
                for token in self._tokens(prompt, made):
                    if token is not None:
                        made += 1
                        yield from round_.feed(token)
                    elif self._progress:
                        yield ChatEvent("progress", str(prefix.left))
                    if round_.over:
                        break
                yield from round_.close()
                if round_.call is not None:
                    reason = yield from self._answer(round_)
                    prompt = self._after(round_)
                else:
                    reason = ("stop" if round_.over or token in self._stop
                              else "length")
            agreement.ask(bool)  # here the last chance to leave ends
            agreement.open = False
        except Stopped:
            reason = "stopped"
        except BaseException:
            reason = "stopped"
            self.usage = used()
            agreement.leave()
            raise
        yield from self._complaints(reason, len(prompt))
        self.usage = used()
        yield ChatEvent("done", reason, usage=self.usage)

    def _tokens(self, prompt: list[int], made: int) -> Iterator[int | None]:
        """What the model writes after `prompt`, having written `made`; None
        after a part of the prompt."""
        sampling = self._settings.sampling
        left = (sampling.max_new_tokens or self._most + made) - made
        if left <= 0 or len(prompt) > self._most:
            return
        drawn = self._session.next_seed()
        steps = self._prefix.write(
            prompt, sampling, max_new_tokens=left, stop=self._stop,
            seed=self._agreement.ask(lambda: drawn))
        end = object()
        while (self._agreement.ask(self._goes_on)
               and (step := next(steps, end)) is not end):
            yield step

    def _goes_on(self) -> bool:
        if self._stop_asked is not None and self._stop_asked():
            raise Stopped
        return True

    def _complaints(self, reason: str, length: int) -> Iterator[ChatEvent]:
        if reason == "stop" and not self.rounds[-1].text("final"):
            yield ChatEvent("notice", "the model ended without an answer")
        if max(length, len(self._prefix.tokens)) > self._most:
            yield ChatEvent("notice", f"the context of {self._most} tokens "
                                      "is full")

    def _answer(self, round_: Round) -> Generator[ChatEvent, None, str]:
        """Runs the call of a round; returns why the turn ends, or ""."""
        id_, arguments = next(self._ids), round_.call.arguments
        name = possible_name(round_.call.recipient.removeprefix("functions."))
        yield ChatEvent("call", arguments, name)
        reason, result = self._agreement.ask(
            lambda: self._result(name, arguments))
        call = {"id": id_, "type": "function",
                "function": {"name": name, "arguments": arguments}}
        if reason == "length":
            yield ChatEvent("notice", f"not run: call {len(self.rounds)} of "
                            f"at most {self._settings.rounds} in a turn")
        elif reason:
            round_.kept = [call]
        else:
            round_.kept = [call, {"role": "tool", "tool_call_id": id_,
                                  "name": name, "content": result}]
            yield ChatEvent("result", result, name)
        return reason

    def _result(self, name: str, arguments: str) -> tuple[str, str]:
        """Why the turn ends with this call, or "", and what the call gave.
        Of several processes only the first runs it."""
        tools = self._settings.tools
        tool, known = tools.get(name), ", ".join(tools)
        if tool is not None and tool.run is None:
            return "tool_calls", ""
        if len(self.rounds) > self._settings.rounds:
            return "length", ""
        if tool is None:
            return "", (f"error: there is no tool {name}; there are: "
                        f"{known or 'none'}")
        return "", result_text(tool.run(arguments))

    def _after(self, round_: Round) -> list[int]:
        """The tokens so far, word for word, and the tool's answer."""
        if not round_.kept[1:]:
            return []
        answer = round_.kept[1]
        message = Message("tool", answer["content"], "commentary",
                          "assistant", name=f"functions.{answer['name']}")
        return self._prefix.tokens + render(self._tokenizer, [message])

# %% [markdown]
# ### Chat
#
# What is left is to put the two halves together: settings and a model, and a
# session for who brings none. Model and tokenizer come from a folder, shipped
# or released, with no special case for either.

# %% tags=["export:chat/chat"]
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import torch



from gptoss.weights.hub import resolve

from gptoss.text.tokenizer import Tokenizer
from gptoss.text.harmony import render


from gptoss.model.transformer import GptOss





def load(model: str | Path | tuple[GptOss, Tokenizer] | None = None,
         dtype: torch.dtype = torch.bfloat16, device="cpu"
         ) -> tuple[GptOss, Tokenizer]:
    """Model and tokenizer of a folder or hub id; None: the shipped one."""
    if isinstance(model, tuple):
        return model
    folder = resolve(files("gptoss") / "pocket" if model is None else model)
    tokenizer = Tokenizer.from_pretrained(folder)  # the quick one first
    return (GptOss.from_pretrained(folder, dtype=dtype, device=device),
            tokenizer)

# %% tags=["export:chat/chat"]
class Chat:
    """Conversations with a gpt-oss model, in OpenAI's message dicts.

    model: a folder, a hub id, a pair (GptOss, Tokenizer), or None for the
    shipped one. effort: low, medium, high. tools: typed Python functions,
    which are called when the model asks, or dicts of OpenAI's shape, which
    end the turn with a call for the caller. instructions: come before those
    of a system message. date: "2025-06-28", "" for none, None for today.
    temperature, top_k, top_p, seed, prefill_chunk: as for `SamplingOptions`.
    max_new_tokens: in a turn, all rounds together (None: until the context
    is full). rounds: calls run in one turn. slack: see `PrefixCache`.
    tool_timeout: seconds for a call, see `function_tool`.

    One cache is kept from turn to turn; what a new prompt shares with it is
    not fed again. It is that of `session`; for several conversations with
    one model, give each its own, from `new_session`. A turn may be left at
    any point. Not for several threads. With a model that is spread over
    processes, all of them make the same calls; what the first is given
    counts, and its tools alone are run.

    Attributes: model, tokenizer, settings (set a new one to change
    something, `chat.settings.with_changes(effort="low")`), session.
    """

    def __init__(self, model: str | Path | tuple[GptOss, Tokenizer] |
                 None = None, effort: str = "medium",
                 tools: Iterable[Callable | Mapping] = (), *,
                 instructions: str = "", date: str | None = None,
                 temperature: float = 1.0, top_k: int = 0,
                 top_p: float = 1.0, seed: int | None = None,
                 max_new_tokens: int | None = None, rounds: int = 8,
                 slack: int = SLACK, dtype: torch.dtype = torch.bfloat16,
                 device="cpu", tool_timeout: float | None = None,
                 prefill_chunk: int = 512) -> None:
        expect(tool_timeout is None or type(tool_timeout) in (int, float)
               and 0 < tool_timeout < 1e6, "tool_timeout",
               "seconds > 0", tool_timeout)
        self.settings = Settings(
            effort=effort, tools=read_tools(tools, tool_timeout),
            instructions=instructions, date=date, rounds=rounds, slack=slack,
            sampling=SamplingOptions(
                temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                max_new_tokens=max_new_tokens, prefill_chunk=prefill_chunk))
        self.model, self.tokenizer = load(model, dtype, device)
        stop_tokens(self.tokenizer)
        self._group = getattr(self.model, "group", None) or SingleProcess()
        if date is None:
            self.settings = self.settings.with_changes(
                date=self._group.same(today))
        self.session = self.new_session()

    def __repr__(self) -> str:
        config, settings = self.model.config, self.settings
        return (f"Chat({config.num_hidden_layers} layers, "
                f"effort={settings.effort!r}, tools={[*settings.tools]}, "
                f"{len(self.session.prefix.tokens):,} of "
                f"{config.max_position_embeddings:,} tokens)")

    def new_session(self) -> Session:
        """The memory of one more conversation with this model."""
        return Session(self.model, self.settings.slack,
                       self.settings.sampling.seed)

    def prompt(self, messages: Sequence[object]) -> list[int]:
        """The tokens that `messages` become, up to the model's turn."""
        instructions, rest = read_messages(messages)
        prompt = render(self.tokenizer,
                        [*self.settings.head(instructions), *rest],
                        drop="turns")
        most = self.model.config.max_position_embeddings
        expect(len(prompt) <= most, "messages", f"at most {most} tokens "
               "(max_position_embeddings)", len(prompt))
        return prompt

    def events(self, messages: Sequence[object], *,
               session: Session | None = None,
               stop: Callable[[], object] | None = None,
               progress: bool = False) -> Iterator[ChatEvent]:
        """The turn of the model after `messages`, as it happens.

        session: whose cache is used, and where the turn is noted; None: the
        chat's own. stop: asked before every forward; if what it returns is
        true, the turn ends there with the finish reason "stopped".
        progress: whether there are events of that kind. Raises ChatError at
        the call, for messages that are not right or do not fit. A turn of
        the session that is still under way ends here.
        """
        session = self.session if session is None else session
        if session.turn is not None:
            session.turn.leave()
        begin = self._group.same(functools.partial(self._begin, messages))
        if "error" in begin:
            raise ChatError(begin["error"])
        ids = (f"call_{n}" for n in itertools.count(1)
               if f"call_{n}" not in begin["used"])
        session.turn = Turn(self.tokenizer, self.settings, session,
                            begin["prompt"], ids, stop=stop,
                            progress=progress)
        return session.turn.events()

    def _begin(self, messages: Sequence[object]) -> dict:
        """The prompt and the ids of calls that are taken, or an error."""
        try:
            return {"prompt": self.prompt(messages),
                    "used": call_ids(messages)}
        except ChatError as error:
            return {"error": str(error)}

    def reply(self, messages: Sequence[object], *,
              session: Session | None = None,
              stop: Callable[[], object] | None = None) -> Iterator[str]:
        """The text of the final channel, piece by piece; see `events`."""
        return (event.text for event in self.events(
                    messages, session=session, stop=stop)
                if event.kind == "final")

    @property
    def turn(self) -> list[dict]:
        """The messages that the turn has added, to go on with: what was
        thought, said and called, in order, with the answers of the calls,
        then the answer as far as it came."""
        turn = self.session.turn
        return [] if turn is None else turn.messages()

    @property
    def usage(self) -> Usage | None:
        """What the last turn took; None while it lasts."""
        turn = self.session.turn
        return None if turn is None else turn.usage

    def reset(self) -> None:
        """Forget the turn and the cache; a seed begins anew."""
        if self.session.turn is not None:
            self.session.turn.leave()
        self.session = self.new_session()

# %%
chat = Chat((model, tokenizer), effort="high", tools=[weather],
            date="2025-06-28", instructions="Be kind.")
print(chat)
print(tokenizer.decode(chat.prompt(talk)))

# %% [markdown]
# A conversation with the shipped model, greedy so that it can be repeated. In
# the second turn it reads its first answer again, without the working, and
# the new question:

# %%
def show(chat: Chat, messages: list[dict]) -> None:
    """Prints a turn, a line for each kind of event, and its cost."""
    for kind, events in itertools.groupby(chat.events(messages),
                                          lambda event: event.kind):
        print(f"[{kind}]", "".join(event.text for event in events))
    used = chat.usage
    print(f"prompt of {used.prompt_tokens} tokens, fed "
          f"{used.prefilled_tokens}, wrote {used.generated_tokens}")


fixed = {"temperature": 0, "date": "2025-06-28"}
chat, talk = Chat((model, tokenizer), **fixed), []
for question in ("What is 347 + 285?", "Take 88 from 403."):
    talk.append({"role": "user", "content": question})
    show(chat, talk)
    talk += chat.turn

# %% [markdown]
# What a model calls, and with what, is its own choice. To see a call go wrong
# and be mended, let a sampler say what was written beforehand, whatever the
# logits are:

# %%
def dictated(*rounds: str, **more) -> Chat:
    """A chat that writes `rounds`, control tokens spelled by their names."""
    parts = re.split(r"(<\|\w+\|>)", "".join(rounds))
    ids = iter([n for part in parts for n in (
        [tokenizer.special[part]] if part in tokenizer.special
        else tokenizer.encode(part))])
    chat = Chat((model, tokenizer), **fixed | more)
    chat.settings = chat.settings.with_changes(
        temperature=1.0,
        sampler=lambda logits, generator: torch.tensor([next(ids)]))
    return chat


CALL = ("<|channel|>commentary to=functions.weather <|constrain|>json"
        "<|message|>{}<|call|>")
FINAL = "<|channel|>final<|message|>{}<|return|>"
chat = dictated(CALL.format('{"town": "Oslo"}'),
                CALL.format('{"city": "Oslo"}'),
                FINAL.format("It is 21 degrees."), tools=[weather])
talk = [{"role": "user", "content": "How warm is it in Oslo?"}]
show(chat, talk)

# %% [markdown]
# The first call had a wrong argument, the model was told so, and the second
# one was right. More was fed than the prompt has: after each call its last
# token, the result and `<|start|>assistant`. `turn` holds the messages for
# the next prompt:

# %%
for message in chat.turn:
    print(message["role"], message["content"],
          [call["id"] for call in message.get("tool_calls", ())])

# %% [markdown]
# ## It holds
#
# **Top-k keeps exactly k, top-p the smallest set.** Rows of few different
# values, in bf16, so that ties abound; against the definitions in plain
# Python.

# %%
import random

rng = random.Random(0)
for _ in range(300):
    row = [rng.randint(-8, 8) / 4 for _ in range(rng.randint(1, 12))]
    rows = torch.tensor([row], dtype=torch.bfloat16)
    first = sorted(range(len(row)), key=lambda n: (-row[n], n))
    k = rng.randint(1, 12)
    kept = Sampler(top_k=k).probabilities(rows)[0].nonzero()[:, 0]
    assert kept.tolist() == sorted(first[:k])
    p, whole = rng.random() or 1.0, Sampler().probabilities(rows)[0]
    kept = Sampler(top_p=p).probabilities(rows)[0] > 0
    mass = whole[kept].sum()
    assert mass >= p - 1e-12 and mass - whole[kept].min() < p + 1e-12

# %% [markdown]
# **What is drawn is what is stated.** Pearson's statistic over $m$ kept
# tokens has a mean of at most $m$ and a variance of about $2m$ if it is; five
# standard deviations are allowed.

# %%
for sampler in (Sampler(), Sampler(2.0, top_k=9), Sampler(1.5, top_p=0.9)):
    wanted = 20_000 * sampler.probabilities(logits[None, :64])[0]
    drawn = sampler(logits[:64].expand(20_000, -1),
                    torch.Generator().manual_seed(1)).bincount(minlength=64)
    assert (drawn[wanted == 0] == 0).all()
    often = wanted >= 5  # the rest are too rare for the statistic
    chi = ((drawn - wanted)[often] ** 2 / wanted[often]).sum().item()
    freedom = int(often.sum())
    assert chi < freedom + 5 * (2 * freedom) ** 0.5

# %% [markdown]
# **Cold is greedy**, down to the smallest positive number.

# %%
for temperature in (1e-3, 1e-30, 5e-324):
    assert Sampler(temperature)(logits[None]).item() == order[0]

# %% [markdown]
# **The fast loop is the slow loop**: greedy with the cache, in any chunks,
# continued, or in a batch, gives what the model gives on the whole text.

# %%
def slow(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt):]


greedy = Sampler(0)
wanted = [slow(prompt, 12) for prompt in prompts]
for chunk in (1, 7, 512):
    options = {"sampler": greedy, "prefill_chunk": chunk}
    assert [list(generate(model, prompt, max_new_tokens=12, **options))
            for prompt in prompts] == wanted
    assert generate_batch(model, prompts, max_new_tokens=12,
                          **options) == wanted

cache, parts = model.new_cache(), []
for count in (1, 6, 5):
    parts += generate(model, parts[-1:] or prompts[0], cache=cache,
                      max_new_tokens=count, sampler=greedy)
assert parts == wanted[0]

# %% [markdown]
# **No character is broken**, wherever the bytes are cut: all 2,048 ways of
# cutting a text of 12 bytes with characters of one to four.

# %%
class Cut:
    """A vocabulary whose tokens are the given byte strings."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.token_bytes = pieces.__getitem__

    def is_special(self, token: int) -> bool:
        return False


text = "a é中 🙂"
data = text.encode()
for cuts in range(2 ** (len(data) - 1)):
    pieces, piece = [], b""
    for n, byte in enumerate(data):
        piece += bytes([byte])
        if cuts >> n & 1 or n == len(data) - 1:
            pieces.append(piece)
            piece = b""
    stream, shown = TextStream(Cut(pieces)), ""
    for n in range(len(pieces)):
        shown += stream.feed(n)
        assert text.startswith(shown)
    assert shown == text and stream.flush() == ""
print(f"{2 ** (len(data) - 1):,} cuts of {len(data)} bytes")

# %% [markdown]
# **The cache that is kept is the cache of a fresh start**: any beginning of
# the last prompt kept, anything new after it, with and without slack, a
# forward in four stopped half-way as Ctrl-C would. The last logits are those
# of the whole prompt without a cache.

# %%
def halfway(module, inputs):
    raise KeyboardInterrupt


for slack in (0, 60):
    prefix, prompt, count = PrefixCache(model, slack), [], 0
    for n in range(12):
        prompt = prompt[:rng.randint(0, len(prompt))] + [
            rng.randrange(256) for _ in range(rng.randint(1, 70))]
        start = prefix.resume(prompt)
        rest = torch.tensor([prompt[start:]])
        if n % 4 == 3:
            hook = model.layers[2].register_forward_pre_hook(halfway)
            with contextlib.suppress(KeyboardInterrupt):
                model(rest, prefix.cache)
            hook.remove()
            continue
        with torch.no_grad():
            found = model(rest, prefix.cache, logits_to_keep=1)
            wanted = model(torch.tensor([prompt]), logits_to_keep=1)
        assert (found - wanted).abs().max() < 1e-3
        count += len(rest[0])
    print(f"slack {slack}: {count} tokens fed")

# %% [markdown]
# **Greedy answers do not depend on what is kept**, turn after turn:

# %%
kept, talk = Chat((model, tokenizer), max_new_tokens=30, **fixed), []
for question in asked:
    talk.append({"role": "user", "content": question})
    answer = "".join(kept.reply(talk))
    fresh = Chat((model, tokenizer), max_new_tokens=30, **fixed)
    assert "".join(fresh.reply(talk)) == answer
    assert fresh.session.prefix.tokens == kept.session.prefix.tokens
    talk += kept.turn
assert kept.usage.prefilled_tokens < fresh.usage.prefilled_tokens

# %% [markdown]
# **Conversations that share a model do not hear each other.** Two of them,
# a piece of each in turn, give what each gives by itself:

# %%
def alone(question: str) -> str:
    chat = Chat((model, tokenizer), **brief)
    return "".join(event.text for event in chat.events(
        [{"role": "user", "content": question}]))


brief = {"seed": 5, "max_new_tokens": 20, "date": "2025-06-28"}
shared = Chat((model, tokenizer), **brief)
both = [shared.events([{"role": "user", "content": question}],
                      session=shared.new_session()) for question in asked[:2]]
heard = ["".join(event.text for event in events if event is not None)
         for events in zip(*itertools.zip_longest(*both), strict=True)]
assert heard == [alone(question) for question in asked[:2]]
for text in heard:
    print(repr(text[:60]))

# %% [markdown]
# **No output of the model is an exception.** Whatever it writes, a turn ends
# in "done", what was wrong is an event, and the messages of the turn can be
# sent on.

# %%
soup = [*tokenizer.special.values()] + tokenizer.encode(
    "assistant user final analysis commentary to=functions.weather json {}")
notices = collections.Counter()
chat = Chat((model, tokenizer), tools=[weather], max_new_tokens=30, rounds=2,
            **fixed)
chat.settings = chat.settings.with_changes(
    temperature=1.0, sampler=lambda *_: torch.tensor([rng.choice(soup)]))
talk = [{"role": "user", "content": "Hello"}]
for _ in range(15):
    *events, last = chat.events(talk)
    assert last.kind == "done"
    assert chat.prompt([*talk, *chat.turn, *talk])
    notices.update(event.text.split(":")[0].split("'")[0] for event in events
                   if event.kind == "notice")
print(len(notices), "kinds of complaint")

# %% [markdown]
# ## Against the others
#
# transformers has the same three steps in the same order. Without ties the
# probabilities agree to the rounding of its fp32:

# %%
from transformers.generation import GenerationConfig, logits_process

worst = 0.0
for temperature, k, p in ((0.7, 20, 0.9), (1.5, 100, 0.5), (1.0, 7, 0.99)):
    scores = torch.randn(4, 1000)
    ours = Sampler(temperature, k, p).probabilities(scores)
    for step in (logits_process.TemperatureLogitsWarper(temperature),
                 logits_process.TopKLogitsWarper(k),
                 logits_process.TopPLogitsWarper(p)):
        scores = step(None, scores)
    worst = max(worst, (scores.softmax(-1) - ours).abs().max().item())
print("max |difference| below 1e-6:", worst < 1e-6)

# %% [markdown]
# With ties they do not: its top-k removes what is *smaller than the k-th
# value* and so keeps all that equal it. Random logits of the real size,
# rounded to bf16 as a bf16 `lm_head` gives them, asked for the best 50:

# %%
top_50, counts, tied = logits_process.TopKLogitsWarper(50), [], 0
noise = torch.Generator().manual_seed(0)
for _ in range(25):
    real = (3 * torch.randn(1, 201_088, generator=noise)).bfloat16()
    counts.append(int(top_50(None, real).isfinite().sum()))
    tied += int((real == real.max()).sum() > 1)
    assert best(real, 50).unique().numel() == 50
print(f"{round(real.unique().numel(), -2):,} different values of 201,088")
print(f"more than 50 kept in {sum(n > 50 for n in counts)} of 25 rows, "
      f"at most {max(counts)}; the maximum itself is shared in {tied}")
print("top_k if nothing says otherwise:",
      GenerationConfig()._get_default_generation_params()["top_k"])

# %% [markdown]
# The last line matters more than the ties: generation_config.json of gpt-oss
# says `do_sample: true` and nothing of top-k, and transformers then takes
# 50. OpenAI's own code samples from all tokens, as `Sampler()` does.
#
# Known errors elsewhere: stopping at 200002 alone, so that a tool call,
# which ends with 200012, runs on into the reasoning
# (mlx-openai-server#178); characters cut between tokens (llama.cpp#4446
# mended it).
#
# For a function's schema, transformers reads the same hints and docstring:

# %%
from transformers.utils import get_json_schema


def book(name: str, seats: int, days: list[str], note: str | None = None,
         row: float = 1.5) -> str:
    """Books a table.

    Args:
        name: of the guest
        seats: how many
        days: any of these
        note: for the cook
        row: counted from the door
    """


theirs = get_json_schema(book)["function"]["parameters"]
ours = function_tool(book).spec.parameters
assert theirs["required"] == ours["required"]
for key, entry in theirs["properties"].items():
    assert entry == {k: v for k, v in ours["properties"][key].items()
                     if k != "default"}

# %% [markdown]
# A cache that outlives a turn is where programs differ. llama.cpp's server
# reads a gpt-oss conversation from its beginning when the sliding layers
# have forgotten too much ("forcing full prompt re-processing",
# llama.cpp#13194); mlx-lm reused nothing after a turn with reasoning
# (mlx-lm#1042). Both are right, and slow: full layers remember everything,
# and the sliding ones need no more than {eq}`generate-turn`.

# %% [markdown]
# ## In the 20b and the 120b
#
# The released generation_config.json names three ids. config.json names one
# of them: whoever reads only that misses the end of a tool call.

# %%
released = {"bos_token_id": 199998, "do_sample": True,
            "eos_token_id": [200002, 199999, 200012],
            "pad_token_id": 199999}
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "generation_config.json").write_text(json.dumps(released))
    print("generation_config.json:", stop_ids(folder))
print("config.json:", stop_ids(GptOssConfig.gpt_oss_20b()))

# %% [markdown]
# `Chat` is the same for these models: only the folder differs. What its
# default slack costs in bf16, and what a turn longer than that costs:

# %%
for name, real in (("20b", GptOssConfig.gpt_oss_20b()),
                   ("120b", GptOssConfig.gpt_oss_120b())):
    sliding = real.layer_types.count("sliding_attention")
    slot = 2 * real.num_key_value_heads * real.head_dim * 2
    print(f"{name}: {sliding * SLACK * slot / 1e6:.1f} MB of slack; replay "
          f"of {sliding * (real.sliding_window - 1):,} tokens")

# %% [markdown]
# During prefill only the last position's logits are of use. For all
# positions of a prompt of 4,096 tokens they would fill a tensor of

# %%
V = GptOssConfig.gpt_oss_20b().vocab_size
print(f"{4096 * V * 2 / 1e9:.2f} GB in bf16, instead of {V * 2 / 1e3:.0f} kB")

# %% [markdown]
# ## Cost
#
# For a prompt of $P$ tokens and $a$ new ones the naive loop feeds
#
# $$ \sum_{i=0}^{a-1} (P + i) = aP + \tfrac12 a(a-1)
#    \quad\text{tokens, the cached loop}\quad P + a - 1 . $$ (generate-fed)

# %%
P = len(prompts[0])
assert sum(fed) == 210 * P + 210 * 209 // 2
fed.clear()
hook = model.register_forward_pre_hook(
    lambda module, inputs: fed.append(inputs[0].numel()))
a = len(list(generate(model, prompts[0], max_new_tokens=210)))
hook.remove()
assert sum(fed) == P + a - 1
print(f"{210 * P + 210 * 209 // 2:,} against {P + a - 1:,} tokens")

# %% [markdown]
# Sampling is a fixed number of passes over $V$ numbers in float64: for
# 201,088 of them it took about a millisecond on one core of an EPYC (Zen 3),
# and a full sort fifteen or more; `best` avoids it for top-k always, and for
# top-p whenever 1,024 tokens reach the mass.

# %%
print(f"{V * 8 / 1e6:.1f} MB of float64 a row")

# %% [markdown]
# In the conversation of the picture, held three times, the tokens fed turn by
# turn: from a fresh start, with the cache kept, and with it but without
# slack, so that every turn pays for a replay as in {eq}`generate-turn`.

# %%
spent = {"fresh": [], "kept": [], "no slack": []}
for name, row in spent.items():
    prefix = PrefixCache(model, SLACK if name == "kept" else 0)
    said = [system_message(date="2025-06-28")]
    for question, thought, answer in list(zip(asked, thoughts, answers,
                                              strict=True)) * 3:
        said.append(Message("user", question))
        prompt = render(tokenizer, said, drop="turns")
        start = 0 if name == "fresh" else prefix.resume(prompt)
        row.append(len(prompt) - start)
        said += [Message("assistant", thought, "analysis"),
                 Message("assistant", answer, "final")]
        prefix.tokens = prompt + model_writes(said)
        if name != "fresh":  # as if the model had written the rest
            with torch.no_grad():
                model(torch.tensor([prefix.tokens[start:-1]]), prefix.cache)
    print(f"{name:9}", row)
replay = 2 * (model.config.sliding_window - 1)
assert spent["no slack"] == [
    new + min(whole - new, replay) for whole, new in zip(
        spent["fresh"], spent["kept"], strict=True)]

# %% [markdown]
# ## Takeaways
#
# - Ties are normal in bf16: "the k largest" needs a rule for equals, or it
#   keeps more than k. NaN must raise, not choose.
# - Stop ids come from generation_config.json, all of them. Stream bytes, not
#   tokens: at most three wait for their character.
# - Old reasoning leaves a prompt from the middle: keep the common beginning,
#   roll back, feed the rest. It costs one turn, not the conversation.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# How many tokens does top-p 0.9 keep as the temperature rises from 0.5 to 3?
# Why is top-p alone a weak guard at high temperature?

# %% tags=["hide-cell"]
kept = [int((Sampler(t, top_p=0.9).probabilities(logits[None]) > 0).sum())
        for t in (0.5, 1.0, 2.0, 3.0)]
print(kept)
# the flatter the distribution, the more of the tail it takes to reach 0.9
assert kept == sorted(kept) and kept[-1] > 5 * kept[0]

# %% [markdown]
# ### Exercise 2
#
# min-p keeps tokens with at least a share of the likeliest token's
# probability. Write it. Show that it needs no sort, and that the temperature
# must come before it.

# %% tags=["hide-cell"]
def min_p(logits: Tensor, temperature: float, share: float) -> Tensor:
    probs = (logits.double() / temperature).softmax(-1)
    kept = probs.where(probs >= share * probs.amax(-1, keepdim=True), 0)
    return kept / kept.sum(-1, keepdim=True)


z = 3 * torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
sizes = [int((min_p(z, t, 0.1) > 0).sum()) for t in (0.5, 1, 2)]
print(sizes)
# p_i / p_max = exp((z_i - max z) / t), so a comparison with max z + t log 0.1
# does: no sort. The cut moves with t; before the temperature min-p would
# keep the set of t = 1 at all of them.
assert sizes == [int((z >= z.max() + t * math.log(0.1)).sum())
                 for t in (0.5, 1, 2)]

# %% [markdown]
# ### Exercise 3
#
# If every $g_i$ is $-\log(-\log u_i)$ with uniform $u_i$, then
# $\operatorname{argmax}_i (z_i/\tau + g_i)$ is distributed as in
# {eq}`generate-temperature`. Check it. Why is {eq}`generate-cdf` used here?

# %% tags=["hide-cell"]
few = logits[order[:8]].double()
u = torch.rand(20_000, 8, dtype=torch.float64,
               generator=torch.Generator().manual_seed(2))
drawn = (few / 1.5 - torch.log(-torch.log(u))).argmax(-1)
wanted = 20_000 * Sampler(1.5).probabilities(few[None])[0]
chi = ((drawn.bincount(minlength=8) - wanted) ** 2 / wanted).sum().item()
assert chi < 7 + 5 * 14 ** 0.5
# It takes V uniform numbers a token instead of one, so the same seed gives
# another text when the vocabulary is cut or padded.

# %% [markdown]
# ### Exercise 4
#
# A server writes the time of day into the system message. What does each turn
# cost then? Measure it, and say where the time should stand instead. (A
# dictated answer will do.)

# %% tags=["hide-cell"]
chat = dictated(*[FINAL.format("Yes.")] * 6)
talk, costs = [], []
for minute in ("12:00", "12:00", "12:00", "12:01", "12:02", "12:03"):
    chat.settings = chat.settings.with_changes(date=f"2025-06-28 {minute}")
    talk.append({"role": "user", "content": "And now?"})
    list(chat.events(talk))
    talk += chat.turn
    costs.append(chat.usage.prefilled_tokens)
print(costs)
# The message stands before everything, so all behind it is new each minute,
# and more with every turn. In the last user message, or as the answer of a
# tool, the time costs its own few tokens.
assert costs[1] == costs[2] < costs[3] < costs[4] < costs[5]

# %% [markdown]
# ## Sources
#
# - Top-p: {cite}`nucleus2019`.
# - huggingface/transformers, `generation/logits_process.py`
#   (`TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`) and
#   `generation/configuration_utils.py` (`_get_default_generation_params`).
# - openai/gpt-oss, `gpt_oss/torch/model.py` (`TokenGenerator`).
# - google-deepmind/gemma, `gm/text/_sampling.py`: samplers as frozen
#   dataclasses.
# - OpenAI, `docs/format.md` in openai/harmony: what is dropped when, calls
#   and their answers.
# - huggingface/transformers, `utils/chat_template_utils.py`
#   (`get_json_schema`).
# - Threads: mlx-openai-server#178, llama.cpp#4446, llama.cpp#13194,
#   mlx-lm#1042, unsloth#3152.
