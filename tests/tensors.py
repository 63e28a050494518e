"""Arrays as torch tensors and back, bfloat16 too, which numpy knows by ml_dtypes alone."""

import ml_dtypes
import numpy as np
import torch


def as_tensor(array: np.ndarray) -> torch.Tensor:
    is_bfloat16 = array.dtype == ml_dtypes.bfloat16
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if is_bfloat16 else torch.from_numpy(array)


def as_array(tensor: torch.Tensor) -> np.ndarray:
    is_bfloat16 = tensor.dtype == torch.bfloat16
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if is_bfloat16 else tensor.numpy()
