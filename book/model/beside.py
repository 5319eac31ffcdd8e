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
# ---

# %% [markdown]
# # Is it the same model as theirs?
#
# ## Question
#
# Two programs that were written from the same paper give the same logits to
# five digits. That could be luck, and if they did not, it would say nothing
# about where they part. How do we compare two models along the way, at
# **eight points** of every layer, and what remains when rounding is all that
# differs?
#
# ## Picture
#
# Three copies of the shipped model: a right one in fp32, one that has
# forgotten the sinks of layer 1, and one that takes the gates and ups of
# layer 2 for halves instead of pairs. Each is compared with the right model
# in float64, point by point, from the embedding (left) to the logits (right).

# %% tags=["hide-input", "picture"]
# Figure: the difference from float64 along the network, on a logarithmic
# axis. The right model stays at a ten-millionth throughout. The other two
# follow it, until in layer 1, or in layer 2, they jump by five powers of ten.
from importlib.resources import files

import matplotlib.pyplot as plt
import torch

from gptoss.model.transformer import GptOss
from gptoss.parity.walk import trace_ours
from gptoss.text.tokenizer import Tokenizer

plt.style.use("../_static/book.mplstyle")
pocket = files("gptoss") / "pocket"
story = torch.tensor([Tokenizer.from_pretrained(pocket).encode(
    "Once upon a time there was a little fox named Mira. Mira lived in the "
    "cave. For her birthday Mira got a white lamp.")])
models = {name: GptOss.from_pretrained(pocket, torch.float32, packed=False)
          for name in ("right", "no sinks in layer 1", "halves in layer 2")}
with torch.no_grad():
    models["no sinks in layer 1"].layers[1].self_attn.sinks.fill_(-1e9)
    rows = models["halves in layer 2"].layers[2].mlp.experts.gate_up_proj
    half = rows.shape[1] // 2
    rows.copy_(torch.stack([rows[:, :half], rows[:, half:]], 2).flatten(1, 2))
exact_story = trace_ours(GptOss.from_pretrained(pocket, torch.float64), story)
places = [key for key in exact_story if key[1] not in ("chosen", "shares",
                                                       "hidden", "weights")]
fig, ax = plt.subplots(figsize=(7.4, 2.9))
fig.tolerance = 0.05  # the last bits depend on the processor
for (name, model), color in zip(models.items(), ("C0", "C1", "C5"),
                                strict=True):
    found = trace_ours(model, story)
    away = [((found[key] - exact_story[key]).square().mean()
             / exact_story[key].square().mean()).sqrt().item() + 1e-9
            for key in places]
    ax.plot(away, color=color, lw=2.5 if name == "right" else 1.4)
    ax.text(len(places), away[-1] * {"no sinks in layer 1": 0.35,
                                     "halves in layer 2": 3}.get(name, 1),
            name, color=color, va="center", fontsize=8)
firsts = [n for n, key in enumerate(places) if key[1] == "norm"]
for n, place in enumerate(firsts):
    ax.axvline(place - 0.5, color="0.8", lw=0.8)
    ax.text(place, 30, f"layer {n}", fontsize=8)
ax.set(yscale="log", ylim=(1e-9, 100), xlim=(-0.5, len(places) + 11),
       ylabel="difference (share)", xticks=[], xlabel="point of the network")
ax.set_yticks((1e-8, 1e-6, 1e-4, 1e-2, 1))
ax.grid(axis="x", visible=False)
plt.show()

# %% [markdown]
# What to see: a mistake has a place. All three run together until the layer
# in which one is wrong; there its curve jumps, and stays up. The place of the
# jump says what to look at.
#
# ## The naive version
#
# Compare what comes out at the end: do the two models say the same next word?

# %%
with torch.inference_mode():
    words = {name: model(story)[0].argmax(-1)
             for name, model in models.items()}
for name, said in words.items():
    print(f"{name:20} the next word is the right model's at "
          f"{int((said == words['right']).sum())} of {len(said)} tokens")

# %% [markdown]
# A model that has lost the sinks of a whole layer agrees most of the time. It
# would write fluent text. And where it disagrees, we learn that something is
# wrong, not what. So we look inside.
#
# ## Against the others
#
# To compare with transformers we use a model of random numbers, in which
# every bias and every sink has some size, so that nothing can hide. The same
# files are read by both. Transformers' four-bit experts are decoded, its
# attention is eager (the only kind that runs gpt-oss on a CPU), and all of it
# in fp32.

# %%
import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs a network

