"""The editor that masks private data: e-mail addresses and public IP addresses, nothing else, and counts them."""

import ipaddress
import re

EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}\b")
IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.])")
MASKED_EMAIL = "email@example.org"
MASKED_IP = "192.0.2.1"
"""From the block that RFC 5737 keeps for documentation."""
EXAMPLE_DOMAINS = ("example.org", "example.com", "example.net")


def mask_private(text: str) -> tuple[str, dict[str, int]]:
    """The text with addresses replaced, and how many of each; a text without any comes back as it is."""
    counts: dict[str, int] = {}

    def mask_email(match: re.Match[str]) -> str:
        if match[0].lower().endswith(EXAMPLE_DOMAINS):
            return match[0]
        counts["emails_masked"] = counts.get("emails_masked", 0) + 1
        return MASKED_EMAIL

    def mask_ip(match: re.Match[str]) -> str:
        if not is_public(match[0]):
            return match[0]
        counts["ips_masked"] = counts.get("ips_masked", 0) + 1
        return MASKED_IP

    if "@" in text:
        text = EMAIL.sub(mask_email, text)
    return IPV4.sub(mask_ip, text), counts


def is_public(address: str) -> bool:
    """Whether an IPv4 address may belong to somebody: neither private, reserved, nor a documentation block."""
    try:
        return ipaddress.IPv4Address(address).is_global
    except ipaddress.AddressValueError:
        return False
