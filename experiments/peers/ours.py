"""nanocnn, as a script uses it: what the others are compared with."""

TITLE = "nanocnn"
NEEDS = ("nanocnn",)
TRAIN = {
    "fastest": "the kernels of the fixed rule, or those of --use",
    "captured": "the same calls, of forward and backward, recorded once and made again (nanocnn.capture)",
}
INFER = {
    "fastest": "frozen: batch norm folded into the convolutions, weights laid out once",
    "captured": "the same, its calls recorded once and made again (nanocnn.capture)",
}
LAYERS = {"fastest": "the primitives conv2d, conv2d_grad_x, conv2d_grad_w"}


def environment(setting, threads):
    return {"NANOCNN_THREADS": str(threads)}


def network(model, width, dropout):
    """A network of nanocnn.models by its name, for 10 classes."""
    from nanocnn.models import alexnet_cifar, resnet18

    return alexnet_cifar(width=width, dropout=dropout) if model == "alexnet" else resnet18(width=width)


def prepared(task):
    import nanocnn as nc
    from nanocnn.kernels.dispatch import parse_use

    policy, choices = parse_use(task.use)
    nc.use(*policy, **choices)
    net = network(task.model, task.width, task.dropout)
    net.load_state_dict(task.weights)
    return nc, net


def training(task):
    nc, net = prepared(task)
    optimizer = nc.optim.SGD(net.named_parameters(), task.lr, task.momentum, weight_decay=task.weight_decay)

    def backward(images, labels):
        optimizer.zero_grad()
        loss = nc.functional.cross_entropy(net(images), labels)
        loss.backward()
        return loss

    batch = nc.Tensor(task.images), nc.Tensor(task.labels)
    run = nc.capture(backward, *batch) if task.setting == "captured" else backward

    def step():
        loss = run(*batch).item()
        optimizer.step()
        return loss

    def gradients():
        return run(*batch).item(), {name: p.grad.copy() for name, p in net.named_parameters()}

    return step, gradients


def inference(task):
    nc, net = prepared(task)
    net = nc.nn.freeze(net.eval())
    with nc.no_grad():
        run = nc.capture(net, task.images) if task.setting == "captured" else net

    def infer():
        with nc.no_grad():
            return run(nc.Tensor(task.images)).numpy()

    return infer


def convolution(layer):
    import nanocnn as nc
    from nanocnn.kernels import conv2d as kernels
    from nanocnn.kernels.dispatch import parse_use

    policy, choices = parse_use(layer.use)
    nc.use(*policy, **choices)
    x, w, gy = layer.x, layer.w, layer.gy
    geometry = layer.stride, layer.padding, (1, 1), 1
    return {
        "forward": lambda: kernels.conv2d(x, w, *geometry),
        "grad_x": lambda: kernels.conv2d_grad_x(gy, w, x.shape, *geometry),
        "grad_w": lambda: kernels.conv2d_grad_w(gy, x, w.shape, *geometry),
    }