from torch import Tensor, nn

from gptoss.attention.rope import (
    apply_rope,
    rope_parameters,
    rope_tables,
)
from gptoss.weights.config import GptOssConfig
from gptoss.weights.layout import tensor_table
from gptoss.weights.write import write_checkpoint

TINY = GptOssConfig(
    num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2,
    vocab_size=96, hidden_size=64, intermediate_size=64, head_dim=32,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=6,
    eos_token_id=2, pad_token_id=0)


def random_tensors(config: GptOssConfig, seed: int = 0):
    """(name, tensor) for each row of the table, at sensible scales."""
    g = torch.Generator().manual_seed(seed)
    for name, spec in tensor_table(config).items():
        value = torch.randn(spec.shape, generator=g)
        if name.endswith("_blocks"):
            yield name, torch.randint(0, 256, spec.shape, generator=g).byte()
        elif name.endswith("_scales"):
            yield name, (value.round() + 122).byte()
        elif name.endswith("norm.weight"):
            yield name, (1 + 0.2 * value).bfloat16()
        elif name.endswith(("bias", "sinks")):
            yield name, (0.5 * value).bfloat16()
        else:
            scale = 1 if "embed" in name else spec.shape[-1] ** -0.5
            yield name, (scale * value).bfloat16()


folder = tempfile.TemporaryDirectory()
path = Path(folder.name)
write_checkpoint(path / "hf", TINY, random_tensors(TINY))
torch.manual_seed(0)
tokens = torch.randint(0, 96, (1, 40))
exact = GptOss.from_pretrained(path / "hf", torch.float64)

# %%
import transformers
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load_theirs(dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(
        path / "hf", dtype=dtype, attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True)).eval()


theirs, ours = (load_theirs(torch.float32),
                GptOss.from_pretrained(path / "hf", torch.float32))
with torch.inference_mode():
    a, b = ours(tokens), theirs(tokens).logits
distance = ((a - b).abs().max() / b.std()).item()
assert distance <= 1e-5
print(f"logits up to {b.abs().max():.0f}, with a standard deviation of "
      f"{b.std():.1f}; they differ by less than 1e-5 of that")

# %% [markdown]
# ### The layer walk
#
# Equal logits could be luck, and unequal ones would say
# nothing about where. So hooks record what passes eight named points of
# every layer, in both models, under the same names.

# %%
POINTS = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj",
          "self_attn", "post_attention_layernorm", "mlp.router",
          "mlp.experts", "")


def record(model: nn.Module, tokens: Tensor, prefix: str = "") -> dict:
    """Run once; module name -> (its first input, its output)."""
    seen, hooks = {}, []
    names = [f"layers.{n}.{point}".rstrip(".")
             for n in range(TINY.num_hidden_layers) for point in POINTS]
    names = [prefix + name for name in ("embed_tokens", *names, "norm")]
    for name in (*names, "lm_head"):
        def keep(module, args, kwargs, out, name=name):
            inputs = args or tuple(kwargs.values())
            seen[name.removeprefix(prefix)] = inputs[0], out
        hooks.append(model.get_submodule(name).register_forward_hook(
            keep, with_kwargs=True))
    with torch.inference_mode():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return seen

# %% [markdown]
# A few points need one more step: queries and keys are turned by each
# side's own RoPE, and router logits are taken from the router's input.

# %%
@torch.inference_mode()
def walk(model: nn.Module, tokens: Tensor, is_ours: bool) -> dict:
    """(layer, point) -> tensor with tokens first."""
    seen = record(model, tokens, "" if is_ours else "model.")
    pos = torch.arange(tokens.shape[1])[None]
    x = seen["embed_tokens"][1]
    inv_freq, concentration = rope_parameters(TINY)
    wide = torch.promote_types(x.dtype, torch.float32)
    rope = (rope_tables(pos, inv_freq.to(wide), concentration, x.dtype)
            if is_ours else model.model.rotary_emb(x, pos))
    out = {("", "embedding"): x}
    for n in range(TINY.num_hidden_layers):
        got = {p: seen[f"layers.{n}.{p}".rstrip(".")] for p in POINTS}
        out[n, "norm"] = got["input_layernorm"][1]
        q, k = (got[f"self_attn.{name}_proj"][1].unflatten(-1, (-1, 32))
                for name in "qk")
        if is_ours:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        else:
            q, k = apply_rotary_pos_emb(q, k, *rope, unsqueeze_dim=2)
        out[n, "q after RoPE"], out[n, "k after RoPE"] = q, k
        attn = got["self_attn"][1]
        out[n, "attention out"] = attn if is_ours else attn[0]
        router = (model if is_ours else model.model).layers[n].mlp.router
        out[n, "router logits"] = nn.functional.linear(
            got["mlp.router"][0].flatten(0, -2), router.weight, router.bias)
        out[n, "chosen experts"] = got["mlp.router"][1][-1].sort(-1)[0]
        out[n, "experts out"] = got["mlp.experts"][1]
        out[n, "block out"] = got[""][1]
    out["", "last norm"] = seen["norm"][1]
    out["", "logits"] = seen["lm_head"][1]
    return out

