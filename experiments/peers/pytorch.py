"""PyTorch on the CPU (oneDNN), in both memory layouts, and through its compiler where there is a C++ compiler."""

import shutil

from . import _networks

TITLE = "PyTorch"
NEEDS = ("torch",)
TRAIN = {
    "contiguous": "NCHW, fused SGD",
    "channels_last": "NHWC in memory, fused SGD",
    "compiled": "torch.compile, channels_last, fused SGD",
}
INFER = {
    "contiguous": "NCHW, traced, torch.jit.freeze",
    "channels_last": "NHWC in memory, traced, torch.jit.freeze",
    "compiled": "torch.compile with frozen weights, channels_last",
}
LAYERS = {
    "contiguous": "NCHW, conv2d and aten.convolution_backward for one gradient at a time",
    "channels_last": "the same, NHWC in memory",
}
OPTIONAL = ("compiled",)  # where it fails, a line says so and the others go on


def unavailable(setting):
    """Why this setting cannot be tried here, or None."""
    if setting == "compiled" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        return "torch.compile needs a C++ compiler, and there is none"
    return None


def environment(setting, threads):
    # Large allocations in huge pages: a tenth of AlexNet's step.
    return {"THP_MEM_ALLOC_ENABLE": "1", "OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_FREEZING": "1"}


AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # (KH, KW, C, O) -> (O, C, KH, KW); (in, out) -> (out, in)
BACK = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


def memory_format(setting):
    import torch

    return torch.contiguous_format if setting == "contiguous" else torch.channels_last


def network(task):
    """The network as a torch.nn.Module, and its images (N, C, H, W), both in the setting's memory layout."""
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    layout = memory_format(task.setting)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, array in task.weights.items():
                value = torch.tensor(array.transpose(AXES[array.ndim]))
                value = value.contiguous(memory_format=layout) if value.ndim == 4 else value.contiguous()
                if "running" in name:
                    self.register_buffer(name.replace(".", "_"), value)
                else:
                    self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(value))

        def get(self, name, kind):
            return getattr(self, f"{name}_{kind}".replace(".", "_"), None)

        def forward(self, x):
            return _networks.NETWORKS[task.model](self, x)

        def conv(self, x, name, stride=1):
            w = self.get(name, "weight")
            return F.conv2d(x, w, self.get(name, "bias"), stride, w.shape[2] // 2)

        def norm(self, x, name):
            running = self.get(name, "running_mean"), self.get(name, "running_var")
            return F.batch_norm(x, *running, self.get(name, "weight"), self.get(name, "bias"), self.training)

        def linear(self, x, name):
            return F.linear(x, self.get(name, "weight"), self.get(name, "bias"))

        def relu(self, x):
            return F.relu(x, inplace=True)

        def max_pool(self, x):
            return F.max_pool2d(x, 2)

        def mean(self, x):
            return F.adaptive_avg_pool2d(x, 1).flatten(1)

        def flatten(self, x):  # free in channels_last; otherwise a copy of a few hundred KB
            return x.permute(0, 2, 3, 1).flatten(1)

        def dropout(self, x):
            return F.dropout(x, task.dropout, self.training)

    images = torch.tensor(task.images.transpose(0, 3, 1, 2)).contiguous(memory_format=layout)
    return Net(), images


def training(task):
    import torch

    net, x = network(task)
    y = torch.tensor(task.labels)
    hyper = dict(lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay)
    optimizer = torch.optim.SGD(net.parameters(), **hyper, fused=True)

    def loss_of(x, y):
        return torch.nn.functional.cross_entropy(net(x), y)

    if task.setting == "compiled":
        loss_of = torch.compile(loss_of)

    def backward():
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(x, y)
        loss.backward()
        return loss.item()

    def step():
        loss = backward()
        optimizer.step()
        return loss

    def gradients():
        loss = backward()
        found = {name: net.get(*name.rsplit(".", 1)).grad for name in task.weights if "running" not in name}
        return loss, {name: gradient.numpy().transpose(BACK[gradient.ndim]) for name, gradient in found.items()}

    return step, gradients


def inference(task):
    import torch

    net, x = network(task)
    net.eval().requires_grad_(False)
    with torch.inference_mode():
        compiled = task.setting == "compiled"
        run = torch.compile(net) if compiled else torch.jit.freeze(torch.jit.trace(net, x))

    def infer():
        with torch.inference_mode():
            return run(x).numpy()

    return infer


def convolution(layer):
    import torch

    torch.set_num_threads(layer.threads)
    layout = memory_format(layer.setting)

    def tensor(array, axes):
        return torch.tensor(array.transpose(axes)).contiguous(memory_format=layout)

    x, gy = tensor(layer.x, (0, 3, 1, 2)), tensor(layer.gy, (0, 3, 1, 2))
    w = tensor(layer.w, AXES[4])

    def backward(*mask):
        geometry = layer.stride, layer.padding, (1, 1), False, (0, 0), 1
        return torch.ops.aten.convolution_backward(gy, x, w, None, *geometry, mask)

    def image(tensor):
        return tensor.permute(0, 2, 3, 1).numpy()

    return {
        "forward": lambda: image(torch.nn.functional.conv2d(x, w, None, layer.stride, layer.padding)),
        "grad_x": lambda: image(backward(True, False, False)[0]),
        "grad_w": lambda: backward(False, True, False)[1].permute(BACK[4]).numpy(),
    }
