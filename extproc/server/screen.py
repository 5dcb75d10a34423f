"""What a person sees while the gateway runs: how to call it, and each request as it passes.

Fed by the supervisor. The surprising thing: without a terminal it prints plain lines, one for each request, so the same
command serves a laptop and a container's log.
"""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.syntax import Syntax

from extproc.config.snapshot import Snapshot
from extproc.errors import Dialect
from extproc.providers.kinds import KINDS
from extproc.server.watch import Passed

_COLOURS = {"ok": "green", "refused": "yellow", "failed": "red", "client_left": "magenta", "broken": "red"}
QUICKSTART_KEY = "sk-extproc-quickstart"


class Screen:
    """Prints to `console`, in colour where it is a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def welcome(self, snapshot: Snapshot) -> None:
        """Where the gateway listens and what to type next."""
        base = f"http://{_reachable(snapshot.listen.address)}:{snapshot.listen.port}"
        key = QUICKSTART_KEY if snapshot.key_for(QUICKSTART_KEY) else "YOUR_KEY"
        served = ", ".join(f"{model.name} ({_providers(snapshot, model.name)})" for model in _models(snapshot))
        self._line(f"extproc serves {base}  models: {served}")
        self._line(f"health and metrics: http://{snapshot.admin.address}:{snapshot.admin.port}/readyz /metrics")
        for title, language, text in _examples(snapshot, base, key):
            if self._console.is_terminal:
                self._console.print(Panel(Syntax(text, language, theme="ansi_dark"), title=title, title_align="left"))
            else:
                self._line(f"\n# {title}\n{text}")
        self._line("\nRequests, as they pass (Ctrl-C ends):")

    def passed(self, request: Passed) -> None:
        """One request that has finished."""
        if not self._console.is_terminal:
            self._line(_plain(request))
            return
        colour = _COLOURS.get(request.outcome, "white")
        self._console.print(f"[{colour}]{request.status}[/] {escape(_described(request))}", highlight=False)

    def note(self, text: str) -> None:
        """Something that happened to the gateway itself."""
        self._line(text)

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _models(snapshot: Snapshot) -> list:  # type: ignore[type-arg]
    return [*snapshot.models.values(), *(model for _, model in snapshot.globs)]


def _providers(snapshot: Snapshot, name: str) -> str:
    model = next(model for model in _models(snapshot) if model.name == name)
    return " > ".join(dict.fromkeys(target.provider for target in model.targets))


def _reachable(address: str) -> str:
    return "127.0.0.1" if address in ("0.0.0.0", "::") else address  # noqa: S104  (compared, not bound)


def _examples(snapshot: Snapshot, base: str, key: str) -> list[tuple[str, str, str]]:
    """(title, language, text) for each client that some model of the file can answer."""
    speaks: dict[Dialect, str] = {}
    for model in snapshot.models.values():
        for target in model.targets:
            for dialect in KINDS[snapshot.providers[target.provider].kind].dialects:
                speaks.setdefault(dialect, model.name)
    examples: list[tuple[str, str, str]] = []
    if (model_name := speaks.get(Dialect.OPENAI)) is not None:
        body = f'{{"model": "{model_name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        curl = (
            f"curl {base}/v1/chat/completions -H 'authorization: Bearer {key}' \\\n"
            f"  -H 'content-type: application/json' -d '{body}'"
        )
        openai = (
            "from openai import OpenAI\n"
            f'client = OpenAI(base_url="{base}/v1", api_key="{key}")\n'
            f'answer = client.chat.completions.create(model="{model_name}", '
            'messages=[{"role": "user", "content": "Hello"}])\n'
            "print(answer.choices[0].message.content)"
        )
        examples += [("curl", "bash", curl), ("OpenAI SDK", "python", openai)]
    if (model_name := speaks.get(Dialect.ANTHROPIC)) is not None:
        anthropic = (
            "from anthropic import Anthropic\n"
            f'client = Anthropic(base_url="{base}", api_key="{key}")\n'
            f'answer = client.messages.create(model="{model_name}", max_tokens=256, '
            'messages=[{"role": "user", "content": "Hello"}])\n'
            "print(answer.content[0].text)"
        )
        examples.append(("Anthropic SDK", "python", anthropic))
    return examples


def _described(request: Passed) -> str:
    parts = [
        f"{request.endpoint or '-':<12}",
        f"{request.alias or '-'} -> {request.provider}/{request.model}" if request.provider else (request.alias or "-"),
        f"{request.team or '-'}/{request.key_id or '-'}",
        f"{request.duration_ms:.0f} ms",
    ]
    if request.input_tokens or request.output_tokens:
        about = "~" if request.estimated else ""
        parts.append(f"{about}{request.input_tokens} in, {about}{request.output_tokens} out")
    if request.unpriced:
        parts.append("unpriced")
    elif request.cost_nusd is not None:
        parts.append(f"{request.cost_nusd / 1e9:.6f} USD")
    if request.attempts > 1:
        parts.append(f"{request.attempts} attempts")
    if request.code or request.outcome not in ("ok", "refused"):
        parts.append(request.code or request.outcome)
    return "  ".join(_printable(part) for part in parts)


def _printable(text: str) -> str:
    """A client chose some of this text, and it goes to a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _plain(request: Passed) -> str:
    return f"{request.request_id} {request.status} {request.outcome}  {_described(request)}"
