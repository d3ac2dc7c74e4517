"""Compares what the ranks recorded with what one process does, and says what is wrong in sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from trustratio.optimizers.sharding.layout import listing

from .configurations import Configuration
from .errors import CannotAudit
from .neighbours import IN_NORMS, without_neighbours
from .reference import Alone
from .subject import Subject
from .training import CHECKPOINT, PADDING, Recorded, Weights

__all__ = ["BOUND", "EXACT", "REFUSED", "WRONG", "AuditedLayer", "Finding", "Report", "judge", "refusal"]

BOUND = 2e-6
"""Largest error of a layer's movement, relative to its path, beside the rounding of its weights."""

COARSE = 0.01
"""Where rounding explains a larger error than this, a layer that agrees says nothing."""

PADDING_HOLDS = "elements that no layer owns are large or NaN"

EXACT, WRONG, REFUSED = "exact", "wrong", "refused"
STATUSES = {EXACT: 0, WRONG: 1, REFUSED: 2}


@dataclass(frozen=True)
class AuditedLayer:
    """One layer after the last step, sharded and in one process.

    Attributes:
        name: Its name in the model.
        shape: Its shape.
        moved: ‖w - w0‖ sharded over the same in one process; 1 is right, NaN if neither moved, or if nothing moved in
            one process and no gradient asked for it.
        error: ‖w sharded - w alone‖ over the length of the path of one process; NaN if anything is not finite, or
            where sharding alone moves a layer without gradient.
        bound: The largest error that rounding explains.
        weight_norm: ‖w‖ (L2), sharded.
        weight_norm_alone: The same in one process.
        change: ‖w - w0‖, sharded.
        change_alone: The same in one process.
        has_gradient: Whether it gets one. Of others nothing is demanded.
    """

    name: str
    shape: tuple[int, ...]
    moved: float
    error: float
    bound: float
    weight_norm: float
    weight_norm_alone: float
    change: float
    change_alone: float
    has_gradient: bool

    @property
    def is_exact(self) -> bool:
        """Whether one process moves the layer so, or nobody asks."""
        return not self.has_gradient or self.error <= self.bound

    @property
    def factor(self) -> float:
        """By how much too far or too little it moved, at least 1; infinite if it did not move, or not at all alone."""
        if not self.moved > 0 or math.isinf(self.moved):
            return math.nan if math.isnan(self.moved) and self.change_alone else math.inf
        return max(self.moved, 1 / self.moved)


@dataclass(frozen=True)
class Finding:
    """Something that a check found.

    Attributes:
        kind: One word or two for programs, e.g. "padding read".
        text: The sentence.
        is_wrong: Whether training goes wrong by it; else it is good to know.
    """

    kind: str
    text: str
    is_wrong: bool = True


@dataclass(frozen=True)
class Report:
    """The outcome of one audit.

    Attributes:
        optimizer: What was audited.
        configuration: How it was sharded.
        ranks: Over how many processes.
        verdict: "exact", "wrong" or "refused".
        sentence: The verdict for people.
        layers: In the model's order.
        findings: What the checks found.
        collectives: In `optimizer.step` in one step.
        state_bytes_per_parameter: Of all ranks.
        state_bytes_per_parameter_alone: Of one process.
        notes: What was filled in or left out of the configuration.
        versions: Of the packages that took part.
        steps: After how many of them layers were compared; None: none were.
    """

    optimizer: str
    configuration: str
    ranks: int
    verdict: str
    sentence: str
    layers: tuple[AuditedLayer, ...] = ()
    findings: tuple[Finding, ...] = ()
    collectives: int | None = None
    state_bytes_per_parameter: float | None = None
    state_bytes_per_parameter_alone: float | None = None
    notes: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    steps: int | None = None

    @property
    def status(self) -> int:
        """The command's exit status: 0 exact, 1 wrong, 2 could not be run."""
        return STATUSES[self.verdict]

    @property
    def worst(self) -> AuditedLayer | None:
        """The layer with the largest error, a NaN before all others; None if there is none with a gradient."""
        layers = [layer for layer in self.layers if layer.has_gradient]
        return max(layers, key=lambda layer: math.inf if math.isnan(layer.error) else layer.error, default=None)

    def record(self) -> dict[str, Any]:
        """As one JSON object, whose numbers are finite or null."""
        return _finite({**asdict(self), "status": self.status})


