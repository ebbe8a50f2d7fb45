"""Train a GPT-2, from the first token to the finished model.

    python train_gpt2.py @configs/demo.txt                     # a small one on a laptop, no network needed
    python train_gpt2.py                                       # the 124M on one GPU, or on the CPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py     # the same run on eight GPUs: same batches, same losses

The defaults are GPT-2 124M on FineWeb-Edu with the hyperparameters of the GPT-3 paper (https://arxiv.org/abs/2005.14165,
table 2.1 and appendix B). Interrupted in any way, the same command with --resume goes on as if nothing had happened.
"""

import argparse
import shlex


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Train a GPT-2. An interval of N means: at step 0, every N steps and at the end; 0 is never.",
        usage="python train_gpt2.py [@configs/NAME.txt] [--flag value ...]",
        fromfile_prefix_chars="@",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)  # --flag value  # a comment
    add = parser.add_argument
    # the run
    add("--data_dir", default="edu_fineweb10B", help="shards made by fineweb_edu.py")
    add("--demo_data", action="store_true", help="make data_dir first, from the documentation that Python carries")
    add("--log_dir", default="log", help="where log.txt, run.json and the checkpoints go")
    add("--resume", action="store_true", help="go on from the newest valid checkpoint of log_dir")
    add("--init_from", metavar="MODEL", help="fine-tune: gpt2, ..., gpt2-xl, a Hugging Face directory or a checkpoint")
    add("--seed", type=int, default=1337, help="of the weights, the order of the data, dropout and the samples")
    add("--device", help="cuda, mps or cpu; found by itself")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="of matrix products; the best that the device has")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the model")
    # the batch
    add("--max_steps", type=int, default=19073, help="optimizer steps: 10B tokens")
    add("--total_batch_size", type=int, default=524288, help="tokens in an optimizer step, over all ranks")
    add("--micro_batch_size", type=int, default=32, help="sequences at a time on a rank: memory, not the result")
    add("--sequence_length", type=int, default=1024, help="tokens in a sequence")
    # the model
    add("--n_layer", type=int, default=12)
    add("--n_head", type=int, default=12)
    add("--n_embd", type=int, default=768)
    add("--vocab_size", type=int, default=50304, help="rows of the embedding, at least the tokenizer's ids")
    add("--block_size", type=int, help="the model's longest context; the sequence length unless given")
    add("--dropout", type=float, default=0.0)
    add("--bias", action=argparse.BooleanOptionalAction, default=True, help="in linear layers and LayerNorms")
    # the optimizer
    add("--max_lr", type=float, default=6e-4)
    add("--min_lr", type=float, default=6e-5, help="where the cosine ends")
    add("--warmup_steps", type=int, default=715, help="GPT-3's 375M tokens")
    add("--weight_decay", type=float, default=0.1)
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; 0 does not clip")
    # once in a while
    add("--val_every", type=int, default=250, help="interval of the validation loss")
    add("--val_tokens", type=int, default=10485760, help="tokens that it reads, from the start of the val split")
    add("--hellaswag_every", type=int, default=250, help="interval of HellaSwag")
    add("--hellaswag_data", metavar="FILE", help="a local .jsonl instead of the download")
    add("--sample_every", type=int, default=250, help="interval of samples")
    add("--sample_prompt", default="Hello, I'm a language model,")
    add("--save_every", type=int, default=1000, help="interval of checkpoints (none at step 0)")
    add("--keep", type=int, default=2, help="numbered checkpoints that stay, the newest")
    args = parser.parse_args(argv)
    at_least = dict.fromkeys(("max_steps", "total_batch_size", "micro_batch_size", "sequence_length", "val_tokens"), 1)
    at_least |= dict.fromkeys(("warmup_steps", "val_every", "hellaswag_every", "sample_every", "save_every", "seed"), 0)
    at_least |= dict(keep=2, max_lr=0, min_lr=0, weight_decay=0, grad_clip=0)
    for flag, least in at_least.items():
        if not least <= getattr(args, flag) < float("inf"):
            parser.error(f"argument --{flag}: must be at least {least}, not {getattr(args, flag)}")
    args.block_size = args.block_size or args.sequence_length
    if args.block_size < args.sequence_length:
        parser.error(f"argument --sequence_length: {args.sequence_length} does not fit into --block_size {args.block_size}")
    return args


if __name__ == "__main__":
    args = parse_args()  # before torch is imported, so that --help and a wrong flag answer at once

