//! Reads a model server's load out of Prometheus text. It looks for four gauges and skips everything else, well formed
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
}

/// Reads `text`.
pub(crate) fn read(text: &[u8]) -> Scraped {
    let mut scraped = Scraped::default();
    for line in text.split(|&b| b == b'\n') {
        let Some((name, value)) = sample(line) else {
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
            _ => {}
        }
    }
    scraped
}

/// Negative counts are none, huge ones saturate.
fn add(sum: &mut Option<u32>, value: f64) {
    *sum = Some(sum.unwrap_or(0).saturating_add(value as u32));
}

/// Name and value of a sample line; nothing for comments, other lines, and values that are not finite.
fn sample(line: &[u8]) -> Option<(&[u8], f64)> {
    if !line.starts_with(b"vllm:") {
        return None;
    }
    let end = line.iter().position(|b| matches!(b, b'{' | b' ' | b'\t'))?;
    let (name, rest) = line.split_at(end);
    let rest = if rest.first() == Some(&b'{') {
        after_labels(&rest[1..])?
    } else {
        rest
    };
    let value = std::str::from_utf8(rest)
        .ok()?
        .split_ascii_whitespace()
        .next()?;
    value
        .parse()
        .ok()
        .filter(|v: &f64| v.is_finite())
        .map(|v| (name, v))
}

/// What follows the brace that closes the labels; one inside a quoted value does not.
fn after_labels(labels: &[u8]) -> Option<&[u8]> {
    let (mut quoted, mut escaped) = (false, false);
    for (i, &b) in labels.iter().enumerate() {
        match b {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'}' if !quoted => return Some(&labels[i + 1..]),
            _ => {}
        }
    }
    None
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
                kv_usage: Some(0.25)
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
                kv_usage: Some(0.7)
            }
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
                kv_usage: Some(0.0)
            }
        );
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(lines in prop::collection::vec("vllm:(num_requests_waiting|kv_cache_usage_perc)[{}\\\\\"a= 0-9.e-]{0,20}\n?", 0..8)) {
            let scraped = read(lines.concat().as_bytes());
            prop_assert!(scraped.kv_usage.is_none_or(|u| (0.0..=1.0).contains(&u)));
        }
    }
}
