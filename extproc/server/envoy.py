"""Envoy's protobuf messages to events, and actions to Envoy's protobuf messages: the only place that knows both.

The innermost part of the edge. The surprising thing: fields are read straight from the upb messages and metadata is
written field by field, because a detour over dictionaries would cost more than the whole decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, assert_never

import msgspec
from envoy.config.core.v3.base_pb2 import HeaderValueOption
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse
from envoy.type.v3 import http_status_pb2  # noqa: F401  (registers the status message that replies hold)
from google.protobuf.struct_pb2 import ListValue, Struct, Value

from extproc.decision import NAMESPACE, ROUTE_NAMESPACE, WHOLE_FIELD, Decision, decision_of
from extproc.exchange import Headers, MetadataValue, Proceed, RequestHeaders, Respond, Rewrite, Route

Kind = Literal["request_headers", "request_body"]
_OVERWRITE = HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


class RequestBody(msgspec.Struct, frozen=True):
    """The whole buffered body."""

    body: bytes


Event = RequestHeaders | RequestBody | None


def parse(message: bytes) -> tuple[Event, Any]:
    """The event of one ProcessingRequest and the metadata that came with it; None for a kind nobody asked for."""
    request = ProcessingRequest.FromString(message)
    kind = request.WhichOneof("request")
    if kind == "request_headers":
        headers = request.request_headers
        return RequestHeaders(_headers(headers.headers.headers), headers.end_of_stream), request.metadata_context
    if kind == "request_body":
        return RequestBody(request.request_body.body), request.metadata_context
    return None, request.metadata_context


def _headers(fields: Sequence[Any]) -> Headers:
    """Envoy fills `raw_value`; `value` is what a peer of an older API would."""
    first = {field.key: field.raw_value or field.value.encode() for field in fields}
    if len(first) == len(fields):
        return Headers(first)
    first.clear()
    repeats: list[tuple[str, bytes]] = []
    for field in fields:
        value = field.raw_value or field.value.encode()
        if field.key in first:
            repeats.append((field.key, value))
        else:
            first[field.key] = value
    return Headers(first, repeats)


def answer_headers(action: Proceed | Respond | Route | Rewrite) -> bytes:
    """The ProcessingResponse to a headers message."""
    match action:
        case Proceed() | Rewrite():
            return _PROCEED
        case Route():
            return _routed("request_headers", action)
        case Respond():
            return _respond(action)
        case _ as never:
            assert_never(never)


def answer_body(action: Proceed | Respond | Route | Rewrite) -> bytes:
    """The ProcessingResponse to a body message."""
    match action:
        case Proceed():
            return _PROCEED_BODY
        case Rewrite():
            return _rewritten(action)
        case Route():
            return _routed("request_body", action)
        case Respond():
            return _respond(action)
        case _ as never:
            assert_never(never)


_PROCEED: bytes = ProcessingResponse(request_headers={"response": {}}).SerializeToString()
_PROCEED_BODY: bytes = ProcessingResponse(request_body={"response": {}}).SerializeToString()


def _bytes(response: Any) -> bytes:
    encoded: bytes = response.SerializeToString()
    return encoded


def _rewritten(action: Rewrite) -> bytes:
    if action.body is None:
        return _PROCEED_BODY
    response = ProcessingResponse()
    common = response.request_body.response
    common.body_mutation.body = action.body
    _set_header(common.header_mutation, "content-length", str(len(action.body)))
    return _bytes(response)


def _routed(kind: Kind, action: Route) -> bytes:
    """Two encoded halves of one message: concatenated they are that message (protobuf encoding, "Last One Wins").

    The half that says where to go is the same for all requests of a model, and is encoded once.
    """
    response = ProcessingResponse()
    _write(response.dynamic_metadata.fields[NAMESPACE].struct_value, action.metadata)
    if action.body is None:
        return _way(kind, action.chain, action.set_headers) + _bytes(response)
    common = getattr(response, kind).response
    common.body_mutation.body = action.body
    headers = tuple(header for header in action.set_headers if header[0] != "content-length")
    _set_header(common.header_mutation, "content-length", str(len(action.body)))
    return _way(kind, action.chain, headers) + _bytes(response)


@lru_cache(maxsize=4096)
def _way(kind: Kind, chain: tuple[str, ...], headers: tuple[tuple[str, str], ...]) -> bytes:
    """The half of an answer that names the chain and the headers that Envoy's router reads."""
    response = ProcessingResponse()
    common = getattr(response, kind).response
    common.clear_route_cache = True
    for name, value in headers:
        _set_header(common.header_mutation, name, value)
    groups = response.dynamic_metadata.fields[ROUTE_NAMESPACE].struct_value.fields["priority_groups"]
    _write_chain(groups.list_value, chain)
    return _bytes(response)


def _write_chain(groups: Any, chain: Sequence[str]) -> None:
    """One priority group for each attempt, each of one cluster (message PriorityGroupsOverride)."""
    for number, cluster in enumerate(chain):
        group = groups.values.add().struct_value.fields
        group["name"].string_value = str(number)
        member = group["clusters"].list_value.values.add().struct_value.fields
        member["cluster_name"].string_value = cluster
        member["weight"].number_value = 1


def _respond(action: Respond) -> bytes:
    response = ProcessingResponse()
    immediate = response.immediate_response
    immediate.status.code = action.status
    immediate.body = action.body
    immediate.details = action.details
    for name, value in action.headers:
        _set_header(immediate.headers, name, value)
    _write(response.dynamic_metadata.fields[NAMESPACE].struct_value, action.metadata)
    return _bytes(response)


def _set_header(mutation: Any, name: str, value: str) -> None:
    option = mutation.set_headers.add(append_action=_OVERWRITE)
    option.header.key = name
    option.header.raw_value = value.encode("latin-1")


def _write(struct: Any, metadata: Mapping[str, MetadataValue]) -> None:
    fields = struct.fields
    for name, value in metadata.items():
        if isinstance(value, bool):
            fields[name].bool_value = value
        elif isinstance(value, str):
            fields[name].string_value = value
        elif isinstance(value, (int, float)):
            fields[name].number_value = value
        else:
            items = fields[name].list_value.values
            for item in value:
                items.add().string_value = item


def read_decision(struct: Struct) -> Decision | None:
    """The Decision that `_write` put there, or None."""
    return decision_of(struct.fields[WHOLE_FIELD].string_value) if WHOLE_FIELD in struct.fields else None


def read_struct(struct: Struct) -> dict[str, Any]:
    """A Struct of strings, numbers, booleans and lists of strings, as plain values."""
    return {name: _plain(value) for name, value in struct.fields.items()}


def _plain(value: Value) -> Any:
    match value.WhichOneof("kind"):
        case "string_value":
            return value.string_value
        case "number_value":
            return value.number_value
        case "bool_value":
            return value.bool_value
        case "list_value":
            return _plain_list(value.list_value)
        case _:
            return None


def _plain_list(values: ListValue) -> list[Any]:
    return [_plain(value) for value in values.values]
