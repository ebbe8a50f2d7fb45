"""Pictures of runs, from log.txt alone: loss, HellaSwag, learning rate, gradient norm and throughput.

Results published for OpenAI's models are drawn as dashed lines if run.json says that they apply.
"""

from pathlib import Path

import numpy as np

from kit.files import UserError, atomic_write
from kit.published import FINEWEB_EDU_LOSS, GPT3_HELLASWAG, HELLASWAG
from kit.record import read_curves, read_record

# stream: the title of its panel, and the format of its values. val is drawn into the panel of train
PANELS = {
    "train": ("loss in nats per token: val thick, train thin", "{:.4f}"),
    "hella": ("HellaSwag, acc_norm", "{:.4f}"),
    "val_bpb": ("val loss in bits per byte", "{:.4f}"),
    "lr": ("learning rate", "{:.1e}"),
    "norm": ("gradient norm", "{:.2f}"),
    "tok/s": ("tokens per second", "{:,.0f}"),
}
NOISY = ("train", "norm", "tok/s")  # drawn pale, under a running mean
FROM_ZERO = ("lr", "norm", "tok/s")  # the others change too little for it

# the published models by (n_layer, n_embd): name, size, and the size of the nearest GPT-3
SIZES = {(12, 768): ("gpt2", "124M", "125M"), (24, 1024): ("gpt2-medium", "350M", "350M"),
         (36, 1280): ("gpt2-large", "774M", "760M"), (48, 1600): ("gpt2-xl", "1558M", "1.3B")}

# distinguishable for colour-blind people: Okabe and Ito, https://jfly.uni-koeln.de/color/
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#595959"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9.5, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "grid.color": "#E6E6E6",
    "svg.hashsalt": "gpt2",  # makes an SVG's ids the same every time
}


def published_lines(record):
    """Published results for a run's model and data, {(stream, label): value}. record: of `read_record`."""
    flags, lines = record["flags"], {}
    if (flags.get("n_layer"), flags.get("n_embd")) in SIZES:
        name, size, gpt3_size = SIZES[flags["n_layer"], flags["n_embd"]]
        lines["hella", f"GPT-2 {size}"] = HELLASWAG[name]["completion"][1]
        lines["hella", f"GPT-3 {gpt3_size}"] = GPT3_HELLASWAG[name]
    data = record["data_source"].get("dataset"), record.get("tokenizer")
    if data == ("HuggingFaceFW/fineweb-edu", "gpt2"):
        lines["train", "GPT-2 124M"] = FINEWEB_EDU_LOSS["gpt2"]
    return lines


