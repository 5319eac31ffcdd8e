"""llama-bench and llama-batched-bench, built elsewhere, for compare.py.

llama-bench is asked for its help first. Where that knows `-rtr`, as
ik_llama.cpp's does, weights are repacked while loading, and all texts of
llama-batched-bench get the same tokens: token 0, always. llama.cpp's own
repacks without being told, and draws a random token for each text.

ik_llama.cpp's two programs take switches differently, `-rtr 1` and `-rtr`;
they are given here as llama-bench takes them.
"""

import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

SWITCHES = ("-rtr", "-mqkv", "-muge", "-thp", "-ger")


class Failed(Exception):
    """A program that is not there or ends with an error."""


def ran(command: list, threads: int) -> tuple[str, int]:
    """What the program writes, stdout and then stderr, and its peak in
    bytes. Failed, with its last line, if it ends with an error."""
    with tempfile.TemporaryDirectory() as folder, \
            tempfile.TemporaryFile("w+") as out, \
            tempfile.TemporaryFile("w+") as err:
        try:
            process = subprocess.Popen(
                list(map(str, command)), stdout=out, stderr=err,
                stdin=subprocess.DEVNULL, cwd=folder,  # some leave a log
                env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        except OSError as error:
            raise Failed(str(error)) from None
        # wait4 and not wait: it tells the peak of this child alone
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    if process.returncode:
        lines = "\n".join(texts).strip().splitlines()
        raise Failed(lines[-1] if lines else
                     f"{command[0]} ended with {process.returncode}")
    return "\n".join(texts), usage.ru_maxrss * 1024


def helped(program: Path) -> str:
    """Its help; some end with an error after it."""
    try:
        return subprocess.run([str(program), "--help"], capture_output=True,
                              text=True).stdout
    except OSError as error:
        raise Failed(str(error)) from None


def tests(text: str) -> list[dict]:
    """The list that `llama-bench -o json` writes, among other lines."""
    lines = text.splitlines()
    start = lines.index("[")
    end = lines.index("]", start)
    return json.loads("\n".join(lines[start:end + 1]))


def speed(test: dict) -> float:
    """Tokens a second: the median of its repetitions, if it tells them."""
    return statistics.median(test.get("samples_ts") or [test["avg_ts"]])


def batches(text: str) -> dict[str, float]:
    """Texts together -> tokens a second, from llama-batched-bench's table.

    Its columns: PP, TG, B, N_KV, T_PP, S_PP, T_TG, S_TG, T, S.
    """
    found = {}
    for line in text.splitlines():
        cells = line.strip().strip("|").split("|")
        try:
            numbers = [float(cell) for cell in cells]
        except ValueError:
            continue  # a heading, or a line of the log
        if len(numbers) == 10:
            found[str(int(numbers[2]))] = numbers[7]
    return found


def as_switches(options: list[str]) -> list[str]:
    """llama-bench's options as llama-batched-bench takes them."""
    left, found = iter(options), []
    for option in left:
        if option not in SWITCHES:
            found.append(option)
        elif next(left) != "0":
            found.append(option)
    return found


def bench_binary(folder: Path, more: list[str], file: Path, options,
                 context: int) -> dict | str:
    """What a folder's two programs say of a file, with compare.py's options;
    or in words why there is nothing."""
    folder, file, threads = folder.resolve(), file.resolve(), options.threads
    one, many = folder / "llama-bench", folder / "llama-batched-bench"
    try:
        repacks = "-rtr" in helped(one)
        if repacks and "-rtr" not in more:
            more = [*more, "-rtr", "1"]
        base = [one, "-m", file, "-t", threads, "-o", "json", *more]
        text, peak = ran([*base, "-p", options.prompt, "-n", options.tokens,
                          "-r", options.repeats], threads)
        found = {"threads": threads, "prompt_tokens": options.prompt,
                 "new_tokens": options.tokens, "repeats": options.repeats,
                 "peak_rss_bytes": peak, "options": more}
        for test in tests(text):
            part = "decode" if test["n_gen"] else "prefill"
            found[f"{part}_tokens_per_second"] = speed(test)
        if options.long:
            text, _ = ran([*base, "-p", options.long, "-n", 0, "-r", 1],
                          threads)
            found["prefill_of"] = {str(options.long): speed(*tests(text))}
        if options.together:
            most = max(options.together)
            text, _ = ran(
                [many, "-m", file, "-t", threads,
                 *(as_switches(more) if repacks else more), "-pps", "-npp",
                 context, "-ntg", options.tokens, "-npl",
                 ",".join(map(str, options.together)), "-c",
                 most * (context + options.tokens)], threads)
            found["together"] = {"same" if repacks else "distinct":
                                 batches(text)}
    except Failed as error:
        return str(error)
    return found
