"""Making masks: random, magnitude, SNIP, GraSP, SynFlow and lottery tickets."""

from anymask.pruning.budget import CollapseWarning
from anymask.pruning.lottery import Ticket, lottery_ticket
from anymask.pruning.methods import METHODS, Method
from anymask.pruning.search import prune

__all__ = ["METHODS", "CollapseWarning", "Method", "Ticket", "lottery_ticket", "prune"]
