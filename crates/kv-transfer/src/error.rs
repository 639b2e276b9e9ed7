//! Why a transfer did not happen, or not wholly.

use std::io::ErrorKind;
use std::time::Duration;

use crate::wire::WireError;

/// Why a producer refuses. The number is its form on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u16)]
pub enum RejectCode {
    /// No such lease, or none since the producer started.
    UnknownLease = 1,
    /// The lease outlived its time.
    Expired = 2,
    /// The lease was fetched or released before.
    Consumed = 3,
    /// The token does not belong to the lease.
    BadToken = 4,
    /// Model or cache shape differ.
    Fingerprint = 5,
    /// Too much is going on; the lease may be being fetched right now.
    Busy = 6,
    /// Blocks that the lease does not have.
    Range = 7,
    /// The producer is about to stop.
    Draining = 8,
    /// Something is wrong on the producer's side.
    Internal = 9,
    /// The peer does not know the pool's secret.
    Unauthorized = 10,
    /// The peer sent what the protocol does not allow.
    Malformed = 11,
    /// One side uses TLS and the other does not.
    Encryption = 12,
    /// The data connection on which a transfer was to come is gone.
    Disconnected = 13,
}

impl RejectCode {
    /// All codes, in the order of their numbers, which start at 1.
    pub const ALL: [Self; 13] = [
        Self::UnknownLease,
        Self::Expired,
        Self::Consumed,
        Self::BadToken,
        Self::Fingerprint,
        Self::Busy,
        Self::Range,
        Self::Draining,
        Self::Internal,
        Self::Unauthorized,
        Self::Malformed,
        Self::Encryption,
        Self::Disconnected,
    ];

    /// The code's name, as metrics and messages spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::UnknownLease => "unknown_lease",
            Self::Expired => "expired",
            Self::Consumed => "consumed",
            Self::BadToken => "bad_token",
            Self::Fingerprint => "fingerprint",
            Self::Busy => "busy",
            Self::Range => "range",
            Self::Draining => "draining",
            Self::Internal => "internal",
            Self::Unauthorized => "unauthorized",
            Self::Malformed => "malformed",
            Self::Encryption => "encryption",
            Self::Disconnected => "disconnected",
        }
    }

    pub(crate) const fn to_wire(self) -> u16 {
        self as u16
    }

    /// A number that nobody defined yet means no more to us than that something is wrong over there.
    pub(crate) fn from_wire(code: u16) -> Self {
        let idx = usize::from(code).wrapping_sub(1);
        Self::ALL.get(idx).copied().unwrap_or(Self::Internal)
    }
}

/// Why a consumer has no KV, or not all of it. Recomputing is the answer to every one of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The producer does not speak our transport.
    #[error("kv_transfer_params come from a producer of another kind")]
    ForeignProducer,
    /// Model, element type, heads or encryption differ.
    #[error("{what} differs: ours is {ours}, theirs is {theirs}")]
    Mismatch {
        /// Which property.
        what: &'static str,
        /// Its value here.
        ours: String,
        /// Its value there.
        theirs: String,
    },
    /// The request names blocks, tokens or a range that contradict each other.
    #[error("the blocks asked for do not exist")]
    Range,
    /// The producer's address is not one that this server may connect to.
    #[error("{host}:{port} is not an allowed producer")]
    Forbidden {
        /// Host as the request named it.
        host: String,
        /// Port as the request named it.
        port: u16,
    },
    /// A limit on leases, peers or queued transfers is reached.
    #[error("too many {what}")]
    Busy {
        /// What there are too many of.
        what: &'static str,
    },
    /// The transfer alone exceeds the memory that transfers may use.
    #[error("transfer of {bytes} bytes exceeds the budget of {budget}")]
    TooLarge {
        /// Bytes of the transfer.
        bytes: u64,
        /// Bytes that all transfers together may use.
        budget: u64,
    },
    /// The producer cannot be reached.
    #[error("cannot reach the producer: {0}")]
    Connect(ErrorKind),
    /// TLS found something wrong.
    #[error("TLS: {0}")]
    Tls(String),
    /// The producer does not know the pool's secret, or somebody sits between us.
    #[error("the producer could not prove that it belongs to the pool")]
    Impostor,
    /// The producer refused.
    #[error("the producer refused: {}", .0.name())]
    Rejected(RejectCode),
    /// The producer broke the protocol.
    #[error("the producer broke the protocol: {0}")]
    Protocol(#[from] WireError),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(ErrorKind),
    /// Chunks stayed damaged after they had been sent again.
    #[error("{chunks} chunks stayed damaged")]
    Corrupt {
        /// How many.
        chunks: u32,
    },
    /// A wait took too long.
    #[error("{what} took longer than {after:?}")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// The limit.
        after: Duration,
    },
    /// Whoever asked for the transfer dropped its guard.
    #[error("the transfer was cancelled")]
    Cancelled,
    /// The client is shutting down.
    #[error("the transfer client is shut down")]
    Closed,
}

impl TransferError {
    /// A word for metrics, from a small fixed set.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::ForeignProducer => "foreign_producer",
            Self::Mismatch { .. } => "mismatch",
            Self::Range => "range",
            Self::Forbidden { .. } => "forbidden",
            Self::Busy { .. } => "busy",
            Self::TooLarge { .. } => "too_large",
            Self::Connect(_) => "connect",
            Self::Tls(_) => "tls",
            Self::Impostor => "impostor",
            Self::Rejected(code) => code.name(),
            Self::Protocol(_) => "protocol",
            Self::Broken(_) => "broken",
            Self::Corrupt { .. } => "corrupt",
            Self::TimedOut { .. } => "timed_out",
            Self::Cancelled => "cancelled",
            Self::Closed => "closed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_the_wire_and_an_unknown_one_is_internal() {
        for code in RejectCode::ALL {
            assert_eq!(RejectCode::from_wire(code.to_wire()), code);
        }
        assert_eq!(RejectCode::from_wire(0), RejectCode::Internal);
        assert_eq!(RejectCode::from_wire(999), RejectCode::Internal);
    }
}
