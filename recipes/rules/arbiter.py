"""Arbiter: a small network that learns the batch size from validation data, while another one trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

Average = Callable[[torch.Tensor], torch.Tensor]
"""Returns the element-wise mean of a tensor over the ranks, the same on all of them."""

Validation = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Returns features, shape (rows, width), and labels, shape (rows,), of as many validation samples."""

_CLOSE = 2.0  # samples by which the warm-up may miss its batch
_ALIKE = 1e-5  # relative difference of agents that is rounding
_MARGIN = 1e-3  # by which it moves the bounds, so that a batch on one of them has a finite target


class Arbiter:
    r"""The batch-size agent of MacLellan and Dong 2022 (arXiv 2205.08231, "Arbiter"); unverified.

    Read off the author's unfinished code at second hand. What is recommended is the gradient noise scale,
    `BatchFromNoise`: it needs no second network, no validation data and no learning rates of its own.

    An agent makes N logits of a validation batch, l₁ ≤ ... ≤ l_N when averaged over it and sorted; each stands for a
    batch size. In every iteration, after the trained network's own step, `update` does

        s = Σ softmax(α)_i l_i          B = ⌊(largest - smallest) σ(s) + smallest⌋
        F = cross-entropy(head(f + f · s v), y)  on B validation samples with features f and labels y
        agent, α, v <- Adam step along the gradient of F

    where f does not depend on the agent: nothing is unrolled through the training. At the end of an interval, e.g. an
    epoch, `next_batch` returns the size ⌊(largest - smallest) σ(l_i) + smallest⌋ of the sample i with the largest α,
    rounded down to a multiple of `unit`, and draws a new α ~ 1e-6 N(0, 1).

        arbiter = Arbiter(nn.Linear(784, 4), width=128, smallest=8, largest=512)
        arbiter.warm_up(validation_inputs, batch=128)
        ...
        arbiter.update(inputs, lambda rows: features_and_labels(rows), model.head)  # after each step of the model
        batch = arbiter.next_batch()                                                # after each epoch

    With several ranks each makes its own logits and reads its own share of the B samples; logits and gradients are
    averaged, so that all ranks learn and choose the same, which is what one process would with all the samples. The
    rest of B that the ranks cannot share evenly is left out.
    """

    def __init__(
        self,
        agent: nn.Module,
        width: int,
        smallest: int,
        largest: int,
        unit: int = 1,
        lr: float = 1e-5,
        alpha_lr: float = 1e-4,
        alpha_weight_decay: float = 5e-4,
        seed: int = 0,
        ranks: int = 1,
        average: Average | None = None,
    ) -> None:
        """Begin with logits that are weighted alike.

        Args:
            agent: maps a validation batch to logits, shape (batch, N); equal on all ranks, in no wrapper.
            width: of the features.
            smallest: samples per update, at least.
            largest: samples per update, at most.
            unit: samples of which every batch is a multiple: micro-batch x ranks.
            lr: Adam's for the agent and v (that v has the agent's is a guess).
            alpha_lr: Adam's for α.
            alpha_weight_decay: of α, added to its gradient.
            seed: of v and every α.
            ranks: data-parallel processes.
            average: averages over them; needed where there are several.

        Raises:
            ValueError: out of range, or bounds that are no multiples of `unit`.
        """
        for name, count in {"width": width, "smallest": smallest, "unit": unit, "ranks": ranks}.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {count!r}")
        if not smallest < largest:
            raise ValueError(f"smallest must be below largest, got {smallest} and {largest}")
        if smallest % unit or largest % unit:
            raise ValueError(f"smallest and largest must be multiples of unit={unit}, got {smallest} and {largest}")
        if ranks > 1 and average is None:
            raise ValueError(f"{ranks} ranks need `average`, which averages a tensor over them")
        self.agent = agent
        self.smallest, self.largest, self.unit, self.ranks = smallest, largest, unit, ranks
        self._average = average or (lambda values: values)
        self._generator = torch.Generator().manual_seed(seed)
        device = next(agent.parameters()).device
        # nn.Linear(1, width) without a bias, as torch begins it.
        self._direction = nn.Parameter((2 * torch.rand(width, generator=self._generator) - 1).to(device))
        self._alpha: nn.Parameter | None = None  # until the agent shows how many logits it makes
        self._logits: torch.Tensor | None = None
        self._rates = (lr, alpha_lr, alpha_weight_decay)
        self._adam = torch.optim.Adam([*agent.parameters(), self._direction], lr=lr)
        self._alpha_adam: torch.optim.Adam | None = None

    def size(self, logit: torch.Tensor) -> torch.Tensor:
        """Return the batch that a logit stands for, element by element, before it is rounded to `unit`."""
        return torch.floor((self.largest - self.smallest) * torch.sigmoid(logit.double()) + self.smallest).long()

    @property
    def sizes(self) -> list[int]:
        """The batches of the N samples at the last update, ascending."""
        if self._logits is None:
            raise ValueError("Arbiter has no samples yet: call update() or warm_up() first")
        return self.size(self._logits).tolist()

    def update(self, inputs: Any, validation: Validation, head: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Learn from validation data once; the trained network and its gradients stay as they are.

        Args:
            inputs: a validation batch, as the agent takes it.
            validation: returns features and labels of as many samples as it is asked for: this rank's share of B.
            head: maps features to the logits of the classes; not trained here.

        Returns:
            F, the mean over all ranks.

        Raises:
            ValueError: agent, features or labels of another shape, agents that differ between ranks, or an F that is
                not finite. Nothing was learned then.
        """
        own = self._of_agent(inputs)
        logits = self._average(own.detach().clone()).requires_grad_()
        alpha = self._alpha_of(len(logits))
        failure: Exception | None = None
        try:
            packed = self._of_samples(logits, alpha, validation, head)
        except Exception as error:  # here alone perhaps, while the other ranks wait
            failure, packed = error, logits.new_full((len(logits) + len(alpha) + len(self._direction) + 1,), math.nan)
        of_logits, of_alpha, of_direction, mean_loss = self._average(packed).split(
            [len(logits), len(alpha), len(self._direction), 1]
        )
        if failure is not None:
            raise failure
        if not bool(torch.isfinite(mean_loss + of_logits.sum() + of_direction.sum() + of_alpha.sum())):
            raise ValueError(f"the validation loss is {float(mean_loss)}, or its gradient not finite: nothing learned")
        _apply(self._adam, [*self._of_agent_parameters(own, of_logits), of_direction])
        assert self._alpha_adam is not None
        _apply(self._alpha_adam, [of_alpha])
        self._logits = logits.detach().sort().values
        return float(mean_loss)

    def _of_samples(
        self,
        logits: torch.Tensor,
        alpha: torch.Tensor,
        validation: Validation,
        head: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Return the gradients of this rank's F with respect to logits, α and v, and F itself, in one vector."""
        position = (torch.softmax(alpha, 0) * logits.sort().values).sum()
        share = max(1, int(self.size(position)) // self.ranks)
        features, labels = validation(share)
        self._check(features, labels, share)
        features = features.detach()
        loss = functional.cross_entropy(head(features + features * (position * self._direction)), labels)
        gradients = torch.autograd.grad(loss, (logits, alpha, self._direction))
        return torch.cat([*gradients, loss.detach().reshape(1)])

    def warm_up(self, batches: Iterable[Any], batch: int, lr: float = 1e-4) -> int:
        """Train the agent to propose one batch size, before anything is learned.

            SmoothL1(s, logit((batch - smallest) / (largest - smallest))), by Adam, until |B - batch| < 2

        Args:
            batches: validation batches as the agent takes them, one per iteration.
            batch: the size to propose, between smallest and largest.
            lr: Adam's.

        Returns:
            How many iterations it took.

        Raises:
            ValueError: a batch out of bounds, or too few batches.
        """
        if not self.smallest <= batch <= self.largest:
            raise ValueError(f"batch must be from {self.smallest} to {self.largest}, got {batch!r}")
        below, above = batch - self.smallest + _MARGIN, self.largest - batch + _MARGIN
        target, adam = math.log(below / above), torch.optim.Adam(self.agent.parameters(), lr=lr)
        for done, inputs in enumerate(batches):
            own = self._of_agent(inputs)
            logits = self._average(own.detach().clone()).requires_grad_()
            alpha = self._alpha_of(len(logits)).detach()
            position = (torch.softmax(alpha, 0) * logits.sort().values).sum()
            self._logits = logits.detach().sort().values
            if abs(int(self.size(position)) - batch) < _CLOSE:
                return done
            loss = functional.smooth_l1_loss(position, position.new_tensor(target))
            (of_logits,) = torch.autograd.grad(loss, (logits,))
            _apply(adam, self._of_agent_parameters(own, of_logits))
        raise ValueError(f"the agent does not propose a batch of {batch} yet: give more batches or a higher lr")

    def next_batch(self) -> int:
        """Return the batch of the next interval, and begin it with a new α.

        Raises:
            ValueError: nothing was learned since the last one.
        """
        if self._alpha is None or self._logits is None or self._alpha_adam is None:
            raise ValueError("Arbiter has learned nothing since the last interval: call update() in every iteration")
        size = int(self.size(self._logits[int(self._alpha.argmax())]))
        self._draw(len(self._logits), self._alpha.device)
        return max(self.smallest, size // self.unit * self.unit)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` goes on from: tensors and plain values."""
        return {
            "agent": self.agent.state_dict(),
            "direction": self._direction.detach().clone(),
            "alpha": None if self._alpha is None else self._alpha.detach().clone(),
            "logits": None if self._logits is None else self._logits.clone(),
            "adam": self._adam.state_dict(),
            "alpha_adam": None if self._alpha_adam is None else self._alpha_adam.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` of an Arbiter with the same arguments returned."""
        self.agent.load_state_dict(state["agent"])
        with torch.no_grad():
            self._direction.copy_(state["direction"])
        self._adam.load_state_dict(state["adam"])
        if state["alpha"] is not None:
            self._begin(state["alpha"].to(self._direction.device).clone())
            assert self._alpha_adam is not None
            self._alpha_adam.load_state_dict(state["alpha_adam"])
        else:
            self._alpha = self._alpha_adam = None
        self._logits = None if state["logits"] is None else state["logits"].to(self._direction.device).clone()
        self._generator.set_state(state["generator"])

    def _of_agent(self, inputs: Any) -> torch.Tensor:
        made = self.agent(inputs)
        if made.dim() != 2 or not made.numel():
            raise ValueError(f"the agent must make logits of shape (batch, samples), got {tuple(made.shape)}")
        return made.mean(dim=0)

    def _alpha_of(self, samples: int) -> nn.Parameter:
        if self._alpha is None:
            self._require_alike()
            self._draw(samples, self._direction.device)
        assert self._alpha is not None
        if len(self._alpha) != samples:
            raise ValueError(f"the agent made {len(self._alpha)} logits at first, and {samples} now")
        return self._alpha

    def _draw(self, samples: int, device: torch.device) -> None:
        self._begin((1e-6 * torch.randn(samples, generator=self._generator)).to(device))

    def _begin(self, alpha: torch.Tensor) -> None:
        _, lr, weight_decay = self._rates
        self._alpha = nn.Parameter(alpha)
        self._alpha_adam = torch.optim.Adam([self._alpha], lr=lr, weight_decay=weight_decay)

    def _check(self, features: torch.Tensor, labels: torch.Tensor, rows: int) -> None:
        if features.shape != (rows, len(self._direction)) or labels.shape != (rows,):
            raise ValueError(
                f"validation must return {rows} features of width {len(self._direction)} and as many labels, got "
                f"shapes {tuple(features.shape)} and {tuple(labels.shape)}"
            )

    def _of_agent_parameters(self, own: torch.Tensor, of_logits: torch.Tensor) -> list[torch.Tensor]:
        """Return the gradient of the agent's parameters, over all ranks, given that of the averaged logits."""
        parameters = list(self.agent.parameters())
        made = torch.autograd.grad(own, parameters, of_logits, allow_unused=True)
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, made, strict=True)]
        flat = self._average(torch.cat([gradient.reshape(-1) for gradient in whole]))
        parts = flat.split([parameter.numel() for parameter in parameters])
        return [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]

    def _require_alike(self) -> None:
        """Check that all ranks begin with one agent; all of them hear of it if not."""
        own = torch.cat([parameter.detach().reshape(-1) for parameter in self.agent.parameters()])
        apart = (self._average(own.clone()) - own).abs().max() / own.abs().max().clamp(min=1e-30)
        if float(self._average(apart.reshape(1))) > _ALIKE:
            raise ValueError("the ranks begin with different agents: seed them alike, or broadcast the first rank's")


def _apply(adam: torch.optim.Adam, gradients: Iterable[torch.Tensor]) -> None:
    """Step the optimizer's parameters along these gradients; their own `.grad` is nobody else's."""
    parameters = adam.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    adam.step()
    adam.zero_grad()
