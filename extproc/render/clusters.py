"""Clusters: two for each provider (`openai`, `openai/adapt`), the sidecar's, and one that leads nowhere.

Rendered for Envoy's CDS part. The surprising thing: a provider known by DNS name gets a second, refusing endpoint at a
lower priority. A cluster without any host makes Envoy answer 503 at once; one whose host refuses is retried elsewhere.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from importlib.resources import files
from ipaddress import ip_address
from pathlib import PurePath

from envoy_data_plane.envoy.config.cluster.v3 import (
    CircuitBreakers,
    CircuitBreakersThresholds,
    Cluster,
    ClusterDiscoveryType,
    ClusterDnsLookupFamily,
    ClusterLbPolicy,
    OutlierDetection,
)
from envoy_data_plane.envoy.config.common.mutation_rules.v3 import HeaderMutation, HeaderMutationRemoveOnMatch
from envoy_data_plane.envoy.config.core.v3 import (
    Address,
    ConfigSource,
    DataSource,
    GrpcService,
    GrpcServiceEnvoyGrpc,
    HeaderValue,
    HeaderValueOption,
    HeaderValueOptionHeaderAppendAction,
    Http1ProtocolOptions,
    Http2ProtocolOptions,
    KeepaliveSettings,
    PathConfigSource,
    Pipe,
    SocketAddress,
    TransportSocket,
    TypedExtensionConfig,
    WatchedDirectory,
)
from envoy_data_plane.envoy.config.core.v3 import (
    HttpProtocolOptions as CommonHttpProtocolOptions,
)
from envoy_data_plane.envoy.config.endpoint.v3 import (
    ClusterLoadAssignment,
    LbEndpoint,
    LocalityLbEndpoints,
)
from envoy_data_plane.envoy.config.endpoint.v3 import (
    Endpoint as EnvoyEndpoint,
)
from envoy_data_plane.envoy.extensions.filters.http.credential_injector.v3 import CredentialInjector
from envoy_data_plane.envoy.extensions.filters.http.ext_proc.v3 import (
    ExternalProcessor,
    MetadataOptions,
    MetadataOptionsMetadataNamespaces,
    ProcessingMode,
    ProcessingModeBodySendMode,
    ProcessingModeHeaderSendMode,
)
from envoy_data_plane.envoy.extensions.filters.http.header_mutation.v3 import HeaderMutation as HeaderMutationFilter
from envoy_data_plane.envoy.extensions.filters.http.header_mutation.v3 import Mutations
from envoy_data_plane.envoy.extensions.filters.http.lua.v3 import Lua
from envoy_data_plane.envoy.extensions.filters.http.upstream_codec.v3 import UpstreamCodec
from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager.v3 import HttpFilter
from envoy_data_plane.envoy.extensions.http.injected_credentials.generic.v3 import Generic
from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import (
    CertificateValidationContext,
    CommonTlsContext,
    SdsSecretConfig,
    SubjectAltNameMatcher,
    SubjectAltNameMatcherSanType,
    TlsCertificate,
    TlsParameters,
    TlsParametersTlsProtocol,
    UpstreamTlsContext,
)
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import (
    HttpProtocolOptions,
    HttpProtocolOptionsExplicitHttpConfig,
)
from envoy_data_plane.envoy.type.matcher.v3 import StringMatcher
from envoy_data_plane.google.protobuf import Any

from extproc.config.snapshot import Endpoint, Provider, Snapshot
from extproc.decision import ATTEMPTS_NAMESPACE, NAMESPACE
from extproc.providers.kinds import CREDENTIAL_HEADERS, KINDS
from extproc.render.deployment import ClientTls, Deployment

SIDECAR = "extproc"
RECORD = "extproc-record"
"""The same workers over connections of its own. Beside bodies the access log waits, and Envoy drops what waits."""
UNDECIDED = "undecided"
PROVIDER_METADATA = "x-extproc-provider"

_HTTP_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_LIMIT = 1_000_000
_CONNECT_TIMEOUT_S = 5.0
_STREAMS_A_CONNECTION = 8
_UPSTREAM_IDLE_S = 50.0
"""Below the 60 s after which common servers close an idle connection, so that a request does not meet the closing."""
_HOP_HEADERS = ("x-forwarded-proto", "x-forwarded-for", "x-request-id", "forwarded", "via", "te", "cookie")


def clusters(snapshot: Snapshot, deployment: Deployment) -> list[Cluster]:
    """All clusters, in the order of gateway.yaml."""
    rendered = [_sidecar(deployment, SIDECAR), _sidecar(deployment, RECORD), _undecided()]
    for provider in snapshot.providers.values():
        rendered += (_provider(provider, snapshot, deployment, adapts=adapts) for adapts in (False, True))
    return rendered


def _sidecar(deployment: Deployment, name: str) -> Cluster:
    remote = deployment.sidecar
    if remote is None:
        endpoints = [_pipe(str(deployment.worker_socket(number)), "") for number in range(deployment.workers)]
    else:
        endpoints = [_socket(remote.host, remote.port, "")]
    by_name = remote is not None and not _is_address(remote.host)
    cluster = Cluster(
        name=name,
        type=ClusterDiscoveryType.STRICT_DNS if by_name else ClusterDiscoveryType.STATIC,
        lb_policy=ClusterLbPolicy.LEAST_REQUEST,
        connect_timeout=timedelta(seconds=2 if remote else 1),
        circuit_breakers=_unlimited(),
        load_assignment=ClusterLoadAssignment(
            cluster_name=name, endpoints=[LocalityLbEndpoints(lb_endpoints=endpoints)]
        ),
        typed_extension_protocol_options={
            _HTTP_OPTIONS: Any.pack(
                HttpProtocolOptions(
                    explicit_http_config=HttpProtocolOptionsExplicitHttpConfig(
                        http2_protocol_options=_over_tcp() if remote else Http2ProtocolOptions()
                    )
                )
            )
        },
    )
    if by_name:
        cluster.dns_lookup_family = ClusterDnsLookupFamily.V4_PREFERRED
    if remote is not None and remote.tls is not None:
        cluster.transport_socket = _tls(remote.host, remote.tls.ca, own=remote.tls)
    return cluster


def _over_tcp() -> Http2ProtocolOptions:
    """Workers share one port, and so are told apart by connection alone: few streams on each make many connections.
    A machine that is gone without a word is noticed within the time that a decision may take."""
    return Http2ProtocolOptions(
        max_concurrent_streams=_STREAMS_A_CONNECTION,
        connection_keepalive=KeepaliveSettings(interval=timedelta(seconds=3), timeout=timedelta(seconds=2)),
    )


def _undecided() -> Cluster:
    return Cluster(
        name=UNDECIDED,
        type=ClusterDiscoveryType.STATIC,
        load_assignment=ClusterLoadAssignment(cluster_name=UNDECIDED),
    )


def _unlimited() -> CircuitBreakers:
    """One ext_proc stream counts as one request, and retries have a limit of their own, 3: the defaults are low."""
    return CircuitBreakers(
        thresholds=[
            CircuitBreakersThresholds(
                max_connections=_LIMIT, max_pending_requests=_LIMIT, max_requests=_LIMIT, max_retries=_LIMIT
            )
        ]
    )


def _ejection() -> OutlierDetection:
    """One bad address of several behind a name is left out for a while. The only one never is: with the refusing one it
    makes two, and a third of two is none. A whole provider in trouble is the cooldown's matter (`record.health`).
    """
    return OutlierDetection(
        consecutive_5xx=5,
        interval=timedelta(seconds=5),
        base_ejection_time=timedelta(seconds=10),
        max_ejection_percent=34,
    )


def _provider(provider: Provider, snapshot: Snapshot, deployment: Deployment, *, adapts: bool) -> Cluster:
    name = f"{provider.name}/adapt" if adapts else provider.name
    endpoint = provider.endpoint
    by_name = endpoint is not None and not _is_address(endpoint.host)
    cluster = Cluster(
        name=name,
        type=ClusterDiscoveryType.STRICT_DNS if by_name else ClusterDiscoveryType.STATIC,
        lb_policy=ClusterLbPolicy.LEAST_REQUEST,
        connect_timeout=timedelta(seconds=min(_CONNECT_TIMEOUT_S, provider.timeouts.first_byte_s)),
        circuit_breakers=_unlimited(),
        load_assignment=ClusterLoadAssignment(cluster_name=name, endpoints=_endpoints(endpoint, deployment)),
        typed_extension_protocol_options={
            _HTTP_OPTIONS: Any.pack(
                HttpProtocolOptions(
                    common_http_protocol_options=CommonHttpProtocolOptions(
                        idle_timeout=timedelta(seconds=_UPSTREAM_IDLE_S)
                    ),
                    explicit_http_config=HttpProtocolOptionsExplicitHttpConfig(
                        http_protocol_options=Http1ProtocolOptions()
                    ),
                    http_filters=_filters(provider, snapshot, deployment, adapts=adapts),
                )
            )
        },
    )
    if by_name:
        cluster.dns_lookup_family = ClusterDnsLookupFamily.V4_PREFERRED
        cluster.outlier_detection = _ejection()
    if endpoint is not None and endpoint.scheme == "https":
        cluster.transport_socket = _tls(endpoint.host, provider.ca_file or deployment.ca_bundle)
    return cluster


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _endpoints(endpoint: Endpoint | None, deployment: Deployment) -> list[LocalityLbEndpoints]:
    if endpoint is None:
        return [LocalityLbEndpoints(lb_endpoints=[_pipe(str(deployment.demo_socket), "demo.extproc")])]
    found = [LocalityLbEndpoints(lb_endpoints=[_socket(endpoint.host, endpoint.port, endpoint.authority)])]
    if not _is_address(endpoint.host):
        refusing = _socket("127.0.0.1", 1, endpoint.authority)
        found.append(LocalityLbEndpoints(priority=1, lb_endpoints=[refusing]))
    return found


def _pipe(path: str, hostname: str) -> LbEndpoint:
    return LbEndpoint(endpoint=EnvoyEndpoint(hostname=hostname, address=Address(pipe=Pipe(path=path))))


def _socket(host: str, port: int, hostname: str) -> LbEndpoint:
    address = Address(socket_address=SocketAddress(address=host, port_value=port))
    return LbEndpoint(endpoint=EnvoyEndpoint(hostname=hostname, address=address))


def _tls(host: str, ca: PurePath, own: ClientTls | None = None) -> TransportSocket:
    """TLS to `host`, whose certificate is of `ca` and names it; with `own`, HTTP/2 and a certificate of ours."""
    by_address = _is_address(host)
    san = SubjectAltNameMatcher(
        san_type=SubjectAltNameMatcherSanType.IP_ADDRESS if by_address else SubjectAltNameMatcherSanType.DNS,
        matcher=StringMatcher(exact=host),
    )
    validation = CertificateValidationContext(
        trusted_ca=DataSource(filename=str(ca)), match_typed_subject_alt_names=[san]
    )
    common = CommonTlsContext(validation_context=validation)
    if own is not None:
        common.alpn_protocols = ["h2"]
        common.tls_params = TlsParameters(tls_maximum_protocol_version=TlsParametersTlsProtocol.TLSv1_3)
        common.tls_certificates = [
            TlsCertificate(
                certificate_chain=DataSource(filename=str(own.certificate)),
                private_key=DataSource(filename=str(own.private_key)),
            )
        ]
    return TransportSocket(
        name="envoy.transport_sockets.tls",
        typed_config=Any.pack(UpstreamTlsContext(sni="" if by_address else host, common_tls_context=common)),
    )


def _filters(provider: Provider, snapshot: Snapshot, deployment: Deployment, *, adapts: bool) -> list[HttpFilter]:
    """Requests run down this list, responses up. Nothing of the client's or of another attempt's may get past it."""
    filters = [_own_headers(provider, snapshot), _attempt(provider), _their_headers()]
    if adapts:
        filters.append(_adapt(provider))
    if provider.secret is not None:
        filters += [_credential(provider, snapshot, deployment), _withhold(provider)]
    return [*filters, HttpFilter(name="codec", typed_config=Any.pack(UpstreamCodec()))]


def _own_headers(provider: Provider, snapshot: Snapshot) -> HttpFilter:
    """Requests: off with credentials, internal headers and what other providers' clusters set; on with our own."""
    set_by_any = {name: None for other in snapshot.providers.values() for name, _ in other.headers}
    removed = dict.fromkeys((*CREDENTIAL_HEADERS, *_HOP_HEADERS, *set_by_any))
    mutations = [HeaderMutation(remove=name) for name in removed]
    mutations += [_remove_prefix("x-envoy-"), _remove_prefix("x-extproc-")]
    # Envoy reads a header's value as a format string.
    mutations += [HeaderMutation(append=_header(name, value.replace("%", "%%"))) for name, value in provider.headers]
    return HttpFilter(
        name="own-headers",
        typed_config=Any.pack(HeaderMutationFilter(mutations=Mutations(request_mutations=mutations))),
    )


