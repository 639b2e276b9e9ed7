"""Envoy's configuration, as gateways of Kubernetes make it for an InferencePool: ext_proc, then the endpoint it chose.

A plain dictionary, which Envoy reads as JSON.
"""

PICKED = "x-gateway-destination-endpoint"
EXTENSION = "type.googleapis.com/envoy.extensions"
FILTERS = f"{EXTENSION}.filters.http"
# Both bodies go to the picker in pieces and come back in pieces; this mode asks for trailers as well.
FULL_DUPLEX = {"request_header_mode": "SEND", "response_header_mode": "SEND",
               "request_body_mode": "FULL_DUPLEX_STREAMED", "response_body_mode": "FULL_DUPLEX_STREAMED",
               "request_trailer_mode": "SEND", "response_trailer_mode": "SEND"}
# The picker sees no response bodies: what a gateway may choose whose tokens are many.
NO_RESPONSE_BODIES = FULL_DUPLEX | {"response_body_mode": "NONE", "response_trailer_mode": "SKIP"}
MANY = {"thresholds": [{"max_connections": 40000, "max_pending_requests": 40000, "max_requests": 40000}]}


def address(port: int) -> dict:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def http_filter(name: str, kind: str, **settings) -> dict:
    return {"name": name, "typed_config": {"@type": kind, **settings}}


def picker_filter(mode: dict, fail_open: bool, called: str | None = None) -> dict:
    """`called`: the picker's cluster has this name, and is asked for by it, as Istio does."""
    service = {"cluster_name": called} if called else {"cluster_name": "picker", "authority": "picker.local"}
    return http_filter(
        "envoy.filters.http.ext_proc", f"{FILTERS}.ext_proc.v3.ExternalProcessor",
        grpc_service={"envoy_grpc": service},
        failure_mode_allow=fail_open, message_timeout="1000s", processing_mode=mode,
        metadata_options={"receiving_namespaces": {"untyped": ["envoy.lb"]},
                          "forwarding_namespaces": {"untyped": ["envoy.lb", "envoy.lb.subset_hint"]}})


def drop_clients_choice() -> dict:
    """Only the picker chooses: without this a client chooses for itself when the picker fails."""
    return http_filter(
        "envoy.filters.http.header_mutation", f"{FILTERS}.header_mutation.v3.HeaderMutation",
        mutations={"request_mutations": [{"remove": PICKED}]})


def subset(endpoints: list[str]) -> dict:
    """Restricts the choice, as a gateway does that knows better."""
    value = {"x-gateway-destination-endpoint-subset": endpoints}
    return http_filter(
        "envoy.filters.http.set_metadata", f"{FILTERS}.set_metadata.v3.Config",
        metadata=[{"metadata_namespace": "envoy.lb.subset_hint", "value": value}])


def listener(port: int, filters: list[dict], cluster: str, buffer: int, access_log: str | None) -> dict:
    log = f"{EXTENSION}.access_loggers.file.v3.FileAccessLog"
    line = {"status": "%RESPONSE_CODE%", "flags": "%RESPONSE_FLAGS%", "details": "%RESPONSE_CODE_DETAILS%",
            "picked": f"%REQ({PICKED.upper()})%", "metadata": f"%DYNAMIC_METADATA(envoy.lb:{PICKED})%"}
    router = http_filter("envoy.filters.http.router", f"{FILTERS}.router.v3.Router", suppress_envoy_headers=True)
    route = {"match": {"prefix": "/"}, "route": {"cluster": cluster, "timeout": "0s", "idle_timeout": "3600s"}}
    manager = {
        "@type": f"{EXTENSION}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "inference", "codec_type": "AUTO", "use_remote_address": True, "generate_request_id": True,
        "preserve_external_request_id": True,
        "server_header_transformation": "PASS_THROUGH", "http2_protocol_options": {"max_concurrent_streams": 1000},
        "http_protocol_options": {"enable_trailers": True},
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [*filters, router],
        "access_log": [{"name": "file", "typed_config": {"@type": log, "path": access_log,
                                                         "log_format": {"json_format": line}}}] if access_log else []}
    return {"name": "inference", "address": address(port), "per_connection_buffer_limit_bytes": buffer,
            "filter_chains": [{"filters": [{"name": "envoy.filters.network.http_connection_manager",
                                            "typed_config": manager}]}]}


def http_protocol(auto_sni: bool = False, **settings) -> dict:
    kind = f"{EXTENSION}.upstreams.http.v3.HttpProtocolOptions"
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions":
            {"@type": kind, "upstream_http_protocol_options": {"auto_sni": auto_sni}, "explicit_http_config": settings}}


def picked_cluster() -> dict:
    return {"name": "picked", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "5s",
            "original_dst_lb_config": {"use_http_header": True, "http_header_name": PICKED}, "circuit_breakers": MANY,
            "typed_extension_protocol_options":
                http_protocol(http_protocol_options={"enable_trailers": True})}


def fixed_cluster(name: str, port: int) -> dict:
    endpoint = {"endpoint": {"address": address(port)}}
    return {"name": name, "type": "STATIC", "connect_timeout": "5s", "circuit_breakers": MANY,
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]}}


def picker_cluster(port: int, tls: bool, called: str | None = None, tls_version: str = "TLS_AUTO") -> dict:
    http2 = {"initial_stream_window_size": 65536, "initial_connection_window_size": 1 << 20}
    cluster = fixed_cluster(called or "picker", port) | {
        "typed_extension_protocol_options": http_protocol(auto_sni=bool(called), http2_protocol_options=http2)}
    if tls:
        kind = f"{EXTENSION}.transport_sockets.tls.v3.UpstreamTlsContext"
        # The picker's certificate is its own; nobody verifies it.
        cluster["transport_socket"] = {"name": "envoy.transport_sockets.tls", "typed_config": {
            "@type": kind, "common_tls_context": {
                "alpn_protocols": ["h2"], "validation_context": {},
                "tls_params": {"tls_maximum_protocol_version": tls_version}}}}
    return cluster


def config(port: int, filters: list[dict], clusters: list[dict], buffer: int = 32768,
           access_log: str | None = None) -> dict:
    """All of it; requests go to the first of `clusters`."""
    route_to = clusters[0]["name"]
    return {"admin": {"address": address(0)},
            "static_resources": {"listeners": [listener(port, filters, route_to, buffer, access_log)],
                                 "clusters": clusters}}
