"""Whole trainings: as a graph and without, in fp16 and in fp32, against PyTorch, and against the CPU."""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nanocnn as nc  # before NumPy, whose BLAS reads at import what this sets in the environment

import numpy as np  # isort: skip

import peers  # isort: skip
from nanocnn.data import Batch, Loader, load
from nanocnn.kernels.dispatch import to_device
from nanocnn.models import lenet5
from nanocnn.parallel import Alone, GradientAverager
from nanocnn.precision import at_entrance, default_scaler
from nanocnn.train import train_step

from . import Context, Row, not_run, section
from .correct import bfloat16

HERE = Path(__file__).resolve().parent.parent
LR = 0.02
ROUNDS, TURN = 5, 0.3  # turns of each framework, and seconds of one, about


def synchronize(device: str) -> None:
    if device == "cuda":
        import cupy

        cupy.cuda.Device().synchronize()


def losses(device: str, steps: int, **choices: str) -> list[float]:
    """Of LeNet on the built-in images, by these choices: always the same weights and batches."""
    data = load("shapes", val=0, train_size=32 * steps, test_size=10)
    with nc.using(**choices):
        nc.manual_seed(0)
        model = lenet5(len(data.classes), image_size=32, in_channels=3).to(device)
        optimizer = nc.optim.SGD(model.named_parameters(), LR, momentum=0.9)
        averager, scaler = GradientAverager(optimizer.buckets, Alone()), default_scaler()
        batches = Loader(data.train, 32).epoch(0)
        return [train_step(model, b, optimizer, LR, averager, scaler=scaler).loss / len(b.y) for b in batches]


@section(seconds=20)
def graph(context: Context) -> Iterator[Row]:
    """a step as a graph against the same step op by op: the same losses"""
    steps = 4 if context.quick else 30
    eager, recorded = (losses(context.device, steps, graph=how) for how in ("off", "on"))
    worst = float(np.max(np.abs(np.divide(recorded, eager) - 1)))
    yield dict(steps=steps, first=eager[0], last=eager[-1], last_by_graph=recorded[-1], worst=worst, ok=worst <= 1e-3)


