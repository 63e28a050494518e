"""Below a ceiling of memory the codes are the same; one that cannot be kept is told before anything is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit2deploy.artefacts.checkpoint import TENSORS
from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.base.errors import Misuse
from dit2deploy.base.files import sha256_of_file
from dit2deploy.base.memory import SLACK
from dit2deploy.models.load import linears_of, open_model, skeleton
from dit2deploy.models.stream import bytes_of
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.quantize import estimate, quantize
from dit2deploy.stages.quantize.plan import Plan, make_plan, workspace
from dit2deploy.stages.search import search

ROOT = Path(__file__).resolve().parents[3]
quantize_module = sys.modules["dit2deploy.stages.quantize.quantize"]


@pytest.fixture(scope="module")
def calibration(tiny_dit_folder, tmp_path_factory):
    return calibrate(tiny_dit_folder, tmp_path_factory.mktemp("calibration") / "set", samples=4, steps=3)


def policy_of(model, tmp_path, recipe="w4a4", **options):
    return search(model, tmp_path / "policy.json", recipe=recipe, low_rank=2, **options)


@pytest.mark.parametrize("options", [{}, {"smoothing": 0.5, "branch_init": "weighted"}])
def test_streamed_and_resident_networks_give_the_same_bytes(
    tiny_dit_folder, calibration, tmp_path, monkeypatch, options
):
    policy = policy_of(tiny_dit_folder, tmp_path, **options)
    hashes = []
    for name, plan in (("all", Plan(None, 1 << 30, 0)), ("none", Plan(0, 1 << 14, 0))):
        monkeypatch.setattr(quantize_module, "make_plan", lambda *_, plan=plan, **__: plan)
        made = quantize(tiny_dit_folder, policy, calibration, tmp_path / name)
        hashes.append(sha256_of_file(made.folder / TENSORS))
    assert hashes[0] == hashes[1]


def test_a_ceiling_that_cannot_be_kept_is_one_error_and_leaves_nothing(tiny_dit_folder, calibration, tmp_path):
    policy = policy_of(tiny_dit_folder, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Misuse, match="layer .* takes .* more than a ceiling of 0.05 GB") as caught:
        quantize(tiny_dit_folder, policy, calibration, tmp_path / "out", max_memory=50_000_000)
    assert "--max-memory" in caught.value.cure and "nearest" in caught.value.cure
    with pytest.raises(Misuse, match="more than a ceiling"):
        calibrate(tiny_dit_folder, tmp_path / "set", samples=2, steps=2, max_memory=50_000_000)
    assert sorted(tmp_path.iterdir()) == before


def test_what_holds_the_whole_network_says_so(tiny_dit_folder, calibration, tmp_path):
    policy = policy_of(tiny_dit_folder, tmp_path, hessian="fisher")
    with pytest.raises(Misuse, match="Fisher scores take the whole network"):
        quantize(tiny_dit_folder, policy, calibration, tmp_path / "out", max_memory=50_000_000)


def test_a_plan_divides_what_the_ceiling_leaves(tiny_dit_folder, calibration, tmp_path, monkeypatch):
    """More room: first larger runs of Hessians, then more of the network; never more than is left."""
    policy, empty = policy_of(tiny_dit_folder, tmp_path), skeleton(open_model(tiny_dit_folder))
    shapes, plans = linears_of(empty), []
    call = {name: torch.from_numpy(value) for name, value in calibration.call(0).items()}
    monkeypatch.setattr("dit2deploy.base.memory.available_bytes", lambda: 1 << 40)
    for left in (0, 1 << 20, 1 << 30):
        monkeypatch.setattr("dit2deploy.base.memory.anonymous_bytes", lambda: 0)
        least = max(workspace(shapes[name], policy.layers[name]) for name in shapes if policy.layers[name].is_quantized)
        ceiling = max(least, plans[0].peak if plans else 0) + SLACK + left
        plans.append(make_plan(empty, shapes, policy, shapes, call=call, max_memory=ceiling))
        assert plans[-1].peak + plans[-1].keep <= ceiling - SLACK
    assert plans[0].keep <= plans[1].keep <= plans[2].keep and plans[2].keep >= bytes_of(empty)


def test_an_estimate_writes_nothing_and_counts_what_is_written(tiny_dit_folder, calibration, tmp_path):
    policy = policy_of(tiny_dit_folder, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = estimate(tiny_dit_folder, policy, calibration.call(0), calls=len(calibration))
    assert sorted(tmp_path.rglob("*")) == before
    made = quantize(tiny_dit_folder, policy, calibration, tmp_path / "out")
    size = (made.folder / TENSORS).stat().st_size
    assert found.seconds > 0 and size < found.disk < 5 * size  # parts, checkpoint and what blocks give


_CHILD = """
import json, sys, threading, time
import numpy as np, torch
from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.base.machine import anonymous_bytes
from dit2deploy.quantizers.linear import quantize_linear

layer, n, k = LayerPolicy.model_validate_json(sys.argv[1]), *map(int, sys.argv[2:])
warm = LayerPolicy.model_validate({**json.loads(sys.argv[1]), "low_rank": min(layer.low_rank, 8)})
quantize_linear(np.ones((64, 512), np.float32), None, warm, hessian=torch.eye(512))
before, peak, over = anonymous_bytes(), 0, threading.Event()

def look():
    global peak
    while not over.is_set():
        peak = max(peak, anonymous_bytes())
        time.sleep(0.001)

watcher = threading.Thread(target=look)
watcher.start()
hessian = torch.eye(k) if layer.needs_moments else None
quantize_linear(np.random.default_rng(0).standard_normal((n, k), np.float32), None, layer, hessian=hessian)
over.set()
watcher.join()
print(peak - before)
"""


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"rounding": "nearest"}, (4096, 2048)),
        ({"rounding": "nearest", "low_rank": 16}, (4096, 2048)),
        ({"rounding": "gptq"}, (256, 4096)),
    ],
)
def test_a_layer_takes_no_more_than_its_workspace(options, shape):
    layer = LayerPolicy(weight="ternary", activation_bits=(4,), hadamard=512, **options)
    command = [sys.executable, "-c", _CHILD, layer.model_dump_json(), *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    taken = json.loads(done.stdout)
    assert 0.2 * workspace(shape, layer) < taken < workspace(shape, layer)
