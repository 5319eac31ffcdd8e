"""parallel/collectives, what ranks say to each other: threads of this
process, and how many processes there are."""

import subprocess
import sys

import pytest
import torch
from splits import TINY

from gptoss.parallel.collectives import Group, rehearse
from gptoss.parallel.launch import launched, process_rank


def test_a_failing_thread_ends_the_rehearsal() -> None:
    def work(mesh, group):
        if mesh.tp_rank == 1:
            raise ZeroDivisionError("planted")
        return group.all_reduce(torch.ones(1))

    with pytest.raises(ZeroDivisionError, match="planted"):
        rehearse(TINY, 2, 1, work)


def test_alone_nothing_is_said() -> None:
    x, group = torch.ones(2), Group()
    assert group.all_reduce(x) is group.all_gather(x) is x
    assert group.broadcast_last(x) is x


@pytest.mark.parametrize(("told", "wanted"), [
    ({}, (1, 0)),
    ({"WORLD_SIZE": "4"}, (1, 0)),  # nobody says which this one is
    ({"WORLD_SIZE": "4", "RANK": "3"}, (4, 3)),
    ({"WORLD_SIZE": "1", "RANK": "0"}, (1, 0)),
    ({"WORLD_SIZE": "0", "RANK": "0"}, (1, 0)),
    ({"WORLD_SIZE": "-2", "RANK": "1"}, (1, 0)),
    ({"WORLD_SIZE": "many", "RANK": "1"}, (1, 0)),
    ({"WORLD_SIZE": "\u0662", "RANK": "1"}, (1, 0)),  # a digit, not ours
    ({"WORLD_SIZE": "9" * 5000, "RANK": "1"}, (1, 0)),
    ({"WORLD_SIZE": "2", "RANK": "x"}, (2, 0))])
def test_launched(told, wanted, monkeypatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert (launched(), process_rank()) == wanted


def test_launched_needs_no_torch() -> None:
    subprocess.run([sys.executable, "-c", (
        "import sys, gptoss.parallel.launch\n"
        "assert 'torch' not in sys.modules")], check=True)
