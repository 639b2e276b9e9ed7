//! Metrics of the queue before the servers, under llm-d's names.

use crate::admission::{Admission, Seen};
use parking_lot::Mutex;
use prometheus::core::Collector;
use prometheus::{
    GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry,
};
use std::collections::{BTreeMap, BTreeSet};

/// Seconds.
const BUCKETS: [f64; 16] = [
    0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0,
];
/// Most tenants that have a label of their own, over all the time that the gateway runs.
const MAX_TENANTS: usize = 1000;
/// Longest name that becomes a label.
const MAX_NAME: usize = 256;
const OTHER: &str = "other";
/// What happens in a queue, for one pool of servers.
#[derive(Debug)]
pub struct FlowMetrics {
    /// What the label `inference_pool` says.
    pool: Box<str>,
    tenants: Mutex<BTreeSet<Box<str>>>,
    requests: IntCounterVec,
    waited: HistogramVec,
    queue_size: IntGaugeVec,
    queue_bytes: IntGaugeVec,
    saturation: GaugeVec,
    band_requests: GaugeVec,
    band_bytes: GaugeVec,
    all_requests: GaugeVec,
    all_bytes: GaugeVec,
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(format!("llm_d_epp_flow_control_{name}"), help)
}

impl FlowMetrics {
    /// Registers all of them; `pool` is what the label `inference_pool` says.
    #[must_use]
    pub fn new(registry: &Registry, pool: &str) -> Self {
        let r = registry;
        let flow = ["fairness_id", "priority", "inference_pool"];
        let gauge =
            |name, help, labels: &[&str]| registered(r, GaugeVec::new(opts(name, help), labels));
        let waited = HistogramOpts {
            common_opts: opts(
                "request_queue_duration_seconds",
                "How long requests waited, by what became of them.",
            ),
            buckets: BUCKETS.to_vec(),
        };
        let outcome = ["fairness_id", "priority", "outcome", "inference_pool"];
        let requests = opts("requests_total", "Requests by what became of them.");
        let size = opts("queue_size", "Requests that wait.");
        let bytes = opts("queue_bytes", "Bytes of requests that wait.");
        Self {
            pool: pool.into(),
            tenants: Mutex::default(),
            requests: registered(
                r,
                IntCounterVec::new(requests, &["outcome", "priority", "inference_pool"]),
            ),
            waited: registered(r, HistogramVec::new(waited, &outcome)),
            queue_size: registered(r, IntGaugeVec::new(size, &flow)),
            queue_bytes: registered(r, IntGaugeVec::new(bytes, &flow)),
            saturation: gauge(
                "pool_saturation",
                "How busy servers are: 1 is as busy as they should get.",
                &["inference_pool", "stage"],
            ),
            band_requests: gauge(
                "capacity_utilization_requests",
                "Part of a priority's places that is taken.",
                &flow[1..],
            ),
            band_bytes: gauge(
                "capacity_utilization_bytes",
                "Part of a priority's bytes that is taken.",
                &flow[1..],
            ),
            all_requests: gauge(
                "global_capacity_utilization_requests",
                "Part of all places that is taken.",
                &flow[2..],
            ),
            all_bytes: gauge(
                "global_capacity_utilization_bytes",
                "Part of all bytes that is taken.",
                &flow[2..],
            ),
        }
    }

    /// Notes what became of a request.
    pub fn seen(&self, seen: &Seen<'_>) {
        let priority = seen.priority.to_string();
        let outcome = seen.outcome.label();
        self.requests
            .with_label_values(&[outcome, &priority, &self.pool])
            .inc();
        let tenant = self.label(seen.flow);
        self.waited
            .with_label_values(&[tenant, &priority, outcome, &self.pool])
            .observe(seen.waited.as_secs_f64());
    }

    /// What a client makes up becomes a label only so often.
    fn label<'a>(&self, tenant: &'a str) -> &'a str {
        let mut tenants = self.tenants.lock();
        if tenants.contains(tenant) {
            return tenant;
        }
        if tenants.len() >= MAX_TENANTS || tenant.len() > MAX_NAME {
            return OTHER;
        }
        tenants.insert(tenant.into());
        tenant
    }

    /// Brings gauges up to date.
    pub fn refresh(&self, gate: &Admission) {
        let part = |used: u64, most: u64| used as f64 / most.max(1) as f64;
        let mut flows: BTreeMap<(String, i32), (i64, i64)> = BTreeMap::new();
        self.band_requests.reset();
        self.band_bytes.reset();
        gate.look(|queue| {
            for (name, priority, usage) in queue.flows() {
                let flow = flows.entry((name.to_owned(), priority)).or_default();
                flow.0 += usage.requests as i64;
                flow.1 += usage.bytes as i64;
            }
            for (priority, usage, band) in queue.bands() {
                let labels = [&*priority.to_string(), &*self.pool];
                let set = |vec: &GaugeVec, value| vec.with_label_values(&labels).set(value);
                set(&self.band_requests, part(usage.requests, band.max_requests));
                set(&self.band_bytes, part(usage.bytes, band.max_bytes));
            }
            let (usage, config) = (queue.usage(), queue.config());
            let all = |vec: &GaugeVec, used, most: Option<u64>| {
                let value = most.map_or(0.0, |most| part(used, most));
                vec.with_label_values(&[&self.pool]).set(value);
            };
            all(&self.all_requests, usage.requests, config.max_requests);
            all(&self.all_bytes, usage.bytes, config.max_bytes);
            let room = queue.room();
            let stage = |name, value| {
                self.saturation
                    .with_label_values(&[&*self.pool, name])
                    .set(value);
            };
            stage("decode", room.decode());
            stage("effective", room.effective());
            room.prefill().into_iter().for_each(|p| stage("prefill", p));
        });
        self.queue_size.reset();
        self.queue_bytes.reset();
        for ((name, priority), (requests, bytes)) in flows {
            let labels = [&*name, &*priority.to_string(), &*self.pool];
            self.queue_size.with_label_values(&labels).set(requests);
            self.queue_bytes.with_label_values(&labels).set(bytes);
        }
    }
}

/// Registers a collector that was made of constants.
///
/// # Panics
/// If its name is not valid, or is registered already: both are slips in the program.
pub fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: prometheus::Result<C>,
) -> C {
    let collector = collector.expect("names are constants and valid");
    registry
        .register(Box::new(collector.clone()))
        .expect("names are unique");
    collector
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_scheduler::flow::Outcome;
    use std::time::Duration;

    #[test]
    fn tenants_that_clients_make_up_do_not_become_labels_without_end() {
        let metrics = FlowMetrics::new(&Registry::new(), "p");
        for i in 0..3000 {
            metrics.seen(&Seen {
                outcome: Outcome::Dispatched,
                flow: &format!("tenant-{i}"),
                priority: 0,
                waited: Duration::ZERO,
            });
        }
        let series = |name: &str| {
            let waited = metrics.waited.clone();
            waited
                .get_metric_with_label_values(&[name, "0", "Dispatched", "p"])
                .unwrap()
                .get_sample_count()
        };
        assert_eq!((series("tenant-999"), series(OTHER)), (1, 2000));
        assert_eq!(metrics.label(&"x".repeat(300)), OTHER);
    }
}
