"""The group of a timestep in numpy is that of the model's forward, at bounds, between integers and at the very end."""

import numpy as np
import torch

from dit2deploy.artefacts.timesteps import groups_of, whole
from dit2deploy.nn.timestep_groups import TimestepGroups

BOUNDS = (250, 500, 750, 1000)


def test_groups_are_those_at_run_time():
    timesteps = np.array([0.0, 249.6, 250.0, 499.995, 500.0, 749.6, 750.4, 999.0, 1000.0], np.float32)
    groups = TimestepGroups(BOUNDS, 1000.0)

    class Transformer(torch.nn.Module):
        def forward(self, *, timestep: torch.Tensor) -> torch.Tensor:
            assert groups.index is not None
            return groups.index

    transformer = Transformer()
    groups.attach(transformer)
    found = transformer(timestep=torch.from_numpy(timesteps / 1000)).tolist()
    assert found == [0, 0, 1, 2, 2, 2, 3, 3, 3]  # 499.995 is 500 that a rounding moved
    assert groups_of(timesteps, BOUNDS).tolist() == found
    assert groups_of([whole(float(t)) for t in timesteps], BOUNDS).tolist() == found
    assert groups_of(timesteps, (1000,)).tolist() == [0] * len(found)
