"""What the systems around SACL are claimed to compute, on toy sizes, on the CPU."""

import functools
import itertools
import math
from statistics import fmean as mean

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import conftest
import sacl
from related import baselines, harl, mining, multi_network
from related.baselines import BYOL, PIRL, MoCoV2, SimCLR, SimSiam
from related.harl import HARL
from related.mining import PotentialSamples
from related.multi_network import MultiNetwork
from sacl import UsageError

IMAGES = 48  # in the training set

# each system as small as it goes, with everything that it has
SYSTEMS = {
    "simclr": SimCLR,
    "mocov2": functools.partial(MoCoV2, queue=40, bn_groups=2),
    "byol": BYOL,
    "simsiam": SimSiam,
    "pirl": functools.partial(PIRL, images=IMAGES, dim=8, negatives=20),
    "mining": functools.partial(PotentialSamples, images=IMAGES, queue=40, keep=12, ramp=0.5),
    "multi-network": functools.partial(MultiNetwork, queue=40),
    "harl": functools.partial(HARL, masks=torch.ones(IMAGES, 16, 16)),
    "harl-nce": functools.partial(HARL, masks=torch.ones(IMAGES, 16, 16), objective="nce"),
}
every_system = pytest.mark.parametrize("name", SYSTEMS)


pytestmark = pytest.mark.usefixtures("short_encoder")
tiny = functools.partial(conftest.tiny, "cifar100")


def system(name, **given):
    """A system and views of eight images; every residual branch takes part."""
    model = SYSTEMS[name](tiny(**given))
    for block in (b for b in model.modules() if isinstance(b, sacl.Block)):
        nn.init.ones_(block.get_submodule(block.last_bn).weight)
    x = torch.randint(256, (8, 3, 16, 16)).byte()
    if name.startswith("harl"):
        model.masks[:8, :, 8:] = 0  # the left half is the foreground
    if name == "pirl":  # as after the first epoch
        model.bank.copy_(baselines.random_units(IMAGES, 8))
    return model, model.views(x, None, torch.arange(8))


def cos(a, b):
    return (a @ b / a.norm() / b.norm()).item()


def row_nce(positive, negatives, tau):
    """-log of the positive's share, from cosines."""
    terms = [math.exp(s / tau) for s in [positive, *negatives]]
    return -math.log(terms[0] / sum(terms))


def loop_nce(q, k, negatives, tau):
    """The mean of row_nce over rows q (N, D), k (N, D); negatives(i) are the vectors of row i."""
    return mean(
        row_nce(cos(q[i], k[i]), [cos(q[i], other) for other in negatives(i)], tau)
        for i in range(len(q))
    )


def others(k):
    """For loop_nce: all rows but its own."""
    return lambda i: [*k[:i], *k[i + 1 :]]


# ------------------------------------------------------------ every system


@every_system
def test_gradients_reach_every_online_tensor_and_no_target(name):
    """In bfloat16, from a loss in float32."""
    model, views = system(name)
    with sacl.autocast(torch.device("cpu"), torch.bfloat16):
        loss = model(*views)
    loss.backward()
    assert loss.dtype == torch.float32
    for key, p in model.named_parameters():
        if key.startswith("target_"):
            assert p.grad is None, key
        else:
            assert p.grad.abs().sum() > 0, key