def refusal(subject: Subject, configuration: Configuration, ranks: int, reason: str) -> Report:
    """The report of an audit that a wrapper or the optimizer refused."""
    return Report(subject.title, configuration.title, ranks, REFUSED, reason, notes=configuration.notes)


def judge(
    subject: Subject,
    configuration: Configuration,
    alone: Alone,
    answers: Sequence[Recorded],
    failed: Mapping[str, str],
) -> Report:
    """Compare, and say what is wrong, beside the errors of checks that `failed`.

    Raises:
        CannotAudit: If rounding hides whatever there may be.
    """
    weights = _whole(alone, [answer.weights for answer in answers])
    layers = tuple(_layer(name, alone, weights[name]) for name in alone.weights)
    findings = tuple(_findings(configuration, alone, answers, failed, layers, weights))
    wrong = [layer for layer in layers if not layer.is_exact]
    coarse = [layer.name for layer in layers if layer.has_gradient and layer.bound > COARSE]
    if coarse and not wrong:
        in_fp32 = "the model in fp32" if configuration.keeps_masters else "it without bf16_master_weights_and_grads"
        raise CannotAudit(
            f"the weights are rounded so coarsely beside their movement ({listing(coarse)}) that it cannot be told "
            f"from that of one process: audit {in_fp32}, or with a larger lr"
        )
    verdict = WRONG if wrong or any(finding.is_wrong for finding in findings) else EXACT
    parameters, steps = alone.parameters, len(answers[0].scheduled)
    return Report(
        optimizer=subject.title,
        configuration=configuration.title,
        ranks=len(answers),
        verdict=verdict,
        sentence=_sentence(configuration, len(answers), steps, layers, findings),
        steps=steps,
        layers=layers,
        findings=findings,
        collectives=answers[0].collectives,
        state_bytes_per_parameter=sum(answer.state_bytes for answer in answers) / parameters,
        state_bytes_per_parameter_alone=alone.state_bytes / parameters,
        notes=configuration.notes,
    )


def _layer(name: str, alone: Alone, weights: torch.Tensor) -> AuditedLayer:
    wanted, between = alone.weights[name], alone.rounded.get(name)
    if between is not None:
        wanted = wanted.to(weights.dtype)  # where the ranks could not tell sums
    before, reference, found = alone.before[name].double(), wanted.double(), weights.double()
    change, change_alone = float((found - before).norm()), float((reference - before).norm())
    path = alone.paths[name]
    # Two ways to the same number may end in neighbours of it.
    resolution = max(torch.finfo(one.dtype).eps for one in (weights, wanted))
    rounding = resolution * float(reference.norm()) if between is None else 0.0
    apart = (found - reference).abs()
    if alone.has_coarse_state or between is not None:
        apart = without_neighbours(apart, path, None if between is None else 2 * between * reference.abs())
        rounding += IN_NORMS * path
    distance = float(apart.norm())
    has_gradient = name not in alone.without_gradient
    return AuditedLayer(
        name=name,
        shape=tuple(reference.shape),
        moved=change / change_alone if change_alone else (math.inf if change and has_gradient else math.nan),
        error=distance / path if path else (0.0 if distance == 0 else math.inf if has_gradient else math.nan),
        bound=BOUND + (rounding / path if path else 0.0),
        weight_norm=float(found.norm()),
        weight_norm_alone=float(reference.norm()),
        change=change,
        change_alone=change_alone,
        has_gradient=has_gradient,
    )


def _whole(alone: Alone, of_ranks: Sequence[Weights | None]) -> dict[str, torch.Tensor]:
    """The layers, put together from what the ranks tell of them; none, if they have not come so far."""
    if any(told is None for told in of_ranks):
        return {}
    # Of what several ranks hold, the first one's.
    parts = [(n, part) for told in reversed(of_ranks) for n, of_layer in (told or {}).items() for part in of_layer]
    dtypes = {name: values.dtype for name, (_, values) in parts}
    whole = {n: torch.full((w.numel(),), math.nan, dtype=dtypes.get(n), device="cpu") for n, w in alone.weights.items()}
    for name, (offset, values) in parts:
        if name in whole:
            whole[name][offset : offset + len(values)] = values
    return {name: flat.view(alone.weights[name].shape) for name, flat in whole.items()}


