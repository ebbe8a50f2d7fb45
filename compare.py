"""Compare recipes: train each on the same data in the same order, with one or more seeds, and report.

    python compare.py configs/demo.txt "configs/demo.txt --norm rmsnorm"           # one change, one seed
    python compare.py BASE.txt VARIANT.txt --seeds 3 --sweep max_lr=3e-3,6e-3      # each at its best rate
    python compare.py --scaling 2x64,3x96,4x128,5x160,6x192 BASE.txt               # loss against size
    python compare.py --speedrun NEW.txt OLD.txt --seeds 3                         # docs/speedrun.md

An arm is a config file, or a config and flags of train_gpt2.py in quotes. The first arm is the baseline (with
--speedrun: the second). Each run has its own directory in --out; the same command continues where it was
stopped. The result is a table, report.md, and a picture, curves.png.

With --sweep, each arm first trains with every value and one seed. The best value is chosen on the first half
of the val split. The runs that are reported have other seeds and are validated on the second half.
"""

import argparse
import contextlib
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from kit import recipe
from kit.flags import Parser, as_flags, from_command_line, integer, integer_or_auto, number

FIRST_SEED = 1337
# fields of run.json that affect speed
SETUP = ("device_name", "threads", "world_size", "dtype", "compiled", "torch")
QUIET = ("--hellaswag_every", "0", "--sample_every", "0", "--no-plot")  # added to every run
SPEEDRUN_TARGET = 1.84  # bits per byte of the demo's val split: docs/speedrun.md


