//! `--kv-events-config`: vLLM's JSON, with vLLM's keys and defaults.

use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;

use crate::encode::{EventForm, Form, HashForm};
use crate::endpoint::{Endpoint, EndpointError};

/// Most that any of the counts may be.
const MAX_COUNT: usize = 10_000_000;

/// Most bytes of a topic.
const MAX_TOPIC: usize = 1024;

/// How a server publishes its events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublisherConfig {
    /// Where, or to whom.
    pub endpoint: Endpoint,
    /// Where the last batches can be asked for.
    pub replay: Option<SocketAddr>,
    /// How many of them.
    pub buffer_steps: usize,
    /// Batches by which a subscriber may be behind before it misses some.
    pub hwm: usize,
    /// Batches that may wait to be published.
    pub max_queue_size: usize,
    /// What every batch begins with.
    pub topic: String,
    /// How batches are written.
    pub form: Form,
    /// How they are answered with when asked for again.
    pub replay_form: ReplayForm,
}

/// What an answer to a replay request consists of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReplayForm {
    /// Topic, number and batch, as a subscriber gets them: vLLM since 0.26.
    #[default]
    Topic,
    /// Number and batch: vLLM before, SGLang.
    Plain,
}

/// Why a configuration is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {why}")]
pub struct ConfigError {
    /// The key that is wrong; `.` where the whole is.
    pub key: String,
    /// In what way.
    pub why: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Keys {
    enable_kv_cache_events: bool,
    publisher: Option<Kind>,
    endpoint: String,
    replay_endpoint: Option<String>,
    buffer_steps: usize,
    hwm: usize,
    max_queue_size: usize,
    topic: String,
    /// Ours: vLLM's versions differ in this.
    event_format: EventForm,
    /// Ours, for the same reason.
    replay_format: ReplayForm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Null,
    Zmq,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            enable_kv_cache_events: false,
            publisher: None,
            endpoint: "tcp://*:5557".to_owned(),
            replay_endpoint: None,
            buffer_steps: 10_000,
            hwm: 100_000,
            max_queue_size: 100_000,
            topic: String::new(),
            event_format: EventForm::default(),
            replay_format: ReplayForm::default(),
        }
    }
}

impl PublisherConfig {
    /// Reads the flag's value; `None` if it says that nothing is published. `star` is the address that `*` means.
    ///
    /// # Errors
    /// When it is no JSON, has keys or values that are not known, or contradicts itself.
    pub fn from_json(
        json: &str,
        star: IpAddr,
        hashes: HashForm,
    ) -> Result<Option<Self>, ConfigError> {
        if !json.trim_start().starts_with('{') {
            return Err(wrong(".", &"expected a JSON object"));
        }
        let mut json = serde_json::Deserializer::from_str(json);
        let keys: Keys =
            serde_path_to_error::deserialize(&mut json).map_err(|error| ConfigError {
                key: error.path().to_string(),
                why: error.into_inner().to_string(),
            })?;
        json.end().map_err(|error| wrong(".", &error))?;
        let kind = keys.publisher.unwrap_or(if keys.enable_kv_cache_events {
            Kind::Zmq
        } else {
            Kind::Null
        });
        let config = keys.check(star, hashes)?;
        // Both must be wanted, as in vLLM.
        let publishes = keys.enable_kv_cache_events && kind == Kind::Zmq;
        Ok(publishes.then_some(config))
    }
}

