"""The one place that hides passwords, and what steers a terminal.

Whatever kvcache says of a place or of an error goes through here.

A password may hold any character, also those that divide a URL, so that nobody can say for sure where it ends. What is
hidden is rather too much than too little.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus

from kvcache.errors import said

HIDDEN = "…"
_LONGEST = 400  # characters of a foreign message
_SEARCHED = 4000  # of them, in which logins are searched for
_SHORTEST = 3  # characters of what is searched for in messages
_SECRET_NAMES = re.compile(r"pass|pwd|secret|token|key|auth|cred|sig|sas|code|connection|user|login|account", re.I)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/{1,3}")
# Bounded, so that no text takes long to search.
_WITH_LOGIN = re.compile(r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]{0,30}:/{1,3})[^\s'\"<>]{0,2000}@")
_WITH_QUERY = re.compile(
    r"(?<![A-Za-z0-9+.-])([A-Za-z][A-Za-z0-9+.-]{0,30}:/{1,3}[^\s'\"<>?#]{0,2000})\?[^\s'\"<>]{0,2000}"
)
_CUT_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}:/\S*\Z")
_PLAIN_USER = re.compile(r"[A-Za-z._-]{0,16}")  # as a person or service is called; a token is longer, and has digits


# C0, C1, line and paragraph separators, marks that turn the direction of what follows, and halves of characters.
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text in one line, in which nothing steers a terminal: line breaks are spaces, other such characters ``�``."""
    return _STEERING.sub(lambda found: " " if found[0].isspace() else "�", text)


def shown_url(url: str) -> str:
    """A URL as it may be printed: without password, token or query. What is no URL is given back."""
    links = url.split("::")  # fsspec chains URLs so; a password may hold colons too
    if len(links) > 1 and all(map(_URL.match, links[1:])):
        return "::".join(map(shown_url, links))
    begin = _URL.search(url)
    if begin is None:
        return url
    scheme, rest = url[: begin.end()], url[begin.end() :]
    login, at, place = rest.rpartition("@")
    if "?" in login or "#" in login:  # a password with these characters, or a query with an @: who can tell
        return f"{scheme}{HIDDEN}"
    place = re.split(r"[?#]", place)[0]
    if not at:
        return f"{scheme}{place}"
    user, colon, _ = login.partition(":")
    shown = f"{user}:" if colon and _PLAIN_USER.fullmatch(user) else ""
    return f"{scheme}{shown}{HIDDEN}@{place}"


def without_logins(text: str) -> str:
    """A text in which the logins and the queries of all URLs are hidden."""
    return _WITH_QUERY.sub(rf"\1?{HIDDEN}", _WITH_LOGIN.sub(rf"\1{HIDDEN}@", text))


def shown_value(value: object) -> str:
    """What somebody gave where something else was wanted, as it may be printed: it may be the URL of a store."""
    return repr(shown_url(value)) if isinstance(value, str) else without_logins(repr(value))


class Redactor:
    """Hides the secrets of a URL and of options in whatever text they appear, as they are or quoted.

    Args:
        url: whose user, password and query are secret.
        options: by name, also nested; secret are those whose name says so, and the logins of URLs among them.
    """

    def __init__(self, url: str = "", options: Mapping[str, Any] | None = None) -> None:
        given = {*_of_url(url), *_of_options(options or {})}
        forms = {form for secret in given for form in _forms(secret) if len(form) >= _SHORTEST}
        ordered = sorted(forms, key=len, reverse=True)  # the whole before its parts
        self._secrets = re.compile("|".join(map(re.escape, ordered))) if ordered else None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def text(self, text: str) -> str:
        """The text without them, in one line of bounded length."""
        if self._secrets is not None:
            text = self._secrets.sub(HIDDEN, text)
        text = printable(" ".join(text.split()))
        if len(text) > _SEARCHED:
            text = _CUT_URL.sub(HIDDEN, text[:_SEARCHED])
        text = without_logins(text)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}{HIDDEN}"

    def error(self, error: BaseException) -> str:
        """What an error says, without them."""
        words = self.text(said(error))
        return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _of_url(url: str) -> Iterable[str]:
    for link in {url, *url.split("::")}:
        begin = _URL.search(link)
        rest = link[begin.end() :] if begin else ""
        login, at, place = rest.rpartition("@")
        if re.search(r"[?#]", login):  # the @ may be one of the query's
            yield from (rest, place)
        if at:
            user, _, password = login.partition(":")
            yield from (login, user, password)
            yield from re.split(r"[/?#@:\[\]&=]", login)  # as a parser may have cut it
        for part in (rest, place):
            for query in re.split(r"[?#]", part)[1:]:
                yield query
                yield from _of_query(query)


def _of_query(query: str) -> Iterable[str]:
    for field in query.split("&"):
        name, _, value = field.partition("=")
        if _SECRET_NAMES.search(name) or len(value) > 8:
            yield value


def _of_options(options: Mapping[str, Any]) -> Iterable[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _of_options(value)
        elif isinstance(value, (list, tuple)):
            yield from _of_options({f"{name}{i}": part for i, part in enumerate(value)})
        elif isinstance(value, bytes):
            yield value.decode(errors="replace")
        elif isinstance(value, str):
            yield from _of_url(value)
            if _SECRET_NAMES.search(str(name)):
                yield value


def _forms(secret: str) -> Iterable[str]:
    """As it was given, and as something that parses or writes URLs may write it."""
    for plain in {secret, unquote(secret), unquote_plus(secret)}:
        yield from (plain, quote(plain, safe=""), quote(plain), quote_plus(plain), repr(plain)[1:-1])
