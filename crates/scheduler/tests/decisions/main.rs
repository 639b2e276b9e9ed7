//! Configurations and what they decide, as text: every formula of every plugin, by its numbers.
//!
//! A scenario is a list of lines, done in order:
//! ```text
//! NAME ROLE [waiting N] [running N] [active N] [tokens N] [work F] [pace F] [kv F] [stale] [down]
//!     [label K=V] [loras a,b/c/MAX]
//! has NAME TEXT*N                      the server has computed this prompt
//! reports NAME TEXT*N [host]           it says so, of its device's or its host's memory
//! ask TEXT*N [OPTION VALUE]... => d0 | d0 + p0 | d0, no prefill server | ... | busy | nobody | not cached
//! why PROFILE NAME => SCORER VALUE, ... = TOTAL | dropped by FILTER
//! ```
//! ROLE is a label's value, or `-` for none. Every scorer's value is before its weight. `ask` remembers nothing unless it
//! ends in `and sent`. Options: model, target, avoid, subset, selection (lists with commas), session, chat, multimodal, if (`if
//! cached`), turn, at.

#![expect(clippy::unwrap_used, reason = "a test may fail by panicking")]

mod world;

use baton_scheduler::config::load;
use baton_scheduler::{
    Endpoint, EndpointId, Health, Load, Plan, PrefixIndex, PromptHasher, Request, Role, Scheduler,
};
use proptest::prelude::*;
use world::check;

/// One profile with these plugins, `TYPE [WEIGHT] [PARAMETERS]` a line, and `max-score-in-turn-picker` unless one is there.
fn one_profile(plugins: &str) -> String {
    let mut list = String::new();
    let mut profile = String::new();
    for line in plugins.lines().map(str::trim).filter(|l| !l.is_empty()) {
        let (head, parameters) = line.split_once(" {").unwrap_or((line, "}"));
        let (kind, weight) = head.split_once(' ').unwrap_or((head, "1"));
        list += &format!("- {{type: {kind}, parameters: {{{parameters}}}\n");
        let weight = if kind.ends_with("scorer") || kind == "context-length-aware" {
            format!(", weight: {weight}")
        } else {
            String::new()
        };
        if !kind.contains("producer") && !kind.contains("handler") {
            profile += &format!("  - {{pluginRef: {kind}{weight}}}\n");
        }
    }
    if !plugins.contains("picker") {
        list += "- {type: max-score-in-turn-picker}\n";
    }
    format!(
        "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n{list}\
         schedulingProfiles:\n- name: default\n  plugins:\n{profile}"
    )
}

const PD: &str = include_str!("../configs/pd.yaml");
const PD_FIRST: &str = include_str!("../configs/pd-first-generation.yaml");
const PD_SECOND: &str = include_str!("../configs/pd-second-generation.yaml");
const FLOW: &str = include_str!("../configs/flow-control.yaml");

#[test]
fn prefill_and_decode_apart() {
    check(
        PD,
        "d0 decode active 4 kv 0.25
         d1 - active 1 kv 0.5
         p0 prefill waiting 3
         p1 prefill waiting 1
         ask story*511 => d1
         ask story*512 => d1 + p1
         why decode d0 => prefix-cache-scorer 0, active-request-scorer 0, kv-cache-utilization-scorer 0.75 = 0.75
         why decode d1 => prefix-cache-scorer 0, active-request-scorer 0.75, kv-cache-utilization-scorer 0.5 = 2
         why decode p0 => dropped by decode-filter
         why prefill p0 => prefix-cache-scorer 0, queue-scorer 0 = 0
         why prefill p1 => prefix-cache-scorer 0, queue-scorer 1 = 2
         why prefill d1 => dropped by prefill-filter
         has d1 story*1024
         has p0 story*1600
         ask story*1600 => d1 + p0
         why decode d1 => prefix-cache-scorer 0.64, active-request-scorer 0.75, kv-cache-utilization-scorer 0.5 = 3.28
         why prefill p0 => prefix-cache-scorer 1, queue-scorer 0 = 3
         ask story*1535 => d1
         p0 prefill down
         p1 prefill down
         ask story*1600 => d1, no prefill server
         d0 decode down
         d1 decode down
         ask story*1600 => nobody",
    );
}