def running_mean(values):
    """The mean of each value and those before it, over a window of a hundredth of all values."""
    sums = np.cumsum([0, *values])
    ends = np.arange(1, len(sums))
    starts = np.maximum(0, ends - max(1, len(values) // 100))
    return (sums[ends] - sums[starts]) / (ends - starts)


def thinned(steps, values):
    """The lowest and highest point of each 500th of a curve, and its last point: it looks the same."""
    size = len(values) // 500
    if size < 3:
        return steps, values
    parts = values[: len(values) // size * size].reshape(-1, size)
    first = np.arange(len(parts)) * size
    rest = np.arange(parts.size - 1, len(values))  # the remainder, with the point before it
    keep = np.unique(np.concatenate([first + parts.argmin(1), first + parts.argmax(1), rest]))
    return steps[keep], values[keep]


def draw_panel(axes, stream, runs, lines):
    """Draw the panel of a stream. runs: [(curves, color)]; lines: {label: published value}."""
    title, form = PANELS[stream]
    alone = len(runs) == 1
    labels, seen = [], []  # the texts in the margin, and the values that the panel must show
    for name, value in lines.items():
        axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (5, 3)), label=name)
        labels.append((value, f"{name} {value:g}", GREY))
        seen.append(value)
    for curves, color in runs:
        for name in ("train", "val") if stream == "train" else (stream,):
            steps, values = map(np.array, curves.get(name, ((), ())))
            finite = np.abs(values) < 1e30  # a gradient norm in fp16 can be infinite
            steps, values = steps[finite], values[finite]
            if len(steps) == 0:
                continue
            if alone and name == "val":
                color = COLORS[1]
            # the beginning of a run may leave the panel: it would flatten the rest
            first = np.searchsorted(steps, 0 if name in ("lr", "hella") else steps[-1] / 20)
            if name in NOISY:
                axes.plot(*thinned(steps, values), color=color, alpha=0.3, linewidth=0.6, label=f"{name} raw")
                seen += np.quantile(values[first:], (0.01, 0.99)).tolist()
                values = running_mean(values)
            seen += values[first:].tolist()
            if alone or name != "train" or "val" not in curves:
                prefix = f"{name} " if alone and stream == "train" else ""
                labels.append((values[-1], prefix + form.format(values[-1]), color))
            if name in ("val", "val_bpb") and steps[0] == 0:  # a line from step 0 would cut the corner
                axes.plot(0, values[0], "o", color=color, markersize=4, label=name)
                steps, values = steps[1:], values[1:]
            axes.plot(*thinned(steps, values), "o-" if len(steps) < 30 else "-", color=color, markersize=4,
                      linewidth=1 if name in NOISY else 2, label=name)
    low, high = 0 if stream in FROM_ZERO else min(seen, default=0), max(seen, default=1)
    margin = 0.07 * (high - low) or 0.1 * abs(high) or 1
    axes.set(title=title, ylim=(low if stream in FROM_ZERO else low - margin, high + margin))
    place_labels(axes, sorted(labels))


def place_labels(axes, labels):
    """Write labels, [(value, text, color)] in ascending order, to the right of a panel at their values.

    Labels that would overlap are moved one line of text apart.
    """
    low, high = axes.get_ylim()
    line = 0.17 / (axes.get_position().height * axes.figure.get_figheight())  # 0.17 inches
    heights = []
    for value, _, _ in labels:
        heights.append(max((value - low) / (high - low), heights[-1] + line if heights else 0))
    for i in reversed(range(len(heights))):  # then from the top down: none may be above the panel
        heights[i] = min(heights[i], heights[i + 1] - line if i + 1 < len(heights) else 1)
    for height, (_, text, color) in zip(heights, labels):
        axes.text(1.01, height, text, color=color, va="center", transform=axes.transAxes)


def picture(log_dirs):
    """The matplotlib Figure of runs. Raises UserError for too many runs, or a log without numbers to draw."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    if len(log_dirs) > len(COLORS):
        raise UserError(f"{len(log_dirs)} runs: at most {len(COLORS)} can be told apart by their colours")
    names = [Path(log_dir).resolve().name for log_dir in log_dirs]
    if len(set(names)) < len(names):
        names = list(map(str, log_dirs))
    names = [name if len(name) < 44 else "..." + name[-40:] for name in names]
    columns = 3 if max(map(len, names)) < 28 else 2
    runs = [(read_curves(log_dir), color) for log_dir, color in zip(log_dirs, COLORS)]
    lines = {}
    for log_dir in log_dirs:
        lines |= published_lines(read_record(log_dir))
    streams = {"train" if stream == "val" else stream for curves, _ in runs for stream in curves}
    streams = [stream for stream in PANELS if stream in streams]
    if not streams:
        raise UserError(f"{log_dirs[0]} has no log.txt with numbers yet: name a run's log directory")
    if len(streams) == len(PANELS) and sum("val_bpb" in curves for curves, _ in runs) == 1:
        streams.remove("val_bpb")  # the same curve as val on another scale, and there is no room for it
    last_step = max(steps[-1] for curves, _ in runs for steps, _ in curves.values()) or 1

    # the loss takes the full width, the others come in pairs below it; all lengths are in inches
    loss = [streams.pop(0)] if streams[0] == "train" else []
    rows = [row for row in (loss, streams[:2], streams[2:4], streams[4:]) if row]
    row_heights = [3.5 if row == loss else 2.35 for row in rows]
    top = 0.2 + 0.2 * -(-len(runs) // columns)  # the names
    width, height = 10.5, top + sum(row_heights) + 0.2
    figure = Figure((width, height), dpi=120, facecolor="white")
    for row, row_height in zip(rows, row_heights):
        top += row_height
        for i, stream in enumerate(row):
            left, right = 0.9 + i * width / 2, (i + 1) * width / len(row) - 1.5
            axes = figure.add_axes((left / width, 1 - (top - 0.3) / height,
                                    (right - left) / width, (row_height - 0.65) / height))
            axes.set(xlim=(-0.01 * last_step, 1.01 * last_step), xlabel="step" if row == rows[-1] else "")
            axes.xaxis.set(major_locator=MaxNLocator(6, integer=True), major_formatter="{x:,.0f}")
            axes.yaxis.set(major_formatter="{x:,.10g}")
            here = {label: value for (panel, label), value in lines.items() if panel == stream}
            draw_panel(axes, stream, runs, here)

    several = len(runs) > 1  # a single run has its name there, without a colour
    legend = figure.legend([Line2D([], [], color=color, linewidth=3 * several) for _, color in runs],
                           [" "] * len(runs), loc="upper left", ncols=columns, frameon=False,
                           bbox_to_anchor=(0.9 / width, 1 - 0.12 / height), borderpad=0, borderaxespad=0,
                           handlelength=2 * several, handletextpad=0.8 * several)
    for text, name in zip(legend.get_texts(), names):  # $ in a name is not mathematics
        text.set(text=name.encode(errors="replace").decode(), parse_math=False, fontsize=11)
    return figure


def draw(log_dirs, out):
    """Draw runs into the file `out`, PNG or SVG by its suffix: complete or not at all, reproducible bytes.

    Raises UserError for a log that can't be read, and if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"pictures need matplotlib ({error}): pip install matplotlib") from error

    with matplotlib.rc_context(STYLE):
        figure = picture(log_dirs)
        with atomic_write(out, "wb") as file:
            figure.savefig(file, format=Path(out).suffix[1:], metadata={"Date": None})
