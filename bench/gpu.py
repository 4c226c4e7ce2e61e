"""What needs a GPU, measured by one command that can be stopped at any time and then goes on.

    python bench/gpu.py --data-dir data                       everything, within 25 minutes
    python bench/gpu.py --data-dir data --only steps,textures
    python bench/gpu.py --tiny --out /tmp/gpu                 rehearsal without a GPU, tiny

environment  versions, card, rates of a copy and of a matrix product: the two ceilings
tests        python -m pytest, in 8 processes where pytest-xdist is installed
steps        bench/step.py: SE-ResNet-50 at batch 128 (with a profile) and 512, SE-ResNet-18 at
             256, and the peers' job at 128 where --peers names a folder that holds them
numerics     16 bits against fp32, compiled and graphs against eager, fused block in float64
textures     bench/texture.py's table of times on a GPU
r18          SE-ResNet-18 on CIFAR-100, batch 256, 200 epochs, then eval_linear.py
r50          the paper's SE-ResNet-50, as many epochs of a whole cosine as the minutes that are
             left hold at the measured speed, then eval_linear.py

Each part is a process with a time limit that leaves <part>.log and .json in --out; one that is done
is not run again, one that failed only if --only names it, and training goes on. --minutes counts
from the first call with this --out, --call-minutes from now. <out>/home/ is what to take along: all
logs and figures in one archive, and the encoders trained in this call, in 16 bits and pieces of
15 MiB (join with cat).

On a rented machine with calls of 10 minutes and 64 MiB that keeps ignored files between calls
(runs/ is such), with CIFAR-100 as the 95 MB of sheets in ../shared/data:

  1. here:   echo /.carry/ >> .git/info/exclude; S=../shared/data; D=cifar100/train
             for h in a b; do mkdir -p .carry/$h/$D; cp $S/unpack.py .carry/$h; done
             ls $S/$D/* | head -50 | xargs cp -t .carry/a/$D
             ls $S/$D/* | tail -50 | xargs cp -t .carry/b/$D
             cp -r $S/cifar100/test .carry/b/cifar100
             for the peers' job: tar czf .carry/a/peers.tgz -C <folder of the peers' Python> .
  2. call 1, carrying .carry/a ("no sheets" for the test split is right: it comes with call 2):
             python3 .carry/a/unpack.py cifar100 /tmp/data; mkdir -p /tmp/peers
             tar xzf .carry/a/peers.tgz -C /tmp/peers
             python3 bench/gpu.py --out runs/gpu --data-dir /tmp/data --peers /tmp/peers
             --call-minutes 8 --only environment,tests,numerics,steps; cp runs/gpu/home/* $OUT
  3. call 2, carrying .carry/b: python3 .carry/b/unpack.py cifar100 /tmp/data
             python3 bench/gpu.py --out runs/gpu --data-dir /tmp/data --call-minutes 8
             --only textures,r18; cp runs/gpu/home/* $OUT
  4. call 3 and on, carrying nothing: as call 2 with --call-minutes 9 and no --only, until it says
             "all done". Call at once after the one before: an idle machine is taken back, with all
             that is on it. The figures of a machine that is gone are in gpu.tar.gz: unpack it into
             --out, and what is done stays done.
  5. here:   unpack gpu.tar.gz, read summary.md, keep the JSON files and log.jsonl in results/
"""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import step as bench_step

import sacl

HERE = Path(__file__).resolve().parent
SLOW = 4000  # images/s of the SE-ResNet-50 below which the profile comes first
COMPILED = "ours+bf16+compile,ours+bf16+graphs"


