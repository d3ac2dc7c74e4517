"""What runs inside the workers to test statistics of group gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from trustratio.optimizers import create_optimizer
from trustratio.optimizers.gradient_statistics import squares
from trustratio.optimizers.gradient_statistics.watch import GradientStatistics

from .cases import Case, CaseRun, gathered, run_case


def run_norms(case: Case) -> list[dict[str, tuple[float, ...]]]:
    """Train the case with group norms switched on after the model was wrapped; the norms of each step."""
    run = CaseRun(case)
    try:
        run.optimizer.collect_group_norms()  # type: ignore[attr-defined]
        found = []
        for step in range(case.steps):
            run.train(step, step + 1)
            norms = run.optimizer.statistics.norms()  # type: ignore[attr-defined]
            found.append({name: (n.groups, n.mean_norm, n.mean_square, n.square_of_mean) for name, n in norms.items()})
        return found
    finally:
        run.close()


class Traffic:
    """Measures what statistics hold and send.

    Attributes:
        sent: Elements given to collectives of squares, per optimizer step.
        calls: Those collectives.
        whole: Most elements of squares kept at the layers' own size, at any gradient.
        partitions: Elements of the rank's partitions of squares.
        staged: Most elements waiting in buckets, at any gradient, and what packing them took besides.
    """

    def __init__(self) -> None:
        self.sent = self.calls = self.whole = self.partitions = self.staged = 0

    def look(self, group_statistics: Any) -> None:
        watched = group_statistics._watched.values()
        self.whole = max(self.whole, sum(0 if w.squares is None else w.squares.numel() for w in watched))
        of_elements = group_statistics._squares
        if of_elements is None:
            return
        self.partitions = max(self.partitions, sum(p.numel() for p in of_elements.partitions.values()))
        self.staged = max(self.staged, sum(bucket.elements for bucket in of_elements.buckets.values()))


@contextmanager
def measured(bucket_elements: int) -> Iterator[Traffic]:
    """Measure all statistics of this process, which stage at most this many elements of squares."""
    traffic = Traffic()
    see, reduce = GradientStatistics._see, squares.Bucket._reduce
    limit = squares.BUCKET_ELEMENTS
    names = [n for n in ("reduce", "reduce_scatter_tensor", "reduce_scatter_single") if hasattr(dist, n)]
    originals = {name: getattr(dist, name) for name in names}

    def seeing(self: Any, *args: Any) -> None:
        see(self, *args)
        traffic.look(self)

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent = args[0] if name == "reduce" else args[1]
            traffic.sent += sent.numel()
            traffic.calls += 1
            traffic.staged = max(traffic.staged, sent.numel())
            return originals[name](*args, **kwargs)

        return call

    def reducing(self: Any, *args: Any) -> Any:
        for name in names:
            setattr(dist, name, counting(name))
        try:
            return reduce(self, *args)
        finally:
            for name in names:
                setattr(dist, name, originals[name])

    squares.BUCKET_ELEMENTS = bucket_elements
    GradientStatistics._see = seeing  # type: ignore[method-assign]
    squares.Bucket._reduce = reducing  # type: ignore[method-assign]
    try:
        yield traffic
    finally:
        squares.BUCKET_ELEMENTS = limit
        GradientStatistics._see = see  # type: ignore[method-assign]
        squares.Bucket._reduce = reduce  # type: ignore[method-assign]


def run_measured(case: Case, bucket_elements: int) -> dict[str, Any]:
    with measured(bucket_elements) as traffic:
        return {**run_case(case), "traffic": vars(traffic)}


@contextmanager
def seeing_reduced_gradients() -> Iterator[None]:
    """What one gets from hooks that see gradients after their reduction."""
    see = GradientStatistics._see

    def reduced(self: Any, watched: Any, gradient: torch.Tensor) -> None:
        mean = gradient.clone()
        dist.all_reduce(mean)
        see(self, watched, mean / dist.get_world_size())

    GradientStatistics._see = reduced  # type: ignore[method-assign]
    try:
        yield
    finally:
        GradientStatistics._see = see  # type: ignore[method-assign]


def run_on_reduced_gradients(case: Case) -> dict[str, Any]:
    with seeing_reduced_gradients():
        return run_case(case)


class Network(torch.nn.Module):
    """Tied embedding, blocks that may be recomputed, and a branch that a batch may leave out."""

    def __init__(self, recompute: str | None):
        super().__init__()
        self.recompute = recompute
        self.embedding = torch.nn.Embedding(23, 12)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.LayerNorm(12), torch.nn.Linear(12, 20), torch.nn.GELU(), torch.nn.Linear(20, 12)
            )
            for _ in range(3)
        )
        self.branch = torch.nn.Linear(12, 12)
        self.decoder = torch.nn.Linear(12, 23)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor, branch: bool) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            if self.recompute is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.recompute == "reentrant")
        if branch:
            x = x + self.branch(x)
        return torch.nn.functional.cross_entropy(self.decoder(x).flatten(0, 1), ids.roll(1, dims=1).flatten())


def _batch(step: int, group: int) -> torch.Tensor:
    return torch.randint(23, (3, 5), generator=torch.Generator().manual_seed(97 * step + group))


def train_network(
    name: str,
    stage: str | int,
    accumulation: int,
    recompute: str | None = None,
    branch_on: tuple[int, ...] = (0, 1, 2, 3),
    no_sync: bool = False,
    zero: dict[str, Any] | None = None,
    groups: int | None = None,
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[float, ...]]]:
    """Train a real model for three steps; the weights and the last norms.

    Args:
        name: The optimizer.
        stage: "dense" (one process sees all groups), "ddp" or a ZeRO stage.
        accumulation: Micro-batches per step and rank.
        recompute: "reentrant", "plain" or None.
        branch_on: Ranks whose batches use the branch.
        no_sync: Accumulate under DDP's no_sync().
        zero: Entries of zero_optimization.
        groups: Number of groups, for "dense".
    """
    torch.manual_seed(0)
    model = Network(recompute)
    matrices = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
    vectors = [(n, p) for n, p in model.named_parameters() if p.dim() == 1]
    optimizer = create_optimizer(name, [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=0.05)
    trained: Any = model
    engine = None
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if isinstance(stage, int):
        config = {
            "train_micro_batch_size_per_gpu": 3,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage, **(zero or {})},
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    elif stage == "ddp":
        trained = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=len(branch_on) < 4)
    elif stage == "dense":
        optimizer.data_parallel_group = dist.new_group([rank], use_local_synchronization=True)  # type: ignore[attr-defined]
    for step in range(3):
        if stage == "dense":
            assert groups is not None
            for group in range(groups):
                (model(_batch(step, group), group % ranks in branch_on) / groups).backward()
        for micro in range(0 if stage == "dense" else accumulation):
            ids, branch = _batch(step, micro * ranks + rank), rank in branch_on
            if engine is not None:
                engine.backward(engine(ids, branch))
                engine.step()
                continue
            last = micro == accumulation - 1
            with trained.no_sync() if no_sync and not last else nullcontext():
                (trained(ids, branch) / accumulation).backward()
        if engine is None:
            optimizer.step()
            optimizer.zero_grad()
    weights = {}
    for n, p in model.named_parameters():
        with gathered([p]):
            weights[n] = p.detach().clone()
    assert optimizer.statistics is not None
    norms = {
        n: (s.groups, s.mean_norm, s.mean_square, s.square_of_mean) for n, s in optimizer.statistics.norms().items()
    }
    if engine is not None:
        engine.destroy()
    return weights, norms


def step_on_tensors_nobody_watched(stage: int) -> str:
    """Build the optimizer on what ZeRO made of the parameters; the error."""
    model = torch.nn.Linear(4, 3)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=inner, config=config)
    wrapper = engine.optimizer
    flats = wrapper.fp32_partitioned_groups_flat if stage == 3 else wrapper.single_partition_of_fp32_groups
    late = create_optimizer("vrsgd", flats, lr=0.1)
    engine.backward(engine(torch.ones(2, 4)).sum())
    for flat in flats:
        flat.grad = torch.ones_like(flat)
    try:
        late.step()
    except RuntimeError as error:
        return str(error)
    finally:
        engine.destroy()
    return ""


def train_with_dropped_batches(stage: int, drop: str | None, **config: Any) -> dict[str, tuple[float, ...]]:
    """Two steps of two micro-batches each; before the second of each, one that is dropped, or none. The last norms."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    optimizer = create_optimizer("vrsgd", model.named_parameters(), lr=0.05)
    zero = {"zero_optimization": {"stage": stage}, "gradient_clipping": 0.0, **config}
    batches = {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 3 if drop else 2}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={**batches, **zero})
    dtype = next(model.parameters()).dtype
    try:
        for step in range(2):
            for number in ([90] if drop else []) + [2 * step, 2 * step + 1]:
                x = torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * number + dist.get_rank()))
                # What is dropped is one of three micro-batches, so that the others weigh a third each.
                engine.backward(engine(x.to(dtype)).square().mean() * (3 / 2 if drop else 1))
                if number == 90:
                    (engine if drop == "engine" else engine.optimizer).zero_grad()
                engine.step()
        norms = optimizer.statistics.norms()  # type: ignore[union-attr]
        return {name: (n.groups, n.mean_norm, n.mean_square, n.square_of_mean) for name, n in norms.items()}
    finally:
        engine.destroy()
