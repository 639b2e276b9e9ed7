//! Which blocks a server's prefix cache holds, said to others and heard of others: vLLM's KV events.
//!
//! `decode` and `encode` are the words (MessagePack, in [`baton_kv::BlockEvent`]), `zmtp` the way they travel (ZeroMQ's
//! protocol over TCP). [`Publisher`] says what our own engine does, over a [`Feed`] that its thread never waits on.
//! [`Followers`] and [`Collector`] hear what servers say; `track` decides what of it can be believed.
//!
//! Not here: what is made of it. An index that takes [`SourceEvent`]s is a scheduler's.
#![forbid(unsafe_code)]

mod config;
mod decode;
mod encode;
mod endpoint;
mod fields;
mod follower;
mod msgpack;
mod publisher;
mod track;
mod zmtp;

pub use config::{ConfigError, PublisherConfig, ReplayForm};
pub use decode::{Batch, DecodeError, Groups, decode};
pub use encode::{EventForm, Form, HashForm, encode};
pub use endpoint::{Endpoint, EndpointError, Peer};
pub use follower::{Collector, Follower, FollowerStats, Followers, Origin, Source, SourceEvent};
pub use publisher::{Feed, Publisher, PublisherStats};

/// Private parsers, for the targets in `/fuzz`.
#[cfg(feature = "fuzzing")]
pub mod fuzzing {
    use crate::zmtp::frame::{GREETING, Parser, as_subscription, check_greeting};
    use bytes::BytesMut;

    /// Reads a peer's greeting and messages of at most `max_message` bytes, of which `step` come at a time. Returns the
    /// number of messages.
    pub fn zmtp(bytes: &[u8], step: usize, max_message: usize) -> usize {
        if let Some(greeting) = bytes.first_chunk::<GREETING>() {
            let _ = check_greeting(greeting);
        }
        let (mut parser, mut buf) = (Parser::new(max_message), BytesMut::new());
        let mut n = 0;
        for piece in bytes.chunks(step.max(1)) {
            buf.extend_from_slice(piece);
            loop {
                match parser.next(&mut buf) {
                    Ok(Some(incoming)) => {
                        let _ = as_subscription(incoming);
                        n += 1;
                    }
                    Ok(None) => break,
                    Err(_) => return n,
                }
            }
        }
        n
    }
}
