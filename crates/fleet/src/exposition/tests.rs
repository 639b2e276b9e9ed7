//! What is found in a page, what is skipped, and that neither depends on how the page was cut.

use super::*;
use proptest::prelude::*;

fn wanted(engine: &str) -> Wanted {
    let known = EngineMetrics::known();
    Wanted::new(known.iter().find(|e| *e.name == *engine).unwrap())
}

fn read_as(engine: &str, text: &[u8]) -> Scraped {
    let (mut reader, wanted) = (Reader::default(), wanted(engine));
    reader.push(&wanted, text);
    reader.finish(&wanted)
}

fn read(text: &[u8]) -> Scraped {
    read_as("vllm", text)
}

fn load(waiting: Option<u32>, running: Option<u32>, kv_usage: Option<f32>) -> Scraped {
    Scraped {
        waiting,
        running,
        kv_usage,
        ..Scraped::default()
    }
}

#[test]
fn the_gauges_are_found_among_others() {
    let text =
        b"# HELP vllm:num_requests_waiting Waiting.\n# TYPE vllm:num_requests_waiting gauge\n\
        vllm:num_requests_waiting{engine=\"0\",model_name=\"a } b\\\" }\"} 3.0\n\
        vllm:num_requests_waiting_by_reason{reason=\"capacity\"} 9\n\
        vllm:num_requests_running 2 1700000000000\nvllm:kv_cache_usage_perc{} 2.5e-1\nother 5\n";
    assert_eq!(read(text), load(Some(3), Some(2), Some(0.25)));
    assert_eq!(
        read(b"vllm:num_requests_running\t2"),
        load(None, Some(2), None)
    );
}

#[test]
fn engines_of_one_server_are_added_and_the_fullest_pool_counts() {
    let text =
        b"vllm:num_requests_running{engine=\"0\"} 2\nvllm:num_requests_running{engine=\"1\"} 5\n\
        vllm:kv_cache_usage_perc{engine=\"0\"} 0.7\nvllm:kv_cache_usage_perc{engine=\"1\"} 0.1\n";
    assert_eq!(read(text), load(None, Some(7), Some(0.7)));
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
    let huge = format!(r#"block_size="{0}",num_gpu_blocks="{0}""#, u64::MAX);
    assert_eq!(cache(&huge), Some(u64::MAX));
}

#[test]
fn every_engine_is_understood_in_its_own_words() {
    let sglang = "sglang:num_queue_reqs{a=\"b\"} 1\nsglang:num_running_reqs 2\nsglang:token_usage 0.5\n\
        sglang:cache_config_info{page_size=\"4\",num_pages=\"10\"} 1\n";
    let trtllm = "trtllm_num_requests_waiting 1\ntrtllm_num_requests_running 2\ntrtllm_kv_cache_utilization 0.5\n\
        trtllm_kv_cache_tokens_per_block 4\ntrtllm_kv_cache_max_blocks 10\n";
    let triton = "nv_trt_llm_request_metrics{model=\"m\",request_type=\"waiting\",v=\"1\"} 1\n\
        nv_trt_llm_request_metrics{request_type=\"scheduled\"} 2\nnv_trt_llm_request_metrics{request_type=\"max\"} 99\n\
        nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"fraction\"} 0.5\n\
        nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"tokens_per\"} 4\n\
        nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"max\"} 10\n";
    let expected = Scraped {
        block_size: Some(4),
        cache_tokens: Some(40),
        ..load(Some(1), Some(2), Some(0.5))
    };
    let texts = [
        ("sglang", sglang),
        ("trtllm-serve", trtllm),
        ("triton-tensorrt-llm", triton),
    ];
    for (engine, text) in texts {
        assert_eq!(read_as(engine, text.as_bytes()), expected, "{engine}");
        assert_eq!(read(text.as_bytes()), Scraped::default(), "{engine}");
    }
    let plain = b"nv_inference_pending_request_count 3\nnv_inference_exec_count 4\n";
    assert_eq!(read_as("triton", plain), load(Some(3), Some(4), None));
    let restarted = read_as("baton", b"process_start_time_seconds 1.5e9\n");
    assert_eq!(restarted.started, Some(1.5e9));
}

#[test]
fn the_newest_word_on_adapters_counts() {
    let text = b"vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"a\",waiting_lora_adapters=\"\"} 5\n\
        vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"b, c\",waiting_lora_adapters=\"d\"} 7\n\
        vllm:lora_requests_info{max_lora=\"4\",running_lora_adapters=\"e\",waiting_lora_adapters=\"\"} 6\n";
    let (mut reader, wanted) = (Reader::default(), wanted("vllm"));
    reader.push(&wanted, text);
    reader.finish(&wanted);
    let expected = Adapters {
        running: vec!["b".into(), "c".into()],
        waiting: vec!["d".into()],
        most: 4,
    };
    assert_eq!(adapters(reader.lora_labels().unwrap(), 8), expected);
    assert_eq!(adapters(reader.lora_labels().unwrap(), 1).running.len(), 1);
    reader.clear();
    reader.finish(&wanted);
    assert_eq!(reader.lora_labels(), None);
    assert_eq!(
        adapters(b"max_lora=\"-\",running_lora_adapters=", 8),
        Adapters::default()
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
    assert_eq!(read(text), load(Some(u32::MAX), Some(0), Some(0.0)));
}

#[test]
fn a_line_without_end_is_not_kept() {
    let (mut reader, wanted) = (Reader::default(), wanted("vllm"));
    for _ in 0..100 {
        reader.push(&wanted, &[b'x'; 10_000]);
        assert!(reader.line.capacity() <= 2 * MAX_LINE);
    }
    reader.push(&wanted, b" 3\nvllm:num_requests_waiting 1");
    assert_eq!(reader.finish(&wanted), load(Some(1), None, None));
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(lines in prop::collection::vec("vllm:(num_requests_waiting|kv_cache_usage_perc|cache_config_info.block_size=)[{}\\\\\"a= 0-9.e-]{0,20}\n?", 0..8)) {
        let scraped = read(lines.concat().as_bytes());
        prop_assert!(scraped.kv_usage.is_none_or(|u| (0.0..=1.0).contains(&u)));
    }

    #[test]
    fn how_a_text_is_cut_does_not_matter(
        lines in prop::collection::vec("(# x|vllm:num_requests_(waiting|running)(.a=\"[{}\\\\]b\".)? ?[0-9]{1,3})\n", 0..8),
        cuts in prop::collection::vec(0usize..40, 0..20)
    ) {
        let text = lines.concat();
        let wanted = wanted("vllm");
        let mut reader = Reader::default();
        let mut rest = text.as_bytes();
        for cut in cuts {
            let (piece, after) = rest.split_at(cut.min(rest.len()));
            reader.push(&wanted, piece);
            rest = after;
        }
        reader.push(&wanted, rest);
        prop_assert_eq!(reader.finish(&wanted), read(text.as_bytes()));
    }
}
