//! Plugins that do not decide: what produces the facts for decisions, where they come from, how requests are read, how
//! they queue.

use super::expression::Expression;
use super::fields::Fields;
use super::plugins::Is;
use crate::engines::{CacheInfo, EngineMetrics, MetricSpec};
use crate::flow::{Fairness, Ordering};
use crate::{
    Approximate, Costs, Events, InFlight, Precise, Scorer, SessionStrategy, Shedding, Source,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Duration;

/// What plugins say beside what they are, while they are read.
#[derive(Debug, Default)]
pub(super) struct Supplies {
    /// Types of all plugins, by name.
    pub(super) types: BTreeMap<String, String>,
    pub(super) approximate: Option<Approximate>,
    /// Settings of the approximate index that were found at a scorer.
    pub(super) forwarded: Option<Approximate>,
    pub(super) precise: Option<Precise>,
    /// And the name of the profile whose server is remembered.
    pub(super) session: Option<(SessionStrategy, Option<Box<str>>)>,
    pub(super) recently_used: usize,
    pub(super) shedding: Option<Shedding>,
    pub(super) in_flight: Option<InFlight>,
    pub(super) costs: Option<Costs>,
    pub(super) tokens: Tokens,
    pub(super) attributes: Vec<Attribute>,
    pub(super) shows_served: bool,
    pub(super) data: DataLayer,
}

impl Supplies {
    pub(super) fn has_precise(&self) -> bool {
        let is = |kind: &String| kind.starts_with("precise-prefix-cache-");
        self.types.values().any(is)
    }
}

/// How prompts are counted, and cut into tokens for the precise index.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokens {
    /// The model whose tokenizer counts; without one, four bytes are taken for a token.
    pub model: Option<Box<str>>,
    /// A server that renders and tokenizes prompts, if that is not to be done here.
    pub render_url: Option<Box<str>>,
    /// How long that server may take for a prompt.
    pub timeout: Option<Duration>,
}

/// How requests are read, by the end of their path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parser {
    /// OpenAI's API.
    OpenAi,
    /// Anthropic's messages.
    Anthropic,
    /// vLLM's own generate.
    VllmHttp,
    /// SGLang's own generate.
    SglangHttp,
    /// vLLM's gRPC service.
    VllmGrpc,
    /// Vertex AI's predictions.
    VertexAi,
    /// Not at all.
    Passthrough,
}

/// A number of a response that is told to the proxy.
#[derive(Clone, Debug, PartialEq)]
pub struct Attribute {
    /// Namespace of the dynamic metadata.
    pub namespace: Box<str>,
    /// Its name there.
    pub name: Box<str>,
    /// What it is.
    pub expression: Expression,
    /// When it is told, if not always.
    pub condition: Option<Expression>,
}

impl Attribute {
    /// Its value for a response that says this of its usage, if it is to be told.
    #[must_use]
    pub fn of(&self, usage: &Value) -> Option<f64> {
        if let Some(when) = &self.condition
            && when.flag(usage) != Some(true)
        {
            return None;
        }
        let number = self.expression.number(usage)?.trunc();
        (number != 0.0).then_some(number)
    }
}

/// Where facts about servers come from.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DataLayer {
    /// How metrics are asked for.
    pub metrics: MetricsSource,
    /// Engines and what they call their metrics.
    pub engines: Engines,
    /// After which time metrics are too old, if that is said.
    pub stale_after: Option<Duration>,
    /// A file with the endpoints, instead of a cluster.
    pub discovery: Option<FileDiscovery>,
    /// Whether servers are asked for their models.
    pub asks_models: bool,
}

/// How metrics are asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricsSource {
    /// Whether over TLS.
    pub https: bool,
    /// The path.
    pub path: Box<str>,
    /// Whether any certificate will do.
    pub insecure_skip_verify: bool,
    /// Another port than the endpoint's.
    pub port: Option<u16>,
    /// How often at most, if that is said.
    pub interval: Option<Duration>,
    /// File with certificates to trust.
    pub ca_cert: Option<Box<str>>,
    /// Files with the client's certificate and key.
    pub client_cert: Option<(Box<str>, Box<str>)>,
}

/// Engines and what they call their metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engines {
    /// The label that names a server's engine.
    pub label: Box<str>,
    /// The engine of servers without the label.
    pub default: Box<str>,
    /// The engines.
    pub known: Vec<EngineMetrics>,
}

/// A file with endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileDiscovery {
    /// Where it is.
    pub path: Box<str>,
    /// Whether it is read again when it changes.
    pub watch: bool,
}

