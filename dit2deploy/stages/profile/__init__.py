"""Stage profile: how fast, how big in memory, and how near to the machine's peak, side by side with full precision."""

from dit2deploy.stages.profile.profile import profile
from dit2deploy.stages.profile.summary import summary

__all__ = ["profile", "summary"]
