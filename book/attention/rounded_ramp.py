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
# The ramp of YaRN begins at pair 8.09 and ends at pair 17.40 ([RoPE and
# YaRN](rope.ipynb)). Four well-known inference engines rounded these **two
# numbers**, to 8 and 18, as most YaRN models want it. One of the 32 speeds is
# then 76 % too fast, and every short test passed. Why did they pass, and how
# far must a test look?

# %% tags=["hide-input"]
import math

import matplotlib.pyplot as plt
import torch

from gptoss.attention.rope import (
    apply_rope,
    correction_range,
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
inv_freq, conc = rope_parameters(GptOssConfig.gpt_oss_20b())
rounded = inverse_frequencies(C, THETA, FACTOR, truncate=True)

# %% [markdown]
# ## Picture
#
# Which speeds change when the ends of the ramp are rounded, and by how many
# radians are the angles off at a distance of 100 tokens and of 4,096?

# %% tags=["hide-input"]
# Figure: left, the change of speed of pairs 7 to 19: bars from pair 9 on,
# rising to 76 per cent at pair 17, none from 18 on. Right, the error of the
# angles: hardly to be seen at a distance of 100, up to 0.9 radians at 4,096,
# most at pair 12.
change = 100 * (rounded.double() / inv_freq.double() - 1)
off = (rounded.double() - inv_freq.double()).abs()
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 2.7))
shown = torch.arange(7, 20)
left.bar(shown, change[shown], color="C0")
left.text(16.3, 70, "76 %", color="C0", ha="right")
left.set(xlabel="pair", ylabel="change of speed (%)", title="Speeds",
         xticks=range(7, 20, 2))
right.bar(shown, TRAINED * off[shown], color="C1")
right.bar(shown, 100 * off[shown], color="black")
right.text(14.55, 0.79, "4,096 tokens apart", color="#9a6a00")
right.annotate("100 tokens\napart", (17.4, 0.005), (17.8, 0.16), fontsize=9,
               arrowprops={"arrowstyle": "-", "lw": 0.8})
right.set(xlabel="pair", ylabel="angle error (rad)", title="Angles",
          xticks=range(7, 20, 2), xlim=(6, 21.5))
for ax in (left, right):
    ax.grid(axis="x", visible=False)
plt.show()

# %% [markdown]
# What to see: the largest error of a speed is in pair 17, the largest error of
# an angle in pair 12, which turns faster. And at 100 tokens there is hardly
# anything to see.
#
# ## The naive version
#
# The naive test compares with a reference on a prompt of some sentences. Only
# distances count, by {eq}`rope-relative`, so let us ask what a head feels at
# which distance. As in [the chapter on RoPE](rope.ipynb) we take a query equal
# to its key, all pairs of the same length: up to a factor, its score at
# distance $d$ is the mean of $\cos d\theta_i$.

# %%
def self_score(distance, speed):
    """The score of a query equal to its key, all pairs of one length."""
    return torch.cos(distance[:, None] * speed).mean(-1)


distance = torch.arange(POSITIONS, dtype=torch.float64)
right_score = self_score(distance, inv_freq.double())
error = (self_score(distance, rounded.double()) - right_score).abs()
for truncate in (False, True):
    ends = correction_range(C, THETA, truncate=truncate)
    print("ends of the ramp:", [round(end, 2) for end in ends])
print("pairs that change:", change.abs().gt(1e-4).nonzero().flatten().tolist())
print("per cent:", [round(n, 1) for n in change[9:18].tolist()])
for most in (10, 100, 127, 1000, 4096, POSITIONS - 1):
    print(f"up to {most:7,} tokens apart: an angle off by",
          f"{most * off.max():.3g} rad,",
          f"a score by {error[:most + 1].max():.2g}")

