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
#     public: [Completion, TextStream, complete, generate_batch, stop_ids]
# ---

# %% [markdown]
# # When is a text over, and how does it reach the screen?
#
# ## Question
#
# A model goes on for ever: nothing in it ends a text, it only makes a token
# likely that somebody must know as the end. And not every token is text: a
# letter of two bytes may be two of them. How does a story of 210 tokens come
# to the screen as it is written, end where it ends, and cost 222 tokens of
# work instead of 24,675?

# %% [markdown]
# ## Picture

# %% tags=["hide-input", "picture"]
# Figure: a table in time, a column a token: its id, its bytes, the bytes that
# wait, the new text on the screen. é appears with its second byte, the sign
# with its third; the last column is the stop id, which shows nothing.
from importlib.resources import files

import matplotlib.pyplot as plt

from gptoss.text.generate import TextStream as Finished
from gptoss.text.tokenizer import Tokenizer

plt.style.use("../_static/book.mplstyle")
POCKET = files("gptoss") / "pocket"
tokenizer = Tokenizer.from_pretrained(POCKET)
drawn = [*tokenizer.encode("né ☺!"), tokenizer.special["<|return|>"]]
fig, ax = plt.subplots(figsize=(7.4, 2.3))
for y, name in enumerate(["id, drawn from logits", "its bytes",
                          "bytes that wait", "new on the screen"]):
    ax.text(-0.65, -y, name, ha="right", va="center")
finished, waits, shown = Finished(tokenizer), b"", ""
for x, n in enumerate(drawn):
    stop = tokenizer.is_special(n)
    data = b"" if stop else tokenizer.token_bytes(n)
    new = "" if stop else finished.feed(n)
    waits, shown = b"" if new else waits + data, shown + new
    for y, (label, colour) in enumerate([
            (str(n), "0.25" if stop else "C0"), (data.hex(" "), "C0"),
            (waits.hex(" "), "C1"), (new.replace(" ", "␣"), "C2")]):
        if label:
            ax.barh(-y, 0.94, 0.78, x - 0.47, color=colour,
                    alpha=1 if stop else 0.35)
        ax.text(x, -y, label, ha="center", va="center",
                fontsize=10 if y == 3 else 7.5, color="w" if stop else "k")
ax.text(x, -1, "a stop id:\nthe end", ha="center", va="center",
        fontsize=7.5)
ax.annotate("", (x + 0.6, 0.72), (-0.6, 0.72), arrowprops={
    "arrowstyle": "-|>", "color": "0.3"})
ax.text(-0.65, 0.72, "time", ha="right", va="center", color="0.3")
ax.set(xlim=(-3.6, x + 0.8), ylim=(-3.5, 1.0))
ax.axis("off")
plt.show()
print(len(drawn), "tokens,", len(shown), "characters on the screen")

# %% [markdown]
# **What to see.** The model writes `né ☺!`. Time goes to the right, and each
# column is one token: one run of the model, whose logits give one id. An id
# stands for bytes. `n` is a character at once and is shown. The é comes in two
# tokens of one byte each; the first has to wait, since half a letter cannot be
# shown, and the letter appears with the second. The sign ☺ needs three. The
# last token is the one that ends a turn. It is not text: the loop stops there
# and shows nothing.

# %% [markdown]
# ## The naive version
#
# Run the model on the text so far, draw, append, repeat; show each token as
# it comes.

# %% tags=["export"]
import codecs
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoss.model.cache import Cache
from gptoss.model.transformer import GptOss
from gptoss.text.sampling import GenerateError, SamplingOptions, reject
from gptoss.text.tokenizer import Tokenizer
from gptoss.weights.config import GptOssConfig
from gptoss.weights.config_file import read_json
from gptoss.weights.convert import home_file
from gptoss.weights.errors import is_count
from gptoss.weights.files import config_folder

# %%
from gptoss.text.sampling import Sampler