# The checks ---------------------------------------------------------------------------------------------------------


def _findings(
    configuration: Configuration,
    alone: Alone,
    answers: Sequence[Recorded],
    failed: Mapping[str, str],
    layers: Sequence[AuditedLayer],
    weights: dict[str, torch.Tensor],
) -> Iterator[Finding]:
    recorded = answers[0]
    if recorded.replaced_by is not None:
        yield Finding("replaced", f"{recorded.replaced_by} stepped in the place of the optimizer that was given")
    if recorded.early:
        yield Finding(
            "stepped early",
            f"{configuration.title} steps the optimizer with gradients of zeros {recorded.early} time"
            f"{'s' * (recorded.early > 1)} as it is set up, which decays weights and puts step counts ahead; one "
            "process did the same here",
            is_wrong=False,
        )
    yield from _rates(recorded)
    broken = [layer.name for layer in layers if not math.isfinite(layer.weight_norm)]
    if broken:
        yield Finding("not finite", f"NaN or infinite: {listing(broken)}")
    yield from _movement(alone, layers)
    yield from _numbers(configuration, alone, answers)
    yield from _counted(configuration, alone)
    if not broken:
        yield from _copies(alone, [answer.weights for answer in answers], "in training")
        yield from _copies(alone, [answer.resumed for answer in answers], "after a checkpoint")
        continued = _whole(alone, [answer.continued for answer in answers])
        resumed = _whole(alone, [answer.resumed for answer in answers])
        lost = _differing(alone, continued, resumed)
        # Whose checkpoint loses state does not take the same steps twice; then NaN alone tells.
        poisoned = _whole(alone, [answer.poisoned for answer in answers])
        yield from _padding(alone, {} if lost else resumed, poisoned)
        yield from _silence(alone, _whole(alone, [answer.after_silence for answer in answers]))
        yield from _checkpoint(configuration, alone, recorded, lost)
    if PADDING in failed:
        yield Finding("padding read", f"steps fail once {PADDING_HOLDS}: {failed[PADDING]}")
    if CHECKPOINT in failed:
        yield Finding(
            "checkpoint fails",
            f"no checkpoint could be written and read again: {_said(configuration, failed[CHECKPOINT])}",
        )


def _said(configuration: Configuration, reason: str) -> str:
    """The error of a checkpoint, with whose it is and why, where that is known."""
    if configuration.wrapper == "fsdp1" and "is not in the optimizer state" in reason:
        return f"torch's FSDP1 says, where the optimizer was not given all layers, {reason}"
    if configuration.zero_stage == 3 and "parameter group that doesn't match the size" in reason:
        return f"DeepSpeed says, whose ZeRO-3 does not load again what it has made anew, as torch's Adagrad, {reason}"
    if configuration.zero_stage and re.fullmatch(r"KeyError: \d+ \(optimizer\.py:\d+\)", reason):
        return f"{reason}: ZeRO steps other parameters than those that it made state for. Make state in step()"
    return reason


def _rates(recorded: Recorded) -> Iterator[Finding]:
    given, peaks = recorded.given_rates, recorded.peak_rates
    if peaks is not None and not all(any(math.isclose(peak, rate, rel_tol=1e-6) for rate in given) for peak in peaks):
        yield Finding(
            "rates overwritten",
            f"the scheduler section trains with a peak learning rate of {peaks[0]:g}, and the optimizer was given "
            f"{given[0]:g}: write the same in both, or remove the section",
        )


