"""The error raised when a model's outputs are NaN or infinite."""

from tokendance_jax.errors import LocatedError


class NotFiniteError(LocatedError):
    """Logits, or the residual stream that they are computed from, are NaN or infinite."""

    def __init__(self, where: str, subject: str, problem: str) -> None:
        remedy = "check the model's weights, or load it with dtype=float32 if they overflow"
        super().__init__(where, subject, problem, remedy)

    def __reduce__(self) -> tuple[type["NotFiniteError"], tuple[str, ...]]:
        return type(self), self.args[:3]
