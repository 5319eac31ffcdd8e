"""The sliding mask: pictures, counts, padding, HF, OpenAI, the horizon."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GptOssConfig as HFConfig
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)

from gptoss.attention.masks import (
    Reach,
    picture,
    positions_from_mask,
    receptive_field,
    visible,
)
from gptoss.weights.config import GptOssConfig

SLIDING, FULL = "sliding_attention", "full_attention"


def square(length, window):
    p = torch.arange(length)[None]
    return visible(p, p, window)[0]


DRAWN = {
    1: """
#.......
.#......
..#.....
...#....
....#...
.....#..
......#.
.......#""",
    3: """
#.......
##......
###.....
.###....
..###...
...###..
....###.
.....###""",
    4: """
#.......
##......
###.....
####....
.####...
..####..
...####.
....####""",
    5: """
#.......
##......
###.....
####....
#####...
.#####..
..#####.
...#####""",
    None: """
#.......
##......
###.....
####....
#####...
######..
#######.
########""",
}


@pytest.mark.parametrize("window", DRAWN)
def test_the_mask_is_the_picture(window):
    assert picture(square(8, window)) == DRAWN[window].strip()


@pytest.mark.parametrize("window", [127, 128, 129])
def test_the_real_window_as_a_picture(window):
    want = "\n".join(
        "." * max(0, row + 1 - window)
        + "#" * min(row + 1, window)
        + "." * (299 - row)
        for row in range(300)
    )
    assert picture(square(300, window)) == want


def test_exactly_128_keys_with_the_own():
    keys = square(300, 128)[299].nonzero().flatten()
    assert len(keys) == 128
    assert keys.min() == 172 and keys.max() == 299
    assert GptOssConfig.gpt_oss_20b().sliding_window == 128


def test_the_known_off_by_one_is_another_mask():
    q, k = torch.arange(300)[:, None], torch.arange(300)[None]
    ours = square(300, 128)
    mlx = (k <= q) & (k >= q - 128)  # mlx-lm#390, before its fix
    megatron = (k <= q) & (q - k <= 128)  # Megatron-LM#2771: (128, 0)
    for wrong in (mlx, megatron):
        differs = (wrong != ours).any(-1)
        assert differs[128:].all() and not differs[:128].any()
    assert torch.equal((k <= q) & (q - k <= 127), ours)  # (127, 0)


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 200), st.integers(1, 250))
def test_pairs_are_counted_by_the_formula(tokens, window):
    mask, full = square(tokens, window), square(tokens, None)
    w = min(window, tokens)
    assert full.sum() == tokens * (tokens + 1) // 2
    assert mask.sum() == tokens * w - w * (w - 1) // 2
    assert (mask & ~full).sum() == 0
    want = (torch.arange(tokens) + 1).clamp(max=window)
    assert torch.equal(mask.sum(-1), want)
    if window >= tokens:
        assert torch.equal(mask, full)


positions = st.lists(st.integers(-1, 40), min_size=1, max_size=20)


@settings(deadline=None, max_examples=150)
@given(positions, positions, st.none() | st.integers(1, 20))
def test_any_positions_in_any_order(q_pos, k_pos, window):
    mask = visible(torch.tensor([q_pos]), torch.tensor([k_pos]), window)
    assert mask.shape == (1, len(q_pos), len(k_pos))
    assert mask.dtype == torch.bool
    for i, q in enumerate(q_pos):
        for j, k in enumerate(k_pos):
            want = q >= 0 and k >= 0 and k <= q
            if window is not None:
                want = want and k > q - window
            assert mask[0, i, j].item() == want


def test_rows_of_a_batch_are_independent():
    q = torch.tensor([[5, 6], [0, -1]])
    k = torch.tensor([[4, 5, 6], [0, -1, -1]])
    mask = visible(q, k, 2)
    assert [picture(m) for m in mask] == ["##.\n.##", "#..\n..."]
    one_for_all = visible(q, torch.tensor([[4, 5, 6]]), None)
    assert one_for_all.shape == (2, 2, 3)


PADDED = [
    ("left", [0, 0, 1, 1, 1], [-1, -1, 0, 1, 2]),
    ("right", [1, 1, 1, 0, 0], [0, 1, 2, -1, -1]),
    ("middle", [1, 0, 1, 0, 1], [0, -1, 1, -1, 2]),
    ("none", [1, 1, 1, 1, 1], [0, 1, 2, 3, 4]),
    ("only padding", [0, 0, 0, 0, 0], [-1] * 5),
]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_positions_for_every_kind_of_padding(dtype):
    mask = torch.tensor([m for _, m, _ in PADDED]).to(dtype)
    want = torch.tensor([p for _, _, p in PADDED])
    got = positions_from_mask(mask)
    assert got.dtype == torch.int64 and torch.equal(got, want)
    start = torch.tensor([3, 0, 7, 1, 9])
    shifted = positions_from_mask(mask, start)
    assert torch.equal(
        shifted, torch.where(want < 0, want, want + start[:, None])
    )


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.booleans(), min_size=1, max_size=40),
    st.none() | st.integers(1, 12),
)
def test_padding_never_happened(keep, window):
    keep = torch.tensor([keep])
    p = positions_from_mask(keep)
    mask = visible(p, p, window)[0]
    inner = mask[keep[0]][:, keep[0]]
    assert torch.equal(inner, square(int(keep.sum()), window))
    assert mask.sum() == inner.sum()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 9),
    st.integers(0, 6),
)
def test_chunks_continue_each_other(chunks, window, padding):
    """start carries the count, so chunks with padding = one pass."""
    total = sum(chunks)
    start, rows = torch.zeros(1, dtype=torch.int64), []
    for size in chunks:
        mask = torch.tensor([[1] * size + [0] * padding])
        p = positions_from_mask(mask, start)
        rows.append(visible(p, torch.arange(total)[None], window)[0, :size])
        start = start + size
    assert torch.equal(torch.cat(rows), square(total, window))


