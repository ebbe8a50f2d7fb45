"""The validation loss: one number for any number of ranks, in nats per token and bits per byte."""

import contextlib
import math

import numpy as np
import torch

from kit.device import to_device, without_cudnn_attention
from kit.sharding import is_sharded, whole_copy


@contextlib.contextmanager
def inference(raw_model, precision, ranks):
    """A context that yields the model to evaluate, in eval mode and in the precision of training.

    It is raw_model or, if that is sharded, a whole copy, whose weights are freed after the body. All ranks
    must call this. Afterwards raw_model is in training mode again.
    """
    model = whole_copy(raw_model, ranks).eval()
    try:
        with precision.autocast, without_cudnn_attention():
            yield model
    finally:
        if model is not raw_model:
            model.to("meta")  # the caller's variable would keep the weights in memory
        raw_model.train()


class Validation:
    """The mean loss on some windows of the val split."""

    def __init__(self, loader, windows, precision, ranks, tokenizer=None):
        """loader: a DataLoaderLite of the val split. windows: a range of its windows.

        tokenizer: a tiktoken.Encoding, if it is known.
        """
        self.loader, self.windows, self.precision, self.ranks = loader, windows, precision, ranks
        self.bytes_per_token = None
        if tokenizer:  # a loss per byte of text can be compared across tokenizers
            targets = np.concatenate([loader.window(n)[1:] for n in windows])
            ids, counts = np.unique(targets[targets != tokenizer.eot_token], return_counts=True)
            sizes = [len(tokenizer.decode_single_token_bytes(i)) for i in ids.tolist()]
            self.bytes_per_token = (counts * sizes).sum() / len(targets)

    @torch.no_grad()
    def batch_loss(self, model, batch):
        """The mean loss of a batch in eval mode, a scalar tensor. Leaves the model in training mode."""
        model.eval()
        x, y = (to_device(tokens, self.ranks.device) for tokens in batch)
        with self.precision.autocast:
            _, loss = model(x, y)
        model.train()
        return loss.float()

    def loss(self, compiled, raw_model, before_batch):
        """The mean loss, in nats per token. All ranks must call it.

        compiled: used for full batches; any other shape would be compiled anew, so raw_model takes it.
        before_batch: called equally often on every rank; it may raise to stop.
        """
        B, rank, world_size = self.loader.B, self.ranks.rank, self.ranks.world_size
        losses = [torch.zeros((), device=self.ranks.device)]
        for first in range(0, len(self.windows), B * world_size):
            before_batch()
            windows = mine = self.windows[first + rank * B : first + rank * B + B]
            if is_sharded(raw_model) and not mine:
                windows = self.windows[:1]  # all ranks must take part; this loss will not count
            if windows:
                model = compiled if len(windows) == B else raw_model
                loss = self.batch_loss(model, self.loader.batch(windows[0], len(windows)))
                losses.append(loss * len(mine))
        self.ranks.wait_for_gpu()
        total = torch.stack(losses).cpu().double().sum()
        return self.ranks.sum(total).item() / len(self.windows)

    def bits_per_byte(self, loss):
        """A loss in nats per token as bits per byte of text; None without a tokenizer."""
        return self.bytes_per_token and loss / self.bytes_per_token / math.log(2)
