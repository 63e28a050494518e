"""A trace takes seconds: exports of one model, in tests that look at something else, share it."""

import sys

import pytest


def lower_once(patch: pytest.MonkeyPatch, traced: list) -> None:
    """All exports write the same graph: what `traced` holds, or else the first that is traced."""
    module = sys.modules["dit2deploy.stages.export.export"]
    lower = module._lower

    def once(*arguments, **options):
        traced[:] = traced or [lower(*arguments, **options)]
        model, layers = traced[0]
        return model.clone(), layers

    patch.setattr(module, "_lower", once)
