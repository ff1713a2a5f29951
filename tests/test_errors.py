"""What the command line answers to bad input: one line with the remedy, exit code 2, nothing half-written.

The table of these answers in nbs/errors.ipynb is made here: `pytest tests/test_errors.py --write-errors`."""

import json
import os
import pickle
import random
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import flags
from PIL import Image
from safetensors.torch import load_file, save_file

from aavae.files import load_checkpoint, writing
from aavae.run import encoder_facts

NOTEBOOK = Path(__file__).parent.parent / "nbs" / "errors.ipynb"
SMALL = flags(
    data__name="folder",
    model__width=0.125,
    train__max_steps=2,
    train__batch_size=8,
    train__knn_every_n_epochs=0,
    train__accelerator="cpu",
)


@cache
def tile(i: int, size: int = 16) -> Image.Image:
    "A cut of a real photograph."
    from sklearn.datasets import load_sample_image

    photo = load_sample_image("china.jpg")
    y, x = 7 * i % 300, 11 * i % 500
    return Image.fromarray(photo[y : y + 64, x : x + 64]).resize((size, size))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    "A folder of images: two classes, 24 for training, 8 for the test."
    root = tmp_path_factory.mktemp("images") / "photos"
    for split, n in (("train", 12), ("test", 4)):
        for c in ("roof", "sky"):
            (root / split / c).mkdir(parents=True)
            for i in range(n):
                tile(i + 50 * (c == "sky") + 20 * (split == "test")).save(root / split / c / f"{i:02}.png")
    return root


@pytest.fixture(scope="session")
def run(quick_aavae, photos, tmp_path_factory):
    "A finished run on these images, with records and features."
    out = tmp_path_factory.mktemp("runs") / "run"
    for line in (["pretrain", *SMALL, "--data.root", photos, "--out", out], ["evaluate", "knn", out]):
        done = quick_aavae(*line)
        assert done.returncode == 0, done.stderr
    return out


class Place:
    "Where a case happens: a folder of its own with copies of the images and the run."

    def __init__(self, tmp, photos, run):
        self.tmp, self.photos = tmp, shutil.copytree(photos, tmp / "photos")
        self.run, self.out = shutil.copytree(run, tmp / "run"), tmp / "new"
        config = self.run / "config.yaml"
        config.write_text(config.read_text().replace(str(photos), str(self.photos)))

    def pretrain(self, *args):
        return ["pretrain", *SMALL, "--data.root", self.photos, "--out", self.out, *args]

    def resume(self, *args):
        return ["pretrain", "--out", self.run, "--resume", "true", "--train.max_steps", "4", *args]

    def config(self, text):
        (self.tmp / "config.yaml").write_text(text)
        return self.pretrain("--config", self.tmp / "config.yaml")

    def image(self, data: bytes, name="new.png"):
        (self.photos / "train" / "sky" / name).write_bytes(data)
        return self.pretrain()

    def png(self) -> bytes:
        return (self.photos / "train" / "sky" / "00.png").read_bytes()

    def stl10(self, **files: bytes):
        "STL-10 with 12 labelled images, and `files` in place of its own."
        folder = self.tmp / "stl10_binary"
        folder.mkdir()
        for name, data in (
            {f"{s}_{k}": bytes([1]) * n for s in ("train", "test") for k, n in (("X", 12 * 3 * 96 * 96), ("y", 12))}
            | files
        ).items():
            (folder / f"{name}.bin").write_bytes(data)
        return self.tmp

    def imagenet(self):
        "A probe on ImageNet, one photograph of which is damaged."
        (self.photos / "test").rename(self.photos / "val")
        (self.photos / "train" / "sky" / "00.png").write_bytes(self.png()[:-150])
        return [
            "evaluate",
            "linear",
            self.run,
            "--data.name",
            "imagenet",
            "--data.root",
            self.photos,
            "--data.val_size",
            "0",
        ]

    def encoder(self, **changes):
        "The run's encoder file with other metadata."
        path = self.run / "encoder.safetensors"
        facts = (
            encoder_facts(path) | {"model": yaml.safe_load((self.run / "config.yaml").read_text())["model"]} | changes
        )
        save_file(load_file(path), path, {"aavae": json.dumps(facts)})
        return ["evaluate", "knn", self.run]

    def checkpoint(self, change):
        "The run's last checkpoint, changed."
        checkpoint = load_checkpoint(self.run / "checkpoints" / "last.ckpt")
        change(checkpoint)
        torch.save(checkpoint, self.run / "checkpoints" / "last.ckpt")
        return self.resume()


