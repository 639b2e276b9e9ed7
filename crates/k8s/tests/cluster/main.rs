//! The same beside the real thing: `make test-cluster` starts a control plane and runs these, one after another.
#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot set up its scene must fail"
)]

mod machine;
mod pods;
mod rights;
