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
#     module: bench
#     public: [measure]
# ---
# %% [markdown]
# # What did each step bring?
#
# ## Question
#
# Which idea brought how much, who is still faster, and how does one measure
# that honestly? One and the same product of four-bit weights ran at 0.3 GB/s
# in plain torch and at 27 with the kernel, on two cores that read 31 in the
# same minutes.

# %% [markdown] tags=["measured"]
# Speeds are one machine's, and no cell can compute them for all. Those in this
# chapter were measured in November 2026 on two cores of an AMD EPYC, Zen 3
# where AVX2 is meant and Zen 4 where AVX-512 is, and of an Intel Xeon (Emerald
# Rapids) where AMX is.
# Many rows were measured on a Zen 5, too, which has the same instructions as a
# Zen 4 and begins twice as many of them.
# Tables and figures show what the programs in `bench/` saved; where a number
# of the text is in no table, the text says so.

# %%
import json
import logging
import os

import matplotlib.pyplot as plt

from gptoss.kernels.build import load_kernels
from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import expert_size, flops_per_token

os.environ["GPTOSS_KERNELS"] = "auto"  # this chapter asks for the kernels
logging.getLogger("gptoss").setLevel(logging.ERROR)  # and says nothing of it
path = load_kernels()
plt.style.use("../_static/book.mplstyle")
with open("../_static/kernels_bench.json") as file:
    MEASURED = json.load(file)  # by bench/, on the machine that it names
with open("../_static/kernels_bench_avx512.json") as file:
    ON_AVX512 = json.load(file)  # the same on another machine
with open("../_static/kernels_bench_amx.json") as file:
    ON_AMX = json.load(file)  # and on a third, many rows alone
with open("../_static/kernels_bench_zen5.json") as file:
    ON_ZEN5 = json.load(file)  # as there
MACHINES = {"Zen 3": MEASURED, "Zen 4": ON_AVX512, "Zen 5": ON_ZEN5,
            "AMX": ON_AMX}
big = GptOssConfig.gpt_oss_20b()


