"""What tuning sets aside at most, whatever the model: numbers that a plan of its memory reads too."""

MOST_LOGITS = 1 << 24
"""Logits that may exist at once: 64 MiB of them in float32."""

MOST_REDUCED = 50_000_000
"""Gradients at most that are averaged at once; DeepSpeed's default sets 1 to 2 GB aside for them in every step."""
