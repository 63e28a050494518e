"""Metrics of pairs of images or videos: THE list. Each is a thin adapter over a package that the field uses."""

from dit2deploy.evaluate.fidelity import psnr_db
from dit2deploy.stages.evaluate.metrics.clip_score import CLIP_SCORE
from dit2deploy.stages.evaluate.metrics.fid import FID
from dit2deploy.stages.evaluate.metrics.geneval import GENEVAL
from dit2deploy.stages.evaluate.metrics.pairs import Metric, Pairs
from dit2deploy.stages.evaluate.metrics.perceptual import LPIPS
from dit2deploy.stages.evaluate.metrics.vbench import VBENCH

_EQUAL_DB = 100.0  # told for images that are equal


def _psnr(pairs: Pairs) -> dict[str, float]:
    found = [
        min(psnr_db(full.numpy(), engine.numpy(), 1.0), _EQUAL_DB)
        for engine, full in zip(pairs.engine, pairs.full_precision, strict=True)
    ]
    return {"pair": sum(found) / len(found), "worst": min(found)}


PSNR = Metric("psnr_db", "PSNR to full precision, dB", "higher", _psnr)

METRICS: tuple[Metric, ...] = (PSNR, LPIPS, CLIP_SCORE, FID, GENEVAL, *VBENCH)