def measured(*keys, default=None, found=MEASURED):
    """An entry of the saved measurements, or None: not measured."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return default if found is None else found


for saved in MACHINES.values():
    print(measured("machine", "words", found=saved))

# %% [markdown]
# ## Picture
#
# The steps from plain torch to the kernel, one idea more in each, on a matrix
# that no cache holds. They stand in `bench/kernels_steps.cpp`; GB/s count the
# packed bytes.

# %% tags=["hide-input"]
# Figure: horizontal bars, a pair for each step, for Zen 3 and Zen 4 with two
# threads, with their numbers. Plain torch and the portable loop can hardly be
# seen; a table in a register, 16-bit integers, two blocks at a time lengthen
# the bars to nine tenths of reading on Zen 3, two thirds on Zen 4.
fig, ax = plt.subplots(figsize=(7.2, 4.2))
speeds = {name: {step["name"]: step["gb_per_s"] for step in
                 measured("steps", default=[], found=saved)
                 if step["threads"] == 2}
          for name, saved in (("Zen 3, AVX2", MEASURED),
                              ("Zen 4, AVX-512", ON_AVX512))}
names = list(dict.fromkeys(name for found in speeds.values()
                           for name in found if name != "only reading"))
names = [n for n in names if n != "the chapter's kernel"] + [
    "the chapter's kernel", "only reading"]
for shift, (label, found), color in zip((-0.2, 0.2), speeds.items(),
                                        ("C0", "C1"), strict=True):
    for y, name in enumerate(names):
        if name in found:
            ax.barh(y + shift, found[name], 0.38, color=color)
            ax.text(found[name] + 0.5, y + shift, f"{found[name]:.1f}",
                    va="center", fontsize=7)
    ax.text(64, 0.1 + 1.6 * shift, label, color=color, ha="right",
            va="center", fontsize=9)
ax.set_yticks(range(len(names)), ["the kernel" if "kernel" in name else name
                                  for name in names])
ax.invert_yaxis()
ax.set(xlabel="GB/s of packed weights, two threads", xlim=(0, 70))
ax.grid(axis="y", visible=False)
plt.show()
torchs, kernel, most = (speeds["Zen 3, AVX2"][name] for name in (
    "plain torch", "the chapter's kernel", "only reading"))
print(f"of reading, Zen 3: torch {torchs / most:.0%}, kernel "
      f"{kernel / most:.0%}")
found = speeds["Zen 3, AVX2"]
for before, after in (("portable C++ loop", "table in a register, fp32"),
                      ("table in a register, fp32", "16-bit integers"),
                      ("16-bit integers", "two blocks at a time"),
                      ("two blocks at a time", "four streams of rows")):
    print(f"{after}: {found[after] / found[before]:.1f} times as fast")

# %% [markdown]
# What to see: the largest factor, seven, is one idea, a table that stays in a
# register instead of a loop over numbers. Integers instead of floats and two
# blocks at a time bring 1.6 to 1.7 times each. Four streams of rows help Zen 3
# by a sixth or so, and Zen 4 not at all: there a step forward was none.
#
# The kernel of the model is a little slower than the best of the steps on Zen
# 3. It also makes the integers and rounds the result, and its digits were
# chosen for an instruction that Zen 3 lacks.

# %% [markdown] tags=["measured"]
# Plain torch moves 8.5 times the bytes ([roofline](roofline.ipynb)), which
# explains only part of its distance from reading. The rest is its table,
# looked up in memory a byte at a time. It was run once; its run on one thread
# of Zen 3 is left out, as it took five times as long as the one on two, which
# two threads do not explain. Something else was running.

# %% [markdown]
# ## The naive version
#
# Run ours, run theirs, divide. But memory delivered between 33 and 45 GB/s on
# that machine, changing within minutes. Let two programs be *equally* fast,
# limited by memory alone. How far apart do they seem?

# %%
import torch

draw = torch.Generator().manual_seed(0)
memory = 33 + 12 * torch.rand(10_000, 9, 2, generator=draw)
ratios = memory[..., 0] / memory[..., 1]
for rounds in (1, 2, 9):
    apart = (ratios[:, :rounds].median(1).values - 1).abs()
    print(f"{rounds} round{'s' * (rounds > 1)}: nine times in ten within "
          f"{apart.quantile(0.9):.0%}")

# %% [markdown]
# One round may find a difference of a fifth where there is none. So engines
# take turns, a ratio near 1 counts as even, and beside each speed stands a
# ruler: how fast memory was in the same process.
#
# ## Derivation
#
# The ruler is the floor {eq}`kernels-floor` of the [roofline](roofline.ipynb):
# a token that reads $b$ bytes takes at least $b/\beta$ seconds. Two programs
# that read the same bytes at memory's speed take the same time; then only
# fewer bytes are faster.
#
# For a prompt there is another limit. $N$ tokens make $NK$ picks, $NK/E$ for
# each expert, and each weight costs $2NK/E$ operations for its 17/32 bytes.
# With $\beta$ bytes and $\pi$ operations a second both take equally long when
#
# $$ N = \frac{17}{64}\, \frac{E}{K}\, \frac{\pi}{\beta} .
# $$ (kernels-crossing)

# %%
READ, OPERATE = 30e9, 2 * 32 * 3e9  # a second: two cores of 3 GHz, AVX2
E, K = big.num_local_experts, big.num_experts_per_tok
crossing = 17 / 64 * E / K * OPERATE / READ
in_experts = 2 * K * big.num_hidden_layers * expert_size(big)
print(f"experts are limited by arithmetic from about {crossing:.0f} tokens "
      f"on;\nthey take {in_experts / 1e9:.1f} of a token's "
      f"{flops_per_token(big, 0) / 1e9:.1f} GFLOP")

# %% [markdown]
# ## Code
#
# ### What is measured, and beside what?
#
# `measure` runs what a user runs, `generate`, and looks at the clock. The
# first token ends the reading of the prompt; each later one is a step of
# decoding. Of all steps the median is told, and the slow and the fast tenth
# beside it: a mean would be moved by one interruption. Memory is measured in
# the same process by `read_speed`. Too long a prompt for the model is refused
# with a KernelError.

# %% tags=["export"]
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gptoss.kernels.build import KernelError, kernel_path
from gptoss.kernels.compact import saved_bytes
from gptoss.kernels.roofline import read_speed
from gptoss.model.transformer import GptOss
from gptoss.text.generate import generate
from gptoss.text.sampling import Sampler
from gptoss.weights.sizes import bytes_read_per_token

# %% tags=["export"]
def peak_rss_bytes() -> int:
    """The most memory this process has held so far, in bytes."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rates(name: str, seconds: list[float], count: int = 1) -> dict:
    """Rates of `count` things in so many seconds: the median as `name`, and
    those of the slow and the fast tenth as low and high in `name`_spread."""
    ordered = sorted(seconds)
    tenth = len(ordered) // 10
    return {name: count / statistics.median(ordered),
            f"{name}_spread": {"low": count / ordered[-1 - tenth],
                               "high": count / ordered[tenth]}}

# %% tags=["export"]
def _timed(model: GptOss, prompt: list[int], count: int) -> list[float]:
    """Seconds from the start to each of `count` greedy tokens."""
    start, times = time.perf_counter(), []
    for _ in generate(model, prompt, max_new_tokens=count,
                      sampler=Sampler(temperature=0.0)):
        times.append(time.perf_counter() - start)
    return times


