"""The whole model on one sheet of A4: the figure at the end of one_page.py.

Only the drawing is here; every number comes from the chapter's cells. Lengths
are millimetres of a landscape sheet, 297 by 210.
"""

import matplotlib.pyplot as plt

MATRIX, PACKED, STEP, NORM = "#d6e6f5", "#cfeadd", "#ffffff", "#fdeccb"
STREAM, OTHER = "#D55E00", "#7a4a00"


def said(count: float) -> str:
    """Bytes as people say them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            digits = max(0, 2 - len(f"{count / size:.0f}") + 1)
            return f"{count / size:.{digits}f} {unit}"
    return f"{count} bytes"


class Sheet:
    """An empty sheet, and what is drawn on it."""

    def __init__(self) -> None:
        self.figure, self.ax = plt.subplots(figsize=(11.7, 8.3))
        self.ax.set(xlim=(0, 297), ylim=(0, 210))
        self.ax.axis("off")

    def box(self, x, y, width, height, text, color, below="", other=""):
        """A step; under it its bytes, and the 120b's where they differ."""
        self.ax.add_patch(
            plt.Rectangle(
                (x - width / 2, y - height / 2),
                width,
                height,
                fc=color,
                ec="0.25",
                lw=1,
            )
        )
        self.ax.text(x, y, text, ha="center", va="center", fontsize=8.5)
        foot = y - height / 2 - 1
        self.ax.text(
            x, foot, below, ha="center", va="top", fontsize=7.5, weight="bold"
        )
        self.ax.text(
            x,
            foot - 4,
            other,
            ha="center",
            va="top",
            fontsize=7.5,
            color=OTHER,
        )

    def line(self, points, color="0.25", width=1.1, head=True):
        """An arrow along points, straight from each to the next."""
        xs, ys = zip(*points, strict=True)
        self.ax.plot(xs, ys, color=color, lw=width, solid_joinstyle="round")
        if head:
            self.ax.annotate(
                "",
                points[-1],
                points[-2],
                arrowprops={"arrowstyle": "-|>", "color": color, "lw": width},
            )

    def on(self, x, y, text, **style):
        self.ax.text(x, y, text, fontsize=7, ha="center", color="0.2", **style)


