"""OpenVINO on the CPU, inference only, on the network exported from PyTorch."""

import dataclasses
import math

from . import _onnx

TITLE = "OpenVINO"
NEEDS = ("openvino", "onnx", "torch")
TRAIN = {}
INFER = {
    "latency": "one stream with all threads, float32 (its default would be bfloat16 where the CPU has it)",
    "throughput": "a stream for each thread, the batch in as many equal parts, float32",
}
LAYERS = {"latency": "the same, of forward alone"}


def environment(setting, threads):
    return {}


def compiled(model, threads, hint, **more):
    import openvino

    core = openvino.Core()
    options = dict(PERFORMANCE_HINT=hint, INFERENCE_NUM_THREADS=str(threads), INFERENCE_PRECISION_HINT="f32", **more)
    return core.compile_model(core.read_model(model), "CPU", options)


def in_one(model, x, threads):
    """f() -> the first output, which the next call writes over."""
    request = compiled(model, threads, "LATENCY").create_infer_request()
    return lambda: request.infer({"x": x}, share_inputs=True, share_outputs=True)[0]


def in_parts(task):
    import numpy as np

    count = math.gcd(task.threads, len(task.images))
    parts = [_onnx.exported(dataclasses.replace(task, images=part)) for part in np.split(task.images, count)]
    model = compiled(parts[0][0], task.threads, "THROUGHPUT", NUM_STREAMS=str(count))
    work = [(model.create_infer_request(), images) for _, images in parts]

    def infer():
        for request, images in work:
            request.start_async({"x": images}, share_inputs=True)
        for request, _ in work:
            request.wait()
        return np.concatenate([request.get_output_tensor(0).data for request, _ in work])

    return infer


def inference(task):
    return in_parts(task) if task.setting == "throughput" else in_one(*_onnx.exported(task), task.threads)


def convolution(layer):
    run = in_one(*_onnx.convolution(layer), layer.threads)
    return {"forward": lambda: run().transpose(0, 2, 3, 1)}
