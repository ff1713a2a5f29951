"The main job through the command line, on real images: pretrain, stop, go on, evaluate."

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL_NETWORKS, flags
from torch._subclasses.fake_tensor import FakeTensorMode

from aavae import Run
from aavae.augment import ViewsConfig
from aavae.loss import ObjectiveConfig
from aavae.model import ModelConfig, build_model

SMALL = flags(
    preset="cifar10",
    data__name="folder",
    data__val_size=40,
    **SMALL_NETWORKS,
    model__maxpool="true",
    train__batch_size=32,
    train__warmup_epochs=1,
    train__max_epochs=8,
    train__knn_every_n_epochs=4,
    train__accelerator="cpu",
)


@pytest.fixture(scope="module")
def whole(quick_aavae, cifar, tmp_path_factory):
    "A run that nothing disturbed."
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = quick_aavae("pretrain", *SMALL, "--data.root", cifar, "--out", out)
    assert done.returncode == 0, done.stderr
    return Run.load(out)


def test_evaluations_store_records(quick_aavae, whole):
    "Linear and kNN accuracy on the test split, with views seen and the label that says JPEG."
    for task in ("linear", "knn"):
        for untrained in ("false", "true"):
            done = quick_aavae("evaluate", task, whole.path, "--untrained", untrained)
            assert done.returncode == 0, done.stderr
    records = json.loads((whole.path / "results.json").read_text())
    assert [(r["task"], r["metric"], r["untrained"]) for r in records] == [
        ("linear", m, u) for u in (False, True) for m in ("top1", "top5")
    ] + [("knn", "top1", False)] * 2 + [("knn", "top1", True)] * 2
    for r in records:
        assert (
            r["eval"]["label"] == r["pretrain"]["label"] == "CIFAR-10 (JPEG q75)"
            and r["eval"]["split"] == "test"
            and r["eval"]["n"] == 100
        )
        assert r["pretrain"]["views_seen"] == (0 if r["untrained"] else 8 * 15 * 32)
        assert 0 <= r["value"] <= 1 and len(r["provenance"]["config_sha256"]) == 64
    table = quick_aavae("results", whole.path.parent, "--format", "csv").stdout.splitlines()
    assert len(table) == 1 + 6  # top-1 and top-5 share a row


def test_other_data(quick_aavae, whole, test_data):
    "Another data set, without a test split: the record says that the validation split was measured."
    done = quick_aavae(
        "evaluate",
        "knn",
        whole.path,
        "--data.name",
        "folder",
        "--data.root",
        test_data("tiny-imagenet-scenes"),
        "--ks",
        "[20]",
    )
    assert done.returncode == 0, done.stderr
    record = whole.records()[-1]
    assert (record["eval"]["split"], record["eval"]["n"], record["eval"]["dataset"]) == (
        "val",
        1000,
        "tiny-imagenet-scenes",
    )


def test_finished_run_is_left_alone(quick_aavae, cifar, whole):
    before = whole.checkpoint.stat().st_mtime_ns
    assert quick_aavae("pretrain", *SMALL, "--data.root", cifar, "--out", whole.path).returncode == 2
    assert (
        quick_aavae("pretrain", *SMALL, "--data.root", cifar, "--out", whole.path, "--resume", "true").returncode == 0
    )
    assert whole.checkpoint.stat().st_mtime_ns == before


def test_other_images_are_noticed(quick_aavae, cifar, whole, tmp_path):
    "Resuming on a folder whose images differ is refused."
    out, other = tmp_path / "run", tmp_path / "cifar10-jpeg"
    shutil.copytree(whole.path, out)
    shutil.copytree(cifar, other)
    next((other / "train").rglob("*.jpg")).unlink()
    done = quick_aavae(
        "pretrain", *SMALL, "--data.root", other, "--out", out, "--resume", "true", "--train.max_epochs", "9"
    )
    assert done.returncode == 2 and "are not those" in done.stderr


def test_a_pickle_never_runs(quick_aavae, cifar, whole, tmp_path):
    "A last.ckpt that is a pickle with code in it is refused with one line, and the code does not run."

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "it ran",)

    shutil.copytree(whole.path, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "last.ckpt").write_bytes(pickle.dumps(Bomb()))
    done = quick_aavae("pretrain", "--out", tmp_path / "run", "--resume", "true", "--train.max_epochs", "9")
    assert done.returncode == 2 and "is not a checkpoint of aavae" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "it ran").exists()


def test_divergence_is_a_message(quick_aavae, tmp_path):
    "A loss that becomes NaN ends in one line and exit code 1, and no checkpoint holds it."
    done = quick_aavae(
        "pretrain",
        "--out",
        tmp_path / "run",
        "--train.lr",
        "1e30",
        "--train.warmup_epochs",
        "0",
        "--train.max_epochs",
        "2",
    )
    assert done.returncode == 1 and "lower --train.lr" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_a_gpu_compiles_the_whole_step():
    "`torch.compile` finds nothing in the step on CUDA that it cannot put into one graph. The tensors have no memory."
    images = torch.empty(16, 3, 32, 32, dtype=torch.uint8)
    small = ModelConfig(encoder="resnet18", decoder="resnet18", width=0.125)
    views = ViewsConfig(jitter=1.0, blur_p=0.5)
    method = build_model(small, ObjectiveConfig(), views, 32, [0.5] * 3, [0.25] * 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        method.to("cuda")
        batch = (images.to("cuda"), torch.arange(16, device="cuda"), torch.full((), 3, device="cuda"))
        step = torch.compile(method.training_step, backend="eager", fullgraph=True, dynamic=False)
        parts = step(batch)
    assert parts["loss"].is_cuda and parts["loss"].requires_grad
