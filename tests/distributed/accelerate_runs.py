"""What runs inside the workers to test training through accelerate, with a real Accelerator per case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR
from torch.utils.data import DataLoader

from trustratio.integrations.accelerate import count_ranks_on_cpu, layerwise_optimizer
from trustratio.optimizers import LAMB
from trustratio.recipes.rules.schedules import WarmupPolynomial

from .cases import Case, CaseRun, deepspeed_config, group_gradients


class _AcceleratedRun(CaseRun):
    """Trains as accelerate's documentation shows."""

    def __init__(self, case: Case, no_sync: bool, norms: bool):
        self.no_sync = no_sync
        self.norms: list[dict[str, tuple[float, ...]]] | None = [] if norms else None
        super().__init__(case)

    def _wrap(self) -> None:
        case = self.case
        if case.stage == "ddp":
            self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=case.accumulation)
        else:
            plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(case))
            self.accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=case.accumulation)
        self.trained, self.prepared = self.accelerator.prepare(self.model, self.optimizer)
        if case.optimizer != "naive":
            assert layerwise_optimizer(self.prepared) is self.optimizer
        if self.norms is not None:
            self.optimizer.collect_group_norms()  # type: ignore[attr-defined]

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            for micro in range(self.case.accumulation):
                self._backward(step, micro)
            if hasattr(self.optimizer, "trust_ratios"):
                self.ratios.append(self.optimizer.trust_ratios())
            if self.norms is not None:
                norms = self.optimizer.statistics.norms()  # type: ignore[attr-defined]
                self.norms.append(
                    {name: (n.groups, n.mean_norm, n.mean_square, n.square_of_mean) for name, n in norms.items()}
                )

    def _backward(self, step: int, micro: int) -> None:
        accumulation, world = self.case.accumulation, dist.get_world_size()
        of_groups = group_gradients(self.case, step, self.gradients[step], world * accumulation)
        gradients = {name: g[micro * world + dist.get_rank()] for name, g in of_groups.items()}
        with self._context(micro):
            self.accelerator.backward(self.trained(gradients))
            if not self.no_sync or micro == accumulation - 1:
                self.prepared.step()
                self.prepared.zero_grad()

    def _context(self, micro: int) -> AbstractContextManager[Any]:
        if not self.no_sync:
            return self.accelerator.accumulate(self.trained)
        last = micro == self.case.accumulation - 1
        return nullcontext() if last else self.accelerator.no_sync(self.trained)

    def close(self) -> None:
        self.counter.close()
        if hasattr(self.trained, "destroy"):
            self.trained.destroy()
        self.trained = self.prepared = self.accelerator = None  # type: ignore[assignment]


def run_accelerated(case: Case, no_sync: bool = False, norms: bool = False) -> dict[str, Any]:
    """`run_case` through accelerate; with the group norms of each step under "norms" if asked for."""
    run = _AcceleratedRun(case, no_sync, norms)
    try:
        run.train(0, case.steps)
        return {**run.result(), "norms": run.norms}
    finally:
        run.close()


@contextmanager
def unbuilt_cpu_adam() -> Iterator[None]:
    """Put a class that is DeepSpeedCPUAdam to everybody, but needs no compiled extension, in its place."""
    from deepspeed.ops import adam

    class DeepSpeedCPUAdam(adam.DeepSpeedCPUAdam):
        def __init__(self, params: Any, lr: float = 1e-3, **options: Any):
            torch.optim.Optimizer.__init__(self, params, {"lr": lr, "amsgrad": False})

        def __del__(self) -> None:
            pass

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(1.0)

    with mock.patch.object(adam, "DeepSpeedCPUAdam", DeepSpeedCPUAdam):
        yield


