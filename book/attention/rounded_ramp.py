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
# # Who rounds two numbers?
#
# ## Question
#
# The ramp of YaRN ends at pairs 8.09 and 17.40. Four well-known inference
# engines rounded these **two numbers**, to 8 and 18, and every short test
# passed. What does it change, and how far must a test look to see it? First,
# whether our own list is the released one.
#
# ## Against the others
#
# **Hugging Face.** All 131,072 positions, every pair, bit for bit, from
# the released configuration:

# %%
import math

import matplotlib.pyplot as plt
import torch

from gptoss.attention.rope import (
    apply_rope,
    inverse_frequencies,
    rope_parameters,
    rope_tables,
)
from gptoss.weights.config import GptOssConfig

plt.style.use("../_static/book.mplstyle")
torch.manual_seed(0)
C, THETA, TRAINED, FACTOR = 64, 150_000.0, 4096, 32.0
POSITIONS = 131_072
speed = THETA ** (-2 * torch.arange(C // 2, dtype=torch.float64) / C)
turns = TRAINED * speed / (2 * math.pi)
some = torch.logspace(0, math.log10(POSITIONS - 1), 1500).long().double()
inv_freq, conc = rope_parameters(GptOssConfig.gpt_oss_20b())
table = rope_tables(torch.arange(POSITIONS), inv_freq, conc)


def self_score(distance, speed):
    """The score of a query equal to its key, all pairs of one length."""
    return torch.cos(distance[:, None] * speed).mean(-1)

# %%
from transformers import GptOssConfig as HFConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

hf = HFConfig(
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": THETA,
        "factor": FACTOR,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": TRAINED,
    }
)
hf_inv_freq, hf_conc = ROPE_INIT_FUNCTIONS["yarn"](hf)
assert torch.equal(hf_inv_freq, inv_freq) and hf_conc == conc

rotary, equal = GptOssRotaryEmbedding(hf), 0
for start in range(0, POSITIONS, 8192):
    p = torch.arange(start, start + 8192)[None]
    theirs, ours = rotary(torch.zeros(1), p), rope_tables(p, inv_freq, conc)
    for t, o in zip(theirs, ours, strict=True):
        equal += (t == o).sum().item()
assert equal == 2 * POSITIONS * C // 2
print(f"{equal:,} of {2 * POSITIONS * C // 2:,} entries equal")

# %% [markdown]
# **One at a time.** The row of a decoding step is the row of the long
# table, bit for bit, so a cache cannot drift:

# %%
for p in range(0, POSITIONS, 4099):
    one_row = rope_tables(torch.tensor([p]), inv_freq, conc)
    assert torch.equal(one_row[0][0], table[0][p])
    assert torch.equal(one_row[1][0], table[1][p])
print("decode = prefill")

# %% [markdown]
# **OpenAI.** `gpt_oss/torch/model.py` orders the range differently
# ($\frac C2 \cdot \ln(\cdot) / \ln\vartheta$) and forms the angles as an
# outer product. In its order of operations:

# %%
def openai_tables(positions):
    wave = THETA ** (torch.arange(0, C, 2, dtype=torch.float32) / C)
    ends = [
        C / 2 * math.log(TRAINED / (beta * 2 * math.pi)) / math.log(THETA)
        for beta in (32.0, 1.0)
    ]
    ramp = (torch.arange(C / 2) - ends[0]) / (ends[1] - ends[0])
    mask = 1 - ramp.clamp(0, 1)
    speeds = 1.0 / (FACTOR * wave) * (1 - mask) + 1.0 / wave * mask
    angle = torch.outer(positions.float(), speeds)
    factor = 0.1 * math.log(FACTOR) + 1.0
    return angle.cos() * factor, angle.sin() * factor


theirs = openai_tables(torch.arange(POSITIONS))
both = list(zip(theirs, table, strict=True))
print("largest difference:", max((t - o).abs().max().item() for t, o in both))
assert all(torch.equal(t, o) for t, o in both)

# %% [markdown]
# None: the other order falls on the same fp32 numbers here.
#
# **`truncate: true`.** ggml (hence llama.cpp; `ggml_rope_yarn_corr_dims`)
# and mlx-lm 0.32 (`YarnRoPE`) round the range to 8 and 18. So did vLLM
# ([#27722](https://github.com/vllm-project/vllm/issues/27722), found
# through log-probabilities that did not match in reinforcement learning;
# fixed in [#28244](https://github.com/vllm-project/vllm/pull/28244)) and
# SGLang ([#14270](https://github.com/sgl-project/sglang/pull/14270)).
# Nine speeds change:

# %%
rounded = inverse_frequencies(C, THETA, FACTOR, truncate=True)
change = rounded.double() / inv_freq.double() - 1
moved = change.abs().gt(1e-6).nonzero().flatten().tolist()
assert moved == list(range(9, 18))
print("pairs that change:", moved)
print("per cent:", [f"{100 * change[i].item():+.1f}" for i in moved])
phase = TRAINED * (rounded.double() - inv_freq.double())
worst_pair = phase.abs().argmax().item()
print(f"at distance 4,096: {phase.abs().max().item():.2f} rad",
      f"in pair {worst_pair};",
      f"at 127: {127 / TRAINED * phase.abs().max().item():.3f} rad")

# %% [markdown]
# Why short tests pass: by {eq}`rope-relative` only distances count. Within
# the 128 tokens of a sliding layer the error stays below 0.03 rad; it is
# the full layers, looking back thousands of tokens, that turn to the
# wrong places.
#
# What to see: left, the error of speed is largest in pair 17; in the
# middle, the angle error is largest in pair 12, which turns faster. Right
# is what a head feels: the score of equals, with rounding minus without,
# below 0.002 up to a hundred tokens and up to 0.33 beyond the 4,096
# (dashed).

# %% tags=["hide-input"]
# Figure: what rounding the ramp changes. Left, the speed of pairs 9 to 17,
# most at pair 17; in the middle, the error of their angles at distance
# 4,096; right, the error of a score, which grows with the distance.
fig, (one, two, three) = plt.subplots(1, 3, figsize=(7, 2.7))
shown = torch.arange(7, 20)
one.bar(shown, 100 * change[shown])
one.set(xlabel="pair", ylabel="change of speed (%)", title="Speed")
two.bar(shown, phase[shown], color="#E69F00")
two.set(xlabel="pair", ylabel="angle error (rad)", title="At distance 4,096")
error = self_score(some, rounded.double())
error -= self_score(some, inv_freq.double())
three.semilogx(some, error, lw=0.7, color="#009E73")
three.axvline(TRAINED, color="k", lw=1, ls="--")
three.set(xlabel="distance (tokens)", ylabel="score error",
          title="Score of equals")
plt.show()

# %% [markdown]
# **Interleaved.** The paper, GPT-J and Meta's Llama release pair channel
# $2i$ with $2i + 1$. That is the same operation in another order of
# channels, so a permutation of the rows of the query and key projections
# converts one to the other, with the same scores. Without the permutation
# it is another silent error: nothing crashes, and at distance 0 the scores
# are still right.

# %%
def apply_interleaved(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


to_interleaved = torch.arange(C).view(2, C // 2).T.flatten()
q, k = torch.randn(2, 1, 9, 4, C).unbind()
t = rope_tables(torch.arange(100, 109)[None], inv_freq, conc)
for x in (q, k):
    half = apply_rope(x, *t)[..., to_interleaved]
    assert torch.equal(half, apply_interleaved(x[..., to_interleaved], *t))
mixed = (apply_interleaved(q, *t) * apply_interleaved(k, *t)).sum(-1)
right = (apply_rope(q, *t) * apply_rope(k, *t)).sum(-1)
print("same position, either pairing:", torch.allclose(mixed, right))
shifted = (apply_interleaved(q, *t)[:, 1:] * apply_interleaved(k, *t)[:, :-1])
right = (apply_rope(q, *t)[:, 1:] * apply_rope(k, *t)[:, :-1]).sum(-1)
print("one apart, wrong pairing:", torch.allclose(shifted.sum(-1), right))

# %% [markdown]
# ## Takeaways
#
# - All 131,072 rows of the table equal Hugging Face's and OpenAI's, bit for
#   bit.
# - Two rounded ends change nine speeds, one by 76 %. Within the 128 tokens of
#   a window that is nothing; at a distance of 4,096 it is several radians.
# - Pairing channels otherwise is a permutation of rows; forgetting it breaks
#   every score but those at distance 0.
#
# ## Exercises
#
# ### Exercise 1
#
# A test is to catch an engine that rounds the range. How far apart must
# query and key be before the score of equals is off by 0.01, by 0.05, by
# 0.1? Concentration left aside.

# %% tags=["hide-cell"]
distance = torch.arange(8192, dtype=torch.float64)
error = self_score(distance, rounded.double())
error -= self_score(distance, inv_freq.double())
for e in (0.01, 0.05, 0.1):
    print(f"off by {e} from {(error.abs() > e).nonzero()[0].item()} tokens on")
print(f"within a window by {error[:128].abs().max().item():.1g} at most")

# %% [markdown]
# ### Exercise 2
#
# Use the paper's ramp, linear in the number of turns:
# $\gamma_i = \mathrm{clamp}\big((r_i - 1)/(32 - 1), 0, 1\big)$. Which
# pair's speed is then furthest from the model's, in per cent?

# %% tags=["hide-cell"]
paper_gamma = ((turns - 1) / (32 - 1)).clamp(0, 1)
paper = speed * (paper_gamma + (1 - paper_gamma) / FACTOR)
off = (paper / inv_freq.double() - 1).abs()
print(f"pair {off.argmax().item()}: {100 * off.max().item():.0f} % too slow")
assert off[:9].max() < 1e-6 and off[18:].max() < 1e-6
assert (paper[9:18] < inv_freq[9:18]).all()

# %% [markdown]
# ### Exercise 3
#
# Given a query projection `W` with rows for half-split heads, write the
# rows that an engine with interleaved pairs needs, for all heads. Show
# that converting only the queries changes the scores.

# %% tags=["hide-cell"]
def to_interleaved_rows(W, head_dim):
    """(heads * C, D) -> the same rows in interleaved order"""
    order = torch.arange(head_dim).view(2, -1).T.flatten()
    return W.view(-1, head_dim, W.shape[-1])[:, order].reshape(W.shape)


x, heads = torch.randn(1, 9, 24), 2
Wq, Wk = torch.randn(2, heads * C, 24).div(24).unbind()
t = rope_tables(torch.arange(9)[None], inv_freq, conc)


def project(W, rotate):
    return rotate((x @ W.T).view(1, 9, heads, C), *t)


def all_scores(q, k):
    return torch.einsum("bthc,bshc->bhts", q, k)


reference = all_scores(project(Wq, apply_rope), project(Wk, apply_rope))
Iq, Ik = to_interleaved_rows(Wq, C), to_interleaved_rows(Wk, C)
both = all_scores(
    project(Iq, apply_interleaved), project(Ik, apply_interleaved)
)
torch.testing.assert_close(both, reference, rtol=1e-4, atol=1e-4)
only_q = all_scores(
    project(Iq, apply_interleaved), project(Wk, apply_interleaved)
)
print("both: equal; queries only:", torch.allclose(only_q, reference, 1e-4))

# %% [markdown]
# ## Sources
#
# - RoPE: {cite}`rope2021`; YaRN, NTK by parts and the temperature:
#   {cite}`yarn2023`; the model: {cite}`gptoss2025`.
# - openai/gpt-oss, `gpt_oss/torch/model.py`: `RotaryEmbedding`,
#   `_apply_rotary_emb`.
# - huggingface/transformers 5.23, `modeling_rope_utils.py`:
#   `_compute_yarn_parameters`; `models/gpt_oss/modeling_gpt_oss.py`:
#   `GptOssRotaryEmbedding`, `_apply_rotary_emb`.
# - NousResearch/Yarn-Llama-2-70b-32k, its card: training after the change.
# - pytorch/torchtitan, `models/common/rope.py`: YaRN as one pure function.
