"""A captured function computes what the function does, from the same memory at each call, or is refused."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from numba import njit, vectorize
from numba.core.registry import CPUDispatcher

import nanocnn as nc
from nanocnn import functional as F
from nanocnn import nn
from nanocnn.capture import CaptureError
from nanocnn.kernels import dispatch, memory
from nanocnn.models import alexnet_cifar, resnet18
from nanocnn.tensor import Tensor

RNG = np.random.default_rng(0)


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def frozen(make):
    nc.manual_seed(0)
    return nn.freeze(make(width=0.25).eval())


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("make", [alexnet_cifar, resnet18])
def test_a_frozen_network(make, batch):
    model = frozen(make)
    predict = nc.capture(model, random(batch, 32, 32, 3))
    for _ in range(3):
        x = random(batch, 32, 32, 3)
        y = predict(x)
        assert isinstance(y, Tensor)
        np.testing.assert_array_equal(y.data, model(Tensor(x)).data)
    kept = y.data.copy()
    predict(random(batch, 32, 32, 3))
    np.testing.assert_array_equal(y.data, kept)  # a result is the caller's, and no later call writes to it
    assert f"{len(predict.calls)} calls" in str(predict)
    assert "conv2d: few_channels" in str(predict)


@pytest.mark.parametrize("choices", [{"pool": "off"}, {"fuse": "off"}, {"conv2d": "upto:reference"}, {}], ids=str)
def test_the_choices_that_were_in_force_are_captured(choices):
    """References too: they are NumPy's, and each is one call."""
    model, x = frozen(resnet18), random(4, 32, 32, 3)
    with nc.using(**choices):
        predict = nc.capture(model, x)
        expected = model(Tensor(-x)).data
    np.testing.assert_array_equal(predict(-x).data, expected)


def test_weights_are_read_where_they_lie():
    nc.manual_seed(0)
    model = nn.Linear(200, 300)
    x = random(40, 200)
    with nc.no_grad():
        apply = nc.capture(model, x)
        model.weight.data[...] *= 2
        np.testing.assert_array_equal(apply(x).data, model(Tensor(x)).data)


def test_what_lies_between_the_calls_shares_memory():
    model, x = frozen(resnet18), random(64, 32, 32, 3)
    predict = nc.capture(model, x)
    outputs = [max(a.nbytes for a in call.args if isinstance(a, np.ndarray)) for call in predict.calls]
    assert 0 < predict.bytes < sum(outputs) / 4
    before = memory.held()["in_use"]
    predict(x)
    assert memory.held()["in_use"] == before


def test_several_inputs_and_outputs():
    def function(x, y):
        return F.relu(x), F.sigmoid(y), F.relu(y)

    x, y = random(3, 5), random(400, 500)
    captured = nc.capture(function, x, Tensor(y))
    for a, b in ((x, y), (-x, 2 * y)):
        for found, expected in zip(captured(a, b), function(Tensor(a), Tensor(b)), strict=True):
            np.testing.assert_array_equal(found.data, expected.data)


