# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "numpy>=1.26", "pillow>=10.1"]
# ///
"""Linear evaluation (Section 3.2): one linear layer on frozen features, trained by LARS.

    python eval_linear.py runs/cifar100                       the online encoder of a run
    python eval_linear.py runs/cifar100 --encoder target --lr-sweep
    python eval_linear.py runs/cifar100 --dataset cifar10     on another dataset's images
    python eval_linear.py runs/cifar100 --probe lbfgs         one pass instead of 200 epochs

The encoder is in eval mode, and its tensors are compared with a copy at the end. Training images
are cropped and flipped, test images are plain. Top-1 and top-5 are those of the last epoch on the
full test set; learning rates are chosen on a tenth of the training set, never on the test set.
"""

import copy
import itertools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sacl
from sacl import Config, Images, SEResNet, UsageError

LRS = (0.1, 0.3, 0.9, 2.7, 8.1)
L2S = (1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The paper's settings of the linear evaluation; `ours` where it is silent."""

    run: str  # a run's folder
    dataset: str = ""  # as in sacl.py; "": the run's own
    data_dir: str = ""  # "": the run's own
    output_dir: str = ""  # where linear-*.json goes; "": the run's folder
    encoder: Literal["online", "target"] = "online"  # ours: which of the run's two networks
    probe: Literal["lars", "lbfgs"] = "lars"  # lbfgs: logistic regression on plain images, a check
    epochs: int = 0  # 0, paper: 200, but 100 for imagenet100
    batch_size: int = 128  # paper
    lr: float = 0.9  # paper; ours: cosine to 0
    lr_sweep: bool = False  # ours: choose among 0.1 to 8.1 on a tenth of the training set
    sgd_momentum: float = 0.9  # ours
    weight_decay: float = 0.0  # ours
    trust: float = 0.001  # ours: LARS's trust coefficient
    crop_min: float = 0.08  # ours: smallest share of the image's area in a training crop
    seed: int = 0

    def __post_init__(self):
        for name, value in sacl.typed(ProbeConfig, vars(self)).items():
            object.__setattr__(self, name, value)
        limits = dict(epochs=(0, 10**6), lr=(1e-12, 1e9), sgd_momentum=(0, 0.9999))
        limits |= dict(batch_size=(2, 10**9), weight_decay=(0, 1e6), trust=(1e-12, 1e6))
        sacl.check_limits(self, limits | dict(crop_min=(1e-6, 1), seed=(0, 2**31 - 1)))


class LARS(torch.optim.Optimizer):
    """SGD whose step is scaled, tensor by tensor, to the length of the weights (You et al. 2017).

    v <- momentum v + trust |w| / |g| g with g the gradient plus weight_decay w; w <- w - lr v.
    Vectors (biases, norms) have neither scaling nor decay; where |w| or |g| is 0 the factor is 1.
    """

    def __init__(self, params, lr: float, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                g = w.grad
                if w.ndim > 1:  # not a bias or a norm's scale
                    g = g + group["decay"] * w
                    w_norm, g_norm = w.norm(), g.norm()
                    scale = group["trust"] * w_norm / g_norm
                    g = g * torch.where((w_norm > 0) & (g_norm > 0), scale, 1.0)
                v = self.state[w].setdefault("v", torch.zeros_like(w))
                v.mul_(group["momentum"]).add_(g)
                w.add_(v, alpha=-group["lr"])


def evaluate(cfg: ProbeConfig) -> dict:
    """Train and test the probe; returns what it writes to linear-<encoder>-<probe>.json."""
    out = Path(cfg.output_dir or cfg.run)
    encoder, run = load_encoder(cfg)
    sacl.require_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    device = sacl.choose_device()
    train_set, test_set = load_labelled(run)
    if isinstance(train_set.pixels, Tensor):
        train_set = train_set._replace(pixels=train_set.pixels.to(device))
    encoder.to(device, memory_format=torch.channels_last)
    before = copy.deepcopy(encoder.state_dict())
    epochs = cfg.epochs or (100 if run.dataset == "imagenet100" else 200)
    cfg = replace(cfg, epochs=epochs, dataset=run.dataset)

    probe = probe_lars if cfg.probe == "lars" else probe_lbfgs
    head, choice = probe(encoder, train_set, run, cfg, device)
    logits = head(sacl.embed(encoder, test_set.pixels, run, device)).cpu()
    assert_frozen(encoder, before)
    result = {f"top{k}": accuracy(logits, test_set.labels, k) for k in (1, 5)} | choice
    passes = int(before["bn1.num_batches_tracked"])  # in training: two a step, one for each view
    result |= dict(train_images=len(train_set.labels), test_images=len(test_set.labels))
    result |= dict(encoder_passes=passes, settings=asdict(cfg))
    result["machine"] = sacl.describe_machine(device, sacl.precision(run, device))
    path = result_path(out, cfg, passes)
    sacl.write(path, json.dumps(result, indent=1).encode())
    sacl.say(f"top1 {result['top1']}  top5 {result['top5']}  {path}")
    return result


def load_encoder(cfg: ProbeConfig) -> tuple[SEResNet, Config]:
    """The encoder of a run, frozen and every key matched, and the settings for its images."""
    folder = Path(cfg.run)
    name = {"online": "knn", "target": "knn_target"}[cfg.encoder]
    path, settings = folder / sacl.BACKBONES[name], folder / "config.json"
    if not path.is_file() or not settings.is_file():
        raise UsageError(f"{folder} has no {path.name} or no config.json: name a run's folder")
    try:
        run = Config(**json.loads(settings.read_text()))
    except (ValueError, TypeError) as error:  # UsageError is a ValueError
        raise UsageError(f"{settings} holds no settings of this program: {error}") from None
    encoder = SEResNet(run.arch, run.se, run.reduction, run.stem, run.width)
    weights = sacl.read_weights(path)
    try:
        encoder.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError):
        raise UsageError(f"{path} does not fit the encoder that {settings} describes") from None
    if not all(x.isfinite().all() for x in weights.values()):
        raise UsageError(f"{path} holds values that are not finite: the run has diverged")
    data = dict(dataset=cfg.dataset or run.dataset, data_dir=cfg.data_dir or run.data_dir)
    # ours: other images too are shown at the size of training; of STL-10 the labelled ones are used
    amp = "auto" if run.amp == "fp16" else run.amp  # a CPU has none
    run = replace(run, **data, stl10_split="train", amp=amp)
    return encoder.eval().requires_grad_(False), run


def load_labelled(run: Config) -> tuple[Images, Images]:
    """The training and test images; refuses those without labels or of different classes."""
    train_set, test_set = sacl.load_data(run, "train"), sacl.load_data(run, "test")
    if test_set is None or min(train_set.labels.min(), test_set.labels.min()) < 0:
        raise UsageError(f"--dataset {run.dataset}: a probe needs labelled train and test images")
    sacl.require_same_classes(train_set, test_set)
    return train_set, test_set


def probe_lars(encoder, data: Images, run: Config, cfg: ProbeConfig, device) -> tuple:
    """The paper's probe; with --lr-sweep its learning rate is first chosen on a held-out tenth."""
    choice = {"lr": cfg.lr}
    if cfg.lr_sweep:
        kept, held = holdout(len(data.labels), cfg.seed)
        if len(kept) < 2:
            raise UsageError("--lr-sweep: too few training images to hold any out; leave it out")
        heads = train_heads(encoder, data, kept, run, cfg, LRS, device)
        features = sacl.embed(encoder, data.pixels, run, device, held)
        scores = [accuracy(head(features).cpu(), data.labels[held], 1) for head in heads]
        choice = {"lr": LRS[scores.index(max(scores))]}
        choice["held_out_top1"] = dict(zip(map(str, LRS), scores, strict=True))
        sacl.say(f"lr {choice['lr']} of {choice['held_out_top1']} on held-out images")
    rows = torch.arange(len(data.labels))
    return train_heads(encoder, data, rows, run, cfg, [choice["lr"]], device)[0], choice


def train_heads(encoder, data: Images, rows: Tensor, run: Config, cfg: ProbeConfig, lrs, device):
    """A linear classifier for each learning rate, all on the same crops of the images `rows`."""
    torch.manual_seed(cfg.seed)
    heads = [linear(encoder.dim, len(data.classes), device) for _ in lrs]
    groups = [dict(params=head.parameters(), base=lr) for head, lr in zip(heads, lrs, strict=True)]
    optimizer = LARS(groups, cfg.lr, cfg.sgd_momentum, cfg.weight_decay, cfg.trust)
    # crops as "common" has them, without the rotation of "geometric"; below without its colours
    views = dict(weak="common", crop_min=cfg.crop_min, seed=cfg.seed)
    run = replace(run, **views, batch_size=min(cfg.batch_size, len(rows)))
    labels, dtype = data.labels.to(device), sacl.precision(run, device)
    for epoch in range(cfg.epochs):
        order = rows[sacl.epoch_order(len(rows), run, epoch)]
        for i, index in enumerate(order):
            for group in optimizer.param_groups:
                done = (epoch * len(order) + i) / (cfg.epochs * len(order))
                group["lr"] = group["base"] * sacl.cosine(done, 1)
            x = sacl.take(data.pixels, index, device)
            crop = {"crop": sacl.sample_view(len(x), run, device)["crop"]}
            view = sacl.augment(x, crop, run.image_size)
            with sacl.autocast(device, dtype):
                features = encoder(view).float()
            losses = [F.cross_entropy(head(features), labels[index.to(device)]) for head in heads]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
        if epoch == 0 or (epoch + 1) % 10 == 0 or epoch + 1 == cfg.epochs:
            sacl.say(f"epoch {epoch + 1}  loss {losses[0].item():.4f} on crops")
    return heads


def probe_lbfgs(encoder, data: Images, run: Config, cfg: ProbeConfig, device) -> tuple:
    """Logistic regression on plain images."""
    features = sacl.embed(encoder, data.pixels, run, device)
    return fit_lbfgs(features, data.labels.to(device), len(data.classes), cfg.seed)


def fit_lbfgs(features: Tensor, labels: Tensor, classes: int, seed: int) -> tuple[nn.Linear, dict]:
    """Multinomial logistic regression on features (L, C); L2 by a held-out tenth, then on all."""
    if not features.isfinite().all():
        raise FloatingPointError("the features are not finite: the encoder's run has diverged")
    mean, std = features.mean(0), features.std(0) + 1e-6
    features = (features - mean) / std

    def fit(rows: Tensor | slice, l2: float) -> nn.Linear:
        x, y, head = features[rows], labels[rows], linear(features.shape[1], classes, labels.device)
        nn.init.zeros_(head.weight)
        lbfgs = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            lbfgs.zero_grad()
            loss = F.cross_entropy(head(x), y) + l2 * head.weight.square().sum()
            loss.backward()
            return loss

        lbfgs.step(closure)
        return head

    kept, held = (rows.to(labels.device) for rows in holdout(len(labels), seed))
    scores = [accuracy(fit(kept, l2)(features[held]), labels[held], 1) for l2 in L2S]
    l2 = L2S[scores.index(max(scores))]
    head = fit(slice(None), l2)  # all rows
    with torch.no_grad():  # takes features as they are: the scaling goes into the layer
        head.weight /= std
        head.bias -= head.weight @ mean
    return head, {"l2": l2, "held_out_top1": dict(zip(map(str, L2S), scores, strict=True))}


def linear(width: int, classes: int, device: torch.device) -> nn.Linear:
    """A linear layer with small weights, as is the custom for probes (He et al. 2020)."""
    head = nn.Linear(width, classes, device=device)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


def holdout(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of nine tenths and of one tenth of the training images, at random from the seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order.tensor_split([max(1, count // 10)])[::-1]


def accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Per cent of rows whose label is among the k largest logits, (N, classes) and (N,)."""
    top = logits.topk(min(k, logits.shape[1])).indices
    return sacl.percent((top == labels[:, None]).any(1))


def assert_frozen(encoder: nn.Module, before: dict[str, Tensor]) -> None:
    """Raise where a tensor of the encoder, statistics included, differs from the copy."""
    moved = [k for k, v in encoder.state_dict().items() if not torch.equal(v, before[k])]
    if moved:
        raise RuntimeError(f"the probe moved the frozen encoder: {', '.join(moved[:5])}")


def result_path(out: Path, cfg: ProbeConfig, passes: int) -> Path:
    """A file of its own for each evaluation; the same encoder and settings write it again."""
    for number in itertools.count(1):
        end = f"-{number}" if number > 1 else ""
        path = out / f"linear-{cfg.encoder}-{cfg.probe}{end}.json"
        try:
            kept = json.loads(path.read_text())
            if (kept["settings"], kept["encoder_passes"]) == (asdict(cfg), passes):
                return path
        except FileNotFoundError:
            return path
        except (ValueError, KeyError, TypeError, IsADirectoryError):
            continue  # a file or folder of the user's own


def main(argv: list[str] | None = None) -> None:
    sacl.command("eval_linear.py", lambda: evaluate(ProbeConfig(**sacl.parse(ProbeConfig, argv))))


if __name__ == "__main__":
    main()