@every_system
def test_a_toy_batch_is_overfitted(name):
    """Within 150 steps the loss falls by half of the way from its start to its least value."""
    model, views = system(name, tau=0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = {"mocov2": 0.03, "multi-network": 0.01}.get(name, 0.05)
    optimizer = torch.optim.SGD(trained, rate, 0.9)
    if name == "mocov2":  # the last step's keys, so that one negative is like the positive
        model.queue = model.queue[:8]
    least, losses = {"simsiam": -1, "mocov2": math.log(2)}.get(name, 0), []
    while len(losses) < 30 or mean(losses[-3:]) - least > (mean(losses[:3]) - least) / 2:
        assert len(losses) < 150, losses
        optimizer.zero_grad()
        loss = model(*views)
        loss.backward()
        optimizer.step()
        model.update_target(0.5)
        losses.append(loss.item())
    assert model.monitor["spread"] > 0.3  # and not by giving all images one embedding


@pytest.mark.parametrize("name", ["mocov2", "pirl", "mining", "multi-network", "harl"])
def test_a_run_resumes_bit_for_bit_with_its_queue_bank_or_schedule(name, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch and again at its end."""
    data = sacl.in_memory(torch.randint(256, (IMAGES, 3, 16, 16)).byte(), torch.zeros(IMAGES), [])
    monkeypatch.setattr(sacl, "load_data", lambda _, split: data if split == "train" else None)
    build = SYSTEMS[name]
    whole = sacl.train(tiny(output_dir=str(tmp_path / "a")), build)
    for steps in (2, 1, 0):
        parts = sacl.train(tiny(output_dir=str(tmp_path / "b"), max_steps=steps), build)
    assert whole.updates == 6
    for (key, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_similarities_to_a_memory_are_float32_under_autocast():
    p, k, memory = torch.randn(8, 16), torch.randn(8, 16), baselines.random_units(40, 16)
    mined = system("mining")[0]
    jobs = [
        lambda: baselines.memory_nce(p, k, memory, 0.2),
        lambda: mined.contrast(p, k),
        lambda: multi_network.nearest(k, memory),
    ]
    for job in jobs:
        plain = job()
        with sacl.autocast(torch.device("cpu"), torch.bfloat16):
            assert torch.equal(job(), plain)


@every_system
def test_all_systems_start_from_the_encoder_that_sacl_starts_from(name):
    ours = sacl.SACL(tiny()).encoder.state_dict()
    torch.manual_seed(0)
    theirs = SYSTEMS[name](tiny()).encoder.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_textures_and_several_processes_are_refused(monkeypatch):
    """By what all systems inherit."""
    with pytest.raises(UsageError, match="--texture negative"):
        BYOL(tiny(texture="negative"))
    monkeypatch.setattr(sacl, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="one process"):
        BYOL(tiny())


def test_unknown_options_are_refused():
    with pytest.raises(UsageError, match="--batch-size 18"):
        MoCoV2(tiny(batch_size=18))
    with pytest.raises(UsageError, match="weighting mild"):
        PotentialSamples(tiny(), IMAGES, weighting="mild")
    with pytest.raises(UsageError, match="objective moco"):
        HARL(tiny(), torch.ones(4, 16, 16), objective="moco")


def test_keys_are_queued_first_in_first_out_and_the_target_follows():
    model = baselines.QueuedKeys(tiny(dim=4), 0, queue=5)
    start, (a, b) = model.queue.clone(), torch.randn(2, 2, 4)
    before = model.target_projector[0].weight.clone()
    nn.init.ones_(model.projector[0].weight)
    for model.fresh in (a, b):
        model.update_target(0.5)
    assert torch.equal(model.queue, torch.cat([sacl.unit(b), sacl.unit(a), start[:1]]))
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(5))
    assert torch.allclose(model.target_projector[0].weight, 0.25 * before + 0.75)


# ------------------------------------------------------------ the baselines


def test_nt_xent_equals_its_loop_over_2n_anchors_and_2n_minus_2_negatives():
    a, b = torch.randn(2, 5, 7, dtype=torch.double)
    z, partner = torch.cat([a, b]), torch.cat([b, a])
    rest = [[z[j] for j in range(10) if j not in (i, (i + 5) % 10)] for i in range(10)]
    expected = loop_nce(z, partner, rest.__getitem__, 0.3)
    assert baselines.nt_xent(a, b, 0.3).item() == pytest.approx(expected, abs=1e-12)


def test_simclr_is_nt_xent_with_gradients_through_both_views():
    model, (x1, x2) = system("simclr", tau=0.5)
    z = [model.project(x).detach().requires_grad_() for x in (x1, x2)]
    given = iter(z)
    model.project = lambda _: next(given)
    loss = model(x1, x2)
    loss.backward()
    assert torch.equal(loss, baselines.nt_xent(*z, 0.5))
    assert all(leaf.grad.abs().sum() > 0 for leaf in z)


def test_memory_nce_equals_its_loop_and_leaves_out_what_is_hidden():
    q, k = torch.randn(2, 4, 6, dtype=torch.double)
    memory, hidden = sacl.unit(torch.randn(9, 6, dtype=torch.double)), torch.rand(4, 9) < 0.3
    for mask in (None, hidden):
        expected = loop_nce(q, k, lambda i, m=mask: memory if m is None else memory[~m[i]], 0.2)
        loss = baselines.memory_nce(q, k, memory, 0.2, mask)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert hidden.any()


def test_moco_contrasts_each_query_with_its_key_and_the_queue_before_it_grows():
    model, (x1, x2) = system("mocov2")
    queue = model.queue.clone()
    torch.manual_seed(1)
    loss = model(x1, x2)
    torch.manual_seed(1)
    k = model.keys(x2)
    q = torch.cat([model.project(part) for part in x1.split(4)])  # two groups of four
    assert loss.item() == pytest.approx(loop_nce(q, k, lambda _: queue, 0.2), abs=1e-5)
    assert torch.equal(model.queue, queue)  # until the step is over
    model.update_target(0.9)
    assert torch.allclose(model.queue, torch.cat([sacl.unit(k), queue[:-8]]))


def test_mocos_keys_come_back_in_order_but_are_normalised_among_others():
    model, (x1, _) = system("mocov2")
    ordered = torch.cat([model.target_projector(model.target_encoder(g)) for g in x1.split(4)])
    assert not torch.allclose(model.keys(x1), ordered, atol=1e-3)  # other groups
    model.eval()  # without batch statistics only the order could differ
    plain = model.target_projector(model.target_encoder(x1))
    assert torch.allclose(model.keys(x1), plain, atol=1e-5)


@pytest.mark.parametrize("name, constant", [("byol", 1), ("simsiam", 0)])
def test_byol_and_simsiam_are_the_mean_cosine_both_ways(name, constant):
    model, (x1, x2) = system(name)
    keys = model.keys if name == "byol" else model.project
    p, k = [model.predict(x) for x in (x1, x2)], [keys(x) for x in (x1, x2)]
    ways = [cos(p[v][i], k[1 - v][i]) for v in range(2) for i in range(8)]
    assert model(x1, x2).item() == pytest.approx(constant - mean(ways), abs=1e-5)


def test_simsiam_stops_the_gradient_at_the_projections():
    """With the predictor blocked, nothing is left to train the encoder."""
    model, views = system("simsiam")
    nn.init.zeros_(model.predictor[0].weight)
    model(*views).backward()
    assert all(p.grad.abs().max() == 0 for p in model.projector.parameters())


def test_pirl_is_the_weighted_nce_of_image_and_jigsaw_against_the_bank():
    model, (x1, cells, index) = system("pirl", tau=0.07)
    model.bank[5], model.bank[20:40] = 0, 0  # images that have not come yet
    model.lam, bank = 0.3, model.bank.clone()
    torch.manual_seed(1)
    loss = model(x1, cells, index)
    torch.manual_seed(1)
    drawn = torch.randint(IMAGES, (20,)).tolist()
    v = model.image_head(model.encoder(x1))
    h = model.cell_head(model.encoder(torch.cat(list(cells)))).split(8)
    jigsaw = model.jigsaw_head(torch.cat(h, 1))
    positives = torch.cat([bank[:5], v[5:6], bank[6:8]])
    known = [j for j in drawn if j != 5 and not 20 <= j < 40]
    by_jigsaw, by_image = (
        loop_nce(e, positives, lambda i: [bank[j] for j in known if j != i], 0.07)
        for e in (jigsaw, v)
    )
    assert loss.item() == pytest.approx(0.3 * by_jigsaw + 0.7 * by_image, abs=1e-4)
    expected = sacl.unit(0.5 * sacl.unit(positives) + 0.5 * sacl.unit(v))
    assert torch.allclose(model.bank[:8], expected, atol=1e-6)
    assert torch.equal(model.bank[8:], bank[8:])  # the rows of other images stay


def test_pirls_cells_are_the_other_views_each_image_in_an_order_of_its_own():
    (model, _), x = system("pirl"), torch.randint(256, (40, 3, 16, 16)).byte()
    torch.manual_seed(1)
    x1, x2 = sacl.SACL.views(model, x, None, torch.arange(40))
    torch.manual_seed(1)
    image, cells, _ = model.views(x, None, torch.arange(40))
    assert torch.equal(image, x1)
    found, order = cells.sum((2, 3, 4)).sort(0)  # (G, N) each: tells the cells of an image apart
    assert torch.equal(found, sacl.split(x2, 2).sum((2, 3, 4)).sort(0).values)
    assert len(order.unique(dim=1).T) > 10  # of 24


# ------------------------------------------------------------ potential samples


@pytest.mark.parametrize("weighting", mining.WEIGHTINGS)
def test_mined_positives_are_the_nearest_of_the_queue_and_weighed_as_said(weighting):
    k, queue = (sacl.unit(torch.randn(n, 6, dtype=torch.double)) for n in (4, 30))
    found, weights = mining.mine(k, queue, 5, weighting)
    similarity, order = (k @ queue.T).sort(1, descending=True)
    e = (similarity[:, :5] / 0.1).exp()
    soft = e / e.sum(1, keepdim=True)
    gate = (soft >= 1 / 5).double()
    expected = {"soft": soft, "hard": gate / gate.sum(1, keepdim=True), "both": soft * gate}
    assert torch.equal(found, order[:, :5])
    assert torch.allclose(weights, expected[weighting])


@pytest.mark.parametrize("offset", [0.0, -0.3])
def test_kept_negatives_are_those_next_to_the_positive(offset):
    """The too hard, far above it, go as well as the too easy, far below."""
    negative = torch.linspace(-1, 0.99, 200).repeat(3, 1)
    positive = torch.tensor([[0.103], [0.503], [-2]])
    kept = mining.potential(negative, positive, 20, offset)
    for row, s in zip(kept, (0.103, 0.503, -2), strict=True):
        expected = sorted(negative[0].tolist(), key=lambda n: abs(n - s - offset))[:20]
        assert sorted(row.tolist()) == pytest.approx(sorted(expected))


@pytest.mark.parametrize("lam", [0, 0.5])
def test_mined_positives_join_the_own_view_by_their_weights_and_are_no_negatives(lam):
    """Every other key is kept; with lam = 0 this is InfoNCE of batch and queue."""
    model, _ = system("mining")
    model.keep, model.weighting, model.lam = 10_000, "soft", lam
    model.updates += model.total  # the ramp is over
    p, k, queue = torch.randn(8, 16), torch.randn(8, 16), model.queue
    mined, weights = mining.mine(sacl.unit(k), queue, 5, "soft")
    expected = []
    for i in range(8):
        rest = [*others(k)(i), *(queue[j] for j in range(40) if j not in mined[i])]
        negatives = [cos(p[i], other) for other in rest]
        own, *of_mined = (row_nce(cos(p[i], t), negatives, 0.2) for t in (k[i], *queue[mined[i]]))
        weighed = sum(w * x for w, x in zip(weights[i].tolist(), of_mined, strict=True))
        expected.append((own + lam * weighed) / (1 + lam * weights[i].sum().item()))
    assert model.contrast(p, k).item() == pytest.approx(mean(expected), abs=1e-5)


def test_mined_positives_come_in_over_the_ramp():
    model, _ = system("mining")
    model.weighting, p, k = "soft", torch.randn(8, 16), torch.randn(8, 16)
    losses = []
    for lam, updates in ((0, 6), (1, 0), (0.5, 6), (1, 1.5), (1, 3), (1, 6)):
        model.lam, model.updates = lam, torch.tensor(updates)  # of 6, and a ramp of a half
        losses.append(model.contrast(p, k).item())
    assert losses[0] == pytest.approx(losses[1]) and losses[2] == pytest.approx(losses[3])
    assert losses[4] == pytest.approx(losses[5]) != pytest.approx(losses[0], abs=1e-3)


def test_each_view_is_mined_for_by_the_other_and_the_second_ones_keys_are_queued():
    model, (x1, x2) = system("mining")
    p1, p2, k1, k2 = model.predict(x1), model.predict(x2), model.keys(x1), model.keys(x2)
    expected = (model.contrast(p1, k2) + model.contrast(p2, k1)) / 2
    assert model(x1, x2).item() == pytest.approx(expected.item(), abs=1e-6)
    model.update_target(1)
    assert torch.allclose(model.queue[:8], sacl.unit(k2), atol=1e-6)


# ------------------------------------------------------------ global and local


def test_the_three_networks_loss_equals_its_formula_written_as_loops():
    model, (x1, x2, x3) = system("multi-network", tau=0.7)
    p1, p2, p3 = (model.predict(x) for x in (x1, x2, x3))
    local, global_ = [], []
    for x, p in ((x1, p2), (x2, p1)):
        quarters = [part for row in x.chunk(2, 2) for part in row.chunk(2, 3)]
        h = model.encoder(torch.cat(quarters)).chunk(4)
        pairs = [(h[a] + h[b]) / 2 for a, b in itertools.combinations(range(4), 2)]
        for c in model.projector(torch.cat(pairs)).chunk(6):
            local.append(loop_nce(p, c, others(c), 0.7))
    for x, p in ((x3, p1), (x1, p3)):
        keys = model.target_projector(model.target_encoder(x))
        z = [max(model.queue, key=lambda row, k=key: cos(row, k)) for key in keys]
        global_.append(baselines.nt_xent(torch.stack(z), p, 0.7).item())
    loss = model(x1, x2, x3).item()
    assert loss == pytest.approx(mean(local) + 6 * mean(global_), abs=1e-4)
    k3 = model.keys(x3)
    model.update_target(0.9)
    assert torch.allclose(model.queue[:8], sacl.unit(k3), atol=1e-6)  # view 3's keys only


@pytest.mark.parametrize("as_shipped", [True, False])
def test_as_shipped_the_local_loss_trains_nothing_but_running_statistics(as_shipped):
    """Without the global term the released code has no gradient; ours has."""
    model, views = system("multi-network")
    model.as_shipped, model.a = as_shipped, 0
    model(*views).backward()
    assert any(p.grad.any() for p in model.parameters() if p.grad is not None) != as_shipped
    before = model.encoder.bn1.running_mean.clone()
    c = model.local_keys(views[0])
    assert c.shape == (6, 8, 16) and not c.requires_grad
    assert torch.equal(model.encoder.bn1.running_mean, before) != as_shipped


# ------------------------------------------------------------ HARL


@pytest.mark.parametrize("name", ["harl", "harl-nce"])
@pytest.mark.parametrize("whole", [0.0, 1.0])
def test_with_masks_of_all_or_nothing_every_stream_is_the_whole_view(name, whole):
    """L_fg = L_bg = L_full: BYOL's loss, or InfoNCE of whole views."""
    model, (x1, x2, m1, m2) = system(name)
    m1, m2 = torch.full_like(m1, whole), torch.full_like(m2, whole)
    streams = model.streams(x1, m1)
    assert torch.allclose(streams, streams[:1], atol=1e-5)
    p1, p2, k1, k2 = model.predict(x1), model.predict(x2), model.keys(x1), model.keys(x2)
    expected = (sacl.info_nce(p1[None], k2, 0.2) + sacl.info_nce(p2[None], k1, 0.2)) / 2
    if name == "harl":
        expected = BYOL.forward(model, x1, x2)
    assert torch.allclose(model(x1, x2, m1, m2), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["harl", "harl-nce"])
def test_the_loss_weighs_whole_foreground_and_background(name):
    model, (x1, x2, m1, m2) = system(name)
    model.beta, model.updates = 0.3, torch.tensor(3)  # half of six steps
    alpha = 0.75  # between 0.5 and 1
    p1, p2 = model.streams(x1, m1), model.streams(x2, m2)
    k1, k2 = model.stream_keys(x1, m1), model.stream_keys(x2, m2)

    def one_way(p, k):
        return 1 - mean(map(cos, p, k)) if name == "harl" else loop_nce(p, k, others(k), 0.2)

    losses = [(one_way(p1[i], k2[i]) + one_way(p2[i], k1[i])) / 2 for i in range(3)]
    expected = 0.3 * losses[0] + 0.7 * (alpha * losses[1] + (1 - alpha) * losses[2])
    assert model(x1, x2, m1, m2).item() == pytest.approx(expected, abs=1e-4)
    assert len({round(x, 3) for x in losses}) == 3
    shares = [model.alpha().item() for model.updates in torch.arange(7)]
    assert shares == sorted(shares) and (shares[0], shares[6]) == pytest.approx((0.5, 1))


def test_pooling_weighs_each_cell_by_how_far_it_is_covered():
    maps = torch.tensor([[1.0, 2], [3, 4]]).view(1, 1, 2, 2)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2, :] = 1  # the upper cells
    mask[..., 2, :2] = 1  # and half of the lower left one
    whole, fg, bg = harl.pool(maps, mask).flatten()
    assert whole == 2.5
    assert fg.item() == pytest.approx((1 + 2 + 3 / 2) / 2.5)
    assert bg.item() == pytest.approx((3 / 2 + 4) / 1.5)


def test_less_than_a_twentieth_of_a_crop_is_no_stream():
    maps, mask = torch.rand(1, 5, 4, 4), torch.zeros(1, 1, 16, 16)
    mask[..., 0, :12] = 1  # 12 of 256 pixels
    whole, fg, bg = harl.pool(maps, mask)
    assert torch.equal(fg, whole) and not torch.equal(bg, whole)
    mask[..., 0, :13] = 1
    assert not torch.equal(harl.pool(maps, mask)[1], whole)


def test_a_mask_is_cropped_and_flipped_as_its_image_is():
    """An image that is its own mask stays its own mask in both views."""
    masks = F.avg_pool2d((torch.rand(8, 1, 16, 16) < 0.5).float(), 5, 1, 2)[:, 0]
    model = HARL(tiny(weak="geometric"), masks)
    x = (masks[:, None] * 255).expand(-1, 3, -1, -1).round().byte()
    x1, x2, m1, m2 = model.views(x, None, torch.arange(8))
    for view, mask in ((x1, m1), (x2, m2)):
        red = view[:, :1] * sacl.STD[0] + sacl.MEAN[0]
        assert torch.allclose(red, mask, atol=4e-3)
    assert not torch.allclose(m1, m2, atol=0.1)


def test_masks_find_a_blob_before_any_ground_and_keep_to_their_area():
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    ground, blob = torch.rand(2, 12, 3, 1, 1)
    cx, cy = 16 + 8 * (torch.rand(2, 12, 1, 1) - 0.5)
    truth = ((x - cx) ** 2 + (y - cy) ** 2).sqrt() < 9  # (12, 32, 32)
    images = torch.where(truth[:, None], blob, ground) + 0.02 * torch.randn(12, 3, 32, 32)
    mask = harl.heuristic_masks((images.clamp(0, 1) * 255).byte())
    overlap = (mask & truth).sum((1, 2)) / (mask | truth).sum((1, 2))
    assert mask.dtype == torch.bool and overlap.mean() > 0.7 and (overlap > 0.5).all()
    noise = harl.heuristic_masks(torch.randint(256, (20, 3, 32, 32)).byte())
    area = noise.float().mean((1, 2))
    assert area.min() > 0.1 and area.max() < 0.75  # 20 to 65 %, before the majority vote
    assert harl.heuristic_masks(torch.zeros(2, 3, 96, 96).byte()).shape == (2, 64, 64)
