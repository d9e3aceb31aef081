"""What a device does, recorded and launched: kernels/cuda/graph.py, kernels/emulated_array.py, nc.capture there."""

from __future__ import annotations

import contextlib
import sys
import types

import numpy as np
import pytest
from launch import NEEDS_GXX

import nanocnn as nc
from nanocnn import functional as F
from nanocnn.data import Batch
from nanocnn.kernels.cuda.graph import Graph, HostError
from nanocnn.kernels.dispatch import DeviceError, device_of, to_device, xp_of
from nanocnn.models import alexnet_cifar
from nanocnn.parallel import Alone, GradientAverager
from nanocnn.precision import LossScaler, NonFiniteGradient
from nanocnn.tape import CaptureError
from nanocnn.train import NonFiniteLoss, train_step

pytestmark = NEEDS_GXX


def there(*values, dtype=np.float32):
    found = [to_device(np.asarray(v, dtype), "emulated") for v in values]
    return found[0] if len(found) == 1 else found


def recorded(function):
    graph = Graph("emulated")
    with graph.recording():
        result = function()
    return graph, result


def test_nothing_is_done_before_the_launch():
    x, total = there([[1, -2], [3, 4]], [0, 0])

    def work():
        y = F.relu(nc.Tensor(x)).data  # a kernel
        total[...] = (2 * y).sum(axis=0)  # and NumPy's work, which on a GPU is CuPy's
        return y

    graph, y = recorded(work)
    assert (total == 0).all()
    assert len(graph) == 4
    graph.launch()
    np.testing.assert_array_equal(y, [[1, 0], [3, 4]])
    np.testing.assert_array_equal(total, [8, 8])
    x[...] = there([[-1, 5], [0, 1]])
    graph.launch()
    np.testing.assert_array_equal(total, [0, 12])


