//! Headers by their names: what the gateway knows too, and what only a picker does.

pub(crate) use baton_fleet::headers::{
    DATA_PARALLEL, ENCODERS, FAIRNESS, OBJECTIVE, PREFILLER, SLO_TTFT,
};
pub(crate) use baton_scheduler::flow::DEFAULT_FLOW;

/// The request's name in logs.
pub(crate) const REQUEST_ID: &str = "x-request-id";
/// Where the path stands that the client asked for, best source first.
pub(crate) const PATHS: [&str; 3] = [":path", "x-original-path", "x-forwarded-path"];
/// The name that the model gets on its way to a server.
pub(crate) const REWRITE: [&str; 2] =
    ["x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite"];
/// What a client would like, after RFC 7240.
pub(crate) const PREFER: &str = "prefer";
/// To be answered only by a server that has some of the prompt.
pub(crate) const IF_AVAILABLE: &str = "if-available";
/// The endpoints that a test allows.
pub(crate) const SELECTION: &str = "test-epp-endpoint-selection";
/// The endpoint that answered, told to a test.
pub(crate) const SHOW_SERVED: &str = "x-conformance-test-served-endpoint";

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
