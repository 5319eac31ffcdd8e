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
#     module: transformer
#     public: [GptOss, ModelError]
# ---

# %% [markdown]
# # Twenty-four times the same block
#
# ## Question
#
# A block takes a stream and gives a stream. Twenty-four of them, an embedding
# before and a head behind, are the whole model: **five lines** that run it.
# What else do people expect of a class that they call `GptOss`, and how do we
# know that the whole is right when only the parts were tested?
#
# ## Picture
#
# What does each block contribute? The head makes a guess at the next word of
# the stream after the last block. Nothing keeps us from asking it earlier:
# after the embedding, after block 0, and so on. That is called a *logit
# lens*. The shipped model (four blocks) reads a sentence:

# %% tags=["hide-input", "picture"]
# Figure: a table of words, a column for each token of a sentence, a row for
# each place in the network. Each cell has the word that the head would say
# there, dark where it is sure. In the upper rows the words are odd and pale,
# in the last they continue the sentence.
from importlib.resources import files

import matplotlib.pyplot as plt
import torch

from gptoss.model.transformer import GptOss as Finished
from gptoss.text.tokenizer import Tokenizer

plt.style.use("../_static/book.mplstyle")
pocket = files("gptoss") / "pocket"
reader = Tokenizer.from_pretrained(pocket)
shipped = Finished.from_pretrained(pocket, dtype=torch.float32)
story = reader.encode("Once upon a time there was a little fox named Mira. "
                      "Mira lived in the cave. For her birthday Mira got")
seen, first = [], 12  # the columns from here on


def keep(module, arguments, result):
    seen.append(result[0])


hooks = [part.register_forward_hook(keep)
         for part in (shipped.embed_tokens, *shipped.layers)]
with torch.inference_mode():
    shipped(torch.tensor([story]))
    lens = torch.stack([shipped.lm_head(shipped.norm(x)).softmax(-1)
                        for x in seen])  # (places, T, V)
for hook in hooks:
    hook.remove()
sure, said = lens.max(-1)
places = ["embedding", *(f"block {n}" for n in range(len(shipped.layers)))]
fig, ax = plt.subplots(figsize=(7.4, 2.6))
ax.imshow(sure[:, first:], cmap="Blues", vmin=0, vmax=1.4, aspect="auto")
for y in range(len(places)):
    for x, token in enumerate(said[y, first:].tolist()):
        ax.text(x, y, reader.decode([token]).strip() or "·", ha="center",
                va="center", fontsize=7)
columns = [reader.decode([token]).strip() or "·" for token in story[first:]]
ax.set_xticks(range(len(columns)), columns, fontsize=7, rotation=60)
ax.set_yticks(range(len(places)), places)
ax.tick_params(length=0)
ax.set(xlabel="token read, and below it what each place says comes next")
ax.xaxis.set_label_position("top")
ax.xaxis.tick_top()
ax.grid(False)
ax.spines[["left", "bottom"]].set_visible(False)
plt.show()
for place, row in zip(places, said, strict=True):
    print(f"{place:9} says the last block's word at "
          f"{int((row == said[-1]).sum())} of {len(story)} tokens")

# %% [markdown]
# What to see: a column is a token that is read; the row below, what the head
# would say next. Down a column the guess is formed: words that merely go
# together at first, in the last row the words of the story. The darker, the
# surer.
#
# ## The naive version
#
# The model itself, as five lines. (`shipped` has the parts of [a
# block](layers.ipynb), opened by the cell above.)

# %%
from gptoss.attention.rope import rope_parameters, rope_tables


@torch.inference_mode()
def run(model, tokens, positions):
    x = model.embed_tokens(tokens)  # (B, T, D)
    tables = rope_tables(positions, *rope_parameters(model.config))
    for block in model.layers:
        x = block(x, *tables, positions)
    return model.lm_head(model.norm(x))  # (B, T, V)


tokens, positions = torch.tensor([story]), torch.arange(len(story))[None]
logits = run(shipped, tokens, positions)
print("next:", [reader.decode([int(token)])
                for token in logits[0, -1].topk(3).indices])