CHANGES = {
    "an operator": lambda x, xp: x.__iadd__(1),
    "an assignment": lambda x, xp: x.__setitem__((slice(1, None), slice(None)), 5),
    "fill": lambda x, xp: x.fill(3),
    "copyto": lambda x, xp: xp.copyto(x, 2 * x),
    "out": lambda x, xp: xp.add(x, x, out=x),
    "another out": lambda x, xp: xp.clip(x, 0, 1, out=x),
    "at": lambda x, xp: np.add.at(x, 0, 1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_there_is_changed_by_the_launch_alone(what):
    start = np.array([[1, -2], [3, 4]], np.float32)
    x, plain = there(start), start.copy()
    graph, _ = recorded(lambda: CHANGES[what](x, xp_of(x)))
    np.testing.assert_array_equal(x, start)
    graph.launch()
    CHANGES[what](plain, np)
    np.testing.assert_array_equal(x, plain)


MAKES = {
    "sum": lambda x, xp: x.sum(),
    "mean": lambda x, xp: x.mean(axis=1),
    "max": lambda x, xp: x.max(axis=0),
    "argmax": lambda x, xp: x.argmax(axis=1),
    "astype": lambda x, xp: x.astype(np.float16),
    "copy": lambda x, xp: x.T.copy(order="C"),
    "a reshape that copies": lambda x, xp: x.T.reshape(-1),
    "a reshape that does not": lambda x, xp: x.reshape(-1) * 1,
    "rows by numbers": lambda x, xp: x[xp.arange(2)[::-1]],
    "where": lambda x, xp: xp.where(x > 0, x, 0),
    "zeros": lambda x, xp: xp.zeros_like(x) + xp.full((), 2.0, np.float32),
    "pad": lambda x, xp: xp.pad(x, 1),
    "divmod": lambda x, xp: xp.divmod(x, 2)[1],
    "a product": lambda x, xp: (nc.Tensor(x) @ nc.Tensor(x.T)).data,
    "one matrix and many": lambda x, xp: (nc.Tensor(x) @ nc.Tensor(xp.stack([x, x.T]))).data,
    "one number": lambda x, xp: x[1, 0] * 2,
    "numbers of a row": lambda x, xp: sum(x[0]),
    "trace": lambda x, xp: x.trace(),
    "argsort": lambda x, xp: x.argsort(axis=1),
    "round": lambda x, xp: x.round(),
    "split": lambda x, xp: xp.split(x * 1, 2)[1],
    "where of a ufunc": lambda x, xp: np.add(x, 1, where=x > 0, out=xp.zeros_like(x)),
}


@pytest.mark.parametrize("what", MAKES)
def test_what_is_made_is_made_anew_by_each_launch(what):
    x = there([[0, 0], [0, 0]])
    graph, y = recorded(lambda: MAKES[what](x, xp_of(x)))
    assert device_of(y) == "emulated"
    for numbers in ([[1, -2], [3, 4]], [[5, 6], [-7, 8]]):
        x[...] = there(numbers)
        graph.launch()
        np.testing.assert_array_equal(y, np.asarray(MAKES[what](x, xp_of(x))))


@pytest.mark.parametrize(
    "look",
    [float, int, bool, complex, lambda x: x.item(), lambda x: x.tolist(), lambda x: x.get(), lambda x: [1, 2][x]],
    ids=["float", "int", "bool", "complex", "item", "tolist", "get", "index"],
)
def test_the_host_cannot_look(look):
    x = there(1, dtype=np.int64)
    with pytest.raises(HostError, match=r"looks at an array \(int64\[\]\) while .* Do that outside of the recording"):
        recorded(lambda: look(x))
    assert look(x) in (1, True, 2)  # afterwards it can again


@pytest.mark.parametrize(
    "send",
    [
        lambda x: x + np.ones(2),
        lambda x: x.__setitem__(0, np.ones(2)),
        lambda x: to_device(np.ones(2), "emulated"),
        lambda x: xp_of(x).asarray([1, 2]),
        lambda x: xp_of(x).asarray(1.5),
        lambda x: x[np.array([1, 0])],
        lambda x: xp_of(x).concatenate([x, np.ones((1, 2))]),
        lambda x: xp_of(x).take(x, np.array([1, 0])),
    ],
    ids=["operator", "assignment", "to_device", "list", "number", "index", "in a list", "take"],
)
def test_the_host_cannot_send(send):
    x = there([[1, 2], [3, 4]])
    with pytest.raises(HostError, match=r"to the device while what that does is recorded"):
        recorded(lambda: send(x))


@pytest.mark.parametrize(
    "multiply",
    [
        lambda x, xp: x @ x,
        lambda x, xp: xp.matmul(x, x),
        lambda x, xp: x.dot(x),
        lambda x, xp: xp.tensordot(x, x, axes=1),
        lambda x, xp: xp.einsum("ij,jk", x, x),
        lambda x, xp: xp.linalg.norm(x, 2),
    ],
    ids=["@", "matmul", "dot", "tensordot", "einsum", "norm"],
)
def test_a_product_by_cupys_handle_cannot_be_recorded(multiply):
    x = there([[1, 2], [3, 4]])
    with pytest.raises(HostError, match=r"cannot be recorded\. The primitive `matmul`"):
        recorded(lambda: multiply(x, xp_of(x)))
    assert device_of(multiply(x, xp_of(x))) == "emulated"


def test_a_graph_says_what_it_cannot():
    with pytest.raises(DeviceError, match="a graph is of the device 'cuda' or 'emulated', got 'cpu'"):
        Graph("cpu")
    graph, _ = recorded(lambda: None)
    with pytest.raises(RuntimeError, match="recorded once"), graph.recording():
        pass
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        Graph("emulated").launch()

    def nested():
        with Graph("emulated").recording():
            pass

    with pytest.raises(RuntimeError, match="being recorded already"):
        recorded(nested)


# ------------------------------------------------------------------ captured functions


def batches(count=4, images=4):
    rng = np.random.default_rng(0)
    for step in range(count):
        x, y = rng.standard_normal((images, 32, 32, 3)).astype(np.float32), rng.integers(0, 10, images)
        yield Batch(x, y, np.arange(images) + images * step, images, 0, step)


class Training:
    """A small network with batch norm and dropout on the emulator."""

    def __init__(self, graph, optimizer="SGD", precision="fp32", **scaler):
        nc.manual_seed(0)
        self.choices = dict(graph=graph, precision=precision)
        self.model = alexnet_cifar(width=0.1, batch_norm=True).to("emulated")
        more = dict(momentum=0.9) if optimizer == "SGD" else {}
        self.optimizer = getattr(nc.optim, optimizer)(self.model.named_parameters(), 0.01, weight_decay=0.01, **more)
        self.averager = GradientAverager(self.optimizer.buckets, Alone())
        self.scaler = LossScaler(**scaler) if scaler else LossScaler(enabled=False)

    def step(self, batch, lr=0.01):
        with nc.using(**self.choices):
            arguments = self.model, batch, self.optimizer, lr, self.averager
            return train_step(*arguments, label_smoothing=0.1, scaler=self.scaler)

    @property
    def state(self):
        found = {name: np.array(x) for name, x in self.model.state_dict().items()}
        for kind, arrays in self.optimizer.state_dict()["state"].items():
            found |= {f"{kind} of {name}": np.array(x) for name, x in arrays.items()}
        return found


def assert_alike(a, b):
    assert a.optimizer.steps == b.optimizer.steps
    assert a.scaler.state_dict() == b.scaler.state_dict()
    state, other = a.state, b.state
    for name in state:
        np.testing.assert_array_equal(state[name], other[name], err_msg=name)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "LARS"])
