"""Texture images by non-parametric sampling (Efros & Leung, ICCV 1999): exact, a batch at once.

    images  -> two_patches    -> sources   the centre and a random place   (B, n, C, s, s)
    sources -> neighbourhoods -> windows   what every candidate offers     (B, K (C+1), S)
    fill_schedule             -> level     0 = seed, then who fills when   (H, W)
    per level: what is known around its P pixels                           (B, P, K (C+1))
               times windows  -> distance  of each pixel to each candidate (B, P, S)   one bmm
               one of the candidates within (1 + eps) of the best gives its centre pixel
    the chosen positions, gathered from the sources -> textures            (B, C, H, W)

    B images, n patches of C x s x s each, S = n s^2 candidates, K = window^2 - 1 neighbours.

Efros and Leung fill one pixel after another. But their order depends on which pixels are filled,
never on their colours, so all B images share it; and two pixels further apart than half a window do
not see each other, so they can be filled together with the very result of one after the other.

    texture_views(images)                           one for each image of a batch, of its size
    synthesize(images[:, None], 128, window=11)     of any size, grown from the whole images
    bank(images, "textures.npy")                    several for each image, in a file
"""

import contextlib
import functools
import math
import os
import shutil
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

SEED = 3  # Efros and Leung start from a 3x3 block of the sample
TOLERANCE = 5e-7  # float32 rounding of a mean squared difference of colours in [0, 1]
BLOCK = 3 * 2**20  # bytes of a bank between two writes: 1024 textures of 32 px, 20 of 224
OUTSIDE = 1e12  # squared "colour" outside the sample: makes windows that leave it lose


