"""What calibrate will take: `dit2deploy calibrate --dry-run`."""

from pathlib import Path

from dit2deploy.base.estimate import Estimate, read_rate
from dit2deploy.base.machine import anonymous_bytes
from dit2deploy.base.memory import SLACK
from dit2deploy.models.cost import cost_of_call, product_rate
from dit2deploy.models.load import open_model, skeleton
from dit2deploy.models.pipeline import read_prompts
from dit2deploy.models.stream import bytes_of
from dit2deploy.sampling import is_guided
from dit2deploy.stages.calibrate.calibrate import has_trajectories, require_pipeline, weights_in_memory


def estimate(
    model: Path,
    *,
    samples: int = 8,
    steps: int = 20,
    guidance: float = 1.5,
    max_memory: int | None = None,
    prompts: Path | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Estimate:
    """Of `calibrate` with the same arguments; raises Misuse as it does. Writes nothing.

    With prompts, the least: to load the whole pipeline in float32. What its text encoders, its images of a size and
    their calls take is not known without running it.
    """
    source = open_model(Path(model))
    if prompts is not None:
        read_prompts(Path(prompts))
        return _of_pipeline(Path(model), max_memory)
    empty = skeleton(source)
    guided = has_trajectories(source, Path(model)) and is_guided(guidance)
    inputs = source.family.inputs(empty.config, batch=2 * samples if guided else samples, seed=0)
    rate = read_rate(source.tensors.files[0].path)
    stored = sum(file.path.stat().st_size for file in source.tensors.files)
    seconds = stored / rate  # the hash of the weights
    disk = steps * sum(tensor.nbytes for tensor in inputs.values())
    memory = anonymous_bytes() + SLACK + 2 * disk
    if has_trajectories(source, Path(model)):
        cost, whole = cost_of_call(empty, inputs), bytes_of(empty)
        least, keep = weights_in_memory(empty, source, samples=samples, guidance=guidance, max_memory=max_memory)
        left_out = max(0, whole - keep) / whole
        seconds += stored / rate + steps * (cost.flops / product_rate() + left_out * stored / rate)
        memory += least + min(keep, whole)
        disk += steps * inputs["hidden_states"].nbytes * 2  # outputs of steps, of two halves where sigma is learned
    return Estimate("calibrate", seconds, memory, disk)


def _of_pipeline(model: Path, max_memory: int | None) -> Estimate:
    files = sorted(model.rglob("*.safetensors"))
    whole, stored = require_pipeline(model, max_memory), sum(path.stat().st_size for path in files)
    seconds = stored / read_rate(max(files, key=lambda path: path.stat().st_size))
    left_out = "what text encoders, calls of the transformer and images of the prompts take, and the set on the disk"
    return Estimate("calibrate", seconds, anonymous_bytes() + SLACK + whole, 0, left_out)
