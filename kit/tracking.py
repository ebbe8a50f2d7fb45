"""Experiment trackers: wandb, trackio and TensorBoard show what log.txt holds.

log.txt is the record of a run, and a tracker follows it: each start first sends the numbers of log.txt that
the tracker lacks, then training adds new ones. Thus the curves are complete and contain each step once,
however often the run was killed, whenever tracking was switched on, and whatever failed in between.
"""

import importlib
import itertools
import os
import secrets
import shlex
import shutil
import sys
from pathlib import Path

from kit.files import UserError, first_line

LAST_STREAMS = {"train", "skipped"}  # a step is complete once one of these is logged
OFFLINE = ("offline", "dryrun")  # values of WANDB_MODE


def check(kind, log_dir):
    """Import the package and find its account, before anything is computed. Raises UserError."""
    # the packages read these variables on import. Crash reports are sent only if the user asks for it, and an
    # unreachable server must not block a finished run for ever
    log_dir = Path(log_dir)
    for variable, value in dict(TRACKIO_DIR=log_dir / "trackio", WANDB_CACHE_DIR=log_dir,
                                WANDB_FINISH_TIMEOUT=300, WANDB_ERROR_REPORTING="false").items():
        os.environ.setdefault(variable, str(value))
    _, module, name = TRACKERS[kind]
    try:
        module = importlib.import_module(module)
        getattr(module, name)  # a mere directory called "wandb", as runs leave one, can be imported too
    except (ImportError, AttributeError) as error:
        raise UserError(f"--track {kind}: {first_line(error)}; pip install {kind}") from error
    if kind == "wandb":
        try:
            if module.setup().settings.mode not in OFFLINE:
                module.login(verify=False)  # on a terminal it asks for a key
        except Exception as error:
            message = " ".join(str(error).split())[:200]
            raise UserError(f"--track wandb: {message}; WANDB_MODE=offline needs no account") from error


def start_wandb(log_dir, name, run_id, config):
    import wandb

    offline = wandb.setup().settings.mode in OFFLINE
    # what `wandb sync` has sent of an offline run is unknown, so each start writes all numbers as a new run
    ours = dict(project="gpt2", name=name, dir=log_dir, resume=None if offline else "allow",
                run_id=f"{run_id}-{secrets.token_hex(2)}" if offline else run_id)
    ours = {key: value for key, value in ours.items() if not os.environ.get(f"WANDB_{key.upper()}")}
    run = wandb.init(id=ours.pop("run_id", None), config=config, **ours)
    if offline:
        directory, ids = Path(run.dir).parent, os.environ.get("WANDB_RUN_ID") or f"{run_id}-????"
        for old in directory.parent.glob(f"offline-run-*-{ids}"):
            if old != directory and not list(old.glob("*.synced")):
                shutil.rmtree(old, ignore_errors=True)

    def send(values, step):
        run.log(values, step=step, commit=True)

    return run.starting_step, send, lambda failed: run.finish(exit_code=int(failed))


def start_trackio(log_dir, name, run_id, config):
    import trackio

    run = trackio.init(project="gpt2", name=name, config=config, resume="allow")
    directory = shlex.quote(os.environ["TRACKIO_DIR"])  # which trackio's own hint lacks
    print(f"trackio's dashboard: TRACKIO_DIR={directory} trackio show --project gpt2")
    return run._next_step, run.log, lambda failed: trackio.finish()


def start_tensorboard(log_dir, name, run_id, config):
    from torch.utils.tensorboard import SummaryWriter

    # every start writes all numbers again. purge_step is for old files that can't be removed while in use
    shutil.rmtree(log_dir / "tensorboard", ignore_errors=True)
    writer = SummaryWriter(log_dir / "tensorboard", purge_step=0, flush_secs=10)
    writer.add_text("config", "".join(f"    {flag}: {value}\n" for flag, value in config.items()))

    def send(values, step):
        for stream, value in values.items():
            writer.add_scalar(stream, value, step)

    return 0, send, lambda failed: writer.close()


# for each tracker: its start function, which returns (first step that it lacks, send, finish), and a module
# and name that must exist
TRACKERS = {
    "wandb": (start_wandb, "wandb", "init"),
    "trackio": (start_trackio, "trackio", "init"),
    "tensorboard": (start_tensorboard, "torch.utils.tensorboard", "SummaryWriter"),
}


class Tracker:
    """A tracked run. As a context it finishes the run at exit.

    A failure of the tracker's package is reported once and does not stop training.
    """

    def __init__(self, kind, log_dir, run_id, config, logged=()):
        """Start the tracker, and send it the numbers it lacks.

        run_id: the same at every start of a run. config: a dict that the tracker shows. logged: what log.txt
        holds already, as `read_log` returns it.
        """
        self.kind, self.failed = kind, False
        self.step, self.values = None, {}  # of the step that is not complete yet
        log_dir = Path(log_dir)
        start, *_ = TRACKERS[kind]
        started = self.attempt(start, log_dir, f"{log_dir.resolve().name}-{run_id}", run_id, config)
        self.first, self.send, self.finish = started or (0, None, None)
        for step, lines in itertools.groupby(logged, key=lambda line: line[0]):
            self.log(step, {stream: value for _, stream, value, _ in lines})

    def attempt(self, call, *args):
        try:
            return call(*args)
        except Exception as error:
            if not self.failed:
                print(f"--track {self.kind} failed and is now off; log.txt still gets all numbers: "
                      f"{first_line(error)}", file=sys.stderr, flush=True)
            self.failed = True

    def log(self, step, values):
        """Collect numbers of a step, {stream: value}. They are sent together: wandb takes each step once."""
        if step != self.step:
            self.flush()
        self.step = step
        self.values |= values
        if LAST_STREAMS & values.keys():
            self.flush()

    def flush(self):
        if self.values and self.step >= self.first and not self.failed:
            self.attempt(self.send, self.values, self.step)
        self.values = {}

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        if error is None:  # a run that was interrupted logs the unfinished step again
            self.flush()
        if self.finish:
            self.attempt(self.finish, error is not None)
