"""What the systems around SACL are claimed to compute, on toy sizes, on the CPU."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import to_pil_image

import sacl
from related import baselines, harl, mining, multi_network
from related.baselines import BYOL, PIRL, MoCoV2, SimCLR, SimSiam
from related.harl import HARL
from related.mining import PotentialSamples
from related.multi_network import MultiNetwork
from sacl import Config, UsageError

IMAGES = 48  # in the training set of `folder`

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


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A training set of 48 small PNGs in two classes, dark and bright."""
    root = tmp_path_factory.mktemp("images")
    g = torch.Generator().manual_seed(0)
    for i in range(IMAGES):
        place = root / "train" / ("dark", "bright")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        x = (torch.rand(3, 16, 16, generator=g) * 60 + (40, 160)[i % 2]).byte()
        to_pil_image(x).save(place / f"{i}.png")
    return root


def tiny(**given):
    """Settings of a run that takes a second."""
    small = dict(arch="resnet18", width=8, dim=16, image_size=16, batch_size=16, epochs=2)
    small |= dict(print_every=1, knn_every=0, amp="off", compile="off", texture="none")
    return Config(**{"dataset": "shapes", **small, **given})


def system(name, **given):
    """A system and views of eight images; every residual branch takes part."""
    torch.manual_seed(0)
    model = SYSTEMS[name](tiny(**given))
    for block in (b for b in model.modules() if isinstance(b, sacl.Block)):
        nn.init.ones_(block.get_submodule(block.last_bn).weight)
    x = torch.randint(256, (8, 3, 16, 16)).byte()
    if name.startswith("harl"):
        model.masks[:8, :, 8:] = 0  # the left half is the foreground
    return model, model.views(x, None, torch.arange(8))


def rows(*shape):
    return torch.randn(*shape, dtype=torch.double)


def cos(a, b):
    return (a @ b / a.norm() / b.norm()).item()


def row_nce(positive, negatives, tau):
    """-log of the positive's share, from cosines."""
    terms = [math.exp(s / tau) for s in negatives]
    return -math.log(math.exp(positive / tau) / (math.exp(positive / tau) + sum(terms)))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# ------------------------------------------------------------ every system


@every_system
def test_gradients_reach_every_online_tensor_and_no_target(name):
    model, views = system(name)
    model(*views).backward()
    for key, p in model.named_parameters():
        if key.startswith("target_"):
            assert p.grad is None, key
        else:
            assert p.grad.abs().sum() > 0, key


@every_system
def test_a_toy_batch_is_overfitted(name):
    """The loss falls by at least half of the way from its start to its floor."""
    model, views = system(name, tau=0.1)
    trained = [p for p in model.parameters() if p.requires_grad]
    # the positives of mining change, the queue of MoCo v2 follows more slowly
    rate, steps = {"mining": (0.05, 150), "mocov2": (0.02, 80)}.get(name, (0.05, 50))
    optimizer = torch.optim.SGD(trained, rate / getattr(model, "a", 1), 0.9)
    if name == "mocov2":  # the last step's keys, so that one negative is like the positive
        model.queue = model.queue[:8]
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(*views)
        loss.backward()
        optimizer.step()
        model.update_target(0.5)
        losses.append(loss.item())
    floor = {"simsiam": -1, "mocov2": math.log(2)}.get(name, 0)
    first, last = mean(losses[:3]) - floor, mean(losses[-3:]) - floor
    assert last < first / 2, losses
    assert model.monitor["spread"] > 0.3  # and not by giving all images one embedding


@every_system
def test_a_run_goes_on_bit_for_bit_with_its_queue_or_bank(name, folder, tmp_path):
    """Stopped in the middle of an epoch and again at its end."""
    build, images = SYSTEMS[name], dict(dataset=str(folder))
    whole = sacl.train(tiny(**images, output_dir=str(tmp_path / "a")), build)
    for steps in (2, 1, 0):
        cfg = tiny(**images, output_dir=str(tmp_path / "b"), max_steps=steps)
        parts = sacl.train(cfg, build)
    assert whole.updates == 6
    exact = not torch.cuda.is_available()  # a GPU chooses its convolutions by timing them
    for (key, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b) if exact else torch.allclose(a.float(), b.float(), 1e-2, 1e-3), key
    torch.manual_seed(0)  # as the run began
    for key, start in build(tiny()).named_buffers():
        if key in ("queue", "bank"):
            assert not torch.equal(whole.state_dict()[key].cpu(), start)


