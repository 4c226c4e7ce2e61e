"""Textures (texture.py): exact Efros-Leung, and a bank on disk that survives what happens to it.

python -m pytest tests/test_texture.py
"""

import errno
import itertools
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sacl
import texture
from conftest import log_of, tiny


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth(b: int, side: int, seed: int = 0) -> torch.Tensor:
    """Random images (b, 3, side, side), uint8: coarse blobs and a little noise, as photographs."""
    g = seeded(seed)
    coarse = torch.rand(b, 3, 6, 6, generator=g)
    x = F.interpolate(coarse, (side, side), mode="bilinear", align_corners=True)
    return (255 * (0.9 * x + 0.1 * torch.rand(x.shape, generator=g))).byte()


# ------------------------------------------------------------ exactness
def violations(sources, index, schedule, window, eps=0.1) -> int:
    """How many pixels of a texture were not a legal choice: Efros & Leung again, in float64.

    Independent of texture.py: one pixel after another, all windows compared by brute force.
    sources (n, C, s, s) uint8, index (H, W), 0 allowed.
    """
    n, _, s, _ = sources.shape
    half, (height, width) = window // 2, index.shape
    a = np.arange(window) - half
    gauss = np.exp(-(a[:, None] ** 2 + a**2) / (2 * (window / 6.4) ** 2))
    around = ((0, 0), (0, 0), (half, half), (half, half))
    source = np.pad(sources.numpy() / 255.0, around, constant_values=np.nan)
    source = np.lib.stride_tricks.sliding_window_view(source, (window, window), (2, 3))
    source = source.transpose(0, 2, 3, 1, 4, 5).reshape(n * s * s, -1, window, window)
    chosen = source[index.numpy().ravel(), :, half, half].reshape(height, width, -1)
    canvas = np.pad(chosen, ((half, half), (half, half), (0, 0))).transpose(2, 0, 1)
    filled = np.zeros(canvas.shape[1:], bool)
    filled[half : half + height, half : half + width] = (schedule.level == 0).numpy()
    wrong = 0
    for y, x in schedule.sequence.tolist():
        known = filled[y : y + window, x : x + window]
        weight = gauss[known] / gauss[known].sum()
        gap = source[:, :, known] - canvas[:, y : y + window, x : x + window][:, known]
        distance = ((gap**2).sum(1) * weight).sum(1)  # NaN where it leaves the sample
        distance = np.where(np.isnan(distance), np.inf, distance)
        wrong += not distance[index[y, x]] <= (1 + eps) * distance.min() + 1e-6
        filled[y + half, x + half] = True
    assert filled[half : half + height, half : half + width].all()
    return wrong


def grown(window=5, seeds=1, eps=0.1, seed=0):
    sources = texture.two_patches(smooth(2, 24, seed), 11, seeded(seed))
    options = dict(window=window, seeds=seeds, eps=eps, generator=seeded(seed), return_index=True)
    _, index = texture.synthesize(sources, (20, 18), **options)
    return sources, index, texture.fill_schedule(20, 18, window, seeds)


@pytest.mark.parametrize("window, seeds, eps", [
    (3, 1, 0.1), (5, 1, 0.1), (5, 3, 0.1), (5, 2, 0.0), (7, 3, 0.5), (11, 2, 0.1),
])  # fmt: skip
def test_every_pixel_comes_from_a_window_within_eps_of_the_best(window, seeds, eps):
    """Efros & Leung, Sec. 2.1: 0 violations in a float64 replay, one pixel after another."""
    sources, index, schedule = grown(window, seeds, eps, seed=window + seeds)
    for image in range(len(sources)):
        assert violations(sources[image], index[image], schedule, window, eps) == 0


def test_the_replay_catches_a_ring_filled_at_once_and_a_random_pick(monkeypatch):
    """The control of the test above: approximations in use elsewhere do break the rule."""
    sources, index, schedule = grown()
    total = len(schedule.sequence)
    anything = torch.where(schedule.level == 0, index[0], torch.randint(242, index[0].shape))
    assert violations(sources[0], anything, schedule, 5) > 0.5 * total
    ring = (schedule.level + 9999) * (schedule.level > 0)
    for k in range(20):  # the k-th ring around the filled pixels
        near = F.max_pool2d((ring <= k).float()[None], 3, 1, 1)[0].bool()
        ring[near & (ring > 9000)] = k + 1
    monkeypatch.setattr(texture, "fill_schedule", lambda *_: schedule._replace(level=ring))
    _, at_once, _ = grown()
    assert violations(sources[0], at_once[0], schedule, 5) > 0.05 * total


