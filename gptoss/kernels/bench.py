"""What did each step bring?

Generated from book/kernels/measured.py; edit the chapter, not this file.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gptoss.kernels.build import KernelError, kernel_path
from gptoss.kernels.compact import saved_bytes
from gptoss.kernels.roofline import read_speed
from gptoss.model.transformer import GptOss
from gptoss.text.generate import generate
from gptoss.text.sampling import Sampler
from gptoss.weights.sizes import bytes_read_per_token

# --- What is measured, and beside what? --------------------------------------

def peak_rss_bytes() -> int:
    """The most memory this process has held so far, in bytes."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rates(name: str, seconds: list[float], count: int = 1) -> dict:
    """Rates of `count` things in so many seconds: the median as `name`, and
    those of the slow and the fast tenth as low and high in `name`_spread."""
    ordered = sorted(seconds)
    tenth = len(ordered) // 10
    return {name: count / statistics.median(ordered),
            f"{name}_spread": {"low": count / ordered[-1 - tenth],
                               "high": count / ordered[tenth]}}


def _timed(model: GptOss, prompt: list[int], count: int) -> list[float]:
    """Seconds from the start to each of `count` greedy tokens."""
    start, times = time.perf_counter(), []
    for _ in generate(model, prompt, max_new_tokens=count,
                      sampler=Sampler(temperature=0.0)):
        times.append(time.perf_counter() - start)
    return times


def summarise(runs: list[list[float]], prompt_tokens: int, size: int,
              speed: float) -> dict:
    """What runs say, each the seconds from its start to each of its tokens.

    size: the bytes of weights that a token reads; speed: bytes a second
    that memory delivers. The first token ends the reading of the prompt.
    """
    first = [times[0] for times in runs]
    steps = [after - before for times in runs
             for before, after in zip(times, times[1:], strict=False)]
    decode = rates("decode_tokens_per_second", steps)
    share = decode["decode_tokens_per_second"] * size / speed
    return ({"time_to_first_token": statistics.median(first)}
            | rates("prefill_tokens_per_second", first, prompt_tokens)
            | decode | {"bytes_per_token": size,
                        "read_bytes_per_second": speed,
                        "read_bandwidth_share": share})


def measure(path: str | Path, prompt_tokens: int = 512, new_tokens: int = 32,
            repeats: int = 3, seed: int = 0,
            load: Callable[..., GptOss] = GptOss.from_pretrained) -> dict:
    """Load the model in `path` and generate; what it took, as a dict.

    The prompt is random tokens. A short run comes first, so that the file
    is in memory and the kernels are loaded; then `repeats` timed ones.
    Seconds, bytes, tokens a second (medians); read_bandwidth_share is the
    bytes of a token over what memory could deliver in its time. KernelError
    if the tokens do not fit into the model's context.
    """
    start = time.perf_counter()
    model = load(path)
    load_seconds = time.perf_counter() - start
    room = model.config.max_position_embeddings
    if prompt_tokens + new_tokens > room:
        raise KernelError(f"prompt_tokens + new_tokens: expected at most "
                          f"{room} (the model's context), found "
                          f"{prompt_tokens} + {new_tokens}")
    draw = torch.Generator().manual_seed(seed)
    prompt = torch.randint(model.config.vocab_size, (prompt_tokens,),
                           generator=draw).tolist()
    _timed(model, prompt[:8], 4)
    runs = [_timed(model, prompt, new_tokens + 1) for _ in range(repeats)]
    peak = peak_rss_bytes()  # now: measuring memory takes a gigabyte
    return {"kernels": kernel_path(), "threads": torch.get_num_threads(),
            "load_seconds": load_seconds, "peak_rss_bytes": peak,
            "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
            "repeats": repeats} | summarise(
                runs, prompt_tokens,
                bytes_read_per_token(model.config) - saved_bytes(model),
                read_speed())


__all__ = [
    "measure",
    "peak_rss_bytes",
    "rates",
    "summarise",
]
