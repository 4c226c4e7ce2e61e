"""What the tests share: a small folder of images, a run on it, and how to call the programs."""

import contextlib
import io
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.transforms import functional as TF

import sacl
from sacl import Config

# width 8: with 4 channels oneDNN of torch 2.14 corrupts memory
SMALL = dict(
    arch="resnet18", width=8, dim=16, image_size=16, batch_size=16, epochs=2, texture="none",
    print_every=1, knn_every=0, amp="off",
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def same_sums():
    """Sums round alike in every run; small tensors are slower on two threads."""
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True


@pytest.fixture(autouse=True)
def same_draws():
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


@pytest.fixture(scope="module")
def short_encoder():
    """The encoder "resnet18" has one block; for modules where its depth plays no part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sacl.SEResNet.BLOCKS, "resnet18", (sacl.BasicBlock, (0, 1, 0, 0)))
        yield


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The folder of a finished run of three steps; tests that change it copy it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    sacl.train(tiny(folder, output_dir=out, epochs=1, knn_every=1))
    return out


def tiny(dataset="shapes", **given) -> Config:
    """Settings of a run that takes a second."""
    return Config(**{"dataset": dataset, **SMALL, **given})


def flags(dataset="shapes", **given) -> list[str]:
    """The command line that makes the settings of `tiny`."""
    words = {"dataset": dataset, **SMALL, **given}.items()
    return [w for k, v in words for w in ("--" + k.replace("_", "-"), str(v))]


def failing(fault, after, real=None):
    """`real`, which fails from call number `after` on."""
    calls = itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) >= after:
            raise fault
        return real(*args, **kwargs)

    return call


class LeastModel(nn.Module):
    """The least that `train` asks of a model; `plan` is what else its forward does."""

    def __init__(self, cfg, plan=lambda loss, x: loss):
        super().__init__()
        self.encoder, self.plan = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8)), plan

    def views(self, x, texture, index):
        return (x / 255,)

    def forward(self, x):
        return self.plan(self.encoder(x).mean(), x)

    def update_target(self, m):
        self.m = m


def log_of(run: Path) -> list[float]:
    """The loss of every step."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def refused(*argv, program=sacl, code=2) -> str:
    """Run the command line in this process; returns the one sentence it ends with."""
    error = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(error):
        program.main([str(a) for a in argv])
    assert stop.value.code == code, error.getvalue()
    last = error.getvalue().strip().splitlines()[-1]
    assert "Traceback" not in error.getvalue() and last.startswith(Path(program.__file__).name)
    return last
