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
#     module: vocabulary
#     public: [HarmonyError, merge_by_rank, merges_from_ranks,
#       tokenizer_json]
# ---

# %% [markdown]
# # How does text become tokens?

# %% [markdown]
# ## Question
#
# How does any text, one that nobody ever wrote before included, become the
# integers that [the model](../model/transformer.ipynb) reads? OpenAI published
# a list of 199,998 strings of bytes and one regular expression. That is all:
# the released tokenizer.json with its 446,189 merges follows from them, all
# 27,868,174 bytes of it.

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
# Figure: a sentence in three rows of boxes: characters, bytes, tokens. The é
# is one character and two bytes; a frequent word with the space before it is
# one token.
from importlib.resources import files

import matplotlib.pyplot as plt
from tokenizers import Tokenizer as Engine

plt.style.use("../_static/book.mplstyle")
POCKET = files("gptoss") / "pocket"
engine = Engine.from_file(str(POCKET / "tokenizer.json"))
sentence = "Once upon a time Ruby's café was gone."
rows = [("characters", [len(char.encode()) for char in sentence],
         list(sentence)),
        ("bytes", [1] * len(sentence.encode()),
         [f"{byte:02x}" for byte in sentence.encode()])]
found = engine.encode(sentence, add_special_tokens=False)
rows.append(("tokens", [len(piece) for piece in found.tokens],
             [str(token) for token in found.ids]))
fig, ax = plt.subplots(figsize=(7, 1.7))
for y, (name, widths, labels) in enumerate(rows):
    x = 0
    for n, (width, label) in enumerate(zip(widths, labels, strict=True)):
        ax.barh(-y, width, 0.8, x, color=f"C{n % 2}", alpha=0.35)
        ax.text(x + width / 2, -y, label, ha="center", va="center",
                fontsize=(7, 6, 5.5)[y])
        x += width
    ax.text(-0.4, -y, name, ha="right", va="center")
ax.set(xlim=(0, x), ylim=(-2.5, 0.5))
ax.axis("off")
plt.show()

# %% [markdown]
# One sentence as characters, as UTF-8 bytes (hexadecimal) and as the ids of
# the shipped tokenizer. A token is a run of bytes, not of characters: the é
# is two bytes, and a token may end between them. Frequent words, with the
# space before them, are one token.

# %% [markdown]
# ## The naive version
#
# One number a word fails at the first new word, one number a character at the
# first character that the table lacks, and Unicode grows every year. So tokens
# are made of bytes. But a token of bytes is no text by itself:

# %%
smile = engine.encode("🙂", add_special_tokens=False).ids
print(len(smile), "tokens, one by one:", [engine.decode([n]) for n in smile])
print("together:", engine.decode(smile))

# %% [markdown]
# The one character is spread over several tokens, and none of them can be
# shown alone. Whoever reads tokens one by one, as a stream does, has to wait
# until a character is whole.

# %% [markdown]
# ## Derivation
#
# **Bytes.** UTF-8 writes every character as one to four bytes, so a
# vocabulary that contains the 256 single bytes can write any text and has
# no unknown token. tokenizer.json is JSON and cannot hold bytes; it spells
# a token with one printable character a byte, by a fixed bijection
#
# $$ \beta : \{0, \dots, 255\} \to \text{characters}, $$ (harmony-alphabet)
#
# the identity where byte and character are printable Latin-1 (188 bytes),
# and U+0100, U+0101, … for the other 68. So a space is spelt Ġ (U+0120).
#
# **Merges.** Let $\rho$ be the rank of a token: its id. A piece of text
# starts as a row of parts $p_1 \dots p_n$, its single bytes. Two neighbours
# whose union is a token may be joined, and byte-pair encoding
# {cite}`bpe2016` joins again and again those of the lowest rank, the leftmost
# of equals,
#
# $$ i^\ast = \min \operatorname{argmin}_i \rho(p_i p_{i+1}) ,
#    $$ (harmony-merge)
#
# until no union is a token. A piece that is a token as a whole is taken as
# it is. Merges never cross the cuts that a regular expression makes first:
# they separate words, runs of up to three digits, punctuation and line ends.
#
# **The file lists merges, not ranks.** OpenAI publishes $\rho$ alone; the
# library wants pairs $(u, v)$ in order of precedence. The released file
# holds every way of splitting a token of the vocabulary $\mathcal{V}$ into
# two tokens,
#
# $$ \{(u, v) : u, v, uv \in \mathcal{V}\} \quad\text{ordered by}\quad
#    \big(\rho(uv),\, \rho(u),\, \rho(v)\big), $$ (harmony-merges)
#
# so the first merge that applies has the smallest $\rho(uv)$, as in
# {eq}`harmony-merge`. Whether ties end alike too (the leftmost there, here
# first the order of the pairs) is not obvious, and is tested below.

