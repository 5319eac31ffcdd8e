"""text/vocabulary, text/tokenizer: text never makes a control token."""

import hashlib
import itertools
import json
import os
import random
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import o200k
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as Engine

import gptoss
from gptoss.text.tokenizer import Tokenizer
from gptoss.text.vocabulary import (
    ALPHABET,
    RANKS,
    HarmonyError,
    merge_by_rank,
    merges_from_ranks,
    tokenizer_json,
)
from gptoss.weights.config import GptOssConfig

FUZZ = int(os.environ.get("GPTOSS_FUZZ", "1"))  # times as many cases
POCKET = Path(gptoss.__file__).parent / "pocket"
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


# -- the released file ------------------------------------------------------

@pytest.mark.xdist_group("o200k")
def test_released_tokenizer_json_is_rebuilt_to_the_byte(released_text):
    ranks = o200k.ranks()
    assert len(ranks) == 199_998 == RANKS
    assert len(merges_from_ranks(ranks)) == 446_189
    data = released_text.encode()
    assert len(data) == o200k.RELEASED_BYTES
    assert hashlib.sha256(data).hexdigest() == o200k.RELEASED_SHA256


@pytest.mark.xdist_group("o200k")
def test_released_control_tokens(real):
    assert len(real.special) == 21
    assert real.special["<|return|>"] == 200_002
    assert real.special["<|endoftext|>"] == 199_999
    assert real.special["<|call|>"] == 200_012
    # rows of the embedding that the file does not name
    assert real.decode([201_087]) == "<|reserved_201087|>"
    assert real.is_special(201_087)
    with pytest.raises(HarmonyError, match=r"0 to 201087, found 201088"):
        real.token_bytes(201_088)
    with pytest.raises(HarmonyError, match="found -1"):
        real.decode([-1])


@pytest.mark.xdist_group("o200k")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:bpe_openai")
def test_released_ids_equal_an_independent_encoder(real):
    import bpe_openai

    other = bpe_openai.get_encoding("o200k_base")

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(TEXTS)
    def same(text):
        assert real.encode(text) == other.encode(
            text, disallowed_special=())

    same()
    source = (POCKET.parent / "text" / "tokenizer.py").read_text("utf-8")
    assert real.encode(source) == other.encode(
        source, disallowed_special=())


@pytest.mark.xdist_group("o200k")
def test_released_spelling_of_an_end(real):
    ids = real.encode("<|end|>")
    assert len(ids) == 5 and 200_007 not in ids
    assert [real.decode([i]) for i in ids] == ["<", "|", "end", "|", ">"]


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


# -- tokens that a fine-tune adds --------------------------------------------

WORDS = ["the", "end", "ing", "he", "a", "!", "<", "<|", "|>", "12", " the",
         "<tool>", "[INST]", "tool", "日本", "日", "naïve", "🙂", "e\u0301",
         "\u00a0", "  ", "\n", " hello", "hello ", "a b", "<|end", "end|>",
         "<|end|>!", "<|im_end|>", "|", "start|><|", "\U0010fffd", "é", "ï",
         "Ġthe", "Ã©", "\0", "\0<|end|>", "THE", "x" * 40]
GAPS = ["", "", " ", "\n", "t", "é", "1", "<", "  ", "_", "."]


@cache
def untuned(in_vocab: bool) -> str:
    """A tokenizer.json; `in_vocab`: as the library's own trainer writes it,
    with control tokens in the vocabulary too."""
    data = json.loads(tokenizer_json(few_ranks(), dict(enumerate(
        NAMES, start=len(few_ranks())))))
    for token in data["added_tokens"] * in_vocab:
        data["model"]["vocab"][token["content"]] = token["id"]
    return json.dumps(data)


def fine_tuned(rng: random.Random) -> Engine:
    """A tokenizer as transformers leaves it after add_tokens."""
    engine = Engine.from_str(untuned(rng.random() < 0.3))
    for _ in range(rng.randint(0, 3)):
        words = rng.sample(WORDS, rng.randint(1, 5))
        if rng.random() < 0.2:
            words.append(rng.choice(NAMES))
        special = rng.random() < 0.3
        add = engine.add_special_tokens if special else engine.add_tokens
        add([word if rng.random() < 0.5 else AddedToken(
            word, special=special, **{flag: rng.random() < 0.3 for flag in (
                "lstrip", "rstrip", "single_word", "normalized")})
            for word in words])
    return engine


