"""ActivationHadamardQuantize: GELU or SiLU and HadamardQuantize in one pass over a row, gated by a factor or not.

Four ops: `ActivationHadamardQuantize` of activation(x), before the second linear of an MLP or a modulation;
`GatedActivationHadamardQuantize` of activation(x) factor, as in SwiGLU (Shazeer 2020,
https://arxiv.org/abs/2002.05202). They give codes and steps; those named `..Keep` also give the activated row y, which
a low-rank or Monarch branch reads unrotated.
"""

from dataclasses import replace

import numpy as np
import torch

from dit2deploy.ops.hadamard_quantize import HADAMARD_QUANTIZE, QUANTIZE_BODY, hadamard_quantize, rotate_body
from dit2deploy.ops.op import Case, Op, OutputRule, Port

# Both are x / (1 + 2^z), of float32; plugins/ops/activation_hadamard_quantize/activation.h.
# GELU: z = x (GELU_LINEAR + GELU_CUBIC x^2): -2 sqrt(2 / pi) / ln 2, and that times 0.044715. SiLU: z = SILU x.
GELU_LINEAR, GELU_CUBIC = -2.302208198, -0.1029432397
SILU = -1.442695041  # -1 / ln 2
MOST = 126.0  # of |z|: 2^z is a normal float
POLYNOMIAL = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1)  # (ln 2)^i / i!


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, float32 (Hendrycks and Gimpel 2016), as x / (1 + 2^z).

    Within 4 units of the last place of the formula where |z| is small, and of 2^z then 2e-7 z.
    """
    return _quotient(x, x * (GELU_LINEAR + GELU_CUBIC * (x * x)))


def silu(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + exp(-x)), float32, as x / (1 + 2^z); as exact as `gelu`."""
    return _quotient(x, x * SILU)


