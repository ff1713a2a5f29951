"A study that is killed, started again, and spread over processes."

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
from conftest import wait_for

FLAGS = [
    "--preset",
    "digits",
    "--max_views",
    "1920",
    "--only",
    "[aavae, beta0.1, beta1]",
    "--train.knn_every_n_epochs",
    "0",
    "--train.save_every_n_steps",
    "5",
    "--train.accelerator",
    "cpu",
]


def values(out: Path) -> dict:
    "Every value of a study by what it is."
    return {
        (
            p.parent.name,
            r["task"],
            r["metric"],
            r["untrained"],
            r["pretrain"]["views_seen"],
            str(r["eval"]["hyperparameters"]),
        ): r["value"]
        for p in sorted((out / "runs").glob("*/results.json"))
        for r in json.loads(p.read_text())
    }


@pytest.fixture(scope="module")
def whole(quick_aavae, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "whole"
    done = quick_aavae("study", "beta", *FLAGS, "--out", out, timeout=400)
    assert done.returncode == 0, done.stderr
    return out


def test_table_and_figure(whole):
    table = (whole / "beta.md").read_text()
    assert all(name in table for name in ("untrained", "aavae", "beta0.1", "beta1", "1,920", "active dimensions"))
    assert (whole / "beta.html").stat().st_size > 10**6


def test_text_in_a_terminal(whole, quick_aavae):
    "A finished study, asked for again, prints aligned text and no Markdown."
    again = quick_aavae("study", "beta", *FLAGS, "--out", whole, timeout=200)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith("Study beta\n\ntrained on") and "| ---" not in again.stdout


def test_killed_anywhere(whole, start_aavae, tmp_path):
    """Killed three times at different moments, a study ends with the values of one that was not.

    No finished run is made again."""
    out = tmp_path / "killed"
    command = ["study", "beta", *FLAGS, "--out", out]
    runs = ["aavae-seed0", "beta0.1-seed0", "beta1-seed0"]
    moments = [
        lambda: (out / "runs" / runs[0] / "checkpoints" / "last.ckpt").exists(),  # in the first run
        lambda: (
            "linear" in str(json.loads((out / "runs" / runs[1] / "study.json").read_text()))
        ),  # between measurements of the second
        lambda: (out / "runs" / runs[2] / "encoder.safetensors").exists(),
    ]  # in the third

    def is_there(moment) -> bool:
        try:
            return moment()
        except (OSError, ValueError):
            return False

    for moment in moments:
        process = start_aavae(*command, new_session=True)
        wait_for(partial(is_there, moment), process, 300)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.finish()
    finished = {p: p.stat().st_mtime_ns for r in runs[:2] for p in (out / "runs" / r).glob("*.safetensors")}
    last = start_aavae(*command).finish(400)
    assert last.returncode == 0, last.stderr
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    assert values(out) == values(whole)


def test_ctrl_c(start_aavae, tmp_path):
    "SIGTERM in the middle of a run: saved, exit 143, and the study says where it is."
    out = tmp_path / "stopped"
    command = ["study", "beta", *(f if f != "1920" else "640000" for f in FLAGS), "--out", out]
    process = start_aavae(*command)
    wait_for((out / "runs" / "aavae-seed0" / "checkpoints" / "last.ckpt").exists, process, 200)
    process.send_signal(signal.SIGTERM)
    stopped = process.finish(60)
    assert stopped.returncode == 143
    assert "Traceback" not in stopped.stderr
    shown = start_aavae(*command, "--dry_run", "true").finish()
    assert shown.returncode == 0 and "at epoch" in shown.stdout and shown.stdout.count("to do") == 2, shown.stdout


def test_spread(whole, quick_aavae, tmp_path):
    "Two processes side by side, through submitit, end with the same values."
    pytest.importorskip("submitit")
    out = tmp_path / "spread"
    done = quick_aavae("study", "beta", *FLAGS, "--out", out, "--executor", "local", "--jobs", "2", timeout=500)
    assert done.returncode == 0, done.stderr
    assert values(out) == values(whole)


BLOCKS = {
    "density and accuracy": ["density", "--only", "[aavae]", "--max_minutes", "0.05"],
    "cosines": ["similarity", "--only", "[aavae]", "--max_minutes", "0.05"],
    "six objectives": ["table1", "--train.max_epochs", "2"],
    "three seeds": [
        "table1",
        "--only",
        "[aavae, vae-beta0.1]",
        "--seeds",
        "[0, 1]",
        "--model.encoder",
        "resnet18",
        "--model.decoder",
        "resnet18",
        "--train.max_epochs",
        "1",
    ],
    "large batch": [
        "table1",
        "--only",
        "[aavae]",
        "--train.batch_size",
        "64",
        "--train.lr",
        "1e-3",
        "--train.schedule",
        "cosine",
        "--train.max_epochs",
        "2",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_for_a_gpu(quick_aavae, cifar, tmp_path, name):
    "The commands of the tutorial `reproduce` for a GPU, with the paper's scale and small networks and budgets."
    command = BLOCKS[name]
    small = {
        "--data.name": "folder",
        "--data.root": cifar,
        "--data.val_size": 40,
        "--model.encoder": "resnet18",
        "--model.decoder": "resnet18",
        "--model.width": 0.125,
        "--train.batch_size": 64,
        "--train.warmup_epochs": 1,
        "--train.knn_every_n_epochs": 0,
        "--samples": 4,
        "--images": 8,
        "--out": tmp_path / "gpu",
        "--train.accelerator": "cpu",
    }
    given = [str(v) for k, value in small.items() if k not in command for v in (k, value)]
    done = quick_aavae(
        "study", command[0], "--preset", "cifar10", "--scale", "paper", *given, *command[1:], timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "gpu" / f"{command[0]}.md").exists()
