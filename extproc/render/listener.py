"""The listener: HTTP settings that make a request unambiguous, then decide, and on the way back usage and answers.

The surprising thing: `ext_proc` is configured to see no response at all. What comes back is read by Envoy's own
filters, so no byte of an answer enters Python unless a cluster's adapt asks for it.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import PurePosixPath

from envoy_data_plane.envoy.config.accesslog.v3 import AccessLog
from envoy_data_plane.envoy.config.common.mutation_rules.v3 import (
    HeaderMutation,
    HeaderMutationRemoveOnMatch,
    HeaderMutationRules,
)
from envoy_data_plane.envoy.config.core.v3 import (
    Address,
    ApiVersion,
    ConfigSource,
    DataSource,
    GrpcService,
    GrpcServiceEnvoyGrpc,
    HttpProtocolOptions,
    HttpProtocolOptionsHeadersWithUnderscoresAction,
    SocketAddress,
    SubstitutionFormatString,
    TypedExtensionConfig,
)
from envoy_data_plane.envoy.config.listener.v3 import Filter, FilterChain, Listener
from envoy_data_plane.envoy.extensions.access_loggers.file.v3 import FileAccessLog
from envoy_data_plane.envoy.extensions.access_loggers.grpc.v3 import CommonGrpcAccessLogConfig, HttpGrpcAccessLogConfig
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExternalProcessor,
    MetadataOptions,
    MetadataOptionsMetadataNamespaces,
    ProcessingMode,
    ProcessingModeBodySendMode,
    ProcessingModeHeaderSendMode,
)
from envoy_data_plane.envoy.extensions.filters.http.lua.v3 import Lua
from envoy_data_plane.envoy.extensions.filters.http.router.v3 import Router
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import (
    HttpConnectionManager,
    HttpConnectionManagerPathWithEscapedSlashesAction,
    HttpConnectionManagerServerHeaderTransformation,
    HttpFilter,
    LocalReplyConfig,
    Rds,
)
from envoy_data_plane.envoy.extensions.http.early_header_mutation.header_mutation.v3 import (
    HeaderMutation as EarlyHeaderMutation,
)
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.envoy.type.v3 import HttpStatus, StatusCode
from envoy_data_plane.google.protobuf import Any, Struct, Value

from extproc.config.snapshot import Snapshot
from extproc.decision import NAMESPACE, ROUTE_NAMESPACE
from extproc.record.journal import FORMAT
from extproc.render.clusters import RECORD, script, sidecar_service
from extproc.render.local_replies import REQUEST_ID, local_replies
from extproc.render.mended import mended
from extproc.render.routes import ROUTES, route_configuration
from extproc.render.usage import usage_filters

_CONNECTION_BUFFER_BYTES = 1 << 20
_DECIDE_TIMEOUT_S = 5.0
_RECORD_BUFFER_BYTES = 1 << 20
_REQUEST_HEADERS_TIMEOUT_S = 30.0
_UPLOAD_IDLE_S = 300.0
"""Until decide has chosen a route, which has an idle time of its own: how long an upload may stand still."""


def listener(
    snapshot: Snapshot, *, routes_from: ConfigSource | None = None, journal: PurePosixPath | None = None
) -> Listener:
    """The one listener that clients call; its routes stand in it, or where `routes_from` says.

    With `journal`, Envoy also writes each finished request to that file.
    """
    routes = None if routes_from else route_configuration(snapshot)
    source = Rds(route_config_name=ROUTES, config_source=routes_from) if routes_from else None
    connections = HttpConnectionManager(
        stat_prefix="gateway",
        route_config=routes,
        rds=source,
        http_filters=_filters(),
        access_log=[_record(), *([] if journal is None else [_journal(journal)])],
        local_reply_config=LocalReplyConfig(mappers=local_replies()),
        early_header_mutation_extensions=[_drop_internal_headers()],
        # A path has one reading before anything judges it; one that could have two is refused.
        normalize_path=True,
        merge_slashes=True,
        path_with_escaped_slashes_action=HttpConnectionManagerPathWithEscapedSlashesAction.REJECT_REQUEST,
        common_http_protocol_options=HttpProtocolOptions(
            headers_with_underscores_action=HttpProtocolOptionsHeadersWithUnderscoresAction.DROP_HEADER
        ),
        generate_request_id=True,
        always_set_request_id_in_response=True,
        use_remote_address=True,
        skip_xff_append=True,
        server_header_transformation=HttpConnectionManagerServerHeaderTransformation.PASS_THROUGH,
        stream_idle_timeout=timedelta(seconds=_UPLOAD_IDLE_S),
        request_headers_timeout=timedelta(seconds=_REQUEST_HEADERS_TIMEOUT_S),
    )
    return Listener(
        name="gateway",
        address=Address(socket_address=SocketAddress(address=snapshot.listen.address, port_value=snapshot.listen.port)),
        per_connection_buffer_limit_bytes=_CONNECTION_BUFFER_BYTES,
        filter_chains=[
            FilterChain(
                filters=[
                    Filter(name="envoy.filters.network.http_connection_manager", typed_config=Any.pack(connections))
                ]
            )
        ],
    )


def _drop_internal_headers() -> TypedExtensionConfig:
    """Before any filter: no client may speak for the gateway, or choose the id that its ledger row is known by."""
    mutations = [
        HeaderMutation(remove_on_match=HeaderMutationRemoveOnMatch(key_matcher=StringMatcher(prefix=prefix)))
        for prefix in ("x-extproc-", "x-envoy-", "x-forwarded-")
    ]
    mutations.append(HeaderMutation(remove=REQUEST_ID))
    return TypedExtensionConfig(
        name="drop-internal-headers", typed_config=Any.pack(EarlyHeaderMutation(mutations=mutations))
    )


def _filters() -> list[HttpFilter]:
    """Requests run down this list, responses up it: usage is read before the usage event is hidden."""
    answer = Lua(default_source_code=DataSource(inline_string=script("answer.lua")))
    return [
        mended(),
        HttpFilter(name="answer", typed_config=Any.pack(answer)),
        *usage_filters(),
        HttpFilter(name="decide", typed_config=Any.pack(_decide())),
        HttpFilter(name="envoy.filters.http.router", typed_config=Any.pack(Router(suppress_envoy_headers=True))),
    ]


def _decide() -> ExternalProcessor:
    return ExternalProcessor(
        grpc_service=sidecar_service(),
        failure_mode_allow=False,
        message_timeout=timedelta(seconds=_DECIDE_TIMEOUT_S),
        status_on_error=HttpStatus(code=StatusCode.ServiceUnavailable),
        processing_mode=ProcessingMode(
            request_header_mode=ProcessingModeHeaderSendMode.SEND,
            request_body_mode=ProcessingModeBodySendMode.BUFFERED,
            response_header_mode=ProcessingModeHeaderSendMode.SKIP,
        ),
        # decide sets x-envoy-max-retries and the time to first byte for the router.
        mutation_rules=HeaderMutationRules(allow_envoy=True),
        metadata_options=MetadataOptions(
            receiving_namespaces=MetadataOptionsMetadataNamespaces(untyped=[ROUTE_NAMESPACE, NAMESPACE])
        ),
    )


def _journal(path: PurePosixPath) -> AccessLog:
    fields = Struct(fields={name: Value(string_value=text) for name, text in FORMAT.items()})
    log_format = SubstitutionFormatString(json_format=fields)
    return AccessLog(name="journal", typed_config=Any.pack(FileAccessLog(path=str(path), log_format=log_format)))


def _record() -> AccessLog:
    return AccessLog(
        name="record",
        typed_config=Any.pack(
            HttpGrpcAccessLogConfig(
                common_config=CommonGrpcAccessLogConfig(
                    log_name="record",
                    transport_api_version=ApiVersion.V3,
                    grpc_service=GrpcService(envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=RECORD)),
                    buffer_flush_interval=timedelta(seconds=0.1),
                    buffer_size_bytes=_RECORD_BUFFER_BYTES,
                ),
                additional_response_headers_to_log=[REQUEST_ID],  # the only one that a request Envoy refused may have
            )
        ),
    )
