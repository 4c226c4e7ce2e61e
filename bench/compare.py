"""SACL among other systems: one encoder, one loop, the same images seen, and the same time.

    python bench/compare.py --dataset cifar100           train and evaluate all that has no line yet
    python bench/compare.py --dataset cifar100 --table   print the results as markdown
    python bench/compare.py --dataset FOLDER --epochs 3 --methods byol --lr 0.2 --results TRIALS
                                                         a trial of another learning rate
    python bench/compare.py --dataset cifar100 --rates TRIALS           each system at its best rate
                                                                        (--table then needs it too)

Eleven systems are compared: SACL, SACL without textures (fast-moco: Fast-MoCo with SE and SACL's
recipe), the five baselines of Table 3, the three related methods, and HARL again in its InfoNCE
form: the same kind of loss as SACL's, with parts of a view pooled by a mask where SACL combines
cells. Three more rows vary SACL: textures as positives, no gate, and a recipe (with other crops)
that was tuned on held-out training images. But for these all have the same encoder, views, batch
and schedule, and heads as the files in related/ say. SYSTEMS was fixed before any run, from each
method's sources where they give settings for CIFAR, and only sacl-tuned was tuned. So a difference
between two rows is one of methods and recipes together. Rates made for hundreds of epochs are too
small for ten. --rates gives each system the rate of its best trial: one seed each, judged by the
images in FOLDER/test. These are of the training set, as those in FOLDER/train are. sacl-positive
and sacl-no-gate have SACL's rate, sacl-tuned its own.

All begin from the plain start, every BatchNorm scale at 1. Most of the rates come from code that
begins so. --start usual begins each block as the identity, as sacl.py does. results/earlier/
compare.jsonl has lines of that start and of an older state of the method.

Each run uses one CPU thread. The same command may be started once for each core; bench/runs.py sees
to it that no run is done twice and that an interrupted one resumes.

Equal time: the kNN of each system when it has used as much time as the quickest one needs for its
whole schedule, read off the monitor's curve. The slower systems are then in the middle of their
schedule, at a high learning rate; a schedule made for that time would probably give more. Time is
CPU seconds of training with SACL's textures and HARL's masks, without the monitor, since wall time
depends on the other programs of the machine. Runs on a GPU, and interrupted ones, have no such
figure.

Encoders are evaluated with the running statistics that training leaves in BatchNorm: in SACL's and
fast-moco's online encoder those of cells alone, in PIRL's half and half, in the others those of
whole views.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_linear
import sacl
from bench import runs
from bench.plot import count_of, mean_of, table
from related.baselines import BYOL, PIRL, MoCoV2, SimCLR, SimSiam
from related.harl import HARL, make_masks
from related.mining import PotentialSamples
from related.multi_network import MultiNetwork
from sacl import SACL, Config, UsageError


class System(NamedTuple):
    """A model, its settings of sacl.Config, lr at a batch of 128, and the options of its own."""

    model: type
    lr: float
    weight_decay: float
    settings: dict = {}
    own: dict = {}


# paper: SACL, Section 3.2. lightly: cifar10_benchmark.py, lr 0.06 at a batch of 128, weight decay
# 5e-4. multi-network: the code of its authors, lr 0.1 at 256. ours: what no source gives for CIFAR.
SYSTEMS = {
    "sacl": System(SACL, 0.1, 1e-4, dict(tau=0.2, texture="negative")),  # paper
    "fast-moco": System(SACL, 0.1, 1e-4, dict(tau=0.2)),  # as SACL; its own tau is 1.0
    "simclr": System(SimCLR, 0.06, 5e-4, dict(tau=0.5)),  # lightly
    # lightly; tau, groups: MoCo's CIFAR notebook. Compiling its 16 passes takes many minutes
    "mocov2": System(MoCoV2, 0.06, 5e-4, dict(tau=0.1, compile="off"),
                     dict(queue=4096, bn_groups=8)),
    "byol": System(BYOL, 0.06, 5e-4),  # lightly
    "simsiam": System(SimSiam, 0.015, 5e-4),  # its paper: 0.03 at 256; lightly: 0.06 at 128
    # PyContrast; ours: 4096, lr and weight decay as lightly's
    "pirl": System(PIRL, 0.06, 5e-4, dict(tau=0.07),
                   dict(dim=128, negatives=4096, lam=0.5, keep=0.5)),
    # ours; recipe and tau: SACL's
    "mining": System(PotentialSamples, 0.1, 1e-4, dict(tau=0.2),
                     dict(queue=4096, neighbours=5, weighting="both", keep=512, offset=0.0,
                          lam=1.0, ramp=0.1)),
    # as its authors, but for clipped gradients and the predictor's constant lr
    "multi-network": System(MultiNetwork, 0.05, 1e-4, dict(tau=1.0),
                            dict(a=6.0, queue=16384, as_shipped=False)),
    # its alpha; ours: recipe as BYOL's, and as SACL's
    "harl": System(HARL, 0.06, 5e-4, {}, dict(objective="byol", alpha=0.5, beta=0.5)),
    "harl-nce": System(HARL, 0.1, 1e-4, dict(tau=0.2), dict(objective="nce", alpha=0.5, beta=0.5)),
    "sacl-positive": System(SACL, 0.1, 1e-4, dict(tau=0.2, texture="positive")),
    "sacl-no-gate": System(SACL, 0.1, 1e-4, dict(tau=0.2, texture="negative", se="none")),
    # results/earlier/README.md has the search
    "sacl-tuned": System(SACL, 0.2, 5e-4, dict(tau=0.1, texture="negative", m_schedule="cosine",
                                               combine=3, crop_min=0.4)),
}  # fmt: skip
SCALES = {
    "cpu": dict(arch="resnet18", width=16, dim=256, image_size=32, batch_size=128, epochs=10,
                knn_every=2),
    "gpu": dict(knn_every=10),  # the rest is the paper's
}  # fmt: skip


# ------------------------------------------------------------ runs


def compare(args: argparse.Namespace) -> None:
    """Train and evaluate every system, seed by seed, that the file of results does not have."""
    torch.set_num_threads(1)
    asked = [(seed, name) for seed in args.seeds for name in args.methods]
    # all of them first: what is wrong with the last shows before the first has run for hours
    configs = [run_config(args, name, seed) for seed, name in asked]
    first = configs[0][1]
    eval_linear.load_labelled(dataclasses.replace(first, stl10_split="train"))  # or it is refused
    for (seed, name), (label, config) in zip(asked, configs, strict=True):
        torch.compiler.reset()  # else each system counts as one more variant of the same code
        build = functools.partial(build_system, name, start=args.start)
        facts = dict(method=name, own=SYSTEMS[name].own, lr=config.lr, start=args.start)
        facts["command"] = f"python bench/compare.py --dataset {args.dataset} --scale {args.scale}"
        facts["command"] += f" --epochs {config.epochs} --methods {name} --seeds {seed}"
        facts["command"] += f" --lr {config.lr:g} --start {args.start}"
        runs.run(label, config, args.results, build, **facts)


def run_config(args: argparse.Namespace, name: str, seed: int) -> tuple[str, Config]:
    """A run's label, which other settings would change, and its settings."""
    system = SYSTEMS[name]
    given = SCALES[args.scale] | dict(lr=rate(name, args), weight_decay=system.weight_decay)
    given |= dict(texture="none", m=0.99) | system.settings
    given |= {"epochs": args.epochs} if args.epochs else {}
    known = [given, system.own] + ["plain start"] * (args.start == "plain")
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    given |= dict(dataset=args.dataset, data_dir=args.data_dir, texture_bank=args.texture_bank)
    if args.scale == "cpu":  # on a GPU, compiling may take longer than so small a training
        given["compile"] = "off"  # not in the label, since it changes the time only
    config = Config(**given, seed=seed)
    label = f"{Path(args.dataset).name}-{args.scale}-{config.epochs}/{name}-{digest[:6]}"
    return label, dataclasses.replace(config, output_dir=str(args.runs / f"{label}-{seed}"))