impl Default for MetricsSource {
    fn default() -> Self {
        Self {
            https: false,
            path: "/metrics".into(),
            insecure_skip_verify: true,
            port: None,
            interval: None,
            ca_cert: None,
            client_cert: None,
        }
    }
}

impl Default for Engines {
    fn default() -> Self {
        Self {
            label: "llm-d.ai/engine-type".into(),
            default: "vllm".into(),
            known: EngineMetrics::known(),
        }
    }
}

pub(super) fn quiet(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Quiet
}

pub(super) fn approximate(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    supplies.approximate = Some(approximate_fields(f));
    Is::Quiet
}

/// Most blocks and tokens that a configuration may ask for.
const MOST_BLOCKS: i64 = 1 << 20;

/// Settings of the approximate index, in the words of all generations.
pub(super) fn approximate_fields(f: &mut Fields<'_, '_>) -> Approximate {
    let auto_tune = f.flag("autoTune", true);
    // With automatic tuning upstream never goes below 64 tokens.
    let usual = if auto_tune { 64 } else { 16 };
    let bytes = f.whole_if("hashBlockSize", (1, MOST_BLOCKS));
    let old = f.whole_if("blockSize", (1, MOST_BLOCKS));
    let tokens = f.whole_if("blockSizeTokens", (1, MOST_BLOCKS));
    if old.is_some() {
        f.warn(
            "blockSize",
            "this is blockSizeTokens now, and counts tokens",
        );
    }
    if let Some(bytes) = bytes {
        f.warn(
            "hashBlockSize",
            format!(
                "{bytes} bytes are taken for {} tokens; blockSizeTokens counts tokens",
                (bytes / 4).max(1)
            ),
        );
    }
    let block = match (tokens.or(old), bytes) {
        (Some(tokens), _) if auto_tune => tokens.max(usual),
        (Some(tokens), _) => tokens,
        (None, Some(bytes)) => (bytes / 4).max(1),
        (None, None) => usual,
    };
    let blocks = f.whole_if("maxPrefixBlocksToMatch", (1, MOST_BLOCKS));
    let most_tokens = f.whole_if("maxPrefixTokensToMatch", (0, i64::from(u32::MAX)));
    let most = match (most_tokens, blocks) {
        (Some(tokens), _) if tokens > 0 => tokens / block,
        (None, None) => 131_072 / block,
        (_, blocks) => blocks.unwrap_or(2048),
    };
    let per_server = f.count("lruCapacityPerServer", 31_250, 1);
    Approximate {
        block_tokens: u32::try_from(block).unwrap_or(u32::MAX),
        most_blocks: usize::try_from(most.clamp(1, MOST_BLOCKS)).unwrap_or(1),
        per_server: per_server as usize,
        auto_tune,
    }
}

pub(super) fn precise(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    let precise = precise_fields(f, supplies);
    if supplies.precise.is_some() {
        let place = f.place.clone();
        f.notes.wrong(place, "there is a precise index already");
    }
    supplies.precise = Some(precise);
    Is::Quiet
}

/// The second generation's: producer and scorer in one.
pub(super) fn precise_scorer(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    precise(f, supplies);
    Is::Scorer(Scorer::Prefix {
        source: Source::Precise,
        length_weight: 0.0,
        long: 8192.0,
    })
}

