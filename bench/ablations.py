"""The paper's tables, and the choices that it leaves open, each run again by one command.

    python bench/ablations.py table6                           small, on one CPU core in an hour
    python bench/ablations.py table6 --scale gpu --seeds 3     the paper's settings, on CIFAR-100
    python bench/ablations.py table6 --table                   what is in the file, as markdown
    python bench/ablations.py all --table

table4   the gate at four places, and none    combine   i = 1 .. 4 cells of 4 in a query
table5   batches of 32, 64, 128               texture   negative, positive, none; alpha 1, 2
table6   the target's momentum m, 0.5 .. 1    grid      2 x 2 or none: by images, by seconds
table7   1, 2 and 4 times the epochs          encoder   online, recalibrated BN, target
fig7     temperatures on two datasets         recipe    paper, tuned
tuned    candidates for the tuned recipe one by one, then those that helped, together

A run is sacl.train and then the probe on its encoders. Its line in --file holds all settings and
figures; a run that has its line is not run again, also where several tables share it, and one that
was interrupted goes on from its folder in --work. Flags of sacl.py go to all runs of the call.

At the cpu scale the dataset is shapes, of which three epochs teach something; fig7 adds CIFAR-10,
and recipe and tuned are of CIFAR-100.

Nothing is chosen on test images: unless --on test is given, for final figures, runs are trained on
part of the training images and evaluated on others of them (`split`). Of shapes, drawn anew by each
seed, rows are compared on test images, and no default follows from them.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_linear
import sacl
from bench import plot
from sacl import Config, UsageError

# ------------------------------------------------------------ what is run

SCALES = {  # settings, and how many training images at most
    "cpu": (dict(arch="resnet18", width=16, dim=256, epochs=3, knn_every=1000), 7_500),
    "gpu": ({}, None),  # the paper's
}
ENCODERS = {"online": {}, "recalibrated": {"recalibrate_bn": True}, "target": {"encoder": "target"}}
RECIPES = ("recipe", "tuned")
CANDIDATES = {  # of the tuned recipe, beside a warm-up of a twentieth of the epochs
    "weight_decay": (5e-4,),
    "m_schedule": ("cosine",),
    "crop_min": (0.08, 0.4),
    "combine": (3,),
    "tau": (0.1,),
    "lr": (0.2,),
    "stem": ("imagenet",),
}


def tables(epochs: int) -> dict[str, dict[str, dict]]:
    """What the rows of each table change, by label; `epochs` are those of the other runs."""
    momenta = (0.5, 0.6, 0.7, 0.8, 0.9, 0.99, 0.999, 1.0)
    warmup = dict(warmup_epochs=max(1, round(epochs / 20)))  # as 10 are of 200
    one = {f"{k} {v}": {k: v} for k, values in CANDIDATES.items() for v in values}
    textures = {
        "negative, alpha 1": {},
        "negative, alpha 2": dict(texture_alpha=2.0),
        "positive": dict(texture="positive"),
        "none": dict(texture="none"),
    }
    return {
        "table4": {se: dict(se=se) for se in ("standard", "pre", "post", "identity", "none")},
        "table5": {f"batch {n}": dict(batch_size=n) for n in (32, 64, 128)},
        "table6": {f"m = {m:g}": dict(m=m) for m in momenta},
        "table7": {f"epochs x {k}": dict(epochs=k * epochs) for k in (1, 2, 4)},
        "fig7": {f"tau = {tau:g}": dict(tau=tau) for tau in (0.1, 0.2, 0.5, 1.0)},
        "combine": {f"i = {i}": dict(combine=i) for i in (1, 2, 3, 4)},
        "texture": textures,
        "grid": {"2 x 2 cells": dict(knn_every=1), "no grid": dict(grid=1, combine=1, knn_every=1)},
        "encoder": {"all": {}},  # three rows of the same runs
        "recipe": {"paper": {}, "tuned": dict(recipe="tuned")},
        "tuned": {"paper": {}, "warm-up": warmup, **one},
    }


PAPER = {  # its figures, row by row
    "table4": {"imagenet100": (78.0, 77.77, 77.25, 77.84)},
    "table5": {
        "cifar10": (55.78, 78.25, 83.74),
        "cifar100": (21.55, 41.26, 58.90),
        "stl10": (71.87, 79.68, 84.90),
    },
    "table6": {"imagenet100": (0, 40.36, 50.37, 57.34, 66.17, 78.00, 73.13, 51.21)},
    "table7": {"cifar100": (58.90, 62.26, 65.83)},
    "recipe": {"cifar10": (83.74,), "cifar100": (58.90,), "stl10": (84.90,)},
}


def base_settings(scale: str, dataset: str, given: dict) -> dict:
    """What all runs have in common: the scale's settings, then those of the command line."""
    if dataset == "shapes":  # small as it is, at either scale
        return {"epochs": 3 if scale == "cpu" else sacl.PRESETS["shapes"]["epochs"]} | given
    size = {"cifar10": 32, "cifar100": 32, "stl10": 96}.get(Path(dataset).name, 224)
    epochs = 100 if Path(dataset).name == "imagenet100" else 200
    return {"image_size": size, "epochs": epochs} | SCALES[scale][0] | given