def plan(args: argparse.Namespace) -> dict[str, tuple[int, list[str]]]:
    """All parts in order: the seconds each may take, and its command."""
    tiny, out, me = args.tiny, args.out, [sys.executable, str(HERE / "gpu.py")]
    own = ["--out", str(out), *["--tiny"] * tiny]
    parts = {
        "environment": (60, [*me, "--part", "environment", *own]),
        "tests": (240, [sys.executable, "-m", "pytest", "-q", *["-k", "fused"] * tiny]),
    }
    if importlib.util.find_spec("xdist"):
        parts["tests"][1].extend(["-n", "8"])
    few = ["--arch", "resnet18", "--width", "4", "--dim", "32", "--size", "16", "--batch", "8"]
    few += ["--rounds", "2", "--round-seconds", "0.02"]
    rows = {
        "steps-r50-128": (400, "--mode whole --batch 128", ""),
        "steps-r50-512": (150, "--mode whole --batch 512", f"{COMPILED},ours+bf16"),
        "steps-r18-256": (150, "--mode whole --batch 256 --arch resnet18", f"{COMPILED},ours+bf16"),
        "steps-moco3-128": (240, "--job moco3 --batch 128", ""),
    }
    for name, (limit, options, chosen) in rows.items():
        command = [sys.executable, str(HERE / "step.py"), *options.split(), *few * tiny]
        command += ["--json", str(out / f"{name}.json")]
        command += ["--rows", chosen] if chosen and not tiny else []
        command += ["--profile", str(out / f"{name}-profile.txt")] * (name == "steps-r50-128")
        parts[name] = (limit, command)
    parts["numerics"] = (240, [*me, "--part", "numerics", *own])
    data = ["--data-dir", str(args.data_dir)]
    parts["textures"] = (120, [*me, "--part", "textures", *own, *data])
    for name, settings in (("r18", "--arch resnet18 --batch-size 256 --epochs 200"), ("r50", "")):
        run = out / name
        command = [sys.executable, str(HERE.parent / "sacl.py"), "--dataset", "cifar100", *data]
        command += [*settings.split(), "--knn-every", "20", "--output-dir", str(run)]
        if tiny:
            command = [sys.executable, str(HERE.parent / "sacl.py"), "--output-dir", str(run)]
            command += "--width 2 --dim 16 --epochs 1 --batch-size 500 --texture none".split()
        parts[name] = (3600, command)
        probe = [sys.executable, str(HERE.parent / "eval_linear.py"), str(run)]
        parts[f"{name}-linear"] = (300, [*probe, *["--epochs", "1"] * tiny])
    return parts


# ------------------------------------------------------------ Parts that are in this file


