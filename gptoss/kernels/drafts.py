"""Can a token be guessed and then checked?

Generated from book/kernels/drafts.py; edit the chapter, not this file.
"""

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

# --- What does a step of n tokens read? --------------------------------------

def step_bytes(config: GptOssConfig, tokens: int) -> float:
    """Bytes of weights that a forward of so many tokens reads."""
    E, K = config.num_local_experts, config.num_experts_per_tok
    more = expected_hits(E, K, tokens) - K  # more than one token reads
    return (bytes_read_per_token(config)
            + config.num_hidden_layers * more * expert_bytes(config))


# --- Who guesses? ------------------------------------------------------------

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


# --- Which guesses are kept? -------------------------------------------------

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


# --- How many are worth it? --------------------------------------------------

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


# --- The loop ----------------------------------------------------------------

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


# --- A small model that guesses ----------------------------------------------

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


# --- Who may be given, and what is refused? ----------------------------------

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


__all__ = [
    "AGAIN",
    "Drafter",
    "MARGIN",
    "MEMORY",
    "ModelDrafter",
    "Pace",
    "check_costs",
    "check_guesses",
    "drafter_for",
    "draw_along",
    "keep_or_redraw",
    "step_bytes",
    "with_drafts",
]
