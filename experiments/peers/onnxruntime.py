"""ONNX Runtime on the CPU, inference only, on the network exported from PyTorch."""

from . import _onnx

TITLE = "ONNX Runtime"
NEEDS = ("onnxruntime", "onnx", "torch")
TRAIN = {}
INFER = {"session": "all graph optimisations, sequential execution"}


def environment(setting, threads):
    return {}


def inference(task):
    import onnxruntime

    model, images = _onnx.exported(task)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(["logits"], {"x": images})[0]
