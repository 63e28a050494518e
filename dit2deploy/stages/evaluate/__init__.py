"""Stage evaluate: how good the engine's images are, beside full precision from the same seeds."""

from dit2deploy.stages.evaluate.labels import evaluate, summary
from dit2deploy.stages.evaluate.prompts import evaluate_prompts

__all__ = ["evaluate", "evaluate_prompts", "summary"]
