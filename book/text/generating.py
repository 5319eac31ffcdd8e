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
from importlib.resources import files

from gptoss.text.sampling import Sampler

torch.manual_seed(0)
POCKET = files("gptoss") / "pocket"
model = GptOss.from_pretrained(POCKET, dtype=torch.float32)
tokenizer = Tokenizer.from_pretrained(POCKET)
opening = "Once upon a time there was a little fox named Mira."
lost = (" For her birthday she got a white lamp. One morning she went to the "
        "park with the lamp. But on the way from the cave she lost the lamp. ")

# %%
def naive(prompt: list[int], count: int):
    ids = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([ids]))[:, -1]
        token = Sampler(0)(logits).item()
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

# %% [markdown]
# Three faults: the work grows with the square of the length; nothing stops at
# the end of the story; a letter of two bytes becomes two replacement
# characters.

# %% [markdown]
# ## Derivation
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
# is seen by nothing ([the mask](../attention/masks.ipynb)) and never enters
# [the cache](../model/cache.ipynb), so row $r$ counts its positions from 0 as
# it would alone.

# %% [markdown]
# ## Code
#
# ### When to stop
#
# `generation_config.json` has the ids. But people put only a temperature
# there, and `transformers` itself writes files without ids. Where it says
# nothing, `config.json` may; and if that says nothing either, a gpt-oss still
# ends its turns as [harmony](conversation.ipynb) does, with the tokens of
# those names in its tokenizer. A list of no ids says nothing, too: a text
# that nothing can end is not what anybody meant.

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
# a time, always the same work; [a recorded step](../kernels/step.ipynb) does
# it with less ado. It gets its place here: a *decoder* makes of model and
# cache a step, something that takes a token (1, 1) and gives logits
# (1, 1, V). Which step runs is an argument, and one function decides: it asks
# for the recorded one where nobody asked for another.

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

# %% tags=["export"]
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

# %% tags=["export"]
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

# %% tags=["export"]
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
# ## It holds
#
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
# ## Against the others
#
# Known errors elsewhere: stopping at 200002 alone, so that a tool call,
# which ends with 200012, runs on into the reasoning
# (mlx-openai-server#178); characters cut between tokens (llama.cpp#4446
# mended it).

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
assert any("\ufffd" in text for text in shown[:-1])
assert shown[-1] == "né 🙂"

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
assert int((~mask).sum()) == 2 * 90

# %% [markdown]
# ## Sources
#
# - openai/gpt-oss, `gpt_oss/torch/model.py` (`TokenGenerator`).
# - huggingface/transformers, `generation/utils.py` (`generate`).
# - Threads: mlx-openai-server#178, llama.cpp#4446.
