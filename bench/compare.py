"""SACL among ten other systems: one encoder, one loop, equal images seen, and again equal time.

    python related/compare.py --dataset cifar100 --scale cpu --cost     what it will take
    python related/compare.py --dataset cifar100 --scale cpu            train and evaluate all
    python related/compare.py --dataset cifar100 --scale cpu --table    the results, as markdown

The eleven are SACL, SACL without textures (fast-moco: Fast-MoCo with SE and SACL's recipe; its own
tau is 1.0), the five baselines of Table 3, the three related methods, and HARL again in its InfoNCE
form: the same kind of loss as SACL's, with parts of a view pooled by a mask where SACL combines
cells. All have the same encoder, views, batch, schedule and heads, PIRL's heads excepted. What
SYSTEMS names was fixed before any run, from each method's sources where they say it for CIFAR;
nothing was tuned and nothing is chosen on the test set. So a difference between two rows is one of
methods and recipes together.

A finished run is one line of the results' file and is not done again; an unfinished one goes on
from its folder. Runs may share the file and proceed side by side (--methods simclr,byol).

Equal time: the kNN of every system at the moment when the quickest one ends its schedule, read off
the monitor's curve. The axis is steps times the cost of a step, which --cost measures for all
systems in turns: process CPU seconds on a CPU, for wall time on a shared machine says more about
the neighbours, and seconds on a GPU, without the compiler. The slower systems are read in the
middle of their schedule, with the learning rate still high: a schedule made for that time would
probably give more. Not in a step's cost: SACL's textures, made every 20 epochs (a minute of one CPU
core for 50,000 images), and HARL's masks, made once.

BatchNorm's running statistics, with which encoders are evaluated, are what each method's passes
make them: of SACL's and fast-moco's online encoder those of cells alone, of PIRL's half and half,
of the others those of whole views.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Literal, NamedTuple

if not __package__:  # python related/compare.py: imports are looked for in related/ only
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import eval_linear
import sacl
from bench.plot import count_of, mean_std, rows_of
from related.baselines import BYOL, PIRL, MoCoV2, SimCLR, SimSiam
from related.harl import HARL, make_masks
from related.mining import PotentialSamples
from related.multi_network import MultiNetwork
from sacl import SACL, Config, Images, UsageError


class System(NamedTuple):
    """A model, its settings of sacl.Config, its own, and what they follow."""

    model: type
    settings: dict
    own: dict


def recipe(lr: float, weight_decay: float, **settings) -> dict:
    """Settings of a system; lr at a batch of 128."""
    return dict(texture="none", lr=lr, weight_decay=weight_decay, m=0.99) | settings


# paper: SACL, Section 3.2. lightly: cifar10_benchmark.py, lr 0.06 at a batch of 128, weight decay
# 5e-4. 003: the code of its authors, lr 0.1 at 256. ours: what no source gives for CIFAR.
SYSTEMS = {
    "sacl": System(SACL, recipe(0.1, 1e-4, tau=0.2, texture="negative"), {}),  # paper
    "fast-moco": System(SACL, recipe(0.1, 1e-4, tau=0.2), {}),  # as SACL; its own tau is 1.0
    "simclr": System(SimCLR, recipe(0.06, 5e-4, tau=0.5), {}),  # lightly
    "mocov2": System(  # lightly; tau, groups: MoCo's CIFAR notebook
        MoCoV2,
        recipe(0.06, 5e-4, tau=0.1, compile="off"),  # its 16 passes make a graph of many minutes
        dict(queue=4096, bn_groups=8),
    ),
    "byol": System(BYOL, recipe(0.06, 5e-4), {}),  # lightly
    "simsiam": System(SimSiam, recipe(0.015, 5e-4), {}),  # its paper: 0.03 at a batch of 256
    "pirl": System(  # PyContrast; ours: 4096, lr and weight decay as lightly's
        PIRL, recipe(0.06, 5e-4, tau=0.07), dict(dim=128, negatives=4096, lam=0.5, keep=0.5)
    ),
    "mining": System(  # ours; recipe and tau: SACL's
        PotentialSamples,
        recipe(0.1, 1e-4, tau=0.2),
        dict(queue=4096, neighbours=5, weighting="both", keep=512, offset=0.0, lam=1.0, ramp=0.1),
    ),
    "multi-network": System(  # 003, but for clipped gradients and the predictor's constant lr
        MultiNetwork, recipe(0.05, 1e-4, tau=1.0), dict(a=6.0, bank=16384, as_shipped=False)
    ),
    "harl": System(  # its alpha; ours: recipe as BYOL's
        HARL, recipe(0.06, 5e-4), dict(objective="byol", alpha=0.5, beta=0.5)
    ),
    "harl-nce": System(  # ours: recipe as SACL's
        HARL, recipe(0.1, 1e-4, tau=0.2), dict(objective="nce", alpha=0.5, beta=0.5)
    ),
}
SCALES = {
    "cpu": dict(
        **dict(arch="resnet18", width=16, dim=256, image_size=32),
        **dict(batch_size=128, epochs=10, knn_every=2),
    ),
    "gpu": dict(knn_every=10),  # the rest is the paper's
}
PROBES = {"cpu": dict(probe="lbfgs"), "gpu": dict(probe="lars")}

# Linear top-1 unless said, from other encoders, sizes, epochs and recipes: anchors, never to be
# mixed with our columns. T3: SACL's Table 3, 200 epochs. 003: README of liweiquan39/MNCLGLF,
# ResNet-18, 224 px, by its configs 200 epochs (SimSiam's: 100). solo: solo-learn, ResNet-18, 1000
# epochs. lightly: its documentation, kNN, ResNet-18, 200 epochs. abstract: that method's own, top-1
# by a protocol that it does not give.
PUBLISHED = {
    "cifar100": {
        "sacl": "58.90 (T3)",
        "fast-moco": "61.39 (003)",
        "simclr": "21.26 (T3), 59.20 (003), 65.78 (solo)",
        "mocov2": "53.44 (T3), 50.49 (003), 69.89 (solo, v2+)",
        "byol": "58.28 (T3), 57.12 (003), 70.46 (solo)",
        "simsiam": "49.21 (T3), 48.19 (003), 66.04 (solo)",
        "pirl": "31.55 (T3)",
        "mining": "61.10 (abstract)",
        "multi-network": "65.20 (003)",
    },
    "cifar10": {
        "sacl": "83.74 (T3)",
        "fast-moco": "85.93 (003)",
        "simclr": "52.58 (T3), 87.11 (003), 90.74 (solo), kNN 84.7 (lightly)",
        "mocov2": "82.35 (T3), 84.03 (003), 92.94 (solo, v2+), kNN 83.8 (lightly)",
        "byol": "80.14 (T3), 85.58 (003), 92.58 (solo), kNN 86.9 (lightly)",
        "simsiam": "75.58 (T3), 84.16 (003), 90.51 (solo), kNN 81.9 (lightly)",
        "pirl": "55.78 (T3)",
        "mining": "88.57 (abstract)",
        "multi-network": "90.18 (003)",
    },
    "stl10": {
        "sacl": "84.90 (T3)",
        "simclr": "44.50 (T3)",
        "mocov2": "81.25 (T3)",
        "byol": "84.88 (T3)",
        "simsiam": "71.78 (T3)",
        "pirl": "50.26 (T3)",
    },
}


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What is compared, and where it is kept."""

    dataset: str = "cifar100"  # as in sacl.py
    data_dir: str = "data"  # as in sacl.py
    scale: Literal["cpu", "gpu"] = "cpu"  # cpu: a small encoder, ten epochs; gpu: the paper's
    methods: str = ",".join(SYSTEMS)  # which systems, with commas between
    seeds: int = 1  # runs of each, with seeds 0, 1, ...
    epochs: int = 0  # 0: the scale's
    texture_bank: str = ""  # as in sacl.py; for SACL on images of more than 96 px
    results: str = "results/compare.jsonl"  # file of finished runs, one a line
    runs: str = "runs/compare"  # folder of the runs
    max_hours: float = 0  # stop, resumable, after so many hours from now; 0: no limit
    cost: bool = False  # measure the cost of a step, print what the runs will take, and stop
    table: bool = False  # print the table of finished runs, and stop

    @property
    def names(self) -> list[str]:
        return [*dict.fromkeys(name.strip() for name in self.methods.split(","))]

    def __post_init__(self):
        for name in self.names:
            if name not in SYSTEMS:
                raise UsageError(f"--methods {name}: must be of {', '.join(SYSTEMS)}")
        for flag, least in (("seeds", 1), ("epochs", 0)):
            if getattr(self, flag) < least:
                raise UsageError(f"--{flag} {getattr(self, flag)}: must be at least {least}")


