"""Tokens and harmony

Generated from book/11_harmony.py; edit the chapter, not this file.
"""

import codecs
import json
import math
import operator
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import groupby
from pathlib import Path

from gptoss.config import GptOssConfig
from gptoss.errors import Error

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


# --- What the file says, and what the library makes of it --------------------

_Added = list[tuple[str, int, bool]]  # spelling, id, special


def _once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; a name that stands in it twice is an error."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = sorted(name for name, _ in pairs)
        raise ValueError("two entries " + next(
            repr(one) for one, other in zip(names, names[1:], strict=False)
            if one == other))
    return found


def _read_json(text: str, source: str) -> tuple[dict, _Added]:
    """tokenizer.json, and its added tokens."""
    try:
        data = json.loads(text, object_pairs_hook=_once)
        added = [(token["content"], token["id"], token["special"])
                 for token in data["added_tokens"]]
        vocab = dict(data["model"]["vocab"].items())
    except (ValueError, KeyError, TypeError, AttributeError,
            RecursionError) as error:
        raise HarmonyError(f"{source}: not a tokenizer.json ({error!r})"
                           ) from error
    missing = [b for b, letter in enumerate(ALPHABET) if letter not in vocab]
    if missing:
        raise HarmonyError(f"{source}: expected a byte-level vocabulary with "
                           f"a token for each of 256 bytes, found none for "
                           f"byte {missing[0]} ({len(missing)} missing)")
    return data, added


def _check_ids(vocab: Mapping[str, int], added: _Added, source: str) -> None:
    """Raises HarmonyError unless `tokenizers` gives these ids too."""
    seen: dict[object, str] = {}

    def check(spelling: object, found: object, wanted: Iterable[int]) -> None:
        if not isinstance(spelling, str) or not spelling:
            raise HarmonyError(f"{source}: token with id {found!r}: expected "
                               f"a spelling, found {spelling!r}")
        if type(found) is not int or found not in wanted or found in seen:
            other = seen.get(found) if type(found) is int else None
            raise HarmonyError(
                f"{source}: token {spelling[:80]!r}: expected id "
                f"{' to '.join(map(str, sorted({min(wanted), max(wanted)})))}"
                f", found {found!r}"
                + (f", which {other[:80]!r} has" if other is not None else ""))
        seen[found] = spelling

    for spelling, found in vocab.items():
        check(spelling, found, range(len(vocab)))
    seen.clear()
    fresh: dict[str, int] = {}
    for spelling, found, special in added:
        if type(special) is not bool:
            raise HarmonyError(f"{source}: token {spelling!r}: special: "
                               f"expected true or false, found {special!r}")
        free = len(vocab) + len(fresh)
        wanted = (vocab.get(spelling, fresh.get(spelling, free))
                  if isinstance(spelling, str) else free)
        check(spelling, found, [wanted])
        fresh |= {spelling: found} if spelling not in vocab else {}


# --- Which added tokens are control tokens -----------------------------------

_HARMONY = re.compile(rf"<\|({'|'.join(NAMED.values())}|reserved_\d+)\|>")


def _in_use(model: Mapping, names: set[str]) -> set[str]:
    """Those of `names` that text is made of: bytes, and what takes part in
    a merge or comes out of one."""
    names = names & model["vocab"].keys()
    found = names & BYTE.keys()
    for pair in model["merges"] if names else ():
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        found |= names & {left, right, left + right}
    return found


def _control_tokens(model: Mapping, added: _Added, source: str
                    ) -> dict[str, int]:
    """Name -> id of the added tokens that no text may become."""
    found = {name: n for name, n, special in added
             if special or _HARMONY.fullmatch(name)}
    in_use = _in_use(model, {*found})
    for name in filter(_HARMONY.fullmatch, sorted(in_use)):
        raise HarmonyError(f"{source}: token {name!r}: expected a control "
                           f"token, found one that text is merged into")
    return {name: n for name, n in found.items() if name not in in_use}


# --- The encoder gives no control token --------------------------------------

_NEVER = "\0"  # in no spelling of bytes


def _without_control(data: dict, control: Mapping[str, int], source: str
                     ) -> str:
    """tokenizer.json for an engine that text cannot get `control` from."""
    model = data["model"]
    wrong = [key for key in ("dropout", "continuing_subword_prefix",
                             "end_of_word_suffix") if model.get(key)]
    wrong += ["type"] * (model.get("type", "BPE") != "BPE")
    for key in wrong:
        raise HarmonyError(f"{source}: model.{key}: expected a plain "
                           f"byte-level BPE, found {model[key]!r}")
    vocab = {_NEVER * (name in control) + name: n
             for name, n in model["vocab"].items()}
    tokens = [token | {"special": token["special"]
                       or token["content"] in control}
              for token in data["added_tokens"]]
    return json.dumps(data | {"model": model | {"vocab": vocab},
                              "added_tokens": tokens}, ensure_ascii=False)


def _spellings(vocab: Mapping[str, int], added: _Added,
               control: Mapping[str, int], source: str) -> dict[int, str]:
    """Id -> spelling in bytes of all tokens that are text."""
    found = {n: spelling for spelling, n in vocab.items()
             if spelling not in control}
    for spelling, n in vocab.items():
        if not BYTE.keys() >= set(spelling):  # the library: as it stands
            found[n] = byte_letters(spelling.encode("utf-8"))
    for name, n, special in added:
        if name in control or special:
            continue
        spelling = byte_letters(name.encode("utf-8"))
        if found.setdefault(n, spelling) != spelling:
            raise HarmonyError(f"{source}: token {name!r}: expected an id "
                               f"of its own, found {n}, which stands for "
                               f"bytes that are another text")
    return found


# --- Finding the file --------------------------------------------------------

_MOST = 2 ** 28  # bytes of a tokenizer.json; the released one: 28 million


def _find_json(folder: Path) -> Path:
    """The tokenizer.json that belongs to the checkpoint in `folder`."""
    above = Path(os.path.realpath(folder))
    places = [folder] + [above.parent] * (above.name == "original")
    for file in (place / "tokenizer.json" for place in places):
        if os.path.lexists(file):
            return file
    raise HarmonyError(f"{folder}: no tokenizer.json there"
                       + " or in the folder above" * (len(places) - 1))


