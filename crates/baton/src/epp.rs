//! `baton epp`: the endpoint picker behind Envoy, from llm-d's flags and configuration.

use crate::Failure;
use crate::cli::Epp;

/// What a cluster needs and a laptop does not is left out of this build.
#[cfg(not(feature = "cluster"))]
pub(crate) fn command(_: &Epp) -> Result<(), Failure> {
    Err(Failure::Usage(anyhow::anyhow!(
        "this baton was built without the endpoint picker; build it with `cargo build --release -p baton --features cluster`"
    )))
}

#[cfg(feature = "cluster")]
pub(crate) use with_cluster::command;

#[cfg(feature = "cluster")]
mod with_cluster {
    use super::{Epp, Failure};
    use crate::cli::EppCommand;
    use crate::lifetime::{ParentWatch, shutdown_token};
    use anyhow::Context as _;
    use baton_epp::{Config, ListenError};
    use std::net::SocketAddr;
    use std::path::Path;

    /// Runs until it is told to stop; or says what a configuration means.
    pub(crate) fn command(args: Epp) -> Result<(), Failure> {
        if let Some(EppCommand::CheckConfig { file }) = args.command {
            return check(&file);
        }
        let watch = ParentWatch::from(args.exit_with_parent);
        let mut settings = args.settings;
        if let Some(model) = settings.tokenizer.take() {
            let found = crate::model::find(&model.to_string_lossy())?;
            settings.tokenizer = Some(found);
        }
        let resolved = settings.resolve();
        let (config, warnings) = resolved.map_err(|e| Failure::Usage(e.into()))?;
        for warning in warnings {
            tracing::warn!("{warning}");
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|e| Failure::Unavailable(e.into()))?;
        let done = runtime.block_on(serve(config, watch));
        runtime.shutdown_background();
        done
    }

    #[expect(clippy::print_stdout, reason = "the report is what the command is for")]
    fn check(file: &Path) -> Result<(), Failure> {
        let (report, usable) =
            baton_epp::check_config(file).map_err(|e| Failure::Usage(e.into()))?;
        print!("{report}");
        if usable {
            return Ok(());
        }
        let file = file.display();
        Err(Failure::Usage(anyhow::anyhow!("{file} cannot be used")))
    }

    async fn serve(config: Config, watch: ParentWatch) -> Result<(), Failure> {
        let shutdown = shutdown_token(watch).map_err(|e| Failure::Unavailable(e.into()))?;
        let bound = baton_epp::bind(config).await.map_err(|error| match error {
            ListenError::Bind(..) | ListenError::Random => Failure::Unavailable(error.into()),
            _ => Failure::Usage(error.into()),
        })?;
        let addresses = bound.addresses().context("the ports are gone");
        let peers = bound.peers_address().context("the port is gone");
        say_ready(
            addresses.map_err(Failure::Unavailable)?,
            peers.map_err(Failure::Unavailable)?,
        );
        baton_epp::run(bound, shutdown).await;
        Ok(())
    }

    /// The one line by which others learn that it is ready, and where.
    #[expect(
        clippy::print_stdout,
        reason = "the ready line is read by whoever started this"
    )]
    fn say_ready([grpc, health, metrics]: [SocketAddr; 3], peers: Option<SocketAddr>) {
        use std::io::Write as _;
        let peers = peers.map_or(String::new(), |at| format!(", other pickers on {at}"));
        println!(
            "baton epp ready on grpc://{grpc}, health on grpc://{health}, metrics on http://{metrics}{peers}"
        );
        // A closed pipe only means that nobody waits for the line.
        let _ = std::io::stdout().flush();
    }
}
