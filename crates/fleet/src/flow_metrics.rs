//! Metrics of the queue before the servers, under llm-d's names.

use crate::admission::{Admission, Asking, Witness};
use crate::fleet::Fleet;
use baton_metrics::{Known, Whose, registered};
use baton_scheduler::flow::{EVICTION_PATIENCE, Outcome};
use prometheus::{
    GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};
use std::sync::Arc;
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
    known: Known<Waiting>,
    waiting: WaitingFamilies,
    requests: IntCounterVec,
    waited: HistogramVec,
    entering: HistogramVec,
    turns: Histogram,
    evictions: Evictions,
    state: State,
}

/// What waits, by tenant, priority and model.
#[derive(Debug)]
struct WaitingFamilies {
    requests: IntGaugeVec,
    bytes: IntGaugeVec,
}

/// What waits of one tenant's requests of one priority for one model.
#[derive(Debug)]
struct Waiting {
    /// Model, target, tenant, priority.
    labels: [Box<str>; 4],
    requests: IntGauge,
    bytes: IntGauge,
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

fn gauges(r: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    registered(r, IntGaugeVec::new(opts(name, help), labels))
}

fn histograms(r: &Registry, name: &str, help: &str, labels: &[&str], of: &[f64]) -> HistogramVec {
    let opts = HistogramOpts::from(opts(name, help)).buckets(of.to_vec());
    registered(r, HistogramVec::new(opts, labels))
}

impl WaitingFamilies {
    fn new(r: &Registry) -> Self {
        let labels = [
            "model_name",
            "target_model_name",
            "fairness_id",
            "priority",
            "inference_pool",
        ];
        Self {
            requests: gauges(r, "queue_size", "Requests that wait.", &labels),
            bytes: gauges(r, "queue_bytes", "Bytes of requests that wait.", &labels),
        }
    }

    /// What waits of requests with these labels, in `pool`.
    fn of(&self, labels: [&str; 4], pool: &str) -> Waiting {
        let [model, target, tenant, priority] = labels;
        let values = [model, target, tenant, priority, pool];
        Waiting {
            labels: labels.map(Into::into),
            requests: self.requests.with_label_values(&values),
            bytes: self.bytes.with_label_values(&values),
        }
    }
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
        let band = ["priority", "inference_pool"];
        let part =
            |name, help, labels: &[&str]| registered(r, GaugeVec::new(opts(name, help), labels));
        Self {
            saturation: part(
                "pool_saturation",
                "How busy servers are: 1 is as busy as they should get.",
                &["inference_pool", "stage"],
            ),
            stale: gauges(
                r,
                "stale_endpoints",
                "Servers whose metrics are too old: each is taken for full.",
                &["detector"],
            ),
            band_requests: part(
                "capacity_utilization_requests",
                "Part of a priority's places that is taken.",
                &band,
            ),
            band_bytes: part(
                "capacity_utilization_bytes",
                "Part of a priority's bytes that is taken.",
                &band,
            ),
            all_requests: part(
                "global_capacity_utilization_requests",
                "Part of all places that is taken.",
                &band[1..],
            ),
            all_bytes: part(
                "global_capacity_utilization_bytes",
                "Part of all bytes that is taken.",
                &band[1..],
            ),
        }
    }
}

