"""What must hold on a GPU: `pytest tests/test_cuda.py`, some minutes. `--rehearse` runs the same code on the CPU,
where only its workings can be seen."""

import copy
import csv
import socket

import pytest
import torch
from conftest import flags

from aavae.augment import draw_views, random_views
from aavae.config import preset
from aavae.datasets import load_data
from aavae.distributed import make_fabric
from aavae.files import load_checkpoint
from aavae.memory import memory_needs
from aavae.model import build_model
from aavae.step import CapturedStep, Step, make_optimizer
from aavae.train import pretrain

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def device():
    "The GPU, with arithmetic in full float32; in a rehearsal the CPU."
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def photos(cifar):
    "128 photos of CIFAR-10 (JPEG q75) and their indices."
    return load_data(preset("cifar10", data__name="folder", data__root=str(cifar), data__val_size=40).data).split(
        "train"
    ).images[:128], torch.arange(128)


def test_views(device, photos):
    "The draws are the same, the views of photos the same within half a grey level; jitter, grey and blur included."
    images, index = photos
    config = preset("cifar10", views__blur_p=0.5).views
    draws = [draw_views(config, 7, 3, index.to(d), (32, 32)) for d in ("cpu", device)]
    for name, value in vars(draws[0]).items():
        assert (
            torch.equal(value, getattr(draws[1], name).cpu())
            or (value - getattr(draws[1], name).cpu()).abs().max() < 1e-6
        ), name
    ours, theirs = (random_views(images.to(d), config, 7, 3, index.to(d)).cpu() for d in ("cpu", device))
    assert 255 * (ours - theirs).abs().max() < 0.5


def test_step(device, photos):
    """Twenty steps in float32 at a real learning rate: the first loss and its gradients agree with the CPU's
    within 1e-4, the later losses within 1e-2."""
    images, index = photos
    config, found = preset("digits", train__warmup_epochs=0), {}
    for d in ("cpu", device):
        model = build_model(config.model, config.objective, config.views, 32, [0.5] * 3, [0.25] * 3).to(d)
        adam, losses = torch.optim.Adam(model.parameters(), 2.5e-4), []
        for step in range(20):
            loss = model.training_step((images[:32].to(d), index[:32].to(d), step))["loss"]
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(loss.item())
            if not step:
                first = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
        found[d] = torch.tensor(losses), first
    (a, ga), (b, gb) = found.values()
    assert abs(a[0] - b[0]) < 1e-4 * abs(a[0]) and (ga - gb).norm() < 1e-4 * ga.norm()
    assert ((a - b).abs() < 1e-2 * a.abs()).all()


def test_a_captured_step_is_a_step(device, photos):
    """Ten steps as one CUDA graph, plain and compiled, give the losses of ten eager ones, in float32 within 1e-3;
    the epoch changes in between."""
    images, index = photos[0][:32].to(device), photos[1][:32].to(device)
    config = preset("digits", train__precision="32", train__accelerator=device.type)
    fabric, losses = make_fabric(config.train, None), {}
    for way in ("eager", "captured", "compiled") if device.type == "cuda" else ("eager", "captured"):
        model = build_model(config.model, config.objective, config.views, 32, [0.5] * 3, [0.25] * 3)
        model, optimizer = fabric.setup(model, make_optimizer(model, config.train, device))
        step = Step(model, optimizer, fabric, clip=100.0)
        before = copy.deepcopy(model.state_dict())
        if way != "eager":
            step = CapturedStep(step, (images, index, 0), compiled=way == "compiled")
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # recording is no training
        losses[way] = torch.tensor(
            [step([(images, index, n // 5)], lr=1e-3 * n / 10)["loss"].item() for n in range(10)]
        )
    for way, found in losses.items():
        assert ((found - losses["eager"]).abs() < 1e-3 * losses["eager"].abs()).all(), way


def curve(path) -> torch.Tensor:
    "The log-likelihoods of a run's metrics.csv."
    return torch.tensor(
        [float(r["log_likelihood"]) for r in csv.DictReader(open(path / "metrics.csv")) if r["log_likelihood"]]
    )


def test_fast_path_follows_float32(device, cifar, tmp_path, capfd):
    """bf16, channels_last, torch.compile and CUDA graphs: over 200 steps the log-likelihood stays as near to
    float32's as another seed does."""

    def train(name, **changes):
        config = preset(
            "cifar10",
            data__name="folder",
            data__root=str(cifar),
            data__val_size=40,
            model__encoder="resnet18",
            model__decoder="resnet18",
            model__width=0.5,
            train__batch_size=64,
            train__max_epochs=1000,
            train__max_steps=200 if device.type == "cuda" else 12,
            train__warmup_epochs=1,
            train__knn_every_n_epochs=0,
            train__accelerator=device.type,
            **changes,
        )
        pretrain(config, tmp_path / name, show_progress=False)
        return curve(tmp_path / name)[1:]

    full, seed, fast = (
        train("full", train__precision="32", train__compile="false"),
        train("seed", train__precision="32", train__compile="false", train__seed=1),
        train("fast", train__precision="bf16", train__compile="auto"),
    )
    assert device.type != "cuda" or "note: the " not in capfd.readouterr().err  # compiled, with graphs
    assert (full - fast).abs().mean() <= 1.5 * (full - seed).abs().mean() + 1e-3 * full.abs().mean()


def test_exact_resume(device, quick_aavae, tmp_path):
    """A run on the GPU that is stopped and resumed ends with the weights and the Adam state of one that was not.
    (Without max-pool: its gradient on a GPU is a sum in no fixed order.)"""
    digits = flags(
        preset="digits",
        train__max_epochs=4,
        train__knn_every_n_epochs=0,
        train__accelerator=device.type,
        model__maxpool="false",
    )
    assert quick_aavae("pretrain", *digits, "--out", tmp_path / "whole").returncode == 0
    parts = quick_aavae("pretrain", *digits, *flags(train__max_steps=33), "--out", tmp_path / "parts")
    assert parts.returncode == 0, parts.stderr
    rest = flags(train__max_steps="null", resume="true")
    done = quick_aavae("pretrain", *digits, *rest, "--out", tmp_path / "parts")
    assert done.returncode == 0, done.stderr
    a, b = (load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "parts"))
    assert a["step"] == b["step"] and all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][i][k]) for k, v in state.items() if torch.is_tensor(v))


