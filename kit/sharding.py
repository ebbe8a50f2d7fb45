"""How a model is spread over ranks: as replicas (DistributedDataParallel), or in shards (FSDP2, --shard).

Replicas average their gradients. Each rank of a sharded model keeps a part of every weight, gradient and
optimizer tensor, and gathers a block's weights just before it computes the block, so every forward pass
needs all ranks. Other code that needs the weights takes a `whole_copy`.
"""

from torch.nn.parallel import DistributedDataParallel

from kit.device import type_of
from kit.files import UserError


def distribute(model, ranks):
    """The model as all ranks train it."""
    if not ranks.distributed or any(map(is_sharded, model.modules())):
        return model
    return DistributedDataParallel(model, process_group=ranks.group, gradient_as_bucket_view=True)


def sync_gradients(model, on):
    """Set whether the next backward pass averages gradients over the ranks. Call before the forward pass.

    A sharded model averages them in every pass: otherwise each rank would have to keep whole gradients.
    """
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on


def zero_grad(model):
    """Set the gradients to zero, or drop them if that saves memory. model: what `distribute` returned.

    DDP's gradients are parts of its buckets. If they were dropped, the sum over all micro-batches but the
    last would be kept outside the buckets: 4 more bytes per parameter.
    """
    model.zero_grad(set_to_none=not isinstance(model, DistributedDataParallel))


def check_shardable(args, precision):
    """Raise UserError for flags that --shard does not support. precision: the run's."""
    for flag, unsupported in (("--optimizer muon", args.optimizer == "muon"),
                              ("--dtype float16", precision.name == "float16"),
                              ("--micro_batch_size auto", args.micro_batch_size == "auto")):
        if args.shard and unsupported:
            raise UserError(f"--shard does not support {flag}: change one of them")


def shard(model, ranks):
    """Shard a GPT on the CPU in place, with rank 0's weights: block by block, then the rest. Returns it."""
    from torch.distributed.device_mesh import DeviceMesh  # it and FSDP take a second to import
    from torch.distributed.fsdp import fully_shard

    ranks.copy_from_first(model.parameters())
    mesh = DeviceMesh.from_group(ranks.group, type_of(ranks.device))
    for unit in (*model.transformer.h, model):
        fully_shard(unit, mesh=mesh)  # moves its part to the device
    return model


def is_sharded(model):
    return hasattr(model, "set_requires_gradient_sync")  # of FSDP's classes


def whole(tensor):
    """A sharded tensor made whole: all ranks must call this together. Any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_on_cpu(tensors, ranks, copy):
    """The `whole` of each of {name: tensor} on rank 0's CPU; {} on the others. All ranks must call it.

    copy: never return the tensors themselves. Raises DistError if a rank is lost.
    """
    result = {}
    for name, tensor in tensors.items():
        tensor = whole(tensor.detach())
        ranks.wait_for_gpu()
        if ranks.is_first:
            # not into pinned memory: torch would round it up to powers of two, and keep it
            result[name] = tensor.to("cpu", copy=copy)
    return result


def whole_copy(model, ranks):
    """A copy of a sharded GPT that has all weights on each rank; any other model as it is.

    It takes 4 bytes per parameter. All ranks must call it. Raises DistError if a rank is lost.
    """
    if not is_sharded(model):
        return model
    state = {name: whole(tensor) for name, tensor in model.state_to_save().items()}
    ranks.wait_for_gpu()
    return model.from_state(model.config, state)


def local(tensor):
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def shard_like(tensor, parameter):
    """A tensor sharded like a parameter of the same shape, if that is sharded."""
    if not hasattr(parameter, "placements"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements,
                             src_data_rank=None)  # every rank has the tensor: none needs to send it
