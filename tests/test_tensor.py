"""The engine: order of the walk, unbroadcasting, accumulation, freeing, and what it refuses."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

import nanocnn as nc
from nanocnn.tensor import GraphError, Op, Tensor, no_grad, saved_bytes


def leaf(*shape, dtype=np.float64):
    return Tensor(np.random.default_rng(0).standard_normal(shape).astype(dtype), requires_grad=True)


def test_a_shared_input_receives_the_sum():
    x = leaf(3)
    (x * x + x).sum().backward()
    np.testing.assert_allclose(x.grad, 2 * x.data + 1)


def test_a_diamond_is_walked_once():
    calls = []

    class Twice(Op):
        def forward(self, a):
            return 2 * a

        def backward(self, gy):
            calls.append(gy)
            return 2 * gy

    x = leaf(2)
    y = Twice.apply(x)
    (y + y * 3.0).sum().backward()
    assert len(calls) == 1
    np.testing.assert_allclose(x.grad, 8.0)


def test_ten_thousand_ops_deep():
    x = leaf(1)
    y = x
    for _ in range(10_000):
        y = y + 1.0
    y.sum().backward()
    np.testing.assert_array_equal(x.grad, [1.0])


@pytest.mark.parametrize(
    ("a", "b"), [((3, 4), (4,)), ((3, 4), (1, 4)), ((2, 3, 4), (3, 1)), ((1,), (5, 1)), ((), (2, 2))]
)
def test_gradients_are_summed_over_broadcast_axes(a, b):
    x, y = leaf(*a), leaf(*b)
    (x * y).sum().backward()
    ones = np.ones(np.broadcast_shapes(a, b))
    assert x.grad.shape == a
    assert y.grad.shape == b
    np.testing.assert_allclose(x.grad.sum(), (ones * y.data).sum())
    np.testing.assert_allclose(y.grad.sum(), (ones * x.data).sum())


def test_backward_accumulates_and_zero_grad_forgets():
    x = leaf(3)
    x.sum().backward()
    memory = x.grad
    x.sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 2, 2])
    x.zero_grad()
    assert x.grad is None
    x.sum().backward()
    np.testing.assert_array_equal(x.grad, [1, 1, 1])
    assert x.grad is memory


def test_two_leaves_never_share_gradient_memory():
    x, y = leaf(2), leaf(2)
    (x + y).sum().backward()
    x.grad += 1
    np.testing.assert_array_equal(y.grad, [1, 1])


def test_on_grad_fires_once_when_the_gradient_is_complete():
    x = leaf(2)
    seen = []
    x.on_grad = lambda t: seen.append(t.grad.copy())
    (x * 2.0 + x * 3.0).sum().backward()
    assert len(seen) == 1
    np.testing.assert_allclose(seen[0], [5, 5])


def test_a_second_backward_through_a_freed_graph_is_an_error():
    x = leaf(2)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(GraphError, match="freed"):
        y.backward()


def test_a_graph_that_joins_a_freed_one_is_an_error():
    x = leaf(2)
    h = x * x
    h.sum().backward()
    with pytest.raises(GraphError, match=r"Mul.*freed"):
        (h * 2.0).sum().backward()


def test_no_graph_no_backward():
    x = leaf(2)
    with no_grad():
        y = (x * x).sum()
    assert not y.requires_grad
    with pytest.raises(GraphError, match="no graph"):
        y.backward()
    with pytest.raises(GraphError, match="no graph"):
        (x.detach() * 2.0).sum().backward()


def test_backward_of_many_elements_needs_a_gradient_of_their_shape():
    x = leaf(2)
    with pytest.raises(GraphError, match="shape"):
        (x * x).backward()
    with pytest.raises(GraphError, match=r"\(3,\)"):
        (x * x).backward(np.ones(3))


def test_second_derivatives_are_refused():
    with pytest.raises(GraphError, match="first derivatives only"):
        leaf(1).sum().backward(create_graph=True)


@pytest.mark.parametrize("wrong", [lambda gy: gy.astype(np.float32), lambda gy: np.ones(5), lambda gy: gy[:1, None]])
def test_a_gradient_of_the_wrong_shape_or_dtype_names_its_op(wrong):
    class Careless(Op):
        def forward(self, a):
            return a * 1

        def backward(self, gy):
            return wrong(gy)

    with pytest.raises(GraphError, match="Careless"):
        Careless.apply(leaf(2)).sum().backward()


def test_dtypes():
    assert Tensor([1.0, 2.0]).dtype == np.float32
    assert Tensor([1, 2]).dtype == np.int64
    assert Tensor(np.ones(2)).dtype == np.float64
    x = leaf(2, dtype=np.float32)
    y = (2.0 * x / 3 - 1) ** 2
    assert y.dtype == np.float32
    y.sum().backward()
    assert x.grad.dtype == np.float32


def test_only_floats_can_require_a_gradient():
    with pytest.raises(TypeError, match="int64"):
        Tensor([1, 2], requires_grad=True)


def test_an_input_that_needs_no_gradient_gets_none_computed():
    needs = []

    class Look(Op):
        def forward(self, a, b):
            needs.append(self.needs)
            return a + b

        def backward(self, gy):
            return gy, None

    Look.apply(leaf(2), Tensor(np.ones(2))).sum().backward()
    assert needs == [(True, False)]


def test_nothing_is_saved_without_a_graph():
    x = leaf(4, 4)
    with no_grad():
        assert saved_bytes(x * x) == 0
    assert saved_bytes(x * x) == x.data.nbytes  # saved twice, counted once


def test_activations_that_nobody_saved_are_freed_during_forward():
    x = leaf(8)
    h = x + 1.0  # Add saves nothing
    held = weakref.ref(h)
    y = (h + 1.0).sum()
    del h
    gc.collect()
    assert held() is None
    y.backward()
    np.testing.assert_array_equal(x.grad, np.ones(8))


def test_what_is_no_array_is_refused():
    with pytest.raises(TypeError, match="NumPy or CuPy"):
        Tensor(type("Odd", (), {"__array__": None})())


def test_public_names_are_attached():
    assert nc.Tensor is Tensor


def test_a_numpy_number_on_either_side_keeps_the_dtype_and_the_gradient():
    x = leaf(3, dtype=np.float32)
    for y in (np.float64(0.5) * x, x * np.float64(0.5), np.float32(0.5) * x, np.int64(1) * x / np.int64(2)):
        assert isinstance(y, Tensor)
        assert y.dtype == np.float32
        x.zero_grad()
        y.sum().backward()
        np.testing.assert_array_equal(x.grad, [0.5] * 3)
    assert (x ** np.float64(2)).dtype == np.float32


def test_an_array_on_the_left():
    a, x = np.array([[1.0, 2.0], [3.0, 4.0]]), leaf(2, 2)
    for y, expected in ((a * x, a * x.data), (a + x, a + x.data), (a - x, a - x.data), (a / x, a / x.data)):
        assert isinstance(y, Tensor)
        np.testing.assert_array_equal(y.data, expected)
    (a @ x).sum().backward()
    np.testing.assert_array_equal(x.grad, a.T @ np.ones((2, 2)))


def test_numpy_reads_the_values_and_applies_no_function_of_its_own():
    x = leaf(3)
    assert np.asarray(x) is x.data
    np.testing.assert_array_equal(np.array(x, np.float32), x.data.astype(np.float32))
    with pytest.raises(TypeError, match="ufunc"):
        np.exp(x)


def test_a_fraction_beside_integers_is_not_cut_off():
    np.testing.assert_array_equal((Tensor([1, 2]) * 0.5).data, [0.5, 1])
    assert (Tensor([1, 2]) * 2).dtype == np.int64
    assert Tensor([1, 2]).mean().item() == 1.5


# ------------------------------------------------------------------ gradients written where they belong


class Times(Op):
    """a * b, whose gradients are written in the memory that `out_for` offers."""

    def forward(self, a, b):
        self.save(a, b)
        self.offers = Times.offers
        return a * b

    def backward(self, gy):
        given = self.out_for(0), self.out_for(1)
        self.offers.append(tuple(memory is not None for memory in given))
        return tuple(
            np.multiply(gy, other, out=memory) for other, memory in zip(reversed(self.saved), given, strict=True)
        )


@pytest.fixture
def offers():
    Times.offers = []
    return Times.offers


def with_memory(*shape, memory=None):
    x = leaf(*shape)
    x.grad = np.full(shape, 7.0) if memory is None else memory
    x.zero_grad()
    return x


def test_an_op_writes_a_leaf_s_gradient_in_its_memory(offers):
    x, y = with_memory(3), leaf(3)
    memory = x.grad_buffer
    Times.apply(x, y).sum().backward()
    assert offers == [(True, False)]  # y has no memory yet
    assert x.grad is memory
    np.testing.assert_array_equal(x.grad, y.data)
    np.testing.assert_array_equal(y.grad, x.data)
    Times.apply(x, y).sum().backward()  # now something has arrived at both: it must be added
    assert offers[1] == (False, False)
    np.testing.assert_array_equal(x.grad, 2 * y.data)
    x.zero_grad()
    Times.apply(x, y).sum().backward()
    assert offers[2] == (True, False)
    np.testing.assert_array_equal(x.grad, y.data)
    np.testing.assert_array_equal(y.grad, 3 * x.data)


def test_a_leaf_that_several_ops_use_is_written_by_one_of_them(offers):
    x, y, z = with_memory(3), leaf(3), leaf(3)
    (Times.apply(x, y) + Times.apply(x, z)).sum().backward()
    assert sorted(offers) == [(False, False), (True, False)]
    np.testing.assert_allclose(x.grad, y.data + z.data)


def test_an_op_that_uses_a_leaf_twice_brings_memory_of_its_own(offers):
    x = with_memory(3)
    Times.apply(x, x).sum().backward()
    assert offers == [(False, False)]
    np.testing.assert_allclose(x.grad, 2 * x.data)


def test_memory_is_offered_for_a_leaf_alone_and_only_if_it_fits(offers):
    x = with_memory(3)
    Times.apply(x * 1.0, Tensor(np.ones(3))).sum().backward()
    narrow = with_memory(4, memory=np.zeros(8)[::2])
    Times.apply(narrow, np.ones(4)).sum().backward()
    wrong = with_memory(4)
    wrong.grad_buffer = np.zeros(4, np.float32)
    Times.apply(wrong, np.ones(4)).sum().backward()
    assert offers == [(False, False)] * 3
    for t in (x, narrow, wrong):
        np.testing.assert_array_equal(t.grad, np.ones(t.shape))


def test_an_op_that_does_not_return_what_it_wrote_has_it_copied():
    class Forgetful(Op):
        def forward(self, a):
            return a * 2

        def backward(self, gy):
            self.out_for(0)[...] = 99
            return gy * 2

    x = with_memory(3)
    Forgetful.apply(x).sum().backward()
    np.testing.assert_array_equal(x.grad, [2, 2, 2])


@pytest.mark.parametrize("fuse", ["on", "off"])
@pytest.mark.parametrize("tied", [False, True])
def test_linear_layers_in_buckets_have_the_same_gradients(fuse, tied):
    """Weights of their own, and one weight that both layers share; over one backward pass and over two."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((6, 6)) for _ in range(2)]
    x = Tensor(rng.standard_normal((5, 6)))

    def gradients(in_buckets, passes):
        w = [Tensor(v.copy(), requires_grad=True) for v in values]
        if in_buckets:
            nc.optim.SGD(w, 0.1)
        for _ in range(passes):
            h = nc.functional.linear(x, w[0])
            nc.functional.linear(h, w[0] if tied else w[1]).sum().backward()
        return [t.grad for t in w if t.grad is not None]

    with nc.using(fuse=fuse):
        for passes in (1, 2):
            pairs = list(zip(gradients(True, passes), gradients(False, passes), strict=True))
            assert len(pairs) == 2 - tied
            for ours, expected in pairs:
                np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_the_bytes_of_a_pooled_array_and_its_views_count_once():
    x = Tensor(nc.kernels.memory.empty((1 << 20,), np.float32), requires_grad=True)

    class Keep(Op):
        def forward(self, a):
            self.save(a, a.reshape(1024, 1024), a[:10])
            return a[:1]

    assert saved_bytes(Keep.apply(x)) == x.data.nbytes
