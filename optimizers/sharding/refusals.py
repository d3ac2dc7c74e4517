"""What a wrapper cannot give every optimizer: one sentence for each such thing, with what to do instead."""

from __future__ import annotations

from typing import Any, NoReturn

from .layout import LayoutError

__all__ = ["needs_single_gradients", "refuse_model_norm", "refuse_rows", "refuse_statistics"]


def needs_single_gradients(optimizer: Any, problem: str, instead: str) -> str:
    """The sentence of `refuse_statistics`, for errors of another class."""
    return (
        f"{type(optimizer).__name__} needs the gradient of every single micro-batch of every layer, but {problem}: not "
        f"supported. Use {instead} for CLARS, the VR optimizers and collect_group_norms()"
    )


def refuse_statistics(optimizer: Any, problem: str | None, instead: str) -> None:
    """Raise LayoutError if the optimizer keeps statistics of group gradients, and there is a problem with them.

    Args:
        optimizer: The optimizer.
        problem: Why a rank does not see the gradient of each of its micro-batches; None if it does.
        instead: What to use.
    """
    if problem is not None and optimizer.statistics is not None:
        raise LayoutError(needs_single_gradients(optimizer, problem, instead))


def refuse_rows(optimizer: Any, problem: str, instead: str | None = None) -> None:
    """Raise LayoutError if the optimizer clips rows of embeddings, whose sums cannot be known here.

    Args:
        optimizer: The optimizer.
        problem: Why not, as a relative clause.
        instead: What may be done beside taking the embeddings out of the clipping.
    """
    if any(optimizer.has_rows(group) for group in optimizer.param_groups):
        remedy = "" if instead is None else f"{instead}, or "
        raise LayoutError(
            f"{type(optimizer).__name__} clips rows of embeddings, {problem}: {remedy}put the embeddings into a group "
            "with cowclip=False"
        )


def refuse_model_norm(problem: str) -> NoReturn:
    """Raise LayoutError, for `Layout.gradient_norm` where nobody knows the norm.

    Args:
        problem: Why not, and what to do.
    """
    raise LayoutError(f"this optimizer needs the norm of the whole model's gradient, but {problem}")
