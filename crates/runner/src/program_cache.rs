//! Compiled programs kept on disk between starts.
//!
//! A file's name is the hash of everything that went into it: text, options, plugin, device and, where machine code
//! depends on it, the host's processor. Files appear whole (renamed into place), carry a checksum, and only one of
//! several servers starting at once compiles a program: the others wait for its lock. A cache that fails is a slow
//! start, never an error.

use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Beyond this the files used longest ago go.
const MAX_BYTES: u64 = 8 << 30;
const MAGIC: &[u8; 8] = b"batonx01";

/// A folder of compiled programs.
#[derive(Debug)]
pub(crate) struct ProgramCache {
    dir: PathBuf,
    /// Hash of what all programs of this process have in common.
    environment: [u8; 32],
}

/// The right to compile one program, until dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    _lock: Option<File>,
    path: PathBuf,
}

impl ProgramCache {
    /// Opens a folder, made for this user alone if it is not there.
    pub(crate) fn open(dir: &Path, environment: &[&[u8]]) -> io::Result<Self> {
        make_private(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            environment: hash(environment),
        })
    }

    /// The program's file and whether somebody else compiles it: waits until nobody does.
    pub(crate) fn claim(&self, text: &str, options: &[u8]) -> Claim {
        let key = hash(&[&self.environment, text.as_bytes(), options]);
        let name: String = key.iter().map(|b| format!("{b:02x}")).collect();
        let lock = File::create(self.dir.join(format!("{name}.lock")));
        let lock = lock.and_then(|file| file.lock().map(|()| file)).ok();
        Claim {
            _lock: lock,
            path: self.dir.join(format!("{name}.pjrt")),
        }
    }

    /// Deletes what was used longest ago, beyond the limit.
    pub(crate) fn prune(&self) {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        let mut files: Vec<(SystemTime, u64, PathBuf)> = entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let meta = entry.metadata().ok()?;
                Some((meta.modified().ok()?, meta.len(), entry.path()))
            })
            .filter(|(_, _, path)| path.extension().is_some_and(|e| e == "pjrt"))
            .collect();
        files.sort_by_key(|(used, _, _)| std::cmp::Reverse(*used));
        let mut kept = 0;
        for (_, len, path) in files {
            kept += len;
            if kept > MAX_BYTES {
                let _ = fs::remove_file(&path);
                let _ = fs::remove_file(path.with_extension("lock"));
            }
        }
    }
}

impl Claim {
    /// The program's bytes, if they are there and whole.
    pub(crate) fn read(&self) -> Option<Vec<u8>> {
        let mut file = File::open(&self.path).ok()?;
        let mut head = [0; 40];
        file.read_exact(&mut head).ok()?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).ok()?;
        let whole = &head[..8] == MAGIC && head[8..] == hash(&[&bytes]);
        // Marks it as used, so that it is pruned late; if it cannot be marked it is pruned earlier.
        let _ = File::options()
            .append(true)
            .open(&self.path)
            .and_then(|f| f.set_modified(SystemTime::now()));
        whole.then_some(bytes)
    }

    /// Keeps the program's bytes.
    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let partial = self
            .path
            .with_extension(format!("{}.partial", std::process::id()));
        let mut file = File::create(&partial)?;
        let written = file
            .write_all(MAGIC)
            .and_then(|()| file.write_all(&hash(&[bytes])))
            .and_then(|()| file.write_all(bytes))
            .and_then(|()| fs::rename(&partial, &self.path));
        if written.is_err() {
            let _ = fs::remove_file(&partial);
        }
        written
    }
}

/// Hash of parts, each with its length, so that no two lists of parts hash alike.
fn hash(parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().into()
}

/// What tells one build of a plugin from another, cheaply: size and time of its file.
pub(crate) fn file_identity(path: &Path) -> Vec<u8> {
    let Ok(meta) = fs::metadata(path) else {
        return Vec::new();
    };
    let since = meta
        .modified()
        .ok()
        .and_then(|t| t.duration_since(SystemTime::UNIX_EPOCH).ok());
    format!("{} {}", meta.len(), since.unwrap_or_default().as_nanos()).into_bytes()
}

/// The processor's abilities, on which a CPU's machine code depends.
pub(crate) fn processor() -> Vec<u8> {
    let Ok(info) = fs::read_to_string("/proc/cpuinfo") else {
        return std::env::consts::ARCH.as_bytes().to_vec();
    };
    let telling = |line: &&str| {
        ["flags", "Features", "model name", "CPU part"]
            .iter()
            .any(|k| line.starts_with(k))
    };
    let mut lines: Vec<&str> = info.lines().filter(telling).collect();
    lines.sort_unstable();
    lines.dedup();
    lines.concat().into_bytes()
}

#[cfg(unix)]
fn make_private(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
}

#[cfg(not(unix))]
fn make_private(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let dir =
            std::env::temp_dir().join(format!("baton-program-cache-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    #[test]
    fn what_is_kept_is_found_under_the_same_text_options_and_environment_only() {
        let dir = folder("same");
        let cache = ProgramCache::open(&dir, &[b"plugin 1"]).unwrap();
        cache.claim("text", b"options").write(b"code").unwrap();
        assert_eq!(cache.claim("text", b"options").read().unwrap(), b"code");
        assert!(cache.claim("text", b"others").read().is_none());
        assert!(cache.claim("texto", b"ptions").read().is_none());
        let other = ProgramCache::open(&dir, &[b"plugin 2"]).unwrap();
        assert!(other.claim("text", b"options").read().is_none());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_damaged_file_is_not_believed() {
        let dir = folder("damaged");
        let cache = ProgramCache::open(&dir, &[]).unwrap();
        let claim = cache.claim("text", b"");
        claim.write(b"code").unwrap();
        let mut bytes = fs::read(&claim.path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&claim.path, &bytes).unwrap();
        assert!(claim.read().is_none());
        fs::write(&claim.path, &bytes[..10]).unwrap();
        assert!(claim.read().is_none());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_second_claim_waits_for_the_first() {
        let dir = folder("claim");
        let cache = ProgramCache::open(&dir, &[]).unwrap();
        let first = cache.claim("text", b"");
        std::thread::scope(|scope| {
            let second = scope.spawn(|| cache.claim("text", b"").read());
            first.write(b"code").unwrap();
            drop(first);
            assert_eq!(second.join().unwrap().unwrap(), b"code");
        });
        fs::remove_dir_all(&dir).unwrap();
    }
}
