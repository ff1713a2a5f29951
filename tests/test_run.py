"Runs, configurations and locks: what crosses their modules."

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import aavae
from aavae import DataConfig, InputError, Run, Subject, preset, pretrain
from aavae.config import make_config, read_yaml
from aavae.files import locked, writer, writing
from aavae.words import below_untrained, results_table


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    "A finished run of three steps."
    config = preset("digits", train__max_steps=3, train__knn_every_n_epochs=0)
    return pretrain(config, tmp_path_factory.mktemp("run") / "run", show_progress=False)


def python(code: str, **options) -> subprocess.CompletedProcess:
    "Runs Python code in a process of its own."
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **options)


def test_public_names_have_docstrings():
    names = [name for name in vars(aavae) if not name.startswith("_")]
    public = [getattr(aavae, name) for name in names if not inspect.ismodule(getattr(aavae, name))]
    assert len(public) > 20
    for item in public:
        text = vars(item).get("__doc__") if inspect.isclass(item) else item.__doc__
        assert text and not text.startswith(f"{item.__name__}("), item  # a dataclass makes itself one of its fields


@pytest.mark.parametrize("module", ["aavae", "aavae.cli"])
def test_the_command_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.startswith("usage: aavae COMMAND"), done.stderr


def test_no_module_needs_unix():
    only_unix = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
    for path in sorted(Path(aavae.__file__).parent.rglob("*.py")):
        at_import = ast.parse(path.read_text("utf-8")).body
        names = {a.name for node in at_import if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module for node in at_import if isinstance(node, ast.ImportFrom)}
        assert not names & only_unix, path


def test_without_the_locks_of_unix(tmp_path):
    code = f"""
import sys, warnings
sys.modules["fcntl"] = None
warnings.simplefilter("ignore")
import aavae, aavae.cli
from aavae.files import locked, writer, writing
with writing({str(tmp_path)!r}):
    assert writer({str(tmp_path)!r}).startswith("process ")
    try:
        with writing({str(tmp_path)!r}, patience=0):
            raise SystemExit("two writers")
    except aavae.InputError as e:
        assert "is being written by process" in str(e), e
with locked({str(tmp_path)!r}):
    pass
assert writer({str(tmp_path)!r}) is None
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_records_of_many_processes(run):
    "Processes that add records at the same time lose none."
    before = len(run.records())
    code = f"""
import time
from aavae import Run, Subject
from aavae.records import Measurement, make_record
run = Run.load({str(run.path)!r})
for k in KS:
    what = Measurement("knn", run.data(), "test", 360, time.time(), {{"k": k}})
    run.add_records([make_record(Subject(run), what, "top1", [0.5])])
