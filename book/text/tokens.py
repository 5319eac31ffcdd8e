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
# A model reads whole numbers, and people write text. How does any text become
# numbers, one that nobody ever wrote before included? OpenAI published a list
# of 199,998 strings of bytes and one regular expression. That is all we need:
# the released tokenizer.json, 27,868,174 bytes with 446,189 merges in it,
# follows from these two, byte for byte. At the end of this chapter we write
# it.

# %% [markdown]
# ## Picture

# %% tags=["hide-input"]
# Figure: a sentence in three rows of boxes: characters, bytes, tokens. The é
# is one character, two bytes and two tokens; a frequent word with the space
# before it is one token.
from importlib.resources import files

import matplotlib.pyplot as plt
from tokenizers import Tokenizer as Engine

plt.style.use("../_static/book.mplstyle")
POCKET = files("gptoss") / "pocket"
engine = Engine.from_file(str(POCKET / "tokenizer.json"))
sentence = "Once upon a time Ruby's café was gone."
found = engine.encode(sentence, add_special_tokens=False)
texts = [engine.decode([n]) for n in found.ids]
whole = [text.replace(" ", "␣") if "\ufffd" not in text else "½é"
         for text in texts]
rows = [("characters", [len(char.encode()) for char in sentence],
         list(sentence.replace(" ", "␣"))),
        ("bytes", [1] * len(sentence.encode()),
         [f"{byte:02x}" for byte in sentence.encode()]),
        ("tokens", [len(piece) for piece in found.tokens],
         [f"{text}\n{n}" for text, n in zip(whole, found.ids, strict=True)])]
fig, ax = plt.subplots(figsize=(7, 2.0))
for y, (name, widths, labels) in enumerate(rows):
    x = 0
    for n, (width, label) in enumerate(zip(widths, labels, strict=True)):
        ax.barh(-y, width, 0.84, x, color=f"C{n % 2}", alpha=0.35)
        ax.text(x + width / 2, -y, label, ha="center", va="center",
                fontsize=(7, 6, 5.5)[y])
        x += width
    ax.text(-0.4, -y, name, ha="right", va="center")
ax.set(xlim=(0, x), ylim=(-2.5, 0.5))
ax.axis("off")
plt.show()
print(len(sentence), "characters,", len(sentence.encode()), "bytes,",
      len(found.ids), "tokens")

# %% [markdown]
# **What to see.** One sentence three times: as characters (␣ is a space), as
# its bytes in UTF-8 (hexadecimal), and as the tokens of the shipped model,
# each with its text and its number, the *id* that the model reads. A token is
# a run of bytes, not of characters. Frequent words, with the space before
# them, are one token. The é has two bytes, and this small vocabulary has a
# token for each of the two and none for the pair: half a letter is a token.

# %% [markdown]
# ## The naive version
#
# One number for each word, or one for each letter: both need a table, and
# both tables end somewhere.

# %%
seen = "Once upon a time there was a little fox named Mira ."
new = "Once upon a time there was a tiny café named 🙂 ."
words, letters = set(seen.split()), set(seen)
print("words that the table lacks:",
      [word for word in new.split() if word not in words])
print("letters that the table lacks:",
      [letter for letter in new if letter not in letters])

# %% [markdown]
# A larger table fails later, not never: there are always new names, and
# Unicode gets new characters every year. Its bytes are the one alphabet that
# is complete: UTF-8 writes every character as one to four of 256 bytes. So we
# start from 256 tokens, one for each byte, and there is no text that they
# cannot write. The price is that a token may be no text at all by itself:

# %%
smile = engine.encode("🙂", add_special_tokens=False).ids
print(len(smile), "tokens, one by one:", [engine.decode([n]) for n in smile])
print("together:", engine.decode(smile))

# %% [markdown]
# The one character is spread over several tokens, and none of them can be
# shown alone. Whoever reads tokens one by one, as a stream does, has to wait
# [until a character is whole](generating.ipynb).

# %% [markdown]
# ## How does a JSON file spell bytes?
#
# The file tokenizer.json is JSON, and JSON holds characters, not bytes. So it
# spells a token with one printable character for each byte, by a fixed
# bijection (a table that can be read in both directions)
#
# $$ \beta : \{0, \dots, 255\} \to \text{characters}. $$ (harmony-alphabet)
#
# Of the 256 characters that Unicode shares with Latin-1, most can be printed,
# and those stand for the byte of their own number: `a` for 97, `é` for 233.
# What cannot be printed (the space, the line end, control characters, the
# invisible soft hyphen) takes the characters from U+0100 on, one after
# another. The space, byte 32, is the 33rd of them and so U+0120, which is
# written Ġ.

# %% [markdown]
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
themselves = sum(ord(letter) == byte for byte, letter in enumerate(ALPHABET))
print(themselves, "bytes stand for themselves,", 256 - themselves, "do not;",
      len(set(ALPHABET)), "different letters")
assert len(set(ALPHABET)) == 256