# %% [markdown]
# So what is left to do? Two prompts of unequal length in one batch, for
# example. Fill the shorter one up on the left, run, and compare its last
# logits with those that it has alone:

# %%
short = story[:9]
filled = torch.tensor([[0] * (len(story) - 9) + short, story])
alone = run(shipped, torch.tensor([short]), positions[:, :9])[0, -1]
together = run(shipped, filled, positions.expand(2, -1))[0, -1]
print(f"logits up to {alone.abs().max():.0f}, wrong by up to "
      f"{(together - alone).abs().max():.0f}")
print("alone:", reader.decode([int(alone.argmax())]), "- in the batch:",
      reader.decode([int(together.argmax())]))
where = torch.full((1, len(story)), -1)  # -1: padding
where[0, -9:] = torch.arange(9)
right = run(shipped, filled, torch.cat([where, positions]))[0, -1]
assert (right - alone).abs().max() < 1e-3
print("with positions that leave the padding out: equal within 1e-3")

# %% [markdown]
# The five lines are right; what they are given was not. The rest of the
# chapter is what makes them safe to use: positions, loading in the memory
# that there is, names, and refusals.
#
# ## Derivation
#
# **Positions.** A token's position is the number of real tokens before it in
# its row, those in the cache included; padding has position −1, sees nothing
# and is seen by nobody. Then the same equations serve a prompt, one more
# token, and a batch of unequal prompts.
#
# **Loading.** Build the model and then read the file into it, and there are
# two copies for a while: 27.5 GB for the 13.8 GB of the 20b. Build it on the
# meta device (shapes, no bytes), hand over one tensor at a time, and there is
# one copy, and one tensor more where the dtype has to be converted. Let the
# checkpoint hold tensors of $b_i$ bytes and the model want $c_i$. Then
#
# $$
# \text{peak} \le \sum_i c_i + \max_{i:\ \text{converted}} b_i
# $$ (model-load)
#
# instead of $\sum c_i + \sum b_i$. A tensor that is not converted is a view
# of the memory-mapped file: its $c_i$ are pages which the system may drop and
# read again. (A test measures the peak.)

# %%
from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import checkpoint_bytes

file = checkpoint_bytes(GptOssConfig.gpt_oss_20b()) / 1e9
print(f"{file:.1f} GB, twice: {2 * file:.1f} GB")

# %% [markdown]
# ## Code
#
# ### What runs?
#
# The five lines, as a module with parameters. The inverse frequencies are the
# same for every layer. They are no buffer of the model, because
# `model.to(torch.bfloat16)` would round them, and a rounded frequency turns a
# token far in the text by some random angle ([rope](../attention/rope.ipynb)).
# One computation on the CPU serves every device. `logits_to_keep` spares the
# head where only the last columns are wanted; 0 means all, since `x[:, -0:]`
# is `x[:, 0:]`.

# %% tags=["export"]
from gptoss.model.answers import load_answers
from gptoss.model.layers import Block, Embedding, Linear, RMSNorm, initialise
from gptoss.weights.loading import load_tensors

# %% tags=["export"]
import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys


from gptoss.model.cache import Cache, CacheView
from gptoss.weights.layout import DTYPES, FLOATS, PACKED
from gptoss.weights.write import MAX_SHARD_BYTES, write_checkpoint
from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.convert import companions
from gptoss.weights.hub import resolve
from gptoss.weights.config import GptOssConfig
from gptoss.weights.errors import Error, mismatch

from gptoss.attention.masks import positions_from_mask
from gptoss.attention.rope import rope_parameters, rope_tables


@lru_cache(maxsize=64)
def _frequencies(config: GptOssConfig, device: torch.device,
                 dtype: torch.dtype) -> tuple[Tensor, float]:
    """`rope_parameters` for activations of dtype: fp32, or float64."""
    with torch.inference_mode(False):  # it outlives the caller's mode
        inv_freq, concentration = rope_parameters(config, "cpu")
        wide = torch.promote_types(dtype, torch.float32)
        return inv_freq.to(device, wide), concentration

