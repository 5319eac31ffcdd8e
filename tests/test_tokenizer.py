"""gptoss.harmony, the tokenizer: text never turns into a control token."""

import hashlib
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import o200k
from tokenizers import Tokenizer as Engine
from tokenizers import models

from gptoss import harmony
from gptoss.config import GptOssConfig
from gptoss.harmony import (
    ALPHABET,
    HarmonyError,
    Tokenizer,
    merge_by_rank,
    merges_from_ranks,
    tokenizer_json,
)

POCKET = Path(harmony.__file__).parent / "pocket"
NAMES = ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>",
         "<|call|>", "<|endoftext|>", "<|reserved_200013|>"]
# text as a user may type it, with control tokens' names among it
TEXTS = st.lists(st.text(max_size=12) | st.sampled_from(NAMES) |
                 st.sampled_from(["\r\n", "  ", "don't", "\x1b[31m", "é🙂",
                                  "123456", "<|", "|>", "\u0301", "中文"]),
                 max_size=12).map("".join)


def few_ranks() -> dict[bytes, int]:
    """The 256 bytes and a few merges, some of which compete."""
    words = [b"th", b"he", b"the", b" t", b" the", b"er", b"in", b"ing",
             b"<|", b"|>", b"nd", b"end", b"\xf0\x9f", b"\xe4\xb8", b"aa",
             b"aaa", b"12", b"123"]
    return {token: n for n, token in enumerate(
        [bytes([b]) for b in range(256)] + words)}


def small(**changes) -> Tokenizer:
    ranks = few_ranks()
    names = dict(enumerate(NAMES, start=len(ranks)))
    data = json.loads(tokenizer_json(ranks, names)) | changes
    return Tokenizer(json.dumps(data))


@pytest.fixture(scope="module")
def released_text() -> str:
    return tokenizer_json(o200k.ranks())


@pytest.fixture(scope="module")
def released(released_text) -> Tokenizer:
    return Tokenizer(released_text, vocab_size=201_088)


# -- the released file ------------------------------------------------------

@pytest.mark.xdist_group("o200k")
def test_released_tokenizer_json_is_rebuilt_to_the_byte(released_text):
    ranks = o200k.ranks()
    assert len(ranks) == 199_998 == harmony.RANKS
    assert len(merges_from_ranks(ranks)) == 446_189
    data = released_text.encode()
    assert len(data) == o200k.RELEASED_BYTES
    assert hashlib.sha256(data).hexdigest() == o200k.RELEASED_SHA256


@pytest.mark.xdist_group("o200k")
def test_released_control_tokens(released):
    assert len(released.special) == 21
    assert released.special["<|return|>"] == 200_002
    assert released.special["<|endoftext|>"] == 199_999
    assert released.special["<|call|>"] == 200_012
    # rows of the embedding that the file does not name
    assert released.decode([201_087]) == "<|reserved_201087|>"
    assert released.is_special(201_087)
    with pytest.raises(HarmonyError, match=r"0 to 201087, found 201088"):
        released.token_bytes(201_088)
    with pytest.raises(HarmonyError, match="found -1"):
        released.decode([-1])


@pytest.mark.xdist_group("o200k")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:bpe_openai")
def test_released_ids_equal_an_independent_encoder(released):
    import bpe_openai

    other = bpe_openai.get_encoding("o200k_base")

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(TEXTS)
    def same(text):
        assert released.encode(text) == other.encode(
            text, disallowed_special=())

    same()
    source = Path(harmony.__file__).read_text("utf-8")
    assert released.encode(source) == other.encode(
        source, disallowed_special=())


@pytest.mark.xdist_group("o200k")
def test_released_spelling_of_an_end(released):
    ids = released.encode("<|end|>")
    assert len(ids) == 5 and 200_007 not in ids
    assert [released.decode([i]) for i in ids] == ["<", "|", "end", "|", ">"]


# -- text is text -----------------------------------------------------------

@settings(deadline=None, derandomize=True, max_examples=300)
@given(TEXTS)
def test_text_goes_round_and_holds_no_control_token(text):
    tokenizer = small()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert not set(ids) & set(tokenizer.special.values())
    assert not any(map(tokenizer.is_special, ids))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("in_vocab", [True, False])
def test_no_spelling_of_the_file_makes_text_a_control_token(special,
                                                            in_vocab):
    """Added tokens not marked special, or listed in the vocabulary too, as
    the library's own trainer writes them, with a pre-tokeniser that would
    hand over the whole name."""
    data = json.loads(tokenizer_json(few_ranks(), dict(
        enumerate(NAMES, start=len(few_ranks())))))
    for token in data["added_tokens"]:
        token["special"] = special
        if in_vocab:
            data["model"]["vocab"][token["content"]] = token["id"]
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False,
                             "trim_offsets": True, "use_regex": False}
    tokenizer = Tokenizer(json.dumps(data))
    for name in NAMES:
        ids = tokenizer.encode(name)
        assert not any(map(tokenizer.is_special, ids)), name
        assert tokenizer.decode(ids) == name
        assert tokenizer.decode([tokenizer.special[name]]) == name


