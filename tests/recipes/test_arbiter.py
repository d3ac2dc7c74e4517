"""Arbiter against its equations, at one and at two ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from trustratio.recipes.rules.arbiter import Arbiter

SIZES: dict[str, Any] = {"width": 2, "smallest": 16, "largest": 256}


class Constant(nn.Module):
    """An agent whose logits are its parameters, whatever it sees."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(inputs), -1)


def validation_of(classes: int = 3, width: int = 2) -> Any:
    """The first rows of an endless set, of which `begin` and `every` choose a rank's share."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(600, width, generator=generator)
    labels = torch.randint(0, classes, (600,), generator=generator)

    def rows(count: int, begin: int = 0, every: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        return features[begin::every][:count], labels[begin::every][:count]

    return rows


def head_of(classes: int = 3, width: int = 2) -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(width, classes)


def agent_of() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4))


def alike(one: Any, other: Any) -> bool:
    """Whether two states hold the same to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(value, other[name]) for name, value in one.items())
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_the_worked_example():
    """Logits (-1, 0, .5, 2), alpha 0: s .375, B 306; the samples' sizes 143, 260, 321, 451."""
    asked = []
    arbiter = Arbiter(Constant(0.5, -1.0, 2.0, 0.0), width=2, smallest=8, largest=512)
    rows = validation_of()
    arbiter.update(torch.zeros(5, 1), lambda count: (asked.append(count), rows(count))[1], head_of())
    assert asked == [306]
    assert arbiter.sizes == [143, 260, 321, 451]
    assert arbiter.size(torch.tensor(0.375)).item() == 306
    assert arbiter.next_batch() in (143, 260, 321, 451)


def test_the_warm_up_goes_to_the_logit_of_its_batch():
    """logit((128 - 8) / 504) = -1.16315; bounds moved by .001 leave five digits of it."""
    arbiter = Arbiter(Constant(0.0, 0.1), width=2, smallest=8, largest=512)
    taken = arbiter.warm_up([torch.zeros(1, 1)] * 20_000, batch=128, lr=1e-3)
    assert 500 < taken < 20_000
    assert arbiter.agent.logits.mean().item() == pytest.approx(-1.16315, abs=0.025)  # two samples are .022
    assert [abs(size - 128) < 12 for size in arbiter.sizes] == [True, True]


def test_one_update_is_an_adam_step_along_the_gradient_of_f():
    agent, head, rows = Constant(-0.5, 0.25, 1.0), head_of(), validation_of()
    arbiter = Arbiter(agent, width=2, smallest=4, largest=64, lr=0.01, alpha_lr=0.02, alpha_weight_decay=0.0)
    arbiter._begin(torch.tensor([0.3, -0.4, 1.1]))
    alpha = arbiter._alpha_of(3).detach().double().requires_grad_()
    direction = arbiter._direction.detach().double().requires_grad_()
    logits = agent.logits.detach().double().requires_grad_()
    position = (torch.softmax(alpha, 0) * logits).sum()
    batch = math.floor(60 / (1 + math.exp(-position.item())) + 4)
    features, labels = rows(batch)
    response = features.double() * (1 + position * direction)
    loss = functional.cross_entropy(response @ head.weight.detach().double().T + head.bias.detach().double(), labels)
    loss.backward()
    # Adam's first step is lr * g / (|g| + eps).
    expected = [
        (start - rate * start.grad / (start.grad.abs() + 1e-8)).detach()
        for start, rate in ((logits, 0.01), (alpha, 0.02), (direction, 0.01))
    ]
    assert arbiter.update(torch.zeros(2, 1), rows, head) == pytest.approx(loss.item(), rel=1e-6)
    got = (agent.logits, arbiter._alpha, arbiter._direction)
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one.detach().double(), other, rtol=1e-5, atol=1e-6)
    assert head.weight.grad is None
    assert all(parameter.grad is None for parameter in agent.parameters())


def test_the_next_batch_is_the_sample_with_the_largest_alpha_in_units():
    arbiter = Arbiter(Constant(2.0, -1.0, 0.5, 0.0), width=2, smallest=8, largest=512, unit=8)
    arbiter.update(torch.zeros(1, 1), validation_of(), head_of())
    for favourite, batch in enumerate((136, 256, 320, 448)):
        arbiter.update(torch.zeros(1, 1), validation_of(), head_of())
        arbiter._begin(torch.eye(4)[favourite])
        assert arbiter.next_batch() == batch
        assert float(arbiter._alpha.abs().max()) < 1e-5  # drawn anew
    tiny = Arbiter(Constant(-30.0), width=2, smallest=8, largest=512, unit=8)
    tiny.update(torch.zeros(1, 1), validation_of(), head_of())
    assert tiny.next_batch() == 8


