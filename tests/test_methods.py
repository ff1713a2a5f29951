"""Every method beside the autoencoders: it trains, stops and goes on bit for bit, says truly what it costs, and two
processes give what one gives."""

import socket

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn import Module

from aavae.build import Images, build_method
from aavae.config import make_config, preset
from aavae.data import Split
from aavae.datasets import load_data
from aavae.encoder import Encoder, ViT
from aavae.files import load_checkpoint
from aavae.methods.registry import METHODS
from aavae.run import Run
from aavae.train import pretrain

SHORT = {"train.max_epochs": 1, "train.max_steps": 4, "train.warmup_epochs": 0, "train.knn_every_n_epochs": 0}
SHORT |= {"train.accelerator": "cpu", "train.lr": 1e-3, "model.width": 0.125}


@pytest.fixture(scope="module")
def digits():
    return load_data(preset("digits").data)


def config_of(method, **changes):
    return make_config(SHORT | {"objective.name": method} | changes, preset("digits"))


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_run_goes_on_bit_for_bit(method, tmp_path):
    whole = pretrain(config_of(method), tmp_path / "whole", show_progress=False)
    for resume in (False, True):  # each stops after a step
        pretrain(config_of(method), tmp_path / "part", resume, show_progress=False, max_seconds=0)
    part = pretrain(config_of(method), tmp_path / "part", resume=True, show_progress=False)
    one, other = (load_checkpoint(run.checkpoint)["state_dict"] for run in (whole, part))
    assert set(one) == set(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_the_cost_is_what_is_declared(method, digits):
    built = build_method(config_of(method), Images.of(digits))
    pixels = []

    def count(module: Module, inputs, output):
        seen = inputs[0].shape[-1] ** 2
        if len(inputs) > 1:  # the patches that a ViT does not leave out
            seen = inputs[1].shape[1] * module.patch**2
        pixels.append(inputs[0].shape[0] * seen)

    for module in built.modules():
        if isinstance(module, Encoder | ViT):
            module.register_forward_hook(count)
    built.training_step((digits.split("train").images[:8], torch.arange(8), 0))
    assert sum(pixels) / (8 * 16**2) == pytest.approx(built.passes_per_image)


@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_may_be_a_tensor(method, digits):
    "As in a step that is recorded as a CUDA graph: the same loss as with a number, and state that stays where it is."
    images, index = digits.split("train").images[:16], torch.arange(16)
    losses = []
    for epoch in (1, torch.tensor(1)):
        built = build_method(config_of(method), Images.of(digits))
        places = {name: value.data_ptr() for name, value in built.state_dict().items()}
        losses.append(built.training_step((images, index, epoch))["loss"].item())
        assert places == {name: value.data_ptr() for name, value in built.state_dict().items()}
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_a_method_is_read_like_any_other(method, tmp_path):
    short = config_of(method, **{"train.max_steps": 2})
    pretrain(short, tmp_path / "run", show_progress=False)
    run = Run.load(tmp_path / "run")
    assert run.config == short and not run.config.decodes
    record = run.evaluate("knn")[0]
    assert (record["objective"], record["decoder"], record["beta"]) == (method, None, None)
    whole, alone = (list(encoder.parameters()) for encoder in (run.model().encoder, run.encoder().encoder))
    assert all(map(torch.equal, whole, alone))


def test_what_needs_a_decoder_says_so_and_the_rest_works(tmp_path):
    from aavae.errors import InputError
    from aavae.evaluation.similarity import Layers
    from aavae.explore.plots import reconstructions
    from aavae.explore.report import write_report

    whole_epoch = {"train.max_steps": None, "train.batch_size": 512, "train.keep_at_epochs": [1]}
    run = pretrain(config_of("rotation", **whole_epoch), tmp_path / "run", show_progress=False)
    kept, last = (model.encoder.conv1.weight for model in (run.model(epoch=1), run.model()))
    assert torch.equal(kept, last)
    with pytest.raises(InputError, match="has no decoder of images, so no reconstructions"):
        reconstructions(run)
    with pytest.raises(InputError, match="has no posterior"):
        run.evaluate("density")
    with pytest.raises(InputError, match="has no layer mu; use --layer h"):
        Layers(run).need("mu")
    page = write_report(run, tmp_path / "report.html", "rotation").read_text()
    assert "has no decoder of images" in page


def in_double(name: str, split: Split) -> Module:
    "A narrow method in float64 for some digits."
    images = Images(16, [0.5] * 3, [0.3] * 3, len(split), 10, split.labels)
    method = build_method(config_of(name), images).double()

    def cast(module: Module, inputs):
        return tuple(x.to(module.weight.dtype) for x in inputs)

    for module in method.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(cast)
    return method


def two_steps(name: str, rank: int, split: Split, frozen: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    "The gradient of a second step, a mean over processes, and the state after it; BatchNorm is `frozen` or not."
    half = len(split) // 2
    mine = torch.arange(len(split)) if rank < 0 else torch.arange(half) + half * rank
    method = in_double(name, split)
    for module in method.modules():
        module.training = not (frozen and isinstance(module, nn.modules.batchnorm._BatchNorm))
    method.before_training(split, resumed=False)
    for epoch in (0, 1):
        method.zero_grad()
        method.training_step((split.images[mine], mine, epoch))["loss"].backward()
    gradient = torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
    if rank >= 0:
        dist.all_reduce(gradient)
        gradient /= 2
    return gradient, [value for key, value in method.state_dict().items() if "running" not in key]


def all_methods(rank: int, port: int = 0, out: str = "") -> dict:
    "What each method gives, in one of two processes, or alone if `rank` is -1."
    torch.set_num_threads(1)
    if rank >= 0:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    split = load_data(preset("digits").data).split("train").take(torch.arange(32))
    found = {name: two_steps(name, rank, split, frozen=True) for name in METHODS}
    found["each by itself"] = two_steps("simclr", rank, split, frozen=False)
    if rank >= 0:
        torch.save(found, f"{out}/{rank}.pt")
        dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    "What one process gives, and what two give that have half of the batch each."
    out = tmp_path_factory.mktemp("processes")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(all_methods, (port, str(out)), nprocs=2)
    return all_methods(-1), *(torch.load(out / f"{rank}.pt") for rank in range(2))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / a.norm()).item()


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_give_what_one_gives(name, processes):
    "The gradient, and what is remembered, with BatchNorm frozen: also where the loss is about the whole batch."
    (gradient, state), *others = (found[name] for found in processes)
    for other, its_state in others:
        assert difference(gradient, other) < 1e-9
        for a, b in zip(state, its_state, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_batchnorm_of_the_cpu_sees_the_images_of_its_process(processes):
    "PyTorch has no SyncBatchNorm on the CPU, so there two processes are not one; tests/test_cuda.py has those on GPUs."
    (one, _), (two, _), (other, _) = (found["each by itself"] for found in processes)
    assert difference(two, other) < 1e-12 < 1e-2 < difference(one, two)
