//! The command line: upstream's flags of all its generations, and what they mean together.
//!
//! What older generations had and means nothing here is accepted and named in a warning; what would change something
//! that cannot be changed is refused.

use crate::objects::Objects;
use crate::peer_flags::{PeerFlags, PeerFlagsError};
use crate::pool::PoolConfig;
use crate::selector::{self, SelectorError};
use crate::server_flags::ServerFlags;
use baton_ext_proc::Limits;
use baton_k8s::{OLD_GROUP, POOL_GROUP, PoolName};
use baton_scheduler::config::{self, Invalid, PickerConfig};
use clap::{ArgAction, Args};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

/// The longest wait that is told from no bound at all.
const LONGEST: Duration = Duration::from_secs(86_400);
/// Said where the configuration has a precise index and nobody said how prompts become tokens.
const WITHOUT_TOKENIZER: &str = "without --tokenizer only prompts that are token ids can be looked up in what servers report; for all others the approximate index decides";
/// Said where nothing needs a tokenizer.
const TOKENIZER_ALONE: &str =
    "--tokenizer means nothing without a precise prefix index in the configuration";

/// Said where the environment says no to a flag.
const TRACES_OFF: &str = "--tracing means nothing: OTEL_TRACES_EXPORTER, if it is said, must be otlp, and OTEL_SDK_DISABLED not true";

