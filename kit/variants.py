"""Parts that can replace GPT-2's own. Each is chosen by a field of GPTConfig, which is also a flag of
train_gpt2.py: --norm rmsnorm, --mlp swiglu, ...

To add an activation, add a function and a line to ACTIVATIONS (and to GATED, if its output is half as wide
as its input); to add a norm, a line to NORMS.
Shapes in comments: B = batch, T = time (tokens), C = n_embd, nh = heads, hs = head size.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F


def relu2(x):
    """The square of ReLU, from "Primer" (https://arxiv.org/abs/2109.08668)."""
    return F.relu(x).square()


def swiglu(x):
    """(..., 2 H) -> (..., H): half of the inputs gates the other half (https://arxiv.org/abs/2002.05202)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


# --mlp: a function of the config that returns the activation. GATED: the output is half as wide as the input
ACTIVATIONS = {
    "gelu": lambda config: partial(F.gelu, approximate=config.gelu),
    "relu2": lambda config: relu2,
    "swiglu": lambda config: swiglu,
}
GATED = ("swiglu",)

# --norm: a function of the config that returns a module.
# RMSNorm: no mean, no bias (https://arxiv.org/abs/1910.07467)
NORMS = {
    "layernorm": lambda config: nn.LayerNorm(config.n_embd, bias=config.bias),
    "rmsnorm": lambda config: nn.RMSNorm(config.n_embd, eps=1e-5),
}
CHOICES = {"mlp": tuple(ACTIVATIONS), "norm": tuple(NORMS), "position": ("learned", "rope"),
           "gelu": ("tanh", "none")}
SWITCHES = ("bias", "qk_norm", "tie_embeddings", "value_residual", "embedding_norm", "x0_shortcut",
            "zero_init")


def activation(config):
    """The function between the two matmuls of an MLP."""
    return ACTIVATIONS[config.mlp](config)


def norm(config):
    """A new norm module of the kind that the config names.

    The norm after the embedding (embedding_norm) is from BLOOM (https://arxiv.org/abs/2211.05100).
    """
    return NORMS[config.norm](config)


def check(config):
    """Raise ValueError if a GPTConfig asks for a part that does not exist, or that does not fit."""
    for name, choices in {**CHOICES, **dict.fromkeys(SWITCHES, (True, False))}.items():
        value = getattr(config, name)
        if value not in choices or isinstance(value, int) and not isinstance(value, bool):  # 1 == True
            raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}")
    cap = config.logit_softcap
    if not isinstance(cap, (int, float)) or isinstance(cap, bool) or not 0 <= cap < float("inf"):
        raise ValueError(f"logit_softcap must be a number of at least 0, not {cap!r}")
    if config.position == "rope" and config.n_embd // config.n_head % 2:
        raise ValueError(f"position 'rope' rotates pairs: n_embd / n_head must be even, not "
                         f"{config.n_embd // config.n_head}")


def beyond_gpt2(config):
    """The parts of a GPTConfig that change what is computed and that GPT-2 does not have, {name: text}."""
    names = {*CHOICES, *SWITCHES, "logit_softcap"} - {"bias", "gelu", "zero_init"}
    return {name: f"{name} {value}" for name, value in vars(config).items()
            if name in names and value != getattr(type(config), name)}  # the default is GPT-2's


def mlp_widths(config):
    """The outputs of an MLP's first matmul and the inputs of its second.

    A gated activation gets two thirds of GPT-2's 4 C, which makes the number of weights the same (within 1%
    from C = 64 on). From C = 128 on it is a multiple of 8, for faster matmuls on GPUs.
    """
    if config.mlp not in GATED:
        return 4 * config.n_embd, 4 * config.n_embd
    width = 8 * round(config.n_embd / 3) if config.n_embd >= 128 else round(8 * config.n_embd / 3)
    return 2 * width, width


class Shared:
    """What the layers of one forward pass share. Not a dataclass: FSDP would give each layer a copy."""

    def __init__(self, rotary=None, x0=None):
        self.rotary = rotary  # cos and sin of the angles, for rotary positions
        self.x0 = x0  # the embedded tokens (B, T, C), for x0_shortcut
        self.first_values = None  # of the first layer (B, nh, T, hs), for value_residual


def share(config, positions, x):
    """The Shared of a forward pass: of tokens at positions (T,) or (B, T), embedded as x (B, T, C)."""
    return Shared(rotary=rotary_angles(config, positions) if config.position == "rope" else None,
                  x0=x if config.x0_shortcut else None)


def rotary_angles(config, positions, base=10000.0):
    """cos and sin for `rotate`, fp32, for positions (T,) or (B, T): (T, hs / 2) or (B, 1, T, hs / 2)."""
    half = config.n_embd // config.n_head // 2
    frequencies = base ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions.unsqueeze(-1) * frequencies  # (..., T, hs / 2)
    angles = angles.unsqueeze(1) if positions.dim() == 2 else angles  # the same for all heads
    return angles.cos(), angles.sin()


def rotate(x, rotary):
    """Rotary positions (https://arxiv.org/abs/2104.09864): rotate pairs of features of x (B, nh, T, hs).

    Feature i is paired with feature i + hs / 2, as in Llama. Returns fp32 if cos and sin are fp32.
    """
    cos, sin = rotary
    one, other = x.chunk(2, dim=-1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)


class AdaptHeads(nn.Module):
    """Changes queries, keys and values after c_attn, before attention.

    qk_norm: RMS-normalizes each query and key, so that attention scores can't grow without bound
    (https://arxiv.org/abs/2010.04245, here without a gain).
    rope: turns queries and keys by the angle of their positions (`rotate`).
    value_residual: mixes in the first layer's values, with two learned weights per layer
    (https://arxiv.org/abs/2410.17897).
    """

    def __init__(self, config, layer):
        super().__init__()
        self.qk_norm, self.value_residual, self.layer = config.qk_norm, config.value_residual, layer
        if config.value_residual and layer > 0:
            self.mix = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, q, k, v, shared):
        """(B, nh, T, hs) each; the same shapes and dtypes are returned."""
        if self.qk_norm:
            q, k = F.rms_norm(q, q.shape[-1:], eps=1e-5), F.rms_norm(k, k.shape[-1:], eps=1e-5)
        if shared.rotary is not None:
            q, k = rotate(q, shared.rotary), rotate(k, shared.rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)  # norm and angles are fp32 under autocast
        if self.value_residual and self.layer == 0:
            shared.first_values = v
        elif self.value_residual:
            v = self.mix[0] * v + self.mix[1] * shared.first_values
        return q, k, v


def adapt_heads(config, layer):
    """The AdaptHeads of a layer, or None if the config needs none."""
    needed = config.qk_norm or config.value_residual or config.position == "rope"
    return AdaptHeads(config, layer) if needed else None


class Shortcut(nn.Module):
    """x0_shortcut: the embedded tokens are mixed into the input of a block, with two learned weights.

    From modded-nanogpt (https://github.com/KellerJordan/modded-nanogpt). At first it is the identity.
    """

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x, x0):  # (B, T, C) both
        return self.mix[0] * x + self.mix[1] * x0


def softcap(logits, cap):
    """Bound logits smoothly to -cap and cap, in fp32, as Gemma 2 does (https://arxiv.org/abs/2408.00118)."""
    return cap * torch.tanh(logits.float() / cap)
