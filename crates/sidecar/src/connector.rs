//! The protocols by which KV gets from prefill to decode: for each, what is said to either server.
//!
//! Pure: a request in, the bodies to send out. Who is asked, when, and what happens on failure is decided elsewhere.

pub(crate) mod mooncake;
pub(crate) mod nixl;
pub(crate) mod offloading;
pub(crate) mod sglang;
pub(crate) mod shared_storage;

/// A protocol, by llm-d's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connector {
    /// Prefill first; its `kv_transfer_params` go to decode. vLLM on GPU and TPU, and our own servers.
    Nixlv2,
    /// Prefill first, into a store that decode reads by prefix.
    SharedStorage,
    /// Both at once; they meet at prefill's bootstrap server.
    Sglang,
    /// Both at once; prefill's engine id is asked for beforehand.
    Mooncake,
    /// Both at once; decode pulls under a common id.
    Offloading,
}

impl Connector {
    /// All names that are understood.
    pub const NAMES: [&str; 5] = [
        "nixlv2",
        "shared-storage",
        "sglang",
        "mooncake",
        "offloading",
    ];

    /// The protocol called `name`.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "nixlv2" => Self::Nixlv2,
            "shared-storage" => Self::SharedStorage,
            "sglang" => Self::Sglang,
            "mooncake" => Self::Mooncake,
            "offloading" => Self::Offloading,
            _ => return None,
        })
    }

    /// Whether a decode server of this kind can compute a prompt by itself.
    pub(crate) fn decodes_alone(self) -> bool {
        self != Self::Sglang
    }
}

/// A fresh id in the form of a version 4 UUID, from 16 random bytes.
pub(crate) fn uuid4(random: [u8; 16]) -> String {
    let bits = u128::from_be_bytes(random);
    let bits = bits & !(0xf << 76) & !(0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let hex = format!("{bits:032x}");
    let (a, rest) = hex.split_at(8);
    let (b, rest) = rest.split_at(4);
    let (c, rest) = rest.split_at(4);
    let (d, e) = rest.split_at(4);
    format!("{a}-{b}-{c}-{d}-{e}")
}

/// `text` as a JSON string.
pub(crate) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_protocol_and_nothing_else_is() {
        assert!(
            Connector::NAMES
                .iter()
                .all(|n| Connector::named(n).is_some())
        );
        for name in ["", "nixl", "lmcache", "NIXLV2"] {
            assert_eq!(Connector::named(name), None);
        }
    }

    #[test]
    fn an_id_says_that_it_is_random() {
        assert_eq!(uuid4([0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_eq!(uuid4([0; 16]), "00000000-0000-4000-8000-000000000000");
    }
}
