"""What a figure draws, as text: changed data are noticed, jitter is not."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest
from freeze import freeze
from matplotlib.figure import Figure

BOOK = Path(__file__).resolve().parents[2] / "book"
FIGURES = runpy.run_path(str(BOOK / "_ext" / "figures.py"))
drawn, same = FIGURES["drawn"], FIGURES["same"]


def data(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"line": rng.normal(size=200).cumsum(), "bar": rng.random(7) + 1,
            "points": rng.random((30, 2)) * 5, "image": rng.random((24, 24)),
            "band": 10.0 ** rng.random(40), "mesh": rng.random((6, 5)),
            "side": rng.random(4)}


def picture(of: dict[str, np.ndarray], title: str = "t", color: str = "C0",
            bar_label: str = "b") -> Figure:
    """One artist of every kind that the book draws, in fixed frames."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots(2, 3).ravel()
    axes[0].plot(of["line"], color=color)
    axes[0].axvline(50)
    axes[0].set(title=title, ylim=(-40, 40))
    axes[1].bar(range(7), of["bar"], label=bar_label)
    axes[1].set(ylim=(0, 3))
    axes[1].set_xticks(range(7), list("abcdefg"))
    axes[1].legend()
    axes[2].scatter(*of["points"].T, c=of["points"][:, 0], vmin=0, vmax=5)
    axes[2].set(xlim=(0, 5), ylim=(0, 5))
    axes[3].imshow(of["image"], vmin=0, vmax=1)
    axes[3].text(3, 3, "two\nlines")
    axes[4].fill_between(range(40), 1, of["band"])
    axes[4].set(yscale="log", ylim=(1, 10))
    axes[5].pcolormesh(of["mesh"], vmin=0, vmax=1)
    inner = axes[5].inset_axes([0.6, 0.6, 0.3, 0.3])
    inner.barh(range(4), of["side"])
    inner.set(xlim=(0, 1))
    figure.suptitle("all")
    return figure


@pytest.mark.parametrize("seed", range(3))
def test_the_same_data_are_the_same_picture(seed: int) -> None:
    text = drawn(picture(data(seed)))
    assert drawn(picture(data(seed))) == text
    rng = np.random.default_rng(seed)
    jitter = {name: values * (1 + 1e-6 * rng.normal(size=values.shape))
              for name, values in data(seed).items()}
    assert same(text, drawn(picture(jitter)))
    assert not same(text, drawn(picture(data(seed + 10))))


@pytest.mark.parametrize("name", list(data()))
@pytest.mark.parametrize("where", [0, -1])
def test_one_changed_datum_is_noticed(name: str, where: int) -> None:
    changed = data()
    span = {"line": 80, "bar": 3, "points": 5, "band": 0}.get(name, 1)
    values = changed[name].reshape(-1)
    values[where] += 0.1 * span if span else 0.5 * values[where]
    assert not same(drawn(picture(data())), drawn(picture(changed)))


@pytest.mark.parametrize("other", [
    {"title": "u"}, {"color": "0.6"}, {"bar_label": "c"}])
def test_words_and_colours_are_noticed(other: dict[str, str]) -> None:
    assert not same(drawn(picture(data())), drawn(picture(data(), **other)))


def test_an_artist_more_or_a_frame_moved_is_noticed() -> None:
    text = drawn(picture(data()))
    more = picture(data())
    more.axes[0].axhline(0)
    moved = picture(data())
    moved.axes[4].set_ylim(1, 12)
    hidden = picture(data())
    hidden.axes[0].lines[0].set_visible(False)
    for changed in (more, moved, hidden):
        assert not same(text, drawn(changed))


def test_a_figure_may_ask_for_a_coarser_comparison() -> None:
    rough, noise = picture(data()), data()
    noise["bar"] = noise["bar"] * 1.03
    assert not same(drawn(rough), drawn(picture(noise)))
    rough.tolerance = 0.1
    other = picture(noise)
    other.tolerance = 0.1
    assert same(drawn(rough), drawn(other))
    noise["bar"] = noise["bar"] * 1.5
    worse = picture(noise)
    worse.tolerance = 0.1
    assert not same(drawn(rough), drawn(worse))


