"""What texture.py costs and what its textures are, on CIFAR-100.

    OMP_NUM_THREADS=1 python bench/texture.py --data-dir data --json results/texture-cifar100.json

speed    processor seconds for 128 images, and the ratio to the bare matrix products inside; where
         there is a GPU, its milliseconds too
larger   processor seconds for one image of 96 px and more, which the bank is for
quality  swd: sliced Wasserstein distance of 5 x 5 patches to the two source patches (lower: the
         same texture); correlation with the image itself and with others (equal: layout gone)
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sacl
import texture as tx
from bench.shifts import shuffle_patches
from bench.step import table

BATCH = 128


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


# ------------------------------------------------------------ speed


def processor_seconds(job, repeats: int = 7) -> float:
    """The median over repetitions; one before them warms caches up."""
    taken = []
    for _ in range(repeats + 1):
        began = time.process_time()
        job()
        taken.append(time.process_time() - began)
    return statistics.median(taken[1:])


def gpu_ms(job, repeats: int = 20) -> float:
    job()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        job()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / repeats


def speed(images: Tensor) -> list[dict]:
    """A row for each window and number of seeds."""
    rows = []
    for window, seeds in ((5, 3), (7, 3), (11, 3), (5, 1), (7, 1), (11, 1)):

        def textures(x: Tensor, window=window, seeds=seeds) -> Tensor:
            return tx.texture_views(x, window=window, seeds=seeds, generator=seeded())

        pixels = tx.fill_schedule(32, 32, window, seeds).level.flatten().bincount().tolist()[1:]
        with mock.patch.object(tx, "grow", wraps=tx.grow) as grow:
            textures(images)
        chunks = [len(call.args[0]) for call in grow.call_args_list]
        bare = processor_seconds(products(chunks, pixels, window))
        seconds = processor_seconds(lambda job=textures: job(images))
        row = dict(window=window, seeds=seeds, levels=len(pixels), seconds=seconds)
        rows.append(row | {"ratio": seconds / bare})
        if torch.cuda.is_available():
            x = images.cuda()
            rows[-1]["GPU ms"] = gpu_ms(lambda job=textures, x=x: job(x))
    return rows


def products(chunks: list[int], pixels: list[int], window: int):
    """Only the matrix products: the same shapes and chunks of images, with nothing between."""
    offers = (window**2 - 1) * 4
    windows = torch.rand(max(chunks), offers, 2 * 14 * 14)
    known = {p: torch.rand(max(chunks), p, offers) for p in set(pixels)}

    def job() -> None:
        for b in chunks:
            for p in pixels:
                torch.bmm(known[p][:b], windows[:b])

    return job


def larger(images: Tensor) -> list[dict]:
    """Of enlarged images."""
    rows = []
    for side, window, count in ((96, 5, 4), (96, 7, 4), (96, 11, 4), (112, 7, 2), (224, 7, 1)):
        x = F.interpolate(images[:count].float(), (side, side), mode="bicubic").clamp(0, 255).byte()

        def job(x=x, window=window) -> Tensor:
            return tx.texture_views(x, window=window, generator=seeded())

        rows.append(dict(side=side, window=window, seconds=processor_seconds(job, 3) / count))
    return rows


# ------------------------------------------------------------ quality


def quality(images: Tensor, seed: int) -> list[dict]:
    """Each row is the mean over disjoint batches of 128 images."""
    results: dict[str, list[dict]] = {}
    g = seeded(seed)
    for batch in images.split(BATCH):
        sources, made = tx.two_patches(batch, 14, g), {}
        for window, seeds in ((5, 1), (5, 2), (5, 3), (7, 1), (7, 3)):
            name = f"texture.py, window {window}, {seeds} x {seeds} seeds"
            made[name] = tx.synthesize(sources, 32, window=window, seeds=seeds, generator=g)
        made["patches of 8 px shuffled"] = shuffle_patches(batch, 4, g)
        made["control: pixels shuffled"] = shuffle_patches(batch, 32, g)
        made["control: texture of another image"] = made[name].roll(1, 0)
        made["control: the image itself"] = batch
        for name, out in made.items():
            results.setdefault(name, []).append(judge(out / 255, batch / 255, sources / 255))
    return [
        {"method": name} | {key: statistics.mean(part[key] for part in parts) for key in parts[0]}
        for name, parts in results.items()
    ]


def judge(out: Tensor, images: Tensor, sources: Tensor) -> dict[str, float]:
    """Figures of textures (B, 3, H, W) of images, and of patches (B, n, 3, s, s); in [0, 1]."""
    grey = [x.mean(1).flatten(1) for x in (out, images)]  # in colour, a red image resembles itself
    flat = [F.normalize(x - x.mean(1, keepdim=True), dim=1) for x in grey]
    ncc, b = flat[0] @ flat[1].T, len(out)
    distance = 100 * sliced_wasserstein(out[:, None], sources).mean().item()
    own, others = ncc.diagonal().mean().item(), (ncc.sum() - ncc.trace()).item() / (b * (b - 1))
    return {"100 swd": distance, "with itself": own, "with others": others}


def sliced_wasserstein(a: Tensor, b: Tensor) -> Tensor:
    """W1 between the 5 x 5 patches of two sets of pictures (B, n, 3, h, w), over 64 directions."""
    direction = F.normalize(torch.randn(75, 64, generator=seeded()), dim=0)
    patches = [x.unfold(3, 5, 1).unfold(4, 5, 1).permute(0, 1, 3, 4, 2, 5, 6) for x in (a, b)]
    along = [x.flatten(4).flatten(1, 3) @ direction for x in patches]  # (B, patches, 64) each
    a, b = (torch.quantile(x, torch.linspace(0, 1, 200), dim=1) for x in along)
    return (a - b).abs().mean((0, 2))


# ------------------------------------------------------------ report


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("texture.py", allow_abbrev=False)
    parser.add_argument("--dataset", default="cifar100", help="as in sacl.py, of 32 px")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--images", type=int, default=3 * BATCH, help="for the table of quality")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write everything here")
    args = parser.parse_args(argv)
    sacl.command("texture.py", lambda: run(args))


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    cfg = sacl.Config(dataset=args.dataset, data_dir=args.data_dir, image_size=32)
    pixels = sacl.load_data(cfg, "train").pixels
    pixels = pixels[torch.randperm(len(pixels), generator=seeded(args.seed))[: args.images]]
    report = dict(speed=speed(pixels[:BATCH]), larger=larger(pixels))
    report["quality"] = quality(pixels, args.seed)
    for name, rows in report.items():
        print(f"\n{name}\n\n{table(rows)}", flush=True)
    report |= vars(args) | dict(machine=sacl.describe_machine(torch.device("cpu"), torch.float32))
    if args.json:
        sacl.write(Path(args.json), json.dumps(report, indent=1).encode())


if __name__ == "__main__":
    main()
