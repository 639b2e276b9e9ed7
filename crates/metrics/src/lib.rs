//! What every service that is measured needs: series under names that are constants, labels that clients cannot multiply,
//! and the page that Prometheus reads. What is measured, and under which name, is each service's own.
#![forbid(unsafe_code)]

mod series;

pub use series::{Known, Whose};

use parking_lot::RwLock;
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{Registry, TextEncoder};
use std::collections::HashSet;

/// What stands for all names that are too many, or too long.
pub const OTHER: &str = "other";
/// Most names of one kind that become labels, over all the time that a process runs.
const MAX_NAMES: usize = 1000;
/// Longest name that does, in bytes.
const MAX_NAME: usize = 256;

/// Registers a collector that was made of constants.
///
/// # Panics
/// If its name is not valid, or is registered already: both are slips in the program.
pub fn registered<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: prometheus::Result<C>,
) -> C {
    let collector = collector.expect("names are constants and valid");
    registry
        .register(Box::new(collector.clone()))
        .expect("names are unique");
    collector
}

/// `families` as Prometheus' text.
#[must_use]
pub fn text(families: &[MetricFamily]) -> String {
    let mut text = String::new();
    if let Err(error) = TextEncoder::new().encode_utf8(families, &mut text) {
        tracing::error!(%error, "metrics cannot be written");
    }
    text
}

/// Names that have labels of their own: clients may make up any number, and only so many do.
#[derive(Debug, Default)]
pub struct Names(RwLock<HashSet<Box<str>>>);

impl Names {
    /// The label of `name`: itself, or [`OTHER`].
    #[must_use]
    pub fn label<'a>(&self, name: &'a str) -> &'a str {
        if self.0.read().contains(name) {
            return name;
        }
        let mut known = self.0.write();
        if !known.contains(name) {
            if known.len() >= MAX_NAMES || name.len() > MAX_NAME {
                return OTHER;
            }
            known.insert(name.into());
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus::IntCounter;

    #[test]
    fn names_that_clients_make_up_end_in_one_label() {
        let names = Names::default();
        for i in 0..2 * MAX_NAMES {
            let name = i.to_string();
            let label = if i < MAX_NAMES { &*name } else { OTHER };
            assert_eq!(names.label(&name), label);
        }
        assert_eq!(names.label("7"), "7");
        assert_eq!(Names::default().label(&"x".repeat(MAX_NAME + 1)), OTHER);
    }

    #[test]
    fn what_is_registered_is_on_the_page() {
        let registry = Registry::new();
        registered(&registry, IntCounter::new("a_total", "A.")).inc();
        assert!(text(&registry.gather()).contains("\na_total 1\n"));
    }
}
