"""sima-ray: vision-language models that improve themselves on a Ray cluster (SIMA, arXiv 2405.15973)."""

__version__ = "0.1.0"
