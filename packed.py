"""The linear layers of a GPT as a CPU's kernels read them fastest, for generation alone.

One token at a time, the time goes into reading the weights: in int8 there are a quarter of the bytes. And
MKL's product of a few rows with a large matrix leaves half of the memory's bandwidth unused, unless the
matrix is packed for that number of rows.
"""

import warnings

import torch
import torch.nn as nn


class Int8Linear(nn.Module):
    """A Linear with 8-bit weights, one scale for each output; its inputs are quantized as they come."""

    def __init__(self, linear):
        super().__init__()
        scales = linear.weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (out,)
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with warnings.catch_warnings(action="ignore"):  # torch means to move this to another package
            weight = torch.quantize_per_channel(linear.weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(weight, linear.bias)
        self.reduce_range = not torch.cpu._is_vnni_supported()  # sums of 8-bit products overflow without

    def forward(self, x):
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range)


class PackedLinear(nn.Module):
    """A Linear packed for inputs of `rows` rows; inputs of other sizes take the plain weight."""

    def __init__(self, linear, rows):
        super().__init__()
        self.weight, self.rows = linear.weight.detach(), rows
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows)

    def forward(self, x):
        return torch.ops.mkl._mkl_linear(x, self.packed, self.weight, self.bias, self.rows)


@torch.no_grad()
def pack(model, batch_size, int8=False):
    """Exchange the linear layers of a GPT on the CPU for packed ones, where that is faster at this batch.

    The model can't be trained or saved after that. Packing for fp32 takes as much memory again; its results
    differ by rounding. int8: weights in 8 bits at any batch size.
    """
    # measured on AVX-512: one or two rows are as fast without, and a long prompt is a product of many rows
    if not int8 and not (2 < batch_size <= 32 and torch.backends.mkl.is_available()):
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child) if int8 else PackedLinear(child, batch_size))
