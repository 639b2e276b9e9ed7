//! Several ways to choose servers under the same load, as a table.

use crate::{Line, Policy, Setup, Split, Workload, run};
use std::fmt::Write as _;

/// Runs that are compared.
#[derive(Clone, Debug)]
pub struct Study {
    /// The fleet; its `blocks` and `speed` are replaced.
    pub setup: Setup,
    /// KV blocks of a server, one table each.
    pub blocks: Vec<usize>,
    /// Parts of the fleet's capacity.
    pub loads: Vec<f64>,
    /// Ways to choose.
    pub policies: Vec<Policy>,
}

/// How many times as fast as it is recorded the fleet can do `load`: by how long it takes if all of it is there at once and
/// dealt out in turn, long prompts to prefill servers.
#[must_use]
pub fn capacity(load: &Workload, setup: &Setup) -> f64 {
    let all_at_once = Setup {
        speed: 1e12,
        split: Split::AtLeast(2048),
        ..setup.clone()
    };
    let seconds = run(load, &all_at_once, Policy::RoundRobin).last;
    load.seconds() / seconds.max(1e-9)
}

impl Study {
    /// Runs everything; `say` gets a line of text at a time.
    pub fn run(&self, load: &Workload, mut say: impl FnMut(&str)) {
        let setup = &self.setup;
        let fleet = match (setup.both, setup.prefill, setup.decode) {
            (n, 0, 0) => format!("{n} servers"),
            (0, p, d) => format!("{p} prefill and {d} decode servers"),
            (n, p, d) => format!("{n} servers, {p} prefill and {d} decode servers"),
        };
        say(&format!(
            "{}: {} requests, {:.1} % of their blocks came before; {fleet}",
            load.name,
            load.asks.len(),
            100.0 * load.ceiling()
        ));
        for &blocks in &self.blocks {
            let setup = Setup {
                blocks,
                ..setup.clone()
            };
            let capacity = capacity(load, &setup);
            let rate = load.asks.len() as f64 / load.seconds().max(1e-9) * capacity;
            say(&format!(
                "\n{blocks} blocks of {} tokens a server; capacity {rate:.2} requests/s",
                load.block_tokens
            ));
            say(&columns(&HEAD));
            for &part in &self.loads {
                let setup = Setup {
                    speed: part * capacity,
                    ..setup.clone()
                };
                for &policy in &self.policies {
                    let line = run(load, &setup, policy).line(load);
                    say(&columns(&row(part, policy.name(), &line)));
                }
            }
        }
    }
}

const HEAD: [&str; 15] = [
    "load",
    "policy",
    "cached",
    "busiest",
    "TTFT p50",
    "p90",
    "p99",
    "mean",
    "whole",
    "gap p50",
    "p99",
    "tokens/s",
    "split",
    "failed",
    "remembered",
];

fn row(load: f64, name: &str, line: &Line) -> [String; 15] {
    let percent = |part: f64, digits: usize| format!("{:.digits$} %", 100.0 * part);
    let seconds = |time: f64, digits: usize| format!("{time:.digits$} s");
    let millis = |time: f64| format!("{:.1} ms", 1e3 * time);
    [
        percent(load, 0),
        name.to_owned(),
        percent(line.cached, 1),
        format!("{:.2}", line.busiest),
        seconds(line.first[0], 3),
        seconds(line.first[1], 2),
        seconds(line.first[2], 2),
        seconds(line.first_mean, 2),
        seconds(line.whole_mean, 2),
        millis(line.gap[0]),
        millis(line.gap[1]),
        format!("{:.0}", line.rate),
        percent(line.split, 0),
        line.failed.to_string(),
        line.remembered.to_string(),
    ]
}

fn columns<T: AsRef<str>>(row: &[T; 15]) -> String {
    let widths = [5, 0, 8, 8, 10, 9, 9, 9, 9, 9, 9, 9, 7, 7, 11];
    let mut out = String::new();
    for (text, width) in row.iter().map(AsRef::as_ref).zip(widths) {
        // Writing to a string cannot fail. Names stand left, numbers right.
        let _ = match width {
            0 => write!(out, "  {text:<13}"),
            width => write!(out, "{text:>width$}"),
        };
    }
    out
}

#[cfg(test)]
mod tests;
