"""The systems of SACL's Table 3, each on sacl.py's encoder, heads, views, EMA and loop.

    sacl.train(Config(dataset="cifar100", texture="none", tau=0.5), SimCLR)
    sacl.train(cfg, functools.partial(PIRL, images=50_000))
    python -m related.baselines --dataset cifar100 --out jigsaw.png        PIRL's jigsaw, drawn

Each class is its loss and the few lines that differ from SACL, whose subclass it is; the settings
that each is run with stand in compare.py. tau, m, lr and the widths of the heads are Config's.

Sourced, [S: where it was read]
    SimCLR   NT-Xent with 2 N - 2 negatives, L2-normalised, no EMA [S: lightly cifar10_benchmark.py]
    MoCo v2  one query against one key and K queued keys, one way; keys encoded in shuffled order
             in 8 groups of BatchNorm, 4 points worse at 800 epochs without [S: MoCo's CIFAR-10
             notebook]
    BYOL     -cos of prediction and EMA projection, mean of both ways [S: lightly; with its lr];
             the paper's 2 - 2 cos, summed over both ways [S: solo-learn], has four times the
             gradient
    SimSiam  -cos of prediction and detached projection, both ways, no EMA [S: PatrickHua/SimSiam]
    PIRL     L = lam NCE(m_I, v_jigsaw) + (1 - lam) NCE(m_I, v_I), lam 0.5, tau 0.07, linear heads
             of 128: one for the image, one shared by the cells, one for them side by side; a bank
             with m <- unit(0.5 m + 0.5 v_I) [S: HobbitLong/PyContrast, akwasigroch's PIRL]
Our reading
    Everyone has SACL's weak views and SACL's heads (projector with BatchNorm at its end, predictor
    D, D / 4, D), as SimSiam's are; BYOL's own have no BatchNorm at the projector's end and widen in
    the predictor (256, 1024, 256 in lightly), which may matter to it. Only PIRL keeps its own, for
    a bank of 50,000 rows wants narrow ones. Two-way losses are the mean of both ways; BYOL's has 1
    added, so that 0 is its floor. MoCo v2's groups also hold for the BatchNorm of its heads, which
    its own lack; the running statistics keep 0.9 of themselves a step, as everybody's. PIRL:
    InfoNCE for NCE, a 2 x 2 jigsaw by sacl.split for the 3 x 3 of 64 px crops, 4096 rows of the
    bank drawn anew each step and shared by the batch, the image's own row left out.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import Tensor, nn

import sacl
from sacl import SACL, Config, UsageError, info_nce, unit

# ------------------------------------------------------------ what the systems share


class TwoNetworks(SACL):
    """SACL's networks, views, keys and EMA for whole views; a subclass adds its loss.

    images: the size of the training set, for schedules and for what is remembered of each image.
    """

    def __init__(self, cfg: Config, images: int = 0):
        name = type(self).__name__
        if cfg.texture != "none":
            raise UsageError(f"--texture {cfg.texture}: {name} takes no textures, only none")
        if sacl.distributed():  # queues and banks are kept by one process
            raise UsageError(f"--nproc-per-node 1: {name} and all of related/ run in one process")
        super().__init__(cfg)
        self.total = cfg.epochs * (images // cfg.batch_size)  # steps
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def project(self, x: Tensor) -> Tensor:
        """Online network without its predictor: views (N, 3, H, W) -> z (N, D)."""
        return self.projector(self.encoder(x))

    def predict(self, x: Tensor) -> Tensor:
        """The whole online network: views (N, 3, H, W) -> p (N, D)."""
        return self.predictor(self.project(x))

    def progress(self) -> Tensor:
        """The share of the run that is over, 0 to 1; 1 where the number of images is not given."""
        return (self.updates / self.total if self.total else self.updates * 0 + 1).clamp(max=1)

    def update_target(self, m: float) -> None:
        super().update_target(m)
        self.updates += 1


class OneNetwork(TwoNetworks):
    """The same without a target network."""

    def __init__(self, cfg: Config, images: int = 0):
        super().__init__(cfg, images)
        del self.target_encoder, self.target_projector

    def update_target(self, m: float) -> None:
        self.updates += 1


def nt_xent(a: Tensor, b: Tensor, tau: float) -> Tensor:
    """SimCLR's loss of paired rows a, b (N, D): 2 N anchors with 2 N - 2 negatives each."""
    return (info_nce(a[None], b, tau, k_same=a) + info_nce(b[None], a, tau, k_same=b)) / 2


