"""What all tests share: one core, no network, no run-to-run chance, and the
path that the model takes."""

import os

os.environ.setdefault("GPTOSS_KERNELS", "torch")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
if os.environ["GPTOSS_KERNELS"] != "torch":
    from gptoss.kernels import load_kernels
    load_kernels()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
