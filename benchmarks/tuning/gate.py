"""Before anything is timed: how far apart the trainers' numbers may be, and whether they are."""

from dataclasses import dataclass

LIMITS = {
    "loss": 1e-12,
    "logps": 1e-10,
    "grads": 1e-8,
    "released_loss": 1e-12,
    "released_grads": 1e-8,
}
"""In float64; but Llama's norm computes in float32 whatever the model does. That rounds differences of the forward
pass away, and leaves some of 1e-9 in the gradients."""

TRL_LIMIT = 1e-4
"""Of the loss in float32: its own log-probabilities of hundreds of tokens are exact to about 1e-5."""


@dataclass(frozen=True, slots=True)
class Gate:
    """How far apart the trainers' numbers are, at most.

    Attributes:
        fp64: Ours and the plain forward (`loss`, `logps`, `grads`); ours and the emulation with DPO's own loss
            (`released_loss`, `released_grads`).
        trl_loss: Ours and TRL's loss, pair by pair, float32; None where TRL was left out.
        same_rows: Whether TRL tokenised the pairs exactly as ours did.
        loss: Mean of ours, in float64: far from log 2, or nothing was compared.
        attention: What ours computed attention with, as the tuner chooses it.
    """

    fp64: dict[str, float]
    trl_loss: float | None
    same_rows: bool | None
    loss: float
    attention: str

    def failures(self) -> list[str]:
        """What is over its limit, in words."""
        found = [
            f"{name}: {self.fp64[name]:.1e} in float64, over {limit:.0e}"
            for name, limit in LIMITS.items()
            if not self.fp64[name] <= limit  # NaN is a failure
        ]
        if self.trl_loss is not None and not self.trl_loss <= TRL_LIMIT:
            found.append(f"TRL's loss: {self.trl_loss:.1e} in float32, over {TRL_LIMIT:.0e}")
        if self.same_rows is False:
            found.append("TRL tokenises the pairs to other rows")
        return found