def memory_nce(
    q: Tensor, k: Tensor, memory: Tensor, tau: float, hidden: Tensor | None = None
) -> Tensor:
    """InfoNCE of q (N, D) with positives k (N, D) and negatives memory (K, D) of unit length.

    hidden (N, K): True where a row of the memory is no negative of that query. In float32.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k = unit(q), unit(k)
        negative = q @ memory.T.to(q.dtype)  # (N, K)
        if hidden is not None:
            negative = negative.masked_fill(hidden, -torch.inf)
        logits = torch.cat([(q * k).sum(-1, keepdim=True), negative], 1) / tau  # (N, 1 + K)
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))


def cosine(p: Tensor, k: Tensor) -> Tensor:
    """The mean cosine of paired rows (N, D), in float32."""
    return (unit(p) * unit(k)).sum(-1).mean()


def empty_memory(rows: int, dim: int) -> Tensor:
    """A memory that nothing was put into: random vectors of unit length (rows, dim)."""
    return unit(torch.randn(rows, dim))


def push(queue: Tensor, k: Tensor) -> None:
    """Put keys k in front of a queue and drop the oldest, in place.

    After backward, whose graph still holds the queue; and at one address, for CUDA graphs.
    """
    queue.copy_(torch.cat([unit(k).to(queue.dtype), queue])[: len(queue)])


# ------------------------------------------------------------ the systems


class SimCLR(OneNetwork):
    """T. Chen et al., ICML 2020."""

    def __init__(self, cfg: Config, images: int = 0):
        super().__init__(cfg, images)
        del self.predictor

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        z1, z2 = self.project(x1), self.project(x2)
        self.monitor = sacl.similarities(z1[None], z2, None)
        return nt_xent(z1, z2, self.cfg.tau)


class MoCoV2(TwoNetworks):
    """X. Chen et al., arXiv 2003.04297; queue: K; bn_groups: the GPUs that one stands for."""

    def __init__(self, cfg: Config, images: int = 0, queue: int = 4096, bn_groups: int = 8):
        if cfg.batch_size % bn_groups or cfg.batch_size < 2 * bn_groups:
            raise UsageError(
                f"--batch-size {cfg.batch_size}: MoCo v2 deals it to {bn_groups} groups of "
                "BatchNorm, so it must be a multiple of that, with 2 images each"
            )
        super().__init__(cfg, images)
        del self.predictor
        self.bn_groups = bn_groups
        for norm in (m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            norm.momentum = 1 - (1 - norm.momentum) ** (1 / bn_groups)  # so many updates a step
        self.register_buffer("queue", empty_memory(queue, cfg.dim))

    @torch.no_grad()
    def keys(self, x: Tensor) -> Tensor:
        """Keys (N, D) whose BatchNorm statistics come of other images than their queries'."""
        order = torch.randperm(len(x), device=x.device)
        groups = x[order].chunk(self.bn_groups)
        k = torch.cat([self.target_projector(self.target_encoder(g)) for g in groups])  # (N, D)
        return k[order.argsort()]

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        q = torch.cat([self.project(g) for g in x1.chunk(self.bn_groups)])  # (N, D)
        k = self.keys(x2)
        self.monitor = sacl.similarities(q[None], k, None)
        self.fresh = k
        return memory_nce(q, k, self.queue, self.cfg.tau)

    def update_target(self, m: float) -> None:
        super().update_target(m)
        push(self.queue, self.fresh)


class BYOL(TwoNetworks):
    """J.-B. Grill et al., NeurIPS 2020."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        p1, p2 = self.predict(x1), self.predict(x2)
        k1, k2 = self.keys(x1), self.keys(x2)
        self.monitor = sacl.similarities(p1[None], k2, None)
        return 1 - (cosine(p1, k2) + cosine(p2, k1)) / 2


class SimSiam(OneNetwork):
    """X. Chen, K. He, CVPR 2021."""

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        z1, z2 = self.project(x1), self.project(x2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        self.monitor = sacl.similarities(p1[None], z2, None)
        return -(cosine(p1, z2.detach()) + cosine(p2, z1.detach())) / 2


class PIRL(OneNetwork):
    """I. Misra, L. van der Maaten, CVPR 2020; with one memory for each of `images`.

    dim: width of its heads; negatives: rows of the memory drawn each step; lam: the jigsaw's share
    of the loss; keep: the share of a memory that its image's next embedding leaves.
    """

    def __init__(
        self,
        cfg: Config,
        images: int,
        dim: int = 128,
        negatives: int = 4096,
        lam: float = 0.5,
        keep: float = 0.5,
    ):
        super().__init__(cfg, images)
        del self.projector, self.predictor
        self.negatives, self.lam, self.keep = negatives, lam, keep
        self.image_head = nn.Linear(self.encoder.dim, dim)
        self.cell_head = nn.Linear(self.encoder.dim, dim)
        self.jigsaw_head = nn.Linear(cfg.grid**2 * dim, dim)
        self.register_buffer("bank", empty_memory(images, dim))

    def views(self, x: Tensor, texture: None, index: Tensor) -> tuple[Tensor, ...]:
        """A view (N, 3, H, W), another one's cells in disorder (G, N, 3, h, w), their places."""
        x1, x2 = super().views(x, texture, index)
        return x1, shuffle(sacl.split(x2, self.cfg.grid)), index

    def forward(self, x1: Tensor, cells: Tensor, index: Tensor) -> Tensor:
        v = self.image_head(self.encoder(x1))  # (N, D)
        h = self.cell_head(self.encoder(cells.flatten(0, 1)))  # (G N, D)
        h = h.unflatten(0, cells.shape[:2]).transpose(0, 1)  # (N, G, D)
        jigsaw = self.jigsaw_head(h.flatten(1))  # (N, D)
        self.monitor = sacl.similarities(jigsaw[None], v, None)
        drawn = torch.randint(len(self.bank), (self.negatives,), device=index.device)
        memory, negatives = self.bank[index], self.bank[drawn]  # copies: the bank changes below
        own = drawn == index[:, None]  # (N, K)
        by_jigsaw, by_image = (
            memory_nce(e, memory, negatives, self.cfg.tau, own) for e in (jigsaw, v)
        )
        self.remember(index, memory, v.detach())
        return self.lam * by_jigsaw + (1 - self.lam) * by_image

    def remember(self, index: Tensor, memory: Tensor, v: Tensor) -> None:
        """Move the memories of these images towards their new embeddings v (N, D)."""
        self.bank[index] = unit(self.keep * memory + (1 - self.keep) * unit(v))


