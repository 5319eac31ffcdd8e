"""What `measure` tells."""

import pytest
from test_kernels import POCKET

from gptoss.kernels import bench, build


def test_measure():
    found = bench.measure(POCKET, prompt_tokens=20, new_tokens=8, repeats=2)
    assert found["kernels"] == build.kernel_path()
    assert found["prompt_tokens"] == 20 and found["load_seconds"] > 0
    for part in ("prefill", "decode"):
        middle = found[f"{part}_tokens_per_second"]
        around = found[f"{part}_tokens_per_second_spread"]
        assert 0 < around["low"] <= middle <= around["high"]
    assert 0 < found["time_to_first_token"]
    # a model this small lies in a cache, so its share may exceed 1 where
    # others keep memory busy
    assert 0 < found["read_bandwidth_share"] < 100
    assert found["peak_rss_bytes"] > 10 ** 7


def test_measure_refuses_what_the_context_cannot_hold():
    with pytest.raises(build.KernelError, match="2048.* 2000 .* 49"):
        bench.measure(POCKET, prompt_tokens=2000, new_tokens=49)


def test_summarise():
    runs = [[0.5, 0.6, 0.8], [0.25, 0.45, 0.55], [1.0, 1.2, 1.4]]
    found = bench.summarise(runs, 100, 1000, 50000.0)
    assert found["time_to_first_token"] == 0.5
    assert found["prefill_tokens_per_second"] == 200
    assert found["prefill_tokens_per_second_spread"] == {"low": 100,
                                                         "high": 400}
    assert abs(found["decode_tokens_per_second"] - 5) < 1e-9
    assert abs(found["read_bandwidth_share"] - 0.1) < 1e-9
    many = bench.rates("x", [1.0] * 18 + [2.0, 4.0])
    assert many == {"x": 1.0, "x_spread": {"low": 1.0, "high": 1.0}}
