"""What real folders, machines and sessions do to a run: nothing lost, nothing misread.

The kinds of faults have a section each, but for 4, images as the person sees them, which is in
test_images.py with most of 5, and 8, names that collide, which is in kinds 1 and 2.
"""

import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import eval_linear
import images
import sacl
import shapes
from conftest import SMALL, LeastModel, failing, flags, log_of, refused, tiny
from eval_linear import ProbeConfig
from sacl import Config, SEResNet, UsageError

pytestmark = pytest.mark.usefixtures("short_encoder")
THREE = ("checkpoint.pth", "backbone.pth", "target_backbone.pth")


def contents(folder):
    """The bytes of each file below a folder."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_of_one_step(out):
    """The backbones are the checkpoint's, and load strictly under torchvision's names."""
    saved = torch.load(out / "checkpoint.pth", weights_only=True)
    for name, part in (("backbone", "encoder."), ("target_backbone", "target_encoder.")):
        weights = torch.load(out / f"{name}.pth", weights_only=True)
        SEResNet("resnet18", width=8).load_state_dict(weights, strict=True)
        assert all(torch.equal(v, saved["model"][part + k].cpu()) for k, v in weights.items())
    return saved


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def begun(folder, tmp_path_factory):
    """A run that was stopped after 2 of its 6 steps."""
    out = tmp_path_factory.mktemp("begun") / "run"
    sacl.train(tiny(folder, output_dir=out, max_steps=2))
    return out


@pytest.fixture
def stopped(begun, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(begun, tmp_path / "stopped"))


@pytest.fixture(scope="module")
def losses(folder, tmp_path_factory):
    """Of the six steps of the same run when nothing comes between them."""
    out = tmp_path_factory.mktemp("whole")
    sacl.train(tiny(folder, output_dir=out))
    return log_of(out)


# ------------------------------------------------------------ kind 1: nothing trained is ever lost


def test_a_run_leaves_a_checkpoint_of_plain_types_backbones_of_its_step_and_a_log(finished, folder):
    saved = assert_of_one_step(finished)
    assert {"settings", "step", "images", "model", "optimizer", "scaler"} <= set(saved)
    (sgd,) = saved["optimizer"]["param_groups"]
    assert (sgd["momentum"], sgd["weight_decay"], sgd["nesterov"]) == (0.9, 1e-4, False)
    first, untrained, *steps = sacl.read_log(finished / "log.jsonl")
    assert Config(**first["settings"]) == tiny(folder, output_dir=finished, epochs=1, knn_every=1)
    assert {"python", "torch", "device", "precision", "processes", "git"} <= set(first["machine"])
    assert {"knn", "knn_target", "pixels"} <= set(untrained) and untrained["pixels"] == 100
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert {"epoch", "loss", "lr", "m", "images_per_s", "spread", "positive"} <= set(steps[0])
    assert (steps[0]["lr"], steps[0]["m"]) == (0.1 * 16 / 128, 0.99)
    assert {"epoch_loss", "knn", "knn_target", "seconds"} <= set(steps[-1])
    assert steps[-1]["epoch_loss"] == pytest.approx(sum(s["loss"] for s in steps) / 3)
    assert json.loads((finished / "config.json").read_text()) == first["settings"]
    assert {p.name for p in finished.iterdir()} <= {*THREE, "config.json", "log.jsonl", "lock"}


@pytest.mark.parametrize("written", [1, 2])
def test_backbones_are_mended_where_a_kill_came_between_the_writes(
    written, stopped, folder, monkeypatch
):
    cfg = tiny(folder, output_dir=stopped)
    with monkeypatch.context() as kill, pytest.raises(KeyboardInterrupt):
        # two backbones at the start, then the checkpoint, then two backbones
        kill.setattr(sacl, "save", failing(KeyboardInterrupt, written + 3, sacl.save))
        sacl.train(cfg)
    with pytest.raises(AssertionError):
        assert_of_one_step(stopped)
    (stopped / "target_backbone.pth").unlink()
    sacl.train(cfg)  # finds nothing left to train, and so nothing to save at an end
    assert assert_of_one_step(stopped)["step"] == 6


@pytest.mark.parametrize("which", [0, 2, 3, 4, 5])
def test_when_the_disk_is_full_the_checkpoint_stays_whole_and_the_run_goes_on(
    which, stopped, folder, losses, monkeypatch
):
    """A resumed run writes two backbones, log, settings, then checkpoint and two backbones."""
    words = flags(folder, output_dir=stopped, max_steps=1)
    full = OSError(28, "No space left on device")
    before = (stopped / "checkpoint.pth").read_bytes()
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", failing(full, which + 1, os.fsync))
        assert "No space left on device" in refused(*words)
    assert not list(stopped.glob("*.part"))
    assert ((stopped / "checkpoint.pth").read_bytes() == before) == (which < 5)
    sacl.main(words)
    assert log_of(stopped) == losses[: len(log_of(stopped))] and len(log_of(stopped)) >= 3
    assert_of_one_step(stopped)


def test_a_cut_or_damaged_log_is_no_hindrance(stopped, folder, losses):
    with open(stopped / "log.jsonl", "ab") as file:
        file.write(b'{"epoch": 1, "step": 3, "loss": 0.1}\nnull\n123\n\xff\xfe\n{"epoch": 1, "st')
    sacl.train(tiny(folder, output_dir=stopped))
    assert log_of(stopped) == losses


def test_a_step_that_is_due_is_saved_between_the_lines_of_the_log(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sacl, "SAVE_SECONDS", 0)
    monkeypatch.setattr(sacl, "take", failing(KeyboardInterrupt, 3, sacl.take))
    with pytest.raises(KeyboardInterrupt):
        sacl.train(tiny(folder, output_dir=tmp_path, print_every=1000))
    assert assert_of_one_step(tmp_path)["step"] == 2


def test_a_damaged_backbone_is_not_told_as_a_damaged_run(stopped, folder):
    words = flags(folder, output_dir=stopped, max_steps=1)
    odd = io.BytesIO()
    torch.save({"bn1.num_batches_tracked": "many"}, odd)
    for content in (b"", b"junk", odd.getvalue()):
        (stopped / "backbone.pth").write_bytes(content)
        assert "backbone.pth is newer" in (told := refused(*words)) and "move" in told
    (stopped / "backbone.pth").unlink()
    sacl.main(words)  # the advice works
    assert assert_of_one_step(stopped)["step"] == 3


def test_files_of_the_users_own_are_never_replaced(folder, tmp_path):
    """Nor is the encoder of a run whose checkpoint was deleted to save room."""
    words, kept = flags(folder, output_dir=tmp_path / "a", max_steps=1), tmp_path / "kept"
    for name in ("config.json", "backbone.pth", "target_backbone.pth", "log.jsonl"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_text("mine")
        sentence = refused(*words)
        assert name in sentence and "move that file away" in sentence
        assert (tmp_path / "a" / name).read_text() == "mine"
        (tmp_path / "a" / name).rename(kept)
    sacl.main(words)  # the advice works
    assert kept.read_text() == "mine"


def test_a_backbone_is_not_replaced_by_a_less_trained_one(run, stopped, folder):
    for name in THREE[1:]:
        shutil.copy(run / name, stopped)  # three steps, and a checkpoint of two
    before, words = contents(stopped), flags(folder, output_dir=stopped, max_steps=1)
    assert "newer than checkpoint.pth" in refused(*words)
    assert contents(stopped) == before
    for name in THREE[1:]:  # the advice works
        (stopped / name).rename(stopped / f"kept-{name}")
    sacl.main(words)
    assert assert_of_one_step(stopped)["step"] == 3


class Foreign:
    """Something that weights_only=True does not take."""


FOREIGN = {
    "another program's": {"model": {}, "epoch": 3},
    "a list": [1, 2],
    "a tensor": torch.zeros(3),
    "an object": Foreign(),
    "half a file": None,
    "nothing": b"",
    "text": b"Not a checkpoint at all.",
    "of an older version": {"settings": {"tau": 0.2}, "step": 1, "model": {}, "optimizer": {}},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_checkpoint_of_another_program_is_told_and_kept(kind, run, folder):
    path, content = run / "checkpoint.pth", FOREIGN[kind]
    if content is None:
        content = path.read_bytes()[:1000]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    before = contents(run)
    sentence = refused(*flags(folder, output_dir=run))
    assert "checkpoint.pth" in sentence and "\x1b" not in sentence
    assert "of another program" in sentence
    assert contents(run) == before


def test_a_run_of_another_model_or_of_other_settings_is_refused_and_kept(stopped, folder, losses):
    before = contents(stopped)
    with pytest.raises(UsageError, match="a run of another model"):
        cfg = tiny(folder, output_dir=stopped)
        sacl.train(cfg, lambda cfg: sacl.SACL(dataclasses.replace(cfg, proj_layers=2)))
    words = flags(folder, output_dir=stopped)
    assert "--tau 0.2, not 0.5: give --tau 0.2 to go on" in refused(*words, "--tau", 0.5)
    assert contents(stopped) == before
    sacl.main([*words, "--tau", "0.2"])  # the advice works
    assert log_of(stopped) == losses


def test_each_evaluation_has_a_file_of_its_own(finished, tmp_path):
    """Another seed, and the same seed after more training; the same again is written again."""
    mine = tmp_path / "linear-online-lbfgs.json"
    mine.write_text("mine")
    given = dict(run=finished, output_dir=tmp_path, probe="lbfgs")
    results = [eval_linear.evaluate(ProbeConfig(**given, seed=seed)) for seed in (0, 1, 0)]
    assert mine.read_text() == "mine"
    names = [f"linear-online-lbfgs-{number}.json" for number in (2, 3)]
    assert [json.loads((tmp_path / name).read_text()) for name in names] == results[:2]
    assert len(list(tmp_path.iterdir())) == 3
    longer = shutil.copytree(finished, tmp_path / "longer")
    weights = torch.load(longer / "backbone.pth")
    for _ in range(2):
        eval_linear.evaluate(ProbeConfig(**given | dict(run=longer, output_dir=tmp_path / "a/b")))
        weights["bn1.num_batches_tracked"] += 1
        torch.save(weights, longer / "backbone.pth")
    assert len(list((tmp_path / "a/b").iterdir())) == 2


@pytest.mark.parametrize("program", [sacl, eval_linear])
def test_what_cannot_be_written_is_found_out_before_the_work(
    program, finished, tmp_path, monkeypatch
):
    """A file in the way, and a folder that is read-only, as /kaggle/input."""
    monkeypatch.setattr(sacl, "load_data", lambda *_: pytest.fail("the work has begun"))
    first, how = [finished] * (program is eval_linear), dict(program=program)
    (tmp_path / "file").write_text("")
    assert "--output-dir" in refused(*first, "--output-dir", tmp_path / "file" / "a", **how)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert "--output-dir" in refused(*first, "--output-dir", tmp_path / "a", **how)
    assert "--output-dir" in refused(*first, **how)


# ------------------------------------------------------------ kind 2: one writer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the other process is a fork")
@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork")
def test_a_second_start_is_refused_and_a_killed_run_goes_on(folder, tmp_path, losses, monkeypatch):
    """The lock is the process's: it dies with it."""
    cfg, real = tiny(folder, output_dir=tmp_path), sacl.write_log

    def log_and_hang(out, line, more=""):
        real(out, line, more)
        if line["step"] == 4:
            (out / "hangs").touch()
            signal.pause()

    with monkeypatch.context() as slow:
        slow.setattr(sacl, "write_log", log_and_hang)
        slow.setattr(sacl, "SAVE_SECONDS", 0)
        first = multiprocessing.get_context("fork").Process(target=sacl.train, args=(cfg,))
        first.start()
    while not (tmp_path / "hangs").exists():
        assert first.is_alive()
        time.sleep(0.02)
    before = contents(tmp_path)
    assert "in use by another process" in refused(*flags(folder, output_dir=tmp_path))
    assert contents(tmp_path) == before
    first.kill()
    first.join()
    assert assert_of_one_step(tmp_path)["step"] == 3  # the fourth was logged, and not saved
    sacl.train(cfg)
    assert log_of(tmp_path) == losses


