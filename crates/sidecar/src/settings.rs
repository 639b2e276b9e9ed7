//! What a user may say: flags, a YAML file and the environment, in llm-d's names. The same structure for all three.
//!
//! A layer holds only what was said in it; the command line goes over the file, the file over the environment. What
//! the whole means, and whether it makes sense, is `config`'s. Nothing here reads anything.

use crate::pool::Cluster;
use clap::Args;
use serde::Deserialize;
use std::net::IpAddr;
use std::path::PathBuf;

/// Where pods find their service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

macro_rules! settings {
    ($($(#[$meta:meta])* $field:ident: $type:ty,)*) => {
        /// One layer of settings. Flags and YAML keys are the fields' names with dashes.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Args, Deserialize)]
        #[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
        pub struct Settings {
            $($(#[$meta])* pub $field: $type,)*
        }

        impl Settings {
            /// This layer over `lower`.
            #[must_use]
            pub fn over(self, lower: Self) -> Self {
                let lower = lower.without_renamed(&self);
                Self { $($field: self.$field.over(lower.$field),)* }
            }
        }
    };
}

/// A value that may be said in one layer or not.
trait Layer {
    fn over(self, lower: Self) -> Self;
}

impl<T> Layer for Option<T> {
    fn over(self, lower: Self) -> Self {
        self.or(lower)
    }
}

impl<T> Layer for Vec<T> {
    fn over(self, lower: Self) -> Self {
        if self.is_empty() { lower } else { self }
    }
}

settings! {
    /// Address to listen on. Default: every address of this machine.
    #[arg(long, value_name = "IP")]
    host: Option<IpAddr>,
    /// Port to listen on; rank i of a data-parallel server is at this port plus i. Default: 8000.
    #[arg(long)]
    port: Option<u16>,
    /// Port of the decode server on this host; of its rank i, this port plus i. Default: 8200.
    #[arg(long, value_name = "PORT")]
    model_server_port: Option<u16>,
    /// Former name of --model-server-port.
    #[arg(long, hide = true)]
    vllm_port: Option<u16>,
    /// nixlv2, shared-storage, sglang, mooncake or offloading. Default: nixlv2.
    #[arg(long, value_name = "NAME")]
    kv_connector: Option<String>,
    /// Former name of --kv-connector.
    #[arg(long, hide = true)]
    connector: Option<String>,
    /// Encode stage; there is none here.
    #[arg(long, hide = true)]
    ec_connector: Option<String>,
    /// Ranks of the decode server, each with a listener. Default: 1.
    #[arg(long, value_name = "N")]
    data_parallel_size: Option<u16>,
    /// Take the listed prefill servers in random order.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    enable_prefiller_sampling: Option<bool>,
    /// Refuse prefill servers that are not on the allow-list.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    enable_ssrf_protection: Option<bool>,
    /// File of allowed servers, one host:port or host:* a line; read again when it changes.
    #[arg(long, value_name = "FILE")]
    allow_list: Option<PathBuf>,
    /// InferencePool whose ready prefill pods are allowed: namespace/name or name.
    #[arg(long, value_name = "POOL")]
    inference_pool: Option<String>,
    /// Part of --inference-pool, formerly apart.
    #[arg(long, hide = true)]
    inference_pool_namespace: Option<String>,
    /// Part of --inference-pool, formerly apart.
    #[arg(long, hide = true)]
    inference_pool_name: Option<String>,
    /// API group of the pool: inference.networking.k8s.io (v1) or inference.networking.x-k8s.io (v1alpha2).
    #[arg(long, value_name = "GROUP")]
    pool_group: Option<String>,
    /// Serve TLS. Default: true.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    secure_proxy: Option<bool>,
    /// Folder with tls.crt and tls.key, read again when they change. Default: a self-signed certificate.
    #[arg(long, value_name = "FOLDER")]
    cert_path: Option<PathBuf>,
    /// Speak TLS to these: prefiller, decoder, encoder.
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    enable_tls: Vec<String>,
    /// Take any certificate of these: prefiller, decoder, encoder.
    #[arg(long, value_name = "STAGE", value_delimiter = ',')]
    tls_insecure_skip_verify: Vec<String>,
    /// Former form of --enable-tls=prefiller.
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    prefiller_use_tls: Option<bool>,
    /// Former form of --enable-tls=decoder.
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    decoder_use_tls: Option<bool>,
    /// Former form of --tls-insecure-skip-verify=prefiller.
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    prefiller_tls_insecure_skip_verify: Option<bool>,
    /// Former form of --tls-insecure-skip-verify=decoder.
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    decoder_tls_insecure_skip_verify: Option<bool>,
    /// Unused connections kept to each server. Default: 1024.
    #[arg(long, value_name = "N")]
    max_idle_conns_per_host: Option<usize>,
    /// Answers in several pieces; only 0, which is off.
    #[arg(long, hide = true, allow_negative_numbers = true)]
    decode_chunk_size: Option<i64>,
    /// Further tries of a prefill that failed in passing. Default: 0.
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    prefill_max_retries: Option<i64>,
    /// Pause before each. Default: 200ms.
    #[arg(long, value_name = "DURATION")]
    prefill_retry_backoff: Option<String>,
    /// Longest wait for a prefill server, connection and retries included; 0 for no limit. Default: 0.
    #[arg(long, value_name = "DURATION")]
    prefill_timeout: Option<String>,
    /// When prefill failed: decode computes the prompt itself (decode), or the client is told (error). Default: decode.
    #[arg(long, value_name = "WHAT")]
    prefill_fallback: Option<String>,
    /// Longest request whose prompt decode computes itself when prefill failed. Default: 4 MiB.
    #[arg(long, value_name = "BYTES")]
    fallback_max_prompt_bytes: Option<usize>,
    /// Longest request and longest answer of a prefill server. Default: 64 MiB.
    #[arg(long, value_name = "BYTES")]
    max_body_bytes: Option<usize>,
    /// Pass on kv_transfer_params and bootstrap fields that clients sent.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    trust_client_kv_params: Option<bool>,
    /// Port of SGLang's bootstrap servers. Default: 8998.
    #[arg(long, value_name = "PORT")]
    sglang_bootstrap_port: Option<u16>,
    /// Port of Mooncake's bootstrap servers. Default: 8998.
    #[arg(long, value_name = "PORT")]
    mooncake_bootstrap_port: Option<u16>,
    /// Port on which servers are pulled from; of rank i, this port plus i. Default: 7777.
    #[arg(long, value_name = "PORT")]
    p2p_connector_port: Option<u16>,
    /// Have servers pull cached prompts from one another; only with nixlv2.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    enable_p2p_pull: Option<bool>,
    /// Port of /metrics; 0 for none. Default: 0.
    #[arg(long, value_name = "PORT")]
    metrics_port: Option<u16>,
    /// Accepted; trace headers are passed on either way, spans are not exported.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    tracing: Option<bool>,
    /// This pod's address, by which its ranks are named.
    #[arg(skip)]
    #[serde(skip)]
    pod_ip: Option<String>,
    /// The API server and the service account of this pod.
    #[arg(skip)]
    #[serde(skip)]
    cluster: Option<Cluster>,
    /// How long requests may run on after SIGTERM. Default: 30s.
    #[arg(long, value_name = "DURATION")]
    shutdown_timeout: Option<String>,
}

/// Flags of Go programs that guide-era charts still send. They mean nothing here.
#[derive(Clone, Debug, Default, Args)]
pub struct Ignored {
    /// Verbosity; RUST_LOG has taken its place.
    #[arg(short = 'v', hide = true, allow_negative_numbers = true)]
    pub v: Option<String>,
    /// Development logs.
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    pub zap_devel: Option<bool>,
    /// Form of logs.
    #[arg(long, hide = true)]
    pub zap_encoder: Option<String>,
    /// Verbosity.
    #[arg(long, hide = true)]
    pub zap_log_level: Option<String>,
    /// Stack traces.
    #[arg(long, hide = true)]
    pub zap_stacktrace_level: Option<String>,
    /// Form of times.
    #[arg(long, hide = true)]
    pub zap_time_encoding: Option<String>,
}

impl Ignored {
    /// Flags that were given, for one warning each.
    pub fn given(&self) -> impl Iterator<Item = &'static str> {
        [
            ("-v", self.v.is_some()),
            ("--zap-devel", self.zap_devel.is_some()),
            ("--zap-encoder", self.zap_encoder.is_some()),
            ("--zap-log-level", self.zap_log_level.is_some()),
            (
                "--zap-stacktrace-level",
                self.zap_stacktrace_level.is_some(),
            ),
            ("--zap-time-encoding", self.zap_time_encoding.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, given)| given.then_some(name))
    }
}

/// A truth value as Go reads one.
fn boolean(text: &str) -> Result<bool, &'static str> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("neither true nor false"),
    }
}

impl Settings {
    /// The layer that the environment makes, `var` being its lookup. A number that is none is left out, as upstream.
    pub fn from_env(var: impl Fn(&str) -> Option<String>) -> Self {
        let text = |name| var(name).filter(|v| !v.is_empty());
        let port = |name| text(name)?.parse().ok().filter(|&p: &u16| p != 0);
        Self {
            enable_prefiller_sampling: text("ENABLE_PREFILLER_SAMPLING")
                .and_then(|v| boolean(&v).ok()),
            inference_pool: text("INFERENCE_POOL"),
            inference_pool_namespace: text("INFERENCE_POOL_NAMESPACE"),
            inference_pool_name: text("INFERENCE_POOL_NAME"),
            sglang_bootstrap_port: port("SGLANG_BOOTSTRAP_PORT"),
            mooncake_bootstrap_port: port("MOONCAKE_BOOTSTRAP_PORT"),
            p2p_connector_port: port("P2P_CONNECTOR_PORT"),
            // An address upstream, `:9090`; its name is older than what else is served there.
            metrics_port: text("MORIIO_METRICS_ADDR")
                .and_then(|v| v.rsplit_once(':')?.1.parse().ok()),
            pod_ip: text("POD_IP"),
            cluster: text("KUBERNETES_SERVICE_HOST").map(|host| {
                let port = text("KUBERNETES_SERVICE_PORT").unwrap_or_else(|| "443".to_owned());
                let is_bare_v6 = host.contains(':') && !host.starts_with('[');
                let address = if is_bare_v6 {
                    format!("[{host}]:{port}")
                } else {
                    format!("{host}:{port}")
                };
                Cluster {
                    address,
                    account: ACCOUNT.into(),
                }
            }),
            ..Self::default()
        }
    }

    /// This layer without what `upper` says under a former name: that goes over the present one here.
    fn without_renamed(mut self, upper: &Self) -> Self {
        if upper.vllm_port.is_some() {
            self.model_server_port = None;
        }
        if upper.connector.is_some() {
            self.kv_connector = None;
        }
        if upper.inference_pool_name.is_some() {
            self.inference_pool = None;
        }
        self
    }

    /// A layer of YAML in which zero and nothing count as not said.
    #[must_use]
    pub fn without_zeros(mut self) -> Self {
        for port in [
            &mut self.port,
            &mut self.model_server_port,
            &mut self.vllm_port,
            &mut self.data_parallel_size,
            &mut self.sglang_bootstrap_port,
            &mut self.mooncake_bootstrap_port,
            &mut self.p2p_connector_port,
            &mut self.metrics_port,
        ] {
            port.take_if(|p| *p == 0);
        }
        for text in [
            &mut self.kv_connector,
            &mut self.connector,
            &mut self.ec_connector,
            &mut self.inference_pool,
            &mut self.pool_group,
            &mut self.prefill_retry_backoff,
        ] {
            text.take_if(|t| t.is_empty());
        }
        self
    }
}