torch.manual_seed(0)
model = GptOss.from_pretrained(POCKET, dtype=torch.float32)
opening = "Once upon a time there was a little fox named Mira."
lost = (" For her birthday she got a white lamp. One morning she went to the "
        "park with the lamp. But on the way from the cave she lost the lamp. ")


def naive(prompt: list[int], count: int):
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[:, -1]
        ids.append(Sampler(0)(logits).item())
        yield ids[-1]


fed = []
hook = model.register_forward_pre_hook(
    lambda module, inputs: fed.append(inputs[0].numel()))
story = "".join(tokenizer.decode([n]) for n in naive(
    tokenizer.encode(opening), 210))
print(f"{sum(fed):,} tokens went through the model for 210 new ones")
print("shown as text:", story[story.index("<|endoftext|>"):][:60])
print([tokenizer.decode([n]) for n in tokenizer.encode("né")])

# %% [markdown]
# Three faults. The work grows with the square of the length, since every step
# reads the whole text again. Nothing stops at the end of the story: the token
# that means it is shown like a word. And a letter of two bytes becomes two
# replacement characters.
#
# ## The loop in ten lines
#
# The first two faults go quickly. The [cache](../model/cache.ipynb) keeps what
# the model has computed, so that after the prompt only the new token has to be
# fed. And somebody must know which ids end a text.

# %%
def essential(prompt: list[int], count: int, stop: set[int]):
    cache, feed = model.new_cache(), torch.tensor([prompt])
    for _ in range(count):
        logits = model(feed, cache=cache, logits_to_keep=1)[:, -1]
        token = Sampler(0)(logits)
        yield token.item()
        if token.item() in stop:
            return
        feed = token[:, None]


fed.clear()
with torch.no_grad():
    ids = list(essential(tokenizer.encode(opening), 210, set()))
    print(f"{sum(fed):,} tokens for {len(ids)} new ones, the same text:",
          tokenizer.decode(ids[:12]))
    ends = {tokenizer.special["<|endoftext|>"]}
    print("with a stop id:",
          len([*essential(tokenizer.encode(opening), 300, ends)]), "tokens")
assert tokenizer.decode(ids)[:200] == story[:200]
hook.remove()

# %% [markdown]
# The rest of the chapter is about what these lines leave open: which ids
# stop; how many tokens fit; what if a prompt is long, if there are several of
# them; and how text reaches the screen.

# %% [markdown]
# ## Code
#
# ### Which ids end a text?
#
# A gpt-oss ends its own part in three ways: `<|return|>` behind an answer,
# `<|call|>` behind the call of a function, which the program must now run, and
# `<|endoftext|>` behind a text that is no conversation. A checkpoint says so
# in `generation_config.json`. But people put only a temperature there, and
# `transformers` itself writes files without ids. So we ask, in this order, and
# take the first that says something:
#
# | file | what | if it says nothing |
# |---|---|---|
# | generation_config.json | `eos_token_id`, one or a list | ask the next |
# | config.json | `eos_token_id` | ask the next |
# | tokenizer.json | the three names | the ids of o200k |
#
# A list of no ids says nothing, too: a text that nothing can end is not what
# anybody meant. For a folder `original`, the second copy in the released
# layout, the first file may lie in the folder above. What is no id is refused,
# with the name of the file. A configuration alone has its own one id.

# %% tags=["export:stops"]
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
import tempfile

stop = stop_ids(POCKET)
print([tokenizer.decode([n]) for n in stop])
with tempfile.TemporaryDirectory() as folder:
    said = Path(folder, "generation_config.json")
    config = (POCKET / "config.json").read_text()
    Path(folder, "config.json").write_text(config)
    for text in ('{"temperature": 0.7}', '{"eos_token_id": []}',
                 '{"eos_token_id": [273, null]}'):
        said.write_text(text)
        try:
            print(text, stop_ids(folder))
        except GenerateError as error:
            print(str(error).removeprefix(f"{folder}/"))