def test_threads_wait_for_each_other():
    model = frozen(alexnet_cifar)
    inputs = [random(2, 32, 32, 3) for _ in range(4)]
    predict = nc.capture(model, inputs[0])
    expected, wrong = [predict(x).data for x in inputs], []

    def work(i):
        for _ in range(20):
            if not np.array_equal(predict(inputs[i]).data, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ------------------------------------------------------------------ what cannot be captured


@njit
def add_one(x, y):
    for i in range(x.size):
        y[i] = x[i] + 1


@njit
def largest(x):
    return x.max()


def doubled(x):
    return Tensor(2 * x.data)


def chosen(x):
    """A branch on a value, which two examples in a row do not share."""
    return F.relu(x) if x.data.reshape(-1)[0] > 0.5 else F.sigmoid(x)


def scaled(x):
    """A number that leaves a kernel, and comes back by way of Python."""
    return F.relu(Tensor(x.data * largest(x.data.reshape(-1))))


def drawn(x):
    """Random numbers of somebody else."""
    return F.relu(x * Tensor(RNG.random(x.shape, np.float32)))


def clipped(x):
    """A branch on a number that a primitive returns."""
    buckets = nc.optim.SGD([Tensor(x.data, requires_grad=True)], lr=0.1).buckets
    nc.optim.clip_grad_norm_(buckets, 1.0)
    return F.relu(x)


def looked_at(x):
    return F.relu(x * x.numpy().max())


def guessed(x):
    """The class, by NumPy: of few values it is often the same."""
    return Tensor(F.relu(x).data.argmax(axis=-1))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (doubled, "made by no kernel and no op"),
        (chosen, "do not compute what the function does"),
        (scaled, "largest returned a number"),
        (drawn, "do not compute what the function does"),
        (clipped, "sum_of_squares returned a number"),
        (looked_at, "looks at the values of a tensor"),
        (guessed, "made by no kernel and no op"),
    ],
)
def test_what_depends_on_values_outside_of_kernels_is_refused(function, why):
    x = 100 * np.arange(2500, dtype=np.float32).reshape(50, 50)
    with pytest.raises(CaptureError, match=why):
        nc.capture(function, x)
    assert dispatch.recorder is None


def test_a_compiled_function_of_somebody_else_is_captured_too():
    def function(x):
        y = np.empty_like(x.data)
        add_one(x.data, y)
        return F.relu(Tensor(y))

    x = random(20)
    captured = nc.capture(function, x)
    np.testing.assert_array_equal(captured(-x).data, np.maximum(-x + 1, 0))
    assert captured.calls[0].function is add_one


@vectorize
def _cubed(x):
    return x * x * x


def test_a_ufunc_of_numbas_is_one_call_with_its_variant():
    from nanocnn.kernels.dispatch import Primitive, primitives

    try:

        @Primitive
        def capture_cubed(x):
            """x^3"""
            return x**3

        @capture_cubed.variant("numba")
        def cubed(x):
            """one pass"""
            return _cubed(x)

        x = random(300, 300)
        captured = nc.capture(lambda x: F.relu(Tensor(capture_cubed(x.data))) + Tensor(capture_cubed(x.data)), x)
        np.testing.assert_allclose(captured(-x).data, np.maximum((-x) ** 3, 0) + (-x) ** 3, rtol=1e-5, atol=1e-6)
    finally:
        primitives.pop("capture_cubed", None)


def test_another_shape_or_dtype_is_refused_and_said():
    captured = nc.capture(F.relu, random(4, 5))
    for x in (random(4, 6), random(4, 5).astype(np.float64), [1, 2]):
        with pytest.raises(CaptureError, match=r"captured for float32\[4, 5\], called with .*: capture the"):
            captured(x)
    with pytest.raises(CaptureError, match="called with float32"):
        captured(random(4, 5), random(4, 5))


def test_a_function_must_return_tensors():
    with pytest.raises(CaptureError, match="returns a tensor or a tuple of tensors, not ndarray"):
        nc.capture(lambda x: x.data, random(3))


def test_not_inside_a_profile():
    with nc.profile(), pytest.raises(CaptureError, match="capture before it begins"):
        nc.capture(F.relu, random(3))


def test_an_error_in_the_function_leaves_everything_as_it_was():
    def function(x):
        F.relu(x)
        if dispatch.recorder is not None:
            raise ArithmeticError("no")
        return x

    plain = CPUDispatcher.__call__
    with pytest.raises(ArithmeticError):
        nc.capture(function, random(3))
    assert dispatch.recorder is None
    assert CPUDispatcher.__call__ is plain
    assert "__call__" not in vars(CPUDispatcher)


def test_other_threads_are_not_recorded():
    stop, x = threading.Event(), random(100)

    def work():
        while not stop.is_set():
            F.sigmoid(Tensor(x))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        captured = nc.capture(F.relu, random(30, 30))
    finally:
        stop.set()
        thread.join()
    assert [call.name for call in captured.calls] == ["relu"]