def _read_text(file: Path) -> str:
    """The text of `file`; refuses what is no file or far too long."""
    try:
        state = file.stat()
        if not stat.S_ISREG(state.st_mode):
            raise HarmonyError(f"{file}: expected a regular file")
        if state.st_size > _MOST:
            raise HarmonyError(f"{file}: expected at most {_MOST:,} bytes, "
                               f"found {state.st_size:,}")
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HarmonyError(f"{file}: {error}") from error


# --- The tokenizer -----------------------------------------------------------

class Tokenizer:
    """Text to token ids and back; control tokens only by id.

    `special` maps the name of each control token to its id: what the file
    marks special, and harmony's own names. `encode` gives none of them,
    whatever the text says; every other token, added ones included, is text
    both ways. `text` is the content of a tokenizer.json; `vocab_size` the
    number of rows of the embedding (default: the ids that the file names).
    An id below it that has no entry is a control token `<|reserved_ID|>`.
    Raises HarmonyError, which names `source` and the token, for a file that
    contradicts itself.
    """

    def __init__(self, text: str, vocab_size: int | None = None,
                 source: str = "tokenizer.json") -> None:
        self._source = source
        try:
            self._load(text)
        except HarmonyError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise HarmonyError(f"{source}: {' '.join(str(error).split())}"
                               ) from error
        self._name = {n: name for name, n in self.special.items()}
        last = max(self._spelling | self._name)
        self.vocab_size = last + 1 if vocab_size is None else vocab_size
        if last >= self.vocab_size:
            raise HarmonyError(
                f"{source}: token {self.decode([last])!r}: expected an id "
                f"below {self.vocab_size}, the model's vocab_size, found "
                f"{last}")

    def _load(self, text: str) -> None:
        """Reads and checks `text`; makes the engine."""
        from tokenizers import Tokenizer as Engine

        data, added = _read_json(text, self._source)
        model, vocab = data["model"], data["model"]["vocab"]
        _check_ids(vocab, added, self._source)
        self.special = _control_tokens(model, added, self._source)
        self._spelling = _spellings(vocab, added, self.special, self._source)
        self._engine = Engine.from_str(_without_control(data, self.special,
                                                        self._source))
        self._engine.encode_special_tokens = True  # as text, it means
        self._engine.no_truncation()
        self._engine.no_padding()
        ids = {self._engine.token_to_id(name): n for name, n, _ in added
               if name not in self.special}
        # control tokens that the vocabulary held have new ids in the engine
        self._file_id = {one: n for one, n in ids.items() if one != n}
        if b"\xf4\x8f\xbf\xbd" not in self.decode_bytes(
                self.encode("\U0010fffd")):
            raise HarmonyError(f"{self._source}: pre_tokenizer: expected one "
                               f"that turns text into bytes, found none")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Tokenizer":
        """Reads tokenizer.json in folder `path`; if that is `original`, the
        released second copy, it may lie in the folder above."""
        folder = Path(path)
        file = _find_json(folder)
        text, config = _read_text(file), folder / "config.json"
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
        ids = self._engine.encode(text, add_special_tokens=False).ids
        return ([self._file_id.get(n, n) for n in ids] if self._file_id
                else ids)

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

    def __call__(self, text: str) -> dict[str, list[int]]:
        """{"input_ids": the ids of `text`}, as in transformers."""
        return {"input_ids": self.encode(text)}

    def apply_chat_template(self, messages: Iterable[object],
                            tools: Iterable[object] | None = None,
                            add_generation_prompt: bool = True,
                            tokenize: bool = True,
                            reasoning_effort: str = "medium",
                            date: str | None = None) -> list[int] | str:
        """The ids of a conversation (its text unless `tokenize`).

        See `chat_prompt`, which takes the same.
        """
        from gptoss.harmony import chat_prompt

        ids = chat_prompt(self, messages, tools or (), reasoning_effort, date,
                          add_generation_prompt)
        return ids if tokenize else self.decode(ids)

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a turn; None: a vocabulary without it."""
        return self.special.get("<|return|>")

    @property
    def pad_token_id(self) -> int | None:
        return self.special.get("<|endoftext|>")

    def __repr__(self) -> str:
        return (f"Tokenizer(vocab_size={self.vocab_size}, "
                f"text={len(self._spelling)}, control={len(self.special)})")


# --- A message ---------------------------------------------------------------

ROLES = ("system", "developer", "user", "assistant", "tool")
EFFORTS = ("low", "medium", "high")
CHANNELS = ("analysis", "commentary", "final")
IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."


@dataclass(frozen=True)
class Message:
    """One message of a conversation; all fields are plain text.

    `name`: who of the role speaks; a tool's message needs it
    ("functions.add"), it stands in the header in place of the role.
    `recipient`: the tool that a call goes to; a result has "assistant".
    `content_type`: "<|constrain|>json" (that prefix, and only it, becomes
    a control token) or other text.
    """

    role: str
    content: str = ""
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None


# --- A message as tokens -----------------------------------------------------

_CONSTRAIN = "<|constrain|>"


def _control(tokenizer: Tokenizer, name: str) -> int:
    """The id of control token `name`."""
    if name not in tokenizer.special:
        raise HarmonyError(f"tokenizer: expected a control token {name}, "
                           f"found {sorted(tokenizer.special)}")
    return tokenizer.special[name]


def _header(message: Message) -> list[tuple[str, str]]:
    """The header of `message` as (control token or "", text) pairs."""
    if message.role not in ROLES:
        raise HarmonyError(f"role: expected one of {', '.join(ROLES)}, "
                           f"found {message.role!r}")
    if message.role == "tool" and not message.name:
        raise HarmonyError("a tool's message: expected a name like "
                           "'functions.add', found none")
    author = [message.role] * (message.role != "tool")
    author += [message.name] * bool(message.name)
    parts = [("<|start|>", ":".join(author))]
    if message.recipient not in (None, "all"):
        parts.append(("", f" to={message.recipient}"))
    if message.channel is not None:
        parts.append(("<|channel|>", message.channel))
    if (kind := message.content_type) is not None:
        rest = kind.removeprefix(_CONSTRAIN)
        parts += ([("", f" {kind}")] if rest == kind
                  else [("", " "), (_CONSTRAIN, rest)])
    return parts


def render_message(tokenizer: Tokenizer, message: Message,
                   stop: str = "<|end|>") -> list[int]:
    """Token ids of one message, `<|start|>` to its stop token.

    A message of the assistant to a recipient ends in `<|call|>` instead of
    `<|end|>`. Raises HarmonyError for an unknown role or a nameless tool.
    """
    if (stop == "<|end|>" and message.role == "assistant"
            and message.recipient is not None):
        stop = "<|call|>"
    ids = []
    for control, text in (*_header(message), ("<|message|>", message.content),
                          (stop, "")):
        if control:
            ids.append(_control(tokenizer, control))
        ids += tokenizer.encode(text)
    return ids


# --- Tools as TypeScript -----------------------------------------------------

def _as_read(text: str) -> float:
    """The float that serde_json reads in a decimal number."""
    sign, digits, exponent = Decimal(text).as_tuple()
    whole = int("".join(map(str, digits)))
    while whole >= 2 ** 64:
        whole, exponent = whole // 10, exponent + 1
    value = float(whole)
    while exponent < -308:
        value, exponent = value / 1e308, exponent + 308
    power = float(f"1e{abs(exponent)}")
    value = value / power if exponent < 0 else value * power
    return -value if sign else value


def _number(value: int | float) -> str | None:
    """A number as serde_json spells it; None: JSON has no such number."""
    if isinstance(value, int) and -2 ** 63 <= value < 2 ** 64:
        return str(int(value))
    if not abs(value) < 10 ** 309:  # nor is NaN
        return None
    value = _as_read(repr(float(value)) if isinstance(value, float)
                     else str(value))
    digits, _, power = repr(value).partition("e")
    if power == "-05":
        sign = "-" * (value < 0)
        return f"{sign}0.0000{digits.lstrip('-').replace('.', '')}"
    if not math.isfinite(value):
        return None
    return f"{digits}e{int(power)}" if power else digits


def _json(value: object, where: str) -> str:
    """`value` as serde_json writes it; `where`: its place, for errors."""
    if isinstance(value, Mapping):
        items = [(key if isinstance(key, str) else _json(key, where), item)
                 for key, item in value.items()]
        return "{" + ",".join(
            f"{_json(key, where)}:{_json(item, f'{where}.{key}')}"
            for key, item in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_json(item, f"{where}[{n}]")
                              for n, item in enumerate(value)) + "]"
    if value is None or isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if not isinstance(value, int | float):
        raise HarmonyError(f"{where}: expected JSON, found {value!r}")
    if (text := _number(value)) is None:
        raise HarmonyError(
            f"{where}: expected a number that JSON can hold, found " +
            (repr(value) if isinstance(value, float) else
             f"an integer of {value.bit_length()} bits"))
    return text


_NAMES = {"number": "number", "integer": "number", "boolean": "boolean"}


def _get(schema: object, key: str, kind: type) -> object:
    """schema[key] if that is a `kind`, else None."""
    value = schema.get(key) if isinstance(schema, Mapping) else None
    return value if isinstance(value, kind) else None


def _type(schema: object, indent: str = "") -> str:
    """A JSON schema as openai-harmony's kind of TypeScript type."""
    if not isinstance(schema, Mapping):
        return "any"
    if isinstance(schema.get("oneOf"), list):
        return "".join(f"\n{line}" for line in
                       _union(schema["oneOf"], indent, bare=False))
    kind = schema.get("type")
    if isinstance(kind, list):
        kinds = [_NAMES.get(k, k) for k in kind if isinstance(k, str)]
        return " | ".join(kinds) or "any"
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return (f"{_type(schema['items'], indent)}[]" if "items" in schema
                else "Array<any>")
    if kind == "string":
        values = _get(schema, "enum", list) or ()
        return " | ".join(f'"{value}"' for value in values
                          if isinstance(value, str)) or "string"
    return _NAMES.get(kind, "any") if isinstance(kind, str) else "any"


