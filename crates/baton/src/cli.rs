//! The command line: every subcommand, flag and default in one place.

use baton_engine::Beside;
use baton_sidecar::{Ignored, Settings};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Serves large language models with prefill and decode apart.
#[derive(Debug, Parser)]
#[command(name = "baton", version, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Log lines as text or JSON. What is logged is chosen by RUST_LOG (default: info).
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The whole stack on this machine: gateway, prefill servers, decode servers.
    Up(Up),
    /// One model server.
    Serve(Box<Serve>),
    /// The OpenAI front door with the scheduler inside.
    Gateway(Gateway),
    /// The routing proxy beside a vLLM or SGLang decode server, with llm-d's flags.
    Sidecar(Box<Sidecar>),
    /// The endpoint picker behind Envoy and the gateways made of it, with llm-d's flags and configuration.
    Epp(Box<Epp>),
    /// Brings a model (smollm2) or a device plugin (cpu, tpu); prints where it lies.
    Fetch(Fetch),
    /// Compiles every program of a model for a device that is not here; prints memory and flops.
    Compile(Compile),
    /// The scheduler against a modelled fleet in virtual time, beside other ways to choose servers.
    Simulate(Box<Simulate>),
}

/// Of a build without the endpoint picker: whatever is said, the answer is how to get it.
#[cfg(not(feature = "cluster"))]
#[derive(Debug, Args)]
pub(crate) struct Epp {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub args: Vec<String>,
}

#[cfg(feature = "cluster")]
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Epp {
    #[command(subcommand)]
    pub command: Option<EppCommand>,
    #[command(flatten)]
    pub settings: baton_epp::Settings,
    /// End when standard input ends.
    #[arg(long, hide = true)]
    pub exit_with_parent: bool,
}

#[cfg(feature = "cluster")]
#[derive(Debug, Subcommand)]
pub(crate) enum EppCommand {
    /// Says what a configuration means, and what is wrong with it.
    CheckConfig {
        /// An EndpointPickerConfig, YAML or JSON.
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Up {
    /// A model folder, a .gguf file, a Hugging Face repo id in the local hub cache, or smollm2.
    #[arg(default_value = "smollm2")]
    pub model: String,
    /// Port of the gateway on 127.0.0.1.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Prefill servers.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub prefill: usize,
    /// Decode servers.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub decode: u16,
    /// Prompts with at least this many tokens not cached on the decode server go through a prefill server.
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub pd_threshold: u32,
    /// Further arguments for every `baton serve`, after `--`.
    #[arg(last = true)]
    pub serve_args: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// A model folder, a .gguf file, a Hugging Face repo id in the local hub cache, or smollm2.
    pub model: String,
    /// What the server does: compute prompts for others, generate, or both by itself.
    #[arg(long, value_enum, default_value_t = Role::Both)]
    pub role: Role,
    /// Where the model runs.
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    pub device: Device,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// Name in the API; the first of several is the one reported. Default: MODEL as given.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub served_model_name: Vec<String>,
    /// Longest prompt and answer together, such as 8192 or 32k. Default: what the model was made for.
    #[arg(long, value_parser = token_count)]
    pub max_model_len: Option<usize>,
    /// Most sequences in one step.
    #[arg(long, default_value_t = 8)]
    pub max_num_seqs: usize,
    /// Most tokens in one step.
    #[arg(long, default_value_t = 512, value_parser = token_count)]
    pub max_num_batched_tokens: usize,
    /// Most prompt tokens in a step that generates as well: fewer keep answers flowing beside long prompts, more finish
    /// the prompts sooner. Default: on the cpu as many as let steps take at most 1.7 times as long as without, elsewhere as
    /// many as fit.
    #[arg(long, value_name = "TOKENS", value_parser = token_count)]
    pub max_prefill_beside_decode: Option<usize>,
    /// Tokens in a KV block.
    #[arg(long, default_value_t = 16)]
    pub block_size: u32,
    /// Memory for KV blocks, such as 512MiB.
    #[arg(long, default_value = "512MiB", value_parser = byte_count)]
    pub kv_cache_memory_bytes: u64,
    /// Element type of activations and KV. On the cpu, float32 is exact; auto rounds activations to 8 bits where weights
    /// have 8 or fewer, else as the weights are, and keeps KV in bf16. Elsewhere weights have this type too: auto is f32
    /// on xla-cpu, bf16 on cuda and tpu.
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Element type of KV, if it is not what --dtype says. fp8 holds twice the context of bf16, on the cpu.
    #[arg(long, value_enum, default_value_t = KvDtype::Auto)]
    pub kv_cache_dtype: KvDtype,
    /// Threads that compute, on the cpu. Default: as many as this process may use.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// A file through which servers of one machine take turns on the cpu: prefill rests while decode is in a step.
    #[arg(long, value_name = "FILE")]
    pub turns: Option<PathBuf>,
    /// Devices that one model is spread over. Only 1 for now.
    #[arg(long, default_value_t = 1)]
    pub tensor_parallel_size: usize,
    /// Requests that may wait for a place; more are answered 503.
    #[arg(long, default_value_t = 256)]
    pub max_num_queued_reqs: usize,
    /// Clients must send one of these as a bearer token.
    #[arg(long, env = "VLLM_API_KEY", hide_env_values = true, num_args = 1..)]
    pub api_key: Vec<String>,
    /// A Jinja file instead of the model's own chat template.
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// Usage tells how much of the prompt was cached.
    #[arg(long)]
    pub enable_prompt_tokens_details: bool,

    /// Port on which a prefill server hands KV over; 0 takes a free one.
    #[arg(long, default_value_t = 0)]
    pub kv_port: u16,
    /// Host that a decode server is told to pull from. Default: --host.
    #[arg(long)]
    pub kv_advertise_host: Option<String>,
    /// How long handed-over KV is held without a sign of life from its taker.
    #[arg(long, default_value = "15s", value_parser = duration)]
    pub kv_lease_ttl: Duration,
    /// Host memory for KV that waits to be taken, and for KV being pulled.
    #[arg(long, default_value = "1GiB", value_parser = byte_count)]
    pub kv_host_pool: u64,
    /// Most tokens of a prompt that are computed here, beside other requests, when its KV does not come from the prefill
    /// server; a request with more is answered 503. 0: none, ever. A request says otherwise with the header
    /// x-kv-failure-policy: recompute or fail.
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    pub kv_recompute_max: u32,
    /// Shared secret of a P/D pool, 64 hex digits. Without one a server neither gives nor takes KV.
    #[arg(
        long,
        env = "BATON_KV_SECRET",
        hide_env_values = true,
        value_name = "HEX"
    )]
    pub kv_secret: Option<String>,
    /// KV travels encrypted. All servers of a pool must agree on it; it takes no certificates.
    #[arg(long)]
    pub kv_tls: bool,
    /// Hosts, besides loopback, that this server may be told to prefill on and pull KV from; * allows all.
    #[arg(long, value_name = "HOST", num_args = 1..)]
    pub kv_allow_host: Vec<String>,

