//! What the settings mean, all of them together, or why they make no sense.

use crate::connector::Connector;
use crate::fallback::{Fallback, Policy};
use crate::pool::{Cluster, PoolRef, PoolVersion};
use crate::settings::Settings;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// A valid configuration.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address to listen on; all of them if none is given.
    pub host: Option<IpAddr>,
    /// Port of rank 0.
    pub port: u16,
    /// Ranks, each with a listener at the port after the one before.
    pub ranks: u16,
    /// Port of `/metrics`, if there is to be one.
    pub metrics_port: Option<u16>,
    /// Whether to serve TLS, and from which folder.
    pub serve_tls: Option<Certificate>,
    /// How long requests may run on after shutdown began.
    pub grace: Duration,
    pub(crate) decode_port: u16,
    pub(crate) connector: Connector,
    pub(crate) policy: Policy,
    pub(crate) prefill_timeout: Option<Duration>,
    pub(crate) max_body: usize,
    pub(crate) sampling: bool,
    pub(crate) trust_client_kv: bool,
    pub(crate) prefill_tls: StageTls,
    pub(crate) decode_tls: StageTls,
    pub(crate) max_idle: usize,
    pub(crate) allow: Allowed,
    pub(crate) sglang_port: u16,
    pub(crate) mooncake_port: u16,
    pub(crate) p2p_port: u16,
    pub(crate) p2p_pull: bool,
    pub(crate) pod_ip: Option<String>,
}

/// Where a server's certificate comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Certificate {
    /// Made at start.
    SelfSigned,
    /// `tls.crt` and `tls.key` in this folder.
    Folder(PathBuf),
}

/// How a server is spoken to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum StageTls {
    #[default]
    Plain,
    Verified,
    Unverified,
}

/// Which prefill servers may be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Allowed {
    Anyone,
    /// Those that a file lists.
    File(PathBuf),
    /// The ready prefill pods of an InferencePool.
    Pool(PoolRef, Option<Cluster>),
}

/// Why a configuration makes no sense. Each names the flag.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not one of ours.
    #[error("--{flag}={value} is not supported; supported: {supported}")]
    Unsupported {
        /// The flag.
        flag: &'static str,
        /// What it was given.
        value: String,
        /// What it may be given.
        supported: String,
    },
    /// A number outside its range.
    #[error("--{flag}={value} is out of range: {range}")]
    Range {
        /// The flag.
        flag: &'static str,
        /// What it was given.
        value: String,
        /// What it may be given.
        range: &'static str,
    },
    /// Not a duration.
    #[error("--{flag}={value} is no duration such as 200ms, 1.5s or 1m30s")]
    Duration {
        /// The flag.
        flag: &'static str,
        /// What it was given.
        value: String,
    },
    /// Two flags that exclude each other.
    #[error("--{0} cannot be used with {1}")]
    Conflict(&'static str, String),
    /// A flag that needs another.
    #[error("--{0} needs {1}")]
    Needs(&'static str, &'static str),
}

/// A configuration, and what should be said about it once.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// What it means.
    pub config: Config,
    /// Deprecated or meaningless settings.
    pub warnings: Vec<String>,
}

impl Settings {
    /// What all layers together mean.
    ///
    /// # Errors
    /// The first thing that makes no sense; see [`ConfigError`].
    pub fn resolve(self) -> Result<Resolved, ConfigError> {
        let mut warnings = self.outdated();
        let connector = self.connector()?;
        self.refuse_unsupported()?;
        let (ranks, decode_port, p2p_port) = self.ranks()?;
        let p2p_pull = self.enable_p2p_pull.unwrap_or(false);
        if p2p_pull && connector != Connector::Nixlv2 {
            let with = self.kv_connector.as_deref().unwrap_or_default();
            return Err(ConfigError::Conflict(
                "enable-p2p-pull",
                format!("--kv-connector={with}"),
            ));
        }
        if self.tracing == Some(true) {
            warnings
                .push("--tracing: trace headers are passed on, spans are not exported".to_owned());
        }
        let timeout = duration("prefill-timeout", self.prefill_timeout.as_deref(), "0")?;
        let config = Config {
            host: self.host,
            port: self.port.unwrap_or(8000),
            ranks,
            metrics_port: self.metrics_port.filter(|&port| port != 0),
            serve_tls: self.serve_tls()?,
            grace: duration("shutdown-timeout", self.shutdown_timeout.as_deref(), "30s")?,
            decode_port,
            connector,
            policy: self.policy()?,
            prefill_timeout: Some(timeout).filter(|t| !t.is_zero()),
            max_body: self.max_body_bytes.unwrap_or(64 << 20),
            sampling: self.enable_prefiller_sampling.unwrap_or(false),
            trust_client_kv: self.trust_client_kv_params.unwrap_or(false),
            prefill_tls: self.stage_tls("prefiller")?,
            decode_tls: self.stage_tls("decoder")?,
            max_idle: self.max_idle_conns_per_host.unwrap_or(1024),
            allow: self.allowed()?,
            sglang_port: at_least_one(
                "sglang-bootstrap-port",
                self.sglang_bootstrap_port.unwrap_or(8998),
            )?,
            mooncake_port: at_least_one(
                "mooncake-bootstrap-port",
                self.mooncake_bootstrap_port.unwrap_or(8998),
            )?,
            p2p_port,
            p2p_pull,
            pod_ip: self.pod_ip,
        };
        Ok(Resolved { config, warnings })
    }

