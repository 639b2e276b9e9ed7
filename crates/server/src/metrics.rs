//! What `/metrics` tells: vLLM's names and labels for what exists here, and `kvx_*` for the transfer of KV.
//!
//! Handles are made once; recording is an atomic addition and allocates nothing. Not here: who records when.

pub(crate) mod events;
mod kv;

use baton_kv_transfer::{ClientStats, ServerStats};
use baton_metrics::registered;
use prometheus::core::Collector;
use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry,
};

pub(crate) use kv::{KvSeries, Spent};

const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const PER_TOKEN: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
const PER_REQUEST: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
const PER_STEP: &[f64] = &[
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
const N: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

/// What the labels and the constant series say.
#[derive(Clone, Debug)]
pub(crate) struct Labels<'a> {
    pub(crate) model_name: &'a str,
    pub(crate) max_model_len: u32,
    pub(crate) block_size: u32,
    pub(crate) n_blocks: u32,
    pub(crate) cache_dtype: &'a str,
}

/// Why a sequence ended, as the label says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finished {
    Stop,
    Length,
    Abort,
    Error,
}

impl Finished {
    const ALL: [Self; 4] = [Self::Stop, Self::Length, Self::Abort, Self::Error];

    const fn label(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}

/// Where the KV of prompt tokens came from, as the label says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Computed,
    /// Found in the prefix cache.
    Found,
    /// Fetched from another server.
    Fetched,
}

impl Source {
    const ALL: [Self; 3] = [Self::Computed, Self::Found, Self::Fetched];

    const fn label(self) -> &'static str {
        match self {
            Self::Computed => "local_compute",
            Self::Found => "local_cache_hit",
            Self::Fetched => "external_kv_transfer",
        }
    }
}

/// All handles.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) engine: EngineSeries,
    pub(crate) tokens: TokenSeries,
    pub(crate) sizes: SizeSeries,
    pub(crate) times: TimeSeries,
    pub(crate) kv: KvSeries,
    success: [IntCounter; Finished::ALL.len()],
    pub(crate) rejections: IntCounter,
}

/// The state of the engine.
#[derive(Debug)]
pub(crate) struct EngineSeries {
    pub(crate) running: IntGauge,
    pub(crate) waiting: IntGauge,
    pub(crate) kv_usage: Gauge,
    pub(crate) prefix_queries: IntCounter,
    pub(crate) prefix_hits: IntCounter,
    pub(crate) external_queries: IntCounter,
    pub(crate) external_hits: IntCounter,
    pub(crate) preemptions: IntCounter,
    pub(crate) step_tokens: Histogram,
}

/// Tokens of all sequences.
#[derive(Debug)]
pub(crate) struct TokenSeries {
    pub(crate) prompt: IntCounter,
    pub(crate) cached: IntCounter,
    pub(crate) generated: IntCounter,
    by_source: [IntCounter; Source::ALL.len()],
}

/// How large requests are.
#[derive(Debug)]
pub(crate) struct SizeSeries {
    pub(crate) prompt: Histogram,
    pub(crate) generated: Histogram,
    pub(crate) max_tokens: Histogram,
    pub(crate) n: Histogram,
}

/// How long things take, in seconds.
#[derive(Debug)]
pub(crate) struct TimeSeries {
    pub(crate) to_first_token: Histogram,
    pub(crate) between_tokens: Histogram,
    pub(crate) per_output_token: Histogram,
    pub(crate) end_to_end: Histogram,
    pub(crate) queue: Histogram,
    pub(crate) prefill: Histogram,
    pub(crate) decode: Histogram,
}

impl Metrics {
    pub(crate) fn new(labels: &Labels<'_>) -> Self {
        let series = Series {
            registry: Registry::new(),
            model_name: labels.model_name.to_owned(),
        };
        series.cache_config(labels);
        let success = series.labelled(
            "vllm:request_success_total",
            "Sequences that ended, by reason.",
            "finished_reason",
        );
        let rejections = "vllm:admission_rejections_total";
        Self {
            engine: EngineSeries::new(&series),
            tokens: TokenSeries::new(&series),
            sizes: SizeSeries::new(&series, labels.max_model_len),
            times: TimeSeries::new(&series),
            kv: KvSeries::new(&series),
            success: Finished::ALL.map(|reason| success.with_label_values(&[reason.label()])),
            rejections: series.counter(rejections, "Requests turned away because too many waited."),
            registry: series.registry,
        }
    }

