"""GPT-2 1558M and 774M on a CPU, with random weights, inside 24 GB of memory.

`python -m pytest -n 0 -m slow -s tests/test_large.py` prints the peak memory of each step, and needs 7 GB of
disk. AdamW's update of 1558M would take 16 bytes a parameter = 24.9 GB, so the update is that of 774M.
"""

import subprocess
import sys
import time

import pytest
from runs import ROOT

pytestmark = pytest.mark.slow

START = """
import sys
from pathlib import Path
import torch
import checkpoint
from kit.device import peak_memory, tune
from model import GPT, GPT2_SIZES, GPTConfig
folder, size = Path(sys.argv[1]), sys.argv[2]
tune("cpu", training=True)
"""
TRAIN = """
torch.manual_seed(0)
model = GPT(GPTConfig(**GPT2_SIZES[size]))
model.checkpoint_activations = True
idx = torch.randint(50257, (1, 1025))
_, loss = model(idx[:, :-1], idx[:, 1:])
loss.backward()
assert 10.5 < loss.item() < 11.5 and all(p.grad.isfinite().all() for p in model.parameters())
"""
STEPS = {
    "forward, backward, save": ("gpt2-xl", TRAIN + """
checkpoint.save(folder / "ckpt_000001", model, checkpoint.Progress(1))
"""),
    "load, sample": ("gpt2-xl", """
model = checkpoint.load_model(folder / "ckpt_000001")
assert model.generate(torch.tensor([[50256]]), 8).shape == (1, 9)
"""),
    "AdamW's update of 774M": ("gpt2-large", TRAIN + """
optimizer = model.configure_optimizers(0.1, 6e-4, "cpu")
optimizer.step()
assert all(p.isfinite().all() for p in model.parameters())
"""),
}


@pytest.mark.parametrize("name", STEPS)
def test_large_models_fit_into_24_gb(name, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "large"
    size, code = STEPS[name]
    started = time.monotonic()
    code = START + code + "\nprint(peak_memory('cpu'))"
    process = subprocess.run([sys.executable, "-c", code, folder, size], cwd=ROOT, text=True,
                             capture_output=True)
    assert process.returncode == 0, process.stderr
    peak = int(process.stdout.split()[-1])
    print(f"\n{size}, {name}: peak memory {peak / 2**30:.1f} GiB, {time.monotonic() - started:.0f} s")
    assert peak < 24e9
