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
# # How is each key read only once?
#
# ## Question
#
# Eight query heads of the 20b share each key and value head, and every token
# of a prompt asks anew. How is each key read once for all of them, without a
# table of scores? For 4,096 tokens that table would have a billion entries
# in one layer; the kernel keeps 8 rows of 64 of them at a time.

# %%
import matplotlib.pyplot as plt
import numpy as np

plt.style.use("../_static/book.mplstyle")
H, T, ROWS, KEYS = 64, 4096, 8, 64
print(f"{H * T * T:,} scores of a layer = {H * T * T * 4 / 1e9:.1f} GB; at "
      f"hand {ROWS * KEYS} = {ROWS * KEYS * 4 // 1024} KiB")

# %% [markdown]
# ## Picture
#
# One row of attention: a query, sixteen keys, four at a time. A softmax needs
# the largest score and the sum of all before it can give any weight. We walk
# over the keys once and keep a *running* largest score $m$ and sum $z$; when a
# chunk brings a larger score, what was summed so far shrinks.

# %% tags=["hide-input"]
# Figure: above, sixteen scores as dots in four chunks, and the running largest
# as a staircase that starts at the sink. Below, the sum z as a line: it grows
# with each chunk, and drops, an arrow, where the staircase rises.
scores = np.array([0.2, 1.0, -0.5, 0.4, 1.3, 0.1, 2.6, 0.9,
                   1.8, 2.2, 0.3, 1.1, 0.6, 3.1, 2.0, 1.5])
m, z, sink = [1.2], [1.0], 1.2  # the sink: a score without a value
shrunk = []
for chunk in scores.reshape(4, 4):
    higher = max(m[-1], chunk.max())
    shrunk.append(z[-1] * np.exp(m[-1] - higher))
    z.append(shrunk[-1] + np.exp(chunk - higher).sum())
    m.append(higher)
fig, (above, below) = plt.subplots(2, 1, figsize=(7.0, 3.8), sharex=True)
above.plot(np.arange(16) + 0.5, scores, "o", color="C0")
above.step(np.arange(5) * 4, m[1:] + m[-1:], where="post", color="C5")
above.plot([-1.5, 0], [sink, sink], color="C3", lw=2.5)
above.text(-1.5, sink + 0.25, "sink", color="C3", fontsize=8)
above.text(16.2, m[-1], "largest\nso far, m", color="C5", fontsize=8,
           va="center")
above.text(16.2, 1.4, "scores", color="C0", fontsize=8)
for n in range(4):
    at = 4 * n
    below.plot([at, at + 4], [shrunk[n], z[n + 1]], color="C2")
    if z[n] - shrunk[n] > 0.05:
        below.annotate("", (at, shrunk[n]), (at, z[n]), arrowprops={
            "arrowstyle": "->", "color": "C5", "lw": 1.4})
    below.plot(at, z[n], "o", color="C2", ms=4)
below.plot(16, z[4], "o", color="C2", ms=4)
below.text(16.2, z[4], "sum z", color="C2", fontsize=8, va="center")
below.text(4.2, 2.9, "a higher m: the sum shrinks", color="C5", fontsize=8)
for ax in (above, below):
    ax.set_xticks(range(0, 17, 4))
    ax.set(xlim=(-1.8, 18.6))
    ax.grid(axis="y", visible=False)
above.set(ylabel="score", ylim=(-0.9, 3.6))
below.set(ylabel="sum so far", xlabel="keys, four at a time", ylim=(0, 4.6))
plt.show()
print("z at the end:", round(z[-1], 3), " at once:", round(float(
    np.exp(scores - max(m)).sum() + np.exp(sink - max(m))), 3))

# %% [markdown]
# What to see: the sink is no special case. It is where a row begins, with $m$
# = sink and $z = 1$, a key whose value is nothing. And each key is looked at
# once, in whatever order.
#
# ## The naive version
#
# All scores at once, in numpy: a table of T rows and S columns for every head,
# and each of the H/G heads that share a key reads it again.

# %%
def at_once(q, k, v, sink, scale):
    """q (T, C), k and v (S, C), all visible -> (T, C), by a whole table."""
    e = np.exp(scale * (q @ k.T))  # (T, S): the table
    return (e @ v) / (e.sum(-1, keepdims=True) + np.exp(sink))


draw = np.random.default_rng(0)
q, k, v = (draw.standard_normal(shape) for shape in (
    (64, 64), (200, 64), (200, 64)))
exact = at_once(q, k, v, 0.5, 1 / 8)
print("a table of", 64 * 200, "scores;", "output", exact.shape)

