"""What a figure draws, as text: so that a changed picture is noticed.

The bytes of an image differ between machines, and nbval does not compare
them. It compares the text of an output, and the text of a figure is its repr.
In the kernels that freeze and check the book (kernel.py beside this file)
that repr tells what is drawn: every label, every colour, and of every array
the means of up to 24 stretches, as shares of the frame. `same` compares two
such texts, numbers with a tolerance; book/conftest.py lets nbval use it.
"""

import re
from itertools import groupby

import numpy as np

STRETCHES = 24
TOLERANCE = 0.002  # of the frame; `figure.tolerance = 0.1` in a cell: coarser


def means(values, low: float = 0.0, high: float = 1.0) -> str:
    """Size of an array, whatever its shape, and the means of its stretches:
    0 for low, 1 for high. What is not finite is left out."""
    flat = np.ma.filled(np.ma.asarray(values, float), np.nan).ravel()
    flat = flat[np.isfinite(flat)]
    pieces = np.array_split(flat, min(STRETCHES, flat.size or 1))
    shares = [(piece.mean() - low) / ((high - low) or 1.0)
              for piece in pieces if piece.size]
    return f"{flat.size}:" + "".join(f" {round(share, 4) + 0.0:.4f}"
                                     for share in shares)


def _line(*words: str) -> str:
    return " | ".join(" ".join(word.split()) for word in words if word)


def _color(value) -> str:
    from matplotlib.colors import to_hex

    return to_hex(value, keep_alpha=True)


def _frame(axes) -> np.ndarray:
    """(low, high) x (x, y), on the scales of the axes."""
    corners = np.transpose([axes.get_xlim(), axes.get_ylim()])
    with np.errstate(all="ignore"):
        return axes.transScale.transform(corners)


def _columns(name: str, axes, points) -> list[str]:
    """Rows for the x and the y of points, in the frame of the axes."""
    with np.errstate(all="ignore"):
        points = axes.transScale.transform(np.asarray(points, float))
    return [f"{name} {letter} {means(column, *ends)}" for letter, column, ends
            in zip("xy", points.T, _frame(axes).T, strict=True)]


def _boxes(name: str, axes, patches) -> list[str]:
    """Patches of one colour: their corners."""
    corners = [patch.get_path().transformed(patch.get_patch_transform())
               .get_extents().get_points() for patch in patches]
    return _columns(name, axes, np.concatenate(corners))


def _clim(artist) -> tuple[float, float]:
    low, high = artist.get_clim()
    return (0.0, 1.0) if low is None or high is None else (low, high)


def _collection(axes, artist) -> list[str]:
    kind, rows = type(artist).__name__, []
    for part in ("facecolor", "edgecolor"):
        rows.append(f"{kind} {part} "
                    f"{means(getattr(artist, f'get_{part}')())}")
    if artist.get_array() is not None:
        rows.append(f"{kind} values "
                    f"{means(artist.get_array(), *_clim(artist))}")
    offsets = artist.get_offsets()
    if len(offsets) > 1:
        rows += _columns(kind, axes, offsets)
    else:
        paths = [path.vertices for path in artist.get_paths()]
        rows += _columns(kind, axes, np.concatenate(paths)) if paths else []
    return rows


