"""The log directory of a training run: who may write it, its log, tracker, curves and reference check."""

import contextlib
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from kit import curves, record, reference, tracking
from kit.background import Background
from kit.device import type_of
from kit.files import UserError, locked, sync
from kit.ranks import restarted_by_torchrun, torchrun_id

# what a run writes into its log directory and may replace
FILES = ("log.txt", "run.json", "source_*.zip", "curves.png", "best", "ckpt_*", "tensorboard",
         "profile.txt", "trace.json.gz")
REFERENCE_STEPS = (250, 1000, 5000)  # the val loss is compared with reference runs after these steps


class Run(contextlib.ExitStack):
    """A run's log directory, opened by all ranks and written by rank 0. It is a context manager.

    Only rank 0 needs to see it: the other ranks may be on machines with disks of their own. resuming: whether
    the run continues from a checkpoint, because --resume says so or because torchrun has restarted the ranks.
    """

    def __init__(self, args, ranks):
        """Lock the directory. args: the flags of train_gpt2.py.

        Raises UserError if the directory is in use, can't be written, contains a run that is not resumed, or
        contains files of another program that the run would overwrite.
        """
        super().__init__()
        log_dir, self.track, self.plot = args.log_dir, args.track, args.plot
        self.log_dir, self.ranks = Path(log_dir), ranks
        self.log_file = record.log_path(log_dir)
        self.tracker = None
        if log_dir != log_dir.encode(errors="replace").decode():  # safetensors could not read it back
            raise UserError(f"--log_dir {log_dir}: its name is not UTF-8")
        self.resuming = args.resume
        restarted = ranks.max(restarted_by_torchrun())  # on any machine
        if ranks.is_first:
            self.enter_context(locked(log_dir))
            self.resuming |= bool(restarted) and record.read_record(log_dir).get("torchrun") == torchrun_id()
            self.check_files()
            if self.track:
                tracking.check(self.track, log_dir)
        self.resuming = ranks.from_first(self.resuming)
        on = type_of(ranks.device) == "cuda" if args.background is None else args.background
        self.background = self.enter_context(Background(on))

    def check_files(self):
        """Raise UserError if the directory contains what this run must not overwrite."""
        found = [path for name in FILES for path in self.log_dir.glob(name)
                 if path.is_dir() or path.stat().st_size]
        if found and not record.is_run(self.log_dir):
            raise UserError(f"--log_dir {self.log_dir} contains a {found[0].name} of another program, which "
                            "this run would overwrite: name another directory")
        if found and not self.resuming:
            raise UserError(f"--log_dir {self.log_dir} already contains a run: continue it with --resume, "
                            "or name another directory")

    def start(self, step, flags, **facts):
        """Begin at a step: drop that step and later ones from log.txt, write run.json, start the tracker."""
        if not self.ranks.is_first:
            return
        record.truncate_log(self.log_dir, step)
        facts = dict(step=step, **facts)
        run_id = record.record_start(
            self.log_dir, self.resuming, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), flags=flags, **facts,
            git_commit=git_commit(), source=record.save_source(self.log_dir), torch=torch.__version__,
            python=platform.python_version(), cores=os.cpu_count(), threads=torch.get_num_threads(),
            torchrun=torchrun_id())
        if self.track:
            self.tracker = self.enter_context(tracking.Tracker(
                self.track, self.log_dir, run_id, {**flags, **facts}, record.read_log(self.log_dir)))

    def log(self, step, **values):
        """Append the numbers of a step to log.txt, and send them to the tracker."""
        if self.ranks.is_first:
            record.append_log(self.log_dir, step, values)
            if self.tracker:
                self.tracker.log(step, values)

    def add_facts(self, **facts):
        """Add facts to run.json."""
        if self.ranks.is_first:
            record.add_facts(self.log_dir, **facts)

    def report(self, step, val_loss=None):
        """Draw the curves, and warn if val_loss, if given, is far from that of reference runs."""
        if not self.ranks.is_first:
            return
        if val_loss is not None and step in REFERENCE_STEPS:
            try:
                warning = reference.check(step, val_loss, self.log_dir)
            except UserError as error:
                warning = f"no comparison with reference runs: {error}"
            if warning:
                self.ranks.say(warning)
        if self.plot:
            self.background.submit(self.draw)

    def draw(self):
        """Draw log_dir/curves.png. A failure is reported once and does not stop the run."""
        try:
            curves.draw([self.log_dir], self.log_dir / "curves.png")
        except UserError as error:  # for example without matplotlib
            self.plot = False
            self.ranks.say(f"curves.png will no longer be drawn: {error}")

    def sync_log(self):
        """Make sure that log.txt is on the disk, for example before a checkpoint of the same step."""
        if self.log_file.exists():
            sync(self.log_file)


def git_commit():
    """The commit of this program, or None if it is not in a git checkout."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