CASES = {}


def case(group: str, what: str, **marks):
    def add(make):
        CASES[what] = (group, make, marks)
        return make

    return add


# ---- the command line
case("The command line", "a command that there is not")(lambda p: ["pretran", "--out", p.out])
case("The command line", "a flag that there is not")(lambda p: p.pretrain("--train.learning_rate", "1"))
case("The command line", "a flag that is needed")(lambda p: ["pretrain"])
case("The command line", "a value of the wrong type")(lambda p: p.pretrain("--train.lr", "fast"))
case("The command line", "a value out of range")(lambda p: p.pretrain("--train.batch_size", "1"))
case("The command line", "a word that is none of those allowed")(lambda p: p.pretrain("--model.encoder", "resnet19"))
case("The command line", "a preset that there is not")(lambda p: p.pretrain("--preset", "cifar"))
case("The command line", "a time that is none")(lambda p: p.pretrain("--train.max_time", "25"))
case("The command line", "flags that exclude each other")(
    lambda p: ["pretrain", "--out", p.run, "--resume", "true", "--overwrite", "true"]
)
case("The command line", "an evaluation that there is not")(lambda p: ["evaluate", "finetune", p.run])
case("The command line", "a table format that there is not")(lambda p: ["results", p.run, "--format", "xml"])
case("The command line", "a kNN without neighbours")(lambda p: ["evaluate", "knn", p.run, "--ks", "[0]"])
case("The command line", "a word after a boolean flag that is none it takes")(
    lambda p: ["evaluate", "linear", p.run, "--views", "maybe"]
)
case("The command line", "a word too many")(lambda p: ["evaluate", "knn", p.run, "test"])
case("The command line", "a temperature of zero")(lambda p: ["evaluate", "knn", p.run, "--temperature", "0"])
case("The command line", "fine-tuning without a seed")(
    lambda p: ["evaluate", "semi", p.run, "--fraction", "0.5", "--seeds", "[]"]
)
case("The command line", "a file for records that cannot be written")(
    lambda p: ["evaluate", "knn", p.run, "--out", "/proc/records.json"]
)
case("The command line", "a file for records that holds something else")(
    lambda p: ((p.tmp / "mine.json").write_text("{}"), ["evaluate", "knn", p.run, "--out", p.tmp / "mine.json"])[1]
)
case("The command line", "a detection without images")(lambda p: ["transfer", "detect", p.run])
case("The command line", "CUDA where there is none", cpu=True)(lambda p: p.pretrain("--train.accelerator", "cuda"))

# ---- the configuration
case("Configuration", "a YAML file that is not there")(lambda p: p.pretrain("--config", p.tmp / "none.yaml"))
case("Configuration", "a folder in place of a YAML file")(lambda p: p.pretrain("--config", p.tmp))
case("Configuration", "text that is no YAML")(lambda p: p.config("train: [1, 2"))
case("Configuration", "bytes that are no text")(
    lambda p: ((p.tmp / "c.yaml").write_bytes(b"\xff\xfe\x00\x80"), p.pretrain("--config", p.tmp / "c.yaml"))[1]
)
case("Configuration", "a list in place of sections")(lambda p: p.config("- lr\n- 0.1"))
case("Configuration", "a section without fields")(lambda p: p.config("train: 5"))
case("Configuration", "an unknown section")(lambda p: p.config("training:\n  lr: 0.1"))
case("Configuration", "an unknown field")(lambda p: p.config("train:\n  learning_rate: 0.1"))
case("Configuration", "a field given twice")(lambda p: p.config("train:\n  lr: 0.1\n  lr: 0.2"))
case("Configuration", "a field of the wrong type")(lambda p: p.config("train:\n  max_epochs: many"))
case("Configuration", "a field without a value that it needs")(lambda p: p.config("train:\n  lr:"))
case("Configuration", "an objective without its weight")(lambda p: p.pretrain("--objective.name", "beta"))
case("Configuration", "a KL weight for an objective that has no KL term")(
    lambda p: p.pretrain("--objective.beta", "0.5")
)
case("Configuration", "an image size that the decoder cannot return")(
    lambda p: p.pretrain("--data.image_size", "8", "--model.stem", "conv7")
)
case("Configuration", "an image size that is no multiple of 8")(lambda p: p.pretrain("--data.image_size", "30"))
case("Configuration", "a width that cannot be")(lambda p: p.pretrain("--model.width", "0.3"))
case("Configuration", "a range upside down")(lambda p: p.pretrain("--views.crop_scale", "[0.9, 0.2]"))
case("Configuration", "a probability above 1")(lambda p: p.pretrain("--views.flip", "1.5"))
case("Configuration", "a blur kernel that is even")(lambda p: p.pretrain("--views.blur_kernel", "4"))
case("Configuration", "a batch larger than the data set")(lambda p: p.pretrain("--train.batch_size", "64"))
case("Configuration", "a validation split larger than the data set")(lambda p: p.pretrain("--data.val_size", "100"))