# ------------------------------------------------------------------ with the backward pass


def training(make, batch=16, **choices):
    """A function that runs forward and backward, its optimiser, and a batch."""
    nc.manual_seed(0)
    model = make(width=0.25)
    optimizer = nc.optim.SGD(model.named_parameters(), lr=0.05, momentum=0.9)

    def loss_of(images, labels):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    return loss_of, optimizer, model


def batch_of(size=16):
    return random(size, 32, 32, 3), RNG.integers(0, 10, size)


@pytest.mark.parametrize("choices", [{}, {"fuse": "off"}, {"conv2d": "reference"}, {"pool": "off"}], ids=str)
@pytest.mark.parametrize("make", [alexnet_cifar, resnet18])
def test_training_goes_the_same_way(make, choices):
    batches = [batch_of() for _ in range(4)]
    losses, states = [], []
    with nc.using(**choices):
        for captures in (False, True):
            step, optimizer, model = training(make)
            if captures:
                before = {name: b.data.copy() for name, b in model.named_buffers()}
                step = nc.capture(step, *batch_of())
                for name, b in model.named_buffers():
                    np.testing.assert_array_equal(b.data, before[name])
            for images, labels in batches:
                losses.append(step(Tensor(images), Tensor(labels)).item())
                optimizer.step()
                optimizer.zero_grad()  # the gradients of the next call arrive all the same
            states.append({name: p.data.copy() for name, p in [*model.named_parameters(), *model.named_buffers()]})
    assert losses[:4] == losses[4:]
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name], err_msg=name)


def test_dropout_draws_a_new_mask_at_each_call():
    def function(x):
        return F.dropout(x, 0.5)

    x = np.ones((40, 50), np.float32)
    nc.manual_seed(5)
    dropped = nc.capture(function, x)
    found = [dropped(x).data for _ in range(3)]
    nc.manual_seed(5)
    for y in found:
        np.testing.assert_array_equal(y, function(Tensor(x)).data)
    assert (found[0] != found[1]).any()
    for epoch in (0, 7):  # and those of the samples of this batch
        samples = RNG.permutation(1000)[:40]
        with nc.random.keyed(epoch, samples):
            y = dropped(x).data
        with nc.random.keyed(epoch, samples):
            np.testing.assert_array_equal(y, function(Tensor(x)).data)


def adding():
    """A function that forgets no gradient, with its model and optimiser, and an input."""
    nc.manual_seed(0)
    model = nn.Linear(20, 10)
    optimizer = nc.optim.SGD(model.named_parameters(), lr=0.1)

    def add_gradients(x):
        y = (model(x) * model(x)).sum()
        y.backward()
        return y

    return model, optimizer, add_gradients, random(30, 20)


def test_gradients_that_are_not_forgotten_add_up():
    model, optimizer, add_gradients, x = adding()
    add = nc.capture(add_gradients, x)
    optimizer.zero_grad()
    add_gradients(Tensor(x))
    once = model.weight.grad.copy()
    add(x)
    np.testing.assert_allclose(model.weight.grad, 2 * once, rtol=1e-6)


def test_a_whole_step_is_captured_and_the_weights_put_back():
    images, labels = batch_of()
    losses = []
    for captures in (False, True):
        step, optimizer, model = training(alexnet_cifar)

        def whole(images, labels, step=step, optimizer=optimizer):
            loss = step(images, labels)
            optimizer.step()
            return loss

        if captures:
            before = {name: p.data.copy() for name, p in model.named_parameters()}
            whole = nc.capture(whole, images, labels)
            for name, p in model.named_parameters():
                np.testing.assert_array_equal(p.data, before[name])
        losses += [whole(Tensor(images), Tensor(labels)).item() for _ in range(3)]
    assert losses[:3] == losses[3:]


