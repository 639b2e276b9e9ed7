//! Addresses of servers, as headers name them.

use http::HeaderMap;
use http::HeaderName;
use http::uri::Authority;
use std::fmt;

/// Most entries read of one list.
const MAX_LISTED: usize = 64;

/// `host:port`; an IPv6 address in brackets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Target(Authority);

impl Target {
    /// Reads one; a leading `http://` is tolerated.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let text = text.strip_prefix("http://").unwrap_or(text);
        let authority: Authority = text.parse().ok()?;
        let fine = !authority.host().is_empty()
            && authority.port_u16().is_some_and(|port| port != 0)
            && !text.contains('@');
        fine.then_some(Self(authority))
    }

    pub(crate) fn authority(&self) -> &Authority {
        &self.0
    }

    /// The host without brackets.
    pub(crate) fn host(&self) -> &str {
        let host = self.0.host();
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        bare.unwrap_or(host)
    }

    pub(crate) fn port(&self) -> u16 {
        self.0.port_u16().unwrap_or_default()
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a header lists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) targets: Vec<Target>,
    /// Entries that are no address.
    pub(crate) malformed: usize,
}

impl Listed {
    /// Everything that headers called `name` list.
    pub(crate) fn of(headers: &HeaderMap, name: &HeaderName) -> Self {
        let mut listed = Self::default();
        let entries = headers
            .get_all(name)
            .iter()
            .flat_map(|value| value.to_str().unwrap_or("?").split(','))
            .map(str::trim)
            .filter(|entry| !entry.is_empty());
        for entry in entries.take(MAX_LISTED) {
            match Target::parse(entry) {
                Some(target) => listed.targets.push(target),
                None => listed.malformed += 1,
            }
        }
        listed
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.targets.is_empty() && self.malformed == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn an_address_has_a_host_and_a_port_and_nothing_else() {
        for good in ["10.0.0.1:80", "http://pod-1.ns.svc:8000", "[fd00::1]:1"] {
            assert!(Target::parse(good).is_some(), "{good}");
        }
        for bad in [
            "",
            "host",
            "host:0",
            "host:x",
            ":80",
            "https://h:1",
            "h:1/path",
            "u@h:1",
            "a b:1",
            "h:70000",
            "[::1:1",
        ] {
            assert_eq!(Target::parse(bad), None, "{bad}");
        }
        assert_eq!(Target::parse("[fd00::1]:1").unwrap().host(), "fd00::1");
    }

    #[test]
    fn headers_list_addresses_once_or_several_times() {
        let name = HeaderName::from_static("x-prefiller-host-port");
        let mut headers = HeaderMap::new();
        for value in [" a:1 ,, b:2", "c:3,nonsense"] {
            headers.append(&name, HeaderValue::from_static(value));
        }
        let listed = Listed::of(&headers, &name);
        let names: Vec<String> = listed.targets.iter().map(Target::to_string).collect();
        assert_eq!(
            (names.join(" "), listed.malformed),
            ("a:1 b:2 c:3".to_owned(), 1)
        );
        assert!(Listed::of(&HeaderMap::new(), &name).is_empty());
    }
}
