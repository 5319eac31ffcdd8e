"""The cache that is kept: exact whatever is kept, left or stopped."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import (
    CONFIG,
    MODEL,
    TOKENIZER,
    called,
    chat,
    fresh,
    ids,
    run,
    said,
    user,
)

from gptoss.chat.memory import PrefixCache, common_prefix
from gptoss.text.sampling import Sampler

# -- the cache --------------------------------------------------------------

@pytest.mark.parametrize("slack", [0, 40, 1024])
def test_a_turn_feeds_only_what_is_new(slack):
    """Turn by turn, the tokens fed are those that differ, and a replay of
    7 tokens (one sliding layer, window 8) if more than slack + 1 go."""
    one = chat(*[said("answer", "thought" * n) for n in range(1, 5)],
               slack=slack)
    talk, before = [], []
    for n in range(4):
        talk.append(user(f"question {n}"))
        prompt = one.prompt(talk)
        shared = common_prefix(prompt, before)
        gone = max(0, len(before) - 1 - shared)
        run(one, talk)
        assert one.usage.prompt_tokens == len(prompt)
        assert one.usage.prefilled_tokens == len(prompt) - shared + (
            0 if gone <= slack + 1 else 7)
        if n:  # of the last answer only its first control token was kept
            assert prompt[shared:] == ids(TOKENIZER.decode(prompt)
                                          .rpartition("<|channel|>")[2])
        before = list(one.session.prefix.tokens)
        talk += one.turn


def step(memory: PrefixCache, prompt: list[int]) -> torch.Tensor:
    """Feed what `prompt` needs; the logits after it."""
    start = memory.resume(prompt)
    with torch.no_grad():
        logits = memory.model(torch.tensor([prompt[start:]]), memory.cache)
    return logits[0, -1]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 12), st.lists(
    st.tuples(st.integers(0, 70), st.integers(1, 25), st.booleans()),
    min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_memory_is_exact_whatever_is_kept_and_left(slack, steps, rng):
    """Prompts that share any part with the last one, some of them left in
    the middle of a forward: the logits are those of a fresh start."""
    model = MODEL
    memory, before = PrefixCache(model, slack), []
    for keep, new, left in steps:
        prompt = before[:keep] + [rng.randrange(256) for _ in range(new)]
        if left:
            layer = rng.randrange(4)
            handle = model.layers[layer].register_forward_pre_hook(stop_here)
            with pytest.raises(KeyboardInterrupt):
                step(memory, prompt)
            handle.remove()
        else:
            torch.testing.assert_close(step(memory, prompt),
                                       fresh(model, prompt), atol=1e-5,
                                       rtol=0)
        before = prompt
    torch.testing.assert_close(step(memory, before), fresh(model, before),
                               atol=1e-5, rtol=0)


def test_an_interrupt_at_any_forward_leaves_the_chat_right():
    """Ctrl-C in the middle of the n-th forward, in a layer, for many n."""
    for nth in (1, 2, 9, 25):
        one = chat(said("abc", "x" * 30), said("second", "y"), slack=0)
        count = 0

        def hook(module, inputs, nth=nth):
            nonlocal count
            count += 1
            if count == nth:
                raise KeyboardInterrupt

        handle = one.model.layers[1].register_forward_pre_hook(hook)
        with pytest.raises(KeyboardInterrupt):
            list(one.events([user("first")]))
        handle.remove()
        one.model.script, one.model.at = [ids(said("second", "y"))], 0
        talk = [user("first"), *one.turn, user("again")]
        assert run(one, talk)["final"] == "second"
        torch.testing.assert_close(
            one.model.last, fresh(one.model, one.session.prefix.tokens[:-1]),
            atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["close", "forget", "keep", "tool"])
def test_a_turn_that_is_left_leaves_the_chat_usable(way):
    def interrupted() -> str:
        raise KeyboardInterrupt

    script = [called("interrupted", "")] if way == "tool" else [
        said("abcdef", "thinking")]
    one = chat(*script, tools=[interrupted])
    talk = [user("first")]
    if way == "tool":
        with pytest.raises(KeyboardInterrupt):
            list(one.events(talk))
        assert one.turn == []
    else:
        reply = one.reply(talk)
        assert next(reply) + next(reply) == "ab"
        assert one.turn == [{"role": "assistant", "content": "ab",
                             "reasoning": "thinking"}]
        if way == "close":
            reply.close()
        elif way == "forget":
            del reply
            gc.collect()
    talk += [*one.turn, user("second")]
    one.model.script, one.model.at = [ids(said("ok"))], 0
    assert "".join(one.reply(talk)) == "ok"
    if way == "keep":
        assert list(reply) == []  # it ended when the next turn began
    torch.testing.assert_close(
        one.model.last, fresh(one.model, one.session.prefix.tokens[:-1]),
        atol=1e-5, rtol=0)


def test_a_tool_cannot_use_the_chat_that_called_it():
    def again() -> str:
        return "".join(one.reply([user("x")]))

    one = chat(called("again", ""), said("ok"), tools=[again])
    found = run(one, [user("a")])
    assert found["result"].startswith(
        "again error: chat: in the middle of a turn")
    assert found["final"] == "ok"


def test_prompts_again_and_shorter_are_exact():
    one = chat(said("x", "y"), said("x", "y"), said("z"), slack=0)
    talk = [user("a" * 40), {"role": "assistant", "content": "b"},
            user("c")]
    run(one, talk)
    run(one, talk)  # the same again: one token is fed, and what rings need
    assert one.usage.prefilled_tokens == 1 + CONFIG.sliding_window - 1
    run(one, talk[:1])
    torch.testing.assert_close(
        one.model.last, fresh(one.model, one.session.prefix.tokens[:-1]),
        atol=1e-5, rtol=0)


def stop_here(module, inputs):
    raise KeyboardInterrupt


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 40), st.lists(
    st.tuples(st.integers(0, 120), st.integers(1, 60), st.integers(1, 9),
              st.integers(0, 9)), min_size=1, max_size=5),
    st.randoms(use_true_random=False))
def test_memory_is_exact_after_stops_between_chunks(slack, steps, rng):
    memory, before = PrefixCache(MODEL, slack), []
    for keep, new, chunk, pauses in steps:
        before = before[:keep] + [rng.randrange(256) for _ in range(new)]
        for n, token in enumerate(memory.write(
                before, prefill_chunk=chunk, max_new_tokens=1,
                sampler=Sampler(0))):
            if token is None and n == pauses:
                break
    torch.testing.assert_close(step(memory, before), fresh(MODEL, before),
                               atol=1e-5, rtol=0)
