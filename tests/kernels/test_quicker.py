"""Our product or torch's: measured once, kept, and never guessed."""

import os
import stat

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_kernels import COMPILED
from torch.utils.flop_counter import FlopCounterMode

from gptoss.kernels import quicker
from gptoss.kernels.quicker import NEVER, TOKENS, torch_is_quicker

needs_kernels = pytest.mark.skipif(not COMPILED, reason="no kernels")
TIMES = st.lists(st.floats(1e-6, 1), min_size=len(TOKENS),
                 max_size=len(TOKENS))


@given(TIMES, TIMES)
def test_torch_is_taken_where_it_is_quicker_for_all_more(ours, torchs):
    found = torch_is_quicker(ours, torchs)
    quick = [other <= 0.95 * mine for mine, other
             in zip(ours, torchs, strict=True)]
    wins = [count for n, count in enumerate(TOKENS) if all(quick[n:])]
    assert found == min(wins, default=NEVER)


def test_without_kernels_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(quicker, "has_kernel", lambda name: False)
    monkeypatch.setattr(quicker, "measure_products", None)
    assert quicker.choose_product() == NEVER


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A cache folder; how often there was a measurement."""
    count = []

    def measure():
        count.append(1)
        return [1.0] * len(TOKENS), [2.0, 2.0, 0.5, 0.5, 0.5]

    monkeypatch.setattr(quicker, "library_path",
                        lambda choice: tmp_path / "kernels-x.so")
    monkeypatch.setattr(quicker, "measure_products", measure)
    monkeypatch.setenv("GPTOSS_KERNELS", "auto")
    before = torch.ops.gptoss.torch_from(NEVER)
    yield tmp_path / "kernels-x.json", count
    torch.ops.gptoss.torch_from(before)


@needs_kernels
def test_it_is_measured_once_for_each_number_of_threads(kept, monkeypatch):
    file, count = kept
    assert quicker.choose_product() == quicker.choose_product() == 32
    assert len(count) == 1 and file.exists()
    assert torch.ops.gptoss.torch_from(32) == 32
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    quicker.choose_product()
    assert len(count) == 2


@needs_kernels
@pytest.mark.parametrize("text", ["", "[]", "{", '{"1": "x"}', "7", "null"])
def test_a_spoiled_file_is_measured_again(kept, text):
    file, count = kept
    file.write_text(text)
    assert quicker.choose_product() == 32 and len(count) == 1
    assert quicker.choose_product() == 32 and len(count) == 1


@needs_kernels
@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0,
                    reason="root may write anywhere")
def test_a_folder_that_is_read_only(kept):
    file, count = kept
    file.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert quicker.choose_product() == 32 and not file.exists()
    file.parent.chmod(stat.S_IRWXU)


@needs_kernels
@torch.inference_mode()
def test_from_so_many_tokens_on_torch_answers():
    torch.manual_seed(0)
    x, weight = torch.randn(9, 96).bfloat16(), torch.randn(512, 96).bfloat16()
    bias = torch.randn(512).bfloat16()
    before = torch.ops.gptoss.torch_from(9)
    try:
        nine = torch.ops.gptoss.linear(x, weight, bias)
        assert torch.equal(nine, F.linear(x, weight, bias))
        router = torch.ops.gptoss.linear(x, weight[:128], bias[:128])
        torch.ops.gptoss.torch_from(10)
        assert torch.equal(router, torch.ops.gptoss.linear(
            x, weight[:128], bias[:128]))  # ours in every process
        exact = x.double() @ weight.double().T + bias.double()
        ours = torch.ops.gptoss.linear(x, weight, bias)
        assert (ours - exact).norm() < 3e-3 * exact.norm()
    finally:
        torch.ops.gptoss.torch_from(before)


@needs_kernels
def test_a_mode_of_the_caller_sees_nothing_of_it(kept):
    file, count = kept
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        assert quicker.choose_product() == 32
    assert counter.get_total_flops() == 0 and len(count) == 1


@needs_kernels
def test_it_is_measured_on_the_cpu_under_any_default():
    with torch.device("meta"):
        ours, torchs = quicker.measure_products(2)
    assert ours[-1] > ours[0] and torchs[-1] > 0  # 512 tokens, and 8


@needs_kernels
def test_both_are_measured():
    ours, torchs = quicker.measure_products(1)
    assert len(ours) == len(torchs) == len(TOKENS)
    assert min(ours + torchs) > 0
