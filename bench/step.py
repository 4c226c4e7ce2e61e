"""Time of a training step, with the options of sacl.py and some that it does not have.

    python bench/step.py                                                  of `python sacl.py`
    python bench/step.py --dataset cifar100 --batch-size 16 --json out.json
    python bench/step.py --rows bf16+graphs,bf16+graphs+fused --whole

Any settings of sacl.py may follow. A row is a set of options: a precision (fp32, bf16 or fp16),
nchw (else channels_last), compile, graphs (CUDA graphs), fused (`fused_standard` below).

All rows have the same weights, views and SGD. A row's losses must be those of fp32+nchw: the first
to 1e-2 (in fp32 to 1e-5); the second, which depends on gradients, SGD and EMA, to 1e-2 (1e-3); and
three more, in which CUDA graphs are replayed, to 5e-2. A row that fails this, or cannot run, shows
the reason in place of its times. test_sacl.py tests that the loss is the paper's.

A step is timed from views to updated weights; with --whole from uint8 images on the device. Rows
are timed in turn, round by round; x is the median over the rounds of the ratio to the first row's
time in that round. On a busy CPU rely on the column CPU x, the same ratio for the process's own CPU
time.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sacl
from bench.plot import table

ROWS = {
    "cpu": "fp32,fp32+nchw,bf16",
    "cuda": "bf16,bf16+compile,bf16+graphs,bf16+graphs+fused,bf16+nchw,fp16,fp32",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIONS = {"nchw", "compile", "graphs", "fused"}


class Step:
    """The step of sacl.train, on random images; weights and views are the same in all rows."""

    def __init__(self, cfg: sacl.Config, device: torch.device, options: set[str]):
        precisions = options & DTYPES.keys()
        if len(precisions) != 1 or options - precisions - OPTIONS:
            raise ValueError(f"a row has one of {[*DTYPES]} and any of {sorted(OPTIONS)}")
        self.cfg, self.device, self.dtype = cfg, device, DTYPES[precisions.pop()]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        torch.manual_seed(0)
        self.model = sacl.SACL(cfg)
        for block in self.model.encoder.modules():
            if isinstance(block, sacl.Block):  # where it is zero, the branch would not be seen
                nn.init.uniform_(block.get_submodule(block.last_bn).weight, 0.1, 0.3)
        self.model.target_encoder.load_state_dict(self.model.encoder.state_dict())
        shape = 2 * cfg.batch_size, 3, cfg.image_size, cfg.image_size
        self.images = torch.randint(256, shape, dtype=torch.uint8).to(device)
        self.fixed_views = self.views()
        layout = torch.contiguous_format if "nchw" in options else torch.channels_last
        self.model.to(device, memory_format=layout)
        for block in self.model.modules():
            if "fused" in options and isinstance(block, sacl.Block):
                fuse(block)
        if options & {"compile", "graphs"}:
            mode = "reduce-overhead" if "graphs" in options else None
            self.model.compile(dynamic=False, mode=mode)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        lr, decay = cfg.lr * cfg.batch_size / 128, cfg.weight_decay
        sgd = dict(momentum=cfg.sgd_momentum, weight_decay=decay, fused=True)
        self.optimizer = torch.optim.SGD(trained, lr, **sgd)

    def views(self) -> tuple[Tensor, ...]:
        """As in sacl.train, with other images in the place of textures."""
        x, other = self.images.chunk(2)
        texture = None if self.cfg.texture == "none" else other
        return self.model.views(x, texture, torch.arange(len(x), device=self.device))

    def step(self, whole: bool = False) -> Tensor:
        views = self.views() if whole else self.fixed_views
        self.optimizer.zero_grad()
        with sacl.autocast(self.device, self.dtype):
            loss = self.model(*views)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.update_target(self.cfg.m)
        return loss.detach()


def fuse(block: sacl.Block) -> None:
    """Let a block with the gate in its standard place compute `fused_standard`."""
    block.tail = block.get_submodule(block.last_bn)
    setattr(block, block.last_bn, nn.Identity())
    block.forward = MethodType(fused_standard, block)


def fused_standard(block: sacl.Block, x: Tensor) -> Tensor:
    """The standard placement with fewer passes over its largest maps, in training.

    The mean of BN(u) over pixels is BN of the mean of u, so that one reading of u gives both the
    squeeze and BN's statistics, and a compiler makes BN, gate, sum and ReLU one pass. Exact.
    """
    bn, u = block.tail, block.residual(x)  # which now ends before its last BatchNorm
    full = torch.promote_types(u.dtype, torch.float32)
    var, mean = torch.var_mean(u.to(full), (2, 3), correction=0)  # (N, C) each
    batch_mean = mean.mean(0)
    batch_var = (var + (mean - batch_mean).square()).mean(0)
    count = u.numel() / u.shape[1]
    bn.running_mean.lerp_(batch_mean.detach(), bn.momentum)
    bn.running_var.lerp_(batch_var.detach() * (count / (count - 1)), bn.momentum)
    scale = bn.weight * (batch_var + bn.eps).rsqrt()  # (C,)
    shift = bn.bias - batch_mean * scale
    squeeze = (mean * scale + shift).to(u.dtype)
    s = block.se.fc2(F.relu(block.se.fc1(squeeze))).sigmoid().to(full)  # (N, C)
    u = u * (scale * s)[:, :, None, None] + (shift * s)[:, :, None, None]
    # backward keeps what ReLU returns: in 32 bits that would cost more than all this saves
    return F.relu((u + block.downsample(x)).to(x.dtype))


# ------------------------------------------------------------ checking and timing


def check(row: Step) -> str:
    """How far the row's losses are from what they must be; raises where that is too far."""
    losses, wanted = first_losses(row), first_losses(Step(row.cfg, row.device, {"fp32", "nchw"}))
    allowed = (1e-5, 1e-3) if row.dtype == torch.float32 else (1e-2, 1e-2)
    off = [abs(a - b) / max(abs(b), 1) for a, b in zip(losses, wanted, strict=True)]
    if not all(a <= b for a, b in itertools.zip_longest(off, allowed, fillvalue=5e-2)):
        raise RuntimeError(f"losses {losses}, not {wanted}")
    return " ".join(f"{x:.0e}" for x in off)