# %% tags=["export"]
class Stack(nn.Module):
    """Embedding, L blocks, norm and head: arithmetic, and no checks."""

    def __init__(self, config: GptOssConfig, dtype: torch.dtype,
                 device=None, packed: bool = True) -> None:
        super().__init__()
        self.config = config
        D, V = config.hidden_size, config.vocab_size
        like = {"dtype": dtype, "device": device}
        self.embed_tokens = Embedding(V, D, **like)
        self.layers = nn.ModuleList(
            Block(config, n, dtype, device, packed)
            for n in range(config.num_hidden_layers))
        self.norm = RMSNorm(D, config.rms_norm_eps, dtype, device)
        self.lm_head = Linear(D, V, bias=False, **like)

    def run(self, tokens: Tensor, positions: Tensor,
            plan: CacheView | None = None, logits_to_keep: int = 0
            ) -> Tensor:
        """tokens, positions (B, T), -1 = padding -> logits (B, T, V).

        plan: of a cache, for these positions (`Cache.begin`).
        """
        x = self.embed_tokens(tokens)
        cos, sin = rope_tables(
            positions, *_frequencies(self.config, x.device, x.dtype),
            x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, positions, plan)
        return self.lm_head(self.norm(x[:, -logits_to_keep:]))

# %%
import tempfile

torch.manual_seed(0)
TINY = GptOssConfig(
    num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2,
    vocab_size=96, hidden_size=64, intermediate_size=64, head_dim=32,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=6,
    eos_token_id=2, pad_token_id=0)
pos = torch.arange(10)[None]
stack = Stack(TINY, torch.float32, packed=False).requires_grad_(False)
print(tuple(stack.run(torch.tensor([[5, 6, 7]]), pos[:, :3]).shape),
      tuple(stack.run(torch.tensor([[5, 6, 7]]), pos[:, :3],
                      logits_to_keep=1).shape))

# %%
torch.manual_seed(0)
initialise(stack)
print(f"head drawn with deviation {stack.lm_head.weight.std().item():.2f}, "
      f"biases {stack.layers[3].mlp.router.bias.abs().max().item()}")

# %% [markdown]
# ### Where does each token stand?

# %% tags=["export"]
def token_positions(tokens: Tensor, attention_mask: Tensor | None = None,
                    cache: Cache | None = None) -> Tensor:
    """Positions (B, T) int64 of tokens after those in the cache."""
    start = None if cache is None else cache.lengths.to(tokens.device)
    if attention_mask is not None:
        return positions_from_mask(attention_mask, start)
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    if start is None:
        return steps.expand(tokens.shape)
    return start[:, None] + steps

# %% [markdown]
# A row padded on the left, one in the middle, one not at all:

# %%
mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1]])
print(token_positions(torch.zeros(3, 4), mask).tolist())

# %% [markdown]
# ### Which names do people expect?
#
# What stands around the stack is what people expect who know torch and
# `transformers`: `model.device` and `model.dtype`, `input_ids=` as another
# word for the tokens, `state_dict`, `from_pretrained`, `save_pretrained`.
#
# A state dict has the names of the file, so that one can be loaded into the
# other. They are those of the attributes, with `model.` before all but the
# head. Dense experts lie in a file as (E, in, out), and here as (E, out, in),
# like every other matrix of torch. Where D = F nobody could tell by the shape
# ([the file](../weights/file.ipynb)). So what has the file's name has the
# file's orientation, in a state dict too; turning it is a view and moves
# nothing.

# %% tags=["export"]
_DENSE = re.compile(r".*\.experts\.(parametrizations\.)?"
                    r"(gate_up|down)_proj(\.original)?")
_OURS = re.compile(r"(embed_tokens|layers|norm)\.")


def file_name(name: str) -> str:
    """What a file calls a tensor of `GptOss`."""
    return f"model.{name}" if _OURS.match(name) else name


def file_tensor(name: str, tensor: Tensor) -> Tensor:
    """Dense experts (E, out, in) <-> (E, in, out); others as they are."""
    turned = _DENSE.fullmatch(name) and tensor.ndim == 3
    return tensor.transpose(1, 2) if turned else tensor