def _nullable(schema: object, indent: str) -> str:
    """The type of a property or of a variant in a union."""
    text = _type(schema, indent)
    null = _get(schema, "nullable", bool) and "null" not in text
    return f"{text} | null" if null else text


def _default(schema: object, bare: bool = True) -> str | None:
    """`default: ...` or None; a string of an enum stands bare."""
    if not isinstance(schema, Mapping) or "default" not in schema:
        return None
    value = schema["default"]
    if isinstance(value, str) and not _get(schema, "enum", list):
        return f'default: "{value}"'
    if not (isinstance(value, str) and bare):
        value = _json(value, "default")
    return f"default: {value}"


def _behind(*parts: str | None) -> str:
    """A comment behind a type, or nothing."""
    found = [part for part in parts if part is not None]
    return f" // {' '.join(found)}" if found else ""


def _union(variants: list, indent: str, about: str | None = None,
           above: bool = False, bare: bool = True) -> list[str]:
    """A line each; `about`: the property's own description, not repeated,
    nor is the first variant's if it stands `above`."""
    lines = []
    for n, variant in enumerate(variants):
        told = _get(variant, "description", str)
        if told == about or (above and n == 0):
            told = None
        lines.append(f"{indent} | {_nullable(variant, indent + '   ')}"
                     + _behind(told, _default(variant, bare)))
    return lines


def _property(name: str, schema: object, indent: str) -> list[str]:
    """The lines of one property: comments, name, type."""
    if not isinstance(schema, Mapping):
        schema = {}
    title, about = (_get(schema, key, str) for key in ("title", "description"))
    union, alone = _get(schema, "oneOf", list), "oneOf" not in schema
    notes = [] if title is None else [f" {title}", ""]
    notes += [f" {about}"] * (alone and about is not None)
    if examples := _get(schema, "examples", list):
        notes += [" Examples:", *(f' - "{text}"' for text in examples
                                  if isinstance(text, str))]
    if union is None:
        lines = [f"{indent}{name}: {_nullable(schema, indent + '    ')},"
                 + (_behind(_default(schema)) if alone else "")]
    else:
        first = _get(union[0], "description", str) if union else None
        shown = about is not None and about != first
        above = (about if shown else None, _default(schema))
        notes += [f" {text}" for text in above if text is not None]
        lines = [f"{indent}{name}:", *_union(union, indent, about, shown),
                 f"{indent},"]
    return [*(f"{indent}//{note}" for note in notes), *lines]


