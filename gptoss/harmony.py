"""Tokens and harmony

Generated from book/11_harmony.py; edit the chapter, not this file.
"""

import json
import operator
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from gptoss.config import GptOssConfig

# --- Bytes in disguise -------------------------------------------------------

class HarmonyError(ValueError):
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


# --- Merging by rank ---------------------------------------------------------

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


# --- The merges, recovered from the ranks ------------------------------------

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


# --- The names of the control tokens -----------------------------------------

RANKS = 199_998  # o200k: ids below are text, from here on control tokens
NAMED = {199_998: "startoftext", 199_999: "endoftext", 200_002: "return",
         200_003: "constrain", 200_005: "channel", 200_006: "start",
         200_007: "end", 200_008: "message", 200_012: "call",
         200_018: "endofprompt"}


def control_name(token: int) -> str:
    """The spelling of control token `token` in o200k_harmony."""
    return f"<|{NAMED.get(token, f'reserved_{token}')}|>"


# --- Cutting text into pieces ------------------------------------------------

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join((
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_TAIL}",  # word, Word
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_TAIL}",  # WORD
    r"\p{N}{1,3}",                                # up to three digits
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",                # punctuation
    r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"))         # line ends, spaces


# --- Writing tokenizer.json --------------------------------------------------

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

    def spell(token: bytes) -> str:
        return "".join(ALPHABET[byte] for byte in token)

    built = hf.Tokenizer(hf.models.BPE(
        vocab={spell(token): rank for token, rank in ranks.items()},
        merges=[(spell(left), spell(right))
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


# --- The encoder knows no control token --------------------------------------

def _split_control(text: str, source: str) -> tuple[str, dict[str, int]]:
    """tokenizer.json without its control tokens, and those as a table."""
    try:
        data = json.loads(text)
        special = {str(t["content"]): operator.index(t["id"])
                   for t in data["added_tokens"]}
        vocab = data["model"]["vocab"]
        missing = [b for b, letter in enumerate(ALPHABET)
                   if letter not in vocab]
    except (ValueError, KeyError, TypeError) as error:
        raise HarmonyError(f"{source}: not a tokenizer.json ({error!r})"
                           ) from error
    if missing:
        raise HarmonyError(f"{source}: expected a byte-level vocabulary with "
                           f"a token for each of 256 bytes, found none for "
                           f"byte {missing[0]} ({len(missing)} missing)")
    for name in special:
        vocab.pop(name, None)
    data |= {"added_tokens": [], "truncation": None, "padding": None,
             "post_processor": None}
    return json.dumps(data, ensure_ascii=False), special


# --- The tokenizer -----------------------------------------------------------

class Tokenizer:
    """Text to token ids and back; control tokens only by id.

    `special` maps the name of each control token to its id. `encode`
    knows nothing of them: whatever the text says, it gives text tokens.
    `text` is the content of a tokenizer.json; `vocab_size` the number
    of rows of the embedding (default: the ids that the file names). An id
    below it that has no entry is a control token `<|reserved_ID|>`.
    """

    def __init__(self, text: str, vocab_size: int | None = None,
                 source: str = "tokenizer.json") -> None:
        from tokenizers import Tokenizer as Engine

        plain, self.special = _split_control(text, source)
        try:
            self._engine = Engine.from_str(plain)
        except Exception as error:  # the library raises bare Exception
            raise HarmonyError(f"{source}: {error}") from error
        self._spelling = {n: s for s, n in self._engine.get_vocab().items()}
        self._name = {n: name for name, n in self.special.items()}
        known = 1 + max(self._spelling | self._name)
        self.vocab_size = known if vocab_size is None else vocab_size
        self._source = source

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Reads tokenizer.json in folder `path`, else in its parent."""
        folder = Path(path)
        for place in (folder, folder.resolve().parent):
            file = place / "tokenizer.json"
            if file.is_file():
                break
        else:
            raise HarmonyError(f"{folder}: no tokenizer.json there or in "
                               f"the folder above")
        try:
            text = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise HarmonyError(f"{file}: {error}") from error
        config = folder / "config.json"
        size = (GptOssConfig.from_pretrained(config).vocab_size
                if config.is_file() else None)
        return cls(text, size, str(file))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; never a control token's."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise HarmonyError(
                f"text: expected Unicode characters, found the lone "
                f"surrogate U+{ord(text[error.start]):04X} at index "
                f"{error.start}") from error
        return self._engine.encode(text, add_special_tokens=False).ids

    def is_special(self, token: int) -> bool:
        """Whether `token` is a control token (named or reserved)."""
        return operator.index(token) not in self._spelling

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for; a control token's name."""
        token = operator.index(token)  # a 0-d tensor counts as its number
        spelling = self._spelling.get(token)
        if spelling is not None:
            return bytes(BYTE[letter] for letter in spelling)
        if token in self._name:
            return self._name[token].encode("utf-8")
        if not 0 <= token < self.vocab_size:
            raise HarmonyError(f"token id: expected 0 to "
                               f"{self.vocab_size - 1}, found {token} "
                               f"({self._source})")
        return f"<|reserved_{token}|>".encode()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, one after another."""
        return b"".join(map(self.token_bytes, ids))

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Control tokens show by name, or not at all if `skip_special`; in
        both cases no character is put together across one.
        """
        return "".join(
            self.decode_bytes(run).decode("utf-8", errors="replace")
            for control, run in groupby(ids, self.is_special)
            if not (control and skip_special))


__all__ = [
    "ALPHABET",
    "BYTE",
    "HarmonyError",
    "NAMED",
    "PATTERN",
    "RANKS",
    "Tokenizer",
    "byte_alphabet",
    "control_name",
    "merge_by_rank",
    "merges_from_ranks",
    "tokenizer_json",
]
