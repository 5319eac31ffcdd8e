"""When is a text over, and how does it reach the screen?

Generated from book/text/generating.py; edit the chapter, not this file.
"""

from pathlib import Path

from gptoss.text.sampling import GenerateError, reject
from gptoss.text.tokenizer import Tokenizer
from gptoss.weights.config import GptOssConfig
from gptoss.weights.config_file import read_json
from gptoss.weights.convert import home_file
from gptoss.weights.errors import is_count
from gptoss.weights.files import config_folder

# --- Which ids end a text? ---------------------------------------------------

HARMONY_STOPS = {"<|return|>": 200002, "<|endoftext|>": 199999,
                 "<|call|>": 200012}


def _said_stops(file: Path) -> tuple[int, ...]:
    """eos_token_id of a JSON file; () if it says nothing of it."""
    said = read_json(file)
    if not isinstance(said, dict):
        reject(str(file), "a JSON object", type(said).__name__)
    found = said.get("eos_token_id")
    if found is None:
        return ()
    ids = found if isinstance(found, list) else [found]
    if not all(is_count(n) and 0 <= n < 2 ** 31 for n in ids):
        raise GenerateError(f"{file}: eos_token_id: expected a token id or a"
                            f" list of them, found {found!r:.200}")
    return tuple(dict.fromkeys(ids))


def stop_ids(source: str | Path | GptOssConfig) -> tuple[int, ...]:
    """The ids that end a text, from `source`.

    A folder: `eos_token_id` (a number or a list) of generation_config.json,
    there or, for `original/`, in the folder above; if it says nothing, of
    config.json; else harmony's, as the tokenizer there has them. A config:
    its own. GenerateError or ConfigError names the file.
    """
    if isinstance(source, GptOssConfig):
        return (source.eos_token_id,)
    folder = Path(source)
    file = home_file(folder, "generation_config.json")
    ids = _said_stops(file) if file else ()
    ids = ids or _said_stops(config_folder(folder) / "config.json")
    if ids:
        return ids
    known = (Tokenizer.from_pretrained(folder).special
             if home_file(folder, "tokenizer.json") else HARMONY_STOPS)
    ids = tuple(known[name] for name in HARMONY_STOPS if name in known)
    if not ids:
        reject(f"{folder}: eos_token_id", "some in generation_config.json or"
                " config.json", None)
    return ids


__all__ = [
    "HARMONY_STOPS",
    "stop_ids",
]
