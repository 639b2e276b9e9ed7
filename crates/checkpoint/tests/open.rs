//! Real files: the tiny models of tests/fixtures, and SmolLM2 where `BATON_SMOLLM2` says it lies.
#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    reason = "tests fail by panicking, and so do their helpers"
)]

use baton_checkpoint::{Checkpoint, CheckpointError, hub_snapshot};
use baton_kv::DType;
use baton_text::{AddSpecial, ChatInput, Ending};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

fn smollm2() -> Checkpoint {
    let path = std::env::var("BATON_SMOLLM2").expect(
        "BATON_SMOLLM2 must name the GGUF file: export BATON_SMOLLM2=\"$(baton fetch smollm2)\"",
    );
    Checkpoint::open(Path::new(&path)).unwrap()
}

fn reference() -> Vec<Value> {
    serde_json::from_slice(&std::fs::read(fixtures().join("smollm2-greedy.json")).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|v| u32::try_from(v.as_u64().unwrap()).unwrap())
        .collect()
}

#[test]
fn every_tiny_folder_opens_and_every_weight_loads() {
    for name in [
        "tiny-mha-untied",
        "tiny-gqa8-tied",
        "tiny-llama3-rope",
        "tiny-bias",
    ] {
        let checkpoint = Checkpoint::open(&fixtures().join(name)).unwrap();
        for weight in baton_model::weights(checkpoint.config()) {
            let n: usize = weight.axes.iter().map(|&(_, n)| n).product();
            let mut out = vec![0xff; n * 4];
            checkpoint.load(&weight.name, DType::F32, &mut out).unwrap();
            let values = out
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            assert!(
                values.clone().all(f32::is_finite) && values.clone().any(|x| x != 0.0),
                "{name} {}",
                weight.name
            );
        }
        assert_eq!(checkpoint.eos_token_ids(), [2]);
        assert!(matches!(
            checkpoint.tokenizer(),
            Err(CheckpointError::NoTokenizer)
        ));
    }
}

#[test]
fn fingerprints_tell_models_apart_and_stay_the_same() {
    let print = |name: &str| {
        Checkpoint::open(&fixtures().join(name))
            .unwrap()
            .fingerprint()
            .unwrap()
    };
    assert_eq!(print("tiny-bias"), print("tiny-bias"));
    assert_ne!(print("tiny-bias"), print("tiny-llama3-rope"));
}

#[test]
fn a_wrong_buffer_and_an_unknown_name_are_refused() {
    let checkpoint = Checkpoint::open(&fixtures().join("tiny-bias")).unwrap();
    assert!(matches!(
        checkpoint.load("nope", DType::F32, &mut []),
        Err(CheckpointError::NoTensor(_))
    ));
    assert!(matches!(
        checkpoint.load("model.norm.weight", DType::F32, &mut [0; 4]),
        Err(CheckpointError::Size { .. })
    ));
}

#[test]
fn rows_that_are_no_whole_heads_are_refused() {
    let seeds = fixtures().join("../../fuzz/seeds/checkpoint");
    assert!(Checkpoint::open(&seeds.join("llama")).is_ok());
    assert!(matches!(
        Checkpoint::open(&seeds.join("half_a_head")),
        Err(CheckpointError::Shape { .. })
    ));
}

#[test]
fn what_is_no_model_is_refused_with_its_name() {
    let error = Checkpoint::open(&fixtures().join("smollm2-greedy.json"))
        .err()
        .unwrap();
    assert!(
        error
            .to_string()
            .ends_with("smollm2-greedy.json: not a GGUF file"),
        "{error}"
    );
    assert!(
        Checkpoint::open(&fixtures())
            .err()
            .unwrap()
            .to_string()
            .contains("config.json")
    );
    assert_eq!(hub_snapshot(&fixtures(), "../x/y"), None);
}

#[test]
fn smollm2_says_what_it_is() {
    let checkpoint = smollm2();
    let config = checkpoint.config();
    assert_eq!(
        (
            config.n_layers,
            config.n_heads,
            config.n_kv_heads,
            config.head_dim
        ),
        (30, 9, 3, 64)
    );
    assert_eq!(
        (config.vocab_size, config.max_position_embeddings),
        (49152, 8192)
    );
    assert!(config.tie_word_embeddings);
    assert_eq!(checkpoint.eos_token_ids(), [2]);
}

#[test]
fn smollm2_tokenizes_as_transformers_does() {
    let tokenizer = smollm2().tokenizer().unwrap();
    let cases = reference();
    let plain: Vec<&Value> = cases
        .iter()
        .filter(|case| case["prompt"].is_string())
        .collect();
    assert_eq!(plain.len(), 24);
    for case in plain {
        let encoded = tokenizer
            .encode(case["prompt"].as_str().unwrap(), AddSpecial::Yes)
            .unwrap();
        assert_eq!(encoded, ids(&case["prompt_ids"]), "{}", case["name"]);
    }
    for case in &cases {
        let text = tokenizer.decode(&ids(&case["tokens"]), baton_text::SpecialTokens::Keep);
        assert_eq!(text, case["text"].as_str().unwrap(), "{}", case["name"]);
    }
}

#[test]
fn smollm2s_chat_template_renders_as_transformers_does() {
    let checkpoint = smollm2();
    let (tokenizer, template) = (
        checkpoint.tokenizer().unwrap(),
        checkpoint.chat_template().unwrap().unwrap(),
    );
    let cases = reference();
    let chats: Vec<&Value> = cases
        .iter()
        .filter(|case| case["messages"].is_array())
        .collect();
    assert_eq!(chats.len(), 7);
    for case in chats {
        let text = template
            .render(&ChatInput {
                messages: &case["messages"],
                tools: &Value::Null,
                ending: Ending::GenerationPrompt,
                kwargs: &Value::Null,
                today: "",
            })
            .unwrap();
        assert_eq!(
            tokenizer.encode(&text, AddSpecial::No).unwrap(),
            ids(&case["prompt_ids"]),
            "{}",
            case["name"]
        );
    }
}
