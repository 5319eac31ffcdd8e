"""Chapter 14: the stories, their reader, the losses, and the shipped file."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gptoss.train as t
from gptoss import mxfp4
from gptoss.checkpoint import Checkpoint
from gptoss.config import total_parameters
from gptoss.generate import Sampler, stop_ids
from gptoss.harmony import Tokenizer
from gptoss.model import GptOss

POCKET = Path(t.__file__).parent / "pocket"
MANY = settings(deadline=None, max_examples=60)


@MANY
@given(st.integers(0, 2**32))
def test_what_is_told_can_be_read(seed):
    rng = random.Random(seed)
    cast = t.draw_cast(rng)
    reading = t.read_story(t.tell(rng, cast))
    assert reading.coherent and reading.beat == ""
    assert reading.cast.items() <= cast.items()


@MANY
@given(st.integers(0, 2**32), st.sampled_from(t.CAST_SLOTS))
def test_no_mention_may_differ_from_the_first(seed, slot):
    rng = random.Random(seed)
    cast = t.draw_cast(rng)
    story = t.tell(rng, cast)
    other = rng.choice([w for w in t.WORDS[slot] if w != cast[slot]])
    parts = story.split(cast[slot])
    if len(parts) < 3:
        return
    cut = rng.randrange(1, len(parts))
    left, right = cast[slot].join(parts[:cut]), cast[slot].join(parts[cut:])
    assert not t.read_story(left + other + right).coherent


@MANY
@given(st.integers(0, 2**32), st.integers(1, 15))
def test_a_story_cut_short_names_the_beat(seed, beats):
    story = t.tell(random.Random(seed), beats=beats)
    reading = t.read_story(story)
    names = [name for name, _ in t.BEATS]
    assert not reading.coherent and reading.rest == ""
    assert names.index(reading.beat) >= beats - 2


@pytest.mark.parametrize("text", ["", " ", "Hello", "Once upon a time",
                                  "(((", "\n" * 9, "{hero}"])
def test_anything_can_be_read(text):
    assert t.read_story(text).coherent is False


def test_held_out_casts_never_train():
    training, exam = t.stories(3), t.stories(3, hold_out=True)
    for source, kept in ((training, False), (exam, True)):
        for _ in range(50):
            cast = t.read_story(next(source)).cast
            assert t.held_out(cast) is kept
    rng = random.Random(0)
    share = sum(t.held_out(t.draw_cast(rng)) for _ in range(4000)) / 4000
    assert 0.08 < share < 0.12


def test_entropy_is_what_the_generator_draws():
    class Counting(random.Random):
        nats = 0.0

        def choice(self, seq):
            self.nats += math.log(len(seq))
            return super().choice(seq)

    rng = Counting(0)
    for _ in range(1500):
        t.tell(rng)
    assert rng.nats / 1500 == pytest.approx(t.story_entropy(), abs=0.15)


@pytest.fixture(scope="module")
def tokenizer():
    source = t.stories(1)
    return Tokenizer(t.train_tokenizer([next(source) for _ in range(400)],
                                       1024))


def test_control_tokens_end_the_vocabulary(tokenizer):
    assert tokenizer.vocab_size == 1024
    ids = t.control_ids(1024)
    assert ids["startoftext"] == 1003 and ids["endofprompt"] == 1023
    for name, token in ids.items():
        assert tokenizer.special[f"<|{name}|>"] == token
        assert token not in tokenizer.encode(f"<|{name}|>")


def test_rows_are_whole_stories(tokenizer):
    rows = next(t.story_rows(tokenizer, seed=0, batch=6, length=400))
    end = tokenizer.special["<|endoftext|>"]
    assert rows.shape == (6, 401) and rows.dtype == torch.int64
    for row in rows.tolist():
        used = [token for token in row if token != t.NOTHING]
        assert row == used + [t.NOTHING] * (401 - len(used))
        assert used[-1] == end
        for story in tokenizer.decode(used).split("<|endoftext|>")[:-1]:
            assert t.read_story(story).coherent


@MANY
@given(st.integers(2, 16), st.integers(1, 4), st.integers(0, 99))
def test_balance_is_one_when_even_and_most_when_collapsed(E, k, seed):
    k = min(k, E)
    even = torch.zeros(E, E)
    # each token prefers its own k neighbours by a hair: all alike together
    for n in range(E):
        even[n, [(n + i) % E for i in range(k)]] = 1e-4
    assert t.load_balance(even, k).item() == pytest.approx(1, abs=1e-3)
    collapsed = torch.full((9, E), -40.0)
    collapsed[:, :k] = 0
    assert t.load_balance(collapsed, k).item() == pytest.approx(E / k,
                                                                rel=1e-4)


def test_on_grid_rounds_forward_and_passes_gradients():
    weight = torch.randn(3, 8, 64, requires_grad=True)
    out = t.OnGrid()(weight)
    blocks, scales = mxfp4.encode(weight.detach())
    torch.testing.assert_close(out, mxfp4.decode(blocks, scales,
                                                 torch.float32))
    gradient = torch.randn_like(out)
    out.backward(gradient)
    assert torch.equal(weight.grad, gradient)


@pytest.mark.parametrize("steps,warmup", [(1, 5), (10, 10), (100, 7)])
def test_rate_rises_then_falls(steps, warmup):
    recipe = t.Recipe(steps=steps, warmup=warmup)
    rates = [recipe.rate(step) for step in range(steps)]
    assert all(0 < rate <= recipe.learning_rate for rate in rates)
    top = rates.index(max(rates))
    assert rates[:top + 1] == sorted(rates[:top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


SMALL = replace(t.pocket_config(), num_hidden_layers=2, layer_types=None,
                hidden_size=32, intermediate_size=32, head_dim=8)


def small_run(tokenizer, steps=24):
    model, log = GptOss(SMALL, dtype=torch.float32, packed=False), []
    t.start_at_random(model, seed=5)
    rows = t.story_rows(tokenizer, seed=0, batch=1, length=220)
    t.train(model, rows, t.Recipe(steps=steps, warmup=3), log.append)
    return model, log


def test_training_learns_and_repeats_itself(tokenizer):
    model, log = small_run(tokenizer)
    again, log_again = small_run(tokenizer)
    assert log[-1]["loss"] < log[0]["loss"] - 1
    assert [e["loss"] for e in log] == [e["loss"] for e in log_again]
    for one, two in zip(t.released_tensors(model), t.released_tensors(again),
                        strict=True):
        assert one[0] == two[0] and torch.equal(one[1], two[1])
    switched = [e["step"] for e in log if "unrounded" in e]
    assert switched == [int(t.Recipe().grid_from * 24)]


def test_the_file_is_the_model_that_was_trained(tokenizer, tmp_path):
    model, _ = small_run(tokenizer, steps=6)
    t.write_checkpoint(tmp_path / "out", SMALL, t.released_tensors(model))
    loaded = GptOss.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, layer in enumerate(model.layers):
        dense = layer.mlp.experts.gate_up_proj.detach()
        packed = loaded.layers[name].mlp.experts
        stored = mxfp4.decode(packed.gate_up_proj_blocks,
                              packed.gate_up_proj_scales, torch.float32)
        torch.testing.assert_close(stored, dense, rtol=0, atol=0)


def test_thinned_log_keeps_the_switch_and_the_end():
    log = [{"step": n, "loss": n / 3} for n in range(11)]
    log[6]["unrounded"] = 1.0
    assert [e["step"] for e in t.thinned(log)] == [0, 4, 6, 8, 10]


def test_pocket_is_a_released_layout():
    with Checkpoint.open(POCKET) as checkpoint:
        assert checkpoint.layout == "hf"
        assert checkpoint.config == t.pocket_config()
    assert total_parameters(t.pocket_config()) < 3_000_000
    special = t.control_ids(1024)
    assert set(stop_ids(POCKET)) == {special["return"], special["endoftext"],
                                     special["call"]}
    log = json.loads((POCKET / "train_log.json").read_text())
    assert log["log"][-1]["loss"] < 1.1 * log["floor"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pocket_keeps_stories_straight(dtype):
    model = GptOss.from_pretrained(POCKET, dtype=dtype)
    reader = Tokenizer.from_pretrained(POCKET)
    exam = t.examine(model, reader, count=60, seed=11)
    assert exam.coherent >= 58, exam.failures


def test_pocket_sampled_stories_are_mostly_straight():
    model = GptOss.from_pretrained(POCKET, dtype=torch.float32)
    reader = Tokenizer.from_pretrained(POCKET)
    exam = t.examine(model, reader, count=60, seed=12, beats=1,
                     sampler=Sampler(temperature=1.0))
    assert exam.coherent >= 42, exam.failures
