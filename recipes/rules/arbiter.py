"""Arbiter: a small network that learns the batch size from validation data, while another one trains."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trustratio.optimizers.formulas.hyperparameters import check_range

from .arbiter_state import check_state

Average = Callable[[torch.Tensor], torch.Tensor]
"""Returns the element-wise mean of a tensor over the ranks, the same on all of them."""

Validation = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Returns features, shape (rows, width), and labels, shape (rows,), of as many validation samples."""

_CLOSE = 2.0  # samples by which the warm-up may miss its batch
_ALIKE = 1e-5  # relative difference of agents that is rounding
_EQUAL = 1e-12  # the same of counts
_END = object()  # of batches
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
    rest of B that the ranks cannot share evenly is left out. What one rank raises ends the call on all of them.
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
            agent: maps a validation batch to logits, shape (batch, N); equal on all ranks, in no wrapper. Parameters
                that require no gradient now are never trained; those that do are fp32 or fp64, since steps as
                small as these are lost in 16 bits.
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
            ValueError: out of range, bounds that are no multiples of `unit`, or an agent that cannot be trained.
        """
        counts = {"width": width, "smallest": smallest, "largest": largest, "unit": unit, "ranks": ranks}
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {count!r}")
        rates = {"lr": lr, "alpha_lr": alpha_lr, "alpha_weight_decay": alpha_weight_decay}
        for name, rate in rates.items():
            check_range(name, rate, 0.0)
        if not smallest < largest:
            raise ValueError(f"smallest must be below largest, got {smallest} and {largest}")
        if smallest % unit or largest % unit:
            raise ValueError(f"smallest and largest must be multiples of unit={unit}, got {smallest} and {largest}")
        if smallest < ranks:
            raise ValueError(f"smallest must be at least one sample per rank, got {smallest} for {ranks} ranks")
        if ranks > 1 and average is None:
            raise ValueError(f"{ranks} ranks need `average`, which averages a tensor over them")
        self.agent = agent
        self.smallest, self.largest, self.unit, self.ranks = smallest, largest, unit, ranks
        self._average = average or (lambda values: values)
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._trained = _trainable(agent)
        device = self._trained[0].device
        # nn.Linear(1, width) without a bias, as torch begins it.
        self._direction = nn.Parameter((2 * torch.rand(width, generator=self._generator) - 1).to(device))
        self._alpha: nn.Parameter | None = None  # until the agent shows how many logits it makes
        self._logits: torch.Tensor | None = None
        self._has_learned = False  # since the interval began
        sizes = {"smallest": smallest, "largest": largest, "unit": unit, "width": width}
        trained = [name for name, parameter in agent.named_parameters() if parameter.requires_grad]
        self._arguments: dict[str, Any] = {**sizes, **rates, "trained": trained}
        self._adam = torch.optim.Adam([*self._trained, self._direction], lr=lr)
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

    @torch.inference_mode(False)
    @torch.enable_grad()
    def update(self, inputs: Any, validation: Validation, head: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """Learn from validation data once; the trained network and its gradients stay as they are.

        Gradients are computed under `torch.no_grad()`, too. What the agent needs may not be an inference tensor.

        Args:
            inputs: a validation batch, as the agent takes it.
            validation: returns features and labels of as many samples as it is asked for: this rank's share of B. It
                is called without gradients.
            head: maps features, in their dtype, to the logits of the classes; not trained here.

        Returns:
            F, the mean over all ranks.

        Raises:
            ValueError: agent, features or labels of another shape, agents that differ between ranks, or an F that is
                not finite. Nothing was learned then.
            RuntimeError: another rank raised what ends this call on all of them. Nothing was learned then.
        """
        own, logits = self._shared_logits(lambda: inputs)
        alpha = self._alpha_of(len(logits))
        sizes = [len(logits), len(alpha), len(self._direction), 1]
        packed = self._agreed(lambda: self._of_samples(logits, alpha, validation, head), sum(sizes))
        of_logits, of_alpha, of_direction, mean_loss = packed.split(sizes)
        of_agent = self._of_agent_parameters(own, of_logits)
        if not all(bool(values.isfinite().all()) for values in (packed, *of_agent) if values is not None):
            raise ValueError(f"the validation loss is {float(mean_loss)}, or its gradient not finite: nothing learned")
        _apply(self._adam, [*of_agent, of_direction])
        assert self._alpha_adam is not None
        _apply(self._alpha_adam, [of_alpha])
        self._logits, self._has_learned = logits.detach().sort().values, True
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
        share = int(self.size(position)) // self.ranks
        with torch.no_grad():
            features, labels = validation(share)
        self._check(features, labels, share)
        features, labels = _plain(features), _plain(labels)
        response = features + features * (position * self._direction)
        made = head(response.to(features.dtype))
        loss = functional.cross_entropy(made.to(torch.promote_types(made.dtype, torch.float32)), labels)
        gradients = torch.autograd.grad(loss, (logits, alpha, self._direction))
        return torch.cat([*gradients, loss.detach().reshape(1)])

    @torch.inference_mode(False)
    @torch.enable_grad()
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
            RuntimeError: another rank raised what ends this call on all of them.
        """
        check_range("lr", lr, 0.0)
        if not self.smallest <= batch <= self.largest:
            raise ValueError(f"batch must be from {self.smallest} to {self.largest}, got {batch!r}")
        below, above = batch - self.smallest + _MARGIN, self.largest - batch + _MARGIN
        target, adam = math.log(below / above), torch.optim.Adam(self._trained, lr=lr)
        rest = iter(batches)

        def following() -> Any:
            if (inputs := next(rest, _END)) is _END:
                raise ValueError(f"the agent does not propose a batch of {batch} yet: give more batches or a higher lr")
            return inputs

        done = 0
        while True:
            own, logits = self._shared_logits(following)
            alpha = self._alpha_of(len(logits)).detach()
            position = (torch.softmax(alpha, 0) * logits.sort().values).sum()
            self._logits = logits.detach().sort().values
            if abs(int(self.size(position)) - batch) < _CLOSE:
                return done
            loss = functional.smooth_l1_loss(position, position.new_tensor(target))
            (of_logits,) = torch.autograd.grad(loss, (logits,))
            _apply(adam, self._of_agent_parameters(own, of_logits))
            done += 1

    def next_batch(self) -> int:
        """Return the batch of the next interval, and begin it with a new α.

        Raises:
            ValueError: nothing was learned since the last one: α is as it was drawn, and would choose at random. A
                warm-up does not train it.
        """
        if not self._has_learned:
            raise ValueError("Arbiter has learned nothing since the last interval: call update() in every iteration")
        assert self._alpha is not None
        assert self._logits is not None
        size = int(self.size(self._logits[int(self._alpha.argmax())]))
        self._draw(len(self._logits), self._alpha.device)
        self._has_learned = False
        return max(self.smallest, size // self.unit * self.unit)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` goes on from: tensors and plain values, which later updates leave alone."""
        return {
            "arguments": dict(self._arguments),
            "agent": copy.deepcopy(self.agent.state_dict()),
            "direction": self._direction.detach().clone(),
            "alpha": None if self._alpha is None else self._alpha.detach().clone(),
            "logits": None if self._logits is None else self._logits.clone(),
            "learned": self._has_learned,
            "adam": copy.deepcopy(self._adam.state_dict()),
            "alpha_adam": None if self._alpha_adam is None else copy.deepcopy(self._alpha_adam.state_dict()),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` of an Arbiter with the same arguments returned; `ranks` may be another number.

        Raises:
            ValueError: an Arbiter with other arguments, another agent or number of logits, or a damaged state. Nothing
                was changed then.
        """
        check_state(state, self.state_dict(), [parameter.shape for parameter in (*self._trained, self._direction)])
        self.agent.load_state_dict(state["agent"])
        with torch.no_grad():
            self._direction.copy_(state["direction"])
        _restore(self._adam, state["adam"])
        self._alpha = self._alpha_adam = self._logits = None
        if state["alpha"] is not None:
            self._begin(state["alpha"].to(self._direction.device))
            assert self._alpha_adam is not None
            _restore(self._alpha_adam, state["alpha_adam"])
        if state["logits"] is not None:
            self._logits = state["logits"].to(self._direction.device).clone()
        self._has_learned = state["learned"]
        self._generator.set_state(state["generator"].cpu())

    def _agreed(self, make: Callable[[], torch.Tensor], length: int) -> torch.Tensor:
        """Return the mean over the ranks of what each makes; what one of them raises comes out on all (collective).

        Raises:
            RuntimeError: another rank's `make` raised something.
        """
        failure: Exception | None = None
        try:
            own = make().detach().double()
        except Exception as error:  # here alone perhaps, while the other ranks wait
            failure, own = error, torch.zeros(length, dtype=torch.float64, device=self._direction.device)
        mean = self._average(torch.cat([own, own.new_tensor([float(failure is not None)])]))
        if failure is not None:
            raise failure
        if mean[-1] > 0:
            raise RuntimeError("Arbiter stops on all ranks, since another one raised an error; see there")
        return mean[:-1]

    def _shared_logits(self, inputs: Callable[[], Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's logits, and those that all ranks go on with, their mean (collective)."""
        made: list[torch.Tensor] = []

        def counts() -> torch.Tensor:
            made.append(self._of_agent(inputs()))
            weights = sum(parameter.numel() for parameter in self.agent.parameters())
            trained = sum(parameter.numel() for parameter in self._trainable_now())
            own = torch.tensor([made[0].numel(), weights, trained], dtype=torch.float64, device=self._direction.device)
            return torch.cat([own, own.square()])

        mean, of_squares = self._agreed(counts, 6).split(3)
        if bool((of_squares - mean.square() > _EQUAL * of_squares).any()):
            raise ValueError(
                "the ranks' agents differ: all must make as many logits, and have as many parameters, of which as many "
                f"are trained; here are {made[0].numel()} logits"
            )
        (own,) = made
        logits = self._average(own.detach().double()).to(torch.promote_types(own.dtype, torch.float32))
        if not bool(logits.isfinite().all()):
            raise ValueError("the agent's logits are not finite: nothing learned")
        return own, logits.requires_grad_()

    def _trainable_now(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._trained if parameter.requires_grad]

    def _of_agent(self, inputs: Any) -> torch.Tensor:
        made = self.agent(inputs)
        if made.dim() != 2 or not made.numel():
            raise ValueError(f"the agent must make logits of shape (batch, samples), got {tuple(made.shape)}")
        if not made.requires_grad:
            raise ValueError("the agent's logits depend on no parameter that is trained: it must not detach them")
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

    @torch.inference_mode(False)
    def _begin(self, alpha: torch.Tensor) -> None:
        self._alpha = nn.Parameter(alpha.clone())
        lr, weight_decay = self._arguments["alpha_lr"], self._arguments["alpha_weight_decay"]
        self._alpha_adam = torch.optim.Adam([self._alpha], lr=lr, weight_decay=weight_decay)

    def _check(self, features: torch.Tensor, labels: torch.Tensor, rows: int) -> None:
        if features.shape != (rows, len(self._direction)) or labels.shape != (rows,):
            raise ValueError(
                f"validation must return {rows} features of width {len(self._direction)} and as many labels, got "
                f"shapes {tuple(features.shape)} and {tuple(labels.shape)}"
            )

    def _of_agent_parameters(self, own: torch.Tensor, of_logits: torch.Tensor) -> list[torch.Tensor | None]:
        """Return the gradient of the agent's parameters, over all ranks, given that of the averaged logits.

        Parameters that were frozen since the beginning have None, and stay.
        """
        parameters = self._trainable_now()

        def gradients() -> torch.Tensor:
            made = torch.autograd.grad(own, parameters, of_logits.to(own.dtype), allow_unused=True)
            whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, made, strict=True)]
            return torch.cat([gradient.reshape(-1) for gradient in whole])

        sizes = [parameter.numel() for parameter in parameters]
        parts = iter(self._agreed(gradients, sum(sizes)).split(sizes))
        return [next(parts).view_as(parameter) if parameter.requires_grad else None for parameter in self._trained]

    def _require_alike(self) -> None:
        """Check that all ranks begin with one agent and one seed; all of them hear of it if not."""
        weights = [*self.agent.parameters(), self._direction]
        own = torch.cat([weight.detach().double().reshape(-1) for weight in weights])
        apart = (self._average(own.clone()) - own).abs().max() / own.abs().max().clamp(min=1e-30)
        if float(self._average(apart.reshape(1))) > _ALIKE:
            raise ValueError(
                "the ranks begin with different agents, or another `seed`: seed them alike, or broadcast the first "
                "rank's agent"
            )


def _trainable(agent: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require gradients.

    Raises:
        ValueError: there are none, or some have 16 bits, in which steps of a small rate are lost.
    """
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("the agent has no parameter that requires gradients: nothing of it could learn")
    for parameter in trained:
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the agent's trained parameters must be float32 or float64, got {parameter.dtype}, in which Arbiter's "
                "small steps are lost: give it as agent.float()"
            )
    return trained


def _plain(values: torch.Tensor) -> torch.Tensor:
    """Return a tensor that autograd takes as data, wherever it was made."""
    return values.clone() if values.is_inference() else values.detach()


def _restore(adam: torch.optim.Adam, state: Mapping[str, Any]) -> None:
    """Load moments and counts; rates are the Arbiter's arguments."""
    moments = copy.deepcopy(state["state"])
    adam.load_state_dict({"state": moments, "param_groups": adam.state_dict()["param_groups"]})


def _apply(adam: torch.optim.Adam, gradients: Iterable[torch.Tensor | None]) -> None:
    """Step the optimizer's parameters along these gradients; their own `.grad` is nobody else's."""
    parameters = adam.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
    adam.step()
    adam.zero_grad()
