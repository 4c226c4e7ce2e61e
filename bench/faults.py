"""Faults put in on purpose, and what becomes of the work. Linux; some minutes on one core.

    OMP_NUM_THREADS=1 python bench/faults.py | tee results/faults.txt

Names of functions below choose among the faults. A toy run saves after each step, on a disk that
is slowed down, so that it spends most of its time in saving. The full disk is a tmpfs, which only
root can mount.
"""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_linear
import images
import sacl
import texture
from bench.runs import cpu_model

FORK = multiprocessing.get_context("fork")  # a start costs no import of torch
WORK = Path(tempfile.mkdtemp(prefix="faults-"))
SMALL = dict(
    dataset=WORK / "images", arch="resnet18", width=8, dim=16, image_size=16, batch_size=16,
    epochs=20, lr=0.05, texture="none", knn_every=0, print_every=1,
)  # fmt: skip
NUMBER = itertools.count()


def report(good: int, of: int, what: str) -> None:
    print(f"{int(good)} of {of}  {what}", flush=True)


def main(names: list[str]) -> None:
    jobs = kills, two_starts, made_once, disk_full, processes, broken_files, many_files, flags
    if unknown := set(names) - {job.__name__ for job in jobs}:
        known = ", ".join(job.__name__ for job in jobs)
        sys.exit(f"faults.py: {min(unknown)} is none of its jobs: {known}")
    jobs = [job for job in jobs if not names or job.__name__ in names]
    torch.set_num_threads(1)
    random.seed(0)
    draw_images(SMALL["dataset"])
    whole = WORK / "whole"
    finish(run, whole)
    machine = sacl.describe_machine(torch.device("cpu"), torch.float32) | {"cpu": cpu_model()}
    print(machine, f"the run: {end(whole)[0]} steps", sep="\n", flush=True)
    for job in jobs:
        began = time.monotonic()
        job()
        print(f"          ({time.monotonic() - began:.0f} s)", flush=True)
    shutil.rmtree(WORK)


# ------------------------------------------------------------ running things