def _object(schema: Mapping, indent: str) -> str:
    """`{ ... }`, a property a line."""
    about = _get(schema, "description", str)
    lines = [f"{indent}// {about}"] * (about is not None) + ["{"]
    required = _get(schema, "required", list) or ()
    for key, value in (_get(schema, "properties", Mapping) or {}).items():
        name = key if key in required else f"{key}?"
        lines += _property(name, value, indent)
    return "\n".join([*lines, f"{indent}}}"])


@dataclass(frozen=True)
class Tool:
    """A function on offer; `parameters`: JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping | None = None


def _lines(text: str) -> list[str]:
    """Only LF and CR LF end a line, as in Rust; a CR alone is text."""
    *lines, last = text.split("\n")
    return [line.removesuffix("\r") for line in lines] + [last] * bool(last)


def typescript(tools: Iterable[Tool], namespace: str = "functions") -> str:
    """`tools` as the TypeScript namespace that the models are shown.

    Raises HarmonyError, which names the place, for parameters that are not
    JSON.
    """
    out = [f"namespace {namespace} {{\n"]
    for tool in tools:
        out += [f"// {line}" for line in _lines(tool.description)]
        argument = ""
        if tool.parameters is not None:
            try:
                _json(tool.parameters, f"tool {tool.name!r}: parameters")
                argument = f"_: {_type(tool.parameters)}"
            except RecursionError as error:
                raise HarmonyError(f"tool {tool.name!r}: parameters: nested "
                                   f"too deeply") from error
        out.append(f"type {tool.name} = ({argument}) => any;\n")
    return "\n".join([*out, f"}} // namespace {namespace}"])


# --- What the provider and the application say -------------------------------

_NUMBER, _STRING = {"type": "number"}, {"type": "string"}
_BROWSER = (
    Tool("search", "Searches for information related to `query` and displays "
         "`topn` results.",
         {"type": "object", "required": ["query"], "properties": {
             "query": _STRING, "topn": _NUMBER | {"default": 10},
             "source": _STRING}}),
    Tool("open", "Opens the link `id` from the page indicated by `cursor` "
         "starting at line number `loc`, showing `num_lines` lines.\n"
         "Valid link ids are displayed with the formatting: `【{id}†.*】`.\n"
         "If `cursor` is not provided, the most recent page is implied.\n"
         "If `id` is a string, it is treated as a fully qualified URL "
         "associated with `source`.\nIf `loc` is not provided, the viewport "
         "will be positioned at the beginning of the document or centered on "
         "the most relevant passage, if available.\nUse this function "
         "without `id` to scroll to a new location of an opened page.",
         {"type": "object", "properties": {
             "id": {"type": ["number", "string"], "default": -1},
             **{key: _NUMBER | {"default": -1}
                for key in ("cursor", "loc", "num_lines")},
             "view_source": {"type": "boolean", "default": False},
             "source": _STRING}}),
    Tool("find", "Finds exact matches of `pattern` in the current page, or "
         "the page given by `cursor`.",
         {"type": "object", "required": ["pattern"], "properties": {
             "pattern": _STRING, "cursor": _NUMBER | {"default": -1}}}))


_BUILTIN = {
    "browser": (
        "Tool for browsing.\nThe `cursor` appears in brackets before each "
        "browsing display: `[{cursor}]`.\nCite information from the tool "
        "using the following format:\n`【{cursor}†L{line_start}"
        "(-L{line_end})?】`, for example: `【6†L9-L11】` or `【8†L3】`.\nDo "
        "not quote more than 10 words directly from the tool output.\n"
        "sources=web (default: web)", _BROWSER),
    "python": (
        "Use this tool to execute Python code in your chain of thought. The "
        "code will not be shown to the user. This tool should be used for "
        "internal reasoning, but not for code that is intended to be visible "
        "to the user (e.g. when creating plots, tables, or files).\n\nWhen "
        "you send a message containing Python code to python, it will be "
        "executed in a stateful Jupyter notebook environment. python will "
        "respond with the output of the execution or time out after 120.0 "
        "seconds. The drive at '/mnt/data' can be used to save and persist "
        "user files. Internet access for this session is UNKNOWN. Depends on "
        "the cluster.", ())}


def _section(name: str, about: str, tools: Iterable[Tool]) -> str:
    """`## name`, a description, and the tools as TypeScript."""
    mark = "// " if tools else ""
    out = [f"## {name}\n", *(mark + line for line in _lines(about))]
    return "\n".join([*out, typescript(tools, name)] if tools else out)


def system_message(effort: str | None = "medium", date: str | None = None,
                   functions: bool = False, cutoff: str | None = "2024-06",
                   identity: str | None = IDENTITY,
                   channels: Iterable[str] = CHANNELS,
                   builtin: Iterable[str] = ()) -> Message:
    """What the provider says: identity, dates, effort, channels.

    `functions`: whether a developer message offers tools. `builtin`: names
    out of "browser", "python". None leaves a line out. Raises HarmonyError
    for another effort or name.
    """
    builtin = sorted(builtin)
    for value, known in ((effort, (None, *EFFORTS)),
                         *((name, (*_BUILTIN,)) for name in builtin)):
        if value not in known:
            raise HarmonyError(f"system message: expected one of {known}, "
                               f"found {value!r}")
    who = [line for line, given in (
        (identity, identity), (f"Knowledge cutoff: {cutoff}", cutoff),
        (f"Current date: {date}", date)) if given is not None]
    parts = ["\n".join(who)] * bool(who)
    parts += [f"Reasoning: {effort}"] * (effort is not None)
    parts += ["# Tools"] * bool(builtin)
    parts += [_section(name, *_BUILTIN[name]) for name in builtin]
    if named := ", ".join(channels):
        rule = ("\nCalls to these tools must go to the commentary channel: "
                "'functions'." if functions else "")
        parts.append(f"# Valid channels: {named}. Channel must be included "
                     f"for every message.{rule}")
    return Message("system", "\n\n".join(parts))


def developer_message(instructions: str = "",
                      tools: Iterable[Tool] = ()) -> Message:
    """What the application says: instructions and functions on offer."""
    tools = tuple(tools)
    parts = ["# Instructions", instructions] if instructions else []
    parts += ["# Tools", _section("functions", "", tools)] if tools else []
    return Message("developer", "\n\n".join(parts))


# --- A conversation ----------------------------------------------------------

def _is_answer(message: Message) -> bool:
    """Whether `message` ends the assistant's turn."""
    return (message.role == "assistant" and message.channel == "final"
            and message.recipient in (None, "all")
            and message.content != "")


