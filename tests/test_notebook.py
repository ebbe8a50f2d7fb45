"""play.ipynb: it runs from top to bottom on any model; it is committed with its outputs for the demo's model.

    python tests/test_notebook.py      # run it on log_demo and write it back with its outputs
"""

import base64
import importlib.util
import io
import math
import os
import re
import subprocess
import sys

import make
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from runs import ROOT

NOTEBOOK = ROOT / "play.ipynb"


def execute(model, folder):
    """Run the notebook in `folder` on a model, named as for -m of sample.py; return it with its outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    env = {**os.environ, "MODEL": str(model), "PYTHONPATH": str(ROOT),
           "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    # without times, and with printed text in one piece, the same run writes the same file
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False,
                            coalesce_streams=True, resources={"metadata": {"path": str(folder)}})
    client.execute(env=env)
    notebook.metadata.language_info = {"name": "python"}  # without the version
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook):
    """The outputs of a notebook that are pictures."""
    return [output for cell in code_cells(notebook) for output in cell.outputs
            if "image/png" in output.get("data", {})]


def picture(output):
    return Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))


def use_few_colours(notebook):
    """Store the pictures with 128 colours each, in a third of the space."""
    for output in pictures(notebook):
        file = io.BytesIO()
        reduced = picture(output).convert("RGB").quantize(128, dither=Image.Dither.NONE)
        reduced.save(file, "png", optimize=True)
        output.data["image/png"] = base64.b64encode(file.getvalue()).decode()


def printed(notebook):
    """The printed text of each code cell: {cell id: text}."""
    return {cell.id: "".join(output.get("text", "") for output in cell.outputs)
            for cell in code_cells(notebook)}


def kinds(notebook):
    """The kinds of output of each code cell, text or picture: {cell id: kinds}."""
    return {cell.id: [output.get("name") or sorted(output.data) for output in cell.outputs]
            for cell in code_cells(notebook)}


def test_the_notebook_has_the_committed_kinds_of_output_on_a_run(whole, tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):  # not the user's own settings
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "folder"
    folder.mkdir()
    notebook = execute(whole.log_dir, folder)
    text = printed(notebook)
    assert kinds(notebook) == kinds(nbformat.read(NOTEBOOK, as_version=4))
    assert sum("the same as the module's" in line for line in "".join(text.values()).splitlines()) == 5
    losses = dict(re.findall(r"(untrained|ln V|trained) +([\d.]+)", text["untrained"]))
    assert float(losses["ln V"]) == pytest.approx(math.log(512), abs=1e-4)
    assert float(losses["untrained"]) == pytest.approx(math.log(512), abs=0.2)
    assert math.isfinite(float(losses["trained"]))
    assert re.search(r"^val +4 numbers", text["log-read"]) and text["gap"].count("gap") == 3
    assert not any(folder.iterdir())


@pytest.mark.filterwarnings("error:__array", "ignore:FigureCanvasAgg is non-interactive")
def test_the_notebook_runs_on_a_model_of_another_shape_without_a_log(learned, tmp_path, monkeypatch, capsys):
    model = make.small_gpt(16, 640, n_layer=1, n_head=1, bias=False)  # with a padded vocabulary
    monkeypatch.setenv("MODEL", str(make.small_checkpoint(tmp_path, model, tokenizer=learned)))
    plt.switch_backend("agg")
    namespace = {}
    # without a kernel, which takes seconds to import torch; both contexts restore what the notebook sets
    with torch.no_grad(), plt.rc_context():
        for cell in code_cells(nbformat.read(NOTEBOOK, as_version=4)):
            exec(cell.source, namespace)
    for figure in map(plt.figure, plt.get_fignums()):  # each heat map has a labelled scale
        bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
        assert all(bar.get_ylabel() for bar in bars)
        assert bars or not any(axes.images for axes in figure.axes)
    plt.close("all")
    assert "has no log.txt: the rest of this part is skipped" in capsys.readouterr().out


@pytest.mark.parametrize("variants, words", [
    (dict(norm="rmsnorm", logit_softcap=15),
     "has parts that GPT-2 lacks: norm rmsnorm, logit_softcap 15; use log_demo"),
    (None, "contains no valid checkpoint"),
])
def test_a_model_that_the_notebook_can_not_take_apart_ends_it_in_one_line(
        learned, tmp_path, monkeypatch, variants, words):
    (tmp_path / "empty").mkdir()
    path = tmp_path / "empty"
    if variants:
        model = make.small_gpt(16, n_layer=1, n_head=1, **variants)
        path = make.small_checkpoint(tmp_path, model, tokenizer=learned)
    monkeypatch.setenv("MODEL", str(path))
    cells = {cell.id: cell.source for cell in code_cells(nbformat.read(NOTEBOOK, as_version=4))}
    with torch.no_grad(), pytest.raises(SystemExit, match=re.escape(words)):
        exec(next(source for source in cells.values() if "load_model_and_tokenizer(" in source), {})


def test_the_notebook_is_committed_as_it_ran():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == [
        *range(1, len(code_cells(notebook)) + 1)], "not run in order: python tests/test_notebook.py"
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}}
    assert not any(cell.metadata for cell in notebook.cells)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert {output.get("name", output.output_type) for output in outputs} == {"stdout", "display_data"}
    text = "".join(printed(notebook).values())
    assert not re.search(r"/(home|root|tmp|Users|usr)\b|[A-Z]:\\|" + re.escape(str(ROOT)), text)
    assert NOTEBOOK.stat().st_size < 600_000
    for output in pictures(notebook):  # sharp: twice as many pixels as the width shown
        assert picture(output).width == pytest.approx(2 * output.metadata["image/png"]["width"], abs=1)


def test_the_text_describes_no_particular_model():
    text = "".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells
                   if cell.cell_type == "markdown")
    assert not re.search(r"layers? \d+, heads? \d", text)  # another run gives its heads other parts


def test_the_first_cell_makes_the_notebook_run_in_colab(tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    source = code_cells(notebook)[0].source
    [repository] = re.findall(r'REPOSITORY = "https://github.com/(.*)"', source)
    assert f"colab.research.google.com/github/{repository}/blob/main/play.ipynb" in notebook.cells[0].source
    commands = []

    def run(command, check):
        commands.append([*command, os.getcwd()])
        if command[0] == "git":
            os.mkdir(command[-1])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(source, {})
    assert not commands and os.getcwd() == str(tmp_path)  # the files are there already

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="set REPOSITORY"):
        exec(source.replace(repository, "USER/REPOSITORY"), {})
    exec(source.replace(repository, "me/gpt2"), {})
    assert commands == [
        ["git", "clone", "--depth", "1", "https://github.com/me/gpt2", "gpt2_code", str(tmp_path)],
        [sys.executable, "-m", "pip", "install", "-q", "-r", "requirements.txt", str(tmp_path / "gpt2_code")],
        [sys.executable, "train_gpt2.py", "@configs/demo.txt", str(tmp_path / "gpt2_code")]]
    assert sys.path[0] == str(tmp_path / "gpt2_code")


if __name__ == "__main__":
    finished = execute("log_demo", ROOT)
    use_few_colours(finished)
    nbformat.write(finished, NOTEBOOK)
