"""Pictures of the method and of runs, PNG, drawn with torchvision and Pillow alone.

    python bench/figures.py views --dataset cifar100 --data-dir data    views, textures (Fig. 1)
    python bench/figures.py cells --dataset cifar100 --data-dir data    combinations (Eq. 2)
    python bench/figures.py neighbours RUN_DIR                          what lies near test images
    python bench/figures.py curves RUN_DIR...                           loss and kNN of runs
    python bench/figures.py compare --dataset cifar100                  SACL among other systems

The last is drawn from what related/compare.py left in --file. Each writes
results/figure-<name>.png, or --out.
"""

import argparse
import itertools
import statistics
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_linear
import sacl
from bench import plot
from bench.plot import INK
from related.compare import CompareConfig, ended_runs, known_costs
from sacl import UsageError

RIGHT, WRONG = "#009e73", "#d55e00"  # frames of neighbours
GAP, LABEL, CAPTION = 10, 118, 18  # pixels: between pictures, of a row's label, below a picture

# ------------------------------------------------------------ pictures


def views(args: argparse.Namespace) -> Image.Image:
    """The paper's Fig. 1: images, two weak views of each, its texture and the texture's view."""
    cfg = settings(args)
    torch.manual_seed(args.seed)
    x = pick(sacl.load_data(cfg, "train"), args)
    texture_of = sacl.Textures(cfg, sacl.Images(x, torch.zeros(len(x)), []))
    texture_of.renew(args.seed)
    textures = texture_of(torch.arange(len(x)))
    draw1, draw2 = (sacl.draw_view(len(x), cfg, x.device) for _ in range(2))
    weak1, weak2, strong = (
        sacl.augment(images, draw, cfg.image_size)
        for images, draw in ((x, draw1), (x, draw2), (textures, draw1))
    )
    rows = {"image x": x, "weak view x1": shown(weak1), "weak view x2": shown(weak2)}
    rows |= {"texture of x": textures, "texture view xt": shown(strong)}
    return sheet([(label, [(zoomed(i), "", "") for i in row]) for label, row in rows.items()])


def cells(args: argparse.Namespace) -> Image.Image:
    """Section 2.2: a view, its cells, and which of them each combination averages."""
    cfg = settings(args)
    torch.manual_seed(args.seed)
    x = pick(sacl.load_data(cfg, "train"), args)[:1]
    view = shown(sacl.augment(x, sacl.draw_view(1, cfg, x.device), cfg.image_size))
    parts = [zoomed(cell[0]) for cell in sacl.split(view, cfg.grid)]
    numbers = range(1, len(parts) + 1)
    first = [(zoomed(x[0]), "x", ""), (zoomed(view[0]), "view", "")]
    first += [(part, f"cell {n}: h{n}", "") for n, part in zip(numbers, parts, strict=True)]
    rows = [("split", first)]
    combinations = []
    for chosen in itertools.combinations(numbers, cfg.combine):
        picture = Image.new("RGB", zoomed(view[0]).size, "white")
        for n, part in zip(numbers, parts, strict=True):
            pale = Image.blend(part, Image.new("RGB", part.size, "white"), 0.85)
            row, column = divmod(n - 1, cfg.grid)
            place = column * part.width, row * part.height
            picture.paste(part if n in chosen else pale, place)
        mean = " + ".join(f"h{n}" for n in chosen)
        combinations.append((picture, f"({mean}) / {cfg.combine}", ""))
    return sheet([*rows, ("combine", combinations)])


