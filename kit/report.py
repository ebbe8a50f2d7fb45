"""What training logs and prints: steps and evaluations."""

import math

from kit.device import name_of


class Report:
    """Writes the numbers of a run to its log and prints them."""

    def __init__(self, args, raw_model, precision, run, ranks):
        self.args, self.raw_model, self.precision = args, raw_model, precision
        self.run, self.ranks = run, ranks
        self.steps, self.mean_seconds = 0, 0.0

    def step(self, step, loss, lr, norm, seconds):
        """Report an optimizer step. seconds: its duration."""
        tokens_per_second = self.args.total_batch_size / seconds
        self.run.log(step, train=loss, norm=norm, lr=lr, **{"tok/s": tokens_per_second})
        mfu = self.raw_model.estimate_mfu(tokens_per_second / self.ranks.world_size,
                                          self.args.sequence_length, name_of(self.ranks.device))
        mfu = "n/a" if mfu is None or self.precision.name == "float32" else f"{mfu:.1%}"
        # eta is steady with a running mean over about ten steps. The first step is slow and does not count
        self.steps += 1
        keep = 0.9 if self.steps > 2 else 0.0
        self.mean_seconds = keep * self.mean_seconds + (1 - keep) * seconds
        eta = duration(self.mean_seconds * (self.args.max_steps - step - 1))
        self.ranks.say(f"step {step:5d} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | "
                       f"dt {1000 * seconds:.0f} ms | tok/s {tokens_per_second:,.0f} | mfu {mfu} | eta {eta}")

    def val_loss(self, name, step, loss, bits):
        """Report a validation loss, and its bits per byte if they are known. name: of the model."""
        self.run.log(step, val=loss)
        message = f"{name}: val loss {loss:.4f} nats per token"
        if bits is not None:
            self.run.log(step, val_bpb=bits)
            message += f", {bits * math.log(2):.4f} nats ({bits:.4f} bits) per byte"
        self.ranks.say(message)

    def hellaswag(self, name, step, result):
        """Report a result of `hellaswag.evaluate`."""
        self.run.log(step, hella=result["acc_norm"])
        self.ranks.say(f"{name}: HellaSwag acc_norm {result['acc_norm']:.4f} on {result['n']} examples")


def duration(seconds):
    """A duration as text: 2h05m, 12m or 40s."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m"
