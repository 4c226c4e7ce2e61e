"""Multi-network contrast of global and local representations.

W. Li, X. Long, Y. Li: "Multi-network Contrastive Learning Based on Global and Local
Representations", arXiv 2306.15930. We read the authors' code, liweiquan39/MNCLGLF, not the paper's
body.

    p1, p2, p3 = predictions of three views                           back-propagation network
    c1, c2     = projected means of pairs of cells, views 1 and 2     stop-gradient network: the
                                                                      online weights, no gradient
    z1, z3     = nearest neighbours, in a bank of past keys, of the   momentum network (EMA)
                 EMA projections of views 1 and 3
    L = 1/12 sum_j [CE(p2 c1_j) + CE(p1 c2_j)] + a/2 [NTXent(z3, p1) + NTXent(z1, p3)]

Sourced, [S: code, its README and figure]
    The above, with temperature 1 in both terms, a = 6, a bank of 16384 rows (here: `queue`) that
    starts at random and takes up view 3's keys only, m 0.99, SGD with lr 0.1 at a batch of 256,
    weight decay 1e-4. The released code takes c without gradient AND detaches p in the local term,
    which then trains nothing; the figure has the stop-gradient on c and the momentum network only.
Our reading
    The gradient goes through p as in the figure; as_shipped=True detaches it. We do not know which
    of the two made the published table. By default the pass over cells leaves BatchNorm's running
    statistics to the whole views; with as_shipped it moves them, as in the code. The target starts
    as a copy and moves after the step, as in SACL (there: its own random weights, moved before the
    keys are taken), gradients are not clipped (there: to norm 1), the predictor's lr follows the
    cosine (there: constant), and views are SACL's at SACL's size (there: 224 px, with blur).
"""

import torch
from torch import Tensor, nn

import sacl
from related.baselines import QueuedKeys, nt_xent
from sacl import Config, info_nce, unit


class MultiNetwork(QueuedKeys):
    """a: weight of the global term; queue: rows of the bank; as_shipped: as the code does it."""

    def __init__(self, cfg: Config, images: int = 0, a=6.0, queue=16384, as_shipped=False):
        super().__init__(cfg, images, queue)
        self.a, self.as_shipped = a, as_shipped

    def views(self, x: Tensor, texture: None, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three views (N, 3, H, W) of each image."""
        params = (sacl.sample_view(len(x), self.cfg, x.device) for _ in range(3))
        return tuple(sacl.augment(x, view, self.cfg.image_size) for view in params)

    def forward(self, x1: Tensor, x2: Tensor, x3: Tensor) -> Tensor:
        p1, p2, p3 = (self.predict(x) for x in (x1, x2, x3))
        c1, c2 = self.local_keys(x1), self.local_keys(x2)
        k1, k3 = self.keys(x1), self.keys(x3)
        z1, z3 = nearest(k1, self.queue), nearest(k3, self.queue)
        self.monitor = sacl.similarities(p1[None], k3, None)
        self.fresh, tau = k3, self.cfg.tau
        a1, a2 = (p1.detach(), p2.detach()) if self.as_shipped else (p1, p2)
        local = [info_nce(a2[None], c, tau) for c in c1] + [info_nce(a1[None], c, tau) for c in c2]
        global_ = (nt_xent(z3, p1, tau) + nt_xent(z1, p3, tau)) / 2
        return torch.stack(local).mean() + self.a * global_

    @torch.no_grad()
    def local_keys(self, x: Tensor) -> Tensor:
        """Stop-gradient network: projected combinations of a view's cells, (M, N, D)."""

        def run(net: nn.Module, x: Tensor) -> Tensor:
            return net(x) if self.as_shipped else sacl.keep_statistics(net, x)

        cells = sacl.split(x, self.cfg.grid)  # (G, N, 3, h, w)
        h = run(self.encoder, cells.flatten(0, 1)).unflatten(0, cells.shape[:2])  # (G, N, C)
        e = sacl.combine(h, self.cfg.combine)  # (M, N, C)
        return run(self.projector, e.flatten(0, 1)).unflatten(0, e.shape[:2])  # (M, N, D)


@torch.no_grad()
def nearest(k: Tensor, bank: Tensor) -> Tensor:
    """The rows of the bank (K, D) with the largest cosine to the keys k (N, D): (N, D)."""
    with torch.autocast(k.device.type, enabled=False):
        return bank[(unit(k) @ bank.T).argmax(1)]
