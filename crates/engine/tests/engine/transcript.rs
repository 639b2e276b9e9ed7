//! Scenarios as text: a transcript of commands (`>`) and what they lead to.
//!
//! `shape` sets the engine's numbers. `add a x6y3 max=2` adds sequence `a` with six tokens `x` and three `y`. A step shows its
//! rows as `name first..end`, with `+` where a token came out; `end a length 3/4` says that `a` ended after three tokens,
//! four of its prompt having been cached. Answers are compared with those of each sequence alone.

use crate::support::{Driver, Shape, sequence};
use baton_engine::{
    Beside, Event, FinishReason, Handover, NewSequence, PrefixCaching, Progress, SeqId,
};
use std::collections::BTreeMap;

pub(crate) fn check(transcript: &str) {
    let mut driver = None;
    let mut actual = Vec::new();
    for line in transcript.lines().map(str::trim) {
        if let Some(command) = line.strip_prefix("> ") {
            actual.push(line.to_owned());
            let words: Vec<&str> = command.split_whitespace().collect();
            if words[0] == "shape" {
                driver = Some(Driver::new(shape(&words[1..])));
            } else {
                let driver = driver.get_or_insert_with(|| Driver::new(Shape::default()));
                obey(driver, &words, &mut actual);
            }
        }
    }
    let expected = transcript
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty());
    if !expected.eq(actual.iter().map(String::as_str)) {
        panic!("it went otherwise:\n{}\n", actual.join("\n"));
    }
}

/// `key=value` words.
fn settings<'a>(words: &[&'a str]) -> impl Iterator<Item = (&'a str, u32)> {
    words.iter().map(|word| {
        let (key, value) = word.split_once('=').unwrap_or((word, "0"));
        (key, value.parse().unwrap())
    })
}

fn shape(words: &[&str]) -> Shape {
    let mut shape = Shape::default();
    for (key, value) in settings(words) {
        let n = value as usize;
        match key {
            "blocks" => shape.blocks = value,
            "size" => shape.block_size = value,
            "seqs" => shape.seqs = n,
            "tokens" => shape.tokens = n,
            "beside" => shape.beside = Beside::Tokens(n),
            "tail" => shape.tail = n,
            "chunk" => shape.chunk = n,
            "len" => shape.len = n,
            "waiting" => shape.waiting = n,
            "uncached" => shape.caching = PrefixCaching::Off,
            "always" => shape.eos = Some((value, 1)),
            _ => panic!("unknown {key}"),
        }
    }
    shape
}

fn obey(driver: &mut Driver, words: &[&str], out: &mut Vec<String>) {
    match *words {
        ["add", name, prompt, ref rest @ ..] => {
            if let Err(refusal) = driver.add(parse_sequence(id(name), prompt, rest)) {
                out.push(format!("refused: {refusal}"));
            }
        }
        ["step"] => step(driver, out),
        ["step", n] => (0..n.parse().unwrap()).for_each(|_| step(driver, out)),
        ["cancel", name] => driver.cancel(id(name)),
        ["arrive", name] => driver.arrive(id(name), u32::MAX),
        ["arrive", name, n] => driver.arrive(id(name), n.parse().unwrap()),
        ["fail", name] => driver.fail(id(name)),
        ["show", ref what @ ..] => out.push(show(driver, what)),
        _ => panic!("unknown command {words:?}"),
    }
}

fn id(name: &str) -> SeqId {
    SeqId(u64::from(name.as_bytes()[0]))
}

fn name(id: SeqId) -> char {
    char::from(id.0 as u8)
}

/// `x6y3`: six `x`, three `y`.
fn prompt(text: &str) -> Vec<u32> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(letter) = rest.chars().next() {
        let digits = rest[1..]
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(rest.len() - 1);
        let n: usize = rest[1..=digits].parse().unwrap();
        tokens.extend(std::iter::repeat_n(u32::from(letter), n));
        rest = &rest[1 + digits..];
    }
    tokens
}

fn parse_sequence(id: SeqId, text: &str, words: &[&str]) -> NewSequence {
    let mut new = sequence(id.0, &prompt(text), 100, Handover::None);
    for (key, value) in settings(words) {
        match key {
            "max" => new.limits.max_tokens = value,
            "min" => new.limits.min_tokens = value,
            "eos" => new.limits.eos = [value].into(),
            "stop" => new.limits.stop_token_ids = [value].into(),
            "ignore_eos" => new.limits.ignore_eos = true,
            "import" => new.handover = Handover::Import { n_tokens: value },
            "export" => new.handover = Handover::Export,
            _ => panic!("unknown {key}"),
        }
    }
    new
}

fn step(driver: &mut Driver, out: &mut Vec<String>) {
    let before: BTreeMap<_, _> = driver
        .live
        .iter()
        .map(|(id, live)| (*id, live.tokens()))
        .collect();
    let (progress, events) = driver.step();
    if progress == Progress::Idle {
        out.push("idle".to_owned());
    }
    let rows = rows(driver, before, &events);
    if !rows.is_empty() {
        out.push(rows.join(", "));
    }
    out.extend(events.iter().filter_map(describe));
}

/// Rows say nothing of whose they are; the tokens do.
fn rows(driver: &Driver, mut live: BTreeMap<SeqId, Vec<u32>>, events: &[Event]) -> Vec<String> {
    let mut rows = Vec::new();
    for row in driver.seen.lock().unwrap().iter() {
        let range = row.start..row.start + row.tokens.len();
        let whose = live
            .iter()
            .find(|(_, all)| all.get(range.clone()) == Some(&row.tokens));
        let id = *whose.expect("a row of a live sequence").0;
        live.remove(&id);
        let sampled = |e: &Event| matches!(e, Event::Token { seq, .. } if *seq == id);
        let plus = if events.iter().any(sampled) { "+" } else { "" };
        rows.push(format!("{} {}..{}{plus}", name(id), range.start, range.end));
    }
    rows
}

fn describe(event: &Event) -> Option<String> {
    match event {
        Event::FetchKv {
            seq,
            first_block,
            n_blocks,
        } => Some(format!("fetch {} {first_block}+{n_blocks}", name(*seq))),
        Event::Export {
            seq,
            blocks,
            n_tokens,
            ..
        } => Some(format!(
            "export {} {n_tokens} in {}",
            name(*seq),
            blocks.len()
        )),
        Event::Token {
            seq,
            finish,
            cached_tokens,
            ..
        } => {
            let why = match (*finish)? {
                FinishReason::Length => "length".to_owned(),
                FinishReason::Stop { token: None } => "eos".to_owned(),
                FinishReason::Stop { token: Some(token) } => format!("stop {token}"),
            };
            Some(format!("end {} {why}, cached {cached_tokens}", name(*seq)))
        }
    }
}

fn show(driver: &Driver, what: &[&str]) -> String {
    let stats = driver.engine.stats();
    let value = |word: &&str| {
        let value = match *word {
            "running" => stats.running.into(),
            "waiting" => stats.waiting.into(),
            "awaiting" => stats.awaiting_kv.into(),
            "used" => stats.blocks_used.into(),
            "prefix_queries" => stats.prefix_queries,
            "prefix_hits" => stats.prefix_hits,
            "external_queries" => stats.external_queries,
            "external_hits" => stats.external_hits,
            "prompt_tokens" => stats.prompt_tokens,
            "generated" => stats.generation_tokens,
            "preemptions" => stats.preemptions,
            "iterations" => stats.iterations,
            "finished" => stats.finished,
            other => panic!("unknown counter {other}"),
        };
        format!("{word} {value}")
    };
    what.iter().map(value).collect::<Vec<_>>().join(", ")
}
