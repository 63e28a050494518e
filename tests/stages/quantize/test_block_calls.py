"""What is gathered of a block: gradients at its output are those of the Gauss-Newton matrix, inputs those it gets."""

import numpy as np
import pytest
import torch

from dit2deploy.nn.timestep_groups import TimestepGroups
from dit2deploy.stages.quantize.block_calls import draws, flat, output_power, outputs, record, responses


class Network(torch.nn.Module):
    """A block that gives two tensors, and a tail that is not linear."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(3, 5, generator=generator) / 2
        self.block = Block()

    def forward(self, *, x: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        a, b = self.block(x, scale=timestep)
        return (torch.tanh(torch.cat([a.flatten(1), b], 1) @ self.weight.T),)


class Block(torch.nn.Module):
    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x[:, :4] * scale.unsqueeze(1)).reshape(-1, 2, 2), x[:, 4:]


class Inputs:
    def __init__(self, calls: int, samples: int) -> None:
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((calls, samples, 5)).astype(np.float32)
        self.timestep = rng.uniform(0.5, 1, (calls, samples)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.x)

    def call(self, index: int) -> dict[str, np.ndarray]:
        return {"x": self.x[index], "timestep": self.timestep[index]}


def gauss_newton(network: Network, z: torch.Tensor) -> torch.Tensor:
    """J^T J [n, n] at the block's output z [n] of one sample, by forward differentiation of the tail written out."""
    jacobian = torch.func.jacfwd(lambda value: torch.tanh(network.weight @ value))(z)
    return jacobian.T @ jacobian


@pytest.fixture
def calls() -> Inputs:
    return Inputs(2, 3)


def test_responses_are_the_gauss_newton_matrix_times_the_change(calls):
    network = Network()
    one = record(Network(), network, "block", calls, TimestepGroups((1,), 1.0))
    z = torch.cat([call.output for call in one])
    change = 1e-3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    found = responses(network, "block", calls, change, outputs(network, calls))
    expected = torch.stack([gauss_newton(network, z[i]) @ change[i] for i in range(len(z))])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3 * float(expected.abs().max()))


def test_powers_are_the_diagonal_of_the_gauss_newton_matrix(calls):
    network = Network()
    z = torch.cat([call.output for call in record(Network(), network, "block", calls, TimestepGroups((1,), 1.0))])
    found = output_power(network, "block", calls, probes=6000, seed=0)
    expected = torch.stack([gauss_newton(network, row).diagonal() for row in z])
    torch.testing.assert_close(found, expected, rtol=0.15, atol=0.01)


def test_records_hold_inputs_of_one_network_and_outputs_of_the_other(calls):
    quantized, exact, groups = Network(), Network(1), TimestepGroups((1, 2), 1.0)
    groups.attach(quantized)
    quantized.register_forward_pre_hook(lambda m, a, k: (a, {**k, "x": k["x"] + 1}), with_kwargs=True)
    one = record(quantized, exact, "block", calls, groups)[1]
    torch.testing.assert_close(one.arguments[0], torch.from_numpy(calls.x[1]) + 1)
    torch.testing.assert_close(one.output, flat(exact.block(torch.from_numpy(calls.x[1]), scale=one.keywords["scale"])))
    assert one.group.tolist() == [0, 0, 0] and groups.index is None


@pytest.mark.parametrize("mixed", [True, False])
def test_draws_say_whose_samples_they_are(calls, mixed):
    network = Network()
    records = record(Network(), network, "block", calls, TimestepGroups((1,), 1.0))
    whole = torch.cat([one.output for one in records])
    draw = draws(records, mixed=mixed, batch=4, generator=torch.Generator().manual_seed(0))
    seen = set()
    for _ in range(12):
        one, rows = draw()
        assert torch.equal(one.output, whole[rows]) and len(rows) == (4 if mixed else 3)
        torch.testing.assert_close(flat(network.block(*one.arguments, **one.keywords)), one.output)
        seen |= set(rows.tolist())
    assert seen == set(range(6))
