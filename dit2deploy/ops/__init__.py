"""The ops of domain `dit2deploy`: THE list. Importing this package registers them with torch and onnx."""

from dit2deploy.ops.activation_hadamard_quantize import (
    ACTIVATION_HADAMARD_QUANTIZE,
    ACTIVATION_HADAMARD_QUANTIZE_KEEP,
    GATED_ACTIVATION_HADAMARD_QUANTIZE,
    GATED_ACTIVATION_HADAMARD_QUANTIZE_KEEP,
)
from dit2deploy.ops.ada_ln_hadamard_quantize import ADA_LN_HADAMARD_QUANTIZE, ADA_LN_HADAMARD_QUANTIZE_KEEP
from dit2deploy.ops.hadamard_quantize import HADAMARD, HADAMARD_QUANTIZE, PER_TOKEN_QUANTIZE_LINEAR
from dit2deploy.ops.monarch import MONARCH_ADD
from dit2deploy.ops.multi_region_quantize import MULTI_REGION_QUANTIZE
from dit2deploy.ops.op import DOMAIN, OPSET, VERSION, Op, register
from dit2deploy.ops.quant_gemm import (
    DEQUANTIZE_LINEARS,
    GEMMS,
    LOW_RANK_GEMMS,
    LOW_RANK_RESIDUAL_GEMMS,
    RESIDUAL_GEMMS,
)
from dit2deploy.ops.quant_matmul import QUANT_MATMUL

OPS: tuple[Op, ...] = (
    HADAMARD_QUANTIZE,
    *GEMMS.values(),
    *LOW_RANK_GEMMS.values(),
    *RESIDUAL_GEMMS.values(),
    *LOW_RANK_RESIDUAL_GEMMS.values(),
    MONARCH_ADD,
    MULTI_REGION_QUANTIZE,
    QUANT_MATMUL,
    ADA_LN_HADAMARD_QUANTIZE,
    ADA_LN_HADAMARD_QUANTIZE_KEEP,
    ACTIVATION_HADAMARD_QUANTIZE,
    ACTIVATION_HADAMARD_QUANTIZE_KEEP,
    GATED_ACTIVATION_HADAMARD_QUANTIZE,
    GATED_ACTIVATION_HADAMARD_QUANTIZE_KEEP,
    HADAMARD,
    PER_TOKEN_QUANTIZE_LINEAR,
    *DEQUANTIZE_LINEARS.values(),
)
for _op in OPS:
    register(_op)

__all__ = [
    "ACTIVATION_HADAMARD_QUANTIZE",
    "ACTIVATION_HADAMARD_QUANTIZE_KEEP",
    "ADA_LN_HADAMARD_QUANTIZE",
    "ADA_LN_HADAMARD_QUANTIZE_KEEP",
    "DEQUANTIZE_LINEARS",
    "DOMAIN",
    "GATED_ACTIVATION_HADAMARD_QUANTIZE",
    "GATED_ACTIVATION_HADAMARD_QUANTIZE_KEEP",
    "GEMMS",
    "HADAMARD",
    "HADAMARD_QUANTIZE",
    "LOW_RANK_GEMMS",
    "LOW_RANK_RESIDUAL_GEMMS",
    "MONARCH_ADD",
    "MULTI_REGION_QUANTIZE",
    "OPS",
    "OPSET",
    "PER_TOKEN_QUANTIZE_LINEAR",
    "QUANT_MATMUL",
    "RESIDUAL_GEMMS",
    "VERSION",
    "Op",
]