def summarise(runs: list[list[float]], prompt_tokens: int, size: int,
              speed: float) -> dict:
    """What runs say, each the seconds from its start to each of its tokens.

    size: the bytes of weights that a token reads; speed: bytes a second
    that memory delivers. The first token ends the reading of the prompt.
    """
    first = [times[0] for times in runs]
    steps = [after - before for times in runs
             for before, after in zip(times, times[1:], strict=False)]
    decode = rates("decode_tokens_per_second", steps)
    share = decode["decode_tokens_per_second"] * size / speed
    return ({"time_to_first_token": statistics.median(first)}
            | rates("prefill_tokens_per_second", first, prompt_tokens)
            | decode | {"bytes_per_token": size,
                        "read_bytes_per_second": speed,
                        "read_bandwidth_share": share})

# %% tags=["export"]
def measure(path: str | Path, prompt_tokens: int = 512, new_tokens: int = 32,
            repeats: int = 3, seed: int = 0,
            load: Callable[..., GptOss] = GptOss.from_pretrained) -> dict:
    """Load the model in `path` and generate; what it took, as a dict.

    The prompt is random tokens. A short run comes first, so that the file
    is in memory and the kernels are loaded; then `repeats` timed ones.
    Seconds, bytes, tokens a second (medians); read_bandwidth_share is the
    bytes of a token over what memory could deliver in its time. KernelError
    if the tokens do not fit into the model's context.
    """
    start = time.perf_counter()
    model = load(path)
    load_seconds = time.perf_counter() - start
    room = model.config.max_position_embeddings
    if prompt_tokens + new_tokens > room:
        raise KernelError(f"prompt_tokens + new_tokens: expected at most "
                          f"{room} (the model's context), found "
                          f"{prompt_tokens} + {new_tokens}")
    draw = torch.Generator().manual_seed(seed)
    prompt = torch.randint(model.config.vocab_size, (prompt_tokens,),
                           generator=draw).tolist()
    _timed(model, prompt[:8], 4)
    runs = [_timed(model, prompt, new_tokens + 1) for _ in range(repeats)]
    peak = peak_rss_bytes()  # now: measuring memory takes a gigabyte
    return {"kernels": kernel_path(), "threads": torch.get_num_threads(),
            "load_seconds": load_seconds, "peak_rss_bytes": peak,
            "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
            "repeats": repeats} | summarise(
                runs, prompt_tokens,
                bytes_read_per_token(model.config) - saved_bytes(model),
                read_speed())

# %% [markdown]
# Two runs by hand, one with times to its tokens of 0.5, 0.6, 0.8 seconds and
# one of 0.25, 0.35, 0.4; a token that reads 1,000 bytes, and memory at 50,000
# bytes a second:

# %%
told = summarise([[0.5, 0.6, 0.8], [0.25, 0.35, 0.4]], 100, 1000, 50000.0)
for name in ("time_to_first_token", "decode_tokens_per_second",
             "read_bandwidth_share"):
    print(name, round(told[name], 3))
assert told["prefill_tokens_per_second_spread"] == {"low": 200, "high": 400}

# %% [markdown]
# ## It holds
#
# A fast path is worth nothing if it computes something else.
# **The shipped model**, on a story it did not see. First the experts of each
# layer, on the inputs that they get in it: both paths and float64 are given
# the same numbers, rounded to bf16.

# %%
import gptoss
from gptoss.kernels.build import plain_torch
from gptoss.text.tokenizer import Tokenizer


def off(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y - exact).norm() / exact.norm()).item()


def errors_of(run, *tensors) -> tuple[float, float]:
    """Distance from float64 of the kernel's and of plain torch's result."""
    wide = [x.double() if x.is_floating_point() else x for x in tensors]
    with torch.inference_mode():
        fast = run(*tensors)
        with plain_torch():
            slow, exact = run(*tensors), run(*wide)
    return off(fast.double(), exact), off(slow.double(), exact)


POCKET = Path(gptoss.__file__).parent / "pocket"
tokens = Tokenizer.from_pretrained(POCKET).encode(
    "Once upon a time there was a small fox named Mira. Mira lived in the "
    "forest. The best thing she had was a red kite. One day Mira took the "
    "red kite to the lake. But a strong wind came, and the red kite was gone."
)
model = GptOss.from_pretrained(POCKET)
wide = GptOss.from_pretrained(POCKET, dtype=torch.float64)
inputs = []
hooks = [layer.mlp.experts.register_forward_pre_hook(
    lambda module, given: inputs.append(given)) for layer in wide.layers]
with torch.inference_mode():
    exact = wide(torch.tensor([tokens]))
for hook in hooks:
    hook.remove()
for n, (x_n, ids, weights) in enumerate(inputs):
    def run(x, weights, n=n, ids=ids):
        which = wide if x.dtype == torch.float64 else model
        return which.layers[n].mlp.experts(x, ids, weights)

    ours, torchs = errors_of(run, x_n.bfloat16(), weights.bfloat16())
    assert ours <= torchs
    if path.startswith("C++"):
        assert ours < 0.8 * torchs
