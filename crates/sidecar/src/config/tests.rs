//! Flags as charts send them, and what they mean.

use super::*;
use crate::settings::Ignored;
use clap::Parser;

#[derive(Parser)]
#[command(no_binary_name = true)]
struct Line {
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    ignored: Ignored,
}

fn parse(line: &str) -> Line {
    Line::try_parse_from(line.split_whitespace()).unwrap()
}

fn resolved(line: &str) -> Result<Resolved, ConfigError> {
    parse(line).settings.resolve()
}

fn config(line: &str) -> Config {
    resolved(line).unwrap().config
}

fn error(line: &str) -> String {
    resolved(line).unwrap_err().to_string()
}

#[test]
fn the_guides_flags_mean_what_they_mean_upstream() {
    let line = "--port=8000 --vllm-port=8200 --connector=nixlv2 -v=5 --secure-proxy=false --zap-encoder=json --zap-log-level debug --zap-devel";
    let given = parse(line);
    assert_eq!(
        given.ignored.given().collect::<Vec<_>>(),
        ["-v", "--zap-devel", "--zap-encoder", "--zap-log-level"]
    );
    let Resolved { config, warnings } = given.settings.resolve().unwrap();
    assert_eq!(
        (config.port, config.decode_port, config.serve_tls),
        (8000, 8200, None)
    );
    assert_eq!(config.connector, Connector::Nixlv2);
    assert_eq!(
        warnings,
        [
            "--vllm-port is deprecated; use --model-server-port",
            "--connector is deprecated; use --kv-connector"
        ]
    );
}

#[test]
fn defaults_are_those_of_llm_d_where_it_has_them() {
    let config = config("");
    assert_eq!(
        (config.port, config.decode_port, config.ranks),
        (8000, 8200, 1)
    );
    assert_eq!(config.serve_tls, Some(Certificate::SelfSigned));
    assert_eq!(config.policy.fallback, Fallback::Decode);
    assert_eq!(
        (config.policy.retries, config.policy.pause),
        (0, Duration::from_millis(200))
    );
    assert_eq!((config.max_idle, config.metrics_port), (1024, None));
    assert_eq!(
        (config.sglang_port, config.mooncake_port, config.p2p_port),
        (8998, 8998, 7777)
    );
    assert_eq!(config.allow, Allowed::Anyone);
}

#[test]
fn flags_take_both_forms_lists_and_repeats() {
    let config = config(
        "--port 9000 --enable-tls prefiller,decoder --tls-insecure-skip-verify=decoder --enable-prefiller-sampling --data-parallel-size=2",
    );
    assert_eq!(
        (config.port, config.ranks, config.sampling),
        (9000, 2, true)
    );
    assert_eq!(
        (config.prefill_tls, config.decode_tls),
        (StageTls::Verified, StageTls::Unverified)
    );
    let old = self::config("--prefiller-use-tls=true --prefiller-tls-insecure-skip-verify");
    assert_eq!(
        (old.prefill_tls, old.decode_tls),
        (StageTls::Unverified, StageTls::Plain)
    );
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    for (line, words) in [
        (
            "--kv-connector=nixl",
            "--kv-connector=nixl is not supported; supported: nixlv2, shared-storage, sglang, mooncake, offloading",
        ),
        ("--kv-connector=lmcache", "--kv-connector=lmcache"),
        ("--connector=lmcache", "--connector=lmcache"),
        ("--ec-connector=ec-example", "--ec-connector=ec-example"),
        (
            "--decode-chunk-size=-1",
            "--decode-chunk-size=-1 is out of range",
        ),
        (
            "--decode-chunk-size=8",
            "--decode-chunk-size=8 is not supported",
        ),
        ("--data-parallel-size=0", "--data-parallel-size=0"),
        ("--port=65535 --data-parallel-size=2", "--port=65535"),
        ("--model-server-port=0", "--model-server-port=0"),
        (
            "--prefill-max-retries=1 --prefill-retry-backoff=0",
            "--prefill-retry-backoff",
        ),
        (
            "--prefill-retry-backoff=soon",
            "--prefill-retry-backoff=soon is no duration",
        ),
        ("--prefill-fallback=maybe", "--prefill-fallback=maybe"),
        ("--enable-tls=everything", "--enable-tls=everything"),
        ("--pool-group=example.org", "--pool-group=example.org"),
        ("--enable-ssrf-protection", "--enable-ssrf-protection needs"),
        (
            "--enable-p2p-pull --kv-connector=offloading",
            "--enable-p2p-pull cannot be used with --kv-connector=offloading",
        ),
    ] {
        assert!(error(line).contains(words), "{line}: {}", error(line));
    }
    assert!(Line::try_parse_from(["--moriio-write-mode=true"]).is_err());
    assert!(Line::try_parse_from(["--port=web"]).is_err());
}

