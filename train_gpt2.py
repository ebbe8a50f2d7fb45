"""Train a GPT-2, from the first token to the finished model.

    python train_gpt2.py @configs/demo.txt                     # a small one on a laptop, no network needed
    python train_gpt2.py                                       # the 124M on one GPU, or on the CPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py     # the same run on eight GPUs: the same batches

The defaults are GPT-2 124M on FineWeb-Edu with the hyperparameters of the GPT-3 paper (table 2.1 and appendix
B, https://arxiv.org/abs/2005.14165). After any interruption, the same command with --resume continues the
run; on a CPU the result is bit-identical. Read `train` first; the functions above it set it up.
"""

import argparse
import os

from kit import flags, recipe
from kit.flags import MODEL, Parser, from_command_line, integer, integer_or_auto, number, parse_with_configs


def parse_args(argv=None):
    parser = Parser(
        description="Train a GPT-2. An interval N means at step 0, every N steps and at the end; 0: never.",
        usage="python train_gpt2.py [@configs/NAME.txt] [--flag value ...]",
        aliases={"-m": "--init_from", "--model": "--init_from"},
    )
    switch, interval = argparse.BooleanOptionalAction, integer(0)

    add = parser.add_argument_group("run").add_argument
    add("--data_dir", metavar="DIR",
        help="shards made by fineweb_edu.py (default: edu_fineweb10B; with --demo_data: data/demo)")
    add("--data_tokenizer", metavar="NAME", help="tokenizer of shards without a manifest: gpt2, or a file")
    add("--demo_data", action=switch, default=False, help="train on Python's own documentation")
    add("--log_dir", metavar="DIR", default="log", help="directory of log.txt, run.json and the checkpoints")
    add("--resume", action="store_true", help="continue from the newest valid checkpoint of log_dir")
    add("--allow_change", nargs="+", metavar="FLAG", choices=recipe.CHANGEABLE, default=(),
        help=f"settings that --resume may change: {', '.join(recipe.CHANGEABLE)}")
    add("--init_from", metavar="MODEL", help=f"start from the weights and shape of {MODEL}")
    add("--eval_only", action="store_true",
        help="evaluate and sample from log_dir's newest checkpoint, or the model of --init_from; no training")
    add("--plan", nargs="?", type=integer(1), const=1, metavar="GPUS",
        help="print what the run needs on this many GPUs (default: 1): memory, disk, time; no training")
    add("--plan_mfu", type=number(0.01, 1), metavar="X", help="MFU that --plan assumes (default: llm.c's)")
    add("-d", "--device", help="cuda, mps or cpu (default: auto-detected)")
    add("--dtype", choices=("bfloat16", "float16", "float32"),
        help="matmul dtype (default: bfloat16 on CUDA GPUs that have it, float16 on others, else float32; "
             f"{flags.bfloat16_on_this_cpu()})")
    add("--compile", action=switch, help="torch.compile the model (default: yes, but not on mps)")
    # the modes with CUDA graphs overwrite the gradient of the previous micro-batch
    add("--compile_mode", choices=("max-autotune-no-cudagraphs",),
        help="torch.compile's mode: longer compilation, perhaps faster steps")
    add("--checkpoint_activations", action=switch, default=False,
        help="compute each block again in the backward pass: less memory, more time, the same results")
    add("--shard", action=switch, default=False,
        help="split weights, gradients and optimizer over the ranks (FSDP2), for models that don't fit on "
             "one GPU; without it, each rank has all of them (DDP)")
    add("--timeout", type=number(1, 1e8), default=600, help="seconds until a silent rank counts as lost")
    add("--micro_batch_size", type=integer_or_auto(1), default=32, metavar="N",
        help="sequences per forward pass and rank, or auto: the largest power of two that fits into memory; "
             "the total batch stays the same")
    recipe.add_flags(parser)
    add = parser.add_argument_group("evaluation, samples and checkpoints").add_argument
    add("--val_every", type=interval, default=250, help="validation interval")
    add("--hellaswag_every", type=interval, default=250, help="interval of HellaSwag evaluations")
    add("--hellaswag_data", metavar="FILE", help="HellaSwag examples (default: downloaded)")
    add("--sample_every", type=interval, default=250, help="interval of samples (none at step 0)")
    add("--sample_prompt", metavar="TEXT", default="Hello, I'm a language model,", help="prompt for samples")
    add("--save_every", type=interval, default=1000, help="interval of checkpoints (none at step 0)")
    add("--profile", type=interval, default=0, metavar="N",
        help="profile N training steps: log_dir/profile.txt and a trace")
    add("--background", action=switch,
        help="save and draw in a thread while training goes on, which takes CPU memory for a copy of weights "
             "and optimizer (default: only on CUDA)")
    add("--keep", type=integer(2), default=2, help="number of newest checkpoints to keep")
    add("--keep_every", type=interval, default=0, help="interval of checkpoints that are never removed")
    add("--skip_bad_steps", type=interval, default=0,
        help="skip at most N steps whose loss or gradient is not finite, then stop")
    add("--stop_on_divergence", action="store_true",
        help="stop if the smoothed training loss rises far above its minimum or above a uniform guess's "
             "(default: a warning)")
    add("--log_every", type=interval, default=10,
        help="print a line every N steps; a terminal shows one line that is updated; log.txt has every step")
    add("--plot", action=switch, default=True, help="draw log_dir/curves.png at each evaluation")
    add("--track", choices=("wandb", "trackio", "tensorboard"), help="also log to this tracker")
    args = parse_with_configs(parser, argv)

    args.data_dir = args.data_dir or ("data/demo" if args.demo_data else "edu_fineweb10B")
    args.crop_to = args.block_size if args.init_from else None
    args.block_size = args.block_size or args.sequence_length
    for flag in ("block_size", "val_tokens"):
        if getattr(args, flag) < args.sequence_length:
            parser.error(f"argument --{flag}: less than --sequence_length {args.sequence_length}")
    if args.demo_data and os.path.realpath(args.log_dir) == os.path.realpath(args.data_dir):  # deadlock
        parser.error(f"argument --log_dir: {args.log_dir} is the directory of the data; name another one")
    return args