#[test]
fn the_first_generation_splits_every_prompt() {
    check(
        PD_FIRST,
        "d0 decode waiting 2
         d1 decode waiting 6
         p0 prefill waiting 9
         p1 prefill waiting 7
         ask short*1 => d0 + p1
         why decode d0 => queue-scorer 1 = 1
         why prefill p0 => queue-scorer 0 = 0",
    );
}

#[test]
fn the_second_generation_splits_what_is_not_cached() {
    check(
        PD_SECOND,
        "d0 decode waiting 1
         d1 decode waiting 2
         p0 prefill
         ask short*15 => d0
         ask short*16 => d0 + p0
         has d1 story*640
         ask story*655 => d1
         why decode d1 => prefix-cache-scorer 1, queue-scorer 0 = 2
         ask story*656 => d1 + p0",
    );
}

#[test]
fn what_is_wanted_only_if_it_is_cached_goes_where_some_of_it_is_or_nowhere() {
    check(
        PD_SECOND,
        "d0 decode waiting 1
         d1 decode waiting 2
         p0 prefill
         ask story*640 if cached => not cached
         ask story*640 if cached and sent => not cached
         ask story*640 => d0 + p0
         has p0 story*640
         ask story*640 if cached => not cached
         has d1 story*640
         ask story*640 if cached => d1
         ask story*960 if cached => d1 + p0
         ask story*63 if cached => not cached",
    );
    check(
        PRECISE,
        "a - waiting 1
         b - waiting 0
         has a story*1280
         ask story*1280 if cached => not cached
         reports a story*64
         ask story*1280 if cached => not cached
         reports a story*1280
         ask story*1280 if cached => a",
    );
}

#[test]
fn the_default_sums_queue_memory_and_prefix() {
    check(
        FLOW,
        "a - waiting 0 kv 0.9
         b - waiting 4 kv 0.1
         c - waiting 2 kv 0.5
         ask story*640 => a
         why default a => queue-scorer 1, kv-cache-utilization-scorer 0.1, prefix-cache-scorer 0 = 2.2
         why default b => queue-scorer 0, kv-cache-utilization-scorer 0.9, prefix-cache-scorer 0 = 1.8
         why default c => queue-scorer 0.5, kv-cache-utilization-scorer 0.5, prefix-cache-scorer 0 = 2",
    );
}

const PRECISE: &str = include_str!("../configs/precise.yaml");

#[test]
fn what_servers_report_draws_prompts() {
    check(
        PRECISE,
        "a - waiting 1
         b - waiting 0
         c - waiting 2
         has b story*1280
         reports a story*640
         reports c story*640 host
         ask story*1280 => a
         why default a => prefix-cache-scorer 0.5, queue-scorer 0.5 = 2
         why default b => prefix-cache-scorer 0, queue-scorer 1 = 1
         why default c => prefix-cache-scorer 0.4, queue-scorer 0 = 1.2
         ask other*1280 at 10 and sent => b
         b - waiting 9
         ask other*1280 at 11 => b
         ask other*1280 at 14 => a",
    );
}

#[test]
fn the_decider_knows_what_servers_report() {
    let yaml = one_profile("precise-prefix-cache-producer {tokenProcessorConfig: {blockSizeTokens: 64}}\ndecode-filter")
        .replace(
            "schedulingProfiles:",
            "- {name: d, type: prefix-based-pd-decider, parameters: {nonCachedTokens: 512}}
- {type: disagg-profile-handler, parameters: {profiles: {decode: default}, deciders: {prefill: d}}}
- {type: prefill-filter}
schedulingProfiles:
- {name: prefill, plugins: [{pluginRef: prefill-filter}]}",
        );
    check(
        &yaml,
        "d0 decode
         p0 prefill
         has d0 story*1280
         ask story*1280 => d0 + p0
         reports d0 story*832
         ask story*1280 => d0
         ask story*1344 => d0 + p0",
    );
}

