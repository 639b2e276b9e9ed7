//! What the proxy knows beside the headers: which endpoints it allows, and which one served.
//!
//! Only the two values that are wanted are looked for in a `Metadata`; whatever else lies in it is passed over.

use crate::headers::field;
use crate::inbound::Malformed;
use bytes::Bytes;
use std::net::{IpAddr, SocketAddr};

/// Where the proxy says which endpoints may be chosen.
const SUBSET: (&str, &str) = (
    "envoy.lb.subset_hint",
    "x-gateway-destination-endpoint-subset",
);
/// Where the proxy says which endpoint answered.
const SERVED: (&str, &str) = ("envoy.lb", "x-gateway-destination-endpoint-served");

/// Most endpoints of a subset that are looked at: eight for each of the 65,536 pods of a large cluster would be more
/// than a message holds.
const MAX_SUBSET: usize = 1 << 16;

/// One endpoint that may be chosen, or a whole machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// Its address.
    pub ip: IpAddr,
    /// Its port; any, if none.
    pub port: Option<u16>,
}

impl Allowed {
    /// From `ip`, `ip:port`, or, for IPv6, `[ip]:port`; a bare IPv6 address is taken with and without brackets.
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        if let Ok(address) = text.parse::<SocketAddr>() {
            let port = Some(address.port());
            return Some(Self {
                ip: address.ip(),
                port,
            });
        }
        let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
        let ip = bare.unwrap_or(text).parse().ok()?;
        Some(Self { ip, port: None })
    }

    /// Whether it is `endpoint`.
    #[must_use]
    pub fn covers(&self, endpoint: &SocketAddr) -> bool {
        self.ip == endpoint.ip() && self.port.is_none_or(|port| port == endpoint.port())
    }
}

/// The endpoints to which the proxy restricts the choice; nothing if it does not restrict it. A restriction without any
/// endpoint leaves none.
pub(crate) fn subset(metadata: &Bytes) -> Result<Option<Vec<Allowed>>, Malformed> {
    let Some(list) = find(metadata, SUBSET, 6)? else {
        return Ok(None);
    };
    let mut allowed = Vec::new();
    // A `ListValue`, whose values are number 1; a text in a value is number 3.
    let mut items = list;
    while let Some((tag, range)) = field(list, &mut items)? {
        if tag == 1
            && allowed.len() < MAX_SUBSET
            && let Some(text) = last(&list[range], 3)?
            && let Ok(text) = std::str::from_utf8(text)
        {
            allowed.extend(Allowed::parse(text));
        }
    }
    Ok(Some(allowed))
}

/// The endpoint that the proxy says has answered.
pub(crate) fn served(metadata: &Bytes) -> Result<Option<&str>, Malformed> {
    let text = find(metadata, SERVED, 3)?;
    Ok(text.and_then(|text| std::str::from_utf8(text).ok()))
}

/// The value of kind `kind` (its number in `Value`) under a key of a namespace.
fn find<'a>(
    metadata: &'a Bytes,
    (namespace, key): (&str, &str),
    kind: u32,
) -> Result<Option<&'a [u8]>, Malformed> {
    let Some(fields) = entry(metadata, namespace)? else {
        return Ok(None);
    };
    match entry(fields, key)? {
        Some(value) => last(value, kind),
        None => Ok(None),
    }
}

/// The value of `key` in a map that is field 1 of a message. As in every map, the last one counts.
fn entry<'a>(map: &'a [u8], key: &str) -> Result<Option<&'a [u8]>, Malformed> {
    let (mut found, mut rest) = (None, map);
    while let Some((tag, range)) = field(map, &mut rest)? {
        let entry = &map[range];
        if tag == 1 && last(entry, 1)? == Some(key.as_bytes()) {
            found = Some(last(entry, 2)?.unwrap_or_default());
        }
    }
    Ok(found)
}

/// The last field of a message with this number.
fn last(message: &[u8], number: u32) -> Result<Option<&[u8]>, Malformed> {
    let (mut found, mut rest) = (None, message);
    while let Some((tag, range)) = field(message, &mut rest)? {
        if tag == number {
            found = Some(&message[range]);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer;
    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    struct Entry {
        #[prost(string, tag = "1")]
        key: String,
        #[prost(bytes, tag = "2")]
        value: Vec<u8>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct Map {
        #[prost(message, repeated, tag = "1")]
        entries: Vec<Entry>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct List {
        #[prost(message, repeated, tag = "1")]
        values: Vec<Item>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct Item {
        #[prost(double, optional, tag = "2")]
        number: Option<f64>,
        #[prost(string, optional, tag = "3")]
        text: Option<String>,
        #[prost(message, optional, tag = "6")]
        list: Option<List>,
    }

    fn map(key: &str, value: Vec<u8>) -> Vec<u8> {
        let key = key.to_owned();
        Map {
            entries: vec![Entry { key, value }],
        }
        .encode_to_vec()
    }

    fn hint(items: Vec<Item>) -> Bytes {
        let list = Item {
            list: Some(List { values: items }),
            ..Item::default()
        };
        map(SUBSET.0, map(SUBSET.1, list.encode_to_vec())).into()
    }

    fn text(text: &str) -> Item {
        Item {
            text: Some(text.to_owned()),
            ..Item::default()
        }
    }

    #[test]
    fn a_subset_is_a_list_of_addresses_with_or_without_ports() {
        let number = Item {
            number: Some(1.0),
            ..Item::default()
        };
        let items = [
            "10.0.0.1:8000",
            "10.0.0.2",
            "[fd00::1]:8000",
            "fd00::2",
            "[fd00::3]",
            "a pod",
        ];
        let items = items.map(text).into_iter().chain([number]).collect();
        let allowed = subset(&hint(items)).unwrap().unwrap();
        let covered = |endpoint: &str| {
            let endpoint = endpoint.parse().unwrap();
            allowed.iter().any(|a| a.covers(&endpoint))
        };
        assert_eq!(allowed.len(), 5);
        for yes in [
            "10.0.0.1:8000",
            "10.0.0.2:1",
            "[fd00::1]:8000",
            "[fd00::2]:9",
            "[fd00::3]:9",
        ] {
            assert!(covered(yes), "{yes}");
        }
        for no in ["10.0.0.1:8001", "10.0.0.3:8000", "[fd00::1]:8001"] {
            assert!(!covered(no), "{no}");
        }
    }

    #[test]
    fn no_hint_is_no_restriction_and_an_empty_one_leaves_nothing() {
        assert_eq!(subset(&Bytes::new()).unwrap(), None);
        assert_eq!(subset(&hint(Vec::new())).unwrap(), Some(Vec::new()));
        let not_a_list = map(SUBSET.0, map(SUBSET.1, text("10.0.0.1:1").encode_to_vec()));
        assert_eq!(subset(&not_a_list.into()).unwrap(), None);
        let other_key = map(SUBSET.0, map("other", Vec::new()));
        assert_eq!(subset(&other_key.into()).unwrap(), None);
    }

    #[test]
    fn the_endpoint_that_served_is_a_text() {
        let metadata = peer::metadata("envoy.lb", SERVED.1, "10.0.0.1:8000");
        let metadata = metadata.encode_to_vec().into();
        assert_eq!(served(&metadata).unwrap(), Some("10.0.0.1:8000"));
        assert_eq!(served(&Bytes::new()).unwrap(), None);
        assert!(served(&Bytes::from_static(b"\x0a\x05\x0a")).is_err());
    }
}