import contextlib  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import signal  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import checkpoint  # noqa: E402
import fineweb_edu  # noqa: E402
import hellaswag  # noqa: E402
from files import UserError, atomic_write, run  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from sample import print_samples  # noqa: E402
from tokenizer import get_tokenizer  # noqa: E402

# the flags that make a run what it is: to resume with another value would be another run
IDENTITY = (
    "init_from", "seed", "max_steps", "total_batch_size", "sequence_length", "n_layer", "n_head", "n_embd", "vocab_size",
    "block_size", "dropout", "bias", "max_lr", "min_lr", "warmup_steps", "weight_decay", "grad_clip",
)  # fmt: skip


class DataLoaderLite:
    """An endless stream of windows of T + 1 tokens, cut from memory-mapped shards and dealt out in micro-batches.

    Window number n is the same whoever asks for it: it follows from the seed alone. In each epoch every window comes
    once, shuffled inside its shard (the val split is read in order). All ranks together consume consecutive windows,
    so the batch of a step depends neither on their number nor on the micro-batch size, and there is no state to save.
    """

    def __init__(self, B=32, T=512, process_rank=0, num_processes=1, split="train", data_dir="edu_fineweb10B",
                 seed=1337, vocab_size=65536):  # fmt: skip
        self.B, self.T = B, T
        self.process_rank, self.num_processes = process_rank, num_processes
        self.seed, self.shuffle, self.vocab_size = seed, split == "train", vocab_size
        self.shards = fineweb_edu.open_shards(data_dir, split)
        self.counts = [max(0, (len(tokens) - 1) // T) for _, tokens in self.shards]  # windows, shard by shard
        self.ends = np.cumsum(self.counts)
        self.num_windows = int(self.ends[-1])
        if self.num_windows == 0:
            longest = max(len(tokens) for _, tokens in self.shards)
            raise UserError(f"{data_dir}: a window takes {T + 1} tokens, the longest {split} shard has {longest}; "
                            "lower --sequence_length")  # fmt: skip
        self.position = 0  # windows consumed so far, by all ranks together
        self.order_of, self.order = None, None  # the shuffle in use: (epoch, shard) and its permutation

    def window(self, n):
        """Window n of the stream: T + 1 ids, int64."""
        epoch, n = divmod(n, self.num_windows)
        shard = int(np.searchsorted(self.ends, n, side="right"))
        n -= int(self.ends[shard]) - self.counts[shard]  # counted from the shard's beginning
        if self.shuffle:
            if self.order_of != (epoch, shard):
                self.order_of = (epoch, shard)
                self.order = np.random.default_rng((self.seed, epoch, shard)).permutation(self.counts[shard])
            n = int(self.order[n])
        path, tokens = self.shards[shard]
        ids = tokens[n * self.T : (n + 1) * self.T + 1].astype(np.int64)
        if ids.max() >= self.vocab_size:
            offset = n * self.T + int((ids >= self.vocab_size).argmax())
            raise UserError(f"{path} holds id {tokens[offset]} at {offset}, the model knows ids below {self.vocab_size}: "
                            "--vocab_size, or prepare the data with the model's tokenizer")  # fmt: skip
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
    """The learning rate of a step: linear warm-up to max_lr, then a cosine that reaches min_lr at max_steps."""
    if step < args.warmup_steps:
        return args.max_lr * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)  # 0 to 1
    return args.min_lr + 0.5 * (1 + math.cos(math.pi * min(1, done))) * (args.max_lr - args.min_lr)


def setup_ranks(device=None):
    """Join the process group that torchrun announces, if it does: (device, rank, world_size)."""
    device = checkpoint.pick_device(device)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        if device == "cuda":
            device = checkpoint.pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return device, rank, world_size


@contextlib.contextmanager
def rank_zero_first(rank, world_size):
    """The body runs on rank 0, then on the others: one writes what all need."""
    if world_size > 1 and rank > 0:
        dist.barrier()
    yield
    if world_size > 1 and rank == 0:
        dist.barrier()


class StopRequested(Exception):
    """SIGTERM or Ctrl-C, agreed on by all ranks. args[0] is the signal's number."""


def main(args):
    device, rank, world_size = setup_ranks(args.device)
    device_type = device.partition(":")[0]
    ddp = world_size > 1
    # what the ranks agree on besides gradients goes from CPU to CPU, and no GPU is waited for
    control = dist.new_group(backend="gloo") if ddp else None

    def say(*words):
        if rank == 0:
            print(*words, flush=True)

    # a stop signal is remembered; the loop asks for it where the model is whole. The second one is not waited for.
    received = []

    def on_signal(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}

    def check_stop():
        number = torch.tensor(received[0] if received else 0)
        if ddp:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=control)
        if number:
            raise StopRequested(number.item())

    # ---------------------------------------------------------------- the data

    if args.demo_data:
        from demo import prepare_demo

        with rank_zero_first(rank, world_size):
            prepare_demo(args.data_dir)
    B, T = args.micro_batch_size, args.sequence_length
    unit = B * T * world_size  # tokens in one micro-step of all ranks
    if args.total_batch_size % unit:
        nearest = [size for size in (args.total_batch_size // unit * unit, (args.total_batch_size // unit + 1) * unit) if size]
        raise UserError(f"--total_batch_size {args.total_batch_size} is not a multiple of micro_batch_size x sequence_length "
                        f"x ranks = {B} x {T} x {world_size}; {' and '.join(map(str, nearest))} are")  # fmt: skip
    grad_accum_steps = args.total_batch_size // unit
    loader_settings = dict(process_rank=rank, num_processes=world_size, data_dir=args.data_dir, seed=args.seed)
    train_loader = DataLoaderLite(B, T, split="train", vocab_size=args.vocab_size, **loader_settings)
    val_loader = DataLoaderLite(B, T, split="val", vocab_size=args.vocab_size, **loader_settings)
    val_windows = max(1, min(args.val_tokens // T, val_loader.num_windows))
    if fineweb_edu.read_manifest(args.data_dir) is None:
        say(f"{args.data_dir} has no manifest: the shards are unverified")
    if val_windows * T < args.val_tokens // T * T:
        say(f"the val split has {val_windows * T:,} tokens, less than --val_tokens {args.val_tokens:,}: all of it is read")

    tokenizer_name = fineweb_edu.tokenizer_of(args.data_dir)
    try:
        tokenizer = get_tokenizer(tokenizer_name)
        num_tokens = tokenizer.n_vocab
    except UserError as error:  # only GPT-2's needs a network or a cache; its ids are known
        say(f"no samples, HellaSwag or bits per byte: {error}")
        tokenizer, num_tokens = None, 50257
    if num_tokens > args.vocab_size:
        raise UserError(f"--vocab_size {args.vocab_size}: the tokenizer of {args.data_dir} has {num_tokens} ids")
    if tokenizer and args.val_every:  # tokenizers can be compared by the loss per byte of text, not by that per token
        targets = np.concatenate([val_loader.window(n)[1:] for n in range(val_windows)])
        sizes = np.array([len(tokenizer.decode_bytes([i])) if i < tokenizer.eot_token else 0 for i in range(num_tokens)])
        bytes_per_token = sizes[targets].sum() / len(targets)
    examples = load_hellaswag(args, rank, world_size, say) if tokenizer and args.hellaswag_every else None

    # ---------------------------------------------------------------- the model, new or from a checkpoint

    log_dir = Path(args.log_dir)
    log_file = log_dir / "log.txt"
    holds_run = log_file.exists() or bool(checkpoint.numbered(log_dir))
    if holds_run and not args.resume:
        raise UserError(f"{log_dir} holds a run: --resume goes on with it, another --log_dir starts a new one")
    identity = {flag: getattr(args, flag) for flag in IDENTITY}
    identity |= dict(data=fineweb_edu.identity(args.data_dir), tokenizer=Path(tokenizer_name).name)
    start_step, newest, meta = 0, None, {}
    if args.resume:
        with rank_zero_first(rank, world_size):
            if rank == 0 and log_dir.exists():
                checkpoint.clean(log_dir)
            newest, skipped = checkpoint.latest(log_dir)
        for reason in skipped:
            say(f"passed over: {reason}")
        if newest is None and skipped:
            raise UserError(f"{log_dir} holds checkpoints, but no valid one; remove it to start at step 0")
        if newest is None:
            say(f"{log_dir} holds no checkpoint: starting at step 0")

    if newest:
        raw_model, meta = checkpoint.load(newest, device)
        different = [f"{key} was {meta['identity'].get(key)!r}, is {value!r}" for key, value in identity.items()
                     if meta["identity"].get(key) != value]  # fmt: skip
        if different:
            raise UserError(f"--resume would change the run: {'; '.join(different)}. Another --log_dir starts a new one")
        start_step = meta["step"]
        say(f"resuming {newest} at step {start_step}")
    elif args.init_from:
        raw_model = load_init(args, tokenizer, num_tokens).to(device)
    else:
        torch.manual_seed(args.seed)
        shape = dict(n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd, dropout=args.dropout, bias=args.bias)
        try:
            config = GPTConfig(args.block_size, args.vocab_size, num_tokens=num_tokens, **shape)
        except ValueError as error:
            raise UserError(f"--{error}") from error
        raw_model = GPT(config).to(device)
    raw_model.train()

    # ---------------------------------------------------------------- precision, optimizer, compile, DDP

    if device_type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 wherever a product is left in fp32
    bf16 = device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = args.dtype or ("bfloat16" if bf16 else "float16" if device_type == "cuda" else "float32")
    if meta and meta["dtype"] != dtype:
        say(f"the run went on in {meta['dtype']} until now, it goes on in {dtype}")
    autocast = contextlib.nullcontext()
    if dtype != "float32":
        autocast = torch.autocast(device_type, dtype=getattr(torch, dtype))
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")  # fp16 gradients underflow without
    optimizer = raw_model.configure_optimizers(args.weight_decay, args.max_lr, device_type)
    if newest:
        checkpoint.load_optimizer(newest, optimizer)
        scaler.load_state_dict(meta["scaler"] if scaler.is_enabled() and meta["scaler"] else scaler.state_dict())

    def warm_up(model):
        """One forward and backward pass that leaves nothing behind."""
        x = torch.zeros(B, T, dtype=torch.int64, device=device)
        with autocast:
            _, loss = model(x, x)
        loss.backward()
        optimizer.zero_grad()

    compiled = raw_model
    if args.compile:
        compiled = torch.compile(raw_model)
        failure = None
        try:
            warm_up(compiled)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no C++ compiler, no headers, a GPU too old for Triton, ...
            failure = error
        failed = torch.tensor(failure is not None)
        if ddp:
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=control)
        if failed:
            reason = str(failure).strip().splitlines()[0] if failure else "it failed on another rank"
            say(f"torch.compile does not work here, training goes on without it ({reason})")
            torch._dynamo.reset()
            optimizer.zero_grad()
            compiled = raw_model
    model = compiled
    if ddp:
        model = DistributedDataParallel(compiled, device_ids=[device] if device_type == "cuda" else None)
        warm_up(model)  # DDP regroups its buckets after its first backward: from here on a restart sums in the same order

    # ---------------------------------------------------------------- what is done once in a while

    best_val = math.inf
    if (log_dir / "best").exists():
        with contextlib.suppress(checkpoint.DamagedCheckpoint):  # it will be replaced
            best = checkpoint.read_meta(log_dir / "best")
            best_val = best["val_loss"] if best["step"] <= start_step else math.inf

    def log(step, **values):
        if rank == 0:
            log_lines.writelines(f"{step} {stream} {value:.10f}\n" for stream, value in values.items())
            log_lines.flush()

    @torch.no_grad()
    def evaluate_loss():
        """Mean loss of the first val_windows windows of the val split, the same for any number of ranks."""
        raw_model.eval()
        losses = [torch.zeros((), device=device)]
        for first in range(0, val_windows, B * world_size):
            check_stop()
            mine = first + rank * B
            count = min(B, val_windows - mine)
            if count > 0:
                x, y = val_loader.batch(mine, count)
                with autocast:  # what is compiled knows one shape: the rest goes through the plain model
                    _, loss = (compiled if count == B else raw_model)(x.to(device), y.to(device))
                losses.append(loss.float() * count)
        raw_model.train()
        total = torch.stack(losses).cpu().double().sum()
        if ddp:
            dist.all_reduce(total, group=control)
        return total.item() / val_windows

    def evaluate_hellaswag():
        raw_model.eval()
        with autocast:
            result = hellaswag.evaluate(raw_model, tokenizer, examples, rank=rank, world_size=world_size, before_batch=check_stop)
        raw_model.train()
        return result["acc_norm"]

    def sample():
        if rank == 0:
            raw_model.eval()
            generator = torch.Generator(device).manual_seed(args.seed + step)
            with autocast:
                print_samples(raw_model, tokenizer, args.sample_prompt, 4, 32, generator, top_k=50)
            raw_model.train()

    def save(path, with_optimizer):
        """Write a checkpoint of this step, on rank 0; the others wait until it stands."""
        if rank == 0:
            log_lines.flush()
            os.fsync(log_lines.fileno())  # what led to a checkpoint is on the disk before it is
            facts = dict(identity=identity, val_loss=val_loss, dtype=dtype, scaler=scaler.state_dict())
            checkpoint.save(path, step, raw_model, tokenizer_name, optimizer if with_optimizer else None, **facts)
            checkpoint.prune(log_dir, args.keep)
        if ddp:
            dist.barrier(group=control)

    def save_numbered():
        save(log_dir / f"ckpt_{step:06d}", with_optimizer=True)
        say(f"step {step}: saved {log_dir}/ckpt_{step:06d}")

    # ---------------------------------------------------------------- the run

    num_params = raw_model.num_params()
    device_name = torch.cuda.get_device_name(device) if device_type == "cuda" else platform.processor() or platform.machine()
    log_lines = None
    if rank == 0:
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
            keep_log_before(log_file, start_step)
            log_lines = open(log_file, "a", encoding="utf-8")
            record_start(log_dir / "run.json", start_step, args, world_size=world_size, parameters=num_params, dtype=dtype,
                         compile=compiled is not raw_model, device=device, device_name=device_name, data=identity["data"])  # fmt: skip
        except OSError as error:
            raise UserError(f"--log_dir {log_dir} can't be written ({error})") from error
    say(f"{num_params:,} parameters, {dtype} on {device} ({device_name}), " + ("compiled" if compiled is not raw_model else "not compiled"))
    say(f"{args.total_batch_size:,} tokens a step = {B} sequences x {T} tokens x {world_size} ranks x {grad_accum_steps} micro-steps; "
        f"{train_loader.num_windows * T:,} training tokens, {args.max_steps * args.total_batch_size / (train_loader.num_windows * T):.1f} epochs")  # fmt: skip

    train_loader.position = start_step * args.total_batch_size // T
    val_loss, dt_mean = meta.get("val_loss"), None
    step = start_step

    def due(interval):
        return interval > 0 and (step % interval == 0 or step == args.max_steps)

    try:
        for step in range(start_step, args.max_steps + 1):
            check_stop()
            # dropout and samples draw from (seed, step, rank), so that a resumed run draws the same
            torch.manual_seed(hash((args.seed, step, rank)) % 2**63)

            if due(args.val_every):
                val_loss = evaluate_loss()
                log(step, val=val_loss)
                words = f"step {step}: val loss {val_loss:.4f}"
                if tokenizer:
                    nats_per_byte = val_loss / bytes_per_token
                    log(step, val_bpb=nats_per_byte / math.log(2))
                    words += f" = {nats_per_byte:.4f} nats or {nats_per_byte / math.log(2):.4f} bits per byte"
                say(words)
                if val_loss < best_val and step > 0:
                    best_val = val_loss
                    save(log_dir / "best", with_optimizer=False)
            if examples and due(args.hellaswag_every):
                accuracy = evaluate_hellaswag()
                log(step, hella=accuracy)
                say(f"step {step}: HellaSwag {accuracy:.4f}")
            if tokenizer and due(args.sample_every):
                sample()
            if due(args.save_every) and step > start_step:
                save_numbered()
            if step == args.max_steps:  # the extra lap measured and saved the finished model
                break

            # one optimizer step on the mean gradient of grad_accum_steps micro-batches
            started = time.perf_counter()
            loss_mean = torch.zeros((), device=device)
            for micro_step in range(grad_accum_steps):
                check_stop()
                x, y = (t.to(device) for t in train_loader.next_batch())
                if ddp:  # gradients are exchanged behind the last micro-batch only; DDP reads this before forward
                    model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
                with autocast:
                    _, loss = model(x, y)
                loss = loss / grad_accum_steps  # backward() sums, we want the mean
                scaler.scale(loss).backward()
                loss_mean += loss.detach()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), args.grad_clip or math.inf)
            lr = get_lr(step, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if ddp:
                dist.all_reduce(loss_mean)
                loss_mean /= world_size

            loss_value, norm_value = loss_mean.item(), norm.item()  # the one time that the GPU is waited for
            dt = time.perf_counter() - started
            if not math.isfinite(loss_value) or not (math.isfinite(norm_value) or scaler.is_enabled()):
                sys.exit(f"error: step {step} gave a loss of {loss_value} and a gradient norm of {norm_value}; nothing was "
                         "saved since. --resume with another --dtype, or start anew with a lower --max_lr")  # fmt: skip
            tokens_per_second = args.total_batch_size / dt
            log(step, train=loss_value, norm=norm_value, lr=lr, **{"tok/s": tokens_per_second})
            dt_mean = dt if step <= start_step + 1 else 0.95 * dt_mean + 0.05 * dt  # the first step is slow
            mfu = raw_model.estimate_mfu(tokens_per_second / world_size, T, device_name) if dtype != "float32" else None
            say(f"step {step:5d} | loss {loss_value:.4f} | lr {lr:.2e} | norm {norm_value:.2f} | dt {dt * 1000:.0f} ms | "
                f"tok/s {tokens_per_second:,.0f} | mfu {'n/a' if mfu is None else f'{mfu:.1%}'} | "
                f"eta {duration(dt_mean * (args.max_steps - step - 1))}")  # fmt: skip
    except StopRequested as stop:
        # the step that was under way is dropped: a resumed run starts with it
        if step > start_step or newest is None:
            save_numbered()
        say(f"stopped by {signal.Signals(stop.args[0]).name} before step {step}; --resume goes on")
        sys.exit(128 + stop.args[0])
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory: halve --micro_batch_size {B}, which changes no result ({error})") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if log_lines:
            log_lines.close()
        if ddp:
            dist.destroy_process_group()

    say(f"finished. Now: python sample.py -m {log_dir} -p {shlex.quote(args.sample_prompt)}")
    say(f"              python hellaswag.py -m {log_dir}")
    if args.demo_data:
        say("The real thing: python fineweb_edu.py, then torchrun --standalone --nproc_per_node=8 train_gpt2.py")


def load_hellaswag(args, rank, world_size, say):
    """The examples to evaluate on, or None, said once, where there is neither a file nor a network."""
    if args.hellaswag_data:
        return list(hellaswag.iterate_examples(args.hellaswag_data))
    with rank_zero_first(rank, world_size):
        try:
            return list(hellaswag.iterate_examples(hellaswag.download() if rank == 0 else hellaswag.DATA))
        except UserError as error:
            say(f"training goes on without HellaSwag: {error}")


def load_init(args, tokenizer, num_tokens):
    """The model that --init_from names, once it is sure that flags and data fit it. Raises UserError."""
    model = checkpoint.load_model(args.init_from)
    defaults = parse_args([])
    for flag in ("n_layer", "n_head", "n_embd", "vocab_size", "bias"):
        given, loaded = getattr(args, flag), getattr(model.config, flag)
        if given not in (loaded, getattr(defaults, flag)):
            raise UserError(f"--{flag} {given}: the model of --init_from {args.init_from} has {loaded}")
    if args.sequence_length > model.config.block_size:
        raise UserError(f"--sequence_length {args.sequence_length}: {args.init_from} reads {model.config.block_size} tokens")
    probe = "How many tokens are these 28 letters?\n"
    theirs = get_tokenizer(checkpoint.tokenizer_path(args.init_from)) if tokenizer else None
    if tokenizer and theirs.encode_ordinary(probe) != tokenizer.encode_ordinary(probe):
        raise UserError(f"--data_dir {args.data_dir} was not encoded with the tokenizer of --init_from {args.init_from}")
    model.config.num_tokens = num_tokens
    model.config.dropout = args.dropout
    return GPT.from_state(model.config, model.state_dict())  # dropout is built in


def keep_log_before(path, step):
    """Drop the lines of steps >= step from log.txt, and a line that a crash cut short."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and len(line.split()) == 3 and int(line.split()[0]) < step]
        with atomic_write(path) as file:
            file.writelines(kept)


def record_start(path, step, args, **facts):
    """run.json: all flags and what they met, of this start at the top level and of every start under "starts"."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = dict(git_commit=git.stdout.strip() or None, torch=torch.__version__, python=platform.python_version())
    record = dict(time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), step=step, flags=vars(args), **versions, **facts)
    starts = json.loads(path.read_text(encoding="utf-8"))["starts"] if path.exists() else []
    with atomic_write(path) as file:
        json.dump({**record, "starts": [*starts, record]}, file, indent=1)


def duration(seconds):
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m" if minutes else f"{seconds:.0f}s"


if __name__ == "__main__":
    run(main, args)
