"""What training logs and prints: steps, evaluations, a summary at the end, and errors."""

import contextlib
import math
import shlex
import sys
import threading

from tqdm import tqdm

from kit.device import name_of, out_of_memory
from kit.files import UNUSABLE_PATH, UserError, count, first_line
from kit.ranks import explain_lost_rank
from kit.scores import with_error


class Report:
    """Writes the numbers of a run to its log and prints them.

    On a terminal one line shows the latest step; elsewhere there is a line every --log_every steps.
    """

    def __init__(self, args, raw_model, precision, run, ranks):
        self.args, self.raw_model, self.precision = args, raw_model, precision
        self.run, self.ranks = run, ranks
        self.steps, self.mean_seconds, self.loss = 0, 0.0, math.nan
        self.line = on_terminal(ranks, bar_format="{desc}")

    def step(self, step, loss, lr, norm, seconds):
        """Report an optimizer step. seconds: its duration."""
        tokens_per_second = self.args.total_batch_size / seconds
        self.run.log(step, train=loss, norm=norm, lr=lr, **{"tok/s": tokens_per_second})
        mfu = self.raw_model.estimate_mfu(tokens_per_second / self.ranks.world_size,
                                          self.args.sequence_length, name_of(self.ranks.device))
        mfu = "" if mfu is None or self.precision.name == "float32" else f"mfu {mfu:.1%} | "
        # a running mean over about ten steps makes eta steady. The first step is slow and does not count
        self.steps, self.loss = self.steps + 1, loss
        keep = 0.9 if self.steps > 2 else 0.0
        self.mean_seconds = keep * self.mean_seconds + (1 - keep) * seconds
        eta = duration(self.mean_seconds * (self.args.max_steps - step - 1))
        if not self.line.disable:
            self.line.set_description_str(f"step {step} of {self.args.max_steps} | loss {loss:.3f} | "
                                          f"{tokens_per_second:,.0f} tokens/s | {mfu}eta {eta}")
        elif self.args.log_every and (step % self.args.log_every == 0 or step == self.args.max_steps - 1):
            self.ranks.say(f"step {step:5d} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | dt "
                           f"{1000 * seconds:.0f} ms | tok/s {tokens_per_second:,.0f} | {mfu}eta {eta}")

    def val_loss(self, name, step, loss, bits):
        """Report a validation loss, and its bits per byte if they are known. name: what was evaluated."""
        self.run.log(step, val=loss)
        message = f"{name}: val loss {loss:.4f} nats per token"
        if bits is not None:
            self.run.log(step, val_bpb=bits)
            message += f", {bits * math.log(2):.4f} nats ({bits:.4f} bits) per byte"
        self.ranks.say(message)

    def hellaswag(self, name, step, result):
        """Report a result of `hellaswag.evaluate`."""
        self.run.log(step, hella=result["acc_norm"])
        self.ranks.say(f"{name}: HellaSwag acc_norm {with_error(result, 'acc_norm')} on "
                       + count(result["n"], "example"))

    def summary(self, progress, data):
        """Say how the run ended, where its results are, and which commands go on from there.

        progress: a checkpoint.Progress. data: train_gpt2.Data.
        """
        self.line.close()
        say, log_dir = self.ranks.say, self.run.log_dir
        losses = [f"training loss {self.loss:.4f}"] if self.steps else []
        if progress.val_loss is not None:
            losses.append(f"validation loss {progress.val_loss:.4f}")
        say("finished" + ": " * bool(losses) + ", ".join(losses))
        saved = [*log_dir.glob("best"), *sorted(log_dir.glob("ckpt_*"))]
        for what, path in (("model", saved and saved[-1]), ("curves", log_dir / "curves.png"),
                           ("numbers", log_dir / "log.txt")):
            if path and path.exists():
                say(f"  {what + ':':<9}{path}")
        if not saved:
            say("  the model was not saved, because --save_every and --val_every are 0")
            return
        model = shlex.quote(str(log_dir))
        if data.tokenizer:
            say(f"next: python sample.py -m {model} -p {shlex.quote(self.args.sample_prompt)}")
        if data.examples:
            file = self.args.hellaswag_data
            file = f" --hellaswag_data {shlex.quote(file)}" if file else ""
            say(f"      python hellaswag.py -m {model}{file}")


def on_terminal(ranks, **settings):
    """A tqdm line that updates itself, if this is rank 0 on a terminal; else one that shows nothing."""
    # nrows: tqdm shows nothing on a terminal that does not know its height, as in some containers
    return tqdm(file=sys.stdout, leave=False, nrows=24, disable=None if ranks.is_first else True, **settings)


@contextlib.contextmanager
def waiting(message, ranks):
    """Announce what takes long; on a terminal a clock shows that it is under way."""
    ranks.say(message)
    done = threading.Event()

    def tick():
        while not done.wait(1):
            clock.refresh()

    with on_terminal(ranks, bar_format="{elapsed}") as clock:
        if not clock.disable:
            threading.Thread(target=tick, daemon=True).start()
        try:
            yield
        finally:
            done.set()


def duration(seconds):
    """A duration as text: 2h05m, 12m or 40s."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m"


@contextlib.contextmanager
def explain_errors(timeout):
    """Turn what may go wrong around a run into one line with the remedy. timeout: --timeout, in seconds."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise UserError("out of memory: halve --micro_batch_size (the batches stay the same), or train a "
                            "smaller model") from error
        explanation = explain_lost_rank(error, timeout)
        if explanation is None:
            raise
        sys.exit(f"error: {explanation}; continue with --resume")
    except OSError as error:
        if error.errno in UNUSABLE_PATH:
            raise
        sys.exit(f"error: {first_line(error)}. All checkpoints are complete: fix this, then use --resume")