def rate(name: str, args: argparse.Namespace) -> float:
    """A system's learning rate: --lr, or that of its best trial in --rates, or that of SYSTEMS."""
    if not args.rates or name == "sacl-tuned":
        return args.lr or SYSTEMS[name].lr
    tried = "sacl" if name in ("sacl-positive", "sacl-no-gate") else name
    found = trials(tried, args)
    if not found:
        which = f"has no finished trial of {tried} from the {args.start} start"
        add = f"--methods {tried} --lr RATE --results {args.rates} adds one"
        raise UsageError(f"--rates {args.rates}: {which}; {add}")
    return max(found, key=found.get)


def trials(name: str, args: argparse.Namespace) -> dict[float, float]:
    """Linear top-1 of a system's finished trials in --rates, by their learning rate."""
    lines = sacl.read_log(args.rates) if args.rates else []
    found = [x for x in lines if (x.get("method"), x.get("start")) == (name, args.start)]
    # of two trials at one rate the better one stays
    return dict(sorted((x["lr"], x["top1"]) for x in found if "error" not in x))


def build_system(name: str, config: Config, start: str = "plain") -> nn.Module:
    """The system, for the training images that its settings name."""
    system, data = SYSTEMS[name], ()
    if system.model is not SACL:
        images = sacl.load_data(config, "train")
        data = [make_masks(images) if system.model is HARL else len(images.pixels)]
    model = system.model(config, *data, **system.own)
    return runs.plain(model) if start == "plain" else model


# ------------------------------------------------------------ the table


