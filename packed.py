"""The layers of a GPT as a CPU runs them fastest one token at a time, for generation alone.

One token at a time, the time goes into reading the weights: in int8 there are a quarter of the bytes. And
MKL's product of a few rows with a large matrix leaves half of the memory's bandwidth unused, unless the
matrix is packed for that number of rows. Between two products the caches are full of weights, and each line
of Python is slow: so modules become plain functions, without nn.Module's look-ups and hooks.
"""

import warnings
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


def int8_linear(linear):
    """A Linear with 8-bit weights, one scale for each output; its inputs are quantized as they come."""
    scales = linear.weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (out,)
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with warnings.catch_warnings(action="ignore"):  # torch means to move this to another package
        weight = torch.quantize_per_channel(linear.weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, linear.bias)
    reduce_range = not torch.cpu._is_vnni_supported()  # sums of 8-bit products overflow without
    product = torch.ops.quantized.linear_dynamic.default
    return lambda x: product(x, packed, reduce_range)


def packed_linear(linear, rows):
    """A Linear packed for inputs of `rows` rows; inputs of other sizes take the plain weight."""
    packed = torch.ops.mkl._mkl_reorder_linear_weight(linear.weight, rows)
    product = torch.ops.mkl._mkl_linear.default
    return lambda x: product(x, packed, linear.weight, linear.bias, rows)


@torch.no_grad()
def pack(model, batch_size, int8=False):
    """Exchange the layers of a GPT on the CPU for the functions that are fastest at this batch size.

    The model can't be trained, saved or packed again after that. From 3 to 32 rows it takes as much memory
    again; results differ by rounding. int8: weights in 8 bits at any batch size.
    """
    assert isinstance(model.lm_head, nn.Linear), "the model is packed already"
    model.eval()  # the functions are those of an evaluation
    # measured on AVX-512: one or two rows are as fast without, and a long prompt is a product of many rows
    mkl = not int8 and 2 < batch_size <= 32 and torch.backends.mkl.is_available()

    def function_of(module):
        if isinstance(module, nn.Linear):
            if int8:
                return int8_linear(module)
            if mkl:
                return packed_linear(module, batch_size)
            return partial(F.linear, weight=module.weight, bias=module.bias)
        if isinstance(module, nn.LayerNorm):
            return partial(torch.layer_norm, normalized_shape=module.normalized_shape, weight=module.weight,
                           bias=module.bias, eps=module.eps)
        if isinstance(module, nn.Dropout):
            return lambda x: x
        if isinstance(module, nn.ModuleList):
            return [block.forward for block in module]
        return module.forward

    for parent in list(model.modules()):
        if not isinstance(parent, nn.ModuleList):
            for name, child in list(parent.named_children()):
                if not isinstance(child, (nn.ModuleDict, nn.Embedding)):  # they are asked for their parts
                    delattr(parent, name)
                    setattr(parent, name, function_of(child))  # an attribute like any other: found at once
