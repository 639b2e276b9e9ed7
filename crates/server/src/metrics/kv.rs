//! Series of KV that moves between servers: `kvx_*`, and for dashboards made for vLLM's TPU connector its names where
//! they mean something here.

use std::fmt::Write as _;
use std::time::Duration;

use baton_kv_transfer::{ClientStats, ServerStats};
use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge};

use super::Series;

const SECONDS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];
/// The TPU connector's own.
const TPU_MS: &[f64] = &[
    1.0, 10.0, 100.0, 250.0, 500.0, 750.0, 1000.0, 2500.0, 5000.0, 7500.0, 10_000.0, 25_000.0,
    50_000.0,
];
const TPU_MEGABYTES: &[f64] = &[32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0];

/// KV that came and KV that did not.
#[derive(Debug)]
pub(crate) struct KvSeries {
    /// Of a transfer: until its first byte could come, until its last had, placing what came, and all of it.
    open: Histogram,
    wire: Histogram,
    h2d: Histogram,
    total: Histogram,
    failed: IntCounterVec,
    recomputed: IntCounterVec,
    tpu: TpuSeries,
}

/// What the TPU connector counts too.
#[derive(Debug)]
struct TpuSeries {
    transfer_ms: Histogram,
    megabytes: Histogram,
    d2h_ms: Histogram,
    failed: IntCounter,
    being_pulled: IntGauge,
    waiting_pull: IntGauge,
}

/// What went into bringing the KV of one prompt here, waiting for its computation not included.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spent {
    /// From when blocks could be fetched until the first of their bytes could come.
    pub(crate) opening: Duration,
    /// From when blocks could be fetched until they were here.
    pub(crate) pulling: Duration,
    /// From host memory into blocks.
    pub(crate) placing: Duration,
    pub(crate) bytes: usize,
}

impl KvSeries {
    pub(super) fn new(s: &Series) -> Self {
        let seconds = "Time that bringing the KV of a prompt took, waiting for its computation not included, by phase.";
        let seconds = s.histograms("kvx_transfer_seconds", seconds, "phase", SECONDS);
        Self {
            open: seconds.with_label_values(&["open"]),
            wire: seconds.with_label_values(&["wire"]),
            h2d: seconds.with_label_values(&["h2d"]),
            total: seconds.with_label_values(&["total"]),
            failed: s.labelled(
                "kvx_transfer_failed_total",
                "Hand-overs that brought not all they should have, by reason.",
                "code",
            ),
            recomputed: s.labelled(
                "kvx_recompute_tokens_total",
                "Prompt tokens computed because their KV did not come, by reason.",
                "reason",
            ),
            tpu: TpuSeries::new(s),
        }
    }

    /// Enters KV that came.
    pub(crate) fn came(&self, spent: &Spent) {
        let wire = spent.pulling.saturating_sub(spent.opening);
        self.open.observe(spent.opening.as_secs_f64());
        self.wire.observe(wire.as_secs_f64());
        self.h2d.observe(spent.placing.as_secs_f64());
        self.total
            .observe((spent.pulling + spent.placing).as_secs_f64());
        self.tpu.transfer_ms.observe(milliseconds(spent.pulling));
        self.tpu.megabytes.observe(megabytes(spent.bytes));
    }

    /// Counts a transfer that brought nothing, or only the first of its blocks.
    pub(crate) fn failed(&self, code: &str) {
        self.failed.with_label_values(&[code]).inc();
        self.tpu.failed.inc();
    }

    /// Counts prompt tokens that were computed although their KV should have come.
    pub(crate) fn recomputed(&self, reason: &str, n_tokens: u64) {
        self.recomputed
            .with_label_values(&[reason])
            .inc_by(n_tokens);
    }

    /// Enters the time that copying a prompt's KV out of the device took.
    pub(crate) fn left(&self, copying: Duration) {
        self.tpu.d2h_ms.observe(milliseconds(copying));
    }

    /// Sequences that wait for KV.
    pub(crate) fn awaiting(&self, n: u32) {
        self.tpu.being_pulled.set(i64::from(n));
    }

    /// Takes over what only the producer's end knows.
    pub(super) fn refresh(&self, server: Option<&ServerStats>) {
        let leases = server.map_or(0, |stats| stats.leases);
        let leases = i64::try_from(leases).unwrap_or(i64::MAX);
        self.tpu.waiting_pull.set(leases);
    }
}

