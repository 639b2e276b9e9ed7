//! The file of packed weights.
#![expect(clippy::unwrap_used, reason = "a test may fail by panicking")]

#[path = "../../runner/tests/conformance/mod.rs"]
mod conformance;

use baton_cpu::{Arithmetic, CpuRunner, Model, OpenError, Options, WeightCache, Weights};
use baton_graph::hlo::Element;
use baton_kv::{DType, KvLayout};
use baton_model::{Pool, Storage};
use conformance::fixture::Fixture;
use conformance::{Sequence, assert_logits, prefill};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

type Failure = Box<dyn Error + Send + Sync>;

/// A tiny model's weights, counting how often matrices are read, perhaps failing at one.
struct Counted<'a> {
    fixture: &'a Fixture,
    reads: AtomicUsize,
    broken: Option<&'a str>,
}

impl Weights for Counted<'_> {
    fn storage(&self, _: &str) -> Result<Storage, Failure> {
        Ok(Storage::F32)
    }

    fn read(&self, name: &str) -> Result<Vec<u8>, Failure> {
        if self.broken == Some(name) {
            return Err("broken on purpose".into());
        }
        if name.contains("_proj") {
            self.reads.fetch_add(1, Ordering::Relaxed);
        }
        Ok(self.fixture.weight(name).ok_or("missing")?.to_vec())
    }
}

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("baton-packed-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(&self.0)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn open(weights: &Counted<'_>, folder: &Path) -> Result<CpuRunner, OpenError> {
    let config = &weights.fixture.config;
    let narrow = |n: usize| u32::try_from(n).unwrap();
    let model = Model {
        config,
        fingerprint: 7,
        weights,
    };
    let options = Options {
        pool: Pool {
            element: Element::F32,
            n_blocks: 61,
            block_size: 16,
            max_model_len: 300,
        },
        layout: KvLayout {
            n_layers: narrow(config.n_layers),
            n_kv_heads: narrow(config.n_kv_heads),
            head_dim: narrow(config.head_dim),
            block_size: 16,
            dtype: DType::F32,
            model_fingerprint: 7,
        },
        max_batch: 4,
        max_chunk: 64,
        arithmetic: Arithmetic::Exact,
        threads: 1,
        weight_cache: Some(WeightCache {
            folder: folder.to_owned(),
            key: "tiny".to_owned(),
        }),
    };
    CpuRunner::open(model, &options, None, &|_, _| ())
}

fn counted(fixture: &Fixture) -> Counted<'_> {
    Counted {
        fixture,
        reads: AtomicUsize::new(0),
        broken: None,
    }
}

fn works(mut runner: CpuRunner, fixture: &Fixture) {
    let expected = &fixture.expected[1];
    let out = prefill(&mut runner, &mut Sequence::new(&expected.prompt, 1, 20), 64);
    assert_logits(&out, expected, "from packed weights");
}

#[test]
fn weights_are_packed_once_and_then_mapped() {
    let (fixture, folder) = (Fixture::open("tiny-bias"), Folder::new("once"));
    let weights = counted(&fixture);
    works(open(&weights, &folder.0).unwrap(), &fixture);
    let reads = weights.reads.load(Ordering::Relaxed);
    let again = counted(&fixture);
    works(open(&again, &folder.0).unwrap(), &fixture);
    // Biases are read every time, matrices are not.
    assert!(again.reads.load(Ordering::Relaxed) < reads / 2 + 1);
    assert_eq!(folder.names(), ["tiny.lock", "tiny.weights"]);
}

#[test]
fn a_file_that_was_cut_off_or_is_another_models_is_made_anew() {
    let (fixture, folder) = (Fixture::open("tiny-mha-untied"), Folder::new("anew"));
    works(open(&counted(&fixture), &folder.0).unwrap(), &fixture);
    let file = folder.0.join("tiny.weights");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() - 4096]).unwrap();
    works(open(&counted(&fixture), &folder.0).unwrap(), &fixture);
    let mut foreign = whole.clone();
    foreign[40] ^= 1;
    std::fs::write(&file, &foreign).unwrap();
    works(open(&counted(&fixture), &folder.0).unwrap(), &fixture);
    assert!(std::fs::read(&file).unwrap() == whole);
}

#[test]
fn servers_that_start_together_pack_once() {
    let (fixture, folder) = (Fixture::open("tiny-llama3-rope"), Folder::new("together"));
    let all: Vec<Counted<'_>> = (0..4).map(|_| counted(&fixture)).collect();
    std::thread::scope(|scope| {
        for weights in &all {
            scope.spawn(|| works(open(weights, &folder.0).unwrap(), &fixture));
        }
    });
    let packed = all.iter().filter(|w| w.reads.load(Ordering::Relaxed) > 0);
    assert_eq!(packed.count(), 1);
}

#[test]
fn a_failure_leaves_nothing_behind() {
    let (fixture, folder) = (Fixture::open("tiny-gqa8-tied"), Folder::new("failure"));
    let broken = Counted {
        broken: Some("model.layers.1.mlp.down_proj.weight"),
        ..counted(&fixture)
    };
    let error = open(&broken, &folder.0).err().unwrap().to_string();
    assert!(
        error.contains("down_proj") && error.contains("on purpose"),
        "{error}"
    );
    assert_eq!(folder.names(), ["tiny.lock"]);
    works(open(&counted(&fixture), &folder.0).unwrap(), &fixture);
}
