"Targets other than the pixels: exact on resume, in every evaluation, on real photographs, on streamed images."

import shutil
import signal

import pytest
import torch

from aavae import Interrupted, Run, preset, pretrain, train
from aavae.errors import InputError
from aavae.files import load_checkpoint

SMALL = {
    "model__decoder": "mlp",
    "model__width": 0.125,
    "train__batch_size": 128,
    "train__max_epochs": 1,
    "train__warmup_epochs": 0,
    "train__knn_every_n_epochs": 0,
    "train__accelerator": "cpu",
    "objective__components": 32,
    "objective__patches": 16,
    "objective__patch_size": 4,
}
TARGETS = {
    "stages": {"objective__name": "aaae", "objective__target": "patches", "objective__stages": 3},
    "whitened": {"objective__target": "whitened", "objective__learn_logscale": True, "train__ema": 0.9},
    "hog": {"objective__target": "hog", "objective__show_pixels": True, "objective__condition": True},
}


def stopped_and_resumed(config, out, monkeypatch, at: int) -> Run:
    "A run that a signal stopped after step `at`, and that went on."
    wishes = train.wishes

    def stopping(t, keeper, step):
        return (signal.SIGTERM, False, False) if step == at else wishes(t, keeper, step)

    monkeypatch.setattr(train, "wishes", stopping)
    with pytest.raises(Interrupted):
        pretrain(config, out, show_progress=False)
    monkeypatch.setattr(train, "wishes", wishes)
    return pretrain(config, out, resume=True, show_progress=False)


@pytest.mark.parametrize("name", TARGETS)
def test_resume_is_exact(name, tmp_path, monkeypatch):
    "A run that was stopped in the middle ends as one that was not: weights, target, teacher, average and metrics."
    config = preset("digits", **SMALL | TARGETS[name])
    whole = pretrain(config, tmp_path / "whole", show_progress=False)
    resumed = stopped_and_resumed(config, tmp_path / "resumed", monkeypatch, at=5)
    a, b = (load_checkpoint(run.checkpoint) for run in (whole, resumed))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    for key, value in (a["aavae"].get("ema") or {}).items():
        assert torch.equal(value, b["aavae"]["ema"][key]), key
        if key.startswith("target."):
            assert torch.equal(value, a["state_dict"][key]), key
    metrics = [(run.path / "metrics.csv").read_bytes() for run in (whole, resumed)]
    assert metrics[0] == metrics[1]


def test_target_depends_on_images_and_seed(tmp_path):
    "Other images, or another seed, give another target; the same give the same."

    def target(out, **changes):
        config = preset(
            "digits", **SMALL | TARGETS["stages"] | {"objective__stages": 1, "train__max_steps": 1} | changes
        )
        return pretrain(config, tmp_path / out, show_progress=False).model().target.state_dict()

    one, again, seeded, fewer = target("a"), target("b"), target("c", train__seed=1), target("d", data__val_size=500)
    assert all(torch.equal(one[key], again[key]) for key in one)
    for other in (seeded, fewer):
        assert not torch.equal(one["directions"], other["directions"])
        assert not torch.equal(one["features.kernels"], other["features.kernels"])


def test_evaluations(tmp_path):
    "What needs no decoder works; densities are those of pixels, or refused."
    config = preset("digits", **SMALL | {"objective__target": "whitened", "train__keep_at_epochs": [1]})
    run = pretrain(config, tmp_path / "whitened", show_progress=False)
    records = run.evaluate("density", samples=8, n=4)
    fresh = run.evaluate("density", samples=8, n=4, untrained=True)
    assert {r["metric"] for r in records} == {"nll", "bpd", "elbo"}
    assert records[0]["target"] == "whitened" and records[0]["components"] == 32
    assert all(torch.isfinite(torch.tensor(r["value"])) for r in records + fresh)
    assert run.evaluate("density", epoch=1, samples=8, n=4)[0]["value"] == records[0]["value"]
    assert run.model().decode(torch.zeros(2, 64)).shape == (2, 3, 16, 16)
    assert run.evaluate("knn")[0]["value"] > 0.1

    run = pretrain(preset("digits", **SMALL | {"objective__target": "patches"}), tmp_path / "p", show_progress=False)
    with pytest.raises(InputError, match="is no image, so there is none to decode"):
        run.model().decode(torch.zeros(2, 64))
    with pytest.raises(InputError, match="no density of images"):
        run.evaluate("density", samples=8, n=4)


def test_streamed_photographs(test_data, tmp_path):
    "At 64 pixels, streamed from files: the target is computed batch by batch, and is that of images in memory."
    root = tmp_path / "scenes"
    for split, n in (("train", 30), ("val", 2)):
        for folder in sorted((test_data("tiny-imagenet-scenes") / split).iterdir()):
            shutil.copytree(folder, root / split / folder.name, ignore=lambda _, names, n=n: sorted(names)[n:])
    shared = {"data__name": "folder", "data__root": str(root), "data__image_size": 64, "train__max_steps": 2}
    found = []
    for resident in ("true", "false"):
        config = preset(
            "cifar10", **SMALL | shared, data__resident=resident, objective__target="patches", model__encoder="resnet18"
        )
        run = pretrain(config, tmp_path / resident, show_progress=False)
        found.append(run.metrics()["log_likelihood"][-1])
        assert run.model().target.features.image_size == 32
    assert found[0] == pytest.approx(found[1], rel=1e-3)