def test_a_recorded_step_goes_the_same_way(optimizer):
    """Bit by bit, while images, labels, masks, weights, statistics and the learning rate change. LARS asks the host for
    norms: of its step forward and backward are recorded."""
    eager, recorded = Training("off", optimizer), Training("on", optimizer)
    for i, batch in enumerate(batches()):
        seen, other = (training.step(batch, lr=0.01 / (i + 1)) for training in (eager, recorded))
        assert seen == other
    assert_alike(eager, recorded)


def test_a_recorded_step_goes_on_from_a_checkpoint():
    """What the host was told of steps and scale reaches the device."""
    eager, recorded = (Training(graph, "Adam", "fp16", scale=2.0**8, interval=2) for graph in ("off", "on"))
    first, *rest = batches()
    for training in (eager, recorded):
        training.step(first)
        model, optimizer, scaler = training.state, training.optimizer.state_dict(), training.scaler.state_dict()
        optimizer = {"step": 7, "state": {k: {n: x * 1 for n, x in v.items()} for k, v in optimizer["state"].items()}}
        training.step(rest[0])
        training.model.load_state_dict({name: model[name] for name in training.model.state_dict()})
        training.optimizer.load_state_dict(optimizer)
        training.scaler.load_state_dict(scaler)
        training.step(rest[0])
        training.step(rest[1])
    assert recorded.optimizer.steps == 9
    assert recorded.scaler.scale == 2.0**9
    assert_alike(eager, recorded)


def test_an_overflow_skips_a_recorded_step():
    """The scale backs off on the device, as it does on the host, until gradients fit."""
    eager, recorded = (Training(graph, precision="fp16", scale=2.0**30, backoff=2.0**-7) for graph in ("off", "on"))
    for batch in batches():
        for training in (eager, recorded):
            training.step(batch)
    assert 0 < recorded.scaler.skipped < 4
    assert_alike(eager, recorded)


def test_a_recorded_step_at_the_smallest_scale():
    training = Training("on", precision="fp16", scale=2.0**30, dynamic=False)
    before = training.state
    with pytest.raises(
        NonFiniteGradient, match=r"at 1.07374e\+09, the static loss scale in epoch 1, step 1\. The first"
    ):
        training.step(next(batches()))
    after = training.state
    for name, _ in training.model.named_parameters():
        np.testing.assert_array_equal(before[name], after[name])


def test_a_loss_that_is_nan_changes_no_weight():
    training = Training("on")
    batch, other = batches(2)
    training.step(batch)
    before = training.state
    other.x[0, 0, 0, 0] = np.nan
    with pytest.raises(NonFiniteLoss, match="the loss is nan in epoch 1, step 2"):
        training.step(other)
    after = training.state
    for name, _ in training.model.named_parameters():
        np.testing.assert_array_equal(before[name], after[name])


def test_a_captured_network_predicts():
    model = alexnet_cifar(width=0.1).to("emulated").eval()
    x, other = (batch.x for batch in batches(2))
    with nc.no_grad():
        predict = nc.capture(model, to_device(x, "emulated"))
        want = model(nc.Tensor(other).to("emulated")).numpy()
    np.testing.assert_array_equal(predict(other).numpy(), want)  # from the host
    np.testing.assert_array_equal(predict(nc.Tensor(other).to("emulated")).numpy(), want)  # and from the device
    assert "a graph of the device 'emulated' for float32[4, 32, 32, 3]" in str(predict)
    with pytest.raises(CaptureError, match=r"captured for float32\[4, 32, 32, 3\], called with float32\[2"):
        predict(other[:2])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3)])
def test_adaptive_pooling_is_recorded(dtype, tolerance):
    """Windows of unequal sizes, forward and backward; of halves every sum is one of float32, and rounded once."""
    x = np.random.default_rng(0).standard_normal((2, 23, 7, 3)).astype(dtype)
    weight = np.random.default_rng(1).standard_normal((2, 4, 5, 3))

    def pooled(x, weight):
        leaf = nc.Tensor(x.data, requires_grad=True)
        y = F.adaptive_avg_pool2d(leaf, (4, 5))
        y.backward(weight)
        return y, nc.Tensor(leaf.grad)

    found = nc.capture(pooled, there(0 * x, 0 * weight, dtype=dtype)[0], there(weight, dtype=dtype))(
        x, weight.astype(dtype)
    )
    exact = pooled(nc.Tensor(x.astype(np.float64)), nc.Tensor(weight.astype(dtype).astype(np.float64)))
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.numpy(), b.data, rtol=tolerance, atol=tolerance / 10)
    ones = F.adaptive_avg_pool2d(nc.Tensor(there(np.ones((1, 7, 7, 1)), dtype=dtype)), (3, 3))
    assert (ones.numpy() == 1).all()


