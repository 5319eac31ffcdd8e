"""When is a text over, and how does it reach the screen?

Generated from book/text/generating.py; edit the chapter, not this file.
"""

import codecs
import logging
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptoss.model.answers import find_answer
from gptoss.model.cache import Cache
from gptoss.model.transformer import GptOss
from gptoss.text.sampling import GenerateError, SamplingOptions, reject
from gptoss.text.stops import stop_ids
from gptoss.text.tokenizer import Tokenizer
from gptoss.weights.config import GptOssConfig

# --- What is checked before any work -----------------------------------------

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


# --- One text ----------------------------------------------------------------

_log = logging.getLogger("gptoss")
Decoder = Callable[[GptOss, Cache], Callable[[Tensor], Tensor]]


def forward_step(model: GptOss, cache: Cache) -> Callable[[Tensor], Tensor]:
    """Single tokens (and longer pieces) by the model's own forward."""
    return partial(model, cache=cache, logits_to_keep=1)


def choose_step(model: GptOss, cache: Cache, decode: Decoder | str = "auto"
                ) -> Callable[[Tensor], Tensor]:
    """What runs single tokens of the model, by `decode`.

    "eager": the model's own forward. "auto": a quicker step, where
    kernels/step has one for this model and cache, else the same. A decoder:
    what it makes. One line on the logger "gptoss" (INFO) says which, and why.
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


def _limit(config: GptOssConfig, cache: Cache | None) -> int:
    """How many positions there are: the model's, or the cache's if fewer."""
    most = None if cache is None else cache.max_tokens
    return most or config.max_position_embeddings


def _generators(model: GptOss, seed: int | None, rows: int
                ) -> list[torch.Generator]:
    """A generator for each row; row 0 of a seed is the seed itself."""
    if seed is None:
        drawn = seed = int(torch.randint(2 ** 48, ()))
        if (group := getattr(model, "group", None)) is not None:
            seed = group.same(lambda: drawn)  # one for all its processes
    return [torch.Generator().manual_seed(seed + row) for row in range(rows)]


def one_by_one(model: GptOss, prompt: list[int], count: int,
               options: SamplingOptions, generator: torch.Generator,
               cache: Cache | None, decode: Decoder | str, pauses: bool
               ) -> Iterator[int | None]:
    """What `generate` yields, for arguments that are checked."""
    cache = cache or model.new_cache()
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
        token = int(chosen)
        yield token
        if token in stop or produced == count:
            return
        if produced == 1:
            run = choose_step(model, cache, decode)
        feed = chosen[:, None]


def generate(model: GptOss, prompt: Sequence[int],
             options: SamplingOptions | None = None, *,
             cache: Cache | None = None, decode: Decoder | str = "auto",
             pauses: bool = False, draft: Any = None,
             before: Sequence[int] = (), **changes: Any
             ) -> Iterator[int | None]:
    """Yields the token ids that follow `prompt`, a list of ids.

    `options`, but for `changes`: single fields of `SamplingOptions`. Ends
    after `max_new_tokens`, after a token in `stop` (which is yielded,
    last), or when the positions are used up. `cache`: a cache of batch 1
    whose tokens precede the prompt; afterwards it holds all but the
    last token yielded, so the next prompt begins with that one. `decode`:
    how to run single tokens, as in `choose_step`: "auto", "eager" or a
    function of model and cache such as `DecodeStep`. `pauses`: yield None
    after each chunk of the prompt but the last, so that a long prompt can
    be left: the cache then holds the chunks that were fed. `draft`: who
    guesses tokens, so that several are run at once, as kernels/drafts says:
    "lookup", a small GptOss or a `Drafter`. `before`: the tokens in the
    cache, for a draft to look at.
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
    run = one_by_one if draft is None else find_answer("drafts")(
        draft, before, model)
    return run(model, prompt, options.room(limit - held - len(prompt)),
               options, _generators(model, options.seed, 1)[0], cache, decode,
               pauses)


def _only_tokens(found: Iterable[int | None]) -> Iterator[int]:
    """What was generated, without the pauses."""
    return (token for token in found if token is not None)


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


def generate_batch(model: GptOss, prompts: Sequence[Sequence[int]],
                   options: SamplingOptions | None = None,
                   **changes: Any) -> list[list[int]]:
    """The continuations of `prompts` (lists of ids of any lengths).

    `options`, `changes`: as for `generate`. Row r is what `generate` gives
    for prompt r and the seed `seed` + r, up to the rounding of larger
    matrix products. There are no drafts in a batch: its rows step together.
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


# --- As a method of the model ------------------------------------------------

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
        return [*input_ids, *_only_tokens(generate(model, input_ids, run))]
    rows = _unpadded(input_ids, attention_mask)
    new = ([list(_only_tokens(generate(model, rows[0], run)))]
           if len(rows) == 1 else generate_batch(model, rows, run))
    pad = model.config.pad_token_id if pad_token_id is None else pad_token_id
    made = torch.full((len(new), max(map(len, new), default=0)), pad)
    for row, tokens in zip(made, new, strict=True):
        row[:len(tokens)] = torch.tensor(tokens)
    return torch.cat([input_ids.long(), made.to(input_ids.device)], 1)


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


def complete(model: GptOss, tokenizer: Tokenizer, prompt: str | list[int],
             options: SamplingOptions | None = None, *,
             on_text: Callable[[str], object] | None = None,
             cache: Cache | None = None, decode: Decoder | str = "auto",
             draft: Any = None, **changes: Any) -> Completion:
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
    for token in _only_tokens(generate(model, ids, options, cache=cache,
                                       decode=decode, draft=draft)):
        done.tokens.append(token)
        if token in options.stop:
            done.finish_reason = "stop"
            break
        add(stream.feed(token))
    add(stream.flush())
    done.seconds = time.perf_counter() - began
    return done


__all__ = [
    "Completion",
    "Decoder",
    "TextStream",
    "choose_step",
    "complete",
    "continue_ids",
    "forward_step",
    "generate",
    "generate_batch",
    "one_by_one",
]
