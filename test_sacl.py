"""The claims that the paper and the README make about the code, on toy sizes, on the CPU.

python -m pytest
"""

import ast
import contextlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.transforms import functional as TF

import eval_linear
import sacl
from sacl import Config, SEResNet, UsageError

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors are slower on two threads, and sums must round alike in every run."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A dataset of 48 + 24 small PNGs in two classes, dark and bright."""
    root = tmp_path_factory.mktemp("images")
    g = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("test", 12)):
        for label, level in (("bright", 160), ("dark", 40)):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                x = (torch.rand(3, 16, 16, generator=g) * 60 + level).byte()
                TF.to_pil_image(x).save(root / split / label / f"{i}.png")
    return root


def tiny(folder=None, **given):
    """Settings of a run that takes a second."""
    small = dict(arch="resnet18", width=4, dim=16, image_size=16, batch_size=16, epochs=2)
    small |= dict(print_every=1, knn_every=0, amp="off", workers=0, texture="none")
    return Config(**{"dataset": str(folder) if folder else "shapes", **small, **given})


def model_and_views(**given):
    model = sacl.SACL(tiny(**given))
    return model, *torch.randn(3, 8, 3, 16, 16)


def log_of(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def refused(*argv, program=sacl):
    """Run the command line in this process; returns the one sentence it ends with."""
    error = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(error):
        program.main([str(a) for a in argv])
    assert stop.value.code == 2
    last = error.getvalue().strip().splitlines()[-1]
    assert "Traceback" not in error.getvalue() and last.startswith(Path(program.__file__).name)
    return last


# ------------------------------------------------------------ split and combine (Section 2.2)


def test_split_puts_cells_in_row_major_order():
    x = torch.randn(3, 3, 6, 9)
    cells = sacl.split(x, 3)
    assert cells.shape == (9, 3, 3, 2, 3)
    for row, column in itertools.product(range(3), range(3)):
        cell = x[:, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        assert torch.equal(cells[3 * row + column], cell)


def test_split_refuses_a_grid_that_does_not_divide():
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
@pytest.mark.parametrize(
    "texture", [None, ("own", 1.0), ("own", 0.0), ("own", 2.0), ("batch", 0.5)]
)
def test_info_nce_equals_the_formula_written_as_loops(texture, same):
    q, k = torch.randn(6, 5, 8, dtype=torch.double), torch.randn(3, 5, 8, dtype=torch.double)
    options = {"k_same": k[1]} if same else {}
    if texture:
        options |= {"kt": k[2], "texture_negatives": texture[0], "alpha": texture[1]}
    loss = sacl.info_nce(q, k[0], 0.2, **options)
    assert loss.item() == pytest.approx(loop_info_nce(q, k[0], 0.2, **options), abs=1e-12)


def test_info_nce_of_indistinguishable_keys_is_log_n():
    k = torch.ones(9, 4)
    assert sacl.info_nce(torch.randn(6, 9, 4), k, 0.2).item() == pytest.approx(
        math.log(9), abs=1e-5
    )


def test_a_texture_stands_only_in_the_denominator():
    """A texture like the query raises its row's loss, one unlike it lowers it to nearly none's."""
    q, k = torch.randn(1, 4, 8), torch.randn(4, 8)
    none, like, unlike = (sacl.info_nce(q, k, 0.1, kt) for kt in (None, q[0], -q[0]))
    assert none < unlike < none + 1e-3 < like
    kt = torch.randn(4, 8, requires_grad=True)
    sacl.info_nce(q, k, 0.1, kt).backward()
    toward_query = (kt.grad * sacl.unit(q[0])).sum(-1)
    assert (toward_query > 0).all()  # loss grows as any texture turns to its query


def test_alpha_zero_is_not_the_same_as_no_texture():
    """It still adds exp(0) = 1 to the denominator."""
    q, k = torch.randn(6, 4, 8), torch.randn(4, 8)
    off = sacl.info_nce(q, k, 0.2)
    assert sacl.info_nce(q, k, 0.2, torch.randn(4, 8), alpha=0.0) > off + 1e-3


def test_info_nce_ignores_the_length_of_vectors_and_half_precision_logits():
    q, k = torch.randn(6, 4, 8), torch.randn(4, 8)
    loss = sacl.info_nce(q, k, 0.2)
    assert torch.allclose(loss, sacl.info_nce(7 * q, 0.1 * k, 0.2))
    with torch.autocast("cpu", torch.bfloat16):
        inside = sacl.info_nce(q, k, 0.2)
    assert inside.dtype == torch.float32 and torch.equal(inside, loss)


# ------------------------------------------------------------ Algorithm 1


def test_the_loss_is_symmetric_in_the_two_views():
    model, x1, x2, _ = model_and_views()
    assert torch.allclose(model(x1, x2), model(x2, x1), atol=1e-6)


def test_forward_is_algorithm_1_written_step_by_step():
    """Patches encoded apart, averaged in pairs before the projector; targets see whole views."""
    model, x1, x2, xt = model_and_views(texture="negative")
    queries, keys = [], []
    for x in (x1, x2):
        halves = [half for row in x.chunk(2, 2) for half in row.chunk(2, 3)]
        h = model.encoder(torch.cat(halves)).chunk(4)
        e = torch.cat([(h[a] + h[b]) / 2 for a in range(4) for b in range(a + 1, 4)])
        queries.append(model.predictor(model.projector(e)).view(6, 8, 16))
        keys.append(model.target_projector(model.target_encoder(x)))
    kt = model.target_projector(model.target_encoder(xt))
    pairs = ((queries[0], keys[1]), (queries[1], keys[0]))
    expected = sum(loop_info_nce(q.double(), k.double(), 0.2, kt.double()) for q, k in pairs) / 2
    assert model(x1, x2, xt).item() == pytest.approx(expected, abs=1e-5)


def test_grid_1_and_combine_1_make_one_query_per_view():
    model, x1, *_ = model_and_views(grid=1, combine=1)
    assert model.queries(x1).shape == (1, 8, 16)
    assert torch.allclose(model.queries(x1)[0], model.predictor(model.projector(model.encoder(x1))))


def test_a_positive_texture_takes_the_place_of_the_second_view():
    model, x1, x2, xt = model_and_views(texture="positive")
    assert torch.equal(model(x1, x2, xt), model(x1, torch.zeros_like(x2), xt))
    plain, *_ = model_and_views()
    plain.load_state_dict(model.state_dict())
    assert torch.allclose(model(x1, x2, xt), plain(x1, xt))


def test_no_gradient_reaches_the_target_and_every_online_tensor_gets_one():
    model, *views = model_and_views(texture="negative")
    nn.init.ones_(model.encoder.layer1[0].bn2.weight)
    model(*views).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("target_"), name


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
    norms = [m for m in with_texture.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.track_running_stats for m in norms)


def test_bfloat16_changes_the_loss_by_less_than_a_hundredth():
    model, *views = model_and_views(texture="negative")
    full = model(*views)
    with sacl.autocast(torch.device("cpu"), torch.bfloat16):
        half = model(*views)
    assert half.item() == pytest.approx(full.item(), rel=1e-2) and half.dtype == torch.float32


def test_the_whole_loss_is_one_graph_for_the_compiler():
    """Traced without a break, textures and all, it gives the plain loss and gradients."""
    plain, *views = model_and_views(texture="negative")
    compiled = sacl.SACL(plain.cfg)
    compiled.load_state_dict(plain.state_dict())
    for block in (b for b in compiled.modules() if isinstance(b, sacl.Block)):
        block.fused = True
    compiled.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    losses = [model(*views) for model in (plain, compiled)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    sum(losses).backward()
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        if p.requires_grad:
            assert (p.grad - q.grad).norm() <= 1e-3 * p.grad.norm() + 1e-6, name


def test_one_batch_can_be_overfitted():
    model, x1, x2, _ = model_and_views(tau=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(x1, x2)
        loss.backward()
        optimizer.step()
        model.update_target(0.9)
    assert loss < math.log(8) / 4


def test_the_monitor_tells_collapse_from_spread():
    q, k = torch.randn(6, 512, 64), torch.randn(512, 64)
    assert sacl.monitor(q, k, None)["spread"].item() == pytest.approx(1, abs=0.05)
    assert sacl.monitor(q, torch.ones(512, 64), None)["spread"].item() == pytest.approx(0, abs=1e-5)


# ------------------------------------------------------------ SE-ResNet (Eq. 3-5, Fig. 6)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_se_resnet_50_has_the_papers_28_07_million_parameters():
    """Table 1 and Eq. (5)."""
    with torch.device("meta"):
        full = SEResNet(stem="imagenet", num_classes=1000)
        bare = SEResNet(stem="imagenet", num_classes=1000, se="none")
        assert count(bare) == 25_557_032 and count(full) == 28_071_976
        stages = zip((3, 4, 6, 3), (256, 512, 1024, 2048), strict=True)
        assert count(full) - count(bare) == 2 * sum(n * c**2 for n, c in stages) // 16 == 2_514_944
        assert count(SEResNet(stem="imagenet")) == 26_022_976
        assert count(SEResNet(stem="cifar")) == count(SEResNet(image_size=64)) == 26_015_296
        for se, more in dict(standard=2_514_944, post=2_514_944, identity=2_514_944).items():
            assert count(SEResNet(se=se)) - count(SEResNet(se="none")) == more
        assert count(SEResNet(se="pre")) - count(SEResNet(se="none")) == 1_991_168
        model = sacl.SACL(Config(dataset="cifar100"))
        assert count(model.projector) == 12_595_200 and count(model.predictor) == 2_100_224


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_without_se_it_is_torchvisions_resnet(arch):
    """The same names, taken strictly, and the same output."""
    theirs = getattr(torchvision.models, arch)().eval()
    ours = SEResNet(arch, se="none", stem="imagenet", num_classes=1000).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_the_gate_multiplies_each_channel_by_its_own_sigmoid():
    """Eq. (3), (4), from their own parts."""
    gate, u = sacl.SE(8, 4).double(), torch.randn(2, 8, 3, 3, dtype=torch.double)
    for n in range(2):
        z = torch.stack([u[n, c].mean() for c in range(8)])
        s = 1 / (1 + torch.exp(-gate.fc2.weight @ torch.relu(gate.fc1.weight @ z)))
        expected = torch.stack([s[c] * u[n, c] for c in range(8)])
        assert torch.allclose(gate(u)[n], expected)


@pytest.mark.parametrize("kind", [sacl.BasicBlock, sacl.Bottleneck])
@pytest.mark.parametrize("se", ["standard", "pre", "post", "identity", "none"])
def test_each_placement_computes_its_panel_of_figure_6(kind, se):
    block = kind(16, 8, 2, se, 4).double().train()
    for p in block.parameters():
        nn.init.normal_(p, std=0.5)

    def conv_bn(x, conv, bn, stride=1, padding=0):
        x = F.conv2d(x, conv.weight, stride=stride, padding=padding)
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (var + 1e-5).sqrt()
        return x * bn.weight[:, None, None] + bn.bias[:, None, None]

    def residual(x):
        if kind is sacl.BasicBlock:
            x = conv_bn(x, block.conv1, block.bn1, 2, 1).relu()
            return conv_bn(x, block.conv2, block.bn2, 1, 1)
        x = conv_bn(x, block.conv1, block.bn1).relu()
        x = conv_bn(x, block.conv2, block.bn2, 2, 1).relu()
        return conv_bn(x, block.conv3, block.bn3)

    def shortcut(x):
        return conv_bn(x, block.downsample[0], block.downsample[1], 2)

    def gate(u):
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


@pytest.mark.parametrize("kind", [sacl.BasicBlock, sacl.Bottleneck])
@pytest.mark.parametrize("mode", ["train", "textures", "eval"])
def test_the_fused_block_is_the_plain_block_exactly(kind, mode):
    """Outputs, gradients and running statistics, in float64."""
    plain, fused = (kind(8, 4, 2, "standard", 4).double() for _ in range(2))
    for p in plain.parameters():
        nn.init.normal_(p, 0.5)
    fused.load_state_dict(plain.state_dict())
    fused.fused = True
    x = torch.randn(4, 8, 6, 6, dtype=torch.double)
    upstream = torch.randn(4, 4 * kind.expansion, 3, 3, dtype=torch.double)
    results = []
    for block in (plain, fused):
        z = x.clone().requires_grad_()
        block.train(mode != "eval")
        within = (
            sacl.batch_statistics_only(block) if mode == "textures" else contextlib.nullcontext()
        )
        with within:
            y = block(z)
        grads = torch.autograd.grad(y, [z, *block.parameters()], upstream)
        results.append([y, *grads, *(b.double() for b in block.buffers())])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-12 * a.norm() + 1e-14


@pytest.mark.parametrize("se, zero", [("standard", True), ("post", False), ("identity", False)])
def test_the_last_bn_starts_at_zero_only_where_that_makes_an_identity(se, zero):
    encoder = SEResNet("resnet18", se, width=4)
    assert (encoder.layer1[0].bn2.weight == 0).all() == zero


def test_heads_have_bn_where_section_3_2_says():
    projector, predictor = sacl.mlp([8, 16, 16, 16], True), sacl.mlp([16, 4, 16], False)
    names = [[type(m).__name__ for m in head] for head in (projector, predictor)]
    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    assert names == [hidden * 2 + hidden[:2], hidden + ["Linear"]]
    assert [m.bias is not None for m in projector if isinstance(m, nn.Linear)] == [False] * 3
    assert [m.bias is not None for m in predictor if isinstance(m, nn.Linear)] == [False, True]


# ------------------------------------------------------------ views


def test_every_image_of_a_batch_gets_its_own_view():
    x = torch.randint(256, (1, 3, 16, 16)).byte().expand(8, -1, -1, -1)
    views = sacl.augment(x, sacl.draw_view(8, tiny(), x.device), 16)
    for a, b in itertools.combinations(views, 2):
        assert (a - b).abs().mean() > 0.05


def test_a_full_crop_without_jitter_is_the_plain_image():
    x = torch.randint(256, (4, 3, 16, 16)).byte()
    crop = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(4, -1, -1)
    draw = {"crop": crop, "jitter": torch.zeros(4, 4), "grey": torch.zeros(4)}
    assert torch.allclose(sacl.augment(x, draw, 16), sacl.plain(x, 16), atol=1e-4)


def test_a_crop_shows_the_rectangle_that_was_drawn():
    """The right half, flipped, of an image whose columns are numbered."""
    x = (torch.arange(8) * 10).byte().expand(1, 3, 8, 8)
    draw = {"crop": torch.tensor([[[-0.5, 0, 0.5], [0, 1.0, 0]]])}
    view = sacl.augment(x, draw, 4) * torch.tensor(sacl.STD)[:, None, None]
    view = (view + torch.tensor(sacl.MEAN)[:, None, None]) * 255
    assert torch.allclose(view[0, 0, 0], torch.tensor([70.0, 60, 50, 40]), atol=1e-3)


def test_crops_cover_the_areas_and_ratios_asked_for():
    crop = sacl.draw_view(4000, tiny(crop_min=0.3), torch.device("cpu"))["crop"]
    w, h = crop[:, 0, 0].abs(), crop[:, 1, 1]
    assert (w * h).min() >= 0.25 and (w * h).max() <= 1 and (w / h).max() < 4 / 3 + 1e-5
    assert (crop[:, 0, 2].abs() + w).max() < 1 + 1e-5  # inside the image
    assert 0.45 < (crop[:, 0, 0] < 0).float().mean() < 0.55  # half are flipped
    turned = sacl.draw_view(100, tiny(weak="geometric"), torch.device("cpu"))
    assert turned["crop"][:, 0, 1].abs().max() > 0.05 and "jitter" not in turned


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


def test_a_texture_is_cropped_and_coloured_like_view_1():
    model = sacl.SACL(tiny(texture="negative"))
    x = torch.randint(256, (8, 3, 16, 16)).byte()
    x1, x2, xt = model.views(x, x, torch.arange(8))
    assert torch.equal(x1, xt) and not torch.equal(x1, x2)


# ------------------------------------------------------------ data


def test_a_folder_is_read_by_class_and_any_size_becomes_a_square(folder, tmp_path):
    data = sacl.load_data(tiny(folder), "test")
    assert data.pixels.shape == (24, 3, 16, 16) and data.pixels.dtype == torch.uint8
    assert data.classes == ["bright", "dark"] and data.labels.bincount().tolist() == [12, 12]
    for i, size in enumerate([(40, 20), (20, 50), (9, 9)]):
        image = torch.full((3, *size), 50 * (i + 1)).byte()
        TF.to_pil_image(image).save(tmp_path / f"{i}.png")
    flat = sacl.load_data(tiny(tmp_path), "train")
    assert flat.pixels.shape == (3, 3, 16, 16) and flat.labels.tolist() == [-1] * 3
    assert [p.float().mean().item() for p in flat.pixels] == [50, 100, 150]
    assert sacl.load_data(tiny(tmp_path), "test") is None


def test_images_that_do_not_fit_in_memory_are_decoded_batch_by_batch(folder, monkeypatch):
    whole = sacl.load_data(tiny(folder), "train")
    monkeypatch.setattr(sacl, "IN_MEMORY", 1000)
    files = sacl.load_data(tiny(folder), "train")
    assert isinstance(files.pixels, sacl.Files)
    order = sacl.epoch_order(48, tiny(), 0)
    cpu = torch.device("cpu")
    for workers in (0, 2):
        streamed = sacl.fetch(files.pixels, order, workers, cpu)
        kept = sacl.fetch(whole.pixels, order, workers, cpu)
        for (i, a), (j, b) in zip(streamed, kept, strict=True):
            assert torch.equal(i, j) and torch.equal(a, b)


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch():
    orders = [sacl.epoch_order(50, tiny(seed=s), e) for s, e in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[3])
    assert orders[0].shape == (3, 16) and orders[0].unique().numel() == 48  # the rest is dropped


def test_a_folder_under_data_dir_goes_before_a_download(folder, tmp_path, monkeypatch):
    (tmp_path / "cifar100").symlink_to(folder)
    data = sacl.load_data(Config(dataset="cifar100", data_dir=str(tmp_path), workers=0), "train")
    assert data.pixels.shape == (48, 3, 32, 32)


def cifar_batch(path, count):
    """A file of CIFAR's python version with random pixels, and its md5."""
    import hashlib
    import pickle

    pixels = torch.randint(256, (count, 3072)).byte().numpy()
    content = pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(count)]})
    path.write_bytes(content)
    return hashlib.md5(content).hexdigest()


def test_archives_are_found_in_flat_folders_of_any_name(tmp_path, monkeypatch):
    """As on Kaggle, where inputs are read-only and unpacked."""
    where = tmp_path / "input" / "some-upload"
    where.mkdir(parents=True)
    kind = torchvision.datasets.CIFAR10
    md5 = {name: cifar_batch(where / name, 20) for name in ("data_batch_1", "test_batch")}
    (where / "batches.meta").write_bytes(b"")
    monkeypatch.setattr(kind, "train_list", [["data_batch_1", md5["data_batch_1"]]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(
        kind, "_load_meta", lambda self: setattr(self, "classes", list("0123456789"))
    )
    data = sacl.load_data(Config(dataset="cifar10", data_dir=str(tmp_path)), "train")
    assert data.pixels.shape == (20, 3, 32, 32) and data.labels.tolist() == [
        i % 10 for i in range(20)
    ]


def test_a_download_tries_the_mirror_and_then_the_original(tmp_path, monkeypatch):
    tried = []

    def unreachable(self, *_, **__):
        tried.append(self.url)
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", unreachable)
    with pytest.raises(UsageError, match="--data-dir"):
        sacl.load_data(Config(dataset="cifar10", data_dir=str(tmp_path)), "train")
    assert tried == [sacl.MIRRORS["cifar10"], torchvision.datasets.CIFAR10.url]


def test_shapes_pair_each_silhouette_with_its_texture_and_in_conflict_with_another():
    train, again, conflict = (sacl.draw_shapes(200, part, 0) for part in (0, 0, 2))
    assert torch.equal(train.pixels, again.pixels) and train.pixels.dtype == torch.uint8
    assert not torch.equal(train.pixels, sacl.draw_shapes(200, 1, 0).pixels)
    shape, texture = conflict.labels // 10, conflict.labels % 10
    assert (shape != texture).all() and shape.bincount().tolist() == [20] * 10


# ------------------------------------------------------------ kNN


def test_knn_is_perfect_on_separated_clusters_and_chance_on_noise():
    labels = torch.arange(400) % 4
    centres = torch.randn(4, 16) * 10
    clusters = centres[labels] + torch.randn(400, 16)
    assert (sacl.knn(clusters[:300], labels[:300], clusters[300:], 4, k=20) == labels[300:]).all()
    noise = torch.randn(2000, 16)
    right = sacl.knn(noise[:1000], torch.randint(4, (1000,)), noise[1000:], 4) == torch.randint(
        4, (1000,)
    )
    assert 0.19 < right.float().mean() < 0.31


def test_knn_weighs_votes_by_similarity():
    """One near neighbour outvotes two far ones."""
    bank = torch.tensor([[1.0, 0], [0, 1], [-0.1, 1]])
    assert sacl.knn(bank, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.2]]), 2, k=3).item() == 0


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_monitor_does_not_touch_the_encoder(folder, amp):
    cfg = tiny(folder, amp=amp)
    model = sacl.SACL(cfg).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train, test = (sacl.load_data(cfg, split) for split in ("train", "test"))
    encoders = {"knn": model.encoder, "pixels": nn.Flatten()}
    figures = sacl.knn_monitor(encoders, cfg, train, test, torch.device("cpu"))
    assert set(figures) == set(encoders) and 0 <= figures["knn"] <= 100
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.encoder.training