# %% [markdown]
# For short texts this is fine, and plain torch does it. It breaks in two ways.
# The table grows with the square of the text and goes out to memory and back.
# And $e^{s}$ overflows for a large score; the usual remedy, to subtract the
# largest first, needs another pass over the table.
#
# ## Derivation
#
# **A worked step.** So far: $m = 1$, $z = 2$, and the weighted values sum to
# $o = 3$. A key comes with score 2 and value 10. The largest is now 2, so what
# we have is too large by $e^{2-1}$: $z = 2 e^{-1} + 1$, $o = 3 e^{-1} + 10$.

# %%
m, z, o = 1.0, 2.0, 3.0
shrink = np.exp(1.0 - 2.0)
z, o, m = z * shrink + 1, o * shrink + 10, 2.0
print(f"shrink {shrink:.3f}, z {z:.3f}, o {o:.3f}, output {o / z:.3f}")

# %% [markdown]
# **In general.** For a row let $m$ be the largest score so far, $z$ the sum of
# $e^{s_i - m}$ and $o$ the sum of $e^{s_i - m} v_i$. A chunk whose largest
# score is $m'$ turns them, with $M = \max(m, m')$, into
#
# $$ z \leftarrow e^{m - M} z + \sum_i e^{s_i - M}, \qquad
#    o \leftarrow e^{m - M} o + \sum_i e^{s_i - M} v_i, \qquad
#    m \leftarrow M, $$ (kernels-running)
#
# and $o / z$ is the output: the running softmax of
# [sinks](../attention/sinks.ipynb) {cite}`flash2022`. A row starts from $m$ =
# sink, $z = 1$, $o = 0$. Here it is for many rows, 64 keys at a time, and this
# is the whole kernel:

# %%
def in_chunks(q, k, v, sink, scale, chunk=64):
    """As `at_once`, never more than `chunk` scores of a row at hand."""
    top = np.full(len(q), sink)  # m
    total, out = np.ones(len(q)), np.zeros(q.shape)  # z and o
    for s in range(0, len(k), chunk):
        scores = scale * (q @ k[s:s + chunk].T)  # each key once, all rows
        higher = np.maximum(top, scores.max(1))
        shrink = np.exp(top - higher)
        e = np.exp(scores - higher[:, None])
        total = total * shrink + e.sum(1)
        out = out * shrink[:, None] + e @ v[s:s + chunk]
        top = higher
    return out / total[:, None]


found = in_chunks(q, k, v, 0.5, 1 / 8)
print(f"{found[0, 0]:.6f} in chunks, {exact[0, 0]:.6f} at once")
assert np.allclose(found, exact)

# %% [markdown]
# **Which rows?** Nothing in it asks where a row comes from. The 8 query heads
# that share a key head, times 16 tokens, are 128 rows of one product: each
# key and value is loaded once for all of them.
#
# **Which power?** A processor makes powers of two: the whole part of $x$ goes
# into the exponent as it is, and a polynomial is needed for the rest, between
# -1/2 and 1/2, only. With $e^s = 2^{s \log_2 e}$ the factor is part of the
# scale that every score is multiplied by anyway. Six terms of
# $2^r = \sum_n (r \log 2)^n / n!$ and one more are enough:

# %%
from math import factorial, log

r = np.linspace(-0.5, 0.5, 1001)
for terms in (4, 5, 6, 7):
    found = sum((r * log(2)) ** n / factorial(n) for n in range(terms))
    print(f"{terms} terms: off by {np.abs(found / 2 ** r - 1).max():.0e}")

# %% [markdown]
# ## Code
#
# ### What does one piece of work remember?
#
# A piece of work is one key head, the H/G query heads that it serves, and as
# many tokens as make 128 rows, 16 in the 20b. `Attention` is its state: $m$ is
# `top`, $z$ `total` (a sum for each lane of a register, added up at the very
# end), $o$ `out`. Rows pass a chunk in groups of eight, which in the 20b are
# the heads of one token, so `scores` are 8 by 64. A `Sight` knows which
# positions its rows see: some row, those from `oldest` to `newest`; all of
# them, those from `from` to `to`.

