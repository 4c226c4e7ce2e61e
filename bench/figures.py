"""Pictures of the method and charts of runs, PNG, by matplotlib (bench/requirements.txt).

    python bench/figures.py views --dataset cifar100         views, textures (Fig. 1)
    python bench/figures.py neighbours RUN                   what lies near test images
    python bench/figures.py curves RUN...                    loss and kNN, by epochs and minutes
    python bench/figures.py compare --dataset cifar100       SACL among other systems

A RUN is a run's folder; for curves also a log. `compare` is drawn from what bench/compare.py left
in results/compare.jsonl. Each writes results/figure-<name>.png, or --out.
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
import eval_linear
import sacl
import texture
from sacl import UsageError

RIGHT, WRONG = "#009e73", "#d55e00"  # frames of neighbours
Row = list[tuple[Tensor, str, str]]  # pictures (3, H, W), their captions, colours of their frames


# ------------------------------------------------------------ pictures: rows by their labels


def views(args: argparse.Namespace) -> dict[str, Row]:
    """The paper's Fig. 1: images, two weak views of each, its texture and the texture's view."""
    cfg, x = pick(args)
    textures = texture.texture_views(x, generator=seeded(args))
    draw1, draw2 = (sacl.sample_view(len(x), cfg, x.device) for _ in range(2))
    pairs = {"weak view x1": (x, draw1), "weak view x2": (x, draw2)}
    pairs["texture view xt"] = textures, draw1
    shown = {k: denormalize(sacl.augment(*v, cfg.image_size)) for k, v in pairs.items()}
    strong = shown.pop("texture view xt")
    return captionless({"image x": x, **shown, "texture of x": textures, "texture view xt": strong})


def neighbours(args: argparse.Namespace) -> dict[str, Row]:
    """Test images of different classes, and the training images whose features are nearest.

    Framed green where the class is the query's; below, the cosine.
    """
    if len(args.runs) != 1:
        raise UsageError("neighbours needs one RUN")
    probe = eval_linear.ProbeConfig(run=args.runs[0], encoder=args.encoder, data_dir=args.data_dir)
    encoder, run = eval_linear.load_encoder(probe)
    train, test = (sacl.load_data(run, split) for split in ("train", "test"))
    if test is None or test.labels.max() < 0:
        raise UsageError(f"{args.runs[0]}: its dataset has no labelled test images")
    order = torch.randperm(len(test.labels), generator=seeded(args))
    first = [(test.labels[order] == c).nonzero()[0].item() for c in test.labels.unique()]
    queries, device = order[sorted(first)[: args.count]], torch.device("cpu")
    q = sacl.unit(sacl.embed(encoder, test.pixels, run, device, queries))
    bank = sacl.unit(sacl.embed(encoder, train.pixels, run, device))
    similar, nearest = (q @ bank.T).topk(args.count)
    rows = {}
    for i, query in enumerate(queries.tolist()):
        label = int(test.labels[query])
        row = [(image(test, query), "query", "black")]
        for cosine, j in zip(similar[i].tolist(), nearest[i].tolist(), strict=True):
            right = int(train.labels[j]) == label
            row.append((image(train, j), f"{cosine:.2f}", RIGHT if right else WRONG))
        rows[test.classes[label].replace("_", " ")] = row
    return rows


def seeded(args: argparse.Namespace) -> torch.Generator:
    return torch.Generator().manual_seed(args.seed)


def pick(args: argparse.Namespace) -> tuple[sacl.Config, Tensor]:
    """Settings for drawing, and training images at random places, (count, 3, S, S)."""
    size = {} if args.dataset in sacl.DATASETS else {"image_size": 32}
    data_dir = {"data_dir": args.data_dir} if args.data_dir else {}
    cfg = sacl.Config(dataset=args.dataset, **data_dir, **size)
    data = sacl.load_data(cfg, "train")
    rows = torch.randperm(len(data.labels), generator=seeded(args))[: args.count]
    torch.manual_seed(args.seed)  # of the views
    return cfg, sacl.take(data.pixels, rows, torch.device("cpu"))


def image(data: sacl.Images, row: int) -> Tensor:
    return sacl.take(data.pixels, torch.tensor([row]), torch.device("cpu"))[0]


def denormalize(view: Tensor) -> Tensor:
    """Normalised views (N, 3, H, W) as images in [0, 1]."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (sacl.MEAN, sacl.STD))
    return (view * std + mean).clamp(0, 1)


def captionless(rows: dict[str, Tensor]) -> dict[str, Row]:
    return {label: [(x, "", "") for x in row] for label, row in rows.items()}


def sheet(rows: dict[str, Row], out: Path) -> None:
    """Rows of pictures, uint8 or in [0, 1], each row behind its label."""
    columns = max(map(len, rows.values()))
    drawing = Figure(figsize=(1.1 * columns + 1.4, 1.25 * len(rows)), layout="constrained")
    axes = drawing.subplots(len(rows), columns, squeeze=False)
    for (label, row), line in zip(rows.items(), axes, strict=True):
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        for axis, (x, caption, colour) in zip(line, row, strict=False):
            axis.imshow(x.expand(3, -1, -1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xlabel(caption, fontsize=8)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color=colour or "#bbbbbb", linewidth=2.5 if colour else 0.5)
        for axis in line[len(row) :]:
            axis.set_axis_off()
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
    done = [x for x in sacl.read_log(args.file) if x["label"].startswith(f"{args.dataset}-")]
    done = [x for x in done if x.get("knn_curve")]
    seconds = {x["method"]: x["cpu_seconds"]["train"] for x in done}
    if not seconds.get("fast-moco"):
        raise UsageError(
            f"--file {args.file} has no runs of --dataset {args.dataset} with their seconds: "
            f"python bench/compare.py --dataset {args.dataset}"
        )
    title = f"kNN accuracy, per cent, {args.dataset}"
    equal = {"title": title, "x": "epochs", "lines": {}}
    cost = {"title": title, "x": "cost, in epochs of fast-moco", "lines": {}}
    for name in dict.fromkeys(x["method"] for x in done):
        curves = [x["knn_curve"] for x in done if x["method"] == name]
        every = next(x["settings"] for x in done if x["method"] == name)["knn_every"]
        share = seconds[name] / seconds["fast-moco"]
        points = [
            (every * i, statistics.mean(y), statistics.stdev(y) if len(y) > 1 else 0.0)
            for i, y in enumerate(zip(*curves, strict=True), 1)
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

PICTURES = {f.__name__: f for f in (views, neighbours)}
CHARTS = {f.__name__: f for f in (curves, compare)}


def draw(args: argparse.Namespace) -> None:
    if args.count < 1:
        raise UsageError(f"--count {args.count}: must be at least 1")
    if args.out.suffix != ".png":
        raise UsageError(f"--out {args.out}: must end in .png")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.name in PICTURES:
        sheet(PICTURES[args.name](args), args.out)
    else:
        chart(CHARTS[args.name](args), args.out)
    print(args.out, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("figures.py", allow_abbrev=False)
    parser.add_argument("name", choices=[*PICTURES, *CHARTS])
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--data-dir", default="", help="[data, or the run's]")
    parser.add_argument("--encoder", choices=("online", "target"), default="online")
    parser.add_argument("--count", type=int, default=8, help="images in a row [8]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, default=Path("results/compare.jsonl"))
    parser.add_argument("--out", type=Path, help="[results/figure-<name>.png]")
    args = parser.parse_args(argv)
    args.out = args.out or Path("results", f"figure-{args.name}.png")
    sacl.command("figures.py", lambda: draw(args))


if __name__ == "__main__":
    main()
