//! A downloaded `.gguf` file from opening to the last weight, tokenizer and chat template included.
#![no_main]

mod library_panics;

use baton_checkpoint::Checkpoint;
use baton_kv::DType;
use baton_model::weights;
use baton_text::AddSpecial;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: library_panics::tolerate(), |bytes: &[u8]| {
    let path = std::env::temp_dir().join(format!("baton-fuzz-{}.gguf", std::process::id()));
    std::fs::write(&path, bytes).expect("room for a small file");
    let checkpoint = Checkpoint::open(&path);
    std::fs::remove_file(&path).expect("the file just written");
    let Ok(checkpoint) = checkpoint else {
        return;
    };
    checkpoint.fingerprint().expect("tensors lie within the file");
    if let Ok(tokenizer) = checkpoint.tokenizer() {
        let _ = tokenizer.encode("Hello, world", AddSpecial::Yes);
    }
    for weight in weights(checkpoint.config()) {
        let elements: usize = weight.axes.iter().map(|&(_, n)| n).product();
        let mut out = vec![0; elements * DType::F32.bytes()];
        checkpoint.load(&weight.name, DType::F32, &mut out).expect("a weight that was checked");
    }
});
