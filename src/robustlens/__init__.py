"""robustlens: train robust classifiers, look inside them, and test what the papers say about them."""

__version__ = "0.1.0"