@every_system
def test_bfloat16_changes_the_loss_by_little(name):
    """Another neighbour may be the nearest."""
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model, views = system(name)
        torch.manual_seed(1)  # the same rows of a bank, the same order of keys
        with sacl.autocast(torch.device("cpu"), dtype):
            losses.append(model(*views))
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=5e-2, abs=5e-2)


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


@pytest.mark.parametrize("name", ["pirl", "mining"])  # others hold too, and take minutes
def test_two_steps_compile_to_what_they_are_in_eager_mode(name):
    """With their queues, banks and counters; traced by Dynamo, without Inductor."""
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        model, views = system(name)
        if compiled:
            model.compile(backend="aot_eager", dynamic=False)
        losses = []
        for step in range(2):
            torch.manual_seed(step)
            model.zero_grad()
            losses.append(model(*views))
            losses[-1].backward()
            model.update_target(0.9)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([*losses, *model.buffers(), *grads])
    for a, b in zip(*results, strict=True):
        assert (a - b).float().norm() <= 1e-3 * a.float().norm() + 1e-5


@every_system
def test_all_systems_start_from_the_encoder_that_sacl_starts_from(name):
    torch.manual_seed(0)
    ours = sacl.SACL(tiny()).encoder.state_dict()
    torch.manual_seed(0)
    theirs = SYSTEMS[name](tiny()).encoder.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


@every_system
def test_textures_and_several_processes_are_refused(name, monkeypatch):
    with pytest.raises(UsageError, match="--texture negative"):
        SYSTEMS[name](tiny(texture="negative"))
    monkeypatch.setattr(sacl, "world_size", lambda: 2)
    with pytest.raises(UsageError, match="one process"):
        SYSTEMS[name](tiny())


@pytest.mark.parametrize("name", ["mocov2", "byol", "mining", "multi-network", "harl"])
def test_the_target_follows_by_the_moving_average(name):
    model, views = system(name)
    model(*views)
    before = model.target_projector[0].weight.clone()
    nn.init.ones_(model.projector[0].weight)
    model.update_target(0.75)
    moved = 0.75 * before + 0.25
    assert torch.allclose(model.target_projector[0].weight, moved, atol=1e-6)


# ------------------------------------------------------------ the baselines


def test_nt_xent_equals_its_loop_over_2n_anchors_and_2n_minus_2_negatives():
    a, b = rows(2, 5, 7)
    z = [*a, *b]
    expected = mean(
        row_nce(
            cos(z[i], z[(i + 5) % 10]),
            [cos(z[i], z[j]) for j in range(10) if j not in (i, (i + 5) % 10)],
            0.3,
        )
        for i in range(10)
    )
    assert baselines.nt_xent(a, b, 0.3).item() == pytest.approx(expected, abs=1e-12)


def test_simclr_sends_gradients_through_both_views():
    model, (x1, x2) = system("simclr", tau=0.5)
    expected = baselines.nt_xent(model.project(x1), model.project(x2), 0.5)
    assert torch.allclose(model(x1, x2), expected)
    z = [torch.randn(8, 16, requires_grad=True) for _ in range(2)]
    given = iter(z)
    model.project = lambda _: next(given)
    model(x1, x2).backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in z)
    assert not hasattr(model, "target_encoder") and not hasattr(model, "predictor")


def test_memory_nce_equals_its_loop_and_leaves_out_what_is_hidden():
    q, k, memory = rows(4, 6), rows(4, 6), sacl.unit(rows(9, 6))
    hidden = torch.rand(4, 9) < 0.3
    for mask in (None, hidden):
        expected = mean(
            row_nce(
                cos(q[i], k[i]),
                [cos(q[i], memory[j]) for j in range(9) if mask is None or not mask[i, j]],
                0.2,
            )
            for i in range(4)
        )
        loss = baselines.memory_nce(q, k, memory, 0.2, mask)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
    assert hidden.any()


