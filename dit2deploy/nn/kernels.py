"""Ops of quantized modules by the compiled CPU kernels, in the place of their PyTorch definitions."""

from typing import Any

import torch

from dit2deploy.ops import Op
from dit2deploy.targets import kernel


def compute(op: Op, *inputs: torch.Tensor, **attributes: int | str) -> Any:
    """What `op.call` gives, on as many threads as torch uses: CPU tensors in the op's dtypes, no gradients.

    Equal to the definition but for the rounding of floats; codes are the same. GEMMs take weights in the layout that
    their attribute says, and are fast in KERNEL_ORDER alone. Raises Misuse where there is no compiled library, and
    Failed for what a kernel refuses.
    """
    arrays, values = [tensor.detach().numpy() for tensor in inputs], {**op.attributes, **attributes}
    shapes = op.output_shapes([array.shape for array in arrays], values)
    outputs = kernel.run(op.name, arrays, values, shapes, threads=torch.get_num_threads())
    made = tuple(torch.from_numpy(output) for output in outputs)
    return made[0] if len(made) == 1 else made


def call(op: Op, *inputs: torch.Tensor, by_kernels: bool, **attributes: int | str) -> Any:
    """`compute` where that is asked for and the inputs are on the CPU, else `op.call`."""
    is_served = by_kernels and inputs[0].device.type == "cpu"
    return compute(op, *inputs, **attributes) if is_served else op.call(*inputs, **attributes)


def kernel_words(words: torch.Tensor, fmt: str, k: int) -> torch.Tensor:
    """Packed interchange words, int32 [N, words(k)] of weight format `fmt`, in the layout KERNEL_ORDER."""
    return torch.from_numpy(kernel.relayout(fmt, words.numpy(), k))
