"""Detection through the command line, on a few photographs of BCCD: train, be killed, go on, and say what is wrong
with a folder."""

import json
import os
import shutil
import signal

import pytest
from conftest import flags, wait_for

from aavae import Run
from aavae.files import load_checkpoint

PRETRAIN = flags(preset="digits", train__max_steps=2, train__knn_every_n_epochs=0, train__accelerator="cpu")
SMALL = flags(max_steps=30, batch_size=2, image_size=96, warmup_steps=2, save_every_n_steps=2, data__workers=0)


@pytest.fixture(scope="module")
def bccd(test_data, tmp_path_factory):
    "Eight photographs of BCCD to train on and three to test on."
    source, small = test_data("bccd-voc"), tmp_path_factory.mktemp("voc") / "bccd-voc"
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (small / part).mkdir(parents=True)
    for split, n in (("trainval", 8), ("test", 3)):
        names = (source / "ImageSets" / "Main" / f"{split}.txt").read_text().split()[:n]
        (small / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            shutil.copy(source / "JPEGImages" / f"{name}.jpg", small / "JPEGImages")
            shutil.copy(source / "Annotations" / f"{name}.xml", small / "Annotations")
    return small


@pytest.fixture(scope="module")
def pretrained(quick_aavae, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    done = quick_aavae("pretrain", *PRETRAIN, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def whole(quick_aavae, bccd, pretrained, tmp_path_factory):
    "A detector that nothing disturbed."
    out = shutil.copytree(pretrained, tmp_path_factory.mktemp("whole") / "run")
    done = quick_aavae("detect", out, "--data.root", bccd, *SMALL)
    assert done.returncode == 0, done.stderr
    assert "WBC: AP" in done.stdout and "ap50" in done.stdout
    return out


def test_records_and_files(whole):
    "AP, AP50 and AP75 with the class APs, the predictions of each test image, and the drawing."
    records = {r["metric"]: r for r in Run.load(whole).records()}
    assert {"ap", "ap50", "ap75"} <= set(records)
    r = records["ap50"]
    assert (
        r["task"],
        r["eval"]["dataset"],
        r["eval"]["n"],
        r["eval"]["hyperparameters"]["iterations"],
        r["eval"]["hyperparameters"]["seed"],
    ) == ("detect", "bccd-voc", 3, 30, 0)
    assert set(r["details"]["per_class"]) >= {"RBC", "WBC"} and 0 <= r["value"] <= 1
    folder = whole / "detect" / "bccd-voc"
    saved = json.loads((folder / "predictions.json").read_text())
    assert len(saved["images"]) == 3 and saved["images"][0]["true"]
    assert (folder / "predictions.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_stopped_and_resumed_is_the_same(start_aavae, bccd, pretrained, whole, tmp_path, signum, code):
    "A detector stopped by a signal and resumed ends in the same weights, losses, predictions and figures."
    out = shutil.copytree(pretrained, tmp_path / "run")
    line, folder = ["detect", str(out), "--data.root", str(bccd), *SMALL], out / "detect" / "bccd-voc"
    process = start_aavae(*line)
    wait_for((folder / "last.ckpt").exists, process)
    process.send_signal(signum)
    stopped = process.finish()
    assert stopped.returncode == code, stopped.stderr
    if code > 0:
        assert "continue with --resume true" in stopped.stderr and "Traceback" not in stopped.stderr
    assert 0 < load_checkpoint(folder / "last.ckpt")["step"] < 30
    done = start_aavae(*line, "--resume", "true").finish()
    assert done.returncode == 0, done.stderr
    other = whole / "detect" / "bccd-voc"
    for name in ("metrics.csv", "predictions.json", "predictions.png"):
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert [r["value"] for r in Run.load(out).records()] == [r["value"] for r in Run.load(whole).records()]


def test_two_processes(start_aavae, bccd, pretrained, tmp_path):
    """Two processes train one detector, stop together at Ctrl-C and go on; the predictions that they share are
    those that one process makes with the same weights, and they are told once."""
    out, env = shutil.copytree(pretrained, tmp_path / "run"), os.environ | {"OMP_NUM_THREADS": "1"}
    line, folder = ["detect", str(out), "--data.root", str(bccd), *SMALL], out / "detect" / "bccd-voc"
    process = start_aavae(*line, "--devices", "2", env=env)
    wait_for((folder / "last.ckpt").exists, process)
    process.send_signal(signal.SIGINT)
    stopped = process.finish()
    err = stopped.stderr
    assert stopped.returncode == 130 and err.count("continue with --resume true") == 1 and "Traceback" not in err, err
    assert 0 < load_checkpoint(folder / "last.ckpt")["step"] < 30
    told = []
    for devices in ("2", "1"):
        done = start_aavae(*line, "--resume", "true", "--devices", devices, env=env).finish()
        assert done.returncode == 0 and done.stdout.count("WBC: AP") == 1, done.stderr
        told.append(
            (
                load_checkpoint(folder / "last.ckpt")["step"],
                done.stdout,
                (folder / "predictions.json").read_bytes(),
                [r["value"] for r in Run.load(out).records()],
            )
        )
    assert told[0] == told[1] and told[0][0] == 30


def first(p):
    return next(iter(sorted((p / "Annotations").iterdir())))


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


def append(path, text):
    path.write_text(path.read_text() + text)


BAD = {
    "an annotation cut short": (lambda p: first(p).write_text(first(p).read_text()[:200]), ".xml, line"),
    "a box without numbers": (lambda p: edit(first(p), "<xmin>", "<xmin>a"), "<xmin> is 'a"),
    "a size of another image": (lambda p: edit(first(p), "<width>640", "<width>64"), "<size> is 64x480"),
    "an annotation that is gone": (lambda p: first(p).unlink(), "is not there"),
    "an image that is not there": (
        lambda p: append(p / "ImageSets/Main/trainval.txt", "ghost\n"),
        "trainval.txt, line 9, names 'ghost'",
    ),
    "a class that training has not": (
        lambda p: [
            edit(p / f"Annotations/{n}.xml", "<name>WBC", "<name>cat")
            for n in (p / "ImageSets/Main/test.txt").read_text().split()
        ],
        "is of class 'cat'",
    ),
    "a file that is no image": (
        lambda p: next((p / "JPEGImages").iterdir()).write_bytes(b"hello"),
        "is not a readable image",
    ),
    "an image that was cut short": (
        lambda p: [f.write_bytes(f.read_bytes()[:5000]) for f in (p / "JPEGImages").iterdir()],
        "is not a readable image",
    ),
    "no lists": (lambda p: shutil.rmtree(p / "ImageSets"), "has no ImageSets/Main/"),
    "no folder": (lambda p: shutil.rmtree(p), "is not a folder"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_folders(quick_aavae, bccd, pretrained, tmp_path, what):
    "A damaged folder ends in exit code 2 and one line that names the file."
    p, run = shutil.copytree(bccd, tmp_path / "voc"), shutil.copytree(pretrained, tmp_path / "run")
    damage, says = BAD[what]
    damage(p)
    done = quick_aavae("detect", run, "--data.root", p, *SMALL)
    lines = [line for line in done.stderr.splitlines() if line.startswith("aavae: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert lines[0].startswith("aavae: error: ") and says in lines[0] and "; " in lines[0], lines[0]
    assert not (run / "results.json").exists()


def test_repairs_are_told(quick_aavae, bccd, pretrained, tmp_path):
    "Boxes beyond the image are clipped, those without an area left out; both are counted on stderr and in the record."
    p, run = shutil.copytree(bccd, tmp_path / "voc"), shutil.copytree(pretrained, tmp_path / "run")
    path = first(p)
    corners = "<xmin>{}</xmin><ymin>10</ymin><xmax>{}</xmax><ymax>60</ymax>"
    box = f"<object><name>RBC</name><bndbox>{corners}</bndbox></object></annotation>"
    edit(path, "</annotation>", box.format(600, 700))
    edit(path, "</annotation>", box.format(50, 50))
    before = quick_aavae("detect", run, "--data.root", bccd, *SMALL, "--max_steps", "1").stderr
    done = quick_aavae("detect", run, "--data.root", p, *SMALL, "--max_steps", "1", "--overwrite", "true")
    assert done.returncode == 0, done.stderr
    assert (
        "clipped" not in before
        and "1 boxes clipped to their image" in done.stderr
        and "1 boxes without an area left out" in done.stderr
    )
    assert Run.load(run).records()[-1]["details"]["repairs"] == {
        "boxes clipped to their image": 1,
        "boxes without an area left out": 1,
    }