# ------------------------------------------------------------ 1. The method
def texture_views(
    images: Tensor, *, patch=None, seeds=None, generator: Generator | None = None, **options
) -> Tensor:
    """A texture of every image, grown from two of its patches: (B, C, H, W) -> (B, C, H, W).

    `images` uint8, or float in [0, 1]; dtype and device are kept. `patch` as in `two_patches`;
    `seeds` as in `synthesize`, but by default 3 for 32 px, 5 for 96, 8 for 224. `options` are those
    of `synthesize`. ValueError names a bad argument.
    """
    sources = two_patches(images, patch, generator)
    # ours: a lattice of seeds; the one seed of Efros and Leung copies the object's layout
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
    places = images.unfold(2, size, 1).unfold(3, size, 1)  # (B, C, rows, columns, s, s)
    rows, columns = places.shape[2:4]
    y, x = (draw(n, (len(images),), generator).to(images.device) for n in (rows, columns))
    each = torch.arange(len(images), device=images.device)
    centre = places[:, :, (rows - 1) // 2, (columns - 1) // 2]
    return torch.stack([centre, places[each, :, y, x]], 1)


@torch.no_grad()
def synthesize(
    sources: Tensor,
    out_size: int | tuple[int, int],
    *,
    window: int = 5,
    seeds: int = 1,
    eps: float = 0.1,
    generator: Generator | None = None,
    chunk_bytes: int | None = None,
    return_index: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """One texture for every sample of n patches: (B, n, C, s, s) -> (B, C, H, W).

    sources       uint8, or float in [0, 1]. The textures are gathered from them bit for bit and
                  have their dtype and device. Arithmetic is float32 (float64 for float64).
    out_size      H = W, or (H, W), in pixels.
    window        side of the neighbourhood, odd, 3..s: the method's one parameter. It may leave the
                  sample where nothing is known yet (Aguerrebere et al., IPOL 2013).
    seeds         k: start from k x k blocks of the sources, as many of each patch (Efros: 1).
    eps           a window within (1 + eps) of the best is a candidate; one is drawn uniformly.
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
    require(0 <= eps < math.inf, f"eps={eps!r} must be finite and not negative")
    require(chunk_bytes is None or chunk_bytes > 0, f"chunk_bytes={chunk_bytes!r} must be positive")
    candidates = n * s**2
    tickets = candidates + height * width
    require(tickets < 2**24, "sources and out_size exceed 2^24 pixels: float32 cannot count them")
    schedule = fill_schedule(height, width, window, seeds)

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
    # one buffer for all chunks: a new one each costs time in page faults
    windows = torch.empty(chunk, offers, candidates, dtype=dtype, device=device)
    textures = sources.new_empty(b, c, height * width)
    index = start.new_empty(b if return_index else 0, height * width)
    with exact_products(device):
        for i in range(0, b, chunk):
            part = slice(i, i + chunk)
            some = sources[part]
            colours = some.to(dtype) if some.is_floating_point() else some.to(dtype) / 255
            chosen = grow(colours, start[part], number, steps, windows, window, eps)
            flat = some.transpose(1, 2).flatten(2)  # (b, C, n s^2)
            textures[part] = flat.gather(2, chosen[:, None].expand(-1, c, -1))
            if return_index:
                index[part] = chosen
    textures = textures.view(b, c, height, width)
    return (textures, index.view(b, height, width)) if return_index else textures


def grow(sources, start, number, steps, windows, window, eps) -> Tensor:
    """The algorithm: float sources (B, n, C, s, s) -> source position of every pixel, (B, H W).

    `windows` is a scratch buffer of at least (B, K (C+1), S). Static shapes, and nothing waits for
    the device: a CUDA graph can capture it.
    """
    b, n, c, s, _ = sources.shape
    sources = sources - sources.mean((1, 3, 4), keepdim=True)  # less to cancel in a^2 - 2 ab + b^2
    windows = neighbourhoods(sources, window, windows[:b])
    own_weight = F.pad(gaussian(window, sources)[:, None].expand(-1, c), (0, 1)).flatten()
    table = sources.permute(0, 1, 3, 4, 2).flatten(1, 3)
    table = F.pad(table, (0, 1), value=1.0)  # (B, n s^2, C+1): a colour, and 1 for "filled"
    # candidate j of pixel p holds ticket number[p + j] and the highest wins: a random ranking of
    # the candidates for each pixel (of all images), at the price of one permutation
    ranking = (number + 1).to(sources.dtype).unfold(0, n * s * s, 1)  # (H W + 1, S), a view
    holder = number.argsort()

    pixels = len(number) - n * s * s
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
        fill(pixels, holder[winner.long() - 1] - pixels)
    return chosen


def neighbourhoods(sources: Tensor, window: int, out: Tensor) -> Tensor:
    """What each candidate offers at its K neighbours, (B, n, C, s, s) -> `out` (B, K (C+1), S).

    -2 G colour and G |colour|^2: their product with the known colours and a 1 where known is
    sum G (|colour|^2 - 2 colour . known) over what is known, the masked distance in one product.
    """
    b, n, c, s, _ = sources.shape
    pad = window // 2
    squares = F.pad(sources.square().sum(2, keepdim=True), (pad,) * 4, value=OUTSIDE)
    offered = torch.cat([F.pad(-2 * sources, (pad,) * 4), squares], 2).transpose(1, 2)
    weight = gaussian(window, sources)
    windows = out.view(b, len(weight), c + 1, n, s, s)
    for k, cell in enumerate(i for i in range(window**2) if i != window**2 // 2):
        y, x = divmod(cell, window)
        torch.mul(offered[..., y : y + s, x : x + s], weight[k], out=windows[:, k])
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
def fill_schedule(out_h: int, out_w: int, window: int, seeds: int) -> Schedule:
    """Efros and Leung's sequence of pixels, and the earliest level at which each can be filled.

    Ring by ring, the unfilled pixels that touch a filled one, those with the most filled pixels in
    their window first; of equals (they: at random) so that many can be filled together. A
    pixel's level is 1 + the highest of the earlier pixels in its window, so filling level by level
    equals filling in sequence. Cached: do not write to it. ValueError names a bad argument.
    """
    odd = is_int(window) and window >= 3 and window % 2 == 1
    require(odd, f"window={window!r} must be an odd integer of 3 or more")
    require(is_int(seeds) and seeds >= 1, f"seeds={seeds!r} must be a positive integer")
    crowd = f"seeds={seeds}: {seeds} x {seeds} blocks of {SEED} x {SEED} do not fit"
    require(min(out_h, out_w) >= SEED * seeds, f"{crowd} in out_size={out_h} x {out_w}")

    half, sequence = window // 2, []
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
        # ties: first those whose turn can come early, then by places that do not see each other
        ties = x % (half + 1), y % (half + 1), seen[y, x].max((1, 2))
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
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def require_sources(sources: Tensor) -> None:
    square = isinstance(sources, Tensor) and sources.ndim == 5 and len({*sources.shape[3:]}) == 1
    require(square, "sources must be a tensor (B, n, C, s, s)")
    require(sources.numel() > 0, f"sources of shape {tuple(sources.shape)} are empty")
    floats = sources.is_floating_point()
    good = floats or sources.dtype == torch.uint8
    require(good, f"sources are {sources.dtype}, not uint8 or float")
    within = not floats or (sources.min() >= 0 and sources.max() <= 1)  # NaN fails comparisons
    require(within, "sources of floats must be finite and in [0, 1]")


def draw(high: int, shape: tuple[int, ...], generator: Generator | None) -> Tensor:
    """Integers in [0, high) on the CPU, whatever the device of the images."""
    return torch.randint(high, shape, generator=generator, device="cpu")


@contextlib.contextmanager
def exact_products(device: torch.device):
    """Float32 products without TF32, bfloat16 or autocast, whatever the caller has switched on.

    TF32's rounding is enough to miss the best window.
    """
    switches = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    switches = [s for s in switches if hasattr(s, "fp32_precision")]  # older torch has none
    found = [s.fp32_precision for s in switches]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to say, if only the newer switches were touched
        legacy = "highest"
    try:
        torch.set_float32_matmul_precision("highest")  # sets the newer switches too
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for switch, value in zip(switches, found, strict=True):
            switch.fp32_precision = value


# ------------------------------------------------------------ 4. A bank of textures on disk
def bank(
    images, path, *, textures=4, seed=0, device="cpu", log=print, images_id="", **options
) -> np.memmap:
    """T = `textures` textures of every image, in the file `path`: .npy, uint8 (N, T, C, H, W).

    images     uint8 (N, C, H, W): a tensor on any device, or a np.memmap.
    images_id  a short text that tells the images from others, such as a digest of their names;
               a spread of their pixels is compared in any case.
    options    of `texture_views`. `log` is told place and size first, then progress every 10 s.

    The file is made unless it is there, as `path`.part, and renamed when it is whole. Its header
    says what it was made from, its length how far it got, and the draws of a block depend on (seed,
    its place) alone: after a kill at any moment the same call goes on, to the same contents. The
    caller makes sure that only one process does. ValueError: a bad argument, or the file there is
    not this bank, and is left alone. OSError: no space or no permission; what is written is kept.
    """
    path, part = Path(path), Path(f"{path}.part")
    require(is_int(textures) and textures >= 1, f"textures={textures!r} must be a positive integer")
    require(is_int(seed), f"seed={seed!r} must be an integer")
    textures, seed = int(textures), int(seed)
    # numpy's numbers print differently in the header
    options = {k: v.item() if isinstance(v, np.generic) else v for k, v in options.items()}
    images = images.cpu().numpy() if isinstance(images, Tensor) else images
    require(images.dtype == np.uint8, f"images are {images.dtype}, not uint8")
    spread = np.array(images[:: 1 + images.size // 2**26], order="C")  # at most 64 MB
    shape = len(images), textures, *images.shape[1:]
    plan = dict(pixels=zlib.crc32(spread), images_id=images_id, seed=seed, **options)
    header = bank_header(shape, plan)
    row = math.prod(shape[1:])  # bytes of an image's textures
    size = len(header) + len(images) * row
    if path.exists():
        require_header(path, header)
        require(path.stat().st_size == size, f"{path} is cut short: delete it to make it again")
        return np.load(path, mmap_mode="r")

    # a bad option must fail here, before there is a file with it in the header
    texture_views(torch.from_numpy(spread[:1]).to(device), generator=Generator(), **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    found, free = 0, shutil.disk_usage(path.parent).free
    if part.exists():
        require_header(part, header)
        found = part.stat().st_size
    space = f"{path} takes {(size - found) / 1e6:,.0f} MB of the {free / 1e6:,.0f} MB free there"
    if size - found > free:
        raise OSError(f"{space}: make room, or choose another place")
    log(f"{textures} textures for each of {len(images)} images: {space}")
    part.touch()
    write_at(part, 0, header)
    rows = max(1, BLOCK // row)  # images of a block
    # the last block is made again: a power cut may have torn it
    first = max(0, (found - len(header)) // row - 1) // rows * rows
    began = told = time.monotonic()
    for i in range(first, len(images), rows):
        some = torch.from_numpy(np.array(images[i : i + rows])).to(device)
        # hashed, since a CPU generator uses only the low 32 bits of its seed
        generator = Generator().manual_seed(zlib.crc32(f"{seed} {i}".encode()))
        made = texture_views(some.repeat_interleave(textures, 0), generator=generator, **options)
        write_at(part, len(header) + i * row, made.cpu().numpy())
        done, now = min(i + rows, len(images)), time.monotonic()
        if now - told >= 10:
            told, left = now, (len(images) - done) * (now - began) / (done - first) / 60
            log(f"{path}: textures of {done} of {len(images)} images, {left:.0f} min left")
    os.replace(part, path)
    return np.load(path, mmap_mode="r")


def bank_header(shape: tuple[int, ...], plan: dict) -> bytes:
    """The header of a .npy of uint8, which is Python; what it is made from follows as a comment."""
    words = [f"{k}={v!a}" for k, v in plan.items() if v is not None]
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}  "
    text += f"# textures: shape={'x'.join(map(str, shape))} {' '.join(words)}"
    text += " " * (-(len(text) + 11) % 64) + "\n"  # 11: the magic, the length, the newline
    return np.lib.format.magic(1, 0) + len(text).to_bytes(2, "little") + text.encode()


def require_header(path: Path, header: bytes) -> None:
    """ValueError that says what differs, unless `path` begins with `header` or ends within it."""
    with path.open("rb") as file:
        start = file.read(len(header) + 512)
    if header.startswith(start[: len(header)]):
        return
    texts = (h.partition(b"# textures: ")[2].partition(b"\n")[0] for h in (start, header))
    theirs, ours = (text.decode("latin1").split() for text in texts)
    found = " ".join(w for w in theirs if w not in ours) or "something else"
    wanted = " ".join(w for w in ours if w not in theirs) or "the defaults"
    raise ValueError(f"{path} has {found}, not {wanted}: move it, or name another file")


def write_at(path: Path, place: int, data) -> None:
    """Write bytes at an offset of a file, down to the disk. OSError names the file."""
    try:
        with path.open("r+b") as file:
            file.seek(place)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        kept = f"{error.strerror} (what is written is kept; the same command goes on from there)"
        raise OSError(error.errno, kept, str(path)) from None


if __name__ == "__main__" and "__file__" in globals():  # it was a command once
    print("texture.py is no command: import it and call texture.synthesize", file=sys.stderr)
    sys.exit(2)