# %% [markdown] tags=["export:running.h"]
# ```cpp
# namespace {
#
# #ifdef GPTOSS_AVX512
# using Lanes = float __attribute__((vector_size(64)));
# using Places = int32_t __attribute__((vector_size(64)));
# #else
# using Lanes = Floats;
# using Places = Ints;
# #endif
#
# #ifndef GPTOSS_BF16
# using Query = float;
# using Key = float;
# using Value = float;
# #endif
#
# constexpr int64_t ABREAST = sizeof(Lanes) / sizeof(float);
# constexpr int64_t KEYS = 64, WIDEST = 256;  // keys at a time; largest head
# constexpr int64_t AT_ONCE = 8;  // rows of a group
#
# // a function of its own: where `this` is one of each thread, the compiler
# // would ask for its address again in every loop
# #define APART __attribute__((noinline))
#
# struct Span {  // of the positions of sixteen keys, -1 if one is empty
#   int32_t low, high;
# };
#
# struct Sight {  // of a group
#   int32_t oldest, newest, from, to;
#   bool sees(Span s) const { return s.high >= oldest && s.low <= newest; }
#   bool sees_all(Span s) const { return s.low >= from && s.high <= to; }
# };
#
# struct Attention {  // one key head, the query heads and tokens it serves
#   int64_t C, rows;
#   float scale;
#   std::vector<Query> q;              // (rows, C)
#   Buffer out, top, total;            // (rows, C), (rows,), (rows, ABREAST)
#   std::vector<int32_t> first, last;  // positions that each row sees
#   std::vector<Sight> groups;
#   alignas(64) float scores[AT_ONCE * KEYS];
#   alignas(64) Key keys[KEYS * WIDEST];  // sixteen after sixteen, as columns
# #ifndef GPTOSS_BF16
#   alignas(64) Value values[KEYS * WIDEST];
# #endif
#
#   void resize(int64_t size, int64_t count) {
#     C = size, rows = count;
#     q.resize(rows * C);
#     out.assign(rows * C, 0);
#     top.resize(rows);
#     total.assign(rows * ABREAST, 0);
#     first.resize(rows), last.resize(rows);
#   }
#
#   void group();
#   void prepare(const Number* k, const Number* v, int64_t stride, int64_t s,
#                int64_t some);
#   void chunk(const Number* k, const Number* v, int64_t stride,
#              int64_t count, const int32_t* at, const Span* spans);
#   void weigh(int64_t r, const int32_t* at, int64_t begin, int64_t end);
# };
#
# void Attention::group() {
#   groups.clear();
#   for (int64_t r = 0; r < rows; ++r) {
#     if (r % AT_ONCE == 0) groups.push_back({first[r], last[r], 0, last[r]});
#     Sight& to = groups.back();
#     to.oldest = std::min(to.oldest, first[r]);
#     to.newest = std::max(to.newest, last[r]);
#     to.from = std::max(to.from, first[r]);
#     to.to = std::min(to.to, last[r]);
#   }
# }
# ```

# %% [markdown]
# `weigh` is {eq}`kernels-running` for one row, eight or sixteen keys at a
# time, in powers of two. A key counts if its position is not after the
# query's and not before the window; `at` is null where every key counts,
# which in a long text is nearly everywhere. And only a chunk that brings a
# higher score shrinks anything: in a long text, hardly any.

# %% [markdown] tags=["export:running.h"]
# ```cpp
# // 2 ** x for x <= 126, relative error below 1e-6; 0 for x < -126
# inline Lanes power_of_two(Lanes x) {
#   const Lanes shifted = x + 12582912.0f;
#   const Lanes r = x - (shifted - 12582912.0f);  // x less the nearest whole
#   Lanes p = r * 1.540353e-4f + 1.3333558e-3f;   // log(2) ** n / n!
#   for (float factor : {9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f,
#                        6.9314718e-1f, 1.0f})
#     p = p * r + factor;
#   const Places power = ((Places)shifted - 0x4b400000) << 23;
#   return x < -126.0f ? Lanes{} : (Lanes)((Places)p + power);
# }
#
# inline float largest(Floats v) {
#   Floats other = __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
#   v = v > other ? v : other;
#   other = __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
#   v = v > other ? v : other;
#   return std::max(v[0], v[1]);
# }
#
# #ifdef GPTOSS_AVX512
# inline float largest(Lanes v) {
#   Floats half[2];
#   std::memcpy(half, &v, sizeof v);
#   return largest(half[0] > half[1] ? half[0] : half[1]);
# }
# #endif
#
# // scores of row r, keys begin ... end - 1 of the chunk -> weights
# APART void Attention::weigh(int64_t r, const int32_t* at, int64_t begin,
#                             int64_t end) {
#   const float none = -std::numeric_limits<float>::infinity();
#   const float scale = this->scale;  // locals: no store below can change them
#   const int32_t first = this->first[r], last = this->last[r];
#   float* const e = scores + r % AT_ONCE * KEYS;
#   Lanes high = Lanes{} + top[r], sums = load<Lanes>(&total[r * ABREAST]);
#   for (int64_t s = begin; s < end; s += ABREAST) {
#     Lanes value = scale * load<Lanes>(e + s);
#     if (at) {
#       const Places p = load<Places>(at + s);
#       value = (p >= first) & (p <= last) ? value : Lanes{} + none;
#     }
#     high = value > high ? value : high;
#     std::memcpy(e + s, &value, sizeof value);
#   }
#   const float higher = largest(high);
#   if (higher > top[r]) {
#     const float shrink = std::exp2(top[r] - higher);
#     for (int64_t c = 0; c < C; ++c) out[r * C + c] *= shrink;
#     sums *= shrink;
#     top[r] = higher;
#   }
#   for (int64_t s = begin; s < end; s += ABREAST) {
#     const Lanes value = power_of_two(load<Lanes>(e + s) - higher);
#     std::memcpy(e + s, &value, sizeof value);
#     sums += value;
#   }
#   std::memcpy(&total[r * ABREAST], &sums, sizeof sums);
# }
# ```

