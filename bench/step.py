"""Time of a training step: ours, with options that sacl.py does not have, a plain one, lightly's.

    python bench/step.py --job demo                                       as `python sacl.py`
    python bench/step.py --job moco3 --batch-size 16 --json out.json      what lightly trains
    python bench/step.py --rows ours+bf16+compile,ours+bf16+compile+fused --whole

Any settings of sacl.py may follow. A row is an implementation and its options:

ours     as in sacl.train; +compile, +graphs (CUDA graphs), +fused (`fused_standard` below)
bare     the same step as one would first write it: slices, lists and loops
lightly  its loss and EMA in the order of its BYOL example; NCHW, as there; only for moco3
options  memory +nhwc (channels_last, the default) or +nchw; +bf16 or +fp16, else float32

All rows have one encoder and its heads with the same weights, the same views and the same SGD. A
row's first loss must be bare's in float32 (or BYOL's with bare's embeddings) to 1e-5, and in
float32 its second, which depends on gradients, SGD and EMA, to 1e-3; in 16 bits the first to 1e-2.
A row that fails this, or cannot run, is a line, not a time.

A step is timed from views to updated weights; with --whole from uint8 images on the device. Rows
are timed in turn, round by round; x is the median over the rounds of the ratio to the first row's
time in that round. On a busy CPU trust that of the process's own time (CPU x).
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
from bench.plot import rows_of

JOBS = {
    "sacl": dict(dataset="cifar100"),
    "demo": dict(dataset="shapes"),
    "moco3": dict(dataset="cifar100", grid=1, combine=1, texture="none", se="none"),
}
ROWS = {
    "cpu": "ours,ours+nchw,ours+bf16,bare,lightly,lightly+nhwc",
    "cuda": "ours+bf16,ours+bf16+compile,ours+bf16+compile+fused,ours+bf16+graphs,bare+bf16,"
    "ours+nchw+bf16,ours+fp16,ours,lightly+bf16,lightly+nhwc+bf16",
}


# ------------------------------------------------------------ the implementations


class Step:
    """A training step of a model; weights, views and settings are the same in all rows."""

    layout = "nhwc"

    def __init__(self, cfg: sacl.Config, device: torch.device, options: set[str]):
        self.cfg, self.device, self.options = cfg, device, options
        bits = "".join(options & {"bf16", "fp16"})
        self.dtype = dict(bf16=torch.bfloat16, fp16=torch.float16).get(bits, torch.float32)
        self.scaler = torch.amp.GradScaler(device.type, enabled=bits == "fp16")
        nhwc = ("".join(options & {"nhwc", "nchw"}) or self.layout) == "nhwc"
        self.format = torch.channels_last if nhwc else torch.contiguous_format
        torch.manual_seed(0)
        self.model = sacl.SACL(cfg)
        for block in self.model.encoder.modules():
            if isinstance(block, sacl.Block):  # where it is zero, the branch would not be seen
                nn.init.uniform_(block.get_submodule(block.last_bn).weight, 0.1, 0.3)
        self.model.target_encoder.load_state_dict(self.model.encoder.state_dict())
        shape = 2 * cfg.batch_size, 3, cfg.image_size, cfg.image_size
        self.images = torch.randint(256, shape, dtype=torch.uint8).to(device)
        self.fixed_views = self.views()
        self.model.to(device, memory_format=self.format)
        self.optimizer = self.build()

    def views(self) -> tuple[Tensor, ...]:
        """As in sacl.train, with other images in the place of textures."""
        x, other = self.images.chunk(2)
        texture = None if self.cfg.texture == "none" else other
        return self.model.views(x, texture, torch.arange(len(x), device=self.device))

    def step(self, whole: bool = False) -> Tensor:
        views = self.views() if whole else self.fixed_views
        with sacl.autocast(self.device, self.dtype):
            loss = self.loss(*views)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.update_target()
        return loss.detach()

    def build(self, **how) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        sgd = dict(momentum=self.cfg.sgd_momentum, weight_decay=self.cfg.weight_decay)
        return torch.optim.SGD(trained, self.cfg.lr * self.cfg.batch_size / 128, **sgd | how)

    def update_target(self) -> None:
        self.model.update_target(self.cfg.m)


class Ours(Step):
    """The step of sacl.train."""

    def build(self) -> torch.optim.Optimizer:
        for block in self.model.modules():
            if "fused" in self.options and isinstance(block, sacl.Block):
                fuse(block)
        mode = "reduce-overhead" if "graphs" in self.options else None
        if self.options & {"compile", "graphs"}:
            self.model.compile(dynamic=False, mode=mode)
        return super().build(fused=True)

    def loss(self, *views: Tensor) -> Tensor:
        return self.model(*views)


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


class Bare(Step):
    """The readable reference."""

    def build(self) -> torch.optim.Optimizer:
        return super().build(foreach=False)

    def loss(self, x1: Tensor, x2: Tensor, xt: Tensor | None = None) -> Tensor:
        q1, q2 = self.queries(x1), self.queries(x2)
        k1, k2 = self.model.keys(x1), self.model.keys(x2)
        kt = None if xt is None else self.model.texture_keys(xt)
        return (self.contrast(q1, k2, kt) + self.contrast(q2, k1, kt)) / 2

    def queries(self, x: Tensor) -> list[Tensor]:
        side = x.shape[-1] // self.cfg.grid
        corners = itertools.product(range(0, x.shape[-1], side), repeat=2)
        cells = [x[:, :, row : row + side, column : column + side] for row, column in corners]
        h = self.model.encoder(torch.cat(cells)).chunk(len(cells))
        e = [sum(some) / len(some) for some in itertools.combinations(h, self.cfg.combine)]
        return self.model.predictor(self.model.projector(torch.cat(e))).chunk(len(e))

    def contrast(self, queries: list[Tensor], k: Tensor, kt: Tensor | None) -> Tensor:
        losses, label = [], torch.arange(len(k), device=k.device)
        with torch.autocast(k.device.type, enabled=False):
            for q in queries:
                q = F.normalize(q.float(), dim=1)
                logits = q @ F.normalize(k.float(), dim=1).T
                if kt is not None:
                    own = (q * F.normalize(kt.float(), dim=1)).sum(1, keepdim=True)
                    logits = torch.cat([logits, own], 1)
                losses.append(F.cross_entropy(logits / self.cfg.tau, label))
        return sum(losses) / len(losses)

    @torch.no_grad()
    def update_target(self) -> None:
        m = self.model
        for net, target in (m.encoder, m.target_encoder), (m.projector, m.target_projector):
            for p, t in zip(net.parameters(), target.parameters(), strict=True):
                t.mul_(self.cfg.m).add_(p, alpha=1 - self.cfg.m)

    @torch.no_grad()
    def positive(self) -> float:
        """The mean cosine of positive pairs, which BYOL's loss is made of."""
        q = [self.queries(x)[0] for x in self.fixed_views]
        k = [self.model.keys(x) for x in self.fixed_views]
        return sum(F.cosine_similarity(q[i], k[1 - i]).mean().item() for i in (0, 1)) / 2


