"""Which gradients have been clipped: known of each one for as long as it stays as the last clip has left it.

That is remembered by gradients, whichever optimizer or wrapper around it a clip was called with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.utils.weak import WeakIdKeyDictionary

from trustratio.optimizers.stepping.gradients import version_of

__all__ = ["Clips", "clips_of", "noting", "step_is_taken"]

Flag = bool | torch.Tensor
"""Whether something has made gradients smaller: known now, or to the device."""


@dataclass(frozen=True, eq=False)
class Clips:
    """What is known of the clips of some gradients.

    Attributes:
        made_smaller: Of each clip, whether it has.
        are_all: Whether there were no others. Where something has changed a gradient since a clip, it may be another
            step's gradient, or one that was clipped in a way that nobody tells.
    """

    made_smaller: tuple[Flag, ...] = ()
    are_all: bool = True


@dataclass(slots=True)
class _Note:
    """The clips of one gradient, and of which version; whether a step was taken with it since."""

    clips: Clips
    version: int
    is_stepped: bool = False


_NONE, _CHANGED = Clips(), Clips(are_all=False)
_notes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # gradient -> _Note


def clips_of(gradients: Iterable[torch.Tensor]) -> Clips | None:
    """The clips that gradients which are about to be stepped come from; None where no clip is known."""
    of_each = [_clips_of(gradient) for gradient in gradients]
    known = [clips for clips in of_each if clips is not None]
    if not known:
        return None
    flags = {id(flag): flag for clips in known for flag in clips.made_smaller}
    return Clips(tuple(flags.values()), len(known) == len(of_each) and all(clips.are_all for clips in known))


@contextmanager
def noting(gradients: Iterable[torch.Tensor]) -> Iterator[list[Flag]]:
    """Within it gradients are clipped; whether they have become smaller is put into the list that it gives."""
    before = [(gradient, _clips_of(gradient) or _NONE) for gradient in gradients]
    # Views of a bucket, as DDP may give, have one version: that of others rises too, and they stay as they are.
    others = [(gradient, note) for gradient, note in _notes.items() if note.version == version_of(gradient)]
    said: list[Flag] = []
    yield said
    for gradient, note in others:
        note.version = version_of(gradient)
    # Most gradients share what is known of them.
    now = {clips: replace(clips, made_smaller=(*clips.made_smaller, *said)) for clips in {c for _, c in before}}
    for gradient, clips in before:
        _notes[gradient] = _Note(now[clips], version_of(gradient))


def step_is_taken(gradients: Iterable[torch.Tensor]) -> None:
    """Remember that gradients have been stepped: what changes them now begins another step's."""
    for gradient in gradients:
        note: _Note | None = _notes.get(gradient)
        if note is not None:
            note.is_stepped = True


def _clips_of(gradient: torch.Tensor) -> Clips | None:
    note: _Note | None = _notes.get(gradient)
    if note is None or note.version == version_of(gradient):
        return None if note is None else note.clips
    return None if note.is_stepped else _CHANGED
