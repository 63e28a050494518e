"""README shows what the result files say; nothing in its figures is typed by hand."""

import json

import figures
import pytest
from bars import DIT_XL, GEMM, table


@pytest.fixture
def root(tmp_path):
    (tmp_path / "tools" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("a\n<!-- figure:model -->\nold\n<!-- /figure -->\nb\n")
    (tmp_path / "docs" / "cpu.md").write_text("<!-- figure:bars -->\n<!-- /figure -->\n")
    return tmp_path


def _result(root, ratio):
    row = {"name": "net step", "baseline": "torch-fp32", "ratio": ratio, "threads": 2, "batch": 1, "runs": 7}
    row |= {"p25": ratio / 1.25, "p75": ratio * 1.1}
    result = {"date": "2026-01-02T03:04:05", "machine": {"cpu": "C", "cores": 2}, "rows": [row]}
    result |= {"command": "bench_model.py --runs 7", "load_before": 0.125}
    (root / "tools" / "results" / "bench_model.json").write_text(json.dumps(result))


def test_the_readme_shows_the_result_files():
    assert figures.main(["--check"]) == 0


def test_a_region_is_filled_from_its_file_and_checked(root):
    _result(root, 1.254)
    assert figures.main(["--root", str(root), "--check"]) == 1
    assert figures.main(["--root", str(root)]) == 0
    text = (root / "README.md").read_text()
    assert "| net step | torch-fp32 | 1.25\u00d7 |" in text
    assert "`python tools/bench_model.py --runs 7`" in text
    assert "C, 2 cores (load 0.1 before), 2026-01-02" in text
    assert "Medians over 7 rounds; quartiles are 25% off, 25% at most." in text
    assert "old" not in text
    assert text.startswith("a\n") and text.endswith("\nb\n")
    assert figures.main(["--root", str(root), "--check"]) == 0
    _result(root, 1.5)
    assert figures.main(["--root", str(root), "--check"]) == 1


def test_a_region_without_results_is_empty(root):
    assert figures.main(["--root", str(root), "--check"]) == 1
    assert figures.main(["--root", str(root)]) == 0
    assert "<!-- figure:model -->\n<!-- /figure -->" in (root / "README.md").read_text()


def test_an_unknown_region_is_an_error(root):
    (root / "README.md").write_text("<!-- figure:nothing -->\n<!-- /figure -->\n")
    with pytest.raises(ValueError, match="figure:nothing"):
        figures.main(["--root", str(root)])


def test_bars_are_told_by_their_least_ratio(root):
    """Of three made up results: a row that reaches its goal, one its floor, one neither, and what was not measured."""

    def step(name, baseline, ratio, blocks):
        return {"name": name, "baseline": baseline, "ratio": ratio, "blocks": blocks}

    engines = [
        {"name": name, "threads": threads, "tokens": 256, "least_ms": ms, "anonymous_bytes": own, "file_bytes": 1}
        for name, ms, own in (("ternary A4", 100, 99), ("ORT dynamic int8", 300, 339))
        for threads in (1, 2)
    ]
    engines[1]["least_ms"] = 52  # 1.92 times as fast with 2 threads
    results = {
        GEMM: {"rows": [{"name": "ternary A3", "baseline": "ternary A4", "ratio": ratio} for ratio in (1.5, 1.2)]},
        1: {"rows": [step("W3A3", "ORT dynamic int8", ratio, 1) for ratio in (1.4, 1.0, 1.2)]},
        DIT_XL: {"rows": [step("ternary A4", "torch fp32 eager", 7.9, 28)], "engines": engines},
    }
    told = {tuple(line[:2]): line[2:] for line in table(results)}
    assert told["ternary A3, GEMM", "ternary A4"] == ("1\u00d7", "1.2\u00d7", "", "1.20 .. 1.50", "goal")
    assert told["W3A3, 1 block of DiT-XL/2", "ORT dynamic int8"][-2:] == ("1.00 .. 1.40", "neither")
    assert told["ternary A4, 28 blocks of DiT-XL/2", "torch fp32 eager"][-2:] == ("7.90 .. 7.90", "floor")
    assert told["ternary A4, memory, 28 blocks", "ORT dynamic int8"][-2:] == ("3.40 .. 3.40", "floor")
    assert told["ternary A4, 28 blocks", "itself with 1 thread"][-2:] == ("1.92 .. 1.92", "floor")
    assert told["ternary A8, 1 block of DiT-XL/2", "ORT dynamic int8"][-2:] == ("not measured", "")


def test_a_whole_model_has_a_line_an_engine():
    """Of the fewest tokens, memory of the last threads; the first engine's ratios stand beside its rivals."""

    def engine(name, threads, tokens, ms):
        sizes = {"anonymous_bytes": threads << 20, "file_bytes": 7 << 20, "stored_bytes": 30 << 20}
        return {"name": name, "threads": threads, "tokens": tokens, "ms": ms, **sizes}

    names, settings = ("own", "rival"), [(1, 256), (1, 512), (2, 256), (2, 512)]
    engines = [engine(name, *setting, 100 * index) for index, setting in enumerate(settings, 1) for name in names]
    rows = [
        {"name": "own", "baseline": "rival", "ratio": index / 2, "threads": threads, "tokens": tokens}
        for index, (threads, tokens) in enumerate(settings, 1)
    ]
    lines = figures.whole({"engines": engines, "rows": rows, "blocks": 2, "isa": "avx2"}).splitlines()
    assert lines[2] == "| one step, 256 tokens | 1 thread | 2 threads | own is faster | memory | files |"
    assert lines[4:] == [
        "| own | 100 ms | 300 ms |  | 9 MiB | 30 MiB |",
        "| rival | 100 ms | 300 ms | 0.50\u00d7 / 1.50\u00d7 | 9 MiB | 30 MiB |",
    ]