"""
    started = [
        subprocess.Popen([sys.executable, "-c", code.replace("KS", ks)], stderr=subprocess.PIPE, text=True)
        for ks in ("(1, 2, 3)", "(4, 5, 6)")
    ]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert len(run.records()) == before + 6


@pytest.mark.parametrize("out", [os.fsdecode(b"runs/\xff"), "file", "file/below/run", "/proc/none/run"])
def test_an_out_that_cannot_be(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    config = preset("digits", train__max_steps=1)
    with pytest.raises(InputError, match="choose another --out") as raised:
        pretrain(config, out, show_progress=False)
    assert len(str(raised.value).splitlines()) == 1
    assert [p.name for p in tmp_path.rglob("*")] == ["file"]


def test_only_one_writer(tmp_path):
    with writing(tmp_path):
        done = python(f"from aavae.files import *\nwith writing({str(tmp_path)!r}, patience=0.2): pass")
        assert f"is being written by process {os.getpid()} on" in done.stderr
    assert writer(tmp_path) is None
    with locked(tmp_path), writing(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_image_is_refused(run):
    images = run.data().split("test").images[:8]
    encoder = run.encoder()
    as_floats = images.float() / 255
    assert torch.allclose(encoder(images), encoder(as_floats), atol=1e-5)
    normalised = (as_floats - as_floats.mean()) / as_floats.std()
    for wrong in (images.float(), normalised, as_floats * torch.nan, images.int()):
        with pytest.raises(InputError, match=r"give 8-bit images \(torch.uint8\), or floats in \[0, 1\]"):
            encoder(wrong)
    untrained = Subject(run, untrained=True).encoder()
    with pytest.raises(InputError, match="or floats in"):
        untrained(images.float())


def test_paths_and_texts(tmp_path):
    folder = tmp_path / "2024"
    for config in (
        preset("digits", data__name="folder", data__root=folder),
        make_config({"data.name": "folder", "data.root": folder}),
        aavae.Config(data=DataConfig("folder", root=folder)),
    ):
        (tmp_path / "config.yaml").write_text(config.to_yaml())
        assert f"root: {folder}\n" in config.to_yaml()
        assert make_config(read_yaml(tmp_path / "config.yaml")) == config
    text = "data:\n  name: folder\n  root: 2024\n  download: true\ntrain:\n  max_time: 12:00:00\n"
    (tmp_path / "config.yaml").write_text(text)
    config = make_config(read_yaml(tmp_path / "config.yaml"))
    assert (config.data.root, config.data.download, config.train.max_seconds) == ("2024", True, 43200)
    (tmp_path / "config.yaml").write_text("data:\n  root: yes\nobjective:\n  name: no\n")
    values = read_yaml(tmp_path / "config.yaml")
    assert values == {"data.root": "yes", "objective.name": "no"}
    with pytest.raises(InputError, match=r"^there is no objective.name no; did you mean dino\?$"):
        make_config(values)


def test_images_that_moved(run, tmp_path, monkeypatch):
    "A relative root from another directory is named with that directory, and another root can be given."
    config = make_config({"data.name": "folder", "data.root": "photos", "data.image_size": 16})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(InputError) as raised:
        Run.load(tmp_path / "run").data()
    assert f"data.root photos of {tmp_path / 'run'} is not in {tmp_path / 'elsewhere'}" in str(raised.value)
    assert "data_root=" in str(raised.value)
    photos = tmp_path / "photos" / "train"
    from PIL import Image

    for name in ("cat", "dog"):
        (photos / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(photos / name / f"{i}.png")
    data = Run.load(tmp_path / "run", data_root=tmp_path / "photos").data()
    assert data.classes == ["cat", "dog"]


def test_the_warmup_follows_a_shorter_run(capsys):
    assert preset("digits", train__max_epochs=20).train.warmup_epochs == 2
    assert "note: train.warmup_epochs is 2 instead of 5, a tenth of the 20 epochs" in capsys.readouterr().err
    assert preset("digits", train__max_epochs=20, train__warmup_epochs=5).train.warmup_epochs == 5
    assert preset("digits", train__max_epochs=100).train.warmup_epochs == 5
    assert preset("digits").train.warmup_epochs == 5
    assert capsys.readouterr().err == ""


def test_a_training_that_made_it_worse_is_said(run):
    "The sentence appears from records as they are measured, and names what was measured."
    records = run.evaluate("knn", ks=(20,)) + run.evaluate("knn", ks=(20,), untrained=True)
    trained, untrained = ({**r, "value": v} for r, v in zip(records, (0.4, 0.6), strict=True))
    said = below_untrained([trained, untrained])
    assert said.startswith("Below the same network before training: aavae by kNN k=20 (40.00 against 60.00).")
    assert below_untrained([{**trained, "value": 0.7}, untrained]) == ""


def test_the_papers_protocol_is_named(run):
    (record,) = run.evaluate("knn", ks=(20,))
    linear = record | {"task": "linear", "eval": record["eval"] | {"dataset": "cifar10", "hyperparameters": {}}}
    on_views = linear | {"eval": linear["eval"] | {"views": True}}
    assert [row["paper"] for row in results_table([linear, on_views])] == ["87.14 (probe on views)", "87.14"]
