"""Killed or stopped at any moment and resumed, a run ends as if nothing had happened; full disks, full memory and
long runs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import flags, wait_for
from safetensors.torch import load_file

from aavae import Run
from aavae.files import load_checkpoint

DIGITS = [
    "pretrain",
    *flags(
        train__accelerator="cpu",
        model__width=0.125,
        train__warmup_epochs=1,
        train__max_epochs=4,
        train__knn_every_n_epochs=2,
        train__save_every_n_steps=7,
        train__ema=0.99,
        train__clip=100,
    ),
]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(a: Path, b: Path):
    "Encoder, model, optimiser, schedule and metrics, bit for bit."
    x, y = (load_checkpoint(p / "checkpoints" / "last.ckpt") for p in (a, b))
    for part in ("state_dict", "optimizer", "step"):
        assert same(x[part], y[part]), part
    assert same(x["aavae"].get("ema"), y["aavae"].get("ema"))
    assert same(load_file(a / "encoder.safetensors"), load_file(b / "encoder.safetensors"))
    assert (a / "metrics.csv").read_bytes() == (b / "metrics.csv").read_bytes()


@pytest.fixture(scope="module")
def whole(aavae, tmp_path_factory):
    "A run that nothing disturbed, in an interpreter of its own; the others are forks with one thread."
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = aavae(*DIGITS, "--out", out, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return out


# A process that trains with the arguments after the first, n. It reports its steps, and stops in the middle of writing
# its n-th checkpoint or encoder, to be killed there.
OBSERVED = """
import contextlib, sys, time
import aavae.files, aavae.run, aavae.train
from aavae.cli import main
usual, atomic, writes, stop_in = aavae.train.wishes, aavae.files.atomic, 0, int(sys.argv[1])
def wishes(t, keeper, step):
    print(step, flush=True)
    return usual(t, keeper, step)
class Halting:
    def __init__(self, f): self.f = f
    def write(self, data):
        global writes
        writes, half = writes + 1, len(data) // 2
        self.f.write(data[:half]); self.f.flush()
        if writes == stop_in: print("writing", flush=True); time.sleep(600)
        return self.f.write(data[half:])
    def __getattr__(self, name): return getattr(self.f, name)
@contextlib.contextmanager
def halting(path):
    with atomic(path) as f: yield Halting(f) if str(path).endswith(("ckpt", "encoder.safetensors")) else f
aavae.train.wishes = wishes
aavae.files.atomic = aavae.run.atomic = halting
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def observed(start_aavae):
    "observed(n, arguments): yields the process and what it says, line by line: its steps, 'writing'; '' at its end."

    def run(n, arguments):
        process = start_aavae(n, *arguments, code=OBSERVED)
        while not process.out.exists():
            time.sleep(0.001)
        with open(process.out) as said:
            ended = False
            while not ended:
                ended = process.poll() is not None  # before the rest is read
                while (line := said.readline()).endswith("\n"):
                    if line == "writing\n" or line.strip().isdigit():
                        yield process, line.strip()
                time.sleep(0.001)
        yield process, ""

    return run


def kill_and_resume(
    observed, whole: Path, out: Path, draw: random.Random, in_write: bool, kills: int = 1
) -> tuple[int, bool]:
    """Kills a run `kills` times, each after a random number of new steps or while a file is half written, then
    lets it end. Returns the last step seen and whether a file was cut."""
    seen, cut = 0, False
    for kill in range(kills):
        steps, due = draw.randint(1, 30), draw.randint(1, 5) if in_write else 0
        new = 0
        for process, word in observed(due, [*DIGITS, "--out", out, *(["--resume", "true"] if kill else [])]):
            if word == "":
                assert process.returncode == -9, f"the run ended before it was killed: {process.err.read_text()}"
            elif word == "writing":
                assert new
                cut = True
                process.send_signal(signal.SIGKILL)
            else:
                new, seen = new + 1, int(word)
                if not due and new == steps:
                    time.sleep(draw.random() * 0.02)
                    process.send_signal(signal.SIGKILL)
    *_, (process, _) = observed(0, [*DIGITS, "--out", out, "--resume", "true"])
    assert process.returncode == 0, process.err.read_text()
    assert_same_run(whole, out)
    assert not list(out.rglob(".*.part"))
    return seen, cut


