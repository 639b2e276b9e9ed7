//! Figures under the names that upstream gave up, for dashboards that still ask for them.

use super::PREFIX;
use prometheus::proto::MetricFamily;

/// A name that took the place of another.
struct Renamed {
    new: &'static str,
    old: &'static str,
    /// A label that had another name too: now, and then.
    label: Option<(&'static str, &'static str)>,
}

const fn renamed(new: &'static str, old: &'static str) -> Renamed {
    Renamed {
        new,
        old,
        label: None,
    }
}

const NAMES: [Renamed; 42] = [
    renamed("request_total", "inference_objective_request_total"),
    renamed(
        "request_error_total",
        "inference_objective_request_error_total",
    ),
    renamed(
        "request_duration_seconds",
        "inference_objective_request_duration_seconds",
    ),
    renamed("request_size_bytes", "inference_objective_request_sizes"),
    renamed("response_size_bytes", "inference_objective_response_sizes"),
    renamed("request_input_tokens", "inference_objective_input_tokens"),
    renamed("request_output_tokens", "inference_objective_output_tokens"),
    renamed(
        "request_cached_tokens",
        "inference_objective_prompt_cached_tokens",
    ),
    renamed("request_running", "inference_objective_running_requests"),
    renamed(
        "request_ntpot_seconds",
        "inference_objective_normalized_time_per_output_token_seconds",
    ),
    renamed(
        "request_ttft_seconds",
        "inference_objective_request_ttft_seconds",
    ),
    renamed(
        "request_streaming_tpot_seconds",
        "inference_objective_request_tpot_seconds",
    ),
    renamed(
        "average_kv_cache_utilization",
        "inference_pool_average_kv_cache_utilization",
    ),
    renamed("average_queue_size", "inference_pool_average_queue_size"),
    renamed(
        "average_running_requests",
        "inference_pool_average_running_requests",
    ),
    renamed("ready_endpoints", "inference_pool_ready_pods"),
    Renamed {
        label: Some(("model_server_endpoint", "model_server_pod")),
        ..renamed(
            "per_endpoint_queue_size",
            "inference_pool_per_pod_queue_size",
        )
    },
    renamed(
        "scheduler_e2e_duration_seconds",
        "inference_extension_scheduler_e2e_duration_seconds",
    ),
    Renamed {
        label: Some(("endpoint_name", "pod_name")),
        ..renamed(
            "scheduler_attempts_total",
            "inference_extension_scheduler_attempts_total",
        )
    },
    renamed(
        "plugin_duration_seconds",
        "inference_extension_plugin_duration_seconds",
    ),
    renamed("info", "inference_extension_info"),
    renamed(
        "model_rewrite_decisions_total",
        "inference_extension_model_rewrite_decisions_total",
    ),
    renamed(
        "prefix_indexer_size",
        "inference_extension_prefix_indexer_size",
    ),
    renamed(
        "prefix_indexer_hit_ratio",
        "inference_extension_prefix_indexer_hit_ratio",
    ),
    renamed(
        "prefix_indexer_hit_bytes",
        "inference_extension_prefix_indexer_hit_bytes",
    ),
    renamed(
        "kv_cache_index_admissions_total",
        "kvcache_index_admissions_total",
    ),
    renamed(
        "kv_cache_index_evictions_total",
        "kvcache_index_evictions_total",
    ),
    renamed(
        "kv_cache_index_lookup_requests_total",
        "kvcache_index_lookup_requests_total",
    ),
    renamed(
        "kv_cache_index_lookup_hits_total",
        "kvcache_index_lookup_hits_total",
    ),
    renamed(
        "kv_cache_index_max_pod_hit_count_total",
        "kvcache_index_max_pod_hit_count_total",
    ),
    renamed(
        "kv_cache_index_lookup_latency_seconds",
        "kvcache_index_lookup_latency_seconds",
    ),
    renamed(
        "kv_cache_events_dedup_removed_hashes_suppressed_total",
        "kvcache_kvevents_dedup_removed_hashes_suppressed_total",
    ),
    renamed(
        "kv_cache_events_dedup_removed_hashes_forwarded_total",
        "kvcache_kvevents_dedup_removed_hashes_forwarded_total",
    ),
    renamed(
        "disagg_decision_total",
        "llm_d_inference_scheduler_disagg_decision_total",
    ),
    renamed(
        "pd_decision_total",
        "llm_d_inference_scheduler_pd_decision_total",
    ),
    renamed(
        "datalayer_poll_errors_total",
        "llm_d_inference_scheduler_datalayer_poll_errors_total",
    ),
    renamed(
        "flow_control_request_queue_duration_seconds",
        "inference_extension_flow_control_request_queue_duration_seconds",
    ),
    renamed(
        "flow_control_request_enqueue_duration_seconds",
        "inference_extension_flow_control_request_enqueue_duration_seconds",
    ),
    renamed(
        "flow_control_dispatch_cycle_duration_seconds",
        "inference_extension_flow_control_dispatch_cycle_duration_seconds",
    ),
    renamed(
        "flow_control_queue_size",
        "inference_extension_flow_control_queue_size",
    ),
    renamed(
        "flow_control_queue_bytes",
        "inference_extension_flow_control_queue_bytes",
    ),
    renamed(
        "flow_control_pool_saturation",
        "inference_extension_flow_control_pool_saturation",
    ),
];

/// The same figures under the name that they had before.
pub(super) fn twin(family: &MetricFamily) -> Option<MetricFamily> {
    let name = family.name().strip_prefix(PREFIX)?;
    let renamed = NAMES.iter().find(|renamed| renamed.new == name)?;
    let mut twin = family.clone();
    twin.set_name(renamed.old.to_owned());
    if let Some((new, old)) = renamed.label {
        let labels = twin.mut_metric().iter_mut().flat_map(|m| m.mut_label());
        for label in labels.filter(|label| label.name() == new) {
            label.set_name(old.to_owned());
        }
    }
    Some(twin)
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::core::Collector as _;
    use prometheus::{IntGaugeVec, Opts};

    #[test]
    fn old_names_carry_the_same_figures_under_their_own_labels() {
        let opts = Opts::new("llm_d_epp_per_endpoint_queue_size", "x");
        let sizes = IntGaugeVec::new(opts, &["name", "model_server_endpoint"]).unwrap();
        sizes.with_label_values(&["p", "ns/a"]).set(7);
        let twin = twin(&sizes.collect()[0]).unwrap();
        assert_eq!(
            baton_metrics::text(&[twin]).lines().last(),
            Some(r#"inference_pool_per_pod_queue_size{model_server_pod="ns/a",name="p"} 7"#)
        );
    }

    #[test]
    fn what_never_had_another_name_has_none() {
        let opts = Opts::new("llm_d_epp_std_dev_queue_size", "x");
        let family = IntGaugeVec::new(opts, &["name"]).unwrap();
        family.with_label_values(&["p"]).set(1);
        assert!(twin(&family.collect()[0]).is_none());
    }
}
