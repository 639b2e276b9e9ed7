//! What is asked of a fleet: published traces, and conversations made up by rule.

use crate::numbers::{Numbers, mix};
use flate2::read::GzDecoder;
use rustc_hash::FxHashSet;
use serde::Deserialize;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::ops::Range;
use std::path::Path;

/// Most requests of a trace; more would not fit in memory with their blocks.
const MOST_ASKS: usize = 10_000_000;

/// Longest line of a trace.
const MOST_LINE: u64 = 1 << 20;

/// Requests in the order of their arrival.
#[derive(Clone, Debug)]
pub struct Workload {
    /// What it is called in reports.
    pub name: String,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// The requests.
    pub asks: Vec<Ask>,
    blocks: Vec<u64>,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Ask {
    /// When it comes, in microseconds.
    pub arrival: u64,
    /// Tokens of its prompt, at least one.
    pub input: u32,
    /// Tokens of its answer, at least one.
    pub output: u32,
    blocks: Range<usize>,
}

/// A trace that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// It cannot be read.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        error: io::Error,
    },
    /// A line is not what it should be.
    #[error("{path}, line {line}: {problem}")]
    Line {
        /// The file.
        path: String,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// There is nothing in it.
    #[error("{path}: no requests")]
    Empty {
        /// The file.
        path: String,
    },
}

/// Conversations: a system prompt that many share, then question and answer in turn; or questions without a memory.
#[derive(Clone, Debug)]
pub struct Conversations {
    /// Different system prompts.
    pub systems: usize,
    /// Questions of a conversation.
    pub turns: usize,
    /// Each question follows right on the system prompt, and is asked again and again, instead of on those before it.
    pub again: bool,
    /// Tokens of a system prompt.
    pub system: u32,
    /// Tokens of a question.
    pub question: u32,
    /// Tokens of an answer.
    pub answer: u32,
    /// Requests in all.
    pub requests: usize,
    /// Requests a second.
    pub rate: f64,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Decides everything that is left to chance.
    pub seed: u64,
}

/// A line of a trace in Mooncake's form.
#[derive(Deserialize)]
struct MooncakeLine {
    timestamp: u64,
    input_length: u32,
    output_length: u32,
    hash_ids: Vec<u64>,
}

impl Workload {
    /// The ids of a request's prompt blocks. Equal ids mean equal prompts up to there.
    #[must_use]
    pub fn blocks(&self, ask: &Ask) -> &[u64] {
        &self.blocks[ask.blocks.clone()]
    }

    /// Part of all prompt blocks that came before: what a cache without bounds could have saved.
    #[must_use]
    pub fn ceiling(&self) -> f64 {
        let different: FxHashSet<u64> = self.blocks.iter().copied().collect();
        1.0 - different.len() as f64 / self.blocks.len().max(1) as f64
    }