    /// One line for each setting that has a newer form.
    fn outdated(&self) -> Vec<String> {
        [
            (self.vllm_port.is_some(), "vllm-port", "model-server-port"),
            (self.connector.is_some(), "connector", "kv-connector"),
            (
                self.prefiller_use_tls.is_some(),
                "prefiller-use-tls",
                "enable-tls=prefiller",
            ),
            (
                self.decoder_use_tls.is_some(),
                "decoder-use-tls",
                "enable-tls=decoder",
            ),
            (
                self.prefiller_tls_insecure_skip_verify.is_some(),
                "prefiller-tls-insecure-skip-verify",
                "tls-insecure-skip-verify=prefiller",
            ),
            (
                self.decoder_tls_insecure_skip_verify.is_some(),
                "decoder-tls-insecure-skip-verify",
                "tls-insecure-skip-verify=decoder",
            ),
            (
                self.inference_pool_name.is_some(),
                "inference-pool-name",
                "inference-pool",
            ),
            (
                self.inference_pool_namespace.is_some(),
                "inference-pool-namespace",
                "inference-pool",
            ),
        ]
        .into_iter()
        .filter(|(given, ..)| *given)
        .map(|(_, old, new)| format!("--{old} is deprecated; use --{new}"))
        .collect()
    }

    fn connector(&self) -> Result<Connector, ConfigError> {
        let (flag, name) = match (&self.kv_connector, &self.connector) {
            (Some(name), _) => ("kv-connector", name.as_str()),
            (None, Some(name)) => ("connector", name.as_str()),
            (None, None) => ("kv-connector", "nixlv2"),
        };
        let unsupported = || unsupported(flag, name, &Connector::NAMES);
        Connector::named(name).ok_or_else(unsupported)
    }

    /// How many ranks there are, the decode server's first port, and the first that is pulled from.
    fn ranks(&self) -> Result<(u16, u16, u16), ConfigError> {
        let ranks = at_least_one("data-parallel-size", self.data_parallel_size.unwrap_or(1))?;
        let decode_port = self.model_server_port.or(self.vllm_port).unwrap_or(8200);
        at_least_one("model-server-port", decode_port)?;
        let p2p_port = at_least_one(
            "p2p-connector-port",
            self.p2p_connector_port.unwrap_or(7777),
        )?;
        for (flag, base) in [
            ("port", self.port.unwrap_or(8000)),
            ("model-server-port", decode_port),
            ("p2p-connector-port", p2p_port),
        ] {
            if base.checked_add(ranks - 1).is_none() {
                return Err(range(flag, &base, "every rank needs a port below 65536"));
            }
        }
        Ok((ranks, decode_port, p2p_port))
    }

    fn refuse_unsupported(&self) -> Result<(), ConfigError> {
        match (&self.ec_connector, self.decode_chunk_size) {
            (Some(name), _) if !name.is_empty() => {
                Err(unsupported("ec-connector", name, &["none"]))
            }
            (_, Some(n)) if n < 0 => Err(range("decode-chunk-size", &n, "0 or more")),
            (_, Some(n)) if n > 0 => Err(unsupported("decode-chunk-size", &n.to_string(), &["0"])),
            _ => Ok(()),
        }
    }

    fn policy(&self) -> Result<Policy, ConfigError> {
        let retries = self.prefill_max_retries.unwrap_or(0).max(0);
        let pause = duration(
            "prefill-retry-backoff",
            self.prefill_retry_backoff.as_deref(),
            "200ms",
        )?;
        if retries > 0 && pause.is_zero() {
            return Err(range(
                "prefill-retry-backoff",
                &"0",
                "more than 0 if there are retries",
            ));
        }
        let fallback = match self.prefill_fallback.as_deref() {
            None | Some("decode") => Fallback::Decode,
            Some("error") => Fallback::Error,
            Some(other) => {
                return Err(unsupported("prefill-fallback", other, &["decode", "error"]));
            }
        };
        Ok(Policy {
            fallback,
            retries: u32::try_from(retries).unwrap_or(u32::MAX),
            pause,
            max_alone: self.fallback_max_prompt_bytes.unwrap_or(4 << 20),
        })
    }

