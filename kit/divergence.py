"""Non-finite steps and diverging runs: detect, report, skip or stop."""

import math
import sys

import torch

from kit.device import to_device
from kit.files import UserError
from kit.sharding import whole_copy

SMOOTHING = 0.98  # of the training loss: a mean over about 50 steps
# nats above its minimum at which the smoothed loss has diverged; half as many above a uniform guess's loss
RISE = 1.0


def remedy(precision):
    """What helps if a loss, gradient or weight is not finite, as a sentence. precision: the run's."""
    dtype = "" if precision.name == "float32" else " or --dtype float32"
    return f"Use --resume with --skip_bad_steps N{dtype}, or start again with a lower --max_lr"


def watch_loss(progress, loss, args, num_tokens, ranks):
    """Update the smoothed training loss of a run, and say once if it has diverged.

    progress: a checkpoint.Progress. num_tokens: of the tokenizer; a uniform guess has loss ln num_tokens.
    Raises UserError for a diverged run if --stop_on_divergence is set.
    """
    if progress.smoothed is None:
        progress.smoothed = loss
    progress.smoothed += (1 - SMOOTHING) * (loss - progress.smoothed)
    progress.lowest = min(progress.lowest, progress.smoothed)
    steps_after_warmup, uniform = progress.step - args.warmup_steps, math.log(num_tokens)
    diverged = steps_after_warmup >= 0 and progress.smoothed > progress.lowest + RISE or (
        steps_after_warmup >= 50 and progress.smoothed > uniform + RISE / 2)
    if diverged and not progress.diverged:
        message = (f"step {progress.step}: the run has diverged: its smoothed training loss is "
                   f"{progress.smoothed:.2f}, its minimum was {progress.lowest:.2f}, a uniform guess gives "
                   f"{uniform:.2f}. Usual causes: --max_lr too high, --warmup_steps too short, damaged data")
        if args.stop_on_divergence:
            raise UserError(f"{message}. Start again with a lower --max_lr, or from {args.log_dir}/best with "
                            "--init_from and another --log_dir")
        ranks.say(f"warning: {message}; use --stop_on_divergence to stop in this case")
    progress.diverged = diverged


def skip_or_stop(progress, loss, norm, args, loader, raw_model, precision, run, ranks):
    """Skip a step whose loss or gradient is not finite; end the run once --skip_bad_steps are used up.

    loader: the DataLoaderLite of the step's batch. To end it, raises UserError if the step fails again
    when it is repeated, else exits with status 1.
    """
    progress.skipped += 1
    found = ranks.gather(find_bad_window(progress.step, args, loader, raw_model, precision, ranks))
    description = f"step {progress.step} has loss {loss} and gradient norm {norm}; " + (
        "; ".join(found) or "when its sequences are computed again one by one, all are finite")
    if progress.skipped > args.skip_bad_steps:
        if found:  # it would happen again: the user has to decide
            raise UserError(f"{description}. {remedy(precision)}")
        sys.exit(f"error: {description}. This is probably a hardware fault; continue with --resume")
    run.log(progress.step, skipped=progress.skipped)
    ranks.say(f"skipped: {description}")


def find_bad_window(step, args, loader, raw_model, precision, ranks):
    """The first window that makes this rank's loss or gradient infinite or NaN, as text; or None.

    The windows of the step are computed again, one by one, and their gradients added up: a sum can overflow
    although each gradient is finite.
    """
    count = args.total_batch_size // args.sequence_length  # windows of a step
    windows = [step * count + i for i in range(count)
               if i // args.micro_batch_size % ranks.world_size == ranks.rank]
    model = whole_copy(raw_model, ranks).train()
    model.zero_grad()
    for n in windows:
        x, y = (to_device(tokens, ranks.device) for tokens in loader.batch(n, 1))
        with precision.autocast:
            _, loss = model(x, y)
        (loss / len(windows)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
        if not (loss.isfinite() and norm.isfinite()):
            path, _, start = loader.place(n)
            return (f"rank {ranks.rank}: loss {loss.item()}, gradient norm {norm.item()} "
                    f"at offset {start} of {path}")
