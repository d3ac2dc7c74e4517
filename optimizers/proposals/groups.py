"""The groups of a base and ours: what was given, in the form that the base's constructor wants, and what that made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from ..formulas.hyperparameters import check_segments
from ..options.common import OF_THE_WHOLE
from ..options.parameters import listed
from ..sharding.layout import listing

__all__ = ["GivenGroups"]

OF_PARAMETERS = ("params", "param_names")


class GivenGroups:
    """Parameters, named parameters or groups, as TrustRatio was given them.

    A base gets the form that the user chose, tensors or groups, since its constructor may look at the tensors, or at
    the groups' keys. Names are left out, for few constructors expect pairs.

    Attributes:
        are_groups: Whether groups were given.
        groups: These, or one without options.
    """

    def __init__(self, params: Any, own: Mapping[str, Any]):
        """Take what was given.

        Args:
            params: Parameters, named parameters or groups.
            own: Options that the base does not know, with the values for groups that do not have them.

        Raises:
            TypeError: If these are no parameters.
            ValueError: If there are none, some have names and others not, or `segments` names no parameter.
        """
        given = listed(params)
        self.are_groups = isinstance(given[0], dict)
        self.groups = [dict(group) for group in given] if self.are_groups else [{"params": given}]
        self._own = own
        self._names: dict[int, str] = {}
        self._home: dict[int, int] = {}  # by the parameter's id: which group it was in
        for index, group in enumerate(self.groups):
            self._take(index, group)
        if 0 < len(self._names) < len(self._home):
            raise ValueError("all optimizer params should be with/without names. Some param names are missing")

    def _take(self, index: int, group: dict[str, Any]) -> None:
        members = group["params"]
        if isinstance(members, set):  # torch refuses them, which have no order
            return
        pairs = [_pair(member) for member in ([members] if isinstance(members, torch.Tensor) else members)]
        group["params"] = [parameter for _, parameter in pairs]
        names = group.pop("param_names", None) or [name for name, _ in pairs]
        named = [(name, p) for name, p in zip(names, group["params"], strict=False) if name is not None]
        self._names |= {id(parameter): name for name, parameter in named}
        self._home |= {id(parameter): index for parameter in group["params"]}
        segments = group.get("segments", self._own["segments"])
        if isinstance(segments, Mapping):  # each pattern for some layer here, if not in every group of the base
            check_segments(dict.fromkeys(segments, 1), [name for name, _ in named] or None)

    def for_base(self) -> list[Any]:
        """What the base's constructor is given."""
        if not self.are_groups:
            return [*self.groups[0]["params"]]
        return [{name: value for name, value in group.items() if name not in self._own} for group in self.groups]

    def of_base(self, name: str, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The groups that the base has made, with the names of parameters and the options of ours.

        Args:
            name: The base class's.
            groups: The base's; others than were given, where its constructor sorts parameters.

        Raises:
            ValueError: If a parameter is missing or there twice, or one is there that was not given.
        """
        given = [parameter for group in self.groups for parameter in group["params"]]
        self._refuse_others(name, given, [parameter for group in groups for parameter in group["params"]])
        return [self._with_ours(name, group) for group in groups]

    def _refuse_others(self, name: str, given: list[torch.Tensor], found: list[torch.Tensor]) -> None:
        wanted, there = Counter(map(id, given)), Counter(map(id, found))
        if there.keys() - wanted.keys():
            raise ValueError(
                f"{name} has tensors in its groups that it was not given: a base must step the parameters themselves"
            )
        missing = [p for p in given if p.requires_grad and id(p) not in there]
        if missing:
            raise ValueError(
                f"{name} leaves out parameters that it was given, {self._listing(missing)}, so that they would not be "
                "trained: give it those alone that it takes, and the others to another optimizer"
            )
        repeated = [p for p in given if there[id(p)] > wanted[id(p)]]
        if repeated:
            raise ValueError(
                f"{name} has parameters in its groups more than once, {self._listing(repeated)}, so that they would be "
                "stepped twice"
            )

    def _listing(self, parameters: Iterable[torch.Tensor]) -> str:
        return listing([self._names.get(id(p), f"one of shape {tuple(p.shape)}") for p in parameters])

    def _with_ours(self, name: str, group: Mapping[str, Any]) -> dict[str, Any]:
        homes = [self.groups[index] for index in sorted({self._home[id(p)] for p in group["params"]})]
        options = [{option: home[option] for option in self._own if option in home} for home in homes]
        if any(other != options[0] for other in options):
            raise ValueError(
                f"{name} puts parameters into one group that were given in several with other {listing([*self._own])}: "
                "give these options to all groups alike"
            )
        names = [self._names[id(p)] for p in group["params"]] if self._names else None
        ours = {**self._own, **(options[0] if options else {})}
        ours["segments"] = _that_match(ours["segments"], names)
        of_base = {key: value for key, value in group.items() if key not in (*OF_PARAMETERS, *OF_THE_WHOLE)}
        return {
            **of_base,
            **ours,
            "params": [*group["params"]],
            **({} if names is None else {"param_names": names}),
        }


def _pair(member: Any) -> tuple[Any, Any]:
    return member if isinstance(member, tuple) and len(member) == 2 else (None, member)


def _that_match(segments: Any, names: Sequence[str] | None) -> Any:
    """Segments by pattern, of patterns for these names alone."""
    if names is None or not isinstance(segments, Mapping):
        return segments
    found = {key: count for key, count in segments.items() if any(fnmatchcase(name, key) for name in names)}
    return segments if len(found) == len(segments) else found or None
