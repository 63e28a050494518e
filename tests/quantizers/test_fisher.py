"""Fisher scores are the trace that they estimate, and Hessians weighted by ones are the plain ones bit for bit."""

import numpy as np
import pytest
import torch

from dit2deploy.artefacts.policy import LayerPolicy, Policy
from dit2deploy.base.progress import listen
from dit2deploy.models.load import linears, load_transformer, open_model
from dit2deploy.quantizers.fisher import fisher_scores
from dit2deploy.stages.calibrate import calibrate
from dit2deploy.stages.quantize import quantize
from dit2deploy.stages.quantize.hessians import gather

NAMES = ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2"]


class Calls:
    """As much of a calibration set as is asked for: calls of a network."""

    def __init__(self, calls: list[dict[str, np.ndarray]]) -> None:
        self._calls = calls

    def __len__(self) -> int:
        return len(self._calls)

    def call(self, index: int) -> dict[str, np.ndarray]:
        return self._calls[index]


class Toy(torch.nn.Module):
    """f(x) = W x: |d(v . f) / dW|^2 = |v|^2 |x|^2, so the score is N |x|^2 for N outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 6, bias=False).requires_grad_(False)
        self.unused = torch.nn.Linear(8, 6).requires_grad_(False)

    def forward(self, x: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (self.linear(x),)


def test_scores_are_the_gauss_newton_trace():
    x = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
    toy, expected = Toy(), 6 * np.square(x).sum(1).mean()
    weights = [toy.linear.weight, toy.unused.weight]
    found, unused = fisher_scores(toy, weights, {"x": torch.from_numpy(x)}, seed=0, probes=200)
    assert (found, unused) == (pytest.approx(expected, rel=0.05), 0)
    louder, _ = fisher_scores(toy, weights, {"x": torch.from_numpy(10 * x)}, seed=1)
    assert louder == pytest.approx(100 * expected, rel=0.3)


def test_more_probes_make_a_score_less_noisy():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    toy = Toy()
    spread = {
        probes: np.std([fisher_scores(toy, [toy.linear.weight], {"x": x}, seed=s, probes=probes) for s in range(60)])
        for probes in (1, 16)
    }
    assert spread[16] == pytest.approx(spread[1] / 4, rel=0.35)


@pytest.fixture(scope="module")
def calibration(tiny_dit_folder, tmp_path_factory):
    return calibrate(tiny_dit_folder, tmp_path_factory.mktemp("calibration") / "set", samples=2, steps=5)


def test_scores_leave_the_network_as_it_was(tiny_dit_folder, calibration):
    network, _ = load_transformer(tiny_dit_folder)
    weights = [network.get_parameter(f"{name}.weight") for name in NAMES]
    call = {name: torch.from_numpy(value) for name, value in calibration.call(2).items()}
    first, again = (fisher_scores(network, weights, call, seed=3) for _ in range(2))
    assert first == again and min(first) > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_equal_weights_are_the_plain_hessian_bit_for_bit(tiny_dit_folder, calibration):
    network, _ = load_transformer(tiny_dit_folder)
    plain = gather(network, NAMES, calibration)
    ones = gather(network, NAMES, calibration, weights={name: np.ones(5) for name in NAMES})
    one_hot = gather(network, NAMES, calibration, weights={NAMES[0]: [0, 5, 0, 0, 0]})
    alone = gather(network, NAMES, Calls([calibration.call(1)]))
    assert all(torch.equal(plain[name], ones[name]) for name in NAMES)
    torch.testing.assert_close(one_hot[NAMES[0]], alone[NAMES[0]])
    assert torch.equal(one_hot[NAMES[1]], plain[NAMES[1]])


def test_the_policy_asks_for_fisher_weights(tiny_dit_folder, calibration, tmp_path):
    source, made, told = open_model(tiny_dit_folder), {}, []
    stop = listen(lambda what, done, total: told.append(what))
    for hessian in ("uniform", "fisher"):
        layer = LayerPolicy(weight="int3", activation_bits=(8,), rounding="gptq", hessian=hessian)
        layers = {name: layer if name in NAMES else LayerPolicy(weight="float") for name in linears(source)}
        policy = Policy(method="test", model=source.class_name, layers=layers)
        made[hessian] = quantize(tiny_dit_folder, policy, calibration, tmp_path / hessian)
    stop()
    assert made["uniform"].sha256 != made["fisher"].sha256
    assert sum("Fisher weights of 5 steps" in line for line in told) == 1
