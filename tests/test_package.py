"What holds for the package as a whole: light imports, torchvision's CIFAR-10 files, memory, the page in a browser."
import pickle
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

BLOCKED = ("plotly", "ipywidgets", "IPython", "nbdev", "fastcore", "anywidget", "jupyterlab", "tensorboard", "pytest")
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder
usual = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, *args: None if name.split(".")[0] in {BLOCKED} else usual(name, *args))
"""


def python(code: str, *args) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    loaded = python("import sys, aavae, aavae.train, aavae.evaluate; print(*sorted({m.split('.')[0] for m in sys.modules}))").split()
    assert not set(loaded) & {"plotly", "ipywidgets", "IPython", "nbdev", "fastcore"}


def test_trains_and_evaluates_without_notebook_libraries(tmp_path):
    out = python(WITHOUT + """
from aavae import Run, preset, pretrain
run = pretrain(preset("digits", train__max_epochs=1, train__accelerator="cpu"), out=sys.argv[1])
run = Run.load(sys.argv[1])
features = run.features("test")
print(tuple(features.x.shape), run.evaluate("knn")[0]["value"] > 0.2, run.evaluate("linear")[0]["value"] > 0.2)
""", tmp_path / "run")
    assert out.split("\n")[-2] == "(360, 128) True True"


def test_nothing_happens_at_import(tmp_path):
    "Importing every module leaves no file, and does not start CUDA."
    code = "import pkgutil, importlib, aavae, torch; [importlib.import_module('aavae.' + m.name) for m in pkgutil.iter_modules(aavae.__path__) if m.name[0] != '_']; print(torch.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.stdout.strip() == "False", done.stderr
    assert not any(tmp_path.iterdir())


def test_cifar10_files(tmp_path, monkeypatch):
    "Files of torchvision's format, made here: sizes, the paper's split, channel order, labels, and the error at a damaged file."
    import hashlib
    from torchvision.datasets import CIFAR10
    from aavae.data import CIFAR10_STATS, DataConfig, InputError, load_data
    rng, folder, sums = np.random.default_rng(0), tmp_path / "cifar-10-batches-py", {}
    folder.mkdir()
    pixels, labels = rng.integers(0, 256, (6, 20, 3072), dtype=np.uint8), rng.integers(0, 10, (6, 20)).tolist()
    for name, x, y in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], pixels, labels):
        (folder / name).write_bytes(pickle.dumps({"data": x, "labels": y}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane"]}))
    md5 = lambda name: hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", md5(f"data_batch_{i}")] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5("test_batch")]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5("batches.meta")})
    data = load_data(DataConfig("cifar10", str(tmp_path), val_size=10))
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [90, 10, 20]
    test = data.split("test")
    assert torch.equal(test.images[3], torch.from_numpy(pixels[5, 3].reshape(3, 32, 32))) and test.labels.tolist() == labels[5]
    assert (data.mean, data.std) == CIFAR10_STATS and data.label == "CIFAR-10"
    with (folder / "test_batch").open("ab") as f: f.write(b"x")
    with pytest.raises(InputError, match="--data.download true"): load_data(DataConfig("cifar10", str(tmp_path))).split("test")


def test_knn_memory():
    "50,000 x 2,048 features against many queries stay under 2 GB."
    used = float(python("""
import resource, torch
from aavae.encoder import knn_scores
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bank, query, y = torch.rand(50_000, 2048), torch.rand(10_000, 2048), torch.randint(10, (50_000,))
knn_scores(bank, y, query[:1024], 10, (20, 200))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""))
    assert used < 2


def test_demo_page_in_a_browser(page, tmp_path):
    "The demo's page shows its table and figures, asks no other host for anything, and logs no error."
    from aavae.demo import demo
    path = demo(tmp_path / "demo", train__max_epochs=1, train__knn_every_n_epochs=0)
    assert path.stat().st_size < 6e6
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(path.parent)))
    Thread(target=server.serve_forever, daemon=True).start()
    errors, requests, here = [], [], f"http://127.0.0.1:{server.server_port}"
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" and "favicon" not in (m.location or {}).get("url", "") else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    try:
        for width in (390, 1280, 1920):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(f"{here}/report.html", wait_until="load")
            page.wait_for_selector(".js-plotly-plot .main-svg")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
    finally: server.shutdown()
    text = page.inner_text("body")
    for name in ("raw pixels", "untrained", "AE", "AAAE", "VAE", "AAVAE", "10 labels per class"): assert name in text
    assert page.locator("table").count() >= 1 and page.locator("img").count() >= 4
    assert not errors
    assert not [u for u in requests if not u.startswith((here, "data:", "blob:"))]
