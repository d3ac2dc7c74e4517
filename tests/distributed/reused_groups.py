"""Process groups of the same ranks are one group in a worker, however many cases ask for one.

DeepSpeed, Megatron-core and DTensor keep their groups in globals and never destroy them, so each case would leave
sockets and threads behind until they slow down the ones after it.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d


def reuse_groups() -> None:
    """From now on `new_group` answers with the group that it made of the same ranks, which stays when destroyed."""
    make, destroy = distributed_c10d._new_group_with_tag, distributed_c10d.destroy_process_group
    made: dict[Any, Any] = {}

    def reuse(ranks: Any = None, timeout: Any = None, backend: Any = None, *args: Any, **options: Any) -> Any:
        members = list(range(dist.get_world_size()) if ranks is None else ranks)
        # Of a group that only its members make, the other ranks know nothing.
        locally = options.get("use_local_synchronization", False)
        in_order = options.get("sort_ranks", True)  # which torch before 2.12 does not ask
        key = (tuple(sorted(members) if in_order else members), str(backend or "gloo"), locally)
        if key not in made:
            made[key] = make(ranks, timeout, backend, *args, **options)
        return made[key]

    def keep(group: Any = None) -> None:
        if group is None or not any(group is one for one in made.values()):  # None: the group of all
            destroy(group)

    distributed_c10d._new_group_with_tag = reuse
    dist.destroy_process_group = distributed_c10d.destroy_process_group = keep
