"""parallel/plan, what a second card is worth: counted and reckoned."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splits import RELEASED, TINY, write_tiny

from gptoss.cli import commands as cli
from gptoss.parallel.plan import (
    CARDS,
    estimate,
    expected_most,
    plan,
    plan_table,
    token_seconds,
)
from gptoss.parallel.shards import mesh_rank
from gptoss.weights.sizes import bytes_read_per_token


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@given(st.sampled_from([(1, 4), (2, 2), (4, 2), (4, 1), (3, 3)]),
       st.integers(1, 4))
@settings(deadline=None, max_examples=15)
def test_busiest_group(shape, chosen) -> None:
    """Against all ways to choose."""
    groups, size = shape
    experts = groups * size
    chosen = min(chosen, experts)
    every = [max(sum(e // size == g for e in ids) for g in range(groups))
             for ids in itertools.combinations(range(experts), chosen)]
    assert math.isclose(expected_most(experts, chosen, groups),
                        sum(every) / len(every))


def test_plan() -> None:
    rows = plan(RELEASED["120b"], 8192)
    assert len(rows) == 4 * len(CARDS)
    fitting = {(row.gpus, row.card[:2]) for row in rows if row.fits}
    assert fitting == {(4, "24"), (8, "24"), (2, "40"), (4, "40"), (8, "40"),
                       (1, "80"), (2, "80"), (4, "80"), (8, "80")}
    for name, config in RELEASED.items():
        one = token_seconds(config, mesh_rank(config, 0, 1), CARDS[2], 1)
        assert one * 3350e9 == pytest.approx(bytes_read_per_token(config),
                                             rel=2e-3)
        text = plan_table(name, config, 4096)
        assert max(map(len, text.splitlines())) <= 79


def test_a_plan_that_does_not_divide() -> None:
    """Neither 4 nor 8 cards can share it, nor give a layer to each."""
    config = replace(TINY, num_hidden_layers=3, num_attention_heads=6,
                     num_key_value_heads=2, layer_types=None)
    rows = [row for row in plan(config) if row.gpus in (4, 8)]
    assert rows and not any(row.fits or row.weights or row.tensor
                            or row.pipeline for row in rows)
    text = plan_table("odd", config)
    assert text.count("not divisible") == len(rows)


@pytest.mark.parametrize("context", [0, -5, 2 ** 30 + 1, 10 ** 400])
def test_a_context_that_nothing_has(context, capsys) -> None:
    assert cli.main(["inspect", "20b", "--plan", "--context",
                     str(context)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--context: expected 1 to" in err


def test_plan_of_a_folder_with_original_alone(tiny, tmp_path, capsys) -> None:
    (tmp_path / "original").symlink_to(tiny["original"])
    assert cli.main(["inspect", "--plan", str(tmp_path)]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(RELEASED))
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_meetings_take_the_steps_of_a_ring(name: str, ranks: int) -> None:
    """What a step costs is paid 2(R - 1) times a sum, R - 1 a gathering;
    what beginning costs, once."""
    config = RELEASED[name]
    mesh = mesh_rank(config, 0, ranks)
    free = replace(CARDS[2], link=math.inf, latency=0.0, step=0.0)
    sums = 2 * config.num_hidden_layers + 1
    least = token_seconds(config, mesh, free, 100)

    def more(**costs: float) -> float:
        card = replace(free, **costs)
        return token_seconds(config, mesh, card, 100) - least

    assert more(step=1.0) == pytest.approx(
        sums * 2 * (ranks - 1) + ranks - 1)
    assert more(latency=1.0) == pytest.approx(sums + 1)
    sent = sums * 2 * (ranks - 1) / ranks * 2 * config.hidden_size
    sent += (ranks - 1) * 2 * config.vocab_size / ranks
    assert more(link=1.0) == pytest.approx(sent)


def test_more_cards_can_be_slower() -> None:
    """Reading shrinks with the ranks, meetings grow."""
    for config in RELEASED.values():
        four, eight = (estimate(config, n, CARDS[2], 8192).tensor
                       for n in (4, 8))
        assert eight < four
        speeds = [1 / token_seconds(config, mesh_rank(config, 0, n),
                                    replace(CARDS[2], step=1e-3),
                                    8192) for n in (1, 2, 4, 8)]
        assert speeds == sorted(speeds, reverse=True)


def test_plan_command(capsys) -> None:
    assert cli.main(["inspect", "--plan"]) == 0
    shown = capsys.readouterr().out
    assert "120b" in shown and "20b" in shown and "does not fit" in shown
    assert cli.main(["inspect", "120b", "--plan", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["120b"]
    assert rows[0]["fits"] is False and rows[-1]["tensor"] > 0
    assert cli.main(["inspect", "120b", "--plan", "--context", "0"]) == 2
    assert "--context" in capsys.readouterr().err