print(len(inputs), "layers, in each at least as near as plain torch")

# %% [markdown]
# Then the whole, the same weights in bf16 on both paths and in float64. Now
# the inputs differ from the first layer on, and both paths round the stream
# between the layers to bf16.

# %%
with torch.inference_mode():
    fast = model(torch.tensor([tokens])).double()
    with plain_torch():
        slow = model(torch.tensor([tokens])).double()
best, second = exact.topk(2).values.unbind(-1)
clear = best - second > 0.25
assert (fast.argmax(-1) == exact.argmax(-1))[clear].all()
assert (slow.argmax(-1) == fast.argmax(-1))[clear].all()
narrow = GptOss.from_pretrained(POCKET, dtype=torch.float32)
with torch.inference_mode():
    single = narrow(torch.tensor([tokens]))
    with plain_torch():
        assert torch.equal(narrow(torch.tensor([tokens])), single)
print("bf16: the same choice wherever the best token leads by 0.25")
print("float32: the same bits")

# %% [markdown] tags=["measured"]
# So what does *identical* mean for two paths? In float32 it is literal: the
# kernels step aside, and both paths are one. In bf16 it cannot be. Counted
# once, on the Zen 3 and with the small model that was shipped then: over 16
# stories (3,351 positions) the median distance of the logits from float64,
# relative to their size, was 0.0067 with the kernels and 0.0073 with torch,
# and a router chose another expert than in float64 at 100 and 103
# positions. Of 12 greedy texts of 64 tokens, 9 were the same on both paths.
# The other three parted where two words were nearly as good: their exact
# logits differed by less than 0.05, and at that size one step of bf16 is
# 0.06. Both paths are right to within their format; neither is the reference.

# %% [markdown]
# What holds on all processors is held by the tests in `tests/kernels/`: in
# bf16 two texts part only where the exact logits are within 0.25.
#
# ## Against the others
#
# ### Do they compute the same?
#
# llama.cpp multiplies MXFP4 by activations in 8 bits. transformers keeps the
# experts packed on a CPU only with Triton and kernels from the Hub; without,
# it decodes them to bf16 while loading, reads 2 bytes a weight instead of
# 17/32, and multiplies with torch's bf16 product. Both formulas beside ours,
# on rows of 2880 weights and activations in bf16:

# %%
from gptoss.model.ops import mxfp4_linear
from gptoss.weights.encoding import encode
from gptoss.weights.mxfp4 import decode


def rounded(x: torch.Tensor, largest: int) -> torch.Tensor:
    """x (…, 32 N), each block rounded to integers of that size and back."""
    blocks = x.view(*x.shape[:-1], -1, 32)
    step = blocks.abs().amax(-1, keepdim=True) / largest
    return ((blocks / step).nan_to_num().round() * step).view(x.shape)


torch.manual_seed(0)
weight = decode(*encode(0.02 * torch.randn(256, 2880)), torch.float64)
x = torch.randn(64, 2880).bfloat16().double()
fast = mxfp4_linear(x.bfloat16(), *encode(weight)).double()
formulas = {
    "llama.cpp, 8-bit activations": rounded(x, 127) @ weight.T,
    "transformers, bf16 weights": (x.bfloat16() @ weight.bfloat16().T
                                   ).double(),
    "ours": fast}
exact = x @ weight.T
for name, y in formulas.items():
    print(f"{name:29} relative error {off(y, exact):.1e}")
eight, bf16, ours = (off(y, exact) for y in formulas.values())
assert ours < 1.001 * bf16 and 3 * ours < eight

# %% [markdown]
# ### Who is faster?
#
# `bench/compare.py` runs the engines on one checkpoint of random weights, each
# alone with both cores, in turns. Here is all that it found, wins and losses:
# our tokens a second over theirs. *compact* is ours with dense matrices in
# [twelve bits](twelve_bits.ipynb). llama.cpp has its experts in MXFP4 and its
# dense matrices in bf16, or rounded to 8 bits (`q8_0`), which is fewer bytes
# and another model. `16` is a prompt of 16 tokens; all others have 512. Within
# a tenth of 1 we call it even.

# %% tags=["hide-input"]
def verdict(ratio: float) -> str:
    return "faster" if ratio > 1.1 else "slower" if ratio < 0.9 else "even"


