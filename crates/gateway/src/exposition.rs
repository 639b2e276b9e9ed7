//! Reads a model server's load out of Prometheus text. It looks for a few gauges and skips everything else, well formed
//! or not; no input makes it fail, and it allocates nothing.

/// What a server said of its load. A gauge that was not there is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Scraped {
    /// Requests that wait, all engines of the server together.
    pub(crate) waiting: Option<u32>,
    /// Requests that run.
    pub(crate) running: Option<u32>,
    /// Part of the fullest KV pool that is in use.
    pub(crate) kv_usage: Option<f32>,
    /// Tokens that its KV pools have room for.
    pub(crate) cache_tokens: Option<u64>,
}

/// Reads `text`.
pub(crate) fn read(text: &[u8]) -> Scraped {
    let mut scraped = Scraped::default();
    for line in text.split(|&b| b == b'\n') {
        let Some(Sample {
            name,
            labels,
            value,
        }) = sample(line)
        else {
            continue;
        };
        match name {
            b"vllm:num_requests_waiting" => add(&mut scraped.waiting, value),
            b"vllm:num_requests_running" => add(&mut scraped.running, value),
            // The second is what vLLM called it until 2025.
            b"vllm:kv_cache_usage_perc" | b"vllm:gpu_cache_usage_perc" => {
                let usage = value.clamp(0.0, 1.0) as f32;
                scraped.kv_usage = Some(scraped.kv_usage.map_or(usage, |u| u.max(usage)));
            }
            b"vllm:cache_config_info" => {
                let tokens = number(labels, b"num_gpu_blocks").zip(number(labels, b"block_size"));
                let tokens = tokens.map(|(blocks, size)| blocks.saturating_mul(size));
                scraped.cache_tokens = scraped.cache_tokens.max(tokens);
            }
            _ => {}
        }
    }
    scraped
}

/// Negative counts are none, huge ones saturate.
fn add(sum: &mut Option<u32>, value: f64) {
    *sum = Some(sum.unwrap_or(0).saturating_add(value as u32));
}

/// A line that carries a value.
struct Sample<'a> {
    name: &'a [u8],
    /// What is between the braces.
    labels: &'a [u8],
    value: f64,
}

/// Reads a sample line; nothing comes of comments, other lines, and values that are not finite.
fn sample(line: &[u8]) -> Option<Sample<'_>> {
    if !line.starts_with(b"vllm:") {
        return None;
    }
    let end = line.iter().position(|b| matches!(b, b'{' | b' ' | b'\t'))?;
    let (name, rest) = line.split_at(end);
    let (labels, rest) = match rest.strip_prefix(b"{") {
        Some(inside) => {
            let close = end_of_labels(inside)?;
            (&inside[..close], &inside[close + 1..])
        }
        None => (&[][..], rest),
    };
    let value: f64 = std::str::from_utf8(rest)
        .ok()?
        .split_ascii_whitespace()
        .next()?
        .parse()
        .ok()?;
    value.is_finite().then_some(Sample {
        name,
        labels,
        value,
    })
}

/// The number that the label `name` has. Only whole label names match, whatever the values before it hold.
fn number(labels: &[u8], name: &[u8]) -> Option<u64> {
    let mut rest = labels;
    loop {
        let equals = rest.iter().position(|&b| b == b'=')?;
        let label = rest[..equals].trim_ascii();
        let value = rest[equals + 1..].trim_ascii_start().strip_prefix(b"\"")?;
        let end = end_of_value(value)?;
        if label == name {
            return std::str::from_utf8(&value[..end]).ok()?.parse().ok();
        }
        rest = value[end + 1..].trim_ascii_start();
        rest = rest.strip_prefix(b",").unwrap_or(rest);
    }
}

/// Where the quote is that closes a label's value.
fn end_of_value(value: &[u8]) -> Option<usize> {
    let mut escaped = false;
    value.iter().position(|&b| {
        let closes = b == b'"' && !escaped;
        escaped = b == b'\\' && !escaped;
        closes
    })
}

