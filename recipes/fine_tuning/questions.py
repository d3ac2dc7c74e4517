"""Extractive question answering: windows over long passages, and the best span over a question's windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import RecipeError
from .data import Question

LONGEST_ANSWER = 30  # tokens
_BEST = 20  # starts and ends that are paired


@dataclass(frozen=True)
class Window:
    """A question with the part of its passage that fits the model.

    Attributes:
        question: index of the question.
        inputs: what the model takes, without labels.
        span: (first, last) token of the first answer; (0, 0), the [CLS] token, if it is not in this window.
        offsets: for each token the characters of the passage it stands for, None for other tokens.
    """

    question: int
    inputs: dict[str, list[int]]
    span: tuple[int, int]
    offsets: list[tuple[int, int] | None]

    def with_labels(self) -> dict[str, Any]:
        """Return the model's inputs and labels."""
        return {**self.inputs, "start_positions": self.span[0], "end_positions": self.span[1]}


def windows(questions: Sequence[Question], tokenizer: Any, length: int) -> list[Window]:
    """Cut each passage into windows of at most `length` tokens, question included, that overlap by a third.

    Args:
        questions: with their answers.
        tokenizer: a fast one.
        length: tokens, padded up to.

    Raises:
        RecipeError: the tokenizer's package loses the end of long passages.
    """
    _require_whole_passages(tokenizer, length)
    cut = []
    for index, question in enumerate(questions):
        encoded = _encode(tokenizer, question.question.strip(), question.passage, length)
        for number, offsets in enumerate(encoded["offset_mapping"]):
            in_passage = [part == 1 for part in encoded.sequence_ids(number)]
            spans = [tuple(o) if inside else None for o, inside in zip(offsets, in_passage, strict=True)]
            inputs = {name: encoded[name][number] for name in tokenizer.model_input_names}
            cut.append(Window(index, inputs, _answer_span(question, spans), spans))
    return cut


def _encode(tokenizer: Any, question: str, passage: str, length: int) -> Any:
    return tokenizer(
        question,
        passage,
        truncation="only_second",
        max_length=length,
        stride=length // 3,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="max_length",
    )


def _require_whole_passages(tokenizer: Any, length: int) -> None:
    """Try a passage of several windows: tokenizers 0.23.1 and 0.23.2 make at most two, without a word."""
    passage = " ".join("a" * 4 * length)
    encoded = _encode(tokenizer, "a", passage, length)
    if max(end for offsets in encoded["offset_mapping"] for _, end in offsets) < len(passage):
        raise RecipeError(
            f"tokenizers {version('tokenizers')} loses what of a long passage comes after its second window: "
            "pip install 'tokenizers>=0.23.3'"
        )


def _answer_span(question: Question, offsets: list[Any]) -> tuple[int, int]:
    if not question.answers:
        return 0, 0
    text, begin = question.answers[0]
    end = begin + len(text)
    first = next((i for i, o in enumerate(offsets) if o and o[0] <= begin < o[1]), None)
    last = next((i for i, o in enumerate(offsets) if o and o[0] < end <= o[1]), None)
    return (0, 0) if first is None or last is None else (first, last)


def best_answers(
    questions: Sequence[Question],
    cut: Sequence[Window],
    starts: NDArray[np.floating],
    ends: NDArray[np.floating],
) -> dict[str, str]:
    """Return each question's answer: the span with the largest sum of logits over all of its windows.

    Args:
        questions: as for `windows`.
        cut: their windows.
        starts: logits of the answer's first token, shape (windows, tokens).
        ends: of its last.
    """
    best: dict[int, tuple[float, str]] = {}
    for window, start, end in zip(cut, starts, ends, strict=True):
        allowed = np.array([offset is not None for offset in window.offsets])
        firsts, lasts = (np.argsort(np.where(allowed, logits, -np.inf))[::-1][:_BEST] for logits in (start, end))
        for first in firsts:
            for last in lasts:
                if not (allowed[first] and allowed[last] and 0 <= last - first < LONGEST_ANSWER):
                    continue
                score = float(start[first] + end[last])
                if window.question not in best or score > best[window.question][0]:
                    begin, stop = window.offsets[first][0], window.offsets[last][1]  # type: ignore[index]
                    best[window.question] = score, questions[window.question].passage[begin:stop]
    return {question.key: best.get(index, (0.0, ""))[1] for index, question in enumerate(questions)}
