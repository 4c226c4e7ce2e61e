"""Pictures of the method and charts of runs, PNG, by matplotlib (bench/requirements.txt).

    python bench/figures.py views --dataset cifar100         views, textures
    python bench/figures.py curves RUN...                    loss and kNN, by epochs and minutes
    python bench/figures.py compare                          SACL among other systems

A RUN is a run's folder or a log. `compare` is drawn from the lines of bench/compare.py in --file
whose label begins with --group. Each writes results/figure-<name>.png, or --out.
"""

import argparse
import itertools
import statistics
import sys
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sacl
import texture
from bench.compare import cpu_seconds
from sacl import UsageError

# ------------------------------------------------------------ pictures: rows by their labels


def views(args: argparse.Namespace) -> dict[str, Tensor]:
    """As the paper's Fig. 1: images, two weak views of each, its texture and its texture view."""
    size = {} if args.dataset in sacl.DATASETS else {"image_size": 32}
    cfg = sacl.Config(dataset=args.dataset, data_dir=args.data_dir, **size)
    pixels, g = sacl.load_data(cfg, "train").pixels, torch.Generator().manual_seed(args.seed)
    index = torch.randperm(len(pixels), generator=g)[: args.count]
    x = sacl.take(pixels, index, torch.device("cpu"))
    textures = texture.texture_views(x, generator=torch.Generator().manual_seed(args.seed))
    torch.manual_seed(args.seed)
    draw1, draw2 = (sacl.sample_view(len(x), cfg, x.device) for _ in range(2))

    def view(images: Tensor, draw) -> Tensor:
        mean, std = (torch.tensor(v)[:, None, None] for v in (sacl.MEAN, sacl.STD))
        return (sacl.augment(images, draw, cfg.image_size) * std + mean).clamp(0, 1)

    rows = {"image x": x, "weak view x1": view(x, draw1), "weak view x2": view(x, draw2)}
    return rows | {"texture of x": textures, "texture view xt": view(textures, draw1)}


def sheet(rows: dict[str, Tensor], out: Path) -> None:
    """Rows of pictures (N, 3, H, W), uint8 or in [0, 1], each row behind its label."""
    columns = max(map(len, rows.values()))
    drawing = Figure(figsize=(1.1 * columns + 1.4, 1.25 * len(rows)), layout="constrained")
    axes = drawing.subplots(len(rows), columns, squeeze=False)
    for (label, row), line in zip(rows.items(), axes, strict=True):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axis, x in zip(line, row, strict=True):
            axis.imshow(x.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color="#bbbbbb", linewidth=0.5)
    drawing.savefig(out, dpi=150)


# ------------------------------------------------------------ charts: panels of lines


def curves(args: argparse.Namespace) -> list[dict]:
    """Loss and kNN of runs: by epochs, and by minutes of training and monitoring."""
    loss = {"title": "InfoNCE, mean of an epoch", "x": "epoch", "lines": {}}
    knn = {"title": "kNN accuracy, per cent", "x": "epoch", "lines": {}}
    timed = {"title": "kNN accuracy, per cent", "x": "minutes", "lines": {}}
    for run in map(Path, args.runs):
        log = sacl.read_log(run if run.is_file() else run / "log.jsonl")
        if not any("epoch" in line for line in log):
            raise UsageError(f"{run} is neither a run's folder with a log.jsonl nor a log")
        name = run.stem if run.is_file() else run.resolve().name
        ends = [line for line in log if "epoch_loss" in line]
        loss["lines"][name] = [(line["epoch"], line["epoch_loss"]) for line in ends]
        measured = [line for line in log if "knn" in line]
        knn["lines"][name] = [(line["epoch"], line["knn"]) for line in measured]
        timed["lines"][name] = [(line.get("seconds", 0) / 60, line["knn"]) for line in measured]
    panels = [panel for panel in (loss, knn, timed) if any(panel["lines"].values())]
    if not panels:
        raise UsageError("curves needs one RUN or more, trained for an epoch or more")
    return panels


