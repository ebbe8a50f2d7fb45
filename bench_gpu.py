"""Everything to test and to measure on a GPU, in one command and a limited time.

    python bench_gpu.py --minutes 25 --json gpu.json
    python bench_gpu.py --minutes 9 --json gpu.json --stages choices    # later: adds to the same file

Stages, each in a process of its own: `card` (matmul, copy), `tests` (tests/test_gpu.py), `train` (speed,
memory, evaluation, stop and resume), `profile` (where the time goes), `choices` (other settings, in turn with
the default), `ddp` (the same for torch.compile and DDP, with two GPUs or more), `peers` (bench.py) and, with
real shards, `recipe` (250 steps of the 124M recipe). The JSON file is rewritten after each result, so that an
interrupted command keeps what it has measured.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from kit.flags import Parser, from_command_line, number

# the stages, and how many seconds each may take
STAGES = dict(card=60, tests=420, train=240, profile=150, choices=480, ddp=300, peers=540, recipe=900)
ROOT = Path(__file__).parent
# of the train and profile stages: 124M at a quarter of its batch, or a tiny model for a test on a CPU
FULL = "--total_batch_size 131072 --val_tokens 131072"
TINY = ("--n_layer 2 --n_head 2 --n_embd 32 --sequence_length 32 --total_batch_size 512 --val_tokens 512 "
        "--micro_batch_size 8 --no-compile")


def parse_args(argv=None):
    parser = Parser(description="Test and measure this project on a GPU.",
                    usage="python bench_gpu.py [--minutes N] [--json OUT] [--flag value ...]")
    add = parser.add_argument
    add("--minutes", type=number(0.1), default=25.0, help="stop after this many minutes")
    add("--json", metavar="OUT", default="bench_gpu.json", help="file of the results")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE",
        help=f"which of {', '.join(STAGES)} (default: all)")
    add("-d", "--device", default="cuda", help="cuda, or cpu with --tiny")
    add("--peer", action="append", default=[], metavar="NAME=DIR", help="as in bench.py")
    add("--hellaswag_data", metavar="FILE", help="local HellaSwag examples, for the peers")
    add("--data_dir", default="edu_fineweb10B", metavar="DIR", help="real shards, for the recipe stage")
    add("--tiny", action="store_true", help="a tiny model: tests this command, measures nothing")
    args = parser.parse_args(argv)
    import bench

    words = [word for peer in args.peer for word in ("--peer", peer)]
    words += ["--hellaswag_data", args.hellaswag_data] if args.hellaswag_data else []
    args.bench = vars(bench.parse_args(["all", "--device", args.device, *words]))  # checks these flags now
    return args


if __name__ == "__main__":
    inner = sys.argv[1:2] in (["--stage"], ["--arm"], ["--rank"])  # started by this script
    args = None if inner else from_command_line(parse_args)

import argparse
import contextlib
import itertools
import tempfile
import threading
import time

import torch

import bench
from kit import loss
from kit.device import compile_model, machine, memory_of, pick_device, tune, type_of
from kit.files import UserError, atomic_write, check_output, run_script
from kit.ranks import Ranks
from kit.sharding import distribute
from model import GPT, GPTConfig

# ---------------------------------------------------------------------------- the stages: each yields results


def seconds_of(call, args, repeat):
    """Seconds per call, after one to warm up."""
    call()
    bench.synchronize(args.device)
    started = time.perf_counter()
    for _ in range(repeat):
        call()
    bench.synchronize(args.device)
    return (time.perf_counter() - started) / repeat


def card(args):
    """The speed of a large matmul and of a copy in memory."""
    n = 256 if args.tiny else 8192
    a, b = torch.randn(2, n, n, device=args.device, dtype=torch.bfloat16)
    yield dict(matmul_flops=2 * n**3 / seconds_of(lambda: a @ b, args, 20), matmul_shape=n)
    x = torch.empty(n * n, device=args.device)
    y = torch.empty_like(x)
    yield dict(copy_bytes_per_second=2 * x.nbytes / seconds_of(lambda: y.copy_(x), args, 20))


def tests(args):
    """tests/test_gpu.py: the result of each test."""
    command = [sys.executable, "-m", "pytest", "-v", "-n", "0", "--color=no", "tests/test_gpu.py"]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            lines.append(line)
            if found := re.match(r"tests/test_gpu.py::(\S+) ([A-Z]+)", line):
                yield {found[1]: found[2]}
    yield dict(status=process.returncode, output="".join(lines)[-4000:] if process.returncode else "")


class Training:
    """A train_gpt2.py under way. Leaving the context kills it."""

    def __init__(self, args, data_dir, log_dir, *flags):
        size = (TINY if args.tiny else FULL).split()
        if not args.tiny:
            fits_64 = args.device == "cpu" or memory_of(args.device) > 7e10
            size += ["--micro_batch_size", "64" if fits_64 else "auto"]
        command = [sys.executable, ROOT / "train_gpt2.py", "-d", args.device, "--data_dir", data_dir,
                   "--log_dir", log_dir, *size, "--hellaswag_every", 0, "--sample_every", 0, "--log_every", 1,
                   "--no-plot", "--warmup_steps", 5, *flags]
        self.started, self.lines = time.perf_counter(), []
        self.process = subprocess.Popen(list(map(str, command)), text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT)

    def wait_for(self, words):
        """Read up to the line with these words: seconds since the start. Raises RuntimeError at the end."""
        for line in self.process.stdout:
            self.lines.append(line)
            if words in line:
                return time.perf_counter() - self.started
        raise RuntimeError(f"train_gpt2.py ended before {words!r}: {''.join(self.lines)[-2000:]}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def train(args):
    """30 steps with an evaluation and a save, a stop by SIGTERM, and a resume."""
    from kit.record import read_curves, read_record

    steps, flags = 30, ["--max_steps", 30, "--val_every", 10, "--save_every", 10]
    with tempfile.TemporaryDirectory() as directory:
        bench.make_shards(directory, 10**7)
        log_dir = f"{directory}/log"
        with Training(args, directory, log_dir, *flags) as run:
            begin = run.wait_for("parameters,")  # compiled by now
            first = run.wait_for("step     0 |")
            yield dict(seconds_until_compiled=begin, seconds_until_first_step=first)
            before, after = run.wait_for("step     9 |"), run.wait_for("step    10 |")
            run.wait_for("step    20 |")
            record, (_, speeds) = read_record(log_dir), read_curves(log_dir)["tok/s"]
            speed = statistics.median(speeds[5:])
            step = record["flags"]["total_batch_size"] / speed
            yield dict(tokens_per_second=speed, seconds_per_step=step,
                       micro_batch_size=record["flags"]["micro_batch_size"],
                       peak_memory_bytes=record["peak_memory_bytes"], attention=record["attention"],
                       compiled=record["compiled"], parameters=record["parameters"],
                       seconds_of_evaluation_and_save=after - before - step,
                       model_flops=record["flops_per_token"] * speed)
            run.process.terminate()
            stopped = time.perf_counter()
            run.wait_for("stopped by SIGTERM")
            yield dict(stop=dict(status=run.process.wait(), seconds=time.perf_counter() - stopped))
        with Training(args, directory, log_dir, *flags, "--resume") as run:
            run.wait_for("resuming")
            run.wait_for("finished")
            resumed = next(line for line in run.lines if "resuming" in line).strip()
            yield dict(resume=dict(status=run.process.wait(), message=resumed,
                                   val_loss=read_curves(log_dir)["val"][1][-1], steps=steps))


def profile(args):
    """Ten steps under torch.profiler: the table."""
    with tempfile.TemporaryDirectory() as directory:
        bench.make_shards(directory, 10**7)
        flags = ["--max_steps", 16, "--profile", 10, "--val_every", 0, "--save_every", 0]
        with Training(args, directory, f"{directory}/log", *flags) as run:
            run.wait_for("finished")
        yield dict(table=Path(directory, "log", "profile.txt").read_text())


def bf16_residuals(model):
    """The residual stream in bf16, as in llm.c: half the bytes, fewer digits."""
    model.transformer.drop.register_forward_hook(lambda module, inputs, x: x.to(torch.bfloat16))


def set_logits_at_once(count):
    loss.LOGITS_AT_ONCE.update(cuda=count, cpu=count)


# what differs from the default: in the process, in the model, in micro-batch (scale) or compilation (mode)
CHOICES = {
    "residual stream in bf16": (None, bf16_residuals, {}),
    "head: dX = dlogits @ w": (lambda: setattr(loss, "gradient_of_x", lambda g, w: g @ w), None, {}),
    "slices of 2**27 logits": (lambda: set_logits_at_once(2**27), None, {}),
    "slices of 2**30 logits": (lambda: set_logits_at_once(2**30), None, {}),
    "attention without cuDNN": (lambda: torch.backends.cuda.enable_cudnn_sdp(False), None, {}),
    "twice the micro-batch": (None, None, dict(scale=2)),
    "max-autotune-no-cudagraphs": (None, None, dict(mode="max-autotune-no-cudagraphs")),
}


class Arm(bench.Arm):
    """A training_arm in a process of its own: compiled code must not be shared between choices."""

    script = __file__


def training_arm(device, tiny, choice=None, prepare=compile_model, passes=8):
    """A unit is an optimizer step on `passes` micro-batches: the seconds per token, and the loss.

    prepare: makes the model that is called, from the arguments of compile_model.
    """
    process, change, more = CHOICES.get(choice, (None, None, {}))
    scale = more.get("scale", 1)
    tune(device, training=True)
    if process:
        process()
    B, T = (8, 32) if tiny else (32 if memory_of(device) > 7e10 else 8, 1024)
    B *= scale
    torch.manual_seed(0)
    model = GPT(GPTConfig(T, 512, 2, 2, 32) if tiny else GPTConfig()).to(device)
    if change:
        change(model)
    optimizer = model.configure_optimizers(0.1, 6e-4, device)
    compiled = prepare(model, "cuda", more.get("mode"))  # with a GPU's settings on a CPU too
    x, y = torch.randint(500, (2, B, T)).to(device)

    def unit(number):
        bench.synchronize(device)
        started = time.perf_counter()
        for _ in range(passes):
            with bench.autocast(device, "bfloat16"):
                result = compiled(x, y)[1]
            result.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bench.synchronize(device)
        return dict(seconds=(time.perf_counter() - started) / (passes * B * T), loss=result.item())

    unit(0), unit(0)  # compile, warm up
    return unit


def comparison(pairs):
    """What units of the default and of an alternative, [(default's, alternative's)], say about the latter."""
    return dict(times_as_fast=bench.spread([one["seconds"] / other["seconds"] for one, other in pairs]),
                loss=pairs[-1][1]["loss"], loss_of_default=pairs[-1][0]["loss"])


def choices(args):
    """Settings against the default, one at a time, in turn with it: how many times as fast each is."""
    settings = dict(work="choice", device=args.device, tiny=args.tiny)
    with Arm(**settings) as default:
        for choice in CHOICES:
            try:
                with Arm(**settings, choice=choice) as alternative:
                    pairs = [(default(i), alternative(i)) for i in range(3)]
            except SystemExit as error:  # out of memory, for example
                yield {choice: dict(error=str(error)[:500])}
                continue
            yield {choice: dict(comparison(pairs), peak_memory_bytes=pairs[0][1]["peak_bytes"])}


bench.ARMS["choice"] = training_arm


def ddp(args):
    """torch.compile outside of DistributedDataParallel, in turn with inside, as in a run: on all GPUs."""
    ranks = 2 if args.device == "cpu" else torch.cuda.device_count()
    if ranks < 2:
        yield dict(skipped="needs two GPUs")
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}",
               __file__, "--rank", json.dumps(dict(device=args.device, tiny=args.tiny))]
    yield json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def ddp_rank(device, tiny):
    """A rank of the ddp stage. Rank 0 prints the result.

    A step has one micro-batch per rank, as with eight GPUs: each backward pass averages gradients, which
    DistributedDataParallel can overlap with the rest of it only if the compiled graph is split.
    """
    results = bench.results_stream()
    ranks = Ranks(device)
    inside = training_arm(type_of(device), tiny, passes=1,
                          prepare=lambda model, *how: distribute(compile_model(model, *how), ranks))
    outside = training_arm(type_of(device), tiny, passes=1,
                           prepare=lambda model, *how: compile_model(distribute(model, ranks), *how))
    pairs = [(inside(i), outside(i)) for i in range(10)]
    if ranks.is_first:
        result = dict(comparison(pairs), ranks=ranks.world_size, over_nccl=ranks.over_nccl)
        print(json.dumps({"torch.compile outside of DDP": result}), file=results, flush=True)
    ranks.leave()


def peers(args):
    """bench.py's training, sampling and HellaSwag."""
    if args.tiny:
        yield dict(skipped="peers are measured at 124M only")
        return
    settings = argparse.Namespace(**args.bench)
    parts = [bench.bench_train(settings, only_largest=True), bench.bench_sample(settings)]
    if settings.hellaswag_data:
        parts.append(bench.bench_hellaswag(settings))
    for made in itertools.chain(*parts):
        yield {made["name"]: made}


