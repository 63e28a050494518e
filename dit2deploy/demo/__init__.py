"""The demo DiT, a diffusers pipeline folder that draws handwritten digits, and the classifier that reads them."""

from pathlib import Path

PATH = Path(__file__).parent
CLASSIFIER = PATH / "classifier.safetensors"
