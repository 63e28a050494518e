"""Tiny models that many tests share: a saved DiT pipeline, its policy and checkpoint. Random weights, fixed seeds."""

from pathlib import Path

import pytest

from dit2deploy.artefacts.checkpoint import Checkpoint
from dit2deploy.artefacts.policy import Policy
from dit2deploy.base.files import write_json
from tests import packing

COMPILED = ("test_compile_tiny.py", "test_card.py")  # share the fixture `compiled`


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file runs in one process, for its fixtures; so do those of tests/stages/export, which share what they export,
    and those of COMPILED.

    (xdist's own way to say so, groups, does nothing beside pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0])
            if file.name in COMPILED:
                return "compiled"
            return str(file.parent if file.parent.name == "export" else file)

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    """Tiny models only get slower by more threads."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dit_folder(tmp_path_factory) -> Path:
    """A pipeline folder as diffusers saves it: DiT, 2 blocks, hidden size 48 = 3 * 16, 10 classes, and a scheduler."""
    from dit2deploy.models.dit import DIT

    folder = tmp_path_factory.mktemp("tiny_dit")
    packing.tiny_module(DIT).save_pretrained(folder / "transformer")
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "DiTPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": [None, None],
        },
    )
    scheduler = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    return folder


@pytest.fixture(scope="session")
def tiny_policy(tiny_dit_folder: Path) -> Policy:
    """Ternary blocks with 4-bit activations and a low-rank branch of 4; the rest int8 or float."""
    from dit2deploy.models.load import load_transformer

    module, family = load_transformer(tiny_dit_folder)
    return packing.policy_of(family, module, low_rank=4)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_dit_folder: Path, tiny_policy: Policy, tmp_path_factory) -> Checkpoint:
    """The tiny DiT packed by round-to-nearest, scheduler included."""
    from dit2deploy.models.load import load_transformer, open_model

    module, _ = load_transformer(tiny_dit_folder)
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    return packing.pack_checkpoint(folder, module, tiny_policy, scheduler=open_model(tiny_dit_folder).scheduler_config)


@pytest.fixture(scope="session")
def compiled(tiny_dit_folder: Path, tmp_path_factory) -> Path:
    """The bundle that compile() makes of the tiny DiT by packing.COMPILE; its work folder lies beside it."""
    from dit2deploy.pipeline import compile

    return compile(tiny_dit_folder, tmp_path_factory.mktemp("compiled") / "bundle", **packing.COMPILE).folder


@pytest.fixture
def memory_not_measured(monkeypatch):
    """For tests that run profile and do not look at it: each contestant's memory takes a process that imports torch."""
    told = {"reason": "not part of this test"}
    monkeypatch.setattr("dit2deploy.stages.profile.memory.measure", lambda *_, **__: dict(told))