def recipe(args):
    """250 steps of the 124M recipe on real shards: the validation loss, against the published one."""
    from kit.record import read_curves
    from kit.reference import REFERENCES, check, loss_at

    if args.tiny or not Path(args.data_dir).is_dir():
        yield dict(skipped=f"no shards in {args.data_dir}")
        return
    with tempfile.TemporaryDirectory() as directory:
        log_dir, published = f"{directory}/log", read_curves(REFERENCES / "build_nanogpt_pr30")["val"]
        flags = ["--total_batch_size", 524288, "--warmup_steps", 715, "--val_tokens", 10485760,
                 "--val_every", 50]
        with Training(args, args.data_dir, log_dir, *flags) as run:
            for step in range(50, 251, 50):
                run.wait_for(f"step {step}: val loss")
                curves = read_curves(log_dir)
                loss = curves["val"][1][-1]
                yield {f"step {step}": dict(val_loss=loss, published=loss_at(step, *published),
                                            warning=check(step, loss, log_dir),
                                            tokens_per_second=statistics.median(curves["tok/s"][1]))}


# ------------------------------------------------------------------------------------------------ the command


def end_group(group, grace=3):
    """End a process group by SIGTERM, so that torchrun ends its ranks, which are not in it; then SIGKILL."""
    with contextlib.suppress(ProcessLookupError):
        if grace:
            os.killpg(group, signal.SIGTERM)
            time.sleep(grace)
        os.killpg(group, signal.SIGKILL)


