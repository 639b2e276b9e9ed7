//! A picker whose endpoints come from Kubernetes: beside an API server in memory, and beside a real one.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot set up its scene must fail"
)]

#[path = "../../../k8s/tests/api/fake.rs"]
#[expect(dead_code, reason = "the tests beside it use more of it")]
mod fake;
#[path = "../../../k8s/tests/cluster/machine.rs"]
#[expect(dead_code, reason = "the tests beside it use more of it")]
mod machine;
mod memory;
mod picker;
mod real;