def test_killed_and_resumed(observed, whole, tmp_path):
    "Three kills, one of them in the middle of a file; twice the same end, bit for bit."
    draw = random.Random(0)
    assert kill_and_resume(observed, whole, tmp_path / "a", draw, in_write=False, kills=2)[0]
    assert kill_and_resume(observed, whole, tmp_path / "b", draw, in_write=True)[1]


@pytest.mark.slow
def test_twenty_kills_and_twenty_finishes(observed, whole, tmp_path):
    "Twenty kills, each followed by a finish that is the same, bit for bit."
    draw = random.Random(1)
    found = [kill_and_resume(observed, whole, tmp_path / f"run{i}", draw, in_write=i % 3 == 2) for i in range(20)]
    in_file = sum(cut for _, cut in found)
    in_epoch = sum(step % 20 != 0 for step, _ in found)
    print(f"20 kills at steps {[step for step, _ in found]}, {in_file} in the middle of a file, {in_epoch} of an epoch")


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_stopped_by_a_signal(start_aavae, whole, tmp_path, signum, code):
    """One line, everything saved, exit code 128 + signal; in a SLURM job SIGUSR1 puts the job back into the queue,
    and the requeued job goes on by itself."""
    out = tmp_path / "run"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    process = start_aavae(*DIGITS, "--out", out, env=env)
    wait_for((out / "checkpoints" / "last.ckpt").exists, process)
    process.send_signal(signum)
    stopped = process.finish(60)
    err = stopped.stderr
    assert stopped.returncode == code and "continue with --resume true" in err and "Traceback" not in err, err
    assert 0 < load_checkpoint(out / "checkpoints" / "last.ckpt")["step"] < 80
    if signum == signal.SIGUSR1:
        assert (tmp_path / "asked").read_text() == "requeue 77\n"
        done = start_aavae(*DIGITS, "--out", out, env=env | {"SLURM_RESTART_COUNT": "1"}).finish()
    else:
        done = start_aavae(*DIGITS, "--out", out, "--resume", "true").finish()
    assert done.returncode == 0, done.stderr
    assert_same_run(whole, out)


SLOW_STEPS = """
import sys, time
import aavae.model
from aavae.cli import main
usual = aavae.model.AAVAE.training_step
def training_step(*arguments):
    print("step", flush=True)
    for _ in range(600): time.sleep(0.1)
    return usual(*arguments)
aavae.model.AAVAE.training_step = training_step
sys.exit(main(sys.argv[1:]))
"""


def test_second_ctrl_c_leaves_at_once(start_aavae, tmp_path):
    "The second Ctrl-C, in the middle of a long step, exits with 130 and without saving."
    process = start_aavae(*DIGITS, "--out", tmp_path / "run", code=SLOW_STEPS)
    wait_for(lambda: process.out.exists() and "step\n" in process.out.read_text(), process)
    for _ in range(2):
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
    done = process.finish(30)
    assert done.returncode == 130 and "without saving" in done.stderr and "Traceback" not in done.stderr, done.stderr


