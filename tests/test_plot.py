"""plot.py: what the picture shows, read back from the lines and texts of the figure."""

import itertools
import json
import sys

import matplotlib
import numpy as np
import pytest
from runs import assert_refused, run_here, run_script

import plot
from kit import curves as pictures
from kit.files import UserError
from kit.record import read_curves

GPT2 = dict(n_layer=12, n_embd=768)
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


@pytest.fixture(autouse=True)
def style():
    with matplotlib.rc_context(pictures.STYLE):
        yield


def test_a_picture_shows_the_values_of_the_log(tmp_path):
    streams = ("train", "val", "hella", "lr", "norm", "tok/s")
    values = {stream: [1 + i + step / 8 for step in range(8)] for i, stream in enumerate(streams)}
    figure = pictures.picture([write_run(tmp_path / "run", 8, **values)])
    shown = panel(figure, "loss") | panel(figure, "HellaSwag") | panel(figure, "learning rate")
    shown |= panel(figure, "gradient norm") | panel(figure, "tokens per second")
    assert len(figure.axes) == 5
    for stream in streams:
        assert shown[stream] == list(enumerate(values[stream]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["run"]
    assert {"train 1.8750", "val 2.8750", "3.8750", "4.9e+00", "5.88", "7"} == set(texts(figure))


def test_no_panel_without_its_stream(tmp_path):
    figure = pictures.picture([write_run(tmp_path / "run", lr=lambda step: 1e-3)])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["learning rate"]
    write_run(tmp_path / "other", skipped=lambda step: 1)
    with pytest.raises(UserError, match="no log.txt with numbers"):
        pictures.picture([tmp_path / "other"])


def test_bits_per_byte_are_shown_without_hellaswag_or_for_several_runs(tmp_path):
    streams = dict.fromkeys(("train", "val", "val_bpb", "lr", "norm", "tok/s"), lambda step: 2 + step)
    one = write_run(tmp_path / "one", **streams)
    two, three = (write_run(tmp_path / name, hella=lambda step: 0.3, **streams) for name in ("two", "three"))
    assert panel(pictures.picture([one]), "val loss in bits")
    assert panel(pictures.picture([two, three]), "val loss in bits")  # their tokenizers may differ
    assert len(pictures.picture([two]).axes) == 5


def test_a_noisy_curve_is_drawn_with_its_running_mean(tmp_path):
    noise = np.random.default_rng(0).normal(3, 1, 400)
    shown = panel(pictures.picture([write_run(tmp_path / "run", 400, train=noise)]), "loss")
    assert np.allclose([value for _, value in shown["train raw"]], noise)
    mean = [value for _, value in shown["train"]]
    assert np.allclose(mean, [noise[max(0, i - 3) : i + 1].mean() for i in range(400)])


def test_only_the_first_steps_may_be_outside_a_panel(tmp_path):
    def loss(step):
        return 11 if step < 5 else 9 if step == 150 else 3

    figure = pictures.picture([write_run(tmp_path / "run", 200, val=loss)])
    low, high = figure.axes[0].get_ylim()
    assert low < 3 and 9 < high < 11


def test_values_that_are_not_finite_are_left_out(tmp_path):
    values = [2, float("inf"), 4, float("nan"), 1e300, 3]
    figure = pictures.picture([write_run(tmp_path / "run", 6, norm=values, val=[float("nan")] * 6)])
    assert [step for step, _ in panel(figure, "gradient norm")["norm"]] == [0, 2, 5]
    assert panel(figure, "loss") == {}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_one_or_two_steps_is_drawn(tmp_path, steps):
    figure = pictures.picture([write_run(tmp_path / "run", steps)])
    assert len(panel(figure, "loss")["train"]) == steps
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2  # train and val of one run
    figure.savefig(tmp_path / "picture.png")


def test_several_runs_share_the_panels(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("one", "_$two$_")]
    figure = pictures.picture(folders)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "_$two$_"]
    drawn = [line.get_color() for line in figure.axes[0].lines if line.get_label() == "train"]
    assert drawn == [line.get_color() for line in figure.legends[0].get_lines()] == list(pictures.COLORS[:2])
    figure.savefig(tmp_path / "picture.png")  # text between $ is not a formula
    folders = [write_run(tmp_path / name / "log") for name in ("one", "two")]
    names = [text.get_text() for text in pictures.picture(folders).legends[0].get_texts()]
    assert names[0].endswith("one/log") and names[1].endswith("two/log")


@pytest.mark.parametrize("record, lines", [
    (None, {}),
    ({}, {}),
    (dict(flags=GPT2), {"GPT-2 124M": 0.2955, "GPT-3 125M": 0.337}),
    (dict(flags=dict(n_layer=24, n_embd=1024)), {"GPT-2 350M": 0.3752, "GPT-3 350M": 0.436}),
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
    folders = [write_run(tmp_path / str(i), record=dict(flags=dict(n_layer=n_layer, n_embd=n_embd)), **curves)
               for i, (n_layer, n_embd) in enumerate(sizes)]
    lines = pictures.picture(folders).axes[0].lines
    dashed = [line.get_label() for line in lines if line.get_linestyle() == "--"]
    assert dashed == ["GPT-2 124M", "GPT-3 125M", "GPT-2 1558M", "GPT-3 1.3B"]


@pytest.mark.parametrize("count, name", [(1, "run"), (2, "a"), (3, "n" * 27), (7, "name_of_" * 10)])
def test_no_text_is_cut_or_overlaps_another(tmp_path, monkeypatch, count, name):
    record = dict(flags=dict(n_layer=48, n_embd=1600), data_source=FINEWEB_EDU, tokenizer="gpt2")
    curves = dict(train=lambda step: 3.29, val=lambda step: 3.3, val_bpb=lambda step: 1, lr=lambda step: 6e-4,
                  hella=lambda step: 0.49, norm=lambda step: 0.123, **{"tok/s": lambda step: 3_456_789})
    drawn, draw = [], matplotlib.text.Text.draw

    def record_draw(text, renderer):
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            drawn.append((text.get_text(), text.get_window_extent(renderer)))

    monkeypatch.setattr("matplotlib.text.Text.draw", record_draw)
    figure = pictures.picture(
        [write_run(tmp_path / f"{name}{i}", 40, record, **curves) for i in range(count)])
    figure.savefig(tmp_path / "picture.png")
    assert len(drawn) > 50
    for text, box in drawn:
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (one, box), (other, another) in itertools.combinations(drawn, 2):
        assert not box.padded(-1).overlaps(another.padded(-1)), (one, other)


def test_of_repeated_steps_the_last_counts_and_a_torn_line_is_dropped(tmp_path):
    log = "3 val 9\n0 val 5\n1 val 4\n2 val 3\n1 val 4.5\n2 val 3.5\n3 val 2.5\n4 val 1"
    (tmp_path / "log.txt").write_text(log)
    assert read_curves(tmp_path) == {"val": ([0, 1, 2, 3], [5, 4.5, 3.5, 2.5])}
    assert panel(pictures.picture([tmp_path]), "loss") == {"val": [(0, 5), (1, 4.5), (2, 3.5), (3, 2.5)]}


@pytest.mark.parametrize("line", ["", "2 val", "2 val 3 4", "two val 3", "2 val three", "-2 val 3",
                                  "2.5 val 3", f"{2**63} val 3", "<<<<<<< HEAD"])
def test_a_bad_line_is_refused_by_its_number(tmp_path, line):
    (tmp_path / "log.txt").write_text(f"0 val 5\n{line}\n1 val 4\n")
    with pytest.raises(UserError, match=r"log\.txt:2 is not a line of a log"):
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
    raw = panel(figure, "loss")["train raw"]
    assert raw == sorted(raw) and all(noise[step] == value for step, value in raw)
    assert {noise.argmin(), noise.argmax(), 19_072} <= {step for step, _ in raw}


def test_the_command_draws_and_refuses(tmp_path, monkeypatch):
    one, two = (write_run(tmp_path / name) for name in ("one", "two"))
    run_script("plot.py", one)
    assert (one / "curves.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.chdir(tmp_path)
    plot.main(plot.parse_args([str(one), str(two)]))
    assert (tmp_path / "curves.png").exists()
    assert_refused(run_here(plot, one, "--out", "curves.pdf"), "curves.pdf", ".svg")
    assert_refused(run_here(plot, *[one] * 8), "8 runs")
    assert_refused(run_here(plot, tmp_path / "none"), tmp_path / "none", "log.txt")


def test_plotting_needs_no_torch_and_names_matplotlib(tmp_path, monkeypatch):
    code = "import sys, plot, kit.reference; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    run_script("-c", code)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        pictures.draw([write_run(tmp_path / "run")], tmp_path / "curves.png")
