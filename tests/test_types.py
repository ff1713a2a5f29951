"The types that the package promises, as mypy --strict sees them in a user's code."

import subprocess
import sys

import pytest

USE = """
from pathlib import Path
from typing import Any, assert_type

from aavae import AAVAE, Config, Features, ImageEncoder, ModelConfig, Run, preset, pretrain
from aavae.tools.embed import embed_folder
from aavae.tools.export import export_encoder, load_from_hub
from torch import Tensor

def use(path: Path, images: Tensor) -> None:
    config = preset("digits", train__max_epochs=1)
    assert_type(config, Config)
    run = pretrain(config, out=path, resume=True)
    assert_type(run, Run)
    assert_type(Run.load(str(path)).encoder(epoch=3), ImageEncoder)
    assert_type(run.features("test"), Features)
    assert_type(run.features().x, Tensor)
    assert_type(run.evaluate("knn"), list[dict[str, Any]])
    model = run.model()
    assert isinstance(model, AAVAE)
    assert_type(model.encode(images), tuple[Tensor, Tensor | None])
    assert_type(embed_folder(run, "photos", "photos.npz"), dict[str, Any])
    assert_type(export_encoder(run, "onnx", epoch=3), tuple[list[Path], float])
    assert_type(load_from_hub("user/name"), ImageEncoder)
"""

WRONG = {
    "ModelConfig(encoder='resnet19')": "arg-type",
    "pretrain('digits', out='runs')": "arg-type",
    "Run.load(3)": "arg-type",
    "preset('digits').train.learning_rate": "attr-defined",
    "export_encoder(Run.load('r'), 'tf')": "arg-type",
    "Run.load('r').encoder(untrained='yes')": "arg-type",
}


def check(folder, code: str) -> str:
    pytest.importorskip("mypy")
    (folder / "use.py").write_text(code)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--follow-imports=silent",
            "--no-error-summary",
            "--cache-dir",
            folder / "cache",
            folder / "use.py",
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.stdout + done.stderr


def test_the_public_interface(tmp_path):
    "A user's code passes, and mypy sees the package's own types: each mistake is found, and nothing else."
    assert check(tmp_path, USE) == ""
    found = check(tmp_path, USE + "\n" + "\n".join(WRONG) + "\n")
    first = len(USE.splitlines()) + 2
    assert [line.split(":")[1] + line.rsplit("[", 1)[1] for line in found.splitlines()] == [
        f"{first + i}{code}]" for i, code in enumerate(WRONG.values())
    ], found