# %% [markdown]
# ### What is checked before any work
#
# A prompt has at least one token, and each is an id of the vocabulary. It must
# also fit. Say there are 12 positions, 5 of them taken in the cache, and a
# prompt of 4 tokens: 3 positions are left, and 4 tokens can be written, as the
# last one needs no position, since nothing is fed after it. In general, of $M$
# positions, a prompt of $P$ tokens after $n$ cached ones leaves room for
# $M - n - P + 1$ new tokens. If $n + P > M$ the prompt is refused.

# %% tags=["export"]
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

# %% [markdown]
# ### One text
#
# `generate` checks and returns an iterator. Its body is a function of its
# own because a Python generator runs nothing, not even a check, before its
# first item is asked for. The stop token is given too, as the last.
#
# After the prompt the same model takes one token at a time, always the same
# work, and that can be made quicker: [a recorded step](../kernels/step.ipynb)
# does it without asking anew each time what to do. That comes chapters later,
# so here is only its place. A *decoder* makes of a model and a cache a *step*,
# something that takes a token (1, 1) and gives logits (1, 1, V).
# `forward_step` makes the plain one, the model itself. Which one runs is an
# argument, `decode`: "eager" for the plain one, "auto" for a quicker one if
# there is one, or a decoder of one's own. Several tokens at once, guessed and
# then checked, have such a place, too: `draft`, for [guesses that are
# checked](../kernels/drafts.ipynb).

# %% tags=["export"]
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

# %% [markdown]
# The loop is the essential one with four additions: the prompt is fed in
# chunks of `prefill_chunk` tokens, which bounds the memory; the sampler takes
# its random numbers from a generator with the given seed; the step is chosen
# when the first single token is due; and it may pause, as we shall see.

# %% tags=["export"]
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

# %% tags=["export"]
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

# %%
ids = list(generate(model, tokenizer.encode(opening), stop=stop,
                    sampler=Sampler(0)))
print(len(ids), "tokens, ended by", tokenizer.decode(ids[-1:]))
print(tokenizer.decode(ids[:40]), "...")

# %% [markdown] tags=["measured"]
# A long prompt takes time: the 20b needs minutes for 10,000 tokens on a CPU of
# 2 cores. Whoever asks for `pauses` gets None after every chunk, and may stop.
# What was fed is in the cache, and the rest can be fed later:

# %%
cache, long = model.new_cache(), tokenizer.encode(opening + lost) * 2
for token in generate(model, long, cache=cache, prefill_chunk=20,
                      sampler=Sampler(0), pauses=True):
    print(f"{cache.length} of {len(long)} fed, then {token}")
    if cache.length >= 60:
        break
rest = generate(model, long[cache.length:], cache=cache, sampler=Sampler(0))
later, at_once = next(rest), next(generate(model, long, sampler=Sampler(0)))
print("the first token, with a pause and at once:", later, at_once)
assert later == at_once

# %% [markdown]
# ### Many texts at once
#
# A batch has one shape, and prompts have many lengths. We pad on the *left*:
# then all rows end in the last column, whose logits are the only ones needed.
# Padding has position $-1$, sees nothing, is seen by nothing
# ([the mask](../attention/masks.ipynb)) and never enters the cache, so each
# row counts its positions from 0 as it would alone.

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

# %% [markdown]
# A row that has ended goes on as padding until all have. Row r draws with the
# seed `seed` + r, so it is what `generate` gives for that prompt and that
# seed. A prompt that is refused is named by its row.

# %% tags=["export"]
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
# the same loop behind another door. [The model's](../model/transformer.ipynb)
# method calls this function; an option that it does not know is a TypeError,
# never ignored.

# %% tags=["export"]
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

# %%
both = torch.tensor([tokenizer.encode(opening)] * 2)
mask = torch.ones_like(both)
mask[1, :7] = 0  # the second row is only the end of the first
out = model.generate(both, attention_mask=mask, do_sample=False,
                     max_new_tokens=6)
print(tuple(both.shape), "->", tuple(out.shape))
print([tokenizer.decode(row[both.shape[1]:]) for row in out.tolist()])

