"""OpenVINO on the CPU, inference only, on the network exported from PyTorch."""

from . import _onnx

TITLE = "OpenVINO"
NEEDS = ("openvino", "onnx", "torch")
TRAIN = {}
INFER = {"latency": "one stream with all threads, float32 (its default would be bfloat16 where the CPU has it)"}
LAYERS = {"latency": "the same, of forward alone"}


def environment(setting, threads):
    return {}


def loaded(model, threads):
    """f(x) -> the first output, which the next call writes over."""
    import openvino

    core = openvino.Core()
    options = dict(PERFORMANCE_HINT="LATENCY", INFERENCE_NUM_THREADS=str(threads), INFERENCE_PRECISION_HINT="f32")
    request = core.compile_model(core.read_model(model), "CPU", options).create_infer_request()
    return lambda x: request.infer({"x": x}, share_inputs=True, share_outputs=True)[0]


def inference(task):
    model, images = _onnx.exported(task)
    run = loaded(model, task.threads)
    return lambda: run(images)


def convolution(layer):
    model, x = _onnx.convolution(layer)
    run = loaded(model, layer.threads)
    return {"forward": lambda: run(x).transpose(0, 2, 3, 1)}
