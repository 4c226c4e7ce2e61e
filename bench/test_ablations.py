"""The claims of bench/ablations.py, bench/shifts.py and the figures, on toy sizes.

python -m pytest bench
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as TF

import eval_linear
import sacl
from bench import ablations, figures, plot, shifts
from test_sacl import folder, log_of, one_thread, refused, tiny  # noqa: F401

# ------------------------------------------------------------ the ablations


@pytest.fixture
def ablate(folder, tmp_path, monkeypatch):  # noqa: F811
    """The command on the folder's images at a scale of a second a run; lists the runs trained."""
    small = dict(arch="resnet18", width=8, dim=16, image_size=16, batch_size=16, epochs=2)
    small |= dict(print_every=1, knn_every=1000, amp="off", workers=0, texture="none")
    monkeypatch.setitem(ablations.SCALES, "cpu", (small, 40))
    trained, train = [], sacl.train

    def counted(cfg):
        trained.append(Path(cfg.output_dir).name)
        train(cfg)

    monkeypatch.setattr(sacl, "train", counted)
    flags = ["--dataset", folder, "--work", tmp_path / "work", "--file", tmp_path / "a.jsonl"]
    flags += ["--encoders", "online", "--seeds", 1]

    def command(*argv):
        trained.clear()
        ablations.main([str(a) for a in (argv[0], *flags, *argv[1:])])
        return trained.copy()

    command.lines = lambda: sacl.read_log(tmp_path / "a.jsonl")
    command.runs = tmp_path / "work" / "cpu" / f"{folder.name}-val-40"
    return command


@pytest.mark.parametrize("most", [20, None])
def test_held_out_images_are_neither_trained_on_nor_of_the_test_set(
    folder, tmp_path, monkeypatch, most  # noqa: F811
):  # fmt: skip
    monkeypatch.setitem(ablations.SCALES, "cpu", ({}, most))
    links = {}
    for scale in ("cpu", "gpu"):
        root = Path(ablations.split(str(folder), "", tmp_path, scale, "val"))
        links[scale] = [
            {p.resolve() for p in (root / part).rglob("*.png")} for part in ("train", "test")
        ]
    (train, held_out), (all_others, held_out_of_all) = links["cpu"], links["gpu"]
    training = {p for p in folder.resolve().rglob("*.png") if "train" in p.parts}
    assert len(train) == (most or 44) and len(held_out) == 4  # a tenth of each class
    assert not train & held_out and held_out == held_out_of_all
    assert all_others | held_out == training and not all_others & held_out
    shutil.rmtree(tmp_path / "images")
    again = Path(ablations.split(str(folder), "", tmp_path, "cpu", "val"))
    assert {p.resolve() for p in (again / "test").rglob("*.png")} == held_out


def test_final_figures_are_of_the_datasets_own_test_images(folder, tmp_path):  # noqa: F811
    root = Path(ablations.split(str(folder), "", tmp_path, "cpu", "test"))
    found = {p.resolve() for p in (root / "test").rglob("*.png")}
    assert found == set((folder / "test").resolve().rglob("*.png"))
    assert ablations.split("cifar100", "", tmp_path, "gpu", "test") == "cifar100"


def test_an_archive_becomes_the_same_images_as_files(tmp_path, monkeypatch):
    pixels = torch.randint(256, (12, 3, 32, 32)).byte()
    data = sacl.Images(pixels, torch.arange(12) % 2, ["apple", "bear"])
    monkeypatch.setattr(sacl, "load_data", lambda cfg, split: data)
    root = ablations.as_folder("cifar100", str(tmp_path / "none"), tmp_path)
    x = TF.pil_to_tensor(Image.open(root / "test" / "bear" / "00003.png"))
    assert torch.equal(x, pixels[3]) and len(list(root.rglob("*.png"))) == 24


def test_a_run_that_has_its_line_is_not_run_again_also_for_another_table(ablate):
    assert ablate("encoder") == ["base_seed-0"]
    assert ablate("encoder") == []
    others = ["combine-1_seed-0", "combine-3_seed-0", "combine-4_seed-0"]
    assert ablate("combine") == others  # i = 2 is the run that the other table had
    lines = ablate.lines()
    assert len(lines) == 4 and lines[0]["settings"]["combine"] == 1
    assert lines[-1]["rows"] == {"combine": "i = 4"} and {x["seed"] for x in lines} == {0}
    shared = next(x for x in lines if x["settings"]["combine"] == 2)
    assert shared["rows"] == {"encoder": "all", "combine": "i = 2"}
    assert ablate("encoder", "--seeds", 2) == ["base_seed-1"]


