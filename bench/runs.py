"""One run of a comparison: train, evaluate, and append its line to a file of results.

    runs.run("no gate", Config(dataset="shapes", se="none", seed=3), Path("results/claims.jsonl"))

A line holds the label, the seed, every setting that is not the dataset's default, the figures, the
CPU seconds, versions and machine, and the command that repeats it. A run that has its line is not
run again. Several processes may work on one file: a run is locked while it is running, and the
operating system takes the lock back when a process ends, however it ends. An interrupted run goes
on from its folder.
"""

import json
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import eval_linear
import sacl
from bench import shifts
from sacl import SACL, Config


def run(label: str, cfg: Config, file: Path, build: Callable = SACL, **facts) -> None:
    """Do this run unless `file` has it or another process is at it; `facts` go into its line.

    build makes the model, as in sacl.train; build=None evaluates a new SACL without training it.
    """
    out, name = Path(cfg.output_dir), f"{label}, seed {cfg.seed}"
    out.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(out.name + ".lock"), "w") as lock:
        if not sacl.try_lock(lock):
            print(f"{name}: another process is running it", flush=True)
            return
        if any((x["label"], x["seed"]) == (label, cfg.seed) for x in sacl.read_log(file)):
            return
        print(f"\n{name}", flush=True)
        line = {"label": label, "seed": cfg.seed, "settings": settings_of(cfg)}
        line |= facts | measure(cfg, build)
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a") as f:
            f.write(json.dumps(line) + "\n")
        (out / "checkpoint.pth").unlink(missing_ok=True)  # the encoders stay


def settings_of(cfg: Config) -> dict:
    """The settings that differ from the dataset's defaults, without folders and seed."""
    usual = asdict(Config(dataset=cfg.dataset)) | {"seed": cfg.seed}
    differ = {k: v for k, v in asdict(cfg).items() if v != usual[k]}
    return {k: v for k, v in differ.items() if k not in ("data_dir", "output_dir")}


def measure(cfg: Config, build: Callable | None) -> dict:
    """Train and evaluate: figures in per cent, or the error of a run that diverged."""
    out, began = Path(cfg.output_dir), time.process_time()
    resumed = (out / "checkpoint.pth").exists()  # then an earlier process's CPU time is unknown
    result = {}
    try:
        if build is None:
            torch.manual_seed(cfg.seed)
            model = SACL(cfg)
        else:
            model = sacl.train(cfg, build)
            log = sacl.read_log(out / "log.jsonl")
            last = [x for x in log if "loss" in x][-1]
            result |= {k: round(last[k], 4) for k in ("loss", "spread") if k in last}
            curve = {x["epoch"]: x["knn"] for x in log if "knn" in x and x["epoch"] > 0}
            result["knn_curve"] = [curve[epoch] for epoch in sorted(curve)]
        trained = time.process_time()
        result |= evaluate(model, cfg)
        seconds = {"train": None if resumed else round(trained - began)}
        seconds["evaluate"] = round(time.process_time() - trained)
        result["cpu_seconds"] = seconds | {"monitor": result.pop("monitor")}
    except FloatingPointError as error:
        result["error"] = str(error)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = sacl.describe_machine(device, sacl.precision(cfg, device)) | {"cpu": cpu_model()}
    return result | {"machine": machine}


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")  # of Linux
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()


def plain(model: nn.Module) -> nn.Module:
    """The model with every BatchNorm scale at 1: no block starts as the identity."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.ones_(module.weight)
    return model


def evaluate(model: nn.Module, cfg: Config) -> dict:
    """Figures of the online encoder, and kNN of the target's; on shapes, shifted images too.

    "monitor" is the CPU seconds of the kNN figures, which sacl.train's monitor needs each time.
    """
    device, encoder = next(model.parameters()).device, model.encoder.eval()
    cfg = replace(cfg, stl10_split="train")  # a probe needs labels
    train_set, test_set = eval_linear.load_labelled(cfg)
    classes = len(train_set.classes)

    def embed(net: nn.Module, *sets: sacl.Images) -> list[Tensor]:
        return [sacl.embed(net, images.pixels, cfg, device) for images in sets]

    def vote(bank: Tensor, query: Tensor) -> Tensor:
        return sacl.knn(bank, train_set.labels, query, classes).cpu()

    began, result = time.process_time(), {}
    bank, query = embed(encoder, train_set, test_set)
    result["knn"] = sacl.percent(vote(bank, query) == test_set.labels)
    if hasattr(model, "target_encoder"):
        guess = vote(*embed(model.target_encoder, train_set, test_set))
        result["knn_target"] = sacl.percent(guess == test_set.labels)
    result["monitor"] = round(time.process_time() - began, 1)
    head, choice = eval_linear.fit_lbfgs(bank, train_set.labels.to(device), classes, seed=0)
    logits = head(query).cpu()
    result |= {f"top{k}": eval_linear.accuracy(logits, test_set.labels, k) for k in (1, 5)}
    result |= {"l2": choice["l2"], "held_out_top1": max(choice["held_out_top1"].values())}
    result["uniformity"] = round(uniformity(query), 4)
    if cfg.dataset == "shapes":
        result["shifts"] = shifts.measure(encoder, head, test_set, cfg, device)
    return result


def uniformity(features: Tensor) -> float:
    """-log mean exp(-2 d^2) over pairs of unit-length features (N, C); Wang and Isola, ICML 2020.

    0 where all are one point; larger is more uniform.
    """
    distances = torch.pdist(sacl.unit(features))
    return -distances.square().mul(-2).exp().mean().log().item()