# A process that fills the disk, whose folder is its first argument, just before it writes rows of metrics
FILLS_DISK = """
import os, sys
import aavae.metrics
from aavae.cli import main
usual, disk = aavae.metrics.Metrics.write, sys.argv[1]
def write(self, rows):
    if not rows: return
    with open(f"{disk}/ballast", "wb", buffering=0) as f:
        try:
            while True: f.write(bytes(1 << 16))
        except OSError: pass
    with open(self.path, "ab") as f: f.write(b"\\n" * (-self.path.stat().st_size % 4096))
    usual(self, rows)
aavae.metrics.Metrics.write = write
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize("fills", ["last.ckpt", "metrics.csv"])
def test_a_full_disk_keeps_what_was_saved(quick_aavae, tmp_path, fills):
    """A disk that fills while the checkpoint or the metrics are written: one line, exit 2, the previous checkpoint
    whole, and the run goes on once there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        out = disk / "run"
        line = [*DIGITS[:-4], "--out", str(out)]  # without the average: half the size
        assert quick_aavae(*line, "--train.max_time", "00:00:00").returncode == 0
        before = (out / "checkpoints" / "last.ckpt").read_bytes()
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        room = (
            len(before) + 400_000 if fills == "metrics.csv" else len(before) // 2
        )  # the encoder and its predecessor need some too
        if fills == "last.ckpt":
            with open(disk / "ballast", "wb") as f:
                f.write(bytes(free - room))
            done = quick_aavae(*line, "--resume", "true", "--train.max_time", "01:00:00")
            assert (
                done.returncode == 2
                and "cannot be written (No space left on device)" in done.stderr
                and "intact" in done.stderr
            ), done.stderr
        else:
            filling = [disk, *line, "--resume", "true", "--train.max_time", "01:00:00"]
            done = quick_aavae(*filling, code=FILLS_DISK)
            assert done.returncode == 2 and "metrics.csv cannot be written (No space left on device)" in done.stderr, (
                done.stderr
            )
        assert "Traceback" not in done.stderr
        if fills == "last.ckpt":
            assert (out / "checkpoints" / "last.ckpt").read_bytes() == before
        else:
            assert (
                load_checkpoint(out / "checkpoints" / "last.ckpt")["step"] == 7
            )  # saved before the row that no longer fitted
        (disk / "ballast").unlink()
        done = quick_aavae(*line, "--resume", "true", "--train.max_epochs", "2", "--train.max_time", "01:00:00")
        assert done.returncode == 0 and Run.load(out).facts["step"] == 40, done.stderr
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_out_of_memory_is_one_line(quick_aavae, tmp_path):
    "An allocation that the system refuses: one line with a batch that would fit, exit 1."
    large = flags(
        preset="digits",
        data__image_size=128,
        model__width=1,
        model__maxpool="false",
        train__batch_size=96,
        train__precision=32,
        train__accelerator="cpu",
    )
    done = quick_aavae("pretrain", *large, "--out", tmp_path / "run", memory=8 * 2**30)
    assert (
        done.returncode == 1
        and "out of memory at train.batch_size 96; use --train.batch_size" in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr


LONG = """
import resource, sys, time
from aavae import preset, pretrain
import aavae.train as train
steps, usual = [], train.wishes
def rss(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def wishes(t, keeper, step):
    steps.append((time.process_time(), rss()))
    return usual(t, keeper, step)
train.wishes = wishes
config = preset("digits", data__val_size=1373, model__width=0.125, model__latent_dim=8, train__batch_size=16,
                train__max_epochs=1000, train__warmup_epochs=1, train__knn_every_n_epochs=0,
                train__accelerator="cpu", train__precision="32", train__keep_at_epochs=[500])
pretrain(config, sys.argv[1], show_progress=False)
import json
print(json.dumps(steps))
"""


@pytest.mark.slow
def test_a_thousand_epochs_stay_flat(tmp_path):
    "1,000 epochs of a toy set: memory within 2% and the CPU time of a step within 10%, last decile against first."
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LONG, str(tmp_path / "run")], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout.splitlines()[-1])
    n = len(steps) // 10

    def decile(i):
        part = steps[i * n : (i + 1) * n]
        times = sorted(b[0] - a[0] for a, b in zip(part[:-1], part[1:], strict=True))
        return times[len(times) // 10], max(m for _, m in part)  # near the minimum: others use the machine too

    (t0, m0), (t1, m1) = decile(0), decile(9)
    print(
        f"{len(steps)} steps; CPU time of a step {1000 * t0:.2f} -> {1000 * t1:.2f} ms; "
        f"resident memory {m0 / 2**20:.1f} -> {m1 / 2**20:.1f} MiB"
    )
    assert abs(m1 / m0 - 1) < 0.02 and abs(t1 / t0 - 1) < 0.1
