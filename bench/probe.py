"""A quick probe: logistic regression on frozen features by L-BFGS. The paper's is eval_linear.py's.

    head, choice = probe.fit(features, labels, classes)
    probe.accuracy(head(other_features), other_labels, k=1)

Deterministic on one thread: all rows at once, weights from zero, 200 iterations at most.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sacl

L2S = (1e-5, 1e-4, 1e-3, 1e-2)  # penalties: factors of the sum of squared weights


def fit(features: Tensor, labels: Tensor, classes: int, seed: int = 0) -> tuple[nn.Linear, dict]:
    """A linear classifier of features (L, C) with labels (L,), and how its penalty was chosen.

    The penalty is the one of L2S that is best on a tenth of the rows, drawn at random from `seed`;
    then all rows are fitted with it. Features are standardised for the fit; the scaling goes into
    the layer, so that it takes features as they are.
    """
    labels, mean, std = labels.to(features.device), features.mean(0), features.std(0) + 1e-6
    scaled = (features - mean) / std
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out, part = order.to(labels.device).tensor_split([len(labels) // 10])
    scores = {}
    for l2 in L2S:
        head = fit_once(scaled[part], labels[part], classes, l2)
        scores[l2] = accuracy(head(scaled[held_out]), labels[held_out], 1)
    best = max(scores, key=scores.get)  # the smallest of equals
    head = fit_once(scaled, labels, classes, best)
    with torch.no_grad():
        head.weight /= std
        head.bias -= head.weight @ mean
    return head, {"l2": best, "held_out_top1": scores[best]}


def fit_once(features: Tensor, labels: Tensor, classes: int, l2: float) -> nn.Linear:
    """Mean cross-entropy plus l2 times the squared weights at its minimum; (L, C), (L,)."""
    head = nn.Linear(features.shape[1], classes, device=features.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels) + l2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head


@torch.no_grad()
def accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Per cent of rows (N, classes) whose label (N,) is among the k largest logits."""
    top = logits.topk(min(k, logits.shape[1])).indices
    return sacl.percent((top == labels[:, None]).any(1))
