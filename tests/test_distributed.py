"Two real processes: the same gradients as one, one writer, one message when a rank dies or a signal comes."

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from conftest import wait_for

from aavae import Failed, Run, preset, pretrain
from aavae.errors import InputError

TWO = [
    "pretrain",
    "--train.accelerator",
    "cpu",
    "--train.devices",
    "2",
    "--model.width",
    "0.125",
    "--train.precision",
    "32",
    "--train.warmup_epochs",
    "1",
    "--train.knn_every_n_epochs",
    "2",
]

# What one rank does in the comparison: the training loop in float64, with BatchNorm frozen, keeping gradients and
# weights of each step
SCRIPT = """
import json
import sys
import torch
import aavae.train as train
from aavae import preset, pretrain
build, ranks, accumulate, out, kept = train.build_method, int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], []
changes = json.loads(sys.argv[4])
def frozen(*args):
    model = build(*args).double()
    for m in model.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm): m.train = lambda mode=True, m=m: m; m.training = False
    return model
class Kept(train.Step):
    def update(self):
        parameters = list(self.method.parameters())
        gradients = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        kept.append([gradients, torch.cat([p.detach().flatten() for p in parameters])])
        super().update()
train.build_method, train.Step = frozen, Kept
config = preset("digits", model__width=0.125, train__batch_size=32, train__lr=1e-3, train__warmup_epochs=0,
                train__max_steps=20, train__precision="32", train__accelerator="cpu", train__devices=ranks,
                train__accumulate=accumulate, train__knn_every_n_epochs=0, **changes)
run = pretrain(config, out, show_progress=False)
torch.save(kept, f"{out}-{train.os.environ.get('RANK', 0)}.pt")
"""


@pytest.fixture(scope="module")
def run_script(quick_aavae):
    """run_script(out, ranks, accumulate, **changes): gradients and weights of the 20 steps, with `changes` of the
    configuration; two ranks by torchrun."""

    def run(out: Path, ranks: int, accumulate: int = 1, **changes) -> list:
        script = out.parent / "script.py"
        script.write_text(SCRIPT)
        arguments = [ranks, accumulate, out, json.dumps(changes)]
        if ranks > 1:
            done = quick_aavae(*torchrun_options(ranks), script, *arguments, code=TORCHRUN)
        else:
            done = quick_aavae(*arguments, code=SCRIPT)
        assert done.returncode == 0, done.stderr
        return [torch.load(f"{out}-{rank}.pt") for rank in range(ranks)]

    return run


TORCHRUN = "from torch.distributed.run import main; main()"


def torchrun_options(ranks: int) -> list:
    return ["--nproc_per_node", ranks, "--master_port", free_port()]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_ranks_are_one(run_script, tmp_path):
    """In float64 with BatchNorm frozen, 20 steps: gradients and weights of two ranks, and of two micro-batches,
    are those of one process within 1e-9, and so are the metrics."""
    (one,), two, (micro,) = (
        run_script(tmp_path / "one", 1),
        run_script(tmp_path / "two", 2),
        run_script(tmp_path / "micro", 1, 2),
    )
    assert len(one) == 20 and (one[-1][1] - one[0][1]).norm() > 1e-3 * one[0][1].norm()  # it has moved
    worst = 0.0
    for other in (*two, micro):
        for a, b in zip(sum(one, []), sum(other, []), strict=True):
            worst = max(worst, ((a - b).norm() / a.norm()).item())
    print(f"largest relative difference {worst:.1e}")
    assert worst < 1e-9
    metrics = [Run.load(tmp_path / name).metrics() for name in ("one", "two", "micro")]
    for other in metrics[1:]:
        assert other["step"] == metrics[0]["step"] and other["views_seen"] == metrics[0]["views_seen"]
        assert other["loss"] == pytest.approx(metrics[0]["loss"], rel=1e-7)