def hf_masks(attention_mask, window):
    kwargs = {
        "config": HFConfig(
            sliding_window=window, attn_implementation="eager"
        ),
        "inputs_embeds": torch.zeros(*attention_mask.shape, 1),
        "attention_mask": attention_mask,
        "past_key_values": None,
    }
    return (
        create_sliding_window_causal_mask(**kwargs)[:, 0] == 0,
        create_causal_mask(**kwargs)[:, 0] == 0,
    )


@pytest.mark.parametrize("window", [1, 2, 127, 128, 129, 200, 500])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_the_finished_masks_equal_hf(window, side):
    keep = torch.ones(3, 200, dtype=torch.bool)
    for row, padding in enumerate((1, 40, 150)):
        if side == "left":
            keep[row, :padding] = False
        elif side == "right":
            keep[row, -padding:] = False
    p = positions_from_mask(keep)
    sliding, full = hf_masks(keep, window)
    # only rows of real tokens: HF lets a padding query see something
    assert torch.equal(visible(p, p, window)[keep], sliding[keep])
    assert torch.equal(visible(p, p, None)[keep], full[keep])


@pytest.mark.parametrize("window", [127, 128, 129])
def test_the_overlay_equals_hf(window):
    q, k = torch.arange(300)[:, None], torch.arange(300)[None]
    overlay = sliding_window_overlay(window)(0, 0, q, k)
    assert torch.equal(overlay & (k <= q), square(300, window))


@pytest.mark.parametrize("length", [1, 5, 128, 300])
@pytest.mark.parametrize("window", [0, 1, 4, 127, 128, 129, 300])
def test_the_mask_equals_openais_formula(length, window):
    blocked = torch.full((length, length), -torch.inf)
    mask = blocked.triu(1)
    if window > 0:  # 0 means no window there
        mask = mask + blocked.tril(-window)
    assert torch.equal(mask == 0, square(length, window or None))


def test_openais_own_attention_where_it_is_installed():
    """Uniform scores, no sink: what comes out counts the visible keys."""
    model = pytest.importorskip(
        "gpt_oss.torch.model",
        reason="gpt-oss 0.0.9 asks for Python 3.12; the formula is above",
    )
    length = 300
    for window in (0, 127, 128, 129):
        q = torch.zeros(length, 1, 1, length)
        v = torch.eye(length).view(length, 1, length)
        sink = torch.tensor([-torch.inf])
        out = model.sdpa(q, q[:, 0], v, sink, 1.0, window)
        assert torch.equal(out > 0, square(length, window or None))


def walk(kinds, window, length):
    """Positions that reach the last one through the layers, by masks."""
    reached = torch.zeros(length, dtype=torch.bool)
    reached[-1] = True
    for kind in reversed(kinds):
        mask = square(length, window if kind == SLIDING else None)
        reached = mask[reached].any(0)
    return int(reached.sum())


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([SLIDING, FULL]), min_size=1, max_size=6),
    st.integers(1, 12),
)
def test_the_horizon_is_what_a_walk_finds(kinds, window):
    reaches = receptive_field(kinds, window)
    assert len(reaches) == len(kinds)
    for layer, reach in enumerate(reaches):
        below = kinds[: layer + 1]
        slides = [kind for kind in below if kind == SLIDING]
        assert reach.sliding == walk(slides, window, 90)
        assert reach.sliding == 1 + len(slides) * (window - 1)
        seen = walk(below, window, 90)
        assert seen == (90 if FULL in below else reach.sliding)
        assert reach.total == (None if FULL in below else seen)


def test_the_horizon_of_the_released_models():
    for config, count in (
        (GptOssConfig.gpt_oss_20b(), 12),
        (GptOssConfig.gpt_oss_120b(), 18),
    ):
        reaches = receptive_field(config.layer_types, config.sliding_window)
        assert reaches[0] == Reach(sliding=128, total=128)
        assert reaches[1] == Reach(sliding=128, total=None)
        assert reaches[-1] == Reach(1 + count * 127, None)


def test_refusals_name_the_value():
    p = torch.arange(3)[None]
    with pytest.raises(ValueError, match="window: .* found 0"):
        visible(p, p, 0)
    with pytest.raises(ValueError, match=r"found \(1, 3, 3\)"):
        picture(visible(p, p, None))
    with pytest.raises(ValueError, match="found chunked_attention"):
        receptive_field(["chunked_attention"], 4)
