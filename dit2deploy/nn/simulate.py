"""Policies tried on the real network without packing it: linears that switch between formats and widths at once."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dit2deploy.artefacts.policy import LayerPolicy
from dit2deploy.formats import by_name
from dit2deploy.models.load import linears_of
from dit2deploy.nn.kernels import compute, kernel_words
from dit2deploy.nn.timestep_groups import TimestepGroups
from dit2deploy.ops import GEMMS, HADAMARD_QUANTIZE, LOW_RANK_GEMMS
from dit2deploy.ops.unpack import unpack
from dit2deploy.quantizers.branches import add_branches, total
from dit2deploy.quantizers.gain import clip_gain
from dit2deploy.quantizers.linear import quantize_linear, rotate
from dit2deploy.quantizers.round_to_nearest import dequantize
from dit2deploy.targets.kernel import KERNEL_ORDER


class _Form(NamedTuple):
    """A layer's weight in one format."""

    words: torch.Tensor  # int32, packed
    scale: torch.Tensor  # float32 [N, G]
    bias: torch.Tensor  # float32 [N]
    branches: dict[str, torch.Tensor]  # float32 factors, by suffix


class _Codes:
    """The newest quantized input: the projections q, k and v ask for the same one, one after the other."""

    def __init__(self) -> None:
        self._asked: tuple[Any, ...] = ()
        self._given: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, x: torch.Tensor, qmax: torch.Tensor, policy: LayerPolicy) -> tuple[torch.Tensor, torch.Tensor]:
        how = {"block": policy.hadamard, "clip": policy.clip, "grid": policy.grid}
        same = self._asked and self._asked[0] is x and self._asked[2] == how
        if self._given is None or not same or not torch.equal(self._asked[1], qmax):
            self._asked, self._given = (x, qmax, how), compute(HADAMARD_QUANTIZE, x, qmax, **how)
        return self._given

    def forget(self) -> None:
        self._asked, self._given = (), None


class SimulatedLinear(torch.nn.Module):
    """x float32 [.., K] -> y float32 [.., N] as QuantLinear computes it, for any LayerPolicy; at first unquantized.

    A weight format is made when it is first asked for and kept packed. The compiled kernels compute with it.
    Weights round to nearest and branches know nothing of the inputs, whatever the policy says of GPTQ and moments: a
    search tries formats more often than it can solve. Smoothing and permutations are left out: they change no
    full-precision function. Inputs have one step a token, also where the policy says two regions.
    """

    def __init__(self, source: torch.nn.Linear, *, groups: TimestepGroups, codes: _Codes, seed: int) -> None:
        super().__init__()
        self.in_features, self.out_features = source.in_features, source.out_features
        self.weight, self.bias = source.weight, source.bias
        self._groups, self._codes, self._seed = groups, codes, seed
        self._forms: dict[tuple, _Form] = {}
        self._errors: dict[tuple, float] = {}
        self._form: _Form | None = None
        self._policy = LayerPolicy(weight="float")
        self._qmax = torch.empty(0)
        self._strength, self._gain = 1.0, 1.0

    def choose(self, policy: LayerPolicy, *, strength: float = 1.0) -> None:
        """Computes as `policy` says from now on; `strength` 0 .. 1 moves only that far from full precision."""
        self._policy, self._strength = policy, strength
        self._form = self._made(policy) if policy.is_quantized and strength > 0 else None
        self._qmax = torch.tensor(policy.largest_codes, dtype=torch.float32)
        self._gain = clip_gain(policy)

    def weight_error(self, policy: LayerPolicy) -> float:
        """|W - Q(W)|^2 of the weights, with what `policy` makes of them; branches count as part of Q."""
        policy, key = _of_weight(policy)
        if key not in self._errors:
            form = self._quantized(policy)
            rest = self.weight.detach() - total(form.branches) if form.branches else self.weight.detach()
            made = dequantize(unpack(form.words, by_name(policy.weight), self.in_features).float(), form.scale)
            self._errors[key] = float((rotate(rest, policy.hadamard) - made).double().square().sum())
        return self._errors[key]

    def _made(self, policy: LayerPolicy) -> _Form:
        policy, key = _of_weight(policy)
        if key not in self._forms:
            form = self._quantized(policy)
            self._forms[key] = form._replace(words=kernel_words(form.words, policy.weight, self.in_features))
        return self._forms[key]

    def _quantized(self, policy: LayerPolicy) -> _Form:
        """With words in the interchange layout."""
        with torch.inference_mode(False):
            bias = None if self.bias is None else self.bias.detach().numpy()
            tensors = quantize_linear(self.weight.detach().numpy(), bias, policy, seed=self._seed)
            named = {name: torch.from_numpy(value) for name, value in tensors.items()}
            factors = {leaf: named[leaf].float() for leaf in policy.branch_leaves}
            return _Form(named["weight"], named["weight_scale"], named["bias"], factors)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._form is None:
            return torch.nn.functional.linear(x, self.weight, self.bias)
        form, policy = self._form, self._policy
        q, s = self._codes.of(x, self._groups.qmax(self._qmax), policy)
        given = [q, s, form.words, form.scale * self._gain, form.bias]
        branches, gemm = dict(form.branches), GEMMS[policy.weight]
        if policy.low_rank:
            gemm = LOW_RANK_GEMMS[policy.weight]
            given += [x @ branches.pop("down").T, branches.pop("up")]
        y = compute(gemm, *given, bits=policy.code_bits, layout=KERNEL_ORDER)
        y = add_branches(y, x, branches)
        if self._strength < 1:
            exact = torch.nn.functional.linear(x, self.weight, self.bias)
            y = exact + self._strength * (y - exact)
        return y


def _of_weight(policy: LayerPolicy) -> tuple[LayerPolicy, tuple]:
    """What of a policy makes the weight, and a key of it: forms serve every width of activations, and the gain goes
    with the width."""
    policy = policy.without_moments.model_copy(update={"gain": "none"})
    key = (
        *(policy.weight, policy.weight_bits, policy.log_bits, policy.group_size, policy.hadamard),
        *(policy.low_rank, policy.branch_init, policy.monarch),
    )
    return policy, key


class Simulation:
    """A transformer whose linears are all SimulatedLinear; `layers` by name, in the model's order."""

    def __init__(self, module: torch.nn.Module, *, bounds: Sequence[int], timestep_scale: float, seed: int = 0) -> None:
        """Takes `module` (full precision, eval) over: its linears are replaced in place.

        `bounds` are the ends of the timestep groups, as in a Policy; `timestep_scale` is the family's.
        """
        self.module = module
        self._codes = _Codes()
        groups = TimestepGroups(bounds, timestep_scale)
        self.layers: dict[str, SimulatedLinear] = {}
        for name in linears_of(module):
            layer = SimulatedLinear(module.get_submodule(name), groups=groups, codes=self._codes, seed=seed)
            module.set_submodule(name, layer)
            self.layers[name] = layer
        groups.attach(module)

    def choose(self, layers: Mapping[str, LayerPolicy], *, strength: float = 1.0) -> None:
        """Switches these layers; see SimulatedLinear.choose."""
        for name, policy in layers.items():
            self.layers[name].choose(policy, strength=strength)

    def choose_float(self) -> None:
        """Switches every layer to full precision."""
        for layer in self.layers.values():
            layer.choose(LayerPolicy(weight="float"))

    def call(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The output of one call, keyword arguments by name, without gradients."""
        with torch.inference_mode():
            output = self.module(**inputs, return_dict=False)[0]
        self._codes.forget()
        return output
