"""Open Hyper-SD: distil, compare, vote, and feed the votes back. See README.md for the walk through the modules."""

__version__ = "0.1.0"
