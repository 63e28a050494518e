"""The demo DiT, a diffusers pipeline folder that draws handwritten digits, its ternary weights, and its classifier."""

from pathlib import Path

PATH = Path(__file__).parent
CHECKPOINT = PATH / "w1.58a4"  # quantized and trained, see README.md
CLASSIFIER = PATH / "classifier.safetensors"
