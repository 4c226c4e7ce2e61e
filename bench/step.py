"""Time of a training step: ours, a plain one, and the peers', side by side on one machine.

    python bench/step.py --dry                                  all paths, tiny: seconds
    python bench/step.py --job moco3 --batch 16 --json out.json     the peers' own job
    python bench/step.py --job sacl --rows ours+bf16+graphs,bare    (GPU) chosen rows
    python bench/step.py --bytes                   memory traffic with and without the fused block

job   sacl: the paper's step (Section 3.2); demo: that of `python sacl.py`; moco3: two whole views,
      no texture, no gates (--grid 1 --combine 1 --texture none --se none), what peers train
row   <implementation>[+nchw|nhwc][+bf16|fp16][+compile|graphs]..., the first is the base of ratios
      ours      as in sacl.train: channels_last, fused SGD and EMA; +plain: compiled, but without
                Block.fused_standard
      bare      `Bare` below: the same step as one would first write it; channels_last
      lightly   lightly's heads, EMA and loss (BYOL's) in its BYOL example's step; NCHW, as there
      solo      solo-learn's BYOL, its hooks called in Lightning's order, logging off; NCHW; pads in
                the stem by 2, which makes 34 x 34 of 32 x 32 pixels; +pad1: does not
      All get SACL's encoder and heads with the same weights (last BN scales of blocks not zero,
      else whole branches would be), the same views, and SGD with the same settings. fp32 is torch's
      default: on CUDA convolutions round to TF32.
mode  model: from views to updated weights; whole: from uint8 images on the device, views included
gate  the loss of the first step must be bare's in fp32 (to 1e-5; 16 bits 1e-2; a peer's, the one
      that BYOL's loss has with bare's embeddings), and in fp32 that of the second (1e-3), which
      depends on gradients, SGD and EMA. A row that fails, or cannot run, is one line, not a time.
time  rounds over all rows in turn, after warm-up; medians. "x" is the median over rounds of the
      ratio to the first row within the round; on a busy CPU trust that of process time ("CPU x").
      Peers are imported if they are on PYTHONPATH; nothing of theirs is needed.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import logging
import math
import statistics
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sacl

JOBS = {
    "sacl": dict(dataset="cifar100"),
    "moco3": dict(dataset="cifar100", grid=1, combine=1, texture="none", se="none"),
    "demo": {},
}
ROWS = {
    ("cpu", "sacl"): "ours bare bare+nchw ours+bf16",
    ("cpu", "demo"): "ours+nchw ours ours+bf16 bare+nchw",
    ("cpu", "moco3"): "ours bare bare+nchw lightly lightly+nhwc solo solo+nhwc solo+pad1+nhwc",
    # compiling takes minutes, and --seconds may cut what comes late
    ("cuda", "sacl"): "ours+bf16 ours+bf16+compile bare+bf16 ours+nchw+bf16 ours ours+nchw "
    "bare+nchw ours+fp16 ours+bf16+compile+plain ours+bf16+graphs",
    ("cuda", "moco3"): "ours+bf16 ours+bf16+compile bare+bf16 lightly lightly+nhwc+bf16 solo "
    "solo+bf16 solo+nhwc+bf16 solo+pad1+nhwc+bf16 ours+bf16+graphs",
}
# GB that a step of the paper's SE-ResNet-50 moves in 16 bits and channels_last, from a count of the
# passes over each activation: batch -> eager, compiled without and with Block.fused_standard
MODELLED = {128: (76.8, 53.8, 46.8), 512: (302.6, 210, 182.8), 1024: (603.6, 419, 364)}


# ------------------------------------------------------------ The implementations


class Step:
    """A training step of a model whose state, settings and views all rows share."""

    def __init__(self, shared, options: set[str], default_layout: str):
        self.cfg, self.device, self.fixed_views = shared.cfg, shared.device, shared.views
        self.images, self.whole = shared.images, False
        bits = options & {"bf16", "fp16"}
        self.dtype = dict(bf16=torch.bfloat16, fp16=torch.float16).get("".join(bits), torch.float32)
        layout = "".join(options & {"nhwc", "nchw"}) or default_layout
        self.format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        self.lr = self.cfg.lr * self.cfg.batch_size / 128
        self.sgd = dict(momentum=self.cfg.sgd_momentum, weight_decay=self.cfg.weight_decay)
        self.model = sacl.SACL(self.cfg)
        self.model.load_state_dict(shared.state)
        self.model.to(self.device, memory_format=self.format)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled="fp16" in options)

    def views(self) -> tuple[Tensor, ...]:
        """The fixed views, or those that sacl.train would make of a random batch."""
        if not self.whole:
            return self.fixed_views
        torch.manual_seed(0)
        index = torch.randint(len(self.images), (self.cfg.batch_size,), device=self.device)
        texture = None if self.cfg.texture == "none" else self.images[-1 - index]
        return self.model.views(self.images[index], texture, index)

    def backward(self) -> Tensor:
        views = self.views()
        with sacl.autocast(self.device, self.dtype):
            loss = self.loss(*views)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        return loss.detach()

    def step(self) -> Tensor:
        loss = self.backward()
        self.update()
        return loss

    def compile(self) -> None:
        """Only ours does."""

    def update(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.update_target()


class Ours(Step):
    """The step of sacl.train."""

    def __init__(self, shared, options: set[str]):
        super().__init__(shared, options, "nhwc")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, self.lr, **self.sgd, fused=True)
        self.options = options

    def compile(self) -> None:
        graphs = "graphs" in self.options
        if "plain" in self.options:
            self.model.compile(dynamic=False, mode="reduce-overhead" if graphs else None)
        elif self.options & {"compile", "graphs"}:
            cfg = dataclasses.replace(self.cfg, compile="graphs" if graphs else "on")
            sacl.compile_model(self.model, cfg, self.device, self.dtype, steps=10**6)
            if self.model._compiled_call_impl is None:
                raise RuntimeError("torch.compile failed")

    def loss(self, *views: Tensor) -> Tensor:
        return self.model(*views)

    def update_target(self) -> None:
        self.model.update_target(self.cfg.m)


class Bare(Step):
    """The readable reference: slices, lists and loops."""

    def __init__(self, shared, options: set[str]):
        super().__init__(shared, options, "nhwc")
        m = self.model
        self.online, self.target = (m.encoder, m.projector), (m.target_encoder, m.target_projector)
        trained = [p for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, self.lr, **self.sgd, foreach=False)

    def loss(self, x1: Tensor, x2: Tensor, xt: Tensor | None = None) -> Tensor:
        q1, q2 = self.queries(x1), self.queries(x2)
        k1, k2 = self.keys(x1), self.keys(x2)
        with sacl.batch_statistics_only(*self.target):
            kt = None if xt is None else self.keys(xt)
        return (self.contrast(q1, k2, kt) + self.contrast(q2, k1, kt)) / 2

    def queries(self, x: Tensor) -> list[Tensor]:
        side = x.shape[-1] // self.cfg.grid
        corners = itertools.product(range(0, x.shape[-1], side), repeat=2)
        cells = [x[:, :, row : row + side, column : column + side] for row, column in corners]
        h = self.model.encoder(torch.cat(cells)).chunk(len(cells))
        e = [sum(some) / len(some) for some in itertools.combinations(h, self.cfg.combine)]
        return self.model.predictor(self.model.projector(torch.cat(e))).chunk(len(e))

    @torch.no_grad()
    def keys(self, x: Tensor) -> Tensor:
        return self.model.target_projector(self.model.target_encoder(x))

    def contrast(self, queries: list[Tensor], k: Tensor, kt: Tensor | None) -> Tensor:
        losses, label = [], torch.arange(len(k), device=k.device)
        with torch.autocast(k.device.type, enabled=False):
            k = F.normalize(k.float(), dim=1)
            for q in queries:
                q = F.normalize(q.float(), dim=1)
                logits = q @ k.T
                if kt is not None:
                    own = (q * F.normalize(kt.float(), dim=1)).sum(1, keepdim=True)
                    logits = torch.cat([logits, own], 1)
                losses.append(F.cross_entropy(logits / self.cfg.tau, label))
        return sum(losses) / len(losses)

    @torch.no_grad()
    def update_target(self) -> None:
        for net, target in zip(self.online, self.target, strict=True):
            for p, t in zip(net.parameters(), target.parameters(), strict=True):
                t.mul_(self.cfg.m).add_(p, alpha=1 - self.cfg.m)


class Lightly(Step):
    """lightly's examples/pytorch/byol.py with the heads of MoCo v3, which are SACL's."""

    def __init__(self, shared, options: set[str]):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad, update_momentum

        super().__init__(shared, options, "nchw")
        c, m = self.cfg, self.model
        projector = MoCoProjectionHead(m.encoder.dim, c.dim, c.dim, c.proj_layers, batch_norm=True)
        predictor = BYOLPredictionHead(c.dim, c.dim // 4, c.dim)
        for theirs, ours in ((projector, m.projector), (predictor, m.predictor)):
            theirs.load_state_dict({f"layers.{k}": v for k, v in ours.state_dict().items()})
        self.net = nn.ModuleList([m.encoder, projector, predictor]).to(self.device)
        self.momentum_net = copy.deepcopy(self.net[:2])
        deactivate_requires_grad(self.momentum_net)
        self.criterion, self.update_momentum = NegativeCosineSimilarity(), update_momentum
        self.optimizer = torch.optim.SGD(self.net.parameters(), self.lr, **self.sgd)

    def step(self) -> Tensor:
        for online, momentum in zip(self.net, self.momentum_net, strict=False):
            self.update_momentum(online, momentum, self.cfg.m)  # the example has it first
        return super().step()

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        p0, z0 = self.embed(x0)
        p1, z1 = self.embed(x1)
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        (f, g, q), (f_m, g_m) = self.net, self.momentum_net
        return q(g(f(x).flatten(1))), g_m(f_m(x).flatten(1)).detach()

    def update_target(self) -> None:
        pass  # at the beginning of the step

    def expected(self, positive: float) -> float:
        return -positive


class Solo(Step):
    """solo-learn's BYOL module (of 1.0.2); `Step.step` stands for Lightning's loop around it."""

    def __init__(self, shared, options: set[str]):
        with contextlib.suppress(ImportError):
            import setuptools  # noqa: F401  brings distutils, which solo-learn 1.0.2 imports
        from solo.methods.byol import BYOL

        super().__init__(shared, options, "nchw")
        c, m = self.cfg, self.model
        byol = BYOL(
            proj_output_dim=c.dim, proj_hidden_dim=c.dim, pred_hidden_dim=c.dim // 4,
            base_tau_momentum=c.m, final_tau_momentum=1.0, momentum_classifier=False,
            encoder=c.arch, num_classes=100, backbone_args=dict(cifar=True), max_epochs=200,
            batch_size=c.batch_size, optimizer="sgd", lars=False, lr=self.lr,
            weight_decay=c.weight_decay, classifier_lr=0.1, exclude_bias_n_norm=False,
            accumulate_grad_batches=1, extra_optimizer_args=dict(momentum=c.sgd_momentum),
            scheduler="none", min_lr=0.0, warmup_start_lr=0.0, warmup_epochs=0,
            num_large_crops=2, num_small_crops=0,
        )  # fmt: skip
        self.pad2 = "pad1" not in options
        for encoder in (m.encoder, m.target_encoder):
            encoder.conv1.padding = (2, 2) if self.pad2 else (1, 1)
        byol.encoder, byol.projector, byol.predictor = m.encoder, m.projector, m.predictor
        byol.momentum_encoder, byol.momentum_projector = m.target_encoder, m.target_projector
        byol.classifier = nn.Linear(m.encoder.dim, 100)  # its online probe
        nn.init.zeros_(byol.classifier.weight), nn.init.zeros_(byol.classifier.bias)
        byol.to(self.device, memory_format=self.format)
        byol.log = byol.log_dict = lambda *args, **kwargs: None
        # stands for the trainer, of which the hooks ask where training is
        self.progress = type("Progress", (), dict(global_step=0, accumulate_grad_batches=1))()
        self.progress.train_dataloader, self.progress.max_epochs = range(390), 200
        byol.trainer = self.progress
        byol.on_train_start()
        self.byol, self.optimizer = byol, byol.configure_optimizers()
        self.labels = torch.randint(100, (c.batch_size,), device=self.device)

    def loss(self, x0: Tensor, x1: Tensor) -> Tensor:
        self.batch = [None, [x0, x1], self.labels]
        return self.byol.training_step(self.batch, 0)

    def update_target(self) -> None:
        self.progress.global_step += 1
        self.byol.on_train_batch_end({}, self.batch, 0, 0)

    def expected(self, positive: float) -> float | None:
        """log(100) is the untrained probe's; with other padding embeddings are others: None."""
        return None if self.pad2 else 4 - 4 * positive + math.log(100)


