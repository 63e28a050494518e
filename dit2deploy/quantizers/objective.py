"""What of a block's output error counts: e^T F e for three F, the error itself or its share in the model's loss."""

import torch

SMALLEST = 1e-6  # of a Gram matrix's largest eigenvalue; directions below it are rounding


def squared(error: torch.Tensor, _rows: torch.Tensor) -> torch.Tensor:
    """e^T e [b] of errors [b, n]: F is the identity. `rows` [b] are the samples that the errors are of."""
    return error.square().sum(1)


def diagonal(error: torch.Tensor, rows: torch.Tensor, *, power: torch.Tensor) -> torch.Tensor:
    """e^T diag(power) e [b] for power [B, n] of all samples.

    BRECQ (https://arxiv.org/abs/2102.05426, equation 10): the Fisher matrix by its diagonal g^2, g = dLoss/dz.
    """
    return (error.square() * power[rows]).sum(1)


def low_rank(error: torch.Tensor, rows: torch.Tensor, *, factors: torch.Tensor) -> torch.Tensor:
    """e^T U^T U e [b] for factors U [B, r, n] of all samples, see `nystrom`."""
    return torch.einsum("bn,brn->br", error, factors[rows]).square().sum(1)


def nystrom(changes: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """U [B, r, n] with U^T U = G^T (D G^T)^+ G for changes D [B, r, n] of an output and responses G = D F [B, r, n].

    FIMA-Q's low-rank part (https://arxiv.org/abs/2506.11543): a change d of a block's output and the gradient g that it
    causes are bound by the Fisher matrix, g = F d, so r changes give F on their span without forming it: U^T U has rank
    r, is equal to F on the span and nowhere above it, for an F that is symmetric and not negative. [inferred] The
    authors' code averages magnitudes over samples before it solves; samples and signs are kept here, so that the
    Gauss-Newton matrix is the check.
    """
    gram = changes.double() @ responses.double().transpose(1, 2)
    values, vectors = torch.linalg.eigh((gram + gram.transpose(1, 2)) / 2)
    kept = values > SMALLEST * values[:, -1:].clamp_min(0)
    root = torch.where(kept, values, 1.0).rsqrt() * kept
    return (root.unsqueeze(2) * (vectors.transpose(1, 2) @ responses.double())).float()