# ------------------------------------------------------------ settings


def test_the_defaults_for_the_papers_datasets_are_section_3_2():
    c = Config(dataset="cifar100")
    assert (c.arch, c.width, c.se, c.reduction, c.stem) == ("resnet50", 64, "standard", 16, "cifar")
    assert (c.proj_layers, c.dim, c.grid, c.combine, c.tau, c.m) == (3, 2048, 2, 2, 0.2, 0.99)
    assert (c.epochs, c.batch_size, c.lr, c.sgd_momentum, c.weight_decay) == (
        200,
        128,
        0.1,
        0.9,
        1e-4,
    )
    assert (c.warmup_epochs, c.m_schedule, c.negatives, c.weak) == (
        0,
        "constant",
        "cross",
        "common",
    )
    imagenet = Config(dataset="imagenet100")
    assert (imagenet.epochs, imagenet.image_size, imagenet.stem) == (100, 224, "imagenet")


def test_a_given_flag_always_wins_over_what_dataset_and_recipe_imply():
    assert sacl.parse_config(["--dataset", "imagenet100"]).epochs == 100
    assert sacl.parse_config(["--dataset", "imagenet100", "--epochs", "200"]).epochs == 200
    assert sacl.parse_config(["--recipe", "tuned"]).given == {"recipe"}
    tuned = Config(dataset="cifar10", recipe="tuned", weight_decay=1e-4)
    assert tuned.weight_decay == 1e-4 and tuned.warmup_epochs == 10


