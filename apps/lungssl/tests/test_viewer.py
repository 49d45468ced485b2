"""The viewer in a page: what it carries, what it may weigh, and that a browser draws it without a network."""

import base64
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from lungssl.reports import viewer as viewer_module
from lungssl.reports.viewer import NOWHERE, Layer, Panel, ViewerError, niivue, viewer
from lungssl_data.readers import read_volume
from lungssl_data.volume import Geometry

GRID = Geometry(shape=(21, 23, 25), spacing_mm=(2.0, 2.0, 2.5), origin_mm=(-30.0, -20.0, 10.0), direction=np.eye(3))
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def page(most_bytes: int = 10**6) -> str:
    hu = np.random.default_rng(0).integers(-1000, 200, GRID.shape).astype(np.int16)
    over = np.where(hu > 0, hu, NOWHERE).astype(np.int16)
    grey = Layer(values=hu, colours=("#000000", "#ffffff"), low=-1000, high=200)
    red = Layer(values=over, colours=("#000000", "#ff0000"), low=0, high=200, opacity=0.5)
    panels = [Panel(title="one </script>", layers=[grey]), Panel(title="two", layers=[grey, red])]
    return viewer(panels, GRID, np.array([-10.0, 0.0, 20.0]), most_bytes=most_bytes)


def volumes(html: str, folder: Path) -> list[Path]:
    found = []
    for place, text in enumerate(re.findall(r'id="viewer-volume-\d+">([^<]*)<', html)):
        found.append(folder / f"{place}.nii.gz")
        found[-1].write_bytes(base64.b64decode(text))
    return found


def test_a_shared_volume_is_held_once_where_it_lies(tmp_path: Path) -> None:
    html = page()
    first, second = volumes(html, tmp_path)
    assert read_volume(first).geometry.same_grid(GRID)
    hu = read_volume(first).hu
    assert np.array_equal(hu, np.random.default_rng(0).integers(-1000, 200, GRID.shape))
    assert read_volume(second).hu.min() == NOWHERE
    assert "mm2frac([10.0, 0.0, 20.0])" in html  # RAS
    assert "one </script>" not in html and "Redistribution and use" in html


def test_a_volume_too_large_is_thinned_and_the_page_says_so(tmp_path: Path) -> None:
    html = page(most_bytes=6000)
    thin = read_volume(volumes(html, tmp_path)[0])
    step = round(thin.geometry.spacing_mm[0] / GRID.spacing_mm[0])
    assert step > 1 and f"linked; {2 * step} mm" in html
    full = np.random.default_rng(0).integers(-1000, 200, GRID.shape)
    assert np.array_equal(thin.hu, full[::step, ::step, ::step])


def test_another_build_of_the_widget_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "widget.js").write_text("var a = 1; export{a as default};")
    monkeypatch.setattr(viewer_module, "files", lambda package: tmp_path)
    niivue.cache_clear()
    with pytest.raises(ViewerError, match="--no-viewer"):
        niivue()
    niivue.cache_clear()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_draws_it_without_a_network(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(f"<!doctype html><body>{page()}</body>", encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --virtual-time-budget=60000 --dump-dom".split()
    done = subprocess.run(
        [str(BROWSER), *options, "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
         f"file://{tmp_path / 'page.html'}#viewer"],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    assert 'data-viewer="drawn"' in done.stdout, done.stdout[-2000:]
    assert done.stdout.count("<canvas") == 2
