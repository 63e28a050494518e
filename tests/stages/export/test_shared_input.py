"""Which layers the fusing pass puts together."""

import pytest

from dit2deploy.stages.export.fuse.shared_input import _block, _joined_name


@pytest.mark.parametrize(
    "layers, joined",
    [
        (["b.0.attn.to_q", "b.0.attn.to_k"], "b.0.attn.to_q+to_k"),
        (["b.0.attn.to_q", "b.0.proj_mlp"], "b.0.attn.to_q+proj_mlp"),
        (["x_embedder", "y_embedder"], "x_embedder+y_embedder"),
    ],
)
def test_joined_names_say_all_layers(layers, joined):
    assert _joined_name(layers) == joined


def test_blocks_are_told_apart():
    assert _block("transformer_blocks.0.attn.to_q") == _block("transformer_blocks.0.ff.net.0.proj")
    assert _block("transformer_blocks.0.attn.to_q") != _block("transformer_blocks.1.attn.to_q")
    assert _block("proj_out") == _block("condition_embedder.time_proj") == ""