    /// Seconds from the first arrival to the last.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        let ends = (self.asks.first(), self.asks.last());
        match ends {
            (Some(first), Some(last)) => (last.arrival - first.arrival) as f64 / 1e6,
            _ => 0.0,
        }
    }

    /// Keeps the first `n` requests.
    pub fn truncate(&mut self, n: usize) {
        self.asks.truncate(n);
        let end = self.asks.last().map_or(0, |a| a.blocks.end);
        self.blocks.truncate(end);
    }

    /// Adds a request whose prompt has the given blocks, which come after those of the request before it.
    fn push(&mut self, arrival: u64, lengths: (u32, u32), blocks: impl IntoIterator<Item = u64>) {
        let start = self.blocks.len();
        self.blocks.extend(blocks);
        self.asks.push(Ask {
            arrival,
            input: lengths.0.max(1),
            output: lengths.1.max(1),
            blocks: start..self.blocks.len(),
        });
    }

    fn empty(name: String, block_tokens: u32) -> Self {
        Self {
            name,
            block_tokens,
            asks: Vec::new(),
            blocks: Vec::new(),
        }
    }

    /// Reads a trace: Mooncake's JSON lines (`timestamp` in ms, `input_length`, `output_length`, `hash_ids` of blocks of
    /// 512 tokens) or Azure's CSV (`TIMESTAMP,ContextTokens,GeneratedTokens`; nothing is shared). Gzip is recognised.
    ///
    /// # Errors
    /// [`TraceError`], if it cannot be read.
    pub fn read(path: &Path) -> Result<Self, TraceError> {
        let name = path.display().to_string();
        let io = |error| TraceError::Io {
            path: name.clone(),
            error,
        };
        let mut file = BufReader::new(File::open(path).map_err(io)?);
        let zipped = file.fill_buf().map_err(io)?.starts_with(&[0x1f, 0x8b]);
        let reader: Box<dyn Read> = if zipped {
            Box::new(GzDecoder::new(file))
        } else {
            Box::new(file)
        };
        Self::parse(&name, BufReader::new(reader))
    }

    /// As [`read`](Self::read), from text.
    ///
    /// # Errors
    /// [`TraceError`], if it is not one of the forms.
    pub fn parse(name: &str, mut reader: impl BufRead) -> Result<Self, TraceError> {
        let base = name.rsplit('/').next().unwrap_or(name).to_owned();
        let mut out = Self::empty(base, 512);
        let mut line = String::new();
        for number in 1.. {
            line.clear();
            let read = reader.by_ref().take(MOST_LINE).read_line(&mut line);
            match read {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => {
                    return Err(TraceError::Io {
                        path: name.to_owned(),
                        error,
                    });
                }
            }
            let text = line.trim();
            if text.is_empty() || (number == 1 && text.starts_with("TIMESTAMP,")) {
                continue;
            }
            let added = if text.starts_with('{') {
                out.mooncake(text)
            } else {
                out.azure(text)
            };
            added.map_err(|problem| TraceError::Line {
                path: name.to_owned(),
                line: number,
                problem,
            })?;
        }
        if out.asks.is_empty() {
            return Err(TraceError::Empty {
                path: name.to_owned(),
            });
        }
        out.asks.sort_by_key(|a| a.arrival);
        let first = out.asks[0].arrival;
        out.asks.iter_mut().for_each(|a| a.arrival -= first);
        Ok(out)
    }

    fn mooncake(&mut self, text: &str) -> Result<(), String> {
        let line: MooncakeLine = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let arrival = line
            .timestamp
            .checked_mul(1000)
            .ok_or("timestamp too large")?;
        self.checked_push(
            arrival,
            (line.input_length, line.output_length),
            line.hash_ids,
        )
    }

    fn azure(&mut self, text: &str) -> Result<(), String> {
        let mut fields = text.split(',');
        let arrival = fields.next().and_then(microseconds);
        let lengths = (fields.next(), fields.next());
        let (Some(arrival), (Some(input), Some(output)), None) = (arrival, lengths, fields.next())
        else {
            return Err("expected TIMESTAMP,ContextTokens,GeneratedTokens".to_owned());
        };
        let number = |text: &str| text.trim().parse::<u32>().map_err(|e| e.to_string());
        let (input, output) = (number(input)?, number(output)?);
        // Nobody knows what was in them: no two share anything.
        let first = self.asks.len() as u64;
        let blocks =
            (0..u64::from(input.div_ceil(self.block_tokens))).map(|i| mix(first << 24 | i));
        let blocks: Vec<u64> = blocks.collect();
        self.checked_push(arrival, (input, output), blocks)
    }

    fn checked_push(
        &mut self,
        arrival: u64,
        lengths: (u32, u32),
        blocks: Vec<u64>,
    ) -> Result<(), String> {
        if self.asks.len() >= MOST_ASKS {
            return Err(format!("more than {MOST_ASKS} requests"));
        }
        if blocks.len() != lengths.0.div_ceil(self.block_tokens) as usize {
            return Err(format!(
                "{} blocks of {} tokens do not make {} tokens",
                blocks.len(),
                self.block_tokens,
                lengths.0
            ));
        }
        self.push(arrival, lengths, blocks);
        Ok(())
    }
}

impl Conversations {
    /// The requests. They come independently of how fast they are answered.
    #[must_use]
    pub fn workload(&self) -> Workload {
        let mut out = Workload::empty("conversations".to_owned(), self.block_tokens);
        let mut numbers = Numbers::new(self.seed);
        let mut next = match self.again {
            true => Next::again(self, &mut numbers),
            false => Next::of_conversations(self),
        };
        let mut now = 0.0;
        for _ in 0..self.requests {
            now += numbers.wait(1e6 / self.rate.max(1e-6));
            let (system, own, turn) = next.question(self, &mut numbers);
            let input = self.system + self.question + turn * (self.question + self.answer);
            let shared = self.system / self.block_tokens;
            let blocks = (0..input / self.block_tokens).map(|i| {
                let owner = if i < shared { 0 } else { own + 1 };
                mix(mix(mix(system as u64) ^ owner).wrapping_add(u64::from(i)))
            });
            out.push(now as u64, (input, self.answer), blocks);
        }
        out
    }
}

/// Which question comes next.
enum Next {
    /// The next one of the conversation of some system prompt: of each, its conversation and turn.
    Turn(Vec<(u64, usize)>),
    /// The next in an order that is gone through again and again: system prompts and their questions.
    Again(Vec<(usize, u64)>, usize),
}

impl Next {
    fn of_conversations(of: &Conversations) -> Self {
        Self::Turn(vec![(0, 0); of.systems.max(1)])
    }

    fn again(of: &Conversations, numbers: &mut Numbers) -> Self {
        let questions = 0..of.turns.max(1) as u64;
        let mut all: Vec<(usize, u64)> = (0..of.systems.max(1))
            .flat_map(|system| questions.clone().map(move |q| (system, q)))
            .collect();
        for i in (1..all.len()).rev() {
            all.swap(i, numbers.below(i + 1));
        }
        Self::Again(all, 0)
    }