/// Where requests to a picker come from, and how it decides.
#[derive(Clone, Debug, Args)]
pub struct Settings {
    /// Address to listen on. Default: every address if endpoints come from Kubernetes, else loopback.
    #[arg(long, value_name = "IP")]
    pub host: Option<IpAddr>,
    /// Port of the proxy's questions (ext_proc over gRPC); 0 takes a free one.
    #[arg(long, default_value_t = 9002, value_name = "PORT")]
    pub grpc_port: u16,
    /// Port of gRPC's health protocol, in plain text; 0 takes a free one.
    #[arg(long, default_value_t = 9003, value_name = "PORT")]
    pub grpc_health_port: u16,
    /// Port of /metrics; 0 takes a free one.
    #[arg(long, default_value_t = 9090, value_name = "PORT")]
    pub metrics_port: u16,
    /// Configuration, an EndpointPickerConfig in YAML or JSON.
    #[arg(
        long,
        alias = "configFile",
        value_name = "FILE",
        conflicts_with = "config_text"
    )]
    pub config_file: Option<PathBuf>,
    /// The same as text.
    #[arg(long, alias = "configText", value_name = "TEXT")]
    pub config_text: Option<String>,
    /// Name of the InferencePool whose pods are the endpoints.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["endpoint_selector", "endpoints_file"])]
    pub pool_name: Option<String>,
    /// Its namespace.
    #[arg(
        long,
        env = "NAMESPACE",
        default_value = "default",
        value_name = "NAMESPACE"
    )]
    pub pool_namespace: String,
    /// Its API group.
    #[arg(
        long,
        default_value = "inference.networking.k8s.io",
        value_name = "GROUP"
    )]
    pub pool_group: String,
    /// Labels of the pods that are the endpoints, without an InferencePool, as kubectl takes them: app=vllm,tier!=test.
    #[arg(long, value_name = "SELECTOR", conflicts_with = "endpoints_file")]
    pub endpoint_selector: Option<String>,
    /// Ports of those pods, at most 8; each is an endpoint.
    #[arg(long, value_delimiter = ',', value_name = "PORTS")]
    pub endpoint_target_ports: Vec<u16>,
    /// How to reach Kubernetes' API server. Default: KUBECONFIG, else the account of the pod.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Of all pickers of a pool one leads, and only that one is ready.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true", action = ArgAction::Set)]
    pub ha_enable_leader_election: bool,
    /// With Kubernetes: answer /metrics only to who may get that path.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", action = ArgAction::Set)]
    pub metrics_endpoint_auth: bool,
    /// A file that lists the endpoints, without Kubernetes: what the plugin `file-discovery` does.
    #[arg(long, value_name = "FILE")]
    pub endpoints_file: Option<PathBuf>,
    /// Priorities by the name of the objective, as NAME=PRIORITY with commas between; a pool has its own.
    #[arg(long, value_parser = objective, value_delimiter = ',', value_name = "NAME=PRIORITY", conflicts_with = "pool_name", allow_hyphen_values = true)]
    pub objectives: Vec<(Box<str>, i32)>,
    /// Choose among all endpoints, whatever the proxy restricts.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true", action = ArgAction::Set)]
    pub disable_endpoint_subset_filter: bool,
    /// Speak TLS with the proxy.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true", action = ArgAction::Set)]
    pub secure_serving: bool,
    /// Folder with tls.crt and tls.key. Default: a certificate of its own.
    #[arg(long, value_name = "FOLDER")]
    pub cert_path: Option<PathBuf>,
    /// Read the certificate again whenever it changes.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true", action = ArgAction::Set)]
    pub enable_cert_reload: bool,
    /// Answer questions about health on the proxy's port too.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true", action = ArgAction::Set)]
    pub health_checking: bool,
    /// Tell the proxy the candidates' scores.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true", action = ArgAction::Set)]
    pub emit_endpoint_scores: bool,
    /// How long requests are taken after SIGTERM, while readiness says no; 0s for not at all.
    #[arg(long, default_value = "30s", value_parser = length, value_name = "DURATION")]
    pub drain_timeout: Duration,
    /// Longest message of the proxy, such as 10MiB.
    #[arg(long, value_parser = size, value_name = "SIZE")]
    pub grpc_max_recv_msg_size: Option<usize>,
    /// Longest body of a request, such as 64MiB.
    #[arg(long, default_value = "64MiB", value_parser = size, value_name = "SIZE")]
    pub max_body_size: usize,
    /// Longest wait for a decision, queueing not counted.
    #[arg(long, default_value = "10s", value_parser = length, value_name = "DURATION")]
    pub decision_timeout: Duration,
    /// Keep the last N decisions and their reasons, at /debug/decisions beside the metrics.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub debug_decisions: usize,
    /// Send traces of requests to a collector, as the variables OTEL_* say.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = false, default_missing_value = "true", action = ArgAction::Set)]
    pub tracing: bool,
    /// Tokenizer and chat template for prompts that are looked up in what servers report: a model's folder or .gguf file.
    #[arg(long, value_name = "MODEL")]
    pub tokenizer: Option<PathBuf>,
    /// Where servers have their metrics.
    #[command(flatten)]
    pub servers: ServerFlags,
    /// Who else decides for these endpoints.
    #[command(flatten)]
    pub peers: PeerFlags,
    /// Flags that mean nothing here.
    #[command(flatten)]
    pub ignored: Ignored,
}

macro_rules! ignored {
    ($($field:ident $(short $short:literal)? ,)*) => {
        /// Flags that upstream has, or had, and that change nothing here.
        #[derive(Clone, Debug, Default, Args)]
        pub struct Ignored {
            $(#[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true", value_name = "X" $(, short = $short)?)]
            #[doc = concat!("`--", stringify!($field), "`, with dashes.")]
            pub $field: Option<String>,)*
        }

        impl Ignored {
            /// Those that were given, as they are written.
            #[must_use]
            pub fn given(&self) -> Vec<String> {
                let mut given = Vec::new();
                $(if self.$field.is_some() {
                    given.push(format!("--{}", stringify!($field).replace('_', "-")));
                })*
                given
            }
        }
    };
}

ignored! {
    v short 'v',
    zap_log_level,
    zap_encoder,
    zap_devel,
    zap_stacktrace_level,
    zap_time_encoding,
    refresh_metrics_interval,
    refresh_prometheus_metrics_interval,
    metrics_staleness_threshold,
    enable_pprof,
    grpc_max_send_msg_size,
    enable_grpc_stream_metrics,
    allow_experimental_plugins,
}

