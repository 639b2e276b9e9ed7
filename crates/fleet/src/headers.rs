//! llm-d's headers between clients, routers and servers: today's names first, then those of earlier generations.

/// Name of the objective that gives the request its priority.
pub const OBJECTIVE: [&str; 2] = [
    "x-llm-d-inference-objective",
    "x-gateway-inference-objective",
];
/// Whose request it is, where tenants share servers fairly.
pub const FAIRNESS: [&str; 2] = [
    "x-llm-d-inference-fairness-id",
    "x-gateway-inference-fairness-id",
];
/// Milliseconds in which the client wants its first token.
pub const SLO_TTFT: [&str; 2] = ["x-llm-d-slo-ttft-ms", "x-slo-ttft-ms"];
/// The server that computes the prompt: where its API is.
pub const PREFILLER: &str = "x-prefiller-host-port";
/// The servers that encode pictures and sound.
pub const ENCODERS: &str = "x-encoder-hosts-ports";
/// The rank that a process in front of several forwards to.
pub const DATA_PARALLEL: &str = "x-data-parallel-host-port";