def run_stage(name, args, seconds, keep, command=(sys.executable, __file__)):
    """Run a stage in a process group of its own, for at most `seconds`. keep: called with each result."""
    request = json.dumps({**vars(args), "stage": name})
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([*command, "--stage", request], text=True, start_new_session=True, **pipes)
    errors = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()), daemon=True)
    reader.start()
    late = threading.Event()

    def stop():
        late.set()
        end_group(process.pid)

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        for line in process.stdout:
            keep(json.loads(line))
        status = process.wait()
    finally:
        timer.cancel()
        end_group(process.pid, grace=0 if process.poll() is not None else 3)  # and what the stage has started
    reader.join(5)
    if late.is_set():
        keep(dict(unfinished=f"stopped after {seconds:.0f} s"))
    elif status:
        keep(dict(error="".join(errors)[-2000:]))


def read_results(path):
    """The results of an earlier call. Raises UserError if the file has none."""
    try:
        results = json.loads(Path(path).read_text())
        return dict(device=results["device"], stages=dict(results["stages"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--json {path} has no results of this script: name another file") from error


def main(args):
    check_output("--json", args.json, args.hellaswag_data)
    args.device = pick_device(args.device)
    if args.device not in ("cpu", "cuda"):
        raise UserError(f"--device {args.device}: only cuda is measured; CUDA_VISIBLE_DEVICES selects a GPU")
    if args.device == "cpu" and not args.tiny:
        raise UserError("--device cpu: only with --tiny; bench.py measures a CPU")
    end = time.monotonic() + 60 * args.minutes
    results = dict(machine(args.device), tiny=args.tiny, stages={})
    if Path(args.json).exists():
        earlier = read_results(args.json)
        if earlier["device"] != results["device"]:
            raise UserError(f"--json {args.json} has results of another device, {earlier['device']}: name "
                            "another file")
        results["stages"] = earlier["stages"]
    for name in args.stages:
        results["stages"][name] = stage = {}

        def keep(result, name=name, stage=stage):
            stage.update(result)
            print(f"{name}: {json.dumps(result)[:300]}", flush=True)
            with atomic_write(args.json) as file:
                json.dump(results, file, indent=1)

        left = end - time.monotonic()
        if left < 5:
            keep(dict(skipped="no time left"))
        else:
            started = time.monotonic()
            run_stage(name, args, min(left, STAGES[name]), keep)
            keep(dict(seconds=time.monotonic() - started))
    print(f"results: {args.json}")


def serve(request):
    """Run a stage in this process and print each of its results as a line of JSON."""
    args = Parser().parse_args([])
    vars(args).update(json.loads(request))
    results = bench.results_stream()

    def end_with_parent():
        os.read(0, 1)  # nothing is ever written: this returns when the parent is gone, even by SIGKILL
        end_group(os.getpgrp())

    threading.Thread(target=end_with_parent, daemon=True).start()
    tune(args.device, training=True)
    for result in globals()[args.stage](args):
        print(json.dumps(result), file=results, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm"]:
        run_script(lambda request: bench.arm(**json.loads(request)), sys.argv[2])
    elif sys.argv[1:2] == ["--rank"]:
        run_script(lambda request: ddp_rank(**json.loads(request)), sys.argv[2])
    elif sys.argv[1:2] == ["--stage"]:
        signal.signal(signal.SIGTERM, lambda *_: None)  # it is meant for the processes that the stage started
        run_script(serve, sys.argv[2])
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        run_script(main, args)
