"""Stage sample: pictures and clips by the engine of a bundle."""

from dit2deploy.stages.sample.prompts import sample_prompts, tiles
from dit2deploy.stages.sample.sample import sample

__all__ = ["sample", "sample_prompts", "tiles"]