def main(argv: list[str] | None = None) -> None:
    try:
        cfg = sacl.parse_config(argv, CompareConfig)
        if cfg.table:
            print(table(cfg, sacl.read_log(Path(cfg.results))))
        elif cfg.cost:
            append(cfg, measure_costs(cfg))
        else:
            compare(cfg)
    except UsageError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        sys.exit(1)


# ------------------------------------------------------------ runs


def compare(cfg: CompareConfig) -> None:
    """Train and evaluate every system, seed by seed, that the results' file does not have."""
    began, lines, diverged = time.perf_counter(), sacl.read_log(Path(cfg.results)), []
    if not known_costs(cfg, lines, cfg.names):
        append(cfg, measure_costs(cfg))
    for seed, name in itertools.product(range(cfg.seeds), cfg.names):
        key, run = run_config(cfg, name, seed)
        if key in {line.get("run") for line in lines}:
            print(f"{key}: in {cfg.results}; with other --results it is run again", flush=True)
            continue
        if cfg.max_hours:
            left = cfg.max_hours - (time.perf_counter() - began) / 3600
            run = dataclasses.replace(run, max_hours=max(left, 1e-9))  # 0 would be no limit
        print(f"\n{key}", flush=True)
        torch.compiler.reset()  # else each system counts as one more variant of the same code
        try:
            sacl.train(run, builder(name, cfg, run))
        except FloatingPointError as error:  # the other systems do not wait for a better lr
            diverged.append(key)
            append(cfg, {"run": key, "method": name, "seed": seed, "error": str(error)})
            print(f"compare.py: {error}", file=sys.stderr, flush=True)
            continue
        log = sacl.read_log(Path(run.output_dir, "log.jsonl"))
        ends = [line for line in log if "epoch_loss" in line]  # of epochs
        if not ends or ends[-1]["epoch"] < run.epochs:
            print("stopped by --max-hours; the same command goes on", flush=True)
            return
        facts = {"run": key, "method": name, "seed": seed, "own": SYSTEMS[name].own}
        facts |= {"seconds": ends[-1]["seconds"]}  # on the wall, with the monitor
        append(cfg, facts | evaluate(cfg, run, log))
    if diverged:
        raise FloatingPointError(f"not finished, the loss was not finite: {', '.join(diverged)}")


