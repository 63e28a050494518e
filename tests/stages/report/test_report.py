"""The report stands alone, says what is missing, and never shows more than the evidence."""

import base64
import html.parser
import json
import re

import numpy as np
import pytest

from dit2deploy.artefacts.bundle import PARITY, PROFILE
from dit2deploy.base.errors import Misuse
from dit2deploy.evaluate import charts
from dit2deploy.stages.report import facts, report
from tests.stages.tiny_bundle import LAYERS, tiny_bundle

SECTIONS = ("samples", "policy", "bytes", "latency", "parity", "engines", "made")
_VOID = {"meta", "img", "br", "link", "input", "hr"}


class _Page(html.parser.HTMLParser):
    """Checks that tags close in order; collects ids, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.images, self.text = [], [], [], [], ""

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if "id" in found:
            self.ids.append(found["id"])
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            if name in found:
                self.links.append(found[name])
        if tag == "img":
            self.images.append(found)
        assert tag not in ("script", "iframe", "object", "embed", "link")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def _read(path):
    page = _Page()
    page.feed(path.read_text())
    page.close()
    assert page.open == []
    return page


def _parity(status="passed"):
    def check(values, key, **more):
        rows = [{key: value, "sqnr_db": db, "max_abs": 0.1, "cosine": 1.0} for value, db in values]
        return {"status": status, "values": rows, **more}

    steps = [(90, 60.0), (50, 50.0), (10, 300.0)]
    layers = [(name, 60.0 - index) for index, name in enumerate(LAYERS)]
    final = {"sqnr_db": 45.5, "max_abs": 0.1, "cosine": 1.0}
    checks = {
        "layers": check(layers, "layer", threshold_db=40.0, first_diverging=LAYERS[1] if status == "failed" else None),
        "steps": check(steps, "timestep", threshold_db=35.0),
        "trajectory": check(steps, "timestep", threshold_db=20.0, final=final),
    }
    missing = {name: {"status": "not run", "reason": "torch is not installed"} for name in checks}
    return {
        "date": "2026-01-01",
        "command": "dit2deploy parity <bundle>",
        "target": "reference",
        "status": status,
        "engine_against_quantized": checks,
        "against_full_precision": {"quantized": checks, "engine": missing},
    }


def _profile():
    row = {f"{key}_ms": 2.0 for key in ("min", "p10", "p25", "p50", "p75", "p90", "p99")}
    node = {
        "node": "n",
        "op": "TernaryGemm",
        "layer": "",
        "ms": 1.0,
        "macs": 10**6,
        "bytes": 10**4,
        "macs_per_second": 1e9,
        "bytes_per_second": 1e7,
        "bound": "compute",
        "share": 0.25,
    }
    where = {"threads": 2, "batch": 1}
    return {
        "date": "2026-01-01",
        "command": "dit2deploy profile",
        "machine": {"cpu": "Some & CPU", "cores": 2},
        "target": "reference",
        "headline": where,
        "method": "Turns.",
        "latency": [
            {"name": name, "label": label, **where, **row, "runs": 5, "samples_per_second": 500.0}
            for name, label in (("engine", "reference engine"), ("torch-fp32", "PyTorch fp32 eager"))
        ],
        "ratios": [{"baseline": "torch-fp32", **where, "ratio": 1.5, "p25": 1.4, "p75": 1.6}],
        "memory": {"engine": {"anonymous_bytes": 2_000_000, "file_bytes": 1_000_000, "peak_bytes": 9_000_000}},
        "ops": [{"op": "TernaryGemm", "nodes": 4, "ms": 1.0, "macs": 1, "bytes": 1, "share": 1.0}],
        "layers": [],
        "roofline": {
            "macs_per_second": 1e11,
            "bytes_per_second": 1e10,
            "how": "measured",
            "by_op": [node],
            "ops": [node],
        },
        "not_measured": [{"what": "ONNX Runtime fp32", "reason": "it is not here"}],
    }


def _quality():
    return {
        "date": "2026-01-01",
        "command": "dit2deploy evaluate",
        "target": "reference",
        "samples": 20,
        "steps": 20,
        "guidance": 1.5,
        "seed": 0,
        "note": "FD.",
        "engine": {"class_accuracy": 0.925, "frechet_distance": 12.25, "seconds": 1.0},
        "full_precision": {"reason": "torch is not installed"},
    }


@pytest.fixture
def bundle(tmp_path):
    return tiny_bundle(tmp_path)


def _with_evidence(bundle, **changes):
    evidence = {PARITY: _parity(), PROFILE: _profile(), "quality.json": _quality(), **changes}
    for name, content in evidence.items():
        (bundle.folder / name).write_text(json.dumps(content))


def test_a_page_with_all_evidence_stands_alone(bundle):
    _with_evidence(bundle)
    path = report(bundle.folder, steps=2, target="reference")
    page, content = _read(path), path.read_text()
    assert set(SECTIONS) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert not re.search(r"@import|url\((?!#)", content)
    assert 20_000 < len(content) < 2_000_000
    for said in ("6.4\u00d7 smaller", "passed", "92.5%", "1.50\u00d7 as fast as PyTorch fp32 eager", "Some & CPU"):
        assert said in page.text
    assert "dit2deploy parity <bundle>" in page.text  # escaped, not markup
    assert content.count("<svg") == 6


def test_pictures_are_drawn_or_say_why_not(bundle):
    _with_evidence(bundle)
    page = _read(report(bundle.folder, steps=2, target="reference"))
    (image,) = page.images
    assert image["alt"].startswith("Samples by Engine, reference")
    assert base64.b64decode(image["src"].partition(",")[2]).startswith(b"\x89PNG")
    assert page.text.count("is not on this machine") + page.text.count("torch is not installed") >= 2


def test_pictures_given_are_shown_in_their_order(bundle):
    images = np.zeros((10, 1, 16, 16), np.float32)
    page = _read(report(bundle.folder, samples={"A": images, "B": images}, target="reference"))
    assert [image["alt"] for image in page.images] == ["Samples by A", "Samples by B"]


def test_missing_evidence_names_the_command(bundle):
    page = _read(report(bundle.folder, samples={}, target="reference"))
    for command in ("evaluate", "profile", "parity"):
        assert f"dit2deploy {command} {bundle.folder}" in page.text
    assert "not measured" in page.text
    assert "passed" not in page.text


def test_a_failure_is_shown_with_its_layer(bundle):
    _with_evidence(bundle, **{PARITY: _parity("failed")})
    page = _read(report(bundle.folder, samples={}, target="reference"))
    assert "failed" in page.text
    assert f"First layer that diverges: {LAYERS[1]}" in page.text


def test_evidence_of_another_shape_is_refused(bundle):
    _with_evidence(bundle, **{PROFILE: {"kind": "profile"}})
    with pytest.raises(Misuse, match=r"profile\.json"):
        report(bundle.folder, samples={}, target="reference")
    assert not (bundle.folder / "report.html").exists()


def test_an_engine_is_not_said_to_be_proven_by_evidence_of_another(bundle):
    evidence = {"parity": _parity() | {"target": "ort-cpu"}, "profile": None, "quality": None}
    (engine,) = facts.engines(bundle, evidence)
    assert engine["shown"] == "built"
    assert engine["open"] == "compared with PyTorch, timed on this machine"


def test_layers_that_are_treated_alike_share_a_row(bundle):
    found = facts.policy(bundle)
    assert [(row.layers, row.branch) for row in found["rows"]] == [(list(LAYERS[:3]), "rank 4"), ([LAYERS[3]], "none")]
    assert found["rows"][0].patterns == ["blocks.*.attn.to_q", "blocks.*.ff"]
    assert "ternary (1.6 bit, per channel)" in found["rows"][0].weight


def test_a_chart_follows_the_page(tmp_path):
    figure = charts.bars([charts.Bar("a <b>", 1.0, 0.5, 2.0, colour="one")], unit="ms")
    svg = charts.page_svg(figure, name="x", title="A & B")
    assert svg.startswith("<svg") and svg.endswith("</svg>")
    assert "var(--one, #0b62c4)" in svg
    assert '<title id="x-title">A &amp; B</title>' in svg
    assert all(name.startswith("x-") for name in re.findall(r'\bid="([^"]+)"', svg))
    for path in charts.save(figure, tmp_path / "chart"):
        assert path.stat().st_size > 500