    /// Its system prompt; whose its other blocks are; how many questions and answers it follows on.
    fn question(&mut self, of: &Conversations, numbers: &mut Numbers) -> (usize, u64, u32) {
        match self {
            Self::Turn(next) => {
                let system = numbers.below(next.len());
                let (conversation, turn) = next[system];
                next[system] = match turn + 1 == of.turns.max(1) {
                    true => (conversation + 1, 0),
                    false => (conversation, turn + 1),
                };
                (
                    system,
                    conversation,
                    u32::try_from(turn).unwrap_or(u32::MAX),
                )
            }
            Self::Again(all, at) => {
                let (system, question) = all[*at % all.len()];
                *at += 1;
                (system, question, 0)
            }
        }
    }
}

/// A time of day or a date with one, as microseconds since some day: `2023-11-16 18:17:03.9799600`.
fn microseconds(text: &str) -> Option<u64> {
    let (date, time) = text.trim().split_once(' ')?;
    let mut date = date.split('-').map(|n| n.parse::<u64>().ok());
    let (year, month, day) = (date.next()??, date.next()??, date.next()??);
    let mut time = time.split(':');
    let (hours, minutes) = (time.next()?, time.next()?);
    let seconds: f64 = time.next()?.trim_end_matches("+00").parse().ok()?;
    let whole = |n: &str| n.parse::<u64>().ok();
    let in_range = (1..=12).contains(&month) && (1..=31).contains(&day) && year < 10_000;
    let day = days(year, month, day);
    let minutes =
        (day * 24 + whole(hours).filter(|h| *h < 24)?) * 60 + whole(minutes).filter(|m| *m < 60)?;
    (in_range && (0.0..61.0).contains(&seconds))
        .then(|| minutes * 60_000_000 + (seconds * 1e6).round() as u64)
}

/// Days since the first of March of the year 0.
fn days(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year.saturating_sub(1), month + 9)
    };
    365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mooncake_lines_are_read_and_start_at_zero() {
        let text = "{\"timestamp\": 3000, \"input_length\": 600, \"output_length\": 5, \"hash_ids\": [0, 1]}\n\
                    {\"timestamp\": 4000, \"input_length\": 512, \"output_length\": 0, \"hash_ids\": [0]}\n";
        let read = Workload::parse("a/b.jsonl", text.as_bytes()).unwrap();
        assert_eq!(
            (read.name.as_str(), read.asks.len(), read.asks[1].arrival),
            ("b.jsonl", 2, 1_000_000)
        );
        assert_eq!(
            (read.blocks(&read.asks[0]), read.asks[1].output),
            (&[0, 1][..], 1)
        );
        assert!((read.ceiling() - 1.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn azure_lines_are_read_across_midnight() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
                    2023-12-31 23:59:59.5000000,1000,10\n2024-01-01 00:00:00.2500000,3,8\n";
        let read = Workload::parse("x.csv", text.as_bytes()).unwrap();
        assert_eq!((read.asks[0].arrival, read.asks[1].arrival), (0, 750_000));
        assert_eq!(
            (
                read.blocks(&read.asks[0]).len(),
                read.blocks(&read.asks[1]).len()
            ),
            (2, 1)
        );
        assert!(read.ceiling() < 1e-9);
    }

    #[test]
    fn a_bad_line_is_named() {
        for text in [
            "{}",
            "what",
            "2023-11-16 18:17:03.9,1",
            "{\"timestamp\":1,\"input_length\":600,\"output_length\":5,\"hash_ids\":[0]}",
        ] {
            let error = Workload::parse("t", format!("\n{text}\n").as_bytes()).unwrap_err();
            assert!(error.to_string().starts_with("t, line 2: "), "{error}");
        }
        assert!(matches!(
            Workload::parse("t", &b"\n"[..]),
            Err(TraceError::Empty { .. })
        ));
    }

    #[test]
    fn turns_of_a_conversation_build_on_each_other() {
        let made = Conversations {
            systems: 1,
            turns: 3,
            again: false,
            system: 64,
            question: 32,
            answer: 16,
            requests: 6,
            rate: 1.0,
            block_tokens: 16,
            seed: 1,
        };
        let made = made.workload();
        let blocks: Vec<&[u64]> = made.asks.iter().map(|a| made.blocks(a)).collect();
        assert_eq!(
            made.asks.iter().map(|a| a.input).collect::<Vec<_>>(),
            [96, 144, 192, 96, 144, 192]
        );
        assert!(blocks[2].starts_with(blocks[1]) && blocks[1].starts_with(blocks[0]));
        assert_eq!(blocks[3][..4], blocks[0][..4]);
        assert_ne!(blocks[3][4], blocks[0][4]);
    }

    #[test]
    fn questions_without_a_memory_come_again_in_the_same_order() {
        let made = Conversations {
            systems: 2,
            turns: 3,
            again: true,
            system: 64,
            question: 32,
            answer: 16,
            requests: 12,
            rate: 1.0,
            block_tokens: 16,
            seed: 1,
        };
        let made = made.workload();
        let blocks: Vec<&[u64]> = made.asks.iter().map(|a| made.blocks(a)).collect();
        assert!(blocks.iter().all(|b| b.len() == 6));
        assert_eq!(blocks[..6], blocks[6..]);
        // Two system prompts of four blocks, six questions of two.
        let different: FxHashSet<u64> = made.blocks.iter().copied().collect();
        assert_eq!(different.len(), 2 * 4 + 6 * 2);
    }
}