def test_who_may_wait_goes_on_when_the_other_has_ended(tmp_path, monkeypatch):
    with open(tmp_path / "lock", "a+") as other:
        assert sacl.try_lock(other)
        monkeypatch.setattr(sacl.time, "sleep", lambda seconds: other.close())
        with sacl.claim(tmp_path / "lock", wait=True):
            assert other.closed


def test_different_runs_do_not_fall_into_one_folder(folder, tmp_path, monkeypatch):
    """By dataset and seed; folders of one name are told apart by their images."""
    seeds = [Config(dataset="cifar100", seed=seed).output_dir for seed in (0, 1, 12)]
    assert seeds == ["runs/cifar100", "runs/cifar100-seed1", "runs/cifar100-seed12"]
    assert Config(dataset="photos/").output_dir == Config(dataset="./photos").output_dir
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        shutil.copytree(folder, tmp_path / name / "photos")
    next((tmp_path / "b" / "photos" / "train").rglob("*.png")).unlink()
    sacl.train(tiny("a/photos", max_steps=1))
    assert "holds a run on other images" in refused(*flags("b/photos", max_steps=1))


# ------------------------------------------------------------ kind 3: a resume is the same run


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch():
    orders = [sacl.epoch_order(50, tiny(seed=s), e) for s, e in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2]) and not torch.equal(orders[0], orders[3])
    assert orders[0].shape == (3, 16) and orders[0].unique().numel() == 48  # the rest is dropped


