//! Metrics of the queue before the servers, under llm-d's names.

use crate::admission::{Admission, Seen, Witness};
use crate::fleet::Fleet;
use baton_metrics::{Names, registered};
use baton_scheduler::flow::{EVICTION_PATIENCE, Outcome};
use prometheus::{
    GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry,
};
use std::collections::BTreeMap;
use std::time::Duration;

/// Seconds.
const BUCKETS: [f64; 16] = [
    0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0,
];
/// Of what takes no time that anybody would notice.
const SHORT: [f64; 10] = [
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1,
];
/// Of the time in which a request makes room.
const ENDING: [f64; 11] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// What happens in a queue, for one pool of servers.
#[derive(Debug)]
pub struct FlowMetrics {
    /// What the label `inference_pool` says.
    pool: Box<str>,
    tenants: Names,
    requests: IntCounterVec,
    waited: HistogramVec,
    entering: HistogramVec,
    turns: Histogram,
    evictions: Evictions,
    state: State,
}

/// Requests that run and make room for others.
#[derive(Debug)]
struct Evictions {
    issued: IntCounterVec,
    ended: IntCounterVec,
    took: HistogramVec,
}

/// How full the queue is, and the servers; set anew whenever somebody asks.
#[derive(Debug)]
struct State {
    queue_size: IntGaugeVec,
    queue_bytes: IntGaugeVec,
    saturation: GaugeVec,
    stale: IntGaugeVec,
    band_requests: GaugeVec,
    band_bytes: GaugeVec,
    all_requests: GaugeVec,
    all_bytes: GaugeVec,
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(format!("llm_d_epp_flow_control_{name}"), help)
}

fn counters(r: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    registered(r, IntCounterVec::new(opts(name, help), labels))
}

fn histograms(r: &Registry, name: &str, help: &str, labels: &[&str], of: &[f64]) -> HistogramVec {
    let opts = HistogramOpts::from(opts(name, help)).buckets(of.to_vec());
    registered(r, HistogramVec::new(opts, labels))
}

impl Evictions {
    fn new(r: &Registry) -> Self {
        Self {
            issued: counters(
                r,
                "revocations_issued_total",
                "Requests told to make room, by the priority of those for whom.",
                &["priority", "inference_pool"],
            ),
            ended: counters(
                r,
                "revocations_total",
                "Requests that made room, or were not waited for any more.",
                &["outcome", "inference_pool"],
            ),
            took: histograms(
                r,
                "revocation_confirmation_seconds",
                "How long requests took to make room.",
                &["inference_pool"],
                &ENDING,
            ),
        }
    }
}

impl State {
    fn new(r: &Registry) -> Self {
        let flow = ["fairness_id", "priority", "inference_pool"];
        let count =
            |name, help, labels: &[&str]| registered(r, IntGaugeVec::new(opts(name, help), labels));
        let part =
            |name, help, labels: &[&str]| registered(r, GaugeVec::new(opts(name, help), labels));
        Self {
            queue_size: count("queue_size", "Requests that wait.", &flow),
            queue_bytes: count("queue_bytes", "Bytes of requests that wait.", &flow),
            saturation: part(
                "pool_saturation",
                "How busy servers are: 1 is as busy as they should get.",
                &["inference_pool", "stage"],
            ),
            stale: count(
                "stale_endpoints",
                "Servers whose metrics are too old: each is taken for full.",
                &["detector"],
            ),
            band_requests: part(
                "capacity_utilization_requests",
                "Part of a priority's places that is taken.",
                &flow[1..],
            ),
            band_bytes: part(
                "capacity_utilization_bytes",
                "Part of a priority's bytes that is taken.",
                &flow[1..],
            ),
            all_requests: part(
                "global_capacity_utilization_requests",
                "Part of all places that is taken.",
                &flow[2..],
            ),
            all_bytes: part(
                "global_capacity_utilization_bytes",
                "Part of all bytes that is taken.",
                &flow[2..],
            ),
        }
    }
}

impl FlowMetrics {
    /// Registers all of them; `pool` is what the label `inference_pool` says.
    #[must_use]
    pub fn new(registry: &Registry, pool: &str) -> Self {
        let r = registry;
        let outcome = ["fairness_id", "priority", "outcome", "inference_pool"];
        Self {
            pool: pool.into(),
            tenants: Names::default(),
            requests: counters(
                r,
                "requests_total",
                "Requests by what became of them.",
                &["outcome", "priority", "inference_pool"],
            ),
            waited: histograms(
                r,
                "request_queue_duration_seconds",
                "How long requests waited, by what became of them.",
                &outcome,
                &BUCKETS,
            ),
            entering: histograms(
                r,
                "request_enqueue_duration_seconds",
                "How long it took to take requests in.",
                &outcome[..3],
                &SHORT,
            ),
            turns: histograms(
                r,
                "dispatch_cycle_duration_seconds",
                "How long it took to see who may go.",
                &[],
                &SHORT,
            )
            .with_label_values::<&str>(&[]),
            evictions: Evictions::new(r),
            state: State::new(r),
        }
    }

