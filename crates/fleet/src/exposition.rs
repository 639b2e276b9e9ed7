//! Reads how busy a model server is out of Prometheus text. It looks for a few series and skips everything else, well
//! formed or not; no input makes it fail. The text may come in pieces of any size: at most a part of one line is kept.

use baton_scheduler::Adapters;
use baton_scheduler::engines::{CacheInfo, EngineMetrics, MetricSpec};
use memchr::{memchr, memchr3};

/// Longest line that is read; a longer one is skipped.
const MAX_LINE: usize = 64 << 10;
/// What vLLM called the use of its KV pool until 2025.
const OLD_KV_USAGE: &str = "vllm:gpu_cache_usage_perc";

/// What a server said. What it did not say is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Scraped {
    /// Requests that wait, all engines of the server together.
    pub waiting: Option<u32>,
    /// Requests that run.
    pub running: Option<u32>,
    /// Part of the fullest KV pool that is in use.
    pub kv_usage: Option<f32>,
    /// Tokens of a KV block.
    pub block_size: Option<u64>,
    /// Tokens that its KV pools have room for.
    pub cache_tokens: Option<u64>,
    /// When its process began, in seconds since 1970.
    pub started: Option<f64>,
}

/// What a series means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    Waiting,
    Running,
    KvUsage,
    Lora,
    CacheInfo,
    BlockSize,
    NumBlocks,
    Started,
}

/// The series to look for; made once for an engine.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    series: Vec<(MetricSpec, Meaning)>,
    /// Labels of [`Meaning::CacheInfo`]: tokens of a block, blocks.
    info_labels: (Box<str>, Box<str>),
}

impl Wanted {
    /// What to look for in the metrics of an engine.
    #[must_use]
    pub fn new(engine: &EngineMetrics) -> Self {
        let (mut series, mut info_labels) = (Vec::new(), Default::default());
        let mut want = |spec: &MetricSpec, meaning| series.push((spec.clone(), meaning));
        for (spec, meaning) in [
            (&engine.queued, Meaning::Waiting),
            (&engine.running, Meaning::Running),
            (&engine.kv_usage, Meaning::KvUsage),
            (&engine.lora, Meaning::Lora),
        ] {
            if let Some(spec) = spec {
                want(spec, meaning);
                if *spec.name == *"vllm:kv_cache_usage_perc" {
                    want(&MetricSpec::named(OLD_KV_USAGE), meaning);
                }
            }
        }
        match &engine.cache {
            Some(CacheInfo::Labels {
                series,
                block_size,
                num_blocks,
            }) => {
                want(series, Meaning::CacheInfo);
                info_labels = (block_size.clone(), num_blocks.clone());
            }
            Some(CacheInfo::Values {
                block_size,
                num_blocks,
            }) => {
                want(block_size, Meaning::BlockSize);
                want(num_blocks, Meaning::NumBlocks);
            }
            None => {}
        }
        want(
            &MetricSpec::named("process_start_time_seconds"),
            Meaning::Started,
        );
        Self {
            series,
            info_labels,
        }
    }
}

/// Reads one server's text, piece by piece. Used again for the next text, it allocates nothing.
#[derive(Debug, Default)]
pub struct Reader {
    /// The part of a line that has come so far.
    line: Vec<u8>,
    /// The line is too long: skip to its end.
    skips: bool,
    found: Scraped,
    num_blocks: Option<u64>,
    /// The adapters' labels, and the value of their series: the newest counts.
    lora: Vec<u8>,
    lora_value: Option<f64>,
}

impl Reader {
    /// Begins a new text.
    pub fn clear(&mut self) {
        self.line.clear();
        self.lora.clear();
        (self.skips, self.lora_value) = (false, None);
        (self.found, self.num_blocks) = (Scraped::default(), None);
    }

    /// Reads the next piece of the text.
    pub fn push(&mut self, wanted: &Wanted, mut piece: &[u8]) {
        while let Some(end) = memchr(b'\n', piece) {
            let (line, rest) = (&piece[..end], &piece[end + 1..]);
            piece = rest;
            if self.skips {
                self.skips = false;
            } else if self.line.is_empty() {
                self.read(wanted, line);
            } else {
                self.keep(line);
                self.end_line(wanted);
            }
        }
        if !self.skips {
            self.keep(piece);
        }
    }

    /// Ends the text and tells what it said.
    pub fn finish(&mut self, wanted: &Wanted) -> Scraped {
        self.end_line(wanted);
        let tokens = self.found.block_size.zip(self.num_blocks);
        let tokens = tokens.map(|(size, blocks)| size.saturating_mul(blocks));
        self.found.cache_tokens = self.found.cache_tokens.max(tokens);
        self.found
    }

    /// What the text, which has ended, said of adapters, as the labels of its series.
    #[must_use]
    pub fn lora_labels(&self) -> Option<&[u8]> {
        self.lora_value.map(|_| &self.lora[..])
    }

    fn keep(&mut self, part: &[u8]) {
        if self.line.len() + part.len() > MAX_LINE {
            self.line.clear();
            self.skips = true;
        } else {
            self.line.extend_from_slice(part);
        }
    }

