"""Linear evaluation (Section 3.2): one linear layer on frozen features, trained by LARS.

    python eval_linear.py runs/cifar100                       the online encoder of a run
    python eval_linear.py runs/cifar100 --encoder target --lr-sweep
    python eval_linear.py some/backbone.pth --dataset cifar10 --probe lbfgs
    python eval_linear.py runs/cifar100 --shifts              also on shifted test images

The encoder is in eval mode, and its tensors are compared with a copy at the end. Training images
are cropped and flipped, test images are plain. What is reported is the last epoch's accuracy on the
full test set; learning rates are chosen on a tenth of the training set, never on the test set.
"""

import copy
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sacl
from sacl import Config, Images, SEResNet, UsageError


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The paper's settings of the linear evaluation; `ours:` where it is silent."""

    source: str  # a run's folder, or a backbone.pth
    dataset: str = ""  # as in sacl.py; the run's own by default
    data_dir: str = ""  # the run's own by default
    encoder: Literal["online", "target"] = "online"  # ours: which of the run's two networks
    recalibrate_bn: bool = False  # ours: BatchNorm statistics anew, from plain training images
    probe: Literal["lars", "lbfgs"] = "lars"  # lbfgs: logistic regression on plain images, a check
    epochs: int = 0  # 0, paper: 200, of ImageNet-100 100
    batch_size: int = 128  # paper
    lr: float = 0.9  # paper; ours: cosine to 0
    lr_sweep: bool = False  # ours: choose among LRS on a tenth of the training set
    sgd_momentum: float = 0.9  # ours
    weight_decay: float = 0.0  # ours
    trust: float = 0.001  # ours: LARS's trust coefficient
    crop_min: float = 0.08  # ours: least share of the image's area in a training crop
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # precision of the frozen encoder
    shifts: bool = False  # ours: also test on shifted images (bench/shifts.py says which)
    conflict: str = ""  # with --shifts: a folder of images named <shape>-<texture>
    workers: int = -1  # processes that decode image files
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "lr", "trust"):
            if getattr(self, name) <= 0:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} {getattr(self, name)}: must be greater than 0")
        if self.epochs < 0:
            raise UsageError(f"--epochs {self.epochs}: must be at least 1, or 0 for the paper's")


LRS = (0.1, 0.3, 0.9, 2.7, 8.1)
L2S = (1e-5, 1e-4, 1e-3, 1e-2)


def main(argv: list[str] | None = None) -> None:
    try:
        evaluate(sacl.parse_config(argv, ProbeConfig))
    except UsageError as error:
        print(f"eval_linear.py: {error}", file=sys.stderr)
        sys.exit(2)