/// What the settings mean.
#[derive(Clone, Debug)]
pub struct Config {
    /// Nothing for every address.
    pub(crate) host: Option<IpAddr>,
    pub(crate) grpc_port: u16,
    pub(crate) health_port: u16,
    pub(crate) metrics_port: u16,
    pub(crate) picker: PickerConfig,
    pub(crate) source: Source,
    pub(crate) heeds_subset: bool,
    pub(crate) emits_scores: bool,
    pub(crate) secure: bool,
    pub(crate) certificate: Option<PathBuf>,
    pub(crate) reloads_certificate: bool,
    pub(crate) health_beside: bool,
    pub(crate) drain: Duration,
    pub(crate) limits: Limits,
    pub(crate) decisions: usize,
    pub(crate) tokenizer: Option<PathBuf>,
    /// What an operator says, until a pool says otherwise.
    pub(crate) objects: Objects,
    pub(crate) traces: Option<baton_telemetry::Settings>,
    /// Other pickers, and the port on which they are heard.
    pub(crate) peers: Option<(baton_peers::Settings, u16)>,
}

/// Where the endpoints come from.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// A file that lists them.
    File(PathBuf),
    /// The pods of a pool.
    Pool(PoolConfig),
}

impl Source {
    /// The name that metrics have for it; empty for a file.
    pub(crate) fn pool(&self) -> &str {
        match self {
            Self::File(_) => "",
            Self::Pool(pool) => &pool.name.name,
        }
    }
}

/// Why settings make no sense.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// No file of that name, or no text in it.
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] std::io::Error),
    /// Neither YAML nor JSON.
    #[error("the configuration is no YAML")]
    Yaml(#[from] serde_norway::Error),
    /// It says something that cannot be.
    #[error("the configuration makes no sense:\n{0}")]
    Invalid(#[from] Invalid),
    /// Nobody says where the endpoints are.
    #[error(
        "say where the endpoints are: --pool-name, --endpoint-selector, --endpoints-file, or the plugin file-discovery in the configuration"
    )]
    NoEndpoints,
    /// A pool and a file.
    #[error(
        "endpoints come from Kubernetes or from the plugin file-discovery in the configuration, not from both"
    )]
    TwoSources,
    /// A selector and ports that make no endpoints.
    #[error(transparent)]
    Selector(#[from] SelectorError),
    /// A group that has no pools.
    #[error(
        "--pool-group {0}: pools are of {POOL_GROUP}, or of {OLD_GROUP} before they were stable"
    )]
    Group(String),
    /// A variable about traces.
    #[error(transparent)]
    Traces(#[from] baton_telemetry::SettingsError),
    /// Flags about other pickers.
    #[error(transparent)]
    Peers(#[from] PeerFlagsError),
    /// An election without Kubernetes.
    #[error(
        "--ha-enable-leader-election needs a lease of Kubernetes: give --pool-name, or --endpoint-selector"
    )]
    NoLease,
}