def _quotient(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """x / (1 + 2^z): additions, multiplications and one division in the order that is written here, so that all kernels
    give the same bits [our form]."""
    z = torch.where(z < MOST, z, MOST)  # NaN, too: what it divides is NaN
    z = torch.where(z > -MOST, z, -MOST)
    n = z.round()
    f = z - n
    power = POLYNOMIAL[0] * f
    for coefficient in POLYNOMIAL[1:]:
        power = (power + coefficient) * f
    return x / (1.0 + (power + 1.0) * torch.ldexp(torch.ones_like(n), n))


ACTIVATIONS = {"gelu-tanh": gelu, "silu": silu}


def activation_hadamard_quantize_keep(
    x: torch.Tensor, qmax: torch.Tensor, *, activation: str, **quantization: int | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q int8 [.., K] and s float32 [.., 1] of the activated row, and the row y float32 [.., K] itself.

    x float32 [.., K]; activation one of ACTIVATIONS; qmax and the other attributes are HadamardQuantize's, and so is
    what becomes of rows with NaN or inf (y of -inf is -inf here, where the limit is 0).
    """
    y = ACTIVATIONS[activation](x)
    return *hadamard_quantize(y, qmax, **quantization), y


def gated_activation_hadamard_quantize_keep(
    x: torch.Tensor, factor: torch.Tensor, qmax: torch.Tensor, *, activation: str, **quantization: int | str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of y = activation(x) factor; factor float32 [.., K], of x's shape."""
    y = ACTIVATIONS[activation](x) * factor
    return *hadamard_quantize(y, qmax, **quantization), y


def activation_hadamard_quantize(*inputs: torch.Tensor, **attributes) -> tuple[torch.Tensor, torch.Tensor]:
    """q and s alone."""
    return activation_hadamard_quantize_keep(*inputs, **attributes)[:2]


def gated_activation_hadamard_quantize(*inputs: torch.Tensor, **attributes) -> tuple[torch.Tensor, torch.Tensor]:
    """q and s alone."""
    return gated_activation_hadamard_quantize_keep(*inputs, **attributes)[:2]


def _activation_body(target: str) -> str:
    """ONNX text that makes `target`, the activated x."""
    polynomial = "".join(
        f"""
  g_c{i} = Constant <value = float {{{coefficient}}}> ()
  g_s{i} = Add (g_p{i - 1}, g_c{i})
  g_p{i} = Mul (g_s{i}, g_f)"""
        for i, coefficient in enumerate(POLYNOMIAL[1:], start=1)
    )
    # Strings meet in one Concat, as in QUANTIZE_BODY.
    return f"""
  g_one = Constant <value = float {{1}}> ()
  g_base = Constant <value = float {{2}}> ()
  g_linear = Constant <value = float {{{GELU_LINEAR}}}> ()
  g_cubic = Constant <value = float {{{GELU_CUBIC}}}> ()
  g_silu = Constant <value = float {{{SILU}}}> ()
  g_most = Constant <value = float {{{MOST}}}> ()
  g_least = Constant <value = float {{{-MOST}}}> ()
  g_at0 = Constant <value_ints = [0]> ()
  g_at1 = Constant <value_ints = [1]> ()
  g_at2 = Constant <value_ints = [2]> ()
  g_activation = Constant <value_string: string = @activation> ()
  g_activation_1d = Unsqueeze (g_activation, g_at0)
  g_silu_1d = Constant <value_strings = ["silu"]> ()
  g_names = Concat <axis = 0> (g_activation_1d, g_silu_1d)
  g_name = Slice (g_names, g_at0, g_at1)
  g_silu_name = Slice (g_names, g_at1, g_at2)
  g_is_silu = Equal (g_name, g_silu_name)
  g_square = Mul (x, x)
  g_cube = Mul (g_cubic, g_square)
  g_gelu_slope = Add (g_linear, g_cube)
  g_slope = Where (g_is_silu, g_silu, g_gelu_slope)
  g_z = Mul (x, g_slope)
  g_is_below = Less (g_z, g_most)
  g_z_below = Where (g_is_below, g_z, g_most)
  g_is_above = Greater (g_z_below, g_least)
  g_exponent = Where (g_is_above, g_z_below, g_least)
  g_n = Round (g_exponent)
  g_f = Sub (g_exponent, g_n)
  g_c0 = Constant <value = float {{{POLYNOMIAL[0]}}}> ()
  g_p0 = Mul (g_c0, g_f){polynomial}
  g_rest = Add (g_p{len(POLYNOMIAL) - 1}, g_one)
  g_power = Pow (g_base, g_n)
  g_exponential = Mul (g_rest, g_power)
  g_divisor = Add (g_one, g_exponential)
  {target} = Div (x, g_divisor)"""


def cases() -> list[Case]:
    """HadamardQuantize's, wider by a third, of GELU; the shapes among them of SiLU; all exponents of both."""
    wider = [replace(case, inputs=_wider(case)) for case in HADAMARD_QUANTIZE.cases()]
    return [*wider, *_of(_shapes(), "silu"), *_steep()]


def gated_cases() -> list[Case]:
    """The shapes and all exponents, of both, with factors of their own."""
    out = []
    for case in [*_of(_shapes(), "gelu-tanh"), *_of(_shapes(), "silu"), *_steep()]:
        factor = np.random.default_rng(len(out)).standard_normal(case.inputs["x"].shape).astype(np.float32)
        out.append(replace(case, inputs={**case.inputs, "factor": factor}))
    return out


def _wider(case: Case) -> dict[str, np.ndarray]:
    return {**case.inputs, "x": np.float32(4 / 3) * case.inputs["x"]}


def _shapes() -> list[Case]:
    """HadamardQuantize's cases of one clip and grid that differ in more than their width."""
    found = [case for case in HADAMARD_QUANTIZE.cases() if not case.name.startswith("bits")]
    return [replace(case, inputs=_wider(case)) for case in found if case.name.endswith("-absmax")]


def _of(cases: list[Case], activation: str) -> list[Case]:
    return [
        replace(case, name=f"{activation}-{case.name}", attributes={**case.attributes, "activation": activation})
        for case in cases
    ]


def _steep() -> list[Case]:
    """From where 2^z is next to nothing to where it is all; a row of all magnitudes, whose squares leave float32."""
    magnitudes = np.geomspace(1e-30, 1e37, 256, dtype=np.float32)
    beyond = np.concatenate([magnitudes, -magnitudes])
    out = []
    for activation, end in (("gelu-tanh", 12), ("silu", 96)):
        x = np.append(np.linspace(-end, end, 3 * 512, dtype=np.float32), beyond).reshape(4, 512)
        inputs = {"x": x, "qmax": np.array([127], np.float32)}
        out.append(Case(f"{activation}-steep", inputs, {"block": 512, "activation": activation}))
    return out


_X, _QMAX = HADAMARD_QUANTIZE.inputs
_GATED_INPUTS = (_X, Port("factor", "stream"), _QMAX)
_KEPT = (*HADAMARD_QUANTIZE.outputs, Port("y", "stream"))
_KEPT_SHAPES = (*HADAMARD_QUANTIZE.shapes, OutputRule(0))
_ATTRIBUTES = {"activation": "gelu-tanh", **HADAMARD_QUANTIZE.attributes}
_QUANTIZE = rotate_body("y", "t") + QUANTIZE_BODY
_BODY = _activation_body("y") + _QUANTIZE
_GATED_BODY = _activation_body("active") + "\n  y = Mul (active, factor)" + _QUANTIZE

ACTIVATION_HADAMARD_QUANTIZE = Op(
    "ActivationHadamardQuantize",
    inputs=HADAMARD_QUANTIZE.inputs,
    outputs=HADAMARD_QUANTIZE.outputs,
    attributes=_ATTRIBUTES,
    shapes=HADAMARD_QUANTIZE.shapes,
    reference=activation_hadamard_quantize,
    body=_BODY,
    cases=cases,
)
ACTIVATION_HADAMARD_QUANTIZE_KEEP = Op(
    "ActivationHadamardQuantizeKeep",
    inputs=HADAMARD_QUANTIZE.inputs,
    outputs=_KEPT,
    attributes=_ATTRIBUTES,
    shapes=_KEPT_SHAPES,
    reference=activation_hadamard_quantize_keep,
    body=_BODY,
    cases=cases,
)
GATED_ACTIVATION_HADAMARD_QUANTIZE = Op(
    "GatedActivationHadamardQuantize",
    inputs=_GATED_INPUTS,
    outputs=HADAMARD_QUANTIZE.outputs,
    attributes=_ATTRIBUTES,
    shapes=HADAMARD_QUANTIZE.shapes,
    reference=gated_activation_hadamard_quantize,
    body=_GATED_BODY,
    cases=gated_cases,
)
GATED_ACTIVATION_HADAMARD_QUANTIZE_KEEP = Op(
    "GatedActivationHadamardQuantizeKeep",
    inputs=_GATED_INPUTS,
    outputs=_KEPT,
    attributes=_ATTRIBUTES,
    shapes=_KEPT_SHAPES,
    reference=gated_activation_hadamard_quantize_keep,
    body=_GATED_BODY,
    cases=gated_cases,
)
