"""Cases of the numerics table with packed codes."""

from dataclasses import replace

from dit2deploy.ops.op import Case, Op
from dit2deploy.ops.packed_codes import RUN, pack_codes
from tests.tensors import as_array, as_tensor


def in_packed_codes(op: Op, case: Case) -> Case | None:
    """The case with attribute `packed`, a GEMM's codes packed; None where the op or the case cannot have it."""
    columns = next(iter(case.inputs.values())).shape[-1]
    if "packed" not in op.attributes or columns % RUN:
        return None
    inputs = dict(case.inputs)
    if "q" in inputs:
        if op.name.startswith("Int8") or case.attributes["bits"] > 4:
            return None
        inputs["q"] = as_array(pack_codes(as_tensor(inputs["q"])))
    return replace(case, inputs=inputs, attributes={**case.attributes, "packed": 1})


def columns_of(case: Case) -> int:
    """K of a GEMM's case."""
    return case.inputs["q"].shape[-1] * (2 if case.attributes.get("packed") else 1)