def odd_text(rng: random.Random) -> str:
    pool = [*WORDS, *NAMES]
    return "".join(rng.choice(pool) + rng.choice(GAPS)
                   for _ in range(rng.randint(0, 12)))


def test_fine_tuned_tokenizers_encode_as_the_library_does():
    """The library is told that its special tokens are text: then it agrees
    on every id; and no id is a control token's."""
    refused, compared = 0, 0
    for seed in range(200 * FUZZ):
        rng = random.Random(f"fine-tune {seed}")
        text = fine_tuned(rng).to_str()
        data = json.loads(text)
        added = data["added_tokens"]
        for token in added:  # harmony's own names are, whatever the file says
            token["special"] |= token["content"] in NAMES
        other = Engine.from_str(json.dumps(data))
        other.encode_special_tokens = True
        torn = [token["content"] for token in added if not token["special"]
                and token["content"] in ("é", "ï", "Ġthe", "Ã©")
                and token["id"] < len(few_ranks())]
        if torn:  # they stand for other bytes
            with pytest.raises(HarmonyError, match="another text") as caught:
                Tokenizer(text)
            assert repr(torn[0]) in str(caught.value)
            refused += 1
            continue
        tokenizer = Tokenizer(text)
        words = {token["content"]: token["id"] for token in added
                 if not token["special"] and token["content"] not in NAMES}
        plain = not any(token[flag] for token in added
                        for flag in ("lstrip", "rstrip"))
        assert not {*words} & {*tokenizer.special}
        for word, token in words.items():
            assert tokenizer.decode([token], skip_special=True) == word
        for _ in range(8):
            text = odd_text(rng)
            ids = tokenizer.encode(text)
            wanted = other.encode(text, add_special_tokens=False).ids
            assert ids == wanted, (seed, text)
            assert not any(map(tokenizer.is_special, ids)), (seed, text)
            if plain:
                assert tokenizer.decode(ids, skip_special=True) == text
            compared += 1
    assert refused > 10 * FUZZ and compared > 1000 * FUZZ


def nodes(data: object) -> list[tuple[object, object]]:
    """Every (container, key) of a piece of JSON."""
    found = []
    items = (data.items() if isinstance(data, dict) else
             enumerate(data) if isinstance(data, list) else ())
    for key, value in items:
        found += [(data, key), *nodes(value)]
    return found


JUNK = [None, True, False, -1, 0, 1, 65, 2 ** 31, 2 ** 32, 2 ** 70, 1.5, 1e400,
        "", "a", "\ud800", "the", "<|end|>", [], ["a", "b"], {}, {"id": 1},
        [[]] * 3, "Sequence", "ByteLevel", "BPE", "WordPiece"]


