"""Texture images by non-parametric sampling (Efros & Leung, ICCV 1999): exact, a batch at once.

    images  -> two_patches    -> sources   the centre and a random place   (B, n, C, s, s)
    sources -> neighbourhoods -> windows   what every candidate offers     (B, K (C+1), S)
    fill_schedule             -> level     0 = seed, then who fills when   (H, W)
    per level: what is known around its P pixels                           (B, P, K (C+1))
               times windows  -> distance  of each pixel to each candidate (B, P, S)   one bmm
               one of the candidates within (1 + eps) of the best gives its centre pixel
    the chosen positions, gathered from the sources -> textures            (B, C, H, W)

    B images, n patches of C x s x s each, S = n s^2 candidates, K = window^2 - 1 neighbours.

The paper fills one pixel after another. But its order depends on which pixels are filled, never on
their colours, so all B images share it; and two pixels further apart than half a window do not see
each other, so they can be filled together with the very result of one after the other.

Picture   python texture.py --dataset cifar100 --data-dir data --show 8 --out textures.png
Your own  python texture.py IMAGE... --size 128 --window 11
Bank      python texture.py bank --dataset stl10 --data-dir data --textures 4 --out bank.npy
Python    textures = texture_views(images, generator=torch.Generator().manual_seed(0))
"""

import argparse
import contextlib
import functools
import json
import math
import os
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

SEED = 3  # the paper starts from a 3x3 block of the sample
TOLERANCE = 5e-7  # float32 rounding of a mean squared difference of colours in [0, 1]
OUTSIDE = 1e12  # squared "colour" outside the sample: no window that needs it is a candidate


# ------------------------------------------------------------ 1. The method
def texture_views(
    images: Tensor,
    *,
    patch: int | None = None,
    seeds: int | None = None,
    generator: Generator | None = None,
    **options,
) -> Tensor:
    """A texture of every image, grown from two of its patches: (B, C, H, W) -> (B, C, H, W).

    `images` uint8, or float in [0, 1]; dtype and device are kept. `patch` as in `two_patches`;
    `seeds` as in `synthesize`, but by default 3 for 32 px, 5 for 96, 8 for 224. `options` are those
    of `synthesize`. ValueError names a bad argument.
    """
    sources = two_patches(images, patch, generator)
    # ours: one seed, as in the paper, copies the object's layout; a lattice of seeds destroys it
    seeds = max(1, round(0.53 * min(images.shape[2:]) ** 0.5)) if seeds is None else seeds
    return synthesize(sources, images.shape[2:], seeds=seeds, generator=generator, **options)