class Lightly(Step):
    """lightly's examples/pytorch/byol.py; its heads are the same layers as ours."""

    layout = "nchw"

    def step(self, whole: bool = False) -> Tensor:
        from lightly.models.utils import update_momentum

        m = self.model  # the example has this first
        update_momentum(m.encoder, m.target_encoder, self.cfg.m)
        update_momentum(m.projector, m.target_projector, self.cfg.m)
        return super().step(whole)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        from lightly.loss import NegativeCosineSimilarity

        m, criterion = self.model, NegativeCosineSimilarity()
        p0, p1 = (m.predictor(m.projector(m.encoder(x).flatten(1))) for x in (x0, x1))
        z0, z1 = (m.target_projector(m.target_encoder(x).flatten(1)).detach() for x in (x0, x1))
        return 0.5 * (criterion(p0, z1) + criterion(p1, z0))

    def update_target(self) -> None:
        pass

    def expected(self, positive: float) -> float:
        return -positive


IMPLEMENTATIONS = dict(ours=Ours, bare=Bare, lightly=Lightly)


# ------------------------------------------------------------ checking and timing


def check(row: Step) -> str:
    """How far the row's losses are from what they must be; raises where that is too far."""
    reference = Bare(row.cfg, row.device, {"nchw"})
    allowed = (1e-5, 1e-3) if row.dtype == torch.float32 else (1e-2,)
    if hasattr(row, "expected"):  # a peer's loss has other gradients: the first only
        wanted, allowed = [row.expected(reference.positive())], allowed[:1]
    else:
        wanted = two_losses(reference)
    losses = two_losses(row)
    off = [abs(a - b) / max(abs(b), 1) for a, b in zip(losses, wanted, strict=False)]
    if not all(a <= b for a, b in zip(off, allowed, strict=False)):
        raise RuntimeError(f"losses {losses}, not {wanted}")
    return " ".join(f"{x:.0e}" for x in off)