# ---- images


def one_class(p, deep: bool):
    "The run's images with one class folder, which holds the classes if it is `deep`."
    for split in ("train", "test"):
        if deep:
            (p.photos / split).rename(p.tmp / "x")
            (p.photos / split).mkdir()
            (p.tmp / "x").rename(p.photos / split / "x")
        else:
            shutil.rmtree(p.photos / split / "sky")


@case("Images", "one class for an evaluation")
def only_roofs(p):
    one_class(p, deep=False)
    return ["evaluate", "knn", p.run]


@case("Images", "one class for fine-tuning")
def only_roofs_semi(p):
    one_class(p, deep=False)
    return ["evaluate", "semi", p.run, "--fraction", "0.5"]


@case("Images", "a folder too many above the classes")
def a_folder_too_many(p):
    one_class(p, deep=True)
    return ["evaluate", "knn", p.run]


case("Images", "no folder of images named")(lambda p: ["pretrain", "--data.name", "folder", "--out", p.out])
case("Images", "a folder that is not there")(lambda p: p.pretrain("--data.root", p.tmp / "none"))
case("Images", "a file in place of a folder")(
    lambda p: p.pretrain("--data.root", p.photos / "train" / "sky" / "00.png")
)
case("Images", "a folder without train/")(lambda p: p.pretrain("--data.root", p.tmp))
case("Images", "a train/ without images")(
    lambda p: (shutil.rmtree(p.photos / "train"), (p.photos / "train" / "sky").mkdir(parents=True), p.pretrain())[2]
)
case("Images", "a class of the test that training has not")(
    lambda p: ((p.photos / "test" / "sky").rename(p.photos / "test" / "clouds"), p.pretrain())[1]
)
case("Images", "an empty image file")(lambda p: p.image(b""))
case("Images", "a text file named .png")(lambda p: p.image(b"hello"))
case("Images", "an image file that was cut short")(lambda p: p.image(p.png()[:-150]))
case("Images", "a link that leads nowhere")(
    lambda p: ((p.photos / "train" / "sky" / "new.png").symlink_to("none.png"), p.pretrain())[1]
)
case("Images", "a pipe named .png")(lambda p: (os.mkfifo(p.photos / "train" / "sky" / "new.png"), p.pretrain())[1])
case("Images", "an image with 32 bits a pixel")(
    lambda p: (
        Image.fromarray(np.full((16, 16), 80, np.float32)).save(p.photos / "train" / "sky" / "new.tiff"),
        p.pretrain(),
    )[1]
)
case("Images", "an image smaller than the others")(
    lambda p: (tile(0, 8).save(p.photos / "train" / "sky" / "new.png"), p.pretrain("--data.image_size", "16"))[1]
)
case("Images", "an image of one pixel's width")(
    lambda p: (
        tile(0, 64).resize((1, 64)).save(p.photos / "train" / "sky" / "new.png"),
        p.pretrain("--data.image_size", "16"),
    )[1]
)
case("Images", "images of several sizes, and no size chosen")(
    lambda p: (tile(0, 24).save(p.photos / "train" / "sky" / "new.png"), p.pretrain())[1]
)
case("Images", "a decompression bomb")(lambda p: p.image(bomb()))
case("Images", "files that cannot be read, when the data are checked")(
    lambda p: (p.image(b""), ["data", *SMALL, "--data.root", p.photos])[1]
)
case("Images", "no readable image at all, though unreadable ones are skipped")(
    lambda p: (
        [f.write_bytes(b"x") for f in (p.photos / "train").rglob("*.png")],
        p.pretrain("--data.on_error", "skip", "--data.image_size", "16"),
    )[1]
)
case("Images", "CIFAR-10 that is not there")(
    lambda p: ["pretrain", "--preset", "cifar10", "--data.root", p.tmp / "none", "--out", p.out]
)
case("Images", "STL-10 that is not there")(
    lambda p: ["pretrain", "--preset", "stl10", "--data.root", p.tmp / "none", "--out", p.out]
)
case("Images", "STL-10 without its unlabelled images")(
    lambda p: ["pretrain", "--preset", "stl10", "--data.root", p.stl10(), "--out", p.out]
)
case("Images", "STL-10 with a file that was cut short")(
    lambda p: ["pretrain", "--preset", "stl10", "--data.root", p.stl10(unlabeled_X=bytes(99_999)), "--out", p.out]
)
case("Images", "STL-10 with labels of other images")(
    lambda p: ["evaluate", "linear", p.run, "--data.name", "stl10", "--data.root", p.stl10(test_y=bytes([1] * 9))]
)
case("Images", "no folder of ImageNet named")(lambda p: ["pretrain", "--preset", "imagenet", "--out", p.out])
case("Images", "ImageNet without val/")(
    lambda p: ["pretrain", "--preset", "imagenet", "--data.root", p.photos, "--out", p.out]
)
case("Images", "ImageNet whose val/ is not sorted into classes")(
    lambda p: (
        shutil.copytree(p.photos / "test" / "sky", p.photos / "val"),
        ["pretrain", "--preset", "imagenet", "--data.root", p.photos, "--out", p.out],
    )[1]
)
case("Images", "ImageNet that is to be held in memory")(
    lambda p: ["pretrain", "--preset", "imagenet", "--data.root", p.photos, "--data.resident", "true", "--out", p.out]
)
case("Images", "a photograph of ImageNet that was cut short")(lambda p: p.imagenet())
case("Images", "a root whose name is no text")(lambda p: p.pretrain("--data.root", p.tmp / "a\x07b"))
case("Images", "a probe with a single class")(
    lambda p: (
        [shutil.rmtree(p.photos / s / "sky") for s in ("train", "test")],
        ["evaluate", "linear", p.run, "--data.root", p.photos],
    )[1]
)
case("Images", "a probe without labels")(
    lambda p: (tile(0).save(p.photos / "train" / "loose.png"), ["evaluate", "linear", p.run, "--data.root", p.photos])[
        1
    ]
)
case("Images", "a share of the labels that leaves a class without one")(
    lambda p: ["evaluate", "semi", p.run, "--fraction", "0.01"]
)
case("Images", "a list that names no training image")(
    lambda p: (
        (p.tmp / "list.txt").write_text("sky/00.png\nn01440764_10168.JPEG\n"),
        ["evaluate", "semi", p.run, "--list_file", p.tmp / "list.txt"],
    )[1]
)
case("Images", "a list that leaves a class without an image")(
    lambda p: (
        (p.tmp / "list.txt").write_text("sky/00.png\n"),
        ["evaluate", "semi", p.run, "--list_file", p.tmp / "list.txt"],
    )[1]
)
case("Images", "a list of Places205 whose image is not there")(
    lambda p: ((p.photos / "train_places205.csv").write_text("train/sky/ghost.png 0\n"), p.pretrain())[1]
)
case("Images", "a list of Places205 with a line that is none")(
    lambda p: ((p.photos / "train_places205.csv").write_text("train/sky/00.png zero\n"), p.pretrain())[1]
)
case("Images", "a transfer without other images")(lambda p: ["transfer", "classify", p.run])
case("Images", "a hyperparameter to choose, and no split to choose it on")(
    lambda p: (
        (p.photos / "test").rename(p.photos / "val"),
        ["evaluate", "linear", p.run, "--tune", "true", "--data.root", p.photos],
    )[1]
)
case("Images", "no split to evaluate on")(
    lambda p: (
        shutil.rmtree(p.photos / "test"),
        ["evaluate", "knn", p.run, "--data.root", p.photos, "--data.val_size", "0"],
    )[1]
)