#[test]
fn few_waiting_running_or_active_requests_are_good() {
    check(
        &one_profile("queue-scorer\nrunning-requests-size-scorer\nactive-request-scorer {idleThreshold: 2, maxBusyScore: 0.5}"),
        "a - waiting 0 running 8 active 8
         b - waiting 3 running 6 active 9
         c - waiting 4 running 4 active 2
         ask x*1 => c
         why default a => queue-scorer 1, running-requests-size-scorer 0, active-request-scorer 0.056 = 1.056
         why default b => queue-scorer 0.25, running-requests-size-scorer 0.5, active-request-scorer 0 = 0.75
         why default c => queue-scorer 0, running-requests-size-scorer 1, active-request-scorer 1 = 2",
    );
}

#[test]
fn what_a_server_said_long_ago_counts_as_the_worst() {
    check(
        &one_profile("queue-scorer\nkv-cache-utilization-scorer\nload-aware-scorer\nrunning-requests-size-scorer"),
        "a - stale
         b - waiting 3 kv 0.9 running 4
         ask x*1 => b
         why default a => queue-scorer 0, kv-cache-utilization-scorer 0, load-aware-scorer 0, running-requests-size-scorer 0 = 0
         why default b => queue-scorer 1, kv-cache-utilization-scorer 0.1, load-aware-scorer 0.488, running-requests-size-scorer 1 = 2.588",
    );
}

#[test]
fn load_and_tokens_are_measured_against_thresholds() {
    check(
        &one_profile(
            "load-aware-scorer {threshold: 10}\ntoken-load-scorer {queueThresholdTokens: 1000}",
        ),
        "a - waiting 0 tokens 250
         b - waiting 4 tokens 0
         c - waiting 99 tokens 5000
         ask x*1 => b
         why default a => load-aware-scorer 0.5, token-load-scorer 0.75 = 1.25
         why default b => load-aware-scorer 0.3, token-load-scorer 1 = 1.3
         why default c => load-aware-scorer 0, token-load-scorer 0 = 0",
    );
}

#[test]
fn adapters_draw_their_requests() {
    check(
        &one_profile("lora-affinity-scorer"),
        "a - loras x,y//2
         b - loras y//4
         c - loras y/x/2
         d - loras y,z//2
         e -
         ask t*1 model x => a
         why default a => lora-affinity-scorer 1 = 1
         why default b => lora-affinity-scorer 0.8 = 0.8
         why default c => lora-affinity-scorer 0.6 = 0.6
         why default d => lora-affinity-scorer 0 = 0
         why default e => lora-affinity-scorer 0 = 0
         ask t*1 model base target z => d",
    );
}

#[test]
fn long_matches_count_more_if_that_is_asked_for() {
    check(
        &one_profile(
            "prefix-cache-scorer {matchLengthWeight: 0.5, matchLengthScaleTokens: 1024}\napprox-prefix-cache-producer {autoTune: false, blockSizeTokens: 64}",
        ),
        "a -
         b -
         has a story*512
         has b story*1024
         ask story*2048 => b
         why default a => prefix-cache-scorer 0.25 = 0.25
         why default b => prefix-cache-scorer 0.75 = 0.75",
    );
}

const LEAST_WORK: &str = include_str!("../configs/least-work.yaml");

#[test]
fn the_first_token_comes_soonest_where_the_least_is_to_be_done_before_it() {
    // A token counts more at a long context: 1280 of 1280 at 26,000 to double are 1311.5, the last 640 are 663.6.
    check(
        &one_profile(
            "least-work-scorer {queuedTokenWeight: 0.5, tokensPerRequest: 10, doubleWorkAtTokens: 26000}
             approx-prefix-cache-producer {autoTune: false, blockSizeTokens: 64}",
        ),
        "a - work 400
         b - active 6
         c -
         has a story*640
         ask story*1280 => a
         why default a => least-work-scorer 1 = 1
         why default b => least-work-scorer 0 = 0
         why default c => least-work-scorer 0.118 = 0.118
         a - work 4000
         ask story*1280 => c
         why default b => least-work-scorer 0.956 = 0.956
         ask story*1280 avoid a,b => c
         why default c => least-work-scorer 1 = 1",
    );
}

