"Embeddings of a folder that outlive a kill, encoders that other libraries load, and a stand-in of the Hub."

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import time
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from aavae import Config, InputError, ModelConfig, Run, build_model
from aavae.encoder import Normalize
from aavae.errors import Failed
from aavae.run import save_encoder
from aavae.tools.embed import decode_any, embed_folder
from aavae.tools.export import FILES, export_encoder, reloaded_error

STATS = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


def make_run(folder: Path, size: int = 32, **model) -> Run:
    "A run whose encoder has had no training, but BatchNorm statistics of some images."
    config = Config(model=ModelConfig(**({"encoder": "resnet18", "decoder": "resnet18"} | model)))
    config.train.accelerator = "cpu"
    whole = build_model(config.model, config.objective, config.views, size, **STATS)
    for _ in range(8):
        whole.encoder.train()(Normalize(**STATS)(torch.rand(8, 3, size, size)))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    facts = (
        dict(
            model=asdict(config.model),
            image_size=size,
            dataset="imagenet",
            label="ImageNet",
            step=8,
            epochs=1,
            views_seen=64,
            minutes=0.1,
            finished=True,
        )
        | STATS
    )
    save_encoder(folder / "encoder.safetensors", whole, facts)
    return Run.load(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("plain") / "run", 64, encoder="resnet50", stem="conv7", maxpool=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("small") / "run", width=0.125)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    "600 photographs in folders, of several sizes and modes, and among them two files that are no images."
    from sklearn.datasets import load_sample_image

    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("library")
    sources = [Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")]
    for i in range(600):
        x, y, side = *rng.integers(0, 300, 2), int(rng.integers(20, 100))
        cut = sources[i % 2].crop((x, y, x + side, y + int(side * (1 + i % 3 / 2))))
        path = root / f"{i % 7}" / f"{i:03}.{'jpg' if i % 2 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        cut.convert(["RGB", "L", "CMYK" if i % 2 else "RGBA"][i % 3]).save(path)
    (root / "3" / "broken.jpg").write_bytes((root / "3" / "003.jpg").read_bytes()[:300])
    (root / "empty.png").touch()
    return root


def table(path: Path) -> tuple[list[str], np.ndarray]:
    if path.suffix == ".npz":
        with np.load(path) as f:
            return f["path"].tolist(), f["embedding"]
    from pyarrow import parquet

    rows = parquet.read_table(path)
    return rows["path"].to_pylist(), np.stack(rows["embedding"].to_numpy())


# `aavae embed`, with the arguments after the first, in parts of so many images as the first says
EMBED = """
import sys
import aavae.tools.parts
from aavae.cli import main
aavae.tools.parts.PART = int(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


class Command:
    "`aavae embed`, begun in a process that has done its imports."

    def __init__(self, start_aavae, part: int, library: Path, run: Run, out: Path):
        self.parts = out.with_name(f"{out.name}.parts")
        line = ["embed", library, "--run", run.path, "-o", out, "--batch_size", 16]
        self.process = start_aavae(part, *line, code=EMBED)

    def stop(self, parts: int, signum: int):
        "Sends a signal when there are so many parts."
        until = time.time() + 120
        while len(list(self.parts.glob("*.npz"))) < parts and self.process.poll() is None and time.time() < until:
            time.sleep(0.002)
        self.process.send_signal(signum)
        return self.end()

    def end(self) -> tuple[int, str, str]:
        "Exit code, and what was printed."
        done = self.process.finish(120)
        return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_killed_anywhere(start_aavae, suffix, small, library, tmp_path):
    """SIGKILL at several moments, and a SIGTERM, cost at most the part in hand; the table is the one of an
    undisturbed command."""
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / "made" / f"cut.{suffix}"
    about = embed_folder(small, library, out.with_name(f"whole.{suffix}"), batch_size=16, show_progress=False)
    assert (about["n"], about["skipped"]) == (600, 2)
    covered, begin = 0, lambda: Command(start_aavae, 48, library, small, out)
    for after, stop in ((2, signal.SIGKILL), (5, signal.SIGTERM), (8, signal.SIGKILL)):
        code, _, err = begin().stop(after, stop)
        assert code == (143 if stop == signal.SIGTERM else -9), err
        if covered:
            assert int(re.search(r"note: ([\d,]+) of 602", err)[1]) >= covered
        covered = sum(int(np.load(p)["files"]) for p in out.with_name(f"{out.name}.parts").glob("[0-9]*.npz"))
        assert covered >= 48 * (after - 1) and not out.exists()
    code, said, err = begin().end()
    assert code == 0 and "600 images" in said and "2 unreadable files" in said, err
    for a, b in zip(table(out), table(out.with_name(f"whole.{suffix}")), strict=True):
        assert np.array_equal(a, b)
    assert sorted(p.name for p in out.parent.iterdir()) == sorted(
        [out.name, f"{out.name}.skipped.txt", f"whole.{suffix}", f"whole.{suffix}.skipped.txt"]
    )
    assert [line.split(": ")[0] for line in out.with_name(f"{out.name}.skipped.txt").read_text().splitlines()] == [
        "3/broken.jpg",
        "empty.png",
    ]
    before = out.stat().st_mtime_ns
    assert begin().end()[0] == 0 and out.stat().st_mtime_ns == before


def test_embeddings_are_the_runs(small, library, tmp_path):
    "Each row is what the run's encoder gives for that file alone."
    embed_folder(small, library, tmp_path / "t.npz", show_progress=False)
    names, x = table(tmp_path / "t.npz")
    assert names == sorted(names, key=lambda n: n.split("/")) and len(set(names)) == 600
    encoder = small.encoder()
    for i in range(0, 600, 60):
        assert torch.allclose(
            encoder(decode_any(library / names[i], 32)[None])[0], torch.from_numpy(x[i]), rtol=1e-4, atol=1e-5
        )


def test_a_changed_file_is_done_again(start_aavae, small, library, tmp_path):
    "Parts hold up to the first file that is another; the finished table is refused where the folder has changed."
    photos, out = shutil.copytree(library, tmp_path / "photos"), tmp_path / "made" / "t.npz"

    def begin() -> Command:
        return Command(start_aavae, 64, photos, small, out)

    begin().stop(3, signal.SIGKILL)
    changed = photos / "1" / "001.jpg"  # in the second part
    Image.new("RGB", (40, 40), "red").save(changed)
    code, _, err = begin().end()
    assert code == 0 and "note: 64 of 602" in err, err
    names, x = table(out)
    assert torch.allclose(
        small.encoder()(decode_any(changed, 32)[None])[0],
        torch.from_numpy(x[names.index("1/001.jpg")]),
        rtol=1e-4,
        atol=1e-5,
    )
    (photos / "new.png").write_bytes((photos / "0" / "000.png").read_bytes())
    code, _, err = begin().end()
    assert code == 2 and "is not of these images and this encoder" in err


def test_memory_does_not_grow(quick_aavae, small, library, tmp_path):
    "Ten times the files take no more memory."
    many = tmp_path / "many"
    for i in range(10):
        (many / str(i)).mkdir(parents=True)
        [os.link(p, many / str(i) / f"{p.parent.name}-{p.name}") for p in library.rglob("*.*")]
    code = """
import resource, sys
import aavae.tools.parts as parts
from aavae import Run
from aavae.tools.embed import embed_folder
parts.PART = 128
embed_folder(Run.load(sys.argv[1]), sys.argv[2], sys.argv[3], show_progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    used = []
    for folder in (many / "0", many):
        done = quick_aavae(small.path, folder, tmp_path / f"{folder.name}.npz", code=code)
        assert done.returncode == 0, done.stderr
        used.append(float(done.stdout))
    assert used[1] < used[0] + 60, used


# ---- other libraries

ARCHITECTURES = [
    dict(encoder="resnet34", stem="conv7", maxpool=True),
    dict(encoder="resnet18", stem="conv3", maxpool=False),
    dict(encoder="resnet50", stem="conv7", maxpool=False),
    dict(encoder="resnet18", width=0.5),
]


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize("model", ARCHITECTURES, ids=lambda m: "-".join(map(str, m.values())))
def test_reloaded(format, model, tmp_path):
    "Every architecture, in every format that has it, gives the same features when loaded by the lines of its card."
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    if format == "timm":
        pytest.importorskip("timm")
    run = make_run(tmp_path / "run", **model)
    if "width" in model and format in ("torchvision", "timm"):
        with pytest.raises(InputError, match="of width 0.5; use --format onnx"):
            export_encoder(run, format)
        return
    files, error = export_encoder(run, format)
    assert error <= 1e-5 and [f.parent for f in files] == [run.path / "export" / format] * len(files)
    card = files[-1].read_text()
    block = re.search(r"```python\n(.*?)```", card, re.S)[1]
    code = [line for line in block.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(code) <= 3
    for part in ("## Results", "## Licence", "@article", "ImageNet may be used", "crop_scale", "64 views"):
        assert part in card
    assert str(tmp_path) not in card, "the card tells of folders of this machine"
    wrong = Run.load(run.path)
    encoder = wrong.encoder()
    with torch.no_grad():
        encoder.encoder.conv1.weight.mul_(1.001)
    assert reloaded_error(format, files[0], encoder, run.facts) > 1e-5, "the check does not see a changed weight"


def test_plain_resnet50(plain, tmp_path):
    "The standard architecture loads in plain torchvision without its classifier, and in timm by name from a folder."
    import torchvision

    file = export_encoder(plain, "torchvision", tmp_path / "tv")[0][0]
    model = torchvision.models.resnet50()
    missing, unexpected = model.load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    timm = pytest.importorskip("timm")
    export_encoder(plain, "timm", tmp_path / "timm")
    named, images = (
        timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval(),
        torch.rand(2, 3, 64, 64),
    )
    with torch.no_grad():
        assert torch.allclose(named(Normalize(**STATS)(images)), plain.encoder()(images), rtol=1e-4, atol=1e-5)
    config = timm.data.resolve_model_data_config(named)
    assert (tuple(config["input_size"]), list(config["mean"]), list(config["std"])) == (
        (3, 64, 64),
        STATS["mean"],
        STATS["std"],
    )


def test_onnx_takes_any_batch_and_size(small, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(export_encoder(small, "onnx", tmp_path / "encoder.onnx")[0][0])
    for shape in ((1, 3, 32, 32), (7, 3, 32, 32), (2, 3, 48, 40)):
        images = torch.rand(shape)
        h = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        assert torch.allclose(h, small.encoder()(images), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "encoder.md").is_file()


def test_a_bad_export_leaves_nothing(small, tmp_path, monkeypatch):
    "Where the reloaded encoder differs, the command fails loudly and writes nothing."
    import aavae.tools.export as export

    whole = export._write
    monkeypatch.setattr(export, "_write", lambda *args: spoil(whole(*args), args[-1]))

    def spoil(names, folder):
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with safe_open(folder / names[0], "pt") as f:
            facts = json.loads(f.metadata()["aavae"])
        tensors = load_file(folder / names[0])
        tensors["conv1.weight"] = tensors["conv1.weight"] * 1.001
        save_file(tensors, folder / names[0], {"aavae": json.dumps({k: v for k, v in facts.items() if k != "sha256"})})
        return names

    with pytest.raises(Failed, match="gives other features"):
        export_encoder(small, "safetensors", tmp_path / "bad")
    assert not list((tmp_path / "bad").iterdir())


# ---- the Hub


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's HTTP interface that pushing and fetching a few files use. Large files go by Git LFS,
    as there."""

    repos: dict[str, dict[str, bytes]] = {}
    objects: dict[str, bytes] = {}
    asked: list[tuple[str, str, str]] = []

    def log_message(self, *args):
        pass

    def reply(self, data=None, status=200, body=None, **headers):
        body = json.dumps(data).encode() if body is None else body
        self.send_response(status)
        for k, v in ({"Content_Type": "application/json", "Content_Length": str(len(body))} | headers).items():
            self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self):
        "Hands the request to the first route that fits."
        self.here = f"http://{self.headers['Host']}"
        path = self.path.split("?")[0]
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = self.headers.get("Authorization", "")
        Hub.asked.append((self.command, path, token))
        if path.startswith("/api/") and self.command == "POST" and token != "Bearer hf_right":
            words = "Invalid credentials in Authorization header"
            return self.reply({"error": "Invalid credentials"}, 401, X_Error_Message=words)
        for pattern, route in self.ROUTES.items():
            if found := re.fullmatch(pattern, path):
                return route(self, content, *found.groups())
        return self.reply({"error": f"the stand-in has no {self.command} {path}"}, 404)

    def store(self, content, oid):
        Hub.objects[oid] = content
        return self.reply({})

    def create(self, content):
        asked = json.loads(content)
        name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        if name in Hub.repos:
            return self.reply({"url": f"{self.here}/{name}"}, 409)
        Hub.repos[name] = {}
        Hub.private = asked.get("private") or asked.get("visibility") == "private"
        return self.reply({"url": f"{self.here}/{name}", "name": name})

    def validate(self, content):
        return self.reply({"errors": [], "warnings": []})

    def preupload(self, content, repo):
        def mode(name: str) -> str:
            return "lfs" if name.endswith((".safetensors", ".onnx", ".pth")) else "regular"

        names = [f["path"] for f in json.loads(content)["files"]]
        return self.reply({"files": [{"path": n, "uploadMode": mode(n), "shouldIgnore": False} for n in names]})

    def batch(self, content, repo):
        def upload(oid: str) -> dict:
            return {"actions": {"upload": {"href": f"{self.here}/lfs-store/{oid}", "header": {}}}}

        objects = [o | upload(o["oid"]) for o in json.loads(content)["objects"]]
        return self.reply({"transfer": "basic", "objects": objects})

    def commit(self, content, repo):
        for line in filter(None, content.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                Hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            if entry["key"] == "lfsFile":
                Hub.repos[repo][value["path"]] = Hub.objects[value["oid"]]
        return self.reply({"commitUrl": f"{self.here}/{repo}/commit/abc", "commitOid": "a" * 40, "commitId": "a" * 40})

    def resolve(self, content, repo, revision, name):
        if repo not in Hub.repos:
            return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if name not in Hub.repos[repo]:
            return self.reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit="a" * 40)
        body = Hub.repos[repo][name]
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        kind = "application/octet-stream"
        return self.reply(body=body, ETag=etag, X_Repo_Commit="a" * 40, Content_Type=kind)

    def model(self, content, repo, revision):
        about = {"id": repo, "modelId": repo, "sha": "a" * 40, "siblings": [], "tags": []}
        return self.reply(about, 200 if repo in Hub.repos else 404)

    ROUTES = {
        r".*/lfs-store/(.+)": store,
        r"/api/repos/create": create,
        r"/api/validate-yaml": validate,
        r"/api/models/([^/]+/[^/]+)/preupload/main": preupload,
        r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": batch,
        r"/api/models/([^/]+/[^/]+)/commit/main": commit,
        r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": resolve,
        r"/api/models/([^/]+/[^/]+)(/revision/.*)?": model,
    }
    do_GET = do_POST = do_PUT = do_HEAD = answer


@pytest.fixture
def hub(tmp_path):
    "The stand-in and the environment in which huggingface_hub talks to it and to nobody else."
    pytest.importorskip("huggingface_hub")
    Hub.repos, Hub.objects, Hub.asked = {}, {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    yield SimpleNamespace(env=env, server=server)
    server.shutdown()
    server.server_close()


LOAD = """
import sys, torch
from aavae import InputError
from aavae.tools.export import load_from_hub
images, out, name = sys.argv[1:]
try: torch.save(load_from_hub(name)(torch.load(images)), out); print("loaded")
except InputError as e: print(e)
"""


def test_push_and_load(hub, quick_aavae, small, tmp_path):
    """Pushed by the command line, fetched by another process: the same features, from the cache too; no token is
    printed."""
    done = push(quick_aavae, small, tmp_path / "card", "me/aavae-small", hub.env | {"HF_TOKEN": "hf_right"})
    assert done.returncode == 0, done.stderr
    assert "pushed to" in done.stdout and "hf_right" not in done.stdout + done.stderr
    files = Hub.repos["me/aavae-small"]
    assert set(files) == {"encoder.safetensors", "README.md"} and Hub.private
    assert "load_from_hub('me/aavae-small')" in files["README.md"].decode() and b"hf_right" not in b"".join(
        files.values()
    )
    images, Hub.repos["me/empty"] = torch.rand(2, 3, 32, 32), {"README.md": b""}
    torch.save(images, tmp_path / "images.pt")

    def load(name: str) -> str:
        "What a process says that loads it."
        return quick_aavae(tmp_path / "images.pt", tmp_path / "h.pt", name, code=LOAD, env=hub.env).stdout.strip()

    assert load("me/aavae-small") == "loaded"
    assert torch.allclose(torch.load(tmp_path / "h.pt"), small.encoder()(images), rtol=1e-5, atol=1e-6)
    assert load("me/nothing").startswith("the Hub has no me/nothing that you may see;")
    assert load("me/empty").startswith("me/empty holds no encoder.safetensors; push one with aavae export RUN")
    hub.server.shutdown()
    hub.server.server_close()
    assert load("me/aavae-small") == "loaded"  # from the cache
    assert load("me/other").startswith("the Hub cannot be reached")


def push(quick_aavae, run: Run, folder: Path, name: str, env: dict[str, str]):
    "Writes the encoder of a run to a folder and uploads it."
    words = ("--format", "safetensors", "-o", folder, "--push", name)
    return quick_aavae("export", run.path, *words, env=env)


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_push_without_the_right(token, hub, quick_aavae, small, tmp_path):
    "No token, or a wrong one: a line, exit code 2, and the token is not in it."
    env = hub.env | ({"HF_TOKEN": token} if token else {})
    done = push(quick_aavae, small, tmp_path / "card", "me/it", env)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert (
        done.stderr.startswith("aavae: error: ")
        and "hf auth login" in done.stderr
        and "hf_" not in done.stderr + done.stdout
    )
    assert "me/it" not in Hub.repos and (token or not (tmp_path / "card").exists())