pairs = []  # machine, shape, theirs, ours; decode, prefill; GiB of both
for machine, saved in (("Zen 3", MEASURED), ("Zen 4", ON_AVX512)):
    for shape in ("20b", "4 layers", "4 layers, 16", "2 layers"):
        engines = measured(shape, found=saved, default={})
        for theirs in (name for name in engines if "ours" not in name):
            for ours in ("ours", "ours-compact"):
                if ours in engines:
                    a, b = engines[ours], engines[theirs]
                    pairs.append((
                        machine, shape, theirs, ours.replace("ours-", ""),
                        *(a[key] / b[key] for key in (
                            "decode_tokens_per_second",
                            "prefill_tokens_per_second")),
                        *(x["peak_rss_bytes"] / 2 ** 30 for x in (a, b))))
print("our speed over theirs, and the GiB that either needs")
print("CPU    shape        beside            ours    decode       prefill  "
      "GiB  its")
for machine, shape, theirs, ours, token, prompt, gib, other in pairs:
    print(f"{machine:6} {shape:12} {theirs:17} {ours:7} {token:6.2f} "
          f"{verdict(token):6} {prompt:7.2f} {gib:4.0f} {other:3.0f}")

# %% tags=["hide-input"]
# Figure: a dot for each comparison of decoding, on a logarithmic axis of our
# speed over theirs. Against llama.cpp the dots lie between 0.84 and 1.5 around
# the line at 1; against transformers between 3.5 and 35.
fig, ax = plt.subplots(figsize=(7.0, 3.6))
groups = list(dict.fromkeys((row[0], row[1], row[2]) for row in pairs))
for y, group in enumerate(groups):
    for row in pairs:
        if row[:3] == group:
            plain = row[3] == "ours"
            ax.plot(row[4], y, "o" if plain else "D", ms=6,
                    color="C0" if plain else "C1")
ax.axvline(1, color="k", lw=1)
ax.axvspan(0.9, 1.1, color="0.92")
ax.set_yticks(range(len(groups)), [f"{m}, {s}: {t}" for m, s, t in groups])
ax.set(xscale="log", xlim=(0.7, 45), ylim=(len(groups) - 0.4, -1.2),
       xlabel="decode: our tokens a second over theirs")
ax.set_xticks([0.8, 1, 1.5, 3, 10, 30], ["0.8", "1", "1.5", "3", "10", "30"])
ax.minorticks_off()
ax.text(0.88, -0.8, "slower", ha="right", fontsize=8)
ax.text(1.13, -0.8, "faster", fontsize=8)
ax.text(5, -0.8, "ours", color="C0", fontsize=8)
ax.text(8, -0.8, "ours, compact", color="C1", fontsize=8)
plt.show()

# %% [markdown] tags=["measured"]
# *Where we win.* A prompt is read 1.8 times as fast as by llama.cpp and more,
# by the tiles of [many rows](many_rows.ipynb). On Zen 3 decode of the 20b is
# 1.4 times as fast as llama.cpp with bf16 (1.46 and 1.41 in two rounds, not in
# the table), at 83 and 84 % of memory's speed. transformers, for which torch
# has no fast product in bf16 with AVX2, takes 35 times as long for a token
# there; in fp32, at 2 layers, 3.5 times. The 20b peaks at 12 to 13 GiB where
# llama.cpp takes 21 to 23, and loads in 0.2 s, because a page of the file is
# read when it is first touched.
#
# *Where we do not.* Beside llama.cpp with q8_0, which rounds the dense
# matrices and reads 2.6 GB a token where ours keeps every number and reads
# 3.7, decode is even or little more: 1.10 and 1.12 on Zen 3, 1.07 and 1.09 on
# Zen 4. With 4 of the layers, where the head weighs most, **we lose**: 0.84
# times as many tokens, and in twelve bits as many. In three more rounds of the
# 20b on Zen 4 with 128 tokens of prompt, which are not in the table, with
# memory at 30 to 63 GB/s, it was 0.98, 1.07 and 1.43 times as fast as
# llama.cpp with bf16. Twelve bits bring less than they save where the experts'
# product is limited by the processor: on Zen 3, 9.6 and 9.8 tokens a second
# instead of 9.6 and 9.4.
#
# *What is uncertain.* A ratio is good to a tenth or so, and a share of
# memory's speed, which is measured after the runs, to a fifth: one file holds
# a share of 109 %, which says that memory was slower by then. Those on Zen 4
# were measured before the [step](step.ipynb) was recorded.
#
# *Long texts*, by `bench/lengths.py`: a token of the 20b at position 8192 took
# 1.20 times as long as one at 128 (150 and 126 ms, in a run that still touched
# experts for the first time). The time for a token of a prompt, at 4 layers,
# was 6.5 ms with 512 tokens and 6.4 with 4096.

# %% [markdown]
# ### And many rows at once?
#
# A server, a draft that is checked and a prompt have many rows, and could read
# each weight once for all of them. Who wins there depends on *which* tokens
# the rows get. ik_llama.cpp's `llama-batched-bench` gives token 0 to all texts
# in every step: they are equal, and choose the same four experts in each
# layer. llama.cpp's gives each text a random token. How many bytes of weights
# is a step then, if experts are chosen at random?