def neighbours(args: argparse.Namespace) -> Image.Image:
    """Test images of different classes, and the training images whose features are nearest.

    Framed green where the class is the query's; below, the cosine.
    """
    if len(args.runs) != 1:
        raise UsageError("neighbours needs one RUN_DIR")
    probe = eval_linear.ProbeConfig(source=args.runs[0], encoder=args.encoder)
    encoder, run = eval_linear.load_encoder(probe)
    if run is None:
        raise UsageError(f"{args.runs[0]} has no config.json: name the folder of a run")
    train, test = (sacl.load_data(run, split) for split in ("train", "test"))
    if test is None or test.labels.max() < 0:
        raise UsageError(f"{args.runs[0]}: its dataset has no labelled test images")
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(args.seed))
    first = [(test.labels[order] == c).nonzero()[0].item() for c in test.labels.unique()]
    queries = sacl.subset(test, order[sorted(first)[: args.count]])
    device = torch.device("cpu")
    q, bank = (sacl.unit(sacl.embed(encoder, data, run, device)) for data in (queries, train))
    similar, nearest = (q @ bank.T).topk(args.count)
    rows = []
    for i, c in enumerate(queries.labels.tolist()):
        row = [(zoomed(queries.pixels[i : i + 1][0]), "query", INK)]
        for cosine, j in zip(similar[i].tolist(), nearest[i].tolist(), strict=True):
            frame = RIGHT if int(train.labels[j]) == c else WRONG
            row.append((zoomed(train.pixels[j : j + 1][0]), f"{cosine:.2f}", frame))
        rows.append((test.classes[c].replace("_", " "), row))
    return sheet(rows)


def settings(args: argparse.Namespace) -> sacl.Config:
    """Of small images, where nothing else is asked for."""
    size = {} if args.dataset in sacl.DATASETS else {"image_size": 32}
    return sacl.Config(dataset=args.dataset, data_dir=args.data_dir, **size)


def pick(data: sacl.Images, args: argparse.Namespace) -> Tensor:
    """Images at random places, (count, 3, S, S)."""
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed))
    rows = rows[: args.count].tolist()
    return torch.cat([data.pixels[i : i + 1] for i in rows])


