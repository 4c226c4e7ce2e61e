"""CUDA rehearsed without a GPU: the training loop on tensors that only pretend to be on one.

Under torch's FakeTensorMode a tensor has a device and a shape but no values. What asks for a value,
as .item() and boolean indexing do, raises; so does arithmetic between devices. A program waits for
the GPU where it asks for a value, or where it copies between GPU and CPU: `NoCopies` finds those.
"""

import pytest
import torch
from test_sacl import tiny
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sacl

STEPS = 2
CUDA = torch.device("cuda", 0)
SETTINGS = {
    "negative": dict(texture="negative"),
    "negative, eq10, fp16": dict(texture="negative", negatives="eq10", amp="fp16"),
    "negative, batch": dict(texture="negative", texture_negatives="batch"),
    "positive, m by a cosine": dict(texture="positive", m_schedule="cosine"),
    "none, geometric, no cells": dict(texture="none", weak="geometric", grid=1, combine=1),
}


class Copies(Exception):
    """A copy between CPU and GPU that the program waits for."""


WAITS = (Copies, DataDependentOutputException, DynamicOutputShapeException)


class NoCopies(TorchDispatchMode):
    """Raises Copies where a call mixes devices, unless it is a copy that nobody waits for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        fused = function.overloadpacket is torch.ops.aten._fused_sgd_  # torch cannot pretend it
        result = None if fused else function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        copy = function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        # a number on the CPU goes to the GPU with the command itself, but not where it is copied
        devices = {x.device.type for x in tensors if x.ndim or copy}
        onto_gpu = copy and result.device.type == "cuda"
        if len(devices) > 1 and not (onto_gpu and (kwargs.get("non_blocking") or args[2:])):
            raise Copies(f"{function} between {' and '.join(sorted(devices))}")
        return result


def on_gpu(x: Tensor) -> Tensor:
    """A tensor of this shape and type that pretends to be on the GPU."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)


def pretend(model: nn.Module) -> nn.Module:
    """Put pretended tensors in place of a model's own; .to(device) then has nothing to do."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(on_gpu(p), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = on_gpu(b)
    model.to = lambda *args, **kwargs: model
    return model


def fill_gradients(model: nn.Module):
    """Stands for backward(), which needs a real GPU; the loss must be one number on the GPU."""

    def backward(loss: Tensor) -> None:
        assert loss.shape == () and loss.device == CUDA and loss.requires_grad
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None

    return backward


@pytest.fixture
def rehearse(monkeypatch, tmp_path):
    """A function that trains on the pretended GPU to the first wait: steps done, and the wait."""

    def run(kind=sacl.SACL, **given):
        given = dict(amp="bf16", print_every=1000, max_steps=STEPS) | given
        cfg = tiny(output_dir=str(tmp_path / "run"), **given)
        monkeypatch.setitem(sacl.SEResNet.BLOCKS, "resnet18", (sacl.BasicBlock, (1, 1, 1, 1)))
        done, real = [], kind(cfg)
        x = torch.zeros(80, 3, 16, 16, dtype=torch.uint8)  # five steps an epoch
        with FakeTensorMode(), NoCopies(), monkeypatch.context() as patch:
            model, x = pretend(real), on_gpu(x)
            update = model.update_target

            def update_target(m):
                update(m)
                done.append(m)

            model.update_target = update_target
            data = sacl.Images(x, torch.zeros(80, dtype=torch.long), ["a", "b"], ["80 images"])
            patch.setattr(fake_tensor, "init_gpu_context", lambda *_: None, raising=False)
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
            patch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
            patch.setattr(Tensor, "backward", fill_gradients(model))
            patch.setattr(sacl, "save_run", lambda *_: None)
            patch.setattr(sacl, "start_log", lambda *_: None)
            patch.setattr(sacl, "describe_machine", lambda *_: {})
            patch.setattr(sacl, "make_textures", lambda *_: None if cfg.texture == "none" else x)
            with pytest.raises(WAITS) as wait:
                sacl.run_epochs(cfg, lambda cfg: model, data, None, None, CUDA)
        return len(done), wait.value

    return run


@pytest.mark.parametrize("name", SETTINGS)
def test_no_step_waits_for_the_gpu_or_leaves_it(name, rehearse):
    """Views, forward, optimizer, scaler, EMA: the first wait is that of the log line at the end."""
    done, wait = rehearse(**SETTINGS[name])
    if done < STEPS:
        raise wait


