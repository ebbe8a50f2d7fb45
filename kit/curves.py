"""Pictures of runs, from log.txt and run.json alone: loss, HellaSwag, learning rate, gradient norm, speed.

Each run has its own colour. Results published for OpenAI's models are drawn as dashed lines if run.json shows
that they apply to every run in the panel.
"""

from pathlib import Path

import numpy as np

from kit.files import UserError, atomic_write
from kit.published import FINEWEB_EDU_LOSS, GPT3_HELLASWAG, HELLASWAG, HELLASWAG_EXAMPLES
from kit.record import read_curves, read_record

# stream: the title of its panel, the label of its y axis, the format of its values. val is drawn with train
PANELS = {
    "train": ("Loss", "nats per token", "{:.4f}"),
    "hella": ("HellaSwag", "acc_norm (fraction)", "{:.4f}"),
    "val_bpb": ("Validation loss", "bits per byte", "{:.4f}"),
    "lr": ("Learning-rate schedule", "learning rate", "{:.1e}"),
    "norm": ("Gradient norm", "L2 norm", "{:.2f}"),
    "tok/s": ("Throughput", "tokens per second", "{:,.0f}"),
}
NOISY = ("train", "norm", "tok/s")  # drawn pale, under a running mean
FROM_ZERO = ("lr", "norm", "tok/s")  # y axes from 0; other streams change too little for that

# the published models by (n_layer, n_embd): name, size, and the size of the nearest GPT-3
SIZES = {(12, 768): ("gpt2", "124M", "125M"), (24, 1024): ("gpt2-medium", "350M", "350M"),
         (36, 1280): ("gpt2-large", "774M", "760M"), (48, 1600): ("gpt2-xl", "1558M", "1.3B")}

# distinguishable for colour-blind people: Okabe and Ito, https://jfly.uni-koeln.de/color/
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#595959"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "grid.color": "#E6E6E6", "legend.fontsize": 9,
    "svg.hashsalt": "gpt2",  # makes an SVG's ids the same every time
}
DPI = 200  # of a PNG
LINE = 0.165  # height of a line of text, in inches
LINSCALE = 0.3  # width of step 0 to 1 on a logarithmic axis, in decades


def published_lines(record):
    """Published results for a run's model, vocabulary and data, {(stream, label): value}.

    record: of `read_record`. A record that does not name them has no lines.
    """
    flags, lines = record["flags"], {}
    if record.get("tokenizer") != "gpt2":
        return lines
    if (flags.get("n_layer"), flags.get("n_embd")) in SIZES \
            and record.get("hellaswag_examples") == HELLASWAG_EXAMPLES:
        name, size, gpt3_size = SIZES[flags["n_layer"], flags["n_embd"]]
        lines["hella", f"GPT-2 {size}"] = HELLASWAG[name]["completion"][1]
        lines["hella", f"GPT-3 {gpt3_size}"] = GPT3_HELLASWAG[name]
    if record["data_source"].get("dataset") == "HuggingFaceFW/fineweb-edu":
        lines["train", "GPT-2 124M"] = FINEWEB_EDU_LOSS["gpt2"]
    return lines


def lines_in(stream, runs):
    """The published lines of a panel, {label: value}; none unless all its runs have some."""
    own = [{label: value for (panel, label), value in published_lines(run["record"]).items()
            if panel == stream} for run in runs if run["curves"].keys() & drawn_in(stream)]
    return {label: value for lines in own for label, value in lines.items()} if all(own) else {}


def drawn_in(stream):
    """The streams that the panel of a stream shows."""
    return ("train", "val") if stream == "train" else (stream,)