def test_truncation_and_padding_of_the_file_are_ignored():
    plain, ids = small(), small().encode("the end " * 50)
    cut = small(truncation={"direction": "Right", "max_length": 4,
                            "strategy": "LongestFirst", "stride": 0})
    assert cut.encode("the end " * 50) == ids and len(ids) > 4
    padded = small(padding={"strategy": {"Fixed": 512},
                            "direction": "Right", "pad_to_multiple_of": None,
                            "pad_id": 0, "pad_type_id": 0,
                            "pad_token": "!"})
    assert padded.encode("the") == plain.encode("the")


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.text(alphabet="the nd<|>aing123🙂中", max_size=24))
def test_engine_equals_merging_by_rank(text):
    """With a pre-tokeniser that does not cut, the library's BPE and the slow
    one see the same piece."""
    ranks = few_ranks()
    tokenizer = Tokenizer(tokenizer_json(ranks, {}, pattern=r"[\s\S]+"))
    if text:
        assert tokenizer.encode(text) == merge_by_rank(text.encode(), ranks)


def test_engine_equals_merging_by_rank_whatever_the_vocabulary():
    """All strings of two letters, where ties and overlaps are commonest."""
    rng = random.Random(1)
    for _ in range(40):
        words = [b"a", b"b"]
        while len(words) < rng.randint(4, 14):
            word = rng.choice(words) + rng.choice(words)
            if word not in words and len(word) < 7:
                words.append(word)
        ranks = {word: rank for rank, word in enumerate(words)}
        engine = Engine(models.BPE(
            {word.decode(): rank for word, rank in ranks.items()},
            [(left.decode(), right.decode())
             for left, right in merges_from_ranks(ranks)],
            ignore_merges=True))
        for length in range(1, 9):
            for letters in itertools.product("ab", repeat=length):
                text = "".join(letters)
                assert engine.encode(text).ids == merge_by_rank(
                    text.encode(), ranks), (ranks, text)


# -- bytes to text ----------------------------------------------------------

def test_alphabet_is_a_bijection_of_printable_characters():
    assert len(ALPHABET) == len(set(ALPHABET)) == 256
    assert all(len(c) == 1 and not c.isspace() and c.isprintable()
               for c in ALPHABET)
    assert ALPHABET[ord(" ")] == "Ġ" and ALPHABET[ord("\n")] == "Ċ"


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.binary(max_size=40))
def test_any_bytes_decode_as_python_decodes_them(data):
    tokenizer = small()
    assert tokenizer.decode(list(data)) == data.decode(errors="replace")
    assert tokenizer.decode_bytes(list(data)) == data


def test_no_character_across_a_control_token():
    tokenizer = small()
    first, second = "é".encode()
    end = tokenizer.special["<|end|>"]
    assert tokenizer.decode([first, second]) == "é"
    assert tokenizer.decode([first, end, second]) == "\ufffd<|end|>\ufffd"
    assert tokenizer.decode([first, end, second],
                            skip_special=True) == "\ufffd\ufffd"


def test_ids_may_be_tensors():
    tokenizer = small()
    ids = torch.tensor(tokenizer.encode("the end"))
    assert tokenizer.decode(ids) == "the end"
    assert tokenizer.decode(ids.numpy()) == "the end"


# -- what cannot be read ----------------------------------------------------

def test_lone_surrogate_is_named():
    with pytest.raises(HarmonyError, match=r"U\+DCFF at index 2"):
        small().encode("ab\udcff")


@pytest.mark.parametrize("text, why", [
    ("", "Expecting value"),
    ("{", "Expecting property name"),
    ("[]", "not a tokenizer.json"),
    ('{"added_tokens": []}', "model"),
    ('{"added_tokens": [{}], "model": {"vocab": {}}}', "content"),
    ('{"added_tokens": [], "model": {"vocab": {"a": 0}}}',
     r"byte 0 \(255 missing\)"),
])
def test_not_a_tokenizer(text, why):
    with pytest.raises(HarmonyError, match=why) as caught:
        Tokenizer(text, source="here/tokenizer.json")
    assert "here/tokenizer.json" in str(caught.value)


def test_library_refusal_names_the_file():
    data = json.loads(tokenizer_json(few_ranks(), {}))
    data["model"]["merges"].append(["no", "such"])
    with pytest.raises(HarmonyError, match="t.json: .*no"):
        Tokenizer(json.dumps(data), source="t.json")


def test_control_tokens_follow_the_ranks():
    with pytest.raises(HarmonyError, match="from 274 on without a gap"):
        tokenizer_json(few_ranks(), {300: "<|end|>"})


def test_found_in_the_folder_or_above_it(tmp_path):
    with pytest.raises(HarmonyError, match="no tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
    text = tokenizer_json(few_ranks(), {})
    (tmp_path / "tokenizer.json").write_text(text, "utf-8")
    below = tmp_path / "original"
    below.mkdir()
    assert Tokenizer.from_pretrained(below).vocab_size == 274
    config = GptOssConfig(vocab_size=300, num_hidden_layers=1,
                          eos_token_id=1, pad_token_id=0)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf_dict()))
    assert Tokenizer.from_pretrained(tmp_path).vocab_size == 300
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(HarmonyError, match="tokenizer.json: .*utf-8"):
        Tokenizer.from_pretrained(below)


@pytest.mark.skipif(not POCKET.is_dir(), reason="pocket is not trained yet")
def test_pocket_tokenizer():
    tokenizer = Tokenizer.from_pretrained(POCKET)
    for name in ("<|start|>", "<|end|>", "<|message|>", "<|channel|>",
                 "<|return|>", "<|call|>", "<|endoftext|>"):
        assert name in tokenizer.special
        assert not set(tokenizer.encode(name)) & set(
            tokenizer.special.values())
    for text in ("Once upon a time", "é🙂中文\x00\r\n", " " * 9):
        assert tokenizer.decode(tokenizer.encode(text)) == text
