"""Who may talk to the server: its token, the pages that may use it, and the names it answers to."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Access:
    """token: empty for none. origins: pages of other servers that may connect, as "https://host:port".

    local: the server is bound to this machine alone. Then it answers only to names of this machine: without that, a
    page anywhere could reach it through a name of its own that resolves to 127.0.0.1.
    """

    token: str = ""
    origins: tuple[str, ...] = ()
    local: bool = True

    def knows(self, token: str) -> bool:
        """Whether it is the token, in a time that tells nothing about it."""
        return not self.token or hmac.compare_digest(self.token.encode(), token.encode("utf-8", "replace"))

    def admits(self, headers: Mapping[str, str]) -> bool:
        """Whether a request comes from the server's own page, an allowed one, or no page at all."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.local and not is_local(_name_of(f"//{host}")):
            return False
        return origin is None or origin in self.origins or urlsplit(origin).netloc == host

    def bearer(self, headers: Mapping[str, str]) -> bool:
        """Whether a request's Authorization header carries the token."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        return not self.token or (scheme.lower() == "bearer" and self.knows(token.strip()))


def is_local(host: str) -> bool:
    """Whether a name or address is this machine's alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _name_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