if __name__ == "__main__":
    args = from_command_line(parse_args)

import contextlib
import math
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace

import numpy as np
import tiktoken
import torch
from tqdm import tqdm

import checkpoint
import fineweb_edu
import hellaswag
from checkpoint import Progress, Saver
from kit import plan, shards
from kit.device import (
    Precision,
    compile_model,
    compiles_by_default,
    fits_into_memory,
    to_device,
    tune,
    type_of,
)
from kit.divergence import remedy, skip_or_stop, watch_loss
from kit.files import UserError, first_line, out_of_memory, run_script, unbreakable_output
from kit.optim import state_tensors
from kit.profiling import Profile
from kit.ranks import Ranks, StopRequested, StopSignal
from kit.report import Report, explain_errors, waiting
from kit.run import Run
from kit.sharding import check_shardable, distribute, is_sharded, shard, sync_gradients, whole, zero_grad
from kit.validation import Validation, inference
from model import GPT, GPT2_TOKENS, GPTConfig
from sample import print_samples
from tokenizer import get_tokenizer


class DataLoaderLite:
    """An endless stream of windows of T + 1 tokens, cut from memory-mapped shards, in micro-batches.

    Window n depends on the seed alone. Each epoch contains every window once, shuffled within its shard (the
    val split is read in order). All ranks together consume consecutive windows, so the batch of a step
    depends neither on their number nor on the micro-batch size, and there is no state to save.
    """

    def __init__(self, B=32, T=512, process_rank=0, num_processes=1, split="train", data_dir="edu_fineweb10B",
                 seed=1337, vocab_size=65536):
        self.B, self.T = B, T
        self.process_rank, self.num_processes = process_rank, num_processes
        self.seed, self.shuffle, self.vocab_size = seed, split == "train", vocab_size
        self.shards = shards.open_shards(data_dir, split)
        self.counts = [max(0, (len(tokens) - 1) // T) for _, tokens in self.shards]  # windows per shard
        self.ends = np.cumsum(self.counts)
        self.num_windows = int(self.ends[-1])
        if self.num_windows == 0:
            longest = max(len(tokens) for _, tokens in self.shards)
            raise UserError(f"--sequence_length {T}: a window has {T + 1} tokens, the longest {split} shard "
                            f"of {data_dir} only {longest}; use a smaller value, or more text")
        self.position = 0  # windows consumed so far, by all ranks together
        self.prefetched = None, None  # the first window of a micro-batch that was read early, and that batch
        self.order_of, self.order = None, None  # the current shuffle: (epoch, shard) and its permutation

    def place(self, n):
        """Where window n of the stream is: (path, the shard's tokens, the window's offset in them)."""
        epoch, n = divmod(n, self.num_windows)
        shard = int(np.searchsorted(self.ends, n, side="right"))
        n -= int(self.ends[shard]) - self.counts[shard]  # counted from the beginning of the shard
        if self.shuffle:
            if self.order_of != (epoch, shard):
                self.order_of = (epoch, shard)
                self.order = np.random.default_rng((self.seed, epoch, shard)).permutation(self.counts[shard])
            n = int(self.order[n])
        return *self.shards[shard], n * self.T

    def window(self, n):
        """Window n of the stream: T + 1 ids, int64. Raises UserError for an id outside the vocabulary."""
        path, tokens, start = self.place(n)
        ids = tokens[start : start + self.T + 1].astype(np.int64)
        if ids.max() >= self.vocab_size:
            offset = start + int((ids >= self.vocab_size).argmax())
            raise UserError(f"{path} contains id {tokens[offset]} at offset {offset}, but the tokenizer's "
                            f"last id is {self.vocab_size - 1}: prepare the data again")
        return ids

    def batch(self, first, count):
        """The windows first, ..., first + count - 1 as inputs and targets, both (count, T)."""
        windows = torch.from_numpy(np.stack([self.window(n) for n in range(first, first + count)]))
        return windows[:, :-1], windows[:, 1:]

    def next_batch(self, takers=None):
        """This rank's next micro-batch: inputs and targets, both (B, T).

        takers: the number of ranks that take one, from rank 0 on (default: all); the others get None.
        """
        first, (prefetched, batch) = self.position + self.process_rank * self.B, self.prefetched
        takers = takers or self.num_processes
        self.position += takers * self.B
        if self.process_rank >= takers:
            return None
        return batch if prefetched == first else self.batch(first, self.B)

    def micro_batches(self, count, before_each):
        """Deal `count` micro-batches to the ranks in rounds. Yield this rank's, and whether it is the last.

        The last round averages gradients, so it needs all ranks: if `count` is not a multiple of their
        number, the last ranks get none in the first round. before_each: called each round; may raise to stop.
        """
        rounds = math.ceil(count / self.num_processes)
        for n in range(rounds):
            before_each()
            takers = count - (rounds - 1) * self.num_processes if n == 0 else None
            if batch := self.next_batch(takers):
                yield batch, n == rounds - 1

    def prefetch(self):
        """Read the next micro-batch early. An error is left to next_batch(): perhaps no step needs it."""
        first = self.position + self.process_rank * self.B
        with contextlib.suppress(UserError):
            self.prefetched = first, self.batch(first, self.B)


def get_lr(step, args):
    """The learning rate of a step: linear warm-up to max_lr, then down to min_lr at max_steps.

    "cosine": along a cosine. "wsd" (warm-up, stable, decay; https://arxiv.org/abs/2405.18392): constant, then
    linearly over the last decay_fraction of the steps.
    """
    if step < args.warmup_steps:
        return args.max_lr * (step + 1) / args.warmup_steps
    steps = args.max_steps - args.warmup_steps
    if args.schedule == "wsd":
        steps_to_go, decay_steps = args.max_steps - step, min(steps, args.decay_fraction * args.max_steps)
        return args.min_lr + min(1, steps_to_go / max(1, decay_steps)) * (args.max_lr - args.min_lr)
    progress = (step - args.warmup_steps) / max(1, steps)  # 0 to 1
    return args.min_lr + 0.5 * (1 + math.cos(math.pi * min(1, progress))) * (args.max_lr - args.min_lr)


# ------------------------------------------------------------------------------------------------- the set-up


@dataclass
class Data:
    """What a run reads: the loaders of both splits, their tokenizer, and HellaSwag's examples."""

    train: DataLoaderLite
    val: DataLoaderLite
    val_windows: range  # the windows that the validation loss reads
    tokenizer_name: str  # "gpt2" or the path of a tokenizer.json
    tokenizer: tiktoken.Encoding | None  # None: not available, so no samples, HellaSwag or bits per byte
    num_tokens: int  # ids of the tokenizer
    examples: list | None  # HellaSwag's, if it is evaluated
    identity: dict  # what identifies these shards and their tokenizer


def model_config(args):
    """The GPTConfig that the flags describe. Raises UserError for an impossible shape."""
    shape = {name: getattr(args, name) for name in recipe.SHAPE if getattr(args, name) is not None}
    try:
        return GPTConfig(dropout=args.dropout, **shape)
    except ValueError as error:
        raise UserError(f"--{error}") from error


def open_data(args, ranks):
    """Open the shards, their tokenizer and HellaSwag's examples; return the Data. Raises UserError."""
    if args.demo_data:
        with ranks.first_goes_ahead():
            fineweb_edu.prepare_demo(args.data_dir)
    tokenizer_name, tokenizer, num_tokens = open_tokenizer(args, ranks)

    train, val = (DataLoaderLite(args.micro_batch_size, args.sequence_length, ranks.rank, ranks.world_size,
                                 split, args.data_dir, args.seed, num_tokens) for split in ("train", "val"))
    with ranks.first_goes_ahead():
        if ranks.local_rank == 0:  # each machine may have a disk of its own
            shards.verify_changed(args.data_dir)
    ranks.barrier()  # another machine's disk may be slow
    if args.vocab_size and num_tokens > args.vocab_size and not args.init_from:
        raise UserError(f"--vocab_size {args.vocab_size}: the tokenizer of {args.data_dir} has {num_tokens} "
                        "ids; leave the flag out")
    first = args.val_start // args.sequence_length
    last = first + args.val_tokens // args.sequence_length
    val_windows, tokens = range(first, min(last, val.num_windows)), val.num_windows * args.sequence_length
    if not val_windows:
        raise UserError(f"--val_start {args.val_start}: the val split has only {tokens} tokens")
    if last > val.num_windows:
        ranks.say(f"validation reads {len(val_windows) * args.sequence_length:,} tokens: val has no more")

    examples = load_hellaswag(args, ranks) if tokenizer and args.hellaswag_every else None
    if ranks.max(examples is None):  # all ranks evaluate, or none
        examples = None
    identity = shards.identity(args.data_dir, tokenizer_name)
    ranks.check_same({**identity, "HellaSwag examples": hellaswag.fingerprint(examples or [])})
    return Data(train, val, val_windows, tokenizer_name, tokenizer, num_tokens, examples, identity)


def open_tokenizer(args, ranks):
    """The tokenizer of the shards: (its name, the tiktoken.Encoding or None, its number of ids)."""
    name = shards.tokenizer_of(args.data_dir, args.data_tokenizer)
    tokenizer, problem = None, "a rank lacks the tokenizer"
    verified = shards.read_manifest(args.data_dir) is not None
    known = verified or args.data_tokenizer or args.init_from or (args.vocab_size or math.inf) >= GPT2_TOKENS
    if not verified:
        ranks.say(f"{args.data_dir} has no manifest: its shards can't be verified, and their tokenizer is "
                  + (f"assumed to be {name}" if known else "unknown"))
    if not known:
        num_tokens, problem = args.vocab_size, f"{args.data_dir} does not name the tokenizer of its shards"
    else:
        with ranks.first_goes_ahead():
            try:
                tokenizer = get_tokenizer(name)
            except UserError as error:
                if name != "gpt2":
                    raise
                problem = error
        num_tokens = tokenizer.n_vocab if tokenizer else GPT2_TOKENS
    if ranks.max(tokenizer is None):
        ranks.say(f"no samples, HellaSwag or bits per byte: {problem}")
        tokenizer = None
    return name, tokenizer, num_tokens


def load_hellaswag(args, ranks):
    """HellaSwag's examples; None, with a message, if there is neither a file nor a network."""
    if args.hellaswag_data:
        return list(hellaswag.iterate_examples(args.hellaswag_data))
    with ranks.first_goes_ahead():
        try:
            return list(hellaswag.iterate_examples(hellaswag.download()))
        except UserError as error:
            ranks.say(f"HellaSwag is skipped: {error}")


def with_vocab_size(args, data, newest):
    """The flags, with the --vocab_size of the checkpoint `newest`, if any, or one that fits the data."""
    if args.vocab_size:
        return args
    saved = newest.meta.get("identity", {}) if newest else {}
    size = saved.get("vocab_size") or recipe.pad_vocabulary(data.num_tokens)
    return argparse.Namespace(**{**vars(args), "vocab_size": size})


def open_model(args, config, data, identity, newest, run, ranks):
    """The model to train, on its device: from the checkpoint `newest`, from --init_from, or a new one.

    newest: a checkpoint.Source or None. Raises UserError.
    """
    if newest:
        model, step, before = newest.model(), newest.meta["step"], newest.meta.get("identity", {})
        changes = recipe.check_identity(before, identity, args.allow_change, run.log_dir)
        if step > args.max_steps:
            raise UserError(f"--max_steps {args.max_steps}: {newest.path} is already at step {step}; use a "
                            "larger value")
        schedules = argparse.Namespace(**recipe.identity_of(before)), args
        rates = [f"{get_lr(step, schedule):.2e}" for schedule in schedules]
        if rates[0] != rates[1]:
            changes.append(f"learning rate at step {step} {rates[0]} -> {rates[1]}")
        ranks.say(*(f"changed: {change}" for change in changes), f"resuming {newest.path} at step {step}")
    elif args.init_from:
        model = checkpoint.load_to_train(args, data, ranks.say)
        shape = ", ".join(f"{name} {getattr(model.config, name)}" for name in recipe.SHAPE if name[:2] == "n_"
                          or getattr(model.config, name) != getattr(GPTConfig, name))  # unlike GPT-2's
        ranks.say(f"weights and shape are those of {args.init_from}: {shape}")
    else:
        torch.manual_seed(args.seed)
        try:
            model = GPT(replace(config, num_tokens=data.num_tokens))
        except (RuntimeError, TypeError) as error:  # torch's errors when memory does not suffice
            raise UserError(f"a model of --block_size {args.block_size} --vocab_size {args.vocab_size} "
                            f"--n_layer {args.n_layer} --n_embd {args.n_embd} does not fit into this "
                            f"machine's memory ({first_line(error)})") from error
    model.checkpoint_activations = args.checkpoint_activations
    model = shard(model, ranks) if args.shard and ranks.distributed else model.to(ranks.device)
    return model.train()


def open_optimizer(args, raw_model, newest, precision, ranks):
    """The optimizer. It and the gradient scaler of `precision` continue from the checkpoint, if any."""
    optimizer = raw_model.configure_optimizers(
        args.weight_decay, args.max_lr, ranks.device, args.optimizer, betas=(args.beta1, args.beta2),
        muon_scale=args.muon_scale, muon_momentum=args.muon_momentum, share=ranks.share)
    if newest:
        meta = newest.meta
        newest.load_optimizer(optimizer)
        if meta.get("dtype", precision.name) != precision.name:
            ranks.say(f"the run was in {meta['dtype']} before; it continues in {precision.name}")
        if meta.get("scaler") and precision.scaler.is_enabled():
            precision.scaler.load_state_dict(meta["scaler"])
    return optimizer


def with_micro_batch_size(args, data, raw_model, optimizer, precision, ranks):
    """The flags, with a number instead of --micro_batch_size auto: the largest power of two that fits."""
    if args.micro_batch_size != "auto":
        return args
    B, most = 1, args.total_batch_size // args.sequence_length
    if type_of(ranks.device) == "cpu":
        most = 4096 // args.sequence_length  # more gains nothing
    # not allocated yet: AdamW's two moments, unless the run is resumed, and DDP's buckets
    missing = 2 * (not state_tensors(optimizer)) + ranks.distributed
    while 2 * B <= most and recipe.divides(2 * B, args, ranks.world_size):
        batch = data.train.batch(0, 2 * B)
        if ranks.max(not fits_into_memory(raw_model, batch, precision, ranks.device, missing)):
            break
        B *= 2
    data.train.B = data.val.B = B
    return argparse.Namespace(**{**vars(args), "micro_batch_size": B})


def wrap_model(args, raw_model, data, validation, precision, ranks):
    """Compile the model and spread it over the ranks: (compiled, model).

    compiled: for batches of the training shape; the raw model itself if compilation is off or fails here.
    model: the same, and its backward pass averages gradients over the ranks.
    """
    batch = data.train.batch(0, args.micro_batch_size)  # any other shape would be compiled again

    def warm_up(model):
        x, y = (to_device(tokens, ranks.device) for tokens in batch)
        with precision.autocast:
            _, loss = model(x, y)
        loss.backward()
        zero_grad(model)

    compiled, failure = raw_model, None
    if compiles_by_default(ranks.device) if args.compile is None else args.compile:
        try:
            with waiting("compiling: a minute or more; --no-compile skips it", ranks):
                compiled = compile_model(raw_model, ranks.device, args.compile_mode)
                warm_up(compiled)
                if args.val_every and len(validation.windows) >= args.micro_batch_size:  # a graph of its own
                    validation.batch_loss(compiled, batch)
        except Exception as error:  # no C++ compiler, no headers, a GPU too old for Triton, ...
            if out_of_memory(error):
                raise
            failure = first_line(error)
            if is_sharded(raw_model):  # after an error inside, FSDP would drop gradients
                raise UserError(f"torch.compile failed with --shard ({failure}): use --no-compile") from error
        if ranks.max(failure is not None):
            ranks.say(f"torch.compile failed, training uncompiled: {failure or 'it failed on another rank'}")
            compiled = raw_model.train()  # a failed evaluation leaves it in eval mode
            raw_model.zero_grad()
    model = distribute(compiled, ranks)
    if ranks.distributed:
        # DDP regroups its gradient buckets in the second forward pass. Two passes on all ranks do that now,
        # so that sums are in the same order after a restart
        warm_up(model), warm_up(model)
    return compiled, model


# ---------------------------------------------------------------------------------------------------- samples


def sample(name, step, args, raw_model, data, precision, ranks):
    """Print four samples with top-k 50, as the published reproductions do: the prompt and 32 new tokens.

    name: what they are samples of. All ranks must call it; rank 0 prints.
    """
    generator = torch.Generator(ranks.device).manual_seed(args.seed + step)
    try:
        with inference(raw_model, precision, ranks) as model, tqdm.external_write_mode():
            if ranks.is_first:
                print(f"{name}: samples")
                print_samples(model, data.tokenizer, args.sample_prompt, 4, 32, generator, top_k=50)
    except ValueError as error:
        raise UserError(f"before step {step}: {error}. {remedy(precision)}") from error


# --------------------------------------------------------------------------------------------------- the run


def train(args, at_exit):
    """Train as the flags say. at_exit: an ExitStack that closes when the run ends."""
    ranks = Ranks(args.device, args.timeout)
    # each rank reads its own command line and files; on several machines, each from its own disk
    ranks.check_same({f"--{k}": v for k, v in vars(args).items() if k not in ("device", "log_dir")})
    tune(ranks.device, training=True)
    run = at_exit.enter_context(Run(args, ranks))
    # impossible flags are refused before any data is made
    recipe.count_micro_batches(args, ranks.world_size), model_config(args)
    data = open_data(args, ranks)
    newest = checkpoint.find_for_resume(run.log_dir, ranks) if run.resuming else None
    args, meta = with_vocab_size(args, data, newest), newest.meta if newest else {}
    identity = recipe.identity_of(vars(args)) | data.identity
    precision = Precision(ranks.device, args.dtype)
    check_shardable(args, precision)
    raw_model = open_model(args, model_config(args), data, identity, newest, run, ranks)
    optimizer = open_optimizer(args, raw_model, newest, precision, ranks)
    args = with_micro_batch_size(args, data, raw_model, optimizer, precision, ranks)
    micro_batches = recipe.count_micro_batches(args, ranks.world_size)
    validation = Validation(data.val, data.val_windows, precision, ranks, args.val_every and data.tokenizer)
    report = Report(args, raw_model, precision, run, ranks)
    report.plan(micro_batches, data)
    compiled, model = wrap_model(args, raw_model, data, validation, precision, ranks)
    saver = Saver(args, identity, data.tokenizer_name, raw_model, precision, run, ranks)
    progress, start_step = Progress.of(meta), meta.get("step", 0)
    report.start(start_step, data, is_compiled=compiled is not raw_model)
    rendered = data.examples and hellaswag.render(data.examples, data.tokenizer, raw_model.config.block_size)
    profile = at_exit.enter_context(Profile(args.profile, run.log_dir, ranks))
    data.train.position = start_step * args.total_batch_size // args.sequence_length
    stop = at_exit.enter_context(StopSignal(ranks))

    def due(interval):
        return interval > 0 and (progress.step % interval == 0 or progress.step == args.max_steps)

    try:
        for step in range(start_step, args.max_steps + 1):
            progress.step = step
            run.background.check()  # a failed save ends the run
            # dropout draws from (seed, step, rank), so a resumed run needs no random state from a checkpoint
            torch.manual_seed(hash((args.seed, step, ranks.rank)) % 2**63)

            # once in a while: validation loss, HellaSwag, curves, samples, a checkpoint
            name = args.init_from if args.eval_only else f"step {step}"
            if due(args.val_every):
                progress.val_loss = validation.loss(compiled, raw_model, before_batch=stop.check)
                report.val_loss(name, step, progress.val_loss, validation.bits_per_byte(progress.val_loss))
                if progress.val_loss < progress.best_val and step > 0:
                    progress.best_val = progress.val_loss
                    saver.save("best", progress)
            if data.examples and due(args.hellaswag_every):
                with inference(raw_model, precision, ranks) as whole_model:
                    result = hellaswag.evaluate(whole_model, data.tokenizer, data.examples, ranks=ranks,
                                                before_batch=stop.check, rendered=rendered)
                report.hellaswag(name, step, result)
            if due(args.val_every) or due(args.hellaswag_every):
                run.report(step, progress.val_loss if due(args.val_every) else None)
            if data.tokenizer and due(args.sample_every) and (step > 0 or args.eval_only):
                sample(name, step, args, raw_model, data, precision, ranks)
            # a resumed run does not save its first step again, unless a stop saved it before its evaluation
            saved = step == start_step and progress.val_loss == meta.get("val_loss")
            if (due(args.save_every) or due(args.keep_every)) and step > 0 and not saved:
                saver.save(f"ckpt_{step:06d}", progress, optimizer)
            if step == args.max_steps:  # this extra lap only evaluates and saves the finished model
                break

            # one optimizer step on the mean gradient of all micro-batches
            started = time.perf_counter()
            loss = torch.zeros((), device=ranks.device)
            for batch, is_last in data.train.micro_batches(micro_batches, before_each=stop.check):
                x, y = (to_device(tokens, ranks.device) for tokens in batch)
                sync_gradients(model, on=is_last)
                with precision.autocast:
                    _, micro_loss = model(x, y)
                # backward() sums, ranks are averaged: we want the mean of all micro-batches
                micro_loss = micro_loss / (micro_batches / ranks.world_size)
                precision.scaler.scale(micro_loss).backward()
                loss += micro_loss.detach()
                data.train.prefetch()  # while a GPU computes
            precision.scaler.unscale_(optimizer)
            norm = whole(torch.nn.utils.clip_grad_norm_(raw_model.parameters(), args.grad_clip or math.inf))
            # the only wait for the GPU: values that are not finite must not reach the weights
            loss, norm = ranks.read(torch.stack([ranks.mean(loss), norm]))
            lr = get_lr(step, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # in fp16 an infinite norm is normal: the scaler skips the step and continues with a smaller scale
            finite = math.isfinite(loss) and (math.isfinite(norm) or precision.scaler.get_scale() > 1)
            if finite:
                precision.scaler.step(optimizer)
            else:
                skip_or_stop(progress, loss, norm, args, data.train, raw_model, precision, run, ranks)
            precision.scaler.update()
            zero_grad(model)
            if finite:
                report.step(step, loss, lr, norm, seconds=time.perf_counter() - started)
                watch_loss(progress, loss, args, data.num_tokens, ranks)
            profile.step()
    except StopRequested as request:
        if progress.step > start_step or not newest:  # a resumed run repeats the unfinished step
            saver.save(f"ckpt_{progress.step:06d}", progress, optimizer)
        run.background.wait()
        number = signal.Signals(request.args[0])
        ranks.say(f"stopped by {number.name} before step {progress.step}; continue with the same "
                  "command and --resume")
        ranks.leave()
        sys.exit(128 + number)
    run.background.wait()
    ranks.leave()
    if not args.eval_only:
        report.summary(progress, data)


def main(args):
    """Train. --eval_only: evaluate only, as a run of zero steps with a temporary log directory."""
    if args.plan:
        print(*plan.lines(plan.make(args, model_config(args), args.plan)), sep="\n")
        return
    with unbreakable_output(), contextlib.ExitStack() as at_exit, explain_errors(args.timeout):
        if args.eval_only:
            source = args.init_from or str(checkpoint.resolve(args.log_dir))
            log_dir = at_exit.enter_context(tempfile.TemporaryDirectory())
            evaluation = dict(init_from=source, log_dir=log_dir, max_steps=0, resume=False, track=None)
            args = argparse.Namespace(**{**vars(args), **evaluation})
        train(args, at_exit)


if __name__ == "__main__":
    run_script(main, args)
