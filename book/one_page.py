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
#     module: one_page
# ---

# %% [markdown] tags=["given"]
# # What happens between the bytes and the next word?
#
# ## Question
#
# The published files of gpt-oss-20b hold 13,761,264,768 bytes of tensors.
# There is no program among them: they are tables of numbers, and a text file
# of settings. What has to be done with these numbers to get from a text to
# its next word?
#
# Less than one would think. On this page stands the whole model, in fewer
# than a hundred lines of plain torch. We run it, look at what each function
# does, and then swap functions one by one, to see what breaks.
#
# ## Picture
#
# Those 13 GB are not needed to see it. The package ships a small gpt-oss of
# the same construction, trained on stories and short conversations; we call
# it the pocket model. It has read and written a few sentences of a story, and
# now it has to name something that the story has named before:

# %% tags=["hide-input", "picture"]
# Figure: a story's words along the bottom. A row for each of four layers: a
# map of how strongly eight heads look at each word, dark in single cells;
# which two of eight experts answer; the three best guesses for the next word,
# vague after the first layer and certain after the last.
import matplotlib.pyplot as plt
import torch

from gptoss import one_page as page

plt.style.use("_static/book.mplstyle")

config, w = page.read(page.POCKET)
ids = page.generate(page.text_to_ids(page.SENTENCE, page.POCKET), w, config,
                    42)
words = [page.ids_to_text([token], page.POCKET) for token in ids]
T = max(t for t in range(20, len(ids))  # the last noun that was there before
        if len(words[t]) > 4 and words[t - 1] == " the"
        and ids[t] in ids[:t - 3])
answer, ids, words = words[T], torch.tensor(ids[:T]), words[:T]
looks, chosen, streams = [], [], []
attention, route, block = page.attention, page.route, page.block


def watch_attention(q, k, v, sinks, window):
    one_hot = torch.eye(T)[:, None].expand(T, k.shape[1], T)
    looks.append(attention(q, k, one_hot, sinks, window)[-1])  # (H, T)
    return attention(q, k, v, sinks, window)


def watch_route(logits, k):
    weights, experts = route(logits, k)
    chosen.append(torch.zeros(logits.shape[-1]).scatter(0, experts[-1],
                                                        weights[-1]))
    return weights, experts


def watch_block(*given):
    streams.append(block(*given))
    return streams[-1]


page.attention, page.route, page.block = (watch_attention, watch_route,
                                          watch_block)
page.forward(ids, w, config)
page.attention, page.route, page.block = attention, route, block

fig, axes = plt.subplots(len(streams), 3, figsize=(8.2, 5.0), sharex="col",
                         width_ratios=(9, 1.6, 1.9))
for layer, (left, middle, right) in enumerate(axes):
    left.imshow(looks[layer], cmap="Blues", vmin=0, vmax=1, aspect="auto")
    left.set(yticks=(0, 7), ylabel=f"layer {layer}\nhead")
    middle.bar(range(len(chosen[layer])), chosen[layer], color="C2")
    middle.set(ylim=(0, 1), yticks=(0, 1), xlim=(-0.7, 7.7))
    last = page.rms_norm(streams[layer][-1], w["model.norm.weight"])
    best = (last @ w["lm_head.weight"].T).softmax(0).topk(3)
    right.barh((2, 1, 0), best.values, color="C1", height=0.7)
    right.set(xlim=(0, 1), yticks=(2, 1, 0), xticks=(0, 1))
    right.set_yticklabels([page.ids_to_text([token], page.POCKET).strip()
                           or "·" for token in best.indices.tolist()])
    for ax in (left, middle, right):
        ax.grid(False)
        ax.tick_params(length=2)
for ax, title in zip(axes[0], ("where the last word looks", "experts",
                               "best guesses"), strict=True):
    ax.set_title(title, fontsize=9)
axes[-1, 0].set_xticks(range(T), [word.strip() or "·" for word in words],
                       rotation=90, fontsize=7)
axes[-1, 1].set_xticks((0, 7))
plt.show()
print("read:", "".join(words[-8:]), "  next:", answer)

