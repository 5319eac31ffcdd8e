"""What lookups of other lengths would gain, counted and not timed.

    python bench/guesses.py [--edits 40] [--upto COMMIT]
        [--lengths 3,2/8,4,2] [--most 3,8] [--tokens 256]

The texts are edits that somebody made: of files that commits of this
repository changed (up to --upto, so that it is always the same forty), what
stood there before is the prompt, and what stands there after is what a model
would write. They were not written to be guessed, and files of which texts of
bench/drafts.py are made are left out, so the lengths of `Lookup` can be chosen
by these and examined on those. Guesses, the rule that switches them off and
the 20b's bytes are the package's own; a step of several tokens is said to cost
3 % more than its bytes for each token after the first. Told is the gain:
tokens over the cost of the steps, in steps of one token. `known` is the same
for somebody who knows before each check how many guesses are right.
"""

import argparse
import random
import re
import statistics
import subprocess
from pathlib import Path

from drafts import given, in_words

from gptoss.kernels.drafts import Lookup, Pace, check_costs, step_bytes
from gptoss.weights.config import GptOssConfig

ROOT = Path(__file__).resolve().parent.parent
BIG = GptOssConfig.gpt_oss_20b()
WRITTEN = re.compile(r"(book|bench|tests)/.*\.(py|md)$")  # not generated
EXAMINED = re.compile(r"sampling|book/index\.md")  # by bench/drafts.py


def git(*words: str) -> str:
    return subprocess.run(("git", "-C", ROOT, *words), check=True, text=True,
                          capture_output=True).stdout


def agreeing(a, b) -> int:
    """How many items at the front of a and b are the same."""
    return next((n for n, pair in enumerate(zip(a, b, strict=False))
                 if pair[0] != pair[1]), min(len(a), len(b)))


def edits(count: int, upto: str) -> dict[str, tuple[str, str]]:
    """Up to `count` files before and after a commit, from 300 characters
    before the first change on: 4000 of the one, 900 of the other."""
    commits, found = git("log", "--format=%H", upto).split(), {}
    random.Random(1).shuffle(commits)
    for commit in commits:
        for path in git("diff-tree", "-r", "--no-commit-id", "--name-only",
                        "--diff-filter=M", commit).splitlines():
            if not WRITTEN.match(path) or EXAMINED.search(path):
                continue
            before, after = (git("show", f"{at}:{path}")
                             for at in (f"{commit}^", commit))
            if len(after) < 400:
                continue
            start = max(agreeing(before, after) - 300, 0)
            found[f"{commit[:8]} {path}"] = (before[start:start + 4000],
                                             after[start:start + 900])
            break
        if len(found) == count:
            break
    return found


def steps(prompt: list[int], follows: list[int], finder: Lookup,
          known: bool) -> list[int]:
    """How many tokens each forward runs that writes `follows`."""
    pace, fed, at = Pace(check_costs(BIG, finder)), [], 1
    finder.begin(prompt + follows[:1])
    while at < len(follows):
        length = finder.most if known else pace.length
        room = min(length or 1, len(follows) - at - 1)
        guesses = finder.propose(room, None, None)[0] if room else []
        right = agreeing(guesses, follows[at:])
        pace.saw(right, right < len(guesses))
        checked = (right if known else len(guesses)) if length else 0
        fed.append(checked + 1)
        taken = min(right, checked) + 1
        finder.add(follows[at:at + taken])
        at += taken
    return fed


def gain(pair: tuple[list[int], list[int]], tokens: int, finder: Lookup,
         known: bool = False) -> float:
    follows = list(pair[1][:tokens])
    spent = sum((1 + 0.03 * (n - 1)) * step_bytes(BIG, n) / step_bytes(BIG, 1)
                for n in steps(list(pair[0]), follows, finder, known))
    return (len(follows) - 1) / spent


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--edits", type=int, default=40)
    parser.add_argument("--upto", default="ff85d08bec83")
    parser.add_argument("--lengths", default="3,2/4,3,2/6,4,2/8,4,2/8,4,3,2")
    parser.add_argument("--most", default="3,4,6,8,12")
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args(argv)
    exam = in_words(given())
    texts = in_words(edits(options.edits, options.upto))
    print(len(texts), "edits: their mean, lower quartile and lowest; then",
          ", ".join(exam), "(known)")
    for lengths in options.lengths.split("/"):
        for most in map(int, options.most.split(",")):
            def finder(lengths=lengths, most=most):
                return Lookup([*map(int, lengths.split(","))], most)

            gains = sorted(gain(pair, options.tokens, finder())
                           for pair in texts.values())
            print(f"{lengths:8} {most:2}: {statistics.mean(gains):.2f} "
                  f"{gains[len(gains) // 4]:.2f} {gains[0]:.2f};", *(
                      f"{gain(pair, 128, finder()):.2f} "
                      f"({gain(pair, 128, finder(), True):.2f})"
                      for pair in exam.values()), flush=True)


if __name__ == "__main__":
    main()