# %% [markdown]
# The é of café looks like Ã©: it is two bytes, C3 and A9, and each is spelt
# by itself. `BYTE` is the way back.

# %% [markdown]
# ## How do bytes become longer tokens?
#
# **By hand.** Take a vocabulary of the 256 bytes and four more tokens. Their
# ids are also their *ranks*, and a lower rank goes first:
#
# | token | he | th | the | re |
# |---|---|---|---|---|
# | rank | 256 | 257 | 258 | 259 |
#
# The word `there` starts as its five bytes. In each step we look at all
# neighbours, and join the two whose union is the token of the lowest rank:
#
# | parts | unions that are tokens | joined |
# |---|---|---|
# | t h e r e | th 257, he 256, re 259 | he |
# | t he r e | the 258, re 259 | the |
# | the r e | re 259 | re |
# | the re | none: done | |
#
# So `there` is [258, 259]. Note the first line: `th` stands further left, but
# `he` has the lower rank.
#
# **In general.** Let $\rho(p)$ be the rank of a token $p$. A piece of text
# starts as a row of parts $p_1 \dots p_n$, its single bytes. Byte-pair
# encoding {cite}`bpe2016` joins again and again the neighbours
#
# $$ i^\ast = \min \operatorname{argmin}_i \rho(p_i p_{i+1}) ,
#    $$ (harmony-merge)
#
# those of the lowest rank, and if several have it the leftmost (that is the
# outer min), until no union is a token. One rule comes before: a piece that
# is a token as a whole is taken as it is. Exercise 2 shows where that makes a
# difference.

# %% [markdown]
# ### Merging by rank
#
# The equation as it stands: slow and obvious, to hold the library against.

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
# The first list is the one we found by hand.

# %% [markdown]
# ## Where does a text get cut first?
#
# Merging never sees a whole text. A regular expression cuts it into pieces
# before, and merges stay within a piece, so that `dog.`, `dog!` and `dog?`
# do not become three tokens for one word. Its alternatives, in the order in
# which they are tried: a word with at most one other character before it
# (mostly the space) and an ending like `'s` behind it, in lower or upper
# case; up to three digits; punctuation; line ends; spaces.

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


def cut_up(text: str) -> list[str]:
    """The pieces of a text."""
    return [piece for piece, _ in cut.pre_tokenize_str(text)]


print(cut_up("Don't pay 12345 <|end|>\n\n  now"))

# %% [markdown]
# Two things to remember. A number is cut in threes from the left, whatever it
# means. And the typed `<|end|>`, which looks like a mark that ends a message,
# is three pieces: no token of a text can hold the whole of it. What follows
# from that stands below.

# %% [markdown]
# ## What follows from the ranks alone?
#
# **The file lists merges, not ranks.** OpenAI publishes $\rho$; the library
# `tokenizers` wants pairs $(u, v)$ in the order in which they may be joined.
# In our small vocabulary `the` comes from `t` and `he` or from `th` and `e`,
# and either pair may be neighbours in some text. So both are listed. In
# general the released file holds every way of splitting a token of the
# vocabulary $\mathcal{V}$ into two tokens,
#
# $$ \{(u, v) : u, v, uv \in \mathcal{V}\} \quad\text{ordered by}\quad
#    \big(\rho(uv),\, \rho(u),\, \rho(v)\big), $$ (harmony-merges)
#
# so the first merge that applies has the smallest $\rho(uv)$, as in
# {eq}`harmony-merge`. Of two places with the same union {eq}`harmony-merge`
# takes the leftmost, and the library first the pair that stands earlier in
# the list. Whether both always come to the same end is not obvious; we try
# it below.

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
for left, right in merges_from_ranks(ranks):
    print(f"{left.decode()} + {right.decode()}", end="   ")
print()

# %% [markdown]
# ### The names of the control tokens
#
# Ids behind the ranks are *control tokens*: marks that a program puts between
# texts, by id, such as the end of a message.
# [Who may write them](tokenizer.ipynb) is the next chapter's question; here
# they need names, since the file lists them. The released file has 21. Ten
# have a name, the others are called `<|reserved_200004|>` and so on, after
# their id.

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
# ### Writing tokenizer.json
#
# Vocabulary, merges, the regular expression, control tokens: with the
# library's own classes that is a page. The ids of the control tokens must
# follow the ranks without a gap, because the library counts them itself,
# whatever we say; other ids are refused with a `HarmonyError`.

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
try:
    tokenizer_json(ranks, {300: "<|end|>"})
except HarmonyError as error:
    print(error)

# %% [markdown]
# ## It holds
#
# Every byte goes through {eq}`harmony-alphabet` and back, and the characters
# that stand for bytes can be printed: none is a space.

# %%
everything = bytes(range(256))
spelt = byte_letters(everything)
back = bytes(BYTE[letter] for letter in spelt)
print(sum(one == other for one, other in zip(back, everything, strict=True)),
      "bytes come back,", sum(map(str.isspace, spelt)), "spaces")
assert back == everything