def _name_as_file(model: nn.Module, state: dict[str, Tensor], prefix: str,
                  metadata: object) -> None:
    """After `state_dict`: the names and orientations of a file."""
    for name in [name for name in state if name.startswith(prefix)]:
        tensor = file_tensor(name, state.pop(name))
        state[prefix + file_name(name.removeprefix(prefix))] = tensor


def _name_as_module(model: nn.Module, state: dict[str, Tensor], prefix: str,
                    *_: object) -> None:
    """Before `load_state_dict`: the names and orientations of ours."""
    for name in [name for name in state if name.startswith(prefix)]:
        tensor = file_tensor(name, state.pop(name))
        ours = name.removeprefix(prefix).removeprefix("model.")
        state[prefix + ours] = tensor


def _say_as_file(model: nn.Module, incompatible: _IncompatibleKeys) -> None:
    """After `load_state_dict`: what it missed, by the names of a file."""
    for names in incompatible:
        names[:] = map(file_name, names)


def one_of(tokens: Tensor | None, input_ids: Tensor | None) -> Tensor:
    """The one that is given; ModelError for both or none."""
    if tokens is not None and input_ids is None:
        return tokens
    if input_ids is not None and tokens is None:
        return input_ids
    raise mismatch(ModelError, "tokens", "either tokens or input_ids",
                   "neither" if tokens is None else "both")

# %% [markdown]
# The two names of one tensor of dense experts, and what of them is turned:

# %%
name = "layers.3.mlp.experts.down_proj"
print(file_name(name), tuple(file_tensor(name, torch.zeros(4, 64, 96)).shape))
print(file_name("lm_head.weight"))

# %% [markdown]
# ### What is refused?
#
# What can be wrong with tokens is found before anything runs: on a GPU an id
# out of range would otherwise end the process with a device assert. Both
# `tokens` and `input_ids`, or neither, is a ModelError too; so are a config
# with tied embeddings (here the two matrices are two), and a dtype that no
# model can have.

# %% tags=["export"]
class ModelError(Error):
    """Tokens or a mask that the model cannot take."""


def check_tokens(tokens: Tensor, attention_mask: Tensor | None,
                 config: GptOssConfig) -> None:
    """Raise ModelError unless tokens (B, T) and the mask can be run."""
    shape, most = tuple(tokens.shape), config.max_position_embeddings
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise mismatch(ModelError, "tokens", "int64 of shape (B, T)",
                       f"{tokens.dtype} of shape {shape}")
    if tokens.numel() == 0:
        raise mismatch(ModelError, "tokens", "at least one",
                       f"an empty prompt of shape {shape}")
    if attention_mask is not None and attention_mask.shape != tokens.shape:
        raise mismatch(ModelError, "attention_mask",
                       f"shape {shape} as tokens has",
                       tuple(attention_mask.shape))
    if tokens.shape[1] > most:
        raise mismatch(ModelError, "tokens",
                       f"at most {most} (max_position_embeddings)", shape[1])
    for token in torch.stack(tokens.aminmax()).tolist():
        if not 0 <= token < config.vocab_size:
            raise mismatch(ModelError, "token id",
                           f"0 to {config.vocab_size - 1}", token)

# %%
for bad in ([[5, 96]], [[]], [5, 6]):
    try:
        check_tokens(torch.tensor(bad, dtype=torch.int64), None, TINY)
    except ModelError as error:
        print(error)

# %% [markdown]
# ### What stands around the stack?
#
# With a cache, `forward` is `begin`, `run`, `commit`; if anything fails in
# between, the cache knows ([the cache](cache.ipynb)).