# %% [markdown]
# ### How does a chunk pass?
#
# Scores, weights, weighted values: the three lines of the loop in `in_chunks`.
# Keys have to be transposed for the product of tiles of [dense](dense.ipynb),
# sixteen at a time as columns (`key_tile`); values already lie as theirs wants
# them. Both are made ready once, when the first group asks for them. And they
# are asked of memory a chunk ahead: a processor guesses what is read next, but
# two streams that are looked at in turns are read half as fast by guessing.
#
# Where a processor multiplies bf16 as it is, keys stay in pairs and values
# stay where they are, in the [appendix](../cli/wide.ipynb). The product of
# weights and values is in fp32 everywhere, as rounded to bf16 the weights
# would lose what the sum keeps.

# %% [markdown] tags=["export:running.h"]
# ```cpp
# #ifndef GPTOSS_BF16
# void key_tile(const Number* k, int64_t stride, int64_t rows, int64_t C,
#               Key* to) {
#   widen_tile(k, stride, rows, C, to);
# }
#
# void score(const Key* keys, const Number*, int64_t C, const Query* q,
#            int64_t rows, Target out) {
#   for (int64_t r = 0; r < rows; ++r)
#     std::fill_n(out.at + r * out.stride, ROWS, 0.0f);
#   multiply(keys, ROWS, C, {q, C}, rows, out);
# }
#
# void mix(const Value* v, int64_t stride, int64_t count, Source weights,
#          int64_t rows, int64_t C, float* out) {
#   for (int64_t c = 0; c < C; c += ROWS)
#     multiply(v + c, stride, count, weights, rows, {out + c, C});
# }
# #endif
#
# // makes keys s ... s + some - 1 of a chunk ready, at most sixteen
# void Attention::prepare(const Number* k, const Number* v, int64_t stride,
#                         int64_t s, int64_t some) {
#   key_tile(k + s * stride, stride, some, C, keys + s * C);
# #ifndef GPTOSS_BF16
#   const int64_t C = this->C;  // a local: no store below can change it
#   for (const int64_t end = s + some; s < end; ++s)
#     for (int64_t c = 0; c < C; c += 8) {
#       if (c % 32 == 0) {
#         __builtin_prefetch(k + (s + KEYS) * stride + c);
#         __builtin_prefetch(v + (s + KEYS) * stride + c);
#       }
#       store(values + s * C + c, widen(v + s * stride + c));
#     }
# #endif
# }
#
# APART void Attention::chunk(const Number* k, const Number* v, int64_t stride,
#                             int64_t count, const int32_t* at,
#                             const Span* spans) {
#   bool ready[KEYS / ROWS] = {};
#   for (int64_t r = 0; r < rows; r += AT_ONCE) {
#     const Sight& group = groups[r / AT_ONCE];
#     int64_t begin = KEYS / ROWS, end = 0;  // tiles that this group sees
#     for (int64_t t = 0; t < KEYS / ROWS; ++t)
#       if (group.sees(spans[t])) begin = std::min(begin, t), end = t + 1;
#     if (begin >= end) continue;
#     const int64_t some = std::min(AT_ONCE, rows - r);
#     bool all = true;
#     for (int64_t t = begin; t < end; ++t) {
#       const int64_t s = t * ROWS;
#       all &= group.sees_all(spans[t]);
#       if (!ready[t]) prepare(k, v, stride, s, std::min(ROWS, count - s));
#       ready[t] = true;
#       score(keys + s * C, k + (s + KEYS) * stride, C, &q[r * C], some,
#             {scores + s, KEYS});
#     }
#     begin *= ROWS, end *= ROWS;
#     for (int64_t i = r; i < r + some; ++i)
#       weigh(i, all ? nullptr : at, begin, end);
#     const int64_t used = std::min(end, count) - begin;
#     const Source weights = {scores + begin, KEYS};
# #ifdef GPTOSS_BF16
#     mix(v + begin * stride, stride, used, weights, some, C, &out[r * C]);
# #else
#     mix(values + begin * C, C, used, weights, some, C, &out[r * C]);
# #endif
#   }
# }
#
# }  // namespace
# ```