# %% [markdown]
# A prompt of a hundred tokens changes a score by two thousandths, and the
# sliding layers never look back further than 127. Rounding scores to bf16 does
# as much. It is the full layers that turn to the wrong places, when they look
# back thousands of tokens.
#
# Who rounds? ggml (hence llama.cpp; `ggml_rope_yarn_corr_dims`) and mlx-lm
# 0.32 (`YarnRoPE`) round the range to 8 and 18. So did vLLM
# ([#27722](https://github.com/vllm-project/vllm/issues/27722), found
# through log-probabilities that did not match in reinforcement learning;
# fixed in [#28244](https://github.com/vllm-project/vllm/pull/28244)) and
# SGLang ([#14270](https://github.com/sgl-project/sglang/pull/14270)). The
# released configuration says `truncate: false`.
#
# ## Against the others
#
# Is our own list the released one? **Hugging Face**, all 131,072 positions,
# every pair, bit for bit, from the released configuration:

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


table = rope_tables(torch.arange(POSITIONS), inv_freq, conc)
theirs = openai_tables(torch.arange(POSITIONS))
both = list(zip(theirs, table, strict=True))
print("largest difference:", max((t - o).abs().max().item() for t, o in both))
assert all(torch.equal(t, o) for t, o in both)

# %% [markdown]
# None: the other order falls on the same fp32 numbers here. And a row that is
# computed alone, as in a step of decoding, is the row of the long table, so a
# cache cannot drift:

# %%
rows = range(0, POSITIONS, 4099)
for p in rows:
    one_row = rope_tables(torch.tensor([p]), inv_freq, conc)
    assert all(torch.equal(a[0], b[p])
               for a, b in zip(one_row, table, strict=True))
print(f"cos of pair 5 at {p:,}: alone {one_row[0][0, 5]:.6f},",
      f"in the table {table[0][p, 5]:.6f}; {len(rows)} rows equal")

# %% [markdown]
# ## Another silent error: which channels are a pair?
#
# gpt-oss pairs channel $i$ with channel $i + C/2$. The paper, GPT-J and
# Meta's Llama release pair channel $2i$ with $2i + 1$ (**interleaved**). That
# is the same operation on another order of channels, so whoever permutes the
# rows of the query and key projections converts one to the other, with the
# same scores. Without the permutation nothing crashes, and at distance 0 the
# scores are even right:

# %%
def apply_interleaved(x, cos, sin):
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


to_interleaved = torch.arange(C).view(2, C // 2).T.flatten()
q, k = torch.randn(2, 1, 9, 1, C).unbind()
t = rope_tables(torch.arange(100, 109)[None], inv_freq, conc)
for x in (q, k):
    half = apply_rope(x, *t)[..., to_interleaved]
    assert torch.equal(half, apply_interleaved(x[..., to_interleaved], *t))
print("distance   right pairs   wrong pairs")
for apart in (0, 1, 5):
    found = []
    for turn in (apply_rope, apply_interleaved):
        query, key = turn(q, *t)[0, 8, 0], turn(k, *t)[0, 8 - apart, 0]
        found.append((query @ key).item())
    print(f"{apart:8}{found[0]:14.3f}{found[1]:14.3f}")

# %% [markdown]
# ## Takeaways
#
# - Two rounded ends change nine speeds, one by 76 %. Within the 128 tokens of
#   a window that is nothing; at a distance of 4,096 an angle is off by nearly
#   one radian, and a test must look thousands of tokens back to see it.
# - All 131,072 rows of our table equal Hugging Face's and OpenAI's, bit for
#   bit.
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
for e in (0.01, 0.05, 0.1):
    print(f"off by {e} from {(error > e).nonzero()[0].item()} tokens on")

# %% [markdown]
# ### Exercise 2
#
# Use the paper's ramp, linear in the number of turns:
# $\gamma_i = \mathrm{clamp}\big((r_i - 1)/(32 - 1), 0, 1\big)$. Which
# pair's speed is then furthest from the model's, in per cent?

# %% tags=["hide-cell"]
paper_gamma = ((turns - 1) / (32 - 1)).clamp(0, 1)
paper = speed * (paper_gamma + (1 - paper_gamma) / FACTOR)
too_slow = (paper / inv_freq.double() - 1).abs()
print(f"pair {too_slow.argmax().item()}:",
      f"{100 * too_slow.max().item():.0f} % too slow")
assert too_slow[:9].max() < 1e-6 and too_slow[18:].max() < 1e-6
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
for name, a in (("half-split", reference), ("both converted", both),
                ("queries only", only_q)):
    print(f"{name:15}", [round(n, 2) for n in a[0, 0, 3, :4].tolist()])

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