def evaluate(cfg: ProbeConfig) -> dict:
    """Train and test the probe; returns what it writes beside the run as linear-<...>.json."""
    shifts = import_shifts(cfg)
    device, _, _ = sacl.setup()
    dtype = sacl.precision(cfg, device)
    encoder, run = load_encoder(cfg)
    run = data_settings(cfg, run)
    cfg = dataclasses.replace(
        cfg, epochs=cfg.epochs or (100 if Path(run.dataset).name == "imagenet100" else 200)
    )
    train_set, test_set = (sacl.load_data(run, split) for split in ("train", "test"))
    sacl.check_classes(train_set, test_set)
    if test_set is None or min(train_set.labels.min(), test_set.labels.min()) < 0:
        raise UsageError(f"--dataset {run.dataset}: the probe needs labelled train and test images")
    for data in (train_set, test_set):
        sacl.to_device(data, device)
    conflicts = shifts.conflicts(run, train_set.classes, cfg.conflict) if shifts else {}
    encoder.to(device, memory_format=torch.channels_last)
    if cfg.recalibrate_bn:
        recalibrate_bn(encoder, train_set, run, device)
    encoder.eval().requires_grad_(False)
    before = copy.deepcopy(encoder.state_dict())

    probe = probe_lars if cfg.probe == "lars" else probe_lbfgs
    head, choice = probe(encoder, train_set, run, cfg, device)
    logits = head(sacl.embed(encoder, test_set, run, device)).cpu()
    seed, shifted = cfg.seed, {}
    if shifts:
        shifted["shifts"] = shifts.measure(encoder, head, test_set, conflicts, run, seed, device)
    assert_frozen(encoder, before)
    result = {
        "top1": accuracy(logits, test_set.labels, 1),
        "top5": accuracy(logits, test_set.labels, 5),
        **choice,
        **shifted,
        "train_images": len(train_set),
        "test_images": len(test_set),
        "settings": dataclasses.asdict(cfg) | {"dataset": run.dataset},
        "machine": sacl.describe_machine(device, dtype),
    }
    source = Path(cfg.source)
    kind = cfg.encoder + ("-recalibrated" if cfg.recalibrate_bn else "") + "-" + cfg.probe
    kind += ("-sweep" if cfg.lr_sweep else "") + (f"-seed{cfg.seed}" if cfg.seed else "")
    data = "" if not cfg.dataset else "-" + Path(run.dataset).name
    out = (source if source.is_dir() else source.parent) / f"linear-{kind}{data}.json"
    print(f"top1 {result['top1']}  top5 {result['top5']}  {out}", flush=True)
    sacl.write(out, json.dumps(result, indent=1).encode())
    return result


# ------------------------------------------------------------ the probe


def probe_lars(
    encoder: nn.Module, data: Images, run: Config, cfg: ProbeConfig, device: torch.device
) -> tuple[nn.Linear, dict]:
    """The paper's probe; with --lr-sweep its learning rate is first chosen on a held-out tenth."""
    lr, choice = cfg.lr, {"lr": cfg.lr}
    if cfg.lr_sweep:
        part, held_out = holdout(data, cfg.seed)
        heads = train_heads(encoder, part, run, cfg, LRS, device)
        features = sacl.embed(encoder, held_out, run, device)
        scores = [accuracy(head(features).cpu(), held_out.labels, 1) for head in heads]
        lr = LRS[scores.index(max(scores))]
        choice = {"lr": lr, "held_out_top1": dict(zip(map(str, LRS), scores, strict=True))}
        print(
            f"lr {lr} of {choice['held_out_top1']} (top1 on held-out training images)", flush=True
        )
    return train_heads(encoder, data, run, cfg, [lr], device)[0], choice


def train_heads(
    encoder: nn.Module, data: Images, run: Config, cfg: ProbeConfig, lrs, device: torch.device
) -> list[nn.Linear]:
    """A linear classifier for each learning rate, all on the same cropped and flipped images."""
    torch.manual_seed(cfg.seed)
    heads = [linear(encoder.dim, len(data.classes), device) for _ in lrs]
    groups = [
        {"params": head.parameters(), "base": lr} for head, lr in zip(heads, lrs, strict=True)
    ]
    optimizer = LARS(groups, cfg.lr, cfg.sgd_momentum, cfg.weight_decay, cfg.trust)
    crop = dataclasses.replace(run, crop_min=cfg.crop_min, batch_size=cfg.batch_size, seed=cfg.seed)
    steps = sacl.check_data(crop, data, 1)
    labels, dtype = data.labels.to(device), sacl.precision(cfg, device)
    for epoch in range(cfg.epochs):
        total = torch.zeros((), device=device)
        order = sacl.epoch_order(len(data), crop, epoch)
        for step, (index, x) in enumerate(sacl.fetch(data.pixels, order, cfg.workers, device)):
            for group in optimizer.param_groups:
                done = (epoch * steps + step) / (cfg.epochs * steps)
                group["lr"] = group["base"] * sacl.cosine(done, 1)
            draw = {"crop": sacl.draw_view(len(x), crop, device)["crop"]}  # no colours
            view = sacl.augment(x, draw, run.image_size)  # 16 bits are too few for coordinates
            with torch.no_grad(), sacl.autocast(device, dtype):
                features = encoder(view).float()
            losses = [F.cross_entropy(head(features), labels[index]) for head in heads]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
            total += losses[0].detach()
        if epoch == 0 or (epoch + 1) % 10 == 0 or epoch + 1 == cfg.epochs:
            mean = total.item() / steps
            print(f"epoch {epoch + 1}  lr {lrs[0]} loss {mean:.4f} on crops", flush=True)
    return heads


