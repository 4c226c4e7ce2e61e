"""The paper's claims, each a comparison of two settings; results/README.md has the rule.

    python bench/ablations.py                                    every run that has no line yet
    python bench/ablations.py --rows base "no gate" --seeds 0 1  only these
    python bench/ablations.py --table > results/claims.md        the tables, from the lines
    python bench/ablations.py --plot results/figure-claims.png   the claims with all seeds, drawn

The runs are of the embedded dataset, in float32 on one CPU thread. The same command may be started
once for each core; runs.py sees to it that no run is done twice, and that what was interrupted goes
on. Each setting is run with seeds 0 to 7 (epochs x 2 and x 4: 0 to 3), seed by seed over --rows.
"""

import argparse
import shlex
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sacl
from bench import runs
from bench.plot import count_of, forest, mean_std, table
from bench.verdict import Difference, difference, holm
from sacl import SACL, Config


class Setting(NamedTuple):
    changes: dict  # of the base's settings
    start: str = "usual"  # initial weights; plain: BatchNorm scales 1; untrained: and no training
    seeds: int = 8


# the demo as it was when the rule was written
BASE = dict(dataset="shapes", arch="resnet18", width=16, dim=256, m=0.98, epochs=6,
            batch_size=64, lr=0.2, weight_decay=5e-4)  # fmt: skip
CURVE = {"knn_every": 1}
SETTINGS = {
    "base": Setting(CURVE),
    "no gate": Setting(dict(se="none")),
    "no texture": Setting(dict(texture="none")),
    "texture positive": Setting(dict(texture="positive")),
    "no grid": Setting(dict(grid=1, combine=1) | CURVE),
    "untrained": Setting({}, "untrained"),
    "standard, plain start": Setting({}, "plain"),
    "no gate, plain start": Setting(dict(se="none"), "plain"),
    "pre, plain start": Setting(dict(se="pre"), "plain"),
    "post": Setting(dict(se="post"), "plain"),
    "identity": Setting(dict(se="identity"), "plain"),
    **{f"m = {m:g}": Setting(dict(m=m)) for m in (0.5, 0.9, 0.99, 0.999, 1.0)},
    **{f"tau = {tau:g}": Setting(dict(tau=tau)) for tau in (0.1, 0.5, 1.0)},
    "batch 32": Setting(dict(batch_size=32)),
    "batch 128": Setting(dict(batch_size=128)),
    "batch 32, rate 0.1": Setting(dict(batch_size=32, lr=0.4)),  # sacl.py multiplies by batch / 128
    "batch 128, rate 0.1": Setting(dict(batch_size=128, lr=0.1)),
    "texture weight 2": Setting(dict(texture_alpha=2.0)),
    "textures of the batch": Setting(dict(texture_negatives="batch")),
    **{f"i = {i}": Setting(dict(combine=i)) for i in (1, 3, 4)},
    "negatives eq10": Setting(dict(negatives="eq10")),
    "weak geometric": Setting(dict(weak="geometric")),
    "epochs x 2": Setting(dict(epochs=12), seeds=4),
    "epochs x 4": Setting(dict(epochs=24), seeds=4),
}


class Claim(NamedTuple):
    text: str
    where: str  # in the paper
    better: str  # the setting that the paper prefers
    other: str
    figure: str


