//! Headers by their names: llm-d's of today, and those of its earlier generations, which are read as well.

/// The request's name in logs.
pub(crate) const REQUEST_ID: &str = "x-request-id";
/// Where the path stands that the client asked for, best source first.
pub(crate) const PATHS: [&str; 3] = [":path", "x-original-path", "x-forwarded-path"];
/// Name of the objective that gives the request its priority.
pub(crate) const OBJECTIVE: [&str; 2] = [
    "x-llm-d-inference-objective",
    "x-gateway-inference-objective",
];
/// Whose request it is, where tenants share servers fairly.
pub(crate) const FAIRNESS: [&str; 2] = [
    "x-llm-d-inference-fairness-id",
    "x-gateway-inference-fairness-id",
];
/// The name that the model gets on its way to a server.
pub(crate) const REWRITE: [&str; 2] =
    ["x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite"];
/// Milliseconds in which the client wants its first token.
pub(crate) const SLO_TTFT: [&str; 2] = ["x-llm-d-slo-ttft-ms", "x-slo-ttft-ms"];
/// Whose request it is if nobody says.
pub(crate) const DEFAULT_FLOW: &str = "default-flow";
/// The endpoints that a test allows.
pub(crate) const SELECTION: &str = "test-epp-endpoint-selection";
/// The endpoint that answered, told to a test.
pub(crate) const SHOW_SERVED: &str = "x-conformance-test-served-endpoint";

/// The server that computes the prompt.
pub(crate) const PREFILLER: &str = "x-prefiller-host-port";
/// The servers that encode pictures and sound.
pub(crate) const ENCODERS: &str = "x-encoder-hosts-ports";
/// The rank that a process in front of several forwards to.
pub(crate) const DATA_PARALLEL: &str = "x-data-parallel-host-port";

/// What clients say to the picker, and servers need not hear.
pub(crate) const FOR_THE_PICKER: [&str; 7] = [
    OBJECTIVE[0],
    OBJECTIVE[1],
    FAIRNESS[0],
    FAIRNESS[1],
    REWRITE[0],
    REWRITE[1],
    SELECTION,
];