# %% [markdown]
# ### Which keys need not be looked at?
#
# Keys may lie in any order, as a ring leaves them, since visibility is decided
# by positions alone; -1 is an empty slot. `Seen` looks at them once for all
# heads: the lowest and the highest position of each sixteen, a `Span`. A chunk
# whose spans no row sees is skipped, and of the others a group takes the tiles
# from the first to the last that it sees. So prefill does half the work in
# full layers, and in sliding ones the window's: 128 keys that begin anywhere
# lie in at most nine tiles of sixteen.

# %% [markdown] tags=["export:attention.h"]
# ```cpp
# namespace {
#
# struct Seen {  // where the keys stand, whole chunks, -1 = empty
#   int64_t slots;  // of a batch row
#   std::vector<int32_t> at;   // (B, slots)
#   std::vector<Span> spans;   // (B, slots / 16)
#
#   explicit Seen(const Tensor& k_pos) {  // (B, S)
#     const int64_t B = k_pos.size(0), S = k_pos.size(1);
#     const int64_t* from = k_pos.const_data_ptr<int64_t>();
#     slots = (S + KEYS - 1) / KEYS * KEYS;
#     at.resize(B * slots), spans.resize(B * slots / ROWS);
#     at::parallel_for(0, spans.size(), 1024, [&](int64_t t, int64_t end) {
#       for (; t < end; ++t) {
#         const int64_t b = t * ROWS / slots, s = t * ROWS % slots;
#         Span span{std::numeric_limits<int32_t>::max(), -1};
#         for (int64_t i = 0; i < ROWS; ++i) {
#           const int64_t p = s + i < S ? from[b * S + s + i] : -1;
#           const int32_t place = p < 0 ? -1 : int32_t(p);
#           at[b * slots + s + i] = place;
#           span.low = std::min(span.low, place);
#           span.high = std::max(span.high, place);
#         }
#         spans[t] = span;
#       }
#     });
#   }
# };
# ```

# %% [markdown]
# ### What if there is one token only?
#
# In decode there are G pieces of work, eight in the 20b, however long the text
# is; a machine with more cores would idle. So the keys are cut into ranges of
# 512 (of more in a long text, so that there are never more than 32), each a
# piece of work of its own, and the results of the ranges are merged by
# {eq}`kernels-running` once more, with the state of a range in place of a
# chunk. Only the first range begins with the sink; the others begin with
# nothing, the lowest number there is and a sum of 0. `place` says where a row
# of a piece lies in the operator's result.

