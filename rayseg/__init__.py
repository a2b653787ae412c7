"""Map a land-cover class over a whole region from little or no labelled data."""

__version__ = "0.1.0"
