//! How many tokens an answer says it took, read from its last bytes: nothing else of an answer is looked at.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Bytes at the end of an answer in which the usage stands, with room for what servers put after it.
const TAIL: usize = 8 << 10;

/// The end of what has passed by.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    bytes: Vec<u8>,
}

/// What an answer says of itself, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "Wire")]
pub(crate) struct Usage {
    pub(crate) prompt: Option<u64>,
    pub(crate) output: Option<u64>,
    /// Of the prompt, those that were cached.
    pub(crate) cached: Option<u64>,
}

impl Tail {
    /// Notes that `piece` passed.
    pub(crate) fn push(&mut self, piece: &[u8]) {
        let piece = &piece[piece.len().saturating_sub(TAIL)..];
        // Twice the room, so that what is kept moves seldom.
        if self.bytes.len() + piece.len() > 2 * TAIL {
            let keep = TAIL.saturating_sub(piece.len()).min(self.bytes.len());
            self.bytes.drain(..self.bytes.len() - keep);
        }
        self.bytes.extend_from_slice(piece);
    }

    /// The usage, if the answer ended with one.
    pub(crate) fn usage(&self) -> Usage {
        self.last().unwrap_or_default()
    }

    /// All that the answer says of its usage, under the names of completions.
    pub(crate) fn object(&self) -> Option<Value> {
        let Value::Object(mut usage) = self.last()? else {
            return None;
        };
        for (name, same) in [
            ("prompt_tokens", "input_tokens"),
            ("completion_tokens", "output_tokens"),
            ("prompt_tokens_details", "input_tokens_details"),
        ] {
            if let (false, Some(value)) = (usage.contains_key(name), usage.get(same).cloned()) {
                usage.insert(name.to_owned(), value);
            }
        }
        Some(usage.into())
    }

    /// The last usage that is no `null`.
    fn last<T: DeserializeOwned>(&self) -> Option<T> {
        let key = b"\"usage\"";
        let mut places = memchr::memmem::rfind_iter(&self.bytes, key);
        places.find_map(|at| read(self.bytes.get(at + key.len()..)?))
    }
}

/// Reads `: {…}`. In a text that only talks of usage the quotes are escaped, and no colon follows.
fn read<T: DeserializeOwned>(after_key: &[u8]) -> Option<T> {
    let object = after_key.trim_ascii_start().strip_prefix(b":")?;
    let object = object.trim_ascii_start();
    if !object.starts_with(b"{") {
        return None;
    }
    // The stream ends at the object's end: what follows is not looked at.
    let mut values = serde_json::Deserializer::from_slice(object).into_iter();
    values.next()?.ok()
}

/// As it travels.
#[derive(Deserialize)]
struct Wire {
    #[serde(alias = "input_tokens")]
    prompt_tokens: Option<u64>,
    #[serde(alias = "output_tokens")]
    completion_tokens: Option<u64>,
    #[serde(alias = "input_tokens_details")]
    prompt_tokens_details: Option<Details>,
}

#[derive(Deserialize)]
struct Details {
    cached_tokens: Option<u64>,
}

impl From<Wire> for Usage {
    fn from(wire: Wire) -> Self {
        Self {
            prompt: wire.prompt_tokens,
            output: wire.completion_tokens,
            cached: wire.prompt_tokens_details.and_then(|d| d.cached_tokens),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn usage(pieces: &[&str]) -> Usage {
        let mut tail = Tail::default();
        for piece in pieces {
            tail.push(piece.as_bytes());
        }
        tail.usage()
    }

    #[test]
    fn the_last_usage_counts_wherever_pieces_end() {
        let long = "x".repeat(3 * TAIL);
        let expected = Usage {
            prompt: Some(7),
            output: Some(3),
            cached: Some(4),
        };
        let tail = r#""}],"usage" : {"prompt_tokens":7,"total_tokens":10,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4}},"kv_transfer_params":null}"#;
        assert_eq!(usage(&[&long, tail]), expected);
        for at in 0..tail.len() {
            assert_eq!(
                usage(&["data: {", &tail[..at], &tail[at..], "\n\ndata: [DONE]\n\n"]),
                expected
            );
        }
    }

    #[test]
    fn the_object_has_the_names_of_completions() {
        let mut tail = Tail::default();
        tail.push(br#"{"usage":{"input_tokens":5,"output_tokens":2,"more":true},"x":1}"#);
        let object = tail.object().unwrap();
        assert_eq!(object["prompt_tokens"], 5);
        assert_eq!(object["completion_tokens"], 2);
        assert_eq!(object["more"], true);
        assert!(Tail::default().object().is_none());
    }

    #[test]
    fn responses_and_streams_without_usage_are_read_too() {
        let responses = r#"{"usage":{"input_tokens":5,"input_tokens_details":{"cached_tokens":0},"output_tokens":2}}"#;
        assert_eq!(
            usage(&[responses]),
            Usage {
                prompt: Some(5),
                output: Some(2),
                cached: Some(0)
            }
        );
        let events = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2}}\n\ndata: {\"usage\":null}\n\ndata: [DONE]\n\n";
        assert_eq!(usage(&[events]).output, Some(2));
        for none in [
            "",
            "{}",
            r#"{"text":"\"usage\": {"}"#,
            r#"{"usage""#,
            r#"{"usage":null}"#,
        ] {
            assert_eq!(usage(&[none]), Usage::default(), "{none}");
        }
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic_or_grow(pieces in prop::collection::vec("(\"usage\"|[:{}\"0-9a-z, ]){0,40}", 0..600)) {
            let mut tail = Tail::default();
            for piece in &pieces {
                tail.push(piece.as_bytes());
                prop_assert!(tail.bytes.len() <= 2 * TAIL);
            }
            tail.usage();
        }
    }
}
