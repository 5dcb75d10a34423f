"""The supervisor's journal: what is not settled stays suspect, whatever happens while it is being settled."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from rich.console import Console

from extproc.config.snapshot import Snapshot
from extproc.config.source import parse
from extproc.server.journals import Journals
from extproc.server.reload import Loaded
from extproc.server.screen import Screen
from extproc.server.supervisor import Size, Supervisor

RAW = b"providers: {demo: {kind: demo}}\n"


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    file = tmp_path / "gateway.yaml"
    snapshot = parse(RAW, path=file, environ={}, require_secrets=True)
    assert isinstance(snapshot, Snapshot)
    made = Supervisor(file, Loaded(RAW, snapshot, {}), {}, Screen(Console()), Size(1, 1))
    made._journals = Journals(tmp_path)
    made._suspect = True
    return made


def answering(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, *, settled: bool, dies: bool = False) -> None:
    async def reconcile(files: object, timeout_s: float) -> bool:
        await asyncio.sleep(0)
        supervisor._suspect = supervisor._suspect or dies
        return settled

    monkeypatch.setattr(supervisor, "_reconcile", reconcile)


async def test_a_journal_that_is_settled_is_suspect_no_more(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(supervisor, monkeypatch, settled=True)
    assert await supervisor._settle(1)
    assert not supervisor._suspect


@pytest.mark.parametrize(("settled", "dies"), [(False, False), (True, True)])
async def test_a_worker_that_dies_meanwhile_or_a_ledger_that_is_away_leaves_it_suspect(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, settled: bool, dies: bool
) -> None:
    answering(supervisor, monkeypatch, settled=settled, dies=dies)
    assert not await supervisor._settle(1)
    assert supervisor._suspect


async def test_an_end_in_the_middle_leaves_it_suspect(supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = asyncio.Event()

    async def reconcile(files: object, timeout_s: float) -> bool:
        begun.set()
        await asyncio.sleep(60)
        return True

    monkeypatch.setattr(supervisor, "_reconcile", reconcile)
    settling = asyncio.create_task(supervisor._settle(1))
    await begun.wait()
    settling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await settling
    assert supervisor._suspect
