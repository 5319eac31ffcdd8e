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
#     module: convert
#     public: [resolve]
# ---

# %% [markdown]
# # How is one layout turned into another?
#
# ## Question
#
# One gpt-oss comes in three layouts: Hugging Face's, OpenAI's, and with its
# experts decoded to bf16. The last takes three times the bytes of the others.
# How is a checkpoint of 65 GB carried from one to another in 64 MiB of memory,
# and how do we know that it is still the same model? (This chapter may be
# skipped at first.)

# %% tags=["export"]
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.config import GptOssConfig
from gptoss.weights.config_file import read_json
from gptoss.weights.encoding import encode
from gptoss.weights.layout import PACKED, CheckpointError, faulty
from gptoss.weights.mxfp4 import MXFP4Error, decode
from gptoss.weights.write import (
    MAX_SHARD_BYTES,
    Writer,
    json_file,
    new_folder,
)

# %% tags=["export:hub"]
import re
from pathlib import Path

from gptoss.weights.layout import CheckpointError

# %%
import hashlib
import json
import tempfile

import torch

from gptoss.weights.layout import LAYOUTS
from gptoss.weights.sizes import bf16_bytes, checkpoint_bytes
from gptoss.weights.write import random_tensors, write_checkpoint

SMALL = GptOssConfig.gpt_oss_20b()

# %% [markdown]
# ## Picture
#
# Some tensors of a layer in the three layouts. An arrow says what is done with
# the rows of a tensor on the way from one to the other.
#
# What to see: between the two released layouts nothing is computed. q, k and
# v are rows of one matrix, everything else has only another name. The layout
# on the right is another thing: blocks and scales are decoded, and the matrix
# is turned, (E, in, out) instead of (E, out, in).

# %% tags=["hide-input"]
# Figure: three columns of boxes. OpenAI's: qkv, mlp1_weight.blocks and scales.
# Hugging Face's: q, k, v, gate_up_proj_blocks and scales, joined by lines
# marked as copies. Decoded: q, k, v as copies, and one gate_up_proj, marked as
# decoded and turned.
import matplotlib.pyplot as plt

plt.style.use("../_static/book.mplstyle")
fig, ax = plt.subplots(figsize=(7, 2.7))
ROWS = {"q": (6, 1.4, "C0"), "k": (5.2, 0.6, "C0"), "v": (4.4, 0.6, "C0"),
        "gate_up_proj_blocks": (2, 1.8, "C1"),
        "gate_up_proj_scales": (0.9, 0.7, "C5")}
for name, (bottom, height, colour) in ROWS.items():
    for x in (0, 4, 8):
        if name.startswith("gate") and x == 8:
            continue
        ours = {"q": "", "k": "qkv", "v": "",
                "gate_up_proj_blocks": "mlp1_weight.blocks",
                "gate_up_proj_scales": "mlp1_weight.scales"}
        ax.add_patch(plt.Rectangle((x, bottom), 2.3, height, fc=colour,
                                   alpha=0.4, ec="none" if x == 0 and
                                   not name.startswith("g") else "black"))
        ax.text(x + 1.15, bottom + height / 2, ours[name] if x == 0 else name,
                ha="center", va="center", fontsize=7)
    ends = (2.3, 6.3) if not name.startswith("gate") else (2.3,)
    for x in ends:
        ax.annotate("", (x + 1.7, bottom + height / 2), (x, bottom + height
                    / 2), arrowprops={"arrowstyle": "<->", "lw": 0.8})
ax.add_patch(plt.Rectangle((0, 4.4), 2.3, 3, fill=False, ec="black"))
ax.add_patch(plt.Rectangle((8, 0.9), 2.3, 2.9, fc="C2", alpha=0.4,
                           ec="black"))
ax.text(9.15, 2.35, "gate_up_proj", ha="center", va="center", fontsize=7)
ax.annotate("", (8, 2.35), (6.3, 2.35), arrowprops={"arrowstyle": "<->"})
for x, y, word in ((3.15, 5.95, "copied"), (3.15, 3.1, "copied"),
                   (7.15, 5.95, "copied"), (7.15, 2.9, "decoded,\nturned")):
    ax.text(x, y, word, ha="center", va="center", fontsize=7)
