"""One rank of a crew: python -m benchmarks.on_gpu.sharded.rank CREW RANK DEVICE ANSWERS SETTING...

Writes a line of JSON to the file ANSWERS when it is ready, when a setting begins, and, as rank 0, what came out.
"""

from __future__ import annotations

import json
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.ranks import leave

from .settings import CREWS, Crew, Setting

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Join the others, train the settings of these names one after the other, and leave."""
    crew_name, rank, device, answers, *names = arguments
    crew = next(crew for crew in CREWS if crew.name == crew_name)
    settings = {setting.name: setting for setting in crew.settings}
    path = Path(answers)
    host = _join(crew, device)
    _tell(path, ready=True)
    for name in names:
        _tell(path, began=name)
        found = _train(crew, settings[name], device, host)
        if int(rank) == 0:
            _tell(path, setting=name, found=found)
        dist.barrier(group=host)  # whoever dies in the next one takes nothing from this one
    leave()


def _join(crew: Crew, device: str) -> Any:
    """Join the crew; returns the group over which answers travel from CPU to CPU."""
    import deepspeed
    from deepspeed.utils import logger

    from trustratio.integrations.deepspeed.building import leave_out_shared_memory

    logger.setLevel("ERROR")
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(0)
    leave_out_shared_memory()
    deepspeed.init_distributed(crew.backend if device == "cuda" else "gloo", verbose=False)
    return dist.new_group(backend="gloo")


def _train(crew: Crew, setting: Setting, device: str, host: Any) -> dict[str, Any]:
    """Train one setting, and compare what all ranks have, or say why they have nothing."""
    from .training import judge, sending_to_itself, train

    answer: dict[str, Any] | str
    case = setting.case(rehearse=device == "cpu")
    try:
        with sending_to_itself() if crew.ranks == 1 else nullcontext():
            answer = train(case, device)
    except Exception as error:
        traceback.print_exc()
        answer = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"[:300]
    answers: list[Any] = [None] * crew.ranks
    dist.all_gather_object(answers, answer, group=host)
    failures = [one for one in answers if isinstance(one, str)]
    return {"missing": "; ".join(failures)} if failures else judge(case, answers)


def _tell(path: Path, **what: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(what) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
