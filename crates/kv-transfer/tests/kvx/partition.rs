//! A network that is cut without a word to anybody: two namespaces, a wire between them that can be taken down. Needs root;
//! without it the test says so and passes.
#![cfg(target_os = "linux")]

use std::io::Write;
use std::process::{Command, id};

use crate::process::Process;

/// Two networks and a wire between them, slow enough to be cut in mid-transfer.
struct Wire {
    ends: [String; 2],
}

const ADDRESSES: [&str; 2] = ["10.213.0.1/24", "10.213.0.2/24"];
/// Megabits a second.
const SLOW: &str = "20mbit";

fn run(line: &str) -> bool {
    let mut words = line.split(' ');
    let mut command = Command::new(words.next().unwrap_or_default());
    let done = command.args(words).output();
    done.is_ok_and(|done| done.status.success())
}

impl Wire {
    /// `None` when the system does not let us.
    fn lay() -> Option<Self> {
        let ends = ["a", "b"].map(|end| format!("baton-kvx-{}-{end}", id()));
        let wire = Self { ends };
        let [a, b] = &wire.ends;
        let is_laid = run(&format!("ip netns add {a}"))
            && run(&format!("ip netns add {b}"))
            && run(&format!(
                "ip link add wire netns {a} type veth peer name wire netns {b}"
            ))
            && wire.ends.iter().zip(ADDRESSES).all(|(end, address)| {
                run(&format!("ip -n {end} addr add {address} dev wire"))
                    && run(&format!("ip -n {end} link set wire up"))
            })
            && run(&format!(
                "tc -n {a} qdisc add dev wire root tbf rate {SLOW} burst 32kbit latency 400ms"
            ));
        is_laid.then_some(wire)
    }

    /// Nothing gets through, and nobody is told.
    fn cut(&self) {
        assert!(run(&format!("ip -n {} link set wire down", self.ends[0])));
    }

    fn mend(&self) {
        assert!(run(&format!("ip -n {} link set wire up", self.ends[0])));
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for end in &self.ends {
            run(&format!("ip netns del {end}"));
        }
    }
}

#[test]
fn a_network_that_is_cut_is_noticed_by_both_sides_and_the_lease_outlives_it() {
    let Some(wire) = Wire::lay() else {
        let skipped = b"skipped: laying a wire between two networks takes root, ip and tc\n";
        return std::io::stderr().write_all(skipped).unwrap();
    };
    let [a, b] = &wire.ends;
    // Four seconds' worth.
    let (mut producer, params) = Process::producer("10.213.0.1:0", 2500, Some(a));
    let params = serde_json::to_string(&params).unwrap();
    let mut consumer = Process::start("consumer", Some(b));
    consumer.say("2000");
    consumer.say(&params);
    assert_eq!(consumer.hear(), "begun");
    wire.cut();
    assert_eq!(consumer.hear(), "timed_out");
    // Neither the lease nor the connections end because of their age there.
    producer.ask_until("how many?", "0 connections");
    wire.mend();
    // The consumer's link may have to pause first.
    loop {
        consumer.say(&params);
        assert_eq!(consumer.hear(), "begun");
        match consumer.hear().as_str() {
            "whole" => break,
            "connect" | "broken" | "timed_out" | "busy" => {}
            other => panic!("{other}"),
        }
    }
}
