"""Results to look at: cells of markdown tables, line charts, the forest plot of the claims.

a run's log.jsonl                   -> curve_of   figures by images seen and by seconds
rows of cells                       -> rows_of    a markdown table
panels of {name: [(x, y, spread)]}  -> chart      side by side, one legend below them
rows of differences                 -> forest     means with their intervals around 0
"""

import math
import statistics
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from bench.verdict import Difference

# ------------------------------------------------------------ logs


def curve_of(log: list[dict], batch_size: int) -> list[dict]:
    """Each epoch's loss and monitored figures, by images seen and by seconds of training.

    The seconds are those of the steps, without the time that monitor and checkpoints take.
    """
    curve, spread, step, seconds = [], {}, 0, 0.0
    for line in log:
        if "images_per_s" in line:
            seconds += (line["step"] - step) * batch_size / line["images_per_s"]
            step, spread = line["step"], {k: line[k] for k in ("spread",) if k in line}
        elif "epoch" in line:
            at = {"images": line["step"] * batch_size, "seconds": round(seconds, 1)} | spread
            at |= {"loss": line["epoch_loss"]} if "epoch_loss" in line else {}
            curve.append(at | {k: v for k, v in line.items() if k.startswith(("knn", "pixels"))})
    return curve


# ------------------------------------------------------------ markdown


def mean_std(values) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.2f}{spread}"


def count_of(runs: list[dict]) -> str:
    """How many runs finished and, where some did, how many diverged."""
    lost = sum("error" in x for x in runs)
    return str(len(runs) - lost) + f", {lost} diverged" * (lost > 0)


def rows_of(cells: list[list[str]]) -> str:
    cells = [cells[0], ["---"] * len(cells[0]), *cells[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


# ------------------------------------------------------------ charts

INK, GRID = "#222222", "#dddddd"
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000",
    "#5e3c99", "#8c510a", "#66c400",
)  # fmt: skip
FINE = 3  # drawn so many times larger, then reduced: Pillow's lines are not smoothed
WIDTH, HEIGHT = 440, 300  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 34, 46  # its margins


def font(size: int, fine: int = FINE) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * fine)