def running_mean(values):
    """The mean of each value and those before it, over a hundredth of all values.

    The window is at most a tenth of the values so far: a longer one would lag behind the steep beginning.
    """
    sums = np.cumsum([0, *values])
    ends = np.arange(1, len(sums))
    starts = ends - np.clip(ends // 10, 1, max(1, len(values) // 100))
    return (sums[ends] - sums[starts]) / (ends - starts)


def thinned(steps, values, log_x):
    """Keep the ends of a curve, and the lowest and highest point of each of 500 pieces: it looks the same.

    On a logarithmic axis it would not look the same, so all points are kept.
    """
    size = len(values) // 500
    if size < 3 or log_x:
        return steps, values
    parts = values[: len(values) // size * size].reshape(-1, size)
    first = np.arange(len(parts)) * size
    rest = np.arange(parts.size - 1, len(values))  # the remainder, with the point before it
    keep = np.unique(np.concatenate([[0], first + parts.argmin(1), first + parts.argmax(1), rest]))
    return steps[keep], values[keep]


def draw_panel(axes, stream, runs, log_x):
    """Draw the panel of a stream. runs: dicts of `read_run` with a color."""
    title, unit, form = PANELS[stream]
    several = len(runs) > 1
    labels, seen, starts = [], [], []  # texts, values that must be visible, each curve's first point
    for name, value in lines_in(stream, runs).items():
        axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (5, 3)), label=name)
        labels.append((axes.get_xlim()[1], value, f"{name} {value:g}", GREY))
        seen.append(value)
    for run in runs:
        curves, color = run["curves"], run["color"]
        for name in drawn_in(stream):
            if name not in curves:
                continue
            steps, values = curves[name]
            # on a linear axis the beginning may leave the panel, because it would flatten the rest
            first = 0 if log_x or name in ("lr", "hella") else np.searchsorted(steps, steps[-1] / 20)
            starts.append((steps[0], values[0]))
            if name in NOISY:
                axes.plot(*thinned(steps, values, log_x), color=color, alpha=0.3, linewidth=0.5,
                          label=f"{name} raw")
                seen += np.quantile(values[first:], (0.01, 0.99)).tolist()
                values = running_mean(values)
            seen += values[first:].tolist()
            if not several or name != "train" or "val" not in curves:
                prefix = f"{name} " if stream == "train" and not several else ""
                labels.append((steps[-1], values[-1], prefix + form.format(values[-1]), color))
            if name in ("val", "val_bpb") and steps[0] == 0:  # a line from step 0 would hide the steep fall
                axes.plot(0, values[0], "o", color=color, markersize=4, label=name)
                steps, values = steps[1:], values[1:]
            measured = name in ("val", "val_bpb", "hella")  # once in a while, not at each step
            axes.plot(*thinned(steps, values, log_x), "o-" if len(steps) < (30 if measured else 2) else "-",
                      color=color, markersize=4, linewidth=1 if name in NOISY else 2, label=name)
    low, high = 0 if stream in FROM_ZERO else min(seen), max(seen)
    margin = 0.07 * (high - low) or 0.1 * abs(high) or 1
    low, high = low if stream in FROM_ZERO else low - margin, high + margin
    axes.set(title=title, ylabel=unit, ylim=(low, high))
    cut = sorted((value, step) for step, value in starts if not low <= value <= high)
    if cut:
        (value, step), (highest, last) = cut[0], cut[-1]
        values = " to ".join(dict.fromkeys(form.format(value) for value in (value, highest)))
        at = " to ".join(dict.fromkeys(f"{step:,}" for step in sorted({step, last})))
        axes.set_xlabel(f"step (not shown: {values} at step {at})")
    place_labels(axes, labels)


def place_labels(axes, labels):
    """Write each label, (step, value, text, color), to the right of the point where its curve ends.

    Labels that would overlap are moved one line of text apart.
    """
    inch, columns = axes.figure.dpi, []
    for step, value, text, color in sorted(labels, key=lambda label: label[:2], reverse=True):
        x, y = axes.transData.transform((step, value))
        if x > axes.bbox.x1 - 0.15 * inch:
            x = axes.bbox.x1  # the ends at the right side form one column
        if not columns or columns[-1][-1][0] - x > 0.085 * inch * len(text):  # it ends before the others
            columns.append([])
        columns[-1].append((x, y, text, color))
    line, box = LINE * inch, axes.bbox
    for column in columns:
        column.sort(key=lambda label: label[1])
        groups = []  # labels that touch, centred on their mean height: (height of the lowest, number)
        for i, (_, y, _, _) in enumerate(column):
            groups.append((y - i * line, 1))
            while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
                (one, count), (other, more) = groups[-2:]
                groups[-2:] = [((one * count + other * more) / (count + more), count + more)]
        lowest = [height for height, count in groups for _ in range(count)]
        least, most = box.y0, box.y1 - (len(column) - 1) * line  # none may be above the panel
        heights = [min(max(height, least), most) + i * line for i, height in enumerate(lowest)]
        for height, (x, _, text, color) in zip(heights, column):
            x, height = axes.transAxes.inverted().transform((x + 0.07 * inch, height))
            axes.text(x, height, text, color=color, va="center", transform=axes.transAxes,
                      bbox=dict(facecolor="white", edgecolor="none", alpha=0.7, pad=0.5))


