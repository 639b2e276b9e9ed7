//! Flags about the model servers' metrics. llm-d's later pickers want them in the configuration; charts still pass them.

use baton_scheduler::config::DataLayer;
use baton_scheduler::engines::{CacheInfo, MetricSpec};
use clap::{ArgAction, Args};
use std::convert::Infallible;

/// A series as charts name it: in quotes that no shell took away, or empty where an engine has no such series.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Series(Option<MetricSpec>);

impl Series {
    fn parse(text: &str) -> Result<Self, &'static str> {
        let bare = bare(text);
        let named = (!bare.is_empty()).then(|| MetricSpec::parse(bare));
        Ok(Self(named.transpose()?))
    }
}

/// Without the quotes around it.
fn bare(text: &str) -> &str {
    let inner = text.strip_prefix('"').and_then(|t| t.strip_suffix('"'));
    inner.unwrap_or(text)
}

fn path(text: &str) -> Result<String, Infallible> {
    Ok(bare(text).to_owned())
}

/// Where servers have their metrics, and what the engine of servers without a label calls them.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Metrics of the servers (better said in the configuration)")]
pub struct ServerFlags {
    /// Port of the metrics, if it is not the endpoint's; 0 for the endpoint's.
    #[arg(long, value_name = "PORT")]
    pub model_server_metrics_port: Option<u16>,
    /// Path of the metrics.
    #[arg(long, value_name = "PATH", value_parser = path)]
    pub model_server_metrics_path: Option<String>,
    /// How they are asked for: http or https.
    #[arg(long, value_name = "SCHEME", value_parser = ["http", "https"])]
    pub model_server_metrics_scheme: Option<String>,
    /// With https: take any certificate. Default: true.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = ArgAction::Set)]
    pub model_server_metrics_https_insecure_skip_verify: Option<bool>,
    /// Requests that wait, such as vllm:num_requests_waiting.
    #[arg(long, value_name = "SERIES", value_parser = Series::parse)]
    pub total_queued_requests_metric: Option<Series>,
    /// Requests that run.
    #[arg(long, value_name = "SERIES", value_parser = Series::parse)]
    pub total_running_requests_metric: Option<Series>,
    /// Part of the KV pool in use.
    #[arg(long, value_name = "SERIES", value_parser = Series::parse)]
    pub kv_cache_usage_percentage_metric: Option<Series>,
    /// LoRA adapters, in labels.
    #[arg(long, value_name = "SERIES", value_parser = Series::parse)]
    pub lora_info_metric: Option<Series>,
    /// How large the KV pool is, in labels.
    #[arg(long, value_name = "SERIES", value_parser = Series::parse)]
    pub cache_info_metric: Option<Series>,
}

impl ServerFlags {
    /// Puts what was said over what the configuration says.
    pub(crate) fn apply(self, data: &mut DataLayer) {
        let metrics = &mut data.metrics;
        if let Some(port) = self.model_server_metrics_port {
            metrics.port = (port != 0).then_some(port);
        }
        if let Some(path) = self.model_server_metrics_path {
            metrics.path = path.into();
        }
        if let Some(scheme) = self.model_server_metrics_scheme {
            metrics.https = scheme == "https";
        }
        if let Some(skip) = self.model_server_metrics_https_insecure_skip_verify {
            metrics.insecure_skip_verify = skip;
        }
        let default = &data.engines.default;
        let Some(engine) = data.engines.known.iter_mut().find(|e| e.name == *default) else {
            return;
        };
        let series = [
            (&mut engine.queued, self.total_queued_requests_metric),
            (&mut engine.running, self.total_running_requests_metric),
            (&mut engine.kv_usage, self.kv_cache_usage_percentage_metric),
            (&mut engine.lora, self.lora_info_metric),
        ];
        for (known, said) in series {
            if let Some(Series(said)) = said {
                *known = said;
            }
        }
        match (self.cache_info_metric, &mut engine.cache) {
            (Some(Series(Some(said))), Some(CacheInfo::Labels { series, .. })) => *series = said,
            (Some(Series(None)), cache) => *cache = None,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_scheduler::config;

    #[test]
    fn what_is_said_counts_and_the_rest_stays() {
        let mut data = config::load(&config::default_config()).unwrap().data;
        let before = data.clone();
        ServerFlags::default().apply(&mut data);
        assert_eq!(data, before);
        ServerFlags {
            model_server_metrics_port: Some(9100),
            model_server_metrics_scheme: Some("https".to_owned()),
            model_server_metrics_https_insecure_skip_verify: Some(false),
            total_queued_requests_metric: Series::parse("sglang:num_queue_reqs").ok(),
            cache_info_metric: Series::parse("my:cache").ok(),
            ..ServerFlags::default()
        }
        .apply(&mut data);
        assert_eq!((data.metrics.port, data.metrics.https), (Some(9100), true));
        assert!(!data.metrics.insecure_skip_verify);
        let vllm = |data: &DataLayer| {
            let mut all = data.engines.known.iter();
            all.find(|e| &*e.name == "vllm").unwrap().clone()
        };
        let (now, then) = (vllm(&data), vllm(&before));
        assert_eq!(&*now.queued.unwrap().name, "sglang:num_queue_reqs");
        assert_eq!((now.running, now.kv_usage), (then.running, then.kv_usage));
        let Some(CacheInfo::Labels { series, .. }) = now.cache else {
            panic!("vLLM tells its cache in labels");
        };
        assert_eq!(&*series.name, "my:cache");
    }

    /// As the charts of the Gateway API Inference Extension pass them for engines other than vLLM.
    #[test]
    fn what_charts_pass_is_understood() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            flags: ServerFlags,
        }
        let line = <Line as clap::Parser>::try_parse_from([
            "epp",
            "--total-queued-requests-metric=\"trtllm_num_requests_waiting\"",
            "--total-running-requests-metric",
            "nv_trt_llm_request_metrics{request_type=scheduled}",
            "--model-server-metrics-path=\"/prometheus/metrics\"",
            "--lora-info-metric",
            "",
        ]);
        let mut data = config::load(&config::default_config()).unwrap().data;
        line.map_err(|e| e.to_string())
            .unwrap()
            .flags
            .apply(&mut data);
        let engine = data
            .engines
            .known
            .iter()
            .find(|e| &*e.name == "vllm")
            .unwrap();
        assert_eq!(
            &*engine.queued.as_ref().unwrap().name,
            "trtllm_num_requests_waiting"
        );
        assert_eq!(engine.running.as_ref().unwrap().labels.len(), 1);
        assert_eq!(engine.lora, None);
        assert_eq!(&*data.metrics.path, "/prometheus/metrics");
    }
}