# %% [markdown]
# What to see: everything here concerns the last word that was read. In each of
# the four layers eight *heads* look back over the words before it (blue, a
# row a head; · is a blank before a name), then two of eight *experts* work on
# what was found (green, how much each counts). After every layer we can ask
# what the next word would be if we stopped there (orange). After the first
# the guesses are poor. Then some head finds the word that the story has
# already used, and the last layer is certain.
#
# ## The whole model
#
# Read it once from top to bottom, and do not worry about what is strange.
# Each function is taken up below, and a chapter later. A comment gives the
# shape of a result. The letters are those of the whole
# [book](notation.md): T tokens, D numbers for each of them, H query heads and
# G key heads of C numbers, E experts of which K are used, V words to choose
# from.

# %% tags=["export"]
import json
import math
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import FunctionType

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

POCKET = Path(str(files("gptoss"))) / "pocket"  # or any released checkpoint
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6,
                    -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Weights = dict[str, Tensor]


def read(folder: Path) -> tuple[dict, Weights]:
    """The settings, and all tensors by name: uint8 as they are, or fp32."""
    w: Weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, x in load_file(file).items():
            w[name] = x if x.dtype == torch.uint8 else x.float()
    return json.loads((folder / "config.json").read_text("utf-8")), w


def part(w: Weights, prefix: str) -> Weights:
    """The tensors whose names begin with prefix, by the rest of the name."""
    return {name.removeprefix(prefix): x for name, x in w.items()
            if name.startswith(prefix)}


def decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """Four bits a weight: (..., N, 16) and (..., N) bytes -> (..., 32 N)."""
    pairs = torch.stack([FP4[blocks.int() & 15], FP4[blocks.int() >> 4]], -1)
    power = scales.int()[..., None] - 127
    return torch.ldexp(pairs.flatten(-2), power).flatten(-2)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    """Every output is a weighted sum of all inputs, and a bias."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def rms_norm(x: Tensor, scale: Tensor, eps: float = 1e-5) -> Tensor:
    """Vectors (..., D) of size one (root mean square), times scale (D,)."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * scale


