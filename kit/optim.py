"""The optimizers: AdamW for everything, or Muon for the matrices of the blocks; their state in checkpoints.

`Together` makes several torch optimizers act as one. A checkpoint names each state tensor by its parameter's
index, counted across all of them.
"""

from collections import defaultdict

import torch

from kit.variants import GATED

MAX_STACK = 2**27  # entries of matrices that Muon orthogonalizes at once: 0.5 GB in fp32, plus temporaries


def make(model, weight_decay, learning_rate, device_type, optimizer="adamw", betas=(0.9, 0.95),
         muon_scale=0.2, muon_momentum=0.95, share=None):
    """The optimizer of a GPT: "adamw" or "muon". Settings with muon in their name apply only to Muon.

    share: share(f, x) computes f(x) for a stack x of independent matrices, and may split it over ranks.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {}  # {weight: number of matrices stacked in it}
    if optimizer == "muon":
        stacked = {"c_attn.weight": 3, "c_fc.weight": 2 if model.config.mlp in GATED else 1}
        matrices = {params.pop(name): stacked.get(".".join(name.split(".")[-2:]), 1) for name, p in
                    list(params.items()) if name.startswith("transformer.h.") and p.dim() == 2}
    groups = [
        {"params": [p for p in params.values() if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    # one kernel for the whole update, on devices that have it
    fused = device_type.partition(":")[0] in ("cuda", "mps", "cpu")
    adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=fused)
    if optimizer == "adamw":
        return adamw
    return Together(adamw, Muon(matrices, learning_rate, weight_decay, muon_momentum, muon_scale, share))


class Together:
    """Several optimizers as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose update of each matrix is replaced by the nearest semi-orthogonal one.

    By Keller Jordan (https://kellerjordan.github.io/posts/muon). Updates have a root mean square of
    lr * scale, similar to AdamW's, so both take the same learning rate (https://arxiv.org/abs/2502.16982).

    matrices: {weight: number of equal matrices stacked along its rows}, for example 3 for queries, keys and
    values, each of which is orthogonalized separately. share: as in `make`.
    """

    def __init__(self, matrices, lr, weight_decay, momentum, scale, share=None):
        settings = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, scale=scale)
        super().__init__(list(matrices), settings)
        self.matrices, self.share = matrices, share or (lambda function, x: function(x))

    @torch.no_grad()
    def step(self):
        group, = self.param_groups
        batches = defaultdict(list)  # for each shape: (part of a weight, its update), no taller than wide
        for weight, count in self.matrices.items():
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            momentum = self.state[weight]["momentum"]
            momentum.lerp_(weight.grad, 1 - group["momentum"])
            update = weight.grad.lerp(momentum, group["momentum"])
            for part, matrix in zip(weight.chunk(count), update.chunk(count)):
                high = matrix.size(0) > matrix.size(1)
                part, matrix = (part.mT, matrix.mT) if high else (part, matrix)
                batches[matrix.shape].append((part, matrix))
        for shape, batch in batches.items():
            # the entries of an orthogonal matrix have an RMS of max(shape)^-0.5
            step_size = group["lr"] * group["scale"] * max(shape) ** 0.5
            at_once = max(1, MAX_STACK // shape.numel())
            for first in range(0, len(batch), at_once):
                parts, updates = zip(*batch[first : first + at_once])
                updates = self.share(orthogonalize, torch.stack(updates))
                for part, update in zip(parts, updates):
                    part.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=step_size)


def orthogonalize(x, steps=5):
    """An approximation of U V^T, where U S V^T is the SVD, of each matrix of x (N, rows, columns).

    rows <= columns. Newton-Schulz steps y <- (a + b g + c g^2) y, where g = y y^T, with Keller
    Jordan's coefficients, which bring all singular values near 1 quickly, but not exactly to 1. On GPUs it
    computes in bf16, which is faster and precise enough.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.bfloat16() if x.is_cuda else x
    y = y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)  # all singular values are now at most 1
    gram = y @ y.mT
    if y.dtype == torch.bfloat16 or y.size(2) < 2 * y.size(1):
        for step in range(steps):
            gram = y @ y.mT if step else gram
            y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
        return y.to(x.dtype)
    # wide and in fp32: multiply the small (rows, rows) factors first and y last; bf16 is too coarse for that
    product = None
    for _ in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        gram = factor @ gram @ factor
        product = factor if product is None else factor @ product
    return product @ y


def parts(optimizer):
    """Yield the torch optimizers that an optimizer consists of: (index of its first parameter, optimizer)."""
    first = 0
    for part in getattr(optimizer, "optimizers", (optimizer,)):
        yield first, part
        first += sum(len(group["params"]) for group in part.param_groups)


def state_tensors(optimizer):
    """The state as {"index.key": tensor}. index counts the parameters over all groups and optimizers."""
    return {f"{first + i}.{key}": tensor for first, part in parts(optimizer)
            for i, state in part.state_dict()["state"].items() for key, tensor in state.items()}


def expected_state(optimizer):
    """Shape and dtype of each of `state_tensors` after a step: {"index.key": (shape, dtype)}."""
    expected = {}
    for first, part in parts(optimizer):
        keys = ("momentum",) if isinstance(part, Muon) else ("step", "exp_avg", "exp_avg_sq")
        for index, p in enumerate((p for group in part.param_groups for p in group["params"]), first):
            expected |= {f"{index}.{key}": (torch.Size() if key == "step" else p.shape, torch.float32)
                         for key in keys}
    return expected


def load_state(optimizer, tensors, place=lambda tensor, parameter: tensor):
    """Load `state_tensors`; hyperparameters stay the optimizer's own. Raises ValueError if they do not fit.

    place: turns a tensor of a parameter's shape into one that is sharded like the parameter. AdamW's fused
    kernel does not check sizes: it would write past the end of a tensor that is too short.
    """
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if found and found != expected_state(optimizer):  # empty: saved before the first step
        raise ValueError("the optimizer's tensors do not fit the model")
    state = defaultdict(dict)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state[int(index)][key] = tensor if key == "step" else place(tensor, parameters[int(index)])
    for first, part in parts(optimizer):
        groups = part.state_dict()["param_groups"]
        indices = [i for group in groups for i in group["params"] if first + i in state]
        part.load_state_dict({"param_groups": groups, "state": {i: state[first + i] for i in indices}})