def offloaded(keep: bool) -> str:
    """Prepare LAMB under offload and take a step; the name of what steps, or the error."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    if keep:
        config["zero_force_ds_cpu_optimizer"] = False
    with unbuilt_cpu_adam():
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        model = torch.nn.Linear(4, 3)
        # No name of ours keeps the optimizer alive, as in `model, optimizer = accelerator.prepare(model, optimizer)`.
        model, optimizer = accelerator.prepare(model, LAMB(model.named_parameters(), lr=0.1))
        before = model.module.weight.detach().clone()
        try:
            accelerator.backward(model(torch.ones(2, 4)).square().sum())
            optimizer.step()
        except RuntimeError as error:
            assert torch.equal(before, model.module.weight), "weights moved before the error"
            return f"{type(error).__name__}: {error}"
        finally:
            model.destroy()
        return type(layerwise_optimizer(optimizer)).__name__


def harmless() -> None:
    """What must not be taken for a replaced optimizer."""
    model = torch.nn.Linear(4, 3)
    LAMB(model.parameters(), lr=0.1)  # made and thrown away
    unused = LAMB(model.parameters(), lr=0.1)
    frozen = torch.nn.Linear(3, 3).requires_grad_(False)
    several = [torch.optim.AdamW(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1)]
    several.append(ZeroRedundancyOptimizer(model.parameters(), optimizer_class=LAMB, lr=0.1))
    for optimizer in several:
        frozen(model(torch.ones(2, 4))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    engine, prepared = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(engine(torch.ones(2, 4)).square().sum())
    prepared.step()
    engine.destroy()
    assert not unused.state


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "ours": lambda optimizer: WarmupPolynomial(optimizer, 2, 10),
    "ours in a chain": lambda optimizer: ChainedScheduler([WarmupPolynomial(optimizer, 2, 10)], optimizer),
    "torch's": lambda optimizer: LambdaLR(optimizer, lambda step: 1.0 / (step + 1)),
}


def scheduled(schedule: str, optimizer_class: Any, prepare: bool = True, **options: Any) -> list[float] | str:
    """Train for three updates with a schedule given to accelerate; the rates, or the error."""
    accelerator = Accelerator(cpu=True, **options)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    scheduler = SCHEDULES[schedule](optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = accelerator.prepare(scheduler) if prepare else scheduler
    before, rates = model.module.weight.detach().clone(), []
    try:
        for _ in range(3):
            accelerator.backward(model(torch.ones(2, 4)).square().sum())
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    except RuntimeError as error:
        assert torch.equal(before, model.module.weight), "weights moved before the error"
        return f"{type(error).__name__}: {error}"
    return rates


def counts_by_itself() -> bool:
    """Whether this accelerate sees on a CPU that there are several processes, as 1.10 does and 1.15 does not."""
    return Accelerator().num_processes > 1


def miscounted(way: str, load: bool) -> str:
    """Take a step where accelerate counts one of two processes, or leaves out DeepSpeed; the error, or what stepped."""
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    plugin = {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config)} if "DeepSpeed" in way else {}
    if way == "DeepSpeed, counted":
        count_ranks_on_cpu()
    accelerator = Accelerator(cpu="cpu" in way, **plugin)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = LAMB(model.named_parameters(), lr=0.1)
    if way == "averaged by hand":
        optimizer.data_parallel_group = dist.group.WORLD  # type: ignore[attr-defined]
    if way == "wrapped by hand":
        model = DistributedDataParallel(model)  # type: ignore[assignment]
    loader = accelerator.prepare(DataLoader(torch.ones(8, 4), batch_size=2)) if load else [torch.ones(2, 4)]  # type: ignore[arg-type]
    model, prepared = accelerator.prepare(model, optimizer)
    weights = next(iter(model.parameters()))
    before = weights.detach().clone()
    try:
        accelerator.backward(model(next(iter(loader))).square().sum())
        prepared.step()
    except RuntimeError as error:
        assert torch.equal(before, weights), "weights moved before the error"
        return f"{type(error).__name__}: {error}"
    finally:
        getattr(model, "destroy", lambda: None)()
    return type(layerwise_optimizer(prepared)).__name__