def compare(args: argparse.Namespace) -> list[dict]:
    """kNN accuracy of SACL and the other systems, by epochs and by what their training costs."""
    done = [x for x in sacl.read_log(args.file) if x["label"].startswith(f"{args.group}/")]
    done = [x for x in done if x.get("knn_curve")]
    done = [x for x in done if cpu_seconds([x])]  # of an interrupted run, or a GPU's, none is known
    names = dict.fromkeys(x["method"] for x in done)
    systems = {name: [x for x in done if x["method"] == name] for name in names}
    if "fast-moco" not in systems:
        raise UsageError(
            f"--file {args.file} has no run of fast-moco in --group {args.group} with its seconds: "
            "bench/compare.py adds such lines"
        )
    for name, lines in systems.items():
        if len({x["label"] for x in lines}) > 1:
            raise UsageError(f"--file {args.file} has {name} with two settings: take one out")
    epochs = int(args.group.rpartition("-")[2])
    title = f"kNN accuracy, per cent, {args.group}"
    seconds = {name: cpu_seconds(lines) for name, lines in systems.items()}
    usual = sacl.Config(dataset=args.group.rsplit("-", 2)[0])
    equal = {"title": title, "x": "epochs", "lines": {}}
    cost = {"title": title, "x": "cost, in epochs of fast-moco", "lines": {}}
    for name, lines in systems.items():
        every = lines[0]["settings"].get("knn_every", usual.knn_every)
        ends = [*range(every, epochs, every), epochs]
        share = seconds[name] / seconds["fast-moco"]
        curves = zip(*(x["knn_curve"] for x in lines), strict=True)
        points = [
            (end, statistics.mean(y), statistics.stdev(y) if len(y) > 1 else 0.0)
            for end, y in zip(ends, curves, strict=True)
        ]
        equal["lines"][name] = points
        cost["lines"][name] = [(x * share, y, spread) for x, y, spread in points]
    return [equal, cost]


def chart(panels: list[dict], out: Path) -> None:
    """Panels side by side; a line is a list of (x, y) or (x, y, standard deviation)."""
    names = list(dict.fromkeys(name for panel in panels for name in panel["lines"]))
    palette = [*colormaps["tab10"].colors, *colormaps["Dark2"].colors]
    colours = dict(zip(names, itertools.cycle(palette), strict=False))
    drawing = Figure(figsize=(4.4 * len(panels), 4), layout="constrained")
    for axis, panel in zip(drawing.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in ((name, some) for name, some in panel["lines"].items() if some):
            axis.errorbar(*zip(*sorted(points), strict=True), color=colours[name], label=name)
        axis.set_title(panel["title"], loc="left", fontsize=10)
        axis.set_xlabel(panel["x"])
        axis.grid(color="#dddddd")
        axis.spines[["top", "right"]].set_visible(False)
    handles = drawing.axes[0].get_legend_handles_labels()
    drawing.legend(*handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    drawing.savefig(out, dpi=110)


# ------------------------------------------------------------ command line


def draw(args: argparse.Namespace) -> None:
    if args.count < 1:
        raise UsageError(f"--count {args.count}: must be at least 1")
    out = args.out or Path("results", f"figure-{args.name}.png")
    if out.suffix != ".png":
        raise UsageError(f"--out {out}: must end in .png")
    out.parent.mkdir(parents=True, exist_ok=True)
    if args.name == "views":
        sheet(views(args), out)
    else:
        chart({"curves": curves, "compare": compare}[args.name](args), out)
    print(out, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("figures.py", allow_abbrev=False)
    parser.add_argument("name", choices=("views", "curves", "compare"))
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--count", type=int, default=8, help="images in a row [8]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, default=Path("results/compare.jsonl"))
    parser.add_argument("--group", default="cifar100-cpu-10", help="dataset-scale-epochs")
    parser.add_argument("--out", type=Path, help="[results/figure-<name>.png]")
    args = parser.parse_args(argv)
    sacl.command("figures.py", lambda: draw(args))


if __name__ == "__main__":
    main()