def damaged(rng: random.Random) -> str:
    """tokenizer.json, fine-tuned and then spoilt in one or two places."""
    data = json.loads(fine_tuned(rng).to_str())
    model, added = data["model"], data["added_tokens"]
    for _ in range(rng.choice([1, 1, 2])):
        kind = rng.randrange(9)
        if kind == 0:    # a value anywhere but in the many lines of a table
            few = {**data, "model": {**model, "vocab": 0, "merges": 0}}
            holder, key = rng.choice(nodes(few))
            if holder is few:
                holder = data
            elif "vocab" in holder:
                holder = model
            if rng.random() < 0.2 and isinstance(holder, dict):
                holder.pop(key, None)
            else:
                holder[key] = rng.choice(JUNK)
        elif kind == 1:  # an id
            holder = rng.choice([token for token in added
                                 if isinstance(token, dict)] or [{}])
            holder["id"] = rng.choice([*range(250, 300), *JUNK])
        elif kind == 2 and isinstance(model.get("vocab"), dict):
            name = rng.choice([*model["vocab"], "new", "日本", ""])
            model["vocab"][name] = (
                rng.choice([*range(250, 300), *JUNK]))
        elif kind == 3 and isinstance(model.get("vocab"), dict):
            model["vocab"].pop(rng.choice([*model["vocab"]]))
        elif kind == 4 and isinstance(model.get("merges"), list):
            model["merges"].insert(0, rng.choice([
                ["a", "b"], ["t", "h"], "t h", "t", ["t"], ["<", "|end|>"], 7,
                ["no", "such"], ["a", "b", "c"], None, ["t", 1]]))
        elif kind == 5 and isinstance(added, list) and added:
            added.append(rng.choice(added))
        elif kind == 6 and isinstance(added, list):
            rng.shuffle(added)
        elif kind == 7 and isinstance(added, list) and added:
            added.pop(rng.randrange(len(added)))
        else:
            data[rng.choice(["pre_tokenizer", "normalizer", "model"])] = (
                rng.choice([None, {"type": "Whitespace"}, {"type": "NFC"},
                            {"type": "ByteLevel", "add_prefix_space": True,
                             "trim_offsets": True, "use_regex": True}, model]))
        model, added = data.get("model"), data.get("added_tokens")
        if not isinstance(model, dict) or not isinstance(added, list):
            break
    text = json.dumps(data, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.1:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(["", '"', "[", "}", "[" * 99_999]) + (
            text[at + rng.randint(0, 3):])
    return text


def test_damaged_tokenizers_are_refused_or_encode_as_the_library_does():
    refused = compared = 0
    for seed in range(300 * FUZZ):
        rng = random.Random(f"damage {seed}")
        text = damaged(rng)
        try:
            tokenizer = Tokenizer(text, source="here/tokenizer.json")
        except HarmonyError as error:
            line = str(error)
            assert line.startswith("here/tokenizer.json: "), (seed, line)
            assert "\n" not in line and len(line) < 500, (seed, line)
            refused += 1
            continue
        data = json.loads(text)
        for token in data["added_tokens"]:
            token["special"] |= token["content"] in NAMES
        other = Engine.from_str(json.dumps(data))
        other.encode_special_tokens = True
        other.no_truncation()
        other.no_padding()
        for token in data["added_tokens"]:
            assert other.token_to_id(token["content"]) == token["id"], seed
        for _ in range(8):
            text = odd_text(rng)
            ids = tokenizer.encode(text)
            assert ids == other.encode(text, add_special_tokens=False).ids, (
                seed, text)
            assert not any(map(tokenizer.is_special, ids)), (seed, text)
            tokenizer.decode(ids)
            compared += 1
    assert refused > 100 * FUZZ and compared > 50 * FUZZ


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


def test_only_the_released_second_copy_looks_above(tmp_path):
    """A folder in another model's folder must not take its tokenizer."""
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(few_ranks(), {}),
                                             "utf-8")
    for name in ("mine", "original2", "Original"):
        below = tmp_path / name
        below.mkdir()
        with pytest.raises(HarmonyError, match=f"{name}: no tokenizer.json "
                                               "there$"):
            Tokenizer.from_pretrained(below)
    (tmp_path / "original").mkdir()
    (tmp_path / "mine" / "link").symlink_to(tmp_path / "original")
    Tokenizer.from_pretrained(tmp_path / "mine" / "link")


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "loop", "huge"])
def test_no_regular_file(tmp_path, kind):
    """Refused at once: a FIFO would wait for ever, /dev/zero never ends, and
    none is passed over for the file above."""
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(few_ranks(), {}),
                                             "utf-8")
    below = tmp_path / "original"
    below.mkdir()
    file = below / "tokenizer.json"
    if kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "loop":
        file.symlink_to(file)
    else:
        with file.open("wb") as opened:
            opened.truncate(2 ** 40)
    with pytest.raises(HarmonyError) as caught:
        Tokenizer.from_pretrained(below)
    line = str(caught.value)
    assert line.startswith(f"{file}: ") and "\n" not in line


ADDED = {"single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": False}


