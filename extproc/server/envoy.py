"""Envoy's protobuf messages to events, and actions to Envoy's protobuf messages: the only place that knows both.

The innermost part of the edge. The surprising thing: fields are read straight from the upb messages and metadata is
written field by field, because a detour over dictionaries would cost more than the whole decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from envoy.config.core.v3.base_pb2 import HeaderValueOption
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest, ProcessingResponse
from envoy.type.v3 import http_status_pb2  # noqa: F401  (registers the status message that replies hold)
from google.protobuf.struct_pb2 import ListValue, Struct, Value

from extproc.decision import NAMESPACE, ROUTE_NAMESPACE, WHOLE_FIELD, Decision, decision_of
from extproc.exchange import Headers, MetadataValue, Proceed, RequestHeaders, Respond, Rewrite, Route

_OVERWRITE = HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


@dataclass(frozen=True, slots=True)
class RequestBody:
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
    response = ProcessingResponse()
    match action:
        case Proceed() | Rewrite():
            response.request_headers.response.SetInParent()
        case Route():
            _route(response, response.request_headers.response, action)
        case Respond():
            _respond(response, action)
        case _ as never:
            assert_never(never)
    return _bytes(response)


def answer_body(action: Proceed | Respond | Route | Rewrite) -> bytes:
    """The ProcessingResponse to a body message."""
    response = ProcessingResponse()
    match action:
        case Proceed():
            response.request_body.response.SetInParent()
        case Rewrite():
            common = response.request_body.response
            common.SetInParent()
            if action.body is not None:
                common.body_mutation.body = action.body
                _set_header(common.header_mutation, "content-length", str(len(action.body)))
        case Route():
            _route(response, response.request_body.response, action)
        case Respond():
            _respond(response, action)
        case _ as never:
            assert_never(never)
    return _bytes(response)


def _bytes(response: Any) -> bytes:
    encoded: bytes = response.SerializeToString()
    return encoded


def _route(response: Any, common: Any, action: Route) -> None:
    common.clear_route_cache = True
    for name, value in action.set_headers:
        _set_header(common.header_mutation, name, value)
    if action.body is not None:
        common.body_mutation.body = action.body
    fields = response.dynamic_metadata.fields
    _write(fields[NAMESPACE].struct_value, action.metadata)
    _write_chain(fields[ROUTE_NAMESPACE].struct_value.fields["priority_groups"].list_value, action.chain)


def _write_chain(groups: Any, chain: Sequence[str]) -> None:
    """One priority group for each attempt, each of one cluster (message PriorityGroupsOverride)."""
    for number, cluster in enumerate(chain):
        group = groups.values.add().struct_value.fields
        group["name"].string_value = str(number)
        member = group["clusters"].list_value.values.add().struct_value.fields
        member["cluster_name"].string_value = cluster
        member["weight"].number_value = 1


def _respond(response: Any, action: Respond) -> None:
    immediate = response.immediate_response
    immediate.status.code = action.status
    immediate.body = action.body
    immediate.details = action.details
    for name, value in action.headers:
        _set_header(immediate.headers, name, value)
    _write(response.dynamic_metadata.fields[NAMESPACE].struct_value, action.metadata)


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
