"""AdaLnHadamardQuantize: layer normalization, adaptive modulation and HadamardQuantize in one pass over a row.

Two ops: `AdaLnHadamardQuantize` gives codes and steps; `AdaLnHadamardQuantizeKeep` also gives the modulated row y,
which a low-rank or Monarch branch reads unrotated. The variant is an op of its own, as the low-rank GEMMs are:
ONNX Runtime 1.18 and onnx.reference know no functions with absent inputs or outputs.
"""

import numpy as np
import torch

from dit2deploy.ops.hadamard_quantize import HADAMARD_QUANTIZE, QUANTIZE_BODY, hadamard_quantize, rotate_body
from dit2deploy.ops.op import Case, Op, OutputRule, Port
from dit2deploy.ops.sample_rows import rows_like, rows_like_text


def ada_ln(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """LayerNorm(x) (1 + scale) + shift, float32 [.., K]: AdaLN (Peebles and Xie 2022, https://arxiv.org/abs/2212.09748).

    Sums are float64, and mean and 1 / deviation are rounded to float32 once, so that every order of the additions gives
    the same bits [our form] (but for rows whose sum cancels to some 2**-29 of their largest value: their mean, nothing
    beside x, may differ in its last bits); the variance is that of the deviations from the rounded mean; all else is
    float32 in the order that is written here.
    """
    deviation = x - x.double().mean(-1, keepdim=True).float()
    variance = deviation.double().square().mean(-1, keepdim=True)
    inverse = (1.0 / (variance + eps.double()).sqrt()).float()
    return deviation * inverse * (1.0 + rows_like(scale, x)) + rows_like(shift, x)


def ada_ln_hadamard_quantize_keep(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    eps: torch.Tensor,
    qmax: torch.Tensor,
    *,
    block: int,
    clip: str,
    grid: str,
    packed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q int8 [.., K] and s float32 [.., 1] of the modulated row, and the row y float32 [.., K] itself.

    x float32 [.., K]; shift and scale float32 [.., K] of equal shape, a row for each run of M / R rows of x: [B, K] or
    [B, 1, K], one a sample. eps float32 [1] is a port, since an op's attributes are integers and texts. qmax and the
    attributes are HadamardQuantize's, and so is what becomes of rows with NaN or inf.
    """
    y = ada_ln(x, shift, scale, eps)
    return *hadamard_quantize(y, qmax, block=block, clip=clip, grid=grid, packed=packed), y


def ada_ln_hadamard_quantize(*inputs: torch.Tensor, **attributes) -> tuple[torch.Tensor, torch.Tensor]:
    """q and s alone."""
    return ada_ln_hadamard_quantize_keep(*inputs, **attributes)[:2]


_ADA_LN = """
  a_one = Constant <value = float {1}> ()
  a_wide_one = Constant <value = double {1}> ()
  a_last = Constant <value_ints = [-1]> ()
  a_wide = Cast <to = 11> (x)
  a_wide_mean = ReduceMean <keepdims = 1> (a_wide, a_last)
  a_mean = Cast <to = 1> (a_wide_mean)
  a_deviation = Sub (x, a_mean)
  a_wide_deviation = Cast <to = 11> (a_deviation)
  a_squares = Mul (a_wide_deviation, a_wide_deviation)
  a_variance = ReduceMean <keepdims = 1> (a_squares, a_last)
  a_wide_eps = Cast <to = 11> (eps)
  a_guarded = Add (a_variance, a_wide_eps)
  a_root = Sqrt (a_guarded)
  a_wide_inverse = Div (a_wide_one, a_root)
  a_inverse = Cast <to = 1> (a_wide_inverse)
  a_normal = Mul (a_deviation, a_inverse)"""
_ADA_LN += rows_like_text("x", "shift", "scale")
_ADA_LN += """
  a_gain = Add (a_one, scale_rows)
  a_scaled = Mul (a_normal, a_gain)
  y = Add (a_scaled, shift_rows)"""


def cases() -> list[Case]:
    """A sample's row and one of its own, tails, one token, none; all widths, clips and grids; extremes."""
    out = []

    def add(
        name: str,
        shape: tuple[int, ...],
        bits: tuple[int, ...],
        block: int,
        *,
        seed: int = 0,
        spread: float = 1,
        **kind,
    ) -> None:
        rng = np.random.default_rng(seed or len(out) + 1)
        x = rng.standard_normal(shape).astype(np.float32) * np.float32(spread) + np.float32(0.3)
        rows = (1, 1, shape[-1]) if shape[0] == 0 else (shape[0], *(1,) * (len(shape) - 2), shape[-1])
        shift, scale = (rng.standard_normal(rows).astype(np.float32) / 2 for _ in range(2))
        if name.startswith("extremes"):
            _make_extreme(x, shift, scale)
        qmax = np.array([2.0 ** (b - 1) - 1 for b in bits], np.float32)
        inputs = {"x": x, "shift": shift, "scale": scale, "eps": np.array([1e-6], np.float32), "qmax": qmax}
        out.append(Case("-".join((name, *kind.values())), inputs, {"block": block, **kind}))

    for kind in (
        {"clip": "absmax"},
        {"clip": "gaussian"},
        {"clip": "absmax", "grid": "mid-rise"},
        {"clip": "gaussian", "grid": "mid-rise"},
    ):
        for bits in (2, 3, 4, 8):
            add(f"bits{bits}", (2, 5, 192), (bits,), 64, **kind)
        add("unrotated", (3, 4, 40), (4,), 1, **kind)
        add("odd-k", (3, 3, 77), (5,), 1, **kind)
        add("one-token", (1, 1, 64), (4,), 64, **kind)
        add("a-row-a-token", (6, 96), (4,), 32, **kind)
        add("no-token", (0, 5, 64), (4,), 64, **kind)
        add("dit-xl", (2, 4, 1152), (4,), 128, **kind)
        add("two-leads", (2, 3, 4, 48), (4,), 16, **kind)
        add("row-qmax", (4, 3, 96), (2, 4, 6, 8), 32, **kind)
        add("wide-spread", (2, 3, 256), (4,), 256, spread=1e4, **kind)
        add("extremes", (2, 6, 128), (4,), 128, **kind)
    return out


def _make_extreme(x: np.ndarray, shift: np.ndarray, scale: np.ndarray) -> None:
    """Rows that are constant, zero, tiny, huge, far from zero or not finite; the second sample's modulation is 0."""
    x[0, 0] = 0.0
    x[0, 1] = 7.25
    x[0, 2, 5] = np.nan
    x[0, 3, 7] = np.inf
    x[0, 4, 9] = -np.inf
    x[0, 5] *= 1e30
    x[1, 0] *= 1e-30
    x[1, 1] = 0.0
    x[1, 2] += 1e6
    x[1, 3, ::2] = -0.0
    x[1, 4] = 0.0
    x[1, 4, 3] = 3e38
    x[1, 5] = -3.4e38
    x[1, 5, 3] = 3.4e38  # its deviation is not finite
    shift[1] = scale[1] = 0.0


_INPUTS = (*(Port(name, "stream") for name in ("x", "shift", "scale")), Port("eps", "f32"), Port("qmax", "f32"))
_BODY = _ADA_LN + rotate_body("y", "t") + QUANTIZE_BODY

ADA_LN_HADAMARD_QUANTIZE = Op(
    "AdaLnHadamardQuantize",
    inputs=_INPUTS,
    outputs=HADAMARD_QUANTIZE.outputs,
    attributes=HADAMARD_QUANTIZE.attributes,
    shapes=HADAMARD_QUANTIZE.shapes,
    reference=ada_ln_hadamard_quantize,
    body=_BODY,
    cases=cases,
)
ADA_LN_HADAMARD_QUANTIZE_KEEP = Op(
    "AdaLnHadamardQuantizeKeep",
    inputs=_INPUTS,
    outputs=(*HADAMARD_QUANTIZE.outputs, Port("y", "stream")),
    attributes=HADAMARD_QUANTIZE.attributes,
    shapes=(*HADAMARD_QUANTIZE.shapes, OutputRule(0)),
    reference=ada_ln_hadamard_quantize_keep,
    body=_BODY,
    cases=cases,
)
