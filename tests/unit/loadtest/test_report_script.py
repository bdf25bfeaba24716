"""The script that fills docs/loadtest.md follows the files of results."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kvsluice.errors import InvalidRequest

ROOT = Path(__file__).resolve().parents[3]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loadtest_report", ROOT / "scripts" / "loadtest_report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script()


def results() -> dict:
    def cell(layout: str, rate: float, ttft_ms: float) -> dict:
        figures = {
            "request_throughput": rate, "request_goodput": rate / 2, "output_throughput": 16 * rate,
            "p50_ttft_ms": ttft_ms, "p99_ttft_ms": 2 * ttft_ms, "p50_tpot_ms": 50.0, "p99_tpot_ms": 90.0,
            "effective_recipes": {"exact": 9},
        }  # fmt: skip
        shared = {"recipe": "exact", "invalid": None, "stationary": rate < 1}
        return {"layout": layout, "rate": rate, "figures": figures, **shared}

    cells = [cell(layout, rate, 800 * rate) for layout in script.LAYOUTS for rate in (0.5, 1.0)]
    asked = {"serve": "--device cpu", "workers": 2, "input_len": "512", "output_len": "16", "duration_s": 30.0}
    made = {"hardware": {"cores": 2, "cpu": "a processor"}, "commit": "abc"}
    return {"environment": made, "settings": asked | {"slo": "ttft_p99=1s"}, "cells": cells}


def test_the_page_follows_the_results(tmp_path, capsys):
    for folder in (script.PAGE.parent, script.RESULTS):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / script.PAGE, tmp_path / script.PAGE)
    file, image = tmp_path / script.RESULTS / "loadtest_cpu.json", tmp_path / script.IMAGES / "loadtest_cpu.svg"
    file.write_text(json.dumps(results()))
    assert script.main(["--check"], tmp_path) == 1
    assert script.main([], tmp_path) == script.main(["--check"], tmp_path) == 0
    page = (tmp_path / script.PAGE).read_text()
    assert (
        "| `exact` | prefill and decode apart | 1 | 1.00 | 0.50 | 16.0 | 0.80 s | 1.60 s | 50 ms | 90 ms | no |" in page
    )
    assert "--measure cpu` on 2 cores of a processor, at commit abc" in page
    assert "](images/loadtest_cpu.svg)" in page
    assert "both roles in each worker, p99" in image.read_text()
    file.write_text("{}")
    assert script.main([], tmp_path) == 1
    assert "holds something else" in capsys.readouterr().err
    file.unlink()
    assert script.main([], tmp_path) == 0
    assert script.NOT_MEASURED in (tmp_path / script.PAGE).read_text()
    assert not image.exists()


def test_layouts_have_equally_many_workers():
    assert script.layout_flags("apart", 4) == ["--prefill-workers", "2", "--decode-workers", "2"]
    assert script.layout_flags("together", 4)[:2] == ["--role", "both"]
    with pytest.raises(InvalidRequest, match="even number"):
        script.arguments(["--workers", "3"])