def draw_legend(axes, stream, runs):
    """Explain the kinds of lines in the loss panel."""
    from matplotlib.lines import Line2D

    names = {name for name in drawn_in(stream) for run in runs if name in run["curves"]}
    lines = {"train, running mean (pale: each step)": dict(linewidth=1)} if "train" in names else {}
    if names - {"train"}:
        lines["validation"] = dict(linewidth=2, marker="o", markersize=4)
    if lines_in(stream, runs):
        lines["published by OpenAI"] = dict(linewidth=1, linestyle=(0, (5, 3)))
    axes.legend([Line2D([], [], color=GREY, **style) for style in lines.values()], list(lines),
                loc="best",  # where it covers least
                facecolor="white", edgecolor="none", framealpha=0.8)


def scale_steps(axes, last_step, log_x):
    """Set up the x axis of a panel, from step 0 to the last."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    if log_x:
        axes.set_xscale("symlog", linthresh=1, linscale=LINSCALE)
        axes.set_xlim(-0.2, 1.1 * last_step)  # room for the last marker
    else:
        axes.set_xlim(-0.01 * last_step, 1.01 * last_step)
        axes.xaxis.set_major_locator(MaxNLocator(8 if axes.bbox.width > 5 * DPI else 4, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def add_tokens_axis(axes, tokens_per_step):
    """Add a second x axis at the top of a panel: the tokens read, for the steps below."""
    top = axes.twiny()
    if axes.get_xscale() == "symlog":
        top.set_xscale("symlog", linthresh=tokens_per_step, linscale=LINSCALE)
        powers = [10**n for n in range(16) if 10**n >= tokens_per_step]  # smaller ones would crowd around 0
        top.set_xticks([0, *powers])
    low, high = axes.get_xlim()
    top.set_xlabel("tokens", loc="right")
    top.xaxis.set_major_formatter(lambda tokens, _: short(tokens))
    top.set_xlim(low * tokens_per_step, high * tokens_per_step)  # last: ticks may widen it
    top.spines["top"].set_visible(True)
    top.minorticks_off()
    top.grid(False)


def short(count):
    """A count in few characters: 500K, 2.5B."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= unit:
            return f"{count / unit:g}{letter}"
    return f"{count:g}"


def read_run(log_dir):
    """A run as a dict of its log_dir, record, and curves {stream: (steps, values)}: arrays of finite values.

    Raises UserError if it has nothing to draw.
    """
    curves = {}
    for stream, (steps, values) in read_curves(log_dir).items():
        finite = np.abs(values) < 1e30  # a gradient norm in fp16 can be infinite
        if stream in (*PANELS, "val") and finite.any():
            curves[stream] = np.array(steps)[finite], np.array(values)[finite]
    if not curves:
        raise UserError(f"{log_dir} has no log.txt with numbers to draw: name a run's log directory")
    return {"log_dir": log_dir, "record": read_record(log_dir), "curves": curves}


def tokenizer_of(run):
    """What tells a run's tokenizer from others; None if run.json does not name it.

    Learned tokenizers often have the same file name. They count as the same if the data are the same.
    """
    name = run["record"].get("tokenizer")
    return name if name in (None, "gpt2") else (name, run["record"].get("data_manifest"))


def use_bits_per_byte(runs):
    """Whether the tokenizers of several runs differ, so that only their losses per byte can be compared.

    If no run.json names a tokenizer (other programs' logs), a loss per byte is used if all runs have one;
    otherwise the tokenizers are assumed to be the same. Raises UserError if they differ and a run has no loss
    per byte.
    """
    runs = [run for run in runs if run["curves"].keys() & {"train", "val", "val_bpb"}]
    tokenizers = {tokenizer_of(run) for run in runs}
    if len(runs) < 2 or len(tokenizers) == 1 and (
            tokenizers != {None} or not all("val_bpb" in run["curves"] for run in runs)):
        return False
    for run in runs:
        if "val_bpb" not in run["curves"]:
            other = next(other for other in runs if tokenizer_of(other) != tokenizer_of(run))
            name, other_name = (each["record"].get("tokenizer") for each in (run, other))
            path = run["log_dir"]
            remedy = "draw them in separate pictures"
            if name is None:
                remedy = f'write {{"tokenizer": "NAME"}} into {path}/run.json, or ' + remedy
            raise UserError(f"the tokenizers of {path} ({name or 'unknown'}) and {other['log_dir']} "
                            f"({other_name or 'unknown'}) differ, so that their losses per token can't be "
                            f"compared, and {path}/log.txt has no val_bpb, bits per byte: {remedy}")
    return True


def names_of(log_dirs):
    """The names of runs for the legend: their directories' names, or the paths if the names are equal."""
    names = [Path(log_dir).resolve().name for log_dir in log_dirs]
    if len(set(names)) < len(names):
        names = list(map(str, log_dirs))
    return [name if len(name) < 44 else "..." + name[-40:] for name in names]