# %% [markdown] tags=["export:attention.h"]
# ```cpp
# struct Result {  // for each row (B, T, H): y, or what each range gives
#   Number* y;
#   Buffer out, top, total;  // (ranges, rows, C) and (ranges, rows)
#
#   // row r of a, as row `at` of all
#   void take(const Attention& a, int64_t r, int64_t at) {
#     const float* from = &a.out[r * a.C];
#     float sum = 0;
#     for (int64_t i = 0; i < ABREAST; ++i) sum += a.total[r * ABREAST + i];
#     if (top.empty()) {
#       for (int64_t c = 0; c < a.C; c += 8)
#         narrow(load<Floats>(from + c) / sum, y + at * a.C + c);
#     } else {
#       std::copy_n(from, a.C, &out[at * a.C]);
#       top[at] = a.top[r], total[at] = sum;
#     }
#   }
#
#   void merge(int64_t ranges, int64_t rows, int64_t C) {
#     at::parallel_for(0, rows, 16, [&](int64_t r, int64_t end) {
#       for (; r < end; ++r) {
#         float most = top[r], sum = 0;
#         for (int64_t i = 1; i < ranges; ++i)
#           most = std::max(most, top[i * rows + r]);
#         float mixed[WIDEST] = {};
#         for (int64_t at = r; at < ranges * rows; at += rows) {
#           const float weight = std::exp2(top[at] - most);
#           sum += weight * total[at];
#           for (int64_t c = 0; c < C; ++c)
#             mixed[c] += weight * out[at * C + c];
#         }
#         for (int64_t c = 0; c < C; ++c) y[r * C + c] = mixed[c] / sum;
#       }
#     });
#   }
# };
#
# struct Heads {  // the operator's arguments, read from inside the threads
#   Tensor q, k, v, sinks, q_pos;
#   Seen seen;
#   int64_t window;
#   float scale;
#
#   // keys s0 ... s1 - 1 for tokens t0 ... t1 - 1 of batch row b, key head g;
#   // row 0 of the batch is row `base` of the result
#   void run(Attention& a, int64_t b, int64_t g, int64_t t0, int64_t t1,
#            int64_t s0, int64_t s1, int64_t base, Result& to) const {
#     constexpr float LOG2E = 1.44269504f, MOST =
#         std::numeric_limits<float>::max();
#     const int64_t T = q.size(1), H = q.size(2), J = H / k.size(2);
#     const int64_t* position = q_pos.const_data_ptr<int64_t>() + b * T;
#     a.resize(q.size(3), (t1 - t0) * J);
#     a.scale = scale * LOG2E;
#     auto place = [&](int64_t r) {  // of row r among (B, T, H)
#       return (b * T + t0 + r / J) * H + g * J + r % J;
#     };
#     for (int64_t r = 0; r < a.rows; ++r) {
#       const Number* from = numbers(q) + place(r) * a.C;
#       std::copy_n(from, a.C, &a.q[r * a.C]);
#       const int64_t last = a.last[r] = int32_t(position[t0 + r / J]);
#       a.first[r] = window ? std::max<int64_t>(0, last - window + 1) : 0;
#       const float sink = numbers(sinks)[g * J + r % J];
#       a.top[r] = s0 ? -MOST : std::clamp(LOG2E * sink, -MOST, MOST);
#       a.total[r * ABREAST] =  // the sink, before any key; infinite: NaN
#           s0 ? 0 : sink > MOST ? sink - sink : 1;
#     }
#     a.group();
#     attend(a, b, g, s0, s1);
#     for (int64_t r = 0; r < a.rows; ++r) to.take(a, r, base + place(r));
#   }
#
#   void attend(Attention& a, int64_t b, int64_t g, int64_t s0,
#               int64_t s1) const {
#     Sight rows = a.groups[0];
#     for (const Sight& group : a.groups) {
#       rows.oldest = std::min(rows.oldest, group.oldest);
#       rows.newest = std::max(rows.newest, group.newest);
#     }
#     const int64_t row = k.stride(1);
#     for (; s0 < s1; s0 += KEYS) {
#       const int64_t slot = b * seen.slots + s0;
#       const Span* spans = &seen.spans[slot / ROWS];
#       bool any = false;
#       for (int64_t t = 0; t < KEYS / ROWS; ++t) any |= rows.sees(spans[t]);
#       const int64_t at = b * k.stride(0) + s0 * row + g * k.stride(2);
#       if (any)
#         a.chunk(numbers(k) + at, numbers(v) + at, row,
#                 std::min(KEYS, s1 - s0), &seen.at[slot], spans);
#     }
#   }
# };
#
# Tensor run_attention(const Heads& heads) {
#   const Tensor& q = heads.q;
#   const int64_t T = q.size(1), H = q.size(2), C = q.size(3);
#   const int64_t S = heads.k.size(1), G = heads.k.size(2);
#   const int64_t some = std::max<int64_t>(1, 2 * KEYS * G / H);
#   const int64_t tiles = (T + some - 1) / some, rows = q.size(0) * T * H;
#   int64_t width = 512;  // keys of a range; no matter how many threads
#   while (32 * width < S) width *= 2;
#   if (tiles > 1) width = std::max<int64_t>(S, 1);
#   const int64_t ranges = std::max<int64_t>(1, (S + width - 1) / width);
#   Tensor y = at::empty(q.sizes(), q.options());
#   Result result{static_cast<Number*>(y.data_ptr()), {}, {}, {}};
#   const int64_t kept = ranges > 1 ? ranges * rows : 0;
#   result.out.resize(kept * C);
#   result.top.resize(kept), result.total.resize(kept);
#   const int64_t pieces = q.size(0) * G * tiles;
#   share(ranges * pieces, 1, [&](int64_t item) {
#     thread_local Attention a;
#     const int64_t range = item % ranges, piece = item / ranges;
#     const int64_t t0 = (tiles - 1 - piece % tiles) * some;  // longest first
#     heads.run(a, piece / tiles / G, piece / tiles % G, t0,
#               std::min(t0 + some, T), range * width,
#               std::min((range + 1) * width, S), range * rows, result);
#   });
#   if (ranges > 1) result.merge(ranges, rows, C);
#   return y;
# }
# ```