GATE, TEXTURE = ("base", "no gate"), ("base", "no texture")
STANDARD, AREA = "standard, plain start", "area under the kNN curve"
CLAIMS = (
    Claim("attention raises accuracy", "abstract", *GATE, "linear top-1"),
    Claim("attention: semantics, not texture", "abstract", *GATE, "shape share"),
    Claim("attention makes features robust", "Sec. 1.3", *GATE, "corruptions"),
    Claim("standard placement best", "Table 4", STANDARD, "pre, plain start", "linear top-1"),
    Claim("standard placement best", "Table 4", STANDARD, "post", "linear top-1"),
    Claim("standard placement best", "Table 4", STANDARD, "identity", "linear top-1"),
    Claim("texture negatives raise accuracy", "Sec. 4", *TEXTURE, "linear top-1"),
    Claim("texture negatives: semantics, not texture", "Sec. 0", *TEXTURE, "shape share"),
    Claim("texture negatives make features robust", "Sec. 0", *TEXTURE, "corruptions"),
    Claim("gridding speeds up convergence", "abstract", "base", "no grid", AREA),
    Claim("m of 0.5 collapses", "Table 6", "untrained", "m = 0.5", "linear top-1"),
    Claim("m = 0.99 best", "Table 6", "m = 0.99", "m = 0.9", "linear top-1"),
    Claim("m = 0.99 best", "Table 6", "m = 0.99", "m = 0.999", "linear top-1"),
    Claim("m = 0.99 best", "Table 6", "m = 0.99", "m = 1", "linear top-1"),
    Claim("too large a tau costs accuracy", "Sec. 3.5", "base", "tau = 1", "linear top-1"),
    Claim("a small tau: more uniform", "Sec. 3.5", "base", "tau = 1", "uniformity"),
    Claim("larger batches help", "Table 5", "batch 128", "batch 32", "linear top-1"),
    Claim("larger batches help", "Table 5", "batch 128, rate 0.1", "batch 32, rate 0.1",
          "linear top-1"),
    Claim("longer training helps", "Table 7", "epochs x 4", "base", "linear top-1"),
)  # fmt: skip
# shown without a verdict: a setting, and what it is compared with
OPEN = {
    "texture positive": "no texture",
    **dict.fromkeys(("texture weight 2", "textures of the batch", "negatives eq10"), "base"),
    **dict.fromkeys(("i = 1", "i = 3", "i = 4", "tau = 0.1", "tau = 0.5", "m = 0.99"), "base"),
    **dict.fromkeys(("weak geometric", "no grid", "epochs x 2", "epochs x 4"), "base"),
    STANDARD: "no gate, plain start",
    "base": STANDARD,
    "no gate": "no gate, plain start",
}
# columns of the tables, without the last
FIGURES = {
    "linear top-1": lambda x: x["top1"],
    "top-5": lambda x: x["top5"],
    "kNN": lambda x: x["knn"],
    "kNN, target": lambda x: x["knn_target"],
    "shape share": lambda x: x["shifts"]["conflict"]["shape_share"],
    "corruptions": lambda x: x["shifts"]["corruption_mean"],
    "textures only": lambda x: x["shifts"]["texture"],
    "4 x 4 shuffled": lambda x: x["shifts"]["shuffle_4x4"],
    "low-pass": lambda x: x["shifts"]["low_pass"],
    "silhouettes": lambda x: x["shifts"]["silhouette"],
    "uniformity": lambda x: x["uniformity"],
    AREA: lambda x: statistics.mean(x["knn_curve"]) if x.get("knn_curve") else None,
}


# ------------------------------------------------------------ the runs


def plain_start(cfg: Config) -> nn.Module:
    """SACL with every BatchNorm scale at 1, in the target too: no block starts as the identity."""
    return runs.plain(SACL(cfg))


def run_all(labels: list[str], seeds: list[int], file: Path, work: Path) -> None:
    torch.set_num_threads(1)
    builds = {"usual": SACL, "plain": plain_start, "untrained": None}
    for seed in seeds:
        for label in labels:
            changes, start, planned = SETTINGS[label]
            if seed >= planned:
                continue
            name = label.replace(" = ", "").replace(", ", "-").replace(" ", "-")
            fixed = dict(BASE, amp="off", knn_every=0, seed=seed)
            cfg = Config(**fixed | changes, output_dir=str(work / f"{name}-seed{seed}"))
            command = f"python bench/ablations.py --rows {shlex.quote(label)} --seeds {seed}"
            runs.run(label, cfg, file, builds[start], start=start, command=command)


