//! What a producer has done, as numbers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::RejectCode;

/// Counters since the start, and gauges of now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerStats {
    /// Leases that can be fetched or are being fetched.
    pub leases: usize,
    /// Those among them whose last blocks are still being computed.
    pub building: usize,
    /// Bytes that leases and running transfers hold.
    pub lease_bytes: u64,
    /// Open connections.
    pub connections: usize,
    /// Leases that nobody fetched in time.
    pub expired: u64,
    /// Leases that a consumer has released after fetching from them.
    pub transfers: u64,
    /// Payload sent, chunks sent again included.
    pub bytes_sent: u64,
    /// Payload that consumers were shown in shared memory.
    pub bytes_lent: u64,
    /// Time that transfers stood still because the consumer granted nothing, all of them together.
    pub credit_stall: Duration,
    /// Heartbeat messages received.
    pub heartbeats: u64,
    /// Chunks that a consumer found damaged.
    pub crc_errors: u64,
    /// Connections closed before they had proved themselves, or because there were too many.
    pub turned_away: u64,
    rejects: [u64; RejectCode::ALL.len()],
}

impl ServerStats {
    /// Refusals by reason.
    pub fn rejects(&self) -> impl Iterator<Item = (RejectCode, u64)> {
        RejectCode::ALL.into_iter().zip(self.rejects)
    }

    /// Refusals for one reason.
    #[must_use]
    pub fn rejected(&self, code: RejectCode) -> u64 {
        self.rejects()
            .find(|(c, _)| *c == code)
            .map_or(0, |(_, n)| n)
    }
}

/// The counters that all threads add to.
#[derive(Debug, Default)]
pub(super) struct Counters {
    expired: AtomicU64,
    bytes_sent: AtomicU64,
    bytes_lent: AtomicU64,
    credit_stall_us: AtomicU64,
    heartbeats: AtomicU64,
    crc_errors: AtomicU64,
    turned_away: AtomicU64,
    rejects: [AtomicU64; RejectCode::ALL.len()],
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn expired(&self, n: usize) {
        add(&self.expired, n as u64);
    }

    pub(super) fn sent(&self, bytes: usize) {
        add(&self.bytes_sent, bytes as u64);
    }

    pub(super) fn lent(&self, bytes: usize) {
        add(&self.bytes_lent, bytes as u64);
    }

    pub(super) fn stalled(&self, time: Duration) {
        let us = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        add(&self.credit_stall_us, us);
    }

    pub(super) fn heartbeat(&self) {
        add(&self.heartbeats, 1);
    }

    pub(super) fn crc_error(&self) {
        add(&self.crc_errors, 1);
    }

    pub(super) fn turned_away(&self) {
        add(&self.turned_away, 1);
    }

    pub(super) fn rejected(&self, code: RejectCode) {
        let counters = RejectCode::ALL.iter().zip(&self.rejects);
        counters
            .filter(|(c, _)| **c == code)
            .for_each(|(_, counter)| add(counter, 1));
    }

    pub(super) fn snapshot(&self) -> ServerStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ServerStats {
            expired: read(&self.expired),
            bytes_sent: read(&self.bytes_sent),
            bytes_lent: read(&self.bytes_lent),
            credit_stall: Duration::from_micros(read(&self.credit_stall_us)),
            heartbeats: read(&self.heartbeats),
            crc_errors: read(&self.crc_errors),
            turned_away: read(&self.turned_away),
            rejects: std::array::from_fn(|i| read(&self.rejects[i])),
            ..ServerStats::default()
        }
    }
}