def test_learning_rate_rises_linearly_and_falls_by_a_cosine():
    values = [sacl.cosine(step, 110, 10) for step in range(111)]
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[60] == pytest.approx(0.5) and values[110] == pytest.approx(0)
    assert all(a > b for a, b in itertools.pairwise(values[10:]))


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_auto_precision_is_bf16_only_where_a_gpu_has_it(monkeypatch, capability, dtype):
    """A T4 (7.5) says is_bf16_supported() although it only emulates it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert sacl.precision(tiny(amp="auto"), torch.device("cuda")) == dtype


# ------------------------------------------------------------ runs


def test_resuming_continues_bit_for_bit(folder, tmp_path):
    """Stopped in the middle of an epoch and again at its end, a run ends as if uninterrupted."""
    whole = sacl.train(tiny(folder, output_dir=str(tmp_path / "a")))
    for stop in (2, 3, 0):
        parts = sacl.train(tiny(folder, output_dir=str(tmp_path / "b"), max_steps=stop))
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b") and len(log_of(tmp_path / "a")) == 6
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_finished_run_stays_as_it_is(folder, tmp_path):
    cfg = tiny(folder, output_dir=str(tmp_path / "a"), epochs=1)
    sacl.train(cfg)
    before = (tmp_path / "a" / "checkpoint.pth").read_bytes()
    sacl.train(cfg)
    assert (tmp_path / "a" / "checkpoint.pth").read_bytes() == before
    assert len(log_of(tmp_path / "a")) == 3


def test_a_run_killed_while_saving_keeps_its_last_checkpoint(folder, tmp_path, monkeypatch):
    cfg = tiny(folder, output_dir=str(tmp_path / "a"), max_steps=2)
    sacl.train(cfg)
    before = (tmp_path / "a" / "checkpoint.pth").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(UsageError, match="No space left"):
            sacl.train(tiny(folder, output_dir=str(tmp_path / "a"), max_steps=4))
    assert (tmp_path / "a" / "checkpoint.pth").read_bytes() == before
    assert not list((tmp_path / "a").glob("*.part"))


def test_a_checkpoint_holds_tensors_and_plain_types_and_strict_backbones(folder, tmp_path):
    model = sacl.train(tiny(folder, output_dir=str(tmp_path / "a"), max_steps=1))
    saved = torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)
    assert {"settings", "step", "model", "optimizer", "scaler"} <= set(saved)
    for name, net in (("backbone", model.encoder), ("target_backbone", model.target_encoder)):
        weights = torch.load(tmp_path / "a" / f"{name}.pth", weights_only=True)
        encoder = SEResNet("resnet18", width=4)
        encoder.load_state_dict(weights, strict=True)
        assert all(torch.equal(v, net.state_dict()[k]) for k, v in weights.items())


def test_the_log_begins_with_settings_versions_hardware_and_revision(folder, tmp_path):
    cfg = tiny(folder, output_dir=str(tmp_path / "a"), max_steps=1, knn_every=1)
    sacl.train(cfg)
    first, untrained, *_ = map(json.loads, (tmp_path / "a" / "log.jsonl").read_text().splitlines())
    assert Config(**first["settings"]) == cfg
    assert {"python", "torch", "device", "precision", "git"} <= set(first["machine"])
    assert {"knn", "knn_target", "pixels"} <= set(untrained) and untrained["pixels"] == 100
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == first["settings"]


def test_a_loss_that_is_not_finite_stops_with_a_sentence(folder, tmp_path):
    with pytest.raises(FloatingPointError, match="lower --lr"):
        sacl.train(tiny(folder, output_dir=str(tmp_path / "a"), lr=1e30))


def test_resume_none_puts_an_earlier_run_aside(folder, tmp_path):
    cfg = tiny(folder, output_dir=str(tmp_path / "a"), max_steps=1)
    sacl.train(cfg)
    before = (tmp_path / "a" / "checkpoint.pth").read_bytes()
    sacl.train(tiny(folder, output_dir=str(tmp_path / "a"), max_steps=1, resume="none", seed=1))
    assert (tmp_path / "a" / "earlier-1" / "checkpoint.pth").read_bytes() == before


def test_max_hours_stops_and_saves(folder, tmp_path):
    model = sacl.train(tiny(folder, output_dir=str(tmp_path / "a"), max_hours=1e-9))
    assert torch.load(tmp_path / "a" / "checkpoint.pth", weights_only=True)["step"] == 1
    assert model.training


def test_an_unlabelled_folder_trains_without_the_monitor(tmp_path, folder, capsys):
    for i, p in enumerate(sorted((folder / "train").rglob("*.png"))):
        (tmp_path / f"{i}.png").write_bytes(p.read_bytes())
    sacl.train(tiny(tmp_path, output_dir=str(tmp_path / "run"), max_steps=1, knn_every=1))
    assert "no kNN monitor" in capsys.readouterr().out


def two_rank_worker(rank, path):
    """One of two gloo processes: the loss and gradients of its half of the batch, and its keys."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    start = torch.load(f"{path}/start.pth", weights_only=True)
    model = sacl.SACL(tiny(**start["given"]))
    model.load_state_dict(start["model"])
    # normalisation by running statistics, so that a half batch is treated as the whole one is
    parallel = nn.parallel.DistributedDataParallel(model.eval(), broadcast_buffers=False)
    loss = parallel(*start["views"][:, rank::2])
    loss.backward()
    mean = sacl.mean_over_ranks(loss.detach().clone())
    if rank == 0:
        grads = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
        torch.save({"loss": mean, "grads": grads}, f"{path}/end.pth")
    dist.destroy_process_group()


