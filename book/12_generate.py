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
# become the next word, and when is the text over? In bf16 those 201,088
# logits take only about 3,000 different values, so "the 50 largest" is
# usually not a set of 50: the rule that most code uses keeps more.

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
from importlib.resources import files

import matplotlib.pyplot as plt
import torch

from gptoss.harmony import Tokenizer
from gptoss.model import GptOss

plt.style.use("_static/book.mplstyle")
torch.manual_seed(0)
POCKET = files("gptoss") / "pocket"
model = GptOss.from_pretrained(POCKET, dtype=torch.float32)
tokenizer = Tokenizer.from_pretrained(POCKET)
opening = "Once upon a time there was a little fox named Mira."
with torch.no_grad():
    logits = model(torch.tensor([tokenizer.encode(opening)]))[0, -1]

order = logits.sort(descending=True, stable=True).indices
hot = (logits / 2).softmax(-1)[order]
four = torch.where(torch.arange(len(hot)) < 4, hot, 0)
few = torch.where(hot.cumsum(0) - hot < 0.8, hot, 0)
panels = {"as it is": logits.softmax(-1)[order], "temperature 2": hot,
          "temperature 2, top-k 4": four / four.sum(),
          "temperature 2, top-p 0.8": few / few.sum()}
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
# What the shipped model thinks may follow the first sentence of a story: its
# eight likeliest tokens, and all the others together (orange). At
# temperature 2 the thousand unlikely tokens together gain much of what the
# likely ones lose. Top-k and top-p cut that tail: one at a fixed number of
# tokens, the other at a share of the probability.

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
# characters; temperature 0, which everybody types for "the likeliest", is
# 0/0.

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
# $\tau$ there is: $z_i/\tau$ alone would be $\infty - \infty$.
#
# **Top-k.** Sort so that $z_{(1)} \ge z_{(2)} \ge \dots$, equal logits by id;
# keep $(1) \dots (k)$ and renormalise. The order among equals is what makes
# the set well defined.
#
# **Top-p** {cite}`nucleus2019`. Keep the smallest $n$ with
#
# $$ \sum_{j=1}^{n} p_{(j)} \ge P , $$ (generate-nucleus)
#
# that is: token $(j)$ goes if the tokens before it already reach $P$. At
# least one stays for every $P > 0$. It acts on the probabilities that top-k
# left, renormalised.
#
# **Drawing.** With $F_n = p_1 + \dots + p_n$ and one uniform $u \in (0, 1]$,
#
# $$ i = \min \{ n : F_n \ge u \}, \qquad
#    \Pr(i = n) = F_n - F_{n-1} = p_n . $$ (generate-cdf)
#
# With $u > 0$ a token of probability 0 is never the first to reach $u$.
# `torch.rand` gives $[0, 1)$, so $u$ is one minus that. One number a token
# from a CPU generator makes a seed mean the same on every device.
#
# **How many tokens.** Positions $0 \dots N-1$ exist. A prompt of $P$ tokens
# after $c$ cached ones uses $c + P$ of them; each new token is predicted
# *before* it needs a position, so $N - c - P + 1$ can be produced.
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

# %% [markdown]
# ## Code
#
# ### Refusing by name

# %% tags=["export"]
import codecs
import json
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gptoss.cache import Cache
from gptoss.config import GptOssConfig
from gptoss.harmony import Tokenizer
from gptoss.model import GptOss


class GenerateError(ValueError):
    """An option, a prompt or logits that generation cannot use."""


def _refuse(option: str, expected: str, found: object) -> None:
    raise GenerateError(f"{option}: expected {expected}, found {found!r}")


def _is_number(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)

# %%
try:
    _refuse("top_p", "a number > 0 and <= 1", 0)
except GenerateError as error:
    print(error)

# %% [markdown]
# ### The k best
#
# `torch.topk` promises nothing about which of equal values it returns, so it
# serves only to find the k-th largest *value*.

# %% tags=["export"]
def best(logits: Tensor, k: int) -> Tensor:
    """Ids (B, k) of the k largest of (B, V), largest first.

    Of equals the lower id comes first. A full stable sort gives the same,
    ten times slower for V = 201088.
    """
    if k < logits.shape[-1]:
        edge = logits.topk(k).values[..., -1:]  # torch.topk breaks ties at
        above, at = logits > edge, logits == edge  # will: only its k-th
        room = k - above.sum(-1, keepdim=True)     # value is of use
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

