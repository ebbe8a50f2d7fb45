"""Train a GPT-2, from the first token to the finished model.

    python train_gpt2.py @configs/demo.txt                     # a small one on a laptop, no network needed
    python train_gpt2.py                                       # the 124M on one GPU, or on the CPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py     # the same run on eight GPUs: the same batches

The defaults are GPT-2 124M on FineWeb-Edu with the hyperparameters of the GPT-3 paper (table 2.1 and appendix
B, https://arxiv.org/abs/2005.14165). Interrupted in any way, the same command with --resume goes on as if
nothing had happened. `train` is the whole run and reads from top to bottom.
"""

import argparse
import shlex

# of the flags that make a run what it is, those that a person may want to change in its middle
CHANGEABLE = ("max_steps", "max_lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Train a GPT-2. An interval N: at step 0, every N steps and at the end; 0: never.",
        usage="python train_gpt2.py [@configs/NAME.txt] [--flag value ...]",
        fromfile_prefix_chars="@",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def split_line(line):
        """The flags of a config file's line, written as on a command line; # begins a comment."""
        if "\0" in line:  # no command line can hold one, and no path
            parser.error(f"config line {line!r}: holds a zero byte")
        try:
            return shlex.split(line, comments=True)
        except ValueError as error:
            parser.error(f"config line {line!r}: {error}")

    parser.convert_arg_line_to_args = split_line
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    # the run
    add("--data_dir", default="edu_fineweb10B", help="shards made by fineweb_edu.py")
    add("--demo_data", action="store_true", help="make data_dir first, from Python's own documentation")
    add("--log_dir", default="log", help="where log.txt, run.json and the checkpoints go")
    add("--resume", action="store_true", help="go on from the newest valid checkpoint of log_dir")
    add("--allow_change", nargs="+", metavar="FLAG", choices=CHANGEABLE, default=(),
        help=f"what --resume may change of the run: {', '.join(CHANGEABLE)}")
    add("--init_from", metavar="MODEL",
        help="fine-tune gpt2, ..., gpt2-xl, a Hugging Face directory, a checkpoint; its shape counts")
    add("--eval_only", action="store_true",
        help="measure log_dir's newest checkpoint, or --init_from, and sample from it; no training")
    add("--seed", type=int, default=1337, help="of weights, order of the data, dropout and samples")
    add("--device", help="cuda, mps or cpu; found by itself")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="of products; the device's best")
    add("--compile", action=switch, default=True, help="torch.compile the model")
    add("--timeout", type=float, default=600, help="seconds after which ranks give up on one that hangs")
    # the batch
    add("--max_steps", type=int, default=19073, help="optimizer steps: 10B tokens")
    add("--total_batch_size", type=int, default=524288, help="tokens in an optimizer step, over all ranks")
    add("--micro_batch_size", type=int, default=32, help="sequences at a time on a rank: costs memory only")
    add("--sequence_length", type=int, default=1024, help="tokens in a sequence")
    # the model
    add("--n_layer", type=int, default=12)
    add("--n_head", type=int, default=12)
    add("--n_embd", type=int, default=768)
    add("--vocab_size", type=int, default=50304, help="rows of the embedding, at least the tokenizer's ids")
    add("--block_size", type=int, help="the model's longest context; the sequence length unless given")
    add("--dropout", type=float, default=0.0)
    add("--bias", action=switch, default=True, help="in linear layers and LayerNorms")
    # the optimizer
    add("--max_lr", type=float, default=6e-4)
    add("--min_lr", type=float, default=6e-5, help="where the cosine ends")
    add("--warmup_steps", type=int, default=715, help="GPT-3's 375M tokens")
    add("--weight_decay", type=float, default=0.1)
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; 0 does not clip")
    add("--skip_bad_steps", type=int, default=0, help="steps with a gradient that is not finite to leave out")
    # once in a while
    add("--val_every", type=int, default=250, help="interval of the validation loss")
    add("--val_tokens", type=int, default=10485760, help="what it reads, from the start of the val split")
    add("--hellaswag_every", type=int, default=250, help="interval of HellaSwag")
    add("--hellaswag_data", metavar="FILE", help="a local .jsonl instead of the download")
    add("--sample_every", type=int, default=250, help="interval of samples")
    add("--sample_prompt", default="Hello, I'm a language model,")
    add("--save_every", type=int, default=1000, help="interval of checkpoints (none at step 0)")
    add("--keep", type=int, default=2, help="numbered checkpoints that stay, the newest")
    add("--keep_every", type=int, default=0, help="interval of checkpoints that stay for good")
    add("--plot", action=switch, default=True, help="draw log_dir/curves.png at each evaluation")
    add("--track", choices=("wandb", "trackio", "tensorboard"), help="show the figures of log.txt there, too")
    try:
        args = parser.parse_args(argv)
    except UnicodeDecodeError as error:
        parser.error(f"a config file is not UTF-8 text: {error}")
    except RecursionError:
        parser.error("a config file names itself with @")

    at_least = dict(max_steps=1, total_batch_size=1, micro_batch_size=1, sequence_length=1, val_tokens=1)
    at_least |= dict(keep=2, val_every=0, hellaswag_every=0, sample_every=0, save_every=0, warmup_steps=0)
    at_least |= dict(max_lr=0, min_lr=0, weight_decay=0, grad_clip=0, seed=0, keep_every=0, skip_bad_steps=0)
    at_least |= dict(timeout=1)
    for flag, least in at_least.items():
        value = getattr(args, flag)
        # beyond these sizes, products and durations overflow
        most = 2**63 if isinstance(value, int) else 1e8 if flag == "timeout" else 1e100
        if not least <= value < most:
            parser.error(f"argument --{flag}: must be at least {least} and less than {most}, not {value}")
    if args.block_size is None:
        args.block_size = args.sequence_length
    if args.block_size < args.sequence_length:
        parser.error(f"argument --block_size: less than --sequence_length {args.sequence_length}")
    if args.val_tokens < args.sequence_length:
        parser.error(f"argument --val_tokens: less than --sequence_length {args.sequence_length}")
    return args


