//! How the pool is; set anew whenever somebody asks.

use super::{APPROXIMATE, PLUGIN, counters, gauges, opts, parted};
use baton_fleet::Fleet;
use baton_metrics::registered;
use baton_scheduler::{Endpoint, Health};
use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec, Registry};

#[derive(Debug)]
pub(super) struct Pool {
    mean_and_deviation: [(GaugeVec, GaugeVec); 3],
    ready: IntGaugeVec,
    queues: IntGaugeVec,
    in_flight: IntGaugeVec,
    tokens: IntGaugeVec,
    index: IntGaugeVec,
    failed_looks: IntCounterVec,
}

impl Pool {
    pub(super) fn new(r: &Registry) -> Self {
        let pair = |what: &str, help: &str| {
            let one = |kind: &str| {
                let opts = opts(&format!("{kind}_{what}"), help);
                registered(r, GaugeVec::new(opts, &["name"]))
            };
            (one("average"), one("std_dev"))
        };
        Self {
            mean_and_deviation: [
                pair(
                    "kv_cache_utilization",
                    "Part of the KV pools in use, over the endpoints.",
                ),
                pair("queue_size", "Requests that wait, over the endpoints."),
                pair("running_requests", "Requests that run, over the endpoints."),
            ],
            ready: gauges(
                r,
                "ready_endpoints",
                "Endpoints that take requests.",
                &["name"],
            ),
            queues: gauges(
                r,
                "per_endpoint_queue_size",
                "Requests that wait at an endpoint.",
                &["name", "model_server_endpoint"],
            ),
            in_flight: gauges(
                r,
                "inflight_requests",
                "Requests sent to an endpoint that have not ended.",
                &["endpoint_name", "namespace"],
            ),
            tokens: gauges(
                r,
                "inflight_tokens",
                "Tokens of those requests.",
                &["endpoint_name", "namespace"],
            ),
            index: gauges(
                r,
                "prefix_indexer_size",
                "Blocks that endpoints are taken to have, of all of them.",
                &PLUGIN,
            ),
            failed_looks: counters(
                r,
                "datalayer_poll_errors_total",
                "Looks at endpoints' metrics that failed.",
                &["source_type"],
            ),
        }
    }

    pub(super) fn set(&self, pool: &str, fleet: &Fleet) {
        self.set_load(pool, &fleet.snapshot());
        for per_endpoint in [&self.in_flight, &self.tokens] {
            per_endpoint.reset();
        }
        for server in fleet.servers().iter() {
            let (namespace, name) = parted(server);
            let labels = [name, namespace];
            self.in_flight
                .with_label_values(&labels)
                .set(server.in_flight().into());
            self.tokens
                .with_label_values(&labels)
                .set(count(server.tokens_in_flight()));
        }
        let blocks = count(fleet.cached_blocks() as u64);
        self.index.with_label_values(&APPROXIMATE).set(blocks);
        let failed = self
            .failed_looks
            .with_label_values(&["metrics-data-source"]);
        failed.inc_by(fleet.failed_looks().saturating_sub(failed.get()));
    }

    fn set_load(&self, pool: &str, seen: &[Endpoint]) {
        let healthy: Vec<&Endpoint> = seen
            .iter()
            .filter(|e| e.health == Health::Healthy)
            .collect();
        let read: [fn(&Endpoint) -> f64; 3] = [
            |e| e.load.kv_usage.into(),
            |e| e.load.waiting.into(),
            |e| e.load.running.into(),
        ];
        for ((mean, deviation), read) in self.mean_and_deviation.iter().zip(read) {
            let (m, d) = mean_and_deviation(healthy.iter().map(|e| read(e)));
            mean.with_label_values(&[pool]).set(m);
            deviation.with_label_values(&[pool]).set(d);
        }
        self.ready
            .with_label_values(&[pool])
            .set(count(healthy.len() as u64));
        self.queues.reset();
        for endpoint in seen {
            let labels = [pool, &*endpoint.identity.name];
            self.queues
                .with_label_values(&labels)
                .set(endpoint.load.waiting.into());
        }
    }
}

fn count(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

fn mean_and_deviation(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count().max(1) as f64;
    let mean = values.clone().sum::<f64>() / n;
    let variance = values.map(|v| (v - mean) * (v - mean)).sum::<f64>() / n;
    (mean, variance.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviations_are_of_the_whole() {
        assert_eq!(mean_and_deviation([1.0, 3.0].into_iter()), (2.0, 1.0));
        assert_eq!(mean_and_deviation([].into_iter()), (0.0, 0.0));
    }
}
