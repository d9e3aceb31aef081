"""JAX on the CPU (XLA), the whole step in one jax.jit, which may overwrite its arguments."""

from . import _networks

TITLE = "JAX"
NEEDS = ("jax",)
TRAIN = {"jit": "XLA, NHWC, donated arguments, random bits by XLA's own generator"}
INFER = {"jit": "XLA, NHWC, weights as constants"}
LAYERS = {"jit": "XLA, NHWC, each direction a function of its own"}


def environment(setting, threads):
    return {"JAX_PLATFORMS": "cpu", "JAX_DEFAULT_PRNG_IMPL": "rbg"}


def convolved(x, w, stride):
    """The convolution, its padding half the kernel."""
    from jax import lax

    side = (w.shape[0] // 2,) * 2
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), (side, side), dimension_numbers=layout)


class Ops:
    """The operations of `_networks`, on arrays by name; running statistics of this step go to `running`."""

    def __init__(self, weights, dropout=0.0, key=None):
        self.weights, self.rate, self.key, self.running = weights, dropout, key, {}
        self.training = key is not None

    def conv(self, x, name, stride=1):
        return convolved(x, self.weights[f"{name}.weight"], stride) + self.weights.get(f"{name}.bias", 0)

    def norm(self, x, name):
        from jax import lax

        mean, var = (self.weights[f"{name}.running_{kind}"] for kind in ("mean", "var"))
        if self.training:
            rows = x.size // x.shape[3]
            batch_mean, batch_var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            self.running[f"{name}.running_mean"] = 0.9 * mean + 0.1 * batch_mean
            self.running[f"{name}.running_var"] = 0.9 * var + 0.1 * batch_var * (rows / (rows - 1))
            mean, var = batch_mean, batch_var
        scale = self.weights[f"{name}.weight"] * lax.rsqrt(var + 1e-5)
        return (x - mean) * scale + self.weights[f"{name}.bias"]

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def relu(self, x):
        import jax

        return jax.nn.relu(x)

    def max_pool(self, x):  # lax.reduce_window has a slower gradient
        n, h, w, c = x.shape
        return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))

    def mean(self, x):
        return x.mean((1, 2))

    def flatten(self, x):
        return x.reshape(len(x), -1)

    def dropout(self, x):
        import jax

        if not self.training or not self.rate:
            return x
        self.key, key = jax.random.split(self.key)
        return jax.numpy.where(jax.random.bernoulli(key, 1 - self.rate, x.shape), x / (1 - self.rate), 0)


def training(task):
    import jax

    x, y = jax.numpy.asarray(task.images), jax.numpy.asarray(task.labels)
    weights = {name: jax.numpy.array(array) for name, array in task.weights.items()}
    running = {name: weights.pop(name) for name in task.weights if "running" in name}
    momentum = jax.tree.map(jax.numpy.zeros_like, weights)

    def loss_of(weights, running, key):
        ops = Ops({**weights, **running}, task.dropout, key)
        logits = _networks.NETWORKS[task.model](ops, x)
        chosen = jax.nn.log_softmax(logits)[jax.numpy.arange(len(y)), y]
        return -chosen.mean(), ops.running

    differentiated = jax.value_and_grad(loss_of, has_aux=True)

    def update(weights, running, momentum, key):
        key, own = jax.random.split(key)
        (loss, running), gradients = differentiated(weights, running, own)
        momentum = jax.tree.map(
            lambda m, g, w: task.momentum * m + g + task.weight_decay * w, momentum, gradients, weights
        )
        weights = jax.tree.map(lambda w, m: w - task.lr * m, weights, momentum)
        return loss, (weights, running, momentum, key)

    compiled = jax.jit(update, donate_argnums=(0, 1, 2, 3))
    state = weights, running, momentum, jax.random.key(0)

    def step():
        nonlocal state
        loss, state = compiled(*state)
        jax.block_until_ready(state)
        return float(loss)

    def gradients():
        (loss, _), found = jax.jit(differentiated)(state[0], state[1], jax.random.key(0))
        return float(loss), {name: jax.device_get(g) for name, g in found.items()}

    return step, gradients


def inference(task):
    import jax

    x = jax.numpy.asarray(task.images)
    weights = {name: jax.numpy.asarray(array) for name, array in task.weights.items()}
    run = jax.jit(lambda x: _networks.NETWORKS[task.model](Ops(weights), x))
    return lambda: jax.device_get(run(x))


def convolution(layer):
    import jax

    x, w, gy = (jax.numpy.asarray(array) for array in (layer.x, layer.w, layer.gy))
    stride = layer.stride[0]

    @jax.jit
    def forward(x, w):
        return convolved(x, w, stride)

    @jax.jit
    def grad_x(gy, w):  # linear in x: its gradient needs no x
        return jax.linear_transpose(lambda x: convolved(x, w, stride), x)(gy)[0]

    @jax.jit
    def grad_w(gy, x):
        return jax.linear_transpose(lambda w: convolved(x, w, stride), w)(gy)[0]

    return {
        "forward": lambda: jax.block_until_ready(forward(x, w)),
        "grad_x": lambda: jax.block_until_ready(grad_x(gy, w)),
        "grad_w": lambda: jax.block_until_ready(grad_w(gy, x)),
    }