# %% tags=["nbval-ignore-output"]
mine, other = walk(ours, tokens, True), walk(theirs, tokens, False)
print(f"{'layer':5} {'point':15} max |difference|")
for (layer, point), value in mine.items():
    beside = other[layer, point].view_as(value)
    if point == "chosen experts":
        print(f"{layer:5} {point:15} equal: {torch.equal(value, beside)}")
    else:
        error = (value - beside).abs().max().item()
        print(f"{layer:5} {point:15} {error:.0e}")

# %% [markdown]
# At the embedding and the first norm both do the same operations on the same
# bits, so the difference is exactly 0; in later layers it is a few units in
# the last place of fp32. (The table's last digits depend on the processor;
# what is certain is asserted.)

# %%
for (layer, point), value in mine.items():
    beside = other[layer, point].view_as(value)
    if (layer, point) in {("", "embedding"), (0, "norm"),
                          (0, "q after RoPE"), (0, "k after RoPE")}:
        assert (value - beside).abs().max() <= 1e-6
    elif point == "chosen experts":
        assert torch.equal(value, beside)
    else:
        assert (value - beside).abs().max() <= 1e-4
print(len(mine), "points agree")

# %% [markdown]
# ### In bf16
#
# Here the two must differ, since they round in different places. Two
# bf16 runs that differ say nothing about which is better, so both are
# measured against float64, token by token: the rms error of each of 400
# tokens at each point, and the median over the tokens. (A mean would be
# ruled by the few tokens that changed experts; more of them below.) The
# floor is what {eq}`model-sum` leaves when both halves of every block are
# exact and only the additions round. A fifth run is transformers' model with
# our experts put in.

# %%
def floor_of_bf16(truth: dict) -> dict:
    """Block outputs when exact halves are added to a bf16 stream."""
    x, out = truth["", "embedding"].bfloat16(), {}
    for n in range(TINY.num_hidden_layers):
        for point in ("attention out", "experts out"):
            x = x + truth[n, point].view_as(x).bfloat16()
        out[n, "block out"] = x
    return out


def token_errors(found: Tensor, wanted: Tensor) -> Tensor:
    """(T,): rms of found - wanted, in standard deviations of wanted."""
    error = found.double().view_as(wanted) - wanted
    error = error.reshape(tokens.shape[1], -1)
    return error.square().mean(-1).sqrt() / wanted.std()

# %%
runs = {"ours, bf16": (GptOss.from_pretrained(path / "hf"), True),
        "transformers, bf16": (load_theirs(torch.bfloat16), False),
        "ours, fp32": (ours, True), "transformers, fp32": (theirs, False)}
swapped = load_theirs(torch.bfloat16)
for layer, own in zip(swapped.model.layers, runs["ours, bf16"][0].layers,
                      strict=True):
    layer.mlp.experts.forward = own.mlp.experts.forward
runs["transformers, our experts"] = swapped, False

# %%
points = [key for key in mine if key[1] != "chosen experts"]
errors = {name: {key: [] for key in points}
          for name in (*runs, "floor of bf16")}
other_experts = dict.fromkeys(runs, 0)
for seed in range(10):
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 96, (1, 40), generator=g)
    truth = walk(exact, prompt, True)
    walks = {name: walk(model, prompt, is_ours)
             for name, (model, is_ours) in runs.items()}
    for name in runs:
        changed = torch.stack([
            walks[name][n, "chosen experts"] != truth[n, "chosen experts"]
            for n in range(TINY.num_hidden_layers)])
        other_experts[name] += changed.any(-1).any(0).sum().item()
    walks["floor of bf16"] = floor_of_bf16(truth)
    for name, found in walks.items():
        for key in points:
            if key in found:
                errors[name][key].append(token_errors(found[key],
                                                      truth[key]))

