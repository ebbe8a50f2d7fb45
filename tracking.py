"""Experiment trackers: what log.txt gets, shown by wandb, trackio or TensorBoard as well.

log.txt is the run, and a tracker is brought to it: each start sends the figures of log.txt that the tracker
lacks, then training adds its own. So the curves are whole and have each step once, however often the run was
killed, whenever tracking was switched on, and whatever had failed in between.
"""

import importlib
import itertools
import os
import secrets
import shutil
import sys
from pathlib import Path

from files import UserError, first_line
from record import read_log

ENDS = {"train", "skipped"}  # with one of these streams, the figures of a step are complete
OFFLINE = ("offline", "dryrun")  # as WANDB_MODE may call it


def check(kind, log_dir):
    """Import the package and find its account, before anything is computed. Raises UserError."""
    # read when a package is imported or set up. Crash reports go to nobody unless the user says so, and a
    # server that is gone does not hold a finished run for ever
    log_dir = Path(log_dir)
    for variable, value in dict(TRACKIO_DIR=log_dir / "trackio", WANDB_CACHE_DIR=log_dir,
                                WANDB_FINISH_TIMEOUT=300, WANDB_ERROR_REPORTING="false").items():
        os.environ.setdefault(variable, str(value))
    _, module, name = TRACKERS[kind]
    try:
        module = importlib.import_module(module)
        getattr(module, name)  # a mere directory of that name, as a run may leave, can be imported too
    except (ImportError, AttributeError) as error:
        raise UserError(f"--track {kind}: {first_line(error)}; pip install {kind}") from error
    if kind == "wandb":
        try:
            if module.setup().settings.mode not in OFFLINE:
                module.login(verify=False)  # on a terminal it asks for a key
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--track wandb: {reason}; WANDB_MODE=offline needs no account") from error


def start_wandb(log_dir, name, run_id, config):
    import wandb

    offline = wandb.setup().settings.mode in OFFLINE
    # nobody knows what `wandb sync` has sent of an offline run: each start writes all, as a run of its own
    ours = dict(project="gpt2", name=name, dir=log_dir, resume=None if offline else "allow",
                run_id=f"{run_id}-{secrets.token_hex(2)}" if offline else run_id)
    ours = {key: value for key, value in ours.items() if not os.environ.get(f"WANDB_{key.upper()}")}
    run = wandb.init(id=ours.pop("run_id", None), config=config, **ours)
    if offline:
        directory, ids = Path(run.dir).parent, os.environ.get("WANDB_RUN_ID") or f"{run_id}-????"
        for old in directory.parent.glob(f"offline-run-*-{ids}"):
            if old != directory and not list(old.glob("*.synced")):
                shutil.rmtree(old, ignore_errors=True)

    def send(figures, step):
        run.log(figures, step=step, commit=True)

    return run.starting_step, send, lambda failed: run.finish(exit_code=int(failed))


def start_trackio(log_dir, name, run_id, config):
    import trackio

    run = trackio.init(project="gpt2", name=name, config=config, resume="allow")
    return run._next_step, run.log, lambda failed: trackio.finish()


def start_tensorboard(log_dir, name, run_id, config):
    from torch.utils.tensorboard import SummaryWriter

    # the old files are no loss, all comes again; purge_step is for one that can't be removed, as it is read
    shutil.rmtree(log_dir / "tensorboard", ignore_errors=True)
    writer = SummaryWriter(log_dir / "tensorboard", purge_step=0, flush_secs=10)
    writer.add_text("config", "".join(f"    {flag}: {value}\n" for flag, value in config.items()))

    def send(figures, step):
        for stream, value in figures.items():
            writer.add_scalar(stream, value, step)

    return 0, send, lambda failed: writer.close()


# how each is started, which gives (the first step that it lacks, send, finish), and what must be there for it
TRACKERS = {
    "wandb": (start_wandb, "wandb", "init"),
    "trackio": (start_trackio, "trackio", "init"),
    "tensorboard": (start_tensorboard, "torch.utils.tensorboard", "SummaryWriter"),
}


class Tracker:
    """A tracked run, a context that finishes it. What its package fails at is said once; training goes on."""

    def __init__(self, kind, log_dir, run_id, config):
        """Start it, and send what log.txt has and the tracker lacks.

        run_id: the same at every start of a run. config: what the tracker shows of it, a dict.
        """
        self.kind, self.failed = kind, False
        self.step, self.figures = None, {}  # not sent yet
        log_dir = Path(log_dir)
        start, *_ = TRACKERS[kind]
        started = self.attempt(start, log_dir, f"{log_dir.resolve().name}-{run_id}", run_id, config)
        self.first, self.send, self.finish = started or (0, None, None)
        for step, lines in itertools.groupby(read_log(log_dir), key=lambda line: line[0]):
            self.log(step, {stream: value for _, stream, value, _ in lines})

    def attempt(self, call, *args):
        try:
            return call(*args)
        except Exception as error:
            if not self.failed:
                print(f"--track {self.kind} has failed, training goes on without it: {first_line(error)}",
                      file=sys.stderr, flush=True)
            self.failed = True

    def log(self, step, values):
        """Take figures of a step, {stream: value}, to send all of them at once: wandb takes none later."""
        if step != self.step:
            self.flush()
        self.step = step
        self.figures |= values
        if ENDS & values.keys():
            self.flush()

    def flush(self):
        if self.figures and self.step >= self.first and not self.failed:
            self.attempt(self.send, self.figures, self.step)
        self.figures = {}

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if error is None:  # a run that was cut off begins again with the step under way
            self.flush()
        if self.finish:
            self.attempt(self.finish, error is not None)