def rope_tables(positions: Tensor, config: dict) -> tuple[Tensor, Tensor]:
    """cos and sin (T, C/2) of the angle of each position and pair."""
    C, theta = config["head_dim"], config["rope_theta"]
    yarn, pair = config["rope_scaling"], torch.arange(C // 2)
    speed = 1 / theta ** (2 * pair / C)  # radians a token
    turns = yarn["original_max_position_embeddings"] / (2 * math.pi)
    low, high = (C * math.log(turns / yarn[beta]) / (2 * math.log(theta))
                 for beta in ("beta_fast", "beta_slow"))
    slow = ((pair - low) / (high - low)).clamp(0, 1)
    speed = speed * (1 - slow) + speed / yarn["factor"] * slow
    angle, grow = positions[:, None] * speed, 0.1 * math.log(yarn["factor"])
    return angle.cos() * (grow + 1), angle.sin() * (grow + 1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + C/2) of x (T, H, C) by their angles."""
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def visible(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """(T, S) bool: not in the future, not further back than the window."""
    ago = q_pos[:, None] - k_pos
    return (ago >= 0) & (ago < (window or len(k_pos)))


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor,
              window: int | None) -> Tensor:
    """q (T, H, C), k and v (T, G, C), sinks (H,) -> (T, H, C)."""
    T, H, C = q.shape
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thc,shc->hts", q, k) / C ** 0.5
    seen = visible(torch.arange(T), torch.arange(T), window)
    scores = scores.masked_fill(~seen, -math.inf)
    sink = sinks[:, None, None].expand(H, T, 1)
    shares = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
    return torch.einsum("hts,shc->thc", shares, v)


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(T, E) -> weights (T, K) that sum to one, experts (T, K)."""
    top, ids = logits.topk(k)
    return top.softmax(-1), ids


def swiglu(gate_up: Tensor, limit: float = 7.0) -> Tensor:
    """(..., 2F), gate and up in turns -> (..., F)."""
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def experts(x: Tensor, ids: Tensor, weights: Tensor, w: Weights, limit: float
            ) -> Tensor:
    """x (T, D) through the chosen experts, ids and weights (T, K)."""
    def times(x: Tensor, e: int, name: str) -> Tensor:
        matrix = decode(w[f"{name}_blocks"][e], w[f"{name}_scales"][e])
        return x @ matrix.to(x.dtype).T + w[f"{name}_bias"][e]

    y = torch.zeros_like(x)
    for e in ids.unique().tolist():
        t, k = (ids == e).nonzero(as_tuple=True)
        hidden = swiglu(times(x[t], e, "gate_up_proj"), limit)
        y[t] += weights[t, k, None] * times(hidden, e, "down_proj")
    return y

# %% [markdown]
# These are the parts. And this is the model:

# %% tags=["export"]
def block(x: Tensor, w: Weights, cos: Tensor, sin: Tensor,
          window: int | None, config: dict) -> Tensor:
    """One layer: attention, then experts; each adds to x (T, D)."""
    eps = config["rms_norm_eps"]
    h = rms_norm(x, w["input_layernorm.weight"], eps)
    q, k, v = (linear(h, w, f"self_attn.{name}_proj").unflatten(
        -1, (-1, config["head_dim"])) for name in "qkv")
    mixed = attention(rope(q, cos, sin), rope(k, cos, sin), v,
                      w["self_attn.sinks"], window)
    x = x + linear(mixed.flatten(1), w, "self_attn.o_proj")
    h = rms_norm(x, w["post_attention_layernorm.weight"], eps)
    weights, ids = route(linear(h, w, "mlp.router"),
                         config["num_experts_per_tok"])
    return x + experts(h, ids, weights, part(w, "mlp.experts."),
                       config["swiglu_limit"])


def forward(ids: Tensor, w: Weights, config: dict) -> Tensor:
    """Tokens (T,) -> logits (T, V): a score for each possible next token."""
    x = w["model.embed_tokens.weight"][ids]
    cos, sin = rope_tables(torch.arange(len(ids)), config)
    for n, kind in enumerate(config["layer_types"]):
        slides = kind == "sliding_attention"
        x = block(x, part(w, f"model.layers.{n}."), cos, sin,
                  config["sliding_window"] if slides else None, config)
    x = rms_norm(x, w["model.norm.weight"], config["rms_norm_eps"])
    return x @ w["lm_head.weight"].T


def next_token(logits: Tensor) -> int:
    """One of V tokens from its scores (V,): the best."""
    return int(logits.argmax())


def generate(ids: list[int], w: Weights, config: dict,
             new: int) -> list[int]:
    """`new` tokens more, one by one."""
    for _ in range(new):
        logits = forward(torch.tensor(ids), w, config)
        ids = [*ids, next_token(logits[-1])]
    return ids

# %% [markdown]
# How long is that? A program counts, without empty lines and docstrings:

# %%
import ast
import inspect

PAGE = (read, part, decode, linear, rms_norm, rope_tables, rope, visible,
        attention, route, swiglu, experts, block, forward, next_token,
        generate)


def code_lines(function) -> int:
    source = inspect.getsource(function)
    docstring = ast.parse(source).body[0].body[0]
    return (sum(bool(line.strip()) for line in source.splitlines())
            - (docstring.end_lineno - docstring.lineno + 1))


lines = {function.__name__: code_lines(function) for function in PAGE}
print(lines)
print(len(lines), "functions,", sum(lines.values()), "lines")

# %% [markdown]
# ## The sentence that we follow
#
# Every chapter of this book comes back to one sentence, the beginning of a
# story. Between text and tokens stands a file of its own, `tokenizer.json`,
# which a library reads for us until [its chapter](text/tokens.ipynb).

# %% tags=["export"]
SENTENCE = "Once upon a time there was a little fox named Mira."


def text_to_ids(text: str, folder: Path) -> list[int]:
    """The tokens of a text."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer.encode(text, add_special_tokens=False).ids


def ids_to_text(ids: list[int], folder: Path) -> str:
    """The text of tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer.decode(ids, skip_special_tokens=False)

# %%
config, w = read(POCKET)
story = text_to_ids(SENTENCE, POCKET)
ids = generate(story, w, config, 42)
print(ids_to_text(ids, POCKET))

# %% [markdown]
# The first sentence is ours, the rest the model wrote. It always took the
# token with the best score, so it writes the same on every machine.
#
# ## From the bytes to the next word, in nine steps
#
# ### 1. A text becomes numbers
#
# A *token* is a piece of text that has a number, its id: mostly a word with
# the space before it, or a part of a rarer word. The model knows a fixed list
# of them, its vocabulary, and sees nothing but ids:

# %%
pieces = [ids_to_text([token], POCKET) for token in story]
print(list(zip(pieces, story, strict=True)))
print("vocabulary:", config["vocab_size"], "tokens")

# %% [markdown]
# An id says nothing about meaning: 500 is not half of 1,000. So the first
# table of the model, `embed_tokens`, has a row of D numbers for each token,
# and `forward` begins by looking up the rows. From here on a token is a
# *vector*, a list of D numbers, and everything that follows adds to it.

# %% [markdown] tags=["given"]
# That running sum is called the *residual stream*. D is 2,880 in the
# published models.

# %%
x = w["model.embed_tokens.weight"][torch.tensor(story)]
print(tuple(x.shape), "numbers stand for", len(story), "tokens")

# %% [markdown]
# ### 2. Four bits become a weight
#
# Most of the file is experts, and their numbers are stored in four bits each.
# A byte holds two; every 32 numbers share one more byte, a power of two. Here
# is the beginning of one such block, and what `decode` makes of it. The low
# four bits of a byte come first:

# %%
blocks = w["model.layers.0.mlp.experts.down_proj_blocks"][0, 0, :1]
scale = w["model.layers.0.mlp.experts.down_proj_scales"][0, 0, :1]
for byte in blocks[0, :3].tolist():
    low, high = FP4[byte & 15].item(), FP4[byte >> 4].item()
    print(f"byte {byte:08b}: first {low:4}, then {high:4}")
power = int(scale) - 127
print(f"scale byte {int(scale)}: times 2 ** {power}")
print(decode(blocks, scale)[:6].tolist())

# %% [markdown]
# [Four bits a weight](weights/mxfp4.ipynb) decodes a whole block by hand.
#
# ### 3. Sizes are evened out
#
# What a layer reads should not depend on how large the stream has become.
# `rms_norm` divides a vector by the root of the mean of its squares. For
# (3, 4) that mean is (9 + 16) / 2 = 12.5, so both are divided by 3.54:

# %%
print(f"{12.5 ** 0.5:.2f}", [f"{value:.2f}" for value in rms_norm(
    torch.tensor([3.0, 4.0]), torch.ones(2)).tolist()])

# %% [markdown]
# A learned scale for each of the D numbers then makes some count more than
# others. It happens twice a layer and once at the end.
#
# ### 4. Words look at words
#
# So far each token knows only itself. *Attention* is the one place where
# tokens exchange something. From its vector each token makes three others by
# `linear`: a *query*, what it looks for; a *key*, what it can be found by;
# and a *value*, what it gives to those who find it. The product of a query
# with a key is a score: large when the two point the same way. A *softmax*
# turns a row of scores into shares, all positive: $e^{\text{score}}$ of each,
# divided by the sum of all. The result is the sum of the values, each times
# its share. So that scores do not grow with C, they are divided by $\sqrt C$.
#
# Three tokens with queries and keys of two numbers, one head; the values are
# unit vectors, so that the result shows the shares themselves:

# %%
q = torch.tensor([[1.0, 0.0], [0.0, 2.0], [2.0, 2.0]])[:, None]  # (3, 1, 2)
k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])[:, None]
no_sink, some_sink = torch.tensor([-100.0]), torch.tensor([1.0])
for sink in (no_sink, some_sink):
    shares = attention(q, k, torch.eye(3)[:, None], sink, None)[:, 0]
    print(f"sink {sink.item():6}:", [[f"{share:.2f}" for share in row]
                                     for row in shares.tolist()])

