"""How a float weight becomes codes and scales: pure functions on tensors, shared by `quantize` and later methods."""
