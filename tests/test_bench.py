"""The claims of bench/ablations.py, bench/shifts.py and the figures, on toy sizes.

python -m pytest tests/test_bench.py
"""

import argparse
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import eval_linear
import sacl
from bench import ablations, compare, runs, shifts, verdict
from conftest import refused, tiny

pytestmark = pytest.mark.usefixtures("short_encoder")

RESULTS = Path(__file__).resolve().parents[1] / "results"

# ------------------------------------------------------------ intervals and verdicts


@pytest.mark.parametrize("df, t95, t999", [(1, 12.706, 636.62), (3, 3.182, 12.924),
                                           (4, 2.776, 8.610), (7, 2.365, 5.408)])  # fmt: skip
def test_students_tails_are_those_of_published_tables(df, t95, t999):
    assert verdict.T95[df - 1] == t95
    assert verdict.student(t95, df) == pytest.approx(0.05, rel=2e-3)
    assert verdict.student(-t999, df) == pytest.approx(0.001, rel=2e-3)


def test_the_interval_of_paired_differences_is_students():
    d = verdict.difference({0: 5.0, 1: 7.0, 2: 6.5}, {0: 4.0, 1: 5.0, 2: 3.5}, planned=3)
    assert d.values == [1, 2, 3] and d.mean == 2
    assert d.half == pytest.approx(4.303 / 3**0.5)  # their standard deviation is 1
    assert d.p == pytest.approx(0.0742, abs=1e-4)  # t = 3.464
    assert str(d) == "+2.00 (-0.48 to +4.48)" and d.verdict == "no difference shown"


@pytest.mark.parametrize("values, word", [((1, 2, 1.5), "held"), ((-1, -2, -1.5), "did not hold"),
                                          ((1, -2, 1.5), "no difference shown")])  # fmt: skip
def test_a_verdict_is_given_when_all_planned_seeds_are_done_and_not_before(values, word):
    better, other = dict(enumerate(values)), dict.fromkeys(range(3), 0.0)
    assert verdict.difference(better, other, planned=3).verdict == word
    assert verdict.difference(better, other, planned=4).verdict == "none yet: 3 of 4"
    assert verdict.difference(better, {0: 0.0}, planned=4).half is None
    assert verdict.difference({}, other, planned=4).mean is None


def test_a_diverged_run_takes_its_pair_out_but_counts_as_done():
    d = verdict.difference({0: 1.0, 1: None, 2: 2.0}, {0: 0.0, 1: 0.0, 2: 0.0}, planned=3)
    assert (d.values, d.done) == ([1, 2], 3) and "none yet" not in d.verdict
    d = verdict.difference({0: None}, {0: 0.0}, planned=1)
    assert d.verdict.startswith("none yet") and str(d) == ""


def test_holm_steps_down_and_stops_at_the_first_that_fails():
    assert verdict.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert verdict.holm([0.04, None, 0.02]) == [True, False, True]  # None is not counted
    assert verdict.holm([0.06, 0.001]) == [False, True]


# ------------------------------------------------------------ the claims


def test_the_settings_of_a_claim_differ_in_one_thing():
    one = [{"se"}, {"texture"}, {"grid", "combine"}, {"m"}, {"tau"}, {"epochs"}, {"batch_size"}]
    one += [{"batch_size", "lr"}]  # sacl.py's rate is in proportion to the batch: lr undoes that
    for c in ablations.CLAIMS:
        (a, start, _), (b, other_start, _) = (ablations.SETTINGS[x] for x in (c.better, c.other))
        a, b = (sacl.Config(**ablations.BASE | x) for x in (a, b))
        differ = {k for k in vars(a) if vars(a)[k] != vars(b)[k]} - {"knn_every"}
        assert (differ in one and start == other_start) or "untrained" in (start, other_start)
        if differ == {"batch_size", "lr"}:
            assert a.lr * a.batch_size == b.lr * b.batch_size
    for pair in ablations.OPEN.items():
        assert set(pair) <= set(ablations.SETTINGS)