#[test]
fn our_own_way_weighs_a_wait_against_what_is_cached() {
    check(
        LEAST_WORK,
        "d0 decode
         d1 decode
         p0 prefill
         p1 prefill
         has d0 story*6400
         ask story*6480 => d0
         d0 decode work 150000
         ask story*6480 => d0
         d0 decode work 200000
         ask story*6480 => d1 + p0
         has p1 story*6400
         ask story*6480 => d1 + p1
         why decode d0 => least-work-scorer 0 = 0
         why prefill p0 => least-work-scorer 0 = 0
         d0 decode active 1
         d1 decode
         ask new*100 => d1
         ask new*128 => d1 + p0",
    );
}

#[test]
fn a_prefill_server_is_used_when_that_is_expected_to_be_sooner() {
    let sooner = LEAST_WORK
        .replace("prefix-based-pd-decider", "sooner-pd-decider")
        .replace(
            "nonCachedTokens: 128",
            "nonCachedTokens: 128, handOver: 100ms, kvMicrosecondsPerToken: 50, delayWeight: 0.5",
        );
    // 1000 tokens take about 0.1 s at a pace of 10,000.
    check(
        &sooner,
        "d0 decode pace 10000
         p0 prefill pace 10000
         ask new*1000 => d0
         d0 decode pace 10000 active 4
         ask new*1000 => d0 + p0
         ask new*127 => d0
         p0 prefill pace 10000 work 9000
         ask new*1000 => d0
         d0 decode pace 10000 work 12000
         ask new*1000 => d0 + p0
         p0 prefill
         d0 decode
         ask new*1000 => d0
         p0 prefill pace 30000
         d0 decode pace 2000
         ask new*1000 => d0 + p0
         has p0 long*64000
         d0 decode pace 100000
         p0 prefill pace 100000
         ask long*64000 => d0",
    );
}

#[test]
fn cold_prompts_go_where_no_prompt_went_for_the_longest_time() {
    check(
        &one_profile("no-hit-lru-scorer"),
        "a -
         b -
         c -
         ask one*640 and sent => a
         ask two*640 and sent => b
         ask six*640 and sent => c
         ask ten*640 => a
         why default a => no-hit-lru-scorer 1 = 1
         why default b => no-hit-lru-scorer 0.5 = 0.5
         why default c => no-hit-lru-scorer 0 = 0
         ask two*640 turn 2 and sent => c
         why default b => no-hit-lru-scorer 0.5 = 0.5
         ask ten*640 => a",
    );
}

#[test]
fn a_session_stays_where_it_was() {
    check(
        &one_profile("session-affinity-scorer"),
        "a -
         b -
         ask x*1 session ns/b => b
         why default a => session-affinity-scorer 0 = 0
         ask x*1 session ns/gone => a
         ask x*1 => a",
    );
    check(
        &one_profile(
            "session-affinity-scorer {strategy: session_id, sessionIdConfig: {evictionTtlSeconds: 10}}",
        ),
        "a -
         b -
         ask x*1 chat one at 5 turn 1 and sent => b
         ask x*1 chat one at 14 => b
         ask x*1 chat two at 14 => a
         ask x*1 chat one at 15 => a",
    );
    check(
        &one_profile("session-affinity-filter"),
        "a -
         b -
         ask x*1 session ns/b => b
         why default a => dropped by session-affinity-filter
         b - down
         ask x*1 session ns/b => a",
    );
}

