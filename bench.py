"""How fast is it, compared with its peers and with the machine's limit?

    python bench.py all                                     # or train, hellaswag, sample, data, start
    python bench.py train --peer nanoGPT=../nanoGPT --peer build-nanogpt=../build-nanogpt
    python bench.py all --json bench.json

Each measured program (an "arm") runs in its own process, so that no setting of one affects another. On a CPU
the arms take turns, because a machine's speed drifts: in a round, this project (A) and a peer (B) do one unit
of work each, and the limit (L) is measured before and after A: L A L B L A L B ... A ratio is the median over
the rounds, with its range. The model is the 124M with random weights, which take as long as trained ones.

The limits of training and HellaSwag: the fastest known matmuls of the model's own shapes, where training's
FLOPs count causal attention and HellaSwag's no attention. Of sampling: the matmuls alone, with as many rows
as are sampled. Of data: one thread of the tokenizer times the number of cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from kit.flags import Parser, from_command_line, integer

FP32 = ", fp32"  # at the end of a peer's name: in fp32, its own default on a CPU
PARTS = ("train", "hellaswag", "sample", "data", "start")
PROMPT = [15496, 11, 314, 1101, 257, 3303, 2746, 11]  # "Hello, I'm a language model,"


def parse_args(argv=None):
    parser = Parser(
        description="Measure this project, its peers and the machine's limit.",
        usage="python bench.py {train,hellaswag,sample,data,start,all} [--flag value ...]",
        aliases={"--text": "--input"},
    )
    parser.add_argument("part", choices=(*PARTS, "all"), help="what to measure")
    parser.add_argument("-d", "--device", help="cuda or cpu (default: auto-detected)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=DIR",
                        help="a checkout of nanoGPT or build-nanogpt")
    parser.add_argument("--rounds", type=integer(1), default=3,
                        help="rounds per comparison; at most 3 for the data")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"),
                        help="dtype in training and HellaSwag (default: that of the scripts)")
    parser.add_argument("--hellaswag_data", metavar="FILE",
                        help="local HellaSwag examples (default: downloaded)")
    parser.add_argument("--input", nargs="+", metavar="FILE",
                        help=".parquet files with a column text (default: text of the installed packages)")
    parser.add_argument("--json", metavar="OUT", help="write all numbers to this file")
    args = parser.parse_args(argv)
    args.peers = {}
    for peer in args.peer:
        name, _, directory = peer.partition("=")
        if name not in ("nanoGPT", "build-nanogpt") or not Path(directory, "train_gpt2.py" if "-" in name
                                                                else "model.py").is_file():
            parser.error(f"argument --peer: {peer}: must be nanoGPT=DIR or build-nanogpt=DIR")
        args.peers[name] = directory
    for flag, paths in (("hellaswag_data", [args.hellaswag_data]), ("input", args.input or [])):
        for path in paths:  # now, not after half an hour of other parts
            if path and not Path(path).is_file():
                parser.error(f"argument --{flag}: {path}: no such file")
    return args


if __name__ == "__main__" and sys.argv[1:2] != ["--arm"]:
    args = from_command_line(parse_args)

import contextlib
import math
import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from kit import peers
from kit.files import UserError, atomic_write, check_output, run_script
from tokenizer import get_fast_tokenizer

# ---------------------------------------------------------------------------------------- in an arm's process


def synchronize(device):
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def gpt(device, name="ours", directory=None):
    """A 124M with random weights, and how its training loop uses it: (model, loss, optimizer, compiled).

    loss: a function of (model, x, y). See `kit.peers.load`.
    """
    import torch
    import torch.nn.functional as F

    from model import GPT, GPTConfig

    torch.manual_seed(0)
    if name.startswith("ours") or name in ("limit", "tutorial"):
        model = GPT(GPTConfig()).to(device)
        if name == "tutorial":  # all logits at once, nothing compiled, nothing fused
            optimizer = torch.optim.AdamW(model.parameters(), **peers.ADAMW)
            return (model, lambda m, x, y: F.cross_entropy(m(x)[0].flatten(0, 1), y.flatten()), optimizer,
                    False)
        return model, lambda m, x, y: m(x, y)[1], model.configure_optimizers(0.1, 6e-4, device), True
    return peers.load(name, device, directory)


def results_stream():
    """stdout, for results alone: whatever else is printed, by C++ code too, goes to stderr from here on."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return results