def _their_headers() -> HttpFilter:
    """Responses: a provider's internal headers (it may be a gateway like this one) and CORS do not reach the client."""
    mutations = [_remove_prefix(prefix) for prefix in ("x-envoy-", "x-extproc-", "access-control-")]
    mutations.append(HeaderMutation(remove="alt-svc"))
    return HttpFilter(
        name="their-headers",
        typed_config=Any.pack(HeaderMutationFilter(mutations=Mutations(response_mutations=mutations))),
    )


def _remove_prefix(prefix: str) -> HeaderMutation:
    return HeaderMutation(remove_on_match=HeaderMutationRemoveOnMatch(key_matcher=StringMatcher(prefix=prefix)))


def _header(name: str, value: str) -> HeaderValueOption:
    overwrite = HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
    return HeaderValueOption(header=HeaderValue(key=name, value=value), append_action=overwrite)


@cache
def script(name: str) -> str:
    """The text of a Lua filter in this package."""
    return files("extproc.render").joinpath("lua", name).read_text(encoding="utf-8")


def _attempt(provider: Provider) -> HttpFilter:
    base_path = provider.endpoint.base_path if provider.endpoint else ""
    cut_bytes = len("/v1") if KINDS[provider.kind].version_in_endpoint else 0
    # Constants of the script: a cluster's filter is given no filter_context (tried on 1.40).
    constants = f"local PROVIDER, BASE_PATH, CUT_BYTES = {_lua(provider.name)}, {_lua(base_path)}, {cut_bytes}\n"
    lua = Lua(default_source_code=DataSource(inline_string=constants + script("attempt.lua")))
    return HttpFilter(name="attempt", typed_config=Any.pack(lua))