for x, word in ((1.15, "original"), (5.15, "hf"), (9.15, "bf16")):
    ax.text(x, 7.8, word, ha="center", family="monospace")
ax.set(xlim=(-0.1, 10.4), ylim=(0.7, 8.4))
ax.set_axis_off()
plt.show()

# %% [markdown]
# ## The naive version
#
# Load everything, change the dictionary, save it. For the 20b, to the layout
# with decoded experts, that needs this much memory:

# %%
old, new = checkpoint_bytes(SMALL) / 1e9, bf16_bytes(SMALL) / 1e9
print(f"{old:.1f} GB + {new:.1f} GB = {old + new:.0f} GB,",
      f"{new / old:.1f} times the bytes in the new file")

# %% [markdown]
# But no tensor needs another one, except blocks their scales. So we go
# through the file a tensor at a time, and through a tensor a few rows at a
# time. [The reader](reading.ipynb) gives rows as views, and
# [the writer](writing.ipynb) takes them in any order.
#
# ## What becomes of one tensor?
#
# One function answers that, and yields pieces: a canonical name, the first
# row, and some rows. Rows are copied 64 MiB at a time; floats of another
# dtype are rounded to bf16. An expert is [decoded](mxfp4.ipynb) or
# [encoded](encoding.ipynb) alone, since it is a row. A scale of 255 in the
# source, or a NaN in a decoded expert, is an error that names file and tensor.

# %% tags=["export"]
_log = logging.getLogger("gptoss")

CHUNK = 2 ** 26  # bytes copied at a time
Piece = tuple[str, int, Tensor]  # canonical name, first row, rows


def _pieces(old: Checkpoint, name: str, layout: str) -> Iterator[Piece]:
    """What `layout` makes of one tensor of `old`, a few rows at a time."""
    dense = name.endswith(("gate_up_proj", "down_proj"))
    if name.endswith("_scales"):
        old.check_scales(name)
    if layout == "bf16" and name.endswith(PACKED):
        if name.endswith("_blocks"):
            yield from _unpacked(old, name.removesuffix("_blocks"))
    elif layout != "bf16" and dense:
        yield from _packed(old, name)
    else:
        yield from _copied(old, name)

# %% tags=["export"]
def _copied(old: Checkpoint, name: str) -> Iterator[Piece]:
    """Rows as they are; floats of another dtype are rounded to bf16."""
    spec = old.spec(name)
    step = max(1, CHUNK * spec.shape[0] // spec.nbytes)
    for start in range(0, spec.shape[0], step):
        rows = old.read(name, slice(start, start + step))
        yield name, start, rows if spec.dtype == "U8" else rows.bfloat16()


def _unpacked(old: Checkpoint, name: str) -> Iterator[Piece]:
    """MXFP4 -> bf16, one expert at a time, transposed to (in, out)."""
    for e in range(old.config.num_local_experts):
        blocks, scales = (old.read(name + part, slice(e, e + 1))
                          for part in PACKED)
        yield name, e, decode(blocks, scales).transpose(1, 2)


def _packed(old: Checkpoint, name: str) -> Iterator[Piece]:
    """Floats (in, out) -> MXFP4 (out, in), one expert at a time."""
    for e in range(old.config.num_local_experts):
        values = old.read(name, slice(e, e + 1)).transpose(1, 2)
        try:
            pair = encode(values)
        except MXFP4Error as error:
            raise CheckpointError(f"{old.file(name)}: {name}, expert {e}: "
                                  f"{error}") from error
        for part, rows in zip(PACKED, pair, strict=True):
            yield name + part, e, rows

# %% [markdown]
# ## Which files come along?
#
# A new folder should be one that other programs can use, so the small files
# beside the weights come along: those on a list, by their names. A pattern
# such as `*.json` would be shorter, and would publish whatever else lies
# there. For the same reason a link is followed only to where its folder
# leads anyway: the folder itself, or the store of the hub's cache, whose
# folders are links throughout. The files of `original/` may lie in the folder
# above it, where the released ones are.

# %% tags=["export"]
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "generation_config.json", "chat_template.jinja",
    "chat_template.json", "README.md", "LICENSE", "LICENSE.txt",
    "LICENSE.md", "NOTICE", "USAGE_POLICY", "USAGE_POLICY.md")