# %%
from gptoss.moe.routing import expected_hits
from gptoss.weights.sizes import bytes_read_per_token, expert_bytes


def step_bytes(texts: int, experts: float) -> float:
    """Of so many texts together that hit so many experts in each layer."""
    more = big.num_hidden_layers * (experts - K) * expert_bytes(big)
    return bytes_read_per_token(big) + more + (
        texts - 1) * 2 * big.hidden_size


for texts in (1, 2, 4, 8):
    hit = expected_hits(E, K, texts)
    same, distinct = step_bytes(texts, K), step_bytes(texts, hit)
    print(f"{texts} together: {hit:4.1f} experts a layer; "
          f"{distinct / 1e9:4.1f} GB, {same / 1e9:.1f} GB if equal: "
          f"{distinct / same:.1f} times as much")

# %% [markdown]
# Two programs that both run at memory's speed would differ by that factor if
# one were measured with equal texts and the other not. So ours is measured
# both ways, and compared like with like: tokens a second of all texts, and
# ours over theirs.

# %% tags=["hide-input"]
def show(title: str, lines: dict[str, dict[int, str]]) -> None:
    """A table: a line for each name, a column for each number."""
    columns = sorted({n for line in lines.values() for n in line})
    print(f"{title:22}" + "".join(f"{n:6}" for n in columns))
    for name, line in lines.items():
        found = "".join(f"{line.get(n, ''):>6}" for n in columns)
        print(f"{name:22}{found}".rstrip())


for machine, saved in MACHINES.items():
    engines = measured("20b-together", found=saved, default={})
    table: dict[str, dict[int, str]] = {}
    for name, engine in engines.items():
        print(f"{machine}, {name}: decode "
              f"{engine['decode_tokens_per_second']:.1f}, prefill of 512 "
              f"{engine['prefill_tokens_per_second']:.1f}")
        for kind, speeds in engine["together"].items():
            table[f"{name}, {kind}"] = {
                int(n): f"{speed:.1f}" for n, speed in speeds.items()}
            if not name.startswith("ours"):
                ours = measured("ours", "together", kind, found=engines)
                table[f"ours over it, {kind}"] = {
                    int(n): f"{ours[n] / speed:.2f}"
                    for n, speed in speeds.items()}
    if table:
        show(f"{machine}, texts:", table)

# %% [markdown] tags=["measured"]
# These are losses beside wins. On Zen 4 memory went at 36 GB/s in some minutes
# and at 60 to 67 in others, for whoever ran just then. The table has the best
# of four rounds of ours and of ik_llama.cpp, and of two rounds of
# `ours-coarse` and `ours-eight`. One, two, four and eight equal texts are
# written 0.97, 1.03, 1.12 and 0.87 times as fast by us, and plain decoding
# goes 1.06 times as fast; in a round of slow minutes only both decoded 8.8
# tokens a second, ours at 0.9 of what reading allows, so who reads the same
# bytes cannot be a tenth ahead there. A prompt of 512 is read 0.93 times as
# fast, one of 4096 (54.0 and 54.5) alike, with eight-bit activations 1.33 and
# 1.35 times as fast. ik_llama.cpp repacks the weights while it loads, so that
# the products of several tokens need no decoding across registers, and it
# rounds activations to eight bits; ours reads the file as it lies and keeps
# what bf16 holds. 58 tokens a second are 350 of the 415 GFLOP/s that the bf16
# units of two cores do. With `--dense 8` a token needs 1.45 times fewer bytes.
#
# On Zen 5 memory went at 50 GB/s in some minutes and at 80 in others, for
# whoever ran just then; the best of three rounds is in the table. There it is
# nearly even: one, four and eight equal texts 0.99, 1.03 and 0.93 times as
# fast by us, two 1.25 times, plain decoding 1.04 times. A prompt of 512 is
# read 0.98 times as fast, of 4096 (111.7 and 104.9 tokens a second) 1.06
# times; with eight-bit activations on our side, too, 1.36 and 1.43 times. With
# fast memory products count: four and eight different texts are 2.0 and 2.8
# times the tokens of one, with slow memory, below, 2.3 and 3.3 times.
#
# With [AMX](amx.ipynb) the order is another one, since products cost little
# there. Prompts of 512 and of 4096 (98 and 28 tokens a second) are read 4.0
# and 3.5 times as fast as by ik_llama.cpp, and one to eight equal texts are
# written 1.2 to 1.9 times as fast. Memory has its share in that, which goes at
# one speed in some minutes and at another in others: on another Xeon (Granite
# Rapids) and with an earlier version of ours the prompt was once read 2.5
# times as fast and once 3 times, and texts were written 1.02 to 1.74 times as
# fast, and 1.5 to 2.8 times. llama.cpp (0c1e570) read 15 and wrote 3.0 where
# ours, in that hour, did 95 and 5.7. With q8_0 its product by AMX ended in a
# fault; built without AMX it read 16 and wrote 3.8, ours in eight bits 77 to
# 103 and 7.1 to 7.7, in twelve 77 to 113 and 5.0 to 6.5. On the Emerald
# Rapids, in a run when all went slower, `--dense 8` wrote 9.2 tokens a second
# instead of 7.0 and read a prompt of 512 0.98 times as fast (0.79 times on the
# Granite Rapids, before each core unpacked [the rows it
# multiplies](eight_rows.ipynb)); eight texts together were written 0.84 times
# as fast, since up to eight tokens are multiplied by integers.

