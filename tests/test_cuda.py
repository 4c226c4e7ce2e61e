"""CUDA rehearsed without a GPU: the training loop on tensors that only pretend to be on one.

Under torch's FakeTensorMode a tensor has a device and a shape but no values. What asks for a value,
as .item() and boolean indexing do, raises; so does arithmetic between devices. A program waits for
the GPU where it asks for a value, or where it copies between GPU and CPU: `NoCopies` finds those.
"""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sacl
from conftest import LeastModel, tiny

STEPS = 2
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


class Pretended(FakeTensorMode):
    """Never touches a GPU, even where torch believes that there is one."""

    avoid_device_init = True


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


def pretend(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


def pretend_all(model: nn.Module, device: torch.device) -> None:
    """Put pretended tensors in place of a model's own; .to(device) then has nothing to do."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(pretend(p, device), p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = pretend(b, device)
    model.to = lambda *args, **kwargs: model


@pytest.fixture
def rehearse(monkeypatch, tmp_path, short_encoder):
    """Trains on a pretended device up to the first wait: the steps done by then, and the wait."""

    def run(device, build=sacl.SACL, **given):
        given = dict(amp="bf16", proj_layers=1, print_every=1000, max_steps=STEPS) | given
        cfg = tiny(output_dir=str(tmp_path / "run"), **given)
        model, done = build(cfg), []
        update, device = model.update_target, torch.device(device)

        def count(m):
            update(m)
            done.append(m)

        def backward(loss):  # torch's own asks a real GPU
            assert loss.shape == () and loss.device == device and loss.requires_grad
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None

        model.update_target = count
        with Pretended(), NoCopies(), monkeypatch.context() as patch:
            pretend_all(model, device)
            x = torch.empty(80, 3, 16, 16, dtype=torch.uint8, device=device)  # 5 steps an epoch
            data = sacl.Images(x, torch.zeros(80, dtype=torch.long), ["a", "b"], ["80 images"])
            patch.setattr(sacl, "make_textures", lambda *_: None if cfg.texture == "none" else x)
            for name in ("save_run", "start_log", "describe_machine"):
                patch.setattr(sacl, name, lambda *_, **__: {})
            if device.type == "cuda":
                patch.setattr(Tensor, "backward", backward)
                patch.setattr(torch.cuda, "is_available", lambda: True)
                patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
                patch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
            try:
                with pytest.raises(WAITS) as wait:
                    sacl.run_epochs(cfg, lambda cfg: model, data, None, device, 0.0)
            except RuntimeError as error:
                if "CUDA driver" in str(error):  # torch 2.6
                    pytest.skip("FakeTensorMode of this torch needs a real GPU")
                raise
        return len(done), wait.value

    return run


@pytest.mark.parametrize("name", SETTINGS)
def test_no_step_waits_for_the_gpu_or_leaves_it(name, rehearse):
    """Views, forward, optimizer, scaler, EMA: the first wait is that of the log line at the end."""
    done, wait = rehearse("cuda:0", **SETTINGS[name])
    if done < STEPS:
        raise wait


def test_backward_asks_for_no_value(rehearse):
    """It cannot be rehearsed on a pretended GPU, but on a CPU without values."""
    done, wait = rehearse("cpu", texture="negative", negatives="eq10", max_steps=1)
    if not done:
        raise wait


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_precision_is_chosen_by_the_card(monkeypatch, capability, dtype):
    """A T4 (7.5) says is_bf16_supported() although it only emulates it; a CPU keeps float32."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert sacl.precision(tiny(amp="auto"), torch.device("cuda")) == dtype
    assert sacl.precision(tiny(amp="auto"), torch.device("cpu")) == torch.float32
    assert sacl.precision(tiny(amp="bf16"), torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("gpus, dtype, steps, mode", [
    (1, torch.bfloat16, 4000, "reduce-overhead"), (1, torch.bfloat16, 3000, "not compiled"),
    (1, torch.float16, 4000, "not compiled"), (2, torch.bfloat16, 4000, "not compiled"),
    (2, torch.bfloat16, "on", "not compiled"), (1, torch.float16, "on", "reduce-overhead"),
])  # fmt: skip
def test_long_runs_on_one_new_gpu_are_compiled(gpus, dtype, steps, mode, monkeypatch):
    """With CUDA graphs; on several GPUs SyncBatchNorm would break the step into pieces."""
    modes = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sacl, "world_size", lambda: gpus)
    monkeypatch.setattr(torch._logging, "set_logs", lambda **levels: None)
    monkeypatch.setattr(sacl, "say", lambda text: None)
    model = nn.Linear(1, 1)
    model.compile = lambda dynamic, mode: modes.append(mode)
    given, steps = ("on", 1) if steps == "on" else ("auto", steps)
    with torch._dynamo.config.patch(suppress_errors=False):
        sacl.compile_model(model, tiny(compile=given), dtype, steps)
        assert torch._dynamo.config.suppress_errors == (mode != "not compiled")
    assert (modes or ["not compiled"]) == [mode]


def test_a_torch_without_a_compiler_is_told_and_used(monkeypatch, capsys):
    def compile(**how):
        raise RuntimeError("torch.compile is not supported on Python 3.14+")

    model = nn.Linear(1, 1)
    model.compile = compile
    monkeypatch.setattr(torch._logging, "set_logs", lambda **levels: None)
    with torch._dynamo.config.patch(suppress_errors=False):
        sacl.compile_model(model, tiny(compile="on"), torch.float32, 1)
    assert "not compiled: torch.compile is not supported" in capsys.readouterr().out


def test_a_gpu_without_code_in_this_torch_is_told_by_name(monkeypatch):
    """A P100 is seen as a GPU, and fails at the first kernel."""

    error = RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    def fail(*shape, device):
        raise error

    for name in ("set_device", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(
        sacl.UsageError, match="Tesla P100 .CUDA error.* available.: choose another GPU"
    ):
        sacl.choose_device()
    error = torch.OutOfMemoryError("CUDA out of memory")  # other programs fill it
    with pytest.raises(torch.OutOfMemoryError):
        sacl.choose_device()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(sacl.UsageError, match="more processes than this machine's GPUs .1."):
        sacl.choose_device()


WAITING = {
    ".item()": lambda loss, x: loss + loss.item(),
    ".cpu()": lambda loss, x: loss + loss.cpu().to(loss.device),
    "a condition": lambda loss, x: loss if loss > 0 else -loss,
    "boolean indexing": lambda loss, x: loss + x[x > 0].sum(),
    "a list as index": lambda loss, x: loss + x[[0, 1]].sum(),
    "an index on the CPU": lambda loss, x: loss + x[torch.arange(2)].sum(),
    "a new tensor": lambda loss, x: loss + torch.tensor([2.0], device=x.device).sum(),
    "a copy onto the GPU": lambda loss, x: loss + torch.ones(2).to(x.device).sum(),
    "nothing": lambda loss, x: loss,
}


@pytest.mark.parametrize("what", WAITING)
def test_the_rehearsal_finds_a_wait(what, rehearse):
    done, _ = rehearse("cuda:0", lambda cfg: LeastModel(cfg, WAITING[what]))
    assert done == (STEPS if what == "nothing" else 0)


def test_the_rehearsal_finds_another_device(rehearse):
    with pytest.raises(RuntimeError, match="cuda:0(,| and) cpu|cpu(,| and) cuda:0"):
        rehearse("cuda:0", lambda cfg: LeastModel(cfg, lambda loss, x: loss + torch.zeros(1)))
