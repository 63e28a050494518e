"""Stage report: one self-contained page of what a bundle is and what was shown of it."""

from dit2deploy.stages.report.report import report

__all__ = ["report"]
