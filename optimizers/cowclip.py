"""CowClip: Adam whose embedding gradients are clipped row by row (Zheng et al. 2022, arXiv 2204.06240)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import Unpack

from .formulas.chunk_view import ChunkView
from .formulas.chunks import Summand, squares
from .formulas.hyperparameters import check_choice, check_flag, check_range
from .formulas.layer_table import LayerTable
from .formulas.stages import Stage, sums_over_layers, sums_over_rows
from .gradient_statistics.lookups import IdCounts, LookupHook
from .layerwise import LayerwiseAdam
from .options.common import CommonOptions
from .sharding.layout import Layer, Layout

__all__ = ["CowClip", "CowClipSettings", "clip_threshold", "scale_cowclip"]

THRESHOLDS = ("code", "paper")


class CowClip(LayerwiseAdam):
    r"""Adam with adaptive column-wise clipping of embeddings, by how often each id occurs in the global batch.

    For row c of an embedding in a group with ``cowclip=True``, looked up n_c times in the global batch (n_c = 1 for
    ids that do not occur), with D columns and d_c = g_c + λw_c:

        threshold_c = r · n_c · max(‖w_c‖, r√D·ζ)        d_c ← d_c · min(1, threshold_c / ‖d_c‖)

    (a "column" of the paper is what PyTorch calls a row), and then Adam for all layers:

        m ← β₁m + (1-β₁)d     v ← β₂v + (1-β₂)d²     w ← w - lr · m̂ / (√v̂ + ε)

    Parameters of other groups are not clipped: that is Adam with coupled L2. Rows that do not occur still decay where
    λ > 0, as long as their layer has any gradient.

    n_c must be counted: call ``optimizer.count_lookups(model)`` once, or ``optimizer.count_ids(parameter, ids)`` for
    every micro-batch. Counts are added over micro-batches and over data-parallel ranks (DDP, DeepSpeed stages 0 to 3).

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate ≥ 0; a float or a tensor.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε ≥ 0, outside the root.
        weight_decay: λ ≥ 0, added to the gradient as λw before it is clipped. The authors' l2 is a factor of w², so
            their 1e-5 is λ = 2e-5 here.
        ratio: r > 0.
        zeta: ζ ≥ 0; keeps rows whose weights are near zero trainable.
        threshold: "code" as above, or "paper": n_c · max(r‖w_c‖, ζ).
        cowclip: Whether the rows of these parameters, then all of two dimensions, are clipped. Mostly a group option.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range, or at the first step if a parameter with ``cowclip=True`` has not
            two dimensions.
        RuntimeError: On every rank, if an embedding has a gradient but none of its lookups were counted.

    State: ``exp_avg``, ``exp_avg_sq`` (per element), ``step``. Sums per step: ‖g‖² per layer, and ‖w_c‖², ‖d_c‖²
    of those rows alone that a shard boundary cuts (at most ranks - 1 per layer): one all-reduce if sharded. Counts: one
    all-reduce of 4 bytes per embedding row, 1/D of the fp32 gradient's, in each `step()` call that has embeddings.

    Under a wrapper that clips gradients itself (DeepSpeed's ``gradient_clipping``, 1.0 by default) that comes first;
    set it to 0 to have this clipping alone.

    Source: the authors' code (bytedance/LargeBatchCTR, clip.py and train.py), which clips the factor embeddings, not
    the one-column "linear" ones. Its Adam is Keras's, with ε = 1e-7 inside the correction. The paper's threshold is
    quoted from memory and unverified.
    """

    vector_options = ("lr", "weight_decay", "adapt")

    refused_options: ClassVar[Mapping[str, str]] = {
        "update_clip": "most rows of an embedding have no gradient in a step, so that a mean over the table says "
        "nothing of the others"
    }

    plan_options = (*LayerwiseAdam.plan_options, "cowclip")

    _counts: IdCounts
    _clipped: WeakIdKeyDictionary

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ratio: float = 1.0,
        zeta: float = 1e-5,
        threshold: str = "code",
        cowclip: bool = False,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "ratio": ratio,
                "zeta": zeta,
                "threshold": threshold,
                "cowclip": cowclip,
            },
            **common,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        check_range("ratio", group["ratio"], 0.0, low_open=True)
        check_range("zeta", group["zeta"], 0.0)
        check_choice("threshold", group["threshold"], THRESHOLDS)
        check_flag("cowclip", group["cowclip"])

    # Counting ids ---------------------------------------------------------------------------------------------------

    def count_ids(self, parameter: torch.Tensor | str, ids: torch.Tensor) -> None:
        """Note the ids that one micro-batch of this rank looks up in an embedding.

        Args:
            parameter: The embedding's weight, or its name if named parameters were given.
            ids: Integers of any shape, repeated as often as they are looked up.

        Raises:
            ValueError: If the parameter is not in a group with ``cowclip=True``, or the ids are no integers.
        """
        embeddings = self._clipped_parameters()
        clipped = {self.parameter_name(weight): weight for weight in embeddings}
        weight = clipped.get(parameter) if isinstance(parameter, str) else parameter
        if weight is None or weight not in embeddings:
            described = repr(parameter) if isinstance(parameter, str) else f"a tensor of shape {tuple(parameter.shape)}"
            known = ", ".join(name for name in clipped if name) or "known by their tensors, not by names"
            raise ValueError(f"parameter must be in a group with cowclip=True ({known}), got {described}")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"ids must be integers, got {ids.dtype}")
        self._counts.add(weight, ids)

    def count_lookups(self, model: torch.nn.Module) -> list[RemovableHandle]:
        """Count by itself, from now on, the ids that the model's embedding modules look up.

        Hooks every ``nn.Embedding`` and ``nn.EmbeddingBag`` whose weight is in a group with ``cowclip=True``. A lookup
        counts when the gradient of its output is computed; hence also with accumulation, activation checkpointing and
        under any wrapper. Call it before or after wrapping, with the bare or the wrapped model; another call for the
        same module takes the place of the one before.

        Returns:
            Handles whose ``remove()`` ends the counting.

        Raises:
            ValueError: If the model has no such module.
        """
        clipped = self._clipped_parameters()
        embeddings = [
            module
            for module in model.modules()
            if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.weight in clipped
        ]
        if not embeddings:
            raise ValueError("the model has no nn.Embedding or nn.EmbeddingBag with a weight in a cowclip=True group")
        for module in embeddings:
            if module in self._counting:
                self._counting[module].remove()
            hook = LookupHook(self._counts, module.weight)
            self._counting[module] = module.register_forward_hook(hook, with_kwargs=True)
        return [self._counting[module] for module in embeddings]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them the counts that belong to them."""
        super().zero_grad(set_to_none)
        self._counts.forget()

    def _forget(self) -> None:
        super()._forget()
        self._counts = IdCounts(self)
        self._clipped = WeakIdKeyDictionary()
        self._counting: WeakKeyDictionary[torch.nn.Module, RemovableHandle] = WeakKeyDictionary()

    def _remember(self, group: dict[str, Any]) -> None:
        super()._remember(group)
        if group["cowclip"]:
            self._clipped.update(WeakIdKeyDictionary(dict.fromkeys(group["params"], True)))

    def _clipped_parameters(self) -> WeakIdKeyDictionary:
        """The parameters whose groups have ``cowclip=True``, the ones that a wrapper has taken out of them too."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not group["cowclip"]:
                    self._clipped.pop(parameter, None)
                elif self.was_given(parameter):
                    self._clipped[parameter] = True
        return self._clipped

    # The step -------------------------------------------------------------------------------------------------------

    def check_layout(self, layout: Layout) -> None:
        embeddings = self._embeddings(layout)
        if len({id(layer.parameter) for layer in embeddings}) < len(embeddings):
            raise ValueError("cowclip=True clips the rows of whole embeddings: leave out segments in such groups")
        for layer in embeddings:
            if len(layer.shape) != 2:
                raise ValueError(
                    f"cowclip=True needs parameters of two dimensions (ids x columns), got {layer.name} of shape "
                    f"{layer.shape}: put it into a group with cowclip=False"
                )

    def _embeddings(self, layout: Layout) -> list[Layer]:
        groups = self.param_groups
        return [layer for layer in layout.layers if groups[layout.groups[layer.tensor]]["cowclip"]]

    def has_rows(self, group: dict[str, Any]) -> bool:
        return bool(group["cowclip"])

    def before_stages(self, layout: Layout) -> None:
        embeddings = self._embeddings(layout)
        if not embeddings:
            return
        counts, noted = self._counts.take(layout, embeddings)
        self._of_layer = {layer: (n, here) for layer, n, here in zip(embeddings, counts, noted, strict=True)}

    def accumulates(self, group: dict[str, Any]) -> str | None:
        return "gradient + decay"

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        layers.step = layers.step + 1
        beta1, beta2 = group["betas"]
        layers.correction1 = 1 - beta1**layers.step
        layers.correction2 = 1 - beta2**layers.step
        if not group["cowclip"]:
            yield self.norms
            return
        yield self.row_norms
        self._check_counted(layers)
        layers.clip = self.clip_factors(group, layers)

    @sums_over_layers("g")
    def norms(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> tuple[Summand, ...]:
        return (squares(x.g),)

    @sums_over_rows("w", "d")
    @sums_over_layers("g")
    def row_norms(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> tuple[Summand, ...]:
        return squares(x.g), squares(x.w), squares(self.decayed(group, x))

    def decayed(self, group: dict[str, Any], x: ChunkView) -> torch.Tensor:
        """The gradient with its L2 term, g + λw."""
        return x.plus(x.g, x.w, group["weight_decay"])

    def clip_factors(self, group: dict[str, Any], layers: LayerTable) -> torch.Tensor:
        """min(1, threshold / ‖d‖) of each row that this rank holds."""
        assert layers.rows is not None
        runs = [(layer, run) for layer, run in zip(layers.layers, layers.rows.runs.values(), strict=True)]
        counts = torch.cat([self._of_layer[layer][0][run.first : run.first + run.count] for layer, run in runs])
        widths = torch.cat([torch.full((run.count,), run.width, device=counts.device) for _, run in runs])
        bound = clip_threshold(
            layers.row_norm("w"), counts, widths, group["ratio"], group["zeta"], form=group["threshold"]
        )
        d_norm = layers.row_norm("d")
        return torch.where(d_norm > bound, bound / d_norm, torch.ones_like(d_norm))

    def _check_counted(self, layers: LayerTable) -> None:
        # Ranks with lookups need not ask. Where no rank has any, all ask, and all get the same answer.
        doubtful = [i for i, layer in enumerate(layers.layers) if not self._of_layer[layer][1]]
        if not doubtful:
            return
        has_gradient = layers.has_gradient().tolist()
        missing = [
            layers.layers[i].name for i in doubtful if has_gradient[i] and not self._of_layer[layers.layers[i]][0].any()
        ]
        if missing:
            raise RuntimeError(
                f"no ids were counted for the step of {', '.join(missing)}: call optimizer.count_lookups(model) once, "
                "or optimizer.count_ids(parameter, ids) for each micro-batch before step(). Counts are cleared by "
                "step() and zero_grad()"
            )

    def change(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> torch.Tensor:
        """W's decrease, with both moments updated in place."""
        beta1, beta2 = group["betas"]
        d = self.decayed(group, x)
        if group["cowclip"]:
            d.mul_(x.of_rows(layers.clip))
        x.exp_avg.mul_(beta1).add_(d, alpha=1 - beta1)
        x.exp_avg_sq.mul_(beta2).addcmul_(d, d, value=1 - beta2)
        m, v = x.kept("exp_avg"), x.kept("exp_avg_sq")
        denominator = (v / x.of(layers.correction2)).sqrt_().add_(group["eps"])
        return (m / x.of(layers.correction1)).div_(denominator).mul_(x.of(group["lr"] * layers.trust_ratio))


def clip_threshold(
    w_norm: torch.Tensor,
    counts: torch.Tensor,
    width: int | torch.Tensor,
    ratio: float = 1.0,
    zeta: float = 1e-5,
    form: str = "code",
) -> torch.Tensor:
    """The largest norm that CowClip leaves a row's gradient.

    Args:
        w_norm: ‖w_c‖ of each row.
        counts: n_c of each row; 0 counts as 1.
        width: Columns of the embedding.
        ratio: r.
        zeta: ζ.
        form: "code": r·n·max(‖w‖, r√D·ζ); "paper": n·max(r‖w‖, ζ), unverified.
    """
    n = counts.clamp(min=1).to(w_norm.dtype)
    if form == "paper":
        return n * (ratio * w_norm).clamp(min=zeta)
    root = width.to(w_norm.dtype).sqrt() if isinstance(width, torch.Tensor) else math.sqrt(width)
    return ratio * n * w_norm.clamp(min=ratio * zeta * root)


class CowClipSettings(NamedTuple):
    """The three hyper-parameters that CowClip's scaling rule concerns."""

    embedding_lr: float
    dense_lr: float
    weight_decay: float


def scale_cowclip(base: CowClipSettings, base_batch: int, batch: int) -> CowClipSettings:
    """The paper's scaling rule: from tuned settings at one batch size to another.

    The embeddings' learning rate stays, the dense layers' grows with √(batch / base_batch), the embeddings' L2 with
    batch / base_batch; ζ stays. The authors warm up the dense learning rate linearly over the first epoch, and
    initialise embeddings with standard deviation 1e-2 (bytedance/LargeBatchCTR, README).

    Args:
        base: Settings that work at `base_batch`.
        base_batch: Samples per step there.
        batch: Samples per step to scale to.
    """
    for name, value in (("base_batch", base_batch), ("batch", batch)):
        check_range(name, value, 1)
    factor = batch / base_batch
    return CowClipSettings(base.embedding_lr, base.dense_lr * factor**0.5, base.weight_decay * factor)
