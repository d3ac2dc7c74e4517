"""Every test here is slow; all of them read the same prepared data, and compare with the same undisturbed run."""

from __future__ import annotations

from pathlib import Path

import pytest

from .faulty_runs import finished, prepare_data


@pytest.hookimpl(tryfirst=True)  # before `-m` takes its choice
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of token shards."""
    return prepare_data(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to."""
    return finished(data, tmp_path_factory.mktemp("undisturbed") / "run")