@pytest.mark.parametrize("window, seeds", [(5, 1), (7, 3), (5, 2)])
def test_filling_level_by_level_equals_filling_pixel_by_pixel(monkeypatch, window, seeds):
    """The claim that makes the batch fast; in float64, where no rounding can hide a difference."""
    schedule = texture.fill_schedule(24, 24, window, seeds)
    alone = torch.zeros_like(schedule.level)
    alone[tuple(schedule.sequence.T)] = 1 + torch.arange(len(schedule.sequence))
    sources = texture.two_patches(smooth(4, 32), 14, seeded()).double() / 255
    options = dict(window=window, seeds=seeds, return_index=True)
    _, together = texture.synthesize(sources, 24, generator=seeded(1), **options)
    monkeypatch.setattr(texture, "fill_schedule", lambda *_: schedule._replace(level=alone))
    _, one_by_one = texture.synthesize(sources, 24, generator=seeded(1), **options)
    assert torch.equal(together, one_by_one)
    _, single = texture.synthesize(sources.float(), 24, generator=seeded(1), **options)
    assert (together == single).float().mean() > 0.99  # float32 may break a tie otherwise


def test_exactness_survives_tf32_and_autocast_and_the_switches_come_back():
    """The caller's mixed precision must not reach the comparison of windows."""
    images = smooth(2, 20)
    expected = texture.texture_views(images, generator=seeded())
    switches = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    switches = [s for s in switches if hasattr(s, "fp32_precision")]  # torch 2.9 and later
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            view = texture.texture_views(images, generator=seeded())
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.equal(expected, view)
        for switch in switches:
            switch.fp32_precision = "tf32"
        with texture.exact_products(images.device):
            assert torch.get_float32_matmul_precision() == "highest"
            assert all(switch.fp32_precision == "ieee" for switch in switches)
        assert all(switch.fp32_precision == "tf32" for switch in switches)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("window", [5, 7])
