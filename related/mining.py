"""Mining of potential samples, as far as it is known.

H. Dong, X. Long, Y. Li: "Rethinking Samples Selection for Contrastive Learning: Mining of Potential
Samples", arXiv 2311.00358, Knowledge-Based Systems. We could read only the abstract, and there is
no code. This is a concrete algorithm in its spirit, not the authors'.

Sourced, [S: abstract]
    Positives are augmented views and mined views, weighted and combined by "both soft and hard
    weighting strategies". Negatives are kept that are "neither too hard nor too easy ... close to
    positive samples"; an analysis of gradients motivates it.
Our reading
    Everything concrete. Mined positives are the 5 nearest of a queue of 4096 EMA keys to the
    anchor's own key. Soft weights are a softmax over them, of temperature 0.1; the hard gate keeps
    those that are at least the mean (SNCLR weighs by query and key and keeps those above the mean,
    [S: snclr/builder_snclr_factor.py]). Together they weigh at most as much as the own view
    (lam 1). Negatives are the 512 whose similarity is nearest to the positive's, the hard form of
    SimANS's sampling p ~ exp(-a (s - s+ - b)^2) [S: SimXNS/SimANS/README.md]. The gradient shows
    why: dL/dp = (sum_j P_j n_j - (1 - P_+) t) / tau, so a negative far below the positive has no
    weight P_j, and one far above takes all of it and is probably of the same class. Mined positives
    come in over the first tenth of the run, since a young queue holds noise. Optimiser and views
    are SACL's.
"""

import torch
from torch import Tensor

import sacl
from related.baselines import QueuedKeys
from sacl import Config, UsageError, unit

WEIGHTINGS = ("soft", "hard", "both")


class PotentialSamples(QueuedKeys):
    """queue: K; neighbours: mined positives an anchor; weighting: one of WEIGHTINGS.

    keep: negatives an anchor; offset: how far above the positive's similarity their band lies (b);
    lam: weight of the mined positives after the ramp; ramp: its length, a share of the run.
    """

    def __init__(self, cfg: Config, images: int, queue=4096, neighbours=5, weighting="both",
                 keep=512, offset=0.0, lam=1.0, ramp=0.1):  # fmt: skip
        super().__init__(cfg, images, queue)
        if weighting not in WEIGHTINGS:
            raise UsageError(f"weighting {weighting}: must be one of {', '.join(WEIGHTINGS)}")
        self.neighbours, self.weighting = neighbours, weighting
        self.keep, self.offset, self.lam, self.ramp = keep, offset, lam, ramp

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        p1, p2 = self.predict(x1), self.predict(x2)
        k1, k2 = self.keys(x1), self.keys(x2)
        self.monitor = sacl.similarities(p1[None], k2, None)
        self.fresh = k2
        return (self.contrast(p1, k2) + self.contrast(p2, k1)) / 2

    def contrast(self, p: Tensor, k: Tensor) -> Tensor:
        """Anchors p (N, D) against their own keys k (N, D), mined positives and kept negatives."""
        with torch.autocast(p.device.type, enabled=False):
            p, k = unit(p), unit(k)
            rows, weight = mine(k, self.queue, self.neighbours, self.weighting)  # (N, k) each
            positive = (p * k).sum(-1, keepdim=True)  # (N, 1)
            queued = p @ self.queue.T  # (N, K)
            own = torch.eye(len(p), dtype=torch.bool, device=p.device)  # (N, N)
            batch = (p @ k.T).masked_fill(own, -torch.inf)
            rest = queued.scatter(1, rows, -torch.inf)  # a mined row is no negative
            kept = potential(torch.cat([batch, rest], 1), positive, self.keep, self.offset)
            weight = weight * self.lam * (self.progress() / self.ramp).clamp(max=1)
            of_own = nce(positive, kept, self.cfg.tau)  # (N, 1)
            of_mined = nce(queued.gather(1, rows), kept, self.cfg.tau)  # (N, k)
            total = of_own + (weight * of_mined).sum(1, keepdim=True)
            return (total / (1 + weight.sum(1, keepdim=True))).mean()


@torch.no_grad()
def mine(k: Tensor, queue: Tensor, count: int, weighting: str) -> tuple[Tensor, Tensor]:
    """The `count` rows of the queue nearest to each key (N, D), and their weights; (N, count) each.

    soft: a softmax of the similarities / 0.1; hard: equal weights for those whose soft weight is at
    least 1 / count; both: soft weights for those, 0 for the rest.
    """
    similarity, rows = (k @ queue.T).topk(count)
    soft = (similarity / 0.1).softmax(1)
    gate = (soft >= soft.mean(1, keepdim=True)).to(soft.dtype)  # their mean is 1 / count
    if weighting == "hard":
        return rows, gate / gate.sum(1, keepdim=True)
    return rows, soft if weighting == "soft" else soft * gate


def potential(negative: Tensor, positive: Tensor, keep: int, offset: float) -> Tensor:
    """Of similarities (N, candidates) those nearest to the positive's (N, 1): (N, keep).

    -inf marks a row that is no candidate; one that is kept for lack of others weighs nothing.
    """
    distance = (negative - positive - offset).detach().abs()
    return negative.gather(1, distance.topk(min(keep, negative.shape[1]), largest=False).indices)


def nce(positive: Tensor, negative: Tensor, tau: float) -> Tensor:
    """-log e^(s / tau) / (e^(s / tau) + sum of e^(negative / tau)) for each s, (N, columns)."""
    others = torch.logsumexp(negative / tau, 1, keepdim=True)
    return torch.logaddexp(positive / tau, others) - positive / tau
