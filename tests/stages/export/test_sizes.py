"""Graphs of several sizes over one data file: each computes what PyTorch does; an engine takes the one asked for."""

import numpy as np
import onnx
import pytest
import torch

from dit2deploy.artefacts.onnx_model import DATA, OnnxModel
from dit2deploy.base.errors import Misuse
from dit2deploy.drop_in import load
from dit2deploy.evaluate.fidelity import sqnr_db
from dit2deploy.models.dit import DIT
from dit2deploy.models.family import at_size
from dit2deploy.models.flux import FLUX
from dit2deploy.models.pixart import PIXART
from dit2deploy.nn.convert import load_quantized
from dit2deploy.stages.build import build
from dit2deploy.stages.export import export
from tests.bundles import engines
from tests.packing import pack_checkpoint, policy_of, tiny_module

OTHER = (12, 4)


def weights(model: OnnxModel, name: str) -> dict[str, tuple[str, ...]]:
    """Where the initializers of a graph lie that are not in it: file, offset, length."""
    initializers = onnx.load(model.folder / name, load_external_data=False).graph.initializer
    found = {tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in initializers}
    return {name: (at["location"], at["offset"], at["length"]) for name, at in found.items() if at}


def test_all_weights_are_written_once(pixart_sizes):
    _, model = pixart_sizes
    assert model.manifest.sizes == (OTHER,)
    own, other = (weights(model, name) for name in model.graphs.values())
    assert {place[0] for place in (*own.values(), *other.values())} == {DATA}
    different = {name for name in own.keys() | other.keys() if own.get(name) != other.get(name)}
    assert len(own) > 10 and different == {"pos_embed.pos_embed"}
    once = sum(int(length) for _, _, length in {*own.values(), *other.values()})
    assert once <= (model.folder / DATA).stat().st_size < once + 4096 * len(own)


def test_the_engine_takes_the_graph_of_the_size_asked_for(pixart_sizes, tmp_path):
    checkpoint, model = pixart_sizes
    bundle = build(model.folder, tmp_path / "bundle", targets=engines())
    network = load_quantized(checkpoint)
    for target in engines():
        opened = load(bundle.folder, target=target)
        for size in (OTHER, None):
            inputs = at_size(PIXART.inputs(network.config, batch=3, seed=5, second=True), size)
            with torch.no_grad():
                want = network(**inputs, return_dict=False)[0].numpy()
            got = opened(**inputs, return_dict=False)[0].numpy()
            assert got.shape == want.shape and sqnr_db(want, got) > 40
        with pytest.raises(Misuse, match="no graph for latents of 10x10 .there: 8x8, 12x4"):
            opened(**at_size(inputs, (10, 10)))
        opened.close()
        data = (bundle.folder / target / DATA).stat().st_size
        assert data < 1.1 * (model.folder / DATA).stat().st_size


def test_the_table_of_positions_is_that_of_diffusers():
    for family, size in ((DIT, (12, 12)), (PIXART, OTHER)):
        module = tiny_module(family)
        inputs = at_size(family.inputs(module.config, batch=2, seed=1), size)
        with torch.no_grad():
            want = module(**inputs, return_dict=False)[0]
            family.resize(module, size)
            np.testing.assert_allclose(module(**inputs, return_dict=False)[0], want, atol=1e-6)


@pytest.mark.parametrize(
    "family, size, cause",
    [
        (DIT, (8, 12), "not square"),
        (DIT, (9, 9), "multiple of the patch"),
        (PIXART, (0, 8), "multiple of the patch"),
        (FLUX, (8, 8), "one graph serves all sizes"),
    ],
)
def test_sizes_that_cannot_be_are_refused(family, size, cause, tmp_path):
    module = tiny_module(family)
    checkpoint = pack_checkpoint(tmp_path / "checkpoint", module, policy_of(family, module))
    with pytest.raises(Misuse, match=cause):
        export(checkpoint.folder, tmp_path / "onnx", sizes=[size])
    assert not (tmp_path / "onnx").exists()