def environment(tiny: bool) -> dict:
    """The machine, and the rates that bound a step's time from below."""
    device, _, _ = sacl.setup()
    cuda = device.type == "cuda"
    facts = sacl.describe_machine(device, torch.bfloat16)
    if cuda:
        query = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit"
        line = ["nvidia-smi", query, "--format=csv,noheader"]
        facts["nvidia-smi"] = subprocess.run(line, capture_output=True, text=True).stdout.strip()
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    n, side = (2**20, 256) if tiny else (2**31, 8192)
    x = torch.randn(n // 4, device=device)  # n bytes each way; random: zeros are faster
    y = torch.empty_like(x)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    jobs = {
        "copy TB/s": (lambda: y.copy_(x), 2 * n / 1e9),
        "bf16 product TFLOP/s": (lambda: a @ b, 2 * side**3 / 1e9),
    }
    for name, (job, amount) in jobs.items():
        bench_step.clock(job, 3, device)
        facts[name] = amount / min(bench_step.clock(job, 10, device)["ms"] for _ in range(5))
    return facts


def numerics(tiny: bool, modes: tuple[str, ...] = ("compile", "graphs")) -> dict:
    """How far each fast path is from plain float32 or float64 arithmetic: figure and limit."""
    device, _, _ = sacl.setup()
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
    cuda, facts = device.type == "cuda", {}

    def note(name: str, value: float, limit: float) -> None:
        facts[name] = dict(value=value, limit=limit, holds=value <= limit)
        print(name, facts[name], flush=True)  # in the log even if the next one never ends

    note("fused block in float64", fused_gap(device), 1e-12)
    size = dict(arch="resnet18", width=8, dim=32, image_size=16) if tiny else {}
    for arch in ("resnet50", "resnet18"):  # compiling and comparing is done with the small one
        settings = dict(arch=arch, batch_size=16 if tiny else 32) | size
        shared = bench_step.share(sacl.Config(dataset="cifar100", **settings), device)
        eager = bench_step.Ours(shared, set())
        loss, wanted = eager.backward().item(), gradients(eager)
        for bits in ("bf16", "fp16") if cuda else ("bf16",):
            other = bench_step.Ours(shared, {bits}).backward().item()
            note(f"{arch}: loss in {bits}", abs(other / loss - 1), 1e-2)
    losses = [eager.step().item() for _ in range(6)]
    for mode in modes if cuda or not tiny else ():
        row = bench_step.Ours(shared, {mode})
        row.compile()
        row.backward()
        gap = ((gradients(row) - wanted).norm() / wanted.norm()).item()
        note(f"{arch}: gradients, {mode}", gap, 1e-3)
        again = [row.step().item() for _ in range(6)]  # graphs are replayed from the third on
        gap = max(abs(a / b - 1) for a, b in zip(again, losses, strict=True))
        note(f"{arch}: six losses, {mode}", gap, 1e-2)
    return facts


def gradients(row: bench_step.Step) -> torch.Tensor:
    """All of them in one vector."""
    return torch.cat([p.grad.flatten() for p in row.model.parameters() if p.grad is not None])


def fused_gap(device: torch.device) -> float:
    """Block.fused_standard against the plain unit: outputs, gradients, statistics; the largest."""
    block = sacl.Bottleneck(64, 16, 1, "standard", 4).to(device).double()
    x = torch.randn(8, 64, 8, 8, device=device, dtype=torch.double, requires_grad=True)
    results = []
    for fused in (False, True):
        block.fused, x.grad = fused, None
        block.zero_grad()
        block.last_bn.reset_running_stats()
        out = block(x)
        out.square().sum().backward()
        tensors = [out, x.grad, block.last_bn.running_mean, block.last_bn.running_var]
        results.append([t.detach().clone() for t in tensors])
        results[-1] += [p.grad for p in block.parameters()]
    return max(((a - b).norm() / a.norm()).item() for a, b in zip(*results, strict=True))


def textures(tiny: bool, data_dir: str) -> dict:
    """bench/texture.py's table of CUDA times; without a GPU the CPU time of a few textures."""
    where = importlib.util.spec_from_file_location("bench_texture", HERE / "texture.py")
    bench = importlib.util.module_from_spec(where)
    where.loader.exec_module(bench)
    images, what = bench.pick_images(data_dir, 8 if tiny else 128)
    if torch.cuda.is_available():
        return dict(images=what, rows=bench.cuda(images))
    seconds = bench.cpu_seconds(lambda: bench.tx.texture_views(images), 2)
    return dict(images=what, seconds=seconds)


# ------------------------------------------------------------ Running them


def drive(args: argparse.Namespace) -> None:
    """Run what is chosen and not done yet; stop in time."""
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    path = out / "parts.json"
    state = json.loads(path.read_text()) if path.exists() else {"began": time.time()}
    deadline = state["began"] + 60 * args.minutes
    stop = min(deadline, time.time() + 60 * args.call_minutes)
    trained, all_done = [], True
    for name, (limit, command) in plan(args).items():
        chosen = not args.only or any(name.startswith(o) for o in args.only.split(","))
        before, left = state.get(name, {}), stop - time.time()
        ended = ("done",) if args.only else ("done", "failed", "timed out")
        if before.get("how") in ended or not chosen:
            continue
        run = out / name.removesuffix("-linear")
        if name.endswith("-linear") and not finished(run):
            continue
        if left < (200 if name in ("r18", "r50") and not args.tiny else 30):  # it compiles first
            print("no time left", flush=True)
            all_done = False
            break
        if name == "r50" and not args.tiny:
            remaining = deadline - time.time()
            calls = math.ceil(remaining / (60 * min(args.call_minutes, args.minutes)))
            epochs = before.get("epochs") or whole_cosine(out, remaining, calls)
            before["epochs"] = epochs
            command = [*command, "--epochs", str(epochs)]
        if name in ("r18", "r50"):
            command = [*command, "--max-hours", f"{max(left - 40, 30) / 3600:.4f}"]
        if name.startswith("steps"):
            command = [*command, "--seconds", str(round(min(limit, left) - 30))]
        print(f"== {name}: {' '.join(command)}", flush=True)
        state[name], began = before | {"how": "cut off"}, time.time()
        sacl.write(path, json.dumps(state, indent=1).encode())  # --epochs must not be forgotten
        how = run_part(command, out / f"{name}.log", min(limit, left), args.peers)
        if how == "timed out" and left < limit:
            how = "cut off"  # by this call's end, not by its own limit: it runs again
        if name in ("r18", "r50") and how != "failed":
            how = "done" if finished(run) else "goes on"
            trained += [run] if how == "done" else []
        seconds = round(before.get("seconds", 0) + time.time() - began)
        state[name] = before | dict(how=how, seconds=seconds, command=" ".join(command))
        all_done &= how not in ("goes on", "cut off")
        print("\n".join(tail(out / f"{name}.log")), f"\n== {name}: {how}, {seconds} s", flush=True)
        sacl.write(path, json.dumps(state, indent=1).encode())
        if name == "steps-r50-128" and (speed(out) or SLOW) < SLOW:
            print(f"under {SLOW} images/s: read {name}-profile.txt first", flush=True)
    pack(out, state, trained)
    failed = [n for n, part in state.items() if n != "began" and part["how"] == "failed"]
    print(f"failed: {', '.join(failed) or 'none'}", flush=True)
    print("all done" if all_done else "the same command goes on", flush=True)


def run_part(command: list[str], log: Path, limit: float, peers: str) -> str:
    """How it ended; it and what it started are stopped at the limit."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    if peers and "moco3" in command:
        env["PYTHONPATH"] = peers
    with open(log, "a") as f:
        process = subprocess.Popen(
            command, stdout=f, stderr=subprocess.STDOUT, env=env, cwd=HERE.parent,
            start_new_session=True,
        )  # fmt: skip
        try:
            return "done" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return "timed out"


def finished(run: Path) -> bool:
    """Whether a training run has come to its last epoch."""
    if not (run / "config.json").exists():
        return False
    epochs = json.loads((run / "config.json").read_text())["epochs"]
    lines = sacl.read_log(run / "log.jsonl")
    return any("epoch_loss" in line and line["epoch"] == epochs for line in lines)


def speed(out: Path) -> float | None:
    """Images/s of the SE-ResNet-50's whole step at batch 128, compiled if that ran."""
    path = out / "steps-r50-128.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rates = {row["row"]: row["images/s"] for row in rows if "images/s" in row}
    return rates.get("ours+bf16+compile", rates.get("ours+bf16"))


def whole_cosine(out: Path, seconds: float, calls: int) -> int:
    """The epochs of CIFAR-100 that fit beside compiling, in each call, and linear evaluation."""
    training = seconds - 240 - 90 * calls
    images = 0.95 * max(training, 0) * (speed(out) or SLOW)  # monitor and saving take some
    return min(200, max(1, int(images / 50_000)))


def tail(log: Path, lines: int = 15) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-lines:]


