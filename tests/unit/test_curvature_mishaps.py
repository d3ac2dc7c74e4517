"""Samples of the curvature that come to nothing: what did not see the move, was changed meanwhile, or was lost."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from trustratio.optimizers import CurvatureSGD

from .test_curvature import OPTIONS, Quadratic, Tensor, closure_of, sampled_step


def test_a_second_pass_that_sees_nothing_of_the_move_does_not_count() -> None:
    w = torch.nn.Parameter(torch.ones(5))
    optimizer = CurvatureSGD([("w", w)], lr=0.1, momentum=0.0, interval=1)
    closure = closure_of(optimizer, lambda: w.sum().backward())  # type: ignore[arg-type,return-value]
    with pytest.warns(UserWarning, match="had the same gradients to the bit"):
        optimizer.step(closure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
    assert optimizer.state[w]["samples"] == 0
    assert torch.equal(w.detach(), torch.ones(5) - 0.1 - 0.1)
    assert set(optimizer.trust_ratios().values()) == {1.0}


@pytest.mark.parametrize("how", ["closure", "context"])
def test_a_step_within_one_region_of_autocast(how: str) -> None:
    """Which keeps what it has cast of the weights, until its end."""
    ratios = []
    for whole in (False, True):
        generator = torch.Generator().manual_seed(0)
        w = torch.nn.Parameter(torch.randn(8, 8, generator=generator))
        x = torch.randn(16, 8, generator=generator)
        optimizer = CurvatureSGD([("w", w)], lr=0.1, momentum=0.0, interval=1, perturbation=0.1)

        def backward(w: Tensor = w, x: Tensor = x) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.nn.functional.linear(x, w).float().square().mean()
            loss.backward()
            return loss

        with torch.autocast("cpu", torch.bfloat16, enabled=whole):
            if how == "closure":
                optimizer.step(closure_of(optimizer, backward))
            else:
                sampled_step(optimizer, backward)
        assert optimizer.state[w]["curvature"] > 0
        ratios.append(optimizer.trust_ratios())
    assert ratios[1] == ratios[0]


def test_weights_that_are_changed_while_moved_are_unusable_until_a_load() -> None:
    problem = Quadratic()
    optimizer = CurvatureSGD(problem.named, lr=0.1)
    saved, weights = copy.deepcopy(optimizer.state_dict()), problem.values()
    optimizer.wants_curvature()
    problem.backward()
    with pytest.raises(RuntimeError, match="changed while they were moved"), optimizer.curvature():
        problem.two.detach().mul_(2)
    for use in (optimizer.step, optimizer.state_dict, optimizer.wants_curvature):
        with pytest.raises(RuntimeError, match="load a checkpoint of the model and then the optimizer's state"):
            use()
    with torch.no_grad():
        for name, p in problem.named:
            p.copy_(weights[name])
    optimizer.load_state_dict(saved)
    assert sampled_step(optimizer, problem.backward)


@pytest.mark.parametrize("lost", ["not taken", "not finite"])
def test_a_lost_sample_is_wanted_after_a_resume_too(lost: str) -> None:
    def train(resumed: bool) -> tuple[list[bool], dict[str, Tensor]]:
        problem, wanted = Quadratic(), []
        optimizer = CurvatureSGD(problem.named, interval=5, **OPTIONS["curvature_sgd"])
        for step in range(8):
            optimizer.zero_grad()
            wanted.append(optimizer.wants_curvature())
            problem.backward()
            if wanted[-1] and not (step == 0 and lost == "not taken"):
                with optimizer.curvature():
                    (problem.loss() * (float("nan") if step == 0 else 1.0)).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
            if step == 0 and resumed:
                saved, weights = copy.deepcopy(optimizer.state_dict()), problem.values()
                problem = Quadratic()
                optimizer = CurvatureSGD(problem.named, interval=5, **OPTIONS["curvature_sgd"])
                optimizer.load_state_dict(saved)
                with torch.no_grad():
                    for name, p in problem.named:
                        p.copy_(weights[name])
        return wanted, problem.values()

    straight, resumed = train(False), train(True)
    assert resumed[0] == straight[0] == [True, True, False, False, False, True, False, False]
    assert all(torch.equal(resumed[1][name], w) for name, w in straight[1].items())
