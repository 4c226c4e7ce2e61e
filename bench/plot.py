"""Results to look at: markdown tables, and line charts as PNG drawn with Pillow alone.

Used by ablations.py and figures.py:

    a run's log.jsonl                   -> curve_of   figures by images seen and by seconds
    lines of results/ablations.jsonl    -> markdown   a table for each dataset
    panels of {name: [(x, y, spread)]}  -> chart      side by side, one legend below them
"""

import math
import statistics
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SHIFTS = ("texture", "shuffle_4x4", "low_pass", "silhouette", "corruption_mean", "shape_share")
NO_SETTINGS = (  # of a result, or such as scale_of shows
    "seed", "recipe", "dataset", "data_dir", "output_dir", "texture_bank", "amp", "compile",
    "workers", "resume", "knn_every", "print_every", "max_steps", "max_hours", "epochs",
    "batch_size",
)  # fmt: skip
MORE = {"table6": ("spread",), "texture": SHIFTS}  # columns beside accuracy


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


def markdown(table: str, lines: list[dict], order: list[str], paper: dict, encoder: str) -> str:
    """A table for each dataset and kind of test images; rows in the given order of their labels."""
    parts = []
    for key in sorted({(x["dataset"], x["on"]) for x in lines}):
        group = [x for x in lines if (x["dataset"], x["on"]) == key]
        kind = {"val": "held-out training images", "test": "test images"}[key[1]]
        of = "" if table == "encoder" else f"; linear top-1 of the {encoder} encoder"
        short = len({scale_of(x) for x in group}) == 1  # else each row says all of it
        common = f" ({scale_of(group[0])})" if short else ""
        parts.append(f"**{table}: {key[0]}, {kind}{of}**{common}")
        parts.append(table_of(table, group, order, paper, encoder, short))
        if table == "grid":
            parts.append(curves_of(group))
    return "\n\n".join(parts)


def table_of(
    table: str, lines: list[dict], order: list[str], paper: dict, encoder: str, short: bool
) -> str:
    """Mean and standard deviation over the seeds, a row for each label and scale."""
    rows: dict[tuple, list[dict]] = {}
    every = table == "encoder"  # of each run
    for label in order if every else dict.fromkeys(x["rows"][table] for x in lines):
        place = order.index(label) if label in order else len(order)
        group = [x for x in lines if every or x["rows"][table] == label]
        for line in group:
            scale = (line["scale"] if short else scale_of(line)) + unlike(line, group)
            rows.setdefault((line["scale"], place, label, scale), []).append(line)
    more = [name for name in MORE.get(table, ()) if any(figure(x, name, encoder) for x in lines)]
    cells = [["setting", "paper", "ours", "kNN", *more, "n", "scale"]]
    for (_, place, label, scale), runs in sorted(rows.items()):
        of = label if table == "encoder" else encoder
        done = [x for x in runs if "error" not in x]
        shown = [mean_std(figure(x, name, of) for x in done) for name in ("top1", "knn", *more)]
        cells.append([label, paper_figure(paper, runs[0], place), *shown, count_of(runs), scale])
    return rows_of(cells)


def figure(line: dict, name: str, encoder: str) -> float | None:
    """One figure of a line, None where it was not measured."""
    if name == "top1":
        return line["linear"].get(encoder, {}).get("top1")
    if name == "knn":
        return line.get({"online": "knn", "target": "knn_target"}.get(encoder))
    shifts = line.get("shifts", {})
    return {**shifts.get("conflict", {}), **shifts, **line}.get(name)


def curves_of(lines: list[dict]) -> str:
    """kNN of every row after the same numbers of images, and the seconds of training it took."""
    rows: dict[str, dict[int, list[dict]]] = {}
    for line in lines:
        for at in line["curve"]:
            rows.setdefault(line["rows"]["grid"], {}).setdefault(at["images"], []).append(at)
    cells = [["images seen", *(f"{row}: {k}" for row in rows for k in ("kNN", "seconds"))]]
    for images in sorted({n for row in rows.values() for n in row}):
        points = [row.get(images, []) for row in rows.values()]
        figures = [mean_std(p.get(k) for p in at) for at in points for k in ("knn", "seconds")]
        cells.append([str(images), *figures])
    return rows_of(cells)


def paper_figure(paper: dict, line: dict, place: int) -> str:
    """The paper's figure for a row; of another dataset, and then named, if it has none for this."""
    source = line["dataset"] if line["dataset"] in paper else next(iter(paper), None)
    if source is None or place >= len(paper[source]) or paper[source][place] is None:
        return ""
    return f"{paper[source][place]:.2f}" + f" ({source})" * (source != line["dataset"])


def scale_of(line: dict) -> str:
    s = line["settings"]
    net = f"{s['arch'].replace('resnet', 'ResNet-')} of width {s['width']}"
    return (f"{line['scale']}: {net}, dim {s['dim']}, {line['images']} images, {s['epochs']} "
            f"epochs, batch {s['batch_size']}; {line.get('probe', 'no')} probe")  # fmt: skip


def unlike(line: dict, others: list[dict]) -> str:
    """Settings in which lines of one label differ: then they are not repetitions of one run."""
    s = {k: v for k, v in line["settings"].items() if k not in NO_SETTINGS}
    differ = [k for k in s if len({x["settings"].get(k) for x in others}) > 1]
    return "".join(f"; {k} {s[k]}" for k in differ)


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