def first_losses(row: Step) -> list[float]:
    """The losses of the first five steps, of float32 rows with exact convolutions."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and row.dtype != torch.float32
    losses = [row.step().item() for _ in range(5)]
    torch.backends.cudnn.allow_tf32 = before
    return losses


def build(name: str, cfg: sacl.Config, device: torch.device) -> tuple[Step | None, dict]:
    """A row's step, checked and warmed up, and its facts; or None, and the reason."""
    options, cuda = set(name.split("+")), device.type == "cuda"
    try:
        before = torch.cuda.memory_allocated() if cuda else 0
        row = Step(cfg, device, options)
        facts = {"loss off by": check(row)}
        if cuda:
            row.step()  # with TF32, for which cuDNN searches anew, in much memory
            torch.cuda.reset_peak_memory_stats()
            row.step()
            facts["peak GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        return row, facts
    except Exception as error:  # compilers and memory each fail in their own ways
        text = str(error).strip().splitlines() or [""]
        return None, {"loss off by": f"not run: {type(error).__name__}: {text[0][:150]}"}


def measure(rows: dict[str, Step], rounds: int, whole: bool) -> dict[str, list[dict]]:
    """Time the rows in turn, each for about half a second a round: a list of times for each."""

    def clock(row: Step, repeats: int) -> dict[str, float]:
        cuda = row.device.type == "cuda"
        torch.cuda.synchronize() if cuda else None
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            row.step(whole)
        torch.cuda.synchronize() if cuda else None
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"ms": 1e3 * wall / repeats, "CPU ms": 1e3 * cpu / repeats}

    once = {name: clock(row, 2)["ms"] for name, row in rows.items()}
    repeats = {name: max(1, min(50, round(500 / ms))) for name, ms in once.items()}
    times: dict[str, list[dict]] = {name: [] for name in rows}
    for i in range(rounds):
        order = list(rows)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            times[name].append(clock(rows[name], repeats[name]))
    return times


def medians(times: list[dict], base: list[dict]) -> dict[str, float]:
    """Of a row's times, and of their ratios to the first row's."""
    facts = {}
    for key, x in (("ms", "x"), ("CPU ms", "CPU x")):
        facts[key] = statistics.median(t[key] for t in times)
        facts[x] = statistics.median(a[key] / b[key] for a, b in zip(times, base, strict=True))
    return facts


# ------------------------------------------------------------ the command


def run(args: argparse.Namespace, settings: dict) -> None:
    """Build, check and time the rows; print the table and write it all to --json."""
    if args.rounds < 1:
        raise sacl.UsageError(f"--rounds {args.rounds}: must be at least 1")
    cfg, device = sacl.Config(**settings), sacl.choose_device()
    built = {}
    for name in (args.rows or ROWS[device.type]).split(","):
        built[name] = build(name, cfg, device)
        print(f"{name}: {built[name][1]}", file=sys.stderr, flush=True)
    rows = {name: row for name, (row, _) in built.items() if row}
    times = measure(rows, args.rounds, args.whole) if rows else {}
    lines = []
    for name, (row, facts) in built.items():
        timed = medians(times[name], times[next(iter(rows))]) if row else {}
        lines.append({"row": name} | timed | facts)
    machine = sacl.describe_machine(device, torch.float32)
    del machine["precision"]  # each row has its own
    print(f"\n{cfg.dataset}, batch {cfg.batch_size}, {machine}\n\n{table(lines)}", flush=True)
    report = vars(args) | dict(settings=asdict(cfg), machine=machine, rows=lines, rounds=times)
    if args.json:
        sacl.write(Path(args.json), json.dumps(report, indent=1).encode())


def main(argv: list[str] | None = None) -> None:
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser("step.py", allow_abbrev=False, **about)
    parser.add_argument("--rows", help="comma-separated; ROWS has those of each device")
    parser.add_argument("--whole", action="store_true", help="time the making of views too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="file for everything")
    args, rest = parser.parse_known_args(argv)
    sacl.command("step.py", lambda: run(args, sacl.parse(sacl.Config, rest)))


if __name__ == "__main__":
    main()