#[test]
fn a_pool_is_named_in_several_ways() {
    for (line, expect) in [
        ("--inference-pool=ns/p", ("ns", "p", PoolVersion::V1)),
        ("--inference-pool=p", ("default", "p", PoolVersion::V1)),
        (
            "--inference-pool-namespace=ns --inference-pool-name=p",
            ("ns", "p", PoolVersion::V1),
        ),
        (
            "--inference-pool=ns/p --pool-group=inference.networking.x-k8s.io",
            ("ns", "p", PoolVersion::V1Alpha2),
        ),
    ] {
        let Allowed::Pool(pool, None) = config(&format!("--enable-ssrf-protection {line}")).allow
        else {
            panic!("{line}");
        };
        assert_eq!(
            (&*pool.namespace, &*pool.name, pool.version),
            expect,
            "{line}"
        );
    }
    assert!(error("--enable-ssrf-protection --inference-pool=a/../b").contains("needs"));
    assert_eq!(config("--inference-pool=p").allow, Allowed::Anyone);
}

#[test]
fn a_negative_number_of_retries_means_none() {
    assert_eq!(config("--prefill-max-retries=-3").policy.retries, 0);
}

#[test]
fn the_command_line_goes_over_the_file_and_the_file_over_the_environment() {
    let env = Settings::from_env(|name| match name {
        "SGLANG_BOOTSTRAP_PORT" => Some("1".to_owned()),
        "MOONCAKE_BOOTSTRAP_PORT" => Some("2".to_owned()),
        "P2P_CONNECTOR_PORT" => Some("three".to_owned()),
        "POD_IP" => Some("10.0.0.9".to_owned()),
        "ENABLE_PREFILLER_SAMPLING" => Some("true".to_owned()),
        _ => None,
    });
    let file: Settings = serde_json::from_str(
        r#"{"port":7000,"mooncake-bootstrap-port":22,"kv-connector":"sglang","data-parallel-size":0}"#,
    )
    .unwrap();
    let line = parse("--port=9000").settings;
    let config = line
        .over(file.without_zeros())
        .over(env)
        .resolve()
        .unwrap()
        .config;
    assert_eq!(
        (config.port, config.sglang_port, config.mooncake_port),
        (9000, 1, 22)
    );
    assert_eq!(
        (config.p2p_port, config.ranks, config.sampling),
        (7777, 1, true)
    );
    assert_eq!(config.connector, Connector::Sglang);
    assert_eq!(config.pod_ip.as_deref(), Some("10.0.0.9"));
    assert!(serde_json::from_str::<Settings>(r#"{"prot":1}"#).is_err());
}

#[test]
fn a_former_name_goes_over_the_present_one_in_a_lower_layer() {
    let file: Settings = serde_json::from_str(
        r#"{"model-server-port":8300,"kv-connector":"sglang","inference-pool":"ns/old"}"#,
    )
    .unwrap();
    let over = |line: &str| {
        parse(line)
            .settings
            .over(file.clone())
            .resolve()
            .unwrap()
            .config
    };
    let former = over("--vllm-port=8400 --connector=nixlv2");
    assert_eq!(
        (former.decode_port, former.connector),
        (8400, Connector::Nixlv2)
    );
    let both = over("--vllm-port=8400 --model-server-port=8500");
    assert_eq!(
        (both.decode_port, both.connector),
        (8500, Connector::Sglang)
    );
    let Allowed::Pool(pool, _) = over("--enable-ssrf-protection --inference-pool-name=new").allow
    else {
        panic!("no pool");
    };
    assert_eq!((&*pool.namespace, &*pool.name), ("default", "new"));
}

#[test]
fn truth_is_spelt_as_in_go() {
    for yes in ["", "=true", "=True", "=1", "=t"] {
        let line = format!("--secure-proxy{yes}");
        assert_eq!(
            config(&line).serve_tls,
            Some(Certificate::SelfSigned),
            "{line}"
        );
    }
    for no in ["false", "False", "FALSE", "0", "f"] {
        assert_eq!(
            config(&format!("--secure-proxy={no}")).serve_tls,
            None,
            "{no}"
        );
    }
    assert!(Line::try_parse_from(["--secure-proxy=no"]).is_err());
}

#[test]
fn the_environment_names_the_port_of_metrics_as_an_address() {
    let metrics = |address: &str, line: &str| {
        let env =
            Settings::from_env(|name| (name == "MORIIO_METRICS_ADDR").then(|| address.to_owned()));
        parse(line)
            .settings
            .over(env)
            .resolve()
            .unwrap()
            .config
            .metrics_port
    };
    assert_eq!(metrics(":9090", ""), Some(9090));
    assert_eq!(metrics("0.0.0.0:9090", "--metrics-port=9091"), Some(9091));
    assert_eq!(metrics("nonsense", ""), None);
}

#[test]
fn durations_are_read_as_go_writes_them() {
    for (text, ms) in [
        ("200ms", 200),
        ("1.5s", 1500),
        ("1m30s", 90_000),
        ("0", 0),
        ("2h", 7_200_000),
    ] {
        assert_eq!(
            parse_duration(text),
            Some(Duration::from_millis(ms)),
            "{text}"
        );
    }
    for bad in ["", "5", "s", "1x", "-1s", "1..2s", "999999999999999999999h"] {
        assert_eq!(parse_duration(bad), None, "{bad}");
    }
}