# %% tags=["export"]
class GptOss(Stack):
    """gpt-oss: token ids in, logits out.

    With packed=True the experts hold MXFP4 (zeros until loaded); with
    packed=False they are dense and, like the rest, drawn at random with
    biases and sinks 0 and norms 1: ready to train.

    `state_dict` has the names and orientations of a Hugging Face file, and
    `load_state_dict` takes them, with or without "model." before them: dense
    experts are (E, in, out) there, and parameters of (E, out, in) here.
    """

    source: Path | None = None  # the folder of the checkpoint, if from one
    sources: tuple[Path, ...] = ()  # small files beside the weights

    def __init__(self, config: GptOssConfig,
                 dtype: torch.dtype = torch.bfloat16, device=None,
                 packed: bool = True) -> None:
        if config.tie_word_embeddings:  # weights/files reads them untied
            raise mismatch(ModelError, "tie_word_embeddings",
                           "false (embedding and lm_head are two matrices "
                           "here)", "true")
        super().__init__(config, dtype, device, packed)
        initialise(self)
        load_answers()  # kernels, before threads share the model
        self.register_state_dict_post_hook(_name_as_file)
        self.register_load_state_dict_pre_hook(_name_as_module)
        self.register_load_state_dict_post_hook(_say_as_file)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and the tokens have to be."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits, and of all weights that are not packed."""
        return self.embed_tokens.weight.dtype

    def forward(self, tokens: Tensor | None = None,
                cache: Cache | None = None,
                attention_mask: Tensor | None = None,
                logits_to_keep: int = 0, *,
                input_ids: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V) in the model's dtype.

        input_ids: another name for tokens. cache: the tokens continue what
        it holds, and enter it.
        attention_mask (B, T): false = padding, anywhere; its logits mean
        nothing. logits_to_keep: only the last so many columns (0: all).
        ModelError: ids out of range, no tokens, wrong rank, too many.
        CacheError: no room; the cache is then unchanged.
        """
        tokens = one_of(tokens, input_ids)
        check_tokens(tokens, attention_mask, self.config)
        positions = token_positions(tokens, attention_mask, cache)
        if cache is None:
            return self.run(tokens, positions, None, logits_to_keep)
        plan = cache.begin(positions)
        logits = self.run(tokens, positions, plan, logits_to_keep)
        cache.commit(plan)
        return logits

    def generate(self, input_ids, **options) -> Tensor | list[int]:
        """input_ids (B, T) -> (B, T + new): prompts and continuations.

        The options are those of `continue_ids` in text/generate, as far as
        they go those of transformers: attention_mask (padding on the left),
        max_new_tokens, do_sample, temperature, top_k, top_p, seed,
        eos_token_id, pad_token_id. TypeError for an unknown one.
        """
        from gptoss.text.generate import continue_ids

        return continue_ids(self, input_ids, **options)

    def new_cache(self, batch_size: int = 1, max_tokens: int | None = None,
                  slack: int = 0) -> Cache:
        """A `Cache` of this model's configuration, dtype and device."""
        return Cache(self.config, batch_size, max_tokens, slack=slack,
                     dtype=self.dtype, device=self.device)

    @classmethod
    def from_pretrained(cls, path: str | Path,
                        dtype: torch.dtype | str = torch.bfloat16,
                        device="cpu", packed: bool = True,
                        revision: str | None = None) -> "GptOss":
        """The model in a folder or a hub repository, in any layout.

        dtype: of everything but packed experts; one of torch's, its name, or
        "auto", the one that the checkpoint was saved in. packed: keep MXFP4
        experts packed (a bf16 checkpoint has none and loads dense); False
        decodes them to dtype. Parameters are frozen; call requires_grad_()
        to train. Tensors on the CPU whose dtype agrees stay memory-mapped.
        Raises CheckpointError or ConfigError naming the file and the tensor;
        ModelError for a dtype that none can have.
        """
        with Checkpoint.open(resolve(path, revision)) as checkpoint:
            dtype = pick_dtype(dtype, checkpoint)
            packed = packed and checkpoint.layout != "bf16"
            model = cls(checkpoint.config, dtype, "meta", packed)
            model.requires_grad_(False)
            tensors = {file_name(name): file_tensor(name, tensor)
                       for name, tensor in load_tensors(
                           checkpoint, dtype, device, packed)}
            model.source = checkpoint.folder
            model.sources = tuple(companions(checkpoint))
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def save_pretrained(self, path: str | Path,
                        max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        """Write a folder that `from_pretrained` and transformers read.

        config.json, safetensors in shards, and the tokenizer and generation
        config that lay beside the weights when they were read. Packed experts
        are written packed, byte for byte; dense ones dense, in Hugging Face's
        orientation. A dtype other than bf16 is named in config.json, and
        from_pretrained(path, dtype="auto") reads it back. The folder must be
        new or empty, and appears whole or not at all. CheckpointError names
        the tensor or the file.
        """
        state = self.state_dict()
        packed = any(name.endswith(PACKED) for name in state)
        write_checkpoint(
            path, self.config, state.items(), "hf" if packed else "bf16",
            max_shard_bytes, [file for file in self.sources if file.exists()
                              and file.name != "README.md"], self.dtype)

# %% [markdown]
# A model drawn at random knows nothing: its loss is that of a guess among 96
# tokens. It learns, since everything in it is differentiable, the sinks and
# the router included:

# %%
torch.manual_seed(0)
model = GptOss(TINY, torch.float32, packed=False)
tokens = torch.randint(0, 96, (4, 16))
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(40):
    logits = model(tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1),
                                       tokens[:, 1:].flatten())
    optimiser.zero_grad()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    optimiser.step()
    losses.append(loss.item())
