//! The configuration file of `baton gateway`, and what makes sense in it.

use crate::flow::{FlowControlConfig, FlowError};
use crate::keys::{ApiKey, KeyError, Keys};
use baton_fleet::{
    Address, BoxError, EndpointSpec, EndpointsFile, FileError, ListError, ROLE_LABEL,
};
use baton_http::{FolderError, Identity};
use baton_scheduler::{Policy, Role, Weights};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

/// Most endpoints of one gateway.
const MAX_ENDPOINTS: usize = 1024;

/// What `baton gateway --config FILE` reads, as JSON. Every field but the endpoints has a default.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GatewayConfig {
    /// Address to listen on. Default: loopback.
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one.
    pub port: u16,
    /// The servers, if they are always the same ones.
    pub endpoints: Vec<EndpointConfig>,
    /// A JSON file with the list of servers instead; it is read again whenever it changes.
    pub endpoints_file: Option<PathBuf>,
    /// Prompts with at least this many tokens that are not cached on their decode server go through a prefill server:
    /// 0 for all, `null` for none.
    pub pd_threshold: Option<u32>,
    /// Whether such a prompt goes there only if its first token is expected sooner that way.
    pub pd_sooner: bool,
    /// Scorers of decode servers; a scorer that is left out counts nothing.
    pub decode_weights: Weights,
    /// Scorers of prefill servers.
    pub prefill_weights: Weights,
    /// Bounds.
    pub limits: Limits,
    /// The certificate, if clients speak TLS: `"self-signed"`, or `{"folder": PATH}` with `tls.crt` and `tls.key`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Certificate>,
    /// Who may ask; everybody, if neither this nor `api_key_file` is there.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub api_keys: Vec<ApiKey>,
    /// A file with more of them: lines of `TENANT KEY`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_file: Option<PathBuf>,
    /// Whether requests wait here while servers are busy, and how.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flow_control: Option<FlowControlConfig>,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        let policy = Policy::default();
        Self {
            host: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 8000,
            endpoints: Vec::new(),
            endpoints_file: None,
            pd_threshold: policy.pd_threshold,
            pd_sooner: policy.pd_sooner,
            decode_weights: policy.decode,
            prefill_weights: policy.prefill,
            limits: Limits::default(),
            tls: None,
            api_keys: Vec::new(),
            api_key_file: None,
            flow_control: None,
        }
    }
}

/// Where the gateway's certificate comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Certificate {
    /// Made when it starts: it encrypts, and proves nothing.
    SelfSigned,
    /// `tls.crt` and `tls.key` in this folder, which are read again when they change.
    Folder(PathBuf),
}

/// One model server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndpointConfig {
    /// `host:port`; an IPv6 address in brackets.
    pub address: String,
    /// What it is there for.
    pub role: Role,
    /// What logs call it. Default: its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// Bounds of what a gateway stores and waits for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Longest body of a request; longer ones are answered 413.
    pub max_request_bytes: usize,
    /// Longest body of an answer that is not streamed; longer ones are answered 502.
    pub max_response_bytes: usize,
    /// Bytes of request bodies held at a time, all requests together; more are answered 503.
    pub max_buffered_bytes: usize,
    /// Requests in progress; more are answered 503.
    pub max_in_flight: usize,
    /// Servers that one request is sent to, one after another, before it is given up.
    pub max_tries: usize,
    /// Prefix blocks (64 bytes, about 16 tokens) remembered of each server.
    pub prefix_blocks_per_server: usize,
    /// Seconds that requests may run on after SIGTERM.
    pub shutdown_grace_s: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_request_bytes: 64 << 20,
            max_response_bytes: 64 << 20,
            max_buffered_bytes: 512 << 20,
            max_in_flight: 2048,
            max_tries: 3,
            prefix_blocks_per_server: 31_250,
            shutdown_grace_s: 30,
        }
    }
}

impl Limits {
    pub(crate) fn grace(&self) -> Duration {
        Duration::from_secs(self.shutdown_grace_s)
    }
}

