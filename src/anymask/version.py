"""Which anymask this is: said here, too, because a copy that nobody installed has no metadata."""

__version__ = "0.1.0"
