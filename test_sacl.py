"""The claims that the paper and the README make about the code, on toy sizes, on the CPU.

python -m pytest          the whole run, with tests/: what a user may do to it, textures, own images
"""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision import transforms
from torchvision.transforms import functional as TF

import eval_linear
import sacl
import texture
from conftest import flags, log_of, tiny
from eval_linear import ProbeConfig
from sacl import Config, SEResNet

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def model_and_views(**given):
    model = sacl.SACL(tiny(**given))
    return model, *torch.randn(3, 8, 3, 16, 16)


@pytest.fixture
def one_block(monkeypatch):
    """The encoder "resnet18" has one block, where its depth plays no part."""
    monkeypatch.setitem(SEResNet.BLOCKS, "resnet18", (sacl.BasicBlock, (0, 1, 0, 0)))


# ------------------------------------------------------------ split and combine (Section 2.2)


def test_split_puts_cells_in_row_major_order():
    x = torch.randn(3, 3, 6, 9)
    cells = sacl.split(x, 3)
    assert cells.shape == (9, 3, 3, 2, 3)
    for row, column in itertools.product(range(3), range(3)):
        cell = x[:, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        assert torch.equal(cells[3 * row + column], cell)
    with pytest.raises(ValueError, match="grid of 3"):
        sacl.split(torch.zeros(1, 3, 8, 8), 3)


@pytest.mark.parametrize("pick, count", [(1, 4), (2, 6), (3, 4), (4, 1)])
def test_combine_equals_a_loop_over_subsets(pick, count):
    """Eq. (2): all C(4, i) means, in the order of itertools.combinations."""
    h = torch.randn(4, 5, 7, dtype=torch.double)
    e = sacl.combine(h, pick)
    assert e.shape == (count, 5, 7)
    for row, cells in zip(e, itertools.combinations(range(4), pick), strict=True):
        assert torch.allclose(row, sum(h[c] for c in cells) / pick)


# ------------------------------------------------------------ InfoNCE (Eq. 8-10)


def loop_info_nce(q, k, tau, kt=None, alpha=1.0, texture_negatives="own", k_same=None):
    """Eq. (10) written out one query and one negative at a time."""

    def cos(a, b):
        return (a @ b / a.norm() / b.norm()).item()

    total, (m, n, _) = 0.0, q.shape
    for i, j in itertools.product(range(m), range(n)):
        terms = [math.exp(cos(q[i, j], k[other]) / tau) for other in range(n)]
        positive = terms[j]
        if kt is not None:
            textures = [j] if texture_negatives == "own" else range(n)
            terms += [math.exp(alpha * cos(q[i, j], kt[t]) / tau) for t in textures]
        if k_same is not None:
            terms += [math.exp(cos(q[i, j], k_same[o]) / tau) for o in range(n) if o != j]
        total -= math.log(positive / sum(terms))
    return total / (m * n)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("texture", [None, ("own", 0.0), ("own", 2.0), ("batch", 0.5)])
def test_info_nce_equals_the_formula_written_as_loops(texture, same):
    q, k = torch.randn(6, 5, 8, dtype=torch.double), torch.randn(3, 5, 8, dtype=torch.double)
    options = {"k_same": k[1]} if same else {}
    if texture:
        options |= {"kt": k[2], "texture_negatives": texture[0], "alpha": texture[1]}
    loss = sacl.info_nce(q, k[0], 0.2, **options)
    assert loss.item() == pytest.approx(loop_info_nce(q, k[0], 0.2, **options), abs=1e-12)


def test_info_nce_ignores_the_length_of_vectors_and_half_precision_logits():
    q, k = torch.randn(6, 4, 8), torch.randn(4, 8)
    loss = sacl.info_nce(q, k, 0.2)
    assert torch.allclose(loss, sacl.info_nce(7 * q, 0.1 * k, 0.2))
    with torch.autocast("cpu", torch.bfloat16):
        inside = sacl.info_nce(q, k, 0.2)
    assert inside.dtype == torch.float32 and torch.equal(inside, loss)
    blind = sacl.info_nce(q, torch.ones(4, 8), 0.2)  # keys that cannot be told apart
    assert blind.item() == pytest.approx(math.log(4), abs=1e-5)


# ------------------------------------------------------------ Algorithm 1


@pytest.mark.parametrize("given", [
    dict(texture="negative"), dict(texture="none"),
    dict(texture="negative", texture_alpha=2.0, texture_negatives="batch", negatives="eq10"),
])  # fmt: skip
def test_forward_is_algorithm_1_written_step_by_step(given):
    """Patches encoded apart, averaged in pairs before the projector; targets see whole views.

    Without textures this is Fast-MoCo's loss.
    """
    model, x1, x2, xt = model_and_views(**given)
    queries, keys = [], []
    for x in (x1, x2):
        halves = [half for row in x.chunk(2, 2) for half in row.chunk(2, 3)]
        h = model.encoder(torch.cat(halves)).chunk(4)
        e = torch.cat([(h[a] + h[b]) / 2 for a in range(4) for b in range(a + 1, 4)])
        queries.append(model.predictor(model.projector(e)).view(6, 8, 16))
        keys.append(model.target_projector(model.target_encoder(x)).double())
    views, kt = [x1, x2], None
    if given["texture"] == "negative":
        views.append(xt)
        kt = model.target_projector(model.target_encoder(xt)).double()
    how = kt, model.cfg.texture_alpha, model.cfg.texture_negatives
    same = keys if model.cfg.negatives == "eq10" else (None, None)  # Eq. (10): also q's own view
    ways = ((queries[0], keys[1], same[0]), (queries[1], keys[0], same[1]))
    losses = [loop_info_nce(q.double(), k, 0.2, *how, k_same) for q, k, k_same in ways]
    assert model(*views).item() == pytest.approx(sum(losses) / 2, abs=1e-5)


def test_one_cell_without_textures_and_attention_gives_moco_v3s_loss():
    """Algorithm 1 of Chen et al., ICCV 2021, whose loss is also multiplied by 2 tau."""
    model, x1, x2, _ = model_and_views(grid=1, combine=1, se="none", tau=0.5)

    def ctr(q, k):
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.5
        return 2 * 0.5 * F.cross_entropy(logits, torch.arange(len(q)))

    q1, q2 = (model.predictor(model.projector(model.encoder(x))) for x in (x1, x2))
    k1, k2 = (model.target_projector(model.target_encoder(x)) for x in (x1, x2))
    expected = ctr(q1, k2) + ctr(q2, k1)
    assert (2 * 2 * 0.5 * model(x1, x2)).item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_positive_texture_takes_the_place_of_the_second_view():
    model, x1, x2, xt = model_and_views(texture="positive")
    assert torch.equal(model(x1, x2, xt), model(x1, torch.zeros_like(x2), xt))
    plain, *_ = model_and_views()
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(model(x1, x2, xt), plain(x1, xt))


def test_no_gradient_reaches_the_target_and_every_online_tensor_gets_one():
    model, *views = model_and_views(texture="negative")
    for block in model.encoder.modules():
        if isinstance(block, sacl.Block):  # which starts as the identity
            nn.init.ones_(block.get_submodule(block.last_bn).weight)
    model(*views).backward()
    for name, p in model.named_parameters():
        assert p.grad is None if name.startswith("target_") else p.grad.any(), name


def test_the_target_starts_as_a_copy_and_follows_in_closed_form():
    """Eq. (6), (7): after n updates towards a fixed online net, 1 - m^n of the way."""
    model, *_ = model_and_views()
    for a, b in zip(model.encoder.parameters(), model.target_encoder.parameters(), strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    start = model.target_projector[0].weight.clone()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    for _ in range(3):
        model.update_target(0.9)
    moved = start + (1 - 0.9**3)
    assert torch.allclose(model.target_projector[0].weight, moved, atol=1e-6)
    model.update_target(1.0)
    assert torch.allclose(model.target_projector[0].weight, moved, atol=1e-6)
    model.update_target(0.0)
    assert torch.equal(model.target_projector[0].weight, model.projector[0].weight)


def test_textures_leave_the_targets_running_statistics_alone():
    with_texture, *views = model_and_views(texture="negative")
    without, *_ = model_and_views()
    without.load_state_dict(with_texture.state_dict())
    with_texture(*views)
    without(*views[:2])
    for a, b in zip(with_texture.buffers(), without.buffers(), strict=True):
        assert torch.equal(a, b)


def test_bfloat16_changes_the_loss_by_less_than_a_hundredth():
    model, *views = model_and_views(texture="negative")
    full = model(*views)
    with sacl.autocast(CPU, torch.bfloat16):
        half = model(*views)
    assert half.item() == pytest.approx(full.item(), rel=1e-2) and half.dtype == torch.float32
    assert half != full


def test_the_whole_loss_is_one_graph_for_the_compiler(one_block):
    """Traced without a break, textures and all, it gives the plain loss and gradients."""
    plain, *views = model_and_views(texture="negative", proj_layers=1)
    compiled = sacl.SACL(plain.cfg)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile(backend="eager", fullgraph=True, dynamic=False)
    losses = [model(*views) for model in (plain, compiled)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    sum(losses).backward()
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        if p.requires_grad:
            assert (p.grad - q.grad).norm() <= 1e-3 * p.grad.norm() + 1e-6, name


def test_one_batch_can_be_overfitted(monkeypatch):
    monkeypatch.setitem(SEResNet.BLOCKS, "resnet18", (sacl.BasicBlock, (0, 1, 1, 0)))
    model, x1, x2, _ = model_and_views(tau=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for _ in range(55):
        optimizer.zero_grad()
        loss = model(x1, x2)
        loss.backward()
        optimizer.step()
        model.update_target(0.9)
    assert loss < math.log(8) / 3


def test_the_spread_tells_collapse_from_health():
    q, k = torch.randn(6, 512, 64), torch.randn(512, 64)
    spreads = [sacl.similarities(q, x, None)["spread"].item() for x in (k, torch.ones(512, 64))]
    assert spreads == [pytest.approx(1, abs=0.05), pytest.approx(0, abs=1e-5)]
    figures = sacl.similarities(k.expand(6, -1, -1), k, -k)
    assert [figures[name].item() for name in ("positive", "texture")] == pytest.approx([1, -1])


# ------------------------------------------------------------ SE-ResNet (Eq. 3-5, Fig. 6)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_se_resnet_50_has_the_papers_28_07_million_parameters():
    """Table 1 and Eq. (5); Table 1 counts a classifier of 1000 classes too."""
    with torch.device("meta"):
        full, bare = (SEResNet(stem="imagenet", se=se) for se in ("standard", "none"))
        assert count(full) == 26_022_976 and count(full) + 2048 * 1000 + 1000 == 28_071_976
        stages = zip((3, 4, 6, 3), (256, 512, 1024, 2048), strict=True)
        assert count(full) - count(bare) == 2 * sum(n * c**2 for n, c in stages) // 16 == 2_514_944
        assert count(SEResNet(stem="cifar")) == 26_015_296
        extra = dict(standard=2_514_944, post=2_514_944, identity=2_514_944, pre=1_991_168)
        for se, more in extra.items():
            assert count(SEResNet(se=se)) - count(SEResNet(se="none")) == more
        model = sacl.SACL(Config(dataset="cifar100"))
        assert count(model.projector) == 12_595_200 and count(model.predictor) == 2_100_224


def test_without_se_it_is_torchvisions_resnet():
    """The same names, taken strictly, and the same output; for ResNet-50 see tests/test_use.py."""
    theirs = torchvision.models.resnet18().eval()
    theirs.fc = nn.Identity()
    ours = SEResNet("resnet18", se="none", stem="imagenet").eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize("se", ["standard", "pre", "post", "identity", "none"])
def test_each_placement_computes_its_panel_of_figure_6(se):
    block = sacl.Bottleneck(16, 8, 2, se, 4).double().train()
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)

    def conv_bn(x, conv, bn, stride):
        x = F.conv2d(x, conv.weight, stride=stride, padding=conv.weight.shape[-1] // 2)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (var + 1e-5).sqrt()
        return x * bn.weight[:, None, None] + bn.bias[:, None, None]

    def residual(x):
        x = conv_bn(conv_bn(x, block.conv1, block.bn1, 1).relu(), block.conv2, block.bn2, 2)
        return conv_bn(x.relu(), block.conv3, block.bn3, 1)

    def shortcut(x):
        return conv_bn(x, *block.downsample, 2)

    def gate(u):  # Eq. (3), (4)
        s = (u.mean((2, 3)) @ block.se.fc1.weight.T).relu() @ block.se.fc2.weight.T
        return u * torch.sigmoid(s)[:, :, None, None]

    x = torch.randn(4, 16, 6, 6, dtype=torch.double)
    expected = {
        "standard": lambda: (shortcut(x) + gate(residual(x))).relu(),
        "pre": lambda: (shortcut(x) + residual(gate(x))).relu(),
        "post": lambda: gate((shortcut(x) + residual(x)).relu()),
        "identity": lambda: (gate(shortcut(x)) + residual(x)).relu(),
        "none": lambda: (shortcut(x) + residual(x)).relu(),
    }[se]()
    assert torch.allclose(block(x), expected)


@pytest.mark.parametrize("se, zero", [("standard", True), ("post", False), ("identity", False)])
def test_the_last_bn_starts_at_zero_only_where_that_makes_an_identity(se, zero):
    encoder = SEResNet("resnet18", se, width=8)
    assert (encoder.layer1[0].bn2.weight == 0).all() == zero


def test_heads_have_bn_where_section_3_2_says():
    projector, predictor = sacl.mlp([8, 16, 16, 16], True), sacl.mlp([16, 4, 16], False)
    names = [[type(m).__name__ for m in head] for head in (projector, predictor)]
    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    assert names == [hidden * 2 + hidden[:2], hidden + ["Linear"]]
    biases = [m.bias is not None for m in [*projector, *predictor] if isinstance(m, nn.Linear)]
    assert biases == [False] * 3 + [False, True]


# ------------------------------------------------------------ views (Section 2.1, 3.2)


def test_every_image_of_a_batch_gets_its_own_view():
    x = torch.randint(256, (1, 3, 16, 16)).byte().expand(8, -1, -1, -1)
    views = sacl.augment(x, sacl.sample_view(8, tiny(), CPU), 16)
    for a, b in itertools.combinations(views, 2):
        assert (a - b).abs().mean() > 0.05


def test_a_full_crop_without_jitter_is_the_plain_image():
    x = torch.randint(256, (4, 3, 16, 16)).byte()
    crop = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(4, -1, -1)
    params = {"crop": crop, "jitter": torch.zeros(4, 4), "grey": torch.zeros(4)}
    assert torch.allclose(sacl.augment(x, params, 16), sacl.eval_view(x, 16), atol=1e-4)


@pytest.mark.parametrize("side, size", [(32, 32), (32, 64), (96, 48), (256, 224), (96, 224)])
def test_plain_images_have_the_size_of_views_and_keep_their_content(side, size):
    """Centre of 8/7 of the size above 96 px, as 224 from 256; other squares are scaled first."""
    ramp = torch.linspace(0, 255, side).byte().expand(2, 3, side, side)
    x = sacl.eval_view(ramp, size)
    assert x.shape == (2, 3, size, size)
    row = x[0, 0, 0] * sacl.STD[0] + sacl.MEAN[0]
    inset = 0 if size <= 96 else 1 / 16
    assert row[0].item() == pytest.approx(inset, abs=0.02)
    assert row[-1].item() == pytest.approx(1 - inset, abs=0.02)


def test_a_crop_shows_the_rectangle_that_was_drawn():
    """The right half, flipped, of an image whose columns are numbered."""
    x = (torch.arange(8) * 10).byte().expand(1, 3, 8, 8)
    params = {"crop": torch.tensor([[[-0.5, 0, 0.5], [0, 1.0, 0]]])}
    view = sacl.augment(x, params, 4) * torch.tensor(sacl.STD)[:, None, None]
    view = (view + torch.tensor(sacl.MEAN)[:, None, None]) * 255
    assert torch.allclose(view[0, 0, 0], torch.tensor([70.0, 60, 50, 40]), atol=1e-3)


def test_crops_cover_the_areas_and_ratios_asked_for():
    crop = sacl.sample_view(4000, tiny(crop_min=0.3), CPU)["crop"]
    w, h = crop[:, 0, 0].abs(), crop[:, 1, 1]
    assert (w * h).min() > 0.3 - 1e-5 and (w * h).max() <= 1 and (w / h).max() < 4 / 3 + 1e-5
    assert (crop[:, 0, 2].abs() + w).max() < 1 + 1e-5  # inside the image
    assert 0.45 < (crop[:, 0, 0] < 0).float().mean() < 0.55  # half are flipped
    whole = sacl.sample_view(500, tiny(crop_min=1.0), CPU)["crop"]  # where no box fits
    assert torch.equal(whole.abs(), torch.eye(3)[:2].expand(500, -1, -1))


def test_geometric_views_turn_by_up_to_15_degrees_and_keep_their_colours():
    turned = sacl.sample_view(500, tiny(weak="geometric", crop_min=1.0), CPU)
    turn = turned["crop"][:, :, :2]
    assert torch.allclose(turn @ turn.mT, torch.eye(2).expand(500, -1, -1), atol=1e-5)
    assert 14 < turn[:, 0, 1].abs().asin().rad2deg().max() < 15.01 and "jitter" not in turned


def test_colours_change_in_80_per_cent_of_views_and_20_per_cent_are_grey():
    params = sacl.sample_view(5000, tiny(), CPU)
    amounts = params["jitter"].abs().amax(0)
    assert amounts.tolist() == pytest.approx([0.4, 0.4, 0.4, 0.1], rel=0.01)
    assert params["jitter"].any(1).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert params["grey"].mean().item() == pytest.approx(0.2, abs=0.03)


def ks_distance(a, b):
    """The largest difference of two samples' distribution functions (Kolmogorov, Smirnov)."""
    a, b = a.sort().values, b.sort().values
    x = torch.cat([a, b])
    below = [torch.searchsorted(s, x, right=True).double() / len(s) for s in (a, b)]
    return (below[0] - below[1]).abs().max().item()


def test_crops_are_distributed_as_torchvisions():
    """Areas, ratios, centres; 0.04 is beyond chance for 5,000 draws each, clamping gives 0.18."""
    image, params = torch.empty(3, 4096, 4096, dtype=torch.uint8), ((0.4, 1), (3 / 4, 4 / 3))
    boxes = [transforms.RandomResizedCrop.get_params(image, *params) for _ in range(5000)]
    y, x, h, w = (torch.tensor(boxes).double() / 4096).T
    crop = sacl.sample_view(5000, tiny(crop_min=0.4), CPU)["crop"].double()
    width, height = crop[:, 0, 0].abs(), crop[:, 1, 1]
    assert ks_distance(width * height, w * h) < 0.04
    assert ks_distance((width / height).log(), (w / h).log()) < 0.04
    assert ks_distance(crop[:, 0, 2], 2 * x + w - 1) < 0.04
    assert ks_distance(crop[:, 1, 2], 2 * y + h - 1) < 0.04


def test_colour_jitter_equals_torchvisions_image_by_image():
    x, jitter = torch.rand(8, 3, 6, 6), torch.empty(8, 4).uniform_(-0.4, 0.4)
    grey = (torch.arange(8) % 4 == 0).float()
    ours = sacl.color_jitter(x, jitter, grey)
    for i in range(8):
        y, (b, c, s, h) = x[i], jitter[i].tolist()
        y = TF.adjust_contrast(TF.adjust_brightness(y, 1 + b), 1 + c)
        y = TF.adjust_hue(TF.adjust_saturation(y, 1 + s), h)
        y = TF.rgb_to_grayscale(y, 3) if grey[i] else y
        assert torch.allclose(ours[i], y, atol=2e-3)


# ------------------------------------------------------------ textures in the method


@pytest.mark.parametrize("role, twin", [("negative", 0), ("positive", 1)])
def test_a_texture_is_drawn_as_view_1_and_a_positive_one_as_the_second_view(role, twin):
    """Cropped and coloured alike; so a positive has a draw of its own, other than view 1's."""
    model, x = sacl.SACL(tiny(texture=role)), torch.randint(256, (8, 3, 16, 16)).byte()
    *views, xt = model.views(x, x, torch.arange(8))
    assert torch.equal(views[twin], xt) and not torch.equal(views[1 - twin], xt)


def found_by_colour(view, partner):
    """How often the mean and spread of colours tell a view's partner from 127 others, per cent."""
    looks = [torch.cat([x.mean((2, 3)), x.std((2, 3))], 1) for x in (view, partner)]
    pairs = zip(*(x.split(128) for x in looks), strict=True)
    right = [torch.cdist(a, b).argmin(1) == torch.arange(len(a)) for a, b in pairs]
    return sacl.percent(torch.cat(right))


def test_colours_do_not_give_a_positive_texture_away():
    """As a positive a texture is found by its colours no more often than view 2 is."""
    x = (F.interpolate(torch.rand(1024, 3, 4, 4), size=16, mode="bilinear") * 255).byte()
    textures, found = texture.texture_views(x, generator=torch.Generator().manual_seed(0)), {}
    for role in ("positive", "negative"):
        model = sacl.SACL(tiny(texture=role))
        x1, x2, xt = model.views(x, textures, torch.arange(1024))
        found[role] = found_by_colour(x1, xt)
    x1, x2, _ = model.views(x, textures, torch.arange(1024))
    assert found["positive"] < found_by_colour(x1, x2) + 3
    assert found["negative"] > found["positive"] + 10  # the figure can tell a shared draw


def test_textures_are_a_function_of_seed_and_period_and_renewed_every_20_epochs(folder):
    data = sacl.load_data(tiny(folder), "train")
    data = data._replace(pixels=data.pixels[:4])
    made = {}
    for seed, epoch in ((0, 0), (0, 19), (0, 20), (1, 0)):
        torch.manual_seed(epoch)
        made[seed, epoch] = sacl.make_textures(data, tiny(texture="negative", seed=seed), epoch)
    assert made[0, 0].shape == data.pixels.shape and made[0, 0].dtype == torch.uint8
    assert torch.equal(made[0, 0], made[0, 19])
    assert not torch.equal(made[0, 0], made[0, 20]) and not torch.equal(made[0, 0], made[1, 0])
    assert sacl.make_textures(data, tiny(texture="none"), 0) is None


# ------------------------------------------------------------ data and kNN


def test_knn_is_perfect_on_separated_clusters_and_chance_on_noise():
    labels, noise = torch.arange(400) % 4, torch.randn(2000, 16)
    x = (torch.randn(4, 16) * 10)[labels] + torch.randn(400, 16)
    assert (sacl.knn(x[:300], labels[:300], x[300:], 4, k=20) == labels[300:]).all()
    guess = sacl.knn(noise[:1000], torch.randint(4, (1000,)), noise[1000:], 4)
    assert 0.19 < (guess == torch.randint(4, (1000,))).float().mean() < 0.31


def test_the_knn_loses_no_vote_to_rounding():
    """Ten votes of exp(-10) beside one of exp(10), which float32 cannot add to it."""
    x = torch.tensor([[1.0, 0.0]])
    bank, labels = torch.cat([x, x, -x.expand(10, 2)]), torch.tensor([0, 1] + [1] * 10)
    assert sacl.knn(bank, labels, x, 2) == 1


def test_knn_weighs_votes_by_similarity():
    """One near neighbour outvotes two far ones."""
    bank = torch.tensor([[1.0, 0], [0, 1], [-0.1, 1]])
    assert sacl.knn(bank, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.2]]), 2, k=3).item() == 0


def test_the_monitor_does_not_touch_the_encoder(folder):
    cfg = tiny(folder, amp="bf16")
    model = sacl.SACL(cfg).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train, test = (sacl.load_data(cfg, split) for split in ("train", "test"))
    unknown = torch.arange(48) % 3 == 0  # as most of STL-10's
    train = train._replace(labels=train.labels.masked_fill(unknown, -1))
    encoders = {"knn": model.encoder, "pixels": nn.Flatten()}
    figures = sacl.knn_monitor(encoders, cfg, train, test, CPU)
    assert set(figures) == set(encoders) and 0 <= figures["knn"] <= 100 == figures["pixels"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.encoder.training


# ------------------------------------------------------------ settings


def test_the_defaults_are_those_of_PAPER_md_section_4():
    cfg = Config(dataset="cifar100")
    listed = dict(
        arch="resnet50", width=64, se="standard", reduction=16, stem="cifar", proj_layers=3,
        dim=2048, grid=2, combine=2, tau=0.2, m=0.99, m_schedule="constant", negatives="cross",
        texture="negative", texture_negatives="own", texture_alpha=1, weak="common", epochs=200,
        batch_size=128, lr=0.1, sgd_momentum=0.9, weight_decay=1e-4, warmup_epochs=0, image_size=32,
    )  # fmt: skip
    assert {name: getattr(cfg, name) for name in listed} == listed
    sizes = {"cifar10": (32, 200), "stl10": (96, 200), "imagenet100": (224, 100)}
    for dataset, (size, epochs) in sizes.items():
        other = Config(dataset=dataset)
        assert (other.image_size, other.epochs) == (size, epochs)
        assert other.stem == ("cifar" if size == 32 else "imagenet")


def test_learning_rate_rises_linearly_and_falls_by_a_cosine():
    values = [sacl.cosine(step, 110, 10) for step in range(111)]
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[60] == pytest.approx(0.5) and values[110] == pytest.approx(0)
    assert all(a > b for a, b in itertools.pairwise(values[10:]))


# ------------------------------------------------------------ runs


def test_resuming_continues_bit_for_bit(one_block, folder, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch and again at its end, a run ends as if uninterrupted.

    Its second epoch has new textures.
    """
    monkeypatch.setattr(sacl, "TEXTURE_EPOCHS", 1)
    given = dict(texture="negative", m_schedule="cosine")
    whole = sacl.train(tiny(folder, output_dir=tmp_path / "a", **given))
    for stop in (2, 1, 0):
        parts = sacl.train(tiny(folder, output_dir=tmp_path / "b", max_steps=stop, **given))
    losses = [log_of(tmp_path / run) for run in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    before = (tmp_path / "b" / "checkpoint.pth").read_bytes()
    sacl.train(tiny(folder, output_dir=tmp_path / "b", **given))  # a finished run stays as it is
    assert (tmp_path / "b" / "checkpoint.pth").read_bytes() == before


def two_ranks(rank, path):
    """One of two gloo processes: the loss and gradients of its half of the batch."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    for name in ("own", "batch"):
        start = torch.load(f"{path}/{name}.pth", weights_only=True)
        model = sacl.SACL(tiny(**start["given"]))
        model.load_state_dict(start["model"])
        # normalisation by running statistics, so that a half batch is treated as the whole one is
        parallel = nn.parallel.DistributedDataParallel(model.eval())
        loss = parallel(*start["views"][:, rank::2])
        loss.backward()
        mean = loss.detach().clone() / 2
        dist.all_reduce(mean)
        if rank == 0:
            grads = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
            torch.save({"loss": mean, "grads": grads}, f"{path}/{name}-end.pth")
    dist.destroy_process_group()


def test_two_ranks_give_the_loss_and_gradients_of_one(tmp_path):
    models = {}
    for name in ("own", "batch"):
        given = dict(texture="negative", texture_negatives=name, negatives="eq10")
        model, *views = models[name] = model_and_views(**given)
        start = {"model": model.state_dict(), "views": torch.stack(views), "given": given}
        torch.save(start, tmp_path / f"{name}.pth")
    # a fork spares the two processes the import of torch, which takes longer than the rest
    forks = hasattr(os, "fork") and not torch.cuda.is_available()
    how = dict(nprocs=2, start_method="fork" if forks else "spawn")
    torch.multiprocessing.start_processes(two_ranks, (str(tmp_path),), **how)
    for name, (model, *views) in models.items():
        end = torch.load(tmp_path / f"{name}-end.pth", weights_only=True)
        loss = model.eval()(*views)
        loss.backward()
        assert end["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
        for key, p in model.named_parameters():
            if p.requires_grad:
                assert torch.allclose(end["grads"][key], p.grad, atol=1e-5), key


# ------------------------------------------------------------ linear evaluation (Section 3.2)


def test_lars_takes_the_step_of_its_formula_and_spares_vectors():
    w, b = torch.randn(3, 4).requires_grad_(), torch.randn(3).requires_grad_()
    optimizer = eval_linear.LARS([w, b], lr=0.9, momentum=0.9, weight_decay=0.1, trust=0.001)
    v_w = v_b = 0
    for _ in range(2):
        start_w, start_b = w.detach().clone(), b.detach().clone()
        w.grad, b.grad = torch.randn(3, 4), torch.randn(3)
        g = w.grad + 0.1 * start_w
        v_w = 0.9 * v_w + 0.001 * start_w.norm() / g.norm() * g
        v_b = 0.9 * v_b + b.grad
        optimizer.step()
        assert torch.allclose(w, start_w - 0.9 * v_w) and torch.allclose(b, start_b - 0.9 * v_b)
    zero = torch.zeros(2, 2, requires_grad=True)
    zero.grad = torch.ones(2, 2)
    eval_linear.LARS([zero], lr=1.0).step()
    assert torch.equal(zero, -torch.ones(2, 2))  # no 0 / 0


@pytest.mark.parametrize("probe", ["lars", "lbfgs"])
def test_linear_evaluation_learns_and_writes_what_it_returns(finished, tmp_path, probe):
    given = dict(run=finished, output_dir=tmp_path, batch_size=16, probe=probe)
    # a step of LARS is lr / 1000 of the weights' norm
    result = eval_linear.evaluate(ProbeConfig(epochs=30, lr=50.0, **given))
    assert (result["top1"], result["top5"], result["test_images"]) == (100, 100, 24)
    assert json.loads((tmp_path / f"linear-online-{probe}.json").read_text()) == result


@pytest.mark.parametrize("name, epochs", [("cifar100", 200), ("imagenet100", 100)])
def test_the_probes_defaults_are_the_papers(name, epochs, folder, finished, tmp_path, monkeypatch):
    """Section 3.2, Linear evaluation: LARS, learning rate 0.9, batches of 128, and its epochs.

    Images of another dataset are shown at the size of training.
    """
    (tmp_path / name).symlink_to(folder)

    def stop(encoder, data, run, cfg, device):
        assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training
        raise StopIteration(cfg.probe, cfg.lr, cfg.batch_size, cfg.epochs, run.image_size)

    monkeypatch.setattr(eval_linear, "probe_lars", stop)
    with pytest.raises(StopIteration) as stopped:
        eval_linear.evaluate(ProbeConfig(run=finished, dataset=name, data_dir=tmp_path))
    assert stopped.value.args == ("lars", 0.9, 128, epochs, 16)


def test_the_rate_of_a_probe_is_chosen_on_a_held_out_tenth(finished, tmp_path, capsys, monkeypatch):
    """And falls by a cosine; crops keep angle and colours; the target is probed on request."""
    rates, views, augment = [], [], sacl.augment

    class Recorder(eval_linear.LARS):
        def step(self):
            rates.append([group["lr"] for group in self.param_groups])
            super().step()

    monkeypatch.setattr(eval_linear, "LARS", Recorder)
    monkeypatch.setattr(sacl, "augment", lambda *of: views.append(of[1]) or augment(*of))
    run = shutil.copytree(finished, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text()) | {"weak": "geometric"}
    (run / "config.json").write_text(json.dumps(settings))
    words = [run, "--output-dir", tmp_path, "--encoder", "target", "--lr-sweep", "--epochs", 2]
    eval_linear.main([str(w) for w in words])
    result = json.loads((tmp_path / "linear-target-lars.json").read_text())
    scores = result["held_out_top1"]
    assert set(scores) == {str(lr) for lr in eval_linear.LRS}
    assert scores[str(result["lr"])] == max(scores.values()) and "top1" in capsys.readouterr().out
    steps = itertools.product((eval_linear.LRS, [result["lr"]]), (1, 0.5))  # one an epoch
    for found, (lrs, share) in zip(rates, steps, strict=True):
        assert found == pytest.approx([lr * share for lr in lrs])
    assert len(views) == 4 and all([*view] == ["crop"] for view in views)
    assert all((view["crop"][:, 0, 1] == 0).all() for view in views)  # as no rotation leaves it
    kept, held = eval_linear.holdout(50, 0)
    assert len(held) == 5 and sorted([*kept.tolist(), *held.tolist()]) == list(range(50))
    target, _ = eval_linear.load_encoder(ProbeConfig(run=finished, encoder="target"))
    weights = torch.load(finished / "target_backbone.pth")
    assert torch.equal(target.conv1.weight, weights["conv1.weight"])


def test_a_probe_that_moves_a_statistic_is_caught(finished, tmp_path, monkeypatch):
    def probe(encoder, data, *_):
        encoder.train()(sacl.eval_view(data.pixels, 16))
        return nn.Linear(encoder.dim, 2, device=data.pixels.device), {}

    monkeypatch.setattr(eval_linear, "probe_lars", probe)
    with pytest.raises(RuntimeError, match="running_mean"):
        eval_linear.evaluate(ProbeConfig(run=finished, output_dir=tmp_path))
    assert not list(tmp_path.iterdir())


def test_top_k_accuracy_counts_labels_among_the_k_largest():
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]])
    labels = torch.tensor([0, 1, 2])
    assert [eval_linear.accuracy(logits, labels, k) for k in (1, 2, 5)] == [33.33, 66.67, 100]


# ------------------------------------------------------------ the files


def test_the_command_line_trains_as_a_user_starts_it(folder, tmp_path):
    """In a process of its own: paths, output and exit code; all others are called in this one."""
    words = flags(folder, output_dir="run", epochs=1, knn_every=1)
    line = [sys.executable, str(HERE / "sacl.py"), *words]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "finished: step 3 of 3" in done.stdout, done.stderr
    assert "\r" not in done.stdout + done.stderr and (tmp_path / "run" / "backbone.pth").exists()
