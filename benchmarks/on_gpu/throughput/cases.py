"""What is measured, in the order of its worth, and what others have published for it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CASES", "PUBLISHED", "TOY", "Case"]

PUBLISHED = {("large", 128): 580.0, ("large", 512): 210.0}
"""Sequences/s of BERT-large on one A100-80 in FP16: NVIDIA's DeepLearningExamples, PyTorch/LanguageModeling/BERT."""


@dataclass(frozen=True)
class Case:
    """One model at one length.

    Attributes:
        size: "base" or "large", of BERT.
        length: tokens per sequence.
        compiled: by torch.compile, as `training.compile=true` has it.
    """

    size: str
    length: int
    compiled: bool

    @property
    def name(self) -> str:
        """As in the JSON, e.g. "large-128-compiled"."""
        return f"{self.size}-{self.length}-{'compiled' if self.compiled else 'eager'}"


CASES = (
    Case("large", 128, True),
    Case("base", 128, True),
    Case("large", 512, True),
    Case("large", 128, False),
    Case("base", 512, True),
    Case("base", 128, False),
    Case("large", 512, False),
    Case("base", 512, False),
)


@dataclass(frozen=True)
class Sizes:
    """How large everything is: the real thing, or a toy for a rehearsal.

    Attributes:
        models: names of `MODEL_SIZES` by those of the cases.
        shortening: what lengths are divided by.
        vocabulary: tokens.
        most_sequences: of a micro-batch, whatever the plan says: logits of more have over 2^31 elements.
        seconds: of measuring, about.
        backend: torch.compile's; the toy's is no compiler.
    """

    models: dict[str, str]
    shortening: int
    vocabulary: int
    most_sequences: int
    seconds: float
    backend: str


REAL = Sizes({"base": "base", "large": "large"}, 1, 30522, 2048, 3.0, "inductor")
TOY = Sizes({"base": "tiny", "large": "tiny"}, 8, 1000, 2, 0.0, "aot_eager")
