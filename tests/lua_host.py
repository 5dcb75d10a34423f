"""A small fake of Envoy around render/lua/answer.lua, which runs in LuaJIT as it is.

The surprising thing: like Envoy's, its chunks may be touched only until the next one is asked for, the last one till
the end; a script that holds on to one fails here as it would there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from lupa.luajit21 import LuaRuntime

from extproc.render.clusters import script

FAKE_ENVOY = b"""
function run(decision, attempts, headers, chunks)
  local metadata = { ["extproc.decision"] = decision, ["extproc.attempts"] = attempts }
  local sent, current, handle, spaces, map = {}, 0, {}, {}, {}
  function spaces:get(space) return metadata[space] end
  function spaces:set(space, key, value)
    metadata[space] = metadata[space] or {}
    metadata[space][key] = value
  end
  function map:get(name) return headers[name] end
  function map:replace(name, value) headers[name] = value end
  function map:remove(name) headers[name] = nil end
  function handle:headers() return map end
  function handle:streamInfo() return { dynamicMetadata = function() return spaces end } end
  function handle:bodyChunks()
    return function()
      if chunks[current + 1] == nil then return nil end
      current = current + 1
      local number, chunk = current, {}
      sent[number] = chunks[number]
      local function alive() assert(number == current, "object used outside of proper scope") end
      function chunk:length() alive() return #sent[number] end
      function chunk:getBytes(from, count) alive() return string.sub(sent[number], from + 1, from + count) end
      function chunk:setBytes(bytes) alive() sent[number] = bytes end
      return chunk
    end
  end
  envoy_on_response(handle)
  for number = current + 1, #chunks do sent[number] = chunks[number] end
  return sent, metadata
end
"""


@cache
def _runtime() -> Any:
    runtime = LuaRuntime(encoding=None)
    runtime.execute(script("answer.lua").encode())
    runtime.execute(FAKE_ENVOY)
    return runtime


def _table(values: Mapping[str, Any]) -> Any:
    def plain(value: Any) -> Any:
        return value.encode() if isinstance(value, str) else value

    return _runtime().table_from({name.encode(): plain(value) for name, value in values.items()})


class Answered:
    """What the script made of one response."""

    def __init__(self, status: int, decision: Mapping[str, Any], chunks: Sequence[bytes], **more: Any) -> None:
        headers = {":status": str(status), "content-type": "text/event-stream", **more.get("headers", {})}
        self._headers = _table(headers)
        decided = {"path": "/v1/x", "stream": True, "dialect": "openai", "request_id": "id-1", **decision}
        attempts = _table(more["attempts"]) if "attempts" in more else None
        sent, self._metadata = (
            _runtime().globals().run(_table(decided), attempts, self._headers, _runtime().table_from(list(chunks)))
        )
        self.chunks: list[bytes] = list(sent.values())
        self.body = b"".join(self.chunks)

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self._headers.items()}

    def noted(self, space: str = "extproc.usage") -> dict[str, Any]:
        found = self._metadata[space.encode()]
        pairs = {} if found is None else {name.decode(): value for name, value in found.items()}
        return {name: value.decode() if isinstance(value, bytes) else value for name, value in pairs.items()}
