"""Check that two commits train in the same bits on this machine.

    python tests/same_bits.py HEAD~1 HEAD            # one process
    python tests/same_bits.py HEAD~1 HEAD --all      # and two ranks, --compile, dropout, a resumed run

Each commit trains a tiny model for 20 steps on the same tokens, in its own checkout. Every value in the log
except the timings, all weights and the optimizer state must be equal: the exit status is 0, or 1 with the
first difference. Other flags, `--flag value`, are added to all runs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import make
import numpy as np
from runs import ROOT, read_log

FLAGS = ("--n_layer 2 --n_head 2 --n_embd 32 --vocab_size 64 --sequence_length 32 --micro_batch_size 4 "
         "--total_batch_size 256 --max_steps 20 --warmup_steps 5 --max_lr 1e-2 --val_every 10 --save_every "
         "20 --val_tokens 1000 --hellaswag_every 0 --sample_every 0 --device cpu --no-compile").split()
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def write_tokens(folder):
    """Write shards of 64 ids in which each id is followed by one of four others, which can be learned."""
    draw = np.random.Generator(np.random.PCG64(1337))
    leads_to = draw.integers(64, size=(64, 4))
    shards = {}
    for name in ("val_000000", "train_000001"):
        ids = [0]
        for way in draw.integers(4, size=20_000):
            ids.append(leads_to[ids[-1], way])
        shards[name] = ids
    make.write_shards(folder, "golden", **shards)


def train(checkout, data_dir, log_dir, *flags, launcher=()):
    """Run the train_gpt2.py of a checkout; return its log and its tensor files, {key: value}."""
    command = [sys.executable, *launcher, "train_gpt2.py", *FLAGS, "--data_dir", data_dir,
               "--log_dir", log_dir, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"} if launcher else None  # torchrun sets it too, with a warning
    subprocess.run(command, cwd=checkout, env=env, check=True, stdout=subprocess.DEVNULL)
    tensors = {f"{path.parent.name}/{path.name}": path.read_bytes()
               for path in sorted(log_dir.glob("*/*.safetensors"))}
    return {**read_log(log_dir), **tensors}


def train_on_two_ranks(checkout, data_dir, log_dir, *flags):
    return train(checkout, data_dir, log_dir, "--micro_batch_size", "2", *flags, launcher=TORCHRUN)


def train_compiled(checkout, data_dir, log_dir, *flags):
    return train(checkout, data_dir, log_dir, "--compile", *flags)


def train_with_dropout(checkout, data_dir, log_dir, *flags):
    return train(checkout, data_dir, log_dir, "--dropout", "0.2", *flags)


def train_and_resume(checkout, data_dir, log_dir, *flags):
    """A whole run whose newest checkpoint is then removed, so that it resumes half-way."""
    flags = ["--save_every", "10", *flags]
    train(checkout, data_dir, log_dir, *flags)
    shutil.rmtree(log_dir / "ckpt_000020")
    return train(checkout, data_dir, log_dir, *flags, "--resume")


VARIATIONS = {
    "one process": train, "two ranks": train_on_two_ranks, "compiled": train_compiled,
    "dropout": train_with_dropout, "resumed": train_and_resume,
}


def check_out(commit, folder):
    subprocess.run(["git", "clone", "-q", "--no-checkout", ROOT, folder], check=True)
    subprocess.run(["git", "checkout", "-q", "--detach", commit], cwd=folder, check=True)
    return folder


def first_difference(one, other):
    """The first key whose values differ, with both values; None if there is none."""
    for key in {**one, **other}:
        if one.get(key) != other.get(key):
            return f"{key} differs: {str(one.get(key))[:20]} and {str(other.get(key))[:20]}"


def main():
    parser = argparse.ArgumentParser(description="Check that two commits train in the same bits.")
    parser.add_argument("commits", nargs=2, metavar="COMMIT")
    parser.add_argument("--all", action="store_true", help=f"all variations: {', '.join(VARIATIONS)}")
    args, flags = parser.parse_known_args()
    names = list(VARIATIONS) if args.all else list(VARIATIONS)[:1]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_tokens(folder)
        checkouts = [check_out(commit, folder / f"checkout{i}") for i, commit in enumerate(args.commits)]
        for name in names:
            results = [VARIATIONS[name](checkout, folder, folder / f"{name} {i}", *flags)
                       for i, checkout in enumerate(checkouts)]
            difference = first_difference(*results)
            if difference:
                sys.exit(f"{name}: {difference}")
            tensors = sum(isinstance(value, bytes) for value in results[0].values())
            print(f"{name}: {len(results[0]) - tensors} values and {tensors} tensor files in the same bits",
                  flush=True)


if __name__ == "__main__":
    main()