def autocast(device, dtype):
    """Matmuls in bfloat16, unless dtype is "float32"."""
    import torch
    return contextlib.nullcontext() if dtype == "float32" else torch.autocast(device, torch.bfloat16)


def train_arm(name, device, B, T, dtype, directory=None):
    """A unit is an optimizer step on `passes` micro-batches of B x T tokens; its time is per micro-batch."""
    import torch

    from kit.device import compile_model, tune

    if name == "ours" or device == "cuda":
        tune(device, training=True)
    if name.endswith(FP32):
        name, dtype = name.removesuffix(FP32), "float32"
    model, loss_of, optimizer, compiled = gpt(device, name, directory)
    if compiled:
        model = compile_model(model, device) if name == "ours" else torch.compile(model)
    generator = torch.Generator().manual_seed(0)

    passes = 16 if device == "cuda" else 1  # on a GPU as many as in a real run: steadier timing, too

    def unit(number):
        tokens = torch.randint(50257, (B, T + 1), generator=generator).to(device)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()  # as the peers' loaders make them
        started = time.perf_counter()
        for _ in range(passes):
            with autocast(device, dtype):
                loss = loss_of(model, x, y)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        synchronize(device)
        return dict(seconds=(time.perf_counter() - started) / passes)

    unit(0)  # compiles
    unit(0)
    return unit


def matmul_arm(device, rows, backward, dtype):
    """A unit runs each matmul of a forward (and backward) pass over `rows` tokens once. Result: FLOP/s."""
    import torch

    from kit.device import tune
    from kit.loss import row_slices
    from kit.packed import fp32_linear, onednn_is_faster

    tune(device, training=True)
    dtype = getattr(torch, dtype)
    repeat = 10 if device == "cuda" else 1

    def matmul(a, b):
        return partial(torch.mm, a, b, out=torch.empty(len(a), b.size(1), device=device, dtype=dtype))

    C, head = 768, 50304
    matmuls = []  # (the ways to compute it, how often it occurs, its FLOPs)
    for fan_in, fan_out, layers in ((C, 3 * C, 12), (C, C, 12), (C, 4 * C, 12), (4 * C, C, 12), (C, head, 1)):
        x = torch.randn(rows, fan_in, device=device, dtype=dtype)
        if fan_out == head:
            x = x[row_slices(x, head)[0]]  # the loss is computed in slices
        w = torch.randn(fan_out, fan_in, device=device, dtype=dtype)
        packed = device == "cpu" and dtype == torch.float32 and not backward and onednn_is_faster()
        if packed:  # weights that do not change are packed
            ways = [[partial(fp32_linear(torch.nn.Linear(fan_in, fan_out, bias=False)), x)]]
        else:
            ways = [[matmul(x, w.t())]]
        if backward:
            g = torch.randn(len(x), fan_out, device=device, dtype=dtype)
            # which way is faster for the head's dX depends on the processor
            dx = [matmul(g, w)] + ([matmul(w.t(), g.t())] if fan_out == head else [])
            ways += [dx, [matmul(g.t(), x)]]
        matmuls += [(calls, layers * rows / len(x), 2 * len(x) * fan_in * fan_out) for calls in ways]

    def seconds_of(call):
        call()
        synchronize(device)
        started = time.perf_counter()
        for _ in range(repeat):
            call()
        synchronize(device)
        return (time.perf_counter() - started) / repeat

    @torch.no_grad()
    def unit(number):
        seconds = flops = 0
        for calls, count, cost in matmuls:
            seconds += count * min(map(seconds_of, calls))
            flops += count * cost
        return dict(rate=flops / seconds)

    unit(0)
    return unit