IMPLEMENTATIONS = dict(ours=Ours, bare=Bare, lightly=Lightly, solo=Solo)


# ------------------------------------------------------------ Correctness


def share(cfg: sacl.Config, device: torch.device) -> types.SimpleNamespace:
    """What all rows have in common: weights, images, views, and bare's losses in fp32."""
    torch.manual_seed(0)
    model = sacl.SACL(cfg)
    for block in model.encoder.modules():
        if isinstance(block, sacl.Block):
            nn.init.uniform_(block.last_bn.weight, 0.1, 0.3)
    model.target_encoder.load_state_dict(model.encoder.state_dict())
    images = torch.randint(256, (8 * cfg.batch_size, 3, cfg.image_size, cfg.image_size))
    images = images.byte().to(device)
    shared = types.SimpleNamespace(cfg=cfg, device=device, state=model.state_dict(), images=images)
    texture = None if cfg.texture == "none" else images[-cfg.batch_size :]
    shared.views = model.views(images[: cfg.batch_size], texture, None)
    reference = Bare(shared, {"nchw"})
    with torch.no_grad():  # what BYOL's loss is made of: the mean cosine of positive pairs
        q, k = ([f(x) for x in shared.views[:2]] for f in (reference.queries, reference.keys))
        pairs = [F.cosine_similarity(q[i][0], k[1 - i]).mean() for i in range(2)]
    shared.positive = sum(pairs).item() / 2
    shared.losses = two_losses(reference)
    return shared


