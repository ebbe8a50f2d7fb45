"""The training loss without all logits in memory: cross-entropy of the head, slice by slice."""

import math

import torch

# logits computed at a time, in fp32: 128 MiB on a CPU, 1 GiB on an NVIDIA GPU. A compiled graph with several
# slices may hold more than one of them
LOGITS_AT_ONCE = {"cpu": 2**25, "cuda": 2**28, "mps": 2**26}


def split_ignored(targets):
    """Which of the targets (N,) count, as bools (N,), and the targets with 0 in place of the others.

    -100 and -1 don't count: they are F.cross_entropy's default ignore_index and nanoGPT's. Any other
    number that is not an id is an error, which `gather` raises.
    """
    ignored = (targets == -100) | (targets == -1)
    return ~ignored, targets.masked_fill(ignored, 0)


def mean_of_counted(mean, counts, at_least=0):
    """Convert a mean over all targets into the mean over those that count; the others must have added 0.

    at_least: the smallest divisor; if it is 0, the mean over no target is nan. If all targets count, the
    result is `mean` itself, not multiplied and divided by N, which could round.
    """
    count = counts.sum()
    return mean.where(count == len(counts), mean * len(counts) / count.clamp(min=at_least))


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of head(x, weight), with only `LOGITS_AT_ONCE` of the logits in memory at a time.

    The loss is the last thing computed, so its gradient with respect to x and weight does not depend on
    later layers: each slice of logits is turned into gradients at once and dropped. Nothing is computed
    twice. The backward pass scales the gradients in place, so it can run only once, and has no derivative.
    Targets of -100 and -1 do not count (`split_ignored`); if none counts, the loss is nan and its gradient 0.

    head: computes x @ weight.T in their dtype, cast to fp32; columns may be -inf. softcap: the cap that head
    applies to its logits (`variants.softcap`), or 0. The gradients below are correct only for such a head.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, head, softcap=0.0):  # (N, C), (V, C), (N,) -> scalar
        device_type = x.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
        w = weight.to(dtype)
        loss = torch.zeros((), device=x.device)
        dx = torch.empty_like(x, dtype=dtype)
        dw = torch.zeros_like(weight)
        counts, targets = split_ignored(targets)
        keep = counts.unsqueeze(-1)  # (N, 1)
        with torch.autocast(device_type, enabled=False):
            for rows in row_slices(x, len(weight)):
                x_slice = x[rows].where(keep[rows], 0).to(dtype)  # rows that do not count add 0 to dw
                logits = head(x_slice, w)  # (n, V)
                if softcap:  # the derivative of tanh; 0 where logits are -inf
                    slope = (1 - (logits / softcap).square()).clamp_(min=0)
                log_probs = torch.log_softmax(logits, dim=-1, out=logits)  # in place: it is large
                correct = targets[rows].unsqueeze(-1)  # (n, 1)
                at_correct = log_probs.gather(-1, correct)  # (n, 1)
                loss -= at_correct.where(keep[rows], 0).sum()
                # d loss / d logits = softmax - one_hot, for the sum of the losses: dividing by N here would
                # underflow in fp16. Overwriting the correct column instead of subtracting from it saves a
                # compiled 16-bit version from storing logits in fp32
                dlogits = log_probs.exp_().to(dtype)
                dlogits.scatter_(-1, correct, (at_correct.exp() - 1).to(dtype))
                if softcap:
                    dlogits *= slope
                dx[rows] = gradient_of_x(dlogits, w)
                if dtype == dw.dtype:
                    dw.addmm_(dlogits.t(), x_slice)  # needs no second matrix of this size
                elif dtype == torch.float16:
                    scale = scale_for_sum(x_slice)
                    dw += (dlogits.t() @ (x_slice * scale)).float() / scale
                else:  # adding up many slices in 16 bits would lose digits
                    dw += dlogits.t() @ x_slice
        ctx.save_for_backward(dx.masked_fill_(~keep, 0), dw, counts)
        ctx.x_dtype = x.dtype
        return mean_of_counted(loss / len(x), counts)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # with create_graph=True, but dx and dw were computed without a graph
            raise RuntimeError("the loss of model(idx, targets) has no second derivative: compute it with "
                               "F.cross_entropy from model(idx)[0], and run that model, uncompiled, under "
                               "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)")
        dx, dw, counts = ctx.saved_tensors
        scale = mean_of_counted(grad / len(dx), counts, at_least=1)
        return dx.mul_(scale).to(ctx.x_dtype), dw.mul_(scale), None, None, None


def gradient_of_x(dlogits, w):
    """The gradient of x, (n, C), from that of logits = x @ w.T, (n, V), and w (V, C)."""
    return (w.t() @ dlogits.t()).t()  # = dlogits @ w, which is slower on a CPU


def scale_for_sum(x):
    """A power of two s, as a scalar tensor, such that the sum of the rows of s x does not overflow in fp16.

    x: (n, C) in fp16. This holds even if each row is first multiplied by a factor between -1 and 1.
    """
    largest_sum = len(x) * x.abs().amax().float()
    return torch.exp2(-torch.log2(largest_sum / 2**15).ceil().clamp(min=0))


def row_slices(x, vocab_size):
    """Slices of the rows of x (N, C) whose logits are at most LOGITS_AT_ONCE (but at least 16 rows).

    There are as few as possible, because each one reads all weights of the head. They have equal sizes, which
    are multiples of 16 rows: dx needs the logits transposed, and their rows then start at multiples of 16
    bytes, which a GPU reads faster.
    """
    blocks = max(1, math.ceil(len(x) / 16))
    at_once = max(1, LOGITS_AT_ONCE.get(x.device.type, 2**25) // (16 * vocab_size))
    step = 16 * math.ceil(blocks / math.ceil(blocks / at_once))
    return [slice(start, start + step) for start in range(0, len(x), step)]