def _forgotten(messages: list[Message], drop: str) -> int:
    """Reasoning before this index is dropped."""
    if drop == "none":
        return 0
    if drop == "turns":
        return max((n for n, message in enumerate(messages)
                    if _is_answer(message)), default=0)
    if drop != "official":
        raise HarmonyError(f"drop: expected 'official', 'turns' or 'none', "
                           f"found {drop!r}")
    said = [message.channel for message in messages
            if message.role == "assistant"]
    if said[-1:] != ["final"]:
        return 0
    return [message.channel for message in messages].index("final")


def render(tokenizer: Tokenizer, messages: Iterable[Message],
           reply: bool = True, drop: str = "official") -> list[int]:
    """Token ids of a conversation, and `<|start|>assistant` if `reply`.

    `drop`: which messages of the analysis channel are left out. "turns":
    those before the assistant's last answer, a final message that is not
    empty. "official", as openai-harmony: those before the first final
    message, if the assistant's last message is final. "none".
    """
    messages = list(messages)
    start = _forgotten(messages, drop)
    ids = []
    for n, message in enumerate(messages):
        if n >= start or message.channel != "analysis":
            ids += render_message(tokenizer, message)
    begin = [_control(tokenizer, "<|start|>"), *tokenizer.encode("assistant")]
    return ids + begin if reply else ids


def render_training(tokenizer: Tokenizer, messages: Iterable[Message],
                    drop: str = "official") -> list[int]:
    """As render(reply=False), but a final message at the end ends in
    `<|return|>`."""
    messages = list(messages)
    ids = render(tokenizer, messages, reply=False, drop=drop)
    if messages and (messages[-1].role, messages[-1].channel) == (
            "assistant", "final"):
        ids[-1] = _control(tokenizer, "<|return|>")
    return ids


def chat_prompt(tokenizer: Tokenizer, messages: Iterable[object],
                tools: Iterable[object] = (), effort: str = "medium",
                date: str | None = None, reply: bool = True) -> list[int]:
    """Token ids of a conversation in OpenAI's dicts, or in `Message`s.

    To dicts a system message is added (`date`: None for today, "" for none)
    and the developer message that their instructions and `tools` (dicts or
    functions) make, as `Chat` does; `Message`s are taken as they stand.
    `reply`: end in `<|start|>assistant`. Raises HarmonyError, or ChatError
    naming the message.
    """
    messages, tools = list(messages), list(tools)
    if messages and all(isinstance(each, Message) for each in messages):
        if tools:
            raise HarmonyError("tools: expected none beside messages of "
                               "harmony, whose developer message has them")
        return render(tokenizer, messages, reply, "turns")
    from gptoss.chat import read_messages, read_tools, today

    # the reader wants the user to have the last word; for a conversation
    # that nobody is to answer it gets one, which is taken out again
    closing = [] if reply else [{"role": "user", "content": ""}]
    instructions, said = read_messages([*messages, *closing])
    offered = [offer.tool for offer in read_tools(tools).values()]
    date = today() if date is None else date or None
    head = [system_message(effort, date, bool(offered)),
            developer_message(instructions, offered)]
    said = said[:len(said) - len(closing)]
    return render(tokenizer, [*filter(lambda each: each.content, head),
                              *said], reply, "turns")


# --- The same as a template --------------------------------------------------

