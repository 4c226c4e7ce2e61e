"""Results to look at: markdown tables, and the plot of the claims."""

import statistics
from pathlib import Path

from bench.verdict import Difference


def mean_std(values) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.2f}{spread}"


def mean_of(values) -> str:
    """Their mean with the values themselves: with two or three seeds a deviation says less."""
    known = [v for v in values if v is not None]
    each = ", ".join(f"{v:.2f}" for v in known)
    return f"{statistics.mean(known):.2f} ({each})" if len(known) > 1 else each


def count_of(runs: list[dict]) -> str:
    """How many runs finished and, where some did, how many diverged."""
    lost = sum("error" in x for x in runs)
    return str(len(runs) - lost) + f", {lost} diverged" * (lost > 0)


def table(rows: list[dict]) -> str:
    """Markdown with a column for every key of the longest row, but for those without any value."""
    columns = [c for c in max(rows, key=len) if any(row.get(c, "") != "" for row in rows)]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        values = (row.get(column, "") for column in columns)
        lines.append([f"{x:.4g}" if isinstance(x, float) else str(x) for x in values])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def forest(panels: dict[str, list[tuple[str, Difference]]], path: str | Path) -> None:
    """Draw differences with their 95 % intervals around 0, and the single seeds as ticks.

    One panel, with a scale of its own, for each figure; a row is (text, difference). Needs
    matplotlib (bench/requirements.txt).
    """
    from matplotlib.figure import Figure

    ink = "#222222"
    colours = {"held": "#009e73", "did not hold": "#d55e00"}
    heights = [len(rows) for rows in panels.values()]
    drawing = Figure(figsize=(11, 0.33 * sum(heights) + 0.75 * len(panels)), layout="constrained")
    axes = drawing.subplots(len(panels), height_ratios=[n + 1 for n in heights], squeeze=False)
    for axis, (figure, rows) in zip(axes[:, 0], panels.items(), strict=True):
        for y, (_, d) in enumerate(rows):
            colour = colours.get(d.verdict, ink)
            axis.plot(d.values, [y] * len(d.values), "|", color="#999999", ms=7, zorder=1)
            if d.half is not None:
                axis.errorbar(d.mean, y, xerr=d.half, fmt="o", color=colour, capsize=3, lw=2)
            axis.annotate(d.verdict, (1.01, y), xycoords=("axes fraction", "data"), va="center",
                          color=colour, fontsize=9)  # fmt: skip
        axis.axvline(0, color=ink, lw=1.2, zorder=1)
        # 0 in the middle, so that a side means the same in every panel
        ends = [x for _, d in rows for x in (*d.values, abs(d.mean or 0) + (d.half or 0))]
        reach = 1.1 * max(map(abs, ends)) or 1
        axis.set(xlim=(-reach, reach), ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)))
        axis.set_yticklabels([text for text, _ in rows], fontsize=9)
        axis.set_title(figure, loc="left", fontsize=10, fontweight="bold")
        axis.set_title("as the paper says \u2192", loc="right", fontsize=9)
        axis.grid(axis="x", color="#dddddd")
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    drawing.savefig(path, dpi=110)