@pytest.mark.parametrize("texture_negatives", ["own", "batch"])
def test_two_ranks_give_the_loss_and_gradients_of_one(tmp_path, texture_negatives):
    given = dict(texture="negative", texture_negatives=texture_negatives, negatives="eq10")
    model, *views = model_and_views(**given)
    start = {"model": model.state_dict(), "views": torch.stack(views), "given": given}
    torch.save(start, tmp_path / "start.pth")
    torch.multiprocessing.spawn(two_rank_worker, (str(tmp_path),), nprocs=2)
    end = torch.load(tmp_path / "end.pth", weights_only=True)
    loss = model.eval()(*views)
    loss.backward()
    assert end["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(end["grads"][name], p.grad, atol=1e-5), name


def test_torchrun_trains_with_two_processes(folder, tmp_path):
    flags = flags_of(tiny(folder, output_dir=str(tmp_path / "a"), max_steps=2))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*run, str(HERE / "sacl.py"), *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(log_of(tmp_path / "a")) == 2 and (tmp_path / "a" / "checkpoint.pth").exists()


def flags_of(cfg):
    """The command line that makes these settings."""
    return [
        a
        for name in sorted(cfg.given)
        for a in ("--" + name.replace("_", "-"), str(getattr(cfg, name)))
    ]


# ------------------------------------------------------------ bad input ends in a sentence


def test_bad_settings_are_refused_by_the_name_of_their_flag(tmp_path):
    small = ["--output-dir", tmp_path / "a", "--dataset", "shapes"]
    bad = {"--grid": 3, "--combine": 5, "--tau": 0, "--m": 1.5, "--epochs": 0, "--width": 0}
    bad |= {"--batch-size": 9999, "--amp": "fp16", "--warmup-epochs": 99, "--se": "late"}
    for flag, value in bad.items():
        assert flag in refused(*small, flag, value)
    assert not (tmp_path / "a").exists()  # nothing is written


def test_missing_empty_and_corrupt_images_are_refused_by_name(folder, tmp_path):
    assert "neither a folder nor one of" in refused("--dataset", "cifar1000")
    (tmp_path / "empty").mkdir()
    assert "no images" in refused("--dataset", tmp_path / "empty")
    assert "imagenet100" in refused("--dataset", "imagenet100", "--data-dir", tmp_path)
    good = next(folder.rglob("*.png")).read_bytes()
    (tmp_path / "bad").mkdir()
    for i in range(4):
        (tmp_path / "bad" / f"{i}.png").write_bytes(good)
    (tmp_path / "bad" / "5.png").write_bytes(good[:100])
    for workers in (0, 2):
        flags = (
            "--dataset",
            tmp_path / "bad",
            "--output-dir",
            tmp_path / "a",
            "--workers",
            workers,
        )
        assert "5.png: not a readable image" in refused(*flags)
    assert not (tmp_path / "a").exists()


def test_other_settings_in_a_runs_folder_are_refused_by_the_field(folder, tmp_path):
    cfg = tiny(folder, output_dir=str(tmp_path / "a"), max_steps=1)
    sacl.train(cfg)
    before = (tmp_path / "a" / "checkpoint.pth").read_bytes()
    assert "--tau 0.2, not 0.5" in refused(*flags_of(cfg), "--tau", 0.5)
    (tmp_path / "a" / "checkpoint.pth").write_bytes(before[:1000])
    assert "checkpoint.pth cannot be read" in refused(*flags_of(cfg))
    assert (tmp_path / "a" / "checkpoint.pth").read_bytes() == before[:1000]


def test_an_output_dir_that_cannot_be_written_is_refused(folder, tmp_path):
    (tmp_path / "file").write_text("")
    sentence = refused(*flags_of(tiny(folder, output_dir=str(tmp_path / "file" / "run"))))
    assert "--output-dir" in sentence


def test_a_batch_that_the_ranks_cannot_share_is_refused(folder):
    data = sacl.load_data(tiny(folder), "train")
    with pytest.raises(UsageError, match="3 processes"):
        sacl.check_data(tiny(folder), data, 3)


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


def test_linear_evaluation_separates_classes_and_leaves_the_encoder_untouched(folder, tmp_path):
    model = sacl.train(tiny(folder, output_dir=str(tmp_path / "a"), epochs=1))
    probe = eval_linear.ProbeConfig(source=str(tmp_path / "a"), probe="lbfgs", workers=0)
    result = eval_linear.evaluate(probe)
    assert result["top1"] == 100 and result["test_images"] == 24
    weights = torch.load(tmp_path / "a" / "backbone.pth", weights_only=True)
    assert all(torch.equal(v, model.encoder.state_dict()[k]) for k, v in weights.items())
    assert json.loads((tmp_path / "a" / "linear-online-lbfgs.json").read_text())["top1"] == 100


def test_a_probe_that_moves_a_statistic_is_caught():
    encoder = SEResNet("resnet18", width=4).eval()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    eval_linear.assert_frozen(encoder, before)
    encoder.train()(torch.randn(4, 3, 16, 16))
    with pytest.raises(RuntimeError, match="running_mean"):
        eval_linear.assert_frozen(encoder, before)


def test_recalibrated_statistics_are_those_of_the_plain_training_images(folder):
    cfg = tiny(folder)
    encoder, data = SEResNet("resnet18", width=4), sacl.load_data(cfg, "train")
    eval_linear.recalibrate_bn(encoder, data, cfg, torch.device("cpu"))
    stem = encoder.conv1(sacl.plain(data.pixels, 16))
    assert torch.allclose(encoder.bn1.running_mean, stem.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(encoder.bn1.running_var, stem.var((0, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("se", ["none", "pre", "standard"])
def test_a_weights_file_alone_tells_its_architecture(se):
    for arch, stem in (("resnet18", "cifar"), ("resnet50", "imagenet")):
        encoder = SEResNet(arch, se, 2, stem, 4)
        found = eval_linear.infer(encoder.state_dict())
        assert found == dict(
            arch=arch, se=se, reduction=2 if se != "none" else 1, stem=stem, width=4
        )


def test_top_k_accuracy_counts_labels_among_the_k_largest():
    logits = torch.tensor([[3.0, 2, 1], [1, 2, 3], [2, 3, 1]])
    labels = torch.tensor([0, 1, 2])
    assert [eval_linear.accuracy(logits, labels, k) for k in (1, 2, 5)] == [33.33, 66.67, 100]


def test_held_out_images_never_overlap_the_ones_trained_on():
    train, held_out = eval_linear.holdout_rows(50, 0)
    assert len(held_out) == 5 and sorted([*train.tolist(), *held_out.tolist()]) == list(range(50))


def test_evaluation_refuses_what_it_cannot_read(tmp_path, folder):
    assert "no such file" in refused(tmp_path / "none", program=eval_linear)
    torch.save({"a": torch.zeros(1)}, tmp_path / "backbone.pth")
    assert "not a backbone" in refused(tmp_path / "backbone.pth", program=eval_linear)
    torch.save(SEResNet("resnet18", width=4).state_dict(), tmp_path / "backbone.pth")
    assert "--dataset" in refused(tmp_path / "backbone.pth", program=eval_linear)


# ------------------------------------------------------------ the files


def test_the_command_line_trains_and_evaluates(folder, tmp_path):
    """In processes of their own, as a user starts them."""
    run = [sys.executable, str(HERE / "sacl.py")]
    flags = flags_of(tiny(folder, output_dir="run", epochs=1, knn_every=1))
    done = subprocess.run([*run, *flags], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "finished: step 3 of 3" in done.stdout, done.stderr
    assert "\r" not in done.stdout + done.stderr
    probe = [sys.executable, str(HERE / "eval_linear.py"), "run", "--epochs", "2"]
    probe += ["--batch-size", "16", "--workers", "0"]
    probe += ["--lr-sweep", "--encoder", "target", "--recalibrate-bn"]
    done = subprocess.run(probe, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "top1" in done.stdout, done.stderr
    result = json.loads((tmp_path / "run" / "linear-target-recalibrated-lars.json").read_text())
    assert set(result["held_out_top1"]) == {str(lr) for lr in eval_linear.LRS}


def test_pasting_into_a_notebook_defines_but_does_not_run(folder, tmp_path, monkeypatch, capsys):
    """A cell has __name__ == "__main__", no __file__, and the kernel's arguments."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    cell = {"__name__": "__main__"}
    exec(compile((HERE / "sacl.py").read_text(), "<cell>", "exec"), cell)
    assert capsys.readouterr().out == ""
    cfg = tiny(folder, output_dir=str(tmp_path), max_steps=1)
    model = cell["train"](cell["Config"](**{name: getattr(cfg, name) for name in cfg.given}))
    assert type(model).__name__ == "SACL"


def test_importing_has_no_side_effects():
    code = """
import random, numpy, torch
before = torch.get_rng_state().tolist(), torch.get_num_threads(), random.getstate()
import sacl, eval_linear
assert (torch.get_rng_state().tolist(), torch.get_num_threads(), random.getstate()) == before
assert not torch.cuda.is_initialized() and not torch.backends.cudnn.benchmark
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_scripts_import_only_what_the_requirements_name():
    allowed = {"torch", "torchvision", "numpy", "pytest", "sacl", "texture", "eval_linear", "PIL"}
    for name in ("sacl.py", "eval_linear.py", "test_sacl.py"):
        tree = ast.parse((HERE / name).read_text())
        roots = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        roots |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert {r.split(".")[0] for r in roots} - set(sys.stdlib_module_names) <= allowed
        bare = (
            ast.Import,
            ast.ImportFrom,
            ast.FunctionDef,
            ast.ClassDef,
            ast.Assign,
            ast.Expr,
            ast.If,
        )
        assert all(isinstance(node, bare) for node in tree.body)


def test_every_numbered_equation_stands_in_sacl_py():
    found = re.findall(r"Eq\. \((\d+)\)((?:, \(\d+\)|-\(\d+\))*)", (HERE / "sacl.py").read_text())
    numbers = set()
    for first, rest in found:
        last = re.findall(r"\d+", rest)
        numbers |= set(range(int(first), int(last[-1]) + 1)) if last else {int(first)}
    assert numbers >= set(range(1, 11))


@pytest.mark.parametrize("name, most", [("sacl.py", 1120), ("eval_linear.py", 250)])
def test_files_stay_within_their_line_budget(name, most):
    """Lines of code, without blanks, comments and docstrings: explanation is free."""
    with open(HERE / name, "rb") as f:
        tokens = list(tokenize.tokenize(f.readline))
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = set()
    for t in tokens[1:]:
        docstring = t.type == tokenize.STRING and t.string.startswith('"""')
        if t.type not in silent and not docstring:
            lines |= set(range(t.start[0], t.end[0] + 1))
    assert len(lines) <= most