CHAT_TEMPLATE = r'''
{#- Messages in OpenAI's dicts as harmony text. Variables: messages, tools,
    add_generation_prompt, reasoning_effort, date ("" for none), and
    model_identity. -#}
{%- macro plain(text) -%}
    {#- A tokenizer that reads the finished text cannot tell whose <|end|> it
        is: text that spells a control token is refused. -#}
    {%- for name in ["startoftext", "endoftext", "return", "constrain",
                     "channel", "start", "end", "message", "call",
                     "endofprompt"] -%}
        {%- if "<|" ~ name ~ "|>" in text -%}
            {{- raise_exception("text that spells the control token <|"
                                ~ name ~ "|>") -}}
        {%- endif -%}
    {%- endfor -%}
    {%- if "<|reserved_" in text -%}
        {{- raise_exception("text that spells a reserved control token") -}}
    {%- endif -%}
    {{- text -}}
{%- endmacro -%}

{%- macro said(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content -%}
        {%- for part in content -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}

{%- macro default(schema, bare) -%}
    {%- if "default" in schema -%}
        {%- set value = schema["default"] -%}
        {%- if value is string and not schema.enum -%}
            {{- 'default: "' ~ value ~ '"' -}}
        {%- elif value is string and bare -%}
            {{- "default: " ~ value -}}
        {%- else -%}
            {{- "default: " ~ (value | tojson(separators=(",", ":"))) -}}
        {%- endif -%}
    {%- endif -%}
{%- endmacro -%}

{%- macro union(variants, indent, about, above, bare) -%}
    {%- for each in variants -%}
        {%- set note = namespace(parts=[]) -%}
        {%- if each.description is string and each.description != about
               and not (above and loop.first) -%}
            {%- set note.parts = [each.description] -%}
        {%- endif -%}
        {%- if "default" in each -%}
            {%- set note.parts = note.parts + [default(each, bare)] -%}
        {%- endif -%}
        {{- "\n" ~ indent ~ " | " ~ nullable(each, indent ~ "   ") -}}
        {{- " // " ~ note.parts | join(" ") if note.parts else "" -}}
    {%- endfor -%}
{%- endmacro -%}

{%- macro nullable(schema, indent) -%}
    {%- set text = type(schema, indent) -%}
    {{- text -}}
    {{- " | null" if schema.nullable and "null" not in text else "" -}}
{%- endmacro -%}

{%- macro property(name, schema, indent) -%}
    {%- set mark = "\n" ~ indent ~ "//" -%}
    {%- set one = schema.oneOf -%}
    {%- if schema.title is string -%}
        {{- mark ~ " " ~ schema.title ~ mark -}}
    {%- endif -%}
    {%- if not one and schema.description is string -%}
        {{- mark ~ " " ~ schema.description -}}
    {%- endif -%}
    {%- if schema.examples -%}
        {{- mark ~ " Examples:" -}}
        {%- for each in schema.examples if each is string -%}
            {{- mark ~ ' - "' ~ each ~ '"' -}}
        {%- endfor -%}
    {%- endif -%}
    {%- if one -%}
        {%- set about = schema.description -%}
        {%- set shown = about is string and about != one[0].description -%}
        {{- mark ~ " " ~ about if shown else "" -}}
        {{- mark ~ " " ~ default(schema, true) if "default" in schema
            else "" -}}
        {{- "\n" ~ indent ~ name ~ ":" -}}
        {{- union(one, indent, about, shown, true) -}}
        {{- "\n" ~ indent ~ "," -}}
    {%- else -%}
        {{- "\n" ~ indent ~ name ~ ": " -}}
        {{- nullable(schema, indent ~ "    ") ~ "," -}}
        {{- " // " ~ default(schema, true) if "default" in schema else "" -}}
    {%- endif -%}
{%- endmacro -%}

{%- macro type(schema, indent) -%}
    {%- set names = {"number": "number", "integer": "number",
                     "boolean": "boolean"} -%}
    {%- set kind = schema.type -%}
    {%- if schema.oneOf -%}
        {{- union(schema.oneOf, indent, none, false, false) -}}
    {%- elif kind == "object" -%}
        {%- if schema.description is string -%}
            {{- indent ~ "// " ~ schema.description ~ "\n" -}}
        {%- endif -%}
        {{- "{" -}}
        {%- for name, each in (schema.properties or {}).items() -%}
            {%- set mark = "" if name in (schema.required or []) else "?" -%}
            {{- property(name ~ mark, each, indent) -}}
        {%- endfor -%}
        {{- "\n" ~ indent ~ "}" -}}
    {%- elif kind == "array" -%}
        {{- type(schema["items"], indent) ~ "[]" if "items" in schema
            else "Array<any>" -}}
    {%- elif kind == "string" -%}
        {%- if schema.enum -%}
            {{- '"' ~ schema.enum | join('" | "') ~ '"' -}}
        {%- else -%}
            {{- "string" -}}
        {%- endif -%}
    {%- elif kind is string -%}
        {{- names[kind] or "any" -}}
    {%- elif kind -%}
        {%- for each in kind -%}
            {{- names[each] or each -}}
            {{- "" if loop.last else " | " -}}
        {%- endfor -%}
    {%- else -%}
        {{- "any" -}}
    {%- endif -%}
{%- endmacro -%}

{%- macro functions() -%}
    {{- "# Tools\n\n## functions\n\nnamespace functions {\n\n" -}}
    {%- for entry in tools -%}
        {%- set tool = entry.function or entry -%}
        {%- if tool.description -%}
            {%- set about = tool.description.replace("\r\n", "\n") -%}
            {%- for line in about.removesuffix("\n").split("\n") -%}
                {{- "// " ~ line ~ "\n" -}}
            {%- endfor -%}
        {%- endif -%}
        {{- "type " ~ tool.name ~ " = (" -}}
        {{- "_: " ~ type(tool.parameters, "") if tool.parameters else "" -}}
        {{- ") => any;\n\n" -}}
    {%- endfor -%}
    {{- "} // namespace functions" -}}
{%- endmacro -%}

{%- macro message(header, content, stop="<|end|>") -%}
    {{- "<|start|>" ~ header ~ "<|message|>" ~ plain(content) ~ stop -}}
{%- endmacro -%}

{#- What stands at the head, and where the last answer is. -#}
{%- set seen = namespace(head=[], count=0, answer=-1) -%}
{%- for each in messages -%}
    {%- if each.role in ["system", "developer"] and seen.count == loop.index0
    -%}
        {%- set seen.count = loop.index -%}
        {%- set text = said(each.content) -%}
        {%- set seen.head = seen.head + ([text] if text else []) -%}
    {%- elif each.role == "assistant" and not each.tool_calls
             and said(each.content) and each.phase != "commentary" -%}
        {%- set seen.answer = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}

{%- if date is not defined -%}
    {%- set date = strftime_now("%Y-%m-%d") -%}
{%- endif -%}
{%- set who = model_identity or
    "You are ChatGPT, a large language model trained by OpenAI." -%}
{%- set system = who ~ "\nKnowledge cutoff: 2024-06"
    ~ ("\nCurrent date: " ~ date if date else "")
    ~ "\n\nReasoning: " ~ (reasoning_effort or "medium")
    ~ "\n\n# Valid channels: analysis, commentary, final. "
    ~ "Channel must be included for every message."
    ~ ("\nCalls to these tools must go to the commentary channel: "
       ~ "'functions'." if tools else "") -%}
{{- message("system", system) -}}
{%- set told = ["# Instructions", seen.head | join("\n\n")]
    if seen.head else [] -%}
{%- set told = told + ([functions()] if tools else []) -%}
{{- message("developer", told | join("\n\n")) if told else "" -}}

{%- for each in messages[seen.count:] -%}
    {%- set at = loop.index0 + seen.count -%}
    {%- set name = ":" ~ plain(each.name) if each.name else "" -%}
    {%- set content = said(each.content) -%}
    {%- if each.role in ["system", "developer"] -%}
        {{- message("developer",
                    "# Instructions\n\n" ~ content if content else "") -}}
    {%- elif each.role == "user" -%}
        {{- message("user" ~ name, content) -}}
    {%- elif each.role == "assistant" -%}
        {%- set calls = each.tool_calls or [] -%}
        {%- set who = "assistant" ~ name -%}
        {%- set thought = each.reasoning or each.reasoning_content
            or each.thinking -%}
        {%- if thought and at > seen.answer -%}
            {{- message(who ~ "<|channel|>analysis", thought) -}}
        {%- endif -%}
        {%- if content -%}
            {%- set where = "commentary" if each.phase == "commentary"
                or (calls and not each.phase) else "final" -%}
            {{- message(who ~ "<|channel|>" ~ where, content) -}}
        {%- endif -%}
        {%- for call in calls -%}
            {%- set given = call.function.arguments -%}
            {{- message(who ~ " to=functions." ~ plain(call.function.name)
                ~ "<|channel|>commentary <|constrain|>json",
                given if given is string else given | tojson, "<|call|>") -}}
        {%- endfor -%}
        {#- The answers in the order of the calls. -#}
        {%- for call in calls -%}
            {%- set open = namespace(yes=true) -%}
            {%- for later in messages[at + 1:] -%}
                {%- if later.role != "tool" -%}
                    {%- set open.yes = false -%}
                {%- elif open.yes and later.tool_call_id == call.id -%}
                    {{- message("functions." ~ plain(call.function.name)
                        ~ " to=assistant<|channel|>commentary",
                        said(later.content)) -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endfor -%}
    {%- elif each.role != "tool" -%}
        {{- raise_exception("an unknown role: " ~ each.role) -}}
    {%- endif -%}
{%- endfor -%}
{{- "<|start|>assistant" if add_generation_prompt else "" -}}
'''.lstrip()