def test_memory(device, photos):
    "The peak of a step is what the estimate before the first step said, within a quarter."
    if device.type != "cuda":
        pytest.skip("the CPU's peak is measured in the notebook of memory")
    config = preset("cifar10", train__batch_size=128, train__compile="false", train__accelerator="cuda")
    model = build_model(config.model, config.objective, config.views, 32, [0.5] * 3, [0.25] * 3).to(device)
    adam = make_optimizer(model, config.train, device)
    torch.cuda.reset_peak_memory_stats()
    for step in range(3):
        with torch.autocast("cuda", torch.bfloat16, enabled=config.train.bf16):
            loss = model.training_step((photos[0].to(device), photos[1].to(device), step))["loss"]
        adam.zero_grad()
        loss.backward()
        adam.step()
    fixed, each = memory_needs(config, 32)
    peak = torch.cuda.max_memory_allocated()
    assert 0.75 * peak < fixed + 128 * each < 1.25 * peak, (peak, fixed, each)


def test_run_and_evaluate(device, quick_aavae, cifar, tmp_path):
    small = flags(
        preset="cifar10",
        data__name="folder",
        data__root=cifar,
        data__val_size=40,
        model__encoder="resnet18",
        model__decoder="resnet18",
        model__width=0.25,
        train__batch_size=64,
        train__max_epochs=2,
        train__accelerator=device.type,
    )
    done = quick_aavae("pretrain", *small, "--out", tmp_path / "run", timeout=400)
    assert done.returncode == 0, done.stderr
    for task in ("knn", "linear"):
        assert quick_aavae("evaluate", task, tmp_path / "run", timeout=400).returncode == 0


class Loss(torch.nn.Module):
    "What DistributedDataParallel wraps: a module whose forward pass is the loss of a batch."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model.training_step(batch)["loss"]


def sync_rank(rank: int, port: int, out: str, device: str = "cuda"):
    "One of two processes on one card, or the only one (-1): the gradients of its share of 32 digits."
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    config = preset("digits")
    data = load_data(config.data)
    alone = rank < 0
    index = torch.arange(32) if alone else torch.arange(16 * rank, 16 * rank + 16)
    images = data.split("train").images_at(index).to(device)
    model = build_model(config.model, config.objective, config.views, 16, data.mean, data.std).to(device)
    net = Loss(model)
    if not alone:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
        if device == "cuda":
            net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
        net = torch.nn.parallel.DistributedDataParallel(net, device_ids=[0] if device == "cuda" else None)
    net((images, index.to(device), 0)).backward()
    torch.save(torch.cat([p.grad.flatten().cpu() for p in net.parameters() if p.grad is not None]), f"{out}{rank}.pt")
    if not alone:
        torch.distributed.destroy_process_group()


def test_sync_batchnorm_on_one_card(tmp_path):
    """Two processes with SyncBatchNorm at half the batch have the gradients of one, in float32 within 1e-4. (A CPU
    has none.)"""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sync_rank(-1, 0, str(tmp_path / "g"), device)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(sync_rank, (port, str(tmp_path / "g"), device), nprocs=2)
    one, *two = (torch.load(tmp_path / f"g{rank}.pt") for rank in (-1, 0, 1))
    assert torch.equal(*two)
    if device == "cuda":
        assert (two[0] - one).norm() < 1e-4 * one.norm()
