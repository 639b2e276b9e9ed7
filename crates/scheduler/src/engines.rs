//! What model servers call the numbers that the scheduler wants, engine by engine.

use serde::{Deserialize, Serialize};

/// A series in a Prometheus text: its name, and labels that it must have.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MetricSpec {
    /// The name.
    pub name: Box<str>,
    /// Labels with the values they must have; empty for any.
    pub labels: Vec<(Box<str>, Box<str>)>,
}

/// How an engine says how large its KV cache is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum CacheInfo {
    /// In labels of one series.
    Labels {
        /// The series.
        series: MetricSpec,
        /// The label with the tokens of a block.
        block_size: Box<str>,
        /// The label with the number of blocks.
        num_blocks: Box<str>,
    },
    /// In the values of two series.
    Values {
        /// Tokens of a block.
        block_size: MetricSpec,
        /// Number of blocks.
        num_blocks: MetricSpec,
    },
}

/// The metrics of one engine; what is `None` it does not export.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EngineMetrics {
    /// The engine's name, as the label `llm-d.ai/engine-type` has it.
    pub name: Box<str>,
    /// Requests that wait.
    pub queued: Option<MetricSpec>,
    /// Requests that run.
    pub running: Option<MetricSpec>,
    /// Part of the KV pool in use, 0 to 1.
    pub kv_usage: Option<MetricSpec>,
    /// LoRA adapters, in the labels `running_lora_adapters`, `waiting_lora_adapters` (lists with commas) and `max_lora`;
    /// the value is the time of writing, so that the series with the greatest counts.
    pub lora: Option<MetricSpec>,
    /// How large the cache is.
    pub cache: Option<CacheInfo>,
}

impl MetricSpec {
    /// A series by its name alone.
    #[must_use]
    pub fn named(name: &str) -> Self {
        Self {
            name: name.into(),
            labels: Vec::new(),
        }
    }

    /// Reads a vector selector with nothing but `=` in its braces, such as `requests{type="waiting"}`; quotes may be
    /// left out.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let text = text.trim();
        let (name, rest) = text
            .split_once('{')
            .map_or((text, None), |(n, r)| (n, Some(r)));
        let name = name.trim();
        let is_name = |s: &str| {
            !s.is_empty()
                && !s.starts_with(|c: char| c.is_ascii_digit())
                && s.chars()
                    .all(|c| c.is_ascii_alphanumeric() || "_:".contains(c))
        };
        if !is_name(name) {
            return Err("a metric's name has letters, digits, _ and :");
        }
        let Some(rest) = rest else {
            return Ok(Self::named(name));
        };
        let matchers = rest.strip_suffix('}').ok_or("no } at the end")?;
        let labels = matchers
            .split(',')
            .filter(|m| !m.trim().is_empty())
            .map(|matcher| {
                let (key, value) = matcher.split_once('=').ok_or("a label needs =")?;
                let (key, value) = (key.trim(), value.trim());
                if !is_name(key) || value.starts_with('~') {
                    return Err("only label=value can be asked for");
                }
                Ok((key.into(), unquoted(value)?.into()))
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            name: name.into(),
            labels,
        })
    }

    /// As it was read.
    #[must_use]
    pub fn text(&self) -> String {
        if self.labels.is_empty() {
            return self.name.to_string();
        }
        let labels: Vec<String> = (self.labels.iter())
            .map(|(k, v)| format!("{k}=\"{v}\""))
            .collect();
        format!("{}{{{}}}", self.name, labels.join(","))
    }
}

fn unquoted(value: &str) -> Result<&str, &'static str> {
    let Some(open) = value.chars().next().filter(|c| "\"'".contains(*c)) else {
        return Ok(value);
    };
    let inner = value[1..]
        .strip_suffix(open)
        .ok_or("a quote is not closed")?;
    if inner.contains(['"', '\'', '\\']) {
        return Err("quotes and backslashes in values cannot be asked for");
    }
    Ok(inner)
}

