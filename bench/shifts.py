"""What a frozen encoder and its linear probe still see on shifted test images.

    python bench/shifts.py RUN [--encoder recalibrated]      prints, and writes RUN/shifts-*.json

texture      texture.py's synthesis from two patches of the image: its texture without its shape
shuffle      the image's 2 x 2 or 4 x 4 patches in a random order: its texture without its layout
low_pass     a Gaussian blur of 1/16 of the side (2 px of 32): the layout without the texture
silhouette   low-passed luma cut at Otsu's threshold, a black object on a white ground, ground being
             what most of the border is: crude, without weights, and wrong for many photos
corruptions  noise, blur, contrast, brightness, pixelation and JPEG-like quantisation at five
             severities. Our own code and amounts: these are NOT the figures of CIFAR-C
conflict     of the drawn dataset: images with one class's shape and another's texture, how often
             each is named, and shape_share = shape / (shape + texture) (Geirhos et al., ICLR 2019)

Shifts map uint8 images (N, 3, S, S) to uint8 (N, 3, S, S). What is random depends on the
shift's name and the image's place in the test set alone.
"""

import argparse
import copy
import json
import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_linear
import sacl
from sacl import Config, Images
from texture import texture_views

# severities 0 (the plain image) to 5; lengths in pixels of an image of 32, steps in 1/255
AMOUNTS = {
    "noise": (0, 0.02, 0.04, 0.07, 0.11, 0.16),  # standard deviation
    "blur": (0, 0.4, 0.6, 0.9, 1.3, 1.8),  # sigma
    "contrast": (1, 0.7, 0.5, 0.35, 0.22, 0.12),  # what is left of it
    "brightness": (0, 0.08, 0.16, 0.25, 0.35, 0.45),  # added
    "pixelate": (32, 24, 18, 14, 10, 7),  # pixels a side
    "jpeg": (0, 4, 8, 14, 22, 34),  # quantisation step of the lowest frequency
}


# ------------------------------------------------------------ the figures


def evaluate(run_dir: str, which: str = "online", data_dir: str = "") -> dict:
    """Fit a probe (eval_linear's lbfgs) on the training images; returns what it writes."""
    network = "target" if which == "target" else "online"
    probe = eval_linear.ProbeConfig(run=run_dir, data_dir=data_dir, encoder=network, probe="lbfgs")
    encoder, run = eval_linear.load_encoder(probe)
    sacl.require_writable(Path(run_dir))
    train_set, test_set = eval_linear.load_labelled(run)
    device = sacl.choose_device()
    encoder.to(device)
    if which == "recalibrated":
        encoder = recalibrate(encoder, train_set, run, device)
    head, _ = eval_linear.probe_lbfgs(encoder, train_set, run, probe, device)
    result = measure(encoder, head, test_set, run, device)
    result["machine"] = sacl.describe_machine(device, sacl.precision(run, device))
    sacl.write(Path(run_dir, f"shifts-{which}.json"), json.dumps(result, indent=1).encode())
    return result