class Even(Arbiter):
    """Asks for an even number of samples, which two ranks share evenly."""

    def size(self, logit: torch.Tensor) -> torch.Tensor:
        return super().size(logit) // 2 * 2


def learn(ranks: int, rank: int, average: Any, intervals: int = 4) -> tuple[list[int], list[float], list[torch.Tensor]]:
    """A toy network trained beside an Arbiter; its batches, losses and weights."""
    rows, head = validation_of(), head_of()
    arbiter = Even(agent_of(), 2, 16, 256, unit=8, lr=0.03, alpha_lr=0.1, ranks=ranks, average=average)
    sgd, batch, batches, losses = torch.optim.SGD(head.parameters(), 0.1), 64, [], []
    for interval in range(intervals):
        for iteration in range(3):
            features, labels = rows(batch)  # the network itself is the same on all ranks
            functional.cross_entropy(head(features), labels).backward()
            sgd.step()
            sgd.zero_grad()
            inputs = torch.randn(12, 2, generator=torch.Generator().manual_seed(10 * interval + iteration))
            losses.append(arbiter.update(inputs[rank::ranks], lambda n: rows(n, rank, ranks), head))
        batch = arbiter.next_batch()
        batches.append(batch)
    return batches, losses, [parameter.detach() for parameter in (*arbiter.agent.parameters(), arbiter._direction)]


def break_here(kind: str) -> list[str]:
    """On one rank of two: what an update or a warm-up raises that only the second one makes impossible."""
    import torch.distributed as dist

    from trustratio.recipes.training.ranks import mean_over_ranks

    second, rows, samples = dist.get_rank() == 1, validation_of(), 4
    torch.manual_seed(11)
    agent: nn.Module = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, samples))
    if second and kind == "logits":
        agent.append(nn.Unflatten(1, (2, 2))).append(nn.Flatten(2)).append(_First())
    if second and kind == "frozen":
        agent[0].requires_grad_(False)
    seed = int(second and kind == "seed")
    arbiter = Arbiter(agent, 2, 16, 256, seed=seed, ranks=2, average=mean_over_ranks)
    before = [weight.detach().clone() for weight in (*agent.parameters(), arbiter._direction)]
    broken = _Raises(agent) if second and kind == "agent" else agent
    arbiter.agent = broken

    def validation(count: int) -> Any:
        if second and kind == "validation":
            raise OSError("no such shard")
        return rows(count)

    heard = []
    try:
        if kind == "warm-up":
            arbiter.warm_up([torch.zeros(2, 2)] * (2 - second), batch=250)
        else:
            arbiter.update(torch.zeros(2, 2), validation, head_of())
    except Exception as error:
        heard.append(f"{type(error).__name__}: {error}")
    dist.barrier()
    same = all(torch.equal(a, b) for a, b in zip(before, (*agent.parameters(), arbiter._direction), strict=True))
    return [*heard, "unchanged" if same else "changed"]


class _Raises(nn.Module):
    """Whose backward, or forward, fails."""

    def __init__(self, agent: nn.Module) -> None:
        super().__init__()
        self.agent = agent

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError("of one rank")


class _First(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs[:, 0]


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("agent", "RuntimeError: Arbiter stops on all ranks", "ArithmeticError: of one rank"),
        ("validation", "RuntimeError: Arbiter stops on all ranks", "OSError: no such shard"),
        ("logits", "here are 4 logits", "here are 2 logits"),
        ("frozen", "ValueError: the ranks' agents differ", "ValueError: the ranks' agents differ"),
        ("seed", "another `seed`", "another `seed`"),
    ],
)
def test_what_one_rank_cannot_do_ends_on_all_before_anything_is_learned(pools, kind, first, second):
    answers = pools.get(2).run(break_here, kind)
    for answer, expected in zip(answers, (first, second), strict=True):
        assert expected in answer[0]
        assert answer[1] == "unchanged"


def test_a_warm_up_whose_batches_end_on_one_rank_ends_on_all(pools):
    first, second = pools.get(2).run(break_here, "warm-up")
    assert "stops on all ranks" in first[0]
    assert "give more batches" in second[0]


