"""STL-10 and ImageNet from pretraining to evaluation and resume, on small files in exactly the formats that
torchvision reads, and on real photographs."""

import shutil

import numpy as np
import pytest
import torch
from conftest import SMALL_NETWORKS, flags
from PIL import Image
from test_resume import assert_same_run, same

from aavae import Run
from aavae.data import DataConfig
from aavae.datasets import load_data
from aavae.files import load_checkpoint

SMALL = flags(**SMALL_NETWORKS, train__batch_size=8, train__warmup_epochs=1, train__accelerator="cpu")


def photos(n: int, size: tuple[int, int], seed: int) -> list[Image.Image]:
    "Cuts of two photographs, by turns, of width and height `size`."
    from sklearn.datasets import load_sample_image

    rng, (w, h), whole = (
        np.random.default_rng(seed),
        size,
        [load_sample_image(f"{name}.jpg") for name in ("china", "flower")],
    )
    corners = [(rng.integers(0, 427 - h + 1), rng.integers(0, 640 - w + 1)) for _ in range(n)]
    return [Image.fromarray(whole[i % 2][y : y + h, x : x + w]) for i, (y, x) in enumerate(corners)]


@pytest.fixture(scope="module")
def stl10(tmp_path_factory):
    "stl10_binary/ with 40 labelled, 20 test and 60 unlabelled images."
    folder = tmp_path_factory.mktemp("stl") / "stl10_binary"
    folder.mkdir()
    for seed, (name, n) in enumerate((("train", 40), ("test", 20), ("unlabeled", 60))):
        (folder / f"{name}_X.bin").write_bytes(
            np.stack([np.asarray(p) for p in photos(n, (96, 96), seed)]).transpose(0, 3, 2, 1).tobytes()
        )
        if name != "unlabeled":
            (folder / f"{name}_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(n)))
    return folder.parent


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    "train/ and val/ with two classes, photographs of three shapes."
    root = tmp_path_factory.mktemp("imagenet")
    for seed, (split, n) in enumerate((("train", 48), ("val", 8))):
        for i, p in enumerate(photos(n, (500, 375), seed)):
            folder = root / split / ("n02093754", "n11939491")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            p.resize([(500, 375), (375, 500), (120, 90)][i % 3]).save(folder / f"{folder.name}_{i}.JPEG")
    return root


def done(result) -> str:
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_stl10(quick_aavae, stl10, tmp_path):
    """Pretrained on the unlabelled images; the online kNN, linear, kNN and semi use the labelled ones without
    naming any data; stopped and resumed it is the same run."""
    line = [
        "pretrain",
        "--preset",
        "stl10",
        "--data.root",
        stl10,
        "--data.val_size",
        "12",
        *SMALL,
        "--train.knn_every_n_epochs",
        "1",
    ]
    done(quick_aavae(*line, "--train.max_steps", "12", "--out", tmp_path / "whole"))
    run = Run.load(tmp_path / "whole")
    data = run.data()
    assert (
        data.pretrain_split,
        len(data.split("unlabelled")),
        len(data.split("train")),
        data.image_size,
        data.split("train").resize,
    ) == ("unlabelled", 48, 36, 96, 105)
    assert run.facts["views_seen"] == 12 * 8 and run.facts["epochs"] == 2 and run.facts["mean"] == [0.43, 0.42, 0.39]
    assert len([v for v in run.metrics()["knn_top1"] if v is not None]) == 2
    for task in (
        ["linear", "--max_epochs", "3"],
        ["linear", "--views", "true", "--max_epochs", "1"],
        ["knn"],
        ["semi", "--fraction", "0.5", "--max_epochs", "1"],
    ):
        done(quick_aavae("evaluate", task[0], tmp_path / "whole", *task[1:]))
    records = run.records()
    assert {(r["task"], r["eval"]["split"], r["eval"]["n"], r["eval"]["dataset"]) for r in records} == {
        (t, "test", 20, "stl10-part") for t in ("linear", "knn", "semi")
    }
    done(quick_aavae(*line, "--train.max_steps", "5", "--out", tmp_path / "again"))
    done(quick_aavae(*line, "--train.max_steps", "12", "--out", tmp_path / "again", "--resume", "true"))
    a, b = (load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "again"))
    for part in ("state_dict", "optimizer"):
        assert same(a[part], b[part]), part