# %% [markdown]
# Three rules are to be seen. A token looks only at itself and back, never
# ahead: `visible` says where it may look, and a score of minus infinity gives
# a share of zero. Several *heads* do this side by side, each on its own C
# numbers, and in gpt-oss groups of query heads share one key head. And each
# head has a *sink*: one learned number that takes part in the softmax as if
# it were a score, but stands for no token. In the second line the shares of a
# row sum to less than one; a head that finds nothing can say almost nothing.
#
# In every other layer a *window* shortens the view: the token itself and a
# few before it. Window 3, seen by six tokens (a row is a token that looks):

# %%
for row in visible(torch.arange(6), torch.arange(6), 3):
    print("".join("#" if seen else "." for seen in row))
print("window of the pocket model:", config["sliding_window"])

# %% [markdown]
# More in [scores](attention/scores.ipynb), [sinks](attention/sinks.ipynb) and
# [the sliding mask](attention/masks.ipynb).
#
# ### 5. Where a word stands
#
# A score knows nothing of order: the sum is the same in any. So queries and
# keys are turned before they meet, two numbers at a time (numbers $i$ and
# $i + C/2$), like the hands of clocks. Pair $i$ turns by $\theta^{-2i/C}$
# radians a token, with $\theta$ in `rope_theta`. When both are turned,
# their product depends on how far apart they stand, and not on where:

# %%
torch.manual_seed(0)
a, b = torch.randn(2, 1, 1, config["head_dim"])


def score_at(here: int, there: int) -> float:
    """The score of the query a and the key b at two positions."""
    turned = (rope(x, *rope_tables(torch.tensor([position]), config))
              for x, position in ((a, here), (b, there)))
    return float(torch.mul(*turned).sum())


for here, there in ((5, 3), (105, 103), (5, 2)):
    print(f"positions {here:3} and {there:3}: {score_at(here, there):.2f}")

# %% [markdown]
# `rope_tables` also slows the slow hands down, so that a text longer than
# those the model was first made for keeps to angles it knows. A hand that
# made `beta_fast` turns or more in a text of that first length $S$ stays as
# fast; one that made `beta_slow` or fewer becomes `factor` times slower.
# Pair $C \ln(S / 2 \pi \beta) / (2 \ln \theta)$ makes $\beta$ turns; between
# the two, which need not be whole, the speed passes over on a straight line.
# Cos and sin are multiplied by $0.1 \ln(\text{factor}) + 1$. All in fp32.
# That part is named YaRN; [its chapter](attention/rope.ipynb) explains why.
#
# ### 6. Which experts
#
# After attention each token goes through *experts*, small networks of which a
# layer has E. Asking all of them would cost too much. A *router*, one more
# `linear`, gives each expert a score for this token; the K best are asked,
# and a softmax over their K scores says how much each of them counts:

# %%
logits = torch.tensor([[0.1, 2.0, -1.0, 1.0, 0.5]])
weights, chosen = route(logits, 2)
print("experts", chosen[0].tolist(), "with weights",
      [f"{weight:.2f}" for weight in weights[0].tolist()])

# %% [markdown]
# [Routing](moe/routing.ipynb) says why this order of the two steps, and what
# happens near a tie.
#
# ### 7. What an expert does
#
# Two matrices with something curved between them. The first makes 2F numbers
# of D; they are taken in pairs, a *gate* and an *up*. What is too large is
# cut off: the gate above 7, up on both sides. Then the gate $g$ passes through
# a curve, $g / (1 + e^{-1.702 g})$, that is almost zero on the left and almost
# straight on the right, and is multiplied by up plus one. With up = 0 the
# curve itself is seen:

# %%
for gate in (-4.0, -1.0, 0.0, 1.0, 7.0, 100.0):
    print(f"gate {gate:6}: {swiglu(torch.tensor([gate, 0.0])).item():7.3f}")

# %% [markdown]
# Without a curve two matrices would be no more than one. The second matrix
# makes D numbers of F again. In `experts` each chosen expert is decoded when
# it is needed and dropped afterwards; more in [experts](moe/experts.ipynb).
#
# ### 8. The same again
#
# `block` adds what attention says to the stream, then what the experts say.
# `forward` does that once per layer, each with tensors of its own. Nothing is
# ever replaced; each layer reads the sum of all that was said before. How
# much the four layers change the last token's vector, as a share of what
# comes out of them:

# %%
cos, sin = rope_tables(torch.arange(len(story)), config)
for n, kind in enumerate(config["layer_types"]):
    window = config["sliding_window"] if kind[0] == "s" else None
    before = x
    x = block(x, part(w, f"model.layers.{n}."), cos, sin, window, config)
    share = (x - before)[-1].norm() / x[-1].norm()
    print(f"layer {n}, {kind:17}: {share:.1f}")

# %% [markdown]
# ### 9. The next word
#
# A last norm, and one more table: `lm_head` has a row of D numbers for each
# token of the vocabulary. The product of a row with the stream is that
# token's score, its *logit*. The last token's row of logits is about the next
# one:

# %%
odds = forward(torch.tensor(ids), w, config).softmax(-1)  # (T, V)
best = odds.max(-1).values[len(story):-1]
for place in (int(best.argmin()), int(best.argmax())):
    t = len(story) + place
    print(ids_to_text(ids[t - 3:t + 1], POCKET), "...", ", ".join(
        f"{ids_to_text([token], POCKET).strip()!r} {odds[t, token]:.0%}"
        for token in odds[t].topk(4).indices.tolist()))