# %% [markdown]
# Beside torch and beside the bytes, by `bench/rows.py`: a product's time over
# the better of ours and torch's, where 1.00 is the best that there is; and for
# a step of $n$ tokens its *excess*, its time over that of one token, divided
# by its bytes over those of one token. 1.00 is what reading allows. `tokens`
# are $n$ tokens of one text, `distinct` one token each of $n$ texts, `same`
# likewise with equal texts.

# %% tags=["hide-input"]
for machine, saved in MACHINES.items():
    table = {}
    for row in measured("rows", "products", found=saved, default=[]):
        table.setdefault(f"{row['product']} {row['shape']}", {})[
            row["rows"]] = f"{row['over_best']:.2f}"
    for row in measured("rows", "steps", found=saved, default=[]):
        table.setdefault(f"steps, {row['kind']}", {})[
            row["n"]] = f"{row['excess']:.2f}"
    if table:
        show(f"{machine}, rows or n:", table)

# %% [markdown] tags=["measured"]
# `linear` is at most a twentieth slower than the better of both, for any
# number of rows, but for 512 by 2880 with 128 rows on Zen 4, 1.09 (in another
# run 1.32). With AMX and 512 rows it was 1.15 to 1.61 while one square of
# weights met four of tokens; now two meet two, which loads fewer. In the same
# minutes 4096 by 2880 took 8.7 ms before and 6.8 now, by torch 7.0; in others
# 11.4, 9.9 and 14.5. Somebody else on the same core is probably what makes the
# difference: a loop of products and loads, alone in a first cache, took four
# times as long for a second now and then.
#
# A step of two tokens costs what it should, but for two equal texts on Zen 4
# (1.37). How many more do (the aim was 1.25) is up to memory, which on these
# machines goes at one speed in some minutes and at another in others. On Zen 4
# the table has 67 GB/s: four tokens of one text cost what they should, four
# texts a little more (1.28), eight tokens (1.51) and sixteen (2.21) more. At
# 36 GB/s it was 1.04, 1.06, 1.20 and 1.65 for two to sixteen tokens.
#
# On Zen 5, measured earlier and with memory at 50 GB/s, four and eight tokens
# cost what they should (at 80, four do), sixteen do not: 64 picks are 3.2
# GFLOP of products a layer, and some experts have ten tokens. With AMX, at 28
# GB/s, up to eight do (eight texts 1.28), sixteen (1.36) do not. Equal texts
# do not, eight on all three and four on Zen 4 and with AMX: they read few
# bytes for all their products.
#
# Prefill on Zen 4 rose from 38 tokens a second (in the figure above, by whole
# numbers) to 51 by bf16 in the first layer of the experts, and to 58 to 60 by
# [panels](panels.ipynb).
#
# On Zen 4 with memory at 64 to 67 GB/s steps of 1, 2, 4, 8 and 16 tokens took
# 94, 129, 182, 279 and 463 ms at first, 86, 124, 168, 266 and 459 with slabs
# and memory asked at half the distance ([pairs](pairs.ipynb)), and 80, 117,
# 161, 255 and 448 since a token alone goes by its digits. One token gains
# most, so the excess grows while every step becomes shorter.
#
# Guessing tokens ([drafts](drafts.ipynb)) with AMX, random weights in the
# 20b's shapes and given texts (`bench/drafts.py`; not in the table): an edited
# program was written 2.55 times as fast, 127 tokens in 18 forwards, and JSON
# echoed 2.54 times; results of a tool quoted 1.36 times, 109 tokens in 62
# forwards; prose that repeats nothing 0.97 times (by its counts it would be
# 1.00). Quotes gain less than edits since what stands between them is new, and
# even who knows how many guesses will be right gains 1.65
# (`bench/guesses.py`). Before the [lookup](lookup.ipynb) told how
# sure it is, it was 2.40, 2.39, 1.11 and 1.03 there, and on Zen 4, where it
# was not measured since, 2.23, 2.23, 1.13 and 0.99.