def results(args: argparse.Namespace, lines: list[dict]) -> str:
    """Markdown of the finished runs of this dataset, scale and length, best linear top-1 first."""
    recorded = {}  # with their settings of now; those of diverged runs too
    for name in args.methods:
        label, _ = run_config(args, name, 0)
        recorded[name] = [line for line in lines if line.get("label") == label]
    ended = {name: [x for x in found if "error" not in x] for name, found in recorded.items()}
    if not any(ended.values()):
        raise UsageError(
            f"--results {args.results} has no finished run of --dataset {args.dataset} at --scale "
            f"{args.scale} with --start {args.start}: run the same command without --table"
        )
    costs = {name: cost for name, found in ended.items() if (cost := cpu_seconds(found))}
    quickest = min(costs, key=costs.get, default=None)
    rows = []
    best = {name: mean(x["top1"] for x in found) if found else 0 for name, found in ended.items()}
    for name in sorted(filter(recorded.get, args.methods), key=best.get, reverse=True):
        found, (_, config) = ended[name], run_config(args, name, 0)
        linear = (mean_of(x[k] for x in found) for k in ("top1", "top5"))
        at = costs[quickest] / costs[name] * config.epochs if name in costs else 0
        used = ["lr", "weight_decay"] + ["tau"] * ("tau" in SYSTEMS[name].settings)
        cost = costs[name] / costs["fast-moco"] if {name, "fast-moco"} <= costs.keys() else None
        rows.append({
            "system": name,
            "linear, top-1 / top-5": " / ".join(linear) if found else "",
            "kNN": mean_of(x["knn"] for x in found),
            "kNN at equal time": mean_of(knn_at(x, config, at) for x in found),
            "kNN, target": mean_of(x.get("knn_target") for x in found),
            "n": count_of(recorded[name]),
            "lr: trial top-1": ", ".join(f"{k:g}: {v:.1f}" for k, v in trials(name, args).items()),
            "lr, wd, tau": ", ".join(f"{getattr(config, k):g}" for k in used),
            "cost": mean_of([cost]),
        })  # fmt: skip
    machines = [x["machine"] for found in ended.values() for x in found]
    named = [(x["device"].replace("CPU", x.get("cpu", "CPU")), x["precision"]) for x in machines]
    machines = dict.fromkeys(f"{device} in {precision}" for device, precision in named)
    rates = f"lr: that of the best trial in {args.rates}; wd" if args.rates else "lr, wd"
    source = f"{rates}, tau: from the source where it gives them for CIFAR, fixed before any run"
    source += f", but for --lr {args.lr:g}" * (args.lr > 0)
    source += ", tuned in sacl-tuned alone" if recorded.get("sacl-tuned") else ", none tuned"
    timed = (
        f" Equal time: as much as {quickest} needs; the others are then in the middle of their "
        "schedule. Cost: CPU seconds, in fast-moco's."
    )
    caption = (
        f"{args.dataset}, {config.epochs} epochs, {config.arch} of width {config.width}, "
        f"{args.start} start, {', '.join(machines)}. The online encoder unless it says target; "
        f"linear: L-BFGS.{timed * bool(costs)} {source}. Figures that others published: "
        "related/README.md."
    )
    return f"{table(rows)}\n\n{caption}"


def cpu_seconds(ended: list[dict]) -> float | None:
    """Mean CPU seconds of training over the runs that have them; None where none has."""
    on_cpu = [x for x in ended if x["machine"]["device"].startswith("CPU")]
    known = [(x["cpu_seconds"], len(x["knn_curve"])) for x in on_cpu if x["cpu_seconds"]["train"]]
    # the monitor's first figures are those before training
    times = [s["train"] - (1 + monitored) * s.get("monitor", 0) for s, monitored in known]
    return mean(times) if times else None


def knn_at(line: dict, config: Config, epoch: float) -> float | None:
    """A run's figure after so many epochs, on a straight line between those of the monitor."""
    ends = [*range(config.knn_every, config.epochs, config.knn_every), config.epochs]
    return float(np.interp(epoch, ends, line["knn_curve"])) if epoch >= ends[0] else None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("compare.py", allow_abbrev=False)
    parser.add_argument("--dataset", default="cifar100", help="as in sacl.py")
    parser.add_argument("--data-dir", default="data", help="as in sacl.py")
    parser.add_argument("--texture-bank", default="", help="as in sacl.py")
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="gpu: the paper's [cpu]")
    parser.add_argument("--epochs", type=int, default=0, help="[the scale's]")
    parser.add_argument("--lr", type=float, default=0.0, help="at a batch of 128 [the system's]")
    parser.add_argument("--rates", type=Path, metavar="TRIALS", help="or the best of these trials")
    parser.add_argument("--start", choices=("plain", "usual"), default="plain", help="[plain]")
    parser.add_argument("--methods", nargs="+", choices=SYSTEMS, default=list(SYSTEMS),
                        metavar="NAME", help="which of SYSTEMS [all]")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="[0]")
    parser.add_argument("--results", type=Path, default=Path("results/compare.jsonl"))
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="their folders")
    parser.add_argument("--table", action="store_true", help="only print the table of --results")
    args = parser.parse_args(argv)
    sacl.command("compare.py", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    if args.lr and args.rates:
        raise UsageError("--rates: --lr gives the learning rate already; leave one of them out")
    if args.table:
        print(results(args, sacl.read_log(args.results)))
    else:
        compare(args)


if __name__ == "__main__":
    main()