@pytest.mark.parametrize("old", [
    "", "<Figure size 700x400 with 1 Axes>", "<Figure 7x4, compared to x>"])
def test_a_text_of_another_kind_is_never_the_same(old: str) -> None:
    assert not same(old, drawn(picture(data())))


def test_numbers_that_are_none() -> None:
    holes = data()
    holes["line"][5] = np.nan
    text = drawn(picture(holes))
    assert same(text, text) and not same(text, drawn(picture(data())))
    assert "nan" not in text


# --- In kernels --------------------------------------------------------------

CHAPTER = """\
# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %%
import matplotlib.pyplot as plt

plt.bar(range(3), [1, 2, HEIGHT])
plt.show()

# %%
print([name for name in dir() if name in ("os", "runpy", "drawn", "watch")])
"""


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A book of one chapter with one figure, with our machinery."""
    book = tmp_path_factory.mktemp("picture") / "book"
    book.mkdir()
    (book / "_ext").symlink_to(BOOK / "_ext")
    (book / "conftest.py").write_text((BOOK / "conftest.py").read_text())
    (book / "01_bars.py").write_text(CHAPTER.replace("HEIGHT", "3.0"))
    freeze(book / "01_bars.py")
    return book / "01_bars.ipynb"


def test_a_frozen_figure_tells_what_it_shows(frozen: Path) -> None:
    cells = nbformat.read(frozen, 4).cells
    (output,) = cells[0].outputs
    assert "image/png" in output.data
    assert output.data["text/plain"].startswith("<Figure ")
    assert "patch #1f77b4ff y 6: 0.0000" in output.data["text/plain"]
    assert cells[1].outputs[0].text == "[]\n"  # no name is left behind


def test_nbval_compares_pictures(frozen: Path) -> None:
    """Three copies in one run, whose source now draws something else."""
    text, book = frozen.read_text("utf-8"), frozen.parent
    for name, height in (("same", "3.0"), ("jitter", "3.000003"),
                         ("other", "3.1")):
        changed = text.replace("2, 3.0]", f"2, {height}]")
        (book / f"{name}.ipynb").write_text(changed, "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider",
         "--nbval", "--nbval-kernel-name", "python3", "book/same.ipynb",
         "book/jitter.ipynb", "book/other.ipynb"],
        cwd=book.parent, capture_output=True, text=True, timeout=200)
    verdicts = re.findall(r"(\w+)::ipynb::Cell (\d) ([A-Z]+)", done.stdout)
    assert sorted(set(verdicts)) == [
        ("jitter", "0", "PASSED"), ("jitter", "1", "PASSED"),
        ("other", "0", "FAILED"), ("other", "1", "PASSED"),
        ("same", "0", "PASSED"), ("same", "1", "PASSED")]


def test_every_frozen_figure_of_the_book_tells_what_it_shows() -> None:
    plain = [f"{path.name}: {cell['id']}"
             for path in sorted(BOOK.glob("*.ipynb"))
             for cell in json.loads(path.read_text("utf-8"))["cells"]
             for out in cell.get("outputs", [])
             if "image/png" in out.get("data", {})
             and ", compared to " not in "".join(out["data"]["text/plain"])]
    assert not plain, "frozen without book/_ext/kernel.py: make freeze"


def test_matplotlib_is_left_alone_outside_the_kernels() -> None:
    assert matplotlib.figure.Figure.__repr__.__name__ == "__repr__"


def test_a_kernel_that_dies_at_its_start_is_started_again():
    patient = runpy.run_path(str(BOOK / "conftest.py"))["patient"]
    left = [RuntimeError("Kernel died"), RuntimeError("Kernel died")]

    def start(name):
        if left:
            raise left.pop()
        return name

    assert patient(start)("python3") == "python3" and not left
    left = [RuntimeError("Kernel died")] * 3
    with pytest.raises(RuntimeError, match="died"):
        patient(start)("python3")
