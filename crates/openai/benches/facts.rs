//! How fast a body is read for routing, whole and in the pieces that a proxy sends, beside serde_json passing over the
//! same values. `cargo bench -p baton-openai --bench facts`
#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a program whose purpose is to print a measurement"
)]

use baton_openai::facts::Facts;
use serde::de::IgnoredAny;
use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;

const PIECE: usize = 32 << 10;

/// Microseconds of the fastest of many runs.
fn fastest<R>(mut run: impl FnMut() -> R) -> f64 {
    let once = |run: &mut dyn FnMut() -> R| {
        let began = Instant::now();
        black_box(run());
        began.elapsed().as_secs_f64() * 1e6
    };
    (0..300)
        .map(|_| once(&mut run))
        .fold(f64::INFINITY, f64::min)
}

fn main() {
    let text = |bytes: usize| "A sentence of some words.\\n".repeat(bytes / 27);
    let chat = |bytes| {
        format!(
            r#"{{"model":"m","messages":[{{"role":"user","content":"{}"}}],"stream":true}}"#,
            text(bytes)
        )
    };
    let tokens = format!(r#"{{"model":"m","prompt":[{}1]}}"#, "12345,".repeat(30_000));
    println!("body                bytes    whole us  pieces us  serde_json us");
    let bodies = [
        ("chat", chat(512)),
        ("chat", chat(32 << 10)),
        ("chat", chat(220 << 10)),
        ("token ids", tokens),
    ];
    for (name, body) in bodies {
        let body = body.as_bytes();
        let pieces: Vec<&[u8]> = body.chunks(PIECE).collect();
        let whole = fastest(|| Facts::read(&[body]).unwrap());
        let cut = fastest(|| Facts::read(&pieces).unwrap());
        let serde = fastest(|| serde_json::from_slice::<BTreeMap<&str, IgnoredAny>>(body).unwrap());
        println!(
            "{name:12}  {:11}  {whole:10.2} {cut:10.2} {serde:14.2}",
            body.len()
        );
    }
}
