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
#     module: rope
#     public: [apply_rope, rope_parameters, rope_tables]
# ---

# %% [markdown]
# # From RoPE to YaRN
#
# ## Question
#
# Attention does not know in which order its tokens come
# ([scores](scores.ipynb), third exercise). gpt-oss tells it by turning
# queries and keys, and the speeds of the turning are laid out for texts of
# 4,096 tokens (`initial_context_length`). Yet it reads 131,072, 32 times as
# many. In the code, only a list of 32 numbers and one factor change for that;
# the recipe is called YaRN. Is changing numbers enough, or must the model be
# trained further with them? Its authors trained further. Nothing is
# published about the lengths that gpt-oss was trained on, so we ask a model
# that we can train ourselves.

# %% tags=["hide-input"]
import math

import matplotlib.pyplot as plt
import torch

plt.style.use("../_static/book.mplstyle")
torch.manual_seed(0)
C, THETA, TRAINED, FACTOR = 64, 150_000.0, 4096, 32.0
POSITIONS = 131_072

# %% [markdown]
# ## Picture
#
# Rotary position embedding (RoPE, {cite}`rope2021`) groups the $C = 64$
# channels of a query or key into 32 pairs and turns pair $i$ by
# $\theta_i$ radians for each token of its position. Every pair is the hand
# of a clock with its own speed $\theta_i$, fast for pair 0, slow for pair
# 31. The figure draws how many tokens each hand takes for one turn.
#
# What to see: hands 0 to 8 go round at least 32 times within the 4,096 tokens
# and keep their speed. Hands 18 to 31 never complete one turn; YaRN
# {cite}`yarn2023` slows them by the whole factor 32. Between lies a ramp.

# %% tags=["hide-input"]
# Figure: tokens for one turn of each of the 32 pairs, on a logarithmic
# scale, with and without YaRN. The curves agree up to pair 8, part on a
# ramp, and from pair 18 on YaRN takes 32 times as long.
pair = torch.arange(C // 2, dtype=torch.float64)
speed = THETA ** (-2 * pair / C)  # radians a token
turns = TRAINED * speed / (2 * math.pi)
kept = 1 - ((pair - 8.0928) / (17.3980 - 8.0928)).clamp(0, 1)
slowed = speed * (kept + (1 - kept) / FACTOR)  # derived below

fig, ax = plt.subplots(figsize=(7, 3.4))
ax.axvspan(-0.5, 8.09, color="#0072B2", alpha=0.07, lw=0)
ax.axvspan(8.09, 17.4, color="#E69F00", alpha=0.12, lw=0)
ax.axvspan(17.4, 31.5, color="#009E73", alpha=0.09, lw=0)
ax.semilogy(pair, 2 * math.pi / speed, "o-", ms=3, color="C0")
ax.semilogy(pair, 2 * math.pi / slowed, "s-", ms=3, color="C5")
ax.text(26.4, 6e4, "RoPE", color="C0", ha="left", va="top")
ax.text(24.2, 3.5e6, "YaRN", color="C5", ha="right", va="bottom")
for tokens in (TRAINED, POSITIONS):
    ax.axhline(tokens, color="k", lw=1, ls="--")
    ax.text(-0.2, tokens * 1.3, f"{tokens:,} tokens", va="bottom")
for x, name in ((3.8, "kept"), (12.7, "blended"), (24.4, "slowed by 32")):
    ax.text(x, 2, name, ha="center")
ax.set(xlabel="pair i", ylabel="tokens for one turn", xlim=(-0.5, 31.5),
       ylim=(1, 1e8), title="One clock hand a pair")
plt.show()

# %% [markdown]
# The factor 32 is a setting. A larger one slows the hands of the right side
# further and leaves those of the left alone; the ramp between them stays
# where it is. Rounding its ends moves it.
#
# <div class="live" data-live="rope">In the web book, a slider moves the
# factor here, and a box rounds the ends of the ramp.</div>
#
# ## The naive version
#
# RoPE alone, simply run further. To see what that does, we train a reader
# so small that it takes seconds, on texts of 256 tokens, and then hand it
# texts of 2,048. Every token is a letter, and eight tokens of a text, at
# random places, also carry a flag of some colour. At every token the reader
# answers two questions: which colour had the latest flag, and which letter
# stood three tokens back? The first is about order over the whole text; the
# second needs neighbours told apart. There are eight colours and eight
# letters, so guessing is right once in eight.

# %%
KINDS, BACK, LEARNT, LONGER = 8, 3, 256, 2048


def make_texts(count, length, rng):
    """Letters and flags (0: none), and the two answers (-100: none yet),
    each (count, length); eight flags in a text, on average."""
    letters = torch.randint(KINDS, (count, length), generator=rng)
    flags = torch.randint(1, KINDS + 1, (count, length), generator=rng)
    flags *= torch.rand(count, length, generator=rng) < 8 / length
    place = torch.arange(length).where(flags > 0, -1).cummax(-1).values
    latest = flags.gather(1, place.clamp(min=0)) - 1
    back = letters.roll(BACK, 1)
    back[:, :BACK] = -100
    return letters, flags, latest.where(place >= 0, -100), back


shown = make_texts(1, 12, torch.Generator().manual_seed(4))
for name, row in zip(("letter", "flag", "latest", "back"), shown,
                     strict=True):
    print(f"{name:7}", *(f"{n:2}" if n >= 0 else " ." for n in row[0]))

# %% [markdown]
# (A flag of 3 is the colour 2: 0 means no flag.) The reader is one layer of
# attention with two heads and nothing else. Its queries and keys are turned:
# pair $i$ by its speed times the position. Its 16 speeds are all that we shall
# change. It computes in float64, so that every machine trains the same reader.

# %%
class Reader(torch.nn.Module):
    """Two heads of 32 channels over letters and flags; two answers."""

    def __init__(self, rng, width=32, heads=2, channels=32):
        super().__init__()
        self.shape, every = (heads, channels), heads * channels
        sizes = {"letter": (KINDS, width, 1), "flag": (KINDS + 1, width, 1),
                 "q": (width, every, width), "k": (width, every, width),
                 "v": (width, every, width), "q_bias": (every, 1),
                 "k_bias": (every, 1), "out": (every, 2 * KINDS, every)}
        for name, (*shape, fan_in) in sizes.items():
            drawn = torch.randn(shape, generator=rng, dtype=torch.float64)
            drawn = torch.nn.Parameter(drawn / fan_in ** 0.5)
            self.register_parameter(name, drawn)

    def forward(self, letters, flags, speed, factor=1.0):
        """Logits of both answers, each (count, length, KINDS)."""
        x = self.letter[letters] + self.flag[flags]
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        angle = torch.arange(x.shape[1])[:, None] * speed
        turn = torch.polar(torch.full_like(angle, factor), angle)

        def heads(y):
            return y.unflatten(-1, self.shape).transpose(1, 2)

        def turned(y):
            y = torch.complex(*heads(y).chunk(2, -1)) * turn
            return torch.cat((y.real, y.imag), -1)

        mixed = torch.nn.functional.scaled_dot_product_attention(
            turned(x @ self.q + self.q_bias), turned(x @ self.k + self.k_bias),
            heads(x @ self.v), is_causal=True)
        return (mixed.transpose(1, 2).flatten(2) @ self.out).split(KINDS, -1)

# %%
def learn(reader, steps, count, length, rate, rng, speed, factor=1.0):
    """Adam on fresh texts; the rate rises over 5 steps and falls to 0."""
    adam = torch.optim.Adam(reader.parameters())
    for step in range(steps):
        letters, flags, *answers = make_texts(count, length, rng)
        found = reader(letters, flags, speed, factor)
        loss = sum(torch.nn.functional.cross_entropy(f.mT, a)
                   for f, a in zip(found, answers, strict=True))
        for group in adam.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 5) * (1 - step / steps)
        adam.zero_grad()
        loss.backward()
        adam.step()