def shown(view: Tensor) -> Tensor:
    """A normalised view (N, 3, H, W) as uint8 again."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (sacl.MEAN, sacl.STD))
    return ((view * std + mean).clamp(0, 1) * 255).round().byte()


def zoomed(x: Tensor) -> Image.Image:
    """An image (3, H, W) whose pixels are enlarged, all to the same factor for small ones."""
    factor = 3 if max(x.shape[1:]) <= 64 else 1
    return to_pil_image(x.repeat_interleave(factor, 1).repeat_interleave(factor, 2))


def sheet(rows: list[tuple[str, list[tuple[Image.Image, str, str]]]]) -> Image.Image:
    """Rows of (picture, caption, colour of its frame or ""), each behind its label."""
    width = max(picture.width for _, row in rows for picture, *_ in row) + GAP
    heights = [
        max(picture.height for picture, *_ in row) + GAP + CAPTION * any(c for _, c, _ in row)
        for _, row in rows
    ]
    size = LABEL + width * max(len(row) for _, row in rows) + GAP, sum(heights) + GAP
    image = Image.new("RGB", size, "white")
    draw, top = ImageDraw.Draw(image), GAP
    for (label, row), height in zip(rows, heights, strict=True):
        tallest = max(picture.height for picture, *_ in row)
        draw.text((GAP, top + tallest / 2), label, INK, plot.font(13, 1), anchor="lm")
        for i, (picture, caption, frame) in enumerate(row):
            left = LABEL + i * width + (width - GAP - picture.width) // 2
            upper = top + (tallest - picture.height) // 2
            image.paste(picture, (left, upper))
            thick = 3 if frame else 1
            edge = [left - thick, upper - thick]
            edge += [left + picture.width + thick - 1, upper + picture.height + thick - 1]
            draw.rectangle(edge, outline=frame or "#bbbbbb", width=thick)
            below = left + picture.width / 2, upper + picture.height + 5
            draw.text(below, caption, INK, plot.font(11, 1), anchor="mt")
        top += height
    return image


# ------------------------------------------------------------ charts


def curves(args: argparse.Namespace) -> list[dict]:
    """Loss and kNN of runs: by epochs, and by minutes of training."""
    if not args.runs:
        raise UsageError("curves needs one or more RUN_DIRs")
    panels = {
        "loss": {"title": "InfoNCE, mean of an epoch", "x": "epoch"},
        "knn": {"title": "kNN accuracy, per cent", "x": "epoch"},
        "time": {"title": "kNN accuracy, per cent", "x": "minutes of training"},
    }
    for panel in panels.values():
        panel["lines"] = {}
    for folder in map(Path, args.runs):
        log = sacl.read_log(folder / "log.jsonl")
        facts = next((x for x in log if "settings" in x), None)
        if facts is None:
            raise UsageError(f"{folder} is not a run's folder: it has no log.jsonl with settings")
        batch, steps = facts["settings"]["batch_size"], facts["steps_per_epoch"]
        name = folder.resolve().name
        for at in plot.curve_of(log, batch):
            epoch, minutes = at["images"] / (batch * steps), at["seconds"] / 60
            for panel, x, figure in (
                ("loss", epoch, "loss"),
                ("knn", epoch, "knn"),
                ("time", minutes, "knn"),
            ):
                if figure in at:
                    panels[panel]["lines"].setdefault(name, []).append((x, at[figure]))
    return [panel for panel in panels.values() if panel["lines"]]


def compare(args: argparse.Namespace) -> list[dict]:
    """kNN accuracy of SACL and the other systems, by epochs and by what their steps cost."""
    cfg = CompareConfig(dataset=args.dataset, results=str(args.file))
    lines = sacl.read_log(args.file)
    ended = {name: ended_runs(cfg, name, lines) for name in cfg.names}
    runs = {name: [x for x in found if "error" not in x] for name, found in ended.items()}
    runs = {name: found for name, found in runs.items() if found}
    costs = known_costs(cfg, lines, ["fast-moco", *runs])
    if not runs or not costs:
        raise UsageError(
            f"--file {args.file} has no runs and costs of --dataset {args.dataset}: python "
            f"related/compare.py --dataset {args.dataset}"
        )
    title = f"kNN accuracy, per cent, {args.dataset}"
    equal = {"title": title, "x": "epochs", "lines": {}}
    cost = {"title": title, "x": "cost, in epochs of fast-moco", "lines": {}}
    for name, found in runs.items():
        epochs: dict[float, list[float]] = {}
        for run in found:
            steps = run["curve"][-1]["step"] / run["settings"]["epochs"]  # of an epoch
            for at in run["curve"]:
                epochs.setdefault(at["step"] / steps, []).append(at["knn"])
        share = costs[name] / costs["fast-moco"]
        equal["lines"][name] = averaged(epochs)
        cost["lines"][name] = averaged({x * share: ys for x, ys in epochs.items()})
    return [equal, cost]


def averaged(row: dict[float, list[float]]) -> list[tuple[float, float, float]]:
    """(x, mean, standard deviation) over the seeds."""
    return [
        (x, statistics.mean(ys), statistics.stdev(ys) if len(ys) > 1 else 0)
        for x, ys in sorted(row.items())
    ]


# ------------------------------------------------------------ command line

PICTURES = {"views": views, "cells": cells, "neighbours": neighbours}
CHARTS = {"curves": curves, "compare": compare}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("figures.py", allow_abbrev=False)
    parser.add_argument("name", choices=[*PICTURES, *CHARTS])
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR")
    parser.add_argument("--dataset", default="shapes")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--encoder", choices=("online", "target"), default="online")
    parser.add_argument("--count", type=int, default=8, help="images in a row [8]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", type=Path, default=Path("results/compare.jsonl"))
    parser.add_argument("--out", type=Path, help="[results/figure-<name>.png]")
    args = parser.parse_args(argv)
    out = args.out or Path("results", f"figure-{args.name}.png")
    try:
        if args.count < 1:
            raise UsageError(f"--count {args.count}: must be at least 1")
        out.parent.mkdir(parents=True, exist_ok=True)
        if args.name in PICTURES:
            PICTURES[args.name](args).save(out)
        else:
            plot.chart(CHARTS[args.name](args), out)
    except UsageError as error:
        print(f"figures.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(out, flush=True)


if __name__ == "__main__":
    main()