def test_a_queue_is_first_in_first_out_and_of_unit_length():
    model = baselines.QueuedKeys(tiny(dim=4), 0, queue=5)
    start, (a, b) = model.queue.clone(), torch.randn(2, 2, 4)
    for model.fresh in (a, b):
        model.update_target(0.9)
    assert torch.equal(model.queue, torch.cat([sacl.unit(b), sacl.unit(a), start[:1]]))
    assert torch.allclose(model.queue.norm(dim=1), torch.ones(5))


def test_moco_contrasts_each_query_with_its_key_and_the_queue_before_it_grows():
    model, (x1, x2) = system("mocov2")
    queue = model.queue.clone()
    torch.manual_seed(1)
    loss = model(x1, x2)
    torch.manual_seed(1)
    k = model.keys(x2)
    q = torch.cat([model.project(part) for part in x1.split(4)])  # two groups of four
    expected = mean(
        row_nce(cos(q[i], k[i]), [cos(q[i], other) for other in queue], 0.2) for i in range(8)
    )
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(model.queue, queue)  # until the step is over
    model.update_target(0.9)
    assert torch.allclose(model.queue[:8], sacl.unit(k)) and torch.equal(
        model.queue[8:], queue[:-8]
    )


def test_mocos_keys_come_back_in_order_but_are_normalised_among_others():
    model, (x1, _) = system("mocov2")
    ordered = torch.cat([model.target_projector(model.target_encoder(g)) for g in x1.split(4)])
    assert not torch.allclose(model.keys(x1), ordered, atol=1e-3)  # other groups
    model.eval()  # without batch statistics only the order could differ
    assert torch.allclose(
        model.keys(x1), model.target_projector(model.target_encoder(x1)), atol=1e-5
    )


def test_moco_refuses_a_batch_that_its_groups_cannot_share():
    with pytest.raises(UsageError, match="--batch-size 18"):
        MoCoV2(tiny(batch_size=18))


@pytest.mark.parametrize("name, factor, constant", [("byol", -1, 1), ("simsiam", -1, 0)])
def test_byol_and_simsiam_are_the_mean_cosine_both_ways(name, factor, constant):
    model, (x1, x2) = system(name)
    keys = model.keys if name == "byol" else model.project
    p, k = [model.predict(x) for x in (x1, x2)], [keys(x) for x in (x1, x2)]
    ways = [cos(p[v][i], k[1 - v][i]) for v in range(2) for i in range(8)]
    assert model(x1, x2).item() == pytest.approx(constant + factor * mean(ways), abs=1e-5)


def test_simsiam_stops_the_gradient_at_the_projections():
    """With the predictor blocked, nothing is left to train the encoder."""
    model, views = system("simsiam")
    nn.init.zeros_(model.predictor[0].weight)
    model(*views).backward()
    assert all(p.grad.abs().max() == 0 for p in model.projector.parameters())


def test_pirl_is_the_weighted_nce_of_image_and_jigsaw_against_the_bank():
    model, (x1, cells, index) = system("pirl", tau=0.07)
    model.lam, bank = 0.3, model.bank.clone()
    torch.manual_seed(1)
    loss = model(x1, cells, index)
    torch.manual_seed(1)
    drawn = torch.randint(IMAGES, (20,)).tolist()
    v = model.image_head(model.encoder(x1))
    h = model.cell_head(model.encoder(torch.cat(list(cells)))).split(8)
    jigsaw = model.jigsaw_head(torch.cat(h, 1))
    losses = [
        mean(
            row_nce(cos(e[i], bank[index[i]]), [cos(e[i], bank[j]) for j in drawn if j != i], 0.07)
            for i in range(8)
        )
        for e in (jigsaw, v)
    ]
    assert loss.item() == pytest.approx(0.3 * losses[0] + 0.7 * losses[1], abs=1e-4)
    expected = sacl.unit(0.5 * bank[:8] + 0.5 * sacl.unit(v))
    assert torch.allclose(model.bank[:8], expected, atol=1e-6)
    assert torch.equal(model.bank[8:], bank[8:])  # other images' memories stay