def draw_images(root: Path) -> None:
    """96 pictures of 16 x 16 in three classes."""
    g = torch.Generator().manual_seed(0)
    for i in range(96):
        (root / "train" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        x = torch.randint(80 * (i % 3 + 1), (3, 16, 16), generator=g).byte()
        to_pil_image(x).save(root / "train" / str(i % 3) / f"{i:02}.png")


def words(**settings) -> list[str]:
    given = (SMALL | settings).items()
    return [word for k, v in given for word in ("--" + k.replace("_", "-"), str(v))]


def fork(job, *args, barrier=None, **settings):
    """Start a job in a process of its own; what it prints goes to the file process.said."""
    said = WORK / f"said-{next(NUMBER)}"

    def child() -> None:
        file = os.open(said, os.O_CREAT | os.O_WRONLY)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if barrier:
            barrier.wait()
        job(*args, **settings)

    process = FORK.Process(target=child)
    process.start()
    process.said = said
    return process


def finish(job, *args, **settings) -> int:
    """Run a job in a process of its own; its exit code."""
    process = fork(job, *args, **settings)
    process.join()
    return process.exitcode


def two_at_once(job, *args, **settings) -> list:
    """Two ended processes that began the job at one moment, by their exit codes."""
    barrier = FORK.Barrier(2)
    both = [fork(job, *args, barrier=barrier, **settings) for _ in range(2)]
    for process in both:
        process.join()
    return sorted(both, key=lambda process: process.exitcode)


def run(out: Path, slow: float = 0.0, save_seconds: float = 0, **given) -> None:
    """The toy run; each fsync takes `slow` seconds."""
    sacl.SAVE_SECONDS = save_seconds
    os.fsync = lambda _: time.sleep(slow)
    sacl.main(words(output_dir=out, **given))


def wait_for(process, text: str) -> None:
    while process.is_alive() and not (process.said.exists() and text in process.said.read_text()):
        time.sleep(0.01)


def one_sentence(process, text: str) -> bool:
    """Whether a process ends with exit code 2 and a sentence with `text`, without a traceback."""
    process.join()
    said = process.said.read_text(errors="replace")
    good = process.exitcode == 2 and text in said.splitlines()[-1] and "Traceback" not in said
    if not good:
        print(f"  exit code {process.exitcode}, {text!r} not at the end of: {said[-700:]}")
    return good


def end(out: Path) -> tuple:
    """What a run has come to: its step, its tensors, the loss of every step."""
    saved = sacl.read_weights(out / "checkpoint.pth")
    momentum = [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
    tensors = b"".join(x.numpy().tobytes() for x in [*saved["model"].values(), *momentum])
    log = [(x["step"], x["loss"]) for x in sacl.read_log(out / "log.jsonl") if "loss" in x]
    return saved["step"], tensors, log


def ends_well(out: Path) -> bool:
    """Let a run go on to its end: whether that is the undisturbed run's, bit for bit."""
    finish(run, out)
    return end(out) == end(WORK / "whole")


# ------------------------------------------------------------ the faults


def kills(times: int = 30) -> None:
    out, whole_files, fitting, saving = WORK / "killed", 0, 0, 0
    for i in range(times):
        process = fork(run, out, slow=0.01)
        if i % 5:  # each fifth while it starts
            wait_for(process, "loss")
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.join()
        saving += any(out.glob("*.part"))
        path = out / "checkpoint.pth"
        whole_files += not path.exists() or {"step", "model"} <= sacl.read_weights(path).keys()
        finish(start_only, out)
        fitting += backbones_fit(out)
    step = sacl.read_weights(path)["step"]
    report(whole_files, times, "kill -9: the checkpoint is whole, or none was due")
    print(f"          {saving} of them while saving, the last at step {step}")
    report(fitting, times, "kill -9: after the next start the backbones are of its step")
    report(ends_well(out), 1, "kill -9: the end is bit for bit the unkilled run's")


def start_only(out: Path) -> None:
    with mock.patch.object(sacl, "start_log", side_effect=SystemExit(0)):
        run(out)


def backbones_fit(out: Path) -> bool:
    model = sacl.read_weights(out / "checkpoint.pth")["model"]
    files = {"encoder.": "backbone.pth", "target_encoder.": "target_backbone.pth"}
    return all(
        torch.equal(x, model[prefix + name])
        for prefix, file in files.items()
        for name, x in sacl.read_weights(out / file).items()
    )


def two_starts(times: int = 20) -> None:
    out, good = WORK / "two", 0
    for _ in range(times):
        one, other = two_at_once(run, out, slow=0.02, max_steps=5)
        good += one.exitcode == 0 and one_sentence(other, "in use by another process")
    report(good, times, "two starts in one folder: one trains, the other says why")
    report(ends_well(out), 1, "two starts: the end is that of a run left alone")


def slowed(module, name: str, count):
    """Let a function take 2 ms longer, and count its calls in all processes."""
    function = getattr(module, name)

    def slowly(*args, **options):
        time.sleep(0.002)
        with count.get_lock():
            count.value += 1
        return function(*args, **options)

    return mock.patch.object(module, name, slowly)


def decoded(folder: Path, count) -> np.ndarray:
    """The images in a mapped file, as if they were more than fit in memory."""
    cfg = sacl.Config(**SMALL | dict(decoded_dir=str(folder)))
    to_file = functools.partial(images.decode, in_memory=0)
    with slowed(images, "square", count), mock.patch.object(images, "decode", to_file):
        return sacl.load_data(cfg, "train").pixels


def banked(folder: Path, count) -> np.ndarray:
    """A bank of their textures, in blocks of 8 images."""
    cfg = sacl.Config(**SMALL | dict(texture="negative", texture_bank=str(folder / "bank.npy")))
    block = mock.patch.object(texture, "BLOCK", 8 * 4 * 3 * 16 * 16)
    with slowed(texture, "texture_views", count), block:
        return sacl.make_textures(sacl.load_data(cfg, "train"), cfg, 0)


# and how many calls make it; the bank's first is a trial
MAKERS = {decoded: ("decoded file", 96), banked: ("texture bank", 1 + 96 // 8)}


def compared(make, folder: Path, expected: np.ndarray, count) -> None:
    def job() -> None:
        if not np.array_equal(make(folder, count), expected):
            raise sacl.UsageError("other contents")

    sacl.command("faults.py", job)


def made_once(times: int = 20) -> None:
    for make, (what, most) in MAKERS.items():
        folder, expected = WORK / what, make(WORK / what / "expected", FORK.Value("i"))
        good = 0
        for i in range(times):
            count = FORK.Value("i")
            both = two_at_once(compared, make, folder / str(i), expected, count)
            good += [process.exitcode for process in both] == [0, 0] and count.value == most
        report(good, times, f"two starts at one {what}: made once, whole, the same for both")
        job = compared, make, folder / "killed", expected, FORK.Value("i")
        for _ in range(times):
            process = fork(*job)
            time.sleep(random.uniform(0, 0.2))
            process.kill()
            process.join()
        report(finish(*job) == 0, 1, f"{what}: whole after {times} kills")


def disk_full() -> None:
    disk = WORK / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk]).returncode:
        print("skipped  disk full", flush=True)  # after mount's own reason
        return
    try:
        for name, save_seconds in (("saving", 0), ("logging", 10**6)):
            out = disk / name
            finish(run, out, max_steps=3)
            before = sacl.read_weights(out / "checkpoint.pth")["step"]
            process = fork(run, out, slow=0.01, save_seconds=save_seconds)
            wait_for(process, "loss")
            fill(disk)
            good = one_sentence(process, "No space left")
            good &= sacl.read_weights(out / "checkpoint.pth")["step"] >= before
            good &= one_sentence(fork(run, out), "No space left")  # a start on a full disk
            (disk / "filler").unlink()
            good &= ends_well(out)
            report(good, 1, f"disk full while {name}: one sentence, whole files, then the same end")
            shutil.rmtree(out)
        for make, (what, _) in MAKERS.items():
            expected = make(WORK / what / "expected", FORK.Value("i"))
            job = compared, make, disk / what, expected, FORK.Value("i")
            process = fork(*job)
            while process.is_alive() and not any(disk.rglob("*.part")):
                time.sleep(0.001)
            fill(disk)
            good = one_sentence(process, "pace")  # No space left, or: free space there
            (disk / "filler").unlink()
            good &= finish(*job) == 0
            report(good, 1, f"disk full: {what}, one sentence, then whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def launch(*how, cwd: Path = WORK, **given) -> subprocess.Popen:
    """torchrun, whose processes and their children end with it."""
    command = [sys.executable, "-m", "torch.distributed.run", *how, sacl.__file__, *words(**given)]
    said = WORK / f"said-{next(NUMBER)}"
    with open(said, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=cwd)
    process.said = said
    return process


def processes() -> None:
    two = ["--standalone", "--nproc_per_node=2"]
    whole, out = WORK / "whole-2", WORK / "killed-2"
    launch(*two, output_dir=whole).wait()
    launch(*two, output_dir=out, max_steps=5).wait()
    process = launch(*two, output_dir=out)
    while process.poll() is None and "step 10" not in process.said.read_text():
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), 9)
    began = time.monotonic()
    process.wait()
    print(f"{time.monotonic() - began:.1f} s   one of two processes killed: until the other ended")
    launch(*two, output_dir=out).wait()
    report(end(out) == end(whole), 1, "one of two processes killed: then the same end")

    other = WORK / "other node"
    other.mkdir()
    for limit in (5, 0):
        nodes = []
        for node, cwd in enumerate((WORK, other)):
            how = "--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1"
            port = f"--master_port={29500 + os.getpid() % 1000}"
            nodes.append(launch(*how, port, output_dir="nodes", max_steps=limit, cwd=cwd))
        codes = [node.wait() for node in nodes]
    good = codes == [0, 0] and end(WORK / "nodes") == end(whole)
    report(good, 1, "two nodes, the second without the run's folder: the same end, resumed")


def broken_files() -> None:
    root, good, good2 = WORK / "broken", 0, 0
    shutil.copytree(SMALL["dataset"], root)
    paths = sorted((root / "train").rglob("*.png"))
    for path in (paths[0], paths[len(paths) // 2], paths[-1]):
        content = path.read_bytes()
        for broken in (content[: len(content) // 2], b"", b"not a picture\n"):
            path.write_bytes(broken)
            start = fork(run, WORK / "none", dataset=root)
            good += one_sentence(start, f"{path}: not a readable image")
        two = launch("--standalone", "--nproc_per_node=2", dataset=root, output_dir=WORK / "none")
        two.wait()
        said = two.said.read_text()
        good2 += two.returncode != 0 and said.count(f"{path}: not a readable image") == 1
        path.write_bytes(content)
    report(good, 9, "a truncated, empty or false picture at the first, middle, last place: named")
    report(good2, 3, "the same in two processes: both end")


def many_files() -> None:
    source = next(SMALL["dataset"].rglob("*.png"))
    many, deep, odd = WORK / "many", WORK / "deep", WORK / "odd"
    for i in range(10_000):
        (many / str(i % 10)).mkdir(parents=True, exist_ok=True)
        os.link(source, many / str(i % 10) / f"{i}.png")
    names = 'with space|it\'s|a "quote"|new\nline|tab\there|\U0001f600 雪|-x|a.'.split("|")
    for i in range(32):
        for folder in (deep.joinpath(*["folder"] * 100), odd / names[i % 8]):
            folder.mkdir(parents=True, exist_ok=True)
            os.link(source, folder / f"{i} {names[i % 8]}.png")
    for folder, what in ((many, "10,000 files"), (deep, "100 folders deep"), (odd, "odd names")):
        out, given = WORK / f"run-{folder.name}", dict(dataset=folder, max_steps=1)
        good = sum(finish(run, out, **given) == 0 for _ in range(2))
        report(good, 2, f"{what}: trained, and resumed")


def flags() -> None:
    wrong = {str: ["/dev/null/x"], int: ["x", "-7", "nan"], float: ["x", "nan", "1e99"]}
    used = {"data_dir": dict(dataset="cifar10"), "texture_bank": dict(texture="negative")}
    unused = {"decoded_dir"}  # by images that fit in memory
    for program, kind in ((sacl, sacl.Config), (eval_linear, eval_linear.ProbeConfig)):
        good = of = 0
        for field in dataclasses.fields(kind):
            for word in wrong.get(field.type, ["x"]) if field.name not in unused else ():
                given = SMALL | dict(output_dir=WORK / "none") | used.get(field.name, {})
                argv, flag = words(**given), "--" + field.name.replace("_", "-")
                if program is eval_linear:
                    argv = [str(WORK / "whole"), "--dataset", str(given["dataset"])]
                argv = argv + [flag, word] if field.name != "run" else [word]
                of += 1
                # the whole run has no test images, so that a probe of it never begins
                named = program is eval_linear and field.name not in ("run", "lr_sweep")
                good += one_sentence(fork(program.main, argv), flag if named else "")
        report(good, of, f"{Path(program.__file__).name}: nonsense refused in one sentence")


if __name__ == "__main__":
    main(sys.argv[1:])
