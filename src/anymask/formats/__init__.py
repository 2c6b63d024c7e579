"""Mask files: our own, and those of others, told apart by what is in them."""

from anymask.formats.reading import load_mask, load_weights
from anymask.formats.refusal import FORMAT
from anymask.formats.writing import WRITTEN, convert, save

__all__ = ["FORMAT", "WRITTEN", "convert", "load_mask", "load_weights", "save"]
