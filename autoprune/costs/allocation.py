"""How many channels each group keeps, as a file that search and pruning share."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprune.errors import UserError

if TYPE_CHECKING:
    from autoprune.structure.groups import Groups


@dataclass(frozen=True)
class Allocation:
    """How many channels each group keeps: what a search hands over to pruning.

    Attributes:
        kept: Prunable group to the number of channels that it keeps.
        network: Fingerprint of the groups that it is for; empty if whoever wrote it
            doesn't say.
        budget: The budget it was made for, as text.
        source: Who made it: "policy", "episode 12", "uniform", ...
    """

    kept: dict[str, int]
    network: str = ""
    budget: str = ""
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for `json.dumps`."""
        return {
            "kept": self.kept,
            "network": self.network,
            "budget": self.budget,
            "source": self.source,
        }

    @classmethod
    def read(cls, path: str | Path, groups: "Groups") -> "Allocation":
        """Reads a JSON file and checks it against the network.

        Only `kept` is required, so that a person can write such a file by hand.

        Args:
            path: The file.
            groups: The trace of the network that the allocation is meant for.

        Returns:
            The allocation in the file.

        Raises:
            UserError: If the file is missing or damaged, or is for another network.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError("allocation", f"no file {str(path)!r}")
        try:
            data = json.loads(path.read_text())
            allocation = cls(
                dict(data["kept"]),
                network=str(data.get("network", "")),
                budget=str(data.get("budget", "")),
                source=str(data.get("source", "")),
            )
        # Whatever JSON holds instead of an allocation, it fails in one of these ways.
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                "allocation", f"{str(path)!r} is damaged or no allocation ({error!r})"
            ) from error
        allocation.check(groups)
        return allocation

    def check(self, groups: "Groups") -> None:
        """Checks that the allocation fits a network.

        Args:
            groups: The network's trace.

        Raises:
            UserError: If the groups are others, a count is out of its group's range, or
                the fingerprint is another network's.
        """
        channels = groups.channels
        if set(self.kept) != set(channels):
            # One name is enough to see what is wrong; sorted, so always the same one.
            unknown = sorted(set(self.kept) ^ set(channels))[0]
            where = f"group {unknown!r} exists in only one of the two"
            raise UserError(
                "allocation", f"it is for another network or another exclude: {where}"
            )
        for name, count in self.kept.items():
            # Not isinstance: True is an int too, and JSON may hold true.
            if type(count) is not int or not 1 <= count <= channels[name]:
                raise UserError(
                    "allocation",
                    f"group {name!r} keeps {count!r}; allowed are 1 to "
                    f"{channels[name]} channels",
                )
        # Names and widths fit, but layers between them may be others.
        if self.network not in ("", groups.fingerprint):
            raise UserError(
                "allocation",
                "it is for another network whose groups are called alike "
                "(fingerprint "
                f"{self.network}, this one has {groups.fingerprint}); take its "
                f'"network" out to apply it all the same',
            )
