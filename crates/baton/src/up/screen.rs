//! What a person sees: lines of children with a coloured name, one line of progress that is written over, and the final
//! word on standard output.
//!
//! A terminal that is gone, or a full disk behind a redirection, must not end the stack: failed writes are dropped.

use parking_lot::Mutex;
use std::io::{IsTerminal as _, Write as _};

/// Colours of names, by the child's number: cyan, green, yellow, magenta, blue.
const COLOURS: [u8; 5] = [36, 32, 33, 35, 34];

/// Standard error, shared by all that write to it.
#[derive(Debug)]
pub(super) struct Screen {
    is_terminal: bool,
    status: Mutex<String>,
}

impl Screen {
    /// The screen of this process.
    pub(super) fn new() -> Self {
        Self {
            is_terminal: std::io::stderr().is_terminal(),
            status: Mutex::new(String::new()),
        }
    }

    /// A line of a child.
    pub(super) fn line(&self, child: usize, name: &str, text: &str) {
        let line = match self.is_terminal {
            true => format!(
                "\x1b[{}m{name}\x1b[0m {text}",
                COLOURS[child % COLOURS.len()]
            ),
            false => format!("{name} {text}"),
        };
        self.write(&line);
    }

    /// A line of our own.
    pub(super) fn say(&self, text: &str) {
        self.write(&format!("baton: {text}"));
    }

    /// Replaces the line of progress; empty removes it. Without a terminal each new one is a line.
    pub(super) fn status(&self, text: &str) {
        let mut status = self.status.lock();
        if *status == text {
            return;
        }
        text.clone_into(&mut status);
        let mut err = std::io::stderr().lock();
        let _ = match (self.is_terminal, text.is_empty()) {
            (true, _) => write!(err, "\r\x1b[2K{text}").and_then(|()| err.flush()),
            (false, true) => Ok(()),
            (false, false) => writeln!(err, "baton: {text}"),
        };
    }

    /// The final word, on standard output, where scripts look for it.
    pub(super) fn print(&self, text: &str) {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{text}").and_then(|()| out.flush());
    }

    fn write(&self, line: &str) {
        let status = self.status.lock();
        let mut err = std::io::stderr().lock();
        let _ = match self.is_terminal {
            true => write!(err, "\r\x1b[2K{line}\n{status}").and_then(|()| err.flush()),
            false => writeln!(err, "{line}"),
        };
    }
}
