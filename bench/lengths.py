"""What the length of a text costs, as ratios within one run.

    python bench/lengths.py PATH --prefill 512,1024,2048,4096
    python bench/lengths.py PATH --decode 128,8192

--prefill: seconds a token for prompts of these lengths; --decode: seconds of
one step with so many tokens in the cache, which is filled with random keys
and values, so that nobody waits for 8192 tokens to be read. The lengths take
turns, --repeats times, and each is divided by the first. PATH is a folder in
the released layout (bench/make_checkpoint.py writes one of random weights).
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from gptoss.kernels.build import kernel_path
from gptoss.model.cache import Cache
from gptoss.model.transformer import GptOss
from gptoss.text.generate import generate
from gptoss.text.sampling import Sampler


def lengths(text: str) -> list[int]:
    """"128,8192" -> [128, 8192]."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return found


def read(model: GptOss, count: int) -> float:
    """Seconds a token to read a prompt of `count` random tokens."""
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (count,),
                           generator=draw).tolist()
    start = time.perf_counter()
    next(generate(model, prompt, max_new_tokens=1,
                  sampler=Sampler(temperature=0.0)))
    return (time.perf_counter() - start) / count


@torch.inference_mode()
def filled(model: GptOss, count: int, room: int) -> Cache:
    """A cache that holds `count` tokens, with space for `room` more."""
    c = model.config
    cache = model.new_cache(max_tokens=count + room)
    plan = cache.begin(torch.arange(count)[None])
    for layer in range(c.num_hidden_layers):
        k, v = torch.randn(2, 1, count, c.num_key_value_heads,
                           c.head_dim).bfloat16()
        plan.update(layer, k, v)
    cache.commit(plan)
    return cache


@torch.inference_mode()
def write(model: GptOss, cache: Cache, steps: int) -> list[float]:
    """Seconds of each step."""
    token, times = torch.ones(1, 1, dtype=torch.int64), []
    for _ in range(steps):
        start = time.perf_counter()
        logits = model(token, cache=cache, logits_to_keep=1)
        times.append(time.perf_counter() - start)
        token = logits[:, -1].argmax(-1)[:, None]
    return times


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--prefill", type=lengths, default=[])
    parser.add_argument("--decode", type=lengths, default=[])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12,
                        help="of each turn in --decode")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = GptOss.from_pretrained(options.path)
    read(model, 32)  # the file is in memory, the kernels are loaded
    times = {("prefill", count): [] for count in options.prefill}
    times |= {("decode", count): [] for count in options.decode}
    caches = {count: filled(model, count, options.repeats * options.steps)
              for count in options.decode}
    for _ in range(options.repeats):
        for part, count in times:
            times[part, count] += (
                [read(model, count)] if part == "prefill"
                else write(model, caches[count], options.steps))
    found = {"kernels": kernel_path()}
    for part in ("prefill", "decode"):
        middle = {count: statistics.median(seconds)
                  for (kind, count), seconds in times.items() if kind == part}
        found[part] = [
            {"tokens": count, "seconds_per_token": seconds,
             "times_the_first": seconds / next(iter(middle.values()))}
            for count, seconds in middle.items()]
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for part in ("prefill", "decode"):
        for row in found[part]:
            print(f"{part} {row['tokens']:6}: "
                  f"{1000 * row['seconds_per_token']:8.2f} ms a token, "
                  f"{row['times_the_first']:.2f} times the first")


if __name__ == "__main__":
    main()
