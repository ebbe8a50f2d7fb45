"""What training logs and prints: steps, evaluations, a summary at the end, and errors."""

import contextlib
import math
import re
import shlex
import sys
import threading

import torch
from tqdm import tqdm

from kit import recipe, shards
from kit.device import attention_backend, memory_of, name_of, peak_memory, type_of
from kit.files import UNUSABLE_PATH, UserError, count, epochs_text, first_line, out_of_memory
from kit.ranks import explain_failed_exchange
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

    def plan(self, micro_batches, data):
        """Print what the run will do, and warn of flags that are probably a mistake.

        micro_batches: of a step, over all ranks. data: train_gpt2.Data.
        """
        args, ranks = self.args, self.ranks
        if args.eval_only:
            return
        tokens = data.train.num_windows * args.sequence_length
        epochs = args.max_steps * args.total_batch_size / tokens
        each, remainder = divmod(micro_batches, ranks.world_size)
        ranks.say(f"{args.total_batch_size:,} tokens per step = {count(args.micro_batch_size, 'sequence')} x "
                  f"{args.sequence_length} tokens x "
                  + (f"{micro_batches} micro-batches, {each} or {each + 1} on each of "
                     f"{ranks.world_size} ranks"
                     if remainder else
                     f"{count(ranks.world_size, 'rank')} x {count(each, 'micro-batch', 'es')}"))
        ranks.say(f"{count(args.max_steps, 'step')}, {epochs_text(epochs)}")
        if not (args.val_every or args.save_every or args.keep_every):
            ranks.say("warning: --save_every and --val_every are 0: this run will not save its model")
        if args.min_lr > args.max_lr:
            ranks.say(f"warning: --min_lr {args.min_lr:g} is above --max_lr {args.max_lr:g}: the learning "
                      "rate will rise after the warm-up")
        if epochs > 20:
            ranks.say(f"warning: the training split has only {tokens:,} tokens, so each is seen "
                      f"{epochs:,.0f} times; one epoch is --max_steps {math.ceil(args.max_steps / epochs)}")

    def start(self, step, data, is_compiled):
        """Record the start of the run; print its size, device and precision. data: train_gpt2.Data."""
        args, raw_model, run, ranks, precision = (self.args, self.raw_model, self.run, self.ranks,
                                                  self.precision.name)
        device_name = name_of(ranks.device)
        head_size = raw_model.config.n_embd // raw_model.config.n_head
        attention = attention_backend(ranks.device, getattr(torch, precision), head_size)
        shape = {name: getattr(raw_model.config, name) for name in recipe.SHAPE}  # --init_from changes it
        run.start(step, {**vars(args), **shape}, parameters=raw_model.num_params(),
                  flops_per_token=raw_model.flops_per_token(args.sequence_length),
                  world_size=ranks.world_size, device=ranks.device, device_name=device_name,
                  dtype=precision, attention=attention, compiled=is_compiled,
                  data_manifest=data.identity["data"],
                  data_source=shards.source_of(args.data_dir), tokenizer=data.identity["tokenizer"],
                  hellaswag_examples=data.examples and len(data.examples))
        ranks.say(f"{raw_model.num_params():,} parameters, {precision} on {ranks.device} ({device_name}), "
                  + ("compiled" if is_compiled else "not compiled")
                  + (f", attention: {attention}" if type_of(ranks.device) == "cuda" else ""))

    def step(self, step, loss, lr, norm, seconds):
        """Report an optimizer step. seconds: its duration."""
        tokens_per_second = self.args.total_batch_size / seconds
        self.run.log(step, train=loss, norm=norm, lr=lr, **{"tok/s": tokens_per_second})
        mfu = self.raw_model.estimate_mfu(tokens_per_second / self.ranks.world_size,
                                          self.args.sequence_length, name_of(self.ranks.device))
        mfu = "" if mfu is None or self.precision.name == "float32" else f"mfu {mfu:.1%} | "
        # a running mean over about ten steps makes eta steady. The first step is slow and does not count
        self.steps, self.loss = self.steps + 1, loss
        if self.steps == 2:  # the first one had no optimizer state yet
            memory, device = peak_memory(self.ranks.device), self.ranks.device
            self.run.add_facts(peak_memory_bytes=memory)
            if type_of(device) == "cuda":
                self.ranks.say(f"peak memory: {memory / 1e9:.2f} GB of {device}'s "
                               f"{memory_of(device) / 1e9:.0f} GB")
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
        """Say how the run ended, where its results are, and which commands to run next.

        progress: a checkpoint.Progress. data: train_gpt2.Data.
        """
        self.line.close()
        say, log_dir = self.ranks.say, self.run.log_dir
        losses = [f"training loss {self.loss:.4f}"] if self.steps else []
        if progress.val_loss is not None:
            losses.append(f"validation loss {progress.val_loss:.4f}")
        say("finished" + ": " * bool(losses) + ", ".join(losses))
        best = [*log_dir.glob("best")]
        saved = [*best, *sorted(log_dir.glob("ckpt_*"))]
        for what, path in (("model", saved and saved[-1]), ("curves", log_dir / "curves.png"),
                           ("numbers", log_dir / "log.txt")):
            if path and path.exists():
                say(f"  {what + ':':<9}{path}")
        if not saved:
            say("  the model was not saved, because --save_every and --val_every are 0")
            return
        model = shlex.quote(str(log_dir))
        if best and progress.val_loss is not None and progress.val_loss > progress.best_val + 0.01:
            say(f"  best:    {best[0]}, validation loss {progress.best_val:.4f}: the loss rose after it")
            model = shlex.quote(str(best[0]))
        if data.tokenizer:
            prompt = self.args.sample_prompt
            prompt = shlex.quote(prompt) if re.search(r'["$`\\!\n]', prompt) else f'"{prompt}"'
            say(f"next: python sample.py -m {model} -p {prompt}")
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
            raise UserError("out of memory: use a smaller --micro_batch_size, if it is above 1 (the batches "
                            "stay the same), --checkpoint_activations or a smaller model") from error
        explanation = explain_failed_exchange(error, timeout)
        if explanation is None:
            raise
        print(f"error: {explanation}", file=sys.stderr, flush=True)  # torchrun may kill this rank soon
        sys.exit(1)
    except OSError as error:
        if error.errno in UNUSABLE_PATH:
            raise
        sys.exit(f"error: {first_line(error)}. All checkpoints are complete: fix this, then use --resume")