# %% tags=["export"]
def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """`probs` (B, N), largest first, cut to the fewest that reach top_p."""
    mass = probs.cumsum(-1)
    probs = probs.clone()  # a token goes if those before it suffice
    probs[..., 1:].masked_fill_(mass[..., :-1] >= top_p, 0.0)
    return probs / probs.sum(-1, keepdim=True)

# %%
print(nucleus(torch.tensor([[0.5, 0.3, 0.1, 0.1]]), 0.8))

# %% tags=["export"]
NUCLEUS = 1024  # top-p looks at so many tokens before it sorts all of them


def ranked(logits: Tensor, temperature: float, top_k: int,
           top_p: float) -> tuple[Tensor, Tensor | None]:
    """What `Sampler` draws from: probabilities (B, N) and ids (B, N).

    Probabilities in float64, likeliest first; ids None: N = V, in order of
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
probs, ids = ranked(logits[None], 2.0, 0, 0.8)
kept = int((probs > 0).sum())
print("kept by top-p 0.8 at temperature 2:", kept)
assert ids[0, :8].tolist() == order[:8].tolist()

# %% [markdown]
# ### Drawing with one uniform number

# %% tags=["export"]
def draw(probs: Tensor, ids: Tensor | None = None,
         generator: torch.Generator | None = None) -> Tensor:
    """One token a row (B,) from `probs` (B, N), by inverting the CDF.

    `ids` (B, N) names the columns (None: the column is the id). A token
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
print((drawn.bincount(minlength=3) / 4000).round(decimals=1))

# %% [markdown]
# ### The sampler
#
# Logits that are not finite must not give a token. In float16 activations
# of gpt-oss can exceed 65,504, the largest number there is, and what comes
# out is NaN (unsloth#3152): the error names the dtype.

# %% tags=["export"]
def _check_finite(logits: Tensor) -> None:
    """Raises unless each row (B, V) has a finite maximum: NaN anywhere,
    +inf, or nothing but -inf would otherwise give a token all the same."""
    peak = logits.amax(-1)
    if not bool(torch.isfinite(peak).all()):
        raise GenerateError(
            f"logits: expected finite numbers, found {peak.tolist()} as the "
            f"largest of a row; the model runs in {logits.dtype}"
            + (" (float16 ends at 65504: use bfloat16 or float32)"
               if logits.dtype == torch.float16 else ""))


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
        number = (int, float)
        if not (_is_number(self.temperature, number)
                and math.isfinite(self.temperature)
                and self.temperature >= 0):
            _refuse("temperature", "a finite number >= 0", self.temperature)
        if not (_is_number(self.top_k, int) and self.top_k >= 0):
            _refuse("top_k", "an integer >= 0", self.top_k)
        if not (_is_number(self.top_p, number) and 0 < self.top_p <= 1):
            _refuse("top_p", "a number > 0 and <= 1", self.top_p)

    def __call__(self, logits: Tensor,
                 generator: torch.Generator | None = None) -> Tensor:
        """Next tokens (B,) int64 from `logits` (B, V).

        Takes one uniform number a row from `generator` (a CPU one,
        whatever the device) unless greedy, so that a seed gives the same
        text on every device that gives the same logits.
        """
        _check_finite(logits)
        if self.temperature == 0:
            return logits.argmax(-1)
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
    print(str(error)[-54:])

# %% [markdown]
# ### When to stop

# %% tags=["export"]
def stop_ids(source: str | Path | GptOssConfig) -> tuple[int, ...]:
    """The ids that end a text, from `source`.

    A folder: `eos_token_id` (a number or a list) of generation_config.json,
    there or, as for `original/`, in the folder above; without one, of
    config.json. A config: its own.
    """
    if isinstance(source, GptOssConfig):
        return (source.eos_token_id,)
    folder, name = Path(source), "generation_config.json"
    file = next((place / name for place in (folder, folder.resolve().parent)
                 if (place / name).is_file()), None)
    if file is None:
        return stop_ids(GptOssConfig.from_pretrained(source))
    try:
        found = json.loads(file.read_bytes())["eos_token_id"]
        ids = found if isinstance(found, list) else [found]
        return tuple(dict.fromkeys(operator.index(n) for n in ids))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GenerateError(f"{file}: expected eos_token_id, a number or a "
                            f"list of numbers, found {error!r}") from error

