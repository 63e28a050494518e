"""A policy in the vocabulary of compressed-tensors, for people and tools that know its names.

It tells bits, granularity and rotations; codes are packed in this package's own words (`format`), which
compressed-tensors does not unpack. Timestep groups, branches and clipping have no names there: `policy` holds them.
"""

from typing import Any

from dit2deploy.artefacts.policy import LayerPolicy, Policy

FORMAT = "dit2deploy"
_BITS = {"ternary": 2, "int3": 3, "int4": 4, "int8": 8}


def described(policy: Policy) -> dict[str, Any]:
    """config_groups and ignore as a QuantizationConfig has them, and its transform_config.

    Layers of one scheme are one group, named in the policy's order; `targets` are module names.
    """
    groups: list[dict[str, Any]] = []
    rotations: dict[int, list[str]] = {}
    for name, layer in policy.layers.items():
        if not layer.is_quantized:
            continue
        scheme = _scheme(layer)
        group = next((one for one in groups if all(one[key] == value for key, value in scheme.items())), None)
        if group is None:
            groups.append(group := {"targets": [], **scheme})
        group["targets"].append(name)
        if layer.hadamard > 1:
            rotations.setdefault(layer.hadamard, []).append(name)
    return {
        "format": FORMAT,
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups)},
        "ignore": [name for name, layer in policy.layers.items() if not layer.is_quantized],
        "transform_config": {
            "config_groups": {f"hadamard_{block}": _rotation(block, names) for block, names in rotations.items()}
        },
    }


def _scheme(layer: LayerPolicy) -> dict[str, Any]:
    """Weights of ternary layers use three of the four codes of 2 bits; activations are told by their widest group."""
    weights = {"num_bits": layer.weight_bits or _BITS[layer.weight], "type": "int", "symmetric": True}
    weights |= (
        {"strategy": "channel"} if layer.group_size is None else {"strategy": "group", "group_size": layer.group_size}
    )
    inputs = {"num_bits": max(layer.activation_bits), "type": "int", "symmetric": True}
    inputs |= {"strategy": "token", "dynamic": True} if layer.regions == "token" else {"strategy": "tensor"}
    return {"weights": weights, "input_activations": inputs}


def _rotation(block: int, names: list[str]) -> dict[str, Any]:
    """x H and W H: a normalised Hadamard matrix of `block` rows, repeated along the inputs; x W' stays as it was."""
    places = ("input", "weight_input")
    return {
        "type": "hadamard",
        "head_dim": block,
        "apply": [{"targets": names, "location": place, "inverse": False} for place in places],
    }