# %% [markdown]
# ### The operator, and what is refused
#
# A RuntimeError names q, k and v if they have not four dimensions, or a head
# of q another size than one of k, or the window is negative. What fits none of
# the kernel's sizes (a head that is no multiple of 16 or larger than 256, H no
# multiple of G, positions of another shape) goes to plain torch.

# %% [markdown] tags=["export:attention.h"]
# ```cpp
# Tensor sink_attention(const Tensor& q, const Tensor& k, const Tensor& v,
#                       const Tensor& sinks, const Tensor& q_pos,
#                       const Tensor& k_pos, int64_t window, double scale) {
#   TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4
#                   && k.size(3) == q.size(3) && window >= 0,
#               "sink_attention: expected q (B, T, H, C), k and v "
#               "(B, S, G, C), window >= 0, found q ", q.sizes(), ", k ",
#               k.sizes(), ", v ", v.sizes(), ", window ", window);
#   const int64_t B = q.size(0), T = q.size(1), H = q.size(2), C = q.size(3);
#   const int64_t S = k.size(1), G = k.size(2);
#   auto fits = [](const Tensor& pos, int64_t rows, int64_t columns) {
#     return pos.dim() == 2 && (pos.size(0) == rows || pos.size(0) == 1)
#         && pos.size(1) == columns;
#   };
#   if (!ours({q, k, v, sinks}) || !whole({q_pos, k_pos}) || !q.numel() || !G
#       || C % ROWS || C > WIDEST || H % G || k.size(0) != B
#       || k.sizes() != v.sizes() || !has(sinks, {H}) || !fits(q_pos, B, T)
#       || !fits(k_pos, B, S) || k.stride(3) != 1
#       || k.strides() != v.strides())
#     return plain<decltype(sink_attention)>("sink_attention", q, k, v, sinks,
#                                            q_pos, k_pos, window, scale);
#   return run_attention({q.contiguous(), k, v, sinks.contiguous(),
#                         q_pos.expand({B, -1}).contiguous(),
#                         Seen(k_pos.expand({B, -1}).contiguous()), window,
#                         float(scale)});
# }
#
# TORCH_LIBRARY_IMPL(gptoss, CPU, m) {
#   m.impl("sink_attention", sink_attention);
# }
#
# }  // namespace
# ```

# %% [markdown]
# ## It holds
#
# Over a ring in any order, with padding, with and without a window, and rows
# that see nothing: the kernel and plain torch, both in bf16, against a twin in
# numpy that makes the whole table of scores in float64. (Without a compiler
# the twin stands in for the kernel, rounded to bf16 once.)

# %%
import torch

import gptoss.model.ops  # noqa: F401  declares the operators
from gptoss.kernels.build import load_upto, plain_torch
from gptoss.model.ops import has_kernel

load_upto("attention")


def twin(q, k, v, sinks, q_pos, k_pos, window, scale):
    """All scores at once; q (T, H, C), k and v (S, G, C) -> (T, H, C)."""
    share = q.shape[1] // k.shape[1]
    score = scale * np.einsum("thc,shc->hts", q, k.repeat(share, 1))
    seen = (k_pos >= 0) & (k_pos <= q_pos[:, None])
    if window:
        seen &= k_pos > q_pos[:, None] - window
    e = np.exp(np.where(seen, score, -np.inf))
    total = e.sum(-1, keepdims=True) + np.exp(sinks)[:, None, None]
    return np.einsum("hts,shc->thc", e / total, v.repeat(share, 1))


def off(y, exact) -> float:
    y = y.double().numpy()
    return np.linalg.norm(y - exact) / np.linalg.norm(exact)


torch.manual_seed(0)
for window in (0, 9):
    for T, S in ((1, 200), (1, 1300), (70, 70)):
        q_pos, mixed = torch.arange(S - T, S), torch.randperm(S)
        q_pos[0] = -1 if T > 1 else S - 1
        k_pos = mixed.where(mixed % 7 != 0, -1)
        tensors = [torch.randn(n, heads, 64).bfloat16()
                   for n, heads in ((T, 8), (S, 2), (S, 2))]
        tensors.append(torch.randn(8).bfloat16())
        exact = twin(*(x.double().numpy() for x in tensors), q_pos.numpy(),
                     k_pos.numpy(), window, 0.125)
        given = (*(x[None] for x in tensors[:3]), tensors[3], q_pos[None],
                 k_pos[None], window, 0.125)
        with torch.inference_mode():
            fast = torch.ops.gptoss.sink_attention(*given)[0]
            with plain_torch():
                slow = torch.ops.gptoss.sink_attention(*given)[0]
        if not has_kernel("sink_attention"):
            fast = torch.from_numpy(exact).bfloat16()
        print(f"window {window}, {T:2} of {S:4}: kernel "
              f"{off(fast, exact):.4f}, plain torch {off(slow, exact):.4f}")
        assert off(fast, exact) < 1.02 * off(slow, exact) < 3e-3
        if T > 1:  # the first row sees no key
            assert not fast[0].any() and not slow[0].any()