# ---- runs
case("Runs", "a folder that is no run")(lambda p: ["evaluate", "knn", p.photos])
case("Runs", "no records in a folder")(lambda p: ["results", p.photos])
case("Runs", "a run that is there already")(lambda p: p.pretrain("--out", p.run))
case("Runs", "a folder with something else in it")(lambda p: p.pretrain("--out", p.photos))
case("Runs", "a file in place of a run")(lambda p: p.pretrain("--out", p.run / "config.yaml"))
case("Runs", "a folder that cannot be written")(lambda p: p.pretrain("--out", "/proc/new"))
case("Runs", "nothing to resume")(lambda p: ["pretrain", "--out", p.out, "--resume", "true"])
case("Runs", "a run resumed with another network")(lambda p: p.resume("--model.encoder", "resnet34"))
case("Runs", "a run resumed on other images")(
    lambda p: (next((p.photos / "train" / "sky").iterdir()).unlink(), p.resume())[1]
)
case("Runs", "a run whose images are gone")(lambda p: (shutil.rmtree(p.photos), p.resume())[1])
case("Runs", "a run that another process is writing", busy=True)(lambda p: p.resume())
case("Runs", "a run's configuration with a field of another version")(
    lambda p: ((p.run / "config.yaml").open("a").write("  amsgrad: true\n"), ["evaluate", "knn", p.run])[1]
)
case("Runs", "an encoder that is not there")(
    lambda p: ((p.run / "encoder.safetensors").unlink(), ["evaluate", "knn", p.run])[1]
)
case("Runs", "an encoder that was cut short")(
    lambda p: (
        (p.run / "encoder.safetensors").write_bytes((p.run / "encoder.safetensors").read_bytes()[:-9]),
        ["evaluate", "knn", p.run],
    )[1]
)
case("Runs", "an encoder of a later version")(lambda p: p.encoder(format=2))
case("Runs", "an encoder of another network than the run")(
    lambda p: p.encoder(
        model=dict(encoder="resnet34", decoder="resnet18", width=0.125, stem="conv3", maxpool=True, latent_dim=64)
    )
)
case("Runs", "an encoder whose metadata were changed")(lambda p: p.encoder(mean=[0.5, "x", 0.5]))
case("Runs", "an encoder without metadata")(
    lambda p: (
        save_file(load_file(p.run / "encoder.safetensors"), p.run / "encoder.safetensors"),
        ["evaluate", "knn", p.run],
    )[1]
)
case("Runs", "a milestone that was not kept")(lambda p: ["evaluate", "knn", p.run, "--epoch", "7"])
case("Runs", "a milestone of an earlier version, which holds no decoder")(
    lambda p: (
        shutil.copy(p.run / "encoder.safetensors", p.run / "checkpoints" / "epoch=0001.safetensors"),
        ["evaluate", "density", p.run, "--epoch", "1"],
    )[1]
)
case("Runs", "the density of a model without a posterior")(
    lambda p: (
        (p.run / "config.yaml").write_text((p.run / "config.yaml").read_text().replace("name: aavae", "name: ae")),
        ["evaluate", "density", p.run],
    )[1]
)
case("Runs", "a checkpoint that was cut short")(
    lambda p: (
        (p.run / "checkpoints" / "last.ckpt").write_bytes((p.run / "checkpoints" / "last.ckpt").read_bytes()[:5000]),
        p.resume(),
    )[1]
)
case("Runs", "a checkpoint that is a pickle with code")(
    lambda p: ((p.run / "checkpoints" / "last.ckpt").write_bytes(pickle.dumps(Path)), p.resume())[1]
)
case("Runs", "a checkpoint of a later version")(lambda p: p.checkpoint(lambda c: c["aavae"].update(format=3)))
case("Runs", "a checkpoint of another network")(
    lambda p: p.checkpoint(lambda c: c["state_dict"].update({"encoder.conv1.weight": torch.zeros(64, 3, 7, 7)}))
)
case("Runs", "a checkpoint without its optimiser")(lambda p: p.checkpoint(lambda c: c.pop("optimizer")))
case("Runs", "records that are no JSON")(lambda p: ((p.run / "results.json").write_text("[1,"), ["results", p.run])[1])
case("Runs", "a record without a field that it needs")(
    lambda p: ((p.run / "results.json").write_text('[{"task": "knn"}]'), ["results", p.run])[1]
)
case("Runs", "a disk that is full", disk=True)(lambda p: p.pretrain("--out", p.disk / "run"))

