"""What texture.py costs and what its textures are, on CIFAR-100 (generated images without it).

    OMP_NUM_THREADS=1 python bench/texture.py --data-dir data --json results/texture-cifar100.json

speed    CPU seconds of one thread for 128 images, and the ratio to the bare products inside
memory   growth of the process for 512 images, against chunk_bytes
quality  5 x 5 statistics against the two source patches (lower = same texture), correlation with
         the image itself and with other images (equal = layout gone), for texture.py, for block
         quilting (Efros & Freeman, SIGGRAPH 2001) and for patch shuffling (Ge et al., NeurIPS 2021)
cuda     where there is a GPU: ms for 128 images, eager and as a CUDA graph; no host waits
"""

import argparse
import datetime
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sacl
import texture as tx

BATCH = 128


# ------------------------------------------------------------ Speed and memory
def cpu_seconds(job, repeats: int = 11) -> tuple[float, float]:
    """Median and least CPU time of the process; the first run warms caches up.

    CPU time, but neighbours on the machine still slow it down through cache and memory.
    """
    job()
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        job()
        taken.append(time.process_time() - began)
    return statistics.median(taken), min(taken)


def bare_products(sources: Tensor, window: int, seeds: int):
    """Only the matrix products of `synthesize`: same shapes, same chunks, nothing between."""
    chunks, grow = [], tx.grow
    tx.grow = lambda some, *rest: chunks.append(len(some)) or grow(some, *rest)
    tx.synthesize(sources, 32, window=window, seeds=seeds, generator=generator())
    tx.grow = grow
    _, n, c, s, _ = sources.shape
    inner = (window**2 - 1) * (c + 1)
    windows = torch.rand(max(chunks), inner, n * s * s)
    pixels = tx.fill_schedule(32, 32, window, seeds).level.flatten().bincount().tolist()[1:]
    known = {p: torch.rand(max(chunks), p, inner) for p in set(pixels)}

    def job() -> None:
        for b in chunks:
            for p in pixels:
                torch.bmm(known[p][:b], windows[:b])

    return job


def speed(images: Tensor) -> list[dict]:
    rows = []
    centre = images[:, None, :, 8:24, 8:24]  # one 16 x 16 sample: the job of the public programs
    jobs = [("two 14 -> 32", tx.two_patches(images, 14, generator()), k) for k in (3, 1)]
    for name, sources, seeds in [*jobs, ("one 16 -> 32", centre, 1)]:
        for window in (5, 7, 11):
            options = dict(window=window, seeds=seeds, generator=generator())
            levels = int(tx.fill_schedule(32, 32, window, seeds).level.max())
            row = dict(job=name, window=window, seeds=seeds, levels=levels)
            rows.append(row | timed(functools.partial(tx.synthesize, sources, 32, **options)))
            bare, _ = cpu_seconds(bare_products(sources, window, seeds))
            rows[-1] |= dict(products=bare, ratio=rows[-1]["seconds"] / bare)
    row = rows[0] | timed(functools.partial(tx.texture_views, images, generator=generator()))
    return [*rows, row | dict(job="texture_views", ratio=row["seconds"] / row["products"])]


def timed(job) -> dict:
    seconds, least = cpu_seconds(job)
    return dict(seconds=seconds, least=least)


def larger(images: Tensor) -> list[dict]:
    """CPU seconds of one thread an image: enlarged images, for which there is the bank."""
    rows = []
    for side, windows, count in ((96, (5, 7, 11), 4), (112, (7,), 2), (224, (7,), 1)):
        some = F.interpolate(images[:count].float(), (side, side), mode="bicubic").clamp(0, 255)
        for window in windows:
            options = dict(window=window, generator=generator())
            job = functools.partial(tx.texture_views, some.byte(), **options)
            rows.append(dict(side=side, window=window, seconds=cpu_seconds(job, 3)[0] / count))
    return rows


