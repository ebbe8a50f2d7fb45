"""The state of an optimizer as named tensors, for checkpoints."""

import torch


def state_tensors(optimizer):
    """The state as {"index.key": tensor}. index counts the parameters over all groups."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value for i, values in state.items() for key, value in values.items()}


def expected_state(optimizer):
    """Shape and dtype of each of `state_tensors` after a step, {"index.key": (shape, dtype)}, for AdamW."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {f"{i}.{key}": (shape, torch.float32) for i, p in enumerate(params)
            for key, shape in (("step", torch.Size()), ("exp_avg", p.shape), ("exp_avg_sq", p.shape))}


def load_state(optimizer, tensors):
    """Load `state_tensors`; hyperparameters stay the optimizer's own. Raises ValueError if they do not fit.

    AdamW's fused kernel does not check sizes: it would write past the end of a tensor that is too short.
    """
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if found and found != expected_state(optimizer):  # empty: saved before the first step
        raise ValueError("the optimizer's tensors do not fit the model")
    state = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