def hellaswag_arm(name, device, data, chunk, dtype):
    """Unit n is the n-th chunk of `chunk` examples. We score all of it, because larger batches need less
    padding; a peer scores every twelfth example, one at a time."""
    import torch
    import torch.nn.functional as F

    import hellaswag
    from kit.device import tune
    from kit.packed import onednn_is_faster, pack
    from tokenizer import get_tokenizer

    if name == "ours" or device == "cuda":
        tune(device)
    model = gpt(device, name)[0].eval()
    if name == "ours" and device == "cpu" and dtype == "float32" and onednn_is_faster():  # as in hellaswag.py
        pack(model)
    tokenizer, examples = get_tokenizer("gpt2"), list(hellaswag.iterate_examples(data))
    random.Random(0).shuffle(examples)  # the file begins with the short ones

    @torch.no_grad()
    def one_at_a_time(example):
        """Four rows padded to the longest, all of their logits, and the loss after the context."""
        context, endings = hellaswag.render_example(example, tokenizer)
        length = len(context) + max(map(len, endings))
        ids = torch.tensor([context + e + [0] * (length - len(context) - len(e)) for e in endings]).to(device)
        logits = model(ids).logits if name == "transformers" else model(ids)[0]  # (4, T, V)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        losses = losses.view(4, -1)[:, len(context) - 1 :].cpu()
        means = [row[: len(ending)].double().mean().item() for row, ending in zip(losses, endings)]
        return means.index(min(means))

    def unit(number, chunk=chunk):
        first = number * chunk % max(chunk, len(examples) - chunk + 1)
        part = examples[first : first + chunk][:: 1 if name == "ours" else 12]
        started = time.perf_counter()
        with autocast(device, dtype):
            if name == "ours":
                predictions = hellaswag.evaluate(model, tokenizer, part)["predictions_norm"]
            else:
                predictions = [one_at_a_time(example) for example in part]
        seconds = time.perf_counter() - started
        rows, _ = hellaswag.render(part, tokenizer, 1024)
        return dict(seconds=seconds, predictions=predictions, examples=len(part),
                    tokens=sum(len(row.ids) for row in rows), scored=sum(len(row.targets) for row in rows))

    unit(0, 24)  # warms up
    return unit


def sample_arm(name, device, batch_size, directory=None):
    """A unit is 128 greedy tokens after a prompt of eight, for each row of a batch."""
    import torch

    from kit.packed import fp32_linear, pack

    torch.set_grad_enabled(False)
    prompt = torch.tensor([PROMPT] * batch_size).to(device)
    model = gpt(device, name, directory)[0].eval()
    if name == "limit" and device == "cuda":  # read all weights once: small matmuls would measure launches
        weights = torch.cat([parameter.flatten() for parameter in model.parameters()])

        def generate():
            for _ in range(128):
                weights.sum()
    elif name == "limit":
        layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        inputs = [torch.randn(batch_size, layer.in_features, device=device) for layer in layers]
        matmuls = list(map(fp32_linear, layers))

        def generate():
            for _ in range(128):
                for matmul, x in zip(matmuls, inputs):
                    matmul(x)
    elif name == "transformers":
        def generate():
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                  max_new_tokens=128, min_new_tokens=128, pad_token_id=50256)
    elif name == "nanoGPT":
        def generate():
            return model.generate(prompt, 128, top_k=1)
    elif name == "tutorial":  # all logits of all tokens, again for each new token
        def generate():
            tokens = prompt
            for _ in range(128):
                tokens = torch.cat([tokens, model(tokens)[0][:, -1:].argmax(-1)], dim=1)
            return tokens
    else:
        plain = model.generate(prompt, 128, temperature=0)
        predicted = model(plain)[0].argmax(-1)
        if device == "cpu":  # as in sample.py
            pack(model, int8=name.endswith("int8"))
        agreement = (model(plain)[0].argmax(-1) == predicted).float().mean().item()

        def generate():
            return model.generate(prompt, 128, temperature=0)

    def unit(number):
        started = time.perf_counter()
        generate()
        synchronize(device)
        seconds = time.perf_counter() - started
        return dict(seconds=seconds, **({"agreement": agreement} if name == "ours int8" else {}))

    unit(0)
    return unit


