//! `tcp://` endpoints as ZeroMQ writes them.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

/// Where a socket listens, or what it connects to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Peers connect to this address.
    Bind(SocketAddr),
    /// This peer is connected to.
    Connect(Peer),
}

/// A host, by name or address, and a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Without brackets.
    pub host: String,
    /// Its port.
    pub port: u16,
}

impl Peer {
    /// A host and a port.
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self {
            host: host.into(),
            port,
        }
    }
}

/// Why a text is no endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// Another transport, or none.
    #[error("expected tcp://HOST:PORT, or tcp://*:PORT to listen")]
    Form,
    /// No number of a port.
    #[error("{0:?} is no port")]
    Port(String),
    /// A name where an address is needed.
    #[error("cannot listen on {0:?}: give an address, or *")]
    NoAddress(String),
}

impl Endpoint {
    /// Reads the endpoint of a publisher or of who follows many. As in vLLM `*` and addresses with `::` are listened on;
    /// others are connected to, but for `0.0.0.0`, to which nobody wants to connect. `star` is the address behind `*`.
    ///
    /// # Errors
    /// See [`EndpointError`].
    pub fn parse(text: &str, star: IpAddr) -> Result<Self, EndpointError> {
        let (host, port) = split(text)?;
        if host == "*" {
            return Ok(Self::Bind(SocketAddr::new(star, port)));
        }
        match host.parse::<IpAddr>() {
            Ok(address) if address.is_unspecified() || host.contains("::") => {
                Ok(Self::Bind(SocketAddr::new(address, port)))
            }
            _ => Ok(Self::Connect(Peer::new(host, port))),
        }
    }

    /// Reads an endpoint that is listened on in any case.
    ///
    /// # Errors
    /// See [`EndpointError`].
    pub fn parse_bind(text: &str, star: IpAddr) -> Result<SocketAddr, EndpointError> {
        let (host, port) = split(text)?;
        let address = match host {
            "*" => star,
            "localhost" => IpAddr::from([127, 0, 0, 1]),
            other => other
                .parse()
                .map_err(|_| EndpointError::NoAddress(other.to_owned()))?,
        };
        Ok(SocketAddr::new(address, port))
    }
}

/// Host and port; a host in brackets is an address of version 6.
fn split(text: &str) -> Result<(&str, u16), EndpointError> {
    let rest = text.strip_prefix("tcp://").ok_or(EndpointError::Form)?;
    let (host, port) = rest.rsplit_once(':').ok_or(EndpointError::Form)?;
    let port = port
        .parse()
        .map_err(|_| EndpointError::Port(port.to_owned()))?;
    let bare = match host.strip_prefix('[') {
        Some(inner) => {
            let inner = inner.strip_suffix(']').ok_or(EndpointError::Form)?;
            inner.parse::<Ipv6Addr>().map_err(|_| EndpointError::Form)?;
            inner
        }
        None => host,
    };
    if bare.is_empty() {
        return Err(EndpointError::Form);
    }
    Ok((bare, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_listened_on_or_connected_to_as_vllm_does() {
        let star = IpAddr::from([127, 0, 0, 1]);
        let bind = |text: &str| Ok(Endpoint::Bind(text.parse().unwrap()));
        let connect = |host: &str, port| Ok(Endpoint::Connect(Peer::new(host, port)));
        for (text, expected) in [
            ("tcp://*:5557", bind("127.0.0.1:5557")),
            ("tcp://0.0.0.0:5557", bind("0.0.0.0:5557")),
            ("tcp://[::]:5557", bind("[::]:5557")),
            ("tcp://:::5557", bind("[::]:5557")),
            ("tcp://[::1]:0", bind("[::1]:0")),
            ("tcp://127.0.0.1:5557", connect("127.0.0.1", 5557)),
            ("tcp://picker:5557", connect("picker", 5557)),
            ("picker:5557", Err(EndpointError::Form)),
            ("ipc:///tmp/x", Err(EndpointError::Form)),
            ("tcp://*", Err(EndpointError::Form)),
            ("tcp://:1", Err(EndpointError::Form)),
            ("tcp://[::1:1", Err(EndpointError::Form)),
            ("tcp://*:x", Err(EndpointError::Port("x".to_owned()))),
            (
                "tcp://*:70000",
                Err(EndpointError::Port("70000".to_owned())),
            ),
        ] {
            assert_eq!(Endpoint::parse(text, star), expected, "{text}");
        }
    }

    #[test]
    fn replay_is_always_listened_on() {
        let star = IpAddr::from([10, 0, 0, 7]);
        for (text, expected) in [
            ("tcp://*:5558", Ok("10.0.0.7:5558".parse().unwrap())),
            ("tcp://localhost:1", Ok("127.0.0.1:1".parse().unwrap())),
            (
                "tcp://host:1",
                Err(EndpointError::NoAddress("host".to_owned())),
            ),
        ] {
            assert_eq!(Endpoint::parse_bind(text, star), expected, "{text}");
        }
    }
}