    /// Brings gauges up to date.
    pub fn refresh(&self, gate: &Admission, fleet: &Fleet) {
        self.state
            .stale
            .with_label_values(&["utilization-detector"])
            .set(fleet.stale() as i64);
        let part = |used: u64, most: u64| used as f64 / most.max(1) as f64;
        let mut flows: BTreeMap<(String, i32), (i64, i64)> = BTreeMap::new();
        self.state.band_requests.reset();
        self.state.band_bytes.reset();
        gate.look(|queue| {
            for (name, priority, usage) in queue.flows() {
                let flow = flows.entry((name.to_owned(), priority)).or_default();
                flow.0 += usage.requests as i64;
                flow.1 += usage.bytes as i64;
            }
            for (priority, usage, band) in queue.bands() {
                let labels = [&*priority.to_string(), &*self.pool];
                let set = |vec: &GaugeVec, value| vec.with_label_values(&labels).set(value);
                set(
                    &self.state.band_requests,
                    part(usage.requests, band.max_requests),
                );
                set(&self.state.band_bytes, part(usage.bytes, band.max_bytes));
            }
            let (usage, config) = (queue.usage(), queue.config());
            let all = |vec: &GaugeVec, used, most: Option<u64>| {
                let value = most.map_or(0.0, |most| part(used, most));
                vec.with_label_values(&[&self.pool]).set(value);
            };
            all(
                &self.state.all_requests,
                usage.requests,
                config.max_requests,
            );
            all(&self.state.all_bytes, usage.bytes, config.max_bytes);
            let room = queue.room();
            let stage = |name, value| {
                self.state
                    .saturation
                    .with_label_values(&[&*self.pool, name])
                    .set(value);
            };
            stage("decode", room.decode());
            stage("effective", room.effective());
            room.prefill().into_iter().for_each(|p| stage("prefill", p));
        });
        self.state.queue_size.reset();
        self.state.queue_bytes.reset();
        for ((name, priority), (requests, bytes)) in flows {
            let labels = [&*name, &*priority.to_string(), &*self.pool];
            self.state
                .queue_size
                .with_label_values(&labels)
                .set(requests);
            self.state.queue_bytes.with_label_values(&labels).set(bytes);
        }
    }
}

/// A client may make up any number of tenants; a request costs no allocation here.
impl Witness for FlowMetrics {
    fn came(&self, flow: &str, priority: i32, refused: Option<Outcome>, took: Duration) {
        let mut digits = itoa::Buffer::new();
        let outcome = refused.map_or("NotYetFinalized", Outcome::label);
        let labels = [self.tenants.label(flow), digits.format(priority), outcome];
        let took = took.as_secs_f64();
        self.entering.with_label_values(&labels).observe(took);
    }

    fn left(&self, seen: &Seen<'_>) {
        let mut digits = itoa::Buffer::new();
        let (priority, outcome) = (digits.format(seen.priority), seen.outcome.label());
        let requests = [outcome, priority, &*self.pool];
        self.requests.with_label_values(&requests).inc();
        let tenant = self.tenants.label(seen.flow);
        let waited = [tenant, priority, outcome, &*self.pool];
        let secs = seen.waited.as_secs_f64();
        self.waited.with_label_values(&waited).observe(secs);
    }

    fn turned(&self, took: Duration) {
        self.turns.observe(took.as_secs_f64());
    }

    fn revoked(&self, priority: i32) {
        let mut digits = itoa::Buffer::new();
        let labels = [digits.format(priority), &*self.pool];
        self.evictions.issued.with_label_values(&labels).inc();
    }

    fn made_room(&self, after: Duration) {
        let in_time = after < EVICTION_PATIENCE;
        let outcome = if in_time { "confirmed" } else { "timed_out" };
        let labels = [outcome, &*self.pool];
        self.evictions.ended.with_label_values(&labels).inc();
        if in_time {
            let secs = after.as_secs_f64();
            self.evictions
                .took
                .with_label_values(&[&*self.pool])
                .observe(secs);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenants_that_clients_make_up_do_not_become_labels_without_end() {
        let metrics = FlowMetrics::new(&Registry::new(), "p");
        for i in 0..3000 {
            metrics.left(&Seen {
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
        assert_eq!((series("tenant-999"), series("other")), (1, 2000));
    }

    #[test]
    fn a_request_that_takes_too_long_to_end_is_told_apart() {
        let metrics = FlowMetrics::new(&Registry::new(), "p");
        metrics.made_room(Duration::from_secs(1));
        metrics.made_room(EVICTION_PATIENCE);
        let count = |outcome| {
            metrics
                .evictions
                .ended
                .with_label_values(&[outcome, "p"])
                .get()
        };
        assert_eq!((count("confirmed"), count("timed_out")), (1, 1));
        let confirmed = metrics.evictions.took.with_label_values(&["p"]);
        assert_eq!(confirmed.get_sample_count(), 1);
    }
}
