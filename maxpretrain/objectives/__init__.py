"""One file an objective: host side `example`, device side `loss`."""

from maxpretrain.objectives.base import Loss, Objective, Work
from maxpretrain.objectives.clm import CLM

__all__ = ["CLM", "Loss", "Objective", "Work"]
