"What holds for the package as a whole: light imports, torchvision's CIFAR-10 files, memory, the page in a browser."

import pickle
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from conftest import watched

BLOCKED = ("plotly", "ipywidgets", "IPython", "nbdev", "fastcore", "anywidget", "jupyterlab", "tensorboard", "pytest")
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder
usual = PathFinder.find_spec
def find_spec(cls, name, *args):
    return None if name.split(".")[0] in {BLOCKED} else usual(name, *args)
PathFinder.find_spec = classmethod(find_spec)
"""


def python(code: str, *args) -> str:
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    loaded = python(
        "import sys, aavae, aavae.train, aavae.evaluation.tasks; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    ).split()
    assert not set(loaded) & {"plotly", "ipywidgets", "IPython", "nbdev", "fastcore"}


def test_trains_and_evaluates_without_notebook_libraries(tmp_path):
    out = python(
        WITHOUT
        + """
from aavae import Run, preset, pretrain
run = pretrain(preset("digits", train__max_epochs=1, train__accelerator="cpu"), out=sys.argv[1])
run = Run.load(sys.argv[1])
features = run.features("test")
print(tuple(features.x.shape), run.evaluate("knn")[0]["value"] > 0.2, run.evaluate("linear")[0]["value"] > 0.2)
""",
        tmp_path / "run",
    )
    assert out.split("\n")[-2] == "(360, 128) True True"


def test_nothing_happens_at_import(tmp_path):
    "Importing every module leaves no file, and does not start CUDA."
    code = """
import importlib, pkgutil, aavae, torch
for module in pkgutil.walk_packages(aavae.__path__, "aavae."):
    if "._" not in module.name:
        importlib.import_module(module.name)