def _numbers(configuration: Configuration, alone: Alone, answers: Sequence[Recorded]) -> Iterator[Finding]:
    """What steps have changed in groups: counts, and estimates that steps to come will depend on."""
    began, ended = alone.numbers
    if any(len(answer.numbers) != len(ended) for answer in answers):
        return  # the wrapper has made groups of its own
    changed = [
        (index, name) for index, group in enumerate(ended) for name in group if group[name] != began[index].get(name)
    ]
    for index, name in changed:
        wanted = ended[index][name]
        for rank, answer in enumerate(answers):
            found = answer.numbers[index].get(name, math.nan)
            if not math.isclose(found, wanted, rel_tol=1e-4, abs_tol=1e-30):
                yield Finding(
                    "groups differ",
                    f'its group keeps "{name}", which is {found:g} on rank {rank} and {wanted:g} in one process, so '
                    "that steps to come go elsewhere",
                )
                return
    if changed and configuration.zero_stage == 3:
        yield Finding(
            "counts in groups",
            f"steps change numbers in its groups ({listing(sorted({name for _, name in changed}))}), and ZeRO-3 "
            "calls step() once per group and per sub_group_size elements, each time with all groups, so that a count "
            "of calls would run ahead where there are several. Audit it with a sub_group_size that is a part of the "
            "model, too",
            is_wrong=False,
        )


def _counted(configuration: Configuration, alone: Alone) -> Iterator[Finding]:
    """What steps have changed elsewhere, which more calls of step() would change more often."""
    if not alone.counted or configuration.zero_stage == 0:
        return
    calls, remedy = "ZeRO-1 and 2 call step() once per group", "with the groups that you train"
    if configuration.zero_stage == 3:
        calls = "ZeRO-3 calls step() once per group and per sub_group_size elements"
        remedy += ", and a sub_group_size that is a part of the model"
    yield Finding(
        "counts outside groups",
        f"steps change numbers that it keeps for all groups together ({listing(alone.counted)}), and {calls}, so "
        f"that a count of calls would run ahead where there are several. Audit it {remedy}, too",
        is_wrong=False,
    )


def _movement(alone: Alone, layers: Sequence[AuditedLayer]) -> Iterator[Finding]:
    stuck = [one.name for one in layers if one.has_gradient and one.change == 0 and one.change_alone > 0]
    if stuck:
        yield Finding("never moved", f"these have a gradient and never moved: {listing(stuck)}")
    left_out = [one.name for one in layers if one.name in alone.left_out]
    if left_out:
        yield Finding("left out", f"the optimizer was not given {listing(left_out)}", is_wrong=False)
    idle = [
        one.name
        for one in layers
        if one.has_gradient and one.change == one.change_alone == 0 and one.name not in alone.left_out
    ]
    if idle:
        yield Finding("idle", f"these do not move in one process either: {listing(idle)}", is_wrong=False)
    drifted = [one.name for one in layers if not one.has_gradient and one.change != one.change_alone]
    if drifted:
        yield Finding(
            "without gradient",
            f"no gradient reaches {listing(drifted)}, which one process leaves as it is; here it moved, as the wrapper "
            "hands the optimizer zeros, and weights decay all the same",
            is_wrong=False,
        )


def _padding(alone: Alone, clean: dict[str, torch.Tensor], poisoned: dict[str, torch.Tensor]) -> Iterator[Finding]:
    """The same steps from the same checkpoint, once with zeros and once with something else in the padding."""
    if _differing(alone, clean, poisoned) or not all(bool(weights.isfinite().all()) for weights in poisoned.values()):
        yield Finding(
            "padding read",
            f"steps change once {PADDING_HOLDS}: norms, or whatever is taken over whole tensors, include padding, "
            "which may hold anything",
        )


