"""What must hold between the parts of gateway.yaml: names that point somewhere, ids used once, nothing unreachable.

Runs beside the schema on the document as written, so that one misspelt key does not hide the mistakes elsewhere. The
surprising thing: everything here therefore passes over values of the wrong shape, which the schema reports.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from extproc.config.document import KeyPath, MappingNode, Mistake, SequenceNode
from extproc.config.globs import glob_fault, hides, is_glob, meet
from extproc.config.schema import Admin, Listen


def check(root: MappingNode) -> Iterator[Mistake]:
    """Every mistake between parts of `root`."""
    yield from _ports(root)
    yield from _providers(root)
    yield from _provider_names(root)
    yield from _hidden_models(root)
    yield from _unknown_models(root)
    yield from _repeated_keys(root)


def nearest(name: str, known: list[str]) -> str:
    """How to mend `name`: the nearest of `known`, or all of them."""
    if near := get_close_matches(name[:256], known[:500], n=1):
        return f"did you mean `{near[0]}`?"
    listed = ", ".join(f"`{one}`" for one in known[:12])
    return f"known here: {listed}{', ...' if len(known) > 12 else ''}" if known else "nothing is known here"


def entries(root: MappingNode, section: str) -> Iterator[tuple[str, MappingNode]]:
    """The named entries of a section that have the shape of one."""
    named = root.get(section)
    if isinstance(named, MappingNode):
        yield from ((name, entry) for name, entry in named.items() if isinstance(entry, MappingNode))


def _names(root: MappingNode, section: str) -> list[str]:
    named = root.get(section)
    return list(named) if isinstance(named, MappingNode) else []


def _items(entry: MappingNode, key: str) -> Iterator[tuple[int, object]]:
    items = entry.get(key)
    if isinstance(items, SequenceNode):
        yield from enumerate(items)


def _texts(entry: MappingNode, key: str) -> list[tuple[int, str]]:
    return [(index, item) for index, item in _items(entry, key) if isinstance(item, str)]


def _ports(root: MappingNode) -> Iterator[Mistake]:
    listen, admin = root.get("listen"), root.get("admin")
    client = listen.get("port", Listen().port) if isinstance(listen, MappingNode) else Listen().port
    operator = admin.get("port", Admin().port) if isinstance(admin, MappingNode) else Admin().port
    if client == operator:
        path = ("admin", "port") if isinstance(admin, MappingNode) and "port" in admin else ("listen", "port")
        yield Mistake(path, "`listen` and `admin` have the same port", "give each a port of its own")


def _providers(root: MappingNode) -> Iterator[Mistake]:
    for name, provider in entries(root, "providers"):
        path = ("providers", name)
        if provider.get("kind") == "demo":
            for key in ("endpoint", "api_key", "headers", "ca"):
                if key in provider:
                    yield Mistake((*path, key), f"the built-in demo takes no `{key}`", "remove it")
        if provider.get("optional") is True and "api_key" not in provider:
            message = "`optional` needs an `api_key`: a provider without one is never missing anything"
            yield Mistake((*path, "optional"), message, "add `api_key`, or remove `optional`")
        endpoint = provider.get("endpoint")
        if "ca" in provider and isinstance(endpoint, str) and endpoint.startswith("http:"):
            yield Mistake(
                (*path, "ca"), "a `ca` for an endpoint without TLS", "write https in `endpoint`, or remove `ca`"
            )
        headers = provider.get("headers")
        seen: set[str] = set()
        for header in headers if isinstance(headers, MappingNode) else ():
            if header.lower() in seen:
                yield Mistake((*path, "headers", header), "the same header is given twice", "keep one of the two")
            seen.add(header.lower())


def _provider_names(root: MappingNode) -> Iterator[Mistake]:
    known = _names(root, "providers")

    def unknown(path: KeyPath, name: object) -> Iterator[Mistake]:
        if isinstance(name, str) and name not in known:
            yield Mistake(path, "no provider has this name", nearest(name, known))

    for model_name, model in entries(root, "models"):
        for index, target in _items(model, "targets"):
            if isinstance(target, MappingNode):
                yield from unknown(("models", model_name, "targets", index, "provider"), target.get("provider"))
    for team_name, team in entries(root, "teams"):
        yield from unknown(("teams", team_name, "default_provider"), team.get("default_provider"))
    for price in _names(root, "prices"):
        if "/" in price:
            yield from unknown(("prices", price), price.partition("/")[0])


def _hidden_models(root: MappingNode) -> Iterator[Mistake]:
    earlier: list[str] = []
    for name in _names(root, "models"):
        if not is_glob(name) or glob_fault(name):
            continue
        if by := next((glob for glob in earlier if hides(glob, name)), None):
            yield Mistake(("models", name), f"unreachable: `{by}` stands before it and matches all of it", "move it up")
        earlier.append(name)


def _unknown_models(root: MappingNode) -> Iterator[Mistake]:
    models = _names(root, "models")
    globs = [name for name in models if is_glob(name)]
    reachable = dict.fromkeys((*models, *(("*",) if models else ())), True)

    def judge(holder: MappingNode, path: KeyPath) -> Iterator[Mistake]:
        names = _texts(holder, "models")
        for index, name in names:
            wanted = name.removeprefix("!")
            if glob_fault(wanted):
                continue
            if wanted not in reachable:
                reachable[wanted] = any(meet(wanted, name) for name in (models if is_glob(wanted) else globs))
            if not reachable[wanted]:
                yield Mistake((*path, "models", index), "matches nothing in `models:`", nearest(wanted, models))
        if names and all(name.startswith("!") for _, name in names):
            yield Mistake((*path, "models"), "only denies, so nothing is allowed", 'put "*" before the denials')

    for team_name, team in entries(root, "teams"):
        yield from judge(team, ("teams", team_name))
        for index, key in _items(team, "keys"):
            if isinstance(key, MappingNode):
                yield from judge(key, ("teams", team_name, "keys", index))


def _repeated_keys(root: MappingNode) -> Iterator[Mistake]:
    first: dict[tuple[str, str], int] = {}
    for team_name, team in entries(root, "teams"):
        for index, key in _items(team, "keys"):
            if not isinstance(key, MappingNode):
                continue
            for field, what in (("id", "this id"), ("sha256", "the same key")):
                value = key.get(field)
                if not isinstance(value, str):
                    continue
                used = (field, value.lower() if field == "sha256" else value)
                if used in first:
                    path = ("teams", team_name, "keys", index, field)
                    message = f"{what} is used on line {first[used]} already"
                    yield Mistake(path, message, "every key has its own id and sha256")
                first.setdefault(used, key.marks[field][0])