impl Settings {
    /// Reads the configuration and puts everything together, with what is worth saying about it.
    ///
    /// # Errors
    /// See [`SettingsError`].
    pub fn resolve(self) -> Result<(Config, Vec<String>), SettingsError> {
        let mut picker = config::load(&self.configuration()?)?;
        let mut warnings: Vec<String> = picker.warnings.iter().map(ToString::to_string).collect();
        for flag in self.ignored.given() {
            warnings.push(format!("{flag} means nothing here"));
        }
        self.servers.clone().apply(&mut picker.data);
        let source = self.source(&picker)?;
        if matches!(source, Source::File(_)) && self.kubeconfig.is_some() {
            warnings.push("--kubeconfig means nothing with endpoints from a file".to_owned());
        }
        match (&picker.plan.precise, &self.tokenizer) {
            (Some(_), None) => warnings.push(WITHOUT_TOKENIZER.to_owned()),
            (None, Some(_)) => warnings.push(TOKENIZER_ALONE.to_owned()),
            _ => {}
        }
        let traces = self.traces()?;
        if self.tracing && traces.is_none() {
            warnings.push(TRACES_OFF.to_owned());
        }
        let limits = Limits {
            max_body: self.max_body_size,
            decision: self.decision_timeout.saturating_add(longest_wait(&picker)),
            ..Limits::default()
        };
        let config = Config {
            host: match &source {
                Source::File(_) => Some(self.host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))),
                Source::Pool(_) => self.host,
            },
            grpc_port: self.grpc_port,
            health_port: self.grpc_health_port,
            metrics_port: self.metrics_port,
            source,
            picker,
            heeds_subset: !self.disable_endpoint_subset_filter,
            emits_scores: self.emit_endpoint_scores,
            secure: self.secure_serving,
            certificate: self.cert_path,
            reloads_certificate: self.enable_cert_reload,
            health_beside: self.health_checking,
            drain: self.drain_timeout,
            limits: Limits {
                max_message: self.grpc_max_recv_msg_size.unwrap_or(limits.max_message),
                ..limits
            },
            decisions: self.debug_decisions,
            tokenizer: self.tokenizer,
            objects: Objects {
                objectives: self.objectives.into_iter().collect(),
                ..Objects::default()
            },
            traces,
            peers: self.peers.resolve()?,
        };
        Ok((config, warnings))
    }

    fn traces(&self) -> Result<Option<baton_telemetry::Settings>, SettingsError> {
        let read = || baton_telemetry::Settings::read(|name| std::env::var(name).ok());
        Ok(self.tracing.then(read).transpose()?.flatten())
    }

    /// Where the endpoints come from: one place.
    fn source(&self, picker: &PickerConfig) -> Result<Source, SettingsError> {
        let discovery = picker.data.discovery.as_ref().map(|d| &*d.path);
        let pods = selector::pool(
            self.endpoint_selector.as_deref(),
            &self.endpoint_target_ports,
        )?;
        let name = match (&self.pool_name, &pods) {
            (Some(name), _) => Some(name.clone()),
            (None, Some(_)) => Some(selector::name(std::env::var("POD_NAME").ok().as_deref())),
            (None, None) => None,
        };
        let Some(name) = name else {
            if self.ha_enable_leader_election {
                return Err(SettingsError::NoLease);
            }
            let file = self.endpoints_file.clone();
            let file = file.or_else(|| discovery.map(PathBuf::from));
            return file.map(Source::File).ok_or(SettingsError::NoEndpoints);
        };
        if discovery.is_some() {
            return Err(SettingsError::TwoSources);
        }
        if ![POOL_GROUP, OLD_GROUP].contains(&&*self.pool_group) {
            return Err(SettingsError::Group(self.pool_group.clone()));
        }
        // A flag that a chart left empty means what no flag means.
        let namespace = Some(&*self.pool_namespace).filter(|n| !n.is_empty());
        Ok(Source::Pool(PoolConfig {
            name: PoolName {
                group: self.pool_group.clone(),
                ..PoolName::new(namespace.unwrap_or("default"), &name)
            },
            itself: pods,
            kubeconfig: self.kubeconfig.clone(),
            elects: self.ha_enable_leader_election,
            checks_readers: self.metrics_endpoint_auth,
        }))
    }

    fn configuration(&self) -> Result<serde_json::Value, SettingsError> {
        let text = match (&self.config_file, &self.config_text) {
            (Some(path), _) => std::fs::read_to_string(path)
                .map_err(|error| SettingsError::Read(path.clone(), error))?,
            (None, Some(text)) => text.clone(),
            (None, None) => return Ok(config::default_config()),
        };
        Ok(serde_norway::from_str(&text)?)
    }
}

fn objective(text: &str) -> Result<(Box<str>, i32), String> {
    let (name, priority) = text
        .split_once('=')
        .filter(|(name, _)| !name.is_empty())
        .ok_or("an objective is NAME=PRIORITY")?;
    let priority = priority
        .parse()
        .map_err(|_| "a priority is a whole number")?;
    Ok((name.into(), priority))
}