def test_moved_and_renamed_images_are_the_same(folder, stopped, tmp_path, losses):
    shutil.copytree(folder, tmp_path / "new name")
    sacl.train(tiny(f"{tmp_path}/new name/", output_dir=stopped))
    assert log_of(stopped) == losses


def test_changed_images_are_told_and_both_ways_out_work(folder, begun, stopped, tmp_path, losses):
    root = Path(shutil.copytree(folder, tmp_path / "images"))
    gone, added = root / "train/dark/3.png", root / "train/bright/new.png"
    gone.rename(tmp_path / "3.png")
    shutil.copy(root / "train/dark/4.png", added)
    before, words = contents(stopped), flags(root, output_dir=stopped)
    sentence = refused(*words)
    told = "on other images", "1 are new", "new.png", "1 gone", "3.png", "--changed-images accept"
    assert all(word in sentence for word in told)
    assert contents(stopped) == before
    sacl.main([*words, "--changed-images", "accept", "--max-steps", "1"])
    assert len(log_of(stopped)) == 3
    added.unlink()
    (tmp_path / "3.png").rename(gone)
    shutil.rmtree(stopped)
    shutil.copytree(begun, stopped)
    sacl.main(words)
    assert log_of(stopped) == losses


def test_with_fewer_images_a_run_keeps_its_place_in_the_schedule(folder, tmp_path):
    root = Path(shutil.copytree(folder, tmp_path / "images"))
    given = dict(output_dir=tmp_path / "a", m_schedule="cosine")
    sacl.train(tiny(root, **given, max_steps=3))  # half of the 6 steps
    for path in sorted((root / "train").rglob("*.png"))[::3]:
        path.unlink()
    sacl.train(tiny(root, **given, changed_images="accept"))  # 2 steps an epoch, 4 in all
    lines = [line for line in sacl.read_log(tmp_path / "a/log.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4]
    lrs = [line["lr"] for line in lines]
    assert lrs == sorted(lrs, reverse=True) and lrs[3] == pytest.approx(lrs[0] / 2)
    assert (lines[0]["m"], lines[3]["m"]) == pytest.approx((0.99, 0.995))


def test_images_in_memory_are_known_by_a_checksum():
    x, labels = torch.randint(256, (4, 3, 8, 8)).byte(), torch.zeros(4).long()
    names = [sacl.in_memory(pixels, labels, ["a"]).names for pixels in (x, x.clone(), x.flip(0))]
    assert names[0] == names[1] != names[2]


def test_max_hours_stops_between_the_lines_of_the_log_and_saves(folder, tmp_path, losses):
    model = sacl.train(tiny(folder, output_dir=tmp_path, max_hours=1e-9, print_every=1000))
    assert assert_of_one_step(tmp_path)["step"] == 1 and model.training
    sacl.train(tiny(folder, output_dir=tmp_path))
    assert log_of(tmp_path) == losses


def test_many_images_are_decoded_once_to_a_file_and_trained_on_from_there(
    folder, tmp_path, losses, monkeypatch, capsys
):
    monkeypatch.setattr(images, "decode", functools.partial(images.decode, in_memory=0))
    given = dict(output_dir=tmp_path / "a", decoded_dir=tmp_path / "decoded")
    for _ in range(2):
        sacl.train(tiny(folder, **given))
    assert log_of(tmp_path / "a") == losses  # as from memory
    assert capsys.readouterr().out.count("decoding 48 images") == 1
    words = flags(folder, **given | dict(output_dir=tmp_path / "b", texture="negative"))
    assert "--texture-bank FILE" in refused(*words)


def test_any_seed_works_or_is_refused(folder, tmp_path):
    """That of a clock too."""
    sacl.train(tiny(folder, output_dir=tmp_path, max_steps=1, seed=2**31 - 1))
    for seed in (2**31, int(1000 * time.time()), 2**64, -1):
        assert "--seed" in refused(*flags(folder, output_dir=tmp_path, seed=seed))


def test_the_advice_after_a_loss_that_is_not_finite_works(folder, tmp_path):
    words = flags(folder, output_dir=tmp_path / "a")
    sentence = refused(*words, "--lr", 1e30, "--amp", "bf16", code=1)
    for word in ("lower --lr", "--warmup-epochs", "another --output-dir", "--amp off"):
        assert word in sentence
    saved = assert_of_one_step(tmp_path / "a")
    assert all(x.isfinite().all() for x in saved["model"].values())
    sacl.main(flags(folder, output_dir=tmp_path / "b", max_steps=1, warmup_epochs=1))
    # "go on from there with --amp off": accepted in that folder, where the rate is still too high
    assert "loss is nan" in refused(*words, "--lr", 1e30, "--amp", "off", code=1).lower()


def test_weights_that_are_not_finite_are_never_saved(folder, tmp_path):
    """A gradient can be infinite where the loss is not yet."""

    def build(cfg):
        model = sacl.SACL(cfg)
        model.update_target = lambda m: model.predictor[0].weight.data.fill_(math.inf)
        return model

    with pytest.raises(FloatingPointError, match="weights are not finite at step 1.*lower --lr"):
        sacl.train(tiny(folder, output_dir=tmp_path / "a", max_steps=1), build)
    assert assert_of_one_step(tmp_path / "a")["step"] == 0


def test_another_model_goes_on_too_and_gets_the_m_of_the_log(folder, tmp_path, capsys):
    """And the same command, --max-steps with it, goes on each time."""
    cfg = tiny(folder, output_dir=tmp_path, max_steps=1, m_schedule="cosine")
    for step in (1, 2):
        model = sacl.train(cfg, LeastModel)
        assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["step"] == step
        assert "the same command goes on" in capsys.readouterr().out
    assert model.m == sacl.read_log(tmp_path / "log.jsonl")[-1]["m"] > 0.99


def test_a_run_of_a_gpu_is_evaluated_on_a_cpu(run):
    cfg = json.loads((run / "config.json").read_text()) | dict(amp="fp16")
    (run / "config.json").write_text(json.dumps(cfg))
    _, images = eval_linear.load_encoder(ProbeConfig(run=str(run)))
    assert sacl.precision(images, torch.device("cpu")) == torch.float32


def test_a_run_goes_on_in_fp16(stopped, folder):
    """What a disabled GradScaler saved is empty; where amp may change, it must not matter."""
    cfg = tiny(folder, output_dir=stopped)
    model, scaler = sacl.SACL(cfg), torch.amp.GradScaler("cpu")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1, 0.9)
    names = sacl.load_data(cfg, "train").names
    parts = dict(model=model, optimizer=optimizer, scaler=scaler)
    assert sacl.resume(stopped, cfg, names, parts, {})["step"] == 2 and scaler.is_enabled()


# ------------------------------------------------------------ kind 5: all images that were meant


def test_the_first_lines_say_how_many_images_from_where(folder, tmp_path, capsys):
    (folder / "train" / "note.xyz").write_text("")
    try:
        sacl.train(tiny(folder, output_dir=tmp_path, max_steps=1))
    finally:
        (folder / "train" / "note.xyz").unlink()
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"48 images, 2 classes, from {folder}/train" and "skipped 1 .xyz" in told[1]
    assert f"24 test images, 2 classes, from {folder}/test" in told


def test_without_labels_a_run_trains_and_says_that_there_is_no_monitor(folder, tmp_path, capsys):
    """A labelled train beside an unlabelled test too; a probe says why it cannot be."""
    shutil.copytree(folder / "train", tmp_path / "half" / "train")
    (tmp_path / "half" / "test").mkdir()
    for i, path in enumerate(sorted((folder / "train").rglob("*.png"))):
        (tmp_path / "flat").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "flat" / f"{i}.png")
        shutil.copy(path, tmp_path / "half" / "test" / f"{i}.png")
    for name in ("flat", "half"):
        out = tmp_path / f"{name}-run"
        sacl.train(tiny(tmp_path / name, output_dir=out, epochs=1, knn_every=1))
        assert "no kNN monitor: it needs labels" in capsys.readouterr().out
        assert "labelled train and test images" in refused(out, program=eval_linear)