def home_file(folder: Path, name: str) -> Path | None:
    """A small file of a model: in its folder or, for original/ alone, in
    the folder above, where the released ones lie."""
    places = [folder]
    if folder.resolve().name == "original":
        places.append(folder.resolve().parent)
    return next((place / name for place in places
                 if (place / name).is_file()), None)

# %% tags=["export"]
def companions(old: Checkpoint) -> list[Path]:
    """Tokenizer, generation_config and the like beside the weights."""
    found = [home_file(old.folder, name) for name in COMPANIONS]
    return [file for file in found if file and _stays(file)]


def _stays(file: Path) -> bool:
    """Whether a file is where its folder says; if not, one line of log."""
    folder, real = file.parent.resolve(), file.resolve().parent
    store = folder.parent.parent / "blobs"
    if real == folder or (folder.parent.name, real) == ("snapshots", store):
        return True
    _log.warning("%s: a link that leaves its folder is not copied", file)
    return False

# %%
folder = tempfile.TemporaryDirectory()
here = Path(folder.name)
TINY = GptOssConfig(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=256, hidden_size=64, intermediate_size=96, head_dim=16,
    num_attention_heads=6, num_key_value_heads=2, sliding_window=8)
manifest = write_checkpoint(here / "hf", TINY, random_tensors(TINY))
for name in ("README.md", "secrets.json"):
    (here / "hf" / name).write_text("{}")
with Checkpoint.open(here / "hf") as checkpoint:
    print([file.name for file in companions(checkpoint)])

# %% [markdown]
# ## The whole conversion
#
# OpenAI's spelling of the configuration has no token ids; the released
# `generation_config.json` has them, and they are taken from there. Then
# `convert` puts the parts together. It writes one file more, `manifest.json`,
# with a hash of every canonical tensor. These are hashes of numbers, not of
# files, so one model has the same in both released layouts, in one file or in
# many.

# %% tags=["export"]
def _config_for(old: Checkpoint, extra: list[Path]) -> GptOssConfig:
    """The configuration to write, with the ids that only
    generation_config.json says."""
    files = [f for f in extra if f.name == "generation_config.json"]
    if old.layout != "original" or not files:
        return old.config
    said = read_json(files[0])
    if not isinstance(said, dict):
        raise faulty(files[0], "a JSON object", type(said).__name__)
    ids = {key: said[key] for key in ("eos_token_id", "pad_token_id")
           if said.get(key) is not None}
    return GptOssConfig.from_dict(old.config.to_hf_dict() | ids,
                                  str(files[0]))

# %% tags=["export"]
def convert(source: str | Path, target: str | Path, layout: str,
            max_shard_bytes: int = MAX_SHARD_BYTES,
            progress: Callable[[str], None] | None = None
            ) -> dict[str, str]:
    """Rewrite a checkpoint in another layout (or the same, resharded).

    hf <-> original keeps every byte; to "bf16" decodes, which is exact as
    far as bf16 reaches; from "bf16" encodes, which rounds what is not on
    the MXFP4 grid. The new folder `target` also gets manifest.json, the
    returned canonical name -> sha256, and the tokenizer and other small
    files. progress(name) is called before each tensor of the source.
    Memory: 64 MiB of rows, and one mapped tensor of the source at a time.
    CheckpointError; nothing half-written.
    """
    with Checkpoint.open(source) as old, new_folder(Path(target)) as draft:
        extra = companions(old)
        writer = Writer(draft, _config_for(old, extra), layout,
                        max_shard_bytes)
        for source_name in old.names():
            if progress:
                progress(source_name)
            for name, start, rows in _pieces(old, source_name, layout):
                writer.put(name, rows, start)
            old.close()  # unmap: pages read so far count as memory in use
        manifest = writer.finish(extra)
        json_file(draft / "manifest.json", manifest)
    return manifest