# %% [markdown]
# Where a story may go on in many ways, the scores lie close together; where
# only one word fits, it gets nearly everything.
#
# `next_token` takes the best, `generate` puts it behind the others, and all
# begins anew with one token more.
# [How does one of 201,088 logits become the next token?](text/sampling.ipynb)
# is about better choices than always the best.
#
# ## Swap a function
#
# `sentence` writes the sentence with other functions in place of the page's.
# Later chapters use it: whoever has derived a part puts it in here and sees
# whether the story is still the same. A function finds the ones that it calls
# by name, in a dictionary; so we give copies of all of them a dictionary of
# their own, in which the names of the new functions lead elsewhere. The page
# itself stays as it is, and a new function may call the old one. `REPLACEABLE`
# lists them all: the two about text first, then the others in their order.

# %% tags=["export"]
REPLACEABLE = (text_to_ids, ids_to_text, read, part, decode, linear, rms_norm,
               rope_tables, rope, visible, attention, route, swiglu, experts,
               block, forward, next_token, generate)


def sentence(new: int = 42, **functions: Callable) -> str:
    """SENTENCE and `new` tokens more, by the pocket model.

    functions: others in place of this page's functions of the same name;
    they take and give what those do. TypeError for a name that is not in
    REPLACEABLE.
    """
    page = dict(globals())
    for function in REPLACEABLE:
        page[function.__name__] = FunctionType(
            function.__code__, page, None, function.__defaults__)
    names = [function.__name__ for function in REPLACEABLE]
    for name in functions:
        if name not in names:
            raise TypeError(f"sentence: expected one of {', '.join(names)}, "
                            f"found {name}")
    page.update(functions)
    config, w = page["read"](POCKET)
    ids = page["text_to_ids"](SENTENCE, POCKET)
    return page["ids_to_text"](page["generate"](ids, w, config, new), POCKET)

# %% [markdown]
# Here are four mistakes, each made by somebody who wrote a gpt-oss, and each
# without any error message:

# %%
def swapped_nibbles(blocks, scales):
    """The high four bits first."""
    return decode(blocks << 4 | blocks >> 4, scales)


def interleaved(x, cos, sin):
    """Pairs (0, 1), (2, 3), ... as in other models."""
    cos, sin = cos[:, None], sin[:, None]
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def all_experts_first(logits, k):
    """The softmax over all experts, then the choice."""
    return logits.softmax(-1).topk(k)


def halves(gate_up, limit=7.0):
    """All gates before all ups."""
    gate, up = gate_up.chunk(2, -1)
    return swiglu(torch.stack([gate, up], -1).flatten(-2), limit)


right = sentence()
print("right:      ", right[len(SENTENCE):])
for name, wrong in (("decode", swapped_nibbles), ("rope", interleaved),
                    ("route", all_experts_first), ("swiglu", halves)):
    text = " ".join(sentence(**{name: wrong})[len(SENTENCE):].split())
    print(f"{name:12} {text}")

# %% [markdown]
# The wrong order of the four bits, other pairs of channels, gates in the
# wrong place: these give nonsense at once. The softmax before the choice
# gives a story, too, only another one. Whoever had no right one to compare
# with would never know. That is why this book compares everything, and why
# [such mistakes](traps.md) have a page of their own.
#
# ### What is refused
#
# The page trusts its files and its reader: it checks nothing, and names no
# tensor that is missing. Only `sentence` refuses a name that is not a
# function of the page, with a `TypeError` that lists those that are:

# %%
try:
    sentence(atention=attention)
except TypeError as error:
    print(str(error)[:48], "...", str(error)[-14:])

# %% [markdown]
# ## It holds
#
# Two things can be proved from the page alone. **Nothing looks ahead:**
# another last token changes no logits but the last token's. And **rounding
# does not matter here:** the same functions in float64, with sixteen digits
# instead of seven, choose the same token everywhere.

# %%
logits = forward(torch.tensor(ids), w, config)
spread = logits.std()
other = forward(torch.tensor([*ids[:-1], story[1]]), w, config)
ahead = (other - logits)[:-1].abs().max() / spread
assert ahead < 0.00002
print(f"of the logits before the last, the largest change is {ahead:.4f} "
      "of their spread")

wide = {name: x if x.dtype == torch.uint8 else x.double()
        for name, x in w.items()}
exact = forward(torch.tensor(ids), wide, config)
miss = (exact - logits).abs().max() / spread
assert miss < 0.00002
print(f"fp32 against float64: {miss:.4f}; the same best token at",
      int((exact.argmax(-1) == logits.argmax(-1)).sum()), "of", len(ids))