def draw(
    sizes: dict[str, int],
    layer: dict[str, dict[str, int]],
    whole: dict[str, dict[str, int]],
) -> plt.Figure:
    """The poster. sizes: D, H, G, C, F, V, K, W. layer and whole: by model,
    "20b" and "120b", the bytes of a layer's tensors and of all, by name."""
    D, H, G, C, F, V, K, W = (sizes[letter] for letter in "DHGCFVKW")
    one, big = layer["20b"], layer["120b"]
    sheet = Sheet()
    ax, box, line, on = sheet.ax, sheet.box, sheet.line, sheet.on
    ax.text(
        4,
        203,
        "gpt-oss from text to the next token",
        fontsize=15,
        weight="bold",
    )
    ax.text(
        4,
        196,
        "T tokens are read at once. Bytes of the 20b; below them, "
        "where they differ, of the 120b.",
        fontsize=9,
    )
    for x, color, text in (
        (160, MATRIX, "matrix, bf16"),
        (195, PACKED, "matrices, four bits"),
        (238, NORM, "norm"),
        (257, STEP, "no weights"),
    ):
        ax.add_patch(
            plt.Rectangle((x, 202.5), 5, 4, fc=color, ec="0.25", lw=1)
        )
        ax.text(x + 7, 204.5, text, fontsize=8, va="center")
    # into the stream
    box(21, 178, 30, 10, "text", STEP)
    line([(21, 173), (21, 163)])
    box(21, 157, 30, 12, "tokenizer", STEP)
    line([(21, 151), (21, 134)])
    on(28, 141, "(T)")
    box(21, 127, 30, 14, f"embedding\n{V:,} × {D}", MATRIX, said(2 * V * D))
    # the frame of a block, and the stream
    ax.add_patch(
        plt.Rectangle(
            (46, 38), 205, 150, fc="#fafafa", ec="0.5", ls="--", lw=1.2
        )
    )
    ax.text(
        49,
        182,
        "one layer: 24 of them in the 20b, 36 in the 120b",
        fontsize=9.5,
        weight="bold",
    )
    line(
        [
            (36, 127),
            (41, 127),
            (41, 174),
            (241, 174),
            (246, 174),
            (246, 108),
            (50, 108),
            (50, 98),
            (262, 98),
        ],
        STREAM,
        2.6,
    )
    on(58, 176, f"(T, {D})")
    ax.text(
        150,
        176,
        "the residual stream: every branch reads it and adds to it",
        fontsize=8,
        color=STREAM,
        ha="center",
    )
    on(58, 100, f"(T, {D})")
    # attention
    line([(58, 174), (58, 152)])
    box(58, 147, 15, 10, "norm", NORM, said(one["norm"]))
    for y, name, heads in ((161, "q", H), (145, "k", G), (127, "v", G)):
        line([(65.5, 147), (72, 147), (72, y), (77, y)])
        box(
            92, y, 30, 8, f"{name}: {D} → {heads * C}", MATRIX, said(one[name])
        )
        shape = f"(T, {heads}, {C})"
        if name == "v":
            line([(107, y), (164, y)])
            on(135, y + 1.2, shape)
        else:
            line([(107, y), (126, y)])
            on(116.5, y + 1.2, shape)
            line([(144, y), (164, y)])
            on(154, y + 1.2, shape)
    box(135, 153, 18, 28, "RoPE\nwith\nYaRN", STEP)
    box(
        182,
        145,
        36,
        44,
        "attention\nsoftmax of q·k / 8\nand a sink,\ntimes v\n"
        f"\nlayers 0, 2, 4 …: the\nlast {W} tokens\nlayers 1, 3, 5 …: all",
        STEP,
        f"sinks: {said(one['sinks'])}",
    )
    on(182, 116.5, f"k and v, kept: {said(4 * G * C)} a token")
    line([(200, 145), (220, 145)])
    on(210, 146.2, f"(T, {H}, {C})")
    box(232, 145, 24, 12, f"o:\n{H * C} → {D}", MATRIX, said(one["o"]))
    line([(232, 151), (232, 171.5)])
    on(239.5, 158, f"(T, {D})")
    on(68, 121, f"(T, {D})")
    ax.text(
        232,
        174,
        "+",
        ha="center",
        va="center",
        fontsize=13,
        bbox={"boxstyle": "circle,pad=0.05", "fc": "w", "ec": STREAM},
    )
    # experts
    line([(58, 98), (58, 76)])
    box(58, 71, 15, 10, "norm", NORM, said(one["norm"]))
    line([(65.5, 71), (70, 71), (70, 84), (78, 84)])
    box(
        93,
        84,
        30,
        8,
        f"router: {D} → E",
        MATRIX,
        said(one["router"]),
        said(big["router"]),
    )
    line([(108, 84), (125, 84)])
    on(116.5, 85.2, "(T, E)")
    box(141, 84, 32, 11, f"best {K} of E,\nsoftmax", STEP, "E = 32", "E = 128")
    line([(157, 84), (227, 84), (227, 65)])
    on(190, 85.2, f"(T, {K}) experts, (T, {K}) weights")
    line([(65.5, 71), (70, 71), (70, 58), (76, 58)])
    on(68, 48.5, f"(T, {D})")
    for shift in (2.4, 1.2, 0):
        box(
            91 + shift,
            58 + shift,
            30,
            12,
            "" if shift else f"E × gate, up\n{D} → {2 * F}",
            PACKED,
            "" if shift else said(one["gate_up"]),
            "" if shift else said(big["gate_up"]),
        )
        box(
            184 + shift,
            58 + shift,
            28,
            12,
            "" if shift else f"E × down\n{F} → {D}",
            PACKED,
            "" if shift else said(one["down"]),
            "" if shift else said(big["down"]),
        )
    line([(106, 58), (128, 58)])
    on(118, 59.2, f"(T, {K}, {2 * F})")
    box(137, 58, 18, 12, "clamped\nSwiGLU", STEP)
    line([(146, 58), (170, 58)])
    on(157.5, 59.2, f"(T, {K}, {F})")
    line([(198, 58), (221, 58)])
    on(211, 59.2, f"(T, {K}, {D})")
    box(232, 58, 22, 14, f"sum of {K},\nweighted", STEP)
    line([(237, 65), (237, 95.5)])
    on(244, 80, f"(T, {D})")
    ax.text(
        237,
        98,
        "+",
        ha="center",
        va="center",
        fontsize=13,
        bbox={"boxstyle": "circle,pad=0.05", "fc": "w", "ec": STREAM},
    )
    # out of it
    box(272, 98, 20, 10, "norm", NORM, said(one["norm"]))
    line([(272, 103), (272, 119)])
    on(280, 110, f"(T, {D})")
    box(272, 126, 34, 14, f"head\n{D} → {V:,}", MATRIX)
    ax.text(
        272, 134, said(2 * V * D), ha="center", fontsize=7.5, weight="bold"
    )
    line([(272, 139), (272, 153)])
    on(272, 146, f"(T, {V:,})", bbox={"fc": "w", "ec": "none", "pad": 0.5})
    box(272, 159, 34, 12, "softmax, choose\nfrom the last row", STEP)
    line([(272, 165), (272, 173)])
    box(272, 178, 34, 10, "next token", STEP)
    line([(272, 183), (272, 192), (21, 192), (21, 183)], "0.6")
    on(
        146,
        190,
        "and again, with one token more",
        bbox={"fc": "w", "ec": "none", "pad": 1},
    )
    # the bill
    columns = list(whole["20b"])
    table = ax.table(
        [[said(b[name]) for name in columns] for b in whole.values()],
        rowLabels=[f"  {size}  " for size in whole],
        colLabels=[
            "read for a token" if name == "read" else name for name in columns
        ],
        bbox=(0.045, 0.01, 0.94, 0.13),
        cellLoc="center",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for cell in table.get_celld().values():
        cell.set(linewidth=0.5, edgecolor="0.6")
    return sheet.figure