    /// Whom to tell what the prefix cache holds, as vLLM's JSON; * in its endpoints stands for --host.
    #[arg(long, value_name = "JSON")]
    pub kv_events_config: Option<String>,
    /// 0: these events have whole block hashes as bytes, not their last eight bytes as a number.
    #[arg(
        long,
        hide = true,
        env = "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES",
        default_value_t = 1
    )]
    pub kv_events_use_int_block_hashes: u8,

    /// The PJRT plugin to load instead of the fetched one.
    #[arg(long, env = "BATON_PJRT_PLUGIN", value_name = "FILE")]
    pub plugin: Option<PathBuf>,
    /// How long requests may run on after SIGTERM.
    #[arg(long, default_value = "30s", value_parser = duration)]
    pub shutdown_timeout: Duration,
    /// End when standard input is closed, so that no server outlives what started it.
    #[arg(long, hide = true)]
    pub exit_with_parent: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Gateway {
    /// JSON file with the address, the endpoints and the thresholds.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// End when standard input is closed.
    #[arg(long, hide = true)]
    pub exit_with_parent: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Sidecar {
    /// Settings as YAML; keys are the flags' names.
    #[arg(long, value_name = "YAML", conflicts_with = "configuration_file")]
    pub configuration: Option<String>,
    /// A file of settings as YAML.
    #[arg(long, value_name = "FILE")]
    pub configuration_file: Option<PathBuf>,
    #[command(flatten)]
    pub settings: Settings,
    #[command(flatten)]
    pub ignored: Ignored,
    /// End when standard input is closed.
    #[arg(long, hide = true)]
    pub exit_with_parent: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Fetch {
    /// smollm2, cpu or tpu.
    pub what: String,
}

#[derive(Debug, Args)]
pub(crate) struct Compile {
    /// A model folder, a .gguf file, a Hugging Face repo id in the local hub cache, or smollm2.
    pub model: String,
    /// The devices to compile for, such as v6e:2x4.
    #[arg(long)]
    pub topology: String,
    /// Longest prompt and answer together.
    #[arg(long, value_parser = token_count)]
    pub max_model_len: Option<usize>,
    /// Most sequences in one step.
    #[arg(long, default_value_t = 8)]
    pub max_num_seqs: usize,
    /// Most tokens in one prefill chunk.
    #[arg(long, default_value_t = 512, value_parser = token_count)]
    pub max_num_batched_tokens: usize,
    /// Most prompt tokens in a step that generates as well: fewer keep answers flowing beside long prompts, more finish
    /// the prompts sooner. Default: on the cpu as many as let steps take at most 1.7 times as long as without, elsewhere as
    /// many as fit.
    #[arg(long, value_name = "TOKENS", value_parser = token_count)]
    pub max_prefill_beside_decode: Option<usize>,
    /// Tokens in a KV block.
    #[arg(long, default_value_t = 16)]
    pub block_size: u32,
    /// Memory for KV blocks.
    #[arg(long, default_value = "512MiB", value_parser = byte_count)]
    pub kv_cache_memory_bytes: u64,
    /// The PJRT plugin to load instead of the fetched libtpu.
    #[arg(long, env = "BATON_PJRT_PLUGIN", value_name = "FILE")]
    pub plugin: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Simulate {
    /// Requests of a published trace: JSON lines of Mooncake's form or CSV of Azure's, perhaps gzipped. Default: conversations
    /// made up by the flags below.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Requests at most. Conversations: so many.
    #[arg(long, value_name = "N")]
    pub requests: Option<usize>,
    /// Servers that compute prompts and answer.
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub servers: usize,
    /// Servers that compute prompts for those of --decode.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub prefill: usize,
    /// Servers that answer, and may have prompts computed.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub decode: usize,
    /// KV blocks of a server; a table for each number.
    #[arg(long, value_delimiter = ',', default_value = "10000,2000")]
    pub blocks: Vec<usize>,
    /// Rates to try, in percent of what the fleet can do.
    #[arg(long, value_delimiter = ',', default_value = "60,90,120")]
    pub loads: Vec<f64>,
    /// Ways to choose, out of baton, baton-precise, random, round-robin, upstream, ten-lines. Default: all.
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub policies: Vec<String>,
    /// When prompts are computed elsewhere: never, always, sooner (when that is expected to be sooner), or from so many
    /// uncached tokens on.
    #[arg(long, default_value = "sooner", value_name = "WHEN")]
    pub split: String,
    /// How often servers are asked how busy they are.
    #[arg(long, default_value = "200ms", value_parser = duration)]
    pub scrape_interval: Duration,
    /// One server is replaced by an empty one so often.
    #[arg(long, value_parser = duration, value_name = "TIME")]
    pub replace_every: Option<Duration>,
    /// Decides everything that is left to chance.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,

    /// What a queued prompt token counts in our own score, beside 1 for a token that is not cached.
    #[arg(long, value_name = "TOKENS", hide_short_help = true)]
    pub cost_queued: Option<f64>,
    /// What a request that is under way counts in our own score, in prompt tokens.
    #[arg(long, value_name = "TOKENS", hide_short_help = true)]
    pub cost_active: Option<f64>,

    /// Prompt tokens a second of a server. Defaults of these: Llama-3.3-70B on eight TPU v6e.
    #[arg(long, value_name = "TOKENS", hide_short_help = true)]
    pub prefill_rate: Option<f64>,
    /// What a step takes at least.
    #[arg(long, value_name = "MS", hide_short_help = true)]
    pub step_ms: Option<f64>,
    /// Tokens of a step at most.
    #[arg(long, value_name = "TOKENS", hide_short_help = true)]
    pub batch_tokens: Option<usize>,
    /// Gb/s between a prefill server and a decode server.
    #[arg(long, value_name = "GBITS", hide_short_help = true)]
    pub link: Option<f64>,

    /// Conversations: different system prompts.
    #[arg(long, default_value_t = 150, hide_short_help = true)]
    pub systems: usize,
    /// Conversations: questions of each.
    #[arg(long, default_value_t = 5, hide_short_help = true)]
    pub turns: usize,
    /// Conversations: each question follows right on the system prompt and is asked again and again, in the same order.
    #[arg(long, hide_short_help = true)]
    pub again: bool,
    /// Conversations: tokens of a system prompt.
    #[arg(long, default_value_t = 6000, hide_short_help = true)]
    pub system_tokens: u32,
    /// Conversations: tokens of a question.
    #[arg(long, default_value_t = 1200, hide_short_help = true)]
    pub question_tokens: u32,
    /// Conversations: tokens of an answer.
    #[arg(long, default_value_t = 1000, hide_short_help = true)]
    pub answer_tokens: u32,
    /// Conversations: tokens of a KV block.
    #[arg(long, default_value_t = 64, hide_short_help = true)]
    pub block_tokens: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    Prefill,
    Decode,
    Both,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Device {
    /// Our own kernels on the CPU.
    Cpu,
    /// The CPU through XLA's plugin: slower, and compiled at the first start.
    XlaCpu,
    Cuda,
    Tpu,
    /// No device: made-up tokens, for trying what surrounds a model.
    Sim,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dtype {
    Auto,
    Float32,
    Bfloat16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvDtype {
    Auto,
    Float32,
    Bfloat16,
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

/// How many times as long as its answers alone a step may take with a prompt beside them, on a CPU.
const STRETCH: f64 = 1.7;

impl Serve {
    /// Prompt tokens that a step takes beside decodes. On a CPU computing them is what takes time, elsewhere a step is.
    pub(crate) fn prefill_beside_decode(&self) -> Beside {
        let default = match self.device {
            Device::Cpu => Beside::Stretch(STRETCH),
            _ => Beside::Tokens(self.max_num_batched_tokens),
        };
        self.max_prefill_beside_decode
            .map_or(default, Beside::Tokens)
    }

    /// Tokens at the end of a prompt whose KV leaves that are computed alone. On a CPU a step of so few takes no longer a
    /// token than a large one, and long enough for what is before them to travel; elsewhere small steps are dear.
    pub(crate) const fn export_tail(&self) -> usize {
        match self.device {
            Device::Cpu => 64,
            _ => 0,
        }
    }
}

/// `8192`, `32k` (thousands) or `32K` (1024s), as vLLM reads them.
fn token_count(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, if text.ends_with('k') { 1000 } else { 1024 }),
        None => (text, 1),
    };
    let n: usize = digits
        .parse()
        .map_err(|_| "expected a number such as 8192, 32k or 32K".to_owned())?;
    n.checked_mul(unit)
        .filter(|&n| n > 0 && n <= u32::MAX as usize)
        .ok_or_else(|| "out of range".to_owned())
}

/// `1073741824`, `512MiB`, `1GiB`, `2GB`.
fn byte_count(text: &str) -> Result<u64, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let factor: u64 = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        _ => return Err("expected bytes, such as 512MiB or 1GiB".to_owned()),
    };
    let n: u64 = digits
        .parse()
        .map_err(|_| "expected bytes, such as 512MiB or 1GiB".to_owned())?;
    n.checked_mul(factor)
        .ok_or_else(|| "out of range".to_owned())
}

/// `500ms`, `15s`, `2m`.
fn duration(text: &str) -> Result<Duration, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let n: u64 = digits
        .parse()
        .map_err(|_| "expected a duration such as 500ms, 15s or 2m".to_owned())?;
    match unit {
        "ms" => Ok(Duration::from_millis(n)),
        "s" => Ok(Duration::from_secs(n)),
        "m" => n
            .checked_mul(60)
            .map(Duration::from_secs)
            .ok_or_else(|| "out of range".to_owned()),
        _ => Err("expected a duration such as 500ms, 15s or 2m".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn token_counts_read_like_vllm() {
        assert_eq!(token_count("8192"), Ok(8192));
        assert_eq!(token_count("32k"), Ok(32_000));
        assert_eq!(token_count("32K"), Ok(32_768));
        assert!(
            token_count("0").is_err()
                && token_count("x").is_err()
                && token_count("99999999k").is_err()
        );
    }

    #[test]
    fn byte_counts_and_durations_need_sensible_units() {
        assert_eq!(byte_count("512MiB"), Ok(512 << 20));
        assert_eq!(byte_count("2GB"), Ok(2_000_000_000));
        assert!(byte_count("5 potatoes").is_err() && byte_count("99999999999GiB").is_err());
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("15s"), Ok(Duration::from_secs(15)));
        assert!(duration("15").is_err());
    }
}
