//! The binary: a table of contents. Each subcommand wires parts together; none holds policy of its own.
#![forbid(unsafe_code)]

mod cli;
mod compile;
mod epp;
mod fetch;
mod gateway;
mod lifetime;
mod model;
mod serve;
mod sidecar;
mod simulate;
mod up;

use clap::Parser as _;
use cli::{Cli, Command, LogFormat};
use std::process::ExitCode;

/// Bad flags or a bad configuration; nothing was started.
const EX_USAGE: u8 = 64;
/// A device, plugin or model that could not be had.
const EX_UNAVAILABLE: u8 = 69;
/// The engine or another part broke while serving.
const EX_SOFTWARE: u8 = 70;

/// Why a command ended badly, by exit code.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The flags or a file they name are wrong; said before any port is bound.
    Usage(anyhow::Error),
    /// Something needed at start is missing.
    Unavailable(anyhow::Error),
    /// It broke while running.
    Broken(anyhow::Error),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { EX_USAGE } else { 0 };
            // Nothing can be done when even the message cannot be written.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    start_logging(cli.log_format);
    let done = match cli.command {
        Command::Up(args) => up::command(args),
        Command::Serve(args) => serve::command(*args),
        Command::Gateway(args) => gateway::command(&args),
        Command::Sidecar(args) => sidecar::command(*args),
        #[cfg(feature = "cluster")]
        Command::Epp(args) => epp::command(*args),
        #[cfg(not(feature = "cluster"))]
        Command::Epp(args) => epp::command(&args),
        Command::Fetch(args) => fetch::command(&args),
        Command::Compile(args) => compile::command(&args),
        Command::Simulate(args) => simulate::command(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

/// Says what went wrong in one line and picks the exit code.
#[expect(
    clippy::print_stderr,
    reason = "the last word of a command goes to standard error even when logging is off"
)]
fn report(failure: &Failure) -> ExitCode {
    let (code, error) = match failure {
        Failure::Usage(error) => (EX_USAGE, error),
        Failure::Unavailable(error) => (EX_UNAVAILABLE, error),
        Failure::Broken(error) => (EX_SOFTWARE, error),
    };
    eprintln!("baton: {error:#}");
    ExitCode::from(code)
}

fn start_logging(format: LogFormat) {
    use std::io::IsTerminal as _;
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}

/// Prints the one line by which others learn that a server is ready, and where.
pub(crate) fn say_ready(what: &str, address: std::net::SocketAddr) {
    say_ready_over("http", what, address);
}

/// As [`say_ready`], for a server that may speak TLS.
#[expect(
    clippy::print_stdout,
    reason = "the ready line is read by the process that started this one"
)]
pub(crate) fn say_ready_over(scheme: &str, what: &str, address: std::net::SocketAddr) {
    use std::io::Write as _;
    println!("baton {what} ready on {scheme}://{address}");
    // A closed pipe only means that nobody waits for the line.
    let _ = std::io::stdout().flush();
}
