"""The README's "Using what was learned": each recipe gives the very features of the run."""

import dataclasses
import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

import sacl
import shapes
from eval_linear import ProbeConfig, load_encoder


def trained(out: Path, **given) -> tuple[sacl.SEResNet, torch.Tensor]:
    """A run's folder with an encoder in which no tensor is at its start; and 2 normalised images.

    In double precision, so that nothing but rounding in the last digits can differ.
    """
    cfg = sacl.Config(dataset="cifar100", output_dir=str(out), **given)
    encoder = sacl.SEResNet(cfg.arch, cfg.se, cfg.reduction, cfg.stem, cfg.width).double()
    for name, x in encoder.state_dict().items():
        if "bn" in name or "downsample.1" in name:
            x.copy_(torch.rand_like(x) + 0.5 if x.is_floating_point() else torch.tensor(9))
    out.mkdir(parents=True)
    sacl.save_backbones(out, {"knn": encoder})
    sacl.write(out / "config.json", json.dumps(dataclasses.asdict(cfg)).encode())
    return encoder.eval(), torch.randn(2, 3, cfg.image_size, cfg.image_size).double()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return ((a - b).norm() / b.norm()).item() < 1e-12


def recipe(first: str) -> str:
    """The code block of the README that begins so."""
    text = Path(sacl.__file__).with_name("README.md").read_text()
    return textwrap.dedent(re.search(rf"(?m)^    {first}.*\n(?:    .+\n)+", text)[0])


def test_a_runs_encoder_comes_back_by_one_call(tmp_path):
    encoder, x = trained(tmp_path / "run", arch="resnet18", width=8)
    again, cfg = load_encoder(ProbeConfig(run=str(tmp_path / "run")))
    assert not again.training and cfg.image_size == 32
    assert close(again.float().double()(x), encoder.float().double()(x))


def test_without_gates_the_backbone_is_torchvisions(tmp_path):
    encoder, x = trained(tmp_path / "run", se="none", stem="imagenet", image_size=64)
    net = models.resnet50().double()
    found = net.load_state_dict(torch.load(tmp_path / "run/backbone.pth"), strict=False)
    assert found.missing_keys == ["fc.weight", "fc.bias"] and not found.unexpected_keys
    net.fc = nn.Identity()
    assert close(net.eval()(x), encoder(x))


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_the_backbone_is_timms_seresnet50(tmp_path, stem, monkeypatch):
    """Gates are linear layers here and 1x1 convolutions with a bias in timm."""
    timm = pytest.importorskip("timm")
    encoder, x = trained(tmp_path / "run", stem=stem, image_size=32 if stem == "imagenet" else 16)
    net = timm.create_model("seresnet50", num_classes=0).double()
    if stem == "cifar":
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False).double(), nn.Identity()
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: net)
    monkeypatch.chdir(tmp_path / "run")
    exec(recipe('weights = torch.load\\("backbone.pth"\\)'), {"torch": torch, "timm": timm})
    assert close(net.eval()(x), encoder(x))


def test_a_folder_becomes_features_and_names(tmp_path, monkeypatch):
    encoder, _ = trained(tmp_path / "runs/cifar100", arch="resnet18", width=8)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(256, size=(40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"photos/{i}.png")
    monkeypatch.chdir(tmp_path)
    exec(recipe("import numpy as np, pathlib"), {})
    assert np.load("features.npy").shape == (3, encoder.dim)
    assert Path("names.txt").read_text().split() == ["0.png", "1.png", "2.png"]


READY = Path(__file__).resolve().parent.parent / "results" / "cifar100-r18w16"


def test_the_encoder_to_download_is_the_one_of_its_log(monkeypatch):
    """Judged on 500 drawn images for training and 500 for testing, which every machine has."""
    draw = shapes.draw
    monkeypatch.setattr(shapes, "draw", lambda count, part, seed: draw(500, part, seed))
    assert sum(path.stat().st_size for path in READY.iterdir()) < 5e6
    encoder, cfg = load_encoder(ProbeConfig(run=str(READY), dataset="shapes"))
    first, *_, last = sacl.read_log(READY / "log.jsonl")
    assert (cfg.epochs, cfg.width) == (last["epoch"], first["settings"]["width"])
    passes = 2 * last["step"]  # both views of each step
    assert int(torch.load(READY / "backbone.pth")["bn1.num_batches_tracked"]) == passes
    data, test = (sacl.load_data(cfg, split) for split in ("train", "test"))
    bank, query = (sacl.embed(encoder, x.pixels, cfg, torch.device("cpu")) for x in (data, test))
    guess = sacl.knn(bank, data.labels, query, len(data.classes), k=20)
    assert sacl.percent(guess == test.labels) == pytest.approx(96.2, abs=1)


def test_the_encoder_to_download_has_the_accuracy_of_its_log():
    """Where CIFAR-100 lies in data/."""
    if not Path("data/cifar100/train").is_dir():
        pytest.skip("CIFAR-100 is not there as folders of images")
    encoder, cfg = load_encoder(ProbeConfig(run=str(READY)))
    train_set, test_set = (sacl.load_data(cfg, split) for split in ("train", "test"))
    found = sacl.knn_monitor({"knn": encoder}, cfg, train_set, test_set, torch.device("cpu"))
    assert found["knn"] == pytest.approx(sacl.read_log(READY / "log.jsonl")[-1]["knn"], abs=0.3)