def test_a_line_holds_the_settings_the_figures_and_where_they_are_from(ablate):
    ablate("encoder", "--encoders", "online", "target", "--tau", 0.3)
    (line,) = ablate.lines()
    out = ablate.runs / "base_seed-0"
    assert line["settings"]["tau"] == 0.3 and line["settings"]["output_dir"] == ""
    facts = dict(scale="cpu", on="val", seed=0, images=40, test_images=4, probe="lbfgs")
    assert {name: line[name] for name in facts} == facts
    end = sacl.read_log(out / "log.jsonl")[-1]
    assert (line["knn"], line["knn_target"]) == (end["knn"], end["knn_target"])
    for encoder in ("online", "target"):
        result = json.loads((out / f"linear-{encoder}-lbfgs.json").read_text())
        assert line["linear"][encoder] == {k: result[k] for k in ("top1", "top5")}
    assert {"torch", "device", "git"} <= set(line["machine"]) and line["curve"][0]["images"] == 0
    assert not (out / "checkpoint.pth").exists() and (out / "target_backbone.pth").exists()


def test_an_interrupted_run_leaves_no_line_and_goes_on_from_its_folder(ablate, monkeypatch):
    whole = sacl.train
    stopped = lambda cfg: whole(dataclasses.replace(cfg, max_steps=1))  # noqa: E731
    monkeypatch.setattr(sacl, "train", stopped)
    assert ablate("combine") == ["combine-1_seed-0"] and ablate.lines() == []
    monkeypatch.setattr(sacl, "train", whole)
    assert ablate("encoder", "--max-hours", 1e-9) == [] and ablate.lines() == []
    ablate("combine")
    log = sacl.read_log(ablate.runs / "combine-1_seed-0" / "log.jsonl")
    assert [x["resumed_at"] for x in log if "resumed_at" in x] == [1]
    assert len(ablate.lines()) == 4


def test_what_a_line_lacks_is_measured_without_training_again(ablate, monkeypatch):
    ablate("encoder")
    assert ablate("encoder", "--encoders", "target", "--shifts") == []
    assert set(ablate.lines()[0]["linear"]) == {"online", "target"}
    assert ablate("encoder", "--shifts") == []
    (line,) = ablate.lines()
    assert line["shifts"]["plain"] == line["linear"]["online"]["top1"]
    asked = []
    other = {"top1": 1.0, "top5": 5.0, "test_images": 4}
    monkeypatch.setattr(eval_linear, "evaluate", lambda probe: asked.append(probe.probe) or other)
    assert ablate("encoder", "--probe", "lars") == [] and asked == ["lars"]
    assert ablate.lines()[0]["linear"] == {"online": {"top1": 1.0, "top5": 5.0}}


def test_a_run_that_diverges_is_recorded_as_such(ablate, capsys):
    assert ablate("encoder", "--lr", 1e30) == ["base_seed-0"]
    assert "lower --lr" in ablate.lines()[0]["error"]
    assert "| 0, 1 diverged |" in capsys.readouterr().out
    assert ablate("encoder", "--lr", 1e30) == []


