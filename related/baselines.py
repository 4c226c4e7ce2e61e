"""The five systems of SACL's Table 3, each on sacl.py's encoder, heads, views, EMA and loop.

    sacl.train(Config(dataset="cifar100", texture="none", tau=0.5), SimCLR)
    sacl.train(cfg, functools.partial(PIRL, images=50_000))

Each class is a subclass of SACL: its loss, and the few lines in which it differs. bench/compare.py
runs them and has their settings; tau, m, lr and the widths of the heads are Config's.

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
             of 128: one for the image, one for each cell, one for the cells' outputs side by side;
             a bank with m <- unit(0.5 m + 0.5 v_I), softmax over 1 + K instead of NCE [S:
             HobbitLong/PyContrast, akwasigroch's PIRL]
Our reading
    All have SACL's weak views. All but PIRL have SACL's projector, with BatchNorm at its end; BYOL
    and SimSiam have its predictor too (D, D / 4, D). These heads are SimSiam's for ImageNet; for
    CIFAR its projector has two layers. BYOL's own projector ends without BatchNorm, and its
    predictor widens (256, 1024, 256 in lightly); that may matter to it. PIRL keeps its own narrow
    heads, since its bank has a row for every image. Two-way losses are the mean of both ways; 1 is
    added to BYOL's, so that 0 is its minimum. MoCo v2's groups apply to its heads too, where the
    original has no BatchNorm; the running statistics keep 0.9 of themselves a step, as in the other
    systems. MoCo v2 trains on one view of an image a step, the two-way systems on two. PIRL: a 2 x
    2 jigsaw by sacl.split instead of 3 x 3 from crops of 64 px; each step draws 4096 rows of the
    bank anew, which the batch shares, and an image's own row is none of its negatives. An image's
    row is empty until it comes for the first time, when its v_I is its own positive: a bank that
    starts at random, as PyContrast's does, would make the first of few epochs one of noise. The
    first step has no negatives, and its loss is 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sacl
from sacl import SACL, Config, UsageError, info_nce, unit

# ------------------------------------------------------------ what the systems share


class TwoNetworks(SACL):
    """SACL's networks, views, keys and EMA for whole views; a subclass adds its loss.

    images: how many the training set has, for schedules over the run. Raises UsageError where the
    settings ask for textures, and where torchrun has started several processes.
    """

    def __init__(self, cfg: Config, images: int = 0):
        name = type(self).__name__
        if cfg.texture != "none":
            raise UsageError(f"--texture {cfg.texture}: {name} uses no textures; give none")
        if sacl.world_size() > 1:  # each would keep a queue or bank of its own
            raise UsageError(f"--nproc_per_node: {name} runs in one process; give 1")
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
        """The share of the run that is over, 0 to 1."""
        return (self.updates / max(self.total, 1)).clamp(max=1)

    def update_target(self, m: float) -> None:
        super().update_target(m)
        self.updates += 1


class QueuedKeys(TwoNetworks):
    """The same with a queue of past keys (K, D); forward leaves the step's own keys in `fresh`."""

    def __init__(self, cfg: Config, images: int, queue: int):
        super().__init__(cfg, images)
        self.register_buffer("queue", random_units(queue, cfg.dim))

    def update_target(self, m: float) -> None:
        """The new keys come in front and the oldest go: in place, and not before backward."""
        super().update_target(m)
        self.queue.copy_(torch.cat([unit(self.fresh), self.queue])[: len(self.queue)])


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


def random_units(rows: int, dim: int) -> Tensor:
    """What a queue starts with: random vectors of unit length (rows, dim)."""
    return unit(torch.randn(rows, dim))


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


class MoCoV2(QueuedKeys):
    """X. Chen et al., arXiv 2003.04297; queue: K; bn_groups: how many GPUs BatchNorm plays."""

    def __init__(self, cfg: Config, images: int = 0, queue: int = 4096, bn_groups: int = 8):
        if cfg.batch_size % bn_groups or cfg.batch_size < 2 * bn_groups:
            raise UsageError(
                f"--batch-size {cfg.batch_size}: must be a multiple of MoCo v2's {bn_groups} "
                "groups of BatchNorm, with at least 2 images in each"
            )
        super().__init__(cfg, images, queue)
        del self.predictor
        self.bn_groups = bn_groups
        for norm in (m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            norm.momentum = 1 - (1 - norm.momentum) ** (1 / bn_groups)  # it moves once a group

    @torch.no_grad()
    def keys(self, x: Tensor) -> Tensor:
        """Keys (N, D), normalised in groups of other images than those of their queries."""
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
    """I. Misra, L. van der Maaten, CVPR 2020; its bank has a row for each of `images`.

    dim: width of its heads; negatives: rows of the bank drawn in each step; lam: the jigsaw's share
    of the loss; keep: how much of a row stays when its image is seen again.
    """

    def __init__(self, cfg: Config, images: int, dim=128, negatives=4096, lam=0.5, keep=0.5):
        super().__init__(cfg, images)
        del self.projector, self.predictor
        self.negatives, self.lam, self.keep = negatives, lam, keep
        self.image_head = nn.Linear(self.encoder.dim, dim)
        self.cell_head = nn.Linear(self.encoder.dim, dim)
        self.jigsaw_head = nn.Linear(cfg.grid**2 * dim, dim)
        self.register_buffer("bank", torch.zeros(images, dim))

    def views(self, x: Tensor, texture: None, index: Tensor) -> tuple[Tensor, ...]:
        """A view (N, 3, H, W), the shuffled cells of another (G, N, 3, h, w), the index (N,)."""
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
        new, fresh = ~memory.any(1, keepdim=True), unit(v.detach())  # (N, 1): come the first time
        memory = torch.where(new, fresh, memory)
        hidden = (drawn == index[:, None]) | ~negatives.any(1)  # (N, K): own rows and empty ones
        by_jigsaw, by_image = (
            memory_nce(e, memory, negatives, self.cfg.tau, hidden) for e in (jigsaw, v)
        )
        self.bank[index] = unit(self.keep * memory + (1 - self.keep) * fresh)
        return self.lam * by_jigsaw + (1 - self.lam) * by_image


def shuffle(cells: Tensor) -> Tensor:
    """Cells (G, N, 3, h, w), those of each image in a random order of its own."""
    order = torch.rand(cells.shape[:2], device=cells.device).argsort(0)  # (G, N)
    return cells.take_along_dim(order[:, :, None, None, None], 0)