ARMS = dict(train=train_arm, hellaswag=hellaswag_arm, sample=sample_arm, matmul=matmul_arm)


def arm(work, **settings):
    """Serve one arm: a line on stdin asks for the unit with that number, a line of JSON on stdout answers."""
    from kit.device import peak_memory

    answers = results_stream()
    unit = ARMS[work](**settings)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        answer = unit(int(line))
        print(json.dumps(dict(answer, peak_bytes=peak_memory(settings["device"]))), file=answers, flush=True)


# ------------------------------------------------------------------------------------------------- the rounds


class Arm:
    """An arm in a process of its own. Calling it runs a unit."""

    script = __file__

    def __init__(self, **settings):
        self.request, self.stderr = json.dumps(settings), tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([sys.executable, self.script, "--arm", self.request], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr)
        self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.stderr.seek(0)
            sys.exit(f"error: the arm {self.request} ended: {self.stderr.read()[-2000:]}")
        return json.loads(line)

    def __call__(self, number):
        print(number, file=self.process.stdin, flush=True)
        return self.answer()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def compare(opponents, directories, rounds, limit, name="ours", **settings):
    """The answers of each round: [(ours, the limit's)] and {peer: [(ours, the peer's)]}.

    opponents: the peers' names. directories: their checkouts. limit: the settings of the limit's arm.
    settings: of the other arms. On a GPU, whose memory they would share, one arm runs after the other, and a
    peer that fails is left out.
    """
    units, pairs = [], {}

    def theirs(peer):
        directory = directories.get(peer.removesuffix(FP32))
        return Arm(name=peer, **settings, **({"directory": directory} if directory else {}))

    if settings["device"] == "cuda":
        with Arm(**limit) as arm:
            limits = [arm(i) for i in range(rounds)]
        with Arm(name=name, **settings) as arm:
            ours = [arm(i) for i in range(rounds)]
        units = list(zip(ours, limits))
        for peer in opponents:
            try:
                with theirs(peer) as arm:
                    pairs[peer] = [(ours[i], arm(i)) for i in range(rounds)]
                print(f"  {settings['work']}: {peer} measured", file=sys.stderr, flush=True)
            except SystemExit as error:  # out of memory, for example
                print(f"  {peer} is left out: {error}", file=sys.stderr, flush=True)
        return units, pairs
    with Arm(**limit) as limit, Arm(name=name, **settings) as mine:
        for peer in opponents:
            with theirs(peer) as arm:
                pairs[peer] = []
                for i in range(rounds):
                    before, ours, after = limit(i), mine(i), limit(i)
                    units.append((ours, {key: (before[key] + after[key]) / 2 for key in before}))
                    pairs[peer].append((ours, arm(i)))
                print(f"  {settings['work']}: {peer} measured", file=sys.stderr, flush=True)
    return units, pairs


def spread(values):
    values = sorted(values)
    return dict(median=statistics.median(values), min=values[0], max=values[-1])


def row(name, unit, results, ratios, fractions=None, **more):
    """A row of the table: our result, and the ratios to each peer in all rounds."""
    made = dict(name=name, unit=unit, figure=spread(results), **more)
    made["ratios"] = {peer: spread(values) for peer, values in ratios.items()}
    made["limit"] = spread(fractions) if fractions else None
    return made


