"""Two torchrun agents on one machine, as two nodes: launch/slurm.sh, and the recipe of docs/scaling.md.

Slurm itself is simulated: `srun` starts the command once for each node. Each test takes about a minute:
`python -m pytest -m slow tests/test_nodes.py` runs them.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, Run, assert_same_end, children, environment, flags_of, read_log, run_script

pytestmark = pytest.mark.slow

SRUN = """#!/usr/bin/env python3
import os, signal, subprocess, sys, time
command = sys.argv[sys.argv.index("torchrun"):]
assert "--cpus-per-task=6" in sys.argv  # what sbatch was told; srun does not know it
nodes = [subprocess.Popen(command) for _ in range(2)]
with open("{folder}/agents", "w") as file:
    file.write(" ".join(str(node.pid) for node in nodes))
stop = lambda *_: [node.send_signal(signal.SIGTERM) for node in nodes]
signal.signal(signal.SIGTERM, stop)
while None in (status := [node.poll() for node in nodes]):
    if any(status):
        stop()
    time.sleep(0.1)
sys.exit(any(status))
"""
SCONTROL = """#!/bin/sh
case $1 in show) echo localhost;; requeue) echo "requeued $2";; esac
"""


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def whole_of_two(shards, tmp_path_factory):
    """An uninterrupted run on two ranks of one node."""
    log_dir = tmp_path_factory.mktemp("whole") / "log"
    run_script("torchrun", 2, "train_gpt2.py", *flags_of(shards, log_dir))
    return Run(log_dir, read_log(log_dir))


class Job:
    """A job of two nodes with one rank each, whose output goes into a file."""

    def __init__(self, folder, command, env):
        self.output = folder / "output"
        path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        env = environment(more={**env, "PATH": path})
        with open(self.output, "a") as file:
            self.process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, stdout=file,
                                            stderr=subprocess.STDOUT)

    def wait_for(self, words, seconds=100):
        end = time.monotonic() + seconds
        while words not in self.output.read_text():
            assert time.monotonic() < end, self.output.read_text()
            time.sleep(0.05)

    def end(self, seconds=150):
        """Wait for the end; return the exit status."""
        return self.process.wait(seconds)


def kill_node(agent):
    """Kill a torchrun and its ranks, like a machine that goes down."""
    for pid in [agent, *children(agent)]:
        os.kill(pid, signal.SIGKILL)


# --------------------------------------------------------------------------------------------------- slurm.sh


@pytest.fixture
def slurm(tmp_path, shards):
    """Start launch/slurm.sh with the flags of a tiny run; return the Job."""
    for name, script in (("srun", SRUN.replace("{folder}", str(tmp_path))), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)

    def start(*more):
        env = dict(SLURM_JOB_NODELIST="a,b", SLURM_JOB_NUM_NODES="2", SLURM_JOB_ID="7",
                   SLURM_CPUS_PER_TASK="6", PAUSE="0", PORT=str(free_port()))
        flags = flags_of(shards, tmp_path / "log", *more)
        return Job(tmp_path, ["bash", "launch/slurm.sh", *flags], env)

    return start


def agents(tmp_path):
    return list(map(int, (tmp_path / "agents").read_text().split()))


@pytest.mark.parametrize("victim", ["nobody", "rank", "node", "host"])
def test_slurm_starts_all_nodes_again(slurm, whole_of_two, tmp_path, victim):
    job = slurm()
    job.wait_for("step     5 |")
    host, other = agents(tmp_path)
    if victim == "rank":
        os.kill(children(other)[0], signal.SIGKILL)
    elif victim != "nobody":
        kill_node(host if victim == "host" else other)
    assert job.end() == 0, job.output.read_text()
    assert ("start 1 failed" in job.output.read_text()) == (victim != "nobody")
    assert_same_end(tmp_path / "log", whole_of_two)


def test_slurm_saves_before_the_time_limit_and_queues_the_job_again(slurm, whole_of_two, tmp_path):
    job = slurm()
    job.wait_for("step     5 |")
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == 0
    output = job.output.read_text()
    assert "requeued 7" in output and re.search(r"stopped by SIGTERM before step \d+", output)
    assert slurm().end() == 0
    assert_same_end(tmp_path / "log", whole_of_two)


def test_slurm_gives_up_on_a_wrong_flag(slurm):
    job = slurm("--max_lr", "much")
    assert job.end() == 1
    assert "start 3 failed" in job.output.read_text() and "start 4" not in job.output.read_text()


# ------------------------------------------------------------------------------------- without a scheduler


@pytest.fixture
def start_node(tmp_path, shards):
    """start_node(0 or 1): start torchrun as docs/scaling.md says, for one of two nodes; return the Job."""
    command = re.search(r"^torchrun --nnodes=2 (.*) train_gpt2.py --resume$",
                        (ROOT / "docs" / "scaling.md").read_text(), re.MULTILINE)[1]
    command = command.replace("--nproc_per_node=8", "--nproc_per_node=1")
    command = command.replace("HOST:29400", f"localhost:{free_port()}").split()
    jobs = []

    def start(node):
        folder = tmp_path / str(node)
        folder.mkdir(exist_ok=True)
        jobs.append(Job(folder, ["torchrun", "--nnodes=2", f"--rdzv_conf=is_host={int(node == 0)}", *command,
                                 "train_gpt2.py", "--resume", *flags_of(shards, tmp_path / "log")],
                        {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            kill_node(job.process.pid)


def wait_for_first(nodes):
    """Wait until the run has passed step 5; return the node of rank 0, whose output says so."""
    end = time.monotonic() + 100
    while time.monotonic() < end:
        for node in nodes:
            if "step     5 |" in node.output.read_text():
                return node
        time.sleep(0.05)
    raise AssertionError([node.output.read_text() for node in nodes])


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_torchrun_of_two_nodes_restarts_after_a_rank_died(start_node, whole_of_two, tmp_path, rank):
    nodes = [start_node(0), start_node(1)]
    if rank is not None:
        first = wait_for_first(nodes)  # the node of rank 0
        nodes.sort(key=lambda node: node is not first)
        os.kill(children(nodes[rank].process.pid)[0], signal.SIGKILL)
    assert [node.end() for node in nodes] == [0, 0], [node.output.read_text() for node in nodes]
    assert_same_end(tmp_path / "log", whole_of_two)


def test_a_node_that_went_down_comes_back(start_node, whole_of_two, tmp_path):
    nodes = [start_node(0), start_node(1)]
    wait_for_first(nodes)
    kill_node(nodes[1].process.pid)
    nodes[1].process.wait()
    nodes[1] = start_node(1)
    assert [node.end() for node in nodes] == [0, 0], [node.output.read_text() for node in nodes]
    assert_same_end(tmp_path / "log", whole_of_two)


def test_the_node_that_hosts_the_rendezvous_went_down(start_node, whole_of_two, tmp_path):
    """The other one ends by itself. Both are started again."""
    nodes = [start_node(0), start_node(1)]
    wait_for_first(nodes)
    kill_node(nodes[0].process.pid)
    assert nodes[1].end(60) != 0
    nodes = [start_node(0), start_node(1)]
    assert [node.end() for node in nodes] == [0, 0], [node.output.read_text() for node in nodes]
    assert_same_end(tmp_path / "log", whole_of_two)