# ------------------------------------------------------------ which images


def split(dataset: str, data_dir: str, work: Path, scale: str, on: str) -> str:
    """A folder {train,test}/<class>/ of links to the images of a run, or the dataset's own name.

    Of each class's training images, shuffled by a fixed seed, the first tenth is for validation at
    every scale and the others are for training, so that what is chosen on few images can be
    confirmed on all. on="test": with the dataset's own test images instead.
    """
    most = SCALES[scale][1]
    if dataset == "shapes" or (on == "test" and not most):
        return dataset
    if dataset == "stl10":
        raise UsageError(
            "--dataset stl10: most of its training images have no class to divide them by; use "
            "--scale gpu --on test"
        )
    source = as_folder(dataset, data_dir, work)
    out = work / "images" / (f"{source.name}-{on}" + (f"-{most}" if most else ""))
    if out.is_dir():
        return str(out)
    tests = next((p for name in ("test", "val") if (p := source / name).is_dir()), None)
    if on == "test" and tests is None:
        raise UsageError(f"--on test: there is neither {source}/test nor {source}/val")
    generator = torch.Generator().manual_seed(0)
    links, classes = {}, sorted(d for d in (source / "train").iterdir() if d.is_dir())
    for folder in classes:
        paths = sorted(p for p in folder.rglob("*") if p.is_file())
        paths = [paths[i] for i in torch.randperm(len(paths), generator=generator)]
        tenth, share = max(1, len(paths) // 10), (most or 10**9) // len(classes)
        links[f"train/{folder.name}"] = paths[tenth : tenth + share]
        own_test = sorted((tests / folder.name).iterdir()) if on == "test" else []
        links[f"test/{folder.name}"] = own_test or paths[:tenth]
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for name, paths in links.items():
        (part / name).mkdir(parents=True)
        for i, path in enumerate(paths):
            (part / name / f"{i:05}{path.suffix}").symlink_to(path.resolve())
    part.rename(out)
    return str(out)


def as_folder(dataset: str, data_dir: str, work: Path) -> Path:
    """Where <dataset>/train/<class>/ is; CIFAR's archives are first written out as PNG files."""
    root = Path(data_dir, dataset) if dataset in sacl.DATASETS else Path(dataset)
    if (root / "train").is_dir():
        return root
    if dataset not in ("cifar10", "cifar100"):
        raise UsageError(f"--dataset {dataset}: there is no {root}/train/<class>/")
    out, part = work / dataset, work / f"{dataset}.part"
    if not out.is_dir():
        for name in ("train", "test"):
            data = sacl.load_data(Config(dataset=dataset, data_dir=data_dir), name)
            for i, (x, label) in enumerate(zip(data.pixels, data.labels, strict=True)):
                folder = part / name / data.classes[label]
                folder.mkdir(parents=True, exist_ok=True)
                to_pil_image(x).save(folder / f"{i:05}.png")
        part.rename(out)
    return out


# ------------------------------------------------------------ the runs of a table


def run_table(table: str, dataset: str, args: argparse.Namespace) -> bool:
    """All runs of a table that have no line yet; False when the time was over before the last."""
    if dataset == "shapes" and table in RECIPES:
        raise UsageError(f"--dataset shapes: it has settings of its own; {table} needs another")
    base = base_settings(args.scale, dataset, args.given)
    rows = tables(base["epochs"])[table]
    if unknown := set(args.rows or ()) - set(rows):
        raise UsageError(f"--rows {unknown.pop()!r}: the rows of {table} are {', '.join(rows)}")
    rows = {label: rows[label] for label in args.rows or rows}
    for name in args.given.keys() & {k for varied in rows.values() for k in varied} - {"epochs"}:
        raise UsageError(f"--{name.replace('_', '-')} is what {table} varies: leave it out")
    on = "test" if dataset == "shapes" else args.on
    place = split(dataset, args.data_dir, args.work, args.scale, on)
    base |= {"dataset": place, "data_dir": args.data_dir}
    known = {"scale": args.scale, "dataset": Path(dataset).name, "on": on}
    common = asdict(Config(**base))
    jobs = [(label, rows[label], seed) for seed in range(args.seeds) for label in rows]
    found: dict[str, list[dict]] = {}
    while jobs:
        label, varied, seed = jobs.pop(0)
        print(f"\n{table} on {dataset}, {label}, seed {seed}; {len(jobs)} to follow", flush=True)
        cfg = asdict(Config(**{**base, **varied}))
        name = "_".join(f"{k}-{v}" for k, v in cfg.items() if v != common[k]) or "base"
        folder = args.work / args.scale / Path(place).name / f"{name}_seed-{seed}"
        cfg = Config(**{**base, **varied, "seed": seed, "output_dir": str(folder)})
        line = run(table, label, cfg, known, args)
        if line is None:
            print("--max-hours are over; the same command goes on", flush=True)
            return False
        found.setdefault(label, []).append(line)
        if table == "tuned" and not jobs and {"paper", *found} == set(rows):
            label, varied = together(found, rows)
            jobs = [(label, varied, seed) for seed in range(args.seeds) if varied]
    return True


def together(found: dict[str, list[dict]], rows: dict[str, dict]) -> tuple[str, dict]:
    """All candidates that beat the paper's settings at every seed; of a field's values the best."""

    def top1(label: str) -> list[float]:
        return [line["linear"].get("online", {}).get("top1", 0) for line in found[label]]

    helped: dict[str, str] = {}
    for label in sorted(rows, key=lambda label: statistics.mean(top1(label))):
        if all(x > y for x, y in zip(top1(label), top1("paper"), strict=True)):
            helped[next(iter(rows[label]))] = label  # the better one of a field comes later
    varied = {k: v for label in helped.values() for k, v in rows[label].items()}
    return "together: " + ", ".join(helped.values()), varied if len(helped) > 1 else {}


def run(table: str, label: str, cfg: Config, known: dict, args) -> dict | None:
    """The line of one run, from the file or from running it; its row in this table is added.

    None where the time was over before it was trained.
    """
    line = next((x for x in sacl.read_log(args.file) if same(x, cfg, known)), None)
    shifts = table == "texture" if args.shifts is None else args.shifts
    out, complete = Path(cfg.output_dir), False
    if line and line.get("probe") != args.probe:
        line["linear"] = {}
        line.pop("shifts", None)
    if line:
        probed = set(args.encoders) <= set(line["linear"]) and (not shifts or "shifts" in line)
        complete = "error" in line or probed
    if complete and line["rows"].get(table) == label:
        print(f"its line is in {args.file}; with another --file it is run again", flush=True)
        return line
    # a checkpoint beside the encoder: it is being trained again
    trained = line and (out / "backbone.pth").is_file() and not (out / "checkpoint.pth").exists()
    line = line or {"rows": {}, **known, "seed": cfg.seed, "linear": {}}
    if not complete and not trained:
        figures = pretrain(cfg, args)
        if figures is None:
            return None
        line |= figures
    if not complete and "error" not in line:
        line |= evaluate(cfg, args, shifts, line["linear"])
    line |= {"settings": comparable(cfg), "rows": {**line["rows"], table: label}}
    lines = [x for x in sacl.read_log(args.file) if not same(x, cfg, known)] + [line]
    sacl.write(args.file, "".join(json.dumps(x) + "\n" for x in lines).encode())
    (out / "checkpoint.pth").unlink(missing_ok=True)  # the backbones stay
    return line


def same(line: dict, cfg: Config, known: dict) -> bool:
    """Whether a line is of a run with these settings, in all that changes what is learned."""
    # how often it is monitored is its curve; a recipe is but the settings that it implies
    free = {*sacl.Run.FREE, "recipe"} - {"knn_every"}
    then, now = line["settings"], comparable(cfg)
    return all(line[name] == value for name, value in known.items()) and all(
        then.get(name, getattr(Config, name)) == value
        for name, value in now.items()
        if name not in free
    )


def comparable(cfg: Config) -> dict:
    """All settings; the images by the name of their folder, wherever it lies."""
    return asdict(cfg) | {"dataset": Path(cfg.dataset).name, "data_dir": "", "output_dir": ""}


def pretrain(cfg: Config, args: argparse.Namespace) -> dict | None:
    """sacl.train to its end, and what its log says; None where the time was over before."""
    left = (args.deadline - time.time()) / 3600
    if left <= 0:
        return None
    torch.compiler.reset()  # else each model counts as one more variant of the same code
    failed = {}
    try:
        sacl.train(dataclasses.replace(cfg, max_hours=left if args.max_hours else 0))
    except FloatingPointError as error:
        failed = {"error": str(error)}
    log = sacl.read_log(Path(cfg.output_dir) / "log.jsonl")
    if not failed and not any(x.get("epoch") == cfg.epochs and "epoch_loss" in x for x in log):
        return None
    machines = [x for x in log if "machine" in x]
    facts = {"images": machines[0]["images"], "machine": machines[-1]["machine"]}
    curve = plot.curve_of(log, cfg.batch_size)
    facts |= {k: v for k, v in curve[-1].items() if k != "images"} if curve else {}
    return failed | facts | {"curve": curve}


def evaluate(cfg: Config, args: argparse.Namespace, shifts: bool, linear: dict) -> dict:
    """The probe on each encoder in the run's folder; shifted images for the online one."""
    began, linear, more = time.time(), dict(linear), {}
    for encoder in args.encoders:
        probe = dict(source=cfg.output_dir, probe=args.probe, amp=cfg.amp, workers=cfg.workers)
        probe |= ENCODERS[encoder] | {"shifts": shifts and encoder == "online"}
        result = eval_linear.evaluate(eval_linear.ProbeConfig(**probe))
        linear[encoder] = {"top1": result["top1"], "top5": result["top5"]}
        more |= {k: result[k] for k in ("test_images", "shifts") if k in result}
    more |= {"probe": args.probe, "evaluation_seconds": round(time.time() - began)}
    return {"linear": linear, **more}


# ------------------------------------------------------------ command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("ablations.py", allow_abbrev=False)
    parser.add_argument("name", metavar="TABLE", choices=[*tables(1), "all"])
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument(
        "--dataset", default="", help="[cpu: shapes, gpu: cifar100; fig7: cifar10 too]"
    )
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each row [2]")
    parser.add_argument("--on", choices=("val", "test"), default="val", help="[val]")
    parser.add_argument("--probe", choices=("lars", "lbfgs"), help="[cpu: lbfgs, gpu: lars]")
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS,
                        help="probed; --table shows the first [online; encoder: all]")  # fmt: skip
    parser.add_argument("--rows", nargs="+", metavar="LABEL", help="only these of the table [all]")
    parser.add_argument("--shifts", action=argparse.BooleanOptionalAction,
                        help="also on shifted images [only in table texture]")  # fmt: skip
    parser.add_argument("--max-hours", type=float, default=0, help="stop, resumable [no limit]")
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--file", type=Path, default=Path("results/ablations.jsonl"))
    parser.add_argument("--table", action="store_true", help="only print what is in --file")
    args, rest = parser.parse_known_args(argv)
    given = sacl.parse_config(["--dataset", "cifar100", *rest])
    args.given = {name: getattr(given, name) for name in given.given - {"dataset"}}
    for name, flag in {"seed": "--seeds", "output_dir": "--work", "max_steps": "--epochs"}.items():
        if name in args.given:
            raise UsageError(f"--{name.replace('_', '-')} is set run by run: give {flag} instead")
    if args.seeds < 1:
        raise UsageError(f"--seeds {args.seeds}: must be at least 1")
    args.probe = args.probe or {"cpu": "lbfgs", "gpu": "lars"}[args.scale]
    args.deadline = time.time() + 3600 * (args.max_hours or 1e6)
    return args


def main(argv: list[str] | None = None) -> None:
    try:
        args = parse(argv)
        chosen = args.encoders
        for table in list(tables(1)) if args.name == "all" else [args.name]:
            args.encoders = chosen or (list(ENCODERS) if table == "encoder" else ["online"])
            small = args.scale == "cpu" and table not in RECIPES
            usual = ["shapes" if small else "cifar100"] + ["cifar10"] * (table == "fig7")
            for dataset in [args.dataset] if args.dataset else usual:
                if not args.table and not run_table(table, dataset, args):
                    return
            order = list(ENCODERS) if table == "encoder" else list(tables(1)[table])
            lines = [x for x in sacl.read_log(args.file) if table in x["rows"]]
            text = plot.markdown(table, lines, order, PAPER.get(table, {}), args.encoders[0])
            text = text if lines else f"{table}: no run of it is in {args.file}"
            print(f"\n{text}", flush=True)
    except UsageError as error:
        print(f"ablations.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