def show(made):
    figure = f"{made['figure']['median']:,.4g} {made['unit']}"
    limit = made["limit"]
    limit = f"{limit['median']:.2f} ({limit['min']:.2f} to {limit['max']:.2f})" if limit else ""
    for i, (peer, r) in enumerate(made["ratios"].items() or [("", None)]):
        ratio = f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})" if r else ""
        head = (made["name"], figure, limit) if i == 0 else ("", "", "")
        print(f"{head[0]:<34}{head[1]:>22}   {peer:<24}{ratio:>22}   {head[2]}".rstrip(), flush=True)
    for note in made.get("notes", []):
        print(f"{'':<34}  {note}", flush=True)


# -------------------------------------------------------------------------------------------------- the parts


def ratios_of(pairs, each=None):
    """How many times as fast as each peer we are, in each round. each: the key of the number of items."""
    def seconds_each(answer):
        return answer["seconds"] / (answer[each] if each else 1)

    return {peer: [seconds_each(b) / seconds_each(a) for a, b in rounds] for peer, rounds in pairs.items()}


def train_sizes(device):
    """The micro-batches to measure, (B, T) each, and the dtype of training on this device."""
    from kit.device import memory_of

    if device == "cpu":
        return ((4, 256), (4, 1024)), "float32"
    largest = 2 ** int(math.log2(memory_of(device) / 1.2e9))  # peers' logits take 1 GB per row in fp32
    return tuple((B, 1024) for B in (32, 64) if B <= largest) or ((largest, 1024),), "bfloat16"


def bench_train(args, only_largest=False):
    sizes, dtype = train_sizes(args.device)
    dtype = args.dtype or dtype
    for B, T in sizes[-1:] if only_largest else sizes:
        opponents = ["transformers compiled", *args.peers]
        if args.device == "cpu" and dtype == "bfloat16":
            opponents += [f"{peer}{FP32}" for peer in opponents if peer != "build-nanogpt"]
        if (B, T) != (4, 1024):  # at 4 x 1024 these take half a minute per step
            opponents += ["transformers", "tutorial"]
        limit = dict(work="matmul", device=args.device, rows=B * T, backward=True, dtype=dtype)
        units, pairs = compare(opponents, args.peers, args.rounds, limit,
                               work="train", device=args.device, B=B, T=T, dtype=dtype)
        flops = 6 * (12 * 12 * 768**2 + 50304 * 768) + 12 * 12 * T * 768 / 2  # per token, causal
        peak = {peer: max(b["peak_bytes"] for _, b in rounds) / 1e9 for peer, rounds in pairs.items()}
        peak["ours"] = max(a["peak_bytes"] for a, _ in units) / 1e9
        memory = "peak memory, GB: " + ", ".join(f"{name} {value:.1f}" for name, value in peak.items())
        rates = [B * T / a["seconds"] for a, _ in units]
        yield row(f"train 124M, {B} x {T}, {dtype}", "tokens/s", rates, ratios_of(pairs),
                  [B * T * flops / a["seconds"] / limit["rate"] for a, limit in units],
                  notes=[memory], peak_gb=peak)


def bench_hellaswag(args):
    import hellaswag

    data = str(args.hellaswag_data or hellaswag.download())
    dtype = args.dtype or "float32"  # as in hellaswag.py; TF32 on a GPU
    chunk = 3000 if args.device == "cuda" else 600
    limit = dict(work="matmul", device=args.device, rows=2**11 if args.device == "cpu" else 2**15,
                 backward=False, dtype=dtype)
    units, pairs = compare(["tutorial", "transformers"], {}, args.rounds, limit,
                           work="hellaswag", device=args.device, data=data, chunk=chunk, dtype=dtype)
    same = total = 0
    for a, b in pairs.get("tutorial", []):
        same += sum(p == q for p, q in zip(a["predictions"][::12], b["predictions"]))
        total += b["examples"]
    fractions = [2 * (12 * 12 * 768**2 * a["tokens"] + 50304 * 768 * a["scored"])
                 / a["seconds"] / limit["rate"] for a, limit in units]
    rates = [a["examples"] / a["seconds"] for a, _ in units]
    yield row(f"HellaSwag 124M, {dtype}", "examples/s", rates, ratios_of(pairs, "examples"), fractions,
              notes=[f"same prediction as the tutorial's loop: {same} of {total}"], same=same, total=total)