/// Where the brace is that closes the labels; one inside a quoted value does not.
fn end_of_labels(labels: &[u8]) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    labels.iter().position(|&b| {
        let closes = b == b'}' && !quoted;
        if b == b'"' && !escaped {
            quoted = !quoted;
        }
        escaped = quoted && b == b'\\' && !escaped;
        closes
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_gauges_are_found_among_others() {
        let text = b"# HELP vllm:num_requests_waiting Waiting.\n# TYPE vllm:num_requests_waiting gauge\n\
            vllm:num_requests_waiting{engine=\"0\",model_name=\"a } b\\\" }\"} 3.0\n\
            vllm:num_requests_waiting_by_reason{reason=\"capacity\"} 9\n\
            vllm:num_requests_running 2 1700000000000\nvllm:kv_cache_usage_perc{} 2.5e-1\nother 5\n";
        assert_eq!(
            read(text),
            Scraped {
                waiting: Some(3),
                running: Some(2),
                kv_usage: Some(0.25),
                cache_tokens: None,
            }
        );
    }

    #[test]
    fn engines_of_one_server_are_added_and_the_fullest_pool_counts() {
        let text = b"vllm:num_requests_running{engine=\"0\"} 2\nvllm:num_requests_running{engine=\"1\"} 5\n\
            vllm:kv_cache_usage_perc{engine=\"0\"} 0.7\nvllm:kv_cache_usage_perc{engine=\"1\"} 0.1\n";
        assert_eq!(
            read(text),
            Scraped {
                waiting: None,
                running: Some(7),
                kv_usage: Some(0.7),
                cache_tokens: None,
            }
        );
    }

    #[test]
    fn the_size_of_the_cache_is_read_from_labels() {
        let cache = |labels: &str| {
            read(format!("vllm:cache_config_info{{{labels}}} 1.0\n").as_bytes()).cache_tokens
        };
        assert_eq!(
            cache(r#"block_size="16",x="a,\"num_gpu_blocks=\"9",num_gpu_blocks="728""#),
            Some(11_648)
        );
        assert_eq!(
            cache(r#"num_gpu_blocks="728", block_size = "16","#),
            Some(11_648)
        );
        assert_eq!(cache(r#"num_gpu_blocks="None",block_size="16""#), None);
        assert_eq!(cache(r#"my_block_size="16",num_gpu_blocks="7""#), None);
        assert_eq!(cache(r#"block_size=16,num_gpu_blocks="7""#), None);
        assert_eq!(
            cache(&format!(
                r#"block_size="{0}",num_gpu_blocks="{0}""#,
                u64::MAX
            )),
            Some(u64::MAX)
        );
    }

    #[test]
    fn hostile_text_is_skipped_or_clamped() {
        for text in [
            "vllm:num_requests_waiting NaN",
            "vllm:num_requests_waiting +Inf",
            "vllm:num_requests_waiting",
            "vllm:num_requests_waiting{",
            "vllm:num_requests_waiting{a=\"",
            "vllm:num_requests_waiting{a=\"} 3",
            "vllm:num_requests_waiting{a=\"b\"}",
            "vllm:num_requests_waiting x",
        ] {
            assert_eq!(read(text.as_bytes()), Scraped::default(), "{text}");
        }
        let text = b"vllm:num_requests_waiting 1e300\nvllm:num_requests_waiting 1e300\nvllm:num_requests_running -4\n\
            vllm:kv_cache_usage_perc -7\n\xff\xfe{\n";
        assert_eq!(
            read(text),
            Scraped {
                waiting: Some(u32::MAX),
                running: Some(0),
                kv_usage: Some(0.0),
                cache_tokens: None,
            }
        );
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(lines in prop::collection::vec("vllm:(num_requests_waiting|kv_cache_usage_perc|cache_config_info.block_size=)[{}\\\\\"a= 0-9.e-]{0,20}\n?", 0..8)) {
            let scraped = read(lines.concat().as_bytes());
            prop_assert!(scraped.kv_usage.is_none_or(|u| (0.0..=1.0).contains(&u)));
        }
    }
}
