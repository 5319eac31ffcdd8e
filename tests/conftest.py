"""What all tests share: one core, no network, no run-to-run chance; and the
path that the model takes.

GPTOSS_KERNELS decides the path for a whole process: plain torch unless it
says otherwise. `make unit` runs every test so, and then those marked
`both_paths` again with GPTOSS_KERNELS=auto, as users run them: with the
kernels. Kernels compute in bf16 alone, in fp32 and float64 both paths
give the same bits (test_paths.py), so the second run leaves out what BOTH
leaves out. The tests of the kernels themselves are in the second run alone:
`GPTOSS_KERNELS=auto pytest tests/kernels`.
"""

import os
import sys
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book" / "_ext"))  # the tangle
sys.path += sorted({str(file.parent)  # tests borrow from one another
                    for file in (ROOT / "tests").rglob("test_*.py")})

os.environ.setdefault("GPTOSS_KERNELS", "torch")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# the same examples in every run, whatever earlier runs found
hypothesis.settings.register_profile("fixed", derandomize=True, database=None)
hypothesis.settings.load_profile("fixed")

# these load the kernels for their whole process, so only where they belong;
# much of them is about machines without a compiler, so nothing skips them
THEIRS = ("test_kernels.py", "test_build.py", "test_compact.py",
          "test_eight.py", "test_coarse.py", "test_bench.py",
          "test_triton_kernels.py", "test_kernel_parts.py",
          "test_kernel_safety.py", "test_quicker.py", "test_amx.py")

# file -> its tests (patterns) that run on the kernels' path too
BOTH = {
    "test_paths.py": ["*"],
    "test_judge.py": ["test_no_false_alarm*", "test_parity_judges*",
                       "test_plain_torch*", "test_kernels*", "test_twelve*",
                       "test_planted_in_ours*dtype1*", "test_wrong_choice*",
                       "test_too_large*", "test_table*",
                       "test_one_scale*", "test_eight_bits*"],
    "test_model.py": ["*other_dtypes*", "*every_layout*", "*it_trains*",
                      "*logits_to_keep*", "*rows_of_a_batch*", "*sees_only*"],
    "test_cache.py": ["*own_rounding*", "*unequal_prompts*"],
    "test_generate.py": ["*(model*", "*uncached*", "*chunks_of*",
                         "*goes_on*", "*a_batch*", "*complete*"],
    "test_memory.py": ["*memory_is_exact*"],
    "test_chat.py": ["*answer_alike*", "*piped_lines*"],
    "test_split.py": ["*threads_give*", "*experts_are_split*"],
    "test_collectives.py": ["*rehears*"],
    "test_call_again.py": ["*"],
    "test_step.py": ["*bit_for_bit*", "*the_same_text*",
                            "*near_the_ordinary*"],
    "test_drafts.py": ["*bf16*"],
    "test_vectors.py": ["*holds_to_the_set*", "*every_contract*"],
    **dict.fromkeys(THEIRS, ["*"]),
}

ON_KERNELS = os.environ["GPTOSS_KERNELS"] != "torch"
if ON_KERNELS:  # now, and not by whichever test calls an operator first
    from gptoss.kernels.build import load_kernels

    LOADED = load_kernels()
else:
    collect_ignore = [f"kernels/{name}" for name in THEIRS]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "both_paths: run with plain torch and with the kernels")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config
                          ) -> bool | None:
    """The second run need not even read files none of whose tests are its."""
    name = collection_path.name
    return (True if config.getoption("markexpr") == "both_paths"
            and name.startswith("test_") and name not in BOTH else None)


def pytest_report_header() -> str | None:
    return f"path of the model: {LOADED}" if ON_KERNELS else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(fnmatch(item.name, pattern)
               for pattern in BOTH.get(item.path.name, ())):
            item.add_marker(pytest.mark.both_paths)
            if (ON_KERNELS and LOADED.startswith("torch")
                    and item.path.name not in THEIRS):
                item.add_marker(pytest.mark.skip(
                    reason=f"no kernels here: {LOADED}"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- Made once a process -----------------------------------------------------

@pytest.fixture(scope="session")
def released_text() -> str:
    """The released tokenizer.json, made from its ranks."""
    from oracles import o200k

    from gptoss.text.vocabulary import tokenizer_json
    return tokenizer_json(o200k.ranks())


@pytest.fixture(scope="session")
def real(released_text: str):
    """The released tokenizer."""
    from gptoss.text.tokenizer import Tokenizer
    return Tokenizer(released_text, vocab_size=201_088)


@pytest.fixture(scope="session")
def tokenizer():
    """A small vocabulary, learnt from the texts that training sees."""
    from gptoss.text.tokenizer import Tokenizer
    from gptoss.training.rows import sample_texts, train_tokenizer
    return Tokenizer(train_tokenizer(sample_texts(400), 1024))
