"""What a value in gateway.yaml may be: names, globs, addresses, URLs, money, seconds, references to secrets.

The types that `schema`'s models are made of. The surprising thing: no message here repeats the value that it refuses,
because a person may have written a secret where something else belongs.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from decimal import Decimal
from typing import Annotated, Any, NoReturn
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from extproc.config.globs import glob_fault
from extproc.config.snapshot import SecretRef
from extproc.providers.kinds import CREDENTIAL_HEADERS

MISTAKE = "extproc"
"""The type of the errors that validators here raise; `ctx` holds `message` and `fix`, both safe to print."""

_PROVIDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$&'*+.^_`|~-]{1,128}")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_EMPTY_KEY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
_OWN_HEADERS = frozenset(
    (
        *CREDENTIAL_HEADERS,
        *("cookie", "host", "content-length", "content-type", "content-encoding", "accept-encoding", "expect"),
        *("transfer-encoding", "connection", "keep-alive", "te", "trailer", "upgrade"),
    ),
)
_MAX_NAME = 256


def refuse(message: str, fix: str) -> NoReturn:
    """Raise a mistake of the file; neither text may hold a value that could be a secret."""
    raise PydanticCustomError(MISTAKE, "{message}", {"message": message, "fix": fix})


def unprintable(text: str) -> bool:
    """True where `text` holds a line break, a control or an invisible formatting character."""
    return any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in text)


def _name(value: str) -> str:
    if not value:
        refuse("the name is empty", "give it a name")
    if len(value) > _MAX_NAME:
        refuse(f"the name is longer than {_MAX_NAME} characters", "shorten it")
    if unprintable(value):
        refuse("the name holds a line break or a control character", "use printable characters only")
    if value != value.strip():
        refuse("the name begins or ends with a space", "remove the space; names match exactly")
    return value


def _name_without_slash(value: str) -> str:
    if "/" in _name(value):
        refuse("the name holds a `/`", "use letters, digits, `-`, `_` and `.`")
    return value


def _provider_name(value: str) -> str:
    if not _PROVIDER_NAME.fullmatch(_name_without_slash(value)):
        refuse("the name holds characters that a header or a file's name cannot", "use letters, digits, `-`, `_`, `.`")
    return value


def _glob(value: str) -> str:
    if fault := glob_fault(value):
        refuse(f"the pattern {fault}", "write a name, or a glob such as `gpt-*`")
    return _name(value)


def _model_name(value: str) -> str:
    if value.startswith("!"):
        refuse("a model's name cannot begin with `!`", "`!` denies, in the lists of teams and keys")
    return _glob(value)


def _allowance(value: str) -> str:
    _glob(value.removeprefix("!"))
    return value


def _price_key(value: str) -> str:
    provider, slash, model = value.partition("/")
    if not (provider and slash):
        refuse("a price is named `provider/model`", 'write for example "openai/gpt-5*"')
    _glob(model)
    return value


def _ip_address(value: str) -> str:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        refuse("not an IP address", "write for example 127.0.0.1, or 0.0.0.0 for every interface")
    return value


def _loopback(value: str) -> str:
    if not ipaddress.ip_address(_ip_address(value)).is_loopback:
        message = "the admin port has no login in this version, so only this machine may reach it"
        refuse(message, "write 127.0.0.1, and reach it through a tunnel or a sidecar")
    return value


def _sha256(value: str) -> str:
    if not _SHA256.fullmatch(value):
        refuse("not a sha256 in hex: 64 characters of 0-9 and a-f", "`extproc keys hash` prints it for a key")
    if value.lower() == _EMPTY_KEY:
        refuse("the sha256 of an empty key", "hash the key itself: `extproc keys hash`")
    return value.lower()


def _endpoint(value: str) -> str:
    fix = "write for example https://host:8000/v1"
    try:
        parts = urlsplit(value)
        port, host = parts.port, parts.hostname
    except ValueError:
        refuse("not a URL", fix)
    if unprintable(value) or " " in value or "\\" in value:
        refuse("a URL cannot hold spaces, backslashes or control characters", fix)
    if parts.username is not None or parts.password is not None:
        refuse("a user or password in a URL", "remove it; credentials go to `api_key: {env: NAME}`")
    if parts.scheme not in ("http", "https"):
        refuse("the scheme must be http or https", fix)
    if "?" in value or "#" in value:
        refuse("a query or fragment in a base URL", "remove everything from `?` or `#` on")
    if not host or port == 0 or (":" not in host and not _HOST.fullmatch(host)):
        refuse("no valid host or port in the URL", fix)
    if any(part in ("", ".", "..") for part in parts.path.strip("/").split("/")) and parts.path.strip("/"):
        refuse("a path with empty, `.` or `..` parts", fix)
    return value


def sql_url(value: str) -> str:
    """`value`, if it names a SQLite file or a PostgreSQL database; a password is judged by the caller."""
    try:
        url = make_url(value)
    except (ArgumentError, ValueError):
        refuse("not a database URL", 'write "sqlite:///extproc.db" or "postgresql://user@host/name"')
    if url.drivername not in ("sqlite", "postgresql", "postgresql+psycopg"):
        refuse("only SQLite and PostgreSQL hold the ledger", "begin with sqlite:/// or postgresql://")
    if url.drivername == "sqlite" and (url.host or url.database in (None, "", ":memory:")):
        refuse("the ledger needs a file; one in memory is lost", 'write "sqlite:///extproc.db"')
    if url.drivername != "sqlite" and not url.database:
        refuse("no database is named", 'write "postgresql://user@host/name"')
    return value


def _header_name(value: str) -> str:
    if not _HEADER_NAME.fullmatch(value):
        refuse("not a header's name", "use letters, digits and `-`")
    if value.lower() in _OWN_HEADERS or value.lower().startswith(("x-envoy-", "x-extproc-")):
        refuse("this header is the gateway's own", "remove it; a credential goes to `api_key: {env: NAME}`")
    return value


def _header_value(value: str) -> str:
    if any(not " " <= char <= "~" for char in value) or value != value.strip():
        refuse("a header's value with line breaks, control or non-ASCII characters", "use one line of printable ASCII")
    return value


def _decimal(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        refuse("expected a number", "write for example 0.25, without quotes")
    number = Decimal(value)
    if not number.is_finite() or number < 0:
        refuse("a price cannot be negative", "write USD per million tokens, 0 or more")
    if number > 1_000_000 or (number and number.adjusted() < -12):
        refuse("not a likely price", "write USD per million tokens")
    return number


def _seconds(value: object) -> object:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        refuse("expected a number of seconds", "write for example 60, without quotes or unit")
    if not (isinstance(value, int) or value.is_finite()) or not Decimal("0.001") <= value <= 86400:
        refuse("seconds must be more than 0, and a day at most", "write for example 60")
    return float(value)


def reference(value: object) -> SecretRef:
    """`{env: NAME}` or `{file: PATH}`, the path as written; anything else is a mistake that is never repeated."""
    match value:
        case str():
            fix = "write {env: NAME} or {file: PATH}, and have a new one issued if it was a real secret"
            refuse("a secret must not stand in the file", fix)
        case {"env": str(env), **rest} if not rest:
            if not _ENV_NAME.fullmatch(env):
                refuse("`env` takes the name of a variable, not its value", "write for example {env: OPENAI_API_KEY}")
            return SecretRef("env", env)
        case {"file": str(file), **rest} if not rest:
            if not file or unprintable(file):
                refuse("`file` takes the path of a file", "write for example {file: /run/secrets/openai}")
            return SecretRef("file", file)
    refuse("a secret comes from exactly one of `env` and `file`", "write {env: NAME} or {file: PATH}")


def _sql(value: object) -> str | SecretRef:
    if not isinstance(value, str):
        return reference(value)
    url = make_url(sql_url(value))
    if url.password or "password" in url.query:
        fix = "write `sql: {env: NAME}`, the variable holding the whole URL, or use PGPASSFILE"
        refuse("a password must not stand in the file", fix)
    return value


_REFERENCE_SCHEMA: dict[str, Any] = {
    "description": "Where a secret comes from: a variable or a file. Never the secret itself.",
    "oneOf": [
        {
            "type": "object",
            "properties": {"env": {"type": "string", "description": "The variable's name.", "minLength": 1}},
            "required": ["env"],
            "additionalProperties": False,
        },
        {
            "type": "object",
            "properties": {
                "file": {"type": "string", "description": "A path, relative to this file's folder.", "minLength": 1},
            },
            "required": ["file"],
            "additionalProperties": False,
        },
    ],
}
_USD_SCHEMA = {"type": "number", "minimum": 0}

Name = Annotated[str, AfterValidator(_name)]
PlainName = Annotated[str, AfterValidator(_name_without_slash)]
ProviderName = Annotated[str, AfterValidator(_provider_name)]
ModelName = Annotated[str, AfterValidator(_model_name)]
Allowance = Annotated[str, AfterValidator(_allowance)]
PriceKey = Annotated[str, AfterValidator(_price_key)]
HeaderName = Annotated[str, AfterValidator(_header_name)]
HeaderValue = Annotated[str, AfterValidator(_header_value)]
IpAddress = Annotated[str, AfterValidator(_ip_address)]
Loopback = Annotated[str, AfterValidator(_loopback)]
BaseUrl = Annotated[str, AfterValidator(_endpoint)]
Sha256 = Annotated[str, AfterValidator(_sha256)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, BeforeValidator(_seconds), WithJsonSchema({"type": "number", "exclusiveMinimum": 0})]
Usd = Annotated[Decimal, BeforeValidator(_decimal), WithJsonSchema(_USD_SCHEMA)]
SecretReference = Annotated[SecretRef, PlainValidator(reference), WithJsonSchema(_REFERENCE_SCHEMA)]
SqlAddress = Annotated[
    str | SecretRef,
    PlainValidator(_sql),
    WithJsonSchema({"anyOf": [{"type": "string"}, _REFERENCE_SCHEMA]}),
]