def test_a_short_run_is_not_kept_waiting_by_the_monitor(folder, tmp_path):
    """With the paper's network the untrained encoder's figure takes a CPU the better part of an
    hour, and here nothing will be compared with it."""
    sacl.train(tiny(folder, output_dir=tmp_path, max_steps=2, knn_every=1))
    assert '"knn"' not in (tmp_path / "log.jsonl").read_text()


def test_a_test_image_never_counts_as_of_another_class(folder, finished, tmp_path):
    """Classes are numbered by name; where one has no test images, the numbers would not fit."""
    root = Path(shutil.copytree(folder, tmp_path / "images"))
    shutil.copytree(root / "train/dark", root / "train/amber")
    words = flags(root, output_dir=tmp_path / "a", epochs=1)
    for refusal in (
        refused(*words, "--knn-every", 1),
        refused(finished, "--dataset", root, program=eval_linear),
    ):
        assert "class amber has training images only: add some to the other folder" in refusal
    sacl.main(words)  # without a monitor labels are of no use
    shutil.copytree(root / "test/dark", root / "test/amber")
    eval_linear.evaluate(
        ProbeConfig(run=finished, dataset=root, probe="lbfgs", output_dir=tmp_path)
    )


def test_the_demo_ends_with_what_it_learned_and_what_to_do_next(tmp_path, capsys, monkeypatch):
    draw = shapes.draw
    monkeypatch.setattr(shapes, "draw", lambda count, part, seed: draw(count // 100, part, seed))
    monkeypatch.setitem(sacl.SEResNet.BLOCKS, "resnet50", (sacl.Bottleneck, (0, 1, 0, 0)))
    sacl.main(flags(output_dir=tmp_path, epochs=1, knn_every=1))
    first, last = (line for line in sacl.read_log(tmp_path / "log.jsonl") if "knn" in line)
    learned, encoder, probe, own, paper = capsys.readouterr().out.splitlines()[-5:]
    figures = [str(x) for x in (last["knn"], first["knn"], first["pixels"])]
    assert re.findall(r"[\d.]+(?= %)", learned) == figures
    assert encoder.endswith(f"{tmp_path}/backbone.pth") and str(tmp_path) in probe
    assert "--dataset FOLDER" in own
    device = sacl.choose_device().type
    assert re.search(rf"about [\d,]+\.\d hours on this {device}\b", paper)


# ------------------------------------------------------------ kind 6: blame where it belongs


@pytest.mark.parametrize("theirs, fault", [
    (dict(images=0), "differ in images: .*same command and images"),
    (dict(precision=torch.float16), "differ in precision: .*--amp .*off"),
    (dict(print_every=7, lr=0.4), "differ in lr, print_every: "), ({}, "after it"),
])  # fmt: skip
def test_machines_that_would_train_other_models_are_refused(
    theirs, fault, folder, tmp_path, monkeypatch
):
    def exchange(found, mine):
        found[:] = [mine, mine | theirs]

    monkeypatch.setattr(sacl, "world_size", lambda: 2)
    monkeypatch.setattr(sacl, "run_epochs", failing(UsageError("after it"), 1))
    for name, way in dict(all_gather_object=exchange, get_rank=lambda: 0, barrier=list).items():
        monkeypatch.setattr(sacl.dist, name, way)
    with pytest.raises(UsageError, match=fault):
        sacl.train(tiny(folder, output_dir=tmp_path / "a"))


def test_only_the_first_process_needs_the_output_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sacl, "load_data", failing(NotImplementedError("after it"), 1))
    with pytest.raises(UsageError, match="cannot be written"):
        sacl.train(tiny(output_dir=tmp_path / "file/run"))
    monkeypatch.setattr(sacl, "rank", lambda: 1)
    with pytest.raises(NotImplementedError):
        sacl.train(tiny(output_dir=tmp_path / "file/run"))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A CIFAR-10 of one file for each split, unpacked as on Kaggle, in a folder of any name."""
    where, kind = tmp_path / "input/datasets/owner/some-upload", torchvision.datasets.CIFAR10
    where.mkdir(parents=True)
    for name, parts in (("data_batch_1", "train_list"), ("test_batch", "test_list")):
        pixels = np.random.default_rng(0).integers(256, size=(20, 3072)).astype(np.uint8)
        content = pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(20)]})
        (where / name).write_bytes(content)
        monkeypatch.setattr(kind, parts, [[name, hashlib.md5(content).hexdigest()]])
    monkeypatch.setattr(kind, "_load_meta", lambda self: setattr(self, "classes", [*"0123456789"]))
    monkeypatch.setattr(kind, "download", lambda self: pytest.fail("nothing is to be downloaded"))
    return where


def test_archives_are_found_deep_in_folders_of_any_name(cifar, tmp_path):
    (tmp_path / "data_batch_1").write_text("of another program")
    data = sacl.load_data(Config(dataset="cifar10", data_dir=tmp_path), "train")
    assert data.pixels.shape == (20, 3, 32, 32) and data.pixels.dtype == torch.uint8
    assert data.labels.tolist() == [i % 10 for i in range(20)] and len(data.classes) == 10
    outer = cifar.parent.rename(tmp_path / "cifar-10-batches-py")  # as "extract all" leaves it
    kind = torchvision.datasets.CIFAR10
    assert sacl.find_archive(tmp_path, kind) == (outer / cifar.name).resolve()
    shutil.copytree(outer / cifar.name, outer, dirs_exist_ok=True)
    shutil.copytree(outer / cifar.name, tmp_path / "a")  # which may be another program's
    assert sacl.find_archive(tmp_path, kind) == outer.resolve()


def test_folders_called_train_and_test_are_no_archive(folder):
    assert sacl.find_archive(folder.parent, torchvision.datasets.CIFAR100) is None


def test_an_archive_in_a_folder_of_its_datasets_name_keeps_its_own_size(cifar, tmp_path):
    cifar.rename(tmp_path / "cifar10")
    small = dict(arch="resnet18", width=8, dim=16, batch_size=4, max_steps=1, knn_every=0)
    cfg = Config(dataset="cifar10", data_dir=tmp_path, output_dir=tmp_path / "a", **small)
    sacl.train(dataclasses.replace(cfg, image_size=128))  # textures stay small
    with pytest.raises(UsageError) as fault:
        sacl.require_bank(cfg, 128)
    assert "--texture-bank" in str(fault.value) and "--image-size" not in str(fault.value)


def test_stl10_is_read_in_its_own_layout_and_probed_by_its_labelled_images(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    root, (x, more) = tmp_path / "stl10_binary", torch.randint(256, (2, 2, 3, 96, 96)).byte()
    root.mkdir()
    for name, pixels in {"train": x, "unlabeled": more, "test": x}.items():
        (root / f"{name}_X.bin").write_bytes(pixels.mT.contiguous().numpy().tobytes())
        (root / f"{name}_y.bin").write_bytes(bytes([1, 10]))
    (root / "class_names.txt").write_text("\n".join("0123456789"))
    data = sacl.load_data(Config(dataset="stl10", data_dir=tmp_path), "train")
    assert torch.equal(data.pixels, torch.cat([x, more]))
    assert data.labels.tolist() == [0, 9, -1, -1]
    _, run = eval_linear.load_encoder(ProbeConfig(run=finished, dataset="stl10", data_dir=tmp_path))
    assert [part.labels.tolist() for part in eval_linear.load_labelled(run)] == [[0, 9]] * 2


def test_an_archive_that_was_unpacked_in_part_is_told_as_that(cifar, tmp_path):
    whole = cifar.rename(cifar.parent / "cifar-10-batches-py")
    words = ["--dataset", "cifar10", "--data-dir", tmp_path, "--output-dir", tmp_path / "a"]
    (whole / "data_batch_1").write_bytes(b"half")
    assert f"{whole} is not a whole copy" in refused(*words)
    (whole / "data_batch_1").unlink()
    assert f"{whole} is not a whole copy" in refused(*words)


def test_a_download_tries_the_mirror_then_the_original_and_says_what_failed(tmp_path, monkeypatch):
    tried = []

    def unreachable(self):
        tried.append(self.url)
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.CIFAR100, "download", unreachable)
    sentence = refused(*flags("cifar100", data_dir=tmp_path, output_dir=tmp_path / "a"))
    assert "--data-dir" in sentence and "no network" in sentence
    assert tried == sacl.ARCHIVES["cifar100"] and len(tried) == 2


def test_a_data_dir_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")  # as a folder that is read-only
    words = ("--dataset", "cifar100", "--data-dir", tmp_path / "file")
    sentence = refused(*words, "--output-dir", tmp_path / "a")
    assert "has no CIFAR100" in sentence and "name another --data-dir" in sentence


@pytest.mark.parametrize("name", ["train", "Train"])
def test_a_folder_under_data_dir_goes_before_a_download(name, folder, tmp_path):
    root = shutil.copytree(folder, tmp_path / "cifar100")
    (root / "train").rename(root / name)
    data = sacl.load_data(Config(dataset="cifar100", data_dir=tmp_path), "train")
    assert data.pixels.shape == (48, 3, 32, 32)


def test_missing_empty_and_broken_images_are_refused_by_name(folder, tmp_path):
    out = ["--output-dir", tmp_path / "a"]
    sentence = refused("--dataset", "cifar1000", *out)
    assert "no folder cifar1000" in sentence and "cifar100, stl10" in sentence
    assert "imagenet100/train" in refused("--dataset", "imagenet100", "--data-dir", tmp_path, *out)
    (tmp_path / "empty").mkdir()
    out += ["--image-size", 32]
    assert "hold no images" in refused("--dataset", tmp_path / "empty", *out)
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    (bad / "train" / "dark" / "5.png").write_bytes(b"\x89PNG")
    assert "5.png" in refused("--dataset", bad, *out)
    assert not (tmp_path / "a").exists()


def no_memory():
    """What torch raises where a CPU's memory is too little: a RuntimeError."""
    try:
        return torch.empty(2**60)
    except RuntimeError as error:
        return error


def fault(name, where, error, told, *marks):
    return pytest.param(where, error, told, id=f"{name}, {where}", marks=marks)


MEMORY = "out of memory: end other programs, or choose a smaller --batch-size and another"


@pytest.mark.parametrize("where, error, told", [
    fault("drive", "load_data", OSError(5, "Input/output error", "1.png"), "1.png: Input/output"),
    fault("drive", "load", OSError(5, "Input/output error"), "Input/output error"),
    fault("memory", "load", MemoryError(), MEMORY),
    fault("memory", "load", no_memory(), MEMORY),
    fault("GPU memory", "take", torch.OutOfMemoryError("CUDA out of memory"), MEMORY),
    fault("picture", "load_data", MemoryError("1.png: out of memory"), "1.png: out of memory"),
])  # fmt: skip
def test_a_passing_fault_is_told_as_that(where, error, told, stopped, folder, monkeypatch):
    """Of the images, the checkpoint, a step; never with the advice to remove a good file."""

    before = (stopped / "checkpoint.pth").read_bytes()
    monkeypatch.setattr(torch if where == "load" else sacl, where, failing(error, 1))
    sentence = refused(*flags(folder, output_dir=stopped))
    assert told in sentence and "remove" not in sentence and "cannot be read" not in sentence
    assert (stopped / "checkpoint.pth").read_bytes() == before


def test_an_interrupt_says_that_the_same_command_goes_on(folder, tmp_path, losses, monkeypatch):
    words = flags(folder, output_dir=tmp_path)
    with monkeypatch.context() as key:
        key.setattr(sacl, "take", failing(KeyboardInterrupt, 1))
        assert "the same command goes on" in refused(*words, code=130)
    sacl.main(words)
    assert log_of(tmp_path) == losses


def test_a_clusters_variables_do_not_hang_a_plain_start(folder, tmp_path, monkeypatch):
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_PROCID", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "2")
    sacl.train(tiny(folder, output_dir=tmp_path, max_steps=1))
    for name in names:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "left behind")
    sacl.train(tiny(folder, output_dir=tmp_path, max_steps=1))
    assert len(log_of(tmp_path)) == 2