def two_losses(row: Step) -> list[float]:
    """The losses of the first two steps; those of float32 rows with exact convolutions."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    if row.dtype == torch.float32:
        cudnn.allow_tf32 = cudnn.benchmark = False  # tuned is what is timed, later
    losses = [row.step().item(), row.step().item()]
    cudnn.allow_tf32, cudnn.benchmark = before
    return losses


def gate(row: Step, shared) -> str:
    """How far the row's losses are from what they must be; raises where that is too far."""
    losses, wanted, allowed = two_losses(row), shared.losses, (1e-5, 1e-3)
    if hasattr(row, "expected"):  # a peer's loss has other gradients: the first only
        wanted = [row.expected(shared.positive)]
        if wanted[0] is None:
            return "not compared: its stem's padding"
    if row.dtype != torch.float32:
        wanted, allowed = wanted[:1], (1e-2,)
    off = [abs(a - b) / max(abs(b), 1) for a, b in zip(losses, wanted, strict=False)]
    if not all(a <= b for a, b in zip(off, allowed, strict=False)):
        raise RuntimeError(f"losses {losses[: len(wanted)]}, not {wanted}")
    return " ".join(f"{x:.0e}" for x in off)


# ------------------------------------------------------------ Measuring


class Row:
    """A row of the table: a step that runs, or the reason why it does not."""

    def __init__(self, name: str, shared, mode: str, unfit: str = ""):
        self.name, self.step, self.facts, self.rounds = name, None, {}, []
        implementation, *options = name.split("+")
        cuda = shared.device.type == "cuda"
        if implementation in ("lightly", "solo") and (shared.cfg.grid, mode) != (1, "model"):
            unfit = "takes part in --job moco3 --mode model"
        if unfit:
            self.facts["note"] = f"not run: {unfit}"
            return
        try:
            before = torch.cuda.memory_allocated() if cuda else 0
            step = IMPLEMENTATIONS[implementation](shared, set(options))
            with FlopCounterMode(display=False) as counter:  # compiled code would escape it
                step.backward()
            self.facts["TFLOP"] = counter.get_total_flops() / 1e12
            began = time.perf_counter()
            step.compile()
            self.facts["loss off by"] = gate(step, shared)
            if {"compile", "graphs"} & set(options):
                self.facts["cold s"] = time.perf_counter() - began
            step.whole = mode == "whole"
            torch.cuda.reset_peak_memory_stats() if cuda else None
            for _ in range(3 if cuda else 1):  # CUDA graphs are recorded in the second and third
                step.step()
            if cuda:
                self.facts["peak GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9
            self.step = step
        except Exception as error:  # compilers, peers and memory each fail in their own ways
            text = str(error).strip().splitlines() or [""]
            self.facts["note"] = f"not run: {type(error).__name__}: {text[0][:150]}"

    def report(self, base: "Row", cfg: sacl.Config) -> dict:
        """The figures of a line of the table."""
        if not self.rounds:
            return {"row": self.name} | self.facts
        facts = {"row": self.name}
        for key, x in (("ms", "x"), ("CPU ms", "CPU x"))[: len(self.rounds[0])]:
            times = [r[key] for r in self.rounds]
            ratios = [a / r[key] for a, r in zip(times, base.rounds, strict=True)]
            facts |= {key: statistics.median(times), x: statistics.median(ratios)}
            if key == "ms":
                low, _, high = statistics.quantiles(times * 2 if len(times) == 1 else times, n=4)
                facts |= {"min": min(times), "IQR": high - low}
        facts |= {"images/s": 1e3 * cfg.batch_size / facts["ms"]} | self.facts
        facts["TFLOP/s"] = 1e3 * facts["TFLOP"] / facts["ms"]
        if gb := self.modelled_gb(cfg):
            facts["modelled GB/s"] = 1e3 * gb / facts["ms"]
        return facts

    def modelled_gb(self, cfg: sacl.Config) -> float | None:
        """GB of a step, where MODELLED states it for this row."""
        options = set(self.name.split("+")[1:])
        paper = cfg == sacl.Config(dataset="cifar100", batch_size=cfg.batch_size)
        sixteen = options & {"bf16", "fp16"} and "nchw" not in options
        if not (paper and sixteen and self.name.startswith("ours") and cfg.batch_size in MODELLED):
            return None
        kind = 1 if "plain" in options else 2 if options & {"compile", "graphs"} else 0
        return MODELLED[cfg.batch_size][kind]


def clock(job, repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of one of `repeats` calls; on a CPU those of the process too."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            job()
        end.record()
        end.synchronize()
        return {"ms": start.elapsed_time(end) / repeats}
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        job()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"ms": 1e3 * wall / repeats, "CPU ms": 1e3 * cpu / repeats}


def measure(rows: list[Row], rounds: int, seconds: float, device: torch.device) -> None:
    """Time the rows in turn, each for about `seconds` a round; then parts of ours and bare."""
    repeats = {}
    for row in rows:
        once = clock(row.step.step, 2, device)["ms"]
        repeats[row] = max(1, min(50, round(1e3 * seconds / once)))
    for i in range(rounds):
        for row in rows[i % len(rows) :] + rows[: i % len(rows)]:
            row.rounds.append(clock(row.step.step, repeats[row], device))
    key = "CPU ms" if device.type == "cpu" else "ms"
    for row in (row for row in rows if isinstance(row.step, Ours | Bare)):
        whole = statistics.median(r[key] for r in row.rounds)
        for part in (row.step.update, row.step.views)[: 1 + row.step.whole]:
            took = statistics.median(clock(part, 3, device)[key] for _ in range(5))
            row.facts[f"{part.__name__} %"] = 100 * took / whole


def profile(row: Row, device: torch.device, path: str) -> None:
    """The 25 operations that take longest in one step, and how busy the GPU was, into a file."""
    kinds = list(torch.profiler.supported_activities())
    with torch.profiler.profile(activities=kinds) as trace:
        wall = clock(row.step.step, 1, device)["ms"]
    events = trace.key_averages()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # operators are listed with their kernels' time, and the kernels again by themselves
    kernels = (e for e in events if e.device_type != torch.autograd.DeviceType.CPU)
    busy = sum(e.self_device_time_total for e in kernels if not e.is_user_annotation) / 1e3
    note = f"{row.name}: {wall:.1f} ms with the profiler on, GPU busy for {busy:.1f} ms\n"
    Path(path).write_text(note + events.table(sort_by=order, row_limit=25))


def count_bytes() -> list[dict]:
    """Memory traffic of a compiled unit as Inductor counts it, without and with `fused_standard`.

    A unit of the SE-ResNet-50's first stage in the middle of the network, in bf16, channels_last;
    in multiples of its output: 32 images of 256 x 16 x 16.
    """
    from torch._inductor import compile_fx, config, metrics

    config.fx_graph_cache = False  # what is in the cache is not counted
    compile_fx.inductor_metrics_log.setLevel(logging.INFO)  # Inductor counts where this is logged
    compile_fx.inductor_metrics_log.propagate = False
    rows = []
    for fused in (False, True):
        torch._dynamo.reset()
        metrics.reset()
        block = sacl.Bottleneck(256, 64, 1, "standard", 16).to(memory_format=torch.channels_last)
        block.fused = fused
        x = torch.randn(32, 256, 16, 16).to(memory_format=torch.channels_last)
        x = x.bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = torch.compile(block, dynamic=False)(x)
        forward = metrics.num_bytes_accessed / (2 * x.numel())
        out.backward(torch.ones_like(out))
        total = metrics.num_bytes_accessed / (2 * x.numel())
        rows.append(dict(fused=fused, forward=forward, backward=total - forward, total=total))
    return rows


# ------------------------------------------------------------ The command


def table(rows: list[dict]) -> str:
    """Markdown with a column for every key of a row."""

    def cell(value) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    columns = sorted({k: 0 for row in rows for k in row}, key=["loss off by", "note"].count)
    lines = [columns, ["---"] * len(columns)]
    lines += [[cell(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run(args: argparse.Namespace, device: torch.device) -> dict:
    """Build, check and time the rows; prints the table and returns the report."""
    given = dict(arch=args.arch, width=args.width, image_size=args.size, dim=args.dim)
    given = {k: v for k, v in (given | dict(batch_size=args.batch)).items() if v}
    cfg = sacl.Config(**JOBS[args.job] | given)
    machine = sacl.describe_machine(device, torch.float32)
    del machine["precision"]  # each row has its own
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    machine |= {k: installed[k] for k in ("lightly", "solo-learn") if k in installed}
    began, shared, rows = time.perf_counter(), share(cfg, device), []
    usual = ROWS.get((device.type, args.job), "ours bare").split()
    for name in args.rows.split(",") if args.rows else usual:
        share_of_time = 0.35 if {"compile", "graphs"} & set(name.split("+")) else 0.6
        late = args.seconds and time.perf_counter() - began > share_of_time * args.seconds
        rows.append(Row(name, shared, args.mode, "no time left" if late else ""))
        if rows[-1].step:  # a first figure, should this process be stopped
            measure([rows[-1]], 1, args.round_seconds / 5, device)
            save(args, report(args, cfg, machine, rows))
        print(f"{name}: {rows[-1].facts}", file=sys.stderr, flush=True)
    running = [row for row in rows if row.step]
    for row in running:
        row.rounds.clear()
    if running:
        measure(running, args.rounds, args.round_seconds, device)
    result = report(args, cfg, machine, rows)
    what = f"{args.job}, {cfg.arch}, {cfg.image_size} px, batch {cfg.batch_size}, {args.mode}"
    print(f"\n{what}, {', '.join(str(v) for v in machine.values())}\n", flush=True)
    shown = [{k: v for k, v in row.items() if k != "rounds"} for row in result["rows"]]
    print(table(shown), flush=True)
    if args.profile and running:
        compiled = (row for row in running if row.name.endswith("+compile"))
        profile(next(compiled, running[0]), device, args.profile)
    return result


def report(args: argparse.Namespace, cfg: sacl.Config, machine: dict, rows: list[Row]) -> dict:
    """All that is known of the rows so far; ratios are to the first that runs."""
    base = next((row for row in rows if row.step), None)
    return dict(
        command="python bench/step.py " + " ".join(sys.argv[1:]),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        machine=machine,
        job=args.job,
        mode=args.mode,
        settings=dataclasses.asdict(cfg),
        rows=[row.report(base, cfg) | {"rounds": row.rounds} for row in rows],
    )


def save(args: argparse.Namespace, content: dict | list) -> None:
    if args.json:
        sacl.write(Path(args.json), (json.dumps(content, indent=1) + "\n").encode())


def main(argv: list[str] | None = None) -> None:
    about = dict(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = argparse.ArgumentParser(**about)
    parser.add_argument("--job", choices=JOBS, default="sacl")
    parser.add_argument("--rows", help="comma-separated; by default ROWS")
    parser.add_argument("--mode", choices=("model", "whole"), default="model")
    parser.add_argument("--arch", choices=("resnet18", "resnet50"))
    for setting in ("batch", "width", "size", "dim"):
        parser.add_argument(f"--{setting}", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--round-seconds", type=float, default=0.5, help="of a row in a round")
    more = "build no more rows after 60 %% of it, none to be compiled after 35 %%"
    parser.add_argument("--seconds", type=float, help=more)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--profile", help="file for a profile of the first row")
    parser.add_argument("--json", help="file for everything")
    parser.add_argument("--bytes", action="store_true", help="count Inductor's bytes instead")
    parser.add_argument("--dry", action="store_true", help="two jobs, tiny")
    args = parser.parse_args(argv)
    device, _, _ = sacl.setup()
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    if args.bytes:
        result = dict(command="python bench/step.py --bytes", rows=count_bytes())
        result["machine"] = sacl.describe_machine(device, torch.bfloat16)
        print(table(result["rows"]))
    elif args.dry:
        tiny = (
            "--arch resnet18 --width 8 --dim 32 --batch 8 --size 16 --rounds 2 --round-seconds 0.02"
        )
        result = []
        for job in ("--job sacl --mode whole", "--job moco3"):
            result.append(run(parser.parse_args([*tiny.split(), *job.split()]), device))
    else:
        result = run(args, device)
    save(args, result)


if __name__ == "__main__":
    main()