def test_two_ranks_have_one_target(run_script, tmp_path):
    "The same of features as target, with a second stage whose target is the encoder: each rank makes it for itself."
    target = {"objective__name": "aaae", "objective__target": "patches", "objective__patch_size": 4}
    changes = target | {"model__decoder": "mlp", "objective__components": 32, "objective__stages": 2}
    (one,), two = (run_script(tmp_path / name, ranks, **changes) for name, ranks in (("one", 1), ("two", 2)))
    for other in two:
        for a, b in zip(sum(one, []), sum(other, []), strict=True):
            assert (a - b).norm() < 1e-9 * a.norm()


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_started_by_aavae(start_aavae, tmp_path):
    """aavae starts its ranks: Ctrl-C saves on all at the same step, one line; resumed by two, finished; resumed by
    one: exact in its order. Nothing is said twice."""
    out, line = (
        tmp_path / "run",
        [*TWO, "--train.max_epochs", "3", "--train.save_every_n_steps", "5", "--out", str(tmp_path / "run")],
    )
    process = start_aavae(*line)
    wait_for((out / "checkpoints" / "last.ckpt").exists, process)
    process.send_signal(signal.SIGINT)
    stopped = process.finish(60)
    err = stopped.stderr
    assert (
        stopped.returncode == 130
        and err.count("continue with --resume true") == 1
        and err.count("stopping after this step") == 1
        and "Traceback" not in err
    ), err
    step = Run.load(out).facts["step"]
    assert 0 < step < 60
    assert start_aavae(*line).finish().returncode == 2  # it is there
    done = start_aavae(*line, "--resume", "true").finish()
    assert done.returncode == 0 and done.stdout.count("3 epochs") == 1, done.stderr
    m = Run.load(out).metrics()
    assert m["step"] == [1, *range(10, 61, 10)]
    assert [s for s, k in zip(m["step"], m["knn_top1"], strict=True) if k is not None] == [40, 60]
    done = start_aavae(*line, "--resume", "true", "--train.devices", "1", "--train.max_epochs", "4").finish()
    assert (
        done.returncode == 0 and done.stderr.count("note: the run was saved with 2 processes and goes on with 1") == 1
    ), done.stderr
    assert Run.load(out).facts["step"] == 80


@pytest.mark.parametrize("launcher", ["aavae", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_job(start_aavae, tmp_path, launcher):
    "kill -9 of rank 1: the job ends within 60 s with a message, and leaves no process behind."
    out = tmp_path / "run"
    line = [*TWO, "--train.max_epochs", "2000", "--train.save_every_n_steps", "5", "--out", out]
    if launcher == "aavae":
        process = start_aavae(*line)
    else:
        script = tmp_path / "main.py"
        script.write_text("import sys; from aavae.cli import main; sys.exit(main())")
        process = start_aavae(*torchrun_options(2), script, *line, code=TORCHRUN)
    wait_for((out / "checkpoints" / "last.ckpt").exists, process)
    ranks = children(process.pid)
    env = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in ranks}
    os.kill(next(pid for pid in ranks if b"LOCAL_RANK=1" in env[pid]), signal.SIGKILL)
    killed = time.time()
    ended = process.finish(60)
    err = ended.stderr
    assert ended.returncode == 1 and time.time() - killed < 60
    if launcher == "aavae":
        assert (
            "rank 1 of the run died (exit -9" in err or "a process of this run is gone" in err
        ) and "Traceback" not in err, err
    else:
        assert "Signal 9" in err or "exitcode  : -9" in err or "a process of this run is gone" in err, err
    assert not [
        pid
        for pid in ranks
        if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    ]


def test_errors_of_ranks_are_raised_once(tmp_path):
    """From Python: what the ranks raise is raised here, as what it is; a batch that does not divide and too many
    machines are refused before anything starts."""
    small = dict(model__width=0.125, train__accelerator="cpu", train__devices=2, train__max_epochs=2)
    with pytest.raises(Failed, match="lower --train.lr"):
        pretrain(
            preset("digits", **small, train__lr=1e30, train__warmup_epochs=0), tmp_path / "wild", show_progress=False
        )
    with pytest.raises(InputError, match="larger than the 1294"):
        pretrain(preset("digits", **small, train__batch_size=5000), tmp_path / "large", show_progress=False)
    with pytest.raises(InputError, match="does not split into 2 equal parts"):
        preset("digits", **small, train__batch_size=63)
    with pytest.raises(InputError, match="torchrun or SLURM"):
        pretrain(preset("digits", **small, train__nodes=2), tmp_path / "none")