fn precise_fields(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Precise {
    let block_tokens = f.inside("tokenProcessorConfig", |f| {
        let old = f.whole_if("blockSize", (1, MOST_BLOCKS));
        f.ignored(
            "hashSeed",
            "servers' hashes are mapped to our own, whatever their seed",
        );
        let block = f.whole_if("blockSizeTokens", (1, MOST_BLOCKS)).or(old);
        let block = block.unwrap_or(16);
        f.unsay("blockSize");
        f.say("blockSizeTokens", block);
        u32::try_from(block).unwrap_or(u32::MAX)
    });
    let mut precise = Precise {
        block_tokens,
        most_blocks: 100_000_000,
        device_weight: 1.0,
        host_weight: 0.8,
        speculative: None,
        metrics: false,
        events: Events {
            bind: None,
            topic: "kv@".into(),
            port: 5557,
            replay_port: None,
            sglang: false,
        },
    };
    f.inside("indexerConfig", |f| indexer(f, &mut precise, supplies));
    f.inside("kvEventsConfig", |f| events(f, &mut precise.events));
    let speculative = f.flag("speculativeIndexing", false);
    let ttl = f.duration("speculativeTTL", Duration::from_secs(2));
    precise.speculative = speculative.then_some(ttl);
    precise
}

fn indexer(f: &mut Fields<'_, '_>, precise: &mut Precise, supplies: &mut Supplies) {
    f.inside("kvBlockIndexConfig", |f| {
        f.inside("inMemoryConfig", |f| {
            let most = f.whole_if("size", (1, 1 << 40)).unwrap_or(100_000_000);
            f.say("size", most);
            precise.most_blocks = usize::try_from(most).unwrap_or(usize::MAX);
            f.ignored("podCacheSize", "a block may be at any number of servers");
        });
        if f.has("costAwareMemoryConfig") {
            f.inside("costAwareMemoryConfig", |f| {
                // About what an entry takes, its holders included.
                const BYTES: u64 = 64;
                let bytes = f.quantity_if("size").unwrap_or(2 << 30);
                precise.most_blocks = usize::try_from(bytes / BYTES).unwrap_or(usize::MAX).max(1);
            });
        }
        if f.raw("redisConfig").is_some() {
            f.wrong("redisConfig", "the index is kept in this process");
        }
        precise.metrics = f.flag("enableMetrics", false);
        f.ignored("metricsLoggingInterval", "metrics are not logged");
    });
    for (medium, weight) in f.each("kvCacheBackendConfigs", |f| {
        let medium = f.text("name", "").to_lowercase();
        (medium, f.number("weight", 1.0, (0.0, 1.0)))
    }) {
        match medium.as_str() {
            "gpu" | "tpu" | "hbm" => precise.device_weight = weight as f32,
            "cpu" => precise.host_weight = weight as f32,
            other => f.warn(
                "kvCacheBackendConfigs",
                format!("a medium {other:?} is not known"),
            ),
        }
    }
    f.inside("tokenizersPoolConfig", |f| {
        let model = f.text_if("modelName");
        if let Some(model) = model {
            f.warn(
                "modelName",
                "this belongs to token-producer, and is taken as if it were there",
            );
            supplies.tokens.model.get_or_insert_with(|| model.into());
        }
        for key in [
            "workersCount",
            "minPrefixOverlapRatio",
            "hf",
            "local",
            "uds",
        ] {
            f.ignored(key, "prompts are tokenized in this process");
        }
    });
    f.ignored("prefixStoreConfig", "prompts are tokenized in this process");
}

fn events(f: &mut Fields<'_, '_>, events: &mut Events) {
    let bind = f.text_if("zmqEndpoint").filter(|e| !e.is_empty());
    events.topic = f.text("topicFilter", "kv@");
    events.sglang = f.choice("engineType", &[("vllm", false), ("sglang", true)]);
    f.ignored("concurrency", "one thread is enough for all events");
    let discover = f.flag("discoverPods", bind.is_none());
    f.inside("podDiscoveryConfig", |f| {
        events.port = f.port("socketPort").unwrap_or(5557);
        f.say("socketPort", events.port);
        // Upstream takes 0 and less for none.
        let replay = f.whole_if("replaySocketPort", (-1, u16::MAX.into()));
        events.replay_port = replay
            .and_then(|p| u16::try_from(p).ok())
            .filter(|p| *p > 0);
        f.ignored(
            "podLabelSelector",
            "events come from the pool's own endpoints",
        );
        f.ignored("podNamespace", "events come from the pool's own endpoints");
    });
    if bind.is_some() && discover {
        f.warn(
            "discoverPods",
            "with zmqEndpoint servers connect to us, and are not connected to",
        );
    }
    events.bind = bind.map(Into::into);
}

pub(super) fn tokens(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    let model = f.text_if("modelName").filter(|m| !m.is_empty());
    let url = f.inside("vllm", |f| {
        let old = f.text_if("http");
        let url = f.text_if("url").or(old);
        f.unsay("http");
        if let Some(url) = url {
            f.say("url", url);
        }
        let timeout = f.duration_if("timeout");
        f.ignored("mmTimeout", "pictures and films are counted here");
        (url, timeout)
    });
    f.ignored(
        "udsTokenizerConfig",
        "prompts are tokenized in this process",
    );
    f.ignored(
        "estimate",
        "without a model, four bytes are taken for a token",
    );
    if url.0.is_some() && model.is_none() {
        f.wrong(
            "modelName",
            "a server that renders prompts needs a model's name",
        );
    }
    supplies.tokens = Tokens {
        model: model.map(Into::into).or(supplies.tokens.model.take()),
        render_url: url.0.map(Into::into),
        timeout: url.1,
    };
    Is::Quiet
}

pub(super) fn in_flight(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    f.ignored("syncCrossReplicaState", "every replica counts for itself");
    f.ignored(
        "prefixMatchInfoProducerName",
        "the best source there is says what is cached",
    );
    supplies.in_flight = Some(InFlight {
        add_output: f.flag("addEstimatedOutputTokens", false),
        output_ratio: f.number("outputRatio", 1.5, (0.0, 1e6)),
        most_output: f.count("maxEstimatedOutputTokens", 0, 0),
    });
    Is::Quiet
}

pub(super) fn embeddings_producer(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    everything_ignored(f, "caches of encoders are not followed here")
}

pub(super) fn embeddings_scorer(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    f.ignored("producerName", "caches of encoders are not followed here");
    let place = f.place.clone();
    f.notes.warn(
        place,
        "caches of encoders are not followed here: every server gets 0",
    );
    Is::Scorer(Scorer::Zero)
}

pub(super) fn predicted_latency(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    everything_ignored(f, "nobody predicts latencies here")
}

pub(super) fn latency_admitter(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    everything_ignored(f, "without predicted latencies nobody is refused for them")
}

/// Takes whatever parameters a plugin has that does nothing here.
fn everything_ignored(f: &mut Fields<'_, '_>, why: &str) -> Is {
    let known = [
        "samplingMean",
        "maxDecodeTokenSamplesForPrediction",
        "sloBufferFactor",
        "contextTTL",
        "streamingMode",
        "endpointRoleLabel",
        "predictInProduce",
        "latencyPredictorProducerName",
        "cacheSize",
        "ttl",
    ];
    for key in known {
        f.ignored(key, why);
    }
    warn_of_no_effect(f, why);
    Is::Quiet
}

fn warn_of_no_effect(f: &mut Fields<'_, '_>, why: &str) {
    let place = f.place.clone();
    f.notes.warn(place, format!("has no effect: {why}"));
}

pub(super) fn probabilistic_admitter(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    supplies.shedding = Some(Shedding::Probabilistic {
        queue_depth: f.number("queueDepthThreshold", 5.0, (1e-9, 1e18)),
        kv_usage: f.number("kvCacheUtilThreshold", 0.8, (1e-9, 1.0)),
        power: f.number("power", 5.0, (0.0, 1e3)),
        factor: f.number("k", 300.0, (0.0, 1e18)),
    });
    Is::Quiet
}

pub(super) fn openai(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Parser(Parser::OpenAi)
}

pub(super) fn anthropic(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Parser(Parser::Anthropic)
}

pub(super) fn vllm_http(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Parser(Parser::VllmHttp)
}

pub(super) fn sglang_http(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Parser(Parser::SglangHttp)
}

pub(super) fn vllm_grpc(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Parser(Parser::VllmGrpc)
}

pub(super) fn vertex(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Parser(Parser::VertexAi)
}

pub(super) fn passthrough(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Parser(Parser::Passthrough)
}

pub(super) fn attributes(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    let all = f.each("attributes", |f| {
        let (namespace, name) = f.inside("key", |f| {
            let namespace = f.text("namespace", "envoy.lb");
            (namespace, f.text("name", ""))
        });
        if name.is_empty() {
            f.wrong("key.name", "an attribute needs a name");
        }
        let value = expression(f, "expression");
        if value.is_none() && !f.has("expression") {
            f.wrong("expression", "an attribute needs an expression");
        }
        let condition = expression(f, "condition");
        value.map(|expression| Attribute {
            namespace,
            name,
            expression,
            condition,
        })
    });
    if all.len() != 1 {
        f.wrong("attributes", "exactly one attribute can be reported");
    }
    supplies.attributes.extend(all.into_iter().flatten());
    Is::Quiet
}

/// An expression, if there is one and it is understood.
fn expression(f: &mut Fields<'_, '_>, key: &'static str) -> Option<Expression> {
    let text = f.text_if(key).filter(|text| !text.trim().is_empty())?;
    let read = Expression::parse(text);
    read.map_err(|why| f.wrong(key, why)).ok()
}

pub(super) fn served(_: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    supplies.shows_served = true;
    Is::Quiet
}

pub(super) fn metrics_source(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    let ca_cert = f.text_if("caCertPath").map(Into::into);
    let client = (f.text_if("clientCertPath"), f.text_if("clientKeyPath"));
    let client_cert = match client {
        (Some(cert), Some(key)) => Some((cert.into(), key.into())),
        (None, None) => None,
        _ => {
            f.wrong("clientCertPath", "a certificate goes with its key");
            None
        }
    };
    supplies.data.metrics = MetricsSource {
        https: f.choice("scheme", &[("http", false), ("https", true)]),
        path: f.text("path", "/metrics"),
        insecure_skip_verify: f.flag("insecureSkipVerify", true),
        port: f.port("port"),
        interval: f.duration_if("interval"),
        ca_cert,
        client_cert,
    };
    Is::Source
}

pub(super) fn core_metrics(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    let mut engines = Engines {
        label: f.text("engineLabelKey", "llm-d.ai/engine-type"),
        default: f.text("defaultEngine", "vllm"),
        known: EngineMetrics::known(),
    };
    for engine in f.each("engineConfigs", engine) {
        if engine.name.is_empty() || &*engine.name == "default" {
            f.wrong(
                "engineConfigs",
                "an engine needs a name, and not \"default\"",
            );
        }
        engines.known.retain(|known| known.name != engine.name);
        engines.known.push(engine);
    }
    if !engines.known.iter().any(|e| e.name == engines.default) {
        let text = format!("no engine {:?} is known", engines.default);
        f.wrong("defaultEngine", text);
    }
    supplies.data.engines = engines;
    Is::Extractor
}

fn engine(f: &mut Fields<'_, '_>) -> EngineMetrics {
    let name = f.text("name", "");
    let series = spec(f, "cacheInfoSpec");
    let block_size = f.text("cacheBlockSizeLabelName", "block_size");
    let num_blocks = f.text("cacheNumBlocksLabelName", "num_gpu_blocks");
    let values = (spec(f, "cacheBlockSizeSpec"), spec(f, "cacheNumBlocksSpec"));
    let cache = match (series, values) {
        (Some(series), _) => Some(CacheInfo::Labels {
            series,
            block_size,
            num_blocks,
        }),
        (None, (Some(block_size), Some(num_blocks))) => Some(CacheInfo::Values {
            block_size,
            num_blocks,
        }),
        _ => None,
    };
    f.ignored("customMetrics", "no plugin asks for other metrics");
    EngineMetrics {
        name,
        queued: spec(f, "queuedRequestsSpec"),
        running: spec(f, "runningRequestsSpec"),
        kv_usage: spec(f, "kvUsageSpec"),
        lora: spec(f, "loraSpec"),
        cache,
    }
}

fn spec(f: &mut Fields<'_, '_>, key: &'static str) -> Option<MetricSpec> {
    let text = f.text_if(key).filter(|t| !t.is_empty())?;
    match MetricSpec::parse(text) {
        Ok(spec) => Some(spec),
        Err(why) => {
            f.wrong(key, why);
            None
        }
    }
}

pub(super) fn models_source(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    for key in ["scheme", "path", "insecureSkipVerify", "interval"] {
        f.ignored(
            key,
            "servers are asked for their models as they are for their health",
        );
    }
    supplies.data.asks_models = true;
    Is::Source
}

pub(super) fn models_extractor(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Extractor
}

pub(super) fn notification(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Source
}

pub(super) fn objects(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    for key in ["group", "version", "kind"] {
        f.ignored(key, "no plugin asks for other objects");
    }
    Is::Source
}

pub(super) fn file_discovery(f: &mut Fields<'_, '_>, supplies: &mut Supplies) -> Is {
    let path = f.text("path", "");
    if path.is_empty() {
        f.wrong("path", "the file's path is needed");
    }
    let watch = f.flag("watchFile", false);
    supplies.data.discovery = Some(FileDiscovery { path, watch });
    Is::Discovery
}

pub(super) fn arrival(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Ordering(Ordering::Arrival)
}

pub(super) fn deadline(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Ordering(Ordering::Deadline)
}

pub(super) fn slo_deadline(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Ordering(Ordering::SloDeadline)
}

pub(super) fn global_strict(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Fairness(Fairness::GlobalStrict)
}

pub(super) fn round_robin(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Fairness(Fairness::RoundRobin)
}

/// Upstream's way counts what a program has been given so far; ours what its prompts take of the queue.
pub(super) fn by_programs(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    let place = f.place.clone();
    f.notes
        .warn(place, "this is taken for token-fairness-policy");
    Is::Fairness(Fairness::Tokens)
}

pub(super) fn by_tokens(_: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::Fairness(Fairness::Tokens)
}

pub(super) fn static_limit(f: &mut Fields<'_, '_>, _: &mut Supplies) -> Is {
    Is::UsageLimit(f.number("threshold", 1.0, (0.0, 1e9)))
}