    /// Counts one sequence that ended.
    pub(crate) fn finished(&self, reason: Finished) {
        self.success[reason as usize].inc();
    }

    /// The text of the exposition, with the transfer's own counters.
    pub(crate) fn text(
        &self,
        server: Option<&ServerStats>,
        client: Option<&ClientStats>,
    ) -> String {
        self.kv.refresh(server);
        let mut text = baton_metrics::text(&self.registry.gather());
        kv::write(&mut text, server, client);
        text
    }
}

impl EngineSeries {
    #[rustfmt::skip]
    fn new(s: &Series) -> Self {
        Self {
            running: s.gauge("vllm:num_requests_running", "Sequences in the running batch."),
            waiting: s.gauge("vllm:num_requests_waiting", "Sequences that wait for a place in the batch."),
            kv_usage: s.fraction("vllm:kv_cache_usage_perc", "Part of the KV blocks in use, 0 to 1."),
            prefix_queries: s.counter("vllm:prefix_cache_queries_total", "Tokens looked up in the prefix cache."),
            prefix_hits: s.counter("vllm:prefix_cache_hits_total", "Tokens found in the prefix cache."),
            external_queries: s.counter("vllm:external_prefix_cache_queries_total", "Tokens asked of another server."),
            external_hits: s.counter("vllm:external_prefix_cache_hits_total", "Tokens whose KV came from another server."),
            preemptions: s.counter("vllm:num_preemptions_total", "Sequences that gave their blocks up for others."),
            step_tokens: s.histogram("vllm:iteration_tokens_total", "Tokens of a step.", PER_STEP),
        }
    }
}

impl TokenSeries {
    #[rustfmt::skip]
    fn new(s: &Series) -> Self {
        let by_source = s.labelled("vllm:prompt_tokens_by_source_total", "Prompt tokens by where their KV came from.", "source");
        Self {
            by_source: Source::ALL.map(|source| by_source.with_label_values(&[source.label()])),
            prompt: s.counter("vllm:prompt_tokens_total", "Prompt tokens processed."),
            cached: s.counter("vllm:prompt_tokens_cached_total", "Prompt tokens that were not computed."),
            generated: s.counter("vllm:generation_tokens_total", "Tokens generated."),
        }
    }

    /// Counts prompt tokens whose KV came from there.
    pub(crate) fn prompt_from(&self, source: Source, n: u64) {
        self.by_source[source as usize].inc_by(n);
    }
}

impl SizeSeries {
    #[rustfmt::skip]
    fn new(s: &Series, max_model_len: u32) -> Self {
        let steps = one_two_five(max_model_len);
        Self {
            prompt: s.histogram("vllm:request_prompt_tokens", "Prompt tokens of a sequence.", &steps),
            generated: s.histogram("vllm:request_generation_tokens", "Generated tokens of a sequence.", &steps),
            max_tokens: s.histogram("vllm:request_params_max_tokens", "Most tokens that a sequence may generate.", &steps),
            n: s.histogram("vllm:request_params_n", "Completions asked for.", N),
        }
    }
}

impl TimeSeries {
    #[rustfmt::skip]
    fn new(s: &Series) -> Self {
        Self {
            to_first_token: s.histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", TTFT),
            between_tokens: s.histogram("vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", PER_TOKEN),
            per_output_token: s.histogram("vllm:request_time_per_output_token_seconds", "Mean time between a sequence's tokens.", PER_TOKEN),
            end_to_end: s.histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", PER_REQUEST),
            queue: s.histogram("vllm:request_queue_time_seconds", "From arrival to the engine.", PER_REQUEST),
            prefill: s.histogram("vllm:request_prefill_time_seconds", "From the engine to the first token.", PER_REQUEST),
            decode: s.histogram("vllm:request_decode_time_seconds", "From the first token to the last.", PER_REQUEST),
        }
    }
}

/// Registers series that carry vLLM's two labels.
struct Series {
    registry: Registry,
    model_name: String,
}

