//! The same beside the real thing: `make test-cluster` starts a control plane and runs these, one after another.

mod machine;
mod pods;
mod rights;
