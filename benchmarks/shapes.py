"""Shapes of parameters to step on."""

from __future__ import annotations

import torch

__all__ = ["SHAPES", "bert_shapes", "equal_layers", "make_parameters"]

Shape = tuple[int, ...]


def bert_shapes(layers: int, hidden: int, vocabulary: int = 30522, positions: int = 512) -> list[Shape]:
    """The parameters of BERT for masked language modelling, tied decoder, in the order of transformers' model."""
    wide = 4 * hidden
    vector = (hidden,)
    embeddings: list[Shape] = [(vocabulary, hidden), (positions, hidden), (2, hidden), vector, vector]
    attention: list[Shape] = [(hidden, hidden), vector] * 4 + [vector, vector]
    feed_forward: list[Shape] = [(wide, hidden), (wide,), (hidden, wide), vector, vector, vector]
    head: list[Shape] = [(vocabulary,), (hidden, hidden), vector, vector, vector]
    return embeddings + (attention + feed_forward) * layers + head


def equal_layers(count: int, elements: int) -> list[Shape]:
    """`count` matrices of about `elements` elements in all."""
    columns = 16
    rows = max(1, elements // count // columns)
    return [(rows, columns)] * count


SHAPES = {
    "bert-tiny": bert_shapes(2, 128),
    "bert-base": bert_shapes(12, 768),
    "bert-large": bert_shapes(24, 1024),
}


def make_parameters(shapes: list[Shape], device: str = "cpu", seed: int = 0) -> list[torch.nn.Parameter]:
    """Parameters with gradients, all small random numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    parameters = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.randn(shape, device=device, generator=generator) * 0.02)
        parameter.grad = torch.randn(shape, device=device, generator=generator) * 1e-3
        parameters.append(parameter)
    return parameters
