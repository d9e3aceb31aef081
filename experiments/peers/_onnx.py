"""The network as an ONNX file, for the runtimes that read one."""

import io

from . import pytorch

OPSET = 17


def exported(task):
    """The bytes of PyTorch's network in evaluation, traced on this batch; input "x" (N, C, H, W), output "logits"."""
    import torch

    task.setting = "contiguous"
    net, x = pytorch.network(task)
    net.eval().requires_grad_(False)
    file = io.BytesIO()
    torch.onnx.export(net, (x,), file, input_names=["x"], output_names=["logits"], dynamo=False, opset_version=OPSET)
    return file.getvalue(), x.numpy()


def convolution(layer):
    """The bytes of one convolution, input "x" (N, C, H, W), output "y", its weights a constant; and the images."""
    from onnx import TensorProto, helper, numpy_helper

    x, shape = layer.x.transpose(0, 3, 1, 2).copy(), layer.gy.transpose(0, 3, 1, 2).shape
    w = numpy_helper.from_array(layer.w.transpose(3, 2, 0, 1).copy(), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=layer.stride, pads=layer.padding * 2)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in (("x", x.shape), ("y", shape))
    ]
    graph = helper.make_graph([node], "layer", ends[:1], ends[1:], [w])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    return model.SerializeToString(), x