def test_a_fault_of_the_gpu_is_not_told_as_a_lack_of_memory():
    assert not sacl.out_of_memory(RuntimeError("CUDA error: an illegal memory access"))


def test_a_batch_that_cannot_be_filled_is_refused(folder, tmp_path, monkeypatch):
    assert "at most 48, the number" in refused(*flags(folder, output_dir=tmp_path, batch_size=49))
    data = sacl.load_data(tiny(folder), "train")
    monkeypatch.setattr(sacl, "world_size", lambda: 3)
    with pytest.raises(UsageError, match="--batch-size 16: .* a multiple of 3, and at least 6"):
        sacl.steps_in_epoch(tiny(), data)


def test_an_encoder_that_is_not_finite_is_told_as_that(run):
    weights = torch.load(run / "backbone.pth", weights_only=True)
    torch.save(weights | {"conv1.weight": weights["conv1.weight"] * math.nan}, run / "backbone.pth")
    assert "diverged" in refused(run, program=eval_linear)
    with pytest.raises(FloatingPointError, match="diverged"):  # finite weights of 1e30, say
        eval_linear.fit_lbfgs(torch.full((9, 4), math.inf), torch.zeros(9).long(), 2, seed=0)


def test_a_probe_of_few_images_holds_one_out():
    assert [len(rows) for rows in eval_linear.holdout(5, seed=0)] == [4, 1]