impl FlowMetrics {
    /// Registers all of them; `pool` is what the label `inference_pool` says.
    #[must_use]
    pub fn new(registry: &Registry, pool: &str) -> Self {
        let r = registry;
        let outcome = ["fairness_id", "priority", "outcome"];
        let model = ["inference_pool", "model_name", "target_model_name"];
        Self {
            pool: pool.into(),
            known: Known::default(),
            waiting: WaitingFamilies::new(r),
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
                &[outcome, model].concat(),
                &BUCKETS,
            ),
            entering: histograms(
                r,
                "request_enqueue_duration_seconds",
                "How long it took to take requests in.",
                &outcome,
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
        self.state.band_requests.reset();
        self.state.band_bytes.reset();
        gate.look(|queue| {
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
    }

    /// Where such requests are counted while they wait.
    fn waiting(&self, asking: &Asking<'_>) -> Arc<Waiting> {
        let whose = Whose {
            model: asking.model,
            target: asking.target,
            tenant: asking.arrival.flow,
            priority: asking.arrival.priority,
        };
        (self.known).series(whose, |labels| self.waiting.of(labels, &self.pool))
    }

    /// It took so long to take in a request of `series`, or not to.
    fn entered(&self, series: &Waiting, outcome: &str, took: Duration) {
        let [_, _, tenant, priority] = series.labels.each_ref().map(|label| &**label);
        let labels = [tenant, priority, outcome];
        let took = took.as_secs_f64();
        self.entering.with_label_values(&labels).observe(took);
    }

    /// This became of a request of `series`.
    fn ended(&self, series: &Waiting, why: Outcome, waited: Duration) {
        let [model, target, tenant, priority] = series.labels.each_ref().map(|label| &**label);
        let (outcome, pool) = (why.label(), &*self.pool);
        let requests = [outcome, priority, pool];
        self.requests.with_label_values(&requests).inc();
        let labels = [tenant, priority, outcome, pool, model, target];
        let secs = waited.as_secs_f64();
        self.waited.with_label_values(&labels).observe(secs);
    }
}

/// A client may make up any number of tenants and models; a request that is like another costs no allocation here.
impl Witness for FlowMetrics {
    fn came(&self, asking: &Asking<'_>, took: Duration) {
        let waiting = self.waiting(asking);
        waiting.requests.inc();
        waiting.bytes.add(asking.arrival.bytes as i64);
        self.entered(&waiting, "NotYetFinalized", took);
    }

    fn refused(&self, asking: &Asking<'_>, why: Outcome, took: Duration) {
        let series = self.waiting(asking);
        self.entered(&series, why.label(), took);
        self.ended(&series, why, Duration::ZERO);
    }

    fn left(&self, asking: &Asking<'_>, why: Outcome, waited: Duration) {
        let waiting = self.waiting(asking);
        waiting.requests.dec();
        waiting.bytes.sub(asking.arrival.bytes as i64);
        self.ended(&waiting, why, waited);
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

    use baton_scheduler::flow::Arrival;

    fn asking<'a>(model: &'a str, flow: &'a str) -> Asking<'a> {
        Asking {
            model,
            target: "tuned",
            arrival: Arrival {
                flow,
                bytes: 100,
                ..Arrival::new()
            },
        }
    }

    /// A series of the page, without `llm_d_epp_flow_control_`.
    fn read(registry: &Registry, series: &str) -> Option<f64> {
        let page = baton_metrics::text(&registry.gather());
        let series = format!("llm_d_epp_flow_control_{series} ");
        let value = page.lines().find_map(|line| line.strip_prefix(&series))?;
        value.parse().ok()
    }

    #[test]
    fn what_waits_is_told_by_model_and_tenant() {
        const A: &str = r#"{fairness_id="a",inference_pool="p",model_name="m",priority="0",target_model_name="tuned"}"#;
        const WAITED: &str = r#"request_queue_duration_seconds_count{fairness_id="a",inference_pool="p",model_name="m",outcome="Dispatched",priority="0",target_model_name="tuned"}"#;
        let registry = Registry::new();
        let metrics = FlowMetrics::new(&registry, "p");
        let read = |series: &str| read(&registry, series);
        for asking in [asking("m", "a"), asking("m", "a"), asking("other", "a")] {
            metrics.came(&asking, Duration::ZERO);
        }
        metrics.refused(&asking("m", "a"), Outcome::RejectedCapacity, Duration::ZERO);
        assert_eq!(read(&format!("queue_size{A}")), Some(2.0));
        metrics.left(&asking("m", "a"), Outcome::Dispatched, Duration::ZERO);
        assert_eq!(read(&format!("queue_size{A}")), Some(1.0));
        assert_eq!(read(&format!("queue_bytes{A}")), Some(100.0));
        assert_eq!(read(WAITED), Some(1.0));
    }

    #[test]
    fn names_that_clients_make_up_do_not_become_labels_without_end() {
        let metrics = FlowMetrics::new(&Registry::new(), "p");
        for i in 0..3000 {
            let name = format!("n-{i}");
            for asking in [asking("m", &name), asking(&name, "a")] {
                metrics.came(&asking, Duration::ZERO);
                metrics.left(&asking, Outcome::Dispatched, Duration::ZERO);
            }
        }
        let count = |tenant: &str, model: &str| {
            let labels = [tenant, "0", "Dispatched", "p", model, "tuned"];
            metrics.waited.with_label_values(&labels).get_sample_count()
        };
        assert_eq!((count("n-998", "m"), count("other", "m")), (1, 2001));
        assert_eq!((count("a", "n-997"), count("a", "other")), (1, 2002));
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
