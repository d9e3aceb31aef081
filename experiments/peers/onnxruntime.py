"""ONNX Runtime on the CPU, inference only, on the network exported from PyTorch."""

from . import _onnx

TITLE = "ONNX Runtime"
NEEDS = ("onnxruntime", "onnx", "torch")
TRAIN = {}
INFER = {"session": "all graph optimisations, sequential execution"}
LAYERS = {"session": "the same, of forward alone, into an array that is there already"}


def environment(setting, threads):
    return {}


def loaded(model, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def inference(task):
    model, images = _onnx.exported(task)
    session = loaded(model, task.threads)
    return lambda: session.run(["logits"], {"x": images})[0]


def convolution(layer):
    import numpy as np
    import onnxruntime

    model, x = _onnx.convolution(layer)
    session = loaded(model, layer.threads)
    y = np.empty(layer.gy.transpose(0, 3, 1, 2).shape, np.float32)
    bound = session.io_binding()
    bound.bind_cpu_input("x", x)
    bound.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(y))

    def forward():
        session.run_with_iobinding(bound)
        return y.transpose(0, 2, 3, 1)

    return {"forward": forward}