# ------------------------------------------------------------ the tables


def compared(lines: list[dict], better: str, other: str, figure: str) -> Difference:
    """`better` minus `other` in one figure, seed by seed."""
    by_seed = [
        {x["seed"]: figure_of(x, figure) for x in lines if x["label"] == label}
        for label in (better, other)
    ]
    return difference(*by_seed, min(SETTINGS[better].seeds, SETTINGS[other].seeds))


def figure_of(line: dict, name: str) -> float | None:
    """A figure of a run; None where it diverged."""
    return None if "error" in line else FIGURES[name](line)


def results(lines: list[dict]) -> list[tuple[Claim, Difference, bool]]:
    """Each claim, its difference, and whether this survives Holm's correction over all claims."""
    found = [compared(lines, c.better, c.other, c.figure) for c in CLAIMS]
    return list(zip(CLAIMS, found, holm([d.p for d in found]), strict=True))


def tables(lines: list[dict]) -> str:
    """The claims, the open choices and all settings, as markdown."""
    claims, choices, settings = [], [], []
    for i, (c, d, survives) in enumerate(results(lines), 1):
        holm_word = {True: "yes", False: "no"}[survives] if d.done == d.planned else ""
        lost = [x for x in lines if "error" in x and x["label"] in (c.better, c.other)]
        word = d.verdict + "".join(f"; {x['label']}, seed {x['seed']} diverged" for x in lost)
        claims.append({
            "no.": i, "claim": c.text, "paper": c.where,
            "difference of": f"{c.better} minus {c.other}", "figure": c.figure,
            "mean (95 % interval)": d, "n": len(d.values), "verdict": word, "Holm": holm_word,
        })  # fmt: skip
    columns = ("linear top-1", "kNN", "shape share", "corruptions")
    for label, other in OPEN.items():
        row = {name: compared(lines, label, other, name) for name in columns}
        n = len(row["linear top-1"].values)
        choices.append({"difference of": f"{label} minus {other}"} | row | {"n": n})
    for label in SETTINGS:
        of = [x for x in lines if x["label"] == label]
        row = {name: mean_std(figure_of(x, name) for x in of) for name in FIGURES if name != AREA}
        seconds = [x["cpu_seconds"]["train"] for x in of if "error" not in x]
        minutes = mean_std(s / 60 for s in seconds if s is not None)
        row |= {"training, CPU minutes": minutes, "n": count_of(of)}
        settings.append({"setting": label} | row)
    machines = {", ".join(f"{k} {v}" for k, v in x["machine"].items()) for x in lines}
    return "\n\n".join([
        "## Claims", table(claims),
        "## Choices that the paper leaves open, and the start", table(choices),
        "## All settings: mean and standard deviation over the seeds", table(settings),
        f"{len(lines)} runs, on:", *sorted(machines),
    ]) + "\n"  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("ablations.py", allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", choices=SETTINGS, default=list(SETTINGS),
                        metavar="LABEL", help="only these settings [all]")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(8)), help="[0 to 7]")
    parser.add_argument("--file", type=Path, default=Path("results/claims.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("runs/claims"),
                        help="folders of the runs")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="only print the tables of --file")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="only draw the claims of --file")
    args = parser.parse_args(argv)
    sacl.command("ablations.py", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    lines = sacl.read_log(args.file)
    if args.plot:
        panels = {}
        for c, d, _ in results(lines):
            row = f"{c.text} ({c.where})\n{c.better} minus {c.other}", d
            if d.done == d.planned:  # a few seeds have intervals that would dwarf the others
                panels.setdefault(c.figure, []).append(row)
        if not panels:
            raise sacl.UsageError(
                f"--file {args.file}: no claim has all its seeds yet; --table shows what there is"
            )
        forest(panels, args.plot)
    elif args.table:
        print(tables(lines), end="")
    else:
        run_all(args.rows, args.seeds, args.file, args.work)


if __name__ == "__main__":
    main()