impl Keys {
    fn check(&self, star: IpAddr, hashes: HashForm) -> Result<PublisherConfig, ConfigError> {
        for (key, count) in [
            ("buffer_steps", self.buffer_steps),
            ("hwm", self.hwm),
            ("max_queue_size", self.max_queue_size),
        ] {
            if count > MAX_COUNT {
                return Err(wrong(key, &format!("expected at most {MAX_COUNT}")));
            }
        }
        if self.topic.len() > MAX_TOPIC {
            return Err(wrong("topic", &format!("more than {MAX_TOPIC} bytes")));
        }
        let endpoint = Endpoint::parse(&self.endpoint, star);
        let replay = match &self.replay_endpoint {
            None => None,
            Some(text) => Some(at("replay_endpoint", Endpoint::parse_bind(text, star))?),
        };
        Ok(PublisherConfig {
            endpoint: at("endpoint", endpoint)?,
            replay,
            buffer_steps: self.buffer_steps,
            // As in ZeroMQ and in Python's queues, 0 is no bound; here it is the largest.
            hwm: or_most(self.hwm),
            max_queue_size: or_most(self.max_queue_size),
            topic: self.topic.clone(),
            form: Form {
                events: self.event_format,
                hashes,
            },
            replay_form: self.replay_format,
        })
    }
}

const fn or_most(count: usize) -> usize {
    if count == 0 { MAX_COUNT } else { count }
}

fn at<T>(key: &str, parsed: Result<T, EndpointError>) -> Result<T, ConfigError> {
    parsed.map_err(|error| wrong(key, &error))
}

fn wrong(key: &str, why: &dyn Display) -> ConfigError {
    ConfigError {
        key: key.to_owned(),
        why: why.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Option<PublisherConfig>, ConfigError> {
        PublisherConfig::from_json(json, IpAddr::from([127, 0, 0, 1]), HashForm::Int)
    }

    #[test]
    fn defaults_are_vllms_on_the_servers_own_address() {
        let config = read(r#"{"enable_kv_cache_events": true}"#)
            .unwrap()
            .unwrap();
        let address = "127.0.0.1:5557".parse().unwrap();
        assert_eq!(config.endpoint, Endpoint::Bind(address));
        assert_eq!((config.replay, config.topic.as_str()), (None, ""));
        let counts = (config.buffer_steps, config.hwm, config.max_queue_size);
        assert_eq!(counts, (10_000, 100_000, 100_000));
        assert_eq!(config.form, Form::default());
        assert_eq!(config.replay_form, ReplayForm::Topic);
    }

    #[test]
    fn only_what_is_wanted_is_published() {
        for off in [
            "{}",
            r#"{"publisher": "zmq"}"#,
            r#"{"enable_kv_cache_events": true, "publisher": "null"}"#,
            r#"{"enable_kv_cache_events": false, "publisher": "zmq", "endpoint": "tcp://*:1"}"#,
        ] {
            assert_eq!(read(off), Ok(None), "{off}");
        }
        let on = r#"{"enable_kv_cache_events": true, "publisher": "zmq", "replay_endpoint": "tcp://*:5558", "topic": "kv@a@b",
            "buffer_steps": 5, "hwm": 0, "event_format": "map", "replay_format": "plain"}"#;
        let config = read(on).unwrap().unwrap();
        assert_eq!(config.replay, Some("127.0.0.1:5558".parse().unwrap()));
        assert_eq!((config.buffer_steps, config.hwm), (5, MAX_COUNT));
        assert_eq!(config.form.events, EventForm::Map);
        assert_eq!(config.replay_form, ReplayForm::Plain);
    }

    #[test]
    fn errors_name_the_key() {
        for (json, key) in [
            ("", "."),
            ("[]", "."),
            ("{} {}", "."),
            (r#"{"buffer_step": 1}"#, "buffer_step"),
            (r#"{"publisher": "kafka"}"#, "publisher"),
            (r#"{"hwm": -1}"#, "hwm"),
            (r#"{"hwm": 10000001}"#, "hwm"),
            (r#"{"endpoint": "ipc://x"}"#, "endpoint"),
            (r#"{"replay_endpoint": "tcp://host:1"}"#, "replay_endpoint"),
            (r#"{"event_format": "json"}"#, "event_format"),
        ] {
            let error = read(json).unwrap_err();
            assert_eq!(error.key, key, "{json}: {error}");
        }
    }
}
