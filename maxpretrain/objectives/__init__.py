"""One file an objective: host side `example`, device side `loss`."""

from maxpretrain.objectives.bart import BART
from maxpretrain.objectives.base import Loss, Objective, Work
from maxpretrain.objectives.clm import CLM
from maxpretrain.objectives.electra import ELECTRA, RTD
from maxpretrain.objectives.fim import FillInTheMiddle
from maxpretrain.objectives.mixture import Mixture
from maxpretrain.objectives.mlm import MLM
from maxpretrain.objectives.multi_token import MultiToken
from maxpretrain.objectives.prefix import PrefixLM
from maxpretrain.objectives.span_corruption import SpanCorruption
from maxpretrain.objectives.spanbert import SpanBERT
from maxpretrain.objectives.ul2 import UL2

__all__ = [
    "BART",
    "CLM",
    "ELECTRA",
    "MLM",
    "RTD",
    "UL2",
    "FillInTheMiddle",
    "Loss",
    "Mixture",
    "MultiToken",
    "Objective",
    "PrefixLM",
    "SpanBERT",
    "SpanCorruption",
    "Work",
]