/// How long a request may stand in the queue before it is decided.
fn longest_wait(picker: &PickerConfig) -> Duration {
    let Some(flow) = &picker.flow_control else {
        return Duration::ZERO;
    };
    let waits = [flow.queue.default_ttl, flow.queue.no_endpoint_ttl];
    // Without a bound of its own a request waits as long as its client.
    waits
        .into_iter()
        .map(|wait| wait.unwrap_or(LONGEST))
        .max()
        .unwrap_or(LONGEST)
}

/// A length of time as Go writes it.
fn length(text: &str) -> Result<Duration, &'static str> {
    config::duration(text).ok_or("this is no length of time, such as 200ms or 1m30s")
}

/// A quantity as Kubernetes writes it, with or without a `B` at its end.
fn size(text: &str) -> Result<usize, &'static str> {
    let bare = text.strip_suffix('B').unwrap_or(text);
    let bytes = config::quantity(bare).and_then(|n| usize::try_from(n).ok());
    bytes
        .filter(|&n| n > 0)
        .ok_or("this is no size, such as 10MiB")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        settings: Settings,
    }

    fn resolve(line: &str) -> Result<Config, String> {
        let words = std::iter::once("epp").chain(line.split_whitespace());
        let line = Line::try_parse_from(words).map_err(|e| e.to_string())?;
        let resolved = line.settings.resolve();
        resolved
            .map(|(config, _)| config)
            .map_err(|e| e.to_string())
    }

    fn pool(line: &str) -> PoolConfig {
        let config = resolve(line).unwrap();
        assert_eq!(config.host, None);
        match config.source {
            Source::Pool(pool) => pool,
            Source::File(file) => panic!("{file:?}"),
        }
    }

    #[test]
    fn a_file_means_loopback_and_a_pool_every_address() {
        let file = resolve("--endpoints-file f").unwrap();
        assert_eq!(file.host, Some(IpAddr::V4(Ipv4Addr::LOCALHOST)));
        assert_eq!(file.source.pool(), "");
        let given = resolve("--pool-name p --host 127.0.0.2").unwrap();
        assert_eq!(given.host, Some("127.0.0.2".parse().unwrap()));
        assert_eq!(given.source.pool(), "p");
    }

    #[test]
    fn a_pool_is_named_by_flags_that_may_be_empty() {
        let plain = pool("--pool-name p --pool-namespace=");
        assert_eq!(plain.name, PoolName::new("default", "p"));
        assert!(!plain.elects && plain.checks_readers);
        let old = format!(
            "--pool-name p --pool-namespace n --pool-group {OLD_GROUP} --kubeconfig k \
             --ha-enable-leader-election --metrics-endpoint-auth=false"
        );
        let old = pool(&old);
        assert_eq!((&*old.name.namespace, &*old.name.group), ("n", OLD_GROUP));
        assert_eq!(old.kubeconfig, Some("k".into()));
        assert!(old.elects && !old.checks_readers);
    }

    #[test]
    fn pods_make_a_pool_of_their_own() {
        let pods = pool("--endpoint-selector a=b,c!=d --endpoint-target-ports 8000,8001,8000");
        let itself = pods.itself.unwrap();
        let members = baton_k8s::Members::Query("a=b,c!=d".to_owned());
        assert_eq!(itself.members, members);
        assert_eq!(itself.target_ports, [8000, 8001]);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        for (line, word) in [
            ("", "--pool-name"),
            ("--endpoint-selector a=b", "--endpoint-target-ports"),
            (
                "--endpoint-target-ports 1 --pool-name p",
                "--endpoint-selector",
            ),
            (
                "--endpoint-selector a=b --endpoints-file f",
                "cannot be used with",
            ),
            (
                "--pool-name p --endpoint-selector a=b",
                "cannot be used with",
            ),
            ("--pool-name p --endpoints-file f", "cannot be used with"),
            ("--pool-name p --pool-group g", "--pool-group g"),
            (
                "--endpoints-file f --ha-enable-leader-election",
                "needs a lease",
            ),
        ] {
            let error = resolve(line).err().unwrap_or_default();
            assert!(error.contains(word), "{line}: {error}");
        }
    }
}
