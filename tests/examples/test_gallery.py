"""The gallery shows the report and the picture of each model on one page."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

GALLERY = Path(__file__).parents[2] / "examples" / "gallery.py"


def test_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.html"
    main = runpy.run_path(str(GALLERY))["main"]
    main(["--output", str(output), "--models", "vit", "mixer_wide"])
    assert capsys.readouterr().out == f"2 models: {output}\n"
    html = output.read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)">', html) == ["vit", "mixer_wide"]
    assert '<a href="#vit">vit: 7 of 7</a><a href="#mixer_wide">mixer_wide: 1 of 5</a>' in html
    assert html.count("<svg") == html.count('<div class="lnfold">') == 2
    assert "ViT (Dosovitskiy et al. 2021)" in html
    assert 'name="viewport"' in html
    assert "color-scheme: light dark" in html
    assert not re.search(r"<script|<link|<img|src=|@import|url\(", html), "needs other files"