impl Series {
    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(name, help)
            .const_label("model_name", &self.model_name)
            .const_label("engine", "0")
    }

    fn register<C: Collector + Clone + 'static>(&self, made: prometheus::Result<C>) -> C {
        registered(&self.registry, made)
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::with_opts(self.opts(name, help)))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::with_opts(self.opts(name, help)))
    }

    fn fraction(&self, name: &str, help: &str) -> Gauge {
        self.register(Gauge::with_opts(self.opts(name, help)))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.register(Histogram::with_opts(
            self.histogram_opts(name, help, buckets),
        ))
    }

    fn histograms(&self, name: &str, help: &str, label: &str, buckets: &[f64]) -> HistogramVec {
        let opts = self.histogram_opts(name, help, buckets);
        self.register(HistogramVec::new(opts, &[label]))
    }

    fn histogram_opts(&self, name: &str, help: &str, buckets: &[f64]) -> HistogramOpts {
        HistogramOpts {
            common_opts: self.opts(name, help),
            buckets: buckets.to_vec(),
        }
    }

    fn labelled(&self, name: &str, help: &str, label: &str) -> IntCounterVec {
        self.register(IntCounterVec::new(self.opts(name, help), &[label]))
    }

    /// A series whose labels are its message.
    fn cache_config(&self, labels: &Labels<'_>) {
        let opts = Opts::new("vllm:cache_config_info", "Shape of the KV cache.")
            .const_label("engine", "0")
            .const_label("block_size", labels.block_size.to_string())
            .const_label("num_gpu_blocks", labels.n_blocks.to_string())
            .const_label("cache_dtype", labels.cache_dtype)
            .const_label("enable_prefix_caching", "True");
        self.register(IntGauge::with_opts(opts)).set(1);
    }
}

/// 1, 2, 5, 10, 20, 50 and so on, not beyond `max`.
fn one_two_five(max: u32) -> Vec<f64> {
    let decades = (0..9).map(|power| 10u32.pow(power));
    let steps = decades.flat_map(|decade| [1, 2, 5].map(|step| decade.saturating_mul(step)));
    steps
        .take_while(|&step| step <= max.max(1))
        .map(f64::from)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics() -> Metrics {
        Metrics::new(&Labels {
            model_name: "a \"model\"",
            max_model_len: 2048,
            block_size: 16,
            n_blocks: 728,
            cache_dtype: "bf16",
        })
    }

    #[test]
    fn what_schedulers_read_is_there_before_the_first_request() {
        let text = metrics().text(Some(&ServerStats::default()), Some(&ClientStats::default()));
        for expect in [
            r#"vllm:num_requests_running{engine="0",model_name="a \"model\""} 0"#,
            r#"vllm:num_requests_waiting{engine="0",model_name="a \"model\""} 0"#,
            r#"vllm:kv_cache_usage_perc{engine="0",model_name="a \"model\""} 0"#,
            r#"block_size="16",cache_dtype="bf16",enable_prefix_caching="True",engine="0",num_gpu_blocks="728"} 1"#,
            r#"vllm:request_success_total{engine="0",finished_reason="length",model_name="a \"model\""} 0"#,
            r#"vllm:prompt_tokens_by_source_total{engine="0",model_name="a \"model\"",source="external_kv_transfer"} 0"#,
            r#"kvx_leases{state="ready"} 0"#,
            r#"kvx_lease_bytes{tier="host"} 0"#,
            r#"kvx_transfer_bytes_total{dir="out",path="shm"} 0"#,
            r#"kvx_transfer_bytes_total{dir="in",path="tcp"} 0"#,
            r#"kvx_transfer_seconds_count{engine="0",model_name="a \"model\"",phase="total"} 0"#,
            r#"vllm:tpu_num_requests_being_pulled{engine="0",model_name="a \"model\""} 0"#,
        ] {
            assert!(text.contains(expect), "{expect} is missing in\n{text}");
        }
    }

    #[test]
    fn every_family_has_one_type_and_a_legal_name() {
        let metrics = metrics();
        metrics.times.between_tokens.observe(0.03);
        let text = metrics.text(Some(&ServerStats::default()), Some(&ClientStats::default()));
        let mut families: Vec<_> = text
            .lines()
            .filter_map(|l| l.strip_prefix("# TYPE "))
            .collect();
        let all = families.len();
        families.sort_unstable();
        families.dedup();
        assert_eq!(families.len(), all);
        for sample in text.lines().filter(|l| !l.starts_with('#')) {
            let name = sample.split(['{', ' ']).next().unwrap();
            assert!(
                name.bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b':'),
                "{sample}"
            );
            assert!(
                sample.rsplit(' ').next().unwrap().parse::<f64>().is_ok(),
                "{sample}"
            );
        }
    }

    #[test]
    fn buckets_of_tokens_are_a_one_two_five_series() {
        assert_eq!(one_two_five(100), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
        assert_eq!(one_two_five(0), [1.0]);
        assert!(one_two_five(u32::MAX).len() <= 30);
    }
}
