"""One HTTP/2 connection on libnghttp2 (PyPI `ngh2`): bytes in, events to its streams, bytes out.

Made by `ngh2_transport` for each peer; calls are `ngh2_stream`'s. The surprising thing: resets are counted here and not
by nghttp2. Envoy resets each ext_proc stream when it is done with it, thousands in a second, so only resets of streams
that said nothing are a flood. What else a hostile peer can make this process keep is bounded by `Limits`: bytes of
messages that never become whole, answers that are never read, streams that are never ended. Frames that only cost time
(SETTINGS, PING, empty DATA, CONTINUATION, priorities, headers) meet nghttp2's own limits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, cast

import ngh2

from extproc.server.ngh2_stream import UNKNOWN, Limits, Stream, Wire
from extproc.server.transport import Method

_log = logging.getLogger(__name__)

_STREAM_WINDOW_BYTES = 1 << 20
_CONNECTION_WINDOW_BYTES = 1 << 26
_WRITE_BUFFER_BYTES = 1 << 20
_MAX_STREAMS = 10_000
_MAX_HEADER_BYTES = 1 << 16
_EMPTY_RESET_BURST, _EMPTY_RESETS_PER_S = 1_000.0, 33.0
"""nghttp2's own limit for all resets."""
_DRAIN_PING = b"draining"
_CONFIGURATION = ngh2.Configuration(
    auto_window_update=False,
    stream_reset_rate_limit=(1 << 32, 1 << 32),
    max_inbound_header_list_size=_MAX_HEADER_BYTES,
    max_inbound_header_count=256,
)
_SETTINGS = {
    ngh2.Setting.MAX_CONCURRENT_STREAMS: _MAX_STREAMS,
    ngh2.Setting.INITIAL_WINDOW_SIZE: _STREAM_WINDOW_BYTES,
    ngh2.Setting.MAX_HEADER_LIST_SIZE: _MAX_HEADER_BYTES,
}