def chart(panels: list[dict], path: str | Path) -> None:
    """Draw panels side by side: {"title", "x", "y", "lines": {name: [(x, y) or (x, y, spread)]}}.

    "log": True for a logarithmic x axis; "span": the least range of y. A name has one colour in all
    panels, and a place in the legend below them.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel["lines"]))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    rows = len(names) if len(names) <= 4 else math.ceil(len(names) / len(panels))  # of the legend
    legend = 22 * rows + 10
    size = WIDTH * len(panels) * FINE, (HEIGHT + legend) * FINE
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for i, panel in enumerate(panels):
        draw_panel(draw, panel, i * WIDTH, colours)
    for i, name in enumerate(names):
        x, y = LEFT + i // rows * WIDTH, (HEIGHT + 22 * (i % rows) + 8) * FINE
        draw.line([x * FINE, y, (x + 28) * FINE, y], colours[name], 2 * FINE)
        draw.text(((x + 38) * FINE, y), name, INK, font(12), anchor="lm")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((size[0] // FINE, size[1] // FINE), Image.Resampling.LANCZOS).save(path)


def draw_panel(draw: ImageDraw.ImageDraw, panel: dict, left: int, colours: dict) -> None:
    """Axes with ticks and labels, and the lines, in the panel that begins `left` pixels in."""
    points = [p for line in panel["lines"].values() for p in line]
    spreads = [p[2] if len(p) > 2 else 0 for p in points]
    low = [p[1] - s for p, s in zip(points, spreads, strict=True)]
    high = [p[1] + s for p, s in zip(points, spreads, strict=True)]
    more = max(0, panel.get("span", 0) - (max(high) - min(low))) / 2
    y_ticks = ticks(min(low) - more, max(high) + more)
    if panel.get("log"):
        x_ticks = sorted({p[0] for p in points})
        ends = x_ticks[0] / 1.15, x_ticks[-1] * 1.15
    else:
        x_ticks = ticks(min(p[0] for p in points), max(p[0] for p in points))
        ends = x_ticks[0], x_ticks[-1]
    to = math.log if panel.get("log") else float
    x0, x1, y0, y1 = left + LEFT, left + WIDTH - RIGHT, HEIGHT - BOTTOM, TOP

    def at(x: float, y: float) -> tuple[float, float]:
        right = (to(x) - to(ends[0])) / (to(ends[1]) - to(ends[0]))
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return (x0 + right * (x1 - x0)) * FINE, (y0 + up * (y1 - y0)) * FINE

    for x in x_ticks:
        column, row = at(x, y_ticks[0])
        draw.line([column, row, column, y1 * FINE], GRID, FINE)
        draw.text((column, row + 6 * FINE), f"{x:g}", INK, font(11), anchor="mt")
    for y in y_ticks:
        row = at(ends[0], y)[1]
        draw.line([x0 * FINE, row, x1 * FINE, row], GRID, FINE)
        draw.text(((x0 - 6) * FINE, row), f"{y:g}", INK, font(11), anchor="rm")
    draw.line([x0 * FINE, y1 * FINE, x0 * FINE, y0 * FINE, x1 * FINE, y0 * FINE], INK, FINE)
    middle = (x0 + x1) / 2 * FINE
    draw.text((middle, (HEIGHT - 8) * FINE), panel["x"], INK, font(12), anchor="mb")
    draw.text((x0 * FINE, 10 * FINE), panel["title"], INK, font(13), anchor="lt")
    for name, line in panel["lines"].items():
        places = [at(*p[:2]) for p in sorted(line)]
        draw.line([c for place in places for c in place], colours[name], 2 * FINE, joint="curve")
        for p, (column, row) in zip(sorted(line), places, strict=True):
            r = 2.5 * FINE if len(line) <= 40 else 0
            draw.ellipse([column - r, row - r, column + r, row + r], colours[name])
            if len(p) > 2 and p[2]:
                ends_of_bar = [at(p[0], p[1] - p[2]), at(p[0], p[1] + p[2])]
                draw.line([c for end in ends_of_bar for c in end], colours[name], FINE)


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from at most `low` to at least `high`, at steps of 1, 2 or 5 times 10^n."""
    span = high - low or abs(high) or 1
    steps = (10.0**n * k for n in range(-9, 12) for k in (1, 2, 5))
    step = next(s for s in steps if span / s <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


# ------------------------------------------------------------ differences


def forest(panels: dict[str, list[tuple[str, Difference]]], path: str | Path) -> None:
    """Draw differences with their 95 % intervals around 0, and the single seeds as ticks.

    One panel, with a scale of its own, for each figure; a row is (text, difference). Needs
    matplotlib (bench/requirements.txt).
    """
    from matplotlib.figure import Figure

    colours = {"held": "#009e73", "did not hold": "#d55e00"}
    heights = [len(rows) for rows in panels.values()]
    drawing = Figure(figsize=(11, 0.33 * sum(heights) + 0.75 * len(panels)), layout="constrained")
    axes = drawing.subplots(len(panels), height_ratios=[n + 1 for n in heights], squeeze=False)
    for axis, (figure, rows) in zip(axes[:, 0], panels.items(), strict=True):
        for y, (_, d) in enumerate(rows):
            colour = colours.get(d.verdict, INK)
            if d.half is not None:
                axis.errorbar(d.mean, y, xerr=d.half, color=colour, capsize=3, lw=2, zorder=2)
            face = colour if d.half is not None else "white"  # a hollow point has no interval
            axis.plot(d.values, [y] * len(d.values), "|", color="#999999", ms=7, zorder=1)
            if d.mean is not None:
                axis.plot(d.mean, y, "o", color=colour, mfc=face, zorder=3)
            note = d.verdict if d.half is not None else f"n = {len(d.values)}: no interval yet"
            axis.annotate(note, (1.01, y), xycoords=("axes fraction", "data"), va="center",
                          color=colour, fontsize=9)  # fmt: skip
        axis.axvline(0, color=INK, lw=1.2, zorder=1)
        # 0 in the middle, so that a side means the same in every panel
        ends = [x for _, d in rows for x in (*d.values, (d.mean or 0) + (d.half or 0))]
        ends += [(d.mean or 0) - (d.half or 0) for _, d in rows]
        reach = 1.1 * max(map(abs, ends)) or 1
        axis.set(xlim=(-reach, reach), ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
        axis.set_yticklabels([text for text, _ in rows], fontsize=9)
        axis.set_title(figure, loc="left", fontsize=10, fontweight="bold")
        axis.set_title("as the paper says \u2192", loc="right", fontsize=9)
        axis.grid(axis="x", color=GRID)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    drawing.savefig(path, dpi=110)