def probe_lbfgs(
    encoder: nn.Module, data: Images, run: Config, cfg: ProbeConfig, device: torch.device
) -> tuple[nn.Module, dict]:
    """Multinomial logistic regression on features of plain images; L2 by a held-out tenth."""
    features, labels = sacl.embed(encoder, data, run, device), data.labels.to(device)
    mean, std = features.mean(0), features.std(0) + 1e-6
    features = (features - mean) / std

    def fit(rows: Tensor, l2: float) -> nn.Linear:
        head = linear(features.shape[1], len(data.classes), device)
        nn.init.zeros_(head.weight)
        optimizer = torch.optim.LBFGS(
            head.parameters(), max_iter=200, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(head(features[rows]), labels[rows])
            (loss + l2 * head.weight.square().sum()).backward()
            return loss + l2 * head.weight.square().sum()

        optimizer.step(closure)
        return head

    part, held_out = (index.to(device) for index in holdout_rows(len(data), cfg.seed))
    scores = [
        accuracy(fit(part, l2)(features[held_out]).cpu(), labels[held_out].cpu(), 1) for l2 in L2S
    ]
    l2 = L2S[scores.index(max(scores))]
    head = fit(torch.arange(len(data), device=device), l2)
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


class LARS(torch.optim.Optimizer):
    """SGD whose step is scaled, tensor by tensor, to the length of the weights (You et al. 2017).

    v <- momentum v + trust |w| / |g| g with g the gradient plus weight_decay w; w <- w - lr v.
    Vectors (biases, norms) have neither scaling nor decay; where |w| or |g| is 0 the factor is 1.
    """

    def __init__(self, params, lr: float, momentum=0.9, weight_decay=0.0, trust=0.001):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        )

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                g = w.grad
                if w.ndim > 1:
                    g = g + group["weight_decay"] * w
                    w_norm, g_norm = w.norm(), g.norm()
                    scale = group["trust"] * w_norm / g_norm
                    g = g * torch.where((w_norm > 0) & (g_norm > 0), scale, 1.0)
                v = self.state[w].setdefault("v", torch.zeros_like(w))
                v.mul_(group["momentum"]).add_(g)
                w.add_(v, alpha=-group["lr"])


def accuracy(logits: Tensor, labels: Tensor, k: int) -> float:
    """Per cent of rows whose label is among the k largest logits, (N, classes) and (N,)."""
    top = logits.topk(min(k, logits.shape[1])).indices
    return sacl.percent((top == labels[:, None]).any(1))


