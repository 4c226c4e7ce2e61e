"""Multi-network contrast of global and local representations (the project's source document 003).

W. Li, X. Long, Y. Li: "Multi-network Contrastive Learning Based on Global and Local
Representations", arXiv 2306.15930. The code of its authors, liweiquan39/MNCLGLF, was read; the
paper's body was not.

    p1, p2, p3 = predictions of three views                           back-propagation network
    c1, c2     = projected means of pairs of cells, views 1 and 2     stop-gradient network: the
                                                                      online weights, no gradient
    z1, z3     = nearest neighbours, in a bank of past keys, of the   momentum network (EMA)
                 EMA projections of views 1 and 3
    L = 1/12 sum_j [CE(p2 c1_j) + CE(p1 c2_j)] + a/2 [NTXent(z3, p1) + NTXent(z1, p3)]

Sourced, [S: code, its README and figure]
    The above, with temperature 1 in both terms, a = 6, a bank of 16384 rows that starts at random
    and takes up view 3's keys only, m 0.99, SGD with lr 0.1 at a batch of 256, weight decay 1e-4.
    The shipped code takes c without gradient AND detaches p in the local term, which then trains
    nothing; the figure has the stop-gradient on c and the momentum network only.
Our reading
    The gradient goes through p as in the figure; as_shipped=True detaches it. Which of the two made
    the published table is unknown. By default the pass over cells leaves BatchNorm's running
    statistics alone, so that they are those of whole views; as_shipped lets it move them, as the
    code does. The target starts as a copy and moves after the step, as in SACL (there: its own
    random weights, moved before the keys are taken), gradients are not clipped (there: to norm 1),
    the predictor's lr follows the cosine (there: constant), and views are SACL's at SACL's size
    (there: 224 px, with blur).
"""

import torch
from torch import Tensor

import sacl
from related.baselines import TwoNetworks, empty_memory, nt_xent, push
from sacl import Config, info_nce, unit


class MultiNetwork(TwoNetworks):
    """a: weight of the global term; bank: its rows."""

    def __init__(
        self,
        cfg: Config,
        images: int = 0,
        a: float = 6.0,
        bank: int = 16384,
        as_shipped: bool = False,
    ):
        super().__init__(cfg, images)
        self.a, self.as_shipped = a, as_shipped
        self.register_buffer("bank", empty_memory(bank, cfg.dim))

    def views(self, x: Tensor, texture: None, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three views (N, 3, H, W) of each image."""
        draws = (sacl.draw_view(len(x), self.cfg, x.device) for _ in range(3))
        return tuple(sacl.augment(x, draw, self.cfg.image_size) for draw in draws)

    def forward(self, x1: Tensor, x2: Tensor, x3: Tensor) -> Tensor:
        p1, p2, p3 = (self.predict(x) for x in (x1, x2, x3))
        c1, c2 = self.local_keys(x1), self.local_keys(x2)
        k1, k3 = self.keys(x1), self.keys(x3)
        self.monitor = sacl.similarities(p1[None], k3, None)
        self.fresh = k3
        return self.local(p1, p2, c1, c2) + self.a * self.global_(p1, p3, k1, k3)

    def update_target(self, m: float) -> None:
        super().update_target(m)
        push(self.bank, self.fresh)

    @torch.no_grad()
    def local_keys(self, x: Tensor) -> Tensor:
        """Stop-gradient network: projected combinations of a view's cells, (M, N, D)."""
        left_alone = () if self.as_shipped else (self.encoder, self.projector)
        with sacl.batch_statistics_only(*left_alone):
            cells = sacl.split(x, self.cfg.grid)  # (G, N, 3, h, w)
            h = self.encoder(cells.flatten(0, 1)).unflatten(0, cells.shape[:2])  # (G, N, C)
            e = sacl.combine(h, self.cfg.combine)  # (M, N, C)
            return self.projector(e.flatten(0, 1)).unflatten(0, e.shape[:2])  # (M, N, D)

    def local(self, p1: Tensor, p2: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
        """Whole views against the combined cells of the other view, (N, D) and (M, N, D)."""
        if self.as_shipped:
            p1, p2 = p1.detach(), p2.detach()
        terms = [info_nce(p2[None], c, self.cfg.tau) for c in c1]
        terms += [info_nce(p1[None], c, self.cfg.tau) for c in c2]
        return torch.stack(terms).mean()

    def global_(self, p1: Tensor, p3: Tensor, k1: Tensor, k3: Tensor) -> Tensor:
        """Whole views against the nearest neighbours of the other's keys, (N, D) each."""
        z1, z3 = nearest(k1, self.bank), nearest(k3, self.bank)
        return (nt_xent(z3, p1, self.cfg.tau) + nt_xent(z1, p3, self.cfg.tau)) / 2


@torch.no_grad()
def nearest(k: Tensor, bank: Tensor) -> Tensor:
    """The rows of the bank (K, D) with the largest cosine to the keys k (N, D): (N, D)."""
    with torch.autocast(k.device.type, enabled=False):
        return bank[(unit(k) @ bank.T).argmax(1)]