# ---- embeddings and exports
case("Embeddings and exports", "an embedding without a run")(lambda p: ["embed", p.photos, "-o", p.tmp / "t.npz"])
case("Embeddings and exports", "a folder to embed that is not there")(
    lambda p: ["embed", p.tmp / "none", "--run", p.run, "-o", p.tmp / "t.npz"]
)
case("Embeddings and exports", "a folder without images to embed")(
    lambda p: ((p.tmp / "no").mkdir(), ["embed", p.tmp / "no", "--run", p.run, "-o", p.tmp / "t.npz"])[1]
)
case("Embeddings and exports", "a table of another kind")(
    lambda p: ["embed", p.photos, "--run", p.run, "-o", p.tmp / "t.csv"]
)
case("Embeddings and exports", "a table that is there and holds something else")(
    lambda p: ((p.tmp / "t.npz").write_bytes(b"x"), ["embed", p.photos, "--run", p.run, "-o", p.tmp / "t.npz"])[1]
)
case("Embeddings and exports", "a table in a folder that cannot be written")(
    lambda p: ["embed", p.photos, "--run", p.run, "-o", "/proc/t.npz"]
)
case("Embeddings and exports", "a batch of no images")(
    lambda p: ["embed", p.photos, "--run", p.run, "-o", p.tmp / "t.npz", "--batch_size", "0"]
)
case("Embeddings and exports", "no image that can be read")(
    lambda p: (
        shutil.rmtree(p.photos),
        p.photos.mkdir(),
        (p.photos / "a.png").touch(),
        ["embed", p.photos, "--run", p.run, "-o", p.tmp / "t.npz"],
    )[3]
)
case("Embeddings and exports", "a format that there is not")(lambda p: ["export", p.run, "--format", "tensorflow"])
case("Embeddings and exports", "an architecture that torchvision has not")(
    lambda p: ["export", p.run, "--format", "torchvision"]
)
case("Embeddings and exports", "a README.md of somebody else")(
    lambda p: ((p.tmp / "README.md").write_text("mine"), ["export", p.run, "--format", "safetensors", "-o", p.tmp])[1]
)
case("Embeddings and exports", "a folder for the export that cannot be written")(
    lambda p: ["export", p.run, "--format", "safetensors", "-o", "/proc/new"]
)
case("Embeddings and exports", "a name that cannot be on the Hub")(
    lambda p: ["export", p.run, "--format", "safetensors", "--push", "mine"]
)