impl TpuSeries {
    #[rustfmt::skip]
    fn new(s: &Series) -> Self {
        Self {
            transfer_ms: s.histogram("vllm:tpu_kv_transfer_time_ms", "Time of a pull, in milliseconds.", TPU_MS),
            megabytes: s.histogram("vllm:tpu_kv_megabytes_transferred", "Size of a pull, in units of 2^20 bytes.", TPU_MEGABYTES),
            d2h_ms: s.histogram("vllm:tpu_d2h_transfer_time_ms", "Time of copying a prompt's KV out of the device, in milliseconds.", TPU_MS),
            failed: s.counter("vllm:tpu_num_failed_transfers_total", "Pulls that brought not all they should have."),
            being_pulled: s.gauge("vllm:tpu_num_requests_being_pulled", "Requests whose KV is on its way here."),
            waiting_pull: s.gauge("vllm:tpu_num_requests_waiting_pull", "Requests whose KV is kept for another server."),
        }
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[expect(
    clippy::cast_precision_loss,
    reason = "the KV of a prompt is far below 2^53 bytes"
)]
fn megabytes(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Writes what the transfer itself counts.
pub(super) fn write(text: &mut String, server: Option<&ServerStats>, client: Option<&ClientStats>) {
    if let Some(server) = server {
        producer(text, server);
    }
    if let Some(client) = client {
        consumer(text, client);
    }
    transferred(text, server, client);
}

fn producer(text: &mut String, stats: &ServerStats) {
    family(text, "kvx_leases", "gauge");
    let building = stats.building.min(stats.leases);
    for (state, n) in [("building", building), ("ready", stats.leases - building)] {
        let series = format_args!("kvx_leases{{state=\"{state}\"}}");
        sample(text, series, n as u64);
    }
    family(text, "kvx_lease_bytes", "gauge");
    let bytes = format_args!("kvx_lease_bytes{{tier=\"host\"}}");
    sample(text, bytes, stats.lease_bytes);
    line(text, "kvx_conns", "gauge", stats.connections as u64);
    line(text, "kvx_lease_expired_total", "counter", stats.expired);
    line(text, "kvx_transfers_sent_total", "counter", stats.transfers);
    line(text, "kvx_heartbeats_total", "counter", stats.heartbeats);
    line(
        text,
        "kvx_sent_crc_errors_total",
        "counter",
        stats.crc_errors,
    );
    line(text, "kvx_turned_away_total", "counter", stats.turned_away);
    let name = "kvx_credit_stall_seconds_total";
    family(text, name, "counter");
    let stalled = stats.credit_stall.as_secs_f64();
    sample(text, format_args!("{name}"), stalled);
    family(text, "kvx_rejected_total", "counter");
    for (code, n) in stats.rejects() {
        let series = format_args!("kvx_rejected_total{{code=\"{}\"}}", code.name());
        sample(text, series, n);
    }
}

fn consumer(text: &mut String, stats: &ClientStats) {
    line(text, "kvx_held", "gauge", stats.held as u64);
    line(text, "kvx_budget_used_bytes", "gauge", stats.budget_used);
    line(
        text,
        "kvx_transfers_complete_total",
        "counter",
        stats.complete,
    );
    line(
        text,
        "kvx_transfers_partial_total",
        "counter",
        stats.partial,
    );
    line(text, "kvx_crc_errors_total", "counter", stats.crc_errors);
}

/// Payload by direction and way; a server that does both has both in one family.
fn transferred(text: &mut String, server: Option<&ServerStats>, client: Option<&ClientStats>) {
    let out = server.map(|s| [("out", "tcp", s.bytes_sent), ("out", "shm", s.bytes_lent)]);
    let came = client.map(|c| {
        [
            ("in", "tcp", c.bytes_received),
            ("in", "shm", c.bytes_copied),
        ]
    });
    let name = "kvx_transfer_bytes_total";
    if out.is_some() || came.is_some() {
        family(text, name, "counter");
    }
    for (dir, path, bytes) in out.into_iter().chain(came).flatten() {
        let series = format_args!("{name}{{dir=\"{dir}\",path=\"{path}\"}}");
        sample(text, series, bytes);
    }
}

pub(super) fn line(text: &mut String, name: &str, kind: &str, value: u64) {
    family(text, name, kind);
    sample(text, format_args!("{name}"), value);
}

fn family(text: &mut String, name: &str, kind: &str) {
    // Writing into a String cannot fail.
    let _ = writeln!(text, "# TYPE {name} {kind}");
}

fn sample(text: &mut String, series: std::fmt::Arguments<'_>, value: impl std::fmt::Display) {
    let _ = writeln!(text, "{series} {value}");
}