if __name__ == "__main__":
    args = parse_args()  # before torch is imported, so that --help and a wrong flag answer at once

import contextlib  # noqa: E402
import ctypes  # noqa: E402
import datetime  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.rendezvous import rendezvous  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import checkpoint  # noqa: E402
import fineweb_edu  # noqa: E402
import hellaswag  # noqa: E402
import plot  # noqa: E402
import reference  # noqa: E402
import tracking  # noqa: E402
from files import UNUSABLE_PATH, UserError, first_line, locked, naming, run, sync  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from packed import onednn_is_faster  # noqa: E402
from record import keep_log_before, read_record, record_start  # noqa: E402
from sample import print_samples  # noqa: E402
from tokenizer import get_tokenizer  # noqa: E402

# the flags that make a run what it is: to resume with another value would be another run
IDENTITY = (
    "seed", "total_batch_size", "sequence_length", "n_layer", "n_head", "n_embd", "vocab_size", "block_size",
    "dropout", "bias", "val_tokens", *CHANGEABLE,
)

NOT_FINITE = "--resume with --skip_bad_steps or --dtype float32 goes on, a lower --max_lr starts anew"
LOST_RANK = re.compile("by peer|[Tt]imed out|Broken pipe")  # how gloo says that a process is gone or hangs


class DataLoaderLite:
    """An endless stream of windows of T + 1 tokens, cut from memory-mapped shards, in micro-batches.

    Window n is the same whoever asks for it: it follows from the seed alone. In each epoch every window comes
    once, shuffled inside its shard (the val split is read in order). All ranks together consume consecutive
    windows, so the batch of a step depends neither on their number nor on the micro-batch size, and there is
    no state to save.
    """

    def __init__(self, B=32, T=512, process_rank=0, num_processes=1, split="train", data_dir="edu_fineweb10B",
                 seed=1337, vocab_size=65536):
        self.B, self.T = B, T
        self.process_rank, self.num_processes = process_rank, num_processes
        self.seed, self.shuffle, self.vocab_size = seed, split == "train", vocab_size
        self.shards = fineweb_edu.open_shards(data_dir, split)
        self.counts = [max(0, (len(tokens) - 1) // T) for _, tokens in self.shards]  # windows, shard by shard
        self.ends = np.cumsum(self.counts)
        self.num_windows = int(self.ends[-1])
        if self.num_windows == 0:
            longest = max(len(tokens) for _, tokens in self.shards)
            raise UserError(f"--sequence_length {T}: a window takes {T + 1} tokens, the longest {split} "
                            f"shard of {data_dir} has {longest}")
        self.position = 0  # windows consumed so far, by all ranks together
        self.order_of, self.order = None, None  # the shuffle in use: (epoch, shard) and its permutation

    def place(self, n):
        """Where window n of the stream stands: (path, its tokens, where in them the window begins)."""
        epoch, n = divmod(n, self.num_windows)
        shard = int(np.searchsorted(self.ends, n, side="right"))
        n -= int(self.ends[shard]) - self.counts[shard]  # counted from the shard's beginning
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
            raise UserError(f"{path} holds id {tokens[offset]} at {offset}, the tokenizer ends at "
                            f"{self.vocab_size - 1}: prepare the data anew")
        return ids

    def batch(self, first, count):
        """The windows first, ..., first + count - 1 as inputs and targets, both (count, T)."""
        windows = torch.from_numpy(np.stack([self.window(n) for n in range(first, first + count)]))
        return windows[:, :-1], windows[:, 1:]

    def next_batch(self):
        """This rank's next micro-batch: inputs and targets, both (B, T)."""
        first = self.position + self.process_rank * self.B
        self.position += self.num_processes * self.B
        return self.batch(first, self.B)


def get_lr(step, args):
    """The learning rate of a step: linear warm-up to max_lr, then a cosine down to min_lr at max_steps."""
    if step < args.warmup_steps:
        return args.max_lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)  # 0 to 1
    return args.min_lr + 0.5 * (1 + math.cos(math.pi * min(1, done))) * (args.max_lr - args.min_lr)


def tune_host():
    """What every run wants of its machine; `main` calls it first, for importing this file changes nothing."""
    # glibc gives every large tensor back to the kernel when it is freed, and the next step pays for its pages
    # again. Never mmap (-4), never trim (-1): malloc.h. Other C libraries have no such call, or no need of it
    with contextlib.suppress(AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, -1)
    # MKL chooses the code of its vector functions at the first call. Two threads that make that call at once
    # can get different code, and results that differ in the last bits: let one thread make it.
    torch.zeros(64).exp()


def tune_products():
    """Have oneDNN compute the CPU's fp32 products where it is faster: on AMD's processors, twice as fast.

    torch takes it at the precision "medium", which allows bf16 inside. Only AMX would make use of that, and
    one product shows that fp32 stays fp32.
    """
    if onednn_is_faster():
        torch.set_float32_matmul_precision("medium")
        x = torch.full((256, 256), 1 + 2**-23)
        if not torch.equal(x @ torch.eye(256), x):
            torch.set_float32_matmul_precision("highest")


def compile_model(model, device_type):
    """The model under torch.compile, which happens at its first call."""
    if device_type == "cpu":
        import torch._functorch.config as partitioning

        # memory, of which a GPU has more: outputs of LayerNorm and GELU are computed again in the backward
        # pass, not kept; and compiled, the slices of logits would all be kept until then
        partitioning.ban_recompute_materialized_backward = False
        model.mean_loss = torch.compiler.disable(model.mean_loss)
        # the same bits every time: threads would add to one row of the embedding's gradient in any order
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a help for debugging, not free
        # speed: tanh by exp is three times as fast, and as exact once GELU has added 1 to it
        return torch.compile(model, options={"cpp.use_decompose_tanh": True})
    return torch.compile(model)


def setup_ranks(device=None, timeout=datetime.timedelta(minutes=10)):
    """Join the process group that torchrun announces, if it does: (device, rank, world_size).

    timeout: after which a rank gives up on another that does not answer.
    """
    device = checkpoint.pick_device(device)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and device == "cuda":
        device = checkpoint.pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if world_size > 1:
        # after a failure torchrun starts the ranks again with the same store, full of addresses of the dead
        store, *_ = next(rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return device, rank, world_size


@contextlib.contextmanager
def rank_zero_first(rank, world_size):
    """The body runs on rank 0, then on the others: one writes what all read."""
    if world_size > 1 and rank > 0:
        dist.barrier()
    yield
    if world_size > 1 and rank == 0:
        dist.barrier()


@contextlib.contextmanager
def advice(args):
    """What goes wrong around a run is told in one line, with the remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError("--micro_batch_size: out of memory; half of it gives the same result") from error
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.errno in UNUSABLE_PATH:
            raise
        sys.exit(f"error: {error}. What was saved before stands: mend that, and --resume goes on")
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not LOST_RANK.search(str(error)):
            raise
        sys.exit(f"error: rank {os.environ.get('RANK')} has lost another one, which has died or hung for "
                 f"--timeout {args.timeout:g} seconds ({first_line(error)}); --resume goes on")


class StopRequested(Exception):
    """SIGTERM or Ctrl-C, agreed on by all ranks. args[0] is the signal's number."""


def main(args):
    """The whole run; what it holds of the machine, it lets go of however it ends."""
    with contextlib.ExitStack() as at_exit, advice(args):
        if args.eval_only:  # a run of no steps from that model, whose log directory is thrown away
            args.init_from = args.init_from or str(checkpoint.resolve(args.log_dir))
            args.log_dir = at_exit.enter_context(tempfile.TemporaryDirectory())
            args.max_steps, args.resume, args.track = 0, False, None
        train(args, at_exit)


def train(args, at_exit):
    """Train as the flags say. at_exit: the ExitStack that puts things back behind it."""
    tune_host()
    timeout = datetime.timedelta(seconds=args.timeout)
    device, rank, world_size = setup_ranks(args.device, timeout)
    device_type = device.partition(":")[0]
    if device_type == "cpu":
        tune_products()
    ddp = world_size > 1
    # what ranks agree on besides gradients goes from CPU to CPU: no GPU is waited for
    control = dist.new_group(backend="gloo", timeout=timeout) if ddp else None

    def say(*words):
        if rank == 0:
            print(*words, flush=True)

    def largest(value):
        """The largest of all ranks' values."""
        value = torch.tensor(int(value))
        if ddp:
            dist.all_reduce(value, dist.ReduceOp.MAX, group=control)
        return value.item()

    def everyone(value):
        """All ranks' values that are not None, in the order of the ranks."""
        values = [value]
        if ddp:
            values = [None] * world_size
            dist.all_gather_object(values, value, group=control)
        return [value for value in values if value is not None]

    # a stop signal is remembered, and asked for where the model is whole. torchrun and schedulers send it to
    # ranks that have it already; a person who presses Ctrl-C again seconds later does not want to wait
    received = []

    def on_signal(number, frame):
        if received and number == signal.SIGINT and time.monotonic() - received[1] > 3:
            raise KeyboardInterrupt
        if not received:
            received.extend((number, time.monotonic()))

    def check_stop():
        number = largest(received[0] if received else 0)
        if number:
            raise StopRequested(number)

    log_dir = Path(args.log_dir)
    log_file = log_dir / "log.txt"
    if args.log_dir != args.log_dir.encode(errors="replace").decode():  # safetensors would not open it again
        raise UserError(f"--log_dir {args.log_dir}: its name is not UTF-8")
    if rank == 0:
        at_exit.enter_context(locked(log_dir))
    args.resume = bool(largest(args.resume or rank == 0 and restarted(log_dir)))
    if not args.resume and (checkpoint.numbered(log_dir) or log_file.exists() and log_file.stat().st_size):
        raise UserError(f"--log_dir {log_dir} holds a run: --resume goes on with it, another one starts anew")
    if args.track and rank == 0:
        tracking.check(args.track, log_dir)
    shape = {name: getattr(args, name) for name in ("n_layer", "n_head", "n_embd", "dropout", "bias")}
    try:
        config = GPTConfig(args.block_size, args.vocab_size, **shape)
    except ValueError as error:
        raise UserError(f"--{error}") from error

    # ----------------------------------------------------------------------------------------------- the data

    B, T = args.micro_batch_size, args.sequence_length
    together = B * T * world_size  # tokens that all ranks read at a time
    grad_accum_steps, left = divmod(args.total_batch_size, together)
    if left:
        nearest = [n * together for n in (grad_accum_steps, grad_accum_steps + 1) if n > 0]
        raise UserError(f"--total_batch_size {args.total_batch_size} is not a multiple of micro_batch_size x "
                        f"sequence_length x ranks = {B} x {T} x {world_size} = {together}; the nearest are: "
                        + ", ".join(map(str, nearest)))
    if args.demo_data:
        from demo import prepare_demo

        with rank_zero_first(rank, world_size):
            prepare_demo(args.data_dir)
    unverified = fineweb_edu.read_manifest(args.data_dir) is None
    tokenizer_name = fineweb_edu.tokenizer_of(args.data_dir)
    tokenizer, reason = None, "not every rank has the tokenizer"
    if unverified and args.vocab_size < 50257 and not args.init_from:
        num_tokens, reason = args.vocab_size, f"{args.data_dir} doesn't say which tokenizer made it"
    else:
        with rank_zero_first(rank, world_size):
            try:
                tokenizer = get_tokenizer(tokenizer_name)
            except UserError as error:
                if tokenizer_name != "gpt2":
                    raise
                reason = error
        num_tokens = tokenizer.n_vocab if tokenizer else 50257
    if largest(tokenizer is None):
        say(f"training goes on without samples, HellaSwag and bits per byte: {reason}")
        tokenizer = None

    settings = dict(data_dir=args.data_dir, seed=args.seed, vocab_size=num_tokens)
    train_loader = DataLoaderLite(B, T, rank, world_size, "train", **settings)
    val_loader = DataLoaderLite(B, T, rank, world_size, "val", **settings)
    with rank_zero_first(rank, world_size):
        if rank == 0:
            fineweb_edu.prove(args.data_dir)
    if num_tokens > args.vocab_size and not args.init_from:
        raise UserError(f"--vocab_size {args.vocab_size}: {args.data_dir} was encoded with {num_tokens} ids")
    config.num_tokens = num_tokens
    val_windows = min(args.val_tokens // T, val_loader.num_windows)
    if unverified:
        say(f"{args.data_dir} has no manifest: its shards are unverified")
    if val_windows < args.val_tokens // T:
        say(f"the val split has {val_windows * T:,} tokens, fewer than --val_tokens: all of them are read")

    examples = load_hellaswag(args, rank, world_size, say) if tokenizer and args.hellaswag_every else None
    if largest(examples is None):  # all ranks evaluate, or none
        examples = None

    # -------------------------------------------------------------------- the model, new or from a checkpoint

    identity = {flag: getattr(args, flag) for flag in IDENTITY}
    identity |= dict(data=fineweb_edu.identity(args.data_dir), tokenizer=Path(tokenizer_name).name)
    start_step, newest, meta = 0, None, {}
    if args.resume:
        with rank_zero_first(rank, world_size):
            if rank == 0:
                checkpoint.clean(log_dir)
            newest, skipped = checkpoint.latest(log_dir, to_resume=True)
        for reason in skipped:
            say(f"passed over: {reason}")
        if newest is None and skipped:
            raise UserError(f"--resume: no checkpoint in {log_dir} is valid; another --log_dir starts anew")
        if newest is None:
            say(f"{log_dir} holds no checkpoint: starting at step 0")

    if newest:
        raw_model, meta = checkpoint.load(newest, device)
        start_step, before = meta["step"], meta.get("identity", {})
        changes = {key: f"{key} {before.get(key)!r} -> {value!r}" for key, value in identity.items()
                   if before.get(key) != value}
        if changes.keys() - set(args.allow_change):
            allow = f"--allow_change {' '.join(changes)}" if changes.keys() <= set(CHANGEABLE) else ""
            raise UserError(f"--resume would change the run in {log_dir}: {', '.join(changes.values())}; "
                            f"{allow or 'another --log_dir'} is for those who mean it")
        for change in changes.values():
            say(f"changed: {change}")
        say(f"resuming {newest} at step {start_step}")
    elif args.init_from:
        raw_model, taken = load_init(args, tokenizer, num_tokens)
        raw_model.to(device)
        say(f"the weights and the shape are those of {args.init_from}: {taken}")
    else:
        torch.manual_seed(args.seed)
        try:
            raw_model = GPT(config)
        except (RuntimeError, TypeError) as error:  # what torch raises for more bytes than there are
            raise UserError(f"a model of --block_size {args.block_size} --vocab_size {args.vocab_size} "
                            f"--n_layer {args.n_layer} --n_embd {args.n_embd} does not fit into this "
                            f"machine's memory ({first_line(error)})") from error
        raw_model.to(device)
    raw_model.train()

    if rank == 0:
        keep_log_before(log_dir, start_step)

    # --------------------------------------------------------------------- precision, optimizer, compile, DDP

    dtype, autocast = args.dtype or "float32", contextlib.nullcontext()
    device_name = platform.processor() or platform.machine()
    if device_type == "cuda":
        device_name = torch.cuda.get_device_name(device)
        torch.set_float32_matmul_precision("high")  # TF32 wherever a product is left in fp32
        dtype = args.dtype or ("bfloat16" if torch.cuda.is_bf16_supported(False) else "float16")
    if dtype != "float32":
        autocast = torch.autocast(device_type, dtype=getattr(torch, dtype))
    if meta.get("dtype", dtype) != dtype:
        say(f"the run was in {meta['dtype']} before, it goes on in {dtype}")
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")  # fp16 gradients underflow without
    optimizer = raw_model.configure_optimizers(args.weight_decay, args.max_lr, device_type)
    if newest:
        checkpoint.load_optimizer(newest, optimizer)
        if meta.get("scaler") and scaler.is_enabled():
            scaler.load_state_dict(meta["scaler"])

    def on_device(batch):
        return [checkpoint.to_device(tokens, device) for tokens in batch]  # inputs and targets

    def warm_up(model):
        """One forward and backward pass that leaves nothing behind."""
        x, y = on_device(train_loader.batch(0, B))  # another layout would compile anew
        with autocast:
            _, loss = model(x, y)
        loss.backward()
        optimizer.zero_grad()

    @torch.no_grad()
    def evaluated(model, batch):
        """The mean loss of a batch, as evaluations compute it."""
        raw_model.eval()
        x, y = on_device(batch)
        with autocast:
            _, loss = model(x, y)
        raw_model.train()
        return loss.float()

    compiled, failure = raw_model, None
    if args.compile:
        try:
            compiled = compile_model(raw_model, device_type)
            warm_up(compiled)
            if args.val_every and val_windows >= B:  # another graph
                evaluated(compiled, train_loader.batch(0, B))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C++ compiler, no headers, a GPU too old for Triton, ...
            failure = first_line(error)
        if largest(failure is not None):
            reason = failure or "it failed on another rank"
            say(f"torch.compile does not work here, training goes on without it: {reason}")
            compiled = raw_model.train()  # a failed evaluation has left it in eval mode
            optimizer.zero_grad()
    model = compiled
    if ddp:
        model = DistributedDataParallel(compiled)
        warm_up(model)  # DDP regroups its buckets after the first backward, later sums keep their order

    # --------------------------------------------------------------------------- what is done once in a while

    if tokenizer and args.val_every:  # a loss per byte of text, which different tokenizers share
        targets = np.concatenate([val_loader.window(n)[1:] for n in range(val_windows)])
        ids, counts = np.unique(targets[targets != tokenizer.eot_token], return_counts=True)
        sizes = [len(tokenizer.decode_single_token_bytes(i)) for i in ids.tolist()]
        bytes_per_token = (counts * sizes).sum() / len(targets)

    def log(**values):
        if rank == 0:
            with naming(log_file), open(log_file, "a", encoding="utf-8") as file:
                file.writelines(f"{step} {stream} {value:.10f}\n" for stream, value in values.items())
            if tracker:
                tracker.log(step, values)

    def evaluate_loss():
        """Mean loss of the first val_windows windows of the val split, the same for any number of ranks."""
        losses = [torch.zeros((), device=device)]
        for first in range(rank * B, val_windows + rank * B, B * world_size):  # as many rounds on every rank
            check_stop()
            count = min(B, val_windows - first)
            if count > 0:
                forward = compiled if count == B else raw_model  # what is compiled knows one shape
                losses.append(evaluated(forward, val_loader.batch(first, count)) * count)
        total = torch.stack(losses).cpu().double().sum()
        if ddp:
            dist.all_reduce(total, group=control)
        return total.item() / val_windows

    rendered = hellaswag.render(examples, tokenizer, raw_model.config.block_size) if examples else None

    def evaluate_hellaswag():
        raw_model.eval()
        with autocast:
            result = hellaswag.evaluate(raw_model, tokenizer, examples, None, rank, world_size, check_stop,
                                        rendered=rendered)
        raw_model.train()
        return result["acc_norm"]

    def sample():
        raw_model.eval()
        generator = torch.Generator(device).manual_seed(args.seed + step)
        try:
            with autocast:
                print_samples(raw_model, tokenizer, args.sample_prompt, 4, 32, generator, top_k=50)
        except ValueError as error:
            raise UserError(f"before step {step}: {error}. {NOT_FINITE}") from error
        raw_model.train()

    def report():
        """What the log tells so far: a picture, and early on whether the loss is as others of the recipe."""
        try:
            if step in (250, 1000, 5000) and due(args.val_every):
                off_track = reference.check(step, val_loss, log_dir)
                if off_track:
                    say(off_track)
            if args.plot:
                plot.draw([log_dir], log_dir / "curves.png")
        except UserError as error:  # no matplotlib, or a reference that can't be read: no reason to end a run
            args.plot = False
            say(f"training goes on without curves: {error}")

    def save(path, optimizer=None):
        """Write a checkpoint of this step, on rank 0; the others wait until it stands."""
        if not all(p.isfinite().all() for p in raw_model.parameters()):
            raise UserError(f"before step {step} the weights are not finite; nothing was saved. {NOT_FINITE}")
        if rank == 0:
            if log_file.exists():
                sync(log_file)  # what led to a checkpoint is on the disk before it is
            facts = dict(val_loss=val_loss, best_val=best_val, dtype=dtype, scaler=scaler.state_dict(),
                         skipped=skipped)
            checkpoint.save(path, step, raw_model, tokenizer_name, optimizer, identity=identity, **facts)
            checkpoint.prune(log_dir, args.keep, step, args.keep_every)
        if ddp:
            dist.barrier(group=control)
        say(f"step {step}: saved {path}")

    def blame():
        """Where a step is not finite: this rank's sequences once more, one by one, up to the first such."""
        windows = args.total_batch_size // T  # all ranks' of the step
        for n in [step * windows + i for i in range(windows) if i // B % world_size == rank]:
            optimizer.zero_grad()
            x, y = on_device(train_loader.batch(n, 1))
            with autocast:
                _, loss = raw_model(x, y)
            loss.backward()
            if not all(value.isfinite().all() for value in (loss, *(p.grad for p in raw_model.parameters()))):
                path, _, start = train_loader.place(n)
                return f"rank {rank}: loss {loss.item()} at {start} of {path}"

    def due(interval):
        return interval > 0 and (step % interval == 0 or step == args.max_steps)

    # ------------------------------------------------------------------------------------------------ the run

    tracker = None
    if rank == 0:
        facts = dict(step=start_step, parameters=raw_model.num_params(), world_size=world_size, device=device,
                     device_name=device_name, dtype=dtype, compiled=compiled is not raw_model,
                     data_manifest=identity["data"], data_source=fineweb_edu.source_of(args.data_dir),
                     tokenizer=identity["tokenizer"], hellaswag_examples=examples and len(examples))
        run_id = record_start(
            log_dir, args.resume, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), flags=vars(args), **facts,
            git_commit=git_commit(), torch=torch.__version__, python=platform.python_version(),
            torchrun=torchrun())
        if args.track:
            config = {**vars(args), **facts}
            tracker = at_exit.enter_context(tracking.Tracker(args.track, log_dir, run_id, config))
    epochs = args.max_steps * args.total_batch_size / (train_loader.num_windows * T)
    say(f"{raw_model.num_params():,} parameters, {dtype} on {device} ({device_name}), "
        + ("compiled" if compiled is not raw_model else "not compiled"))
    say(f"{args.total_batch_size:,} tokens a step = {B} sequences x {T} tokens x {world_size} ranks x "
        f"{grad_accum_steps} micro-batches; {args.max_steps:,} steps are {epochs:.2f} epochs")

    def put_back(number, handler):
        # a scheduler may send SIGTERM until the process is gone, which has saved all and says how it ends
        ignored = received and number == signal.SIGTERM
        signal.signal(number, signal.SIG_IGN if ignored else handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        at_exit.callback(put_back, number, signal.signal(number, on_signal))
    train_loader.position = start_step * args.total_batch_size // T
    val_loss, best_val, skipped = meta.get("val_loss"), meta.get("best_val", math.inf), meta.get("skipped", 0)
    step, dt_mean, stopped = start_step, None, None
    try:
        for step in range(start_step, args.max_steps + 1):
            # dropout draws from (seed, step, rank): a resumed run needs no random state from a checkpoint
            torch.manual_seed(hash((args.seed, step, rank)) % 2**63)

            # once in a while: validation loss, HellaSwag, a few samples, a checkpoint
            model_now = args.init_from if args.eval_only else f"step {step}"
            if due(args.val_every):
                val_loss = evaluate_loss()
                log(val=val_loss)
                words = f"{model_now}: val loss {val_loss:.4f} nats per token"
                if tokenizer:
                    nats_per_byte = val_loss / bytes_per_token
                    log(val_bpb=nats_per_byte / math.log(2))
                    words += f", {nats_per_byte:.4f} nats ({nats_per_byte / math.log(2):.4f} bits) per byte"
                say(words)
                if val_loss < best_val and step > 0:
                    best_val = val_loss
                    save(log_dir / "best")
            if examples and due(args.hellaswag_every):
                accuracy = evaluate_hellaswag()
                log(hella=accuracy)
                say(f"{model_now}: HellaSwag acc_norm {accuracy:.4f} on {len(examples)} examples")
            if rank == 0 and (due(args.val_every) or due(args.hellaswag_every)):
                report()
            if tokenizer and due(args.sample_every) and rank == 0:
                sample()
            # the checkpoint it resumes from stands, unless a stop had saved it before it was evaluated
            saved = step == start_step and val_loss == meta.get("val_loss")
            if (due(args.save_every) or due(args.keep_every)) and step > 0 and not saved:
                save(log_dir / f"ckpt_{step:06d}", optimizer)
            if step == args.max_steps:  # the extra lap measured and saved the finished model
                break

            # one optimizer step on the mean gradient of grad_accum_steps micro-batches
            started = time.perf_counter()
            loss_mean = torch.zeros((), device=device)
            for micro_step in range(grad_accum_steps):
                check_stop()
                x, y = on_device(train_loader.next_batch())
                if ddp:  # gradients are summed over the ranks once, at the end; forward reads this already
                    model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
                with autocast:
                    _, loss = model(x, y)
                loss = loss / grad_accum_steps  # backward() sums, we want the mean
                scaler.scale(loss).backward()
                loss_mean += loss.detach()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), args.grad_clip or math.inf)
            if ddp:
                dist.all_reduce(loss_mean)
                loss_mean /= world_size
            # the one time that the GPU is waited for: what is not finite must not reach the weights. A norm
            # too large for fp16 is no fault, its scaler leaves the step out and goes on with a smaller scale
            train_loss, norm = loss_mean.item(), norm.item()
            bad = not math.isfinite(train_loss) or not (math.isfinite(norm) or scaler.is_enabled())
            if bad:
                skipped += 1
                found = everyone(blame())
                words = f"step {step} has loss {train_loss} and gradient norm {norm}; " + (
                    "; ".join(found) or "computed again one by one, each of its sequences is finite")
                if skipped > args.skip_bad_steps and found:  # it would come again: a person has to decide
                    raise UserError(f"{words}. {NOT_FINITE}")
                if skipped > args.skip_bad_steps:
                    sys.exit(f"error: {words}: a fault of the machine? --resume goes on")
                log(skipped=skipped)
                say(f"left out: {words}")
            lr = get_lr(step, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            if not bad:
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if bad:
                continue

            dt = time.perf_counter() - started
            tokens_per_second = args.total_batch_size / dt
            log(train=train_loss, norm=norm, lr=lr, **{"tok/s": tokens_per_second})
            warm = dt_mean is not None and step > start_step + 1  # the very first is slow
            dt_mean = 0.9 * dt_mean + 0.1 * dt if warm else dt
            mfu = raw_model.estimate_mfu(tokens_per_second / world_size, T, device_name)
            mfu = "n/a" if mfu is None or dtype == "float32" else f"{mfu:.1%}"
            eta = duration(dt_mean * (args.max_steps - step - 1))
            say(f"step {step:5d} | loss {train_loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | "
                f"dt {1000 * dt:.0f} ms | tok/s {tokens_per_second:,.0f} | mfu {mfu} | eta {eta}")
    except StopRequested as stop:
        stopped = stop.args[0]
        if step > start_step or not newest:  # the step under way is dropped: a resumed run begins with it
            save(log_dir / f"ckpt_{step:06d}", optimizer)
        say(f"stopped by {signal.Signals(stopped).name} before step {step}; --resume goes on")

    if ddp:
        dist.destroy_process_group()
    if stopped:
        sys.exit(128 + stopped)
    if args.eval_only:
        return
    say(f"finished. Now: python sample.py -m {log_dir} -p {shlex.quote(args.sample_prompt)}")
    say(f"               python hellaswag.py -m {log_dir}")
    if args.demo_data:
        say("the real thing: python fineweb_edu.py && torchrun --standalone --nproc_per_node=8 train_gpt2.py")


def restarted(log_dir):
    """Whether torchrun has started this run before, as run.json tells, and does so again after a failure."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return again and read_record(log_dir).get("torchrun") == torchrun()


def torchrun():
    """What tells this torchrun from others: its run id, which may be given by hand, and its process."""
    return os.environ.get("TORCHELASTIC_RUN_ID") and f"{os.environ['TORCHELASTIC_RUN_ID']} {os.getppid()}"


def load_hellaswag(args, rank, world_size, say):
    """The examples to evaluate on; None, said once, where there is neither a file nor a network."""
    if args.hellaswag_data:
        return list(hellaswag.iterate_examples(args.hellaswag_data))
    with rank_zero_first(rank, world_size):
        try:
            return list(hellaswag.iterate_examples(hellaswag.download() if rank == 0 else hellaswag.DATA))
        except UserError as error:
            say(f"training goes on without HellaSwag: {error}")


def load_init(args, tokenizer, num_tokens):
    """The model that --init_from names, once the data is found to fit it, and its shape in words.

    Its shape takes the place of the flags', a config's among them. Raises UserError.
    """
    model = checkpoint.load_model(args.init_from)
    if args.sequence_length > model.config.block_size:
        raise UserError(f"--sequence_length {args.sequence_length}: {args.init_from} reads at most "
                        f"{model.config.block_size} tokens")
    shape = {flag: getattr(model.config, flag)
             for flag in ("n_layer", "n_head", "n_embd", "vocab_size", "block_size", "bias")}
    vars(args).update(shape)  # run.json records what the run has
    if num_tokens > model.config.vocab_size:
        raise UserError(f"--data_dir {args.data_dir}: its tokenizer has {num_tokens} ids, {args.init_from} "
                        f"knows {model.config.vocab_size}")
    if tokenizer:
        probe = "The tokenizers are compared by what they make of these words.\n"
        theirs = get_tokenizer(checkpoint.tokenizer_path(args.init_from))
        if theirs.encode_ordinary(probe) != tokenizer.encode_ordinary(probe):
            raise UserError(f"--data_dir {args.data_dir}: its tokenizer is not the one of {args.init_from}")
    model.config.num_tokens, model.config.dropout = num_tokens, args.dropout
    model = GPT.from_state(model.config, model.state_dict())  # built anew, for dropout is part of its layers
    return model, ", ".join(f"{flag} {value}" for flag, value in shape.items())


def git_commit():
    """The commit of this program, or None where it is no checkout."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()


def duration(seconds):
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m" if minutes else f"{seconds:.0f}s"


if __name__ == "__main__":
    run(main, args)