def run_config(cfg: CompareConfig, name: str, seed: int) -> tuple[str, Config]:
    """A run's name, which tells its settings from all others', and the settings."""
    system = SYSTEMS[name]
    given = {"dataset": cfg.dataset} | SCALES[cfg.scale] | system.settings
    given |= {"epochs": cfg.epochs} if cfg.epochs else {}
    learned = {k: v for k, v in given.items() if k not in sacl.Run.FREE}
    text = json.dumps([learned, system.own], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    epochs = Config(**given).epochs
    key = f"{Path(cfg.dataset).name}-{cfg.scale}-{epochs}/{name}-{digest}-{seed}"
    where = dict(data_dir=cfg.data_dir, output_dir=str(Path(cfg.runs, key)))
    return key, Config(**given, **where, seed=seed, texture_bank=cfg.texture_bank)


def builder(
    name: str, cfg: CompareConfig, run: Config, data: Images | None = None
) -> Callable[[Config], torch.nn.Module]:
    """What sacl.train builds the system with; `data` are the training images, else loaded."""
    system, cache = SYSTEMS[name], None
    if system.model is SACL:
        return SACL
    if data is None:
        data = sacl.load_data(run, "train")
        cache = Path(cfg.runs, f"masks-{Path(cfg.dataset).name}-{run.image_size}.pth")
    if system.model is HARL:
        return functools.partial(HARL, masks=make_masks(data, cache, run.workers), **system.own)
    return functools.partial(system.model, images=len(data), **system.own)


def evaluate(cfg: CompareConfig, run: Config, log: list[dict]) -> dict:
    """The figures of a finished run: kNN from its log, linear from its encoders."""
    shown = ("step", "knn", "knn_target")
    curve = [{k: line[k] for k in shown if k in line} for line in log if "knn" in line]
    if not curve:
        raise UsageError(f"--dataset {cfg.dataset}: a comparison needs labels and a test set")
    linear = {}
    for kind in ("online", "target") if "knn_target" in curve[-1] else ("online",):
        probe = eval_linear.ProbeConfig(
            source=run.output_dir, data_dir=cfg.data_dir, encoder=kind, **PROBES[cfg.scale]
        )
        result = eval_linear.evaluate(probe)
        kept = ("top1", "top5", "held_out_top1", "l2", "lr", "test_images")
        linear[kind] = {k: result[k] for k in kept if k in result}
    return {
        **dict(images=log[0]["images"], curve=curve, linear=linear, **PROBES[cfg.scale]),
        "settings": log[0]["settings"],
        "machine": log[0]["machine"],
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def append(cfg: CompareConfig, line: dict) -> None:
    """Add a line to the results' file."""
    path = Path(cfg.results)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as f:
            f.write(json.dumps(line) + "\n")
    except OSError as error:
        raise UsageError(f"--results {path} cannot be written: {error.strerror}") from None


# ------------------------------------------------------------ the cost of a step


def measure_costs(cfg: CompareConfig, rounds: int = 7) -> dict:
    """Seconds of a step of each system, all of them in turns; prints what the runs will take."""
    device, _, _ = sacl.setup()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of many, process seconds would count the waiting
    runs = {name: run_config(cfg, name, 0)[1] for name in cfg.names}
    first = runs[cfg.names[0]]
    steps = sacl.check_data(first, sacl.load_data(first, "train"), 1)
    x = torch.randint(256, (first.batch_size, 3, first.image_size, first.image_size)).byte()
    data = Images(x, torch.full((len(x),), -1), [])
    jobs = {name: step(builder(name, cfg, run, data), run, x, device) for name, run in runs.items()}
    times = {name: [] for name in jobs}
    for turn in range(rounds + 2):  # two to warm up
        for name, job in jobs.items():
            seconds = clocked(job, device)
            if turn > 1:
                times[name].append(seconds)
    torch.set_num_threads(threads)
    costs = {name: round(median(t), 5) for name, t in times.items()}
    unit = "fast-moco" if "fast-moco" in costs else min(costs, key=costs.get)
    for name, seconds in costs.items():
        hours = seconds * steps * first.epochs / 3600
        print(
            f"{name:14s} {seconds:8.4f} s a step, {seconds / costs[unit]:5.2f} of {unit}'s, "
            f"{hours:6.2f} h a run of {first.epochs} epochs of {steps} steps",
            flush=True,
        )
    print(f"{'all':14s} {sum(costs.values()) * steps * first.epochs / 3600:.2f} h a seed, and the "
          "monitor, the probe, textures and masks", flush=True)  # fmt: skip
    return {
        "cost": costs,
        "least and most": {name: [round(min(t), 5), round(max(t), 5)] for name, t in times.items()},
        "clock": "wall" if device.type == "cuda" else "process CPU",
        "of": cost_key(cfg),
        "machine": sacl.describe_machine(device, sacl.precision(first, device)),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def step(build: Callable, run: Config, x: Tensor, device: torch.device) -> Callable[[], None]:
    """A training step of sacl.train on the images x, to be called again and again."""
    torch.manual_seed(0)
    model = build(run).to(device, memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, run.lr, run.sgd_momentum, fused=True)
    x, index = x.to(device), torch.arange(len(x), device=device)

    def job() -> None:
        views = model.views(x, None if run.texture == "none" else x, index)
        with sacl.autocast(device, sacl.precision(run, device)):
            loss = model(*views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_target(run.m)

    return job


def clocked(job: Callable[[], None], device: torch.device) -> float:
    """The seconds of a call: the process's own on a CPU, those on the wall with a GPU."""
    if device.type != "cuda":
        began = time.process_time()
        job()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    job()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def cost_key(cfg: CompareConfig) -> str:
    return f"{Path(cfg.dataset).name}-{cfg.scale}"


def known_costs(cfg: CompareConfig, lines: list[dict], names) -> dict[str, float]:
    """The cost of a step of each system, of the latest measurement of all these in turns."""
    for line in reversed(lines):
        if line.get("of") == cost_key(cfg) and set(names) <= set(line["cost"]):
            return line["cost"]
    return {}


# ------------------------------------------------------------ the table


def table(cfg: CompareConfig, lines: list[dict]) -> str:
    """Markdown of the finished runs of this dataset, scale and length, best linear top-1 first."""
    ended = {name: ended_runs(cfg, name, lines) for name in cfg.names}
    runs = {name: [run for run in ended[name] if "error" not in run] for name in cfg.names}
    if not any(runs.values()):
        raise UsageError(
            f"--results {cfg.results} has no finished run of --dataset {cfg.dataset} at --scale "
            f"{cfg.scale}: run the same command without --table"
        )
    shown = [name for name, found in runs.items() if found]
    costs = {name: c for name, c in known_costs(cfg, lines, shown).items() if name in shown}
    time_of = {name: c * runs[name][0]["curve"][-1]["step"] for name, c in costs.items()}
    quickest = min(time_of, key=time_of.get, default="")
    heads = ["linear, top-1 / top-5", "kNN", "kNN at equal time"]
    rows = [["system", *heads, "n", "lr, wd, tau", "cost", "seconds", "published"]]
    targets = [["system", *heads]]
    for name, found in sorted(runs.items(), key=lambda item: -top1(item[1])):
        count = count_of(ended[name])
        if not found:
            rows += [[name, "", "", "", count, "", "", "", ""]] if ended[name] else []
            continue
        at = time_of[quickest] / costs[name] if costs else -1  # in steps
        used = found[0]["settings"]
        own = (k for k in ("lr", "weight_decay", "tau") if k in SYSTEMS[name].settings)
        more = [count, ", ".join(f"{used[k]:g}" for k in own)]
        more.append(f"{costs[name] / costs['fast-moco']:.2f}" if "fast-moco" in costs else "")
        more.append(f"{mean(run['seconds'] for run in found):.0f}")
        more.append(PUBLISHED.get(Path(cfg.dataset).name, {}).get(name, ""))
        rows.append([name, *figures(found, "online", at), *more])
        if "target" in found[0]["linear"]:
            targets.append([name, *figures(found, "target", at)])
    one = next(found for found in runs.values() if found)[0]
    machines = [run["machine"] for found in runs.values() for run in found]
    machines = dict.fromkeys(f"{m.get('cpu', '')} {m['device']}".strip() for m in machines)
    timed = (
        f"Equal time: when {quickest} ends its schedule; the others are in the middle of theirs, "
        "at a high learning rate, and a schedule made for that time would probably give more. "
        "Cost: of a step, not compiled, in fast-moco's."
        if costs
        else "The costs of these systems were not measured together: --cost does it."
    )
    about = (
        f"{cfg.dataset}, {one['images']} images, {one['settings']['epochs']} epochs, "
        f"{one['settings']['arch']} of width {one['settings']['width']}, probe {one['probe']}, "
        f"{', '.join(machines)}. The online encoder. lr, wd, tau: of the source where it has them "
        f"for CIFAR, fixed before any run, none tuned. {timed} Seconds: wall time with the monitor "
        "and SACL's textures. Published: other recipes, named at PUBLISHED in related/compare.py."
    )
    parts = [rows_of(rows), about]
    if len(targets) > 1:
        parts += ["The target encoder of the same runs:", rows_of(targets)]
    return "\n\n".join(parts)


def top1(runs: list[dict]) -> float:
    return mean(run["linear"]["online"]["top1"] for run in runs) if runs else 0


def figures(runs: list[dict], encoder: str, at: float) -> list[str]:
    """Linear, kNN at the end and kNN after `at` steps of one system's runs, for the table."""
    key = {"online": "knn", "target": "knn_target"}[encoder]
    probes = [run["linear"][encoder] for run in runs]
    linear = " / ".join(mean_std(probe[k] for probe in probes) for k in ("top1", "top5"))
    last = mean_std(run["curve"][-1][key] for run in runs)
    return [linear, last, mean_std(knn_at(runs, at, key))]


def ended_runs(cfg: CompareConfig, name: str, lines: list[dict]) -> list[dict]:
    """The results of a system with the settings that it has now, one for each seed."""
    mine = {line["seed"]: line for line in lines if line.get("method") == name
            and line["run"] == run_config(cfg, name, line["seed"])[0]}  # fmt: skip
    return [mine[seed] for seed in sorted(mine)]


def knn_at(runs: list[dict], at: float, key: str) -> list[float]:
    """Each run's figure after `at` steps, on a straight line between those of the monitor."""
    figures = []
    for run in runs:
        points = [(p["step"], p[key]) for p in run["curve"] if key in p]
        for (a, first), (b, second) in itertools.pairwise(points):
            if a <= at <= b or at > b == points[-1][0]:  # rounding may place its own end behind it
                figures.append(first + (second - first) * (min(at, b) - a) / (b - a))
                break
    return figures


if __name__ == "__main__":
    main()
