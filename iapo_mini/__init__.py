"""iapo-mini: information-aware policy optimization (IAPO) on one consumer GPU or a laptop."""

__version__ = "0.1.0"