#[test]
fn contexts_go_to_servers_of_their_length() {
    let servers = "a -
         b - label llm-d.ai/context-length-range=0-1000
         c - label llm-d.ai/context-length-range=0-10000
         d - label llm-d.ai/context-length-range=400-400
         e - label llm-d.ai/context-length-range=long";
    check(
        &one_profile("context-length-aware"),
        &format!(
            "{servers}
         ask x*400 => d
         why default a => context-length-aware 0.5 = 0.5
         why default b => context-length-aware 0.871 = 0.871
         why default c => context-length-aware 0.747 = 0.747
         why default d => context-length-aware 1 = 1
         why default e => context-length-aware 0 = 0
         ask x*3000 => c
         why default b => context-length-aware 0.1 = 0.1"
        ),
    );
    check(
        &one_profile("context-length-aware {enableFiltering: true}"),
        &format!(
            "{servers}
         ask x*3000 => c
         why default a => context-length-aware 0.5 = 0.5
         why default b => dropped by context-length-aware
         why default e => dropped by context-length-aware"
        ),
    );
}

#[test]
fn without_predictions_latency_is_memory_queue_and_prefix() {
    check(
        &one_profile(
            "latency-scorer {compositeKVWeight: 1, compositeQueueWeight: 2, compositePrefixWeight: 1}",
        ),
        "a - waiting 0 kv 0.5
         b - waiting 3 kv 0.1
         has b story*320
         ask story*640 => a
         why default a => latency-scorer 0.63 = 0.63
         why default b => latency-scorer 0.35 = 0.35",
    );
}

#[test]
fn filters_keep_whom_labels_say() {
    check(
        &one_profile("by-label {label: zone, validValues: [x, y]}"),
        "a - label zone=x
         b - label zone=z
         c -
         ask t*1 => a
         why default b => dropped by by-label
         why default c => dropped by by-label
         a - label zone=q
         ask t*1 => nobody",
    );
    check(
        &one_profile(
            "label-selector-filter {matchLabels: {app: m}, matchExpressions: [{key: zone, operator: NotIn, values: [x]}, {key: gpu, operator: Exists}, {key: old, operator: DoesNotExist}]}",
        ),
        "a - label app=m label zone=x label gpu=1
         b - label app=m label gpu=1
         c - label app=m label zone=y
         d - label app=m label gpu=1 label old=1
         ask t*1 => b
         why default a => dropped by label-selector-filter
         why default c => dropped by label-selector-filter
         why default d => dropped by label-selector-filter",
    );
}

#[test]
fn busy_servers_are_left_alone() {
    check(
        &one_profile("utilization-detector {queueDepthThreshold: 4}\nqueue-scorer"),
        "a - waiting 4
         b - waiting 3 kv 0.8
         c - waiting 3 kv 0.7
         d - stale
         ask x*1 => c
         why default a => dropped by utilization-detector
         why default b => dropped by utilization-detector
         why default d => dropped by utilization-detector
         c - waiting 5
         ask x*1 => b",
    );
    check(
        &one_profile("concurrency-detector {maxConcurrency: 2, headroom: 0.5}"),
        "a - active 3
         b - active 2
         ask x*1 => b
         b - active 3
         ask x*1 => busy",
    );
    check(
        &one_profile(
            "utilization-filter {conditions: [{metric: waiting-queue, maxValue: 2}, {metric: kv-cache-utilization, maxValue: 0.5}]}",
        ),
        "a - waiting 3
         b - kv 0.6
         c - waiting 2 kv 0.5
         ask x*1 => c
         c - stale
         ask x*1 => busy",
    );
}

#[test]
fn servers_with_most_of_the_prompt_keep_it() {
    check(
        &one_profile(
            "prefix-cache-affinity-filter {affinityThreshold: 0.8, explorationProbability: 0}\nqueue-scorer",
        ),
        "a - waiting 9
         b - waiting 0
         has a story*640
         ask story*768 => a
         why default b => dropped by prefix-cache-affinity-filter
         ask story*832 => b
         ask other*640 => b",
    );
}