@torch.no_grad()
def right(reader, length, speed, factor=1.0):
    """Per cent of right answers to both questions, on 32,768 new tokens;
    of every text the second half counts."""
    letters, flags, *answers = make_texts(32_768 // length, length,
                                          torch.Generator().manual_seed(9))
    late = (slice(None), slice(length // 2, None))
    return [100 * (f.argmax(-1) == a)[late][a[late] >= 0].double().mean()
            .item() for f, a in zip(reader(letters, flags, speed, factor),
                                    answers, strict=True)]


rng = torch.Generator().manual_seed(0)
reader = Reader(rng)
small = 1000.0 ** (-torch.arange(16, dtype=torch.float64) / 16)
learn(reader, 300, 8, LEARNT, 0.02, rng, small)
print(f"{'per cent right':25}flag {'letter':>7}")
tries = {"256 tokens": (LEARNT, small), "2,048 tokens": (LONGER, small),
         "2,048, interpolated": (LONGER, small / 8)}
found = {name: right(reader, *how) for name, how in tries.items()}
for name, (flag, letter) in found.items():
    print(f"{name:23}{flag:6.0f} {letter:7.0f}")
assert min(found["256 tokens"]) > 95
assert max(found["2,048 tokens"]) < 40
assert found["2,048, interpolated"][0] > 95
assert found["2,048, interpolated"][1] < 16

# %% [markdown]
# On texts of the length that it learnt from, the reader answers nearly
# always; on texts eight times as long it all but guesses. A hand that covered
# a fraction of a turn was only ever asked about that fraction, and the
# weights that are right there say nothing about the rest of the dial.
#
# The obvious repair is **position interpolation**: divide every position
# by 8, so that no hand passes an angle it has not seen. For the flags that
# is perfect, and no wonder: eight flags in 2,048 tokens lie eight times as
# far apart as eight in 256, so at an eighth of the speed all is as it was.
# But the letter three back is lost. Which one does the reader name instead?

# %%
letters, flags, *_ = make_texts(4, LONGER, torch.Generator().manual_seed(9))
with torch.no_grad():
    named = reader(letters, flags, small / 8)[1].argmax(-1)
same = torch.stack([(named == letters.roll(d, 1))[:, 64:].double().mean()
                    for d in range(65)])
print("named most often: the letter", same.argmax().item(), "back")
assert abs(same.argmax() - 8 * BACK) <= 1

# %% [markdown]
# At an eighth of the speed, $8 \cdot 3$ tokens look as three did. How much
# of the contrast between neighbours is left? Take a query equal to its key,
# all pairs of the same length: up to a factor, the score at distance $d$
# is the mean of $\cos d\theta_i$. Watch what the first step does to it, now
# with the speeds of gpt-oss and its factor 32.

# %%
def self_score(distance, speed):
    return torch.cos(distance[:, None] * speed).mean(-1)


one = torch.tensor([1.0], dtype=torch.float64)
for name, s in (("RoPE", speed), ("interpolated", speed / FACTOR),
                ("YaRN", slowed)):
    print(f"{name:13}1 - score at distance 1:",
          f"{1 - self_score(one, s).item():.1e}")

# %% [markdown]
# A thousand times smaller: $1 - \cos x \approx x^2/2$, so the contrast
# goes with the square of the speed, and $32^2 = 1024$. The previous token
# and the one before it stand at almost the same place. YaRN, derived now,
# keeps nearly all of the contrast.
#
# ## Derivation
#
# **A turn for a position.** One pair first, with a speed of half a radian a
# token. A query $(1, 0)$ at position 7 is turned by 3.5 radians, a key
# $(1, 0)$ at position 5 by 2.5. What is their dot product, and what is it a
# hundred tokens later?

# %%
def turned_by(angle):
    return torch.tensor([math.cos(angle), math.sin(angle)])


for query_at, key_at in ((7, 5), (107, 105), (7, 4)):
    dot = turned_by(query_at / 2) @ turned_by(key_at / 2)
    print(f"positions {query_at} and {key_at}: {dot:.4f}")
print(f"cos 1 = {math.cos(1):.4f}, cos 1.5 = {math.cos(1.5):.4f}")

# %% [markdown]
# Only the distance counts. In general, write pair $i$ of a query $x$ as the
# complex number $q_i = x_i + \mathrm{i}\,x_{i+C/2}$ (upright
# $\mathrm{i} = \sqrt{-1}$) and turn it by its position $m$:
#
# $$
# q_i \;\to\; q_i\,e^{\mathrm{i} m\theta_i}, \qquad
# \theta_i = \vartheta^{-2i/C}, \quad i = 0 \dots C/2 - 1
# $$ (rope-turn)
#
# with base $\vartheta = 150000$ (`rope_theta`). The dot product of two
# pairs is $\mathrm{Re}[q_i \overline{k_i}]$, so with the key at position
# $n$ the score is
#
# $$
# \sum_i \mathrm{Re}\!\left[q_i e^{\mathrm{i} m\theta_i}
#   \,\overline{k_i e^{\mathrm{i} n\theta_i}}\right]
# = \sum_i \mathrm{Re}\!\left[q_i \overline{k_i}\,
#   e^{\mathrm{i}(m-n)\theta_i}\right],
# $$ (rope-relative)
#
# which depends on $m$ and $n$ through their difference alone, though each
# side is turned without knowledge of the other. That is why keys can be
# stored turned.
#
# **Who extrapolates and who does not.** In the $T_0 = 4096$ tokens that
# the speeds were laid out for, pair $i$ makes
#
# $$
# r_i = \frac{T_0\,\theta_i}{2\pi}
# $$ (rope-rounds)
#
# turns. A hand with many turns has shown every angle within them, and distance
# 100,000 shows it nothing new; slowing it only costs resolution. A hand with
# $r_i < 1$ has not been all the way round: its angle beyond $T_0$ is new, and
# it must be slowed until 131,072 tokens fit on the arc that it knows. That is
# interpolation by the factor $s = 32$, for this pair only. Between 32 turns
# and one, YaRN blends linearly ("NTK by parts"):
#
# $$
# \theta'_i = \gamma_i\,\theta_i + (1-\gamma_i)\,\frac{\theta_i}{s},
# \qquad
# \gamma_i = 1 - \mathrm{clamp}\!\left(
#   \frac{i - \mathrm{low}}{\mathrm{high} - \mathrm{low}},\,0,\,1\right)
# $$ (rope-blend)
#
# The ends of the ramp are the (fractional) pairs that make exactly
# $\beta_{fast} = 32$ and $\beta_{slow} = 1$ turns. Put
# $\theta_i = \vartheta^{-2i/C}$ into {eq}`rope-rounds`, set
# $r_i = \beta$ and solve for $i$:
#
# $$
# i(\beta) = \frac{C\,\ln\!\big(T_0/(2\pi\beta)\big)}{2\ln\vartheta},
# \qquad \mathrm{low} = i(32) = 8.09\dots,\quad
# \mathrm{high} = i(1) = 17.40\dots
# $$ (rope-range)
#
# YaRN's published code rounds low down and high up, and so does `transformers`
# unless the configuration says, as that of gpt-oss does, `truncate: false`.
#
# In the paper's text $\gamma$ is linear in the number of turns $r_i$. In
# every implementation (the authors', OpenAI's, HF's) it is linear in the
# index $i$, that is in $\log r_i$, and gpt-oss means the latter. An exercise
# of [who rounds two numbers?](rounded_ramp.ipynb) measures the difference.
#
# **Concentration.** Over more keys of the same kind a softmax gives each of
# them less (the third exercise measures it). YaRN divides the scores by a
# temperature $t$ below 1, which sharpens them. It was fitted by its authors
# to perplexities, not derived:
#
# $$
# \sqrt{1/t} = 0.1\,\ln s + 1 = 1.3465735902799727 .
# $$ (rope-concentration)
#
# Multiplying cos *and* sin by this number scales every query and every
# key, so a **score gets its square**, 1.8133. The softmax scale is in
# effect $0.2267$, not $1/\sqrt C = 0.125$. The sink logits of [a later
# chapter](sinks.ipynb) are not scaled. The factor does not depend on the
# length of the prompt: it is there at position 0, and in sliding layers too.

# %% [markdown]
# ## Code
#
# ### Which pairs are slowed?
#
# Equation {eq}`rope-range`, in 64-bit floats. So that the last bit agrees
# with `transformers`, in its order of operations: $C$ times the logarithm,
# divided by $2 \ln\vartheta$. The ends stay within 0 and $C - 1$.

# %% tags=["export"]
import math

import torch
from torch import Tensor

from gptoss.weights.config import GptOssConfig

# %% tags=["export"]
def correction_range(
    head_dim: int,
    theta: float,
    original: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = False,
) -> tuple[float, float]:
    """Pair indices (low, high) between which YaRN blends.

    Pairs up to low turn more than beta_fast times in `original` tokens and
    keep their speed; pairs from high on turn less than beta_slow times and
    are slowed by the full factor. gpt-oss rounds neither end; truncate=True
    rounds low down and high up, as other YaRN models do.
    """

    def pair_that_turns(times: float) -> float:
        log_angle = math.log(original / (times * 2 * math.pi))
        return (head_dim * log_angle) / (2 * math.log(theta))

    low, high = pair_that_turns(beta_fast), pair_that_turns(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_dim - 1)

# %%
low, high = correction_range(C, THETA)
assert (low, high) == (8.092779115512402, 17.39802450158856)
print(f"kept: 0..{math.floor(low)}")
print(f"blended: {math.ceil(low)}..{math.floor(high)}")
print(f"slowed by {FACTOR:.0f}: {math.ceil(high)}..{C // 2 - 1}")
for end in (low, high):
    rounds = TRAINED * THETA ** (-2 * end / C) / (2 * math.pi)
    print(f"a pair {end:.2f} makes {rounds:.4g} turns in 4,096 tokens")
print(f"ends of the ramp: {low:.2f} and {high:.2f};",
      "rounded as elsewhere:", correction_range(C, THETA, truncate=True))

# %% [markdown]
# ### How fast does each pair turn?
#
# The clamp of {eq}`rope-blend`, in fp32. Where both ends are one number, as
# rounding may make them, the ramp is a step: pairs up to it are kept, those
# above it slowed by the whole factor.

# %% tags=["export"]
def _ramp(low: float, high: float, pairs: int) -> Tensor:
    """0 up to pair `low`, 1 from pair `high`, straight between. (pairs,)"""
    if low == high:
        high += 0.001  # a step; the value is transformers' own
    pair = torch.arange(pairs, dtype=torch.float32, device="cpu")
    return ((pair - low) / (high - low)).clamp(0, 1)

# %%
print([round(v, 2) for v in _ramp(low, high, C // 2)[7:20].tolist()])

# %% [markdown]
# And the blend. The result is fp32 and every operation rounds, so the
# order decides the last bit; why that matters, "It holds" shows. We raise
# $\vartheta$ to $2i/C$, which gives the tokens for one radian, and take the
# reciprocal of that, times the factor or not. A factor of exactly 1 is plain
# RoPE. The numbers are made on the CPU even while a model is only being
# sketched on torch's meta device.
#
# Two refusals, ValueErrors: a head of an odd size, or of none, has no pairs
# (`head_dim: expected even, found 7`), and a factor below 1 would speed the
# hands up; NaN is refused with it (`rope factor: expected >= 1, found nan`).

# %% tags=["export"]
def inverse_frequencies(
    head_dim: int,
    theta: float,
    factor: float = 1.0,
    original: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Angular speed of each pair, (C/2,) fp32, in radians a token.

    factor 1 is plain RoPE; above 1 it is YaRN's blend. The order of the
    operations is that of transformers' modeling_rope_utils, so that the
    result is equal to it bit for bit; computed on the CPU, then moved, as
    the last bit of a power differs between devices.
    ValueError: odd head_dim, factor < 1.
    """
    if head_dim % 2 or head_dim < 2:
        raise ValueError(f"head_dim: expected even, found {head_dim}")
    if not factor >= 1.0:
        raise ValueError(f"rope factor: expected >= 1, found {factor}")
    even = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    wave = theta ** (even / head_dim)  # tokens a radian
    if factor == 1.0:
        return (1.0 / wave).to(device)
    slow, fast = 1.0 / (factor * wave), 1.0 / wave
    low, high = correction_range(
        head_dim, theta, original, beta_fast, beta_slow, truncate
    )
    keep = 1 - _ramp(low, high, head_dim // 2)
    return (slow * (1 - keep) + fast * keep).to(device)

# %%
plain = inverse_frequencies(C, THETA)
yarn = inverse_frequencies(C, THETA, FACTOR)
print(" pair   turns in 4,096   slowed by")
for i in (0, 8, 9, 13, 17, 18, 31):
    print(f"{i:5}{turns[i].item():17.3g}{(plain[i] / yarn[i]).item():12.3g}")

# %% [markdown]
# ### By how much are scores sharpened?
#
# Equation {eq}`rope-concentration`; up to a factor of 1 there is nothing to
# sharpen:

# %% tags=["export"]
def concentration(factor: float) -> float:
    """Factor on both cos and sin; scores get its square. 1.0 if factor <= 1.

    The YaRN paper's sqrt(1/t): the temperature t divides every score.
    """
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0

# %%
assert concentration(FACTOR) == 1.3465735902799727
print(f"on cos and sin {concentration(FACTOR):.4f}")
print(f"on a score     {concentration(FACTOR) ** 2:.4f}")
print(f"softmax scale  {C**-0.5 * concentration(FACTOR) ** 2:.4f}",
      f"instead of {C**-0.5:.3f}")

# %% [markdown]
# And the one place where a configuration is read. A `rope_type` of
# "default" means plain RoPE; then the concentration is 1.

# %% tags=["export"]
def rope_parameters(
    config: GptOssConfig, device: torch.device | str | None = None
) -> tuple[Tensor, float]:
    """(inv_freq (C/2,) fp32, concentration) of a configuration."""
    if config.rope_type == "default":
        return inverse_frequencies(
            config.head_dim, config.rope_theta, device=device
        ), 1.0
    inv_freq = inverse_frequencies(
        config.head_dim,
        config.rope_theta,
        factor=config.rope_factor,
        original=config.initial_context_length,
        beta_fast=config.rope_beta_fast,
        beta_slow=config.rope_beta_slow,
        truncate=config.rope_truncate,
        device=device,
    )
    return inv_freq, concentration(config.rope_factor)

# %%
inv_freq, conc = rope_parameters(GptOssConfig.gpt_oss_20b())
assert torch.equal(inv_freq, yarn)
print(f"the 20b: pairs 0 and 31 turn by {inv_freq[0]:.3g} and",
      f"{inv_freq[31]:.3g} radians a token; times {conc:.4f}")

# %% [markdown]
# ### By which angle is a token turned?
#
# Computed from the positions of this forward pass, once for all layers:
# no table of 131,072 rows is kept. Positions are integers up to $2^{17}$,
# exact in fp32 (up to $2^{24}$). The order is fp32 angle, cos, times
# concentration, and one rounding to the model's type at the end. Speeds in
# float64 make float64 angles; any other type is a TypeError (`inv_freq:
# expected float32 or float64`).

# %% tags=["export"]
def rope_tables(
    positions: Tensor,
    inv_freq: Tensor,
    concentration: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (..., T, C/2) in dtype, of integer positions.

    positions (..., T), inv_freq (C/2,) in radians a token.
    Angles, cos and sin are computed in inv_freq's type (fp32; float64 if a
    test asks for it), times the concentration, and only then cast. Padding
    (position -1) gets some finite row that no mask lets through.
    TypeError: inv_freq narrower than fp32, which would move distant tokens.
    """
    if inv_freq.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"inv_freq: expected float32 or float64, found {inv_freq.dtype}"
        )
    angle = positions[..., None].to(inv_freq.dtype) * inv_freq
    cos, sin = angle.cos() * concentration, angle.sin() * concentration
    return cos.to(dtype), sin.to(dtype)

# %%
cos, sin = rope_tables(torch.tensor([[0, 1, 131_071]]), inv_freq, conc)
print(tuple(cos.shape), cos.dtype)
print("position 0 only scales: cos",
      sorted({round(n, 4) for n in cos[0, 0].tolist()}), "sin",
      sorted(set(sin[0, 0].tolist())))
try:
    rope_tables(torch.tensor([0]), inv_freq.bfloat16())
except TypeError as error:
    print(error)

# %% [markdown]
# The refusal is there because `model.to(torch.bfloat16)` casts buffers as
# well as weights. What a bf16 list of speeds does to the last position:

# %%
last = POSITIONS - 1
wrong = last * inv_freq.bfloat16().double() - last * inv_freq.double()
print(f"largest angle error: {wrong.abs().max().item():.0f} rad")

# %% [markdown]
# Thirty-two turns: noise. Angles in half precision are an old mistake
# ([transformers#29285][r1]) and a new one: [sglang-jax#1473][r2] found
# frequencies rounded to bf16, and outputs off by 0.8 at position 4095.
# Rounding cos and sin afterwards, as `dtype=torch.bfloat16` does here, is
# another matter: an error of at most $2^{-8}$ at any position.
#
# [r1]: https://github.com/huggingface/transformers/pull/29285
# [r2]: https://github.com/sgl-project/sglang-jax/pull/1473
#
# ### How is a vector turned?
#
# Equation {eq}`rope-turn` with real numbers. gpt-oss pairs channel $i$
# with channel $i + C/2$. The tables, (B, T, C/2) or, for all texts alike,
# (T, C/2), serve all heads. They are cast to the type of the vector first, so
# wider tables do not widen the result.

# %% tags=["export"]
def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, T, H, C) by tables (B, T, C/2); same shape and dtype.

    Half-split: channel i is paired with channel i + C/2, not with i + 1.
    """
    cos = cos.to(x.dtype).unsqueeze(-2)  # one angle for all heads
    sin = sin.to(x.dtype).unsqueeze(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (first * cos - second * sin, second * cos + first * sin), dim=-1
    )

# %%
x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
quarter = torch.tensor([[[math.pi / 2, 0.0]]])
turned = apply_rope(x, quarter.cos(), quarter.sin())
print([round(v, 3) for v in turned.flatten().tolist()])

# %% [markdown]
# A quarter turn of pair 0, channels 0 and 2: $(1, 3) \to (-3, 1)$. Pair 1,
# channels 1 and 3, stays.
#
# ## It holds
#
# **Relative, and only relative.** Queries and keys moved together by any
# shift keep their scores (random shapes, float64 angles):

# %%
def scores(q, k, q_pos, k_pos, inv_freq, dtype=torch.float64):
    q = apply_rope(q, *rope_tables(q_pos[None], inv_freq, 1.0, dtype))
    k = apply_rope(k, *rope_tables(k_pos[None], inv_freq, 1.0, dtype))
    return torch.einsum("bthc,bshc->bhts", q, k)


worst = 0.0
for trial in range(50):
    size, heads = 2 * (trial % 8 + 1), trial % 3 + 1
    f = inverse_frequencies(size, THETA, FACTOR).double()
    q = torch.randn(1, 5, heads, size, dtype=torch.float64)
    k = torch.randn(1, 7, heads, size, dtype=torch.float64)
    q_pos, k_pos = torch.randint(0, 1000, (5,)), torch.randint(0, 1000, (7,))
    shift = torch.randint(0, 130_000, ())
    moved = scores(q, k, q_pos + shift, k_pos + shift, f)
    worst = max(worst, (moved - scores(q, k, q_pos, k_pos, f)).abs().max())
assert worst < 1e-9
print("50 cases, never further apart than 1e-09")

# %% [markdown]
# **A rotation and a factor.** Lengths change by the concentration alone.

# %%
x = torch.randn(1, 6, 2, C, dtype=torch.float64)
far_out = torch.randint(0, 60_000, (1, 6))
long = apply_rope(x, *rope_tables(far_out, inv_freq.double(), conc,
                                  torch.float64))
torch.testing.assert_close(long.norm(dim=-1), conc * x.norm(dim=-1))
print(f"lengths grow by {(long.norm() / x.norm()).item():.4f}")

# %% [markdown]
# **How good is fp32 at the far end?** Two roundings touch an angle. The
# speed $\theta'_i$ is rounded to 24 bits, and so is the product with the
# position. From $2^{16}$ radians up its steps are $2^{-7} = 0.0078$, so it
# is at most $2^{-8}$ off. Compare with float64 at position 131,071:

# %%
e = torch.arange(0, C, 2, dtype=torch.float64)
gamma = 1 - ((e / 2 - low) / (high - low)).clamp(0, 1)
exact = THETA ** (-e / C) * (gamma + (1 - gamma) / FACTOR)

rounded_product = (torch.tensor(float(last)) * inv_freq).double()
errors = {
    "from rounding the product": rounded_product - last * inv_freq.double(),
    "from rounding the speeds": last * (inv_freq.double() - exact),
    "together": rounded_product - last * exact,
}
for name, error in errors.items():
    print(f"{name:26}{1000 * error.abs().max():.0f} thousandths of a radian")
assert errors["from rounding the product"].abs().max() <= 2**-8

# %% [markdown]
# A few thousandths of a radian. The second line is no error of this code: the
# released code computes the list in fp32, and those 32 numbers are the model.
#
# **The sentence again.** With our tables and our rotation in the place of its
# own, [the page](../one_page.ipynb) goes on as it did:

# %%
from gptoss.one_page import SENTENCE, sentence

retold = sentence(12, rope=apply_rope, rope_tables=lambda where, settings: (
    rope_tables(where, *rope_parameters(GptOssConfig.from_dict(settings)))))
assert retold == sentence(12)
print(retold.removeprefix(SENTENCE).strip())

# %% [markdown]
# ## Is changing numbers enough?
#
# Back to the reader of the naive version, on 2,048 tokens. Its ramp begins
# at the hands with 8 turns in 256 tokens, and not with 32: the fastest hand
# has 41. Each kind of speeds is tried as it is, and after 50 steps of training
# with these speeds, each on one text of 2,048 tokens (the reader had 300
# steps with 8 texts of 256). The last column asks the trained reader about
# short texts again.

# %%
from copy import deepcopy

blended = inverse_frequencies(32, 1000.0, 8.0, LEARNT, 8.0).double()
kinds = {"RoPE": (small, 1.0), "interpolated": (small / 8, 1.0),
         "YaRN": (blended, concentration(8.0))}
rows = {}
for name, kind in kinds.items():
    later = deepcopy(reader)
    learn(later, 50, 1, LONGER, 0.006, torch.Generator().manual_seed(1),
          *kind)
    rows[name] = [right(reader, LONGER, *kind), right(later, LONGER, *kind),
                  right(later, LEARNT, *kind)]
print(f"{'per cent right':14}{'as it is':>13}{'trained on':>14}"
      f"{'on short texts':>18}")
print(" " * 14 + f"{'flag letter':>13}" + f"{'flag letter':>14}"
      + f"{'flag letter':>18}")
for name, row in rows.items():
    print(f"{name:14}" + "".join(f"{flag:{w}.0f}{letter:7.0f}" for w, (
        flag, letter) in zip((6, 7, 11), row, strict=True)))

before, after, short = zip(*rows.values(), strict=True)
assert before[0][0] < 40 and after[0][0] < 45 and after[0][1] > 90
assert before[1][0] > 95 and max(before[1][1], after[1][1]) < 20
assert 75 < before[2][0] < 90 < after[2][0] and after[2][1] > 97
assert 75 < short[2][0] < 95

# %% [markdown]
# RoPE left alone finds one flag in five, and after 50 steps one in four; its
# letters come back. Interpolation keeps the flags, which is to its credit,
# but the letter three back is gone and stays gone. YaRN, as it is, keeps
# every letter and five flags of six. After the 50 steps it has nineteen of
# twenty. And it is not for nothing: on short texts, where 97 % of the flags
# were right, it is now 85.

# %% [markdown] tags=["measured"]
# That was one seed. With seeds 1 to 4 YaRN does alike (82 to 89 % of the flags
# before the 50 steps, 93 to 97 % after), but RoPE as it is does not always
# guess: in seed 1 it kept 71 % of the letters.

# %% [markdown]
# So changed numbers are a good place to start from, and no more. This is how
# YaRN is meant: the card of its authors' Llama-2-70b-32k calls the model
# "further pretrained on long context data for 400 steps". On what lengths
# gpt-oss was trained is not published; `initial_context_length` is a key in a
# file, not a record of training.
#
# What to see: an open dot is the reader as it is, a full one after 50 steps.

# %% tags=["hide-input"]
# Figure: per cent right on long texts, before and after 50 more steps, as
# arrows. Flags: RoPE stays near guessing, interpolation near 100, YaRN rises
# from 84 to 95. Letters: interpolation stays at guessing, the others are or
# come near 100.
fig, axes = plt.subplots(1, 2, figsize=(7, 2.2), sharey=True)
for n, (ax, title) in enumerate(zip(axes, ("The latest flag", "The letter "
                                           "three back"), strict=True)):
    for y, (old, new, color) in enumerate(zip(before, after, (
            "C0", "C2", "C5"), strict=True)):
        ax.plot([old[n], new[n]], [y, y], color=color, lw=2)
        ax.plot(old[n], y, "o", mfc="white", color=color, ms=7)
        ax.plot(new[n], y, "o", color=color, ms=7)
    ax.axvline(100 / KINDS, color="k", lw=1, ls=":")
    ax.text(100 / KINDS + 1, -0.62, "guessing", fontsize=8)
    ax.set(title=title, xlim=(0, 103), ylim=(2.5, -0.9),
           xlabel="per cent right")
axes[0].set_yticks(range(3), list(kinds))
plt.show()

# %% [markdown]
# ## In the 20b and the 120b
#
# Both use the same list, in all layers, the sliding ones included, though
# no distance there exceeds 127. What to see: the 18 hands that go round in
# 4,096 tokens are the 18 that do so in 131,072, so YaRN shows no hand an
# angle it did not know; and the nine that go round within a window are
# those whose speed is kept.

# %%
parameters = [
    rope_parameters(config)
    for config in (GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b())
]
assert torch.equal(parameters[0][0], parameters[1][0])
assert parameters[0][1] == parameters[1][1]
in_all = POSITIONS * inv_freq.double() / (2 * math.pi)
print("pairs with a full turn in 4,096:", (turns >= 1).sum().item())
print("pairs with a full turn in 131,072:", (in_all >= 1).sum().item())
print("pairs with a full turn in 128:",
      (128 * inv_freq.double() >= 2 * math.pi).sum().item())
moved_end = (in_all[18:] - turns[18:]).abs() / turns[18:]
assert moved_end.max() < 1e-6
print(f"turns of pair 18: RoPE in 4,096 {turns[18]:.4f},",
      f"YaRN in 131,072 {in_all[18]:.4f}")

# %% [markdown]
# ## Cost
#
# A pair costs 4 multiplications and 2 additions, a head has $C/2$ pairs,
# so a token pays, in each layer, with $H$ query and $G$ key heads,
#
# $$
# 3\,C\,(H + G) \quad\text{FLOPs},
# $$ (rope-cost)
#
# and once for all layers $C/2$ angles, $C$ cosines and sines and $C$
# multiplications by the concentration. The projections that make the queries,
# keys and values cost $2 D (H + 2G) C$.

# %%
H, G, D = 64, 8, 2880
projections = 2 * D * (H + 2 * G) * C
print(f"a token and layer: {3 * C * (H + G):,} FLOPs,",
      f"{100 * 3 * C * (H + G) / projections:.2f} % of the projections")
print(f"tables of one token: {2 * C // 2 * 4} bytes in fp32;",
      f"of all positions: {POSITIONS * C * 4 / 1e6:.1f} MB, not kept")

# %% [markdown]
# ## Takeaways
#
# - YaRN changes a list of 32 speeds by how often each hand turned in 4,096
#   tokens: many turns, keep; less than one, slow by 32; a ramp between.
# - Changed speeds are where further training starts, not a substitute for
#   it. Our small reader needed 50 steps to read long texts well with YaRN's
#   speeds, and read short ones less well afterwards.
# - The ramp's ends are 8.09 and 17.40, **not** rounded; the concentration
#   1.3466 multiplies cos and sin, so scores are multiplied by 1.8133.
# - The fp32 list is part of the model. Angles in fp32 are good to a few
#   thousandths of a radian at the last position; the same in bf16 is noise.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# A model laid out for 4,096 tokens is to read twice as many (factor 2).
# Which pairs change, and what is a score multiplied by?

# %% tags=["hide-cell"]
twice_as_far = inverse_frequencies(C, THETA, 2.0)
differs = (twice_as_far / plain - 1).abs().gt(1e-6).nonzero().flatten()
print(f"pairs {differs.min().item()}..{differs.max().item()} change,",
      f"scores are multiplied by {concentration(2.0) ** 2:.3f}")
print("the range is that of factor 32: it does not depend on the factor")

# %% [markdown]
# ### Exercise 2
#
# Up to which position could this code go before fp32 positions collide,
# and how coarse is the angle of pair 0 just below it?

# %% tags=["hide-cell"]
end = 2**24
p = torch.tensor([end - 1, end, end + 1])
print("distinct:", p.to(torch.float32).unique().numel(), "of 3")
step = torch.finfo(torch.float32).eps * (end / 2)
print(f"step of the angle just below: {step:.0f} rad")
print("distinct rows:", rope_tables(p, inv_freq)[0].unique(dim=0).shape[0])

# %% [markdown]
# ### Exercise 3
#
# Does a softmax spread thinner over more keys, and does YaRN's factor undo
# it? One key fits, with a score of 8; the others have random scores of
# deviation 1. What does the fitting key get of 4,096 and of 131,072 keys,
# and what if all scores are multiplied by 1.8133?

# %% tags=["hide-cell"]
for keys in (TRAINED, POSITIONS):
    noise = torch.randn(40, keys)
    for factor in (1.0, conc ** 2):
        noise[:, 0] = 8.0
        share = (factor * noise).softmax(-1)[:, 0].mean()
        print(f"{keys:7,} keys, scores times {factor:.4f}: {share:.2f}")

# %% [markdown]
# ### Exercise 4
#
# In a sliding layer no distance exceeds 127. Which pairs have then gone
# round once, and how far does the slowest one turn, without YaRN and with?

# %% tags=["hide-cell"]
for name, s in (("RoPE", plain), ("YaRN", yarn)):
    round_once = (127 * s.double() >= 2 * math.pi).sum().item()
    degrees = math.degrees(127 * s[31].item())
    print(f"{name}: pairs 0 to {round_once - 1}; pair 31 turns by",
          f"{degrees:.4f} degrees")

# %% [markdown]
# ## Sources
#
# - RoPE: {cite}`rope2021`; YaRN, NTK by parts and the temperature:
#   {cite}`yarn2023`; the model: {cite}`gptoss2025`.
# - openai/gpt-oss, `gpt_oss/torch/model.py`: `RotaryEmbedding`.
# - huggingface/transformers 5.23: `_compute_yarn_parameters` and
#   `GptOssRotaryEmbedding`.
# - NousResearch/Yarn-Llama-2-70b-32k, its card: training after the change.
# - pytorch/torchtitan, `models/common/rope.py`: YaRN as one pure function.
