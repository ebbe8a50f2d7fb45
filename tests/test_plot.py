"""plot.py: what the picture shows, read back from the lines and texts of the figure."""

import itertools
import json
import sys

import matplotlib
import matplotlib.text
import numpy as np
import pytest
from PIL import Image
from runs import assert_refused, run_here, run_script

import plot
from kit import curves as pictures
from kit.files import UserError
from kit.record import read_curves

GPT2 = dict(n_layer=12, n_embd=768)
HELLASWAG = dict(tokenizer="gpt2", hellaswag_examples=10042)  # the whole validation set
FINEWEB_EDU = dict(dataset="HuggingFaceFW/fineweb-edu", name="sample-10BT")


def write_run(log_dir, steps=10, record=None, **curves):
    """Make a log directory. A curve is a function of the step, or a list of values from step 0 on."""
    log_dir.mkdir(parents=True)
    curves = curves or dict(train=lambda step: 4 - step / steps, val=lambda step: 4.5 - step / steps)
    with open(log_dir / "log.txt", "w") as file:
        for step in range(steps):
            for stream, curve in curves.items():
                file.write(f"{step} {stream} {curve(step) if callable(curve) else curve[step]:.10f}\n")
    if record is not None:
        (log_dir / "run.json").write_text(json.dumps(record))
    return log_dir


