"Evaluations end to end: a run that can only be read, records in a file of their own, flags that stand alone."

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from aavae import preset, pretrain


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of two epochs on the digits, with a milestone."
    out = tmp_path_factory.mktemp("runs") / "run"
    config = preset("digits", train__max_epochs=2, train__keep_at_epochs=[1], train__knn_every_n_epochs=0)
    pretrain(config, out, show_progress=False)
    return out


@contextmanager
def read_only(folder: Path, copy: Path):
    "A copy of a folder that cannot be written: by its permissions, for root by a mount."
    shutil.copytree(folder, copy)
    if os.geteuid():
        folders = [copy, *(p for p in copy.rglob("*") if p.is_dir())]
        for p in folders:
            p.chmod(0o555)
        yield copy
        for p in folders:
            p.chmod(0o755)
        return
    mount = ["mount", "--bind", copy, copy]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("root needs the right to mount")
    subprocess.run(["mount", "-o", "remount,bind,ro", copy], check=True)
    try:
        yield copy
    finally:
        subprocess.run(["umount", copy], check=True)


def test_a_run_that_can_only_be_read(quick_aavae, run, tmp_path):
    "The result is printed, with a note before the work; --out keeps the records."
    with read_only(run, tmp_path / "kept") as there:
        for line in (["knn", there], ["semi", there, "--fraction", "0.1", "--max_steps", "2"]):
            done = quick_aavae("evaluate", *line)
            assert done.returncode == 0, done.stderr
            assert "cannot be written, so the records are shown and not kept" in done.stderr
            assert "top1" in done.stdout
        done = quick_aavae("evaluate", "knn", there, "--out", tmp_path / "new" / "mine.json")
        assert done.returncode == 0, done.stderr
        assert "cannot be written, so" not in done.stderr
    assert [r["task"] for r in json.loads((tmp_path / "new" / "mine.json").read_text())] == ["knn", "knn"]
    assert not (tmp_path / "kept" / "results.json").exists()


def test_flags_that_stand_alone(quick_aavae, run, tmp_path):
    "A boolean flag alone means true, before the run, after it, and for fields of the configuration."
    copy = shutil.copytree(run, tmp_path / "run")
    for line in (["--untrained", copy], [copy, "--untrained"], [copy, "--untrained", "false"]):
        assert quick_aavae("evaluate", "knn", *line).returncode == 0
    records = json.loads((copy / "results.json").read_text())
    assert sorted(r["untrained"] for r in records) == [False, False, True, True]
    done = quick_aavae("pretrain", "--out", copy, "--resume")
    assert done.returncode == 0, done.stderr
    assert "2 epochs" in done.stdout
    done = quick_aavae("pretrain", "--train.max_steps", "1", "--model.maxpool", "--out", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    assert "maxpool: true" in (tmp_path / "new" / "config.yaml").read_text()


def test_results_show_the_end_of_each_run(quick_aavae, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for line in ([copy], [copy, "--epoch", "1"]):
        assert quick_aavae("evaluate", "knn", *line).returncode == 0
    ends, everything = quick_aavae("results", tmp_path), quick_aavae("results", tmp_path, "--all")
    assert (ends.stdout.count("kNN"), everything.stdout.count("kNN")) == (2, 4)
    assert "2 records of milestones are left out; --all shows them" in ends.stderr


def test_other_bitmaps_of_the_same_size(quick_aavae, run, tmp_path):
    "Images that are overwritten with others have other features."
    from PIL import Image

    def write(shift: int):
        for i in range(24):
            label = i % 2
            folder = tmp_path / "photos" / ("train" if i < 16 else "test") / "ab"[label]
            folder.mkdir(parents=True, exist_ok=True)
            grey = 40 + 120 * label if not shift else (i * 37) % 200
            Image.new("RGB", (16, 16), (grey, grey, 90)).save(folder / f"{i:02}.bmp")

    copy, values = shutil.copytree(run, tmp_path / "run"), []
    data = ["--data.name", "folder", "--data.root", tmp_path / "photos", "--data.resident", "false"]
    for shift in (0, 1):
        write(shift)
        done = quick_aavae("evaluate", "knn", copy, *data, "--ks", "[3]")
        assert done.returncode == 0, done.stderr
        values.append(float(re.findall(r"(\d+\.\d\d)$", done.stdout, re.M)[0]))
    assert values[0] == 100 > values[1], values


def test_the_package_as_a_module():
    "`python -m aavae` and `python -m aavae.cli` are the command."
    for name in ("aavae", "aavae.cli"):
        done = subprocess.run([sys.executable, "-m", name, "--version"], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout.strip()[:1]) == (0, "0"), done.stderr
