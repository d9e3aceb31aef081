"""ResNet: shapes, size, torchvision's names, and PyTorch's derivative."""

from __future__ import annotations

import numpy as np
import pytest

import nanocnn as nc
from nanocnn.functional import cross_entropy
from nanocnn.models import resnet18
from nanocnn.nn import fold_batch_norm
from nanocnn.tensor import Tensor


def make(**options):
    return resnet18(rng=np.random.default_rng(0), **options)


def torchvision_names() -> list[str]:
    """The names of torchvision's resnet18().state_dict(), less its counters `num_batches_tracked`."""
    norm = ("weight", "bias", "running_mean", "running_var")
    names = ["conv1.weight", *(f"bn1.{n}" for n in norm)]
    for layer in range(1, 5):
        for block in range(2):
            for i in (1, 2):
                names += [f"layer{layer}.{block}.conv{i}.weight", *(f"layer{layer}.{block}.bn{i}.{n}" for n in norm)]
            if layer > 1 and block == 0:
                names += [f"layer{layer}.0.downsample.0.weight", *(f"layer{layer}.0.downsample.1.{n}" for n in norm)]
    return [*names, "fc.weight", "fc.bias"]


def test_size_and_names():
    model = make()
    assert sum(p.size for p in model.parameters()) == 11_173_962
    assert sorted(model.state_dict()) == sorted(torchvision_names())
    assert not any("conv" in name and "bias" in name for name in model.state_dict())
    assert sum(p.size for p in make(num_classes=1000, stem="imagenet").parameters()) == 11_689_512


@pytest.mark.parametrize(("stem", "side", "inside"), [("cifar", 16, 2), ("cifar", 17, 3), ("imagenet", 64, 2)])
def test_shapes(stem, side, inside):
    model = make(num_classes=7, stem=stem, width=1 / 16, in_channels=2).eval()
    seen = []
    layer4 = model.layer4.forward
    model.layer4.forward = lambda x: seen.append(layer4(x)) or seen[-1]
    y = model(Tensor(np.zeros((3, side, side, 2), np.float32)))
    assert y.shape == (3, 7)
    assert y.dtype == np.float32
    assert seen[0].shape == (3, inside, inside, 32)


def test_the_same_generator_gives_the_same_weights():
    a, b = make(width=1 / 16), make(width=1 / 16)
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)
    nc.manual_seed(3)
    other = resnet18(width=1 / 16)
    assert not np.array_equal(other.conv1.weight.data, a.conv1.weight.data)


def test_folding_the_batch_norms_changes_nothing():
    model = make(width=1 / 16)
    rng = np.random.default_rng(2)
    for array in model.state_dict().values():
        if array.ndim == 1:
            array[...] = rng.uniform(0.5, 1.5, array.shape)
    model.to(np.float64).eval()
    folded = fold_batch_norm(model)
    assert not list(folded.named_buffers())
    x = Tensor(rng.standard_normal((2, 16, 16, 3)))
    np.testing.assert_allclose(folded(x).numpy(), model(x).numpy(), rtol=1e-10)


def test_an_unknown_stem_is_named():
    with pytest.raises(ValueError, match=r"stem='mnist': expected 'cifar'.*or 'imagenet'"):
        make(stem="mnist")


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_gradients_equal_pytorchs(stem):
    torch = pytest.importorskip("torch")
    from torch.nn import functional as T

    model = make(stem=stem, width=1 / 16).to(np.float64)
    x, labels = np.random.default_rng(1).standard_normal((4, 32, 32, 3)), np.array([3, 1, 4, 1])
    loss = cross_entropy(model(Tensor(x)), labels)
    loss.backward()

    # The paper's network, once more and without modules: a second spelling to compare with.
    p = {}
    for name, value in model.state_dict().items():
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim]
        p[name] = torch.tensor(value.transpose(axes), requires_grad="running" not in name)

    def conv_norm(x, conv, norm, stride):
        weight = p[conv + ".weight"]
        y = T.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return T.batch_norm(y, None, None, p[norm + ".weight"], p[norm + ".bias"], training=True)

    h = torch.relu(conv_norm(torch.tensor(x.transpose(0, 3, 1, 2)), "conv1", "bn1", 2 if stem == "imagenet" else 1))
    if stem == "imagenet":
        h = T.max_pool2d(h, 3, 2, 1)
    for block in [f"layer{layer}.{i}" for layer in range(1, 5) for i in range(2)]:
        stride = 2 if f"{block}.downsample.0.weight" in p else 1
        y = torch.relu(conv_norm(h, f"{block}.conv1", f"{block}.bn1", stride))
        y = conv_norm(y, f"{block}.conv2", f"{block}.bn2", 1)
        shortcut = conv_norm(h, f"{block}.downsample.0", f"{block}.downsample.1", 2) if stride == 2 else h
        h = torch.relu(y + shortcut)
    theirs = T.cross_entropy(T.linear(h.mean((2, 3)), p["fc.weight"], p["fc.bias"]), torch.tensor(labels))
    theirs.backward()

    assert loss.item() == pytest.approx(theirs.item(), rel=1e-10)
    for name, ours in model.named_parameters():
        gradient = p[name].grad.numpy()
        gradient = gradient.transpose({4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[gradient.ndim])
        np.testing.assert_allclose(ours.grad, gradient, rtol=1e-6, atol=1e-8 * abs(gradient).max(), err_msg=name)
