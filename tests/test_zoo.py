"The trained runs that come with the package, on the images that their records are of."

import pytest

from aavae.data import DataConfig
from aavae.run import Run
from aavae.tools.zoo import zoo_names


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo_names())
def test_a_run_of_the_zoo_is_what_its_records_say(name, test_data, tmp_path, monkeypatch):
    "kNN of the rounded encoder on CIFAR-10 (JPEG q75) is within 0.2 points of the record."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = Run.load(f"zoo:{name}")
    (recorded,) = [r["value"] for r in run.records() if r["task"] == "knn" and not r["untrained"] and _is(r, 20)]
    photos = DataConfig("folder", str(test_data("cifar10-jpeg")), image_size=32, val_size=5000)
    (found,) = [r["value"] for r in run.evaluate("knn", photos, ks=(20,)) if _is(r, 20)]
    assert abs(found - recorded) <= 0.002


def _is(record, k: int) -> bool:
    return record["metric"] == "top1" and record["eval"]["hyperparameters"]["k"] == k