def test_the_claims_are_those_of_the_rule():
    """Number, place and figure of every claim in results/README.md, which came first."""
    rule = (RESULTS / "README.md").read_text().partition("## The claims' tables")[0]
    lines = [line for line in rule.splitlines() if re.match(r"\| \d", line)]
    rows = [line.strip("| ").split(" | ") for line in lines]
    stated = []
    for number, _, where, _, figure in rows:
        first, _, last = number.partition("-")
        stated += [(where, figure)] * (int(last or first) - int(first) + 1)
    assert len(stated) == len(ablations.CLAIMS)
    for (where, figure), c in zip(stated, ablations.CLAIMS, strict=True):
        assert c.where in where and c.figure == figure


def test_the_committed_tables_are_those_of_the_committed_lines():
    lines = sacl.read_log(RESULTS / "claims.jsonl")
    assert ablations.tables(lines) == (RESULTS / "claims.md").read_text()
    runs_done = [(x["label"], x["seed"]) for x in lines]
    assert len(set(runs_done)) == len(runs_done)


def test_the_committed_comparison_is_that_of_the_committed_lines(capsys, monkeypatch):
    monkeypatch.chdir(RESULTS.parent)
    compare.main(["--table", "--start", "usual", "--results", "results/earlier/compare.jsonl"])
    committed = (RESULTS / "earlier" / "compare.md").read_text()
    assert committed.endswith("\n\n" + capsys.readouterr().out)
    compare.main(["--table", "--rates", "results/trials.jsonl"])
    table = capsys.readouterr().out
    assert f"\n\n{table}\n" in (RESULTS / "README.md").read_text()
    assert "cost" not in table and "Equal time" not in table  # of runs on a GPU they are not known