def learn_here(different: bool = False) -> Any:
    """On one rank of several."""
    import torch.distributed as dist

    from trustratio.recipes.training.ranks import mean_over_ranks

    if different:
        torch.manual_seed(dist.get_rank())
        arbiter = Arbiter(nn.Linear(2, 4), 2, 16, 256, ranks=2, average=mean_over_ranks)
        try:
            arbiter.update(torch.zeros(2, 2), validation_of(), head_of())
        except ValueError as error:
            return str(error)
    return learn(dist.get_world_size(), dist.get_rank(), mean_over_ranks)


def test_two_ranks_learn_what_one_process_does(pools):
    answers = pools.get(2).run(learn_here)
    for batches, losses, weights in answers[1:]:
        assert batches == answers[0][0]
        assert losses == answers[0][1]
        assert all(torch.equal(a, b) for a, b in zip(weights, answers[0][2], strict=True))
    batches, losses, weights = learn(1, 0, None)
    assert answers[0][0] == batches
    assert answers[0][1] == pytest.approx(losses, rel=1e-5)
    for one, other in zip(answers[0][2], weights, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)
    assert all(16 <= batch <= 256 and batch % 8 == 0 for batch in batches)
    assert len(set(batches)) > 1


def test_ranks_with_different_agents_are_refused_on_all(pools):
    answers = pools.get(2).run(learn_here, True)
    assert all("different agents" in answer for answer in answers)


def test_an_interval_without_learning_has_no_next_batch():
    arbiter = Arbiter(agent_of(), **SIZES)
    nothing = pytest.raises(ValueError, match="learned nothing since the last interval")
    arbiter.warm_up([torch.ones(1, 2)] * 2000, batch=128, lr=0.01)
    with nothing:
        arbiter.next_batch()  # a warm-up teaches alpha nothing
    arbiter.update(torch.ones(2, 2), validation_of(), head_of())
    learned = Arbiter(agent_of(), **SIZES)
    learned.load_state_dict(arbiter.state_dict())
    assert learned.next_batch() == arbiter.next_batch()
    ended = Arbiter(agent_of(), **SIZES)
    ended.load_state_dict(arbiter.state_dict())
    for one in (arbiter, learned, ended):
        before = one.state_dict()
        with nothing:
            one.next_batch()
        assert alike(before, one.state_dict())


