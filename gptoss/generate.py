"""Choosing the next token

Generated from book/12_generate.py; edit the chapter, not this file.
"""

import codecs
import logging
import math
import operator
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gptoss.answers import find_answer
from gptoss.cache import Cache
from gptoss.checkpoint import config_folder, home_file
from gptoss.config import GptOssConfig, read_json
from gptoss.harmony import Tokenizer
from gptoss.model import GptOss

# --- Refusing by name --------------------------------------------------------

class GenerateError(ValueError):
    """An option, a prompt or logits that generation cannot use."""


def _refuse(option: str, expected: str, found: object) -> None:
    raise GenerateError(f"{option}: expected {expected}, found {found!r}")


def _is_number(value: object, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


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


# --- When to stop ------------------------------------------------------------

HARMONY_STOPS = {"<|return|>": 200002, "<|endoftext|>": 199999,
                 "<|call|>": 200012}


def _said_stops(file: Path) -> tuple[int, ...]:
    """eos_token_id of a JSON file; () if it says nothing of it."""
    said = read_json(file)
    if not isinstance(said, dict):
        _refuse(str(file), "a JSON object", type(said).__name__)
    found = said.get("eos_token_id")
    if found is None:
        return ()
    ids = found if isinstance(found, list) else [found]
    if not all(_is_number(n, int) and 0 <= n < 2 ** 31 for n in ids):
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
        _refuse(f"{folder}: eos_token_id", "some in generation_config.json or"
                " config.json", None)
    return ids


# --- What is checked before any work -----------------------------------------

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


# --- One text ----------------------------------------------------------------

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
        _refuse("decode", "auto, eager or a function of model and cache",
                decode)


def _limit(config: GptOssConfig, cache: Cache | None) -> int:
    """How many positions there are: the model's, or the cache's if fewer."""
    most = None if cache is None else cache.max_tokens
    return most or config.max_position_embeddings


def _generators(model: GptOss, seed: int | None, rows: int
                ) -> list[torch.Generator]:
    """A generator for each row; row 0 of a seed is the seed itself."""
    if seed is None:
        drawn = seed = torch.randint(2 ** 48, ()).item()
        if (link := getattr(model, "link", None)) is not None:
            seed = link.same(lambda: drawn)  # one for all its processes
    if not (_is_number(seed, int) and 0 <= seed < 2 ** 63):
        _refuse("seed", "an integer from 0 to 2**63 - 1", seed)
    return [torch.Generator().manual_seed(seed + row) for row in range(rows)]


def _generate(model: GptOss, prompt: list[int], count: int,
              sampler: Sampler, stop: frozenset[int],
              generator: torch.Generator, cache: Cache, chunk: int,
              decode: Decoder | str, pauses: bool) -> Iterator[int | None]:
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
            chosen = sampler(run(last)[:, -1], generator)
        token = chosen.item()
        yield token
        if token in stop or produced == count:
            return
        if produced == 1:
            run = choose_step(model, cache, decode)
        feed = chosen[:, None]


def generate(model: GptOss, prompt: Sequence[int], *,
             max_new_tokens: int = 256, sampler: Sampler | None = None,
             stop: Iterable[int] = (), seed: int | None = None,
             cache: Cache | None = None, prefill_chunk: int = 512,
             decode: Decoder | str = "auto", pauses: bool = False
             ) -> Iterator[int | None]:
    """Yields the token ids that follow `prompt`, a list of ids.

    Ends after `max_new_tokens`, after a token in `stop` (which is
    yielded, last), or when the positions are used up. `cache`: a cache of
    batch 1 whose tokens precede the prompt; afterwards it holds all but the
    last token yielded, so the next prompt begins with that one. `decode`:
    how to run single tokens, as in `choose_step`: "auto", "eager" or a
    function of model and cache such as `DecodeStep`. `pauses`: yield None
    after each chunk of the prompt but the last, so that a long prompt can
    be left: the cache then holds the chunks that were fed.
    Raises GenerateError at the call, not at the first token.
    """
    _check_decode(decode)
    prompt = [operator.index(token) for token in prompt]
    if cache is not None and cache.batch_size != 1:
        _refuse("cache", "a batch of 1", cache.batch_size)
    held = 0 if cache is None else cache.length
    limit = _limit(model.config, cache)
    _check_run(model.config, prompt, held, max_new_tokens, prefill_chunk,
               limit)
    # the last token needs no position of its own: nothing is fed after it
    count = min(max_new_tokens, limit - held - len(prompt) + 1)
    return _generate(model, prompt, count, sampler or Sampler(),
                     frozenset(stop), _generators(model, seed, 1)[0],
                     cache or model.new_cache(), prefill_chunk, decode,
                     pauses)


# --- Many texts at once ------------------------------------------------------

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
    generators = _generators(model, seed, len(rows))
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


# --- Text as it comes --------------------------------------------------------

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


# --- A whole completion ------------------------------------------------------

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
    done, stream = Completion(list(ids)), TextStream(tokenizer)

    def add(text: str) -> None:
        done.text += text
        if on_text and text:
            on_text(text)

    began = time.perf_counter()
    for token in generate(model, ids, stop=stop, **options):
        done.tokens.append(token)
        if token in stop:
            done.finish_reason = "stop"
            break
        add(stream.feed(token))
    add(stream.flush())
    done.seconds = time.perf_counter() - began
    return done


def peak_rss_bytes() -> int:
    """The most memory this process has held so far, in bytes."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


__all__ = [
    "Completion",
    "Decoder",
    "GenerateError",
    "HARMONY_STOPS",
    "NUCLEUS",
    "Sampler",
    "TextStream",
    "best",
    "choose_step",
    "complete",
    "draw",
    "forward_step",
    "generate",
    "generate_batch",
    "nucleus",
    "peak_rss_bytes",
    "ranked",
    "stop_ids",
]