# %% [markdown]
# ## Code
#
# ### Bytes in disguise

# %% tags=["export"]
from collections.abc import Mapping

from gptoss.weights.errors import Error


class HarmonyError(Error):
    """A tokenizer, a text or a token that cannot be right."""


def byte_alphabet() -> tuple[str, ...]:
    """The 256 characters that stand for bytes 0 to 255 in tokenizer.json.

    Printable Latin-1 characters stand for themselves; the other 68 bytes
    take U+0100, U+0101 ... in order (GPT-2's table).
    """
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letter = {byte: chr(byte) for byte in shown}
    letter |= {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return tuple(letter[byte] for byte in range(256))


ALPHABET = byte_alphabet()
BYTE = {letter: byte for byte, letter in enumerate(ALPHABET)}


def byte_letters(data: bytes) -> str:
    """`data` as tokenizer.json spells it, one character a byte."""
    return "".join(ALPHABET[byte] for byte in data)

# %%
print(byte_letters(" café\n".encode()))
assert len(set(ALPHABET)) == 256

# %% [markdown]
# ### Merging by rank
#
# Equation {eq}`harmony-merge` as it stands: slow and obvious, to hold the
# library against.

# %% tags=["export"]
def merge_by_rank(piece: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Byte-pair encoding of one piece of text, the slow obvious way.

    A piece that is a token is that token. Else, from single bytes on, joins
    again and again the neighbours whose union has the lowest rank (the
    leftmost of equals). Needs every single byte of `piece` in `ranks`.
    Quadratic: a check, not a tool.
    """
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        joined = [left + right for left, right in zip(parts, parts[1:],
                                                      strict=False)]
        known = [(ranks[pair], at) for at, pair in enumerate(joined)
                 if pair in ranks]
        if not known:
            return [ranks[part] for part in parts]
        _, at = min(known)
        parts[at:at + 2] = [joined[at]]

# %%
ranks = {bytes([byte]): byte for byte in range(256)}
ranks |= {b"he": 256, b"th": 257, b"the": 258, b"re": 259}
print(merge_by_rank(b"there", ranks), merge_by_rank(b"three", ranks))

# %% [markdown]
# ### The merges, recovered from the ranks

# %% tags=["export"]
def merges_from_ranks(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every split of every token into two tokens, in order of precedence.

    Sorted by the rank of the whole, then of the left, then of the right
    part: the order of the merges in the released tokenizer.json.
    """
    found = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]

# %%
print(merges_from_ranks(ranks))

# %% [markdown]
# `the` is made from `t` and `he` or from `th` and `e`: both are in the list.
#
# ### The names of the control tokens
#
# Ids behind the ranks are control tokens: marks that a program puts between
# texts, by id. [Who may write them](tokenizer.ipynb) is a question of its own;
# here they need names, since the file lists them. In o200k_harmony ten of the
# 21 have one.

# %% tags=["export"]
RANKS = 199_998  # o200k: ids below are text, from here on control tokens
NAMED = {199_998: "startoftext", 199_999: "endoftext", 200_002: "return",
         200_003: "constrain", 200_005: "channel", 200_006: "start",
         200_007: "end", 200_008: "message", 200_012: "call",
         200_018: "endofprompt"}


def control_name(token: int) -> str:
    """The spelling of control token `token` in o200k_harmony."""
    return f"<|{NAMED.get(token, f'reserved_{token}')}|>"

# %%
print([control_name(n) for n in (199_998, 200_002, 200_004, 200_012)])

# %% [markdown]
# ### Cutting text into pieces

# %% tags=["export"]
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join((
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_TAIL}",  # word, Word
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_TAIL}",  # WORD
    r"\p{N}{1,3}",                                # up to three digits
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",                # punctuation
    r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"))         # line ends, spaces

# %%
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split

cut = Split(Regex(PATTERN), "isolated")
print([piece for piece, _ in cut.pre_tokenize_str(
    "Don't pay 12345 <|end|>\n\n  now")])

# %% [markdown]
# The name of a control token is cut around its word, so no token of a text
# can hold the whole of it.
#
# ### Writing tokenizer.json

# %% tags=["export"]
def tokenizer_json(ranks: Mapping[bytes, int],
                   control: Mapping[int, str] | None = None,
                   pattern: str = PATTERN) -> str:
    """The text of a tokenizer.json for a byte-level vocabulary.

    `ranks`: token bytes -> id; `control`: id -> name of the tokens that
    no text encodes to, whose ids follow the ranks (default: the 21 of the
    released file, which with o200k_base gives that file to the byte).
    """
    import tokenizers as hf

    if control is None:
        control = {n: control_name(n) for n in range(RANKS, RANKS + 21)}
    if list(control) != [*range(len(ranks), len(ranks) + len(control))]:
        raise HarmonyError(
            f"control tokens: expected ids from {len(ranks)} on without a "
            f"gap, found {list(control)}")

    built = hf.Tokenizer(hf.models.BPE(
        vocab={byte_letters(token): rank for token, rank in ranks.items()},
        merges=[(byte_letters(left), byte_letters(right))
                for left, right in merges_from_ranks(ranks)],
        ignore_merges=True, fuse_unk=False, byte_fallback=False))
    built.pre_tokenizer = hf.pre_tokenizers.Sequence([
        hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated"),
        hf.pre_tokenizers.ByteLevel(add_prefix_space=False,
                                    use_regex=False)])
    built.decoder = hf.decoders.ByteLevel()
    built.post_processor = hf.processors.ByteLevel(trim_offsets=False)
    built.add_special_tokens([
        hf.AddedToken(name, special=True, normalized=False)
        for name in control.values()])
    return built.to_str(pretty=True)

# %%
import json

own = tokenizer_json(ranks, {260: "<|end|>"})
print(json.loads(own)["added_tokens"][0]["content"], len(own), "characters")

# %% [markdown]
# ## It holds
#
# Every byte goes through {eq}`harmony-alphabet` and back, and the characters
# that stand for bytes can be printed: none is a space.

# %%
everything = bytes(range(256))
spelt = byte_letters(everything)
assert bytes(BYTE[letter] for letter in spelt) == everything
print(len(spelt), "characters,", sum(map(str.isspace, spelt)), "spaces;",
      sum(ord(letter) == byte for byte, letter in enumerate(spelt)),
      "stand for themselves")

# %% [markdown]
# The library's merges by {eq}`harmony-merges` against
# {eq}`harmony-merge`: all strings of up to eight letters a and b, under 40
# random vocabularies. Two letters make ties and overlaps as frequent as they
# can be.

# %%
import itertools
import random

from tokenizers import models

rng, compared = random.Random(0), 0
for _ in range(40):
    words = [b"a", b"b"]
    while len(words) < 12:
        word = rng.choice(words) + rng.choice(words)
        if word not in words and len(word) < 7:
            words.append(word)
    table = {word: rank for rank, word in enumerate(words)}
    trial = Engine(models.BPE(
        {word.decode(): rank for word, rank in table.items()},
        [(left.decode(), right.decode())
         for left, right in merges_from_ranks(table)], ignore_merges=True))
    for length in range(1, 9):
        for letters in map("".join, itertools.product("ab", repeat=length)):
            ids = trial.encode(letters).ids
            assert ids == merge_by_rank(letters.encode(), table)
            compared += 1
print(f"{compared:,} strings, equal")

# %% [markdown]
# ## Against the others
#
# The package `bpe-openai` carries the ranks of o200k that OpenAI publishes.
# From those `tokenizer_json` writes the released file, to the byte:

# %%
import base64
import gzip
import hashlib

raw = gzip.decompress(
    (files("bpe_openai.data") / "o200k_base.tiktoken.gz").read_bytes())
o200k = {base64.b64decode(token): int(rank)
         for token, rank in map(bytes.split, raw.splitlines())}
released = tokenizer_json(o200k)
found = hashlib.sha256(released.encode()).hexdigest()
print(f"{len(released.encode()):,} bytes, sha256 {found[:16]}...")
assert found == (
    "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3")

# %% [markdown]
# ## In the 20b and the 120b
#
# Both use one vocabulary, o200k_harmony: 199,998 ranks and 21 control tokens.

# %%
merges = json.loads(released)["model"]["merges"]
lengths = [len(token) for token in o200k]
print(f"{len(o200k):,} ranks, {len(merges):,} merges, "
      f"{len(json.loads(released)['added_tokens'])} control tokens")
print(f"a token has {sum(lengths) / len(lengths):.1f} bytes on average and "
      f"at most {max(lengths)}")

# %% [markdown]
# ## Cost
#
# A merge looks at all neighbours again: a piece of $n$ bytes that needs $m$
# merges costs $\sum_{i=0}^{m} (n - 1 - i)$ look-ups the slow way, which is
# $O(n^2)$. A heap of candidate pairs makes it $O(n \log n)$; the library
# has one. It matters for text without spaces, where a piece is long.

# %%
class Counted(dict):
    """A dict that counts how often it is asked whether it has a key."""

    asked = 0

    def __contains__(self, key: object) -> bool:
        self.asked += 1
        return super().__contains__(key)


for n in (40, 80, 160):
    counted = Counted({b"a": 0} | {b"a" * 2 ** k: k for k in range(1, 6)})
    merges = n - len(merge_by_rank(b"a" * n, counted))
    # one more for the piece as a whole
    assert counted.asked == 1 + sum(n - 1 - i for i in range(merges + 1))
    print(n, "bytes:", counted.asked, "look-ups")

# %% [markdown]
# ## Takeaways
#
# - 256 byte tokens and a list of merges write any text; there is no unknown
#   token, and a token may end within a character.
# - The merges follow from the ranks: every split of a token into two tokens,
#   in the order of {eq}`harmony-merges`. The released tokenizer.json follows
#   from the public ranks, to the byte.
# - Merges never cross the cuts of the regular expression.
#
# ## Exercises
#
# ### Exercise 1
#
# Some of the 256 byte tokens can never come out of `encode`. Which, and why
# does the vocabulary hold them all the same?

# %% tags=["hide-cell"]
every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
never = sorted(set(range(256)) - set(every.encode()))
print([f"{byte:02X}" for byte in never])
# C0 and C1 would start two-byte forms of ASCII, F5 to FF characters beyond
# U+10FFFF. A model may still emit them; decoding shows U+FFFD.
assert len(never) == 13

# %% [markdown]
# ### Exercise 2
#
# Find a vocabulary and a piece for which the rule "a piece that is a token is
# taken as it is" changes the result.

# %% tags=["hide-cell"]
table = {word: rank for rank, word in enumerate(
    [b"a", b"b", b"ba", b"aba", b"bb", b"bbaba"])}


def merged_only(piece: bytes) -> list[int]:
    """merge_by_rank without its first rule."""
    others = {word: rank for word, rank in table.items() if word != piece}
    return merge_by_rank(piece, others)


# bbaba -> b ba ba, and no union of these neighbours but the whole is a token
print(merge_by_rank(b"bbaba", table), merged_only(b"bbaba"))
assert merge_by_rank(b"bbaba", table) == [5] != merged_only(b"bbaba")

# %% [markdown]
# ## Sources
#
# - Byte-pair encoding for text: {cite}`bpe2016`. The model card names the
#   vocabulary and its control tokens: {cite}`gptoss2025`.
# - openai/tiktoken, `src/lib.rs` (`byte_pair_encode`, the whole-piece rule)
#   and `tiktoken_ext/openai_public.py` (the regular expression of o200k).
# - huggingface/tokenizers, `tokenizers/src/models/bpe/model.rs`.
# - The ranks: PyPI package bpe-openai 0.1.4, `data/o200k_base.tiktoken.gz`.