@pytest.mark.parametrize("w", [random(30, 20), np.zeros((30, 20), np.float32)])
def test_a_copy_of_the_weights_is_noticed(w):
    kept = w.copy()

    def function(x):
        return F.relu(x @ Tensor(w * 2)) + x @ Tensor(w)

    with pytest.raises(CaptureError, match="do not compute what the function does"):
        nc.capture(function, random(40, 30))
    np.testing.assert_array_equal(w, kept)


def gate(x):
    """A NumPy op whose backward reads what it has saved, from memory that others would like to have."""
    h = F.relu(x)
    return h * F.sigmoid(h) + x


def softened(x):
    mask = np.where(np.arange(x.shape[1]) < 3, 0, np.finfo(np.float32).min).astype(np.float32)
    return F.softmax(x + Tensor(mask))


@pytest.mark.parametrize("rows", [7, 300])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2.0,
        lambda x: 1 - F.relu(x),
        lambda x: x.mean(),
        lambda x: (x * x).sum(axis=1).mean(),
        lambda x: F.cross_entropy(x, np.arange(len(x)) % 5) * 0.5,
        lambda x: F.scaled_dot_product_attention(*[x.reshape(1, *x.shape)] * 3),
        lambda x: F.batch_norm(x, np.zeros(x.shape[1], np.float32), np.ones(x.shape[1], np.float32)),
        gate,
        softened,
    ],
)
def test_small_functions_and_their_gradients(function, rows):
    """Numbers beside tensors, 0-d results, gradients that are summed because an operand was broadcast."""
    w, scale = Tensor(random(20, 260), requires_grad=True), Tensor(random(260), requires_grad=True)

    def with_gradients(x):
        w.zero_grad()
        scale.zero_grad()
        y = function((x @ w) * scale)
        (y * y).mean().backward()
        return y

    x = random(rows, 20)
    captured = nc.capture(with_gradients, x)
    for values in (random(rows, 20), x):
        found = captured(values).data, w.grad.copy(), scale.grad.copy()
        expected = with_gradients(Tensor(values)).data, w.grad, scale.grad
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_gradients_may_be_forgotten_outside():
    model, optimizer, add_gradients, x = adding()
    add = nc.capture(add_gradients, x)
    for _ in range(3):
        optimizer.zero_grad()
        add(x)
        found = model.weight.grad.copy()
        optimizer.zero_grad()
        add_gradients(Tensor(x))
        np.testing.assert_array_equal(found, model.weight.grad)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_labels_of_any_integers(dtype):
    model = nn.Linear(6, 10)

    def loss(x, y):
        return F.cross_entropy(model(x), y)

    x, y = random(8, 6), np.arange(8).astype(dtype)
    captured = nc.capture(loss, x, y)
    assert captured(x, y + dtype(1)).item() == loss(Tensor(x), Tensor(y + dtype(1))).item()
    with pytest.raises(CaptureError, match=r"is 0 everywhere: .*Give an example with several"):
        nc.capture(loss, x, np.zeros(8, dtype))


def test_arrays_that_overlap_are_put_back():
    from nanocnn.kernels.update import scale_

    w = np.ones(10, np.float32)

    def function(x):
        scale_(w, 0.5)
        scale_(w[:5], 0.5)
        return F.relu(x)

    nc.capture(function, random(3))
    np.testing.assert_array_equal(w, 1)


def test_the_choices_of_the_recording_are_those_of_the_calls():
    conv, x = nn.Conv2d(8, 8, 3, padding=1), random(2, 9, 9, 8)
    with nc.using("reference"), nc.no_grad():
        captured = nc.capture(conv, x)
        expected = conv(Tensor(-x)).data
    np.testing.assert_array_equal(captured(-x).data, expected)


def test_another_number_of_samples_is_noticed():
    x = random(40, 3)
    with nc.random.keyed(0, np.arange(40)):
        captured = nc.capture(lambda x: F.dropout(x), x)
    with nc.random.keyed(0, [7]), pytest.raises(CaptureError, match=r"captured with a result of shape \(40,\)"):
        captured(x)