def shuffle(cells: Tensor) -> Tensor:
    """Cells (G, N, 3, h, w), each image's in an order of its own."""
    order = torch.rand(cells.shape[:2], device=cells.device).argsort(0)  # (G, N)
    return cells.take_along_dim(order[:, :, None, None, None], 0)


# ------------------------------------------------------------ a picture of the jigsaw


@dataclass(frozen=True, kw_only=True)
class SheetConfig:
    """What is drawn, and where to."""

    dataset: str = "cifar100"  # as in sacl.py
    data_dir: str = "data"  # as in sacl.py
    image_size: int = 32  # side of an image in pixels
    images: int = 16  # how many, at random from the seed out of the training images
    seed: int = 0
    out: str = "sheet.png"  # the picture's file


def pick(cfg: SheetConfig) -> Tensor:
    """The uint8 images (n, 3, S, S) that a sheet shows."""
    if cfg.images < 1:
        raise UsageError(f"--images {cfg.images}: must be at least 1")
    settings = Config(dataset=cfg.dataset, data_dir=cfg.data_dir, image_size=cfg.image_size)
    data = sacl.load_data(settings, "train")
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(cfg.seed))
    return sacl.subset(data, rows[: cfg.images]).pixels[:]


def sheet(rows: dict[str, Tensor], out: str, columns: int = 8, side: int = 96) -> None:
    """Draw rows of pictures (n, 3, H, W) in [0, 1] with their names, `columns` at a time."""
    margin, gap = 84, 14
    block, count = len(rows) * (side + gap) + 2 * gap, len(next(iter(rows.values())))
    size = (margin + min(count, columns) * (side + gap), -(-count // columns) * block)
    picture = Image.new("RGB", size, "lightgrey")
    for r, (name, pictures) in enumerate(rows.items()):
        for i, x in enumerate(pictures):
            left = margin + i % columns * (side + gap)
            top = gap + i // columns * block + r * (side + gap)
            tile = torchvision.transforms.functional.to_pil_image(x.clamp(0, 1))
            picture.paste(tile.resize((side, side), Image.Resampling.NEAREST), (left, top))
            if i % columns == 0:
                ImageDraw.Draw(picture).text((8, top + side // 2 - 8), name, "black")
    try:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        picture.save(out)
    except (OSError, ValueError) as error:  # ValueError: no format has this ending
        raise UsageError(f"--out {out} cannot be written: {error}") from None


def with_lines(cells: Tensor, grid: int, width: int = 1) -> Tensor:
    """Cells (G, N, 3, h, w) put together as they lie, a white line around each: (N, 3, H, W)."""
    cells = F.pad(cells, [width] * 4, value=1.0).unflatten(0, (grid, grid))  # (g, g, N, 3, h, w)
    return cells.permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)  # (N, 3, H, W)


def draw_jigsaw(cfg: SheetConfig) -> None:
    """Images, the view that is cut, its cells and the cells as PIRL sees them."""
    x = pick(cfg)
    torch.manual_seed(cfg.seed)
    settings = Config(dataset=cfg.dataset, image_size=cfg.image_size, texture="none")
    draw = sacl.draw_view(len(x), settings, x.device)
    std, mean = (torch.tensor(v)[:, None, None] for v in (sacl.STD, sacl.MEAN))
    view = sacl.augment(x, draw, cfg.image_size) * std + mean
    cells = sacl.split(view, settings.grid)
    rows = {"image": x.float() / 255, "view": view}
    rows |= {"cells": with_lines(cells, settings.grid)}
    rows |= {"shuffled": with_lines(shuffle(cells), settings.grid)}
    sheet(rows, cfg.out)


def main(argv: list[str] | None = None) -> None:
    try:
        draw_jigsaw(sacl.parse_config(argv, SheetConfig))
    except UsageError as error:
        print(f"baselines.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
