"""How does text become tokens?

Generated from book/text/tokens.py; edit the chapter, not this file.
"""

from collections.abc import Mapping

from gptoss.weights.errors import Error

# --- Bytes in disguise -------------------------------------------------------

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


__all__ = [
    "ALPHABET",
    "BYTE",
    "HarmonyError",
    "NAMED",
    "PATTERN",
    "RANKS",
    "byte_alphabet",
    "byte_letters",
    "control_name",
    "merge_by_rank",
    "merges_from_ranks",
    "tokenizer_json",
]