# %%
medians = {name: {key: torch.cat(rows).median().item()
                  for key, rows in by_point.items() if rows}
           for name, by_point in errors.items()}
last = {name: found.get(("", "logits")) for name, found in medians.items()}
least3 = medians["floor of bf16"][3, "block out"]
no_worse = last["ours, bf16"] <= last["transformers, bf16"]
print("median distance from float64 in bf16, last block, in floors:",
      *(f"{name} {medians[name][3, 'block out'] / least3:.0f};"
        for name in ("ours, bf16", "transformers, bf16")))
assert no_worse and last["ours, fp32"] < 1e-5
assert last["transformers, our experts"] < last["transformers, bf16"]
for n in range(TINY.num_hidden_layers):
    least, *both = (medians[name][n, "block out"] for name in (
        "floor of bf16", "ours, bf16", "transformers, bf16"))
    assert all(0.3 < least / error < 0.5 for error in both)

# %% [markdown]
# The next figure is that walk, in units of each format's
# roundoff ($2^{-8}$ for bf16, $2^{-24}$ for fp32), so that both fit. At the
# embedding all errors are 0. In bf16 the two climb together, ours a little
# lower; a third to a half of the error of a block's output is the floor. What
# sets them apart is the experts, where transformers rounds more often
# ([experts](../moe/experts.ipynb)): with our experts in it, its error falls to
# ours. In fp32 the two curves coincide. They lie higher because a product in
# fp32 rounds at every addition; one of bf16 numbers is summed in fp32 and
# rounded once.

# %% tags=["hide-input"]
# Figure: distance from float64 at each point of the network, in roundoffs of
# the dtype. All curves rise from layer to layer; in fp32 transformers and ours
# are one curve, in bf16 ours lies a little below theirs.
fig, ax = plt.subplots(figsize=(7, 3.8))
fig.tolerance = 0.05  # the last bits depend on the processor
looks = {"transformers, fp32": "C3.--", "ours, fp32": "C2.-",
         "transformers, bf16": "C1.--", "ours, bf16": "C0.-",
         "floor of bf16": "k_"}
for name, look in looks.items():
    unit = 2 ** -24 if "fp32" in name else 2 ** -8
    ax.plot(range(len(points)),
            [medians[name].get(key, float("nan")) / unit for key in points],
            look, label=name, markersize=9 if "floor" in name else 4,
            linewidth=1.2)
ax.set(ylim=(0, 12), xlim=(-1, len(points) + 9),
       ylabel="rms error / std, in roundoffs",
       title="Distance from float64 along the network (median of 400 tokens)")
ax.set_xticks(range(len(points)), [
    f"{layer} {point}".strip() for layer, point in points], rotation=90,
    fontsize=6.5)
for name, color, dy in (
        ("transformers, fp32", "C3", 0.7), ("ours, fp32", "C2", -0.7),
        ("transformers, bf16", "C1", 0.7), ("ours, bf16", "C0", -0.5)):
    end = medians[name]["", "logits"] / (2 ** -24 if "fp32" in name
                                         else 2 ** -8)
    ax.text(len(points) + 0.2, end + dy, name, color=color, fontsize=8,
            va="center")
ax.text(14.6, 0.8, "floor of bf16", fontsize=8, va="center")
plt.show()

# %% [markdown] tags=["measured"]
# A few tokens are far off, in both: where two router logits nearly tie,
# rounding decides which expert a token goes to, and from there it takes
# another way through the network. The median hides that, and here ours is
# not ahead: on the machine that froze this page 22 of 400 tokens went to
# other experts with ours in bf16, and 18 with transformers.

# %% tags=["nbval-ignore-output"]
for name, count in other_experts.items():
    worst = torch.cat(errors[name]["", "logits"]).max().item()
    print(f"{name:25} {count:3} of 400 tokens in other experts; "
          f"worst error {worst:.0e}")