# %% [markdown]
# ## How does text come whole?
#
# **By hand.** These are the bytes of three characters:

# %%
for char in "é☺🙂":
    print(char, *(f"{byte:08b}" for byte in char.encode()))

# %% [markdown]
# The first byte says how many there are: `110…` two, `1110…` three, `11110…`
# four, and `0…` is a character by itself. All that follow begin with `10`. So
# whoever has read the first byte knows how many to wait for. **In general**
# at most three bytes wait, and everything before them is final; a decoder that
# remembers these needs no look at earlier text. Python has one in `codecs`.
#
# ### Text as it comes
#
# A control token cannot stand within a character. If one comes while bytes
# wait, they become U+FFFD, then its name is shown (or nothing, with
# `skip_special`). All pieces together are what `tokenizer.decode` says.

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
#
# Generate, stop, stream: `complete` does all three for a text or for ids.

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

# %% tags=["export"]
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

# %%
pieces = []
done = complete(model, tokenizer, "Once upon a time", stop=stop, seed=1,
                max_new_tokens=12, on_text=pieces.append)
print(pieces)
print(done.finish_reason, len(done.tokens), done.text)

# %% [markdown]
# ## What is refused
#
# Everything at the call, not at the first token; each is a `GenerateError`,
# except an option that does not exist, a `TypeError`.

# %%
for wrong in ({"prompt": []}, {"prompt": [3, 5000]},
              {"prompt": [1] * 3000}, {"prompt": [1], "decode": "fast"},
              {"prompt": [1], "cache": model.new_cache(batch_size=2)},
              {"prompt": [1], "num_beams": 4}):
    try:
        generate(model, **wrong)
    except (GenerateError, TypeError) as error:
        print(str(error)[:76])

# %% [markdown]
# ## It holds
#
# **The fast loop is the slow loop**: greedy with the cache, in any chunks,
# continued, or in a batch, gives what the model gives on the whole text.

# %%
greedy = Sampler(0)
wanted = [list(naive(prompt, 12)) for prompt in prompts]
equal = 0
for chunk in (1, 7, 512):
    options = {"sampler": greedy, "prefill_chunk": chunk}
    assert [list(generate(model, prompt, max_new_tokens=12, **options))
            for prompt in prompts] == wanted
    assert generate_batch(model, prompts, max_new_tokens=12,
                          **options) == wanted
    equal += 2 * len(prompts)
print(equal, "texts of 12 tokens: one by one and in a batch, three chunks")

cache, parts = model.new_cache(), []
for count in (1, 6, 5):
    parts += generate(model, parts[-1:] or prompts[0], cache=cache,
                      max_new_tokens=count, sampler=greedy)
print("in three parts:", tokenizer.decode(parts))
print("at once:       ", tokenizer.decode(wanted[0]))
assert parts == wanted[0]

# %% [markdown]
# **No character is broken**, wherever the bytes are cut: all 2,048 ways of
# cutting a text of 12 bytes with characters of one to four.

# %%
from itertools import pairwise
from types import SimpleNamespace

text = "a é中 🙂"
data = text.encode()
for cuts in range(2 ** (len(data) - 1)):
    ends = [n + 1 for n in range(len(data)) if cuts >> n & 1]
    pieces = [data[a:b] for a, b in pairwise([0, *ends, len(data)])]
    stream, shown = TextStream(SimpleNamespace(
        token_bytes=pieces.__getitem__, is_special=lambda n: False)), ""
    for n in range(len(pieces)):
        shown += stream.feed(n)
        assert text.startswith(shown)
    assert shown == text and stream.flush() == ""
print(f"{2 ** (len(data) - 1):,} cuts of {len(data)} bytes")

# %% [markdown]
# ## In the 20b and the 120b
#
# The released generation_config.json names three ids. config.json names one
# of them: whoever reads only that misses the end of a tool call
# (mlx-openai-server#178; Exercise 3). Half characters were shown by others,
# too, until llama.cpp#4446 and its like.