def test_frozen_parameters_stay_and_the_others_learn():
    def of_frozen(frozen: bool) -> Arbiter:
        agent = agent_of()
        agent[0].requires_grad_(not frozen)
        return Arbiter(agent, **SIZES, lr=0.1)

    one, whole = of_frozen(True), of_frozen(False)
    begun = [weight.detach().clone() for weight in one.agent.parameters()]
    for arbiter in (one, whole):
        arbiter.update(torch.ones(2, 2), validation_of(), head_of())
    stayed = [torch.equal(a, b) for a, b in zip(begun, one.agent.parameters(), strict=True)]
    assert stayed == [True, True, False, False]
    assert torch.equal(one.agent[2].weight, whole.agent[2].weight)  # the first step is the same
    with pytest.raises(ValueError, match="with trained="):
        one.load_state_dict(whole.state_dict())
    later = one.agent[2].weight.detach().clone()
    one.agent[2].weight.requires_grad_(False)  # in the middle: stays from here on, whatever Adam remembers
    one.update(torch.ones(2, 2), validation_of(), head_of())
    assert torch.equal(one.agent[2].weight, later)
    assert not torch.equal(one.agent[2].bias, whole.agent[2].bias)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_learns_where_gradients_are_switched_off(mode):
    def learned(arbiter: Arbiter) -> tuple[int, float, dict[str, Any]]:
        taken = arbiter.warm_up([inputs] * 2000, batch=100, lr=0.01)
        arbiter.update(inputs, validation, head)
        arbiter.next_batch()
        return taken, arbiter.update(inputs, validation, head), arbiter.state_dict()

    def validation(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert not torch.is_grad_enabled()  # no graph of the trained network is kept
        with mode():
            return tuple(values * 1 for values in validation_of()(count))

    inputs, head, fresh = torch.ones(2, 2), head_of(), Arbiter(agent_of(), **SIZES)
    expected = learned(Arbiter(agent_of(), **SIZES))
    with mode():
        got = learned(fresh)
    assert got[:2] == expected[:2]
    assert alike(got[2], expected[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_head_gets_features_in_their_own_dtype(dtype):
    rows, heads, made_of = validation_of(), [], []
    for kind in (torch.float32, dtype):
        arbiter, head, seen = Arbiter(agent_of(), **SIZES), head_of().to(kind), []
        head.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0].dtype))
        head.register_forward_hook(lambda _, given, made: made_of.append(made.detach()))
        loss = arbiter.update(torch.ones(2, 2), lambda n, kind=kind: (rows(n)[0].to(kind), rows(n)[1]), head)
        whole = functional.cross_entropy(made_of[-1].double(), rows(len(made_of[-1]))[1])
        assert loss == pytest.approx(whole.item(), rel=1e-6)  # the loss itself is not of 16 bits
        assert seen == [kind]
        heads.append(loss)
    assert heads[1] == pytest.approx(heads[0], rel=1e-2 if dtype is torch.bfloat16 else 1e-6)
    assert heads[1] != heads[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_teaches_nothing(value):
    arbiter, rows = Arbiter(agent_of(), 2, 16, 256), validation_of()
    before = [parameter.detach().clone() for parameter in (*arbiter.agent.parameters(), arbiter._direction)]
    with pytest.raises(ValueError, match="not finite: nothing learned"):
        arbiter.update(torch.ones(2, 2), lambda n: (rows(n)[0] * value, rows(n)[1]), head_of())
    after = (*arbiter.agent.parameters(), arbiter._direction)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class _Steep(nn.Module):
    """An agent whose logits are finite, and whose gradient is not: that of a root at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.weight.sqrt().expand(len(inputs), -1)


def test_an_agent_that_is_not_finite_teaches_nothing():
    steep = Arbiter(_Steep(), **SIZES)
    with pytest.raises(ValueError, match="not finite: nothing learned"):
        steep.update(torch.ones(2, 2), validation_of(), head_of())
    assert not steep.agent.weight.any()
    with pytest.raises(ValueError, match="the agent's logits are not finite: nothing learned"):
        Arbiter(Constant(0.0, math.nan), **SIZES).update(torch.ones(2, 2), validation_of(), head_of())


def test_bad_input_is_refused():
    def make(**options: Any) -> Arbiter:
        return Arbiter(**{"agent": Constant(0.0, 1.0), "width": 2, "smallest": 8, "largest": 64, **options})

    for options, message in (
        ({"smallest": 64}, "smallest must be below largest, got 64 and 64"),
        ({"unit": 16}, "must be multiples of unit=16"),
        ({"width": 0}, "width must be a whole number from 1, got 0"),
        ({"ranks": 2}, "2 ranks need `average`"),
        ({"ranks": 9}, "at least one sample per rank, got 8 for 9 ranks"),
        ({"largest": 64.5}, r"largest must be a whole number from 1, got 64\.5"),
        ({"lr": math.nan}, "lr must be in .*, got nan"),
        ({"lr": -1}, "lr must be in .*, got -1"),
        ({"alpha_lr": math.nan}, "alpha_lr must be in .*, got nan"),
        ({"alpha_weight_decay": math.inf}, "alpha_weight_decay must be in .*, got inf"),
        ({"agent": Constant(0.0).bfloat16()}, r"must be float32 or float64, got torch\.bfloat16"),
        ({"agent": Constant(0.0).requires_grad_(False)}, "no parameter that requires gradients"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(ValueError, match="learned nothing since the last interval"):
        make().next_batch()
    with pytest.raises(ValueError, match="no samples yet"):
        _ = make().sizes
    with pytest.raises(ValueError, match="batch must be from 8 to 64, got 7"):
        make().warm_up([], batch=7)
    with pytest.raises(ValueError, match=r"lr must be in .*, got nan"):
        make().warm_up([torch.zeros(1, 1)], batch=60, lr=math.nan)
    detached = make()
    detached.agent.forward = lambda inputs: torch.zeros(len(inputs), 2)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="depend on no parameter that is trained"):
        detached.update(torch.zeros(1, 1), validation_of(), head_of())
    with pytest.raises(ValueError, match="give more batches"):
        make().warm_up([torch.zeros(1, 1)], batch=60)
    with pytest.raises(ValueError, match=r"must return 42 features of width 2 .* got shapes \(42, 3\) and \(42,\)"):
        make().update(torch.zeros(1, 1), lambda n: (torch.zeros(n, 3), torch.zeros(n).long()), head_of())
    flat = make()
    flat.agent.forward = lambda inputs: inputs.flatten()  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"logits of shape \(batch, samples\), got \(3,\)"):
        flat.update(torch.zeros(3, 1), validation_of(), head_of())