def bomb() -> bytes:
    "A PNG of a few bytes that claims to be 20,000 pixels wide and high."
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def tree(folder: Path) -> dict[str, int]:
    "All files below a folder with their time of change; features may be added by an evaluation."
    return {str(p): p.lstat().st_mtime_ns for p in folder.rglob("*") if "features" not in p.parts and p.is_file()}


def one_line(done) -> str:
    "The answer. Fails if it is not one line, or has no remedy."
    assert done.returncode == 2, (done.returncode, done.stdout[-500:], done.stderr[-2000:])
    bar = re.compile(r"\d%\||\d%\), .* gone, ")
    said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("note: ")]
    lines = [line for line in said if not bar.search(line)]
    assert len(lines) == 1 and lines[0].startswith("aavae: error: "), done.stderr
    assert re.search("[;?] ?", lines[0]), f"no remedy: {lines[0]}"
    return lines[0].removeprefix("aavae: error: ")


ANSWERS = {}


@pytest.mark.parametrize("what", CASES)
def test_answer(what, quick_aavae, tmp_path, photos, run, request):
    group, make, marks = CASES[what]
    if marks.get("cpu") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    p = Place(tmp_path / "w", photos, run)
    if marks.get("disk"):
        p.disk = tmp_path / "disk"
        p.disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", p.disk], capture_output=True).returncode:
            pytest.skip("a full disk needs the right to mount one")
    try:
        line = list(map(str, make(p)))
        before = tree(p.tmp)
        if marks.get("busy"):
            with writing(p.run):
                done = quick_aavae(*line)
        else:
            done = quick_aavae(*line)
        answer = one_line(done)
        assert tree(p.tmp) == before, "something was written"
        if marks.get("disk"):
            assert not [f for f in p.disk.rglob("*") if f.suffix in (".part", ".ckpt", ".safetensors")]
    finally:
        if marks.get("disk"):
            subprocess.run(["umount", p.disk])
    answer = re.sub(
        r"process \d+ on [\w.-]+",
        "process 1234 on host",
        answer.replace(str(tmp_path / "disk"), "DISK").replace(str(p.tmp), "DIR"),
    )
    ANSWERS[what] = answer
    if not request.config.getoption("--write-errors"):
        assert stored().get(what) == answer, (
            "nbs/errors.ipynb says something else; pytest tests/test_errors.py --write-errors writes it anew"
        )


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def stored() -> dict[str, str]:
    "The answers in the notebook, by case."
    rows = [
        line
        for c in json.loads(NOTEBOOK.read_text())["cells"]
        for line in "".join(c["source"]).splitlines()
        if line.startswith("| ")
    ]
    pairs = [re.split(r"(?<!\\)\|", row)[1:3] for row in rows]
    return {a.strip(): b.strip().strip("`").replace("\\|", "|") for a, b in pairs}