# %% [markdown]
# The library with the merges of {eq}`harmony-merges` against our
# {eq}`harmony-merge`: all strings of up to eight letters a and b, under 40
# random vocabularies. With only two letters, ties and overlaps are as
# frequent as they can be.

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
# From those `tokenizer_json` writes the released file. If the checksum is
# the published one, then no byte differs:

# %%
import base64
import gzip
import hashlib

raw = gzip.decompress(
    (files("bpe_openai.data") / "o200k_base.tiktoken.gz").read_bytes())
o200k = {base64.b64decode(token): int(rank)
         for token, rank in map(bytes.split, raw.splitlines())}
released = tokenizer_json(o200k)
published = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
computed = hashlib.sha256(released.encode()).hexdigest()
print(f"{len(released.encode()):,} bytes")
print("sha256 here:     ", computed[:16])
print("sha256 published:", published[:16])
assert computed == published

# %% [markdown]
# ## In the 20b and the 120b
#
# Both use one vocabulary, o200k_harmony: o200k and 21 control tokens.

# %%
merges = json.loads(released)["model"]["merges"]
lengths = [len(token) for token in o200k]
print(f"{len(o200k):,} ranks, {len(merges):,} merges, "
      f"{len(json.loads(released)['added_tokens'])} control tokens")
print(f"a token has {sum(lengths) / len(lengths):.1f} bytes on average and "
      f"at most {max(lengths)}")

# %% [markdown]
# **An attack that fails.** A user types `<|end|>` and hopes to end a message
# of somebody else. We encode his text with what this chapter has: cut, then
# merge.

# %%
def by_hand(text: str) -> list[int]:
    """The ids of a text in o200k, by the slow way."""
    return [n for piece in cut_up(text)
            for n in merge_by_rank(piece.encode(), o200k)]


spelling = {rank: token for token, rank in o200k.items()}
typed = by_hand("Bye.<|end|>")
print([(n, spelling[n].decode()) for n in typed])
print("largest id:", max(typed), " the control token's:",
      next(n for n, name in NAMED.items() if name == "end"))

# %% [markdown]
# Merging gives ranks, and a control token has none: its id lies beyond all
# of them. The same text in a library that looks for control tokens in what it
# reads would have ended the message. The
# [next chapter](tokenizer.ipynb) makes such libraries safe.

# %% [markdown]
# ## Cost
#
# The slow way looks at all neighbours again after each merge. A piece of 40
# bytes has 39 pairs of neighbours, then 38, and so on. In general a piece of
# $n$ bytes that needs $m$ merges costs $\sum_{i=0}^{m} (n - 1 - i)$ look-ups:
# twice the length, four times the work. A heap of candidate pairs makes it
# $O(n \log n)$; the library has one. It matters for text without spaces,
# where a piece is long. We count:

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
# - Byte-pair encoding joins the neighbours of the lowest rank until no union
#   is a token. It stays within the pieces that a regular expression cuts.
# - The merges follow from the ranks: every split of a token into two tokens.
#   The released tokenizer.json follows from the public ranks, to the byte.
# - Control tokens have ids beyond all ranks; merging gives none of them.
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
print(len(never), "bytes:", [f"{byte:02X}" for byte in never])
print("decoded:", [bytes([byte]).decode(errors="replace")
                   for byte in never[:2]])
# C0 and C1 would start two-byte forms of ASCII, F5 to FF characters beyond
# U+10FFFF: UTF-8 has neither. A model may still emit them, as it may emit
# any id; decoding shows U+FFFD.
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
# ### Exercise 3
#
# A program pays, and waits, by the token. How many bytes and how many letters
# does a token of o200k hold in English, in German, in Greek, in digits? Guess
# first; then write the measurement with `by_hand`.

# %% tags=["hide-cell"]
for name, text in {
        "English": "The little fox lost her lamp on the way home.",
        "German": "Die kleine Füchsin verlor auf dem Heimweg ihre Lampe.",
        "Greek": "Η μικρή αλεπού έχασε τη λάμπα της στον δρόμο.",
        "digits": "31415926535897932384626433832795028841971693"}.items():
    count, size = len(by_hand(text)), len(text.encode())
    print(f"{name:8} {count:3} tokens: {size / count:.1f} bytes a token, "
          f"{len(text) / count:.1f} letters")
# Common English words are tokens; other languages are cut finer. Greek looks
# best by the byte only because each of its letters has two. Three digits are
# the most that a piece holds.

# %% [markdown]
# ## Sources
#
# - Byte-pair encoding for text: {cite}`bpe2016`. The model card names the
#   vocabulary and its control tokens: {cite}`gptoss2025`.
# - openai/tiktoken, `src/lib.rs` (`byte_pair_encode`, the whole-piece rule)
#   and `tiktoken_ext/openai_public.py` (the regular expression of o200k).
# - huggingface/tokenizers, `tokenizers/src/models/bpe/model.rs`.
# - The ranks: PyPI package bpe-openai 0.1.4, `data/o200k_base.tiktoken.gz`.
