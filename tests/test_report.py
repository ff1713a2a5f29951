"The report as a reader sees it on a telephone: every column can be reached, and what was measured is said."

from pathlib import Path

import pytest

COLUMNS = ["", "linear", "kNN", "10 labels per class", "moved"]
ROWS = [
    ["raw pixels", "95.6 ± 0.1", "98.0", "84.7 ± 1.2", "33.1 ± 0.4"],
    ["untrained", "92.0 ± 0.1", "95.0", "70.7 ± 1.2", "43.1 ± 0.4"],
    ["AAVAE", "93.0 ± 0.1", "95.0", "70.7 ± 1.2", "53.1 ± 0.4"],
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A short run of the digits, measured trained and untrained, with a record that has a name of its own."
    from aavae import preset, pretrain

    path = tmp_path_factory.mktemp("report") / "run"
    config = preset("digits", train__max_epochs=1, train__warmup_epochs=0, train__accelerator="cpu")
    run = pretrain(config, path, show_progress=False)
    for untrained in (False, True):
        run.evaluate("knn", untrained=untrained)
    record = run.records()[0]
    named = {"split": "test, shifted and rotated", "hyperparameters": {"reading": "moved"}}
    run.add_records([record | {"task": "linear", "value": 0.531, "eval": record["eval"] | named}])
    return run


def shown(page, path: Path, width: int):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(path.as_uri(), wait_until="load", timeout=120_000)
    page.wait_for_selector(".js-plotly-plot .main-svg")
    page.wait_for_timeout(100)


def table(page, caption: str):
    return page.locator(".scroll").filter(has=page.locator("caption", has_text=caption))


def test_table_on_a_telephone(page, run, tmp_path):
    "At 390 pixels the results fit; a wider table says that it scrolls, and its last column can be scrolled to."
    from aavae.explore.report import write_report

    own = dict(columns=COLUMNS, rows=ROWS, caption="Top-1 accuracy (%) of the four")
    path = write_report({"AAVAE": run}, tmp_path / "report.html", "Digits", table=own)
    shown(page, path, 390)
    results = table(page, "Top-1 accuracy (%) of the four")
    assert results.evaluate("t => t.scrollWidth - t.clientWidth") <= 1
    assert results.evaluate("t => t.nextElementSibling.hidden")
    best = results.locator("strong").all_inner_texts()
    assert [text.replace("\xa0", " ") for text in best] == ["95.6 ± 0.1", "98.0", "84.7 ± 1.2", "53.1 ± 0.4"]

    wide = table(page, "Mean cosines")
    hint = wide.locator("xpath=following-sibling::p[1]")
    assert hint.is_visible() and "scroll the table sideways" in hint.inner_text()
    assert "more" in wide.get_attribute("class")
    wide.evaluate("t => { t.scrollLeft = 10_000 }")
    last, frame = wide.locator("thead th").last.bounding_box(), wide.bounding_box()
    assert last["x"] + last["width"] <= frame["x"] + frame["width"] + 1
    first = wide.locator("tbody th").first.bounding_box()
    assert abs(first["x"] - frame["x"]) < 1, "the names of the rows have left the screen"

    shown(page, path, 1280)
    assert not page.locator(".hint:visible").count(), "a table is wider than a screen of 1280 pixels"


def test_what_was_measured_is_said(page, run, tmp_path):
    "Split and number of images stand below each column, a name of its own is explained, and a fall is a sentence."
    from aavae.explore.report import write_report

    shown(page, write_report(run, tmp_path / "report.html", "Digits"), 1280)
    small = table(page, "Top-1 accuracy (%)").locator("thead small").all_inner_texts()
    assert small == ["test, n = 360", "test, n = 360", "linear probe; test, shifted and rotated, n = 360"]
    assert "Below the same network before training: AAVAE by kNN" in page.locator(".warning").inner_text()
    captions = page.locator(".matrices .annotation-text").all_text_contents()
    assert captions == ["raw", "centred"] * 2


def test_the_figure_has_what_the_table_has(page, run, tmp_path):
    "Raw pixels have no run and still a line in the figure; the axis of the likelihood holds a falling end."
    from aavae.explore.report import write_report

    own = dict(columns=COLUMNS, rows=ROWS, caption="Top-1 accuracy (%) of the four")
    metrics = run.path / "metrics.csv"
    before = metrics.read_text()
    header, row = before.splitlines()[:2]
    likelihood = header.split(",").index("log_likelihood")
    rows = []
    for step in range(1, 101):
        cells = row.split(",")
        cells[:2] = str(step), str(step / 20)
        cells[likelihood] = str(-800 - 5 * max(0, step - 97) ** 4)
        rows.append(",".join(cells))
    metrics.write_text("\n".join([header, *rows]) + "\n")
    try:
        path = write_report({"AAVAE": run}, tmp_path / "report.html", "Digits", table=own)
    finally:
        metrics.write_text(before)
    shown(page, path, 1280)
    lines = page.evaluate("document.getElementById('accuracies').data[0].y")
    assert lines == ["raw pixels", "untrained", "AAVAE"]
    low = page.evaluate("document.getElementById('curves').layout.yaxis.range[0]")
    smooth = "document.getElementById('curves').data.filter(t => t.yaxis === 'y').at(-1).y"
    bottom = page.evaluate(f"Math.min(...{smooth})")
    assert low < bottom < -820
