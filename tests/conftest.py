"Fixtures: the command line, the browser, and real images from the folder that AAVAE_TEST_DATA names."

import itertools
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from filelock import FileLock


def flags(**fields) -> list[str]:
    "Fields as flags of the command line: flags(train__lr=1) is ['--train.lr', '1']."
    words = []
    for name, value in fields.items():
        words += [f"--{name.replace('__', '.')}", str(value)]
    return words


SMALL_NETWORKS = dict(model__encoder="resnet18", model__decoder="resnet18", model__width=0.125)


@contextmanager
def watched(page):
    "Two lists that grow while a page is used: its errors, and the addresses it asks for."
    errors, addresses = [], []

    def console(message):
        icon = "favicon" in (message.location or {}).get("url", "")
        if message.type == "error" and not icon:
            errors.append(message.text)

    listeners = {
        "console": console,
        "pageerror": lambda e: errors.append(str(e)),
        "request": lambda r: addresses.append(r.url),
    }
    for event, listen in listeners.items():
        page.on(event, listen)
    try:
        yield errors, addresses
    finally:
        for event, listen in listeners.items():
            page.remove_listener(event, listen)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; left out unless --slow is given")
    config.addinivalue_line("markers", "cuda: needs a CUDA device")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")
    parser.addoption(
        "--rehearse", action="store_true", help="run the tests for a GPU on the CPU, to see that they work"
    )
    parser.addoption(
        "--write-errors", action="store_true", help="write nbs/errors.ipynb anew from what the command line answers"
    )


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
        if "cuda" in item.keywords and not torch.cuda.is_available() and not config.getoption("--rehearse"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def aavae():
    "Runs one command line in an interpreter of its own: aavae('pretrain', '--out', ...) -> CompletedProcess."

    def run(*args, **options):
        return subprocess.run(
            [sys.executable, "-c", "import sys; from aavae.cli import main; sys.exit(main())", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=600,
            **options,
        )

    return run


PRELOAD = [
    "aavae.cli",
    "aavae.train",
    "aavae.evaluation.tasks",
    "aavae.tools.doctor",
    "aavae.explore.report",
    "aavae.tools.export",
    "jsonargparse",
    "docstring_parser",
    "sklearn.datasets",
    "torchvision.datasets",
]


def _child(argv, out, err, code, memory, env, new_session):
    "A command line, or Python `code`, in a process that has imported everything already."
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    if new_session:
        os.setsid()
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    import torch

    from aavae.cli import main

    torch.set_num_threads(1)
    sys.argv = ["-c", *argv]
    try:
        status = main(argv) if code is None else exec(code, {"__name__": "__main__"})
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


class Started:
    "A command that runs: what `subprocess.Popen` has, as far as the tests need it."

    def __init__(self, process, args, out: Path, err: Path):
        self.process, self.args, self.out, self.err = process, args, out, err
        self.pid = process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, signum: int):
        os.kill(self.pid, signum)

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess:
        "Waits for the end. Raises `TimeoutError` if it does not come, and kills the process."
        self.process.join(timeout)
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in (self.out, self.err))
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"{timeout} s were not enough for {self.args}; its last words: {err[-500:]}")
        return subprocess.CompletedProcess(self.args, self.returncode, out, err)


@pytest.fixture(scope="session")
def start_aavae(tmp_path_factory):
    """Starts a command line, or Python `code`, in a fork of a process that has done the imports: start_aavae(...) ->
    Started. `memory` limits the address space in bytes, `env` is the whole environment."""
    context, folder = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("out")
    context.set_forkserver_preload(PRELOAD)
    number = itertools.count()

    def start(*args, code=None, memory=None, env=None, new_session=False):
        n, words = next(number), list(map(str, args))
        out, err = folder / f"{n}.out", folder / f"{n}.err"
        given = (words, str(out), str(err), code, memory, None if env is None else dict(env), new_session)
        process = context.Process(target=_child, args=given)
        process.start()
        return Started(process, args, out, err)

    return start


@pytest.fixture(scope="session")
def quick_aavae(start_aavae):
    "Like `aavae`, in a fork of a process that has done the imports; the options are those of `start_aavae`."

    def run(*args, timeout=300, **options):
        return start_aavae(*args, **options).finish(timeout)

    return run


def wait_for(what, process, seconds: float = 120):
    "Waits until `what()` is true or the process has ended."
    until = time.time() + seconds
    while not what() and process.poll() is None:
        assert time.time() < until, "it did not come to that"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def test_data(tmp_path_factory):
    """test_data(name) is the folder of a real data set, unpacked once for all processes of the session; skips where
    AAVAE_TEST_DATA has none."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def find(name: str) -> Path:
        root = os.environ.get("AAVAE_TEST_DATA")
        if not root:
            pytest.skip(f"{name} needs AAVAE_TEST_DATA, the folder of the test data")
        folder, archive = Path(root) / name, Path(root) / f"{name}.tar.xz"
        if folder.is_dir():
            return folder
        if not archive.is_file():
            pytest.skip(f"{root} holds no {name}")
        unpacked = shared / "data" / name
        with FileLock(shared / f"{name}.lock"):
            if not unpacked.is_dir():
                part = shared / "part"
                with tarfile.open(archive) as tar:
                    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
                    tar.extractall(part / name, **safely)
                unpacked.parent.mkdir(exist_ok=True)
                (part / name / name).rename(unpacked)
        return unpacked

    return find


@pytest.fixture(scope="session")
def cifar(test_data, tmp_path_factory):
    "512 training and 100 test images of CIFAR-10 (JPEG q75), in folders of that name."
    source, small = test_data("cifar10-jpeg"), tmp_path_factory.mktemp("cifar") / "cifar10-jpeg"
    for split, n in (("train", 52), ("test", 10)):
        for folder in sorted((source / split).iterdir()):
            (small / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:n]:
                shutil.copy(path, small / split / folder.name)
    return small


@pytest.fixture(scope="session")
def launch():
    "launch(*flags): a headless Chromium with WebGL by software; skips where there is none."
    from aavae.explore.figures import chromium

    if not chromium():
        pytest.skip("no Chromium here")
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright here")
    webgl = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
    with sync_api.sync_playwright() as p:
        yield lambda *flags: p.chromium.launch(executable_path=chromium(), args=["--no-sandbox", *webgl, *flags])


@pytest.fixture(scope="session")
def browser(launch):
    "A browser for notebooks."
    browser = launch()
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def page(launch):
    "A page for what is only read: put together without the emulated GPU, which is slow."
    browser = launch("--disable-gpu-compositing")
    yield browser.new_page()
    browser.close()
