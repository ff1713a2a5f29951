"Every method beside the autoencoders: it trains, stops and goes on bit for bit, and says truly what it costs."

import pytest
import torch
from torch.nn import Module

from aavae.build import Images, build_method
from aavae.config import make_config, preset
from aavae.datasets import load_data
from aavae.encoder import Encoder
from aavae.files import load_checkpoint
from aavae.methods.registry import METHODS
from aavae.run import Run
from aavae.train import pretrain

SHORT = {"train.max_epochs": 1, "train.max_steps": 4, "train.warmup_epochs": 0, "train.knn_every_n_epochs": 0}
SHORT |= {"train.accelerator": "cpu", "train.lr": 1e-3}


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
        pixels.append(inputs[0].shape[0] * inputs[0].shape[-1] ** 2)

    for module in built.modules():
        if isinstance(module, Encoder):
            module.register_forward_hook(count)
    built.training_step((digits.split("train").images[:8], torch.arange(8), 0))
    assert sum(pixels) / (8 * 16**2) == pytest.approx(built.passes_per_image)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_a_method_is_read_like_any_other(method, tmp_path):
    short = config_of(method, **{"train.max_steps": 2})
    pretrain(short, tmp_path / "run", show_progress=False)
    run = Run.load(tmp_path / "run")
    assert run.config == short and not run.config.decodes
    record = run.evaluate("knn")[0]
    assert (record["objective"], record["decoder"], record["beta"]) == (method, None, None)
    assert torch.equal(run.model().encoder.conv1.weight, run.encoder().encoder.conv1.weight)


def test_what_needs_a_decoder_says_so_and_the_rest_works(tmp_path):
    from aavae.errors import InputError
    from aavae.evaluation.similarity import Layers
    from aavae.explore.plots import reconstructions
    from aavae.explore.report import write_report

    run = pretrain(config_of("rotation", **{"train.max_steps": 2}), tmp_path / "run", show_progress=False)
    with pytest.raises(InputError, match="has no decoder of images, so no reconstructions"):
        reconstructions(run)
    with pytest.raises(InputError, match="has no posterior"):
        run.evaluate("density")
    with pytest.raises(InputError, match="has no layer mu; use --layer h"):
        Layers(run).need("mu")
    page = write_report(run, tmp_path / "report.html", "rotation").read_text()
    assert "has no decoder of images" in page