def bench_sample(args):
    rows = [("ours", 1), ("ours", 8)] + ([("ours int8", 1)] if args.device == "cpu" else [])
    for name, batch_size in rows:
        opponents = ["transformers"]
        if (name, batch_size) == ("ours", 1):  # without a cache, a batch of eight takes minutes
            opponents += ["tutorial", *(peer for peer in args.peers if peer == "nanoGPT")]
        settings = dict(work="sample", device=args.device, batch_size=batch_size)
        units, pairs = compare(opponents, args.peers, args.rounds, dict(settings, name="limit"), name,
                               **settings)
        fractions = [limit["seconds"] / a["seconds"] for a, limit in units] if name == "ours" else None
        notes, more = [], {}
        if name == "ours int8":
            more = dict(agreement=units[0][0]["agreement"])
            notes = [f"greedy choice as in fp32: {more['agreement']:.1%} of positions (random weights)"]
        kind = f"sample 124M, batch {batch_size}" + name.removeprefix("ours").replace(" ", ", ")
        rates = [128 * batch_size / a["seconds"] for a, _ in units]
        yield row(kind, "tokens/s", rates, ratios_of(pairs), fractions, notes=notes, **more)


def bench_data(args):
    import numpy as np
    import pyarrow
    import pyarrow.parquet

    with tempfile.TemporaryDirectory() as directory:
        files = args.input
        if not files:
            texts = peers.package_texts(3 * 10**8)
            columns = {"text": texts} | {name: [f"{name} of a page"] * len(texts) for name in (
                "id", "dump", "url", "file_path", "language")} | {name: [0.5] * len(texts) for name in (
                    "language_score", "token_count", "score", "int_score")}
            files, half = [], len(texts) // 2
            for name, part in (("a", slice(half)), ("b", slice(half, None))):
                files.append(f"{directory}/{name}.parquet")
                part = pyarrow.table({column: values[part] for column, values in columns.items()})
                pyarrow.parquet.write_table(part, files[-1], row_group_size=1000)
        texts = pyarrow.parquet.read_table(files[0], columns=["text"]).column(0).to_pylist()
        size = sum(pyarrow.compute.sum(pyarrow.compute.binary_length(
            pyarrow.parquet.read_table(path, columns=["text"]).column(0))).as_py() for path in files)
        ratios, rates, fractions = [], [], []
        code = "import sys; from kit.peers import tutorial_shards; tutorial_shards(sys.argv[2:], sys.argv[1])"
        for number in range(min(args.rounds, 3)):
            out = [Path(directory, f"{name}{number}") for name in ("ours", "theirs")]
            out[1].mkdir()
            root = Path(__file__).parent
            ours = seconds([sys.executable, root / "fineweb_edu.py", "--input", *files, "--data_dir", out[0]])
            theirs = seconds([sys.executable, "-c", code, out[1], *files], cwd=root)
            shards = [sorted(part.glob("*.npy"), key=lambda path: path.stem[-6:]) for part in out]
            both = [np.concatenate(list(map(np.load, paths))) for paths in shards]
            if not np.array_equal(*both):
                sys.exit("error: the shards differ from the tutorial's")
            ratios.append(theirs / ours)
            rates.append(size / ours / 1e6)
            if get_fast_tokenizer("gpt2"):
                with ThreadPoolExecutor(1) as thread:  # a new thread's tokenizer has an empty cache
                    rate = thread.submit(tokenizer_rate, texts).result()
                fractions.append(size / ours / rate / os.cpu_count())
    yield row(f"data: {size / 1e6:.0f} MB of parquet to shards", "MB/s", rates,
              {"tutorial (Pool.imap)": ratios}, fractions, notes=["identical token ids"])