# --- What a parser reports ---------------------------------------------------

@dataclass(frozen=True)
class Opened:
    """A header is complete; `message` has its fields and no content yet."""

    message: Message


@dataclass(frozen=True)
class Delta:
    """More content, in whole characters.

    `channel`: as the header wrote it, so that only "final" is an answer;
    None: it named none. Either is reported before if it is none of
    CHANNELS and the message is the assistant's.
    """

    text: str
    channel: str | None


@dataclass(frozen=True)
class ToolCall:
    """A message of the assistant to a tool has come to its stop token."""

    recipient: str
    content_type: str | None
    arguments: str


@dataclass(frozen=True)
class Done:
    """A message has ended; `stop`: end, call, return; None: cut off."""

    message: Message
    stop: str | None


@dataclass(frozen=True)
class Malformed:
    """What was wrong, and the text that it was found in."""

    reason: str
    text: str


Event = Opened | Delta | ToolCall | Done | Malformed


# --- Reading a header --------------------------------------------------------

_Pieces = list[tuple[str, bytearray]]  # control token or "", text behind it
_WORD = re.compile(r"[\w./+-]+")
_TORN_TO = re.compile(r"(?<!\S)to=\s+(?=\S)")


def _spell(pieces: _Pieces) -> str:
    """Pieces as one would write them."""
    return "".join(control + data.decode("utf-8", "replace")
                   for control, data in pieces)


def _fields(pieces: _Pieces) -> tuple[dict, list[str], list[str]]:
    """Channel and content type by control token, other words, complaints."""
    found, words, wrong = {}, [], []
    for control, data in pieces:
        text = data.decode("utf-8", "replace")
        if _TORN_TO.search(text):
            text = _TORN_TO.sub("to=", text)
            wrong.append("white space behind to=")
        parts = text.split()
        if control:
            value = parts.pop(0) if parts else ""
            if control == "<|channel|>" and value and data[:1].isspace():
                wrong.append("white space behind <|channel|>")
            if control in found:
                wrong.append(f"two {control} in a header")
            if control == "<|channel|>" and not value:
                wrong.append("a <|channel|> without a name")
            # the later of two, but no unknown channel after a known one
            elif (control == _CONSTRAIN or value in CHANNELS
                  or found.get(control) not in CHANNELS):
                found[control] = value
        words += parts
    return found, words, wrong


def _author(words: list[str], role: str | None, started: bool
            ) -> tuple[str, str | None, list[str]]:
    """Takes the author off `words`: role, name, complaints.

    `role`: known beforehand. `started`: whether there was a `<|start|>`.
    """
    first = words[0] if words else ""
    head, _, name = first.partition(":")
    if role is not None:
        del words[:first == role]
        return role, None, []
    if head in ROLES[:-1]:
        del words[0]
        return head, name or None, []
    if (not started or not first or first in CHANNELS
            or first.startswith("to=")):
        return "assistant", None, ["a header without a role"]
    del words[0]
    if (first in ("tool", *_BUILTIN) or "." in first
            or any(word.startswith("to=") for word in words)):
        return "tool", first, []
    return "assistant", None, [f"an unknown role {first!r}"]


def _read_header(pieces: _Pieces, role: str | None, started: bool
                 ) -> tuple[Message, list[Malformed]]:
    """The message that a header announces, and what is wrong with it."""
    found, words, wrong = _fields(pieces)
    role, name, complaints = _author(words, role, started)
    to = [word[3:] for word in words if word.startswith("to=")]
    early = not all(word.startswith("to=") for word in words[:len(to)])
    words = [word for word in words if not word.startswith("to=")]
    bare = "<|channel|>" not in found and words[:1] in [[c] for c in CHANNELS]
    channel = words.pop(0) if bare else found.get("<|channel|>")
    kind = (_CONSTRAIN + found[_CONSTRAIN] if _CONSTRAIN in found
            else words[0] if len(words) == 1 else None)
    alone = words == [kind] and bool(_WORD.fullmatch(kind))
    lost = role == "assistant" and channel not in CHANNELS
    text = _spell(pieces)
    table = {  # complaint -> whether it holds
        "a channel without <|channel|>": bare,
        f"unexpected text {' '.join(words)!r} in a header":
            words and not alone,
        f"a format before to=: {kind!r}": alone and early,
        f"recipients {to} in a header": len(to) > 1 or "" in to,
        f"an unknown channel {channel!r}": lost and channel,
        "a message of the assistant without a channel": lost and not channel,
        "a header that is not UTF-8": "\ufffd" in text}
    wrong += complaints + [reason for reason, holds in table.items() if holds]
    recipient = next(filter(None, to), None)
    return (Message(role, "", channel, recipient, kind, name),
            [Malformed(reason, text) for reason in wrong])


def _rescue(pieces: _Pieces) -> Message | None:
    """The assistant's text in a header that never came to `<|message|>`.

    Plain text, or a channel's name and text; else there is none.
    """
    (_, before), *rest = pieces
    text, channel = before.decode("utf-8", "replace"), None
    text = text.removeprefix("assistant").lstrip()
    if rest:
        control, after = rest[0]
        after = after.decode("utf-8", "replace").lstrip()
        # not "finally": that may be any text
        channel = next((c for c in CHANNELS
                        if re.match(f"{c}(?![a-z])", after)), None)
        if text or channel is None or rest[1:] or control == _CONSTRAIN:
            return None
        text = after.removeprefix(channel).lstrip()
    return (Message("assistant", text, channel)
            if text and "to=" not in text else None)


# --- One token at a time -----------------------------------------------------

_STOPS = {"<|end|>": "end", "<|return|>": "return", "<|call|>": "call"}


