"""Images from a class-conditional model in pixel space: the sampler of a bundle, whoever runs the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dit2deploy.artefacts.bundle import Bundle
from dit2deploy.artefacts.onnx_model import PortRecord
from dit2deploy.base.errors import Misuse
from dit2deploy.base.progress import report
from dit2deploy.sampling import Scheduler, initial_noise, trajectory

# The model: keyword arguments of the transformer as arrays -> its output [B, C or 2C, H, W].
Call = Callable[[Mapping[str, np.ndarray]], np.ndarray]

_PORTS = ("hidden_states", "timestep", "class_labels")
_PIPELINE = (
    "Use the model's own diffusers pipeline with the engine in it: pipe.transformer = dit2deploy.load({folder!r})."
)


@dataclass(frozen=True)
class Sampler:
    """What drawing an image takes beside the model. `shape` [C, H, W]; `classes` is the null label too."""

    scheduler: Scheduler
    shape: tuple[int, int, int]
    classes: int
    ports: Mapping[str, PortRecord]

    @classmethod
    def of(cls, bundle: Bundle) -> "Sampler":
        """Raises Misuse for a model that draws in the latent space of a VAE or is asked by text, and for a bundle
        without a scheduler."""
        cure = _PIPELINE.format(folder=str(bundle.folder))
        ports = {port.name: port for port in bundle.manifest.inputs}
        if set(ports) != set(_PORTS):
            raise Misuse(f"{bundle.folder}: {bundle.manifest.model} is not asked by a class label alone.", cure)
        config = bundle.config
        channels, size, classes = (config.get(key) for key in ("in_channels", "sample_size", "num_embeds_ada_norm"))
        if channels not in (1, 3):
            raise Misuse(
                f"{bundle.folder}: draws latents of {channels} channels, which need the decoder of a VAE.", cure
            )
        if not isinstance(size, int) or not isinstance(classes, int):
            raise Misuse(f"{bundle.folder}: its config tells no sample_size and num_embeds_ada_norm.", cure)
        if bundle.scheduler_config is None:
            raise Misuse(f"{bundle.folder}: has no scheduler.", cure)
        return cls(Scheduler.from_config(bundle.scheduler_config), (channels, size, size), classes, ports)

    def draw(
        self,
        call: Call,
        *,
        labels: Sequence[int],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        batch: int = 50,
        what: str = "sample",
    ) -> np.ndarray:
        """float32 [N, C, H, W] in -1..1: one image a label and seed, `batch` at a time.

        Raises Misuse for labels that the model does not know.
        """
        unknown = [label for label in labels if not 0 <= label < self.classes]
        if unknown:
            raise Misuse(f"label {unknown[0]}: the model knows 0..{self.classes - 1}.", "Choose one of these.")

        def denoise(*values: np.ndarray) -> np.ndarray:
            return call(
                {
                    name: value.astype(self.ports[name].dtype, copy=False)
                    for name, value in zip(_PORTS, values, strict=True)
                }
            )

        images, done, total = [], 0, steps * -(-len(labels) // batch)
        report(what, 0, total)
        for at in range(0, len(labels), batch):
            latents = noise = initial_noise(seeds[at : at + batch], self.shape)
            for step in trajectory(
                denoise,
                scheduler=self.scheduler,
                labels=np.asarray(labels[at : at + batch]),
                steps=steps,
                guidance=guidance,
                noise=noise,
                null_label=self.classes,
            ):
                latents = step.after
                done += 1
                report(what, done, total)
            images.append(latents)
        return np.clip(np.concatenate(images), -1, 1) if images else np.zeros((0, *self.shape), np.float32)
