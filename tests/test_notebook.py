"""play.ipynb: it runs from top to bottom on any model, and is committed as it ran on the demo's.

    python tests/test_notebook.py      # run it on log_demo and write it back with its outputs
"""

import math
import os
import re

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient

import checkpoint
from model import GPT, GPTConfig

NOTEBOOK = ROOT / "play.ipynb"


def execute(model, folder):
    """The notebook with its outputs, run in `folder` on the model that `-m` of sample.py would name."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    env = {**os.environ, "MODEL": str(model), "PYTHONPATH": str(ROOT),
           "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    # without times, and what is printed in one piece: the same run writes the same file
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", record_timing=False,
                            coalesce_streams=True, resources={"metadata": {"path": str(folder)}})
    client.execute(env=env)
    notebook.metadata.language_info = {"name": "python"}  # not the version of the one who ran it
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """What each code cell has printed, by the cell's id."""
    return {cell.id: "".join(output.get("text", "") for output in cell.outputs)
            for cell in code_cells(notebook)}


def kinds(notebook):
    """What each code cell has put out, text or picture, without its content."""
    return {cell.id: [output.get("name") or sorted(output.data) for output in cell.outputs]
            for cell in code_cells(notebook)}


def test_it_runs_on_a_run_and_makes_the_outputs_that_are_committed(whole, tmp_path, monkeypatch):
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):  # not a person's own settings
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tmp_path / "folder"
    folder.mkdir()
    notebook = execute(whole[0], folder)
    text = printed(notebook)
    assert kinds(notebook) == kinds(nbformat.read(NOTEBOOK, as_version=4))
    assert sum("the same as the module's" in line for line in "".join(text.values()).splitlines()) == 5
    losses = dict(re.findall(r"(untrained|ln V|trained) +([\d.]+)", text["untrained"]))
    assert float(losses["ln V"]) == pytest.approx(math.log(512), abs=1e-4)
    assert float(losses["untrained"]) == pytest.approx(math.log(512), abs=0.2)
    assert math.isfinite(float(losses["trained"]))
    assert re.search(r"^val +4 figures", text["log-read"]) and text["gap"].count("gap") == 3
    assert not any(folder.iterdir())


@pytest.mark.filterwarnings("error:__array", "ignore:FigureCanvasAgg is non-interactive")
def test_it_runs_on_a_model_of_another_shape_without_a_log(learned, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 640, n_layer=1, n_head=1, n_embd=16, bias=False))  # its vocabulary is padded
    checkpoint.save(tmp_path / "ckpt_000003", 3, model, learned)
    monkeypatch.setenv("MODEL", str(tmp_path / "ckpt_000003"))
    plt.switch_backend("agg")
    namespace = {}
    # no kernel, which takes seconds to import torch; both contexts give back what the notebook sets
    with torch.no_grad(), plt.rc_context():
        for cell in code_cells(nbformat.read(NOTEBOOK, as_version=4)):
            exec(cell.source, namespace)
    plt.close("all")
    assert "has no log.txt: the rest of this part is skipped" in capsys.readouterr().out


def test_it_is_committed_as_it_ran():
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


if __name__ == "__main__":
    nbformat.write(execute("log_demo", ROOT), NOTEBOOK)
