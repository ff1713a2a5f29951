"""The explorers in a real JupyterLab: each notebook is opened in a headless browser and run.

A control is moved, and what is shown is compared with what Python computes."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

NOTEBOOKS = Path(__file__).parent.parent / "nbs" / "explore"
RESULTS = "../../results/cifar10-jpeg-small-450k"  # what the notebooks of studies open
COMPARED = "../../results/cifar10-jpeg-small-compare"
QUIET = '{"fetchNews": "false", "checkForUpdates": false}'  # no request to another host


def made_up_records(run, i: int, epochs: int, with_density: bool):
    "Adds records of variant number `i` that are made up."
    from aavae.records import Measurement, make_record
    from aavae.run import Subject

    def record(task, metric, value, split="test", **hyperparameters):
        what = Measurement(task, run.data(), split, 360, time.time(), hyperparameters, (run.config.train.seed,))
        r = make_record(Subject(run), what, metric, [value])
        run.add_records([r | {"pretrain": r["pretrain"] | {"epochs": epochs, "views_seen": 1280 * epochs}}])

    record("linear", "top1", 0.6 + 0.01 * epochs - 0.02 * i)
    record("knn", "top1", 0.5 + 0.02 * epochs - 0.03 * i * i + 0.01 * (-1) ** epochs, k=20)
    for split, proposal in product(("train", "test"), ("clean", "view")) if with_density else ():
        bpd = 6 - 0.3 * epochs + 0.1 * (split == "test") + 0.2 * (proposal == "view") + 0.5 * i
        record("density", "bpd", bpd, split, samples=8, proposal=proposal)


def made_up_study(out: Path, source: Path, variants: dict[str, dict], milestones: tuple[int, ...]):
    "Copies of a run with other configurations and with records that are made up, as a study would leave them."
    from aavae import Run
    from aavae.config import make_config

    for i, (name, changes) in enumerate(variants.items()):
        shutil.copytree(source, out / "runs" / name)
        run = Run(out / "runs" / name, make_config(changes, Run.load(source).config))
        (run.path / "config.yaml").write_text(run.config.to_yaml())
        for epochs in milestones:
            made_up_records(run, i, epochs, len(milestones) > 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The notebooks, with two tiny runs where they look for them, and two made-up studies in place of the results."
    from aavae import Run
    from aavae.explore import digits_run
    from aavae.explore.compare import store_neighbours

    folder = tmp_path_factory.mktemp("explore")
    for path in NOTEBOOKS.glob("*.ipynb"):
        study = {"3_density": "runs/density", "5_sensitivity": "runs/beta"}.get(path.stem, "")
        text = path.read_text().replace(RESULTS, study).replace(COMPARED, "runs/compare")
        for zoo, tiny in {"aavae": "aavae", "plus": "aavae", "aaae": "vae"}.items():
            text = text.replace(f"zoo:{zoo}-cifar10-small", f"runs/{tiny}")
        (folder / path.name).write_text(text)
    tiny = dict(train__max_epochs=2, train__warmup_epochs=1, train__knn_every_n_epochs=1, train__accelerator="cpu")
    shared = folder / "cache/aavae/runs"
    digits_run(shared / "digits-aavae", **tiny)
    digits_run(shared / "digits-vae", objective__name="vae", **tiny)
    (folder / "runs").mkdir()
    for name in ("aavae", "vae"):
        (folder / "runs" / name).symlink_to(shared / f"digits-{name}")
    logscales = {"vae-seed0": {}, "vae-logscale-learned-seed0": {"objective.learn_logscale": True}}
    made_up_study(folder / "runs/density", folder / "runs/vae", logscales, (2, 4, 6, 8))
    betas = {
        f"beta{b:g}-seed{s}": {"objective.name": "beta", "objective.beta": b, "train.seed": s}
        for b, s in product((0.01, 0.1, 10.0), (0, 1))
    }
    made_up_study(folder / "runs/beta", folder / "runs/vae", betas, (3,))
    methods = {f"{name}-seed0": {"objective.name": name} for name in ("aavae", "simclr")}
    made_up_study(folder / "runs/compare", folder / "runs/vae", methods, (2, 4))
    store_neighbours(folder / "runs/compare", images=Run.load(folder / "runs/vae").data())
    return folder


@pytest.fixture(scope="module")
def lab(folder, tmp_path_factory):
    "The address of a JupyterLab on loopback with a token, in a process group that ends with the tests."
    pytest.importorskip("jupyterlab", reason="no JupyterLab here")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    home = tmp_path_factory.mktemp("jupyter")
    settings = home / "JUPYTERLAB_SETTINGS_DIR/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(QUIET)
    env = os.environ | {
        name: str(home / name)
        for name in (
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_DATA_DIR",
            "JUPYTER_RUNTIME_DIR",
            "IPYTHONDIR",
            "JUPYTERLAB_SETTINGS_DIR",
            "JUPYTERLAB_WORKSPACES_DIR",
        )
    }
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(NOTEBOOKS.parent.parent), env.get("PYTHONPATH")]))}
    env |= {"XDG_CACHE_HOME": str(folder / "cache")}
    env.pop("IN_TEST", None)
    with open(home / "log", "w") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--ip=127.0.0.1",
                f"--port={port}",
                "--ServerApp.token=secret",
                "--ServerApp.port_retries=0",
                f"--ServerApp.root_dir={folder}",
                "--LabApp.news_url=",
                "--LabApp.expose_app_in_browser=True",
                "--allow-root",
            ],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        for _ in range(1800):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None, (home / "log").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


class Visit:
    "A notebook that is opened and run; `errors`: complaints of the console, `elsewhere`: requests to other hosts."

    def __init__(self, browser, lab: str, name: str):
        self.page, self.errors, self.elsewhere = browser.new_page(viewport={"width": 1280, "height": 800}), [], []
        self.page.set_default_timeout(60_000)
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on(
            "request",
            lambda r: (
                None
                if r.url.startswith((lab, lab.replace("http", "ws"), "data:", "blob:"))
                else self.elsewhere.append(r.url)
            ),
        )
        self.page.goto(f"{lab}/lab/tree/{name}?token=secret&reset")
        self.page.wait_for_function(
            "window.jupyterapp?.shell.currentWidget && document.querySelector('.jp-Notebook .jp-Cell')"
        )
        self.page.evaluate("window.jupyterapp.shell.currentWidget.context.sessionContext.ready")
        self.page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        self.page.wait_for_selector(".aavae-explorer")
        self.box = self.page.locator(".aavae-explorer")

    def move(self, label: str, key: str = "ArrowRight", times: int = 1):
        "Moves the slider with this label by the keyboard."
        handle = (
            self.box.locator(".widget-hslider", has=self.page.locator("label", has_text=re.compile(f"^{label}$")))
            .locator("[role=slider]")
            .last
        )
        handle.focus()
        for _ in range(times):
            handle.press(key)

    def choose(self, label: str, text: str):
        self.box.locator(".widget-dropdown", has=self.page.locator("label", has_text=re.compile(f"^{label}$"))).locator(
            "select"
        ).select_option(label=text)

    def image(self, alt: str, nth: int = 0) -> np.ndarray:
        "The pixels `(h, w, 4)` of a picture in the box."
        src = self.box.locator(f'img[alt="{alt}"]').nth(nth).get_attribute("src")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(src.split(",")[1]))))

    def until(self, check, seconds: float = 30):
        "Waits until `check` holds; what it last complained about is raised."
        from playwright.sync_api import Error

        end = time.time() + seconds
        while True:
            try:
                return check()
            except (AssertionError, Error):  # an error of the page: a figure that has no traces yet, say
                if time.time() > end:
                    raise
            self.page.wait_for_timeout(50)

    def figure(self, expression: str):
        return self.box.locator(".js-plotly-plot").first.evaluate(f"g => {expression}")

    def place(self, across: str, down: str, axis: str = "") -> list[float]:
        "Where on the page a place of the figure is, given in pixels by expressions of the axes `x` and `y`."
        axes = f"g.getBoundingClientRect(), g._fullLayout.xaxis{axis}, g._fullLayout.yaxis{axis}"
        return self.figure(f"((box, x, y) => [box.x + x._offset + {across}, box.y + y._offset + {down}])({axes})")

    def click(self, at: list[float]):
        "A click as by a hand: the pointer comes near, then is there."
        self.page.mouse.move(at[0] - 3, at[1])
        self.page.wait_for_timeout(200)
        self.page.mouse.move(*at)
        self.page.wait_for_timeout(200)
        self.page.mouse.click(*at)

    def close(self):
        stderr = self.page.locator(
            '.jp-RenderedText[data-mime-type="application/vnd.jupyter.stderr"]'
        ).all_inner_texts()
        problems = self.box.locator(".aavae-problem").all_inner_texts()
        self.page.evaluate("window.jupyterapp.shell.currentWidget.context.sessionContext.shutdown()")
        self.page.close()
        assert (self.errors, self.elsewhere, stderr, problems) == ([], [], [], [])


@pytest.fixture
def visit(browser, lab):
    opened = []

    def go(name):
        opened.append(Visit(browser, lab, name))
        return opened[-1]

    yield go
    for v in opened:
        v.close()


def same(shown: np.ndarray, x: torch.Tensor):
    "A strip of pictures is that of images `(n, 3, s, s)` in [0, 1], but for one level of grey."
    n, _, s, _ = x.shape
    tiles = shown.reshape(s, n, -1, 4)[:, :, :s].transpose(1, 3, 0, 2)
    assert tiles[:, 3].min() == 255
    assert np.abs(tiles[:, :3].astype(int) - (255 * x.clamp(0, 1)).round().numpy().astype(int)).max() <= 1


def test_augmentations(visit):
    from aavae import DataConfig, load_data, preset, random_views

    v = visit("1_augmentations.ipynb")
    v.move("grey p", times=4)
    v.move("flip", "End")
    v.move("image", times=3)
    images, index = load_data(DataConfig("cifar10-mini")).split("test"), torch.tensor([3])
    config = preset("cifar10", views__grey_p=0.4, views__flip=1.0).views
    expected = torch.cat([random_views(images.images_at(index), config, 0, k, index) for k in range(6)])
    v.until(lambda: same(v.image("views 0 – 5"), expected))
    same(v.image("original"), images.images_at(index) / 255)
    text = v.box.locator("textarea").input_value()
    assert "grey_p: 0.4" in text and "flip: 1.0" in text


def test_reconstructions(visit, folder):
    from aavae import Run
    from aavae.rng import permutation

    v = visit("2_reconstructions.ipynb")
    v.move("noise t", times=10)
    v.move("first image", times=2)
    for nth, name in enumerate(("aavae", "vae")):
        model, data = Run.load(folder / "runs" / name).model(), Run.load(folder / "runs" / name).data()
        index = permutation(0, 0, 360)[2:10]
        with torch.no_grad():
            mu, std = model.encode(model.view(data.split("test").images_at(index), index, epoch=0))
            x = model.decode(model.sample(mu, 2.0 * std, index, epoch=0)) * model.normalize.std + model.normalize.mean
        v.until(lambda nth=nth, x=x: same(v.image("from a sample", nth), x))
    v.box.locator(".lm-TabBar-tab", has_text="Interpolation").click()
    v.until(lambda: same(v.image("from and to"), data.split("test").images_at(permutation(0, 0, 360)[:2]) / 255))
    v.box.locator(".lm-TabBar-tab", has_text="Neighbours").click()
    v.move("image", times=4)
    h, query = (
        torch.nn.functional.normalize(Run.load(folder / "runs/vae").features("test").x, dim=1),
        permutation(0, 0, 360)[4],
    )
    near = (h @ h[query]).index_fill(0, query, -2).topk(8).indices
    v.until(lambda: same(v.image("nearest", 1), data.split("test").images_at(near) / 255))


def test_similarity(visit, folder):
    from aavae import Run
    from aavae.evaluation.similarity import view_similarity

    v = visit("4_similarity.ipynb")
    v.choose("layer", "mu")
    v.choose("cosines", "raw")
    v.move("images", "Home")
    s = view_similarity(Run.load(folder / "runs/aavae"), 2, 6, "mu")

    def shown():
        z = np.array(
            [[np.nan if c is None else c for c in row] for row in v.figure("g.data[0].z.map(r => Array.from(r))")],
            dtype=float,
        )
        assert z.shape == (13, 13) and np.abs(z[~np.isnan(z)].reshape(12, 12) - s.raw.numpy()).max() < 0.006

    v.until(shown)
    # a click on row 9 (image 2, view 3), column 1 (image 1, view 2)
    x, y = v.figure("[(g.data[0].x[1] + g.data[0].x[2]) / 2, (g.data[0].y[9] + g.data[0].y[10]) / 2]")
    v.box.locator(".js-plotly-plot").scroll_into_view_if_needed()
    v.click(v.place(f"x.l2p({x})", f"y.l2p({y})"))
    first, second = Run.load(folder / "runs/aavae").data().split("test").labels[s.index].tolist()
    v.until(lambda: same(v.image(f"row: image 2 ({second}), view 3"), s.views[1, 2][None]))
    same(v.image(f"column: image 1 ({first}), view 2"), s.views[0, 1][None])
    assert f"cosine {s.raw[8, 1]:.3f}, raw" in v.box.inner_text()


def test_map(visit, folder):
    from aavae import Run
    from aavae.explore.maps import pca
    from aavae.rng import permutation

    v = visit("6_map.ipynb")
    run, index = Run.load(folder / "runs/aavae"), permutation(0, 0, 360)
    points = pca(run.features("test").x[index])[0]
    v.until(lambda: np.testing.assert_allclose(v.figure("Array.from(g._fullData[0].x)"), points[:, 0], atol=1e-3))
    assert v.figure("g._fullData[0].type") == "scattergl" and v.box.locator("canvas.gl-canvas").count()
    labels = run.data().split("test").labels[index]
    v.choose("class", "3")
    v.until(
        lambda: np.testing.assert_array_equal(v.figure("g._fullData[0].selectedpoints"), (labels == 3).nonzero()[:, 0])
    )
    v.choose("class", "all")
    alone = (torch.cdist(points, points) + 1e9 * torch.eye(360)).min(1).values.argmax().item()  # no other point is near
    v.box.locator(".js-plotly-plot").scroll_into_view_if_needed()

    def place():
        return v.place(f"x.l2p({points[alone, 0]})", f"y.l2p({points[alone, 1]})")

    at = place()
    v.page.mouse.move(at[0] + 2, at[1] + 1)
    v.page.wait_for_timeout(200)
    v.page.mouse.move(*at)
    v.until(
        lambda: same(
            v.image(f"{labels[alone]}, image {index[alone]}"),
            run.data().split("test").images_at(index[alone][None]) / 255,
        )
    )
    v.box.locator('.modebar-btn[data-title="Lasso Select"]').click()
    v.until(lambda: np.testing.assert_equal(v.figure("g._fullLayout.dragmode"), "lasso"))

    def selected():
        "A lasso around the point, slow enough for plotly to see each corner."
        x, y = place()
        v.page.mouse.move(x - 12, y - 12)
        v.page.mouse.down()
        for dx, dy in ((12, -12), (12, 12), (-12, 12), (-12, -12)):
            v.page.mouse.move(x + dx, y + dy, steps=4)
            v.page.wait_for_timeout(100)
        v.page.mouse.up()
        v.page.wait_for_timeout(1000)
        assert f"1 selected: {labels[alone]} (1)" in v.box.inner_text()

    v.until(selected)


def test_density(visit, folder):
    "The accuracy that the scatter shows is the one chosen; a box around all milestones gives their rank correlation."
    from aavae.evaluation.density import rank_correlation

    v = visit("3_density.ipynb")
    records = [
        r | {"run": path.parent.name}
        for path in sorted((folder / "runs/density/runs").glob("*/results.json"))
        for r in json.loads(path.read_text())
    ]
    v.choose("proposal", "view")
    v.choose("accuracy", "kNN k=20")
    accuracy = {
        (r["run"], r["pretrain"]["views_seen"]): 100 * r["value"]
        for r in records
        if r["task"] == "knn" and not r["untrained"] and r["eval"]["hyperparameters"]["k"] == 20
    }
    pairs = [
        (r["value"], accuracy[r["run"], r["pretrain"]["views_seen"]])
        for r in records
        if r["metric"] == "bpd"
        and not r["untrained"]
        and r["eval"]["hyperparameters"]["proposal"] == "view"
        and r["eval"]["split"] != "train"
    ]

    def shown():
        np.testing.assert_allclose(
            sorted(
                v.figure(
                    "g._fullData.filter(t => t.xaxis == 'x2' && t.hoverinfo != 'skip')"
                    ".flatMap(t => Array.from(t.x, (x, i) => [x, t.y[i]]))"
                )
            ),
            sorted(map(list, pairs)),
            atol=1e-4,
        )

    v.until(shown)
    rho, low, high = rank_correlation(*map(list, zip(*pairs, strict=True)))

    def said():
        assert (
            f"{len(pairs)} milestones: rank correlation {rho:.2f} (95% from {low:.2f} to {high:.2f})"
            in v.box.inner_text()
        )

    v.until(said)
    v.page.mouse.move(*v.place("2", "2", axis="2"))
    v.page.mouse.down()
    v.page.mouse.move(*v.place("x._length - 2", "y._length - 2", axis="2"), steps=8)
    v.page.mouse.up()

    def chosen():
        assert f"{len(pairs)} milestones chosen: rank correlation {rho:.2f}" in v.box.inner_text()

    v.until(chosen)


def test_sensitivity(visit, folder):
    "The points are the means of the records; a click on one opens a run behind it."
    v = visit("5_sensitivity.ipynb")
    v.choose("measure", "kNN k=20")
    by = {}
    for path in sorted((folder / "runs/beta/runs").glob("*/results.json")):
        for r in json.loads(path.read_text()):
            if (
                r["task"] == "knn"
                and r["metric"] == "top1"
                and not r["untrained"]
                and r["eval"]["hyperparameters"]["k"] == 20
            ):
                by.setdefault(r["beta"], []).append(100 * r["value"])
    means = [sum(by[b]) / len(by[b]) for b in sorted(by)]
    assert [len(x) for x in by.values()] == [2, 2, 2]

    def shown():
        assert list(v.figure("Array.from(g._fullData[0].y)")) == pytest.approx(means)

    v.until(shown)
    v.box.locator(".js-plotly-plot").scroll_into_view_if_needed()
    v.click(v.place("x.d2p('0.1')", "y.d2p(g._fullData[0].y[1])"))
    v.box.get_by_role("button", name="Open beta0.1-seed1").click()
    from aavae import Run
    from aavae.explore.plots import reconstructions

    expected = reconstructions(Run.load(folder / "runs/beta/runs/beta0.1-seed1"), 8)["reconstruction from the mean"]
    v.until(lambda: same(v.image("from the mean"), expected))


def test_compare(visit, folder):
    "The lines are the records; a method that is not ticked is gone; the neighbours are those by hand."
    from aavae import Run
    from aavae.rng import permutation

    v = visit("8_compare.ipynb")
    v.choose("measure", "kNN k=20")
    v.choose("over", "views")
    records = json.loads((folder / "runs/compare/runs/simclr-seed0/results.json").read_text())
    knn = [100 * r["value"] for r in records if r["task"] == "knn"]

    def shown(i: int, expected: list[float]):
        found = v.figure(f"Array.from(g._fullData?.[{i}]?.y || [])")
        assert list(found) == pytest.approx(expected)

    v.until(lambda: shown(1, knn))
    v.box.locator(".widget-checkbox", has_text="AAVAE").locator("input").uncheck()
    v.until(lambda: shown(0, []))
    shown(1, knn)
    assert "AAVAE" not in v.box.locator("table").inner_text()
    v.move("image", times=2)
    query = permutation(0, 0, 360)[2]
    features = Run.load(folder / "runs/compare/runs/simclr-seed0").features("test")
    h = torch.nn.functional.normalize(features.x.double(), dim=1)
    near = (h @ h[query]).index_fill(0, query, -2).topk(8).indices
    right = int((features.y[near] == features.y[query]).sum())
    images = Run.load(folder / "runs/vae").data().split("test").images_at(near).numpy()  # (8, 3, s, s)

    def neighbours():
        found = v.box.locator(f'img[alt^="SimCLR: {right} of 8"]')
        assert found.count() == 1
        side = images.shape[-1]
        tiles = v.image(found.get_attribute("alt")).reshape(side + 4, 8, -1, 4)
        inside = tiles[2:-2, :, 2 : side + 2, :3].transpose(1, 3, 0, 2)
        assert np.abs(inside.astype(int) - images).max() <= 1

    v.until(neighbours)


def test_training(visit, folder):
    "The monitor shows a run, starts one, stops it and resumes it; what it draws is what metrics.csv holds."
    from aavae import Run

    v = visit("7_training.ipynb")

    def says(text):
        state = v.box.locator(".aavae-state").inner_text()
        assert text in state, state + "".join(v.box.locator(".aavae-problem").all_inner_texts())

    v.until(lambda: says("finished after 2 epochs"))

    def field(label):
        name = v.page.locator("label", has_text=re.compile(f"^{label}$"))
        return v.box.locator(".widget-text", has=name).locator("input")

    for label, text in (
        ("arguments", "--train.max_epochs 60 --train.knn_every_n_epochs 1 --train.accelerator cpu"),
        ("folder", "runs/new"),
    ):
        field(label).fill(text)
        field(label).press("Enter")
    v.until(lambda: says("no run yet"))
    v.box.get_by_role("button", name="Start").click()

    def drawn():
        assert len(v.figure("Array.from(g._fullData[0].x || [])")) > 3

    v.until(drawn, 60)
    says("training")
    assert "Stop saves the run" in v.box.locator(".aavae-hint").inner_text()
    v.box.get_by_role("button", name="Stop").click()
    v.until(lambda: says("stopp"), 2)  # stopping, or stopped already
    v.until(lambda: says("stopped at epoch"))
    done = Run.load(folder / "runs/new").facts["epochs"]
    field("arguments").fill(f"--train.max_epochs {int(done) + 2}")
    field("arguments").press("Enter")
    v.box.get_by_role("button", name="Resume").click()
    v.until(lambda: says(f"finished after {int(done) + 2} epochs"), 60)
    metrics = Run.load(folder / "runs/new").metrics()
    knn = [100 * k for k in metrics["knn_top1"] if k is not None]

    def all_of_it():
        assert list(v.figure("Array.from(g._fullData[5].y)")) == pytest.approx(knn, abs=1e-3)

    v.until(all_of_it)
    assert v.box.locator('img[alt="reconstruction from the mean"]').count() == 1


def test_no_run_yet(browser, lab, folder):
    "Without a run the explorer offers the digits run; a run that is damaged is one line; the kernel lives on."
    book = {
        "cells": [
            {"cell_type": "code", "execution_count": None, "id": f"c{i}", "metadata": {}, "outputs": [], "source": text}
            for i, text in enumerate(
                (
                    "from aavae.explore import ReconstructionExplorer\nReconstructionExplorer('runs/none')",
                    "ReconstructionExplorer('runs/damaged')",
                    "print(6 * 7)",
                )
            )
        ],
        "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (folder / "none.ipynb").write_text(json.dumps(book))
    shutil.copytree(folder / "runs/vae", folder / "runs/damaged")
    (folder / "runs/damaged/encoder.safetensors").write_bytes(b"no")
    v = Visit(browser, lab, "none.ipynb")

    def there():
        assert "42" in v.page.locator(".jp-OutputArea-output").last.inner_text()

    v.until(there)
    problems = v.page.locator(".aavae-problem").all_inner_texts()
    assert (
        len(problems) == 2
        and "there is no run in runs/none yet" in problems[0]
        and "is not an encoder of aavae, or is damaged" in problems[1]
    )
    assert (
        v.page.get_by_role("button", name="Make the digits run (one minute)").count() == 1
        and not v.errors
        and not v.page.locator('[data-mime-type="application/vnd.jupyter.error"]').count()
    )
    v.page.close()
