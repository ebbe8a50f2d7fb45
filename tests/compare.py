"""Whether two commits train alike, bit for bit on this machine: `python tests/compare.py HEAD~1 HEAD`.

Each trains a tiny model for 20 steps on the same tokens, in a checkout of its own. Exit status 0: each figure
of the log but the timings, the weights and the optimizer are the same. 1: they are not, and the first
difference is printed. `--flag value` behind the commits is added to both runs.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from conftest import ROOT, read_log

FLAGS = ("--n_layer 2 --n_head 2 --n_embd 32 --vocab_size 64 --sequence_length 32 --micro_batch_size 4 "
         "--total_batch_size 256 --max_steps 20 --warmup_steps 5 --max_lr 1e-2 --val_every 10 --save_every "
         "20 --val_tokens 1000 --hellaswag_every 0 --sample_every 0 --device cpu --no-compile").split()


def write_tokens(folder):
    """Shards of 64 ids in which each id leads to one of four others: there is something to learn."""
    draw = np.random.Generator(np.random.PCG64(1337))
    leads_to = draw.integers(64, size=(64, 4))
    for name in ("val_000000", "train_000001"):
        ids = [0]
        for way in draw.integers(4, size=20_000):
            ids.append(leads_to[ids[-1], way])
        np.save(folder / f"golden_{name}.npy", np.array(ids, dtype=np.uint16))


def train(checkout, data_dir, log_dir, *flags):
    """Run the train_gpt2.py of a checkout; returns the log as `read_log` does, and {"file": its bytes}."""
    command = [sys.executable, "train_gpt2.py", *FLAGS, "--data_dir", data_dir, "--log_dir", log_dir, *flags]
    subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.DEVNULL)
    tensors = {f"{path.parent.name}/{path.name}": path.read_bytes()
               for path in sorted(log_dir.glob("*/*.safetensors"))}
    return read_log(log_dir), tensors


def main():
    parser = argparse.ArgumentParser(description="Compare how two commits train, bit for bit.")
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_tokens(folder)
        runs = []
        for number, commit in enumerate(args.commits):
            checkout = folder / f"checkout{number}"
            subprocess.run(["git", "clone", "-q", "--no-checkout", ROOT, checkout], check=True)
            subprocess.run(["git", "checkout", "-q", "--detach", commit], cwd=checkout, check=True)
            runs.append(train(checkout, folder, folder / f"log{number}", *flags))
    for one, other in zip(*runs):
        for name in {**one, **other}:
            if one.get(name) != other.get(name):
                values = [str(figures.get(name))[:20] for figures in (one, other)]
                sys.exit(f"{name} differs: {' and '.join(values)}")
    print(f"{len(runs[0][0])} figures, {len(runs[0][1])} files of weights and optimizer: the same bits")


if __name__ == "__main__":
    main()