print(torch.cuda.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.stdout.strip() == "False", done.stderr
    assert not any(tmp_path.iterdir())


def test_cifar10_files(tmp_path, monkeypatch):
    """Files of torchvision's format, made here: sizes, the paper's split, channel order, labels, and the error at
    a damaged file."""
    import hashlib

    from torchvision.datasets import CIFAR10

    from aavae.data import CIFAR10_STATS, DataConfig
    from aavae.datasets import load_data
    from aavae.errors import InputError

    rng, folder = np.random.default_rng(0), tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels, labels = rng.integers(0, 256, (6, 20, 3072), dtype=np.uint8), rng.integers(0, 10, (6, 20)).tolist()
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, x, y in zip(files, pixels, labels, strict=True):
        (folder / name).write_bytes(pickle.dumps({"data": x, "labels": y}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane"]}))

    def md5(name: str) -> str:
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", md5(f"data_batch_{i}")] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5("test_batch")]])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5("batches.meta")})
    data = load_data(DataConfig("cifar10", str(tmp_path), val_size=10))
    assert [len(data.split(s)) for s in ("train", "val", "test")] == [90, 10, 20]
    test = data.split("test")
    assert (
        torch.equal(test.images[3], torch.from_numpy(pixels[5, 3].reshape(3, 32, 32)))
        and test.labels.tolist() == labels[5]
    )
    assert (data.mean, data.std) == CIFAR10_STATS and data.label == "CIFAR-10"
    with (folder / "test_batch").open("ab") as f:
        f.write(b"x")
    with pytest.raises(InputError, match="--data.download true"):
        load_data(DataConfig("cifar10", str(tmp_path))).split("test")


def test_knn_memory():
    "50,000 x 2,048 features against many queries stay under 2 GB."
    used = float(
        python("""
import resource, torch
from aavae.online import knn_scores
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bank, query, y = torch.rand(50_000, 2048), torch.rand(10_000, 2048), torch.randint(10, (50_000,))
knn_scores(bank, y, query[:1024], 10, (20, 200))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
""")
    )
    assert used < 2


def visit(page, path, check=lambda width: None) -> str:
    """Opens a report at three widths, in light and dark, and in print; asserts no error, no request to another
    host, no overflow. Returns its text."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(path.parent)))
    Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    with watched(page) as (errors, requests):
        try:
            for scheme, width in product(("light", "dark"), (390, 1280, 1920)):
                page.emulate_media(color_scheme=scheme)
                page.set_viewport_size({"width": width, "height": 900})
                page.goto(f"{here}/{path.name}", wait_until="load")
                page.wait_for_selector(".js-plotly-plot .main-svg")
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                outside = page.evaluate(
                    """[...document.querySelectorAll('.matrices > div')].filter(d => d.querySelector('.main-svg')
                    && d.querySelector('.main-svg').getBoundingClientRect().width > d.clientWidth + 1).length"""
                )
                assert outside == 0, f"{outside} matrices are wider than their frame at {width} pixels"
            assert page.pdf().startswith(b"%PDF")
            text = page.inner_text("body")
        finally:
            server.shutdown()
            page.emulate_media(color_scheme="light")
    assert not errors
    assert requests and not [u for u in requests if not u.startswith((here, "data:", "blob:"))]
    return text


def cells(page, caption: str) -> dict[str, list[str]]:
    "The rows of the table whose caption begins so, by their heading."
    table = page.locator("table").filter(has=page.locator("caption", has_text=caption))
    assert table.count() == 1
    return {
        row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()
    }


def test_demo_page_in_a_browser(page, tmp_path):
    "The demo's page shows its table, figures and pictures, asks no other host for anything, and logs no error."
    from aavae.tools.demo import demo

    small = dict(data__image_size=16, data__val_size=6000, objective__patches=8, objective__components=8)
    path = demo(tmp_path / "demo", **small, train__max_steps=3, train__warmup_epochs=0)
    assert path.stat().st_size < 6e6
    text = visit(page, path)
    for name in ("raw pixels", "untrained", "recipe", "AAVAE", "25 labels per class", "Why AAVAE needs more"):
        assert name in text
    assert list(cells(page, "Top-1 accuracy")) == ["raw pixels", "untrained", "recipe", "AAVAE"]
    assert list(cells(page, "Mean cosines")) == ["recipe", "AAVAE", "untrained"]
    assert page.locator("img").count() >= 5 and page.locator(".matrices .js-plotly-plot").count() == 3


def test_report_in_a_browser(page, quick_aavae, tmp_path):
    "`aavae report` of one run: all sections, and the numbers that `view_similarity` computes."
    from aavae import Run, preset, pretrain
    from aavae.evaluation.similarity import view_similarity
    from aavae.explore.report import similarity_row
    from aavae.run import Subject

    pretrain(
        preset("digits", train__max_epochs=2, train__knn_every_n_epochs=1, train__accelerator="cpu"),
        tmp_path / "run",
        show_progress=False,
    ).evaluate("knn")
    done = quick_aavae("report", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "run" / "report.html"
    assert done.stdout.strip() == str(path) and path.stat().st_size < 6e6
    visit(page, path)
    assert page.locator("h2").all_inner_texts() == [
        "Results",
        "Training",
        "Reconstructions",
        "Views of one image",
        "Records",
        "Configuration",
    ]
    assert page.locator(".missing").count() == 0 and page.locator("img").count() == 2
    run, shown = Run.load(tmp_path / "run"), cells(page, "Mean cosines")
    assert shown == {
        name: similarity_row(view_similarity(Subject(run, untrained=untrained)).numbers)
        for name, untrained in (("AAVAE", False), ("untrained", True))
    }
    drawn = page.evaluate(
        """[...document.querySelectorAll('.matrices .js-plotly-plot')].map(p => p.data[1].z.map(row =>
        [...row]).filter(row => row.some(v => v !== null)).map(row => row.filter(v => v !== null)))"""
    )
    for z, untrained in zip(drawn, (False, True), strict=True):
        assert np.allclose(z, view_similarity(Subject(run, untrained=untrained)).matrix, atol=0.0051)


def test_report_of_a_bare_encoder(quick_aavae, tmp_path):
    "A run without checkpoint, metrics and data still gets its page, and one line for each part that it lacks."
    import re

    from aavae import preset, pretrain

    run = pretrain(
        preset("digits", train__max_steps=2, train__accelerator="cpu"), tmp_path / "run", show_progress=False
    )
    run.checkpoint.unlink()
    (run.path / "metrics.csv").unlink()
    config = run.path / "config.yaml"
    config.write_text(
        config.read_text().replace("name: digits", "name: folder").replace("root: null", f"root: {tmp_path / 'gone'}")
    )
    done = quick_aavae("report", run.path)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r'class="missing">(.*?)</p>', (run.path / "report.html").read_text())
    assert [line.split(":")[0] for line in lines] == [
        "Nothing has been measured yet",
        "No curves of AAVAE",
        "No reconstructions",
        "No cosines of AAVAE",
    ]
    assert "gone is not a folder" in lines[-1]


def test_one_version():
    "CITATION.cff, CHANGELOG.md and the package name the same version, and the types are marked as such."
    import re

    import yaml

    import aavae

    top = Path(__file__).parent.parent
    assert yaml.safe_load((top / "CITATION.cff").read_text())["version"] == aavae.__version__
    assert re.search(r"^## (\S+)", (top / "CHANGELOG.md").read_text(), re.M)[1] == aavae.__version__
    assert (Path(aavae.__file__).parent / "py.typed").is_file()