@pytest.mark.parametrize("objective", ["aavae", "ae"])
def test_imagenet(quick_aavae, imagenet, tmp_path, objective):
    """Photographs are decoded by workers; how many there are, and a stop in the middle of an epoch, change no bit
    of the run. The official val/ is the test split."""
    line = [
        "pretrain",
        "--preset",
        "imagenet",
        "--data.root",
        imagenet,
        "--data.image_size",
        "64",
        "--data.val_size",
        "8",
        "--objective.name",
        objective,
        *SMALL,
        "--train.knn_every_n_epochs",
        "0",
    ]
    done(quick_aavae(*line, "--data.workers", "2", "--train.max_steps", "10", "--out", tmp_path / "whole"))
    done(quick_aavae(*line, "--data.workers", "1", "--train.max_steps", "7", "--out", tmp_path / "again"))
    done(
        quick_aavae(
            *line, "--data.workers", "0", "--train.max_steps", "10", "--out", tmp_path / "again", "--resume", "true"
        )
    )
    assert_same_run(tmp_path / "whole", tmp_path / "again")
    run = Run.load(tmp_path / "whole")
    assert (
        run.data().classes == ["n02093754", "n11939491"]
        and run.data().split("train").images is None
        and run.facts["label"] == "ImageNet (part: 48 training images of 2 classes)"
    )
    if objective == "ae":
        return
    for task in (["linear", "--max_epochs", "3"], ["knn"], ["semi", "--fraction", "0.2", "--max_epochs", "1"]):
        done(quick_aavae("evaluate", task[0], tmp_path / "whole", *task[1:]))
    assert {(r["task"], r["eval"]["split"], r["eval"]["n"]) for r in run.records()} == {
        (t, "test", 8) for t in ("linear", "knn", "semi")
    }


def test_two_ranks_share_streamed_batches(imagenet):
    "The halves of a batch that two ranks decode are the batch that one decodes."
    from aavae.augment import ViewsConfig
    from aavae.loader import Batches, Share

    split = load_data(DataConfig("imagenet", str(imagenet), image_size=64)).split("train")
    whole, *halves = (
        Batches(split, 8, 0, views=ViewsConfig()),
        *(Batches(split, 8, 0, Share(rank, 2), ViewsConfig()) for rank in (0, 1)),
    )
    for step in (0, 7):
        assert torch.equal(whole[step][0], torch.cat([h[step][0] for h in halves])) and whole[step][0].shape == (
            8,
            2,
            3,
            64,
            64,
        )


def test_a_damaged_photograph_ends_the_run_in_one_line(quick_aavae, imagenet, tmp_path):
    "A file that a worker cannot decode is named; with on_error skip it is left out and counted."
    root = shutil.copytree(imagenet, tmp_path / "imagenet")
    bad = next((root / "train" / "n02093754").iterdir())
    bad.write_bytes(bad.read_bytes()[:2000])
    line = [
        "pretrain",
        "--preset",
        "imagenet",
        "--data.root",
        root,
        "--data.image_size",
        "64",
        "--data.val_size",
        "0",
        *SMALL,
        "--train.max_steps",
        "6",
        "--train.knn_every_n_epochs",
        "0",
        "--out",
        tmp_path / "run",
    ]
    result = quick_aavae(*line)
    assert (
        result.returncode == 2
        and f"{bad} is not a readable image" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert "1 unreadable files were left out" in done(
        quick_aavae(*line, "--data.on_error", "skip", "--overwrite", "true")
    )


def test_real_photographs(quick_aavae, test_data, tmp_path):
    """Forty photographs of ImageNet's classes: the preset with a small network, kNN while it trains, probe and kNN
    after."""
    source, root = test_data("imagenet-sample"), tmp_path / "imagenet"
    for split in ("train", "val"):
        shutil.copytree(source, root / split)
    done(
        quick_aavae(
            "pretrain",
            "--preset",
            "imagenet",
            "--data.root",
            root,
            "--data.val_size",
            "8",
            *SMALL,
            "--train.max_steps",
            "8",
            "--train.knn_every_n_epochs",
            "1",
            "--out",
            tmp_path / "run",
            timeout=400,
        )
    )
    run = Run.load(tmp_path / "run")
    assert (len(run.data().classes), run.facts["image_size"], run.facts["step"]) == (40, 224, 8)
    for task in (["linear", "--max_epochs", "2"], ["knn", "--ks", "[1]"]):
        done(quick_aavae("evaluate", task[0], tmp_path / "run", *task[1:]))
    by_task = {(r["task"], r["metric"]): r for r in run.records()}
    assert (
        by_task["knn", "top1"]["eval"]["n"] == 40 and by_task["knn", "top1"]["value"] == 32 / 40
    )  # the 32 that were kept for training find themselves, the 8 held out have no class there