@section(seconds=30)
def precision(context: Context) -> Iterator[Row]:
    """fp16, and bf16 where the GPU has it, against fp32: the curves of the loss"""
    steps = 4 if context.quick else 200
    names = "fp32", "fp16", *(["bf16"] if bfloat16(context) else [])
    curves = {p: np.array(losses(context.device, steps, precision=p)) for p in names}
    for step in np.unique(np.linspace(0, steps - 1, min(steps, 11)).astype(int)):
        yield dict(step=int(step), **{p: float(curve[step]) for p, curve in curves.items()})
    last = {p: float(curve[-(-steps // 4) :].mean()) for p, curve in curves.items()}  # one step's loss is noise
    apart = max(abs(last[p] - last["fp32"]) for p in names)
    yield dict(step="last quarter", **last, ok=bool(apart <= 0.05 * last["fp32"] + 0.02))


# ------------------------------------------------------------------ networks, against PyTorch

# model, mode, batch, precision; what the targets are about comes first.
CASES = (
    ("alexnet", "train", 128, "fp16"),
    ("resnet18", "train", 512, "fp16"),
    *(
        (model, mode, batch, p)
        for p in ("fp16", "fp32")
        for mode in ("train", "infer")
        for batch in (128, 512, 1024)
        for model in ("alexnet", "resnet18")
        if (model, mode, batch, p) not in (("alexnet", "train", 128, "fp16"), ("resnet18", "train", 512, "fp16"))
    ),
)
SMALL = (("alexnet", "train", 2, "fp32"), ("alexnet", "train", 2, "fp16"), ("resnet18", "infer", 2, "fp32"))
COMPILED = ("alexnet", "train", 128, "fp16")
ENOUGH = 10.0  # seconds for a case
ENOUGH_FOR_CPU = 150.0  # seconds for the CPU's rungs of mnist, too; NumPy's is always there


def make_task(model: str, batch: int, width: float) -> peers.Task:
    """Random images and labels, and the model's own first weights."""
    rng = np.random.default_rng(0)
    nc.manual_seed(0)
    weights = {k: np.array(v) for k, v in peers.load("ours").network(model, width, 0.0).state_dict().items()}
    images = rng.standard_normal((batch, 32, 32, 3)).astype(np.float32)
    return peers.Task(model, width, images, rng.integers(0, 10, batch), weights, 0.0, 1, "channels_last", lr=1e-3)


Step = Callable[[], Any]


def ours(task: peers.Task, mode: str, device: str) -> Step:
    """One step, or one batch of logits; images lie on the device."""
    net = peers.load("ours").network(task.model, task.width, task.dropout)
    net.load_state_dict(task.weights)
    net.to(device)
    x, y = to_device(task.images, device), to_device(task.labels, device)
    if mode == "infer":
        net = nc.nn.freeze(net.eval())
        with nc.no_grad():
            infer = nc.capture(lambda images: net(at_entrance(images)), nc.Tensor(x))
        return lambda: infer(nc.Tensor(x))
    optimizer = nc.optim.SGD(net.named_parameters(), task.lr, momentum=task.momentum)
    averager, scaler = GradientAverager(optimizer.buckets, Alone()), default_scaler()
    batch = Batch(x, y, np.arange(len(task.labels)), len(task.labels))
    return lambda: train_step(net, batch, optimizer, task.lr, averager, scaler=scaler).loss / len(task.labels)


def torchs(task: peers.Task, mode: str, precision: str, setting: str, device: str) -> Step:
    """The same in PyTorch: "eager", "graph" (a CUDA graph of the step) or "compiled" (max-autotune). No wait inside.

    fp16 is AMP: autocast, and a loss scale that is fixed, which is less work than ours.
    """
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    torch.backends.cudnn.benchmark = True
    net, x = peers.load("pytorch").network(task)
    net, x = net.to(device).train(mode == "train"), x.to(device, memory_format=torch.channels_last)
    y, scale = torch.tensor(task.labels).to(device), 1024.0 if precision == "fp16" else 1.0
    amp = torch.autocast(device, torch.float16) if precision == "fp16" else nullcontext()
    optimizer = torch.optim.SGD(net.parameters(), task.lr, momentum=task.momentum, foreach=True)
    forward = torch.compile(net, mode="max-autotune") if setting == "compiled" else net

    def step() -> Any:
        if mode == "infer":
            with torch.no_grad(), amp:
                return forward(x)
        optimizer.zero_grad(set_to_none=setting != "graph")
        with amp:
            loss = torch.nn.functional.cross_entropy(forward(x), y)
        (loss * scale).backward()
        if scale != 1:
            torch._foreach_mul_([p.grad for p in net.parameters()], 1 / scale)
        optimizer.step()
        return loss

    if setting != "graph":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        result = step()

    def replay() -> Any:
        recorded.replay()
        return result

    return replay


def turns(steps: dict[str, Step], device: str) -> dict[str, float]:
    """Milliseconds of a step of each, in turn (A B C A B C): the median of the turns."""
    counts, found = {}, {name: [] for name in steps}
    for number in range(1 + ROUNDS):
        for name, step in steps.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(counts.get(name, 3)):
                step()
            synchronize(device)
            each = (time.perf_counter() - start) / counts.get(name, 3)
            if number:
                found[name].append(each)
            else:
                counts[name] = max(1, min(100, int(TURN / ROUNDS / max(each, 1e-6))))
    return {name: 1e3 * statistics.median(times) for name, times in found.items()}


@section(seconds=115)
def networks(context: Context) -> Iterator[Row]:
    """AlexNet and ResNet-18 in training and inference, against PyTorch: eager (AMP, channels_last), as a CUDA graph"""
    small = context.quick or not context.on_gpu
    for case in SMALL if small else CASES:
        yield _case(context, case, 0.05 if small else 1.0, ("eager", "graph") if context.on_gpu else ("eager",))


@section(seconds=70)
def compiled(context: Context) -> Iterator[Row]:
    """AlexNet's training against torch.compile(mode="max-autotune"), which takes a minute to tune"""
    if context.on_gpu:
        yield _case(context, COMPILED, 0.05 if context.quick else 1.0, ("eager", "compiled"))
    else:
        yield not_run("torch.compile")


def _case(context: Context, case: tuple[str, str, int, str], width: float, settings: tuple[str, ...]) -> Row:
    model, mode, batch, p = case
    row: Row = dict(model=model, mode=mode, batch=batch, precision=p)
    if context.left < ENOUGH:
        return row | dict(ran=False, note="no time was left")
    try:
        return row | compared(context, make_task(model, batch, width), mode, p, settings)
    except Exception as error:
        return row | dict(ok=False, note=f"{type(error).__name__}: {error}")
    finally:
        free(context)


def free(context: Context) -> None:
    """What a case held is for the next one: the two frameworks keep memory from each other, and cycles keep theirs."""
    gc.collect()
    if context.on_gpu:
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


def compared(context: Context, task: peers.Task, mode: str, p: str, settings: tuple[str, ...]) -> Row:
    """Ours and PyTorch's: first whether they compute the same, then, on a GPU, how long each takes."""
    with nc.using(precision=p, graph="on"):
        steps: dict[str, Step] = {"ours": ours(task, mode, context.device)}
        if not peers.missing("pytorch"):
            where = "cuda" if context.on_gpu else "cpu"
            steps |= {setting: torchs(task, mode, p, setting, where) for setting in settings}
        row: Row = {}
        if "eager" in steps:
            mine, theirs = (numbers(steps[name]()) for name in ("ours", "eager"))
            apart = float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
            row |= dict(apart=apart, ok=bool(apart <= (2e-2 if p == "fp16" else 2e-3)))
        else:
            row |= dict(ok=bool(np.isfinite(numbers(steps["ours"]())).all()), note="without PyTorch")
        if context.on_gpu:
            times = turns(steps, context.device)
            row |= {f"{name}_ms": ms for name, ms in times.items()}
            row |= {f"of_{name}": times["ours"] / ms for name, ms in times.items() if name != "ours"}
        return row


def numbers(result: Any) -> np.ndarray:
    """A loss or logits of either framework, on the CPU."""
    if isinstance(result, nc.Tensor):
        return np.asarray(result.numpy(), np.float64)
    if hasattr(result, "detach"):
        result = result.detach().float().cpu().numpy()
    return np.asarray(result, np.float64)


# ------------------------------------------------------------------ against the CPU


@section(seconds=45)
def mnist(context: Context) -> Iterator[Row]:
    """CPU against GPU: mnist_cpu_gpu.py in its short form"""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "mnist_cpu_gpu.py"), "--quick", "--out", folder]
        # On a machine that never ran Numba's rungs these are compiled first, which takes a minute.
        both = ("cpu", "cuda") if context.left > ENOUGH_FOR_CPU else ("cuda",)
        command += ["--limit", f"{max(1.0, context.left / 3):.0f}" if context.on_gpu else "600"]
        command += ["--device", *(both if context.on_gpu else ("emulated",))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1) or not Path(folder, "result.json").exists():
            yield dict(ok=False, note=(done.stderr.strip().splitlines() or ["no word"])[-1])
            return
        told = json.loads(Path(folder, "result.json").read_text())
    for name, row in told["rows"].items():
        if "error" in row:
            yield dict(rung=name, ok=False, note=row["error"])
            continue
        timed = {} if row["rung"]["small"] else dict(seconds=row["seconds"], accuracy=row["accuracy"])
        yield dict(rung=name, steps=row["steps"], worst_loss=row["worst_loss"], ok=True) | timed
    for name, why in told["skipped"].items():
        yield dict(rung=name, ran=False, note=why)