def _axes(axes) -> list[str]:
    """Rows for everything that one pair of axes holds."""
    from matplotlib import axes as nested
    from matplotlib import collections, image, lines, patches, text, ticker

    own = {axes.patch, *axes.spines.values(), axes.xaxis, axes.yaxis}
    titles = [axes.get_title(where) for where in ("left", "center", "right")]
    words = [*titles, axes.get_xlabel(), axes.get_ylabel(),
             axes.get_xscale(), axes.get_yscale()]
    rows = ["axes " + _line(*words)]
    rows += [f"limits {letter}: {low:.6g} {high:.6g}"
             for letter, low, high in zip("xy", *_frame(axes), strict=True)]
    for axis in (axes.xaxis, axes.yaxis):
        if isinstance(axis.get_major_formatter(), ticker.FixedFormatter):
            rows.append("ticks " + _line(*(
                label.get_text() for label in axis.get_ticklabels())))

    def look(artist):
        if isinstance(artist, patches.FancyArrowPatch):
            return "arrow", _color(artist.get_edgecolor())
        if isinstance(artist, patches.Patch):
            return "patch", _color(artist.get_facecolor())
        return type(artist).__name__, id(artist)

    shown = [artist for artist in axes.get_children()
             if artist not in own and artist.get_visible()]
    for (kind, color), run in groupby(shown, look):
        run = list(run)
        if kind == "arrow":
            rows.append(f"arrow {color} {len(run)}")
        elif kind == "patch":
            rows += _boxes(f"patch {color}", axes, run)
        elif isinstance(run[0], lines.Line2D):
            rows += _columns(f"line {_color(run[0].get_color())}", axes,
                             run[0].get_xydata())
        elif isinstance(run[0], text.Text):
            if run[0].get_text() and run[0].get_text() not in titles:
                rows.append(f"text {_color(run[0].get_color())} "
                            f"{run[0].get_text()!r}")
        elif isinstance(run[0], image._ImageBase):
            low, high = _clim(run[0])
            rows += [f"image {run[0].get_cmap().name} "
                     f"{means(run[0].get_array(), low, high)}",
                     f"limits of colours: {low:.6g} {high:.6g}"]
        elif isinstance(run[0], collections.Collection):
            rows += _collection(axes, run[0])
        elif isinstance(run[0], nested.Axes):
            rows += _axes(run[0])
        elif kind == "Legend":
            rows.append("legend " + _line(*(
                label.get_text() for label in run[0].get_texts())))
        else:
            rows.append(kind)
    return rows


def drawn(figure) -> str:
    """Text that tells what a matplotlib figure shows, a row an array."""
    width, height = figure.get_size_inches() * figure.dpi
    tolerance = getattr(figure, "tolerance", TOLERANCE)
    rows = [f"<Figure {width:.0f}x{height:.0f}, compared to {tolerance:g}"]
    inner = {child for axes in figure.axes for child in axes.child_axes}
    for axes in figure.axes:
        if axes not in inner:
            rows += _axes(axes)
    rows += [f"text {words.get_text()!r}" for words in figure.texts]
    for legend in figure.legends:
        rows.append("legend " + _line(*(
            label.get_text() for label in legend.get_texts())))
    return "\n".join(rows) + ">"


_NUMBERS = re.compile(r"(.*?:)((?: -?[\d.e+-]+)+)(>?)")


def _row_same(old: str, new: str, tolerance: float) -> bool:
    if old == new:
        return True
    a, b = _NUMBERS.fullmatch(old), _NUMBERS.fullmatch(new)
    if not a or not b or (a[1], a[3]) != (b[1], b[3]):
        return False
    there, here = (np.array(m[2].split(), float) for m in (a, b))
    whole = np.ptp(there) if old.startswith("limits") else 1.0
    return there.shape == here.shape and bool(
        (np.abs(there - here) <= tolerance * whole).all())


def same(old: str, new: str) -> bool:
    """Whether two texts of `drawn` tell of the same picture.

    Words, colours and the sizes of arrays are equal; means of stretches lie
    no further apart than the old text's tolerance, a share of the frame.
    """
    head = re.match(r"<Figure \S+, compared to (\S+)$", old.split("\n")[0])
    rows, others = old.split("\n"), new.split("\n")
    return bool(head) and len(rows) == len(others) and all(
        _row_same(row, other, float(head[1]))
        for row, other in zip(rows, others, strict=True))


def watch() -> None:
    """From here on in this process the repr of a figure is `drawn`."""
    from matplotlib.figure import Figure

    Figure.__repr__ = drawn