/// Why a configuration makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Endpoints are given twice over, or not at all.
    #[error("give either endpoints or endpoints_file")]
    EndpointsOnceOnly,
    /// Not `host:port`.
    #[error("endpoint address {0:?} is not host:port")]
    Address(String),
    /// The same address twice.
    #[error("endpoint address {0:?} is given twice")]
    Duplicate(String),
    /// More endpoints than a gateway probes.
    #[error("more than {MAX_ENDPOINTS} endpoints")]
    TooManyEndpoints,
    /// A negative or infinite weight.
    #[error("weights must be finite and not negative")]
    Weights,
    /// A bound of zero.
    #[error("limits must be greater than zero")]
    Limits,
    /// No list comes of the endpoints file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The list does not make a fleet.
    #[error(transparent)]
    List(#[from] ListError),
    /// There is no certificate.
    #[error("tls: {0}")]
    Tls(#[from] FolderError),
    /// The queue makes no sense.
    #[error(transparent)]
    Flow(#[from] FlowError),
    /// The keys make no sense.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// The system has no randomness to give.
    #[error("no randomness")]
    Random,
}

impl GatewayConfig {
    pub(crate) fn policy(&self) -> Policy {
        Policy {
            decode: self.decode_weights,
            prefill: self.prefill_weights,
            pd_threshold: self.pd_threshold,
            pd_sooner: self.pd_sooner,
        }
    }

    /// Checks everything, the endpoints file included; nothing is bound or started.
    ///
    /// # Errors
    /// The first thing that makes no sense.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.resolve().map(drop)
    }

    /// Checks everything and returns the endpoints there are now.
    pub(crate) fn resolve(&self) -> Result<Vec<EndpointSpec>, ConfigError> {
        if self.endpoints.is_empty() == self.endpoints_file.is_none() {
            return Err(ConfigError::EndpointsOnceOnly);
        }
        if !self.decode_weights.are_sane() || !self.prefill_weights.are_sane() {
            return Err(ConfigError::Weights);
        }
        let l = &self.limits;
        if [
            l.max_request_bytes,
            l.max_response_bytes,
            l.max_buffered_bytes,
            l.max_in_flight,
            l.max_tries,
        ]
        .contains(&0)
        {
            return Err(ConfigError::Limits);
        }
        self.identity()?;
        self.keys()?;
        self.flow_control
            .as_ref()
            .map(FlowControlConfig::plan)
            .transpose()?;
        match self.file() {
            None => specs(&self.endpoints),
            Some(file) => Ok(file.read()?),
        }
    }

    /// Who the gateway is to clients that speak TLS.
    pub(crate) fn identity(&self) -> Result<Option<Identity>, FolderError> {
        let identity = |certificate: &Certificate| match certificate {
            Certificate::SelfSigned => Ok(Identity::self_signed()?),
            Certificate::Folder(folder) => Identity::from_folder(folder),
        };
        self.tls.as_ref().map(identity).transpose()
    }

    /// Who may ask.
    pub(crate) fn keys(&self) -> Result<Keys, KeyError> {
        Keys::new(&self.api_keys, self.api_key_file.as_deref())
    }

    /// The endpoints file, if there is one.
    pub(crate) fn file(&self) -> Option<EndpointsFile> {
        let path = self.endpoints_file.as_ref()?;
        Some(EndpointsFile::new(path, read_list))
    }
}

/// Reads an endpoints file.
pub(crate) fn read_list(text: &[u8]) -> Result<Vec<EndpointSpec>, BoxError> {
    let endpoints: Vec<EndpointConfig> = serde_json::from_slice(text)?;
    Ok(specs(&endpoints)?)
}

/// The endpoints as the fleet knows them. An address is listed once; what stays at one address is the same endpoint.
fn specs(endpoints: &[EndpointConfig]) -> Result<Vec<EndpointSpec>, ConfigError> {
    if endpoints.len() > MAX_ENDPOINTS {
        return Err(ConfigError::TooManyEndpoints);
    }
    let mut seen = BTreeSet::new();
    let specs = endpoints.iter().map(|endpoint| {
        if seen.insert(&endpoint.address) {
            endpoint.spec()
        } else {
            Err(ConfigError::Duplicate(endpoint.address.clone()))
        }
    });
    specs.collect()
}

impl EndpointConfig {
    fn spec(&self) -> Result<EndpointSpec, ConfigError> {
        let address = Address::parse(&self.address).map_err(|e| ConfigError::Address(e.0))?;
        let name = match &self.name {
            Some(name) => format!("{name}@{address}"),
            None => address.to_string(),
        };
        let mut spec = EndpointSpec::new(name, address);
        spec.labels
            .insert(ROLE_LABEL.to_owned(), self.role.name().to_owned());
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Vec<EndpointSpec>, String> {
        let config: GatewayConfig = serde_json::from_str(json).map_err(|e| e.to_string())?;
        config.resolve().map_err(|e| e.to_string())
    }

    #[test]
    fn a_list_of_endpoints_is_all_that_is_needed() {
        let found = read(
            r#"{"endpoints":[{"address":"127.0.0.1:1","role":"decode"},{"address":"[::1]:2","role":"prefill","name":"p"}]}"#,
        );
        let found = found.unwrap();
        assert_eq!(
            (found[0].role(), found[1].role()),
            (Role::Decode, Role::Prefill)
        );
        assert_eq!(found[0].name, "127.0.0.1:1");
        assert_eq!(found[1].name, "p@[::1]:2");
    }

    #[test]
    fn nonsense_is_refused_with_its_reason() {
        let cases = [
            (r#"{}"#, "either endpoints"),
            (
                r#"{"endpoints":[],"endpoints_file":"/nowhere/e.json"}"#,
                "cannot read",
            ),
            (
                r#"{"endpoints":[{"address":"a:1","role":"decode"}],"endpoints_file":"x"}"#,
                "either endpoints",
            ),
            (
                r#"{"endpoints":[{"address":"a","role":"decode"}]}"#,
                "not host:port",
            ),
            (
                r#"{"endpoints":[{"address":"u@a:1","role":"decode"}]}"#,
                "not host:port",
            ),
            (
                r#"{"endpoints":[{"address":"http://a:1","role":"decode"}]}"#,
                "not host:port",
            ),
            (
                r#"{"endpoints":[{"address":"a:1","role":"decode"},{"address":"a:1","role":"prefill"}]}"#,
                "twice",
            ),
            (
                r#"{"endpoints":[{"address":"a:1","role":"cook"}]}"#,
                "unknown variant",
            ),
            (r#"{"endpoint":[]}"#, "unknown field"),
            (
                r#"{"endpoints":[{"address":"a:1","role":"decode"}],"limits":{"max_tries":0}}"#,
                "greater than zero",
            ),
            (
                r#"{"endpoints":[{"address":"a:1","role":"decode"}],"decode_weights":{"queue-scorer":-1}}"#,
                "not negative",
            ),
        ];
        for (json, reason) in cases {
            let error = read(json).unwrap_err();
            assert!(error.contains(reason), "{json}: {error}");
        }
    }

    #[test]
    fn a_configuration_survives_being_written_and_read() {
        let config = GatewayConfig {
            pd_threshold: None,
            ..GatewayConfig::default()
        };
        let text = serde_json::to_string(&config).unwrap();
        let again: GatewayConfig = serde_json::from_str(&text).unwrap();
        assert_eq!(again.pd_threshold, None);
        assert_eq!(again.decode_weights, config.decode_weights);
    }
}
