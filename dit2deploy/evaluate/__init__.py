"""Measures of fidelity (how close to the reference) and of quality (how good the images are)."""

from dit2deploy.evaluate.fidelity import cosine, max_abs, psnr_db, sqnr_db
from dit2deploy.evaluate.quality import Classifier, frechet_distance

__all__ = ["Classifier", "cosine", "frechet_distance", "max_abs", "psnr_db", "sqnr_db"]
