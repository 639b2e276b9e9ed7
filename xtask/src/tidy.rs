//! House rules that a search can see: unsafe stays in its crate, cores stay free of effects, files stay readable.

use anyhow::Context as _;
use std::path::{Path, PathBuf};

/// The crates with unsafe code.
const UNSAFE_CRATES: &[&str] = &["cpu", "pjrt", "shm"];
/// Crates that take time, randomness and files as arguments.
const PURE_CRATES: &[&str] = &[
    "kv",
    "openai",
    "graph",
    "model",
    "text",
    "engine",
    "scheduler",
];
/// What a pure crate does not say outside its tests.
const EFFECT_WORDS: &[&str] = &[
    "std::fs",
    "std::net",
    "Instant::now",
    "SystemTime::now",
    "std::env",
    "thread::spawn",
    "thread::sleep",
];
/// Lines of a file, tests included.
const MAX_LINES: usize = 800;

/// Returns one line for each rule broken.
pub(crate) fn check() -> anyhow::Result<Vec<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("xtask lies in the workspace")?;
    let architecture = std::fs::read_to_string(root.join("ARCHITECTURE.md"))?;
    let mut out = Vec::new();
    for entry in std::fs::read_dir(root.join("crates"))? {
        let folder = entry?.path();
        let name = folder
            .file_name()
            .and_then(|n| n.to_str())
            .unwrap_or_default()
            .to_owned();
        if !architecture.contains(&format!("`{name}`")) {
            out.push(format!("crates/{name} has no line in ARCHITECTURE.md"));
        }
        for file in rust_files(&folder)? {
            let text = std::fs::read_to_string(&file)?;
            let place = file
                .strip_prefix(root)
                .unwrap_or(&file)
                .display()
                .to_string();
            out.extend(complaints(&name, &place, &text));
        }
    }
    out.sort();
    Ok(out)
}

fn complaints(crate_name: &str, place: &str, text: &str) -> Vec<String> {
    let mut out = Vec::new();
    let is_root = place.ends_with("src/lib.rs") || place.ends_with("src/main.rs");
    if is_root && !UNSAFE_CRATES.contains(&crate_name) && !text.contains("#![forbid(unsafe_code)]")
    {
        out.push(format!(
            "{place}: a crate root says #![forbid(unsafe_code)]"
        ));
    }
    if text.lines().count() > MAX_LINES {
        out.push(format!(
            "{place}: {} lines, more than {MAX_LINES}",
            text.lines().count()
        ));
    }
    if place.contains("/src/") && !text.starts_with("//!") {
        out.push(format!(
            "{place}: a module begins with //! and says what it is"
        ));
    }
    if place.contains("/src/") && PURE_CRATES.contains(&crate_name) {
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        let words = EFFECT_WORDS.iter().filter(|w| code.contains(**w));
        out.extend(words.map(|w| format!("{place}: {w} in a pure crate")));
    }
    out
}

fn rust_files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::complaints;

    #[test]
    fn a_clean_root_passes() {
        assert!(
            complaints(
                "engine",
                "crates/engine/src/lib.rs",
                "//! x\n#![forbid(unsafe_code)]\n"
            )
            .is_empty()
        );
    }

    #[test]
    fn each_rule_can_be_broken() {
        assert_eq!(
            complaints("server", "crates/server/src/lib.rs", "//! x\n").len(),
            1
        );
        assert_eq!(
            complaints("engine", "crates/engine/src/a.rs", "//! x\nuse std::fs;\n").len(),
            1
        );
        assert_eq!(
            complaints("engine", "crates/engine/src/a.rs", "use x;\n").len(),
            1
        );
        assert_eq!(
            complaints(
                "server",
                "crates/server/src/a.rs",
                &format!("//! x\n{}", "\n".repeat(900))
            )
            .len(),
            1
        );
    }

    #[test]
    fn tests_of_a_pure_crate_may_use_files() {
        let text = "//! x\n#[cfg(test)]\nmod tests { use std::fs; }\n";
        assert!(complaints("engine", "crates/engine/src/a.rs", text).is_empty());
    }
}
