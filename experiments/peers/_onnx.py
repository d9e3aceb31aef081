"""The network as an ONNX file, for the runtimes that read one."""

import io

from . import pytorch


def exported(task):
    """The bytes of PyTorch's network in evaluation, traced on this batch; input "x" (N, C, H, W), output "logits"."""
    import torch

    task.setting = "contiguous"
    net, x = pytorch.network(task)
    net.eval().requires_grad_(False)
    file = io.BytesIO()
    torch.onnx.export(net, (x,), file, input_names=["x"], output_names=["logits"], dynamo=False, opset_version=17)
    return file.getvalue(), x.numpy()