def two_patches(images: Tensor, size: int | None, generator: Generator | None = None) -> Tensor:
    """The centre and one random patch: (B, C, H, W) -> (B, 2, C, size, size), any dtype and device.

    `size` in pixels; None is 0.43 of the shorter side (Ge et al., NeurIPS 2021: 96 of 224).
    ValueError when `images` is no batch, or the patch does not fit in it.
    """
    require(isinstance(images, Tensor) and images.ndim == 4, "images must be a tensor (B, C, H, W)")
    require(images.numel() > 0, f"images of shape {tuple(images.shape)} are empty")
    size = round(0.43 * min(images.shape[2:])) if size is None else size
    fits = is_int(size) and 1 <= size <= min(images.shape[2:])
    require(fits, f"patch size={size!r} does not fit in images of shape {tuple(images.shape)}")
    room_y, room_x = (side - size for side in images.shape[2:])
    y, x = (
        draw(room + 1, (len(images),), generator).to(images.device) for room in (room_y, room_x)
    )
    places = images.unfold(2, size, 1).unfold(3, size, 1)  # (B, C, room_y + 1, room_x + 1, s, s)
    each = torch.arange(len(images), device=images.device)
    return torch.stack([places[:, :, room_y // 2, room_x // 2], places[each, :, y, x]], 1)


@torch.no_grad()
def synthesize(
    sources: Tensor,
    out_size: int | tuple[int, int],
    *,
    window: int = 5,
    seeds: int = 1,
    eps: float = 0.1,
    order: str = "onion",
    edge: str = "partial",
    generator: Generator | None = None,
    chunk_bytes: int | None = None,
    return_index: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One texture for every sample of n patches: (B, n, C, s, s) -> (B, C, H, W).

    sources       uint8, or float in [0, 1]. The textures are gathered from them bit for bit and
                  have their dtype and device. Arithmetic is float32 (float64 for float64).
    out_size      H = W, or (H, W), in pixels.
    window        side of the neighbourhood, odd, 3..s: the paper's one parameter.
    seeds         k: start from k x k blocks of the sources, equally many of each patch. Paper: 1.
    eps           a window within (1 + eps) of the best is a candidate; one is drawn uniformly.
    order         how ties of equally many filled neighbours break: "onion" (for few levels) or
                  "random" (the paper; one fixed permutation, see `fill_schedule`).
    edge          "partial": windows may leave the sample where nothing is known (Aguerrebere et
                  al., IPOL 2013). "full": only windows wholly inside the sample are candidates.
    generator     of the CPU, draws everything; None is torch's own. Chunks change no draw.
    chunk_bytes   working memory to stay within, though never less than one image's.
    return_index  also return (B, H, W) int64, the source position n s^2 + y s + x of each pixel.
    ValueError names a bad argument.
    """
    require_sources(sources)
    b, n, c, s, _ = sources.shape
    size = (out_size,) * 2 if is_int(out_size) else out_size
    pair = isinstance(size, tuple) and len(size) == 2 and all(map(is_int, size))
    require(pair, f"out_size={out_size!r} must be an integer or (H, W)")
    height, width = size
    require(is_int(window) and window <= s, f"window={window!r} must fit in sources of side {s}")
    require(edge in ("partial", "full"), f"edge={edge!r} must be 'partial' or 'full'")
    require(0 <= eps < math.inf, f"eps={eps!r} must be finite and not negative")
    require(chunk_bytes is None or chunk_bytes > 0, f"chunk_bytes={chunk_bytes!r} must be positive")
    margin = window // 2 if edge == "full" else 0  # of the sample, where no candidate is centred
    candidates = n * (s - 2 * margin) ** 2
    tickets = candidates + height * width
    require(tickets < 2**24, "sources and out_size exceed 2^24 pixels: float32 cannot count them")
    schedule = fill_schedule(height, width, window, seeds, order)

    device, dtype = sources.device, torch.promote_types(sources.dtype, torch.float32)
    # everything random is drawn here, for the whole batch: chunks cannot change it
    start = draw_seeds(schedule, sources, generator)
    number = torch.randperm(tickets, generator=generator, device="cpu").to(device)
    steps = levels(schedule.level, window, device, dtype)

    widest, offers = max(len(step.pixels) for step in steps), (window**2 - 1) * (c + 1)
    numbers = candidates * (offers + widest) + 2 * widest * offers  # windows, distance, known
    numbers += (c + 3) * (height * width + 4 * n * s * s)  # the canvas, forms of the sources
    chunk_bytes = chunk_bytes or (2**31 if device.type == "cuda" else 2**23)  # CPU: its cache
    chunk = min(b, max(1, chunk_bytes // (dtype.itemsize * numbers)))
    # one buffer for all chunks: a new one each costs 15 % of the time in page faults
    windows = torch.empty(chunk, offers, candidates, dtype=dtype, device=device)
    textures = sources.new_empty(b, c, height * width)
    index = start.new_empty(b if return_index else 0, height * width)
    with exact_products(device):
        for i in range(0, b, chunk):
            some = sources[i : i + chunk]
            colours = some.to(dtype) if some.is_floating_point() else some.to(dtype) / 255
            chosen = grow(
                colours, start[i : i + chunk], number, steps, windows, window, margin, eps
            )
            flat = some.transpose(1, 2).flatten(2)  # (b, C, n s^2)
            textures[i : i + chunk] = flat.gather(2, chosen[:, None].expand(-1, c, -1))
            if return_index:
                index[i : i + chunk] = chosen
    textures = textures.view(b, c, height, width)
    return (textures, index.view(b, height, width)) if return_index else textures


def grow(sources, start, number, steps, windows, window, margin, eps) -> Tensor:
    """The algorithm: float sources (B, n, C, s, s) -> source position of every pixel, (B, H W).

    `windows` is room for (B or more, K (C+1), S). Static shapes, and nothing waits for the device:
    a CUDA graph can capture it.
    """
    b, n, c, s, _ = sources.shape
    sources = sources - sources.mean((1, 3, 4), keepdim=True)  # less to cancel in a^2 - 2 ab + b^2
    windows = neighbourhoods(sources, window, window // 2 - margin, windows[:b])
    own_weight = F.pad(gaussian(window, sources)[:, None].expand(-1, c), (0, 1)).flatten()
    centres = torch.arange(n * s * s, device=sources.device).view(n, s, s)
    centres = centres[:, margin : s - margin, margin : s - margin].flatten()  # (S,)
    table = sources.permute(0, 1, 3, 4, 2).flatten(1, 3)
    table = F.pad(table, (0, 1), value=1.0)  # (B, n s^2, C+1): a colour, and 1 for "filled"
    # candidate j of pixel p holds ticket number[p + j] and the highest wins: a random ranking of
    # the candidates for each pixel (of all images), at the price of one permutation
    ranking = (number + 1).to(sources.dtype).unfold(0, len(centres), 1)  # (H W + 1, S), a view
    holder = number.argsort()

    pixels = len(number) - len(centres)
    chosen = start.new_zeros(b, pixels)
    canvas = sources.new_zeros(b, pixels + 1, c + 1)  # the last pixel stands for all outside

    def fill(pixels: Tensor, position: Tensor) -> None:
        chosen.index_copy_(1, pixels, position)
        canvas.index_copy_(1, pixels, table.gather(1, position[..., None].expand(-1, -1, c + 1)))

    fill(steps[0].pixels, start)
    for pixels, around, known_weight in steps[1:]:
        known = canvas.index_select(1, around.flatten()).view(b, len(pixels), -1)
        distance = torch.bmm(known, windows)  # (B, P, S), less `own`, which all candidates share
        own = (known.square() @ own_weight).unsqueeze(2)
        best = distance.amin(2, keepdim=True)
        # clamped: rounding can make a perfect match negative, and (1 + eps) times it lower still
        limit = best + eps * (best + own).clamp_min(0) + TOLERANCE * known_weight
        winner = distance.le_(limit).mul_(ranking.index_select(0, pixels)).amax(2)
        fill(pixels, centres[holder[winner.long() - 1] - pixels])
    return chosen


def neighbourhoods(sources: Tensor, window: int, pad: int, out: Tensor) -> Tensor:
    """What each candidate offers at its K neighbours, (B, n, C, s, s) -> `out` (B, K (C+1), S).

    -2 G colour and G |colour|^2: their product with the known colours and a 1 where known is
    sum G (|colour|^2 - 2 colour . known) over what is known, the masked distance in one product.
    """
    b, n, c, s, _ = sources.shape
    side = s + 2 * pad - 2 * (window // 2)
    squares = F.pad(sources.square().sum(2, keepdim=True), (pad,) * 4, value=OUTSIDE)
    offered = torch.cat([F.pad(-2 * sources, (pad,) * 4), squares], 2).transpose(1, 2)
    weight = gaussian(window, sources)
    windows = out.view(b, len(weight), c + 1, n, side, side)
    for k, cell in enumerate(i for i in range(window**2) if i != window**2 // 2):
        y, x = divmod(cell, window)
        torch.mul(offered[..., y : y + side, x : x + side], weight[k], out=windows[:, k])
    return out


def gaussian(window: int, like: Tensor) -> Tensor:
    """Weight of each neighbour, (K,): sigma = window / 6.4; no centre, it is never known."""
    a = torch.arange(window, dtype=torch.float64, device=like.device) - window // 2
    g = torch.exp(-(a[:, None].square() + a.square()) / (2 * (window / 6.4) ** 2)).flatten()
    return without_centre(g / g.sum()).to(like.dtype)


def without_centre(x: Tensor) -> Tensor:
    """(..., window^2) -> (..., K)."""
    middle = x.shape[-1] // 2
    return torch.cat([x[..., :middle], x[..., middle + 1 :]], -1)


# ------------------------------------------------------------ 2. The order of filling
class Schedule(NamedTuple):
    """When and from where an H x W texture is filled; int64 on the CPU."""

    level: Tensor  # (H, W): 0 in the seed blocks
    blocks: Tensor  # (seeds^2, 9): pixels y W + x of each seed block
    sequence: Tensor  # (H W - 9 seeds^2, 2): the other pixels (y, x), one after another


class Step(NamedTuple):
    """One level."""

    pixels: Tensor  # (P,): y W + x
    around: Tensor  # (P, K): their neighbours; H W is outside
    known_weight: Tensor  # (P, 1): the weight of the neighbours that are filled by then


@functools.lru_cache(maxsize=64)
def fill_schedule(
    out_h: int, out_w: int, window: int, seeds: int, order: str = "onion", order_seed: int = 0
) -> Schedule:
    """The paper's sequence of pixels, and the earliest level at which each can be filled.

    Ring by ring, the unfilled pixels that touch a filled one, those with the most filled pixels in
    their window first; ties at random, or for "onion" so that many can be filled together. A
    pixel's level is 1 + the highest of the earlier pixels in its window, so filling level by level
    equals filling in sequence. Cached: do not write to it. ValueError names a bad argument.
    """
    require(
        is_int(window) and window % 2 == 1 and window >= 3, f"window={window!r}: odd, 3 or more"
    )
    require(is_int(seeds) and seeds >= 1, f"seeds={seeds!r} must be a positive integer")
    require(order in ("onion", "random"), f"order={order!r} must be 'onion' or 'random'")
    crowd = f"seeds={seeds}: {seeds} x {seeds} blocks of {SEED} x {SEED} do not fit"
    require(min(out_h, out_w) >= SEED * seeds, f"{crowd} in out_size={out_h} x {out_w}")

    half, sequence, random = window // 2, [], np.random.default_rng(order_seed)
    padded = np.full((out_h + 2 * half, out_w + 2 * half), -1, np.int64)  # -1: not filled
    level = padded[half:-half, half:-half]
    # block a of k sits in the middle of the a-th k-th of its side
    y, x = ([((2 * a + 1) * d // seeds - SEED) // 2 for a in range(seeds)] for d in level.shape)
    blocks = np.array([[i * out_w + j] for i in y for j in x], np.int64) + block(out_w)
    level[np.divmod(blocks, out_w)] = 0
    seen = np.lib.stride_tricks.sliding_window_view(padded, (window, window))  # (H, W, w, w)
    touching = seen[..., half - 1 : half + 2, half - 1 : half + 2]
    while (level < 0).any():
        y, x = np.nonzero((level < 0) & (touching >= 0).any((2, 3)))
        known = (seen[y, x] >= 0).sum((1, 2))
        # onion: first those whose turn can come early, then by places that do not see each other
        onion = x % (half + 1), y % (half + 1), seen[y, x].max((1, 2))
        ties = onion if order == "onion" else (random.permutation(len(y)),)
        ring = np.stack([y, x], 1)[np.lexsort((*ties, -known))]
        for i, j in ring:
            level[i, j] = seen[i, j].max() + 1
        sequence.append(ring)
    sequence = np.concatenate(sequence or [np.empty((0, 2), np.int64)])
    return Schedule(*map(torch.from_numpy, (level.copy(), blocks, sequence)))


def block(width: int) -> np.ndarray:
    """Where the 9 pixels of a 3x3 block lie from its first one in an image of this width."""
    return np.add.outer(np.arange(SEED) * width, np.arange(SEED)).ravel()


def levels(level: Tensor, window: int, device: torch.device, dtype: torch.dtype) -> list[Step]:
    """What `grow` needs of every level of a schedule, level 0 first."""
    h, w = level.shape
    grid = torch.arange(h * w, device="cpu").view(h, w)
    grid = F.pad(grid, (window // 2,) * 4, value=h * w)
    around = without_centre(grid.unfold(0, window, 1).unfold(1, window, 1).reshape(h * w, -1))
    when = F.pad(level.flatten(), (0, 1), value=h * w)
    known = when[around] < when[:-1, None]  # (H W, K)
    weight = (known * gaussian(window, known.double())).sum(1, keepdim=True)
    pixels, sizes = when[:-1].argsort(stable=True), when[:-1].bincount().tolist()
    parts = pixels, around[pixels], weight[pixels].to(dtype)
    return [Step(*p) for p in zip(*(part.to(device).split(sizes) for part in parts), strict=True)]


def draw_seeds(schedule: Schedule, sources: Tensor, generator: Generator | None) -> Tensor:
    """A source position for every pixel of level 0, (B, 9 seeds^2), the patches in balance."""
    b, n, _, s, _ = sources.shape
    shape = b, len(schedule.blocks)
    # patches in a random order: taken in turns, each would keep to its own columns of the lattice
    turn = torch.rand(shape, generator=generator, device="cpu").argsort(1)
    patch = (turn + draw(n, (b, 1), generator)) % n
    y, x = (draw(s - SEED + 1, shape, generator) for _ in range(2))
    first = (patch * s + y) * s + x
    start = (first[..., None] + torch.from_numpy(block(s))).flatten(1)
    return start[:, schedule.blocks.flatten().argsort()].to(sources.device)


# ------------------------------------------------------------ 3. Checks, draws and switches
def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def is_int(x) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def require_sources(sources: Tensor) -> None:
    square = isinstance(sources, Tensor) and sources.ndim == 5
    square = square and sources.shape[3] == sources.shape[4]
    require(square, "sources must be a tensor (B, n, C, s, s)")
    require(sources.numel() > 0, f"sources of shape {tuple(sources.shape)} are empty")
    floats = sources.is_floating_point()
    require(floats or sources.dtype == torch.uint8, f"sources are {sources.dtype}: uint8 or float")
    if floats and not (sources.min() >= 0 and sources.max() <= 1):  # NaN fails every comparison
        raise ValueError("sources of floats must be finite and in [0, 1]")


def draw(high: int, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """Integers in [0, high) on the CPU, whatever the device of the images."""
    return torch.randint(high, shape, generator=generator, device="cpu")


@contextlib.contextmanager
def exact_products(device: torch.device):
    """Float32 products without TF32, bfloat16 or autocast, whatever the caller has switched on.

    TF32 is off by 1e-4 in a distance, enough to miss the best window.
    """
    switches = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    switches = [s for s in switches if hasattr(s, "fp32_precision")]  # older torch has none
    found = [s.fp32_precision for s in switches]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to say, if only the newer switches were touched
        legacy = "highest"
    try:
        torch.set_float32_matmul_precision("highest")
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for switch, value in zip(switches, found, strict=True):
            switch.fp32_precision = value


# ------------------------------------------------------------ 4. A bank of textures on disk
def build_bank(
    images, path, *, textures=4, seed=0, device="cpu", log=print, every=10.0, **options
) -> None:
    """Write K = `textures` textures of every image to `path`, a .npy of uint8 (N, K, C, H, W).

    `images`: anything of length N whose slices are uint8 (b, C, H, W), so they need not fit in
    memory. Resumes: `path`.json counts what is done, and the draws of a block of images depend on
    (seed, its place) alone, so an interrupted bank ends up as any other. `log` gets a line every
    `every` seconds; `options` go to `texture_views`. ValueError names a bad argument, or says that
    `path` holds something else.
    """
    path, note = Path(path), Path(f"{path}.json")
    require(len(images) > 0, "images are empty")
    require(is_int(textures) and textures >= 1, f"textures={textures!r} must be a positive integer")
    first = images[:1].cpu()
    require(first.dtype == torch.uint8, f"images are {first.dtype}, not uint8")
    shape = len(images), textures, *first.shape[1:]
    first_image = zlib.crc32(first.numpy().tobytes())
    plan = dict(shape=list(shape), seed=seed, first_image=first_image, **options)
    found = json.loads(note.read_text()) if path.exists() and note.exists() else {"done": 0}
    done = found.pop("done")
    require(found == plan if found else not path.exists(), f"path={path} holds something else")
    if not found:
        replace(note, json.dumps({**plan, "done": 0}))
    bank = np.lib.format.open_memmap(path, "r+" if found else "w+", np.uint8, shape)
    began, before, size = time.monotonic(), done, max(1, 256 // textures)
    told = began
    for i in range(done, len(images), size):
        batch = images[i : i + size].to(device).repeat_interleave(textures, 0)
        generator = Generator().manual_seed((seed << 32) + i)
        batch = texture_views(batch, generator=generator, **options)
        done = min(i + size, len(images))
        bank[i:done] = batch.cpu().numpy().reshape(-1, *shape[1:])
        bank.flush()
        replace(note, json.dumps({**plan, "done": done}))
        now = time.monotonic()
        if now - told >= every or done == len(images):
            told, rate = now, (done - before) / (now - began)
            left = (len(images) - done) / rate / 60
            log(f"{path}: {done} of {len(images)} images, {rate:.1f} a second, {left:.0f} min left")


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = Path(f"{path}.part")
    part.write_text(text)
    os.replace(part, path)


def open_bank(path, images=None) -> np.memmap:
    """A finished bank (N, K, C, H, W), read-only and on disk; ValueError when it is unfinished.

    And, where `images` are given, when it was made of others (by their number and the first), or at
    another size.
    """
    note = json.loads(Path(f"{path}.json").read_text())
    if images is not None:
        count = note["shape"][0]
        require(count == len(images), f"path={path} is of {count} images, not {len(images)}")
        first = zlib.crc32(images[:1].cpu().numpy().tobytes())
        require(note["first_image"] == first, f"path={path} is of other images, or another size")
    require(note["done"] == note["shape"][0], f"path={path} is unfinished: run its command again")
    return np.load(path, mmap_mode="r")


def from_bank(bank: np.ndarray, rows: Tensor, generator: Generator | None = None) -> Tensor:
    """One of the K textures of each of the images `rows` (b,), at random: uint8 (b, C, H, W)."""
    pick = draw(bank.shape[1], (len(rows),), generator)
    return torch.from_numpy(np.array(bank[rows.cpu().numpy(), pick.numpy()]))


# ------------------------------------------------------------ 5. Command line
def load(dataset: str | None, data_dir: str, size: int | None):
    """The images that `sacl.py --dataset` trains on, in its order; slices: uint8 (b, 3, S, S)."""
    import sacl

    require(dataset is not None, "give --dataset NAME, or IMAGE files of your own")
    given = dict(dataset=dataset, data_dir=data_dir) | ({"image_size": size} if size else {})
    return sacl.load_data(sacl.Config(**given), "train").pixels


def picture(images: Tensor, args: argparse.Namespace) -> None:
    """The paper's Fig. 1 in a file: a column an image, its patches and its textures below it."""
    from PIL import Image, ImageDraw

    def grown(**options) -> Tensor:  # each from the same two patches: the seed's first draws
        generator = Generator().manual_seed(args.seed)
        options |= dict(patch=args.patch, window=args.window, eps=args.eps)
        return texture_views(images, generator=generator, **options)

    patches = two_patches(images, args.patch, Generator().manual_seed(args.seed))
    rows = {"image": images, "its centre": patches[:, 0], "a random patch": patches[:, 1]}
    rows |= {"one seed": grown(seeds=1), "a lattice of seeds": grown(seeds=args.seeds)}
    zoom = max(1, 96 // min(images.shape[2:]))
    h, w = (zoom * side + 8 for side in images.shape[2:])
    sheet = Image.new("RGB", (110 + w * len(images), h * len(rows)), "white")
    for i, (name, row) in enumerate(rows.items()):
        ImageDraw.Draw(sheet).text((8, h * i + h // 2 - 6), name, fill="black")
        row = row.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3).permute(0, 2, 3, 1)
        for j, cell in enumerate(row.numpy()):
            left, top = 110 + w * j + (w - cell.shape[1]) // 2, h * i + (h - cell.shape[0]) // 2
            sheet.paste(Image.fromarray(cell), (left, top))
    sheet.save(args.out or "textures.png")


def run(args: argparse.Namespace) -> None:
    options = dict(window=args.window, eps=args.eps)
    if args.inputs == ["bank"]:
        images = load(args.dataset, args.data_dir, args.size)
        options |= dict(textures=args.textures, patch=args.patch, seeds=args.seeds, seed=args.seed)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        build_bank(images, args.out or "bank.npy", device=device, **options)
    elif args.inputs:
        from PIL import Image

        import sacl

        options |= dict(seeds=args.seeds or 1, generator=Generator().manual_seed(args.seed))
        for path in map(Path, args.inputs):
            sample = sacl.Files([path], args.sample)[:1]  # (1, 3, s, s)
            texture = synthesize(sample[:, None], args.size or 128, **options)[0]
            Image.fromarray(texture.permute(1, 2, 0).numpy()).save(f"{path.stem}-texture.png")
    else:
        require(args.show >= 1, f"--show {args.show} must be positive")
        images = load(args.dataset, args.data_dir, args.size)
        some = range(0, len(images), max(1, len(images) // args.show))[: args.show]
        picture(torch.cat([images[i : i + 1] for i in some]), args)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Textures grown from patches of images.")
    parser.add_argument("inputs", nargs="*", metavar="IMAGE", help="pictures of your own; or: bank")
    parser.add_argument("--dataset", help="a folder of images, or its name below --data-dir")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--size", type=int, help="of the textures; as sacl.py's --image-size")
    parser.add_argument("--window", type=int, default=5, help="side of the neighbourhood, odd")
    parser.add_argument("--seeds", type=int, help="k: grow from k x k blocks (the paper: 1)")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patch", type=int, help="side of the two patches of an image")
    parser.add_argument("--show", type=int, default=8, help="images in the picture")
    parser.add_argument("--sample", type=int, default=64, help="side IMAGE is reduced to")
    parser.add_argument("--textures", type=int, default=4, help="bank: so many of each image")
    parser.add_argument("--out", help="default: textures.png, bank.npy; IMAGE: NAME-texture.png")
    try:
        run(parser.parse_args(argv))
    except (ValueError, OSError, ImportError) as error:
        print(f"texture.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


# a pasted notebook cell is __main__ too, but has no __file__: it defines, and runs nothing
if __name__ == "__main__" and "__file__" in globals():
    main()
