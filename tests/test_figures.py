"""README shows what the result files say; nothing in its figures is typed by hand."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "tools" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path):
    (tmp_path / "tools" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("a\n<!-- figure:model -->\nold\n<!-- /figure -->\nb\n")
    return tmp_path


def _result(root, ratio):
    row = {"name": "net step", "baseline": "torch-fp32", "ratio": ratio, "threads": 2, "batch": 1}
    result = {"date": "2026-01-02T03:04:05", "machine": {"cpu": "C", "cores": 2}, "rows": [row]}
    (root / "tools" / "results" / "bench_model.json").write_text(json.dumps(result))


def test_the_readme_shows_the_result_files(figures):
    assert figures.main(["--check"]) == 0


def test_a_region_is_filled_from_its_file_and_checked(figures, root):
    _result(root, 1.254)
    assert figures.main(["--root", str(root), "--check"]) == 1
    assert figures.main(["--root", str(root)]) == 0
    text = (root / "README.md").read_text()
    assert "| net step | torch-fp32 | 1.25\u00d7 |" in text
    assert "`python tools/bench_model.py --out tools/results/bench_model.json`" in text
    assert "C, 2 cores, 2026-01-02" in text
    assert "old" not in text
    assert text.startswith("a\n") and text.endswith("\nb\n")
    assert figures.main(["--root", str(root), "--check"]) == 0
    _result(root, 1.5)
    assert figures.main(["--root", str(root), "--check"]) == 1


def test_a_region_without_results_is_empty(figures, root):
    assert figures.main(["--root", str(root), "--check"]) == 1
    assert figures.main(["--root", str(root)]) == 0
    assert "<!-- figure:model -->\n<!-- /figure -->" in (root / "README.md").read_text()


def test_an_unknown_region_is_an_error(figures, root):
    (root / "README.md").write_text("<!-- figure:nothing -->\n<!-- /figure -->\n")
    with pytest.raises(ValueError, match="figure:nothing"):
        figures.main(["--root", str(root)])
