"""Where the time of training steps goes: a trace and a table, by torch.profiler."""

import contextlib

import torch

from kit.device import type_of
from kit.files import atomic_write

SKIPPED = 3  # steps at the start: they allocate memory and choose kernels


class Profile(contextlib.ExitStack):
    """Profiles --profile steps on rank 0; call `step` after each. It is a context manager."""

    def __init__(self, steps, log_dir, ranks):
        super().__init__()
        self.log_dir, self.ranks, self.profiler = log_dir, ranks, None
        if steps and ranks.is_first:
            schedule = torch.profiler.schedule(skip_first=SKIPPED, wait=0, warmup=1, active=steps, repeat=1)
            self.profiler = self.enter_context(torch.profiler.profile(
                schedule=schedule, on_trace_ready=self.write, acc_events=True))

    def step(self):
        if self.profiler is not None:
            self.profiler.step()

    def write(self, profiler):
        """Write log_dir/trace.json.gz, for https://ui.perfetto.dev, and the table log_dir/profile.txt."""
        trace, table = self.log_dir / "trace.json.gz", self.log_dir / "profile.txt"
        profiler.export_chrome_trace(str(trace))
        by = "self_cuda_time_total" if type_of(self.ranks.device) == "cuda" else "self_cpu_time_total"
        with atomic_write(table) as file:
            file.write(profiler.key_averages().table(sort_by=by, row_limit=40))
        self.ranks.say(f"profile: {table}; trace: {trace} (open it in https://ui.perfetto.dev)")
