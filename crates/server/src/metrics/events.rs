//! Series of what is told of the prefix cache.

use baton_kv_events::PublisherStats;

use super::kv::line;

/// Writes what the publisher counts.
pub(crate) fn write(text: &mut String, stats: &PublisherStats) {
    for (name, kind, value) in [
        ("kvx_event_subscribers", "gauge", stats.subscribers),
        ("kvx_events_total", "counter", stats.events),
        ("kvx_event_batches_total", "counter", stats.batches),
        ("kvx_event_batches_skipped_total", "counter", stats.skipped),
        ("kvx_event_overflows_total", "counter", stats.overflows),
        ("kvx_event_replays_total", "counter", stats.replays),
    ] {
        line(text, name, kind, value);
    }
}
