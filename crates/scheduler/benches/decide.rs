//! How long a decision takes, for 10, 100 and 1000 endpoints with prefill and decode apart, and a prompt of 2048 blocks
//! that everybody, half of them, or nobody has, by upstream's sample plan and by ours; and how long if every plugin is
//! timed, which `baton epp` does for one decision in thirteen:
//! `cargo bench -p baton-scheduler --bench decide`.

use baton_scheduler::config::load;
use baton_scheduler::{
    Endpoint, EndpointId, Identity, Load, Observer, Plan, PrefixIndex, PromptHasher, Request, Role,
    Scheduler, Step,
};
use std::time::{Duration, Instant};

const PLANS: [(&str, &str); 2] = [
    ("upstream", include_str!("../tests/configs/pd.yaml")),
    (
        "least work",
        include_str!("../tests/configs/least-work.yaml"),
    ),
];
const BLOCKS: usize = 2048;

fn plan(text: &str) -> Plan {
    let value = serde_norway::from_str(text).expect("the file is YAML");
    load(&value).expect("the file makes sense").plan
}

/// A quarter prefill, the rest decode, with loads that differ.
fn fleet(n: u32) -> Vec<Endpoint> {
    let endpoint = |i: u32| {
        let role = if i.is_multiple_of(4) {
            Role::Prefill
        } else {
            Role::Decode
        };
        let labels = [("llm-d.ai/role".into(), role.name().into())];
        Endpoint {
            load: Load {
                waiting: i * 7 % 13,
                running: i * 5 % 31,
                active: i * 11 % 37,
                queued_work: f64::from(i * 1009 % 9973),
                pace: Some(20_000.0),
                kv_usage: (i * 3 % 89) as f32 / 100.0,
                ..Load::default()
            },
            models: Some(["org/model".into()].into()),
            identity: Identity::new(format!("ns/pod-{i}-rank-0"), labels).into(),
            ..Endpoint::new(EndpointId(i), role)
        }
    };
    (0..n).map(endpoint).collect()
}

/// Median and 99th percentile of `n` calls.
fn measure(n: usize, mut call: impl FnMut(u64)) -> (Duration, Duration) {
    let time = |i| {
        let start = Instant::now();
        call(i as u64);
        start.elapsed()
    };
    let mut times: Vec<Duration> = (0..n).map(time).collect();
    times.sort_unstable();
    (times[n / 2], times[n * 99 / 100])
}

#[expect(clippy::print_stdout, reason = "that is what it is for")]
fn main() {
    println!("plan        endpoints  shared   median       p99     timed");
    for (name, text) in PLANS {
        for n in [10, 100, 1000] {
            for (shared, every) in [("0 %", 0), ("50 %", 2), ("100 %", 1)] {
                let (median, p99) = decisions(plan(text), n, every, || ());
                let (timed, _) = decisions(plan(text), n, every, Timed::default);
                println!(
                    "{name:<10} {n:>10}  {shared:>6}  {median:>7.1?}  {p99:>8.1?}  {timed:>8.1?}"
                );
            }
        }
    }
}

/// Looks at the clock after every plugin.
struct Timed {
    last: Instant,
    took: Vec<(Step, Duration)>,
}

impl Default for Timed {
    fn default() -> Self {
        Self {
            last: Instant::now(),
            took: Vec::new(),
        }
    }
}

impl Observer for Timed {
    fn did(&mut self, step: Step) {
        let now = Instant::now();
        self.took.push((step, now - self.last));
        self.last = now;
    }
}

/// Decisions of `n` endpoints, of which every so many'th has the prompt, each with an observer of its own.
fn decisions<O: Observer>(
    plan: Plan,
    n: u32,
    every: u32,
    observer: impl Fn() -> O,
) -> (Duration, Duration) {
    let hasher = PromptHasher::new(7).with_blocks(&plan.approximate);
    let block_bytes = 4 * plan.approximate.block_tokens as usize;
    let mut scheduler = Scheduler::new(plan, PrefixIndex::new(31_250));
    let fleet = fleet(n);
    let text = vec![b'x'; BLOCKS * block_bytes];
    let prompt = hasher.prompt("org/model", &[&text], None);
    for endpoint in fleet
        .iter()
        .filter(|e| every > 0 && e.id.0.is_multiple_of(every))
    {
        scheduler.answered(&prompt, endpoint.id);
    }
    // A little more than what is cached, so that prefill is asked for.
    let longer = [&text[..], &[b'y'; 4096]];
    let prompt = hasher.prompt("org/model", &longer, None);
    let request = Request {
        model: Some("org/model"),
        ..Request::new(&prompt)
    };
    measure(1000, |turn| {
        let decision = scheduler.decide_observed(&fleet, &request, turn, &mut observer());
        assert!(decision.is_ok_and(|d| d.prefill.server().is_some()));
    })
}