@pytest.mark.parametrize("kind", [*FOREIGN, "of another network"])
def test_weights_of_another_network_are_told_as_that(kind, run):
    content = FOREIGN.get(kind, SEResNet("resnet18", width=16).state_dict())
    content = (run / "backbone.pth").read_bytes()[:1000] if content is None else content
    if isinstance(content, bytes):
        (run / "backbone.pth").write_bytes(content)
    else:
        torch.save(content, run / "backbone.pth")
    assert re.search(
        "backbone.pth (does not fit|cannot be read)", refused(run, program=eval_linear)
    )


@pytest.mark.parametrize("content", ["", "[]", '{"model_type": "vit"}', '{"arch": 50}', "\xff"])
def test_another_programs_config_is_told_as_that(content, run):
    (run / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json holds no settings" in refused(run, program=eval_linear)


def test_a_folder_that_is_no_run_is_told_as_that(tmp_path):
    for path in (tmp_path, tmp_path / "none", __file__):
        assert "name a run's folder" in refused(path, program=eval_linear)


# ------------------------------------------------------------ kind 7: any way in, the same rules


BAD = {
    "width": [0, 2.5, "64", True, None, np.float32(8), np.ones(1), torch.tensor(8)],
    "lr": [0.0, -1.0, math.nan, math.inf, "0.1", np.float64("nan"), True],
    "se": ["late", None, 3, "Standard"],
    "dataset": [3, None, ["a"], b"shapes", ""],
    "output_dir": [3, None],
    "grid": [3, 17, -2],
    "combine": [5, 0],
    "tau": [0.0, math.nan],
    "m": [1.5, -0.1],
    "image_size": [0, 4],
    "epochs": [0],
    "batch_size": [1, -3],
    "warmup_epochs": [99, -1],
    "sgd_momentum": [1.0, -1.0],
    "weight_decay": [-1.0],
    "crop_min": [0.0, 1.5],
    "max_hours": [math.nan, -1.0],
    "texture": ["sometimes", np.array(["none"])],
    "tua": [0.2],
}


@pytest.mark.parametrize("name", BAD)
def test_settings_from_python_are_checked(name):
    for value in BAD[name]:
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}\\b"):
            tiny(**{name: value})