def panels_of(runs):
    """The streams whose panels are drawn: the loss first, if there is one."""
    streams = {"train" if stream == "val" else stream for run in runs for stream in run["curves"]}
    streams = [stream for stream in PANELS if stream in streams]
    if use_bits_per_byte(runs):
        return ["val_bpb", *(stream for stream in streams if stream not in ("train", "val_bpb"))]
    if len(streams) == len(PANELS):
        streams.remove("val_bpb")  # the same curve as val on another scale, and there is no room for it
    return streams


def picture(log_dirs, log_x=False):
    """The matplotlib Figure of runs. log_x: steps on a logarithmic axis, which has room for step 0 too.

    Raises UserError for too many runs, a log without numbers to draw, or losses that can't be compared.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if len(log_dirs) > len(COLORS):
        raise UserError(f"{len(log_dirs)} runs: at most {len(COLORS)} can be told apart by their colours")
    runs = [{**read_run(log_dir), "color": color} for log_dir, color in zip(log_dirs, COLORS)]
    streams = panels_of(runs)
    batches = [run["record"]["flags"].get("total_batch_size") for run in runs]
    names = names_of(log_dirs)
    if len(set(batches)) > 1:  # then there is no common axis of tokens
        names = [f"{name} ({batch:,} tokens per step)" if batch else name
                 for name, batch in zip(names, batches)]
    longest = max(map(len, names))
    name_columns = 3 if longest < 28 else 2 if longest < 46 else 1
    last_step = max(steps[-1] for run in runs for steps, _ in run["curves"].values()) or 1

    # the loss takes the full width, the others share rows below it; all lengths are in inches
    small = streams[1:] if streams[0] in ("train", "val_bpb") else streams
    in_row = 1 if len(small) == 1 else 2
    if len(small) == 3 and "hella" not in small:  # its labels are wide
        in_row = 3
    rows = [(small[i : i + in_row], in_row, 2.2, 0.35) for i in range(0, len(small), in_row)]
    if len(small) < len(streams):
        rows.insert(0, (streams[:1], 1, 3.9, 0.7))  # space above: the title, and the axis of tokens
    bottom = 0.15 + 0.2 * -(-len(runs) // name_columns)  # the names are at the top
    width, height = 9, bottom + sum(row_height for _, _, row_height, _ in rows)
    figure = Figure((width, height), dpi=DPI, facecolor="white")
    for row, in_row, row_height, above in rows:
        bottom += row_height
        for i, stream in enumerate(row):
            left, right = 0.85 + i * width / in_row, (i + 1) * width / in_row - (1.45 if in_row < 3 else 0.75)
            axes = figure.add_axes((left / width, 1 - (bottom - 0.5) / height,
                                    (right - left) / width, (row_height - 0.5 - above) / height))
            scale_steps(axes, last_step, log_x)
            axes.yaxis.set(major_formatter="{x:,.10g}")
            draw_panel(axes, stream, runs, log_x)
            if above > 0.5:
                draw_legend(axes, stream, runs)
                if stream == "val_bpb" and len(runs) > 1:
                    axes.set_title("Validation loss in bits per byte (different or unknown tokenizers)")
                if len(set(batches)) == 1 and batches[0]:
                    add_tokens_axis(axes, batches[0])

    legend = figure.legend([Line2D([], [], color=run["color"], linewidth=3) for run in runs],
                           [" "] * len(runs), loc="upper left", ncols=name_columns, frameon=False,
                           bbox_to_anchor=(0.85 / width, 1 - 0.1 / height), borderpad=0, borderaxespad=0)
    for text, name in zip(legend.get_texts(), names):  # $ in a name is not mathematics
        text.set(text=name.encode(errors="replace").decode(), parse_math=False, fontsize=10)
    return figure


def draw(log_dirs, out, log_x=False):
    """Draw runs into the file `out`, as `save`. Raises UserError for a log that can't be read."""
    save(out, picture, log_dirs, log_x)


def save(out, make_figure, *args):
    """Write the Figure make_figure(*args), drawn in STYLE, into `out`: PNG or SVG by its suffix.

    The file is complete or not written at all, and has reproducible bytes. Raises UserError if matplotlib is
    not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"pictures need matplotlib ({error}): pip install matplotlib") from error

    with matplotlib.rc_context(STYLE):
        figure = make_figure(*args)
        Path(out).parent.mkdir(parents=True, exist_ok=True)  # not before the runs are found
        with atomic_write(out, "wb") as file:
            figure.savefig(file, format=Path(out).suffix[1:], metadata={"Date": None})
