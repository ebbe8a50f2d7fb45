"""How a model is spread over ranks: replicas whose gradients are averaged (DistributedDataParallel)."""

from torch.nn.parallel import DistributedDataParallel


def distribute(model, ranks):
    """The model as all ranks train it. Run one forward and backward pass before the first step: DDP regroups
    its gradient buckets after the first one, and later sums must be in the same order after a restart."""
    return DistributedDataParallel(model) if ranks.distributed else model


def sync_gradients(model, on):
    """Whether the next backward pass averages gradients over the ranks. Call it before the forward pass."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on