def test_the_table_is_complete(request):
    "Every case has its row in the notebook, and there are at least forty."
    if request.config.getoption("--write-errors"):
        write(ANSWERS)
    rows = stored()
    assert set(CASES) <= set(rows) and len(CASES) >= 40
    assert not {r for r in rows if r not in CASES} - {"what is wrong", "---"}


def write(answers: dict[str, str]):
    "The notebook, from the answers of this session and, where a case was skipped, the stored ones."
    answers = (stored() if NOTEBOOK.exists() else {}) | answers
    cells = [
        "# Errors and remedies\n\n> What the command line answers to bad input, and what to do about it",
        "Input that can be mended ends in one line on stderr, exit code 2, and nothing half-written. "
        f"This page lists {len(CASES)} such cases. It is written by the tests, which run each of them and compare. "
        "`DIR` stands for a folder; `--debug` shows where an error came from.",
    ]
    for group in dict.fromkeys(g for g, _, _ in CASES.values()):
        rows = [
            f"| {cell(what)} | `{answers[what].replace('|', chr(92) + '|')}` |"
            for what, (g, _, _) in CASES.items()
            if g == group
        ]
        cells.append("\n".join([f"## {group}", "", "| what is wrong | the answer |", "|---|---|", *rows]))
    book = dict(
        cells=[
            dict(cell_type="markdown", id=f"errors-{i}", metadata={}, source=text.splitlines(keepends=True))
            for i, text in enumerate(cells)
        ],
        metadata=dict(kernelspec=dict(display_name="python3", language="python", name="python3")),
        nbformat=4,
        nbformat_minor=5,
    )
    NOTEBOOK.write_text(json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


# ---- at random


def often(request, n: int) -> int:
    "`n` times with --slow, else an eighth of that."
    return n if request.config.getoption("--slow") else max(1, n // 8)


def graceful(done, line):
    "Exit code 0, 1 or 2; a single line for 2, and no traceback."
    told = f"{' '.join(map(str, line))}\nexit code {done.returncode}\n{done.stderr[-3000:]}"
    assert done.returncode in (0, 1, 2), told
    assert "Traceback" not in done.stderr, told
    if done.returncode == 2:
        one_line(done)


@pytest.mark.parametrize("name", ["encoder.safetensors", "checkpoints/last.ckpt", "results.json", "config.yaml"])
def test_cut_anywhere(name, quick_aavae, tmp_path, photos, run, request):
    "A file of a run that ends at any byte is named, or is good enough: never a traceback, nor a wrong encoder."
    p, rng = Place(tmp_path / "w", photos, run), random.Random(0)
    whole = (p.run / name).read_bytes()
    for cut in [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(often(request, 47)))]:
        (p.run / name).write_bytes(whole[:cut])
        line = p.resume() if name.endswith("ckpt") else ["evaluate", "knn", p.run]
        done = quick_aavae(*line)
        graceful(done, line)
        if name.endswith(("ckpt", "safetensors")):
            assert name in one_line(done), cut


VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    7,
    16,
    1.5,
    -0.5,
    1e-8,
    1e30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "auto",
    "true",
    "ae",
    "beta",
    "resnet34",
    "2001-99-99",
    [],
    [1],
    [0.5, 1.0],
    [1, 2, 3],
    {},
    {"a": 1},
    10**12,
]