# %% [markdown] tags=["given"]
# So a top-1 token that differs between two bf16 runs is no proof
# of a bug, and two equal ones no proof of its absence.
# `tests/parity/test_parity_hf.py` holds ours to transformers on 40 random
# configurations, in both layouts where both can express them, and on two
# prompts past position 4,096: in fp32 the logits differ by at most 1e-5
# standard deviations, and greedy continuations of 64 tokens are equal.
# `tests/parity/test_parity_openai.py` does the same with OpenAI's own torch
# code, and `tests/oracles/float64.py` is a third oracle, loops in numpy, that
# float64 runs of ours meet to 1e-12.
#
# **What went wrong elsewhere.**
#
# - *The norm's rounding.* [TransformerEngine
#   #1132](https://github.com/NVIDIA/TransformerEngine/issues/1132): a fused
#   norm that rounds once and Llama's that rounds twice gave visibly different
#   hidden states. Both are right for some model. gpt-oss is one that rounds
#   once ([torch-spyre
#   #3580](https://github.com/torch-spyre/torch-spyre/issues/3580)).
# - *Loading.* [Automodel
#   #3667](https://github.com/NVIDIA-NeMo/Automodel/issues/3667): the 20b was
#   built whole in bf16 before it was placed. Converting one layer at a time
#   took the process from 50.1 to 3.5 GiB. That is {eq}`model-load`.
# - *A silent bf16 model.* [transformers
#   #42723](https://github.com/huggingface/transformers/issues/42723): when a
#   kernel package is missing, the four-bit experts are decoded to bf16, three
#   times the memory. Here `packed` decides and nothing falls back.
# - *A window of one.* transformers 5.23 keeps the last `[-W + 1:]` keys of a
#   sliding layer (`cache_utils.py`, `DynamicSlidingWindowLayer.update`): for
#   $W = 1$ that is all of them, and generation with its cache differs from
#   generation without. No released model has such a window; our tests do.
# - *Saving.* [transformers
#   #44983](https://github.com/huggingface/transformers/pull/44983) lets a
#   decoded model be saved. Version 5.23 then writes floats under the
#   `_blocks` names, and reading the folder again draws the experts at random,
#   with a warning; `save_original_format=False` avoids it. The reader of
#   [reading](../weights/reading.ipynb) refuses such a file, naming the tensor.

# %% [markdown]
# ## Takeaways
#
# - An implementation is held to another at named points in fp32 (1e-5), and
#   to float64 in bf16.
# - Top-1 between two bf16 runs proves nothing: where two router logits nearly
#   tie, rounding decides which experts compute.
# - What a walk finds wrong has a place: a layer and a point in it.
#
# ## Exercises
#
# ### Exercise 1
#
# Write the search: given the right model in float64 and another, name the
# first point that is further away than fp32 can explain. Try it on the
# models of the picture.

# %% tags=["hide-cell"]
for name, model in models.items():
    found = trace_ours(model, story)
    far = [key for key in places
           if (found[key] - exact_story[key]).abs().max()
           > 1e-4 * exact_story[key].abs().max()]
    print(f"{name:20}", far[0] if far else "nothing")

# %% [markdown]
# ### Exercise 2
#
# Where the experts' width equals the hidden size, a matrix read in the wrong
# orientation has the right shape. Turn `down_proj` of block 0 of the shipped
# model. At how many tokens does the next word change, and what does the
# search of exercise 1 say?

# %% tags=["hide-cell"]
turned = GptOss.from_pretrained(pocket, torch.float32, packed=False)
with torch.no_grad():
    weight = turned.layers[0].mlp.experts.down_proj
    weight.copy_(weight.mT.clone())
    said = turned(story)[0].argmax(-1)
found = trace_ours(turned, story)
far = [key for key in places if (found[key] - exact_story[key]).abs().max()
       > 1e-4 * exact_story[key].abs().max()]
print(f"shape {tuple(weight.shape)} either way; another word at "
      f"{int((said != words['right']).sum())} of {len(said)} tokens; first "
      f"wrong point: {far[0]}")

# %% [markdown]
# ### Exercise 3
#
# The figure shows medians over tokens. Compare median and mean of the error of
# our bf16 logits. Why do they differ?

# %% tags=["hide-cell", "nbval-ignore-output"]
each = torch.cat(errors["ours, bf16"]["", "logits"])
print(f"median {each.median():.1e}, mean {each.mean():.1e}: a few tokens went "
      "to other experts, and they rule the mean")

# %% [markdown]
# ## Sources
#
# - {cite}`gptoss2025`: the model card, architecture and sizes.
# - {cite}`rmsnorm2019` (RMSNorm), {cite}`gqa2023` (grouped queries),
#   {cite}`attention2017` (the block and its residual stream).
# - openai/gpt-oss, `gpt_oss/torch/model.py`: `Transformer`,
#   `AttentionBlock`, `MLPBlock`, `RMSNorm`.
# - huggingface/transformers 5.23, `models/gpt_oss/modeling_gpt_oss.py`:
#   `GptOssModel`, `GptOssDecoderLayer`, `GptOssRMSNorm`.
