"""String formats, as expressions of the whole text, and the bounds of integer formats.

They are narrower than the RFCs where that is what most programs read: no leap seconds, no lower
case in dates, no comments in addresses. Written in what ECMA 262, Rust and Python read alike.
"""

from __future__ import annotations

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    f"|{_LEAP_YEAR}-02-29)"
)
_TIME = (
    "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,6})?"
    "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = f"(?:{_BYTE}\\.){{3}}{_BYTE}"
_HEX = "[0-9a-fA-F]{1,4}"
_IPV6 = "(?:" + "|".join([
    f"(?:{_HEX}:){{7}}{_HEX}",
    *(f"(?:{_HEX}:){{{n}}}(?::{_HEX}){{1,{7 - n}}}" for n in range(1, 7)),
    f"(?:{_HEX}:){{1,7}}:",
    f":(?:(?::{_HEX}){{1,7}}|:)",
]) + ")"  # fmt: skip
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_NAME = "[a-zA-Z0-9_+-]+"
_URI_CHAR = "(?:[a-zA-Z0-9._~!$&'()*+,;=:@/-]|%[0-9a-fA-F]{2})"
_PATH = f"{_URI_CHAR}*(?:\\?(?:{_URI_CHAR}|\\?)*)?(?:#(?:{_URI_CHAR}|\\?)*)?"
_AUTHORITY = f"//(?:{_LABEL}(?:\\.{_LABEL})*|\\[{_IPV6}\\])(?::[0-9]{{1,4}})?"
_URI = f"[a-zA-Z][a-zA-Z0-9+.-]*:(?:{_AUTHORITY}(?:/{_PATH})?|[a-zA-Z0-9]{_PATH})"
_BASE64 = "(?:[a-zA-Z0-9+/]{4})*(?:[a-zA-Z0-9+/]{2}==|[a-zA-Z0-9+/]{3}=)?"
_BASE64URL = "(?:[a-zA-Z0-9_-]{4})*(?:[a-zA-Z0-9_-]{2,3})?"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"
_N = "[0-9]+"
_SMALL_UNITS = f"(?:{_N}H(?:{_N}M(?:{_N}S)?)?|{_N}M(?:{_N}S)?|{_N}S)"
_BIG_UNITS = f"(?:{_N}Y(?:{_N}M(?:{_N}D)?)?|{_N}M(?:{_N}D)?|{_N}D)"

STRINGS: dict[str, str] = {
    "date": _DATE,
    "date-time": f"{_DATE}T{_TIME}",
    "time": _TIME,
    "duration": f"P(?:{_BIG_UNITS}(?:T{_SMALL_UNITS})?|T{_SMALL_UNITS}|{_N}W)",
    "email": f"{_NAME}(?:\\.{_NAME})*@(?:{_LABEL}\\.)+[a-zA-Z]{{2,24}}",
    "hostname": f"{_LABEL}(?:\\.{_LABEL})*",
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "cidrv4": f"{_IPV4}/(?:3[0-2]|[12]?[0-9])",
    "cidrv6": f"{_IPV6}/(?:12[0-8]|1[01][0-9]|[1-9]?[0-9])",
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "uri": _URI,
    "uri-reference": f"(?:{_URI}|(?:/|\\./)?[a-zA-Z0-9._~-]*(?:[/?#]{_PATH})?)",
    "json-pointer": _POINTER,
    "relative-json-pointer": f"(?:0|[1-9][0-9]*)(?:#|{_POINTER})",
    "byte": _BASE64,
    "base64": _BASE64,
    "base64url": _BASE64URL,
    "jwt": "[a-zA-Z0-9_-]+\\.[a-zA-Z0-9_-]+\\.[a-zA-Z0-9_-]*",
    "decimal": "-?(?:0|[1-9][0-9]*)(?:\\.[0-9]+)?",
    "e164": "\\+[1-9][0-9]{6,14}",
}
"""Of these, `url` and the like are other spellings."""

ALIASES = {
    "url": "uri",
    "iri": "uri",
    "http-url": "uri",
    "iri-reference": "uri-reference",
    "idn-email": "email",
    "idn-hostname": "hostname",
    "ip-address": "ipv4",
    "guid": "uuid",
    "uuid1": "uuid",
    "uuid3": "uuid",
    "uuid4": "uuid",
    "uuid5": "uuid",
    "datetime": "date-time",
}
"""Other spellings; an international address that keeps to ASCII is one, too."""

ANNOTATIONS = frozenset({
    "binary", "char", "color", "cuid", "cuid2", "commonmark", "double", "emoji", "ends_with",
    "file", "float", "hex", "html", "includes", "json-string", "ksuid", "lowercase", "mac",
    "markdown", "multiline", "nanoid", "password", "path", "directory-path", "file-path",
    "phone", "regex_match", "starts_with", "textarea", "ulid", "uppercase", "xid",
})  # fmt: skip
"""Formats that say what a value is for, or whose form a `pattern` beside them tells."""

INTEGERS: dict[str, tuple[int, int]] = {
    **{f"int{n}": (-(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in (8, 16, 32, 64)},
    **{f"uint{n}": (0, 2**n - 1) for n in (8, 16, 32, 64)},
}


def format_regex(name: str) -> str | None:
    """The expression of a format's whole text; None if none is known."""
    return STRINGS.get(ALIASES.get(name, name))