class StreamParser:
    """Takes tokens one by one and reports events; never raises on a token.

    `role`: the author of the first message if the tokens continue
    `<|start|>role`, as a reply to `render` does; None: they begin with
    `<|start|>`. `messages`: those that are done. What is malformed is
    reported, and the parser goes on with the next header that it finds.
    A ToolCall comes only of a message with a stop token: without one its
    arguments may be cut short.
    """

    def __init__(self, tokenizer: Tokenizer,
                 role: str | None = "assistant") -> None:
        if role not in (None, *ROLES):
            raise HarmonyError(f"role: expected one of {', '.join(ROLES)} or "
                               f"None, found {role!r}")
        self.messages: list[Message] = []
        self._tokenizer = tokenizer
        self._replying = role == "assistant"
        self._stop: str | None = None         # of the message before
        self._begin(role, started=role is not None)

    def feed(self, token: int) -> list[Event]:
        """The events that `token` causes."""
        try:
            data = self._tokenizer.token_bytes(token)
            special = self._tokenizer.is_special(token)
        except (HarmonyError, TypeError):
            data, special = f"<|unknown {token}|>".encode(), True
        step = self._header if self._message is None else self._content
        return step(*((data.decode(), b"") if special else ("", data)))

    def close(self) -> list[Event]:
        """The events that the end of the tokens causes."""
        if self._message is not None:
            return self._finish(None)
        blank = self._pieces == [("", b"")]
        return [] if blank and not self._started else self._abandon()

    def _header(self, control: str, data: bytes) -> list[Event]:
        """A token between messages or in a header."""
        if control in _STOPS:
            return self._abandon(control)
        if control == "<|start|>":
            fresh = self._pieces == [("", b"")] and (
                not self._started or self._role is not None)
            events = [] if fresh else self._abandon(control)
            if self._stop == "return":
                events.append(Malformed("a message after <|return|>", ""))
            self._stop = None
            self._begin(started=True)
            return events
        if control == "<|message|>":
            message, wrong = _read_header(self._pieces, self._role,
                                          self._started)
            if not self._started:
                wrong.append(Malformed("a header without <|start|>",
                                       _spell(self._pieces)))
            return [*wrong, *self._open(message)]
        if control not in ("", "<|channel|>", _CONSTRAIN):
            return [Malformed("a control token in a header", control)]
        if control:
            self._pieces.append((control, bytearray()))
        self._pieces[-1][1].extend(data)
        return []

    def _content(self, control: str, data: bytes) -> list[Event]:
        """A token of a message's content."""
        if not control:
            return self._add(data)
        if control in _STOPS:
            return self._finish(_STOPS[control])
        if control not in ("<|start|>", "<|channel|>"):
            return [*self._add(b"", final=True),
                    Malformed("a control token in a text", control)]
        role = self._message.role if control == "<|channel|>" else None
        events = [Malformed(f"{control} before the message has ended", ""),
                  *self._finish(None)]
        self._begin(role, started=role is not None)
        return events + self._header(control, b"")

    def _begin(self, role: str | None = None, started: bool = False) -> None:
        """A new header; `started`: its `<|start|>` has been seen."""
        self._role, self._started = role, started
        self._pieces: _Pieces = [("", bytearray())]
        self._message: Message | None = None  # whose content is being read
        self._text: list[str] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def _open(self, message: Message) -> list[Event]:
        """A header is complete."""
        self._message = message
        return [Opened(message)]

    def _add(self, data: bytes, final: bool = False) -> list[Event]:
        """More content; at a `final` half a character becomes U+FFFD."""
        text = self._utf8.decode(data, final)
        self._text.append(text)
        return [Delta(text, self._message.channel)] if text else []

    def _finish(self, stop: str | None) -> list[Event]:
        """The message ends."""
        events = self._add(b"", final=True)
        message = replace(self._message, content="".join(self._text))
        to, call = message.recipient, None
        if message.role == "assistant" and to is not None:
            call = ToolCall(to, message.content_type, message.content)
        if stop == "call" and call is None:
            events.append(Malformed("<|call|> without a recipient", ""))
        if call and to in ROLES:
            events.append(Malformed("a recipient that is no tool", to))
        elif call and stop is not None:
            if stop != "call":
                events.append(Malformed("a call without <|call|>", to))
            events.append(call)
        self.messages.append(message)
        self._stop = stop
        self._begin()
        return [*events, Done(message, stop)]

    def _abandon(self, control: str = "") -> list[Event]:
        """`control` (or the end) instead of `<|message|>` after a header."""
        found = _spell(self._pieces) + control
        reason = ("a header without <|message|>" if self._started else
                  "text outside of a message")
        events: list[Event] = [Malformed(reason, found)]
        message = _rescue(self._pieces) if self._replying else None
        if message is None or control == "<|start|>":
            self._begin()
            return events
        events += self._open(replace(message, content=""))
        events += self._add(message.content.encode())
        return events + self._finish(_STOPS.get(control))


# --- All at once -------------------------------------------------------------

def parse(tokenizer: Tokenizer, ids: Iterable[int],
          role: str | None = None) -> list[Message]:
    """The messages in `ids`; raises HarmonyError if anything is malformed.

    `role`: as for StreamParser. The last message may lack its stop token.
    """
    parser = StreamParser(tokenizer, role)
    for n, events in enumerate([*map(parser.feed, ids), parser.close()]):
        for event in events:
            if isinstance(event, Malformed):
                raise HarmonyError(f"token {n}: {event.reason}: "
                                   f"{event.text!r}")
    return parser.messages


__all__ = [
    "ALPHABET",
    "BYTE",
    "CHANNELS",
    "CHAT_TEMPLATE",
    "Delta",
    "Done",
    "EFFORTS",
    "Event",
    "HarmonyError",
    "IDENTITY",
    "Malformed",
    "Message",
    "NAMED",
    "Opened",
    "PATTERN",
    "RANKS",
    "ROLES",
    "StreamParser",
    "Tokenizer",
    "Tool",
    "ToolCall",
    "byte_alphabet",
    "byte_letters",
    "chat_prompt",
    "control_name",
    "developer_message",
    "merge_by_rank",
    "merges_from_ranks",
    "parse",
    "render",
    "render_message",
    "render_training",
    "system_message",
    "tokenizer_json",
    "typescript",
]
