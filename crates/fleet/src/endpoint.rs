//! An endpoint as whoever found it describes it: a line of a file, a pod.

use baton_scheduler::Role;
use http::uri::Authority;
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;

/// The label that says what an endpoint is there for.
pub const ROLE_LABEL: &str = "llm-d.ai/role";
/// Labels of an endpoint.
pub type Labels = BTreeMap<String, String>;

/// An endpoint: one port of one machine on which a model server answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSpec {
    /// Where its name is unique; may be empty.
    pub namespace: String,
    /// With the namespace, who it is: while these two stay, it is the same endpoint, whatever else changes.
    pub name: String,
    /// Where it answers requests.
    pub address: Address,
    /// Where it answers `/metrics`, if that is another place.
    pub metrics: Option<Address>,
    /// Its place among the data-parallel ranks of one server.
    pub rank: u32,
    /// Its labels; [`ROLE_LABEL`] and the one that names its engine mean something here.
    pub labels: Labels,
}

impl EndpointSpec {
    /// An endpoint of rank 0 without labels.
    #[must_use]
    pub fn new(name: impl Into<String>, address: Address) -> Self {
        Self {
            namespace: String::new(),
            name: name.into(),
            address,
            metrics: None,
            rank: 0,
            labels: Labels::new(),
        }
    }

    /// `namespace/name`, or the name alone.
    #[must_use]
    pub fn full_name(&self) -> String {
        if self.namespace.is_empty() {
            self.name.clone()
        } else {
            format!("{}/{}", self.namespace, self.name)
        }
    }

    /// What the labels say of its role.
    #[must_use]
    pub fn role(&self) -> Role {
        Role::of_label(self.labels.get(ROLE_LABEL).map(String::as_str))
    }
}

/// `host:port`: an IPv4 address, an IPv6 address in brackets, or a name.
#[derive(Clone, PartialEq, Eq)]
pub struct Address {
    authority: Authority,
    socket: Option<SocketAddr>,
}

/// A text that is not `host:port`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not host:port")]
pub struct AddressError(pub String);

impl Address {
    /// Reads `host:port`. A port of 0 is none.
    ///
    /// # Errors
    /// [`AddressError`], for everything else.
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError(text.to_owned());
        let authority: Authority = text.parse().map_err(|_| wrong())?;
        let whole = !authority.host().is_empty() && authority.port_u16().is_some_and(|p| p != 0);
        if whole && !text.contains('@') {
            Ok(Self::of(authority))
        } else {
            Err(wrong())
        }
    }

    /// Puts `host`, which may be an IPv6 address without brackets, and `port` together.
    ///
    /// # Errors
    /// [`AddressError`], if they make no address.
    pub fn new(host: &str, port: u16) -> Result<Self, AddressError> {
        if host.contains(':') && !host.starts_with('[') {
            Self::parse(&format!("[{host}]:{port}"))
        } else {
            Self::parse(&format!("{host}:{port}"))
        }
    }

    fn of(authority: Authority) -> Self {
        Self {
            socket: authority.as_str().parse().ok(),
            authority,
        }
    }

    /// As a URI has it.
    #[must_use]
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.authority.as_str()
    }

    /// The socket's address, unless the host is a name.
    #[must_use]
    pub fn socket(&self) -> Option<SocketAddr> {
        self.socket
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        // Without the zone of a link-local address, which URIs do not have.
        let plain = SocketAddr::new(address.ip(), address.port());
        let authority = Authority::try_from(plain.to_string());
        Self::of(authority.unwrap_or_else(|_| Authority::from_static("0.0.0.0:0")))
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_hosts_with_ports() {
        for good in ["127.0.0.1:1", "[::1]:8000", "pod-0.svc.local:80"] {
            assert_eq!(Address::parse(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            "a",
            ":1",
            "a:0",
            "a:99999",
            "u@a:1",
            "http://a:1",
            "a:1/x",
            "::1:80",
        ] {
            assert!(Address::parse(bad).is_err(), "{bad}");
        }
        assert_eq!(Address::new("::1", 7).unwrap().as_str(), "[::1]:7");
        assert_eq!(Address::new("a", 7).unwrap().socket(), None);
        let v6: SocketAddr = "[::1]:7".parse().unwrap();
        assert_eq!(Address::from(v6).socket(), Some(v6));
    }

    #[test]
    fn who_it_is_and_what_for() {
        let mut spec = EndpointSpec::new("a", Address::parse("a:1").unwrap());
        assert_eq!(
            (spec.full_name().as_str(), spec.role()),
            ("a", Role::Unlabelled)
        );
        spec.labels.insert(ROLE_LABEL.into(), "prefill".into());
        spec.namespace = "n".into();
        assert_eq!(
            (spec.full_name().as_str(), spec.role()),
            ("n/a", Role::Prefill)
        );
    }
}
