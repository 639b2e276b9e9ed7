//! What servers report of their caches, and what is asked of it, counted; only where the configuration wants that.

use super::plugins::BUCKETS;
use super::{one_histogram, opts};
use baton_fleet::Fleet;
use baton_metrics::registered;
use baton_scheduler::PreciseStats;
use prometheus::{Histogram, IntCounter, Registry};

type Read = fn(&PreciseStats) -> u64;

/// The index counts them itself.
const COUNTERS: [(&str, &str, Read); 7] = [
    (
        "kv_cache_index_admissions_total",
        "Blocks that servers said they had stored.",
        |stats| stats.stored,
    ),
    (
        "kv_cache_index_evictions_total",
        "Blocks that servers said they had no longer.",
        |stats| stats.removed,
    ),
    (
        "kv_cache_index_lookup_requests_total",
        "Lookups: one for each profile that asks.",
        |stats| stats.lookups,
    ),
    (
        "kv_cache_index_lookup_hits_total",
        "Leading blocks of prompts that the best server had, or was expected to have.",
        |stats| stats.hits,
    ),
    (
        "kv_cache_index_max_pod_hit_count_total",
        "The same as kv_cache_index_lookup_hits_total.",
        |stats| stats.hits,
    ),
    (
        "kv_cache_events_dedup_removed_hashes_suppressed_total",
        "Removals of blocks that had been stored once more.",
        |stats| stats.outlived,
    ),
    (
        "kv_cache_events_dedup_removed_hashes_forwarded_total",
        "Removals of blocks that had not.",
        |stats| stats.heeded,
    ),
];

#[derive(Debug)]
pub(super) struct Index {
    counters: [(IntCounter, Read); COUNTERS.len()],
    pub(super) lookups: Histogram,
}

impl Index {
    pub(super) fn new(r: &Registry) -> Self {
        Self {
            counters: COUNTERS.map(|(name, help, read)| {
                let counter = IntCounter::with_opts(opts(name, help));
                (registered(r, counter), read)
            }),
            lookups: one_histogram(
                r,
                "kv_cache_index_lookup_latency_seconds",
                "How long lookups took, of one decision in thirteen.",
                &BUCKETS,
            ),
        }
    }

    /// Brings the counters up to date.
    pub(super) fn set(&self, fleet: &Fleet) {
        let Some(stats) = fleet.report_stats() else {
            return;
        };
        for (counter, read) in &self.counters {
            counter.inc_by(read(&stats).saturating_sub(counter.get()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_kv::{BlockEvent, EngineHash, Stored};
    use baton_scheduler::config::{default_config, load};
    use baton_scheduler::{EndpointId, PrefixIndex, Scheduler};
    use serde_json::json;

    #[test]
    fn what_servers_report_is_counted_once() {
        let mut config = default_config();
        let precise = json!({
            "type": "precise-prefix-cache-producer",
            "parameters": {"indexerConfig": {"kvBlockIndexConfig": {"enableMetrics": true}}},
        });
        config["plugins"].as_array_mut().unwrap().push(precise);
        let plan = load(&config).unwrap().plan;
        let fleet = Fleet::new(Scheduler::new(plan, PrefixIndex::new(10)), 7);
        let registry = Registry::new();
        let index = Index::new(&registry);
        let stored = Stored {
            hashes: vec![EngineHash(1), EngineHash(2)],
            tokens: vec![1, 2, 3, 4],
            block_size: 2,
            ..Stored::default()
        };
        fleet.reported(EndpointId(0), "m", &[BlockEvent::Stored(stored)]);
        index.set(&fleet);
        index.set(&fleet);
        let page = baton_metrics::text(&registry.gather());
        assert!(page.contains("\nllm_d_epp_kv_cache_index_admissions_total 2\n"));
        assert!(page.contains("\nllm_d_epp_kv_cache_index_evictions_total 0\n"));
    }
}
