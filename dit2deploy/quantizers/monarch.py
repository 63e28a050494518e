"""TreeQ's general Monarch branch: the weight as a grid of blocks, each of low rank (https://arxiv.org/abs/2512.06353).

Inputs are cut into `blocks_in` contiguous runs of p = K / blocks_in, outputs dealt out to `blocks_out` strided ones of
s = N / blocks_out: output o is row o // blocks_out of block o % blocks_out. Block (b, a) of the branch, from input
block a to output block b, is a product U_ba V_ba of rank `rank`. As the two block-diagonal factors of a Monarch matrix
with its permutation between (https://arxiv.org/abs/2204.00595; [inferred] for TreeQ: methods.md 4.3, there k, l, rho):

    down [K, rank, blocks_out]   at inputs of block a, (i, b) holds V_ba[i]
    up [blocks_in, rank, N]      at outputs of block b, (a, i) holds U_ba[:, i]

which are rank (blocks_out K + blocks_in N) parameters of a matrix of rank up to rank * blocks_in * blocks_out. One
block is an ordinary low-rank branch.
"""

import torch

from dit2deploy.artefacts.policy import MonarchGrid
from dit2deploy.quantizers.low_rank import TINY

SWEEPS = 3  # over the blocks of inputs


def factors(
    weight: torch.Tensor, grid: MonarchGrid, *, root: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best Monarch branch M of a weight E [N, K], float64: down and up, as the head of this file lays them out.

    Blocks are disjoint, so the truncated SVD of each is best in the Frobenius norm. With `root`, any L [K, K] with
    L L^T = C, the second moments of the inputs (`low_rank.moments_root`), the error counts as |(E - M) C^1/2|, which
    methods.md 4.3 solves for inputs whose blocks are uncorrelated: the SVD of E_ba C_aa^1/2. [inferred] Where they are
    correlated, SWEEPS of block coordinate descent follow: each block of inputs takes on what the others leave of its
    part, which never raises the error. (What GPTQ leaves is made to cancel across inputs: projected without the sweeps,
    it came out worse than no branch.) As in `low_rank.weighted_svd`, V is U^T E for the first left singular vectors U
    of E L, so that no L is inverted. Raises ValueError for a grid that does not fit.
    """
    n, k = weight.shape
    if fault := grid.fault(n, k):
        raise ValueError(fault)
    a, b, rank = grid
    p = k // a
    blocks = weight.double().reshape(n // b, b, a, p).permute(2, 1, 0, 3)  # [a, b, s, p]
    if root is None:
        left, right = _fit(blocks, blocks, rank)
    else:
        root = root.double()
        moments = root @ root.T
        own = [torch.linalg.cholesky(moments[i * p : (i + 1) * p, i * p : (i + 1) * p]) for i in range(a)]
        pairs = [_fit(blocks[i], blocks[i] @ own[i], rank) for i in range(a)]
        rest = torch.stack([block - u @ v for block, (u, v) in zip(blocks, pairs, strict=True)])  # E - M
        for i in [i for _ in range(SWEEPS if a > 1 else 0) for i in range(a)]:
            inputs = slice(i * p, (i + 1) * p)
            others = rest.index_fill(0, torch.tensor(i), 0.0).permute(1, 2, 0, 3).reshape(n, k)
            shifted = torch.cholesky_solve((others @ moments[:, inputs]).T, own[i]).T.reshape(b, n // b, p)
            target = blocks[i] + shifted
            pairs[i] = _fit(target, target @ own[i], rank)
            rest[i] = blocks[i] - pairs[i][0] @ pairs[i][1]
        left, right = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    size = right.norm(dim=-1).clamp_min(TINY).sqrt()  # split evenly, which keeps both in float16's range
    up = (left * size.unsqueeze(-2)).permute(0, 3, 2, 1).reshape(a, rank, n)  # of [a, b, s, rank]
    down = (right / size.unsqueeze(-1)).permute(0, 3, 2, 1).reshape(k, rank, b)  # of [a, b, rank, p]
    return down, up


def _fit(blocks: torch.Tensor, seen: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U [.., s, rank] and V [.., rank, p] of each block; `seen` is the blocks in the norm that counts."""
    left = _first_left(seen, rank)
    return left, left.mT @ blocks


def _first_left(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The first left singular vectors [.., s, rank] of matrices [.., s, p], from the smaller of both Gram matrices."""
    s, p = matrix.shape[-2:]
    if s <= p:
        return torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[..., -rank:].flip(-1)
    right = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors[..., -rank:].flip(-1)
    return torch.linalg.qr(matrix @ right).Q


def project(
    weight: torch.Tensor, grid: MonarchGrid, *, root: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`factors` as a checkpoint holds them: down and up, float16."""
    down, up = factors(weight, grid, root=root)
    return down.half(), up.half()


def dense(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The matrix [N, K] that the factors stand for, in float32 at least."""
    dtype = torch.promote_types(down.dtype, torch.float32)
    (k, rank, b), (a, _, n) = down.shape, up.shape
    right = down.to(dtype).reshape(a, k // a, rank, b)
    left = up.to(dtype).reshape(a, rank, n // b, b)
    return torch.einsum("aisb,apib->sbap", left, right).reshape(n, k)
