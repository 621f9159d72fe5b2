"""Pictures from addresses that nobody vouches for: bounded in bytes and seconds, and only from the public internet.

An index of the web may name anything. Before each connection, those of redirects too, every address that a name
resolves to is looked at, and the connection then goes to one that was: a name that changes its mind gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPResponse, InvalidURL
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from hypersd import __version__

REDIRECTS = 5
MOVED = (301, 302, 303, 307, 308)
LATER = (408, 425, 429, 500, 502, 503, 504)  # may be otherwise in a moment
OPTED_OUT = {"noai", "noimageai", "noindex", "noimageindex"}  # what owners write into X-Robots-Tag
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
HEADERS = {"User-Agent": f"hypersd/{__version__}", "Accept": "image/*"}


class Lost(Exception):
    """There is no picture at an address. `reason` is a word or two to be counted, `again` whether to try once more."""

    def __init__(self, reason: str, again: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.again = reason, again


@dataclass(frozen=True)
class Downloads:
    """The terms: at most so many bytes, so many seconds for each of two attempts; `private` opens private networks."""

    largest: int = 20_000_000
    seconds: float = 20.0
    private: bool = False

    def __call__(self, url: str) -> bytes:
        """What lies at an address. Raises Lost with one of gather's REASONS, from "not allowed" to "too large"."""
        try:
            return self._follow(url)
        except Lost as lost:
            if not lost.again:
                raise
        return self._follow(url)

    def _follow(self, url: str) -> bytes:
        """One attempt, through redirects."""
        deadline = time.monotonic() + self.seconds
        for _ in range(REDIRECTS + 1):
            try:
                found = self._get(url, deadline)
            except (OSError, HTTPException, ValueError) as error:
                late = isinstance(error, TimeoutError) or time.monotonic() >= deadline
                hopeless = isinstance(error, ValueError | InvalidURL)  # no address at all, or a false certificate
                raise Lost("too slow" if late else "unreachable", again=not hopeless) from None
            if isinstance(found, bytes):
                return found
            url = found
        raise Lost("gone")  # in circles

    def _get(self, url: str, deadline: float) -> bytes | str:
        """The body, or the address to go on to."""
        parts = urlsplit(url.strip())
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Lost("not allowed")
        place = HTTPConnection(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        line = [self._dial(place.host, place.port, deadline)]
        # A timeout of the socket's is for one read; what drips slowly forever is ended from outside.
        watch = threading.Timer(max(0.0, deadline - time.monotonic()), _hang_up, [line])
        watch.daemon = True
        watch.start()
        try:
            if parts.scheme == "https":
                line[0] = tls = _tls().wrap_socket(line[0], server_hostname=place.host, do_handshake_on_connect=False)
                tls.do_handshake()
            place.sock = line[0]
            place.request("GET", _target(parts), headers=HEADERS)
            with place.getresponse() as answer:
                found = self._read(answer, url)
            if time.monotonic() >= deadline:  # what was cut off here may look like the end
                raise TimeoutError
            return found
        finally:
            watch.cancel()
            line[0].close()

    def _dial(self, host: str, port: int, deadline: float) -> socket.socket:
        """A connection to the first address of a host that answers. Raises Lost if any of them is private."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if not self.private and not all(is_public(str(place[0])) for *_, place in found):
            raise Lost("not allowed")
        error: OSError = TimeoutError()
        for family, kind, protocol, _, place in found:
            wire = socket.socket(family, kind, protocol)
            try:
                wire.settimeout(max(0.01, deadline - time.monotonic()))
                wire.connect(place)
                return wire
            except OSError as problem:
                wire.close()
                error = problem
        raise error

    def _read(self, answer: HTTPResponse, url: str) -> bytes | str:
        if answer.status in MOVED and (place := answer.headers.get("Location")):
            return urljoin(url, place)
        if answer.status != 200:
            raise Lost("gone", again=answer.status in LATER)
        tags = ",".join(answer.headers.get_all("X-Robots-Tag", [])).lower().replace(":", ",").split(",")
        if OPTED_OUT & {tag.strip() for tag in tags}:
            raise Lost("opted out")
        if (answer.length or 0) > self.largest:
            raise Lost("too large")
        content = answer.read(self.largest + 1)
        if len(content) > self.largest:
            raise Lost("too large")
        if answer.length:  # as many bytes are missing
            raise ConnectionError("cut off")
        return content


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, also where IPv6 wraps one of IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ipaddress.ip_address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None)
        ip = inner or ip
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _target(parts: SplitResult) -> str:
    """Path and query as they may be sent: what is escaped stays, what has to be is."""
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    return path + (f"?{quote(parts.query, safe='/%:@!$&()*+,;=~-._?[]')}" if parts.query else "")


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _hang_up(line: list[socket.socket]) -> None:
    try:
        socket.socket.shutdown(line[0], socket.SHUT_RDWR)  # the plain one: TLS's own is not for other threads
    except OSError:  # it is closed already
        return
