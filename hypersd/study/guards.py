"""How fast one may vote. A guard slows down, it never deletes; what votes count is decided later, by a filter.

Networks are only ever held in memory, as the hash of a part of an address under a key that dies with the process.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from hypersd.study.definition import Limits

REMEMBERED = 20_000  # buckets; whoever has been away for longest is forgotten first
_KEY = secrets.token_bytes(32)


class Bucket:
    """Holds up to `size` tokens and fills with `rate` tokens a second."""

    def __init__(self, size: float, rate: float, now: float) -> None:
        self.size, self.rate, self.tokens, self.at = size, rate, size, now

    def wait(self, now: float) -> float:
        """Seconds until there is a token; 0 if there is one now."""
        self.tokens = min(self.size, self.tokens + (now - self.at) * self.rate)
        self.at = now
        return max(0.0, (1 - self.tokens) / self.rate)

    def take(self) -> None:
        self.tokens -= 1


class Guards:
    """Token buckets of annotators and networks, of one process. Thread-safe."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._kinds = {
            "minute": (limits.annotator_per_minute, 60),
            "day": (limits.annotator_per_day, 24 * 3600),
            "network": (limits.network_per_minute, 60),
        }

    def wait(self, annotator: str, network: str = "") -> int:
        """0 and one token of each kind taken, or the whole seconds to wait and nothing taken."""
        names = [("minute", annotator), ("day", annotator), *([("network", network)] if network else [])]
        with self._lock:
            now = self._clock()
            buckets = [self._bucket(kind, name, now) for kind, name in names]
            longest = max(bucket.wait(now) for bucket in buckets)
            if longest > 1e-9:
                return math.ceil(longest)
            for bucket in buckets:
                bucket.take()
            return 0

    def _bucket(self, kind: str, name: str, now: float) -> Bucket:
        key = f"{kind}:{name}"
        if key not in self._buckets:
            size, seconds = self._kinds[kind]
            self._buckets[key] = Bucket(size, size / seconds, now)
        self._buckets.move_to_end(key)
        while len(self._buckets) > REMEMBERED:
            self._buckets.popitem(last=False)
        return self._buckets[key]


def network_of(address: str) -> str:
    """The name of the /24 or /64 that an address lies in, unreadable; empty for what is no address."""
    try:
        found = ipaddress.ip_address(address.strip())
    except ValueError:
        return ""
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped:
        found = found.ipv4_mapped
    part = ipaddress.ip_network((found, 24 if found.version == 4 else 64), strict=False)
    return hashlib.blake2b(str(part).encode(), key=_KEY, digest_size=8).hexdigest()