def test_masks_outside_keyed_are_new_each_time():
    ones = there(np.ones((4, 100)))
    drop = nc.capture(lambda x: F.dropout(x, 0.5), ones)
    first, second = drop(ones).numpy(), drop(ones).numpy()
    assert set(np.unique(first)) == {0, 2}
    assert (first != second).any()


def test_what_python_knows_is_not_recorded_without_notice():
    calls = []

    def counts(x):
        calls.append(x)
        return x * len(calls)

    with pytest.raises(CaptureError, match=r"does not compute what the function does: .* 3 numbers differ"):
        nc.capture(counts, there([1, 2, 3]))


class GPU:
    """Stands in for what of CuPy a graph asks: it says what it was asked, and ends no recording that has failed."""

    def __init__(self, monkeypatch):
        self.said, self.failed = [], False
        self.get_current_stream = lambda: self.of("current")
        self.Stream = lambda non_blocking: self.of("own")
        self.MemoryPool = lambda: types.SimpleNamespace(malloc=None)
        self.using_allocator = lambda malloc: contextlib.nullcontext()
        cupy = types.ModuleType("cupy")
        cupy.cuda = self
        monkeypatch.setitem(sys.modules, "cupy", cupy)

    def of(self, name):
        gpu = self

        class Stream(contextlib.nullcontext):
            def record(self):
                return f"end of {name}"

            def wait_event(self, event):
                gpu.said.append(f"{name} waits for {event}")

            def begin_capture(self):
                gpu.said.append("begin")

            def end_capture(self):
                gpu.said.append("end")
                if gpu.failed:
                    raise RuntimeError("cudaErrorStreamCaptureInvalidated")
                return types.SimpleNamespace(launch=lambda stream: gpu.said.append("launch"))

        return Stream()


def test_a_gpu_records_between_waits(monkeypatch):
    gpu = GPU(monkeypatch)
    graph = Graph("cuda")
    with graph.recording():
        gpu.said.append("work")
    graph.launch()
    waits = "own waits for end of current", "current waits for end of own"
    assert gpu.said == [waits[0], "begin", "work", "end", waits[1], "launch"]


@pytest.mark.parametrize("invalid", [False, True])
def test_of_a_recording_that_failed_on_a_gpu_nothing_is_left(monkeypatch, invalid):
    gpu = GPU(monkeypatch)
    graph, gpu.failed = Graph("cuda"), invalid
    with pytest.raises(ZeroDivisionError), graph.recording():
        _ = 1 / 0
    assert gpu.said[-1] == "end"
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        graph.launch()


@pytest.mark.parametrize(
    "words",
    [
        "cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing",
        "calling cuBLAS API during stream capture is currently unsupported",  # CuPy's own refusal
    ],
)
def test_what_a_gpu_refuses_to_record_is_the_same_error_as_on_the_emulator(monkeypatch, words):
    gpu = GPU(monkeypatch)
    graph, gpu.failed = Graph("cuda"), True
    with pytest.raises(HostError, match=f"while a graph was recorded: {words}"), graph.recording():
        raise RuntimeError(words)


SHAPED_BY_VALUES = {
    "a mask": lambda x, xp: x[x > 0],
    "nonzero": lambda x, xp: x.nonzero(),
    "flatnonzero": lambda x, xp: xp.flatnonzero(x),
    "unique": lambda x, xp: xp.unique(x),
}


@pytest.mark.parametrize("what", SHAPED_BY_VALUES)
def test_what_is_as_large_as_values_say_cannot_be_recorded(what):
    x = there([[1, 0], [2, 0]])
    with pytest.raises(HostError, match="depends on values, which are not there"):
        recorded(lambda: SHAPED_BY_VALUES[what](x, xp_of(x)))
    assert len(SHAPED_BY_VALUES[what](x, xp_of(x)))


def test_hyper_parameters_of_a_recorded_step_may_change():
    eager, recorded_ = Training("off"), Training("on")
    for i, batch in enumerate(batches()):
        for training in (eager, recorded_):
            for part in training.optimizer.parts:
                part.hyper |= dict(weight_decay=0.1 * i, momentum=0.9 / (i + 1))
            training.step(batch)
    assert_alike(eager, recorded_)


def test_a_function_that_fails_leaves_statistics_as_they_were():
    model = alexnet_cifar(width=0.1, batch_norm=True).to("emulated")
    before = {name: np.array(buffer.data) for name, buffer in model.named_buffers()}

    def fails(x):
        model(x)
        raise ArithmeticError("half way")

    with pytest.raises(ArithmeticError, match="half way"):
        nc.capture(fails, to_device(next(batches()).x, "emulated"))
    for name, buffer in model.named_buffers():
        np.testing.assert_array_equal(buffer.data, before[name], err_msg=name)