# %%
stop = stop_ids(POCKET)
print([tokenizer.decode([n]) for n in stop])

# %% [markdown]
# ### What is checked before any work

# %% tags=["export"]
def _check_run(config: GptOssConfig, prompt: Sequence[int], held: int,
               max_new_tokens: int, prefill_chunk: int, limit: int) -> None:
    """Raises GenerateError, naming the option, before any work is done."""
    for name, value in (("max_new_tokens", max_new_tokens),
                        ("prefill_chunk", prefill_chunk)):
        if not (_is_number(value, int) and value > 0):
            _refuse(name, "an integer >= 1", value)
    if len(prompt) == 0:
        _refuse("prompt", "at least one token", list(prompt))
    for at, token in enumerate(prompt):
        if not 0 <= token < config.vocab_size:
            _refuse(f"prompt, token {at}",
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
    _check_run(model.config, [3, 5000], 0, 10, 512, 2048)
except GenerateError as error:
    print(error)

# %% [markdown]
# ### One text
#
# `generate` checks and returns an iterator. Its body is a function of its
# own because a Python generator runs nothing, not even a check, before its
# first item is asked for.

# %% tags=["export"]
def _limit(config: GptOssConfig, cache: Cache | None) -> int:
    """How many positions there are: the model's, or the cache's if fewer."""
    most = None if cache is None else cache.max_tokens
    return most or config.max_position_embeddings


def _generators(seed: int | None, rows: int) -> list[torch.Generator]:
    """A generator for each row; row 0 of a seed is the seed itself."""
    if seed is None:
        seed = torch.randint(2 ** 48, ()).item()
    if not (_is_number(seed, int) and 0 <= seed < 2 ** 63):
        _refuse("seed", "an integer from 0 to 2**63 - 1", seed)
    return [torch.Generator().manual_seed(seed + row) for row in range(rows)]


def _generate(model: GptOss, prompt: list[int], count: int,
              sampler: Sampler, stop: frozenset[int],
              generator: torch.Generator, cache: Cache,
              chunk: int) -> Iterator[int]:
    feed = torch.tensor([prompt], device=model.embed_tokens.weight.device)
    for produced in range(1, count + 1):
        with torch.inference_mode():
            for part in feed.split(chunk, dim=1):
                logits = model(part, cache=cache, logits_to_keep=1)
            chosen = sampler(logits[:, -1], generator)
        token = chosen.item()
        yield token
        if token in stop or produced == count:
            return
        feed = chosen[:, None]

# %% tags=["export"]
def generate(model: GptOss, prompt: Sequence[int], *,
             max_new_tokens: int = 256, sampler: Sampler | None = None,
             stop: Iterable[int] = (), seed: int | None = None,
             cache: Cache | None = None,
             prefill_chunk: int = 512) -> Iterator[int]:
    """Yields the token ids that follow `prompt`, a list of ids.

    Ends after `max_new_tokens`, after a token in `stop` (which is
    yielded, last), or when the positions are used up. `cache`: a cache of
    batch 1 whose tokens precede the prompt; afterwards it holds all but the
    last token yielded, so the next prompt begins with that one. Raises
    GenerateError at the call, not at the first token.
    """
    prompt = [operator.index(token) for token in prompt]
    if cache is not None and cache.batch_size != 1:
        _refuse("cache", "a batch of 1", cache.batch_size)
    held = 0 if cache is None else cache.length
    limit = _limit(model.config, cache)
    _check_run(model.config, prompt, held, max_new_tokens, prefill_chunk,
               limit)
    cache = model.new_cache() if cache is None else cache
    # the last token needs no position of its own: nothing is fed after it
    count = min(max_new_tokens, limit - held - len(prompt) + 1)
    return _generate(model, prompt, count, sampler or Sampler(),
                     frozenset(stop), _generators(seed, 1)[0], cache,
                     prefill_chunk)

# %%
ids = list(generate(model, tokenizer.encode(opening), stop=stop,
                    sampler=Sampler(0)))
print(len(ids), "tokens, ended by", tokenizer.decode(ids[-1:]))
print(tokenizer.decode(ids[:40]), "...")

# %% [markdown]
# ### Many texts at once

# %% tags=["export"]
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

# %% tags=["export"]
def generate_batch(model: GptOss, prompts: Sequence[Sequence[int]], *,
                   max_new_tokens: int = 256,
                   sampler: Sampler | None = None,
                   stop: Iterable[int] = (), seed: int | None = None,
                   prefill_chunk: int = 512) -> list[list[int]]:
    """The continuations of `prompts` (lists of ids of any lengths).

    Row r is what `generate` gives for prompt r and the seed `seed` + r,
    up to the rounding of larger matrix products.
    """
    sampler, stop = sampler or Sampler(), frozenset(stop)
    rows = [[operator.index(token) for token in row] for row in prompts]
    limit = _limit(model.config, None)
    for number, row in enumerate(rows):
        try:
            _check_run(model.config, row, 0, max_new_tokens, prefill_chunk,
                       limit)
        except GenerateError as error:
            raise GenerateError(f"row {number}: {error}") from None
    if not rows:
        return []
    generators = _generators(seed, len(rows))
    room = [min(max_new_tokens, limit - len(row) + 1) for row in rows]
    cache = model.new_cache(batch_size=len(rows))
    out: list[list[int]] = [[] for _ in rows]
    tokens, mask = _pad_left(rows, model.embed_tokens.weight.device)
    while True:
        logits = _feed(model, tokens, mask, cache, prefill_chunk)
        chosen = torch.cat([sampler(row[None], generator) for row, generator
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
# ### Text as it comes

# %% tags=["export"]
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

# %% tags=["export"]
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


def complete(model: GptOss, tokenizer: Tokenizer, prompt: str | list[int], *,
             stop: Iterable[int] = (),
             on_text: Callable[[str], object] | None = None,
             **options) -> Completion:
    """Runs `generate` (its `options`) on a text or on token ids.

    `on_text` is called with each piece of text as it comes.
    """
    stop = frozenset(stop)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    done, pieces = Completion(list(ids)), []
    stream, began = TextStream(tokenizer), time.perf_counter()
    for token in generate(model, ids, stop=stop, **options):
        done.tokens.append(token)
        if token in stop:
            done.finish_reason = "stop"
            break
        pieces.append(stream.feed(token))
        if on_text and pieces[-1]:
            on_text(pieces[-1])
    pieces.append(stream.flush())
    if on_text and pieces[-1]:
        on_text(pieces[-1])
    done.text = "".join(pieces)
    done.seconds = time.perf_counter() - began
    return done

# %%
pieces = []
done = complete(model, tokenizer, "Once upon a time", stop=stop, seed=1,
                max_new_tokens=12, on_text=pieces.append)
print(pieces)
print(done.finish_reason, len(done.tokens), done.text)

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
# tokens has mean $m - 1$ and variance $2(m - 1)$ if it is; five standard
# deviations are allowed.

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
wanted = [slow(prompt, 25) for prompt in prompts]
for chunk in (1, 7, 512):
    options = {"sampler": greedy, "prefill_chunk": chunk}
    assert [list(generate(model, prompt, max_new_tokens=25, **options))
            for prompt in prompts] == wanted
    assert generate_batch(model, prompts, max_new_tokens=25,
                          **options) == wanted

cache, parts = model.new_cache(), []
for count in (1, 14, 10):
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
# (mlx-openai-server#178); characters cut between tokens, fixed in
# llama.cpp#4446 and met again in servers ever since.

# %% [markdown]
# ## In the 20b and the 120b
#
# The released generation_config.json names three ids. config.json names one
# of them: whoever reads only that misses the end of a tool call.

# %%
import tempfile

released = {"bos_token_id": 199998, "do_sample": True,
            "eos_token_id": [200002, 199999, 200012],
            "pad_token_id": 199999}
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "generation_config.json").write_text(json.dumps(released))
    print("generation_config.json:", stop_ids(folder))
print("config.json:", stop_ids(GptOssConfig.gpt_oss_20b()))

# %% [markdown]
# During prefill only the last position's logits are of use. For all
# positions of a prompt of 4,096 tokens they would fill a tensor of

# %%
V = GptOssConfig.gpt_oss_20b().vocab_size
print(f"{4096 * V * 2 / 1e9:.2f} GB in bf16, instead of {V * 2 / 1e3:.0f} kB")

# %% [markdown]
# ## Cost
#
# For a prompt of $P$ tokens and $N$ new ones the naive loop feeds
#
# $$ \sum_{n=0}^{N-1} (P + n) = NP + \tfrac12 N(N-1)
#    \quad\text{tokens, the cached loop}\quad P + N - 1 . $$ (generate-fed)

# %%
P = len(prompts[0])
assert sum(fed) == 210 * P + 210 * 209 // 2
fed.clear()
hook = model.register_forward_pre_hook(
    lambda module, inputs: fed.append(inputs[0].numel()))
N = len(list(generate(model, prompts[0], max_new_tokens=210)))
hook.remove()
assert sum(fed) == P + N - 1
print(f"{210 * P + 210 * 209 // 2:,} against {P + N - 1:,}")

# %% [markdown]
# Sampling costs one pass over $V$ numbers in float64 (8 bytes each), three
# with top-k or top-p. A full sort of 201,088 numbers takes tens of
# milliseconds on a CPU core, as long as some tokens take; `best` avoids it
# for top-k always, and for top-p whenever 1,024 tokens reach the mass.

# %%
print(f"{V * 8 / 1e6:.1f} MB of float64 a row")

# %% [markdown]
# ## Takeaways
#
# - Ties are normal in bf16: "the k largest" needs a rule for equals, or it
#   keeps more than k.
# - Stop ids come from generation_config.json, all of them. A check belongs
#   before the first token, and NaN must raise, not choose.
# - Stream bytes, not tokens: at most three wait for their character.

# %% [markdown]
# ## Exercises
#
# **Exercise 1.** How many tokens does top-p 0.9 keep as the temperature
# rises from 0.5 to 3? Why is top-p alone a weak guard at high temperature?

# %% tags=["hide-cell"]
kept = [int((Sampler(t, top_p=0.9).probabilities(logits[None]) > 0).sum())
        for t in (0.5, 1.0, 2.0, 3.0)]
print(kept)
# the flatter the distribution, the more of the tail it takes to reach 0.9
assert kept == sorted(kept) and kept[-1] > 5 * kept[0]

# %% [markdown]
# **Exercise 2.** min-p keeps tokens with at least a share of the likeliest
# token's probability. Write it, and show that it needs no sort and that
# temperature must come before it.

# %% tags=["hide-cell"]
def min_p(logits: Tensor, temperature: float, share: float) -> Tensor:
    probs = (logits.double() / temperature).softmax(-1)
    kept = probs.where(probs >= share * probs.amax(-1, keepdim=True), 0)
    return kept / kept.sum(-1, keepdim=True)


sizes = [int((min_p(logits[None], t, 0.1) > 0).sum()) for t in (0.5, 1, 2)]
print(sizes)
# p_i / p_max = exp((z_i - max z) / t): the cut is max z + t log(share)
assert all(size == int((logits >= logits.max() + t * math.log(0.1)).sum())
           for size, t in zip(sizes, (0.5, 1, 2), strict=True))

# %% [markdown]
# **Exercise 3.** If every $g_i$ is $-\log(-\log u_i)$ with uniform $u_i$,
# then $\operatorname{argmax}_i (z_i/\tau + g_i)$ is distributed as in
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
# **Exercise 4.** Change one word of a finished text and write on from
# there, keeping what the cache still holds. Show that the result is that of
# a fresh start. (Chapter 9: `rollback` returns the position from which
# tokens must be fed again.)

# %% tags=["hide-cell"]
cache = model.new_cache()
text = prompts[0] + list(generate(model, prompts[0], cache=cache,
                                  sampler=greedy, max_new_tokens=300))
at = len(prompts[0]) + 240
edited = text[:at] + tokenizer.encode(" golden")
start = cache.rollback(at)
again = list(generate(model, edited[start:], cache=cache, sampler=greedy,
                      max_new_tokens=20))
assert again == slow(edited, 20)
print(f"of {at} tokens, those from {start} on were fed again")

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
# - Threads: mlx-openai-server#178, llama.cpp#4446, unsloth#3152.
