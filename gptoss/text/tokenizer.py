"""Tokens that nobody can forge

Generated from book/text/tokenizer.py; edit the chapter, not this file.
"""

import json
import operator
import os
import re
import stat
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from gptoss.text.vocabulary import (
    ALPHABET,
    BYTE,
    NAMED,
    HarmonyError,
    byte_letters,
)
from gptoss.weights.config import GptOssConfig

# --- Code --------------------------------------------------------------------

_Added = list[tuple[str, int, bool]]  # spelling, id, special


# --- Which added tokens are control tokens? ----------------------------------

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


# --- How is the library kept from giving one? --------------------------------

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


# --- Which bytes does a token stand for? -------------------------------------

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
        from gptoss.text.template import chat_prompt

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


# --- A file that is none, or whose ids the library would change --------------

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


# --- A file that is not where it should be -----------------------------------

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


__all__ = [
    "Tokenizer",
]
