"""TensorFlow on the CPU (oneDNN), the whole step in one tf.function."""

from . import _networks

TITLE = "TensorFlow"
NEEDS = ("tensorflow",)
TRAIN = {"tf.function": "oneDNN, NHWC, the update by ResourceApplyMomentum"}
INFER = {"tf.function": "oneDNN, NHWC, weights as constants, so that Grappler folds and fuses"}
LAYERS = {"tf.function": "oneDNN, NHWC, each direction a function of its own"}


def environment(setting, threads):
    return {"TF_ENABLE_ONEDNN_OPTS": "1", "TF_CPP_MIN_LOG_LEVEL": "2", "OMP_NUM_THREADS": str(threads)}


def convolved(tf, x, w, stride):
    """The convolution, its padding half the kernel."""
    side = [w.shape[0] // 2] * 2
    if stride > 1 and w.shape[0] > 1:  # here "SAME" pads one side only; explicit padding has a slow gradient
        return tf.nn.conv2d(tf.pad(x, [[0, 0], side, side, [0, 0]]), w, stride, "VALID")
    return tf.nn.conv2d(x, w, stride, "SAME")


class Ops:
    """The operations of `_networks`, on variables (training) or constants (inference) by name."""

    def __init__(self, tf, weights, dropout, training):
        self.tf, self.weights, self.rate, self.training = tf, weights, dropout, training

    def conv(self, x, name, stride=1):
        y = convolved(self.tf, x, self.weights[f"{name}.weight"], stride)
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else self.tf.nn.bias_add(y, bias)

    def norm(self, x, name):
        get = {kind: self.weights[f"{name}.{kind}"] for kind in ("weight", "bias", "running_mean", "running_var")}
        y, mean, var, *_ = self.tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=get["weight"],
            offset=get["bias"],
            mean=get["running_mean"],
            variance=get["running_var"],
            epsilon=1e-5,
            exponential_avg_factor=0.1,
            is_training=self.training,
        )
        if self.training:
            get["running_mean"].assign(mean)
            get["running_var"].assign(var)
        return y

    def linear(self, x, name):
        return self.tf.nn.bias_add(self.tf.matmul(x, self.weights[f"{name}.weight"]), self.weights[f"{name}.bias"])

    def relu(self, x):
        return self.tf.nn.relu(x)

    def max_pool(self, x):
        return self.tf.nn.max_pool2d(x, 2, 2, "VALID")

    def mean(self, x):
        return self.tf.reduce_mean(x, (1, 2))

    def flatten(self, x):
        return self.tf.reshape(x, (x.shape[0], -1))

    def dropout(self, x):
        return self.tf.nn.dropout(x, self.rate) if self.training and self.rate else x


def with_threads(threads):
    """TensorFlow, told how many threads to take."""
    import tensorflow as tf

    if tf.config.threading.get_intra_op_parallelism_threads() != threads:  # only before the first operation
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    return tf


def prepared(task):
    tf = with_threads(task.threads)
    return tf, tf.constant(task.images)


def training(task):
    tf, x = prepared(task)
    y = tf.constant(task.labels)
    weights = {name: tf.Variable(array, trainable="running" not in name) for name, array in task.weights.items()}
    learnt = {name: v for name, v in weights.items() if v.trainable}
    momentum = {name: tf.Variable(tf.zeros_like(v)) for name, v in learnt.items()}
    ops = Ops(tf, weights, task.dropout, training=True)

    def backward():
        with tf.GradientTape() as tape:
            logits = _networks.NETWORKS[task.model](ops, x)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
        return loss, dict(zip(learnt, tape.gradient(loss, list(learnt.values())), strict=True))

    @tf.function
    def update():
        loss, gradients = backward()
        for name, v in learnt.items():
            tf.raw_ops.ResourceApplyMomentum(
                var=v.handle,
                accum=momentum[name].handle,
                lr=task.lr,
                grad=gradients[name] + task.weight_decay * v,
                momentum=task.momentum,
            )
        return loss

    def gradients():
        loss, found = tf.function(backward)()
        return float(loss), {name: g.numpy() for name, g in found.items()}

    return lambda: float(update()), gradients


def inference(task):
    tf, x = prepared(task)
    weights = {name: tf.constant(array) for name, array in task.weights.items()}
    ops = Ops(tf, weights, 0.0, training=False)

    @tf.function
    def run(x):
        return _networks.NETWORKS[task.model](ops, x)

    return lambda: run(x).numpy()


def convolution(layer):
    tf = with_threads(layer.threads)
    x, w, gy = (tf.constant(array) for array in (layer.x, layer.w, layer.gy))

    def gradient(x, w, gy, *, of_x):  # Grappler leaves out the forward pass: nobody asks for its result
        with tf.GradientTape() as tape:
            wanted = x if of_x else w
            tape.watch(wanted)
            y = convolved(tf, x, w, layer.stride[0])
        return tape.gradient(y, wanted, gy)

    @tf.function
    def forward(x, w):
        return convolved(tf, x, w, layer.stride[0])

    @tf.function
    def grad_x(x, w, gy):
        return gradient(x, w, gy, of_x=True)

    @tf.function
    def grad_w(x, w, gy):
        return gradient(x, w, gy, of_x=False)

    return {
        "forward": lambda: forward(x, w),
        "grad_x": lambda: grad_x(x, w, gy),
        "grad_w": lambda: grad_w(x, w, gy),
    }
