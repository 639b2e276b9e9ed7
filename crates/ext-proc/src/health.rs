//! gRPC's health protocol (`grpc.health.v1.Health`): `Check` and `List`, answered by whoever knows.

use bytes::{Buf, Bytes};
use prost::Message;
use std::fmt;
use std::sync::Arc;

/// Path of a question about one service.
pub(crate) const CHECK: &str = "/grpc.health.v1.Health/Check";
/// Path of a question about all services.
pub(crate) const LIST: &str = "/grpc.health.v1.Health/List";

/// Whether a service can be used; the numbers are the protocol's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServingStatus {
    /// It can.
    Serving = 1,
    /// It cannot now.
    NotServing = 2,
    /// There is no such service.
    Unknown = 3,
}

type Check = dyn Fn(&str) -> ServingStatus + Send + Sync;

/// Knows how services are. Cheap to clone.
#[derive(Clone)]
pub struct Health {
    check: Arc<Check>,
    listed: &'static [&'static str],
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Health")
            .field("listed", &self.listed)
            .finish_non_exhaustive()
    }
}

impl Health {
    /// `check` is asked by a service's name, which may be any text; `listed` are the names that `List` tells of.
    pub fn new(
        listed: &'static [&'static str],
        check: impl Fn(&str) -> ServingStatus + Send + Sync + 'static,
    ) -> Self {
        Self {
            check: Arc::new(check),
            listed,
        }
    }

    /// Answers a `HealthCheckRequest`; nothing if it is none.
    pub(crate) fn check(&self, request: impl Buf) -> Option<Bytes> {
        let request = CheckRequest::decode(request).ok()?;
        Some(self.status(&request.service).encode_to_vec().into())
    }

    /// Answers a `HealthListRequest`, which says nothing.
    pub(crate) fn list(&self) -> Bytes {
        let statuses = self.listed.iter().map(|name| Entry {
            name: (*name).to_owned(),
            status: Some(self.status(name)),
        });
        let list = ListResponse {
            statuses: statuses.collect(),
        };
        list.encode_to_vec().into()
    }

    fn status(&self, service: &str) -> CheckResponse {
        CheckResponse {
            status: (self.check)(service) as i32,
        }
    }
}

#[derive(Clone, PartialEq, Message)]
struct CheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct CheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[derive(Clone, PartialEq, Message)]
struct ListResponse {
    #[prost(message, repeated, tag = "1")]
    statuses: Vec<Entry>,
}

/// An entry of the map from names to statuses.
#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    status: Option<CheckResponse>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_asked_about_by_name_and_all_are_listed() {
        let health = Health::new(&["liveness", "readiness"], |name| match name {
            "readiness" => ServingStatus::NotServing,
            "liveness" => ServingStatus::Serving,
            _ => ServingStatus::Unknown,
        });
        let ask = |name: &str| {
            let request = CheckRequest {
                service: name.to_owned(),
            };
            let answer = health.check(&request.encode_to_vec()[..]).unwrap();
            CheckResponse::decode(answer).unwrap().status
        };
        assert_eq!((ask("liveness"), ask("readiness"), ask("")), (1, 2, 3));
        assert!(health.check(&b"\xff"[..]).is_none());
        let list = ListResponse::decode(health.list()).unwrap().statuses;
        let list: Vec<_> = list
            .iter()
            .map(|e| (&e.name[..], e.status.unwrap().status))
            .collect();
        assert_eq!(list, [("liveness", 1), ("readiness", 2)]);
    }
}
