//! The model servers there are and how busy each is, for everybody who sends requests to them.
//!
//! [`Fleet`] owns the list and the scheduler, and decides: [`Fleet::route`] gives the servers of a request, counted as
//! busy until they are dropped. The list comes from whoever knows it, through [`Fleet::set_endpoints`]: a file
//! ([`EndpointsFile`]), Kubernetes, a configuration. [`watch`] asks every server on it how it is. Nothing here knows
//! Envoy, Kubernetes or what a request looks like.
//! Invariants: what is in flight is counted by values that end the count when dropped; of an endpoint that has left the
//! list nothing is kept but what still is in flight there; nothing that a server says makes this fail or grow.
#![forbid(unsafe_code)]

mod admission;
mod breaker;
mod discovery;
mod endpoint;
mod exposition;
mod fleet;
mod flow_metrics;
pub mod headers;
mod probe;
mod pulse;
mod server;

pub use admission::{Admission, Asking, Eviction, Permit, Queue, Surroundings, Witness};
pub use discovery::{BoxError, EndpointsFile, FileError, MAX_FILE_BYTES, parse as parse_file};
pub use endpoint::{Address, AddressError, EndpointSpec, Labels, ROLE_LABEL};
pub use exposition::{Reader, Scraped, Wanted, adapters};
pub use fleet::{Fleet, ListError, MAX_ENDPOINTS, Note, Route, Servers};
pub use flow_metrics::FlowMetrics;
pub use probe::{Probing, ProbingError, watch};
pub use server::{Elsewhere, Flight, Server};
