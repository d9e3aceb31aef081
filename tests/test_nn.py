"""Modules: names and their order, state, modes; each layer's derivative and PyTorch's values."""

from __future__ import annotations

import numpy as np
import pytest

import nanocnn as nc
from nanocnn import nn
from nanocnn.models import alexnet_cifar
from nanocnn.tensor import Tensor
from nanocnn.testing import check_gradients


class Net(nn.Module):
    def __init__(self):
        self.second = nn.Linear(3, 2)
        self.blocks = [nn.Conv2d(1, 2, 3), {"norm": nn.BatchNorm2d(2)}]
        self.tied = self.second

    def forward(self, x):
        return self.second(x)


def test_names_follow_the_order_of_assignment_and_shared_parameters_come_once():
    names = [name for name, _ in Net().named_parameters()]
    assert names == [
        "second.weight",
        "second.bias",
        "blocks.0.weight",
        "blocks.0.bias",
        "blocks.1.norm.weight",
        "blocks.1.norm.bias",
    ]
    assert [name for name, _ in Net().named_buffers()] == ["blocks.1.norm.running_mean", "blocks.1.norm.running_var"]
    assert [name for name, _ in Net().named_modules()] == ["", "second", "blocks.0", "blocks.1.norm"]


def test_a_misspelt_attribute_is_an_error():
    with pytest.raises(AttributeError, match="secnod"):
        Net().secnod  # noqa: B018


def test_state_dict_round_trip_keeps_the_memory_of_the_parameters():
    nc.manual_seed(1)
    a, b = Net(), Net()
    memory = [p.data for p in b.parameters()]
    a.blocks[1]["norm"].running_mean.data += 3
    b.load_state_dict(a.state_dict())
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)
    assert all(p.data is m for p, m in zip(b.parameters(), memory, strict=True))


def test_a_state_of_another_model_is_refused_whole():
    net = Net()
    before = {name: array.copy() for name, array in net.state_dict().items()}
    state = {name: array + 1 for name, array in before.items()}
    state["second.weight"] = np.ones((9, 9))
    state["extra"] = np.ones(2)
    del state["second.bias"]
    with pytest.raises(
        ValueError, match=r"(?s)missing: second.bias.*unexpected: extra.*second.weight: expected shape \(3, 2\)"
    ):
        net.load_state_dict(state)
    for name, array in net.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_modes_reach_every_module():
    net = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.BatchNorm2d(2)))
    assert not net.eval()[1][0].training
    assert net.train()[1][0].training


def test_equal_seeds_give_equal_weights():
    weights = []
    for _ in range(2):
        nc.manual_seed(5)
        weights.append(nn.Conv2d(3, 4, 3).weight.data)
    np.testing.assert_array_equal(*weights)
    assert not np.array_equal(weights[0], nn.Conv2d(3, 4, 3).weight.data)


def test_to_changes_the_dtype_of_parameters_and_floating_buffers():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).to(np.float64)
    assert {a.dtype for a in net.state_dict().values()} == {np.dtype(np.float64)}
    y = net(Tensor(np.ones((1, 4, 4, 1))))
    assert y.dtype == np.float64


def test_cuda_without_a_gpu_says_what_to_install():
    from nanocnn.kernels.dispatch import DeviceError

    try:
        import cupy

        if cupy.cuda.runtime.getDeviceCount():
            return  # this machine has one
    except Exception:  # no CuPy, or no driver
        pass
    with pytest.raises(DeviceError, match=r"cannot use the device 'cuda'.*To do: "):
        nn.Linear(2, 2).to("cuda")


LAYERS = {
    "Conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), 2, (1, 0), groups=2), (2, 6, 5, 4)),
    "Conv2d, dilated, no bias": (lambda: nn.Conv2d(2, 3, 3, dilation=2, bias=False), (1, 6, 6, 2)),
    "Linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 3)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (6, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(5), (2, 3, 5)),
    "MaxPool2d": (lambda: nn.MaxPool2d(2), (2, 5, 4, 3)),
    "AvgPool2d": (lambda: nn.AvgPool2d(3, 2, 1), (2, 5, 4, 3)),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((3, 2)), (2, 7, 5, 3)),
    "ReLU": (nn.ReLU, (3, 4)),
    "GELU": (nn.GELU, (3, 4)),
    "SiLU": (nn.SiLU, (3, 4)),
    "Sigmoid": (nn.Sigmoid, (3, 4)),
    "Flatten": (nn.Flatten, (2, 3, 4)),
    "Identity": (nn.Identity, (2, 3)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(6, 2), (2, 5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_inputs_and_parameters(name):
    make, shape = LAYERS[name]
    layer = make().to(np.float64)
    check_gradients(layer, np.random.default_rng(0).standard_normal(shape), parameters=layer.parameters())


def test_attention_layer_equals_pytorch():
    torch = pytest.importorskip("torch")
    ours = nn.MultiheadAttention(8, 2).to(np.float64)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    rng = np.random.default_rng(0)
    for p in ours.parameters():
        p.data[...] = rng.standard_normal(p.shape)
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.from_numpy(ours.in_proj_weight.data.T.copy()),
            "in_proj_bias": torch.from_numpy(ours.in_proj_bias.data),
            "out_proj.weight": torch.from_numpy(ours.out_proj.weight.data.T.copy()),
            "out_proj.bias": torch.from_numpy(ours.out_proj.bias.data),
        }
    )
    x = rng.standard_normal((3, 5, 8))
    t = torch.from_numpy(x)
    np.testing.assert_allclose(ours(Tensor(x)).data, theirs(t, t, t)[0].detach(), rtol=1e-10)


