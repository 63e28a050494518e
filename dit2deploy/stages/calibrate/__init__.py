"""Stage calibrate: inputs of the full-precision transformer, recorded on its own denoising trajectories."""

from dit2deploy.stages.calibrate.calibrate import calibrate
from dit2deploy.stages.calibrate.estimate import estimate

__all__ = ["calibrate", "estimate"]
