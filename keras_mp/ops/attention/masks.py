"""Which query sees which key, and what else the functions of a block need to know besides tensors."""

from typing import Any, NamedTuple

__all__ = ["Masks", "Settings"]


class Masks(NamedTuple):
    """Which query sees which key; what is None or False hides nothing.

    Args:
        causal: query i sees keys 0 to i.
        window: query i sees the keys less than so many steps away.
        query: bool, of shape (B, T), False for queries that see nothing.
        key: bool, of shape (B, S), False for keys that nothing sees.
        pairs: bool, broadcastable to (B, heads, T, S).
    """

    causal: bool = False
    window: int | None = None
    query: Any = None
    key: Any = None
    pairs: Any = None

    def may_hide_rows(self) -> bool:
        """Whether there can be a query that sees no key."""
        return self.window is not None or any(mask is not None for mask in (self.query, self.key, self.pairs))


class Settings(NamedTuple):
    """What the functions of a block need to know besides tensors; hashable, as `tf.function` asks for."""

    scale: float
    causal: bool
    window: int | None
    rate: float
