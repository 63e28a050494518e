"""ActivationHadamardQuantize: GELU in its tanh form and HadamardQuantize in one pass over a row, for an MLP's second linear.

Two ops, as those of AdaLnHadamardQuantize: `ActivationHadamardQuantize` gives codes and steps; `ActivationHadamardQuantizeKeep`
also gives the activated row y, which a low-rank or Monarch branch reads unrotated.
"""

import numpy as np
import torch

from dit2deploy.ops.hadamard_quantize import HADAMARD_QUANTIZE, QUANTIZE_BODY, hadamard_quantize, rotate_body
from dit2deploy.ops.op import Case, Op, OutputRule, Port

# x / (1 + 2^z) with z = x (LINEAR + CUBIC x^2), of float32; plugins/ops/activation_hadamard_quantize/activation.h.
LINEAR, CUBIC = -2.302208198, -0.1029432397  # -2 sqrt(2 / pi) / ln 2, and that times 0.044715
MOST = 126.0  # of |z|: 2^z is a normal float
POLYNOMIAL = (1.5403530e-4, 1.3333558e-3, 9.6181291e-3, 5.5504109e-2, 2.4022651e-1, 6.9314718e-1)  # (ln 2)^i / i!


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, float32 (Hendrycks and Gimpel 2016), as x / (1 + 2^z).

    Additions, multiplications and one division in the order that is written here, so that all kernels give the same
    bits [our form]; within 4 units of the last place of the formula where |z| is small, and of 2^z then 2e-7 z.
    """
    z = x * (LINEAR + CUBIC * (x * x))
    z = torch.where(z < MOST, z, MOST)  # NaN, too: what it divides is NaN
    z = torch.where(z > -MOST, z, -MOST)
    n = z.round()
    f = z - n
    power = POLYNOMIAL[0] * f
    for coefficient in POLYNOMIAL[1:]:
        power = (power + coefficient) * f
    return x / (1.0 + (power + 1.0) * torch.ldexp(torch.ones_like(n), n))


def activation_hadamard_quantize_keep(
    x: torch.Tensor, qmax: torch.Tensor, *, block: int, clip: str, grid: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q int8 [.., K] and s float32 [.., 1] of the activated row, and the row y float32 [.., K] itself.

    x float32 [.., K]; qmax and the attributes are HadamardQuantize's, and so is what becomes of rows with NaN or inf
    (y of -inf is -inf here, where the limit is 0).
    """
    y = gelu(x)
    return *hadamard_quantize(y, qmax, block=block, clip=clip, grid=grid), y


def activation_hadamard_quantize(
    x: torch.Tensor, qmax: torch.Tensor, **attributes
) -> tuple[torch.Tensor, torch.Tensor]:
    """q and s alone."""
    return activation_hadamard_quantize_keep(x, qmax, **attributes)[:2]


_GELU = f"""
  g_one = Constant <value = float {{1}}> ()
  g_base = Constant <value = float {{2}}> ()
  g_linear = Constant <value = float {{{LINEAR}}}> ()
  g_cubic = Constant <value = float {{{CUBIC}}}> ()
  g_most = Constant <value = float {{{MOST}}}> ()
  g_least = Constant <value = float {{{-MOST}}}> ()
  g_square = Mul (x, x)
  g_cube = Mul (g_cubic, g_square)
  g_slope = Add (g_linear, g_cube)
  g_z = Mul (x, g_slope)
  g_is_below = Less (g_z, g_most)
  g_z_below = Where (g_is_below, g_z, g_most)
  g_is_above = Greater (g_z_below, g_least)
  g_exponent = Where (g_is_above, g_z_below, g_least)
  g_n = Round (g_exponent)
  g_f = Sub (g_exponent, g_n)
  g_c0 = Constant <value = float {{{POLYNOMIAL[0]}}}> ()
  g_p0 = Mul (g_c0, g_f)""" + "".join(
    f"""
  g_c{i} = Constant <value = float {{{coefficient}}}> ()
  g_s{i} = Add (g_p{i - 1}, g_c{i})
  g_p{i} = Mul (g_s{i}, g_f)"""
    for i, coefficient in enumerate(POLYNOMIAL[1:], start=1)
)
_GELU += f"""
  g_rest = Add (g_p{len(POLYNOMIAL) - 1}, g_one)
  g_power = Pow (g_base, g_n)
  g_exponential = Mul (g_rest, g_power)
  g_divisor = Add (g_one, g_exponential)
  y = Div (x, g_divisor)"""


def cases() -> list[Case]:
    """HadamardQuantize's, wider by a third, and a row of all exponents."""
    out = [
        Case(case.name, {**case.inputs, "x": np.float32(4 / 3) * case.inputs["x"]}, case.attributes)
        for case in HADAMARD_QUANTIZE.cases()
    ]
    steep = np.linspace(-12, 12, 3 * 512, dtype=np.float32).reshape(3, 512)
    out.append(Case("steep", {"x": steep, "qmax": np.array([127], np.float32)}, {"block": 512}))
    return out


_BODY = _GELU + rotate_body("y", "t") + QUANTIZE_BODY

ACTIVATION_HADAMARD_QUANTIZE = Op(
    "ActivationHadamardQuantize",
    inputs=HADAMARD_QUANTIZE.inputs,
    outputs=HADAMARD_QUANTIZE.outputs,
    attributes=HADAMARD_QUANTIZE.attributes,
    shapes=HADAMARD_QUANTIZE.shapes,
    reference=activation_hadamard_quantize,
    body=_BODY,
    cases=cases,
)
ACTIVATION_HADAMARD_QUANTIZE_KEEP = Op(
    "ActivationHadamardQuantizeKeep",
    inputs=HADAMARD_QUANTIZE.inputs,
    outputs=(*HADAMARD_QUANTIZE.outputs, Port("y", "stream")),
    attributes=HADAMARD_QUANTIZE.attributes,
    shapes=(*HADAMARD_QUANTIZE.shapes, OutputRule(0)),
    reference=activation_hadamard_quantize_keep,
    body=_BODY,
    cases=cases,
)
