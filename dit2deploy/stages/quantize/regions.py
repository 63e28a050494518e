"""Steps of the two regions of softmax and GELU in each timestep group: TQ-DiT's search on the calibration set.

TQ-DiT (https://arxiv.org/abs/2502.04056; methods.md 7.1 and 7.2): of each group of consecutive steps (TGQ), candidates
are scored by the error that they leave in the outputs z of the product that reads them (P V, or the linear after GELU),
weighted by the squared gradient of a loss with respect to z (HO).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.models.attention_processor import Attention

from dit2deploy.artefacts.calibration_set import CalibrationSet
from dit2deploy.artefacts.checkpoint import CONFIG
from dit2deploy.artefacts.policy import Policy
from dit2deploy.artefacts.timesteps import groups_of
from dit2deploy.base.errors import Misuse
from dit2deploy.base.memory import require
from dit2deploy.base.progress import note, track
from dit2deploy.models.load import known_family
from dit2deploy.nn.attention import Processor, attend
from dit2deploy.quantizers import multi_region
from dit2deploy.quantizers.inputs import watch

ITEMS = 8  # samples of each call that are scored on
ROWS = 64  # rows (tokens) of a linear's inputs and outputs that are scored on, in each call


def search_regions(
    network: torch.nn.Module, policy: Policy, calibration: CalibrationSet, *, seed: int
) -> dict[str, np.ndarray]:
    """The checkpoint's tensors of what the policy quantizes by two regions: the tables `regions` float32 [T, 3] of its
    attentions and GELU layers, and the attentions' widths.

    `network` is the full-precision transformer with its own attention processors, and gets them back. [inferred] The
    loss: TQ-DiT's code takes the KL divergence from the full-precision output, whose gradient at that output is zero
    but for the numerics; ours is a random projection v . f(x) of the output, v normal, whose squared gradient is in
    expectation the diagonal of the Gauss-Newton matrix. Layers are searched against the inputs of full precision, as
    in that code. A timestep group that the calibration set has no call of takes its nearest neighbour's steps. Raises
    Misuse for probabilities or GELU outputs that are not finite.
    """
    batched = known_family(type(network).__name__, Path(CONFIG)).batch_axes(cast(Any, network).config)
    group_of = groups_of(calibration.manifest.timesteps, policy.timestep_bounds)
    scores = _Scores(network, policy, _largest(network, policy, calibration, group_of), seed=seed)
    for index in track(range(len(calibration)), "search regions"):
        given = calibration.call(index)
        rows = np.sort(np.random.default_rng([seed, index]).permutation(len(given["timestep"]))[:ITEMS])
        few = {name: np.take(given[name], rows, axis=axis) for name, axis in batched.items()}
        call = {name: torch.from_numpy(value) for name, value in {**given, **few}.items()}
        scores.add(call, int(group_of[index]), seed=seed + index)
    return scores.tables(sorted(set(group_of.tolist())))


def _largest(
    network: torch.nn.Module, policy: Policy, calibration: CalibrationSet, group_of: np.ndarray
) -> dict[tuple[str, int], float]:
    """The largest input of each GELU layer in each timestep group."""
    found: dict[tuple[str, int], float] = {}

    def see(name: str, x: torch.Tensor, index: int) -> None:
        key = name, int(group_of[index])
        found[key] = max(found.get(key, 0.0), float(x.max()))

    names = _gelu_layers(policy)
    if names:
        watch(network, names, calibration, see)
    return found


def _gelu_layers(policy: Policy) -> list[str]:
    return [name for name, layer in policy.layers.items() if layer.is_quantized and layer.regions == "gelu"]


class _Scores:
    """The sums of the candidates' errors, by place (an attention or a layer) and timestep group."""

    def __init__(
        self, network: torch.nn.Module, policy: Policy, largest: Mapping[tuple[str, int], float], *, seed: int
    ) -> None:
        self._network, self._policy, self._seed = network, policy, seed
        self._layers = _gelu_layers(policy)
        self._candidates: dict[tuple[str, int], torch.Tensor] = {
            (name, group): multi_region.gelu_candidates(most, policy.layers[name].activation_bits[group])
            for (name, group), most in largest.items()
        }
        for name, attention in policy.attentions.items():
            for group, bits in enumerate(attention.probability_bits):
                self._candidates[name, group] = multi_region.softmax_candidates(bits)
        self._errors: dict[tuple[str, int], torch.Tensor] = {}
        self._without_gradient: set[str] = set()

    def add(self, call: dict[str, torch.Tensor], group: int, *, seed: int) -> None:
        """Scores all candidates of a timestep group on one call [B, ..] of the network."""
        seen = self._recorded(call, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for name, (x, other, importance) in seen.items():
            if not importance.any():  # nothing that the output depends on: adaLN-zero before training
                self._without_gradient.add(name)
                importance = torch.ones_like(importance)
            if name in self._layers:
                bits = self._policy.layers[name].activation_bits[group]
                x, importance = x.flatten(0, -2), importance.flatten(0, -2)
                rows = torch.randperm(len(x), generator=generator)[:ROWS]
                x, importance = x[rows], importance[rows]
            else:
                bits = self._policy.attentions[name].probability_bits[group]
            key = name, group
            errors = multi_region.output_errors(x, other, importance, self._candidates[key], bits)
            if not torch.isfinite(errors).all():
                raise Misuse(
                    f"{name}: its inputs are not finite on the calibration set.", "Look for NaN or inf in the weights."
                )
            self._errors[key] = self._errors.get(key, 0) + errors

    def _recorded(
        self, call: dict[str, torch.Tensor], *, seed: int
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each place what it quantizes, what that is multiplied with, and the squared gradient of the product."""
        seen: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

        def see(name: str, x: torch.Tensor, other: torch.Tensor, z: torch.Tensor) -> None:
            seen[name] = x.detach(), other.detach(), z

        handles = [
            self._network.get_submodule(name).register_forward_hook(
                lambda layer, arguments, z, name=name: see(name, arguments[0], layer.weight.T, z)
            )
            for name in self._layers
        ]
        attentions = {name: cast(Attention, self._network.get_submodule(name)) for name in self._policy.attentions}
        before = {name: attention.processor for name, attention in attentions.items()}
        for name, attention in attentions.items():
            attention.set_processor(_Recorder(name, attention.processor, see))
        try:
            with torch.enable_grad():
                # No weight takes part in the gradients: the latents do, so that every z is part of a graph.
                latents = call["hidden_states"].requires_grad_(True)
                output = self._network(**{**call, "hidden_states": latents}, return_dict=False)[0]
                v = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
                # Text that is refined before it meets the latents (Z-Image) is no part of the graph.
                products = {name: z for name, (_, _, z) in seen.items() if z.requires_grad}
                taken = torch.autograd.grad((output * v).sum(), list(products.values()), allow_unused=True)
                gradients = dict(zip(products, taken, strict=True))
        finally:
            for handle in handles:
                handle.remove()
            for name, attention in attentions.items():
                attention.set_processor(before[name])
        return {
            name: (x, other, torch.zeros_like(z) if (gradient := gradients.get(name)) is None else gradient.square())
            for name, (x, other, z) in seen.items()
        }

    def tables(self, groups: list[int]) -> dict[str, np.ndarray]:
        """The best candidates; `groups` are those that were scored."""
        if self._without_gradient:
            note(f"regions: no gradient reaches {len(self._without_gradient)} places; their errors count unweighted")
        count = len(self._policy.timestep_bounds)
        if len(groups) < count:
            note(
                f"regions: {count - len(groups)} timestep groups have no call in the calibration set; neighbours serve"
            )
        nearest = [min(groups, key=lambda other, group=group: abs(other - group)) for group in range(count)]
        tables = {}
        for name in (*self._policy.attentions, *self._layers):
            suffix = "processor.regions" if name in self._policy.attentions else "regions"
            best = [self._candidates[name, group][int(self._errors[name, group].argmin())] for group in nearest]
            tables[f"{name}.{suffix}"] = torch.stack(best).numpy()
        for name, attention in self._policy.attentions.items():
            for leaf, widths in (("qmax", attention.bits), ("probability_qmax", attention.probability_bits)):
                tables[f"{name}.processor.{leaf}"] = np.array([2 ** (bits - 1) - 1 for bits in widths], np.float32)
        return tables


class _Recorder:
    """In the place of `processor`: computes attention in full precision, and tells `see` of P, V and P V."""

    def __init__(
        self,
        name: str,
        processor: Processor,
        see: Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None],
    ) -> None:
        self._name, self._processor, self._see = name, processor, see
        self.__call__ = processor.__call__  # as in QuantAttention

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return attend(self._processor, self._products, *args, **kwargs)

    def _products(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, factor: float, bias: torch.Tensor | float
    ) -> torch.Tensor:
        # All attentions' P are held until the gradients are there.
        require(
            f"search regions: the probabilities of {self._name}",
            4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2],
            None,
            cure="Calibrate at fewer tokens (a smaller size), or keep attention in float (a uniform recipe).",
        )
        probabilities = (q @ k.transpose(-1, -2) * factor + bias).softmax(-1)
        z = probabilities @ v
        self._see(self._name, probabilities, v, z)
        return z
