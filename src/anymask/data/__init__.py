"""Images and labels: data sets, splits, and batches that are the same on every device and after every resume."""

from anymask.data.batches import Augment, Batches
from anymask.data.catalog import DATASETS, load
from anymask.data.splits import Dataset, Split, split_validation, statistics

__all__ = ["DATASETS", "Augment", "Batches", "Dataset", "Split", "load", "split_validation", "statistics"]
