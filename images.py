"""Own images: which files a folder holds, and their squares of uint8 pixels.

    list_images   folder   -> Listing         files, classes, and what was left out
    square        a file   -> (3, S, S)       upright, shorter side scaled to S, centre kept
    decode        Listing  -> (L, 3, S, S)    in memory, or once for all in a mapped file

Bad input raises ValueError, a sentence that names the file. OSErrors of the disk and MemoryErrors
are not an image's fault and pass as they are.
"""

import contextlib
import hashlib
import io
import itertools
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

DECODER = 2  # to be raised whenever the same file gives other pixels
BLOCK = 64  # images decoded at a time
MOST_PIXELS = 2**29  # of a picture; a photograph of 20,000 x 20,000 has fewer
NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}  # vectors, containers
SAMPLE_FORMAT, BITS, PHOTOMETRIC = 339, 258, 262  # tags of TIFF
SYSTEM = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
# such as train, Training_set, train.X1, val2017, testB; seg_train where seg_test is, too
SPLIT = re.compile(
    r"(?P<front>.*[\W_])?(?i:(?P<train>train(?:ing)?)|(?P<test>test(?:ing)?)|(?P<val>val(?:id"
    r"(?:ate|ation)?)?|dev|eval))(?i:[\W_]*(?:(?:data)?set|data|split|ima?ge?s?|x?\d*))[AB]?"
)


class Listing(NamedTuple):
    """The images of a split."""

    paths: list[Path]  # sorted
    labels: Tensor  # (L,), int64; -1 where there is none
    classes: list[str]
    names: list[str]  # "path<TAB>bytes" of each; of training images the path below their folder
    told: list[str]  # sentences for the user: how many from where, and what was left out


