"""The layers of a GPT as a CPU runs them fastest, for generation and evaluation.

One token at a time, the time goes into reading the weights. Torch's own product of a few rows with a large
matrix leaves up to half of the memory's bandwidth unused, oneDNN's with a matrix it has packed does not; in
int8 there are a quarter of the bytes. Between two products the caches are full of weights, and each line of
Python is slow: so modules become plain functions, without nn.Module's look-ups and hooks.
"""

import warnings
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


def onednn_is_faster():
    """Whether oneDNN's fp32 products of large matrices are faster here than torch's own, which are MKL's.

    MKL leaves AVX-512 unused on AMD's processors, not on Intel's: those with bf16 and without AMX are AMD's
    (and Intel's Cooper Lake, which was not measured).
    """
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


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


def fp32_linear(linear):
    """A Linear with its weight in the order in which oneDNN reads it, for any number of rows."""
    weight, bias = linear.weight, linear.bias
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_avx2_supported()):  # Arm has other kernels
        return partial(F.linear, weight=weight, bias=bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 8)  # made for one row, half as fast
    product = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: product(x, packed, bias, "none", (), "")


@torch.no_grad()
def pack(model, int8=False):
    """Exchange the layers of a GPT on the CPU for the functions that are fastest there.

    The model can't be trained, saved or packed again after that; results differ by rounding. int8: the
    weights in 8 bits.
    """
    assert isinstance(model.lm_head, nn.Linear), "the model is packed already"
    model.eval()  # the functions are those of an evaluation

    def function_of(module):
        if isinstance(module, nn.Linear):
            return int8_linear(module) if int8 else fp32_linear(module)
        if isinstance(module, nn.LayerNorm):
            return partial(torch.layer_norm, normalized_shape=module.normalized_shape, weight=module.weight,
                           bias=module.bias, eps=module.eps)
        if isinstance(module, nn.Dropout):
            return lambda x: x
        if isinstance(module, nn.ModuleList):
            return [block.forward for block in module]
        return module.forward

    # parents alone: a layer is gone as soon as its function stands, or a model would be held twice
    for parent in [module for module in model.modules() if next(module.children(), None)]:
        if not isinstance(parent, nn.ModuleList):
            for name, child in list(parent.named_children()):
                if not isinstance(child, (nn.ModuleDict, nn.Embedding)):  # they are asked for their parts
                    delattr(parent, name)
                    setattr(parent, name, function_of(child))  # an attribute like any other: found at once