#[test]
fn candidates_may_be_named() {
    check(
        &one_profile("header-based-testing-filter"),
        "a -
         b -
         ask x*1 selection b => b
         ask x*1 => nobody",
    );
    check(
        &one_profile("queue-scorer"),
        "a -
         b -
         c -
         ask x*1 subset b,c => b
         why default a => no candidate
         ask x*1 subset b,c avoid b => c
         ask x*1 subset - => nobody",
    );
}

#[test]
fn several_endpoints_may_be_picked() {
    check(
        &one_profile("queue-scorer\nmax-score-picker {maxNumOfEndpoints: 2}"),
        "a - waiting 4
         b - waiting 1
         c - waiting 2
         ask x*1 => b, then c",
    );
}

#[test]
fn one_port_may_stand_for_all_ranks() {
    check(
        &one_profile("queue-scorer\ndata-parallel-profile-handler {primaryPort: 9000}"),
        "a - waiting 1
         b -
         ask x*1 => b by 9000",
    );
}

/// A handler with these parameters over profiles `decode`, `prefill` and `encode`, each with its filter.
fn stages(parameters: &str) -> String {
    format!(
        "apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: decode-filter
- type: prefill-filter
- type: encode-filter
- type: queue-scorer
- type: max-score-in-turn-picker
- {{name: always, type: always-disagg-pd-decider}}
- {{name: pictures, type: always-disagg-multimodal-decider}}
- {{name: by-prefix, type: prefix-based-pd-decider, parameters: {{nonCachedTokens: 64, promptTokens: 1000}}}}
- {{type: disagg-profile-handler, parameters: {{{parameters}}}}}
schedulingProfiles:
- {{name: decode, plugins: [{{pluginRef: decode-filter}}, {{pluginRef: queue-scorer}}]}}
- {{name: prefill, plugins: [{{pluginRef: prefill-filter}}, {{pluginRef: queue-scorer}}]}}
- {{name: encode, plugins: [{{pluginRef: encode-filter}}]}}
"
    )
}

#[test]
fn pictures_are_encoded_elsewhere() {
    check(
        &stages("deciders: {prefill: by-prefix, encode: pictures}"),
        "d0 decode
         p0 prefill
         e0 encode
         ask x*100 => d0
         ask x*100 multimodal yes => d0 & e0
         ask x*1000 multimodal yes => d0 & e0 + p0
         ask x*999 => d0
         e0 encode down
         ask x*1000 multimodal yes => d0 + p0",
    );
}

#[test]
fn a_missing_prefill_server_may_be_a_reason_to_refuse() {
    check(
        &stages("deciders: {prefill: always}, onUnavailable: fail"),
        "d0 decode
         ask x*1 => no prefill
         p0 prefill
         ask x*1 => d0 + p0",
    );
}

#[test]
fn prefill_may_come_first_and_is_then_not_asked_about() {
    check(
        &stages("deciders: {prefill: by-prefix}, stageOrder: prefill-first"),
        "d0 decode
         p0 prefill
         ask x*1 => d0 + p0
         p0 prefill down
         ask x*1 => d0, no prefill server",
    );
}

#[test]
fn a_server_of_both_roles_does_not_fetch_from_itself() {
    check(
        &stages("deciders: {prefill: always}"),
        "b0 both waiting 0
         b1 prefill-decode waiting 2
         ask x*1 => b0 itself
         p0 prefill
         ask x*1 turn 1 => b0 + p0",
    );
}

#[test]
fn servers_of_two_versions_exchange_nothing() {
    let servers = "d0 decode label version=2
         p0 prefill label version=1
         p1 prefill label version=2 waiting 9
         p2 prefill waiting 5";
    let with = |order: &str| {
        stages(&format!(
            "deciders: {{prefill: always}}, stageOrder: {order}, compatibilityLabel: version"
        ))
    };
    check(
        &with("decode-first"),
        &format!("{servers}\nask x*1 => d0 + p1"),
    );
    check(
        &with("prefill-first"),
        &format!(
            "{servers}
             ask x*1 => d0, no prefill server
             d1 decode label version=1 waiting 9
             ask x*1 => d1 + p0"
        ),
    );
}