    fn end_line(&mut self, wanted: &Wanted) {
        let line = std::mem::take(&mut self.line);
        self.read(wanted, &line);
        self.line = line;
        self.line.clear();
        self.skips = false;
    }

    fn read(&mut self, wanted: &Wanted, line: &[u8]) {
        if line.first().is_none_or(|&b| b == b'#') {
            return;
        }
        let Some(end) = memchr3(b'{', b' ', b'\t', line) else {
            return;
        };
        let name = &line[..end];
        if !wanted.series.iter().any(|(s, _)| s.name.as_bytes() == name) {
            return;
        }
        let Some((labels, value)) = sample(&line[end..]) else {
            return;
        };
        for (spec, meaning) in &wanted.series {
            let has =
                |(l, v): &(Box<str>, Box<str>)| label(labels, l.as_bytes()) == Some(v.as_bytes());
            if spec.name.as_bytes() == name && spec.labels.iter().all(has) {
                self.note(wanted, *meaning, labels, value);
            }
        }
    }

    fn note(&mut self, wanted: &Wanted, meaning: Meaning, labels: &[u8], value: f64) {
        let found = &mut self.found;
        match meaning {
            Meaning::Waiting => add(&mut found.waiting, value),
            Meaning::Running => add(&mut found.running, value),
            Meaning::KvUsage => {
                let usage = value.clamp(0.0, 1.0) as f32;
                found.kv_usage = Some(found.kv_usage.map_or(usage, |u| u.max(usage)));
            }
            Meaning::CacheInfo => {
                let (size, blocks) = &wanted.info_labels;
                let size = number(labels, size.as_bytes());
                let tokens = number(labels, blocks.as_bytes()).zip(size);
                let tokens = tokens.map(|(blocks, size)| blocks.saturating_mul(size));
                found.cache_tokens = found.cache_tokens.max(tokens);
                found.block_size = size.or(found.block_size);
            }
            Meaning::BlockSize => found.block_size = Some(value as u64),
            Meaning::NumBlocks => self.num_blocks = Some(value as u64),
            Meaning::Started => found.started = Some(value),
            Meaning::Lora => {
                if self.lora_value.is_none_or(|newest| value > newest) {
                    self.lora_value = Some(value);
                    self.lora.clear();
                    self.lora.extend_from_slice(labels);
                }
            }
        }
    }
}

/// Reads the labels of vLLM's series about adapters. At most `most` of each list are kept.
#[must_use]
pub fn adapters(labels: &[u8], most: usize) -> Adapters {
    let list = |name: &[u8]| {
        let text = label(labels, name).unwrap_or_default();
        let names = text.split(|&b| b == b',').map(<[u8]>::trim_ascii);
        names
            .filter(|n| !n.is_empty())
            .take(most)
            .map(|n| String::from_utf8_lossy(n).into())
            .collect()
    };
    Adapters {
        running: list(b"running_lora_adapters"),
        waiting: list(b"waiting_lora_adapters"),
        most: number(labels, b"max_lora")
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or(0),
    }
}

/// Negative counts are none, huge ones saturate.
fn add(sum: &mut Option<u32>, value: f64) {
    *sum = Some(sum.unwrap_or(0).saturating_add(value as u32));
}

/// Reads what follows a sample's name: what is between the braces, and the value. Nothing comes of lines that have no
/// value, or none that is finite.
fn sample(rest: &[u8]) -> Option<(&[u8], f64)> {
    let (labels, rest) = match rest.trim_ascii_start().strip_prefix(b"{") {
        Some(inside) => {
            let close = end_of_labels(inside)?;
            (&inside[..close], &inside[close + 1..])
        }
        None => (&[][..], rest),
    };
    let value: f64 = std::str::from_utf8(rest)
        .ok()?
        .split_ascii_whitespace()
        .next()?
        .parse()
        .ok()?;
    value.is_finite().then_some((labels, value))
}

fn number(labels: &[u8], name: &[u8]) -> Option<u64> {
    std::str::from_utf8(label(labels, name)?).ok()?.parse().ok()
}

/// The value that the label `name` has, escapes and all. Only whole label names match, whatever the values before it
/// hold.
fn label<'a>(labels: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let mut rest = labels;
    loop {
        let equals = memchr(b'=', rest)?;
        let label = rest[..equals].trim_ascii();
        let value = rest[equals + 1..].trim_ascii_start().strip_prefix(b"\"")?;
        let end = end_of_value(value)?;
        if label == name {
            return Some(&value[..end]);
        }
        rest = value[end + 1..].trim_ascii_start();
        rest = rest.strip_prefix(b",").unwrap_or(rest);
    }
}

/// Where the quote is that closes a label's value.
fn end_of_value(value: &[u8]) -> Option<usize> {
    let mut escaped = false;
    value.iter().position(|&b| {
        let closes = b == b'"' && !escaped;
        escaped = b == b'\\' && !escaped;
        closes
    })
}

/// Where the brace is that closes the labels; one inside a quoted value does not.
fn end_of_labels(labels: &[u8]) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    labels.iter().position(|&b| {
        let closes = b == b'}' && !quoted;
        if b == b'"' && !escaped {
            quoted = !quoted;
        }
        escaped = quoted && b == b'\\' && !escaped;
        closes
    })
}

#[cfg(test)]
mod tests;
