"""The training loss without the whole logits in memory: cross-entropy of the head, slice by slice."""

import math

import torch

# logits held in memory at a time, as numbers of fp32: 128 MiB on a CPU, 1 GiB on an NVIDIA GPU
LOGITS_AT_ONCE = {"cpu": 2**25, "cuda": 2**28, "mps": 2**26}


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of head(x, weight), with only `LOGITS_AT_ONCE` of the logits in memory at a time.

    The loss is the last thing computed, so its gradient with respect to x and weight does not depend on
    anything later: each slice of logits is turned into gradients at once and dropped. Nothing is computed
    twice. The backward pass scales the gradients in place, so it can run once only.

    head: the matmul x @ weight.T; the gradients below are those of this function.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, head):  # (N, C), (V, C), (N,) -> scalar
        device_type = x.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
        w = weight.to(dtype)
        loss = torch.zeros((), device=x.device)
        dx = torch.empty_like(x, dtype=dtype)
        dw = torch.zeros_like(weight)
        with torch.autocast(device_type, enabled=False):
            for rows in row_slices(x, len(weight)):
                x_slice = x[rows].to(dtype)
                logits = head(x_slice, w).float()  # (n, V)
                log_probs = torch.log_softmax(logits, dim=-1, out=logits)  # in place: it is large
                correct = targets[rows].unsqueeze(-1)  # (n, 1)
                at_correct = log_probs.gather(-1, correct)  # (n, 1)
                loss -= at_correct.sum()
                # d loss / d logits = softmax - one_hot, for the sum of the losses: dividing by N here would
                # underflow in fp16. Overwriting the correct column, not subtracting from it, lets a compiled
                # 16-bit version keep no logits in fp32
                dlogits = log_probs.exp_().to(dtype)
                dlogits.scatter_(-1, correct, (at_correct.exp() - 1).to(dtype))
                dx[rows] = (w.t() @ dlogits.t()).t()  # = dlogits @ w, which is slower on a CPU
                if dtype == dw.dtype:
                    dw.addmm_(dlogits.t(), x_slice)  # needs no second matrix of this size
                else:  # adding up many slices in 16 bits would lose digits
                    dw += dlogits.t() @ x_slice
        ctx.save_for_backward(dx, dw)
        ctx.x_dtype = x.dtype
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        scale = grad / len(dx)
        return dx.mul_(scale).to(ctx.x_dtype), dw.mul_(scale), None, None


def row_slices(x, vocab_size):
    """Slices of the rows of x (N, C) whose logits are at most LOGITS_AT_ONCE (but 16 rows at least).

    As few slices as possible, because each one reads all weights of the head, and of equal size, in steps of
    16 rows: transposed, as for dx, the rows of the logits then start at multiples of 16 bytes, which a GPU
    reads faster.
    """
    blocks = max(1, math.ceil(len(x) / 16))
    at_once = max(1, LOGITS_AT_ONCE.get(x.device.type, 2**25) // (16 * vocab_size))
    step = 16 * math.ceil(blocks / math.ceil(blocks / at_once))
    return [slice(start, start + step) for start in range(0, len(x), step)]
