"""How a checkpoint is trained: everything that the result depends on, beside the inputs and the seed."""

from dataclasses import dataclass
from typing import Literal

from dit2deploy.base.errors import Misuse


@dataclass(frozen=True)
class Settings:
    """Settings of `finetune`.

    Of RobuQ's training AdamW, 350,000 steps and the order of activation bits are known, of TreeQ's branches that the
    base is frozen; all numbers here are ours, tried on the demo (methods.md 3.6, 4.3).
    """

    steps: int = 2000
    batch: int = 32  # samples a step (of models that are not class-conditional: a recorded call a step)
    learning_rate: float = 1e-3  # of latent weights, in units of a channel's largest weight
    branch_learning_rate: float = 3e-4  # of branches, biases and the logarithm of scales
    trained: Literal["all", "branch", "selective"] = "all"  # "branch": codes stay (PEFT); "selective": QuEST's layers
    schedule: tuple[int, ...] = ()  # least activation bits in equal parts of the training, e.g. 8, 4, 3 (RobuQ)
    ema: float = 0.999  # of what is trained; the average is what is written
    warmup: float = 0.05  # share of the training in which the learning rate rises
    clip_norm: float = 1.0
    trajectories: int = 128  # fresh ones of the teacher, where the model is class-conditional
    data_weight: float = 1.0  # of the loss against the data's own targets, beside the teacher's

    def check(self) -> None:
        """Raises Misuse for numbers that make no training."""
        if self.steps < 1 or self.batch < 1 or self.trajectories < 0:
            raise Misuse(
                f"finetune: {self.steps} steps of {self.batch} samples, {self.trajectories} trajectories.",
                "Give at least 1 step and 1 sample, and no negative number.",
            )
        if not (0 <= self.ema < 1 and 0 <= self.warmup < 1 and self.clip_norm > 0):
            raise Misuse(
                f"finetune: EMA {self.ema}, warm-up {self.warmup}, clipping at {self.clip_norm}.",
                "Give an EMA and a warm-up in 0..1 (1 excluded) and a positive norm to clip at.",
            )
        if any(not 1 <= bits <= 8 for bits in self.schedule):
            raise Misuse(f"finetune: the schedule {list(self.schedule)} leaves 1..8 bits.", "Give e.g. 8,4.")