def memory() -> list[dict]:
    """Peak resident memory over what it was before, each in a process of its own."""
    code = """if True:
        import sys, torch, texture
        def status(key):
            return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith(key))
        images = torch.randint(256, (512, 3, 32, 32), dtype=torch.uint8)
        texture.texture_views(images[:1], chunk_bytes=1)
        open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
        before = status("VmRSS")
        texture.texture_views(images, chunk_bytes=int(sys.argv[1]))
        print((status("VmHWM") - before) / 1024)"""
    rows = []
    if not Path("/proc/self/clear_refs").exists():  # Linux only
        return [dict(chunk_mib="-", grown_mib="not measured on this system")]
    for mib in (2, 8, 32, 128):
        line = [sys.executable, "-c", code, str(mib * 2**20)]
        env = os.environ | {"PYTHONPATH": str(Path(tx.__file__).parent)}
        grown = subprocess.run(line, env=env, capture_output=True, text=True, check=True).stdout
        rows.append(dict(chunk_mib=mib, grown_mib=float(grown)))
    return rows


# ------------------------------------------------------------ Baselines
def quilt(sources: Tensor, out: int, g: torch.Generator, block=8, overlap=2, eps=0.1) -> Tensor:
    """Block quilting: blocks that agree on the overlap, joined along the cheapest seam."""
    b, n, c, s, _ = sources.shape
    blocks = sources.unfold(3, block, 1).unfold(4, block, 1).permute(0, 1, 3, 4, 2, 5, 6)
    blocks = blocks.reshape(b, -1, c, block, block)  # (b, L, c, block, block)
    canvas = sources.new_zeros(b, c, out, out)
    each, step = torch.arange(b), block - overlap
    for y in range(0, out - overlap, step):
        for x in range(0, out - overlap, step):
            place = canvas[:, :, y : y + block, x : x + block]
            over = torch.zeros(block, block)
            over[:overlap] += y > 0
            over[:, :overlap] += x > 0
            gap = (blocks - place[:, None]).square().sum(2)  # (b, L, block, block)
            error = (gap * over.clamp(max=1)).sum((2, 3))
            good = error <= (1 + eps) * error.amin(1, keepdim=True) + 1e-6
            pick = (good * torch.rand(error.shape, generator=g)).argmax(1)
            new, gap = blocks[each, pick], gap[each, pick]
            old = torch.zeros(b, block, block, dtype=torch.bool)  # where the canvas stays
            if x > 0:
                old[:, :, :overlap] |= before_seam(gap[:, :, :overlap])
            if y > 0:
                old[:, :overlap] |= before_seam(gap[:, :overlap].mT).mT
            canvas[:, :, y : y + block, x : x + block] = torch.where(old[:, None], place, new)
    return canvas


def before_seam(gap: Tensor) -> Tensor:
    """(b, length, overlap): True on the near side of the cheapest path down the overlap."""
    cost = [gap[:, 0]]
    for row in gap.unbind(1)[1:]:
        near = F.pad(cost[-1], (1, 1), value=float("inf")).unfold(1, 3, 1).amin(2)
        cost.append(row + near)
    at = cost[-1].argmin(1)
    path = [at]
    for row in cost[-2::-1]:
        near = F.pad(row, (1, 1), value=float("inf")).unfold(1, 3, 1)
        at = at + near[torch.arange(len(at)), at].argmin(1) - 1
        path.append(at)
    path = torch.stack(path[::-1], 1)  # (b, length)
    return torch.arange(gap.shape[2]) < path[..., None]