def recalibrate(encoder: nn.Module, data: Images, run: Config, device: torch.device) -> nn.Module:
    """A copy whose BatchNorm statistics are averages over the unaugmented training images.

    In training the online encoder only sees cells of a quarter of the image.
    """
    encoder = copy.deepcopy(encoder).train()
    for norm in (m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over batches
    for index in torch.arange(len(data.labels)).split(500):
        encoder(sacl.eval_view(sacl.take(data.pixels, index, device), run.image_size))
    return encoder.eval()


def measure(encoder, head, data: Images, run: Config, device) -> dict:
    """Top-1 on every shift of the test images; of shapes, the shares of conflicting cues."""

    @torch.no_grad()
    def classify(x: Tensor) -> Tensor:
        with sacl.autocast(device, sacl.precision(run, device)):
            features = encoder(sacl.normalize(as_floats(x))).float()
        return head(features).argmax(1).cpu()

    def batches(some: Images) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.arange(len(some.labels)).split(500):
            yield index, as_evaluated(sacl.take(some.pixels, index, device), run.image_size)

    right: dict[str, int] = {}
    for index, x in batches(data):
        for name, shifted in shifts_of(x, int(index[0])):
            hits = (classify(shifted) == data.labels[index]).sum().item()
            right[name] = right.get(name, 0) + hits
    top1 = {name: round(100 * hits / len(data.labels), 2) for name, hits in right.items()}
    levels = {name: [top1.pop(f"{name} {s}") for s in range(1, 6)] for name in AMOUNTS}
    mean = sum(map(sum, levels.values())) / (5 * len(levels))
    result = {**top1, "corruption_mean": round(mean, 2), "corruptions": levels}
    if run.dataset == "shapes":
        both = conflict_images(run.seed)
        result["conflict"] = cue_shares(torch.cat([classify(x) for _, x in batches(both)]), both)
    for name, figure in result.items():
        print(f"  {name} {figure}", flush=True)
    return result


def shifts_of(x: Tensor, first: int) -> Iterator[tuple[str, Tensor]]:
    """Names and shifted images of a batch whose first image stands at place `first`."""

    def generator(name: str) -> Generator:
        return Generator().manual_seed(zlib.crc32(f"0 {name} {first}".encode()))

    yield "plain", x
    side = x.shape[-1]
    if side <= (96 if x.device.type == "cuda" else 64):  # larger ones take seconds each
        yield "texture", texture_views(x, generator=generator("texture"))
    for n in (2, 4):
        if side % n == 0:
            yield f"shuffle_{n}x{n}", shuffle_patches(x, n, generator(f"shuffle {n}"))
    yield "low_pass", as_bytes(blur(as_floats(x), side / 16))
    yield "silhouette", silhouette(x)
    for key in (f"{name} {severity}" for name in AMOUNTS for severity in range(1, 6)):
        yield key, corrupt(x, key.split()[0], int(key.split()[1]), generator(key))


def conflict_images(seed: int) -> Images:
    """Drawn images whose shape and texture are of two classes; a label is 10 * shape + texture."""
    return sacl.in_memory(*sacl.beside("shapes").draw(1000, 2, seed))


def cue_shares(named: Tensor, data: Images) -> dict:
    """How often the class of the shape, and of the texture, was named, (N,), in per cent."""
    k = len(data.classes)
    shape, texture = named == data.labels // k, named == data.labels % k
    either = shape | texture
    share = sacl.percent(shape[either]) if either.any() else None
    figures = {"shape": sacl.percent(shape), "texture": sacl.percent(texture)}
    return {**figures, "shape_share": share, "images": len(data.labels)}


# ------------------------------------------------------------ the shifts


def shuffle_patches(x: Tensor, n: int, generator: Generator) -> Tensor:
    """The n x n patches of each image in a random order; n = 1 is the image."""
    patches = sacl.split(x, n).transpose(0, 1)  # (N, n n, 3, h, w)
    order = torch.rand(len(x), n * n, generator=generator).argsort(1).to(x.device)
    patches = patches[torch.arange(len(x), device=x.device)[:, None], order]
    patches = patches.unflatten(1, (n, n)).permute(0, 3, 1, 4, 2, 5)  # (N, 3, n, h, n, w)
    return patches.flatten(4, 5).flatten(2, 3)


def silhouette(x: Tensor) -> Tensor:
    """Black where luma, low-passed and cut by Otsu's threshold, is not as most of the border."""
    grey = as_bytes(blur(sacl.luma(as_floats(x)), x.shape[-1] / 32)).flatten(1).long()  # (N, S S)
    count = torch.zeros(len(x), 256, device=x.device)
    count.scatter_add_(1, grey, torch.ones_like(grey, dtype=torch.float32))
    level = torch.arange(256.0, device=x.device)
    below, total = count.cumsum(1), (count * level).cumsum(1)  # pixels up to each level, their sum
    mean = total[:, -1:] / below[:, -1:]
    # Otsu 1979: the variance between the two classes, up to a factor
    between = (mean * below - total).square() / (below * (below[:, -1:] - below)).clamp(min=1)
    bright = (grey > between.argmax(1, keepdim=True)).view_as(x[:, 0])
    border = torch.cat([bright[:, 0], bright[:, -1], bright[:, :, 0], bright[:, :, -1]], 1)
    ground = bright == (border.float().mean(1) > 0.5)[:, None, None]
    return (ground * 255).byte()[:, None].expand_as(x).contiguous()


def corrupt(x: Tensor, name: str, severity: int, generator: Generator) -> Tensor:
    """One of AMOUNTS; severity 0 leaves the image as it is."""
    amount, side, x = AMOUNTS[name][severity], x.shape[-1], as_floats(x)
    match name:
        case "noise":
            x = x + amount * torch.randn(x.shape, generator=generator).to(x.device)
        case "blur":
            x = blur(x, amount * side / 32)
        case "contrast":
            mean = sacl.luma(x).mean((2, 3), keepdim=True)
            x = mean + amount * (x - mean)
        case "brightness":
            x = x + amount
        case "pixelate":
            fewer = max(1, round(amount * side / 32))
            x = F.interpolate(x, size=fewer, mode="bilinear", antialias=True)
            x = F.interpolate(x, size=side, mode="nearest-exact")
        case "jpeg":
            x = quantise(x, amount / 255)
    return as_bytes(x)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (N, C, S, S) with mirrored edges; sigma in pixels, 0 is none."""
    reach = min(math.ceil(3 * sigma), x.shape[-1] - 1)
    at = torch.arange(-reach, reach + 1.0, device=x.device)
    weight = torch.exp(-(at**2) / (2 * max(sigma, 1e-3) ** 2))
    weight = weight / weight.sum()
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        pad = (0, 0, reach, reach) if shape[2] < 0 else (reach, reach, 0, 0)
        kernel = weight.view(shape).expand(x.shape[1], -1, -1, -1)
        x = F.conv2d(F.pad(x, pad, mode="reflect"), kernel, groups=x.shape[1])
    return x


def quantise(x: Tensor, step: float) -> Tensor:
    """JPEG's loss without its coder: 8 x 8 cosine transforms of YCbCr, rounded to multiples.

    ours: of (1 + u + v) step at frequency (u, v), alike for luma and chroma, not halved in size.
    """
    side, k = x.shape[-1], torch.arange(8.0, device=x.device)
    x = F.pad(x, (0, -side % 8, 0, -side % 8), mode="replicate")
    y = sacl.luma(x)
    x = torch.cat([y, (x[:, 2:] - y) / 1.772, (x[:, :1] - y) / 1.402], 1)  # Y, Cb, Cr
    dct = (math.pi / 8 * k[:, None] * (k + 0.5)).cos() / 2
    dct[0] /= 2**0.5  # orthonormal
    blocks = x.unfold(2, 8, 8).unfold(3, 8, 8)  # (N, 3, rows, columns, 8, 8)
    steps = ((1 + k + k[:, None]) * step).clamp(min=1e-6)
    coefficients = (dct @ blocks @ dct.T / steps).round() * steps
    x = (dct.T @ coefficients @ dct).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    y, cb, cr = x[:, :1], x[:, 1:2], x[:, 2:]
    r, b = y + 1.402 * cr, y + 1.772 * cb
    return torch.cat([r, (y - 0.299 * r - 0.114 * b) / 0.587, b], 1)[..., :side, :side]


def as_evaluated(x: Tensor, size: int) -> Tensor:
    """What sacl.eval_view shows of uint8 images, not normalised: (N, 3, size, size), uint8."""
    side = sacl.stored_side(size)
    if x.shape[-1] != side:
        x = as_bytes(F.interpolate(as_floats(x), size=side, mode="bilinear", antialias=True))
    edge = (side - size) // 2
    return x[..., edge : edge + size, edge : edge + size]


def as_floats(x: Tensor) -> Tensor:
    return x.float() / 255


def as_bytes(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().byte()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("shifts.py", allow_abbrev=False)
    parser.add_argument("run", help="a run's folder")
    # recalibrated: the online one, with BatchNorm statistics of whole images
    parser.add_argument("--encoder", choices=("online", "recalibrated", "target"), default="online")
    parser.add_argument("--data-dir", default="", help="[the run's own]")
    args = parser.parse_args(argv)
    sacl.command("shifts.py", lambda: evaluate(args.run, args.encoder, args.data_dir))


if __name__ == "__main__":
    main()