# %% [markdown]
# ## In the 20b and the 120b
#
# Both have 64 query heads, 8 key heads and heads of 64 numbers. What one token
# reads of keys and values in a full layer, once and if every query head read
# for itself:

# %%
for length in (1024, 8192, 131072):
    once = length * 2 * 8 * 64 * 2
    print(f"{length:6,} keys: {once / 1e6:6.1f} MB once, "
          f"{8 * once / 1e6:7.1f} if all heads read for themselves")

# %% [markdown]
# ## Takeaways
#
# - A running maximum and sum make a softmax of any length out of chunks, so no
#   table of scores is ever in memory.
# - All query heads that share a key are rows of one product: each key is read
#   once.
# - A sink costs nothing: it is the state that a row starts from.
# - One token has too few rows for all threads, so its keys are cut into
#   ranges, whose results are merged by the same rule.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# The attention kernel starts a row with maximum = sink, sum = 1, output = 0.
# Show on numbers that this is `softmax_with_sink` of
# [sinks](../attention/sinks.ipynb).

# %% tags=["hide-cell"]
from gptoss.attention.sinks import softmax_with_sink

scores, sink = torch.randn(5).double(), torch.randn(1).double()
top, total, out = sink, torch.ones(1).double(), torch.zeros(1).double()
value = torch.randn(5).double()
for s, v in zip(scores, value, strict=True):
    higher = torch.maximum(top, s)
    shrink, e = (top - higher).exp(), (s - higher).exp()
    total, out, top = total * shrink + e, out * shrink + e * v, higher
whole = softmax_with_sink(scores[None, None], sink)[0, 0] @ value
assert torch.allclose(out / total, whole)
print(f"{(out / total).item():.4f} and {whole.item():.4f}")

# %% [markdown]
# ### Exercise 2
#
# Merge two ranges of keys by hand: give `state` each half of the keys. The
# second half must not count the sink again. What does it start from?

# %% tags=["hide-cell"]
def state(q, k, v, top, total):
    """Maximum, sum and output of a row over these keys, from a start."""
    scores = k @ q / 8
    higher = max(top, scores.max())
    e = np.exp(scores - higher)
    return higher, total * np.exp(top - higher) + e.sum(), e @ v


q, k, v = (draw.standard_normal(shape) for shape in (64, (200, 64), (200, 64)))
parts = [state(q, k[:100], v[:100], 0.5, 1), state(q, k[100:], v[100:],
                                                   -1e30, 0)]
top = max(part[0] for part in parts)
share = [np.exp(part[0] - top) for part in parts]
merged = (sum(w * part[2] for w, part in zip(share, parts, strict=True))
          / sum(w * part[1] for w, part in zip(share, parts, strict=True)))
whole = in_chunks(q[None], k, v, 0.5, 1 / 8)[0]
print(f"{merged[0]:.6f} merged, {whole[0]:.6f} whole: from nothing, the "
      "lowest number there is and a sum of 0")
assert np.allclose(merged, whole)

# %% [markdown]
# ### Exercise 3
#
# A prompt of 4,096 tokens: of how many chunks of 64 keys does a piece of work
# (8 tokens) need a score, in a full layer and in a sliding one of 128? Count,
# and compare with all chunks.

# %% tags=["hide-cell"]
pieces, chunks = range(0, 4096, 8), 4096 // 64
for name, window in (("full", 4096), ("sliding", 128)):
    needed = sum((t + 7) // 64 - max(0, t - window + 1) // 64 + 1
                 for t in pieces)
    print(f"{name:7} {needed:6,} of {chunks * len(pieces):,} chunks, "
          f"{needed / chunks / len(pieces):.0%}")

# %% [markdown]
# ## Sources
#
# - Tiles of attention with a running maximum: {cite}`flash2022`; sinks:
#   {cite}`sinks2023`; grouped heads: {cite}`gqa2023`.
