"A study that is killed, started again, and spread over processes."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def test_killed_anywhere(whole, quick_aavae, tmp_path):
    """Killed three times at different moments, a study ends with the values of one that was not.

    No finished run is made again."""
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-c",
        "import sys, torch; torch.set_num_threads(1); from aavae.cli import main; sys.exit(main())",
        "study",
        "beta",
        *FLAGS,
        "--out",
        str(out),
    ]
    runs = ["aavae-seed0", "beta0.1-seed0", "beta1-seed0"]
    moments = [
        lambda: (out / "runs" / runs[0] / "checkpoints" / "last.ckpt").exists(),  # in the first run
        lambda: (
            "linear" in str(json.loads((out / "runs" / runs[1] / "study.json").read_text()))
        ),  # between measurements of the second
        lambda: (out / "runs" / runs[2] / "encoder.safetensors").exists(),
    ]  # in the third
    for moment in moments:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        until = time.time() + 300
        while process.poll() is None and time.time() < until:
            try:
                if moment():
                    break
            except (OSError, ValueError):
                pass
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finished = {p: p.stat().st_mtime_ns for r in runs[:2] for p in (out / "runs" / r).glob("*.safetensors")}
    last = quick_aavae("study", "beta", *FLAGS, "--out", out, timeout=400)
    assert last.returncode == 0, last.stderr
    assert {p: p.stat().st_mtime_ns for p in finished} == finished
    assert values(out) == values(whole)


def test_ctrl_c(quick_aavae, tmp_path):
    "SIGTERM in the middle of a run: saved, exit 143, and the study says where it is."
    out = tmp_path / "stopped"
    flags = [f if f != "1920" else "640000" for f in FLAGS]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from aavae.cli import main; sys.exit(main())",
            "study",
            "beta",
            *flags,
            "--out",
            str(out),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.time() + 200
    while (
        not (out / "runs" / "aavae-seed0" / "checkpoints" / "last.ckpt").exists()
        and process.poll() is None
        and time.time() < until
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert "Traceback" not in process.stderr.read()
    shown = quick_aavae("study", "beta", *flags, "--out", out, "--dry_run", "true")
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