def test_more_combinations_than_can_be_listed_are_refused():
    with pytest.raises(UsageError, match="--combine"):
        tiny(grid=16, combine=128)


def test_paths_and_numpys_numbers_are_taken(tmp_path):
    given = dict(epochs=np.int64(2), tau=np.float32(0.5), lr=1, m=np.float64(0.9))
    cfg = tiny(tmp_path, output_dir=tmp_path, **given)
    assert (cfg.dataset, cfg.epochs, cfg.tau, cfg.lr) == (str(tmp_path), 2, 0.5, 1.0)
    assert json.dumps(dataclasses.asdict(cfg)) and type(cfg.m) is float and type(cfg.epochs) is int
    assert ProbeConfig(run=tmp_path, seed=np.int64(3)).run == str(tmp_path)


@pytest.mark.parametrize("given", [
    dict(probe="svm"), dict(lr=math.nan), dict(lr="1"), dict(epochs=-1), dict(batch_size=0),
    dict(encoder=None), dict(seed=2**40), dict(crop_min=0.0), dict(lr_sweep=1),
])  # fmt: skip
def test_settings_of_a_probe_are_checked(given):
    with pytest.raises(UsageError, match="--" + next(iter(given)).replace("_", "-")):
        ProbeConfig(run="a", **given)