def panel(figure, title):
    """The points in a panel, of all runs together: {label of a line: [(step, value)]}."""
    [axes] = [axes for axes in figure.axes if axes.get_title(loc="left").startswith(title)]
    points = {}
    for line in axes.lines:
        points.setdefault(line.get_label(), []).extend(zip(*line.get_data()))
    return points


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def names_in(figure):
    """The names of the runs in the legend."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def units(figure):
    """The labels of the y axes."""
    return [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]


@pytest.fixture(autouse=True)
def style():
    with matplotlib.rc_context(pictures.STYLE):
        yield


def test_a_picture_shows_the_values_of_the_log(tmp_path):
    streams = ("train", "val", "hella", "lr", "norm", "tok/s")
    values = {stream: [1 + i + step / 8 for step in range(8)] for i, stream in enumerate(streams)}
    figure = pictures.picture([write_run(tmp_path / "run", 8, **values)])
    shown = panel(figure, "Loss") | panel(figure, "HellaSwag") | panel(figure, "Learning-rate")
    shown |= panel(figure, "Gradient norm") | panel(figure, "Throughput")
    assert len(figure.axes) == 5
    for stream in streams:
        assert shown[stream] == list(enumerate(values[stream]))
    assert names_in(figure) == ["run"]
    assert {"train 1.8750", "val 2.8750", "3.8750", "4.9e+00", "5.88", "7"} == set(texts(figure))
    assert all(axes.get_xlabel().startswith("step") and axes.get_ylabel() for axes in figure.axes)


def test_no_panel_without_its_stream(tmp_path):
    figure = pictures.picture([write_run(tmp_path / "run", lr=lambda step: 1e-3)])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Learning-rate schedule"]
    write_run(tmp_path / "other", skipped=lambda step: 1)
    with pytest.raises(UserError, match="no log.txt with numbers"):
        pictures.picture([tmp_path / "other"])


def test_bits_per_byte_are_shown_without_hellaswag_or_for_several_runs(tmp_path):
    streams = dict.fromkeys(("train", "val", "val_bpb", "lr", "norm", "tok/s"), lambda step: 2 + step)
    one = write_run(tmp_path / "one", **streams)
    two, three = (write_run(tmp_path / name, hella=lambda step: 0.3, **streams) for name in ("two", "three"))
    assert panel(pictures.picture([one]), "Validation loss")
    assert panel(pictures.picture([two, three]), "Validation loss")  # their tokenizers may differ
    assert len(pictures.picture([two]).axes) == 5


def test_a_noisy_curve_is_drawn_with_its_running_mean(tmp_path):
    noise = np.random.default_rng(0).normal(3, 1, 400)
    shown = panel(pictures.picture([write_run(tmp_path / "run", 400, train=noise)]), "Loss")
    assert np.allclose([value for _, value in shown["train raw"]], noise)
    mean = [value for _, value in shown["train"]]
    assert np.allclose(mean[40:], [noise[i - 3 : i + 1].mean() for i in range(40, 400)])
    assert np.allclose(mean[:19], noise[:19])  # the window is short at first


def test_only_the_first_steps_may_be_outside_a_panel(tmp_path):
    def loss(step):
        return 11 if step < 5 else 9 if step == 150 else 3

    figure = pictures.picture([write_run(tmp_path / "run", 200, val=loss)])
    low, high = figure.axes[0].get_ylim()
    assert low < 3 and 9 < high < 11


def test_values_that_are_not_finite_are_left_out(tmp_path):
    values = [2, float("inf"), 4, float("nan"), 1e300, 3]
    figure = pictures.picture([write_run(tmp_path / "run", 6, norm=values, val=[float("nan")] * 6)])
    assert [step for step, _ in panel(figure, "Gradient norm")["norm"]] == [0, 2, 5]
    assert units(figure) == ["L2 norm"]
    with pytest.raises(UserError, match="no log.txt with numbers"):
        pictures.picture([write_run(tmp_path / "other", 3, val=[float("nan")] * 3)])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_one_or_two_steps_is_drawn(tmp_path, steps):
    figure = pictures.picture([write_run(tmp_path / "run", steps)])
    assert len(panel(figure, "Loss")["train"]) == steps
    assert len({line.get_color() for line in figure.axes[0].lines}) == 1  # colours mean runs
    figure.savefig(tmp_path / "picture.png")


def test_several_runs_share_the_panels(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("one", "_$two$_")]
    figure = pictures.picture(folders)
    assert names_in(figure) == ["one", "_$two$_"]
    drawn = [line.get_color() for line in figure.axes[0].lines if line.get_label() == "train"]
    assert drawn == [line.get_color() for line in figure.legends[0].get_lines()] == list(pictures.COLORS[:2])
    figure.savefig(tmp_path / "picture.png")  # text between $ is not a formula
    folders = [write_run(tmp_path / name / "log") for name in ("one", "two")]
    names = names_in(pictures.picture(folders))
    assert names[0].endswith("one/log") and names[1].endswith("two/log")


@pytest.mark.parametrize("record, lines", [
    (None, {}),
    ({}, {}),
    (dict(flags=GPT2, **HELLASWAG), {"GPT-2 124M": 0.2955, "GPT-3 125M": 0.337}),
    (dict(flags=dict(n_layer=24, n_embd=1024), **HELLASWAG), {"GPT-2 350M": 0.3752, "GPT-3 350M": 0.436}),
    (dict(flags=GPT2), {}),
    (dict(flags=GPT2, tokenizer="tokenizer.json", hellaswag_examples=10042), {}),
    (dict(flags=GPT2, tokenizer="gpt2", hellaswag_examples=2009), {}),
    (dict(flags=dict(n_layer=12, n_embd=769), data_source=FINEWEB_EDU, tokenizer="gpt2"),
     {"GPT-2 124M": 3.2924}),
    (dict(data_source=FINEWEB_EDU, tokenizer="tokenizer.json"), {}),
    (dict(data_source=FINEWEB_EDU), {}),
    (dict(data_source=dict(files=[]), tokenizer="gpt2"), {}),
])
def test_published_lines_are_shown_where_they_apply(tmp_path, record, lines):
    curves = dict(val=lambda step: 4, hella=lambda step: 0.3)
    figure = pictures.picture([write_run(tmp_path / "run", record=record, **curves)])
    found = {line.get_label(): line.get_ydata()[0] for axes in figure.axes for line in axes.lines
             if line.get_linestyle() == "--"}
    assert found == lines
    for label, value in lines.items():
        assert f"{label} {value:g}" in texts(figure)


def test_published_lines_of_several_sizes(tmp_path):
    curves = dict(hella=lambda step: 0.3)
    sizes = [(12, 768), (12, 768), (48, 1600)]
    records = [dict(flags=dict(n_layer=n_layer, n_embd=n_embd), **HELLASWAG) for n_layer, n_embd in sizes]
    folders = [write_run(tmp_path / str(i), record=record, **curves) for i, record in enumerate(records)]
    lines = pictures.picture(folders).axes[0].lines
    dashed = [line.get_label() for line in lines if line.get_linestyle() == "--"]
    assert dashed == ["GPT-2 124M", "GPT-3 125M", "GPT-2 1558M", "GPT-3 1.3B"]


def test_published_lines_must_apply_to_all_runs_of_a_panel(tmp_path):
    curves = dict(val=lambda step: 4, hella=lambda step: 0.3)
    record = dict(flags=GPT2, data_source=FINEWEB_EDU, **HELLASWAG)
    one = write_run(tmp_path / "one", record=record, **curves)
    web = write_run(tmp_path / "web", record={**record, "data_source": dict(dataset="HuggingFaceFW/fineweb")},
                    **curves)
    part = write_run(tmp_path / "part", record={**record, "hellaswag_examples": 2009}, **curves)
    assert "GPT-2 124M" in panel(pictures.picture([one]), "Loss")
    figure = pictures.picture([one, web])
    assert "GPT-2 124M" not in panel(figure, "Loss") and "GPT-2 124M" in panel(figure, "HellaSwag")
    figure = pictures.picture([one, part])
    assert "GPT-2 124M" in panel(figure, "Loss") and "GPT-2 124M" not in panel(figure, "HellaSwag")
    only_loss = write_run(tmp_path / "only_loss", record=dict(data_source=FINEWEB_EDU, tokenizer="gpt2"))
    assert "GPT-2 124M" in panel(pictures.picture([one, only_loss]), "HellaSwag")


LEARNED = dict(tokenizer="tokenizer.json", data_manifest="1")


@pytest.mark.parametrize("record, other, unit", [
    (HELLASWAG, HELLASWAG, "nats per token"), (LEARNED, LEARNED, "nats per token"),
    (HELLASWAG, LEARNED, "bits per byte"), (LEARNED, {**LEARNED, "data_manifest": "2"}, "bits per byte"),
    (HELLASWAG, None, "bits per byte"), (None, None, "bits per byte"),
])
def test_losses_of_different_tokenizers_are_drawn_per_byte(tmp_path, record, other, unit):
    curves = dict.fromkeys(("train", "val", "val_bpb"), lambda step: 3)
    folders = [write_run(tmp_path / name, record=facts, **curves)
               for name, facts in (("one", record), ("other", other))]
    figure = pictures.picture(folders)
    assert (units(figure) == ["bits per byte"]) == (unit == "bits per byte")
    assert len(panel(figure, "Loss" if unit == "nats per token" else "Validation loss")) >= 1


@pytest.mark.parametrize("other, words", [
    (LEARNED, r"one \(gpt2\).* other/log.txt has no val_bpb|other \(tokenizer.json\)"),
    (None, r"other \(unknown\).*write {\"tokenizer\": \"NAME\"} into .*other/run.json"),
])
def test_losses_of_different_tokenizers_are_refused_without_bits_per_byte(tmp_path, other, words):
    one = write_run(tmp_path / "one", record=HELLASWAG, val=lambda step: 3, val_bpb=lambda step: 1)
    two = write_run(tmp_path / "other", record=other, val=lambda step: 3)
    with pytest.raises(UserError, match=words):
        pictures.picture([one, two])
    without_loss = write_run(tmp_path / "without_loss", record=LEARNED, hella=lambda step: 0.3)
    pictures.picture([one, without_loss])
    bare = [write_run(tmp_path / name, val=lambda step: 3) for name in ("bare", "other_bare")]
    assert units(pictures.picture(bare)) == ["nats per token"]  # logs of another program, without a run.json


def test_the_last_value_is_written_where_its_curve_ends(tmp_path):
    short = write_run(tmp_path / "short", 100, val=lambda step: 4 - step / 100)
    long = write_run(tmp_path / "long", 300, val=lambda step: 4 - step / 100)
    for log_x in (False, True):
        figure = pictures.picture([short, long], log_x)
        [axes] = figure.axes
        ends = dict(zip(("3.0100", "1.0100"), axes.transData.transform([(99, 3.01), (299, 1.01)])))
        for text in axes.texts:
            if text.get_text() in ends:
                x, y = axes.transAxes.transform(text.get_position()) - ends.pop(text.get_text())
                assert 0 < x < 0.3 * figure.dpi and abs(y) < 0.1 * figure.dpi
        assert not ends


def test_every_run_in_the_legend_is_drawn(tmp_path):
    run, empty = write_run(tmp_path / "run"), write_run(tmp_path / "empty", skipped=lambda step: 1)
    for other in (tmp_path / "none", empty):
        with pytest.raises(UserError, match=f"{other} has no log.txt with numbers"):
            pictures.picture([run, other])


@pytest.mark.parametrize("values", [[9, 3, 4, 6, 9], [9, 8, 5, 4, 3]], ids=["rises", "falls"])
def test_the_legend_does_not_cover_the_curve(tmp_path, values):
    figure = pictures.picture([write_run(tmp_path / "log", steps=5, val=values)])
    figure.canvas.draw()
    axes = figure.axes[0]
    box = axes.get_legend().get_window_extent()
    x, y = axes.get_lines()[0].get_data()
    between = np.linspace(1, 4, 100)  # without step 0, which may be outside
    points = axes.transData.transform(np.column_stack([between, np.interp(between, x, y)]))
    assert not any(box.contains(*point) for point in points)


@pytest.mark.parametrize("streams, entries", [
    (("train", "val"), ["train", "validation"]), (("train",), ["train"]), (("val",), ["validation"]),
])
def test_the_legend_says_what_thin_and_thick_lines_mean(tmp_path, streams, entries):
    figure = pictures.picture([write_run(tmp_path / "run", **dict.fromkeys(streams, lambda step: 3))])
    legend = figure.axes[0].get_legend()
    assert [text.get_text().partition(",")[0] for text in legend.get_texts()] == entries
    width = {"train": 1, "validation": 2}
    assert [line.get_linewidth() for line in legend.get_lines()] == [width[entry] for entry in entries]
    for line in figure.axes[0].lines:
        if line.get_label() in ("train", "val") and len(line.get_xdata()) > 1:  # not the dot of step 0
            assert line.get_linewidth() == (1 if line.get_label() == "train" else 2)
            assert (line.get_marker() == "o") == (line.get_label() == "val")  # also in a short run


@pytest.mark.parametrize("log_x", [False, True])
def test_tokens_are_a_second_x_axis(tmp_path, log_x):
    record = dict(flags=dict(total_batch_size=4096))
    figure = pictures.picture([write_run(tmp_path / "run", 1000, record)], log_x)
    axes, top = figure.axes
    assert top.get_xlabel() == "tokens"
    for step in (0, 1, 30, 999):
        below, above = axes.transData.transform((step, 0))[0], top.transData.transform((4096 * step, 0))[0]
        assert below == pytest.approx(above)
    other = write_run(tmp_path / "other", record=dict(flags=dict(total_batch_size=512)))
    figure = pictures.picture([tmp_path / "run", other])
    assert len(figure.axes) == 1 and names_in(figure) == ["run (4,096 tokens per step)",
                                                          "other (512 tokens per step)"]


def test_step_0_is_visible_or_said_to_be_outside_the_panel(tmp_path):
    run = write_run(tmp_path / "run", 200, train=lambda step: 11 if step < 5 else 3, lr=lambda step: 1e-3)
    figure = pictures.picture([run])
    assert figure.axes[0].get_ylim()[1] < 11
    assert [axes.get_xlabel() for axes in figure.axes] == ["step (not shown: 11.0000 at step 0)", "step"]
    figure = pictures.picture([run], log_x=True)
    axes = figure.axes[0]
    assert axes.get_ylim()[1] > 11 and axes.get_xscale() == "symlog"
    x, y = axes.transAxes.inverted().transform(axes.transData.transform((0, 11)))
    assert 0 < x < 0.05 and 0 < y < 1 and axes.get_xlabel() == "step"


@pytest.mark.parametrize("count, name, log_x", [
    (1, "run", False), (2, "a", True), (3, "n" * 27, False), (7, "name_of_" * 10, False)])
def test_no_text_is_cut_or_overlaps_another(tmp_path, monkeypatch, count, name, log_x):
    record = dict(flags=dict(n_layer=48, n_embd=1600, total_batch_size=524288), data_source=FINEWEB_EDU,
                  **HELLASWAG)
    curves = dict(train=lambda step: 3.29, val=lambda step: 3.3, val_bpb=lambda step: 1, lr=lambda step: 6e-4,
                  hella=lambda step: 0.49, norm=lambda step: 0.123, **{"tok/s": lambda step: 3_456_789})
    drawn, draw = [], matplotlib.text.Text.draw

    def record_draw(text, renderer):
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            drawn.append((text.get_text(), text.get_window_extent(renderer)))

    monkeypatch.setattr("matplotlib.text.Text.draw", record_draw)
    figure = pictures.picture(
        [write_run(tmp_path / f"{name}{i}", 40, record, **curves) for i in range(count)], log_x)
    figure.savefig(tmp_path / "picture.png")
    assert len(drawn) > 50
    for text, box in drawn:
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (one, box), (other, another) in itertools.combinations(drawn, 2):
        assert not box.padded(-1).overlaps(another.padded(-1)), (one, other)


def test_of_repeated_steps_the_last_counts_and_a_torn_line_is_dropped(tmp_path):
    log = "3 val 9\n\n0 val 5\n1 val 4\n2 val 3\n1 val 4.5\n2 val 3.5\n3 val 2.5\n4 val 1"
    (tmp_path / "log.txt").write_text(log)
    assert read_curves(tmp_path) == {"val": ([0, 1, 2, 3], [5, 4.5, 3.5, 2.5])}
    assert panel(pictures.picture([tmp_path]), "Loss") == {"val": [(0, 5), (1, 4.5), (2, 3.5), (3, 2.5)]}


@pytest.mark.parametrize("line", ["2 val", "2 val 3 4", "two val 3", "2 val three", "-2 val 3",
                                  "2.5 val 3", f"{2**63} val 3", "<<<<<<< HEAD"])
def test_a_bad_line_is_refused_by_its_number(tmp_path, line):
    (tmp_path / "log.txt").write_text(f"0 val 5\n{line}\n1 val 4\n")
    with pytest.raises(UserError, match=r"log\.txt:2 is not a valid log line"):
        pictures.picture([tmp_path])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"flags": 3}', '{"data_source": "web"}', "[" * 100_000])
def test_a_damaged_record_is_named(tmp_path, text):
    run = write_run(tmp_path / "run")
    (run / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        pictures.picture([run])


def test_a_picture_is_reproducible_and_written_completely_or_not_at_all(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    for out in (tmp_path / "a.png", tmp_path / "a.svg"):
        pictures.draw([run], out)
        first = out.read_bytes()
        pictures.draw([run], out)
        assert out.read_bytes() == first
        assert first.startswith(b"\x89PNG" if out.suffix == ".png" else b"<?xml")

    def broken(self, file, **settings):
        file.write(b"half")
        raise OSError(28, "disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        pictures.draw([run], out)
    assert out.read_bytes() == first and sorted(tmp_path.iterdir()) == [tmp_path / "a.png", out, run]


def test_a_long_run_is_drawn_with_few_points(tmp_path):
    noise = np.random.default_rng(0).normal(3, 0.1, 19_073).round(10)
    curves = dict(train=noise, norm=noise, lr=noise, **{"tok/s": noise})
    figure = pictures.picture([write_run(tmp_path / "run", 19_073, **curves)])
    points = [len(line.get_xdata()) for axes in figure.axes for line in axes.lines]
    assert len(points) == 7 and max(points) <= 1100
    raw = panel(figure, "Loss")["train raw"]
    assert raw == sorted(raw) and all(noise[step] == value for step, value in raw)
    assert {0, noise.argmin(), noise.argmax(), 19_072} <= {step for step, _ in raw}
    raw = panel(pictures.picture([tmp_path / "run"], log_x=True), "Loss")["train raw"]
    assert raw == list(enumerate(noise))  # a logarithmic axis shows each of the first steps


def test_the_command_draws_and_refuses(tmp_path, monkeypatch):
    one, two = (write_run(tmp_path / name) for name in ("one", "two"))
    run_script("plot.py", one)
    with Image.open(one / "curves.png") as image:
        assert image.width == 1800 and image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    monkeypatch.chdir(tmp_path)
    plot.main(plot.parse_args([str(one), str(two), "--log_x"]))
    assert (tmp_path / "curves.png").exists()
    assert_refused(run_here(plot, one, "--out", "curves.pdf"), "curves.pdf", ".svg")
    assert_refused(run_here(plot, *[one] * 8), "8 runs")
    assert_refused(run_here(plot, tmp_path / "none"), tmp_path / "none", "log.txt")
    assert not (tmp_path / "none").exists()


def test_plotting_needs_no_torch_and_names_matplotlib(tmp_path, monkeypatch):
    code = "import sys, plot, kit.reference; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    run_script("-c", code)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        pictures.draw([write_run(tmp_path / "run")], tmp_path / "curves.png")