def list_images(root: Path, split: str) -> Listing | None:
    """The "train" or "test" images of a dataset's folder; None where it has no test images.

    A folder train, and test or val beside it, are the splits, in upper or lower case and at any
    depth. Without them all images are for training; names that only resemble them are refused. The
    folders that divide a split's images are its classes; one that holds all of them is no class.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r}: must be train or test")
    sizes, skipped = scan(root)
    train_folder, folders, rest = find_splits(root, sizes)
    train = list_split(root, train_folder, sizes, skipped)
    if not sizes:
        none = f"{root} and the folders below it hold no images: name another folder"
        raise ValueError("; ".join([none, *train.told[1:]]))
    if split == "train":
        if rest:
            train.told.append(f"not used: {len(rest)} images, such as {'/'.join(min(rest))}")
        return train
    tests = [list_split(root, f, sizes, skipped, "test images", train.classes) for f in folders]
    # those labelled as the training images are, then those labelled otherwise, then the others
    tests.sort(key=lambda test: (test.classes != train.classes, not test.classes))
    for other in tests[1:]:
        tests[0].told.append(f"not used: {other.told[0]}")
    return tests[0] if tests else None


def scan(root: Path) -> tuple[dict[tuple, int], dict[tuple, str]]:
    """By path below root, in parts: the bytes of each image, and the kind of what is skipped.

    Links are followed, but not to a folder that they lie in.
    """
    kinds = Image.registered_extensions().items()  # MPO is read as JPEG
    kinds = {k for k, f in kinds if f == "MPO" or f in Image.OPEN and f not in NOT_PICTURES}
    sizes, skipped, waiting = {}, {}, [(root, (), set())]
    while waiting:
        where, folder, around = waiting.pop()
        this = os.stat(where)[1:3]  # inode and device
        if this in around:
            skipped[folder] = "link in a circle"
            continue
        for entry in os.scandir(where):
            path, kind = (*folder, entry.name), Path(entry.name).suffix.lower()
            if entry.name.startswith(".") or entry.name in SYSTEM:
                skipped[path] = "hidden"
            elif entry.is_dir():
                waiting.append((entry.path, path, around | {this}))
            elif not entry.is_file():
                skipped[path] = "broken link" if entry.is_symlink() else "other"
            elif kind in kinds:
                sizes[path] = entry.stat().st_size
            else:
                skipped[path] = kind if re.fullmatch(r"\.[a-z]\w{0,4}", kind) else "other"
    return sizes, skipped


def find_splits(root: Path, sizes: dict[tuple, int]) -> tuple[tuple, list[tuple], list[tuple]]:
    """The folder of training images, () for root itself; those of test images; images of neither.

    Raises ValueError where test images might be trained on unnoticed.
    """
    folders = {path[:i] for path in sizes for i in range(1, len(path))}
    found = {f: match for f in folders if (match := SPLIT.fullmatch(f[-1]))}
    # a word in front counts where it is before both
    paired = {(m["front"], bool(m["train"])) for m in found.values()} | {(None, 0), (None, 1)}
    named = {f: m.lastgroup for f, m in found.items() if (m["front"], not m["train"]) in paired}
    outer = [f for f in sorted(named) if not any(f[:i] in named for i in range(len(f)))]
    trains = [f for f in outer if named[f] == "train"]
    tests = sorted((f for f in outer if named[f] != "train"), key=named.get)  # "test" before "val"
    if not outer:  # but words of these names, in two folders side by side, tell of a split too
        words = {f: re.findall("[A-Z]?[a-z]+|[A-Z]+", f[-1]) for f in folders}
        words = {f: {word.lower() for word in found} for f, found in words.items()}
        trains = {f[:-1]: f for f in folders if words[f] & {"train", "training"}}
        held = {"test", "testing", "val", "validation", "holdout"}
        tests = {f for f in folders if words[f] & held}
        if alike := [f for f in sorted(tests - {*trains.values()}) if f[:-1] in trains]:
            raise ValueError(unclear(root, [trains[alike[0][:-1]], *alike]))
        return (), [], []
    rest = [p for p in sizes if not any(p[: len(f)] == f for f in outer)]
    mixed = any(named[f] != "train" for f in named for t in trains if f[: len(t)] == t)
    clear = len(trains) == len({f[:-1] for f in outer}) == 1 and not mixed
    if not (clear and (tests or not rest)):  # train alone may be one class of several
        raise ValueError(unclear(root, sorted(named)))
    return trains[0], tests, rest


def unclear(root: Path, folders: list[tuple]) -> str:
    shown = ", ".join("/".join(folder) for folder in folders[:4])
    return (
        f"{root}: its folders {shown} do not tell which images are for training and which for "
        "testing: keep one folder train, and one folder test or val beside it (rename a class that "
        "is called so), or give the folder to train on as the dataset"
    )


def list_split(root: Path, folder: tuple, sizes, skipped, what="images", known=()) -> Listing:
    """The images below a folder of root. One of the `known` training classes is always a class."""
    paths = sorted((p for p in sizes if p[: len(folder)] == folder), key="/".join)
    common, depth = os.path.commonprefix([p[:-1] for p in paths]), len(folder)
    while depth < len(common) and common[depth] not in known:
        depth += 1
    classes = sorted({p[depth] for p in paths if len(p) > depth + 1})
    if len(classes) == 1 and classes[0] not in known:
        classes = []
    number = {name: i for i, name in enumerate(classes)}
    labels = [number.get(p[depth], -1) if len(p) > depth + 1 else -1 for p in paths]
    divided = f"{len(classes)} classes" if classes else "no labels"
    told = [f"{len(paths)} {what}, {divided}, from {root.joinpath(*common[:depth])}"]
    if classes and -1 in labels:
        told.append(f"{labels.count(-1)} of them lie beside the class folders and have no label")
    counts = Counter(kind for p, kind in skipped.items() if p[: len(folder)] == folder)
    if counts:
        told.append("skipped " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()))
    below = len(folder) if what == "images" else 0  # so that the training folder may be renamed
    lines = (f"{'/'.join(p[below:])}\t{sizes[p]}" for p in paths)
    names = [line.encode("utf-8", "backslashreplace").decode() for line in lines]
    return Listing([root.joinpath(*p) for p in paths], torch.tensor(labels), classes, names, told)


def square(path: Path, side: int) -> Tensor:
    """An image file as uint8 (3, side, side): upright, shorter side scaled to `side`, centre kept.

    Of an animation, the first frame; transparency lies on white; colour profiles are not applied.
    """
    if not isinstance(side, int | np.integer) or side < 1:
        raise ValueError(f"side {side!r}: must be a whole number of pixels, at least 1")
    # Pillow's bounds refuse photographs and editors' notes, and have no other switch
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
    try:
        # read as a whole, so that a fault of the disk is never one of Pillow's decoders
        image = Image.open(io.BytesIO(Path(path).read_bytes()))
        image.draft(None, (2 * side, 2 * side))  # a JPEG is decoded at 1/2, 1/4 or 1/8
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        check_stored(image)
        rgb = stretch(image) if image.mode[0] in "IF" else image
        rgb.load()  # the size may be known only then
        short = min(rgb.size)
        if rgb.has_transparency_data:
            rgb = rgb.convert("RGBA")
            rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb)
        rgb = rgb.convert("RGB")
        # without scaling on whole pixels, which then stay as they are
        left, top = ((n - short) // 2 if short == side else (n - short) / 2 for n in rgb.size)
        box = (left, top, left + short, top + short)
        x = rgb.resize((side, side), Image.Resampling.BICUBIC, box)
    except Exception as error:  # Pillow raises a dozen kinds for a broken file
        if getattr(error, "errno", None):
            error.filename = error.filename or str(path)
            raise
        if isinstance(error, MemoryError) or "out of memory" in str(error):
            raise MemoryError(f"{path}: out of memory") from None
        reason = re.split(r" <|\n", str(error))[0] or type(error).__name__
        raise ValueError(f"{path}: not a readable image ({reason}): remove or replace it") from None
    x.info = image.info
    with contextlib.suppress(Exception):  # damaged EXIF turns nothing
        x = ImageOps.exif_transpose(x)
    return torch.from_numpy(np.array(x)).permute(2, 0, 1).contiguous()


def check_stored(image: Image.Image) -> None:
    """Mend or refuse raw values that Pillow does not convert."""
    stored, tags = str(image.tile[0][3] if image.tile else ""), getattr(image, "tag_v2", {})
    clear = image.info.get("transparency")  # of a PNG: a value before it was scaled to 8 bits
    if stored in ("L;2", "L;4") and isinstance(clear, int):
        image.info["transparency"] = clear * {"L;2": 85, "L;4": 17}[stored]
    elif ";16" in stored and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.mode[0] not in "IF" and 2 in tags.get(SAMPLE_FORMAT, ()):
        raise ValueError("its 8-bit values are signed; save it unsigned")
    if re.search("RGBX?;16[BLN]", stored):  # Pillow keeps the upper 8 bits
        if 0 < max(high for _, high in image.getextrema()) < 16:
            raise ValueError("its colours of 16 bits are nearly black; save it with 8 bits")


def stretch(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as 8: by the least of the usual depths that holds its values.

    By its own extremes where values are negative or over 16 bits, or too few greys would remain.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if tags.get(BITS) == (32,) and tags.get(SAMPLE_FORMAT, (1,)) == (1,):  # Pillow gives them signs
        values = values.view(np.uint32)
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    if not math.isfinite(high - low):
        raise ValueError("not all of its values are finite")
    depths = [1] if image.mode == "F" else [2**bits - 1 for bits in (8, 10, 12, 14, 16)]
    top = next((depth for depth in depths if high <= depth), 0)
    if low >= 0 and top and not 0 < high - low < top / 16:
        low, high = 0, top
    grey = ((values - low) * (255 / (high - low or 1))).round().astype(np.uint8)
    if len(np.unique(grey)) < min(16, len(np.unique(values)) / 4):
        raise ValueError("its values lie too far apart for 256 greys")
    if tags.get(PHOTOMETRIC) == 0:  # 0 is white
        grey = 255 - grey
    grey[values == image.info.get("transparency", math.nan)] = 255
    return Image.fromarray(grey)


def decoded_path(listing: Listing, side: int, folder: Path) -> Path:
    """Where the decoded file of these images is or will be; other images have another name."""
    times = [str(os.stat(path).st_mtime_ns) for path in listing.paths]
    digest = hashlib.sha256("\0".join(listing.names + times).encode()).hexdigest()[:16]
    return Path(folder, f"{len(times)}x{side}px-v{DECODER}-{digest}.npy")


def decode(listing: Listing, side: int, folder: Path, in_memory=4 << 30, claim=None, log=print):
    """The squares, uint8 (L, 3, side, side): a tensor of up to `in_memory` bytes, or a mapped file.

    The file is decoded once, into `folder`; a stopped process goes on. claim(lock, wait=True), as
    sacl.claim, makes others wait meanwhile; `log` is told the file's size and progress.
    """
    shape = (len(listing.paths), 3, side, side)
    if math.prod(shape) <= in_memory:
        squares = torch.empty(shape, dtype=torch.uint8)
        for row, block in decode_blocks(listing.paths, side, log):
            squares[row : row + len(block)] = block
        return squares
    target = decoded_path(listing, side, folder)
    lock = claim(target.with_suffix(".lock"), wait=True) if claim else contextlib.nullcontext()
    with lock:
        if open_squares(target, shape) is None:
            write_squares(listing.paths, side, target, log)
    return open_squares(target, shape)


def open_squares(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The decoded file, mapped; None where there is none, or a damaged one."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, EOFError, ValueError):
        squares = np.load(path, mmap_mode="r")
        whole = path.stat().st_size == squares.offset + squares.nbytes
        return squares if whole and (squares.shape, squares.dtype) == (shape, np.uint8) else None


def decode_blocks(paths: list[Path], side: int, log, start=0) -> Iterator[tuple[int, Tensor]]:
    """The squares of paths[start:], (n, 3, side, side) with the row of the first, by threads."""
    many = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    began = told = time.monotonic()
    with ThreadPoolExecutor(many) as pool:
        for row in range(start, len(paths), BLOCK):
            block = list(pool.map(square, paths[row : row + BLOCK], itertools.repeat(side)))
            yield row, torch.stack(block)
            done, now = row + len(block), time.monotonic()
            if now - told >= 10:
                minutes = (now - began) / 60 * (len(paths) - done) / (done - start)
                log(f"decoded {done} of {len(paths)}, {minutes:.1f} min left")
                told = now


def write_squares(paths: list[Path], side: int, target: Path, log) -> None:
    """Write squares to a file beside the target, whose length tells how many; then rename it.

    Each at its own place: where a drive has no locks, another process may be writing the same.
    """
    header, part, size = io.BytesIO(), target.with_suffix(".npy.part"), 3 * side**2
    array = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), 3, side, side)}
    np.lib.format.write_array_header_1_0(header, array)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        found = part.stat().st_size if part.exists() else 0
        whole = header.tell() + len(paths) * size  # bytes
        # the last block is made again: a power cut may have torn it
        done = max(0, (found - header.tell()) // size - BLOCK) if found <= whole else 0
        free, total = shutil.disk_usage(part.parent).free / 1e9, len(paths) * size / 1e9
        if (len(paths) - done) * size / 1e9 > free:
            lack = f"{target} takes {total:.1f} GB and only {free:.1f} are free"
            raise ValueError(f"{lack}: free space there or choose another --decoded-dir")
        what = f"decoding {len(paths)} images of {side} px into {target} ({total:.1f} GB), once"
        log(what + (f"; {done} are done" if done else ""))
        part.touch()
        with open(part, "r+b") as file:
            if file.seek(0, os.SEEK_END) < found:  # that file has been renamed meanwhile
                done = 0
            file.seek(0)
            file.write(header.getvalue())
            for row, block in decode_blocks(paths, side, log, done):
                file.seek(header.tell() + row * size)
                file.write(block.numpy())
                file.flush()
                os.fsync(file.fileno())
            file.truncate(whole)
        with contextlib.suppress(FileNotFoundError):  # another process has renamed it
            os.replace(part, target)
    except OSError as error:
        if error.filename in map(str, paths):
            raise  # of an image
        advice = "free space there or choose another --decoded-dir; what is decoded is kept"
        raise ValueError(f"{part} cannot be written ({error.strerror}): {advice}") from None
