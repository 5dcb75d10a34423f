"""What a person sees while the gateway runs: how to call it, and each request as it passes.

Fed by the supervisor. The surprising thing: without a terminal it prints plain lines, one for each request, so the same
command serves a laptop and a container's log. On a terminal it prints no more of them than a person can follow.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from rich.console import Console, RenderableType
from rich.syntax import Syntax
from rich.text import Text

from extproc.config.snapshot import Model, Snapshot
from extproc.errors import Dialect
from extproc.providers.kinds import KINDS
from extproc.server.watch import Passed

_log = logging.getLogger(__name__)
_COLOURS = {"ok": "green", "refused": "yellow", "failed": "red", "client_left": "magenta", "broken": "red"}
_LISTED_MODELS = 20
_LINES_PER_SECOND = 40
"""On a terminal. A line there costs more CPU than deciding on the request that it tells of."""
QUICKSTART_KEY = "sk-extproc-quickstart"


class Screen:
    """Prints to `console`, in colour where it is a terminal. `clock` counts seconds."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._second = 0
        self._lines = 0

    def welcome(self, snapshot: Snapshot) -> None:
        """Where the gateway listens and what to type next."""
        base = f"http://{_reachable(snapshot.listen.address)}:{snapshot.listen.port}"
        key = QUICKSTART_KEY if snapshot.key_for(QUICKSTART_KEY) else "YOUR_KEY"
        self.note(f"extproc serves {base}  models: {_served(snapshot)}")
        self.note(
            f"health and metrics: http://{_reachable(snapshot.admin.address)}:{snapshot.admin.port}/readyz /metrics"
        )
        for title, language, text in _examples(snapshot, base, key):
            self._print(Text(f"\n# {title}", "bold"))
            # No frame and no padding: these lines are there to be copied, from a terminal of any width.
            coloured = Syntax("", language, theme="ansi_dark").highlight(text)
            coloured.rstrip()
            self._print(coloured)
        self.note("\nRequests, as they pass (Ctrl-C ends):")

    def passed(self, request: Passed) -> None:
        """One request that has finished."""
        if not self._console.is_terminal:
            self.note(f"{_printable(request.request_id)} {request.status} {request.outcome}  {_described(request)}")
        elif self._may_print():
            colour = _COLOURS.get(request.outcome, "white")
            # Text, never markup: a client chose some of these words.
            self._print(Text.assemble((str(request.status), colour), " ", self._encodable(_described(request))))

    def note(self, text: str) -> None:
        """Something that happened to the gateway itself."""
        self._print(Text(self._encodable(text)))

    def _may_print(self) -> bool:
        second = int(self._clock())
        if second != self._second:
            hidden = self._lines - _LINES_PER_SECOND
            self._second, self._lines = second, 0
            if hidden > 0:
                self.note(f"... and {hidden} more")
        self._lines += 1
        return self._lines <= _LINES_PER_SECOND

    def _encodable(self, text: str) -> str:
        encoding = self._console.encoding
        return text.encode(encoding, "replace").decode(encoding)

    def _print(self, what: RenderableType) -> None:
        """Whoever reads this may be gone (`| head`, a closed terminal). The gateway is not for that reason."""
        try:
            if isinstance(what, Text) and not self._console.is_terminal:
                if not self._console.quiet:  # straight to the file: a tenth of the CPU, for the logs of busy gateways
                    self._console.file.write(what.plain + "\n")
                    self._console.file.flush()
            else:
                self._console.print(what, soft_wrap=isinstance(what, Text))
        except (OSError, SystemExit):  # rich makes SystemExit of a broken pipe
            self._console.quiet = True
            _log.warning("nobody reads standard output any more; the gateway goes on without it")


def _served(snapshot: Snapshot) -> str:
    models = list(_models(snapshot))
    shown = ", ".join(f"{model.name} ({_providers(model)})" for model in models[:_LISTED_MODELS])
    more = len(models) - _LISTED_MODELS
    return f"{shown} and {more} more" if more > 0 else shown


def _models(snapshot: Snapshot) -> Iterator[Model]:
    yield from snapshot.models.values()
    yield from (model for _, model in snapshot.globs)


def _providers(model: Model) -> str:
    return " > ".join(dict.fromkeys(target.provider for target in model.targets))


def _reachable(address: str) -> str:
    """The address as this machine's clients write it."""
    if address in ("0.0.0.0", "::"):  # noqa: S104  (compared, not bound)
        return "127.0.0.1"
    return f"[{address}]" if ":" in address else address


def _examples(snapshot: Snapshot, base: str, key: str) -> list[tuple[str, str, str]]:
    """(title, language, text) for each client that some model of the file can answer."""
    speaks: dict[Dialect, str] = {}
    for model in _models(snapshot):
        name = model.name if model.name in snapshot.models else "YOUR_MODEL"  # a glob is no model's name
        for target in model.targets:
            for dialect in KINDS[snapshot.providers[target.provider].kind].dialects:
                speaks.setdefault(dialect, name)
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
