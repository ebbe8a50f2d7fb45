"""Faster CPU versions of a GPT's layers, for sampling and evaluation.

Sampling one token at a time spends its time reading weights. torch's matmul of a few rows with a large matrix
leaves up to half of the memory bandwidth unused; oneDNN's, with a packed matrix, does not. int8 weights are a
quarter of the bytes. Between two matmuls each line of Python is slow, because the caches are full of weights,
so modules become plain functions, without nn.Module's attribute lookups and hooks.

Some functions used here are private to torch. If a version lacks one, a slower public one takes its place.
"""

import warnings
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


def cpu_has(*features):
    """Whether the processor has all of these features, such as "avx2"; False if torch can't tell."""
    return all(getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)() for feature in features)


def onednn_is_faster():
    """Whether oneDNN's fp32 matmuls of large matrices are faster here than torch's default, which is MKL.

    MKL does not use AVX-512 on AMD's processors. Those are recognized by bf16 without AMX (which also fits
    Intel's Cooper Lake, where it was not measured).
    """
    return cpu_has("avx512_bf16") and not cpu_has("amx_tile")


def int8_linear(linear):
    """A Linear with 8-bit weights, one scale per output; its inputs are quantized at each call.

    Returns a function, or None if this torch has no such kernels.
    """
    try:
        quantize, linear_dynamic = torch.quantize_per_channel, torch.ops.quantized.linear_dynamic.default
        prepack = torch.ops.quantized.linear_prepack
    except AttributeError:
        return None
    scales = linear.weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (out,)
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with warnings.catch_warnings(action="ignore"):  # torch plans to move this to another package
        weight = quantize(linear.weight, scales, zeros, 0, torch.qint8)
    packed = prepack(weight, linear.bias)
    reduce_range = not cpu_has("vnni")  # without VNNI, sums of 8-bit products overflow
    return lambda x: linear_dynamic(x, packed, reduce_range)


def fp32_linear(linear):
    """A Linear whose weight is stored in oneDNN's order, for any number of rows. Returns a function."""
    weight, bias = linear.weight, linear.bias
    try:
        reorder, linear_pointwise = (torch.ops.mkldnn._reorder_linear_weight,
                                     torch.ops.mkldnn._linear_pointwise.default)
    except AttributeError:
        reorder = None
    usable = torch.backends.mkldnn.is_available() and cpu_has("avx2")  # Arm has other kernels
    if reorder is None or not usable:
        return partial(F.linear, weight=weight, bias=bias)
    # packed for 8 rows, which suits any number of rows. Packed for 1, it would be half as fast
    packed = reorder(weight.detach(), 8)
    return lambda x: linear_pointwise(x, packed, bias, "none", (), "")


@torch.no_grad()
def pack(model, int8=False):
    """Replace the layers of a GPT on the CPU by faster functions. int8: with 8-bit weights.

    Results differ by rounding. Afterwards the model can't be trained, saved or packed again.
    """
    assert isinstance(model.lm_head, nn.Linear), "the model is already packed"
    model.eval()  # the functions compute what eval mode does

    def function_of(module):
        if isinstance(module, nn.Linear):
            return int8 and int8_linear(module) or fp32_linear(module)
        if isinstance(module, nn.LayerNorm):
            return partial(torch.layer_norm, normalized_shape=module.normalized_shape, weight=module.weight,
                           bias=module.bias, eps=module.eps)
        if isinstance(module, nn.RMSNorm):
            return partial(torch.rms_norm, normalized_shape=module.normalized_shape, weight=module.weight,
                           eps=module.eps)
        if isinstance(module, nn.Dropout):
            return lambda x: x
        if isinstance(module, nn.ModuleList):
            return [block.forward for block in module]
        return module.forward

    # a module is dropped as soon as its function exists, so memory never holds two models
    for parent in [module for module in model.modules() if next(module.children(), None)]:
        if not isinstance(parent, nn.ModuleList):
            for name, child in list(parent.named_children()):
                if not isinstance(child, (nn.ModuleDict, nn.Embedding)):  # their attributes are used
                    delattr(parent, name)
                    setattr(parent, name, function_of(child))  # a plain attribute, which Python finds at once