# %%
released = {"bos_token_id": 199998, "do_sample": True,
            "eos_token_id": [200002, 199999, 200012],
            "pad_token_id": 199999}
with tempfile.TemporaryDirectory() as folder:
    Path(folder, "generation_config.json").write_text(json.dumps(released))
    print("generation_config.json:", stop_ids(folder))
print("config.json:", stop_ids(GptOssConfig.gpt_oss_20b()))

# %% [markdown]
# ## Cost
#
# A prompt of 3 tokens and 2 new ones: the naive loop feeds 3, then 4 tokens,
# together 7; the cached loop feeds 3, then 1, together 4. For a prompt of $P$
# tokens and $a$ new ones
#
# $$ \sum_{i=0}^{a-1} (P + i) = aP + \tfrac12 a(a-1)
#    \quad\text{tokens, the cached loop}\quad P + a - 1 . $$ (generate-fed)

# %%
P, a = len(tokenizer.encode(opening)), 210
print(f"P = {P}, a = {a}: {a * P + a * (a - 1) // 2:,} and {P + a - 1} "
      "tokens, as counted above")

# %% [markdown]
# ## Takeaways
#
# - Stop ids come from generation_config.json, all of them; config.json alone
#   misses the end of a tool call.
# - Stream bytes, not tokens: at most three wait for their character.
# - With a cache a text costs its length, without one the square of it.
# - Pad a batch on the left, and let a row that has ended go on as padding.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# A program shows `tokenizer.decode(ids)` anew after every token instead of
# streaming. What does the reader see of "né 🙂" in between, and how many bytes
# does it decode for a text of n tokens?

# %% tags=["hide-cell"]
ids, shown = tokenizer.encode("né 🙂"), []
for n in range(1, len(ids) + 1):
    shown.append(tokenizer.decode(ids[:n]))
print(shown)
stream = TextStream(tokenizer)
print([stream.feed(n) for n in ids])
# Half characters appear and change again, which a pipe or a browser cannot
# take back; and the whole text is decoded each time, about n^2 / 2 tokens.

# %% [markdown]
# ### Exercise 2
#
# Three prompts are generated in one batch, and one of them is ten times as
# long as the others. Which share of the columns that are fed is padding?
# What would you do about it?

# %% tags=["hide-cell"]
rows = [prompts[0][:10], prompts[0][:10], prompts[0][:1] * 100]
_, mask = _pad_left(rows, torch.device("cpu"))
print(f"{1 - mask.float().mean():.0%} of {mask.numel()} columns")
# Feed rows of a like length together, or each prompt by itself, and put them
# into one batch only when they write.

# %% [markdown]
# ### Exercise 3
#
# A program reads its stop id from config.json alone, `<|return|>`, and offers
# the model a calculator. What does the model write behind its call?

# %% tags=["hide-cell"]
tools = [{"type": "function", "function": {
    "name": "calculator", "description": "Work out an arithmetic expression.",
    "parameters": {"type": "object", "required": ["expression"],
                   "properties": {"expression": {
                       "type": "string",
                       "description": "what to work out"}}}}},
    {"type": "function", "function": {
        "name": "today", "description": "The date of today."}}]
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is 1234 + 567?"}], tools, date="")
for ends in (stop, {tokenizer.special["<|return|>"]}):
    ids = list(generate(model, prompt, stop=ends, max_new_tokens=90,
                        sampler=Sampler(0)))
    text = tokenizer.decode(ids)
    print(len(ids), "tokens, behind the arguments:",
          text.rpartition('567"}')[2][:120])
# It makes up the calculator's answer, a wrong one, and goes on with a user
# who never spoke. With all three ids it stops and waits for the program.

# %% [markdown]
# ## Sources
#
# - openai/gpt-oss, `gpt_oss/torch/model.py` (`TokenGenerator`).
# - huggingface/transformers, `generation/utils.py` (`generate`).
# - Threads: mlx-openai-server#178, llama.cpp#4446.
