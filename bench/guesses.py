"""What lookups of other lengths would gain, counted and not timed.

    python bench/guesses.py [--each 40] [--upto COMMIT]
        [--lengths 8,4,2,1/8,4,2] [--most 4,8] [--tokens 256] [--one-share]

The texts are what somebody wrote in this repository (up to --upto, so that
they are always the same): edits of files, where what stood there before is the
prompt, and what stands there after is what a model would write; edits of JSON;
lists that quote what a search found, line by line, in words of several
patterns; tests of a module, after the module; prose, after the cell that
printed what it is about. But for the patterns of the lists nothing of it was
written to be guessed, and files of which texts of bench/drafts.py are made are
left out, so the lengths of `Lookup` can be chosen by these and examined on
those. Guesses, the rule that
switches them off and the 20b's bytes are the package's own; a step of several
tokens is said to cost 3 % more than its bytes for each token after the first.
Told is the gain: tokens over the cost of the steps, in steps of one token.
`known` is the same for somebody who knows before each check how many guesses
are right. With --one-share all guesses are believed alike, by how many of them
were right of late, as those of a small model are.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

from drafts import given, in_words

from gptoss.kernels.drafts import Pace, check_costs, step_bytes
from gptoss.kernels.lookup import Lookup
from gptoss.weights.config import GptOssConfig

ROOT = Path(__file__).resolve().parent.parent
BIG = GptOssConfig.gpt_oss_20b()
WRITTEN = re.compile(  # not generated
    r"(book/(?!api\.md)|bench/|tests/).*\.(py|md)$")
EXAMINED = re.compile(r"sampling|book/index\.md")  # by bench/drafts.py


def git(*words: str) -> str:
    return subprocess.run(("git", "-C", ROOT, *words), check=True, text=True,
                          capture_output=True).stdout


def agreeing(a, b) -> int:
    """How many items at the front of a and b are the same."""
    return next((n for n, pair in enumerate(zip(a, b, strict=False))
                 if pair[0] != pair[1]), min(len(a), len(b)))


Texts = dict[str, tuple[str, str]]  # name -> (prompt, what follows)


def changed(upto: str, wanted: re.Pattern[str]
            ) -> Iterator[tuple[str, str, str]]:
    """Commits in an order by chance, each with the path and the text of the
    first file it changed that is not short."""
    commits = git("log", "--format=%H", upto).split()
    random.Random(1).shuffle(commits)
    for commit in commits:
        for path in git("diff-tree", "-r", "--no-commit-id", "--name-only",
                        "--diff-filter=M", commit).splitlines():
            if not wanted.match(path) or EXAMINED.search(path):
                continue
            after = git("show", f"{commit}:{path}")
            if len(after) >= 400:
                yield commit, path, after
                break


def edits(count: int, upto: str, wanted: re.Pattern[str] = WRITTEN) -> Texts:
    """Up to `count` files before and after a commit, from 300 characters
    before the first change on: 4000 of the one, 900 of the other."""
    found = {}
    for commit, path, after in changed(upto, wanted):
        before = git("show", f"{commit}^:{path}")
        start = max(agreeing(before, after) - 300, 0)
        found[f"{commit[:8]} {path}"] = (before[start:start + 4000],
                                         after[start:start + 900])
        if len(found) == count:
            break
    return found


def files(upto: str, wanted: str) -> list[str]:
    paths = git("ls-tree", "-r", "--name-only", upto).splitlines()
    return [path for path in paths if re.fullmatch(wanted, path)
            and not EXAMINED.search(path)]


def some(texts: Texts, count: int) -> Texts:
    names = sorted(texts)
    random.Random(1).shuffle(names)
    return {name: texts[name] for name in names[:count]}


def tests(count: int, upto: str) -> Texts:
    """A module, and then its tests."""
    modules = {Path(path).name: path
               for path in files(upto, r"gptoss/.*[a-z]\.py")}
    return some({path: (git("show", f"{upto}:{modules[name]}")[:5000],
                        git("show", f"{upto}:{path}")[:1500])
                 for path in files(upto, r"tests/.*/test_.*\.py")
                 if (name := Path(path).name.removeprefix("test_"))
                 in modules}, count)


def prose(count: int, upto: str) -> Texts:
    """A cell and what it printed, and then the words after it."""
    found = {}
    for path in files(upto, r"book/.*\.ipynb"):
        listed = json.loads(git("show", f"{upto}:{path}"))["cells"]
        for n, (cell, after) in enumerate(zip(listed, listed[1:],
                                              strict=False)):
            said = "".join("".join(output.get("text", ""))
                           for output in cell.get("outputs", ()))
            words = "".join(after["source"])
            if (after["cell_type"] == "markdown"
                    and min(len(said), len(words)) > 300):
                found[f"{path} {n}"] = ("".join(cell["source"]) + said,
                                        words[:900])
    return some(found, count)


SEARCHED = ("assert", "import", "raise", "yield", "lambda", "return None",
            "clamp", "softmax", "Sequence", "json", "device", "dtype")
PATTERNS = ("- `{}` line {}: `{}`\n", "In {} at {} we find {}. ",
            "{1} of {0} says \"{2}\", which is fine.\n", "| {} | {} | {} |\n",
            "The line {2} stands in {0} ({1}); leave it.\n",
            '{{"path": "{}", "line": {}, "text": "{}"}},\n')


def lists(count: int, upto: str) -> Texts:
    """Seven lines that a search found, and a list that quotes them."""
    rng, found = random.Random(3), {}
    for n in range(count):
        word = SEARCHED[n % len(SEARCHED)]
        lines = [line.split(":", 1)[1] for line in git(
            "grep", "-n", word, upto, "--", "gptoss", "bench",
            "tests").splitlines() if not EXAMINED.search(line.split(":")[1])]
        lines = rng.sample(lines, min(len(lines), 7))
        found[f"{n} {word}"] = (
            "\n".join(lines) + "\n\nWhich of them matter?\n",
            "".join(PATTERNS[(n + n // len(SEARCHED)) % len(PATTERNS)].format(
                *map(str.strip, line.split(":", 2)))
                for line in lines)[:900])
    return found


def kinds(count: int, upto: str) -> dict[str, Texts]:
    return {"edits": edits(count, upto),
            "JSON": edits(count, upto, re.compile(r".*\.json$")),
            "lists": lists(count, upto), "tests": tests(count, upto),
            "prose": prose(count, upto)}


def steps(prompt: list[int], follows: list[int], finder: Lookup,
          known: bool, one_share: bool) -> list[int]:
    """How many tokens each forward runs that writes `follows`."""
    pace, fed, at = Pace(check_costs(BIG, finder)), [], 1
    finder.begin(prompt + follows[:1])
    while at < len(follows):
        room = min(finder.most, len(follows) - at - 1)
        guesses = finder.propose(room, None, None)[0] if room else []
        length = pace.length if one_share else pace.best(finder.chances)
        guesses = guesses if known else guesses[:length or 1]
        right = agreeing(guesses, follows[at:])
        pace.saw(right, right < len(guesses))
        checked = right if known else len(guesses) if length else 0
        fed.append(checked + 1)
        taken = min(right, checked) + 1
        finder.add(follows[at:at + taken])
        at += taken
    return fed


def gain(pair: tuple[list[int], list[int]], tokens: int, finder: Lookup,
         known: bool = False, one_share: bool = False) -> float:
    follows = list(pair[1][:tokens])
    spent = sum((1 + 0.03 * (n - 1)) * step_bytes(BIG, n) / step_bytes(BIG, 1)
                for n in steps(list(pair[0]), follows, finder, known,
                               one_share))
    return (len(follows) - 1) / spent


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--each", type=int, default=40,
                        help="texts of each kind at most (default: 40)")
    parser.add_argument("--upto", default="ff85d08bec83")
    parser.add_argument("--lengths", default="8,4,2,1/8,4,2/16,8,4,2,1/4,2,1")
    parser.add_argument("--most", default="4,8,12")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--one-share", action="store_true")
    options = parser.parse_args(argv)
    exam = in_words(given())
    texts = {kind: in_words(found) for kind, found in
             kinds(options.each, options.upto).items()}
    print("mean and lowest of", ", ".join(
        f"{len(found)} {kind}" for kind, found in texts.items()), "; then",
        ", ".join(exam), "(known)")
    for lengths in options.lengths.split("/"):
        for most in map(int, options.most.split(",")):
            def finder(lengths=lengths, most=most):
                return Lookup([*map(int, lengths.split(","))], most)

            def gains(found, finder=finder):
                return [gain(pair, options.tokens, finder(),
                             one_share=options.one_share)
                        for pair in found.values()]

            means = [f"{statistics.mean(row):.2f} {min(row):.2f}"
                     for row in map(gains, texts.values())]
            print(f"{lengths:10} {most:2}:", ", ".join(means) + ";", *(
                f"{gain(pair, 128, finder(), one_share=options.one_share):.2f}"
                f" ({gain(pair, 128, finder(), True):.2f})"
                for pair in exam.values()), flush=True)


if __name__ == "__main__":
    main()
