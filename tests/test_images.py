"""Own images: which files are used, how they are seen, what is refused, and the decoded file.

python -m pytest tests/test_images.py
"""

import contextlib
import errno
import io
import itertools
import os
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import images
from conftest import failing

FOUR = "train/a/1.png train/b/2.png test/a/3.png test/b/4.png"
RAMP = np.linspace(0, 1, 32 * 32).reshape(32, 32)
BICUBIC = Image.Resampling.BICUBIC


def pixels(height=20, width=20, seed=0):
    """A smooth picture, (height, width, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), BICUBIC))


def make(root, names):
    """A picture at each of these paths below root."""
    for name in names.split():
        Path(root, name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels()).save(Path(root, name))
    return root


def used(root, split="train"):
    """The files of a split below root, each with its class."""
    listing = images.list_images(root, split)
    classes = [f"={listing.classes[i]}" if i >= 0 else "" for i in listing.labels]
    paths = [p.relative_to(root).as_posix() for p in listing.paths]
    return " ".join(p + c for p, c in zip(paths, classes, strict=True))


def told(root, split="train"):
    return "; ".join(images.list_images(root, split).told)


def seen(path, side=32):
    """An image as the program sees it, (side, side, 3)."""
    return images.square(path, side).permute(1, 2, 0).numpy().astype(int)


# ------------------------------------------------------------ All images that the person meant


NAMES = "train test, Train TESTING, TRAINING Valid, training_set val2017, train.X1 validation"


@pytest.mark.parametrize("names", NAMES.split(", "))
@pytest.mark.parametrize("around", ["", "archive/flowers/"])
def test_splits_are_known_in_any_case_and_in_folders_around_them(tmp_path, names, around):
    train, test = (around + name for name in names.split())
    make(tmp_path, FOUR.replace("train", train).replace("test", test))
    assert used(tmp_path) == f"{train}/a/1.png=a {train}/b/2.png=b"
    assert used(tmp_path, "test") == f"{test}/a/3.png=a {test}/b/4.png=b"
    assert told(tmp_path) == f"2 images, 2 classes, from {tmp_path / train}"
    assert told(tmp_path, "test") == f"2 test images, 2 classes, from {tmp_path / test}"


UNCLEAR = [
    "test/a/1.png test/b/2.png",
    "val/1.png 2.png",
    "train/1.png training/2.png test/3.png",
    "train/a/1.png train/b/2.png train/val/3.png",
    "train/1.png car/2.png plane/3.png",  # train may be a class
    "bottle/train/1.png bottle/test/2.png cable/train/3.png cable/test/4.png",
    "a/1.png b/2.png c/test/3.png",
    "trainA/1.png trainB/2.png testA/3.png",
    "train-jpg/a/1.png train-jpg/b/2.png test-jpg/a/3.png",
    "MyTrain/1.png MyTest/2.png extra/3.png",
    "x/01_train/1.png x/02_validation/2.png",
]


@pytest.mark.parametrize("names", UNCLEAR)
def test_test_images_are_never_trained_on_unsaid(tmp_path, names):
    make(tmp_path, names)
    with pytest.raises(ValueError, match="give the folder to train on as the dataset") as error:
        images.list_images(tmp_path, "train")
    assert str(tmp_path) in str(error.value)
    assert used((tmp_path / names.split()[0]).parent)  # the advice works


def test_a_word_before_train_makes_a_split_only_beside_its_like(tmp_path):
    names = FOUR.replace("train/", "my_train/").replace("test/", "my_test/x/")
    pair = make(tmp_path / "pair", names)
    assert used(pair) == "my_train/a/1.png=a my_train/b/2.png=b"
    assert used(pair, "test") == "my_test/x/a/3.png=a my_test/x/b/4.png=b"
    make(tmp_path / "classes", "bullet_train/1.png sun/2.png")
    assert used(tmp_path / "classes") == "bullet_train/1.png=bullet_train sun/2.png=sun"
    make(tmp_path / "classes", "festival/3.png strainer/4.png chestnut/5.png untrained/6.png")
    assert len(used(tmp_path / "classes").split()) == 6


def test_the_training_images_names_do_not_depend_on_the_names_of_folders_above(tmp_path):
    names = images.list_images(make(tmp_path / "1", FOUR), "train").names
    other = FOUR.replace("train", "x/Training").replace("test", "x/Test")
    assert images.list_images(make(tmp_path / "2", other), "train").names == names
    with pytest.raises(ValueError, match="'Train': must be train or test"):
        images.list_images(tmp_path / "1", "Train")


@pytest.mark.parametrize("test", ["test/1.png", "test/unknown/1.png"])
def test_the_test_set_is_the_one_with_the_labels_of_the_training_set(tmp_path, test):
    make(tmp_path, f"train/a/1.png train/b/2.png {test}")
    assert used(tmp_path, "test") == test
    make(tmp_path, "val/a/1.png val/b/2.png")
    assert used(tmp_path, "test") == "val/a/1.png=a val/b/2.png=b"
    passed_over = f"not used: 1 test images, no labels, from {(tmp_path / test).parent}"
    assert told(tmp_path, "test").endswith(passed_over)
    shutil.rmtree(tmp_path / "test")
    make(tmp_path, "test/a/3.png test/b/4.png")
    assert used(tmp_path, "test") == "test/a/3.png=a test/b/4.png=b"
    shutil.rmtree(tmp_path / "test")
    shutil.rmtree(tmp_path / "val/b")
    assert used(tmp_path, "test") == "val/a/1.png=a"  # for the refusal of classes that differ


def test_without_splits_all_images_are_for_training_and_folders_are_classes(tmp_path):
    assert used(make(tmp_path / "1", "a/1.png b/x/2.png")) == "a/1.png=a b/x/2.png=b"
    assert used(make(tmp_path / "2", "1.png 2.png")) == "1.png 2.png"
    assert used(make(tmp_path / "3", "1.png 2.png rejected/3.png")) == "1.png 2.png rejected/3.png"
    assert images.list_images(tmp_path / "1", "test") is None


def test_images_beside_classes_and_splits_are_used_or_told(tmp_path):
    make(tmp_path, f"{FOUR} train/5.png banner.png extra/6.png")
    assert used(tmp_path) == "train/5.png train/a/1.png=a train/b/2.png=b"
    assert "; 1 of them lie beside the class folders and have no label" in told(tmp_path)
    assert "; not used: 2 images, such as banner.png" in told(tmp_path)


def test_hidden_files_are_no_images_and_folders_named_like_images_are_folders(tmp_path):
    make(tmp_path, "a/1.png b/2.png a/.ipynb_checkpoints/1.png a/._1.png .cache/3.png")
    make(tmp_path, "__MACOSX/a/1.png b/@eaDir/2.png a/scan.png/4.png")
    (tmp_path / "a/Thumbs.db").write_bytes(b"x")
    assert used(tmp_path) == "a/1.png=a a/scan.png/4.png=a b/2.png=b"
    assert told(tmp_path).endswith("; skipped 5 hidden, 1 .db")


def test_common_formats_count_and_what_is_skipped_is_told_by_extension(tmp_path):
    endings = "png jpg jpeg jfif gif bmp tif tiff webp ppm pgm jp2 apng JPG mpo"
    for name in [f"1.{e}" for e in endings.split()] + "1.txt 2.TXT 3.heic 4.pdf 5.h5 6".split():
        (tmp_path / name).write_bytes(b"x")
    assert len(used(tmp_path).split()) == len(endings.split())
    skipped = told(tmp_path).split("; skipped ")[1].split(", ")
    assert sorted(skipped) == ["1 .h5", "1 .heic", "1 .pdf", "1 other", "2 .txt"]
    (tmp_path / "none").mkdir()
    (tmp_path / "none/1.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match="none and the folders below it hold no images.*1 .heic"):
        images.list_images(tmp_path / "none", "train")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without pipes")
def test_links_are_followed_but_not_in_circles(tmp_path):
    root = make(tmp_path, "real/1.png real/sub/2.png set/c/3.png") / "set"
    links = {"a": "real", "b": "real", "c/4.png": "real/1.png", "c/up": "set"}
    for name, to in {**links, "c/gone.png": "nothing"}.items():
        (root / name).symlink_to(tmp_path / to)
    os.mkfifo(root / "c/pipe.png")
    assert used(root) == "a/1.png=a a/sub/2.png=a b/1.png=b b/sub/2.png=b c/3.png=c c/4.png=c"
    skipped = told(root).split("; skipped ")[1].split(", ")
    assert sorted(skipped) == ["1 broken link", "1 link in a circle", "1 other"]


def test_names_of_any_kind_work_and_are_sorted(tmp_path):
    odd = ["a b", "quo'te\"", "new\nline", "emoji😀", "[1]*", "-dash", "Z", os.fsdecode(b"\xff")]
    for name in odd:
        make(tmp_path, "x.png")
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "x.png").rename(tmp_path / "set" / name / f"{name}.png")
    listing = images.list_images(tmp_path / "set", "train")
    assert [p.stem for p in listing.paths] == listing.classes == sorted(odd)
    assert listing.names[0] == f"-dash/-dash.png\t{listing.paths[0].stat().st_size}"
    assert len({name.encode() for name in listing.names}) == len(odd)
    assert len(images.decode(listing, 8, tmp_path)) == len(odd)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_missing_rights_are_told_with_the_path(tmp_path):
    make(tmp_path, "a/1.png b/2.png")
    (tmp_path / "a/1.png").chmod(0)
    with pytest.raises(PermissionError, match=r"a.1\.png"):
        images.square(tmp_path / "a/1.png", 8)
    (tmp_path / "b").chmod(0)
    with pytest.raises(PermissionError, match="b'"):
        images.list_images(tmp_path, "train")


# ------------------------------------------------------------ Images as the person sees them


@pytest.mark.parametrize("ending", "png bmp tif webp ppm tga jp2".split())
def test_pixels_that_need_no_scaling_stay_as_they_are(tmp_path, ending):
    for height, width in ((24, 24), (24, 31), (41, 24)):
        a, path = pixels(height, width), tmp_path / f"x.{ending}"
        Image.fromarray(a).save(path, **({"lossless": True} if ending == "webp" else {}))
        top, left = (height - 24) // 2, (width - 24) // 2
        x = images.square(path, 24)
        assert x.dtype == torch.uint8 and x.is_contiguous()
        assert np.array_equal(x.permute(1, 2, 0), a[top : top + 24, left : left + 24])


@pytest.mark.parametrize("size", [(40, 61), (61, 40), (300, 200), (5, 9), (33, 500)])
def test_the_shorter_side_is_scaled_and_the_centre_kept(tmp_path, size):
    image = Image.fromarray(pixels(*size))
    image.save(tmp_path / "x.png")
    fit = np.asarray(ImageOps.fit(image, (32, 32), BICUBIC))
    assert abs(seen(tmp_path / "x.png") - fit).max() < 2


def test_a_photograph_is_decoded_small_without_visible_loss(tmp_path, monkeypatch):
    image = Image.fromarray(pixels(1500, 2000))
    image.save(tmp_path / "x.jpg", quality=95)
    whole = np.asarray(ImageOps.fit(image, (96, 96), BICUBIC))
    monkeypatch.setattr(images, "MOST_PIXELS", 2_000_000)  # less than all of them
    with pytest.warns(Image.DecompressionBombWarning):
        assert abs(seen(tmp_path / "x.jpg", 96) - whole).mean() < 2


@pytest.mark.parametrize("turn, white", [(3, 2), (6, 1), (7, 2)])  # half, a quarter, mirrored
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_pictures_are_upright(tmp_path, ending, turn, white):
    a, exif = np.zeros((64, 48, 3), np.uint8), Image.Exif()
    a[:32, :24] = 255  # white at the upper left, as it is stored
    exif[274] = turn
    Image.fromarray(a).save(tmp_path / f"x.{ending}", exif=exif)
    x = seen(tmp_path / f"x.{ending}").mean(-1)
    clockwise = [x[2, 2], x[2, 29], x[29, 29], x[29, 2]]
    assert np.argmax(clockwise) == white


def test_damaged_exif_turns_nothing(tmp_path):
    Image.fromarray(pixels()).save(tmp_path / "x.png", exif=b"Exif\0\0junkjunkjunk")
    assert np.array_equal(seen(tmp_path / "x.png", 20), pixels())


DEEP = {
    "16.png": (RAMP * 65535).astype(np.uint16),
    "16.tif": (RAMP * 65535).astype(">u2"),
    "14.png": (RAMP * 16383).astype(np.uint16),
    "12.png": (RAMP * 4095).astype(np.uint16),
    "10.png": (RAMP * 1023).astype(np.uint16),
    "8.png": (RAMP * 255).astype(np.uint16),
    "offset.png": (RAMP * 500 + 30000).astype(np.uint16),
    "32.tif": (RAMP * 2e9).astype(np.int32),
    "signed.tif": (RAMP * 4095 - 1024).astype(np.int32),
    "unit.tif": RAMP.astype(np.float32),
    "float.tif": (RAMP * 1e4 - 5e3).astype(np.float32),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_greyscale_keeps_its_contrast(tmp_path, name):
    Image.fromarray(DEEP[name]).save(tmp_path / name)
    x = seen(tmp_path / name)
    assert (x[..., 0] == x[..., 2]).all() and np.array_equal(np.unique(x), range(256))
    assert (np.diff(x[..., 0].ravel()) >= 0).all()


def test_a_dark_picture_stays_dark_and_a_white_one_white(tmp_path):
    dark = {"x.png": (RAMP * 1500).astype(np.uint16), "x.tif": (RAMP * 0.3663).astype(np.float32)}
    for name, values in dark.items():
        Image.fromarray(values).save(tmp_path / name)
        assert seen(tmp_path / name).max() == 93  # 1500 of 4095, as 0.3663 of 1
    Image.fromarray(np.full((9, 9), 65535, np.uint16)).save(tmp_path / "white.png")
    assert seen(tmp_path / "white.png").min() == 255


@pytest.mark.parametrize("odd", [np.nan, np.inf, 1e9])
def test_values_that_cannot_be_shown_are_refused_by_name(tmp_path, odd):
    values = RAMP.astype(np.float32)
    values[3, 3] = odd
    Image.fromarray(values).save(tmp_path / "odd.tif")
    with pytest.raises(ValueError, match=r"odd\.tif: not a readable image \(.*(finite|far apart)"):
        images.square(tmp_path / "odd.tif", 32)


@pytest.mark.parametrize("kind", ["RGBA png", "LA png", "P png", "RGBA webp"])
def test_transparency_lies_on_white(tmp_path, kind):
    image, (mode, ending) = Image.new("RGBA", (32, 32), (200, 0, 0, 0)), kind.split()  # hidden red
    image.paste((0, 0, 0, 255), (0, 0, 16, 32))
    image.paste((0, 0, 0, 128), (0, 0, 8, 32))
    options = {"lossless": True, "exact": True} if ending == "webp" else {}
    image.convert(mode).save(tmp_path / f"x.{ending}", **options)
    x = seen(tmp_path / f"x.{ending}")
    assert (x[:, 16:] == 255).all() and (x[:, 8:16] == 0).all() and (abs(x[:, :8] - 127) < 2).all()


CLEAR = {"L": (3, 9), "RGB": ((3, 4, 5), (9, 1, 2)), "1": (255, 0), "I;16": (3, 65535)}


@pytest.mark.parametrize("mode", CLEAR)
def test_a_transparent_colour_of_a_png_is_white(tmp_path, mode):
    clear, other = CLEAR[mode]
    image = Image.new(mode, (2, 2), other)
    image.putpixel((1, 0), clear)
    image.save(tmp_path / "x.png", transparency=clear)
    other = np.broadcast_to(np.minimum(other, 255), 3)
    white = [255, 255, 255]
    assert np.array_equal(seen(tmp_path / "x.png", 2), [[other, white], [other, other]])


def tiff(path, values, photometric=1, sample_format=1):
    """A file of these values, (height, width) or (height, width, 3); Pillow writes no such."""
    height, width, *depth = values.shape
    bits, raw = 8 * values.itemsize, values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 200}
    tags |= {277: 3 if depth else 1, 278: height, 279: len(raw), 339: sample_format}
    entries = [struct.pack("<HHI", tag, 3, 1) + struct.pack("<I", v) for tag, v in tags.items()]
    if depth:  # three values each
        entries[2] = struct.pack("<HHII", 258, 3, 3, 180)
        entries[9] = struct.pack("<HHII", 339, 3, 3, 186)
    head = b"II" + struct.pack("<HIH", 42, 8, len(tags)) + b"".join(entries) + bytes(4)
    three = struct.pack("<6H", *[bits] * 3, *[sample_format] * 3)
    path.write_bytes(head.ljust(180, b"\0") + three.ljust(20, b"\0") + raw)


def png(path, row, bits, colour, clear):
    """Two rows of packed values with a transparent one, as Pillow does not write it."""
    width = 8 * len(row) // bits // {0: 1, 2: 3}[colour]
    parts = {b"IHDR": struct.pack(">IIBBBBB", width, 2, bits, colour, 0, 0, 0)}
    parts |= {b"tRNS": clear, b"IDAT": zlib.compress(2 * (b"\0" + row)), b"IEND": b""}
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in parts.items():
        crc = struct.pack(">I", zlib.crc32(name + data))
        content += struct.pack(">I", len(data)) + name + data + crc
    path.write_bytes(content)


def test_a_tiff_says_which_end_is_white_and_whether_values_have_signs(tmp_path):
    ends = np.array([[0, 1], [0, 1]])
    for name, values, white, expected in (
        ("16", (ends * 65535).astype("<u2"), 0, [255, 0]),
        ("float", ends.astype("<f4"), 0, [255, 0]),
        ("8", (ends * 255).astype("u1"), 0, [255, 0]),
        ("32", (ends * (2**32 - 1)).astype("<u4"), 1, [0, 255]),
    ):
        tiff(tmp_path / f"{name}.tif", values, white, 3 if name == "float" else 1)
        assert seen(tmp_path / f"{name}.tif", 2)[0, :, 0].tolist() == expected, name
    tiff(tmp_path / "signed.tif", (ends * 100 - 50).astype("i1"), sample_format=2)
    with pytest.raises(ValueError, match=r"signed\.tif: .*values are signed"):
        images.square(tmp_path / "signed.tif", 2)


def test_deep_colours_that_would_turn_black_are_refused(tmp_path):
    tiff(tmp_path / "x.tif", np.full((2, 2, 3), 30000, "<u2"), 2)
    assert (seen(tmp_path / "x.tif", 2) == 30000 >> 8).all()
    tiff(tmp_path / "x.tif", np.full((2, 2, 3), 255, "<u2") * 15, 2)  # of 12 bits
    with pytest.raises(ValueError, match=r"x\.tif: .*nearly black"):
        images.square(tmp_path / "x.tif", 2)


def test_a_transparent_value_of_other_depths_is_white(tmp_path):
    deep = struct.pack(">6H", 0x6405, 0x3205, 0x1405, 0x0564, 0x0532, 0x0514)
    for row, bits, colour, clear, other in (
        (b"\x18", 2, 0, struct.pack(">H", 1), [170, 170, 170]),  # 0 1 2 0: the middle is seen
        (b"\x7a", 4, 0, struct.pack(">H", 7), [170, 170, 170]),  # 7 10
        (deep, 16, 2, deep[:6], [5, 5, 5]),
    ):
        png(tmp_path / "x.png", row, bits, colour, clear)
        assert seen(tmp_path / "x.png", 2)[0].tolist() == [[255, 255, 255], other]


@pytest.mark.parametrize("side", [0, -1, "8", 2.5, None])
def test_a_side_that_is_none_is_not_the_pictures_fault(tmp_path, side):
    Image.fromarray(pixels()).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="^side .*whole number of pixels"):
        images.square(tmp_path / "x.png", side)


def test_a_thin_picture_is_seen_as_any_other(tmp_path):
    image = Image.fromarray(pixels(4001, 40)).convert("RGBA")
    image.putalpha(128)
    image.save(tmp_path / "x.png")
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.array_equal(seen(tmp_path / "x.png"), ImageOps.fit(white, (32, 32), BICUBIC))


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "P"])
def test_other_colours_become_rgb(tmp_path, mode):
    image = Image.fromarray(pixels()).convert(mode)
    image.save(tmp_path / "x.tif")
    assert np.array_equal(seen(tmp_path / "x.tif", 20), image.convert("RGB"))


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_of_an_animation_the_first_frame_is_used(tmp_path, ending):
    red, blue = (Image.new("RGB", (20, 20), colour) for colour in ("red", "blue"))
    red.save(tmp_path / f"x.{ending}", save_all=True, append_images=[blue])
    assert np.argmax(seen(tmp_path / f"x.{ending}").mean((0, 1))) == 0


def test_a_thin_picture_takes_no_more_memory_than_others(tmp_path, monkeypatch):
    Image.new("RGB", (1, 60000), "red").save(tmp_path / "x.png")
    sizes, real = [], Image.Image.resize
    record = lambda image, size, *more: sizes.append(size) or real(image, size, *more)  # noqa: E731
    monkeypatch.setattr(Image.Image, "resize", record)
    assert (seen(tmp_path / "x.png", 256) == [255, 0, 0]).all() and sizes == [(256, 256)]


# ------------------------------------------------------------ Blame where it belongs


def broken(kind):
    """The bytes of a file that is no whole picture."""
    if kind in ("empty", "page"):
        return b"<html>" if kind == "page" else b""
    buffer = io.BytesIO()
    side = {"bomb": 40000, "large": 30000}.get(kind)  # Pillow refuses one and warns of the other
    Image.fromarray(pixels(60, 60)).save(buffer, "PNG" if side else kind)
    whole = buffer.getvalue()
    if side:  # the same, said to have so many pixels
        head = whole[12:16] + struct.pack(">II", side, side) + whole[24:29]
        return whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[33:]
    return whole[: len(whole) * 2 // 3]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", "empty page bomb large JPEG GIF TIFF PNG".split())
def test_a_broken_file_is_refused_by_name(tmp_path, kind):
    for i in range(70):
        Image.new("L", (2, 2)).save(tmp_path / f"{i:03}.png")
    good = (tmp_path / "000.png").read_bytes()
    for place in ("000.png", "035.png", "069.png"):
        (tmp_path / place).write_bytes(broken(kind))
        reason = ".* pixels are too many" if kind == "large" else ".+"
        refusal = rf"{place}: not a readable image \({reason}\): remove or replace it"
        with pytest.raises(ValueError, match=refusal) as error:
            images.decode(images.list_images(tmp_path, "train"), 8, tmp_path)
        assert "BytesIO" not in str(error.value)
        (tmp_path / place).write_bytes(good)


@pytest.mark.parametrize("place", ["read_bytes", "open", "resize"])
def test_a_passing_fault_is_never_a_broken_image(tmp_path, monkeypatch, place):
    listing = images.list_images(make(tmp_path, "1.png 2.png"), "train")
    owner = {"read_bytes": Path, "open": Image, "resize": Image.Image}[place]
    lack = OSError("out of memory error when reading image file")  # without number, as Pillow's
    faults = OSError(errno.EIO, "Input/output error"), OSError(errno.EMFILE, "Too many open files")
    for fault, in_memory in itertools.product((*faults, MemoryError(), lack), (0, 1 << 20)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, place, failing(fault, 2, getattr(owner, place)))
            kind = type(fault) if fault in faults else MemoryError
            with pytest.raises(kind, match=r"\.png"):
                images.decode(listing, 8, tmp_path / "decoded", in_memory)


def test_a_fault_of_the_disk_leaves_no_images_out(tmp_path, monkeypatch):
    make(tmp_path, "a/1.png")
    stale = OSError(errno.ESTALE, "Stale file handle")
    monkeypatch.setattr(images.os, "scandir", failing(stale, 2, os.scandir))
    with pytest.raises(OSError, match="Stale"):
        images.list_images(tmp_path, "train")


# ------------------------------------------------------------ The decoded file


@pytest.fixture
def many(tmp_path):
    """200 small pictures, in tmp_path/set."""
    (tmp_path / "set").mkdir()
    for i in range(200):
        Image.new("RGB", (9, 9), (i, 255 - i, i // 2)).save(tmp_path / f"set/{i:03}.png")
    return images.list_images(tmp_path / "set", "train")


def test_memory_and_file_agree_and_the_file_is_made_once(many, tmp_path, monkeypatch, capfd):
    x = images.decode(many, 8, tmp_path / "new/folder")
    assert torch.is_tensor(x) and x.dtype == torch.uint8 and not capfd.readouterr().out
    assert torch.equal(x[7], images.square(many.paths[7], 8))
    place = images.decoded_path(many, 8, tmp_path / "new/folder")
    for made in (True, False):
        y = images.decode(many, 8, place.parent, in_memory=200 * 192 - 1)
        assert isinstance(y, np.memmap) and not y.flags.writeable and np.array_equal(x, y)
        said = f"decoding 200 images of 8 px into {place} (0.0 GB), once\n"
        assert capfd.readouterr().out == said * made
        monkeypatch.setattr(images, "square", failing(AssertionError("decoded again"), 1))
    assert [p.name for p in place.parent.iterdir()] == [place.name]


def test_a_damaged_file_is_made_again(many, tmp_path):
    x, place = images.decode(many, 8, tmp_path), images.decoded_path(many, 8, tmp_path)
    other = io.BytesIO()
    np.save(other, np.zeros((200, 3), np.uint8))
    whole = np.array(images.decode(many, 8, tmp_path, 0)).tobytes()
    for content in (b"", b"junk", whole, other.getvalue(), place.read_bytes() + b"more"):
        place.write_bytes(content)
        assert np.array_equal(images.decode(many, 8, tmp_path, 0), x)


@pytest.mark.parametrize("rest", [b"", b"half a square"])
def test_a_stopped_decoding_goes_on(many, tmp_path, monkeypatch, rest, capfd):
    whole, real, calls = images.decode(many, 8, tmp_path), images.square, []
    place = images.decoded_path(many, 8, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(images, "square", failing(KeyboardInterrupt(), 150, real))
        images.decode(many, 8, tmp_path, 0)
    part = place.with_name(place.name + ".part")
    done = (part.stat().st_size - 128) // 192 - 64  # a power cut may have torn the last block
    assert done == 64 and not place.exists()
    with open(part, "ab") as file:
        file.write(rest)
    monkeypatch.setattr(images, "square", lambda *words: calls.append(words) or real(*words))
    assert np.array_equal(images.decode(many, 8, tmp_path, 0), whole) and not part.exists()
    assert len(calls) == 200 - done and f"; {done} are done" in capfd.readouterr().out


@pytest.mark.parametrize("killed", [False, True])
def test_a_second_process_without_a_lock_spoils_nothing(many, tmp_path, monkeypatch, killed):
    """It begins, and ends or is killed, between two blocks of the first."""
    whole, real = images.decode(many, 8, tmp_path), images.decode_blocks
    place, begun = images.decoded_path(many, 8, tmp_path), []

    def second():
        with contextlib.suppress(KeyboardInterrupt):
            images.write_squares(many.paths, 8, place, print)

    def blocks(*words):
        for row, block in real(*words):
            if begun and killed and len(begun) == 1:
                begun.append("killed")
                raise KeyboardInterrupt
            yield row, block
            if row == 64 and not begun:
                begun.append("begun")
                second()

    monkeypatch.setattr(images, "decode_blocks", blocks)
    assert np.array_equal(images.decode(many, 8, tmp_path, 0), whole)


def test_a_part_that_another_process_renames_or_spoilt_is_not_gone_on_with(
    many, tmp_path, monkeypatch
):
    whole, place = images.decode(many, 8, tmp_path), images.decoded_path(many, 8, tmp_path)
    part, usage = place.with_name(place.name + ".part"), shutil.disk_usage
    images.decode(many, 8, tmp_path, 0)
    content = place.read_bytes()
    place.unlink()
    part.write_bytes(content[: 128 + 192 * 150])

    def renamed(folder):  # asked for after the part's length was read
        os.replace(part, place)
        return usage(folder)

    with monkeypatch.context() as patch:
        patch.setattr(images.shutil, "disk_usage", renamed)
        assert np.array_equal(images.decode(many, 8, tmp_path, 0), whole)
    place.unlink()
    part.write_bytes(content[:200] + content)  # as two processes that append would leave it
    assert np.array_equal(images.decode(many, 8, tmp_path, 0), whole)


def test_the_file_of_other_images_is_never_used(many, tmp_path):
    place = images.decoded_path(many, 8, tmp_path)
    fewer = many._replace(paths=many.paths[1:], names=many.names[1:])
    assert images.decoded_path(many, 9, tmp_path) != place
    assert images.decoded_path(fewer, 8, tmp_path) != place
    shutil.move(tmp_path / "set", tmp_path / "moved")
    moved = images.list_images(tmp_path / "moved", "train")
    assert images.decoded_path(moved, 8, tmp_path) == place
    time = moved.paths[3].stat().st_mtime_ns
    os.utime(moved.paths[3], ns=(time, time + 1000))
    assert images.decoded_path(moved, 8, tmp_path) != place


def test_too_little_disk_is_refused_before_the_first_byte(many, tmp_path, monkeypatch):
    monkeypatch.setattr(images.shutil, "disk_usage", lambda _: SimpleNamespace(free=200 * 192 - 1))
    with pytest.raises(ValueError, match="only 0.0 are free.*--decoded-dir"):
        images.decode(many, 8, tmp_path / "decoded", 0)
    assert not list((tmp_path / "decoded").iterdir())
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="file.*cannot be written.*--decoded-dir"):
        images.decode(many, 8, tmp_path / "file", 0)


def test_when_the_disk_is_full_what_is_decoded_is_kept(many, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))  # files end there
    try:
        with pytest.raises(ValueError, match="cannot be written.*--decoded-dir"):
            images.decode(many, 8, tmp_path, 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert next(tmp_path.glob("*.part")).stat().st_size == 20000
    assert np.array_equal(images.decode(many, 8, tmp_path, 0), images.decode(many, 8, tmp_path))


def test_progress_and_the_time_left_are_told(many, tmp_path, monkeypatch, capfd):
    clock = itertools.count(0, 6)  # seconds
    monkeypatch.setattr(images, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    images.decode(many, 8, tmp_path, 0)
    lines = [line for line in capfd.readouterr().out.splitlines() if " left" in line]
    assert lines == ["decoded 128 of 200, 0.1 min left", "decoded 200 of 200, 0.0 min left"]