def test_a_comparison_shows_every_seed_and_says_what_was_tuned(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(RESULTS.parent)
    line = sacl.read_log(RESULTS / "earlier" / "compare.jsonl")[0]
    file = tmp_path / "lines.jsonl"
    show = ["--table", "--start", "usual", "--results", str(file)]
    other = line | {"seed": 1, "top1": line["top1"] + 1}
    file.write_text("\n".join(map(json.dumps, [line, other])))
    compare.main(show)
    text = capsys.readouterr().out
    assert "| 28.82 (28.32, 29.32) / " in text and "none tuned" in text and "| 2 |" in text
    args = argparse.Namespace(scale="cpu", epochs=10, dataset="cifar100", data_dir="data",
                              texture_bank="", runs=tmp_path, lr=0.0, rates=None,
                              start="usual")  # fmt: skip
    tuned = line | {"label": compare.run_config(args, "sacl-tuned", 0)[0]}
    file.write_text("\n".join(map(json.dumps, [line, tuned])))
    compare.main(show)
    assert "tuned in sacl-tuned alone" in capsys.readouterr().out
    args.lr = 0.3
    file.write_text(json.dumps(line | {"label": compare.run_config(args, "byol", 0)[0]}))
    compare.main([*show, "--lr", "0.3"])
    assert "but for --lr 0.3, none tuned. Figures" in capsys.readouterr().out


def test_a_trial_of_another_rate_has_a_label_and_a_command_of_its_own(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        runs, "run", lambda label, cfg, _, build, **facts: asked.append((label, cfg, facts, build))
    )
    files = ["--results", str(tmp_path / "lines.jsonl"), "--runs", str(tmp_path)]
    trial = ["--dataset", "shapes", "--methods", "byol", "--seeds", "1"]
    compare.main([*trial, *files])
    compare.main([*trial, "--epochs", "12", "--lr", "0.24", "--start", "usual", *files])
    compare.main([*trial, "--epochs", "12", "--lr", "0.24", *files])
    (usual, cfg, *_), (label, other, facts, build), (plain, *_, plain_build) = asked
    assert plain != label and plain_build.keywords == {"start": "plain"}
    assert build.keywords == {"start": facts["start"]} == {"start": "usual"}
    assert (cfg.lr, other.lr, other.epochs, other.seed) == (0.06, 0.24, 12, 1)
    assert usual.split("-")[:2] == ["shapes", "cpu"] and usual != label
    assert cfg.output_dir != other.output_dir
    words = shlex.split(facts["command"])
    compare.main([*words[2:], *files])
    assert words[:2] == ["python", "bench/compare.py"] and asked[3][:3] == asked[1][:3]


def test_each_system_gets_the_rate_of_its_best_trial(monkeypatch, tmp_path, capsys):
    asked, file = {}, tmp_path / "trials.jsonl"
    monkeypatch.setattr(
        runs, "run", lambda label, cfg, file, build, **facts: asked.update({facts["method"]: cfg})
    )
    trials = [
        dict(method="byol", lr=0.6, top1=20.0), dict(method="byol", lr=0.2, top1=30.0),
        dict(method="byol", lr=0.06, top1=10.0), dict(method="sacl", lr=0.3, top1=1.0),
        dict(method="simclr", lr=9.0, error="diverged"),
    ]  # fmt: skip
    trials = [{"start": "plain"} | trial for trial in trials]
    trials.append(dict(method="byol", lr=1.0, top1=99.0, start="usual"))
    file.write_text("\n".join(map(json.dumps, trials)))
    lrs = {"byol": 0.2, "sacl": 0.3, "sacl-positive": 0.3, "sacl-no-gate": 0.3, "sacl-tuned": 0.2}
    words = ["--dataset", "shapes", "--rates", str(file), "--runs", str(tmp_path)]
    compare.main([*words, "--methods", *lrs])
    assert {name: cfg.lr for name, cfg in asked.items()} == lrs
    asked.clear()
    without = [*words, "--methods", "byol", "simclr"]
    assert f"--rates {file}: has no finished trial of simclr" in refused(*without, program=compare)
    assert not asked  # before hours of the others
    assert "leave one of them out" in refused(*words, "--lr", 1, program=compare)
    args = argparse.Namespace(scale="cpu", epochs=0, dataset="shapes", data_dir="data",
                              texture_bank="", runs=tmp_path, lr=0.0, rates=file,
                              start="plain")  # fmt: skip
    line = sacl.read_log(RESULTS / "earlier" / "compare.jsonl")[0]
    seconds = dict(train=1000, monitor=20.0)  # six monitors: one before, five in training
    done = tmp_path / "done.jsonl"
    label = compare.run_config(args, "byol", 0)[0]
    done.write_text(json.dumps(line | {"label": label, "cpu_seconds": seconds}))
    compare.main([*words, "--methods", "byol", "--table", "--results", str(done)])
    text = capsys.readouterr().out
    assert f"lr: that of the best trial in {file}; wd, tau: from the source" in text
    assert "plain start" in text and "| 0.2, 0.0005 |" in text
    assert compare.cpu_seconds(sacl.read_log(done)) == 880


@pytest.mark.parametrize("start", ["plain", "usual"])
def test_every_system_of_the_comparison_is_built_with_its_options(start, folder):
    for name, system in compare.SYSTEMS.items():
        model = compare.build_system(name, tiny(folder), start)
        assert type(model) is system.model
        assert getattr(model, "total", 6) == 6  # steps: 48 images, twice, in batches of 16
        scales = [x for k, x in model.named_parameters() if k.endswith("bn2.weight")]
        assert scales and all(bool((x == (start == "plain")).all()) for x in scales)


def test_the_plain_start_changes_nothing_but_the_scales(monkeypatch):
    monkeypatch.setitem(sacl.SEResNet.BLOCKS, "resnet18", (sacl.BasicBlock, (2, 2, 2, 2)))
    cfg = tiny()
    torch.manual_seed(0)
    usual = sacl.SACL(cfg).state_dict()
    torch.manual_seed(0)
    plain = ablations.plain_start(cfg).state_dict()
    changed = {k for k in usual if not torch.equal(usual[k], plain[k])}
    last = {f"{net}.layer{i}.{j}.bn2.weight" for net in ("encoder", "target_encoder")
            for i in range(1, 5) for j in range(2)}  # fmt: skip
    assert changed == last and all(bool((plain[k] == 1).all()) for k in last)


def made_lines(seeds):
    """Lines as runs leave them, with a top-1 of 80 plus the seed's own part; base has 2 more."""
    shifted = {"conflict": {"shape_share": 10.0}, "corruption_mean": 30.0}
    shifted |= dict.fromkeys(("texture", "shuffle_4x4", "low_pass", "silhouette"), 9.0)
    figures = {"top5": 99.0, "knn": 60.0, "knn_target": 61.0, "uniformity": 1.0}
    figures |= {"shifts": shifted, "cpu_seconds": {"train": 600}, "machine": {"cpu": "toy"}}
    lines = []
    for label, setting in ablations.SETTINGS.items():
        for seed in range(min(seeds, setting.seeds)):
            top1 = 80 + seed + (2 + 0.1 * seed) * (label == "base")
            line = {"label": label, "seed": seed, "top1": top1, "knn_curve": [50.0, 60.0]}
            lines.append(figures | line)
    return lines


def test_the_tables_show_differences_verdicts_and_what_diverged():
    lines = made_lines(8)
    i = next(i for i, x in enumerate(lines) if (x["label"], x["seed"]) == ("tau = 1", 3))
    lines[i] = {"label": "tau = 1", "seed": 3, "error": "the loss is nan", "machine": {}}
    text = ablations.tables(lines)
    gate = "base minus no gate | linear top-1 | +2.35 (+2.15 to +2.55) | 8 | held | yes |"
    assert gate in text
    assert "| 7 | held; tau = 1, seed 3 diverged | yes |" in text
    assert "| tau = 1 | 83.57 ± 2.64 |" in text and "| 10.00 ± 0.00 | 7, 1 diverged |" in text
    text = ablations.tables(made_lines(3))
    gate = "base minus no gate | linear top-1 | +2.10 (+1.85 to +2.35) | 3 | none yet: 3 of 8 |"
    assert gate in text and "Holm" not in text.split("\n\n")[1]  # a column without any value


def test_the_forest_plot_is_drawn_of_claims_with_all_seeds(tmp_path):
    pytest.importorskip("matplotlib", reason="bench/requirements.txt is not installed")
    file = tmp_path / "a.jsonl"
    words = ["--file", str(file), "--plot", str(tmp_path / "f.png")]
    file.write_text("\n".join(map(json.dumps, made_lines(1))))
    assert "no claim has all its seeds" in refused(*words, program=ablations)
    file.write_text("\n".join(map(json.dumps, made_lines(8))))
    ablations.main(words)
    assert tuple(bytes.fromhex("009e73")) in colours_of(tmp_path / "f.png")


# ------------------------------------------------------------ the runs


def test_a_run_leaves_one_line_with_figures_settings_and_machine(folder, tmp_path):
    cfg = tiny(folder, output_dir=str(tmp_path / "a"), epochs=2, knn_every=1, tau=0.5, seed=3)
    for _ in range(2):  # the second finds the line
        runs.run("warm", cfg, tmp_path / "r.jsonl", start="usual")
    (line,) = sacl.read_log(tmp_path / "r.jsonl")
    assert (line["label"], line["seed"], line["start"]) == ("warm", 3, "usual")
    assert line["settings"]["tau"] == 0.5 and not {"seed", "m", "output_dir"} & set(
        line["settings"]
    )
    end = [x for x in sacl.read_log(tmp_path / "a" / "log.jsonl") if "knn" in x]
    assert line["knn_curve"] == [x["knn"] for x in end[1:]]  # without the untrained encoder's
    assert (line["knn"], line["knn_target"]) == (end[-1]["knn"], end[-1]["knn_target"])
    assert line["top1"] == 100 and {"torch", "cpu", "git"} <= set(line["machine"])
    assert set(line["cpu_seconds"]) == {"train", "evaluate", "monitor"} and "monitor" not in line
    assert (tmp_path / "a" / "backbone.pth").exists()
    assert not (tmp_path / "a" / "checkpoint.pth").exists()


def test_an_untrained_encoder_is_the_one_that_training_would_start_from(folder, tmp_path):
    cfg = tiny(folder, output_dir=str(tmp_path / "a"), knn_every=1, epochs=1)
    runs.run("untrained", cfg, tmp_path / "r.jsonl", build=None)
    sacl.train(cfg)
    (line,) = sacl.read_log(tmp_path / "r.jsonl")
    start = next(x for x in sacl.read_log(tmp_path / "a" / "log.jsonl") if "knn" in x)
    assert line["knn"] == start["knn"] and "knn_curve" not in line


def test_an_interrupted_run_goes_on_and_owns_up_to_unknown_seconds(folder, tmp_path):
    cfg = tiny(folder, output_dir=str(tmp_path / "a"))
    sacl.train(dataclasses.replace(cfg, max_steps=1))
    runs.run("base", cfg, tmp_path / "r.jsonl")
    log = sacl.read_log(tmp_path / "a" / "log.jsonl")
    assert [x["resumed_at"] for x in log if "resumed_at" in x] == [1]
    assert sacl.read_log(tmp_path / "r.jsonl")[0]["cpu_seconds"]["train"] is None


def test_a_run_that_diverges_is_recorded_and_not_repeated(folder, tmp_path):
    cfg = tiny(folder, output_dir=str(tmp_path / "a"), lr=1e30)
    for _ in range(2):
        runs.run("base", cfg, tmp_path / "r.jsonl")
    (line,) = sacl.read_log(tmp_path / "r.jsonl")
    assert "lower --lr" in line["error"] and "top1" not in line


def test_two_processes_never_do_the_same_run(folder, tmp_path):
    """While another process holds a run it is passed over; a killed process holds none."""
    cfg = tiny(folder, output_dir=str(tmp_path / "a"), epochs=1)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
    hold += "print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "a.lock")],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert other.stdout.readline() == b"held\n"
    runs.run("base", cfg, tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()
    other.kill()
    other.wait()
    runs.run("base", cfg, tmp_path / "r.jsonl")
    assert len(sacl.read_log(tmp_path / "r.jsonl")) == 1


def test_every_setting_is_run_once_a_seed_as_its_command_says(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        runs, "run", lambda label, cfg, *_, **facts: asked.append((label, cfg, facts))
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    files = ["--file", str(tmp_path / "r.jsonl"), "--work", str(tmp_path)]
    ablations.main(["--seeds", "0", "5", *files])
    assert len(asked) == 2 * len(ablations.SETTINGS) - 2  # 2 and 4 times the epochs: seeds 0 to 3
    assert len({cfg.output_dir for _, cfg, _ in asked}) == len(asked)
    label, cfg, facts = asked[1]
    words = shlex.split(facts["command"])
    asked.clear()
    ablations.main([*words[2:], *files])
    assert words[:2] == ["python", "bench/ablations.py"] and asked == [(label, cfg, facts)]
    assert "nought" in refused("--rows", "nought", program=ablations)


# ------------------------------------------------------------ the probe


def test_the_probe_finds_the_minimum_and_takes_features_as_they_are():
    labels = torch.arange(300) % 3
    x = torch.randn(300, 5) * torch.tensor([1, 9, 0.1, 1, 1]) + 7
    x[:, 0] += 2 * labels
    head, choice = eval_linear.fit_lbfgs(x, labels, 3, seed=0)
    assert choice["l2"] in eval_linear.L2S and 60 < max(choice["held_out_top1"].values()) <= 100
    scaled = (x - x.mean(0)) / (x.std(0) + 1e-6)
    weight = (head.weight * (x.std(0) + 1e-6)).detach().requires_grad_()
    bias = (head.bias + head.weight @ x.mean(0)).detach().requires_grad_()
    loss = F.cross_entropy(scaled @ weight.T + bias, labels) + choice["l2"] * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert all(gradient.abs().max() < 1e-3 for gradient in gradients)
    logits = head(x)
    assert eval_linear.accuracy(logits, labels, 1) > 75
    assert eval_linear.accuracy(logits, labels, 3) == 100


def test_uniformity_is_0_for_one_point_and_larger_for_spread_features():
    spread = torch.randn(200, 64)
    assert runs.uniformity(torch.ones(20, 8)) == pytest.approx(0, abs=1e-5)
    assert 3.5 < runs.uniformity(spread) < 4.1  # all distances near 2^0.5: -log exp(-4)
    assert runs.uniformity(spread + 2) < 1


# ------------------------------------------------------------ shifted images


def clouds(count, side):
    """uint8 images with as much detail at every scale, as photos have."""
    scales = (
        F.interpolate(torch.randn(count, 3, k, k), size=side, mode="bicubic")
        for k in (2, 4, 8, 16, 32)
    )
    return (128 + 20 * sum(scales)).clamp(0, 255).byte()


@pytest.mark.parametrize("side", [32, 44])
@pytest.mark.parametrize("name", shifts.AMOUNTS)
def test_a_corruption_grows_with_severity_from_the_plain_image_on(name, side):
    x, away = clouds(40, side), []
    for severity in range(6):
        g = torch.Generator().manual_seed(0)
        shifted = shifts.corrupt(x, name, severity, g)
        assert shifted.shape == x.shape and shifted.dtype == torch.uint8
        away.append((shifted.float() - x.float()).abs().mean().item())
    assert away[0] == 0 and all(b > 1.05 * a for a, b in zip(away, away[1:], strict=False))


def test_the_cosine_transform_keeps_what_its_steps_can_hold():
    """A flat image loses nothing but to the rounding of its mean; a fine pattern is lost first."""
    flat = torch.full((1, 3, 16, 16), 0.5)
    assert (shifts.quantise(flat, 0.01) - flat).abs().max() < 0.01
    fine = flat + 0.02 * (1 - 2 * ((torch.arange(16)[:, None] + torch.arange(16)) % 2))
    assert torch.allclose(shifts.quantise(fine, 1e-6), fine, atol=1e-4)
    assert shifts.quantise(fine, 0.02).std() < 1e-6 < fine.std()


def test_shuffled_patches_are_the_images_own_in_other_places():
    x = torch.randint(256, (64, 3, 16, 16)).byte()
    g = torch.Generator().manual_seed(0)
    assert torch.equal(shifts.shuffle_patches(x, 1, g), x)
    for n in (2, 4, 16):
        shuffled = shifts.shuffle_patches(x, n, g)
        a, b = (sacl.split(images, n).flatten(2).transpose(0, 1) for images in (x, shuffled))
        key = torch.randint(1, 1 << 20, (a.shape[2],))
        a, b = ((patches.long() * key).sum(2) for patches in (a, b))  # (N, n n): a patch's number
        assert torch.equal(a.sort(1).values, b.sort(1).values)
        places = (a[:, :, None] == b[:, None]).int().argmax(2)  # where each patch went
        assert len(places.unique(dim=0)) > 12  # each image in an order of its own


def test_blur_keeps_a_flat_image_and_takes_a_fine_pattern_away():
    flat = torch.full((1, 3, 16, 16), 0.3)
    assert torch.allclose(shifts.blur(flat, 2.0), flat, atol=1e-6)
    chequers = ((torch.arange(16)[:, None] + torch.arange(16)) % 2).float().expand(1, 1, 16, 16)
    assert shifts.blur(chequers, 2.0).std() < 0.01 and torch.equal(
        shifts.blur(chequers, 0), chequers
    )


def test_a_silhouette_is_black_on_white_whichever_was_brighter():
    y, x = torch.meshgrid(*[torch.arange(32.0) - 15.5] * 2, indexing="ij")
    disc = (y**2 + x**2 < 80).float()
    images = torch.stack([60 + 120 * disc, 200 - 120 * disc]) + 10 * torch.randn(2, 32, 32)
    result = shifts.silhouette(images.clamp(0, 255).byte()[:, None].expand(-1, 3, -1, -1))
    assert set(result.unique().tolist()) == {0, 255}
    for shape in result[:, 0]:
        assert ((shape == 0) == (disc == 1)).float().mean() > 0.97


def test_shape_share_is_of_the_images_named_after_either_cue():
    data = sacl.Images(torch.zeros(5), torch.tensor([1, 1, 2, 5, 5]), ["a", "b", "c"], [])
    shares = shifts.cue_shares(torch.tensor([0, 1, 1, 1, 1]), data)  # shape, texture, neither, ...
    assert shares == {"shape": 60.0, "texture": 20.0, "shape_share": 75.0, "images": 5}
    assert shifts.cue_shares(torch.tensor([2, 2, 1, 0, 0]), data)["shape_share"] is None


def test_shifts_that_change_nothing_leave_the_accuracy(folder, monkeypatch):
    nothing = {name: amounts[:1] * 6 for name, amounts in shifts.AMOUNTS.items()}
    monkeypatch.setattr(shifts, "AMOUNTS", nothing)
    run = tiny(folder)
    data, head = sacl.load_data(run, "test"), torch.nn.Linear(3 * 16 * 16, 2)
    encoder = torch.nn.Flatten()
    logits = head(sacl.embed(encoder, data.pixels, run, torch.device("cpu")))
    top1 = eval_linear.accuracy(logits, data.labels, 1)
    result = shifts.measure(encoder, head, data, run, torch.device("cpu"))
    assert result["plain"] == result["corruption_mean"] == top1
    assert all(levels == [top1] * 5 for levels in result["corruptions"].values())


def test_shifts_of_a_run_are_measured_alike_each_time(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    found = shifts.evaluate(str(run))
    assert found["plain"] == 100  # bright and dark
    assert {"texture", "shuffle_2x2", "shuffle_4x4", "low_pass", "silhouette"} <= set(found)
    assert found["corruptions"]["brightness"][4] < 100  # dark images become bright
    assert shifts.evaluate(str(run)) == found
    saved = json.loads((run / "shifts-online.json").read_text())
    assert saved["corruptions"] == found["corruptions"]


def test_the_encoder_that_is_asked_for_is_measured(finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(shifts, "measure", lambda net, *_: {"mean": net.bn1.running_mean.tolist()})
    online, target, recalibrated = (
        shifts.evaluate(str(run), which)["mean"] for which in ("online", "target", "recalibrated")
    )
    files = [torch.load(run / f"{name}.pth") for name in ("backbone", "target_backbone")]
    assert [online, target] == [weights["bn1.running_mean"].tolist() for weights in files]
    assert recalibrated not in (online, target) and online != target
    assert len(list(run.glob("shifts-*.json"))) == 3


def test_recalibrated_statistics_are_those_of_the_training_images(finished):
    run = sacl.Config(**json.loads((finished / "config.json").read_text()))
    encoder, data = sacl.SACL(run).encoder, sacl.load_data(run, "train")
    new = shifts.recalibrate(encoder, data, run, torch.device("cpu"))
    x = encoder.conv1(sacl.eval_view(data.pixels, run.image_size))
    assert torch.allclose(new.bn1.running_mean, x.mean((0, 2, 3)), atol=1e-4)
    assert torch.equal(encoder.bn1.running_mean, torch.zeros(8))  # the run's own is left alone


# ------------------------------------------------------------ figures


def colours_of(path):
    with Image.open(path) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}


def test_every_figure_is_drawn(folder, finished, tmp_path):
    pytest.importorskip("matplotlib", reason="bench/requirements.txt is not installed")
    from bench import figures

    few = ["--dataset", str(folder), "--count", "2"]
    figures.main(["views", *few, "--out", str(tmp_path / "views.png")])
    figures.main(["curves", str(finished), "--out", str(tmp_path / "curves.png")])
    lines, file = RESULTS / "earlier" / "compare.jsonl", tmp_path / "lines.jsonl"
    figures.main(["compare", "--file", str(lines), "--out", str(tmp_path / "compare.png")])
    lines = sacl.read_log(lines)[:4]
    lines.append(lines[1] | {"cpu_seconds": {"train": None}})  # as where it was interrupted
    lines.append(lines[1] | {"machine": {"device": "NVIDIA H100"}})
    other = lines[1] | {"label": "cifar100-cpu-4/fast-moco-000000", "knn_curve": [1.0]}
    file.write_text("\n".join(map(json.dumps, [*lines, other])))
    drawn = ["compare", "--file", str(file), "--out", str(tmp_path / "few.png")]
    figures.main(drawn)
    shapes = {"label": "shapes-cpu-12/fast-moco-0", "settings": {}, "knn_curve": [1.0] * 6}
    file.write_text(json.dumps(lines[1] | shapes))  # knn_every is the dataset's, 2
    figures.main(["compare", "--file", str(file), "--group", "shapes-cpu-12", *drawn[3:]])
    file.write_text("\n".join(map(json.dumps, [*lines, lines[1] | {"label": "cifar100-cpu-10/x"}])))
    assert "two settings" in refused(*drawn, program=figures)
    for path in tmp_path.glob("*.png"):
        assert len(colours_of(path)) > 10, path
    assert len(list(tmp_path.glob("*.png"))) == 4
    assert "RUN" in refused("curves", program=figures).upper()