def made_lines(path, rows):
    """A file of lines as runs leave them: (table, label, dataset, seed, top-1, more)."""
    lines = []
    for table, label, dataset, seed, top1, more in rows:
        given = dict(arch="resnet18", width=8, dim=16, epochs=2)
        settings = dataclasses.asdict(sacl.Config(dataset=dataset, seed=seed, **given))
        settings |= more.pop("settings", {})
        line = {"rows": {table: label}, "scale": "cpu", "dataset": dataset, "on": "val"}
        line |= {"seed": seed, "images": 100, "probe": "lbfgs", "knn": top1 - 5, "spread": 0.5}
        curve = [{"images": n, "seconds": n / 100, "knn": n / 10} for n in (0, 100, 200)]
        line |= {"linear": {"online": {"top1": top1, "top5": 50.0}}, "curve": curve}
        lines.append(line | {"settings": settings} | more)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_table_is_mean_and_deviation_of_the_lines_beside_the_papers_figure(tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    rows = [("table6", "m = 0.9", "cifar100", seed, top1, {}) for seed, top1 in ((0, 18), (1, 22))]
    rows += [("table6", "m = 0.5", "cifar100", 0, 7, {})]
    rows += [("table6", "m = 0.9", "cifar100", 2, 90, {"error": "nan"})]
    rows += [("table6", "m = 0.9", "cifar100", 0, 60, {"scale": "gpu", "images": 45000})]
    made_lines(file, rows)
    ablations.main(["table6", "--table", "--file", str(file)])
    text = capsys.readouterr().out
    scale = "ResNet-18 of width 8, dim 16, {} images, 2 epochs, batch 128; lbfgs probe |"
    small, large = "cpu: " + scale.format(100), "gpu: " + scale.format(45000)
    assert "| m = 0.5 | 0.00 (imagenet100) | 7.00 | 2.00 | 0.50 | 1 | " + small in text
    both = "20.00 ± 2.83 | 15.00 ± 2.83 | 0.50 ± 0.00 | 2, 1 diverged | "
    assert "| m = 0.9 | 66.17 (imagenet100) | " + both + small in text
    assert "| m = 0.9 | 66.17 (imagenet100) | 60.00 | 55.00 | 0.50 | 1 | " + large in text
    assert text.index("m = 0.5") < text.index("m = 0.9") and "held-out training images" in text
    made_lines(file, rows[:3])  # where all rows have one scale, the caption says it
    ablations.main(["table6", "--table", "--file", str(file)])
    text = capsys.readouterr().out
    assert "(cpu: " + scale.format(100).removesuffix(" |") + ")" in text
    assert "| m = 0.5 | 0.00 (imagenet100) | 7.00 | 2.00 | 0.50 | 1 | cpu |" in text
    lines = sacl.read_log(file)  # of one row, but not repetitions of one run
    lines[1]["settings"]["crop_min"] = 0.08
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ablations.main(["table6", "--table", "--file", str(file)])
    text = capsys.readouterr().out
    assert "| 18.00 | 13.00 | 0.50 | 1 | cpu; crop_min 0.2 |" in text
    assert "| 22.00 | 17.00 | 0.50 | 1 | cpu; crop_min 0.08 |" in text


def test_a_recipe_is_the_settings_that_it_implies():
    """So that the search's runs serve the table that compares recipes."""
    varied = ablations.tables(8)["recipe"]["tuned"]
    tuned = sacl.Config(dataset="cifar100", epochs=8, **varied)
    spelled = {k: getattr(tuned, k) for k in {**sacl.PRESETS["tuned"], **varied}}
    spelled = sacl.Config(dataset="cifar100", epochs=8, **spelled | {"recipe": "paper"})
    line = {"settings": ablations.comparable(spelled), "scale": "cpu"}
    assert ablations.same(line, tuned, {"scale": "cpu"})
    other = dataclasses.replace(tuned, tau=0.7)
    assert not ablations.same(line, other, {"scale": "cpu"})


def test_every_table_of_the_paper_has_a_row_for_each_of_its_figures():
    for table, figures_of in ablations.PAPER.items():
        for row in figures_of.values():
            assert len(row) <= len(ablations.tables(200)[table])
    for rows in ablations.tables(200).values():
        for varied in rows.values():  # all are settings that sacl.py takes
            sacl.Config(**{"dataset": "cifar100", "epochs": 200, **varied})
    assert ablations.base_settings("gpu", "cifar100", {}) == {"image_size": 32, "epochs": 200}


def test_the_tuned_combination_takes_what_helped_at_every_seed_and_the_best_of_a_field():
    rows = {"paper": {}, "warm-up": {"warmup_epochs": 1}, "tau 0.1": {"tau": 0.1}}
    rows |= {"crop_min 0.1": {"crop_min": 0.1}, "crop_min 0.4": {"crop_min": 0.4}}
    top1 = {"paper": (10, 12), "warm-up": (11, 14), "tau 0.1": (20, 11)}
    top1 |= {"crop_min 0.1": (12, 14), "crop_min 0.4": (13, 15)}
    found = {k: [{"linear": {"online": {"top1": x}}} for x in v] for k, v in top1.items()}
    label, varied = ablations.together(found, rows)
    assert varied == {"warmup_epochs": 1, "crop_min": 0.4} and "tau" not in label
    found["warm-up"] = found["paper"]
    assert ablations.together(found, rows)[1] == {}  # one alone is no combination


def test_rows_are_chosen_by_their_labels_and_others_refused(monkeypatch, tmp_path, capsys):
    labels = []
    monkeypatch.setattr(ablations, "run", lambda table, label, *_: labels.append(label) or {})
    file = ["--file", str(tmp_path / "a.jsonl"), "--work", str(tmp_path)]
    ablations.main(["texture", "--rows", "none", "positive", *file])
    assert labels == ["none", "positive"] * 2  # two seeds
    labels.clear()
    monkeypatch.setattr(ablations, "split", lambda *_: "cifar100")
    ablations.main(["tuned", "--rows", "tau 0.1", *file])  # with nothing to be compared with
    assert labels == ["tau 0.1"] * 2
    with pytest.raises(SystemExit):
        ablations.main(["texture", "--rows", "nought", *file])
    assert "'nought'" in capsys.readouterr().err


def test_flags_that_ablations_set_themselves_are_refused_by_name(tmp_path):
    files = ["--work", tmp_path / "work", "--file", tmp_path / "a.jsonl"]
    bad = [("table6", "--m", 0.5), ("table4", "--seed", 1), ("fig7", "--seeds", 0)]
    bad += [("grid", "--output-dir", "a"), ("table4", "--dataset", "stl10")]
    bad += [("table4", "--dataset", tmp_path / "none")]
    for table, flag, value in bad:
        assert flag in refused(table, flag, value, *files, program=ablations)


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


@pytest.mark.parametrize(
    "path, cues",
    [
        ("cat1-truck2.png", ("cat", "truck")),  # Geirhos et al.
        ("cat/cat12-truck.png", ("cat", "truck")),
        ("truck-cat/00007.png", ("truck", "cat")),
        ("t-shirt-cat/1.png", ("t-shirt", "cat")),
        ("cat-t-shirt3.png", ("cat", "t-shirt")),
        ("7-cat.png", ("7", "cat")),
        ("cat1-cat2.png", None),  # no conflict
        ("cat1-dog2.png", None),  # no class of the dataset
        ("catalogue-truck.png", None),
        ("cat/truck.png", None),
    ],
)
def test_names_of_conflict_images_tell_shape_and_texture(path, cues):
    classes = ["7", "cat", "t-shirt", "truck"]
    expected = cues and tuple(map(classes.index, cues))
    assert shifts.cues_of(Path("some-where", path), classes) == expected


def test_shape_share_is_of_the_images_named_after_either_cue():
    data = sacl.Images(torch.zeros(5), torch.tensor([1, 1, 2, 5, 5]), ["a", "b", "c"])
    shares = shifts.cue_shares(torch.tensor([0, 1, 1, 1, 1]), data)  # shape, texture, neither, ...
    assert shares == {"shape": 60.0, "texture": 20.0, "shape_share": 75.0, "images": 5}
    assert shifts.cue_shares(torch.tensor([2, 2, 1, 0, 0]), data)["shape_share"] is None


def test_shifts_that_change_nothing_leave_the_accuracy(folder, monkeypatch):  # noqa: F811
    nothing = {name: amounts[:1] * 6 for name, amounts in shifts.AMOUNTS.items()}
    monkeypatch.setattr(shifts, "AMOUNTS", nothing)
    run = tiny(folder)
    data, head = sacl.load_data(run, "test"), torch.nn.Linear(3 * 16 * 16, 2)
    encoder = torch.nn.Flatten()
    logits = head(sacl.embed(encoder, data, run, torch.device("cpu")))
    top1 = eval_linear.accuracy(logits, data.labels, 1)
    result = shifts.measure(encoder, head, data, {}, run, 0, torch.device("cpu"))
    assert result["plain"] == result["corruption_mean"] == top1
    assert all(levels == [top1] * 5 for levels in result["corruptions"].values())


def test_shifts_are_measured_with_the_trained_probe_and_alike_each_time(folder, tmp_path):  # noqa: F811
    sacl.train(tiny(folder, output_dir=str(tmp_path / "a"), epochs=1))
    test = folder / "test"
    for i in range(3):  # the classes are told by brightness: as a cue it is the shape's here
        (tmp_path / "cues").mkdir(exist_ok=True)
        shutil.copy(test / "bright" / f"{i}.png", tmp_path / "cues" / f"bright{i}-dark1.png")
        shutil.copy(test / "dark" / f"{i}.png", tmp_path / "cues" / f"dark{i}-bright1.png")
    shutil.copy(test / "dark" / "1.png", tmp_path / "cues" / "dark-dark.png")
    probe = eval_linear.ProbeConfig(
        source=str(tmp_path / "a"), probe="lbfgs", workers=0, shifts=True,
        conflict=str(tmp_path / "cues"),
    )  # fmt: skip
    result = eval_linear.evaluate(probe)
    found = result["shifts"]
    assert found["plain"] == result["top1"] == 100
    whole = {"shape": 100.0, "texture": 0.0, "shape_share": 100.0, "images": 6}
    assert found["conflict_folder"] == whole
    assert {"texture", "shuffle_2x2", "shuffle_4x4", "low_pass", "silhouette"} <= set(found)
    assert found["corruptions"]["brightness"][4] < 100  # dark images become bright
    again = eval_linear.evaluate(probe)
    assert again["shifts"] == found
    saved = json.loads((tmp_path / "a" / "linear-online-lbfgs.json").read_text())
    assert saved["shifts"] == found
    assert "--shifts" in refused(tmp_path / "a", "--conflict", "cues", program=eval_linear)
    flags = ["--workers", 0, "--shifts", "--conflict", test]
    assert "<shape>-<texture>" in refused(tmp_path / "a", *flags, program=eval_linear)


# ------------------------------------------------------------ figures


def test_seconds_of_a_curve_are_those_of_its_steps():
    log = [{"epoch": 0, "step": 0, "knn": 5.0, "pixels": 7.0}]
    log += [{"epoch": 1, "step": 4, "images_per_s": 16.0, "loss": 3.0, "spread": 0.9}]
    log += [{"epoch": 1, "step": 6, "images_per_s": 32.0, "loss": 2.0, "spread": 0.8}]
    log += [{"epoch": 1, "step": 6, "epoch_loss": 2.5, "knn": 9.0, "seconds": 99}]
    start, end = plot.curve_of(log, batch_size=16)
    assert start == {"images": 0, "seconds": 0.0, "knn": 5.0, "pixels": 7.0}
    assert end == {"images": 96, "seconds": 5.0, "spread": 0.8, "loss": 2.5, "knn": 9.0}


@pytest.mark.parametrize("ends", [(0, 1), (-3, 17), (0.123, 0.124), (5, 5), (0, 0), (99, 4e6)])
def test_ticks_are_few_even_steps_around_all_values(ends):
    at = plot.ticks(*ends)
    assert at[0] <= ends[0] and at[-1] >= ends[1] and 2 <= len(at) <= 8
    steps = [b - a for a, b in zip(at, at[1:], strict=False)]
    assert max(steps) == pytest.approx(min(steps))


def colours_of(path):
    with Image.open(path) as image:
        return {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}


def test_figures_of_views_and_cells_show_their_images(folder, tmp_path):  # noqa: F811
    drawn = type("Args", (), dict(seed=0, count=1))
    cfg = sacl.Config(dataset=str(folder), image_size=32, workers=0)
    x = figures.pick(sacl.load_data(cfg, "train"), drawn)
    colours = {tuple(c.tolist()) for c in x[0].flatten(1).T}
    for name, height in (("views", 540), ("cells", 258)):
        out = tmp_path / f"{name}.png"
        figures.main([name, "--dataset", str(folder), "--count", "4", "--out", str(out)])
        assert colours <= colours_of(out) and abs(Image.open(out).height - height) < 60


def test_figures_of_runs_show_every_run_and_frame_right_neighbours_green(folder, tmp_path):  # noqa: F811
    runs = []
    for seed in (0, 1):
        runs.append(str(tmp_path / f"run-{seed}"))
        sacl.train(tiny(folder, output_dir=runs[-1], epochs=3, knn_every=1, seed=seed))
    figures.main(["curves", *runs, "--out", str(tmp_path / "curves.png")])
    hexes = ["#{:02x}{:02x}{:02x}".format(*c) for c in colours_of(tmp_path / "curves.png")]
    assert set(plot.COLOURS[:2]) <= set(hexes) and plot.COLOURS[2] not in hexes
    figures.main(["neighbours", runs[0], "--count", "2", "--out", str(tmp_path / "n.png")])
    hexes = ["#{:02x}{:02x}{:02x}".format(*c) for c in colours_of(tmp_path / "n.png")]
    assert figures.RIGHT in hexes  # bright and dark are told apart by any features
    assert "RUN_DIR" in refused("curves", program=figures)
    assert "not a run" in refused("curves", folder, program=figures)


def test_figures_of_tables_are_drawn_from_their_lines(tmp_path):
    file, out = tmp_path / "a.jsonl", tmp_path / "f.png"
    rows = [
        ("fig7", f"tau = {tau:g}", dataset, seed, 10 + seed, {"settings": {"tau": tau}})
        for tau in (0.1, 0.5) for dataset in ("cifar10", "cifar100") for seed in (0, 1)
    ]  # fmt: skip
    rows += [("grid", label, "cifar100", 0, 9, {}) for label in ("2 x 2 cells", "no grid")]
    made_lines(file, rows)
    for name in ("fig7", "grid"):
        figures.main([name, "--file", str(file), "--out", str(out)])
        assert Image.open(out).width == 2 * plot.WIDTH
    panels = figures.fig7(type("Args", (), {"file": file}))
    low, high = panels[0]["lines"]["linear top-1, online"]
    assert low == (0.1, 10.5, pytest.approx(0.5**0.5)) and high[0] == 0.5
    assert "no run of fig7" in refused("fig7", "--file", tmp_path / "no", program=figures)