def pack(out: Path, state: dict, trained: list[Path]) -> None:
    """Fill <out>/home with what is worth taking along."""
    text = [
        f"## {name}: {part['how']}, {part.get('seconds', 0)} s\n\n```\n"
        + "\n".join(tail(out / f"{name}.log", 40))
        + "\n```\n"
        for name, part in state.items()
        if isinstance(part, dict)
    ]
    (out / "summary.md").write_text("\n".join(text))
    home = out / "home"
    home.mkdir(exist_ok=True)
    for old in home.iterdir():
        old.unlink()
    with tarfile.open(home / "gpu.tar.gz", "w:gz") as archive:
        for path in sorted(
            p for folder in (out, out / "r18", out / "r50") for p in folder.glob("*")
        ):
            if path.suffix in (".json", ".jsonl", ".log", ".md", ".txt"):
                archive.add(path, path.relative_to(out))
    for run in trained[-1:]:  # of two both would be more than one call brings home
        weights = sacl.read_checkpoint(run / "backbone.pth")
        halves = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
        content = sacl.serialize(halves)
        for i in range(0, len(content), 15 << 20):
            piece = home / f"{run.name}-backbone.pth.{i // (15 << 20)}"
            piece.write_bytes(content[i : i + (15 << 20)])
    print(
        f"to take along: {', '.join(p.name for p in sorted(home.iterdir()))} in {home}", flush=True
    )


def main(argv: list[str] | None = None) -> None:
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(**about)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "gpu")
    parser.add_argument("--data-dir", default="data", help="holds cifar100/{train,test}/<class>/")
    parser.add_argument("--peers", default="", help="folder of lightly and solo-learn")
    parser.add_argument("--minutes", type=float, default=25, help="from the first call")
    parser.add_argument("--call-minutes", type=float, default=1e6, help="from now")
    parser.add_argument("--only", default="", help="parts, or how their names begin")
    parser.add_argument("--tiny", action="store_true", help="rehearsal")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    if not args.part:
        return drive(args)
    if args.part == "textures":
        facts = textures(args.tiny, args.data_dir)
    else:
        facts = {"environment": environment, "numerics": numerics}[args.part](args.tiny)
    sacl.write(args.out / f"{args.part}.json", json.dumps(facts, indent=1).encode())
    print(json.dumps(facts, indent=1), flush=True)
    if not all(fact.get("holds", True) for fact in facts.values() if isinstance(fact, dict)):
        sys.exit("some figures are over their limits")


if __name__ == "__main__":
    main()