@pytest.mark.parametrize("period", [2, 3, 5])
def test_a_periodic_tile_is_continued(period, window):
    """Every 5 x 5 window of the texture occurs in the sample."""
    tile = torch.randint(256, (2, 3, period, period), generator=seeded(period), dtype=torch.uint8)
    sample = tile.repeat(1, 1, 16 // period + 1, 16 // period + 1)[:, None, :, :16, :16]
    out = texture.synthesize(sample, 24, window=window, generator=seeded())
    for pair in zip(out, sample[:, 0], strict=True):
        parts = [x.unfold(1, 5, 1).unfold(2, 5, 1).permute(1, 2, 0, 3, 4) for x in pair]
        found, there = ({w.numpy().tobytes() for w in x.flatten(0, 1)} for x in parts)
        assert found <= there


# ------------------------------------------------------------ the order of filling
@pytest.mark.parametrize("window, seeds", [(3, 1), (5, 3), (7, 2)])
def test_a_pixel_fills_right_after_the_last_earlier_pixel_that_it_sees(window, seeds):
    """So pixels of one level never see each other; level 0 is the seeds; all pixels are filled."""
    schedule = texture.fill_schedule(20, 23, window, seeds)
    level, half = schedule.level, window // 2
    assert (level == 0).sum() == 9 * seeds**2 == schedule.blocks.numel()
    assert (level.flatten()[schedule.blocks.flatten()] == 0).all()
    rank = torch.full(level.shape, -1)
    rank[tuple(schedule.sequence.T)] = torch.arange(len(schedule.sequence))
    assert len(schedule.sequence.unique(dim=0)) == level.numel() - 9 * seeds**2
    for y, x in schedule.sequence.tolist():
        rows, cols = slice(max(0, y - half), y + half + 1), slice(max(0, x - half), x + half + 1)
        earlier = level[rows, cols][rank[rows, cols] < rank[y, x]]
        assert level[y, x] == 1 + earlier.max()
        assert (level[rows, cols] == level[y, x]).sum() == 1  # itself


def test_the_order_is_rings_by_decreasing_number_of_filled_neighbours():
    """Efros' pseudo-code: dilate, sort by filled neighbours in the window, fill the whole list."""
    schedule = texture.fill_schedule(15, 15, 5, 1)
    filled = schedule.level == 0
    rest = schedule.sequence.tolist()
    while rest:
        x = filled.float()[None, None]
        touching = (F.conv2d(x, torch.ones(1, 1, 3, 3), padding=1)[0, 0] > 0) & ~filled
        known = F.conv2d(x, torch.ones(1, 1, 5, 5), padding=2)[0, 0]
        ring, rest = rest[: touching.sum()], rest[touching.sum() :]
        assert sorted(ring) == touching.nonzero().tolist()
        counts = [known[y, x].item() for y, x in ring]
        assert counts == sorted(counts, reverse=True)
        filled = filled | touching


@pytest.mark.parametrize("window, one, lattice", [(5, 90, 40), (7, 121, 54), (11, 192, 158)])
def test_schedules_have_few_levels(window, one, lattice):
    """32 x 32 from one seed in 90 levels, not 1015 steps; from 3 x 3 seeds in 40."""
    assert texture.fill_schedule(32, 32, window, 1).level.max() == one
    assert texture.fill_schedule(32, 32, window, 3).level.max() == lattice
    assert texture.fill_schedule(32, 32, window, 3) is texture.fill_schedule(32, 32, window, 3)


# ------------------------------------------------------------ pixels and draws
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_textures_are_source_pixels_bit_for_bit(dtype):
    """out = source[n, :, y, x] at index n s^2 + y s + x; the images' dtype and device are kept."""
    images = smooth(3, 20)
    images = images if dtype == torch.uint8 else (images / 255).to(dtype)
    sources = texture.two_patches(images, 9, seeded())
    given = dict(out_size=(17, 13), seeds=2)
    out, index = texture.synthesize(sources, **given, return_index=True, generator=seeded())
    assert out.dtype == dtype and out.shape == (3, 3, 17, 13) and out.device == images.device
    assert index.dtype == torch.int64 and index.shape == (3, 17, 13)
    for b in range(3):
        n, y, x = np.unravel_index(index[b].numpy(), (2, 9, 9))
        assert torch.equal(out[b].permute(1, 2, 0), sources[b, n, :, y, x])
    assert torch.equal(out, texture.synthesize(sources, **given, generator=seeded()))


def test_chunks_and_repetition_change_nothing_and_another_generator_does():
    """The draws belong to the generator alone, so resumed runs see the same textures."""
    images, sizes = smooth(7, 24), (1, 10**6, 10**9, 10**9)
    views = [texture.texture_views(images, generator=seeded(), chunk_bytes=size) for size in sizes]
    assert all(torch.equal(views[0], view) for view in views)
    other = texture.texture_views(images, generator=seeded(1))
    assert (views[0] != other).float().mean() > 0.3


def test_a_training_step_may_call_it(capsys):
    """Nothing is printed or recorded, and neither torch's generator nor numpy's moves."""
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    images = (smooth(2, 16) / 255).requires_grad_()
    assert not texture.texture_views(images, generator=seeded()).requires_grad
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()
    assert capsys.readouterr() == ("", "")


def test_candidates_are_drawn_uniformly():
    """In a sample of one colour every pixel is a candidate, and each is taken equally often."""
    sources = torch.full((1, 2, 3, 4, 4), 77, dtype=torch.uint8)
    level, count = texture.fill_schedule(16, 16, 3, 1).level, torch.zeros(32)
    for seed in range(40):
        options = dict(window=3, generator=seeded(seed), return_index=True)
        out, index = texture.synthesize(sources, 16, **options)
        assert (out == 77).all()
        count += index[0][level > 0].bincount(minlength=32)
    # border pixels of the sample can be taken only where nothing is known beyond: compare equals
    inner = count.view(2, 4, 4)[:, 1:3, 1:3].flatten()
    assert (inner / inner.mean() - 1).abs().max() < 0.15


def test_both_patches_are_used_equally_and_in_every_column():
    """Seeds are dealt to the patches in balance, at random places of the lattice."""
    sources = torch.zeros(64, 2, 3, 14, 14, dtype=torch.uint8)
    sources[:, 1] = 255
    used = (texture.synthesize(sources, 32, seeds=3, generator=seeded()) > 0).float()
    assert 0.45 < used.mean() < 0.55
    assert (used.mean((0, 1)) - 0.5).abs().max() < 0.3


def test_seeds_are_whole_blocks_from_anywhere_in_the_patches():
    """Each block is a 3 x 3 piece of one patch, and every place is drawn equally often."""
    sources = torch.zeros(500, 2, 3, 5, 5, dtype=torch.uint8)
    schedule = texture.fill_schedule(16, 16, 3, 2)
    options = dict(window=3, seeds=2, generator=seeded(), return_index=True)
    index = texture.synthesize(sources, 16, **options)[1].flatten(1)[:, schedule.blocks]
    corner = index[..., 0]  # (500, 4 blocks)
    offset = torch.tensor([0, 1, 2, 5, 6, 7, 10, 11, 12])
    assert torch.equal(index, corner[..., None] + offset)
    count = corner.flatten().bincount(minlength=50).view(2, 5, 5)
    assert (count[:, 3:] == 0).all() and (count[:, :, 3:] == 0).all()
    assert (count[:, :3, :3] / (2000 / 18) - 1).abs().max() < 0.4  # 4 sigma
    assert ((corner < 25).sum(1) == 2).all()  # two blocks of each patch


def test_the_defaults_are_14_pixels_and_3_x_3_seeds_for_cifar():
    """`texture_views` alone is the training setting: 0.43 of the side, window 5, 3 x 3 seeds."""
    images, g = smooth(2, 32), seeded()
    sources = texture.two_patches(images, 14, g)
    expected = texture.synthesize(sources, 32, window=5, seeds=3, eps=0.1, generator=g)
    assert torch.equal(texture.texture_views(images, generator=seeded()), expected)


def test_two_patches_are_the_centre_and_a_place_drawn_anew_for_each_image():
    """Ge et al.: 96 of 224 pixels, so 14 of 32; the random one covers the whole image."""
    row, col = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    images = torch.stack([row, col, 0 * row]).byte().expand(400, 3, 32, 32)
    patches = texture.two_patches(images, None, seeded())
    assert patches.shape == (400, 2, 3, 14, 14)
    assert torch.equal(patches[:, 0], images[:, :, 9:23, 9:23])
    top, left = patches[:, 1, 0, 0, 0].long(), patches[:, 1, 1, 0, 0].long()
    assert set(top.tolist()) == set(left.tolist()) == set(range(19))
    for patch, y, x in zip(patches[:5, 1], top, left, strict=False):
        assert torch.equal(patch, images[0, :, y : y + 14, x : x + 14])


# ------------------------------------------------------------ texture kept, layout gone
def ncc(a, b) -> torch.Tensor:
    """Correlation of images with images, (A, ...) and (B, ...) -> (A, B)."""
    a, b = (x.flatten(1).float() for x in (a, b))
    a, b = (F.normalize(x - x.mean(1, keepdim=True), dim=1) for x in (a, b))
    return a @ b.T


def test_a_lattice_of_seeds_destroys_the_layout_and_one_seed_does_not():
    """Measured on CIFAR-100 in results/; here on generated images: same layout, or chance."""
    images = smooth(48, 32)
    excess = {}
    for seeds in (1, 3):
        similar = ncc(texture.texture_views(images, seeds=seeds, generator=seeded()), images)
        own = similar.diagonal().mean()
        excess[seeds] = own - (similar.sum() - similar.trace()) / (48 * 47)
    assert excess[1] > 0.12 and excess[3].abs() < 0.1 and excess[3] < excess[1] / 2


def test_textures_keep_the_local_statistics_of_their_image():
    """The own image is found by 5 x 5 statistics far more often than by chance (1 in 48)."""
    g = seeded()
    grain = torch.rand(48, 3, 32, 32, generator=g)
    blur = F.avg_pool2d(grain, 3, 1, 1)
    mix = torch.rand(48, 1, 1, 1, generator=g)
    colour = torch.rand(48, 3, 1, 1, generator=g)
    images = (255 * (0.5 * colour + 0.5 * (mix * grain + (1 - mix) * blur))).byte()
    filters = torch.randn(32, 3, 5, 5, generator=g)

    def statistics(x):
        x = F.conv2d(x / 255, filters).relu().flatten(2)
        return (x @ x.mT / x.shape[2]).flatten(1)

    out = texture.texture_views(images, generator=g)
    distance = torch.cdist(statistics(out), statistics(images))
    assert (distance.argmin(1) == torch.arange(48)).float().mean() > 0.5
    shuffled = distance[torch.randperm(48, generator=g)]
    assert (shuffled.argmin(1) == torch.arange(48)).float().mean() < 0.2


# ------------------------------------------------------------ bad arguments
SOURCES = torch.zeros(2, 2, 3, 9, 9, dtype=torch.uint8)
BAD_ARGUMENTS = {
    "window": [dict(window=x) for x in (4, 1, -5, 11, 5.0)],
    "seeds": [dict(seeds=0), dict(seeds=7)],
    "out_size": [dict(out_size=x) for x in (2, 20.5, (20, 20, 20), 5000)],
    "out_size=20 x 8": [dict(out_size=(20, 8), seeds=3)],
    "eps": [dict(eps=-0.1), dict(eps=float("nan"))],
    "chunk_bytes": [dict(chunk_bytes=0)],
    "sources": [
        dict(sources=x)
        for x in (
            *(SOURCES[:0], SOURCES[:, :0], SOURCES[0], SOURCES[..., :8]),
            *(SOURCES.long(), SOURCES.bool(), SOURCES.numpy(), SOURCES - 0.1, SOURCES + 255.0),
            *(SOURCES * float("nan"), SOURCES + float("inf")),
        )
    ],
}


@pytest.mark.parametrize(
    "name, change", [(name, change) for name, rows in BAD_ARGUMENTS.items() for change in rows]
)
def test_a_bad_argument_is_named(name, change):
    """A ValueError that names the argument, not a crash deep inside."""
    with pytest.raises(ValueError, match=name):
        texture.synthesize(**dict(sources=SOURCES, out_size=20) | change)


@pytest.mark.parametrize(
    "name, images, options",
    [
        ("images", torch.zeros(0, 3, 32, 32), {}),
        ("images", torch.zeros(3, 32, 32), {}),
        ("images", [1, 2], {}),
        ("patch", torch.zeros(2, 3, 32, 32), dict(patch=33)),
        ("patch", torch.zeros(2, 3, 32, 32), dict(patch=0)),
    ],
)
def test_a_bad_batch_is_named(name, images, options):
    """Empty batches, patches larger than the image: a ValueError that names them."""
    with pytest.raises(ValueError, match=name):
        texture.texture_views(images, **options)


# ------------------------------------------------------------ a bank on disk
BANK = dict(textures=3, seed=5, window=3, patch=5, images_id="names", log=lambda line: None)


@pytest.fixture
def blocks_of_two(monkeypatch):
    """Two images of 16 px with three textures each between two writes."""
    monkeypatch.setattr(texture, "BLOCK", 2 * 3 * 3 * 16 * 16)


@pytest.fixture
def whole(tmp_path, blocks_of_two):
    """A bank of five images made in one go, in three blocks."""
    texture.bank(smooth(5, 16), tmp_path / "whole.npy", **BANK)
    return (tmp_path / "whole.npy").read_bytes()


def test_a_bank_holds_k_textures_of_each_image_and_the_seed_tells_which(tmp_path, blocks_of_two):
    images = smooth(1, 16).repeat(5, 1, 1, 1)
    bank = texture.bank(images, tmp_path / "new folder" / "bank.npy", **BANK)
    assert isinstance(bank, np.memmap) and not bank.flags.writeable
    assert bank.shape == (5, 3, 3, 16, 16) and bank.dtype == np.uint8
    assert (bank == np.load(tmp_path / "new folder" / "bank.npy")).all()
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["bank.npy"]
    every = bank.reshape(15, -1)
    assert len(np.unique(every, axis=0)) == 15  # in one block, and in blocks that follow
    colours = {tuple(c) for c in images[0].flatten(1).T.tolist()}
    assert {tuple(c) for c in bank[4, 2].reshape(3, -1).T.tolist()} <= colours
    for seed in (-1, 6, 1_700_000_000_000, 2**64):  # any whole number, such as a clock's
        other = texture.bank(images, tmp_path / f"{seed}.npy", **BANK | {"seed": seed})
        assert (other != bank).mean() > 0.1


def test_a_finished_bank_is_read_and_not_made_again(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(texture, "texture_views", None)
    monkeypatch.setattr(texture, "write_at", None)
    given = {k: np.int64(v) if isinstance(v, int) else v for k, v in BANK.items()}
    for words in (BANK, given):
        bank = texture.bank(smooth(5, 16), tmp_path / "whole.npy", **words, seeds=None)
        assert bank.shape == (5, 3, 3, 16, 16)
    assert (tmp_path / "whole.npy").read_bytes() == whole


@pytest.mark.filterwarnings("error")
def test_it_does_not_matter_how_the_images_lie_in_memory(tmp_path, whole):
    images = smooth(5, 16)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    turned = images.to(memory_format=torch.channels_last)
    for i, form in enumerate((mapped, turned)):
        texture.bank(form, tmp_path / f"{i}.npy", **BANK)
        assert (tmp_path / f"{i}.npy").read_bytes() == whole


@pytest.mark.parametrize("halves", range(9))
def test_a_bank_killed_at_any_write_goes_on_to_the_same_bytes(tmp_path, whole, monkeypatch, halves):
    """After so many half writes, of a header and three blocks. Nobody sees half a bank."""
    path, part = tmp_path / "bank.npy", tmp_path / "bank.npy.part"
    left, write_at = itertools.count(halves, -2), texture.write_at

    def killed(file, place, data):
        data, due = bytes(memoryview(data).cast("B")), next(left)
        write_at(file, place, data[: len(data) * due // 2])
        if due <= 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(texture, "write_at", killed)
        texture.bank(smooth(5, 16), path, **BANK)
    assert not path.exists() and whole.startswith(part.read_bytes())
    texture.bank(smooth(5, 16), path, **BANK)
    assert path.read_bytes() == whole and not part.exists()


def test_a_resume_makes_what_is_missing_and_the_last_block_that_a_power_cut_may_have_torn(
    tmp_path, whole, monkeypatch
):
    path, part = tmp_path / "bank.npy", tmp_path / "bank.npy.part"
    block = texture.BLOCK
    header = len(whole) - 5 * block // 2
    torn = bytearray(whole[: header + 2 * block])
    torn[header] ^= 255  # made long ago: must not be made again
    torn[header + block :] = bytes(block)
    part.write_bytes(torn)
    texture.bank(smooth(5, 16), path, **BANK)
    made = bytearray(path.read_bytes())
    made[header] ^= 255
    assert made == whole


def test_progress_tells_place_size_and_time_left(tmp_path, whole, monkeypatch):
    lines, clock = [], itertools.count(0, 60)  # a minute goes by each time it is looked at
    monkeypatch.setattr(texture, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    texture.bank(smooth(5, 16), tmp_path / "bank.npy", **BANK | {"log": lines.append})
    assert "bank.npy" in lines[0] and " MB free" in lines[0]
    assert "2 of 5 images, 2 min left" in lines[1] and "5 of 5" in lines[3] and len(lines) == 4


def test_a_full_disk_ends_in_a_sentence_and_the_bank_goes_on_when_there_is_room(tmp_path, whole):
    resource = pytest.importorskip("resource")
    path, part = tmp_path / "bank.npy", tmp_path / "bank.npy.part"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) - texture.BLOCK, hard))
    try:
        with pytest.raises(OSError, match=r"what is written is kept.*bank\.npy\.part") as error:
            texture.bank(smooth(5, 16), path, **BANK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG and not path.exists()
    assert whole.startswith(part.read_bytes()) and part.stat().st_size > texture.BLOCK
    texture.bank(smooth(5, 16), path, **BANK)
    assert path.read_bytes() == whole


def test_too_little_disk_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(texture.shutil, "disk_usage", lambda _: SimpleNamespace(free=11_000))
    with pytest.raises(OSError, match=r"bank\.npy takes 0 MB of the 0 MB free there: make room"):
        texture.bank(smooth(5, 16), tmp_path / "bank.npy", **BANK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, told",
    [
        (dict(seed=6), "has seed=5, not seed=6"),
        (dict(textures=2), "has shape=5x3x3x16x16, not shape=5x2x3x16x16"),
        (dict(window=5), "has window=3, not window=5"),
        (dict(patch=None), "has patch=5, not the defaults"),
        (dict(images=smooth(4, 16)), "shape=5x3x3x16x16.* not shape=4x3x3x16x16"),
        (dict(images=smooth(5, 16) ^ (torch.arange(5) == 4)[:, None, None, None]), "pixels="),
        (dict(images_id="other names"), "has images_id='names', not images_id='other"),
    ],
)
def test_a_bank_of_other_images_or_options_is_refused_and_kept(tmp_path, whole, change, told):
    path, refusal = tmp_path / "whole.npy", f"{told}.*: move it, or name another file"
    with pytest.raises(ValueError, match=rf"whole\.npy .*{refusal}"):
        texture.bank(**dict(images=smooth(5, 16), path=path) | BANK | change)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", ["bank.npy", "bank.npy.part"])
@pytest.mark.parametrize("content", ["text", "array", "# textures: of mine"])
def test_a_file_of_somebody_else_is_refused_and_kept(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    if content == "array":
        with (tmp_path / name).open("wb") as file:
            np.save(file, np.zeros((5, 3, 3, 16, 16), np.uint8))
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match=f"{name} has .*: move it, or name another file"):
        texture.bank(smooth(5, 16), tmp_path / "bank.npy", **BANK)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: before}


def test_a_bank_that_was_copied_in_part_is_told_as_that(tmp_path, whole):
    (tmp_path / "whole.npy").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"whole\.npy is cut short"):
        texture.bank(smooth(5, 16), tmp_path / "whole.npy", **BANK)


@pytest.mark.parametrize(
    "name, change",
    [
        ("window", dict(window=4)),
        ("patch", dict(patch=17)),
        ("textures", dict(textures=0)),
        ("images", dict(images=smooth(5, 16).float())),
        ("images", dict(images=smooth(5, 16)[:0])),
        ("images", dict(images=smooth(5, 16)[0])),
    ],
)
def test_a_bad_argument_of_a_bank_is_named_and_leaves_no_file_in_the_way(tmp_path, name, change):
    good = dict(images=smooth(5, 16), path=tmp_path / "bank.npy") | BANK
    with pytest.raises(ValueError, match=name):
        texture.bank(**good | change)
    assert list(tmp_path.iterdir()) == []


def test_the_command_of_old_says_that_it_is_gone(capsys):
    """Silence would be taken for success."""
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(texture.__file__, run_name="__main__")
    assert stop.value.code == 2 and "texture.synthesize" in capsys.readouterr().err


# ------------------------------------------------------------ in a run


def test_large_images_take_their_textures_from_a_bank_made_on_first_use(folder, tmp_path):
    data = sacl.in_memory(torch.randint(256, (2, 3, 256, 256)).byte(), torch.zeros(2), ["a"])
    with pytest.raises(sacl.UsageError, match="--texture-bank FILE.*--texture none"):
        sacl.make_textures(data, tiny(texture="negative"), 0)
    bank = dict(texture="negative", texture_bank=tmp_path / "bank.npy")
    cfg = tiny(folder, output_dir=tmp_path / "a", max_steps=1, **bank)
    sacl.train(cfg)
    before = (tmp_path / "bank.npy").read_bytes()
    sacl.train(cfg)
    assert (tmp_path / "bank.npy").read_bytes() == before and len(log_of(tmp_path / "a")) == 2
    (tmp_path / "bank.npy.lock").unlink()
    (tmp_path / "bank.npy.lock").mkdir()  # as on a drive that cannot be written
    data = sacl.load_data(cfg, "train")
    textures = sacl.make_textures(data, cfg, 0)
    taken = sacl.take(textures, torch.ones(99).long(), torch.device("cpu"))
    assert {x.numpy().tobytes() for x in taken} == {x.tobytes() for x in textures[1]}  # all four
    with pytest.raises(sacl.UsageError, match="bank.npy"):
        sacl.make_textures(data._replace(pixels=data.pixels[:9], names=data.names[:9]), cfg, 0)