    fn serve_tls(&self) -> Result<Option<Certificate>, ConfigError> {
        if !self.secure_proxy.unwrap_or(true) {
            return Ok(None);
        }
        let folder = self.cert_path.clone().filter(|p| !p.as_os_str().is_empty());
        Ok(Some(
            folder.map_or(Certificate::SelfSigned, Certificate::Folder),
        ))
    }

    fn stage_tls(&self, stage: &str) -> Result<StageTls, ConfigError> {
        const STAGES: [&str; 3] = ["prefiller", "decoder", "encoder"];
        for (flag, list) in [
            ("enable-tls", &self.enable_tls),
            ("tls-insecure-skip-verify", &self.tls_insecure_skip_verify),
        ] {
            if let Some(unknown) = list.iter().find(|s| !STAGES.contains(&s.as_str())) {
                return Err(unsupported(flag, unknown, &STAGES));
            }
        }
        let (old_use, old_skip) = match stage {
            "prefiller" => (
                self.prefiller_use_tls,
                self.prefiller_tls_insecure_skip_verify,
            ),
            _ => (self.decoder_use_tls, self.decoder_tls_insecure_skip_verify),
        };
        let listed = |list: &[String], old: Option<bool>| {
            list.iter().any(|s| s == stage) || old.unwrap_or(false)
        };
        let skip = listed(&self.tls_insecure_skip_verify, old_skip);
        let tls = match (listed(&self.enable_tls, old_use), skip) {
            (false, _) => StageTls::Plain,
            (true, false) => StageTls::Verified,
            (true, true) => StageTls::Unverified,
        };
        Ok(tls)
    }

    fn allowed(&self) -> Result<Allowed, ConfigError> {
        const GROUPS: [&str; 2] = [
            "inference.networking.k8s.io",
            "inference.networking.x-k8s.io",
        ];
        let group = self.pool_group.as_deref().unwrap_or(GROUPS[0]);
        let version = PoolVersion::of_group(group)
            .ok_or_else(|| unsupported("pool-group", group, &GROUPS))?;
        match (
            &self.allow_list,
            self.enable_ssrf_protection.unwrap_or(false),
        ) {
            (Some(file), _) => Ok(Allowed::File(file.clone())),
            (None, false) => Ok(Allowed::Anyone),
            (None, true) => {
                let pool = self.pool(version).ok_or(ConfigError::Needs(
                    "enable-ssrf-protection",
                    "--inference-pool=POOL or --allow-list=FILE",
                ))?;
                Ok(Allowed::Pool(pool, self.cluster.clone()))
            }
        }
    }

    fn pool(&self, version: PoolVersion) -> Option<PoolRef> {
        let given = |text: &Option<String>| text.clone().filter(|t| !t.is_empty());
        let default = given(&self.inference_pool_namespace).unwrap_or_else(|| "default".to_owned());
        let named = given(&self.inference_pool).or_else(|| given(&self.inference_pool_name))?;
        let (namespace, name) = match named.split_once('/') {
            Some((namespace, name)) => (namespace.to_owned(), name.to_owned()),
            None => (default, named),
        };
        let is_label = |text: &str| {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
            !text.is_empty() && text.bytes().all(plain)
        };
        (is_label(&namespace) && is_label(&name)).then_some(PoolRef {
            namespace,
            name,
            version,
        })
    }
}

fn unsupported(flag: &'static str, value: &str, supported: &[&str]) -> ConfigError {
    ConfigError::Unsupported {
        flag,
        value: value.to_owned(),
        supported: supported.join(", "),
    }
}

fn range(flag: &'static str, value: &dyn ToString, range: &'static str) -> ConfigError {
    ConfigError::Range {
        flag,
        value: value.to_string(),
        range,
    }
}

fn at_least_one(flag: &'static str, value: u16) -> Result<u16, ConfigError> {
    match value {
        0 => Err(range(flag, &value, "1 to 65535")),
        _ => Ok(value),
    }
}

/// A duration as Go writes them: `200ms`, `1.5s`, `1m30s`, `0`.
fn duration(
    flag: &'static str,
    given: Option<&str>,
    default: &str,
) -> Result<Duration, ConfigError> {
    let text = given.unwrap_or(default);
    parse_duration(text).ok_or_else(|| ConfigError::Duration {
        flag,
        value: text.to_owned(),
    })
}

fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.find(|c: char| c != '.' && !c.is_ascii_digit())?);
        let end = after
            .find(|c: char| c == '.' || c.is_ascii_digit())
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let seconds = match unit {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let part = Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?;
        total = total.checked_add(part)?;
        rest = after;
    }
    (!text.is_empty()).then_some(total)
}

#[cfg(test)]
mod tests;
