"""What texture.py costs and what its textures are, on CIFAR-100.

    OMP_NUM_THREADS=1 python bench/texture.py --data-dir data --json texture.json

speed    processor seconds of images of 32 px, and of larger ones, which the bank is for; where
         there is a GPU, its milliseconds too
quality  100 times the sliced Wasserstein distance of 5 x 5 patches to the two source patches
         (lower: the same texture); that the layout is gone is tested in tests/test_texture.py
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sacl
from bench.plot import table
from bench.shifts import shuffle_patches
from texture import synthesize, texture_views, two_patches

BATCH = 128
# side in pixels, window, seeds, images; seeds as by default, but for one as in the paper
SPEED = ((32, 5, 3, BATCH), (32, 7, 3, BATCH), (32, 11, 3, BATCH), (32, 5, 1, BATCH),
         (96, 7, 5, 4), (224, 7, 8, 1))  # fmt: skip


def speed(images: Tensor) -> list[dict]:
    rows = []
    for side, window, seeds, count in SPEED:
        x = F.interpolate(images[:count].float(), side, mode="bicubic").clamp(0, 255).byte()
        options = dict(window=window, seeds=seeds)
        times = median_times(x, repeats=7 if side == 32 else 3, **options)
        rows.append(options | dict(side=side, images=count, seconds=times[0]))
        if torch.cuda.is_available():
            rows[-1]["GPU ms"] = 1e3 * median_times(x.cuda(), repeats=20, **options)[1]
    return rows


def median_times(x: Tensor, repeats: int, **options) -> list[float]:
    """Processor seconds and wall seconds of the textures; one time before warms caches up."""
    taken = []
    for _ in range(repeats + 1):
        began = time.process_time(), time.perf_counter()
        texture_views(x, generator=seeded(), **options)
        torch.cuda.synchronize() if x.is_cuda else None
        taken.append((time.process_time() - began[0], time.perf_counter() - began[1]))
    return [statistics.median(times) for times in zip(*taken[1:], strict=True)]


def seeded() -> Generator:
    return Generator().manual_seed(0)


def quality(images: Tensor) -> list[dict]:
    """Each row is the mean over disjoint batches of 128 images."""
    results: dict[str, list[float]] = {}
    g = seeded()
    for batch in images.split(BATCH):
        sources, made = two_patches(batch, 14, g), {}
        for seeds in (1, 2, 3):
            name = f"texture.py, {seeds} x {seeds} seeds"
            made[name] = synthesize(sources, 32, seeds=seeds, generator=g)
        made["patches of 8 px shuffled"] = shuffle_patches(batch, 4, g)
        made["control: texture of another image"] = made[name].roll(1, 0)
        made["control: the image itself"] = batch
        for name, out in made.items():
            distance = 100 * sliced_wasserstein(out[:, None] / 255, sources / 255).mean().item()
            results.setdefault(name, []).append(distance)
    return [{"method": name, "100 swd": statistics.mean(x)} for name, x in results.items()]


def sliced_wasserstein(a: Tensor, b: Tensor) -> Tensor:
    """W1 between the 5 x 5 patches of two sets of pictures (B, n, 3, h, w), over 64 directions."""
    direction = F.normalize(torch.randn(75, 64, generator=seeded()), dim=0)
    patches = [x.unfold(3, 5, 1).unfold(4, 5, 1).permute(0, 1, 3, 4, 2, 5, 6) for x in (a, b)]
    along = [x.flatten(4).flatten(1, 3) @ direction for x in patches]  # (B, patches, 64) each
    a, b = (torch.quantile(x, torch.linspace(0, 1, 200), dim=1) for x in along)
    return (a - b).abs().mean((0, 2))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("texture.py", allow_abbrev=False)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--images", type=int, default=3 * BATCH, help="for the table of quality")
    parser.add_argument("--json", help="write everything here")
    args = parser.parse_args(argv)
    sacl.command("texture.py", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    pixels = sacl.load_data(sacl.Config(dataset="cifar100", data_dir=args.data_dir), "train").pixels
    pixels = pixels[torch.randperm(len(pixels), generator=seeded())[: args.images]]
    report = dict(speed=speed(pixels), quality=quality(pixels))
    for name, rows in report.items():
        print(f"\n{name}\n\n{table(rows)}", flush=True)
    report |= vars(args) | dict(machine=sacl.describe_machine(sacl.choose_device(), torch.float32))
    if args.json:
        sacl.write(Path(args.json), json.dumps(report, indent=1).encode())


if __name__ == "__main__":
    main()
