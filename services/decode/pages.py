"""Who holds which bytes of a decode worker's cache memory. Free of torch: a ledger, the tensors belong to the caches.

    0                                                                                                capacity_bytes
    [ prompt of A       | tail of A, choice 0 | tail of A, choice 1 | prompt of B | tail of B, choice 0 |   free    )

    region           reserved by             retained by                      freed when
    prompt of a      admission of the        the reception of its layers,     reception has ended (started, failed,
    request          request                 then every running choice        cancelled) and the last choice too
    tail of a        admission of the        the choice alone                 the choice ends, or at the start if it
    choice           request                                                  had ended by then

A turn of a session that ends may leave its cache for the next one (`kept_sessions`), in a region of its own, which is
freed as soon as anybody needs the room.

While layers arrive, their exact rows at the end of the prompt, which every choice copies, lie in the tails.

A region's size is the upper bound of what its tensors may ever take, so a running sequence never waits for memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ...errors import ConfigError


@dataclass(frozen=True)
class Region:
    """Identity of a region.

    Attributes:
        request_id: whose it is.
        choice: index of the choice whose tail it is; None = the prompt that all choices share.
        parked: it is what a whole request lies in that is parked, in host memory.
        kept: it is what an ended turn of a session has left, for the next one.
    """

    request_id: str
    choice: int | None = None
    parked: bool = False
    kept: bool = False


@dataclass(frozen=True)
class Demand:
    """Upper bounds of what a request will hold.

    Attributes:
        prompt_bytes: what its choices share.
        tail_bytes: what each choice adds.
        num_choices: how many there are.
        host_bytes: of host memory, which its choices share.
    """

    prompt_bytes: int
    tail_bytes: int
    num_choices: int
    host_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.prompt_bytes + self.tail_bytes * self.num_choices

    @property
    def most_bytes(self) -> int:
        """Of all that arrives, wherever it lies then."""
        return self.total_bytes + self.host_bytes

    def regions(self, request_id: str) -> dict[Region, int]:
        tails = {Region(request_id, index): self.tail_bytes for index in range(self.num_choices)}
        return {Region(request_id): self.prompt_bytes} | tails


class Evictable(Protocol):
    """What lies in the memories of nobody's use but a later one's.

    Attributes:
        hits, misses: uses that found it, and that did not.
    """

    hits: int
    misses: int

    def __len__(self) -> int: ...
    @property
    def device_bytes(self) -> int: ...
    @property
    def host_bytes(self) -> int: ...
    def make_room(self, request_id: str, device_bytes: int, host_bytes: int = 0) -> None:
        """Give back what keeps a request from having so many bytes, as far as it can."""
        ...


class PagePool:
    """A bounded, refcounted ledger of bytes.

    Misuse (an unknown region, one reserved twice, a release too many) is a fault of the engine and asserts.

    Args:
        capacity_bytes: bytes that all regions together may take, at least 1.
    """

    def __init__(self, capacity_bytes: int) -> None:
        if capacity_bytes < 1:
            raise ConfigError(f"capacity_bytes: got {capacity_bytes}; allowed: at least 1")
        self.capacity_bytes = capacity_bytes
        self.high_water_bytes = 0
        self._used_bytes = 0
        self._sizes: dict[Region, int] = {}
        self._holders: dict[Region, int] = {}

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self._used_bytes

    def regions(self, kept: bool | None = None) -> Mapping[Region, int]:
        """Every region that is held, with its bytes; any thread may ask.

        Args:
            kept: only those of ended turns, or only the others.
        """
        sizes = dict(self._sizes)
        return sizes if kept is None else {region: size for region, size in sizes.items() if region.kept is kept}

    def reserve(self, wanted: Mapping[Region, int]) -> bool:
        """Reserve all of the regions, each with one holder, or none of them. False when there is no room now."""
        assert all(size >= 0 for size in wanted.values()), "a region has no negative size"
        assert not any(region in self._sizes for region in wanted), "a region is reserved once"
        total = sum(wanted.values())
        if total > self.free_bytes:
            return False
        self._sizes.update(wanted)
        self._holders.update(dict.fromkeys(wanted, 1))
        self._used_bytes += total
        self.high_water_bytes = max(self.high_water_bytes, self._used_bytes)
        return True

    def retain(self, region: Region) -> None:
        """Add a holder."""
        assert region in self._holders, f"{region} is not reserved"
        self._holders[region] += 1

    def release(self, region: Region) -> None:
        """Take a holder away; the last one frees the region."""
        assert region in self._holders, f"{region} is not reserved"
        self._holders[region] -= 1
        if self._holders[region] == 0:
            del self._holders[region]
            self._used_bytes -= self._sizes.pop(region)

    def check_integrity(self) -> None:
        """Assert that the books balance."""
        assert self._sizes.keys() == self._holders.keys(), "every region has a size and holders"
        assert all(count >= 1 for count in self._holders.values()), "a region without holders is free"
        assert self._used_bytes == sum(self._sizes.values()), "the regions make up what is used"
        assert 0 <= self._used_bytes <= self.high_water_bytes <= self.capacity_bytes, "use stays within the capacity"