@pytest.mark.parametrize(("added", "why"), [
    ([("<x>", 283)], "token '<x>': expected id 282, found 283"),
    ([("<x>", 282), ("<y>", 282)], "token '<y>': .* 282, which '<x>' has"),
    ([("<x>", 282), ("<x>", 283)], "token '<x>': expected id"),
    ([("<x>", 282), ("<x>", 282)], "token '<x>': expected id"),
    ([("<x>", 5)], "token '<x>': expected id 282, found 5"),
    ([("<x>", -1)], "token '<x>': expected id 282, found -1"),
    ([("<x>", "282")], "token '<x>': expected id 282, found '282'"),
    ([("<x>", 282.0)], "token '<x>': expected id 282, found 282.0"),
    ([("<x>", [282])], r"token '<x>': expected id 282, found \[282\]"),
    ([("the", 282)], "token 'the': expected id 258, found 282"),
    ([("", 282)], "id 282: expected a spelling, found ''"),
    ([(None, 282)], "id 282: expected a spelling, found None"),
    ([("è", 232)], "token 'è': expected an id of its own, found 232"),
])
def test_an_added_token_that_cannot_be_right_is_named(added, why):
    data = json.loads(untuned(False))
    data["added_tokens"] += [ADDED | {"content": name, "id": n}
                             for name, n in added]
    with pytest.raises(HarmonyError, match=f"^t.json: .*{why}"):
        Tokenizer(json.dumps(data), source="t.json")


@pytest.mark.parametrize(("change", "why"), [
    (lambda d: d["added_tokens"][1].update(special=[]), "end.*special: exp"),
    (lambda d: d["model"]["vocab"].update(the=257), "'the'.*257.*'he' has"),
    (lambda d: d["model"]["vocab"].update(the=400), "'the'.*found 400"),
    (lambda d: d["model"]["vocab"].update(the=None), "'the'.*found None"),
    (lambda d: d["model"]["vocab"].pop("he"), "expected an id from|to 272"),
    (lambda d: d["model"].update(dropout=0.1), "model.dropout.*0.1"),
    (lambda d: d["model"].update(type="WordLevel"), "model.type"),
    (lambda d: d.update(pre_tokenizer=None), "pre_tokenizer"),
    (lambda d: d["added_tokens"].pop(0), "'<|end|>': expected id 274"
     .replace("|", r"\|")),
    (lambda d: d["model"]["merges"].insert(0, ["q", "z"]), "qz"),
    (lambda d: (d["model"]["vocab"].update({"<|end|>": 274}), d["model"][
        "merges"].append(["<|", "end|>"]), d["added_tokens"].clear(), d[
        "added_tokens"].append(ADDED | {"content": "<|end|>", "id": 274})),
     r"'<\|end\|>': expected a control token"),
])
def test_a_file_that_contradicts_itself_is_refused(change, why):
    data = json.loads(untuned(False))
    change(data)
    with pytest.raises(HarmonyError, match=f"^t.json: .*({why})"):
        Tokenizer(json.dumps(data), source="t.json")


@pytest.mark.parametrize("text", [
    "[" * 10 ** 5, '{"model": ' * 10 ** 5, '{"a": 1, "a": 2}',
    '{"added_tokens": [], "model": {"vocab": ' + "[" * 10 ** 5])
def test_odd_json_is_refused_in_one_line(text):
    with pytest.raises(HarmonyError, match="^t.json: not a tokenizer.json"
                       ) as caught:
        Tokenizer(text, source="t.json")
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_a_token_beyond_the_embedding_is_named():
    data = json.loads(untuned(False))
    data["added_tokens"].append(ADDED | {"content": "<x>", "id": 282})
    assert Tokenizer(json.dumps(data), vocab_size=283).encode("<x>") == [282]
    with pytest.raises(HarmonyError, match="'<x>': expected an id below 282"):
        Tokenizer(json.dumps(data), vocab_size=282, source="t.json")


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


# -- as transformers' users know it -----------------------------------------

def test_what_transformers_users_look_for():
    ours = Tokenizer.from_pretrained(POCKET)
    said = json.loads((POCKET / "generation_config.json").read_text("utf-8"))
    assert ours("Hi <|end|>") == {"input_ids": ours.encode("Hi <|end|>")}
    assert ours.eos_token_id == said["eos_token_id"][0]
    assert ours.pad_token_id == said["pad_token_id"]
    assert repr(ours) == "Tokenizer(vocab_size=1536, text=1515, control=21)"
    bare = Tokenizer(tokenizer_json(few_ranks(), {}))
    assert bare.eos_token_id is None is bare.pad_token_id
