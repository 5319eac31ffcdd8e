"""The tokenizer, rows and batches."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptoss
from gptoss.text.harmony import render_message, render_training
from gptoss.text.tokenizer import Tokenizer
from gptoss.training import conversations, leaks, lessons, rows

POCKET = Path(gptoss.__file__).parent / "pocket"

MANY = settings(deadline=None, max_examples=60)


def test_control_tokens_end_the_vocabulary(tokenizer):
    assert tokenizer.vocab_size == 1024
    ids = rows.control_ids(1024)
    assert ids["startoftext"] == 1003 and ids["endofprompt"] == 1023
    for name, token in ids.items():
        assert tokenizer.special[f"<|{name}|>"] == token
        assert token not in tokenizer.encode(f"<|{name}|>")


def test_digits_stay_single(tokenizer):
    for text in ("1234567890", "347+285=632", "in 2026-11-24"):
        pieces = [tokenizer.decode([n]) for n in tokenizer.encode(text)]
        assert all(len(p) == 1 for p in pieces if any(map(str.isdigit, p)))


def test_a_row_weighs_what_the_model_writes(tokenizer):
    source = conversations.lesson_stream(2)
    for lesson in itertools.islice(source, 60):
        ids, weights = rows.lesson_row(tokenizer, lesson)
        assert len(ids) == len(weights)
        assert ids == render_training(tokenizer, lesson.messages,
                                      drop="none")
        own = [n for n, w in zip(ids, weights, strict=True) if w == 1]
        written = tokenizer.decode(own)
        answer = lesson.messages[-1].content
        assert written.endswith(f"<|message|>{answer}<|return|>")
        for message in lesson.messages[:lesson.turn]:
            assert message.role != "assistant" or message.channel != \
                "analysis"
        if lesson.facts["call"] is None:
            assert written.startswith("<|channel|>analysis<|message|>")
        # after a stop the model itself begins its next message, but not
        # after a call: there the caller does
        begun = sum(n == tokenizer.special["<|start|>"] for n in own)
        assert begun == 1
        stops = sum(n == tokenizer.special["<|call|>"] for n in own)
        assert stops == (lesson.facts["call"] is not None)


def test_old_messages_teach_their_text_alone(tokenizer):
    sums = others = 0
    for lesson in itertools.islice(conversations.lesson_stream(3), 300):
        ids, weights = rows.lesson_row(tokenizer, lesson)
        at = 0
        for n, message in enumerate(lesson.messages[:lesson.turn]):
            part = render_message(tokenizer, message)
            found, at = weights[at:at + len(part)], at + len(part)
            if message.role != "assistant":
                assert set(found) == {rows.READ}
            elif n in lesson.muted:
                assert set(found) == {0}
                sums += 1
            else:
                text = len(tokenizer.encode(message.content))
                head = len(part) - text - 1
                assert found == [0] * head + [rows.READ] * text + [0]
                others += 1
        for n in lesson.muted:
            assert " = " in lesson.messages[n].content
    assert sums > 20 and others > 100


def test_batches_hold_every_row_once(tokenizer):
    some = list(itertools.islice(rows.rows(tokenizer, 4, easy=100), 400))
    assert all(len(ids) <= 320 for ids, _ in some[:100])
    source = rows.batches(iter(some), 0, 2500, pool=400)
    found, total = [], 0
    while total < 400:
        tokens, weights = next(source)
        assert tokens.shape == weights.shape
        assert len(tokens) == 1 or tokens.numel() <= 2500
        total += len(tokens)
        found += [(row.tolist(), w.tolist()) for row, w in
                  zip(tokens, weights, strict=True)]
    for ids, weights in some:
        weights = torch.tensor(weights).tolist()    # as float32 has them
        assert any(row[:len(ids)] == ids and not any(w[len(ids):])
                   and w[:len(ids)] == weights for row, w in found)


@MANY
@given(st.integers(0, 10**6))
def test_a_drill_counts_what_can_be_copied(tokenizer, seed):
    ids, weights = rows.drill_row(tokenizer, random.Random(seed))
    assert len(ids) == len(weights) and set(weights) <= {0.0, 1.0}
    for at, weight in enumerate(weights):
        if weight:      # the same pair of tokens stands further up
            pair = ids[at - 1:at + 1]
            assert any(ids[n:n + 2] == pair for n in range(at - 1))
    assert not any(token in ids for token in tokenizer.special.values())


@MANY
@given(st.integers(0, 10**6))
def test_a_name_is_the_same_tokens_wherever_it_stands(tokenizer, seed):
    name = lessons.made_up(random.Random(seed))
    alone = tokenizer.encode(name)
    for text in (f"I live in {name}", f'{{"city":"{name}', f"\n{name}"):
        assert tokenizer.encode(text)[-len(alone):] == alone


def test_twins_count_the_quoted_word_alone(tokenizer):
    ids, weights = rows.twin_row(tokenizer, random.Random(3))
    text = tokenizer.decode(ids)
    own = tokenizer.decode([n for n, w in zip(ids, weights, strict=True)
                            if w])
    words = [part.partition(":")[0].strip() for part in text.split('" ')]
    assert own == "".join(words) and len(words) >= 12
    assert all(f' {word}:"{word}"' in text for word in words)


def test_quoted_words_are_one_token():
    reader = Tokenizer.from_pretrained(POCKET)
    for word in rows.QUOTED:
        assert len(reader.encode(word)) == len(reader.encode(f" {word}")) == 1
        assert reader.encode(word)[0] in reader.encode(f'{{"a":"{word}"}}')


def test_rows_refuse_what_the_exam_asks(tokenizer, monkeypatch):
    keep = conversations.lesson_stream
    monkeypatch.setattr(rows, "lesson_stream", lambda seed, mix=None: keep(
        seed, "exam", mix))
    with pytest.raises(leaks.LeakError):
        list(itertools.islice(rows.rows(tokenizer, 1), 30))


@MANY
@given(st.integers(0, 10**6))
def test_a_table_counts_answers_and_is_right(tokenizer, seed):
    ids, weights = rows.table_row(tokenizer, random.Random(seed))
    assert ids == tokenizer.encode(tokenizer.decode(ids))
    for one in tokenizer.decode(ids).split():
        asked, _, value = one.partition("=")
        assert eval(asked) == int(value) >= 0
    kept = tokenizer.decode([token for token, weight
                             in zip(ids, weights, strict=True) if weight])
    assert set(kept) <= set("+=0123456789") and kept.count("=") >= 12