def parse_args(argv=None):
    parser = Parser(description="Compare recipes on the same data.",
                    usage="python compare.py ARM [ARM ...] [--seeds N] [--sweep FLAG=V,...] [--flag value]",
                    epilog="The flags of the groups above apply to all arms; without them, each config's "
                           "value holds. Other flags of train_gpt2.py can be part of an arm.")
    add = parser.add_argument
    add("arms", nargs="+", metavar="ARM",
        help="a config, or a config and flags in quotes; the first is the baseline (with --speedrun: the "
             "second)")
    add("--seeds", type=integer(1), default=1, metavar="N", help="runs of each arm, each with its own seed")
    add("--first_seed", type=integer(0), metavar="N",
        help=f"the seeds are N, N + 1, ... (default: {FIRST_SEED}, or after a --sweep {FIRST_SEED + 1})")
    add("--sweep", action="append", default=[], metavar="FLAG=VALUE,...",
        help="tune FLAG for each arm over these values; repeat for a grid")
    add("--any_version", action="store_true",
        help="accept finished runs of other versions of this code")
    add("--scaling", metavar="LAYERSxWIDTH,...", type=sizes_of, default=[],
        help="train one arm at five or more sizes; predict the loss of the largest from the others")
    add("--tokens_per_parameter", type=number(0.01), default=20.0,
        help="training tokens per parameter, with --scaling")
    add("--speedrun", action="store_true",
        help="compare the times of the whole commands of two arms; see docs/speedrun.md")
    add("--out", default="log_compare", metavar="DIR", help="directory of the runs and the report")
    add("--nproc", type=integer(1), default=1, metavar="N", help="ranks of each run, started by torchrun")
    own = {action.dest for action in parser._actions}
    add = parser.add_argument_group("run").add_argument
    as_there = dict(default=argparse.SUPPRESS, help="as in train_gpt2.py")
    add("--data_dir", metavar="DIR", **as_there)
    add("-d", "--device", **as_there)
    add("--dtype", metavar="DTYPE", **as_there)
    add("--compile", action=argparse.BooleanOptionalAction, **as_there)
    add("--micro_batch_size", type=integer_or_auto(1), metavar="N", **as_there)
    add("--val_every", type=integer(1), **as_there)
    recipe.add_flags(parser, default=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    common = {name: value for name, value in vars(args).items() if name not in own}
    args.common = as_flags(common)
    sweeps = [sweep.partition("=")[::2] for sweep in args.sweep]
    for used, why, names in (
            (True, "use --seeds", ["seed"]), (sweeps, "--sweep sets it", ["val_start"]),
            (args.scaling, "--scaling sets it", ["n_layer", "n_head", "n_embd", "max_steps"]),
            (args.speedrun, "a speedrun reads the whole val split", ["val_start", "val_tokens"])):
        for name in common.keys() & set(names if used else ()):
            parser.error(f"argument --{name}: {why}")
    for name, values in sweeps:
        if name not in recipe.IDENTITY or name in ("seed", "val_start", "val_tokens") or not values:
            parser.error(f"argument --sweep: {name}={values} must be a flag of a recipe and its values, as "
                         "in max_lr=1e-3,3e-3")
    if args.first_seed is None:  # the seed used for choosing is not reported: choosing biases its results
        args.first_seed = FIRST_SEED + bool(sweeps)
    elif sweeps and args.first_seed <= FIRST_SEED < args.first_seed + args.seeds:
        parser.error(f"argument --first_seed: --sweep chooses with seed {FIRST_SEED}: report other seeds")
    args.grid = [{name: {"true": True, "false": False}.get(value.lower(), value)
                  for (name, _), value in zip(sweeps, chosen)}
                 for chosen in product(*(values.split(",") for _, values in sweeps))]
    if args.speedrun and (len(args.arms) != 2 or sweeps):
        parser.error("argument --speedrun: it compares two arms, a new one and an old one, without --sweep")
    if args.scaling and (len(args.arms) != 1 or sweeps or len(set(args.scaling)) < 5):
        parser.error("argument --scaling: it needs one arm and five different sizes or more, without --sweep")
    if not args.scaling and not 2 <= len(args.arms) <= 7:
        parser.error("a comparison needs two arms or more, the baseline first, and at most seven")
    return args


def sizes_of(text):
    """LAYERSxWIDTH,... as pairs of ints."""
    try:
        return [(int(layers), int(width)) for layers, width in (size.split("x") for size in text.split(","))]
    except ValueError:
        example = "2x64,3x96,4x128,5x160,6x192"
        raise argparse.ArgumentTypeError(f"{text} should be sizes such as {example}") from None


if __name__ == "__main__":
    args = from_command_line(parse_args)

import numpy as np

import fineweb_edu
import train_gpt2
from kit import curves, plan, shards
from kit.experiments import PowerLaw, Result, as_text, interval, with_deviation
from kit.files import UserError, atomic_write, count, run_script
from kit.record import source


@dataclass
class Arm:
    """One of the recipes that are compared."""

    text: str  # as the user wrote it
    words: list  # of its command line
    settings: dict = field(default_factory=dict)  # chosen by a sweep
    results: list = field(default_factory=list)  # of its runs, by seed

    @property
    def name(self):
        """For the report and for directories: the config's name, and the flags after it."""
        config, *flags = shlex.split(self.text)
        return " ".join([Path(config).stem.lstrip("@"), *flags])


def open_arm(text, args):
    """Parse one ARM of the command line. Raises UserError, or exits, if it can't be trained."""
    try:
        config, *flags = shlex.split(text)
    except ValueError as error:
        raise UserError(f"the arm {text!r} is not a config and flags ({error})") from error
    words = [config if config.startswith("@") else f"@{config}", *args.common, *flags]
    for settings in args.grid:  # all, so that a mistake is found before the first run
        parsed = train_gpt2.parse_args([*words, *as_flags(settings)])
        train_gpt2.model_config(parsed)
        recipe.count_micro_batches(parsed, args.nproc)
        if not parsed.val_every:
            raise UserError(f"{text}: --val_every 0 leaves nothing to compare")
    return Arm(text, words)


def check_same(arms):
    """Raise UserError unless the arms read the same data and are validated on the same text."""
    first, *others = (train_gpt2.parse_args(arm.words) for arm in arms)
    for arm, other in zip(arms[1:], others):
        for name in ("data_dir", "sequence_length", "val_tokens", "val_start"):
            if getattr(first, name) != getattr(other, name):
                raise UserError(f"{arm.name} has --{name} {getattr(other, name)}, {arms[0].name} has "
                                f"{getattr(first, name)}: give all arms the same, to compare their losses")


def directory(arm, args, flags):
    """The log directory of one run: an arm plus further flags."""
    name = re.sub(r"[^\w.=,+-]+", "_", arm.name)
    return Path(args.out, name, ",".join(f"{flag}={value}" for flag, value in flags.items()))


class Diverged(UserError):
    """A run that diverged: its loss was not finite, or rose with --stop_on_divergence."""


def train(words, log_dir, args):
    """Run train_gpt2.py with these words; what it prints goes into a file. UserError if it fails."""
    log_dir.parent.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.nproc}"]
    command = [sys.executable, *(launcher if args.nproc > 1 else []), train_gpt2.__file__, *words,
               "--log_dir", str(log_dir), *QUIET]
    output = log_dir.with_name(log_dir.name + ".txt")
    with open(output, "a", encoding="utf-8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = process.wait()
        except BaseException:  # Ctrl-C or SIGTERM: the run saves a checkpoint first
            process.terminate()
            process.wait()
            raise
    if status:
        lines = output.read_text(encoding="utf-8").strip().splitlines()
        diverged = any("lower --max_lr" in line for line in lines[-30:])
        raise (Diverged if diverged else UserError)(
            f"{log_dir} ended with status {status}: {''.join(lines[-1:])} (full output: {output})")


def run(arm, args, **flags):
    """Train an arm with further flags, unless that run is finished; return its Result. Raises UserError."""
    log_dir, words = directory(arm, args, flags), [*arm.words, *as_flags(flags)]
    result = Result(log_dir)
    if result.record["starts"]:
        recorded = recipe.identity_of(result.record["flags"])
        for name, value in recipe.identity_of(vars(train_gpt2.parse_args(words))).items():
            if value not in (None, recorded[name]):
                raise UserError(f"{log_dir} contains a run with --{name} {recorded[name]}, not {value}: name "
                                "another --out")
        if not args.any_version and result.record.get("source") != source()[0]:
            raise UserError(f"{log_dir} was trained by another version of this program: name another --out, "
                            "or keep it with --any_version")
    started = time.perf_counter()
    if not result.finished:
        train([*words, "--resume"], log_dir, args)
        result = Result(log_dir)
        seconds = time.perf_counter() - started
        print(f"{log_dir}: validation loss {result.final:.4f}, {seconds:.0f} s", flush=True)
    return result


def choose(arm, args, half):
    """Set the arm's settings to those of the grid that reach the lowest loss, on the first half of val.

    Returns lines for the report.
    """
    losses = {}
    for settings in args.grid:
        try:
            result = run(arm, args, **settings, seed=FIRST_SEED, val_tokens=half)
            losses[tuple(settings.items())] = result.final
        except Diverged:
            losses[tuple(settings.items())] = np.inf
    best = min(losses, key=losses.get)
    if losses[best] == np.inf:
        raise UserError(f"{arm.name} diverged with every value of --sweep")
    arm.settings = dict(best)
    lines = [f"| {arm.name} | {' '.join(as_flags(dict(tried)))} | {loss:.4f}{' (chosen)' * (tried == best)} |"
             for tried, loss in losses.items()]
    for name, value in best:
        with contextlib.suppress(ValueError):  # not for values that are not numbers
            values = sorted({float(dict(tried)[name]) for tried in losses})
            if len(values) < 3 or float(value) not in (values[0], values[-1]):
                continue
            lines.append(f"| {arm.name} | | the best {name} is at the edge of the sweep: widen it |")
    return lines


def report(arms):
    """The comparison of finished arms: a Markdown table and sentences, as lines."""
    base = arms[0]
    lines = [
        "| arm | parameters | FLOPs per token | steps | final loss | tokens to the baseline's loss | "
        "time to it | time per step |", "|---|---|---|---|---|---|---|---|"]
    notes = []
    setups = {tuple(str(result.record.get(fact)) for fact in SETUP) for arm in arms for result in arm.results}
    for arm in arms:
        record, finals = arm.results[0].record, [result.final for result in arm.results]
        tokens, times = [], []
        for result, reference in zip(arm.results, base.results):
            needed = result.tokens_to(reference.final)
            if needed is not None:
                tokens.append(needed / reference.tokens)
                times.append(tokens[-1] * result.seconds_per_token / reference.seconds_per_token)
        step = np.median([result.seconds_per_token * result.tokens_per_step for result in arm.results])
        reached = len(tokens) == len(arm.results)
        lines.append(
            f"| {arm.name} {' '.join(as_flags(arm.settings))} | {record['parameters']:,} | "
            f"{record['flops_per_token'] / 1e6:.2f}M | {record['flags']['max_steps']:,} | "
            f"{with_deviation(finals)} | "
            + (f"{as_text(tokens, 2)} | " if reached else f"reached by {len(tokens)} of {len(finals)} | ")
            + (f"{as_text(times, 2)} | {1000 * step:.0f} ms |" if reached and len(setups) == 1 else "| |"))
        if arm is not base:
            pairs = zip(arm.results, base.results)  # a seed has the same order of batches in both
            mean, half = interval([result.final - other.final for result, other in pairs])
            verdict = ("one seed: the noise between seeds is not known" if half == np.inf else
                       f"95% interval {mean - half:+.4f} to {mean + half:+.4f}"
                       + (": within the noise of the seeds" if abs(mean) < half else ""))
            notes.append(f"{arm.name}: final loss {mean:+.4f} against {base.name}, {verdict}.")
    notes += ["", "Final losses by seed: " + "; ".join(
        f"{arm.name} {', '.join(f'{result.final:.4f}' for result in arm.results)}" for arm in arms) + "."]
    return [*lines, "", "Losses: nats per token. Tokens and time: fractions of the baseline's run. "
            f"±: standard deviation; brackets: 95% intervals, over "
            f"{count(len(base.results), 'seed')}. Time per step is the median of training steps.",
            *(["", "The runs differ in " + " or ".join(SETUP) + ": times are not compared."]
              if len(setups) > 1 else []), "", *notes]


def picture(arms):
    """A matplotlib Figure: validation loss over tokens; for each arm a thin line per seed, a thick mean."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4), dpi=curves.DPI, layout="constrained")
    axes = figure.add_subplot()
    for arm, color in zip(arms, curves.COLORS):
        lines = [result.curves["val"] for result in arm.results]
        steps = np.array(lines[0][0][1:])  # without the loss before training
        tokens = steps * arm.results[0].tokens_per_step
        losses = np.array([values[1:] for _, values in lines])
        axes.plot(tokens, losses.T, color=color, linewidth=0.6, alpha=0.5)
        axes.plot(tokens, losses.mean(0), color=color, linewidth=2,
                  label=f"{arm.name} {' '.join(as_flags(arm.settings))}".strip())
    target = np.mean([result.final for result in arms[0].results])
    axes.axhline(target, color=curves.GREY, linewidth=1, linestyle=(0, (5, 3)))
    lowest = min(min(result.curves["val"][1]) for arm in arms for result in arm.results)
    axes.set(xlabel="training tokens", ylabel="validation loss, nats per token",
             ylim=(lowest - 0.05, 1.25 * target))
    axes.xaxis.set_major_formatter(lambda tokens, _: curves.short(tokens))
    axes.legend(loc="upper right", frameon=False)
    return figure


def prepare_data(arm):
    """Make the demo's data, if the arm wants it; return the arm's flags."""
    flags = train_gpt2.parse_args(arm.words)
    if flags.demo_data:
        fineweb_edu.prepare_demo(flags.data_dir)
    return flags


def halve_val(arm):
    """Half of the tokens of the val split that the arm reads."""
    flags = prepare_data(arm)
    length = sum(len(tokens) for _, tokens in shards.open_shards(flags.data_dir, "val"))
    return min(length, flags.val_tokens) // 2


def speedrun(arms, args):
    """Time both arms' whole commands in turn; return the lines of a report that compares them.

    Each must reach SPEEDRUN_TARGET. Raises UserError if a run exists already: a resumed one can't be timed.
    """
    for arm in arms:
        prepare_data(arm)  # that is not part of the time
    seconds, losses = ([[] for _ in arms] for _ in range(2))
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        # alternate which arm goes first: the first may run on a cooler machine
        for i, arm in list(enumerate(arms))[:: 1 if (seed - args.first_seed) % 2 else -1]:
            log_dir = directory(arm, args, dict(seed=seed))
            if log_dir.exists():
                raise UserError(f"{log_dir} exists: a speedrun can't continue a run: name another --out")
            started = time.perf_counter()
            train([*arm.words, "--seed", str(seed), "--val_start", "0", "--val_tokens", "1000000000"],
                  log_dir, args)
            seconds[i].append(time.perf_counter() - started)
            losses[i].append(Result(log_dir).curves["val_bpb"][1][-1])
            print(f"{log_dir}: {losses[i][-1]:.4f} bits per byte in {seconds[i][-1]:.1f} s", flush=True)
    lines = ["| arm | bits per byte | seconds | time |", "|---|---|---|---|"]
    for arm, each, loss in zip(arms, seconds, losses):
        verdict = "" if np.mean(loss) <= SPEEDRUN_TARGET else ", above the target"
        ratios = as_text([one / other for one, other in zip(each, seconds[1])], 3)
        lines.append(f"| {arm.name} | {as_text(loss, 4)}{verdict} | {as_text(each, 1)} | {ratios} |")
    return [*lines, "", f"Target: {SPEEDRUN_TARGET} bits per byte. Time: a fraction of {arms[1].name}'s. In "
            f"brackets: 95% intervals over {count(args.seeds, 'seed')}."]


def scaling(arm, args):
    """Train an arm at several sizes, predict the largest one's loss from the others; return report lines."""
    flags = prepare_data(arm)
    manifest = shards.read_manifest(flags.data_dir)
    # Size is the number of all parameters. Without embeddings, small models bend away from a power law
    # (Pearce and Song 2024, https://arxiv.org/abs/2406.12907)
    sizes = {}  # parameters: flags of the run
    for n_layer, n_embd in args.scaling:
        n_head = max(1, n_embd * flags.n_head // flags.n_embd)  # heads keep their width
        shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        if n_embd % n_head:
            raise UserError(f"--scaling {n_layer}x{n_embd}: the width must be a multiple of {n_head} heads")
        config = replace(train_gpt2.model_config(flags), **shape)
        size = plan.model_on_meta(flags, config, manifest).num_params()
        steps = round(args.tokens_per_parameter * size / flags.total_batch_size)
        sizes[size] = dict(**shape, max_steps=max(1, steps))
    *fitted, held_out = sorted(sizes)
    lines = ["| layers x width | parameters | steps | validation loss |", "|---|---|---|---|"]
    losses = {}

    def measure(size):
        results = [run(arm, args, **sizes[size], seed=args.first_seed + i) for i in range(args.seeds)]
        losses[size] = float(np.mean([result.final for result in results]))
        lines.append("| {n_layer} x {n_embd} | {:,} | {max_steps:,} | {:.4f} |".format(
            size, losses[size], **sizes[size]))

    for size in fitted:
        measure(size)
    law = PowerLaw(fitted, [losses[size] for size in fitted])
    (exponent, error), (predicted, low, high) = law.exponent, law.predict(held_out)
    prediction = f"{predicted:.4f} (95% interval {low:.4f} to {high:.4f})"
    print(f"predicted loss of {held_out:,} parameters: {prediction}", flush=True)
    measure(held_out)
    curves.save(Path(args.out, "curves.png"), picture_of_scaling, law, held_out, losses[held_out])
    return [*lines, "", "Fit to all but the largest: "
            f"loss = {math.exp(law.intercept):.3f} * N^-{exponent:.4f}, with an exponent of "
            f"{exponent - error:.4f} to {exponent + error:.4f} (95%).", "",
            f"Predicted for the largest, before it was trained: {prediction}. "
            f"Measured: {losses[held_out]:.4f}, {losses[held_out] / predicted - 1:+.1%}."]


def picture_of_scaling(law, size, loss):
    """A matplotlib Figure: a PowerLaw, its interval, and the measured loss of the held-out size."""
    from matplotlib.figure import Figure

    figure = Figure((6, 4), dpi=curves.DPI, layout="constrained")
    axes = figure.add_subplot()
    x = np.geomspace(min(law.sizes) / 1.3, size * 1.3)
    middle, low, high = np.array([law.predict(each) for each in x]).T
    axes.fill_between(x, low, high, color=curves.COLORS[0], alpha=0.15, linewidth=0,
                      label="95% interval of a prediction")
    axes.plot(x, middle, color=curves.COLORS[0], linewidth=1, label="fit")
    axes.plot(law.sizes, law.losses, "o", color=curves.COLORS[0], label="fitted")
    axes.plot(size, loss, "s", color=curves.COLORS[1], label="held out")
    axes.set(xscale="log", yscale="log", xlabel="parameters",
             ylabel="validation loss, nats per token")
    axes.xaxis.set_major_formatter(lambda size, _: curves.short(size))
    axes.xaxis.set_minor_formatter(lambda size, _: curves.short(size) if f"{size:e}"[0] in "2357" else "")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.legend(frameon=False)
    return figure


def main(args):
    arms = [open_arm(text, args) for text in args.arms]
    print(f"output of each run: {args.out}/ARM/RUN.txt", flush=True)
    if len({arm.name for arm in arms}) < len(arms):
        raise UserError(f"{arms[-1].name} is given twice: arms must differ")
    out, lines, flags = Path(args.out), [], {}
    if args.speedrun:
        lines = speedrun(arms, args)
    elif args.scaling:
        lines = scaling(arms[0], args)
    else:
        check_same(arms)
        if args.sweep:
            if any("--val_start" in arm.words for arm in arms):
                raise UserError("--val_start in an arm: --sweep sets it")
            flags = dict.fromkeys(("val_start", "val_tokens"), halve_val(arms[0]))
            lines = ["| arm | tried | loss on the first half of val |", "|---|---|---|"]
            for arm in arms:
                lines += choose(arm, args, flags["val_tokens"])
            lines.append("")
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for arm in arms:
                arm.results.append(run(arm, args, **arm.settings, seed=seed, **flags))
        lines += report(arms)
    with atomic_write(out / "report.md") as file:
        file.write("\n".join(lines) + "\n")
    print(*lines, sep="\n")
    if not args.speedrun and not args.scaling:
        curves.save(out / "curves.png", picture, arms)
    print(*(path for path in (out / "report.md", out / "curves.png") if path.exists()), sep="\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    run_script(main, args)