# %% [markdown]
# **Not run at all**, for want of such machines: the kernels on an ARM
# processor. The file compiles for one, and the product in NEON, run in an
# emulator (QEMU), agrees with float64 as the others do; how fast it is, nobody
# has seen. Nor has a GPU run [its kernels](gpu.ipynb).
#
# ### Which path did I take?
#
# A fast path that is not taken leaves the text right, so nobody notices.
# SGLang padded the experts to a width that its CPU kernels do not take, and
# gpt-oss went through the slow path (sgl-project/sglang#31334); transformers
# decodes to bf16 where a package is missing
# (huggingface/transformers#42723). Here the path has a name, `kernel_path()`,
# which `bench` prints, and a missing compiler is one line in the log.

# %% [markdown]
# ## In the 20b and the 120b
#
# The kernels take 32 columns and, in tiles, 16 rows at a time. In the released
# models every width is a multiple of 32 and every number of rows one of 16, so
# no matrix leaves a remainder.

# %%
from gptoss.weights.layout import tensor_table

for name, config in (("20b", big), ("120b", GptOssConfig.gpt_oss_120b())):
    for spec in tensor_table(config).values():
        if spec.name.endswith("_blocks"):  # (E, rows, blocks of 32, 16)
            assert spec.shape[1] % 16 == 0
        elif spec.name.endswith(("_proj.weight", "router.weight", "lm_head"
                                 ".weight")):
            assert spec.shape[0] % 16 == spec.shape[1] % 32 == 0
    floor = bytes_read_per_token(config) / 30e9
    print(f"{name:4}  {bytes_read_per_token(config) / 1e9:.2f} GB a token, "
          f"at 30 GB/s at least {1000 * floor:.0f} ms")

# %% [markdown]
# The 120b has four times the experts and reads only a third more for a token:
# 36 layers instead of 24, with four experts each, and the same head. Where its
# 65 GB fit in memory it should decode at three quarters of the 20b's speed;
# nobody has run it here.

# %% [markdown]
# ## Takeaways
#
# - The floor is what reading costs; the share of it that a program reaches
#   says more than its speed, and is what `bench` prints.
# - The largest factor, seven, is a table in a register; fewer instructions for
#   each byte brought another three.
# - Where two programs read the same bytes at memory's speed, they take the
#   same time: then only fewer bytes are faster, and who rounds may win.
# - Fast and plain path are each right to within bf16, and identical in
#   float32, where the kernels step aside.
# - A measurement names its machine, is taken in turns, and tells its losses.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# Suppose a kernel multiplied four-bit weights in no time at all, and dense
# matrices came at 30 GB/s as before. How much faster would a token of the 20b
# be than at 30 GB/s for both? And if the dense matrices were free instead?

# %% tags=["hide-cell"]
token = bytes_read_per_token(big)
in_four_bits = (big.num_hidden_layers * big.num_experts_per_tok * 17 / 32
                * expert_size(big))
dense = token - in_four_bits
for free, left in (("experts", dense), ("dense matrices", in_four_bits)):
    print(f"{free} free: {token / left:.1f} times as fast")
assert token / dense < 2 < token / in_four_bits

# %% [markdown]
# ### Exercise 2
#
# llama.cpp with q8_0 stores the dense matrices in 34 bytes for 32 numbers. How
# many bytes does a token of the 20b read then, and how much faster could it be
# than ours in sixteen and in twelve bits, if all run at memory's speed?

# %% tags=["hide-cell"]
sizes = {"q8_0": in_four_bits + dense * 34 / 64, "sixteen bits": token,
         "twelve bits": in_four_bits + dense * 3 / 4}
for name, size in sizes.items():
    print(f"{name:12} {size / 1e9:.1f} GB a token; q8_0 could be "
          f"{size / sizes['q8_0']:.2f} times as fast")

# %% [markdown]
# ### Exercise 3
#
# Of a hundred steps 99 take 10 ms and one takes 500, since another program was
# running. What do mean and median say in tokens a second? And what does
# `rates` report?

# %% tags=["hide-cell"]
steps = [0.01] * 99 + [0.5]
told = rates("tokens_per_second", steps)
print(f"mean {len(steps) / sum(steps):.0f}, median "
      f"{told['tokens_per_second']:.0f} tokens a second; the slow tenth "
      f"{told['tokens_per_second_spread']['low']:.0f}")

# %% [markdown]
# ## Sources
#
# - Roofline: {cite}`roofline2009`. MXFP4: {cite}`ocpmx2023`.
# - llama.cpp, `ggml/src/ggml-cpu/`: MXFP4 times 8-bit activations with the
#   same lookup instruction.
# - transformers, `quantizers/quantizer_mxfp4.py`: when it decodes to bf16.
# - A fast path not taken: sgl-project/sglang#31334,
#   huggingface/transformers#42723.