@pytest.mark.parametrize("size", [1, (1, 1), (3, 2), 5, (7, 4)])
def test_adaptive_pooling_equals_pytorch(size):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((2, 7, 5, 3))
    theirs = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x.transpose(0, 3, 1, 2)), size)
    np.testing.assert_allclose(nn.AdaptiveAvgPool2d(size)(Tensor(x)).data, theirs.permute(0, 2, 3, 1), rtol=1e-12)


def test_alexnet_is_the_network_of_the_paper_in_its_cifar_form():
    net = alexnet_cifar()
    assert sum(p.size for p in net.parameters()) == 23_272_266
    assert net(Tensor(np.zeros((2, 32, 32, 3), np.float32))).shape == (2, 10)


@pytest.mark.parametrize(
    "options", [dict(batch_norm=True), dict(stem_stride=1), dict(num_classes=7), dict(in_channels=1, image_size=28)]
)
def test_alexnet_options(options):
    net = alexnet_cifar(width=0.1, **options)
    size, channels = options.get("image_size", 32), options.get("in_channels", 3)
    y = net(Tensor(np.zeros((2, size, size, channels), np.float32)))
    assert y.shape == (2, options.get("num_classes", 10))
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_images_too_small_for_alexnet():
    with pytest.raises(ValueError, match="at least 16"):
        alexnet_cifar(image_size=8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Conv2d(3, 4, 3, groups=2), "groups=2"),
        (lambda: nn.Conv2d(3, 4, 0), "kernel_size=0"),
        (lambda: nn.MultiheadAttention(7, 2), "multiple"),
    ],
)
def test_impossible_layers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(0, 3), "in_features=0, expected an integer of at least 1"),
        (lambda: nn.Linear(3, True), "out_features=True"),
        (lambda: nn.Conv2d(0, 3, 3), "in_channels=0"),
        (lambda: nn.Conv2d(3, -1, 3), "out_channels=-1"),
        (lambda: nn.BatchNorm1d(0), "BatchNorm1d: num_features=0"),
        (lambda: nn.LayerNorm(0), "normalized_shape=0"),
        (lambda: nn.MultiheadAttention(6, 0), "num_heads=0"),
    ],
)
def test_layers_of_no_size_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool, object])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(3, 2, 3), (2, 4, 4, 3)),
        (lambda: nn.Linear(3, 2), (2, 3)),
        (lambda: nn.MultiheadAttention(4, 2), (2, 3, 4)),
        (lambda: nn.BatchNorm2d(3), (2, 4, 4, 3)),
        (lambda: nn.LayerNorm(3), (2, 3)),
        (lambda: nn.MaxPool2d(2), (2, 4, 4, 3)),
        (lambda: nn.Dropout(0.5), (2, 3)),
    ],
)
def test_images_that_are_not_floats_are_refused(make, shape, dtype):
    with pytest.raises(
        TypeError, match=f"of dtype {np.dtype(dtype)}: expected float16, bfloat16, float32 or .*; normalise"
    ):
        make()(Tensor(np.ones(shape, dtype)))


def test_numpy_integers_are_sizes():
    layer = nn.Conv2d(np.int64(3), np.int64(2), np.int64(3), padding=(np.int32(1), 1))
    assert layer(Tensor(np.ones((1, 4, 4, 3), np.float32))).shape == (1, 4, 4, 2)
    with pytest.raises(ValueError, match="kernel_size=True"):
        nn.Conv2d(3, 2, True)


def test_a_slice_of_a_sequential_is_one_and_shares_its_modules():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    part = net[:2]
    assert isinstance(part, nn.Sequential)
    assert part[0] is net[0]
    assert not part.training
    assert part(Tensor(np.ones((1, 3), np.float32))).shape == (1, 4)


@pytest.mark.parametrize("where", ["gpu", np.int32, None, 3])
def test_to_nowhere_is_refused_and_changes_nothing(where):
    net = nn.Linear(2, 2)
    before = net.weight.data
    with pytest.raises(ValueError, match=r"expected a device \(cpu, cuda, emulated\) or a floating-point dtype"):
        net.to(where)
    assert net.weight.data is before