class Connection(asyncio.Protocol):
    """Serves `methods`, by path, to one peer. It is in `all_` while it lives; `closed` is done afterwards."""

    def __init__(self, methods: Mapping[bytes, Method], limits: Limits, all_: set[Connection]) -> None:
        self._methods = methods
        self._limits = limits
        self._all = all_
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._h2 = ngh2.Connection(ngh2.Role.SERVER, _CONFIGURATION)
        self._wire = Wire(self._h2, limits, self._flush)
        self._streams: dict[int, Stream] = {}
        self._transport: asyncio.Transport | None = None
        self._closing = False
        self._may_write = True
        self._empty_resets, self._empty_resets_at = _EMPTY_RESET_BURST, self._loop.time()
        self._heard = True
        self._pinged = False
        self._timer: asyncio.TimerHandle | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._all.add(self)
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self.cut()
            return
        self._transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
        self._h2.initiate_connection(_SETTINGS)
        self._h2.set_local_window_size(_CONNECTION_WINDOW_BYTES)
        self._flush()
        self._timer = self._loop.call_later(self._limits.ping_every_s, self._tick)

    def connection_lost(self, exc: Exception | None) -> None:
        self._all.discard(self)
        self._closing = True
        self._transport = None
        if self._timer is not None:
            self._timer.cancel()
        for stream in self._streams.values():
            stream.release()
        self._streams.clear()
        self._wire.flush = _nothing  # and so no cycle is left: what nghttp2 holds need not wait for the collector
        if not self.closed.done():
            self.closed.set_result(None)

    def pause_writing(self) -> None:
        """The peer does not read. Nothing more is read from it either: each frame could ask for one more answer."""
        self._may_write = False
        if self._transport is not None and not self._closing:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._may_write = True
        self._heard = True
        self._flush()
        if self._may_write and self._transport is not None and not self._closing:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        self._heard = True
        try:
            self._h2.receive_data(data)
            for event in self._h2.events():
                self._on_event(event)
        except ngh2.NGH2Error as error:
            _log.warning("a peer's HTTP/2 connection is closed: %s", error)
            self.close()
        except Exception:
            _log.exception("a peer's HTTP/2 connection is closed: an error of ours")
            self.close()
        self._flush()

    # Ending

    def shut_down(self) -> None:
        """Say that the connection is ending (RFC 9113 section 6.8). Streams that cross this notice are still taken.

        When the peer has seen it, new streams are ignored, and after the last open one the connection is closed.
        """
        try:
            self._h2.send_shutdown_notice()
            self._h2.ping(_DRAIN_PING)
        except ngh2.NGH2Error:
            self.close()
        self._flush()

    def close(self) -> None:
        """Write what was handed to the socket and close."""
        self._closing = True
        if self._transport is not None:
            self._transport.close()

    def cut(self) -> None:
        """Close, and write nothing."""
        self._closing = True
        if self._transport is not None:
            self._transport.abort()

    # Events

    def _on_event(self, event: Any) -> None:
        kind = type(event)
        if kind is ngh2.DataReceived:
            self._on_data(event.stream_id, event.data, ends=event.end_stream)
        elif kind is ngh2.RequestReceived:
            fields = dict(event.headers)
            stream = Stream(event.stream_id, self._methods.get(fields.get(b":path", b""), UNKNOWN), self._wire)
            self._streams[stream.id] = stream
            stream.open(fields, ends=event.end_stream)
        elif kind is ngh2.StreamClosed:
            self._forget(event.stream_id)
        elif kind is ngh2.StreamReset:
            self._on_reset(event.stream_id)
        elif kind is ngh2.TrailersReceived:
            self._on_data(event.stream_id, b"", ends=True)
        elif kind is ngh2.PingAcknowledged:
            if event.opaque_data == _DRAIN_PING:
                self._h2.send_goaway()
        elif kind is ngh2.ConnectionClosed:
            self._flush()
            self.close()

    def _on_data(self, stream_id: int, data: bytes, *, ends: bool) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            self._wire.acknowledge(stream_id, len(data))
        else:
            stream.feed(data, ends=ends)

    def _on_reset(self, stream_id: int) -> None:
        """Bound a flood of streams that are opened and reset (CVE-2023-44487). `StreamClosed` follows."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.spoke or stream.answered:
            return
        now = self._loop.time()
        grown = self._empty_resets + (now - self._empty_resets_at) * _EMPTY_RESETS_PER_S
        self._empty_resets, self._empty_resets_at = min(_EMPTY_RESET_BURST, grown) - 1, now
        if self._empty_resets < 0:
            self._h2.terminate_connection(ngh2.ErrorCode.ENHANCE_YOUR_CALM)
            self._flush()
            raise ngh2.DenialOfServiceError("too many streams were reset before they said anything")

    def _forget(self, stream_id: int) -> bool:
        """The stream is closed. True when this has given the peer room to send."""
        stream = self._streams.pop(stream_id, None)
        return stream is not None and not stream.answered and stream.release()

    # Bytes out

    def _flush(self) -> None:
        """Write what may be written; what that sets free may be more to write."""
        again = True
        transport = self._transport
        while again and self._may_write and transport is not None and not self._closing:
            again = False
            try:
                data = self._h2.data_to_send()
            except ngh2.NGH2Error as error:
                _log.warning("an HTTP/2 connection failed: %s", error)
                self.close()
                return
            if data:
                transport.write(data)
            for event in self._h2.events():
                if isinstance(event, ngh2.StreamClosed):
                    again |= self._forget(event.stream_id)
                elif isinstance(event, ngh2.ConnectionClosed):
                    self.close()
                    return
            again |= self._unchoke()

    def _unchoke(self) -> bool:
        """Stop asking for more when too much is queued, and begin again. True when there is more to write."""
        wire, limits = self._wire, self._limits
        queued = self._h2.queued_body_size()
        if not queued:
            wire.queued_pieces = 0
        if not wire.choked:
            wire.choked = queued > limits.queued_bytes or wire.queued_pieces > limits.queued_pieces
            return False
        if queued > limits.queued_bytes // 2 or wire.queued_pieces > limits.queued_pieces:
            return False
        wire.choked = False
        freed = [stream for stream in self._streams.values() if stream.unchoke()]
        return bool(freed)

    # Time

    def _tick(self) -> None:
        """A peer that is gone without a word is found by a ping that no one answers."""
        if self._closing:  # and the peer does not read what is left
            self.cut()
            return
        if self._pinged and not self._heard:
            _log.warning("a peer did not answer for %.1f s and is cut off", self._limits.ping_every_s)
            self.cut()
            return
        self._pinged = not self._heard
        self._heard = False
        try:
            if self._pinged:
                self._h2.ping()
            for stream in self._streams.values():
                if stream.answered and stream.old:  # its peer neither takes the answer nor ends its own side
                    self._h2.reset_stream(stream.id, ngh2.ErrorCode.CANCEL)
                stream.old = stream.answered
        except ngh2.NGH2Error:
            self.close()
        self._flush()
        self._timer = self._loop.call_later(self._limits.ping_every_s, self._tick)


def _nothing() -> None:
    """There is no one to write to."""
