//! Who may ask: a key for the API's paths, and the tenant that each key is.

use baton_http::{bearer, same_bytes};
use http::header::AUTHORIZATION;
use http::{HeaderMap, Method};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Longest file of keys.
const MAX_FILE_BYTES: u64 = 4 << 20;
/// Most keys: every one of them is compared with what a client shows.
const MAX_KEYS: usize = 4096;

/// A tenant's key, as the configuration has it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiKey {
    /// Who has it: requests of one tenant take turns with those of others. Several keys may name one tenant.
    pub tenant: String,
    /// What clients send as `Authorization: Bearer KEY`.
    pub key: String,
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKey({}, ***)", self.tenant)
    }
}

/// Why keys make no sense.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot read api_key_file: {0}")]
    File(#[from] std::io::Error),
    /// Not `TENANT KEY`.
    #[error("api_key_file: line {0} is not TENANT KEY")]
    Line(usize),
    /// An empty tenant or key, or one that no header can carry.
    #[error(
        "api key of tenant {0:?}: tenant and key need visible characters only, and at least one"
    )]
    Characters(String),
    /// One key for two tenants.
    #[error("tenants {0:?} and {1:?} have the same api key")]
    Shared(String, String),
    /// More than are compared.
    #[error("more than {MAX_KEYS} api keys")]
    TooMany,
    /// A file that has none would let everybody in.
    #[error("api_key_file has no keys")]
    Empty,
}

/// The keys there are. Without any, everybody may ask.
#[derive(Debug, Default)]
pub(crate) struct Keys(Vec<(Arc<str>, ApiKey)>);

/// What a request's key says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Who {
    /// No keys are needed.
    Anybody,
    /// A tenant of ours.
    Tenant(Arc<str>),
    /// Nobody we know.
    Stranger,
}

impl Keys {
    /// Those of the configuration and those of `file`: lines of `TENANT KEY`; what begins with `#` is skipped.
    pub(crate) fn new(listed: &[ApiKey], file: Option<&Path>) -> Result<Self, KeyError> {
        let mut keys = listed.to_vec();
        if let Some(path) = file {
            let found = parse(&read(path)?)?;
            if found.is_empty() {
                return Err(KeyError::Empty);
            }
            keys.extend(found);
        }
        check(&keys)?;
        let named = |key: ApiKey| (key.tenant.as_str().into(), key);
        Ok(Self(keys.into_iter().map(named).collect()))
    }

    pub(crate) fn are_needed(&self) -> bool {
        !self.0.is_empty()
    }

    /// Who sends a request with these `headers`. Preflight requests of browsers carry no keys and need none.
    pub(crate) fn who(&self, method: &Method, headers: &HeaderMap) -> Who {
        if !self.are_needed() || method == Method::OPTIONS {
            return Who::Anybody;
        }
        let shown = headers.get(AUTHORIZATION).and_then(bearer);
        // Every key is compared, so that the time tells nothing about which one was near.
        let found = shown.and_then(|shown| {
            self.0.iter().fold(None, |found, (tenant, key)| {
                let is_it = same_bytes(key.key.as_bytes(), shown);
                is_it.then_some(tenant).or(found)
            })
        });
        found.map_or(Who::Stranger, |tenant| Who::Tenant(tenant.clone()))
    }
}

fn read(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    let mut file = std::fs::File::open(path)?.take(MAX_FILE_BYTES + 1);
    file.read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(std::io::Error::other("longer than 4 MiB"));
    }
    Ok(text)
}

fn parse(text: &str) -> Result<Vec<ApiKey>, KeyError> {
    let lines = text.lines().enumerate();
    let lines = lines.filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    let key = |(at, line): (usize, &str)| {
        let mut words = line.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some(tenant), Some(key), None) => Ok(ApiKey {
                tenant: tenant.to_owned(),
                key: key.to_owned(),
            }),
            _ => Err(KeyError::Line(at + 1)),
        }
    };
    lines.map(key).collect()
}

fn check(keys: &[ApiKey]) -> Result<(), KeyError> {
    if keys.len() > MAX_KEYS {
        return Err(KeyError::TooMany);
    }
    let is_word = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_graphic());
    let mut sorted: BTreeSet<(&str, &str)> = BTreeSet::new();
    for key in keys {
        if !is_word(&key.tenant) || !is_word(&key.key) {
            return Err(KeyError::Characters(key.tenant.clone()));
        }
        sorted.insert((&key.key, &key.tenant));
    }
    let sorted: Vec<_> = sorted.into_iter().collect();
    match sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        Some(pair) => Err(KeyError::Shared(pair[0].1.into(), pair[1].1.into())),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn key(tenant: &str, key: &str) -> ApiKey {
        ApiKey {
            tenant: tenant.to_owned(),
            key: key.to_owned(),
        }
    }

    fn who(keys: &Keys, authorization: &'static str) -> Who {
        let mut headers = HeaderMap::new();
        headers.insert("authorization", HeaderValue::from_static(authorization));
        keys.who(&Method::POST, &headers)
    }

    #[test]
    fn a_key_names_its_tenant() {
        let keys = Keys::new(&[key("a", "one"), key("b", "two"), key("a", "three")], None).unwrap();
        for (shown, tenant) in [
            ("Bearer one", "a"),
            ("bearer two", "b"),
            ("Bearer three", "a"),
        ] {
            assert_eq!(who(&keys, shown), Who::Tenant(tenant.into()));
        }
        for shown in [
            "",
            "one",
            "Bearer ",
            "Bearer on",
            "Bearer onetwo",
            "Basic one",
        ] {
            assert_eq!(who(&keys, shown), Who::Stranger, "{shown}");
        }
        assert_eq!(keys.who(&Method::GET, &HeaderMap::new()), Who::Stranger);
        assert_eq!(keys.who(&Method::OPTIONS, &HeaderMap::new()), Who::Anybody);
        assert_eq!(who(&Keys::default(), "Bearer x"), Who::Anybody);
    }

    #[test]
    fn a_file_of_keys_has_one_a_line() {
        let found = parse("# ours\n\na one\n  b\ttwo  \n").unwrap();
        assert_eq!(found, [key("a", "one"), key("b", "two")]);
        for (text, line) in [("a", 1), ("a b\nc", 2), ("a b c", 1)] {
            assert!(matches!(parse(text), Err(KeyError::Line(at)) if at == line));
        }
    }

    #[test]
    fn nonsense_is_refused_and_no_key_is_shown() {
        for (keys, reason) in [
            (vec![key("", "secret")], "visible"),
            (vec![key("a", "")], "visible"),
            (vec![key("a", "sec ret")], "visible"),
            (vec![key("a", "secret"), key("b", "secret")], "same api key"),
        ] {
            let error = Keys::new(&keys, None).unwrap_err().to_string();
            assert!(error.contains(reason) && !error.contains("sec"), "{error}");
        }
        assert!(Keys::new(&[key("a", "x"), key("a", "x")], None).is_ok());
        assert!(!format!("{:?}", key("a", "secret")).contains("secret"));
    }
}