def test_a_jigsaw_has_each_images_own_cells_in_an_order_of_its_own():
    cells = torch.arange(4 * 50.0).view(4, 50, 1, 1, 1).expand(-1, -1, 3, 2, 2)
    shuffled = baselines.shuffle(cells)[:, :, 0, 0, 0]
    assert torch.equal(shuffled.sort(0).values, cells[:, :, 0, 0, 0])
    orders = {tuple((column // 50).int().tolist()) for column in shuffled.T}
    assert len(orders) > 10  # of 24


def test_pirls_cells_are_of_the_other_view():
    (model, _), x = system("pirl"), torch.randint(256, (8, 3, 16, 16)).byte()
    torch.manual_seed(1)
    x1, x2 = sacl.SACL.views(model, x, None, torch.arange(8))
    torch.manual_seed(1)
    image, cells, _ = model.views(x, None, torch.arange(8))
    assert torch.equal(image, x1)
    for own, shown in zip(sacl.split(x2, 2).unbind(1), cells.unbind(1), strict=True):  # images
        own, shown = ({tuple(c.flatten().tolist()) for c in cells} for cells in (own, shown))
        assert own == shown


# ------------------------------------------------------------ 002: potential samples


@pytest.mark.parametrize("weighting", mining.WEIGHTINGS)
def test_mined_positives_are_the_nearest_of_the_queue_and_weighed_as_said(weighting):
    k, queue = sacl.unit(rows(4, 6)), sacl.unit(rows(30, 6))
    found, weights = mining.mine(k, queue, 5, weighting)
    for i in range(4):
        order = sorted(range(30), key=lambda j: -cos(k[i], queue[j]))[:5]
        assert found[i].tolist() == order
        e = [math.exp(cos(k[i], queue[j]) / 0.1) for j in order]
        soft = [x / sum(e) for x in e]
        gate = [float(w >= 1 / 5) for w in soft]
        hard, both = [g / sum(gate) for g in gate], [w * g for w, g in zip(soft, gate, strict=True)]
        expected = {"soft": soft, "hard": hard, "both": both}[weighting]
        assert weights[i].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("offset", [0.0, -0.3])
def test_kept_negatives_are_those_next_to_the_positive(offset):
    """The too hard, far above it, go as well as the too easy, far below."""
    negative = torch.linspace(-1, 0.99, 200).repeat(3, 1)
    positive = torch.tensor([[0.103], [0.503], [-2]])
    kept = mining.potential(negative, positive, 20, offset)
    for row, s in zip(kept, (0.103, 0.503, -2), strict=True):
        expected = sorted(negative[0].tolist(), key=lambda n: abs(n - s - offset))[:20]
        assert sorted(row.tolist()) == pytest.approx(sorted(expected))


def test_without_mined_positives_and_selection_it_is_info_nce_of_batch_and_queue():
    """lam = 0 and every negative kept; the mined rows are still no negatives."""
    model, _ = system("mining")
    model.lam, model.keep = 0, 10_000
    p, k, queue = torch.randn(8, 16), torch.randn(8, 16), model.queue
    expected = []
    for i in range(8):
        mined = sorted(range(40), key=lambda j, i=i: -cos(k[i], queue[j]))[:5]
        negatives = [cos(p[i], k[j]) for j in range(8) if j != i]
        negatives += [cos(p[i], queue[j]) for j in range(40) if j not in mined]
        expected.append(row_nce(cos(p[i], k[i]), negatives, 0.2))
    assert model.contrast(p, k).item() == pytest.approx(mean(expected), abs=1e-5)


def test_mined_positives_join_the_own_view_by_their_weights():
    model, _ = system("mining")
    model.keep, model.weighting, model.lam = 10_000, "soft", 0.5
    model.updates += model.total  # the ramp is over
    p, k, queue = torch.randn(8, 16), torch.randn(8, 16), model.queue
    expected = []
    for i in range(8):
        mined, weights = (
            t[0].tolist() for t in mining.mine(sacl.unit(k[i : i + 1]), queue, 5, "soft")
        )
        negatives = [cos(p[i], k[j]) for j in range(8) if j != i]
        negatives += [cos(p[i], queue[j]) for j in range(40) if j not in mined]
        own = row_nce(cos(p[i], k[i]), negatives, 0.2)
        others = [row_nce(cos(p[i], queue[j]), negatives, 0.2) for j in mined]
        total = own + 0.5 * sum(w * x for w, x in zip(weights, others, strict=True))
        expected.append(total / (1 + 0.5 * sum(weights)))
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


def test_an_unknown_weighting_is_refused():
    with pytest.raises(UsageError, match="weighting mild"):
        PotentialSamples(tiny(), IMAGES, weighting="mild")


# ------------------------------------------------------------ 003: global and local


def test_the_three_networks_loss_equals_its_formula_written_as_loops():
    model, (x1, x2, x3) = system("multi-network", tau=0.7)
    p1, p2, p3 = (model.predict(x) for x in (x1, x2, x3))
    c1, c2 = [], []
    for x, c in ((x1, c1), (x2, c2)):
        halves = [half for row in x.chunk(2, 2) for half in row.chunk(2, 3)]
        h = model.encoder(torch.cat(halves)).chunk(4)
        pairs = list(itertools.combinations(range(4), 2))
        z = model.projector(torch.cat([(h[a] + h[b]) / 2 for a, b in pairs]))
        c.extend(z.chunk(6))
    local = []
    for p, c in ((p2, c1), (p1, c2)):
        for keys in c:
            logits = torch.stack(
                [torch.stack([F.cosine_similarity(a, b, 0) for b in keys]) for a in p]
            )
            local.append(F.cross_entropy(logits / 0.7, torch.arange(8)).item())
    bank, global_ = model.queue.clone(), []
    for x, p in ((x3, p1), (x1, p3)):
        k = model.target_projector(model.target_encoder(x))
        z = torch.stack([max(bank, key=lambda row, k=key: cos(row, k)) for key in k])
        global_.append(baselines.nt_xent(z, p, 0.7).item())
    loss = model(x1, x2, x3).item()
    assert loss == pytest.approx(mean(local) + 6 * mean(global_), abs=1e-4)
    k3 = model.keys(x3)
    model.update_target(0.9)
    assert torch.allclose(model.queue[:8], sacl.unit(k3), atol=1e-6)  # view 3's keys only


def test_as_shipped_the_local_loss_trains_nothing():
    """Without the global term the released code has no gradient; ours has."""
    for as_shipped in (True, False):
        model, views = system("multi-network")
        model.as_shipped, model.a = as_shipped, 0
        model(*views).backward()
        moves = [bool(p.grad.any()) for p in model.parameters() if p.grad is not None]
        assert any(moves) != as_shipped


def test_cells_leave_the_running_statistics_alone_unless_as_shipped():
    for as_shipped in (True, False):
        model, (x1, *_) = system("multi-network")
        model.as_shipped = as_shipped
        before = model.encoder.bn1.running_mean.clone()
        c = model.local_keys(x1)
        assert c.shape == (6, 8, 16) and not c.requires_grad
        assert torch.equal(model.encoder.bn1.running_mean, before) != as_shipped


# ------------------------------------------------------------ 004: HARL


@pytest.mark.parametrize("name", ["harl", "harl-nce"])
@pytest.mark.parametrize("whole", [0.0, 1.0])
def test_with_masks_of_all_or_nothing_every_stream_is_the_whole_view(name, whole):
    """L_fg = L_bg = L_full: BYOL's loss, or InfoNCE of whole views."""
    model, (x1, x2, m1, m2) = system(name)
    m1, m2 = torch.full_like(m1, whole), torch.full_like(m2, whole)
    streams = model.streams(x1, m1)
    assert torch.allclose(streams[0], streams[1], atol=1e-5)
    assert torch.allclose(streams[0], streams[2], atol=1e-5)
    p1, p2, k1, k2 = model.predict(x1), model.predict(x2), model.keys(x1), model.keys(x2)
    if name == "harl":
        expected = BYOL(tiny()).train()
        expected.load_state_dict(model.state_dict())
        expected = expected(x1, x2)
    else:
        expected = (sacl.info_nce(p1[None], k2, 0.2) + sacl.info_nce(p2[None], k1, 0.2)) / 2
    assert torch.allclose(model(x1, x2, m1, m2), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["harl", "harl-nce"])
def test_the_loss_weighs_whole_foreground_and_background(name):
    model, views = system(name)
    model.beta, model.updates = 0.3, torch.tensor(3)  # half of six steps
    alpha = 0.75  # between 0.5 and 1
    x1, x2, m1, m2 = views
    p, k = [model.streams(x1, m1), model.streams(x2, m2)], []
    k = [model.stream_keys(x1, m1), model.stream_keys(x2, m2)]
    losses = []
    for stream in range(3):
        ways = []
        for a, b in ((p[0], k[1]), (p[1], k[0])):
            for i in range(8):
                positive = cos(a[stream][i], b[stream][i])
                others = [cos(a[stream][i], b[stream][j]) for j in range(8) if j != i]
                byol = name == "harl"
                ways.append(1 - positive if byol else row_nce(positive, others, 0.2))
        losses.append(mean(ways))
    expected = 0.3 * losses[0] + 0.7 * (alpha * losses[1] + (1 - alpha) * losses[2])
    assert model(*views).item() == pytest.approx(expected, abs=1e-4)
    assert len({round(x, 3) for x in losses}) == 3


def test_the_foregrounds_share_goes_from_a_half_to_one():
    model, _ = system("harl")
    shares = []
    for updates in range(7):
        model.updates = torch.tensor(updates)
        shares.append(model.alpha().item())
    assert shares[0] == pytest.approx(0.5) and shares[6] == pytest.approx(1)
    assert all(a < b for a, b in itertools.pairwise(shares))


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
    masks = (torch.rand(8, 16, 16) < 0.5).float()
    masks = F.avg_pool2d(masks[:, None], 5, 1, 2)[:, 0]
    model = HARL(tiny(weak="geometric"), masks)
    x = (masks[:, None] * 255).expand(-1, 3, -1, -1).round().byte()
    x1, x2, m1, m2 = model.views(x, None, torch.arange(8))
    for view, mask in ((x1, m1), (x2, m2)):
        pixels = view * torch.tensor(sacl.STD)[:, None, None]
        pixels = pixels + torch.tensor(sacl.MEAN)[:, None, None]
        assert torch.allclose(pixels[:, :1], mask, atol=4e-3)
    assert not torch.allclose(m1, m2, atol=0.1)


def test_masks_find_a_blob_before_any_ground_and_keep_to_their_area():
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    images, truths = [], []
    for i in range(12):
        g = torch.Generator().manual_seed(i)
        ground, blob = torch.rand(2, 3, 1, 1, generator=g)
        cx, cy = 16 + 8 * (torch.rand(2, generator=g) - 0.5)
        inside = ((x - cx) ** 2 + (y - cy) ** 2).sqrt() < 9
        images.append(
            torch.where(inside, blob, ground) + 0.02 * torch.randn(3, 32, 32, generator=g)
        )
        truths.append(inside)
    images, truth = (torch.stack(images).clamp(0, 1) * 255).byte(), torch.stack(truths)
    mask = harl.heuristic_masks(images)
    overlap = (mask & truth).sum((1, 2)) / (mask | truth).sum((1, 2))
    assert mask.dtype == torch.bool and overlap.mean() > 0.7 and (overlap > 0.5).all()
    noise = harl.heuristic_masks(torch.randint(256, (20, 3, 32, 32)).byte())
    area = noise.float().mean((1, 2))
    assert area.min() > 0.1 and area.max() < 0.75  # 20 to 65 %, before the majority vote
    assert harl.heuristic_masks(torch.zeros(2, 3, 96, 96).byte()).shape == (2, 64, 64)


def test_otsus_threshold_parts_two_heaps_of_values():
    s = torch.cat([torch.full((40,), 0.2), torch.full((60,), 0.8)])[torch.randperm(100)]
    s = (s + 0.05 * torch.randn(100)).clamp(0, 1).view(1, 10, 10)
    assert 0.3 < harl.otsu(s).item() < 0.7


def test_masks_are_made_of_all_images_in_their_order(monkeypatch):
    data = sacl.in_memory(torch.randint(256, (1100, 3, 8, 8)).byte(), torch.zeros(1100), ["a"])
    assert torch.equal(harl.make_masks(data), harl.heuristic_masks(data.pixels))


def test_an_unknown_objective_is_refused():
    with pytest.raises(UsageError, match="objective moco"):
        HARL(tiny(), torch.ones(4, 16, 16), objective="moco")
