"""How does one of 201,088 logits become the next token?

Generated from book/text/sampling.py; edit the chapter, not this file.
"""

import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptoss.weights.errors import Error, is_count, is_number, refuse

# --- Names for what is wrong -------------------------------------------------

class GenerateError(Error):
    """An option, a prompt or logits that generation cannot use."""


reject = partial(refuse, GenerateError)


# --- The k best --------------------------------------------------------------

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


# --- Temperature, top-k, top-p -----------------------------------------------

def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """`probs` (B, n), largest first, cut to the fewest that reach top_p."""
    mass = probs.cumsum(-1)
    probs = probs.clone()  # a token goes if those before it suffice
    probs[..., 1:].masked_fill_(mass[..., :-1] >= top_p, 0.0)
    return probs / probs.sum(-1, keepdim=True)


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


# --- Drawing with one uniform number -----------------------------------------

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


# --- The sampler -------------------------------------------------------------

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


# --- One object for all options ----------------------------------------------

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


__all__ = [
    "GenerateError",
    "NUCLEUS",
    "Sampler",
    "SamplingOptions",
    "best",
    "draw",
    "nucleus",
    "ranked",
    "reject",
]
