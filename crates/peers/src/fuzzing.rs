//! For the targets in `/fuzz`: what a peer that has proved itself may send.

use crate::hear::Hearer;
use baton_fleet::{Address, EndpointSpec, Fleet};
use baton_scheduler::{Policy, PrefixIndex, Scheduler};
use std::sync::Arc;

/// A fleet of two servers hears `bytes`.
pub fn hear(bytes: &[u8]) {
    let fleet = Fleet::new(Scheduler::new(Policy::default(), PrefixIndex::new(100)), 1);
    let spec = |name| Address::parse("127.0.0.1:1").map(|at| EndpointSpec::new(name, at));
    let specs: Result<Vec<_>, _> = ["a", "b"].into_iter().map(spec).collect();
    let listed = specs.map(|specs| fleet.set_endpoints(&specs));
    assert!(matches!(listed, Ok(Ok(()))), "two servers make a list");
    let fleet = Arc::new(fleet);
    let mut hearer = Hearer::new(fleet.clone(), true);
    let heard = hearer.hear(bytes);
    assert!(heard.is_err() || heard.is_ok_and(|n| n <= bytes.len()));
    drop(hearer);
    let idle = fleet.snapshot().iter().all(|e| e.load.active == 0);
    assert!(idle, "what was heard is forgotten");
}