assert losses[-1] < 0.5
print(f"loss {losses[0]:.1f}, after 40 steps below 0.5; ln 96 is "
      f"{torch.tensor(96.0).log():.1f}")

# %% [markdown]
# The dtype is a choice, and people write it in three ways: as
# torch does, by name, or as "auto". The last is what `config.json` says of the
# file, which need not be what lies in it ([the file](../weights/file.ipynb)):
# some programs save fp32 and say bf16, and mean bf16.

# %% tags=["export"]
FLOATING = {str(dtype).removeprefix("torch."): dtype
            for dtype in map(DTYPES.get, FLOATS)}


def pick_dtype(dtype: torch.dtype | str, checkpoint: Checkpoint
               ) -> torch.dtype:
    """A dtype of torch from itself, its name or "auto"; ModelError."""
    if dtype == "auto":
        return checkpoint.dtype
    found = FLOATING.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise mismatch(ModelError, "dtype", f"auto, {', '.join(FLOATING)}",
                       f"{dtype!r:.100}")
    return found

# %%
try:
    print(pick_dtype("torch.float16", None), pick_dtype("int8", None))
except ModelError as error:
    print(error)

# %% [markdown]
# To show it all, a checkpoint in the released layout: random
# tensors for every name in the [table of tensors](../weights/file.ipynb),
# biases and sinks not zero, so that nothing can hide.

# %%
from gptoss.weights.convert import convert
from gptoss.weights.layout import tensor_table
from gptoss.weights.write import write_checkpoint


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
convert(path / "hf", path / "original", "original")
convert(path / "hf", path / "bf16", "bf16")
tokens = torch.randint(0, 96, (1, 40))
found = {}
for layout in ("hf", "original", "bf16"):
    for packed in (True, False):
        model = GptOss.from_pretrained(path / layout, torch.float32,
                                       packed=packed)
        found[layout, packed] = model(tokens)
worst = max((logits - found["hf", True]).abs().max().item()
            for logits in found.values())
assert worst < 1e-4
print(len(found), "ways to load, one model: logits equal within 1e-4")
print("auto:", GptOss.from_pretrained(path / "hf", "auto").norm.weight.dtype)

# %% [markdown]
# And back. A model that was loaded, saved and loaded again holds the same
# bytes, packed or dense, and what safetensors' own loader finds in a file is
# a state dict:

# %%
from safetensors.torch import load_file

for layout in ("hf", "bf16"):
    model = GptOss.from_pretrained(path / layout)
    model.save_pretrained(path / "saved" / layout)
    stored = load_file(path / "saved" / layout / "model.safetensors")
    held = model.state_dict()
    print(layout, sum(torch.equal(held[name], stored[name])
                      for name in stored), "of", len(held), "as in the file,",
          model.load_state_dict(stored))

# %% [markdown]
# What agrees in dtype is mapped, not copied. Linux says what each stretch of
# a process's memory is, so we can ask where the tensors lie:

# %%
model = GptOss.from_pretrained(path / "hf")
maps = Path("/proc/self/maps")
if maps.exists():
    lines = [line.split()[0].split("-") for line in
             maps.read_text().splitlines() if ".safetensors" in line]
    spans = [range(int(start, 16), int(end, 16)) for start, end in lines]
    held = model.state_dict().values()
    assert all(any(t.data_ptr() in span for span in spans) for t in held)
