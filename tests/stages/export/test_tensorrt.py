"""TensorRT-RTX engines of every family: each dynamic axis has its range, and each size of latents its engine."""

from types import SimpleNamespace

import numpy as np
import pytest

from dit2deploy.base.errors import Misuse
from dit2deploy.models import FAMILIES
from dit2deploy.models.dit import DIT
from dit2deploy.models.family import at_size
from dit2deploy.models.pixart import PIXART
from dit2deploy.stages.build import build
from dit2deploy.stages.export import export
from dit2deploy.targets import by_name, cuda, tensorrt_rtx, trt_runner
from tests.packing import pack_checkpoint, policy_of, tiny_module

ABLE = tensorrt_rtx.availability()
pytestmark = pytest.mark.skipif(not ABLE.can_build, reason=f"tensorrt-rtx: {ABLE.reason}")
AXES = {
    "dit": {"batch": (1, 2, 16)},
    "pixart": {"batch": (1, 2, 16), "text_tokens": (1, 120, 300)},
    "sd3": {"batch": (1, 2, 4), "height": (2, 8, 12), "width": (2, 8, 12), "text_tokens": (1, 333, 589)},
    "flux": {"batch": (1, 2, 4), "image_tokens": (1, 4096, 8192), "text_tokens": (1, 512, 512)},
    "z-image": {"batch": (1, 2, 4), "height": (16, 64, 64), "width": (8, 64, 64), "text_tokens": (32, 128, 128)},
    "wan": {
        "batch": (1, 2, 4),
        "frames": (1, 21, 21),
        "height": (2, 60, 64),
        "width": (2, 64, 64),
        "text_tokens": (1, 512, 512),
    },
}


def lengths(record) -> dict[str, tuple[int, int, int]]:
    return {name: (axis["least"], axis["usual"], axis["most"]) for name, axis in record.details["profile"].items()}


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_an_engine_serves_a_range_of_every_dynamic_axis(name, exported, tmp_path):
    made = exported(name, "fused")
    record = tensorrt_rtx.build(made.model, root=tmp_path, options={"compute_capabilities": ["8.6"]})
    assert lengths(record) == AXES[name]
    told = record.details["engines"]["sm86"]
    assert told["network_plugins"] == told["engine_plugins"]
    assert told["packed_weights_found_once"] == told["packed_weights"] > 5
    assert told["size"] == ("8x8" if made.family.resize else "")


def test_codes_of_four_bits_are_packed(tmp_path):
    """In the blocks, whose K are 64 and 256; modulation and embedders have 8 bits. All layers keep their plugins."""
    module = tiny_module(DIT, num_attention_heads=4)
    policy = policy_of(DIT, module, bits=(4, 3), bounds=(500, 1000), low_rank=4)
    checkpoint = pack_checkpoint(tmp_path / "checkpoint", module, policy)
    model = export(checkpoint.folder, tmp_path / "onnx", form="fused")
    for floats in ("float32", "float16"):
        root = tmp_path / floats
        record = tensorrt_rtx.build(model, root=root, options={"compute_capabilities": ["8.6"], "floats": floats})
        (told,) = record.details["engines"].values()
        assert told["network_plugins"] == told["engine_plugins"]
        assert told["packed_quantizers"] == 2 * 4  # of qkv, proj, fc1 and fc2 of two blocks


def test_a_range_that_is_asked_for_is_the_engines(exported, tmp_path):
    model = exported("flux", "fused").model
    ranges = {"image_tokens": (16, 16, 16), "batch": (1, 1, 1)}
    record = tensorrt_rtx.build(model, root=tmp_path, options={"compute_capabilities": ["8.6"], "ranges": ranges})
    assert lengths(record) == {**AXES["flux"], **ranges}


def test_every_size_has_its_engine_and_the_runner_opens_that(pixart_sizes, tmp_path, monkeypatch):
    options = {"tensorrt-rtx": {"compute_capabilities": ["7.5", "8.6"]}}
    bundle = build(pixart_sizes[1].folder, tmp_path / "bundle", targets=["tensorrt-rtx"], options=options)
    record = bundle.target("tensorrt-rtx")
    made = record.details["engines"]
    assert {label: (told["size"], told["compute_capabilities"]) for label, told in made.items()} == {
        "sm86": ("8x8", ["8.6"]),
        "sm86.12x4": ("12x4", ["8.6"]),
        "sm75": ("8x8", ["7.5"]),
        "sm75.12x4": ("12x4", ["7.5"]),
    }
    assert all(told["packed_weights_found_once"] == told["packed_weights"] > 5 for told in made.values())
    totals = [made[plan]["bytes"] + made[f"{plan}.12x4"]["bytes"] for plan in ("sm86", "sm75")]
    assert record.weight_bytes == max(totals)

    opened, kept = [], []
    monkeypatch.setattr(cuda, "capability", lambda: "7.5")
    monkeypatch.setattr(cuda, "name", lambda: "a GPU")
    runtime = SimpleNamespace(__version__=record.versions["tensorrt-rtx"])
    monkeypatch.setattr(trt_runner.importlib, "import_module", lambda name: runtime)

    def runner(module, engine, library, check, *, compiled):
        opened.append(engine.name)
        kept.append(compiled.name)
        return SimpleNamespace(run=lambda inputs: check(inputs) or {}, close=lambda: None)

    monkeypatch.setattr(trt_runner, "TensorRtRunner", runner)
    engine = by_name("tensorrt-rtx").open(bundle)
    inputs = PIXART.inputs(tiny_module(PIXART).config, batch=3, seed=5)
    for size in ((12, 4), None, (12, 4)):
        engine.run({name: value.numpy() for name, value in at_size(inputs, size).items()})
    assert opened == ["sm75.12x4.engine", "sm75.engine"]
    digests = [bundle.manifest.sha256[f"tensorrt-rtx/{name}"][:16] for name in opened]
    assert kept == [f"tensorrt-rtx-{runtime.__version__}-sm75-a-GPU-{digest}.kernels" for digest in digests]
    with pytest.raises(Misuse, match="no graph for latents of 10x10 .there: 8x8, 12x4"):
        engine.run({name: value.numpy() for name, value in at_size(inputs, (10, 10)).items()})
    long = {name: value.numpy() for name, value in PIXART.inputs(tiny_module(PIXART).config, batch=17, seed=5).items()}
    with pytest.raises(Misuse, match=r"(?s)batch of hidden_states is 17.*--range batch=1:2:17"):
        engine.run(long)
    with pytest.raises(Misuse, match="no hidden_states"):
        engine.run({"x": np.zeros(3)})
    engine.close()