/// vLLM's names, which our own server has too.
const VLLM: [&str; 4] = [
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:lora_requests_info",
];
const VLLM_CACHE: [&str; 3] = ["vllm:cache_config_info", "block_size", "num_gpu_blocks"];

/// Engines, what they call the numbers (waiting, running, KV usage, adapters), and where the size of the cache is: three
/// words are a series and two labels, two are two series.
const KNOWN: [(&str, [&str; 4], &[&str]); 6] = [
    ("vllm", VLLM, &VLLM_CACHE),
    ("baton", VLLM, &VLLM_CACHE),
    (
        "sglang",
        [
            "sglang:num_queue_reqs",
            "sglang:num_running_reqs",
            "sglang:token_usage",
            "",
        ],
        &["sglang:cache_config_info", "page_size", "num_pages"],
    ),
    (
        "trtllm-serve",
        [
            "trtllm_num_requests_waiting",
            "trtllm_num_requests_running",
            "trtllm_kv_cache_utilization",
            "",
        ],
        &[
            "trtllm_kv_cache_tokens_per_block",
            "trtllm_kv_cache_max_blocks",
        ],
    ),
    (
        "triton-tensorrt-llm",
        [
            "nv_trt_llm_request_metrics{request_type=waiting}",
            "nv_trt_llm_request_metrics{request_type=scheduled}",
            "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=fraction}",
            "",
        ],
        &[
            "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=tokens_per}",
            "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=max}",
        ],
    ),
    (
        "triton",
        [
            "nv_inference_pending_request_count",
            "nv_inference_exec_count",
            "",
            "",
        ],
        &[],
    ),
];

impl EngineMetrics {
    /// The engines that are known without being told: vLLM (and our own server, which exports its names), SGLang,
    /// TensorRT-LLM alone and under Triton, and Triton.
    #[must_use]
    pub fn known() -> Vec<Self> {
        KNOWN.iter().map(Self::of).collect()
    }

    fn of((name, series, cache): &(&str, [&str; 4], &[&str])) -> Self {
        let [queued, running, kv_usage, lora] = series.map(|s| MetricSpec::parse(s).ok());
        let cache = match cache {
            [series, block_size, num_blocks] => Some(CacheInfo::Labels {
                series: MetricSpec::named(series),
                block_size: (*block_size).into(),
                num_blocks: (*num_blocks).into(),
            }),
            [block_size, num_blocks] => MetricSpec::parse(block_size).ok().and_then(|block_size| {
                Some(CacheInfo::Values {
                    block_size,
                    num_blocks: MetricSpec::parse(num_blocks).ok()?,
                })
            }),
            _ => None,
        };
        Self {
            name: (*name).into(),
            queued,
            running,
            kv_usage,
            lora,
            cache,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_is_a_name_and_equal_signs() {
        let cases = [
            ("vllm:num_requests_waiting", "vllm:num_requests_waiting"),
            ("a{b=c}", "a{b=\"c\"}"),
            (" a { b = \"c\" , d='e',} ", "a{b=\"c\",d=\"e\"}"),
            ("a{}", "a"),
        ];
        for (text, expected) in cases {
            let spec = MetricSpec::parse(text).unwrap();
            assert_eq!(spec.text(), expected);
            assert_eq!(MetricSpec::parse(&spec.text()), Ok(spec));
        }
        for text in [
            "", "{a=b}", "1a", "a{b", "a{b~=c}", "a{b=~c}", "a{b!=c}", "a{b=\"c}", "a b", "a{b}",
        ] {
            assert!(MetricSpec::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn every_known_engine_says_how_many_wait() {
        let known = EngineMetrics::known();
        assert_eq!(known.len(), 6);
        assert!(
            known
                .iter()
                .all(|e| e.queued.is_some() && e.running.is_some())
        );
        assert_eq!(known.iter().filter(|e| e.cache.is_some()).count(), 5);
    }
}