def two_losses(row: Step) -> list[float]:
    """The losses of the first two steps, of float32 rows with exact convolutions."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = before and row.dtype != torch.float32
    losses = [row.step().item(), row.step().item()]
    torch.backends.cudnn.allow_tf32 = before
    return losses


def build(name: str, cfg: sacl.Config, device: torch.device) -> tuple[Step | None, dict]:
    """A row's step, checked and warmed up, and its facts; or None, and the reason."""
    implementation, *options = name.split("+")
    cuda = device.type == "cuda"
    try:
        before = torch.cuda.memory_allocated() if cuda else 0
        row = IMPLEMENTATIONS[implementation](cfg, device, set(options))
        facts = {"loss off by": check(row)}
        torch.cuda.reset_peak_memory_stats() if cuda else None
        for _ in range(3 if cuda else 1):  # CUDA graphs are recorded in the second and third
            row.step()
        if cuda:
            facts["peak GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        return row, facts
    except Exception as error:  # compilers, peers and memory each fail in their own ways
        text = str(error).strip().splitlines() or [""]
        return None, {"loss off by": f"not run: {type(error).__name__}: {text[0][:150]}"}


def measure(rows: dict[str, Step], args: argparse.Namespace) -> dict[str, list[dict]]:
    """Time the rows in turn, each for about --round-seconds a round: a list of times for each."""

    def clock(row: Step, repeats: int) -> dict[str, float]:
        cuda = row.device.type == "cuda"
        torch.cuda.synchronize() if cuda else None
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            row.step(args.whole)
        torch.cuda.synchronize() if cuda else None
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"ms": 1e3 * wall / repeats, "CPU ms": 1e3 * cpu / repeats}

    once = {name: clock(row, 2)["ms"] for name, row in rows.items()}
    repeats = {name: max(1, min(50, round(1e3 * args.round_seconds / once[name]))) for name in rows}
    times: dict[str, list[dict]] = {name: [] for name in rows}
    for i in range(args.rounds):
        order = list(rows)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            times[name].append(clock(rows[name], repeats[name]))
    return times


def medians(times: list[dict], base: list[dict], batch_size: int) -> dict[str, float]:
    """Of a row's times, and of their ratios to the first row's."""
    facts = {}
    for key, x in (("ms", "x"), ("CPU ms", "CPU x")):
        facts[key] = statistics.median(t[key] for t in times)
        facts[x] = statistics.median(a[key] / b[key] for a, b in zip(times, base, strict=True))
    return facts | {"images/s": 1e3 * batch_size / facts["ms"]}


# ------------------------------------------------------------ the command


def run(args: argparse.Namespace, settings: dict) -> None:
    """Build, check and time the rows; print the table and write it all to --json."""
    cfg, device = sacl.Config(**JOBS[args.job] | settings), sacl.choose_device()
    built = {}
    for name in (args.rows or ROWS[device.type]).split(","):
        built[name] = build(name, cfg, device)
        print(f"{name}: {built[name][1]}", file=sys.stderr, flush=True)
    rows = {name: row for name, (row, _) in built.items() if row}
    times = measure(rows, args) if rows else {}
    lines = []
    for name, (row, facts) in built.items():
        timed = medians(times[name], times[next(iter(rows))], cfg.batch_size) if row else {}
        lines.append({"row": name} | timed | facts)
    machine = sacl.describe_machine(device, torch.float32)
    del machine["precision"]  # each row has its own
    print(f"\n{args.job}, batch {cfg.batch_size}, {machine}\n\n{table(lines)}", flush=True)
    report = vars(args) | dict(settings=asdict(cfg), machine=machine, rows=lines, rounds=times)
    if args.json:
        sacl.write(Path(args.json), json.dumps(report, indent=1).encode())


def table(rows: list[dict]) -> str:
    """Markdown with a column for every key of the longest row."""
    cells = [list(max(rows, key=len))]
    for row in rows:
        values = (row.get(column, "") for column in cells[0])
        cells.append([f"{x:.4g}" if isinstance(x, float) else str(x) for x in values])
    return rows_of(cells)


def main(argv: list[str] | None = None) -> None:
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser("step.py", allow_abbrev=False, **about)
    parser.add_argument("--job", choices=JOBS, default="sacl")
    parser.add_argument("--rows", help="comma-separated [ROWS]")
    parser.add_argument("--whole", action="store_true", help="time the making of views too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round-seconds", type=float, default=0.5, help="of a row in a round")
    parser.add_argument("--json", help="file for everything")
    args, rest = parser.parse_known_args(argv)
    sacl.command("step.py", lambda: run(args, sacl.parse(sacl.Config, rest)))


if __name__ == "__main__":
    main()