def tokenizer_rate(texts):
    """Bytes of text per second of this thread's tokenizer."""
    fast = get_fast_tokenizer("gpt2")
    started = time.perf_counter()
    fast.encode_batch(texts, parallel=False)
    taken = time.perf_counter() - started
    return sum(len(text.encode()) for text in texts) / taken


def seconds(command, **options):
    os.sync()  # so that no arm waits for writes of another
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command[:3]))} ended: {done.stderr[-2000:]}")
    return time.perf_counter() - started


def first_step(device, directory, cache):
    """Seconds from the start of train_gpt2.py to its first step. cache: Inductor's cache directory."""
    B, T = (32, 1024) if device == "cuda" else (4, 256)
    flags = dict(data_dir=directory, log_dir=tempfile.mkdtemp(dir=directory), device=device, max_steps=1,
                 total_batch_size=B * T, micro_batch_size=B, sequence_length=T, val_tokens=T)
    flags |= dict.fromkeys(("val_every", "hellaswag_every", "sample_every", "save_every"), 0)
    command = [sys.executable, Path(__file__).parent / "train_gpt2.py"]
    command += [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    started = time.perf_counter()
    with subprocess.Popen(command, env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step     0 |"):
                return time.perf_counter() - started
    sys.exit(f"error: train_gpt2.py ended: {''.join(lines)[-2000:]}")


def make_shards(directory, count):
    """A val and a train shard of `count` random tokens in place of text: they take as long."""
    import numpy as np

    tokens = np.random.default_rng(0).integers(50257, size=count, dtype=np.uint16)
    for split in ("val", "train"):
        np.save(f"{directory}/edu_{split}_000000.npy", tokens)


def bench_start(args):
    with tempfile.TemporaryDirectory() as directory:
        make_shards(directory, 10**6)
        for kind in ("cold", "warm"):
            taken = first_step(args.device, directory, f"{directory}/cache")
            yield row(f"train_gpt2.py to step 0, cache {kind}", "s", [taken], {})
    root = Path(__file__).parent
    for script in ("train_gpt2", "fineweb_edu", "hellaswag", "sample", "tokenizer", "bench"):
        times = [seconds([sys.executable, root / f"{script}.py", "--help"]) for _ in range(args.rounds)]
        yield row(f"{script}.py --help", "s", times, {})
    codes = ("import torch", "import torch, model")
    pairs = [[seconds([sys.executable, "-c", code], cwd=root) for code in codes]
             for _ in range(2 + 3 * args.rounds)][2:]  # the first ones read files from the disk
    yield row("import model beyond import torch", "s", [b - a for a, b in pairs], {})


def main(args):
    import torch

    from kit.device import machine, pick_device

    check_output("--json", args.json, args.hellaswag_data, *(args.input or ()))
    args.device = pick_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.device not in ("cpu", "cuda"):
        raise UserError(f"--device {args.device}: only cpu and cuda are measured")
    facts = machine(args.device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    print(f"\n{'work':<34}{'value':>22}   {'against':<24}{'ratio':>22}   fraction of the limit", flush=True)
    rows = []
    for part in PARTS if args.part == "all" else (args.part,):
        for made in globals()[f"bench_{part}"](args):
            rows.append(made)
            show(made)
            if args.json:  # after each row, so that an interrupted run keeps what it measured
                with atomic_write(args.json) as file:
                    json.dump(dict(**facts, rows=rows), file, indent=1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm"]:
        run_script(lambda request: arm(**json.loads(request)), sys.argv[2])
    else:
        run_script(main, args)