#[test]
fn sheddable_requests_are_refused_when_servers_are_busy() {
    let fleet = |waiting| {
        let mut endpoint = Endpoint::new(EndpointId(0), Role::Decode);
        endpoint.load.waiting = waiting;
        [endpoint]
    };
    let refused = |yaml: &str, waiting, priority| {
        let plan = load(&serde_norway::from_str(yaml).unwrap()).unwrap().plan;
        let scheduler = Scheduler::new(plan, PrefixIndex::new(1));
        let fleet = fleet(waiting);
        let asks = (0..1000).map(|chance| scheduler.admit(&fleet, priority, chance));
        asks.filter(Result::is_err).count()
    };
    assert_eq!([-1, 0, 7].map(|p| refused(PD, 5, p)), [1000, 0, 0]);
    assert_eq!(refused(PD, 4, -1), 0);
    let perhaps = one_profile("queue-scorer\nprobabilistic-admitter {power: 1, k: 0.5}");
    let n = refused(&perhaps, 3, -1);
    assert!((250..350).contains(&n), "{n}");
}

fn any_endpoint(id: u32) -> impl Strategy<Value = Endpoint> {
    let role = prop::sample::select(vec![None, Some("prefill"), Some("decode"), Some("both")]);
    let load = (
        any::<u32>(),
        any::<u32>(),
        any::<u64>(),
        any::<f32>(),
        any::<bool>(),
    );
    (role, load, any::<bool>()).prop_map(move |(role, load, up)| {
        let mut endpoint = Endpoint::new(EndpointId(id), Role::of_label(role));
        if !up {
            endpoint.health = Health::Draining;
        }
        let (waiting, active, tokens, kv_usage, fresh) = load;
        endpoint.load = Load {
            waiting,
            running: active / 2,
            active: active.max(waiting),
            unseen: active / 3,
            tokens,
            queued_work: (tokens / 3) as f64,
            pace: fresh.then_some(f64::from(waiting)),
            kv_usage,
            fresh,
        };
        endpoint
    })
}

proptest! {
    #[test]
    fn the_order_of_endpoints_does_not_matter(
        fleet in (0u32..9).prop_flat_map(|n| (0..n).map(any_endpoint).collect::<Vec<_>>()).prop_shuffle(),
        which in 0usize..6, turn in any::<u64>(), texts in prop::collection::vec(0usize..4, 1..5),
    ) {
        let everything = one_profile(
            "queue-scorer\nrunning-requests-size-scorer\nactive-request-scorer\ntoken-load-scorer\nload-aware-scorer
             kv-cache-utilization-scorer\nprefix-cache-scorer\nno-hit-lru-scorer\nlatency-scorer\nleast-work-scorer\nutilization-detector
             weighted-random-picker {maxNumOfEndpoints: 2}",
        );
        let yaml = [PD, PD_FIRST, PD_SECOND, FLOW, LEAST_WORK, &everything][which];
        let plan: Plan = load(&serde_norway::from_str(yaml).unwrap()).unwrap().plan;
        let hasher = PromptHasher::new(1).with_blocks(&plan.approximate);
        let decide = |fleet: &[Endpoint]| {
            let mut scheduler = Scheduler::new(plan.clone(), PrefixIndex::new(1000));
            let one = |text: &usize| {
                let text = vec![b'a'; [0, 100, 3000, 6000][*text]];
                let prompt = hasher.prompt("m", &[&text], None);
                let request = Request::new(&prompt);
                let decided = scheduler.decide(fleet, &request, turn);
                if let Ok(decision) = &decided {
                    scheduler.sent(&request, decision);
                    scheduler.answered(&prompt, decision.decode);
                    assert!(decision.score.is_finite() && decision.uncached_tokens <= prompt.tokens());
                }
                decided
            };
            texts.iter().map(one).collect::<Vec<_>>()
        };
        let mut reversed = fleet.clone();
        reversed.reverse();
        prop_assert_eq!(decide(&fleet), decide(&reversed));
    }
}