# %%
there = convert(here / "hf", here / "original", "original")
back = convert(here / "original", here / "again", "hf", 50_000)
convert(here / "hf", here / "bf16", "bf16")
print("tensors with the hash that they had:", sum(
    manifest[name] == there[name] == back[name] for name in manifest), "of",
    len(manifest))
for layout in LAYOUTS:
    size = (here / ("again" if layout == "hf" else layout)).glob("model*")
    print(f"{layout:8} {sum(f.stat().st_size for f in size):,} bytes")

# %% [markdown]
# ## What does a name of the hub mean?
#
# A name like `openai/gpt-oss-20b` is a folder if there is one and otherwise
# a repository, which `huggingface_hub` fetches into the cache that HF_HOME
# names, or not at all if HF_HUB_OFFLINE is set. A broken download goes on
# where it stopped. What is not of the form owner/name can only be a path, and
# so is a `Path` object: a mistyped path must not travel over the network.
# Whatever goes wrong is one line of a `CheckpointError`.

# %% tags=["export:hub"]
def is_repo_id(text: str) -> bool:
    """Whether `text` can be a hub id, owner/name, and not a path."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII) is not None


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is; a hub id (owner/name) as its downloaded one.

    Only a string of exactly that form, with no such file or folder here, is
    asked for at the hub: JSON and safetensors of the repository's root, at
    `revision` (branch, tag or commit), resumed and cached as HF_HOME and
    HF_HUB_OFFLINE say. CheckpointError, in one line, if that fails.
    """
    try:
        local = Path(path).expanduser()
        if local.exists():
            return local
    except RuntimeError:
        raise CheckpointError(f"{path}: no such user") from None
    if isinstance(path, Path) or not is_repo_id(path):
        raise CheckpointError(f"{path}: no such directory"
                              " (and a hub id is owner/name)")
    return _fetch(path, revision)

