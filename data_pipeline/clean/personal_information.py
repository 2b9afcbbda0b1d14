"""Personal information: e-mail addresses and public IP addresses become examples.

What counts as an address is what datatrove's ``PIIFormatter`` takes for one (a test compares the places). Two things
differ. The example is chosen by a hash of the address, not in turn: the same address becomes the same example wherever
it stands, and the output does not depend on what was cleaned before. And work is linear in the text: an address is
looked for around each ``@``, where datatrove's expression tries every letter of a long run of letters (a megabyte of
base64 takes it hours).

The examples are addresses that are reserved for documentation (RFC 2606, RFC 5737), so replacing twice is replacing
once.
"""

from __future__ import annotations

import ipaddress
import re
import zlib

from data_pipeline.clean.settings import PersonalInformationSettings

EMAILS = ("email@example.com", "firstname.lastname@example.org", "name@example.net")
IPS = ("192.0.2.1", "198.51.100.2", "203.0.113.3")

_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
_BYTE = r"(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_DOMAIN = re.compile(rf"@(?:(?:{_LABEL}\.)+{_LABEL}|\[(?:{_BYTE}\.){{3}}(?:{_BYTE}|[A-Za-z0-9-]*[A-Za-z0-9]:)])")
_FIRST = re.compile(rf"\b{_ATOM}")
_IP = re.compile(rf"(?:{_BYTE}\.){{3}}{_BYTE}")
_MAYBE_IP = re.compile(r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")
_NOT_LOCAL = re.compile(rf"[^.{_ATOM[1:-1]}]")


def _example(address: str, examples: tuple[str, ...]) -> str:
    return examples[zlib.crc32(address.encode()) % len(examples)]


def _local_part(text: str, at: int, floor: int) -> int:
    """Where the local part that ends at ``at`` begins, at or after ``floor``; ``at`` itself when there is none."""
    start = at
    while start > floor and not _NOT_LOCAL.match(text, start - 1):
        start -= 1
    # Atoms are divided by single dots: only what follows the last pair of dots can be one local part.
    double = text.rfind("..", start, at)
    if double >= 0:
        start = double + 2
    if text[at - 1 : at] == ".":
        return at
    first = _FIRST.search(text, start, at)
    return first.start() if first else at


def replace_emails(text: str) -> str:
    """``text`` with examples for e-mail addresses."""
    parts, done = [], 0
    at = text.find("@")
    while at >= 0:
        domain = _DOMAIN.match(text, at)
        start = _local_part(text, at, done) if domain else at
        if domain and start < at:
            address = text[start : domain.end()]
            parts += [text[done:start], address if address in EMAILS else _example(address, EMAILS)]
            done = domain.end()
        at = text.find("@", max(at + 1, done))
    return "".join(parts) + text[done:] if parts else text


def _example_ip(match: re.Match[str]) -> str:
    address = match.group()
    try:
        public = ipaddress.ip_address(address).is_global
    except ValueError:  # leading zeros
        public = False
    return _example(address, IPS) if public else address


def replace_ips(text: str) -> str:
    """``text`` with examples for IPv4 addresses that are reachable from the Internet."""
    return _IP.sub(_example_ip, text) if _MAYBE_IP.search(text) else text


def replace_personal_information(text: str, settings: PersonalInformationSettings) -> str:
    """``text`` with examples for what the settings name."""
    if settings.emails and "@" in text:
        text = replace_emails(text)
    return replace_ips(text) if settings.public_ips else text