# %% [markdown]
# The third, that this is what the package computes, and with it Hugging
# Face's and OpenAI's programs, needs modules that come later.
# `tests/test_one_page.py` holds it for prompts of up to several windows: the
# largest difference is below 0.00002 of the spread, and the best token is the
# same at every place. `python -m gptoss parity` does it for any checkpoint.
#
# ## In the 20b and the 120b
#
# The page reads a folder of either as it reads the pocket model's: `read`
# takes all `.safetensors` files in it, however many, and every size comes
# from `config.json`. What changes are the numbers. Each tensor of a layer is
# as large as its shape says: a matrix that makes 4,096 numbers of 2,880 has
# as many rows and columns and a bias, each number in two bytes; a matrix of
# an expert takes 17 bytes for 32 weights.

# %%
SIZES = {"20b": {"L": 24, "E": 32}, "120b": {"L": 36, "E": 128}}
D, H, G, C, F, V, K, W = 2880, 64, 8, 64, 2880, 201_088, 4, 128


def layer_bytes(E: int) -> dict[str, int]:
    """Bytes of the tensors of one layer, biases included."""
    return {"norm": 2 * D, "q": 2 * (D + 1) * H * C,
            "k": 2 * (D + 1) * G * C, "v": 2 * (D + 1) * G * C,
            "sinks": 2 * H, "o": 2 * (H * C + 1) * D,
            "router": 2 * (D + 1) * E,
            "gate_up": E * 2 * F * (17 * D // 32 + 2),
            "down": E * D * (17 * F // 32 + 2)}


def file_bytes(size: str) -> dict[str, int]:
    """Bytes of the whole model by kind, "all", and "read" for one token."""
    L, E = SIZES[size]["L"], SIZES[size]["E"]
    b = layer_bytes(E)
    made = {"embedding": 2 * V * D,
            "attention": L * sum(b[name] for name in ("q", "k", "v", "sinks",
                                                      "o")),
            "router": L * b["router"],
            "experts": L * (b["gate_up"] + b["down"]),
            "norms": (2 * L + 1) * b["norm"], "head": 2 * V * D}
    every = sum(made.values())
    unread = made["experts"] * (E - K) // E + (V - 1) * 2 * D
    return made | {"all": every, "read": every - unread}


for size in SIZES:
    b = file_bytes(size)
    print(f"{size}: {b['all']:,} bytes, {b['experts'] / b['all']:.0%} of them "
          f"experts; read for one token {b['read'] / 1e9:.1f} GB")

# %% [markdown]
# And here is the whole model with all numbers: below each step the bytes of
# its tensors, on each arrow the shape of what it carries.

# %% tags=["hide-input"]
# Figure: the whole model on one sheet. From the text by tokenizer and
# embedding into a frame that is repeated 24 or 36 times: norm, q, k, v, RoPE,
# attention, output; norm, router, experts; each branch is added to the
# stream. Then norm, head, next token. A table of bytes at the foot.
import runpy

poster = runpy.run_path("_ext/poster.py")
fig = poster["draw"](
    {"D": D, "H": H, "G": G, "C": C, "F": F, "V": V, "K": K, "W": W},
    {size: layer_bytes(SIZES[size]["E"]) for size in SIZES},
    {size: file_bytes(size) for size in SIZES})
plt.show()

# %% [markdown] tags=["given"]
# These sums are those that the published indexes of both models state, to
# the byte. Most of it is experts, of which a token reads few. That is what a
# mixture of experts is for: the file may grow from 13.8 to 65.2 GB while a
# token reads 5.0 GB instead of 3.7. (`fig.savefig("poster.pdf")` keeps it.)

# %% [markdown]
# ## Cost
#
# Two things on this page are wasteful, and both on purpose. `generate` runs
# all tokens again for each new one. To write the sentence, so many went
# through the layers, and so many would have to:

# %%
print("run:", sum(range(len(story), len(ids))), "needed:", len(ids) - 1)

# %% [markdown]
# [What must be remembered](model/remembering.ipynb) shows why keys and values
# of the past never change, so that they can be kept. And `read` makes fp32 of
# everything that is not packed. That needs so much memory; the four-bit
# experts stay in the file, which is only mapped:

# %%
for size in SIZES:
    b = file_bytes(size)
    print(f"{size}: {2 * (b['all'] - b['experts']) / 1e9:.1f} GB of fp32, "
          f"{b['experts'] / 1e9:.1f} GB mapped")

# %% [markdown]
# [The kernels](kernels/building.ipynb) compute with the four bits themselves.
#
# ## Takeaways
#
# - A language model is a function from tokens to scores for the next token;
#   writing is calling it again and again.
# - A token is a vector to which every layer adds. Attention brings something
#   from other tokens, experts work on each token alone.
# - gpt-oss is attention with sinks and windows, a choice of few experts, a
#   clamped activation and weights of four bits, in about a hundred lines.
# - Most mistakes in it raise no error. Comparing is the only way to know.
#
# ## Exercises
#
# ### Exercise 1
#
# Two of the four layers see only a window of 64 tokens, and the story is
# shorter than that. Shorten the view of *all* layers to 8 tokens: what does
# the story lose? And what if the layers see everything, the future too?

# %% tags=["hide-cell"]
def near(q_pos, k_pos, window):
    return visible(q_pos, k_pos, 8)


def everything(q_pos, k_pos, window):
    return torch.ones(len(q_pos), len(k_pos), dtype=torch.bool)


for wrong in (near, everything):
    print(f"{wrong.__name__}:", " ".join(sentence(visible=wrong).split()))
# With 8 tokens the text soon forgets that it was telling a story. When tokens
# may look ahead, the last one sees what it always saw; those before it see
# more than they were trained with, and the story becomes another.

# %% [markdown]
# ### Exercise 2
#
# Always the best token is dull. Let `next_token` draw: a token with
# probability p is to be taken with probability p. Then divide the logits by a
# temperature of 0.5 first.

# %% tags=["hide-cell"]
def drawing(temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda logits: int(torch.multinomial(
        (logits / temperature).softmax(0), 1, generator=generator))


for temperature in (1.0, 0.5):
    print(f"{temperature}:", " ".join(sentence(
        20, next_token=drawing(temperature, seed=1)).split()))

# %% [markdown]
# ### Exercise 3
#
# Leave out each layer in its turn. Which of them does the story need least?

# %% tags=["hide-cell"]
from itertools import count


def without(layer):
    calls = count()
    return lambda x, *given: (
        x if next(calls) % config["num_hidden_layers"] == layer
        else block(x, *given))


for layer in range(config["num_hidden_layers"]):
    print(f"{layer}:", " ".join(sentence(20, block=without(layer)).split()))

# %% [markdown]
# ### Exercise 4
#
# The published 20b lies in three files. Divide the pocket model's tensors
# among three files, and read that folder.

# %% tags=["hide-cell"]
import shutil
import tempfile

from safetensors.torch import save_file

tensors = load_file(POCKET / "model.safetensors")
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    shutil.copy(POCKET / "config.json", folder)
    for n in range(3):
        save_file({key: tensors[key] for key in sorted(tensors)[n::3]},
                  folder / f"model-{n + 1:05}-of-00003.safetensors")
    _, again = read(folder)
print(len(again), "tensors from 3 files; largest change of the logits:",
      (forward(torch.tensor(story), again, config)
       - forward(torch.tensor(story), w, config)).abs().max().item())

# %% [markdown]
# ### Exercise 5
#
# How many parameters has the pocket model, and how many does one token
# multiply with? A byte of blocks holds two parameters; of the experts a token
# uses K of E; of `embed_tokens` it only looks a row up.

# %% tags=["hide-cell"]
every = active = 0
share = config["num_experts_per_tok"] / config["num_local_experts"]
for name, x in w.items():
    numbers = 0 if name.endswith("_scales") else x.numel() * (
        2 if name.endswith("_blocks") else 1)
    every += numbers
    active += (0 if "embed_tokens" in name
               else int(numbers * share) if ".experts." in name else numbers)
print(f"{every:,} parameters, {active:,} of them for a token")

# %% [markdown]
# ## Sources
#
# - OpenAI's own plain version: openai/gpt-oss, `gpt_oss/torch/model.py` and
#   `gpt_oss/torch/weights.py`.
# - Hugging Face's: huggingface/transformers,
#   `models/gpt_oss/modeling_gpt_oss.py`; the published `config.json` and
#   index of openai/gpt-oss-20b and openai/gpt-oss-120b.
# - {cite:t}`gptoss2025` describes the models.