# %% tags=["export:hub"]
def _fetch(path: str, revision: str | None) -> Path:
    at = f"{path} at revision {revision}" if revision else path
    try:
        import huggingface_hub.constants  # noqa: F401  it reads HF_...
    except ValueError as error:
        raise CheckpointError(f"{at}: no such directory, and a setting HF_... "
                              f"of the environment: {error}") from error
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(
            path, revision=revision, ignore_patterns=["*/*"],
            allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the client has many kinds, and so its own
        raise CheckpointError(f"{at}: no such directory, and "
                              f"{_why(error)}") from error


def _why(error: Exception) -> str:
    """What went wrong at the hub, in a line."""
    from huggingface_hub import constants, errors

    known = {errors.GatedRepoError:
             "the hub wants a token with access (hf auth login)",
             errors.RepositoryNotFoundError:
             "the hub knows no such repository",
             errors.RevisionNotFoundError: "the hub knows no such revision",
             errors.LocalEntryNotFoundError: "the hub cannot be reached"}
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the cache has none"
    for kind, why in known.items():
        if isinstance(error, kind):
            return why
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return f"{constants.ENDPOINT} cannot be asked: {line}"

# %%
for text in ("openai/gpt-oss-20b", "./gpt-oss-20b", "gpt-oss-20b",
             "models/openai/gpt-oss-20b", "~/gpt-oss-20b"):
    print(f"{text:26}", "hub" if is_repo_id(text) else "path")
try:
    resolve("./gpt-oss-20b")
except CheckpointError as error:
    print(error)

# %% [markdown]
# ## It holds
#
# Decoding to bf16 and encoding again gives equal values, and here even equal
# bytes, because each of these random blocks contains a 4 or a 6 (see
# [encoding](encoding.ipynb)):

# %%
back = convert(here / "bf16", here / "packed-again", "hf")
assert back == manifest
print(sum(back[name] == manifest[name] for name in manifest), "of",
      len(manifest), "tensors have the same hash")

# %% [markdown]
# **A file of the safetensors library** in OpenAI's layout converts to the same
# hashes:

# %%
from safetensors.torch import load_file, save_file

(here / "saved").mkdir()
save_file(load_file(here / "original" / "model.safetensors"),
          here / "saved" / "model.safetensors")
(here / "saved" / "config.json").write_bytes(
    (here / "original" / "config.json").read_bytes())
theirs = convert(here / "saved", here / "x", "hf")
assert theirs == manifest
print(sum(theirs[name] == manifest[name] for name in manifest), "of",
      len(manifest))

# %% [markdown]
# The rows of q, k and v that OpenAI's `AttentionBlock` cuts out of its
# product with the joined matrix are thus the rows of our three products.
#
# ## Cost
#
# Let $b$ be the bytes of the numbers and $P$ the parameters.
#
# | operation | reads | writes | memory of its own |
# |---|---|---|---|
# | hf to original, or back | $b$ | $b$ | 64 MiB of rows |
# | to bf16 | $b$ | $2P$ | one expert |
#
# A test holds the memory of converting below the bytes of the file.
#
# ## Takeaways
#
# - The two released layouts hold the same bytes: converting between them
#   copies rows, and the hashes of all tensors stay.
# - To bf16 and back each expert is decoded and encoded alone. Values return
#   always, bytes where the blocks are canonical.
# - What is copied along stands on a list; what is asked of the hub has
#   exactly the form owner/name.
#
# ## Exercises
#
# ### Exercise 1
#
# Write `verify(path)`, which names the tensors that do not have the hash in
# `manifest.json`. Flip one bit of a file: the header is whole and
# `Checkpoint.open` is content, but `verify` is not.

# %% tags=["hide-cell"]
def verify(path):
    wanted = json.loads((path / "manifest.json").read_text())
    with Checkpoint.open(path) as checkpoint:
        for name, digest in wanted.items():
            data = checkpoint.read(name).flatten().view(torch.uint8)
            if hashlib.sha256(memoryview(data.numpy())).hexdigest() != digest:
                yield name


shard = sorted((here / "again").glob("*.safetensors"))[1]
print("before:", list(verify(here / "again")))
data = bytearray(shard.read_bytes())
data[-1] ^= 1
shard.write_bytes(data)
print("after: ", list(verify(here / "again")))

# %% [markdown]
# ### Exercise 2
#
# Decode to bf16 and encode again, but set all scales of one tensor to 0 and
# its codes to the smallest before. Which tensors keep their hash, and which
# would not if the scale were 1?

# %% tags=["hide-cell"]
for scale in (0, 1):
    tensors = dict(random_tensors(TINY))
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name + "_blocks"].fill_(0x11)  # 0.5, 0.5, ...
    tensors[name + "_scales"].fill_(scale)
    first = write_checkpoint(here / f"s{scale}", TINY, tensors.items())
    convert(here / f"s{scale}", here / f"wide{scale}", "bf16")
    last = convert(here / f"wide{scale}", here / f"back{scale}", "hf")
    print(f"scale {scale}: other bytes in",
          [n.split(".")[-1] for n in first if first[n] != last[n]])
print("at scale 0 every block is canonical; at 1 the encoder finds scale 0",
      "and codes twice as large")

# %% [markdown]
# ### Exercise 3
#
# How many bytes does the conversion of the 20b to bf16 and back read and
# write in all? At 2 GB/s for both, how long does it take at least?

# %% tags=["hide-cell"]
total = 2 * (checkpoint_bytes(SMALL) + bf16_bytes(SMALL))
print(f"{total / 1e9:.0f} GB, {total / 2e9:.0f} s")
folder.cleanup()

# %% [markdown]
# ## Sources
#
# - openai/gpt-oss, `gpt_oss/torch/model.py`, `AttentionBlock`.
# - transformers 5.23, `models/gpt_oss/convert_gpt_oss_weights_to_hf.py`
#   (q, k and v taken apart).
# - huggingface_hub: `snapshot_download`.