def shuffle_patches(images: Tensor, g: torch.Generator, size: int = 8) -> Tensor:
    """Patches from random places of the whole image, side by side."""
    b, c, h, w = images.shape
    places = images.unfold(2, size, 1).unfold(3, size, 1)
    count = (h // size, w // size)
    y = torch.randint(h - size + 1, (b, *count), generator=g)
    x = torch.randint(w - size + 1, (b, *count), generator=g)
    tiles = places[torch.arange(b)[:, None, None], :, y, x]  # (b, rows, cols, c, size, size)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


# ------------------------------------------------------------ Quality
def patches5(x: Tensor) -> Tensor:
    """All 5 x 5 patches of images (b, n, c, h, w): (b, count, 25 c)."""
    x = x.unfold(3, 5, 1).unfold(4, 5, 1).permute(0, 1, 3, 4, 2, 5, 6)
    return x.flatten(4).flatten(1, 3)


def sliced_wasserstein(a: Tensor, b: Tensor, g: torch.Generator) -> Tensor:
    """100 x the mean over 64 directions of W1 between two sets of 5 x 5 patches, per image."""
    direction = F.normalize(torch.randn(75, 64, generator=g), dim=0)
    quantiles = torch.linspace(0, 1, 200)
    a, b = (torch.quantile(patches5(x) @ direction, quantiles, dim=1) for x in (a, b))
    return 100 * (a - b).abs().mean((0, 2))


def gram(x: Tensor, g: torch.Generator) -> Tensor:
    """Second moments of 64 random 5 x 5 filters + ReLU: (b, n, c, h, w) -> (b, 64 x 64)."""
    filters = F.normalize(torch.randn(75, 64, generator=g), dim=0)
    x = patches5(x)
    x = ((x - 0.5) @ filters).relu()
    return (x.mT @ x / x.shape[1]).flatten(1)


def judge(out: Tensor, images: Tensor, sources: Tensor) -> dict:
    """All figures of one set of textures; uint8 or float in [0, 1]."""
    out, images, sources = (
        x / 255 if x.dtype == torch.uint8 else x for x in (out, images, sources)
    )
    mine, theirs = gram(out[:, None], generator()), gram(sources, generator())
    grey = [x.mean(1).flatten(1) for x in (out, images)]  # in colour, a red image resembles itself
    flat = [F.normalize(x - x.mean(1, keepdim=True), dim=1) for x in grey]
    ncc, b = flat[0] @ flat[1].T, len(out)
    own = torch.arange(b)
    return dict(
        swd=sliced_wasserstein(out[:, None], sources, generator()).mean().item(),
        gram=((mine - theirs).norm(dim=1) / theirs.norm(dim=1)).mean().item(),
        ncc_own=ncc.diagonal().mean().item(),
        ncc_others=((ncc.sum() - ncc.trace()) / (b * (b - 1))).item(),
        found_by_pixels=(ncc.argmax(1) == own).float().mean().item(),
        found_by_gram=(torch.cdist(mine, theirs).argmin(1) == own).float().mean().item(),
    )


def quality(images: Tensor, seed: int) -> list[dict]:
    """Each row is the mean over disjoint batches of 128 images, and the spread over them."""
    g = generator(seed)
    results: dict[str, list[dict]] = {}
    for batch in images.split(BATCH):
        sources = tx.two_patches(batch, 14, g)
        made = {}
        for window, seeds in ((5, 1), (5, 2), (5, 3), (7, 1), (7, 3)):
            name = f"texture.py, window {window}, {seeds} x {seeds} seeds"
            made[name] = tx.synthesize(sources, 32, window=window, seeds=seeds, generator=g)
        made["block quilting 8, overlap 2"] = quilt(sources / 255, 32, g)
        made["patch shuffle 8 (of the whole image)"] = shuffle_patches(batch, g)
        order = torch.rand(len(batch), 32 * 32, generator=g).argsort(1)[:, None].expand(-1, 3, -1)
        made["control: pixels shuffled"] = batch.flatten(2).gather(2, order).view_as(batch)
        made["control: texture of another image"] = list(made.values())[2].roll(1, 0)
        made["control: the image itself"] = batch
        for name, out in made.items():
            results.setdefault(name, []).append(judge(out, batch, sources))
    rows = []
    for name, parts in results.items():
        columns = {key: [part[key] for part in parts] for key in parts[0]}
        row = {key: statistics.mean(values) for key, values in columns.items()}
        spread = {f"{key}_sd": statistics.pstdev(values) for key, values in columns.items()}
        rows.append(dict(method=name) | row | spread)
    return rows


# ------------------------------------------------------------ CUDA (written, not run: no GPU here)
def cuda(images: Tensor) -> list[dict]:
    """ms for one batch of 128: `texture_views` eager, `grow` eager, `grow` as a CUDA graph."""
    images = images.cuda()
    rows = []
    for window, seeds in ((5, 3), (7, 3), (5, 1)):
        sources = tx.two_patches(images, 14, generator())
        schedule = tx.fill_schedule(32, 32, window, seeds)
        start = tx.draw_seeds(schedule, sources, generator())
        number = torch.randperm(2 * 14 * 14 + 32 * 32, generator=generator()).cuda()
        steps = tx.levels(schedule.level, window, images.device, torch.float32)
        colours = sources.float() / 255
        room = colours.new_empty(BATCH, (window**2 - 1) * 4, 2 * 14 * 14)

        def grow(c=colours, s=start, n=number, steps=steps, w=window, r=room) -> Tensor:
            with tx.exact_products(images.device):
                return tx.grow(c, s, n, steps, r, w, 0, 0.1)

        expected = grow()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            grow()  # raises if anything in it waits for the device
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            grow()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            captured = grow()
        graph.replay()
        torch.cuda.synchronize()
        views = dict(window=window, seeds=seeds, generator=generator())
        jobs = dict(
            texture_views_ms=lambda o=views: tx.texture_views(images, **o),
            grow_ms=grow,
            graph_ms=graph.replay,
        )
        times = {name: cuda_ms(job) for name, job in jobs.items()}
        same = {"graph equals eager": torch.equal(captured, expected)}
        rows.append(dict(window=window, seeds=seeds) | times | same)
    return rows


def cuda_ms(job, repeats: int = 50) -> float:
    job()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        job()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / repeats


# ------------------------------------------------------------ Report
def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pick_images(data_dir: str | None, count: int) -> tuple[Tensor, str]:
    """Training images spread over all classes, or generated ones where there is no data."""
    try:
        folder = tx.load("cifar100", data_dir or "data", None)
    except ValueError:
        coarse = torch.rand(count, 3, 6, 6, generator=generator())
        x = F.interpolate(coarse, (32, 32), mode="bilinear", align_corners=True)
        x = 0.8 * x + 0.2 * torch.rand(x.shape, generator=generator(1))
        return (255 * x).byte(), "generated blobs with noise"
    # any stride prime to the number of images visits all classes
    some = [(i * 7919) % len(folder) for i in range(count)]
    return torch.cat([folder[i : i + 1] for i in some]), "CIFAR-100, training images"


def table(title: str, rows: list[dict]) -> None:
    columns = [key for key in rows[0] if not key.endswith("_sd")]
    cells = [
        [f"{r[k]:.3f}" if isinstance(r[k], float) else str(r[k]) for k in columns] for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(f"\n{title}")
    for line in [columns, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", help="holds cifar100/train/<class>/*.png")
    parser.add_argument("--images", type=int, default=3 * BATCH, help="for the quality table")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write everything here")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    images, what = pick_images(args.data_dir, args.images)
    machine = sacl.describe_machine(torch.device("cpu"), torch.float32)
    report = dict(
        command="python bench/texture.py " + " ".join(argv or sys.argv[1:]),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        seed=args.seed,
        images=what,
        n=args.images,
        hardware=machine["cpu"] + ", one thread",
        torch=torch.__version__,
        load_average_before=os.getloadavg()[0],
        speed=speed(images[:BATCH]),
        larger=larger(images),
        memory=memory(),
        quality=quality(images, args.seed),
    )
    table(
        f"CPU seconds for {BATCH} images ({report['hardware']}, torch {torch.__version__})",
        report["speed"],
    )
    table("CPU seconds for one larger image", report["larger"])
    table("memory for 512 images", report["memory"])
    table(f"quality, {args.images} images: {what}", report["quality"])
    if torch.cuda.is_available():
        report |= dict(gpu=torch.cuda.get_device_name(), cuda=cuda(images[:BATCH]))
        table(f"ms for {BATCH} images on {report['gpu']}", report["cuda"])
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