print(len(model.state_dict()), "tensors, each a view of the file")

# %% [markdown]
# ## It holds
#
# In float64, where rounding is too small to hide a mistake, for every split
# of a prompt: prefill the first part, then the rest through the cache, and
# find the logits of one forward.

# %%
exact = GptOss.from_pretrained(path / "hf", torch.float64)
with torch.inference_mode():
    whole = exact(tokens)
    for k in range(1, 40):
        cache = exact.new_cache()
        parts = [exact(part, cache) for part in tokens.split([k, 40 - k], 1)]
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-11
    cache = exact.new_cache()
    parts = [exact(token, cache) for token in tokens.split(1, 1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-11
print("39 splits and token by token")

# %% [markdown]
# Padding, wherever it stands, changes no real token's logits. (Elsewhere a
# fast attention is kept off gpt-oss because it generates gibberish, "most
# likely due to left padding": [unsloth
# #3982](https://github.com/unslothai/unsloth/pull/3982).)

# %%
g = torch.Generator().manual_seed(0)
for _ in range(20):
    mask = torch.rand(3, 40, generator=g) < 0.6
    batch = torch.randint(0, 96, (3, 40), generator=g)
    logits = exact(batch, attention_mask=mask)
    assert logits.isfinite().all()
    for row in range(3):
        alone = exact(batch[row, mask[row]][None])[0]
        assert (logits[row, mask[row]] - alone).abs().max() < 1e-11
print("60 rows with holes")

# %% [markdown]
# The future is invisible, and through sliding layers alone a
# token reaches $L(W-1)$ positions ahead and no further
# ([masks](../attention/masks.ipynb)). Here all four layers slide, with a
# window of 6.

# %%
from dataclasses import replace

sliding = replace(TINY, layer_types=("sliding_attention",) * 4)
torch.manual_seed(0)
model = GptOss(sliding, torch.float64, packed=False).requires_grad_(False)
other = tokens.clone()
other[0, 10] = (other[0, 10] + 1) % 96
change = (model(other) - model(tokens))[0].abs().amax(-1)
moved = (change > 1e-12).nonzero().flatten()
print("token 10 changed; outputs that move:", moved.min().item(), "to",
      moved.max().item())
assert moved.tolist() == list(range(10, 10 + 4 * 5 + 1))

# %% [markdown]
# **The sentence again,** with our model for all of [the
# page's](../one_page.ipynb) `forward`:

# %%
from gptoss.one_page import POCKET, SENTENCE, sentence

ours = GptOss.from_pretrained(POCKET, torch.float32)
with torch.inference_mode():
    retold = sentence(12, forward=lambda ids, *_: ours(ids[None])[0])
assert retold == sentence(12)
print(retold.removeprefix(SENTENCE).strip())

# %% [markdown]
# ## In the 20b and the 120b
#
# The same class on the meta device, where tensors have shapes and no bytes:
# every name, shape and dtype is that of the [table of
# tensors](../weights/file.ipynb).

# %%
KINDS = {"BF16": torch.bfloat16, "U8": torch.uint8}
for config in (GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()):
    model = GptOss(config, device="meta")
    table = {name: (tuple(spec.shape), KINDS[spec.dtype])
             for name, spec in tensor_table(config).items()}
    held = model.state_dict()
    assert {n: (tuple(t.shape), t.dtype) for n, t in held.items()} == table
    size = sum(t.nbytes for t in held.values())
    dense = GptOss(config, device="meta", packed=False)
    count = sum(p.numel() for p in dense.parameters())
    block = sum(t.nbytes for n, t in held.items()
                if n.startswith("model.layers.7."))
    print(f"{len(held)} tensors, {count:,} parameters, {size:,} bytes, "
          f"{block:,} a block")

# %% [markdown]
# ## Cost
#
# **FLOPs.** A matrix of $n$ entries costs $2n$ FLOPs a token; attention
# costs $2HC$ for each score and $2HC$ for each value mixed. For $T$ tokens
# without a cache,
#
# $$
# \text{FLOPs} = 2T\Big[L\big(2D(H+G)C + DE + 3KFD\big) + DV\Big]
# + 4L\,HC\,T^2 .
# $$ (model-flops)
#
# The last term has $T^2$ in the sliding layers too: the plain operator
# computes every score and masks most of them (an exercise of [the
# operators](operators.ipynb) mends that). Torch's own counter agrees to the
# FLOP:

# %%
from torch.utils.flop_counter import FlopCounterMode

c, T = TINY, 40
D, H, G, C = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads,
              c.head_dim)
weights = (2 * D * (H + G) * C + D * c.num_local_experts
           + 3 * c.num_experts_per_tok * c.intermediate_size * D)
formula = (2 * T * (c.num_hidden_layers * weights + D * c.vocab_size)
           + 4 * c.num_hidden_layers * H * C * T * T)
dense = GptOss.from_pretrained(path / "hf", torch.float32, packed=False)
with FlopCounterMode(display=False) as counter, torch.inference_mode():
    dense(tokens)
print(f"{counter.get_total_flops():,} FLOPs")
assert counter.get_total_flops() == formula

# %% [markdown]
# **Bytes.** One token reads every matrix outside the experts once, $K$
# experts a layer, and the cache:

# %%
from gptoss.weights.sizes import bytes_read_per_token

for config in (GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()):
    held = GptOss(config, device="meta").state_dict()
    share = config.num_experts_per_tok / config.num_local_experts
    read = sum(t.nbytes * (share if ".experts." in name else 1)
               for name, t in held.items() if "embed_tokens" not in name)
    read += 2 * config.hidden_size  # one row of the embedding
    assert read == bytes_read_per_token(config)
    print(f"{read / 1e9:.2f} GB a token without the cache")

# %% [markdown]
# ## Takeaways
#
# - The model is a loop over its blocks; what is wrong with tokens is said
#   before anything runs.
# - A state dict has the names and orientations of the file.
# - Build on meta, hand over one mapped tensor at a time, and loading takes
#   the bytes of the file.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# `logits_to_keep=1` computes the head for one column only. How much of a
# prompt's FLOPs does it save in the 20b, for 512 tokens?

# %% tags=["hide-cell"]
big = GptOssConfig.gpt_oss_20b()
D, V = big.hidden_size, big.vocab_size
heads = 2 * 511 * D * V  # of all but one column
blocks = 2 * 512 * big.num_hidden_layers * (
    2 * D * (big.num_attention_heads + big.num_key_value_heads)
    * big.head_dim + D * big.num_local_experts
    + 3 * big.num_experts_per_tok * big.intermediate_size * D)
print(f"{heads / 1e12:.2f} of {(heads + blocks) / 1e12:.2f} TFLOPs: "
      f"{heads / (heads + blocks):.0%}")

# %% [markdown]
# ### Exercise 2
#
# Leave out one block of the shipped model and measure the loss on the story.
# Which block is missed most, and which least?

# %% tags=["hide-cell"]
from copy import copy


def loss_without(layer):
    model = copy(shipped)
    model._modules = dict(shipped._modules)
    model.layers = nn.ModuleList(block for n, block in enumerate(
        shipped.layers) if n != layer)
    return nn.functional.cross_entropy(
        run(model, tokens, positions)[0, :-1], tokens[0, 1:]).item()


tokens = torch.tensor([story])
positions = torch.arange(len(story))[None]
for layer in (None, 0, 1, 2, 3):
    print(f"without block {layer}: loss {loss_without(layer):.1f}")

# %% [markdown]
# ### Exercise 3
#
# In {eq}`model-flops` one term grows with $T^2$. For which $T$ is it as large
# as all the others together, in the 20b? And if sliding layers computed only
# the scores that they see?

# %% tags=["hide-cell"]
c = big
linear = 2 * (c.num_hidden_layers * (
    2 * D * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    + D * c.num_local_experts
    + 3 * c.num_experts_per_tok * c.intermediate_size * D) + D * V)
square = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim
print(f"T = {linear / square:,.0f}; with windows about "
      f"{2 * linear / square:,.0f}, as half of the layers drop out")

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