def _differing(alone: Alone, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Layers that two runs of the same steps leave elsewhere."""
    differing = []
    for name in one.keys() & other.keys() - alone.without_gradient:
        distance = float((one[name].double() - other[name].double()).norm())
        rounding = torch.finfo(torch.float32).eps * float(one[name].double().norm())
        if not distance <= BOUND * alone.paths[name] + rounding:
            differing.append(name)
    return sorted(differing)


def _copies(alone: Alone, of_ranks: Sequence[Weights | None], when: str) -> Iterator[Finding]:
    """What several ranks hold has to be the same on all of them."""
    whole = _whole(alone, of_ranks)
    apart: set[str] = set()
    for told in of_ranks if whole else ():
        for name in (told or {}).keys() & whole.keys():
            for offset, values in (told or {})[name]:
                first = whole[name].reshape(-1)[offset : offset + len(values)]
                if _differing(alone, {name: first}, {name: values}):
                    apart.add(name)
    if apart:
        yield Finding("ranks differ", f"{when} the ranks' copies drift apart: {listing(sorted(apart))}")


def _silence(alone: Alone, silent: dict[str, torch.Tensor]) -> Iterator[Finding]:
    """Decay alone moves layers in a step whose gradients are zero."""
    lost, unasked = [], []
    for name, weights in silent.items():
        before = alone.before_silence[name]
        expected = not torch.equal(alone.after_silence[name].to(weights.dtype), before.to(weights.dtype))
        moved = not torch.equal(weights, before.to(weights.dtype))
        if expected and not moved:
            lost.append(name)
        elif moved and not expected and name not in alone.without_gradient:
            unasked.append(name)
    if lost:
        yield Finding("decay lost", f"weight decay does not reach {listing(lost)}, which decays in one process")
    if unasked:
        yield Finding(
            "decay added", f"without a gradient, {listing(unasked)} moves, and one process leaves it as it is"
        )


def _checkpoint(
    configuration: Configuration, alone: Alone, recorded: Recorded, lost: Sequence[str]
) -> Iterator[Finding]:
    unsaved = [name for name in lost if name in alone.left_out and configuration.zero_stage == 3]
    if unsaved:
        yield Finding(
            "checkpoint leaves out",
            f"DeepSpeed's checkpoints of ZeRO-3 hold no trainable layer that the optimizer was not given: "
            f"{listing(unsaved)} come back as the model is made. Freeze them (requires_grad_(False)), or give them to "
            "the optimizer",
        )
    lost = [name for name in lost if name not in unsaved]
    if lost:
        text = f"training that goes on from a checkpoint goes elsewhere: {listing(lost)}"
        strided = [name for name in lost if not alone.before[name].is_contiguous()]
        if strided and configuration.wrapper == "fsdp1":
            text += (
                f". Of {listing(strided)} that is torch's doing: FSDP1 loads the state of weights that are not "
                "contiguous, as channels_last makes them, in another order than it was saved in. Make them contiguous"
            )
        yield Finding("checkpoint loses state", text)
    if recorded.resumed_options:
        changed = _changes(recorded.resumed_options)
        yield Finding("checkpoint changes options", f"after a checkpoint, options differ: {changed}")
    if recorded.saved_options:
        yield Finding(
            "saving changes options",
            f"writing a checkpoint changes options, as where the wrapper steps an optimizer without state to have "
            f"some to write: {_changes(recorded.saved_options)}",
            is_wrong=False,
        )


def _changes(options: Sequence[tuple[str, str, str]]) -> str:
    return listing([f"{name} {before} became {after}" for name, before, after in options])


# The verdict --------------------------------------------------------------------------------------------------------


def _sentence(
    configuration: Configuration,
    ranks: int,
    steps: int,
    layers: Sequence[AuditedLayer],
    findings: Sequence[Finding],
) -> str:
    where = f"{configuration.title} on {ranks} rank{'s' * (ranks > 1)}"
    wrong = [layer for layer in layers if not layer.is_exact]
    others = "; ".join(finding.text for finding in findings if finding.is_wrong)
    if not wrong:
        exact = f"under {where} every layer goes in {steps} steps where one process takes it"
        return f"Wrong: {exact}, but {others}." if others else f"Exact: {exact}."
    worst = max(wrong, key=lambda layer: math.inf if math.isnan(layer.error) else layer.error)
    how = f"{len(wrong)} of {len(layers)} layers do not go in {steps} steps where one process takes them"
    if math.isfinite(worst.moved) and worst.moved > 0:
        how += f", {worst.name} moved {worst.moved:.4g} times as far as it should"
        how += f" (error {worst.error:.2g})" if abs(worst.moved - 1) < 0.01 else ""
    return f"Wrong: under {where} {how}" + (f"; {others}." if others else ".")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value