def mutated(text: str, rng: random.Random) -> bytes:
    "A config.yaml with one to three random changes: in its fields, or in its bytes."
    tree = yaml.safe_load(text)
    for _ in range(rng.randint(1, 3)):
        change_field(tree, rng)
    data = bytearray(yaml.safe_dump(tree, sort_keys=False).encode())
    if rng.random() < 0.4:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.1:
        data += data[rng.randrange(len(data)) :]
    return bytes(data)


def change_field(tree, rng: random.Random):
    "Changes, removes, adds or moves a field or a section of a configuration."
    section = rng.choice(list(tree)) if isinstance(tree, dict) and tree else None
    fields = tree[section] if section and isinstance(tree[section], dict) else None
    kind = rng.randrange(6)
    if kind == 0 and fields:
        fields[rng.choice(list(fields))] = rng.choice(VALUES)
    elif kind == 1 and fields:
        fields.pop(rng.choice(list(fields)))
    elif kind == 2 and fields is not None:
        fields[rng.choice(["lrr", "size", 3, None, "epochs"])] = rng.choice(VALUES)
    elif kind == 3 and section:
        tree[section] = rng.choice(VALUES)
    elif kind == 4 and section:
        tree[rng.choice(["trian", "optim", 5])] = tree.pop(section)
    elif fields:
        fields[rng.choice(list(fields))] = rng.choice(list(fields.values()))


def test_random_settings(quick_aavae, tmp_path, photos, run, request):
    "Random changes of a config.yaml end in exit code 0, 1 or 2 and never in a traceback."
    p, rng, codes = Place(tmp_path / "w", photos, run), random.Random(1), []
    text = (p.run / "config.yaml").read_text()
    for i in range(often(request, 200)):
        (p.tmp / "config.yaml").write_bytes(mutated(text, rng))
        line = [
            "pretrain",
            "--config",
            p.tmp / "config.yaml",
            "--train.max_steps",
            "1",
            "--train.accelerator",
            "cpu",
            "--out",
            p.tmp / f"out{i}",
        ]
        done = quick_aavae(*line, memory=8 << 30)
        graceful(done, [(p.tmp / "config.yaml").read_bytes(), *line])
        if done.returncode == 2:
            assert not (p.tmp / f"out{i}").exists(), "half-written"
        codes.append(done.returncode)
    assert {0, 2} <= set(codes)


def corrupt(path: Path, rng: random.Random):
    """Bytes changed, taken out, doubled, put in or cut off; or the file emptied, removed, or replaced by a folder
    or another file."""
    data, kind = bytearray(path.read_bytes()), rng.randrange(9)
    at = rng.randrange(len(data)) if data else 0
    if kind <= 1 and data:
        for _ in range(rng.choice([1, 5, 100])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind == 2:
        del data[at : at + rng.choice([1, 100])]
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.choice([1, 1000]))
    elif kind == 4:
        del data[at:]
    elif kind == 5:
        data.clear()
    elif kind == 6:
        return path.unlink()
    elif kind == 7:
        path.unlink()
        return path.mkdir()
    else:
        data = bytearray(rng.choice([f for f in path.parent.rglob("*") if f.is_file()]).read_bytes())
    path.write_bytes(data)


def test_random_damage(quick_aavae, tmp_path, photos, run, request):
    "Random damage to the files of a run or to images ends in exit code 0, 1 or 2 and never in a traceback."
    rng, codes = random.Random(2), []
    for i in range(often(request, 200)):
        p = Place(tmp_path / f"w{i}", photos, run)
        files = sorted(f for f in (p.run if rng.random() < 0.75 else p.photos).rglob("*") if f.is_file())
        for f in rng.sample(files, rng.randint(1, 2)):
            if f.is_file():
                corrupt(f, rng)
        line = rng.choice(
            [
                ["evaluate", "knn", p.run],
                ["evaluate", "linear", p.run, "--max_epochs", "1"],
                p.resume(),
                ["results", p.run],
                ["report", p.run],
                p.pretrain("--train.max_steps", "1"),
                ["data", *SMALL, "--data.root", p.photos],
            ]
        )
        done = quick_aavae(*line, memory=8 << 30)
        graceful(done, line)
        codes.append(done.returncode)
        shutil.rmtree(p.tmp)
    assert {0, 2} <= set(codes)
