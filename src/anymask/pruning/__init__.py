"""Making masks: `METHODS` before training, `DYNAMIC` while it goes on."""

from anymask.pruning.budget import CollapseWarning, OutputWarning, TieWarning
from anymask.pruning.dynamic import DYNAMIC, Dynamic
from anymask.pruning.lottery import Ticket, lottery_ticket
from anymask.pruning.methods import METHODS, Method
from anymask.pruning.search import prune

__all__ = ["DYNAMIC", "METHODS", "CollapseWarning", "Dynamic", "Method", "OutputWarning", "Ticket", "TieWarning", "lottery_ticket", "prune"]
