//! Checks on the shape of the repo that the compiler does not make: `cargo xtask layers` and `cargo xtask tidy`.
#![forbid(unsafe_code)]
#![expect(
    clippy::print_stdout,
    reason = "a command-line tool reports on standard output"
)]

mod layers;
mod tidy;

use std::process::ExitCode;

fn main() -> anyhow::Result<ExitCode> {
    let complaints = match std::env::args().nth(1).as_deref() {
        Some("layers") => layers::check()?,
        Some("tidy") => tidy::check()?,
        _ => anyhow::bail!("usage: cargo xtask layers | tidy"),
    };
    for complaint in &complaints {
        println!("{complaint}");
    }
    Ok(if complaints.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
