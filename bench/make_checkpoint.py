"""Write a gpt-oss-shaped checkpoint of random weights, shard by shard.

    python bench/make_checkpoint.py --config 20b --out /tmp/random-20b

The shapes, names and dtypes are the released ones (13.76 GB for the 20b,
65.2 GB for the 120b, less with --layers); the numbers are random. Memory
stays at a few tensors whatever the size. What it is good for: measuring
loading, memory and speed without downloading anything. What it writes is
noise, and it has no tokenizer.
"""

import argparse
import resource
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import checkpoint_bytes
from gptoss.weights.write import random_tensors, write_checkpoint

TINY = GptOssConfig(
    num_hidden_layers=4, num_local_experts=8, num_experts_per_tok=2,
    vocab_size=1024, hidden_size=64, intermediate_size=96, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=16)
CONFIGS = {"20b": GptOssConfig.gpt_oss_20b(),
           "120b": GptOssConfig.gpt_oss_120b(), "tiny": TINY}
SHARD_BYTES = 5 * 10 ** 9  # the size at which the released files are cut


def counted(tensors, total, start):
    """Pass tensors through; every gigabyte a line on stderr."""
    done, told = 0, 0
    for name, tensor in tensors:
        yield name, tensor
        done += tensor.nbytes
        if done - told >= 10 ** 9 or done == total:
            told = done
            seconds = time.perf_counter() - start
            print(f"{done:,} of {total:,} bytes, {seconds:.0f} s",
                  file=sys.stderr)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", choices=CONFIGS, default="20b")
    parser.add_argument("--layers", type=int,
                        help="fewer (or more) layers than the config")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", choices=("hf", "original"), default="hf")
    parser.add_argument("--out", type=Path, required=True,
                        help="a directory that does not exist yet")
    options = parser.parse_args(argv)
    config = CONFIGS[options.config]
    if options.layers is not None:
        if options.layers < 1:
            parser.error(f"--layers: expected 1 or more, found "
                         f"{options.layers}")
        config = replace(config, num_hidden_layers=options.layers,
                         layer_types=None)
    if options.out.exists():
        parser.error(f"--out: {options.out} exists")
    total = checkpoint_bytes(config)
    parent = next(p for p in options.out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < 1.05 * total:
        parser.error(f"--out: needs {total / 1e9:.1f} GB, found "
                     f"{free / 1e9:.1f} GB free")
    start = time.perf_counter()
    tensors = random_tensors(config, options.seed, options.layout)
    write_checkpoint(options.out, config, counted(tensors, total, start),
                     layout=options.layout, max_shard_bytes=SHARD_BYTES)
    seconds = time.perf_counter() - start
    written = sum(file.stat().st_size
                  for file in options.out.rglob("*.safetensors"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{options.out}: {written:,} bytes in {seconds:.1f} s "
          f"({written / seconds / 1e9:.2f} GB/s), peak memory "
          f"{peak / 2 ** 20:.2f} GiB")


if __name__ == "__main__":
    main()
