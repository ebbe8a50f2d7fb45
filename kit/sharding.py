"""How a model is spread over ranks: replicas whose gradients are averaged (DistributedDataParallel)."""

from torch.nn.parallel import DistributedDataParallel


def distribute(model, ranks):
    """The model as all ranks train it.

    Before the first step, run one forward and backward pass: DDP then regroups its gradient buckets, and sums
    must be in the same order after a restart.
    """
    if not ranks.distributed:
        return model
    return DistributedDataParallel(model, process_group=ranks.group, gradient_as_bucket_view=True)


def sync_gradients(model, on):
    """Set whether the next backward pass averages gradients over the ranks. Call before the forward pass."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on