def holdout_rows(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of nine tenths and of one tenth of the training images, at random from the seed."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[count // 10 :], order[: count // 10]


def holdout(data: Images, seed: int) -> tuple[Images, Images]:
    """The same two parts as data."""
    return tuple(sacl.subset(data, rows) for rows in holdout_rows(len(data), seed))


def import_shifts(cfg: ProbeConfig) -> ModuleType | None:
    """bench/shifts.py, where --shifts asks for it; before anything is trained."""
    if not cfg.shifts:
        if cfg.conflict:
            raise UsageError(f"--conflict {cfg.conflict} is only read with --shifts: add it")
        return None
    try:
        from bench import shifts
    except ImportError:
        raise UsageError(
            "--shifts needs bench/shifts.py and texture.py beside eval_linear.py: fetch them"
        ) from None
    return shifts


# ------------------------------------------------------------ the encoder


def load_encoder(cfg: ProbeConfig) -> tuple[SEResNet, Config | None]:
    """The encoder of a run folder or a weights file, every key matched; the settings of the run."""
    source = Path(cfg.source)
    name = {"online": "backbone.pth", "target": "target_backbone.pth"}[cfg.encoder]
    path = source / name if source.is_dir() else source
    if cfg.encoder == "target" and path == source:
        raise UsageError(f"--encoder target: {source} is one network; name the run's folder")
    if not path.is_file():
        raise UsageError(f"{path}: no such file; name a run's folder or a backbone.pth")
    weights = sacl.read_checkpoint(path)
    if not isinstance(weights, dict) or "conv1.weight" not in weights:
        raise UsageError(f"{path} is not a backbone: it has no conv1.weight")
    weights = {k: v for k, v in weights.items() if not k.startswith("fc.")}
    settings = path.parent / "config.json"
    run = Config(**json.loads(settings.read_text())) if settings.is_file() else None
    if run:
        form = dict(arch=run.arch, se=run.se, reduction=run.reduction, stem=run.stem)
        encoder = SEResNet(**form, width=run.width)
    else:
        encoder = SEResNet(**infer(weights))
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(
            f"{path} does not fit its encoder ({str(error).splitlines()[1]})"
        ) from None
    return encoder, run


def infer(weights: dict[str, Tensor]) -> dict:
    """SEResNet's arguments from the shapes of its weights, for a file without a config.json."""
    gate, unit = weights.get("layer2.0.se.fc1.weight"), weights["layer2.0.conv1.weight"]
    widest = weights.get("layer4.1.se.fc1.weight")
    se = "none" if gate is None else "pre" if gate.shape[1] == unit.shape[1] else "standard"
    if se == "standard":
        print("no config.json beside the weights: gates taken to be at --se standard", flush=True)
    return dict(
        arch="resnet50" if "layer1.0.conv3.weight" in weights else "resnet18",
        se=se,
        reduction=1 if widest is None else widest.shape[1] // widest.shape[0],
        stem="cifar" if weights["conv1.weight"].shape[-1] == 3 else "imagenet",
        width=len(weights["conv1.weight"]),
    )


def data_settings(cfg: ProbeConfig, run: Config | None) -> Config:
    """The settings by which sacl.load_data finds the images, and how large they are."""
    if run is None and not cfg.dataset:
        raise UsageError("--dataset is needed where no config.json lies beside the weights")
    same = run is not None and cfg.dataset in ("", run.dataset)
    # ours: other images too are shown to the encoder at the size that it was trained at
    kept = {"image_size": run.image_size} if run else {}
    kept |= {"seed": run.seed} if same else {}
    return Config(
        dataset=run.dataset if same else cfg.dataset,
        data_dir=cfg.data_dir or (run.data_dir if run else "data"),
        stl10_split="train",  # the labelled part
        amp=cfg.amp,
        workers=cfg.workers,
        **kept,
    )


@torch.no_grad()
def recalibrate_bn(encoder: nn.Module, data: Images, run: Config, device: torch.device) -> None:
    """BatchNorm's running statistics as averages over the plain training images.

    During training the online encoder only sees cells of a quarter of the image.
    """
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over batches
    encoder.train()
    for _, x in sacl.fetch(data.pixels, torch.arange(len(data)).split(500), run.workers, device):
        encoder(sacl.plain(x, run.image_size))


def assert_frozen(encoder: nn.Module, before: dict[str, Tensor]) -> None:
    """Raise where a tensor of the encoder, statistics included, differs from the copy."""
    moved = [k for k, v in encoder.state_dict().items() if not torch.equal(v, before[k])]
    if moved:
        raise RuntimeError(f"the probe moved the frozen encoder: {', '.join(moved[:5])}")


if __name__ == "__main__":
    main()
