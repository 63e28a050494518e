"""`inspect` explains each kind of JSON file, and the checkpoint that comes with the package."""

import json

from dit2deploy.artefacts import schema
from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.artefacts.device_table import DeviceTable, Linear, LinearTime
from dit2deploy.artefacts.policy import Policy
from dit2deploy.cli import main
from dit2deploy.demo import CHECKPOINT
from dit2deploy.evaluate.headline import headline
from dit2deploy.stages.search.front import Front, FrontPoint
from tests.stages.tiny_bundle import tiny_bundle

POLICY = CHECKPOINT / "policy.json"


def explained(capsys, path, *words: str) -> str:
    main(["inspect", str(path), *words])
    return " ".join(capsys.readouterr().out.split())


def test_policy_and_checkpoint(capsys):
    assert "weights ternary (" in explained(capsys, POLICY)
    assert "trained 868 steps" in explained(capsys, CHECKPOINT).replace("\u2502", "").replace("  ", " ")


def test_a_bundle_without_a_policy(capsys, tmp_path):
    """As build makes it where the checkpoint is gone."""
    bundle = tiny_bundle(tmp_path)
    (bundle.folder / "policy.json").unlink()
    kept = {name: digest for name, digest in bundle.manifest.sha256.items() if name != "policy.json"}
    schema.save(bundle.manifest.model_copy(update={"sha256": kept}), bundle.folder / "manifest.json")
    assert "none: the checkpoint was gone at the build" in explained(capsys, bundle.folder)
    assert headline(Bundle.load(bundle.folder))["recipe"] is None


def test_a_device_table(capsys, tmp_path):
    linear = Linear(n=8, k=16, rows=4, weight="ternary", bits=4)
    table = DeviceTable(device="toy", target="ort-cpu", threads=1, batch=1, instructions="avx2", library_sha256="")
    table.extended([LinearTime(linear=linear, ms=0.25, least_ms=0.2, rounds=3)]).save(tmp_path / "d.json")
    assert json.loads(explained(capsys, tmp_path / "d.json", "--json"))["kind"] == "device_table"
    assert "0.250 ms" in explained(capsys, tmp_path / "d.json")


def test_a_front(capsys, tmp_path):
    point = FrontPoint(cost=3.0, error=0.01, policy=Policy.load(POLICY))
    front = Front(
        recipe="treeq-tss",
        allocate="activations",
        weighting="macs",
        unit="bits",
        budget=3,
        chosen=0,
        points=(point,),
        uniform=(),
    )
    schema.save(front, tmp_path / "f.json")
    assert "point 0, chosen" in explained(capsys, tmp_path / "f.json")
