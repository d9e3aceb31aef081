"""OpenVINO on the CPU, inference only, on the network exported from PyTorch."""

from . import _onnx

TITLE = "OpenVINO"
NEEDS = ("openvino", "onnx", "torch")
TRAIN = {}
INFER = {"latency": "one stream with all threads, float32 (its default would be bfloat16 where the CPU has it)"}


def environment(setting, threads):
    return {}


def inference(task):
    import openvino

    model, images = _onnx.exported(task)
    core = openvino.Core()
    options = dict(PERFORMANCE_HINT="LATENCY", INFERENCE_NUM_THREADS=str(task.threads), INFERENCE_PRECISION_HINT="f32")
    compiled = core.compile_model(core.read_model(model), "CPU", options)
    request = compiled.create_infer_request()
    return lambda: request.infer({"x": images}, share_inputs=True, share_outputs=True)[0]