def test_a_sweep_needs_images_to_hold_out(finished, tmp_path):
    for split, place in itertools.product(("train", "test"), ("a/1.png", "b/2.png")):
        (path := tmp_path / "two" / split / place).parent.mkdir(parents=True)
        images.Image.new("RGB", (16, 16)).save(path)
    given = dict(run=finished, dataset=tmp_path / "two", output_dir=tmp_path, epochs=1)
    assert eval_linear.evaluate(ProbeConfig(**given))["train_images"] == 2
    with pytest.raises(UsageError, match="--lr-sweep: too few training images"):
        eval_linear.evaluate(ProbeConfig(**given, lr_sweep=True))


@pytest.mark.parametrize("program, kind", [(sacl, Config), (eval_linear, ProbeConfig)])
def test_each_flag_refuses_nonsense_in_a_sentence(program, kind, folder, tmp_path, monkeypatch):
    """Exit code 2, no traceback, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inspect, "getsource", lambda kind: "")  # --help's text takes its time
    first = ["run"] * (kind is ProbeConfig)
    for field in dataclasses.fields(kind):
        flag = "--" + field.name.replace("_", "-")
        if field.type in (int, float):
            for value in ("x", "-7e99", "-7", "nan", ""):
                if (value, flag) != ("-7", "--texture-alpha"):
                    assert flag in refused(*first, flag, value, program=program)
        elif field.type not in (str, bool):
            assert flag in refused(*first, flag, "nonsense", program=program)
    for words in (["--tua", "0.2"], ["--tau"], ["surplus", "words"], ["--ta", "1"]):
        refused(*first, *words, program=program)
    if program is sacl and not torch.cuda.is_available():
        assert "--amp fp16" in refused(*flags(folder, max_steps=1, amp="fp16"))
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"]


def test_the_same_words_mean_the_same_in_python_and_on_the_command_line():
    """The demo's settings belong to its dataset; what is given always wins."""
    assert sacl.parse(Config, []) == {} and Config() == Config(dataset="shapes")
    assert (Config().arch, Config().epochs) == ("resnet18", 4)
    given = sacl.parse(Config, "--dataset imagenet100 --epochs 200 --texture-seeds 2".split())
    assert given == dict(dataset="imagenet100", epochs=200, texture_seeds=2)
    assert Config(**given).epochs == 200 and Config(dataset="imagenet100").epochs == 100


def test_help_names_every_flag(capsys):
    for kind in (Config, ProbeConfig):
        with pytest.raises(SystemExit) as stop:
            sacl.parse(kind, ["--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        for field in dataclasses.fields(kind):
            flag = field.name.replace("_", "-")
            assert re.search(rf"(?m)^    (--)?{flag}: ", text)


def test_a_console_of_another_encoding_and_a_folder_named_in_chinese(folder, tmp_path, monkeypatch):
    """Windows writes output that is sent to a file in cp1252."""
    images, console = tmp_path / "图片 é '\"", io.TextIOWrapper(io.BytesIO(), "cp1252")
    shutil.copytree(folder, images)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        sacl.main(flags(images, output_dir=tmp_path / "运行", max_steps=1))
    console.flush()
    assert b"\\u56fe\\u7247 \xe9" in console.buffer.getvalue()
    assert len(log_of(tmp_path / "运行")) == 1
    with monkeypatch.context() as patch:  # from Python, on a console that replaces nothing
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        sacl.train(tiny(images, output_dir=tmp_path / "运行", max_steps=1))
    assert len(log_of(tmp_path / "运行")) == 2


def test_a_pasted_cell_trains_on_cifar_alone_and_names_what_else_it_needs(
    cifar, monkeypatch, capsys
):
    """A cell has __name__ == "__main__", no __file__, and the kernel's arguments."""
    home, cell = Path(sacl.__file__).parent, {"__name__": "__main__"}
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != home])
    monkeypatch.chdir(cifar)
    for name in ("images", "texture", "shapes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    exec(compile((home / "sacl.py").read_text(), "<cell>", "exec"), cell)
    assert capsys.readouterr().out == ""  # pasting defines and does not train
    given = SMALL | dict(data_dir=cifar.parent, max_steps=1)
    cell["train"](cell["Config"](dataset="cifar10", **given))
    (cifar / "shapes").mkdir()  # a mere folder is no module
    for dataset, role, told in (
        ("shapes", "none", "shapes.py"),
        (str(cifar), "none", "images.py"),
        ("cifar10", "negative", "texture.py.*--texture none"),
    ):
        with pytest.raises(cell["UsageError"], match=told):
            given |= dict(dataset=dataset, texture=role, output_dir="other")
            cell["train"](cell["Config"](**given))
