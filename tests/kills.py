"""Kill the demo on two ranks at random moments: `python tests/kills.py --kills 100`.

A run is killed and resumed until it ends, then the next run starts. Each must end in the same bits as an
uninterrupted run: log, weights, optimizer. Each start saves in the background or not, by chance. Each kill
prints a line.
"""

import argparse
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

from runs import Run, assert_same_end, ranks_of, read_log, run_script, start_script

parser = argparse.ArgumentParser(description="Kill the demo on two ranks; it must end in the same bits.")
parser.add_argument("--kills", type=int, default=100)
parser.add_argument("--seed", type=int, default=1337)
args = parser.parse_args()
moments = random.Random(args.seed)
folder = Path(tempfile.mkdtemp())


def command(name, *flags):
    log_dir, data = folder / name, folder / "data"
    return ["torchrun", 2, "train_gpt2.py", "@configs/demo.txt", "--data_dir", data, "--log_dir", log_dir,
            "--micro_batch_size", 4, "--save_every", 20, "--val_every", 100, *flags]


run_script(*command("whole"), timeout=3600)
whole = Run(folder / "whole", read_log(folder / "whole"))
print("the uninterrupted run ended", flush=True)
kills = runs = 0
while kills < args.kills:
    runs += 1
    ended = False
    while not ended:
        background = moments.choice(["--background", "--no-background"])
        process = start_script(*command("killed", "--resume", background))
        lines = []
        reader = threading.Thread(target=lines.extend, args=[process.stdout], daemon=True)
        reader.start()
        moment, victim = moments.uniform(1, 25), moments.choice(["all", 0, 1])
        started = time.monotonic()
        while process.poll() is None and (time.monotonic() - started < moment or len(ranks_of(process)) < 2):
            time.sleep(0.01)
        if process.poll() is None and kills < args.kills:
            ranks = ranks_of(process)
            for pid in [process.pid, *ranks] if victim == "all" else [ranks[victim]]:
                os.kill(pid, signal.SIGKILL)
            kills += 1
        process.wait()
        reader.join()
        ended = process.returncode == 0
        steps = [line.split()[1] for line in lines if line.startswith("step ") and "|" in line]
        print(f"kill {kills}: {victim} after {moment:.1f} s, steps {steps[0]} to {steps[-1]}" if steps else
              f"kill {kills}: {victim} after {moment:.1f} s, before the first step", flush=True)
    try:
        assert_same_end(folder / "killed", whole)
    except AssertionError as error:
        raise SystemExit(f"run {runs} ended in other bits: {folder}") from error
    print(f"run {runs} ended in the same bits, {kills} kills so far", flush=True)
    shutil.rmtree(folder / "killed")
shutil.rmtree(folder)
