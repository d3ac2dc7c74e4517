"""Gradients that are the same in every process, put into any model in the place of those that its data would make.

A module's forward becomes the sum, over its own parameters, of <parameter, gradient of this step>, and over its
children, called one after the other. So hooks of wrappers run as in training, whichever modules they wrap.

The gradients are small integers times a power of two, such that sums and means over ranks and micro-batches are exact
in 16 bits too: what differs afterwards is the optimizer's doing. Ranks and micro-batches get different ones.

As in training, some are zero: in every step those of a third of the rows of each embedding, in every fifth step those
of a whole layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["Injection", "largest_mean", "seeded_weights"]

LARGEST_IN_16_BITS = 256  # bf16 has every whole number up to here
LARGEST_MEAN = 24
RESTING = 3  # each row of an embedding has no gradient in one step of so many
NEVER_CALLED = (nn.ParameterList, nn.ParameterDict)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
SHARES = (2.0, -1.0)
"""Of the gradient of a parameter that several modules have: the first one's and the second one's. They add up to 1."""


class Injection:
    """Has a model's backward make known gradients.

    Args:
        model: Not wrapped yet. Its modules' forwards are replaced.
        groups: Ranks times micro-batches of one step.

    Attributes:
        shapes: Of the trainable layers with elements, by name, in the order of `named_parameters`.
        without_gradient: Names of those that get none, as the model says.
        step: Number of the step, from 0, whose gradients backward is to make.
        group: Whose gradients of that step, from 0.
        silent: Make gradients of zeros.
        zeros: Let some gradients be zero in the other steps, too.

    Raises:
        ValueError: If the model has nothing to train.
    """

    def __init__(self, model: nn.Module, groups: int):
        self.groups = groups
        self.step = self.group = 0
        self.silent, self.zeros = False, True
        self.shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad and p.numel()}
        if not self.shapes:
            raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: nothing to audit")
        self.without_gradient = frozenset(getattr(model, "without_gradient", ())) & set(self.shapes)
        self._numbers = {name: number for number, name in enumerate(self.shapes)}
        self._odd = _odd_part(groups)
        self._largest = max(2, largest_mean(groups))
        self._embeddings = self._rows_at_rest(model)
        with_gradient = [name for name in self.shapes if name not in self.without_gradient]
        matrices = [name for name in with_gradient if len(self.shapes[name]) > 1]
        # Never the only one: a step without any gradient is another matter.
        self._at_rest = (matrices or with_gradient) if len(with_gradient) > 1 else []
        self._replace(model, dict(self._uses(model)), set())

    def gradient(self, name: str) -> torch.Tensor:
        """Of this step and this group, fp32, on the CPU."""
        generator = torch.Generator("cpu").manual_seed(10_007 * self.step + self._numbers[name] + 1)
        shape = self.shapes[name]
        mean = (8 * torch.randn(shape, generator=generator, device="cpu")).round().clamp(-self._largest, self._largest)
        mean = torch.where(mean == 0, torch.ones_like(mean), mean)  # a layer of one element has a gradient, too
        # Not small beside the mean: else a variance between groups would be the difference of nearly equal numbers.
        deviation = (torch.randint(0, 2, shape, generator=generator, device="cpu") * 2.0 - 1.0) * (self._largest // 2)
        exponent = -float(torch.randint(3, 10, (), generator=generator, device="cpu"))
        size = 0.0 if self.silent else 2.0**exponent
        return self._with_zeros(name, size * self._odd * (mean + self._level() * deviation))

    def _with_zeros(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        if not self.zeros:
            return gradient
        if name in self._embeddings:
            gradient[(RESTING - self.step % RESTING) % RESTING :: RESTING] = 0.0
        rests = self._at_rest and self.step % 5 == 2
        if rests and name == self._at_rest[(len(self._at_rest) // 2 + self.step // 5) % len(self._at_rest)]:
            gradient.zero_()
        return gradient

    def _rows_at_rest(self, model: nn.Module) -> frozenset[str]:
        """Names of the embeddings, or of the first matrix where there are none."""
        name_of = {id(p): name for name, p in model.named_parameters()}
        own = (p for m in model.modules() if isinstance(m, EMBEDDINGS) for p in m.parameters(recurse=False))
        fit = {name for name, shape in self.shapes.items() if len(shape) > 1 and shape[0] >= RESTING}
        found = fit & {name_of[id(p)] for p in own}
        return frozenset(found or [name for name in self.shapes if name in fit][:1])

    def _level(self) -> float:
        """To which side the group's gradient differs from the mean: +1, -1, +1, ..., and 0 if one is left over."""
        if self.groups % 2 and self.group == self.groups - 1:
            return 0.0
        return 1.0 - 2.0 * (self.group % 2)

    def _uses(self, model: nn.Module) -> Iterator[tuple[int, list[tuple[str, str, int]]]]:
        """Yield each module's id with (attribute, layer, number of the use) of its own parameters."""
        name_of = {id(p): name for name, p in model.named_parameters() if name in self.shapes}
        times: dict[str, int] = dict.fromkeys(self.shapes, 0)
        for module in model.modules():
            uses = []
            for attribute, parameter in module.named_parameters(recurse=False):
                name = name_of.get(id(parameter))
                if name is not None and name not in self.without_gradient:
                    uses.append((attribute, name, times[name]))
                    times[name] += 1
            yield id(module), uses
        self._times = times

    def _share(self, name: str, use: int) -> float:
        if self._times[name] == 1:
            return 1.0
        return SHARES[use] if use < len(SHARES) else 0.0

    def _replace(self, module: nn.Module, uses: dict[int, Any], done: set[int]) -> None:
        done.add(id(module))
        children = []
        for name, child in module.named_children():
            if id(child) not in done and next(child.parameters(), None) is not None:
                self._replace(child, uses, done)
                children.append(name)
        module.forward = self._forward(module, uses[id(module)], children)

    def _forward(self, module: nn.Module, uses: list[tuple[str, str, int]], children: list[str]) -> Callable[..., Any]:
        def forward(*given: Any, **options: Any) -> torch.Tensor:
            total: Any = 0.0
            for attribute, name, use in uses:
                parameter = getattr(module, attribute)
                wide = parameter.double() if parameter.dtype == torch.float64 else parameter.float()
                gradient = self._share(name, use) * self.gradient(name).to(wide)
                total = total + (wide * gradient).sum()
            for child in children:  # by name: wrappers put others in their place
                part = module.get_submodule(child)
                total = total + (part.forward() if isinstance(part, NEVER_CALLED) else part())
            return total if torch.is_tensor(total) else torch.zeros((), device="cpu")

        return forward


def largest_mean(groups: int) -> int:
    """Largest whole number whose gradients, and all sums of them on the way to the mean of `groups`, 16 bits hold.

    A group's gradient is larger by half, for the deviation. Before groups are added it is that times the odd part of
    their number, and twice as much in the first module of a tied layer.
    """
    alone = LARGEST_IN_16_BITS // (3 * _odd_part(groups))
    return min(LARGEST_MEAN, alone, 2 * LARGEST_IN_16_BITS // (3 * groups))


def _odd_part(number: int) -> int:
    return number // (number & -number)


def seeded_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """fp32 weights by name, of several magnitudes, none zero, that 16 bits represent; the same in every process."""
    generator = torch.Generator("cpu").manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        steps = (64 * torch.randn(shape, generator=generator, device="cpu")).round().clamp(-255, 255)
        # Layers of one size would hide from one another that a norm is taken over all of them.
        size = 2.0 ** -float(torch.randint(8, 14, (), generator=generator, device="cpu"))
        weights[name] = size * torch.where(steps == 0, torch.ones_like(steps), steps)
    return weights
