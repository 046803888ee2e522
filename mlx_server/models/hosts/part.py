"""What machines are asked for, and which of them: those named first, spares for those that stay
away.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from mlx_server.engine.protocol import Load
from mlx_server.errors import ModelLoadFailed
from mlx_server.models.hosts.host import Host
from mlx_server.models.hosts.messages import Digests

SPARE_SECONDS = 3.0
"""For a machine to come, or to come back, before a spare takes its place."""


@dataclass(frozen=True)
class Part:
    """Of a model, for each of `count` of the machines `names`, rather the first; the others are
    spares. It is a rank if `load` is of several, else all of the engine. `need`: bytes of each.
    """

    names: tuple[str, ...]
    count: int
    model: str
    digests: Digests
    need: int
    load: Load

    @property
    def is_rank(self) -> bool:
        return self.load.options.ranks > 1


class HostAway(ModelLoadFailed):
    """Too few machines are there."""


class HostRefuses(ModelLoadFailed):
    """Too few machines can be used."""


@dataclass
class Search:
    """For `count` of the machines `names`. `spares_at`: when spares may be taken, on the event
    loop's clock.
    """

    names: Sequence[str]
    count: int
    spares_at: float
    _refused: dict[str, str] = field(default_factory=dict)

    def pass_over(self, name: str, why: str) -> None:
        """It does not do its part."""
        self._refused[name] = why

    def found(
        self, there: Mapping[str, Host], unfit: Mapping[str, str], now: float
    ) -> list[Host] | None:
        """Those to take, of those that are `there`; None while others are to be waited for. Raises
        HostRefuses where so many are `unfit`, or have refused, that too few are left.
        """
        usable = self._usable(unfit)
        if len(usable) < self.count:
            useless = {**unfit, **self._refused}
            name = next(name for name in self.names if name in useless)
            raise HostRefuses(f"host `{name}`: {useless[name]}")
        chosen = [name for name in usable if name in there][: self.count]
        if len(chosen) < self.count or (chosen != usable[: self.count] and now < self.spares_at):
            return None
        return [there[name] for name in chosen]

    def away(
        self,
        there: Collection[str],
        unfit: Mapping[str, str],
        troubles: Mapping[str, str],
        patience: float,
    ) -> HostAway:
        """What to raise after `patience` seconds without enough of them. `troubles`: why machines
        are not there.
        """
        name, *more = (name for name in self._usable(unfit) if name not in there)
        spares = ", ".join(f"`{spare}`" for spare in more if spare in self.names[self.count :])
        nor = f", nor one of {spares} in its place" if spares else ""
        trouble = f" ({troubles[name]})" if name in troubles else ""
        return HostAway(
            f"host `{name}` is away: no worker of it has joined within {patience:g} seconds"
            f"{nor}{trouble}"
        )

    def _usable(self, unfit: Collection[str]) -> list[str]:
        return [name for name in self.names if name not in unfit and name not in self._refused]