def _withhold(provider: Provider) -> HttpFilter:
    kind = KINDS[provider.kind]
    header, prefix_bytes = _lua(kind.credential_header), len(kind.credential_prefix)
    constants = f"local CREDENTIAL_HEADER, PREFIX_BYTES = {header}, {prefix_bytes}\n"
    lua = Lua(default_source_code=DataSource(inline_string=constants + script("withhold.lua")))
    return HttpFilter(name="withhold", typed_config=Any.pack(lua))


def _lua(text: str) -> str:
    """A Lua string literal; every byte that is not plainly harmless is written as a number."""
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~/:"
    return '"' + "".join(chr(byte) if byte in plain else f"\\{byte:03d}" for byte in text.encode()) + '"'


def sidecar_service(provider: str = "") -> GrpcService:
    """The sidecar's gRPC service; a cluster's filter says which provider it is."""
    metadata = [HeaderValue(key=PROVIDER_METADATA, value=provider)] if provider else []
    return GrpcService(envoy_grpc=GrpcServiceEnvoyGrpc(cluster_name=SIDECAR), initial_metadata=metadata)


def _adapt(provider: Provider) -> HttpFilter:
    namespaces = MetadataOptionsMetadataNamespaces(untyped=[NAMESPACE, ATTEMPTS_NAMESPACE])
    return HttpFilter(
        name="adapt",
        typed_config=Any.pack(
            ExternalProcessor(
                grpc_service=sidecar_service(provider.name),
                message_timeout=timedelta(seconds=5),
                processing_mode=ProcessingMode(
                    request_header_mode=ProcessingModeHeaderSendMode.SEND,
                    request_body_mode=ProcessingModeBodySendMode.BUFFERED,
                    response_header_mode=ProcessingModeHeaderSendMode.SKIP,
                ),
                metadata_options=MetadataOptions(forwarding_namespaces=namespaces),
            )
        ),
    )


def secret_name(provider: Provider, snapshot: Snapshot) -> str:
    """What Envoy calls a provider's secret: the first provider that names the same variable or file in the same way."""
    prefix = KINDS[provider.kind].credential_prefix
    return next(
        other.name
        for other in snapshot.providers.values()
        if other.secret == provider.secret and KINDS[other.kind].credential_prefix == prefix
    )


def _credential(provider: Provider, snapshot: Snapshot, deployment: Deployment) -> HttpFilter:
    directory = WatchedDirectory(path=str(deployment.secrets_dir))
    path = str(deployment.secret_file(secret_name(provider, snapshot)))
    source = ConfigSource(path_config_source=PathConfigSource(path=path, watched_directory=directory))
    generic = Generic(
        credential=SdsSecretConfig(name=secret_name(provider, snapshot), sds_config=source),
        header=KINDS[provider.kind].credential_header,
    )
    injector = CredentialInjector(
        overwrite=True,
        credential=TypedExtensionConfig(name="envoy.http.injected_credentials.generic", typed_config=Any.pack(generic)),
    )
    return HttpFilter(name="credential", typed_config=Any.pack(injector))
