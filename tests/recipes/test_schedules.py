import pytest
import torch

from trustratio.recipes.learning_rate_schedules import polynomial_scheduler, resolve_warmup, warmup_polynomial


def test_warmup_is_a_fraction_below_one_and_steps_from_one():
    assert resolve_warmup(0.1, 200) == 20
    assert resolve_warmup(1, 200) == 1
    assert resolve_warmup(30, 200) == 30
    assert resolve_warmup(0.0, 200) == 0


def test_warmup_reaches_the_peak_at_its_last_update():
    assert [warmup_polynomial(step, 4, 12) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("degree", "half_way"), [(1.0, 0.5), (0.5, 0.5**0.5), (2.0, 0.25)])
def test_decay_of_any_degree(degree, half_way):
    assert warmup_polynomial(60, 20, 100, degree) == pytest.approx(half_way)
    assert warmup_polynomial(100, 20, 100, degree) == 0.0
    assert warmup_polynomial(1000, 20, 100, degree) == 0.0
    assert warmup_polynomial(60, 20, 100, degree, final=0.2) == pytest.approx(0.2 + 0.8 * half_way)
    assert warmup_polynomial(100, 20, 100, degree, final=0.2) == 0.2


def test_no_division_by_zero_at_the_edges():
    assert warmup_polynomial(0, 0, 1) == 1.0
    assert warmup_polynomial(5, 5, 5) == 0.0


def test_the_torch_scheduler_follows_the_formula():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = polynomial_scheduler(3, 10, degree=0.5)(optimizer)
    for step in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * warmup_polynomial(step, 3, 10, 0.5))
        optimizer.step()
        scheduler.step()
